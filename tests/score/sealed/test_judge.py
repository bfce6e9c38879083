"""Submissions that cheat, each caught, and beside each an honest one of the same shape that is not."""

import json
import math
import os
import pickle
import shutil
import tomllib
from pathlib import Path

import numpy as np
import pytest
import tomli_w
from affine import Affine
from pyproj import CRS, Transformer
from scipy.ndimage import zoom

from canopy.errors import SealError
from canopy.grid import Grid
from canopy.raster import Pixels, read_raster, warp, write_raster
from canopy.score.sealed.judge import judge, write_verdict
from canopy.score.sealed.key import open_key
from canopy.score.sealed.scorer import Scorer
from canopy.score.sealed.seal import SealSettings, seal
from canopy.score.sealed.submission import read_submission, write_template
from canopy.tiler.fingerprint import fingerprint
from tests.score.sealed.conftest import BASE, BETTER, build, height_of, picture, retrained, says


def edit(folder, **changes):
    """Change the declaration; None takes a key out."""
    path = folder / "submission.toml"
    table = tomllib.loads(path.read_text()) | changes
    path.write_text(tomli_w.dumps({key: value for key, value in table.items() if value is not None}))


def caught(verdict, check, *words):
    """The verdict is the base model's score, for this reason."""
    assert verdict.status == "fallback"
    assert verdict.score.value == 0
    said = [reason.said for reason in verdict.reasons if reason.check == check]
    assert any(all(word in text for word in words) for text in said), verdict.reasons


def trained_on(world, tmp_path, sites, *, name="other", **changes):
    """A submission like the sound one, trained on another tile set."""
    tiles = build(tmp_path / f"{name}-tiles", name, sites, **changes)
    model = retrained(world.base, tmp_path / f"{name}-model", noise=0.3, sites=tuple(sites))
    folder = tmp_path / f"{name}-submission"
    write_template(read_task_of(world), folder, model=model, tile_sets=[tiles], compute="1 CPU minute")
    return folder


def read_task_of(world):
    return world.sealed.task


def judged(world, folder, predict=BETTER):
    return judge(world.task, world.key, folder, predict=predict)


# --- the honest one ------------------------------------------------------------------------------------------------------


def test_a_sound_submission_is_scored(honest, tmp_path):
    verdict = honest
    assert verdict.status == "scored", verdict.reasons
    low, high = verdict.score.interval_95
    assert 0 < low <= verdict.score.value <= high <= 1
    path = write_verdict(verdict, tmp_path / "deep" / "result.json")
    told = json.loads(path.read_text())
    assert told["status"] == "scored"
    assert told["score"] == verdict.score.value
    assert told["scorer"] == Scorer.here().digest
    assert told["conventions"]["bias"].startswith("prediction minus reference")
    assert told["budget"]["measured"]["seconds"] == 1.0
    assert "headroom" in verdict.as_text()


@pytest.mark.slow
def test_the_score_is_what_the_arrays_say(submit, world):
    """Every cell again from the key's arrays, with nothing but numpy."""
    verdict = submit.verdict()
    with open_key(world.key) as key:
        for cell in verdict.score.cells:
            if cell.left_out:
                continue
            low, high = bounds(cell, verdict)
            errors, base = [], []
            for chip in key.record.chips:
                if chip.region == cell.region:
                    label = key.array(f"height/{chip.name}")
                    inside = (label >= low) & (label < high)
                    errors.append(np.abs(0.9 * label + 0.6 - label)[inside])
                    base.append(np.abs(key.array(f"base/{chip.name}") - label)[inside])
            e, b = np.concatenate(errors).mean(), np.concatenate(base).mean()
            assert cell.headroom == pytest.approx(min((b - e) / (b - cell.floor_m), 1), abs=2e-3)


def bounds(cell, verdict):
    edges = [-np.inf, *verdict.task.rules.class_edges_m, np.inf]
    number = [c.height_class for c in verdict.score.cells if c.region == cell.region].index(cell.height_class)
    return edges[number], edges[number + 1]


@pytest.mark.slow
def test_the_score_is_the_same_again(submit):
    assert submit.verdict().as_json() == submit.verdict().as_json()


def test_everything_that_is_wrong_is_told_at_once(submit, honest, world):
    """Each by itself, with an honest twin of its own, is among the slow tests."""
    (submit.folder / "model" / "notes.txt").symlink_to(world.key)
    (submit.folder / "model" / "weights.pkl").write_bytes(pickle.dumps(Reads()))
    with open_key(world.key) as key:
        chip = key.record.chips[0]
    label = {"product": "a map", "source": "satellites", "sites": ["ELSEWHERE"], "derived_from": [chip.item]}
    edit(submit.folder, label=[label], base={"name": "other", "weights_sha256": "a" * 64}, sites=["FIELD"])
    verdict = submit.verdict()
    caught(verdict, "files", "notes.txt is a link")
    caught(verdict, "files", "weights.pkl may hold a program")
    caught(verdict, "labels", "derives from")
    caught(verdict, "base", "declared to start from other")
    caught(verdict, "declaration", "site ELSEWHERE")
    caught(verdict, "acquisition", "FIELD")
    assert verdict.ran is None, "what is turned down is not run"
    assert not honest.reasons


# --- learned from what is sealed -----------------------------------------------------------------------------------------


def test_trained_on_the_sealed_chips(world, honest, tmp_path):
    verdict = judged(world, trained_on(world, tmp_path, world.sites))
    caught(verdict, "ground", "overlap")
    caught(verdict, "content", "images of 4 of the 4 sealed chips")
    caught(verdict, "acquisition", "WOOD")
    assert honest.status == "scored"


@pytest.mark.slow
def test_trained_on_them_turned_rescaled_and_renamed(world, tmp_path):
    turned = np.rot90(world.sites["WOOD"][0], axes=(1, 2))
    scaled = np.stack([zoom(band, 1.25, order=1)[:256, :128] for band in turned])
    verdict = judged(world, trained_on(world, tmp_path, {"NOVEL": (scaled, 704_000.0)}, name="turned"))
    caught(verdict, "content", "sealed chips")
    assert not [reason for reason in verdict.reasons if reason.check == "ground"], "it claims to lie elsewhere"
    fresh = np.rot90(picture(9), axes=(1, 2))
    honest = judged(world, trained_on(world, tmp_path, {"NOVEL": (fresh, 704_000.0)}, name="fresh"))
    assert honest.status == "scored", honest.reasons


@pytest.mark.slow
def test_trained_beside_the_sealed_ground(world, tmp_path):
    # WOOD ends at 480 128 m: nearer than the buffer of 50 m, and further.
    near = judged(world, trained_on(world, tmp_path, {"NEXT": (picture(11), 480_128.0 + 30.0)}, name="near"))
    caught(near, "ground", "within 50 m")
    far = judged(world, trained_on(world, tmp_path, {"NEXT": (picture(11), 480_128.0 + 400.0)}, name="far"))
    assert far.status == "scored", far.reasons


@pytest.mark.slow
def test_more_of_the_same_flight(world, tmp_path):
    """A leak where whole sites are held out, and fair where blocks are."""
    folder = trained_on(world, tmp_path, {"WOOD": (picture(21), 480_128.0 + 400.0)}, name="flight")
    caught(judged(world, folder), "acquisition", "WOOD")
    settings = SealSettings(splits=("all",), by_site=False, least_px=200, buffer_m=50.0)
    made = seal([world.tiles], tmp_path / "task", key=tmp_path / "key", base=world.base, predict=BASE, settings=settings)
    verdict = judge(made.folder, made.key, folder, predict=BETTER)
    assert verdict.status == "scored", verdict.reasons


@pytest.mark.slow
def test_footprints_alone_are_held_against_the_exact_ground(submit, world):
    with open_key(world.key) as key:
        from shapely import from_wkb

        west, south, east, north = from_wkb(key.record.chips[0].footprint_wkb).bounds
    edit(submit.folder, footprints_deg=[[west + 1e-5, south + 1e-5, east - 1e-5, north - 1e-5]])
    caught(submit.verdict(), "ground", "declared footprints")
    edit(submit.folder, footprints_deg=[[west + 0.1, south, east + 0.1, north]])
    assert submit.verdict().status == "scored"


@pytest.mark.slow
def test_labels_from_a_product_of_the_sealed_lidar(submit, world):
    label = {"product": "a height map of the web", "source": "satellites", "sites": ["ELSEWHERE"]}
    with open_key(world.key) as key:
        item = key.record.chips[0].item
    edit(submit.folder, label=[label | {"derived_from": [f"  {item.upper()} "]}])
    caught(submit.verdict(), "labels", "derives from")
    edit(submit.folder, label=[label | {"source": "flight", "sites": ["ELSEWHERE", "wood"]}])
    caught(submit.verdict(), "labels", "wood", "which is sealed")
    edit(submit.folder, label=[label | {"derived_from": ["another flight"]}])
    assert submit.verdict().status == "scored"


@pytest.mark.slow
def test_the_sealed_heights_under_other_pictures(world, tmp_path):
    """Imagery simulated over the sealed heights: nothing of the pictures or places is shared."""

    def simulated(name, heights_from):
        folder = trained_on(world, tmp_path, {"MADE": (picture(13), 768_000.0)}, name=name)
        lineage = folder / "lineage" / name
        with np.load(lineage / "codes.npz") as archive:
            codes = dict(archive)
        for k, chip in enumerate(sorted(key for key in codes if key.startswith("height/"))):
            height = height_of(heights_from)[:, 128 * k : 128 * (k + 1)]
            codes[chip] = fingerprint(Pixels(data=height[None], valid=np.ones(height.shape, bool)))
        np.savez_compressed(lineage / "codes.npz", **codes)
        return folder

    verdict = judged(world, simulated("copied", world.sites["WOOD"][0]))
    caught(verdict, "labels", "heights of 2 of the 4 sealed chips")
    honest = judged(world, simulated("own", picture(17)))
    assert honest.status == "scored", honest.reasons


# --- another base model --------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_another_base_model_than_declared(world, tmp_path):
    def handed_in(name, **how):
        model = retrained(world.base, tmp_path / name, sites=("ELSEWHERE",), **how)
        folder = tmp_path / f"{name}-submission"
        return write_template(read_task_of(world), folder, model=model, tile_sets=[world.elsewhere], compute="none")

    stranger = judged(world, handed_in("stranger", noise=1.0, keep=0.0))
    caught(stranger, "base", "another model than declared")
    trained = judged(world, handed_in("trained", noise=0.5))
    assert trained.status == "scored", trained.reasons


@pytest.mark.slow
def test_another_base_model_and_saying_so(submit):
    edit(submit.folder, base={"name": "chmv2", "weights_sha256": "a" * 64})
    caught(submit.verdict(), "base", "declared to start from chmv2")
    edit(submit.folder, base={"name": "renamed, the same weights", "weights_sha256": submit.task.base.weights_sha256})
    assert submit.verdict().status == "scored"


@pytest.mark.slow
def test_a_copy_of_the_base_model_scores_nothing(world, tmp_path):
    folder = tmp_path / "copy"
    write_template(read_task_of(world), folder, model=world.base, tile_sets=[], compute="none")
    verdict = judged(world, folder, BASE)
    assert verdict.status == "scored"
    assert verdict.score.value == 0
    assert verdict.score.interval_95 == (0, 0)


# --- what is left out ----------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"tile_set": None, "label": None, "sites": None}, "no ground is declared"),
        ({"label": None}, "no label product"),
        ({"sites": None}, "site ELSEWHERE"),
        ({"untrained": True}, "untrained, and with"),
        ({"label": [{"product": "p", "source": "s"}]}, "without sites and without what it derives from"),
    ],
)
def test_undeclared_lineage(submit, changes, words):
    edit(submit.folder, **changes)
    caught(submit.verdict(), "declaration", words)


@pytest.mark.slow
def test_a_contract_that_knows_more_than_the_declaration(submit, world, tmp_path):
    extra = {"sites": ("ELSEWHERE",), "tile_sets": {"secret": "b" * 64}, "footprints_deg": ((1.0, 2.0, 3.0, 4.0),)}
    model = retrained(world.base, tmp_path / "m", noise=0.3, **extra)
    shutil.rmtree(submit.folder / "model")
    shutil.copytree(model, submit.folder / "model")
    caught(submit.verdict(), "declaration", "tile set secret")
    caught(submit.verdict(), "declaration", "footprint (1.0, 2.0, 3.0, 4.0)")


@pytest.mark.slow
def test_a_lineage_that_is_not_the_declared_one(submit, world):
    declared = read_submission(submit.folder).tile_set[0].model_dump()
    edit(submit.folder, tile_set=[declared | {"index_sha256": "c" * 64}])
    caught(submit.verdict(), "declaration", "was handed in")
    edit(submit.folder, tile_set=[declared])
    codes = submit.folder / "lineage" / "open" / "codes.npz"
    with np.load(codes) as archive:
        kept = dict(list(archive.items())[2:])
    np.savez(codes, **kept)
    caught(submit.verdict(), "declaration", "lacks the fingerprints of 1 of 2 chips")
    shutil.copytree(world.elsewhere / "image", submit.folder / "lineage" / "open" / "image")
    assert submit.verdict().status == "scored", "images stand in for their fingerprints"


# --- an edited scorer, task or key ---------------------------------------------------------------------------------------


def test_an_edited_scorer_refuses(submit, honest):
    here = Scorer.here()
    edited = here.model_copy(update={"sources": here.sources | {"metrics.py": "d" * 64}})
    with pytest.raises(SealError, match=r"canopy/metrics.py is not that of the scorer"):
        submit.verdict(scorer=edited)
    assert honest.status == "scored"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("was", "now", "words"),
    [
        ("jitter_m = 0.5", "jitter_m = 9.0", "rules.jitter_m"),
        ("least_px = 200", "least_px = 9000", "rules.least_px"),
        ('starts_from = "base"', 'starts_from = "any"', "rules.starts_from"),
        ('root = "ROOT', 'root = "0000', "root 0000"),
    ],
)
def test_a_doctored_task_is_named(world, submit, tmp_path, was, now, words):
    folder = tmp_path / "task"
    shutil.copytree(world.task, folder)
    text = (folder / "task.toml").read_text()
    was = was.replace("ROOT", submit.task.root[:4])
    assert was in text
    text = text.replace(was, now)
    assert judge(folder, world.key, submit.folder, predict=BETTER).status == "scored"
    (folder / "task.toml").write_text(text)
    with pytest.raises(SealError, match=words):
        judge(folder, world.key, submit.folder, predict=BETTER)


@pytest.mark.slow
def test_a_doctored_image_or_leaf_is_named(world, submit, tmp_path):
    folder = tmp_path / "task"
    shutil.copytree(world.task, folder)
    leaves = (folder / "leaves.txt").read_text()
    (folder / "leaves.txt").write_text(leaves.replace(leaves[:64], "0" * 64))
    with pytest.raises(SealError, match="leaf chip-1 "):
        judge(folder, world.key, submit.folder, predict=BETTER)
    (folder / "leaves.txt").write_text(leaves)
    pixels, grid = read_raster(folder / "image" / "chip-2.tif")
    write_raster(folder / "image" / "chip-2.tif", pixels.data // 2, grid=grid)
    with pytest.raises(SealError, match=r"chip-2.tif has SHA-256"):
        judge(folder, world.key, submit.folder, predict=BETTER)


# --- reading the labels --------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_links_to_the_key(submit, world):
    place = submit.folder / "model" / "notes.txt"
    place.symlink_to(world.key)
    caught(submit.verdict(), "files", "model/notes.txt is a link")
    place.unlink()
    os.link(world.key, place)
    caught(submit.verdict(), "files", "model/notes.txt is the key")
    place.unlink()
    place.write_text("notes")
    assert submit.verdict().status == "scored"


@pytest.mark.slow
@pytest.mark.parametrize("path", ["../../task.key", "/etc", ".", "model/../.."])
def test_paths_that_lead_out(submit, path):
    edit(submit.folder, path=path)
    caught(submit.verdict(), "files", "is not in the submission")
    edit(submit.folder, path="lineage/../model")
    assert submit.verdict().status == "scored"


class Reads:
    """Unpickled, it would run a program."""

    def __reduce__(self):
        return (eval, ("open('/tmp/canopy-was-here', 'w').write('x')",))


@pytest.mark.slow
def test_programs_and_pickles(submit):
    for name, data in (("model/extra.py", b"open('labels')"), ("model/weights.pt", pickle.dumps(Reads()))):
        (submit.folder / name).write_bytes(data)
        caught(submit.verdict(), "files", f"{name} may hold a program")
        (submit.folder / name).unlink()
    weights = submit.folder / "model" / "weights.safetensors"
    sound = weights.read_bytes()
    weights.write_bytes(pickle.dumps(Reads()))
    caught(submit.verdict(), "files", "not a readable safetensors file")
    weights.write_bytes(sound)
    assert submit.verdict().status == "scored"
    assert not Path("/tmp/canopy-was-here").exists()


@pytest.mark.slow
def test_a_key_in_the_submission_is_refused(world, submit):
    stolen = submit.folder / "model" / "notes.txt"
    shutil.copyfile(world.key, stolen)
    stolen.chmod(0o600)
    with pytest.raises(SealError, match="can read; move it elsewhere"):
        judge(world.task, stolen, submit.folder, predict=BETTER)


# --- predictions ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def arrays(submit, world):
    """The sound submission as predictions instead of a model, and how to write them."""
    shutil.rmtree(submit.folder / "model")
    (submit.folder / "heights").mkdir()
    edit(submit.folder, kind="predictions", path="heights")

    def write(heights):
        for path in (world.task / "image").glob("*.tif"):
            pixels, _ = read_raster(path)
            np.save(submit.folder / "heights" / f"{path.stem}.npy", heights(height_of(pixels.data)))
        return submit.verdict()

    return write


@pytest.mark.slow
def test_leaving_out_hard_pixels_gains_nothing(arrays):
    full = arrays(lambda truth: (0.9 * truth + 0.6).astype(np.float32))
    assert full.status == "scored"
    assert "its makers say" in full.notes[0]
    tall = arrays(lambda truth: np.where(truth > 15, np.float32(np.nan), 0.9 * truth + 0.6).astype(np.float32))
    assert tall.score.missing > 1000
    assert 0 < tall.score.value < full.score.value
    assert arrays(lambda truth: np.full_like(truth, np.nan)).score.value == 0


@pytest.mark.slow
def test_one_height_everywhere_scores_below_the_base_model(arrays):
    assert arrays(lambda truth: np.full_like(truth, 15.0)).score.value < 0
    assert arrays(lambda truth: np.float32(0.9) * truth).score.value > 0


@pytest.mark.slow
def test_arrays_that_are_none(arrays, submit):
    caught(arrays(lambda truth: truth.astype(np.float64)), "run", "not float32 (128, 128)")
    caught(arrays(lambda truth: truth[:-1]), "run", "float32 (127, 128), not")
    caught(arrays(lambda truth: np.where(truth > 9, np.float32(np.inf), truth)), "run", "infinite heights")
    caught(arrays(lambda truth: np.array([Reads()], object)), "run", "no .npy array of numbers")
    assert arrays(lambda truth: truth).status == "scored"
    (submit.folder / "heights" / "chip-1.npy").unlink()
    caught(submit.verdict(), "run", "chip-1.npy is missing")


@pytest.mark.slow
def test_a_map_is_cut_to_the_chips(submit, world):
    """A raster over one of the sites on its own pixels, on larger ones, and in another CRS; the other site is missing."""
    shutil.rmtree(submit.folder / "model")
    edit(submit.folder, kind="map", path="map.tif")
    image, left = world.sites["WOOD"]
    truth = height_of(image)
    grid = Grid(crs=CRS.from_epsg(32617), transform=Affine(0.5, 0, left, 0, -0.5, 4_000_000), shape=truth.shape)
    write_raster(submit.folder / "map.tif", truth[None], grid=grid, nodata=np.nan)
    verdict = submit.verdict()
    assert verdict.status == "scored", verdict.reasons
    assert verdict.score.missing == 2 * 128 * 128
    assert sorted(verdict.score.regions.values()) == [0, 1]
    coarse = zoom(truth, 0.5, order=1)
    grid = Grid(crs=grid.crs, transform=Affine(1.0, 0, left, 0, -1.0, 4_000_000), shape=coarse.shape)
    write_raster(submit.folder / "map.tif", coarse[None], grid=grid, nodata=np.nan)
    assert 0.2 < max(submit.verdict().score.regions.values()) < 1
    across = Transformer.from_crs(32617, 32616, always_xy=True)
    west, south, east, north = across.transform_bounds(*grid.bounds)
    shape = (math.ceil((north - south) / 0.4), math.ceil((east - west) / 0.4))
    other = Grid(crs=CRS.from_epsg(32616), transform=Affine(0.4, 0, west, 0, -0.4, north), shape=shape)
    fine = Grid(crs=grid.crs, transform=Affine(0.5, 0, left, 0, -0.5, 4_000_000), shape=truth.shape)
    there = warp(Pixels(data=truth[None], valid=np.ones(truth.shape, bool)), fine, other)
    write_raster(submit.folder / "map.tif", there.data, grid=other, nodata=np.nan)
    assert 0.5 < max(submit.verdict().score.regions.values()) <= 1
    (submit.folder / "map.tif").write_text('<VRTDataset rasterXSize="9" rasterYSize="9"/>')
    assert submit.verdict().status == "fallback"


# --- the budget ----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_beyond_the_budget(submit, world, tmp_path):
    caught(submit.verdict(says(0.9, 0.6, ended="out of time", code=-9, seconds=99)), "budget", "ended after 99 s")
    caught(submit.verdict(says(0.9, 0.6, ended="out of memory", code=-9)), "budget", "100 MiB")
    caught(submit.verdict(says(0.9, 0.6, code=1)), "run", "ended with 1")
    assert not submit.verdict().notes


@pytest.mark.slow
def test_a_process_that_could_not_be_confined_is_told(submit):
    means = "no means to keep it from files, the network as it is"
    verdict = submit.verdict(says(0.9, 0.6, means=means))
    assert verdict.status == "scored"
    assert verdict.notes == (f"the model's process had {means}",)


@pytest.mark.slow
def test_more_parameters_than_the_budget(submit):
    from safetensors.numpy import load_file, save_file

    weights = submit.folder / "model" / "weights.safetensors"
    tensors = load_file(weights)
    save_file(tensors | {"more": np.zeros(11 * submit.task.base.parameters, np.float32)}, weights)
    caught(submit.verdict(), "budget", "the budget is")
    save_file(tensors | {"more": np.zeros(8 * submit.task.base.parameters, np.float32)}, weights)
    assert submit.verdict().status == "scored"

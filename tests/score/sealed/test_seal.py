"""What the public side of a task tells, what it does not, and that the key and its hashes belong together."""

import json
import shutil
import zipfile
from pathlib import Path

import geopandas as gpd
import numpy as np
import pytest
import shapely

from canopy.errors import OutputError, SealError
from canopy.raster import read_raster
from canopy.score.sealed.cells import coarse_outline
from canopy.score.sealed.key import open_key
from canopy.score.sealed.kinship import LEAST_SHARE, kin_share, sketch_of
from canopy.score.sealed.scorer import Scorer
from canopy.score.sealed.seal import Limits, SealSettings, seal
from canopy.score.sealed.task import read_chips, read_leaves, read_task
from canopy.tiler.chips import read_index
from tests.score.sealed.conftest import BASE, SECRET, retrained
from tests.tile_sets import content

SETTINGS = SealSettings(splits=("all",), by_site=True, least_px=200, buffer_m=50.0)


def test_the_task_tells_what_a_model_needs(world):
    task = read_task(world.task)
    assert (task.chips, task.dtype, task.gsd_m, len(task.bands)) == (4, "uint8", (0.5,), 3)
    assert task.regions == ("region-1", "region-2")
    assert task.licence == ("CC0-1.0",)
    assert task.base.name == "tiny"
    assert task.budget.parameters == 10 * task.base.parameters
    index = read_chips(world.task, task)
    assert set(index.columns) == {
        "id", "region", "gsd_m", "rows_px", "cols_px", "image_month", "image_source", "licence", "image_sha256", "geometry",
    }  # fmt: skip


def test_nothing_public_leads_to_the_labels(world):
    """No name, digest, height or exact place of the tile set is in any byte of the public folder."""
    public = content(world.task)
    assert not any("height" in name for name in public)
    index = read_index(world.tiles)
    secrets = [str(value) for name in ("id", "site", "item", "sha256", "lidar_source") for value in index[name]]
    for name, data in public.items():
        found = [secret for secret in secrets if secret.encode() in data and secret not in {"WOOD", "FIELD"}]
        assert not found, f"{name} tells {found}"
    told = gpd.read_parquet(world.task / "index.parquet")
    cells = shapely.area(told.to_crs(32617).geometry) / 1e6
    assert (cells > 90).all()
    for path in (world.task / "image").iterdir():
        _, grid = read_raster(path)
        assert grid.crs.is_engineering, "the place is withheld"
        assert tuple(grid.transform)[:6] == (0.5, 0, 0, 0, -0.5, 0)


def test_a_cell_does_not_tell_where_in_it(world):
    outline = read_index(world.tiles).geometry.iloc[0]
    moved = shapely.affinity.translate(outline, 0.001, 0.0005)
    assert coarse_outline(outline, 10).equals(coarse_outline(moved, 10))
    assert coarse_outline(outline, 10).covers(outline)
    assert not coarse_outline(outline, 0.01).covers(moved), "with small cells it would"


@pytest.mark.slow
def test_positions_are_kept_where_that_is_asked_for(world, tmp_path):
    settings = SealSettings(splits=("all",), least_px=200, positions="exact")
    made = seal([world.tiles], tmp_path / "task", key=tmp_path / "key", base=world.base, predict=BASE, settings=settings)
    _, grid = read_raster(next((made.folder / "image").iterdir()))
    assert grid.crs.to_epsg() == 32617
    exact = gpd.read_parquet(made.folder / "index.parquet").geometry
    assert exact.union_all().equals_exact(read_index(world.tiles).geometry.union_all(), 1e-9)


def test_the_key_is_its_owners_alone_and_holds_the_labels(world):
    assert world.key.stat().st_mode & 0o777 == 0o600
    index = read_index(world.tiles).set_index("id")
    with open_key(world.key) as key:
        for chip in key.record.chips:
            truth, _ = read_raster(world.tiles / "height" / f"{chip.id}.tif")
            np.testing.assert_array_equal(key.array(f"height/{chip.name}"), truth.data[0])
            assert chip.site == index.loc[chip.id, "site"]
        assert set(key.record.floor_m) == {"region-1", "region-2"}


def test_a_key_others_may_read_is_refused(world, tmp_path):
    path = tmp_path / "key"
    shutil.copyfile(world.key, path)
    path.chmod(0o644)
    with pytest.raises(SealError, match="chmod 600"), open_key(path):
        pass
    path.chmod(0o600)
    with open_key(path) as key:
        assert key.record.task.name == "task"


@pytest.mark.slow
def test_the_same_secret_seals_the_same_labels(world, tmp_path):
    made = seal([world.tiles], tmp_path / "task", key=tmp_path / "key", base=world.base, predict=BASE, secret=SECRET,
                settings=SETTINGS)  # fmt: skip
    one, other = read_leaves(world.task), read_leaves(made.folder)
    chips = [name for name in one if name.startswith("chip")]
    assert len(chips) == 4
    assert [one[name] for name in chips] == [other[name] for name in chips]
    again = seal([world.tiles], tmp_path / "task2", key=tmp_path / "key2", base=world.base, predict=BASE, settings=SETTINGS)
    assert not set(one.values()) & set(read_leaves(again.folder).values()), "another secret, other hashes of the same labels"


def altered(world, path, name, change):
    """A copy of the key with one entry changed."""
    with zipfile.ZipFile(world.key) as old, zipfile.ZipFile(path, "w") as new:
        for entry in old.namelist():
            new.writestr(entry, change(old.read(entry)) if entry == name else old.read(entry))
    path.chmod(0o600)
    return path


def test_a_changed_label_names_its_leaf(world, tmp_path):
    task, leaves = read_task(world.task), read_leaves(world.task)

    def flip(data):
        return data[:-1] + bytes([data[-1] ^ 1])

    with open_key(altered(world, tmp_path / "a", "height/chip-3.npy", lambda data: data)) as key:
        key.refuse_other(task, leaves)
    with open_key(altered(world, tmp_path / "b", "height/chip-3.npy", flip)) as key:  # noqa: SIM117
        with pytest.raises(SealError, match="leaf chip-3 "):
            key.refuse_other(task, leaves)

    def lower(data):
        record = json.loads(data)
        record["floor_m"]["region-1"][0] = 0.123
        return json.dumps(record).encode()

    with open_key(altered(world, tmp_path / "c", "record.json", lower)) as key:  # noqa: SIM117
        with pytest.raises(SealError, match="leaf record "):
            key.refuse_other(task, leaves)


def test_the_key_cannot_be_published_or_overwritten(world, tmp_path):
    def again(out, key, **arguments):
        seal([world.tiles], out, key=key, base=world.base, predict=BASE, settings=SETTINGS, **arguments)

    with pytest.raises(OutputError, match="would publish it"):
        again(tmp_path / "task", tmp_path / "task" / "sub" / "key")
    (tmp_path / "elsewhere").symlink_to(tmp_path / "task")
    with pytest.raises(OutputError, match="would publish it"):
        again(tmp_path / "task", tmp_path / "elsewhere" / "key")
    with pytest.raises(OutputError, match="exists"):
        again(tmp_path / "task", world.key)
    with pytest.raises(OutputError, match="exists"):
        again(world.task, tmp_path / "key")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["elsewhere"]


@pytest.mark.slow
def test_what_cannot_be_sealed_leaves_nothing(world, tmp_path):
    def attempt(predict=BASE, **changes):
        settings = SealSettings(**({"splits": ("all",), "least_px": 200} | changes))
        seal([world.tiles], tmp_path / "task", key=tmp_path / "key", base=world.base, predict=predict, settings=settings)

    def fails(model, images, out, budget):
        return BASE(model, images, out, budget).__class__(
            ended="itself", code=1, seconds=1, memory_mib=1, said="no such layer", means=""
        )

    with pytest.raises(SealError, match="no chip in split nowhere"):
        attempt(splits=("nowhere",))
    with pytest.raises(SealError, match="has 1000000 scored pixels"):
        attempt(least_px=1_000_000)
    with pytest.raises(SealError, match="did not predict: no such layer"):
        attempt(fails)
    assert not [*tmp_path.iterdir()]


@pytest.mark.slow
def test_a_given_budget_is_the_tasks(world, tmp_path):
    limits = Limits(seconds=12.5, parameters=99, memory_mib=77, threads=1)
    settings = SealSettings(splits=("all",), least_px=200, limits=limits)
    made = seal([world.tiles], tmp_path / "task", key=tmp_path / "key", base=world.base, predict=BASE, settings=settings)
    assert made.task.budget.model_dump() == {"seconds": 12.5, "parameters": 99, "memory_mib": 77, "threads": 1}


# --- the scorer and the base model ---------------------------------------------------------------------------------------


def test_the_scorer_is_what_it_says(tmp_path):
    import canopy

    here = Scorer.here()
    assert {"metrics.py", "tiler/fingerprint.py", "score/sealed/judge.py", "score/sealed/tree.py"} <= set(here.sources)
    package = tmp_path / "canopy"
    root = Path(canopy.__file__).parent
    for name in here.sources:
        (package / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(root / name, package / name)
    assert Scorer.here(package) == here
    with (package / "metrics.py").open("a") as file:
        file.write("\n# gentler\n")
    edited = Scorer.here(package)
    assert edited.digest != here.digest
    with pytest.raises(SealError, match=r"canopy/metrics.py is not that of the scorer this task is pinned to"):
        edited.refuse_other(here)
    older = here.model_copy(update={"packages": here.packages | {"numpy": "1.0"}})
    with pytest.raises(SealError, match=r"is not the numpy 1.0"):
        here.refuse_other(older)
    here.refuse_other(here)


@pytest.mark.slow
def test_a_descendant_is_told_from_a_stranger(world, tmp_path):
    sketch = sketch_of(world.base / "weights.safetensors", SECRET)
    assert len(sketch) > 20
    for name, noise, keep, kin in (("same", 0.0, 1.0, True), ("trained", 0.5, 1.0, True), ("stranger", 1.0, 0.0, False)):
        model = retrained(world.base, tmp_path / name, noise=noise, keep=keep)
        share = kin_share(sketch, model / "weights.safetensors", SECRET)
        assert (share >= LEAST_SHARE) == kin, f"{name}: {share:.0%}"
        assert abs(share - kin) < 0.2

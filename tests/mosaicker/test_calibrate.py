"""Calibrating a way of predicting on tile sets, keeping the tables, and maps that use them."""

import dataclasses
import json
import shutil

import numpy as np
import pytest
import rasterio
from typer.testing import CliRunner

from canopy.cli import app
from canopy.errors import CanopyError, ContractError, OutputError, RecipeError
from canopy.model.calibration import interval
from canopy.model.package import read_contract, update_contract
from canopy.model.tables import Calibrated
from canopy.mosaicker.calibrate import calibrate_models, keep_tables
from canopy.mosaicker.ensemble import load_ensemble
from canopy.region import map_region
from canopy.tiler.chips import build_tile_set, read_index, tile_set_hash
from tests.tile_sets import PAIR, pair, recipe

SITES = ("OAK", "PINE")


@pytest.fixture(scope="module")
def tiles(tmp_path_factory):
    """Two sites of a metre."""
    folder = tmp_path_factory.mktemp("tiles")
    for number, site in enumerate(SITES):
        pair(folder, site, left=400_000 + 5000 * number, top=3_300_000, shape=(128, 192), seed=number, gsd_m=1.0)
    sources = "".join(PAIR.replace("WOOD", site).replace("data/*_", f"data/{site}*_") for site in SITES)
    return build_tile_set(recipe(folder, sources, gsd_m=1.0, chip_px=64, stride_px=64, buffer_m=0.0))


@pytest.fixture(scope="module")
def result(tiny_model, tiles):
    return calibrate_models(tiny_model, [tiles])


@pytest.fixture
def model(tiny_model, tmp_path):
    return shutil.copytree(tiny_model, tmp_path / "model")


def test_every_site_is_measured_by_the_other(result, tiny_model, tiles):
    made = result.calibrated
    assert made.pixels.sites == SITES == tuple(site.site for site in result.coverage)
    assert made.tile_sets == {"set": tile_set_hash(tiles)}
    assert [member.weights_sha256 for member in made.members] == [read_contract(tiny_model).weights_sha256]
    assert all(0.5 < site.coverage < 1 for site in result.coverage)
    assert made.blocks is not None
    assert made.blocks.sides_m[0] == 10.0
    assert made.blocks.measured.sites == SITES
    assert "only 2 sites calibrated (OAK, PINE)" in result.warnings[0]


def test_tables_go_into_the_model_and_its_card(result, model):
    (model / "card.md").write_text("# tiny\n\n## Scores and intervals\n\nNot calibrated.\n\n## Not for\n\nuse\n")
    before = (model / "model.toml").read_text()
    assert keep_tables(result, [model]) == model
    contract = read_contract(model)
    assert (contract.calibration, contract.blocks) == (result.calibrated.pixels, result.calibrated.blocks)
    card = (model / "card.md").read_text()
    assert "Not calibrated" not in card
    assert "## Not for\n\nuse\n" in card
    assert f"| OAK | left out of the fit | {result.coverage[0].n} | {result.coverage[0].coverage:.1%} |" in card
    assert "| 10 m | " in card
    with pytest.raises(ContractError, match=r"tiny is calibrated on OAK, PINE; replace that with --overwrite"):
        keep_tables(result, [model])
    keep_tables(result, [model], overwrite=True)
    assert (model / "card.md").read_text() == card, "the section is replaced, not added again"
    loaded = load_ensemble(model)
    assert loaded.tables.pixels == result.calibrated.pixels
    assert loaded.shift is not None
    assert loaded.shift.sites == SITES
    keep_tables(dataclasses.replace(result, shift=None), [model], overwrite=True)
    assert load_ensemble(model).shift is None
    assert not (model / "shift.safetensors").exists()
    assert before != (model / "model.toml").read_text()


@pytest.mark.slow
def test_tables_of_turned_windows_are_a_file_that_their_maps_take(tiny_model, tiles, tmp_path):
    turned = calibrate_models(tiny_model, [tiles], tta="flips")
    with pytest.raises(ContractError, match="with test-time augmentation flips are of no single model; keep them in a file"):
        keep_tables(turned, [tiny_model])
    path = keep_tables(turned, [tiny_model], out=tmp_path / "flips.json")
    assert Calibrated.read(path) == turned.calibrated
    with pytest.raises(OutputError, match=r"flips.json exists; choose another file, or --overwrite"):
        keep_tables(turned, [tiny_model], out=path)
    image = tiles / "image" / f"{read_index(tiles)['id'].iloc[0]}.tif"
    options = {"imagery": image, "model": tiny_model, "tta": "flips"}
    map_region(**options, out=tmp_path / "given", calibration=path)
    map_region(**options, out=tmp_path / "bare")
    run = json.loads((tmp_path / "given" / "run.json").read_text())
    assert Calibrated.model_validate(run["intervals"]) == turned.calibrated
    assert json.loads((tmp_path / "bare" / "run.json").read_text())["intervals"] is None
    with rasterio.open(tmp_path / "bare" / "error.tif") as bare, rasterio.open(tmp_path / "given" / "error.tif") as given:
        assert bare.tags()["CANOPY_CALIBRATION"].startswith("uncalibrated")
        assert given.tags()["CANOPY_CALIBRATION"].startswith("split-conformal")
        gaussian, lower, upper = bare.read(1), given.read(2), given.read(3)
    with rasterio.open(tmp_path / "given" / "height.tif") as height:
        mean = height.read(1)
    # The uncalibrated half-width is a multiple of the spread, where it is not cut at the ground.
    spread = gaussian / 1.6449
    whole = (mean - 1.7 * spread > 0) & np.isfinite(mean)
    expected = interval(mean, spread, turned.calibrated.pixels)
    assert whole.sum() > 100
    np.testing.assert_allclose(lower[whole], expected[0][whole], atol=0.2)
    np.testing.assert_allclose(upper[whole], expected[1][whole], atol=0.2)
    with pytest.raises(ContractError, match="the calibration is of test-time augmentation 'flips', not 'none'"):
        map_region(imagery=image, model=tiny_model, out=tmp_path / "other", calibration=path)
    assert not (tmp_path / "other").exists()


def test_tables_of_another_model_are_refused(result, model, tiny_model):
    other = update_contract(model, read_contract(model), name="other")
    assert load_ensemble(model, calibration=result.calibrated).tables == result.calibrated, "the same weights are the same"
    foreign = result.calibrated.model_copy(
        update={"members": (result.calibrated.members[0].model_copy(update={"weights_sha256": "1" * 64}),)}
    )
    with pytest.raises(ContractError, match=f"the calibration is of tiny 0, not of {other.name} as asked for"):
        load_ensemble(model, calibration=foreign)


def test_ground_that_trained_the_model_is_refused(model, tiles):
    training = read_contract(model).training
    west, south, east, north = read_index(tiles).to_crs("EPSG:4326").total_bounds
    away = training.model_copy(update={"sites": ("X",), "footprints_deg": ((west + 1, south, east + 1, north),)})
    update_contract(model, read_contract(model), training=away)
    calibrate_models(model, [tiles])
    near = away.model_copy(update={"footprints_deg": ((west, south, (west + east) / 2, north),)})
    update_contract(model, read_contract(model), training=near)
    with pytest.raises(
        RecipeError, match=r"^\d+ of \d+ chips of .*, OAK.* for one, lie in .* on which tiny was trained; calib"
    ):
        calibrate_models(model, [tiles])
    assert calibrate_models(model, [tiles], allow_leak=True).calibrated.pixels.sites == SITES


@pytest.mark.slow
def test_of_a_set_that_trained_the_model_only_what_was_held_back(model, tiles):
    trained = read_contract(model).training.model_copy(update={"tile_sets": {"any": tile_set_hash(tiles)}})
    update_contract(model, read_contract(model), training=trained)
    index = read_index(tiles)
    made = calibrate_models(model, [tiles]).calibrated
    assert set(made.pixels.sites) == set(index[index["split"] == "val"]["site"])
    with pytest.raises(RecipeError, match=r"split train of .* trained tiny; take --split val"):
        calibrate_models(model, [tiles], splits=["train", "val"])


def test_the_command(model, tiles, tmp_path):
    command = ["calibrate", str(model), "--tiles", str(tiles), "--out", str(tmp_path / "a.json"), "--json"]
    done = CliRunner().invoke(app, command)
    assert done.exit_code == 0, done.output
    told = json.loads(done.stdout)
    assert told["kept"] == str(tmp_path / "a.json")
    assert {site["site"] for site in told["coverage"]} == set(SITES)
    again = CliRunner().invoke(app, command)
    assert (again.exit_code, "exists; choose another file" in again.stderr) == (1, True)


@pytest.mark.parametrize(
    ("text", "said"),
    [("", "Invalid JSON"), ('{"format": 1}', "members: Field required"), (None, "cannot be read")],
)
def test_a_file_that_is_no_table_is_one_line(text, said, tmp_path):
    path = tmp_path / "a.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(CanopyError, match=said) as error:
        Calibrated.read(path)
    assert "\n" not in str(error.value)
    assert "canopy calibrate … --out" in str(error.value)

"""Where a map is unlike the calibration data: in records, tags, tables and layers, whatever the sheets were."""

import json
import shutil

import geopandas
import numpy as np
import pytest
import shapely

import canopy.region.run
from canopy.errors import OutputError
from canopy.model.package import file_sha256, load_model, read_contract, update_contract
from canopy.model.shift import SiteSquares, fit_shift, save_shift, shift_score
from canopy.model.squares import measure
from canopy.mosaicker.ensemble import Ensemble
from canopy.raster import open_raster, read_raster, write_raster
from canopy.region import map_region, resume_region
from canopy.region.shift import FILES, shift_line
from tests.region.conftest import BOX, COUNT, LATTICE, SHEETS, content

DARK_COLS = 192
"""From this column on the second photograph is darker."""


def described(tiny_model, folder, image):
    """The tiny model with a description of data like this image."""
    shutil.copytree(tiny_model, folder)
    model = load_model(folder)
    pixels, _ = read_raster(image)
    heights = np.full(BOX.shape, 5, np.float32)
    rng = np.random.default_rng(2)
    contract = model.contract
    squares = measure(pixels.data, pixels.valid, heights, heights, mean=contract.mean, std=contract.std).features
    # The heights of the model itself are no part of what is tested: anything is like the calibration data in them.
    features = np.concatenate([squares] * 8)
    features[:, -2:] += 3 * rng.normal(size=(len(features), 2))
    features += 0.05 * rng.normal(size=features.shape)
    path = save_shift(
        folder, fit_shift({"here": SiteSquares(features=features.astype(np.float32), block=np.arange(len(features)))})
    )
    update_contract(folder, contract, shift_sha256=file_sha256(path))
    return folder


@pytest.fixture(scope="module")
def model(tiny_model, image, tmp_path_factory):
    return described(tiny_model, tmp_path_factory.mktemp("described") / "model", image)


@pytest.fixture(scope="module")
def photo(image, tmp_path_factory):
    """The image, half of it darkened."""
    pixels, _ = read_raster(image)
    data = pixels.data.copy()
    data[:, :, DARK_COLS:] //= 4
    path = tmp_path_factory.mktemp("photo") / "photo.tif"
    write_raster(path, data, grid=LATTICE.grid(BOX), valid=pixels.valid)
    return path


@pytest.fixture(scope="module")
def made(photo, model, tmp_path_factory):
    """Its map in a file a sheet."""
    out = tmp_path_factory.mktemp("made") / "out"
    map_region(imagery=photo, model=model, out=out, **SHEETS)
    return out


def told(out):
    return json.loads((out / "run.json").read_bytes())["shift"]


def tag(path):
    with open_raster(path) as raster:
        return raster.tags["CANOPY_SHIFT"]


def test_the_sheets_of_the_other_half_are_flagged(made):
    table = json.loads((made / "shift.json").read_bytes())
    flagged = {row["sheet"]: row["flagged"] for row in table["sheets"]}
    names = list(flagged)
    assert len(names) == COUNT
    dark = [name for name in names if int(name.split("_c")[1]) - BOX.col0 >= DARK_COLS]
    assert 2 <= len(dark) < COUNT
    assert flagged == {name: None if name == names[0] else name in dark for name in names}
    run = told(made)
    assert (run["sheets"], run["sheets_measured"], run["sheets_flagged"]) == (COUNT, COUNT - 1, len(dark))
    assert run["worst"] in dark
    assert shift_line(run) == (
        f"{len(dark)} of {COUNT} sheets look unlike the calibration data ({run['worst']} worst): the 90 % interval is not "
        f"promised there; see shift.gpkg"
    )


def test_the_layer_shows_them_on_the_map(made):
    layer = geopandas.read_file(made / "shift.gpkg")
    rows = json.loads((made / "shift.json").read_bytes())["sheets"]
    assert layer["sheet"].tolist() == [row["sheet"] for row in rows]
    assert [None if np.isnan(share) else share for share in layer["share"]] == [row["share"] for row in rows]
    assert layer.crs == LATTICE.crs
    assert layer.union_all().symmetric_difference(shapely.box(*LATTICE.grid(BOX).bounds)).area < 1e-3


def test_each_file_says_what_it_shows(made):
    for row in json.loads((made / "shift.json").read_bytes())["sheets"]:
        for path in (made / "sheets").glob(f"{row['sheet']}_*.tif"):
            assert tag(path).startswith("unlike" if row["flagged"] else "like")
            assert f"{row['share']:.1%} of {row['squares']} squares" in tag(path)
    run = told(made)
    assert f"{run['share']:.1%} of {run['squares']} squares" in tag(made / "height.vrt")
    assert "against here, limit by blocks left out" in tag(made / "error.vrt")


def test_the_map_as_a_whole_does_not_depend_on_its_sheets(made, photo, model, tmp_path):
    map_region(imagery=photo, model=model, out=tmp_path / "one")
    keys = ("reference", "squares", "beyond", "share", "flagged")
    assert {key: told(tmp_path / "one")[key] for key in keys} == {key: told(made)[key] for key in keys}
    assert tag(tmp_path / "one" / "height.tif") == tag(made / "height.vrt")
    with open_raster(tmp_path / "one" / "height.tif") as one, open_raster(made / "height.vrt") as several:
        first = one.read_heights(0, 0, BOX.shape)
    offset = several.grid.pixel(*one.grid.xy(0, 0))
    with open_raster(made / "height.vrt") as several:
        again = several.read_heights(round(offset[1]), round(offset[0]), BOX.shape)
    assert first.tobytes() == again.tobytes()


def test_a_score_is_that_of_the_map_it_comes_with(made, photo, model):
    """Counted again from the finished map's own heights and the photograph."""
    with open_raster(made / "height.vrt") as raster:
        offset = raster.grid.pixel(*LATTICE.grid(BOX).xy(0, 0))
        row, col = round(offset[1]), round(offset[0])
        height = raster.read_heights(row, col, BOX.shape)[0]
    pixels, _ = read_raster(photo)
    # Squares start at multiples of their side; spread is not in the map, and the description is blind to both.
    margin = ((BOX.row0 % 32, 0), (BOX.col0 % 32, 0))
    contract = read_contract(model)
    squares = measure(
        np.pad(pixels.data, ((0, 0), *margin)), np.pad(np.isfinite(height), margin), np.pad(height, margin),
        np.pad(height, margin), mean=contract.mean, std=contract.std,
    )  # fmt: skip
    run = told(made)
    assert len(squares) == run["squares"]
    assert shift_score(squares.features, load_model(model).shift).beyond == run["beyond"]


def test_a_model_without_a_description_maps_the_same_heights_over_it_and_says_so(made, photo, tiny_model, tmp_path):
    plain = tmp_path / "plain"
    shutil.copytree(made, plain)
    map_region(imagery=photo, model=tiny_model, out=plain, overwrite=True, **SHEETS)
    assert not any((plain / name).exists() for name in FILES)
    run = told(plain)
    assert run == {"reference": "not measured: tiny has no description of calibration data", "measured": False}
    assert shift_line(run) == "shift not measured: tiny has no description of calibration data"
    for path in (made / "sheets").glob("*_height.tif"):
        a, b = (read_raster(each)[0].data for each in (path, plain / "sheets" / path.name))
        assert a.tobytes() == b.tobytes()


def test_a_map_that_was_stopped_ends_with_the_same_bytes(made, photo, model, tmp_path, monkeypatch):
    def no_disk(*_):
        raise OutputError("no disk")

    with monkeypatch.context() as broken:
        broken.setattr(canopy.region.run, "write_shift", no_disk)
        with pytest.raises(OutputError):
            map_region(imagery=photo, model=model, out=tmp_path / "out", **SHEETS)
    resume_region(tmp_path / "out")
    assert content(tmp_path / "out") == content(made)
    assert told(tmp_path / "out") == told(made)


def test_several_opinions_are_not_compared(model):
    loaded = load_model(model)
    assert Ensemble(models=(loaded,)).shift is loaded.shift
    flips = Ensemble(models=(loaded,), tta="flips")
    assert flips.shift is None
    assert "not of the mean of 4 predictions" in flips.unmeasured

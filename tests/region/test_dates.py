"""The days of a map's imagery: in its record, as a file where scenes differ, and the same bytes however it is made."""

import json

import numpy as np
import pytest

import canopy.region.run
import canopy.tiler.imagery
from canopy.grid import Box
from canopy.raster import open_raster, read_raster, write_raster
from canopy.region import map_region, resume_region
from canopy.region.folder import RegionFolder
from canopy.region.records import SheetDays
from tests.region.conftest import LATTICE, content

BOX = Box(-8_130_048, 833_280, -8_130_048 + 70, 833_280 + 180)
CUT = 75
"""Column from which the second photograph holds; the first reaches further, under it."""


def photo(path, box, *, day=None, hole=None):
    valid = np.ones(box.shape, bool)
    if hole is not None:
        valid[hole] = False
    data = np.random.default_rng(len(path.name)).integers(0, 256, (3, *box.shape), dtype=np.uint8)
    write_raster(path, data, grid=LATTICE.grid(box), valid=valid, tags={} if day is None else {"ACQUISITION_DATE": day})


def photos(folder, first, last):
    """Two photographs that overlap, the newer of which has a hole in which the older shows."""
    folder.mkdir()
    photo(folder / "a.tif", Box(BOX.row0, BOX.col0, BOX.row1, BOX.col0 + 120), day=first)
    photo(folder / "b.tif", Box(BOX.row0, BOX.col0 + CUT, BOX.row1, BOX.col1), day=last, hole=(slice(10, 30), slice(5, 25)))
    return folder


@pytest.fixture(scope="module")
def two_days(tmp_path_factory):
    return photos(tmp_path_factory.mktemp("two") / "photos", "2019-07-01", "2021-07-14")


@pytest.fixture(scope="module")
def dated(two_days, tiny_model, tmp_path_factory):
    out = tmp_path_factory.mktemp("dated") / "out"
    map_region(imagery=two_days, model=tiny_model, out=out)
    return out


def expected():
    numbers = np.full(BOX.shape, 20190701, np.int32)
    numbers[:, CUT:] = 20210714
    numbers[10:30, CUT + 5 : CUT + 25] = 20190701
    return numbers


def imagery(out):
    return json.loads((out / "run.json").read_text())["imagery"]


def test_each_pixel_has_the_day_of_its_scene(dated):
    pixels, _ = read_raster(dated / "date.tif")
    np.testing.assert_array_equal(pixels.data[0], expected())
    told = imagery(dated)
    assert (told["first_day"], told["last_day"], told["undated"]) == ("2019-07-01", "2021-07-14", False)
    folder = RegionFolder.open(dated)
    assert folder.date == dated / "date.tif"
    assert folder.days == "2019-07-01 to 2021-07-14"


def test_scenes_of_one_day_make_no_file(two_days, tiny_model, tmp_path, monkeypatch):
    """... and nobody looks at the pixels for it."""
    monkeypatch.setattr(canopy.tiler.imagery.LocalImagery, "days", None)
    map_region(imagery=two_days / "b.tif", model=tiny_model, out=tmp_path / "one")
    assert RegionFolder.open(tmp_path / "one").days == "2021-07-14"
    assert not list((tmp_path / "one").glob("date*"))
    # Two files of which the map needs one are one scene.
    right = (LATTICE.grid(BOX).bounds[2] - 20, LATTICE.grid(BOX).bounds[1], *LATTICE.grid(BOX).bounds[2:])
    assert right[0] > LATTICE.grid(Box(BOX.row0, BOX.col0, BOX.row1, BOX.col0 + 120)).bounds[2]
    import geopandas
    import shapely

    geopandas.GeoSeries([shapely.box(*right)], crs=LATTICE.crs).to_file(tmp_path / "area.geojson", driver="GeoJSON")
    map_region(tmp_path / "area.geojson", imagery=two_days, model=tiny_model, out=tmp_path / "part")
    assert RegionFolder.open(tmp_path / "part").days == "2021-07-14"


def test_a_scene_of_unknown_day_is_unknown(tiny_model, tmp_path):
    folder = photos(tmp_path / "photos", None, "2021-07-14")
    map_region(imagery=folder, model=tiny_model, out=tmp_path / "out")
    wanted = expected()
    wanted[wanted == 20190701] = 0
    np.testing.assert_array_equal(read_raster(tmp_path / "out" / "date.tif")[0].data[0], wanted)
    told = imagery(tmp_path / "out")
    assert (told["first_day"], told["last_day"], told["undated"]) == ("2021-07-14", "2021-07-14", True)
    assert RegionFolder.open(tmp_path / "out").days is None
    assert "for some of it unknown" in (tmp_path / "out" / "README.txt").read_text()


def test_sheets_hold_the_same_days(two_days, dated, tiny_model, tmp_path):
    map_region(imagery=two_days, model=tiny_model, out=tmp_path / "out", sheet_px=64)
    assert content(tmp_path / "out") == content(dated), "one file from sheets is that from one"


@pytest.mark.slow
def test_a_file_a_sheet_holds_the_same_days(two_days, tiny_model, tmp_path):
    map_region(imagery=two_days, model=tiny_model, out=tmp_path / "files", sheet_px=64, max_file_px=100)
    with open_raster(tmp_path / "files" / "date.vrt") as raster:
        assert (raster.dtype, raster.nodata) == ("int32", 0)
        left = BOX.col0 % 64
        top = BOX.row0 % 64
        found = raster.read(top, left, BOX.shape).data[0]
    np.testing.assert_array_equal(found, expected())
    assert len(list((tmp_path / "files" / "sheets").glob("*_date.tif"))) == len(
        list((tmp_path / "files" / "sheets").glob("*_height.tif"))
    )
    assert imagery(tmp_path / "files")["last_day"] == "2021-07-14"


def test_a_map_that_was_stopped_ends_with_the_same_days(two_days, dated, tiny_model, tmp_path, monkeypatch):
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr(canopy.region.run, "describe_map", interrupt)
        with pytest.raises(KeyboardInterrupt):
            map_region(imagery=two_days, model=tiny_model, out=out)
    assert not (out / "height.tif").exists()
    resume_region(out)
    assert content(out) == content(dated)


def interrupt(*given, **options):
    raise KeyboardInterrupt


def test_days_add_up():
    one, two = SheetDays(first=3, last=5, undated_px=2), SheetDays(first=4, last=9, undated_px=1)
    assert one + two == SheetDays(first=3, last=9, undated_px=3)
    assert SheetDays() + one == one
    assert SheetDays.of(np.zeros(0, np.int32), undated_px=4) == SheetDays(undated_px=4)

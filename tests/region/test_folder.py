import json

import numpy as np
import pytest
from pyproj import CRS

from canopy.errors import OutputError
from canopy.grid import Box, Lattice
from canopy.raster import write_raster
from canopy.region.folder import RegionFolder
from canopy.region.records import WORK

GRID = Lattice(crs=CRS.from_epsg(32610), gsd_m=1.0).grid(Box(20, 10, 24, 15))


@pytest.fixture
def folder(tmp_path):
    tags = {"CANOPY_MODEL": "some 1", "OTHER": "x"}
    write_raster(tmp_path / "height.tif", np.ones((1, 4, 5), np.float32), grid=GRID, nodata=np.nan, tags=tags)
    (tmp_path / "run.json").write_text(json.dumps({"intervals": None, "imagery": {"files": [{"path": "/nowhere/a.tif"}]}}))
    return tmp_path


@pytest.mark.parametrize("name", [".", "height.tif"])
def test_a_folder_and_its_heights_are_the_same_map(folder, name):
    found = RegionFolder.open(folder / name)
    assert (found.path, found.height.name, found.error) == (folder, "height.tif", None)
    assert found.tags == {"CANOPY_MODEL": "some 1"}
    assert found.grid == GRID
    assert found.blocks is None
    assert found.images == ()


@pytest.mark.parametrize(
    ("told", "days"),
    [
        ({"first_day": "2021-07-14", "last_day": "2021-07-14", "undated": False}, "2021-07-14"),
        ({"first_day": "2019-07-01", "last_day": "2021-07-14", "undated": False}, "2019-07-01 to 2021-07-14"),
        ({"first_day": "2019-07-01", "last_day": "2021-07-14", "undated": True}, None),
        ({"first_day": None, "last_day": None, "undated": True}, None),
        ({}, None),
    ],
)
def test_days_are_known_of_every_pixel_or_not_at_all(folder, told, days):
    (folder / "run.json").write_text(json.dumps({"intervals": None, "imagery": told}))
    found = RegionFolder.open(folder)
    assert found.days == days
    assert found.date is None
    (folder / "date.vrt").touch()
    assert RegionFolder.open(folder).date == folder / "date.vrt"


def test_other_things_are_no_map(folder, tmp_path):
    assert RegionFolder.find(folder / "run.json") is None
    (empty := tmp_path / "empty").mkdir()
    assert RegionFolder.find(empty) is None
    with pytest.raises(OutputError, match=r"empty holds no height.tif; give the output folder"):
        RegionFolder.open(empty)
    with pytest.raises(OutputError, match="does not exist"):
        RegionFolder.open(tmp_path / "gone")


def test_an_unfinished_map_says_how_to_finish_it(tmp_path):
    (tmp_path / WORK).mkdir()
    with pytest.raises(OutputError, match="canopy map resume"):
        RegionFolder.open(tmp_path)


def test_a_damaged_record_is_refused(folder):
    (folder / "run.json").write_text("{")
    with pytest.raises(OutputError, match="is no JSON"):
        RegionFolder.open(folder)
    (folder / "run.json").write_text(json.dumps({"intervals": {"format": 1}}))
    with pytest.raises(OutputError, match="intervals of another version"):
        _ = RegionFolder.open(folder).blocks

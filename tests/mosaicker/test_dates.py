"""The days of imagery as a file: what they are as numbers, overviews, and what is refused."""

import datetime as dt

import numpy as np
import pytest
import rasterio
from pyproj import CRS

import canopy.mosaicker.dates
from canopy.errors import OutputError
from canopy.grid import Box, Lattice
from canopy.mosaicker.dates import DATE_BAND, as_numbers, newest, write_dates
from canopy.mosaicker.publish import stage_sheet
from canopy.raster import open_raster, read_raster
from canopy.tiler.headers import NO_DATE

LATTICE = Lattice(crs=CRS.from_epsg(32610), gsd_m=1.0)
BOX = Box(-4000, 640, -4000 + 700, 640 + 600)


def staged(folder, boxes, numbers):
    parts = []
    for number, box in enumerate(boxes):
        (own := folder / str(number)).mkdir(parents=True)
        with stage_sheet(own, LATTICE, box, dated=True) as (sheet, writer):
            writer.write_dates(box, numbers[box.slices_in(BOX)])
        parts.append((box, sheet.date))
    return parts


@pytest.fixture(scope="module")
def numbers():
    """A day a quarter, and a corner without one."""
    found = np.full(BOX.shape, 20190701, np.int32)
    found[:, 300:] = 20210714
    found[351:] = 20200229
    found[:50, :70] = 0
    return found


def test_days_are_numbers_that_people_read():
    days = [dt.date(1969, 12, 31), dt.date(1970, 1, 1), dt.date(2000, 2, 29), dt.date(2021, 7, 14)]
    since = np.array([[(day - dt.date(1970, 1, 1)).days for day in days] + [NO_DATE]], np.int32)
    found = as_numbers(since, since != NO_DATE)
    assert found.tolist() == [[19691231, 19700101, 20000229, 20210714, 0]]
    assert found.dtype == np.int32


def test_the_file_is_a_cog_of_the_days_however_it_was_cut(tmp_path, numbers):
    cuts = [
        [BOX],
        [Box(BOX.row0, BOX.col0, BOX.row0 + 192, BOX.col1), Box(BOX.row0 + 192, BOX.col0, BOX.row1, BOX.col1)],
    ]
    files = []
    for number, boxes in enumerate(cuts):
        parts = staged(tmp_path / str(number), boxes, numbers)
        write_dates(tmp_path / f"{number}.tif", parts, lattice=LATTICE, box=BOX, tags={"CANOPY_VERSION": "x"})
        files.append((tmp_path / f"{number}.tif").read_bytes())
    assert files[0] == files[1]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["0", "0.tif", "1", "1.tif"]
    pixels, grid = read_raster(tmp_path / "0.tif")
    np.testing.assert_array_equal(pixels.data[0], numbers)
    np.testing.assert_array_equal(pixels.valid, numbers != 0)
    assert grid == LATTICE.grid(BOX)
    with open_raster(tmp_path / "0.tif") as raster:
        assert (raster.dtype, raster.nodata, raster.band_names) == ("int32", 0, (DATE_BAND,))
        assert raster.overviews == (2,)
        assert raster.structure["LAYOUT"] == "COG"
        assert raster.tags["CANOPY_VERSION"] == "x"
    with rasterio.open(tmp_path / "0.tif", overview_level=0) as dataset:
        np.testing.assert_array_equal(dataset.read(1), newest(numbers))


def test_an_overview_shows_the_newest_day_that_there_is():
    fine = np.array([[0, 20190701, 0], [20210714, 0, 0], [20200101, 20200101, 0]], np.int32)
    assert newest(fine).tolist() == [[20210714, 0], [20200101, 0]]


def test_a_file_that_lost_a_day_is_refused(tmp_path, numbers, monkeypatch):
    """Negative control: what is written is compared with what went into it."""
    parts = staged(tmp_path / "staged", [BOX], numbers)
    real = canopy.mosaicker.dates._pyramid

    def miscounted(*given):
        counts, paths = real(*given)
        return [(counts[0][0] + 1, counts[0][1]), *counts[1:]], paths

    monkeypatch.setattr(canopy.mosaicker.dates, "_pyramid", miscounted)
    with pytest.raises(OutputError, match=r"date.tif .*not those that went into it.*free disk space"):
        write_dates(tmp_path / "date.tif", parts, lattice=LATTICE, box=BOX, tags={})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["staged"]

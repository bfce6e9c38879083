"""A small region of many sheets, its map made without a break, and processes to make it in."""

import re

import numpy as np
import pytest
from pyproj import CRS

from canopy.grid import Box, Lattice
from canopy.raster import write_raster
from canopy.region import map_region
from tests.forks import ForkServer

LATTICE = Lattice(crs=CRS.from_epsg(32610), gsd_m=0.6)
BOX = Box(-8_130_100, 833_280, -8_130_100 + 40, 833_280 + 360)
SHEET_PX = 64
COUNT = 6
"""Sheets of it."""
FILES = ("height.tif", "error.tif")
SHEETS = {"sheet_px": SHEET_PX, "max_file_px": 100}
"""Options of a map that is a file a sheet."""


@pytest.fixture(scope="session")
def image(tmp_path_factory):
    """40 x 360 px: a row of sheets, the first of them empty."""
    valid = np.ones(BOX.shape, bool)
    valid[:, :SHEET_PX] = False
    path = tmp_path_factory.mktemp("image") / "photo.tif"
    data = np.random.default_rng(3).integers(0, 256, (3, *BOX.shape), dtype=np.uint8)
    write_raster(path, data, grid=LATTICE.grid(BOX), valid=valid)
    return path


@pytest.fixture(scope="session")
def whole_out(image, tiny_model, tmp_path_factory):
    """Its map in one file."""
    out = tmp_path_factory.mktemp("whole") / "out"
    map_region(imagery=image, model=tiny_model, out=out, sheet_px=SHEET_PX)
    return out


@pytest.fixture(scope="session")
def whole(whole_out):
    """The bytes of its map in one file."""
    return content(whole_out)


@pytest.fixture(scope="session")
def sheets_out(image, tiny_model, tmp_path_factory):
    """Its map in a file a sheet."""
    out = tmp_path_factory.mktemp("sheets") / "out"
    map_region(imagery=image, model=tiny_model, out=out, **SHEETS)
    return out


@pytest.fixture(scope="session")
def whole_sheets(sheets_out):
    """The bytes of its map in a file a sheet."""
    return content(sheets_out)


@pytest.fixture(scope="session")
def forks(tmp_path_factory):
    server = ForkServer(tmp_path_factory.mktemp("forks"))
    yield server
    server.close()


def content(out):
    """Every file of a finished map but its record of the run, by its path; what points to images has their whole paths."""
    found = {
        path.relative_to(out).as_posix(): path.read_bytes()
        for path in sorted(out.rglob("*"))
        if path.is_file() and path.name != "run.json"
    }

    def whole(hit):
        return hit[1] + bytes((out / "imagery_vrt" / hit[2].decode()).resolve())

    return {
        name: re.sub(rb'(relativeToVRT="1">)([^<]*)', whole, text) if name.startswith("imagery_vrt/") else text
        for name, text in found.items()
    }

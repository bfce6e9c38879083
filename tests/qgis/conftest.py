"""Maps for QGIS to open, and QGIS itself: the interpreter that it is installed for is another than the tests'."""

import json
import os
import shutil
import subprocess
from pathlib import Path

import geopandas
import numpy as np
import pytest
import shapely
from pyproj import CRS

from canopy.grid import Box, Lattice
from canopy.model.calibration import CalibrationTable, MeasuredCoverage
from canopy.model.package import file_sha256, load_model, read_contract, update_contract
from canopy.model.shift import SiteSquares, fit_shift, save_shift
from canopy.model.squares import measure
from canopy.raster import read_raster, write_raster
from canopy.region import map_region

LATTICE = Lattice(crs=CRS.from_epsg(32610), gsd_m=0.6)
BOX = Box(-8_130_048, 833_280, -8_130_048 + 128, 833_280 + 256)
HALF = 128
"""The column, in the box, from which the second of two photographs holds."""
DAYS = ("2019-07-01", "2021-07-14")
LOOK = Path(__file__).with_name("look.py")


@pytest.fixture(scope="session")
def qgis(tmp_path_factory):
    """Asks QGIS: a question as `look.py` takes it, its answer as it gives it."""
    python = os.environ.get("QGIS_PYTHON", "/usr/bin/python3")
    folder = tmp_path_factory.mktemp("qgis")
    environment = {
        "PATH": os.environ["PATH"], "HOME": str(folder), "XDG_RUNTIME_DIR": str(folder), "QT_QPA_PLATFORM": "offscreen",
        "LANG": "C.UTF-8",
    }  # fmt: skip

    def ask(**question):
        done = subprocess.run(
            [python, LOOK],
            input=json.dumps(question),
            capture_output=True,
            text=True,
            env=environment,
            timeout=300,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    return ask


@pytest.fixture(scope="session")
def photos(tmp_path_factory):
    """Two photographs side by side, taken on two days; the first has a hole."""
    folder = tmp_path_factory.mktemp("photos")
    rng = np.random.default_rng(5)
    for number, (day, cols) in enumerate(zip(DAYS, ((0, HALF), (HALF, BOX.shape[1])), strict=True)):
        box = Box(BOX.row0, BOX.col0 + cols[0], BOX.row1, BOX.col0 + cols[1])
        valid = np.ones(box.shape, bool)
        if number == 0:
            valid[20:40, 30:60] = False
        # Blocks of one colour, so that heights come in patches that a picture can be compared by.
        data = rng.integers(0, 256, (3, box.shape[0] // 8, box.shape[1] // 8), dtype=np.uint8).repeat(8, 1).repeat(8, 2)
        write_raster(folder / f"{number}.tif", data, grid=LATTICE.grid(box), valid=valid, tags={"ACQUISITION_DATE": day})
    return folder


@pytest.fixture(scope="session")
def calibrated_model(tiny_model, tmp_path_factory):
    folder = shutil.copytree(tiny_model, tmp_path_factory.mktemp("calibrated") / "model")
    table = CalibrationTable(
        edges_m=(0.0, 10.0), lower_factor=(1.0, 1.5), upper_factor=(1.5, 1.0), pixels=(5000, 4000), sites=("HERE", "THERE"),
        measured=(
            MeasuredCoverage(how="sites left out in turn", sites=("HERE", "THERE"), pixels=(1000, 500), inside=(900, 400)),
        ),
    )  # fmt: skip
    update_contract(folder, read_contract(folder), calibration=table)
    return folder


@pytest.fixture(scope="session")
def strange_model(tiny_model, tmp_path_factory):
    """A model without a calibration that knows what it was trained on, and it was nothing like the photographs."""
    folder = shutil.copytree(tiny_model, tmp_path_factory.mktemp("strange") / "model")
    contract = load_model(folder).contract
    rng = np.random.default_rng(2)
    pixels = rng.integers(0, 20, (3, 128, 512), dtype=np.uint8)
    heights = np.full((128, 512), 5, np.float32)
    squares = measure(pixels, np.ones((128, 512), bool), heights, heights, mean=contract.mean, std=contract.std).features
    features = np.concatenate([squares] * 8)
    features += 0.05 * rng.normal(size=features.shape)
    path = save_shift(
        folder, fit_shift({"here": SiteSquares(features=features.astype(np.float32), block=np.arange(len(features)))})
    )
    update_contract(folder, contract, shift_sha256=file_sha256(path))
    return folder


@pytest.fixture(scope="session")
def calibrated(photos, calibrated_model, tmp_path_factory):
    """A map in one file over an area, of two days."""
    folder = tmp_path_factory.mktemp("calibrated")
    left, bottom, right, top = LATTICE.grid(BOX).bounds
    area = shapely.Polygon([(left - 6, bottom - 6), (right + 6, bottom - 6), (right + 6, top - 30), (left - 6, top + 6)])
    geopandas.GeoSeries([area], crs=LATTICE.crs).to_file(folder / "area.geojson", driver="GeoJSON")
    map_region(folder / "area.geojson", imagery=photos, model=calibrated_model, out=folder / "map")
    return folder / "map"


@pytest.fixture(scope="session")
def colourful(calibrated, tmp_path_factory):
    """The same with heights and errors of all classes, which a model of random weights does not have."""
    folder = shutil.copytree(calibrated, tmp_path_factory.mktemp("colourful") / "map")
    rng = np.random.default_rng(9)
    for name, bands, most_m in (("height", 1, 45), ("error", 3, 18)):
        pixels, grid = read_raster(folder / f"{name}.tif")
        coarse = rng.integers(0, most_m * 32, (bands, grid.shape[0] // 4 + 1, grid.shape[1] // 4 + 1)) / np.float32(32)
        values = coarse.repeat(4, 1).repeat(4, 2)[:, : grid.shape[0], : grid.shape[1]].astype(np.float32)
        values[:, ~np.isfinite(pixels.data[0])] = np.nan
        write_raster(folder / f"{name}.tif", values, grid=grid, nodata=np.nan)
    return folder


@pytest.fixture(scope="session")
def sheeted(photos, strange_model, tmp_path_factory):
    """A map in sheets by an uncalibrated model, of one photograph's ground."""
    folder = tmp_path_factory.mktemp("sheeted")
    map_region(imagery=photos / "1.tif", model=strange_model, out=folder / "map", sheet_px=64, max_file_px=100)
    return folder / "map"


@pytest.fixture
def moved(calibrated, tmp_path):
    """The map in another place, without its imagery."""
    return shutil.copytree(calibrated, tmp_path / "elsewhere" / "deep" / "map")

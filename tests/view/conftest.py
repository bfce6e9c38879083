"""A small finished map with everything that its web map can show, and its server without a network."""

import json
from datetime import date
from types import SimpleNamespace

import numpy as np
import pytest
from starlette.testclient import TestClient

from canopy.mosaicker.quantum import quantise
from canopy.raster import write_raster
from canopy.region.folder import RegionFolder
from canopy.region.styles import date_pipe, qml
from canopy.score.reference import GivenReference
from canopy.view.app import create_app
from canopy.view.scene import Scene
from canopy.view.tiles import LON_LAT, WEB_MERCATOR, Tile, transformer
from tests.finished_maps import grid, write_map

SHAPE = (300, 340)
FOOT_M = 0.3048


def forest(shape=SHAPE, seed=0):
    """Crowns of 5 px on a slope of heights, with a hole that is unknown."""
    rng = np.random.default_rng(seed)
    rows, cols = -(-shape[0] // 5), -(-shape[1] // 5)
    height_m = np.kron(rng.gamma(2, 7, (rows, cols)), np.ones((5, 5)))[: shape[0], : shape[1]] + rng.uniform(0, 1, shape)
    height_m[40:90, 100:180] = np.nan
    return quantise(height_m)


def put(folder, **told):
    """Add to the record of a map."""
    path = folder / "run.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | told))


@pytest.fixture(scope="session")
def made(tmp_path_factory):
    """A calibrated map of two days, its image of 16 bits, and a reference in feet that lies half a pixel aside."""
    folder = tmp_path_factory.mktemp("view")
    out, height_m = folder / "map", forest()
    write_map(out, height_m, half_width_m=np.linspace(0.5, 20, SHAPE[1], dtype=np.float32)[None].repeat(SHAPE[0], 0))
    days = np.full(SHAPE, 20200618, np.int32)
    days[:, 200:], days[:20] = 20210703, 0
    write_raster(out / "date.tif", days[None], grid=grid(SHAPE), nodata=0, band_names=["date_yyyymmdd"])
    (out / "date.qml").write_text(qml(date_pipe([date(2020, 6, 18), date(2021, 7, 3)])))
    rng = np.random.default_rng(1)
    image = rng.integers(300, 3000, (4, *SHAPE)).astype(np.uint16)
    write_raster(folder / "image.tif", image, grid=grid(SHAPE), band_names=["nir", "red", "green", "blue"])
    put(
        out, imagery={"files": [{"path": str(folder / "image.tif")}], "first_day": "2020-06-18", "last_day": "2021-07-03"},
        models=[{"name": "made", "version": "3"}],
    )  # fmt: skip
    # Upright where the map is, and in feet: 10 m lower in the west, 12 m higher in the east.
    reference_m = np.where(np.arange(SHAPE[1]) < 170, height_m - 10, height_m + 12).clip(0)
    write_raster(
        folder / "reference.tif",
        (reference_m / FOOT_M).astype(np.float32)[None],
        grid=grid(SHAPE),
        nodata=np.nan,
        units=["ft"],
    )
    return SimpleNamespace(folder=folder, out=out, height_m=height_m, reference_m=reference_m, image=image, days=days)


@pytest.fixture(scope="session")
def scene(made):
    given = GivenReference(paths=[made.folder / "reference.tif"])
    with Scene(RegionFolder.open(made.out), reference=given) as opened:
        yield opened


@pytest.fixture(scope="session")
def client(scene):
    return TestClient(create_app(scene, allowed_hosts=("localhost", "127.0.0.1", "[::1]")), base_url="http://localhost")


def tile_at(where, zoom, row, col):
    """The tile that shows a pixel of a grid."""
    x, y = transformer(where.crs, WEB_MERCATOR).transform(*where.xy(col + 0.5, row + 0.5))
    side = 2 * 20037508.342789244 / (1 << zoom)
    return Tile(zoom=zoom, x=int((x + 20037508.342789244) / side), y=int((20037508.342789244 - y) / side))


def degrees(where, row, col):
    """Longitude and latitude of a place in pixel coordinates."""
    return transformer(where.crs, LON_LAT).transform(*where.xy(col, row))

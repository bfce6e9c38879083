"""Heights on cells: exact area weights, statistics, gaps, units, CRSs; and that a cell does not depend on what is read."""

import math

import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal
from pyproj import CRS, Transformer

from canopy.grid import Box
from canopy.raster import RasterPool
from canopy.score import cells as cells_module
from canopy.score.cells import Cells, HeightRasters
from canopy.tiler.headers import read_headers
from tests.score.rasters import LEFT_M, TOP_M, UTM, grid, write

NAN = math.nan


@pytest.fixture
def pool():
    with RasterPool(8) as pool:
        yield pool


def rasters(pool, *paths, metres=(1.0, 0.0), judged=False):
    files = read_headers(paths)
    return HeightRasters(files, band=1, metres={f.path: metres for f in files}, judged=judged, pool=pool)


def weights(first, side, count, pixels):
    """(cell, pixel): metres of each pixel of 1 m in each cell of `side` metres, the first of which begins at `first`."""
    cell = first + side * np.arange(count)[:, None]
    pixel = np.arange(pixels)[None]
    return np.clip(np.minimum(cell + side, pixel + 1) - np.maximum(cell, pixel), 0, None)


@pytest.mark.parametrize(("side", "offset"), [(2.5, 1.3), (3.0, 0.0), (1.0, 0.25), (7.0, 3.0)])
def test_means_are_weighted_by_area(pool, tmp_path, side, offset):
    rng = np.random.default_rng(0)
    heights = rng.gamma(2, 5, (40, 50)).astype(np.float32)
    heights[rng.random(heights.shape) < 0.3] = NAN
    source = rasters(pool, write(tmp_path / "fine.tif", heights))
    rows, cols = int((40 - offset) // side), int((50 - offset) // side)
    found = source.read(
        Cells(crs=UTM, gsd_m=side, x0_m=LEFT_M + offset, y0_m=TOP_M - offset), Box(0, 0, rows, cols)
    ).height_m
    down, along = weights(offset, side, rows, 40), weights(offset, side, cols, 50)
    known = np.isfinite(heights)
    area = down @ known @ along.T
    means = down @ np.nan_to_num(heights).astype(float) @ along.T / np.maximum(area, 1e-9)
    expected = np.where(area >= 0.5 * side**2 - 1e-6, means, NAN)
    assert np.isnan(expected).any() != (side == 7.0)
    assert_allclose(found, expected, rtol=1e-6)


@pytest.mark.parametrize("statistic", ["mean", "p98"])
def test_a_cell_does_not_depend_on_what_is_read(pool, tmp_path, monkeypatch, statistic):
    rng = np.random.default_rng(1)
    source = rasters(pool, write(tmp_path / "fine.tif", rng.gamma(2, 5, (60, 60))))
    for cells in (
        Cells(crs=UTM, gsd_m=3.0, x0_m=LEFT_M, y0_m=TOP_M),
        Cells(crs=UTM, gsd_m=3.7, x0_m=LEFT_M + 0.4, y0_m=TOP_M - 0.3),
        Cells(crs=CRS.from_epsg(32611), gsd_m=4.0),
    ):
        x, y = Transformer.from_crs(UTM, cells.crs, always_xy=True).transform(LEFT_M, TOP_M)
        row, col = round((cells.y0_m - y) / cells.gsd_m), round((x - cells.x0_m) / cells.gsd_m)
        whole = source.read(cells, Box(row - 3, col - 3, row + 20, col + 20), statistic).height_m
        part = source.read(cells, Box(row + 2, col + 4, row + 9, col + 11), statistic).height_m
        assert np.isfinite(whole).sum() > 100
        rtol = 1e-9 if cells.crs == UTM else 1e-5
        assert_allclose(part, whole[5:12, 7:14], rtol=rtol)
        monkeypatch.setattr(cells_module, "NATIVE_PX", 16)
        assert_allclose(source.read(cells, Box(row - 3, col - 3, row + 20, col + 20), statistic).height_m, whole, rtol=rtol)
        monkeypatch.undo()


def test_statistics_where_pixels_do_not_fit(pool, tmp_path):
    """Cells of 2.5 m on pixels of 1 m: what any part of lies in the cell counts for the greatest height."""
    heights = np.zeros((10, 10))
    heights[2, 2] = 30  # from 2 to 3 m, half in the first cell and half in the next
    source = rasters(pool, write(tmp_path / "fine.tif", heights))
    cells, box = Cells(crs=UTM, gsd_m=2.5, x0_m=LEFT_M, y0_m=TOP_M), Box(0, 0, 4, 4)
    assert_array_equal(source.read(cells, box, "max").height_m[:3, :3], [[30, 30, 0], [30, 30, 0], [0, 0, 0]])
    assert_allclose(source.read(cells, box).height_m[:2, :2], 30 * 0.25 / 6.25)
    assert "5 x 5 points" in source.resampled(cells, "max")
    coarse = rasters(pool, write(tmp_path / "coarse.tif", heights[:5, :5], 2.0))
    assert "weighted by their area" in coarse.resampled(cells, "max")  # more than half a cell: a statistic itself


def test_files_that_touch_and_overlap_are_one(pool, tmp_path):
    """Tiles of one grid with a cell across their border; a second flight of another grid behind them."""
    rng = np.random.default_rng(2)
    heights = rng.gamma(2, 5, (12, 20)).astype(np.float32)
    left = write(tmp_path / "a.tif", heights[:, :11])
    right = write(tmp_path / "b.tif", heights[:, 11:], left=LEFT_M + 11)
    whole = rasters(pool, write(tmp_path / "whole.tif", heights))
    cells, box = Cells(crs=UTM, gsd_m=4.0, x0_m=LEFT_M, y0_m=TOP_M), Box(0, 0, 3, 5)
    assert_array_equal(rasters(pool, left, right).read(cells, box).height_m, whole.read(cells, box).height_m)
    behind = write(tmp_path / "behind.tif", np.full((6, 10), 7.0), 2.0, left=LEFT_M + 1)
    both = rasters(pool, left, behind)
    assert both.own_cells() is None
    assert_allclose(both.read(cells, box).height_m[:, 3:], 7.0)
    assert_array_equal(both.read(cells, box).height_m[:, :2], whole.read(cells, box).height_m[:, :2])


def test_the_pixels_of_a_raster_as_cells(pool, tmp_path):
    heights = np.arange(12.0).reshape(3, 4)
    source = rasters(pool, write(tmp_path / "odd.tif", heights, 0.6, left=LEFT_M + 0.2, top=TOP_M - 0.1))
    own = source.own_cells()
    (box,) = source.boxes_on(own)
    assert box.shape == (3, 4)
    assert source.untouched_by(own)
    assert_array_equal(source.read(own, box).height_m, heights)
    assert own.grid(box).bounds == pytest.approx(grid((3, 4), 0.6, left=LEFT_M + 0.2, top=TOP_M - 0.1).bounds, abs=1e-6)
    assert not source.untouched_by(own.moved(0.1, 0))
    degrees = rasters(pool, write(tmp_path / "degrees.tif", heights, 1e-4, left=12.0, top=45.0, crs=CRS.from_epsg(4326)))
    assert degrees.own_cells() is None


def test_what_cannot_be_is_unknown_where_it_is_judged(pool, tmp_path):
    path = write(tmp_path / "odd.tif", np.array([[-5.0, -1.0, 500.0, 3.0]]))
    cells, box = rasters(pool, path).own_cells(), rasters(pool, path).boxes_on(rasters(pool, path).own_cells())[0]
    judged = rasters(pool, path, judged=True).read(cells, box)
    assert_array_equal(judged.height_m, [[NAN, 0, NAN, 3]])
    assert_array_equal(judged.refused, [[True, False, True, False]])
    assert_array_equal(judged.negative, [[False, True, False, False]])
    assert_array_equal(rasters(pool, path).read(cells, box).height_m, [[-5, -1, 500, 3]])  # a map is taken at its word
    assert_allclose(rasters(pool, path, metres=(0.1, 2.0)).read(cells, box).height_m, [[1.5, 1.9, 52, 2.3]], rtol=1e-6)


def test_cells_of_another_crs_lie_where_they_are(pool, tmp_path):
    """A ramp of heights in UTM, read in another zone: each cell has the height of its place."""
    rows, cols = np.mgrid[:100, :100]
    source = rasters(pool, write(tmp_path / "ramp.tif", 0.2 * cols + 0.1 * rows))
    cells = Cells(crs=CRS.from_epsg(32611), gsd_m=5.0)
    to_utm = Transformer.from_crs(cells.crs, UTM, always_xy=True)
    x, y = Transformer.from_crs(UTM, cells.crs, always_xy=True).transform(LEFT_M + 50, TOP_M - 50)
    box = Box(*(round(v) for v in (-y / 5 - 4, x / 5 - 4, -y / 5 + 4, x / 5 + 4)))
    found = source.read(cells, box).height_m
    place = cells.grid(box)
    at_x, at_y = to_utm.transform(*place.xy(*(v + 0.5 for v in np.meshgrid(range(8), range(8)))))
    expected = 0.2 * (at_x - LEFT_M - 0.5) + 0.1 * (TOP_M - at_y - 0.5)
    assert_allclose(found, expected, atol=0.06)
    assert np.abs(found - expected).mean() < 0.02

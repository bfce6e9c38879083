"""Statistics of larger cells against areas of intersections, cell by cell and pixel by pixel."""

import numpy as np
import pytest
import shapely

from canopy.analyse import cells as module
from canopy.analyse.cells import Cells
from canopy.errors import AnalysisError
from tests.finished_maps import CRS_M, GSD_M, grid, some_heights

SHAPE = (25, 30)


def overlaps(cells, row, col):
    """(row, col) area of each pixel in a cell, square metres."""
    left, bottom, right, top = cells.grid.crop(row, col, (1, 1)).bounds
    rows, cols = np.mgrid[: SHAPE[0], : SHAPE[1]]
    x, y = cells.source.xy(cols, rows)
    return shapely.area(shapely.intersection(shapely.box(x, y - GSD_M, x + GSD_M, y), shapely.box(left, bottom, right, top)))


def assembled(cells, of):
    """What `of` says of each chunk, put together."""
    out = None
    for row, col, window in cells.chunks():
        part = of(window)
        if out is None:
            out = np.full((*part.shape[:-2], *cells.box.shape), -1.0)
        out[..., row : row + part.shape[-2], col : col + part.shape[-1]] = part
    return out


def under(array, window, fill):
    """The pixels of a window, `fill` outside."""
    box, out = window.box, np.full(window.box.shape, fill, array.dtype)
    row0, col0, row1, col1 = max(box.row0, 0), max(box.col0, 0), min(box.row1, SHAPE[0]), min(box.col1, SHAPE[1])
    out[row0 - box.row0 : row1 - box.row0, col0 - box.col0 : col1 - box.col0] = array[row0:row1, col0:col1]
    return out


@pytest.fixture(params=[20, 1024])
def cells(request, monkeypatch):
    """Cells of 7 m over a map of 0.6 m that begins in the middle of one, in one chunk and in many."""
    monkeypatch.setattr(module, "_CHUNK_PX", request.param)
    return Cells.over(grid(SHAPE, row=5, col=9), 7.0)


def test_cells_begin_at_the_origin_of_the_crs(cells):
    left, bottom, right, top = cells.grid.bounds
    assert cells.grid.crs == CRS_M
    assert [v % 7.0 for v in (left, bottom, right, top)] == [0, 0, 0, 0]
    inner = cells.source.bounds
    assert left <= inner[0] < left + 7
    assert top - 7 < inner[3] <= top


def test_shares_are_areas(cells):
    counted = np.random.default_rng(1).random(SHAPE) < 0.4
    found = assembled(cells, lambda window: window.shares(under(counted, window, False)))
    assert found.shape == cells.box.shape
    for row in range(found.shape[0]):
        for col in range(found.shape[1]):
            assert found[row, col] == pytest.approx((overlaps(cells, row, col) * counted).sum() / 49, abs=1e-8)


def test_quantiles_count_areas(cells):
    height_m, levels = some_heights(SHAPE, unknown=0.2), (0.25, 0.5, 0.95, 1.0)
    found = assembled(cells, lambda window: window.quantiles(under(height_m, window, np.nan), levels))
    whole_pixels = 0
    for row in range(cells.box.shape[0]):
        for col in range(cells.box.shape[1]):
            weight = np.where(np.isfinite(height_m), overlaps(cells, row, col), 0).ravel()
            order = np.argsort(height_m.ravel(), kind="stable")
            for k, level in enumerate(levels):
                expected = [
                    height_m.ravel()[order][np.searchsorted(np.cumsum(w[order]), level * w.sum() * (1 - 1e-7))]
                    for w in (weight, (weight > GSD_M**2 / 2).astype(float))
                ]
                assert found[k, row, col] == expected[0]
                whole_pixels += found[k, row, col] != expected[1]
    assert whole_pixels > 3, "pixels taken whole would do as well, so this test says nothing"


def test_cells_of_whole_pixels_are_block_means():
    cells = Cells.over(grid(SHAPE), 3.0)
    counted = np.random.default_rng(2).random(SHAPE) < 0.5
    found = assembled(cells, lambda window: window.shares(under(counted, window, False)))
    np.testing.assert_allclose(found, counted.reshape(5, 5, 6, 5).mean((1, 3)), atol=1e-12)


@pytest.mark.parametrize("side_m", [1.0, 0, -3, float("nan"), 2000])
def test_sides_that_cannot_be(side_m):
    with pytest.raises(AnalysisError, match="give a side of at least two pixels"):
        Cells.over(grid(SHAPE), side_m)

"""Shares of pixels against areas of intersections, polygon by polygon, pixel by pixel."""

import numpy as np
import pytest
import shapely

from canopy.analyse import coverage
from canopy.analyse.coverage import covered, in_pixels
from canopy.grid import Box
from tests.finished_maps import LEFT_M, TOP_M, grid

HOLED = shapely.Point(20, -18).buffer(17).difference(shapely.Point(22, -15).buffer(6))
POLYGONS = {
    "triangle": shapely.Polygon([(3.2, -1.7), (35.1, -8.4), (11.9, -33.3)]),
    "with a hole": HOLED,
    "of two parts": shapely.union(shapely.box(2.5, -6.25, 9.75, -3), shapely.Point(28, -25).buffer(8)),
    "on pixel edges": shapely.box(4, -20, 32, -16),
    "within a pixel": shapely.box(5.25, -7.5, 5.5, -7.25),
    "all of it": shapely.box(-100, -100, 100, 100),
    "its outside": shapely.box(-100, -100, 100, 100).difference(HOLED),
    "a sliver": shapely.Polygon([(0, 0), (40, -40), (40, -39.9)]),
    "next to it": shapely.box(-5, -5, 0, 0),
}


def by_shapely(polygon, box):
    rows, cols = np.mgrid[box.row0 : box.row1, box.col0 : box.col1]
    pixels = shapely.box(cols, -rows - 1, cols + 1, -rows)
    return shapely.area(shapely.intersection(pixels, polygon))


@pytest.mark.parametrize("cell_px", [4, 128])
@pytest.mark.parametrize("name", POLYGONS)
def test_shares_are_areas(name, cell_px, monkeypatch):
    monkeypatch.setattr(coverage, "CELL_PX", cell_px)
    for box in (Box(0, 0, 36, 40), Box(-3, 5, 20, 33)):
        found = covered(POLYGONS[name], box)
        assert found.shape == box.shape
        assert found.dtype == np.float32
        np.testing.assert_allclose(found, by_shapely(POLYGONS[name], box), atol=1e-6)


def test_a_pixel_counts_in_part_not_by_its_centre():
    """The check above can fail: what centres say is another thing."""
    polygon, box = POLYGONS["triangle"], Box(0, 0, 36, 40)
    rows, cols = np.mgrid[0:36, 0:40] + 0.5
    by_centre = shapely.contains_xy(polygon, cols, -rows).astype(float)
    assert np.abs(by_centre - by_shapely(polygon, box)).max() > 0.3


def test_pixel_coordinates_keep_edges_whole():
    where = grid((10, 10))
    square = shapely.box(*where.crop(2, 3, (4, 5)).bounds)
    (found,) = in_pixels(np.array([square]), where)
    np.testing.assert_allclose(shapely.bounds(found), (3, -6, 8, -2), atol=1e-6)
    assert where.xy(0, 0) == (LEFT_M, TOP_M)

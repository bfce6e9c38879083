"""How much of each pixel a polygon covers, exactly: pixels on its edge count with the share that lies inside."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, Final

import numpy as np
import shapely
from exactextract import exact_extract
from exactextract.feature import Feature, FeatureSource
from exactextract.raster import RasterSource
from numpy.typing import NDArray

from canopy.grid import Box, Grid

CELL_PX: Final = 128
"""Side of the smallest squares of pixels that are taken as a whole when they lie inside a polygon."""


def in_pixels(polygons: NDArray[Any], grid: Grid) -> NDArray[Any]:
    """Polygons in the CRS of a grid -> in its pixel coordinates (col, -row), where pixel edges are whole numbers.

    Why: edges of pixels in a CRS are rounded, and what touches an edge would be on either side of it.
    """
    to_pixels = ~grid.transform

    def transformed(xy: NDArray[np.float64]) -> NDArray[np.float64]:
        col, row = to_pixels @ (xy[:, 0], xy[:, 1])
        return np.stack([col, -row], axis=1)

    return shapely.transform(polygons, transformed)  # type: ignore[no-any-return]


def covered(polygon: Any, box: Box) -> NDArray[np.float32]:
    """The share of each pixel that a polygon covers, 0 to 1.

    Why the tree: an exact share costs a hundred times a 1 that is known to be one, and most pixels are inside. So squares of
    pixels are halved until they are all inside, all outside, or small and on the edge, and only those are computed.

    Args:
        polygon: Valid polygon or multi-polygon in pixel coordinates, as `in_pixels` gives it; it may reach beyond `box`.
        box: The pixels.

    Returns:
        (row, col) float32, exact up to the rounding of float32.
    """
    levels = math.ceil(math.log2(max(1, max(box.shape) / CELL_PX)))
    side_px = CELL_PX << levels
    share = np.zeros((side_px, side_px), np.float32)
    edge, rows, cols = np.array([polygon]), np.array([0]), np.array([0])
    while edge.size:
        left, top = box.col0 + cols, -(box.row0 + rows)
        edge = _polygons(shapely.intersection(edge, shapely.box(left, top - side_px, left + side_px, top)))
        area = shapely.area(edge)
        full = area >= side_px**2 * (1 - 1e-12)
        for row, col in zip(rows[full].tolist(), cols[full].tolist(), strict=True):
            share[row : row + side_px, col : col + side_px] = 1
        partly = (area > 0) & ~full
        edge, rows, cols = edge[partly], rows[partly], cols[partly]
        if side_px == CELL_PX:
            break
        side_px //= 2
        edge = np.repeat(edge, 4)
        rows = (rows[:, None] + np.array([0, 0, side_px, side_px])).ravel()
        cols = (cols[:, None] + np.array([0, side_px, 0, side_px])).ravel()
        inside = (rows < box.shape[0]) & (cols < box.shape[1])
        edge, rows, cols = edge[inside], rows[inside], cols[inside]
    if edge.size:
        for found in exact_extract(_Pixels(share.shape, box), _Layer(edge), ["cell_id", "coverage"]):
            share.ravel()[found["properties"]["cell_id"]] = found["properties"]["coverage"]
    return share[: box.shape[0], : box.shape[1]]


def _polygons(geometries: NDArray[Any]) -> NDArray[Any]:
    """What has an area of each: where only edges meet, an intersection holds lines and points as well."""
    out = geometries.copy()
    for index in np.flatnonzero(shapely.get_type_id(geometries) == shapely.GeometryType.GEOMETRYCOLLECTION):
        parts = shapely.get_parts(geometries[index])
        out[index] = shapely.union_all(parts[shapely.get_dimensions(parts) == 2])
    return out


class _Pixels(RasterSource):  # type: ignore[misc] # exactextract has no types
    """Pixels without a value: only where they lie is wanted."""

    def __init__(self, shape: tuple[int, int], box: Box) -> None:
        super().__init__()
        self._extent = (box.col0, -(box.row0 + shape[0]), box.col0 + shape[1], -box.row0)

    def res(self) -> tuple[float, float]:
        return 1.0, 1.0

    def extent(self) -> tuple[float, float, float, float]:
        return self._extent

    def nodata_value(self) -> None:
        return None

    def read_window(self, _col: int, _row: int, cols: int, rows: int) -> NDArray[np.int8]:
        return np.zeros((rows, cols), np.int8)

    def srs_wkt(self) -> None:
        return None


class _Polygon(Feature):  # type: ignore[misc]
    def __init__(self, wkb: bytes) -> None:
        super().__init__()
        self._wkb = wkb

    def geometry(self) -> bytes:
        return self._wkb

    def fields(self) -> list[str]:
        return []


class _Layer(FeatureSource):  # type: ignore[misc]
    """Polygons without attributes."""

    def __init__(self, polygons: NDArray[Any]) -> None:
        super().__init__()
        self._polygons = polygons

    def count(self) -> int:
        return len(self._polygons)

    def __iter__(self) -> Iterator[_Polygon]:
        yield from map(_Polygon, shapely.to_wkb(self._polygons))

    def srs_wkt(self) -> None:
        return None

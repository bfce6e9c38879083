"""Cells of the Earth that say about where something is, and no more."""

from __future__ import annotations

import math

import shapely

EARTH_KM = 40_007.863
"""Length of a meridian, twice from pole to pole."""


def coarse_outline(outline: shapely.Geometry, grid_km: float) -> shapely.Polygon:
    """The cells that an outline touches, as one box in longitude and latitude.

    Rows of cells are `grid_km` high from the equator on, the cells of a row as wide at its middle. They depend on the
    size alone, so that outlines of the same cell cannot be told apart.

    Args:
        outline: Longitude and latitude in degrees, WGS 84.
        grid_km: Side of a cell.
    """
    west, south, east, north = outline.bounds
    step_deg = 360.0 * grid_km / EARTH_KM
    rows = range(math.floor(south / step_deg), math.floor(north / step_deg) + 1)
    boxes = []
    for row in rows:
        low, high = row * step_deg, (row + 1) * step_deg
        wide_deg = step_deg / max(math.cos(math.radians((low + high) / 2)), 1e-3)
        left, right = math.floor(west / wide_deg) * wide_deg, (math.floor(east / wide_deg) + 1) * wide_deg
        boxes.append(shapely.box(max(left, -180.0), max(low, -90.0), min(right, 180.0), min(high, 90.0)))
    return shapely.box(*shapely.union_all(boxes).bounds)

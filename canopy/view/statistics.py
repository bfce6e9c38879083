"""The statistics of a polygon that somebody drew, with their errors and a histogram of its heights."""

from __future__ import annotations

import json
import math
from typing import Any, Final

import numpy as np
import shapely
from pydantic import BaseModel, ConfigDict, ValidationError

from canopy.errors import CanopyError, ViewError
from canopy.region.folder import RegionFolder
from canopy.view.tiles import LON_LAT, transformer

MAX_VERTICES: Final = 10_000
"""More than any hand draws."""

MAX_PIXELS: Final = 25_000_000
"""Pixels of the rectangle around a polygon: some five seconds of work."""

HISTOGRAM_M: Final = 1.0
"""Width of a class of the histogram."""


class TooLargeError(CanopyError):
    """A polygon that is too much for an answer while somebody waits."""


class Drawn(BaseModel):
    """A GeoJSON geometry in longitude and latitude."""

    model_config = ConfigDict(frozen=True, extra="ignore", allow_inf_nan=False)

    type: str
    coordinates: list[Any]


def drawn_polygon(body: bytes) -> Any:
    """The polygon in the body of a request, as shapely's.

    Raises:
        ViewError: it is none.
        TooLargeError: it has more than `MAX_VERTICES` corners.
    """
    try:
        drawn = Drawn.model_validate_json(body)
        if drawn.type not in ("Polygon", "MultiPolygon"):
            raise ViewError(f"a {drawn.type[:40]} has no area; give a GeoJSON Polygon or MultiPolygon")
        polygon = shapely.from_geojson(json.dumps({"type": drawn.type, "coordinates": drawn.coordinates}))
    except (ValidationError, shapely.errors.GEOSException, RecursionError) as error:
        raise ViewError("the body is no GeoJSON geometry; give a Polygon or MultiPolygon in degrees") from error
    if polygon.is_empty:
        raise ViewError("the polygon is empty; give at least three corners")
    if (count := shapely.get_num_coordinates(polygon)) > MAX_VERTICES:
        raise TooLargeError(f"the polygon has {count} corners, more than {MAX_VERTICES}; use canopy zonal for it")
    xy = shapely.get_coordinates(polygon)
    if not (np.isfinite(xy).all() and (np.abs(xy) <= (180, 90)).all()):
        raise ViewError("the polygon leaves -180 to 180 and -90 to 90 degrees; give longitude and latitude")
    if not polygon.is_valid:
        raise ViewError(f"the polygon is not valid ({shapely.is_valid_reason(polygon)}); draw it without crossing lines")
    return polygon


def polygon_statistics(folder: RegionFolder, polygon: Any) -> dict[str, Any]:
    """What `canopy zonal` says of a polygon, and how much of its ground has which height.

    Args:
        folder: The map.
        polygon: As `drawn_polygon` gives it.

    Raises:
        TooLargeError: the polygon's rectangle holds more than `MAX_PIXELS` of the map's pixels.
        CanopyError: as `canopy.analyse.zonal.zones`.
    """
    import geopandas

    from canopy.analyse.zonal import zones

    grid = folder.grid
    west, south, east, north = polygon.bounds
    left, bottom, right, top = transformer(LON_LAT, grid.crs).transform_bounds(west, south, east, north, densify_pts=21)
    map_left, map_bottom, map_right, map_top = grid.bounds
    wide, tall = min(right, map_right) - max(left, map_left), min(top, map_top) - max(bottom, map_bottom)
    pixels = max(wide / grid.gsd[0], 0) * max(tall / grid.gsd[1], 0) if math.isfinite(wide * tall) else math.inf
    if pixels > MAX_PIXELS:
        raise TooLargeError(
            f"the polygon spans {pixels / 1e6:.0f} million pixels, more than {MAX_PIXELS // 1_000_000}; draw a smaller one, "
            f"or use canopy zonal for it"
        )
    frame = geopandas.GeoDataFrame(geometry=[polygon], crs=LON_LAT)
    ((_, zone),) = zones(folder, frame)
    row = {name: None if not math.isfinite(value) else value for name, value in zone.statistics(folder.blocks).items()}
    return {**row, "histogram": _histogram(zone)}


def _histogram(zone: Any) -> dict[str, list[float]]:
    """Square metres of known ground by height, from 0 m (what is lower counts as it) up; empty where none is known."""
    if not zone.heights.total > 0:
        return {"edges_m": [], "area_m2": []}
    classes = max(math.floor(zone.heights.max_m / HISTOGRAM_M), 0) + 1
    edges_m = np.arange(classes + 1) * HISTOGRAM_M
    return {"edges_m": edges_m.tolist(), "area_m2": (zone.heights.by_class(edges_m) * zone.pixel_m2).tolist()}

"""What a map says of one place: the values of the pixel in which it lies."""

from __future__ import annotations

import math
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict
from pyproj import Transformer

from canopy.grid import Grid
from canopy.view.handles import Handles

State = Literal["known", "unknown", "outside"]


class PointValues(BaseModel):
    """The answer for a place; None is unknown."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    lon: float
    """Degrees."""
    lat: float
    """Degrees."""
    x: float | None = None
    """In the map's CRS, metres."""
    y: float | None = None
    row: int | None = None
    """Of the map's pixels, from the top."""
    col: int | None = None
    height_m: float | None = None
    error_90_m: float | None = None
    lower_90_m: float | None = None
    upper_90_m: float | None = None
    date: str | None = None
    """ISO text of the day of the imagery, or the first and the last."""
    reference_m: float | None = None
    state: State


def pixel_at(grid: Grid, lon_deg: float, lat_deg: float) -> tuple[float, float, int, int] | None:
    """(x, y, row, col): a place in the map's CRS and the pixel in which it lies; None where it has none."""
    x, y = Transformer.from_crs("EPSG:4326", grid.crs, always_xy=True).transform(lon_deg, lat_deg)
    if not (math.isfinite(x) and math.isfinite(y)):
        return None
    col, row = (math.floor(v) for v in grid.pixel(x, y))
    rows, cols = grid.shape
    return (x, y, row, col) if 0 <= row < rows and 0 <= col < cols else None


def values_at(handles: Handles, row: int, col: int) -> tuple[float | None, ...]:
    """The values of all bands at a pixel."""
    with handles.raster() as raster:
        pixels = raster.read(row, col, (1, 1))
    return tuple(None if not math.isfinite(value) else value for value in pixels.data[:, 0, 0].astype(float).tolist())


def at(
    lon_deg: float, lat_deg: float, *, grid: Grid, height: Handles, error: Handles | None, date: str | None
) -> PointValues:
    """What the map says of a place."""
    place = pixel_at(grid, lon_deg, lat_deg)
    if place is None:
        return PointValues(lon=lon_deg, lat=lat_deg, state="outside")
    x, y, row, col = place
    (height_m, *_), found = values_at(height, row, col), dict[str, Any]()
    if error is not None:
        found = dict(zip(("error_90_m", "lower_90_m", "upper_90_m"), values_at(error, row, col), strict=True))
    return PointValues(
        lon=lon_deg, lat=lat_deg, x=x, y=y, row=row, col=col, height_m=height_m, date=date, **found,
        state="unknown" if height_m is None else "known",
    )  # fmt: skip

"""What a map says of one place: the values of the pixel in which it lies."""

from __future__ import annotations

import math
from typing import Literal

from pydantic import BaseModel, ConfigDict

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
    """The day of the imagery, ISO text; or the first and the last of the map, where the pixel's own is not known."""
    reference_m: float | None = None
    state: State


def known(value: float) -> float | None:
    """A value as an answer holds it."""
    return value if math.isfinite(value) else None


def as_iso(day: int) -> str | None:
    """20200618 as 2020-06-18; None for 0, which is no day."""
    return f"{day // 10000:04d}-{day // 100 % 100:02d}-{day % 100:02d}" if day else None

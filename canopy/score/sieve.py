"""Filters of shots that say what each of them took away."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import date
from typing import Self

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, model_validator

from canopy.tiler.heights import MAX_HEIGHT_M

NO_HEIGHT = "without a height"
TOO_HIGH = f"above {MAX_HEIGHT_M:g} m"
OUTSIDE_AREA = "outside the area"
OUTSIDE_DATES = "outside the dates"
TWICE = "read twice"

BoundsLonLat = tuple[float, float, float, float]
"""(west, south, east, north) in degrees, west < east: across the antimeridian the east goes on beyond 180."""


class Sieve:
    """The shots of one beam or file that are left, and how many each filter took away; every shot is counted once."""

    def __init__(self, count: int) -> None:
        self.left = np.ones(count, dtype=bool)
        self.dropped: dict[str, int] = {}

    def drop(self, reason: str, bad: NDArray[np.bool_]) -> None:
        """Take away those of the shots left that are bad. Filters that find none are in the account too, with 0."""
        hit = self.left & bad
        self.dropped[reason] = self.dropped.get(reason, 0) + int(hit.sum())
        self.left &= ~bad

    def drop_outside(
        self, lon_deg: NDArray[np.float64], lat_deg: NDArray[np.float64], bounds_deg: BoundsLonLat | None
    ) -> None:
        """Take away what lies outside of a rectangle, which may cross the antimeridian, or has no place at all."""
        if bounds_deg is None:
            self.drop(OUTSIDE_AREA, ~(np.isfinite(lon_deg) & np.isfinite(lat_deg)))
            return
        west, south, east, north = bounds_deg
        inside = (lon_deg - west) % 360 <= east - west
        self.drop(OUTSIDE_AREA, ~(inside & (lat_deg >= south) & (lat_deg <= north)))

    def drop_dates(self, day: NDArray[np.datetime64], since: date | None, until: date | None) -> None:
        """Take away what was measured before or after these days, or, where either is given, at an unknown time."""
        if since is None and until is None:
            return
        bad = np.zeros(day.shape, dtype=bool)
        if since is not None:
            bad |= ~(day >= np.datetime64(since))
        if until is not None:
            bad |= ~(day <= np.datetime64(until))
        self.drop(OUTSIDE_DATES, bad)

    def drop_heights(self, height_m: NDArray[np.float64]) -> None:
        """Take away what has no height, and what is taller than any tree: a cloud, or a ground that was missed."""
        self.drop(NO_HEIGHT, ~np.isfinite(height_m))
        with np.errstate(invalid="ignore"):
            self.drop(TOO_HIGH, height_m > MAX_HEIGHT_M)


class SiftSettings(BaseModel):
    """Where and when: what the settings of every kind of shots have."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    bounds_deg: BoundsLonLat | None = None
    """Only shots with their centre in this rectangle, (west, south, east, north)."""
    since: date | None = None
    """First day, UTC."""
    until: date | None = None
    """Last day."""

    @model_validator(mode="after")
    def _in_order(self) -> Self:
        if self.since is not None and self.until is not None and self.since > self.until:
            raise ValueError(f"since {self.since} is after until {self.until}; swap them")
        if self.bounds_deg is not None:
            west, south, east, north = self.bounds_deg
            if not (-180 <= west < east <= 540 and -90 <= south < north <= 90):
                raise ValueError(f"bounds_deg {self.bounds_deg} are not west < east, south < north in degrees")
        return self


def add_up(total: dict[str, int], more: Mapping[str, int]) -> None:
    """Add the counts of another beam or file to a total, reason by reason, in the order in which they first came."""
    for reason, count in more.items():
        total[reason] = total.get(reason, 0) + count

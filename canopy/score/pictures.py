"""The pixels that a score shows: a coarse map of the error and pictures of the worst places. They are no part of the score.

`score.json` holds what was measured; pictures would make it large and are there to be looked at only. They are gathered
while the rasters are read, in memory that does not grow with the region, and handed to the page beside the result.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

ERROR_MAP_PX = 900
"""Longest side of a map of the error."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ErrorMap:
    """Map minus reference, averaged over squares of the comparison's pixels."""

    error_m: NDArray[np.float32]
    """(row, col) mean error of the known pixels of each square, metres; NaN where none is known."""
    side_px: int
    """Side of a square in pixels of the comparison; 1 where nothing was averaged."""
    gsd_m: float
    """Side of a pixel of the comparison, metres."""

    @property
    def side_m(self) -> float:
        """Side of a square, metres."""
        return self.side_px * self.gsd_m


class ErrorMapSums:
    """The sums of an `ErrorMap`, to which strips or tiles are added in any order."""

    def __init__(self, shape: tuple[int, int], gsd_m: float, longest_px: int = ERROR_MAP_PX) -> None:
        """The empty map of a comparison's grid.

        Args:
            shape: (rows, cols) of the comparison's grid.
            gsd_m: Side of its pixels, metres.
            longest_px: Squares along the longer side, at most.
        """
        self._shape, self._gsd_m = shape, gsd_m
        self._side = max(1, math.ceil(max(shape) / longest_px))
        coarse = tuple(math.ceil(size / self._side) for size in shape)
        self._sum, self._n = np.zeros(coarse), np.zeros(coarse)

    def add(self, error_m: NDArray[np.floating], row: int, col: int = 0) -> None:
        """Add a part of the map.

        Args:
            error_m: (row, col) map minus reference, metres; NaN where one of them is unknown or does not count.
            row: Row of its first pixel in the comparison's grid.
            col: Column of its first pixel.
        """
        rows, cols = error_m.shape
        inside = row >= 0 and col >= 0 and row + rows <= self._shape[0] and col + cols <= self._shape[1]
        assert inside, f"a part of {error_m.shape} pixels at ({row}, {col}) is not in a grid of {self._shape}"
        if not error_m.size:
            return
        known = ~np.isnan(error_m)
        # Starts of the squares within the part: its first pixel, and then each pixel at which a square begins.
        starts, places = [], []
        for first, size in ((row, rows), (col, cols)):
            place = np.arange(first // self._side, (first + size - 1) // self._side + 1)
            starts.append(np.maximum(place * self._side - first, 0))
            places.append(place)
        where = np.ix_(places[0], places[1])
        self._sum[where] += _sums(np.where(known, error_m, 0.0), starts[0], starts[1])
        self._n[where] += _sums(known, starts[0], starts[1])

    def map(self) -> ErrorMap:
        """The means of what was added."""
        with np.errstate(invalid="ignore"):  # 0 / 0 is the NaN of a square without a known pixel
            error_m = (self._sum / self._n).astype(np.float32)
        return ErrorMap(error_m=error_m, side_px=self._side, gsd_m=self._gsd_m)


def _sums(values: NDArray[Any], row_starts: NDArray[np.intp], col_starts: NDArray[np.intp]) -> NDArray[np.float64]:
    rows = np.add.reduceat(values, row_starts, axis=0, dtype=np.float64)
    return np.asarray(np.add.reduceat(rows, col_starts, axis=1))


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class PlaceChip:
    """A place with some ground around it."""

    map_m: NDArray[np.float32]
    """(row, col) heights of the map, metres, on the comparison's pixels; NaN = unknown."""
    reference_m: NDArray[np.float32]
    """(row, col) heights of the reference on the same pixels."""
    photograph: NDArray[np.uint8] | None = None
    """(row, col, 3) colours of the imagery over the same ground, north up, of any number of pixels; None without imagery."""
    around: float = 0.5
    """How far the pictures reach beyond the place, in sides of the place: 0.5 makes them twice as wide as the place."""

    @property
    def inset(self) -> float:
        """How far inside the pictures the place begins, as a share of their side."""
        return self.around / (1 + 2 * self.around)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Pictures:
    """What there is to look at, by (number of the comparison in the result, name of the map)."""

    errors: Mapping[tuple[int, str], ErrorMap] = field(default_factory=dict)
    places: Mapping[tuple[int, str], tuple[PlaceChip | None, ...]] = field(default_factory=dict)
    """In the order of `MapScore.worst`; None for a place that has no picture."""

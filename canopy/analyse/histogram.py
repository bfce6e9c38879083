"""How much ground there is of each height: from it come means, quantiles and shares of any area, exactly.

Heights of a map are whole numbers of 1/32 m, so a histogram in these steps loses nothing, parts of an area add up to the
whole, and a million square kilometres take no more memory than a garden.
"""

from __future__ import annotations

import math

import numpy as np
from numba import njit
from numpy.typing import NDArray

from canopy.errors import RasterError
from canopy.mosaicker.quantum import QUANTUM_M

_SHARE_TOLERANCE = 1e-9
"""Shares of an area that are this close are the same: they are sums of rounded shares of pixels."""


_ROOM = 512
"""Steps by which a histogram grows beyond a height that it has no room for: 16 m."""


class HeightHistogram:
    """Weights, such as areas, by height."""

    def __init__(self) -> None:
        self._first = 0
        self._weights = np.zeros(0)

    def add(self, height_m: NDArray[np.float32], weight: NDArray[np.float32]) -> None:
        """Take in pixels: heights on the quantum, of which NaN is left out, and their weights, not negative.

        Raises:
            RasterError: a height is not a multiple of `QUANTUM_M`, or is infinite.
        """
        heights, weights = np.ascontiguousarray(height_m).ravel(), np.ascontiguousarray(weight).ravel()
        assert heights.shape == weights.shape, f"{heights.size} heights and {weights.size} weights"
        done = 0
        while True:
            done, quanta, off = _fill(heights, weights, self._weights, self._first, done)
            if off:
                raise RasterError(
                    f"a height of {heights[done]:g} m is no multiple of 1/{round(1 / QUANTUM_M)} m; make the map again"
                )
            if done == heights.size:
                return
            self._reach(quanta)

    def _reach(self, quanta: int) -> None:
        """Make room for a height, and for those near it."""
        low, high = quanta - _ROOM, quanta + _ROOM
        if self._weights.size:
            low, high = min(low, self._first), max(high, self._first + self._weights.size - 1)
            self._weights = np.pad(self._weights, (self._first - low, high - (self._first + self._weights.size - 1)))
        else:
            self._weights = np.zeros(high - low + 1)
        self._first = low

    @property
    def heights_m(self) -> NDArray[np.float64]:
        """Steps from below the least to above the greatest height."""
        return (self._first + np.arange(self._weights.size, dtype=np.float64)) * QUANTUM_M

    @property
    def weights(self) -> NDArray[np.float64]:
        """The weight at each of `heights_m`."""
        return self._weights

    @property
    def total(self) -> float:
        """Weight of all heights."""
        return float(self._weights.sum())

    @property
    def mean_m(self) -> float:
        """Mean height, NaN without any."""
        total = self.total
        return float(self._weights @ self.heights_m) / total if total > 0 else math.nan

    @property
    def max_m(self) -> float:
        """Greatest height, NaN without any."""
        there = np.flatnonzero(self._weights)
        return float(self.heights_m[there[-1]]) if there.size else math.nan

    def quantile_m(self, level: float) -> float:
        """The least height that at least the share `level` of the weight does not exceed, NaN without any."""
        total = self.total
        if not total > 0:
            return math.nan
        if level >= 1:
            return self.max_m
        reached = np.cumsum(self._weights)
        at = int(np.searchsorted(reached, level * total - _SHARE_TOLERANCE * total, side="left"))
        at = max(min(at, self._weights.size - 1), int(np.flatnonzero(self._weights)[0]))
        return float(self.heights_m[at])

    def share_above(self, height_m: float) -> float:
        """Share of the weight that is higher than `height_m`, NaN without any."""
        total = self.total
        return float(self._weights[self.heights_m > height_m].sum()) / total if total > 0 else math.nan

    def by_class(self, edges_m: NDArray[np.float64]) -> NDArray[np.float64]:
        """Weights from each edge up to but not including the next; what lies beyond the edges counts in the end classes."""
        index = np.clip(np.searchsorted(edges_m, self.heights_m, side="right") - 1, 0, edges_m.size - 2)
        return np.bincount(index, self._weights, minlength=edges_m.size - 1).astype(np.float64)


@njit(nogil=True, cache=True)
def _fill(
    height_m: NDArray[np.float32], weight: NDArray[np.float32], weights: NDArray[np.float64], first: int, start: int
) -> tuple[int, int, bool]:
    """Add pixels from `start` on, up to one whose height has no room (its quanta) or is not on the quantum (True)."""
    for i in range(start, height_m.size):
        if weight[i] == 0 or np.isnan(height_m[i]):
            continue
        scaled = height_m[i] * np.float32(1 / QUANTUM_M)
        if not abs(scaled) < 2**23 or scaled != np.rint(scaled):
            return i, 0, True
        at = int(scaled) - first
        if at < 0 or at >= weights.size:
            return i, int(scaled), False
        weights[at] += weight[i]
    return height_m.size, 0, False

"""Heights as whole numbers of 1/32 m: rounding to them, statistics and means that are exact because of them.

Sums of whole numbers do not depend on their order. So the statistics of a map are the same digits whether they are counted
in one file or merged from its sheets, and an overview pixel is the same wherever the file that it lies in begins, as long
as that is on its own lattice.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numba import njit
from numpy.typing import NDArray

from canopy.errors import RasterError

QUANTUM_M = 1 / 32
"""Heights are multiples of this. A power of two empties the low bits of the mantissa, which halves the compressed size;
the rounding is at most 1.6 cm."""


def quantise(height_m: NDArray[np.floating[Any]]) -> NDArray[np.float32]:
    """Heights rounded to the nearest `QUANTUM_M`; NaN stays NaN."""
    quanta = np.rint(np.asarray(height_m, np.float32) * np.float32(1 / QUANTUM_M))
    return np.asarray(quanta * np.float32(QUANTUM_M), np.float32)


def error_bands(lower_m: NDArray[np.floating[Any]], upper_m: NDArray[np.floating[Any]]) -> NDArray[np.float32]:
    """The three bands of `error.tif`, (band, row, col), from the bounds of the 90 % interval.

    The bounds are rounded outwards, so rounding never takes the true height out of the interval; the half-width
    likewise.
    """
    per_m = np.float32(1 / QUANTUM_M)
    lower = np.floor(np.asarray(lower_m, np.float32) * per_m)
    upper = np.ceil(np.asarray(upper_m, np.float32) * per_m)
    half_width = np.ceil((upper - lower) / 2)
    return np.stack([half_width, lower, upper]) * np.float32(QUANTUM_M)


@dataclass(frozen=True, slots=True, kw_only=True)
class BandStatistics:
    """What is known of the pixels of one band, in whole numbers, so that parts add up to the whole exactly."""

    count: int = 0
    """Pixels with a height; the others are NaN."""
    least: int | None = None
    """Lowest height in `QUANTUM_M`; None where there is no height."""
    largest: int | None = None
    """Greatest height in `QUANTUM_M`; None where there is no height."""
    total: int = 0
    """Sum of the heights in `QUANTUM_M`."""
    squares: int = 0
    """Sum of their squares."""

    def __post_init__(self) -> None:
        assert (self.count == 0) == (self.least is None) == (self.largest is None), f"{self} contradicts itself"

    def __add__(self, other: BandStatistics) -> BandStatistics:
        """The statistics of both sets of pixels together."""
        ends = [(part.least, part.largest) for part in (self, other) if part.least is not None and part.largest is not None]
        return BandStatistics(
            count=self.count + other.count,
            least=min((least for least, _ in ends), default=None),
            largest=max((largest for _, largest in ends), default=None),
            total=self.total + other.total,
            squares=self.squares + other.squares,
        )

    @property
    def mean_m(self) -> float:
        """Mean height, to the last digit; NaN where there is no height."""
        return self.total / self.count * QUANTUM_M if self.count else math.nan

    @property
    def stddev_m(self) -> float:
        """Standard deviation of the heights (of all of them, as GDAL has it: divided by their number)."""
        return math.sqrt(self.count * self.squares - self.total**2) / self.count * QUANTUM_M if self.count else math.nan

    def tags(self, pixels: int) -> dict[str, str]:
        """GDAL's tags of a band of so many pixels; none where there is no height."""
        if self.least is None or self.largest is None:
            return {}
        return {
            "STATISTICS_MINIMUM": repr(self.least * QUANTUM_M),
            "STATISTICS_MAXIMUM": repr(self.largest * QUANTUM_M),
            "STATISTICS_MEAN": repr(self.mean_m),
            "STATISTICS_STDDEV": repr(self.stddev_m),
            "STATISTICS_VALID_PERCENT": f"{100 * self.count / pixels:.4g}",
        }


Statistics = tuple[BandStatistics, ...]
"""One a band."""


def statistics_of(height_m: NDArray[np.float32]) -> Statistics:
    """The statistics of each band of an array (band, row, col) of metres on the quantum.

    Raises:
        RasterError: a height is not a multiple of `QUANTUM_M`, or is infinite.
    """
    found = []
    for band in np.ascontiguousarray(height_m):
        count, least, largest, total, squares, off = (int(v) for v in _tally(band.ravel()))
        if off:
            raise RasterError(f"{off} heights are not multiples of 1/{round(1 / QUANTUM_M)} m; round them with quantise")
        some = count > 0
        found.append(
            BandStatistics(
                count=count, least=least if some else None, largest=largest if some else None, total=total, squares=squares
            )
        )
    return tuple(found)


def merge(first: Statistics, second: Statistics) -> Statistics:
    """Band by band; an empty tuple is nothing yet."""
    return tuple(a + b for a, b in zip(first, second, strict=True)) if first and second else first or second


@njit(nogil=True, cache=True)
def _tally(heights_m: NDArray[np.float32]) -> tuple[int, int, int, int, int, int]:
    """Count, least, largest, sum and sum of squares in quanta, and how many values are none."""
    count, total, squares, off = 0, 0, 0, 0
    least, largest = 2**62, -(2**62)
    for height_m in heights_m:
        if np.isnan(height_m):
            continue
        quanta = height_m * np.float32(1 / QUANTUM_M)
        # Within 2**23 a float32 says which whole number it is, and no sum below overflows.
        if not abs(quanta) < 2**23 or quanta != np.rint(quanta):
            off += 1
            continue
        q = int(quanta)
        count += 1
        least, largest = min(least, q), max(largest, q)
        total += q
        squares += q * q
    return count, least, largest, total, squares, off


def halve(height_m: NDArray[np.float32]) -> NDArray[np.float32]:
    """Means of the known pixels in each block of 2 x 2, on the quantum; NaN where none is known.

    Args:
        height_m: (band, row, col) metres on the quantum; an odd last row or column is half a block.

    Returns:
        (band, ceil(row / 2), ceil(col / 2)).
    """
    count, rows, cols = height_m.shape
    coarse = np.empty((count, (rows + 1) // 2, (cols + 1) // 2), np.float32)
    for fine, out in zip(np.ascontiguousarray(height_m), coarse, strict=True):
        _halve(fine, out)
    return coarse


@njit(nogil=True, cache=True)
def _halve(fine: NDArray[np.float32], coarse: NDArray[np.float32]) -> None:
    """Fill `coarse`. The sum of four quanta is exact in float32, and so is a half; a third is never near one."""
    rows, cols = fine.shape
    for i in range(coarse.shape[0]):
        for j in range(coarse.shape[1]):
            if 2 * i + 1 < rows and 2 * j + 1 < cols:  # whole blocks without a hole are nearly all there are
                total = fine[2 * i, 2 * j] + fine[2 * i, 2 * j + 1] + fine[2 * i + 1, 2 * j] + fine[2 * i + 1, 2 * j + 1]
                if not np.isnan(total):
                    coarse[i, j] = np.rint(total * np.float32(0.25 / QUANTUM_M)) * np.float32(QUANTUM_M)
                    continue
            total, known = np.float32(0), np.float32(0)
            for row in range(2 * i, min(2 * i + 2, rows)):
                for col in range(2 * j, min(2 * j + 2, cols)):
                    if not np.isnan(fine[row, col]):
                        total += fine[row, col]
                        known += np.float32(1)
            mean = total / known if known else np.float32(np.nan)
            coarse[i, j] = np.rint(mean * np.float32(1 / QUANTUM_M)) * np.float32(QUANTUM_M)

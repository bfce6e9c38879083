"""Tree tops: the highest pixels of their surroundings, where the surroundings grow with the height as crowns do.

Variable-window local maxima after Popescu & Wynne (2004, Photogrammetric Engineering & Remote Sensing 70, 589-604), whose
regression for pines and deciduous trees together gives a tree of height h a crown of 2.51503 m + 0.00901/m h². It was fitted
on trees of up to some 35 m; beyond that it grows past all crowns, so `most_m` ends it. A pixel is a top if nothing is
higher within a circle of `share` of that diameter. Why a share: where crowns interlock, tops stand nearer to each other than
a crown is wide. On simulated forests with known trees (tests/bench/bench_tops.py) whole crowns miss a quarter of the trees.

Of pixels of equal height in a window the first (by row, then column) stands for the others, so that a plateau no wider than
a window has one top, and the same one wherever the map is cut for the work.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Final

import numpy as np
from numba import njit
from numpy.typing import NDArray

from canopy.errors import AnalysisError

BASE_M: Final = 2.51503
PER_M: Final = 0.00901
MOST_M: Final = 20.0
SHARE: Final = 0.7
LEAST_HEIGHT_M: Final = 5.0


@dataclass(frozen=True, slots=True, kw_only=True)
class TopRule:
    """What is a tree top."""

    base_m: float = BASE_M
    """Diameter of the crown of a tree of no height."""
    per_m: float = PER_M
    """What the square of the height adds to it, per metre; 0: all crowns are of one size."""
    most_m: float = MOST_M
    """Greatest diameter of a crown."""
    share: float = SHARE
    """Diameter of the window over that of the crown."""
    least_height_m: float = LEAST_HEIGHT_M
    """Lower maxima are no trees: 5 m is the least height of a tree in the forest definition of the FAO."""

    def __post_init__(self) -> None:
        values = (self.base_m, self.per_m, self.most_m, self.share, self.least_height_m)
        sound = all(math.isfinite(v) and v >= 0 for v in values)
        if not sound or not 0 < self.most_m <= 100 or not 0 < self.share <= 2 or self.least_height_m == 0:
            raise AnalysisError(
                f"tree tops by {self.share:g} of crowns of {self.base_m:g} m + {self.per_m:g}/m h², at most "
                f"{self.most_m:g} m, above {self.least_height_m:g} m: give no negative numbers, a share of 0 to 2, crowns "
                f"of at most 100 m and a height above 0 m"
            )

    def crown_m(self, height_m: NDArray[np.float32]) -> NDArray[np.float64]:
        """Diameter of the crown of a tree of that height, by the regression."""
        return np.minimum(self.base_m + self.per_m * np.asarray(height_m, np.float64) ** 2, self.most_m)

    def halo_px(self, gsd_m: float) -> int:
        """How many pixels around decide about a pixel."""
        return max(1, math.ceil(self.share * self.most_m / 2 / gsd_m))


def find_tops(
    height_m: NDArray[np.float32], inner: tuple[slice, slice], rule: TopRule, gsd_m: float
) -> tuple[NDArray[np.intp], NDArray[np.intp], NDArray[np.bool_]]:
    """Tops in the inner part of a window that has `rule.halo_px` around it.

    Args:
        height_m: (row, col), NaN unknown.
        inner: (row, col) slices of the part.
        rule: What is a top.
        gsd_m: Side of a pixel.

    Returns:
        Rows and columns in the window, row by row, and which of the tops have an unknown pixel in their surroundings, where
        something higher may stand.
    """
    rows, cols = (range(*part.indices(size)) for part, size in zip(inner, height_m.shape, strict=True))
    found = _find(
        np.ascontiguousarray(height_m), rows.start, rows.stop, cols.start, cols.stop,
        rule.base_m, rule.per_m, rule.most_m, rule.share, rule.least_height_m, gsd_m,
    )  # fmt: skip
    return found[:, 0], found[:, 1], found[:, 2] > 0


@njit(nogil=True, cache=True)
def _find(  # noqa: PLR0917 - numba takes no keywords
    height_m: NDArray[np.float32], row0: int, row1: int, col0: int, col1: int,
    base_m: float, per_m: float, most_m: float, share: float, least_m: float, gsd_m: float,
) -> NDArray[np.intp]:  # fmt: skip
    rows, cols = height_m.shape
    found = []
    for row in range(row0, row1):
        for col in range(col0, col1):
            h = height_m[row, col]
            if not h >= least_m:
                continue
            reach = max(share * min(base_m + per_m * float(h) ** 2, most_m) / 2 / gsd_m, 1.5)  # the eight neighbours always
            squared = reach * reach
            top, unknown = True, 0
            # The eight neighbours first: they turn down most pixels.
            for ring in (1, int(reach)):
                for i in range(-ring, ring + 1):
                    for j in range(-ring, ring + 1):
                        if i * i + j * j > squared or (i == 0 and j == 0):
                            continue
                        r, c = row + i, col + j
                        if r < 0 or c < 0 or r >= rows or c >= cols or np.isnan(height_m[r, c]):
                            unknown = 1
                            continue
                        other = height_m[r, c]
                        if other > h or (other == h and (i < 0 or (i == 0 and j < 0))):
                            top = False
                            break
                    if not top:
                        break
                if not top:
                    break
            if top:
                found.append((row, col, unknown))
    out = np.empty((len(found), 3), np.intp)
    for k in range(len(found)):
        out[k, 0], out[k, 1], out[k, 2] = found[k]
    return out

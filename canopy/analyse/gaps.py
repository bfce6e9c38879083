"""Canopy gaps: ground where the canopy is low, over more than a spot.

Brokaw (1982, Biotropica 14, 158-160) calls a gap "a hole in the forest extending through all levels down to an average
height of two m above ground". On a canopy height model that is connected ground below a height and of at least some area
(Vepakomma et al. 2008, Silva et al. 2019), without which every chink between two crowns would be one. There is no largest
area: fields, roads and water are gaps too. Where forest ends and open land begins is no question that heights answer; give
polygons of the forest. Ground whose height is unknown belongs to no gap.
"""

from __future__ import annotations

import math
from typing import Final

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from canopy.errors import AnalysisError

GAP_BELOW_M: Final = 2.0
"""Ground under canopy lower than this may be part of a gap."""

LEAST_GAP_M2: Final = 10.0
"""Smaller ones are chinks between crowns: about the crown of one small tree."""

_EIGHT_NEIGHBOURS = np.ones((3, 3), np.int8)
"""Pixels that touch at a corner are connected, as in the tools that gaps are compared with."""


def checked_gap(below_m: float, least_m2: float) -> None:
    """Refuse what is no definition of a gap.

    Raises:
        AnalysisError: a number is not finite, or not in its range.
    """
    if not (math.isfinite(below_m) and below_m > 0):
        raise AnalysisError(f"gaps below {below_m:g} m: give a height above 0 m; {GAP_BELOW_M:g} is usual")
    if not 0 <= least_m2 <= 10_000:
        raise AnalysisError(
            f"gaps of at least {least_m2:g} m²: give an area of 0 to 10 000 m²; {LEAST_GAP_M2:g} is the default"
        )


def halo_px(least_m2: float, pixel_m2: float) -> int:
    """How many pixels around a window decide what is a gap in it: a smaller patch reaches no further than it has pixels."""
    return max(0, math.ceil(least_m2 / pixel_m2 - 1e-9) - 1)


def gaps(height_m: NDArray[np.float32], *, below_m: float, least_m2: float, pixel_m2: float) -> NDArray[np.bool_]:
    """(row, col) True in gaps.

    Within `halo_px` of the array's edges it may be wrong; further in, it does not depend on where the array ends.

    Args:
        height_m: (row, col), NaN unknown.
        below_m: Lower canopy is open.
        least_m2: Least area of a gap.
        pixel_m2: Area of a pixel.
    """
    low = height_m < below_m  # NaN is not
    least_px = halo_px(least_m2, pixel_m2) + 1
    if least_px == 1 or not low.any():
        return np.asarray(low)
    label, count = ndimage.label(low, _EIGHT_NEIGHBOURS)
    large = np.bincount(label.ravel(), minlength=count + 1) >= least_px
    large[0] = False
    return np.asarray(large[label])

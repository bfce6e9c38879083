"""Ground on which nothing changed, and what the differences of two maps there say of the errors elsewhere.

Where it is known that nothing changed, every difference is an error. With d the difference of a pixel and w_down, w_up how
far its interval reaches down and up from there, the conformal scores are d / w_down and -d / w_up: the interval reaches 0 m,
as it should, where both are at most 1. Their 95 % quantiles say how many reaches make intervals that hold 90 % there. So the
intervals become narrower where the two maps err alike, wider where their errors were understated, and lopsided where one map
is higher than the other as a whole.

What is promised: at most 10 % of pixels called changed on ground exchangeable with this, of the same kinds of forest, seen
in the same images. Meadows say nothing of old trees.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Final

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict

from canopy.errors import AnalysisError
from canopy.grid import Box, Grid
from canopy.model.calibration import LEAST_PX
from canopy.tiler.area import read_area

TAIL: Final = 0.95

_STEPS: Final = 4096
"""Scores are counted in steps of 1/4096, rounded up."""
_HIGHEST: Final = 64
"""Greatest score that is told from greater ones."""


class Stable(BaseModel):
    """What was measured on ground that did not change."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    path: str
    pixels: int
    """Of it that are known in both maps."""
    mean_m: float
    """Of the differences there: what one map is higher than the other as a whole."""
    lower_factor: float
    """How many times its own reach every interval reaches down."""
    upper_factor: float
    """The same up."""

    @property
    def text(self) -> str:
        """In words, for tags."""
        return (
            f"{self.pixels} pixels of {Path(self.path).name}: mean difference {self.mean_m:+.2f} m, intervals reach "
            f"{self.lower_factor:.3g} times down and {self.upper_factor:.3g} times up"
        )


def measure_stable(
    path: Path,
    grid: Grid,
    parts: Iterable[Box],
    reaches: Callable[[Box], tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]],
) -> Stable:
    """Measure how wide intervals of change must be to hold on ground that did not change.

    Args:
        path: Polygons of it, in any CRS.
        grid: The pixels.
        parts: Boxes of them, counted from the first.
        reaches: The change of a box, and how far its interval reaches down and up, metres, (row, col).

    Raises:
        AreaError: the file cannot be read.
        AnalysisError: there are too few pixels, or they differ by far more than the errors say.
    """
    polygons = read_area(path).polygons_in(grid.crs)
    counts = np.zeros((2, _HIGHEST * _STEPS + 2), np.int64)
    pixels, total_m = 0, 0.0
    for part in parts:
        here = grid.crop(part.row0, part.col0, part.shape)
        inside = _inside(polygons, here)
        if not inside.any():
            continue
        change, down, up = (values[inside] for values in reaches(part))
        known = np.isfinite(change)
        change, down, up = change[known], down[known], up[known]
        pixels, total_m = pixels + len(change), total_m + float(change.sum())
        for side, (beyond, reach) in enumerate(((change, down), (-change, up))):
            with np.errstate(divide="ignore", invalid="ignore"):  # an interval may end at its height, and so may a change
                score = np.where(beyond > 0, beyond / reach, 0.0)
            steps = np.ceil(np.clip(score, 0, _HIGHEST + 1) * _STEPS).astype(np.int64)
            counts[side] += np.bincount(np.minimum(steps, counts.shape[1] - 1), minlength=counts.shape[1])
    if pixels < LEAST_PX:
        raise AnalysisError(
            f"{path} holds {pixels} pixels known in both maps, {LEAST_PX} are needed; give more stable ground"
        )
    lower, upper = (_quantile(count, pixels) for count in counts)
    if max(lower, upper) > _HIGHEST:
        raise AnalysisError(
            f"{path}: the maps differ there by more than {_HIGHEST} times their errors; did nothing change on that ground?"
        )
    return Stable(path=str(path), pixels=pixels, mean_m=total_m / pixels, lower_factor=lower, upper_factor=upper)


def _inside(polygons: object, grid: Grid) -> NDArray[np.bool_]:
    """(row, col) True where the pixel's centre lies in one of the polygons."""
    from rasterio.features import rasterize

    burnt = rasterize(polygons, out_shape=grid.shape, transform=grid.transform, fill=0, default_value=1, dtype="uint8")
    return np.asarray(burnt > 0)


def _quantile(count: NDArray[np.int64], pixels: int) -> float:
    """The smallest score that `TAIL` of the pixels and one more do not exceed."""
    wanted = np.ceil((pixels + 1) * TAIL)
    return float(np.searchsorted(np.cumsum(count), wanted) / _STEPS)

"""How far a map lies off the reference, and whether to believe it: for scores beside the raw ones, never instead.

Map and lidar show the same crowns, so their heights are correlated directly: the peak of the cross-correlation of a few
windows, tapered and found between the cells (`skimage.registration.phase_cross_correlation` without its normalisation, which
would weigh noise like crowns). A shift is believed when the windows agree on it, it is short, and map and reference then
correlate better on the same cells. There is one shift a site: files of the reference that touch.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage
from scipy.signal.windows import tukey
from skimage.registration import phase_cross_correlation

from canopy.grid import Box
from canopy.score.cells import Cells, HeightRasters, corners, touched
from canopy.score.result import Shift, Statistic

COARSEST_GSD_M = 2.5
"""In larger cells crowns are hardly seen, and a shift of a few metres is less than one of them."""

MOST_SHIFT_M = 5.0
"""Maps and lidar are not farther apart; a longer shift has found another crown."""

LEAST_GAIN = 0.005
"""Least rise of the correlation for a shift to be believed."""

LEAST_SHIFT_PX = 0.1
"""A shorter one is none."""

WINDOW_PX = 256
LEAST_PX = 24
"""Sides of the windows that are compared, in cells; a site that is smaller than the second has too little to compare."""

WINDOWS = 3
"""Windows along each side of a site."""

LEAST_KNOWN = 0.5
"""Share of a window that must be known."""

LEAST_RELIEF_M = 0.5
"""Standard deviation of the heights in a window below which there is nothing to compare."""

AGREEING_PX = 1.5
"""Windows agree when at least half of them are this close to their median."""

STEPS_PER_PX = 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Site:
    """Files of a reference that touch."""

    name: str
    boxes: tuple[Box, ...]
    """Their cells."""

    @property
    def extent(self) -> Box:
        """The cells that hold them all."""
        return Box(
            min(box.row0 for box in self.boxes), min(box.col0 for box in self.boxes),
            max(box.row1 for box in self.boxes), max(box.col1 for box in self.boxes),
        )  # fmt: skip

    def mask(self, box: Box) -> NDArray[np.bool_]:
        """(row, col) whether the cells of `box` belong to the site."""
        inside = np.zeros(box.shape, bool)
        for each in self.boxes:
            if (part := each.intersect(box)) is not None:
                inside[part.slices_in(box)] = True
        return inside


def sites_of(paths: Sequence[Path], boxes: Sequence[Box]) -> list[Site]:
    """Files that touch or overlap, put together; each site is called after its first file."""
    left, places = np.ones(len(boxes), bool), corners(boxes)
    sites = []
    while left.any():
        todo, found = [int(np.flatnonzero(left)[0])], []
        left[todo[0]] = False
        while todo:
            found.append(todo.pop())
            near = np.flatnonzero(left & touched(places, _widened(boxes[found[-1]])))
            left[near] = False
            todo += near.tolist()
        found.sort()
        more = f" and {len(found) - 1} more" if len(found) > 1 else ""
        sites.append(Site(name=f"{paths[found[0]].name}{more}", boxes=tuple(boxes[k] for k in found)))
    return sites


def _widened(box: Box) -> Box:
    return Box(box.row0 - 1, box.col0 - 1, box.row1 + 1, box.col1 + 1)


def measure(
    rasters: HeightRasters, reference: HeightRasters, cells: Cells, *, site: Site, within: Box, statistic: Statistic
) -> Shift:  # fmt: skip
    """The shift of a map at one site.

    Args:
        rasters: The map.
        reference: The reference.
        cells: Where they are compared.
        site: Where to look.
        within: The cells that are compared at all.
        statistic: How their pixels become cells.
    """
    extent = site.extent.intersect(within)
    if cells.gsd_m > COARSEST_GSD_M:
        return _kept(site, f"cells of {cells.gsd_m:g} m are larger than the {COARSEST_GSD_M:g} m in which crowns are seen")
    if extent is None or min(extent.shape) < LEAST_PX:
        return _kept(site, f"less than {LEAST_PX} cells along a side to compare")
    pairs = [
        pair for window in _windows(extent) if (pair := _pair(rasters, reference, cells, window, statistic)) is not None
    ]
    if not pairs:
        return _kept(site, f"no window is known to {LEAST_KNOWN:.0%} and has relief in both")
    shifts = np.array([_shift_px(*pair) for pair in pairs])
    row, col = np.median(shifts, axis=0)
    near = np.hypot(*(shifts - (row, col)).T) <= AGREEING_PX
    before, after = _agreement(pairs, (row, col))
    x_m, y_m = float(col * cells.gsd_m), float(-row * cells.gsd_m)
    if near.mean() < LEAST_KNOWN:
        reason = f"only {int(near.sum())} of {len(pairs)} windows agree within {AGREEING_PX:g} cells"
    elif math.hypot(x_m, y_m) > MOST_SHIFT_M:
        reason = f"longer than {MOST_SHIFT_M:g} m"
    elif math.hypot(row, col) < LEAST_SHIFT_PX:
        reason = f"shorter than {LEAST_SHIFT_PX:g} cells"
    elif not after - before >= LEAST_GAIN:
        reason = f"the correlation does not rise by {LEAST_GAIN:g}"
    else:
        return Shift(
            site=site.name, x_m=x_m, y_m=y_m, agreement_before=before, agreement_after=after, applied=True,
            reason=f"{int(near.sum())} of {len(pairs)} windows agree, and the correlation rises",
        )  # fmt: skip
    return Shift(
        site=site.name, x_m=x_m, y_m=y_m, agreement_before=_known(before), agreement_after=_known(after), applied=False,
        reason=reason,
    )  # fmt: skip


def _kept(site: Site, reason: str) -> Shift:
    return Shift(
        site=site.name, x_m=None, y_m=None, agreement_before=None, agreement_after=None, applied=False, reason=reason
    )


def _known(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _windows(extent: Box) -> list[Box]:
    rows = _spread(extent.row0, extent.row1)
    cols = _spread(extent.col0, extent.col1)
    return [Box(row0, col0, row1, col1) for row0, row1 in rows for col0, col1 in cols]


def _spread(start: int, stop: int) -> list[tuple[int, int]]:
    """Windows spread evenly along one axis; one where a single one holds it all."""
    side = min(WINDOW_PX, stop - start)
    firsts = sorted({round(v) for v in np.linspace(start, stop - side, WINDOWS)})
    return [(first, first + side) for first in firsts]


Pair = tuple[NDArray[np.float64], NDArray[np.float64]]


def _pair(
    rasters: HeightRasters, reference: HeightRasters, cells: Cells, window: Box, statistic: Statistic
) -> Pair | None:  # fmt: skip
    """Heights of map and reference in a window, NaN where one is unknown; None where there is too little."""
    one, other = (source.read(cells, window, statistic).height_m for source in (rasters, reference))
    known = np.isfinite(one) & np.isfinite(other)
    if known.mean() < LEAST_KNOWN or min(one[known].std(), other[known].std()) < LEAST_RELIEF_M:
        return None
    return np.where(known, one, np.nan), np.where(known, other, np.nan)


def _shift_px(map_m: NDArray[np.float64], reference_m: NDArray[np.float64]) -> tuple[float, float]:
    """(row, col) by which the map has to move."""
    taper = np.outer(*(tukey(side, 0.5) for side in map_m.shape))
    flat = [np.where(np.isfinite(h), h - np.nanmean(h), 0.0) * taper for h in (reference_m, map_m)]
    shift, _, _ = phase_cross_correlation(*flat, upsample_factor=STEPS_PER_PX, normalization=None)  # type: ignore[no-untyped-call]
    return float(shift[0]), float(shift[1])


def _agreement(pairs: Sequence[Pair], shift: tuple[float, float]) -> tuple[float, float]:
    """Correlation of map and reference before and after a move, on the same cells of all windows."""
    before, after, truth = [], [], []
    for map_m, reference_m in pairs:
        known = np.isfinite(map_m)
        moved = ndimage.shift(np.where(known, map_m, 0.0), shift, order=1, mode="constant")
        weight = ndimage.shift(known.astype(np.float64), shift, order=1, mode="constant")
        both = (weight > 1 - 1e-6) & known & np.isfinite(reference_m)
        before.append(map_m[both])
        after.append(moved[both])
        truth.append(reference_m[both])
    one, two, target = (np.concatenate(parts) for parts in (before, after, truth))
    if target.size < LEAST_PX:
        return math.nan, math.nan
    with np.errstate(invalid="ignore", divide="ignore"):  # a flat part has no correlation: NaN
        return float(np.corrcoef(one, target)[0, 1]), float(np.corrcoef(two, target)[0, 1])

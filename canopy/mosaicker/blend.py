"""From overlapping windows of predictions to one strip of finished pixels at a time.

The sums run over a band of the mosaic that is one window high, so memory grows with the width of the mosaic and not with
its area. Windows arrive in row-major order and every pixel sums its windows in that order, whichever sheet it is on.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from canopy.grid import Box, Layout, boundary, weight


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Strip:
    """Finished rows of a mosaic."""

    box: Box
    """Where they lie, in lattice pixels."""
    mean_m: NDArray[np.float32]
    """(row, col) height; NaN where no window had a usable prediction."""
    spread_m: NDArray[np.float32]
    """(row, col) standard deviation: the mean of the windows' variances plus the variance of their means."""


def window_weights(layout: Layout) -> NDArray[np.float32]:
    """(window_px,) weights of a window along one axis, the same for every window.

    Multiples of 1/(2*feather) with a power of two as feather, so float32 holds them, their products and their sums
    exactly; over all windows they sum to 1 at every pixel.
    """
    pixels = np.arange(layout.window_px)
    edge = boundary(0, layout.stride_px, layout.overlap_px)
    whole = weight(pixels, edge, edge + layout.stride_px, layout.feather_px, clamp=np.clip)
    return np.asarray(whole / (2 * layout.feather_px), np.float32)


class Blend:
    """The running sums of one sheet: `add` its windows in row-major order, `take` each strip when it is finished."""

    def __init__(self, layout: Layout, box: Box) -> None:
        self._layout = layout
        self._box = box
        along = window_weights(layout)
        self._weights = along[:, None] * along[None, :]
        self._top = box.row0
        self._last: tuple[int, int] | None = None
        # w, w * mean and w * (spread^2 + mean^2) of the rows from `_top` on; no window reaches further than its own side.
        self._sums = np.zeros((3, layout.window_px, box.shape[1]), np.float32)

    def add(
        self, row: int, col: int, mean_m: NDArray[np.float32], spread_m: NDArray[np.float32], usable: NDArray[np.bool_]
    ) -> None:
        """Add window (row, col).

        Args:
            row: Window row on the lattice.
            col: Window column.
            mean_m: (window_px, window_px) predicted height.
            spread_m: Its standard deviation.
            usable: False where the imagery is invalid or the model abstains; such pixels add nothing.
        """
        assert self._last is None or (row, col) > self._last, f"window {(row, col)} after {self._last}: not row-major"
        self._last = (row, col)
        part = self._layout.support_box(row, col).intersect(self._box)
        assert part is not None, f"window {(row, col)} has no weight in {self._box}"
        assert part.row0 >= self._top, f"window {(row, col)} reaches rows that were already taken"
        there = part.slices_in(self._layout.window_box(row, col))
        here = (
            slice(part.row0 - self._top, part.row1 - self._top),
            slice(part.col0 - self._box.col0, part.col1 - self._box.col0),
        )
        use = usable[there]
        w, mean, spread = self._weights[there], mean_m[there], spread_m[there]
        if not use.all():
            # NaN times a weight of zero would still be NaN, so what is unusable is replaced before it is weighted.
            w, mean, spread = (np.where(use, each, np.float32(0)) for each in (w, mean, spread))
        sums = self._sums[(slice(None), *here)]
        sums[0] += w
        square = mean * mean
        part_m = spread * spread
        square += part_m
        square *= w
        sums[2] += square
        sums[1] += np.multiply(w, mean, out=part_m)

    def take(self, before: int) -> Strip | None:
        """The rows above lattice row `before`, which no further window may touch; None when there are none."""
        stop = min(before, self._box.row1)
        rows = stop - self._top
        if rows <= 0:
            return None
        assert rows <= self._layout.window_px, f"{rows} rows are more than the {self._layout.window_px} kept"
        total, first, second = self._sums[:, :rows]
        with np.errstate(divide="ignore", invalid="ignore"):  # 0/0 is NaN: no window, no height
            mean = first / total
            spread = second / total
            spread -= mean * mean
            # Rounding can leave a variance of -1e-6 where all windows agree exactly.
            np.sqrt(np.maximum(spread, np.float32(0), out=spread), out=spread)
        box = Box(self._top, self._box.col0, stop, self._box.col1)
        kept = self._sums[:, rows:].copy()
        self._sums[:, : kept.shape[1]] = kept
        self._sums[:, kept.shape[1] :] = 0
        self._top = stop
        return Strip(box=box, mean_m=mean, spread_m=spread)

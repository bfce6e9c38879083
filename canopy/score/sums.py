"""What is counted of one map, square of ground by square of ground, while a comparison goes by.

Every measure comes from sums of `canopy.metrics` kept for each square of ground, which are the bootstrap's observations. A
square is always counted whole and in one go, so that what is counted of it does not depend on how the cells were read, and
the sums over squares are taken in the order of their places: a score read in any pieces is the same to the last bit.

Memory has a limit: beyond `MOST_SQUARES` the squares are put together four by four, and the intervals are then drawn from
squares of twice the side.
"""

from __future__ import annotations

import heapq
import math
from dataclasses import dataclass, field
from typing import Generic, TypeVar

import numpy as np
from numpy.typing import NDArray

from canopy.metrics import (
    BLOCK_M,
    CLASS_EDGES_M,
    RESAMPLED_M,
    BlockSums,
    CoverCounts,
    EdgeSums,
    HeightSums,
    IntervalSums,
    class_index,
)
from canopy.model.blocks import BlockTable, mean_interval

MOST_SQUARES = 4096
"""Squares of ground that are kept apart: more would make no interval surer and every one slower."""

COVER_M = (2.0, 5.0)
"""Heights from which on a pixel is tree cover."""

STATED_EDGES_M = (1.0, 2.0, 3.0, 4.0, 6.0, 8.0, 12.0)
"""Edges between the classes of stated error (half width of the interval)."""

SCATTER_STEP_M = 1.0
SCATTER_TOP_M = 120.0
"""Heights from 0 m to this are in the scatter."""

RESIDUAL_CLASS_M = 2.0
"""Width of the classes of reference height whose errors have quantiles."""

STEP_M = 0.1
"""Width of the classes of which quantiles are read, linearly within one: they are good to half of it."""

REACH_M = 130.0
"""Errors beyond it count as it in quantiles: no height and no map is so far off unless its unit is."""

WORST = 12
"""Places that are kept."""

_CLASSES = math.ceil(SCATTER_TOP_M / RESIDUAL_CLASS_M) + 1
"""Classes of reference height that have residuals, the last one open."""

_BINS = round(SCATTER_TOP_M / SCATTER_STEP_M)

Square = tuple[int, int]
"""(row, col) of a square of ground, from the cells' origin."""

Floats = NDArray[np.float64]

S = TypeVar("S", HeightSums, IntervalSums, CoverCounts, EdgeSums)


@dataclass(frozen=True, slots=True, kw_only=True)
class Squares:
    """How ground is cut: blocks of about `BLOCK_M` in squares of about `RESAMPLED_M`, both of whole cells."""

    gsd_m: float
    block_px: int
    """Cells along a block's side; 0 where a cell is larger than a block should be."""
    side_px: int
    """Cells along a square's side, a whole number of blocks."""

    @classmethod
    def of(cls, gsd_m: float) -> Squares:
        """The cut for cells of this size."""
        block_px = round(BLOCK_M / gsd_m) if gsd_m <= BLOCK_M else 0
        unit_px = max(1, block_px)
        return cls(gsd_m=gsd_m, block_px=block_px, side_px=unit_px * max(1, round(RESAMPLED_M / (unit_px * gsd_m))))


class BySquare(Generic[S]):
    """Sums of one kind by square of ground."""

    def __init__(self) -> None:
        self._sums: dict[Square, S] = {}

    def __len__(self) -> int:
        return len(self._sums)

    def add(self, square: Square, sums: S) -> None:
        """Add to a square."""
        self._sums[square] = self._sums[square] + sums if square in self._sums else sums

    def coarsen(self) -> None:
        """Put squares together four by four."""
        fine, self._sums = self._sums, {}
        for (row, col), sums in sorted(fine.items()):
            self.add((row // 2, col // 2), sums)

    def get(self, square: Square, empty: S) -> S:
        """The sums of a square, `empty` where there are none."""
        return self._sums.get(square, empty)

    @property
    def squares(self) -> list[Square]:
        """The squares in order."""
        return sorted(self._sums)

    def values(self) -> list[S]:
        """The sums in the order of the squares."""
        return [self._sums[square] for square in self.squares]

    def total(self, empty: S) -> S:
        """The sums of all squares."""
        return sum(self.values(), empty)


Key = tuple[str, int]
"""A group of cells: ("height", class of reference height), ("cover", class of land cover) or ("polygon", its number)."""


@dataclass(frozen=True, slots=True, kw_only=True, order=True)
class Spot:
    """A block of ground, to be ordered by how wrong the map is in it."""

    off_m: float
    """Absolute value of the mean error."""
    row: int
    """Of the block, from the cells' origin."""
    col: int
    n: int
    map_mean_m: float
    reference_mean_m: float


class Histogram:
    """Counts in classes of equal width, several rows of them, of which quantiles can be read."""

    def __init__(self, rows: int, low: float, high: float) -> None:
        self._low, self._bins = low, round((high - low) / STEP_M)
        self.counts = np.zeros((rows, self._bins), dtype=np.int64)

    def add(self, row: NDArray[np.intp], value: Floats) -> None:
        """Count values, each in its row; those beyond the ends count in the last class."""
        at = np.clip(np.floor((value - self._low) / STEP_M), 0, self._bins - 1).astype(np.intp)
        self.counts += np.bincount(row * self._bins + at, minlength=self.counts.size).reshape(self.counts.shape)

    def quantile(self, row: int, share: float) -> float:
        """The value below which this share of a row lies, linear within a class; NaN of an empty row."""
        counts: NDArray[np.int64] = self.counts[row]
        total = int(counts.sum())
        if not total:
            return math.nan
        below = np.cumsum(counts)
        at = int(np.searchsorted(below, share * total))
        at = min(max(at, int(np.flatnonzero(counts)[0])), self._bins - 1)
        within = float((share * total - (below[at] - counts[at])) / counts[at]) if counts[at] else 0.0
        return self._low + (at + min(max(within, 0.0), 1.0)) * STEP_M


@dataclass(slots=True)
class MapSums:
    """The running sums of one map of a comparison."""

    cut: Squares
    edges_m: tuple[float, ...] = CLASS_EDGES_M
    """Inner edges of the classes of height."""
    n_missing: int = 0
    """Cells with a reference that this map lacks."""
    heights: BySquare[HeightSums] = field(default_factory=BySquare)
    blocks: BySquare[HeightSums] = field(default_factory=BySquare)
    edges: BySquare[EdgeSums] = field(default_factory=BySquare)
    cover: tuple[BySquare[CoverCounts], ...] = field(default_factory=lambda: tuple(BySquare() for _ in COVER_M))
    intervals: BySquare[IntervalSums] = field(default_factory=BySquare)
    block_intervals: BySquare[IntervalSums] = field(default_factory=BySquare)
    groups: dict[Key, BySquare[HeightSums]] = field(default_factory=dict)
    group_intervals: dict[Key, BySquare[IntervalSums]] = field(default_factory=dict)
    """Also ("predicted", class of predicted height) and ("stated", class of stated error)."""
    stated_sum_m: Floats = field(default_factory=lambda: np.zeros(len(STATED_EDGES_M) + 1))
    observed: Histogram = field(default_factory=lambda: Histogram(len(STATED_EDGES_M) + 1, 0.0, REACH_M))
    residuals: Histogram = field(default_factory=lambda: Histogram(_CLASSES, -REACH_M, REACH_M))
    residual_sum_m: Floats = field(default_factory=lambda: np.zeros(_CLASSES))
    scatter: NDArray[np.int64] = field(default_factory=lambda: np.zeros((_BINS, _BINS), np.int64))
    outside: int = 0
    worst: list[Spot] = field(default_factory=list)
    """A heap, the least bad first."""
    level: int = 0
    """How often squares were put together."""

    @property
    def square_m(self) -> float:
        """Side of the squares, metres."""
        return self.cut.side_px * self.cut.gsd_m * (1 << self.level)

    @property
    def too_many(self) -> bool:
        """Whether there are more squares than are kept apart."""
        return len(self.heights) > MOST_SQUARES

    def coarsen(self) -> None:
        """Put squares together four by four, everywhere."""
        self.level += 1
        heights: list[BySquare[HeightSums]] = [self.heights, self.blocks, *self.groups.values()]
        intervals: list[BySquare[IntervalSums]] = [self.intervals, self.block_intervals, *self.group_intervals.values()]
        for some in (heights, intervals, self.cover, [self.edges]):
            for each in some:
                each.coarsen()

    def place(self, square: Square) -> Square:
        """What a square of the cut belongs to by now."""
        return square[0] >> self.level, square[1] >> self.level

    def add_heights(self, square: Square, map_m: Floats, reference_m: Floats) -> None:
        """Count the cells of one square, (cell,) both known."""
        place = self.place(square)
        self.heights.add(place, HeightSums.of(map_m, reference_m))
        for counts, threshold_m in zip(self.cover, COVER_M, strict=True):
            counts.add(place, CoverCounts.of(map_m, reference_m, threshold_m))
        self._add_residuals(map_m, reference_m)
        self._add_scatter(map_m, reference_m)

    def add_group(self, key: Key, square: Square, map_m: Floats, reference_m: Floats) -> None:
        """Count the cells of one square that are in a group."""
        self.groups.setdefault(key, BySquare()).add(self.place(square), HeightSums.of(map_m, reference_m))

    def add_surfaces(self, square: Square, map_m: Floats, reference_m: Floats, first: tuple[int, int]) -> None:
        """Count blocks and edges of one square.

        Args:
            square: Which.
            map_m: (row, col) of the square and one cell around it, NaN where not to be counted.
            reference_m: The same of the reference.
            first: Row and column, from the cells' origin, of the square's first cell.
        """
        place = self.place(square)
        inside = np.zeros(map_m.shape, bool)
        inside[1:-1, 1:-1] = True
        edges = EdgeSums.of(map_m, reference_m, gsd_m=self.cut.gsd_m, counted=inside)
        if edges.n:
            self.edges.add(place, edges)
        if not self.cut.block_px:
            return
        blocks = BlockSums.of(
            map_m[1:-1, 1:-1], reference_m[1:-1, 1:-1],
            block_m=self.cut.block_px * self.cut.gsd_m, gsd_m=self.cut.gsd_m, row0=first[0], col0=first[1],
        )  # fmt: skip
        heights = blocks.heights()
        if heights.n:
            self.blocks.add(place, heights)
        self._add_worst(blocks)

    def add_means(  # noqa: PLR0917 - the three surfaces go together
        self, square: Square, map_m: Floats, half_m: Floats, reference_m: Floats, first: tuple[int, int], table: BlockTable
    ) -> None:  # fmt: skip
        """Count whether intervals of means hold the blocks of one square.

        Args:
            square: Which.
            map_m: (row, col) of the square, NaN where not to be counted.
            half_m: Half-widths of the intervals of its cells.
            reference_m: The same of the reference.
            first: Row and column, from the cells' origin, of the square's first cell.
            table: What turns the mean half-width of a block into the interval of its mean.
        """
        if not self.cut.block_px:
            return
        cut = {"block_m": self.cut.block_px * self.cut.gsd_m, "gsd_m": self.cut.gsd_m}
        given = np.isfinite(half_m)
        means, halves = (
            BlockSums.of(values, reference_m, given, **cut, row0=first[0], col0=first[1]) for values in (map_m, half_m)
        )
        enough = means.enough()
        n = means.n[enough]
        lower_m, upper_m = mean_interval(
            means.prediction_sum_m[enough] / n, halves.prediction_sum_m[enough] / n, n * self.cut.gsd_m**2, table
        )
        held = IntervalSums.of(lower_m, upper_m, means.reference_sum_m[enough] / n)
        if held.n:
            self.block_intervals.add(self.place(square), held)

    def add_intervals(self, square: Square, bounds_m: tuple[Floats, Floats], map_m: Floats, reference_m: Floats) -> None:
        """Count the intervals of one square's cells, (cell,), NaN where the map gives none."""
        (lower_m, upper_m), edges_m, place = bounds_m, self.edges_m, self.place(square)
        self.intervals.add(place, IntervalSums.of(lower_m, upper_m, reference_m))
        half_m, middle_m = (upper_m - lower_m) / 2, (upper_m + lower_m) / 2
        given = np.isfinite(half_m)
        stated = class_index(half_m, STATED_EDGES_M)
        for name, index, count in (
            ("predicted", class_index(map_m, edges_m), len(edges_m) + 1),
            ("height", class_index(reference_m, edges_m), len(edges_m) + 1),
            ("stated", np.where(given, stated, -1), len(STATED_EDGES_M) + 1),
        ):
            for k in np.unique(index):
                if 0 <= k < count:
                    here = index == k
                    sums = IntervalSums.of(lower_m[here], upper_m[here], reference_m[here])
                    self.group_intervals.setdefault((name, int(k)), BySquare()).add(place, sums)
        if given.any():
            self.stated_sum_m += np.bincount(stated[given], weights=half_m[given], minlength=len(self.stated_sum_m))
            self.observed.add(stated[given], np.abs(reference_m - middle_m)[given])

    def add_group_intervals(self, key: Key, square: Square, lower_m: Floats, upper_m: Floats, reference_m: Floats) -> None:
        """Count the intervals of the cells of one square that are in a group."""
        self.group_intervals.setdefault(key, BySquare()).add(
            self.place(square), IntervalSums.of(lower_m, upper_m, reference_m)
        )

    def _add_residuals(self, map_m: Floats, reference_m: Floats) -> None:
        index = np.clip(np.floor(reference_m / RESIDUAL_CLASS_M), 0, _CLASSES - 1).astype(np.intp)
        error_m = map_m - reference_m
        self.residuals.add(index, error_m)
        self.residual_sum_m += np.bincount(index, weights=error_m, minlength=_CLASSES)

    def _add_scatter(self, map_m: Floats, reference_m: Floats) -> None:
        row, col = (np.floor(values / SCATTER_STEP_M).astype(np.intp) for values in (reference_m, map_m))
        inside = (row >= 0) & (row < _BINS) & (col >= 0) & (col < _BINS)
        self.outside += int(inside.size - inside.sum())
        flat = row[inside] * _BINS + col[inside]
        self.scatter += np.bincount(flat, minlength=self.scatter.size).reshape(self.scatter.shape)

    def _add_worst(self, blocks: BlockSums) -> None:
        enough = blocks.enough()
        n = blocks.n[enough]
        map_m, reference_m = blocks.prediction_sum_m[enough] / n, blocks.reference_sum_m[enough] / n
        for (row, col), count, one, other in zip(blocks.block[enough].tolist(), n.tolist(), map_m, reference_m, strict=True):
            off_m = abs(float(one - other))
            spot = Spot(off_m=off_m, row=row, col=col, n=count, map_mean_m=float(one), reference_mean_m=float(other))
            if len(self.worst) < WORST:
                heapq.heappush(self.worst, spot)
            else:
                heapq.heappushpop(self.worst, spot)

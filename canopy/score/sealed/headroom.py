"""The score: how much of what the base model leaves to be gained a submission gains, each region and height class alike.

For every cell, a class of reference height in a region, with MAE e of the submission, b of the base model and a floor f:

    headroom = (b - e) / (b - f)

0 is the base model, 1 an error that cannot be told from a perfect map's. It is clipped to [-1, 1]: above 1 a number would
reward noise, and one cell that went wrong must not outweigh all others. A region's score is the mean over its cells, the
score the mean over regions; so neither the largest site nor the commonest class decides. Cells with few pixels, or where
base and floor are less than `LEAST_HEADROOM_M` apart, have no part in it and are listed.

The floor is measured, not assumed: label and image are placed against each other only so well. If a perfect map lies by u
metres off its label, with u uniform up to the jitter d, its expected MAE is, as long as it grows linearly with u, half of
that of the label against itself moved by d. The floor is this half, averaged over the four directions; a jitter of 0 makes
it 0. With half a metre it is 0.1 to 1.1 m in the classes of real sites, where models err by 2 to 5 m. When in doubt take
less: a floor that is too low puts a headroom of 1 out of reach, one that is too high rewards noise.

A pixel without a prediction counts with the base model's: leaving hard pixels out gains nothing that predicting them as the
base does would not gain. Pixels where the base model itself abstains are not scored, whoever is judged.

The interval is the percentile interval of a bootstrap over squares of ground, drawn within each region. The base model's
and the submission's errors come from the same squares in each draw.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from canopy.metrics import ClassSums, HeightSums, block_bootstrap, by_class

LEAST_HEADROOM_M = 0.05
"""Base and floor nearer than this leave nothing to be measured."""

LOW, HIGH = -1.0, 1.0
"""Clipping of a cell's headroom."""

Square = tuple[str, int, int]
"""CRS, row and column of a square of ground."""


@dataclass(slots=True, kw_only=True)
class RegionSums:
    """Sums of one region by squares of ground."""

    edges_m: tuple[float, ...]
    submission: dict[Square, ClassSums] = field(default_factory=dict)
    base: dict[Square, ClassSums] = field(default_factory=dict)
    missing: int = 0
    """Scored pixels without a prediction; they count with the base model's."""

    def add(
        self,
        prediction_m: NDArray[np.float32],
        base_m: NDArray[np.float32],
        reference_m: NDArray[np.float32],
        *,
        first_px: tuple[int, int],
        side_px: int,
        place: str,
    ) -> None:
        """Add a chip.

        Args:
            prediction_m: (row, col), NaN = no prediction.
            base_m: (row, col) of the base model.
            reference_m: (row, col), NaN = not scored.
            first_px: Row and column of the first pixel on the lattice.
            side_px: Side of a square of ground.
            place: Lattice: squares of two places are never the same.
        """
        scored = ~np.isnan(reference_m)
        absent = scored & np.isnan(prediction_m)
        self.missing += int(absent.sum())
        filled = np.where(absent, base_m, prediction_m)
        rows, cols = ((np.arange(n) + first) // side_px for n, first in zip(scored.shape, first_px, strict=True))
        for row in np.unique(rows):
            for col in np.unique(cols):
                part = np.ix_(rows == row, cols == col)
                if not scored[part].any():
                    continue
                square = (place, int(row), int(col))
                for sums, heights in ((self.submission, filled), (self.base, base_m)):
                    found = by_class(heights[part], reference_m[part], self.edges_m)
                    sums[square] = sums.get(square, ClassSums.zero(self.edges_m)) + found


@dataclass(frozen=True, slots=True, kw_only=True)
class Cell:
    """A class of reference height in a region."""

    region: str
    height_class: str
    floor_m: float | None
    base: HeightSums
    submission: HeightSums
    left_out: str | None
    """Why it has no part in the score; None: it has."""

    @property
    def raw(self) -> float:
        """Headroom before clipping."""
        assert self.floor_m is not None, "a cell without a floor has no headroom"
        return (self.base.mae_m - self.submission.mae_m) / (self.base.mae_m - self.floor_m)

    @property
    def headroom(self) -> float:
        """Headroom, clipped."""
        return min(max(self.raw, LOW), HIGH)


@dataclass(frozen=True, slots=True, kw_only=True)
class Headroom:
    """A score with all that it is made of."""

    value: float
    interval_95: tuple[float, float] | None
    no_interval: str | None
    """Why there is no interval."""
    unclipped: float
    regions: Mapping[str, float]
    cells: tuple[Cell, ...]
    missing: int


def floor_sums(
    reference_m: NDArray[np.float32], scored: NDArray[np.bool_], *, jitter_m: float, gsd_m: float, edges_m: Sequence[float]
) -> ClassSums:
    """Sums of a label against itself moved by the jitter in four directions, over the scored pixels of one chip.

    Args:
        reference_m: (row, col) known heights, NaN = unknown.
        scored: (row, col) pixels that are scored.
        jitter_m: Distance. The label is moved by whole pixels, at least one, and the difference brought to this distance.
        gsd_m: Side of a pixel.
        edges_m: Edges of the classes.
    """
    step = max(1, round(jitter_m / gsd_m))
    share = np.float32(jitter_m / (step * gsd_m))
    total = ClassSums.zero(edges_m)
    padded = np.pad(reference_m, step, constant_values=np.nan)
    rows, cols = reference_m.shape
    for down, right in ((0, 1), (2, 1), (1, 0), (1, 2)):
        moved = padded[down * step : down * step + rows, right * step : right * step + cols]
        total += by_class(reference_m + share * (moved - reference_m), reference_m, edges_m, scored)
    return total


def floors(sums: ClassSums) -> tuple[float | None, ...]:
    """Half the MAE of each class; None where nothing was measured."""
    return tuple(None if math.isnan(each.mae_m) else each.mae_m / 2 for each in sums.classes)


def headroom(
    regions: Mapping[str, RegionSums],
    floor_m: Mapping[str, Sequence[float | None]],
    *,
    least_px: int,
    generator: np.random.Generator,
    resamples: int = 2000,
) -> Headroom | None:
    """The score; None when no cell can be scored.

    Args:
        regions: Sums by region.
        floor_m: Floors by region and class.
        least_px: Cells with fewer pixels are left out.
        generator: Draws the squares.
        resamples: How many times.
    """
    cells = [cell for name, sums in regions.items() for cell in _cells(name, sums, floor_m[name], least_px)]
    counted = [cell for cell in cells if cell.left_out is None]
    if not counted:
        return None
    names = list(dict.fromkeys(cell.region for cell in counted))
    by_region = {name: [cell for cell in counted if cell.region == name] for name in names}
    draws, reason = [], None
    for name, own in by_region.items():
        if len(regions[name].base) < 2:
            reason = f"{name} has a single square of ground"
            break
        draws.append(_drawn(regions[name], own, generator, resamples))
    interval = None
    if reason is None:
        low, high = np.nanquantile(_mean(draws), [0.025, 0.975])
        interval = (float(low), float(high))
    values = {name: float(np.mean([cell.headroom for cell in own])) for name, own in by_region.items()}
    return Headroom(
        value=float(np.mean([*values.values()])),
        interval_95=interval,
        no_interval=reason,
        unclipped=float(np.mean([np.mean([cell.raw for cell in own]) for own in by_region.values()])),
        regions=values,
        cells=tuple(cells),
        missing=sum(sums.missing for sums in regions.values()),
    )


def _cells(region: str, sums: RegionSums, floor_m: Sequence[float | None], least_px: int) -> Iterable[Cell]:
    zero = ClassSums.zero(sums.edges_m)
    base, submission = (sum(each.values(), zero) for each in (sums.base, sums.submission))
    for label, own, others, floor in zip(zero.labels, base.classes, submission.classes, floor_m, strict=True):
        reason = None
        if own.n < least_px:
            reason = f"{own.n} pixels, fewer than {least_px}"
        elif floor is None:
            reason = "its floor could not be measured"
        elif own.mae_m - floor < LEAST_HEADROOM_M:
            reason = (
                f"the base model's MAE of {own.mae_m:.2f} m is within {LEAST_HEADROOM_M:g} m of the floor, {floor:.2f} m"
            )
        yield Cell(region=region, height_class=label, floor_m=floor, base=own, submission=others, left_out=reason)


def _drawn(sums: RegionSums, cells: Sequence[Cell], generator: np.random.Generator, resamples: int) -> NDArray[np.float64]:
    """(resample,) the region's score; a class that a draw does not hold has no part in that draw."""
    squares = sorted(sums.base)
    labels = ClassSums.zero(sums.edges_m).labels
    picked = [labels.index(cell.height_class) for cell in cells]
    sets = [[each[square].classes[k] for square in squares] for k in picked for each in (sums.base, sums.submission)]
    drawn = [each.values["mae_m"] for each in block_bootstrap(*sets, generator=generator, resamples=resamples)]
    parts = []
    for cell, base, submission in zip(cells, drawn[::2], drawn[1::2], strict=True):
        assert cell.floor_m is not None, "cells that count have a floor"
        # The base's error of a draw may come near the floor; the distance that a cell needs to count holds here too.
        parts.append(((base - submission) / np.maximum(base - cell.floor_m, LEAST_HEADROOM_M)).clip(LOW, HIGH))
    return _mean(parts)


def _mean(parts: Sequence[NDArray[np.float64]]) -> NDArray[np.float64]:
    """Mean over what a draw has; NaN where it has nothing."""
    table = np.stack(parts)
    known = ~np.isnan(table)
    count = known.sum(axis=0)
    total = np.where(known, table, 0).sum(axis=0)
    mean: NDArray[np.float64] = np.divide(total, count, out=np.full(total.shape, np.nan), where=count > 0)
    return mean

"""From what was counted to what is said: measures with their intervals, classes, curves and the differences of maps."""

from __future__ import annotations

import math
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TypeVar

import numpy as np

from canopy.metrics import (
    RESAMPLES,
    ClassSums,
    CoverCounts,
    EdgeSums,
    HeightSums,
    IntervalSums,
    Resampled,
    block_bootstrap,
    resample_sums,
)
from canopy.score.result import (
    BlockMeasures,
    Coverage,
    CoverMeasures,
    Difference,
    EdgeMeasures,
    Estimate,
    Group,
    Intervals,
    Measures,
    Residuals,
    Scatter,
    StatedError,
)
from canopy.score.sums import (
    COVER_M,
    RESIDUAL_CLASS_M,
    SCATTER_STEP_M,
    STATED_EDGES_M,
    BySquare,
    Key,
    MapSums,
)

S = TypeVar("S", IntervalSums, CoverCounts, EdgeSums)

HEIGHTS = ("mae_m", "rmse_m", "bias_m", "r2", "nmae", "reference_mean_m", "prediction_mean_m")


@dataclass(frozen=True, slots=True, kw_only=True)
class Draws:
    """Where the resamples of a result come from: each set of cells has draws of its own, whatever other sets there are."""

    seed: int
    resamples: int = RESAMPLES

    def of(self, *what: str | int) -> np.random.Generator:
        """The generator for one set of cells, the same for all maps, whose differences are then paired."""
        return np.random.default_rng([self.seed, zlib.crc32(repr(what).encode())])


def known(value: float) -> float | None:
    """A measure, None where it does not exist."""
    return float(value) if math.isfinite(value) else None


def estimate(value: float, resampled: Resampled | None, name: str) -> Estimate:
    """A measure with its interval."""
    if resampled is None or known(value) is None:
        return Estimate(value=known(value))
    low, high = resampled.interval(name)
    return Estimate(value=float(value), interval_95=(low, high) if math.isfinite(low) and math.isfinite(high) else None)


# --- heights ---------------------------------------------------------------------------------------------------------------


def measures_of(
    sets: Sequence[Sequence[HeightSums]], draws: Draws, *what: str | int, with_r2: bool = True
) -> tuple[list[Measures], tuple[Resampled, ...]]:
    """The measures of several maps on the same cells, and their resamples, which are pairs.

    Args:
        sets: Of each map the sums of the same squares of ground in the same order.
        draws: Where the resamples come from.
        what: Which cells they are.
        with_r2: Whether R² means anything for them.
    """
    if not sets[0]:
        empty = Estimate(value=None)
        nothing = Measures(n=0, squares=0, **dict.fromkeys(HEIGHTS, empty))
        return [nothing] * len(sets), ()
    resampled = block_bootstrap(*sets, generator=draws.of(*what), resamples=draws.resamples)
    found = []
    for blocks, again in zip(sets, resampled, strict=True):
        total = sum(blocks, HeightSums())
        values = {name: estimate(getattr(total, name), again, name) for name in HEIGHTS}
        if not with_r2:
            values["r2"] = Estimate(value=None)
        found.append(Measures(n=total.n, squares=len(blocks), **values))
    return found, resampled


def difference_of(
    first: tuple[str, Measures, Resampled], other: tuple[str, Measures, Resampled]
) -> Difference:  # fmt: skip
    """The first map minus the other, resample by resample."""
    (name, mine, my_draws), (other_name, its, its_draws) = first, other
    both = my_draws - its_draws
    values = {}
    for measure in ("mae_m", "rmse_m", "r2", "bias_m"):
        one, two = getattr(mine, measure).value, getattr(its, measure).value
        values[measure] = estimate(math.nan if one is None or two is None else one - two, both, measure)
    return Difference(first=name, other=other_name, **values)


def blocks_of(sums: MapSums, draws: Draws, *what: str | int) -> BlockMeasures | None:
    """Means over blocks of ground; None where cells are larger."""
    if not sums.cut.block_px:
        return None
    squares = sums.blocks.values()
    (resampled,) = block_bootstrap(squares, generator=draws.of(*what), resamples=draws.resamples) if squares else (None,)
    total = sum(squares, HeightSums())
    return BlockMeasures(
        side_m=sums.cut.block_px * sums.cut.gsd_m,
        n=total.n,
        r2=estimate(total.r2, resampled, "r2"),
        rmse_m=estimate(total.rmse_m, resampled, "rmse_m"),
        mae_m=estimate(total.mae_m, resampled, "mae_m"),
        coverage=coverage_of("blocks", sums.block_intervals, draws, *what) if len(sums.block_intervals) else None,
    )


# --- the other sums --------------------------------------------------------------------------------------------------------


def _resampled(squares: Sequence[S], names: Sequence[str], draws: Draws, *what: str | int) -> Resampled | None:
    if not squares:
        return None
    (found,) = resample_sums(squares, measures=names, generator=draws.of(*what), resamples=draws.resamples)
    return found


def edges_of(sums: MapSums, draws: Draws, *what: str | int) -> EdgeMeasures:
    """Steepness of the map's surface against the reference's."""
    squares = sums.edges.values()
    total = sum(squares, EdgeSums())
    resampled = _resampled(squares, ("error", "bias", "reference_mean"), draws, *what)
    return EdgeMeasures(
        n=total.n,
        error=estimate(total.error, resampled, "error"),
        bias=estimate(total.bias, resampled, "bias"),
        reference_mean=estimate(total.reference_mean, resampled, "reference_mean"),
    )


def cover_of(sums: MapSums, draws: Draws, *what: str | int) -> tuple[CoverMeasures, ...]:
    """Tree cover at each threshold."""
    found = []
    for counts, threshold_m in zip(sums.cover, COVER_M, strict=True):
        squares = counts.values()
        total = sum(squares, CoverCounts(threshold_m=threshold_m))
        resampled = _resampled(squares, ("iou",), draws, *what, "cover", round(100 * threshold_m))
        found.append(
            CoverMeasures(
                threshold_m=threshold_m, n_both=total.n_both, n_map_only=total.n_prediction_only,
                n_reference_only=total.n_reference_only, n_neither=total.n_neither,
                iou=estimate(total.iou, resampled, "iou"),
            )
        )  # fmt: skip
    return tuple(found)


def coverage_of(label: str, intervals: BySquare[IntervalSums] | None, draws: Draws, *what: str | int) -> Coverage:
    """What intervals held of some cells."""
    squares = [] if intervals is None else intervals.values()
    total = sum(squares, IntervalSums())
    resampled = _resampled(squares, ("coverage", "mean_width_m"), draws, *what, "coverage")
    return Coverage(
        label=label, n=total.n, n_below=total.n_below, n_above=total.n_above,
        coverage=estimate(total.coverage, resampled, "coverage"),
        mean_width_m=estimate(total.mean_width_m, resampled, "mean_width_m"),
    )  # fmt: skip


def intervals_of(sums: MapSums, how: str, draws: Draws, *what: str | int) -> Intervals:
    """The map's intervals against the reference."""
    labels = ClassSums.zero(sums.edges_m).labels
    by_class = {
        name: tuple(
            coverage_of(label, sums.group_intervals.get((name, k)), draws, *what, name, k) for k, label in enumerate(labels)
        )
        for name in ("predicted", "height")
    }
    stated = []
    for k, label in enumerate(ClassSums.zero(STATED_EDGES_M).labels):
        held = coverage_of(label, sums.group_intervals.get(("stated", k)), draws, *what, "stated", k)
        stated.append(
            StatedError(
                label=label, n=held.n, stated_m=known(sums.stated_sum_m[k] / held.n) if held.n else None,
                observed_m=known(sums.observed.quantile(k, 0.9)), coverage=held.coverage,
            )
        )  # fmt: skip
    return Intervals(
        how=how,
        n_missing=sums.intervals.total(IntervalSums()).n_missing,
        overall=coverage_of("all", sums.intervals, draws, *what),
        by_predicted_height=by_class["predicted"],
        by_reference_height=by_class["height"],
        by_stated_error=tuple(stated),
    )


# --- groups ----------------------------------------------------------------------------------------------------------------


def groups_of(
    maps: Sequence[MapSums], keys: Sequence[tuple[Key, str]], missing: dict[Key, int], has: Sequence[bool], draws: Draws
) -> list[tuple[Group, ...]]:
    """Classes or polygons, for each map.

    Args:
        maps: The sums of the maps on the same cells.
        keys: The groups and what to call them.
        missing: By group, cells that some map lacks.
        has: Of each map whether it has intervals.
        draws: Where the resamples come from.
    """
    found: list[list[Group]] = [[] for _ in maps]
    for key, label in keys:
        sets = [sums.groups[key].values() if key in sums.groups else [] for sums in maps]
        measures, _ = measures_of(sets, draws, *key, with_r2=key[0] != "height")
        for groups, sums, one, intervals in zip(found, maps, measures, has, strict=True):
            held = coverage_of(label, sums.group_intervals.get(key), draws, *key) if intervals else None
            groups.append(Group(label=label, n_missing=missing.get(key, 0), measures=one, coverage=held))
    return [tuple(groups) for groups in found]


# --- curves ----------------------------------------------------------------------------------------------------------------


def scatter_of(sums: MapSums) -> Scatter:
    """How many cells have which pair of heights, up to the greatest there is."""
    filled = [np.flatnonzero(sums.scatter.any(axis=axis)) for axis in (1, 0)]
    rows, cols = (int(at[-1]) + 1 if at.size else 1 for at in filled)
    edges = [tuple(float(k * SCATTER_STEP_M) for k in range(n + 1)) for n in (rows, cols)]
    counts = tuple(tuple(row) for row in sums.scatter[:rows, :cols].tolist())
    return Scatter(reference_edges_m=edges[0], map_edges_m=edges[1], counts=counts, n_outside=sums.outside)


def residuals_of(sums: MapSums) -> tuple[Residuals, ...]:
    """Quantiles of the error by class of reference height."""
    found = []
    n = sums.residuals.counts.sum(axis=1)
    ends = [*(k * RESIDUAL_CLASS_M for k in range(len(n) + 1))]
    for k, (low, high) in enumerate(pairwise(ends)):
        if n[k]:
            quantiles = {f"q{share:02d}_m": sums.residuals.quantile(k, share / 100) for share in (5, 25, 50, 75, 95)}
            found.append(
                Residuals(low_m=low, high_m=high, n=int(n[k]), mean_m=float(sums.residual_sum_m[k] / n[k]), **quantiles)
            )
    return tuple(found)

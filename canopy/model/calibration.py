"""From the spread of the predicted distribution to an interval that holds the true height as often as it says.

Split-conformal prediction (Vovk et al. 2005; Lei et al. 2018) on pixels that training never saw. For a pixel with
predicted height m, spread s and true height y the two non-conformity scores are (m - y)/s and (y - m)/s. In each class
of *predicted* height (the true one is unknown where a map is made) their quantiles say how many spreads to go down and up,
so that the interval holds 90 %. How the misses are dealt to the two sides is chosen in each class so that the intervals are
narrowest, but neither side gets more than three quarters of them: errors are lopsided, and equal tails would pay for it.

What is promised and what is not: the guarantee is about pixels exchangeable with the calibration pixels. A new site is
not exchangeable pixel by pixel, so coverage there is a measurement, taken by leaving sites out in turn, never a promise.
NumPy only. All arrays of one call are one-dimensional and of one length, in metres.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal, Self

import numpy as np
from numpy.typing import ArrayLike, NDArray
from pydantic import BaseModel, ConfigDict, Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, model_validator

from canopy.errors import RecipeError
from canopy.metrics import CLASS_EDGES_M, IntervalSums, class_index

_FROZEN = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

LEAST_PX = 2000
"""A class with fewer calibration pixels than this is merged with a neighbour: neighbouring pixels are alike, and a few
crowns are not a sample of a tail of 5 %."""

SPREAD_FLOOR_M = 0.25
"""Spreads below it count as it: on open ground the spread goes to 0 m and a score divided by it to infinity."""


LEAST_TAIL = 0.25
"""Least share of the misses on either side of the intervals of a class: of 10 %, at least 2.5 % and at most 7.5 %. The very
narrowest intervals would miss only above where the map is low, where one reads the upper end for trees that were missed."""

TAIL_STEPS = 11
"""Splits of the misses that are tried."""


How = Literal["other held-out chips", "sites left out in turn"]
"""Either chips that the table was not fitted on, or each site by a table fitted on the other sites."""


class MeasuredCoverage(BaseModel):
    """What the intervals held on pixels that had no part in making them."""

    model_config = _FROZEN

    how: How
    sites: tuple[str, ...] = Field(min_length=1)
    pixels: tuple[NonNegativeInt, ...]
    """Per class of the table: pixels looked at."""
    inside: tuple[NonNegativeInt, ...]
    """Per class of the table: those whose true height the interval held."""

    @classmethod
    def of(cls, how: How, sites: Iterable[str], sums: Sequence[IntervalSums]) -> Self:
        """From the sums of each class."""
        return cls(
            how=how,
            sites=tuple(sites),
            pixels=tuple(s.n for s in sums),
            inside=tuple(s.n - s.n_below - s.n_above for s in sums),
        )

    @property
    def overall(self) -> float:
        """Share of true heights held, NaN without pixels."""
        return sum(self.inside) / sum(self.pixels) if sum(self.pixels) else float("nan")

    @property
    def by_class(self) -> tuple[float, ...]:
        """The same per class."""
        return tuple(i / n if n else float("nan") for i, n in zip(self.inside, self.pixels, strict=True))


class CalibrationTable(BaseModel):
    """How many spreads below and above the predicted height the interval reaches, by class of predicted height."""

    model_config = _FROZEN

    edges_m: tuple[float, ...]
    """Lower edge of each class of predicted height, ascending from 0; the last class has no upper edge."""
    lower_factor: tuple[NonNegativeFloat, ...]
    """Per class: spreads from the predicted height down to the lower end."""
    upper_factor: tuple[NonNegativeFloat, ...]
    """Per class: spreads from the predicted height up to the upper end."""
    pixels: tuple[NonNegativeInt, ...]
    """Per class: calibration pixels."""
    sites: tuple[str, ...] = Field(min_length=1)
    """Sites of the calibration pixels, each with the same total weight."""
    nominal: float = Field(default=0.9, gt=0, lt=1)
    """Share of true heights the interval is made to hold."""
    spread_floor_m: PositiveFloat = SPREAD_FLOOR_M
    """Spreads below it count as it."""
    measured: tuple[MeasuredCoverage, ...] = ()
    """Coverage in the ways it could be measured; empty when nothing was held out to measure it on. Never in-sample."""

    @model_validator(mode="after")
    def _consistent(self) -> CalibrationTable:
        for name in ("lower_factor", "upper_factor", "pixels"):
            if len(getattr(self, name)) != len(self.edges_m):
                raise ValueError(f"{name} has {len(getattr(self, name))} entries for {len(self.edges_m)} classes of edges_m")
        if not self.edges_m or self.edges_m[0] != 0 or any(a >= b for a, b in pairwise(self.edges_m)):
            raise ValueError(f"edges_m {self.edges_m} do not ascend from 0")
        if any({len(m.pixels), len(m.inside)} != {len(self.edges_m)} for m in self.measured):
            raise ValueError(f"measured coverage does not have the {len(self.edges_m)} classes of edges_m")
        return self


def interval(
    mean_m: ArrayLike, spread_m: ArrayLike, table: CalibrationTable
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """The ends (lower_m, upper_m) of the interval, float32, for arrays of any one shape; NaN where mean or spread is.

    The lower end is not below 0 m, where no height is, so cutting it there loses no coverage.
    """
    mean = np.asarray(mean_m, dtype=np.float32)
    spread = np.maximum(np.asarray(spread_m, dtype=np.float32), np.float32(table.spread_floor_m))
    index = class_index(mean, table.edges_m[1:])
    lower = mean - np.asarray(table.lower_factor, dtype=np.float32)[index] * spread
    upper = mean + np.asarray(table.upper_factor, dtype=np.float32)[index] * spread
    return np.maximum(lower, np.minimum(mean, np.float32(0.0))), upper


def conformal_quantile(score: NDArray[np.float64], weight: NDArray[np.float64], level: float) -> float:
    """The smallest score that holds the share `level` of the weight, counting one more pixel of average weight above all.

    With equal weights this is the ceil((n + 1) level)-th smallest of n scores, the finite-sample correction of split
    conformal prediction; infinite where n is too small for the level.
    """
    order = np.argsort(score, kind="stable")
    reached = np.cumsum(weight[order])
    total = reached[-1]
    # A rounding error of the sum must not push the answer to the next score.
    wanted = level * (total + total / score.size) * (1 - 1e-12)
    at = int(np.searchsorted(reached, wanted, side="left"))
    return float(score[order[at]]) if at < score.size else float("inf")


def _merged_edges(edges_m: Sequence[float], mean_m: NDArray[np.float64], least_px: int) -> tuple[float, ...]:
    """The edges left when each class of too few pixels has joined the class below it, the lowest the one above."""
    edges = list(edges_m)
    counts = np.bincount(class_index(mean_m, edges), minlength=len(edges) + 1).tolist()
    while edges and min(counts) < least_px:
        small = max(k for k, n in enumerate(counts) if n < least_px)
        low = max(small - 1, 0)  # the lower of the two classes that become one
        counts[low : low + 2] = [counts[low] + counts[low + 1]]
        del edges[low]
    return tuple(edges)


def fit_calibration(
    mean_m: ArrayLike,
    spread_m: ArrayLike,
    true_m: ArrayLike,
    site: Sequence[str] | NDArray[np.str_],
    edges: Sequence[float] = CLASS_EDGES_M,
    *,
    nominal: float = 0.9,
    least_px: int = LEAST_PX,
    spread_floor_m: float = SPREAD_FLOOR_M,
    least_tail: float = LEAST_TAIL,
) -> CalibrationTable:
    """Fit the table on held-out pixels; every site has the same weight, however many pixels it has.

    Why equal sites: the table is for a site nobody has seen, and one large acquisition would otherwise speak for all.

    Args:
        mean_m: predicted heights, finite.
        spread_m: predicted spreads, finite and not negative.
        true_m: true heights, finite.
        site: name of the site of each pixel.
        edges: inner edges of the classes of predicted height in metres; classes with few pixels are merged.
        nominal: share of true heights the interval is to hold.
        least_px: fewest pixels of a class.
        spread_floor_m: spreads below it count as it.
        least_tail: least share of the misses on either side; with 0.5 both get the same.

    Raises:
        RecipeError: fewer than `least_px` pixels in all.
    """
    mean, spread, true = (np.asarray(a, dtype=np.float64) for a in (mean_m, spread_m, true_m))
    names, which, counts = np.unique(np.asarray(site), return_inverse=True, return_counts=True)
    assert mean.shape == spread.shape == true.shape == which.shape, "mean, spread, true and site differ in shape"
    assert bool((np.isfinite(mean) & np.isfinite(spread) & np.isfinite(true)).all()), "calibration pixels must be finite"
    tail = 1 - least_tail * (1 - nominal)
    least_px = max(least_px, int(np.ceil(tail / (1 - tail))))
    if mean.size < least_px:
        raise RecipeError(
            f"{mean.size} held-out pixels are too few to calibrate, {least_px} are needed; hold out more blocks or sites"
        )
    weight = 1.0 / counts[which]
    spread = np.maximum(spread, spread_floor_m)
    merged = _merged_edges(edges, mean, least_px)
    index = class_index(mean, merged)
    lower, upper, n = [], [], []
    for k in range(len(merged) + 1):
        here = index == k
        parts = (a[here] for a in (mean, spread, true, weight))
        down, up = _narrowest(*parts, nominal=nominal, least_tail=least_tail)
        lower.append(down)
        upper.append(up)
        n.append(int(here.sum()))
    return CalibrationTable(
        nominal=nominal,
        edges_m=(0.0, *merged),
        lower_factor=tuple(lower),
        upper_factor=tuple(upper),
        pixels=tuple(n),
        spread_floor_m=spread_floor_m,
        sites=tuple(str(name) for name in names),
    )


def _narrowest(
    mean: NDArray[np.float64], spread: NDArray[np.float64], true: NDArray[np.float64], weight: NDArray[np.float64],
    *, nominal: float, least_tail: float,
) -> tuple[float, float]:  # fmt: skip
    """(lower, upper) factor of one class, with the split of the misses that makes its intervals narrowest.

    What the cut at 0 m saves below (no height is there to be missed) goes to the upper side. An end on the wrong side of the
    predicted height would leave the map's own value outside its interval, so factors are not negative.
    """
    score, misses = (mean - true) / spread, 1 - nominal
    best: tuple[float, float, float] | None = None
    for share in np.linspace(least_tail, 1 - least_tail, TAIL_STEPS if least_tail < 0.5 else 1):
        down = max(conformal_quantile(score, weight, 1 - float(share) * misses), 0.0)
        bottom = np.maximum(mean - down * spread, np.minimum(mean, 0.0))
        missed = float(weight[true < bottom].sum() / weight.sum())
        level = max(nominal + missed, 1 - (1 - least_tail) * misses)
        up = max(conformal_quantile(-score, weight, level), 0.0)
        width = float(np.average(mean + up * spread - bottom, weights=weight))
        if best is None or width < best[0]:
            best = width, down, up
    assert best is not None, "no split was tried"
    return best[1], best[2]


@dataclass(frozen=True, slots=True, kw_only=True)
class Coverage:
    """Intervals against true heights, by class of predicted height."""

    edges_m: tuple[float, ...]
    classes: tuple[IntervalSums, ...]

    @classmethod
    def zero(cls, edges_m: Sequence[float]) -> Self:
        """The empty set."""
        return cls(edges_m=tuple(edges_m), classes=(IntervalSums(),) * (len(edges_m) + 1))

    @property
    def total(self) -> IntervalSums:
        """The sums over all classes."""
        return sum(self.classes, IntervalSums())

    def __add__(self, other: Coverage) -> Coverage:
        assert self.edges_m == other.edges_m, f"classes with edges {self.edges_m} and {other.edges_m} do not add up"
        return Coverage(edges_m=self.edges_m, classes=tuple(a + b for a, b in zip(self.classes, other.classes, strict=True)))


def measure_coverage(
    table: CalibrationTable,
    mean_m: ArrayLike,
    spread_m: ArrayLike,
    true_m: ArrayLike,
    edges: Sequence[float] = CLASS_EDGES_M,
) -> Coverage:
    """What the table's intervals hold on these pixels; it is coverage only where they had no part in fitting the table."""
    lower, upper = interval(mean_m, spread_m, table)
    index = class_index(mean_m, edges)
    return Coverage(
        edges_m=tuple(edges),
        classes=tuple(IntervalSums.of(lower, upper, true_m, index == k) for k in range(len(edges) + 1)),
    )


def tables_without(
    mean_m: ArrayLike,
    spread_m: ArrayLike,
    true_m: ArrayLike,
    site: Sequence[str] | NDArray[np.str_],
    edges: Sequence[float] = CLASS_EDGES_M,
    *,
    nominal: float = 0.9,
    least_px: int = LEAST_PX,
    spread_floor_m: float = SPREAD_FLOOR_M,
) -> dict[str, CalibrationTable]:
    """By site, the table fitted on the other ones; without the sites whose others are too few pixels to fit.

    Arguments as in `fit_calibration`.
    """
    mean, spread, true = (np.asarray(a) for a in (mean_m, spread_m, true_m))
    sites = np.asarray(site)
    settings = {"nominal": nominal, "least_px": least_px, "spread_floor_m": spread_floor_m}
    tables = {}
    for name in np.unique(sites):
        other = sites != name
        if other.sum() >= least_px:
            tables[str(name)] = fit_calibration(
                mean[other], spread[other], true[other], sites[other], edges, **settings  # type: ignore[arg-type]
            )  # fmt: skip
    return tables


def cross_coverage(  # noqa: PLR0917 - the four arrays go together everywhere
    tables: Mapping[str, CalibrationTable],
    mean_m: ArrayLike,
    spread_m: ArrayLike,
    true_m: ArrayLike,
    site: Sequence[str] | NDArray[np.str_],
    edges: Sequence[float] = CLASS_EDGES_M,
) -> dict[str, Coverage]:
    """Coverage of each site by its table of `tables_without`, by classes of predicted height with inner `edges`."""
    mean, spread, true = (np.asarray(a) for a in (mean_m, spread_m, true_m))
    sites = np.asarray(site)
    return {
        name: measure_coverage(table, mean[own], spread[own], true[own], edges)
        for name, table in tables.items()
        for own in (sites == name,)
    }

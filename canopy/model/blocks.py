"""How wrong the mean height of a patch of ground is: less than its pixels, and more than independent pixels would be.

The error of a mean of n pixels is that of a pixel over sqrt(n) only where the pixels err independently, and neighbours do
not: whole stands come out too low together. So the error of means is not derived, it is measured: the calibration pixels are
averaged over squares of ground of several sides, and split-conformal quantiles say how large the error of such a mean is in
units of the mean half-width of its pixels' own intervals. That unit is in the published files (the mean of `error_90_m`
over the patch), so the table needs nothing else.

A polygon is treated as a square of its area. One that is not compact has neighbours further apart, which err less alike,
so the square's error is on the safe side. Nothing is extrapolated: below the smallest side that was measured, and above the
largest, the factor is that side's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import ArrayLike, NDArray
from pydantic import BaseModel, ConfigDict, Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, model_validator

from canopy.metrics import BlockSums, IntervalSums
from canopy.model.calibration import MeasuredCoverage, conformal_quantile

if TYPE_CHECKING:
    import pandas as pd

_FROZEN = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

SIDES_M = (10.0, 30.0, 60.0, 120.0)
"""Sides of the squares of ground that means are taken over: a tree's surroundings to a forest stand."""

LEAST_BLOCKS = 100
"""Fewest squares of a side to say anything about it: of fewer, not even five are in a tail of 5 %."""

LEAST_FRACTION = 0.5
"""Share of a square's pixels that must be known, as for block R²."""

HALF_WIDTH_FLOOR_M = 0.25
"""Mean half-widths below it count as it, as small spreads do."""


class BlockTable(BaseModel):
    """Of means over squares of ground: mean half-widths of their pixels that the 90 % interval goes down and up."""

    model_config = _FROZEN

    sides_m: tuple[PositiveFloat, ...] = Field(min_length=1)
    """Sides of the squares, ascending."""
    lower_factor: tuple[NonNegativeFloat, ...]
    """Per side: mean half-widths from the predicted mean down to the lower end."""
    upper_factor: tuple[NonNegativeFloat, ...]
    """Per side: the same up to the upper end."""
    blocks: tuple[NonNegativeInt, ...]
    """Per side: calibration squares."""
    sites: tuple[str, ...] = Field(min_length=1)
    """Sites of the squares, each with the same total weight."""
    nominal: float = Field(default=0.9, gt=0, lt=1)
    """Share of true means the interval is made to hold."""
    half_width_floor_m: PositiveFloat = HALF_WIDTH_FLOOR_M
    """Mean half-widths below it count as it."""
    measured: MeasuredCoverage | None = None
    """Coverage per side, each site by tables fitted on the others; None where there is only one site."""

    @model_validator(mode="after")
    def _consistent(self) -> BlockTable:
        for name in ("lower_factor", "upper_factor", "blocks"):
            if len(getattr(self, name)) != len(self.sides_m):
                raise ValueError(f"{name} has {len(getattr(self, name))} entries for {len(self.sides_m)} sides")
        if any(a >= b for a, b in pairwise(self.sides_m)):
            raise ValueError(f"sides_m {self.sides_m} do not ascend")
        if self.measured is not None and {len(self.measured.pixels), len(self.measured.inside)} != {len(self.sides_m)}:
            raise ValueError(f"measured coverage does not have the {len(self.sides_m)} sides")
        return self

    def factors(self, side_m: ArrayLike) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """(lower, upper) factor for squares of any side, between the measured ones linear in the logarithm of the side."""
        wanted, known = np.log(np.asarray(side_m, dtype=np.float64)), np.log(self.sides_m)
        return np.interp(wanted, known, self.lower_factor), np.interp(wanted, known, self.upper_factor)


def mean_interval(
    mean_m: ArrayLike, half_width_m: ArrayLike, area_m2: ArrayLike, table: BlockTable
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """The ends (lower_m, upper_m) of the interval of mean heights over patches of ground.

    Args:
        mean_m: Mean of the map's heights over each patch.
        half_width_m: Mean of its `error_90_m`, the half-widths of its pixels' intervals.
        area_m2: Known area of the patch, square metres.
        table: Fitted on the same model.

    Returns:
        Arrays of the given shape, NaN where an input is; the lower end is not below 0 m, where no height is.
    """
    mean = np.asarray(mean_m, dtype=np.float64)
    unit = np.maximum(np.asarray(half_width_m, dtype=np.float64), table.half_width_floor_m)
    down, up = table.factors(np.sqrt(np.asarray(area_m2, dtype=np.float64)))
    return np.maximum(mean - down * unit, np.minimum(mean, 0.0)), mean + up * unit


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockKey:
    """Ground that shares its squares: those of two lattices, or of two sites on one, are not the same."""

    site: str
    crs: str
    gsd_m: float


class BlockMeans:
    """Means over squares of ground, gathered from rasters that may cut the squares."""

    def __init__(self, sides_m: Sequence[float] = SIDES_M) -> None:
        self.sides_m = tuple(sides_m)
        self._parts: dict[float, list[pd.DataFrame]] = {side_m: [] for side_m in self.sides_m}

    def add(
        self,
        key: BlockKey,
        mean_m: NDArray[np.float32],
        half_width_m: NDArray[np.float32],
        true_m: NDArray[np.float32],
        counts: NDArray[np.bool_],
        *,
        row_px: int,
        col_px: int,
    ) -> None:
        """Take in a raster (row, col) whose first pixel is (row_px, col_px) of the lattice; only pixels that count do."""
        import pandas as pd  # takes half a second, and who only reads a table needs none

        known = counts & np.isfinite(mean_m) & np.isfinite(half_width_m) & np.isfinite(true_m)
        if not known.any():
            return
        for side_m, parts in self._parts.items():
            if round(side_m / key.gsd_m) < 2:
                continue  # squares of a pixel are the pixel table's
            heights = BlockSums.of(mean_m, true_m, known, block_m=side_m, gsd_m=key.gsd_m, row0=row_px, col0=col_px)
            widths = BlockSums.of(half_width_m, true_m, known, block_m=side_m, gsd_m=key.gsd_m, row0=row_px, col0=col_px)
            parts.append(
                pd.DataFrame({
                    "site": key.site, "crs": key.crs, "whole_px": heights.side_px**2, "gsd_m": key.gsd_m,
                    "row": heights.block[:, 0], "col": heights.block[:, 1], "n": heights.n,
                    "mean": heights.prediction_sum_m, "true": heights.reference_sum_m, "half": widths.prediction_sum_m,
                })
            )  # fmt: skip

    @property
    def sites(self) -> set[str]:
        """Those that pixels were taken of."""
        return {str(part["site"].iloc[0]) for parts in self._parts.values() for part in parts}

    def without(self, site: str) -> BlockMeans:
        """The squares of the other sites."""
        return self._where(lambda name: name != site)

    def only(self, site: str) -> BlockMeans:
        """The squares of one site."""
        return self._where(lambda name: name == site)

    def _where(self, wanted: Callable[[str], bool]) -> BlockMeans:
        chosen = BlockMeans(self.sides_m)
        for side_m, parts in self._parts.items():
            chosen._parts[side_m] = [part for part in parts if wanted(str(part["site"].iloc[0]))]
        return chosen

    def table(self, side_m: float) -> pd.DataFrame:
        """Squares of a side of which enough is known: site and means `mean_m`, `true_m`, `half_width_m`, one row each."""
        import pandas as pd

        parts = self._parts[side_m]
        columns = ["site", "mean_m", "true_m", "half_width_m"]
        if not parts:
            return pd.DataFrame({name: [] for name in columns})
        keys = ["site", "crs", "gsd_m", "whole_px", "row", "col"]
        sums = pd.concat(parts).groupby(keys, sort=True)[["n", "mean", "true", "half"]].sum().reset_index()
        sums = sums[sums["n"] >= LEAST_FRACTION * sums["whole_px"]]
        means = sums[["mean", "true", "half"]].div(sums["n"], axis=0)
        means.columns = pd.Index(columns[1:])
        return means.assign(site=sums["site"])[columns].reset_index(drop=True)


def fit_blocks(
    means: BlockMeans, *, nominal: float = 0.9, half_width_floor_m: float = HALF_WIDTH_FLOOR_M
) -> BlockTable | None:
    """Fit the table, every site with the same weight; None where no side has `LEAST_BLOCKS` squares.

    A side that some site is too small for is left out: what is known of it is of other sites than of the smaller sides,
    and easy sites alone would make means over large areas look better than they are.

    The scores of a square are (mean - true)/half and (true - mean)/half with the mean half-width of its pixels; their
    (1 + nominal)/2 quantiles, with the finite-sample correction, are the factors.
    """
    tail = (1 + nominal) / 2
    rows, sites = [], means.sites
    for side_m in means.sides_m:
        table = means.table(side_m)
        if len(table) < LEAST_BLOCKS or set(table["site"]) != sites:
            continue
        score = ((table["mean_m"] - table["true_m"]) / table["half_width_m"].clip(lower=half_width_floor_m)).to_numpy()
        weight = (1.0 / table.groupby("site")["site"].transform("size")).to_numpy()
        down, up = (max(conformal_quantile(sign * score, weight, tail), 0.0) for sign in (1, -1))
        rows.append((side_m, down, up, len(table)))
    # With a few sites of equal weight a quantile can be beyond the last square, and says nothing.
    rows = [row for row in rows if np.isfinite(row[1]) and np.isfinite(row[2])]
    if not rows:
        return None
    sides_m, lower, upper, blocks = zip(*rows, strict=True)
    return BlockTable(
        nominal=nominal,
        sides_m=sides_m,
        lower_factor=lower,
        upper_factor=upper,
        blocks=blocks,
        sites=tuple(sorted(sites)),
        half_width_floor_m=half_width_floor_m,
    )


def block_coverage(
    table: BlockTable, means: BlockMeans, sides_m: Iterable[float] | None = None
) -> dict[float, IntervalSums]:
    """What the intervals hold of squares, by side; coverage only where these had no part in the fit."""
    found = {}
    for side_m in table.sides_m if sides_m is None else sides_m:
        squares = means.table(side_m)
        lower, upper = mean_interval(squares["mean_m"], squares["half_width_m"], np.full(len(squares), side_m**2), table)
        found[side_m] = IntervalSums.of(lower, upper, squares["true_m"].to_numpy())
    return found


def measured_blocks(table: BlockTable, held: Mapping[str, Mapping[float, IntervalSums]]) -> BlockTable:
    """The table with the coverage of sites left out in turn, site -> side -> sums."""
    if not held:
        return table
    sums = [sum((sides.get(side_m, IntervalSums()) for sides in held.values()), IntervalSums()) for side_m in table.sides_m]
    return table.model_copy(update={"measured": MeasuredCoverage.of("sites left out in turn", held, sums)})

"""From held-out predictions to what turns a model's spread into intervals: of single pixels and of means over ground."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from canopy.errors import RecipeError
from canopy.metrics import IntervalSums
from canopy.model.blocks import BlockKey, BlockMeans, BlockTable, block_coverage, fit_blocks, measured_blocks
from canopy.model.calibration import (
    CalibrationTable,
    Coverage,
    How,
    MeasuredCoverage,
    cross_coverage,
    fit_calibration,
    interval,
    measure_coverage,
    tables_without,
)
from canopy.model.evaluate import ChipResult, Heights
from canopy.model.recipe import Calibrate

CALIBRATION_PX_PER_CHIP = 2000
"""Most pixels of one chip that calibrate, drawn at random: more of one place say little more, and the fit sorts them all."""


def _pixels(
    chips: Iterable[ChipResult], generator: np.random.Generator
) -> tuple[Heights, Heights, Heights, NDArray[np.str_]]:
    """Mean, spread and true height of the pixels that calibrate, with the site of each."""
    parts: list[tuple[Heights, Heights, Heights]] = []
    sites: list[NDArray[np.str_]] = []
    for chip in chips:
        if chip.calibrates:
            at = np.flatnonzero(chip.counts & np.isfinite(chip.mean_m))
            if at.size > CALIBRATION_PX_PER_CHIP:
                at = np.sort(generator.choice(at, CALIBRATION_PX_PER_CHIP, replace=False))
            parts.append((chip.mean_m.ravel()[at], chip.spread_m.ravel()[at], chip.true_m.ravel()[at]))
            sites.append(np.full(at.size, chip.site))
    if not parts:
        raise RecipeError("no chip is left to calibrate on; give a set a `calibrate` split or hold out a site for it")
    mean, spread, true = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
    return mean, spread, true, np.concatenate(sites)


@dataclass(frozen=True, slots=True, kw_only=True)
class Calibration:
    """The tables with the coverage measured two ways, by site."""

    table: CalibrationTable
    blocks: BlockTable | None
    left_out: dict[str, Coverage]
    """Calibration sites, each by a table fitted on the others."""
    other: dict[str, Coverage]
    """Scored chips that the table was not fitted on."""


def calibrate(chips: Iterable[ChipResult], settings: Calibrate, generator: np.random.Generator) -> Calibration:
    """Fit the tables on the chips that calibrate and measure them on what they have not seen.

    The coverage written into a table is that of each calibration site by a table fitted on the other ones, and that on
    scored chips that do not calibrate; in-sample coverage is never reported.

    Args:
        chips: Held-out chips; read twice.
        settings: How to fit.
        generator: Draws the pixels of chips that have more than `CALIBRATION_PX_PER_CHIP`.

    Raises:
        RecipeError: no chip calibrates, or too few pixels do.
    """
    edges = settings.edges_m
    arguments = {"nominal": settings.nominal, "least_px": settings.least_px, "spread_floor_m": settings.spread_floor_m}
    pixels = _pixels(chips, generator)
    table = fit_calibration(*pixels, edges, **arguments)  # type: ignore[arg-type]
    without = tables_without(*pixels, edges, **arguments)  # type: ignore[arg-type]
    classes = table.edges_m[1:]
    other: dict[str, Coverage] = {}
    other_classes: dict[str, Coverage] = {}
    squares = {name: BlockMeans() for name in (None, *without)}
    for chip in chips:
        if chip.calibrates:
            for name, means in squares.items():
                _add_squares(means, chip, table if name is None else without[name])
        elif chip.scores:
            known = chip.counts & np.isfinite(chip.mean_m)
            mean_m, spread_m, true_m = (a[known] for a in (chip.mean_m, chip.spread_m, chip.true_m))
            for sums, by in ((other, edges), (other_classes, classes)):
                held = measure_coverage(table, mean_m, spread_m, true_m, by)
                sums[chip.site] = sums.get(chip.site, Coverage.zero(by)) + held
    measured = []
    if left_out_classes := cross_coverage(without, *pixels, classes):
        measured.append(_measured("sites left out in turn", left_out_classes))
    if other_classes:
        measured.append(_measured("other held-out chips", dict(sorted(other_classes.items()))))
    return Calibration(
        table=table.model_copy(update={"measured": tuple(measured)}),
        blocks=_blocks(squares, settings.nominal),
        left_out=cross_coverage(without, *pixels, edges),
        other=dict(sorted(other.items())),
    )


def _add_squares(means: BlockMeans, chip: ChipResult, table: CalibrationTable) -> None:
    lower_m, upper_m = interval(chip.mean_m, chip.spread_m, table)
    key = BlockKey(site=chip.site, crs=chip.crs, gsd_m=chip.gsd_m)
    half_m = (upper_m - lower_m) / np.float32(2)
    means.add(key, chip.mean_m, half_m, chip.true_m, chip.counts, row_px=chip.row_px, col_px=chip.col_px)


def _blocks(squares: Mapping[str | None, BlockMeans], nominal: float) -> BlockTable | None:
    """The table of squares with its coverage: of each site by tables, of pixels and of squares, fitted on the others."""
    table = fit_blocks(squares[None], nominal=nominal)
    if table is None:
        return None
    held = {}
    for site, means in squares.items():
        if site is not None:
            fitted = fit_blocks(means.without(site), nominal=nominal)
            if fitted is not None:
                held[site] = block_coverage(fitted, means.only(site), table.sides_m)
    return measured_blocks(table, held)


def _measured(how: How, sites: dict[str, Coverage]) -> MeasuredCoverage:
    by_class = zip(*(coverage.classes for coverage in sites.values()), strict=True)
    return MeasuredCoverage.of(how, sites, [sum(parts, IntervalSums()) for parts in by_class])

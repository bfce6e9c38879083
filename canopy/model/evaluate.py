"""How good a trained model is on chips it never saw, and how sure it may be: scores by site, baselines, intervals."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from canopy.errors import RecipeError
from canopy.grid import Layout, weight
from canopy.metrics import ClassSums, HeightSums, IntervalSums, by_class
from canopy.model.baselines import Baselines
from canopy.model.calibration import (
    CalibrationTable,
    Coverage,
    MeasuredCoverage,
    cross_coverage,
    fit_calibration,
    measure_coverage,
)
from canopy.model.data import ChipDataset
from canopy.model.package import HeightModel
from canopy.model.recipe import Calibrate

Heights = NDArray[np.float32]


def predict_chip(model: HeightModel, image_brc: NDArray[Any], valid_rc: NDArray[np.bool_]) -> tuple[Heights, Heights]:
    """(mean_m, spread_m) of a chip, both (row, col), as a map of it would have them.

    A chip that fits the model's window is one input; a larger one is covered by windows on a lattice that starts at its
    corner, blended with the weights of `canopy.grid`. Variances add as mean of variances plus variance of means.
    """
    layout = Layout(window_px=model.contract.window_px, stride_px=model.contract.stride_px)
    rows, cols = valid_rc.shape
    if max(rows, cols) <= layout.window_px:
        heights = model.predict(image_brc[None], valid_rc[None])
        return heights.mean_m[0].cpu().numpy(), heights.spread_m[0].cpu().numpy()
    side = layout.window_px
    sums = np.zeros((3, rows, cols), np.float32)
    for window_row in layout.windows_over(0, rows):
        for window_col in layout.windows_over(0, cols):
            row, col = layout.window_span(window_row)[0], layout.window_span(window_col)[0]
            inside = slice(max(row, 0), min(row + side, rows)), slice(max(col, 0), min(col + side, cols))
            there = slice(inside[0].start - row, inside[0].stop - row), slice(inside[1].start - col, inside[1].stop - col)
            image = np.zeros((len(image_brc), side, side), image_brc.dtype)
            valid = np.zeros((side, side), bool)
            image[:, *there], valid[there] = image_brc[:, *inside], valid_rc[inside]
            if not valid.any():
                continue
            heights = model.predict(image[None], valid[None])
            mean, spread = heights.mean_m[0].cpu().numpy()[there], heights.spread_m[0].cpu().numpy()[there]
            w = np.outer(_weights(layout, window_row, inside[0]), _weights(layout, window_col, inside[1]))
            sums[0][inside] += w
            sums[1][inside] += w * mean
            sums[2][inside] += w * (spread**2 + mean**2)
    with np.errstate(invalid="ignore"):  # 0/0 is NaN where no window saw a valid pixel
        mean_m, square = sums[1] / sums[0], sums[2] / sums[0]
    return mean_m, np.sqrt(np.maximum(square - mean_m**2, 0.0))


def _weights(layout: Layout, window: int, span: slice) -> NDArray[np.float32]:
    edge, feather = layout.support_span(window)[0] + layout.feather_px // 2, layout.feather_px
    return np.array(
        [weight(pixel, edge, edge + layout.stride_px, feather) / (2 * feather) for pixel in range(span.start, span.stop)],
        np.float32,
    )


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ChipResult:
    """One held-out chip: what is known and what was predicted, at its labelled pixels, one-dimensional, metres."""

    id: str
    site: str
    calibrates: bool
    scores: bool
    true_m: Heights
    mean_m: Heights
    spread_m: Heights
    forest_m: Heights
    """By the random-forest baseline; empty where the chip is not scored."""


def evaluate_chips(
    model: HeightModel,
    baselines: Baselines,
    chips: ChipDataset,
    *,
    calibrates: bool,
    scores: bool,
    progress: Callable[[int], None] | None = None,
) -> list[ChipResult]:
    """Predict every chip of a held-out set."""
    results = []
    for item in range(len(chips)):
        sample = chips[item]
        image, seen = sample["image"].numpy(), sample["image_valid"].numpy()
        height, known = sample["height_m"].numpy(), sample["valid"].numpy()
        mean_m, spread_m = predict_chip(model, image, seen)
        forest_m = baselines.predict(image, known, seen)[known] if scores else np.zeros(0, np.float32)
        results.append(
            ChipResult(
                id=sample["id"],
                site=sample["site"],
                calibrates=calibrates,
                scores=scores,
                true_m=height[known],
                mean_m=mean_m[known],
                spread_m=spread_m[known],
                forest_m=forest_m,
            )
        )
        if progress is not None:
            progress(1)
    return results


# --- scores --------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class SiteScore:
    """The model and its baselines on the scored chips of one site."""

    site: str
    seen: bool
    """Whether other blocks of the site were trained on."""
    chips: int
    model: HeightSums
    training_mean: HeightSums
    forest: HeightSums
    classes: ClassSums
    """The model by class of true height."""


def score_sites(
    results: Sequence[ChipResult], baselines: Baselines, *, trained_sites: Sequence[str], edges_m: Sequence[float]
) -> list[SiteScore]:
    """Scores by site, in the order of their names."""
    scored = [r for r in results if r.scores]
    scores = []
    for site in sorted({r.site for r in scored}):
        own = [r for r in scored if r.site == site]
        scores.append(
            SiteScore(
                site=site,
                seen=site in trained_sites,
                chips=len(own),
                model=sum((HeightSums.of(r.mean_m, r.true_m) for r in own), HeightSums()),
                training_mean=sum(
                    (HeightSums.of(np.full_like(r.true_m, baselines.mean_m), r.true_m) for r in own), HeightSums()
                ),
                forest=sum((HeightSums.of(r.forest_m, r.true_m) for r in own), HeightSums()),
                classes=sum((by_class(r.mean_m, r.true_m, edges_m) for r in own), ClassSums.zero(edges_m)),
            )
        )
    return scores


# --- calibration ---------------------------------------------------------------------------------------------------------


def _joined(results: Sequence[ChipResult]) -> tuple[Heights, Heights, Heights, NDArray[np.str_]]:
    return (
        np.concatenate([r.mean_m for r in results]),
        np.concatenate([r.spread_m for r in results]),
        np.concatenate([r.true_m for r in results]),
        np.concatenate([np.full(r.true_m.size, r.site) for r in results]),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Calibration:
    """The table with the coverage measured two ways, by site."""

    table: CalibrationTable
    left_out: dict[str, Coverage]
    """Calibration sites, each by a table fitted on the others."""
    other: dict[str, Coverage]
    """Scored chips that the table was not fitted on."""


def calibrate(results: Sequence[ChipResult], settings: Calibrate) -> Calibration:
    """Fit the table on the chips that calibrate and measure it on what it has not seen.

    The coverage written into the table is that of each calibration site by a table fitted on the other ones, and that on
    held-out chips that do not calibrate; in-sample coverage is never reported.

    Raises:
        RecipeError: no chip calibrates, or too few pixels do.
    """
    own = [r for r in results if r.calibrates]
    if not own:
        raise RecipeError("no chip is left to calibrate on; give a set a `calibrate` split or hold out a site for it")
    edges = settings.edges_m
    arguments = {"nominal": settings.nominal, "least_px": settings.least_px, "spread_floor_m": settings.spread_floor_m}
    pixels = _joined(own)
    table = fit_calibration(*pixels, edges, **arguments)  # type: ignore[arg-type]
    classes = table.edges_m[1:]
    left_out = cross_coverage(*pixels, edges, **arguments)  # type: ignore[arg-type]
    left_out_classes = cross_coverage(*pixels, edges, report=classes, **arguments)  # type: ignore[arg-type]
    others = [r for r in results if r.scores and not r.calibrates]
    other, other_classes = {}, {}
    for site in sorted({r.site for r in others}):
        mean, spread, true, _ = _joined([r for r in others if r.site == site])
        other[site] = measure_coverage(table, mean, spread, true, edges)
        other_classes[site] = measure_coverage(table, mean, spread, true, classes)
    measured = []
    if left_out_classes:
        measured.append(_measured("sites left out in turn", left_out_classes))
    if other_classes:
        measured.append(_measured("other held-out chips", other_classes))
    return Calibration(table=table.model_copy(update={"measured": tuple(measured)}), left_out=left_out, other=other)


def _measured(
    how: Literal["sites left out in turn", "other held-out chips"], sites: dict[str, Coverage]
) -> MeasuredCoverage:
    by_class = zip(*(coverage.classes for coverage in sites.values()), strict=True)
    sums = [sum(parts, IntervalSums()) for parts in by_class]
    return MeasuredCoverage(
        how=how,
        sites=tuple(sites),
        pixels=tuple(s.n for s in sums),
        inside=tuple(s.n - s.n_below - s.n_above for s in sums),
    )

"""The card of a trained model, written from what was measured."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise

from canopy.model.baselines import Baselines
from canopy.model.calibration import Coverage
from canopy.model.evaluate import Calibration, SiteScore
from canopy.model.package import Contract
from canopy.model.recipe import TrainingRecipe

SERIOUS_BIAS_M = 5.0
"""A class of heights that is off by more than this on average is named among the limits."""


def model_card(
    recipe: TrainingRecipe,
    contract: Contract,
    *,
    sources: Sequence[Mapping[str, str]],
    scores: Sequence[SiteScore],
    baselines: Baselines,
    calibration: Calibration,
) -> str:
    """Markdown text of `card.md`; every figure is one that was measured in this run.

    Args:
        recipe: What was asked for.
        contract: What the model is.
        sources: Site, sources, licence and number of chips of the training data.
        scores: By site.
        baselines: What the scores are compared with.
        calibration: The interval table and its measured coverage.
    """
    low, high = contract.gsd_range_m
    lines = [
        f"# {contract.name} {contract.version}",
        "",
        contract.description,
        "",
        f"- Input: {', '.join(contract.bands)} imagery, {contract.dtype}, {low:g} to {high:g} m per pixel",
        f"- Output: canopy height in metres above ground, up to {contract.network.bins.max_m:g} m",
        f"- Network: {contract.network.backbone}, DPT decoder, {contract.network.bins.count} height bins, {_start(recipe)}",
        f"- Training: {recipe.optim.steps} steps, recipe in `recipe.toml` (SHA-256 {recipe.sha256()[:12]})",
        f"- Licence of the weights: {contract.licence}",
        "",
        "## Training data",
        "",
        *_table(
            ("site", "chips", "imagery", "heights", "licence"),
            [(s["site"], s["chips"], s["image_source"], s["lidar_source"], s["licence"]) for s in sources],
        ),
        "",
        "## Scores on chips held out from training",
        "",
        "Bias is prediction minus reference. *Unseen* sites had no chip in training; of the others, other blocks had.",
        f"The training mean is {baselines.mean_m:.2f} m everywhere.",
        f"The random forest sees the colour and texture of {baselines.n} training pixels.",
        "",
        *_table(
            ("site", "", "pixels", "", "MAE m", "RMSE m", "bias m", "R²"),
            [
                (
                    s.site if first else "",
                    "" if s.seen or not first else "unseen",
                    str(s.model.n) if first else "",
                    who,
                    _number(sums.mae_m),
                    _number(sums.rmse_m),
                    _number(sums.bias_m, sign=True),
                    _number(sums.r2),
                )
                for s in scores
                for first, who, sums in (
                    (True, "**model**", s.model),
                    (False, "training mean", s.training_mean),
                    (False, "random forest", s.forest),
                )
            ],
        ),
        "",
        "By class of true height, MAE / bias of the model in metres:",
        "",
        *_table(
            ("site", *(scores[0].classes.labels if scores else ())),
            [
                (
                    s.site,
                    *(f"{_number(c.mae_m)} / {_number(c.bias_m, sign=True)}" if c.n else "-" for c in s.classes.classes),
                )
                for s in scores
            ],
        ),
        "",
        "## Intervals",
        "",
        *_intervals(contract, calibration),
        "",
        "## Not for",
        "",
        *(f"- {line}" for line in _limits(recipe, contract, scores)),
        "",
    ]
    return "\n".join(lines)


def _start(recipe: TrainingRecipe) -> str:
    if recipe.model.start_from is not None:
        return f"started from the model {recipe.model.start_from}"
    return "published backbone weights" if recipe.model.pretrained else "trained from scratch"


def _number(value: float, *, sign: bool = False) -> str:
    if not math.isfinite(value):
        return "-"
    return f"{value:+.2f}" if sign else f"{value:.2f}"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    return [f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *rows)]


def _intervals(contract: Contract, calibration: Calibration) -> list[str]:
    table = calibration.table
    lines = [
        f"Split-conformal intervals, made to hold {table.nominal:.0%} of the true heights.",
        f"Fitted on held-out chips of {', '.join(table.sites)}, with equal weight for each site.",
        "Measured only where the table was not fitted:",
        "",
    ]
    rows = []
    for how, sites in (("left out of the fit", calibration.left_out), ("not used in the fit", calibration.other)):
        rows += [(site, how, *_coverage(coverage)) for site, coverage in sites.items()]
    if not rows:
        return [*lines[:2], f"Coverage of {contract.name} could not be measured: nothing else was held out."]
    lines += _table(("site", "", "pixels", "coverage", "mean width m"), rows)
    lines += ["", "By class of predicted height:", ""]
    labels = [*(f"{a:g}-{b:g} m" for a, b in pairwise(table.edges_m)), f">= {table.edges_m[-1]:g} m"]
    lines += _table(
        ("class", "spreads down", "spreads up", "fitted on pixels", *(f"coverage, {m.how}" for m in table.measured)),
        [
            (
                label,
                f"{table.lower_factor[k]:.2f}",
                f"{table.upper_factor[k]:.2f}",
                str(table.pixels[k]),
                *(f"{m.by_class[k]:.1%} of {m.pixels[k]}" if m.pixels[k] else "-" for m in table.measured),
            )
            for k, label in enumerate(labels)
        ],
    )
    return lines


def _coverage(coverage: Coverage) -> tuple[str, str, str]:
    total = coverage.total
    return str(total.n), f"{total.coverage:.1%}" if total.n else "-", _number(total.mean_width_m)


def _limits(recipe: TrainingRecipe, contract: Contract, scores: Sequence[SiteScore]) -> list[str]:
    """What follows from the figures, then what the recipe says."""
    low, high = contract.gsd_range_m
    lines = [
        f"imagery other than {', '.join(contract.bands)} at {low:g} to {high:g} m per pixel (refused)",
        f"trees above {contract.network.bins.max_m:g} m, the last height bin",
        "regions unlike its training data, without checking it there against measured heights first",
    ]
    for score in scores:
        where = f"{score.site}{'' if score.seen else ' (unseen in training)'}"
        if score.model.r2 < 0:
            lines.append(f"telling tall from low canopy at sites like {where}: R² there is {score.model.r2:.2f}")
        best = min(score.training_mean.mae_m, score.forest.mae_m)
        if score.model.mae_m >= best:
            lines.append(
                f"sites like {where}: a baseline does as well (MAE {best:.2f} m, the model {score.model.mae_m:.2f} m)"
            )
        for label, sums in zip(score.classes.labels, score.classes.classes, strict=True):
            if sums.n and abs(sums.bias_m) > SERIOUS_BIAS_M:
                lines.append(f"heights {label} at sites like {where}: biased by {sums.bias_m:+.1f} m there")
    return [*lines, *recipe.model.not_for]

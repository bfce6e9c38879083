"""The card of a trained model: what its contract and its metrics file say, for people.

Nothing else goes into it, so a card can be made again from the files of a model folder, and a test does that.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from itertools import pairwise
from pathlib import Path

from canopy.metrics import LEAST_SQUARES, RESAMPLED_M
from canopy.model.blocks import BlockTable
from canopy.model.package import CARD, Contract, read_contract
from canopy.model.scores import FILE as METRICS
from canopy.model.scores import (
    ClassFigures,
    Figures,
    How,
    Interval,
    Metrics,
    Score,
    SiteCoverage,
    metrics_text,
    read_metrics,
)
from canopy.textfile import write_text

SERIOUS_BIAS_M = 5.0
"""A class of heights that is off by more than this on average is named among the limits."""

LEAST_CLASS_PX = 100
"""A class with fewer pixels than this is a crown or two and no ground for a warning."""

_HOW: dict[How, str] = {
    "unseen site": "by a model of the same recipe that was trained without the site",
    "never-used site": "by this model, which had no part of the site in its training",
    "held-out blocks": "by this model, on blocks held out of a site whose other blocks trained it: not a new place",
}


def card(contract: Contract, metrics: Metrics) -> str:
    """Markdown text of `card.md`.

    Args:
        contract: What the model is.
        metrics: What was measured of it.
    """
    parts = (
        _about(contract, metrics),
        ["## Training data", "", *_training_data(metrics)],
        ["## Scores", "", *_scores(metrics)],
        ["## Next to the random forest", "", *_next_to_forest(metrics)],
        ["## By class of true height", "", *_classes(metrics)],
        ["## Intervals", "", *_intervals(contract, metrics.coverage, _predicted(metrics))],
        ["## Not for", "", *(f"- {line}" for line in _limits(contract, metrics))],
    )
    return "\n\n".join("\n".join(part) for part in parts) + "\n"


def card_of(folder: Path) -> str:
    """The card of a model folder made again from its contract and its metrics.

    Raises:
        ContractError: one of the two is missing or wrong.
    """
    return card(read_contract(folder), read_metrics(folder))


def rewrite_card(folder: Path, coverage: Sequence[SiteCoverage]) -> None:
    """Make the card of a model folder agree with its contract after a new calibration.

    A model that was scored here has its metrics file brought up to date, and its card made again; in any other card the
    section on intervals is replaced, or added.

    Args:
        folder: The model folder, its contract up to date.
        coverage: What the new intervals held, site by site.

    Raises:
        ContractError: its metrics file is not one that this version reads.
        OutputError: the files cannot be written.
    """
    contract, path = read_contract(folder), folder / CARD
    if (folder / METRICS).is_file():
        metrics = read_metrics(folder).model_copy(update={"coverage": tuple(coverage)})
        write_text(folder / METRICS, metrics_text(metrics))
        write_text(path, card(contract, metrics))
        return
    sections = re.split(r"^(?=## )", path.read_text(encoding="utf-8"), flags=re.MULTILINE)
    kept = [section.rstrip() for section in sections if not re.match(r"## (Scores and i|I)ntervals\n", section)]
    new = ["## Intervals", "", *_intervals(contract, coverage, "on chips that the model was not trained on.")]
    write_text(path, "\n\n".join([*kept, "\n".join(new)]) + "\n")


def _about(contract: Contract, metrics: Metrics) -> list[str]:
    low, high = contract.gsd_range_m
    bins = contract.network.bins
    return [
        f"# {contract.name} {contract.version}",
        "",
        contract.description,
        "",
        f"- Input: {', '.join(contract.bands)} imagery, {contract.dtype}, {low:g} to {high:g} m per pixel",
        f"- Output: canopy height in metres above ground, up to {bins.max_m:g} m",
        f"- Network: {contract.network.backbone}, DPT decoder, {bins.count} height bins, {metrics.start}",
        f"- Training: {metrics.steps} steps, recipe in `recipe.toml` (SHA-256 {contract.training.recipe_sha256[:12]})",
        f"- Licence of the weights: {contract.licence}",
    ]


def _training_data(metrics: Metrics) -> list[str]:
    rows = [(s.site, str(s.chips), s.image_source, s.lidar_source, s.licence) for s in metrics.sources]
    return _table(("site", "chips", "imagery", "heights", "licence"), rows)


# --- scores --------------------------------------------------------------------------------------------------------------


def _scores(metrics: Metrics) -> list[str]:
    used = [how for how in _HOW if any(score.how == how for score in metrics.scores)]
    lines = [
        "Where each row comes from:",
        "",
        *(f"- *{how}*: {_HOW[how]}" for how in used),
        "",
        "Bias is prediction minus reference. In brackets after a figure: its 95 % interval, from drawing squares of",
        f"{RESAMPLED_M:g} m of ground again and again. Block R² is that of the means over blocks of the stated side, where",
        "at least half of a block is known. The edge error is the mean absolute difference of the slope (Sobel gradient) of",
        "the two surfaces in metres per metre; in brackets its signed mean, negative where the map is too smooth.",
        f"The training mean is {metrics.training_mean_m:.2f} m everywhere; the random forest sees the colour and texture of",
        f"{metrics.forest_px} training pixels. At an unseen site both are those of the training without it.",
    ]
    for score in metrics.scores:
        lines += [
            "",
            f"**{score.site}**, {score.how}: {score.model.n} pixels of {score.gsd_m:g} m in {score.chips} chips and "
            f"{score.squares} {'square' if score.squares == 1 else 'squares'}"
            + (f", {score.model.n_missing} without a prediction" if score.model.n_missing else ""),
            "",
            *_table(
                ("", "MAE m", "RMSE m", "bias m", "R²", f"R² of {score.block_m:g} m blocks", "edge error"),
                [
                    _figures("**model**", score.model, score.blocks),
                    _figures("training mean", score.training_mean, score.blocks),
                    _figures("random forest", score.random_forest, score.blocks),
                ],
            ),
        ]
    return lines


def _figures(who: str, figures: Figures, blocks: int) -> tuple[str, ...]:
    edge = "-" if figures.edge_error is None else f"{figures.edge_error:.2f} ({_number(figures.edge_bias, sign=True)})"
    return (
        who,
        _with_interval(figures.mae_m, figures.mae_95_m),
        _with_interval(figures.rmse_m, figures.rmse_95_m),
        _with_interval(figures.bias_m, figures.bias_95_m, sign=True),
        _with_interval(figures.r2, figures.r2_95),
        "-" if figures.block_r2 is None else f"{figures.block_r2:.2f} of {blocks}",
        edge,
    )


def _next_to_forest(metrics: Metrics) -> list[str]:
    lines = [
        "Model minus random forest on the same squares: *better* or *worse* only where the 95 % interval of the difference",
        f"leaves out 0, *as good* where it does not; from fewer than {LEAST_SQUARES} squares nothing is claimed.",
        "",
        *_table(
            ("site", "", "squares", "MAE m", "", "RMSE m", ""),
            [
                (
                    score.site,
                    score.how,
                    str(score.squares),
                    _difference(score.model.mae_m, score.random_forest.mae_m, score.mae_difference_95_m),
                    score.against_forest("mae"),
                    _difference(score.model.rmse_m, score.random_forest.rmse_m, score.rmse_difference_95_m),
                    score.against_forest("rmse"),
                )
                for score in metrics.scores
            ],
        ),
    ]
    new = [score for score in metrics.scores if score.how != "held-out blocks"]
    if new:
        better = [score.site for score in new if score.against_forest() == "better"]
        rest = [f"{score.site} ({score.against_forest()})" for score in new if score.against_forest() != "better"]
        said = f"better than the random forest at {_list(better)}" if better else "nowhere better than the random forest"
        lines += [
            "",
            f"By MAE, on sites that are new to it, the model is {said}{f'; not at {_list(rest)}' if rest else ''}.",
        ]
    else:
        lines += ["", "No site was new to the model: what it does elsewhere has not been measured."]
    return lines


def _difference(model: float | None, forest: float | None, interval: Interval) -> str:
    return "-" if model is None or forest is None else _with_interval(model - forest, interval, sign=True)


def _classes(metrics: Metrics) -> list[str]:
    if not metrics.scores:
        return ["Nothing was scored."]
    labels = [c.label for c in metrics.scores[0].classes]
    rows = [(score.site, score.how, *(_class(c) for c in score.classes)) for score in metrics.scores]
    return ["MAE / bias of the model in metres:", "", *_table(("site", "", *labels), rows)]


def _class(figures: ClassFigures) -> str:
    return f"{_number(figures.mae_m)} / {_number(figures.bias_m, sign=True)}" if figures.n else "-"


# --- intervals -----------------------------------------------------------------------------------------------------------


def _predicted(metrics: Metrics) -> str:
    new = "on predictions for sites that were new to the model that made them."
    return new if metrics.folds else "on chips held out of training."


def _intervals(contract: Contract, coverage: Sequence[SiteCoverage], predicted: str) -> list[str]:
    table = contract.calibration
    if table is None:
        return ["Not calibrated: maps say so, and give no interval."]
    lines = [
        f"Split-conformal intervals, made to hold {table.nominal:.0%} of the true heights.",
        f"Fitted with equal weight for each of {_list(table.sites)},",
        predicted,
    ]
    if not coverage:
        return [*lines, "Their coverage could not be measured: nothing else was held out."]
    lines += ["", "Measured only where the table was not fitted:", ""]
    lines += _table(
        ("site", "", "pixels", "coverage", "mean width m"),
        [
            (c.site, c.how, str(c.n), "-" if c.coverage is None else f"{c.coverage:.1%}", _number(c.mean_width_m))
            for c in coverage
        ],
    )
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
    return [*lines, *_means(contract.blocks)]


def _means(blocks: BlockTable | None) -> list[str]:
    """How wrong means over ground are."""
    if blocks is None:
        return ["", "How wrong means over areas are could not be measured: too few squares of ground were held out."]
    held = blocks.measured
    share = ["-"] * len(blocks.sides_m) if held is None else [
        f"{held.by_class[k]:.1%} of {n}" if n else "-" for k, n in enumerate(held.pixels)
    ]  # fmt: skip
    return [
        "",
        "Of the mean height over a square of ground, in mean half-widths of the intervals of its pixels:",
        "",
        *_table(
            ("side", "down", "up", "fitted on squares", "coverage, sites left out in turn"),
            [
                (f"{side_m:g} m", f"{down:.2f}", f"{up:.2f}", str(n), found)
                for side_m, down, up, n, found in zip(
                    blocks.sides_m, blocks.lower_factor, blocks.upper_factor, blocks.blocks, share, strict=True
                )
            ],
        ),
    ]


# --- limits --------------------------------------------------------------------------------------------------------------


def _limits(contract: Contract, metrics: Metrics) -> list[str]:
    """What follows from the figures, a line a site, then what the recipe says."""
    low, high = contract.gsd_range_m
    lines = [
        f"imagery other than {', '.join(contract.bands)} at {low:g} to {high:g} m per pixel (refused)",
        f"trees above {contract.network.bins.max_m:g} m, the last height bin",
        "regions unlike its training data, without checking it there against measured heights first",
    ]
    strictest: dict[str, Score] = {}
    for score in metrics.scores:  # stricter ways of judging come first
        strictest.setdefault(score.site, score)
    sites = [
        f"places like {score.site} ({score.how}): {'; '.join(found)}"
        for score in strictest.values()
        if (found := _site_limits(score))
    ]
    return [*lines, *sites, *metrics.not_for]


def _site_limits(score: Score) -> list[str]:
    found = []
    if score.model.r2 is not None and score.model.r2 < 0:
        found.append(f"it does not tell tall from low (R² {score.model.r2:.2f})")
    if (verdict := score.against_forest()) in {"worse", "as good"}:
        than, forest = "worse" if verdict == "worse" else "no better", _number(score.random_forest.mae_m)
        found.append(f"{than} than the random forest (MAE {_number(score.model.mae_m)} m, the forest {forest} m)")
    mean = score.training_mean.mae_m
    if score.model.mae_m is not None and mean is not None and score.model.mae_m >= mean:
        found.append(f"no better than the training mean ({_number(mean)} m)")
    biased = [
        f"{c.label} {c.bias_m:+.0f} m"
        for c in score.classes
        if c.n >= LEAST_CLASS_PX and c.bias_m is not None and abs(c.bias_m) > SERIOUS_BIAS_M
    ]
    if biased:
        found.append(f"heights off on average: {', '.join(biased)}")
    return found


# --- text ----------------------------------------------------------------------------------------------------------------


def _number(value: float | None, *, sign: bool = False) -> str:
    if value is None:
        return "-"
    return f"{value:+.2f}" if sign else f"{value:.2f}"


def _with_interval(value: float | None, interval: Interval, *, sign: bool = False) -> str:
    if value is None or interval is None:
        return _number(value, sign=sign)
    return f"{_number(value, sign=sign)} ({' to '.join(_number(end, sign=sign) for end in interval)})"


def _list(names: Iterable[str]) -> str:
    *most, last = names
    return f"{', '.join(most)} and {last}" if most else last


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    return [f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *rows)]

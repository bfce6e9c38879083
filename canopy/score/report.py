"""A score as one page: `report.html`, with its figures inside, for people who decide whether to trust a map.

Every number on it is one of the `ScoreResult`; nothing is computed here but how it is written down. Every table says what
its heights mean, on which pixels they are compared, what is masked, and that the error is the map minus the reference.
Something is claimed only where the 95 % interval allows it, and a result of leaked ground or of an uncalibrated map says so
first.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Final

import numpy as np

from canopy.errors import OutputError
from canopy.metrics import LEAST_SQUARES
from canopy.page import Drawn, render_page
from canopy.score.figures import (
    ERRORS,
    HEIGHTS,
    ErrorScale,
    Picture,
    coverage_figure,
    coverage_floor,
    error_map_figure,
    error_scale,
    place_pictures,
    pretty,
    ramp_css,
    residual_figure,
    residual_reach,
    round_up,
    scatter_figure,
    scatter_top,
    shot_map_figure,
    stated_figure,
)
from canopy.score.pictures import Pictures
from canopy.score.result import (
    FILE,
    Comparison,
    Difference,
    Estimate,
    Intervals,
    MapInfo,
    MapScore,
    Place,
    ScoreResult,
)
from canopy.textfile import write_text

PAGE: Final = "report.html"
TEMPLATE: Final = "report.html.j2"

HELD: Final = 0.02
"""An interval is said to hold when its coverage is this close to the promise, whatever the resamples say."""
HELD_IN_A_CLASS: Final = 0.05
"""The same for one class of height."""
LISTED: Final = 6
"""Files and sites named at most; what is left out is counted."""

REFERENCES: Final = {
    "als": "airborne lidar",
    "gedi": "GEDI L2A shots",
    "atl08": "ICESat-2 ATL08 segments",
    "plots": "field plots",
}
UNITS: Final = {"als": "pixels", "gedi": "shots", "atl08": "segments", "plots": "plots"}
MINUS: Final = "\u2212"
DASH: Final = "\u2013"


def write_report(result: ScoreResult, folder: Path, pictures: Pictures | None = None) -> Path:
    """Write `report.html`, whole or not at all.

    Args:
        result: All that the page says.
        folder: An existing folder. A page that is there is replaced.
        pictures: The pixels that it shows; without them it has no maps of the error of rasters and no pictures of places.

    Returns:
        The page.

    Raises:
        OutputError: it cannot be written.
    """
    if not folder.is_dir():
        raise OutputError(f"{folder} is not a folder; give one that exists for the report")
    path = folder / PAGE
    write_text(path, report_page(result, pictures))
    return path


def report_page(result: ScoreResult, pictures: Pictures | None = None) -> str:
    """The text of the page; arguments as in `write_report`."""
    pictures = Pictures() if pictures is None else pictures
    infos = {info.name: info for info in result.maps}
    return render_page(
        "canopy.score",
        TEMPLATE,
        result=result,
        title=_title(result),
        facts=_facts(result.maps),
        uncalibrated=[info for info in result.maps if _uncalibrated(info)],
        unknown=[info for info in result.maps if info.lineage == "unknown"],
        parts=[_part(number, comparison, infos, pictures) for number, comparison in enumerate(result.comparisons)],
        # The banner has the leaks already.
        warnings=[each for each in result.warnings if not any(leak.finding in each for leak in result.leaks)],
        data_file=FILE,
        first=result.comparisons[0].maps[0],
        heights_css=ramp_css(HEIGHTS),
        errors_css=ramp_css(ERRORS),
        held=HELD,
        least_squares=LEAST_SQUARES,
        held_in_a_class=HELD_IN_A_CLASS,
        some=some,
        metres=metres,
        signed=signed,
        ratio=ratio,
        percent=percent,
        count=count,
        span=span,
        pretty=pretty,
        plainly=str,
        degrees=degrees,
        capitalised=capitalised,
        day=_day,
    )


# --- how numbers are written ---------------------------------------------------------------------------------------------


def metres(value: float | None) -> str:
    """Metres to the centimetre, without their unit; a dash for what does not exist."""
    return _number(value, "{:.2f}")


def signed(value: float | None) -> str:
    """Metres to the centimetre with their sign, also of zero difference: a bias without a sign is no bias."""
    return _number(value, "{:+.2f}")


def ratio(value: float | None) -> str:
    """A number without unit, such as R², to two digits."""
    return _number(value, "{:.2f}")


def percent(value: float | None) -> str:
    """A share as per cent to one digit."""
    return _number(None if value is None else 100 * value, "{:.1f}")


def count(value: int) -> str:
    """A count with its thousands apart."""
    return f"{value:,}"


def _number(value: float | None, pattern: str) -> str:
    if value is None:
        return DASH
    text = pattern.format(value)
    # What rounds to nothing has no sign of its own: +0.00 and -0.00 are one number.
    if text.lstrip("+-").strip("0.") == "":
        text = text.lstrip("+-")
    return text.replace("-", MINUS)


def span(estimate: Estimate, write: Callable[[float | None], str] = metres) -> str:
    """The 95 % interval in words, empty where there is none."""
    if estimate.interval_95 is None:
        return ""
    return "{} to {}".format(*(write(end) for end in estimate.interval_95))


def capitalised(text: str) -> str:
    """A text that begins a line."""
    return text[:1].upper() + text[1:]


def some(names: Sequence[str], most: int = LISTED) -> str:
    """Names with commas; what is left out is counted."""
    left = len(names) - most
    return ", ".join(names[:most]) + (f" and {count(left)} more" if left > 0 else "")


def degrees(value: float, letters: str) -> str:
    """A longitude or latitude to about a metre; `letters` are those of positive and negative values."""
    return f"{abs(value):.5f}°\u00a0{letters[value < 0]}"


def _day(text: str) -> str:
    return text[:10]


# --- what is said --------------------------------------------------------------------------------------------------------


def _title(result: ScoreResult) -> str:
    names = " and ".join(dict.fromkeys(REFERENCES[comparison.reference.kind] for comparison in result.comparisons))
    return f"{result.maps[0].name} against {names}"


def _uncalibrated(info: MapInfo) -> bool:
    """Whether intervals of this map promise anything: a canopy map without a calibration table says so in its tags."""
    return info.kind == "canopy map" and (
        not info.has_intervals or info.calibration is None or info.calibration.startswith("uncalibrated")
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Shown:
    """One map of a comparison as the page shows it."""

    score: MapScore
    info: MapInfo
    summary: tuple[str, ...]
    """Sentences."""
    places: tuple[tuple[Place, tuple[Picture, ...], str], ...]
    """Each with its pictures, none where it has none, and how far inside them it lies, as CSS writes it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Part:
    """One comparison as the page shows it."""

    key: str
    """Start of the names of its sections."""
    comparison: Comparison
    unit: str
    about: str
    """What every table has to say."""
    shown: tuple[_Shown, ...]
    figures: tuple[tuple[Drawn, ...], ...]
    """Rows of figures that stand side by side: of several maps one kind a row, of one map all."""
    coarse: tuple[tuple[str, tuple[Estimate | None, ...], Callable[[float | None], str]], ...]
    """Measures of blocks, edges and tree cover, an estimate a map, and how they are written."""
    coarse_of: str
    """Which of the three there are."""
    verdicts: tuple[tuple[Difference, str], ...]
    scale: ErrorScale
    top_m: float
    sure: bool
    """Whether the measures of the first map have intervals."""


def _part(number: int, comparison: Comparison, infos: dict[str, MapInfo], pictures: Pictures) -> _Part:
    unit = UNITS[comparison.reference.kind]
    maps = {score.name: pictures.errors.get((number, score.name)) for score in comparison.maps}
    errors = [picture.error_m for picture in maps.values() if picture is not None]
    errors += [np.array([shot.map_m - shot.reference_m for shot in score.shots]) for score in comparison.maps if score.shots]
    scale, reach_m = error_scale(errors), residual_reach([each for score in comparison.maps for each in score.residuals])
    floor = coverage_floor([score.intervals for score in comparison.maps if score.intervals is not None])
    top_m = scatter_top([score.scatter for score in comparison.maps])
    heights_m = [
        each[np.isfinite(each)]
        for score in comparison.maps
        for chip in pictures.places.get((number, score.name), ())
        if chip is not None
        for each in (chip.map_m, chip.reference_m)
    ]
    chips_top_m = round_up(max((float(np.quantile(each, 0.99)) for each in heights_m if each.size), default=5.0))
    axis = {"als": "reference", "gedi": "GEDI RH98", "atl08": "ICESat-2 height", "plots": "plot height"}
    squares = comparison.maps[0].measures.squares
    kinds: dict[str, list[Drawn]] = {}
    shown = []
    for score in comparison.maps:
        picture, intervals = maps[score.name], score.intervals
        if picture is not None:
            assert comparison.grid is not None, f"a map of the error of {score.name}, compared at shots"
            drawn = error_map_figure(score.name, picture, scale=scale, grid=comparison.grid, worst=score.worst)
            kinds.setdefault("map", []).append(drawn)
        if score.shots:
            drawn = shot_map_figure(score.name, score.shots, scale=scale, n=score.measures.n, unit=unit)
            kinds.setdefault("map", []).append(drawn)
        drawn = scatter_figure(score, top_m=top_m, unit=unit, reference=axis[comparison.reference.kind])
        kinds.setdefault("scatter", []).append(drawn)
        kinds.setdefault("residuals", []).append(residual_figure(score, reach_m=reach_m, unit=unit))
        if intervals is not None:
            kinds.setdefault("coverage", []).append(coverage_figure(score.name, intervals, floor=floor))
            stated = stated_figure(score.name, intervals.by_stated_error)
            if stated is not None:
                kinds.setdefault("stated", []).append(stated)
        chips = pictures.places.get((number, score.name), ()) or (None,) * len(score.worst)
        assert len(chips) == len(score.worst), f"{len(chips)} pictures of {len(score.worst)} places of {score.name}"
        shown.append(
            _Shown(
                score=score,
                info=infos[score.name],
                summary=_summary(score, infos[score.name], comparison, unit),
                places=tuple(
                    (place, (), "") if chip is None
                    else (place, place_pictures(chip, top_m=chips_top_m, scale=scale), f"{100 * chip.inset:.2f}%")
                    for place, chip in zip(score.worst, chips, strict=True)
                ),
            )
        )  # fmt: skip
    if len(kinds.get("coverage", ())) == 1:  # one map has intervals: its two figures stand side by side
        kinds["coverage"] += kinds.pop("stated", [])
    rows = tuple(tuple(row) for row in kinds.values())
    return _Part(
        key=f"c{number + 1}",
        comparison=comparison,
        unit=unit,
        about=_about(comparison),
        shown=tuple(shown),
        figures=rows if len(comparison.maps) > 1 else (tuple(figure for row in rows for figure in row),),
        coarse=_coarse(comparison.maps),
        coarse_of="Blocks, edges and tree cover"
        if any(score.blocks or score.edges for score in comparison.maps)
        else "Tree cover",
        verdicts=tuple((difference, verdict(difference, squares)) for difference in comparison.differences),
        scale=scale,
        top_m=chips_top_m,
        sure=comparison.maps[0].measures.mae_m.interval_95 is not None,
    )


def _coarse(
    scores: Sequence[MapScore],
) -> tuple[tuple[str, tuple[Estimate | None, ...], Callable[[float | None], str]], ...]:
    rows: dict[str, dict[str, tuple[Estimate, Callable[[float | None], str]]]] = {}
    for score in scores:
        found: list[tuple[str, Estimate, Callable[[float | None], str]]] = []
        if (blocks := score.blocks) is not None:
            over = f"of means over {blocks.side_m:g} m blocks ({count(blocks.n)})"
            found += [
                (f"R² {over}", blocks.r2, ratio),
                (f"RMSE {over}, m", blocks.rmse_m, metres),
                (f"MAE {over}, m", blocks.mae_m, metres),
                *(
                    []
                    if (held := blocks.coverage) is None
                    else [
                        (f"inside the 90 % interval {over}, %", held.coverage, percent),
                        (f"mean width of the 90 % interval {over}, m", held.mean_width_m, metres),
                    ]
                ),
            ]
        if (edges := score.edges) is not None:
            found += [
                ("edge error, m per m: how far the steepness of the canopy is off", edges.error, ratio),
                ("edge bias, m per m: negative where the map is too smooth", edges.bias, signed),
                ("steepness of the reference, m per m: the edge error of a flat map", edges.reference_mean, ratio),
            ]
        for cover in score.cover:
            found.append((f"tree cover from {cover.threshold_m:g} m: intersection over union", cover.iou, ratio))
        for name, estimate, write in found:
            rows.setdefault(name, {})[score.name] = (estimate, write)
    return tuple(
        (name, tuple(by_map[s.name][0] if s.name in by_map else None for s in scores), next(iter(by_map.values()))[1])
        for name, by_map in rows.items()
    )


def _facts(infos: Sequence[MapInfo]) -> tuple[tuple[str, tuple[str, ...]], ...]:
    """What is known of the maps: name of the fact, and its value for each; facts that none has are left out."""
    columns = []
    for info in infos:
        models = info.models
        columns.append({
            "kind": info.kind,
            "file": info.path,
            "model": "; ".join(f"{model.name} {model.version}" for model in models),
            "weights, SHA-256": "; ".join(model.weights_sha256[:16] + "…" for model in models),
            "licence of the model": "; ".join(dict.fromkeys(model.licence for model in models if model.licence)),
            "trained on": "; ".join(some(model.sites) if model.sites else "unknown" for model in models),
            "lineage": info.lineage,
            "heights are": info.statistic,
            "pixels": f"{info.gsd_m:.4g} m",
            "CRS": info.crs,
            "date of the imagery": info.date or "unknown",
            "unit of the file": "" if info.unit_m == 1 else f"{info.unit_m:g} m",
            "90 % intervals": "one for each pixel" if info.has_intervals else "none",
            "calibration": info.calibration or "",
        })  # fmt: skip
    return tuple(
        (name, tuple(column[name] or DASH for column in columns))
        for name in columns[0]
        if any(column[name] for column in columns)
    )


def _about(comparison: Comparison) -> str:
    if comparison.grid is not None:
        place = f"pixels of {comparison.grid.gsd_m:g} m"
    else:
        assert comparison.footprints is not None, "a comparison has either pixels or footprints"
        place = f"{comparison.footprints.shape}, {comparison.footprints.map_statistic} of the map"
    return f"{capitalised(comparison.statistic)}; {place}; {comparison.mask}. Bias = map minus reference."


def _summary(score: MapScore, info: MapInfo, comparison: Comparison, unit: str) -> tuple[str, ...]:
    """What was found for one map, in sentences that claim no more than the intervals allow."""
    measures = score.measures
    where = f" of {comparison.grid.gsd_m:g} m" if comparison.grid is not None else ""
    if not measures.n:
        return (f"No {unit} could be compared, so nothing can be said of “{score.name}”.",)
    side = "" if comparison.square_m is None else f" of {comparison.square_m:g} m"
    squares = f"one square{side}" if measures.squares == 1 else f"{count(measures.squares)} squares{side}"
    kind = "map" if info.kind == "canopy map" else info.kind
    on = f"{count(measures.n)} {unit}{where} in {squares} of ground"
    said = [f"The {kind} “{score.name}” was compared with {_last(comparison.reference.name)} on {on}."]
    if score.n_missing:
        said.append(f"It has no height at {count(score.n_missing)} more {unit} that have a reference.")
    said += [_bias_said(measures.bias_m), _error_said(score)]
    if score.intervals is not None:
        said += _held(score.intervals, unit)
    if measures.mae_m.interval_95 is None:
        said.append("How sure these numbers are cannot be said: intervals need at least two squares of ground.")
    elif measures.squares < LEAST_SQUARES:
        said.append(f"Intervals from fewer than {LEAST_SQUARES} squares of ground are too narrow to be trusted.")
    return tuple(_unbroken(sentence) for sentence in said)


def _last(name: str) -> str:
    """A name as it is, a path by its last part: sentences are to be read; the table of facts has the rest."""
    return PurePath(name).name or name


def _unbroken(sentence: str) -> str:
    """A sentence in which no line ends between a number and its unit."""
    return re.sub(r"(?<=\d) (?=(m|%)(?![\w]))", "\u00a0", sentence)


def _bias_said(bias: Estimate) -> str:
    assert bias.value is not None, "pixels were compared, and have no bias"
    size = f"{metres(abs(bias.value))} m"
    way = "too tall" if bias.value > 0 else "too low"
    if bias.interval_95 is None:
        return f"On average it is {size} {way}."
    low, high = bias.interval_95
    if low <= 0 <= high:
        return f"A bias is not shown: the mean error is {signed(bias.value)} m (95 % interval {span(bias, signed)} m)."
    return f"On average it is {size} {way} (bias {signed(bias.value)} m, 95 % interval {span(bias, signed)} m)."


def _error_said(score: MapScore) -> str:
    m = score.measures
    sure = f" (95 % interval {span(m.mae_m)} m)" if m.mae_m.interval_95 else ""
    r2 = "R² does not exist, as the reference does not vary" if m.r2.value is None else f"R² is {ratio(m.r2.value)}"
    also = f" ({span(m.r2, ratio)})" if m.r2.interval_95 else ""
    size = f"A height is off by {metres(m.mae_m.value)} m on average{sure}"
    return f"{size}; the RMSE is {metres(m.rmse_m.value)} m and {r2}{also}."


def _held(intervals: Intervals, unit: str) -> list[str]:
    """Whether the promise of the intervals held, over all and in the classes."""
    promised, coverage = intervals.nominal, intervals.overall.coverage
    if coverage.value is None:
        return [f"None of the {unit} has an interval, so whether its 90 % intervals hold is unknown."]
    sure = f", 95 % interval {span(coverage, percent)} %" if coverage.interval_95 else ""
    width = intervals.overall.mean_width_m.value
    share = f"{percent(coverage.value)} % of the references are inside them{sure}"
    share += "" if width is None else f"; on average they are {metres(width)} m wide"
    match _off(coverage, promised, HELD):
        case -1:
            said = [f"Its {100 * promised:g} % intervals did not hold: {share}."]
        case 1:
            said = [f"Its {100 * promised:g} % intervals are wider than they promise: {share}."]
        case _:
            said = [f"Its {100 * promised:g} % intervals held: {share}."]
    short_of = [each for each in intervals.by_predicted_height if _off(each.coverage, promised, HELD_IN_A_CLASS) < 0]
    if short_of:
        classes = ", ".join(f"{pretty(each.label)} ({percent(each.coverage.value)} %)" for each in short_of)
        said.append(f"They hold too few where the map says {classes}.")
    return said


def _off(coverage: Estimate, promised: float, tolerance: float) -> int:
    """-1 where the intervals hold too few, 1 too many, 0 where they are near enough or the promise is not excluded."""
    if coverage.value is None or abs(coverage.value - promised) <= tolerance + 1e-9:
        return 0
    if coverage.interval_95 is not None and coverage.interval_95[0] <= promised <= coverage.interval_95[1]:
        return 0
    return -1 if coverage.value < promised else 1


def verdict(difference: Difference, squares: int) -> str:
    """Which of two maps is better, claimed only where the interval of the difference excludes 0.

    Args:
        difference: Of the two.
        squares: Squares of ground that the interval was drawn from; it is not trusted where they are few.
    """
    return _unbroken(_verdict(difference, squares))


def _verdict(difference: Difference, squares: int) -> str:
    first, other, mae = f"“{difference.first}”", f"“{difference.other}”", difference.mae_m
    if mae.value is None:
        return f"{first} and {other} cannot be compared: they have no pixels in common."
    size = f"{metres(abs(mae.value))} m"
    if mae.interval_95 is None:
        way = "smaller" if mae.value < 0 else "larger"
        return (
            f"The mean absolute error of {first} is {size} {way} than that of {other} here; without an interval it is not "
            "claimed that it would be elsewhere."
        )
    if squares < LEAST_SQUARES:
        way = "smaller" if mae.value < 0 else "larger"
        return (
            f"The mean absolute error of {first} is {size} {way} than that of {other} here; from fewer than {LEAST_SQUARES} "
            "squares of ground it is not claimed that it would be elsewhere."
        )
    low, high = mae.interval_95
    ends = f"95 % interval of the difference {span(mae, signed)} m"
    if high < 0:
        return f"{first} is better than {other}: its mean absolute error is {size} smaller ({ends})."
    if low > 0:
        return f"{other} is better than {first}: its mean absolute error is {size} smaller ({ends})."
    size = f"the difference in mean absolute error is {signed(mae.value)} m"
    return f"Neither {first} nor {other} is shown to be better: {size} ({ends})."

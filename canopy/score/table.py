"""A score as lines for the terminal; every table says what its heights mean, on which cells, what counts and the sign."""

from __future__ import annotations

from canopy.score.result import Comparison, Estimate, MapInfo, MapScore, Measures, ScoreResult

_COLUMNS = ("map", "n", "lacks", "MAE m", "RMSE m", "bias m", "R²", "block R²", "edge", "IoU 2 m", "IoU 5 m", "held 90 %")


def lines(result: ScoreResult) -> list[str]:
    """What the command says."""
    found = [f"LEAK: {leak.finding}" for leak in result.leaks]
    for comparison in result.comparisons:
        found += ["", *_comparison(comparison, result)]
    found += ["", f"lineage: {result.lineage}"]
    found += [f"note: {warning}" for warning in result.warnings if not warning.startswith("LEAK")]
    return found[1:] if found[0] == "" else found


def _comparison(comparison: Comparison, result: ScoreResult) -> list[str]:
    mark = "LEAK - " if result.leaked else ""
    grid = "footprints" if comparison.grid is None else f"GSD {comparison.grid.gsd_m:g} m, {comparison.grid.chosen}"
    head = [
        f"{mark}{comparison.title}: {comparison.reference.name} ({grid})",
        f"  {comparison.statistic}",
        f"  counted: {comparison.mask}; {result.sign}",
    ]
    infos = {info.name: info for info in result.maps}
    head += [f"  {_about(infos[score.name])}" for score in comparison.maps]
    rows = [_COLUMNS, *(_row(score) for score in comparison.maps)]
    rows += [_registered(s) for s in comparison.maps if s.registered is not None and s.registered.measures is not None]
    widths = [max(len(row[k]) for row in rows) for k in range(len(_COLUMNS))]
    table = [
        "  " + "  ".join([row[0].ljust(widths[0]), *(text.rjust(w) for text, w in zip(row[1:], widths[1:], strict=True))])
        for row in rows
    ]
    return [*head, *table, *_sure(comparison)]


def _about(info: MapInfo) -> str:
    taken = "imagery of unknown date" if info.date is None else f"imagery of {info.date}"
    return f"{info.name}: pixels of {info.gsd_m:.4g} m, heights: {info.statistic}; {taken}"


def _sure(comparison: Comparison) -> list[str]:
    """Intervals of the first map, and how the others differ from it."""
    first = comparison.maps[0]
    m = first.measures
    ends = [
        f"{name} {each.interval_95[0]:.2f} to {each.interval_95[1]:.2f}"
        for name, each in (("MAE", m.mae_m), ("RMSE", m.rmse_m), ("bias", m.bias_m), ("R²", m.r2))
        if each.interval_95 is not None
    ]
    side = "" if comparison.square_m is None else f" of {comparison.square_m:g} m"
    said = [f"  {first.name}, 95 % intervals from {m.squares} squares{side}: {', '.join(ends)}"] if ends else []
    for each in comparison.differences:
        if each.mae_m.interval_95 is not None and each.mae_m.value is not None:
            low, high = each.mae_m.interval_95
            said.append(f"  MAE of {each.first} minus {each.other}: {each.mae_m.value:+.2f} m ({low:+.2f} to {high:+.2f})")
    return said


def _row(score: MapScore) -> tuple[str, ...]:
    m = score.measures
    return (
        score.name, f"{m.n:,}", f"{score.n_missing:,}", *_errors(m),
        "-" if score.blocks is None else _text(score.blocks.r2), "-" if score.edges is None else _text(score.edges.error),
        *(_text(cover.iou) for cover in score.cover),
        "-" if score.intervals is None else _text(score.intervals.overall.coverage, ".1%"),
    )  # fmt: skip


def _registered(score: MapScore) -> tuple[str, ...]:
    registered = score.registered
    assert registered is not None, "not registered"
    m, blocks, edges = registered.measures, registered.blocks, registered.edges
    assert m is not None, "nothing registered"
    moved = [shift for shift in registered.shifts if shift.applied]
    first = moved[0]
    how = f"x {first.x_m:+.1f} y {first.y_m:+.1f} m" if len(moved) == 1 else f"{len(moved)} sites"
    return (
        f"{score.name}, moved by {how}", f"{m.n:,}", "", *_errors(m),
        "-" if blocks is None else _text(blocks.r2), "-" if edges is None else _text(edges.error), "-", "-", "-",
    )  # fmt: skip


def _errors(measures: Measures) -> tuple[str, ...]:
    return _text(measures.mae_m), _text(measures.rmse_m), _text(measures.bias_m, "+.2f"), _text(measures.r2)


def _text(estimate: Estimate, pattern: str = ".2f") -> str:
    return "-" if estimate.value is None else format(estimate.value, pattern)

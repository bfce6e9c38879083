"""A tile set to look at: counts, heights, shifts, dates, maps and contact sheets, as PNGs and one self-contained page.

`inspect_tile_set` reads the index whole and the chips one after the other: heights become counts per metre, which add up,
and pictures are drawn of a fixed number of chips only. So memory follows the number of rows of the index and not the
pixels, and a set of 10 000 chips is inspected like one of 50.

How the page looks and what makes it self-contained is in `canopy.page`.
"""

from __future__ import annotations

import math
import os
import re
import textwrap
import tomllib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from canopy.errors import OutputError, RecipeError
from canopy.page import (
    FIGURE_WIDTH_IN,
    Drawn,
    enlarge,
    json_for_html,
    photograph,
    photograph_uri,
    plain,
    plain_axes,
    png_of,
    render_page,
)
from canopy.raster import Pixels, read_raster
from canopy.tiler.chips import INDEX, read_chip, read_index
from canopy.tiler.quality import CHECKS, ChipFacts, JudgedChip, QualitySettings, judge, judge_set

if TYPE_CHECKING:
    import geopandas as gpd
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

PAGE: Final = "index.html"
TEMPLATE: Final = "inspection.html.j2"

SHEET_CHIPS: Final = 24
"""Chips on each of the two contact sheets."""
PICTURE_PX: Final = 208
"""Side of one picture on the page; smaller chips are enlarged by whole factors, larger ones thinned."""
MAP_PANELS: Final = 24
"""Maps drawn at most; what is left out is said on the page."""
OUTLINE_M: Final = 5.0
"""Heights above this are outlined on the photographs."""

SPLITS: Final = {
    "train": ("#0072B2", "o"),
    "val": ("#E69F00", "s"),
    "test": ("#009E73", "^"),
    "buffer": ("#999999", "."),
    "dropped": ("#D55E00", "X"),
}
"""Colour and marker of each split; a name that is not here is drawn in purple with a plus."""
OTHER_SPLIT: Final = ("#CC79A7", "P")


@dataclass(frozen=True, slots=True, kw_only=True)
class InspectionReport:
    """What was written and the counts that are on the page."""

    page: Path
    """The self-contained HTML file."""
    pngs: tuple[Path, ...]
    """Charts, maps and contact sheets, each also inside the page."""
    chips: int
    by_site_split: dict[str, dict[str, int]]
    """Chips of each split at each site."""
    by_quality: dict[str, int]
    """Chips kept, flagged and dropped; empty when they were never judged."""
    by_check: dict[str, int]
    """Chips in which each check found something."""
    notes: tuple[str, ...]
    """What the page cannot show, and why."""


class HeightCounts:
    """Pixels per metre of height and split; two of them add up, so chips may be read in any order and grouping."""

    def __init__(self, counts: Mapping[str, Mapping[int, int]] | None = None) -> None:
        self._counts = {split: Counter(by_metre) for split, by_metre in (counts or {}).items()}

    @classmethod
    def of(cls, split: str, height_m: NDArray[np.float32]) -> HeightCounts:
        """The counts of one chip; unknown heights are left out."""
        metres = np.floor(height_m[np.isfinite(height_m)]).astype(np.int64)
        first = int(metres.min(initial=0))
        counts = np.bincount(metres - first)
        return cls({split: {first + int(i): int(counts[i]) for i in np.flatnonzero(counts)}})

    def __add__(self, other: HeightCounts) -> HeightCounts:
        splits = self._counts.keys() | other._counts.keys()
        nothing: Counter[int] = Counter()
        return HeightCounts({s: self._counts.get(s, nothing) + other._counts.get(s, nothing) for s in splits})

    @property
    def splits(self) -> list[str]:
        """Names of the splits, in their usual order."""
        return sorted(self._counts, key=_split_order)

    def shares(self, split: str) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
        """(metres, share of the split's known pixels in [metre, metre + 1)), without gaps."""
        counts = self._counts[split]
        if not counts:
            return np.zeros(0, np.int64), np.zeros(0)
        metres = np.arange(min(counts), max(counts) + 1)
        values = np.array([counts.get(int(metre), 0) for metre in metres], np.float64)
        return metres, values / values.sum()

    def quantile_m(self, share: float) -> float:
        """The height, to the metre above, below which this share of all pixels lies; 1 when there are none."""
        everything = sum(self._counts.values(), Counter())
        metres = np.array(sorted(everything))
        if not metres.size:
            return 1.0
        passed = np.cumsum([everything[int(metre)] for metre in metres])
        return float(metres[np.searchsorted(passed, share * passed[-1])]) + 1.0


def inspect_tile_set(
    tile_set: Path,
    out: Path | None = None,
    *,
    settings: QualitySettings | None = None,
    sheet_chips: int = SHEET_CHIPS,
    progress: Callable[[int, int], None] | None = None,
) -> InspectionReport:
    """Draw a tile set and write `index.html` and its PNGs.

    Args:
        tile_set: Folder of a tile set, also one that was built before chips were judged or registered.
        out: Folder for the page; default `inspection` in the tile set. Files of the same names are replaced.
        settings: Judge every chip now with these limits, in place of the verdicts in the index. What a tile set does not
            hold (classes of the returns, densities, the score before registration) is unknown then, and duplicates are not
            looked for.
        sheet_chips: Chips on each of the two contact sheets.
        progress: Called with the number of chips read and the number of all.

    Raises:
        RecipeError: no tile set, or one without its columns.
        RasterError: a chip's file is missing or damaged.
        OutputError: the folder cannot be written.
    """
    index = read_index(tile_set)
    if not len(index):
        raise RecipeError(f"{tile_set} has no chips; build it again with a recipe that covers some imagery and heights")
    out = tile_set / "inspection" if out is None else out
    recipe, notes = _recipe(tile_set)
    judged = settings is not None or _was_judged(tile_set, recipe)
    heights, index = _read_heights(tile_set, index, settings, progress)
    if settings is not None:
        notes.append(
            "The chips were judged for this page, with the standard limits and without looking for duplicates. The index "
            "did not change."
        )
    elif not judged:
        notes.append(
            "The chips of this set were never judged (no quality checks when it was built). canopy tile inspect --judge "
            "judges them now; a [quality] table in the recipe judges them when they are built."
        )
    pictures = {
        "heights": _heights_figure(heights),
        "validity": _validity_figure(index),
        "gaps": _gaps_figure(index, notes),
        "shifts": _shifts_figure(index, notes),
    }
    figures = [
        Drawn(name=name, **_CAPTIONS[name], png=png_of(figure)) for name, figure in pictures.items() if figure is not None
    ]
    maps = [
        Drawn(name=f"map_{_file_name(title)}", title=title, alt=alt, png=png_of(figure))
        for title, alt, figure in _maps(index, recipe, notes)
    ]
    top_m = max(heights.quantile_m(0.99), 5.0)
    best, worst = choose_chips(index, sheet_chips, judged=judged)
    sheets = {
        name: [_card(tile_set, row, top_m, judged=judged) for row in rows.itertuples(index=False)]
        for name, rows in (("best", best), ("worst", worst))
    }
    titles = _SHEET_TITLES[judged]
    report = _report(index, judged=judged)
    page = _render(
        tile_set=tile_set, index=index, report=report, figures=figures, maps=maps, sheets=sheets, titles=titles, top_m=top_m,
        recipe=recipe, notes=notes, judged=judged,
    )  # fmt: skip
    written: list[Path] = []
    try:
        out.mkdir(parents=True, exist_ok=True)
        written += [_write(out / f"{drawn.name}.png", drawn.png) for drawn in (*figures, *maps)]
        for name, cards in sheets.items():
            if cards:
                written.append(_write(out / f"{name}.png", png_of(_sheet_figure(cards, titles[name], top_m))))
        _write(out / PAGE, page.encode())
    except OSError as error:
        raise OutputError(f"cannot write {out}: {error.strerror}; choose another folder with --out") from error
    return InspectionReport(
        page=out / PAGE, pngs=tuple(written), chips=report["chips"], by_site_split=report["by_site_split"],
        by_quality=report["by_quality"], by_check=report["by_check"], notes=tuple(notes),
    )  # fmt: skip


def _write(path: Path, data: bytes) -> Path:
    part = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        part.write_bytes(data)
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)
    return path


# --- what the set says ---------------------------------------------------------------------------------------------------


def _recipe(tile_set: Path) -> tuple[dict[str, Any], list[str]]:
    """The recipe's table as it stands in the set; empty, with a note, where it is not there."""
    try:
        return tomllib.loads((tile_set / "recipe.toml").read_text(encoding="utf-8")), []
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError):
        return {}, ["The set holds no readable recipe.toml, so the size of its blocks is not known and they are not drawn."]


def _was_judged(tile_set: Path, recipe: Mapping[str, Any]) -> bool:
    """Whether verdicts are in the index: `read_index` fills them in where they are not."""
    import pyarrow.parquet as pq

    return "quality" in pq.read_schema(tile_set / INDEX).names and "quality" in recipe


def _read_heights(
    tile_set: Path,
    index: gpd.GeoDataFrame,
    settings: QualitySettings | None,
    progress: Callable[[int, int], None] | None,
) -> tuple[HeightCounts, gpd.GeoDataFrame]:
    """Pass over all chips once: count their heights and, with `settings`, judge them into a copy of the index."""
    counts = HeightCounts()
    verdicts = []
    for number, row in enumerate(index.itertuples(index=False), start=1):
        if settings is None:
            height_m = read_raster(tile_set / "height" / f"{row.id}.tif")[0].data[0]
        else:
            image, height_m = read_chip(tile_set, row.id)
            verdict = judge(_facts(row, image, height_m), settings)
            verdicts.append(JudgedChip(id=row.id, site=row.site, verdict=verdict))
        counts += HeightCounts.of(row.split, height_m)
        if progress is not None:
            progress(number, len(index))
    if settings is None:
        return counts, index
    found = judge_set(verdicts, settings)
    return counts, index.assign(
        quality=[found[chip].decision for chip in index["id"]],
        flags=[found[chip].flags for chip in index["id"]],
        reasons=[found[chip].reasons for chip in index["id"]],
    )


def _facts(row: Any, image: Pixels, height_m: NDArray[np.float32]) -> ChipFacts:
    return ChipFacts(
        image=image,
        height_m=height_m,
        gsd_m=row.gsd_m,
        image_date=_or_none(row.image_date),
        lidar_date=_or_none(row.lidar_date),
        gap_days=_or_none(row.gap_days),
        latitude_deg=row.geometry.centroid.y,
    )


def _or_none(value: Any) -> Any:
    """A missing value of pandas as None."""
    import pandas as pd

    return None if pd.isna(value) else value


def _split_order(split: str) -> tuple[int, str]:
    known = list(SPLITS)
    return (known.index(split) if split in known else len(known), split)


def _report(index: gpd.GeoDataFrame, *, judged: bool) -> dict[str, Any]:
    by_site_split = {
        str(site): {
            split: int(n) for split, n in sorted(rows["split"].value_counts().items(), key=lambda kv: _split_order(kv[0]))
        }
        for site, rows in index.groupby("site")
    }
    order = {"keep": 0, "flag": 1, "drop": 2}
    quality = index["quality"].value_counts().to_dict() if judged else {}
    found = Counter(name for flags in index["flags"] for name in flags.split(";") if name) if judged else Counter()
    return {
        "chips": len(index),
        "by_site_split": by_site_split,
        "by_quality": {name: int(quality.get(name, 0)) for name in order} if judged else {},
        "by_check": {name: found[name] for name in (*CHECKS, *sorted(found.keys() - set(CHECKS))) if found[name]},
    }


def choose_chips(index: gpd.GeoDataFrame, count: int, *, judged: bool) -> tuple[gpd.GeoDataFrame, gpd.GeoDataFrame]:
    """The best and the worst chips of a set, each at most `count` and no chip in both.

    The worst are those dropped, then those flagged, most findings first, but one of each kind of findings before the second
    of any, and one of each block before its second: forty chips of one river do not hide the one with stripes. The best are
    kept chips with the most known heights, site by site and block by block in the same way. Where nobody judged, best and
    worst are those with the most and the fewest known heights.
    """
    table = index.assign(findings=[flags.count(";") + 1 if flags else 0 for flags in index["flags"]])
    ranked = table.sort_values(["valid_fraction", "id"], ascending=[False, True])
    if judged:
        bad = table[table["quality"] != "keep"]
        bad = bad.sort_values(["quality", "findings", "valid_fraction", "id"], ascending=[True, False, True, True])
        return _in_turn(ranked[ranked["quality"] == "keep"], "site", count), _in_turn(bad, "flags", count)
    half = len(ranked) // 2
    full, empty = ranked.head(len(ranked) - half), ranked.tail(half).iloc[::-1]
    return _in_turn(full, "site", count), _in_turn(empty, "site", count)


def _in_turn(rows: gpd.GeoDataFrame, key: str, count: int) -> gpd.GeoDataFrame:
    """The first `count` rows when each value of `key` gives one in turn, and within it each block; else in their order."""
    rows = rows.assign(turn=rows.groupby([key, "block"], sort=False).cumcount()).sort_values("turn", kind="stable")
    return rows.assign(turn=rows.groupby(key, sort=False).cumcount()).sort_values("turn", kind="stable").head(count)


# --- charts --------------------------------------------------------------------------------------------------------------

_CAPTIONS: Final = {
    "heights": {
        "title": "Heights by split",
        "alt": "Share of the known pixels in each metre of height, one line for each split, on a logarithmic scale.",
    },
    "validity": {
        "title": "Known heights per chip",
        "alt": "Number of chips by the share of their pixels with a known height, stacked by split.",
    },
    "gaps": {
        "title": "Days between image and LiDAR",
        "alt": "Number of chips by the days between image and LiDAR, stacked by split.",
    },
    "shifts": {
        "title": "Measured shifts of the heights",
        "alt": "Shift of the heights against the image in metres east and north, filled where applied, crossed where kept.",
    },
}


def _heights_figure(heights: HeightCounts) -> Figure:
    figure, axes = plain_axes()
    styles = ("-", "--", "-.", ":", (0, (1, 1)))
    for number, split in enumerate(heights.splits):
        metres, shares = heights.shares(split)
        if not metres.size:
            continue
        axes.stairs(
            100 * shares, np.append(metres, metres[-1] + 1), color=SPLITS.get(split, OTHER_SPLIT)[0], label=split,
            linestyle=styles[number % len(styles)], linewidth=1.8, baseline=None,
        )  # fmt: skip
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.set_xlabel("height above ground (m)")
    axes.set_ylabel("pixels of the split (% per metre)")
    axes.legend(frameon=False)
    return figure


def _stacked(axes: Axes, index: gpd.GeoDataFrame, values: NDArray[np.float64], edges: NDArray[np.float64]) -> None:
    from matplotlib.ticker import MaxNLocator

    hatches = ("", "//", "..", "xx", "\\\\")
    floor = np.zeros(len(edges) - 1)
    for number, split in enumerate(sorted(set(index["split"]), key=_split_order)):
        chosen = values[(index["split"] == split).to_numpy()]
        counts, _ = np.histogram(chosen[np.isfinite(chosen)], edges)
        axes.bar(
            edges[:-1], counts, np.diff(edges), bottom=floor, align="edge", label=split, edgecolor="white", linewidth=0.5,
            color=SPLITS.get(split, OTHER_SPLIT)[0], hatch=hatches[number % len(hatches)],
        )  # fmt: skip
        floor += counts
    axes.yaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_ylabel("chips")
    axes.legend(frameon=False)


def _validity_figure(index: gpd.GeoDataFrame) -> Figure:
    figure, axes = plain_axes()
    _stacked(axes, index, 100 * index["valid_fraction"].to_numpy(np.float64), np.linspace(0, 100, 26))
    axes.set_xlabel("pixels of the chip with a known height (%)")
    return figure


def _gaps_figure(index: gpd.GeoDataFrame, notes: list[str]) -> Figure | None:
    days = index["gap_days"].astype("Float64").to_numpy(np.float64, na_value=np.nan)
    unknown = int(np.isnan(days).sum())
    if unknown == len(days):
        notes.append("No chip has the dates of both image and LiDAR, so the gap between them is unknown.")
        return None
    if unknown:
        notes.append(
            f"{unknown} of {len(days)} chips lack the date of image or LiDAR and are not in the chart of date gaps."
        )
    figure, axes = plain_axes()
    most = max(float(np.nanmax(days)), 30.0)
    step = next((step for step in (1, 2, 5, 10, 20, 30, 60, 90, 182.5, 365) if most / step <= 40), most / 40)
    _stacked(axes, index, days, np.arange(0, most + 1.01 * step, step))
    axes.set_xlabel("days between image and LiDAR")
    return figure


def _shifts_figure(index: gpd.GeoDataFrame, notes: list[str]) -> Figure | None:
    shift = index[["shift_x_m", "shift_y_m"]].to_numpy(np.float64)
    measured = np.isfinite(shift).all(axis=1)
    if not measured.any():
        notes.append("No shift between image and heights was measured: the set was built without registration.")
        return None
    if not measured.all():
        notes.append(f"No shift could be measured on {int((~measured).sum())} of {len(shift)} chips.")
    figure, axes = plain_axes(5.2)
    applied = index["shift_applied"].to_numpy(bool)
    axes.axhline(0, color="#bbbbbb", linewidth=0.8)
    axes.axvline(0, color="#bbbbbb", linewidth=0.8)
    for which, label, style in (
        (~applied & measured, "kept as it was", {"marker": "x", "color": "#D55E00"}),
        (applied & measured, "applied", {"marker": "o", "color": "#0072B2", "edgecolor": "white", "linewidth": 0.4}),
    ):
        axes.scatter(shift[which, 0], shift[which, 1], s=26, alpha=0.75, label=f"{label} ({int(which.sum())})", **style)
    reach = max(1.0, 1.1 * float(np.abs(shift[measured]).max()))
    axes.set(
        xlim=(-reach, reach), ylim=(-reach, reach), aspect="equal", xlabel="shift to the east (m)", ylabel="to the north (m)"
    )
    axes.legend(frameon=False)
    return figure


# --- maps ----------------------------------------------------------------------------------------------------------------


def _maps(index: gpd.GeoDataFrame, recipe: Mapping[str, Any], notes: list[str]) -> Iterator[tuple[str, str, Figure]]:
    """(title, alternative text, figure) of each group of neighbouring sites, the largest groups first."""
    block_m = recipe.get("split", {}).get("block_m")
    groups = []
    for crs, rows in index.groupby("crs", sort=True):
        local = rows.to_crs(crs) if str(crs).startswith("EPSG:") else rows.to_crs(rows.estimate_utm_crs())
        groups += [(sites, local[local["site"].isin(sites)]) for sites in _neighbours(local)]
    groups.sort(key=lambda group: (-len(group[1]), group[0]))
    if len(groups) > MAP_PANELS:
        hidden = sum(len(rows) for _, rows in groups[MAP_PANELS:])
        notes.append(
            f"Maps show the {MAP_PANELS} largest areas; {len(groups) - MAP_PANELS} with {hidden} chips are not drawn."
        )
    for sites, rows in groups[:MAP_PANELS]:
        title = ", ".join(sites[:4]) + (f" and {len(sites) - 4} more" if len(sites) > 4 else "")
        splits = ", ".join(
            f"{n} {split}" for split, n in sorted(rows["split"].value_counts().items(), key=lambda kv: _split_order(kv[0]))
        )
        yield title, f"Map of the chips of {title} by split ({splits}), with their blocks.", _map(rows, block_m)


def _neighbours(rows: gpd.GeoDataFrame) -> list[list[str]]:
    """Sites whose extents, widened by half, overlap, put together."""
    groups: list[tuple[list[str], NDArray[np.float64]]] = []
    for site, part in rows.groupby("site", sort=True):
        names, bounds = [str(site)], part.total_bounds
        apart = []
        for others, theirs in groups:
            if _near(bounds, theirs):
                names, bounds = (
                    names + others,
                    np.concatenate([np.minimum(bounds[:2], theirs[:2]), np.maximum(bounds[2:], theirs[2:])]),
                )
            else:
                apart.append((others, theirs))
        groups = [*apart, (names, bounds)]
    return [sorted(names) for names, _ in groups]


def _near(one: NDArray[np.float64], other: NDArray[np.float64]) -> bool:
    margin = 0.5 * max(float((bounds[2:] - bounds[:2]).max()) for bounds in (one, other))
    return bool((one[:2] - margin < other[2:]).all() and (other[:2] - margin < one[2:]).all())


def _map(rows: gpd.GeoDataFrame, block_m: float | None) -> Figure:
    """Chips in local metres; a chip too small to see gets a marker at its centre."""
    from matplotlib.collections import PolyCollection
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    left, bottom, right, top = rows.total_bounds
    corner = rows.geometry.iloc[[0]].to_crs(4326).iloc[0].centroid
    width, height = right - left, top - bottom
    extent = 1.08 * max(width, height)
    shape = min(max(height / max(width, 1e-9), 0.4), 1.25)
    figure = Figure(figsize=(FIGURE_WIDTH_IN, 1.1 + shape * (FIGURE_WIDTH_IN - 1.2)), layout="constrained")
    axes = figure.subplots()
    plain(axes)
    axes.grid(visible=False)
    unit, name = (1000.0, "km") if extent > 5000 else (1.0, "m")
    outlines = [(np.asarray(shape.exterior.coords) - (left, bottom)) / unit for shape in rows.geometry]
    centres = np.array([(outline.min(0) + outline.max(0)) / 2 for outline in outlines])
    chip = float(np.median([np.ptp(outline, axis=0).max() for outline in outlines])) * unit
    tiny = chip < 0.012 * extent
    splits = rows["split"].to_numpy()
    quality = rows["quality"].to_numpy()
    handles: list[Any] = []
    for split in sorted(set(splits), key=_split_order):
        colour, marker = SPLITS.get(split, OTHER_SPLIT)
        here = np.flatnonzero(splits == split)
        if tiny:
            axes.scatter(
                centres[here, 0], centres[here, 1], s=30, marker=marker, color=colour, alpha=0.85, linewidth=0, zorder=3
            )
            handles.append(Line2D([], [], color=colour, marker=marker, linestyle="", label=f"{split} ({len(here)})"))
        else:
            axes.add_collection(
                PolyCollection([outlines[i] for i in here], facecolor=colour, edgecolor="white", linewidth=0.5, alpha=0.5)
            )
            handles.append(Patch(color=colour, alpha=0.5, label=f"{split} ({len(here)})"))
    for level, marker in (("flag", "D"), ("drop", "x")):
        here = np.flatnonzero(quality == level)
        if here.size:
            look: dict[str, Any] = {"color": "black", "marker": marker, "markerfacecolor": "none", "linestyle": ""}
            axes.plot(centres[here, 0], centres[here, 1], markersize=8 if tiny else 5, zorder=4, **look)
            handles.append(Line2D([], [], label=f"{level} ({len(here)})", **look))
    squares = [(square - (left, bottom)) / unit for square in _block_squares(rows, block_m)]
    if squares:
        line: dict[str, Any] = {"facecolor": "none", "edgecolor": "#6e7781", "linewidth": 0.8}
        axes.add_collection(PolyCollection(squares, zorder=2, **line))
        handles.append(Patch(label=f"block ({len(squares)})", **line))
    margin = 0.04 * extent / unit
    axes.set(xlim=(-margin, width / unit + margin), ylim=(-margin, height / unit + margin), aspect="equal")
    axes.set_xlabel(f"{name} east, in {rows.crs.to_string()}, near {corner.y:.3f}°, {corner.x:.3f}°")
    axes.set_ylabel(f"{name} north")
    figure.legend(handles=handles, loc="outside upper left", ncols=4, frameon=False, fontsize=8.5)
    return figure


def _block_squares(rows: gpd.GeoDataFrame, block_m: float | None) -> list[NDArray[np.float64]]:
    """Outlines (corner, xy) in the CRS of `rows` of the blocks its chips belong to; none where their size is unknown."""
    squares: list[NDArray[np.float64]] = []
    if block_m is None:
        return squares
    for block in sorted(set(rows["block"])):
        if match := re.fullmatch(r"EPSG:\d+/(-?\d+)/(-?\d+)", block):
            row, col = int(match[1]), int(match[2])
            corners = np.array([(col, -row), (col + 1, -row), (col + 1, -row - 1), (col, -row - 1)], np.float64)
            squares.append(corners * block_m)
    return squares


# --- chips ---------------------------------------------------------------------------------------------------------------

_SHEET_TITLES: Final = {
    True: {"best": "The best chips", "worst": "The worst chips"},
    False: {"best": "Chips with the most known heights", "worst": "Chips with the fewest known heights"},
}


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Card:
    """One chip on a contact sheet."""

    id: str
    site: str
    split: str
    quality: str
    facts: str
    reasons: tuple[str, ...]
    pictures: tuple[NDArray[np.uint8], ...]
    """(row, col, 3): the photograph, the same with tall pixels outlined, the heights."""

    @property
    def strip(self) -> NDArray[np.uint8]:
        """The pictures side by side."""
        gap = np.full((self.pictures[0].shape[0], 6, 3), 255, np.uint8)
        return np.concatenate([self.pictures[0], gap, self.pictures[1], gap, self.pictures[2]], axis=1)

    @property
    def data(self) -> str:
        return photograph_uri(self.strip)

    @property
    def alt(self) -> str:
        return f"Chip {self.id}: photograph, photograph with heights above {OUTLINE_M:g} m outlined, heights."


def _card(tile_set: Path, row: Any, top_m: float, *, judged: bool) -> _Card:
    image, height_m = read_chip(tile_set, row.id)
    return _Card(
        id=row.id,
        site=row.site,
        split=row.split,
        quality=row.quality if judged else "",
        facts=" · ".join(
            (
                f"{row.valid_fraction:.0%}\u00a0known",
                f"mean\u00a0{row.height_mean_m:.1f}\u00a0m",
                f"p95\u00a0{row.height_p95_m:.1f}\u00a0m",
            )
        ),
        reasons=tuple(reason for reason in row.reasons.split("; ") if reason),
        pictures=_pictures(image, height_m, top_m),
    )


def _pictures(image: Pixels, height_m: NDArray[np.float32], top_m: float) -> tuple[NDArray[np.uint8], ...]:
    from matplotlib import colormaps

    part = _imaged(image.valid)
    photo = enlarge(photograph(image)[part], PICTURE_PX)
    heights = enlarge(height_m[part], PICTURE_PX)
    tall = np.nan_to_num(heights, nan=0.0) > OUTLINE_M
    outlined = photo.copy()
    outlined[tall ^ ndimage.binary_erosion(tall, iterations=2, border_value=1)] = (240, 228, 66)
    # No colour beyond the scale is invented: what is higher has the scale's last colour, as the page says.
    coloured = colormaps["viridis"](np.minimum(np.nan_to_num(heights, nan=0.0) / top_m, 1.0))[..., :3]
    shown = np.where(np.isfinite(heights)[..., None], coloured, 0.85)
    shown[~enlarge(image.valid[part], PICTURE_PX)] = 1.0
    return photo, outlined, (255 * shown).astype(np.uint8)


def _imaged(valid: NDArray[np.bool_]) -> tuple[slice, slice]:
    """The smallest window around the imagery: padding is not worth looking at."""
    if not valid.any():
        return slice(None), slice(None)
    rows, cols = (np.flatnonzero(valid.any(axis=axis)) for axis in (1, 0))
    return slice(rows[0], rows[-1] + 1), slice(cols[0], cols[-1] + 1)


def _sheet_figure(cards: Sequence[_Card], title: str, top_m: float, per_line: int = 2) -> Figure:
    """A contact sheet as one picture, laid out by hand: each card is its strip under as many lines of text as it needs."""
    from matplotlib import colormaps
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize
    from matplotlib.figure import Figure

    width_in, gap_in, line_in = 6.0, 0.3, 0.145
    strips = [card.strip for card in cards]
    texts = []
    for card in cards:
        head = " · ".join(part for part in (card.split, card.quality, card.facts) if part)
        texts.append([card.id, head, *(line for reason in card.reasons for line in textwrap.wrap(reason, 98))])
    high_in = [
        width_in * strip.shape[0] / strip.shape[1] + line_in * len(text) for strip, text in zip(strips, texts, strict=True)
    ]
    lines_in = [max(high_in[first : first + per_line]) + gap_in for first in range(0, len(cards), per_line)]
    size_in = per_line * (width_in + gap_in) + gap_in, sum(lines_in) + 1.3
    figure = Figure(figsize=size_in)
    # One set of axes in inches from the upper left corner: forty of them take ten times as long to draw.
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set_axis_off()
    axes.text(gap_in, 0.2, title, fontsize=14, va="top")
    for number, (strip, text) in enumerate(zip(strips, texts, strict=True)):
        line, column = divmod(number, per_line)
        left_in, top_in = gap_in + column * (width_in + gap_in), 0.6 + sum(lines_in[:line])
        axes.text(left_in, top_in, "\n".join(text), fontsize=7.5, va="top", linespacing=1.25)
        top_in += line_in * len(text) + 0.04
        bottom_in = top_in + width_in * strip.shape[0] / strip.shape[1]
        axes.imshow(strip, interpolation="nearest", extent=(left_in, left_in + width_in, bottom_in, top_in))
    axes.set(xlim=(0, size_in[0]), ylim=(size_in[1], 0), aspect="auto")
    scale = ScalarMappable(Normalize(0, top_m), colormaps["viridis"])
    bar = figure.add_axes((gap_in / size_in[0], 0.48 / size_in[1], 3.0 / size_in[0], 0.12 / size_in[1]))
    figure.colorbar(scale, cax=bar, orientation="horizontal", label="height (m), grey: no height", extend="max")
    return figure


# --- the page ------------------------------------------------------------------------------------------------------------

_TABLE: Final = (
    ("id", "chip"), ("site", "site"), ("split", "split"), ("quality", "quality"), ("flags", "found"),
    ("valid_fraction", "known %"), ("height_mean_m", "mean m"), ("height_p95_m", "p95 m"), ("gap_days", "gap, days"),
    ("shift_m", "shift, m"), ("block", "block"),
)  # fmt: skip
"""Columns of the page's table: name here and heading."""


def _render(
    *,
    tile_set: Path,
    index: gpd.GeoDataFrame,
    report: Mapping[str, Any],
    figures: Sequence[Drawn],
    maps: Sequence[Drawn],
    sheets: Mapping[str, Sequence[_Card]],
    titles: Mapping[str, str],
    top_m: float,
    recipe: Mapping[str, Any],
    notes: Sequence[str],
    judged: bool,
) -> str:
    splits = sorted(set(index["split"]), key=_split_order)
    known = index["valid_fraction"].to_numpy(np.float64)
    sources = index[["site", "image_source", "lidar_source", "licence"]].drop_duplicates().sort_values("site")
    return render_page(
        "canopy.tiler",
        TEMPLATE,
        name=recipe.get("name", tile_set.resolve().name),
        report=report,
        notes=notes,
        totals=index["split"].value_counts().to_dict(),
        judged=judged,
        splits=splits,
        colours={split: SPLITS.get(split, OTHER_SPLIT)[0] for split in splits},
        gsd=", ".join(f"{gsd:g} m" for gsd in sorted(set(index["gsd_m"]))),
        chip_px=recipe.get("chip_px"),
        known=float(known.mean()),
        heights=(float(index["height_mean_m"].mean()), float(index["height_p95_m"].max())),
        checks={name: _first_line(name) for name in report["by_check"]},
        figures=figures,
        maps=maps,
        sheets=[(name, titles[name], cards) for name, cards in sheets.items()],
        sources=sources.to_dict("records"),
        top_m=top_m,
        outline_m=OUTLINE_M,
        columns=_TABLE,
        rows=json_for_html(_table_rows(index, judged=judged)),
    )


def _first_line(check: str) -> str:
    """What a check measures, as its settings say; a check this version does not know has no line."""
    if check not in QualitySettings.model_fields:
        return "A check that this version does not know."
    annotation = QualitySettings.model_fields[check].annotation
    assert annotation is not None, f"{check} has no type"
    return (annotation.__doc__ or "").strip().split("\n\n")[0].replace("\n", " ").replace("`", "")


def _table_rows(index: gpd.GeoDataFrame, *, judged: bool) -> list[list[Any]]:
    shift_m = np.hypot(index["shift_x_m"].to_numpy(np.float64), index["shift_y_m"].to_numpy(np.float64))
    rows = []
    for row, shift in zip(index.itertuples(index=False), shift_m, strict=True):
        gap = _or_none(row.gap_days)
        rows.append([
            row.id, row.site, row.split, row.quality if judged else "", row.flags.replace(";", ", ") if judged else "",
            round(100 * row.valid_fraction, 1), round(row.height_mean_m, 2), round(row.height_p95_m, 2),
            None if gap is None else int(gap), None if math.isnan(shift) else round(float(shift), 2), row.block,
        ])  # fmt: skip
    return rows


def _file_name(title: str) -> str:
    return re.sub(r"[^A-Za-z0-9_-]+", "_", title).strip("_")

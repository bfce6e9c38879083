"""The figures of a score. They are drawn from its sums, so they show every pixel that was compared and not a sample of them.

Heights are viridis, counts cividis, errors from blue (the map is too low) over white to red (too tall): ramps that all
common kinds of colour vision can read. What is unknown is grey. Every figure comes with words that say what it shows.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any, Final

import numpy as np
from numpy.typing import NDArray

from canopy.page import Drawn, enlarge, photograph_uri, pixels_uri, plain, plain_axes, png_of
from canopy.score.pictures import ErrorMap, PlaceChip
from canopy.score.result import CompareGrid, Coverage, Intervals, MapScore, Place, Residuals, Scatter, Shot, StatedError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

HEIGHTS: Final = "viridis"
COUNTS: Final = "cividis"
ERRORS: Final = "RdBu_r"
UNKNOWN: Final = "#bdbdbd"
"""Darker than the ramps' middles: unknown is not an error of nothing."""
BLUE: Final = "#0072B2"
ORANGE: Final = "#D55E00"
INK: Final = "#1b1f23"
OUTER: Final = "#cfe3f1"
INNER: Final = "#6aa8d2"

WIDTH_IN: Final = 5.6
"""Narrow, so that its letters can be read on a phone."""

STEPS_M: Final = (0.5, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 8.0, 10.0, 12.0, 15.0, 20.0, 25.0, 30.0, 40.0, 50.0, 60.0, 80.0, 100.0)
"""Where a scale of errors or heights may end."""

CHIP_PX: Final = 224
"""Pixels along a picture of a place, at most."""


def short(count: int) -> str:
    """A count in at most five characters: 812, 45 k, 1.2 M."""
    for unit, name in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if count >= 0.9995 * unit:
            share = count / unit
            return f"{share:.0f} {name}" if share >= 9.95 else f"{share:.1f} {name}"
    return str(count)


def pretty(label: str) -> str:
    """A class of heights as a reader writes it: ≥ 30 m, 2–5 m."""
    return re.sub(r"(?<=\d)-(?=\d)", "–", label.replace(">=", "≥").replace("<=", "≤"))


def round_up(value_m: float) -> float:
    """The next end of a scale."""
    return next((step for step in STEPS_M if step >= value_m), math.ceil(value_m))


# --- heights against heights ---------------------------------------------------------------------------------------------


def scatter_top(scatters: Sequence[Scatter]) -> float:
    """Where the axes of all of these end: above the last pair of heights that any of them holds."""
    top_m = 5.0
    for scatter in scatters:
        counts = np.asarray(scatter.counts)
        for axis, edges_m in ((1, scatter.reference_edges_m), (0, scatter.map_edges_m)):
            filled = np.flatnonzero(counts.any(axis=axis))
            if filled.size:
                top_m = max(top_m, edges_m[filled[-1] + 1])
    return top_m


def scatter_figure(score: MapScore, *, top_m: float, unit: str, reference: str) -> Drawn:
    """The map's heights over the reference's: counts of all, or the shots themselves where all of them are few enough.

    Args:
        score: Of one map.
        top_m: Where both axes end.
        unit: What is counted, "pixels" or "shots".
        reference: What the horizontal axis is.
    """
    from matplotlib.colors import LogNorm

    figure, axes = plain_axes(4.75, WIDTH_IN)
    counts = np.asarray(score.scatter.counts, np.float64)
    bottom_m = min(0.0, score.scatter.reference_edges_m[0], score.scatter.map_edges_m[0])
    axes.plot([bottom_m, top_m], [bottom_m, top_m], color=INK, linewidth=1.1, linestyle=(0, (5, 3)), label="map = reference")
    every = bool(score.shots) and len(score.shots) == score.measures.n
    if every:
        axes.scatter(
            [shot.reference_m for shot in score.shots], [shot.map_m for shot in score.shots],
            s=16, color=BLUE, alpha=max(0.15, min(0.7, 12 / math.sqrt(len(score.shots)))), linewidth=0,
            label=unit[:-1],
        )  # fmt: skip
    elif counts.any():
        shown = axes.pcolormesh(
            score.scatter.reference_edges_m, score.scatter.map_edges_m, np.where(counts > 0, counts, np.nan).T,
            norm=LogNorm(1, max(2.0, float(counts.max()))), cmap=COUNTS, rasterized=True,
        )  # fmt: skip
        figure.colorbar(
            shown, ax=axes, label=f"{unit} per cell of {_cell(score.scatter)}", shrink=0.86, pad=0.02,
            format=lambda value, _: f"{value:,.0f}",
        )  # fmt: skip
    axes.set(xlim=(bottom_m, top_m), ylim=(bottom_m, top_m), aspect="equal", xlabel=f"{reference} (m)")
    axes.set_ylabel("map (m)")
    figure.legend(loc="outside upper center", ncols=2, frameon=False, fontsize=8.5)
    outside = f"; {score.scatter.n_outside:,} lie beyond the axes" if score.scatter.n_outside else ""
    how = f"each of the {score.measures.n:,} {unit} is a dot" if every else f"{score.measures.n:,} {unit}, counted by colour"
    return Drawn(
        name=f"scatter_{score.name}", title=f"{score.name}: heights against the reference", png=png_of(figure),
        alt=f"Heights of {score.name} over those of the reference, with the line on which they agree; {how}{outside}. "
        + _agreement(score),
    )  # fmt: skip


def _cell(scatter: Scatter) -> str:
    sides = sorted({round(high - low, 6) for edges in (scatter.reference_edges_m, scatter.map_edges_m)
                    for low, high in pairwise(edges)})  # fmt: skip
    return f"{sides[0]:g} m × {sides[0]:g} m" if len(sides) == 1 else "the figure"


def _agreement(score: MapScore) -> str:
    bias_m, r2 = score.measures.bias_m.value, score.measures.r2.value
    said = [] if bias_m is None else [f"bias {bias_m:+.2f} m"]
    said += [] if r2 is None else [f"R² {r2:.2f}"]
    return f"{', '.join(said).capitalize()}." if said else "There is nothing to measure."


# --- errors by height ----------------------------------------------------------------------------------------------------


def residual_reach(residuals: Sequence[Residuals]) -> tuple[float, float]:
    """The vertical axis that holds all of these."""
    low = min((each.q05_m for each in residuals), default=-1.0)
    high = max((each.q95_m for each in residuals), default=1.0)
    margin = 0.08 * (max(high, 0.0) - min(low, 0.0)) + 0.1
    return min(low, 0.0) - margin, max(high, 0.0) + margin


def residual_figure(score: MapScore, *, reach_m: tuple[float, float], unit: str) -> Drawn:
    """Median, quartiles and 5 % to 95 % of the error in every class of reference height, and how many are in it."""
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    figure = Figure(figsize=(WIDTH_IN, 4.4), layout="constrained")
    counts, axes = figure.subplots(2, 1, sharex=True, height_ratios=(1, 5))
    plain(axes)
    plain(counts)
    axes.axhline(0, color=INK, linewidth=0.9, zorder=1.5)
    for each in score.residuals:
        middle, width = (each.low_m + each.high_m) / 2, each.high_m - each.low_m
        inside = 0.9 * width
        axes.bar(middle, each.q95_m - each.q05_m, inside, bottom=each.q05_m, color=OUTER, linewidth=0)
        axes.bar(middle, each.q75_m - each.q25_m, inside, bottom=each.q25_m, color=INNER, linewidth=0)
        axes.plot(
            [middle - inside / 2, middle + inside / 2], [each.q50_m] * 2, color=INK, linewidth=1.8, solid_capstyle="butt"
        )
        axes.plot(
            middle, each.mean_m, marker="D", markersize=4.2, color=ORANGE, markeredgecolor="white", markeredgewidth=0.6
        )
        counts.bar(middle, each.n, inside, color="#8c959f", linewidth=0)
    counts.set_yscale("log")
    counts.set_ylabel(unit)
    counts.yaxis.set_major_formatter(lambda value, _: short(round(value)))
    counts.tick_params(labelsize=8)
    axes.set_ylim(reach_m)
    if score.residuals:
        axes.set_xlim(score.residuals[0].low_m, score.residuals[-1].high_m)
    axes.set_xlabel("reference height (m)")
    axes.set_ylabel("map minus reference (m)")
    figure.legend(
        handles=[
            Patch(facecolor=OUTER, label="5 % to 95 %"),
            Patch(facecolor=INNER, label="25 % to 75 %"),
            Line2D([], [], color=INK, linewidth=1.8, label="median"),
            Line2D([], [], color=ORANGE, marker="D", markersize=5, linestyle="", label="mean (bias)"),
        ],
        loc="outside upper center", ncols=4, frameon=False, fontsize=8.5,
    )  # fmt: skip
    medians = "; ".join(f"{each.low_m:g} to {each.high_m:g} m: median {each.q50_m:+.1f} m" for each in score.residuals)
    return Drawn(
        name=f"residuals_{score.name}", title=f"{score.name}: error by reference height", png=png_of(figure),
        alt=f"Quantiles of map minus reference for {score.name} in classes of reference height. {medians or 'No class'}.",
    )  # fmt: skip


# --- intervals -----------------------------------------------------------------------------------------------------------


def coverage_floor(several: Sequence[Intervals]) -> float:
    """Where the axis of coverage of all of these begins, per cent."""
    low = min((100 * intervals.nominal - 10 for intervals in several), default=0.0)
    for intervals in several:
        for each in (*intervals.by_predicted_height, *intervals.by_reference_height):
            for value in (each.coverage.value, *(each.coverage.interval_95 or ())):
                low = low if value is None else min(low, 100 * value)
    return max(0.0, 5 * math.floor((low - 2) / 5))


def coverage_figure(name: str, intervals: Intervals, *, floor: float) -> Drawn:
    """How many references the 90 % intervals hold, class by class of height, against how many they promise to hold."""
    figure, axes = plain_axes(4.0, WIDTH_IN)
    axes.grid(visible=False, axis="x")
    predicted, referred = intervals.by_predicted_height, intervals.by_reference_height
    labels = [each.label for each in predicted]
    both = labels == [each.label for each in referred]
    low = 100 * intervals.nominal
    axes.axhspan(low - 5, min(low + 5, 100), color="#eef1f3", zorder=0)
    axes.axhline(low, color=INK, linewidth=1.1, linestyle=(0, (5, 3)), label=f"promised: {low:g} %")
    for classes, offset, colour, marker, face, label in (
        (predicted, -0.12 if both else 0.0, BLUE, "o", BLUE, "by height in the map"),
        (referred if both else (), 0.12, ORANGE, "s", "white", "by height in the reference"),
    ):
        known = [(at, each) for at, each in enumerate(classes) if each.coverage.value is not None]
        if not known:
            continue
        for at, each in known:
            if each.coverage.interval_95 is not None:
                ends = [100 * end for end in each.coverage.interval_95]
                axes.plot([at + offset] * 2, ends, color=colour, linewidth=1.6, zorder=2)
        shares = [100 * _known(each.coverage.value) for _, each in known]
        axes.plot(
            [at + offset for at, _ in known], shares, linestyle="", marker=marker, markersize=7, color=colour,
            markerfacecolor=face, markeredgewidth=1.5, label=label, zorder=3,
        )  # fmt: skip
    for at, each in enumerate(predicted):
        axes.annotate(
            short(each.n), (at, 1.0), xycoords=("data", "axes fraction"), xytext=(0, 2), textcoords="offset points",
            ha="center", va="bottom", fontsize=8.5,
        )  # fmt: skip
    axes.set_xticks(range(len(labels)), [pretty(label) for label in labels], fontsize=8.5)
    axes.set(xlim=(-0.6, len(labels) - 0.4), ylim=(floor, 100 + 0.04 * (100 - floor)))
    axes.set_xlabel("height class; above: number by height in the map")
    axes.set_ylabel("references inside the interval (%)")
    figure.legend(loc="outside upper center", ncols=3, frameon=False, fontsize=8.5)
    said = "; ".join(f"{each.label}: {_percent(each)}" for each in predicted)
    return Drawn(
        name=f"coverage_{name}", title=f"{name}: do its 90 % intervals hold?", png=png_of(figure),
        alt=f"Share of the references inside the 90 % intervals of {name} by height in the map, with 95 % intervals where "
        f"there are any, against the promised {low:g} %. {said}.",
    )  # fmt: skip


def _percent(each: Coverage) -> str:
    return "no pixels" if each.coverage.value is None else f"{each.coverage.value:.1%}"


def _known(value: float | None) -> float:
    assert value is not None, "a measure that does not exist is drawn"
    return value


def stated_figure(name: str, classes: Sequence[StatedError]) -> Drawn | None:
    """The error that the map states over the one that was found, in classes of the former; None where there is no class."""
    known = [each for each in classes if each.stated_m is not None and each.observed_m is not None]
    if not known:
        return None
    figure, axes = plain_axes(4.4, WIDTH_IN)
    stated, observed = (
        [_known(value) for value in values] for values in zip(*((e.stated_m, e.observed_m) for e in known), strict=True)
    )
    top = 1.08 * max(*stated, *observed, 0.5)
    axes.plot([0, top], [0, top], color=INK, linewidth=1.1, linestyle=(0, (5, 3)))
    most = max(each.n for each in known)
    sizes = [25 + 150 * each.n / most for each in known]
    axes.plot(stated, observed, color=BLUE, linewidth=1.2, zorder=2)
    axes.scatter(stated, observed, s=sizes, color=BLUE, edgecolor="white", linewidth=0.8, zorder=3)
    soft: dict[str, Any] = {"transform": axes.transAxes, "fontsize": 9, "color": "#59636e"}
    axes.text(0.03, 0.97, "larger than stated", ha="left", va="top", **soft)
    axes.text(0.97, 0.03, "smaller than stated", ha="right", va="bottom", **soft)
    axes.set(xlim=(0, top), ylim=(0, top), aspect="equal", xlabel="stated by the map: 90 % within ± m")
    axes.set_ylabel("found: 90 % within ± m")
    said = "; ".join(f"stated ±{x:.1f} m, found ±{y:.1f} m" for x, y in zip(stated, observed, strict=True))
    return Drawn(
        name=f"stated_{name}", title=f"{name}: stated against found error", png=png_of(figure),
        alt=f"The error that {name} states over the one found, from the most certain class to the least; larger dots are "
        f"more pixels. {said}.",
    )  # fmt: skip


# --- where the errors are ------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class ErrorScale:
    """One scale for all maps of the error that stand side by side."""

    reach_m: float
    """Errors of this size and beyond have the ramp's last colours."""


def error_scale(errors: Sequence[NDArray[np.floating]]) -> ErrorScale:
    """The scale that 98 % of the known errors of these are on, each set taken by itself."""
    sizes = (np.abs(error_m[np.isfinite(error_m)]) for error_m in errors)
    return ErrorScale(reach_m=round_up(max((float(np.quantile(size, 0.98)) for size in sizes if size.size), default=1.0)))


def error_map_figure(
    name: str, picture: ErrorMap, *, scale: ErrorScale, grid: CompareGrid, worst: Sequence[Place] = ()
) -> Drawn:
    """A map of the signed error, with a bar for distances and the worst places outlined and numbered."""
    from matplotlib.patches import Rectangle

    rows, cols = picture.error_m.shape
    left, bottom, right, top = grid.bounds
    # The axes are metres, whatever the unit of the CRS.
    unit = np.array([(right - left) / grid.shape[1], (top - bottom) / grid.shape[0]]) / grid.gsd_m
    width_m, height_m = cols * picture.side_m, rows * picture.side_m
    figure, axes = _map_axes(height_m / width_m)
    axes.set_facecolor(UNKNOWN)
    shown = axes.imshow(
        picture.error_m, cmap=ERRORS, vmin=-scale.reach_m, vmax=scale.reach_m, extent=(0, width_m, -height_m, 0),
        interpolation="nearest",
    )  # fmt: skip
    for number, place in enumerate(worst, start=1):
        corners_m = (np.reshape(place.bounds, (2, 2)) - (left, top)) / unit
        (x, y), (width, height) = corners_m[0], corners_m[1] - corners_m[0]
        axes.add_patch(Rectangle((x, y), width, height, fill=False, edgecolor=INK, linewidth=1.1))
        # In the corner of the part that is on the map: places at its edge hang over it.
        corner = max(x, 0.0), min(y + height, 0.0)
        axes.annotate(
            str(number), corner, xytext=(1.5, -1.5), textcoords="offset points", fontsize=7.5, ha="left", va="top",
            bbox={"boxstyle": "square,pad=0.1", "facecolor": "white", "edgecolor": "none", "alpha": 0.75},
        )  # fmt: skip
    axes.set(xlim=(0, width_m), ylim=(-height_m, 0), xticks=[], yticks=[])
    axes.spines[["top", "right", "bottom", "left"]].set_visible(True)
    _colour_bar(figure, axes, shown)
    _bar_and_north(axes, width_m)
    error_m = picture.error_m[np.isfinite(picture.error_m)]
    said = (
        f"From {np.quantile(error_m, 0.05):+.1f} m to {np.quantile(error_m, 0.95):+.1f} m over 90 % of it."
        if error_m.size else "Nothing of it is known."
    )  # fmt: skip
    places = f" The {len(worst)} worst places are outlined and numbered." if worst else ""
    averaged = f", means of {picture.side_m:g} m squares" if picture.side_px > 1 else ""
    return Drawn(
        name=f"error_map_{name}", png=png_of(figure),
        title=f"{name}: where it is too low (blue) and too tall (red){averaged}",
        alt=f"Map of the error of {name}, map minus reference, means of {picture.side_m:g} m squares, unknown in grey. "
        f"{said}{places}",
    )  # fmt: skip


def shot_map_figure(name: str, shots: Sequence[Shot], *, scale: ErrorScale, n: int, unit: str) -> Drawn:
    """Where the shots are and how wrong the map is there."""
    lon, lat, error_m = np.array([(shot.lon_deg, shot.lat_deg, shot.map_m - shot.reference_m) for shot in shots]).T
    middle = math.cos(math.radians(float(lat.mean())))
    x_m, y_m = (lon - lon.min()) * 111_320 * middle, (lat - lat.min()) * 111_320
    margin = 0.06 * max(float(x_m.max()), float(y_m.max()), 100.0)
    width_m, height_m = float(x_m.max()) + 2 * margin, float(y_m.max()) + 2 * margin
    figure, axes = _map_axes(height_m / width_m)
    order = np.argsort(np.abs(error_m))  # the largest errors on top
    shown = axes.scatter(
        x_m[order], y_m[order], c=error_m[order], cmap=ERRORS, vmin=-scale.reach_m, vmax=scale.reach_m,
        s=min(40.0, max(8.0, 4000 / len(shots))), edgecolor="#59636e", linewidth=0.3,
    )  # fmt: skip
    axes.set(xlim=(-margin, width_m - margin), ylim=(-margin, height_m - margin), aspect="equal", xticks=[], yticks=[])
    axes.spines[["top", "right", "bottom", "left"]].set_visible(True)
    axes.grid(visible=False)
    ends = (_degrees(float(lat.min()), float(lat.max()), "NS"), _degrees(float(lon.min()), float(lon.max()), "EW"))
    axes.set_title("; ".join(ends), fontsize=8.5, loc="left")
    _colour_bar(figure, axes, shown)
    _bar_and_north(axes, width_m)
    some = f"{len(shots):,} of the {n:,} {unit}" if len(shots) < n else f"the {n:,} {unit}"
    return Drawn(
        name=f"shots_{name}", title=f"{name}: where it is too low (blue) and too tall (red)", png=png_of(figure),
        alt=f"Map of {some}, coloured by the error of {name} there, map minus reference.",
    )  # fmt: skip


def _degrees(low: float, high: float, names: str) -> str:
    first, last = (f"{abs(value):.3f}° {names[value < 0]}" for value in (low, high))
    return first if first == last else f"{first} to {last}"


def _map_axes(shape: float) -> tuple[Figure, Axes]:
    """Plain axes of a map whose height is `shape` times its width; very long ones are drawn smaller, not distorted."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(WIDTH_IN, 0.55 + min(max(shape, 0.35), 1.2) * (WIDTH_IN - 1.25)), layout="constrained")
    axes = figure.subplots()
    plain(axes)
    axes.grid(visible=False)
    return figure, axes


def _colour_bar(figure: Figure, axes: Axes, shown: Any) -> None:
    figure.colorbar(shown, ax=axes, label="map minus reference (m)", extend="both", extendfrac=0.03, pad=0.02, aspect=30)


def _bar_and_north(axes: Axes, width_m: float) -> None:
    """A bar of a round length under the map, and where the CRS has north."""
    length_m = max(
        (digit * 10.0**power for power in range(-1, 7) for digit in (1, 2, 5) if digit * 10.0**power <= 0.28 * width_m),
        default=width_m,
    )
    share = length_m / width_m
    name = f"{length_m / 1000:g} km" if length_m >= 1000 else f"{length_m:g} m"
    place = axes.inset_axes((0, -0.055, 1, 0.05))
    place.set_axis_off()
    place.set(xlim=(0, 1), ylim=(0, 1))
    place.plot([0.002, share], [0.45, 0.45], color=INK, linewidth=2.6, solid_capstyle="butt")
    place.text(share + 0.015, 0.45, name, fontsize=9, va="center", ha="left")
    place.annotate(
        "N", (0.985, 1.0), xytext=(0.985, 0.0), fontsize=9, ha="center", va="center", annotation_clip=False,
        arrowprops={"arrowstyle": "-|>", "color": INK, "linewidth": 1.2, "shrinkA": 4, "shrinkB": 0},
    )  # fmt: skip


# --- places --------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Picture:
    """One of the pictures of a place."""

    label: str
    alt: str
    data: str


def place_pictures(chip: PlaceChip, *, top_m: float, scale: ErrorScale) -> tuple[Picture, ...]:
    """The imagery where there is any, the map, the reference and their difference, with the place outlined.

    Args:
        chip: What is known of the place.
        top_m: The height at which the ramp of heights ends, the same for map and reference and for all places.
        scale: That of the maps of the error.
    """
    panels = []
    if chip.photograph is not None:
        panels.append(("imagery", "The imagery", photograph_uri(_thin(chip.photograph, 2 * CHIP_PX))))
    for label, height_m in (("map", chip.map_m), ("reference", chip.reference_m)):
        panels.append((label, f"Heights of the {label}", _pixels(height_m / top_m, HEIGHTS)))
    error_m = chip.map_m.astype(np.float64) - chip.reference_m
    panels.append(("map minus reference", "Map minus reference", _pixels(0.5 + 0.5 * error_m / scale.reach_m, ERRORS)))
    return tuple(
        Picture(label=label, alt=f"{alt} around the place, which is outlined.", data=uri) for label, alt, uri in panels
    )


def _thin(values: NDArray[Any], most_px: int) -> NDArray[Any]:
    """Every so many-th pixel of a picture that has too many; the page enlarges one that has few."""
    return enlarge(values, most_px) if max(values.shape[:2]) > most_px else values


def _pixels(share: NDArray[np.floating], ramp: str) -> str:
    """Pixels in the colours of a ramp, by their share of it; beyond its ends they have its last colours."""
    from matplotlib import colormaps
    from matplotlib.colors import to_rgb

    share = _thin(share, CHIP_PX)
    known = np.isfinite(share)
    colours = colormaps[ramp](np.clip(np.where(known, share, 0.0), 0.0, 1.0))[..., :3]
    colours[~known] = to_rgb(UNKNOWN)
    return pixels_uri((255 * colours).round().astype(np.uint8))


def ramp_css(name: str) -> str:
    """A ramp as a gradient of CSS."""
    from matplotlib import colormaps
    from matplotlib.colors import to_hex

    return ", ".join(to_hex(colour) for colour in colormaps[name](np.linspace(0, 1, 9)))

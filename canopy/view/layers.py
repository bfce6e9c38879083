"""The layers of a map in the browser: what each shows, in which colours, and how a tile of it is painted."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Final, Literal, Protocol
from xml.etree import ElementTree as ET

import numpy as np
from numpy.typing import NDArray

from canopy.errors import OutputError
from canopy.metrics import class_index
from canopy.raster import RasterPool
from canopy.symbology import DIFFERENCE_CLASSES, ERROR_CLASSES, HEIGHT_CLASSES, UNKNOWN_COLOUR, MapClass
from canopy.view.heights import TileHeights
from canopy.view.png import palette_png, rgba_png
from canopy.view.tiles import Tile, TileSource

Kind = Literal["height", "error", "image", "reference", "difference", "hillshade", "date"]

SUN_AZIMUTH_DEG: Final = 315.0
SUN_ALTITUDE_DEG: Final = 45.0
"""Light from the upper left, as on maps: with light from below, hills look like holes."""

SHADE_OPACITY: Final = 0.4
"""Of the hillshade over heights: their colours stay what the legend says."""

_GREYS: Final = tuple((grey, grey, grey) for grey in range(1, 256))


@dataclass(frozen=True, slots=True, kw_only=True)
class LegendEntry:
    """A colour and what it means."""

    colour: str
    """#rrggbb."""
    label: str


class Painter(Protocol):
    """Paints the tiles of a layer."""

    def png(self, tile: Tile, pool: RasterPool) -> bytes | None:
        """The tile, read with the pool of this thread; None where the layer has nothing in it."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Layer:
    """A layer as the page is told of it."""

    id: str
    title: str
    kind: Kind
    painter: Painter
    max_zoom: int
    """The finest zoom of which there are tiles: beyond, the page enlarges them."""
    version: str
    """Another when its files are others."""
    legend: tuple[LegendEntry, ...] = ()
    note: str | None = None
    opacity: float = 1.0
    visible: bool = False


# --- classes ---------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True, eq=False)
class ClassPainter:
    """Values in the colours of their classes."""

    values: TileHeights
    classes: tuple[MapClass, ...]

    @cached_property
    def colours(self) -> tuple[tuple[int, int, int], ...]:
        """Of the classes."""
        return tuple(each.rgb for each in self.classes)

    @cached_property
    def edges(self) -> tuple[float, ...]:
        """Lower edges of the second class and on: what is below the first class counts as the first."""
        return tuple(each.low for each in self.classes[1:])

    def png(self, tile: Tile, pool: RasterPool) -> bytes | None:
        """As `Painter`."""
        values = self.values.read(tile.grid(), pool)
        if values is None:
            return None
        index = np.where(np.isfinite(values), class_index(values, self.edges) + 1, 0).astype(np.uint8)
        return palette_png(index, self.colours)


def class_legend(classes: Sequence[MapClass], *, sign: str = "") -> tuple[LegendEntry, ...]:
    """A line for each class."""
    return tuple(LegendEntry(colour=each.colour, label=each.label(sign=sign)) for each in classes)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Difference:
    """One raster of heights minus another, where both are known."""

    first: TileHeights
    second: TileHeights

    def read(self, target: Any, pool: RasterPool) -> NDArray[np.float32] | None:
        """As `TileHeights`."""
        first = self.first.read(target, pool)
        second = None if first is None else self.second.read(target, pool)
        if first is None or second is None:
            return None
        difference = first - second
        return difference if np.isfinite(difference).any() else None


# --- hillshade -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class HillshadePainter:
    """The canopy's surface under a light."""

    heights: TileHeights

    def png(self, tile: Tile, pool: RasterPool) -> bytes | None:
        """As `Painter`; the tile is read with a border of a pixel, so that the next tile goes on where it ends."""
        heights_m = self.heights.read(tile.grid(border_px=1), pool)
        if heights_m is None:
            return None
        shade = hillshade(heights_m, tile.ground_px_m)
        known = np.isfinite(shade)
        return palette_png(np.where(known, 1 + np.rint(np.where(known, shade, 0) * 254), 0).astype(np.uint8), _GREYS)


def hillshade(height_m: NDArray[np.float32], pixel_m: float) -> NDArray[np.float32]:
    """(row, col) brightness from 0 to 1 of a surface, a pixel less on each side; NaN where it is unknown.

    Lambert's law with the slopes of Horn (1981), as GDAL and QGIS shade. Beside an unknown pixel the surface is taken to go
    on level, so that no pixel that is known loses its shade.

    Args:
        height_m: (row, col) metres, NaN = unknown.
        pixel_m: Side of a pixel on the ground.
    """
    middle = height_m[1:-1, 1:-1]

    def at(row: int, col: int) -> NDArray[np.float32]:
        there = height_m[1 + row : height_m.shape[0] - 1 + row, 1 + col : height_m.shape[1] - 1 + col]
        return np.where(np.isfinite(there), there, middle)

    north_row, south_row = (at(row, -1) + 2 * at(row, 0) + at(row, 1) for row in (-1, 1))
    west_col, east_col = (at(-1, col) + 2 * at(0, col) + at(1, col) for col in (-1, 1))
    to_east, to_north = ((a - b) / np.float32(8 * pixel_m) for a, b in ((east_col, west_col), (north_row, south_row)))
    azimuth, altitude = np.radians(SUN_AZIMUTH_DEG), np.radians(SUN_ALTITUDE_DEG)
    sun_east, sun_north, sun_up = np.sin(azimuth) * np.cos(altitude), np.cos(azimuth) * np.cos(altitude), np.sin(altitude)
    shade = (sun_up - sun_east * to_east - sun_north * to_north) / np.sqrt(1 + to_east**2 + to_north**2)
    return np.where(np.isfinite(middle), np.clip(shade, 0, 1), np.nan).astype(np.float32)


# --- dates -----------------------------------------------------------------------------------------------------------------

DATE_STYLE: Final = "date.qml"
"""The style of `date.tif` in QGIS, which names the days that there are, each with its colour."""

_CENTURY: Final = 20_000_000
"""Numbers such as 20210714 are larger than float32 holds exactly; what is added to this is not."""

_LEGEND_LINES: Final = 24


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class DatePainter:
    """Days in colours."""

    source: TileSource
    days: tuple[int, ...]
    """Such as 20210714, ascending."""
    colours: tuple[tuple[int, int, int], ...]

    def png(self, tile: Tile, pool: RasterPool) -> bytes | None:
        """As `Painter`."""
        pixels = self.source.read(pool, tile.grid(), (1,), base=_CENTURY)
        if pixels is None:
            return None
        days = np.array(self.days)
        found = pixels.data[0] + _CENTURY
        place = np.searchsorted(days, found).clip(max=len(days) - 1)
        shown = pixels.valid & (days[place] == found)
        rgba = np.zeros((*found.shape, 4), np.uint8)
        rgba[shown, :3] = np.array(self.colours, np.uint8)[place[shown]]
        rgba[shown, 3] = 255
        return rgba_png(rgba) if shown.any() else None


def date_layer(source: TileSource, style: Path, **given: Any) -> Layer:
    """The days of a map's images, in the colours of its style for QGIS.

    Raises:
        OutputError: the style is damaged.
    """
    try:
        entries = [entry.attrib for entry in ET.parse(style).iter("paletteEntry")]  # noqa: S314  a file of the map
        days = {int(each["value"]): MapClass(low=0, high=1, colour=each["color"], name=each["label"]) for each in entries}
        colours = tuple(days[day].rgb for day in sorted(days))
    except (ET.ParseError, KeyError, ValueError) as error:
        raise OutputError(f"{style} is no style of days; delete it, and the layer of days is left out") from error
    if not days:
        raise OutputError(f"{style} names no day; delete it, and the layer of days is left out")
    lines = [LegendEntry(colour=each.colour, label=each.name) for _, each in sorted(days.items())]
    step = -(-len(lines) // _LEGEND_LINES)
    note = None if step == 1 else f"{len(lines)} days; the legend names every {step}th."
    painter = DatePainter(source=source, days=tuple(sorted(days)), colours=colours)
    return Layer(
        id="date", title="Day of the imagery", kind="date", painter=painter, legend=tuple(lines[::step]), note=note, **given
    )


# --- which there are -------------------------------------------------------------------------------------------------------


def height_layer(heights: TileHeights, **given: Any) -> Layer:
    """Heights in their classes."""
    return Layer(
        id="height", title="Canopy height", kind="height", visible=True, legend=class_legend(HEIGHT_CLASSES),
        painter=ClassPainter(values=heights, classes=HEIGHT_CLASSES), **given,
    )  # fmt: skip


def error_layer(errors: TileHeights, *, calibrated: bool, **given: Any) -> Layer:
    """Errors in their classes; grey where nobody has measured what they hold."""
    classes, legend, note = ERROR_CLASSES, class_legend(ERROR_CLASSES, sign="± "), None
    if not calibrated:
        classes = (MapClass(low=0, high=np.inf, colour=UNKNOWN_COLOUR, name="uncalibrated"),)
        legend = (LegendEntry(colour=UNKNOWN_COLOUR, label="uncalibrated: how wrong the heights are was not measured"),)
        note = "The map is uncalibrated: its intervals promise nothing."
    return Layer(
        id="error", title="Error (90 % interval)", kind="error", legend=legend, note=note,
        painter=ClassPainter(values=errors, classes=classes), **given,
    )  # fmt: skip


def hillshade_layer(heights: TileHeights, **given: Any) -> Layer:
    """The canopy's surface, to be laid over other layers."""
    return Layer(
        id="hillshade", title="Hillshade of the canopy", kind="hillshade", opacity=SHADE_OPACITY,
        painter=HillshadePainter(heights=heights), **given,
    )  # fmt: skip


def reference_layer(reference: TileHeights, name: str, **given: Any) -> Layer:
    """The reference in the classes of heights."""
    return Layer(
        id="reference", title=f"Reference: {name}", kind="reference", legend=class_legend(HEIGHT_CLASSES),
        painter=ClassPainter(values=reference, classes=HEIGHT_CLASSES), **given,
    )  # fmt: skip


def difference_layer(heights: TileHeights, reference: TileHeights, **given: Any) -> Layer:
    """The map minus the reference."""
    legend = tuple(LegendEntry(colour=each.colour, label=f"map {each.name}") for each in DIFFERENCE_CLASSES)
    return Layer(
        id="difference", title="Map minus reference", kind="difference", legend=legend,
        painter=ClassPainter(values=Difference(first=heights, second=reference), classes=DIFFERENCE_CLASSES), **given,
    )  # fmt: skip

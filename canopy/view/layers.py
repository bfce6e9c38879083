"""The layers of a map in the browser: what each shows, in which colours, and how a tile of it is made."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Final, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from canopy.symbology import ERROR_CLASSES, HEIGHT_CLASSES, UNKNOWN_COLOUR, MapClass
from canopy.view.handles import Handles
from canopy.view.png import palette_png
from canopy.view.tiles import Tile, heights_of, read_tile

Kind = Literal["height", "error", "image", "reference", "difference", "hillshade", "date"]

SUN_AZIMUTH_DEG: Final = 315.0
SUN_ALTITUDE_DEG: Final = 45.0
"""Light from the upper left, as maps have it: with light from below hills look like holes."""

GREYS: Final = tuple((grey, grey, grey) for grey in range(1, 256))


@dataclass(frozen=True, slots=True, kw_only=True)
class LegendEntry:
    """A colour and what it means."""

    colour: str
    """#rrggbb."""
    label: str


class Painter(Protocol):
    """Makes the tiles of a layer."""

    def png(self, tile: Tile) -> bytes | None:
        """The tile; None where the layer has nothing in it."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Layer:
    """A layer as the page is told of it."""

    id: str
    title: str
    kind: Kind
    painter: Painter
    max_zoom: int
    """The finest zoom of which there are tiles: the page enlarges them beyond."""
    legend: tuple[LegendEntry, ...] = ()
    note: str | None = None
    opacity: float = 1.0
    visible: bool = False


# --- classes ---------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ClassPainter:
    """Values of one band in the colours of their classes."""

    handles: Handles
    band: int
    classes: tuple[MapClass, ...]
    colours: tuple[tuple[int, int, int], ...] = field(init=False)
    edges: NDArray[np.float32] = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "colours", tuple(each.rgb for each in self.classes))
        object.__setattr__(self, "edges", np.array([each.low for each in self.classes[1:]], np.float32))

    def png(self, tile: Tile) -> bytes | None:
        """As `Painter`."""
        with self.handles.raster() as raster:
            values = heights_of(read_tile(raster, tile, (self.band,)))[0]
        known = np.isfinite(values)
        if not known.any():
            return None
        return palette_png(class_index(values, self.edges), self.colours)


def class_index(values: NDArray[np.floating[Any]], edges: NDArray[np.float32]) -> NDArray[np.uint8]:
    """(row, col) the number of the class of each value, from 1; 0 where it is unknown.

    Args:
        values: NaN = unknown.
        edges: Lower edges of the second class and on: what is below the first class counts as the first.
    """
    index = np.digitize(values, edges) + 1
    return np.where(np.isfinite(values), index, 0).astype(np.uint8)


def class_legend(classes: Sequence[MapClass], *, sign: str = "") -> tuple[LegendEntry, ...]:
    """A line for each class."""
    return tuple(LegendEntry(colour=each.colour, label=each.label(sign=sign)) for each in classes)


# --- hillshade -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class HillshadePainter:
    """The canopy's surface under a light."""

    handles: Handles

    def png(self, tile: Tile) -> bytes | None:
        """As `Painter`."""
        with self.handles.raster() as raster:
            heights_m = heights_of(read_tile(raster, tile, (1,), buffer_px=1))[0]
        shade = hillshade(heights_m, tile.ground_px_m)
        if not np.isfinite(shade).any():
            return None
        return palette_png(np.where(np.isfinite(shade), 1 + np.nan_to_num(shade) * 254, 0).astype(np.uint8), GREYS)


def hillshade(heights_m: NDArray[np.float32], pixel_m: float) -> NDArray[np.float32]:
    """(row, col) brightness of 0 to 1 of a surface, one pixel less on each side; NaN where any of the nine heights is unknown.

    Lambert's law with Horn's slopes (1981, Proc. IEEE 69(1), eq. 5-6), as GDAL and QGIS shade.
    """
    z = heights_m
    nw, n, ne = z[:-2, :-2], z[:-2, 1:-1], z[:-2, 2:]
    w, e = z[1:-1, :-2], z[1:-1, 2:]
    sw, s, se = z[2:, :-2], z[2:, 1:-1], z[2:, 2:]
    east = (ne + 2 * e + se - nw - 2 * w - sw) / np.float32(8 * pixel_m)
    north = (nw + 2 * n + ne - sw - 2 * s - se) / np.float32(8 * pixel_m)
    azimuth, altitude = np.radians(SUN_AZIMUTH_DEG), np.radians(SUN_ALTITUDE_DEG)
    to_sun_east, to_sun_north, up = np.sin(azimuth) * np.cos(altitude), np.cos(azimuth) * np.cos(altitude), np.sin(altitude)
    shade = (up - to_sun_east * east - to_sun_north * north) / np.sqrt(1 + east**2 + north**2)
    known = np.isfinite(z[1:-1, 1:-1])
    return np.where(known, np.clip(shade, 0, 1), np.nan).astype(np.float32)


def height_layer(handles: Handles, max_zoom: int) -> Layer:
    """Heights in their classes."""
    return Layer(
        id="height", title="Canopy height", kind="height", max_zoom=max_zoom, visible=True,
        painter=ClassPainter(handles=handles, band=1, classes=HEIGHT_CLASSES), legend=class_legend(HEIGHT_CLASSES),
    )  # fmt: skip


def error_layer(handles: Handles, max_zoom: int, *, calibrated: bool) -> Layer:
    """Errors in their classes; grey where nobody has measured what they hold."""
    if calibrated:
        classes, legend, note = ERROR_CLASSES, class_legend(ERROR_CLASSES, sign="± "), None
    else:
        grey = MapClass(low=0, high=np.inf, colour=UNKNOWN_COLOUR, name="uncalibrated")
        classes, legend = (grey,), (LegendEntry(colour=UNKNOWN_COLOUR, label="uncalibrated: the error was not measured"),)
        note = "The map is uncalibrated: its intervals promise nothing."
    return Layer(
        id="error", title="Error (90 % interval)", kind="error", max_zoom=max_zoom, legend=legend, note=note,
        painter=ClassPainter(handles=handles, band=1, classes=classes),
    )  # fmt: skip


def hillshade_layer(handles: Handles, max_zoom: int) -> Layer:
    """The canopy's surface, to be laid over heights."""
    return Layer(
        id="hillshade", title="Hillshade of the canopy", kind="hillshade", max_zoom=max_zoom, opacity=0.4,
        painter=HillshadePainter(handles=handles),
    )  # fmt: skip

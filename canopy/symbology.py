"""Colours of maps: fixed classes with names, so that two maps look alike where they are alike, in QGIS, web map and figures.

The colours are equal steps through viridis (heights, low is dark) and magma (errors, small is light), whose lightness runs
one way and evenly: they keep their order for every common kind of colour vision, and in print without colour.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Final


@dataclass(frozen=True, slots=True, kw_only=True)
class MapClass:
    """Values that share a colour, from `low` up to but not including `high`."""

    low: float
    high: float
    """Infinite in the last class."""
    colour: str
    """#rrggbb."""
    name: str
    """What it means, in words."""

    @property
    def rgb(self) -> tuple[int, int, int]:
        """The colour as three numbers of 0 to 255."""
        return int(self.colour[1:3], 16), int(self.colour[3:5], 16), int(self.colour[5:7], 16)

    def label(self, *, sign: str = "", unit: str = "m") -> str:
        """The class in a legend, such as "± 2-4 m, small"."""
        span = f"{self.low:g}–{self.high:g}" if math.isfinite(self.high) else f"over {self.low:g}"
        return f"{sign}{span} {unit}, {self.name}"


def _classes(edges: tuple[float, ...], colours: tuple[str, ...], names: tuple[str, ...]) -> tuple[MapClass, ...]:
    return tuple(
        MapClass(low=low, high=high, colour=colour, name=name)
        for low, high, colour, name in zip(edges, (*edges[1:], math.inf), colours, names, strict=True)
    )


HEIGHT_CLASSES: Final = _classes(
    (0, 2, 5, 10, 15, 20, 25, 30, 40),
    ("#440154", "#472d7b", "#3b528b", "#2c728e", "#21918c", "#28ae80", "#5ec962", "#addc30", "#fde725"),
    (
        "ground and low plants", "shrubs and young trees", "low canopy", "lower medium canopy", "medium canopy",
        "upper medium canopy", "tall canopy", "very tall canopy", "giant canopy",
    ),
)  # fmt: skip
"""Metres above ground. Below 0 m, where noise may put a height, counts as the first class."""

ERROR_CLASSES: Final = _classes(
    (0, 1, 2, 4, 6, 10, 15),
    ("#fde7a9", "#fea571", "#f2645c", "#c43c75", "#8b2981", "#54137d", "#1a1042"),
    ("very small", "small", "moderate", "considerable", "large", "very large", "extreme"),
)
"""Half-widths of the 90 % interval, ± metres."""

DIFFERENCE_CLASSES: Final = _classes(
    (-math.inf, -10, -5, -2, 2, 5, 10),
    ("#005290", "#0883c3", "#90bae5", "#ebebeb", "#eda679", "#c0631d", "#7c3801"),
    (
        "over 10 m lower", "5–10 m lower", "2–5 m lower", "within 2 m", "2–5 m higher", "5–10 m higher", "over 10 m higher",
    ),
)  # fmt: skip
"""Metres of one map minus another: blue where the first is lower, orange where it is higher, the darker the more. The steps
of both arms are about equally light (L* 33, 52, 74), and blue and orange differ for every common kind of colour vision."""

CHANGE_CLASSES: Final = tuple(
    replace(each, colour=mirrored.colour)
    for each, mirrored in zip(DIFFERENCE_CLASSES, DIFFERENCE_CLASSES[::-1], strict=True)
)
"""Metres of a later map minus an earlier one: the same classes, with the colours that maps of forest change have, warm for
what is lost and cold for what has grown."""

UNKNOWN_COLOUR: Final = "#9a9a9a"
"""Where nothing is known, or nothing is promised: grey, which is in no ramp."""


@dataclass(frozen=True, slots=True, kw_only=True)
class NamedValue:
    """A value of a map of kinds, which is no measure of anything."""

    value: int
    colour: str
    """#rrggbb."""
    name: str

    @property
    def rgb(self) -> tuple[int, int, int]:
        """The colour as three numbers of 0 to 255."""
        return int(self.colour[1:3], 16), int(self.colour[3:5], 16), int(self.colour[5:7], 16)


CHANGE_VALUES: Final = (
    NamedValue(value=0, colour=UNKNOWN_COLOUR, name="unknown"),
    NamedValue(value=1, colour=CHANGE_CLASSES[1].colour, name="loss"),
    NamedValue(value=2, colour=CHANGE_CLASSES[3].colour, name="no detectable change"),
    NamedValue(value=3, colour=CHANGE_CLASSES[5].colour, name="gain"),
)
"""What became of a pixel between two dates, in the colours of `CHANGE_CLASSES`."""

"""How a change looks in QGIS: the difference in classes, the map of classes by its values, the polygons by their class."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Final

from canopy.analyse.change_polygons import NAMES as POLYGON_CLASSES
from canopy.region.styles import classes_pipe, outlined_by, qml, values_pipe
from canopy.symbology import CHANGE_VALUES, DIFFERENCE_CLASSES

LINE_MM: Final = 0.4


def change_qml() -> str:
    """Of `change.tif`: metres in the classes of differences."""
    names, colours = zip(*((each.name, each.colour) for each in DIFFERENCE_CLASSES), strict=True)
    return qml(classes_pipe(DIFFERENCE_CLASSES, names, colours))


def classes_qml() -> str:
    """Of `classes.tif`: a colour a value."""
    return qml(values_pipe((str(each.value), each.name, each.colour) for each in CHANGE_VALUES))


def polygons_qml() -> str:
    """Of `changes.gpkg`: outlines by class, so that what is under them is seen."""
    colours = {each.name: each.colour for each in CHANGE_VALUES if each.value in POLYGON_CLASSES}
    return qml(outlined_by("class", colours, LINE_MM))


STYLES: Final[Mapping[str, Callable[[], str]]] = {
    "change.qml": change_qml, "classes.qml": classes_qml, "changes.qml": polygons_qml,
}  # fmt: skip
"""Name of the file -> its text."""

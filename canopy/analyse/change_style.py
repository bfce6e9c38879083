"""How a change looks in QGIS: the difference in classes, the map of classes by its values, the polygons by their class."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Final

from canopy.analyse.change_polygons import NAMES as POLYGON_CLASSES
from canopy.analyse.difference import GAIN, LOSS
from canopy.region.styles import classes_pipe, outlined_by, qml, values_pipe
from canopy.symbology import CHANGE_CLASSES, CHANGE_VALUES

LINE_MM: Final = 0.4


def change_qml() -> str:
    """Of `change.tif`: metres in classes."""
    names, colours = zip(*((each.name, each.colour) for each in CHANGE_CLASSES), strict=True)
    return qml(classes_pipe(CHANGE_CLASSES, names, colours))


def classes_qml() -> str:
    """Of `classes.tif`: a colour a value."""
    return qml(values_pipe((str(each.value), each.name, each.colour) for each in CHANGE_VALUES))


def polygons_qml() -> str:
    """Of `changes.gpkg`: outlines in the darkest colours of `change.tif`, so that what is under them is seen."""
    colours = {POLYGON_CLASSES[LOSS]: CHANGE_CLASSES[0].colour, POLYGON_CLASSES[GAIN]: CHANGE_CLASSES[-1].colour}
    return qml(outlined_by("class", colours, LINE_MM))


STYLES: Final[Mapping[str, Callable[[], str]]] = {
    "change.qml": change_qml, "classes.qml": classes_qml, "changes.qml": polygons_qml,
}  # fmt: skip
"""Name of the file -> its text."""

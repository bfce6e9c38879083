"""How a change looks in QGIS: the difference in classes, the map of classes by its values, the polygons by their class."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Final
from xml.etree import ElementTree as ET

from canopy.analyse.change_polygons import NAMES as POLYGON_CLASSES
from canopy.mosaicker.quantum import QUANTUM_M
from canopy.region.styles import QGIS, _fill_layer, _pipe, _renderer, document, qml
from canopy.symbology import CHANGE_VALUES, DIFFERENCE_CLASSES

LINE_MM: Final = 0.3


def change_qml() -> str:
    """Of `change.tif`: metres in the classes of differences."""
    pipe, renderer = _pipe("singlebandpseudocolor")
    low, high = DIFFERENCE_CLASSES[0].high, DIFFERENCE_CLASSES[-1].low
    renderer.attrib |= {"classificationMin": f"{low:g}", "classificationMax": f"{high:g}"}
    shader = ET.SubElement(ET.SubElement(renderer, "rastershader"), "colorrampshader")
    shader.attrib |= {
        "colorRampType": "DISCRETE", "classificationMode": "1", "clip": "0", "labelPrecision": "0",
        "minimumValue": f"{low:g}", "maximumValue": f"{high:g}",
    }  # fmt: skip
    for each in DIFFERENCE_CLASSES:
        # A class of QGIS holds its upper end, ours does not.
        end = "inf" if math.isinf(each.high) else repr(each.high - QUANTUM_M / 2)
        ET.SubElement(shader, "item", value=end, label=each.name, color=each.colour, alpha="255")
    return qml(pipe)


def classes_qml() -> str:
    """Of `classes.tif`: a colour a value."""
    pipe, renderer = _pipe("paletted")
    palette = ET.SubElement(renderer, "colorPalette")
    for each in CHANGE_VALUES:
        ET.SubElement(palette, "paletteEntry", value=str(each.value), label=each.name, color=each.colour, alpha="255")
    return qml(pipe)


def polygons_qml() -> str:
    """Of `changes.gpkg`: outlines by class, so that what is under them is seen."""
    colours = {each.name: each.colour for each in CHANGE_VALUES}
    names = list(POLYGON_CLASSES.values())
    symbols = {str(place): [_fill_layer(line=colours[name], width_mm=LINE_MM)] for place, name in enumerate(names)}
    renderer = _renderer("categorizedSymbol", symbols)
    renderer.set("attr", "class")
    categories = ET.Element("categories")
    for place, name in enumerate(names):
        ET.SubElement(categories, "category", symbol=str(place), value=name, type="string", label=name, render="true")
    renderer.insert(0, categories)
    root = ET.Element("qgis", version=QGIS, styleCategories="Symbology")
    root.append(renderer)
    return document(root)


STYLES: Final[Mapping[str, Callable[[], str]]] = {
    "change.qml": change_qml, "classes.qml": classes_qml, "changes.qml": polygons_qml,
}  # fmt: skip
"""Name of the file -> its text."""

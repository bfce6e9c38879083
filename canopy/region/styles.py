"""How maps look in QGIS: `height.qml` and `error.qml`, and the same styles inside the project.

QGIS gives a raster the style of the .qml file of its stem, so one file serves `height.tif` and `height.vrt`. The XML is
that of QGIS 3.22, which later versions read; what is left out of it they fill with their defaults.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from datetime import date, timedelta
from typing import Final
from xml.etree import ElementTree as ET

from canopy.mosaicker.quantum import QUANTUM_M
from canopy.symbology import ERROR_CLASSES, HEIGHT_CLASSES, UNKNOWN_COLOUR, MapClass

QGIS: Final = "3.22.16"
"""The version whose XML this is."""

NAMES: Final = ("height.qml", "error.qml", "date.qml")

_DOCTYPE: Final = "<!DOCTYPE qgis PUBLIC 'http://mrcc.com/qgis.dtd' 'SYSTEM'>\n"


def document(root: ET.Element) -> str:
    """The text of a document of QGIS."""
    ET.indent(root)
    return _DOCTYPE + ET.tostring(root, encoding="unicode") + "\n"


def qml(style: ET.Element) -> str:
    """The text of a file with the style of a raster (its pipe) or of polygons (their renderer)."""
    root = ET.Element("qgis", version=QGIS, styleCategories="Symbology")
    root.append(style)
    ET.SubElement(root, "blendMode").text = "0"
    return document(root)


# --- rasters -------------------------------------------------------------------------------------------------------------


def height_pipe() -> ET.Element:
    """Heights in the classes of `canopy.symbology`."""
    return classes_pipe(HEIGHT_CLASSES, [each.label() for each in HEIGHT_CLASSES], [each.colour for each in HEIGHT_CLASSES])


def error_pipe(*, calibrated: bool) -> ET.Element:
    """Half-widths of the 90 % interval in classes; where nothing is promised of them in greys, and the legend says so."""
    sign = "± " if calibrated else "uncalibrated ± "
    colours = [each.colour if calibrated else grey(each) for each in ERROR_CLASSES]
    return classes_pipe(ERROR_CLASSES, [each.label(sign=sign) for each in ERROR_CLASSES], colours)


def grey(each: MapClass) -> str:
    """The colour of a class without its hue, as light as it is (Rec. 709)."""
    red, green, blue = each.rgb
    light = round(0.2126 * red + 0.7152 * green + 0.0722 * blue)
    return f"#{light:02x}{light:02x}{light:02x}"


def classes_pipe(classes: Sequence[MapClass], labels: Sequence[str], colours: Sequence[str]) -> ET.Element:
    """A raster of metres in classes, each with its label and colour.

    Why half a quantum below their ends: a class of QGIS holds its upper end, ours does not. All that is drawn, overviews
    too, is a multiple of the quantum.
    """
    pipe, renderer = _pipe("singlebandpseudocolor")
    low, high = classes[0].low if math.isfinite(classes[0].low) else classes[0].high, classes[-1].low
    renderer.attrib |= {"classificationMin": f"{low:g}", "classificationMax": f"{high:g}"}
    shader = ET.SubElement(ET.SubElement(renderer, "rastershader"), "colorrampshader")
    shader.attrib |= {
        "colorRampType": "DISCRETE", "classificationMode": "1", "clip": "0", "labelPrecision": "0",
        "minimumValue": f"{low:g}", "maximumValue": f"{high:g}",
    }  # fmt: skip
    for each, label, colour in zip(classes, labels, colours, strict=True):
        end = "inf" if each is classes[-1] else repr(each.high - QUANTUM_M / 2)
        ET.SubElement(shader, "item", value=end, label=label, color=colour, alpha="255")
    return pipe


def date_pipe(days: Sequence[date]) -> ET.Element:
    """Days of the scenes as colours, from the first (dark) to the last (light)."""
    shares = [place / max(1, len(days) - 1) for place in range(len(days))]
    return values_pipe(
        (day.strftime("%Y%m%d"), day.isoformat(), _between(share)) for day, share in zip(days, shares, strict=True)
    )


def values_pipe(values: Iterable[tuple[str, str, str]]) -> ET.Element:
    """A raster of few values, each (value, label, colour)."""
    pipe, renderer = _pipe("paletted")
    palette = ET.SubElement(renderer, "colorPalette")
    for value, label, colour in values:
        ET.SubElement(palette, "paletteEntry", value=value, label=label, color=colour, alpha="255")
    return pipe


def _between(share: float) -> str:
    """The colour at a share of the way through the ramp of heights."""
    place = share * (len(HEIGHT_CLASSES) - 1)
    low = min(int(place), len(HEIGHT_CLASSES) - 2)
    mixed = [
        round(one + (place - low) * (two - one))
        for one, two in zip(HEIGHT_CLASSES[low].rgb, HEIGHT_CLASSES[low + 1].rgb, strict=True)
    ]
    return "#{:02x}{:02x}{:02x}".format(*mixed)


def image_pipe(bands: int, *, stretched: bool) -> ET.Element:
    """An image: its first three bands as red, green and blue, or its only one as grey.

    Args:
        bands: How many it has besides alpha, which follows them.
        stretched: Between the darkest and the lightest 2 % of what is on the screen, for values that are no colours.
    """
    pipe, renderer = _pipe(
        "multibandcolor" if bands > 2 else "singlebandgray", limits="CumulativeCut" if stretched else "None"
    )
    renderer.set("alphaBand", str(bands + 1))
    named = [("red", 1), ("green", 2), ("blue", 3)] if bands > 2 else [("gray", 1)]
    for name, band in named:
        renderer.set(f"{name}Band", str(band))
        element = ET.SubElement(renderer, f"{name}ContrastEnhancement" if bands > 2 else "contrastEnhancement")
        ET.SubElement(element, "minValue").text = "0"
        ET.SubElement(element, "maxValue").text = "10000" if stretched else "255"
        ET.SubElement(element, "algorithm").text = "StretchToMinimumMaximum" if stretched else "NoEnhancement"
    return pipe


def _pipe(kind: str, *, limits: str = "None") -> tuple[ET.Element, ET.Element]:
    """The stages that a raster goes through, and the one that gives it colours."""
    pipe = ET.Element("pipe")
    provider = ET.SubElement(pipe, "provider")
    # Classes and days have no means: what is drawn are pixels of the file or of its overviews.
    ET.SubElement(
        provider, "resampling", enabled="false", maxOversampling="2",
        zoomedInResamplingMethod="nearestNeighbour", zoomedOutResamplingMethod="nearestNeighbour",
    )  # fmt: skip
    renderer = ET.SubElement(pipe, "rasterrenderer", type=kind, band="1", opacity="1", alphaBand="-1", nodataColor="")
    ET.SubElement(renderer, "rasterTransparency")
    origin = ET.SubElement(renderer, "minMaxOrigin")
    for key, value in {
        "limits": limits, "extent": "UpdatedCanvas" if limits != "None" else "WholeRaster", "statAccuracy": "Estimated",
        "cumulativeCutLower": "0.02", "cumulativeCutUpper": "0.98", "stdDevFactor": "2",
    }.items():  # fmt: skip
        ET.SubElement(origin, key).text = value
    ET.SubElement(pipe, "brightnesscontrast", brightness="0", contrast="0", gamma="1")
    ET.SubElement(pipe, "huesaturation", saturation="0", grayscaleMode="0", invertColors="0", colorizeOn="0")
    ET.SubElement(pipe, "rasterresampler", maxOversampling="2")
    return pipe, renderer


# --- polygons ------------------------------------------------------------------------------------------------------------


def filled(colour: str = UNKNOWN_COLOUR) -> ET.Element:
    """Polygons of one colour, without an outline."""
    return _single([_fill_layer(fill=colour)])


def outlined(colour: str, width_mm: float) -> ET.Element:
    """Outlines of polygons."""
    return _single([_fill_layer(line=colour, width_mm=width_mm)])


def outlined_by(column: str, colours: Mapping[str, str], width_mm: float) -> ET.Element:
    """Outlines of polygons, coloured by the text of a column: text -> colour."""
    layers = {str(place): [_fill_layer(line=colour, width_mm=width_mm)] for place, colour in enumerate(colours.values())}
    renderer = _renderer("categorizedSymbol", layers)
    renderer.set("attr", column)
    categories = ET.Element("categories")
    for place, name in enumerate(colours):
        ET.SubElement(categories, "category", symbol=str(place), value=name, type="string", label=name, render="true")
    renderer.insert(0, categories)
    return renderer


def hatched(colour: str) -> ET.Element:
    """Hatched polygons with an outline."""
    return _single(_hatch(colour))


def hatched_where(column: str, colour: str, *, yes: str, no: str, unknown: str) -> ET.Element:
    """Polygons that are hatched where a column is true; where it is false or unknown they have an outline only."""
    plain = [[_fill_layer(line=colour, width_mm=0.2)] for _ in range(2)]
    renderer = _renderer("categorizedSymbol", {"0": _hatch(colour), "1": plain[0], "2": plain[1]})
    # Of a column of truth values QGIS compares neither the text nor the value with that of a category.
    renderer.set("attr", f'if("{column}" is null, 2, if("{column}", 1, 0))')
    categories = ET.Element("categories")
    for symbol, value, label in (("0", "1", yes), ("1", "0", no), ("2", "2", unknown)):
        ET.SubElement(categories, "category", symbol=symbol, value=value, label=label, render="true")
    renderer.insert(0, categories)
    return renderer


def _single(layers: Sequence[ET.Element]) -> ET.Element:
    return _renderer("singleSymbol", {"0": layers})


def _renderer(kind: str, symbols: Mapping[str, Sequence[ET.Element]]) -> ET.Element:
    renderer = ET.Element(
        "renderer-v2", type=kind, forceraster="0", symbollevels="0", enableorderby="0", referencescale="-1"
    )
    group = ET.SubElement(renderer, "symbols")
    for name, layers in symbols.items():
        symbol = ET.SubElement(group, "symbol", name=name, type="fill", alpha="1", clip_to_extent="1", force_rhr="0")
        symbol.extend(layers)
    return renderer


def _fill_layer(*, fill: str | None = None, line: str | None = None, width_mm: float = 0.3) -> ET.Element:
    return _symbol_layer(
        "SimpleFill",
        {
            "color": _rgba(fill or "#000000"), "style": "no" if fill is None else "solid",
            "outline_color": _rgba(line or "#000000"), "outline_style": "no" if line is None else "solid",
            "outline_width": f"{width_mm:g}", "outline_width_unit": "MM",
        },
    )  # fmt: skip


def _hatch(colour: str) -> list[ET.Element]:
    lines = _symbol_layer(
        "LinePatternFill",
        {"angle": "45", "distance": "4", "distance_unit": "MM", "color": _rgba(colour), "line_width": "0.3"},
    )
    symbol = ET.SubElement(lines, "symbol", name="@0@0", type="line", alpha="1", clip_to_extent="1", force_rhr="0")
    symbol.append(_symbol_layer("SimpleLine", {"line_color": _rgba(colour), "line_width": "0.3", "line_width_unit": "MM"}))
    return [lines, _fill_layer(line=colour, width_mm=0.4)]


def _symbol_layer(kind: str, settings: Mapping[str, str]) -> ET.Element:
    layer = ET.Element("layer", {"class": kind, "enabled": "1", "locked": "0", "pass": "0"})
    options = ET.SubElement(layer, "Option", type="Map")
    for name, value in settings.items():
        ET.SubElement(options, "Option", name=name, type="QString", value=value)
    return layer


def _rgba(colour: str) -> str:
    return ",".join(str(int(colour[place : place + 2], 16)) for place in (1, 3, 5)) + ",255"


# --- days ----------------------------------------------------------------------------------------------------------------


def day_of(days: int) -> date:
    """A day from the days since 1970-01-01."""
    return date(1970, 1, 1) + timedelta(days=days)

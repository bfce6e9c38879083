"""Styles for QGIS: every value in the class that `canopy.symbology` puts it in, as QGIS reads classes."""

import math
from datetime import date
from xml.etree import ElementTree as ET

import numpy as np
import pytest

from canopy.mosaicker.quantum import QUANTUM_M
from canopy.region import styles
from canopy.symbology import ERROR_CLASSES, HEIGHT_CLASSES


def items(pipe):
    return [(float(item.get("value")), item.get("color"), item.get("label")) for item in pipe.iter("item")]


def shown(value, entries):
    """The colour that QGIS gives a value: that of the first class whose end it does not exceed."""
    return next(colour for end, colour, _ in entries if value <= end)


@pytest.mark.parametrize(
    ("pipe", "classes"), [(styles.height_pipe(), HEIGHT_CLASSES), (styles.error_pipe(calibrated=True), ERROR_CLASSES)]
)
def test_every_multiple_of_the_quantum_is_in_its_class(pipe, classes):
    entries = items(pipe)
    assert [end for end, _, _ in entries] == sorted(end for end, _, _ in entries)
    assert math.isinf(entries[-1][0])
    for value in np.arange(0, 50, QUANTUM_M):
        wanted = next(each for each in classes if each.low <= value < each.high)
        assert shown(value, entries) == wanted.colour, value
    assert shown(-0.5, entries) == classes[0].colour


def test_ends_of_classes_that_are_not_lowered_are_seen():
    """Negative control: with the ends as they are, 2 m would be shown as ground."""
    entries = [(each.high, each.colour, "") for each in HEIGHT_CLASSES]
    assert shown(2.0, entries) == HEIGHT_CLASSES[0].colour


def test_labels_are_those_of_the_classes():
    assert [label for _, _, label in items(styles.height_pipe())] == [each.label() for each in HEIGHT_CLASSES]
    labels = [label for _, _, label in items(styles.error_pipe(calibrated=True))]
    assert labels[1] == "± 1–2 m, small"


def test_an_error_without_a_promise_has_no_colour_and_is_as_light():
    entries = items(styles.error_pipe(calibrated=False))
    greys = [int(colour[1:3], 16) for _, colour, _ in entries]
    assert all(colour == f"#{colour[1:3] * 3}" for _, colour, _ in entries)
    assert greys == sorted(greys, reverse=True)
    assert all(label.startswith("uncalibrated ± ") for _, _, label in entries)


def test_days_are_in_order():
    pipe = styles.date_pipe([date(2019, 7, 1), date(2020, 7, 1), date(2021, 7, 14)])
    entries = [(each.get("value"), each.get("label"), each.get("color")) for each in pipe.iter("paletteEntry")]
    assert [value for value, _, _ in entries] == ["20190701", "20200701", "20210714"]
    assert [label for _, label, _ in entries] == ["2019-07-01", "2020-07-01", "2021-07-14"]
    assert [entries[0][2], entries[1][2], entries[2][2]] == [HEIGHT_CLASSES[place].colour for place in (0, 4, 8)]
    assert len({*styles.date_pipe([date(2019, 7, 1)]).iter("paletteEntry")}) == 1


def test_a_style_is_xml_of_qgis():
    text = styles.qml(styles.height_pipe())
    root = ET.fromstring(text.split("\n", 1)[1])
    assert root.tag == "qgis"
    assert root.find("pipe/rasterrenderer").get("type") == "singlebandpseudocolor"

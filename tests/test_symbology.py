import math
from itertools import pairwise

import matplotlib as mpl
import numpy as np
import pytest
from matplotlib.colors import to_hex
from skimage.color import deltaE_ciede2000, rgb2lab

from canopy.symbology import CHANGE_CLASSES, CHANGE_VALUES, DIFFERENCE_CLASSES, ERROR_CLASSES, HEIGHT_CLASSES, UNKNOWN_COLOUR

RAMPS = {"heights": HEIGHT_CLASSES, "errors": ERROR_CLASSES}

# Machado, Oliveira and Fernandes (2009), severity 1.0, for linear RGB.
VISION = {
    "protan": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
    "deutan": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]],
    "tritan": [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.303900]],
}


def lab(colours, matrix=None):
    rgb = np.array(colours, float) / 255
    if matrix is not None:
        linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
        linear = np.clip(linear @ np.array(matrix).T, 0, 1)
        rgb = np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)
    return rgb2lab(rgb[None])[0]


def even(colours):
    """Whether lightness runs one way in steps that differ by less than a factor of two."""
    steps = np.diff(lab(colours)[:, 0])
    return (np.sign(steps) == np.sign(steps[0])).all() and np.abs(steps).max() < 2 * np.abs(steps).min()


@pytest.mark.parametrize("classes", RAMPS.values(), ids=RAMPS)
def test_classes_join_and_start_at_0(classes):
    assert classes[0].low == 0
    assert math.isinf(classes[-1].high)
    assert all(a.high == b.low for a, b in pairwise(classes))
    assert len({each.name for each in classes}) == len(classes)


def test_colours_are_those_of_the_ramps_they_claim():
    viridis, magma = mpl.colormaps["viridis"], mpl.colormaps["magma"]
    assert [c.colour for c in HEIGHT_CLASSES] == [to_hex(viridis(x)) for x in np.linspace(0, 1, len(HEIGHT_CLASSES))]
    assert [c.colour for c in ERROR_CLASSES] == [to_hex(magma(x)) for x in np.linspace(0.95, 0.12, len(ERROR_CLASSES))]


@pytest.mark.parametrize("classes", RAMPS.values(), ids=RAMPS)
def test_lightness_runs_evenly_one_way(classes):
    assert even([c.rgb for c in classes])


def test_a_rainbow_does_not_run_evenly():
    assert not even([[round(255 * v) for v in mpl.colormaps["jet"](x)[:3]] for x in np.linspace(0, 1, 9)])


@pytest.mark.parametrize("kind", VISION)
@pytest.mark.parametrize("classes", RAMPS.values(), ids=RAMPS)
def test_neighbours_and_unknown_are_told_apart_by_every_eye(classes, kind):
    seen = lab([c.rgb for c in classes], VISION[kind])
    assert deltaE_ciede2000(seen[:-1], seen[1:]).min() > 4  # 2.3 is just noticeable
    grey = lab([[0x9A] * 3], VISION[kind])
    assert UNKNOWN_COLOUR == "#9a9a9a"
    assert deltaE_ciede2000(seen, grey).min() > 4


def test_labels_say_the_limits():
    assert HEIGHT_CLASSES[1].label() == "2–5 m, shrubs and young trees"
    assert ERROR_CLASSES[-1].label(sign="± ") == "± over 15 m, extreme"


def test_differences_mirror_each_other_around_zero():
    assert [each.low for each in DIFFERENCE_CLASSES] == [-each.high for each in reversed(DIFFERENCE_CLASSES)]
    lightness = lab([each.rgb for each in DIFFERENCE_CLASSES])[:, 0]
    np.testing.assert_allclose(lightness, lightness[::-1], atol=2.5)
    assert (np.diff(lightness[:4]) > 15).all(), "lighter towards no difference"


@pytest.mark.parametrize("matrix", [None, *VISION.values()], ids=["full", *VISION])
def test_lower_and_higher_differ_for_every_kind_of_colour_vision(matrix):
    seen = lab([each.rgb for each in DIFFERENCE_CLASSES], matrix)
    assert (deltaE_ciede2000(seen[:3], seen[:3:-1]) > 15).all()


@pytest.mark.parametrize("matrix", [None, *VISION.values()], ids=["full", *VISION])
def test_values_of_change_are_told_apart_by_every_eye(matrix):
    seen = lab([each.rgb for each in CHANGE_VALUES], matrix)
    apart = deltaE_ciede2000(seen[:, None], seen[None])
    assert apart[~np.eye(len(seen), dtype=bool)].min() > 10
    assert [each.value for each in CHANGE_VALUES] == [0, 1, 2, 3]


def test_what_is_lost_is_warm_and_what_has_grown_is_cold():
    lost, gained = ({each.name: each.rgb for each in CHANGE_VALUES}[name] for name in ("loss", "gain"))
    assert lost[0] > lost[2]
    assert gained[0] < gained[2]
    assert (lost, gained) == (CHANGE_CLASSES[1].rgb, CHANGE_CLASSES[-2].rgb)

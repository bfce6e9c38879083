"""What pages share: pictures inside the file, text that stays text, and places that may not stay empty."""

import base64
import json
import re
from io import BytesIO

import jinja2
import numpy as np
import pytest
from matplotlib.image import imread

from canopy import page
from canopy.page import Drawn, enlarge, json_for_html, photograph, photograph_uri, plain_axes, png_of, render_page
from canopy.raster import Pixels


def test_a_figure_is_the_same_bytes_each_time_and_a_png_inside_the_page(monkeypatch):
    monkeypatch.setattr(page, "DPI", 30)
    figures = [plain_axes(2.0)[0] for _ in range(2)]
    first, second = (png_of(figure) for figure in figures)
    assert first == second
    data = Drawn(name="empty", title="Nothing", alt="Axes without data", png=first).data
    assert base64.b64decode(data.removeprefix("data:image/png;base64,")) == first
    assert imread(BytesIO(first)).shape[:2] == (60, 192)


def test_photographs():
    rng = np.random.default_rng(0)
    valid = np.ones((8, 8), bool)
    valid[0] = False
    colours = rng.integers(0, 255, (4, 8, 8), dtype=np.uint8)
    drawn = photograph(Pixels(data=colours, valid=valid))
    assert np.array_equal(drawn[1:], np.moveaxis(colours[:3], 0, -1)[1:])
    assert (drawn[0] == 255).all()
    deep = photograph(Pixels(data=rng.integers(0, 4000, (1, 8, 8), dtype=np.uint16), valid=valid))
    assert deep[1:].min() == 0
    assert deep[1:].max() == 255
    uri = photograph_uri(drawn)
    assert imread(BytesIO(base64.b64decode(uri.split(",")[1])), format="jpeg").shape == (8, 8, 3)


def test_pixels_stay_pixels_when_a_picture_is_enlarged_or_thinned():
    values = np.arange(12).reshape(3, 4)
    assert np.array_equal(enlarge(values, 8), values.repeat(2, 0).repeat(2, 1))
    thin = enlarge(np.arange(100 * 50).reshape(100, 50), 10)
    assert thin.shape == (10, 5)
    assert set(thin.ravel()) <= set(range(5000))


def test_json_cannot_end_its_element():
    value = {"name": "</script><script>alert('&')</script>", "heights_m": [1.5, None]}
    text = json_for_html(value)
    assert not re.search("[<>&]", text)
    assert json.loads(text) == value
    with pytest.raises(ValueError, match="not JSON compliant"):
        json_for_html([float("nan")])


def test_an_unknown_place_of_a_template_is_an_error():
    with pytest.raises(jinja2.UndefinedError):
        render_page("canopy.tiler", "inspection.html.j2", name="set")

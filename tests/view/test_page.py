"""The page of the web map in a real browser, served as a user serves it: what is on the screen, said and asked.

Every page that a test opens is watched: a line of error in its console, or a request to another address, fails the test.
"""

import json
import math
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import rasterio
import requests
from PIL import Image
from pyproj import CRS, Transformer

from canopy.grid import Box, Lattice
from canopy.model.blocks import BlockTable
from canopy.model.calibration import CalibrationTable
from canopy.model.tables import Calibrated, Member
from canopy.raster import write_raster
from canopy.symbology import ERROR_CLASSES, HEIGHT_CLASSES
from canopy.view import maplibre
from tests.browsers import launch  # noqa: F401 - a fixture

pytestmark = pytest.mark.browser

SQUARE_PX = 64
CENTRES_M = (0.9, 3.4, 7.5, 12.4, 17.5, 22.4, 27.5, 35.4, 47.5)
"""A height in each class, not near its edges."""
GRID = Lattice(crs=CRS.from_epsg(32610), gsd_m=0.5).grid(
    Box(-9_755_000, 987_000, -9_755_000 + 8 * SQUARE_PX, 987_000 + 8 * SQUARE_PX)
)
TO_DEG = Transformer.from_crs(GRID.crs, 4326, always_xy=True)
TO_MAP = Transformer.from_crs(4326, GRID.crs, always_xy=True)
DESKTOP, PHONE = (1280, 800), (360, 740)
PANEL_PX = 21 * 16
PATIENCE_MS = 12_000


# --- a map, its server, a browser ------------------------------------------------------------------------------------------


def squares() -> tuple[np.ndarray, np.ndarray]:
    """(row, col) heights and errors: squares of one class each, noisy so that neighbours differ; two squares are unknown."""
    rng = np.random.default_rng(0)
    number = np.add.outer(3 * np.arange(8), np.arange(8))
    big = number.repeat(SQUARE_PX, 0).repeat(SQUARE_PX, 1)
    noise = rng.integers(-12, 13, big.shape) / 32
    height = np.array(CENTRES_M)[big % len(CENTRES_M)] + noise
    error = np.array([0.5, 1.5, 3, 5, 8, 12, 20])[big % 7] + noise
    for row, col in ((1, 6), (5, 2)):
        here = np.s_[row * SQUARE_PX : (row + 1) * SQUARE_PX, col * SQUARE_PX : (col + 1) * SQUARE_PX]
        height[here] = error[here] = np.nan
    # On the quantum, as the files of a map are.
    height_m, error_m = ((32 * values).round() / 32 for values in (height, error))
    return height_m.astype(np.float32), error_m.astype(np.float32)


def write_map(folder: Path) -> Path:
    """A finished, calibrated map with its image and reference beside it."""
    height, error = squares()
    out = folder / "squares"
    out.mkdir(parents=True)
    write_raster(out / "height.tif", height[None], grid=GRID, nodata=np.nan, band_names=["height_m"], units=["metre"],
                 tags={"CANOPY_CALIBRATION": "by hand"})  # fmt: skip
    bands = np.stack([error, np.maximum(height - error, 0), height + error])
    names = ["error_90_m", "lower_90_m", "upper_90_m"]
    write_raster(out / "error.tif", bands, grid=GRID, nodata=np.nan, band_names=names, units=["metre"] * 3)
    write_raster(folder / "reference.tif", (height + np.float32(1.5))[None], grid=GRID, nodata=np.nan)
    image = np.broadcast_to(np.array([200, 60, 40], np.uint8)[:, None, None], (3, *GRID.shape))
    write_raster(folder / "image.tif", np.ascontiguousarray(image), grid=GRID)
    blocks = BlockTable(sides_m=(30.0,), lower_factor=(0.3,), upper_factor=(0.3,), blocks=(100,), sites=("A",))
    pixels = CalibrationTable(edges_m=(0.0,), lower_factor=(2.0,), upper_factor=(2.0,), pixels=(9000,), sites=("A",))
    member = Member(name="m", version="1", weights_sha256="0" * 64)
    tables = Calibrated(members=(member,), tta="none", tile_sets={}, pixels=pixels, blocks=blocks)
    run = {
        "imagery": {"files": [{"path": str(folder / "image.tif")}], "first_day": "2021-06-03", "last_day": "2021-06-03"},
        "models": [{"name": "m", "version": "1"}],
        "intervals": tables.model_dump(mode="json"),
    }
    (out / "run.json").write_text(json.dumps(run))
    return out


@contextmanager
def serving(out: Path, *options: str) -> Iterator[str]:
    """`canopy view`, as a user starts it; the address that it says."""
    command = [sys.executable, "-m", "canopy.cli", "view", str(out), "--no-open", *options]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as server:
        said = []
        try:
            for line in server.stdout:
                said.append(line)
                if found := re.search(r"http://\S+?/?(?=\s|$)", line):
                    yield found[0].rstrip("/") + "/"
                    break
            else:
                pytest.fail(f"canopy view ended: {''.join(said)}")
        finally:
            server.terminate()


@pytest.fixture(scope="module")
def out(tmp_path_factory) -> Path:
    return write_map(tmp_path_factory.mktemp("page"))


@pytest.fixture(scope="module")
def address(out) -> Iterator[str]:
    with serving(out, "--reference", str(out.parent / "reference.tif")) as address:
        yield address


@pytest.fixture(scope="module")
def browser(launch):  # noqa: F811 - a fixture
    browser = launch()
    yield browser
    browser.close()


@pytest.fixture
def look(browser, address):
    """Opens the page and waits until the map is painted; at the end of the test nothing may have gone wrong unseen."""
    contexts, complaints, strangers = [], [], []

    def opened(after: str = "", *, size=DESKTOP, scheme="light", touch=False, prepare=None, state="ready", address=address):
        context = browser.new_context(
            viewport={"width": size[0], "height": size[1]}, color_scheme=scheme, has_touch=touch, is_mobile=touch,
            permissions=["clipboard-read", "clipboard-write"],
        )  # fmt: skip
        context.set_default_timeout(PATIENCE_MS)
        contexts.append(context)
        page = context.new_page()
        page.on("console", lambda message: complaints.append(message.text) if message.type in {"error", "warning"} else None)
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("request", lambda asked: None if own(asked.url, address) else strangers.append(asked.url))
        if prepare:
            prepare(page)
        page.goto(address + after)
        page.wait_for_selector(f"body[data-state={state}]")
        return page

    opened.complaints, opened.strangers = complaints, strangers
    yield opened
    for context in contexts:
        context.close()
    assert complaints == []
    assert strangers == []


def own(url: str, address: str) -> bool:
    return url.startswith((address, "data:", f"blob:{address}"))


def style(page, text: str) -> None:
    """Add style to the page; the server's policy forbids <style>."""
    page.evaluate(
        "(text) => { const sheet = new CSSStyleSheet(); sheet.replaceSync(text); document.adoptedStyleSheets.push(sheet) }",
        text,
    )


def settle(page) -> None:
    """Wait until everything that is to be seen is painted."""
    page.wait_for_timeout(60)
    page.wait_for_selector("body[data-busy=false]")
    page.evaluate("() => new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)))")


# --- where things are ------------------------------------------------------------------------------------------------------


def place(row: float, col: float) -> tuple[float, float]:
    """(lon, lat) of a pixel's coordinates in the map."""
    return TO_DEG.transform(*GRID.xy(col, row))


def view(row: float, col: float, zoom: float) -> str:
    lon, lat = place(row, col)
    return f"view={lon:.6f},{lat:.6f},{zoom}"


def mercator_px(lon: float, lat: float, zoom: float) -> np.ndarray:
    """Pixels of the world at a zoom of MapLibre, whose world is 512 px wide at zoom 0."""
    world = 512 * 2**zoom
    return np.array([lon / 360 + 0.5, 0.5 - math.asinh(math.tan(math.radians(lat))) / (2 * math.pi)]) * world


class Screen:
    """Where places of the map are on the screen, from the address that the page keeps."""

    def __init__(self, page) -> None:
        lon, lat, self.zoom = map(float, re.search(r"view=([^&]*)", page.url)[1].split(","))
        box = page.locator("#stage").bounding_box()
        self.middle = np.array([box["x"] + box["width"] / 2, box["y"] + box["height"] / 2])
        self.origin = mercator_px(lon, lat, self.zoom)

    def of(self, row: float, col: float) -> tuple[int, int]:
        """(x, y) of the nearest pixel of the screen."""
        x, y = (mercator_px(*place(row, col), self.zoom) - self.origin + self.middle).round().astype(int).tolist()
        return x, y


def picture(page, path: Path) -> np.ndarray:
    page.screenshot(path=path)
    return np.asarray(Image.open(path).convert("RGB")).astype(int)


def class_colour(value: float, classes) -> tuple[int, int, int]:
    return next(each.rgb for each in classes if each.low <= value < each.high)


WHOLE = view(256, 256, 17.2)
"""The whole map, with room around it, in a window of a desktop."""


# --- what is seen ----------------------------------------------------------------------------------------------------------


def test_the_map_is_painted_in_the_colours_of_its_classes(look, tmp_path):
    height, error = squares()
    page = look(f"#{WHOLE}")
    screen = Screen(page)
    middles = [(SQUARE_PX * r + 32, SQUARE_PX * c + 32) for r in range(8) for c in range(8)]
    for layers, values, classes in (("height:100", height, HEIGHT_CLASSES), ("error:100", error, ERROR_CLASSES)):
        page.evaluate("(hash) => { location.hash = hash }", f"{WHOLE}&layers={layers}")
        settle(page)
        seen = picture(page, tmp_path / "map.png")
        ground = tuple(seen[screen.of(-30, 256)[1], screen.of(-30, 256)[0]])
        for row, col in middles:
            x, y = screen.of(row, col)
            wanted = class_colour(values[row, col], classes) if np.isfinite(values[row, col]) else ground
            assert np.abs(seen[y, x] - wanted).max() <= 2, (layers, row, col)
    # Negative control: half a square aside there are other colours.
    shifted = [seen[screen.of(r + SQUARE_PX, c)[1], screen.of(r, c)[0]] for r, c in middles[:-8]]
    assert any(
        np.abs(colour - class_colour(error[r, c], ERROR_CLASSES)).max() > 20
        for colour, (r, c) in zip(shifted, middles[:-8], strict=True)
        if np.isfinite(error[r, c])
    )


def test_the_legend_names_the_classes_of_what_is_visible(look):
    page = look(f"#{WHOLE}")
    assert page.locator("#legend li").all_inner_texts() == [each.label() for each in HEIGHT_CLASSES]
    page.get_by_label("Error (90 % interval)", exact=True).check()
    page.get_by_label("Canopy height", exact=True).uncheck()
    assert page.locator("#legend li").all_inner_texts() == [each.label(sign="± ") for each in ERROR_CLASSES]
    colours = page.locator("#legend .swatch").evaluate_all(
        "(all) => all.map((one) => getComputedStyle(one).backgroundColor)"
    )
    assert colours == [f"rgb({', '.join(map(str, each.rgb))})" for each in ERROR_CLASSES]


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_has_contrast(look, scheme):
    """WCAG 2.2, 1.4.3: at least 4.5 to 1, of every text that is to be seen."""
    page = look(f"#{WHOLE}", scheme=scheme, prepare=flagged_and_uncalibrated)
    page.keyboard.press("s")
    page.keyboard.press("d")
    low = page.evaluate(
        """() => {
        const numbers = (text) => text.match(/[\\d.]+/g).map(Number);
        const linear = (v) => (v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
        const light = (rgb) => [0.2126, 0.7152, 0.0722].reduce((sum, weight, i) => sum + weight * linear(rgb[i] / 255), 0);
        const behind = (element) => {
          for (let at = element; at; at = at.parentElement) {
            const [r, g, b, a = 1] = numbers(getComputedStyle(at).backgroundColor);
            if (a > 0.6) return [r, g, b].map((v) => v * a + 255 * (1 - a)); // at worst it lies on white
          }
          return [255, 255, 255];
        };
        const found = [];
        for (const element of document.querySelectorAll("body *")) {
          const own = [...element.childNodes].some((node) => node.nodeType === 3 && node.textContent.trim());
          if (!own || !element.checkVisibility() || element.closest("svg, :disabled, noscript, #sheet")) continue;
          const [a, b] = [light(numbers(getComputedStyle(element).color)), light(behind(element))].sort((x, y) => y - x);
          found.push([(a + 0.05) / (b + 0.05), element.textContent.trim().slice(0, 30)]);
        }
        return found;
      }"""
    )
    assert len(low) > 25
    assert [one for one in low if one[0] < 4.5] == []


# --- values ----------------------------------------------------------------------------------------------------------------


def told(page) -> dict[str, str]:
    """What the window beside a place says."""
    page.wait_for_selector(".place .value")
    terms, values = (page.locator(f".place {tag}").all_inner_texts() for tag in ("dt", "dd"))
    return {"value": page.locator(".place .value").inner_text(), **dict(zip(terms, values, strict=True))}


def number_of(text: str) -> float:
    return float(text.replace("\u2212", "-").replace("\u202f", "").removesuffix("\u00a0m").removesuffix(" m"))


def test_a_click_tells_what_rasterio_reads(look, out, tmp_path):
    page = look(f"#{view(256, 256, 19)}")
    screen = Screen(page)
    with rasterio.open(out / "height.tif") as heights, rasterio.open(out / "error.tif") as errors:
        for row, col in ((256.5, 256.5), (200.5, 301.5), (311.5, 190.5), (180.5, 230.5)):
            page.mouse.click(*screen.of(row, col))
            page.wait_for_selector(f".place:has-text('row {int(row)}, column {int(col)}')")
            found = told(page)
            x, y = heights.xy(int(row), int(col))
            (height,), (error, lower, upper) = next(heights.sample([(x, y)])), next(errors.sample([(x, y)]))
            assert found["value"] == f"{height:.1f}\u00a0m ± {error:.1f}\u00a0m"
            assert found["90\u00a0% interval"] == f"{lower:.1f} to {upper:.1f}\u00a0m"
            assert number_of(found["Reference"]) == pytest.approx(height + 1.5, abs=0.051)
            assert found["Map − reference"] == "\u22121.5\u00a0m"
            assert found["Imagery of"] == "2021-06-03"
            assert np.abs(np.array([number_of(part) for part in found["x, y"].split(", ")]) - (x, y)).max() < 0.3
    page.screenshot(path=tmp_path / "click.png")


def test_unknown_and_outside_are_words(look):
    page = look(f"#{WHOLE}")
    screen = Screen(page)
    page.mouse.click(*screen.of(1.5 * SQUARE_PX, 6.5 * SQUARE_PX))
    found = told(page)
    assert found["value"] == "Height unknown"
    assert "90\u00a0% interval" not in found
    page.keyboard.press("Escape")
    assert page.locator(".place").count() == 0
    page.mouse.click(*screen.of(-20, 100))
    assert told(page)["value"] == "Outside of the map"


def test_what_is_not_promised_is_hatched_and_said(look, tmp_path):
    plain = picture(look(f"#{WHOLE}"), tmp_path / "plain.png")
    page = look(f"#{WHOLE}", prepare=flagged_and_uncalibrated)
    settle(page)
    screen = Screen(page)
    x, y = screen.of(2.5 * SQUARE_PX, 2.5 * SQUARE_PX)
    aside = screen.of(6.5 * SQUARE_PX, 6.5 * SQUARE_PX)
    hatched = picture(page, tmp_path / "hatched.png")
    assert (hatched[y - 10 : y + 10, x - 10 : x + 10] != plain[y - 10 : y + 10, x - 10 : x + 10]).any(axis=-1).mean() > 0.2
    near = np.s_[aside[1] - 10 : aside[1] + 10, aside[0] - 10 : aside[0] + 10]
    assert (hatched[near] == plain[near]).all()
    assert "not promised" in page.locator("#legend").inner_text()
    assert page.locator("#notices li").all_inner_texts() == ["It promises nothing."]
    page.mouse.click(x, y)
    told(page)
    assert page.locator(".place .warning").all_inner_texts() == [
        "Uncalibrated: the interval promises nothing.",
        "Flagged sheet: the 90\u00a0% is not promised here.",
    ]
    page.keyboard.press("Escape")
    page.mouse.click(*aside)
    told(page)
    assert page.locator(".place .warning").count() == 1
    page.keyboard.press("Escape")
    # Switched off it is still said.
    page.get_by_label("Hatching of flagged sheets").uncheck()
    settle(page)
    assert (
        picture(page, tmp_path / "off.png")[y - 10 : y + 10, x - 10 : x + 10] == plain[y - 10 : y + 10, x - 10 : x + 10]
    ).all()
    page.mouse.click(x, y)
    told(page)
    assert page.locator(".place .warning").count() == 2
    assert page.url.endswith("&hatch=no")
    page.evaluate("(hash) => { location.hash = hash }", f"{WHOLE}&polygon={polygon((2.1, 2.1), (2.1, 3), (3, 2.5))}")
    page.wait_for_selector("#statistics .warning:has-text('flagged')")
    page.evaluate("(hash) => { location.hash = hash }", f"{WHOLE}&polygon={polygon((6.1, 6.1), (6.1, 7), (7, 6.5))}")
    page.wait_for_selector("#statistics figure")
    assert page.locator("#statistics .warning").count() == 0


def polygon(*squares: tuple[float, float]) -> str:
    """As a link has it, from corners counted in squares."""
    return ";".join("{},{}".format(*place(SQUARE_PX * row, SQUARE_PX * col)) for row, col in squares)


def flagged_and_uncalibrated(page) -> None:
    """Let the server say that the upper left quarter is flagged."""
    corners = [place(row, col) for row, col in ((64, 64), (64, 256), (256, 256), (256, 64), (64, 64))]
    square = {"type": "Feature", "properties": {}, "geometry": {"type": "Polygon", "coordinates": [corners]}}

    def changed(route) -> None:
        said = route.fetch().json()
        said |= {
            "calibrated": False,
            "notices": ["It promises nothing."],
            "flagged": {"type": "FeatureCollection", "features": [square]},
        }
        route.fulfill(json=said)

    page.route("**/map.json", changed)


# --- swipe -----------------------------------------------------------------------------------------------------------------


def test_swipe_shows_two_layers_and_the_divider_moves_by_keys_and_pointer(look, tmp_path):
    height, error = squares()
    page = look(f"#{WHOLE}&layers=height:100")
    page.keyboard.press("s")
    page.get_by_label("Left", exact=True).select_option("height")
    page.get_by_label("Right", exact=True).select_option("error")
    divider = page.get_by_role("separator")
    divider.focus()

    def check(at: int) -> None:
        assert divider.get_attribute("aria-valuenow") == str(at)
        settle(page)
        screen, seen = Screen(page), picture(page, tmp_path / f"swipe-{at}.png")
        border = PANEL_PX + (DESKTOP[0] - PANEL_PX) * at / 100
        sides = set()
        for row in range(8):
            for col in range(8):
                x, y = screen.of(SQUARE_PX * row + 32, SQUARE_PX * col + 32)
                if np.isnan(height[SQUARE_PX * row + 32, SQUARE_PX * col + 32]) or abs(x - border) < 30:
                    continue
                values, classes = (height, HEIGHT_CLASSES) if x < border else (error, ERROR_CLASSES)
                assert (
                    np.abs(seen[y, x] - class_colour(values[SQUARE_PX * row + 32, SQUARE_PX * col + 32], classes)).max() <= 2
                )
                sides.add(x < border)
        assert len(sides) == 2

    check(50)
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowRight")
    check(54)
    page.keyboard.press("PageDown")
    check(44)
    handle = divider.bounding_box()
    page.mouse.move(handle["x"] + handle["width"] / 2, 300)
    page.mouse.down()
    page.mouse.move(PANEL_PX + (DESKTOP[0] - PANEL_PX) * 0.6, 320, steps=4)
    page.mouse.up()
    check(60)
    page.keyboard.press("Home")
    assert divider.get_attribute("aria-valuenow") == "0"
    page.keyboard.press("End")
    assert divider.get_attribute("aria-valuenow") == "100"
    assert "swipe=height,error,100" in page.url
    page.keyboard.press("s")
    assert divider.count() == 0
    assert "swipe" not in page.url


def test_both_sides_of_the_swipe_move_together(look, tmp_path):
    """The same layer on both sides is one picture, also after the map was moved."""
    page = look(f"#{WHOLE}&layers=height:100&swipe=height,height,50")
    settle(page)
    for _ in range(2):
        page.locator("#map canvas").focus()
        page.keyboard.press("ArrowLeft")
        page.wait_for_timeout(500)
    page.keyboard.press("+")
    page.wait_for_timeout(500)
    settle(page)
    page.keyboard.press("s")
    settle(page)
    hidden = (
        "#tools, #panel, #status, .maplibregl-control-container, #crosshair { visibility: hidden !important }"
        ":focus-visible { outline: none !important }"
    )
    style(page, hidden)
    alone = picture(page, tmp_path / "alone.png")
    page.keyboard.press("s")
    style(page, "#divider, .side { visibility: hidden !important }")
    page.get_by_label("Right", exact=True).evaluate("(e) => { e.value = 'height'; e.dispatchEvent(new Event('change')) }")
    settle(page)
    assert (picture(page, tmp_path / "both.png") == alone).all(axis=-1).mean() > 0.999


# --- polygon ---------------------------------------------------------------------------------------------------------------

CORNERS = ((70.3, 80.2), (90.1, 300.7), (300.4, 330.5), (280.9, 90.6))


def corners_in(url: str) -> list[list[float]]:
    return [[float(v) for v in corner.split(",")] for corner in re.search(r"polygon=([^&]*)", url)[1].split(";")]


def test_statistics_of_a_drawn_polygon(look, address, out, tmp_path):
    geopandas = pytest.importorskip("geopandas")
    from shapely.geometry import Polygon

    from canopy.analyse.zonal import zonal_statistics
    from canopy.region.folder import RegionFolder

    page = look(f"#{WHOLE}")
    screen = Screen(page)
    page.get_by_role("button", name="Draw a polygon").click()
    page.mouse.click(*screen.of(200, 20))  # one too many
    page.keyboard.press("Backspace")
    for corner in CORNERS:
        page.mouse.click(*screen.of(*corner))
        page.wait_for_timeout(350)  # faster would be a double click
    page.screenshot(path=tmp_path / "drawing.png")
    page.keyboard.press("Enter")
    page.wait_for_selector("#statistics figure svg")
    page.screenshot(path=tmp_path / "polygon.png")

    corners = corners_in(page.url)
    assert np.abs(np.array(corners) - [place(*corner) for corner in CORNERS]).max() < 1e-5
    ring = [*corners, corners[0]]
    answer = requests.post(f"{address}statistics", json={"type": "Polygon", "coordinates": [ring]}).json()
    frame = geopandas.GeoDataFrame(geometry=[Polygon(ring)], crs=4326)
    (row,) = zonal_statistics(RegionFolder.open(out), frame).drop(columns="geometry").to_dict("records")
    for name, value in row.items():
        assert answer[name] == (pytest.approx(value, rel=1e-5) if np.isfinite(value) else None), name

    terms, values = (page.locator(f"#statistics {tag}").all_inner_texts() for tag in ("dt", "dd"))
    seen = dict(zip(terms, values, strict=True))
    lower, upper = answer["mean_lower_90_m"], answer["mean_upper_90_m"]
    assert seen["Area"] == f"{answer['area_m2'] / 1e4:.2f}\u00a0ha"
    assert seen["Mean height"].split("\n") == [
        f"{answer['mean_m']:.1f}\u00a0m",
        f"90\u00a0%: {lower:.1f} to {upper:.1f}\u00a0m",
    ]
    assert seen["Cover above 5\u00a0m"].split("\n")[0] == f"{100 * answer['cover_5m']:.1f}\u00a0%"
    bars = page.locator("#statistics .bar").evaluate_all("(all) => all.map((bar) => Number(bar.getAttribute('height')))")
    areas = np.array(answer["histogram"]["area_m2"])
    filled = areas[: len(bars)]
    assert areas[len(bars) :].sum() == 0
    assert np.abs(np.array(bars) / max(bars) - filled / filled.max()).max() < 0.01

    page.get_by_role("button", name="Remove").click()
    assert page.locator("#statistics").is_hidden()
    assert "polygon" not in page.url


def test_a_polygon_by_keys_double_click_and_given_up(look):
    page = look(f"#{WHOLE}")
    page.locator("#map canvas").focus()
    page.keyboard.press("d")
    for key in ("ArrowRight", "ArrowDown", "ArrowLeft"):
        page.keyboard.press("Space")
        page.keyboard.press(key)
        page.wait_for_timeout(450)
    page.keyboard.press("Enter")
    page.wait_for_selector("#statistics figure svg")
    assert len(corners_in(page.url)) == 3

    page.keyboard.press("d")
    assert "polygon" not in page.url
    screen = Screen(page)
    page.mouse.click(*screen.of(100, 100))
    page.wait_for_timeout(350)
    page.keyboard.press("Escape")
    assert page.locator("#hint").is_hidden()
    assert page.locator("#drawing > *").count() == 0

    page.keyboard.press("d")
    for corner in CORNERS[:3]:
        page.mouse.click(*screen.of(*corner))
        page.wait_for_timeout(350)
    zoom = screen.zoom
    page.mouse.dblclick(*screen.of(*CORNERS[3]))
    page.wait_for_selector("#statistics figure svg")
    assert len(corners_in(page.url)) == 4
    assert Screen(page).zoom == zoom


def test_a_polygon_beyond_the_map_says_so(look):
    page = look(f"#{WHOLE}&polygon=10,10;10,10.001;10.001,10.001")
    page.wait_for_selector("#numbers .error, #numbers dl")
    assert re.search("outside|unknown|no height", page.locator("#numbers").inner_text(), re.IGNORECASE)
    look.complaints[:] = [
        line for line in look.complaints if "/statistics" not in line and "Failed to load resource" not in line
    ]


# --- links -----------------------------------------------------------------------------------------------------------------


def shown(page) -> SimpleNamespace:
    """All that a link promises to bring back."""
    return SimpleNamespace(
        order=page.locator("#layers li").evaluate_all("(all) => all.map((one) => one.dataset.layer)"),
        visible=page.locator("#layers [type=checkbox]").evaluate_all("(all) => all.map((one) => one.checked)"),
        opacity=page.locator("#layers output").all_inner_texts(),
        sides=[
            page.locator(f"#{side}").input_value() if page.locator(f"#{side}").is_visible() else None
            for side in ("left", "right")
        ],
        divider=page.locator("#divider").get_attribute("aria-valuenow"),
    )


def test_a_link_brings_the_same_view(look, tmp_path):
    page = look(f"#{view(250, 240, 17.25)}")
    page.get_by_label("Hillshade of the canopy", exact=True).check()
    page.get_by_label("Opacity of Hillshade of the canopy").fill("25")
    page.get_by_role("button", name="Move Hillshade of the canopy down").click()
    page.get_by_label("Error (90 % interval)", exact=True).check()
    screen = Screen(page)
    page.keyboard.press("d")
    for corner in CORNERS:
        page.mouse.click(*screen.of(*corner))
        page.wait_for_timeout(350)
    page.keyboard.press("Enter")
    page.wait_for_selector("#statistics figure svg")
    page.keyboard.press("s")
    page.keyboard.press("ArrowLeft")
    page.keyboard.press("l")
    page.wait_for_selector("#status:has-text('copied')")
    link = page.evaluate("navigator.clipboard.readText()")
    assert link == page.url
    first = shown(page)
    settle(page)
    hide = "#status, #crosshair { visibility: hidden !important } :focus-visible { outline: none !important }"
    style(page, hide)

    again = look(link.split("/", 3)[3])
    again.wait_for_selector("#statistics figure svg")
    settle(again)
    style(again, hide)
    assert shown(again) == first
    drawn = [
        each.locator("#drawing polygon.over").get_attribute("points").replace(",", " ").split() for each in (page, again)
    ]
    assert np.abs(np.array(drawn[0], float) - np.array(drawn[1], float)).max() <= 0.2
    assert again.url == link
    assert "25\u00a0%" in first.opacity
    assert first.order.index("hillshade") > 0
    stage = np.s_[:, PANEL_PX:-70]
    pictures = [picture(each, tmp_path / "link.png")[stage] for each in (page, again)]
    assert (np.abs(pictures[0] - pictures[1]).max(axis=-1) <= 8).mean() > 0.995
    # Negative control: another link shows something else.
    assert shown(look(f"#{WHOLE}")) != first


def test_a_link_to_what_is_not_there_says_so(look):
    page = look("#view=north,3&layers=height:70,-snow:10&swipe=height,snow,20&polygon=1,2")
    assert "snow" in page.locator("#status").inner_text()
    assert page.locator("#divider").is_hidden()
    assert page.locator("[data-layer=height] output").inner_text() == "70\u00a0%"


# --- keys and small screens ------------------------------------------------------------------------------------------------


def test_everything_can_be_reached_by_keys(look, tmp_path):
    page = look(f"#{WHOLE}")
    reached = set()
    for _ in range(40):
        page.keyboard.press("Tab")
        name, outlined = page.evaluate(
            """() => {
                const e = document.activeElement;
                return [e.dataset.control || e.id || e.tagName, getComputedStyle(e).outlineStyle !== "none"];
            }"""
        )
        assert outlined or name == "BODY", name
        reached.add(name)
    assert {
        "swipe",
        "draw",
        "fit",
        "link",
        "ask",
        "zoom-in",
        "show height",
        "fade height",
        "up height",
        "sheet",
        "CANVAS",
    } <= reached
    page.locator("#map canvas").focus()
    page.keyboard.press("Enter")
    assert re.match(r"[\d.]+\u00a0m ± |Height unknown", told(page)["value"])
    page.screenshot(path=tmp_path / "cross.png")
    page.keyboard.press("Escape")
    page.keyboard.press("?")
    assert page.get_by_role("dialog").is_visible()
    page.screenshot(path=tmp_path / "help.png")
    page.keyboard.press("Escape")
    assert page.get_by_role("dialog").count() == 0
    first = page.locator("#layers [type=checkbox]").first
    before = first.is_checked()
    page.keyboard.press("1")
    assert first.is_checked() is not before
    page.keyboard.press("p")
    assert page.locator("#content").is_hidden()
    page.keyboard.press("p")
    assert page.locator("#content").is_visible()


def test_a_phone(look, tmp_path):
    page = look(size=PHONE, touch=True)
    assert page.evaluate("document.documentElement.scrollWidth") <= PHONE[0]
    page.screenshot(path=tmp_path / "phone.png")
    for button in page.locator("#tools button").all():
        box = button.bounding_box()
        assert min(box["width"], box["height"]) >= 44
        assert box["x"] + box["width"] <= PHONE[0]
    stage = page.locator("#stage").bounding_box()
    page.touchscreen.tap(stage["x"] + stage["width"] / 2, stage["y"] + stage["height"] / 2)
    told(page)
    window = page.locator(".place").bounding_box()
    assert window["x"] >= 0
    assert window["x"] + window["width"] <= PHONE[0]
    sheet = page.locator("#sheet")
    assert sheet.get_attribute("aria-expanded") == "false"
    sheet.tap()
    assert sheet.get_attribute("aria-expanded") == "true"
    assert page.locator("#legend li").first.is_visible()
    page.wait_for_timeout(100)
    page.screenshot(path=tmp_path / "phone-open.png")
    grip = sheet.bounding_box()
    page.mouse.move(180, grip["y"] + 8)
    page.mouse.down()
    page.mouse.move(180, grip["y"] + 300, steps=3)
    page.mouse.up()
    assert sheet.get_attribute("aria-expanded") == "false"
    page.get_by_role("button", name="Draw a polygon").tap()
    for x, y in ((100, 200), (230, 210), (200, 330)):
        page.touchscreen.tap(x, y)
        page.wait_for_timeout(400)
    page.screenshot(path=tmp_path / "phone-drawing.png")
    page.get_by_role("button", name="Close it").tap()
    page.wait_for_selector("#statistics figure svg")
    page.wait_for_timeout(100)
    assert page.locator("#statistics-title").is_visible()
    assert page.locator("#statistics-title").bounding_box()["y"] < PHONE[1] - 100
    page.screenshot(path=tmp_path / "phone-polygon.png")


def test_on_paper_the_map_is_a_picture(look, tmp_path):
    page = look(f"#{WHOLE}&layers=height:100&swipe=height,error,50")
    settle(page)
    page.evaluate("dispatchEvent(new Event('beforeprint'))")  # as browsers do: before the look for paper is in force
    page.emulate_media(media="print", color_scheme="light")
    page.evaluate("document.querySelector('#printed').decode()")
    page.screenshot(path=tmp_path / "print.png", full_page=True)
    page.locator("#printed").screenshot(path=tmp_path / "printed.png")
    seen = {
        tuple(colour)
        for colour in np.asarray(
            Image.open(tmp_path / "printed.png").convert("RGB").resize((200, 150), Image.NEAREST)
        ).reshape(-1, 3)
    }
    assert {each.rgb for each in HEIGHT_CLASSES} & seen
    assert {each.rgb for each in ERROR_CLASSES} & seen
    assert page.locator("#legend li").first.is_visible()
    assert page.locator("#tools").is_hidden()
    tops = [page.locator(part).bounding_box()["y"] for part in ("#name", "#printed", "#legend")]
    assert tops == sorted(tops)
    page.evaluate("dispatchEvent(new Event('afterprint'))")
    assert page.locator("#printed").count() == 0


# --- what goes wrong -------------------------------------------------------------------------------------------------------


def test_a_base_map_is_the_only_thing_asked_of_others(look, out):
    """Also the negative control of the watch: this request, and the complaint that nobody answers it, are seen."""

    tiles = "http://127.0.0.1:9/{z}/{x}/{y}.png"
    with serving(out, "--basemap", tiles, "--attribution", "Who <b>made</b> it") as other:
        page = look(f"#{WHOLE}", address=other)
        assert page.locator(".maplibregl-ctrl-attrib").inner_text() == "Who <b>made</b> it"
        page.wait_for_selector("#status:not(:empty)")
    assert look.strangers
    assert all(re.fullmatch(r"http://127\.0\.0\.1:9/\d+/\d+/\d+\.png", url) for url in look.strangers)
    assert look.complaints
    look.strangers.clear()
    look.complaints.clear()


def test_a_server_that_is_gone(look):
    page = look(f"#{WHOLE}")
    page.route("**/point?*", lambda route: route.abort())
    page.mouse.click(*Screen(page).of(100, 100))
    page.wait_for_selector(".place .error")
    assert page.locator(".place .error").inner_text() == "The server does not answer; is canopy view still running?"
    look.complaints.clear()
    page = look(prepare=lambda page: page.route("**/map.json", lambda route: route.abort()), state="failed")
    assert page.locator("#veil").inner_text() == "The server does not answer; is canopy view still running?"
    look.complaints.clear()


def test_without_maplibre_the_page_says_how_to_get_it(look):
    page = look(prepare=lambda page: page.route("**/maplibre-gl.mjs", lambda route: route.abort()), state="failed")
    assert page.locator("#veil").inner_text().endswith(maplibre.COMMAND)
    look.complaints.clear()


def test_without_webgl_the_page_says_so(launch, address):  # noqa: F811 - a fixture
    browser = launch("--disable-3d-apis")
    page = browser.new_page()
    page.goto(address)
    page.wait_for_selector("body[data-state=failed]")
    assert "WebGL" in page.locator("#veil").inner_text()
    browser.close()

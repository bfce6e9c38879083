"""A real browser for tests: Debian's Chromium, driven by Playwright."""

import shutil
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from canopy.view import maplibre

ALWAYS = ("--no-sandbox", "--use-angle=swiftshader", "--enable-unsafe-swiftshader")
"""Without a graphics card WebGL is drawn by the processor, which Chromium has to be told to do."""


@pytest.fixture(scope="module")
def launch() -> Iterator[Callable[..., Any]]:
    """Starts a browser, with more of its arguments; skips, with the reason, where there is none or nothing to show."""
    sync_api = pytest.importorskip("playwright.sync_api")
    chromium = shutil.which("chromium")
    if chromium is None:
        pytest.skip("no chromium on this machine")
    if not maplibre.in_place():
        pytest.skip(f"MapLibre GL is not in place; put it there with {maplibre.COMMAND}")
    with sync_api.sync_playwright() as play:
        yield lambda *arguments: play.chromium.launch(executable_path=chromium, args=[*ALWAYS, *arguments])

"""How long a reader waits for the first map: the page of a region of 10 000 x 10 000 px in a real browser.

Measured in the browser, from the beginning of the navigation until everything that is to be seen is painted. Nothing is
cached: each time the browser knows the page for the first time, and the first time the server has not read a tile yet. The
graphics are drawn by the processor, so that with a graphics card it is less.
"""

import json
import signal
import subprocess
import sys

import pytest

from tests.bench.bench_view import out, say  # noqa: F401 - `out` is a fixture
from tests.browsers import launch  # noqa: F401 - a fixture

PAINTED_TARGET_S = 2.0
TIMES = 4


@pytest.mark.bench
@pytest.mark.browser
def test_first_map(out, launch):  # noqa: F811 - fixtures
    browser = launch()
    command = [sys.executable, "-m", "canopy.cli", "view", str(out), "--no-open", "--json"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        try:
            url = json.loads("".join(server.stdout.readline() for _ in range(4)))["url"]
            browser.new_page().goto("about:blank")  # the browser itself has started
            painted_s = []
            for _ in range(TIMES):
                context = browser.new_context(viewport={"width": 1280, "height": 800})
                page = context.new_page()
                tiles = []
                page.on("requestfinished", lambda request, tiles=tiles: tiles.append(request.url))
                page.goto(url)
                page.wait_for_selector("body[data-state=ready]")
                painted_s.append(page.evaluate("performance.getEntriesByName('painted')[0].startTime") / 1000)
                context.close()
        finally:
            server.send_signal(signal.SIGINT)
    browser.close()
    shown = sum("/tiles/" in url for url in tiles)
    say(
        f"first map painted, {shown} tiles: {painted_s[0]:.2f} s, then {', '.join(f'{s:.2f}' for s in painted_s[1:])} s "
        f"(target < {PAINTED_TARGET_S})"
    )
    assert shown >= 4
    assert min(painted_s) < PAINTED_TARGET_S

"""The files of the page hang together; what they do is tested in a browser."""

import re
from pathlib import Path

from canopy.view import maplibre
from canopy.view.app import PAGE, TYPES

HTML = (PAGE / "index.html").read_text()
FILES = {path.name: path.read_text() for path in PAGE.iterdir() if path.is_file()}
ASKED = re.compile(r"""(?:href|src)=["']assets/([^"']+)|from ["']\./([^"']+)|import\(["']\./([^"']+)""")


def names_in(text: str) -> set[str]:
    return {next(filter(None, groups)) for groups in ASKED.findall(text)}


def test_every_file_that_is_asked_for_is_there_and_every_one_is_asked_for():
    asked = set().union(*map(names_in, FILES.values()))
    assert asked == set(FILES) - {"index.html"} | {"maplibre-gl.mjs", "maplibre-gl.css"}
    assert asked & set(maplibre.FILES) == {"maplibre-gl.mjs", "maplibre-gl.css"}
    assert {Path(name).suffix for name in asked} <= set(TYPES)


def test_modules_are_read_at_once():
    """Each module that waited until another names it would cost a turn to the server before the first map."""
    preloaded = set(re.findall(r'rel="modulepreload" href="assets/([^"]+)"', HTML))
    assert preloaded == {name for name in FILES if name.endswith(".js") and name != "main.js"} | {"maplibre-gl.mjs"}


def test_elements_that_scripts_name_are_on_the_page():
    there = set(re.findall(r'\bid="([^"]+)"', HTML))
    named = set().union(*(re.findall(r'\bpart\("([^"]+)"\)', text) for name, text in FILES.items() if name.endswith(".js")))
    made = {"printed"}  # by print.js, while it is printed
    assert named - made <= there
    assert not named <= {"map"}


def test_no_address_of_anybody_else_is_in_the_page():
    known = {"http://www.w3.org/2000/svg"}
    addresses = {found for text in FILES.values() for found in re.findall(r"https?://[^\s\"'`)>]+", text)}
    assert addresses == known

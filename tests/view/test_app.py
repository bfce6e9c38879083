"""The server as a browser, and as somebody with bad intentions, sees it."""

import asyncio
import json
import re
import shutil
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from urllib.parse import unquote

import pytest
import shapely
from fastapi import FastAPI, Response
from starlette.testclient import TestClient

from canopy.errors import AnalysisError, RasterError
from canopy.region.folder import RegionFolder
from canopy.view import app as server
from canopy.view.app import MAX_BODY_BYTES, PAGE, create_app
from canopy.view.scene import Scene
from canopy.view.serve import Address
from tests.finished_maps import grid
from tests.view.conftest import SHAPE, degrees, tile_at

TILE = tile_at(grid(SHAPE), 18, 150, 170)
PATH = f"/tiles/height/{TILE.zoom}/{TILE.x}/{TILE.y}.png"
LON, LAT = degrees(grid(SHAPE), 150.5, 170.5)
TRIANGLE = shapely.to_geojson(shapely.Polygon([degrees(grid(SHAPE), *at) for at in ((10, 20), (200, 30), (90, 300))]))
JSON = {"content-type": "application/json"}


def test_the_page_is_told_what_there_is(client):
    told = client.get("/map.json").json()
    assert told["name"] == "map"
    assert told["model"] == "made 3"
    assert told["date"] == "2020-06-18 to 2021-07-03"
    assert (told["gsd_m"], told["crs"], told["calibrated"]) == (0.6, "EPSG:32610", True)
    west, south, east, north = told["bounds_deg"]
    assert west < LON < east
    assert south < LAT < north
    layers = {layer["id"]: layer for layer in told["layers"]}
    assert list(layers) == ["imagery", "height", "reference", "difference", "error", "date", "hillshade"]
    assert [layer["kind"] for layer in layers.values()] == ["image", *list(layers)[1:]]
    assert [name for name, layer in layers.items() if layer["visible"]] == ["height"]
    assert {layer["max_zoom"] for layer in layers.values()} == {18}
    assert all(re.fullmatch("#[0-9a-f]{6}", entry["colour"]) for layer in layers.values() for entry in layer["legend"])
    for layer in layers.values():
        address = layer["tiles"].format(z=TILE.zoom, x=TILE.x, y=TILE.y)
        assert client.get(f"/{address}").headers["content-type"] == "image/png"


def addresses(value):
    """All texts in an answer that look like an address or a path."""
    if isinstance(value, dict):
        return [found for each in value.values() for found in addresses(each)]
    if isinstance(value, list):
        return [found for each in value for found in addresses(each)]
    return [value] if isinstance(value, str) and ("//" in value or value.startswith("/") or "{z}" in value) else []


def test_all_addresses_are_relative(client):
    """So that the page also works behind a proxy that puts it elsewhere, as under /user/me/proxy/8765/."""
    told = client.get("/map.json").json()
    found = addresses(told)
    assert len(found) == len(told["layers"])
    assert all(re.fullmatch(r"tiles/[a-z]+/\{z\}/\{x\}/\{y\}\.png", address) for address in found)
    said = [
        client.get(f"/point?lon={LON}&lat={LAT}").json(),
        client.post("/statistics", content=TRIANGLE, headers=JSON).json(),
    ]
    assert not addresses(said)
    page = client.get("/").text
    named = re.findall(r'(?:src|href)="([^"#]*)"', page)
    assert named
    assert not [address for address in named if address.startswith("/") or "//" in address]
    assert addresses({"a": ["http://x/1.png", "/tiles"]}) == ["http://x/1.png", "/tiles"], "the check sees them"


def test_a_place_and_a_polygon_are_answered(client, scene):
    assert client.get(f"/point?lon={LON}&lat={LAT}").json() == scene.point(LON, LAT).model_dump()
    said = client.post("/statistics", content=TRIANGLE, headers=JSON)
    assert said.status_code == 200
    assert said.json()["mean_m"] > 0


# --- what is refused -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "status"),
    [
        ("/tiles/nothing/3/1/1.png", 404),
        ("/tiles/height/19/1/1.png", 404),
        ("/tiles/height/-1/0/0.png", 404),
        ("/tiles/height/3/8/1.png", 404),
        ("/tiles/height/3/1/-1.png", 404),
        ("/tiles/height/3/1/1", 404),
        ("/tiles/height/3/1/1.jpg", 404),
        ("/tiles/height/a/1/1.png", 422),
        ("/tiles/height/3/1.5/1.png", 422),
        ("/tiles/height/3/1/nan.png", 422),
        (f"/tiles/height/3/1/{'9' * 5000}.png", 422),
        (f"/tiles/height/3/1/{'9' * 400}.png", 404),
        ("/point", 422),
        ("/point?lon=a&lat=1", 422),
        ("/point?lon=nan&lat=1", 422),
        ("/point?lon=inf&lat=1", 422),
        ("/point?lon=181&lat=1", 422),
        ("/point?lon=1&lat=-91", 422),
        ("/assets/nothing.js", 404),
        ("/docs", 404),
        ("/openapi.json", 404),
        ("/statistics", 405),
    ],
)
def test_bad_requests_get_a_line(client, path, status):
    answer = client.get(path)
    assert answer.status_code == status
    detail = answer.json()["detail"]
    assert isinstance(detail, str)
    assert detail
    assert "\n" not in detail


@pytest.mark.parametrize(
    ("body", "headers", "status"),
    [
        (b"{", JSON, 422),
        (b'{"type": "Point", "coordinates": [0, 0]}', JSON, 422),
        (TRIANGLE, {"content-type": "text/plain"}, 415),
        (TRIANGLE, {"content-type": "application/x-www-form-urlencoded"}, 415),
        (TRIANGLE, {}, 415),
        (b" " * (MAX_BODY_BYTES + 1), JSON, 413),
        (shapely.to_geojson(shapely.Point(0, 0).buffer(1, quad_segs=5000)), JSON, 413),
    ],
)
def test_bad_polygons_get_a_line(client, body, headers, status):
    answer = client.post("/statistics", content=body, headers=headers)
    assert answer.status_code == status
    assert "\n" not in answer.json()["detail"]


def test_a_damaged_file_is_a_line_and_a_bug_tells_nothing(scene, monkeypatch):
    client = TestClient(create_app(scene), base_url="http://localhost", raise_server_exceptions=False)

    def fail(error):
        def tile(*_):
            raise error

        return tile

    monkeypatch.setattr(type(scene), "tile", fail(RasterError("height.tif is damaged; fetch it again")))
    answer = client.get(PATH)
    assert (answer.status_code, answer.json()) == (500, {"detail": "height.tif is damaged; fetch it again"})
    monkeypatch.setattr(type(scene), "tile", fail(ValueError("secret")))
    answer = client.get(PATH)
    assert answer.status_code == 500
    assert "secret" not in answer.text
    assert "Traceback" not in answer.text


def test_a_polygon_that_the_map_cannot_answer_is_a_line(client, monkeypatch):
    """As one that is valid in degrees, but no longer in the map's CRS."""

    def refuse(*_):
        raise AnalysisError("the polygon in row 0 is invalid; repair its geometry first")

    monkeypatch.setattr(server, "polygon_statistics", refuse)
    answer = client.post("/statistics", content=TRIANGLE, headers=JSON)
    assert (answer.status_code, list(answer.json())) == (422, ["detail"])


# --- other files -----------------------------------------------------------------------------------------------------------


def get(app, raw_path):
    """(status, body): a request with an address as it is on the wire; clients tidy up what they send."""
    sent = []

    async def receive():
        return {"type": "http.request", "body": b"", "more_body": False}

    async def send(message):
        sent.append(message)

    path, _, query = raw_path.partition("?")
    scope = {
        "type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "method": "GET", "scheme": "http",
        "path": unquote(path), "raw_path": path.encode(), "query_string": query.encode(), "root_path": "",
        "headers": [(b"host", b"localhost")], "client": ("127.0.0.1", 1), "server": ("127.0.0.1", 8765),
    }  # fmt: skip
    asyncio.run(app(scope, receive, send))
    return sent[0]["status"], b"".join(message.get("body", b"") for message in sent[1:])


UP = "../" * 12
ATTEMPTS = [
    "/assets/../app.py",
    "/assets/..%2fapp.py",
    "/assets/%2e%2e/app.py",
    "/assets/%2e%2e%2fapp.py",
    "/assets/..%252fapp.py",
    "/assets/....//app.py",
    "/assets/..\\app.py",
    "/assets/..%5capp.py",
    "/assets/%00index.html",
    "/assets/index.html%00.py",
    "/assets//etc/passwd",
    "/assets/%2fetc%2fpasswd",
    f"/assets/{UP}etc/passwd",
    f"/assets/{UP.replace('/', '%2f')}etc%2fpasswd",
    "/assets/.",
    "/assets/..",
    "/assets/maplibre/../../app.py",
    "/../app.py",
    "//etc/passwd",
    "/tiles/../../app.py",
    "/tiles/..%2f..%2fheight/1/1/1.png",
    "/tiles/%2fetc%2fpasswd/1/1/1.png",
    "/tiles/height/1/1/..%2f..%2fapp.py",
    "/tiles/height.tif/1/1/1.png",
    "/point?lon=/etc/passwd&lat=../app.py",
]
SECRETS = (b"root:", b"def create_app")


@pytest.mark.parametrize("path", ATTEMPTS)
def test_no_address_reaches_another_file(client, path):
    status, body = get(client.app, path)
    assert 400 <= status < 500
    assert not any(secret in body for secret in SECRETS)


def test_the_attempts_reach_files_of_a_server_that_trusts_addresses():
    """Negative control: what the attempts exist to find."""
    naive = FastAPI()

    @naive.get("/assets/{name:path}")
    def asset(name: str) -> Response:
        try:
            return Response((PAGE / name).read_bytes())
        except (OSError, ValueError):
            return Response(status_code=404)

    reached = [path for path in ATTEMPTS if any(secret in get(naive, path)[1] for secret in SECRETS)]
    assert {"/assets/../app.py", "/assets/..%2fapp.py", "/assets/%2fetc%2fpasswd"} <= set(reached)
    assert len(reached) >= 6


def test_the_page_is_served_as_it_is(client):
    for path in [each for each in PAGE.rglob("*") if each.suffix in server.TYPES]:
        answer = client.get(f"/assets/{path.name}")
        assert (answer.status_code, answer.content) == (200, path.read_bytes())
        assert answer.headers["content-type"] == server.TYPES[path.suffix]
    assert client.get("/").content == (PAGE / "index.html").read_bytes()
    assert client.get("/assets/INTEGRITY").status_code == 404


def test_files_of_the_page_have_names_of_their_own():
    """They are served without their folders."""
    names = [path.name for path in PAGE.rglob("*") if path.suffix in server.TYPES]
    assert len(names) == len(set(names))


# --- other sites -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "host", ["evil.example", "evil.example:8765", "localhost.evil.example", "127.0.0.1.evil.example", ""]
)
def test_a_name_that_another_site_gave_this_computer_is_refused(client, host):
    for path in ("/map.json", PATH, "/"):
        assert client.get(path, headers={"host": host}).status_code == 400


@pytest.mark.parametrize("host", ["localhost", "localhost:8765", "127.0.0.1:9000", "[::1]:8765", "LOCALHOST"])
def test_its_own_names_are_let_in(scene, host):
    hosts = Address().allowed_hosts
    assert TestClient(create_app(scene, allowed_hosts=hosts)).get("/map.json", headers={"host": host}).status_code == 200


def test_names_are_checked_as_the_address_says():
    assert "evil.example" not in Address().allowed_hosts
    assert "hub.example.org" in Address(names=("hub.example.org",)).allowed_hosts
    assert Address(host="::1").is_loopback
    assert not Address(host="0.0.0.0").is_loopback
    assert Address(host="0.0.0.0").allowed_hosts == ("*",)
    assert Address(host="0.0.0.0", names=("map.example.org",)).allowed_hosts == ("map.example.org",)


@pytest.mark.parametrize(("path", "status"), [("/", 200), ("/map.json", 200), (PATH, 200), ("/nothing", 404)])
def test_every_answer_keeps_other_sites_out(client, path, status):
    answer = client.get(path, headers={"origin": "https://evil.example"})
    assert answer.status_code == status
    assert not [name for name in answer.headers if name.startswith("access-control-")]
    policy = dict(part.split(" ", 1) for part in answer.headers["content-security-policy"].split("; "))
    assert policy["default-src"] == "'self'"
    assert policy["frame-ancestors"] == "'none'"
    assert policy["worker-src"] == "'self' blob:"
    assert "http" not in answer.headers["content-security-policy"]
    assert answer.headers["cross-origin-resource-policy"] == "same-origin"
    assert answer.headers["x-content-type-options"] == "nosniff"


def test_a_preflight_gets_no_leave(client):
    asked = {"origin": "https://evil.example", "access-control-request-method": "POST"}
    answer = client.options("/statistics", headers=asked)
    assert answer.status_code == 405
    assert not [name for name in answer.headers if name.startswith("access-control-")]


def test_the_servers_of_a_base_map_are_the_only_others():
    headers = server._headers("https://tiles.example.org:444/a/{z}/{x}/{y}.png?key=1")
    policy = dict(part.split(" ", 1) for part in headers["Content-Security-Policy"].split("; "))
    assert policy["img-src"].split() == ["'self'", "data:", "blob:", "https://tiles.example.org:444"]
    assert policy["connect-src"].split() == ["'self'", "https://tiles.example.org:444"]
    assert policy["default-src"] == "'self'"


# --- kept by the browser ---------------------------------------------------------------------------------------------------


def test_a_tile_is_not_sent_twice(client, scene, monkeypatch):
    first = client.get(PATH)
    tag = first.headers["etag"]
    assert first.headers["cache-control"] == "private, no-cache"
    monkeypatch.setattr(type(scene), "tile", None)  # it is not even read
    again = client.get(PATH, headers={"if-none-match": tag})
    assert (again.status_code, again.content, again.headers["etag"]) == (304, b"", tag)
    assert client.get(PATH, headers={"if-none-match": f'"other", W/{tag}'}).status_code == 304


def test_tiles_of_other_layers_and_places_are_other_tiles(client):
    paths = [PATH, PATH.replace("height", "error"), f"/tiles/height/{TILE.zoom}/{TILE.x + 1}/{TILE.y}.png"]
    assert len({client.get(path).headers["etag"] for path in paths}) == 3


def test_a_tile_of_a_map_that_changed_is_another_tile(made, tmp_path):
    shutil.copytree(made.out, tmp_path / "map")
    tags = []
    for _ in range(2):
        with Scene(RegionFolder.open(tmp_path / "map")) as scene:
            tags.append(TestClient(create_app(scene)).get(PATH).headers["etag"])
        (tmp_path / "map" / "height.tif").touch()
    assert tags[0] != tags[1]


def test_an_empty_tile_is_no_error(client):
    answer = client.get(f"/tiles/height/{TILE.zoom}/1/1.png")
    assert (answer.status_code, answer.headers["content-type"]) == (200, "image/png")
    assert len(answer.content) < 200


def test_the_answers_are_json_that_browsers_read(client):
    for path in ("/map.json", f"/point?lon={LON}&lat={LAT}", "/point?lon=0&lat=0"):
        json.loads(client.get(path).text, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))


def test_nothing_of_this_computer_is_told(client, made):
    told = client.get("/map.json").text
    assert str(made.folder) not in told
    assert str(Path.home()) not in told


def test_a_layer_that_waits_holds_up_no_other(scene, monkeypatch):
    """As while its overviews are being made."""
    there, released, paint = [], threading.Event(), Scene.tile

    def tile(self, layer, at):
        if layer.id == "imagery":
            there.append(at)
            assert released.wait(30)
        return paint(self, layer, at)

    monkeypatch.setattr(Scene, "tile", tile)
    with TestClient(create_app(scene), base_url="http://localhost") as client, ThreadPoolExecutor() as browser:
        paths = [f"/tiles/imagery/{TILE.zoom}/{TILE.x}/{TILE.y + i}.png" for i in range(server.READERS + 3)]
        waiting = [browser.submit(client.get, path) for path in paths]
        while len(there) < server.READERS:
            time.sleep(0.01)
        assert client.get(PATH).status_code == 200
        assert len(there) == server.READERS, "more than these are not read at the same time"
        assert not any(answer.done() for answer in waiting)
        released.set()
        assert {answer.result().status_code for answer in waiting} == {200}

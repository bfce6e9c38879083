"""Areas of interest: from files, rectangles and names of places; what cannot be one says so in one line."""

import json
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from urllib.parse import parse_qs, urlsplit

import geopandas
import numpy as np
import pytest
import shapely
from pyproj import CRS

from canopy.errors import AreaError, GridError
from canopy.tiler.area import area_of_bbox, area_of_place, as_area, read_area

DEGREES = CRS.from_epsg(4326)
EUGENE = shapely.box(-123.08, 44.04, -123.06, 44.05)


def one_line(error):
    assert "\n" not in str(error.value)
    return str(error.value)


def file(path, shapes, crs="EPSG:4326"):
    frame = geopandas.GeoDataFrame({"name": [""] * len(shapes)}, geometry=list(shapes), crs="EPSG:4326")
    frame = frame.to_crs(crs) if crs is not None else frame.set_crs(None, allow_override=True)
    if path.suffix == ".parquet":
        frame.to_parquet(path)
    else:
        frame.to_file(path)
    return path


# --- files ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["a.geojson", "a.gpkg", "a.parquet", "a.shp", "a.fgb"])
@pytest.mark.parametrize("crs", ["EPSG:4326", "EPSG:32610", "EPSG:2994", "EPSG:3857"])
def test_one_area_in_every_format_and_crs(tmp_path, name, crs):
    if name == "a.geojson" and crs != "EPSG:4326":
        pytest.skip("GeoJSON is in degrees")
    ring = shapely.difference(EUGENE, shapely.affinity.scale(EUGENE, 0.5, 0.5))
    area = read_area(file(tmp_path / name, [ring], crs))
    assert area.name == str(tmp_path / name)
    # Edges are straight in the file's own CRS and bend in another; over 1 km by millimetres.
    assert shapely.symmetric_difference(area.geometry, ring).area < 1e-4 * ring.area
    np.testing.assert_allclose(area.bounds_deg, EUGENE.bounds, atol=1e-6)
    assert area.utm_crs().to_epsg() == 32610
    metres = area.polygon_in(CRS.from_epsg(32610))
    assert metres.area == pytest.approx(0.75 * 1.78e6, rel=0.01)
    assert len(metres.interiors if metres.geom_type == "Polygon" else metres.geoms[0].interiors) == 1


def test_an_edge_in_degrees_is_a_curve_in_metres():
    """A parallel at 60 degrees north bulges by more than a kilometre over 6 degrees."""
    area = area_of_bbox((-3.0, 60.0, 3.0, 60.5))
    south = area.polygon_in(CRS.from_epsg(32631)).bounds[1]
    corners = geopandas.GeoSeries([shapely.box(-3.0, 60.0, 3.0, 60.5)], crs=DEGREES).to_crs("EPSG:32631")
    middle = geopandas.GeoSeries([shapely.Point(3.0, 60.0)], crs=DEGREES).to_crs("EPSG:32631").iloc[0].y
    assert south == pytest.approx(middle, abs=1)
    assert area.polygon_in(CRS.from_epsg(32631)).area > corners.iloc[0].area


def test_as_area_takes_what_a_caller_has(tmp_path):
    path = file(tmp_path / "a.gpkg", [EUGENE])
    area = as_area(path)
    assert as_area(area) is area
    assert as_area(str(path)).bounds_deg == area.bounds_deg
    assert as_area(EUGENE.bounds).bounds_deg == pytest.approx(area.bounds_deg)
    assert str(area) == "longitude -123.0800 to -123.0600, latitude 44.0400 to 44.0500"


def off_earth(path):
    """Metres in a file that says degrees."""
    frame = geopandas.GeoDataFrame(
        {"name": [""]}, geometry=[shapely.box(500_000, 4_800_000, 501_000, 4_801_000)], crs=DEGREES
    )
    frame.to_file(path)


ACROSS = shapely.MultiPolygon([shapely.box(179.9, -17.0, 180.0, -16.9), shapely.box(-180.0, -17.0, -179.9, -16.9)])

BAD = [
    ("empty", lambda p: p.write_text('{"type": "FeatureCollection", "features": []}'), "no polygon"),
    ("point", lambda p: file(p, [EUGENE, shapely.Point(1, 2)]), "holds a Point; give polygons only"),
    ("line", lambda p: file(p, [shapely.LineString([(1, 2), (3, 4)])]), "holds a LineString"),
    ("none", lambda p: file(p, [shapely.Polygon()]), "no polygon"),
    ("text", lambda p: p.write_text("Oregon"), "cannot be read"),
    ("missing", lambda p: None, "does not exist"),
    ("metres", off_earth, "not longitudes and latitudes; check its CRS"),
    ("fiji", lambda p: file(p, [ACROSS]), "across the antimeridian .* cut it at longitude 180"),
    ("wrapped", lambda p: file(p, [shapely.box(179.9, -17.0, 180.1, -16.9)]), "across the antimeridian"),
    ("jump", lambda p: file(p, [shapely.box(-179.9, -17.0, 179.9, -16.9)]), "across the antimeridian"),
]  # fmt: skip


@pytest.mark.parametrize(("make", "words"), [case[1:] for case in BAD], ids=[case[0] for case in BAD])
def test_a_file_that_is_no_area(tmp_path, make, words):
    path = tmp_path / "a.geojson"
    make(path)
    with pytest.raises(AreaError, match=words) as error:
        read_area(path)
    assert str(path) in one_line(error)


def test_an_area_across_the_antimeridian_in_metres(tmp_path):
    """In UTM zone 60 nothing jumps; it is the longitudes that do."""
    fiji = geopandas.GeoDataFrame(
        {"name": [""]}, geometry=[shapely.box(800_000, 8_100_000, 830_000, 8_130_000)], crs="EPSG:32760"
    )
    fiji.to_file(tmp_path / "a.gpkg")
    with pytest.raises(AreaError, match="antimeridian"):
        read_area(tmp_path / "a.gpkg")


def test_a_bow_tie(tmp_path):
    path = file(tmp_path / "a.gpkg", [shapely.Polygon([(10, 50), (11, 51), (11, 50), (10, 51)])])
    with pytest.raises(AreaError, match=r"invalid polygon \(Self-intersection.*repair") as error:
        read_area(path)
    one_line(error)


def test_an_area_outside_the_domain_of_a_crs():
    with pytest.raises(AreaError, match=r"outside the domain of .*--crs"):
        area_of_bbox((-90.0, -89.9, -80.0, 0.0)).polygon_in(CRS.from_proj4("+proj=ortho +lat_0=45 +lon_0=100 +units=m"))


# --- rectangles ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("bounds", "words"),
    [
        ((1.0, 2.0, 0.0, 3.0), "west edge east of its east edge.*antimeridian"),
        ((179.9, -17.0, -179.9, -16.9), "antimeridian as two runs"),
        ((0.0, 2.0, 1.0, 2.0), "not west < east"),
        ((0.0, -100.0, 1.0, 0.0), "not west < east"),
        ((0.0, 0.0, 200.0, 1.0), "not west < east"),
        ((float("nan"), 0.0, 1.0, 1.0), "not west < east"),
        ((500_000.0, 4_800_000.0, 501_000.0, 4_801_000.0), "in degrees"),
        ((-170.0, 0.0, 170.0, 1.0), "antimeridian"),
    ],
)
def test_a_bbox_that_is_none(bounds, words):
    with pytest.raises(AreaError, match=words) as error:
        area_of_bbox(bounds)
    one_line(error)


# --- UTM -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("bounds", "epsg"),
    [
        ((-123.08, 44.04, -123.06, 44.05), 32610),
        ((174.7, -41.4, 174.9, -41.2), 32760),
        ((-126.0, 44.0, -120.0, 45.0), 32610),  # a whole zone, touching both neighbours
        ((11.0, -1.0, 11.1, 2.0), 32632),  # across the equator: the hemisphere of its middle
    ],
)
def test_the_zone_of_an_area(bounds, epsg):
    assert area_of_bbox(bounds).utm_crs().to_epsg() == epsg


def test_an_area_across_two_zones_needs_a_crs():
    with pytest.raises(
        AreaError, match=r"west is in EPSG:32610 and the east in EPSG:32611; choose the CRS with --crs"
    ) as error:
        area_of_bbox((-120.1, 43.0, -119.9, 43.1)).utm_crs()
    assert "(recipe: crs)" in one_line(error)


def test_an_area_at_the_pole_has_no_zone():
    with pytest.raises(GridError, match="--crs"):
        area_of_bbox((10.0, 85.0, 11.0, 86.0)).utm_crs()


# --- places --------------------------------------------------------------------------------------------------------------


@pytest.fixture
def geocoder():
    """A service that speaks Nominatim's API; `answers` says what it knows."""
    answers = {
        "Autzen": {
            "type": "FeatureCollection",
            "features": [{
                "type": "Feature", "properties": {"display_name": "Autzen, Eugene, Oregon"},
                "geometry": shapely.geometry.mapping(EUGENE),
            }],
        },
        "a tree": {
            "type": "FeatureCollection",
            "features": [{"type": "Feature", "properties": {}, "geometry": {"type": "Point", "coordinates": [1, 2]}}],
        },
        "Fiji": {
            "type": "FeatureCollection",
            "features": [{"type": "Feature", "properties": {}, "geometry": shapely.geometry.mapping(ACROSS)}],
        },
        "broken": {"error": "out of order"},
    }  # fmt: skip
    asked = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            parts = urlsplit(self.path)
            query = {key: values[0] for key, values in parse_qs(parts.query).items()}
            asked.append((parts.path, query, self.headers["User-Agent"]))
            if query["q"] == "refused":
                self.send_error(403)
                return
            body = json.dumps(answers.get(query["q"], {"type": "FeatureCollection", "features": []})).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_address[1]}", asked
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize("how", ["argument", "environment"])
def test_a_place(geocoder, monkeypatch, how):
    url, asked = geocoder
    monkeypatch.setenv("CANOPY_GEOCODER", "http://127.0.0.1:9" if how == "argument" else f"{url}/")
    area = area_of_place("Autzen", url if how == "argument" else None)
    assert area.name == "Autzen, Eugene, Oregon", "the user is told which place was found"
    np.testing.assert_allclose(area.bounds_deg, EUGENE.bounds)
    path, query, agent = asked[0]
    assert path == "/search"
    assert query["format"] == "geojson"
    assert query["polygon_geojson"] == "1"
    assert agent.startswith("canopy-height/")
    assert len(asked) == 1


@pytest.mark.parametrize(
    ("place", "words"),
    [
        ("Atlantis", "knows no place 'Atlantis'; correct its name"),
        ("a tree", "is a Point without an outline.*--bbox"),
        ("Fiji", "antimeridian"),
        ("broken", "does not answer in GeoJSON"),
        ("refused", "answers 403 to place 'refused'.*CANOPY_GEOCODER"),
        ("  ", "name of the place is empty"),
    ],
)
def test_a_place_that_is_none(geocoder, place, words):
    with pytest.raises(AreaError, match=words) as error:
        area_of_place(place, geocoder[0])
    one_line(error)


def test_a_geocoder_that_is_not_there():
    with pytest.raises(AreaError, match=r"127.0.0.1:9 cannot be reached .*ConnectionError.*--bbox") as error:
        area_of_place("Autzen", "http://127.0.0.1:9")
    one_line(error)


def test_a_geocoder_that_says_nothing(geocoder, file_server, monkeypatch):
    monkeypatch.setattr("canopy.tiler.area.GEOCODER_TIMEOUT_S", 0.2)
    file_server.fail("/search", hang_s=5)
    with pytest.raises(AreaError, match=r"cannot be reached .*Timeout"):
        area_of_place("Autzen", file_server.url)

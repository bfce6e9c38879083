"""Surveys of an area from a real STAC API and an index of EPT folders: signed, frozen, read through to the points."""

import json
import pickle

import numpy as np
import pytest
import shapely
from pyproj import CRS, Transformer
from shapely.geometry import box, mapping

from canopy.errors import ImageryError, LidarError, SourceError
from canopy.tiler.area import area_of_bbox
from canopy.tiler.patience import Patience
from canopy.tiler.points import crs_of, point_sources
from canopy.tiler.sources import PlanetaryComputerSigning
from canopy.tiler.surveys import EptIndex, PointsManifest, PointsSource, StacOfPoints, load_points_source, search_points
from tests.octrees import write_copc, write_ept
from tests.tiler.test_points import BOTTOM, LEFT, MERCATOR, SIDE_M, UTM, wood

HASTE = Patience(attempts=2, first_pause_s=0.01, longest_pause_s=1.0, connect_s=1.0, silence_s=1.0)
COLLECTION = {
    "type": "Collection", "stac_version": "1.0.0", "id": "lidar", "description": "lidar", "license": "other", "links": [],
    "extent": {"spatial": {"bbox": [[-180, -90, 180, 90]]}, "temporal": {"interval": [[None, None]]}},
}  # fmt: skip
TO_DEG = Transformer.from_crs(UTM, 4326, always_xy=True)


def degrees(left, bottom, right, top):
    """A rectangle of the cloud's CRS in longitude and latitude, metres counted from the cloud's corner."""
    west, south = TO_DEG.transform(LEFT + left, BOTTOM + bottom)
    east, north = TO_DEG.transform(LEFT + right, BOTTOM + top)
    return west, south, east, north


AREA = area_of_bbox(degrees(20, 20, 120, 100))


def item(name, corners, *, survey="A_2019", start="2019-03-01", end="2019-04-15", href="http://127.0.0.1:1/x", **properties):
    footprint = box(*degrees(*corners))
    return {
        "type": "Feature", "stac_version": "1.0.0", "id": name, "collection": "lidar", "links": [], "stac_extensions": [],
        "geometry": mapping(footprint), "bbox": list(footprint.bounds),
        "properties": {
            "datetime": None, "start_datetime": f"{start}T00:00:00Z", "end_datetime": f"{end}T23:00:00Z",
            "3dep:usgs_id": survey, **properties,
        },
        "assets": {"data": {"href": href}},
    }  # fmt: skip


def source_of(api, **more):
    return PointsSource(
        name="test", title="t", licence="l", attribution="a",
        catalogue=(
            StacOfPoints(kind="stac-api", endpoint=api.url, collection="lidar", survey_property="3dep:usgs_id", **more),
        ),
    )  # fmt: skip


def test_the_source_that_is_shipped():
    source = load_points_source("3dep")
    stac, index = source.catalogue
    assert (stac.kind, stac.collection, stac.asset) == ("stac-api", "3dep-lidar-copc", "data")
    assert stac.signing.token_url.endswith("/token/3dep-lidar-copc")
    assert source.of_kind("ept-index") == index
    with pytest.raises(SourceError, match=r"has no catalogue 'ept'; did you mean 'ept-index'"):
        source.of_kind("ept")


def test_a_wrong_key_is_named(tmp_path):
    (tmp_path / "a.toml").write_text('name = "a"\ntitle = "t"\nlicense = "l"\nattribution = "a"\ncatalogue = []\n')
    with pytest.raises(SourceError, match=r"unknown key 'license'; did you mean 'licence'"):
        load_points_source(tmp_path / "a.toml")


def test_newest_survey_first_and_no_place_twice(stac_api):
    whole, west = (0, 0, 200, 200), (0, 0, 60, 200)
    items = [
        item("old", whole, survey="A_2012", start="2012-01-01", end="2012-02-01"),
        item("new-1", west, survey="B_2020", start="2020-01-01", end="2020-01-20", **{"pc:count": 7, "pc:density": 4.5}),
        item("new-2", (60, 0, 70, 200), survey="B_2020", start="2020-01-15", end="2020-02-01", **{"proj:epsg": 32610}),
        item("between", (0, 0, 65, 200), survey="C_2015", start="2015-01-01", end="2015-02-01"),
        item("elsewhere", (150, 0, 190, 200), survey="D_2024", start="2024-01-01", end="2024-02-01"),
    ]
    manifest = search_points(source_of(stac_api([COLLECTION], items)), AREA, patience=HASTE)
    assert [s.name for s in manifest.surveys] == ["B_2020", "A_2012"]
    assert manifest.passed_over == ("C_2015",)
    assert manifest.covered == pytest.approx(1, abs=1e-5)
    new = manifest.surveys[0]
    assert (new.start, new.end) == ("2020-01-01", "2020-02-01")
    assert [(c.id, c.points, c.density_per_m2, c.crs) for c in new.clouds] == [
        ("new-1", 7, 4.5, None), ("new-2", None, None, "EPSG:32610"),
    ]  # fmt: skip
    assert new.share == pytest.approx(0.5, abs=0.01)
    parts = [shapely.from_wkt(s.part_deg) for s in manifest.surveys]
    assert parts[0].intersection(parts[1]).area < 1e-4 * AREA.geometry.area
    assert shapely.union_all(parts).symmetric_difference(AREA.geometry).area < 1e-4 * AREA.geometry.area


def test_dates_and_names_choose(stac_api):
    whole = (0, 0, 200, 200)
    items = [
        item("a", whole, survey="A", start="2012-01-01", end="2012-02-01"),
        item("b", whole, survey="B", start="2020-01-01", end="2020-02-01"),
    ]
    source = source_of(stac_api([COLLECTION], items))

    def names(**asked):
        return [s.name for s in search_points(source, AREA, patience=HASTE, **asked).surveys]

    assert names() == ["B"]
    assert names(end="2019-12-31") == ["A"]
    assert names(start="2012-02-01", end="2012-03-01") == ["A"]
    assert names(survey="A") == ["A"]
    for asked, message in (
        ({"start": "2013-01-01", "end": "2019-01-01"}, r"no point cloud over .* from 2013-01-01 to 2019-01-01"),
        ({"survey": "AB"}, r"no survey 'AB' over"),
        ({"start": "2020-01-01", "end": "2019-01-01"}, r"is after end"),
        ({"start": "soon"}, r"start 'soon' is not a day"),
        ({"catalogue": "ept-index"}, r"has no catalogue 'ept-index'"),
    ):
        with pytest.raises(SourceError, match=message):
            names(**asked)


def test_a_manifest_is_read_as_it_was_written(stac_api, tmp_path):
    source = source_of(stac_api([COLLECTION], [item("a", (0, 0, 200, 200))]))
    manifest = search_points(source, AREA, patience=HASTE)
    path = manifest.write(tmp_path / "m" / "points.json")
    assert PointsManifest.read(path) == manifest
    assert search_points(source, AREA, patience=HASTE).write(tmp_path / "again.json").read_bytes() == path.read_bytes()
    path.write_text(path.read_text().replace("A_2019", "A_2018"))
    with pytest.raises(SourceError, match=r"sha256 is not that of the contents.*search again"):
        PointsManifest.read(path)
    with pytest.raises(SourceError, match=r"does not exist; search first"):
        PointsManifest.read(tmp_path / "none.json")


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    """The west and the east half of one cloud as COPC files, and an EPT of a part of it in web mercator."""
    folder = tmp_path_factory.mktemp("surveys")
    cloud = wood(6000)
    for name, keep in (("west", cloud.x < LEFT + SIDE_M / 2), ("east", cloud.x >= LEFT + SIDE_M / 2)):
        half = wood(0)
        half.points = cloud.points[np.asarray(keep)]
        half.update_header()
        write_copc(folder / f"{name}.copc.laz", half)
    write_ept(folder / "A_2019", wood(600), srs=MERCATOR | {"vertical": "5703"})
    return folder


def test_from_the_catalogue_to_the_points_with_signatures(stac_api, serve_folder, served):
    server = serve_folder(served)
    server.require_signature("/*.laz")
    halves = {"west": (0, 0, 100, 200), "east": (100, 0, 200, 200)}
    items = [item(name, corners, href=server.href(f"{name}.copc.laz")) for name, corners in halves.items()]
    signing = PlanetaryComputerSigning(
        kind="planetary-computer", token_url=f"{server.token_url}/lidar", hosts=("127.0.0.1",)
    )
    manifest = search_points(source_of(stac_api([COLLECTION], items), signing=signing), AREA, patience=HASTE)
    (survey,) = manifest.surveys
    assert [c.id for c in survey.clouds] == ["east", "west"]
    assert "sig=" not in manifest.model_dump_json()
    sources = pickle.loads(pickle.dumps(manifest.open(survey, patience=HASTE)))
    assert point_sources(sources) == sources
    assert all(crs_of(s) == UTM for s in sources)
    server.revoke_signatures()
    bounds = (LEFT + 20, BOTTOM + 20, LEFT + 120, BOTTOM + 100)
    cloud = wood(6000)
    inside = (cloud.x >= bounds[0]) & (cloud.x <= bounds[2]) & (cloud.y >= bounds[1]) & (cloud.y <= bounds[3])
    found = np.concatenate([c.x for s in sources for c in s.chunks(bounds)])
    np.testing.assert_array_equal(np.sort(found), np.sort(cloud.x[inside]))
    # 100 m and 200 m from the halves' footprints: one is within their error, the other is not.
    (alone,) = manifest.open(survey, bounds_deg=degrees(-300, 0, -100, 100), patience=HASTE)
    assert alone.name.endswith("/west.copc.laz")
    assert manifest.open(survey, bounds_deg=degrees(-900, 0, -500, 100), patience=HASTE) == []
    other = signing.model_copy(update={"hosts": (".example.org",)})
    unsigned = search_points(source_of(stac_api([COLLECTION], items), signing=other), AREA, patience=HASTE)
    with pytest.raises(LidarError, match=r"not for everybody \(HTTP 403\)"):
        unsigned.open(unsigned.surveys[0], patience=HASTE)


def test_a_token_endpoint_that_gives_none(stac_api, serve_folder, served):
    server = serve_folder(served)
    (served / "none.json").write_text("{}")
    signing = PlanetaryComputerSigning(kind="planetary-computer", token_url=server.href("none.json"), hosts=("127.0.0.1",))
    items = [item("west", (0, 0, 200, 200), href=server.href("west.copc.laz"))]
    manifest = search_points(source_of(stac_api([COLLECTION], items), signing=signing), AREA, patience=HASTE)
    with pytest.raises(LidarError, match=r"none\.json gives no token"):
        manifest.open(manifest.surveys[0], patience=HASTE)
    server.fail("/none.json", status=503)
    with pytest.raises(LidarError, match=r"none\.json cannot be fetched \(HTTP 503; 2 tries\)"):
        manifest.open(manifest.surveys[0], patience=HASTE)


def index_of(server, features):
    path = server.folder / "resources.geojson"
    path.write_text(json.dumps({"type": "FeatureCollection", "features": features}))
    index = EptIndex(kind="ept-index", href=server.href("resources.geojson"))
    return PointsSource(name="test", title="t", licence="l", attribution="a", catalogue=(index,))


def feature(server, name, corners):
    return {
        "type": "Feature", "geometry": mapping(box(*degrees(*corners))),
        "properties": {"name": name, "id": 1, "count": 600, "url": server.href(f"{name}/ept.json")},
    }  # fmt: skip


def test_an_index_of_ept_folders(serve_folder, served):
    server = serve_folder(served)
    whole = (0, 0, 200, 200)
    one = [feature(server, "A_2019", whole), feature(server, "Z_2020", (900, 900, 1000, 1000))]
    manifest = search_points(index_of(server, one), AREA, patience=HASTE)
    (survey,) = manifest.surveys
    assert (survey.name, survey.start, survey.clouds[0].points) == ("A_2019", None, 600)
    (source,) = manifest.open(survey, patience=HASTE)
    assert sum(c.size for c in source.chunks()) == 600
    assert crs_of(source) == CRS.from_epsg(3857)
    two = index_of(server, [*one, feature(server, "B_2021", whole)])
    with pytest.raises(SourceError, match=r"2 surveys over .* no date for A_2019; name the survey to use: A_2019, B_2021"):
        search_points(two, AREA, patience=HASTE)
    assert search_points(two, AREA, survey="B_2021", patience=HASTE).surveys[0].name == "B_2021"
    with pytest.raises(SourceError, match=r"has no dates; leave out start and end"):
        search_points(two, AREA, start="2020-01-01", patience=HASTE)
    (served / "resources.geojson").write_text("[]")
    with pytest.raises(SourceError, match=r"is no index of EPT folders"):
        search_points(two, AREA, patience=HASTE)
    (served / "resources.geojson").unlink()
    with pytest.raises(SourceError, match=r"is not there \(HTTP 404\); correct href"):
        search_points(two, AREA, patience=HASTE)


def test_catalogues_that_fail(stac_api, serve_folder, served):
    api = stac_api([COLLECTION], [item("a", (0, 0, 200, 200)), item("b", (500, 500, 600, 600))])
    source = source_of(api)
    api.faults.append((503, {}))
    assert search_points(source, AREA, patience=HASTE).surveys  # once is sat out
    api.always = 503
    with pytest.raises(ImageryError, match=r"the catalogue http.* of test .*503.*run again later"):
        search_points(source, AREA, patience=HASTE)
    api.always = None
    wrong = source_of(api, asset="points")
    with pytest.raises(SourceError, match=r"item a of test has no asset 'points'.*correct asset"):
        search_points(wrong, AREA, patience=HASTE)
    far = area_of_bbox(degrees(5000, 5000, 5100, 5100))
    with pytest.raises(SourceError, match=r"test \(stac-api\) has no point cloud over"):
        search_points(source, far, patience=HASTE)
    server = serve_folder(served)
    nothing = StacOfPoints(kind="stac-api", endpoint=f"{server.url}/none", collection="lidar")
    with pytest.raises((SourceError, ImageryError), match=r"the catalogue http.*/none of test"):
        search_points(source.model_copy(update={"catalogue": (nothing,)}), AREA, patience=HASTE)

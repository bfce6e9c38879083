"""The same points from every kind of source, only the bytes that an area needs, and one clear message when it fails."""

import gzip
import json
import pickle
import shutil
import struct
import threading
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import laspy
import numpy as np
import pytest
from affine import Affine
from hypothesis import given
from hypothesis import strategies as st
from laspy.header import GpsTimeType
from pyproj import CRS, Transformer

from canopy.errors import LidarError
from canopy.grid import Grid
from canopy.tiler.byteranges import ahead
from canopy.tiler.las import LasFile
from canopy.tiler.lidar import LidarOptions, lidar_to_chm
from canopy.tiler.octree import HEAD_BYTES, CopcFile, EptFolder
from canopy.tiler.patience import Patience
from canopy.tiler.points import crs_of, open_points, point_sources, z_unit_m_of
from tests.octrees import write_copc, write_ept

UTM = CRS.from_epsg(32610)
LEFT, BOTTOM, SIDE_M = 500_000.0, 4_100_000.0, 200.0
MIDDLE = (LEFT + 80.0, BOTTOM + 50.0, LEFT + 120.0, BOTTOM + 70.0)
HASTE = Patience(attempts=3, first_pause_s=0.01, longest_pause_s=2.0, connect_s=1.0, silence_s=0.5)
FIELDS = ("x", "y", "z", "classification", "return_number", "number_of_returns", "withheld")


def wood(n=20_000, *, seed=1, crs=UTM, point_format=6):
    """A cloud of random places on a slope with random fields."""
    rng = np.random.default_rng(seed)
    header = laspy.LasHeader(version="1.4", point_format=point_format)
    header.scales, header.offsets = [0.01] * 3, [LEFT, BOTTOM, 0.0]
    if crs is not None:
        header.add_crs(crs)
    cloud = laspy.LasData(header)
    x, y = rng.uniform(0, SIDE_M, (2, n))
    cloud.x, cloud.y, cloud.z = LEFT + x, BOTTOM + y, 100 + 0.2 * x + rng.uniform(0, 30, n)
    cloud.classification = rng.choice([1, 2, 5, 7], n)
    cloud.number_of_returns = rng.integers(1, 5, n)
    cloud.return_number = rng.integers(1, 1 + np.asarray(cloud.number_of_returns))
    cloud.withheld = rng.random(n) < 0.05
    cloud.gps_time = rng.uniform(2e8, 3e8, n)
    header.global_encoding.gps_time_type = GpsTimeType.STANDARD
    if point_format >= 6:
        cloud.overlap = rng.random(n) < 0.3
    cloud.update_header()
    return cloud


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """One cloud in every form, by name."""
    folder, small = tmp_path_factory.mktemp("sources"), {"span": 16, "leaf": 400}
    cloud = wood()
    for name in ("wood.las", "wood.laz"):
        cloud.write(folder / name)
    wood(point_format=3).write(folder / "old.laz")
    return {
        "las": folder / "wood.las",
        "laz": folder / "wood.laz",
        "laz of format 3": folder / "old.laz",
        "copc": write_copc(folder / "wood.copc.laz", cloud, **small),
        "copc in pages": write_copc(folder / "pages.copc.laz", cloud, page_level=1, **small),
        "ept": write_ept(folder / "ept", cloud, **small),
        "ept in pages": write_ept(folder / "pages", cloud, page_level=1, **small) / "ept.json",
        "ept binary": write_ept(folder / "binary", cloud, binary=True, **small),
    }


def gathered(chunks):
    """All points of some chunks as one table, sorted, so that the order of a source does not count."""
    chunks = list(chunks)
    table = np.column_stack([np.concatenate([getattr(c, name) for c in chunks]) for name in FIELDS]) if chunks else None
    return table if table is None else table[np.lexsort(table.T[::-1])]


def within(table, bounds):
    x, y = table[:, 0], table[:, 1]
    return table[(x >= bounds[0]) & (x <= bounds[2]) & (y >= bounds[1]) & (y <= bounds[3])]


@pytest.fixture(scope="module")
def truth():
    cloud = wood()
    table = np.column_stack([np.asarray(getattr(cloud, name), np.float64) for name in FIELDS])
    return table[np.lexsort(table.T[::-1])]


# --- the same points from everywhere ----------------------------------------------------------------------------------

KINDS = ("las", "laz", "laz of format 3", "copc", "copc in pages", "ept", "ept in pages", "ept binary")


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_holds_the_same_points(sources, truth, kind):
    source = open_points(sources[kind])
    assert source.point_count == len(truth)
    assert source.bounds == pytest.approx((truth[:, 0].min(), truth[:, 1].min(), truth[:, 0].max(), truth[:, 1].max()))
    assert crs_of(source) == UTM
    assert z_unit_m_of(source) == 1.0
    np.testing.assert_array_equal(gathered(source.chunks()), truth)
    np.testing.assert_array_equal(gathered(source.chunks(MIDDLE)), within(truth, MIDDLE))
    assert 0 < len(within(truth, MIDDLE)) < len(truth) / 10


@pytest.mark.parametrize("kind", ["laz", "copc", "copc in pages", "ept", "ept in pages", "ept binary"])
def test_every_kind_over_http_where_it_can_be_had_in_parts(sources, truth, serve_folder, kind):
    server = serve_folder(sources["las"].parent)
    path = sources[kind] / "ept.json" if sources[kind].is_dir() else sources[kind]
    if kind == "laz":
        with pytest.raises(LidarError, match=r"wood\.laz is plain LAS or LAZ.*download it and give the file"):
            open_points(server.href(path))
        assert server.sent_bytes["/wood.laz"] <= 1 << 16  # the head, not the file
        return
    source = open_points(server.href(path), patience=HASTE)
    assert crs_of(source) == UTM
    np.testing.assert_array_equal(gathered(source.chunks()), truth)
    np.testing.assert_array_equal(gathered(source.chunks(MIDDLE)), within(truth, MIDDLE))


def test_laspys_own_reader_agrees(sources, truth):
    with laspy.CopcReader.open(sources["copc in pages"]) as reader:
        found = reader.query()
        coarse = reader.query(level=range(2))
    assert len(found) == len(truth)
    np.testing.assert_array_equal(np.sort(found.x), truth[:, 0])
    cube = open_points(sources["copc in pages"]).cube
    ours = gathered(open_points(sources["copc in pages"]).chunks(spacing=cube.spacing / 2))
    assert len(ours) == len(coarse) < len(truth)


@pytest.fixture(scope="module")
def few(tmp_path_factory):
    """3000 of the points, as LAZ, COPC and EPT."""
    folder = tmp_path_factory.mktemp("few")
    cloud = wood(3000)
    cloud.write(folder / "a.laz")
    ept = write_ept(folder / "ept", cloud, span=16, leaf=100, binary=True)
    return folder / "a.laz", write_copc(folder / "a.copc.laz", cloud, span=16, leaf=100), ept


@given(st.tuples(*[st.floats(-0.2, 1.2)] * 4), st.integers(100, 4000))
def test_any_area_in_chunks_of_any_size(few, corners, chunk_points):
    left, right = sorted((LEFT + corners[0] * SIDE_M, LEFT + corners[1] * SIDE_M))
    bottom, top = sorted((BOTTOM + corners[2] * SIDE_M, BOTTOM + corners[3] * SIDE_M))
    bounds = (left, bottom, right, top)
    expected = within(gathered(open_points(few[0]).chunks()), bounds)
    for path in few:
        chunks = list(open_points(path).chunks(bounds, chunk_points=chunk_points))
        assert all(c.size <= chunk_points for c in chunks)
        found = gathered(chunks)
        np.testing.assert_array_equal(np.empty((0, 7)) if found is None else found, expected)


@pytest.mark.parametrize("kind", ["laz", "copc", "ept"])
def test_order_does_not_depend_on_the_chunks(sources, kind):
    source = open_points(sources[kind])
    whole = np.concatenate([c.x for c in source.chunks()])
    parts = np.concatenate([c.x for c in source.chunks(chunk_points=777)])
    np.testing.assert_array_equal(whole, parts)


@pytest.mark.parametrize("kind", KINDS)
def test_points_left_out_are_counted(sources, truth, kind):
    chunks = list(open_points(sources[kind]).chunks(MIDDLE, chunk_points=500))
    decoded, kept = sum(c.decoded for c in chunks), sum(c.size for c in chunks)
    assert kept == len(within(truth, MIDDLE))
    assert kept < decoded <= len(truth)
    if "copc" in kind or "ept" in kind:
        assert decoded < len(truth) / 2, "nodes outside the area were decoded"


@pytest.mark.parametrize("kind", ["copc", "ept", "ept in pages", "copc in pages"])
def test_spacing_ends_the_descent(sources, truth, kind):
    source = open_points(sources[kind])
    root = source.cube.spacing
    counts = [sum(c.decoded for c in source.chunks(spacing=root / factor)) for factor in (0.5, 1, 2, 1024)]
    assert counts[0] == counts[1] < counts[2] < counts[3] == len(truth)
    # The points of the root alone are about as far apart as promised: no cell of that size holds two.
    first = gathered(source.chunks(spacing=root))
    cells = np.floor((first[:, :3] - [LEFT, BOTTOM, np.floor(truth[:, 2].min())]) / root)
    low = np.floor(truth[:, :3].min(axis=0))
    cells = np.floor((first[:, :3] - low) / root)
    assert len(np.unique(cells, axis=0)) == len(first)


@pytest.mark.parametrize("kind", ["copc", "ept"])
def test_memory_is_bounded(sources, kind):
    source = open_points(sources[kind])
    sizes = [c.size for c in source.chunks(chunk_points=1000)]
    assert set(sizes[:-1]) == {1000}
    assert sum(sizes) == source.point_count


@pytest.mark.parametrize("kind", KINDS)
def test_a_source_is_a_value(sources, truth, kind):
    source = pickle.loads(pickle.dumps(open_points(sources[kind])))
    np.testing.assert_array_equal(gathered(source.chunks(MIDDLE)), within(truth, MIDDLE))


@pytest.mark.parametrize("kind", KINDS)
def test_flags_and_days_of_the_flights_come_along(sources, kind):
    cloud = wood()
    chunks = list(open_points(sources[kind]).chunks(chunk_points=3000))
    order = np.lexsort((cloud.z, cloud.y, cloud.x))
    found = np.lexsort([np.concatenate([getattr(c, axis) for c in chunks]) for axis in "zyx"])
    overlap = np.concatenate([c.overlap for c in chunks])[found]
    expected = np.zeros(len(order), bool) if "format 3" in kind else np.asarray(cloud.overlap, bool)
    np.testing.assert_array_equal(overlap, expected[order])
    if kind == "ept binary":
        assert all(c.gps_time_s is None for c in chunks)  # its schema has no time
    else:
        times = np.concatenate([c.gps_time_s for c in chunks])[found]
        np.testing.assert_array_equal(times, np.asarray(cloud.gps_time)[order])


def test_area_elsewhere_reads_nothing(sources):
    far = (0.0, 0.0, 1.0, 1.0)
    assert all(list(open_points(sources[kind]).chunks(far)) == [] for kind in KINDS)


# --- what a user may write --------------------------------------------------------------------------------------------


def test_folder_pattern_list_and_link(sources, serve_folder, tmp_path):
    for name in ("b.laz", "a.LAS", "c.copc.laz"):
        shutil.copy(sources["copc" if "copc" in name else name[-3:].lower()], tmp_path / name)
    (tmp_path / "notes.txt").write_text("x")
    (tmp_path / "deeper").mkdir()
    shutil.copy(sources["laz"], tmp_path / "deeper" / "d.laz")
    found = point_sources(tmp_path)
    assert [s.name for s in found] == [str(tmp_path / name) for name in ("a.LAS", "b.laz", "c.copc.laz")]
    assert [type(s) for s in found] == [LasFile, LasFile, CopcFile]
    assert [s.name for s in point_sources(f"{tmp_path}/*.laz")] == [str(tmp_path / "b.laz"), str(tmp_path / "c.copc.laz")]
    assert [s.name for s in point_sources(f"{tmp_path}/**/d.laz")] == [str(tmp_path / "deeper" / "d.laz")]
    server = serve_folder(sources["las"].parent)
    mixed = point_sources([tmp_path / "b.laz", sources["ept"], server.href("wood.copc.laz"), str(sources["ept in pages"])])
    assert [type(s) for s in mixed] == [LasFile, EptFolder, CopcFile, EptFolder]
    assert mixed[2].name == f"{server.url}/wood.copc.laz"


@pytest.mark.parametrize(
    ("where", "message"),
    [
        ([], r"no point cloud given"),
        ("{tmp}", r"folder .* holds no \.las or \.laz file and no ept\.json"),
        ("{tmp}/*.laz", r"no file matches"),
        ("{tmp}/none.laz", r"none\.laz does not exist or is not a file"),
        ("s3://bucket/a.laz", r"links of this kind are not read; give the http"),
        ("{tmp}/ept.json", r"ept\.json is not there; give the ept\.json of an EPT"),
    ],
)
def test_nothing_there(tmp_path, where, message):
    with pytest.raises(LidarError, match=message):
        point_sources(where.format(tmp=tmp_path) if isinstance(where, str) else where)


def test_folder_of_two_minds(sources, tmp_path):
    shutil.copytree(sources["ept"], tmp_path / "both")
    shutil.copy(sources["laz"], tmp_path / "both" / "a.laz")
    with pytest.raises(LidarError, match=r"holds an ept\.json and a\.laz; name the one that is meant"):
        point_sources(tmp_path / "both")


# --- CRS and units ----------------------------------------------------------------------------------------------------


def without_crs(tmp_path, kind):
    cloud = wood(600, crs=None)
    if kind == "laz":
        cloud.write(tmp_path / "a.laz")
        return tmp_path / "a.laz"
    return write_copc(tmp_path / "a.copc.laz", cloud) if kind == "copc" else write_ept(tmp_path / "ept", cloud)


@pytest.mark.parametrize("kind", ["laz", "copc", "ept"])
def test_crs_is_never_guessed(tmp_path, kind):
    source = open_points(without_crs(tmp_path, kind))
    assert source.crs is None
    with pytest.raises(LidarError, match=r"no CRS in its header; give it with option crs"):
        crs_of(source)
    assert crs_of(source, UTM) == UTM
    assert z_unit_m_of(source, CRS.from_epsg(2994)) == 0.3048
    with pytest.raises(LidarError, match=r"nothing about the unit of z; give option z_unit_m"):
        z_unit_m_of(source, CRS.from_epsg(4326))


def test_crs_behind_the_points(tmp_path):
    path = write_copc(tmp_path / "late.copc.laz", wood(600), late_wkt=True)
    assert open_points(path).crs == UTM


def test_a_header_longer_than_what_is_fetched_first(tmp_path, serve_folder):
    cloud = wood(600)
    write_copc(tmp_path / "a.copc.laz", cloud, padding=65_500)
    assert (tmp_path / "a.copc.laz").read_bytes().index(b"LASF_Projection") > HEAD_BYTES
    for where in (tmp_path / "a.copc.laz", serve_folder(tmp_path).href("a.copc.laz")):
        source = open_points(where, patience=HASTE)
        assert source.crs == UTM
        assert sum(c.size for c in source.chunks()) == 600


@pytest.mark.parametrize(
    ("srs", "unit_m"),
    [
        ({"authority": "EPSG", "horizontal": "32610"}, 1.0),
        ({"authority": "EPSG", "horizontal": "32610", "vertical": "6360"}, 1200 / 3937),
        ({"authority": "EPSG", "horizontal": "3857", "vertical": "5703"}, 1.0),
        ({"wkt": CRS.from_epsg(2994).to_wkt("WKT1_GDAL")}, 0.3048),
        ({"wkt": UTM.to_wkt(), "authority": "EPSG", "horizontal": "32610", "vertical": "8228"}, 0.3048),
    ],
)
def test_unit_of_an_ept(tmp_path, srs, unit_m):
    source = open_points(write_ept(tmp_path / "ept", wood(600), srs=srs))
    assert z_unit_m_of(source) == pytest.approx(unit_m, rel=1e-9)


MERCATOR = {"authority": "EPSG", "horizontal": "3857", "wkt": CRS.from_epsg(3857).to_wkt("WKT1_GDAL")}
FEET = {"metadata": {"comp_spatialreference": CRS.from_user_input("EPSG:6557+6360").to_wkt("WKT1_GDAL")}, "srs": MERCATOR}
METRES = {"metadata": {"srs": {"vertical": CRS.from_epsg(5703).to_wkt("WKT1_GDAL")}}, "srs": MERCATOR}
SILENT = {"metadata": {"software_id": "x"}, "srs": MERCATOR}


@pytest.mark.parametrize("version", ["1.0", "1.1"])
@pytest.mark.parametrize(
    ("metadata", "expected"),
    [
        ([FEET, FEET], 1200 / 3937),
        ([METRES], 1.0),
        ([FEET, METRES], r"made of clouds with z in units of 0\.304801 m and 1 m"),
        ([FEET, SILENT], r"nothing about the unit of z; give option z_unit_m"),
        ([], r"nothing about the unit of z; give option z_unit_m"),
    ],
)
def test_unit_of_an_ept_in_web_mercator_comes_from_its_files(tmp_path, version, metadata, expected):
    folder = write_ept(tmp_path / "ept", wood(600), srs=MERCATOR)
    (folder / "ept-sources").mkdir()
    if version == "1.1":
        for i, one in enumerate(metadata):
            (folder / "ept-sources" / f"{i}.json").write_text(json.dumps(one))
        listed = [{"path": f"{i}.laz", "points": 1, "metadataPath": f"{i}.json"} for i in range(len(metadata))]
        (folder / "ept-sources" / "manifest.json").write_text(json.dumps(listed))
    else:
        (folder / "ept-sources" / "0.json").write_text(json.dumps({f"{i}.laz": m for i, m in enumerate(metadata)}))
        listed = [{"id": f"{i}.laz", "url": "0.json"} for i in range(len(metadata))]
        (folder / "ept-sources" / "list.json").write_text(json.dumps(listed))
    source = open_points(folder)
    if isinstance(expected, float):
        assert z_unit_m_of(source) == pytest.approx(expected, rel=1e-9)
    else:
        with pytest.raises(LidarError, match=expected):
            z_unit_m_of(source)


# --- broken files -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["las", "laz", "copc"])
@pytest.mark.parametrize("share", [0.0, 0.001, 0.02, 0.5, 0.99])
def test_truncated_files_end_with_one_line(sources, tmp_path, kind, share):
    whole = sources[kind].read_bytes()
    path = tmp_path / sources[kind].name
    path.write_bytes(whole[: int(share * len(whole))])
    with pytest.raises(LidarError, match=r"fetch it again$") as told:
        list(open_points(path).chunks())
    assert "\n" not in str(told.value)
    assert path.name in str(told.value)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["laz", "copc", "ept"])
def test_corrupt_bytes_end_with_one_line_or_are_seen_by_nobody(few, tmp_path, kind):
    """A flipped byte may decode to other values, LAZ has no checksums; it must not end in another kind of error."""
    rng = np.random.default_rng(5)
    path = source = tmp_path / "a.laz"
    if kind == "ept":
        source = write_ept(tmp_path / "ept", wood(3000), leaf=3000)
        path = source / "ept-data" / "0-0-0-0.laz"
    else:
        shutil.copy(few[("laz", "copc").index(kind)], path)
    whole = path.read_bytes()
    told = []
    for _ in range(40):
        broken = bytearray(whole)
        at = int(rng.integers(0, len(broken)))
        broken[at : at + 40] = rng.bytes(len(broken[at : at + 40]))
        path.write_bytes(broken)
        try:
            list(open_points(source).chunks())
        except LidarError as error:
            told.append(str(error))
    assert len(told) > 5
    assert not any("\n" in text for text in told)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", r"is not a readable LAS or LAZ file"),
        (b"not a cloud at all" * 100, r"is not a readable LAS or LAZ file"),
    ],
)
def test_files_that_are_no_clouds(tmp_path, serve_folder, content, message):
    (tmp_path / "a.laz").write_bytes(content)
    with pytest.raises(LidarError, match=message):
        open_points(tmp_path / "a.laz")
    message = r"a\.laz is no COPC file, and no ept\.json by its name" if content else r"a\.laz has no bytes from 0 on"
    with pytest.raises(LidarError, match=message):
        open_points(serve_folder(tmp_path).href("a.laz"), patience=HASTE)


@pytest.mark.parametrize("kind", ["laz", "ept"])
def test_no_points(tmp_path, kind):
    if kind == "ept":
        folder = write_ept(tmp_path / "ept", wood(600))
        ept = json.loads((folder / "ept.json").read_text()) | {"points": 0}
        (folder / "ept.json").write_text(json.dumps(ept))
        path = folder
    else:
        path = tmp_path / "a.laz"
        wood(0).write(path)
    with pytest.raises(LidarError, match=r"holds 0 points; leave it out"):
        open_points(path)


def patched(path, at, text):
    raw = bytearray(path.read_bytes())
    raw[at : at + len(text)] = text
    path.write_bytes(raw)
    return path


def test_broken_hierarchy_of_a_copc_file(sources, tmp_path):
    whole = sources["copc"].read_bytes()
    first = struct.unpack_from("<Q", whole, 235)[0] + 60
    entry = partial(struct.pack, "<4iQii")
    cases = {
        "names bytes that are not its points'": entry(0, 0, 0, 0, len(whole), 10, 5),
        r"lists 20002 points|lists \d+ points, its header 20000": whole[first : first + 28] + struct.pack("<i", 2),
        "leads in a circle": entry(0, 0, 0, 0, first, 32, -1),
        "a node of level 99": entry(99, 0, 0, 0, 400, 10, 5),
    }
    for i, (message, text) in enumerate(cases.items()):
        path = tmp_path / f"{i}.copc.laz"
        shutil.copy(sources["copc"], path)
        patched(path, first, text)
        with pytest.raises(LidarError, match=message):
            list(open_points(path).chunks())
    path = tmp_path / "size.copc.laz"
    shutil.copy(sources["copc"], path)
    patched(path, 375 + 54 + 48, struct.pack("<Q", 33))
    with pytest.raises(LidarError, match=r"33 bytes, not a multiple of 32"):
        open_points(path)
    shutil.copy(sources["copc"], path)
    patched(path, 375 + 54 + 24, struct.pack("<d", -1.0))
    with pytest.raises(LidarError, match=r"makes no octree"):
        open_points(path)


def test_header_box_that_is_none(tmp_path):
    path = tmp_path / "a.las"
    wood(600).write(path)
    patched(path, 179, struct.pack("<d", float("nan")))
    with pytest.raises(LidarError, match=r"in the header is no box"):
        _ = open_points(path).bounds


def test_what_is_missing_of_an_ept_is_named(sources, tmp_path):
    folder = tmp_path / "ept"
    shutil.copytree(sources["ept in pages"].parent, folder)
    source = open_points(folder)
    deepest = max((folder / "ept-data").iterdir(), key=lambda p: int(p.name.split("-")[0]))
    deepest.unlink()
    with pytest.raises(LidarError, match=rf"{deepest.name} is not there, the hierarchy has \d+ points in it"):
        list(source.chunks())
    # A spacing for which the missing node is not needed is served all the same.
    assert sum(c.size for c in source.chunks(spacing=source.cube.spacing)) > 0
    next((folder / "ept-hierarchy").glob("1-*.json")).unlink()
    with pytest.raises(LidarError, match=r"ept-hierarchy/1-.*json is not there"):
        list(source.chunks())
    assert sum(c.size for c in source.chunks(spacing=source.cube.spacing)) > 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dataType": "zstandard"}, r"stored as zstandard cannot be read.*convert it"),
        ({"hierarchyType": "gzip"}, r"stored as gzip hierarchy cannot be read"),
        ({"version": "2.0.0"}, r"EPT version 2\.0\.0 is not known"),
        ({"span": 0}, r"is not an ept\.json \(span"),
        ({"bounds": [0, 0, 0, 0, 0, 0]}, r"are no box"),
        ({"schema": []}, r"has no dimension X"),
        ({"points": 19_999}, r"promises 19999 points, its hierarchy 20000"),
        ({"srs": {"wkt": "PROJCS[nonsense"}}, r"its srs is not understood .*give option crs"),
    ],
)
def test_ept_json_that_cannot_be_used(sources, tmp_path, change, message):
    folder = tmp_path / "ept"
    shutil.copytree(sources["ept binary"], folder)
    ept = json.loads((folder / "ept.json").read_text()) | change
    (folder / "ept.json").write_text(json.dumps(ept))

    def use():
        source = open_points(folder)
        crs_of(source)
        list(source.chunks())

    with pytest.raises(LidarError, match=message):
        use()


def test_ept_files_that_do_not_hold_what_the_hierarchy_says(sources, tmp_path):
    for kind, message in (("ept", r"points, the hierarchy says"), ("ept binary", r"points of 16 bytes are expected")):
        folder = tmp_path / kind
        shutil.copytree(sources[kind], folder)
        files = sorted((folder / "ept-data").iterdir())
        shutil.copy(files[1], files[0])
        with pytest.raises(LidarError, match=message):
            list(open_points(folder).chunks())
    (folder / "ept-hierarchy" / "0-0-0-0.json").write_text('{"0-0-0": 3}')
    with pytest.raises(LidarError, match=r"is not a hierarchy of an EPT"):
        list(open_points(folder).chunks())


@pytest.mark.parametrize("kind", ["laz", "copc", "ept"])
def test_wrong_arguments(sources, kind):
    source = open_points(sources[kind])
    with pytest.raises(LidarError, match=r"are not left, bottom, right, top"):
        list(source.chunks((10.0, 0.0, 0.0, 10.0)))
    with pytest.raises(LidarError, match=r"are not left, bottom, right, top"):
        list(source.chunks((0.0, 0.0, float("nan"), 10.0)))
    with pytest.raises(LidarError, match=r"chunk_points = 0 must be 1 or more"):
        list(source.chunks(chunk_points=0))
    with pytest.raises(LidarError, match=r"spacing = -1 must be a finite number above 0"):
        list(source.chunks(spacing=-1))


# --- over HTTP --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """A cloud of which a corner is a small part, as COPC and EPT."""
    folder = tmp_path_factory.mktemp("large")
    cloud = wood(200_000, seed=2)
    write_copc(folder / "large.copc.laz", cloud, span=16, leaf=1500, page_level=2)
    write_ept(folder / "ept", cloud, span=16, leaf=1500, page_level=2)
    return folder


CORNER = (LEFT + 1, BOTTOM + 1, LEFT + 11, BOTTOM + 11)


def test_a_small_area_of_a_copc_file_is_a_small_part_of_its_bytes(large, serve_folder):
    server = serve_folder(large)
    size = (large / "large.copc.laz").stat().st_size
    source = open_points(server.href("large.copc.laz"), patience=HASTE)
    n = sum(c.size for c in source.chunks(CORNER))
    assert n == pytest.approx(200_000 / 400, rel=0.2)
    sent = server.sent_bytes["/large.copc.laz"]
    assert all(r.status == 206 for r in server.requests)
    assert sent < 0.15 * size, f"{sent} of {size} bytes"
    server.forget()
    sum(c.size for c in source.chunks())
    assert server.sent_bytes["/large.copc.laz"] > 0.9 * size  # the count can tell the difference
    assert server.count() < 60, "nodes side by side are fetched together"


def test_a_small_area_of_an_ept_is_few_of_its_files(large, serve_folder):
    server = serve_folder(large)
    source = open_points(server.href("ept/ept.json"), patience=HASTE)
    n = sum(c.size for c in source.chunks(CORNER))
    assert n == pytest.approx(200_000 / 400, rel=0.2)
    files = len(list((large / "ept" / "ept-data").iterdir()))
    assert server.count("/ept/ept-data/*") < 0.15 * files
    server.forget()
    root = source.cube.spacing
    sum(c.size for c in source.chunks(spacing=root))
    assert server.count("/ept/ept-data/*") == 1
    assert server.count("/ept/ept-hierarchy/*") == 1


def links(server):
    return {"copc": server.href("wood.copc.laz"), "ept": server.href("ept/ept.json")}


PATHS = {"copc": "/wood.copc.laz", "ept": "/ept/*"}


@pytest.mark.parametrize("kind", ["copc", "ept"])
@pytest.mark.parametrize(
    "fault",
    [
        {"status": 429, "retry_after_s": 1},
        {"status": 500},
        {"status": 503},
        {"hang_s": 1.0},
        {"truncate": True},
        {"drop": True},
    ],
    ids=str,
)
def test_passing_faults_are_sat_out(sources, truth, serve_folder, kind, fault):
    server = serve_folder(sources["las"].parent)
    server.fail(PATHS[kind], times=1, **fault)
    source = open_points(links(server)[kind], patience=HASTE)
    server.fail(PATHS[kind], times=1, **fault)
    np.testing.assert_array_equal(gathered(source.chunks(MIDDLE)), within(truth, MIDDLE))


@pytest.mark.parametrize("kind", ["copc", "ept"])
@pytest.mark.parametrize("when", ["opened", "read"])
@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ({"status": 429}, r"HTTP 429; 3 tries\); run again later"),
        ({"status": 429, "retry_after_s": 600}, r"HTTP 429, and asks for a pause of 600 s\)"),
        ({"status": 500}, r"HTTP 500; 3 tries"),
        ({"status": 403}, r"is not there or not for everybody \(HTTP 403\); check the link, or sign it"),
        ({"hang_s": 0.8}, r"no answer in time; 3 tries"),
        ({"truncate": True}, r"(the answer broke off|of \d+ bytes); 3 tries"),
        ({"drop": True}, r"the connection broke off; 3 tries"),
    ],
    ids=str,
)
def test_lasting_faults_end_with_one_line(sources, serve_folder, kind, when, fault, message):
    server = serve_folder(sources["las"].parent)
    source = open_points(links(server)[kind], patience=HASTE) if when == "read" else None
    server.fail("/wood.copc.laz" if kind == "copc" else "/ept/*", **fault)
    with pytest.raises(LidarError, match=message) as told:
        list(source.chunks()) if source else open_points(links(server)[kind], patience=HASTE)
    assert "\n" not in str(told.value)
    assert str(told.value).startswith(f"{server.url}{PATHS[kind].rstrip('*')}")


def test_a_server_that_is_not_there(sources, serve_folder):
    server = serve_folder(sources["las"].parent)
    link = links(server)["copc"]
    server.stop()
    with pytest.raises(LidarError, match=r"cannot be fetched \(no connection; 3 tries\)"):
        open_points(link, patience=HASTE)
    with pytest.raises(LidarError, match=r"is not there \(HTTP 404\); check the link"):
        open_points(serve_folder(sources["las"].parent).href("none.copc.laz"), patience=HASTE)


def test_a_file_that_changes_while_it_is_read(sources, serve_folder, tmp_path):
    shutil.copy(sources["copc"], tmp_path / "a.copc.laz")
    server = serve_folder(tmp_path)
    source = open_points(server.href("a.copc.laz"), patience=HASTE)
    with (tmp_path / "a.copc.laz").open("ab") as file:
        file.write(b"more")
    with pytest.raises(LidarError, match=r"it changed while it was read; run again"):
        list(source.chunks())


@pytest.fixture
def odd_server(sources):
    """Servers that answer in ways that are allowed but of no use, or that look like faults and are none."""
    servers = []

    def start(oddity):
        class Handler(BaseHTTPRequestHandler):
            def log_message(self, *_):
                pass

            def do_GET(self):
                path = sources["las"].parent / self.path.lstrip("/")
                if not path.is_file():
                    self.send_response(403 if oddity == "403 for 404" else 404)
                    self.end_headers()
                    return
                body, status, headers = path.read_bytes(), 200, {}
                first, last = map(int, self.headers.get("Range", "bytes=0-0").removeprefix("bytes=").split("-"))
                if oddity != "no ranges" and "Range" in self.headers:
                    status, total = 206, len(body)
                    if oddity == "other range":
                        first, last = first + 1, last + 1
                    body = body[first : last + 1]
                    headers["Content-Range"] = f"bytes {first}-{first + len(body) - 1}/{total}"
                    if oddity == "no total":
                        headers["Content-Range"] = f"bytes {first}-{first + len(body) - 1}/*"
                if oddity == "gzip":
                    body, headers["Content-Encoding"] = gzip.compress(body), "gzip"
                self.send_response(status)
                for name, value in headers.items():
                    self.send_header(name, value)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

        servers.append(ThreadingHTTPServer(("127.0.0.1", 0), Handler))
        threading.Thread(target=servers[-1].serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        return f"http://127.0.0.1:{servers[-1].server_address[1]}"

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


@pytest.mark.parametrize(
    ("oddity", "message"),
    [
        ("no ranges", r"gives whole files only, no ranges; download it and give the file"),
        ("no total", r"Content-Range 'bytes 0-65535/\*' is not understood; download it"),
        ("other range", r"bytes 1 to 65536 where 0 to 65535 were asked for; 3 tries"),
        ("gzip", r"compresses on the way, so ranges mean nothing; download it"),
    ],
)
def test_servers_of_no_use_for_copc(odd_server, oddity, message):
    with pytest.raises(LidarError, match=message):
        open_points(f"{odd_server(oddity)}/wood.copc.laz", patience=HASTE)


@pytest.mark.parametrize("oddity", ["no ranges", "gzip", "403 for 404"])
def test_an_ept_needs_whole_files_only(odd_server, truth, oddity):
    source = open_points(f"{odd_server(oddity)}/ept/ept.json", patience=HASTE)
    np.testing.assert_array_equal(gathered(source.chunks(MIDDLE)), within(truth, MIDDLE))
    assert source.z_unit_m is None  # no metadata of its files


class Signer:
    """Appends tokens of the server, as a signing service's client does: the same one until it is told to renew."""

    def __init__(self, server, *, works=True):
        self.server, self.works, self.token, self.renewed = server, works, "", 0

    def __call__(self, href, /, *, renew=False):
        if renew or not self.token:
            self.renewed += renew
            self.token = self.server._token()[1] if self.works else "sig=wrong"
        return f"{href}?{self.token}"


@pytest.mark.parametrize("kind", ["copc", "ept"])
def test_expired_signatures_are_renewed(sources, truth, serve_folder, kind):
    server = serve_folder(sources["las"].parent)
    server.require_signature(PATHS[kind])
    with pytest.raises(LidarError, match=r"not for everybody \(HTTP 403\); check the link, or sign it"):
        open_points(links(server)[kind], patience=HASTE)
    sign = Signer(server)
    source = open_points(links(server)[kind], sign=sign, patience=HASTE)
    assert sign.renewed == 0
    server.revoke_signatures()
    np.testing.assert_array_equal(gathered(source.chunks(MIDDLE)), within(truth, MIDDLE))
    assert sign.renewed >= 1
    with pytest.raises(LidarError, match=r"HTTP 403\); check the source's signing") as told:
        open_points(links(server)[kind], sign=Signer(server, works=False), patience=HASTE)
    assert "sig=" not in str(told.value)


@pytest.mark.parametrize("kind", ["copc", "ept"])
def test_a_signed_link_keeps_its_query_and_its_secret(sources, truth, serve_folder, kind):
    server = serve_folder(sources["las"].parent)
    server.require_signature(PATHS[kind])
    source = open_points(f"{links(server)[kind]}?{server._token()[1]}", patience=HASTE)
    assert "sig" not in source.name
    np.testing.assert_array_equal(gathered(source.chunks(MIDDLE)), within(truth, MIDDLE))
    server.revoke_signatures()
    with pytest.raises(LidarError, match=r"HTTP 403\); check the link") as told:
        list(source.chunks(MIDDLE))
    assert "sig=" not in str(told.value)


def test_work_ahead_is_bounded_and_in_order():
    begun, lock = [], threading.Lock()

    def work(job):
        with lock:
            begun.append(job)
        return job

    results = ahead(range(100), work, 4)
    assert next(results) == 0
    assert len(begun) <= 5, "no more than the workers are ahead of the reader"
    assert list(results) == list(range(1, 100))
    closed = ahead(range(100), work, 4)
    next(closed)
    closed.close()


# --- real files -------------------------------------------------------------------------------------------------------


def test_real_copc_against_laspys_reader(samples):
    path = samples / "autzen" / "autzen_manual_classes_61k_thinned.copc.laz"
    source = open_points(path)
    assert isinstance(source, CopcFile)
    assert z_unit_m_of(source) == pytest.approx(1200 / 3937, rel=1e-9)  # feet of the US survey in its vertical CRS
    left, bottom, right, top = source.bounds
    bounds = (left + (right - left) / 3, bottom, right, bottom + (top - bottom) / 2)
    with laspy.CopcReader.open(path) as reader:
        box = laspy.copc.Bounds(np.array(bounds[:2]), np.array(bounds[2:]))
        expected = reader.query(bounds=box)
        coarse = reader.query(bounds=box, resolution=40)
    found = gathered(source.chunks(bounds))
    np.testing.assert_array_equal(found[:, 0], np.sort(expected.x))
    np.testing.assert_array_equal(np.sort(found[:, 3]), np.sort(expected.classification))
    assert sum(c.size for c in source.chunks(bounds, spacing=40)) == len(coarse) < len(expected)


def test_real_ept(samples):
    source = open_points(samples / "lidar" / "hawaii_ept")
    assert isinstance(source, EptFolder)
    assert crs_of(source) == CRS.from_epsg(32605)
    assert z_unit_m_of(source) == 1.0
    bounds = (202_200.0, 2_184_200.0, 202_400.0, 2_184_300.0)
    parts = [laspy.read(p) for p in sorted((samples / "lidar" / "hawaii_ept" / "ept-data").iterdir())]
    x, y, z = (np.concatenate([np.asarray(p[axis]) for p in parts]) for axis in "xyz")
    inside = (x >= bounds[0]) & (x <= bounds[2]) & (y >= bounds[1]) & (y <= bounds[3])
    found = gathered(source.chunks(bounds))
    assert len(found) == inside.sum() > 10_000
    np.testing.assert_array_equal(np.sort(found[:, 2]), np.sort(z[inside]))
    assert sum(c.decoded for c in source.chunks(bounds)) < 0.5 * source.point_count


# --- through to the heights ----------------------------------------------------------------------------------------------


def standing(crs, *, foot=1.0):
    """Trees of 20 m on flat ground, all classified; x and y in `crs`, z in units of `foot` metres."""
    rng = np.random.default_rng(3)
    n = 20_000
    x, y = np.round(LEFT + rng.uniform(0, 60, n), 3), np.round(BOTTOM + rng.uniform(0, 60, n), 3)
    tree = (np.hypot((x - LEFT) % 10 - 5, (y - BOTTOM) % 10 - 5) < 3) & (rng.random(n) < 0.7)
    x, y = Transformer.from_crs(UTM, crs, always_xy=True).transform(x, y)
    header = laspy.LasHeader(version="1.4", point_format=6)
    header.scales, header.offsets = [1e-4] * 3, np.floor([x.min(), y.min(), 0])
    header.add_crs(crs)
    cloud = laspy.LasData(header)
    cloud.x, cloud.y, cloud.z = x, y, (150 + 20 * tree) / foot
    cloud.classification = np.where(tree, 5, 2)
    cloud.return_number = cloud.number_of_returns = np.ones(n, np.uint8)
    cloud.update_header()
    return cloud


@pytest.mark.slow
@pytest.mark.parametrize("spacing_m", [0.0, 0.5])
def test_an_ept_in_web_mercator_with_z_in_feet_gives_the_heights_of_the_cloud_it_was_made_of(tmp_path, spacing_m):
    grid = Grid(crs=UTM, transform=Affine(1, 0, LEFT, 0, -1, BOTTOM + 60), shape=(60, 60))
    standing(UTM).write(tmp_path / "a.laz")
    expected = lidar_to_chm(tmp_path / "a.laz", grid).to_numpy()
    ept = write_ept(tmp_path / "ept", standing(CRS.from_epsg(3857), foot=0.3048), srs=MERCATOR)
    with pytest.raises(LidarError, match=r"nothing about the unit of z; give option z_unit_m"):
        lidar_to_chm(ept, grid)
    found = lidar_to_chm(ept, grid, options=LidarOptions(z_unit_m=0.3048, spacing_m=spacing_m)).to_numpy()
    agree = np.isclose(found, expected, atol=0.01, equal_nan=True)
    assert np.nanmax(expected) == pytest.approx(20, abs=0.01)
    # Coordinates rounded again put a few points into the pixel beside; a coarse spacing leaves pixels without a point.
    assert agree.mean() > (0.99 if not spacing_m else 0.8)

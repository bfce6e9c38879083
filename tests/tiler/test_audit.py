"""The audit: each kind of leak is found where it was planted, and nowhere else."""

import json
import math
import subprocess
import sys
from pathlib import Path

import geopandas as gpd
import numpy as np
import pandas as pd
import pytest
import shapely
from affine import Affine
from hypothesis import given, settings
from hypothesis import strategies as st
from pyproj import CRS, Geod, Transformer
from scipy import ndimage
from shapely.geometry import box

import canopy.cli
from canopy.errors import AuditError, CanopyError
from canopy.grid import Grid
from canopy.raster import open_raster, write_raster
from canopy.tiler.audit import MOST_EXAMPLES, audit, audit_pair

UTM = CRS.from_epsg(32617)
CANOPY = Path(sys.executable).parent / "canopy"


def square(x, y, side=100.0):
    return box(x, y, x + side, y + side)


def table(path, outlines, crs=UTM, **columns):
    path.parent.mkdir(parents=True, exist_ok=True)
    ids = {"id": [f"{path.stem}{i}" for i in range(len(outlines))]}
    gpd.GeoDataFrame(ids | columns, geometry=list(outlines), crs=crs).to_parquet(path)
    return path


def two(folder, train, test, crs=UTM, test_crs=None, **columns):
    """TRAIN.parquet and TEST.parquet; each column is given as (of train, of test)."""
    own = [{name: values[side] for name, values in columns.items()} for side in (0, 1)]
    return (
        table(folder / "train.parquet", train, crs, **own[0]),
        table(folder / "test.parquet", test, test_crs or crs, **own[1]),
    )


def kinds(report):
    return sorted((finding.kind, finding.severity) for finding in report.findings)


def texture(seed, side=160):
    rng = np.random.default_rng(seed)
    bands = [ndimage.gaussian_filter(rng.normal(size=(side, side)), s) * s for s in (1.0, 2.0, 4.0)]
    return (sum(bands) * 60 + 120).clip(0, 255)


def raster(path, data, valid=None):
    data = np.atleast_3d(data) if data.ndim == 2 else data
    data = np.moveaxis(data, -1, 0) if data.shape[-1] == 1 else data
    path.parent.mkdir(parents=True, exist_ok=True)
    grid = Grid(crs=UTM, transform=Affine(1, 0, 500_000, 0, -1, 4_000_000), shape=data.shape[1:])
    write_raster(path, np.ascontiguousarray(data), grid=grid, nodata=np.nan if data.dtype.kind == "f" else None)
    return path.name


FAR = [square(500_000 + 200 * i, 4_000_000) for i in range(6)]
AWAY = [square(510_000 + 200 * i, 4_000_000) for i in range(3)]


def test_a_clean_split_passes(tmp_path):
    report = audit_pair(*two(tmp_path, FAR, AWAY), buffer_m=1000)
    assert report.clean
    assert not report.findings
    assert report.chips == {"train": 6, "test": 3}
    assert report.profiles[0].quantile_m["0"] == pytest.approx(8900, rel=1e-3)


# --- overlap


def test_overlap_is_found_and_measured(tmp_path):
    report = audit_pair(*two(tmp_path, FAR, [*AWAY, square(500_020, 4_000_000), square(501_130, 4_000_000)]), buffer_m=50)
    assert kinds(report) == [("overlap", "leak")]
    assert not report.clean
    covered, near = report.findings[0].examples
    assert (covered.first, covered.second, covered.said) == ("train0", "test3", "covers 80.0% of it")
    assert (near.first, near.second) == ("train5", "test4")
    assert float(near.said.removesuffix(" m apart")) == pytest.approx(30 / 0.9996, rel=5e-4)  # UTM's scale on its axis
    assert audit_pair(*two(tmp_path, FAR, [*AWAY, square(501_130, 4_000_000)]), buffer_m=29).clean


def test_what_touches_overlaps(tmp_path):
    touching, apart = square(501_100, 4_000_000), square(501_100.01, 4_000_000)
    assert not audit_pair(*two(tmp_path, FAR, [touching])).clean
    assert audit_pair(*two(tmp_path, FAR, [apart])).clean


@st.composite
def squares(draw):
    spots = st.tuples(st.integers(0, 2000), st.integers(0, 2000), st.integers(20, 300))
    return [square(500_000 + x, 4_000_000 + y, s) for x, y, s in draw(st.lists(spots, min_size=1, max_size=15))]


@settings(max_examples=20)  # each writes and reads two files
@given(squares(), squares(), st.integers(1, 400))
def test_pairs_within_the_buffer_are_those_of_a_plain_double_loop(tmp_path_factory, train, test, buffer_m):
    folder = tmp_path_factory.mktemp("set")
    report = audit_pair(*two(folder, train, test), buffer_m=buffer_m)
    found = {(e.first, e.second) for finding in report.findings for e in finding.examples}
    for i, a in enumerate(train):
        for j, b in enumerate(test):
            metres = a.distance(b)
            if abs(metres - buffer_m) > 0.002 * buffer_m:  # at the buffer the scale of the projection decides
                assert ((f"train{i}", f"test{j}") in found) == (metres <= buffer_m)
    nearest = [min(a.distance(b) for a in train) for b in test]
    assert report.profiles[0].quantile_m["1"] == pytest.approx(max(nearest), rel=2e-3, abs=0.01)
    assert report.profiles[0].quantile_m["0"] == pytest.approx(min(nearest), rel=2e-3, abs=0.01)


PLACES = {
    "equator": (12.0, 0.0),
    "zone border": (6.0, 51.0),
    "antimeridian": (180.0, -17.0),
    "antimeridian, other side": (-180.0, 65.0),
    "north": (30.0, 83.99),
    "arctic": (30.0, 84.01),
    "pole": (100.0, 89.99),
    "antarctic": (-60.0, -86.0),
}


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("bearing_deg", [0, 60, 90, 270])
def test_metres_are_metres_everywhere(tmp_path, place, bearing_deg):
    """Two small triangles in degrees, a known way apart on the ellipsoid."""
    geod = Geod(ellps="WGS84")
    lon, lat = PLACES[place]

    def triangle(lon, lat):
        points = [geod.fwd(lon, lat, angle, 0.01)[:2] for angle in (0, 120, 240)]
        return shapely.Polygon(points)

    for way_m, buffer_m, clean in ((50.0, 40, True), (50.0, 60, False), (3000.0, 2900, True), (3000.0, 3100, False)):
        there = geod.fwd(lon, lat, bearing_deg, way_m)[:2]
        files = two(tmp_path, [triangle(lon, lat)], [triangle(*there)], crs="EPSG:4326")
        report = audit_pair(*files, buffer_m=buffer_m)
        assert report.clean == clean, f"{way_m} m"
        assert report.profiles[0].quantile_m["0"] == pytest.approx(way_m, rel=2e-3, abs=0.05)


def test_tables_in_different_systems_meet(tmp_path):
    """UTM 17 against UTM 18, US survey feet and degrees."""
    train = [square(800_000, 4_000_000)]
    for crs in ("EPSG:32618", "EPSG:4326", "EPSG:2264"):
        to = Transformer.from_crs(UTM, crs, always_xy=True).transform
        near, far = (shapely.transform(square(x, 4_000_000), to, interleaved=False) for x in (800_115, 800_160))
        assert not audit_pair(*two(tmp_path, train, [near], test_crs=crs), buffer_m=30).clean
        assert audit_pair(*two(tmp_path, train, [far], test_crs=crs), buffer_m=30).clean


def test_the_profile_crosses_zones_and_oceans(tmp_path):
    test = [box(10, 45, 10.001, 45.001), box(10.5, 45, 10.501, 45.001), box(-120, 40, -119.999, 40.001)]
    report = audit_pair(*two(tmp_path, [box(11, 45, 11.001, 45.001)], test, crs="EPSG:4326"))
    profile = report.profiles[0]
    assert profile.quantile_m["0"] == pytest.approx(Geod(ellps="WGS84").inv(10.501, 45, 11, 45)[2], rel=1e-3)
    assert profile.quantile_m["0.5"] == pytest.approx(Geod(ellps="WGS84").inv(10.001, 45, 11, 45)[2], rel=1e-3)
    assert profile.quantile_m["1"] == pytest.approx(Geod(ellps="WGS84").inv(-120, 40, 11, 45)[2], rel=1e-3)
    assert profile.share[-1] == 1.0
    assert list(profile.distance_m) == sorted(profile.distance_m)


# --- content


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """Six textures and, as the seventh, a turned, mirrored and cropped copy of the first."""
    folder = tmp_path_factory.mktemp("pictures")
    data = [texture(seed) for seed in range(6)]
    data.append(np.rot90(data[0])[20:140, ::-1][:, 10:150] * 0.8 + 10)
    for i, image in enumerate(data):
        raster(folder / f"p{i}.tif", image.astype(np.uint8))
        raster(folder / f"h{i}.tif", (image / 6).astype(np.float32))
    return folder


@pytest.mark.slow
def test_a_treated_copy_elsewhere_is_found(tmp_path, pictures):
    names = [str(pictures / f"p{i}.tif") for i in range(7)]
    files = two(tmp_path, FAR[:4], AWAY, image=(names[:4], [names[4], names[6], names[5]]))
    report = audit_pair(*files)
    assert kinds(report) == [("content", "leak")]
    assert [(e.first, e.second) for e in report.findings[0].examples] == [("train0", "test1")]
    clean = audit_pair(*two(tmp_path, FAR[1:4], AWAY, image=(names[1:4], [names[4], names[6], names[5]])))
    assert clean.clean
    assert not clean.findings


def test_images_that_are_not_there_are_named_as_unchecked(tmp_path, pictures):
    names = [str(pictures / f"p{i}.tif") for i in range(3)]
    report = audit_pair(*two(tmp_path, FAR[:3], AWAY, image=([names[0], None, names[1]], [None, None, None])))
    assert report.clean
    assert "1 of 3 train chips have no images (column image or image_path)" in report.notes
    assert "3 of 3 test chips have no images (column image or image_path)" in report.notes


def test_images_without_texture_are_named_as_unchecked(tmp_path):
    flat = [raster(tmp_path / f"{i}.tif", np.full((3, 40, 40), i, np.uint8)) for i in range(2)]
    report = audit_pair(*two(tmp_path, FAR[:1], AWAY[:1], image=(flat[:1], flat[1:])))
    assert "1 of 1 test images have no texture to compare" in report.notes


# --- lineage


def test_one_file_on_both_sides_is_found(tmp_path):
    digests = ["a" * 64, "b" * 64, "c" * 64]
    report = audit_pair(*two(tmp_path, FAR[:3], AWAY[:2], sha256=(digests, ["b" * 64, "d" * 64])))
    assert kinds(report) == [("lineage", "leak")]
    assert [(e.first, e.second) for e in report.findings[0].examples] == [("train1", "test0")]
    assert audit_pair(*two(tmp_path, FAR[:3], AWAY[:1], sha256=(digests, ["d" * 64]))).clean


@pytest.mark.parametrize("spelled", ["other; plot 7", ["other", "plot 7"]])
def test_a_declared_ancestor_on_the_other_side_is_found(tmp_path, spelled):
    items = (["plot 1", "plot 2"], ["plot 7", "plot 8"])
    nothing = [] if isinstance(spelled, list) else ""
    report = audit_pair(*two(tmp_path, FAR[:2], AWAY[:2], item=items, derived_from=([nothing, spelled], [nothing] * 2)))
    assert kinds(report) == [("lineage", "leak")]
    assert [(e.first, e.second) for e in report.findings[0].examples] == [("train1", "test0")]
    assert "plot 7" in report.findings[0].examples[0].said
    innocent = audit_pair(*two(tmp_path, FAR[:2], AWAY[:2], item=items, derived_from=([nothing] * 2, [nothing] * 2)))
    assert innocent.clean


def test_a_common_ancestor_is_a_warning_unless_sites_are_claimed(tmp_path):
    files = two(tmp_path, FAR[:2], AWAY[:1], lineage=(["CHM A", "CHM B"], ["CHM B"]))
    assert kinds(audit_pair(*files)) == [("lineage", "warning")]
    assert audit_pair(*files).clean
    assert kinds(audit_pair(*files, by_site=True)) == [("lineage", "leak")]
    assert not audit_pair(*two(tmp_path, FAR[:1], AWAY[:1], lineage=(["CHM A"], ["CHM B"])), by_site=True).findings


def test_heights_photographed_anew_are_found(tmp_path, pictures):
    """The same canopy height model under another picture, at another place: what a simulation of a test site would be."""
    images = [str(pictures / f"p{i}.tif") for i in range(6)]
    heights = [str(pictures / f"h{i}.tif") for i in range(7)]
    columns = {"image": (images[:3], images[3:5]), "height": (heights[:3], [heights[6], heights[4]])}
    report = audit_pair(*two(tmp_path, FAR[:3], AWAY[:2], **columns))
    assert kinds(report) == [("lineage", "leak")]
    assert report.findings[0].said == "1 pairs of chips have the same heights, 1 of them without saying so"
    assert [(e.first, e.second) for e in report.findings[0].examples] == [("train0", "test0")]
    declared = audit_pair(*two(tmp_path, FAR[:3], AWAY[:2], **columns, derived_from=(["M", "", ""], ["M", ""])))
    assert {f.said for f in declared.findings} == {
        "1 declared ancestors are shared", "1 pairs of chips have the same heights, 0 of them without saying so",
    }  # fmt: skip
    columns["height"] = (heights[:3], heights[3:5])
    assert not audit_pair(*two(tmp_path, FAR[:3], AWAY[:2], **columns)).findings


def test_windows_of_one_scene_are_no_lineage(tmp_path, pictures):
    """They overlap and show the same; that their heights agree is no news."""
    names = [[str(pictures / f"{kind}0.tif")] for kind in "ph"]
    here = [square(500_000, 4_000_000)]
    report = audit_pair(*two(tmp_path, here, here, image=(names[0], names[0]), height_path=(names[1], names[1])))
    assert kinds(report) == [("content", "leak"), ("overlap", "leak")]


def test_heights_in_metres_are_no_paths(tmp_path):
    assert audit_pair(*two(tmp_path, FAR[:1], AWAY[:1], height=([12.5], [8.0]))).clean


# --- acquisitions


@pytest.mark.parametrize(
    ("columns", "shared"),
    [
        ({"acquisition": (["F1", "F2"], ["F2"])}, True),
        ({"acquisition": (["F1", "F2"], ["F3"])}, False),
        ({"item": (["one.tif", "two.tif"], ["two.tif"])}, True),
        ({"site": (["A", "B"], ["B"]), "lidar_source": (["P", "P"], ["P"])}, True),
        ({"site": (["A", "B"], ["C"]), "lidar_source": (["P", "P"], ["P"])}, False),  # a product is no flight
        (
            {
                "site": (["A", "A"], ["A"]), "image_source": (["NAIP", "NAIP"], ["NAIP"]),
                "image_date": (["2019-06-01", "2020-06-01"], ["2021-06-01"]),
            },
            False,
        ),
        (
            {
                "site": (["A", "A"], ["A"]), "image_source": (["NAIP", "NAIP"], ["NAIP"]),
                "image_date": (["2019-06-01", "2020-06-01"], ["2020-06-01"]),
            },
            True,
        ),
    ],
)  # fmt: skip
def test_a_shared_acquisition_is_a_warning_and_breaks_a_claim_of_sites(tmp_path, columns, shared):
    files = two(tmp_path, FAR[:2], AWAY[:1], **columns)
    report = audit_pair(*files)
    assert report.clean
    assert kinds(report) == ([("acquisition", "warning")] if shared else [])
    strict = audit_pair(*files, by_site=True)
    same_site = set(columns.get("site", ((), ()))[0]) & set(columns.get("site", ((), ()))[1])
    assert strict.clean == (not shared and not same_site)


# --- a tile set of our own


def tile_set(folder, splits, *, step_m=400.0, recipe=True, method="hash"):
    (folder / "image").mkdir(parents=True)
    (folder / "height").mkdir()
    for i in range(len(splits)):
        raster(folder / "image" / f"index{i}.tif", texture(i).astype(np.uint8))
        raster(folder / "height" / f"index{i}.tif", (texture(100 + i) / 6).astype(np.float32))
    places = [square(500_000 + step_m * i, 4_000_000) for i in range(len(splits))]
    table(
        folder / "index.parquet", places, split=splits, site=["A"] * len(splits), item=[f"i{i}" for i in range(len(splits))]
    )
    if recipe:
        shares = "folds = 3\nfold = 1" if method == "site-folds" else "train = 1.0"
        (folder / "recipe.toml").write_text(
            'name = "set"\ngsd_m = 0.5\nchip_px = 64\nstride_px = 64\nmin_valid_fraction = 0.5\n'
            f'[split]\nseed = 1\nblock_m = 100.0\nbuffer_m = 20.0\nmethod = "{method}"\n{shares}\n'
            '[[source]]\nkind = "pair"\nsite = "A"\nimage = "a.tif"\nheight = "b.tif"\n'
            'licence = "CC0-1.0"\nimage_source = "drawn"\nlidar_source = "drawn"\n'
        )
    return folder


def test_a_tile_set_is_audited_with_its_own_buffer(tmp_path):
    splits = ["train", "train", "buffer", "val", "test", "dropped"]
    report = audit(tile_set(tmp_path / "good", splits))
    assert report.clean
    assert report.settings.buffer_m == 20.0
    assert report.chips == {"train": 2, "val": 1, "test": 1, "buffer": 1, "dropped": 1}
    assert [profile.splits for profile in report.profiles] == [("train", "val"), ("train", "test"), ("val", "test")]
    bad = audit(tile_set(tmp_path / "bad", ["train", "val", "test"], step_m=110.0))
    assert [(f.kind, f.splits) for f in bad.findings if f.kind == "overlap"] == [
        ("overlap", ("train", "val")), ("overlap", ("val", "test")),
    ]  # fmt: skip
    assert audit(tmp_path / "bad", buffer_m=5.0).clean
    unused = audit(tile_set(tmp_path / "unused", ["train", "buffer", "test", "dropped"], step_m=90.0))
    assert not [f for f in unused.findings if f.kind == "overlap"]  # chips of no split are in nobody's way


def test_content_of_a_tile_set_is_checked_from_its_files(tmp_path):
    folder = tile_set(tmp_path / "set", ["train", "test"])
    assert audit(folder).clean
    raster(folder / "image" / "index1.tif", np.flipud(texture(0)).astype(np.uint8))
    assert ("content", "leak") in kinds(audit(folder))


def test_a_recipe_of_site_folds_claims_sites(tmp_path):
    report = audit(tile_set(tmp_path / "set", ["train", "val", "test"], method="site-folds"))
    assert report.settings.by_site
    assert {(f.kind, f.severity) for f in report.findings} == {("acquisition", "leak")}
    assert audit(tmp_path / "set", by_site=False).clean


def test_the_order_of_rows_does_not_show(tmp_path):
    folder = tile_set(tmp_path / "set", ["train", "test", "val", "train", "test", "val"], step_m=105.0)
    report = audit(folder)
    frame = gpd.read_parquet(folder / "index.parquet")
    frame.sample(frac=1, random_state=3).to_parquet(folder / "index.parquet")
    assert audit(folder).as_json() == report.as_json()


def test_long_lists_are_cut_and_counted(tmp_path):
    here = [square(500_000, 4_000_000)] * 40
    finding = audit_pair(*two(tmp_path, here, here)).findings[0]
    assert (finding.count, len(finding.examples)) == (1600, MOST_EXAMPLES)


# --- the real case: plots that two benchmarks cut from one forest


def plots(samples, pattern, folder):
    names, outlines, images = [], [], []
    for path in sorted(samples.glob(pattern)):
        with open_raster(path) as raster_:
            outlines.append(box(*raster_.grid.bounds))
        names.append(path.stem.removesuffix("_rgb"))
        images.append(str(path))
    return table(folder, outlines, id=names, image=images)


def test_the_overlapping_plots_of_two_benchmarks_are_found(samples, tmp_path):
    train = plots(samples, "pairs/NEON_OSBS/idt_*_rgb.tif", tmp_path / "train.parquet")
    test = plots(samples, "pairs/NEON_OSBS/OSBS_0*_rgb.tif", tmp_path / "test.parquet")
    report = audit_pair(train, test)
    pairs = {(e.first, e.second) for f in report.findings if f.kind == "overlap" for e in f.examples}
    assert pairs == {
        ("idt_OSBS_7", "OSBS_029"), ("idt_OSBS_9", "OSBS_006"), ("idt_OSBS_32", "OSBS_003"), ("idt_OSBS_36", "OSBS_006"),
    }  # fmt: skip
    frame = gpd.read_parquet(train)
    frame[~frame["id"].isin({first for first, _ in pairs})].to_parquet(train)
    assert audit_pair(train, test).clean


# --- the command


@pytest.fixture
def canopy_audit(monkeypatch, capsys):
    """Runs `canopy audit WORDS` through the program's entry point; gives (exit code, stdout, stderr)."""

    def run(*words):
        monkeypatch.setattr(sys, "argv", ["canopy", "audit", *map(str, words)])
        with pytest.raises(SystemExit) as stop:
            canopy.cli.main()
        out, err = capsys.readouterr()
        return stop.value.code or 0, out, err

    return run


def test_the_command_ends_with_3_on_a_leak_and_0_without(tmp_path, canopy_audit):
    clean, leak = two(tmp_path / "a", FAR, AWAY), two(tmp_path / "b", FAR, [*AWAY, FAR[2]])
    code, out, err = canopy_audit(*clean)
    assert (code, err) == (0, "")
    assert out.endswith("no leak found\n")
    code, out, err = canopy_audit(*leak)
    assert (code, err) == (3, "")
    assert "LEAK overlap, train and test: 1 pairs of footprints" in out
    assert "train2 - test3: covers 100.0% of it" in out
    assert canopy_audit(*clean, "--buffer", 10_000)[0] == 3


@pytest.mark.parametrize("buffer", ["-3", "inf", "nan"])
def test_a_buffer_that_cannot_be_is_one_line(tmp_path, canopy_audit, buffer):
    code, out, err = canopy_audit(*two(tmp_path, FAR, AWAY), f"--buffer={buffer}")
    assert (code, out) == (1, "")
    assert len(err.splitlines()) == 1
    assert f"buffer {buffer} m must be a finite length of 0 or more; give metres" in err


def test_the_command_writes_reports(tmp_path, canopy_audit):
    files = two(tmp_path, FAR, [*AWAY, FAR[2]])
    code, out, _ = canopy_audit(*files, "--json", "--out", tmp_path / "new" / "report.json")
    assert code == 3
    report = json.loads(out)
    assert report == json.loads((tmp_path / "new" / "report.json").read_text())
    assert not report["clean"]
    assert report["findings"][0]["examples"] == [{"first": "train2", "second": "test3", "said": "covers 100.0% of it"}]
    assert len(report["profiles"][0]["distance_m"]) == len(report["profiles"][0]["share"]) == 4
    _, out, _ = canopy_audit(*files, "--out", tmp_path / "report.txt")
    assert (tmp_path / "report.txt").read_text() == out
    code, _, err = canopy_audit(*files, "--out", tmp_path / "report.txt" / "below.json")
    assert code == 1
    assert "cannot write" in err


def test_the_command_audits_a_tile_set(tmp_path, canopy_audit):
    folder = tile_set(tmp_path / "set", ["train", "val", "test"])
    assert canopy_audit(folder)[0] == 0
    assert canopy_audit(folder, "--by-site")[0] == 3
    assert canopy_audit(folder, "--buffer", 350)[0] == 3


def test_the_installed_program_audits(tmp_path):
    done = subprocess.run(
        [str(CANOPY), "audit", *map(str, two(tmp_path, FAR, [FAR[0]]))], capture_output=True, text=True, check=False
    )
    assert done.returncode == 3, done.stderr
    assert "1 leak found" in done.stdout


def bad_tables(folder):
    good = table(folder / "good.parquet", AWAY)
    plain = folder / "plain.parquet"
    pd.DataFrame({"id": ["a"], "geometry": [b"POINT"]}).to_parquet(plain)
    text = folder / "text.parquet"
    text.write_text("id,geometry\n")
    cut = folder / "cut.parquet"
    cut.write_bytes(good.read_bytes()[:-200])
    no_crs = table(folder / "no_crs.parquet", AWAY, crs=None)
    empty = folder / "empty.parquet"
    gpd.GeoDataFrame({"id": []}, geometry=[], crs=UTM).to_parquet(empty)
    hole = table(folder / "hole.parquet", [AWAY[0], None])
    nowhere = table(folder / "nowhere.parquet", [square(math.inf, 0.0)])
    blank = table(folder / "blank.parquet", AWAY, split=["buffer"] * 3)
    lost = table(folder / "lost.parquet", AWAY, image=["gone.tif"] * 3)
    return {
        "missing": (folder / "nothing.parquet", "does not exist"),
        "no geometry": (plain, "has no geometry column"),
        "no parquet": (text, "cannot be read as Parquet"),
        "cut short": (cut, "cannot be read as Parquet"),
        "no CRS": (no_crs, "has no CRS"),
        "empty": (empty, "holds no chip"),
        "no footprint": (hole, "has no footprint in row 1"),
        "infinite": (nowhere, "cannot hold"),
        "in no split": (blank, "holds no chip that is in a split"),
        "image missing": (lost, "does not exist"),
    }


def test_bad_tables_are_one_line_each(tmp_path, canopy_audit):
    good = table(tmp_path / "train.parquet", FAR, image=[raster(tmp_path / "p.tif", texture(0).astype(np.uint8))] * 6)
    for name, (path, said) in bad_tables(tmp_path).items():
        code, out, err = canopy_audit(good, path)
        assert (code, out) == (1, ""), name
        assert len(err.splitlines()) == 1, f"{name}: {err}"
        assert said in err, f"{name}: {err}"
        assert str(path) in err or name == "image missing", f"{name}: {err}"


def test_one_table_alone_needs_splits(tmp_path, canopy_audit):
    for path, said in (
        (table(tmp_path / "none.parquet", FAR), "has no column 'split'"),
        (table(tmp_path / "one.parquet", FAR, split=["train"] * 5 + ["buffer"]), "holds only train, buffer"),
        (tmp_path / "folder", "does not exist"),
    ):
        code, _, err = canopy_audit(path)
        assert code == 1
        assert len(err.splitlines()) == 1
        assert said in err
    for wrong in (-1.0, math.nan, math.inf):
        with pytest.raises((AuditError, CanopyError, ValueError)):
            audit_pair(*two(tmp_path, FAR, AWAY), buffer_m=wrong)

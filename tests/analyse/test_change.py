"""Change between two maps, against whole arrays; what is refused; what the files say."""

import hashlib
import json
import threading
import time
from xml.etree import ElementTree as ET

import geopandas as gpd
import numpy as np
import pytest
import rasterio
from affine import Affine
from geopandas.testing import assert_geodataframe_equal
from pyproj import CRS
from rio_cogeo.cogeo import cog_validate
from shapely.geometry import box
from skimage.measure import label
from typer.testing import CliRunner

from canopy.analyse.change import NAMES, change_maps
from canopy.cli import app
from canopy.errors import AnalysisError, CanopyError, OutputError
from canopy.grid import Grid
from canopy.model.blocks import mean_interval
from canopy.raster import read_raster, write_raster
from canopy.score.maps import GivenMap
from tests.finished_maps import BLOCKS, CRS_M, GSD_M, LEFT_M, TOP_M, grid, write_map

SHAPE = (60, 70)
MIN_AREA_M2 = 6.0
LINEAGE = {"sites": [], "footprints_deg": [], "tile_sets": {}}
MODEL = {"name": "made", "version": "1", "weights_sha256": "0" * 64, "training": LINEAGE}


def say(folder, **changes):
    """Put words into the record of a map."""
    path = folder / "run.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"models": [MODEL], "tta": "none"} | changes))


def heights(seed=0):
    rng = np.random.default_rng(seed)
    before_m = np.round(rng.uniform(10, 30, SHAPE) * 32) / 32
    after_m = before_m + np.round(rng.normal(0, 1, SHAPE) * 32) / 32
    after_m[5:25, 10:14] -= 9
    after_m[25, 14] -= 9  # touches it at a corner
    after_m[40:44, 30:60] += 12
    after_m[50, 5] -= 9
    before_m[rng.random(SHAPE) < 0.02] = np.nan
    after_m[rng.random(SHAPE) < 0.02] = np.nan
    return before_m.astype(np.float32), after_m.astype(np.float32)


@pytest.fixture(scope="module")
def maps(tmp_path_factory):
    """Two finished maps on one lattice whose extents differ, of two dates."""
    folder = tmp_path_factory.mktemp("maps")
    before_m, after_m = heights()
    half_m = np.round((1.5 + np.arange(SHAPE[1]) / 60) * 32).astype(np.float32)[None] / 32 * np.ones(SHAPE, np.float32)
    write_map(folder / "before", before_m, half_width_m=half_m)
    write_map(folder / "after", after_m[2:, 3:], where=grid((58, 67), row=2, col=3), half_width_m=2.0)
    for name in ("before", "after"):
        say(folder / name)
    return folder


def given(maps):
    return GivenMap(path=maps / "before", date="2020-07-01"), GivenMap(path=maps / "after", date="2023-07-01")


@pytest.fixture(scope="module")
def changed(maps):
    return change_maps(*given(maps), out=maps / "change", min_area_m2=MIN_AREA_M2, strip_px=16)


@pytest.fixture(scope="module")
def expected(maps):
    """Change and the ends of its interval, over what both maps have, by whole arrays."""
    (h_a,), (_, l_a, u_a) = (read_raster(maps / "before" / name)[0].data[:, 2:, 3:] for name in ("height.tif", "error.tif"))
    (h_b,), (_, l_b, u_b) = (read_raster(maps / "after" / name)[0].data for name in ("height.tif", "error.tif"))
    change = h_b.astype(float) - h_a
    lower, upper = change - np.hypot(h_b - l_b, u_a - h_a), change + np.hypot(u_b - h_b, h_a - l_a)
    return np.stack([change, np.floor(lower * 32) / 32, np.ceil(upper * 32) / 32])


def classes_of(bands, least_px):
    kind = np.where(bands[2] < 0, 1, np.where(bands[1] > 0, 3, 2))
    kind[np.isnan(bands[0])] = 0
    for one in (1, 3):
        labels = label(kind == one, connectivity=2)
        kind[(np.bincount(labels.ravel()) < least_px)[labels] & (kind == one)] = 2
    return kind


def test_difference_and_interval_are_those_of_whole_arrays(changed, expected):
    pixels, where = read_raster(changed.folder / "change.tif")
    np.testing.assert_array_equal(pixels.data, expected.astype(np.float32))
    assert where.bounds == pytest.approx((LEFT_M + 3 * GSD_M, TOP_M - 60 * GSD_M, LEFT_M + 70 * GSD_M, TOP_M - 2 * GSD_M))
    assert np.isnan(pixels.data[0]).any()


def test_classes_are_those_of_whole_arrays(changed, expected):
    least_px = 17  # 6 m² of 0.36 m²
    kind = read_raster(changed.folder / "classes.tif")[0].data[0]
    np.testing.assert_array_equal(kind, classes_of(expected, least_px))
    assert set(np.unique(kind)) == {0, 1, 2, 3}
    assert (classes_of(expected, 1) != kind).any(), "the sieve takes something"
    area_ha = {value: (kind == value).sum() * GSD_M**2 / 1e4 for value in range(4)}
    summary = changed.summary
    told = [summary.unknown_ha, summary.loss.area_ha, summary.no_detectable_change_ha, summary.gain.area_ha]
    assert told == pytest.approx(list(area_ha.values()))
    left_out = (classes_of(expected, 1) != kind).sum() * GSD_M**2 / 1e4
    assert summary.loss.left_out_ha + summary.gain.left_out_ha == pytest.approx(left_out)


def test_polygons_are_the_components_of_the_classes(changed, maps):
    kind, where = read_raster(changed.folder / "classes.tif")
    kind = kind.data[0]
    table = gpd.read_file(changed.folder / "changes.gpkg")
    assert table.crs == CRS_M
    assert set(table["class"]) == {"loss", "gain"}
    assert len(table) == changed.summary.loss.polygons + changed.summary.gain.polygons
    h_a = read_raster(maps / "before" / "height.tif")[0].data[0, 2:, 3:]
    h_b = read_raster(maps / "after" / "height.tif")[0].data[0]
    seen = np.zeros(kind.shape, int)
    for _, polygon in table.iterrows():
        there = inside(polygon.geometry, where)
        seen += there
        assert (kind[there] == {"loss": 1, "gain": 3}[polygon["class"]]).all()
        assert polygon.area_m2 == pytest.approx(there.sum() * GSD_M**2)
        assert polygon.geometry.area == pytest.approx(polygon.area_m2)
        assert polygon.mean_change_m == pytest.approx(h_b[there].mean(dtype=float) - h_a[there].mean(dtype=float))
        assert polygon.change_per_year_m == pytest.approx(polygon.mean_change_m / 3, rel=2e-3)
        assert (polygon.date_before, polygon.date_after) == ("2020-07-01", "2023-07-01")
        assert polygon.mean_change_lower_90_m < polygon.mean_change_m < polygon.mean_change_upper_90_m
    np.testing.assert_array_equal(seen == 1, np.isin(kind, (1, 3)))


def inside(geometry, where):
    from shapely import contains_xy

    rows, cols = np.indices(where.shape) + 0.5
    return contains_xy(geometry, *where.xy(cols, rows))


def test_means_over_ground_have_the_interval_of_means(tmp_path):
    before_m = np.full((40, 40), 30.0, np.float32)
    after_m = np.full((40, 40), 5.0, np.float32)
    for name, height_m in (("a", before_m), ("b", after_m)):
        write_map(tmp_path / name, height_m, half_width_m=3.0)
        say(tmp_path / name)
    result = change_maps(tmp_path / "a", tmp_path / "b", out=tmp_path / "out")
    polygon = gpd.read_file(tmp_path / "out" / "changes.gpkg").iloc[0]
    area_m2 = 1600 * GSD_M**2
    (l_a, u_a), (l_b, u_b) = (mean_interval(height, 3.0, area_m2, BLOCKS) for height in (30.0, 5.0))
    lower, upper = -25 - np.hypot(5 - l_b, u_a - 30), -25 + np.hypot(u_b - 5, 30 - l_a)
    mean = result.summary.mean_change
    assert (mean.mean_m, mean.lower_90_m, mean.upper_90_m) == pytest.approx((-25, lower, upper))
    assert mean.interval_from == polygon.interval_from == "squares of ground"
    # Picked by its pixels, so at least theirs.
    assert polygon.mean_change_lower_90_m == pytest.approx(min(lower, -25 - np.hypot(3, 3)))
    assert polygon.mean_change_upper_90_m == pytest.approx(max(upper, -25 + np.hypot(3, 3)))
    assert polygon.change_to_error == pytest.approx(25 / (polygon.mean_change_upper_90_m + 25))
    assert result.summary.loss.area_ha == pytest.approx(area_m2 / 1e4)
    assert result.summary.years is None
    assert np.isnan(polygon.change_per_year_m)


def digests(folder):
    return {name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in NAMES}


def test_neither_strips_nor_repetition_change_a_file(maps, changed):
    again = [
        change_maps(*given(maps), out=maps / f"again{strip_px}", min_area_m2=MIN_AREA_M2, strip_px=strip_px)
        for strip_px in (16, 7)
    ]
    assert digests(again[0].folder) == digests(changed.folder)
    for other in again[1:]:
        table, known = (gpd.read_file(each.folder / "changes.gpkg") for each in (other, changed))
        assert_geodataframe_equal(table, known)
        assert digests(other.folder)["change.tif"] == digests(changed.folder)["change.tif"]
        assert digests(other.folder)["classes.tif"] == digests(changed.folder)["classes.tif"]


def test_the_files_are_what_they_are_said_to_be(changed):
    assert sorted(path.name for path in changed.folder.iterdir()) == sorted(NAMES)
    for name in ("change.tif", "classes.tif"):
        assert cog_validate(changed.folder / name, strict=True, quiet=True)[0]
    with rasterio.open(changed.folder / "classes.tif") as file:
        assert file.dtypes == ("uint8",)
        assert file.colormap(1)[1] == (0xC0, 0x63, 0x1D, 255)
        assert file.descriptions == ("change",)
        names = [file.tags()[f"CANOPY_CLASS_{value}"] for value in range(4)]
    assert names == ["unknown", "loss", "no detectable change", "gain"]
    with rasterio.open(changed.folder / "change.tif") as file:
        assert file.descriptions == ("change_m", "lower_90_m", "upper_90_m")
        assert file.units == ("m", "m", "m")
        assert file.tags()["CANOPY_BEFORE_DATE"] == "2020-07-01"
        assert file.tags()["CANOPY_CHANGE_RULE"].startswith("root-sum-square: the errors of the two maps are independent or")
        assert str(changed.folder.parent) not in str(file.tags()), "no paths of this machine"
    for name, count in (("change.qml", 7), ("classes.qml", 4)):
        items = [e for e in ET.parse(changed.folder / name).iter() if e.tag in ("item", "paletteEntry")]
        assert len(items) == count
    assert len(list(ET.parse(changed.folder / "changes.qml").iter("category"))) == 2


def test_no_change_has_a_file_of_polygons_all_the_same(tmp_path):
    height_m = np.full((20, 20), 10.0, np.float32)
    for name, more in (("a", 0), ("b", 1)):
        write_map(tmp_path / name, height_m + more)
        say(tmp_path / name)
    result = change_maps(tmp_path / "a", tmp_path / "b", out=tmp_path / "out")
    table = gpd.read_file(tmp_path / "out" / "changes.gpkg")
    assert len(table) == 0
    assert {"class", "area_m2", "mean_change_m", "change_to_error"} <= set(table.columns)
    assert table.crs == CRS_M
    assert result.summary.line().startswith("loss 0.00 ha in 0 polygons")


# --- rasters -------------------------------------------------------------------------------------------------------------


def write_chm(path, height_m, *, crs=CRS_M, left=500_000.5, gsd_m=1.0):
    """A raster of heights that is no map by canopy, on pixels that do not start at a multiple of their size."""
    where = Grid(crs=CRS_M, transform=Affine(gsd_m, 0, left, 0, -gsd_m, 4_900_000.25), shape=height_m.shape)
    write_raster(path, height_m[None], grid=where, nodata=-9999.0)
    if crs is None:
        profile = {
            "driver": "GTiff",
            "width": height_m.shape[1],
            "height": height_m.shape[0],
            "count": 1,
            "dtype": "float32",
        }
        with rasterio.open(path, "w", transform=where.transform, **profile) as file:
            file.write(height_m, 1)
    return path


@pytest.fixture
def chms(tmp_path):
    before_m = np.full((50, 50), 20.0, np.float32)
    before_m[0, 0] = -9999
    after_m = before_m.copy()
    after_m[10:30, 10:30] = 14.0
    after_m[40:, :] += 1.5
    return [write_chm(tmp_path / f"{name}.tif", values) for name, values in (("a", before_m), ("b", after_m))]


def test_rasters_with_a_stated_error(chms, tmp_path):
    result = change_maps(*chms, out=tmp_path / "out", error_before_m=1.0, error_after_m=1.0)
    assert result.summary.rule == "sum"
    assert result.summary.loss.area_ha == pytest.approx(0.04)
    assert result.summary.gain.area_ha == 0
    assert result.summary.unknown_ha == pytest.approx(1e-4)
    polygon = gpd.read_file(tmp_path / "out" / "changes.gpkg").iloc[0]
    assert (polygon.mean_change_lower_90_m, polygon.mean_change_upper_90_m) == pytest.approx((-8, -4))
    assert polygon.geometry.equals(box(500_010.5, 4_899_970.25, 500_030.5, 4_899_990.25))
    assert polygon.interval_from == "pixels as if they all erred together"
    narrow = change_maps(*chms, out=tmp_path / "rss", error_before_m=1.0, error_after_m=1.0, rule="root-sum-square")
    assert narrow.summary.gain.area_ha == pytest.approx(0.05), "1.5 m is less than 2 m and more than 1.41 m"


def test_an_error_is_never_guessed(chms, tmp_path):
    with pytest.raises(AnalysisError, match=r"a.tif is a raster without intervals; say how wrong.* with --error-before"):
        change_maps(*chms, out=tmp_path / "out")
    with pytest.raises(AnalysisError, match=r"b.tif is a raster without intervals.* with --error-after"):
        change_maps(*chms, out=tmp_path / "out", error_before_m=1.0)
    with pytest.raises(AnalysisError, match="--error-before -1 m is no error"):
        change_maps(*chms, out=tmp_path / "out", error_before_m=-1.0, error_after_m=1.0)
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_stable_ground_says_how_wide_intervals_must_be(tmp_path):
    rng = np.random.default_rng(5)
    before_m = rng.uniform(10, 20, (120, 120)).astype(np.float32)
    after_m = before_m + rng.normal(0.5, 0.5, (120, 120)).astype(np.float32)
    after_m[80:100, 80:100] -= 4
    paths = [write_chm(tmp_path / f"{name}.tif", values) for name, values in (("a", before_m), ("b", after_m))]
    stable = tmp_path / "stable.gpkg"
    gpd.GeoDataFrame(geometry=[box(500_000.5, 4_899_930.25, 500_120.5, 4_900_000.25)], crs=CRS_M).to_file(stable)
    result = change_maps(*paths, out=tmp_path / "out", error_before_m=3.0, error_after_m=3.0, stable=stable)
    found = result.summary.stable
    assert found.pixels == 70 * 120
    assert found.mean_m == pytest.approx(0.5, abs=0.03)
    reach_m = 0.5 * 1.645
    assert found.lower_factor == pytest.approx((0.5 + reach_m) / 6, rel=0.05)
    assert found.upper_factor == pytest.approx((reach_m - 0.5) / 6, rel=0.05)
    assert result.summary.loss.area_ha == pytest.approx(0.04, rel=0.05)
    bands = read_raster(tmp_path / "out" / "change.tif")[0].data
    called = (bands[2] < 0) | (bands[1] > 0)
    assert 0.07 < called[70:80].mean() < 0.13, "nominal on ground like it"
    small = tmp_path / "small.gpkg"
    gpd.GeoDataFrame(geometry=[box(500_000.5, 4_899_990.25, 500_020.5, 4_900_000.25)], crs=CRS_M).to_file(small)
    with pytest.raises(AnalysisError, match="holds 200 pixels known in both maps, 2000 are needed"):
        change_maps(*paths, out=tmp_path / "few", error_before_m=3.0, error_after_m=3.0, stable=small)


def test_a_raster_without_crs_needs_one(tmp_path):
    paths = [write_chm(tmp_path / f"{name}.tif", np.full((8, 8), 9.0, np.float32), crs=None) for name in "ab"]
    settings = {"out": tmp_path / "out", "error_before_m": 1.0, "error_after_m": 1.0}
    with pytest.raises(AnalysisError, match=r"a.tif has no CRS.*; name it with --crs"):
        change_maps(*paths, **settings)
    with pytest.raises(AnalysisError, match="'EPSG:0' is no CRS"):
        change_maps(*paths, crs="EPSG:0", **settings)
    assert change_maps(*paths, crs="EPSG:32610", **settings).summary.crs == "EPSG:32610"


@pytest.mark.slow
def test_the_forest_of_cauaxi_lost_what_was_logged(samples, tmp_path):
    before, after = (samples / "reference" / "brazil_chm_no_crs" / f"ALS_CHM_CAU_{year}.tif" for year in (2012, 2014))
    result = change_maps(
        GivenMap(path=before, date="2012"), GivenMap(path=after, date="2014"), crs="EPSG:32722", out=tmp_path / "out",
        error_before_m=3.0, error_after_m=3.0, min_area_m2=200.0,
    )  # fmt: skip
    assert 0.8 < result.summary.loss.area_ha < 1.6
    assert result.summary.gain.area_ha < 0.25 * result.summary.loss.area_ha
    table = gpd.read_file(tmp_path / "out" / "changes.gpkg")
    losses = table[table["class"] == "loss"]
    assert losses.mean_change_m.max() < -6
    assert losses.area_m2.max() < 5000, "gaps of single trees and skid trails, no clearing"
    assert result.summary.years == pytest.approx(2, abs=0.01)


# --- what is refused -----------------------------------------------------------------------------------------------------


@pytest.fixture
def two(tmp_path):
    """Two maps that may be compared."""
    for name in ("a", "b"):
        write_map(tmp_path / name, np.full((20, 20), 10.0, np.float32))
        say(tmp_path / name)
    return tmp_path


def refused(two, match, *, after="b", **settings):
    with pytest.raises(CanopyError, match=match):
        change_maps(two / "a", two / after, out=two / "out", **settings)
    assert not (two / "out").exists(), "nothing is left"


def test_two_maps_that_may_be_compared_are(two):
    """Negative control of the refusals below."""
    assert change_maps(two / "a", two / "b", out=two / "out").summary.different_models is None


def test_a_map_with_itself(two):
    refused(two, "is the same map as", after="a")
    refused(two, "is the same map as", after="a/height.tif")
    (two / "c").symlink_to(two / "a")
    refused(two, "is the same map as", after="c")
    for name in ("a", "b"):
        say(two / name, plan={"identity": "1"})
    refused(two, "is a map of the same imagery by the same model as")


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"models": [MODEL | {"weights_sha256": "1" * 64}]}, "by made 1, the other by made 1 with other weights"),
        ({"models": [MODEL, MODEL]}, "one is by made 1, the other by made 1, made 1"),
        ({"tta": "flips"}, "test-time augmentation none, the other with flips"),
        ({"intervals": "other"}, "of different calibration tables"),
    ],
)
def test_different_models(two, change, match):
    if change.get("intervals") == "other":
        intervals = json.loads((two / "b" / "run.json").read_text())["intervals"]
        change = {"intervals": intervals | {"tile_sets": {"more": "2" * 64}}}
    say(two / "b", **change)
    refused(two, match)


def test_different_models_on_demand(two):
    say(two / "b", tta="flips")
    result = change_maps(two / "a", two / "b", out=two / "out", allow_different_models=True)
    assert result.summary.different_models is not None
    assert result.summary.rule == "sum"
    with rasterio.open(two / "out" / "change.tif") as file:
        assert file.tags()["CANOPY_DIFFERENT_MODELS"] == result.summary.different_models
    assert any("not of one model" in line for line in result.summary.lines())


@pytest.mark.slow
def test_a_map_unlike_the_calibration_data_is_told(two):
    told = {"reference": "", "measured": True, "sheets_measured": 1, "sheets_flagged": 1, "sheets": 1, "worst": "r0_c0"}
    say(two / "b", shift=told)
    summary = change_maps(two / "a", two / "b", out=two / "out").summary
    assert summary.before.shift is None
    assert any(line.startswith(f"{two / 'b'}: the map looks unlike the calibration data") for line in summary.lines())


def test_a_map_whose_lineage_is_lost(two):
    (two / "b" / "run.json").unlink()
    refused(two, "uncalibrated")
    write_map(two / "c", np.full((20, 20), 9.0, np.float32), tags={"CANOPY_CALIBRATION": "split-conformal"})
    (two / "c" / "run.json").unlink()
    refused(two, "by no model|by made 1, the other by no model", after="c")


def test_an_uncalibrated_map(two):
    write_map(two / "c", np.full((20, 20), 9.0, np.float32), half_width_m=None)
    say(two / "c")
    refused(
        two, "is uncalibrated, so its intervals promise nothing; say .* --error-after.* or calibrate the model", after="c"
    )
    result = change_maps(two / "a", two / "c", out=two / "out", error_after_m=2.0)
    assert result.summary.after.intervals == "stated: ± 2 m"
    assert result.summary.rule == "sum"
    refused_twice = two / "twice"
    with pytest.raises(AnalysisError, match="whose pixels have intervals; leave it out"):
        change_maps(two / "a", two / "b", out=refused_twice, error_after_m=2.0)


def test_pixels_that_are_not_the_same(two):
    height_m = np.full((20, 20), 9.0, np.float32)
    half = Grid(crs=CRS_M, transform=grid((20, 20)).transform @ Affine.translation(0.5, 0), shape=(20, 20))
    zone = Grid(crs=CRS.from_epsg(32611), transform=half.transform, shape=(20, 20))
    for name, where, match in (
        ("moved", half, "moved by 0.5 px along and 0 px across"),
        ("coarse", grid((10, 10), gsd_m=1.2), "they have 1.2 m, not 0.6 m"),
        ("elsewhere", zone, "they are in EPSG:32611, not EPSG:32610"),
    ):
        write_map(two / name, height_m[: where.shape[0], : where.shape[1]], where=where)
        say(two / name)
        refused(two, match, after=name)


@pytest.mark.slow
def test_pixels_that_are_not_the_same_on_demand(two):
    height_m = np.full((20, 20), 9.0, np.float32)
    half = Grid(crs=CRS_M, transform=grid((20, 20)).transform @ Affine.translation(0.5, 0), shape=(20, 20))
    for name, where in (("moved", half), ("coarse", grid((10, 10), gsd_m=1.2))):
        write_map(two / name, height_m[: where.shape[0], : where.shape[1]], where=where)
        say(two / name)
    result = change_maps(two / "a", two / "coarse", out=two / "out", resample=True)
    assert result.summary.gsd_m == pytest.approx(1.2)
    assert "2 x 2 pixels" in result.summary.resampled
    assert result.summary.mean_change.mean_m == pytest.approx(-1)
    moved = change_maps(two / "a", two / "moved", out=two / "out2", resample=True)
    assert moved.summary.mean_change.mean_m == pytest.approx(-1)
    with rasterio.open(two / "out2" / "classes.tif") as file:
        assert file.tags()["CANOPY_RESAMPLED"] == moved.summary.resampled


def test_maps_without_ground_in_common(two):
    write_map(two / "c", np.full((20, 20), 9.0, np.float32), where=grid((20, 20), row=500))
    say(two / "c")
    refused(two, "have no ground in common", after="c")


def test_the_later_map_first(two):
    with pytest.raises(AnalysisError, match=r"of 2019 is older than .* of 2021; give the earlier map first"):
        change_maps(GivenMap(path=two / "a", date="2021"), GivenMap(path=two / "b", date="2019"), out=two / "out")


def test_wrong_settings(two):
    refused(two, "--min-area -1 m² is no area", min_area_m2=-1.0)
    refused(two, "combined by 'mean'", rule="mean")


# --- files ---------------------------------------------------------------------------------------------------------------


def test_files_are_not_written_over_unasked(two):
    change_maps(two / "a", two / "b", out=two / "out")
    before = digests(two / "out")
    with pytest.raises(OutputError, match=r"change.tif exists; choose another folder or pass --overwrite"):
        change_maps(two / "a", two / "b", out=two / "out", min_area_m2=1)
    assert digests(two / "out") == before
    change_maps(two / "a", two / "b", out=two / "out", min_area_m2=1, overwrite=True)
    assert digests(two / "out") != before


def test_what_fails_leaves_nothing(two, monkeypatch):
    keep = two / "out"
    keep.mkdir()
    (keep / "mine.txt").write_text("")
    monkeypatch.setattr(
        "canopy.analyse.change.write_class_cog", lambda *_a, **_k: (_ for _ in ()).throw(OutputError("full"))
    )
    with pytest.raises(OutputError, match="full"):
        change_maps(two / "a", two / "b", out=keep)
    assert [path.name for path in keep.iterdir()] == ["mine.txt"]


@pytest.mark.slow
def test_a_full_disk_is_told(two, small_disk):
    disk = small_disk(120_000)
    with pytest.raises(CanopyError, match="free disk space or choose another"):
        change_maps(two / "a", two / "b", out=disk / "out")
    assert not (disk / "out").exists()


@pytest.mark.slow
def test_memory_does_not_grow_with_the_map(tmp_path):
    """A map of six times the rows, with as many patches and pixels of change a row; a first one warms up."""
    rng = np.random.default_rng(0)
    peaks, cols = [], 1024
    for rows in (512, 1024, 6144):
        before_m = np.round(rng.uniform(20, 30, (rows, cols)) * 32).astype(np.float32) / 32
        after_m = before_m.copy()
        after_m[rng.random((rows, cols)) < 0.02] -= 9
        patches = rng.random((rows // 16, cols // 16)) < 0.05
        after_m[np.kron(patches, np.ones((16, 16), bool))] -= 9
        for name, height_m in (("a", before_m), ("b", after_m)):
            write_map(tmp_path / f"{name}{rows}", height_m, half_width_m=2.0)
            say(tmp_path / f"{name}{rows}")
        del before_m, after_m
        folders = [tmp_path / f"{name}{rows}" for name in "abo"]
        peaks.append(peak_of(lambda folders=folders: change_maps(folders[0], folders[1], out=folders[2])))
    assert peaks[2] < peaks[1] * 1.25 + 10, peaks


def peak_of(work):
    """The most memory in MB that a call adds to what the process had."""
    status = lambda: int(next(line for line in open("/proc/self/status") if line.startswith("VmRSS")).split()[1]) / 1024  # noqa: E731, SIM115, PTH123
    base, most, done = status(), [0.0], threading.Event()

    def watch():
        while not done.is_set():
            most[0] = max(most[0], status() - base)
            time.sleep(0.005)

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        work()
    finally:
        done.set()
        watcher.join()
    return most[0]


# --- the command ---------------------------------------------------------------------------------------------------------


def test_the_command(chms, tmp_path):
    before, after = (str(path) for path in chms)
    words = ["change", f"{before},date=2012", f"{after},date=2014", "--out", str(tmp_path / "out"), "--min-area", "50"]
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 1
    assert "--error-before" in done.stderr
    words += ["--error-before", "1", "--error-after", "1"]
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 0, done.stderr
    assert done.stdout.startswith("loss 0.04 ha in 1 polygons, gain 0.00 ha")
    done = CliRunner().invoke(app, [*words, "--overwrite", "--json"])
    assert json.loads(done.stdout) == json.loads((tmp_path / "out" / "change.json").read_text())

"""Statistics over polygons, against sums over pixels and areas of intersections."""

import json
import shutil

import geopandas
import numpy as np
import pandas as pd
import pytest
import shapely
from typer.testing import CliRunner

from canopy.analyse import zonal
from canopy.analyse.gaps import gaps
from canopy.analyse.zonal import COLUMNS, write_zonal, zonal_statistics
from canopy.cli import app
from canopy.errors import AnalysisError, OutputError
from canopy.grid import Box
from canopy.model.blocks import mean_interval
from canopy.mosaicker.publish import ERROR_BANDS, HEIGHT_BANDS
from canopy.mosaicker.vrt import mosaic_vrt
from canopy.raster import read_raster, write_raster
from tests.finished_maps import BLOCKS, CRS_M, GSD_M, LEFT_M, TOP_M, grid, some_heights, write_map

SHAPE = (40, 50)


def on_map(polygon):
    """A polygon in pixel coordinates (col, row) on the map."""
    return shapely.transform(polygon, lambda xy: np.array([LEFT_M, TOP_M]) + xy * [GSD_M, -GSD_M])


PLACES = geopandas.GeoDataFrame(
    {"name": ["triangle", "holed", "two parts", "over the edge", "small", "elsewhere"], "Id": [7, 3, 5, 1, 9, 2]},
    geometry=[
        on_map(shapely.Polygon([(3.2, 1.7), (45.1, 8.4), (11.9, 36.3)])),
        on_map(shapely.Point(25, 20).buffer(17).difference(shapely.Point(26, 18).buffer(5))),
        on_map(shapely.union(shapely.box(2.5, 3.2, 9.7, 30), shapely.Point(40, 30).buffer(8))),
        on_map(shapely.box(-10.5, 30, 20.3, 60)),
        on_map(shapely.box(10.3, 10.2, 12.4, 12.9)),
        on_map(shapely.box(500, 500, 520, 520)),
    ],
    crs=CRS_M,
)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A map of known heights whose intervals differ from pixel to pixel."""
    height_m = some_heights(SHAPE)
    half_width_m = (np.arange(SHAPE[1], dtype=np.float32)[None] / 16 + 1) * np.ones(SHAPE, np.float32)
    return write_map(tmp_path_factory.mktemp("maps") / "map", height_m, half_width_m=half_width_m)


@pytest.fixture(scope="module")
def measured(made):
    return zonal_statistics(made, PLACES)


def weights(polygon):
    """The share of every pixel of the map that a polygon covers."""
    row, col = np.mgrid[: SHAPE[0], : SHAPE[1]]
    x, y = LEFT_M + col * GSD_M, TOP_M - row * GSD_M
    return shapely.area(shapely.intersection(shapely.box(x, y - GSD_M, x + GSD_M, y), polygon)) / GSD_M**2


def quantile(height_m, weight, level):
    order = np.argsort(height_m, kind="stable")
    reached = np.cumsum(weight[order])
    return height_m[order][np.searchsorted(reached, level * reached[-1] - 1e-6)]


def by_pixels(made, polygon, weight):
    """Every column, by sums over pixels."""
    height_m = read_raster(made.height)[0].data[0]
    half_width_m, lower_m, upper_m = read_raster(made.error)[0].data
    known = np.isfinite(height_m)
    area = weight[known].sum() * GSD_M**2
    gap = [gaps(h, below_m=2, least_m2=10, pixel_m2=GSD_M**2) for h in (height_m, upper_m, lower_m)]
    height_m, half_width_m, lower_m, upper_m, weight, *gap = (
        each[known] for each in (height_m, half_width_m, lower_m, upper_m, weight, *gap)
    )
    mean = np.average(height_m, weights=weight)
    ends = mean_interval(mean, np.average(half_width_m, weights=weight), area, BLOCKS)
    if area < 100:
        ends = (
            min(ends[0], np.average(lower_m, weights=weight)),
            max(ends[1], np.average(upper_m, weights=weight)),
        )
    there = weight > 0
    row = {"area_m2": polygon.area, "known_fraction": area / polygon.area, "mean_m": mean, "max_m": height_m[there].max()}
    row["mean_lower_90_m"], row["mean_upper_90_m"] = ends
    for name, level in (("p50", 0.5), ("p95", 0.95)):
        row[f"{name}_m"] = quantile(height_m, weight, level)
        row[f"{name}_lower_90_m"] = quantile(lower_m, weight, level)
        row[f"{name}_upper_90_m"] = quantile(upper_m, weight, level) if name == "p50" else upper_m[there].max()
    for above_m in (2, 5):
        for suffix, surface in (("", height_m), ("_lower_90", lower_m), ("_upper_90", upper_m)):
            row[f"cover_{above_m}m{suffix}"] = np.average(surface > above_m, weights=weight)
    for suffix, here in zip(("", "_lower_90", "_upper_90"), gap, strict=True):
        row[f"gap_fraction{suffix}"] = np.average(here, weights=weight)
    return row


@pytest.mark.parametrize("place", range(5))
def test_columns_are_sums_over_pixels(made, measured, place):
    polygon = PLACES.geometry[place]
    expected = by_pixels(made, polygon, weights(polygon))
    assert set(expected) == set(COLUMNS)
    for name in COLUMNS:
        assert measured[name][place] == pytest.approx(expected[name], rel=1e-5, abs=1e-6), name


def test_pixels_taken_whole_give_other_numbers(made, measured):
    """The check above can fail: counting every pixel that is touched, or whose centre is inside, is not good enough."""
    polygon = PLACES.geometry[0]
    share = weights(polygon)
    for whole in (share > 0, share > 0.5):
        other = by_pixels(made, polygon, whole.astype(float))
        assert abs(other["mean_m"] - measured["mean_m"][0]) > 1e-3


def test_own_columns_and_order_stay(measured):
    assert [*measured.columns] == ["name", "Id", "geometry", *COLUMNS]
    assert measured["Id"].tolist() == PLACES["Id"].tolist()
    assert measured.crs == PLACES.crs
    assert measured.geometry.geom_equals(PLACES.geometry).all()


def test_where_the_map_knows_nothing(measured):
    outside = measured.iloc[5]
    assert outside["known_fraction"] == 0
    assert outside["area_m2"] == pytest.approx(144)
    assert outside[[name for name in COLUMNS if name not in {"area_m2", "known_fraction"}]].isna().all()
    assert 0 < measured["known_fraction"][3] < 0.3


def test_a_large_polygon_in_parts_is_the_same(made, measured, monkeypatch):
    monkeypatch.setattr(zonal, "WINDOW_PX", 8)
    parts = zonal_statistics(made, PLACES)
    np.testing.assert_allclose(parts[[*COLUMNS]].to_numpy(), measured[[*COLUMNS]].to_numpy(), rtol=1e-9)


def test_the_other_polygons_do_not_matter(made, measured):
    alone = zonal_statistics(made, PLACES.iloc[[2]])
    assert alone[[*COLUMNS]].iloc[0].equals(measured[[*COLUMNS]].iloc[2])


def test_sheets_are_one_map(made, measured, tmp_path):
    folder = tmp_path / "sheets"
    folder.mkdir()
    shutil.copy(made.path / "run.json", folder)
    boxes = [Box(0, 0, 40, 17), Box(0, 17, 40, 50)]
    for kind, names in (("height", HEIGHT_BANDS), ("error", ERROR_BANDS)):
        pixels, _ = read_raster(made.path / f"{kind}.tif")
        for index, box in enumerate(boxes):
            part = pixels.data[:, :, box.col0 : box.col1]
            where = grid(box.shape, col=box.col0)
            write_raster(folder / f"{kind}{index}.tif", part, grid=where, nodata=np.nan, band_names=names)
        parts = [(box, folder / f"{kind}{index}.tif") for index, box in enumerate(boxes)]
        (folder / f"{kind}.vrt").write_bytes(mosaic_vrt(parts, grid(SHAPE), Box(0, 0, *SHAPE), names, {}))
    found = zonal_statistics(zonal.RegionFolder.open(folder), PLACES)
    assert found[[*COLUMNS]].equals(measured[[*COLUMNS]])


@pytest.mark.parametrize("crs", ["EPSG:4326", "EPSG:32611", "EPSG:3857"])
def test_any_crs(made, measured, crs):
    found = zonal_statistics(made, PLACES.to_crs(crs))
    assert found.crs == crs
    for name in ("area_m2", "known_fraction", "mean_m", "cover_5m", "mean_upper_90_m"):
        np.testing.assert_allclose(found[name], measured[name], rtol=2e-3, atol=1e-6)


# --- errors that are not known ------------------------------------------------------------------------------------------

BOUNDS = [name for name in COLUMNS if "_90" in name]
MEAN_BOUNDS = ["mean_lower_90_m", "mean_upper_90_m"]


def test_an_uncalibrated_map_has_no_errors(tmp_path, measured):
    found = zonal_statistics(write_map(tmp_path / "map", some_heights(SHAPE), half_width_m=None), PLACES)
    assert found[BOUNDS].isna().all(axis=None)
    assert found["mean_m"].equals(measured["mean_m"])


def test_no_table_of_blocks_no_interval_of_the_mean(tmp_path):
    found = zonal_statistics(write_map(tmp_path / "map", some_heights(SHAPE), blocks=None), PLACES)
    assert found[MEAN_BOUNDS].isna().all(axis=None)
    assert found[[name for name in BOUNDS if name not in MEAN_BOUNDS]][:5].notna().all(axis=None)


def test_ground_with_a_height_and_no_interval_has_no_bounds(tmp_path):
    half_width_m = np.full(SHAPE, 3, np.float32)
    half_width_m[20:22, 8:12] = np.nan
    found = zonal_statistics(write_map(tmp_path / "map", some_heights(SHAPE), half_width_m=half_width_m), PLACES)
    has = found[BOUNDS].notna().all(axis=1)
    assert has.tolist() == [False, False, False, True, True, False]
    assert found[BOUNDS].isna().all(axis=1)[:3].all()


def test_without_the_file_of_errors(tmp_path, measured):
    made = write_map(tmp_path / "map", some_heights(SHAPE))
    made.error.unlink()
    found = zonal_statistics(zonal.RegionFolder.open(made.path), PLACES)
    assert found[BOUNDS].isna().all(axis=None)
    assert found["p95_m"].equals(measured["p95_m"])


# --- what is refused ----------------------------------------------------------------------------------------------------


def with_third(geometry, places=PLACES):
    frame = places.copy()
    frame.geometry = [*places.geometry[:2], geometry, *places.geometry[3:]]
    return frame


BOW = on_map(shapely.Polygon([(1, 1), (9, 9), (9, 1), (1, 9)]))


@pytest.mark.parametrize(
    ("frame", "message"),
    [
        (with_third(shapely.Polygon()), "row 2 .* is empty"),
        (with_third(None), "row 2 .* is empty"),
        (with_third(on_map(shapely.Point(3, 3))), "row 2 .* is a Point"),
        (with_third(BOW), "row 2 .* is invalid .Self-intersection"),
        (PLACES.iloc[:0], "no polygon"),
        (PLACES.set_crs(None, allow_override=True), "no CRS"),
        (PLACES.rename(columns={"Id": "Mean_M"}), "column 'Mean_M' already; choose another --prefix"),
        (with_third(shapely.box(-33.1, 0, -33, 0.1), PLACES.to_crs("EPSG:4326")), "row 2 .* outside the domain"),
    ],
)
def test_what_cannot_be_measured_is_refused(made, frame, message):
    with pytest.raises(AnalysisError, match=message):
        zonal_statistics(made, frame)


def test_a_prefix_lets_clashing_columns_live(made):
    found = zonal_statistics(made, PLACES.rename(columns={"Id": "mean_m"}), prefix="canopy_")
    assert {"mean_m", "canopy_mean_m"} <= set(found.columns)


# --- the command -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", ["gpkg", "parquet", "geojson", "csv"])
def test_formats_hold_the_same_and_are_repeatable(made, measured, tmp_path, suffix):
    source = tmp_path / "places.gpkg"
    PLACES.to_file(source)
    out = tmp_path / f"out.{suffix}"
    summary = write_zonal(made.path, source, out)
    assert (summary.polygons, summary.outside, summary.without_bounds) == (6, 1, 0)
    read = {"parquet": geopandas.read_parquet, "csv": pd.read_csv}.get(suffix, geopandas.read_file)
    found = read(out)
    np.testing.assert_allclose(found[[*COLUMNS]].to_numpy(), measured[[*COLUMNS]].to_numpy(), rtol=1e-12)
    assert found["Id"].tolist() == PLACES["Id"].tolist()
    if suffix != "csv":
        assert found.crs == ("EPSG:4326" if suffix == "geojson" else CRS_M)
    before = out.read_bytes()
    with pytest.raises(OutputError, match="pass --overwrite"):
        write_zonal(made.path, source, out)
    write_zonal(made.path, source, out, overwrite=True)
    assert out.read_bytes() == before
    assert {path.name for path in tmp_path.iterdir()} == {"places.gpkg", out.name}


@pytest.mark.parametrize("suffix", ["gpkg", "geojson", "csv"])
def test_ids_beside_the_columns_stay(made, tmp_path, suffix):
    source, out = tmp_path / "places.gpkg", tmp_path / f"out.{suffix}"
    PLACES.assign(fid=[3, 7, 12, 40, 41, 90]).to_file(source)
    write_zonal(made.path, source, out)
    if suffix == "csv":
        ids = pd.read_csv(out)["fid"]
    else:
        found = geopandas.read_file(out, fid_as_index=True)
        ids = found.get("fid", found.index)
    assert [*ids] == [3, 7, 12, 40, 41, 90]


def test_the_command(made, tmp_path):
    source = tmp_path / "places.gpkg"
    PLACES.to_file(source, layer="a")
    PLACES.to_file(source, layer="b")
    runner = CliRunner()
    words = ["zonal", str(made.path), str(source), "--out", str(tmp_path / "out.csv")]
    failed = runner.invoke(app, words)
    assert failed.exit_code == 1
    assert "has the layers a, b; choose one with --layer" in failed.stderr
    done = runner.invoke(app, [*words, "--layer", "b", "--json"])
    assert done.exit_code == 0, done.output
    told = json.loads(done.stdout)
    assert told["polygons"] == 6
    assert set(told["columns"]) == set(COLUMNS)


@pytest.mark.parametrize(
    ("source", "out", "message"),
    [
        ("none.gpkg", "out.gpkg", "none.gpkg does not exist"),
        ("words.geojson", "out.gpkg", "words.geojson cannot be read"),
        ("plain.parquet", "out.gpkg", "plain.parquet cannot be read"),
        ("places.gpkg", "out.shp", "choose a name that ends in .gpkg"),
        ("places.gpkg", "no/out.gpkg", "does not exist; make it first"),
    ],
)
def test_files_that_do_not_do(made, tmp_path, source, out, message):
    PLACES.to_file(tmp_path / "places.gpkg")
    (tmp_path / "words.geojson").write_text("words")
    PLACES.drop(columns="geometry").to_parquet(tmp_path / "plain.parquet")
    with pytest.raises((AnalysisError, OutputError), match=message):
        write_zonal(made.path, tmp_path / source, tmp_path / out)
    assert not (tmp_path / out).exists()

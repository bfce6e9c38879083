"""Field plots: the same plots from every kind of file, units, and whatever can be wrong with a table."""

from datetime import date

import geopandas
import numpy as np
import pandas as pd
import pytest
import shapely
from affine import Affine
from pydantic import ValidationError
from pyproj import CRS

from canopy.errors import SourceError
from canopy.grid import Grid
from canopy.raster import write_raster
from canopy.score import sieve
from canopy.score.footprint import sample_footprints
from canopy.score.plots import NO_PLACE, PlotSettings, read_plots

UTM = CRS.from_epsg(32610)
X, Y = np.array([500_020.0, 500_060.0, 500_100.0]), np.array([4_900_050.0, 4_900_060.0, 4_900_070.0])
HEIGHT_M = np.array([21.5, 0.0, 33.0])
SETTINGS = PlotSettings(height_column="top", statistic="p95", radius_m=10)


def table(**more):
    columns = {"plot": ["A", "B", "C"], "top": HEIGHT_M, "r": [8.0, 10.0, 12.5], "day": ["2019-07-01", "2020-07-01", None]}
    return geopandas.GeoDataFrame({**columns, **more}, geometry=geopandas.points_from_xy(X, Y), crs=UTM)


def write(path, rows=None):
    rows = table() if rows is None else rows
    if path.suffix == ".csv":
        plain = pd.DataFrame(rows.drop(columns="geometry"))
        if rows.crs == UTM:
            plain.assign(x=rows.geometry.x, y=rows.geometry.y).to_csv(path, index=False)
        else:
            plain.assign(lon=rows.geometry.x, lat=rows.geometry.y).to_csv(path, index=False)
    elif path.suffix == ".parquet":
        rows.to_parquet(path)
    else:
        rows.to_file(path)
    return path


def csv(path, text):
    path.write_text(text)
    return path


# --- what a plot is


@pytest.mark.parametrize("name", ["p.gpkg", "p.geojson", "p.parquet", "xy.csv", "lonlat.csv", "p.shp"])
def test_every_kind_of_file_has_the_same_plots(tmp_path, name):
    rows = table().to_crs(4326) if name in {"p.geojson", "lonlat.csv"} else table()
    settings = SETTINGS.model_copy(update={"crs": "EPSG:32610"}) if name == "xy.csv" else SETTINGS
    settings = settings.model_copy(update={"id_column": "plot", "date_column": "day"})
    shots = read_plots(write(tmp_path / name, rows), settings)
    np.testing.assert_array_equal(shots.height_m, HEIGHT_M)
    lon, lat = shots.lonlat_deg
    np.testing.assert_allclose(lon, table().to_crs(4326).geometry.x, atol=1e-9)
    np.testing.assert_allclose(lat, table().to_crs(4326).geometry.y, atol=1e-9)
    assert list(shots.id) == ["A", "B", "C"]
    assert shots.date.astype(str).tolist() == ["2019-07-01", "2020-07-01", "NaT"]
    assert (shots.statistic, shots.shape, shots.tracks) == ("p95", "disc of 10 m radius", (name,))


def test_plots_on_a_map_by_hand(tmp_path):
    """A ramp that rises by 0.1 m a metre to the east: the mean of a disc is the height at its centre."""
    grid = Grid(crs=UTM, transform=Affine(1.0, 0, 500_000, 0, -1.0, 4_900_120), shape=(120, 140))
    ramp_m = np.broadcast_to(0.1 * (np.arange(140) + 0.5), grid.shape).astype(np.float32)
    write_raster(tmp_path / "map.tif", ramp_m[None], grid=grid, nodata=np.nan)
    path = write(tmp_path / "p.gpkg", table(top=[2.0, 6.0, 11.0]))
    means = sample_footprints(tmp_path / "map.tif", read_plots(path, SETTINGS.model_copy(update={"statistic": "mean"})))
    np.testing.assert_allclose(means.map_m, [2.0, 6.0, 10.0], atol=0.02)
    assert means.heights().bias_m == pytest.approx(-1 / 3, abs=0.02)
    tops = sample_footprints(tmp_path / "map.tif", read_plots(path, SETTINGS.model_copy(update={"statistic": "max"})))
    np.testing.assert_allclose(tops.map_m, [2.95, 6.95, 10.95], atol=0.06)


def test_radii_of_a_column_and_units(tmp_path):
    path = write(tmp_path / "p.gpkg", table(top=HEIGHT_M / 0.3048))
    feet = {"height_column": "top", "statistic": "max", "height_unit_m": 0.3048}
    shots = read_plots(path, PlotSettings(**feet, radius_column="r"))
    np.testing.assert_allclose(shots.height_m, HEIGHT_M)
    np.testing.assert_array_equal(shots.radius_m, [8, 10, 12.5])
    assert shots.shape == "disc of 8 to 12.5 m radius"
    assert read_plots(path, PlotSettings(**feet, radius_column="r", radius_unit_m=0.3048)).radius_m[1] == 3.048
    # The control: taken for metres, the plots would have trees of 108 m; a little more and they are refused.
    assert read_plots(path, SETTINGS).height_m.max() > 100


def test_own_columns_of_coordinates(tmp_path):
    path = csv(tmp_path / "p.csv", "east,north,x,y,top\n500020,4900050,1,2,21.5\n")
    own = SETTINGS.model_copy(update={"x_column": "east", "y_column": "north", "crs": "EPSG:32610"})
    assert (read_plots(path, own).x[0], read_plots(path, own).id[0]) == (500020.0, "1")


def test_what_has_no_height_or_place_is_counted(tmp_path):
    path = csv(tmp_path / "p.csv", "lon,lat,top\n-123,44,\n,44,20\n-123,44,20\n")
    shots = read_plots(path, SETTINGS)
    assert shots.account() == f"of 3 shots: 1 {NO_PLACE}, 1 {sieve.NO_HEIGHT}; 1 left"
    assert list(shots.id) == ["3"]


def test_bounds_and_days_each_drop_their_plots(tmp_path):
    path = write(tmp_path / "p.gpkg")
    west, east = table().to_crs(4326).geometry.x[[0, 2]]
    part = SETTINGS.model_copy(update={"bounds_deg": (west - 1e-4, 40.0, east - 1e-4, 50.0)})
    shots = read_plots(path, part)
    assert (len(shots), shots.dropped[sieve.OUTSIDE_AREA]) == (2, 1)
    late = SETTINGS.model_copy(update={"since": date(2020, 1, 1), "date_column": "day"})
    shots = read_plots(path, late)
    assert (len(shots), shots.dropped[sieve.OUTSIDE_DATES]) == (1, 2)  # an unknown day is not known to be late enough
    assert len(read_plots(path, SETTINGS)) == 3


# --- what can be wrong


@pytest.mark.parametrize(
    ("text", "more", "message"),
    [
        ("x,y,top\n500020,4900050,20\n", {}, "has no CRS, .*; give crs, for example EPSG:32610"),
        ("x,y,top\n500020,4900050,20\n", {"crs": "EPSG:99999"}, "crs 'EPSG:99999' is not known to PROJ"),
        ("lon,lat,top\n-123,44,20\n", {"crs": "EPSG:32610"}, "is in 'WGS 84', not in EPSG:32610; leave crs out"),
        ("lon,lat,top\n500020,4900050,20\n", {}, "has places in lon and lat that are no degrees"),
        ("easting,northing,top\n1,2,20\n", {}, "has the columns easting, northing, top and none of x and y"),
        ("lon,lat,top_m\n-123,44,20\n", {}, "has no column 'top'; did you mean 'top_m'"),
        ("lon,lat,top\n-123,44,20\n", {"x_column": "e", "y_column": "n"}, "has no column 'e'"),
        ("lon,lat,top\n-123,44,tall\n", {}, "top of row 1 is 'tall', not a number"),
        ("lon,lat,top\n-123,44,20\n-123,44,21.5 m\n", {}, "top of row 2 is '21.5 m', not a number"),
        ("lon,lat,top\n-123,44,True\n", {}, "top of row 1 is 'True', not a number"),
        ("lon,lat,top\n-123,44,inf\n", {}, "top of row 1 is infinite"),
        ("lon,lat,top\n-123,44,-9999\n", {}, "is -9999 m, .*; leave unknown heights empty"),
        ("lon,lat,top\n-123,44,151\n", {}, "is 151 m, .*; heights in feet need height_unit_m = 0.3048"),
        ("lon,lat,top,r\n-123,44,20,0\n", {"radius_m": None, "radius_column": "r"}, "r of row 1 is 0 m; a plot's radius"),
        ("lon,lat,top,r\n-123,44,20,\n", {"radius_m": None, "radius_column": "r"}, "r of row 1 is nan m; a plot's radius"),
        ("lon,lat,top,r\n-123,44,20,900\n", {"radius_m": None, "radius_column": "r"}, "is 900 m; .* at most 500 m"),
        ("lon,lat,top,d\n-123,44,20,2019\n", {"date_column": "d"}, "d of row 1 is '2019', not a day; write days as"),
        ("lon,lat,top,d\n-123,44,20,1/7/2019\n", {"date_column": "d"}, "d of row 1 is '1/7/2019', not a day"),
        ("lon,lat,top\n-123,44,20\n", {"date_column": "day"}, "has no column 'day'"),
        ("lon,lat,top\n-123,44,20\n", {"id_column": "plot"}, "has no column 'plot'"),
        ("lon,lat,top\n", {}, "has no rows"),
        ("", {}, "cannot be read as CSV"),
        ('lon,lat,top\n"-123,44,20\n', {}, "cannot be read as CSV|has no rows"),
    ],
)  # fmt: skip
def test_whatever_is_wrong_with_a_table_is_said_in_one_line(tmp_path, text, more, message):
    with pytest.raises(SourceError, match=message) as caught:
        read_plots(csv(tmp_path / "p.csv", text), SETTINGS.model_copy(update=more))
    assert "\n" not in str(caught.value)


@pytest.mark.filterwarnings("ignore:.crs. was not provided")
def test_whatever_is_wrong_with_a_layer_is_said_in_one_line(tmp_path):
    discs = table().set_geometry(table().buffer(10))
    cases = {
        "missing.gpkg": (None, "does not exist"),
        "text.gpkg": (b"hello", "cannot be read as points"),
        "text.parquet": (b"hello", "cannot be read as points"),
        "discs.gpkg": (discs, "holds Polygon, not points; give the centres"),
        "empty.gpkg": (table().iloc[:0], "has no rows"),
        "nowhere.gpkg": (table().set_crs(None, allow_override=True), "has no CRS"),
        "bare.parquet": (None, "cannot be read as points|has no points"),
    }
    for name, (content, message) in cases.items():
        path = tmp_path / name
        if isinstance(content, bytes):
            path.write_bytes(content)
        elif content is not None:
            write(path, content)
        elif name == "bare.parquet":
            pd.DataFrame({"top": [1.0]}).to_parquet(path)
        with pytest.raises(SourceError, match=message) as caught:
            read_plots(path, SETTINGS)
        assert "\n" not in str(caught.value)


def test_plots_without_a_point_are_counted(tmp_path):
    rows = table()
    rows.loc[1, "geometry"] = shapely.Point()
    shots = read_plots(write(tmp_path / "p.gpkg", rows), SETTINGS)
    assert (len(shots), shots.dropped[NO_PLACE]) == (2, 1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"statistic": "lorey"}, "statistic 'lorey' is not known"), ({"statistic": "p120"}, "from p0 to p100"),
        ({"radius_column": "r"}, "radius_m or as radius_column, one of the two"),
        ({"radius_m": None}, "radius_m or as radius_column, one of the two"),
        ({"x_column": "e"}, "x_column and y_column both"), ({"since": "2020-01-01"}, "give date_column"),
        ({"height_unit_m": 0}, "greater than 0"), ({"radius_m": 501}, "less than or equal to 500"),
        ({"height": "top"}, "Extra inputs"),
    ],
)  # fmt: skip
def test_settings_that_cannot_be(change, message):
    with pytest.raises(ValidationError, match=message):
        PlotSettings(**{**SETTINGS.model_dump(), **change})


def test_the_statistic_must_be_named():
    """Lorey's height is no mean of a map: nobody may get one by default."""
    with pytest.raises(ValidationError, match=r"statistic\n  Field required"):
        PlotSettings(height_column="lorey", radius_m=10)

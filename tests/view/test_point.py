"""Values of places against what rasterio reads there, and statistics of polygons against those of `canopy zonal`."""

import geopandas
import numpy as np
import pytest
import rasterio
import shapely
from pyproj import Transformer

from canopy.analyse.zonal import zonal_statistics
from canopy.errors import ViewError
from canopy.region.folder import RegionFolder
from canopy.view import statistics
from canopy.view.statistics import TooLargeError, drawn_polygon, polygon_statistics
from tests.finished_maps import grid
from tests.view.conftest import FOOT_M, SHAPE, degrees

WHERE = grid(SHAPE)


def test_a_click_gives_what_rasterio_reads(scene, made):
    rng = np.random.default_rng(5)
    places = np.vstack([rng.uniform(0, SHAPE, (20, 2)), [(60.5, 140.5), (0.01, 0.01), (299.99, 339.99)]])
    to_map = Transformer.from_crs(4326, 32610, always_xy=True)
    with rasterio.open(made.out / "height.tif") as heights, rasterio.open(made.out / "error.tif") as errors:
        for row, col in places:
            lon, lat = degrees(WHERE, row, col)
            said, (x, y) = scene.point(lon, lat), to_map.transform(lon, lat)
            assert (said.row, said.col) == heights.index(x, y) == (int(row), int(col))
            (height,), bands = next(heights.sample([(x, y)])), next(errors.sample([(x, y)]))
            wanted = [None if np.isnan(value) else float(value) for value in (height, *bands)]
            assert [said.height_m, said.error_90_m, said.lower_90_m, said.upper_90_m] == wanted
            assert said.state == ("unknown" if np.isnan(height) else "known")
            assert (said.x, said.y) == pytest.approx((x, y), abs=1e-6)
            day = made.days[said.row, said.col]
            assert said.date == {0: None, 20200618: "2020-06-18", 20210703: "2021-07-03"}[day]
            if said.height_m is not None:
                reference_m = np.float32(made.reference_m[said.row, said.col] / FOOT_M) * FOOT_M
                assert said.reference_m == pytest.approx(reference_m, abs=1e-5)
    assert scene.point(*degrees(WHERE, 60.5, 140.5)).state == "unknown"


def test_a_place_off_the_map_is_outside(scene):
    for row, col in ((-0.5, 5), (300.5, 5), (5, 340.5)):
        said = scene.point(*degrees(WHERE, row, col))
        assert (said.state, said.height_m, said.row) == ("outside", None, None)
    assert scene.point(0, 90).state == "outside"


# --- polygons --------------------------------------------------------------------------------------------------------------


def on_map(*corners):
    return shapely.Polygon([degrees(WHERE, row, col) for row, col in corners])


TRIANGLE = on_map((10.3, 20.1), (250.7, 40.2), (120.2, 300.9))


def test_a_polygon_has_the_statistics_of_canopy_zonal(made):
    folder = RegionFolder.open(made.out)
    wanted = zonal_statistics(folder, geopandas.GeoDataFrame(geometry=[TRIANGLE], crs=4326)).iloc[0]
    said = polygon_statistics(folder, drawn_polygon(shapely.to_geojson(TRIANGLE).encode()))
    histogram = said.pop("histogram")
    assert said == {name: wanted[name] for name in wanted.index if name != "geometry"}
    assert said["mean_lower_90_m"] < said["mean_m"] < said["mean_upper_90_m"]
    assert sum(histogram["area_m2"]) == pytest.approx(said["known_fraction"] * said["area_m2"])
    assert len(histogram["edges_m"]) == len(histogram["area_m2"]) + 1
    edges_m, area_m2 = np.array(histogram["edges_m"]), np.array(histogram["area_m2"])
    assert (np.diff(edges_m) == 1).all()
    assert edges_m[0] == 0
    assert edges_m[-2] <= said["max_m"] < edges_m[-1]
    assert area_m2[edges_m[:-1] >= 5].sum() / area_m2.sum() == pytest.approx(said["cover_5m"], abs=0.01)


def test_where_nothing_is_known_nothing_is_said(made):
    said = polygon_statistics(RegionFolder.open(made.out), on_map((45, 105), (45, 170), (85, 140)))
    assert said["known_fraction"] == 0
    assert (said["mean_m"], said["p95_m"], said["histogram"]) == (None, None, {"edges_m": [], "area_m2": []})


@pytest.mark.parametrize(
    ("body", "said"),
    [
        (b"{", "no GeoJSON geometry"),
        (b"[]", "no GeoJSON geometry"),
        (b'"Polygon"', "no GeoJSON geometry"),
        (b'{"type": "Polygon"}', "no GeoJSON geometry"),
        (b'{"type": "Polygon", "coordinates": 3}', "no GeoJSON geometry"),
        (b'{"type": "Polygon", "coordinates": ["a"]}', "no GeoJSON geometry"),
        (b'{"type": "Polygon", "coordinates": [[[0, 0], [1, 1]]]}', "no GeoJSON geometry"),
        (b'{"type": "Polygon", "coordinates": [[[0, 0], [1, 1], [1, 0], [0, NaN]]]}', "no GeoJSON geometry"),
        (b'{"type": "Polygon", "coordinates": ' + b"[" * 5000 + b"]" * 5000 + b"}", "no GeoJSON geometry"),
        (b'{"type": "Polygon", "coordinates": []}', "is empty"),
        (b'{"type": "Point", "coordinates": [0, 0]}', "Point has no area"),
        (b'{"type": "Polygon", "coordinates": [[[0, 0], [1, 1], [1, 0], [0, 1], [0, 0]]]}', "not valid"),
        (b'{"type": "Polygon", "coordinates": [[[0, 0], [500000, 1], [1, 0], [0, 0]]]}', "leaves -180 to 180"),
    ],
)
def test_what_is_no_polygon_is_refused_in_a_line(body, said):
    with pytest.raises(ViewError, match=said) as refused:
        drawn_polygon(body)
    assert "\n" not in str(refused.value)


def test_too_large_a_polygon_is_refused_with_a_remedy(made, monkeypatch):
    circle = shapely.Point(0, 0).buffer(1, quad_segs=statistics.MAX_VERTICES)
    with pytest.raises(TooLargeError, match="40001 corners, more than 10000; use canopy zonal"):
        drawn_polygon(shapely.to_geojson(circle).encode())
    monkeypatch.setattr(statistics, "MAX_PIXELS", 1000)
    with pytest.raises(TooLargeError, match="million pixels, more than 0; draw a smaller one, or use canopy zonal"):
        polygon_statistics(RegionFolder.open(made.out), TRIANGLE)
    monkeypatch.setattr(statistics, "MAX_PIXELS", 300 * 340)
    world = drawn_polygon(
        b'{"type": "Polygon", "coordinates": [[[-124, 43], [-122, 43], [-122, 45], [-124, 45], [-124, 43]]]}'
    )
    assert polygon_statistics(RegionFolder.open(made.out), world)["max_m"] > 0, "only what lies on the map counts"

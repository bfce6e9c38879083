"""Maps asked for a statistic in footprints: values that are computed by hand, and geodesic distances as the oracle."""

import dataclasses

import numpy as np
import pytest
import shapely
from affine import Affine
from pyproj import CRS, Geod, Transformer

from canopy.errors import RasterError, SourceError
from canopy.grid import Box, Grid, Lattice
from canopy.metrics import HeightSums, block_bootstrap
from canopy.mosaicker.vrt import mosaic_vrt
from canopy.raster import write_raster
from canopy.score.footprint import (
    EDGE,
    OTHER,
    OUTCOMES,
    OUTSIDE,
    TOO_SMALL,
    UNKNOWN,
    WGS84,
    Shots,
    map_bounds_deg,
    on_same_shots,
    sample_footprints,
    statistic_name,
    statistic_of,
)

UTM = CRS.from_epsg(32610)
LATTICE = Lattice(crs=UTM, gsd_m=1.0)
BOX = Box(-4_900_200, 500_000, -4_900_000, 500_300)
GRID = LATTICE.grid(BOX)
RADIUS_M = 12.0


def write(path, height_m, grid=GRID, units=("m",), dtype=np.float32):
    write_raster(path, np.asarray(height_m, dtype)[None], grid=grid, nodata=np.nan, units=units)
    return path


def shots_at(x, y, crs=UTM, height_m=20.0, radius_m=RADIUS_M, statistic="p98", half_length_m=0.0, azimuth_deg=0.0):
    x, y = (np.array(axis, np.float64) for axis in np.broadcast_arrays(*np.atleast_1d(x, y)))
    count = len(x)

    def column(value):
        return np.broadcast_to(np.asarray(value, np.float64), (count,)).copy()

    return Shots(
        source="test", statistic=statistic, crs=crs, x=x, y=y, height_m=column(height_m), radius_m=column(radius_m),
        half_length_m=column(half_length_m), azimuth_deg=column(azimuth_deg),
        date=np.full(count, np.datetime64("2020-07-01"), "datetime64[D]"), id=np.arange(count).astype(str),
        track=np.zeros(count, np.intp), tracks=("one",), read=count, dropped={},
    )  # fmt: skip


def pixel_xy(row, col, grid=GRID):
    """The centre of a pixel."""
    return grid.xy(col + 0.5, row + 0.5)


def reason(result, shot=0):
    return OUTCOMES[result.outcome[shot]]


def rough(shape=BOX.shape, seed=3):
    """Heights no two of which are alike, so that any pixel too many or too few shows."""
    return np.random.default_rng(seed).uniform(0, 40, shape).astype(np.float32)


def oracle(grid, height_m, lon, lat, radius_m, crs=WGS84):
    """The heights of all pixels whose centre is within the radius by the geodesic on the ellipsoid."""
    rows, cols = np.indices(grid.shape)
    x, y = grid.xy(cols + 0.5, rows + 0.5)
    lons, lats = Transformer.from_crs(grid.crs, crs, always_xy=True).transform(x, y)
    _, _, distance_m = Geod(ellps="WGS84").inv(np.full_like(lons, lon), np.full_like(lats, lat), lons, lats)
    return np.asarray(height_m)[distance_m <= radius_m]


# --- by hand


def test_statistics_by_hand():
    heights = np.arange(101, dtype=np.float32)
    assert statistic_of(heights, "p98") == 98
    assert statistic_of(heights[:3], "p98") == pytest.approx(1.96)  # between the second and the third, linearly
    assert statistic_of(heights, "p0") == 0
    assert statistic_of(heights, "max") == 100
    assert statistic_of(heights, "mean") == 50
    assert [statistic_name(name) for name in ("max", "mean", "p98", "p50", "p92", "p91", "p83", "p12", "p99.5")] == [
        "maximum", "mean", "98th percentile", "50th percentile", "92nd percentile", "91st percentile", "83rd percentile",
        "12th percentile", "99.5th percentile",
    ]  # fmt: skip


@pytest.mark.parametrize("name", ["p101", "98", "median", "p", "p-3", "MAX"])
def test_unknown_statistics_are_refused(name):
    with pytest.raises(SourceError, match=r"is not known; give max, mean, or a percentile"):
        shots_at(0, 0, statistic=name)


def test_a_disc_of_two_pixels_radius_by_hand(tmp_path):
    """Of a 5 x 5 neighbourhood those 13 pixels count whose centre is within 2 m of the middle one's."""
    height_m = np.zeros(BOX.shape, np.float32)
    height_m[48:53, 98:103] = 1 + np.arange(25).reshape(5, 5)
    inside = [3, 7, 8, 9, 11, 12, 13, 14, 15, 17, 18, 19, 23]
    x, y = pixel_xy(50, 100)
    for statistic, expected in (("max", 23), ("mean", 13), ("p50", 13), ("p98", 19 + 0.76 * 4), ("p0", 3)):
        # p98 of 13 values lies at place 0.98 * 12 = 11.76: between 19 and 23. UTM here shrinks by 0.04 %, hence 2.001.
        result = sample_footprints(
            write(tmp_path / "map.tif", height_m), shots_at(x, y, radius_m=2.001, statistic=statistic)
        )
        assert result.pixels[0] == len(inside)
        assert result.map_m[0] == pytest.approx(expected, abs=1e-6)
        assert result.known_share[0] == 1
    # The control: a shot a pixel further has other heights in it.
    assert sample_footprints(tmp_path / "map.tif", shots_at(x + 1, y, radius_m=2.001, statistic="mean")).map_m[0] != 13


def test_analytic_discs(tmp_path):
    """Round stands of known height: the disc inside a stand has its height, one on bare ground has 0 m."""
    rows, cols = np.indices(BOX.shape)
    height_m = np.zeros(BOX.shape)
    stands = {(60, 60): 25.0, (60, 200): 8.0, (140, 130): 41.0}
    for (row, col), tall in stands.items():
        height_m[np.hypot(rows - row, cols - col) <= 20] = tall
    places = [*stands, (20, 20)]
    x, y = np.transpose([pixel_xy(*place) for place in places])
    truth = np.array([*stands.values(), 0.0])
    result = sample_footprints(write(tmp_path / "map.tif", height_m), shots_at(x, y, height_m=truth))
    np.testing.assert_array_equal(result.map_m, truth)
    sums = result.heights()
    assert (sums.n, sums.mae_m, sums.r2) == (4, 0.0, 1.0)
    # The control: the same shots 40 m off lose the stands.
    assert sample_footprints(tmp_path / "map.tif", result.shots, east_m=40.0).heights().mae_m == truth.mean()


def test_one_tall_tree_is_not_in_p98_but_in_the_maximum(tmp_path):
    height_m = np.full(BOX.shape, 10.0)
    height_m[100, 150] = 60.0
    path, at = write(tmp_path / "map.tif", height_m), pixel_xy(100, 150)
    assert sample_footprints(path, shots_at(*at)).map_m[0] == 10
    assert sample_footprints(path, shots_at(*at, statistic="max")).map_m[0] == 60


# --- metres on the ground, in any CRS


def turned(crs, x, y, gsd, shape=(120, 120), angle_deg=0.0):
    transform = Affine.translation(x, y) @ Affine.rotation(angle_deg) @ Affine.scale(gsd[0], -gsd[1])
    transform = transform @ Affine.translation(-shape[1] / 2, -shape[0] / 2)
    return Grid(crs=crs, transform=transform, shape=shape)


PLACES = {
    "UTM in the middle of its zone": (32610, -123.0, 44.0, (1.0, 1.0), 0),
    "UTM far outside of its zone": (32610, -130.0, 44.0, (1.0, 1.0), 0),
    "international feet": (2994, -123.0, 44.0, (3.28084, 3.28084), 0),
    "US survey feet": (2225, -122.0, 40.5, (3.0, 3.0), 0),
    "degrees at 60 N": (4326, 25.0, 60.0, (2e-5, 1e-5), 0),
    "web Mercator at 60 N": (3857, 25.0, 60.0, (2.0, 2.0), 0),
    "a turned grid": (32610, -123.0, 44.0, (1.0, 0.7), 31),
    "beside the antimeridian": (4326, 179.9999, -17.0, (1e-5, 1e-5), 0),
    "grads": (4807, 3.0, 46.5, (1.2e-5, 1e-5), 0),
}


@pytest.mark.parametrize("place", PLACES)
def test_distances_are_metres_on_the_ground(tmp_path, place):
    code, lon, lat, gsd, angle_deg = PLACES[place]
    crs = CRS.from_epsg(code)
    x, y = Transformer.from_crs(WGS84, crs, always_xy=True).transform(lon, lat)
    grid = turned(crs, x, y, gsd, angle_deg=angle_deg)
    height_m = rough(grid.shape)
    path = write(tmp_path / "map.tif", height_m, grid)
    # Not the middle of the grid, and not the centre of a pixel.
    lon, lat = lon + 3.1e-5, lat - 1.7e-5
    expected = oracle(grid, height_m, lon, lat, RADIUS_M)
    result = sample_footprints(path, shots_at(lon, lat, crs=WGS84))
    assert reason(result) == "compared"
    # A centre within a millimetre of the circle may fall on either side of it.
    assert abs(int(result.pixels[0]) - len(expected)) <= (1 if code == 4807 else 0)
    if result.pixels[0] == len(expected):
        assert result.map_m[0] == pytest.approx(np.percentile(expected, 98), abs=1e-4)
    # The control: metres taken for the units of the CRS would take in another number of pixels.
    naive = np.hypot(*(np.asarray(grid.xy(*(np.indices(grid.shape)[::-1] + 0.5))) - np.array([x, y])[:, None, None]))
    if place not in {"UTM in the middle of its zone", "a turned grid"}:
        assert (naive <= RADIUS_M).sum() != len(expected)


def test_a_shift_is_metres_on_the_ground_east_and_north(tmp_path):
    crs = CRS.from_epsg(3857)  # a metre on the ground is 2 units here
    x, y = Transformer.from_crs(WGS84, crs, always_xy=True).transform(25.0, 60.0)
    grid = turned(crs, x, y, (2.0, 2.0))
    path = write(tmp_path / "map.tif", rough(grid.shape), grid)
    lon, lat, _ = Geod(ellps="WGS84").fwd([25.0, 25.0], [60.0, 60.0], [90, 0], [15.0, 9.0])
    moved = sample_footprints(path, shots_at([25.0, 25.0], [60.0, 60.0], crs=WGS84), east_m=[15.0, 0.0], north_m=[0.0, 9.0])
    there = sample_footprints(path, shots_at(lon, lat, crs=WGS84))
    np.testing.assert_array_equal(moved.map_m, there.map_m)
    assert sample_footprints(path, shots_at([25.0], [60.0], crs=WGS84)).map_m[0] not in there.map_m


def test_a_segment_is_what_lies_within_the_radius_of_its_line(tmp_path):
    """A line of 80 m that runs north-east: the pixels within 7 m of it, by distance to its points."""
    height_m = rough()
    at = pixel_xy(100, 150)
    result = sample_footprints(
        write(tmp_path / "map.tif", height_m), shots_at(*at, radius_m=7.0, half_length_m=40.0, azimuth_deg=45.0)
    )
    scale = Geod(ellps="WGS84").inv(
        *Transformer.from_crs(UTM, WGS84, always_xy=True).transform(*at),
        *Transformer.from_crs(UTM, WGS84, always_xy=True).transform(at[0], at[1] + 1000),
    )
    metres, turn = scale[2] / 1000, np.radians(scale[0])  # grid north is not true north
    rows, cols = np.indices(BOX.shape)
    x, y = GRID.xy(cols + 0.5, rows + 0.5)
    half = 40 / metres * np.array([np.sin(np.radians(45) - turn), np.cos(np.radians(45) - turn)])
    line = shapely.LineString([at - half, at + half])
    near = int((shapely.distance(shapely.points(x, y), line) * metres <= 7.0).sum())
    assert abs(int(result.pixels[0]) - near) <= 2
    assert near == pytest.approx(80 * 14 + np.pi * 49, rel=0.05)
    # The control: the line the other way finds other pixels, as many.
    other = sample_footprints(tmp_path / "map.tif", shots_at(*at, radius_m=7.0, half_length_m=40.0, azimuth_deg=-45.0))
    assert other.map_m[0] != result.map_m[0]


# --- what is not known


def test_a_disc_over_the_edge_of_the_map(tmp_path):
    """Half of a disc whose centre is on the edge is beyond it; of one 11.4 m inside a sliver is."""
    path = write(tmp_path / "map.tif", rough())
    left, _, _, top = GRID.bounds
    result = sample_footprints(path, shots_at([left, left + 11.4, left + 13, left - 11.4, left - 200], top - 100.5))
    assert [reason(result, k) for k in range(5)] == [EDGE, "compared", "compared", EDGE, OUTSIDE]
    assert result.known_share[0] == pytest.approx(0.5, abs=0.01)
    assert result.known_share[1] < 1 == result.known_share[2]
    assert np.isnan(result.map_m[[0, 3, 4]]).all()
    assert result.dropped == {OUTSIDE: 1, EDGE: 2, UNKNOWN: 0, TOO_SMALL: 0, OTHER: 0}
    # The control: who asks for less gets the half disc.
    assert reason(sample_footprints(path, shots_at(left, top - 100.5), least_known=0.4)) == "compared"
    # Beyond its edge the map promises nothing, so nothing is missing there.
    assert result.heights().n_missing == 0


def test_a_map_that_knows_too_little_is_counted_and_missing(tmp_path):
    height_m = np.full(BOX.shape, 15.0)
    height_m[90:110, 100:148] = np.nan
    x, y = np.transpose([pixel_xy(100, 150), pixel_xy(100, 120), pixel_xy(100, 159)])
    path = write(tmp_path / "map.tif", height_m)
    result = sample_footprints(path, shots_at(x, y))
    assert [reason(result, k) for k in range(3)] == [UNKNOWN, UNKNOWN, "compared"]
    assert (result.heights().n, result.heights().n_missing) == (1, 2)
    assert result.account() == f"of 3 shots: 2 {UNKNOWN}; 1 compared"
    # Only what is known enters: 0.55 of the first disc is enough for whoever says so, and NaN is not 0 m.
    assert sample_footprints(path, shots_at(x[0], y[0]), least_known=0.5).map_m[0] == 15


def test_0_m_is_known(tmp_path):
    result = sample_footprints(write(tmp_path / "map.tif", np.zeros(BOX.shape)), shots_at(*pixel_xy(100, 100), height_m=3.0))
    assert (reason(result), result.map_m[0], result.heights().bias_m) == ("compared", 0.0, -3.0)


def test_a_disc_between_pixel_centres(tmp_path):
    grid = turned(UTM, 500_000, 4_900_000, (30.0, 30.0))
    x, y = grid.xy(60, 60)  # the corner of four pixels, 21 m from their centres
    path = write(tmp_path / "map.tif", rough(grid.shape), grid)
    assert reason(sample_footprints(path, shots_at(x, y))) == TOO_SMALL
    assert sample_footprints(path, shots_at(x, y, radius_m=22)).pixels[0] == 4


def test_shots_that_the_crs_of_the_map_does_not_reach(tmp_path):
    result = sample_footprints(write(tmp_path / "map.tif", rough()), shots_at([57.0, -123.0], [44.0, 91.0], crs=WGS84))
    assert [reason(result, k) for k in range(2)] == [OUTSIDE, OUTSIDE]
    assert result.heights().n == 0


@pytest.mark.parametrize("share", [0.0, -0.1, 1.1, float("nan")])
def test_a_least_share_that_is_none_is_refused(tmp_path, share):
    with pytest.raises(SourceError, match="least known share"):
        sample_footprints(write(tmp_path / "map.tif", rough()), shots_at(*pixel_xy(9, 9)), least_known=share)


# --- maps of other kinds


def test_units_of_the_map(tmp_path):
    at = pixel_xy(100, 100)
    feet = write(tmp_path / "feet.tif", np.full(BOX.shape, 100.0), units=("ft",))
    assert sample_footprints(feet, shots_at(*at)).map_m[0] == pytest.approx(30.48)
    assert sample_footprints(feet, shots_at(*at), height_unit_m=0.1).map_m[0] == pytest.approx(10.0)
    write_raster(tmp_path / "int.tif", np.full((1, *BOX.shape), 123, np.int16), grid=GRID, nodata=-1)
    with pytest.raises(RasterError, match="names no unit"):
        sample_footprints(tmp_path / "int.tif", shots_at(*at))
    assert sample_footprints(tmp_path / "int.tif", shots_at(*at), height_unit_m=0.1).map_m[0] == pytest.approx(12.3)


def test_sheets_as_a_vrt_are_one_map(tmp_path):
    """A disc on the border of two sheets gets its pixels from both."""
    height_m = rough()
    west, east = Box(BOX.row0, BOX.col0, BOX.row1, BOX.col0 + 150), Box(BOX.row0, BOX.col0 + 150, BOX.row1, BOX.col1)
    for name, box in (("w.tif", west), ("e.tif", east)):
        write(tmp_path / name, height_m[box.slices_in(BOX)], LATTICE.grid(box))
    parts = [(west, tmp_path / "w.tif"), (east, tmp_path / "e.tif")]
    (tmp_path / "height.vrt").write_bytes(mosaic_vrt(parts, GRID, BOX, ["height_m"], {}))
    shots = shots_at(*np.transpose([pixel_xy(100, 149), pixel_xy(50, 20)]))
    whole = sample_footprints(write(tmp_path / "map.tif", height_m), shots)
    np.testing.assert_array_equal(sample_footprints(tmp_path / "height.vrt", shots).map_m, whole.map_m)
    # The control: the western sheet alone has half of the first disc.
    assert [reason(sample_footprints(tmp_path / "w.tif", shots), k) for k in range(2)] == [EDGE, "compared"]


def test_a_shot_does_not_depend_on_the_others(tmp_path):
    """Read alone or among others, across the borders of tiles: the same numbers, in the order of the shots."""
    grid = LATTICE.grid(Box(-4_900_000, 500_000, -4_899_800, 501_200))
    path = write(tmp_path / "map.tif", rough(grid.shape), grid)
    rng = np.random.default_rng(5)
    row, col = rng.uniform(-20, 220, 60), np.r_[rng.uniform(-20, 1220, 58), 1023.5, 1024.2]
    shots = shots_at(*grid.xy(col, row))
    together = sample_footprints(path, shots)
    for k in range(0, len(shots), 7):
        alone = sample_footprints(path, shots_at(shots.x[k], shots.y[k]))
        np.testing.assert_array_equal(alone.map_m, together.map_m[[k]])
        np.testing.assert_array_equal(alone.outcome, together.outcome[[k]])
    assert set(together.outcome) == {0, 1, 2}


# --- scores


def compared(map_m, reference_m, x, y):
    shots = shots_at(x, y, height_m=reference_m)
    from canopy.score.footprint import FootprintResult

    count = len(shots)
    return FootprintResult(
        shots=shots, map_m=np.asarray(map_m, float), known_share=np.ones(count), pixels=np.full(count, 400),
        outcome=np.where(np.isnan(map_m), OUTCOMES.index(UNKNOWN), 0).astype(np.int8), least_known=0.9,
    )  # fmt: skip


def test_scores_classes_and_blocks_add_up():
    rng = np.random.default_rng(1)
    x, y = 500_000 + rng.uniform(0, 9000, 300), 4_900_000 + rng.uniform(0, 9000, 300)
    reference = rng.uniform(0, 35, 300)
    map_m = np.where(rng.random(300) < 0.1, np.nan, reference + rng.normal(1, 2, 300))
    result = compared(map_m, reference, x, y)
    sums, known = result.heights(), ~np.isnan(map_m)
    assert (sums.n, sums.n_missing) == (known.sum(), 300 - known.sum())
    assert sums.bias_m == pytest.approx((map_m - reference)[known].mean())
    assert result.classes((2.0, 10.0)).total.n == sums.n
    assert result.classes((2.0, 10.0)).classes[0].n == (reference[known] < 2).sum()
    blocks = result.blocks(1000.0)
    assert 80 <= len(blocks) <= 121
    total = sum(blocks, HeightSums())
    assert (total.n, total.n_missing) == (sums.n, sums.n_missing)
    assert total.rmse_m == pytest.approx(sums.rmse_m)
    low, high = block_bootstrap(blocks, generator=np.random.default_rng(0), resamples=200)[0].interval("bias_m")
    assert low < sums.bias_m < high


def test_squares_of_ground_are_squares_of_ground():
    """Shots of 25 m spacing at 60 N: a square of 1 km holds 40 by 40 of them, give or take its rim."""
    crs = CRS.from_epsg(32635)
    x0, y0 = Transformer.from_crs(WGS84, crs, always_xy=True).transform(25.0, 60.0)
    x, y = (a.ravel() for a in np.meshgrid(x0 + np.arange(0, 4000, 25.0), y0 + np.arange(0, 4000, 25.0)))
    index = compared(np.zeros(x.size), np.zeros(x.size), x, y)
    index = dataclasses.replace(index, shots=shots_at(x, y, crs=crs)).block_index(1000.0)
    _, counts = np.unique(index, axis=0, return_counts=True)
    assert np.sort(counts)[-5:].tolist() == pytest.approx([1600] * 5, abs=90)


def test_two_maps_are_compared_on_the_same_shots():
    x, y = np.array([500_000.0, 501_000, 502_000]), np.full(3, 4_900_000.0)
    first = compared([10.0, 20.0, np.nan], [10.0, 10.0, 10.0], x, y)
    second = dataclasses.replace(
        first, map_m=np.array([12.0, np.nan, 12.0]),
        outcome=np.array([0, OUTCOMES.index(EDGE), 0], np.int8),
    )  # fmt: skip
    one, two = on_same_shots(first, second)
    assert (one.heights().n, two.heights().n) == (1, 1)
    assert one.dropped[OTHER] == 1
    assert [OUTCOMES[k] for k in two.outcome] == ["compared", EDGE, OTHER]
    assert two.heights().bias_m == 2
    # The control: apart they are of different shots.
    assert first.heights().n == second.heights().n == 2
    with pytest.raises(AssertionError, match="different shots"):
        on_same_shots(first, compared([1.0], [1.0], [500_000.0], [4_900_000.0]))


def test_the_table_has_a_row_for_every_shot(tmp_path):
    table = compared([10.0, np.nan], [8.0, 9.0], [500_000.0, 500_100.0], [4_900_000.0, 4_900_000.0]).table()
    assert list(table["outcome"]) == ["compared", UNKNOWN]
    assert table["error_m"][0] == 2
    assert table.geometry.x[0] == pytest.approx(-123.0)
    table.to_file(tmp_path / "shots.gpkg")


def test_bounds_of_a_map_hold_its_footprints(tmp_path):
    west, south, east, north = map_bounds_deg(write(tmp_path / "map.tif", rough()), margin_m=50.0)
    to_deg = Transformer.from_crs(UTM, WGS84, always_xy=True)
    left, bottom, right, top = GRID.bounds
    for x, y in ((left - 40, bottom - 40), (right + 40, top + 40), (left - 40, top + 40)):
        lon, lat = to_deg.transform(x, y)
        assert west <= lon <= east
        assert south <= lat <= north
    assert not west <= to_deg.transform(left - 80, top)[0]


def test_a_footprint_that_is_an_area_is_a_mistake():
    with pytest.raises(AssertionError, match="out of range"):
        shots_at(0, 0, radius_m=501.0)
    with pytest.raises(AssertionError, match="not finite"):
        shots_at(0, 0, height_m=np.nan)

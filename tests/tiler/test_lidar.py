"""Clouds whose heights are known, in every unit they are delivered in, and real ones against people and producers."""

import struct
import tracemalloc
from dataclasses import replace

import laspy
import numpy as np
import pytest
import rasterio
from affine import Affine
from pyproj import CRS, Transformer
from scipy import ndimage
from scipy.spatial import cKDTree

from canopy import raster
from canopy.errors import LidarError
from canopy.grid import Grid, Lattice
from canopy.tiler.ground import membrane
from canopy.tiler.lidar import NON_VEGETATION_CLASSES, LidarOptions, ground_surface, lidar_to_chm

UTM = CRS.from_epsg(32610)
SIDE_M = 60.0
LEFT, BOTTOM = 494_000.0, 4_878_000.0
GRID = Grid(crs=UTM, transform=Affine(1.0, 0.0, LEFT, 0.0, -1.0, BOTTOM + SIDE_M), shape=(60, 60))
FOOT, SURVEY_FOOT = 0.3048, 1200 / 3937


# --- a wood of cones on a slope -------------------------------------------------------------------------------------------


def terrain_m(x, y):
    """A plane of 25 % and 10 %, so that a swapped axis shows, with a swell of 1 m."""
    return 120 + 0.25 * (x - LEFT) + 0.1 * (y - BOTTOM) + np.sin((x - LEFT) / 12) * np.cos((y - BOTTOM) / 15)


def cones(rng, count=14):
    """x, y, radius and height of trees, anywhere but near the edge."""
    return np.column_stack(
        [
            LEFT + rng.uniform(6, SIDE_M - 6, count),
            BOTTOM + rng.uniform(6, SIDE_M - 6, count),
            rng.uniform(1.5, 4, count),
            rng.uniform(5, 25, count),
        ]
    )


def wood(rng, *, per_m2=8.0):
    """x, y, z_m, class and true height above ground: every pulse hits the crown, half of those the ground below as well."""
    n = int(per_m2 * SIDE_M**2)
    # To the resolution of the files, or rounding would move points across pixel edges.
    x, y = (np.round(corner + rng.uniform(0, SIDE_M - 0.001, n), 4) for corner in (LEFT, BOTTOM))
    height = np.zeros(n)
    for tx, ty, radius, top in cones(rng):
        away = np.hypot(x - tx, y - ty) / radius
        height = np.maximum(height, np.where(away < 1, top * (1 - 0.7 * away), 0))
    through = np.flatnonzero((height > 0) & (rng.random(n) < 0.5))
    x, y, height = np.r_[x, x[through]], np.r_[y, y[through]], np.r_[height, np.zeros(through.size)]
    return x, y, terrain_m(x, y) + height, np.where(height > 0, 5, 2).astype(np.uint8), height


def write(path, x, y, z, classes=None, *, crs=UTM, point_format=6, withheld=None):
    header = laspy.LasHeader(point_format=point_format, version="1.4" if point_format >= 6 else "1.2")
    header.scales, header.offsets = [1e-4, 1e-4, 1e-4], np.floor([np.min(x), np.min(y), np.min(z)])
    if crs is not None:
        header.add_crs(crs)
    cloud = laspy.LasData(header)
    cloud.x, cloud.y, cloud.z = x, y, z
    cloud.classification = np.zeros(len(x), np.uint8) if classes is None else classes
    if withheld is not None:
        cloud.withheld = withheld
    cloud.write(path)
    return path


def highest(x, y, height, grid=GRID):
    """The oracle: the greatest of the true heights in each pixel."""
    cols, rows = ~grid.transform @ (x, y)
    out = np.full(grid.shape, -np.inf)
    np.maximum.at(out, (np.floor(rows).astype(int), np.floor(cols).astype(int)), height)
    return np.where(np.isfinite(out), out, np.nan)


@pytest.fixture
def rng():
    return np.random.default_rng(7)


# --- known heights ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("classed", "median_m", "p99_m"),
    [pytest.param(True, 0.01, 0.2, id="classes"), pytest.param(False, 0.1, 0.5, id="filter")],
)
def test_heights_of_a_known_wood(tmp_path, rng, classed, median_m, p99_m):
    x, y, z, classes, height = wood(rng)
    path = write(tmp_path / "wood.laz", x, y, z, classes if classed else None)
    chm = lidar_to_chm(path, GRID)
    assert chm.attrs["ground_method"] == ("classes 2 and 9" if classed else "progressive morphological filter")
    error = np.abs(chm.to_numpy() - highest(x, y, height))
    assert np.nanmax(highest(x, y, height)) > 15, "the wood must have trees to say anything"
    assert np.nanmedian(error) <= median_m
    assert np.nanpercentile(error, 99) <= p99_m


def test_result_says_where_and_what_it_is(tmp_path, rng):
    x, y, z, classes, _ = wood(rng)
    chm = lidar_to_chm(write(tmp_path / "wood.las", x, y, z, classes), GRID)
    assert (chm.dtype, chm.shape, chm.dims) == (np.float32, GRID.shape, ("y", "x"))
    assert CRS.from_user_input(chm.rio.crs).equals(UTM)
    assert chm.rio.transform() == GRID.transform
    assert chm.rio.bounds() == GRID.bounds
    assert chm.attrs["units"] == "m"
    assert chm.attrs["points_read"] == chm.attrs["points_used"] == x.size
    assert chm.attrs["density_per_m2"] == pytest.approx(x.size / SIDE_M**2)


def test_open_ground_is_zero_never_negative(tmp_path, rng):
    x, y, z, classes, height = wood(rng)
    z = z + rng.normal(0, 0.03, z.size)
    chm = lidar_to_chm(write(tmp_path / "wood.las", x, y, z, classes), GRID)
    bare = chm.to_numpy()[highest(x, y, height) == 0]
    assert bare.min() >= 0
    assert np.median(bare) < 0.08
    assert 0 < chm.attrs["points_negative_set_to_0"] < x.size


@pytest.mark.parametrize("slope", [0.0, 0.5, 1.0])
def test_filter_on_steep_ground(tmp_path, rng, slope):
    x, y, z, *_ = wood(rng)
    z = z + slope * (x - LEFT)
    surface = ground_surface(write(tmp_path / "steep.las", x, y, z), GRID)
    px, py = surface.x.to_numpy(), surface.y.to_numpy()
    truth = terrain_m(px[None], py[:, None]) + slope * (px[None] - LEFT)
    error = np.abs(surface.to_numpy() - truth)
    assert np.median(error) <= 0.1
    assert np.percentile(error, 95) <= 0.5


def test_without_the_filter_trees_are_ground(tmp_path, rng):
    x, y, z, classes, height = wood(rng)
    canopy_only = classes == 5
    alone = ndimage.binary_erosion(highest(x, y, height) > 3, iterations=1)
    # No ground under crowns: every cell there has canopy as its lowest return.
    keep = canopy_only | ~alone[np.floor(BOTTOM + SIDE_M - y).astype(int), np.floor(x - LEFT).astype(int)]
    path = write(tmp_path / "dense.las", x[keep], y[keep], z[keep])
    truth = terrain_m(*np.meshgrid(LEFT + np.arange(60) + 0.5, BOTTOM + SIDE_M - np.arange(60) - 0.5))
    filtered = np.abs(ground_surface(path, GRID).to_numpy() - truth)
    lowest = np.abs(ground_surface(path, GRID, options=LidarOptions(filter_slope=1e9)).to_numpy() - truth)
    assert np.percentile(filtered[alone], 95) <= 0.5
    assert np.median(lowest[alone]) > 2


# --- units and CRS ---------------------------------------------------------------------------------------------------------

UNITS = [
    pytest.param("EPSG:32610", 1.0, id="metres"),
    pytest.param("EPSG:2994", FOOT, id="international feet, no vertical CRS: z as x and y"),
    pytest.param("EPSG:2269", FOOT, id="Oregon north, international feet"),
    pytest.param("EPSG:2225", SURVEY_FOOT, id="US survey feet"),
    pytest.param("EPSG:2994+5703", 1.0, id="feet in the plane, metres in z"),
    pytest.param("EPSG:2994+6360", SURVEY_FOOT, id="international feet in the plane, US survey feet in z"),
    pytest.param("EPSG:32610+8228", FOOT, id="metres in the plane, feet in z"),
    pytest.param("EPSG:4326+5703", 1.0, id="longitude and latitude, metres in z"),
]


@pytest.mark.parametrize(("name", "z_unit_m"), UNITS)
def test_units_come_from_the_crs(tmp_path, rng, name, z_unit_m):
    x, y, z, classes, height = wood(rng)
    crs = CRS.from_user_input(name)
    horizontal = crs.sub_crs_list[0] if crs.is_compound else crs
    u, v = Transformer.from_crs(UTM, horizontal, always_xy=True).transform(x, y)
    header_scale = 1e-8 if horizontal.is_geographic else 1e-4
    path = tmp_path / "wood.las"
    header = laspy.LasHeader(point_format=6, version="1.4")
    header.scales, header.offsets = [header_scale, header_scale, 1e-4], np.floor([u.min(), v.min(), 0])
    header.add_crs(crs)
    cloud = laspy.LasData(header)
    cloud.x, cloud.y, cloud.z, cloud.classification = u, v, z / z_unit_m, classes
    cloud.write(path)
    truth = highest(x, y, height)
    chm = lidar_to_chm(path, GRID).to_numpy()
    tall = truth > 5
    # A point within 1 mm of an edge may change its pixel, hence not the greatest error.
    assert np.nanpercentile(np.abs(chm - truth)[tall], 95) < 0.1
    # The control: another unit is far outside that tolerance.
    wrong = lidar_to_chm(path, GRID, options=LidarOptions(z_unit_m=0.5 * z_unit_m)).to_numpy()
    assert np.nanmedian(np.abs(wrong - truth)[tall]) > 2


def geokeys(**keys):
    """A GeoTIFF key directory as LAS stores it, keys given as k<id>=value."""
    rows = sorted((int(name[1:]), 0, 1, value) for name, value in keys.items())
    data = struct.pack("<4H", 1, 1, 0, len(rows)) + b"".join(struct.pack("<4H", *row) for row in rows)
    return laspy.VLR(user_id="LASF_Projection", record_id=34735, description="", record_data=data)


@pytest.mark.parametrize(
    ("keys", "z_unit_m"),
    [
        pytest.param({}, FOOT, id="no vertical key: as x and y"),
        pytest.param({"k4099": 9001}, 1.0, id="VerticalUnits metre"),
        pytest.param({"k4099": 9003}, SURVEY_FOOT, id="VerticalUnits US survey foot"),
        pytest.param({"k4096": 5703}, 1.0, id="VerticalCSType NAVD88 in metres"),
        pytest.param({"k4096": 5703, "k4099": 9002}, FOOT, id="VerticalUnits goes before VerticalCSType"),
    ],
)
def test_vertical_unit_from_geotiff_keys(tmp_path, rng, keys, z_unit_m):
    x, y, z, classes, height = wood(rng)
    u, v = Transformer.from_crs(UTM, 2994, always_xy=True).transform(x, y)
    header = laspy.LasHeader(point_format=1, version="1.2")
    header.scales, header.offsets = [1e-4] * 3, np.floor([u.min(), v.min(), 0])
    header.vlrs.append(geokeys(k1024=1, k3072=2994, **keys))
    cloud = laspy.LasData(header)
    cloud.x, cloud.y, cloud.z, cloud.classification = u, v, z / z_unit_m, classes
    cloud.write(tmp_path / "keys.las")
    truth = highest(x, y, height)
    error = np.abs(lidar_to_chm(tmp_path / "keys.las", GRID).to_numpy() - truth)[truth > 5]
    assert np.nanpercentile(error, 95) < 0.02 + 0.1 * (z_unit_m != SURVEY_FOOT), (
        "survey and international foot differ by 2e-6"
    )


def test_grid_in_feet_gives_metres(tmp_path, rng):
    x, y, z, classes, height = wood(rng)
    to_feet = Transformer.from_crs(UTM, 2994, always_xy=True)
    left, bottom, right, top = to_feet.transform_bounds(*GRID.bounds)
    grid = Grid(
        crs=CRS.from_epsg(2994),
        transform=Affine(3, 0, left, 0, -3, top),
        shape=(int((top - bottom) / 3) + 1, int((right - left) / 3) + 1),
    )
    chm = lidar_to_chm(write(tmp_path / "wood.las", x, y, z, classes), grid)
    truth = highest(*to_feet.transform(x, y), height, grid)
    assert np.nanpercentile(np.abs(chm.to_numpy() - truth), 95) < 0.1
    assert chm.attrs["density_per_m2"] == pytest.approx(x.size / (np.prod(grid.shape) * (3 * FOOT) ** 2))


def test_rotated_grid(tmp_path, rng):
    x, y, z, classes, height = wood(rng)
    turned = GRID.transform @ Affine.translation(30, 0) @ Affine.rotation(30) @ Affine.scale(0.5)
    grid = Grid(crs=UTM, transform=turned, shape=(60, 60))
    cols, rows = ~turned @ (x, y)
    inside = (cols >= 0) & (cols < 60) & (rows >= 0) & (rows < 60)
    chm = lidar_to_chm(write(tmp_path / "wood.las", x, y, z, classes), grid)
    assert chm.attrs["points_used"] == inside.sum()
    truth = highest(x[inside], y[inside], height[inside], grid)
    np.testing.assert_array_equal(np.isnan(chm), np.isnan(truth))
    assert np.nanpercentile(np.abs(chm.to_numpy() - truth), 99) < 0.2


def test_crs_is_never_guessed(tmp_path, rng):
    x, y, z, classes, height = wood(rng)
    path = write(tmp_path / "bare.las", x, y, z, classes, crs=None)
    with pytest.raises(LidarError, match=r"no CRS in its header; give it with option crs"):
        lidar_to_chm(path, GRID)
    chm = lidar_to_chm(path, GRID, options=LidarOptions(crs=UTM))
    assert np.nanpercentile(np.abs(chm.to_numpy() - highest(x, y, height)), 99) < 0.2


def test_unit_of_z_beside_degrees_is_never_guessed(tmp_path, rng):
    x, y, z, classes, _ = wood(rng)
    path = write(tmp_path / "wood.las", x, y, z, classes)
    with pytest.raises(LidarError, match=r"nothing about the unit of z; give option z_unit_m"):
        lidar_to_chm(path, GRID, options=LidarOptions(crs=CRS.from_epsg(4326)))


@pytest.mark.parametrize("code", [4326, 3857])
def test_grid_without_true_lengths_is_refused(tmp_path, rng, code):
    path = write(tmp_path / "wood.las", *wood(rng)[:3])
    with pytest.raises(LidarError, match=r"no true lengths.*UTM"):
        lidar_to_chm(path, replace(GRID, crs=CRS.from_epsg(code)))


# --- what is dropped, filled and void ------------------------------------------------------------------------------------


@pytest.mark.parametrize(("isolated_points", "alone"), [(0, False), (6, True)])
def test_every_dropped_point_is_counted(tmp_path, rng, isolated_points, alone):
    x, y, z, classes, _ = wood(rng)
    z, classes = z.copy(), classes.copy()
    withheld = np.zeros(x.size, bool)
    crowns, ground = np.flatnonzero(classes == 5), np.flatnonzero(classes == 2)
    z[crowns[:3]] += 900  # spikes
    z[ground[:4]] -= 30  # low noise that nobody flagged
    classes[ground[:4]] = 1
    classes[ground[10:15]] = 7
    z[ground[10:15]] -= 50
    classes[ground[15:17]] = 18
    z[ground[15:17]] += 50
    classes[ground[20:26]] = 6
    withheld[ground[30:37]] = True
    x[ground[40:48]] += 5000
    path = write(tmp_path / "dirty.laz", x, y, z, classes, withheld=withheld)
    options = LidarOptions(drop_classes=(7, 18, *NON_VEGETATION_CLASSES), isolated_points=isolated_points)
    attrs = lidar_to_chm(path, GRID, options=options).attrs
    dropped = {name.removeprefix("points_dropped_"): n for name, n in attrs.items() if name.startswith("points_dropped_")}
    assert dropped == {
        "noise": 7,
        "excluded_class": 6,
        "withheld": 7,
        "overlap": 0,
        "other_return": 0,
        "isolated": 7 if alone else 0,
        "outside_grid": 8,
        "no_ground": 0,
        "above_max_height": 0 if alone else 3,
        "below_ground": 0 if alone else 4,
    }
    assert attrs["points_used"] + sum(dropped.values()) == attrs["points_read"] == x.size


def test_noise_classes_stay_in_when_asked(tmp_path, rng):
    x, y, z, classes, height = wood(rng)
    classes = np.where(np.arange(x.size) == np.argmax(height), 7, classes)
    path = write(tmp_path / "wood.las", x, y, z, classes)
    assert lidar_to_chm(path, GRID).attrs["points_dropped_noise"] == 1
    chm = lidar_to_chm(path, GRID, options=LidarOptions(drop_classes=()))
    assert chm.attrs["points_dropped_noise"] == 0
    assert float(chm.max()) == pytest.approx(height.max(), abs=0.1)


def test_low_noise_does_not_dig_the_ground(tmp_path, rng):
    x, y, z, _, height = wood(rng)
    z = z.copy()
    # Two in each 20 m block, which is what the rule of the third lowest bears.
    ground = np.flatnonzero(height == 0)
    blocks = np.floor((x[ground] - LEFT) / 20) + 3 * np.floor((y[ground] - BOTTOM) / 20)
    pits = np.concatenate([ground[blocks == block][[0, 40]] for block in range(9)])
    z[pits] -= 20
    path = write(tmp_path / "pits.las", x, y, z)
    options = LidarOptions(isolated_points=0)
    surface = ground_surface(path, GRID, options=options)
    assert surface.attrs["cells_low_noise"] == pits.size
    truth = terrain_m(surface.x.to_numpy()[None], surface.y.to_numpy()[:, None])
    assert np.abs(surface.to_numpy() - truth).max() < 1
    assert lidar_to_chm(path, GRID, options=options).attrs["points_dropped_below_ground"] == pits.size
    assert lidar_to_chm(path, GRID).attrs["points_dropped_isolated"] == pits.size


def test_voids_stay_nan_and_only_small_holes_are_filled(tmp_path, rng):
    x, y, z, classes, _ = wood(rng)
    cols, rows = (x - LEFT).astype(int), (BOTTOM + SIDE_M - y).astype(int)
    lake = (cols >= 20) & (cols < 30) & (rows >= 20) & (rows < 30)
    hole = (cols == 40) & (rows >= 40) & (rows < 42)
    edge = (cols == 59) & (rows == 10)
    keep = ~(lake | hole | edge)
    path = write(tmp_path / "voids.las", x[keep], y[keep], z[keep], classes[keep])
    expected = np.zeros(GRID.shape, bool)
    expected[20:30, 20:30] = expected[40:42, 40] = expected[10, 59] = True
    chm = lidar_to_chm(path, GRID)
    np.testing.assert_array_equal(np.isnan(chm), expected)
    assert chm.attrs["void_fraction"] == pytest.approx(expected.mean())
    filled = lidar_to_chm(path, GRID, options=LidarOptions(fill_holes_px=2))
    expected[40:42, 40] = False
    np.testing.assert_array_equal(np.isnan(filled), expected)
    assert filled.attrs["pixels_hole_filled"] == 2
    around = chm.to_numpy()[39:43, 39:42]
    assert np.nanmin(around) <= filled.to_numpy()[40:42, 40].min()
    assert filled.to_numpy()[40:42, 40].max() <= np.nanmax(around)
    assert int(np.isnan(lidar_to_chm(path, GRID, options=LidarOptions(fill_holes_px=1))).sum()) == 103


def test_ground_is_unknown_far_from_ground_returns(tmp_path, rng):
    x, y, z, classes, _ = wood(rng)
    near = (classes != 2) | (x < LEFT + 10)
    path = write(tmp_path / "dense.las", x[near], y[near], z[near], classes[near])
    options = LidarOptions(ground="classes", ground_gap_m=15)
    surface = ground_surface(path, GRID, options=options).to_numpy()
    assert not np.isnan(surface[:, :20]).any()
    assert np.isnan(surface[:, 26:]).all()
    assert lidar_to_chm(path, GRID, options=options).attrs["points_dropped_no_ground"] > 0


def test_stray_ground_codes_do_not_pass_for_a_classification(tmp_path, rng):
    x, y, z, _, height = wood(rng)
    classes = np.zeros(x.size, np.uint8)
    classes[np.argsort(-height)[:20]] = 2
    path = write(tmp_path / "stray.las", x, y, z, classes)
    chm = lidar_to_chm(path, GRID)
    assert chm.attrs["ground_method"] == "progressive morphological filter"
    assert float(chm.max()) == pytest.approx(height.max(), abs=0.5)
    asked = lidar_to_chm(path, GRID, options=LidarOptions(ground="classes"))
    assert asked.attrs["ground_method"] == "classes 2 and 9"


def test_normalised_cloud(tmp_path, rng):
    x, y, _, _, height = wood(rng)
    path = write(tmp_path / "normalised.las", x, y, height)
    chm = lidar_to_chm(path, GRID, options=LidarOptions(normalised=True))
    np.testing.assert_allclose(chm, highest(x, y, height), atol=1e-3)


@pytest.mark.parametrize("radius_m", [0.0, 0.3, 1.7])
def test_subcircle_raises_every_pixel_that_it_touches(tmp_path, radius_m):
    x, y, height = np.array([LEFT + 10.5, LEFT + 40.9]), np.array([BOTTOM + 20.5, BOTTOM + 30.5]), np.array([7.0, 9.0])
    path = write(tmp_path / "two.las", x, y, height)
    options = LidarOptions(normalised=True, subcircle_m=radius_m, isolated_points=0)
    chm = lidar_to_chm(path, GRID, options=options).to_numpy()
    truth = np.full(GRID.shape, np.nan)
    for r in range(60):
        for c in range(60):
            for u, v, h in zip(x - LEFT, BOTTOM + SIDE_M - y, height, strict=True):
                if np.hypot(max(c - u, 0, u - c - 1), max(r - v, 0, v - r - 1)) <= radius_m:
                    truth[r, c] = h
    np.testing.assert_allclose(chm, truth, atol=1e-3)
    assert np.isfinite(chm).sum() == {0.0: 2, 0.3: 3, 1.7: np.isfinite(truth).sum()}[radius_m]


# --- streaming -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("classed", [True, False])
@pytest.mark.parametrize(
    "changed", [{"chunk_points": 777}, {"keep_points": 0}, {"keep_points": 20_000, "chunk_points": 5_000}]
)
def test_result_does_not_depend_on_chunks(tmp_path, rng, classed, changed):
    x, y, z, classes, _ = wood(rng)
    # Heights in steps of 0.5 m and points in random order: many are equal, so that ties would show.
    path = write(tmp_path / "wood.laz", x, y, np.round(z * 2) / 2, classes if classed else None)
    one, other = lidar_to_chm(path, GRID), lidar_to_chm(path, GRID, options=LidarOptions(**changed))
    np.testing.assert_array_equal(one, other)
    assert {k: v for k, v in one.attrs.items() if k != "_FillValue"} == {
        k: v for k, v in other.attrs.items() if k != "_FillValue"
    }


def test_files_cover_the_grid_together_and_far_ones_are_not_read(tmp_path, rng):
    x, y, z, classes, _ = wood(rng)
    west = x < LEFT + 25
    whole = lidar_to_chm(write(tmp_path / "whole.las", x, y, z, classes), GRID)
    parts = [write(tmp_path / f"{n}.laz", x[m], y[m], z[m], classes[m]) for n, m in (("west", west), ("east", ~west))]
    far = write(tmp_path / "far.las", x + 10_000, y, z, classes)
    together = lidar_to_chm([*parts, far], GRID)
    assert together.attrs["files_outside"] == 1
    assert together.attrs["points_read"] == x.size
    np.testing.assert_allclose(together, whole, atol=1e-4)


@pytest.mark.parametrize(("row", "col"), [(0, 0), (7, 13), (15, 4)])
def test_value_does_not_depend_on_the_extent_of_the_grid(tmp_path, rng, row, col):
    """Cells and noise blocks are anchored to the CRS; only the filling of gaps feels how far the grid goes."""
    path = write(tmp_path / "wood.las", *wood(rng)[:3])
    whole = lidar_to_chm(path, GRID).to_numpy()
    part = lidar_to_chm(path, GRID.crop(row, col, (40, 40))).to_numpy()
    np.testing.assert_allclose(part, whole[row : row + 40, col : col + 40], atol=0.02)


def test_membrane_keeps_a_plane_across_a_gap(rng):
    rows, cols = np.mgrid[:90, :70]
    plane = 100 + 0.4 * cols - 0.2 * rows
    torn = plane.copy()
    torn[20:60, 15:50] = np.nan
    torn[rng.random(torn.shape) < 0.3] = np.nan
    stretched = membrane(torn)
    np.testing.assert_array_equal(stretched[np.isfinite(torn)], plane[np.isfinite(torn)])
    assert np.abs(stretched - plane)[1:-1, 1:-1].max() < 0.35, (
        "a thousandth of the gap's 40 m would be luck, 1 % is the method"
    )


# --- bad input -----------------------------------------------------------------------------------------------------------


def one_line(call):
    with pytest.raises(LidarError) as caught:
        call()
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("suffix", ["las", "laz"])
@pytest.mark.parametrize("share", [0.0, 0.0005, 0.5, 0.97])
def test_truncated_files_are_named(tmp_path, rng, suffix, share):
    x, y, z, classes, _ = wood(rng)
    path = write(tmp_path / f"wood.{suffix}", x, y, z, classes)
    whole = path.read_bytes()
    path.write_bytes(whole[: int(share * len(whole))])
    assert str(path) in one_line(lambda: lidar_to_chm(path, GRID, options=LidarOptions(chunk_points=1000)))


def test_files_that_are_no_clouds(tmp_path):
    text = tmp_path / "notes.laz"
    text.write_text("no points here\n" * 100)
    assert "not a readable LAS or LAZ file" in one_line(lambda: lidar_to_chm(text, GRID))
    assert "does not exist" in one_line(lambda: lidar_to_chm(tmp_path / "missing.laz", GRID))
    assert "no point cloud given" in one_line(lambda: lidar_to_chm([], GRID))
    empty = write(tmp_path / "empty.las", *np.zeros((3, 1)))
    laspy.LasData(laspy.read(empty).header).write(empty)
    assert "0 points" in one_line(lambda: lidar_to_chm(empty, GRID))


def test_cloud_elsewhere(tmp_path, rng):
    x, y, z, classes, _ = wood(rng)
    path = write(tmp_path / "far.las", x + 5000, y, z, classes)
    for ground in ("auto", "filter", "classes"):
        assert "grid" in one_line(lambda g=ground: lidar_to_chm(path, GRID, options=LidarOptions(ground=g)))
    assert "check CRS" in one_line(lambda: lidar_to_chm(path, GRID, options=LidarOptions(normalised=True)))


def test_no_ground_class(tmp_path, rng):
    path = write(tmp_path / "wood.las", *wood(rng)[:3])
    message = one_line(lambda: lidar_to_chm(path, GRID, options=LidarOptions(ground="classes")))
    assert "use ground = 'filter'" in message


def test_bad_options(tmp_path, rng):
    path = write(tmp_path / "wood.las", *wood(rng)[:3])
    assert "'spikefree' is not known; use 'p2r' or 'pitfree'" in one_line(lambda: lidar_to_chm(path, GRID, "spikefree"))
    assert "without return number" in one_line(lambda: lidar_to_chm(path, GRID, "pitfree"))
    assert "'only' is not known; use 'auto', 'all', 'first' or 'last'" in one_line(lambda: LidarOptions(returns="only"))
    assert "must begin with 0 and rise" in one_line(lambda: LidarOptions(pitfree_thresholds_m=(0, 5, 2)))
    assert "at most 16" in one_line(lambda: LidarOptions(pitfree_max_edge_m=(20, 1)))
    assert "z_unit_m = 0" in one_line(lambda: LidarOptions(z_unit_m=0))
    assert "max_height_m = nan" in one_line(lambda: LidarOptions(max_height_m=float("nan")))
    assert "subcircle_m = -1" in one_line(lambda: LidarOptions(subcircle_m=-1))
    assert "ground class 2" in one_line(lambda: LidarOptions(drop_classes=(2, 7)))
    assert "'csf' is not known" in one_line(lambda: LidarOptions(ground="csf"))
    assert "no ground to return" in one_line(lambda: ground_surface(path, GRID, options=LidarOptions(normalised=True)))


# --- real clouds ---------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_filter_against_ground_classified_by_hand(samples):
    """Limits of the filter: median 0.10 m, 95 % 0.5 m.

    Most of the hand-classified ground is open, where the lowest return is the ground without any filter. So the limits are
    also asked of the points within 3 m of trees, and it is there that leaving the filter out must break them.
    """
    cloud = samples / "autzen" / "autzen_unclassified_epsg2994_ft.laz"
    manual = laspy.read(samples / "autzen" / "autzen_manual_classes_61k_thinned.copc.laz")
    to_utm = Transformer.from_crs(2994, UTM, always_xy=True)
    x, y = to_utm.transform(np.asarray(manual.x), np.asarray(manual.y))
    z_m, classes = np.asarray(manual.z) * FOOT, np.asarray(manual.classification)
    is_ground = classes == 2
    lattice = Lattice(crs=UTM, gsd_m=1.0)
    grid = lattice.grid(lattice.covering((x.min(), y.min(), x.max(), y.max())))
    away, _ = cKDTree(np.column_stack([x, y])[classes == 5]).query(np.column_stack([x, y])[is_ground])

    def errors_m(options):
        surface = ground_surface(cloud, grid, options=options)
        assert surface.attrs["ground_method"] == "progressive morphological filter"
        rows, cols = grid.transform.f - y[is_ground] - 0.5, x[is_ground] - grid.transform.c - 0.5
        return np.abs(ndimage.map_coordinates(surface.to_numpy(), [rows, cols], order=1, mode="nearest") - z_m[is_ground])

    error, unfiltered = errors_m(LidarOptions()), errors_m(LidarOptions(filter_slope=1e9))
    assert np.isfinite(error).all()
    assert error.size > 20_000
    for part in (error, error[away < 3]):
        assert np.median(part) <= 0.10
        assert np.percentile(part, 95) <= 0.5
    assert np.percentile(error, 99) <= 0.5
    assert np.percentile(unfiltered[away < 3], 95) > 0.5
    assert np.percentile(unfiltered, 99) > 0.5


def test_producers_chm_of_the_idtrees_plots(samples):
    """NEON's 1 m CHMs are gridded otherwise (pit-free, interpolated): crown edges differ by metres, the bulk must not."""
    folder = samples / "plots" / "IDTREES"
    median, mean, shifted, correlation = [], [], [], []
    for path in sorted((folder / "LAS").glob("*.las")):
        pixels, grid = raster.read_raster(folder / "CHM" / f"{path.stem}.tif")
        chm = lidar_to_chm(path, grid).to_numpy()
        ok = pixels.valid & np.isfinite(chm)
        assert ok.mean() > 0.9, path.stem
        theirs = pixels.data[0]
        difference = (chm - theirs)[ok]
        median.append(np.median(difference))
        mean.append(np.abs(difference).mean())
        correlation.append(np.corrcoef(chm[ok], theirs[ok])[0, 1])
        both = (ok & np.roll(ok, 1, axis=1))[:, 1:]
        shifted.append(np.abs(np.roll(chm, 1, axis=1) - theirs)[:, 1:][both].mean())
    assert len(median) == 59
    assert np.abs(np.median(median)) < 0.25
    assert np.max(np.abs(median)) < 0.6
    assert np.median(mean) < 1.3
    assert np.median(correlation) > 0.8
    # The control: one pixel to the side fits much worse.
    assert np.median(np.array(shifted) / mean) > 1.3


def test_producers_chm_of_a_normalised_cloud(samples):
    folder = samples / "lidar" / "nz_wellington"
    pixels, grid = raster.read_raster(folder / "CHM.tif")
    chm = lidar_to_chm(folder / "POINTS.laz", grid, options=LidarOptions(normalised=True)).to_numpy()
    ok = pixels.valid & np.isfinite(chm)
    theirs = pixels.data[0]
    assert ok.mean() > 0.99
    assert np.median(np.abs(chm - theirs)[ok]) < 0.5, "theirs is smoothed between returns"
    assert np.corrcoef(chm[ok], theirs[ok])[0, 1] > 0.97
    # The control: one pixel to the side.
    assert np.corrcoef(chm[ok], np.roll(theirs, 1, axis=0)[ok])[0, 1] < 0.96


def test_producers_chm_made_pit_free(samples):
    """OSBS_029, 4 points per m²: the producer's CHM (without CRS in its file) is pit-free, by another program, and ours.

    Returns from inside crowns keep p2r 1.4 m lower on the mean, and a quarter of its pixels is void.
    """
    folder = samples / "plots" / "OSBS"
    with rasterio.open(folder / "OSBS_029_CHM.tif") as dataset:
        theirs = dataset.read(1, masked=True).filled(np.nan)
        grid = Grid(crs=CRS.from_epsg(32617), transform=dataset.transform, shape=dataset.shape)
    options = LidarOptions(normalised=True, crs=grid.crs)
    error_m, correlation = {}, {}
    for algorithm in ("p2r", "pitfree"):
        chm = lidar_to_chm(folder / "OSBS_029.laz", grid, algorithm, options=options).to_numpy()
        ok = np.isfinite(chm) & np.isfinite(theirs)
        assert ok.mean() > (0.7 if algorithm == "p2r" else 0.95)
        error_m[algorithm] = np.abs(chm - theirs)[ok]
        correlation[algorithm] = np.corrcoef(chm[ok], theirs[ok])[0, 1]
    assert error_m["pitfree"].mean() < 0.02
    assert np.percentile(error_m["pitfree"], 99) < 0.05
    assert correlation["pitfree"] > 0.999
    # The control: p2r is another canopy of the same cloud.
    assert 1.0 < error_m["p2r"].mean() < 2.0
    assert 0.65 < correlation["p2r"] < 0.9


def test_memory_does_not_grow_with_the_file(tmp_path, rng):
    """Four times the points on the same ground: what a run allocates stays, but for the points themselves, never kept."""
    peak = []
    for times in (1, 4):
        x, y, z, classes, _ = wood(rng, per_m2=30.0 * times)
        path = write(tmp_path / f"{times}.laz", x, y, z, classes)
        options = LidarOptions(keep_points=0, chunk_points=20_000)
        lidar_to_chm(path, GRID, options=options)  # loads and compiles
        tracemalloc.start()
        lidar_to_chm(path, GRID, options=options)
        peak.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peak[1] < 1.1 * peak[0]
    # The control: with the points kept it does grow.
    tracemalloc.start()
    lidar_to_chm(path, GRID, options=LidarOptions(chunk_points=20_000))
    assert tracemalloc.get_traced_memory()[1] > 1.2 * peak[1]
    tracemalloc.stop()


def test_compound_crs_of_a_real_file(samples):
    """Feet in the plane, US survey feet in z; Eugene lies 125-145 m above the sea."""
    lattice = Lattice(crs=UTM, gsd_m=10.0)
    grid = lattice.grid(lattice.covering((494_050, 4_877_500, 494_950, 4_878_700)))
    surface = ground_surface(samples / "autzen" / "autzen_manual_classes_61k_thinned.copc.laz", grid)
    assert surface.attrs["ground_method"] == "classes 2 and 9"
    assert 120 < float(surface.min()) < float(surface.max()) < 150

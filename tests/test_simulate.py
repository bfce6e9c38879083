"""The simulated forest is what it says it is: heights, returns, terrain, shadows and files."""

import math
from pathlib import Path

import numpy as np
import pytest
from affine import Affine
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from pyproj import CRS
from scipy import ndimage

from canopy.errors import CanopyError, GridError, OutputError
from canopy.grid import Box, Grid, Lattice
from canopy.raster import open_raster, read_raster
from canopy.simulate import (
    ROAD,
    WATER,
    Conditions,
    ForestConfig,
    Scene,
    Trees,
    canopy_height,
    refine_heights,
    reimage,
    simulate_scene,
    write_scene,
)

LATTICE = Lattice(crs=CRS.from_epsg(32610), gsd_m=0.6)
PLAIN = Conditions(noise_dn=0, haze=0, bare_soil=0, sharpen=0, blur_px=0)


def grid_of(rows: int, cols: int) -> Grid:
    return LATTICE.grid(Box(-8_000_100, 900_040, -8_000_100 + rows, 900_040 + cols))


def trees_at(grid: Grid, rows: list[float], cols: list[float], *, conifer: list[bool]) -> Trees:
    """Trees of differing sizes at fractional pixels."""
    count = len(rows)
    xy = [grid.transform @ (c, r) for r, c in zip(rows, cols, strict=True)]
    size = np.linspace(0.7, 1.3, count, dtype=np.float32)
    return Trees(
        x=np.array([x for x, _ in xy]),
        y=np.array([y for _, y in xy]),
        height_m=18 * size,
        radius_m=5 * size,
        depth_m=7 * size,
        base_m=4 * size,
        conifer=np.array(conifer),
        reflectance=np.full((count, 3), 0.05, np.float32),
        phase=np.zeros(count, np.float32),
    )


def crown(trees: Trees, k: int, distance_m: np.ndarray) -> np.ndarray:
    """The surface of tree k from its formula, 0 outside."""
    q = distance_m / trees.radius_m[k]
    inside = np.minimum(q, 1)
    fall = inside**1.2 if trees.conifer[k] else 1 - np.sqrt(1 - inside**2)
    return np.where(q < 1, trees.height_m[k] - trees.depth_m[k] * fall, 0)


def analytic(trees: Trees, x: np.ndarray, y: np.ndarray, *, slack_m: float = 0.0) -> np.ndarray:
    """Canopy height at points: the highest that any crown is within `slack_m` of each."""
    out = np.zeros(np.shape(x))
    for k in range(len(trees)):
        away = np.hypot(x - trees.x[k], y - trees.y[k])
        out = np.maximum(out, crown(trees, k, np.maximum(away - slack_m, 0)))
    return out


def centres(grid: Grid) -> tuple[np.ndarray, np.ndarray]:
    rows, cols = np.indices(grid.shape)
    left, _, _, top = grid.bounds
    return left + (cols + 0.5) * grid.gsd[0], top - (rows + 0.5) * grid.gsd[1]


@pytest.fixture(scope="module")
def smooth_scene() -> Scene:
    """Crowns without relief, so that every return has a formula to be held against; steep ground."""
    forest = ForestConfig(crown_relief=0, terrain_slope=0.3, cover=0.9, roads=1, ponds=1, spacing=0.9)
    return simulate_scene(grid=grid_of(110, 90), seed=4, forest=forest)


# --- heights -------------------------------------------------------------------------------------------------------------


def test_isolated_trees_have_the_heights_of_their_formula() -> None:
    grid = grid_of(60, 100)
    trees = trees_at(grid, [20.3, 38.9], [24.1, 71.6], conifer=[True, False])
    height = canopy_height(trees, grid)
    expected = analytic(trees, *centres(grid))
    np.testing.assert_allclose(height, expected, atol=2e-4)
    assert height.dtype == np.float32
    assert (height > 0).sum() == (expected > 0).sum() > 200
    # Negative control: the kinds exchanged do not fit.
    swapped = trees_at(grid, [20.3, 38.9], [24.1, 71.6], conifer=[False, True])
    assert np.abs(height - analytic(swapped, *centres(grid))).max() > 1


@given(order=st.permutations(range(6)))
def test_the_order_of_the_trees_does_not_matter(order: list[int]) -> None:
    grid = grid_of(50, 40)
    rows, cols = [11.2, 18.4, 25.0, 25.0, 33.3, 40.1], [12.0, 17.7, 22.2, 22.2, 25.1, 14.9]
    trees = trees_at(grid, rows, cols, conifer=[True, False, True, False, False, True])
    np.testing.assert_array_equal(canopy_height(trees.take(np.array(order)), grid), canopy_height(trees, grid))


def test_scene_heights_are_the_maximum_of_its_crowns(smooth_scene: Scene) -> None:
    x, y = centres(smooth_scene.grid)
    expected = np.maximum(analytic(smooth_scene.trees, x, y), np.float32(0))
    np.testing.assert_allclose(smooth_scene.height_m, expected, atol=2e-3)
    assert smooth_scene.height_m.max() > 10


def test_roads_and_water_are_at_zero() -> None:
    scene = simulate_scene(grid=grid_of(150, 150), seed=11, forest=ForestConfig(cover=1.0, crown_relief=2))
    assert (scene.cover == ROAD).sum() > 100
    assert (scene.cover == WATER).sum() > 100
    assert not scene.height_m[(scene.cover == ROAD) | (scene.cover == WATER)].any()
    assert scene.height_m.mean() > 3  # negative control: trees stand elsewhere


def test_a_scene_without_plants_is_flat() -> None:
    bare = ForestConfig(cover=0, lone_trees_per_ha=0, shrub_cover=0)
    scene = simulate_scene(grid=grid_of(60, 70), seed=2, forest=bare)
    assert not scene.height_m.any()
    assert set(np.unique(scene.points.number_of_returns)) == {1}


def test_ponds_are_level() -> None:
    scene = simulate_scene(grid=grid_of(150, 150), seed=11, forest=ForestConfig(terrain_slope=0.3))
    lakes, count = ndimage.label(scene.cover == WATER)
    assert count >= 1
    deep = ndimage.binary_erosion(lakes > 0)
    assert np.ptp(scene.ground_m[deep & (lakes == lakes[deep][0])]) < 1e-3
    assert np.ptp(scene.ground_m) > 10


# --- seeds ---------------------------------------------------------------------------------------------------------------


def arrays_of(scene: Scene) -> dict[str, bytes]:
    points = {name: getattr(scene.points, name) for name in type(scene.points).__slots__}
    return {
        name: array.tobytes()
        for name, array in {"image": scene.image, "height": scene.height_m, "ground": scene.ground_m, **points}.items()
    }


def test_the_seed_decides_every_byte() -> None:
    grid, forest = grid_of(70, 50), ForestConfig(conditions=Conditions(view_zenith_deg=5))
    first = arrays_of(simulate_scene(grid=grid, seed=5, forest=forest))
    assert arrays_of(simulate_scene(grid=grid, seed=5, forest=forest)) == first
    other = arrays_of(simulate_scene(grid=grid, seed=6, forest=forest))
    assert all(other[name] != first[name] for name in ("image", "height", "ground", "z"))


def test_the_lidar_does_not_change_the_photograph() -> None:
    grid = grid_of(70, 50)
    few, many = (simulate_scene(grid=grid, seed=5, forest=ForestConfig(pulses_per_m2=n)) for n in (1.0, 9.0))
    np.testing.assert_array_equal(few.image, many.image)
    assert len(many.points) == pytest.approx(9 * len(few.points), rel=0.1)


def test_a_second_visit_sees_the_same_forest_but_for_what_was_felled() -> None:
    grid, forest = grid_of(70, 50), ForestConfig(cover=1.0, pulses_per_m2=0.5)
    left, _, right, _ = grid.bounds

    def west(trees: Trees) -> np.ndarray:
        return trees.x < (left + right) / 2

    first = simulate_scene(grid=grid, seed=5, forest=forest)
    low_sun = forest.model_copy(update={"conditions": Conditions(sun_elevation_deg=35)})
    again = simulate_scene(grid=grid, seed=5, forest=low_sun, exposure=1)
    np.testing.assert_array_equal(again.height_m, first.height_m)
    np.testing.assert_array_equal(again.ground_m, first.ground_m)
    assert np.abs(again.image.astype(int) - first.image).mean() > 5
    noise = simulate_scene(grid=grid, seed=5, forest=forest, exposure=1).image.astype(int) - first.image
    assert 0 < np.abs(noise).mean() < np.abs(again.image.astype(int) - first.image).mean()
    later = simulate_scene(grid=grid, seed=5, forest=forest, exposure=1, felled=west)
    x, _ = centres(grid)
    assert (later.height_m <= first.height_m).all()
    assert (
        later.height_m[x < left + 0.2 * (right - left)].max() == 0 < first.height_m[x < left + 0.2 * (right - left)].mean()
    )
    east = x > left + 0.85 * (right - left)
    np.testing.assert_array_equal(later.height_m[east], first.height_m[east])


@given(seed=st.integers(0, 2**63 - 1))
def test_random_forests_are_valid_and_differ(seed: int) -> None:
    one, two = (ForestConfig.random(np.random.default_rng(s)) for s in (seed, seed + 1))
    assert ForestConfig.model_validate(one.model_dump()) == one
    assert one != two


# --- returns -------------------------------------------------------------------------------------------------------------


def ground_at(scene: Scene, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    left, _, _, top = scene.grid.bounds
    at = (top - y) / scene.grid.gsd[1] - 0.5, (x - left) / scene.grid.gsd[0] - 0.5
    return ndimage.map_coordinates(scene.ground_m.astype(np.float64), at, order=1, mode="nearest")


def test_first_returns_come_from_the_canopy_or_below(smooth_scene: Scene) -> None:
    points = smooth_scene.points
    first = (points.return_number == 1) & (points.classification == 1)
    x, y = points.x[first], points.y[first]
    above = points.z[first] - ground_at(smooth_scene, x, y)
    # The surface is sampled every 0.3 m, so a return belongs to a crown at most half a diagonal of that away.
    limit = analytic(smooth_scene.trees, x, y, slack_m=0.22) + 6 * 0.03 + 0.05
    assert first.sum() > 5000
    assert (above <= limit).all()
    assert (above + 2.0 > limit).mean() > 0.5  # negative control: the limit is near, raised returns break it
    assert above.min() > -0.2


def test_ground_returns_lie_on_the_terrain(smooth_scene: Scene) -> None:
    points = smooth_scene.points
    error = points.z - ground_at(smooth_scene, points.x, points.y)
    _, _, right, top = smooth_scene.grid.bounds
    left, bottom, *_ = smooth_scene.grid.bounds
    inner = (points.x > left + 1) & (points.x < right - 1) & (points.y > bottom + 1) & (points.y < top - 1)
    ground = (points.classification == 2) & inner
    assert ground.sum() > 2000
    assert np.abs(error[ground]).max() < 6 * 0.03 + 0.1
    assert np.std(error[ground]) == pytest.approx(0.03, rel=0.25)
    assert np.abs(error[inner & ~ground]).max() > 5  # negative control: the others do not


def test_the_returns_of_a_pulse_are_numbered_downwards(smooth_scene: Scene) -> None:
    points = smooth_scene.points
    starts = np.flatnonzero(points.return_number == 1)
    lengths = np.diff(np.append(starts, len(points)))
    np.testing.assert_array_equal(np.repeat(lengths, lengths), points.number_of_returns)
    np.testing.assert_array_equal(points.return_number, np.arange(len(points)) - np.repeat(starts, lengths) + 1)
    later = points.return_number > 1
    assert (points.z[later] < points.z[np.flatnonzero(later) - 1] + 0.3).all()
    assert lengths.max() == 3
    assert (points.classification == 2)[points.return_number == points.number_of_returns].mean() > 0.3


def test_an_unclassified_cloud_has_the_same_points(smooth_scene: Scene) -> None:
    forest = ForestConfig(crown_relief=0, terrain_slope=0.3, cover=0.9, roads=1, ponds=1, spacing=0.9, classified=False)
    scene = simulate_scene(grid=smooth_scene.grid, seed=4, forest=forest)
    assert not scene.points.classification.any()
    np.testing.assert_array_equal(scene.points.z, smooth_scene.points.z)


# --- the photograph ------------------------------------------------------------------------------------------------------


def patch_mean(image: np.ndarray, bearing_deg: float, distance_m: float, gsd_m: float) -> float:
    """Brightness of a small patch at a bearing and distance from the middle of the image."""
    row = image.shape[1] / 2 - math.cos(math.radians(bearing_deg)) * distance_m / gsd_m
    col = image.shape[2] / 2 + math.sin(math.radians(bearing_deg)) * distance_m / gsd_m
    r, c = round(row), round(col)
    return float(image[:, r - 2 : r + 3, c - 2 : c + 3].mean())


def lone_cone(gsd_m: float, height_m: float, radius_m: float) -> np.ndarray:
    rows, cols = np.indices((200, 200)) + 0.5
    away_m = np.hypot(rows - 100, cols - 100) * gsd_m
    return np.where(away_m < radius_m, height_m * (1 - 0.7 * away_m / radius_m), 0).astype(np.float32)


@pytest.mark.parametrize("azimuth_deg", [137.0, 251.0, 23.0])
def test_shadows_fall_away_from_the_sun(azimuth_deg: float) -> None:
    gsd_m, height_m, elevation_deg = 0.5, 20.0, 40.0
    light = PLAIN.model_copy(update={"sun_azimuth_deg": azimuth_deg, "sun_elevation_deg": elevation_deg})
    image = reimage(
        lone_cone(gsd_m, height_m, 5.0), gsd_m=gsd_m, rng=np.random.default_rng(1), conditions=light, conifer_share=1.0
    )
    length_m = height_m / math.tan(math.radians(elevation_deg))
    ratios = {
        bearing: patch_mean(image, azimuth_deg + bearing, 0.65 * length_m, gsd_m)
        / patch_mean(image, azimuth_deg + bearing, 1.35 * length_m, gsd_m)
        for bearing in (180, 0, 90, 270)
    }
    assert ratios[180] < 0.65  # in the shadow, against beyond its end
    assert all(ratios[bearing] > 0.8 for bearing in (0, 90, 270))  # negative control: no shadow on any other side


def test_trees_lean_by_their_height() -> None:
    """A 20 m column seen 9 degrees off the zenith: its top moves by 20 tan 9 m towards the view azimuth."""
    rows, cols = np.indices((160, 160)) + 0.5
    column = np.where(np.hypot(rows - 80, cols - 80) < 14, 20, 0).astype(np.float32)
    seen = {}
    for zenith_deg in (0.0, 9.0):
        light = PLAIN.model_copy(update={"sun_elevation_deg": 90, "view_zenith_deg": zenith_deg, "view_azimuth_deg": 60})
        # Red straw and green leaves: a tree is told from its shade by colour.
        light = light.model_copy(update={"dryness": 1.0, "foliage": (0.4, 1.0, 0.4)})
        image = reimage(column, gsd_m=0.5, rng=np.random.default_rng(3), conditions=light, conifer_share=1.0).astype(float)
        seen[zenith_deg] = image[1] > 1.1 * image[0]
    edge = [np.percentile(np.argwhere(seen[z]) @ (-math.cos(math.pi / 3), math.sin(math.pi / 3)), 99.5) for z in (0.0, 9.0)]
    assert (edge[1] - edge[0]) * 0.5 == pytest.approx(20 * math.tan(math.radians(9)), abs=0.8)


def test_brightness_does_not_tell_height() -> None:
    """Far from its edges a closed canopy of 8 m looks as bright as one of 30 m, as in life."""
    heights = np.zeros((200, 400), np.float32)
    heights[20:180, 20:190], heights[20:180, 210:380] = 8, 30
    difference = []
    for seed in range(2):
        image = reimage(heights, gsd_m=0.5, rng=np.random.default_rng(seed), conditions=PLAIN).astype(float)
        low, high = image[:, 60:140, 70:140].mean(), image[:, 60:140, 260:330].mean()
        difference.append((low - high) / (low + high))
    assert abs(np.mean(difference)) < 0.05


def test_reimaging_is_seeded_and_black_where_unknown() -> None:
    heights = lone_cone(0.5, 15, 6)
    heights[:30, :40] = np.nan
    one, again, other = (reimage(heights, gsd_m=0.5, rng=np.random.default_rng(s)) for s in (1, 1, 2))
    np.testing.assert_array_equal(one, again)
    assert (one != other).mean() > 0.5
    assert one.shape == (3, 200, 200)
    assert one.dtype == np.uint8
    assert not one[:, :30, :40].any()
    assert (one[:, 40:, 50:].max(axis=0) > 0).all()


@settings(max_examples=15)
@given(factor=st.integers(1, 4), seed=st.integers(0, 1000))
def test_refined_heights_stay_within_their_neighbours(factor: int, seed: int) -> None:
    heights = np.random.default_rng(seed).uniform(0, 40, (9, 7)).astype(np.float32)
    heights[3, 4] = np.nan
    fine = refine_heights(heights, factor)
    assert fine.shape == (9 * factor, 7 * factor)
    assert np.isnan(fine).sum() == factor**2
    assert np.nanmin(fine) >= 0
    assert np.nanmax(fine) <= np.nanmax(heights)
    if factor == 1:
        np.testing.assert_array_equal(fine, heights)


def test_a_real_canopy_can_be_reimaged(samples: Path) -> None:
    with open_raster(samples / "lidar/neon_chm_1km/NEON_D17_SOAP_DP3_302000_4100000_CHM.tif") as raster:
        pixels = raster.read(200, 300, (150, 120), (1,))
    heights = refine_heights(np.where(pixels.valid, pixels.data[0], np.nan).astype(np.float32), 2)
    image = reimage(heights, gsd_m=0.5, rng=np.random.default_rng(0), conditions=PLAIN)
    assert image.shape == (3, 300, 240)
    open_ground, canopy = heights < 0.3, heights > 5
    assert open_ground.sum() > 1000
    assert canopy.sum() > 1000
    assert image[:, open_ground].mean() > 1.15 * image[:, canopy].mean()
    assert image.std() > 20


# --- files and bad input ---------------------------------------------------------------------------------------------------


def test_written_scenes_are_read_back(tmp_path: Path, smooth_scene: Scene) -> None:
    import laspy

    folder = tmp_path / "a" / "scene"
    write_scene(smooth_scene, folder)
    write_scene(smooth_scene, folder)  # replaces its own files
    assert sorted(p.name for p in folder.iterdir()) == ["ground.tif", "height.tif", "image.tif", "points.laz"]
    for name, data in (
        ("image", smooth_scene.image),
        ("height", smooth_scene.height_m[None]),
        ("ground", smooth_scene.ground_m[None]),
    ):
        pixels, grid = read_raster(folder / f"{name}.tif")
        np.testing.assert_array_equal(pixels.data, data)
        assert pixels.valid.all()
        assert grid == smooth_scene.grid
    cloud = laspy.read(folder / "points.laz")
    assert str(cloud.header.version) == "1.4"
    assert CRS.from_user_input(cloud.header.parse_crs()).to_epsg() == 32610
    for axis in "xyz":
        np.testing.assert_allclose(np.asarray(getattr(cloud, axis)), getattr(smooth_scene.points, axis), atol=0.00501)
    for name in ("classification", "return_number", "number_of_returns"):
        np.testing.assert_array_equal(np.asarray(getattr(cloud, name)), getattr(smooth_scene.points, name))


def test_a_folder_that_cannot_be_made_is_one_clear_line(tmp_path: Path, smooth_scene: Scene) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="choose another output folder"):
        write_scene(smooth_scene, tmp_path / "file" / "scene")


@pytest.mark.parametrize(
    ("grid", "message"),
    [
        (Grid(crs=CRS.from_epsg(4326), transform=Affine(1e-5, 0, 0, 0, -1e-5, 0), shape=(9, 9)), "not projected in metres"),
        (Grid(crs=LATTICE.crs, transform=Affine.rotation(5) @ Affine.scale(0.6, -0.6), shape=(9, 9)), "north-up"),
        (Grid(crs=LATTICE.crs, transform=Affine(0.6, 0, 0, 0, -0.5, 0), shape=(9, 9)), "square"),
        (Grid(crs=LATTICE.crs, transform=Affine(10, 0, 0, 0, -10, 0), shape=(9, 9)), "outside 0.05 to 3 m"),
    ],
)
def test_grids_that_cannot_hold_crowns_are_refused(grid: Grid, message: str) -> None:
    with pytest.raises(GridError, match=message):
        simulate_scene(grid=grid, seed=0)


@pytest.mark.parametrize(
    ("heights", "message"),
    [
        (np.full((5, 5), np.nan, np.float32), "are NaN"),
        (np.full((5, 5), -9999, np.float32), "set nodata to NaN"),
        (np.full((5, 5), np.inf, np.float32), "set nodata to NaN"),
        (np.zeros((1, 5, 5), np.float32), "give \\(row, col\\)"),
    ],
)
def test_heights_that_cannot_be_photographed_are_refused(heights: np.ndarray, message: str) -> None:
    with pytest.raises(CanopyError, match=message):
        reimage(heights, gsd_m=0.5, rng=np.random.default_rng(0))


def test_unknown_and_impossible_settings_are_refused() -> None:
    with pytest.raises(ValidationError, match="extra"):
        ForestConfig.model_validate({"covre": 0.5})
    with pytest.raises(ValidationError, match="swap them"):
        ForestConfig(stand_height_low_m=30, stand_height_high_m=10)

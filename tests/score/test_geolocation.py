"""Tracks of shots that lie off the map by a known distance, and tracks that must be left where they are."""

import dataclasses

import numpy as np
import pytest
from affine import Affine
from pyproj import CRS, Transformer
from scipy.ndimage import gaussian_filter

from canopy.errors import SourceError
from canopy.grid import Grid
from canopy.raster import write_raster
from canopy.score import References, ShotSettings, score_map
from canopy.score.footprint import WGS84, Shots, sample_footprints
from canopy.score.gedi import read_gedi
from canopy.score.geolocation import relocate
from tests.score.granules import write_gedi

GRID = Grid(crs=CRS.from_epsg(32610), transform=Affine(2.0, 0, 500_000, 0, -2.0, 4_900_400), shape=(200, 500))
SHOTS = 48
SEARCH = {"reach_m": 12.0, "step_m": 4.0}
NAMES = ("g/BEAM0101", "g/BEAM0110")


@pytest.fixture(scope="module")
def height(tmp_path_factory):
    """Stands of some 20 m in which crowns of some metres stand."""
    rng = np.random.default_rng(11)
    stands, crowns = (gaussian_filter(rng.normal(size=GRID.shape), sigma) for sigma in (8, 2))
    height_m = 18 + 5 * stands / stands.std() + 3 * crowns / crowns.std()
    path = tmp_path_factory.mktemp("map") / "map.tif"
    write_raster(path, np.maximum(height_m, 0).astype(np.float32)[None], grid=GRID, nodata=np.nan)
    return path


def tracks(height, east_m, north_m, noise_m=1.0, seed=0):
    """Two tracks of shots every 15 m whose heights are the map's, but for noise, at places so far off."""
    along = np.arange(SHOTS)
    x = np.concatenate([500_050 + 15.0 * along] * 2)
    y = np.concatenate([4_900_100 + 2.0 * along, 4_900_250 + 1.0 * along])
    track = np.repeat([0, 1], SHOTS)
    count = 2 * SHOTS
    shots = Shots(
        source="test", statistic="p98", crs=GRID.crs, x=x, y=y, height_m=np.zeros(count), radius_m=np.full(count, 8.0),
        half_length_m=np.zeros(count), azimuth_deg=np.zeros(count), date=np.full(count, "NaT", "datetime64[D]"),
        id=np.arange(count).astype(str), track=track, tracks=NAMES, read=count, dropped={},
    )  # fmt: skip
    truth = sample_footprints(height, shots, east_m=np.asarray(east_m)[track], north_m=np.asarray(north_m)[track])
    noise = np.random.default_rng(seed).normal(0, noise_m, count)
    return sample_footprints(height, dataclasses.replace(shots, height_m=truth.map_m + noise))


def test_each_track_is_moved_by_its_own_error(height):
    raw = tracks(height, east_m=(4.0, 0.0), north_m=(-4.0, 0.0))
    moved = relocate(height, raw, reach_m=8, step_m=4)
    first, second = moved.shifts
    assert (first.track, first.n, first.applied, first.east_m, first.north_m) == (NAMES[0], SHOTS, True, 4.0, -4.0)
    assert first.agreement_after > first.agreement_before
    assert (second.applied, second.reason) == (False, "the shots fit best where they are")
    assert moved.result.heights().mae_m < raw.heights().mae_m
    np.testing.assert_array_equal(moved.result.map_m[SHOTS:], raw.map_m[SHOTS:])
    assert moved.result.shots is raw.shots


@pytest.mark.slow
def test_a_bias_is_not_made_up_for(height):
    raw = tracks(height, east_m=(8.0, 0.0), north_m=(-4.0, 0.0))
    tall = dataclasses.replace(raw, shots=dataclasses.replace(raw.shots, height_m=raw.shots.height_m + 6))
    assert [s.east_m for s in relocate(height, tall, **SEARCH).shifts] == [8.0, 0.0]


@pytest.mark.slow
def test_heights_that_are_not_of_this_ground_move_nothing(height):
    """The best of 49 shifts always looks better than none; held out it does not."""
    raw = tracks(height, (0.0, 0.0), (0.0, 0.0))
    better = applied = 0
    for seed in range(4):
        shuffled = np.random.default_rng(seed).permutation(raw.shots.height_m)
        other = dataclasses.replace(raw, shots=dataclasses.replace(raw.shots, height_m=shuffled))
        moved = relocate(height, other, **SEARCH)
        applied += sum(shift.applied for shift in moved.shifts)
        better += sum((shift.east_m, shift.north_m) != (0, 0) for shift in moved.shifts)
    assert better >= 6  # the control: by its best agreement alone almost every track would have been moved
    assert applied <= 1


@pytest.mark.slow
def test_an_error_beyond_the_search_is_not_cut_to_its_end(height):
    moved = relocate(height, tracks(height, (12.0, 0.0), (0.0, 0.0)), **SEARCH)
    assert not moved.shifts[0].applied
    assert moved.shifts[0].reason == "the best fit is at the end of the search, 12 m, and may lie beyond it"
    assert relocate(height, tracks(height, (12.0, 0.0), (0.0, 0.0)), reach_m=16, step_m=4).shifts[0].applied


@pytest.mark.slow
def test_tracks_that_say_too_little_stay(height, tmp_path):
    raw = tracks(height, (8.0, 0.0), (0.0, 0.0))
    few = relocate(height, raw, **SEARCH, least_shots=SHOTS + 1)
    assert {shift.reason for shift in few.shifts} == {f"{SHOTS} shots are fewer than {SHOTS + 1}"}
    np.testing.assert_array_equal(few.result.map_m, raw.map_m)
    flat = dataclasses.replace(raw, shots=dataclasses.replace(raw.shots, height_m=np.full(2 * SHOTS, 9.0)))
    assert {shift.east_m for shift in relocate(height, flat, **SEARCH).shifts} == {None}


@pytest.mark.parametrize(("reach_m", "step_m"), [(20, 0), (4, 5), (float("inf"), 4), (20, float("nan"))])
def test_a_search_that_is_none_is_refused(height, reach_m, step_m):
    with pytest.raises(SourceError, match="are none; give 0 < step <= reach"):
        relocate(height, tracks(height, (0.0, 0.0), (0.0, 0.0)), reach_m=reach_m, step_m=step_m)


@pytest.mark.slow
def test_a_score_has_the_moved_tracks_beside_the_raw_ones(height, tmp_path):
    """Shots that lie 8 m east of where they say: the map would have to move west."""
    x, y = 500_050 + 15.0 * np.arange(SHOTS), 4_900_100 + 2.0 * np.arange(SHOTS)
    lon, lat = Transformer.from_crs(GRID.crs, WGS84, always_xy=True).transform(x, y)
    granule = write_gedi(tmp_path / "g.h5", count=SHOTS, lon_lowestmode=lon, lat_lowestmode=lat)
    rh = np.zeros((SHOTS, 101))
    rh[:, 98] = sample_footprints(height, read_gedi(granule), east_m=8.0).map_m
    rh[:, 98] += np.random.default_rng(3).normal(0, 0.5, SHOTS)
    write_gedi(granule, count=SHOTS, lon_lowestmode=lon, lat_lowestmode=lat, rh=rh)
    raw, moved = (
        score_map(height, References(gedi=(granule,), settings=ShotSettings(relocate=relocate)), resamples=20)
        for relocate in (False, True)
    )
    (raw,), (moved,) = raw.comparisons[0].maps, moved.comparisons[0].maps
    assert raw.registered is None
    assert moved.measures == raw.measures
    (shift,) = moved.registered.shifts
    assert (shift.site, shift.x_m, shift.y_m, shift.applied) == (NAMES[0], -8.0, 0.0, True)
    assert moved.registered.measures.n == raw.measures.n == SHOTS
    assert moved.registered.measures.mae_m.value < 0.6 < raw.measures.mae_m.value

"""Registration: planted shifts come back with the right sign, what cannot be registered stays, and heights move honestly."""

import importlib.util
import math
from functools import cache, partial
from pathlib import Path

import numpy as np
import pytest
from affine import Affine
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from pydantic import ValidationError
from pyproj import CRS
from scipy import ndimage

from canopy.grid import Grid
from canopy.raster import Pixels
from canopy.simulate import Conditions, ForestConfig, simulate_scene
from canopy.tiler import register
from canopy.tiler.register import (
    APPLIED,
    RegistrationSettings,
    Shift,
    measure_shift,
    robust_shift,
    shift_height,
)

GSD_M = 0.6
MARGIN_PX = 12
SETTINGS = RegistrationSettings(max_shift_m=5.0)


def pixels(image):
    return Pixels(data=image, valid=np.ones(image.shape[1:], np.bool_))


@cache
def scene(seed=1, side_px=128):
    """A nadir photograph of a mixed forest, and its heights with a margin of `MARGIN_PX`."""
    side = side_px + 2 * MARGIN_PX
    grid = Grid(crs=CRS.from_epsg(32631), transform=Affine(GSD_M, 0, 5e5, 0, -GSD_M, 1e5), shape=(side, side))
    forest = ForestConfig(cover=0.7, ponds=0, conditions=Conditions(sun_azimuth_deg=140, sun_elevation_deg=50))
    grown = simulate_scene(grid=grid, seed=seed, forest=forest)
    return grown.image[:, MARGIN_PX:-MARGIN_PX, MARGIN_PX:-MARGIN_PX], grown.height_m


def label(height, x_m, y_m):
    """The heights as a label that has to be moved by (x_m east, y_m north) to lie on the image."""
    moved = ndimage.shift(height, (y_m / GSD_M, -x_m / GSD_M), order=3, mode="nearest")
    return np.clip(moved[MARGIN_PX:-MARGIN_PX, MARGIN_PX:-MARGIN_PX], 0, None).astype(np.float32)


def shift(x_m=0.0, y_m=0.0, decision=APPLIED, *, reliable=True, score=0.3):
    return Shift(
        x_m=x_m, y_m=y_m, score_before=0.1, score_after=score, contrast=0.5, decision=decision, reliable=reliable
    )  # fmt: skip


# --- measuring -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("x_m", "y_m"), [(1.5, -0.9), (-2.3, 0.4)])
def test_a_planted_shift_comes_back(x_m, y_m):
    image, height = scene()
    found = measure_shift(pixels(image), label(height, x_m, y_m), GSD_M, SETTINGS)
    assert found.decision == APPLIED, found
    assert math.hypot(found.x_m - x_m, found.y_m - y_m) < 0.4 * GSD_M, found
    assert found.score_after > found.score_before


def test_east_is_x_and_north_is_y():
    """Every height lies two rows further down and three columns further left than what it belongs to in the image."""
    image, height = scene()
    down, left = MARGIN_PX - 2, MARGIN_PX + 3
    lying = height[down : down + 128, left : left + 128]
    np.testing.assert_array_equal(lying[2:, :-3], height[MARGIN_PX:, MARGIN_PX:][:126, 3:128])
    found = measure_shift(pixels(image), lying, GSD_M, SETTINGS)
    assert (found.x_m, found.y_m) == pytest.approx((3 * GSD_M, 2 * GSD_M), abs=0.5 * GSD_M)
    whole = Shift(**{**as_dict(found), "x_m": 3 * GSD_M, "y_m": 2 * GSD_M})
    back = shift_height(lying, whole, GSD_M)
    np.testing.assert_array_equal(back[:-2, 3:], height[MARGIN_PX:, MARGIN_PX:][:126, 3:128])
    assert np.isnan(back[-2:]).all()
    assert np.isnan(back[:, :3]).all()


def as_dict(found):
    return {name: getattr(found, name) for name in Shift.__slots__}


def test_an_aligned_pair_stays_where_it_is():
    image, height = scene()
    found = measure_shift(pixels(image), label(height, 0, 0), GSD_M, SETTINGS)
    assert math.hypot(found.x_m, found.y_m) < 0.3 * GSD_M, found


@pytest.mark.parametrize(("x_px", "y_px"), [(0.2, 0.1), (-0.1, 0.4), (0.3, -0.3)])
def test_what_is_nearly_in_place_is_not_made_worse(x_px, y_px):
    image, height = scene()
    found = measure_shift(pixels(image), label(height, x_px * GSD_M, y_px * GSD_M), GSD_M, SETTINGS)
    left = (x_px - found.x_m / GSD_M, y_px - found.y_m / GSD_M) if found.applied else (x_px, y_px)
    assert math.hypot(*left) < math.hypot(x_px, y_px) + 0.3, found


def test_a_shift_within_its_uncertainty_is_measured_and_kept(monkeypatch):
    image, height = scene()
    lying = label(height, 0.1 * GSD_M, 0.05 * GSD_M)
    found = measure_shift(pixels(image), lying, GSD_M, SETTINGS)
    assert "times its uncertainty" in found.decision
    assert found.reliable
    eager = RegistrationSettings(max_shift_m=5.0, min_gain=0.0)
    monkeypatch.setattr(register, "CONFIDENCE", 0.0)
    assert measure_shift(pixels(image), lying, GSD_M, eager).applied, "it is the uncertainty that keeps it"


def test_another_forest_is_not_registered():
    image, _ = scene()
    _, height = scene(seed=2)
    found = measure_shift(pixels(image), label(height, 0, 0), GSD_M, SETTINGS)
    assert not found.applied, found
    assert not found.reliable


def test_chance_is_told_from_a_match():
    """A quarter of the chip that belongs is beyond chance; the quarters of another forest and of noise are not."""
    image, height = scene()
    _, other = scene(seed=2)
    noise = np.random.default_rng(7).integers(0, 256, image.shape, dtype=np.uint8)
    quarter = slice(32, 96), slice(32, 96)

    def chance(of, heights):
        return register._match(pixels(of[:, *quarter]), heights[quarter], GSD_M, 5.0).chance

    lying = label(height, 0.6, -0.6)
    assert chance(image, lying) < 1e-6
    assert chance(image, label(other, 0, 0)) > SETTINGS.max_chance
    assert chance(noise, lying) > SETTINGS.max_chance


def test_noise_is_not_registered():
    _, height = scene()
    noise = np.random.default_rng(3).integers(0, 256, (3, 128, 128), dtype=np.uint8)
    assert not measure_shift(pixels(noise), label(height, 0, 0), GSD_M, SETTINGS).applied


def test_a_lawn_is_not_registered():
    image, _ = scene()
    found = measure_shift(pixels(image), np.full((128, 128), 0.1, np.float32), GSD_M, SETTINGS)
    assert found.decision.startswith("kept: canopy contrast 0.000")
    assert math.isnan(found.x_m)


def test_nothing_known_is_not_registered():
    image, height = scene()
    unknown = np.full((128, 128), np.nan, np.float32)
    assert measure_shift(pixels(image), unknown, GSD_M, SETTINGS).decision.startswith("kept: 0 m2")
    blind = Pixels(data=image, valid=np.zeros((128, 128), np.bool_))
    assert measure_shift(blind, label(height, 0, 0), GSD_M, SETTINGS).decision.startswith("kept: 0 m2")


def test_what_is_masked_has_no_part():
    image, height = scene()
    lying = label(height, 1.2, -0.6)
    valid = np.ones((128, 128), np.bool_)
    valid[:, 90:] = False
    lying[:20] = np.nan
    rng = np.random.default_rng(4)
    results = []
    for _ in range(2):
        spoilt = image.copy()
        spoilt[:, ~valid] = rng.integers(0, 256, (3, int((~valid).sum())))
        results.append(measure_shift(Pixels(data=spoilt, valid=valid), lying, GSD_M, SETTINGS))
    assert results[0] == results[1]
    assert math.hypot(results[0].x_m - 1.2, results[0].y_m + 0.6) < 0.5 * GSD_M


def test_colours_and_units_do_not_matter():
    image, height = scene()
    lying = label(height, 1.2, -0.6)
    first = measure_shift(pixels(image), lying, GSD_M, SETTINGS)
    sixteen = measure_shift(pixels(image.astype(np.uint16) * 16), lying, GSD_M, SETTINGS)
    assert (sixteen.x_m, sixteen.y_m) == pytest.approx((first.x_m, first.y_m), abs=0.02)


def test_never_measures_and_keeps():
    image, height = scene()
    never = RegistrationSettings(max_shift_m=5.0, apply="never")
    found = measure_shift(pixels(image), label(height, 1.5, -0.9), GSD_M, never)
    assert found.decision == "kept: the recipe says never"
    assert found.reliable
    assert found.x_m == pytest.approx(1.5, abs=0.3)


def test_settings_refuse_what_they_do_not_know():
    with pytest.raises(ValidationError):
        RegistrationSettings(max_shift=3)


# --- acquisitions --------------------------------------------------------------------------------------------------------


def test_outliers_do_not_move_an_acquisition():
    rng = np.random.default_rng(5)
    good = [shift(2 + e, -1 + n) for e, n in rng.normal(0, 0.2, (10, 2))]
    wild = [shift(-5.0, 4.0), shift(6.0, 6.0), shift(50.0, 0.0, "kept: halves", reliable=False)]
    together = robust_shift(good + wild, SETTINGS)
    assert together.applied
    assert (together.x_m, together.y_m) == pytest.approx((2, -1), abs=0.25)


def test_an_acquisition_without_agreement_is_kept():
    assert "none of 2" in robust_shift([shift(reliable=False)] * 2, SETTINGS).decision
    assert "2 chips agree, below 3" in robust_shift([shift(2, 1)] * 2, SETTINGS).decision
    ring = [shift(4 * math.cos(a), 4 * math.sin(a)) for a in np.arange(12) * math.pi / 6]
    assert not robust_shift(ring, SETTINGS).applied
    assert "standard error" in robust_shift([shift(0.1 * (-1) ** k, 0.0) for k in range(8)], SETTINGS).decision


# --- moving --------------------------------------------------------------------------------------------------------------

heights = hnp.arrays(
    np.float32, (7, 9), elements=st.one_of(st.floats(0, 60, width=32), st.just(math.nan), st.just(math.nan))
)


@given(heights, st.integers(-10, 10), st.integers(-10, 10))
def test_whole_pixels_move_unchanged(height, east, north):
    moved = shift_height(height, shift(east * 0.5, north * 0.5), 0.5)
    for r in range(7):
        for c in range(9):
            q, p = r + north, c - east
            expected = height[q, p] if 0 <= q < 7 and 0 <= p < 9 else np.float32(np.nan)
            np.testing.assert_equal(moved[r, c], expected)


@given(heights, st.floats(-3, 3), st.floats(-3, 3))
def test_no_height_is_invented(height, east, north):
    moved = shift_height(height, shift(east, north), 1.0)
    assert moved.dtype == np.float32
    assert np.isfinite(moved).sum() <= np.isfinite(height).sum()
    if np.isfinite(moved).any():
        assert np.nanmin(moved) >= np.nanmin(height) - 1e-4
        assert np.nanmax(moved) <= np.nanmax(height) + 1e-4


@given(st.floats(-2, 2), st.floats(-2, 2))
def test_a_slope_moves_exactly(east, north):
    rows, cols = np.indices((12, 12))
    plane = (20 + 0.5 * cols - 0.25 * rows).astype(np.float32)
    moved = shift_height(plane, shift(east, north), 1.0)
    expected = 20 + 0.5 * (cols - east) - 0.25 * (rows + north)
    known = np.isfinite(moved)
    assert known.sum() >= 81
    np.testing.assert_allclose(moved[known], expected[known], atol=2e-3)


# --- blurring ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(31, 40), (3, 17), (1, 2)])
@pytest.mark.parametrize("sigma", [0.8, 3.3])
def test_blur_is_that_of_a_gaussian(shape, sigma):
    maps = np.random.default_rng(6).normal(size=(2, *shape)).astype(np.float32)
    expected = [ndimage.gaussian_filter(a.astype(np.float64), sigma, truncate=2.5) for a in maps]
    np.testing.assert_allclose(register._blurred(maps, sigma), expected, atol=2e-6)


# --- the judged experiment -----------------------------------------------------------------------------------------------


@cache
def bench():
    path = Path(__file__).parents[1] / "bench" / "bench_register.py"
    spec = importlib.util.spec_from_file_location("bench_register", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.slow
@pytest.mark.parametrize("site", ["IDTReeS", "TEAK", "OSBS", "NZ"])
def test_added_shifts_on_real_pairs_come_back(samples, site):
    rows = bench().real(samples, bench().SITES[site])
    consistent, reliable = bench().real_summary(site, rows)
    assert reliable >= 4
    assert consistent >= 0.8
    false = [r[5] for r in rows if r[5] is not None]
    assert sum(f.applied for f in false) <= 0.02 * len(false), "pairs that do not belong were registered"


@pytest.mark.slow
@pytest.mark.parametrize("longest_px", [5.0, 0.5])
@pytest.mark.parametrize("kind", ["grown", "photographed"])
def test_no_simulated_pair_is_made_worse(request, kind, longest_px):
    made = bench()
    if kind == "grown":
        make = partial(made.grown, nadir=True)
    else:
        make = partial(made.photographed, request.getfixturevalue("samples"), nadir=True)
    rows = made.simulated(make, range(100, 112), longest_px)
    median_px, worse = made.summary(f"{kind}, nadir, up to {longest_px} px", rows)
    assert worse == 0
    if longest_px == 5:
        assert median_px <= 0.15

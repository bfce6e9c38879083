"""Augmentation: every effect by itself, nothing where nothing is asked for, and no pixel made of what is not there."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.ndimage import gaussian_filter

from canopy.model.augmentation import (
    EVERYTHING,
    OFF,
    PLOT_PX,
    Augmentation,
    crop_side_px,
    dihedral,
    draw_light,
    plot,
    relight,
    rescale,
    smooth_field,
)

RGB = ("red", "green", "blue")
LIGHT_SWITCHES = (
    "gamma", "shadow", "haze", "blur_px", "noise", "contrast", "saturation", "brightness", "gain", "offset", "jpeg",
)  # fmt: skip
DRAWN_BY = {"gamma": ("log_gamma",)}
"""Fields of a light that a switch scales, where their name is not the switch's."""


def picture(side=64, bands=3, seed=0, dtype=np.uint8):
    """A smooth scene with some texture, away from black and white."""
    rng = np.random.default_rng(seed)
    shades = gaussian_filter(rng.normal(size=(bands, side, side)), (0, 4, 4)) * 300 + rng.normal(0, 8, (bands, side, side))
    grey = np.clip(120 + shades, 30, 220)
    return np.rint(grey * (np.iinfo(dtype).max / 255)).astype(dtype)


def lit(image, valid, amount, seed=1, *, bands=RGB, gsd_m=0.6, value_range=None):
    light = draw_light(amount, len(image), np.random.default_rng(seed))
    limits = value_range or (0.0, float(np.iinfo(image.dtype).max))
    return relight(image, valid, light, bands=bands, gsd_m=gsd_m, value_range=limits)


def only(switch, value=None):
    return OFF.model_copy(update={switch: getattr(EVERYTHING, switch) if value is None else value})


# --- switches ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_with_everything_off_an_image_comes_back_bit_for_bit(dtype):
    image, valid = picture(dtype=dtype), np.ones((64, 64), bool)
    for seed in range(5):
        out = lit(image, valid, OFF, seed)
        assert out.dtype == dtype
        np.testing.assert_array_equal(out, image)
    # Were the light to be applied all the same, rounding to [0, 1] and back would still be exact; a tenth of a grey value
    # of brightness is not, so this comparison can fail.
    barely = OFF.model_copy(update={"brightness": 0.01})
    assert any((lit(image, valid, barely, seed) != image).any() for seed in range(5))


@pytest.mark.parametrize("switch", LIGHT_SWITCHES)
def test_each_switch_works_alone(switch):
    image, valid = picture(), np.ones((64, 64), bool)
    valid[:5, 9:] = False
    image[:, ~valid] = 0
    outs = [lit(image, valid, only(switch), seed) for seed in range(6)]
    assert any((out[:, valid] != image[:, valid]).any() for out in outs)
    assert not any(out[:, ~valid].any() for out in outs)
    assert len({out.tobytes() for out in outs}) > 2  # drawn, not fixed


@pytest.mark.parametrize("switch", LIGHT_SWITCHES)
def test_a_switch_leaves_the_draws_of_the_others_alone(switch):
    """All the random numbers are drawn whether they are used or not."""
    everything = draw_light(EVERYTHING, 4, np.random.default_rng(3))
    without = draw_light(EVERYTHING.model_copy(update={switch: 0}), 4, np.random.default_rng(3))
    names = [field.name for field in dataclasses.fields(everything)]
    differ = {name for name in names if getattr(everything, name) != getattr(without, name)}
    assert differ == set(DRAWN_BY.get(switch, (switch,)))
    other = draw_light(EVERYTHING, 4, np.random.default_rng(4))
    assert {name for name in names if getattr(everything, name) != getattr(other, name)} > {"haze", "noise", "jpeg", "seeds"}


def test_amounts_stay_within_their_settings_and_reach_them():
    lights = [draw_light(EVERYTHING, 3, np.random.default_rng(seed)) for seed in range(400)]
    for name, limit, signed in (
        ("log_gamma", 0.2, True), ("haze", 0.15, False), ("blur_px", 0.7, False), ("noise", 0.02, False),
        ("contrast", 0.2, True), ("saturation", 0.3, True), ("brightness", 0.1, True),
    ):  # fmt: skip
        values = np.array([getattr(light, name) for light in lights])
        assert (np.abs(values) <= limit).all()
        assert np.abs(values).max() > 0.95 * limit
        assert ((values < 0).mean() > 0.4) == signed
    qualities = [light.jpeg for light in lights]
    assert (min(qualities), max(qualities)) == (60, 95)
    assert 0.4 < np.mean([light.cover > 0 for light in lights]) < 0.6


# --- what each does ------------------------------------------------------------------------------------------------------


def test_haze_brightens_shadow_darkens_and_both_know_their_colours():
    image, valid = picture(128), np.ones((128, 128), bool)
    grey = np.broadcast_to(np.uint8(100), (3, 128, 128))
    hazy = lit(image, valid, only("haze", 0.5))
    assert (hazy >= image).all()
    red, green, blue = (lit(grey, valid, only("haze", 0.5)).astype(float) - grey).mean(axis=(1, 2))
    assert blue > green > red > 0
    seed = next(s for s in range(50) if draw_light(only("shadow"), 3, np.random.default_rng(s)).cover > 0.3)
    dark = lit(grey, valid, only("shadow"), seed, gsd_m=1.0)
    assert (dark <= grey).all()
    red, green, blue = dark.astype(float).reshape(3, -1).min(axis=1)
    assert red < green < blue < 100  # the sky still lights it, and the sky is blue
    assert (dark[0] < 60).any()  # part of the ground,
    assert (dark[0] > 95).any()  # not all of it
    other = lit(grey, valid, only("shadow"), seed, bands=("swir16", "green", "blue"), gsd_m=1.0)
    np.testing.assert_array_equal(other[0], other[1])  # a band of another name is as green


def test_clouds_have_a_size_on_the_ground():
    fine, coarse = smooth_field((256, 256), 0.5, 2), smooth_field((64, 64), 2.0, 2)
    assert np.corrcoef(fine[1::4, 1::4].ravel(), coarse.ravel())[0, 1] > 0.99
    assert np.corrcoef(fine[:64, :64].ravel(), coarse.ravel())[0, 1] < 0.9  # as many pixels instead
    fields = np.stack([smooth_field((256, 256), 3.0, seed) for seed in range(60)])
    assert abs(fields.mean()) < 0.1
    assert abs(fields.std() - 1) < 0.1


def test_blur_is_the_modulation_transfer_that_its_setting_says():
    """At the Nyquist frequency a Gaussian of s px leaves (1 - 2q) / (1 + 2q), q = exp(-1 / 2s^2): stripes one pixel wide."""
    stripes = np.broadcast_to(np.where(np.arange(64) % 2, 178, 78).astype(np.uint8), (3, 64, 64))
    valid = np.ones((64, 64), bool)
    neutral = draw_light(OFF, 3, np.random.default_rng(0))
    for blur_px in (0.3, 0.5, 0.7):
        light = dataclasses.replace(neutral, blur_px=blur_px)
        out = relight(stripes, valid, light, bands=RGB, gsd_m=0.6, value_range=(0, 255)).astype(float)
        contrast = (out[:, :, 9:55:2].mean() - out[:, :, 8:54:2].mean()) / 100
        q = np.exp(-1 / (2 * blur_px**2))
        assert contrast == pytest.approx((1 - 2 * q) / (1 + 2 * q), abs=0.02)


def test_noise_grows_with_the_light():
    valid = np.ones((128, 128), bool)
    dark, bright = (np.full((3, 128, 128), grey, np.uint8) for grey in (26, 230))
    light = dataclasses.replace(draw_light(OFF, 3, np.random.default_rng(0)), noise=0.04)
    stds = [relight(i, valid, light, bands=RGB, gsd_m=0.6, value_range=(0, 255)).std() for i in (dark, bright)]
    expected = [0.04 * 255 * np.sqrt(0.25 + 0.75 * grey / 255) for grey in (26, 230)]
    np.testing.assert_allclose(stds, expected, rtol=0.03)


def test_colours_follow_their_formulas():
    """Contrast about the mean, saturation about grey, brightness, gain and offset of a band, against plain arithmetic."""
    image, valid = picture(), np.ones((64, 64), bool)
    valid[10:20, 30:] = False
    image[:, ~valid] = 0
    neutral = draw_light(OFF, 3, np.random.default_rng(0))
    light = dataclasses.replace(
        neutral, contrast=-0.2, saturation=0.25, brightness=0.04, gain=(0.1, -0.05, 0.0), offset=(0.0, 0.02, -0.03)
    )
    x = image / 255
    mean = x[:, valid].mean(axis=1)[:, None, None]
    z = mean + (x - mean) * 0.8
    grey = z.mean(axis=0)
    y = (grey + (z - grey) * 1.25) * np.array([1.1, 0.95, 1.0])[:, None, None]
    y = y + 0.04 + np.array([0.0, 0.02, -0.03])[:, None, None]
    expected = np.where(valid, np.rint(np.clip(y, 0, 1) * 255), 0)
    out = relight(image, valid, light, bands=RGB, gsd_m=0.6, value_range=(0, 255))
    assert np.abs(out - expected).max() <= 1  # float32
    assert (out == expected).mean() > 0.999


def test_a_jpeg_of_low_quality_is_further_away_and_blocks_start_anywhere():
    image, valid = picture(), np.ones((64, 64), bool)
    neutral = draw_light(OFF, 3, np.random.default_rng(0))

    def coded(quality, block=(0, 0)):
        light = dataclasses.replace(neutral, jpeg=quality, block_px=block)
        return relight(image, valid, light, bands=RGB, gsd_m=0.6, value_range=(0, 255)).astype(int)

    assert 0 < np.abs(coded(95) - image).mean() < np.abs(coded(40) - image).mean() < 20
    assert (coded(40) != coded(40, (3, 5))).any()
    four = np.concatenate([image, image[:1]])
    light = dataclasses.replace(draw_light(OFF, 4, np.random.default_rng(0)), jpeg=60)
    out = relight(four, valid, light, bands=(*RGB, "nir"), gsd_m=0.6, value_range=(0, 255))
    assert out.shape == four.shape
    assert 0 < np.abs(out[3].astype(int) - four[3]).mean() < 20


def test_sixteen_bit_images_in_their_own_range():
    image8, valid = picture(), np.ones((64, 64), bool)
    image16 = image8.astype(np.uint16) * 8
    smooth = EVERYTHING.model_copy(update={"jpeg": 0})
    out8 = lit(image8, valid, smooth)
    out16 = lit(image16, valid, smooth, value_range=(0.0, 2040.0))
    assert out16.dtype == np.uint16
    assert out16.max() <= 2040  # saturates where the imagery does, not where its type does
    assert np.abs(out16 / 8 - out8).max() <= 0.51


# --- pixels without imagery ----------------------------------------------------------------------------------------------


def test_what_lies_where_there_is_no_imagery_reaches_no_pixel():
    image, valid = picture(), np.ones((64, 64), bool)
    valid[20:40, 10:30] = False
    fills = [np.where(valid, image, fill).astype(np.uint8) for fill in (0, 255)]
    for seed in range(8):
        outs = [lit(each, valid, EVERYTHING, seed) for each in fills]
        np.testing.assert_array_equal(outs[0], outs[1])
        assert not outs[0][:, ~valid].any()
    # The same images without their masks do differ beside the hole, so a bleeding pixel would be seen.
    everywhere = np.ones_like(valid)
    bled = [lit(each, everywhere, only("blur_px", 2.0), 4) for each in fills]
    assert (bled[0][:, valid] != bled[1][:, valid]).any()


def test_haze_where_there_is_no_imagery_does_not_brighten_the_edge_of_what_there_is():
    valid = np.zeros((64, 64), bool)
    valid[10:50, 12:52] = True
    image = np.where(valid, np.full((3, 64, 64), 90, np.uint8), np.uint8(0))
    hazy = dataclasses.replace(draw_light(OFF, 3, np.random.default_rng(0)), haze=0.2, patchiness=0.0, blur_px=1.0)
    out = relight(image, valid, hazy, bands=RGB, gsd_m=0.6, value_range=(0, 255))[:, valid]
    assert (out == out[:, :1]).all()  # one colour stays one colour up to the edge
    assert (out > 90).all()
    # The veil over a hole that counts as imagery does reach its neighbours.
    bled = relight(image, np.ones_like(valid), hazy, bands=RGB, gsd_m=0.6, value_range=(0, 255))[:, valid]
    assert (bled != bled[:, :1]).any()


def test_rescaling_keeps_fill_and_unknown_heights_out():
    image, valid = picture(), np.ones((64, 64), bool)
    valid[20:40, 10:30] = False
    height_m = np.random.default_rng(0).uniform(0, 30, (64, 64)).astype(np.float32)
    height_m[~valid] = np.nan
    for side_px in (48, 96):
        outs = [rescale(np.where(valid, image, np.uint8(fill)), valid, height_m, side_px) for fill in (0, 255)]
        for one, other in zip(*outs, strict=True):
            np.testing.assert_array_equal(one, other)
        out, ok, h = outs[0]
        assert not out[:, ~ok].any()
        assert (np.isfinite(h) == ok).all()
        assert out[:, ok].min() >= image[:, valid].min()
        assert out[:, ok].max() <= image[:, valid].max()
        assert abs(ok.mean() - valid.mean()) < 0.03
        bled = [rescale(np.where(valid, image, np.uint8(fill)), np.ones_like(valid), height_m, side_px) for fill in (0, 255)]
        assert (bled[0][0][:, ok] != bled[1][0][:, ok]).any()


def test_an_image_without_imagery_stays_nothing():
    image, valid = np.zeros((3, 32, 32), np.uint8), np.zeros((32, 32), bool)
    assert not lit(image, valid, EVERYTHING).any()
    out, ok, h = rescale(image, valid, np.full((32, 32), np.nan, np.float32), 48)
    assert not out.any()
    assert not ok.any()
    assert np.isnan(h).all()


# --- place and scale -----------------------------------------------------------------------------------------------------


@given(
    rows=st.integers(1, 90),
    cols=st.integers(1, 90),
    row=st.integers(0, 30),
    col=st.integers(0, 30),
    seed=st.integers(0, 999),
)
def test_what_is_left_of_a_plot_is_a_square_inside_what_is_known(rows, cols, row, col, seed):
    known = np.zeros((128, 128), bool)
    known[row : row + rows, col : col + cols] = True
    down, across = plot(1.0, known, np.random.default_rng(seed))
    side = down.stop - down.start
    assert across.stop - across.start == side
    longest = max(rows, cols)
    assert min(PLOT_PX, longest) <= side <= longest
    for left, start, length in ((down, row, rows), (across, col, cols)):
        assert start <= left.start
        assert left.stop <= start + max(length, side)
    assert known[down, across].any()


def test_plots_of_all_sides_are_cut_as_often_as_asked_for():
    known, rng = np.ones((128, 128), bool), np.random.default_rng(0)
    cuts = [plot(0.5, known, rng) for _ in range(800)]
    sides = np.array([cut[0].stop - cut[0].start for cut in cuts if cut is not None])
    assert 0.45 < sides.size / 800 < 0.55
    assert sides.min() < PLOT_PX + 4
    assert sides.max() > 124
    assert abs(np.median(sides) - (PLOT_PX + 128) / 2) < 8
    assert all(plot(0.0, known, rng) is None for _ in range(50))
    assert plot(1.0, np.zeros_like(known), rng) is None


def test_the_eight_rotations_and_reflections_are_distinct_and_move_all_bands_alike():
    image = np.arange(2 * 9).reshape(2, 3, 3)
    seen = {dihedral(image, turns, flip).tobytes() for turns in range(4) for flip in (False, True)}
    assert len(seen) == 8
    moved = dihedral(image, 1, True)
    np.testing.assert_array_equal(moved[1] - moved[0], 9)


def test_heights_of_a_coarser_crop_are_those_of_its_points_gridded_again():
    """The old pixels as points, each falling into the new pixel that holds its centre, the highest counting."""
    rng = np.random.default_rng(0)
    for side, side_px in ((100, 64), (64, 32), (65, 64), (90, 64)):
        height_m = rng.uniform(0, 40, (side, side)).astype(np.float32)
        height_m[rng.random((side, side)) < 0.3] = np.nan
        image = np.zeros((1, side, side), np.uint8)
        _, ok, out = rescale(image, np.isfinite(height_m), height_m, side_px)
        expected = np.full((side_px, side_px), np.nan)
        for row in range(side):
            for col in range(side):
                at = int((row + 0.5) * side_px / side), int((col + 0.5) * side_px / side)
                expected[at] = np.fmax(expected[at], height_m[row, col])
        np.testing.assert_array_equal(out, expected.astype(np.float32))
        assert (ok == np.isfinite(expected)).all()
        assert np.nanmax(out) == np.nanmax(height_m)


def test_heights_of_a_finer_crop_are_those_of_the_pixel_they_lie_in():
    height_m = np.random.default_rng(0).uniform(0, 40, (24, 24)).astype(np.float32)
    image = np.zeros((1, 24, 24), np.uint8)
    _, _, out = rescale(image, np.ones((24, 24), bool), height_m, 48)
    np.testing.assert_array_equal(out, height_m.repeat(2, 0).repeat(2, 1))
    _, _, out = rescale(image, np.ones((24, 24), bool), height_m, 32)
    assert set(np.unique(out)) == set(np.unique(height_m))  # every old pixel is still somewhere, and no new value is


def test_image_and_heights_stay_in_place_when_rescaled():
    """A bright tall disc is where it was, in both, to a fraction of a pixel; moved by one pixel it would not be."""
    row, col = np.mgrid[:90, :90]
    inside = (row - 30.2) ** 2 + (col - 52.7) ** 2 < 12**2
    image = np.where(inside, np.uint8(200), np.uint8(40))[None].repeat(3, 0)
    height_m = np.where(inside, 20.0, 0.0).astype(np.float32)
    for side_px in (64, 72, 120):
        out, _, h = rescale(image, np.ones((90, 90), bool), height_m, side_px)
        r, q = np.mgrid[:side_px, :side_px]
        for weight in (out[0] - 40.0, h):
            centre = np.array([(weight * axis).sum() / weight.sum() + 0.5 for axis in (r, q)]) * 90 / side_px
            np.testing.assert_allclose(centre, [30.7, 53.2], atol=0.25)
    out, _, _ = rescale(picture(128), np.ones((128, 128), bool), np.zeros((128, 128), np.float32), 64)
    assert abs(out.mean() - picture(128).mean()) < 0.5


def test_a_coarser_image_is_averaged_not_sampled():
    stripes = np.broadcast_to(np.where(np.arange(96) % 2, 200, 50).astype(np.uint8), (1, 96, 96))
    out, _, _ = rescale(stripes, np.ones((96, 96), bool), np.zeros((96, 96), np.float32), 48)
    assert np.ptp(out[:, 4:-4, 4:-4]) <= 1
    assert np.ptp(stripes[:, ::2, ::2]) == 0  # sampled it would be all black or all white: the mean is neither
    assert abs(out.mean() - 125) < 3


@settings(max_examples=200)
@given(
    st.floats(0, 1), st.sampled_from([32, 64, 96, 256]), st.integers(0, 300), st.floats(0.3, 1), st.floats(1, 3),
    st.integers(0, 1000),
)  # fmt: skip
def test_a_crop_keeps_to_the_setting_the_chip_and_the_models_range(amount, side_px, more_px, low, high, seed):
    longest_px = side_px + more_px
    side = crop_side_px(amount, side_px, longest_px, (low, high), np.random.default_rng(seed))
    assert 1 <= side <= longest_px
    slack = 1e-9 * side_px
    assert max(low, 1 / (1 + amount)) * side_px - slack <= side <= min(high, 1 + amount) * side_px + slack
    if amount == 0:
        assert side == side_px


def test_scales_are_spread_evenly_in_their_logarithm():
    rng = np.random.default_rng(0)
    ratios = np.array([crop_side_px(0.5, 256, 512, (0.1, 10), rng) / 256 for _ in range(600)])
    u = np.sort((np.log(ratios) + np.log(1.5)) / (2 * np.log(1.5)))
    assert np.abs(u - (np.arange(600) + 0.5) / 600).max() < 1.63 / np.sqrt(600)  # Kolmogorov-Smirnov at 1 %


def test_settings_that_cannot_be_are_refused():
    with pytest.raises(ValueError, match="blur"):
        Augmentation(blur=0.5)
    with pytest.raises(ValueError, match="jpeg"):
        Augmentation(jpeg=100)

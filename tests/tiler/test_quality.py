"""Each check on a chip that is as it should be and on one with the fault planted, and all of them on real sites."""

import dataclasses
import json
import math
from collections import Counter
from datetime import date

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError
from pyproj import CRS
from scipy import ndimage
from scipy.stats import mannwhitneyu

from canopy.grid import Box, Lattice
from canopy.raster import Pixels, open_raster, read_raster
from canopy.simulate import ForestConfig, simulate_scene
from canopy.tiler import quality
from canopy.tiler.quality import (
    CHECKS,
    CUES,
    ChipFacts,
    JudgedChip,
    QualitySettings,
    Verdict,
    auc,
    excess_green,
    judge,
    judge_set,
    leafless_days,
    stripe_ratio,
)
from canopy.tiler.register import Shift

SETTINGS = QualitySettings()
SIDE = 160
GSD = 0.6


@pytest.fixture(scope="module")
def forest():
    """A grown forest, photographed in leaf: nothing is wrong with it."""
    left, top = 800_000, -8_000_000
    grid = Lattice(crs=CRS.from_epsg(32631), gsd_m=GSD).grid(Box(top, left, top + SIDE, left + SIDE))
    scene = simulate_scene(grid=grid, seed=5, forest=ForestConfig(ponds=0, roads=0, paths=0))
    return facts(scene.image, scene.height_m)


def facts(image, height_m, **more):
    valid = np.ones(height_m.shape, bool)
    return ChipFacts(image=Pixels(data=image, valid=valid), height_m=height_m.astype(np.float32), gsd_m=GSD, **more)


def changed(forest, *, image=None, height_m=None, **more):
    if image is not None:
        more["image"] = Pixels(data=image, valid=forest.image.valid)
    if height_m is not None:
        more["height_m"] = height_m.astype(np.float32)
    return dataclasses.replace(forest, **more)


def found(chip, settings=SETTINGS):
    return {finding.check: finding for finding in judge(chip, settings).findings}


def only(**tables):
    """Settings with the tables given and every other check off."""
    return QualitySettings.model_validate({name: tables.get(name, {"on": False}) for name in CHECKS})


@pytest.mark.slow
def test_a_simulated_forest_passes_every_check(forest):
    known = changed(
        forest, image_date=date(2020, 7, 1), lidar_date=date(2020, 8, 1), latitude_deg=45.0, shift=shift(0, 0, 0.0)
    )
    verdict = judge(known, SETTINGS)
    assert verdict.decision == "keep", verdict.reasons
    per_chip = [name for name in CHECKS if name not in ("unlike_the_site", "wrong_cover", "duplicate_chips")]
    assert all(verdict.values[name] is not None for name in per_chip)


# --- dates ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("days", "level"), [(0, None), (366, None), (367, "flag"), (1827, "flag"), (1828, "drop")])
def test_date_gap(forest, days, level):
    first = date(2015, 6, 1)
    last = date.fromordinal(first.toordinal() + days)
    for image, lidar in ((first, last), (last, first)):
        finding = found(changed(forest, image_date=image, lidar_date=lidar)).get("date_gap")
        assert (finding.level if finding else None) == level
        if finding:
            assert str(days) in finding.reason


def test_an_unknown_gap_is_unknown_and_a_known_one_needs_no_dates(forest):
    assert judge(changed(forest, image_date=date(2020, 7, 1)), SETTINGS).values["date_gap"] is None
    assert judge(changed(forest, gap_days=2000), SETTINGS).decision == "drop"


@pytest.mark.parametrize(
    ("day", "latitude", "leafless"),
    [
        (date(2020, 7, 1), 45, False),
        (date(2020, 1, 15), 45, True),
        (date(2020, 1, 15), -45, False),
        (date(2020, 7, 15), -45, True),
        (date(2020, 1, 15), 10, False),
        (date(2020, 4, 20), 35, False),
        (date(2020, 4, 20), 50, True),  # spring comes later further north
        (date(2020, 6, 25), 68, False),
    ],
)
def test_the_leafless_season(day, latitude, leafless):
    assert (leafless_days(day, latitude) > 0) is leafless


@given(st.dates(date(2000, 1, 1), date(2030, 12, 31)), st.floats(-75, 75))
def test_the_leafless_season_lasts_less_than_a_year_and_changes_by_a_day_a_day(day, latitude):
    value = leafless_days(day, latitude)
    assert -183 <= value <= 183
    if abs(latitude) >= 30:
        tomorrow = leafless_days(date.fromordinal(day.toordinal() + 1), latitude)
        assert abs(tomorrow - value) <= 2  # the turn of a leap year counts one day twice


def leafless(forest):
    """The forest with its trees in grey-brown."""
    grey = forest.image.data.mean(axis=0)
    brown = np.stack([grey * 1.05, grey * 0.97, grey * 0.95])
    return np.where(forest.height_m > 2, brown, forest.image.data).astype(np.uint8)


def test_leaf_off_needs_the_season_and_the_colour(forest):
    winter, summer = (
        {"image_date": date(2020, 1, 15), "latitude_deg": 45.0},
        {"image_date": date(2020, 7, 1), "latitude_deg": 45.0},
    )
    bare = leafless(forest)
    assert "leafless season (2020-01-15)" in found(changed(forest, image=bare, **winter))["leaf_off"].reason
    assert "unknown date" in found(changed(forest, image=bare))["leaf_off"].reason
    assert "leaf_off" not in found(changed(forest, image=bare, **summer))  # dead or brown, but not leaf-off
    assert "leaf_off" not in found(changed(forest, **winter))  # evergreen
    assert judge(changed(forest, height_m=np.zeros((SIDE, SIDE))), SETTINGS).values["leaf_off"] is None


def test_leaf_off_lidar_under_an_image_in_leaf(forest):
    summer, winter = date(2020, 7, 1), date(2020, 1, 15)

    def lidar(image, flown, latitude=45.0):
        return found(changed(forest, image_date=image, lidar_date=flown, latitude_deg=latitude)).get("leaf_off_lidar")

    assert lidar(summer, winter).level == "flag"
    assert lidar(summer, summer) is None
    assert lidar(winter, winter) is None
    assert lidar(summer, winter, latitude=5.0) is None


# --- heights -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("rows", "level"), [(0, None), (30, None), (40, "flag"), (100, "drop")])
def test_void_fraction(forest, rows, level):
    height = forest.height_m.copy()
    height[:rows] = np.nan
    finding = found(changed(forest, height_m=height)).get("void_fraction")
    assert (finding.level if finding else None) == level


def test_what_the_recipe_leaves_out_and_padding_are_no_voids(forest):
    height = forest.height_m.copy()
    height[:100] = np.nan
    left_out = np.zeros(height.shape, bool)
    left_out[:100] = True
    assert "void_fraction" not in found(changed(forest, height_m=height, left_out=left_out))
    padded = dataclasses.replace(changed(forest, height_m=height), image=Pixels(data=forest.image.data, valid=~left_out))
    assert judge(padded, SETTINGS).values["void_fraction"] == 0


def stripes(period_m, angle_deg=35.0):
    rows, cols = np.indices((SIDE, SIDE)) * GSD
    angle = math.radians(angle_deg)
    return np.sin(2 * np.pi * (rows * math.cos(angle) + cols * math.sin(angle)) / period_m)


@pytest.mark.parametrize("angle_deg", [0.0, 35.0, 90.0, 140.0])
@pytest.mark.parametrize("period_m", [4.0, 7.0])
def test_planted_stripes_are_found_and_their_distance_told(forest, period_m, angle_deg):
    wave = stripes(period_m, angle_deg)
    gone = np.random.default_rng(1).uniform(size=wave.shape) < 0.4 * (wave > 0.2)
    for striped in (forest.height_m + 1.5 * wave, np.where(gone, np.nan, forest.height_m)):
        finding = found(changed(forest, height_m=striped))["striping"]
        told = float(finding.reason.split("stripes ")[1].split(" m")[0])
        assert told == pytest.approx(period_m, rel=0.08)
    density = np.where(wave > 0, 9, 4) + np.random.default_rng(2).normal(0, 1, wave.shape)
    assert "pulse density" in found(changed(forest, density_per_m2=density.astype(np.float32)))["striping"].reason
    assert "striping" not in found(changed(forest, density_per_m2=np.full(wave.shape, 9, np.float32)))


def test_rows_of_trees_that_the_photograph_shows_are_no_scanner_stripes():
    rng = np.random.default_rng(3)
    wave = stripes(6.0)
    height = np.maximum(4 + 4 * wave + rng.normal(0, 0.5, wave.shape), 0)
    noise = rng.normal(0, 8, (3, SIDE, SIDE))
    shown = np.clip(np.array([90, 110, 70])[:, None, None] - 40 * wave + noise, 0, 255).astype(np.uint8)
    hidden = np.clip(np.array([90, 110, 70])[:, None, None] + noise, 0, 255).astype(np.uint8)
    assert "striping" not in found(facts(shown, height))
    assert found(facts(hidden, height))["striping"].value > 100


def test_a_straight_edge_is_no_stripe(forest):
    """Half a chip without returns, a road through it: power in one direction, but at all wavelengths."""
    rows, cols = np.indices((SIDE, SIDE))
    cut = np.where(rows * 0.8 + cols * 0.6 > 110, np.nan, forest.height_m)
    assert "striping" not in found(changed(forest, height_m=cut))
    road = np.where(np.abs(rows * 0.8 + cols * 0.6 - 110) < 6, 0, forest.height_m)
    assert "striping" not in found(changed(forest, height_m=road))


def test_the_stripe_ratio_of_noise_is_small_and_its_amplitude_that_of_the_wave():
    rng = np.random.default_rng(4)
    where = np.ones((SIDE, SIDE), bool)
    noise = ndimage.gaussian_filter(rng.normal(size=(SIDE, SIDE)), 1)
    ratio, _ = stripe_ratio(noise, where)
    assert ratio.max() < 25
    ratio, amplitude = stripe_ratio(noise + 2 * stripes(8.0, 0.0) + 0.3 * np.indices((SIDE, SIDE))[1], where)
    row, col = np.unravel_index(ratio.argmax(), ratio.shape)
    assert (abs(np.fft.fftfreq(SIDE)[row]), np.fft.fftfreq(SIDE)[col]) == (pytest.approx(GSD / 8.0, abs=1 / SIDE), 0)
    assert amplitude[row, col] == pytest.approx(2, rel=0.05)


@pytest.mark.parametrize(
    ("value", "share", "level"), [(81.0, 0, "flag"), (-0.6, 0, "flag"), (90.0, 0.05, "drop"), (79.0, 0.05, None)]
)
def test_height_range(forest, value, share, level):
    height = np.clip(forest.height_m, 0, 50)
    height.flat[: max(1, int(share * height.size))] = value
    finding = found(changed(forest, height_m=height), only(height_range={})).get("height_range")
    assert (finding.level if finding else None) == level


def test_spikes_stand_alone_and_tree_tops_do_not(forest):
    height = forest.height_m.copy()
    assert "height_spikes" not in found(forest)
    rng = np.random.default_rng(5)
    where = rng.integers(8, SIDE - 8, (60, 2))
    height[where[:, 0], where[:, 1]] += 40
    spiked = found(changed(forest, height_m=height))["height_spikes"]
    # A brute-force second implementation: the highest of the ring, pixel by pixel.
    check = SETTINGS.height_spikes
    expected = 0
    for row, col in np.argwhere(height > check.excess_m):
        around = np.pad(height, 5, constant_values=-np.inf)[row : row + 11, col : col + 11]
        distance = np.hypot(*np.mgrid[-5:6, -5:6]) * GSD
        ring = around[(distance > check.inner_m) & (distance <= 3.0)]
        expected += height[row, col] > ring.max() + check.excess_m
    assert expected > 40
    assert spiked.value * SIDE**2 == pytest.approx(expected)
    tower = forest.height_m.copy()
    tower[60:80, 60:80] = 60
    assert "height_spikes" not in found(changed(forest, height_m=tower))


def test_constant_heights_and_whole_metres(forest):
    height = forest.height_m
    assert found(changed(forest, height_m=np.where(height > 0.5, 25.5, 0)))["constant_heights"].level == "drop"
    assert found(changed(forest, height_m=np.minimum(height, np.quantile(height, 0.8))))["constant_heights"].level == "flag"
    assert "constant_heights" not in found(changed(forest, height_m=np.zeros_like(height)))  # bare ground is 0 m
    assert found(changed(forest, height_m=np.round(height)))["whole_metres"].level == "flag"
    assert "whole_metres" not in found(changed(forest, height_m=np.round(height, 1)))


# --- buildings and water -------------------------------------------------------------------------------------------------


def with_house(forest, *, colour=(170, 120, 110), pitch=0.3):
    """A gabled house of 18 by 12 m at an angle."""
    rows, cols = np.indices((SIDE, SIDE))
    x, y = ((cols - 80) * 0.8 + (rows - 80) * 0.6) * GSD, ((rows - 80) * 0.8 - (cols - 80) * 0.6) * GSD
    inside = (np.abs(x) < 9) & (np.abs(y) < 6)
    rng = np.random.default_rng(6)
    roof = 6.0 - pitch * np.abs(y) + rng.normal(0, 0.04, y.shape)
    image = np.where(inside, np.array(colour)[:, None, None] + rng.normal(0, 6, (3, *y.shape)), forest.image.data)
    return changed(
        forest, image=np.clip(image, 0, 255).astype(np.uint8), height_m=np.where(inside, roof, forest.height_m)
    ), inside


@pytest.mark.parametrize("pitch", [0.0, 0.5])
def test_a_planted_house_is_found(forest, pitch):
    chip, inside = with_house(forest, pitch=pitch)
    finding = found(chip)["buildings"]
    assert finding.value == pytest.approx(inside.mean(), rel=0.4)
    assert judge(forest, SETTINGS).values["buildings"] == 0


def test_a_house_of_crowns_roughness_or_of_green_is_not_found(forest):
    """Negative controls: each sign of a roof is needed."""
    assert "buildings" not in found(with_house(forest, colour=(60, 120, 50))[0])
    chip, inside = with_house(forest)
    rough = chip.height_m + np.where(inside, np.random.default_rng(7).normal(0, 0.8, inside.shape), 0)
    assert "buildings" not in found(changed(chip, height_m=rough))


def test_classes_go_before_looks(forest):
    chip, _ = with_house(forest)
    none = np.zeros((SIDE, SIDE), np.float32)
    some = none.copy()
    some[:20] = 1.0
    some[20:40] = np.nan
    assert "buildings" not in found(changed(chip, building_fraction=none))
    finding = found(changed(forest, building_fraction=some))["buildings"]
    assert finding.value == pytest.approx(20 / 140)
    assert "class 6" in finding.reason
    water = np.full((SIDE, SIDE), 0.5, np.float32)
    assert "class 9" in found(changed(forest, water_fraction=water))["water"].reason


def test_water_is_dark_smooth_and_low(forest):
    pond = np.indices((SIDE, SIDE))[0] < 60
    rng = np.random.default_rng(8)
    still = np.where(pond, np.array([35, 45, 50])[:, None, None] + rng.normal(0, 1.5, (3, SIDE, SIDE)), forest.image.data)
    still = np.clip(still, 0, 255).astype(np.uint8)
    low = np.where(pond, 0, forest.height_m)
    assert found(changed(forest, image=still, height_m=low))["water"].value == pytest.approx(60 / 160, abs=0.06)
    assert found(changed(forest, image=still, height_m=np.where(pond, np.nan, low)))["water"].value > 0.3
    assert "water" not in found(changed(forest, image=still, height_m=np.where(pond, 12, low)))  # a shadow on crowns
    bright = np.clip(still.astype(int) + np.where(pond, 120, 0), 0, 255).astype(np.uint8)
    assert "water" not in found(changed(forest, image=bright, height_m=low))  # a car park


def test_near_infrared_says_what_is_green_and_what_is_water(forest):
    chip, _ = with_house(forest)
    green = changed(chip, image=np.concatenate([chip.image.data, 2 * (chip.image.data[:1] // 3)]))
    alive = changed(chip, image=np.concatenate([chip.image.data, np.full((1, SIDE, SIDE), 250, np.uint8)]))
    assert "buildings" in found(green)
    assert "buildings" not in found(alive)
    assert judge(dataclasses.replace(alive, colours=("a", "b", "c", "d")), SETTINGS).values["buildings"] is None


# --- agreement -----------------------------------------------------------------------------------------------------------


@given(st.lists(st.integers(0, 20), min_size=4, max_size=60), st.randoms(use_true_random=False))
def test_auc_is_mann_whitney(values, random):
    positive = np.array([random.random() < 0.5 for _ in values])
    positive[:2] = True, False
    array = np.array(values, float)
    statistic = mannwhitneyu(array[positive], array[~positive]).statistic
    assert auc(array, positive) == pytest.approx(statistic / positive.sum() / (~positive).sum())


def test_excess_green():
    red, green, blue = (np.array([v], float) for v in (50, 100, 50))
    assert excess_green(red, green, blue) == pytest.approx(0.5)
    assert excess_green(red, red, red) == 0
    assert excess_green(0 * red, 0 * red, 0 * red) == 0


def test_a_label_of_another_place_disagrees(forest):
    assert judge(forest, SETTINGS).values["image_label_disagreement"] < 0.3
    other = np.roll(forest.height_m, (SIDE // 2, SIDE // 2), (0, 1))[::-1]
    assert judge(changed(forest, height_m=other), SETTINGS).values["image_label_disagreement"] > 0.4
    tall = forest.height_m > 2
    reverse = np.where(tall, 0, 15) + np.random.default_rng(9).normal(0, 1, tall.shape)
    assert found(changed(forest, height_m=reverse))["image_label_disagreement"].level in ("flag", "drop")
    assert judge(changed(forest, height_m=np.full((SIDE, SIDE), 9.0)), SETTINGS).values["image_label_disagreement"] is None


# --- registration --------------------------------------------------------------------------------------------------------


def shift(x_m, y_m, gain, decision="applied"):
    return Shift(x_m=x_m, y_m=y_m, score_before=0.1, score_after=0.1 + gain, contrast=0.3, decision=decision)


def test_shifts(forest):
    assert "shift_applied" not in found(changed(forest, shift=shift(1, 1, 0.1)))
    assert found(changed(forest, shift=shift(4, 3, 0.1)))["shift_applied"].value == 5
    assert found(changed(forest, shift=shift(4, 3, 0.1, "kept: too long")))["shift_left"].reason.count("kept: too long") == 1
    assert not found(changed(forest, shift=shift(4, 3, 0.001, "kept: no gain")))  # noise
    unknown = changed(forest, shift=shift(math.nan, math.nan, math.nan, "kept: no contrast"))
    assert judge(unknown, SETTINGS).values["shift_left"] is None


# --- the verdict ---------------------------------------------------------------------------------------------------------


def test_the_verdict_is_the_worst_and_its_columns_are_joined(forest):
    height = np.round(forest.height_m)
    height[:100] = np.nan
    verdict = judge(changed(forest, height_m=height), SETTINGS)
    assert verdict.decision == "drop"
    assert verdict.flags == "void_fraction;whole_metres"
    assert verdict.reasons.split("; ")[0] == "62% of the photographed pixels have no height (limit 0.6)"
    assert len(verdict.reasons.split("; ")) == len(verdict.findings) == 2
    assert Verdict.model_validate_json(verdict.model_dump_json()) == verdict


def test_no_sentence_holds_the_separator_of_the_column(forest):
    everything = QualitySettings.model_validate({
        name: {limit: 0.0 for limit in QualitySettings().model_dump()[name] if limit.startswith("flag")} for name in CHECKS
    })  # fmt: skip
    chip = changed(
        with_house(forest)[0],
        image_date=date(2020, 7, 1),
        lidar_date=date(2010, 1, 1),
        latitude_deg=45.0,
        shift=shift(1, 1, 1),
    )
    findings = judge(chip, everything).findings
    assert len(findings) > 5
    assert all(";" not in finding.reason and finding.reason for finding in findings)


def test_checks_can_be_switched_off_and_limits_moved(forest):
    height = np.where(np.indices((SIDE, SIDE))[0] < 100, np.nan, forest.height_m)
    chip = changed(forest, height_m=height)
    off = QualitySettings.model_validate({"void_fraction": {"on": False}})
    assert "void_fraction" not in judge(chip, off).values
    never = QualitySettings.model_validate({"void_fraction": {"flag": 0.1, "drop": math.inf}})
    assert found(chip, never)["void_fraction"].level == "flag"


@pytest.mark.parametrize(
    "table",
    [
        {"void_fraction": {"flag": 0.7}},  # above the default drop
        {"void_fraction": {"flag": -0.1}},
        {"void_fraction": {"flag": math.nan}},
        {"void_fraction": {"limit": 0.1}},
        {"date_gap": {"flag": 10}},  # the unit is part of the name
        {"voids": {"flag": 0.1}},
    ],
)
def test_wrong_tables_are_refused(table):
    with pytest.raises(ValidationError):
        QualitySettings.model_validate(table)


def test_settings_survive_json():
    text = SETTINGS.model_dump_json()
    assert QualitySettings.model_validate_json(text) == SETTINGS
    assert "Infinity" in json.loads(text)["duplicate_chips"]["drop"]


def test_every_check_and_every_limit_is_documented():
    for name, info in QualitySettings.model_fields.items():
        assert len(info.annotation.__doc__) > 60, name
        assert info.annotation.__doc__ != quality._Check.__doc__


def test_an_empty_chip_is_unknown_and_no_error():
    nothing = facts(np.zeros((3, 64, 64), np.uint8), np.full((64, 64), np.nan))
    verdict = judge(nothing, SETTINGS)
    assert verdict.flags.startswith("void_fraction")
    outside = dataclasses.replace(nothing, image=Pixels(data=nothing.image.data, valid=np.zeros((64, 64), bool)))
    assert judge(outside, SETTINGS).decision == "keep"


@pytest.mark.parametrize("dtype", [np.uint16, np.float32])
@pytest.mark.parametrize("bands", [1, 2, 3, 4, 8])
def test_any_bands_and_types_are_judged(forest, bands, dtype):
    image = np.resize(forest.image.data, (bands, SIDE, SIDE)).astype(dtype) * 16
    assert judge(changed(forest, image=image), SETTINGS).values["void_fraction"] == 0


# --- among all chips -----------------------------------------------------------------------------------------------------


def judged(number, values, site="A", bounds=None):
    return JudgedChip(id=f"{site}{number:02}", site=site, verdict=Verdict(values=values), crs="EPSG:32610", bounds_m=bounds)


def test_a_chip_unlike_its_site_is_found_and_a_poor_site_is_not():
    rng = np.random.default_rng(10)
    good = [judged(i, {"image_label_disagreement": 0.15 + 0.02 * v}) for i, v in enumerate(rng.normal(size=20))]
    poor = [judged(i, {"image_label_disagreement": 0.40 + 0.05 * v}, "B") for i, v in enumerate(rng.normal(size=20))]
    odd = judged(99, {"image_label_disagreement": 0.42})
    verdicts = judge_set([*good, *poor, odd], SETTINGS)
    assert [chip for chip, verdict in verdicts.items() if verdict.flags] == ["A99"]
    assert "unlike_the_site" in verdicts["A99"].flags
    # A site of its own too small to compare with is compared with the set.
    alone = judged(1, {"image_label_disagreement": 0.42}, "C")
    assert judge_set([*good, alone], SETTINGS)["C01"].decision == "flag"
    assert judge_set([alone], SETTINGS)["C01"].values["unlike_the_site"] is None


def covers(kind, greenness, darkness, texture):
    values = {f"{k}_{cue}": None for k in ("tall", "low") for cue in CUES}
    return values | {f"{kind}_{cue}": v for cue, v in zip(CUES, (greenness, darkness, texture), strict=True)}


def test_forest_that_looks_like_open_ground_is_found():
    tall, low = (0.2, -0.3, 0.2), (0.05, -0.5, 0.05)
    both = {f"tall_{cue}": v for cue, v in zip(CUES, tall, strict=True)}
    both |= {f"low_{cue}": v for cue, v in zip(CUES, low, strict=True)}
    mixed = [judged(i, {name: v + 0.01 * math.sin(i) for name, v in both.items()}) for i in range(10)]
    field, wood = judged(50, covers("tall", 0.0, -0.7, 0.02)), judged(51, covers("low", 0.3, -0.2, 0.3))
    fine = [judged(52, covers("tall", 0.0, -0.2, 0.2)), judged(53, covers("low", 0.3, -0.6, 0.05))]  # brown forest, lawn
    verdicts = judge_set([*mixed, field, wood, *fine], SETTINGS)
    assert {chip: verdict.flags for chip, verdict in verdicts.items() if verdict.flags} == {
        "A50": "wrong_cover", "A51": "wrong_cover",
    }  # fmt: skip
    assert "open ground" in verdicts["A50"].reasons
    assert "forest" in verdicts["A51"].reasons


def test_duplicates_elsewhere_are_found_and_overlapping_windows_are_not():
    places = [(0, 0, 10, 10), (5, 0, 15, 10), (100, 0, 110, 10), None]
    chips = [judged(i, {}, bounds=bounds) for i, bounds in enumerate(places)]
    pairs = [("A00", "A01"), ("A02", "A00"), ("A00", "A02"), ("A03", "A02")]
    verdicts = judge_set(chips, SETTINGS, duplicates=pairs)
    assert {chip: verdict.values["duplicate_chips"] for chip, verdict in verdicts.items()} == {
        "A00": 1,
        "A01": 0,
        "A02": 2,
        "A03": 1,
    }
    assert verdicts["A01"].decision == "keep"
    assert "A00, A03" in verdicts["A02"].reasons


@given(st.permutations(range(12)))
def test_the_order_of_chips_does_not_matter_and_judging_twice_is_judging_once(order):
    chips = [judged(i, {"image_label_disagreement": 0.1 + 0.04 * i}, bounds=(i, 0, i + 0.5, 1)) for i in range(12)]
    pairs = [("A00", "A05"), ("A07", "A03")]
    expected = judge_set(chips, SETTINGS, duplicates=pairs)
    assert judge_set([chips[i] for i in order], SETTINGS, duplicates=pairs) == expected
    again = [dataclasses.replace(chip, verdict=expected[chip.id]) for chip in chips]
    assert judge_set(again, SETTINGS, duplicates=pairs) == expected


# --- real sites ----------------------------------------------------------------------------------------------------------


def pairs_of(samples, site, bands=None):
    for image in sorted((samples / "pairs" / site).glob("*_rgb.tif")):
        height, _ = read_raster(image.with_name(image.name.replace("_rgb.tif", "_chm.tif")))
        with open_raster(image) as raster:
            count = raster.count
        pixels, _ = read_raster(image, bands or tuple(range(1, count + 1)))
        height_m = np.where(height.valid, height.data[0], np.nan).astype(np.float32)
        yield image.stem, ChipFacts(image=pixels, height_m=height_m, gsd_m=0.5)


def verdicts_of(samples, site):
    chips = [JudgedChip(id=name, site=site, verdict=judge(chip, SETTINGS)) for name, chip in pairs_of(samples, site)]
    return judge_set(chips, SETTINGS)


@pytest.mark.parametrize("site", ["NEON_MLBS", "NEON_OSBS", "NEON_TEAK"])
def test_natural_forest_plots_are_kept(samples, site):
    decisions = Counter(verdict.decision for verdict in verdicts_of(samples, site).values())
    assert decisions["keep"] >= 0.95 * decisions.total()
    assert not decisions["drop"]


def test_french_towns_are_flagged_for_their_buildings(samples):
    verdicts = verdicts_of(samples, "FR_IGN_URBAN")
    assert all("buildings" in verdict.flags for verdict in verdicts.values())


def test_real_plots_with_the_heights_of_their_neighbours_disagree(samples):
    """The negative control of the agreement: the same plots, each with another one's heights."""
    chips = [chip for name, chip in pairs_of(samples, "NEON_OSBS") if name.startswith("idt_")]
    right = [judge(chip, SETTINGS).values["image_label_disagreement"] for chip in chips]
    wrong = [
        judge(dataclasses.replace(chip, height_m=other.height_m), SETTINGS).values["image_label_disagreement"]
        for chip, other in zip(chips, [*chips[1:], chips[0]], strict=True)
        if chip.height_m.shape == other.height_m.shape
    ]
    right, wrong = ([value for value in values if value is not None] for values in (right, wrong))
    assert np.median(right) < 0.22
    assert np.median(wrong) > 0.38


def test_stripes_and_houses_planted_into_real_plots_are_found(samples):
    for _, chip in pairs_of(samples, "NEON_TEAK"):
        rows, cols = np.indices(chip.height_m.shape) * 0.5
        wave = np.sin(2 * np.pi * (0.5 * rows + 0.87 * cols) / 3.5)
        gone = np.random.default_rng(11).uniform(size=wave.shape) < 0.5 * (wave > 0)
        assert "striping" in found(
            dataclasses.replace(chip, height_m=np.where(gone, np.nan, chip.height_m).astype(np.float32))
        )
        roof = (np.abs(rows - 20) < 5) & (np.abs(cols - 20) < 7)
        grey = np.where(roof, np.uint8(140), chip.image.data)
        house = dataclasses.replace(
            chip,
            image=Pixels(data=grey, valid=chip.image.valid),
            height_m=np.where(roof, 5 + 0.3 * rows, chip.height_m).astype(np.float32),
        )
        assert "buildings" in found(house)

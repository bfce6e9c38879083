"""Headroom by hand, what has no part in it, and that neither a large region nor a common class decides."""

import numpy as np
import pytest

from canopy.metrics import ClassSums
from canopy.score.sealed.headroom import RegionSums, floor_sums, floors, headroom

EDGES = (10.0,)


def region(parts, side_px=4):
    """Sums of a region from (label, base, prediction) rows of 4 x 4 squares."""
    sums = RegionSums(edges_m=EDGES)
    for number, (label, base, prediction) in enumerate(parts):
        arrays = [np.full((4, 4), value, np.float32) for value in (prediction, base, label)]
        sums.add(*arrays, first_px=(0, 4 * number), side_px=side_px, place="here")
    return sums


def score(regions, floor_m=0.0, least_px=1, resamples=200):
    floor = dict.fromkeys(regions, (floor_m, floor_m))
    return headroom(regions, floor, least_px=least_px, generator=np.random.default_rng(0), resamples=resamples)


def test_by_hand():
    found = score({"a": region([(5, 9, 6), (20, 10, 12)])}, floor_m=0.5)
    low, tall = (cell for cell in found.cells)
    assert low.headroom == pytest.approx((4 - 1) / (4 - 0.5))
    assert tall.headroom == pytest.approx((10 - 8) / (10 - 0.5))
    assert found.value == pytest.approx((low.headroom + tall.headroom) / 2)
    assert low.submission.bias_m == 1
    assert tall.submission.bias_m == -8


def test_the_base_model_scores_nothing_and_the_floor_everything():
    parts = [(5, 9, 9), (20, 10, 10)]
    assert score({"a": region(parts)}).value == 0
    assert score({"a": region([(label, base, label) for label, base, _ in parts])}).value == 1


def test_a_larger_region_has_no_more_say():
    small, large = region([(5, 9, 5), (20, 10, 20)]), region([(5, 9, 9), (20, 10, 10)] * 50)
    assert score({"a": small, "b": large}).value == pytest.approx(0.5)


def test_a_commoner_class_has_no_more_say():
    assert score({"a": region([(5, 9, 5)] + [(20, 10, 10)] * 30)}).value == pytest.approx(0.5)


def test_clipping_is_told():
    found = score({"a": region([(5, 9, 500), (20, 10, 20)])})
    assert [cell.headroom for cell in found.cells] == [-1, 1]
    assert found.value == 0
    assert found.unclipped < -50


def test_pixels_left_out_count_with_the_base_model():
    arrays = [np.full((4, 4), value, np.float32) for value in (5.0, 9.0, 5.0)]
    arrays[0][:, :2] = np.nan
    sums = RegionSums(edges_m=EDGES)
    sums.add(*arrays, first_px=(0, 0), side_px=2, place="here")
    found = score({"a": sums})
    assert found.value == pytest.approx(0.5)
    assert found.missing == 8


def test_cells_without_pixels_or_room_are_left_out_with_the_reason():
    found = score({"a": region([(5, 5.04, 5), (20, 10, 20)])}, least_px=16)
    assert "within 0.05 m of the floor" in found.cells[0].left_out
    assert found.value == 1
    assert score({"a": region([(5, 9, 5)])}, least_px=17) is None


def test_the_interval_comes_from_squares_and_is_paired():
    rng = np.random.default_rng(1)
    same = score({"a": region([(5, 5 + e, 5 + e / 2) for e in rng.uniform(1, 9, 30)])}, resamples=500)
    assert np.allclose(same.interval_95, 0.5, atol=1e-6), "half the base's error in each square is half in every draw"
    mixed = score({"a": region([(5, 9, 9 - 4 * share) for share in rng.uniform(0, 1, 30)])}, resamples=500)
    low, high = mixed.interval_95
    assert low < mixed.value < high
    assert 0.1 < high - low < 0.4  # 1.96 * 2 * 0.29 / sqrt(30) is 0.21
    assert score({"a": region([(5, 9, 6)])}).interval_95 is None


def test_the_floor_is_half_of_what_a_step_costs():
    ramp = np.tile(np.arange(20, dtype=np.float32), (20, 1))
    scored = np.ones((20, 20), bool)
    sums = floor_sums(ramp, scored, jitter_m=1.0, gsd_m=0.5, edges_m=EDGES)
    # Along the ramp two pixels are 2 m, across it nothing; the two directions of each meet the rim, where nothing is known.
    assert floors(sums)[0] == pytest.approx(sums.classes[0].mae_m / 2)
    assert 0.45 < floors(sums)[0] < 0.55
    for jitter_m, gsd_m, wanted in ((0.0, 0.5, 0.0), (0.25, 0.5, 0.125), (0.5, 2.0, 0.0625)):
        found = floors(floor_sums(ramp, scored, jitter_m=jitter_m, gsd_m=gsd_m, edges_m=EDGES))
        assert found[0] == pytest.approx(wanted, rel=0.06), "it grows linearly from 0, whatever the pixels"
    assert floors(ClassSums.zero(EDGES)) == (None, None)

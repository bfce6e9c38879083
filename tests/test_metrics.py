"""Sums that merge: equal to NumPy and scikit-learn in one shot, and the same for any grouping and order."""

import dataclasses
import math
import pickle
from functools import reduce
from operator import add

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import jaccard_score, mean_absolute_error, r2_score, root_mean_squared_error

from canopy.metrics import (
    CLASS_EDGES_M,
    BlockSums,
    ClassSums,
    CoverCounts,
    HeightSums,
    IntervalSums,
    by_class,
    class_index,
)


def scene(seed: int, shape=(61, 47), offset_m: float = 0.0):
    """Reference, prediction and valid of a made-up map with gaps in all three."""
    rng = np.random.default_rng(seed)
    reference = rng.gamma(2.0, 6.0, shape) * (rng.random(shape) > 0.2) + offset_m
    prediction = reference + rng.normal(0.7, 3.0, shape)
    prediction[rng.random(shape) < 0.1] = np.nan
    reference[rng.random(shape) < 0.1] = np.nan
    return prediction, reference, rng.random(shape) < 0.9


def counted(prediction, reference, valid):
    known = valid & ~np.isnan(prediction) & ~np.isnan(reference)
    return prediction[known], reference[known]


@st.composite
def partitions(draw):
    """A scene and its pixels dealt to up to nine parts, some empty, in any order."""
    shape = draw(st.tuples(st.integers(1, 12), st.integers(1, 12)))
    offset_m = draw(st.sampled_from([0.0, 3000.0, -5.0]))
    arrays = scene(draw(st.integers(0, 2**32 - 1)), shape, offset_m)
    parts = draw(st.lists(st.integers(0, 8), min_size=math.prod(shape), max_size=math.prod(shape)))
    return arrays, np.reshape(parts, shape), draw(st.permutations(range(9)))


def close(a, b) -> bool:
    """Equal counts, and equal sums up to the rounding of another order."""
    for f in dataclasses.fields(a):
        x, y = getattr(a, f.name), getattr(b, f.name)
        if isinstance(x, int):
            if x != y:
                return False
        elif not np.allclose(x, y, rtol=1e-9, atol=1e-6, equal_nan=True):
            return False
    return True


def tree_sum(sums):
    """Add neighbours pairwise, as a reduction over workers would."""
    while len(sums) > 1:
        sums = [reduce(add, sums[i : i + 2]) for i in range(0, len(sums), 2)]
    return sums[0]


def test_measures_equal_scikit_learn():
    prediction, reference, valid = scene(1)
    p, r = counted(prediction, reference, valid)
    sums = HeightSums.of(prediction, reference, valid)
    assert sums.n == p.size
    assert sums.mae_m == pytest.approx(mean_absolute_error(r, p), rel=1e-12)
    assert sums.rmse_m == pytest.approx(root_mean_squared_error(r, p), rel=1e-12)
    assert sums.r2 == pytest.approx(r2_score(r, p), rel=1e-12)
    assert sums.bias_m == pytest.approx((p - r).mean(), rel=1e-12)
    assert sums.nmae == pytest.approx((np.abs(p - r)[r >= 2] / r[r >= 2]).mean(), rel=1e-12)


def test_bias_is_prediction_minus_reference():
    assert HeightSums.of([12.0, 13.0], [10.0, 10.0]).bias_m == 2.5


def test_by_hand():
    sums = HeightSums.of([1.0, 5.0, 9.0], [0.0, 6.0, 12.0])
    assert (sums.mae_m, sums.bias_m) == (pytest.approx(5 / 3), -1.0)
    assert sums.rmse_m == pytest.approx(math.sqrt(11 / 3))
    assert sums.r2 == pytest.approx(1 - 11 / 72)
    assert sums.nmae == pytest.approx((1 / 6 + 3 / 12) / 2)


@given(partitions())
def test_heights_do_not_depend_on_grouping_or_order(case):
    (prediction, reference, valid), part, order = case
    whole = HeightSums.of(prediction, reference, valid)
    parts = [HeightSums.of(prediction[part == k], reference[part == k], valid[part == k]) for k in order]
    assert close(sum(parts, HeightSums()), whole)
    assert close(tree_sum(parts), whole)
    masked = [HeightSums.of(prediction, reference, valid & (part == k)) for k in order]
    assert close(sum(masked, HeightSums()), whole)


def test_average_of_r2_is_another_number():
    """Negative control: what the sums exist to avoid differs visibly on the very data of the test above."""
    prediction, reference, valid = scene(2)
    halves = [HeightSums.of(prediction[s], reference[s], valid[s]) for s in (slice(0, 5), slice(5, None))]
    whole = HeightSums.of(prediction, reference, valid)
    assert (halves[0] + halves[1]).r2 == pytest.approx(whole.r2, rel=1e-12)
    assert abs((halves[0].r2 + halves[1].r2) / 2 - whole.r2) > 1e-3


def test_variation_survives_a_large_offset():
    """Heights riding on 10 million metres: sums of squares lose the variation, merged deviations keep it."""
    rng = np.random.default_rng(3)
    reference = 1e7 + rng.normal(0.0, 1.0, 20_000)
    parts = [HeightSums.of(part, part) for part in np.split(reference, 100)]
    truth = float(np.square(reference - reference.mean()).sum())
    assert sum(parts, HeightSums()).reference_deviation_m2 == pytest.approx(truth, rel=1e-9)
    naive = float(np.square(reference).sum() - reference.sum() ** 2 / reference.size)
    assert abs(naive - truth) > 1e-3 * truth


def test_zero_is_neutral_to_the_bit():
    sums = HeightSums.of(*scene(4))
    assert sums + HeightSums() == sums
    assert HeightSums() + sums == sums


def test_empty_set_has_no_measures_and_no_warnings():
    for sums in (HeightSums(), HeightSums.of([np.nan], [1.0]), HeightSums.of(np.zeros((0, 3)), np.zeros((0, 3)))):
        assert all(math.isnan(v) for v in (sums.mae_m, sums.rmse_m, sums.bias_m, sums.r2, sums.nmae))
    assert math.isnan(HeightSums.of([3.0, 4.0], [5.0, 5.0]).r2), "R² of a reference that does not vary"


def test_missing_predictions_are_counted_and_zero_is_a_height():
    prediction = np.array([0.0, np.nan, np.nan, 4.0, np.nan])
    reference = np.array([0.0, 0.0, np.nan, np.nan, 3.0])
    sums = HeightSums.of(prediction, reference, np.array([True, True, True, True, False]))
    assert (sums.n, sums.n_missing, sums.mae_m) == (1, 1, 0.0)
    assert sums.summary()["n_missing"] == 1


def test_infinity_is_not_an_unknown():
    assert HeightSums.of([np.inf, 1.0], [1.0, 1.0]).mae_m == math.inf


def test_float32_input_is_summed_in_float64():
    reference = np.zeros(20_000_001, dtype=np.float32)
    assert HeightSums.of(reference + np.float32(1), reference).absolute_sum_m == 20_000_001.0


def test_shapes_and_mask_type_are_checked():
    with pytest.raises(AssertionError, match="differ in shape"):
        HeightSums.of(np.zeros((2, 3)), np.zeros((3, 2)))
    with pytest.raises(AssertionError, match="differ in shape"):
        HeightSums.of(np.zeros((2, 3)), np.zeros((2, 3)), np.ones(3, dtype=bool))
    with pytest.raises(AssertionError, match="bool is required"):
        HeightSums.of(np.zeros(3), np.zeros(3), np.ones(3, dtype=np.uint8))


def test_frozen_and_picklable():
    sums = HeightSums.of(*scene(5))
    with pytest.raises(dataclasses.FrozenInstanceError):
        sums.n = 0
    assert pickle.loads(pickle.dumps(sums)) == sums


# --- height classes


def test_classes_are_half_open_and_add_up():
    heights = [-0.3, 0.0, 1.99, 2.0, 4.99, 5.0, 29.99, 30.0, 80.0]
    assert class_index(heights).tolist() == [0, 0, 0, 1, 1, 2, 5, 6, 6]
    prediction, reference, valid = scene(6)
    sums = by_class(prediction, reference, valid=valid)
    assert close(sums.total, HeightSums.of(prediction, reference, valid))
    assert sums.labels == ("< 2 m", "2-5 m", "5-10 m", "10-15 m", "15-20 m", "20-30 m", ">= 30 m")
    p, r = counted(prediction, reference, valid)
    for k, (low, high) in enumerate(zip((-np.inf, *CLASS_EDGES_M), (*CLASS_EDGES_M, np.inf), strict=True)):
        inside = (r >= low) & (r < high)
        assert sums.classes[k].n == inside.sum()
        assert sums.classes[k].bias_m == pytest.approx((p - r)[inside].mean(), rel=1e-9)


@given(partitions(), st.lists(st.integers(-2, 40), unique=True, max_size=5).map(sorted))
def test_classes_do_not_depend_on_grouping_or_order(case, edges_m):
    (prediction, reference, valid), part, order = case
    whole = by_class(prediction, reference, edges_m, valid)
    merged = sum((by_class(prediction, reference, edges_m, valid & (part == k)) for k in order), ClassSums.zero(edges_m))
    assert all(close(a, b) for a, b in zip(merged.classes, whole.classes, strict=True))
    assert len(whole.labels) == len(whole.classes) == len(edges_m) + 1


def test_classes_with_other_edges_do_not_add():
    with pytest.raises(AssertionError, match="do not add up"):
        ClassSums.zero([1.0]) + ClassSums.zero([2.0])
    with pytest.raises(AssertionError, match="do not increase"):
        class_index([1.0], [5.0, 2.0])


# --- intervals


def test_intervals_by_hand():
    lower, upper = np.array([0.0, 0.0, 2.0, 5.0, np.nan, 1.0]), np.array([1.0, 2.0, 4.0, 5.0, 3.0, np.nan])
    reference = np.array([1.0, 3.0, 1.0, 5.0, 2.0, 2.0])
    sums = IntervalSums.of(lower, upper, reference)
    assert (sums.n, sums.n_missing, sums.n_below, sums.n_above) == (4, 2, 1, 1)
    assert sums.coverage == 0.5
    assert sums.mean_width_m == 1.25
    assert math.isnan(IntervalSums().coverage)
    with pytest.raises(AssertionError, match="lower end above"):
        IntervalSums.of([2.0], [1.0], [1.5])


@given(partitions(), st.floats(0.0, 5.0))
def test_intervals_do_not_depend_on_grouping_or_order(case, half_m):
    (prediction, reference, valid), part, order = case
    whole = IntervalSums.of(prediction - half_m, prediction + half_m, reference, valid)
    parts = (IntervalSums.of(prediction - half_m, prediction + half_m, reference, valid & (part == k)) for k in order)
    assert close(sum(parts, IntervalSums()), whole)
    p, r = counted(prediction, reference, valid)
    if p.size:
        assert whole.coverage == pytest.approx(((r >= p - half_m) & (r <= p + half_m)).mean())


# --- tree cover


@pytest.mark.parametrize("threshold_m", [2.0, 5.0])
def test_iou_equals_scikit_learn(threshold_m):
    prediction, reference, valid = scene(7)
    p, r = counted(prediction, reference, valid)
    counts = CoverCounts.of(prediction, reference, threshold_m, valid)
    assert counts.iou == pytest.approx(jaccard_score(r >= threshold_m, p >= threshold_m))
    assert counts.n_both + counts.n_prediction_only + counts.n_reference_only + counts.n_neither == p.size
    assert counts.n_missing == HeightSums.of(prediction, reference, valid).n_missing > 0


def test_cover_of_bare_ground_has_no_iou():
    assert math.isnan(CoverCounts.of([0.0, 1.9], [0.0, 0.0]).iou)
    assert CoverCounts.of([2.0], [2.0]).iou == 1.0


@given(partitions())
def test_cover_does_not_depend_on_grouping_or_order(case):
    (prediction, reference, valid), part, order = case
    parts = (CoverCounts.of(prediction, reference, 5.0, valid & (part == k)) for k in order)
    assert sum(parts, CoverCounts(threshold_m=5.0)) == CoverCounts.of(prediction, reference, 5.0, valid)


def test_covers_at_other_thresholds_do_not_add():
    with pytest.raises(AssertionError, match="do not add up"):
        CoverCounts(threshold_m=2.0) + CoverCounts(threshold_m=5.0)


# --- blocks


def test_block_r2_equals_block_means():
    prediction, reference, _ = scene(8, (60, 90))
    prediction, reference = np.nan_to_num(prediction), np.nan_to_num(reference)
    sums = BlockSums.of(prediction, reference, block_m=9.0, gsd_m=0.6)
    assert (sums.side_px, sums.side_m) == (15, 9.0)
    p, r = (a.reshape(4, 15, 6, 15).mean(axis=(1, 3)).ravel() for a in (prediction, reference))
    heights = sums.heights()
    assert heights.n == 24
    assert heights.r2 == pytest.approx(r2_score(r, p), rel=1e-9)


@given(
    st.integers(0, 2**32 - 1),
    st.tuples(st.integers(2, 30), st.integers(2, 30)),
    st.tuples(st.integers(-50, 50), st.integers(-50, 50)),
    st.integers(1, 9),
    st.data(),
)
def test_blocks_cut_by_tiles_are_completed(seed, shape, first, side_px, data):
    prediction, reference, valid = scene(seed, shape)
    size = {"block_m": float(side_px), "gsd_m": 1.0}
    whole = BlockSums.of(prediction, reference, valid, **size, row0=first[0], col0=first[1])
    row, col = data.draw(st.integers(1, shape[0] - 1)), data.draw(st.integers(1, shape[1] - 1))
    tiles = [(slice(a, b), slice(c, d)) for a, b in ((0, row), (row, shape[0])) for c, d in ((0, col), (col, shape[1]))]
    merged = BlockSums.zero(**size)
    for i in data.draw(st.permutations(range(4))):
        rows, cols = tile = tiles[i]
        args = {"row0": first[0] + rows.start, "col0": first[1] + cols.start}
        merged = merged + BlockSums.of(prediction[tile], reference[tile], valid[tile], **size, **args)
    assert np.array_equal(merged.block, whole.block)
    assert np.array_equal(merged.n, whole.n)
    assert close(merged, whole)
    assert close(merged.heights(least_fraction=0.3), whole.heights(least_fraction=0.3))


def test_blocks_with_few_pixels_are_reported_missing():
    prediction = np.zeros((4, 8))
    prediction[:, 5:] = np.nan
    sums = BlockSums.of(prediction, np.ones((4, 8)), block_m=4.0, gsd_m=1.0)
    assert (sums.n.tolist(), sums.n_missing) == ([16, 4], 12)
    assert (sums.heights().n, sums.heights().n_missing) == (1, 1)
    assert sums.heights(least_fraction=0.25).n == 2


def test_blocks_of_another_size_do_not_add():
    with pytest.raises(AssertionError, match="do not add up"):
        BlockSums.zero(block_m=30, gsd_m=1.0) + BlockSums.zero(block_m=30, gsd_m=0.5)
    with pytest.raises(AssertionError, match="smaller than a pixel"):
        BlockSums.zero(block_m=1, gsd_m=10.0)

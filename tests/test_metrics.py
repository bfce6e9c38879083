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
from scipy.ndimage import sobel
from scipy.stats import bootstrap
from sklearn.metrics import jaccard_score, mean_absolute_error, r2_score, root_mean_squared_error

from canopy.metrics import (
    BOOTSTRAPPED,
    CLASS_EDGES_M,
    BlockSums,
    ClassSums,
    CoverCounts,
    EdgeSums,
    HeightSums,
    IntervalSums,
    block_bootstrap,
    by_class,
    class_index,
    resample_sums,
    slope,
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


# --- edges


@pytest.mark.parametrize("gsd_m", [1.0, 0.5])
def test_slope_equals_scipy_and_that_of_a_plane(gsd_m):
    surface = np.random.default_rng(3).gamma(2.0, 6.0, (17, 23))
    expected = np.hypot(sobel(surface, axis=0), sobel(surface, axis=1)) / 8 / gsd_m
    np.testing.assert_allclose(slope(surface, gsd_m)[1:-1, 1:-1], expected[1:-1, 1:-1], rtol=1e-12)
    rows, cols = np.mgrid[:6, :7]
    np.testing.assert_allclose(slope(3 * rows + 4 * cols, gsd_m)[1:-1, 1:-1], 5 / gsd_m)
    assert np.isnan(slope(surface, gsd_m)).sum() == 17 * 23 - 15 * 21
    assert np.isnan(slope(surface[:2], gsd_m)).all()


def test_edges_by_hand():
    """A step of 8 m: 8 / 2 pixels / 0.5 m on either side of it, and nothing elsewhere."""
    reference = np.zeros((5, 8))
    reference[:, 4:] = 8.0
    sums = EdgeSums.of(reference / 2, reference, gsd_m=0.5)
    assert sums == EdgeSums(n=18, difference_sum=-24.0, absolute_sum=24.0, reference_sum=48.0)
    assert (sums.error, sums.bias, sums.reference_mean) == (24 / 18, -24 / 18, 48 / 18)
    # A step in the wrong place is wrong twice, and no bias.
    moved = np.roll(reference, 2, axis=1)
    moved[:, :2] = 0
    shifted = EdgeSums.of(moved, reference, gsd_m=0.5)
    assert shifted.bias == 0
    assert shifted.error == 2 * shifted.reference_mean
    assert math.isnan(EdgeSums().error)


def test_edges_leave_out_the_rim_of_what_is_unknown():
    prediction, reference = np.random.default_rng(0).gamma(2.0, 6.0, (2, 9, 9))
    hole, gap = reference.copy(), prediction.copy()
    hole[4, 4] = np.nan
    gap[4, 4] = np.nan
    whole = EdgeSums.of(prediction, reference, gsd_m=1.0)
    assert (whole.n, whole.n_missing) == (49, 0)
    assert EdgeSums.of(prediction, hole, gsd_m=1.0).n == 40
    missing = EdgeSums.of(gap, reference, gsd_m=1.0)
    assert (missing.n, missing.n_missing) == (40, 9)
    valid = np.ones((9, 9), bool)
    valid[4, 4] = False
    assert EdgeSums.of(prediction, reference, valid, gsd_m=1.0) == EdgeSums.of(prediction, hole, gsd_m=1.0)
    # The kernels do not read their centre, yet a pixel without a height has no slope.
    assert np.isnan(slope(hole, 1.0)[4, 4])


@given(st.integers(0, 2**32 - 1), st.integers(2, 40), st.integers(2, 30))
def test_edges_of_tiles_with_a_rim_are_those_of_the_whole(seed, row, col):
    prediction, reference, valid = scene(seed, (41, 31))
    whole = EdgeSums.of(prediction, reference, valid, gsd_m=0.6)
    parts = []
    for rows in (slice(0, row), slice(row, 41)):
        for cols in (slice(0, col), slice(col, 31)):
            wide = slice(max(rows.start - 1, 0), rows.stop + 1), slice(max(cols.start - 1, 0), cols.stop + 1)
            counted_px = np.zeros((41, 31), bool)
            counted_px[rows, cols] = True
            arrays = (prediction[wide], reference[wide], valid[wide])
            parts.append(EdgeSums.of(*arrays, gsd_m=0.6, counted=counted_px[wide]))
    assert close(tree_sum(parts), whole)
    # Without the rim, pixels at the seams would be lost.
    cut = EdgeSums.of(prediction[:row], reference[:row], valid[:row], gsd_m=0.6)
    cut += EdgeSums.of(prediction[row:], reference[row:], valid[row:], gsd_m=0.6)
    assert cut.n <= whole.n


# --- the block bootstrap


def errors(rng, blocks=12, px=50, alike=2.0):
    """Sums of blocks whose errors have a part of their own and one that the whole block shares."""
    found = []
    for _ in range(blocks):
        reference = rng.gamma(2.0, 6.0, px)
        found.append(HeightSums.of(reference + rng.normal(0, alike) + rng.normal(0, 1.0, px), reference))
    return found


def test_bootstrap_equals_scipy():
    blocks = errors(np.random.default_rng(5))
    (resampled,) = block_bootstrap(blocks, generator=np.random.default_rng(0), resamples=20_000)

    def measure(name):
        def of(index):
            return getattr(sum((blocks[int(k)] for k in index), HeightSums()), name)

        return of

    for name in ("mae_m", "bias_m", "r2"):
        expected = bootstrap(
            (np.arange(12.0),), measure(name), n_resamples=1000, method="percentile", vectorized=False, rng=1
        ).confidence_interval
        width = expected.high - expected.low
        np.testing.assert_allclose(resampled.interval(name), tuple(expected), atol=0.1 * width)
        assert resampled.interval(name, 0.5)[1] < expected.high - 0.1 * width  # and it can tell intervals apart


def test_every_resample_has_the_measures_of_its_blocks():
    blocks = errors(np.random.default_rng(6), blocks=4)
    resampled, again = block_bootstrap(blocks, blocks, generator=np.random.default_rng(3), resamples=50)
    times = np.random.default_rng(3).multinomial(4, np.full(4, 1 / 4), size=50)
    for k, counts in enumerate(times):
        drawn = sum((block for block, n in zip(blocks, counts, strict=True) for _ in range(n)), HeightSums())
        for name in BOOTSTRAPPED:
            assert resampled.values[name][k] == pytest.approx(getattr(drawn, name), rel=1e-9, abs=1e-9)
    assert all(not (resampled - again).values[name].any() for name in resampled.values)


def test_every_resample_of_other_sums_has_the_measures_of_its_blocks():
    """Edges, tree cover and intervals, of two sets from the same draws."""
    rng = np.random.default_rng(8)
    edges, covers, intervals = [], [], []
    for _ in range(4):
        prediction, reference, valid = scene(int(rng.integers(2**31)), (9, 8))
        edges.append(EdgeSums.of(prediction, reference, gsd_m=0.5))
        covers.append(CoverCounts.of(prediction, reference, 5.0, valid))
        intervals.append(IntervalSums.of(prediction - 3, prediction + 3, reference, valid))
    times = np.random.default_rng(3).multinomial(4, np.full(4, 1 / 4), size=30)
    for blocks, names in ((edges, ("error", "bias")), (covers, ("iou",)), (intervals, ("coverage", "mean_width_m"))):
        resampled, again = resample_sums(blocks, blocks, measures=names, generator=np.random.default_rng(3), resamples=30)
        for k, counts in enumerate(times):
            first, *others = [block for block, n in zip(blocks, counts, strict=True) for _ in range(n)]
            drawn = sum(others, first)
            for name in names:
                assert resampled.values[name][k] == pytest.approx(getattr(drawn, name), rel=1e-9, nan_ok=True)
        np.testing.assert_equal(resampled.values, again.values)
        assert resampled.blocks == 4


def test_intervals_hold_the_truth_and_those_of_single_pixels_do_not():
    """Blocks that share an error: what their bootstrap says of the bias is right, what single pixels say is far too sure."""
    rng = np.random.default_rng(11)
    held, held_by_pixels = 0, 0
    for _ in range(100):
        error = rng.normal(0, 2.0, 25)[:, None] + rng.normal(0, 1.0, (25, 8))
        blocks = [HeightSums.of(e, np.zeros(8)) for e in error]
        single = [HeightSums(n=1, error_sum_m=e) for e in error.ravel()]
        (by_block,) = block_bootstrap(blocks, generator=rng, resamples=300)
        (by_pixel,) = block_bootstrap(single, generator=rng, resamples=300)
        low, high = by_block.interval("bias_m")
        held += low <= 0 <= high
        low, high = by_pixel.interval("bias_m")
        held_by_pixels += low <= 0 <= high
    assert 0.86 <= held / 100 <= 0.99
    assert held_by_pixels / 100 < 0.7


def test_differences_are_paired():
    """Two maps that fail at the same places: their difference is surer than either."""
    rng = np.random.default_rng(2)
    hard = rng.gamma(1.0, 5.0, 25)
    one = [HeightSums.of(rng.normal(0, h, 200), np.zeros(200)) for h in hard]
    other = [HeightSums.of(rng.normal(0, h + 0.5, 200), np.zeros(200)) for h in hard]
    a, b = block_bootstrap(one, other, generator=np.random.default_rng(0))
    low, high = (a - b).interval("mae_m")
    assert high < 0
    assert high - low < 0.2 * np.subtract(*a.interval("mae_m")[::-1])
    (c,) = block_bootstrap(other, generator=np.random.default_rng(1))  # other draws: not paired, and nothing can be said
    assert (a - c).interval("mae_m")[1] > 0


def test_one_block_has_no_interval_and_neither_has_r2_of_flat_ground():
    (alone,) = block_bootstrap(errors(np.random.default_rng(0), 1), generator=np.random.default_rng(0))
    assert all(math.isnan(end) for end in alone.interval("mae_m"))
    flat = [HeightSums.of([1.0, 2.0], [0.0, 0.0]), HeightSums.of([1.0, 5.0], [0.0, 3.0])]
    (resampled,) = block_bootstrap(flat, generator=np.random.default_rng(0))
    assert math.isfinite(resampled.interval("mae_m")[0])
    assert not math.isfinite(resampled.interval("r2")[0])
    with pytest.raises(AssertionError, match="not pairs"):
        block_bootstrap(flat, flat[:1], generator=np.random.default_rng(0))

"""Windows cut from a known map and blended again must be that map, whatever the layout, the box and the sheets."""

from itertools import accumulate

import numpy as np
import pytest
from hypothesis import assume, example, given
from hypothesis import strategies as st

from canopy.grid import Box, Layout, iter_windows, sheets_over
from canopy.mosaicker import blend
from canopy.mosaicker.blend import Blend, Strip, window_weights
from tests.strategies import layouts


@st.composite
def scenes(draw):
    """A layout and a box of a few windows, anywhere."""
    layout = draw(layouts(most_px=96))
    assume(layout.stride_px >= 8)  # below it there are hundreds of windows and nothing new
    row, col = draw(st.integers(-10_000, 10_000)), draw(st.integers(-10_000, 10_000))
    return layout, Box(row, col, row + draw(st.integers(1, 120)), col + draw(st.integers(1, 120)))


def field(box, seed=0):
    """Heights and spreads on the quantum, functions of the lattice pixel alone."""
    rows = np.arange(box.row0, box.row1)[:, None].astype(np.int64)
    cols = np.arange(box.col0, box.col1)[None, :].astype(np.int64)
    mixed = (rows * 7919 + cols * 104_729 + seed * 31) % 1931
    return (mixed / 32).astype(np.float32), (mixed % 97 / 32).astype(np.float32)


def own(layout, row, col, seed=0):
    """What window (row, col) predicts when all windows agree."""
    return field(layout.window_box(row, col), seed)


def random_window(layout, row, col, seed=0):
    """What window (row, col) predicts on its own: the same whoever asks."""
    rng = np.random.default_rng([seed, row + 100_000, col + 100_000])
    shape = (layout.window_px, layout.window_px)
    return rng.random(shape, np.float32) * 40, rng.random(shape, np.float32) * 5


def everywhere(layout, row, col):
    return np.ones((layout.window_px, layout.window_px), bool)


def holes(share):
    def usable(layout, row, col):
        """Half of what is missing is missing in every window, half only in this one."""
        rows, cols = np.meshgrid(*(np.arange(*layout.window_span(i)) for i in (row, col)), indexing="ij")
        gone = (rows.astype(np.int64) * 31 + cols * 17) % 100 < share * 50
        return ~gone & (np.random.default_rng([row + 100_000, col + 100_000]).random(gone.shape) > share / 2)

    return usable


def mosaic(layout, box, predict=own, usable=everywhere, seed=0):
    """The blend of one sheet as `predict_sheet` runs it: strip after strip."""
    sums = Blend(layout, box)
    mean, spread = np.full(box.shape, -1, np.float32), np.full(box.shape, -1, np.float32)
    rows = layout.windows_over(box.row0, box.row1)
    strips: list[Strip] = []
    for row in rows:
        for col in layout.windows_over(box.col0, box.col1):
            use = usable(layout, row, col)
            m, s = predict(layout, row, col, seed)
            sums.add(row, col, np.where(use, m, np.nan), np.where(use, s, np.nan), use)
        strip = sums.take(layout.support_span(row + 1)[0] if row != rows[-1] else box.row1)
        if strip is not None:
            strips.append(strip)
    for strip in strips:
        here = strip.box.slices_in(box)
        assert (mean[here] == -1).all(), "rows come out twice"
        mean[here], spread[here] = strip.mean_m, strip.spread_m
    assert sum(strip.box.shape[0] for strip in strips) == box.shape[0]
    return mean, spread


def oracle(layout, box, predict, usable, seed=0):
    """The law of total variance in float64 with all windows in memory at once."""
    weight, first, second, within = (np.zeros(box.shape) for _ in range(4))
    along = window_weights(layout).astype(float)
    for row, col in iter_windows(layout, box):
        part = layout.window_box(row, col).intersect(box)
        here, there = part.slices_in(box), part.slices_in(layout.window_box(row, col))
        w = np.outer(along, along)[there] * usable(layout, row, col)[there]
        m, s = (a[there].astype(float) for a in predict(layout, row, col, seed))
        weight[here] += w
        first[here] += w * m
        second[here] += w * m * m
        within[here] += w * s * s
    with np.errstate(invalid="ignore", divide="ignore"):
        mean = first / weight
        between = np.maximum(second / weight - mean**2, 0)
        return mean, np.sqrt(within / weight + between)


# --- weights -------------------------------------------------------------------------------------------------------------


@given(layout=layouts(most_px=256), first=st.integers(-50, 50))
def test_weights_sum_to_exactly_one_in_float32(layout, first):
    """In any order and grouping, since each is a multiple of a power of two."""
    w = window_weights(layout)
    reach = layout.window_px // layout.stride_px + 2
    assume(reach < 200)
    stop = layout.stride_px
    total = np.zeros(stop, np.float32)
    for index in range(-reach, reach + 1):
        start, end = layout.window_span(index)
        low, high = max(start, 0), min(end, stop)
        if low < high:
            total[low:high] += w[low - start : high - start]
    assert (total == np.float32(1)).all()
    assert w.dtype == np.float32
    assert (w >= 0).all()
    assert (w * 2 * layout.feather_px == np.rint(w * 2 * layout.feather_px)).all()
    assert float(w.sum(dtype=np.float64)) == layout.stride_px


@given(scene=scenes())
def test_products_of_weights_sum_to_exactly_one(scene):
    layout, box = scene
    along = window_weights(layout)
    total = np.zeros(box.shape, np.float32)
    for row, col in iter_windows(layout, box):
        part = layout.window_box(row, col).intersect(box)
        total[part.slices_in(box)] += np.outer(along, along)[part.slices_in(layout.window_box(row, col))]
    assert (total == np.float32(1)).all()


# --- the identity --------------------------------------------------------------------------------------------------------


@given(scene=scenes(), seed=st.integers(0, 99))
def test_cut_then_mosaic_is_the_identity(scene, seed):
    layout, box = scene
    mean, _ = mosaic(layout, box, seed=seed)
    np.testing.assert_array_equal(mean, field(box, seed)[0])


@given(scene=scenes(), sheet_px=st.integers(7, 90), seed=st.integers(0, 9))
def test_sheets_hold_the_same_bits(scene, sheet_px, seed):
    layout, box = scene
    whole = mosaic(layout, box, random_window, holes(0.3), seed)
    for sheet in sheets_over(box, max(sheet_px, max(box.shape) // 3)):
        for one, all_ in zip(mosaic(layout, sheet, random_window, holes(0.3), seed), whole, strict=True):
            np.testing.assert_array_equal(one, all_[sheet.slices_in(box)])


@given(scene=scenes(), data=st.data())
def test_a_part_holds_the_same_bits(scene, data):
    layout, box = scene
    row, col = data.draw(st.integers(box.row0, box.row1 - 1)), data.draw(st.integers(box.col0, box.col1 - 1))
    part = Box(row, col, data.draw(st.integers(row + 1, box.row1)), data.draw(st.integers(col + 1, box.col1)))
    whole = mosaic(layout, box, random_window)
    for one, all_ in zip(mosaic(layout, part, random_window), whole, strict=True):
        np.testing.assert_array_equal(one, all_[part.slices_in(box)])


@given(scene=scenes(), height=st.integers(0, 96 * 32), spread=st.integers(0, 20 * 32))
@example(scene=(Layout(window_px=96, stride_px=8), Box(0, 0, 1, 1)), height=554, spread=1)  # 144 windows a pixel
def test_constant_in_constant_out(scene, height, spread):
    layout, box = scene
    height_m, spread_m = np.float32(height / 32), np.float32(spread / 32)

    def constant(layout, row, col, seed):
        shape = (layout.window_px, layout.window_px)
        return np.full(shape, height_m), np.full(shape, spread_m)

    mean, out = mosaic(layout, box, constant)
    assert (mean == height_m).all()
    np.testing.assert_allclose(out, spread_m, rtol=1e-6, atol=rounding_m(layout, height_m, spread_m))


def rounding_m(layout, height_m, spread_m):
    """What float32 sums of squares may cost the spread: half a unit in the last place of the sum for every window that is
    added to it, and a few for the mean, its square and their difference."""
    windows = (-(-layout.window_px // layout.stride_px)) ** 2
    eps = (4 + windows / 2) * np.finfo(np.float32).eps * (height_m**2 + spread_m**2)
    return np.sqrt(spread_m.astype(float) ** 2 + eps) - spread_m + 1e-6


# --- spread --------------------------------------------------------------------------------------------------------------


@given(scene=scenes(), seed=st.integers(0, 99), share=st.sampled_from([0.0, 0.3, 0.8]))
def test_spread_follows_the_law_of_total_variance(scene, seed, share):
    layout, box = scene
    usable = holes(share) if share else everywhere
    mean, spread = mosaic(layout, box, random_window, usable, seed)
    mean_wanted, spread_wanted = oracle(layout, box, random_window, usable, seed)
    np.testing.assert_allclose(mean, mean_wanted, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(spread**2, spread_wanted**2, rtol=1e-4, atol=2e-3)


def test_disagreement_raises_the_spread():
    """Two windows, 10 m and 20 m with a spread of 1 m: halfway between them 15 m and sqrt(1 + 5^2) m."""
    layout, box = Layout(window_px=64, stride_px=48), Box(0, 0, 200, 200)

    def two(layout, row, col, seed):
        shape = (64, 64)
        return np.full(shape, np.float32(10 + 10 * (col % 2))), np.ones(shape, np.float32)

    mean, spread = mosaic(layout, box, two)
    assert spread.min() == pytest.approx(1.0, abs=1e-4)
    w = (mean - 10) / 10
    np.testing.assert_allclose(spread, np.sqrt(1 + 100 * w * (1 - w)), atol=1e-3)
    assert spread.max() == pytest.approx(np.sqrt(26), abs=2e-2)


# --- unusable windows ----------------------------------------------------------------------------------------------------


@given(scene=scenes(), share=st.sampled_from([0.2, 0.6, 1.0, 2.0]))
def test_nan_only_where_all_windows_abstain(scene, share):
    layout, box = scene
    usable = holes(share)
    mean, spread = mosaic(layout, box, own, usable)
    along = window_weights(layout)
    somebody = np.zeros(box.shape, bool)
    for row, col in iter_windows(layout, box):
        part = layout.window_box(row, col).intersect(box)
        there = part.slices_in(layout.window_box(row, col))
        somebody[part.slices_in(box)] |= usable(layout, row, col)[there] & (np.outer(along, along)[there] > 0)
    np.testing.assert_array_equal(np.isfinite(mean), somebody)
    np.testing.assert_array_equal(np.isfinite(spread), somebody)
    # the others are taken at their word, not diluted by those that abstain
    np.testing.assert_allclose(mean[somebody], field(box)[0][somebody], rtol=1e-6)


# --- negative controls ---------------------------------------------------------------------------------------------------


def shifted(layout):
    return np.roll(window_weights(layout), 1)


def triangle(layout):
    n = layout.window_px
    return np.minimum(np.arange(1, n + 1), np.arange(n, 0, -1)).astype(np.float32) / n


def test_wrong_weights_are_found(monkeypatch):
    """A blend that divides by the sum hides wrong weights from constants and from the identity: the sum itself tells."""
    layout, box = Layout(window_px=64, stride_px=48), Box(-10, -20, 90, 100)
    for wrong in (shifted, triangle):
        total = np.zeros(box.shape, np.float32)
        for row, col in iter_windows(layout, box):
            part = layout.window_box(row, col).intersect(box)
            w = np.outer(wrong(layout), wrong(layout))
            total[part.slices_in(box)] += w[part.slices_in(layout.window_box(row, col))]
        assert not (total == 1).all()
    original = mosaic(layout, box, random_window)[0]
    monkeypatch.setattr(blend, "window_weights", triangle)
    assert not np.array_equal(mosaic(layout, box, random_window)[0], original)


def test_a_window_that_is_misplaced_breaks_the_identity():
    layout, box = Layout(window_px=64, stride_px=48), Box(0, 0, 150, 150)

    def late(layout, row, col, seed):
        return own(layout, row, col + (row == 1 and col == 1))

    assert not np.array_equal(mosaic(layout, box, late)[0], field(box)[0])


def test_order_and_place_are_asserted():
    layout, box = Layout(window_px=64, stride_px=48), Box(0, 0, 100, 100)
    one = np.ones((64, 64), np.float32)
    sums = Blend(layout, box)
    sums.add(0, 1, one, one, one > 0)
    with pytest.raises(AssertionError, match="row-major"):
        sums.add(0, 0, one, one, one > 0)
    with pytest.raises(AssertionError, match="no weight"):
        sums.add(50, 0, one, one, one > 0)
    sums = Blend(layout, box)
    sums.take(60)
    with pytest.raises(AssertionError, match="already taken"):
        sums.add(0, 0, one, one, one > 0)


def test_memory_is_one_band():
    layout = Layout(window_px=64, stride_px=48)
    small, large = (Blend(layout, Box(0, 0, rows, 500))._sums.nbytes for rows in (100, 100_000))
    assert small == large == 3 * 64 * 500 * 4


def test_strips_partition_the_rows():
    layout, box = Layout(window_px=64, stride_px=48), Box(-7, 0, 143, 10)
    sums = Blend(layout, box)
    tops = [layout.support_span(row)[0] for row in layout.windows_over(box.row0, box.row1)]
    strips = [strip for strip in map(sums.take, [*tops[1:], box.row1]) if strip is not None]
    assert [strip.box.row0 for strip in strips] == list(
        accumulate([strip.box.shape[0] for strip in strips[:-1]], initial=box.row0)
    )
    assert strips[-1].box.row1 == box.row1

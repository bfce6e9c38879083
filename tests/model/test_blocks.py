"""The error of means over ground: measured where neighbours err alike, whatever cuts the rasters the squares come from."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.ndimage import gaussian_filter

from canopy.model.blocks import LEAST_BLOCKS, BlockKey, BlockMeans, BlockTable, block_coverage, fit_blocks, mean_interval

GSD_M = 2.0


def key(site="A", crs="EPSG:32611"):
    return BlockKey(site=site, crs=crs, gsd_m=GSD_M)


def ground(seed, *, correlation_px, side_px=240):
    """(mean, half-width, true): errors of 3 m, alike over some pixels, and intervals that hold 90 % of them."""
    rng = np.random.default_rng(seed)
    noise = rng.normal(size=(side_px, side_px))
    error = gaussian_filter(noise, correlation_px, mode="wrap") if correlation_px else noise
    mean = np.full(error.shape, 20, np.float32)
    half = np.full(error.shape, 1.645 * 3, np.float32)
    return mean, half, (mean + 3 * error / error.std()).astype(np.float32)


def gathered(seeds, site="A", **options):
    means = BlockMeans()
    for seed in seeds:
        mean, half, true = ground(seed, **options)
        means.add(key(site), mean, half, true, np.ones(mean.shape, bool), row_px=1000 * seed, col_px=0)
    return means


def test_the_error_of_means_falls_as_fast_as_their_pixels_are_independent():
    """Independent pixels: sqrt(n). Pixels that err alike over more than the square: not at all."""
    alone = fit_blocks(gathered(range(4), correlation_px=0))
    alike = fit_blocks(gathered(range(12), correlation_px=30))
    for side_m, up, down in zip(alone.sides_m, alone.upper_factor, alone.lower_factor, strict=True):
        assert (up + down) / 2 == pytest.approx(GSD_M / side_m, rel=0.15)
    assert alike.upper_factor[0] > 0.8
    assert list(alike.upper_factor) == sorted(alike.upper_factor, reverse=True)


def test_squares_that_were_not_fitted_are_held_as_often_as_promised():
    table = fit_blocks(gathered(range(12), correlation_px=8))
    held = block_coverage(table, gathered(range(100, 112), correlation_px=8))
    for side_m in (10.0, 30.0):
        assert held[side_m].coverage == pytest.approx(0.9, abs=0.02), side_m
    # What dividing by the root of the number of pixels would hold.
    means = gathered(range(100, 104), correlation_px=8).table(30.0)
    naive = means["half_width_m"] * GSD_M / 30.0
    assert ((means["mean_m"] - means["true_m"]).abs() <= naive).mean() < 0.4


@settings(max_examples=12, deadline=None)
@given(row=st.integers(1, 89), col=st.integers(1, 89), first=st.tuples(st.integers(-500, 500), st.integers(-500, 500)))
def test_a_raster_cut_anywhere_gives_the_same_squares(row, col, first):
    mean, half, true = ground(1, correlation_px=2, side_px=90)
    counts = np.random.default_rng(0).random(mean.shape) < 0.9
    whole, cut = BlockMeans(), BlockMeans()
    whole.add(key(), mean, half, true, counts, row_px=first[0], col_px=first[1])
    for rows in (slice(0, row), slice(row, None)):
        for cols in (slice(0, col), slice(col, None)):
            part = (a[rows, cols] for a in (mean, half, true, counts))
            cut.add(key(), *part, row_px=first[0] + (rows.start or 0), col_px=first[1] + (cols.start or 0))
    assert len(whole.table(30.0)) >= 25
    for side_m in whole.sides_m:
        one, other = whole.table(side_m), cut.table(side_m)
        assert len(one) == len(other)
        np.testing.assert_allclose(one.drop(columns="site"), other.drop(columns="site"), rtol=1e-6)


def test_squares_of_other_sites_and_lattices_stay_apart():
    mean, half, true = ground(1, correlation_px=2)
    counts = np.ones(mean.shape, bool)
    means = BlockMeans([60.0])
    for each in (key("A"), key("B"), key("A", "EPSG:32612")):
        means.add(each, mean, half, true, counts, row_px=0, col_px=0)
    assert len(means.table(60.0)) == 3 * 64
    assert len(means.only("B").table(60.0)) == 64 == len(means.without("A").table(60.0))


def test_squares_of_which_little_is_known_do_not_count():
    mean, half, true = ground(1, correlation_px=2)
    counts = np.zeros(mean.shape, bool)
    counts[:30, :14] = True  # under half of the only square of 60 m
    true[0, 0] = np.nan
    means = BlockMeans([60.0])
    means.add(key(), mean, half, true, counts, row_px=0, col_px=0)
    assert means.table(60.0).empty
    assert fit_blocks(means) is None
    counts[:30, :20] = True
    means.add(key("C"), mean, half, true, counts, row_px=0, col_px=0)
    assert means.table(60.0)["site"].tolist() == ["C"]


def test_sides_with_few_squares_are_left_out():
    table = fit_blocks(gathered([1], correlation_px=2))
    assert table.sides_m == (10.0, 30.0)
    assert min(table.blocks) >= LEAST_BLOCKS
    assert table.measured is None


def test_a_side_that_a_site_is_too_small_for_is_left_out():
    """The easy large site alone would make means over 60 m look better than those over 30 m, whatever the small one is."""
    large, small = gathered(range(3), correlation_px=0), BlockMeans()
    for plot in range(120):
        mean, half, true = ground(plot, correlation_px=30, side_px=20)
        small.add(key("B"), mean, half, true, np.ones(mean.shape, bool), row_px=1000 * plot, col_px=0)
    for side_m, parts in large._parts.items():
        parts.extend(small._parts[side_m])
    assert fit_blocks(large.only("A")).sides_m == (10.0, 30.0, 60.0)
    assert fit_blocks(large).sides_m == (10.0, 30.0)


def test_every_site_weighs_the_same():
    few, many = gathered([1], correlation_px=0), gathered(range(2, 8), site="B", correlation_px=20)
    both = BlockMeans()
    for means in (few, many):
        for side_m, parts in means._parts.items():
            both._parts[side_m] += parts
    ten = [fit_blocks(each).upper_factor[0] for each in (few, both, many)]
    assert ten[0] < ten[1] < ten[2]
    assert ten[1] > 0.6 * ten[2], "six times as many squares of one site are not six times its weight"


def table(**changes):
    given = {
        "sides_m": (10.0, 40.0), "lower_factor": (0.8, 0.4), "upper_factor": (1.0, 0.5), "blocks": (200, 100),
        "sites": ("A",),
    }  # fmt: skip
    return BlockTable(**given | changes)


def test_between_sides_the_factor_is_linear_in_the_logarithm_and_beyond_them_it_is_theirs():
    lower, upper = mean_interval([20.0] * 4, [4.0] * 4, [1.0, 100.0, 400.0, 1e6], table())
    assert lower.tolist() == pytest.approx([16.8, 16.8, 20 - 4 * 0.6, 18.4])
    assert upper.tolist() == pytest.approx([24.0, 24.0, 23.0, 22.0])


def test_the_lower_end_stays_above_ground_and_unknown_stays_unknown():
    lower, upper = mean_interval([1.0, np.nan, 0.0], [4.0, 4.0, 0.0], [100.0] * 3, table())
    assert lower[0] == lower[2] == 0.0
    assert np.isnan(lower[1])
    assert np.isnan(upper[1])
    assert upper[2] == pytest.approx(0.25), "a half-width of 0 m counts as the floor"


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"sides_m": (40.0, 10.0)}, "do not ascend"),
        ({"blocks": (1,)}, "blocks has 1 entries for 2 sides"),
        ({"lower_factor": (-1.0, 1.0)}, "greater than or equal to 0"),
    ],
)
def test_a_table_that_contradicts_itself_is_refused(changes, said):
    with pytest.raises(ValueError, match=said):
        table(**changes)

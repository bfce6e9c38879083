"""Conformal intervals: the classical quantile as oracle, coverage on data the fit has not seen, and what breaks it."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from canopy.errors import RecipeError
from canopy.metrics import CLASS_EDGES_M
from canopy.model.calibration import (
    CalibrationTable,
    conformal_quantile,
    cross_coverage,
    fit_calibration,
    interval,
    measure_coverage,
    tables_without,
)


def forest(seed: int, n: int = 60_000, *, factor: float = 2.0, bias_m: float = 0.0, site: str = "A"):
    """Heights whose error is `factor` times the stated spread: an uncalibrated model."""
    rng = np.random.default_rng(seed)
    mean = rng.gamma(1.5, 8.0, n)
    spread = 0.5 + 0.15 * mean
    true = np.maximum(mean + bias_m + factor * spread * rng.normal(size=n), 0.0)
    return mean, spread, true, np.full(n, site)


def joined(*parts):
    return tuple(np.concatenate(columns) for columns in zip(*parts, strict=True))


@given(st.integers(20, 400), st.integers(0, 10))
@settings(max_examples=50, deadline=None)
def test_equal_weights_give_the_classical_quantile(n, seed):
    score = np.random.default_rng(seed).normal(size=n)
    expected = np.sort(score)[int(np.ceil((n + 1) * 0.95)) - 1]
    assert conformal_quantile(score, np.full(n, 1 / 7), 0.95) == expected


def test_too_few_scores_for_the_level_have_no_quantile():
    assert conformal_quantile(np.arange(18.0), np.ones(18), 0.95) == np.inf
    assert conformal_quantile(np.arange(19.0), np.ones(19), 0.95) == 18.0


@pytest.mark.parametrize("factor", [0.3, 1.0, 3.0])
def test_unseen_pixels_are_covered_overall_and_in_every_class(factor):
    table = fit_calibration(*forest(1, factor=factor))
    covered = measure_coverage(table, *forest(2, factor=factor)[:3])
    assert covered.total.coverage == pytest.approx(0.9, abs=0.01)
    for sums in covered.classes:
        assert sums.n < 5000 or sums.coverage == pytest.approx(0.9, abs=0.02)


def test_an_uncorrected_spread_does_not_cover():
    """The negative control: taking the spread at its word, as a normal's, covers far too little here."""
    word = CalibrationTable(edges_m=(0.0,), lower_factor=(1.645,), upper_factor=(1.645,), pixels=(1,), sites=("none",))
    assert measure_coverage(word, *forest(2, factor=3.0)[:3]).total.coverage < 0.6


def test_a_biased_model_gets_a_lopsided_interval_that_covers():
    mean, spread, true, site = forest(3, bias_m=4.0)
    table = fit_calibration(mean, spread, true, site)
    assert all(u > low for u, low in zip(table.upper_factor, table.lower_factor, strict=True))
    low_tail = measure_coverage(table, *forest(4, bias_m=4.0)[:3]).total
    assert low_tail.n_below / low_tail.n == pytest.approx(0.05, abs=0.01)
    assert low_tail.n_above / low_tail.n == pytest.approx(0.05, abs=0.01)


def test_every_site_weighs_the_same():
    small, large = forest(5, 4000, factor=4.0, site="small"), forest(6, 80_000, factor=1.0, site="large")
    both = fit_calibration(*joined(small, large), edges=(), least_tail=0.5)
    alone = fit_calibration(*large, edges=(), least_tail=0.5)
    half = fit_calibration(*joined(forest(5, 80_000, factor=4.0, site="small"), large), edges=(), least_tail=0.5)
    assert both.upper_factor[0] == pytest.approx(half.upper_factor[0], rel=0.05)
    assert both.upper_factor[0] > 1.5 * alone.upper_factor[0]
    assert both.sites == ("large", "small")


def test_classes_with_few_pixels_are_merged_and_none_are_lost():
    mean, spread, true, site = forest(7, 20_000)
    mean = np.where(mean > 20, 20.0, mean)  # nothing in the class from 30 m up
    table = fit_calibration(mean, spread, true, site, CLASS_EDGES_M, least_px=3000)
    assert set(table.edges_m) < {0.0, *CLASS_EDGES_M}
    assert sum(table.pixels) == 20_000
    assert min(table.pixels) >= 3000
    lowest = fit_calibration(mean + 40, spread, true + 40, site, CLASS_EDGES_M, least_px=3000)
    assert lowest.edges_m == (0.0,)


def test_coverage_of_a_site_never_comes_from_itself():
    easy, hard = forest(8, factor=1.0, site="easy"), forest(9, factor=5.0, site="hard")
    pixels = joined(easy, hard)
    left_out = cross_coverage(tables_without(*pixels), *pixels)
    assert left_out["hard"].total.coverage < 0.6
    assert left_out["easy"].total.coverage > 0.99
    # The same pixels looked at in-sample hide it.
    table = fit_calibration(*joined(easy, hard))
    assert measure_coverage(table, *joined(easy, hard)[:3]).total.coverage == pytest.approx(0.9, abs=0.03)


def test_one_site_has_no_cross_coverage():
    assert tables_without(*forest(10)) == {}


def test_too_few_pixels_are_refused_with_the_remedy():
    with pytest.raises(RecipeError, match="hold out more"):
        fit_calibration(*forest(11, 100))


def test_interval_holds_the_map_stays_above_ground_and_keeps_nan():
    table = CalibrationTable(
        edges_m=(0.0, 5.0), lower_factor=(3.0, 1.0), upper_factor=(2.0, 1.5), pixels=(1, 1), sites=("A",)
    )
    mean, spread = np.array([[0.0, 4.0], [10.0, np.nan]]), np.array([[0.0, 2.0], [4.0, 1.0]])
    lower, upper = interval(mean, spread, table)
    assert lower.dtype == upper.dtype == np.float32
    np.testing.assert_allclose(lower, [[0.0, 0.0], [6.0, np.nan]])
    np.testing.assert_allclose(upper, [[0.5, 8.0], [16.0, np.nan]])


@pytest.mark.parametrize("wrong", [{"lower_factor": (1.0,)}, {"edges_m": (1.0, 5.0)}, {"edges_m": (0.0, 0.0)}, {"x": 1}])
def test_inconsistent_tables_are_refused(wrong):
    good = {
        "edges_m": (0.0, 5.0),
        "lower_factor": (1.0, 1.0),
        "upper_factor": (1.0, 1.0),
        "pixels": (1, 1),
        "sites": ("A",),
    }
    CalibrationTable(**good)
    with pytest.raises(ValueError, match="validation error"):
        CalibrationTable(**good | wrong)


def test_the_misses_are_dealt_so_that_intervals_are_narrow_but_not_all_to_one_side():
    """Errors with a long tail above: the upper end costs more, so it may miss more often, up to the limit."""
    rng = np.random.default_rng(0)

    def lopsided(n):
        mean = rng.uniform(20, 29, n)
        return mean, np.ones(n), mean - 2 + rng.exponential(2.0, n), np.full(n, "A")

    fitted, fresh = lopsided(40_000), lopsided(40_000)[:3]
    equal, dealt, all_above = (fit_calibration(*fitted, least_tail=share) for share in (0.5, 0.25, 0.02))
    tables = {
        name: measure_coverage(t, *fresh).total for name, t in (("equal", equal), ("dealt", dealt), ("free", all_above))
    }
    for held in tables.values():
        assert held.coverage == pytest.approx(0.9, abs=0.01)
    assert tables["free"].mean_width_m < tables["dealt"].mean_width_m < 0.95 * tables["equal"].mean_width_m
    assert tables["dealt"].n_above / tables["dealt"].n == pytest.approx(0.075, abs=0.006)
    assert tables["equal"].n_above / tables["equal"].n == pytest.approx(0.05, abs=0.006)
    assert tables["free"].n_above / tables["free"].n > 0.09


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("n", "nominal"), [(199, 0.9), (2500, 0.8), (2500, 0.9)])
def test_the_quantiles_are_those_of_mapie(n, nominal):
    """Of one class and equal weights, the factors are the ends of MAPIE's asymmetric split-conformal interval of (true -
    mean)/spread around a prediction of 0."""
    from mapie.conformity_scores import AbsoluteConformityScore
    from mapie.regression import SplitConformalRegressor
    from sklearn.dummy import DummyRegressor

    mean, spread, true, site = forest(12, n, bias_m=1.5)
    settings = {"nominal": nominal, "least_px": 50, "spread_floor_m": 1e-6, "least_tail": 0.5}
    table = fit_calibration(mean, spread, true, site, edges=(), **settings)
    scaled = (true.astype(np.float64) - mean) / spread
    nothing = np.zeros((n, 1))
    oracle = SplitConformalRegressor(
        DummyRegressor(strategy="constant", constant=0.0).fit(nothing, scaled), confidence_level=nominal,
        conformity_score=AbsoluteConformityScore(sym=False), prefit=True,
    )  # fmt: skip
    oracle.conformalize(nothing, scaled)
    low, high = oracle.predict_interval(nothing[:1])[1][0, :, 0]
    assert (-table.lower_factor[0], table.upper_factor[0]) == pytest.approx((low, high), rel=1e-9)
    # The symmetric one is another interval: the oracle can tell.
    assert abs(low + high) > 0.05

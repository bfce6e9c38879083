"""The interval of a difference, against draws of errors that are known."""

import numpy as np
import pytest

from canopy.analyse.difference import (
    GAIN,
    LOSS,
    NO_DETECTABLE_CHANGE,
    UNKNOWN,
    Combination,
    change_class,
    checked_rule,
    difference_interval,
)
from canopy.errors import AnalysisError
from canopy.symbology import CHANGE_VALUES

Z90 = 1.6448536
A, B = (np.array([20.0]), np.array([17.0]), np.array([21.0])), (np.array([12.0]), np.array([8.0]), np.array([18.0]))


def test_sum_is_from_end_to_end():
    lower, upper = difference_interval(A, B, "sum")
    assert (lower[0], upper[0]) == (8 - 21, 18 - 17)


def test_root_sum_square_takes_each_side_as_it_is():
    lower, upper = difference_interval(A, B, "root-sum-square")
    assert lower[0] == pytest.approx(-8 - np.hypot(4, 1))
    assert upper[0] == pytest.approx(-8 + np.hypot(6, 3))
    assert upper[0] < 0 < difference_interval(A, B, "sum")[1][0], "the rule can decide"


@pytest.mark.parametrize("place", range(6))
@pytest.mark.parametrize("rule", ["sum", "root-sum-square"])
def test_what_is_unknown_anywhere_is_unknown(rule, place):
    given = [values.copy() for values in (*A, *B)]
    given[place][:] = np.nan
    lower, upper = difference_interval(tuple(given[:3]), tuple(given[3:]), rule)
    assert change_class(lower, upper)[0] == UNKNOWN


def false_rate(correlation, rule, *, width=1.0, spread=(2.0, 3.0)):
    """How often normal errors of two unchanged heights are called change by 90 % intervals of so many of their widths."""
    rng = np.random.default_rng(4)
    cov = [[spread[0] ** 2, correlation * spread[0] * spread[1]], [correlation * spread[0] * spread[1], spread[1] ** 2]]
    errors = rng.multivariate_normal([0, 0], cov, 200_000).T
    sides = [
        (20 + error, 20 + error - width * Z90 * s, 20 + error + width * Z90 * s)
        for error, s in zip(errors, spread, strict=True)
    ]
    kind = change_class(*difference_interval(*sides, rule))
    return np.isin(kind, (LOSS, GAIN)).mean()


@pytest.mark.parametrize("correlation", [-1.0, -0.5, 0.0, 0.5, 0.9])
def test_sum_holds_for_any_correlation(correlation):
    assert false_rate(correlation, "sum") < 0.102


@pytest.mark.parametrize("correlation", [0.0, 0.3, 0.9])
def test_root_sum_square_holds_where_errors_are_independent_or_alike(correlation):
    assert false_rate(correlation, "root-sum-square") < 0.102


def test_both_rules_are_as_wide_as_they_must_be_and_no_wider():
    """Negative controls: opposed errors, and narrower intervals, are found out."""
    assert false_rate(-1.0, "sum") == pytest.approx(0.1, abs=0.003)
    assert false_rate(0.0, "root-sum-square") == pytest.approx(0.1, abs=0.003)
    assert false_rate(-0.5, "root-sum-square") > 0.15
    assert false_rate(0.0, "root-sum-square", width=0.5) > 0.3


def test_classes_are_those_of_the_legend():
    lower, upper = np.array([[-5, -1, 0.5, np.nan, 0, -2]]), np.array([[-1, 3, 2, np.nan, 1, 0]])
    expected = [[LOSS, NO_DETECTABLE_CHANGE, GAIN, UNKNOWN, NO_DETECTABLE_CHANGE, NO_DETECTABLE_CHANGE]]
    np.testing.assert_array_equal(change_class(lower, upper), expected)
    names = {each.value: each.name for each in CHANGE_VALUES}
    assert names == {LOSS: "loss", GAIN: "gain", NO_DETECTABLE_CHANGE: "no detectable change", UNKNOWN: "unknown"}


def test_factors_stretch_each_side():
    lower, upper = Combination(rule="sum", lower_factor=0.5, upper_factor=2).interval(A, B)
    assert (lower[0], upper[0]) == (-8 - 0.5 * 5, -8 + 2 * 9)


def test_a_rule_that_does_not_exist_is_refused():
    assert checked_rule("sum") == "sum"
    with pytest.raises(AnalysisError, match="'mean'; give root-sum-square or sum"):
        checked_rule("mean")

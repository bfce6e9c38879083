"""Histograms of heights against numpy on the heights themselves."""

import numpy as np
import pytest

from canopy.analyse.histogram import HeightHistogram
from canopy.errors import RasterError
from canopy.mosaicker.quantum import quantise


def of(height_m, weight=None):
    histogram = HeightHistogram()
    histogram.add(height_m, np.ones_like(height_m) if weight is None else weight)
    return histogram


@pytest.fixture
def height_m():
    height_m = quantise(np.random.default_rng(3).gamma(1.5, 8, 4001) - 1)
    height_m[::7] = np.nan
    return height_m


def test_statistics_are_those_of_the_heights(height_m):
    known, histogram = height_m[np.isfinite(height_m)].astype(np.float64), of(height_m)
    assert histogram.total == known.size
    assert histogram.mean_m == pytest.approx(known.mean(), rel=1e-12)
    assert (histogram.quantile_m(0), histogram.max_m) == (known.min(), known.max())
    for level in (0, 0.05, 0.25, 0.5, 0.75, 0.95, 1):
        assert histogram.quantile_m(level) == np.quantile(known, level, method="inverted_cdf")
    for above_m in (-2, 0, 2, 5.03, 1000):
        assert histogram.share_above(above_m) == pytest.approx((known > above_m).mean(), abs=1e-12)


def test_weights_count(height_m):
    known = np.isfinite(height_m)
    weight = np.random.default_rng(4).integers(0, 5, height_m.size).astype(np.float32)
    repeated = np.repeat(height_m[known], weight[known].astype(int))
    weighted = of(height_m, weight)
    assert weighted.mean_m == pytest.approx(repeated.astype(np.float64).mean(), rel=1e-12)
    assert weighted.quantile_m(0.5) == np.quantile(repeated, 0.5, method="inverted_cdf")
    assert weighted.mean_m != pytest.approx(of(height_m).mean_m, rel=1e-6)


def test_parts_add_up_in_any_order(height_m):
    whole, parts = of(height_m), HeightHistogram()
    for part in np.array_split(height_m, 13)[::-1]:
        parts.add(part, np.ones_like(part))
    for some in (parts, whole):
        assert some.heights_m.size == some.weights.size
    there = [np.flatnonzero(some.weights) for some in (parts, whole)]
    np.testing.assert_array_equal(parts.heights_m[there[0]], whole.heights_m[there[1]])
    np.testing.assert_array_equal(parts.weights[there[0]], whole.weights[there[1]])


def test_there_is_room_for_any_height():
    height_m = np.array([3, 900, -40, 5, 12000], np.float32)
    histogram = of(height_m)
    assert (histogram.total, histogram.quantile_m(0), histogram.max_m) == (5, -40, 12000)
    assert histogram.mean_m == pytest.approx(height_m.mean())


def test_classes_hold_all(height_m):
    edges_m = np.array([0.0, 2.0, 5.0, 10.0])
    found = of(height_m).by_class(edges_m)
    known = height_m[np.isfinite(height_m)]
    assert found.tolist() == [(known < 2).sum(), ((known >= 2) & (known < 5)).sum(), (known >= 5).sum()]


def test_nothing_has_no_statistics():
    empty = of(np.full(4, np.nan, np.float32))
    assert empty.total == 0
    assert np.isnan([empty.mean_m, empty.quantile_m(0.5), empty.share_above(2), empty.max_m, empty.quantile_m(1)]).all()


def test_heights_off_the_quantum_are_refused_where_they_count():
    height_m = np.array([1.0, 1.01], np.float32)
    of(height_m, np.array([1, 0], np.float32))
    with pytest.raises(RasterError, match=r"1\.01 m is no multiple of 1/32 m"):
        of(height_m)

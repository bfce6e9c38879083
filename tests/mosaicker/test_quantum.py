"""Rounding, sums and means of heights, against arithmetic that is slow and plain."""

import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from canopy.errors import RasterError
from canopy.mosaicker.quantum import QUANTUM_M, BandStatistics, error_bands, halve, merge, quantise, statistics_of

# --- rounding ------------------------------------------------------------------------------------------------------------


HEIGHTS = arrays(np.float32, 20, elements=st.floats(0, 120, width=32))


@given(height=HEIGHTS)
def test_quantise(height):
    out = quantise(height)
    assert out.dtype == np.float32
    assert (np.abs(out.astype(float) - height) <= QUANTUM_M / 2).all()
    assert (out * 32 == np.rint(out * 32)).all()
    np.testing.assert_array_equal(quantise(out), out)
    assert np.isnan(quantise(np.array([np.nan], np.float32))).all()


@given(height=HEIGHTS, below=HEIGHTS, above=HEIGHTS)
def test_error_bands_round_outwards(height, below, above):
    lower, upper = np.maximum(height - below, 0), height + above
    half, low, high = error_bands(lower, upper)
    assert (low <= lower).all()
    assert (high >= upper).all()
    assert (low >= lower - QUANTUM_M).all()
    assert (high <= upper + QUANTUM_M).all()
    assert (low >= 0).all()
    assert (2 * half >= high - low).all()
    assert (2 * half <= high - low + 2 * QUANTUM_M).all()
    assert (low <= quantise(height)).all()
    assert (quantise(height) <= high).all()
    bands = error_bands(lower, upper)
    assert (bands * 32 == np.rint(bands * 32)).all()


def test_unknown_stays_unknown_in_every_band():
    assert np.isnan(error_bands(np.array([np.nan], np.float32), np.array([np.nan], np.float32))).all()


# --- means ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(1, 1), (1, 2), (3, 5), (4, 4)])
def test_halving_keeps_odd_edges(shape):
    heights_m = quantise(np.random.default_rng(3).random((2, *shape)) * 40)
    heights_m[0, 0, 0] = np.nan
    coarse = halve(heights_m)
    assert coarse.shape == (2, (shape[0] + 1) // 2, (shape[1] + 1) // 2)
    for band, row, col in np.ndindex(coarse.shape):
        block = heights_m[band, 2 * row : 2 * row + 2, 2 * col : 2 * col + 2].astype(float)
        known = block[np.isfinite(block)]
        expected = quantise(known.mean()) if known.size else np.nan
        np.testing.assert_array_equal(coarse[band, row, col], expected)


# --- statistics ----------------------------------------------------------------------------------------------------------

MAPS = arrays(np.float32, (2, 7, 9), elements=st.one_of(st.just(math.nan), st.integers(-40, 4000).map(lambda q: q / 32)))


@given(heights_m=MAPS)
def test_statistics_are_exact(heights_m):
    for band, found in zip(heights_m, statistics_of(heights_m), strict=True):
        known = [Fraction(float(h)) for h in band[np.isfinite(band)]]
        assert found.count == len(known)
        if not known:
            assert found == BandStatistics()
            assert math.isnan(found.mean_m)
            assert math.isnan(found.stddev_m)
            assert not found.tags(band.size)
            continue
        mean = sum(known) / len(known)
        variance = sum((h - mean) ** 2 for h in known) / len(known)
        assert found.mean_m == float(mean)
        assert found.stddev_m == pytest.approx(math.sqrt(variance), rel=1e-15)
        assert (found.least * QUANTUM_M, found.largest * QUANTUM_M) == (min(known), max(known))


@given(heights_m=MAPS, row=st.integers(1, 6), col=st.integers(1, 8))
def test_parts_add_up_in_any_order(heights_m, row, col):
    parts = [heights_m[:, rows, cols] for rows in (slice(row), slice(row, None)) for cols in (slice(col), slice(col, None))]
    a, b, c, d = (statistics_of(part) for part in parts)
    whole = statistics_of(heights_m)
    assert merge(merge(merge((), a), b), merge(c, d)) == whole
    assert merge(d, merge(merge(c, a), b)) == whole


def test_sums_that_a_float_would_lose():
    """2**53 + 1 quanta; and squares beyond it."""
    big = BandStatistics(count=1, least=1, largest=1, total=2**53, squares=2**80)
    assert (big + BandStatistics(count=1, least=1, largest=1, total=1, squares=1)).total == 2**53 + 1
    tall = statistics_of(np.full((1, 1000, 1000), 500.0, np.float32))[0]
    assert (tall.total, tall.squares) == (16_000 * 10**6, 16_000**2 * 10**6)
    assert (tall.mean_m, tall.stddev_m) == (500.0, 0.0)


@pytest.mark.parametrize("height_m", [0.01, 10 + QUANTUM_M / 2, math.inf, -math.inf, 1e30])
def test_a_height_off_the_quantum_is_refused(height_m):
    heights_m = np.zeros((1, 3, 3), np.float32)
    heights_m[0, 1, 1] = height_m
    with pytest.raises(RasterError, match="1 heights are not multiples of 1/32 m"):
        statistics_of(heights_m)


def test_statistics_contradict_themselves():
    with pytest.raises(AssertionError, match="contradicts itself"):
        BandStatistics(count=1)

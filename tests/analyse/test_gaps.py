"""What is a gap: by a slow definition, and the same wherever windows end."""

import numpy as np
import pytest

from canopy.analyse.gaps import checked_gap, gaps, halo_px
from canopy.errors import AnalysisError

PIXEL_M2 = 0.36
RULE = {"below_m": 2.0, "least_m2": 4.0, "pixel_m2": PIXEL_M2}


def patches(low):
    """Connected pixels, corners included, one by one."""
    left = {tuple(at) for at in np.argwhere(low)}
    while left:
        todo, patch = [left.pop()], set()
        while todo:
            row, col = todo.pop()
            patch.add((row, col))
            near = {(row + i, col + j) for i in (-1, 0, 1) for j in (-1, 0, 1)} & left
            left -= near
            todo += near
        yield patch


@pytest.fixture
def height_m():
    rng = np.random.default_rng(5)
    height_m = np.where(rng.random((60, 70)) < 0.35, 0.5, 9.0).astype(np.float32)
    height_m[rng.random((60, 70)) < 0.05] = np.nan
    height_m[30, 3:60] = 1.0
    height_m[31:33, 3:60] = height_m[28:30, 3:60] = 20.0
    return height_m


def test_gaps_are_patches_of_enough_area(height_m):
    expected = np.zeros(height_m.shape, bool)
    for patch in patches(height_m < 2):
        if len(patch) * PIXEL_M2 >= 4.0:
            expected[tuple(zip(*patch, strict=True))] = True
    assert 0 < expected.sum() < (height_m < 2).sum()
    np.testing.assert_array_equal(gaps(height_m, **RULE), expected)


def pieced(height_m, halo, side=13):
    found = np.zeros(height_m.shape, bool)
    rows, cols = height_m.shape
    for row in range(0, rows, side):
        for col in range(0, cols, side):
            top, left = max(row - halo, 0), max(col - halo, 0)
            part = gaps(height_m[top : row + side + halo, left : col + side + halo], **RULE)
            found[row : row + side, col : col + side] = part[row - top :, col - left :][:side, :side]
    return found


def test_windows_do_not_show(height_m):
    whole = gaps(height_m, **RULE)
    halo = halo_px(4.0, PIXEL_M2)
    np.testing.assert_array_equal(pieced(height_m, halo), whole)
    assert (pieced(height_m, 0) != whole).any(), "without a halo windows show, or this test says nothing"


@pytest.mark.parametrize(("least_m2", "halo"), [(0, 0), (0.3, 0), (0.36, 0), (0.37, 1), (0.72, 1), (4.0, 11)])
def test_halo_reaches_as_far_as_a_patch_that_is_too_small(least_m2, halo):
    assert halo_px(least_m2, PIXEL_M2) == halo


def test_no_least_area_takes_every_low_pixel(height_m):
    np.testing.assert_array_equal(gaps(height_m, below_m=2, least_m2=0, pixel_m2=1), height_m < 2)


@pytest.mark.parametrize("rule", [(0.0, 10.0), (float("nan"), 10.0), (2.0, -1.0), (2.0, 20_000.0), (2.0, float("nan"))])
def test_no_definition(rule):
    with pytest.raises(AnalysisError, match="gaps"):
        checked_gap(*rule)

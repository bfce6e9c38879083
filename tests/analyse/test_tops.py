"""Tree tops against the definition, pixel by pixel; plateaus, unknown ground and windows."""

import numpy as np
import pytest

from canopy.analyse.tops import TopRule, find_tops
from canopy.errors import AnalysisError
from canopy.mosaicker.quantum import quantise
from tests.finished_maps import GSD_M

RULE = TopRule(most_m=9.0, share=1.0)


def by_definition(height_m, rule):
    rows, cols = np.indices(height_m.shape)
    found = set()
    for row, col in np.argwhere(height_m >= rule.least_height_m):
        h = height_m[row, col]
        radius_px = max(rule.share * min(rule.base_m + rule.per_m * float(h) ** 2, rule.most_m) / 2 / GSD_M, 1.5)
        near = (rows - row) ** 2 + (cols - col) ** 2 <= radius_px**2
        earlier = (rows < row) | ((rows == row) & (cols < col))
        if not (near & ((height_m > h) | ((height_m == h) & earlier))).any():
            found.add((int(row), int(col)))
    return found


def tops(height_m, rule=RULE, inner=None):
    inner = (slice(0, height_m.shape[0]), slice(0, height_m.shape[1])) if inner is None else inner
    row, col, unknown = find_tops(height_m, inner, rule, GSD_M)
    return dict(zip(zip(row.tolist(), col.tolist(), strict=True), unknown.tolist(), strict=True))


@pytest.fixture(scope="module")
def height_m():
    rng = np.random.default_rng(8)
    height_m = quantise(np.round(rng.gamma(3, 4, (50, 60))))  # whole metres: many are equal
    height_m[rng.random(height_m.shape) < 0.03] = np.nan
    return height_m


def test_tops_are_the_highest_around(height_m):
    found = tops(height_m)
    assert set(found) == by_definition(height_m, RULE)
    assert len(found) > 20


def test_the_window_grows_with_the_height(height_m):
    """The check above can fail: a fixed window finds others."""
    fixed = TopRule(base_m=4.0, per_m=0.0)
    assert set(tops(height_m, fixed)) == by_definition(height_m, fixed) != set(tops(height_m))


def test_windows_do_not_show(height_m):
    halo, pieces, cut = RULE.halo_px(GSD_M), {}, {}
    wide = np.pad(height_m, halo, constant_values=np.nan)
    for row in range(0, 50, 17):
        for col in range(0, 60, 17):
            rows, cols = min(17, 50 - row), min(17, 60 - col)
            part = wide[row : row + rows + 2 * halo, col : col + cols + 2 * halo]
            inner = (slice(halo, halo + rows), slice(halo, halo + cols))
            pieces |= {(r + row - halo, c + col - halo): u for (r, c), u in tops(part, inner=inner).items()}
            cut |= {(r + row, c + col): u for (r, c), u in tops(height_m[row : row + rows, col : col + cols]).items()}
    assert pieces == tops(height_m)
    assert set(cut) != set(pieces), "without a halo windows show, or this test says nothing"


def test_a_plateau_has_one_top():
    height_m = np.full((15, 15), 6, np.float32)
    height_m[5:8, 6:9] = 20
    assert [(r, c) for r, c in tops(height_m) if height_m[r, c] == 20] == [(5, 6)]


def test_unknown_surroundings_are_told():
    height_m = np.zeros((31, 31), np.float32)
    height_m[8, 8] = height_m[20, 20] = 12
    height_m[20, 22] = np.nan
    assert tops(height_m) == {(8, 8): False, (20, 20): True}
    height_m[8, 8] = np.nan
    assert tops(height_m) == {(20, 20): True}


def test_low_plants_are_no_trees():
    height_m = np.zeros((9, 9), np.float32)
    height_m[4, 4] = 4.9
    assert not tops(height_m)


@pytest.mark.parametrize(
    "wrong",
    [{"base_m": -1.0}, {"per_m": float("nan")}, {"most_m": 0.0}, {"most_m": 101.0}, {"share": 0.0}, {"least_height_m": 0.0}],
)
def test_no_rule(wrong):
    with pytest.raises(AnalysisError, match="tree tops by"):
        TopRule(**wrong)

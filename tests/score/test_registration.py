"""Shifts between map and reference: found where they are, refused where they are not, scored beside the raw ones."""

import numpy as np
import pytest
from scipy import ndimage

from canopy.grid import Box
from canopy.score import score_map
from canopy.score.registration import sites_of
from canopy.score.table import lines
from tests.score.rasters import LEFT_M, write, write_map


@pytest.fixture(scope="module")
def crowns():
    """Heights of 96 x 110 m with crowns, 1 m pixels and 8 more on each side."""
    rng = np.random.default_rng(4)
    heights = np.zeros((112, 126))
    rows, cols = np.mgrid[:112, :126]
    for row, col, radius, top in zip(*rng.uniform((0, 0, 2, 8), (112, 126, 5, 30), (160, 4)).T, strict=True):
        heights = np.maximum(heights, top * np.clip(1 - ((rows - row) ** 2 + (cols - col) ** 2) / radius**2, 0, None))
    return heights


def inner(heights):
    return heights[8:-8, 8:-8]


def score_of(folder, found, reference):
    result = score_map(write_map(folder / "map", found), write(folder / "chm.tif", reference), resamples=20)
    return result, result.comparisons[0].maps[0]


@pytest.mark.parametrize(("south", "east"), [(2, -1), (0.5, 1.3)])
def test_a_moved_map_is_moved_back(crowns, tmp_path, south, east):
    rng = np.random.default_rng(5)
    found = inner(ndimage.shift(crowns, (south, east), order=1)) + rng.normal(0, 1, inner(crowns).shape)
    result, score = score_of(tmp_path, found, inner(crowns))
    (shift,) = score.registered.shifts
    assert shift.applied
    assert (shift.x_m, shift.y_m) == pytest.approx((-east, south), abs=0.2)
    assert shift.agreement_after > shift.agreement_before + 0.05
    assert score.registered.measures.mae_m.value < 0.7 * score.measures.mae_m.value
    assert score.registered.blocks.n == score.blocks.n
    raw = np.abs(found - inner(crowns)).mean()
    assert score.measures.mae_m.value == pytest.approx(raw, rel=1e-5)  # the raw score is what it was
    assert any("moved by x" in line for line in lines(result))


def test_whole_cells_are_moved_exactly(crowns, tmp_path):
    found = inner(np.roll(crowns, (3, -2), (0, 1)))
    _, score = score_of(tmp_path, found, inner(crowns))
    (shift,) = score.registered.shifts
    assert (shift.x_m, shift.y_m) == pytest.approx((2, 3), abs=0.051)
    if (shift.x_m, shift.y_m) == (2, 3):
        assert score.registered.measures.mae_m.value == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("case", ["in place", "another forest", "too far", "flat"])
def test_no_shift_where_there_is_none_to_believe(crowns, tmp_path, case):
    found = {
        "in place": inner(crowns) + np.random.default_rng(6).normal(0, 1, inner(crowns).shape),
        "another forest": inner(crowns[::-1, ::-1]),
        "too far": inner(np.roll(crowns, 7, 1)),
        "flat": np.full(inner(crowns).shape, 9.0),
    }[case]
    _, score = score_of(tmp_path, found, inner(crowns))
    (shift,) = score.registered.shifts
    assert not shift.applied, shift
    assert score.registered.measures is None
    said = {"in place": "shorter than", "too far": "longer than 5 m", "flat": "no window"}.get(case, "")
    assert said in shift.reason


def test_each_site_has_its_own_shift(crowns, tmp_path):
    """Two plots of one folder, one in place and one not: the score after the move is of both where they are moved."""
    heights = inner(crowns)
    gap = np.full((96, 60), np.nan)
    found = np.hstack([inner(np.roll(crowns, 2, 0)), gap, heights])
    write(tmp_path / "plots" / "a.tif", heights)
    write(tmp_path / "plots" / "b.tif", heights, left=LEFT_M + 170)
    result = score_map(write_map(tmp_path / "map", found), tmp_path / "plots", resamples=20)
    a, b = result.comparisons[0].maps[0].registered.shifts
    assert (a.site, a.applied) == ("a.tif", True)
    assert a.y_m == pytest.approx(2, abs=0.1)
    assert (b.site, b.applied) == ("b.tif", False)
    assert result.comparisons[0].maps[0].registered.measures.n < result.comparisons[0].maps[0].measures.n


def test_files_that_touch_are_one_site(tmp_path):
    boxes = [Box(0, 0, 10, 10), Box(0, 30, 10, 40), Box(0, 10, 10, 20), Box(5, 20, 9, 30), Box(50, 50, 60, 60)]
    sites = sites_of([tmp_path / f"{k}.tif" for k in range(5)], boxes)
    assert [(site.name, len(site.boxes)) for site in sites] == [("0.tif and 3 more", 4), ("4.tif", 1)]
    assert sites[0].extent == Box(0, 0, 10, 40)
    assert sites[0].mask(Box(4, 18, 6, 22)).tolist() == [[True, True, False, False], [True, True, True, True]]


def test_coarse_cells_are_not_registered(tmp_path):
    heights = np.random.default_rng(7).gamma(2, 6, (40, 40))
    found = np.roll(heights, 1, 0)
    result = score_map(write(tmp_path / "map.tif", found, 10.0), write(tmp_path / "chm.tif", heights, 10.0), resamples=20)
    (shift,) = result.comparisons[0].maps[0].registered.shifts
    assert "larger than the 2.5 m" in shift.reason

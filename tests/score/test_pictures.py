"""The coarse map of the error is the mean of what it is of, however it was read."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from canopy.score.pictures import ErrorMapSums, PlaceChip


@given(
    shape=st.tuples(st.integers(1, 40), st.integers(1, 40)),
    step=st.tuples(st.integers(1, 41), st.integers(1, 41)),
    longest=st.integers(1, 45),
    seed=st.integers(0, 9),
)
def test_parts_in_any_order_give_the_means_of_the_whole(shape, step, longest, seed):
    rng = np.random.default_rng(seed)
    error = rng.normal(0, 5, shape).astype(np.float32)
    error[rng.random(shape) < 0.3] = np.nan
    sums = ErrorMapSums(shape, 2.0, longest)
    parts = [(row, col) for row in range(0, shape[0], step[0]) for col in range(0, shape[1], step[1])]
    for at in rng.permutation(len(parts)):
        row, col = parts[at]
        sums.add(error[row : row + step[0], col : col + step[1]], row, col)
    drawn = sums.map()
    side = drawn.side_px
    assert drawn.side_m == 2.0 * side
    assert max(drawn.error_m.shape) <= longest
    for (row, col), found in np.ndenumerate(drawn.error_m):
        square = error[row * side : (row + 1) * side, col * side : (col + 1) * side]
        known = square[np.isfinite(square)]
        assert found == pytest.approx(known.mean(), abs=1e-5) if known.size else np.isnan(found)


def test_a_part_outside_the_map_is_a_mistake():
    with pytest.raises(AssertionError, match="is not in a grid"):
        ErrorMapSums((4, 4), 1.0).add(np.zeros((2, 2)), 3, 0)


def test_where_a_place_lies_in_its_pictures():
    heights = np.zeros((8, 8), np.float32)
    assert PlaceChip(map_m=heights, reference_m=heights).inset == 0.25
    assert PlaceChip(map_m=heights, reference_m=heights, around=0.0).inset == 0

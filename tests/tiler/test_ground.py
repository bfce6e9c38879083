"""The ground's parts against slower ways to the same result."""

import numpy as np
import pytest
from scipy import ndimage

from canopy.tiler.ground import farther_than, plane


@pytest.mark.parametrize("step", [(1.0, 1.0), (0.5, 0.8)])
@pytest.mark.parametrize("share", [0.001, 0.02, 0.5, 1.0])
def test_cells_out_of_reach_are_those_of_a_distance_transform(share, step):
    rng = np.random.default_rng(9)
    known = rng.random((70, 90)) < share
    known[30, 40] = True
    away = ndimage.distance_transform_edt(~known, sampling=step)
    for reach in (0.0, 0.5, 1.0, 2.5, 5.0, 12.3, 500.0):
        np.testing.assert_array_equal(farther_than(reach, known, step), away > reach)
    assert (share == 1.0) or (away > 1.0).any()


def test_everything_is_out_of_reach_of_nothing():
    assert farther_than(1e9, np.zeros((4, 5), bool), (1.0, 1.0)).all()
    assert not farther_than(1e9, np.eye(4, 5, dtype=bool), (1.0, 1.0)).any()


def test_plane_through_torn_cells():
    rng = np.random.default_rng(2)
    rows, cols = np.mgrid[:40, :60]
    truth = 700 + 0.3 * cols - 0.2 * rows
    torn = np.where(rng.random(truth.shape) < 0.4, np.nan, truth)
    np.testing.assert_allclose(plane(torn), truth, atol=1e-9)
    rough = torn + rng.normal(0, 1, truth.shape)
    known = np.isfinite(rough)
    steps = np.column_stack([np.ones(known.sum()), rows[known], cols[known]])
    level, per_row, per_col = np.linalg.lstsq(steps, rough[known])[0]
    np.testing.assert_allclose(plane(rough), level + per_row * rows + per_col * cols, atol=1e-9)
    # A single row leaves the slope across it open; it is level.
    one = np.full((3, 60), np.nan)
    one[1] = truth[1]
    np.testing.assert_allclose(plane(one), np.tile(truth[1], (3, 1)), atol=1e-9)

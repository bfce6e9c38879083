"""Counts per cube against a dictionary, lonely cubes against a search through all pairs."""

from collections import Counter

import numpy as np
import pytest

from canopy.tiler.voxels import Voxels

SIDE = 5.0


@pytest.fixture
def points():
    rng = np.random.default_rng(3)
    n = 20_000
    x, y = 500_000 + rng.uniform(-70, 90, n), 4_500_000 + rng.uniform(-50, 80, n)
    z = rng.normal(0, 4, n)
    some = rng.integers(0, n, 60)
    z[some] = rng.uniform(-3000, 9000, 60)
    return x, y, z.astype(np.float32)


def expected(x, y, z, most):
    """Which points are alone, cube by cube."""
    cubes = np.column_stack([np.floor(v.astype(np.float64) / SIDE).astype(int) for v in (x, y, z)])
    counts = Counter(map(tuple, cubes))
    steps = [(a, b, c) for a in (-1, 0, 1) for b in (-1, 0, 1) for c in (-1, 0, 1)]
    around = {k: sum(counts.get((k[0] + a, k[1] + b, k[2] + c), 0) for a, b, c in steps) for k in counts}
    return np.array([around[tuple(cube)] <= most for cube in cubes])


@pytest.mark.parametrize("most", [1, 6, 40])
def test_points_alone(points, most):
    x, y, z = points
    voxels = Voxels(x[0], y[0], SIDE, SIDE)
    for part in np.array_split(np.random.default_rng(0).permutation(x.size), 7):
        voxels.add(x[part], y[part], z[part])
    voxels.find_alone(most)
    alone = expected(x, y, z, most)
    assert 0 < alone.sum() < x.size / 10
    np.testing.assert_array_equal(voxels.alone(x, y, z), alone)


def test_nobody_is_alone_in_a_crowd(points):
    x, y, _ = points
    voxels = Voxels(x[0], y[0], SIDE, SIDE)
    voxels.add(x, y, np.zeros(x.size, np.float32))
    voxels.find_alone(6)
    assert not voxels.any_alone
    assert not voxels.alone(x, y, np.zeros(x.size, np.float32)).any()


def test_points_farther_than_can_be_counted_do_not_overflow():
    voxels = Voxels(0.0, 0.0, SIDE, SIDE)
    far = np.array([1e12, -1e12, 0.0])
    voxels.add(far, -far, far.astype(np.float32))
    voxels.find_alone(2)
    assert voxels.alone(far, -far, far.astype(np.float32)).all()

"""How many points lie in each cube of a coarse lattice, and which points are alone there.

Only the cubes that hold a point take memory, so a spike kilometres above the rest costs one entry.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from canopy.tiler.tin import Floats, compiled

_BITS = 21
_HALF = 1 << (_BITS - 1)
_FREE = -1
_ALONE = -1

Keys = NDArray[np.int64]


class Voxels:
    """Counts of points per cube, anchored to the origin of the CRS and of z."""

    def __init__(self, x: float, y: float, side: float, side_z: float) -> None:
        """Cubes around the place (x, y), up to a million of them away in each direction.

        Args:
            x: some place in the region, CRS units.
            y: likewise.
            side: side of a cube along x and y, CRS units.
            side_z: side of a cube along z, in the unit of z.
        """
        self._place = np.array([math.floor(x / side), math.floor(y / side), 0], np.float64)
        self._sides = np.array([side, side, side_z], np.float64)
        self._keys = np.full(1 << 12, _FREE, np.int64)
        self._counts = np.zeros(1 << 12, np.int64)
        self._used = 0
        self.any_alone = False
        """Whether `find_alone` found a cube."""

    def add(self, x: Floats, y: Floats, z: NDArray[np.float32]) -> None:
        """Count points; places in CRS units."""
        done = 0
        while True:
            done, self._used = _count(
                x, y, z, done, self._place, self._sides, self._keys, self._counts, self._used
            )  # fmt: skip
            if done == x.size:
                return
            keys, counts = self._keys, self._counts
            self._keys, self._counts = np.full(2 * keys.size, _FREE, np.int64), np.zeros(2 * keys.size, np.int64)
            _refill(keys, counts, self._keys, self._counts)

    def find_alone(self, most: int) -> None:
        """Mark the cubes that hold, together with the 26 around them, at most `most` points."""
        alone = _lonely(self._keys, self._counts, most)
        self._counts[alone] = _ALONE
        self.any_alone = bool(alone.size)

    def alone(self, x: Floats, y: Floats, z: NDArray[np.float32]) -> NDArray[np.bool_]:
        """Which points lie in marked cubes."""
        out = np.zeros(x.size, np.bool_)
        if self.any_alone:
            _look_up(x, y, z, self._place, self._sides, self._keys, self._counts, out)
        return out


@compiled
def _key(col: float, row: float, level: float) -> np.int64:
    # Farther than a million cubes away is one cube at the rim; nothing but a broken point lies there.
    limit = float(_HALF - 2)
    c = np.int64(min(max(col, -limit), limit)) + _HALF
    r = np.int64(min(max(row, -limit), limit)) + _HALF
    k = np.int64(min(max(level, -limit), limit)) + _HALF
    return (c << (2 * _BITS)) | (r << _BITS) | k


@compiled
def _slot(keys: Keys, key: np.int64) -> np.int64:
    """Where a key is or would be put: open addressing with a multiplicative hash."""
    mask = keys.size - 1
    mixed = np.uint64(key) * np.uint64(0x9E3779B97F4A7C15)
    at = np.int64((mixed >> np.uint64(32)) & np.uint64(mask))
    while keys[at] not in (_FREE, key):
        at = (at + 1) & mask
    return at


@compiled
def _count(  # noqa: PLR0917 - compiled loops take plain arrays and numbers
    x: Floats,
    y: Floats,
    z: NDArray[np.float32],
    first: int,
    place: Floats,
    sides: Floats,
    keys: Keys,
    counts: Keys,
    used: int,
) -> tuple[int, int]:
    """(points counted, cubes in use); stops when the table is half full."""
    last_key, at = np.int64(_FREE), np.int64(0)
    for i in range(first, x.size):
        key = _key(
            np.floor(x[i] / sides[0]) - place[0], np.floor(y[i] / sides[1]) - place[1], np.floor(z[i] / sides[2])
        )  # fmt: skip
        if key != last_key:  # neighbours in the file are neighbours in space
            at = _slot(keys, key)
            if keys[at] == _FREE:
                if 2 * used >= keys.size:
                    return i, used
                keys[at] = key
                used += 1
            last_key = key
        counts[at] += 1
    return x.size, used


@compiled
def _refill(keys: Keys, counts: Keys, new_keys: Keys, new_counts: Keys) -> None:
    for i in range(keys.size):
        if keys[i] != _FREE:
            at = _slot(new_keys, keys[i])
            new_keys[at], new_counts[at] = keys[i], counts[i]


@compiled
def _lonely(keys: Keys, counts: Keys, most: int) -> Keys:
    out = np.empty(keys.size, np.int64)
    n = 0
    for i in range(keys.size):
        if keys[i] == _FREE or counts[i] > most:
            continue
        total = 0
        for dc in range(-1, 2):
            for dr in range(-1, 2):
                for dk in range(-1, 2):
                    at = _slot(keys, keys[i] + (dc << (2 * _BITS)) + (dr << _BITS) + dk)
                    if keys[at] != _FREE:
                        total += counts[at]
        if total <= most:
            out[n] = i
            n += 1
    return out[:n]


@compiled
def _look_up(  # noqa: PLR0917 - as above
    x: Floats,
    y: Floats,
    z: NDArray[np.float32],
    place: Floats,
    sides: Floats,
    keys: Keys,
    counts: Keys,
    out: NDArray[np.bool_],
) -> None:
    for i in range(x.size):
        key = _key(
            np.floor(x[i] / sides[0]) - place[0], np.floor(y[i] / sides[1]) - place[1], np.floor(z[i] / sides[2])
        )  # fmt: skip
        at = _slot(keys, key)
        out[i] = keys[at] == key and counts[at] == _ALONE

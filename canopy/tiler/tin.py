"""Triangulated surfaces: Delaunay triangulations in tiles fixed by the origin of the CRS, read under points and at pixels.

A tile is triangulated with all vertices up to a buffer around it and answers for its own square only; where vertices are
dense those close to it suffice, which is proved tile by tile. The same vertices give the same surface whoever asks for it,
in whatever order they came, and no more than one tile is triangulated at a time. Across the seam of two tiles their
surfaces agree where the triangles are small against the buffer.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, TypeVar, cast

import numpy as np
from numba import njit
from numpy.typing import NDArray

TILE_M = 128.0
"""Side of a tile. Larger ones spend less on buffers, smaller ones need less around a small grid."""

_KEEP_M = 8.0
"""Triangles that end farther than this outside their tile are dropped after the triangulation."""
_SPARE_M = 4.0
"""So much farther than twice the widest gap in it do the vertices reach that a tile is first triangulated with."""
_SEED_M = 1.0
"""Cell of the table that tells a point in which triangle to start looking."""
_INSIDE_M2 = -1e-9
"""Twice the area by which a point may lie outside an edge and still be inside; a thousand times the rounding."""
_MOST_STEPS = 1000
"""Triangles that a walk may pass; across a whole tile they are some hundreds, from a seed a few."""
_HULL, _CROPPED = -1, -2

Bounds = tuple[float, float, float, float]
Floats = NDArray[np.float64]
Indices = NDArray[np.int32]
_F = TypeVar("_F", bound=Callable[..., Any])


def compiled(function: _F) -> _F:
    """Compile an inner loop on first use and keep it on disk."""
    return cast("_F", njit(cache=True, nogil=True)(function))


def snapped(bounds: Bounds, side: float) -> Bounds:
    """`bounds` widened to whole squares of `side` from the origin of the CRS."""
    left, bottom, right, top = bounds
    return (
        float(np.floor(left / side) * side),
        float(np.floor(bottom / side) * side),
        float(np.ceil(right / side) * side),
        float(np.ceil(top / side) * side),
    )


def widened(bounds: Bounds, by: float) -> Bounds:
    """`bounds` with `by` more on every side."""
    left, bottom, right, top = bounds
    return left - by, bottom - by, right + by, top + by


def union(a: Bounds, b: Bounds) -> Bounds:
    """The smallest box that holds both."""
    return min(a[0], b[0]), min(a[1], b[1]), max(a[2], b[2]), max(a[3], b[3])


def tiles_over(bounds: Bounds, side: float) -> Iterator[Bounds]:
    """The squares of `side` that `bounds` touches, row by row from the south."""
    left, bottom, right, top = snapped(bounds, side)
    for row in range(round(bottom / side), round(top / side)):
        for col in range(round(left / side), round(right / side)):
            yield col * side, row * side, (col + 1) * side, (row + 1) * side


def one_per_place(x: Floats, y: Floats, z: Floats, cell: float) -> tuple[Floats, Floats, Floats]:
    """Vertices sorted by place, one per square cell: the one nearest to the cell's centre, of equals the lowest.

    Why the nearest to the centre: which one it is says nothing about its height, so the surface is neither lifted nor
    lowered; the lowest would lie below the mean of the noise. With `cell` 0 only vertices at one place are joined, to the
    lowest of them.
    """
    if not cell:
        order = np.lexsort((z, y, x))
        x, y, z = x[order], y[order], z[order]
        first = np.ones(x.size, bool)
        first[1:] = (x[1:] != x[:-1]) | (y[1:] != y[:-1])
        return x[first], y[first], z[first]
    if not x.size:
        return x, y, z
    col, row = (np.floor(along / cell).astype(np.int64) for along in (x, y))
    code = (col - col.min()) * (int(np.ptp(row)) + 1) + row - row.min()
    del col, row
    order = np.argsort(code)
    best = _nearest_to_centre(x, y, z, cell, code, order)
    return x[best], y[best], z[best]


def delaunay(x: Floats, y: Floats) -> tuple[Indices, Indices]:
    """Delaunay triangulation of places that are all different; none where they are fewer than three or on one line.

    Returns:
        Triangles (n, 3) as indices of vertices, counter-clockwise, and their neighbours (n, 3): the triangle behind the
        edge opposite to each vertex, -1 at the hull.
    """
    from scipy.spatial import Delaunay, QhullError

    nothing = np.empty((0, 3), np.int32)
    if x.size < 3 or np.ptp(x) == 0 or np.ptp(y) == 0:
        return nothing, nothing
    try:
        found = Delaunay(np.column_stack([x - x.min(), y - y.min()]))
    except QhullError:  # all on one line
        return nothing, nothing
    triangles, neighbours = found.simplices.astype(np.int32), found.neighbors.astype(np.int32)
    clockwise = _twice_area(x, y, triangles) < 0
    for table in (triangles, neighbours):
        table[clockwise] = table[clockwise][:, [0, 2, 1]]
    return triangles, neighbours


def _twice_area(x: Floats, y: Floats, triangles: Indices) -> Floats:
    a, b, c = triangles.T
    return np.asarray((x[b] - x[a]) * (y[c] - y[a]) - (x[c] - x[a]) * (y[b] - y[a]))


def longest_edge(x: Floats, y: Floats, triangles: Indices) -> Floats:
    """Length of each triangle's longest edge, in the unit of x and y."""
    ends = [triangles[:, [i, (i + 1) % 3]].T for i in range(3)]
    return np.asarray(np.max([np.hypot(x[b] - x[a], y[b] - y[a]) for a, b in ends], axis=0))


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Tin:
    """The triangulated surface of one tile; coordinates are counted from the tile's lower left corner."""

    tile: Bounds
    x: Floats
    y: Floats
    z: Floats
    triangles: Indices
    neighbours: Indices
    seeds: Indices
    """The triangle at or nearest to the centre of each cell of the table, rows from the south; -2 where it is cropped."""
    seed_cell: float

    @classmethod
    def of(cls, x: Floats, y: Floats, z: Floats, tile: Bounds, unit_m: float) -> Tin:
        """Triangulate vertices in and around `tile`; `unit_m` is metres per unit of x and y."""
        left, bottom, right, _ = tile
        side = right - left
        x, y = x - left, y - bottom
        reach = _first_reach(x, y, side, unit_m)
        square = inside(x, y, (-reach, -reach, side + reach, side + reach))
        triangles, neighbours = delaunay(x[square], y[square])
        if not square.all():
            if _settled(x[square], y[square], triangles, neighbours, side, reach):
                x, y, z = x[square], y[square], z[square]
            else:
                triangles, neighbours = delaunay(x, y)
        cells = max(1, round(side * unit_m / _SEED_M))
        seeds = np.zeros((cells, cells), np.int32)
        if triangles.size:
            _find_seeds(x, y, triangles, neighbours, side / cells, seeds)
            keep = _KEEP_M / unit_m
            u, v = x[triangles], y[triangles]
            near = (u.max(1) >= -keep) & (u.min(1) <= side + keep) & (v.max(1) >= -keep) & (v.min(1) <= side + keep)
            renamed = np.where(near, np.cumsum(near) - 1, _CROPPED).astype(np.int32)
            seeds = renamed[seeds]
            triangles, neighbours = triangles[near], neighbours[near]
            neighbours = np.where(neighbours < 0, _HULL, renamed[neighbours]).astype(np.int32)
            used, places = np.unique(triangles, return_inverse=True)
            x, y, z, triangles = x[used], y[used], z[used], places.astype(np.int32).reshape(-1, 3)
        return cls(tile=tile, x=x, y=y, z=z, triangles=triangles, neighbours=neighbours, seeds=seeds, seed_cell=side / cells)

    def under(self, x: Floats, y: Floats) -> Floats:
        """Linear interpolation at places in the tile; NaN outside the hull of the vertices."""
        out = np.full(x.size, np.nan)
        if self.triangles.size:
            place = (x - self.tile[0], y - self.tile[1])
            _read(*place, self.x, self.y, self.z, self.triangles, self.neighbours, self.seeds, self.seed_cell, out)
        return out


def _first_reach(x: Floats, y: Floats, side: float, unit_m: float) -> float:
    """How far around its tile vertices may be needed, by the widest gap between those in it; infinite without any."""
    from scipy import ndimage

    cells = math.ceil(side * unit_m / _SEED_M)
    rows, cols = (np.floor(along * (cells / side)).astype(np.int64) for along in (y, x))
    own = (rows >= 0) & (rows < cells) & (cols >= 0) & (cols < cells)
    empty = np.ones((cells, cells), bool)
    empty[rows[own], cols[own]] = False
    if empty.all():
        return math.inf
    gap = float(ndimage.distance_transform_edt(empty).max()) * side / cells
    return 2 * gap + _SPARE_M / unit_m


@dataclass(slots=True, eq=False)
class TiledTin:
    """A triangulated surface of any extent, its tiles triangulated when first asked for."""

    x: Floats
    y: Floats
    z: Floats
    """Vertices, sorted by place, each place once."""
    unit_m: float
    """Metres per unit of x and y."""
    buffer_m: float
    """How far around its tile the vertices of a triangulation reach."""
    _tiles: dict[tuple[int, int], Tin] = field(default_factory=dict)

    def under(self, x: Floats, y: Floats) -> Floats:
        """Linear interpolation at any places; NaN outside the hull of the vertices of the place's tile."""
        side = TILE_M / self.unit_m
        out = np.full(x.size, np.nan)
        col, row = np.floor(x / side).astype(np.int64), np.floor(y / side).astype(np.int64)
        if not x.size:
            return out
        code = (col - col.min()) * (row.max() - row.min() + 1) + row - row.min()
        for one in np.unique(code):
            here = np.flatnonzero(code == one)
            out[here] = self._tile(int(col[here[0]]), int(row[here[0]]), side).under(x[here], y[here])
        return out

    def _tile(self, col: int, row: int, side: float) -> Tin:
        if (col, row) not in self._tiles:
            tile = (col * side, row * side, (col + 1) * side, (row + 1) * side)
            near = inside(self.x, self.y, widened(tile, self.buffer_m / self.unit_m))
            self._tiles[col, row] = Tin.of(self.x[near], self.y[near], self.z[near], tile, self.unit_m)
        return self._tiles[col, row]


def inside(x: Floats, y: Floats, bounds: Bounds) -> NDArray[np.bool_]:
    """Which places lie in `bounds`, edges included; NaN does not."""
    left, bottom, right, top = bounds
    return (x >= left) & (x <= right) & (y >= bottom) & (y <= top)


# --- inner loops -------------------------------------------------------------------------------------------------------


@compiled
def _nearest_to_centre(  # noqa: PLR0917 - compiled loops take plain arrays and numbers
    x: Floats, y: Floats, z: Floats, cell: float, code: NDArray[np.int64], order: NDArray[np.int64]
) -> NDArray[np.int64]:
    """Of the places that share a code, in the order of the codes, the one nearest to its cell's centre; ties by x, y, z."""
    best = np.empty(order.size, np.int64)
    found = 0
    nearest, last = np.inf, np.int64(-1)
    for i in order:
        u, v = x[i] / cell, y[i] / cell
        u, v = u - np.floor(u) - 0.5, v - np.floor(v) - 0.5
        away = u * u + v * v
        if found and code[i] == last:
            held = best[found - 1]
            if (away, x[i], y[i], z[i]) < (nearest, x[held], y[held], z[held]):
                best[found - 1], nearest = i, away
        else:
            best[found], nearest, last = i, away, code[i]
            found += 1
    return best[:found]


@compiled
def _walk(  # noqa: PLR0917 - as above
    px: float, py: float, start: int, x: Floats, y: Floats, triangles: Indices, neighbours: Indices
) -> tuple[int, int]:
    """(triangle that holds a place, or why there is none; last triangle seen).

    From a triangle to the neighbour behind the edge that the place lies farthest beyond. In a Delaunay triangulation such
    a walk visits no triangle twice (Edelsbrunner 1990, Combinatorica 10, 251-260). Triangles without area, of which a place
    on their line is neither in nor out, are the exception: never straight back, and an end after so many steps.
    """
    t, last = start, start
    for _ in range(_MOST_STEPS):
        a, b, c = triangles[t, 0], triangles[t, 1], triangles[t, 2]
        e0 = (x[b] - px) * (y[c] - py) - (x[c] - px) * (y[b] - py)
        e1 = (x[c] - px) * (y[a] - py) - (x[a] - px) * (y[c] - py)
        e2 = (x[a] - px) * (y[b] - py) - (x[b] - px) * (y[a] - py)
        if e0 >= _INSIDE_M2 and e1 >= _INSIDE_M2 and e2 >= _INSIDE_M2 and e0 + e1 + e2 > 0.0:
            return t, t
        behind = 0 if e0 <= e1 and e0 <= e2 else (1 if e1 <= e2 else 2)
        ahead = neighbours[t, behind]
        if ahead == last and t != start:
            e0, e1, e2 = (np.inf if behind == 0 else e0), (np.inf if behind == 1 else e1), (np.inf if behind == 2 else e2)
            ahead = neighbours[t, 0 if e0 <= e1 and e0 <= e2 else (1 if e1 <= e2 else 2)]
        if ahead < 0:
            return ahead, t
        last, t = t, ahead
    return _CROPPED, t


@compiled
def _settled(  # noqa: PLR0917 - as above
    x: Floats, y: Floats, triangles: Indices, neighbours: Indices, side: float, reach: float
) -> bool:
    """Whether no vertex farther than `reach` from the tile can change a triangle that touches it.

    A triangle is Delaunay if no vertex lies in its circumcircle, so those whose circle stays within reach are final. Where
    none of them has an edge on the hull they cover the whole tile.
    """
    touching = 0
    for t in range(triangles.shape[0]):
        a, b, c = triangles[t, 0], triangles[t, 1], triangles[t, 2]
        if max(x[a], x[b], x[c]) < 0.0 or min(x[a], x[b], x[c]) > side:
            continue
        if max(y[a], y[b], y[c]) < 0.0 or min(y[a], y[b], y[c]) > side:
            continue
        touching += 1
        if neighbours[t, 0] < 0 or neighbours[t, 1] < 0 or neighbours[t, 2] < 0:
            return False
        u, v, s, w = x[b] - x[a], y[b] - y[a], x[c] - x[a], y[c] - y[a]
        double = 2.0 * (u * w - v * s)
        if double == 0.0:
            return False
        across = (w * (u * u + v * v) - v * (s * s + w * w)) / double
        up = (u * (s * s + w * w) - s * (u * u + v * v)) / double
        radius = math.hypot(across, up) * (1.0 + 1e-9)
        across, up = across + x[a], up + y[a]
        if min(across, up) - radius < -reach or max(across, up) + radius > side + reach:
            return False
    return touching > 0


@compiled
def _find_seeds(  # noqa: PLR0917 - as above
    x: Floats, y: Floats, triangles: Indices, neighbours: Indices, cell: float, seeds: Indices
) -> None:
    rows, cols = seeds.shape
    first = 0
    for r in range(rows):
        t = first
        for c in range(cols):
            _, t = _walk((c + 0.5) * cell, (r + 0.5) * cell, t, x, y, triangles, neighbours)
            seeds[r, c] = t
            if c == 0:
                first = t


@compiled
def _read(  # noqa: PLR0917 - as above
    px: Floats,
    py: Floats,
    x: Floats,
    y: Floats,
    z: Floats,
    triangles: Indices,
    neighbours: Indices,
    seeds: Indices,
    cell: float,
    out: Floats,
) -> None:
    rows, cols = seeds.shape
    for i in range(px.size):
        c, r = min(max(int(px[i] / cell), 0), cols - 1), min(max(int(py[i] / cell), 0), rows - 1)
        t = _CROPPED
        if seeds[r, c] >= 0:
            t, _ = _walk(px[i], py[i], seeds[r, c], x, y, triangles, neighbours)
        if t == _CROPPED:  # the walk came to the rim of what was kept; the triangle may still be there
            for k in range(triangles.shape[0]):
                a, b, c = triangles[k, 0], triangles[k, 1], triangles[k, 2]
                e0 = (x[b] - px[i]) * (y[c] - py[i]) - (x[c] - px[i]) * (y[b] - py[i])
                e1 = (x[c] - px[i]) * (y[a] - py[i]) - (x[a] - px[i]) * (y[c] - py[i])
                e2 = (x[a] - px[i]) * (y[b] - py[i]) - (x[b] - px[i]) * (y[a] - py[i])
                if e0 >= _INSIDE_M2 and e1 >= _INSIDE_M2 and e2 >= _INSIDE_M2 and e0 + e1 + e2 > 0.0:
                    t = k
                    break
        if t >= 0:
            a, b, c = triangles[t, 0], triangles[t, 1], triangles[t, 2]
            e0 = (x[b] - px[i]) * (y[c] - py[i]) - (x[c] - px[i]) * (y[b] - py[i])
            e1 = (x[c] - px[i]) * (y[a] - py[i]) - (x[a] - px[i]) * (y[c] - py[i])
            e2 = (x[a] - px[i]) * (y[b] - py[i]) - (x[b] - px[i]) * (y[a] - py[i])
            out[i] = (e0 * z[a] + e1 * z[b] + e2 * z[c]) / (e0 + e1 + e2)


@compiled
def raise_to_triangles(  # noqa: PLR0917 - as above
    col: Floats, row: Floats, z: Floats, triangles: Indices, own: NDArray[np.bool_], chm: NDArray[np.float32]
) -> None:
    """Raise each pixel of `chm` that is `own` to the triangles over its centre.

    Args:
        col: columns of the vertices, in pixels of `chm`; pixel 0 has its centre at 0.5.
        row: rows of the vertices.
        z: heights of the vertices.
        triangles: (n, 3) indices of vertices, of either orientation.
        own: the pixels that may be raised.
        chm: heights, NaN where there is none yet; changed in place.
    """
    rows, cols = chm.shape
    for t in range(triangles.shape[0]):
        a, b, c = triangles[t, 0], triangles[t, 1], triangles[t, 2]
        area = (col[b] - col[a]) * (row[c] - row[a]) - (col[c] - col[a]) * (row[b] - row[a])
        if area == 0.0:
            continue
        r0 = max(0, int(np.ceil(min(row[a], row[b], row[c]) - 0.5)))
        r1 = min(rows - 1, int(np.floor(max(row[a], row[b], row[c]) - 0.5)))
        c0 = max(0, int(np.ceil(min(col[a], col[b], col[c]) - 0.5)))
        c1 = min(cols - 1, int(np.floor(max(col[a], col[b], col[c]) - 0.5)))
        for r in range(r0, r1 + 1):
            for k in range(c0, c1 + 1):
                if not own[r, k]:
                    continue
                u, v = k + 0.5, r + 0.5
                w0 = ((col[b] - u) * (row[c] - v) - (col[c] - u) * (row[b] - v)) / area
                w1 = ((col[c] - u) * (row[a] - v) - (col[a] - u) * (row[c] - v)) / area
                w2 = 1.0 - w0 - w1
                if w0 >= -1e-12 and w1 >= -1e-12 and w2 >= -1e-12:
                    height = np.float32(w0 * z[a] + w1 * z[b] + w2 * z[c])
                    if not chm[r, k] >= height:  # NaN is not >=
                        chm[r, k] = height

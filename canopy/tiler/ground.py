"""The ground under a point cloud: what is gathered of it per cell, which cells are ground, and the surface between them.

Cells are anchored to the origin of the CRS. What a cell holds does not depend on the order in which points, chunks and
files come, to the last bit: sums are kept in integers, and of equal returns the one farther west, then south, counts.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from canopy.tiler.tin import Bounds, Floats, TiledTin, compiled, one_per_place

MAX_BELOW_GROUND_M = 2.0
"""A point deeper than this is low noise (or its ground is wrong): dropped and counted, not set to 0."""
MARGIN_M = 60.0
"""The ground is built this far beyond the heights, so that the filter's largest window sees both sides of their edge."""
BLOCK_M = 20.0
"""Side of the blocks within which a lowest return may be found to be noise, about."""

_Z_STEPS, _PLACE_STEPS = 1 << 14, 1 << 20
"""Steps per metre and per cell of the integer sums: 0.06 mm, which a float32 has up to 1 km of elevation."""
_JOIN_VERTICES = 2_000_000
"""Vertices gathered before those that share a place are joined."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Surface:
    """Elevations at the centres of square cells, row 0 north, and a finer surface of triangles where there is one."""

    z_m: Floats
    left: float
    top: float
    cell: float
    tin: TiledTin | None = None

    @classmethod
    def flat(cls) -> Surface:
        """Zero everywhere."""
        return cls(z_m=np.zeros((1, 1)), left=0.0, top=0.0, cell=1.0)

    def under(self, x: Floats, y: Floats) -> Floats:
        """Elevations in metres at places in CRS units; NaN where the ground is unknown.

        In the triangles where they are, else bilinear between the cells: outside the hull of a tile's vertices the cells'
        surface goes on along the general slope. Too far from any ground return both are unknown.
        """
        out = np.empty(x.size)
        _bilinear(x, y, self.z_m, self.left, self.top, self.cell, out)
        if self.tin is not None:
            in_triangles = self.tin.under(x, y)
            np.copyto(out, in_triangles, where=np.isfinite(in_triangles) & np.isfinite(out))
        return out


@dataclass(slots=True, kw_only=True, eq=False)
class GroundCells:
    """What the first pass over the points gathers.

    Planes of `total` and `low`: z_m, and the offsets of the point from the cell's centre along columns and rows, in cells.
    """

    left: float
    top: float
    cell: float
    cell_m: float
    count: NDArray[np.int32]
    """Ground returns."""
    total: NDArray[np.int64]
    """Sums over the ground returns, in steps."""
    low: NDArray[np.float32]
    """The lowest return."""
    seen: NDArray[np.int64] = field(default_factory=lambda: np.zeros(2, np.int64))
    """Ground returns, and returns in all."""
    vertex_cell: float | None = None
    """Cells that give at most one vertex to a triangulation; None: no vertices are gathered."""
    _vertices: list[tuple[Floats, Floats, Floats]] = field(default_factory=list)
    _joined: int = 0

    @classmethod
    def over(cls, bounds: Bounds, cell_m: float, metres_per_unit: float, vertex_m: float | None = None) -> GroundCells:
        """Cells for all of `bounds`, in whole blocks from the origin of the CRS.

        Cells and noise blocks then do not depend on the corner of what was asked for.
        """
        cell, per = cell_m / metres_per_unit, _block_cells(cell_m)
        left, bottom, right, top = bounds
        block = cell * per
        col0, col1 = math.floor(left / block), math.ceil(right / block)
        row0, row1 = math.floor(-top / block), math.ceil(-bottom / block)
        shape = ((row1 - row0) * per, (col1 - col0) * per)
        return cls(
            left=col0 * block,
            top=-row0 * block,
            cell=cell,
            cell_m=cell_m,
            count=np.zeros(shape, np.int32),
            total=np.zeros((3, *shape), np.int64),
            low=np.full((3, *shape), np.nan, np.float32),
            vertex_cell=None if vertex_m is None else vertex_m / metres_per_unit,
        )

    @property
    def bounds(self) -> Bounds:
        """left, bottom, right, top of the cells, CRS units."""
        rows, cols = self.count.shape
        return self.left, self.top - rows * self.cell, self.left + cols * self.cell, self.top

    def add_ground(self, x: Floats, y: Floats, z_m: NDArray[np.float32], is_ground: NDArray[np.bool_]) -> None:
        """Take in classified returns."""
        _sum_ground(x, y, z_m, is_ground, self.left, self.top, self.cell, self.count, self.total, self.seen)
        if self.vertex_cell is not None:
            self._vertices.append((x[is_ground], y[is_ground], z_m[is_ground].astype(np.float64)))
            if sum(part[0].size for part in self._vertices) > self._joined + _JOIN_VERTICES:
                self._join()

    def add_lowest(self, x: Floats, y: Floats, z_m: NDArray[np.float32]) -> None:
        """Take in returns of any class."""
        _lowest(x, y, z_m, self.left, self.top, self.cell, self.low)

    def mean_place(self) -> Floats:
        """Mean of the ground returns per cell: z_m, column and row offset in cells; NaN where there is none."""
        place = np.full(self.total.shape, np.nan)
        for sums, steps, out in zip(self.total, (_Z_STEPS, _PLACE_STEPS, _PLACE_STEPS), place, strict=True):
            np.divide(sums, self.count.astype(np.float64) * steps, out=out, where=self.count > 0)
        return place

    def ground_vertices(self) -> tuple[Floats, Floats, Floats]:
        """x, y and z_m of the ground returns, at most one per vertex cell, sorted by place."""
        self._join()
        return self._vertices[0]

    def low_place(self) -> tuple[Floats, Floats, Floats]:
        """Coordinates x and y, CRS units, and z_m of the lowest return of each cell, as planes."""
        rows, cols = np.indices(self.count.shape, np.float64)
        z_m, across, down = self.low.astype(np.float64)
        return self.left + (cols + 0.5 + across) * self.cell, self.top - (rows + 0.5 + down) * self.cell, z_m

    def _join(self) -> None:
        assert self.vertex_cell is not None, "no vertices were gathered"
        x, y, z = (np.concatenate([part[k] for part in self._vertices]) for k in range(3))
        self._vertices = [one_per_place(x, y, z, self.vertex_cell)]
        self._joined = self._vertices[0][0].size


def _block_cells(cell_m: float) -> int:
    """Cells along one side of a block of about 20 m."""
    return max(2, round(20 / cell_m))


def low_noise(z_m: Floats, cell_m: float) -> NDArray[np.bool_]:
    """Cells whose lowest return is noise: more than `MAX_BELOW_GROUND_M` below the third lowest cell of its 20 m block.

    Why the third: under dense canopy true ground shows in a few cells only, far below their neighbours, so being lower
    than the neighbours proves nothing; being alone does.
    """
    per = _block_cells(cell_m)
    rows, cols = z_m.shape
    blocks = np.where(np.isfinite(z_m), z_m, np.inf).reshape(rows // per, per, cols // per, per)
    third = np.partition(blocks.swapaxes(1, 2).reshape(rows // per, cols // per, -1), 2, axis=-1)[..., 2]
    third = np.where(np.isfinite(third), third, -np.inf)  # fewer than three cells: nothing to compare with
    return np.asarray(z_m < third.repeat(per, 0).repeat(per, 1) - MAX_BELOW_GROUND_M)


def morphological_ground(z_m: Floats, *, cell_m: float, window_m: float, slope: float) -> NDArray[np.bool_]:
    """Which cells of lowest returns are ground, by openings with growing windows.

    An opening with a window wider than an object removes the object and leaves a plane, however steep, as it is. A cell
    that an opening lowers by more than slope * window radius is an object. Zhang et al. 2003 (IEEE TGRS 41, 872-882), with
    the linear thresholds of Pingel et al. 2013 (ISPRS J. 77, 21-30); the radii grow by about a quarter instead of by one
    cell, 9 openings for a window of 40 cells.
    """
    ground = np.isfinite(z_m)
    surface = membrane(z_m)
    radius, last = 1, max(1, round(window_m / cell_m / 2))
    while radius <= last:
        side = 2 * radius + 1
        opened = ndimage.grey_opening(surface, size=(side, side), mode="nearest")
        ground &= surface - opened <= slope * radius * cell_m
        surface = opened
        radius = last if radius < last < radius * 1.25 + 1 else math.ceil(radius * 1.25 + 0.5)
    return ground


def plane(z_m: Floats) -> Floats:
    """The plane through the known cells by least squares, at all cells."""
    rows, cols = np.nonzero(np.isfinite(z_m))
    middle = rows.mean(), cols.mean()
    # The sums in a fixed order, which a library of linear algebra does not promise.
    products, right = np.zeros((3, 3)), np.zeros(3)
    _sum_products(z_m, middle[0], middle[1], products, right)
    # By the normal equations; a single row or column of cells leaves one slope open, which `pinv` sets to 0.
    level, per_row, per_col = np.linalg.pinv(products) @ right
    return np.asarray(
        level + per_row * (np.arange(z_m.shape[0]) - middle[0])[:, None] + per_col * (np.arange(z_m.shape[1]) - middle[1])
    )


def centred(place: Floats) -> Floats:
    """Elevations at all cell centres from (z_m, column offset, row offset) of one return per cell, NaN where there is none.

    The slope comes from a first surface smoothed over about five cells; without it a lowest return, which lies at the
    lower edge of its cell, would pull steep ground down by half a cell times the slope.
    """
    tilt = plane(place[0])  # where the ground ends on a slope a membrane sags; what the plane leaves over does not
    first = ndimage.gaussian_filter(membrane(place[0] - tilt), 2.0, mode="nearest") + tilt
    rise_row, rise_col = np.gradient(first)
    return membrane(place[0] - rise_col * place[1] - rise_row * place[2] - tilt) + tilt


def membrane(z_m: Floats, sweeps: int = 24) -> Floats:
    """`z_m` with its NaN replaced by a membrane stretched between the known cells (Laplace's equation), coarse to fine.

    A plane stays a plane across a gap. At least one cell must be known.
    """
    known = np.isfinite(z_m)
    assert known.any(), "membrane needs a known cell"
    if known.all():
        return z_m.copy()
    rows, cols = z_m.shape
    if max(rows, cols) <= 2:
        return np.where(known, z_m, z_m[known].mean())
    half = ((rows + 1) // 2, (cols + 1) // 2)
    pairs = np.full((half[0] * 2, half[1] * 2), np.nan)
    pairs[:rows, :cols] = z_m
    quads = pairs.reshape(half[0], 2, half[1], 2)
    n = np.isfinite(quads).sum(axis=(1, 3))
    coarse = np.divide(np.nansum(quads, axis=(1, 3)), n, out=np.full(half, np.nan), where=n > 0)
    coarse = membrane(coarse, sweeps)
    row, col = np.nonzero(~known)
    out = z_m.copy()
    out[row, col] = ndimage.map_coordinates(coarse, [(row - 0.5) / 2, (col - 0.5) / 2], order=1, mode="nearest")
    _relax(out, row, col, sweeps)
    return out


def farther_than(reach: float, known: NDArray[np.bool_], step: tuple[float, float]) -> NDArray[np.bool_]:
    """Cells whose centre lies farther than `reach` from the centre of every known cell; all where none is known.

    Only cells within reach are looked at, which next to a distance transform of the whole costs little.

    Args:
        reach: in the unit of `step`.
        known: (row, col).
        step: from row to row and from column to column.
    """
    out = np.empty(known.shape, np.bool_)
    _farther_than(reach, known, *step, out)
    return out


# --- inner loops -------------------------------------------------------------------------------------------------------


@compiled
def _bilinear(  # noqa: PLR0917 - compiled loops take plain arrays and numbers
    x: Floats, y: Floats, z_m: Floats, left: float, top: float, cell: float, out: Floats
) -> None:
    last_row, last_col = z_m.shape[0] - 1, z_m.shape[1] - 1
    for i in range(x.size):
        u = min(max((x[i] - left) / cell - 0.5, 0.0), float(last_col))
        v = min(max((top - y[i]) / cell - 0.5, 0.0), float(last_row))
        c0, r0 = int(u), int(v)
        c1, r1 = min(c0 + 1, last_col), min(r0 + 1, last_row)
        u, v = u - c0, v - r0
        north = z_m[r0, c0] + u * (z_m[r0, c1] - z_m[r0, c0])
        south = z_m[r1, c0] + u * (z_m[r1, c1] - z_m[r1, c0])
        out[i] = north + v * (south - north)


@compiled
def _sum_ground(  # noqa: PLR0917 - as above
    x: Floats,
    y: Floats,
    z_m: NDArray[np.float32],
    is_ground: NDArray[np.bool_],
    left: float,
    top: float,
    cell: float,
    count: NDArray[np.int32],
    total: NDArray[np.int64],
    seen: NDArray[np.int64],
) -> None:
    rows, cols = count.shape
    for i in range(x.size):
        u, v = (x[i] - left) / cell, (top - y[i]) / cell
        if 0.0 <= u < cols and 0.0 <= v < rows:
            seen[1] += 1
            if is_ground[i]:
                c, r = int(u), int(v)
                seen[0] += 1
                count[r, c] += 1
                total[0, r, c] += np.int64(np.rint(np.float64(z_m[i]) * _Z_STEPS))
                total[1, r, c] += np.int64(np.rint((u - c - 0.5) * _PLACE_STEPS))
                total[2, r, c] += np.int64(np.rint((v - r - 0.5) * _PLACE_STEPS))


@compiled
def _lowest(  # noqa: PLR0917 - as above
    x: Floats, y: Floats, z_m: NDArray[np.float32], left: float, top: float, cell: float, low: NDArray[np.float32]
) -> None:
    rows, cols = low.shape[1:]
    for i in range(x.size):
        u, v = (x[i] - left) / cell, (top - y[i]) / cell
        if 0.0 <= u < cols and 0.0 <= v < rows:
            c, r = int(u), int(v)
            held = low[0, r, c]
            if z_m[i] > held:  # NaN, no return yet, is not
                continue
            across, down = np.float32(u - c - 0.5), np.float32(v - r - 0.5)
            if z_m[i] == held and (across, -down) >= (low[1, r, c], -low[2, r, c]):
                continue
            low[0, r, c], low[1, r, c], low[2, r, c] = z_m[i], across, down


@compiled
def _sum_products(z_m: Floats, middle_row: float, middle_col: float, products: Floats, right: Floats) -> None:
    """Sums of the products of (1, row, column) with each other and with z, over the known cells."""
    rows, cols = z_m.shape
    for r in range(rows):
        for c in range(cols):
            z = z_m[r, c]
            if not np.isfinite(z):
                continue
            v, u = r - middle_row, c - middle_col
            products[0, 0] += 1.0
            products[1, 1] += v * v
            products[2, 2] += u * u
            products[0, 1] += v
            products[0, 2] += u
            products[1, 2] += v * u
            right[0] += z
            right[1] += v * z
            right[2] += u * z
    products[1, 0], products[2, 0], products[2, 1] = products[0, 1], products[0, 2], products[1, 2]


@compiled
def _relax(z_m: Floats, row: NDArray[np.int64], col: NDArray[np.int64], sweeps: int) -> None:
    """Gauss-Seidel sweeps of Laplace's equation over the cells listed.

    Over-relaxed but for the last four, which smooth what that roughens.
    """
    rows, cols = z_m.shape
    for sweep in range(sweeps):
        step = 1.5 if sweep < sweeps - 4 else 1.0
        for i in range(row.size):
            r, c = row[i], col[i]
            if 0 < r < rows - 1 and 0 < c < cols - 1:
                mean = (z_m[r - 1, c] + z_m[r + 1, c] + z_m[r, c - 1] + z_m[r, c + 1]) * 0.25
            else:
                total, n = 0.0, 0
                if r > 0:
                    total, n = total + z_m[r - 1, c], n + 1
                if r < rows - 1:
                    total, n = total + z_m[r + 1, c], n + 1
                if c > 0:
                    total, n = total + z_m[r, c - 1], n + 1
                if c < cols - 1:
                    total, n = total + z_m[r, c + 1], n + 1
                mean = total / n
            z_m[r, c] += step * (mean - z_m[r, c])


@compiled
def _farther_than(reach: float, known: NDArray[np.bool_], down: float, across: float, out: NDArray[np.bool_]) -> None:
    rows, cols = known.shape
    none = 1 << 30
    # Rows to the nearest known cell of the same column.
    away = np.empty((rows, cols), np.int32)
    for c in range(cols):
        away[0, c] = 0 if known[0, c] else none
    for r in range(1, rows):
        for c in range(cols):
            away[r, c] = 0 if known[r, c] else min(away[r - 1, c] + 1, none)
    for r in range(rows - 2, -1, -1):
        for c in range(cols):
            away[r, c] = min(away[r, c], away[r + 1, c] + 1)
    for r in range(rows):
        near = False  # whether any column has a known cell within reach of this row
        for c in range(cols):
            out[r, c] = away[r, c] == none or away[r, c] * down > reach
            near |= not out[r, c]
        if not near:
            continue
        for c in range(cols):
            if not out[r, c]:
                continue
            k = 1
            while k < cols and k * across <= reach and out[r, c]:
                for other in (c - k, c + k):
                    if 0 <= other < cols and away[r, other] != none:
                        out[r, c] &= math.sqrt((away[r, other] * down) ** 2 + (k * across) ** 2) > reach
                k += 1

"""Coarser cells of a map: what share of a cell each pixel is, exactly, and statistics of the pixels in cells.

Cells begin at the origin of the CRS like the lattice of pixels, so those of two maps lie on each other. Their side need not
be a multiple of the pixel's (10 m is none of 0.6 m): a pixel that a border runs through counts in each cell with the area
that lies there. Pixels and cells are rectangles with parallel sides, so the share is that along the rows times that along
the columns, and nothing is resampled.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final, Self

import numpy as np
from numba import njit
from numpy.typing import NDArray
from scipy import sparse

from canopy.errors import AnalysisError
from canopy.grid import SNAP_TOLERANCE_PX, Box, Grid, Lattice
from canopy.mosaicker.quantum import QUANTUM_M

LEAST_KNOWN: Final = 0.5
"""Share of a cell that must be known for it to have statistics, as for block R² and the errors of means."""

MOST_SIDE_M: Final = 1000.0
"""Largest cells, so that a window of one fits into memory."""

_CHUNK_PX: Final = 1024
"""Side of the windows, about, in which a map is read."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Cells:
    """The cells that cover a map."""

    lattice: Lattice
    """Its pixels are the cells."""
    box: Box
    """Those that touch the map."""
    source: Grid
    """The map."""

    @classmethod
    def over(cls, source: Grid, side_m: float) -> Self:
        """The cells of a side over a map.

        Raises:
            AnalysisError: the cells are smaller than two pixels, or the map does not lie straight in its CRS.
        """
        a, b, _, d, e, _ = tuple(source.transform)[:6]
        if b or d or a <= 0 or e >= 0:
            raise AnalysisError("the map is not north-up; make it again with canopy map")
        if not (math.isfinite(side_m) and side_m >= 2 * max(source.gsd) and side_m <= MOST_SIDE_M):
            raise AnalysisError(
                f"cells of {side_m:g} m: give a side of at least two pixels ({2 * max(source.gsd):g} m) and at most "
                f"{MOST_SIDE_M:g} m"
            )
        lattice = Lattice(crs=source.crs, gsd_m=side_m)
        return cls(lattice=lattice, box=lattice.covering(source.bounds), source=source)

    @property
    def grid(self) -> Grid:
        """Where the cells lie."""
        return self.lattice.grid(self.box)

    def edges_px(self) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Edges of the cells along the rows and along the columns, in pixels of the map from its first one, ascending.

        An edge within a thousandth of a pixel of a pixel's edge is that edge, as for the lattice.
        """
        rows, cols = self.box.shape
        _, row_edges = self.source.pixel(0.0, self.grid.xy(0, np.arange(rows + 1.0))[1])
        col_edges, _ = self.source.pixel(self.grid.xy(np.arange(cols + 1.0), 0)[0], 0.0)
        return _snapped(row_edges), _snapped(col_edges)

    def chunks(self) -> Iterator[tuple[int, int, CellWindow]]:
        """(row, column of the first cell, window) of parts of the cells, each cell in one."""
        row_edges, col_edges = self.edges_px()
        rows, cols = self.box.shape
        step = max(1, math.floor(_CHUNK_PX * max(self.source.gsd) / self.lattice.gsd_m))
        for row in range(0, rows, step):
            for col in range(0, cols, step):
                yield (
                    row,
                    col,
                    CellWindow(row_edges=row_edges[row : row + step + 1], col_edges=col_edges[col : col + step + 1]),
                )


def _snapped(edges: NDArray[np.float64]) -> NDArray[np.float64]:
    whole = np.rint(edges)
    return np.where(np.abs(edges - whole) < SNAP_TOLERANCE_PX, whole, edges)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class CellWindow:
    """A rectangle of cells and the pixels under it."""

    row_edges: NDArray[np.float64]
    """Edges of the cells along the rows, in pixels of the map from its first one, ascending."""
    col_edges: NDArray[np.float64]

    @property
    def box(self) -> Box:
        """Pixels of the map; may hang over its edges."""
        (top, bottom), (left, right) = ((math.floor(e[0]), math.ceil(e[-1])) for e in (self.row_edges, self.col_edges))
        return Box(top, left, bottom, right)

    @property
    def shape(self) -> tuple[int, int]:
        """(rows, columns) of cells."""
        return self.row_edges.size - 1, self.col_edges.size - 1

    def shares(self, counted: NDArray[np.bool_]) -> NDArray[np.float64]:
        """(row, col) share of the area of each cell whose pixels count, from (row, col) pixels of `box`."""
        assert counted.shape == self.box.shape, f"{counted.shape} pixels for {self.box}"
        along_rows, along_cols = _weights(self.row_edges), _weights(self.col_edges)
        return np.asarray(along_cols @ (along_rows @ counted.astype(np.float64)).T).T

    def quantiles(self, height_m: NDArray[np.float32], levels: tuple[float, ...]) -> NDArray[np.float32]:
        """(level, row, col) heights that the shares `levels` of the known area of a cell do not exceed; NaN without any.

        Args:
            height_m: (row, col) pixels of `box`, metres on the quantum, NaN unknown.
            levels: Ascending; 1 is the greatest height.
        """
        assert height_m.shape == self.box.shape, f"{height_m.shape} pixels for {self.box}"
        out = np.full((len(levels), *self.shape), np.nan, np.float32)
        if np.isfinite(height_m).any():
            quanta = height_m / np.float32(QUANTUM_M)
            assert np.array_equal(quanta, np.rint(quanta), equal_nan=True), "heights off the quantum"
            first, last = int(np.nanmin(quanta)), int(np.nanmax(quanta))
            _quantiles(quanta, self.row_edges, self.col_edges, np.array(levels), first, last, out)
        return out


def _weights(edges: NDArray[np.float64]) -> sparse.csr_matrix:
    """(cell, pixel) length of a pixel inside a cell over the cell's length; from the first pixel that a cell touches."""
    origin, rows, cols, values = math.floor(edges[0]), [], [], []
    for cell, (first, stop) in enumerate(zip(edges[:-1].tolist(), edges[1:].tolist(), strict=True)):
        pixel = np.arange(math.floor(first), math.ceil(stop))
        inside = np.minimum(pixel + 1, stop) - np.maximum(pixel, first)
        rows.append(np.full(pixel.size, cell))
        cols.append(pixel - origin)
        values.append(inside / (stop - first))
    at = (np.concatenate(rows), np.concatenate(cols))
    return sparse.csr_matrix((np.concatenate(values), at), shape=(edges.size - 1, math.ceil(edges[-1]) - origin))


@njit(nogil=True, cache=True)
def _quantiles(  # noqa: PLR0917 - numba takes no keywords
    quanta: NDArray[np.float32], row_edges: NDArray[np.float64], col_edges: NDArray[np.float64],
    levels: NDArray[np.float64], first: int, last: int, out: NDArray[np.float32],
) -> None:  # fmt: skip
    """Fill `out` by a histogram of the heights in each cell."""
    area = np.zeros(last - first + 1)
    row0, col0 = int(np.floor(row_edges[0])), int(np.floor(col_edges[0]))
    for i in range(row_edges.size - 1):
        for j in range(col_edges.size - 1):
            total, least, largest = 0.0, last, first
            for row in range(int(np.floor(row_edges[i])), int(np.ceil(row_edges[i + 1]))):
                high = min(row + 1, row_edges[i + 1]) - max(row, row_edges[i])
                for col in range(int(np.floor(col_edges[j])), int(np.ceil(col_edges[j + 1]))):
                    q = quanta[row - row0, col - col0]
                    if np.isnan(q):
                        continue
                    weight = high * (min(col + 1, col_edges[j + 1]) - max(col, col_edges[j]))
                    area[int(q) - first] += weight
                    total += weight
                    least, largest = min(least, int(q)), max(largest, int(q))
            if total == 0:
                continue
            reached, k = 0.0, 0
            for q in range(least, largest + 1):
                reached += area[q - first]
                area[q - first] = 0.0
                while k < levels.size and (q == largest or (levels[k] < 1 and reached > levels[k] * total * (1 - 1e-9))):
                    out[k, i, j] = q * np.float32(QUANTUM_M)
                    k += 1

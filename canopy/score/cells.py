"""Heights from rasters of any CRS and pixel size on the cells of a comparison.

A comparison's cells are never finer than any of its rasters. Where a raster's pixels are the cells, they are taken as they
are. Where a whole number of them is a cell, the cell's height is their mean, their greatest or a percentile of them,
computed here. Otherwise every pixel counts with the area that it has in the cell: exactly for means (GDAL's `average`); for
the greatest height and percentiles by laying a grid of points at least twice as fine as the pixels over the cell, unless a
pixel is more than half as wide as a cell: then it is a statistic of the ground itself, and is averaged. Pixels without a
height have no part in it, and a cell of which less than `LEAST_SHARE` is known is unknown.

Nothing is interpolated: a cell's height is a statistic of heights that somebody measured or predicted in it.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from affine import Affine
from numpy.typing import NDArray
from pyproj import CRS, Transformer
from pyproj.exceptions import ProjError

from canopy.errors import GridError, RasterError
from canopy.grid import SNAP_TOLERANCE_PX, Box, Grid, is_metric
from canopy.raster import RasterPool, area_means, nearest
from canopy.score.result import Statistic
from canopy.tiler.headers import ImageFile, PixelGrid
from canopy.tiler.heights import MAX_BELOW_GROUND_M, MAX_HEIGHT_M

LEAST_SHARE = 0.5
"""Least share of a cell that must be known."""

POINTS_PER_PIXEL = 2
"""Points along a pixel's side where a statistic is taken of points."""

NATIVE_PX = 2048
"""Side of what is read of a raster at a time, in its own pixels."""

FINER = 1 + 1e-3
"""Pixels that differ in size by less than this factor are taken for equally large."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Cells:
    """The cells of a comparison: square, north up, counted from an origin of their own."""

    crs: CRS
    """In metres."""
    gsd_m: float
    """Side of a cell."""
    x0_m: float = 0.0
    """Easting of the left edge of column 0."""
    y0_m: float = 0.0
    """Northing of the upper edge of row 0."""

    def grid(self, box: Box) -> Grid:
        """The grid of `box`."""
        left, top = self.x0_m + box.col0 * self.gsd_m, self.y0_m - box.row0 * self.gsd_m
        return Grid(crs=self.crs, transform=Affine(self.gsd_m, 0, left, 0, -self.gsd_m, top), shape=box.shape)

    def covering(self, bounds: tuple[float, float, float, float]) -> Box | None:
        """The cells whose whole area lies in `bounds` = (left, bottom, right, top), with a hair of tolerance."""
        left, right = ((x - self.x0_m) / self.gsd_m for x in bounds[::2])
        bottom, top = ((self.y0_m - y) / self.gsd_m for y in bounds[1::2])
        row0, row1 = math.floor(top + SNAP_TOLERANCE_PX), math.ceil(bottom - SNAP_TOLERANCE_PX)
        col0, col1 = math.floor(left + SNAP_TOLERANCE_PX), math.ceil(right - SNAP_TOLERANCE_PX)
        return Box(row0, col0, row1, col1) if row0 < row1 and col0 < col1 else None

    def moved(self, x_m: float, y_m: float) -> Cells:
        """The same cells so much farther east and north."""
        return replace(self, x0_m=self.x0_m + x_m, y0_m=self.y0_m + y_m)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Heights:
    """Heights of a box of cells; arrays are (row, col)."""

    height_m: NDArray[np.float64]
    """Metres, NaN where unknown."""
    refused: NDArray[np.bool_]
    """Cells with a pixel that holds no possible height; such pixels are unknown."""
    negative: NDArray[np.bool_]
    """Cells with a pixel a little below 0 m; such pixels count as 0 m."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Placed:
    file: ImageFile
    box: Box
    """On the pixel grid of its layer."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Layer:
    """Files of one pixel grid."""

    crs: CRS
    grid: PixelGrid
    placed: tuple[_Placed, ...]
    boxes: NDArray[np.int64]
    """(file, 4): their corners, as of a `Box`."""

    @classmethod
    def of(cls, grid: PixelGrid, files: Sequence[ImageFile]) -> _Layer:
        placed = tuple(_place(file) for file in files)
        return cls(crs=files[0].grid.crs, grid=grid, placed=placed, boxes=corners([each.box for each in placed]))

    @property
    def gsd_m(self) -> float:
        return self.placed[0].file.gsd_m

    def grid_of(self, box: Box) -> Grid:
        transform = self.grid.transform @ Affine.translation(box.col0, box.row0)
        return Grid(crs=self.crs, transform=transform, shape=box.shape)


class HeightRasters:
    """Height rasters of one kind, as one: a map in a file or in sheets, or the tiles of an airborne survey.

    Where files overlap, the finer counts, then the newer, as everywhere in canopy.
    """

    def __init__(
        self,
        files: Sequence[ImageFile],
        *,
        band: int,
        metres: Mapping[Path, tuple[float, float]],
        judged: bool,
        pool: RasterPool,
        alpha_is_mask: bool = True,
    ) -> None:
        """Files to read from.

        Args:
            files: Their headers.
            band: Which band holds the heights, from 1.
            metres: Of each file (scale, offset) such that a height in metres is scale * value + offset.
            judged: Whether heights that cannot be are unknown and small negative ones 0 m, as for labels; a map is
                taken at its word.
            pool: Keeps files open.
            alpha_is_mask: Whether a band tagged alpha hides pixels.
        """
        self.files = tuple(sorted(files, key=lambda file: file.preference))
        self._band, self._metres, self._judged, self._pool = band, metres, judged, pool
        self._alpha_is_mask = alpha_is_mask
        by_grid: dict[PixelGrid, list[ImageFile]] = defaultdict(list)
        for file in self.files:
            by_grid[file.pixel_grid].append(file)
        self._layers = tuple(_Layer.of(grid, some) for grid, some in by_grid.items())

    @property
    def gsd_m(self) -> float:
        """Side of the coarsest pixels, metres."""
        return max(file.gsd_m for file in self.files)

    @property
    def metres(self) -> Mapping[Path, tuple[float, float]]:
        """Of each file (scale, offset) such that a height in metres is scale * value + offset."""
        return self._metres

    @property
    def unit_m(self) -> float:
        """Metres per unit of the values of the first file, its scale included."""
        return self._metres[self.files[0].path][0]

    @property
    def starts_at_zero(self) -> bool:
        """Whether a value of 0 is 0 m in all files."""
        return all(offset == 0 for _, offset in self._metres.values())

    def own_cells(self) -> Cells | None:
        """The pixels as cells; None where they are not square, north up and in metres, or not all of one grid."""
        layer = self._layers[0]
        if len(self._layers) > 1 or not is_metric(layer.crs) or not _is_square(layer.grid):
            return None
        x, y = layer.grid.transform @ (0, 0)
        return Cells(crs=layer.crs, gsd_m=layer.grid.a, x0_m=x, y0_m=y)

    def boxes_on(self, cells: Cells) -> list[Box]:
        """The cells that each file touches, in the order of `files`.

        Raises:
            GridError: a file cannot be carried into the cells' CRS.
        """
        found = []
        for file in self.files:
            box = cells.covering(bounds_in(file.grid, cells.crs, str(file.path)))
            assert box is not None, f"{file.path} covers nothing"
            found.append(box)
        return found

    def sample(self, file: ImageFile, windows: int, side_px: int) -> NDArray[np.float64]:
        """(height,) known heights of a file in metres, before they are judged, from windows spread evenly over it."""
        box = _place(file).box
        layer = next(layer for layer in self._layers if layer.grid == file.pixel_grid)
        found = []
        for row in _starts(box.row0, box.row1, windows, side_px):
            for col in _starts(box.col0, box.col1, windows, side_px):
                part = Box(row, col, row + side_px, col + side_px).intersect(box)
                values = None if part is None else self._native(layer, part)
                if values is not None:
                    found.append(values[np.isfinite(values)])
        return np.concatenate(found)

    def resampled(self, cells: Cells, statistic: Statistic) -> str:
        """How the pixels become heights of cells, in words."""
        return "; ".join(dict.fromkeys(_in_words(layer, cells, statistic) for layer in self._layers))

    def untouched_by(self, cells: Cells) -> bool:
        """Whether the pixels are the cells, so that nothing is resampled."""
        return all(_pixels_per_cell(layer, cells) == 1 for layer in self._layers)

    def read(self, cells: Cells, box: Box, statistic: Statistic = "mean") -> Heights:
        """Heights of the cells of `box`.

        They do not depend on the box, but for less than 0.1 mm where pixels of another CRS are weighted by their area.
        """
        height_m = np.full(box.shape, np.nan)
        refused, negative = np.zeros(box.shape, bool), np.zeros(box.shape, bool)
        for layer in self._layers:
            for part in _parts(box, max(1, int(NATIVE_PX * layer.gsd_m / cells.gsd_m))):
                here = part.slices_in(box)
                found = self._layer(layer, cells, part, statistic)
                if found is None:
                    continue
                take = np.isnan(height_m[here]) & np.isfinite(found.height_m)
                height_m[here][take] = found.height_m[take]
                refused[here] |= found.refused
                negative[here] |= found.negative
        return Heights(height_m=height_m, refused=refused, negative=negative)

    def _layer(self, layer: _Layer, cells: Cells, box: Box, wanted: Statistic) -> Heights | None:
        """Heights of a box from one layer; None where it has no pixel there."""
        grid, side, statistic = cells.grid(box), _pixels_per_cell(layer, cells), _statistic(layer, cells, wanted)
        if side:
            first = _nearest_pixel(layer, grid)
            native = Box(first[0], first[1], first[0] + side * box.shape[0], first[1] + side * box.shape[1])
        else:
            native = _around(layer, grid)
        values = self._native(layer, native)
        if values is None:
            return None
        values_m, refused, negative = judge(values) if self._judged else (values, None, None)

        def any_of(mask: NDArray[np.bool_] | None) -> NDArray[np.bool_]:
            if mask is None or not mask.any():
                return np.zeros(box.shape, bool)
            if side:
                return np.asarray(_blocks(mask, side).any(axis=2))
            return np.asarray(area_means(mask.astype(np.float64), layer.grid_of(native), grid)[0] > 0)

        if side:
            height_m = _of_blocks(_blocks(values_m, side), statistic)
        elif statistic == "mean":
            means, share = area_means(values_m, layer.grid_of(native), grid)
            height_m = np.where(share >= LEAST_SHARE - 1e-9, means, np.nan)
        else:
            points = _points(layer, cells)
            fine = replace(cells, gsd_m=cells.gsd_m / points)
            fine_box = Box(*(points * v for v in (box.row0, box.col0, box.row1, box.col1)))
            height_m = _of_blocks(_blocks(nearest(values_m, layer.grid_of(native), fine.grid(fine_box)), points), statistic)
        return Heights(height_m=height_m, refused=any_of(refused), negative=any_of(negative))

    def _native(self, layer: _Layer, box: Box) -> NDArray[np.float64] | None:
        """(row, col) heights of pixels in metres, NaN where unknown; None where the layer has no file."""
        out: NDArray[np.float64] | None = None
        for index in np.flatnonzero(touched(layer.boxes, box)).tolist():
            placed = layer.placed[index]
            part = placed.box.intersect(box)
            assert part is not None, f"{placed.file.path} misses {box}"
            if out is None:
                out = np.full(box.shape, np.nan)
            here = part.slices_in(box)
            left = np.isnan(out[here])
            if not left.any():
                continue
            pixels = self._pool.get(placed.file.path).read(
                part.row0 - placed.box.row0, part.col0 - placed.box.col0, part.shape, (self._band,),
                alpha_is_mask=self._alpha_is_mask,
            )  # fmt: skip
            scale, offset = self._metres[placed.file.path]
            take = left & pixels.valid
            out[here][take] = pixels.data[0][take].astype(np.float64) * scale + offset
        return out


def corners(boxes: Sequence[Box]) -> NDArray[np.int64]:
    """(box, 4): row0, col0, row1 and col1 of boxes."""
    return np.array([(box.row0, box.col0, box.row1, box.col1) for box in boxes], dtype=np.int64).reshape(-1, 4)


def touched(boxes: NDArray[np.int64], box: Box) -> NDArray[np.bool_]:
    """(box,) which of many boxes have a pixel in common with one."""
    row0, col0, row1, col1 = boxes.T
    return np.asarray((row0 < box.row1) & (row1 > box.row0) & (col0 < box.col1) & (col1 > box.col0))


def _place(file: ImageFile) -> _Placed:
    (row, col), (rows, cols) = file.origin_px, file.grid.shape
    return _Placed(file=file, box=Box(row, col, row + rows, col + cols))


def _parts(box: Box, side: int) -> list[Box]:
    """The box cut at the multiples of `side`, so that a part is the same whatever the box."""
    rows = range(box.row0 // side, (box.row1 - 1) // side + 1)
    cols = range(box.col0 // side, (box.col1 - 1) // side + 1)
    whole = (Box(r * side, c * side, (r + 1) * side, (c + 1) * side) for r in rows for c in cols)
    return [part for each in whole if (part := each.intersect(box)) is not None]


def _starts(start: int, stop: int, count: int, side: int) -> list[int]:
    """First pixels of windows spread evenly along one axis."""
    return sorted({round(v) for v in np.linspace(start, max(start, stop - side), count)})


def judge(values: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.bool_], NDArray[np.bool_]]:
    """Heights as labels have them, and where something was set to unknown or to 0 m for it."""
    refused = (values < -MAX_BELOW_GROUND_M) | (values > MAX_HEIGHT_M)
    negative = (values < 0) & ~refused
    return np.where(refused, np.nan, np.where(negative, 0.0, values)), refused, negative


# --- where pixels and cells are ------------------------------------------------------------------------------------------


def _pixels_per_cell(layer: _Layer, cells: Cells) -> int:
    """How many pixels are a cell along a side, where it is a whole number and edges lie on edges; 0 otherwise."""
    grid = layer.grid
    if layer.crs != cells.crs or not _is_square(grid):
        return 0
    side = round(cells.gsd_m / grid.a)
    if side < 1 or abs(side * grid.a / cells.gsd_m - 1) > 1e-9:
        return 0
    col, row = (v % 1 for v in (~grid.transform) @ (cells.x0_m, cells.y0_m))
    return side if all(min(v, 1 - v) <= SNAP_TOLERANCE_PX for v in (col, row)) else 0


def _is_square(grid: PixelGrid) -> bool:
    """Whether pixels are square and north up."""
    return not grid.b and not grid.d and grid.a > 0 and math.isclose(grid.a, -grid.e, rel_tol=1e-9)


def _nearest_pixel(layer: _Layer, grid: Grid) -> tuple[int, int]:
    """(row, col) of the pixel in the grid's corner."""
    col, row = (~layer.grid.transform) @ grid.xy(0, 0)
    return round(row), round(col)


def _around(layer: _Layer, grid: Grid) -> Box:
    """The pixels that the grid touches and two more on each side."""
    left, bottom, right, top = bounds_in(grid, layer.crs, "the comparison's cells")
    corners = [(~layer.grid.transform) @ (x, y) for x in (left, right) for y in (bottom, top)]
    cols, rows = zip(*corners, strict=True)
    return Box(math.floor(min(rows)) - 2, math.floor(min(cols)) - 2, math.ceil(max(rows)) + 2, math.ceil(max(cols)) + 2)


def bounds_in(grid: Grid, crs: CRS, name: str) -> tuple[float, float, float, float]:
    """(left, bottom, right, top) of a grid in another CRS."""
    if grid.crs == crs:
        return grid.bounds
    try:
        bounds = Transformer.from_crs(grid.crs, crs, always_xy=True).transform_bounds(*grid.bounds, densify_pts=21)
    except ProjError as error:
        raise GridError(f"{name} cannot be carried from {grid.crs.name!r} to {crs.name!r}; check its CRS") from error
    if not all(math.isfinite(v) for v in bounds) or bounds[0] > bounds[2]:
        raise GridError(f"{name} lies outside the domain of {crs.name!r}; check its CRS")
    return bounds


def _points(layer: _Layer, cells: Cells) -> int:
    return math.ceil(POINTS_PER_PIXEL * cells.gsd_m / layer.gsd_m - 1e-9)


def _statistic(layer: _Layer, cells: Cells, wanted: Statistic) -> Statistic:
    """The statistic to take of a layer: pixels that are nearly cells are statistics of the ground already."""
    return "mean" if layer.gsd_m * POINTS_PER_PIXEL > cells.gsd_m * FINER and not _pixels_per_cell(layer, cells) else wanted


def _in_words(layer: _Layer, cells: Cells, wanted: Statistic) -> str:
    side, statistic = _pixels_per_cell(layer, cells), _statistic(layer, cells, wanted)
    if side == 1:
        return "not resampled: its pixels are the cells"
    known = f"of cells known to at least {LEAST_SHARE:.0%}"
    name = {"mean": "means", "max": "greatest heights", "p98": "98th percentiles"}[statistic]
    if side:
        return f"{name} of {side} x {side} pixels, {known}"
    if statistic == "mean":
        return f"means of pixels of {layer.gsd_m:.4g} m weighted by their area in the cell (GDAL average), {known}"
    points = _points(layer, cells)
    return f"{name} of {points} x {points} points in the cell, each the height of its pixel of {layer.gsd_m:.4g} m, {known}"


# --- statistics of blocks ------------------------------------------------------------------------------------------------


def _blocks(values: NDArray[Any], side: int) -> NDArray[Any]:
    """(row, col, side * side): the pixels of each block."""
    rows, cols = (n // side for n in values.shape)
    return values.reshape(rows, side, cols, side).transpose(0, 2, 1, 3).reshape(rows, cols, side * side)


def _of_blocks(blocks: NDArray[np.float64], statistic: Statistic) -> NDArray[np.float64]:
    """(row, col) statistic of the known pixels of each block, NaN where too few are."""
    if blocks.shape[2] == 1:
        return np.ascontiguousarray(blocks[:, :, 0])
    known = np.isfinite(blocks)
    n = known.sum(axis=2)
    measure: Callable[[NDArray[np.float64], NDArray[np.intp]], NDArray[np.float64]]
    measure = {"mean": _mean, "max": _greatest, "p98": _p98}[statistic]
    return np.where(n >= LEAST_SHARE * blocks.shape[2], measure(np.where(known, blocks, np.nan), n), np.nan)


def _mean(blocks: NDArray[np.float64], n: NDArray[np.intp]) -> NDArray[np.float64]:
    return np.asarray(np.nansum(blocks, axis=2) / np.maximum(n, 1))


def _greatest(blocks: NDArray[np.float64], _: NDArray[np.intp]) -> NDArray[np.float64]:
    return np.asarray(np.fmax.reduce(blocks, axis=2))


def _p98(blocks: NDArray[np.float64], n: NDArray[np.intp]) -> NDArray[np.float64]:
    """NumPy's default percentile, linear between neighbours, of the known pixels."""
    ordered = np.sort(blocks, axis=2)  # NaN last
    at = 0.98 * np.maximum(n - 1, 0)
    low = np.floor(at).astype(np.intp)
    below, above = (np.take_along_axis(ordered, k[:, :, None], axis=2)[:, :, 0] for k in (low, np.minimum(low + 1, n - 1)))
    return np.asarray(below + (above - below) * (at - low))


# --- which cells -----------------------------------------------------------------------------------------------------------


def refuse_finer(rasters: HeightRasters, gsd_m: float) -> None:
    """Refuse cells that are finer than the pixels of a raster.

    Raises:
        GridError: they are.
    """
    coarsest = max(rasters.files, key=lambda file: file.gsd_m)
    if coarsest.gsd_m > gsd_m * FINER:
        raise GridError(
            f"--gsd {gsd_m:g} m is finer than the {coarsest.gsd_m:.4g} m of {coarsest.path}, which does not show what lies "
            f"within its pixels; give at least --gsd {coarsest.gsd_m:.4g}"
        )


def bounds_deg(grid: Grid) -> tuple[float, float, float, float]:
    """(west, south, east, north) of a grid.

    Raises:
        RasterError: its CRS has no place on Earth there.
    """
    try:
        return Transformer.from_crs(grid.crs, "EPSG:4326", always_xy=True).transform_bounds(*grid.bounds, densify_pts=21)
    except ProjError as error:
        raise RasterError(f"CRS {grid.crs.name!r} has no known place on Earth; assign the right one") from error

"""Web-mercator tiles: which there are, and how a raster's pixels become theirs.

A pixel of a tile shows the pixel of the raster in which its centre lies, or, where tiles are coarser than the raster, that
of the overview which is just as fine as the tile. Nothing is interpolated, and positions are right to a thousandth of a
pixel (the tests compare them with PROJ's): what a pixel shows does not depend on the tile it is read for, so there are no
seams, and a click tells the value whose colour it hits.

GDAL does the warping, of the window of the raster that the tile needs. Why not rio-tiler, whose result is the same (the
tests compare them too): it makes a virtual raster of the whole map for every tile and warps at the map's own resolution,
which takes two to four times as long, and needs a second for its imports.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import Final, Self

import numpy as np
from affine import Affine
from pyproj import CRS, Transformer
from pyproj.exceptions import ProjError
from rasterio.enums import Resampling

from canopy.errors import RasterError
from canopy.grid import Grid
from canopy.raster import Pixels, RasterPool, open_raster, warp

TILE_PX: Final = 256
"""Side of a tile."""

HALF_WORLD_M: Final = math.pi * 6378137.0
"""Half of the side of the web-mercator square; the radius is that of the equator of WGS 84."""

ZOOM_LIMIT: Final = 24
"""Pixels of 9 mm at the equator: no map needs more."""

WEB_MERCATOR: Final = CRS.from_epsg(3857)
LON_LAT: Final = CRS.from_epsg(4326)

_SLACK = 1 + 1e-3
"""An overview coarser than a tile's pixels by no more than this is as fine as they are."""

_MANY_PX = 4.0
"""Pixels of a raster along a pixel of a tile that are read, though only one is shown, before coarser levels are made."""

Bounds = tuple[float, float, float, float]
"""(left, bottom, right, top)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Tile:
    """A square of the web-mercator pyramid: column x from the west, row y from the north, of 2^zoom."""

    zoom: int
    x: int
    y: int

    def __post_init__(self) -> None:
        assert 0 <= self.zoom <= ZOOM_LIMIT, f"zoom {self.zoom}"
        assert 0 <= self.x < 1 << self.zoom, f"x {self.x}"
        assert 0 <= self.y < 1 << self.zoom, f"y {self.y}"

    @property
    def pixel_m(self) -> float:
        """Side of its pixels in web-mercator metres."""
        return 2 * HALF_WORLD_M / (TILE_PX << self.zoom)

    def grid(self, border_px: int = 0) -> Grid:
        """Its pixels, with so many more around them."""
        left = (self.x * TILE_PX - border_px) * self.pixel_m - HALF_WORLD_M
        top = HALF_WORLD_M - (self.y * TILE_PX - border_px) * self.pixel_m
        side = TILE_PX + 2 * border_px
        transform = Affine(self.pixel_m, 0, left, 0, -self.pixel_m, top)
        return Grid(crs=WEB_MERCATOR, transform=transform, shape=(side, side))

    @property
    def ground_px_m(self) -> float:
        """Side of its pixels on the ground, at its middle: web mercator enlarges by 1 / cos(latitude)."""
        middle = HALF_WORLD_M - (self.y + 0.5) * TILE_PX * self.pixel_m
        return self.pixel_m / math.cosh(middle / (HALF_WORLD_M / math.pi))


def native_zoom(pixel_m: float) -> int:
    """The first zoom whose pixels are no larger than `pixel_m` in web-mercator metres, up to `ZOOM_LIMIT`."""
    return min(max(math.ceil(math.log2(2 * HALF_WORLD_M / (TILE_PX * pixel_m * _SLACK))), 0), ZOOM_LIMIT)


@dataclass(frozen=True, slots=True, kw_only=True)
class Level:
    """A raster at one of its resolutions."""

    path: Path
    overview: int | None
    """Of the file, the finest is 0; None: the file itself."""
    grid: Grid
    factor: float
    """Pixels of the raster along a side of one of these."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TileSource:
    """A raster that tiles are read from."""

    levels: tuple[Level, ...]
    """The finest first."""
    bounds: Bounds
    """Web-mercator metres."""
    more: Callable[[], tuple[Level, ...]] | None = field(default=None, compare=False)
    """Makes coarser levels for a raster that has none, when they are first needed."""

    @classmethod
    def of(cls, path: Path, crs_if_none: CRS | None = None) -> Self:
        """The raster and its overviews.

        Raises:
            RasterError: unreadable, without a place, or in a CRS that has no place on a web map.
        """
        with open_raster(path) as raster:
            grid, count = raster.grid_or(crs_if_none), len(raster.overviews)
        levels = [Level(path=path, overview=None, grid=grid, factor=1.0)]
        for overview in range(count):
            with open_raster(path, overview=overview) as raster:
                levels.append(coarser(grid, raster.shape, path, overview))
        bounds = _carried(grid.bounds, grid.crs, WEB_MERCATOR)
        if bounds is None:
            raise RasterError(f"{path}: CRS {grid.crs.name!r} has no place on a web map there; assign the right one")
        return cls(levels=tuple(levels), bounds=bounds)

    @property
    def path(self) -> Path:
        """The raster itself."""
        return self.levels[0].path

    @property
    def grid(self) -> Grid:
        """Its pixels."""
        return self.levels[0].grid

    @property
    def pixel_m(self) -> float:
        """Side of its pixels at its middle in web-mercator metres, the smaller of the two."""
        row, col = (n / 2 for n in self.grid.shape)
        cols, rows = np.array([0, 1, 0]) + col, np.array([0, 0, 1]) + row
        xs, ys = transformer(self.grid.crs, WEB_MERCATOR).transform(*self.grid.xy(cols, rows))
        return float(np.hypot(xs[1:] - xs[0], ys[1:] - ys[0]).min())

    def read(
        self, pool: RasterPool, target: Grid, bands: tuple[int, ...], *, alpha_is_mask: bool = True, base: int = 0
    ) -> Pixels | None:
        """The pixels that the pixels of `target`, a grid in web mercator, show; None where the raster has none.

        Args:
            pool: Of this thread.
            target: A tile's grid.
            bands: 1-based.
            alpha_is_mask: Whether a band tagged alpha hides pixels.
            base: Taken off integers, which travel as float32 and are exact up to 16 777 216.

        Raises:
            RasterError: the file is damaged or gone.
        """
        left, bottom, right, top = target.bounds
        low_x, low_y, high_x, high_y = self.bounds
        common = max(left, low_x), max(bottom, low_y), min(right, high_x), min(top, high_y)
        if common[0] >= common[2] or common[1] >= common[3]:
            return None
        carried = _carried(common, WEB_MERCATOR, self.grid.crs)
        if carried is None:
            return None
        # Pixels of the raster along a pixel of the target, where they are most.
        per_px = max(1.0, min(self._span(carried, axis) / self._span_of(common, target, axis) for axis in (0, 1)))
        levels = self.levels
        if self.more is not None and per_px > self.levels[-1].factor * _MANY_PX:
            levels += self.more()
        level = max((each for each in levels if each.factor <= per_px * _SLACK), key=lambda each: each.factor)
        window = _window(level.grid, carried)
        if window is None:
            return None
        row, col, shape = window
        pixels = pool.get(level.path, overview=level.overview).read(row, col, shape, bands, alpha_is_mask=alpha_is_mask)
        if not pixels.valid.any():
            return None
        if base:
            pixels = replace(pixels, data=pixels.data - base)
        return warp(pixels, level.grid.crop(row, col, shape), target, resampling=Resampling.nearest)

    def _span(self, bounds: Bounds, axis: int) -> float:
        """Pixels of the raster along an axis of bounds in its CRS."""
        return (bounds[2 + axis] - bounds[axis]) / self.grid.gsd[axis]

    @staticmethod
    def _span_of(bounds: Bounds, target: Grid, axis: int) -> float:
        return (bounds[2 + axis] - bounds[axis]) / target.gsd[axis]


def coarser(grid: Grid, shape: tuple[int, int], path: Path, overview: int | None) -> Level:
    """A level whose pixels cover the ground of a raster's, as GDAL's overviews do."""
    rows, cols = grid.shape[0] / shape[0], grid.shape[1] / shape[1]
    transform = grid.transform @ Affine.scale(cols, rows)
    return Level(
        path=path, overview=overview, grid=Grid(crs=grid.crs, transform=transform, shape=shape), factor=min(rows, cols)
    )


def _window(grid: Grid, bounds: Bounds) -> tuple[int, int, tuple[int, int]] | None:
    """(row, col, shape) of the pixels that hold bounds and one more on each side, those that there are; None: none."""
    left, bottom, right, top = bounds
    cols, rows = grid.pixel(np.array([left, right, left, right]), np.array([top, top, bottom, bottom]))
    row, col = max(math.floor(rows.min()) - 1, 0), max(math.floor(cols.min()) - 1, 0)
    last_row, last_col = min(math.ceil(rows.max()) + 1, grid.shape[0]), min(math.ceil(cols.max()) + 1, grid.shape[1])
    if row >= last_row or col >= last_col:
        return None
    return row, col, (last_row - row, last_col - col)


# --- between systems -------------------------------------------------------------------------------------------------------


@lru_cache(maxsize=64)
def _transformer(source: str, target: str) -> Transformer:
    """Made once: making one takes longer than using it. pyproj's may be used by several threads."""
    return Transformer.from_crs(source, target, always_xy=True)


def transformer(source: CRS, target: CRS) -> Transformer:
    """From (x, y), or (longitude, latitude), to the same."""
    return _transformer(source.to_wkt(), target.to_wkt())


def _carried(bounds: Bounds, source: CRS, target: CRS) -> Bounds | None:
    """Bounds in another CRS; None where they have no place there."""
    try:
        left, bottom, right, top = transformer(source, target).transform_bounds(*bounds, densify_pts=21)
    except ProjError:
        return None
    found = (left, bottom, right, top)
    return found if all(math.isfinite(v) for v in found) and left < right and bottom < top else None

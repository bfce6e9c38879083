"""Web-mercator tiles: which there are, and how values are read for their pixels."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray
from rasterio.crs import CRS as RasterioCRS

from canopy.raster import Raster

TILE_PX: Final = 256
"""Side of a tile."""

HALF_WORLD_M: Final = math.pi * 6378137.0
"""Half of the side of the web-mercator square; the radius is that of WGS 84's ellipsoid at the equator."""

ZOOM_LIMIT: Final = 24
"""Pixels of 9 mm at the equator: no map needs more."""


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
    def bounds(self) -> tuple[float, float, float, float]:
        """(left, bottom, right, top) in web-mercator metres."""
        side = 2 * HALF_WORLD_M / (1 << self.zoom)
        left, top = self.x * side - HALF_WORLD_M, HALF_WORLD_M - self.y * side
        return left, top - side, left + side, top

    @property
    def pixel_m(self) -> float:
        """Side of its pixels in web-mercator metres."""
        return 2 * HALF_WORLD_M / (TILE_PX << self.zoom)

    @property
    def ground_px_m(self) -> float:
        """The same on the ground, at the tile's middle: web mercator enlarges by 1 / cos(latitude)."""
        _, bottom, _, top = self.bounds
        return self.pixel_m / math.cosh((bottom + top) / 2 / (HALF_WORLD_M / math.pi))


def native_zoom(gsd_m: float, latitude_deg: float) -> int:
    """The first zoom whose pixels are no larger than `gsd_m` on the ground."""
    circle_m = 2 * HALF_WORLD_M * math.cos(math.radians(latitude_deg))
    return min(max(math.ceil(math.log2(circle_m / (TILE_PX * gsd_m))), 0), ZOOM_LIMIT)


def read_tile(raster: Raster, tile: Tile, bands: tuple[int, ...], *, buffer_px: int = 0) -> NDArray[Any]:
    """(band, row, col) masked values at a tile's pixels: those of the pixels of the raster, or of the overview of it that is
    as fine as the tile, in which their centres lie. Nothing is interpolated.

    Args:
        raster: Open for this thread.
        tile: Which.
        bands: 1-based.
        buffer_px: Pixels around the tile that are read too.
    """
    from rio_tiler.reader import part

    image = part(
        raster.dataset, tile.bounds, height=TILE_PX, width=TILE_PX, dst_crs=_web_mercator(), indexes=bands,
        buffer=buffer_px or None, resampling_method="nearest", reproject_method="nearest",
    )  # fmt: skip
    return image.array  # type: ignore[no-any-return]


def heights_of(values: Any) -> NDArray[np.float32]:
    """(band, row, col) values as heights: NaN where masked."""
    return np.ma.filled(values.astype(np.float32), np.nan)  # type: ignore[no-any-return]


def _web_mercator() -> RasterioCRS:
    return RasterioCRS.from_epsg(3857)

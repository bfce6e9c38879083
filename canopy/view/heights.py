"""Values in metres at the pixels of tiles: the map's own, and those of a reference."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from canopy.grid import Grid
from canopy.raster import RasterPool
from canopy.view.tiles import LON_LAT, TileSource, transformer


class TileHeights(Protocol):
    """Values in metres, wherever they come from."""

    def read(self, target: Grid, pool: RasterPool) -> NDArray[np.float32] | None:
        """(row, col) values at the pixels of a grid in web mercator, NaN = unknown; None where none is known."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MapBand:
    """A band of a raster of the map, in metres."""

    source: TileSource
    band: int
    """1-based."""

    def read(self, target: Grid, pool: RasterPool) -> NDArray[np.float32] | None:
        """As `TileHeights`."""
        pixels = self.source.read(pool, target, (self.band,))
        return None if pixels is None or not pixels.valid.any() else pixels.data[0]


@dataclass(frozen=True, slots=True, kw_only=True)
class Reference:
    """Rasters of heights that the map is held against, read as `canopy score` reads them."""

    sources: tuple[TileSource, ...]
    """The preferred first."""
    metres: Mapping[Path, tuple[float, float]]
    """Of each file (scale, offset) such that a height in metres is scale * value + offset."""
    band: int

    def read(self, target: Grid, pool: RasterPool) -> NDArray[np.float32] | None:
        """As `TileHeights`."""
        out = np.full(target.shape, np.nan, np.float32)
        for source in self.sources:
            pixels = source.read(pool, target, (self.band,))
            if pixels is not None:
                out = np.where(np.isnan(out), self._metres(source, pixels.data[0], pixels.valid), out)
                if np.isfinite(out).all():
                    break
        return out if np.isfinite(out).any() else None

    def at(self, lon_deg: float, lat_deg: float, pool: RasterPool) -> float | None:
        """The height of the pixel in which a place lies, metres; None where it is unknown."""
        for source in self.sources:
            place = pixel_at(source.grid, lon_deg, lat_deg)
            if place is None:
                continue
            *_, row, col = place
            pixels = pool.get(source.path).read(row, col, (1, 1), (self.band,))
            height_m = float(self._metres(source, pixels.data[0], pixels.valid)[0, 0])
            if math.isfinite(height_m):
                return height_m
        return None

    def _metres(self, source: TileSource, values: NDArray[np.generic], valid: NDArray[np.bool_]) -> NDArray[np.float32]:
        from canopy.score.cells import judge

        scale, offset = self.metres[source.path]
        return judge(np.where(valid, values.astype(np.float64) * scale + offset, np.nan))[0].astype(np.float32)


def pixel_at(grid: Grid, lon_deg: float, lat_deg: float) -> tuple[float, float, int, int] | None:
    """(x, y, row, col): a place in the CRS of a grid and the pixel in which it lies; None outside."""
    x, y = transformer(LON_LAT, grid.crs).transform(lon_deg, lat_deg)
    if not (math.isfinite(x) and math.isfinite(y)):
        return None
    col, row = (math.floor(v) for v in grid.pixel(x, y))
    rows, cols = grid.shape
    return (x, y, row, col) if 0 <= row < rows and 0 <= col < cols else None

"""Overviews of rasters that have none: a tile that shows a whole image must not read all of it."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Final

import numpy as np
from affine import Affine
from numpy.typing import NDArray

from canopy.grid import Grid
from canopy.raster import create_raster, open_raster
from canopy.view.tiles import Level, TileSource

FACTOR: Final = 4
"""From one overview to the next: a tile reads at most 16 times its own pixels."""

ENOUGH_PX: Final = 2048
"""A raster whose coarsest overview has no longer side needs no more."""

_CHUNK_PX = 512
"""Side of what is written at a time."""


def lacks_overviews(source: TileSource) -> bool:
    """Whether tiles of the whole raster would have to read very much of it."""
    return max(source.levels[-1].grid.shape) > ENOUGH_PX


class ReducedLevels:
    """Overviews of one raster, made when they are first asked for.

    Args:
        source: The raster.
        folder: For the files.
        alpha_is_mask: Whether a band tagged alpha hides pixels.
    """

    def __init__(self, source: TileSource, folder: Path, *, alpha_is_mask: bool = True) -> None:
        self._source, self._folder, self._alpha_is_mask = source, folder, alpha_is_mask
        self._lock = threading.Lock()
        self._levels: tuple[Level, ...] | None = None

    def __call__(self) -> tuple[Level, ...]:
        """The overviews; the first call makes them, and others wait for it.

        Raises:
            RasterError: the raster is damaged, or the disk is full.
        """
        with self._lock:
            if self._levels is None:
                self._levels = self._made()
            return self._levels

    def _made(self) -> tuple[Level, ...]:
        last = self._source.levels[-1]
        made: list[Level] = []
        while max(last.grid.shape) > ENOUGH_PX:
            out = self._folder / f"{len(list(self._folder.iterdir()))}_{len(made)}.tif"
            last = _reduce(last, out, alpha_is_mask=self._alpha_is_mask)
            made.append(last)
        return tuple(made)


def _reduce(level: Level, out: Path, *, alpha_is_mask: bool) -> Level:
    """Write the means of the valid ones of `FACTOR` x `FACTOR` pixels each."""
    with open_raster(level.path, overview=level.overview) as raster:
        shape = (-(-raster.shape[0] // FACTOR), -(-raster.shape[1] // FACTOR))
        grid = Grid(crs=level.grid.crs, transform=level.grid.transform @ Affine.scale(FACTOR), shape=shape)
        bands = raster.data_bands if alpha_is_mask else tuple(range(1, raster.count + 1))
        valid = np.zeros(shape, bool)
        with create_raster(out, grid=grid, count=raster.count, dtype=raster.dtype, zlevel=1) as writer:
            for row in range(0, shape[0], _CHUNK_PX):
                for col in range(0, shape[1], _CHUNK_PX):
                    part = (min(_CHUNK_PX, shape[0] - row), min(_CHUNK_PX, shape[1] - col))
                    wide = (part[0] * FACTOR, part[1] * FACTOR)
                    pixels = raster.read(row * FACTOR, col * FACTOR, wide, bands, alpha_is_mask=alpha_is_mask)
                    means, known = _means(pixels.data, pixels.valid)
                    data = np.zeros((raster.count, *part), raster.dtype)
                    data[np.array(bands) - 1] = np.rint(means) if data.dtype.kind in "iu" else means
                    writer.write(row, data, col)
                    valid[row : row + part[0], col : col + part[1]] = known
            writer.write_valid(valid)
    return Level(path=out, overview=None, grid=grid, factor=level.factor * FACTOR)


def _means(data: NDArray[np.generic], valid: NDArray[np.bool_]) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    """(band, row, col) means of the valid pixels of each block, 0 where there is none, and (row, col) where there is one."""
    count, rows, cols = data.shape
    blocks = (rows // FACTOR, FACTOR, cols // FACTOR, FACTOR)
    n = valid.reshape(blocks).sum(axis=(1, 3))
    sums = np.stack([
        np.where(valid, band, 0).astype(np.float32).reshape(blocks).sum(axis=(1, 3), dtype=np.float64) for band in data
    ])  # fmt: skip
    assert sums.shape[0] == count, "a band is missing"
    return sums / np.maximum(n, 1), n > 0

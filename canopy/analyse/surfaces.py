"""The surfaces of a finished map, read window by window: heights, and the ends of the intervals they lie in."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import numpy as np
import rasterio
from numpy.typing import NDArray

from canopy.errors import AnalysisError
from canopy.grid import Box, Grid
from canopy.mosaicker.publish import ERROR_BANDS
from canopy.raster import Raster, open_raster
from canopy.region.folder import RegionFolder

Float32 = NDArray[np.float32]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Window:
    """What a map says of a rectangle of pixels; all arrays (row, col), metres, NaN where it says nothing."""

    height_m: Float32
    half_width_m: Float32
    """`error_90_m`."""
    lower_m: Float32
    upper_m: Float32

    def part(self, inside: tuple[slice, slice]) -> Window:
        """A part of the rectangle, by (row, col) slices."""
        return Window(
            height_m=self.height_m[inside], half_width_m=self.half_width_m[inside],
            lower_m=self.lower_m[inside], upper_m=self.upper_m[inside],
        )  # fmt: skip


class Surfaces:
    """The rasters of a finished map open for reading; made by `open_surfaces`."""

    def __init__(self, height: Raster, error: Raster | None, readers: tuple[ThreadPoolExecutor, ThreadPoolExecutor]) -> None:
        self._height, self._error, self._readers = height, error, readers
        self.grid: Grid = height.grid
        """Where the pixels lie; boxes count from its first pixel."""

    @property
    def pixel_m2(self) -> float:
        """Area of a pixel."""
        return abs(self.grid.transform.determinant)

    def start(self, box: Box) -> Callable[[], Window]:
        """Begin to read a rectangle of pixels, which may hang over the edges of the map; calling the result waits for it.

        Raises:
            RasterError: on waiting, the pixels cannot be decoded.
        """
        error, height = (
            None if raster is None else reader.submit(_read, raster, box)
            for reader, raster in zip(self._readers, (self._error, self._height), strict=True)
        )

        def finished() -> Window:
            assert height is not None, "a map without heights"
            unknown = np.full((len(ERROR_BANDS), *box.shape), np.nan, np.float32)
            half_width, lower, upper = unknown if error is None else error.result()
            height_m = height.result()[0]
            if (np.isnan(height_m) & np.isfinite(lower)).any():
                raise AnalysisError(f"{self._height.path} lacks heights that have intervals; make the map again")
            return Window(height_m=height_m, half_width_m=half_width, lower_m=lower, upper_m=upper)

        return finished

    def read(self, box: Box) -> Window:
        """A rectangle of pixels, as `start`."""
        return self.start(box)()

    def heights(self, box: Box) -> Float32:
        """As `read`, of the heights alone."""
        height_m: Float32 = self._readers[1].submit(_read, self._height, box).result()[0]
        return height_m


def _read(raster: Raster, box: Box) -> Float32:
    rows, cols = raster.shape
    inside = box.intersect(Box(0, 0, rows, cols))
    if inside == box:
        return raster.read_heights(box.row0, box.col0, box.shape)
    out = np.full((raster.count, *box.shape), np.nan, np.float32)
    if inside is not None:
        row, col = inside.slices_in(box)
        out[:, row, col] = raster.read_heights(inside.row0, inside.col0, inside.shape)
    return out


@contextmanager
def open_surfaces(folder: RegionFolder) -> Iterator[Surfaces]:
    """Open a map for reading.

    Raises:
        AnalysisError: its rasters do not lie on each other, or have other bands.
        RasterError: one cannot be read.
    """
    with ExitStack() as stack, rasterio.Env(GDAL_NUM_THREADS="ALL_CPUS"):  # the threads that decode are told on opening
        height = stack.enter_context(open_raster(folder.height))
        error = None if folder.error is None else stack.enter_context(open_raster(folder.error))
        for raster, bands in ((height, 1), (error, len(ERROR_BANDS))):
            if raster is not None and (raster.dtype != "float32" or raster.count != bands):
                raise AnalysisError(
                    f"{raster.path} holds {raster.count} bands of {raster.dtype}, not {bands} of float32; make the map again"
                )
            if raster is not None and not (raster.nodata is None or math.isnan(raster.nodata)):
                raise AnalysisError(f"{raster.path} has the nodata value {raster.nodata:g}, not NaN; make the map again")
        if error is not None and (error.grid.shape, error.grid.transform) != (height.grid.shape, height.grid.transform):
            raise AnalysisError(f"{folder.height} and {folder.error} do not lie on the same pixels; make the map again")
        # The two files decode at the same time; each is read by one thread, as GDAL demands.
        errors, heights = (stack.enter_context(ThreadPoolExecutor(max_workers=1)) for _ in range(2))
        yield Surfaces(height, error, (errors, heights))

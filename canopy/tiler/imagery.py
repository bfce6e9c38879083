"""Imagery on the lattice, from a local file that GDAL can read (GeoTIFF, JPEG or PNG with its sidecar, VRT).

A file whose pixels already are lattice pixels is read as it is. Any other is resampled once, in warp tiles that are
fixed by the lattice: each is warped whole, from the same source pixels, whoever asks for a part of it. So a pixel does
not depend on the area of interest or on the sheet it is read for, not even by a rounding.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray
from pyproj import CRS, Transformer
from pyproj.exceptions import ProjError

from canopy.errors import GridError, RasterError
from canopy.grid import Box, Grid, Lattice, is_metric, utm_crs
from canopy.raster import Pixels, Raster, open_raster, warp

WARP_TILE_PX = 512
"""Side of the warp tiles. Larger tiles warp no faster per pixel; smaller ones re-read more of the kernel's margin."""

NO_DATE = np.int32(np.iinfo(np.int32).min)
"""The day of a pixel that has none: its date is unknown, or there is no imagery."""

_EDGE_STEPS = 16
"""Points per tile edge that are carried into the image's CRS to find what the tile needs of it."""


class Imagery(Protocol):
    """Imagery on a lattice, wherever it comes from: one file, many files, the items of a catalogue.

    Open for as long as its context manager is, for one thread at a time. What `read` and `days` say of a pixel depends on
    the imagery and the lattice, never on the box that was asked for.
    """

    @property
    def lattice(self) -> Lattice:
        """The pixels that are delivered."""

    @property
    def box(self) -> Box:
        """The lattice pixels that the imagery touches; outside, all is invalid."""

    @property
    def bands(self) -> tuple[int | str, ...]:
        """1-based indices or names, in the order delivered."""

    @property
    def dtype(self) -> str:
        """Data type of the pixels."""

    @property
    def resampled(self) -> str:
        """How the sources' pixels became lattice pixels: "none", or the kernel's name."""

    @property
    def sources(self) -> tuple[str, ...]:
        """The files or items that the pixels are taken from."""

    def read(self, box: Box) -> Pixels:
        """The pixels of `box` as (band, row, col); where there is no imagery they are 0 (NaN for floats) and invalid."""

    def days(self, box: Box) -> NDArray[np.int32]:
        """(row, col) days since 1970-01-01 of the scene each pixel came from; `NO_DATE` where unknown or invalid."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageryInfo:
    """What an image is, before any of its pixels are read."""

    path: Path
    grid: Grid
    band_count: int
    """Bands that are not alpha."""
    dtype: str
    gsd_m: float
    """Ground sampling distance in metres, the coarser of the two axes: in a metric CRS the pixel size as it is, so that the
    image's own pixels can be lattice pixels; in any other, measured on the ground at the centre."""
    centre_lon_deg: float
    centre_lat_deg: float

    @property
    def metric_crs(self) -> CRS:
        """The image's own CRS when its unit is the metre on the ground, else the UTM zone of its centre."""
        return self.grid.crs if is_metric(self.grid.crs) else utm_crs(self.centre_lon_deg, self.centre_lat_deg)


def inspect(path: Path) -> ImageryInfo:
    """Read an image's header.

    Raises:
        RasterError: unreadable, without CRS or geotransform, or of mixed data types.
    """
    with open_raster(path) as raster:
        grid = raster.grid
        rows, cols = raster.shape
        band_count, dtype = len(raster.data_bands), raster.dtype
    centre = grid.xy(cols / 2, rows / 2)
    try:
        to_degrees = Transformer.from_crs(grid.crs, "EPSG:4326", always_xy=True)
    except ProjError as error:
        raise RasterError(
            f"{path} has the CRS {grid.crs.name!r}, which has no known place on Earth; assign the right one first, "
            f"for example: rio edit-info --crs EPSG:32610 {path.name}"
        ) from error
    lon, lat = to_degrees.transform(*centre)
    if not (abs(lon) <= 360 and abs(lat) <= 90):  # infinite where the CRS ends; metres in a CRS of degrees
        raise RasterError(f"{path}: the centre {centre} lies outside the domain of {grid.crs.name!r}; assign the right CRS")
    gsd_m = max(grid.gsd) if is_metric(grid.crs) else ground_gsd_m(grid)
    return ImageryInfo(
        path=path, grid=grid, band_count=band_count, dtype=dtype, gsd_m=gsd_m, centre_lon_deg=lon, centre_lat_deg=lat
    )


def ground_gsd_m(grid: Grid) -> float:
    """The coarser side of the pixel at the grid's centre, in metres on the ground."""
    rows, cols = grid.shape
    lon, lat = Transformer.from_crs(grid.crs, "EPSG:4326", always_xy=True).transform(*grid.xy(cols / 2, rows / 2))
    # A local azimuthal plane measures true metres whatever the unit or distortion of the grid's own CRS.
    local = CRS.from_proj4(f"+proj=aeqd +lat_0={lat} +lon_0={lon} +datum=WGS84 +units=m")
    to_local = Transformer.from_crs(grid.crs, local, always_xy=True)
    # The centre, its neighbour one pixel along the row and its neighbour one pixel down the column.
    x, y = to_local.transform(*grid.xy(cols / 2 + np.array([0, 1, 0]), rows / 2 + np.array([0, 0, 1])))
    return max(math.hypot(x[1] - x[0], y[1] - y[0]), math.hypot(x[2] - x[0], y[2] - y[0]))


class LocalImagery:
    """An open image, read in boxes of lattice pixels; made by `open_imagery`. Not for use by two threads at once."""

    resampled: Literal["none", "bilinear"]
    """How the file's pixels became lattice pixels."""
    box: Box
    """The lattice pixels that the image touches."""

    def __init__(self, raster: Raster, lattice: Lattice, bands: Sequence[int] | None) -> None:
        self.lattice = lattice
        self.bands = tuple(bands) if bands is not None else raster.data_bands
        if bad := [b for b in self.bands if not 1 <= b <= raster.count]:
            raise RasterError(f"{raster.path} has bands 1-{raster.count}, not {bad}; choose others with --bands")
        self.dtype = raster.dtype
        self.sources = (str(raster.path),)
        self._raster = raster
        self._grid = raster.grid
        native = lattice.box_of(self._grid)
        self.resampled = "none" if native is not None else "bilinear"
        self._to_image = Transformer.from_crs(lattice.crs, self._grid.crs, always_xy=True)
        self.box = native if native is not None else self._covering_box()
        self._tiles: OrderedDict[tuple[int, int], Pixels] = OrderedDict()

    def read(self, box: Box) -> Pixels:
        """The pixels of `box` as (band, row, col); outside the image they are 0 (NaN for floats) and invalid."""
        if self.resampled == "none":
            return self._raster.read(box.row0 - self.box.row0, box.col0 - self.box.col0, box.shape, self.bands)
        dtype = np.dtype(self.dtype)
        data = np.full((len(self.bands), *box.shape), math.nan if dtype.kind == "f" else 0, dtype)
        valid = np.zeros(box.shape, bool)
        tile_rows = range(box.row0 // WARP_TILE_PX, (box.row1 - 1) // WARP_TILE_PX + 1)
        tile_cols = range(box.col0 // WARP_TILE_PX, (box.col1 - 1) // WARP_TILE_PX + 1)
        for tile_row in tile_rows:
            for tile_col in tile_cols:
                tile = Box(
                    tile_row * WARP_TILE_PX, tile_col * WARP_TILE_PX,
                    (tile_row + 1) * WARP_TILE_PX, (tile_col + 1) * WARP_TILE_PX,
                )  # fmt: skip
                part = tile.intersect(box)
                if part is None or tile.intersect(self.box) is None:
                    continue
                pixels = self._tile(tile_row, tile_col, tile)
                here, there = part.slices_in(box), part.slices_in(tile)
                data[(slice(None), *here)] = pixels.data[(slice(None), *there)]
                valid[here] = pixels.valid[there]
        # What one box needs is kept for the next one below or beside it; boxes are read along rows.
        while len(self._tiles) > 2 * len(tile_cols) * len(tile_rows):
            self._tiles.popitem(last=False)
        return Pixels(data=data, valid=valid)

    def days(self, box: Box) -> NDArray[np.int32]:
        """(row, col) days since 1970-01-01, or `NO_DATE`."""
        return np.full(box.shape, NO_DATE, np.int32)

    def _tile(self, row: int, col: int, box: Box) -> Pixels:
        if (row, col) in self._tiles:
            self._tiles.move_to_end((row, col))
            return self._tiles[row, col]
        target = self.lattice.grid(box)
        cols, rows = self._grid.pixel(*self._to_image.transform(*_edges(target, _EDGE_STEPS)))
        # The kernel reaches one source pixel, or as many as one target pixel spans; the tile's own span says how many.
        span = max(np.ptp(cols), np.ptp(rows)) / WARP_TILE_PX
        margin = 2 * math.ceil(max(span, 1.0)) + 2
        first = (math.floor(rows.min()) - margin, math.floor(cols.min()) - margin)
        last = (math.ceil(rows.max()) + margin, math.ceil(cols.max()) + margin)
        shape = (last[0] - first[0], last[1] - first[1])
        pixels = warp(self._raster.read(*first, shape, self.bands), self._grid.crop(*first, shape), target)
        self._tiles[row, col] = pixels
        return pixels

    def _covering_box(self) -> Box:
        back = Transformer.from_crs(self._grid.crs, self.lattice.crs, always_xy=True)
        xs, ys = back.transform(*_edges(self._grid, 4 * _EDGE_STEPS))
        if not (np.isfinite(xs).all() and np.isfinite(ys).all()):
            raise GridError(
                f"{self._raster.path} reaches outside the domain of {self.lattice.crs.name!r}; choose another CRS with --crs"
            )
        return self.lattice.covering((xs.min(), ys.min(), xs.max(), ys.max()))


def _edges(grid: Grid, steps: int) -> tuple[Any, Any]:
    """CRS coordinates (xs, ys) of `steps` points along each of the four edges of a grid."""
    rows, cols = grid.shape
    t = np.linspace(0.0, 1.0, steps)
    low, high = np.zeros(steps), np.ones(steps)
    return grid.xy(np.concatenate([t, t, low, high]) * cols, np.concatenate([low, high, t, t]) * rows)


@contextmanager
def open_imagery(path: Path, lattice: Lattice, bands: Sequence[int] | None = None) -> Iterator[LocalImagery]:
    """Open a local image for reading on `lattice`.

    Args:
        path: GeoTIFF, JPEG or PNG with its CRS, or VRT.
        lattice: The pixels to deliver.
        bands: 1-based band indices in the order wanted, default all that are not alpha.

    Raises:
        RasterError: unreadable, without CRS, or without one of the bands.
        GridError: the image cannot be carried into the lattice's CRS.
    """
    with open_raster(path) as raster:
        yield LocalImagery(raster, lattice, bands)

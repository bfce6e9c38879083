"""Reading rasters as (data, valid) and writing GeoTIFFs that are whole or absent.

The only module that opens rasters. Data and validity travel as two arrays, so no value of the data ever means "nothing
here": 0 is black, 0 m is a height, and what hangs over an edge is `valid=False`.
"""

from __future__ import annotations

import logging
import math
import os
import warnings
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
import rasterio
from numpy.typing import NDArray
from pyproj import CRS
from pyproj.exceptions import CRSError
from rasterio._err import CPLE_BaseError
from rasterio.enums import ColorInterp, MaskFlags
from rasterio.errors import NotGeoreferencedWarning, RasterioError
from rasterio.warp import Resampling, reproject
from rasterio.windows import Window

from canopy.errors import NoCrsError, RasterError
from canopy.grid import Grid

# GDAL keeps decoded blocks up to a twentieth of the memory, 6 GB on a large node, and every worker process has its own.
# What anything here comes back to is a row of blocks of a sheet, and the heap grows by twice what the cache may hold: with
# 128 MB a map of 16 times the area takes 12 % more memory, with this 5 %, in the same time. Read by GDAL once, so it holds
# for all threads; a value that the user has set stays.
_CACHE_IS_GIVEN = "GDAL_CACHEMAX" in os.environ
os.environ.setdefault("GDAL_CACHEMAX", "64")

# A truncated JPEG is only a warning to libjpeg: the missing rows would arrive grey and be mapped as forest or field.
_ENV = {"GDAL_ERROR_ON_LIBJPEG_WARNING": "TRUE", "GDAL_TIFF_INTERNAL_MASK": "TRUE"}

ALPHA_SAMPLE_BLOCKS = 4
"""An alpha band is judged by this many rows of so many blocks, spread over the file."""

_ALPHA_SAMPLE_PX = 64
"""Least side of those blocks: the blocks of a PNG are single rows."""

GDAL_ERRORS = (RasterioError, CPLE_BaseError)
"""What rasterio raises when GDAL fails: its own exceptions and, from a few of its functions, GDAL's as they are."""

# GDAL repeats on the log what it raises; the exception is what we report.
logging.getLogger("rasterio._env").setLevel(logging.CRITICAL)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Pixels:
    """An array of pixels and which of them are usable."""

    data: NDArray[Any]
    """(band, row, col)."""
    valid: NDArray[np.bool_]
    """(row, col), True where every band of `data` is usable."""

    def __post_init__(self) -> None:
        assert self.data.ndim == 3, f"data must be (band, row, col), is {self.data.shape}"
        assert self.data.shape[1:] == self.valid.shape, f"data {self.data.shape} and valid {self.valid.shape} differ"


class Raster:
    """A raster open for reading; made by `open_raster`."""

    def __init__(self, path: Path, dataset: Any) -> None:
        self.path = path
        self._dataset = dataset

    def close(self) -> None:
        """Close the file; `open_raster` does it by itself."""
        self._dataset.close()

    @property
    def dataset(self) -> Any:
        """The `rasterio.DatasetReader`, for libraries that take one."""
        return self._dataset

    @property
    def shape(self) -> tuple[int, int]:
        """(rows, columns)."""
        return self._dataset.shape  # type: ignore[no-any-return]

    @property
    def count(self) -> int:
        """Number of bands, alpha included."""
        return int(self._dataset.count)

    @property
    def dtype(self) -> str:
        """Data type of the bands, which must be one for all."""
        kinds = sorted(set(self._dataset.dtypes))
        if len(kinds) > 1:
            raise RasterError(f"{self.path} mixes data types {kinds}; convert it so that all bands share one")
        return str(kinds[0])

    @property
    def nodata(self) -> float | None:
        """The declared nodata value."""
        return self._dataset.nodata  # type: ignore[no-any-return]

    @property
    def band_names(self) -> tuple[str | None, ...]:
        """Descriptions of the bands."""
        return tuple(self._dataset.descriptions)

    @property
    def units(self) -> tuple[str | None, ...]:
        """Units of the bands."""
        return tuple(self._dataset.units)

    @property
    def band_tags(self) -> tuple[dict[str, str], ...]:
        """Tags of each band, statistics among them."""
        return tuple(dict(self._dataset.tags(i)) for i in range(1, self.count + 1))

    @property
    def tags(self) -> dict[str, str]:
        """Tags of the file (not of its bands)."""
        return dict(self._dataset.tags())

    @property
    def structure(self) -> dict[str, str]:
        """How GDAL says the pixels are stored: COMPRESSION, PREDICTOR, LAYOUT, INTERLEAVE."""
        return dict(self._dataset.tags(ns="IMAGE_STRUCTURE"))

    @property
    def overviews(self) -> tuple[int, ...]:
        """Factors of the overviews of the first band, the finest first."""
        return tuple(self._dataset.overviews(1))

    @property
    def block_shapes(self) -> tuple[tuple[int, int], ...]:
        """(rows, columns) of the blocks of each band."""
        return tuple(self._dataset.block_shapes)

    @property
    def driver(self) -> str:
        """GDAL's name of the format."""
        return str(self._dataset.driver)

    def tags_in(self, namespace: str) -> dict[str, str]:
        """Tags of the file in one of GDAL's metadata domains, such as IMAGERY."""
        return dict(self._dataset.tags(ns=namespace))

    @property
    def has_palette(self) -> bool:
        """Whether the values of a band are indices into a colour table instead of colours."""
        return ColorInterp.palette in self._dataset.colorinterp

    @property
    def alpha_band(self) -> int | None:
        """1-based index of the band that the file tags as alpha. Some writers tag near infrared so: see `alpha_sample`."""
        return next((i for i, c in enumerate(self._dataset.colorinterp, start=1) if c == ColorInterp.alpha), None)

    @property
    def data_bands(self) -> tuple[int, ...]:
        """1-based indices of the bands that are not tagged alpha."""
        return tuple(i for i, c in enumerate(self._dataset.colorinterp, start=1) if c != ColorInterp.alpha)

    def alpha_sample(self) -> NDArray[Any]:
        """Values of the alpha band in blocks spread over the file, to tell a mask from data; empty without alpha."""
        if self.alpha_band is None:
            return np.empty(0, self.dtype)
        rows, cols = self.shape
        block_rows, block_cols = (max(side, _ALPHA_SAMPLE_PX) for side in self.block_shapes[0])
        parts = []
        for top in _spread(-(-rows // block_rows)):
            for left in _spread(-(-cols // block_cols)):
                row, col = top * block_rows, left * block_cols
                shape = (min(block_rows, rows - row), min(block_cols, cols - col))
                parts.append(self.read(row, col, shape, (self.alpha_band,)).data.ravel())
        return np.concatenate(parts)

    @property
    def grid(self) -> Grid:
        """Where the pixels are. The CRS is the file's own or, where the format holds none, that of a `.prj` file beside it.

        Raises:
            RasterError: the file has no CRS or no geotransform.
        """
        return self.grid_or(None)

    @property
    def scaling(self) -> tuple[tuple[float, float], ...]:
        """(scale, offset) of each band: a height is scale * value + offset where the file says so, else (1, 0)."""
        return tuple(zip(self._dataset.scales, self._dataset.offsets, strict=True))

    def grid_or(self, crs_if_none: CRS | None) -> Grid:
        """`grid`, with a CRS of the caller's where neither the file nor a `.prj` beside it names one.

        Raises:
            RasterError: the file has no geotransform; or there is no CRS at all; or it has one, and it is another.
        """
        own = self._dataset.crs
        try:
            crs = _crs(own.to_wkt()) if own is not None else self._sidecar_crs()
        except NoCrsError:
            if crs_if_none is None:
                raise
            crs = crs_if_none
        if crs_if_none is not None and crs != crs_if_none:
            raise RasterError(
                f"{self.path} has the CRS {crs.name!r}, not {crs_if_none.name!r} as given; give none, or correct the file: "
                f"rio edit-info --crs {crs_if_none.to_string()} {self.path.name}"
            )
        if self._dataset.transform.is_identity:
            raise RasterError(f"{self.path} has no geotransform; add a world file or georeference it first")
        return Grid(crs=crs, transform=self._dataset.transform, shape=self.shape)

    def _sidecar_crs(self) -> CRS:
        """GDAL finds a world file beside a JPEG or PNG by itself, but not the `.prj` that goes with it."""
        for suffix in (".prj", ".PRJ"):
            sidecar = self.path.with_suffix(suffix)
            if not sidecar.is_file():
                continue
            try:
                return _crs(sidecar.read_text().strip())
            except (CRSError, UnicodeDecodeError) as error:
                raise RasterError(f"{sidecar} holds no CRS that PROJ can read; put its WKT there") from error
        raise NoCrsError(
            f"{self.path} has no CRS, so its place on Earth is unknown; assign the right one first, "
            f"for example: rio edit-info --crs EPSG:32610 {self.path.name}, or put its WKT in a .prj file beside it"
        )

    def check_complete(self) -> None:
        """Refuse a TIFF that ends before its pixels do, without reading them; other formats say it when they are read.

        Raises:
            RasterError: the last block lies beyond the end of the file.
        """
        if self.driver != "GTiff" or not self.path.is_file():
            return
        size, (rows, cols) = self.path.stat().st_size, self.shape
        for band, (block_rows, block_cols) in enumerate(self.block_shapes, start=1):
            last = f"{(cols - 1) // block_cols}_{(rows - 1) // block_rows}"
            offset, length = (self._dataset.get_tag_item(f"BLOCK_{what}_{last}", "TIFF", bidx=band) for what in _PLACE)
            if offset is not None and length is not None and int(offset) + int(length) > size:
                raise RasterError(
                    f"{self.path} is cut short: its last block ends at byte {int(offset) + int(length)} and the file has "
                    f"{size}; fetch it again"
                )

    def read(
        self,
        row: int,
        col: int,
        shape: tuple[int, int],
        bands: Sequence[int] | None = None,
        *,
        alpha_is_mask: bool = True,
    ) -> Pixels:
        """The window of `shape` (row, col) whose first pixel is (row, col); it may hang over the edges.

        Args:
            row: First row, counted from the top of the file; may be negative.
            col: First column; may be negative.
            shape: (rows, columns) to return.
            bands: 1-based indices, default all that are not alpha.
            alpha_is_mask: Whether the band tagged alpha hides pixels. Asked for among `bands` it is data and hides none.

        Returns:
            `data` in the file's data type; outside the file it is 0 (NaN for floats) and `valid` is False. A pixel is
            valid unless the file's mask or alpha hides it, all bands equal the nodata value, or any band is NaN.

        Raises:
            RasterError: the blocks cannot be decoded, as in a truncated file.
        """
        indices = tuple(bands) if bands is not None else self.data_bands
        dtype = np.dtype(self.dtype)
        fill = math.nan if dtype.kind == "f" else 0
        data = np.full((len(indices), *shape), fill, dtype)
        valid = np.zeros(shape, bool)
        rows, cols = self.shape
        row0, row1 = max(row, 0), min(row + shape[0], rows)
        col0, col1 = max(col, 0), min(col + shape[1], cols)
        if row0 >= row1 or col0 >= col1:
            return Pixels(data=data, valid=valid)
        window = Window(col0, row0, col1 - col0, row1 - row0)
        inside = (slice(row0 - row, row1 - row), slice(col0 - col, col1 - col))
        alpha = self.alpha_band if alpha_is_mask else None
        with self._decoding(row0, row1):
            part = self._dataset.read(indices, window=window)
            valid[inside] = self._valid(part, indices, window)
            if alpha is not None and alpha not in indices:
                valid[inside] &= self._dataset.read(alpha, window=window) > 0
        data[(slice(None), *inside)] = part
        return Pixels(data=data, valid=valid)

    def read_heights(self, row: int, col: int, shape: tuple[int, int]) -> NDArray[np.float32]:
        """(band, row, col) all bands of a window inside a file of float32 heights, where NaN alone means unknown.

        Raises:
            RasterError: as `read`.
        """
        assert self.dtype == "float32", f"{self.path} holds {self.dtype}, not heights"
        with self._decoding(row, row + shape[0]):
            return self._dataset.read(window=Window(col, row, shape[1], shape[0]))  # type: ignore[no-any-return]

    @contextmanager
    def _decoding(self, row0: int, row1: int) -> Iterator[None]:
        # Here and not where the file was opened: GDAL's options belong to the thread that reads.
        try:
            with rasterio.Env(**_ENV):
                yield
        except GDAL_ERRORS as error:
            raise RasterError(
                f"{self.path} cannot be decoded at rows {row0}-{row1} ({error.__cause__ or error}); "
                f"the file is damaged or cut short: fetch it again"
            ) from error

    def _valid(self, part: NDArray[Any], indices: tuple[int, ...], window: Window) -> NDArray[np.bool_]:
        """Which pixels the file's masks and nodata value leave, its alpha band apart."""
        flags = self._dataset.mask_flag_enums[indices[0] - 1]
        if MaskFlags.per_dataset in flags and MaskFlags.alpha not in flags:
            valid = self._dataset.read_masks(indices[0], window=window) > 0
        elif MaskFlags.nodata in flags and not math.isnan(self._dataset.nodata):
            # One band may well hold the nodata value in a shadow or a flower; only all bands together say "nothing".
            nodata = self._dataset.nodata
            if part.dtype.kind == "f":  # as the file rounds it; an integer is compared as it is: 0.5 is no integer's nodata
                nodata = part.dtype.type(nodata)
            valid = (part != nodata).any(axis=0)
        else:
            valid = np.ones(part.shape[1:], bool)
        if part.dtype.kind == "f":
            valid &= np.isfinite(part).all(axis=0)
        return valid  # type: ignore[no-any-return]


_PLACE = ("OFFSET", "SIZE")


def _spread(count: int) -> list[int]:
    """Up to `ALPHA_SAMPLE_BLOCKS` of the numbers below `count`, from the first to the last."""
    return sorted({round(i) for i in np.linspace(0, count - 1, ALPHA_SAMPLE_BLOCKS)})


@lru_cache(maxsize=256)
def _crs(wkt: str) -> CRS:
    """The CRS of a WKT text, one object for all files that share it.

    Why by its EPSG code where it is certain: one file names its CRS as EPSG does, the next, from a `.prj`, as Esri does, and
    both mean the same pixels.
    """
    crs = CRS.from_wkt(wkt)
    code = None if crs.is_bound or crs.is_compound else crs.to_epsg(min_confidence=100)
    return CRS.from_epsg(code) if code is not None else crs


@contextmanager
def open_raster(path: str | os.PathLike[str], *, overview: int | None = None) -> Iterator[Raster]:
    """Open a raster for reading.

    Args:
        path: The file.
        overview: One of its overviews instead, the finest is 0.

    Raises:
        RasterError: the file is missing, empty, or nothing that GDAL can read.
    """
    dataset = _open(Path(path), **({} if overview is None else {"overview_level": overview}))
    with dataset:
        yield Raster(Path(path), dataset)


def _open(path: Path, **options: Any) -> Any:
    if not path.exists():
        raise RasterError(f"{path} does not exist; check the path")
    if path.is_file() and path.stat().st_size == 0:
        raise RasterError(f"{path} is empty (0 bytes); fetch it again")
    with rasterio.Env(**_ENV), warnings.catch_warnings():
        warnings.simplefilter("ignore", NotGeoreferencedWarning)  # `Raster.grid` says it, as an error
        try:
            return rasterio.open(path, **options)
        except GDAL_ERRORS as error:
            raise RasterError(
                f"{path} cannot be read as a raster; give a GeoTIFF, JPEG or PNG with its CRS, or a VRT"
            ) from error


def has_mask(address: str) -> bool:
    """Whether a file, local or behind an address that GDAL can read, has a mask of its own (not nodata, not alpha).

    What GDAL raises comes through, for callers who ask again.
    """
    with rasterio.Env(**_ENV), rasterio.open(address) as dataset:
        flags = dataset.mask_flag_enums[0]
        return MaskFlags.per_dataset in flags and MaskFlags.alpha not in flags


def read_mask(address: str, row: int, col: int, shape: tuple[int, int]) -> NDArray[np.bool_]:
    """(row, col) what such a mask leaves valid in a window inside the file; raises as `has_mask`."""
    with rasterio.Env(**_ENV), rasterio.open(address) as dataset:
        return np.asarray(dataset.read_masks(1, window=Window(col, row, shape[1], shape[0])) > 0)


def keep_blocks(megabytes: int) -> None:
    """Let GDAL keep so many megabytes of decoded blocks, for programs that come back to them; a user's own value stays.

    It has no effect after the first pixel has been read.
    """
    if not _CACHE_IS_GIVEN:
        os.environ["GDAL_CACHEMAX"] = str(megabytes)


class RasterPool:
    """Rasters that are opened when they are needed and stay open until others need the place."""

    def __init__(self, limit: int) -> None:
        assert limit > 0, f"a pool of {limit} files can hold none"
        self._limit = limit
        self._open: OrderedDict[tuple[Path, int | None], Raster] = OrderedDict()

    def get(self, path: Path, *, overview: int | None = None) -> Raster:
        """The raster at `path`, or one of its overviews as for `open_raster`, to be used before the next call.

        Raises:
            RasterError: as `open_raster`.
        """
        key = path, overview
        if key in self._open:
            self._open.move_to_end(key)
            return self._open[key]
        while len(self._open) >= self._limit:
            self._open.popitem(last=False)[1].close()
        self._open[key] = raster = Raster(path, _open(path, **({} if overview is None else {"overview_level": overview})))
        return raster

    def close(self) -> None:
        """Close all of them."""
        while self._open:
            self._open.popitem()[1].close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()


def read_raster(path: str | os.PathLike[str], bands: Sequence[int] | None = None) -> tuple[Pixels, Grid]:
    """A whole raster and its grid; for files that fit in memory."""
    with open_raster(path) as raster:
        return raster.read(0, 0, raster.shape, bands), raster.grid


# --- writing -------------------------------------------------------------------------------------------------------------


class RasterWriter:
    """A GeoTIFF being written; made by `create_raster`."""

    def __init__(self, dataset: Any) -> None:
        self._dataset = dataset

    def write(self, row: int, data: NDArray[Any], col: int = 0) -> None:
        """Write `data` (band, row, col), already in the file's data type, with its first pixel at (row, col)."""
        assert data.dtype == np.dtype(self._dataset.dtypes[0]), f"{data.dtype} is not the file's {self._dataset.dtypes[0]}"
        self._dataset.write(data, window=Window(col, row, data.shape[2], data.shape[1]))

    def write_palette(self, colours: Mapping[int, tuple[int, int, int]]) -> None:
        """Give the values of the only band, of bytes, colours (red, green, blue); before any pixel is written."""
        self._dataset.write_colormap(1, {value: (*rgb, 255) for value, rgb in colours.items()})

    def write_valid(self, valid: NDArray[np.bool_]) -> None:
        """Write the validity of the whole raster as its internal mask."""
        self._dataset.write_mask(valid)


@contextmanager
def create_raster(
    path: str | os.PathLike[str],
    *,
    grid: Grid,
    count: int,
    dtype: str,
    nodata: float | None = None,
    band_names: Sequence[str] = (),
    units: Sequence[str] = (),
    tags: Mapping[str, str] | None = None,
    **options: Any,
) -> Iterator[RasterWriter]:
    """A tiled GeoTIFF to write into; it takes its name only when the block ends without an error.

    Args:
        path: Final name. Until then the file is `.NAME.part` beside it.
        grid: CRS, transform and shape.
        count: Number of bands.
        dtype: Data type of all bands.
        nodata: Declared nodata value, NaN for heights.
        band_names: One description a band, or none.
        units: One unit a band, for example "m", or none.
        tags: Tags of the file.
        options: Creation options of GDAL's GTiff driver, over the defaults (tiled 512, DEFLATE).

    Raises:
        RasterError: the disk is full or the file cannot be written.
    """
    path = Path(path)
    part = path.with_name(f".{path.name}.part")
    profile: dict[str, Any] = {
        "driver": "GTiff", "tiled": True, "blockxsize": 512, "blockysize": 512, "compress": "deflate", "BIGTIFF": "IF_SAFER",
    }  # fmt: skip
    if dtype == "uint8" and count in (3, 4):
        # GDAL takes a fourth byte band for alpha unless told otherwise; near infrared would then mask the image.
        profile |= {"photometric": "rgb", "ALPHA": "NO"}
    elif count > 1:
        profile |= {"photometric": "minisblack", "ALPHA": "NO"}
    profile |= options
    rows, cols = grid.shape
    try:
        with rasterio.Env(**_ENV), rasterio.open(
            part, "w", width=cols, height=rows, count=count, dtype=dtype, nodata=nodata,
            crs=grid.crs.to_wkt(), transform=grid.transform, **profile,
        ) as dataset:  # fmt: skip
            for index, name in enumerate(band_names, start=1):
                dataset.set_band_description(index, name)
            for index, unit in enumerate(units, start=1):
                dataset.set_band_unit(index, unit)
            dataset.update_tags(**(tags or {}))
            yield RasterWriter(dataset)
        _check_closed(path, part)
        part.replace(path)
    except (*GDAL_ERRORS, OSError) as error:
        raise RasterError(
            f"cannot write {path} ({error.__cause__ or error}); free disk space or choose another folder"
        ) from error
    finally:
        delete(part)


def delete(*paths: Path) -> None:
    """Delete those of the files that exist; on a read-only volume it is an error to delete what does not."""
    for path in paths:
        if path.exists():
            path.unlink()


def _check_closed(path: Path, part: Path) -> None:
    """GDAL writes a file's directory when it closes it, and says nothing when the disk is full by then."""
    try:
        with open_raster(part):
            pass
    except RasterError as error:
        raise RasterError(f"cannot write {path} (its end is missing); free disk space or choose another folder") from error


def write_raster(
    path: str | os.PathLike[str],
    data: NDArray[Any],
    *,
    grid: Grid,
    nodata: float | None = None,
    valid: NDArray[np.bool_] | None = None,
    band_names: Sequence[str] = (),
    units: Sequence[str] = (),
    tags: Mapping[str, str] | None = None,
) -> None:
    """Write a whole array (band, row, col) as a GeoTIFF, atomically.

    Args:
        path: Final name.
        data: (band, row, col); its data type is the file's.
        grid: Where it lies; its shape must be that of `data`.
        nodata: Declared nodata value.
        valid: (row, col); kept as the file's internal mask, so that no value of an integer image is given up for nodata.
        band_names: One description a band.
        units: One unit a band.
        tags: Tags of the file.
    """
    assert data.ndim == 3, f"data must be (band, row, col), is {data.shape}"
    assert data.shape[1:] == grid.shape, f"data {data.shape} does not fit the grid {grid.shape}"
    with create_raster(
        path,
        grid=grid,
        count=data.shape[0],
        dtype=data.dtype.name,
        nodata=nodata,
        band_names=band_names,
        units=units,
        tags=tags,
    ) as writer:
        writer.write(0, data)
        if valid is not None:
            writer.write_valid(valid)


# --- warping -------------------------------------------------------------------------------------------------------------


def warp(pixels: Pixels, source: Grid, target: Grid, *, resampling: Resampling = Resampling.bilinear) -> Pixels:
    """Resample pixels onto another grid.

    Invalid pixels have no part in the result: they travel as NaN in float32, so neighbours are weighted among the valid
    ones only. Where the target is coarser, GDAL widens the kernel to the target's pixel. The exact transformer is used
    (its default approximation depends on the extent that is warped).

    Args:
        pixels: Pixels on `source`; integers are returned as the same integer type, rounded.
        source: Grid of `pixels`.
        target: Grid of the result.
        resampling: Kernel.
    """
    count = pixels.data.shape[0]
    # GDAL's search for nodata more than doubles the time; most tiles have none, and what it would find is the same.
    if pixels.valid.all():
        floats, nodata = pixels.data.astype(np.float32), None
    else:
        floats, nodata = np.where(pixels.valid, pixels.data, np.float32(np.nan)).astype(np.float32), math.nan
    out = np.full((count, *target.shape), np.nan, np.float32)
    with rasterio.Env(**_ENV):
        reproject(
            floats, out,
            src_transform=source.transform, src_crs=source.crs.to_wkt(), src_nodata=nodata,
            dst_transform=target.transform, dst_crs=target.crs.to_wkt(), dst_nodata=nodata,
            init_dest_nodata=False, resampling=resampling, tolerance=0.0, num_threads=1,
        )  # fmt: skip
    valid = np.asarray(np.isfinite(out).all(axis=0))
    dtype = pixels.data.dtype
    if dtype.kind == "f":
        return Pixels(data=out.astype(dtype), valid=valid)
    limits = np.iinfo(dtype)
    rounded = np.clip(np.rint(np.where(valid, out, 0)), limits.min, limits.max)  # cubic kernels overshoot the range
    return Pixels(data=rounded.astype(dtype), valid=valid)


def area_means(values: NDArray[np.float64], source: Grid, target: Grid) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Means over each target pixel, every source pixel with the weight of its area in it, and how much of it is known.

    In float64, so that the corner from which the pixels are counted shows in no digit that a height has.

    Args:
        values: (row, col) on `source`, NaN = unknown. It must reach beyond `target` on all sides, with NaN where there is
            nothing: what is missing altogether would not count as unknown.
        source: Grid of `values`, not coarser than `target`.
        target: Grid of the result.

    Returns:
        (row, col) means of what is known, NaN where nothing is; and (row, col) the share of the pixel's area that is known.
    """
    means = _reprojected(values, source, target, Resampling.average)
    share = _reprojected(np.isfinite(values).astype(np.float64), source, target, Resampling.average)
    return means, np.where(np.isfinite(means), np.clip(np.nan_to_num(share), 0.0, 1.0), 0.0)


def nearest(values: NDArray[np.float64], source: Grid, target: Grid) -> NDArray[np.float64]:
    """(row, col) values of the source pixels in which the centres of the target pixels lie; NaN where there is none."""
    return _reprojected(values, source, target, Resampling.nearest)


def _reprojected(values: NDArray[np.float64], source: Grid, target: Grid, how: Resampling) -> NDArray[np.float64]:
    nodata = math.nan if np.isnan(values).any() else None
    out = np.full(target.shape, np.nan)
    with rasterio.Env(**_ENV):
        reproject(
            values, out,
            src_transform=source.transform, src_crs=source.crs.to_wkt(), src_nodata=nodata,
            dst_transform=target.transform, dst_crs=target.crs.to_wkt(), dst_nodata=math.nan,
            init_dest_nodata=True, resampling=how, tolerance=0.0, num_threads=1,
        )  # fmt: skip
    return out

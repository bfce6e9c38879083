"""The day of each pixel's imagery as a file: `date.tif`, a number such as 20210714 that anybody can read, 0 = unknown.

Overviews hold the newest day of the pixels that they stand for: a day that is shown is a day that there is, and an overview
pixel does not depend on where its file begins, as with heights (see `canopy.mosaicker.sheets`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Final

import numpy as np
import rasterio.shutil
from affine import Affine
from numpy.typing import NDArray
from rio_cogeo.cogeo import cog_validate

from canopy.errors import OutputError, RasterError
from canopy.grid import Box, Grid, Lattice
from canopy.heap import trim_heap
from canopy.mosaicker.publish import DEFLATE_LEVEL, STAGED, overview_factors
from canopy.mosaicker.vrt import BLOCK_PX, DAYS, mosaic_vrt
from canopy.raster import GDAL_ERRORS, Raster, create_raster, delete, open_raster

DATE_BAND: Final = "date_yyyymmdd"
"""The band of `date.tif`."""

UNDATED: Final = 0
"""Its value where the day is unknown, or there is no imagery."""

_CHUNK_PX: Final = (512, 2048)
"""Rows and columns that are held in memory at a time."""


def as_numbers(days: NDArray[np.int32], known: NDArray[np.bool_]) -> NDArray[np.int32]:
    """Days since 1970-01-01 as numbers such as 20210714, `UNDATED` where they are not known."""
    dates = np.where(known, days, 0).astype("datetime64[D]")
    months, years = dates.astype("datetime64[M]"), dates.astype("datetime64[Y]")
    year = years.astype(np.int64) + 1970
    month, day = (months - years).astype(np.int64) + 1, (dates - months).astype(np.int64) + 1
    return np.where(known, 10_000 * year + 100 * month + day, UNDATED).astype(np.int32)


def write_dates(
    out: Path,
    parts: Sequence[tuple[Box, Path]],
    *,
    lattice: Lattice,
    box: Box,
    tags: Mapping[str, str],
    factors: Sequence[int] | None = None,
    threads: int | None = None,
) -> None:
    """Join staged parts into one cloud-optimized GeoTIFF of days, 0 where there is none.

    The bytes depend on the days, the place and the tags only, not on the parts or the threads.

    Args:
        out: Final name; until the check has passed the file is `.NAME.part.tif` beside it.
        parts: Staged int32 rasters and the lattice pixels they hold.
        lattice: Where they lie.
        box: The pixels of the result.
        tags: Tags of the file.
        factors: Factors of the overviews, 2, 4 and on; default as those of heights.
        threads: Threads that compress; default one a core.

    Raises:
        OutputError: the disk is full, or the file does not hold what went into it.
    """
    vrt, part = out.with_name(f".{out.name}.vrt"), out.with_name(f".{out.name}.part.tif")
    grid = lattice.grid(box)
    factors = overview_factors(max(box.shape)) if factors is None else factors
    try:
        try:
            vrt.write_bytes(mosaic_vrt(parts, grid, box, [DATE_BAND], tags, values=DAYS))
            counts, overviews = _pyramid(vrt, grid, factors)
            vrt.write_bytes(mosaic_vrt(parts, grid, box, [DATE_BAND], tags, overviews=overviews, values=DAYS))
            with rasterio.Env(GDAL_NUM_THREADS="ALL_CPUS" if threads is None else str(threads)):
                rasterio.shutil.copy(
                    vrt, part, driver="COG", COMPRESS="DEFLATE", LEVEL=DEFLATE_LEVEL, PREDICTOR="STANDARD",
                    BLOCKSIZE=BLOCK_PX, BIGTIFF="IF_SAFER", OVERVIEWS="AUTO" if factors else "NONE",
                )  # fmt: skip
                trim_heap()
                _check(part, grid, counts)
        except (*GDAL_ERRORS, RasterError, OSError) as error:
            reason = error.__cause__ or error
            raise OutputError(f"cannot write {out} ({reason}); free disk space or choose another folder") from error
        part.replace(out)
    finally:
        delete(part, vrt, *out.parent.glob(f"{vrt.name}.*.tif"))


_Count = tuple[int, int]
"""How many pixels have a day, and the sum of their numbers."""


def _pyramid(source: Path, grid: Grid, factors: Sequence[int]) -> tuple[list[_Count], list[Path]]:
    """What a raster and its overviews hold, and the overviews as files beside it, `SOURCE.2.tif` and on."""
    counts, paths, fine = [_count(source)], [], source
    for factor in factors:
        rows, cols = grid.shape
        coarse = source.with_name(f"{source.name}.{factor}.tif")
        grid = Grid(crs=grid.crs, transform=grid.transform @ Affine.scale(2), shape=((rows + 1) // 2, (cols + 1) // 2))
        with (
            open_raster(fine) as raster,
            create_raster(coarse, grid=grid, count=1, dtype="int32", nodata=UNDATED, **STAGED) as writer,
        ):
            for row, col, numbers in _chunks(raster):
                writer.write(row // 2, newest(numbers)[None], col // 2)
        counts.append(_count(coarse))
        paths.append(coarse)
        fine = coarse
    return counts, paths


def newest(numbers: NDArray[np.int32]) -> NDArray[np.int32]:
    """(row, col) The newest day in each block of 2 x 2; an odd last row or column is half a block."""
    rows, cols = numbers.shape
    even = np.pad(numbers, ((0, rows % 2), (0, cols % 2)), constant_values=UNDATED)
    blocks = even.reshape((rows + 1) // 2, 2, (cols + 1) // 2, 2)
    return np.asarray(blocks.max(axis=(1, 3)), np.int32)


def _chunks(raster: Raster) -> Iterator[tuple[int, int, NDArray[np.int32]]]:
    rows, cols = raster.shape
    for row in range(0, rows, _CHUNK_PX[0]):
        for col in range(0, cols, _CHUNK_PX[1]):
            shape = (min(_CHUNK_PX[0], rows - row), min(_CHUNK_PX[1], cols - col))
            yield row, col, raster.read(row, col, shape).data[0]


def _count(path: Path, overview: int | None = None) -> _Count:
    known = total = 0
    with open_raster(path, overview=overview) as raster:
        for _, _, numbers in _chunks(raster):
            known += int(np.count_nonzero(numbers))
            total += int(numbers.sum(dtype=np.int64))
    return known, total


def _check(path: Path, grid: Grid, counts: Sequence[_Count]) -> None:
    """Refuse a file that is no COG, or of which a block was lost on a full disk: each is decoded."""
    _, errors, warnings = cog_validate(path, strict=True, quiet=True)
    # rio-cogeo takes a raster as wide as a block for one in strips.
    problems = [problem for problem in (*errors, *warnings) if "not tiled" not in problem]
    with open_raster(path) as raster:
        found, levels = raster.grid, len(raster.overviews)
        if (found.shape, found.transform) != (grid.shape, grid.transform) or found.crs != grid.crs:
            problems.append("its grid is not the one it was written on")
        if (raster.dtype, raster.nodata, raster.band_names) != ("int32", UNDATED, (DATE_BAND,)):
            problems.append(f"it holds {raster.dtype} {raster.band_names} with nodata {raster.nodata}")
    if not problems and [_count(path), *(_count(path, level) for level in range(levels))] != [*counts]:
        problems.append("its pixels are not those that went into it")
    if problems:
        raise RasterError(f"{path.name} is not a valid COG: {'; '.join(problems)}")

"""From finished strips to the files people open: `height.tif` and `error.tif`, cloud-optimized, checked, whole or absent.

Strips are staged as plain GeoTIFFs, one pair a sheet; a VRT joins the sheets and carries names, units and tags; GDAL's
COG driver turns it into one file that gets its final name only after rio-cogeo and a full decode have passed it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import rasterio.shutil
from affine import Affine
from numpy.typing import NDArray
from rio_cogeo.cogeo import cog_validate

from canopy.errors import OutputError, RasterError
from canopy.grid import Box, Grid, Lattice
from canopy.heap import trim_heap
from canopy.mosaicker.quantum import Statistics, halve, merge, statistics_of
from canopy.mosaicker.vrt import BLOCK_PX, mosaic_vrt
from canopy.raster import GDAL_ERRORS, Raster, RasterWriter, create_raster, delete, open_raster

if TYPE_CHECKING:
    import xarray

DEFLATE_LEVEL = 4
"""Of 9. Level 6, the default, takes half as long again for files 6 % smaller."""

_CHUNK_PX = (512, 2048)
"""Rows and columns of a map that are held in memory at a time: whole blocks of it and of its overview."""

STAGED: Mapping[str, Any] = MappingProxyType({"compress": "none", "blockxsize": BLOCK_PX, "blockysize": 64})
"""How rasters are stored that are read a few times and deleted. A compressor would take the model's cores; and blocks as low
as this are whole soon, so GDAL need not keep many: strips of a model come in other heights than blocks."""

HEIGHT_BANDS = ("height_m",)
ERROR_BANDS = ("error_90_m", "lower_90_m", "upper_90_m")

STAGED_BYTES_PER_PIXEL = 22
"""Disk that a staged sheet needs: four float32 bands, and a third more for their overviews, 16 * 4/3 bytes."""

COG_BYTES_PER_PIXEL = 22
"""Disk that its two COGs need at worst, if nothing compresses; forest takes a fifth of it."""

DATE_BYTES_PER_PIXEL = 6
"""Disk that days need besides, staged and, at worst, as a COG."""

# --- staging -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class StagedSheet:
    """The staged files of one sheet."""

    box: Box
    height: Path
    error: Path
    date: Path | None = None
    """Where scenes differ in their day."""

    @property
    def name(self) -> str:
        """What the sheet is called: its first lattice pixel."""
        return _name(self.box)

    @property
    def paths(self) -> tuple[Path, ...]:
        """Its files."""
        return (self.height, self.error) if self.date is None else (self.height, self.error, self.date)

    def unlink(self) -> None:
        """Delete its files."""
        delete(*self.paths)


def _name(box: Box) -> str:
    return f"r{box.row0}_c{box.col0}"


class SheetWriter:
    """The staged files of a sheet, being written from the top; made by `stage_sheet`."""

    def __init__(self, sheet: StagedSheet, height: RasterWriter, error: RasterWriter, date: RasterWriter | None) -> None:
        self._sheet, self._height, self._error, self._date = sheet, height, error, date

    def write(self, box: Box, height_m: NDArray[np.float32], error_m: NDArray[np.float32]) -> None:
        """Write a strip: `height_m` (row, col) and `error_m` (band, row, col), both already on the quantum."""
        row = box.row0 - self._sheet.box.row0
        self._height.write(row, height_m[None])
        self._error.write(row, error_m)

    def write_dates(self, box: Box, numbers: NDArray[np.int32]) -> None:
        """Write the days of a strip, (row, col) as `canopy.mosaicker.dates.as_numbers` makes them."""
        assert self._date is not None, "the sheet was staged without days"
        self._date.write(box.row0 - self._sheet.box.row0, numbers[None])


@contextmanager
def stage_sheet(
    folder: Path, lattice: Lattice, box: Box, *, dated: bool = False
) -> Iterator[tuple[StagedSheet, SheetWriter]]:
    """Stage one sheet in `folder`, with days where `dated`; its files take their names when the block ends without an error.

    Raises:
        OutputError: a file lacks a part of what was written, as on a full disk.
        RasterError: it cannot be written at all.
    """
    sheet = staged_in(folder, box, dated=dated)
    kinds = [(sheet.height, len(HEIGHT_BANDS), "float32", math.nan), (sheet.error, len(ERROR_BANDS), "float32", math.nan)]
    if sheet.date is not None:
        kinds.append((sheet.date, 1, "int32", 0.0))
    with ExitStack() as stack:
        writers = [
            stack.enter_context(
                create_raster(path, grid=lattice.grid(box), count=count, dtype=dtype, nodata=nodata, **STAGED)
            )
            for path, count, dtype, nodata in kinds
        ]
        yield sheet, SheetWriter(sheet, writers[0], writers[1], writers[2] if dated else None)
    for path, count, _, _ in kinds:
        check_whole(path, box, count)


def staged_in(folder: Path, box: Box, *, dated: bool) -> StagedSheet:
    """The staged files of a sheet in a folder, whether they are there or not."""
    height, error, date = (folder / f"{_name(box)}_{kind}.tif" for kind in ("height", "error", "date"))
    return StagedSheet(box=box, height=height, error=error, date=date if dated else None)


def check_whole(path: Path, box: Box, count: int) -> None:
    """Refuse a staged file that lacks a block: GDAL writes the last of them when it closes a file, and only logs what fails.

    The blocks lie one behind the other, uncompressed, so that a file that lacks one is too short. It would read as NaN.

    Raises:
        OutputError: it is too short; it is deleted.
    """
    with open_raster(path) as raster:
        block = raster.block_shapes[0]
    pixels = math.prod(-(-side // part) * part for side, part in zip(box.shape, block, strict=True))
    if path.stat().st_size < count * pixels * np.dtype(np.float32).itemsize:  # days take as much
        delete(path)
        raise OutputError(f"cannot write {path} (blocks of it are missing); free disk space or choose another folder")


# --- the COG -------------------------------------------------------------------------------------------------------------


class Placement(Protocol):
    """Says where boxes of pixels lie: a `Lattice`, or pixels that are counted from another origin."""

    def grid(self, box: Box) -> Grid:
        """The grid of `box`."""


def write_pair(
    height: Path,
    error: Path,
    staged: Sequence[StagedSheet],
    *,
    lattice: Lattice,
    box: Box,
    tags: Mapping[str, str],
    factors: Sequence[int] | None = None,
    threads: int | None = None,
) -> tuple[Statistics, Statistics]:
    """Build the height and the error COG of `box` from staged sheets; both are there afterwards, or neither.

    GDAL compresses on all cores but reads on one, so the two files are written at the same time. Memory does not grow with
    the map: it is read in chunks and GDAL's cache has a limit.

    Args:
        height: Final name of the heights.
        error: Final name of the errors.
        staged: What the map consists of.
        lattice: Where it lies.
        box: The pixels of the map.
        tags: Tags of both files.
        factors: As `write_cog`.
        threads: As `write_cog`.

    Returns:
        The statistics of the bands of each.

    Raises:
        OutputError: as `write_cog`.
    """
    files = ((height, "height", HEIGHT_BANDS), (error, "error", ERROR_BANDS))
    with ThreadPoolExecutor(max_workers=len(files), thread_name_prefix="publish") as publishers:
        jobs = [
            publishers.submit(
                write_cog, path, [(sheet.box, getattr(sheet, kind)) for sheet in staged],
                lattice=lattice, box=box, band_names=names, tags=tags, factors=factors, threads=threads,
            )
            for path, kind, names in files
        ]  # fmt: skip
    failures = [job.exception() for job in jobs]
    if any(failures):
        for (path, _, _), failure in zip(files, failures, strict=True):
            if failure is None:
                path.unlink()
    first, second = (job.result() for job in jobs)
    return first, second


def overview_factors(side_px: int) -> tuple[int, ...]:
    """How many pixels of a map of this side are one of each of its overviews; the last overview fits a block."""
    factors: list[int] = []
    factor = 1
    while -(-side_px // factor) > BLOCK_PX:
        factor *= 2
        factors.append(factor)
    return tuple(factors)


def write_cog(
    out: Path,
    parts: Sequence[tuple[Box, Path]],
    *,
    lattice: Placement,
    box: Box,
    band_names: Sequence[str],
    tags: Mapping[str, str],
    factors: Sequence[int] | None = None,
    threads: int | None = None,
) -> Statistics:
    """Join staged parts into one cloud-optimized GeoTIFF in metres, NaN where there is nothing.

    The bytes depend on the pixels, the place and the tags only, not on the parts or the threads.

    Args:
        out: Final name; until every check has passed the file is `.NAME.part.tif` beside it.
        parts: Staged float32 rasters and the lattice pixels they hold, on the quantum.
        lattice: Where they lie.
        box: The pixels of the result.
        band_names: One a band.
        tags: Tags of the file.
        factors: Factors of the overviews, 2, 4 and on; default `overview_factors` of the longer side.
        threads: Threads that compress; default one a core.

    Returns:
        The statistics of its bands, exact.

    Raises:
        OutputError: the disk is full, or the file does not pass `check_cog`.
    """
    vrt, part = out.with_name(f".{out.name}.vrt"), out.with_name(f".{out.name}.part.tif")
    grid, pixels = lattice.grid(box), math.prod(box.shape)
    factors = overview_factors(max(box.shape)) if factors is None else factors
    try:
        try:
            vrt.write_bytes(mosaic_vrt(parts, grid, box, band_names, tags))
            levels, overviews = _pyramid(vrt, grid, len(band_names), factors)
            band_tags = [band.tags(pixels) for band in levels[0]]
            vrt.write_bytes(mosaic_vrt(parts, grid, box, band_names, tags, band_tags=band_tags, overviews=overviews))
            with rasterio.Env(GDAL_NUM_THREADS="ALL_CPUS" if threads is None else str(threads)):
                # The statistics in the VRT go into the file: GDAL's own would take another pass, and depend on the order.
                rasterio.shutil.copy(
                    vrt, part, driver="COG", COMPRESS="DEFLATE", LEVEL=DEFLATE_LEVEL, PREDICTOR="FLOATING_POINT",
                    BLOCKSIZE=BLOCK_PX, BIGTIFF="IF_SAFER", OVERVIEWS="AUTO" if factors else "NONE",
                )  # fmt: skip
                trim_heap()
                check_cog(part, grid, band_names, levels)
        except (*GDAL_ERRORS, RasterError, OSError) as error:
            reason = error.__cause__ or error
            raise OutputError(f"cannot write {out} ({reason}); free disk space or choose another folder") from error
        part.replace(out)
    finally:
        delete(part, vrt, *out.parent.glob(f"{vrt.name}.*.tif"))
        trim_heap()
    return levels[0]


def _pyramid(source: Path, grid: Grid, count: int, factors: Sequence[int]) -> tuple[list[Statistics], list[Path]]:
    """The statistics of a raster and of its overviews, and the overviews as files beside it, `SOURCE.2.tif` and on.

    Why not GDAL's: its averages are not on the quantum, so they compress badly and make up more than half of the file; and
    this way the pixels are read once for both.
    """
    levels: list[Statistics] = [()]
    paths: list[Path] = []
    if not factors:
        with open_raster(source) as raster:
            for _, _, heights_m in chunks(raster):
                levels[0] = merge(levels[0], statistics_of(heights_m))
    fine = source
    for factor in factors:
        rows, cols = grid.shape
        coarse = source.with_name(f"{source.name}.{factor}.tif")
        grid = Grid(crs=grid.crs, transform=grid.transform @ Affine.scale(2), shape=((rows + 1) // 2, (cols + 1) // 2))
        levels.append(())
        with (
            open_raster(fine) as raster,
            create_raster(coarse, grid=grid, count=count, dtype="float32", nodata=math.nan, **STAGED) as writer,
        ):
            for row, col, heights_m in chunks(raster):
                if fine == source:
                    levels[0] = merge(levels[0], statistics_of(heights_m))
                halved_m = halve(heights_m)
                levels[-1] = merge(levels[-1], statistics_of(halved_m))
                writer.write(row // 2, halved_m, col // 2)
        paths.append(coarse)
        fine = coarse
        trim_heap()
    return levels, paths


def chunks(raster: Raster) -> Iterator[tuple[int, int, NDArray[np.float32]]]:
    """(row, column, heights) of every part of a raster, each pixel once."""
    rows, cols = raster.shape
    for row in range(0, rows, _CHUNK_PX[0]):
        for col in range(0, cols, _CHUNK_PX[1]):
            yield row, col, raster.read_heights(row, col, (min(_CHUNK_PX[0], rows - row), min(_CHUNK_PX[1], cols - col)))


def check_cog(path: Path, grid: Grid, band_names: Sequence[str], expected: Sequence[Statistics] | None = None) -> None:
    """Refuse a file that is not the COG we promise; every block is decoded.

    GDAL flushes the last blocks when a file is closed and only logs what fails then, so a full disk shows on reading.

    Args:
        path: The file.
        grid: Where it should lie.
        band_names: What its bands should be called.
        expected: The statistics that it and each of its overviews should have, counted from what went into it; without
            them the overviews are not decoded.

    Raises:
        RasterError: the layout, the compression, a block, the grid, a name, a unit, the nodata value, a pixel or the
            statistics are not right.
    """
    _, errors, warnings = cog_validate(path, strict=True, quiet=True)
    # rio-cogeo takes a raster as wide as a block for one in strips; the shape of the blocks is looked at below.
    problems = [problem for problem in (*errors, *warnings) if "not tiled" not in problem]
    with open_raster(path) as raster:
        found = raster.grid
        if (found.shape, found.transform) != (grid.shape, grid.transform) or found.crs != grid.crs:
            problems.append("its grid is not the one it was written on")
        if raster.band_names != tuple(band_names) or set(raster.units) != {"m"}:
            problems.append(f"its bands are {raster.band_names} in {raster.units}")
        if raster.dtype != "float32" or raster.nodata is None or not math.isnan(raster.nodata):
            problems.append(f"it holds {raster.dtype} with nodata {raster.nodata}")
        stored = (raster.structure.get("COMPRESSION"), raster.structure.get("PREDICTOR"))
        overviews, band_tags = raster.overviews, raster.band_tags
        blocks = {
            *raster.block_shapes,
            *(shape for level in range(len(overviews)) for shape in _overview_blocks(path, level)),
        }
        if stored != ("DEFLATE", "3") or blocks != {(BLOCK_PX, BLOCK_PX)}:
            problems.append(f"it is stored as {stored[0]}, predictor {stored[1]}, in blocks of {sorted(blocks)}")
        if not problems:
            heights = _count(raster)
            for band, tags in zip(heights, band_tags, strict=True):
                if band.count and "STATISTICS_MEAN" not in tags:
                    problems.append("it lacks statistics")
                elif not _agree(band.tags(math.prod(grid.shape)), tags):
                    problems.append("its statistics are not those of its pixels")
    if not problems and expected is not None:
        levels = [heights, *(_count_overview(path, level) for level in range(len(overviews)))]
        if levels != list(expected):
            problems.append("its pixels are not those that went into it")
    if problems:
        raise RasterError(f"{path.name} is not a valid COG: {'; '.join(problems)}")


def _count(raster: Raster) -> Statistics:
    total: Statistics = ()
    for _, _, heights_m in chunks(raster):
        total = merge(total, statistics_of(heights_m))
    return total


def _count_overview(path: Path, level: int) -> Statistics:
    with open_raster(path, overview=level) as raster:
        return _count(raster)


def _overview_blocks(path: Path, level: int) -> tuple[tuple[int, int], ...]:
    with open_raster(path, overview=level) as raster:
        return raster.block_shapes


def _agree(wanted: Mapping[str, str], found: Mapping[str, str]) -> bool:
    """Whether a file's statistics are the wanted ones, up to the last digits, in which other writers differ."""
    return all(math.isclose(float(found[key]), float(value), rel_tol=1e-9, abs_tol=1e-12) for key, value in wanted.items())


# --- reading back --------------------------------------------------------------------------------------------------------


def open_map(out: str | Path) -> xarray.Dataset:
    """A finished map as an `xarray.Dataset`, read lazily.

    Args:
        out: The output folder of `canopy map`, in one file or in sheets.

    Returns:
        Variables `height_m`, `error_90_m`, `lower_90_m` and `upper_90_m` on (y, x) in metres, NaN = unknown, with the
        CRS in `.rio.crs`; the tags of both files are attributes.

    Raises:
        OutputError: the folder does not hold a finished map.
    """
    import rioxarray
    import xarray

    out = Path(out)
    variables: dict[str, Any] = {}
    attributes: dict[str, Any] = {}
    for name, bands in (("height", HEIGHT_BANDS), ("error", ERROR_BANDS)):
        path = next((path for suffix in (".tif", ".vrt") if (path := out / f"{name}{suffix}").exists()), None)
        if path is None:
            raise OutputError(f"{out / name}.tif does not exist; finish the map first with canopy map … --out {out}")
        array = rioxarray.open_rasterio(path, chunks={"x": 2 * BLOCK_PX, "y": 2 * BLOCK_PX}, masked=True)
        assert isinstance(array, xarray.DataArray), f"{path} opened as {type(array).__name__}"
        attributes |= {
            key: value for key, value in array.attrs.items() if key.isupper() and not key.startswith("STATISTICS_")
        }
        for index, band in enumerate(bands):
            variables[band] = array.isel(band=index, drop=True).assign_attrs(units="m", long_name=band)
    return xarray.Dataset(variables, attrs=attributes)

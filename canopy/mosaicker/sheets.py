"""A map larger than one file: COGs of its sheets, and what makes one layer of them.

    sheets/rROW_cCOL_height.tif, …_error.tif    one pair a sheet, complete in itself
    height.vrt, error.vrt                       the whole map for any GDAL and QGIS
    height.gti.gpkg, error.gti.gpkg             the same for GDAL 3.9 and later, and the footprints as a vector layer
    *.ovr                                       overviews of both from where those of the sheets end
    sheets/…_date.tif, date.vrt                 the days of the imagery, where scenes differ in them

All paths inside are relative, so the folder can be moved.

What holds of overviews: every sheet starts and ends on multiples of `SHEET_MULTIPLE_PX` lattice pixels, so an overview
pixel up to that factor covers the same lattice pixels, and has the same value, whatever the size of the sheets and wherever
the area of interest begins (only whether pixels around it are known depends on the area). Coarser overviews are counted
from the first pixel of the whole map: they too do not depend on the sheets.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from canopy.errors import GridError, OutputError, RasterError
from canopy.grid import Box, Lattice, sheet_index
from canopy.mosaicker.dates import DATE_BAND, UNDATED, newest, write_dates
from canopy.mosaicker.gti import write_gti
from canopy.mosaicker.publish import (
    ERROR_BANDS,
    HEIGHT_BANDS,
    STAGED,
    StagedSheet,
    chunks,
    overview_factors,
    write_cog,
    write_pair,
)
from canopy.mosaicker.quantum import BandStatistics, Statistics, halve, merge
from canopy.mosaicker.vrt import BLOCK_PX, DAYS, mosaic_vrt
from canopy.raster import create_raster, delete, open_raster

if TYPE_CHECKING:
    import geopandas

SHEET_MULTIPLE_PX = 64
"""Sides of sheets are multiples of this: the greatest factor of an overview that is the same in sheets of any size."""

SHEETS = "sheets"
"""The folder of the sheets inside that of the map."""

_KINDS = (("height", HEIGHT_BANDS), ("error", ERROR_BANDS))


def check_sheet_px(sheet_px: int) -> None:
    """Refuse a size of sheets whose overviews would not fit together.

    Raises:
        GridError: it is not a multiple of `SHEET_MULTIPLE_PX`.
    """
    if sheet_px < SHEET_MULTIPLE_PX or sheet_px % SHEET_MULTIPLE_PX:
        near = max(round(sheet_px / SHEET_MULTIPLE_PX), 1) * SHEET_MULTIPLE_PX
        raise GridError(
            f"sheets of {sheet_px} px are not a multiple of {SHEET_MULTIPLE_PX} px, so the overviews of neighbours would "
            f"not fit together; choose for example {near}"
        )


def sheet_extent(box: Box) -> Box:
    """The pixels of the files of a part of a map: grown outwards to multiples of `SHEET_MULTIPLE_PX`, unknown there."""
    multiple = SHEET_MULTIPLE_PX
    return Box(
        box.row0 // multiple * multiple,
        box.col0 // multiple * multiple,
        -(-box.row1 // multiple) * multiple,
        -(-box.col1 // multiple) * multiple,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class PublishedSheet:
    """A finished sheet: what the mosaic of all of them needs to know, in numbers and names that go into a record."""

    box: Box
    """The pixels that were asked for; the files hold `sheet_extent` of it."""
    name: str
    """First part of the names of its files."""
    height: Statistics
    """Of the band of the heights."""
    error: Statistics
    """Of the three bands of the errors."""
    dated: bool = False
    """Whether it has a file of days."""

    @property
    def is_empty(self) -> bool:
        """Whether it has no height anywhere; it then has no files."""
        return self.height[0].count == 0

    def path(self, out: Path, kind: str) -> Path:
        """Its file of the kind "height", "error" or "date" in the map's folder."""
        return out / SHEETS / f"{self.name}_{kind}.tif"

    def paths(self, out: Path) -> tuple[Path, ...]:
        """Its files in the map's folder, none where it is empty."""
        kinds = [*(kind for kind, _ in _KINDS), *(["date"] if self.dated else [])]
        return () if self.is_empty else tuple(self.path(out, kind) for kind in kinds)


def publish_sheet(
    out: Path,
    staged: StagedSheet,
    *,
    lattice: Lattice,
    sheet_px: int,
    tags: Mapping[str, str],
    threads: int | None = None,
) -> PublishedSheet:
    """Turn a staged sheet into its COGs in `out/sheets`, checked, with their names last.

    It holds no lock of Python's while it compresses, uses no torch, and gives the same bytes with any number of threads: it
    may run beside the model, in another thread or process. Done twice it leaves the same files. The
    staged files stay, for the caller to delete once the sheet is on record.

    Args:
        out: The map's folder.
        staged: The sheet.
        lattice: Where it lies.
        sheet_px: Side of a whole sheet, which fixes the overviews of all of them.
        tags: Tags of both files.
        threads: Threads that compress; default one a core.

    Raises:
        GridError: as `check_sheet_px`.
        OutputError: as `write_cog`.
    """
    check_sheet_px(sheet_px)
    box = sheet_extent(staged.box)
    assert _cell(box, sheet_px) is not None, f"{staged.box} is not part of one sheet of {sheet_px} px"
    dated = staged.date is not None
    sheet = PublishedSheet(box=staged.box, name=staged.name, height=(), error=(), dated=dated)
    height, error, date = (sheet.path(out, kind) for kind in ("height", "error", "date"))
    try:
        height.parent.mkdir(parents=True, exist_ok=True)
    except OSError as failure:
        raise OutputError(f"cannot create {height.parent} ({failure.strerror}); choose another folder") from failure
    if _has_height(staged):
        statistics = write_pair(
            height, error, [staged],
            lattice=lattice, box=box, tags=tags, factors=_factors(sheet_px), threads=threads,
        )  # fmt: skip
        if staged.date is not None:
            write_dates(
                date, [(staged.box, staged.date)],
                lattice=lattice, box=box, tags=tags, factors=_factors(sheet_px), threads=threads,
            )  # fmt: skip
    else:
        delete(height, error, date)
        statistics = (BandStatistics(),) * len(HEIGHT_BANDS), (BandStatistics(),) * len(ERROR_BANDS)
    return PublishedSheet(box=staged.box, name=staged.name, height=statistics[0], error=statistics[1], dated=dated)


def _has_height(staged: StagedSheet) -> bool:
    with open_raster(staged.height) as raster:
        return any(not np.isnan(heights_m).all() for _, _, heights_m in chunks(raster))


def _factors(sheet_px: int) -> tuple[int, ...]:
    """The overviews of every sheet, also of a part at the edge of the map that is much smaller."""
    return tuple(factor for factor in overview_factors(sheet_px) if factor <= SHEET_MULTIPLE_PX)


def _cell(box: Box, sheet_px: int) -> tuple[int, int] | None:
    """Which of the lattice's sheets `box` is a part of; None where it reaches over an edge of it."""
    first, last = ((sheet_index(row, sheet_px), sheet_index(col, sheet_px)) for row, col in _corners(box))
    return first if first == last else None


def _corners(box: Box) -> tuple[tuple[int, int], tuple[int, int]]:
    return (box.row0, box.col0), (box.row1 - 1, box.col1 - 1)


# --- one layer of all of them ----------------------------------------------------------------------------------------------


def index_sheets(
    out: Path,
    sheets: Sequence[PublishedSheet],
    *,
    lattice: Lattice,
    box: Box,
    sheet_px: int,
    tags: Mapping[str, str],
    threads: int | None = None,
) -> tuple[Path, Path]:
    """Make one layer of finished sheets: for heights and errors a VRT, a tile index and the overviews of both.

    Statistics are merged from those of the sheets, and are exact. Overviews up to the coarsest of the sheets are theirs;
    of the coarser ones only as much is read as those have pixels. The VRT takes its name last.

    Args:
        out: The map's folder, with the sheets in it.
        sheets: All sheets of the map, in any order. Empty ones, and what no sheet covers, are NaN.
        lattice: Where they lie.
        box: The pixels of the map.
        sheet_px: Side of a whole sheet.
        tags: Tags of the map.
        threads: Threads that compress the overviews; default one a core.

    Returns:
        `height.vrt` and `error.vrt`.

    Raises:
        OutputError: no sheet has a height, a sheet's file is missing or not the one on record, or the disk is full.
    """
    check_sheet_px(sheet_px)
    cells = [_cell(sheet.box, sheet_px) for sheet in sheets]
    assert None not in cells, f"a sheet reaches over the edges of the sheets of {sheet_px} px"
    assert len(set(cells)) == len(cells), "two sheets hold the same pixels"
    full = sorted((sheet for sheet in sheets if not sheet.is_empty), key=lambda sheet: sheet.box)
    if not full:
        raise OutputError(f"none of the {len(sheets)} sheets of {out} has a height; choose an area that the imagery covers")
    first, second = (
        _index(
            out, kind, names, full,
            lattice=lattice, extent=sheet_extent(box), factors=_factors(sheet_px), tags=tags, threads=threads,
        )
        for kind, names in _KINDS
    )  # fmt: skip
    if any(sheet.dated for sheet in full):
        _index_dates(
            out, full, lattice=lattice, extent=sheet_extent(box), factors=_factors(sheet_px), tags=tags, threads=threads
        )
    return first, second


def _index_dates(
    out: Path,
    sheets: Sequence[PublishedSheet],
    *,
    lattice: Lattice,
    extent: Box,
    factors: Sequence[int],
    tags: Mapping[str, str],
    threads: int | None,
) -> None:
    """`date.vrt` and its overviews, made as those of heights are."""
    final, coarse = out / "date.vrt", out / "date.vrt.ovr"
    parts = {path: path.with_name(f".part.{path.name}") for path in (coarse, final)}
    files = [(sheet_extent(sheet.box), sheet.path(out, "date")) for sheet in sheets]
    delete(*out.glob(".part.date.*"))
    try:
        if not _write_coarse_dates(
            parts[coarse], files, lattice=lattice, extent=extent, factors=factors, tags=tags, threads=threads
        ):
            del parts[coarse]
            delete(coarse)
        text = mosaic_vrt(files, lattice.grid(extent), extent, [DATE_BAND], tags, beside=out, values=DAYS)
        parts[final].write_bytes(text)
        for path, part in parts.items():
            part.replace(path)
    except (RasterError, OSError) as error:
        reason = getattr(error, "strerror", None) or error
        raise OutputError(f"cannot write {final} ({reason}); free disk space or choose another folder") from error
    finally:
        delete(*out.glob(".part.date.*"))


def _write_coarse_dates(
    path: Path,
    files: Sequence[tuple[Box, Path]],
    *,
    lattice: Lattice,
    extent: Box,
    factors: Sequence[int],
    tags: Mapping[str, str],
    threads: int | None,
) -> bool:
    """As `_write_overviews`, of days."""
    if max(extent.shape) <= BLOCK_PX:
        return False
    factor = factors[-1] if factors else 2
    coarse = Lattice(crs=lattice.crs, gsd_m=lattice.gsd_m * factor)
    box = _coarser(extent, factor)
    staged = path.with_name(f"{path.name}.staged.tif")
    with create_raster(staged, grid=coarse.grid(box), count=1, dtype="int32", nodata=UNDATED, **STAGED) as writer:
        for part, sheet in files:
            with open_raster(sheet, overview=len(factors) - 1 if factors else None) as raster:
                numbers = raster.read(0, 0, raster.shape).data
            place = _coarser(part, factor)
            writer.write(place.row0 - box.row0, numbers if factors else newest(numbers[0])[None], place.col0 - box.col0)
    write_dates(path, [(box, staged)], lattice=coarse, box=box, tags=tags, threads=threads)
    return True


def _index(
    out: Path,
    kind: str,
    names: Sequence[str],
    sheets: Sequence[PublishedSheet],
    *,
    lattice: Lattice,
    extent: Box,
    factors: Sequence[int],
    tags: Mapping[str, str],
    threads: int | None,
) -> Path:
    final = {suffix: out / f"{kind}{suffix}" for suffix in (".vrt.ovr", ".gti.gpkg.ovr", ".gti.gpkg", ".vrt")}
    parts = {suffix: path.with_name(f".part.{path.name}") for suffix, path in final.items()}
    grid = lattice.grid(extent)
    total: Statistics = ()
    for sheet in sheets:
        _check(sheet.path(out, kind), sheet, getattr(sheet, kind), lattice, factors)
        total = merge(total, getattr(sheet, kind))
    band_tags = [band.tags(math.prod(extent.shape)) for band in total]
    files = [(sheet_extent(sheet.box), sheet.path(out, kind)) for sheet in sheets]
    # A process that was killed leaves its parts, and a GeoPackage written over another one counts its changes.
    delete(*out.glob(f".part.{kind}.*"))
    try:
        has_overviews = _write_overviews(
            parts[".vrt.ovr"], files, names, lattice=lattice, extent=extent, factors=factors, tags=tags, threads=threads
        )
        if has_overviews:
            shutil.copyfile(parts[".vrt.ovr"], parts[".gti.gpkg.ovr"])
        else:
            delete(final.pop(".vrt.ovr"), final.pop(".gti.gpkg.ovr"))
        write_gti(parts[".gti.gpkg"], _footprints(out, kind, sheets, lattice), grid, names, tags, band_tags=band_tags)
        parts[".vrt"].write_bytes(mosaic_vrt(files, grid, extent, names, tags, band_tags=band_tags, beside=out))
        for suffix, path in final.items():
            parts[suffix].replace(path)
    except (RasterError, OSError) as error:
        reason = getattr(error, "strerror", None) or error
        raise OutputError(
            f"cannot write {final['.vrt']} and its index ({reason}); free disk space or choose another folder"
        ) from error
    finally:
        delete(*out.glob(f".part.{kind}.*"))
    return final[".vrt"]


def _check(path: Path, sheet: PublishedSheet, statistics: Statistics, lattice: Lattice, factors: Sequence[int]) -> None:
    """Refuse a file that is not the one on record, without decoding it."""
    extent = sheet_extent(sheet.box)
    try:
        with open_raster(path) as raster:
            wanted = tuple(band.tags(math.prod(extent.shape)) for band in statistics)
            same = (
                raster.shape == extent.shape
                and raster.grid.transform == lattice.grid(extent).transform
                and raster.overviews == tuple(factors)
                and all(found.items() >= tags.items() for found, tags in zip(raster.band_tags, wanted, strict=True))
            )
    except RasterError as error:
        raise OutputError(f"{error}; the sheet must be made again") from error
    if not same:
        raise OutputError(f"{path} is not the file that this run wrote; delete it and resume the run")


def _write_overviews(
    path: Path,
    files: Sequence[tuple[Box, Path]],
    names: Sequence[str],
    *,
    lattice: Lattice,
    extent: Box,
    factors: Sequence[int],
    tags: Mapping[str, str],
    threads: int | None,
) -> bool:
    """The map from the factor at which the sheets' own overviews end, with its own overviews; whether it needs any.

    GDAL takes a file NAME.ovr for the overviews of NAME, whatever their factors; we make it a COG like the others.
    """
    if max(extent.shape) <= BLOCK_PX:
        return False
    factor = factors[-1] if factors else 2
    coarse = Lattice(crs=lattice.crs, gsd_m=lattice.gsd_m * factor)
    box = _coarser(extent, factor)
    staged = path.with_name(f"{path.name}.staged.tif")
    with create_raster(
        staged, grid=coarse.grid(box), count=len(names), dtype="float32", nodata=math.nan, **STAGED
    ) as writer:
        # What no sheet covers must be unknown; a GeoTIFF's blocks that nothing is written to are its nodata value.
        for part, sheet in files:
            with open_raster(sheet, overview=len(factors) - 1 if factors else None) as raster:
                heights_m = raster.read_heights(0, 0, raster.shape)
            place = _coarser(part, factor)
            writer.write(place.row0 - box.row0, heights_m if factors else halve(heights_m), place.col0 - box.col0)
    write_cog(path, [(box, staged)], lattice=coarse, box=box, band_names=names, tags=tags, threads=threads)
    return True


def _coarser(box: Box, factor: int) -> Box:
    edges = (box.row0, box.col0, box.row1, box.col1)
    assert not any(edge % factor for edge in edges), f"{box} does not lie on multiples of {factor} px"
    return Box(*(edge // factor for edge in edges))


def _footprints(out: Path, kind: str, sheets: Sequence[PublishedSheet], lattice: Lattice) -> geopandas.GeoDataFrame:
    import geopandas
    import shapely

    rows = [
        {
            "location": sheet.path(out, kind).relative_to(out).as_posix(),
            "sheet": sheet.name,
            "known_px": (band := getattr(sheet, kind)[0]).count,
            "mean_m": band.mean_m,
            "stddev_m": band.stddev_m,
        }
        for sheet in sheets
    ]
    footprints = [shapely.box(*lattice.grid(sheet_extent(sheet.box)).bounds) for sheet in sheets]
    return geopandas.GeoDataFrame(rows, geometry=footprints, crs=lattice.crs)

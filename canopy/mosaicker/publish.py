"""From finished strips to the files people open: `height.tif` and `error.tif`, cloud-optimized, checked, whole or absent.

Strips are staged as plain GeoTIFFs, one pair a sheet; a VRT joins the sheets and carries names, units and tags; GDAL's
COG driver turns it into one file that gets its final name only after rio-cogeo and a full decode have passed it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from xml.etree import ElementTree as ET

import numpy as np
import rasterio.shutil
from affine import Affine
from numpy.typing import NDArray
from rio_cogeo.cogeo import cog_validate

from canopy.errors import OutputError, RasterError
from canopy.grid import Box, Grid, Lattice
from canopy.raster import GDAL_ERRORS, RasterWriter, check_readable, create_raster, open_raster

if TYPE_CHECKING:
    import xarray

QUANTUM_M = 1 / 32
"""Heights are multiples of this. A power of two empties the low bits of the mantissa, which halves the compressed size;
the rounding is at most 1.6 cm."""

BLOCK_PX = 512

DEFLATE_LEVEL = 4
"""Of 9. Level 6, the default, takes half as long again for files 6 % smaller."""

_STRIP_PX = 128
"""Rows of a map that are averaged at a time."""

HEIGHT_BANDS = ("height_m",)
ERROR_BANDS = ("error_90_m", "lower_90_m", "upper_90_m")

BYTES_PER_PIXEL = 43
"""Disk that a run needs at its peak: four staged float32 bands and a third more for their overviews, 16 * 4/3 bytes, and at
worst as much again for the COGs being built."""


def quantise(height_m: NDArray[np.floating[Any]]) -> NDArray[np.float32]:
    """Heights rounded to the nearest `QUANTUM_M`; NaN stays NaN."""
    quanta = np.rint(np.asarray(height_m, np.float32) * np.float32(1 / QUANTUM_M))
    return np.asarray(quanta * np.float32(QUANTUM_M), np.float32)


def error_bands(lower_m: NDArray[np.floating[Any]], upper_m: NDArray[np.floating[Any]]) -> NDArray[np.float32]:
    """The three bands of `error.tif`, (band, row, col), from the bounds of the 90 % interval.

    The bounds are rounded outwards, so rounding never takes the true height out of the interval; the half-width
    likewise.
    """
    per_m = np.float32(1 / QUANTUM_M)
    lower = np.floor(np.asarray(lower_m, np.float32) * per_m)
    upper = np.ceil(np.asarray(upper_m, np.float32) * per_m)
    half_width = np.ceil((upper - lower) / 2)
    return np.stack([half_width, lower, upper]) * np.float32(QUANTUM_M)


# --- staging -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class StagedSheet:
    """The two staged files of one sheet."""

    box: Box
    height: Path
    error: Path


class SheetWriter:
    """The staged files of a sheet, being written from the top; made by `stage_sheet`."""

    def __init__(self, sheet: StagedSheet, height: RasterWriter, error: RasterWriter) -> None:
        self._sheet, self._height, self._error = sheet, height, error

    def write(self, box: Box, height_m: NDArray[np.float32], error_m: NDArray[np.float32]) -> None:
        """Write a strip: `height_m` (row, col) and `error_m` (band, row, col), both already on the quantum."""
        row = box.row0 - self._sheet.box.row0
        self._height.write(row, height_m[None])
        self._error.write(row, error_m)


@contextmanager
def stage_sheet(folder: Path, lattice: Lattice, box: Box) -> Iterator[tuple[StagedSheet, SheetWriter]]:
    """Stage one sheet in `folder`; its files take their names when the block ends without an error.

    Raises:
        OutputError: a file lacks a part of what was written, as on a full disk.
    """
    name = f"r{box.row0}_c{box.col0}"
    sheet = StagedSheet(box=box, height=folder / f"{name}_height.tif", error=folder / f"{name}_error.tif")
    with ExitStack() as stack:
        # Uncompressed: it is read once and deleted, and a compressor here would take the model's cores.
        height, error = (
            stack.enter_context(
                create_raster(path, grid=lattice.grid(box), count=count, dtype="float32", nodata=math.nan, compress="none")
            )
            for path, count in ((sheet.height, len(HEIGHT_BANDS)), (sheet.error, len(ERROR_BANDS)))
        )
        yield sheet, SheetWriter(sheet, height, error)
    for path, count in ((sheet.height, len(HEIGHT_BANDS)), (sheet.error, len(ERROR_BANDS))):
        check_whole(path, box, count)


def check_whole(path: Path, box: Box, count: int) -> None:
    """Refuse a staged file that lacks a block: GDAL writes the last of them when it closes a file, and only logs what fails.

    The blocks lie one behind the other, uncompressed, so a file that lacks one is too short. It would read as NaN.

    Raises:
        OutputError: it is too short.
    """
    pixels = math.prod(-(-side // BLOCK_PX) * BLOCK_PX for side in box.shape)
    if path.stat().st_size < count * pixels * np.dtype(np.float32).itemsize:
        raise OutputError(f"cannot write {path} (blocks of it are missing); free disk space or choose another folder")


# --- the COG -------------------------------------------------------------------------------------------------------------


def write_cog(
    out: Path,
    parts: Sequence[tuple[Box, Path]],
    *,
    lattice: Lattice,
    box: Box,
    band_names: Sequence[str],
    tags: Mapping[str, str],
) -> None:
    """Join staged parts into one cloud-optimized GeoTIFF in metres, NaN where there is nothing.

    Args:
        out: Final name; until every check has passed the file is `.NAME.part.tif` beside it.
        parts: Staged float32 rasters and the lattice pixels they hold.
        lattice: Where they lie.
        box: The pixels of the result.
        band_names: One a band.
        tags: Tags of the file.

    Raises:
        OutputError: the disk is full, or the file does not pass `check_cog`.
    """
    vrt, part = out.with_name(f".{out.name}.vrt"), out.with_name(f".{out.name}.part.tif")
    try:
        try:
            vrt.write_bytes(_vrt(parts, lattice.grid(box), box, band_names, tags))
            overviews = _overviews(vrt, lattice.grid(box), len(band_names))
            vrt.write_bytes(_vrt(parts, lattice.grid(box), box, band_names, tags, overviews=overviews))
            with rasterio.Env(GDAL_NUM_THREADS="ALL_CPUS"):
                rasterio.shutil.copy(
                    vrt, part, driver="COG", COMPRESS="DEFLATE", LEVEL=DEFLATE_LEVEL, PREDICTOR="FLOATING_POINT",
                    BLOCKSIZE=BLOCK_PX, BIGTIFF="IF_SAFER", STATISTICS="YES",
                )  # fmt: skip
            check_cog(part, lattice.grid(box), band_names)
        except (*GDAL_ERRORS, RasterError, OSError) as error:
            reason = error.__cause__ or error
            raise OutputError(f"cannot write {out} ({reason}); free disk space or choose another folder") from error
        part.replace(out)
    finally:
        part.unlink(missing_ok=True)
        for path in (vrt, *out.parent.glob(f"{vrt.name}.*.tif")):
            path.unlink(missing_ok=True)


def _overviews(source: Path, grid: Grid, count: int) -> list[Path]:
    """The overviews of a raster as files beside it, `SOURCE.2.tif` and on, each from the one before.

    Why not GDAL's: its averages are not on the quantum, so they compress badly and make up more than half of the file.
    Each is written in strips, so memory does not grow with the height of the map.
    """
    paths: list[Path] = []
    fine, factor = source, 1
    while max(grid.shape) > BLOCK_PX:
        rows, cols = grid.shape
        factor *= 2
        coarse = source.with_name(f"{source.name}.{factor}.tif")
        grid = Grid(crs=grid.crs, transform=grid.transform @ Affine.scale(2), shape=((rows + 1) // 2, (cols + 1) // 2))
        with (
            open_raster(fine) as raster,
            create_raster(coarse, grid=grid, count=count, dtype="float32", nodata=math.nan, compress="none") as writer,
        ):
            for row in range(0, rows, _STRIP_PX):
                strip = raster.read(row, 0, (min(_STRIP_PX, rows - row), cols), bands=range(1, count + 1))
                writer.write(row // 2, halve(strip.data))
        paths.append(coarse)
        fine = coarse
    return paths


def halve(height_m: NDArray[np.float32]) -> NDArray[np.float32]:
    """Means of the known pixels in each block of 2 x 2, on the quantum; NaN where none is known.

    Args:
        height_m: (band, row, col) metres; an odd last row or column is half a block.

    Returns:
        (band, ceil(row / 2), ceil(col / 2)).
    """
    _, rows, cols = height_m.shape
    blocks = np.pad(height_m, ((0, 0), (0, rows % 2), (0, cols % 2)), constant_values=np.nan)
    corners = [blocks[:, i::2, j::2] for i in (0, 1) for j in (0, 1)]
    total = corners[0] + corners[1] + corners[2] + corners[3]
    mean = total * np.float32(0.25)
    holes = np.isnan(total)
    if holes.any():
        few = np.stack([corner[holes] for corner in corners])
        known = np.isfinite(few).sum(axis=0)
        with np.errstate(invalid="ignore"):  # 0/0 is NaN: nothing known in the block
            mean[holes] = np.nansum(few, axis=0) / known
    return quantise(mean)


def check_cog(path: Path, grid: Grid, band_names: Sequence[str]) -> None:
    """Refuse a file that is not the COG we promise.

    Raises:
        RasterError: the layout, the compression, a block, the grid, a name, a unit, the nodata value or the statistics
            are not right.
    """
    is_valid, errors, warnings = cog_validate(path, strict=True, quiet=True)
    problems = [*errors, *warnings] if not is_valid else []
    check_readable(path)
    with open_raster(path) as raster:
        found = raster.grid
        if (found.shape, found.transform) != (grid.shape, grid.transform) or found.crs != grid.crs:
            problems.append("its grid is not the one it was written on")
        if raster.band_names != tuple(band_names) or set(raster.units) != {"m"}:
            problems.append(f"its bands are {raster.band_names} in {raster.units}")
        if raster.dtype != "float32" or raster.nodata is None or not math.isnan(raster.nodata):
            problems.append(f"it holds {raster.dtype} with nodata {raster.nodata}")
        stored = (raster.structure.get("COMPRESSION"), raster.structure.get("PREDICTOR"))
        if stored != ("DEFLATE", "3") or set(raster.block_shapes) != {(BLOCK_PX, BLOCK_PX)}:
            problems.append(f"it is stored as {stored[0]}, predictor {stored[1]}, in blocks of {raster.block_shapes[0]}")
        if any("STATISTICS_MEAN" not in tags for tags in raster.band_tags):
            problems.append("it lacks statistics")
    if problems:
        raise RasterError(f"{path.name} is not a valid COG: {'; '.join(problems)}")


def _vrt(
    parts: Sequence[tuple[Box, Path]],
    grid: Grid,
    box: Box,
    band_names: Sequence[str],
    tags: Mapping[str, str],
    *,
    overviews: Sequence[Path] = (),
) -> bytes:
    """A GDAL VRT (XML) that lays the parts side by side; they are disjoint or the same, so none hides another."""
    rows, cols = grid.shape
    if len(parts) > 1:
        # Of sources that lie side by side GDAL merges the statistics, weighted by percentages that it has rounded to
        # 0.0001: they would be off in the seventh digit. Naming one part twice makes it look at the pixels instead.
        parts = [min(parts, key=lambda part: math.prod(part[0].shape)), *parts]
    root = ET.Element("VRTDataset", rasterXSize=str(cols), rasterYSize=str(rows))
    ET.SubElement(root, "SRS").text = grid.crs.to_wkt()
    a, b, c, d, e, f = tuple(grid.transform)[:6]
    ET.SubElement(root, "GeoTransform").text = ", ".join(repr(float(v)) for v in (c, a, b, f, d, e))
    metadata = ET.SubElement(root, "Metadata")
    for key, value in {"AREA_OR_POINT": "Area", **tags}.items():
        ET.SubElement(metadata, "MDI", key=key).text = value
    for index, name in enumerate(band_names, start=1):
        band = ET.SubElement(root, "VRTRasterBand", dataType="Float32", band=str(index))
        ET.SubElement(band, "Description").text = name
        ET.SubElement(band, "UnitType").text = "m"
        ET.SubElement(band, "NoDataValue").text = "nan"
        for part, path in parts:
            source = ET.SubElement(band, "SimpleSource")
            ET.SubElement(source, "SourceFilename", relativeToVRT="0").text = str(path.resolve())
            ET.SubElement(source, "SourceBand").text = str(index)
            height, width = part.shape
            size: dict[str, Any] = {"xSize": str(width), "ySize": str(height)}
            ET.SubElement(source, "SrcRect", xOff="0", yOff="0", **size)
            ET.SubElement(source, "DstRect", xOff=str(part.col0 - box.col0), yOff=str(part.row0 - box.row0), **size)
        for path in overviews:
            overview = ET.SubElement(band, "Overview")
            ET.SubElement(overview, "SourceFilename", relativeToVRT="0").text = str(path.resolve())
            ET.SubElement(overview, "SourceBand").text = str(index)
    return ET.tostring(root)


# --- reading back --------------------------------------------------------------------------------------------------------


def open_map(out: str | Path) -> xarray.Dataset:
    """A finished map as an `xarray.Dataset`, read lazily.

    Args:
        out: The output folder of `canopy map`.

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
    for name, bands in (("height.tif", HEIGHT_BANDS), ("error.tif", ERROR_BANDS)):
        path = out / name
        if not path.exists():
            raise OutputError(f"{path} does not exist; finish the map first with canopy map … --out {out}")
        array = rioxarray.open_rasterio(path, chunks={"x": 2 * BLOCK_PX, "y": 2 * BLOCK_PX}, masked=True)
        assert isinstance(array, xarray.DataArray), f"{path} opened as {type(array).__name__}"
        attributes |= {
            key: value for key, value in array.attrs.items() if key.isupper() and not key.startswith("STATISTICS_")
        }
        for index, band in enumerate(bands):
            variables[band] = array.isel(band=index, drop=True).assign_attrs(units="m", long_name=band)
    return xarray.Dataset(variables, attrs=attributes)

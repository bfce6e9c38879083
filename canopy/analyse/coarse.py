"""Rasters of cells: cover and gaps, and percentiles of height; each with its bounds, streamed window by window.

cover_10m.tif        cover_2m, cover_5m and gap_fraction, each with its bounds; known_fraction
percentiles_30m.tif  p25_m, p50_m, p75_m, p95_m, each with its bounds; max_m; known_fraction
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
import rasterio.shutil
from numpy.typing import NDArray
from rio_cogeo.cogeo import cog_validate

from canopy.analyse.bounds import levels_of
from canopy.analyse.cells import LEAST_KNOWN, Cells, CellWindow
from canopy.analyse.gaps import gaps, halo_px
from canopy.analyse.surfaces import Surfaces, Window
from canopy.errors import OutputError, RasterError
from canopy.grid import Box
from canopy.mosaicker.publish import DEFLATE_LEVEL, STAGED
from canopy.mosaicker.vrt import BLOCK_PX
from canopy.raster import GDAL_ERRORS, RasterWriter, create_raster, delete, open_raster

COVER_ABOVE_M: Final = (2.0, 5.0)
LEVELS: Final = {"p25": 0.25, "p50": 0.5, "p75": 0.75, "p95": 0.95}
KNOWN: Final = "known_fraction"

COVER_BANDS: Final = (
    *(f"{name}{end}" for name in ("cover_2m", "cover_5m", "gap_fraction") for end in ("", "_lower_90", "_upper_90")),
    KNOWN,
)
PERCENTILE_BANDS: Final = (
    *(f"{name}{end}" for name in LEVELS for end in ("_m", "_lower_90_m", "_upper_90_m")),
    "max_m",
    KNOWN,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class GapRule:
    """What is a gap."""

    below_m: float
    least_m2: float


def cover(surfaces: Surfaces, window: CellWindow, rule: GapRule) -> NDArray[np.float32]:
    """(band, row, col) `COVER_BANDS` of the cells of a window."""
    halo = halo_px(rule.least_m2, surfaces.pixel_m2)
    box = window.box
    wide = Box(box.row0 - halo, box.col0 - halo, box.row1 + halo, box.col1 + halo)
    around, inner = surfaces.read(wide), box.slices_in(wide)
    part = around.part(inner)
    known, bounded = _known(window, part)
    surfaces_m = (part.height_m, part.lower_m, part.upper_m)
    bands = [window.shares(surface_m > above_m) for above_m in COVER_ABOVE_M for surface_m in surfaces_m]
    for surface_m in (around.height_m, around.upper_m, around.lower_m):  # the higher surface has the fewer gaps
        gap = gaps(surface_m, below_m=rule.below_m, least_m2=rule.least_m2, pixel_m2=surfaces.pixel_m2)
        bands.append(window.shares(gap[inner]))
    with np.errstate(invalid="ignore", divide="ignore"):
        shares = np.minimum(np.stack(bands) / known, 1)
    enough = known >= LEAST_KNOWN
    is_bound = np.array([index % 3 != 0 for index in range(len(bands))])[:, None, None]
    shares = np.where(enough & (bounded | ~is_bound), shares, np.nan)
    return np.concatenate([shares, known[None]]).astype(np.float32)


def percentiles(surfaces: Surfaces, window: CellWindow) -> NDArray[np.float32]:
    """(band, row, col) `PERCENTILE_BANDS` of the cells of a window."""
    part = surfaces.read(window.box)
    known, bounded = _known(window, part)
    levels = tuple(LEVELS.values())
    below, above = zip(*(levels_of(level) for level in levels), strict=True)
    height = window.quantiles(part.height_m, (*levels, 1.0))
    ends = [
        np.where(bounded, window.quantiles(surface_m, wanted), np.float32(np.nan))
        for surface_m, wanted in ((part.lower_m, below), (part.upper_m, above))
    ]
    bands = [band for index in range(len(levels)) for band in (height[index], ends[0][index], ends[1][index])]
    heights = np.where(known >= LEAST_KNOWN, np.stack([*bands, height[-1]]), np.nan)
    return np.concatenate([heights, known[None]]).astype(np.float32)


def _known(window: CellWindow, part: Window) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    """The known share of each cell, and whether all of that has an interval."""
    known = np.isfinite(part.height_m)
    bounded = known & np.isfinite(part.lower_m) & np.isfinite(part.upper_m)
    share = window.shares(known)
    return np.clip(share, 0, 1), window.shares(bounded) >= share - 1e-9


@contextmanager
def cell_raster(out: Path, cells: Cells, bands: tuple[str, ...], tags: Mapping[str, str]) -> Iterator[RasterWriter]:
    """A cloud-optimized GeoTIFF of cells to write into; it takes its name when the block ends and it has been checked.

    Bands of metres end in `_m`, the others are shares. NaN is unknown. Statistics are inside, overviews are averages.

    Raises:
        OutputError: it cannot be written.
    """
    staged, part = out.with_name(f".{out.name}.staged.tif"), out.with_name(f".{out.name}.part.tif")
    units = tuple("m" if name.endswith("_m") else "1" for name in bands)
    try:
        with create_raster(
            staged, grid=cells.grid, count=len(bands), dtype="float32", nodata=math.nan, band_names=bands, units=units,
            tags={"AREA_OR_POINT": "Area", **tags}, **STAGED,
        ) as writer:  # fmt: skip
            yield writer
        rasterio.shutil.copy(
            staged, part, driver="COG", COMPRESS="DEFLATE", LEVEL=DEFLATE_LEVEL, PREDICTOR="FLOATING_POINT",
            BLOCKSIZE=BLOCK_PX, BIGTIFF="IF_SAFER", OVERVIEW_RESAMPLING="AVERAGE", STATISTICS="YES",
        )  # fmt: skip
        _check(part, bands, units, cells)
        part.replace(out)
    except (*GDAL_ERRORS, RasterError, OSError) as error:
        raise OutputError(
            f"cannot write {out} ({error.__cause__ or error}); free disk space or choose another folder"
        ) from error
    finally:
        delete(staged, part)


def _check(path: Path, bands: tuple[str, ...], units: tuple[str, ...], cells: Cells) -> None:
    """Refuse a file that is not what was written; GDAL only logs what fails when it closes one."""
    _, errors, warnings = cog_validate(path, strict=True, quiet=True)
    # rio-cogeo takes a raster no wider than a block for one in strips.
    problems = [problem for problem in (*errors, *warnings) if "not tiled" not in problem]
    with open_raster(path) as raster:
        if (raster.band_names, raster.units, raster.shape) != (bands, units, cells.box.shape):
            problems.append(f"its bands are {raster.band_names} in {raster.units}")
        raster.check_complete()
    if problems:
        raise RasterError(f"{path.name} is not a valid COG: {'; '.join(problems)}")

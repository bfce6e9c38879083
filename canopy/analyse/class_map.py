"""A map of few classes as a cloud-optimized GeoTIFF: bytes with a colour table and names."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Final

import numpy as np
import rasterio.shutil
from rio_cogeo.cogeo import cog_validate

from canopy.errors import OutputError, RasterError
from canopy.mosaicker.publish import DEFLATE_LEVEL
from canopy.mosaicker.vrt import BLOCK_PX
from canopy.raster import GDAL_ERRORS, delete, open_raster

_CHUNK_ROWS: Final = 512


def write_class_cog(out: Path, staged: Path, *, counts: Mapping[int, int]) -> None:
    """Turn a staged raster of bytes with a palette into the file that people open.

    An overview pixel is the class that most of its pixels have: there is no class between two others.

    Args:
        out: Final name.
        staged: The raster, with its palette, names and tags.
        counts: Class -> its pixels, as they were written.

    Raises:
        OutputError: the disk is full, or the file does not hold what was written.
    """
    part = out.with_name(f".{out.name}.part.tif")
    try:
        try:
            rasterio.shutil.copy(
                staged, part, driver="COG", COMPRESS="DEFLATE", LEVEL=DEFLATE_LEVEL, BLOCKSIZE=BLOCK_PX,
                BIGTIFF="IF_SAFER", OVERVIEWS="AUTO", OVERVIEW_RESAMPLING="MODE",
            )  # fmt: skip
            _check(part, counts)
        except (*GDAL_ERRORS, RasterError, OSError) as error:
            raise OutputError(
                f"cannot write {out} ({error.__cause__ or error}); free disk space or choose another folder"
            ) from error
        part.replace(out)
    finally:
        delete(part)


def _check(path: Path, counts: Mapping[int, int]) -> None:
    """Refuse a file without a part of what was written: GDAL only logs what fails when it closes one."""
    _, errors, warnings = cog_validate(path, strict=True, quiet=True)
    problems = [problem for problem in (*errors, *warnings) if "not tiled" not in problem]
    found = np.zeros(256, np.int64)
    with open_raster(path) as raster:
        rows, cols = raster.shape
        for row in range(0, rows, _CHUNK_ROWS):
            data = raster.read(row, 0, (min(_CHUNK_ROWS, rows - row), cols)).data
            found += np.bincount(data.ravel(), minlength=256)
    if {value: int(count) for value, count in enumerate(found) if count} != {v: n for v, n in counts.items() if n}:
        problems.append("its pixels are not those that went into it")
    if problems:
        raise RasterError(f"{path.name} is not a valid COG: {'; '.join(problems)}")

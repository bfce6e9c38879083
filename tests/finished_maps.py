"""Finished maps of a few pixels, written as canopy map writes them but without predicting."""

import json
from pathlib import Path

import numpy as np
from affine import Affine
from numpy.typing import NDArray
from pyproj import CRS

from canopy.grid import Grid
from canopy.model.blocks import BlockTable
from canopy.model.calibration import CalibrationTable
from canopy.model.tables import Calibrated, Member
from canopy.mosaicker.publish import ERROR_BANDS, HEIGHT_BANDS
from canopy.mosaicker.quantum import error_bands, quantise
from canopy.raster import write_raster
from canopy.region.folder import RegionFolder

CRS_M = CRS.from_epsg(32610)
GSD_M = 0.6
LEFT_M, TOP_M = 493_800.0, 4_878_000.0

BLOCKS = BlockTable(
    sides_m=(10.0, 30.0), lower_factor=(0.6, 0.3), upper_factor=(1.2, 0.9), blocks=(500, 200), sites=("A", "B")
)


def grid(shape: tuple[int, int], *, row: int = 0, col: int = 0, gsd_m: float = GSD_M) -> Grid:
    return Grid(crs=CRS_M, transform=Affine(gsd_m, 0, LEFT_M + col * gsd_m, 0, -gsd_m, TOP_M - row * gsd_m), shape=shape)


def some_heights(shape: tuple[int, int], *, seed: int = 0, unknown: float = 0.1) -> NDArray[np.float32]:
    """Heights on the quantum, low ones often, some unknown."""
    rng = np.random.default_rng(seed)
    height_m = quantise(np.where(rng.random(shape) < 0.4, rng.uniform(0, 2, shape), rng.uniform(2, 40, shape)))
    height_m[rng.random(shape) < unknown] = np.nan
    return height_m


def write_map(
    folder: Path,
    height_m: NDArray[np.float32],
    *,
    where: Grid | None = None,
    half_width_m: NDArray[np.float32] | float | None = 3.0,
    error_m: NDArray[np.float32] | None = None,
    blocks: BlockTable | None = BLOCKS,
    tags: dict[str, str] | None = None,
) -> RegionFolder:
    """A map with symmetric intervals, with those of `error_m` (band, row, col), or without any (`half_width_m` None)."""
    folder.mkdir(parents=True, exist_ok=True)
    where = grid(height_m.shape) if where is None else where
    if error_m is not None:
        error = error_m
    elif half_width_m is None:
        error = np.full((3, *height_m.shape), np.nan, np.float32)
    else:
        error = error_bands(np.maximum(height_m - half_width_m, 0), height_m + half_width_m)
    write_raster(
        folder / "height.tif", height_m[None], grid=where, nodata=np.nan, band_names=HEIGHT_BANDS, units=("m",), tags=tags
    )
    write_raster(folder / "error.tif", error, grid=where, nodata=np.nan, band_names=ERROR_BANDS, units=("m",) * 3, tags=tags)
    intervals = None
    if half_width_m is not None:
        pixels = CalibrationTable(edges_m=(0.0,), lower_factor=(1.0,), upper_factor=(1.0,), pixels=(9000,), sites=("A", "B"))
        member = Member(name="made", version="1", weights_sha256="0" * 64)
        calibrated = Calibrated(members=(member,), tta="none", tile_sets={}, pixels=pixels, blocks=blocks)
        intervals = calibrated.model_dump(mode="json")
    (folder / "run.json").write_text(json.dumps({"canopy": "0", "intervals": intervals}))
    return RegionFolder.open(folder)

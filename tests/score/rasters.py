"""Small rasters of heights for the tests of scores."""

import json
import math

import numpy as np
from affine import Affine
from pyproj import CRS

from canopy.grid import Grid
from canopy.raster import write_raster

UTM = CRS.from_epsg(32610)
LEFT_M, TOP_M = 500_040.0, 4_900_080.0
"""A corner of the lattices of 1 m to 10 m and of the squares of 120 m: (LEFT_M, TOP_M) is (4167, -40834) of them."""


def grid(shape, gsd_m=1.0, *, left=LEFT_M, top=TOP_M, crs=UTM):
    return Grid(crs=crs, transform=Affine(gsd_m, 0, left, 0, -gsd_m, top), shape=shape)


def write(path, heights_m, gsd_m=1.0, *, left=LEFT_M, top=TOP_M, crs=UTM, unit="m", tags=None, nodata=math.nan):
    """Heights (row, col) as a GeoTIFF."""
    heights = np.asarray(heights_m)
    heights = heights.astype(np.float32) if heights.dtype.kind == "f" else heights
    path.parent.mkdir(parents=True, exist_ok=True)
    write_raster(
        path, heights[None], grid=grid(heights.shape, gsd_m, left=left, top=top, crs=crs), nodata=nodata,
        units=(unit,) if unit else (), tags=tags,
    )  # fmt: skip
    return path


def write_map(
    folder, height_m, lower_m=None, upper_m=None, gsd_m=1.0, *, models=(), left=LEFT_M, top=TOP_M, run=True, intervals=None
):
    """The output folder of a map, with its record."""
    folder.mkdir(parents=True, exist_ok=True)
    write(folder / "height.tif", height_m, gsd_m, left=left, top=top)
    if lower_m is not None:
        half_m = (np.asarray(upper_m) - np.asarray(lower_m)) / 2
        bands = np.stack([half_m, lower_m, upper_m]).astype(np.float32)
        write_raster(
            folder / "error.tif", bands, grid=grid(bands.shape[1:], gsd_m, left=left, top=top), nodata=math.nan,
            band_names=("error_90_m", "lower_90_m", "upper_90_m"), units=("m",) * 3,
        )  # fmt: skip
    if run:
        record = {"models": list(models), "imagery": {"files": []}, "intervals": intervals}
        (folder / "run.json").write_text(json.dumps(record))
    return folder


def model(name="trained", sites=("here",), footprints=((-124.0, 44.0, -122.0, 45.0),), **more):
    """A model of a run's record."""
    training = {"sites": list(sites), "footprints_deg": [list(box) for box in footprints], "tile_sets": {}}
    return {"name": name, "version": "1", "weights_sha256": "0" * 64, "training": training} | more

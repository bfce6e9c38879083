"""Small sources of tile sets, drawn on the spot, and recipes for them."""

import numpy as np
from affine import Affine
from pyproj import CRS

from canopy.grid import Grid
from canopy.raster import write_raster

UTM = CRS.from_epsg(32617)
HEAD = """
name = "set"
gsd_m = 0.5
chip_px = 64
stride_px = 32
min_valid_fraction = {least}
{crs}
[split]
seed = 1
block_m = 100.0
buffer_m = 5.0
train = 0.6
val = 0.2
test = 0.2
"""
PAIR = """
[[source]]
kind = "pair"
site = "WOOD"
image = "data/*_rgb.tif"
height = "data/*_chm.tif"
licence = "CC0-1.0"
image_source = "drawn"
lidar_source = "drawn"
"""
LIDAR = """
[[source]]
kind = "lidar"
site = "WOOD"
image = "data/image.tif"
points = ["data/*.laz"]
licence = "CC0-1.0"
image_source = "simulated"
lidar_source = "simulated"
"""


def pair(folder, name, *, left, top, shape, seed=0, gsd_m=0.5, valid=None):
    """An image and heights of one place; heights are 10 m where the image is green, so that a shift between them shows."""
    rng = np.random.default_rng(seed)
    trees = rng.random(shape) < 0.3
    image = rng.integers(0, 120, (3, *shape), np.uint8)
    image[1, trees] = 200
    height_m = np.where(trees, np.float32(10), np.float32(0))
    height_m[0, 0] = np.nan
    grid = Grid(crs=UTM, transform=Affine(gsd_m, 0, left, 0, -gsd_m, top), shape=shape)
    (folder / "data").mkdir(exist_ok=True)
    write_raster(folder / "data" / f"{name}_rgb.tif", image, grid=grid, valid=valid)
    write_raster(folder / "data" / f"{name}_chm.tif", height_m[None], grid=grid, nodata=np.nan)
    return image, height_m


def recipe(folder, source=PAIR, least=0.1, crs="", **changes):
    """A recipe in `folder`; `changes` replace values of its head."""
    text = HEAD.format(least=least, crs=crs)
    for key, value in changes.items():
        text = text.replace(f"{key} = ", f"{key} = {value} #")
    path = folder / "set.toml"
    path.write_text(text + source)
    return path


def content(folder):
    """Every file below a folder with its bytes."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}

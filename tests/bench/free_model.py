"""A model folder that loads as a model which costs nothing: what is left of a map is everything that is not the model.

Run as a program it makes one map in a process of its own, so that its peak memory is its own; as `--preload` of a dask
worker it makes that worker's models free.
"""

import dataclasses
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
from pyproj import CRS

from canopy.grid import Box, Lattice
from canopy.model.network import HeightNetwork, NetworkConfig
from canopy.model.package import Contract, Training, load_model, save_model
from canopy.mosaicker import ensemble
from canopy.raster import create_raster
from canopy.simulate import simulate_scene
from tests.plain_models import BINS, Plain

ROOT = Path(__file__).parents[2]
LATTICE = Lattice(crs=CRS.from_epsg(32610), gsd_m=0.6)
MEAN, STD = 100.0, 60.0


def box_of(side_px):
    return Box(-8_130_304, 823_296, -8_130_304 + side_px, 823_296 + side_px)


def photo(path, side_px):
    """A simulated forest, repeated, each time cut elsewhere."""
    scene_px = 1024
    box = box_of(side_px)
    grid = LATTICE.grid(box)
    scene = simulate_scene(grid=grid.crop(0, 0, (scene_px, scene_px)), seed=5).image
    with create_raster(path, grid=grid, count=3, dtype="uint8") as writer:
        for row in range(0, side_px, scene_px):
            for col in range(0, side_px, scene_px):
                rows, cols = min(scene_px, side_px - row), min(scene_px, side_px - col)
                # No two places look the same, so what ends up in another's place is found.
                moved = np.roll(scene, (37 * (row // scene_px), 53 * (col // scene_px)), axis=(1, 2))
                writer.write(row, moved[:, :rows, :cols], col)
    return path


def height_of(image_brc):
    """What the free model says of an image (band, row, col) of bytes, metres."""
    return 15.0 + 5.0 * (image_brc[1].astype(np.float32) - MEAN) / STD


def save_free_model(folder):
    """A model folder like any other; only `make_free` makes it cost nothing."""
    config = NetworkConfig(
        backbone="vit_tiny_patch16_224", backbone_options={"depth": 4, "embed_dim": 32, "num_heads": 2},
        decoder_channels=8, head_channels=8, bins=BINS,
    )  # fmt: skip
    contract = Contract(
        name="free", version="0", description="computes nothing", licence="Apache-2.0", network=config,
        bands=("red", "green", "blue"), gsd_range_m=(0.25, 2.0), dtype="uint8", value_range=(0, 255),
        mean=(MEAN,) * 3, std=(STD,) * 3, window_px=448, stride_px=336,
        training=Training(sites=("nowhere",), tile_sets={}, recipe_sha256="0" * 64, footprints_deg=()),
    )  # fmt: skip
    fixture = np.random.default_rng(0).integers(0, 256, (3, 64, 64), dtype=np.uint8)
    return save_model(folder, network=HeightNetwork(config).eval(), contract=contract, card="# free", fixture_image=fixture)


def make_free():
    """From here on, every model that this process loads for a map costs nothing."""

    def free(*arguments, **options):
        return dataclasses.replace(load_model(*arguments, **options), network=Plain(lambda x: 15 + 5 * x[:, 1]).eval())

    ensemble.load_model = free


def dask_setup(worker):
    """What dask calls in the process of a worker with this module as its `--preload`."""
    del worker
    make_free()


def environment():
    """What a process of its own needs to find this canopy and no other."""
    return os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}


def run_map(folder, image, **options):
    """What a map in a process of its own says."""
    process = start_map(folder, image, **options)
    printed, errors = process.communicate()
    assert process.returncode == 0, errors
    return json.loads(printed.partition("RESULT")[2])


def start_map(folder, image, **options):
    """The process of a map with the free model; it prints RESULT and the figures in JSON."""
    folder.mkdir(exist_ok=True)
    photo(folder / "small.tif", 600)
    save_free_model(folder / "model")
    return subprocess.Popen(
        [sys.executable, "-m", "tests.bench.free_model", str(image), str(folder), json.dumps(options)],
        env=environment(), cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def peak_gb():
    """Of this process; not of getrusage, which begins with what the process was forked from."""
    return int(Path("/proc/self/status").read_text().partition("VmHWM:")[2].split()[0]) / 1e6


def main(image, folder, options):
    from canopy.region import map_region

    make_free()
    alone = {key: value for key, value in options.items() if key != "scheduler"}
    map_region(imagery=folder / "small.tif", model=folder / "model", out=folder / "small", **alone)
    before = peak_gb()
    start = time.perf_counter()
    result = map_region(imagery=image, model=folder / "model", out=folder / "out", **options)
    figures = {"wall_s": time.perf_counter() - start, "before_gb": before, "peak_gb": peak_gb()}
    print("RESULT" + json.dumps(figures | {"time": json.loads(result.run.read_text())["time"]}))  # noqa: T201


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), json.loads(sys.argv[3]))

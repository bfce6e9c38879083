"""Building tile sets from local files: time over that of writing the same files with rasterio alone, and memory.

    pytest -m bench tests/bench/bench_chips.py -s

Sources are uncompressed GeoTIFFs of a drawn forest, made on the spot, so that reading costs what the disk costs. The bare
writer gets the arrays from memory and writes them with the same creation options; what the build adds is reading, masks,
statistics, digests, records and the index.
"""

import json
import os
import subprocess
import sys
import time

import numpy as np
import pytest
import rasterio
from rasterio.windows import Window
from scipy.ndimage import gaussian_filter

CHIP_PX = 256
SMALL_CHIP_PX = 64
"""For the benchmark of memory, which depends on the number of chips and not on their size."""
BLOCK_PX = 1024
RECIPE = """
name = "set"
gsd_m = 0.5
chip_px = {chip_px}
stride_px = {chip_px}
min_valid_fraction = 0.5
[split]
seed = 1
block_m = 1000.0
buffer_m = 0.0
train = 0.8
val = 0.1
test = 0.1
[[source]]
kind = "pair"
site = "WOOD"
image = "image.tif"
height = "height.tif"
licence = "CC0-1.0"
image_source = "drawn"
lidar_source = "drawn"
"""
BUILD = """
import json, sys, time
from pathlib import Path
from canopy.tiler.chips import build_tile_set, read_index
if __name__ == "__main__":
    started, cpu_started = time.perf_counter(), time.process_time()
    out = build_tile_set(Path(sys.argv[1]), Path(sys.argv[2]), workers=int(sys.argv[3]), overwrite=True)
    took, cpu_s = time.perf_counter() - started, time.process_time() - cpu_started
    # Not getrusage: its maximum includes that of the process before exec, which is pytest.
    status = Path("/proc/self/status").read_text().split()
    peak_mb = int(status[status.index("VmHWM:") + 1]) / 1024
    print(json.dumps({"s": took, "cpu_s": cpu_s, "peak_mb": peak_mb, "chips": len(read_index(out))}))
"""


def drawn():
    """One block of image and heights that compresses as photographs and canopy do."""
    rng = np.random.default_rng(1)
    height_m = np.abs(gaussian_filter(rng.normal(size=(BLOCK_PX, BLOCK_PX)), 6) * 90).astype(np.float32)
    height_m += rng.normal(0, 0.2, height_m.shape).astype(np.float32)
    shades = 120 - 2 * height_m + rng.normal(0, 6, (3, *height_m.shape))
    return np.clip(shades, 1, 255).astype(np.uint8), np.maximum(height_m, 0)


def sources(folder, side_chips, chip_px=CHIP_PX):
    """Files of side_chips x side_chips windows."""
    folder.mkdir()
    image, height_m = drawn()
    side = side_chips * chip_px
    place = {
        "driver": "GTiff", "width": side, "height": side, "crs": "EPSG:32617", "tiled": True, "blockxsize": 512,
        "blockysize": 512, "BIGTIFF": "IF_SAFER", "transform": rasterio.Affine(0.5, 0, 400_000, 0, -0.5, 4_000_000),
    }  # fmt: skip
    with (
        rasterio.open(folder / "image.tif", "w", count=3, dtype="uint8", photometric="rgb", **place) as colours,
        rasterio.open(folder / "height.tif", "w", count=1, dtype="float32", nodata=np.nan, **place) as chm,
    ):
        for row in range(0, side, BLOCK_PX):
            for col in range(0, side, BLOCK_PX):
                rows, cols = min(BLOCK_PX, side - row), min(BLOCK_PX, side - col)
                part = Window(col, row, cols, rows)
                colours.write(np.roll(image, (row // 7, col // 5), (1, 2))[:, :rows, :cols], window=part)
                chm.write(np.roll(height_m, (row // 7, col // 5), (0, 1))[None, :rows, :cols], window=part)
    (folder / "set.toml").write_text(RECIPE.format(chip_px=chip_px))


def build(folder, workers=1):
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", BUILD, folder / "set.toml", folder / "set", str(workers)],
        env=environment, capture_output=True, text=True, check=True,
    )  # fmt: skip
    return json.loads(done.stdout)


def bare(folder, count):
    """Time to write as many chips from memory with the same options, and nothing else."""
    image, height_m = drawn()
    (folder / "bare").mkdir(exist_ok=True)
    profile = {
        "driver": "GTiff", "width": CHIP_PX, "height": CHIP_PX, "tiled": True, "blockxsize": CHIP_PX,
        "blockysize": CHIP_PX, "compress": "deflate", "crs": "EPSG:32617",
        "transform": rasterio.Affine(0.5, 0, 400_000, 0, -0.5, 4_000_000),
    }  # fmt: skip
    valid = np.ones((CHIP_PX, CHIP_PX), bool)
    started, cpu_started = time.perf_counter(), time.process_time()
    with rasterio.Env(GDAL_TIFF_INTERNAL_MASK="TRUE"):
        for number in range(count):
            row, col = 13 * number % (BLOCK_PX - CHIP_PX), 29 * number % (BLOCK_PX - CHIP_PX)
            window = slice(row, row + CHIP_PX), slice(col, col + CHIP_PX)
            path = folder / "bare" / f"{number}"
            with rasterio.open(
                f"{path}.image.tif", "w", count=3, dtype="uint8", photometric="rgb", predictor=2, **profile
            ) as file:
                file.write(image[:, *window])
                file.write_mask(valid)
            with rasterio.open(
                f"{path}.height.tif", "w", count=1, dtype="float32", nodata=np.nan, predictor=3, **profile
            ) as file:
                file.write(height_m[None, *window])
    return {"s": time.perf_counter() - started, "cpu_s": time.process_time() - cpu_started}


def told(line):
    print(f"\n{line}")  # noqa: T201 - a benchmark's result is what it prints


@pytest.mark.bench
def test_chips_a_second(tmp_path):
    """In turns, so that what else the machine does strikes both."""
    side = 16
    count = side**2
    sources(tmp_path / "small", side)
    build(tmp_path / "small")  # the sources are in the page cache from here on
    pairs = [(bare(tmp_path, count), build(tmp_path / "small")) for _ in range(3)]
    ratios = sorted(built["s"] / written["s"] for written, built in pairs)
    cpu_ratios = sorted(built["cpu_s"] / written["cpu_s"] for written, built in pairs)
    rate, bare_rate = (count / min(pair[i]["s"] for pair in pairs) for i in (1, 0))
    both = build(tmp_path / "small", workers=2)
    told(
        f"build {rate:.0f} chips/s, bare writing {bare_rate:.0f} chips/s; ratios of the time "
        f"{[round(r, 2) for r in ratios]}, of the CPU time {[round(r, 2) for r in cpu_ratios]}; "
        f"two worker processes, their start included: {count / both['s']:.0f} chips/s"
    )
    assert ratios[1] < 2


@pytest.mark.bench
def test_memory_of_ten_thousand_chips(tmp_path):
    """Peak resident memory of the build's process, with ten times the chips."""
    peaks = {}
    for side in (32, 100):
        folder = tmp_path / f"of{side}"
        sources(folder, side, SMALL_CHIP_PX)
        peaks[side] = build(folder)
        told(f"{peaks[side]['chips']} chips: {peaks[side]['peak_mb']:.0f} MB, {peaks[side]['s']:.0f} s")
    told(f"ratio of the peaks {peaks[100]['peak_mb'] / peaks[32]['peak_mb']:.3f}")
    assert peaks[100]["chips"] == 10_000
    assert peaks[100]["peak_mb"] < 1.3 * peaks[32]["peak_mb"]

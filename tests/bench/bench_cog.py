"""Writing the published COGs against GDAL's own COG driver on the same arrays, and what a whole map costs beside it.

With a model that computes next to nothing all that is left of `canopy map` is reading, blending, staging and writing. Each
map is made in a process of its own, so that its peak memory is its own.
"""

import math
import time

import numpy as np
import pytest
import rasterio
import rasterio.shutil

from canopy.mosaicker.publish import DEFLATE_LEVEL, HEIGHT_BANDS, stage_sheet, write_cog
from canopy.mosaicker.quantum import quantise
from tests.bench.free_model import LATTICE, box_of, photo, run_map

COG_TARGET = 1.1
MAP_TARGET = 1.25
MEMORY_TARGET_GB = 1.0
GROWTH_TARGET = 1.05


def gdal_cog(source, target):
    """What one would write without us: the same compression, GDAL's own averages and statistics."""
    start = time.perf_counter()
    with rasterio.Env(GDAL_NUM_THREADS="ALL_CPUS"):
        rasterio.shutil.copy(
            source, target, driver="COG", COMPRESS="DEFLATE", LEVEL=DEFLATE_LEVEL, PREDICTOR="FLOATING_POINT",
            BLOCKSIZE=512, BIGTIFF="IF_SAFER", OVERVIEW_RESAMPLING="AVERAGE", STATISTICS="YES",
        )  # fmt: skip
    return time.perf_counter() - start


def say(text):
    print(f"\n{text}")  # noqa: T201 - a benchmark's result is what it prints


@pytest.mark.bench
@pytest.mark.parametrize("side_px", [4096, 10_000])
def test_cog_over_gdal(tmp_path, side_px):
    """Both from the same staged file, turn by turn; the best of three each. Ours includes the check of the result."""
    box = box_of(side_px)
    rng = np.random.default_rng(1)
    crowns = np.kron(rng.gamma(2.0, 6.0, (side_px // 8, side_px // 8)), np.ones((8, 8), np.float32)).astype(np.float32)
    height = quantise((crowns + rng.normal(0, 0.5, box.shape).astype(np.float32)).clip(0))
    height[:500, :500] = math.nan
    with stage_sheet(tmp_path, LATTICE, box) as (sheet, writer):
        writer.write(box, height, np.zeros((3, *box.shape), np.float32))
    ours, gdal = [], []
    for _ in range(3):
        start = time.perf_counter()
        write_cog(tmp_path / "ours.tif", [(box, sheet.height)], lattice=LATTICE, box=box, band_names=HEIGHT_BANDS, tags={})
        ours.append(time.perf_counter() - start)
        gdal.append(gdal_cog(sheet.height, tmp_path / "gdal.tif"))
    size = (tmp_path / "ours.tif").stat().st_size / (tmp_path / "gdal.tif").stat().st_size
    ratio = min(ours) / min(gdal)
    say(
        f"our COG over GDAL's, {side_px} px: {ratio:.3f} (target <= {COG_TARGET}), {min(ours):.2f} s over "
        f"{min(gdal):.2f} s, size {size:.3f}"
    )
    assert ratio <= COG_TARGET


# --- a map with a model that computes nothing ----------------------------------------------------------------------------


@pytest.mark.bench
def test_map_over_gdal_alone(tmp_path):
    """12 288 px: a whole map over the time that GDAL takes to write its pixels as COGs. Turn by turn, the better of two."""
    image = photo(tmp_path / "image.tif", 12_288)
    turns = []
    for turn in range(2):
        result = run_map(tmp_path / f"turn{turn}", image)
        gdal_s = 0.0
        for kind in ("height", "error"):
            plain, written = tmp_path / "plain.tif", tmp_path / f"turn{turn}" / "out" / f"{kind}.tif"
            rasterio.shutil.copy(written, plain, driver="GTiff", TILED="YES", BLOCKXSIZE=512, BLOCKYSIZE=512, BIGTIFF="YES")
            gdal_s += gdal_cog(plain, tmp_path / "gdal.tif")
        turns.append((result, gdal_s))
    best = min(turns, key=lambda turn: turn[0]["wall_s"])[0]
    gdal_s = min(turn[1] for turn in turns)
    ratio, taken_gb = best["wall_s"] / gdal_s, best["peak_gb"] - best["before_gb"]
    say(
        f"a map of 12288 px with a model that costs nothing, over GDAL writing its COGs: {ratio:.3f} "
        f"(target <= {MAP_TARGET}), {best['wall_s']:.1f} s over {gdal_s:.1f} s; peak {best['peak_gb']:.2f} GB, "
        f"{taken_gb:.2f} GB of it more than a map of 600 px (target <= {MEMORY_TARGET_GB}); {best['time']}"
    )
    assert taken_gb <= MEMORY_TARGET_GB
    assert ratio <= MAP_TARGET


@pytest.mark.bench
@pytest.mark.parametrize("max_file_px", [1024, 32_768])
def test_memory_does_not_grow_with_the_region(tmp_path, max_file_px):
    """16 times the area in sheets of 2048 px, as files of their own and as one COG."""
    peaks = {}
    for side_px in (4096, 16_384):
        image = photo(tmp_path / f"{side_px}.tif", side_px)
        result = run_map(tmp_path / f"{side_px}", image, sheet_px=2048, max_file_px=max_file_px)
        peaks[side_px] = result["peak_gb"]
        say(f"{side_px} px in sheets, files of at most {max_file_px} px: {result}")
    growth = peaks[16_384] / peaks[4096]
    say(f"peak memory of 16 times the area, files of at most {max_file_px} px: {growth:.3f} (target < {GROWTH_TARGET})")
    assert growth < GROWTH_TARGET

"""`canopy map` against the bare model on the same windows in the same run."""

import json
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from pyproj import CRS

from canopy.grid import Box, Lattice, Layout, iter_windows
from canopy.model.distribution import Bins
from canopy.model.network import HeightNetwork, NetworkConfig
from canopy.model.package import Contract, Training, load_model, save_model
from canopy.raster import write_raster
from canopy.region import map_region

SAMPLE = Path(__file__).parents[2] / "models" / "canopy-sample"
TARGET = 1.15
SIDE_PX = 1000


@pytest.fixture
def folder(tmp_path):
    """The shipped model; before there is one, a hierarchical backbone of its size with random weights."""
    if (SAMPLE / "model.toml").exists():
        return SAMPLE
    config = NetworkConfig(backbone="pvt_v2_b0", decoder_channels=64, head_channels=32, bins=Bins(count=64))
    contract = Contract(
        name="random", version="0", description="random weights", licence="Apache-2.0", network=config,
        bands=("red", "green", "blue"), gsd_range_m=(0.25, 2.0), dtype="uint8", value_range=(0, 255),
        mean=(100.0, 100.0, 100.0), std=(60.0, 60.0, 60.0), window_px=256, stride_px=192,
        training=Training(sites=("nowhere",), tile_sets={}, recipe_sha256="0" * 64, footprints_deg=()),
    )  # fmt: skip
    image = np.random.default_rng(0).integers(0, 256, (3, 64, 64), dtype=np.uint8)
    return save_model(
        tmp_path / "model", network=HeightNetwork(config).eval(), contract=contract, card="# random\n", fixture_image=image
    )


@pytest.mark.bench
def test_map_over_the_bare_model(folder, tmp_path):
    """Half of the bare windows are timed before the map and half after, so that a drifting machine does not decide."""
    lattice = Lattice(crs=CRS.from_epsg(32610), gsd_m=0.6)
    box = Box(-8_130_000, 823_000, -8_130_000 + SIDE_PX, 823_000 + SIDE_PX)
    image = np.random.default_rng(1).integers(0, 256, (3, SIDE_PX, SIDE_PX), dtype=np.uint8)
    write_raster(tmp_path / "image.tif", image, grid=lattice.grid(box))
    model = load_model(folder)
    layout = Layout(window_px=model.contract.window_px, stride_px=model.contract.stride_px)
    windows = list(iter_windows(layout, box))
    window = torch.from_numpy(image[None, :, : layout.window_px, : layout.window_px].copy())

    def bare_s(count):
        start = time.perf_counter()
        for _ in range(count):
            heights = model.predict(window)
            assert heights.mean_m.shape == heights.spread_m.shape
        return time.perf_counter() - start

    bare_s(2)
    before = bare_s(len(windows) // 2)
    start = time.perf_counter()
    result = map_region(imagery=tmp_path / "image.tif", model=folder, out=tmp_path / "out")
    wall = time.perf_counter() - start
    bare = before + bare_s(len(windows) - len(windows) // 2)
    print(  # noqa: T201 - a benchmark's result is what it prints
        f"\ncanopy map over the bare model: {wall / bare:.3f} (target <= {TARGET}), {wall:.1f} s over {bare:.1f} s, "
        f"{len(windows)} windows of {layout.window_px} px, {model.contract.name}, {torch.get_num_threads()} threads; "
        f"{json.loads(result.run.read_text())['time']['stages_s']}"
    )
    assert wall / bare <= TARGET

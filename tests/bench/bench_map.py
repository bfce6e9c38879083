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
from canopy.simulate import simulate_scene

SAMPLE = Path(__file__).parents[2] / "models" / "canopy-sample"
TARGET = 1.15
"""For both; ViT-S + DPT, window 448, stride 336 is the model that the design's table of peers was measured with."""
TURNS = 3
SCENE_PX = 1000
SIDE_PX = 2 * SCENE_PX
"""1.44 km²: on much less, loading the model and warming up its kernels would be what is measured."""
LATTICE = Lattice(crs=CRS.from_epsg(32610), gsd_m=0.6)
BOX = Box(-8_130_000, 823_000, -8_130_000 + SIDE_PX, 823_000 + SIDE_PX)


@pytest.fixture(scope="module")
def photo(tmp_path_factory):
    path = tmp_path_factory.mktemp("photo") / "image.tif"
    grid = LATTICE.grid(BOX)
    scene = simulate_scene(grid=grid.crop(0, 0, (SCENE_PX, SCENE_PX)), seed=5).image
    write_raster(path, np.tile(scene, (1, 2, 2)), grid=grid)
    return path


def vit_small(folder):
    """ViT-S + DPT with random weights: what a window costs does not depend on them."""
    config = NetworkConfig(
        backbone="vit_small_patch16_224", decoder_channels=64, head_channels=32, bins=Bins(count=64, max_m=64.0)
    )
    contract = Contract(
        name="vit-s", version="0", description="random weights", licence="Apache-2.0", network=config,
        bands=("red", "green", "blue"), gsd_range_m=(0.25, 2.0), dtype="uint8", value_range=(0, 255),
        mean=(100.0, 100.0, 100.0), std=(60.0, 60.0, 60.0), window_px=448, stride_px=336,
        training=Training(sites=("nowhere",), tile_sets={}, recipe_sha256="0" * 64, footprints_deg=()),
    )  # fmt: skip
    image = np.random.default_rng(0).integers(0, 256, (3, 64, 64), dtype=np.uint8)
    return save_model(
        folder, network=HeightNetwork(config).eval(), contract=contract, card="# random\n", fixture_image=image
    )


def ratio_to_bare(folder, photo, out):
    """Bare model and map in turn, the fastest of each: on a shared machine the same call takes up to half as long again."""
    model = load_model(folder)
    layout = Layout(window_px=model.contract.window_px, stride_px=model.contract.stride_px)
    windows = list(iter_windows(layout, BOX))
    window = torch.randint(0, 256, (1, 3, layout.window_px, layout.window_px), dtype=torch.uint8)

    def bare_s(count):
        start = time.perf_counter()
        for _ in range(count):
            heights = model.predict(window)
            assert heights.mean_m.shape == heights.spread_m.shape
        return time.perf_counter() - start

    def map_s():
        start = time.perf_counter()
        result = map_region(imagery=photo, model=folder, out=out, overwrite=True)
        return time.perf_counter() - start, json.loads(result.run.read_text())["time"]["stages_s"]

    bare_s(2)
    turns = [(bare_s(len(windows)), *map_s()) for _ in range(TURNS)]
    bare = min(turn[0] for turn in turns)
    _, wall, stages = min(turns, key=lambda turn: turn[1])
    print(  # noqa: T201 - a benchmark's result is what it prints
        f"\ncanopy map over the bare model, {model.contract.name}: {wall / bare:.3f}, {wall:.1f} s over {bare:.1f} s, "
        f"{len(windows)} windows of {layout.window_px} px, {torch.get_num_threads()} threads; {stages}; "
        f"each turn: {[f'{w / b:.3f}' for b, w, _ in turns]}"
    )
    return wall / bare


@pytest.mark.bench
def test_map_over_the_bare_vit(photo, tmp_path):
    assert ratio_to_bare(vit_small(tmp_path / "model"), photo, tmp_path / "out") <= TARGET


@pytest.mark.bench
def test_map_over_the_bare_sample_model(photo, tmp_path):
    """So light that writing the COGs is a tenth of its time."""
    assert ratio_to_bare(SAMPLE, photo, tmp_path / "out") <= TARGET

"""Tile sets and recipes that train in seconds, and what tests want to know of a run."""

import csv
from pathlib import Path

import numpy as np
import tomli_w
import torch
from pyproj import CRS

from canopy.grid import Box, Lattice
from canopy.model.checkpoints import checkpoints, read_checkpoint
from canopy.raster import write_raster
from canopy.tiler.chips import build_tile_set

GSD_M = 0.5
SIDE_PX = 384
SITES = {"EAST": 500_000.0, "WEST": 400_000.0, "FAR": 300_000.0, "SCORED": 600_000.0}


def scene(seed: int, side: int, voids: float = 0.0) -> tuple[np.ndarray, np.ndarray]:
    """Image (band, row, col) uint8 and heights (row, col): the greener, the taller; a share of them unknown."""
    rng = np.random.default_rng(seed)
    coarse = rng.uniform(0, 1, (side // 16, side // 16))
    tall = np.kron(coarse, np.ones((16, 16)))
    image = np.stack([60 + 100 * (1 - tall), 60 + 150 * tall, 60 + 40 * tall]) + rng.normal(0, 3, (3, side, side))
    height = (20 * tall).astype(np.float32)
    height[np.kron(rng.uniform(0, 1, (side // 8, side // 8)) < voids, np.ones((8, 8), bool))] = np.nan
    return image.astype(np.uint8), height


def make_tile_sets(folder: Path, voids: float = 0.0) -> Path:
    """Two tile sets in `folder`: open (EAST, WEST, FAR), with a share of unknown heights, and closed (SCORED)."""
    lattice = Lattice(crs=CRS.from_epsg(32611), gsd_m=GSD_M)
    for seed, (site, x) in enumerate(SITES.items()):
        column, row = int(x / GSD_M), -int(4_000_000 / GSD_M)
        image, height = scene(seed, SIDE_PX, voids if site != "SCORED" else 0.0)
        grid = lattice.grid(Box(row, column, row + SIDE_PX, column + SIDE_PX))
        write_raster(folder / f"{site}_rgb.tif", image, grid=grid)
        write_raster(folder / f"{site}_chm.tif", height[None], grid=grid, nodata=float("nan"))
    for name, sites in (("open", ("EAST", "WEST", "FAR")), ("closed", ("SCORED",))):
        recipe = {
            "name": name, "gsd_m": GSD_M, "chip_px": 64, "stride_px": 64, "min_valid_fraction": 0.5,
            "split": {
                # A seed that gives EAST and WEST chips to train on and to hold out.
                "seed": 0, "block_m": 96.0, "buffer_m": 0.0, "train": 0.7, "val": 0.15, "test": 0.15,
            },
            "source": [
                {
                    "kind": "pair", "site": site, "image": f"{site}_rgb.tif", "height": f"{site}_chm.tif", "licence": "none",
                    "image_source": "made for this test", "lidar_source": "made for this test",
                }
                for site in sites
            ],
        }  # fmt: skip
        (folder / f"{name}.toml").write_text(tomli_w.dumps(recipe))
        build_tile_set(folder / f"{name}.toml")
    return folder


def recipe(tile_sets: Path, folder: Path, **changes) -> Path:
    table = {
        "seed": 3,
        "model": {
            "name": "tiny", "description": "A test.", "licence": "none", "gsd_range_m": [0.4, 0.6],
            "mean": [110.0, 135.0, 80.0], "std": [40.0, 50.0, 20.0], "window_px": 64, "stride_px": 48,
            "network": {
                "backbone": "pvt_v2_b0",
                "backbone_options": {
                    "depths": [1, 1, 1, 1], "embed_dims": [8, 16, 16, 16], "num_heads": [1, 1, 2, 2], "drop_path_rate": 0.2,
                },
                "decoder_channels": 8, "head_channels": 8, "bins": {"count": 16, "max_m": 24.0, "spacing": "linear"},
            },
        },
        "data": {
            "hold_out_sites": ["FAR"],
            "hold_out_use": ["calibrate", "score"],
            "set": [
                {"path": str(tile_sets / "open"), "batch": 2, "crop_px": 32, "calibrate": ["val", "test"]},
                {
                    "path": str(tile_sets / "closed"), "train": [], "calibrate": [], "score": ["train", "val", "test"],
                    "ships": False,
                },
            ],
        },
        "optim": {
            "steps": 6, "accumulate": 2, "lr": 3e-3, "ema_decay": 0.9, "checkpoint_every": 3, "log_every": 1, "threads": 1,
            "accelerator": "cpu", "devices": 1,
        },
        "calibrate": {"least_px": 200},
        "evaluate": {"forest_px_per_chip": 100, "forest_trees": 5},
    }  # fmt: skip
    for key, value in changes.items():
        where = table
        *path, last = key.split("__")
        for part in path:
            where = where[part]
        where[last] = value
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "recipe.toml"
    path.write_text(tomli_w.dumps(table))
    return path


def weights(run: Path) -> dict[str, torch.Tensor]:
    """Weights, their average and what the optimiser keeps, after the last step."""
    last = read_checkpoint(checkpoints(run)[0])
    state = last["state_dict"] | {f"average.{key}": value for key, value in last["average"]["values"].items()}
    for number, kept in last["optimizer_states"][0]["state"].items():
        state |= {f"optimiser.{number}.{key}": value for key, value in kept.items()}
    return state


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


def curve(run: Path, first: int = 0) -> np.ndarray:
    """Loss of every batch that was logged by the process that started at step `first`."""
    with (run / "csv" / f"from-{first:07d}" / "metrics.csv").open() as file:
        return np.array([float(row["train/loss"]) for row in csv.DictReader(file)])

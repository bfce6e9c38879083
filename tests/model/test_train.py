"""Training on scenes whose heights follow from their colours: it learns, resumes to the same bits, and reports honestly."""

import csv
import tomllib
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import tomli_w
import torch
from lightning.pytorch.callbacks import Callback
from pyproj import CRS

from canopy.errors import OutputError, RecipeError
from canopy.grid import Box, Lattice
from canopy.model.package import load_model, read_contract
from canopy.model.recipe import Optim, read_recipe
from canopy.model.checkpoints import checkpoints, read_checkpoint
from canopy.model.train import MovingAverage, learning_rate_factor, train
from canopy.raster import write_raster
from canopy.tiler.chips import build_tile_set

GSD_M = 0.5
SIDE_PX = 384
SITES = {"EAST": 500_000.0, "WEST": 400_000.0, "FAR": 300_000.0, "SCORED": 600_000.0}


def scene(seed: int, side: int) -> tuple[np.ndarray, np.ndarray]:
    """Image (band, row, col) uint8 and heights (row, col): the greener, the taller."""
    rng = np.random.default_rng(seed)
    coarse = rng.uniform(0, 1, (side // 16, side // 16))
    tall = np.kron(coarse, np.ones((16, 16)))
    image = np.stack([60 + 100 * (1 - tall), 60 + 150 * tall, 60 + 40 * tall]) + rng.normal(0, 3, (3, side, side))
    return image.astype(np.uint8), (20 * tall).astype(np.float32)


@pytest.fixture(scope="module")
def tile_sets(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("tiles")
    lattice = Lattice(crs=CRS.from_epsg(32611), gsd_m=GSD_M)
    for seed, (site, x) in enumerate(SITES.items()):
        column, row = int(x / GSD_M), -int(4_000_000 / GSD_M)
        image, height = scene(seed, SIDE_PX)
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


class StopAt(Callback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_end(self, trainer, *_) -> None:
        trainer.should_stop = trainer.global_step >= self.step


def weights(run: Path) -> dict[str, torch.Tensor]:
    """Weights, their average and what the optimiser keeps, after the last step."""
    last = read_checkpoint(checkpoints(run)[0])
    state = last["state_dict"] | {f"average.{key}": value for key, value in last["average"]["values"].items()}
    for number, kept in last["optimizer_states"][0]["state"].items():
        state |= {f"optimiser.{number}.{key}": value for key, value in kept.items()}
    return state


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


@pytest.fixture(scope="module")
def whole(tile_sets, tmp_path_factory) -> Path:
    """A model trained without a stop; its run is beside it."""
    folder = tmp_path_factory.mktemp("whole")
    return train(recipe(tile_sets, folder), out=folder / "model")


def test_the_model_folder_loads_and_says_what_was_measured(whole):
    contract = load_model(whole).contract
    assert contract.training.sites == ("EAST", "WEST")
    assert contract.training.tile_sets.keys() == {"open"}
    assert contract.calibration is not None
    assert "FAR" in contract.calibration.sites
    assert "SCORED" not in contract.calibration.sites
    how = {m.how: m.sites for m in contract.calibration.measured}
    assert how["other held-out chips"] == ("SCORED",)
    assert set(how["sites left out in turn"]) == {"EAST", "FAR", "WEST"} & set(contract.calibration.sites)
    sites = contract.metrics["sites"]
    assert {"FAR", "SCORED"} <= sites.keys()
    for site in sites.values():
        assert site.keys() == {"model", "training_mean", "random_forest"}
        assert site["model"]["n"] == site["random_forest"]["n"] == site["training_mean"]["n"] > 0
    # Colour is height here, so the forest, which sees it, must beat the constant.
    assert sites["FAR"]["random_forest"]["mae_m"] < 0.5 * sites["FAR"]["training_mean"]["mae_m"]
    card = (whole / "card.md").read_text()
    assert f"| **model** | {sites['FAR']['model']['mae_m']:.2f} (" in card
    assert "**FAR**, never-used site: " in card
    resolved = tomllib.loads((whole / "recipe.toml").read_text())
    assert resolved["optim"]["betas"] == [0.9, 0.99]


def test_logs_hold_every_step(whole):
    run = whole.parent / "runs" / "model"
    with (run / "csv" / "from-0000000" / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [int(row["step"]) for row in rows] == list(range(6))
    assert all(float(row["train/loss"]) > 0 for row in rows)
    assert list((run / "tensorboard" / "from-0000000").glob("events.*"))


def test_a_stopped_and_resumed_run_ends_with_the_same_bits(whole, tile_sets, tmp_path):
    path = recipe(tile_sets, tmp_path)
    with pytest.raises(OutputError, match="step 3 of 6; go on with --resume"):
        train(path, out=tmp_path / "model", callbacks=[StopAt(3)])
    run = tmp_path / "runs" / "model"
    assert not (tmp_path / "model").exists()
    resumed = train(path, out=tmp_path / "model", resume=run)
    assert same(weights(run), weights(whole.parent / "runs" / "model"))
    for name in ("weights.safetensors", "model.toml", "card.md"):
        assert (resumed / name).read_bytes() == (whole / name).read_bytes()


def test_another_seed_ends_elsewhere(whole, tile_sets, tmp_path):
    """The negative control: the comparison above can tell two runs apart."""
    path = recipe(tile_sets, tmp_path, seed=4)
    train(path, out=tmp_path / "model")
    assert not same(weights(tmp_path / "runs" / "model"), weights(whole.parent / "runs" / "model"))


def test_a_run_of_another_recipe_is_not_resumed(whole, tile_sets, tmp_path):
    other = recipe(tile_sets, tmp_path, optim__lr=1e-4)
    with pytest.raises(RecipeError, match="of another recipe"):
        train(other, out=tmp_path / "model", resume=whole.parent / "runs" / "model")


def test_neither_a_model_nor_a_run_is_overwritten(whole, tile_sets, tmp_path):
    path = recipe(tile_sets, tmp_path)
    with pytest.raises(OutputError, match="--overwrite"):
        train(path, out=whole)
    (tmp_path / "runs" / "model").mkdir(parents=True)
    with pytest.raises(OutputError, match="--resume"):
        train(path, out=tmp_path / "model")


def test_training_reduces_the_loss_and_beats_the_mean(tile_sets, tmp_path):
    path = recipe(tile_sets, tmp_path, optim__steps=60, optim__lr=1e-2, optim__checkpoint_every=100)
    out = train(path, out=tmp_path / "model")
    with (tmp_path / "runs" / "model" / "csv" / "from-0000000" / "metrics.csv").open() as file:
        loss = [float(row["train/histogram"]) for row in csv.DictReader(file)]
    assert np.mean(loss[-10:]) < 0.8 * np.mean(loss[:5])
    far = read_contract(out).metrics["sites"]["FAR"]
    assert far["model"]["mae_m"] < 0.8 * far["training_mean"]["mae_m"]


def test_a_site_held_out_by_argument_is_not_trained_on(tile_sets, tmp_path):
    path = recipe(tile_sets, tmp_path, optim__steps=1)
    out = train(path, out=tmp_path / "model", hold_out=["WEST"])
    contract = read_contract(out)
    assert contract.name == "tiny-without-WEST"
    assert contract.training.sites == ("EAST",)
    assert "WEST" in contract.metrics["sites"]
    with pytest.raises(RecipeError, match="'NORTH' is to be held out but is in no tile set"):
        train(path, out=tmp_path / "other", hold_out=["NORTH"])


# --- pure parts ----------------------------------------------------------------------------------------------------------


def test_learning_rate_warms_up_and_falls_to_its_end():
    settings = Optim(steps=1000, warm_up=0.1, final_lr_factor=0.01)
    factors = [learning_rate_factor(step, settings) for step in range(1001)]
    assert factors[0] == pytest.approx(0.01)
    assert factors[99] == pytest.approx(1.0)
    assert all(a >= b for a, b in pairwise(factors[100:]))
    assert factors[1000] == pytest.approx(0.01)


def test_moving_average_starts_fast_and_then_keeps_its_decay():
    network = torch.nn.BatchNorm1d(1)
    average = MovingAverage(network, 0.999)
    with torch.no_grad():
        for value in (5.0, 1.0):
            network.weight.fill_(value)
            network.running_mean.fill_(value)
            average.update()
    assert set(average.values) == {"weight", "bias", "running_mean", "running_var"}  # not the count of batches
    # The first update copies 5; the second takes in 1 - 2/11 of the step to 1.
    assert average.values["weight"].item() == pytest.approx(5 - 4 * (1 - 2 / 11))
    assert average.values["running_mean"].item() == pytest.approx(5 - 4 * (1 - 2 / 11))
    average = MovingAverage(network, 0.9)
    average.updates = 10_000
    with torch.no_grad():
        network.weight.fill_(2.0)
    average.update()
    assert average.values["weight"].item() == pytest.approx(1.1)


def test_moving_average_is_of_what_learns():
    network = torch.nn.Linear(2, 2)
    network.bias.requires_grad_(False)
    assert set(MovingAverage(network, 0.9).values) == {"weight"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"optim__leraning_rate": 1.0}, "unknown key 'optim.leraning_rate'"),
        ({"optim__steps": 0}, "optim.steps"),
        ({"data__set": [{"path": "x", "train": ["val"]}]}, "both trains and is held out"),
        ({"data__set": [{"path": "x", "ships": False}]}, "can only be scored"),
        ({"data__set": [{"path": "x", "train": []}]}, "no set has a split to train on"),
    ],
)
def test_wrong_recipes_are_refused_in_one_line(tmp_path, change, message):
    with pytest.raises(RecipeError, match=message) as caught:
        read_recipe(recipe(tmp_path, tmp_path, **change))
    assert "\n" not in str(caught.value)


def test_the_sample_recipe_is_valid():
    path = Path(__file__).parents[2] / "models" / "recipes" / "sample.toml"
    settings = read_recipe(path)
    assert settings.data.hold_out_sites == ("NEON_TEAK",)
    assert read_recipe(path, hold_out=["AUTZEN"]).model.name == "canopy-sample-without-AUTZEN"

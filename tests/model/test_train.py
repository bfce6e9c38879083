"""Training on scenes whose heights follow from their colours: it learns, resumes to the same bits, and reports honestly."""

import csv
import shutil
import tomllib
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import Callback

from canopy.errors import OutputError, RecipeError
from canopy.model import train as training
from canopy.model.package import load_model, read_contract
from canopy.model.recipe import Optim, read_recipe
from canopy.model.train import MovingAverage, learning_rate_factor, train
from tests.model.training import make_tile_sets, recipe, same, weights


@pytest.fixture(scope="module")
def tile_sets(tmp_path_factory) -> Path:
    return make_tile_sets(tmp_path_factory.mktemp("tiles"))


class StopAt(Callback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_end(self, trainer, *_) -> None:
        trainer.should_stop = trainer.global_step >= self.step


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


@pytest.mark.slow
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


@pytest.mark.slow
def test_training_reduces_the_loss_and_beats_the_mean(tile_sets, tmp_path):
    path = recipe(tile_sets, tmp_path, optim__steps=60, optim__lr=1e-2, optim__checkpoint_every=100)
    out = train(path, out=tmp_path / "model")
    with (tmp_path / "runs" / "model" / "csv" / "from-0000000" / "metrics.csv").open() as file:
        loss = [float(row["train/histogram"]) for row in csv.DictReader(file)]
    assert np.mean(loss[-10:]) < 0.8 * np.mean(loss[:5])
    far = read_contract(out).metrics["sites"]["FAR"]
    assert far["model"]["mae_m"] < 0.8 * far["training_mean"]["mae_m"]


@pytest.mark.slow
def test_a_site_held_out_by_argument_is_not_trained_on(tile_sets, tmp_path):
    path = recipe(tile_sets, tmp_path, optim__steps=1)
    out = train(path, out=tmp_path / "model", hold_out=["WEST"])
    contract = read_contract(out)
    assert contract.name == "tiny-without-WEST"
    assert contract.training.sites == ("EAST",)
    assert "WEST" in contract.metrics["sites"]
    with pytest.raises(RecipeError, match="'NORTH' is to be held out but is in no tile set"):
        train(path, out=tmp_path / "other", hold_out=["NORTH"])


class Blind(Callback):
    """Hides all labels of the first so many steps."""

    def __init__(self, steps: int) -> None:
        self.steps = steps

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx) -> None:
        if trainer.global_step < self.steps:
            batch["valid"].zero_()


def test_steps_without_a_valid_pixel_are_counted_and_then_given_up(tile_sets, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(training, "finish", lambda *_, out, **__: out)
    monkeypatch.setattr(training, "EMPTY_STEPS", 3)
    train(recipe(tile_sets, tmp_path), out=tmp_path / "model", callbacks=[Blind(2)])
    with (tmp_path / "runs" / "model" / "csv" / "from-0000000" / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [float(row["train/empty_steps"]) for row in rows] == [1, 2, 2, 2, 2, 2]
    assert float(rows[0]["train/loss"]) == 0.0
    assert "step 2 has no valid pixel, the 2. one without" in capsys.readouterr().err
    with pytest.raises(RecipeError, match=r"3 steps in a row, up to 3, had no valid pixel"):
        train(recipe(tile_sets, tmp_path), out=tmp_path / "blind", callbacks=[Blind(9)])


def test_a_model_that_is_there_already_is_left_alone(whole, tile_sets, tmp_path, capsys):
    path = recipe(tile_sets, tmp_path)
    before = (whole / "model.toml").stat().st_mtime_ns
    assert train(path, out=whole, resume_if_any=True) == whole
    assert "is there already, from this recipe" in capsys.readouterr().err
    assert (whole / "model.toml").stat().st_mtime_ns == before
    with pytest.raises(OutputError, match="--overwrite"):  # another recipe's model is not taken for this one's
        train(recipe(tile_sets, tmp_path, seed=9), out=whole, resume_if_any=True)
    with pytest.raises(RecipeError, match="give one of them"):
        train(path, out=tmp_path / "model", resume=tmp_path, resume_if_any=True)


@pytest.mark.slow
def test_a_compiled_network_is_the_same_network(tile_sets, tmp_path, monkeypatch):
    if shutil.which("g++") is None:
        pytest.skip("no C++ compiler: torch cannot compile for the CPU here")
    monkeypatch.setattr(training, "finish", lambda *_, out, **__: out)
    options = {"depths": [1, 1, 1, 1], "embed_dims": [8, 16, 16, 16], "num_heads": [1, 1, 2, 2]}  # without drop path
    for name, compiled in (("plain", False), ("compiled", True)):
        path = recipe(
            tile_sets, tmp_path / name, model__network__backbone_options=options, optim__steps=2, optim__compile=compiled
        )
        train(path, out=tmp_path / name / "model")
    one, other = (weights(tmp_path / name / "runs" / "model") for name in ("plain", "compiled"))
    assert one.keys() == other.keys()
    assert all(torch.allclose(one[key], other[key], rtol=1e-3, atol=1e-4) for key in one if "optimiser" not in key)


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
    assert settings.evaluate.folds == ("NEON_OSBS", "NEON_MLBS", "NEON_TEAK", "AUTZEN")
    assert read_recipe(path, hold_out=["AUTZEN"]).model.name == "canopy-sample-without-AUTZEN"

"""Recipes: what they refuse, what makes two of them one run, and that each that ships trains."""

import tomllib
from pathlib import Path

import pytest
import tomli_w
import torch

from canopy.errors import ContractError, RecipeError
from canopy.model import train as training
from canopy.model.checkpoints import checkpoints
from canopy.model.recipe import read_recipe
from tests.model.training import make_tile_sets, recipe

RECIPES = sorted((Path(__file__).parents[2] / "models" / "recipes").glob("*.toml"))

TINY = {
    "pvt": {"depths": [1, 1, 1, 1], "embed_dims": [8, 16, 16, 16], "num_heads": [1, 1, 2, 2]},
    "resnet": {"layers": [1, 1, 1, 1], "channels": [8, 16, 16, 16], "stem_width": 8},
    "vit": {"depth": 4, "embed_dim": 32, "num_heads": 2},
}
"""Options that make a backbone of the family small."""


@pytest.fixture(scope="module")
def tile_sets(tmp_path_factory) -> Path:
    return make_tile_sets(tmp_path_factory.mktemp("tiles"))


def made_small(path: Path, tile_sets: Path, folder: Path, start: Path | None) -> Path:
    """The recipe with a network, data and steps of a test, and everything else as it is."""
    table = tomllib.loads(path.read_text(encoding="utf-8"))
    model, optim = table["model"], table["optim"]
    model |= {"window_px": 64, "stride_px": 48, "pretrained": False}
    if "network" in model:
        network = model["network"]
        model.pop("start_from", None)
        table.get("tuning", {}).pop("frozen_batch_norm", None)  # which needs a start
        small = next((options for family, options in TINY.items() if network["backbone"].startswith(family)), None)
        if small is None:
            pytest.skip(f"no small {network['backbone']} is known here; add one to TINY")
        network |= {"backbone_options": small, "decoder_channels": 8, "head_channels": 8}
        if "taps" in network:
            network["taps"] = [0, 1, 2, 3]
        if "reassemble_channels" in network:
            network["reassemble_channels"] = [8, 8, 8, 8]
    else:
        model["start_from"] = str(start)
    for each in table["data"]["set"]:
        each |= {"path": str(tile_sets / "open"), "batch": 2, "crop_px": 32}
        each.pop("exclude_sites", None)
    table["data"] |= {"workers": 0, "hold_out_sites": ["FAR"]}
    table.get("evaluate", {}).pop("folds", None)
    optim |= {"steps": 2, "checkpoint_every": 1, "compile": False, "accelerator": "cpu", "devices": 1, "threads": 1}
    optim |= {"precision": "32-true"}
    small_path = folder / path.name
    small_path.write_text(tomli_w.dumps(table))
    return small_path


@pytest.mark.parametrize("path", RECIPES, ids=[path.stem for path in RECIPES])
def test_every_recipe_that_ships_trains(path, tile_sets, tmp_path, monkeypatch, request):
    start = None
    if "network" not in tomllib.loads(path.read_text(encoding="utf-8"))["model"]:
        from canopy.model.foreign import import_model

        samples = request.getfixturevalue("samples")
        start = import_model("chmv2", samples / "reference" / "conformance" / "chmv2_meta", tmp_path / "chmv2")
    monkeypatch.setattr(training, "finish", lambda *_, out, **__: out)
    small = made_small(path, tile_sets, tmp_path, start)
    training.train(small, out=tmp_path / "model")
    last, before = checkpoints(tmp_path / "runs" / "model")
    settings = read_recipe(small)
    after, earlier = (training.trained_network(settings, each).state_dict() for each in (last, before))
    assert all(value.isfinite().all() for value in after.values() if value.is_floating_point())
    assert any(not torch.equal(after[name], earlier[name]) for name in after)
    backbone = [name for name in after if name.startswith("backbone.")]
    learns = any(not torch.equal(after[name], earlier[name]) for name in backbone)
    assert learns == (settings.tuning.backbone != "frozen")


def test_machine_and_speed_do_not_make_another_run(tmp_path):
    def digest(**changes) -> str:
        return read_recipe(recipe(tmp_path, tmp_path, **changes)).run_sha256()

    first = digest()
    assert first == digest(optim__threads=4, optim__checkpoint_every=7, optim__strategy="ddp", optim__devices=3)
    assert first == digest(tuning={"checkpointing": True}, data__workers=2, data__cache_mb=512, evaluate__forest_trees=9)
    for change in ({"optim__lr": 1e-4}, {"optim__steps": 7}, {"tuning": {"layer_decay": 0.9}}, {"seed": 4}):
        assert first != digest(**change)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"optim__strategy": "dpp"}, "optim.strategy"),
        ({"optim__strategy": "fsdp", "optim__precision": "16-mixed"}, "does not go with precision 16-mixed"),
        ({"optim__backbone_lr_factor": 0.1}, "unknown key 'optim.backbone_lr_factor'"),
        ({"model__pretrained": True, "model__start_from": "x"}, "both fill the backbone"),
        ({"tuning": {"frozen_batch_norm": True}}, "keeps the statistics of a start, and there is none"),
        ({"loss": {"histogram": 0.0, "silog": 0.0}}, "no term has any weight at 0 % of the steps"),
    ],
)
def test_recipes_that_cannot_be_are_refused_in_one_line(tmp_path, change, message):
    with pytest.raises(RecipeError, match=message) as caught:
        read_recipe(recipe(tmp_path, tmp_path, **change))
    assert "\n" not in str(caught.value)


def test_a_network_comes_from_the_model_to_start_from(tiny_model, tmp_path):
    path = recipe(tmp_path, tmp_path)
    table = tomllib.loads(path.read_text())
    del table["model"]["network"]
    path.write_text(tomli_w.dumps(table))
    with pytest.raises(RecipeError, match=r"neither a \[model.network\] nor a model to start_from"):
        read_recipe(path)
    table["model"] |= {"start_from": str(tiny_model), "bands": ["red", "green", "blue", "nir"]}
    path.write_text(tomli_w.dumps(table))
    network = read_recipe(path).model.architecture()
    assert (network.backbone, network.in_channels) == ("vit_tiny_patch16_224", 4)
    table["model"]["start_from"] = "nowhere"
    path.write_text(tomli_w.dumps(table))
    with pytest.raises(ContractError, match="nowhere does not exist"):
        read_recipe(path)

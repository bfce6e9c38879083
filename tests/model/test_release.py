"""A recipe with folds: each site judged by a run that has not seen it, and the model calibrated on those predictions."""

from pathlib import Path

import pytest

from canopy.errors import RecipeError
from canopy.metrics import HeightSums
from canopy.model.card import card_of
from canopy.model.held_out import read_held_out
from canopy.model.package import CARD, read_contract
from canopy.model.recipe import read_recipe
from canopy.model.release import check_start
from canopy.model.scores import read_metrics
from canopy.model.train import train
from canopy.tiler.recipe import load_recipe
from tests.model.training import make_tile_sets, recipe

QUICK = {"optim__steps": 1, "optim__accumulate": 1, "evaluate__folds": ["EAST"]}


@pytest.fixture(scope="module")
def tile_sets(tmp_path_factory):
    return make_tile_sets(tmp_path_factory.mktemp("tiles"))


@pytest.fixture(scope="module")
def released(tile_sets, tmp_path_factory):
    """The runs as a user may come upon them: the model first, its fold when that is asked for, then the model again."""
    folder = tmp_path_factory.mktemp("folds")
    path = recipe(tile_sets, folder / "recipes", **QUICK)
    with pytest.raises(RecipeError, match=r"--hold-out EAST, and then write the model with: .* --resume") as caught:
        train(path)
    assert "\n" not in str(caught.value)
    assert not (folder / "tiny").exists()
    train(path, hold_out=["EAST"])
    return train(path, resume=folder / "runs" / "tiny")


@pytest.mark.slow
def test_a_site_with_a_fold_is_judged_by_the_fold(released):
    metrics = read_metrics(released)
    assert [(s.site, s.how) for s in metrics.scores] == [
        ("EAST", "unseen site"),
        ("FAR", "never-used site"),
        ("SCORED", "never-used site"),
        ("EAST", "held-out blocks"),
        ("WEST", "held-out blocks"),
    ]
    fold = read_held_out(released.parent / "runs" / "tiny-without-EAST" / "held_out.npz")
    own = read_held_out(released.parent / "runs" / "tiny" / "held_out.npz")
    assert fold.about.trained_sites == ("WEST",)
    assert own.about.trained_sites == ("EAST", "WEST")
    assert own.about.weights_sha256 != fold.about.weights_sha256
    chips = [chip for chip in fold if chip.site == "EAST"]
    assert metrics.scores[0].chips == len(chips) == 36  # the whole site, whatever split its chips are in
    by_fold = sum((HeightSums.of(c.mean_m, c.true_m, c.counts) for c in chips), HeightSums())
    assert metrics.scores[0].model.mae_m == pytest.approx(by_fold.mae_m)
    # The forest and the mean are those of the fold too: the model's own saw the site.
    assert metrics.training_mean_m != fold.about.training_mean_m
    means = sum((HeightSums.of(0 * c.true_m + fold.about.training_mean_m, c.true_m, c.counts) for c in chips), HeightSums())
    assert metrics.scores[0].training_mean.mae_m == pytest.approx(means.mae_m, rel=1e-5)


@pytest.mark.slow
def test_only_sites_new_to_a_model_calibrate(released):
    table = read_contract(released).calibration
    assert table.sites == ("EAST", "FAR")
    assert {m.how: m.sites for m in table.measured} == {
        "sites left out in turn": ("EAST", "FAR"),
        # EAST's own held-out blocks are no part of the fit, but calling them another site would be too kind.
        "other held-out chips": ("SCORED", "WEST"),
    }


@pytest.mark.slow
def test_the_card_is_made_from_the_files(released):
    assert (released / CARD).read_text() == card_of(released)


@pytest.mark.slow
def test_a_start_that_has_seen_the_site_is_refused_before_the_first_step(released, tile_sets, tmp_path):
    path = recipe(tile_sets, tmp_path / "recipes", **QUICK, model__start_from=str(released))
    check_start(read_recipe(path), path.parent)
    with pytest.raises(RecipeError, match="was trained on EAST, which is to be held out"):
        train(path, hold_out=["EAST"])
    assert not (tmp_path / "tiny-without-EAST").exists()


def test_folds_and_held_out_sites_exclude_each_other(tile_sets, tmp_path):
    with pytest.raises(RecipeError, match=r"evaluate\.folds has FAR"):
        read_recipe(recipe(tile_sets, tmp_path, evaluate__folds=["FAR"]))


def test_the_tile_set_for_scores_only_has_no_split_to_train_on():
    split = load_recipe(Path(__file__).parents[2] / "tiles" / "nz.toml").split
    assert (split.train, split.val, split.test) == (0, 0, 1)

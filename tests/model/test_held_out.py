"""Predictions kept in a run folder: they come back, and those of another training are not taken for a fold."""

import dataclasses
import zipfile

import numpy as np
import pytest
import torch

from canopy.errors import OutputError, RecipeError
from canopy.model.held_out import (
    About,
    fold_run,
    read_folds,
    read_held_out,
    training_sha256,
    weights_sha256,
    write_held_out,
)
from canopy.model.recipe import read_recipe, without
from tests.model.test_scores import chip
from tests.model.training import recipe

SITE = "EAST"


@pytest.fixture
def base(tmp_path):
    """A recipe with a fold, and what its own run says of itself."""
    settings = read_recipe(recipe(tmp_path / "tiles", tmp_path, evaluate__folds=[SITE]))
    return settings, about(settings)


def about(settings, **changes) -> About:
    return About.model_validate(
        {
            "name": settings.model.name, "training_sha256": training_sha256(settings), "weights_sha256": "0" * 64,
            "tile_sets": {"open": "1" * 64}, "trained_sites": ("WEST",), "training_mean_m": 8.0, "forest_px": 10,
        }
        | changes
    )  # fmt: skip


def test_chips_come_back_to_the_bit_as_often_as_they_are_asked_for(tmp_path, base):
    chips = [chip(SITE), chip("WEST", row=100, shape=(1, 3))]
    write_held_out(tmp_path / "run", base[1], iter(chips))
    found = read_held_out(tmp_path / "run" / "held_out.npz")
    assert found.about.weights_sha256 == "0" * 64
    for _ in range(2):
        for read, written in zip(found, chips, strict=True):
            for field in dataclasses.fields(written):
                np.testing.assert_array_equal(getattr(read, field.name), getattr(written, field.name))
    (own,) = dataclasses.replace(found, site="WEST")
    assert own.site == "WEST"
    with np.load(found.path) as arrays:  # it is what its name says
        np.testing.assert_array_equal(arrays["000001/true_m"], chips[1].true_m)


def test_a_file_takes_its_name_when_it_is_whole(tmp_path, base):
    def broken():
        yield chip()
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_held_out(tmp_path, base[1], broken())
    assert not list(tmp_path.glob("*held_out*"))
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="cannot write"):
        write_held_out(tmp_path / "file", base[1], [])


@pytest.mark.parametrize("damage", ["half", "text", "other"])
def test_what_is_no_such_file_is_refused_in_one_line(tmp_path, base, damage):
    path = write_held_out(tmp_path, base[1], [chip()]).path
    if damage == "half":
        path.write_bytes(path.read_bytes()[:1000])
    elif damage == "text":
        path.write_text("no zip")
    else:
        with zipfile.ZipFile(path, "w") as file:
            file.writestr("about.json", "{}")
    with pytest.raises(RecipeError, match="is no file of held-out predictions of this version") as caught:
        read_held_out(path)
    assert "\n" not in str(caught.value)


# --- folds ---------------------------------------------------------------------------------------------------------------


def write_fold(run, settings, chips=None, **changes):
    fold = without(settings, [SITE])
    write_held_out(
        fold_run(run, "tiny", SITE), about(fold, **changes), [chip(SITE), chip("WEST")] if chips is None else chips
    )


def test_a_fold_gives_the_chips_of_its_own_site(tmp_path, base):
    write_fold(tmp_path / "tiny", base[0])
    (fold,) = read_folds(*base, run=tmp_path / "tiny")
    assert [c.site for c in fold] == [SITE]
    assert (tmp_path / "tiny-without-EAST" / "held_out.npz").is_file()


def test_a_missing_fold_is_named_with_the_command_that_makes_it(tmp_path, base):
    with pytest.raises(RecipeError, match=r"canopy train RECIPE --hold-out EAST, and then .* --resume .*/tiny"):
        read_folds(*base, run=tmp_path / "tiny")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"training_sha256": "2" * 64}, "of another recipe than this one without EAST"),
        ({"tile_sets": {"open": "2" * 64}}, "on another tile set 'open' than there is now"),
        ({"start_sha256": "2" * 64}, "started from other weights"),
        ({"trained_sites": (SITE, "WEST")}, "has seen EAST"),
        ({"chips": []}, "holds no chip of EAST"),
    ],
)
def test_a_fold_of_another_training_is_refused_in_one_line(tmp_path, base, changes, message):
    write_fold(tmp_path / "tiny", base[0], **changes)
    with pytest.raises(RecipeError, match=message) as caught:
        read_folds(*base, run=tmp_path / "tiny")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("same", "changes"),
    [
        (True, {"model__description": "Another."}),
        (True, {"model__not_for": ["more"]}),
        (True, {"evaluate__folds": ["WEST"]}),
        (True, {"calibrate__least_px": 300}),
        (True, {"optim__threads": 2}),
        (True, {"optim__checkpoint_every": 5}),
        (True, {"data__hold_out_use": ["score"]}),
        (False, {"seed": 4}),
        (False, {"optim__lr": 1e-4}),
        (False, {"optim__steps": 7}),
        (False, {"data__hold_out_sites": ["FAR", "EAST"]}),
        (False, {"model__window_px": 96}),
        (False, {"evaluate__forest_trees": 6}),
        (False, {"augmentation": {"haze": 0.0}}),
        (False, {"model__start_from": "elsewhere"}),
    ],
)
def test_only_what_decides_the_weights_and_the_baselines_makes_another_training(tmp_path, same, changes):
    one, other = (
        read_recipe(recipe(tmp_path / "tiles", tmp_path / name, **c)) for name, c in (("one", {}), ("other", changes))
    )
    assert one.sha256() != other.sha256()
    assert (training_sha256(one) == training_sha256(other)) == same


def test_a_set_that_only_scores_is_no_other_training_and_one_that_trains_is(tmp_path):
    whole = read_recipe(recipe(tmp_path / "tiles", tmp_path))
    fewer = whole.model_copy(update={"data": whole.data.model_copy(update={"set": whole.data.set[:1]})})
    assert training_sha256(fewer) == training_sha256(whole)
    more = whole.data.set[1].model_copy(update={"train": ("train",), "ships": True})
    other = whole.model_copy(update={"data": whole.data.model_copy(update={"set": (whole.data.set[0], more)})})
    assert training_sha256(other) != training_sha256(whole)


def test_the_digest_of_weights_changes_with_any_of_them():
    torch.manual_seed(0)
    network = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.BatchNorm1d(2))
    before = weights_sha256(network)
    assert weights_sha256(network) == before
    network[1].running_mean[1] += 1e-6
    assert weights_sha256(network) != before

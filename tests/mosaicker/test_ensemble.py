"""Turned windows and several models: the mean by hand, the law of total variance, and what is said about intervals."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.nn import functional

from canopy.errors import ContractError
from canopy.model.augmentation import dihedral
from canopy.model.calibration import CalibrationTable
from canopy.model.package import load_model
from canopy.mosaicker.ensemble import TURNS, Ensemble, Turn, load_ensemble
from tests.plain_models import plain_contract, plain_model, pointwise

TABLE = CalibrationTable(edges_m=(0.0,), lower_factor=(1.5,), upper_factor=(1.5,), pixels=(9999,), sites=("nowhere",))


def digest(letter):
    return letter * 64


def windows(count=2, bands=3, seed=1):
    return np.random.default_rng(seed).integers(0, 256, (count, bands, 64, 64), dtype=np.uint8)


def turned(array, turn):
    return np.rot90(array[..., ::-1] if turn.mirrored else array, turn.quarters, axes=(-2, -1)).copy()


def put_back(array, turn):
    back = np.rot90(array, -turn.quarters, axes=(-2, -1))
    return (back[..., ::-1] if turn.mirrored else back).copy()


def total(means, spreads):
    """The law of total variance in float64."""
    means, spreads = np.asarray(means, float), np.asarray(spreads, float)
    return means.mean(0), np.sqrt((spreads**2).mean(0) + means.var(0))


# --- turns ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tta", TURNS)
def test_turns_are_symmetries_of_the_square_and_come_back(tta):
    x = torch.arange(48.0).reshape(2, 4, 6)
    seen = set()
    for turn in TURNS[tta]:
        shown = turn.apply(x)
        np.testing.assert_array_equal(shown, turned(x.numpy(), turn))
        assert shown.is_contiguous()
        assert torch.equal(turn.undo(shown), x)
        seen.add(shown.numpy().tobytes() + bytes(shown.shape[1:]))
    assert len(seen) == len(TURNS[tta]) == {"none": 1, "flips": 4, "d4": 8}[tta]
    assert TURNS[tta][0] == Turn()
    squares = {turn.apply(x[:, :4, :4]).numpy().tobytes() for turn in TURNS["d4"]}
    assert squares == {
        np.ascontiguousarray(dihedral(x[:, :4, :4].numpy(), quarters, flip)).tobytes()
        for quarters in range(4)
        for flip in (0, 1)
    }


@pytest.mark.parametrize("tta", ["flips", "d4"])
def test_augmentation_is_the_mean_over_turned_windows(tiny_model, tta):
    model, image = load_model(tiny_model), windows()
    opinion = Ensemble(models=(model,), tta=tta).predict(image)
    by_hand = [model.predict(turned(image, turn)) for turn in TURNS[tta]]
    means, spreads = (
        [put_back(getattr(each, name).numpy(), turn) for each, turn in zip(by_hand, TURNS[tta], strict=True)]
        for name in ("mean_m", "spread_m")
    )
    mean, spread = total(means, spreads)
    np.testing.assert_allclose(opinion.mean_m, mean, atol=1e-4)
    np.testing.assert_allclose(opinion.spread_m, spread, atol=1e-4)
    assert not opinion.abstain.any()
    assert np.abs(mean - means[0]).max() > 0.1, "the control: this network does not see the same from all sides"
    wrong = np.mean([put_back(m, Turn(quarters=-t.quarters)) for m, t in zip(means, TURNS[tta], strict=True)], axis=0)
    assert np.abs(opinion.mean_m.numpy() - wrong).max() > 0.1, "the control: turns undone the wrong way are found"


def smooth(x_bchw):
    """The mean of 5 x 5 pixels: the same from all sides, and what lies beside a pixel counts."""
    return 15.0 + 20.0 * functional.avg_pool2d(functional.pad(x_bchw, (2, 2, 2, 2), mode="replicate"), 5, stride=1)[:, 0]


def holey(seed=4):
    """A window with a margin, a hole and single pixels without imagery."""
    rng = np.random.default_rng(seed)
    image, valid = rng.random((1, 1, 64, 64), dtype=np.float32), rng.random((1, 64, 64)) > 0.02
    valid[:, :17], valid[:, 40:51, 20:23] = False, False
    return image, valid


@pytest.mark.parametrize("fill", ["mean", "mirror"])
@pytest.mark.parametrize("heights", [pointwise, smooth])
def test_a_function_that_is_the_same_from_all_sides_is_not_moved(fill, heights):
    model = plain_model(heights, contract=plain_contract(fill=fill, mean=(0.4,)))
    image, valid = holey()
    alone, together = (Ensemble(models=(model,), tta=tta).predict(image, valid) for tta in ("none", "d4"))
    np.testing.assert_allclose(together.mean_m, alone.mean_m, atol=2e-5)
    np.testing.assert_allclose(together.spread_m, alone.spread_m, atol=2e-3)  # of 20 m: the logits' rounding
    # The control: a mask left as it was belongs to other pixels. Only what looks beside a pixel can tell.
    forgotten = [model.predict(turned(image, turn), valid).mean_m for turn in TURNS["d4"]]
    wrong = np.mean([put_back(m.numpy(), turn) for m, turn in zip(forgotten, TURNS["d4"], strict=True)], axis=0)
    assert np.abs(wrong - alone.mean_m.numpy())[valid].max() > 0.1


def test_a_margin_is_filled_before_it_is_turned():
    """Of two pixels equally near the mirror takes one; which, must not depend on the side from which one looks."""
    image, valid = holey()
    model = plain_model(contract=plain_contract(fill="mirror"))
    own = model.prepare(image, valid)
    from_other_sides = [
        torch.from_numpy(put_back(model.prepare(turned(image, t), turned(valid, t)), t)) for t in TURNS["d4"]
    ]
    assert any(not torch.equal(own, other) for other in from_other_sides), "the control: filling is not symmetric itself"
    opinion = Ensemble(models=(model,), tta="d4").predict(image, valid)
    assert torch.equal(opinion.mean_m, model.heights(own).mean_m)


# --- several models ------------------------------------------------------------------------------------------------------


def constant(height_m):
    return lambda x_bchw: torch.full_like(x_bchw[:, 0], height_m)


def named(name, letter, heights, **changes):
    return plain_model(heights, contract=plain_contract(name=name, weights_sha256=digest(letter), **changes))


def test_one_model_is_itself_bit_for_bit(tiny_model):
    model, image = load_model(tiny_model), windows()
    opinion, heights = Ensemble(models=(model,)).predict(image), model.predict(image)
    for name in ("mean_m", "spread_m", "abstain"):
        assert torch.equal(getattr(opinion, name), getattr(heights, name))


def test_models_are_averaged_by_the_law_of_total_variance():
    levels = (10.0, 20.0, 36.0)
    models = tuple(named(f"m{level}", letter, constant(level)) for level, letter in zip(levels, "abc", strict=True))
    image = np.zeros((1, 1, 64, 64), np.float32)
    spreads = [float(model.predict(image).spread_m[0, 0, 0]) for model in models]
    mean, spread = total(levels, spreads)
    opinion = Ensemble(models=models).predict(image)
    np.testing.assert_allclose(opinion.mean_m, mean, rtol=1e-6)
    np.testing.assert_allclose(opinion.spread_m, spread, rtol=1e-5)
    assert abs(spread - np.mean(spreads)) > 0.5, "the control: disagreement counts"


def test_members_that_abstain_have_no_part():
    def half(x_bchw):
        return torch.where(x_bchw[:, 0] > 0.5, torch.nan, 10.0)

    one, two = named("one", "a", half), named("two", "b", lambda x: torch.where(x[:, 0] > 0.8, torch.nan, 30.0))
    image = np.random.default_rng(0).random((1, 1, 64, 64), dtype=np.float32)
    for models in ((one, two), (two, one)):
        opinion = Ensemble(models=models, tta="flips").predict(image)
        x = image[:, 0]
        np.testing.assert_array_equal(opinion.abstain, x > 0.8)
        np.testing.assert_allclose(opinion.mean_m[x <= 0.5], 20.0, rtol=1e-5)
        between = (x > 0.5) & (x <= 0.8)
        np.testing.assert_allclose(opinion.mean_m[between], 30.0, rtol=1e-5)
        np.testing.assert_allclose(opinion.spread_m[between], two.predict(image).spread_m[between], rtol=1e-5)


def test_only_a_model_alone_keeps_its_calibration():
    calibrated = named("one", "a", pointwise, calibration=TABLE)
    alone = Ensemble(models=(calibrated,))
    assert alone.contract is calibrated.contract
    assert (alone.calibration, alone.uncalibrated) == (TABLE, None)
    turned_too = Ensemble(models=(calibrated,), tta="flips")
    two = Ensemble(models=(calibrated, named("two", "b", pointwise, calibration=TABLE)))
    for ensemble, count in ((turned_too, 4), (two, 2)):
        assert ensemble.calibration is None is ensemble.contract.calibration
        assert f"not for the mean of {count} predictions" in ensemble.uncalibrated
    assert (turned_too.contract.name, two.contract.name) == ("one, flips", "one + two")
    assert "no calibration table" in Ensemble(models=(named("three", "c", pointwise),)).uncalibrated
    assert [(each["name"], each["weights_sha256"]) for each in two.record()] == [("one", digest("a")), ("two", digest("b"))]


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"window_px": 96}, "window_px"), ({"stride_px": 32}, "stride_px"), ({"gsd_range_m": (0.5, 2.0)}, "gsd_range_m"),
        ({"value_range": (0.0, 2.0)}, "value_range"), ({"bands": ("nir",)}, "bands"),
    ],
)  # fmt: skip
def test_models_for_other_imagery_are_refused(changes, key):
    one, other = named("one", "a", pointwise), named("two", "b", pointwise, **changes)
    with pytest.raises(ContractError, match=rf"^one has {key} .* and two .*; choose"):
        Ensemble(models=(one, other))


def test_a_model_given_twice_and_words_unknown_are_refused(tiny_model):
    model = load_model(tiny_model)
    with pytest.raises(ContractError, match="tiny is given twice"):
        Ensemble(models=(model, replace(model)))
    with pytest.raises(ContractError, match="'d8' is unknown; choose none, flips, d4"):
        load_ensemble(tiny_model, tta="d8")
    with pytest.raises(ContractError, match="no model is given"):
        load_ensemble([])
    ensemble = load_ensemble([tiny_model], tta="d4")
    assert (ensemble.members, ensemble.device.type, ensemble.precision, ensemble.compiled) == (8, "cpu", "float32", False)

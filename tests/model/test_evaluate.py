"""Predicting chips, the baselines they are compared with, and which pixels calibrate."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from canopy.errors import RecipeError
from canopy.model.baselines import Baselines, colour_and_texture, fit_baselines
from canopy.model.evaluate import ChipResult, calibrate, predict_chip, score_sites
from canopy.model.recipe import Calibrate


class Reader:
    """A model whose height is the first band, and whose spread is the second: what it says of a pixel does not depend on
    the window."""

    def __init__(self, window_px: int = 64, stride_px: int = 48, *, lift_m: float = 0.0) -> None:
        self.contract = SimpleNamespace(window_px=window_px, stride_px=stride_px)
        self.lift_m, self.windows = lift_m, 0

    def predict(self, image, valid):
        self.windows += 1
        image = torch.as_tensor(image).float()
        lift = self.lift_m * (self.windows % 2)
        return SimpleNamespace(mean_m=image[:, 0] + lift, spread_m=image[:, 1])


@pytest.mark.parametrize("shape", [(64, 64), (40, 64), (65, 64), (200, 131)])
def test_a_blended_chip_is_what_each_pixel_says(shape):
    rng = np.random.default_rng(0)
    image = rng.integers(0, 60, (2, *shape)).astype(np.uint8)
    mean, spread = predict_chip(Reader(), image, np.ones(shape, bool))
    np.testing.assert_allclose(mean, image[0], atol=1e-4)
    np.testing.assert_allclose(spread, image[1], atol=2e-2)


def test_windows_that_disagree_add_to_the_spread():
    image = np.full((2, 160, 160), 5, np.uint8)
    mean, spread = predict_chip(Reader(lift_m=4.0), image, np.ones((160, 160), bool))
    assert mean.min() >= 5 - 1e-4
    assert mean.max() <= 9 + 1e-4
    assert spread.min() >= 5 - 1e-3
    assert spread.max() == pytest.approx(np.sqrt(5**2 + 2**2), abs=0.1)


def chip(seed: int, side: int = 48, site: str = "A") -> dict:
    rng = np.random.default_rng(seed)
    height = np.kron(rng.uniform(0, 25, (side // 8, side // 8)), np.ones((8, 8))).astype(np.float32)
    image = np.stack([200 - 4 * height, 50 + 5 * height, 80 + 0 * height]) + rng.normal(0, 2, (3, side, side))
    valid = np.ones((side, side), bool)
    valid[:, :5] = False
    return {
        "image": torch.from_numpy(image.astype(np.uint8)),
        "image_valid": torch.ones(side, side, dtype=torch.bool),
        "height_m": torch.from_numpy(np.where(valid, height, np.nan).astype(np.float32)),
        "valid": torch.from_numpy(valid),
        "site": site,
        "id": f"{site}{seed}",
    }


def test_features_do_not_see_what_is_not_valid():
    image = chip(1)["image"].numpy()
    valid = np.ones(image.shape[1:], bool)
    valid[10:30, 20:40] = False
    other = np.where(valid, image, 255).astype(np.uint8)
    np.testing.assert_array_equal(colour_and_texture(image, valid)[valid], colour_and_texture(other, valid)[valid])
    everywhere = np.ones_like(valid)
    assert (colour_and_texture(image, everywhere)[valid] != colour_and_texture(other, everywhere)[valid]).any()


def test_the_forest_learns_colour_and_the_same_draws_give_the_same_forest():
    fit = [fit_baselines((chip(k) for k in range(6)), np.random.default_rng(1), per_chip_px=200, trees=10) for _ in range(2)]
    test = chip(9)
    image, seen, known = test["image"].numpy(), test["image_valid"].numpy(), test["valid"].numpy()
    heights = [baselines.predict(image, known, seen) for baselines in fit]
    np.testing.assert_array_equal(heights[0], heights[1])
    assert np.isnan(heights[0][~known]).all()
    true = test["height_m"].numpy()[known]
    assert np.abs(heights[0][known] - true).mean() < 0.2 * np.abs(fit[0].mean_m - true).mean()
    assert fit[0].n == 1200


def result(site: str, *, calibrates: bool, scores: bool, factor: float = 1.0, seed: int = 0) -> ChipResult:
    rng = np.random.default_rng(seed)
    mean = rng.gamma(2, 6, 8000).astype(np.float32)
    spread = (1 + 0.1 * mean).astype(np.float32)
    true = np.maximum(mean + factor * spread * rng.normal(size=8000), 0).astype(np.float32)
    return ChipResult(
        id=f"{site}{seed}", site=site, calibrates=calibrates, scores=scores, true_m=true, mean_m=mean, spread_m=spread,
        forest_m=mean + 1,
    )  # fmt: skip


def test_chips_that_do_not_calibrate_only_measure():
    own = [result(site, calibrates=True, scores=True, seed=k) for k, site in enumerate("AB")]
    hard = result("C", calibrates=False, scores=True, factor=4.0, seed=9)
    alone, both = calibrate(own, Calibrate()), calibrate([*own, hard], Calibrate())
    assert both.table.lower_factor == alone.table.lower_factor
    assert both.table.upper_factor == alone.table.upper_factor
    assert set(both.left_out) == {"A", "B"}
    assert set(both.other) == {"C"}
    assert both.other["C"].total.coverage < 0.6
    assert [m.how for m in both.table.measured] == ["sites left out in turn", "other held-out chips"]
    assert both.table.measured[1].overall == pytest.approx(both.other["C"].total.coverage)
    # One site alone has nothing to be measured on, and in-sample coverage is no substitute.
    assert calibrate(own[:1], Calibrate()).table.measured == ()


def test_without_a_chip_to_calibrate_on_there_is_no_table():
    with pytest.raises(RecipeError, match="no chip is left to calibrate on"):
        calibrate([result("A", calibrates=False, scores=True)], Calibrate())


def test_scores_are_by_site_and_leave_out_chips_that_only_calibrate():
    results = [
        result("B", calibrates=True, scores=False),
        result("A", calibrates=False, scores=True, seed=1),
        result("A", calibrates=True, scores=True, seed=2),
    ]
    (score,) = score_sites(results, Baselines(mean_m=9.0, n=1, forest=None), trained_sites=["A"], edges_m=(5.0, 15.0))
    assert (score.site, score.seen, score.chips, score.model.n) == ("A", True, 2, 16_000)
    true = np.concatenate([r.true_m for r in results[1:]])
    assert score.training_mean.bias_m == pytest.approx(9.0 - true.mean(), abs=1e-3)
    assert score.classes.total.mae_m == pytest.approx(score.model.mae_m)

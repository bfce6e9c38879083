"""The card says what the files of the model folder say, and nothing that they do not."""

from pathlib import Path

import pytest
from pydantic import TypeAdapter

from canopy.model.calibration import CalibrationTable, MeasuredCoverage
from canopy.model.card import card, card_of
from canopy.model.network import NetworkConfig
from canopy.model.package import CARD, Contract, Training
from canopy.model.scores import FILE, Metrics, SiteCoverage, score_sites
from tests.model.test_scores import EDGES, chip

MODELS = Path(__file__).parents[2] / "models"


@pytest.mark.parametrize("folder", sorted(p.parent for p in MODELS.glob(f"*/{FILE}")), ids=lambda p: p.name)
def test_the_card_of_a_shipped_model_is_made_from_its_files(folder):
    assert (folder / CARD).read_text(encoding="utf-8") == card_of(folder)


def contract() -> Contract:
    return Contract(
        name="tiny", version="2", description="A test.", licence="Apache-2.0",
        network=TypeAdapter(NetworkConfig).validate_python({"backbone": "pvt_v2_b0", "bins": {"count": 16, "max_m": 24.0}}),
        bands=("red", "green", "blue"), gsd_range_m=(0.4, 0.8), dtype="uint8", value_range=(0, 255), mean=(1, 1, 1),
        std=(1, 1, 1), window_px=64, stride_px=48,
        training=Training(sites=("B", "C"), tile_sets={}, recipe_sha256="ab" * 32, footprints_deg=()),
        calibration=CalibrationTable(
            edges_m=(0, 5), lower_factor=(1, 1), upper_factor=(2, 2), pixels=(7, 8), sites=("A", "B", "C"),
            measured=(MeasuredCoverage(how="sites left out in turn", sites=("A",), pixels=(4, 0), inside=(3, 0)),),
        ),
    )  # fmt: skip


def metrics(**changes) -> Metrics:
    """A is new to the model and good, B is held-out blocks, C is new and worse than the forest and the mean."""
    chips = [chip("A", row=240 * k, seed=k) for k in range(8)]
    chips += [chip("B", row=240 * k, seed=k) for k in range(2)]
    chips += [chip("C", row=240 * k, seed=k, error_m=20.0) for k in range(8)]
    how = {"A": "unseen site", "B": "held-out blocks", "C": "never-used site"}
    table = {
        "steps": 5, "start": "trained from scratch", "folds": ("A",), "training_mean_m": 9.0, "forest_px": 1234,
        "sources": ({"site": "B", "chips": 3, "image_source": "camera", "lidar_source": "laser", "licence": "open"},),
        "scores": tuple(score_sites(chips, how, 9.0, edges_m=EDGES, seed=0)),
        "coverage": (SiteCoverage(site="A", how="left out of the fit", n=4, coverage=0.75, mean_width_m=3.5),),
        "not_for": ("anything at all",),
    }  # fmt: skip
    return Metrics.model_validate(table | changes)


def test_the_card_says_what_was_measured_and_how():
    found = metrics()
    text = card(contract(), found)
    for score in found.scores:
        assert f"**{score.site}**, {score.how}: {score.model.n} pixels" in text
        low, high = score.model.mae_95_m
        assert f"| **model** | {score.model.mae_m:.2f} ({low:.2f} to {high:.2f}) |" in text
        assert f"| random forest | {score.random_forest.mae_m:.2f} (" in text
        assert f"| training mean | {score.training_mean.mae_m:.2f} (" in text
        for figures in score.classes:
            assert f"{figures.mae_m:.2f} / {figures.bias_m:+.2f}" in text
    assert "R² of 30 m blocks" in text
    assert "on predictions for sites that were new to the model that made them" in text
    assert "| A | left out of the fit | 4 | 75.0% | 3.50 |" in text
    assert "| B | 3 | camera | laser | open |" in text
    assert "By MAE, on sites that are new to it, the model is better than the random forest at A; not at C (worse)." in text
    assert text.endswith("- anything at all\n")
    assert card(contract(), Metrics.model_validate_json(found.model_dump_json())) == text


def test_other_figures_make_another_card():
    """The negative control of the comparison with shipped cards."""
    found = metrics()
    first = found.scores[0]
    other = first.model_copy(update={"model": first.model.model_copy(update={"mae_m": first.model.mae_m + 0.01})})
    assert card(contract(), found.model_copy(update={"scores": (other, *found.scores[1:])})) != card(contract(), found)
    assert card(contract().model_copy(update={"licence": "none"}), found) != card(contract(), found)


def test_limits_are_one_line_a_site_and_of_its_strictest_score():
    found = metrics()
    limits = card(contract(), found).split("## Not for\n\n")[1].splitlines()
    lines = [line for line in limits if "places like" in line]
    assert [line.split(" (")[0] for line in lines] == ["- places like C"]
    assert "worse than the random forest" in lines[0]
    assert "no better than the training mean" in lines[0]
    # The same site judged on held-out blocks, where it is good, changes nothing.
    again = found.scores[0].model_copy(update={"site": "C", "how": "held-out blocks"})
    text = card(contract(), found.model_copy(update={"scores": (*found.scores, again)}))
    assert text.split("## Not for\n\n")[1].splitlines() == limits


def test_a_model_judged_on_its_own_sites_only_says_so():
    found = metrics(folds=())
    own = found.model_copy(update={"scores": tuple(s for s in found.scores if s.how == "held-out blocks")})
    text = card(contract(), own)
    assert "No site was new to the model: what it does elsewhere has not been measured." in text
    assert "on chips held out of training." in text
    assert "better than the random forest at" not in text


def test_without_a_calibration_the_card_says_so():
    assert "Not calibrated" in card(contract().model_copy(update={"calibration": None}), metrics())

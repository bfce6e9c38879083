"""After the last step: score a network on what it has not seen, calibrate its spread, and write its folder."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from canopy.model.baselines import Baselines, fit_baselines
from canopy.model.calibration import Coverage
from canopy.model.card import model_card
from canopy.model.evaluate import ChipResult, SiteScore, calibrate, evaluate_chips, score_sites
from canopy.model.network import HeightNetwork
from canopy.model.package import Contract, HeightModel, save_model
from canopy.model.recipe import TrainingRecipe
from canopy.model.sets import DataSets

FIXTURE_PX = 64


def finish(
    recipe: TrainingRecipe,
    sets: DataSets,
    contract: Contract,
    network: HeightNetwork,
    *,
    run: Path,
    out: Path,
    overwrite: bool = False,
) -> Path:
    """Score, calibrate and write the model folder."""
    model = HeightModel(contract=contract, network=network.eval(), device=next(network.parameters()).device)
    rng = np.random.default_rng([recipe.seed, 0])
    chips = (chips[item] for chips in sets.training_chips() for item in range(len(chips)))
    baselines = fit_baselines(
        chips,
        rng,
        per_chip_px=recipe.evaluate.forest_px_per_chip,
        trees=recipe.evaluate.forest_trees,
        threads=torch.get_num_threads(),
    )
    say(f"baselines fitted on {baselines.n} training pixels, mean height {baselines.mean_m:.2f} m")
    results = _evaluate(model, baselines, sets)
    scores = score_sites(results, baselines, trained_sites=contract.training.sites, edges_m=recipe.evaluate.edges_m)
    calibration = calibrate(results, recipe.calibrate)
    for score in scores:
        say(
            f"{score.site}: MAE {score.model.mae_m:.2f} m, bias {score.model.bias_m:+.2f} m, R2 {score.model.r2:.2f} "
            f"(training mean {score.training_mean.mae_m:.2f} m, random forest {score.forest.mae_m:.2f} m)"
        )
    contract = contract.model_copy(
        update={"metrics": _metrics(scores, calibration.left_out, calibration.other), "calibration": calibration.table}
    )
    # Through the validator: `model_copy` trusts what it is given.
    contract = Contract.model_validate(contract.model_dump())
    card = model_card(recipe, contract, sources=sets.sources(), scores=scores, baselines=baselines, calibration=calibration)
    save_model(out, network=network.cpu(), contract=contract, card=card, fixture_image=_fixture(recipe), overwrite=overwrite)
    (out / "recipe.toml").write_text((run / "recipe.toml").read_text(encoding="utf-8"), encoding="utf-8")
    say(f"wrote {out}")
    return out


def _evaluate(model: HeightModel, baselines: Baselines, sets: DataSets) -> list[ChipResult]:
    held_out = sets.held_out()
    total, done, last = sum(len(chips) for chips, _, _ in held_out), 0, time.monotonic()
    results: list[ChipResult] = []
    for chips, calibrates, scores in held_out:

        def progress(count: int) -> None:
            nonlocal done, last
            done += count
            if done == total or time.monotonic() - last > 10:
                last = time.monotonic()
                say(f"held-out chip {done}/{total}")

        results += evaluate_chips(model, baselines, chips, calibrates=calibrates, scores=scores, progress=progress)
    return results


def _metrics(scores: Sequence[SiteScore], *covered: dict[str, Coverage]) -> dict[str, Any]:
    """Scores as nested tables of finite numbers; a measure that does not exist (R2 of a flat site) is left out."""
    table: dict[str, Any] = {"sites": {}, "coverage": {}}
    for score in scores:
        table["sites"][score.site] = {
            who: {name: value for name, value in sums.summary().items() if math.isfinite(value)}
            for who, sums in (
                ("model", score.model), ("training_mean", score.training_mean), ("random_forest", score.forest),
            )
        }  # fmt: skip
    for sites in covered:
        for site, coverage in sites.items():
            if coverage.total.n:
                table["coverage"][site] = {
                    "n": coverage.total.n,
                    "share": coverage.total.coverage,
                    "mean_width_m": coverage.total.mean_width_m,
                }
    return table


def _fixture(recipe: TrainingRecipe) -> Tensor:
    """Noise with the colours of the training imagery, smooth enough to look like something: nobody's photograph."""
    from scipy.ndimage import gaussian_filter

    rng = np.random.default_rng([recipe.seed, 1])
    noise = gaussian_filter(rng.normal(size=(len(recipe.model.bands), FIXTURE_PX, FIXTURE_PX)), (0, 2, 2))
    noise /= noise.std(axis=(1, 2), keepdims=True)
    mean, std = (np.array(v)[:, None, None] for v in (recipe.model.mean, recipe.model.std))
    low, high = recipe.model.value_range
    return torch.from_numpy(np.clip(np.rint(mean + std * noise), low, high).astype(np.uint8))


def say(line: str) -> None:
    """One line to standard error, so that standard output stays for results."""
    sys.stderr.write(line + "\n")
    sys.stderr.flush()

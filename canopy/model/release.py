"""After the last step: score a network on what it has not seen, calibrate its spread, and write its folder."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from canopy.errors import RecipeError
from canopy.model.baselines import Baselines, fit_baselines
from canopy.model.calibrate import calibrate
from canopy.model.card import card
from canopy.model.evaluate import ChipResult, evaluate_chips
from canopy.model.held_out import About, HeldOut, read_folds, training_sha256, weights_sha256, write_held_out
from canopy.model.network import HeightNetwork
from canopy.model.package import Contract, HeightModel, find_model, read_contract, save_model
from canopy.model.recipe import TrainingRecipe
from canopy.model.reference import describe
from canopy.model.scores import FILE as METRICS_FILE
from canopy.model.scores import How, Metrics, Score, SiteCoverage, Source, metrics_text, score_sites
from canopy.model.sets import DataSets, extend
from canopy.tiler.chips import tile_set_hash
from canopy.tiler.recipe import resolve

FIXTURE_PX = 64

FOREST_PX = 150_000
"""Most training pixels of the forest in all: more make it slower and hardly better."""


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
    """Score, calibrate and write the model folder.

    What the network says of everything held out is left in the run folder (`canopy.model.held_out`). With sites in
    `evaluate.folds` their scores, and all of the calibration but that of sites held out of every run, come from the runs
    that left them out.

    Args:
        recipe: The resolved recipe.
        sets: Its tile sets.
        contract: What the model is, without scores and calibration.
        network: The trained network, plain and in float32; it ends on the CPU.
        run: Folder of the run.
        out: Model folder to write.
        overwrite: Replace the model in `out`.

    Raises:
        RecipeError: a fold of the recipe is missing or of another training, or nothing is left to calibrate on.
        OutputError: something cannot be written.
    """
    start = _start(recipe, sets.folder)
    contract = _inherited(contract, start)
    about = About(
        name=recipe.model.name,
        training_sha256=training_sha256(recipe),
        weights_sha256=weights_sha256(network),
        tile_sets={path.name: tile_set_hash(path) for path, s in zip(sets.paths, recipe.data.set, strict=True) if s.ships},
        trained_sites=contract.training.sites,
        start_sha256="" if start is None else start.weights_sha256,
        training_mean_m=0.0,
        forest_px=0,
    )
    folds = read_folds(recipe, about, run=run)
    baselines = _baselines(recipe, sets)
    say(f"baselines fitted on {baselines.n} training pixels, mean height {baselines.mean_m:.2f} m")
    model = HeightModel(contract=contract, network=network.eval(), device=next(network.parameters()).device)
    about = about.model_copy(update={"training_mean_m": baselines.mean_m, "forest_px": baselines.n})
    own = write_held_out(run, about, evaluate_chips(model, baselines, sets.held_out(), progress=_Progress()))
    judged = _Judged(recipe=recipe, sets=sets, own=own, folds=tuple(folds), trained=frozenset(contract.training.sites))
    scores = judged.scores()
    for score in scores:
        say(
            f"{score.site} ({score.how}): MAE {score.model.mae_m:.2f} m, bias {score.model.bias_m:+.2f} m "
            f"(training mean {score.training_mean.mae_m:.2f} m, random forest {score.random_forest.mae_m:.2f} m)"
        )
    calibration = calibrate(judged, recipe.calibrate, np.random.default_rng([recipe.seed, 2]))
    shift, unknown = describe(judged, sets.paths, contract)
    if unknown is not None:
        say(unknown)
    metrics = Metrics(
        steps=recipe.optim.steps,
        start=_start_in_words(recipe),
        sources=tuple(Source.model_validate(source) for source in sets.sources()),
        folds=recipe.evaluate.folds,
        training_mean_m=baselines.mean_m,
        forest_px=baselines.n,
        scores=tuple(scores),
        coverage=(
            *(SiteCoverage.of(site, "left out of the fit", c) for site, c in calibration.left_out.items()),
            *(SiteCoverage.of(site, "not used in the fit", c) for site, c in calibration.other.items()),
        ),
        not_for=recipe.model.not_for,
    )
    contract = contract.model_copy(
        update={"metrics": _summary(metrics), "calibration": calibration.table, "blocks": calibration.blocks}
    )
    # Through the validator: `model_copy` trusts what it is given.
    contract = Contract.model_validate(contract.model_dump())
    save_model(
        out,
        network=network.cpu(),
        shift=shift,
        contract=contract,
        card=card(contract, metrics),
        fixture_image=_fixture(recipe),
        beside={METRICS_FILE: metrics_text(metrics), "recipe.toml": (run / "recipe.toml").read_text(encoding="utf-8")},
        overwrite=overwrite,
    )
    say(f"wrote {out}")
    return out


# --- where training started ----------------------------------------------------------------------------------------------


def check_start(recipe: TrainingRecipe, folder: Path) -> None:
    """Refuse a start from a model that has seen a site that is to be held out; asked before the first step.

    Raises:
        RecipeError: naming the site and the model.
    """
    start = _start(recipe, folder)
    if start is not None and (seen := sorted(set(recipe.data.hold_out_sites) & set(start.training.sites))):
        raise RecipeError(
            f"start_from {recipe.model.start_from} was trained on {seen[0]}, which is to be held out; "
            f"start from a model that was not"
        )


def _start(recipe: TrainingRecipe, folder: Path) -> Contract | None:
    if recipe.model.start_from is None:
        return None
    return read_contract(find_model(resolve(recipe.model.start_from, folder)))


def _inherited(contract: Contract, start: Contract | None) -> Contract:
    """The contract with what the model that training started from was trained on: the new one has seen that too."""
    if start is None:
        return contract
    boxes = dict(zip(start.training.sites, start.training.footprints_deg, strict=True))
    for site, box in zip(contract.training.sites, contract.training.footprints_deg, strict=True):
        extend(boxes, site, box)
    training = contract.training.model_copy(
        update={
            "sites": tuple(sorted(boxes)),
            "footprints_deg": tuple(boxes[site] for site in sorted(boxes)),
            "tile_sets": start.training.tile_sets | contract.training.tile_sets,
        }
    )
    return contract.model_copy(update={"training": training})


def _start_in_words(recipe: TrainingRecipe) -> str:
    if recipe.model.start_from is not None:
        return f"started from the model {Path(recipe.model.start_from).name}"
    return "started from the published weights of the backbone" if recipe.model.pretrained else "trained from scratch"


# --- what is judged, and by which run ------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Judged:
    """All predictions that the scores and the calibration are made from, each of a model that had not seen the pixels.

    A site with a fold calibrates by the fold's predictions and not by blocks of its own that the model was held back from:
    at such blocks a model is surer, with more right, than at a site that is new to it.
    """

    recipe: TrainingRecipe
    sets: DataSets
    own: HeldOut
    folds: tuple[HeldOut, ...]
    trained: frozenset[str]
    """Sites of the training chips of the recipe's own run."""

    def scores(self) -> list[Score]:
        """By site, folds first."""
        settings = {"edges_m": self.recipe.evaluate.edges_m, "seed": self.recipe.seed}
        found: list[Score] = []
        for fold in self.folds:
            how: dict[str, How] = {str(fold.site): "unseen site"}
            found += score_sites(self._of_fold(fold), how, fold.about.training_mean_m, **settings)  # type: ignore[arg-type]
        own: dict[str, How] = {
            chip.site: "held-out blocks" if chip.site in self.trained else "never-used site" for chip in self.own.about.chips
        }
        rest = score_sites(self.own, own, self.own.about.training_mean_m, **settings)  # type: ignore[arg-type]
        order: list[How] = ["unseen site", "never-used site", "held-out blocks"]
        return sorted([*found, *rest], key=lambda score: order.index(score.how))

    def __iter__(self) -> Iterator[ChipResult]:
        """All chips, marked with whether they calibrate or, if not, are looked at to measure the calibration.

        Blocks of a site that calibrates by its fold do neither: they are no other place than the fit has seen.
        """
        for fold in self.folds:
            yield from self._of_fold(fold)
        for chip in self.own:
            blocks = bool(self.folds) and chip.site in self.trained
            apart = chip.site not in self.recipe.evaluate.folds
            yield replace(chip, calibrates=chip.calibrates and not blocks, scores=chip.scores and apart)

    def _of_fold(self, fold: HeldOut) -> Iterator[ChipResult]:
        """The chips of a fold's site. They calibrate where the recipe lets chips of their set do so, and are all scored."""
        calibrates = any(
            s.ships and s.calibrate and fold.site in set(index["site"])
            for s, index in zip(self.recipe.data.set, self.sets.indexes, strict=True)
        )
        for chip in fold:
            yield replace(chip, calibrates=calibrates)


class _Progress:
    """A line now and then about the held-out chips done."""

    def __init__(self) -> None:
        self.last = time.monotonic()

    def __call__(self, done: int, total: int) -> None:
        if done == total or time.monotonic() - self.last > 10:
            self.last = time.monotonic()
            say(f"held-out chip {done}/{total}")


def _baselines(recipe: TrainingRecipe, sets: DataSets) -> Baselines:
    training = sets.training_chips()
    count = sum(len(chips) for chips in training)
    return fit_baselines(
        (chips[item] for chips in training for item in range(len(chips))),
        np.random.default_rng([recipe.seed, 0]),
        per_chip_px=min(recipe.evaluate.forest_px_per_chip, max(1, FOREST_PX // count)),
        trees=recipe.evaluate.forest_trees,
        threads=torch.get_num_threads(),
    )


def _summary(metrics: Metrics) -> dict[str, Any]:
    """The main figures for the contract, by site; of a site judged in two ways those of the stricter."""
    table: dict[str, Any] = {"sites": {}, "coverage": {}}
    names = ("n", "mae_m", "rmse_m", "bias_m", "r2")
    for score in metrics.scores:
        if score.site not in table["sites"]:
            table["sites"][score.site] = {
                who: {name: value for name in names if (value := getattr(getattr(score, who), name)) is not None}
                for who in ("model", "training_mean", "random_forest")
            }
    for site in metrics.coverage:
        if site.coverage is not None:
            table["coverage"].setdefault(site.site, {"n": site.n, "share": site.coverage})
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

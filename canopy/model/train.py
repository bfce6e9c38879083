"""Train a model from a recipe, score it on what it has not seen, calibrate it, and write its folder.

Suffixes: b batch, c band, n bin, r row, q column (rows and columns as in `canopy.model.losses`).

A run lives in `runs/<name>/` beside the model folder: the resolved recipe, logs (CSV and TensorBoard) and checkpoints.
Everything random in a step is a function of the seed and the step number, so a run that is stopped and resumed ends with the
weights it would have had: on a CPU, with the same number of threads, bit for bit.
"""

from __future__ import annotations

import logging
import math
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import lightning
import numpy as np
import tomli_w
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_only
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR
from torch.optim.swa_utils import AveragedModel
from torch.utils.data import DataLoader

from canopy.errors import ContractError, OutputError, RecipeError
from canopy.model.data import Sample, TrainingSet, training_batches
from canopy.model.distribution import HeightDistribution
from canopy.model.losses import charbonnier, curriculum, histogram_cross_entropy, patch_gradient, silog
from canopy.model.network import HeightNetwork
from canopy.model.package import Contract, load_model, normalise
from canopy.model.recipe import Optim, TrainingRecipe, read_recipe
from canopy.model.release import check_start, finish, say
from canopy.model.sets import DataSets
from canopy.tiler.recipe import resolve

LAST = "last.ckpt"


# --- one step ------------------------------------------------------------------------------------------------------------


def learning_rate_factor(step: int, settings: Optim) -> float:
    """Learning rate at optimiser step `step` over `settings.lr`: linear warm-up from 1/n, then half a cosine."""
    warm = round(settings.warm_up * settings.steps)
    if step < warm:
        return (step + 1) / warm
    done = min((step - warm) / max(settings.steps - warm, 1), 1.0)
    low = settings.final_lr_factor
    return low + (1 - low) * 0.5 * (1 + math.cos(math.pi * done))


def moving_average(decay: float) -> Callable[[Any, Any, Tensor | int], None]:
    """The update of the averaged weights: a <- a + (1 - d)(w - a) with d = min(decay, (1 + k)/(10 + k)) at update k.

    Why the ramp: with a constant decay near 1 a short run would still hold much of its random start.
    """

    def update(average: Sequence[Tensor], current: Sequence[Tensor], updates: Tensor | int) -> None:
        k = int(updates)
        keep = min(decay, (1 + k) / (10 + k))
        for a, w in zip(average, current, strict=True):
            if a.is_floating_point():
                a.lerp_(w, 1 - keep)
            else:
                a.copy_(w)

    return update


class HeightLearner(lightning.LightningModule):
    """The network, its moving average, the loss and the optimiser."""

    def __init__(
        self, network: HeightNetwork, recipe: TrainingRecipe, contract: Contract, sets: Sequence[TrainingSet], first: int = 0
    ) -> None:
        super().__init__()
        self.recipe = recipe
        self.sets, self.first = sets, first
        self.contract = contract
        self.network = network
        self.parts: dict[str, Tensor] = {}
        """Values of the terms in the last step."""
        self.average: AveragedModel | None = None
        if recipe.optim.ema_decay > 0:
            self.average = AveragedModel(
                network, multi_avg_fn=moving_average(recipe.optim.ema_decay), use_buffers=True
            ).requires_grad_(False)
        self.centres_m: Tensor
        self.register_buffer("centres_m", network.config.bins.centres_m(), persistent=False)

    @property
    def best(self) -> HeightNetwork:
        """The network that is kept: the averaged one where there is an average."""
        network = self.network if self.average is None else self.average.module
        assert isinstance(network, HeightNetwork)
        return network

    def train_dataloader(self) -> DataLoader[Sample]:
        """The batches from step `first` on; asked for in the process that trains, so that its rank is known."""
        per_step = self.recipe.optim.accumulate
        return training_batches(
            self.sets,
            seed=self.recipe.seed,
            start_step=self.first * per_step,
            steps=self.recipe.optim.steps * per_step,
            augmentation=self.recipe.augmentation,
            rank=self.global_rank,
            workers=self.recipe.data.workers,
        )

    def training_step(self, batch: Sample, batch_idx: int) -> Tensor:
        """Loss of one batch."""
        # Dropout draws from torch's generator; seeding it by the step makes a resumed run draw the same. `batch_idx` itself
        # would not do: Lightning counts it from the start of the process.
        place = (self.recipe.seed, self.global_step, batch_idx % self.recipe.optim.accumulate, self.global_rank)
        torch.manual_seed(int(np.random.SeedSequence(place).generate_state(1)[0]))
        x_bcrq = normalise(batch["image"], batch["image_valid"], self.contract)
        logits_bnrq = self.network(x_bcrq)
        with torch.autocast(self.device.type, enabled=False):  # logarithms and gradients of heights need float32
            loss, self.parts = self.loss(logits_bnrq.float(), batch["height_m"], batch["valid"])
        self.log_dict({f"train/{name}": value for name, value in self.parts.items()}, batch_size=len(batch["id"]))
        self.log("train/lr", self.optimizers().param_groups[-1]["lr"], batch_size=len(batch["id"]))  # type: ignore[union-attr]
        return loss

    def loss(self, logits_bnrq: Tensor, true_brq: Tensor, valid_brq: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """The weighted sum at the current step, and every term with weight by itself."""
        settings, network = self.recipe.loss, self.network.config
        weights = curriculum(self.global_step, self.recipe.optim.steps, settings)
        if network.normalisation == "softmax":
            log_p_bnrq = logits_bnrq.log_softmax(dim=1)
            p_bnrq = log_p_bnrq.exp()
        else:
            p_bnrq = HeightDistribution.from_logits(logits_bnrq, network.bins, network.normalisation).probabilities()
            log_p_bnrq = p_bnrq.log()  # finite: these normalisations add a floor
        mean_brq = (p_bnrq * self.centres_m[:, None, None]).sum(dim=1)
        terms: dict[str, Callable[[], Tensor]] = {
            "histogram": lambda: histogram_cross_entropy(log_p_bnrq, true_brq, valid_brq, self.centres_m),
            "silog": lambda: silog(mean_brq, true_brq, valid_brq, mean_weight=settings.silog_mean),
            "charbonnier": lambda: charbonnier(mean_brq, true_brq, valid_brq, epsilon_m=settings.charbonnier_epsilon_m),
            "patch_gradient": lambda: patch_gradient(mean_brq, true_brq, valid_brq, settings.patch),
        }
        total, parts = logits_bnrq.new_zeros(()), {}
        for name, term in terms.items():
            if (weight := getattr(weights, name)) > 0:
                value = term()
                total = total + weight * value
                parts[name] = value.detach()
        with torch.no_grad():
            error = torch.where(valid_brq, (mean_brq - true_brq.nan_to_num()).abs(), 0.0)
            parts["mae_m"] = error.sum() / valid_brq.sum().clamp(min=1)
            # Labels above the last bin are learned as the last bin; a share that is not tiny asks for taller bins.
            above = valid_brq & (true_brq > self.centres_m[-1])
            parts["above_bins"] = above.sum() / valid_brq.sum().clamp(min=1)
        return total, parts | {"loss": total.detach()}

    def configure_optimizers(self) -> Any:
        """AdamW without decay of biases and norms, and the schedule by steps."""
        settings = self.recipe.optim
        groups = []
        for decays in (True, False):
            parameters = [p for p in self.network.parameters() if p.requires_grad and (p.ndim >= 2) == decays]
            if parameters:
                groups.append({"params": parameters, "weight_decay": settings.weight_decay if decays else 0.0})
        optimiser = torch.optim.AdamW(groups, lr=settings.lr, betas=settings.betas)
        schedule = LambdaLR(optimiser, lambda step: learning_rate_factor(step, settings))
        return {"optimizer": optimiser, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """A step of the optimiser, then of the moving average."""
        super().optimizer_step(*args, **kwargs)
        if self.average is not None:
            self.average.update_parameters(self.network)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """The recipe travels with the weights."""
        checkpoint["recipe_sha256"] = self.recipe.sha256()


class PlainLines(Callback):
    """One line of progress now and then, for logs and terminals alike."""

    def __init__(self, every: int) -> None:
        self.every = every
        self.started, self.first, self.printed = time.monotonic(), 0, 0

    def on_train_start(self, trainer: lightning.Trainer, *_: Any) -> None:
        """Remember where and when this run began."""
        self.started, self.first = time.monotonic(), trainer.global_step

    def on_train_batch_end(self, trainer: lightning.Trainer, pl_module: Any, *_: Any) -> None:
        """Print at every `every`-th step and at the last."""
        step, steps = trainer.global_step, trainer.max_steps
        if not trainer.is_global_zero or step == self.printed or (step % self.every and step != steps):
            return
        self.printed = step
        seconds = (time.monotonic() - self.started) / max(step - self.first, 1)
        terms = " ".join(f"{name} {float(value):.3f}" for name, value in pl_module.parts.items())
        say(f"step {step}/{steps} {terms} | {seconds:.2f} s/step, {seconds * (steps - step) / 60:.0f} min left")


def _rank() -> int:
    """Which of the processes that train together this is; 0 is the one that writes."""
    return int(getattr(rank_zero_only, "rank", 0))


# --- a run ---------------------------------------------------------------------------------------------------------------


def train(
    recipe: Path,
    *,
    out: Path | None = None,
    resume: Path | None = None,
    hold_out: Sequence[str] = (),
    overwrite: bool = False,
    callbacks: Sequence[Callback] = (),
) -> Path:
    """Train, score and calibrate a model and write its folder.

    Args:
        recipe: TOML file, a `TrainingRecipe`.
        out: Model folder to write; default `<name>` in the folder above the recipe's.
        resume: Run folder of a stopped run of the same recipe; it goes on from its last checkpoint.
        hold_out: Sites to hold out besides the recipe's; the model's name says so.
        overwrite: Replace the model in `out`.
        callbacks: Further Lightning callbacks.

    Returns:
        The model folder.

    Raises:
        RecipeError: the recipe or a tile set is wrong, or `resume` is a run of another recipe.
        OutputError: `out` or the run folder exists.
    """
    settings = read_recipe(recipe, hold_out=hold_out)
    folder = recipe.resolve().parent
    out = folder.parent / settings.model.name if out is None else out
    if _rank() == 0 and out.exists() and not overwrite:
        raise OutputError(f"{out} exists; choose another folder with --out or replace it with --overwrite")
    run = out.resolve().parent / "runs" / out.name if resume is None else resume
    checkpoint = _open_run(run, settings, resuming=resume is not None)
    sets = DataSets(settings, folder)
    check_start(settings, folder)
    contract = sets.contract()
    learner = fit(settings, sets, contract, run=run, checkpoint=checkpoint, callbacks=callbacks)
    if _rank() != 0:
        return out
    return finish(settings, sets, contract, learner.best, run=run, out=out, overwrite=overwrite)


def _open_run(run: Path, recipe: TrainingRecipe, *, resuming: bool) -> Path | None:
    """Prepare the run folder; the checkpoint to go on from, if any."""
    if not resuming:
        if _rank() != 0:
            return None
        if run.exists():
            raise OutputError(f"{run} exists; go on with --resume {run}, or remove it to start again")
        run.mkdir(parents=True)
        text = tomli_w.dumps(recipe.model_dump(mode="json", exclude_none=True))
        (run / "recipe.toml").write_text(text, encoding="utf-8")
        return None
    found = sorted((run / "checkpoints").glob("*.ckpt"), key=lambda path: path.stat().st_mtime)
    if not found:
        raise RecipeError(f"{run} has no checkpoint to resume from; start again without --resume")
    stored = torch.load(found[-1], map_location="cpu", weights_only=True)
    if stored["recipe_sha256"] != recipe.sha256():
        raise RecipeError(
            f"{found[-1]} is of another recipe than the one given; resume with {run / 'recipe.toml'} as it was"
        )
    return found[-1]


def _network(recipe: TrainingRecipe, folder: Path) -> HeightNetwork:
    """The network before the first step; its random start depends on the seed only."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.seed)
        network = HeightNetwork(recipe.model.network, pretrained=recipe.model.pretrained)
    if recipe.model.start_from is not None:
        start = load_model(resolve(recipe.model.start_from, folder))
        if start.contract.network != network.config:
            raise ContractError(
                f"start_from {recipe.model.start_from} holds another network than the recipe's; copy its [network] table"
            )
        network.load_state_dict(start.network.state_dict())
    return network


def fit(
    recipe: TrainingRecipe,
    sets: DataSets,
    contract: Contract,
    *,
    run: Path,
    checkpoint: Path | None = None,
    callbacks: Sequence[Callback] = (),
) -> HeightLearner:
    """Take the optimiser steps from `checkpoint`, or from the start, to the last."""
    optim = recipe.optim
    if optim.threads is not None:
        torch.set_num_threads(optim.threads)
    first = 0
    if checkpoint is not None:
        first = int(torch.load(checkpoint, map_location="cpu", weights_only=True)["global_step"])
    learner = HeightLearner(_network(recipe, sets.folder), recipe, contract, sets.training(), first)
    saver = ModelCheckpoint(
        dirpath=run / "checkpoints",
        filename="step-{step:07d}",
        auto_insert_metric_name=False,
        every_n_train_steps=optim.checkpoint_every,
        save_top_k=1,
        save_on_train_epoch_end=False,
        enable_version_counter=False,
    )
    version = f"from-{first:07d}"
    # Its advice on seed loggers and accelerators is not this program's to give.
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    trainer = lightning.Trainer(
        accelerator=optim.accelerator,
        devices=optim.devices,
        num_nodes=1 if optim.nodes == "auto" else optim.nodes,
        strategy=optim.strategy,
        precision=optim.precision,
        max_steps=optim.steps,
        max_epochs=-1,
        accumulate_grad_batches=optim.accumulate,
        gradient_clip_val=optim.clip_norm,
        log_every_n_steps=optim.log_every,
        logger=[
            CSVLogger(run, name="csv", version=version),
            TensorBoardLogger(str(run), name="tensorboard", version=version),
        ],
        callbacks=[saver, PlainLines(optim.log_every), *callbacks],
        enable_progress_bar=False,
        enable_model_summary=False,
        # The batches already differ by rank, and a sampler of Lightning's would cut them again.
        use_distributed_sampler=False,
        default_root_dir=run,
    )
    if first < optim.steps:
        with warnings.catch_warnings():
            # Lightning's own deprecations, and its surprise at the checkpoints of the run that is resumed.
            warnings.filterwarnings("ignore", message=".*LeafSpec.*")
            warnings.filterwarnings("ignore", message="Checkpoint directory .* exists")
            warnings.filterwarnings("ignore", message="You're resuming from a checkpoint that ended before the epoch")
            try:
                trainer.fit(learner, ckpt_path=checkpoint, weights_only=True)
            except SystemExit:
                # Lightning answers Ctrl-C with an exit of its own, without a word.
                if not trainer.interrupted:
                    raise
                say(f"stopped at step {trainer.global_step} of {optim.steps}; go on with --resume {run}")
                raise KeyboardInterrupt from None
        if trainer.global_step < optim.steps:
            raise OutputError(f"training stopped at step {trainer.global_step} of {optim.steps}; go on with --resume {run}")
        trainer.save_checkpoint(run / "checkpoints" / LAST)
    else:
        assert checkpoint is not None, "a run that is over has a checkpoint"
        learner.load_state_dict(torch.load(checkpoint, map_location="cpu", weights_only=True)["state_dict"])
    return learner

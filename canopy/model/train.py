"""Train a model from a recipe, score it on what it has not seen, calibrate it, and write its folder.

Suffixes: b batch, c band, n bin, r row, q column (rows and columns as in `canopy.model.losses`).

A run lives in `runs/<name>/` beside the model folder: the resolved recipe, logs (CSV and TensorBoard) and checkpoints.
Everything random in a step is a function of the seed and the step number, so a run that is stopped, or killed, and resumed
ends with the weights it would have had: on a CPU, with the same number of threads, bit for bit.

Several processes (`canopy.model.processes`) share each batch and take the steps that one would take with all of it, but for
rounding and for what a network draws at random (dropout, drop path).
"""

from __future__ import annotations

import logging
import math
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from signal import SIGINT, SIGUSR1, Signals
from typing import Any

import lightning
import numpy as np
import tomli_w
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy
from torch import Tensor, nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim.lr_scheduler import LambdaLR

from canopy.errors import CanopyError, OutputError, RecipeError
from canopy.model.checkpoints import Checkpoints, WholeFiles, checkpoints, damage, read_checkpoint
from canopy.model.data import Sample, TrainingLoader, TrainingSet, loader_failure, training_batches
from canopy.model.distribution import HeightDistribution
from canopy.model.losses import charbonnier, curriculum, histogram_cross_entropy, masked_mean, patch_gradient, silog
from canopy.model.network import HeightNetwork, weights_to_come
from canopy.model.package import CONTRACT, Contract, load_model, normalise, read_contract
from canopy.model.processes import Processes, processes, rank, requeue
from canopy.model.recipe import ModelTable, Optim, TrainingRecipe, read_recipe
from canopy.model.release import check_start, finish, say
from canopy.model.sets import DataSets
from canopy.model.tuning import Start, adapt, keep_frozen, merge, parameter_groups, pretrained, start_from, summary
from canopy.tiler.recipe import resolve

EMPTY_STEPS = 20
"""Steps in a row without one valid pixel after which a run is given up: labels come and go, but not like this."""


# --- one step ------------------------------------------------------------------------------------------------------------


def learning_rate_factor(step: int, settings: Optim) -> float:
    """Learning rate at optimiser step `step` over `settings.lr`: linear warm-up from 1/n, then half a cosine."""
    warm = round(settings.warm_up * settings.steps)
    if step < warm:
        return (step + 1) / warm
    done = min((step - warm) / max(settings.steps - warm, 1), 1.0)
    low = settings.final_lr_factor
    return low + (1 - low) * 0.5 * (1 + math.cos(math.pi * done))


class MovingAverage:
    """The exponential moving average of what learns, and of the statistics of batch norms.

    a <- a + (1 - d)(w - a) with d = min(decay, (1 + k)/(10 + k)) at update k; update 0 copies. Why the ramp: with a constant
    decay near 1 a short run would still hold much of its random start.

    Under FSDP each process averages its own part of the weights, which is exact because nothing else enters.
    """

    def __init__(self, network: nn.Module, decay: float) -> None:
        self.decay, self.updates = decay, 0
        self.network = network
        self._stored = network.state_dict().keys()
        self.values = {name: value.detach().clone() for name, value in self._current()}
        """Name in the network's state dict -> average."""

    def _current(self) -> Iterator[tuple[str, Tensor]]:
        for name, parameter in self.network.named_parameters():
            if parameter.requires_grad:
                yield name, parameter.detach()
        for name, buffer in self.network.named_buffers():
            if name in self._stored and buffer.is_floating_point():
                yield name, buffer

    @torch.no_grad()
    def update(self) -> None:
        """Take in the network as it is now."""
        keep = min(self.decay, (1 + self.updates) / (10 + self.updates)) if self.updates else 0.0
        # `lerp` with a weight of 1 would round; copying does not.
        for average, (_, now) in zip(self.values.values(), self._current(), strict=True):
            if keep == 0:
                average.copy_(now)
            else:
                _local(average).lerp_(_local(now), 1 - keep)
        self.updates += 1

    def state(self) -> dict[str, Any]:
        """For a checkpoint; every process must ask for it."""
        return {"updates": self.updates, "values": {name: _whole(value) for name, value in self.values.items()}}

    def load(self, state: Mapping[str, Any]) -> None:
        """Go on from a checkpoint's."""
        assert state["values"].keys() == self.values.keys(), "the average is of other parameters than those that learn"
        self.updates = state["updates"]
        for name, value in self.values.items():
            stored = state["values"][name].to(value.device)
            if isinstance(value, DTensor):
                stored = distribute_tensor(stored, value.device_mesh, value.placements)
            value.copy_(stored)


def _local(value: Tensor) -> Tensor:
    """This process's part of a tensor."""
    return value.to_local() if isinstance(value, DTensor) else value


def _whole(value: Tensor) -> Tensor:
    """A tensor with the parts of all processes, on the CPU."""
    whole: Tensor = value.full_tensor() if isinstance(value, DTensor) else value
    return whole.cpu()


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
        """Values of the terms in the last batch of all processes, and the norm of the last step's gradient."""
        self.batch = ""
        """What the last batch of this process was, for messages."""
        self.average: MovingAverage | None = None
        self._stored_average: Mapping[str, Any] | None = None
        self._finite = self._valid = torch.tensor(0.0)
        self._empty_steps = self._empty_in_a_row = 0
        self.centres_m: Tensor
        self.register_buffer("centres_m", network.config.bins.centres_m(), persistent=False)

    def configure_model(self) -> None:
        """Compile and, under FSDP, part the network among the processes."""
        sharded = self._parted
        parts: list[nn.Module] = [self.network]
        if sharded:
            # FSDP fetches a block's weights before it runs and drops them after, so blocks are compiled one by one.
            blocks = _blocks(self.network.backbone)
            parts = [*blocks, self.network.reassemble, self.network.decoder, self.network.head]
        if self.recipe.optim.compile:
            for part in parts:
                part.compile(dynamic=False)  # in place: the names of the weights stay
        if sharded:
            assert self.device_mesh is not None, "the strategy has set up its mesh"
            options: dict[str, Any] = {"mesh": self.device_mesh["data_parallel"]}
            if self.recipe.optim.precision == "bf16-mixed":
                options["mp_policy"] = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
            self.network.to(memory_format=torch.contiguous_format)  # the only one that FSDP takes
            for block in blocks:
                fully_shard(block, **options)
            fully_shard(self.network, **options)

    def train(self, mode: bool = True) -> HeightLearner:
        """Training mode, but for what is frozen."""
        super().train(mode)
        if mode:
            keep_frozen(self.network, self.recipe.tuning)
        return self

    def on_train_start(self) -> None:
        """Begin the average, or go on with the checkpoint's."""
        self.train()
        if self.recipe.optim.ema_decay > 0:
            self.average = MovingAverage(self.network, self.recipe.optim.ema_decay)
            if self._stored_average is not None:
                self.average.load(self._stored_average)
                self._stored_average = None

    def train_dataloader(self) -> TrainingLoader:
        """The batches from step `first` on; asked for in the process that trains, so that its rank is known."""
        per_step = self.recipe.optim.accumulate
        return training_batches(
            self.sets,
            seed=self.recipe.seed,
            start_step=self.first * per_step,
            steps=self.recipe.optim.steps * per_step,
            augmentation=self.recipe.augmentation,
            rank=self.global_rank,
            world=self.trainer.world_size,
            workers=self.recipe.data.workers,
            cache_mb=self.recipe.data.cache_mb,
        )

    def training_step(self, batch: Sample, batch_idx: int) -> Tensor:
        """Loss of one batch."""
        # Dropout draws from torch's generator; seeding it by the step makes a resumed run draw the same.
        place = batch_idx % self.recipe.optim.accumulate
        entropy = (self.recipe.seed, self.global_step, place, self.global_rank)
        torch.manual_seed(int(np.random.SeedSequence(entropy).generate_state(1)[0]))
        rows, cols = batch["height_m"].shape[1:]
        self.batch = f"{len(batch['id'])} x {rows} x {cols} px of {batch['tile_set']}, first chip {batch['id'][0]}"
        x_bcrq = normalise(batch["image"], batch["image_valid"], self.contract)
        logits_bnrq = self.network(x_bcrq)
        with torch.autocast(self.device.type, enabled=False):  # logarithms and gradients of heights need float32
            loss, self.parts = self.loss(logits_bnrq.float(), batch["height_m"], batch["valid"])
        if place == 0:
            self._finite, self._valid = torch.ones_like(loss, dtype=torch.bool), torch.zeros_like(loss)
        self._finite = self._finite & loss.detach().isfinite()
        self._valid = self._valid + self.parts["valid"]
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
            "silog": lambda: silog(
                mean_brq, true_brq, valid_brq, mean_weight=settings.silog_mean, variance=weights.silog_variance
            ),
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
            parts["mae_m"] = masked_mean((mean_brq - true_brq).abs(), valid_brq)
            # Labels above the last bin are learned as the last bin; a share that is not tiny asks for taller bins.
            parts["above_bins"] = masked_mean((true_brq > self.centres_m[-1]).float(), valid_brq)
            parts["valid"] = masked_mean(valid_brq.float(), torch.ones_like(valid_brq))
        return total, parts | {"loss": total.detach()}

    def configure_optimizers(self) -> Any:
        """AdamW with the groups of [tuning], and the schedule by steps."""
        settings = self.recipe.optim
        optimiser = torch.optim.AdamW(self._groups(), lr=settings.lr, betas=settings.betas)
        schedule = LambdaLR(optimiser, lambda step: learning_rate_factor(step, settings))
        return {"optimizer": optimiser, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def _groups(self) -> list[dict[str, Any]]:
        settings = self.recipe.optim
        return parameter_groups(self.network, self.recipe.tuning, lr=settings.lr, weight_decay=settings.weight_decay)

    def _numbered(self) -> list[str]:
        """Names of the parameters in the order in which the state of a whole optimiser numbers them."""
        names = {parameter: name for name, parameter in self.named_parameters()}
        return [names[parameter] for group in self._groups() for parameter in group["params"]]

    def configure_gradient_clipping(self, *_: Any, **__: Any) -> None:
        """Clip the norm over all that learns, in all processes; and stop before numbers that are none reach a weight.

        Raises:
            CanopyError: loss or gradient are not finite, or there has been no valid pixel for `EMPTY_STEPS` steps.
        """
        learning = [p for p in self.network.parameters() if p.grad is not None]
        norm = nn.utils.clip_grad_norm_(learning, self.recipe.optim.clip_norm)
        norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
        self.parts["gradient_norm"] = norm
        self.log("train/gradient_norm", norm)
        # Float16 looks for its own scale by trying: a gradient that overflows makes it lower the scale and skip the step.
        finite = self._finite if self.recipe.optim.precision == "16-mixed" else self._finite & norm.isfinite()
        is_finite, valid = torch.stack((finite.to(norm.dtype), self._valid.to(norm.dtype))).tolist()
        if not is_finite:
            terms = ", ".join(f"{name} {float(value):g}" for name, value in self.parts.items())
            raise CanopyError(
                f"step {self.global_step + 1} has a loss or a gradient that is no number ({terms}; {self.batch}); "
                f"{self._kept()}; look at that chip, or lower optim.lr or optim.clip_norm"
            )
        self._count_empty(valid == 0)

    def _count_empty(self, empty: bool) -> None:
        self._empty_steps += empty
        self._empty_in_a_row = self._empty_in_a_row + 1 if empty else 0
        self.log("train/empty_steps", float(self._empty_steps))
        if self._empty_in_a_row == EMPTY_STEPS:
            raise RecipeError(
                f"{EMPTY_STEPS} steps in a row, up to {self.global_step + 1}, had no valid pixel ({self.batch}); "
                f"{self._kept()}; look at the heights and the imagery of that tile set with `canopy tile inspect`"
            )
        if empty and rank() == 0:
            say(f"step {self.global_step + 1} has no valid pixel, the {self._empty_steps}. one without ({self.batch})")

    def _kept(self) -> str:
        """What is left of the run, for messages."""
        saver = next(c for c in self.trainer.callbacks if isinstance(c, Checkpoints))  # type: ignore[attr-defined]
        there = checkpoints(saver.run)
        return f"the last checkpoint, {there[0]}, is kept" if there else "there is no checkpoint yet"

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """A step of the optimiser, then of the moving average."""
        super().optimizer_step(*args, **kwargs)
        if self.average is not None:
            self.average.update()

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """The recipe's digest and the average travel with the weights; the optimiser's state goes by name.

        Why by name: torch numbers the parameters that an optimiser has, Lightning under FSDP all of the module. Either would
        take the other's numbers for its own.
        """
        checkpoint["run_sha256"] = self.recipe.run_sha256()
        if self.average is not None:
            checkpoint["average"] = self.average.state()
        names = [name for name, _ in self.named_parameters()] if self._parted else self._numbered()
        # Of the processes under FSDP the first has the whole state, the others nothing.
        states = [_renamed(state, dict(enumerate(names))) if state else state for state in checkpoint["optimizer_states"]]
        checkpoint["optimizer_states"] = states

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """The average waits for a network to average; under FSDP the strategy has taken the optimiser's state itself."""
        self._stored_average = checkpoint.get("average")
        if not self._parted:
            number = {name: number for number, name in enumerate(self._numbered())}
            checkpoint["optimizer_states"] = [_renamed(state, number) for state in checkpoint["optimizer_states"]]

    @property
    def _parted(self) -> bool:
        return isinstance(self.trainer.strategy, ModelParallelStrategy)


def _renamed(state: Mapping[str, Any], keys: Mapping[Any, Any]) -> dict[str, Any]:
    """The state dict of an optimiser with other keys for its parameters."""
    return {
        "state": {keys[key]: value for key, value in state["state"].items()},
        "param_groups": [group | {"params": [keys[key] for key in group["params"]]} for group in state["param_groups"]],
    }


def _blocks(backbone: nn.Module) -> list[nn.Module]:
    """The blocks of a backbone, outermost first; timm's names for them end so."""
    found: list[nn.Module] = []

    def visit(module: nn.Module) -> None:
        for child in module.children():
            if type(child).__name__.endswith("Block"):
                found.append(child)
            else:
                visit(child)

    visit(backbone)
    return found


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


# --- a run ---------------------------------------------------------------------------------------------------------------


def train(
    recipe: Path,
    *,
    out: Path | None = None,
    resume: Path | None = None,
    resume_if_any: bool = False,
    hold_out: Sequence[str] = (),
    overwrite: bool = False,
    callbacks: Sequence[Callback] = (),
) -> Path:
    """Train, score and calibrate a model and write its folder.

    Args:
        recipe: TOML file, a `TrainingRecipe`.
        out: Model folder to write; default `<name>` in the folder above the recipe's.
        resume: Run folder of a stopped run of the same recipe; it goes on from its last checkpoint.
        resume_if_any: Go on with the run that is there, if there is one, and begin it otherwise; where the model itself is
            there, do nothing. So the same line of a job script serves the first time and every time after.
        hold_out: Sites to hold out besides the recipe's; the model's name says so.
        overwrite: Replace the model in `out`.
        callbacks: Further Lightning callbacks.

    Returns:
        The model folder. With several processes all but the first return it without waiting for it to be written.

    Raises:
        RecipeError: the recipe or a tile set is wrong, the number of processes is not the recipe's, or the run is of
            another recipe.
        OutputError: `out` or the run folder exists, a checkpoint cannot be written, or the run was stopped.
        CanopyError: out of memory, or a loss that is no number.
    """
    settings = read_recipe(recipe, hold_out=hold_out)
    if resume is not None and resume_if_any:
        raise RecipeError("--resume names a run and --resume-if-any takes the one that is there; give one of them")
    folder = recipe.resolve().parent
    out = folder.parent / settings.model.name if out is None else out
    if out.exists() and not overwrite:  # in every process: none writes it before all have trained
        made = resume_if_any and (out / CONTRACT).is_file() and read_contract(out).training.recipe_sha256
        if made == settings.sha256():
            if rank() == 0:
                say(f"{out} is there already, from this recipe")
            return out
        raise OutputError(f"{out} exists; choose another folder with --out or replace it with --overwrite")
    here = processes(settings.optim)
    run = out.resolve().parent / "runs" / out.name if resume is None else resume
    sets = DataSets(settings, folder)
    check_start(settings, folder)
    contract = sets.contract()
    checkpoint = _open_run(run, settings, resume=resume is not None, resume_if_any=resume_if_any)
    last, device = fit(settings, sets, contract, here, run=run, checkpoint=checkpoint, callbacks=callbacks)
    if rank() != 0:
        return out
    network = trained_network(settings, last).to(device)
    return finish(settings, sets, contract, network, run=run, out=out, overwrite=overwrite)


def _open_run(run: Path, recipe: TrainingRecipe, *, resume: bool, resume_if_any: bool) -> Path | None:
    """Prepare the run folder; the checkpoint to go on from, if any."""
    checkpoint = _newest(run) if resume or resume_if_any else None
    if checkpoint is None and resume:
        raise RecipeError(f"{run} has no checkpoint to resume from; start again without --resume")
    if checkpoint is not None and read_checkpoint(checkpoint).get("run_sha256") != recipe.run_sha256():
        raise RecipeError(
            f"{checkpoint} is of another recipe than the one given; resume with {run / 'recipe.toml'} as it was"
        )
    if rank() == 0:
        if run.exists() and not (resume or resume_if_any):
            raise OutputError(f"{run} exists; go on with --resume {run}, or remove it to start again")
        run.mkdir(parents=True, exist_ok=True)
        text = tomli_w.dumps(recipe.model_dump(mode="json", exclude_none=True))
        (run / "recipe.toml").write_text(text, encoding="utf-8")
    return checkpoint


def _newest(run: Path) -> Path | None:
    """The newest checkpoint that is whole."""
    for path in checkpoints(run):
        if (why := damage(path)) is None:
            return path
        if rank() == 0:
            say(f"{path} is damaged ({why}); looking at the one before it")
    return None


def _started_network(recipe: TrainingRecipe, folder: Path) -> HeightNetwork:
    """The network before the first step, adapted; its random start depends on the seed only."""
    model = recipe.model
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.seed)
        if model.pretrained:
            network, start = pretrained(model.architecture(), bands=model.bands)
        else:
            network, start = HeightNetwork(model.architecture()), Start()
    before: Contract | None = None
    if model.start_from is not None:
        loaded = load_model(resolve(model.start_from, folder))
        before = loaded.contract
        start = start_from(
            network,
            loaded.network.state_dict(),
            config=before.network,
            bands=model.bands,
            start_bands=before.bands,
        )
    _adapt(network, recipe, new_bands=start.new_bands)
    if rank() == 0:
        for note in [*start.notes(), *_seen_otherwise(model, before)]:
            say(note)
    return network


def _seen_otherwise(model: ModelTable, before: Contract | None) -> Iterator[str]:
    """What to say where the start's weights knew a band by another normalisation than they will be given."""
    theirs = {} if before is None else dict(zip(before.bands, zip(before.mean, before.std, strict=True), strict=True))
    for band, mean, std in zip(model.bands, model.mean, model.std, strict=True):
        if band in theirs and theirs[band] != (mean, std):
            yield (
                f"band {band} is normalised by mean {mean:g} and std {std:g}, but the start's weights know it by "
                f"{theirs[band][0]:g} and {theirs[band][1]:g}; take those over unless the imagery is another"
            )


def _adapt(network: HeightNetwork, recipe: TrainingRecipe, new_bands: Sequence[str] = ()) -> None:
    adapt(network, recipe.tuning, torch.Generator().manual_seed(recipe.seed), new_bands=new_bands)


def _empty_network(recipe: TrainingRecipe) -> HeightNetwork:
    """An adapted network whose weights are to come from a checkpoint, so that nothing is fetched for it."""
    with weights_to_come():
        network = HeightNetwork(recipe.model.architecture())
    _adapt(network, recipe)
    return network


def trained_network(recipe: TrainingRecipe, checkpoint: Path) -> HeightNetwork:
    """The network of a checkpoint, averaged where there is an average, plain, in float32 on the CPU.

    Always from the file, so that one process and many, with and without FSDP, hand over the same.
    """
    network = _empty_network(recipe)
    stored = read_checkpoint(checkpoint)
    prefix = "network."
    state = {name.removeprefix(prefix): value for name, value in stored["state_dict"].items() if name.startswith(prefix)}
    network.load_state_dict(state | stored.get("average", {"values": {}})["values"])
    merge(network)
    return network


def fit(
    recipe: TrainingRecipe,
    sets: DataSets,
    contract: Contract,
    here: Processes,
    *,
    run: Path,
    checkpoint: Path | None = None,
    callbacks: Sequence[Callback] = (),
) -> tuple[Path, torch.device]:
    """Take the optimiser steps from `checkpoint`, or from the start, to the last.

    Returns:
        The checkpoint of the last step, and the device that was trained on.
    """
    optim = recipe.optim
    if optim.threads is not None:
        torch.set_num_threads(optim.threads)
    first = 0 if checkpoint is None else int(read_checkpoint(checkpoint)["global_step"])
    network = _started_network(recipe, sets.folder) if checkpoint is None else _empty_network(recipe)
    learner = HeightLearner(network, recipe, contract, sets.training(), first)
    saver = Checkpoints(run, optim.checkpoint_every, WholeFiles())
    # Its advice on seed loggers and accelerators is not this program's to give.
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    callbacks = [saver, PlainLines(optim.log_every), *callbacks]
    trainer = _trainer(recipe, here, network, run=run, first=first, callbacks=callbacks)
    device = trainer.strategy.root_device
    if first >= optim.steps:
        assert checkpoint is not None, "a run that is over has a checkpoint"
        return checkpoint, device
    if rank() == 0:
        many = f", {trainer.world_size} processes" if trainer.world_size > 1 else ""
        say(f"{summary(network)}; from step {first} to {optim.steps} on {device.type}{many}")
    try:
        with warnings.catch_warnings():
            # Lightning's own deprecations, and its surprise at the files of the run that is resumed.
            warnings.filterwarnings("ignore", message=".*LeafSpec.*")
            warnings.filterwarnings("ignore", message="Experiment logs directory .* exists")
            warnings.filterwarnings("ignore", message="You're resuming from a checkpoint that ended before the epoch")
            warnings.filterwarnings("ignore", message=r"Found \d+ module\(s\) in eval mode")  # frozen, and meant to be
            trainer.fit(learner, ckpt_path=checkpoint, weights_only=None if checkpoint is None else True)
    except SystemExit:
        # Lightning answers a second Ctrl-C with an exit of its own, without a word.
        if not trainer.interrupted:
            raise
        raise KeyboardInterrupt from None
    except RuntimeError as error:
        if (failure := loader_failure(error)) is not None:
            raise failure from error
        if not _out_of_memory(error):
            raise
        raise CanopyError(_remedy(recipe, learner, run)) from error
    step = trainer.global_step
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        # What follows is the first process's alone; it may take longer than the others would wait for it.
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()
    if step < optim.steps:
        _stopped(saver, step, optim.steps, run)
    return checkpoints(run)[0], device


def _trainer(
    recipe: TrainingRecipe, here: Processes, network: HeightNetwork, *, run: Path, first: int, callbacks: list[Callback]
) -> lightning.Trainer:
    optim = recipe.optim
    strategy: Any = "auto"
    many = here.devices == "auto" or here.devices * here.nodes > 1
    if optim.strategy == "fsdp":
        there = max(torch.cuda.device_count(), 1) if optim.accelerator != "cpu" else 1
        count = (there if here.devices == "auto" else here.devices) * here.nodes
        strategy = ModelParallelStrategy(data_parallel_size=count, tensor_parallel_size=1, save_distributed_checkpoint=False)
    elif many and here.devices != "auto":
        strategy = DDPStrategy(gradient_as_bucket_view=True)
    batch_norm = any(isinstance(module, _BatchNorm) for module in network.modules())
    version = f"from-{first:07d}"
    try:
        trainer = lightning.Trainer(
            accelerator=optim.accelerator,
            devices=here.devices,
            num_nodes=here.nodes,
            strategy=strategy,
            plugins=[here.environment(), *(c.io for c in callbacks if isinstance(c, Checkpoints))],
            precision=optim.precision,
            sync_batchnorm=batch_norm and optim.strategy != "fsdp",
            max_steps=optim.steps,
            max_epochs=-1,
            accumulate_grad_batches=optim.accumulate,
            log_every_n_steps=optim.log_every,
            logger=[
                CSVLogger(run, name="csv", version=version),
                TensorBoardLogger(str(run), name="tensorboard", version=version),
            ],
            callbacks=callbacks,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            # The batches already differ by rank, and a sampler of Lightning's would cut them again.
            use_distributed_sampler=False,
            default_root_dir=run,
        )
    except (MisconfigurationException, ValueError, RuntimeError) as error:
        raise RecipeError(
            f"accelerator {optim.accelerator!r} with {here.devices} devices and precision {optim.precision} cannot be had: "
            f"{' '.join(str(error).split()).rstrip('.')}; correct [optim], canopy doctor tells what is here"
        ) from error
    if batch_norm and trainer.world_size > 1 and (optim.strategy == "fsdp" or trainer.strategy.root_device.type == "cpu"):
        raise RecipeError(
            f"backbone {network.config.backbone!r} has batch norms, whose statistics {trainer.world_size} processes "
            f"share only on GPUs with strategy ddp; choose that, one process, or a backbone with layer norms"
        )
    return trainer


def _stopped(saver: Checkpoints, step: int, steps: int, run: Path) -> None:
    """Say how a run ended before its time.

    Raises:
        KeyboardInterrupt: after Ctrl-C.
        OutputError: otherwise.
    """
    line = f"training stopped at step {step} of {steps}; go on with --resume {run}"
    if saver.stopped_by == SIGINT:
        if rank() == 0:
            say(line)
        raise KeyboardInterrupt
    if saver.stopped_by:
        line = f"{line} (by {Signals(saver.stopped_by).name}, checkpoint written)"
    # SIGTERM is a cancelled job, or one that SLURM requeues itself.
    if saver.stopped_by == SIGUSR1 and rank() == 0:
        line = f"{line}; {requeue()}"
    raise OutputError(line)


def _out_of_memory(error: RuntimeError) -> bool:
    text = str(error)
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in text or "not enough memory" in text


def _remedy(recipe: TrainingRecipe, learner: HeightLearner, run: Path) -> str:
    """What to do when memory is out."""
    there = checkpoints(run)
    faster = [] if recipe.tuning.checkpointing else ["tuning.checkpointing = true"]
    if recipe.optim.strategy != "fsdp":
        faster.append('optim.strategy = "fsdp" on several devices')
    again = f"go on with --resume {run} and {' or '.join(faster)}, or " if there and faster else ""
    return (
        f"out of memory in the step after {learner.global_step} ({learner.batch}); "
        f"{f'checkpoint {there[0]} is kept' if there else 'there is no checkpoint yet'}; {again}"
        f"start anew with half the batch and twice the accumulate, or a smaller crop_px"
    )

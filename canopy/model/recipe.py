"""What to train, on what and how: the one TOML file of a training run.

Unknown keys are errors, and every default is a value that is written into the model folder with the rest. Paths of tile
sets are relative to the recipe's folder; environment variables in `${...}` are expanded when they are used.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final, Literal, Self

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    model_validator,
)

from canopy.metrics import CLASS_EDGES_M
from canopy.model.augmentation import Augmentation
from canopy.model.calibration import LEAST_PX, SPREAD_FLOOR_M
from canopy.model.data import HeightCategories
from canopy.model.losses import LossConfig
from canopy.model.network import NetworkConfig
from canopy.model.package import read_contract
from canopy.model.tuning import Tuning
from canopy.settings import read_settings
from canopy.tiler.recipe import resolve


class _Table(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class ModelTable(_Table):
    """What the model folder will say the model is; the fields are those of its contract."""

    name: str = Field(pattern=r"^[A-Za-z0-9_.-]+$")
    version: str = "1"
    description: str
    licence: str
    bands: tuple[str, ...] = ("red", "green", "blue")
    gsd_range_m: tuple[float, float]
    value_range: tuple[float, float] = (0.0, 255.0)
    mean: tuple[float, ...]
    """Per band, in the imagery's units."""
    std: tuple[float, ...]
    fill: Literal["mean", "mirror"] = "mean"
    """What the network sees where there is no usable imagery."""
    window_px: PositiveInt
    stride_px: PositiveInt
    weights_dtype: Literal["float32", "float16"] = "float32"
    network: NetworkConfig | None = None
    """None: that of `start_from`, for these bands; `read_recipe` fills it in."""
    pretrained: bool = False
    """Start from the backbone's published weights, which timm fetches."""
    start_from: str | None = None
    """Start from the weights of this model folder; bands, bins and drop rates of the network may differ."""
    not_for: tuple[str, ...] = ()
    """Uses the card warns of, besides those that follow from the measured figures."""

    @model_validator(mode="after")
    def _starts(self) -> Self:
        if self.network is None and self.start_from is None:
            raise ValueError("there is neither a [model.network] nor a model to start_from; give one of them")
        if self.pretrained and self.start_from is not None:
            raise ValueError("pretrained and start_from both fill the backbone; give one of them")
        return self

    def architecture(self) -> NetworkConfig:
        """The network, which a recipe that was read always has."""
        assert self.network is not None, "the recipe was not read by read_recipe"
        return self.network


class DataSet(_Table):
    """A tile set and what each of its splits is for. Chips of sites held out from training ignore `train`."""

    path: str
    """Folder of a built tile set."""
    share: PositiveFloat = 1.0
    """Share of the batches, relative to the other sets'."""
    batch: PositiveInt = 8
    """Samples in a batch, of all processes together."""
    crop_px: int = Field(default=256, ge=32, multiple_of=32)
    train: tuple[str, ...] = ("train",)
    calibrate: tuple[str, ...] = ("val",)
    """Splits whose chips fit the calibration table."""
    score: tuple[str, ...] = ("test",)
    """Splits whose chips give the model's published scores."""
    ships: bool = True
    """False: the set's licence allows scoring only, so nothing made from its pixels may go into weights or calibration."""
    exclude_sites: tuple[str, ...] = ()
    """Sites of the set that are used for nothing."""

    @model_validator(mode="after")
    def _apart(self) -> Self:
        if both := set(self.train) & {*self.calibrate, *self.score}:
            raise ValueError(f"split {min(both)!r} both trains and is held out; remove it from one of them")
        if not self.ships and (self.train or self.calibrate):
            raise ValueError("a set that does not ship can only be scored; set train = [] and calibrate = []")
        return self


class Data(_Table):
    """Where chips come from."""

    set: tuple[DataSet, ...] = Field(min_length=1)
    hold_out_sites: tuple[str, ...] = ()
    """Whole sites that training never sees, in any set and split."""
    hold_out_use: tuple[Literal["calibrate", "score"], ...] = ("score",)
    """What the chips of these sites are for."""
    workers: NonNegativeInt = 0
    """Loader processes of each training process; 0 loads in the training process itself."""
    cache_mb: NonNegativeInt = 2048
    """Memory for decoded chips, of all loader processes of a training process together."""


class Sampling(HeightCategories):
    """Height categories of all sets."""

    low_share: float = Field(default=0.1, ge=0, le=1)
    tall_share: float = Field(default=0.1, ge=0, le=1)


class Optim(_Table):
    """AdamW with linear warm-up and cosine decay, and the machine that it runs on."""

    steps: PositiveInt
    """Optimiser steps."""
    lr: PositiveFloat = 1e-3
    betas: tuple[float, float] = (0.9, 0.99)
    weight_decay: NonNegativeFloat = 0.01
    """Of matrices and kernels only; biases and norms are not decayed."""
    warm_up: float = Field(default=0.05, ge=0, lt=1)
    """Fraction of the steps."""
    final_lr_factor: float = Field(default=0.01, ge=0, le=1)
    """Learning rate at the last step over `lr`."""
    clip_norm: PositiveFloat = 1.0
    """Largest norm of the gradient."""
    ema_decay: float = Field(default=0.999, ge=0, lt=1)
    """Of the moving average of the weights, which is the model that is kept; 0 keeps the last weights."""
    accumulate: PositiveInt = 1
    """Batches per optimiser step."""
    checkpoint_every: PositiveInt = 100
    """Optimiser steps between checkpoints."""
    log_every: PositiveInt = 10
    threads: PositiveInt | None = None
    """CPU threads of torch; default torch's own choice."""
    precision: Literal["32-true", "bf16-mixed", "16-mixed"] = "32-true"
    """What the network computes in; weights, their average, the optimiser and the losses are float32 always.

    Why no weights in bfloat16: it has 8 bits, so a step of less than 1/256 of a weight would be lost, and most are.
    """
    compile: bool = False
    """Let torch compile the network: slow at the first step of each (batch, crop_px), faster ever after."""
    accelerator: str = "auto"
    """As Lightning calls them: cpu, gpu, mps or auto."""
    devices: PositiveInt | Literal["auto"] = "auto"
    """Processes per node, one per device; auto: as many as torchrun or SLURM started, else one per GPU, or one on a CPU."""
    nodes: PositiveInt | Literal["auto"] = "auto"
    """Machines; auto: as many as torchrun or SLURM has, else this one."""
    strategy: Literal["auto", "ddp", "fsdp"] = "auto"
    """With several processes: ddp (which auto is) holds everything in each, fsdp a part of the weights and of what the
    optimiser keeps, for networks that would not fit otherwise."""

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.strategy == "fsdp" and self.precision == "16-mixed":
            raise ValueError("strategy fsdp does not go with precision 16-mixed; choose bf16-mixed or 32-true")
        return self


class Calibrate(_Table):
    """How intervals are fitted."""

    nominal: float = Field(default=0.9, gt=0, lt=1)
    edges_m: tuple[float, ...] = CLASS_EDGES_M
    least_px: PositiveInt = LEAST_PX
    spread_floor_m: PositiveFloat = SPREAD_FLOOR_M


class Evaluate(_Table):
    """How the model is scored."""

    edges_m: tuple[float, ...] = CLASS_EDGES_M
    """Inner edges of the classes of true height."""
    forest_px_per_chip: PositiveInt = 500
    """Training pixels of one chip that the random-forest baseline sees."""
    forest_trees: PositiveInt = 60
    folds: tuple[str, ...] = ()
    """Sites whose scores and calibration come from the runs of this recipe with `--hold-out SITE`, finished before, so that
    each site is judged by a model that has not seen it."""


MACHINE: Final[dict[str, set[str]]] = {
    "optim": {"compile", "accelerator", "devices", "nodes", "strategy", "threads", "checkpoint_every", "log_every"},
    "tuning": {"checkpointing"},
    "data": {"workers", "cache_mb"},
}
"""Keys of a recipe that say where and how fast it trains, and decide no weight."""


class TrainingRecipe(_Table):
    """A training run as its author writes it."""

    seed: NonNegativeInt
    model: ModelTable
    data: Data
    augmentation: Augmentation = Augmentation()
    sampling: Sampling = Sampling()
    loss: LossConfig = LossConfig()
    tuning: Tuning = Tuning()
    optim: Optim
    calibrate: Calibrate = Calibrate()
    evaluate: Evaluate = Evaluate()

    @model_validator(mode="after")
    def _trains(self) -> Self:
        if not any(s.train for s in self.data.set):
            raise ValueError("no set has a split to train on; give at least one `train`")
        if both := set(self.evaluate.folds) & set(self.data.hold_out_sites):
            raise ValueError(
                f"evaluate.folds has {min(both)}, which data.hold_out_sites keeps from the model already; take it out of one"
            )
        if self.tuning.frozen_batch_norm and not (self.model.pretrained or self.model.start_from):
            raise ValueError("tuning.frozen_batch_norm keeps the statistics of a start, and there is none; give start_from")
        return self

    def sha256(self) -> str:
        """Digest of the recipe with all defaults filled in."""
        return _digest(self.model_dump(mode="json"))

    def run_sha256(self) -> str:
        """Digest of all that decides where a run goes: a run is resumed under the same one.

        Machine and speed are not in it, so a run that ran out of memory, or of its machine, goes on elsewhere, and neither
        is what happens after the last step.
        """
        return _digest(self.model_dump(mode="json", exclude={**MACHINE, "calibrate": True, "evaluate": True}))


def _digest(table: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(table, sort_keys=True).encode()).hexdigest()


def read_recipe(path: Path, *, hold_out: Sequence[str] = ()) -> TrainingRecipe:
    """Read and check a recipe.

    Args:
        path: TOML file.
        hold_out: Further sites to hold out, for leave-one-site-out runs; they become part of the model's name.

    Raises:
        RecipeError: missing or no TOML, an unknown key, or a value out of its range; the message names the key.
        ContractError: the network is that of `start_from`, which is no model folder.
    """
    recipe = read_settings(path, TrainingRecipe, what="a training recipe")
    model = recipe.model
    if model.network is None:
        assert model.start_from is not None, "checked by the table"
        network = read_contract(resolve(model.start_from, path.resolve().parent)).network
        network = network.model_copy(update={"in_channels": len(model.bands)})
        recipe = recipe.model_copy(update={"model": model.model_copy(update={"network": network})})
    return without(recipe, hold_out)


def without(recipe: TrainingRecipe, sites: Sequence[str]) -> TrainingRecipe:
    """The recipe with further sites held out and scored; its name says so, and it has no folds of its own."""
    further = [site for site in sites if site not in recipe.data.hold_out_sites]
    if not further:
        return recipe
    name = "-without-".join([recipe.model.name, *further])
    return recipe.model_copy(
        update={
            "model": recipe.model.model_copy(update={"name": name}),
            "data": recipe.data.model_copy(
                update={
                    "hold_out_sites": (*recipe.data.hold_out_sites, *further),
                    "hold_out_use": tuple(dict.fromkeys((*recipe.data.hold_out_use, "score"))),
                }
            ),
            "evaluate": recipe.evaluate.model_copy(update={"folds": ()}),
        }
    )

"""The predictions of a run for what it held out, kept in its folder; with those of the runs that held out one site each.

A model cannot be scored on its own training sites. The runs that leave one of them out can: each is a training of the same
recipe without that site, and what it says there stands for what the model would say at a site it has never seen. They are
made by `canopy train RECIPE --hold-out SITE`, and a recipe that names the sites in `evaluate.folds` is released with their
scores and calibrated on their predictions.

    <runs>/<name>/held_out.npz                     what the run of the recipe itself held out
    <runs>/<name>-without-<SITE>/held_out.npz      what the run without SITE held out, SITE among it

The file is a zip of arrays, so one chip is read at a time, and of `about.json`, which says what they are.
"""

from __future__ import annotations

import hashlib
import json
import zipfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, NonNegativeInt, ValidationError
from torch import nn

from canopy.errors import OutputError, RecipeError
from canopy.model.evaluate import ChipResult
from canopy.model.recipe import MACHINE, TrainingRecipe, without

FILE = "held_out.npz"
_ABOUT = "about.json"
_ARRAYS = ("counts", "true_m", "mean_m", "spread_m", "forest_m")


class _Value(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Chip(_Value):
    """A chip of the file; the fields are those of `ChipResult` that are no arrays."""

    id: str
    site: str
    crs: str
    gsd_m: float
    row_px: int
    col_px: int
    calibrates: bool
    scores: bool


class About(_Value):
    """What made the predictions."""

    format: Literal[1] = 1
    name: str
    """Of the recipe."""
    training_sha256: str
    """`training_sha256` of the recipe."""
    weights_sha256: str
    """`weights_sha256` of the network."""
    tile_sets: dict[str, str]
    """Name of each tile set of the recipe that is not for scores only -> SHA-256 of its index."""
    trained_sites: tuple[str, ...]
    """Sites of the training chips, those of the model that training started from included."""
    start_sha256: str = ""
    """SHA-256 of the weight file of that model, if there is one."""
    training_mean_m: float
    """What the constant baseline says."""
    forest_px: NonNegativeInt
    """Training pixels that the random forest saw."""
    chips: tuple[Chip, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class HeldOut:
    """A file of predictions, read chip by chip each time it is walked through."""

    path: Path
    about: About
    site: str | None = None
    """Only the chips of this site."""

    def __iter__(self) -> Iterator[ChipResult]:
        """The chips in the order in which they were predicted."""
        with zipfile.ZipFile(self.path) as file:
            for number, chip in enumerate(self.about.chips):
                if self.site is None or chip.site == self.site:
                    arrays: dict[str, Any] = {}
                    for name in _ARRAYS:
                        with file.open(_member(number, name)) as member:
                            arrays[name] = np.lib.format.read_array(member, allow_pickle=False)
                    yield ChipResult(**chip.model_dump(), **arrays)


def _member(number: int, name: str) -> str:
    return f"{number:06d}/{name}.npy"


def write_held_out(run: Path, about: About, chips: Iterable[ChipResult]) -> HeldOut:
    """Write the file chip by chip; it takes its name when it is whole.

    Raises:
        OutputError: it cannot be written.
    """
    path, part = run / FILE, run / f".{FILE}.part"
    written = []
    try:
        run.mkdir(parents=True, exist_ok=True)
        with zipfile.ZipFile(part, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as file:
            for number, chip in enumerate(chips):
                for name in _ARRAYS:
                    with file.open(_member(number, name), "w") as member:
                        np.lib.format.write_array(member, getattr(chip, name), allow_pickle=False)
                written.append(Chip(**{name: getattr(chip, name) for name in Chip.model_fields}))
            about = about.model_copy(update={"chips": tuple(written)})
            file.writestr(_ABOUT, about.model_dump_json(indent=1))
        part.replace(path)
    except OSError as error:
        raise OutputError(
            f"cannot write {path} ({error.strerror}); free disk space and go on with --resume {run}"
        ) from error
    finally:
        if run.is_dir():
            part.unlink(missing_ok=True)
    return HeldOut(path=path, about=about)


def read_held_out(path: Path) -> HeldOut:
    """Open a file of predictions.

    Raises:
        RecipeError: no such file, or not one that this version reads.
    """
    try:
        with zipfile.ZipFile(path) as file:
            return HeldOut(path=path, about=About.model_validate_json(file.read(_ABOUT)))
    except FileNotFoundError as error:
        raise RecipeError(f"{path} does not exist; make it with canopy train RECIPE --hold-out SITE") from error
    except (OSError, zipfile.BadZipFile, KeyError, ValidationError) as error:
        raise RecipeError(
            f"{path} is no file of held-out predictions of this version; remove its run and train it again"
        ) from error


# --- what makes two runs the same training -------------------------------------------------------------------------------

_NOT_TRAINING = {
    **MACHINE,
    "model": {"name", "version", "description", "licence", "not_for", "weights_dtype"},
    "data": MACHINE["data"] | {"set", "hold_out_use"},
    "calibrate": ...,
    "evaluate": {"folds", "edges_m"},
}  # fmt: skip
"""What of a recipe decides neither the weights nor the baselines: how the model is named, where it is trained, what is done
with what it held out."""


def training_sha256(recipe: TrainingRecipe) -> str:
    """Digest of what of a recipe decides the weights and the baselines.

    Two recipes that agree in it train the same model, so the description, the sets that are scored only, and the calibration
    of a recipe may change without a new training of its folds.
    """
    table: dict[str, Any] = recipe.model_dump(mode="json", exclude=_NOT_TRAINING)  # type: ignore[arg-type]
    held_out = set(recipe.data.hold_out_sites)
    table["data"]["hold_out_sites"] = sorted(held_out)
    table["data"]["set"] = [
        {
            "name": Path(s.path).name, "share": s.share, "batch": s.batch, "crop_px": s.crop_px, "train": sorted(s.train),
            "exclude_sites": sorted({*s.exclude_sites} - held_out),
        }
        for s in recipe.data.set
        if s.train
    ]  # fmt: skip
    return hashlib.sha256(json.dumps(table, sort_keys=True).encode()).hexdigest()


def weights_sha256(network: nn.Module) -> str:
    """Digest of a network's parameters and buffers, whatever device they are on."""
    digest = hashlib.sha256()
    for name, tensor in sorted(network.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


# --- folds ---------------------------------------------------------------------------------------------------------------


def fold_run(run: Path, name: str, site: str) -> Path:
    """The run folder of the training without `site`, beside that of the recipe."""
    return run.parent / f"{name}-without-{site}"


def read_folds(recipe: TrainingRecipe, about: About, *, run: Path) -> list[HeldOut]:
    """The predictions of the recipe's folds, each for its own site.

    Args:
        recipe: With the sites in `evaluate.folds`.
        about: What the recipe's own run says of itself.
        run: Its folder.

    Raises:
        RecipeError: a fold is missing, or of another recipe or other tile sets; the message names the command to run.
    """
    found = []
    for site in recipe.evaluate.folds:
        folder = fold_run(run, recipe.model.name, site)
        remedy = (
            f"train it with: canopy train RECIPE --hold-out {site}, and then write the model with: "
            f"canopy train RECIPE --resume {run}"
        )
        if not (folder / FILE).is_file():
            raise RecipeError(f"the run without {site} is not there ({folder / FILE} is missing); {remedy}")
        fold = read_held_out(folder / FILE)
        if fold.about.training_sha256 != training_sha256(without(recipe, [site])):
            raise RecipeError(f"{folder} is a run of another recipe than this one without {site}; remove it and {remedy}")
        if other := sorted(n for n, digest in fold.about.tile_sets.items() if about.tile_sets.get(n, digest) != digest):
            raise RecipeError(
                f"{folder} was trained on another tile set {other[0]!r} than there is now; remove it and {remedy}"
            )
        if fold.about.start_sha256 != about.start_sha256:
            raise RecipeError(f"{folder} started from other weights than {run}; remove it and {remedy}")
        if site in fold.about.trained_sites:
            raise RecipeError(
                f"{folder} has seen {site}, in the model that it started from; start from one that has not, and {remedy}"
            )
        if not any(chip.site == site for chip in fold.about.chips):
            raise RecipeError(f"{folder / FILE} holds no chip of {site}; remove it and {remedy}")
        found.append(HeldOut(path=fold.path, about=fold.about, site=site))
    return found

"""Scoring a submission: the task against its key, the submission against what is sealed, the heights against the labels."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final, Literal

import numpy as np
from numpy.typing import NDArray
from pyproj import Transformer
from rasterio.enums import Resampling

from canopy.errors import CanopyError, OutputError, SealError
from canopy.metrics import HeightSums
from canopy.model.package import CONTRACT, WEIGHTS, Contract, read_contract
from canopy.raster import Raster, open_raster, warp
from canopy.score.sealed.confine import Ran, refuse_within_reach
from canopy.score.sealed.headroom import HIGH, LOW, Cell, Headroom, RegionSums, headroom
from canopy.score.sealed.key import Key, SealedChip, open_key
from canopy.score.sealed.kinship import parameters_in
from canopy.score.sealed.lineage import audit_lineage
from canopy.score.sealed.predict import Predict, Predictions, predictions, run_model
from canopy.score.sealed.scorer import Scorer
from canopy.score.sealed.seal import add_chip
from canopy.score.sealed.submission import Reason, Submission, part_of, read_submission, suspicious_files
from canopy.score.sealed.task import IMAGES, Task, read_chips, read_leaves, read_task
from canopy.textfile import write_text

SEED: Final = 20_260_101
"""The draws of the bootstrap: the same for everybody, so that a score is the same whoever computes it."""

Heights = Callable[[SealedChip], NDArray[np.float32]]
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """What the judge says."""

    task: Task
    submission: Submission
    reasons: tuple[Reason, ...]
    """Why it was turned down; empty: it was not."""
    notes: tuple[str, ...]
    """What could not be checked, or should be known."""
    score: Headroom
    """Of the submission, or of the base model where it was turned down."""
    ran: Ran | None
    """How the model's process ended; None where none was started."""

    @property
    def status(self) -> Literal["scored", "fallback"]:
        """Whether the score is the submission's own."""
        return "fallback" if self.reasons else "scored"

    def as_json(self) -> dict[str, Any]:
        """Values that JSON holds; what does not exist is null."""
        score, task = self.score, self.task
        total, base = (_total(score.cells, part) for part in ("submission", "base"))
        return {
            "task": task.name,
            "root": task.root,
            "scorer": task.scorer.digest,
            "submission": self.submission.name,
            "kind": self.submission.kind,
            "status": self.status,
            "reasons": [asdict(reason) for reason in self.reasons],
            "notes": list(self.notes),
            "score": score.value,
            "interval_95": None if score.interval_95 is None else list(score.interval_95),
            "no_interval": score.no_interval,
            "unclipped": score.unclipped,
            "regions": dict(score.regions),
            "cells": [_cell(cell) for cell in score.cells],
            "total": _summary(total),
            "base_total": _summary(base),
            "missing_px": score.missing,
            "conventions": {
                "score": f"mean over regions of the mean over height classes of (base MAE - MAE) / (base MAE - floor), "
                f"clipped to [{LOW:g}, {HIGH:g}] in each; 0 is the base model, 1 the floor",
                "bias": "prediction minus reference; positive is too tall",
                "height": "metres above ground, classes of reference height",
                "missing": "a pixel without a prediction counts with the base model's",
                "interval": f"bootstrap over squares of {task.rules.square_m:g} m, drawn within each region, seed {SEED}",
            },
            "budget": {"stated": task.budget.model_dump(), "base": task.base.model_dump(), "measured": _measured(self.ran)},
        }

    def as_text(self) -> str:
        """The result to read."""
        score = self.score
        head = f"{self.submission.name} on {self.task.name}: "
        if self.reasons:
            lines = [head + f"turned down, the score is that of the base model {self.task.base.name}"]
            lines += [f"  {reason.check}: {reason.said}" for reason in self.reasons]
        else:
            lines = [head + f"headroom {score.value:+.3f}{_interval(score)}"]
        lines += [f"note: {note}" for note in self.notes]
        lines.append("0 is the base model, 1 the floor; bias is prediction minus reference")
        row = "{:<12} {:<9} {:>9} {:>8} {:>8} {:>8} {:>8} {:>9}"
        lines.append(row.format("region", "class", "pixels", "floor m", "base m", "MAE m", "bias m", "headroom"))
        for cell in score.cells:
            if not cell.base.n:
                continue
            said = "-" if cell.left_out else f"{cell.headroom:+.3f}"
            floor = "-" if cell.floor_m is None else f"{cell.floor_m:.2f}"
            own, base = cell.submission, cell.base
            numbers = (f"{own.n}", floor, f"{base.mae_m:.2f}", f"{own.mae_m:.2f}", f"{own.bias_m:+.2f}", said)
            lines.append(row.format(cell.region, cell.height_class, *numbers))
        left_out = [cell for cell in score.cells if cell.left_out and cell.base.n]
        lines += [f"not scored: {cell.region}, {cell.height_class}: {cell.left_out}" for cell in left_out]
        lines += [f"{name}: headroom {value:+.3f}" for name, value in score.regions.items()]
        total, base = (_total(score.cells, part) for part in ("submission", "base"))
        lines.append(
            f"all pixels: MAE {total.mae_m:.2f} m, RMSE {total.rmse_m:.2f} m, bias {total.bias_m:+.2f} m "
            f"(base model {base.mae_m:.2f}, {base.rmse_m:.2f}, {base.bias_m:+.2f} m)"
        )
        if score.missing:
            lines.append(f"{score.missing} pixels without a prediction count with the base model's")
        if self.ran is not None:
            budget = self.task.budget
            lines.append(
                f"{self.ran.seconds:.1f} of {budget.seconds:g} s, {self.ran.memory_mib} of {budget.memory_mib} MiB; "
                f"{self.ran.means}"
            )
        return "\n".join(lines)


def judge(
    task_folder: Path,
    key_path: Path,
    submission_folder: Path,
    *,
    predict: Predict = run_model,
    scorer: Scorer | None = None,
    progress: Progress | None = None,
) -> Verdict:
    """Score a submission.

    Args:
        task_folder: The public task.
        key_path: Its key.
        submission_folder: What was handed in.
        predict: What runs a model.
        scorer: The scorer that runs; default the one that does.
        progress: Called with a stage, what is done of it and how much there is.

    Raises:
        SealError: another scorer than the pinned one, a task or key that was changed, or a submission that is none.
    """
    task = read_task(task_folder)
    (Scorer.here() if scorer is None else scorer).refuse_other(task.scorer)
    submission = read_submission(submission_folder)
    if submission.kind not in task.rules.accepts:
        raise SealError(f"{submission.name} is a {submission.kind}, but the task accepts {', '.join(task.rules.accepts)}")
    with open_key(key_path) as key:
        key.refuse_other(task, read_leaves(task_folder))
        read_chips(task_folder, task)
        refuse_within_reach(key_path, (task_folder, submission_folder))
        reasons = suspicious_files(submission_folder, key_path)
        contract, problems = _contract(submission_folder, submission)
        reasons += problems
        reasons += audit_lineage(submission_folder, submission, contract, task, key)
        if submission.kind == "model":
            reasons += _too_large(submission_folder, submission, task)
        notes = [] if submission.kind == "model" else [
            f"how the {submission.kind} came about is what its makers say: no budget was measured, no contract compared"
        ]  # fmt: skip
        ran = None
        found: Headroom | None = None
        if not reasons:
            try:
                with _heights(task_folder, submission_folder, submission, task, predict) as (ran, heights):
                    if ran is not None:
                        reasons += _ended(ran, task)
                        notes += [] if ran.means.startswith("Landlock") else [f"the model's process had {ran.means}"]
                    if not reasons:
                        found = _score(key, heights, progress)
            except CanopyError as error:
                reasons.append(Reason(check="run", said=str(error)))
        if found is None:
            found = _score(key, None, progress)
    return Verdict(task=task, submission=submission, reasons=tuple(reasons), notes=tuple(notes), score=found, ran=ran)


def write_verdict(verdict: Verdict, path: Path) -> Path:
    """Write the result as JSON.

    Raises:
        OutputError: it cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"cannot create {path.parent} ({error.strerror}); choose another place with --out") from error
    write_text(path, json.dumps(verdict.as_json(), indent=2, allow_nan=False) + "\n")
    return path


# --- before anything is run ----------------------------------------------------------------------------------------------


def _contract(folder: Path, submission: Submission) -> tuple[Contract | None, list[Reason]]:
    place = part_of(folder, submission.path)
    if place is None:
        said = f"{submission.path} is declared as its {submission.kind}, but is not in the submission"
        return None, [Reason(check="files", said=said)]
    if submission.kind != "model":
        return None, []
    if (place / CONTRACT).is_symlink():
        return None, []  # told as a link already
    try:
        return read_contract(place), []
    except CanopyError as error:
        return None, [Reason(check="files", said=str(error))]


def _too_large(folder: Path, submission: Submission, task: Task) -> list[Reason]:
    place = part_of(folder, submission.path)
    if place is None or not (place / WEIGHTS).is_file() or (place / WEIGHTS).is_symlink():
        return []
    try:
        count = parameters_in(place / WEIGHTS)
    except SealError:
        return []  # told by the lineage, which reads the weights too
    if count <= task.budget.parameters:
        return []
    return [Reason(check="budget", said=f"its weights are {count:,} numbers, the budget is {task.budget.parameters:,}")]


def _ended(ran: Ran, task: Task) -> list[Reason]:
    budget = task.budget
    if ran.ended == "out of time":
        return [
            Reason(
                check="budget", said=f"its process was ended after {ran.seconds:.0f} s, the budget is {budget.seconds:g} s"
            )
        ]
    if ran.ended == "out of memory":
        return [Reason(check="budget", said=f"its process took {ran.memory_mib} MiB, the budget is {budget.memory_mib} MiB")]
    if ran.code:
        return [Reason(check="run", said=f"its process ended with {ran.code}: {ran.said or 'nothing was said'}")]
    return []


# --- heights -------------------------------------------------------------------------------------------------------------


@contextmanager
def _heights(
    task_folder: Path, folder: Path, submission: Submission, task: Task, predict: Predict
) -> Iterator[tuple[Ran | None, Heights]]:
    """How the heights were had, and a function that gives those of a chip."""
    place = part_of(folder, submission.path)
    assert place is not None, "a submission without its heights has been turned down"
    match submission.kind:
        case "model":
            with predictions(place, task_folder / IMAGES, task.budget, predict=predict) as (ran, found):
                yield ran, lambda chip: found.heights(chip.name, chip.shape)
        case "predictions":
            arrays = Predictions(folder=place)
            yield None, lambda chip: arrays.heights(chip.name, chip.shape)
        case "map":
            with open_raster(place) as raster:
                if raster.driver != "GTiff" or raster.dtype != "float32":
                    raise SealError(
                        f"{submission.path} is {raster.driver} of {raster.dtype}; hand in a GeoTIFF of float32 metres"
                    )
                yield None, lambda chip: _cut(raster, chip)


def _cut(raster: Raster, chip: SealedChip) -> NDArray[np.float32]:
    """A map on the pixels of a chip: averaged where it is finer, bilinear where it is not."""
    target, source = chip.grid, raster.grid
    across = Transformer.from_crs(target.crs, source.crs, always_xy=True)
    left, bottom, right, top = across.transform_bounds(*target.bounds)
    if not all(math.isfinite(v) for v in (left, bottom, right, top)):
        return np.full(chip.shape, np.nan, np.float32)
    cols, rows = source.pixel(np.array([left, right, left, right]), np.array([top, top, bottom, bottom]))
    col, row = math.floor(cols.min()) - 2, math.floor(rows.min()) - 2
    shape = (math.ceil(rows.max()) + 2 - row, math.ceil(cols.max()) + 2 - col)
    if row >= raster.shape[0] or col >= raster.shape[1] or row + shape[0] <= 0 or col + shape[1] <= 0:
        return np.full(chip.shape, np.nan, np.float32)
    pixels = raster.read(row, col, shape, (1,))
    finer = shape[0] * shape[1] > chip.shape[0] * chip.shape[1] * 1.5
    kernel = Resampling.average if finer else Resampling.bilinear
    on_chip = warp(pixels, source.crop(row, col, shape), target, resampling=kernel)
    return np.where(on_chip.valid, on_chip.data[0], np.float32(np.nan)).astype(np.float32)


def _score(key: Key, heights: Heights | None, progress: Progress | None) -> Headroom:
    """The score of heights, or of the base model."""
    record = key.record
    rules = record.task.rules
    regions = {region: RegionSums(edges_m=rules.class_edges_m) for region in record.task.regions}
    for number, chip in enumerate(record.chips, 1):
        base_m, label_m = key.array(f"base/{chip.name}"), key.array(f"height/{chip.name}")
        heights_m = base_m if heights is None else heights(chip)
        add_chip(regions[chip.region], chip, heights_m=heights_m, base_m=base_m, label_m=label_m, rules=rules)
        if progress is not None:
            progress("chips", number, len(record.chips))
    found = headroom(regions, record.floor_m, least_px=rules.least_px, generator=np.random.default_rng(SEED))
    assert found is not None, "a task without a cell to score is not sealed"
    return found


# --- in words ------------------------------------------------------------------------------------------------------------


def _total(cells: tuple[Cell, ...], part: str) -> HeightSums:
    return sum((getattr(cell, part) for cell in cells), HeightSums())


def _summary(sums: HeightSums) -> dict[str, float | int | None]:
    return {name: None if math.isnan(value) else value for name, value in sums.summary().items()}


def _cell(cell: Cell) -> dict[str, Any]:
    return {
        "region": cell.region, "height_class": cell.height_class, "floor_m": cell.floor_m,
        "base": _summary(cell.base), "submission": _summary(cell.submission), "left_out": cell.left_out,
        "headroom": None if cell.left_out else cell.headroom, "unclipped": None if cell.left_out else cell.raw,
    }  # fmt: skip


def _measured(ran: Ran | None) -> dict[str, Any] | None:
    return None if ran is None else asdict(ran)


def _interval(score: Headroom) -> str:
    if score.interval_95 is None:
        return f" (no interval: {score.no_interval})"
    low, high = score.interval_95
    return f" [{low:+.3f}, {high:+.3f}]"

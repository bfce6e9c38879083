"""Checkpoints of a run: written whole or not at all, checked before they are trusted, the last two kept.

A checkpoint is one file with everything in full: weights, their average, the optimiser, the schedule, the step. FSDP
gathers its parts for it, so any number of processes, with or without FSDP, goes on from it.

Why one full file and no sharded one: the largest network here, a ViT-L with AdamW and an average, is 5 GB, seconds to
gather and write; and a run that is stopped on eight nodes can go on on one.
"""

from __future__ import annotations

import os
import zipfile
from pathlib import Path
from typing import Any

import lightning
import torch
from lightning.fabric.plugins import CheckpointIO
from lightning.pytorch.callbacks import Callback

from canopy.errors import OutputError
from canopy.model.processes import STOPPING, Stopping

KEPT = 2
"""The newest and the one before, should the newest turn out to be damaged."""


def checkpoint_path(run: Path, step: int) -> Path:
    """The checkpoint after `step` steps of the optimiser."""
    return run / "checkpoints" / f"step-{step:07d}.ckpt"


def checkpoints(run: Path) -> list[Path]:
    """The checkpoints of a run, the newest first."""
    return sorted((run / "checkpoints").glob("step-*.ckpt"), reverse=True)


def damage(path: Path) -> str | None:
    """What is wrong with a checkpoint file, or None: torch's files are zip archives with a checksum for each tensor."""
    try:
        with zipfile.ZipFile(path) as archive:
            bad = archive.testzip()
    except (zipfile.BadZipFile, OSError) as error:
        return str(error)
    return None if bad is None else f"checksum of {bad} differs"


def read_checkpoint(path: Path) -> dict[str, Any]:
    """The content of a checkpoint; tensors stay on disk until they are used."""
    content: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    return content


class WholeFiles(CheckpointIO):
    """Writes beside the final name, waits for the disk, then renames; a failure is noted, for all processes to hear of."""

    def __init__(self) -> None:
        self.failure = ""
        """Why the last checkpoint was not written."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any | None = None) -> None:
        """Write a checkpoint, or leave nothing and say why in `failure`."""
        assert storage_options is None, "checkpoints are local files"
        path = Path(path)
        part = path.with_name(f".{path.name}.partial")
        self.failure = ""
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with part.open("wb") as file:
                torch.save(checkpoint, file)
                file.flush()
                os.fsync(file.fileno())
            part.replace(path)
        except (OSError, RuntimeError) as error:  # torch wraps what the disk says in a RuntimeError
            self.failure = str(error.__cause__ or error.__context__ or error).splitlines()[0]
            part.unlink(missing_ok=True)

    def load_checkpoint(
        self, path: str | Path, map_location: Any | None = None, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Read a checkpoint."""
        assert weights_only in {None, True}, "checkpoints hold tensors and numbers only"
        content: dict[str, Any] = torch.load(path, map_location=map_location or "cpu", weights_only=True)
        return content

    def remove_checkpoint(self, path: str | Path) -> None:
        """Delete a checkpoint."""
        Path(path).unlink(missing_ok=True)


class Checkpoints(Callback):
    """Saves every so many steps, at the last, and before stopping for a signal; always between two steps."""

    def __init__(self, run: Path, every: int, io: WholeFiles) -> None:
        self.run, self.every, self.io = run, every, io
        self.stopping = Stopping()
        self.stopped_by = 0
        """Number of the signal that ended the run in some process, 0 if none did."""
        self.step = self.saved = -1
        """The step that was last looked at, and that of the last checkpoint."""

    def on_train_start(self, trainer: lightning.Trainer, *_: Any) -> None:
        """Listen to signals, now that Lightning has put its own listeners in place."""
        self.step = trainer.global_step
        if trainer.is_global_zero:
            for path in (self.run / "checkpoints").glob(".*.partial"):
                path.unlink()  # of a process that was killed while it wrote
        self.stopping.watch()

    def on_train_batch_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, *_: Any) -> None:
        """Save and stop where it is time to; batches within a step are passed over."""
        step = trainer.global_step
        if step == self.step:
            return
        self.step = step
        # A signal may reach one process only, or each in another step; all have to stop in the same.
        mine = STOPPING.index(self.stopping.signal) + 1 if self.stopping.signal else 0
        strongest = int(trainer.strategy.reduce(torch.tensor(mine, device=pl_module.device), reduce_op="max"))
        if strongest:
            self.stopped_by = STOPPING[strongest - 1]
            trainer.should_stop = True
        if strongest or step % self.every == 0 or step == trainer.max_steps:
            self.save(trainer)

    def on_train_end(self, trainer: lightning.Trainer, *_: Any) -> None:
        """Save where another callback stopped the run."""
        if trainer.global_step not in {0, self.saved}:
            self.save(trainer)
        self.stopping.release()

    def on_exception(self, *_: Any) -> None:
        """Hand the signals back."""
        self.stopping.release()

    def save(self, trainer: lightning.Trainer) -> None:
        """Write a checkpoint and drop those that are too old.

        Raises:
            OutputError: in all processes, when the one that writes could not.
        """
        step = trainer.global_step
        trainer.save_checkpoint(checkpoint_path(self.run, step), weights_only=False)
        if failure := trainer.strategy.broadcast(self.io.failure):
            there = checkpoints(self.run)
            last = f"{there[0]} is kept; free space and go on with --resume {self.run}" if there else "there is none yet"
            raise OutputError(f"the checkpoint of step {step} could not be written to {self.run} ({failure}); {last}")
        self.saved = step
        if trainer.is_global_zero:
            for path in checkpoints(self.run)[KEPT:]:
                path.unlink()

"""What a submitted or base model says of the images of a task: staged, run apart from everything, read with suspicion."""

from __future__ import annotations

import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from canopy.errors import SealError
from canopy.model.package import FILES
from canopy.score.sealed import runner
from canopy.score.sealed.confine import Ran, run
from canopy.score.sealed.task import Budget

Predict = Callable[[Path, Path, Path, Budget], Ran]
"""Called with a model folder, a folder of images, an empty folder for heights, and the budget."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Predictions:
    """A folder of arrays of heights, one a chip."""

    folder: Path

    def heights(self, name: str, shape: tuple[int, int]) -> NDArray[np.float32]:
        """(row, col) float32 heights of a chip in metres, NaN = no prediction.

        Raises:
            SealError: the file is missing, a link, no such array, or holds infinite heights.
        """
        path = self.folder / f"{name}.npy"
        if path.is_symlink() or not path.is_file():
            raise SealError(f"{path.name} is missing from the predictions; write one .npy a chip, NaN where nothing is said")
        try:
            array = np.load(path, allow_pickle=False)
        except (ValueError, OSError, EOFError) as error:
            raise SealError(f"{path.name} is no .npy array of numbers; save float32 heights with numpy.save") from error
        if not isinstance(array, np.ndarray) or array.dtype != np.float32 or array.shape != shape:
            found = f"{array.dtype} {array.shape}" if isinstance(array, np.ndarray) else "an archive"
            raise SealError(f"{path.name} is {found}, not float32 {shape}; write heights in metres on the chip's pixels")
        if np.isinf(array).any():
            raise SealError(f"{path.name} holds infinite heights; write NaN where nothing is known")
        return array


def run_model(model: Path, images: Path, out: Path, budget: Budget) -> Ran:
    """Run a model folder in a confined process."""
    command = [sys.executable, "-I", "-B", runner.__file__, str(model), str(images), str(out), str(budget.threads)]
    return run(command, read=[model, images], write=out, budget=budget)


@contextmanager
def predictions(
    model: Path, images: Path, budget: Budget, *, predict: Predict = run_model
) -> Iterator[tuple[Ran, Predictions]]:
    """Predict all images of a folder with copies of model and images, in a temporary folder that holds nothing else.

    Args:
        model: Model folder; its four files are copied, and nothing else that it may hold.
        images: Folder of images.
        budget: What it may take.
        predict: What runs the model.
    """
    with tempfile.TemporaryDirectory(prefix="canopy-sealed-") as name:
        room = Path(name).resolve()
        staged, seen, out = (room / part for part in ("model", "image", "heights"))
        for folder in (staged, out):
            folder.mkdir()
        for file in FILES:
            if (model / file).is_file() and not (model / file).is_symlink():
                shutil.copyfile(model / file, staged / file)
        shutil.copytree(images, seen)
        yield predict(staged, seen, out, budget), Predictions(folder=out)

"""How many windows go through a network at once: on a GPU in one batch, on a CPU side by side on its cores.

On a CPU every window has a core to itself. A kernel that shares a window among threads splits its sums by their number, so
heights would depend on the machine (by 1e-5 m, enough to move a rounded pixel), and threads that wait for each other at the
end of every layer lose time. Windows side by side do neither.

On a GPU the batch that makes most of the device is searched for once, in seconds, and remembered in the user's cache folder
for this device and model.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import time
import uuid
from concurrent.futures import Future, wait
from dataclasses import dataclass, replace
from itertools import takewhile
from pathlib import Path
from typing import Any

import numpy as np
import platformdirs
import psutil
import torch
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from canopy.errors import ContractError, DeviceMemoryError
from canopy.model.package import Contract
from canopy.mosaicker.ensemble import Ensemble
from canopy.raster import delete

MOST = 256
"""The search for a batch ends here; no device is left idle by so many windows."""

GAIN = 0.03
"""The search ends when twice as many windows at once save less of the time of each than this."""

SHARE_OF_MEMORY = 0.7
"""How much of the memory that is free on a CPU's machine windows side by side may take; the rest is for reading, writing and
the system's file cache."""

_SAMPLE_S = 0.002


@dataclass(slots=True, kw_only=True)
class Batch:
    """Windows at once; made by `find_batch` once for a run. It changes when memory runs out, and then for the run's rest."""

    size: int
    """Windows in one forward pass, a fixed shape; 1 on a CPU."""
    lanes: int | None = 1
    """Threads that each have a window on a CPU; 1 on a GPU. None: as many as cores and memory allow, not known before the
    first window."""
    found: str = "given"
    """Where the size comes from, for records of runs."""
    remembered: Path | None = None
    """The file in the cache folder that the size comes from or went to."""

    def halve(self) -> None:
        """Go on with half the windows at once, and remember that for the next run."""
        assert self.size > 1, "a batch of one window cannot be halved"
        self.size //= 2
        self.found = "halved when the device ran out of memory"
        if self.remembered is not None:
            _remember(self.remembered, _Memory.model_validate_json(self.remembered.read_bytes()), size=self.size)

    def record(self) -> dict[str, Any]:
        """As a table for JSON."""
        return {
            "windows_at_once": self.size * (self.lanes or 1),
            "batch": self.size,
            "lanes": self.lanes,
            "found": self.found,
        }


def find_batch(ensemble: Ensemble, batch: int | None = None) -> Batch:
    """Windows at once for `ensemble` on its device.

    Args:
        ensemble: The model or models.
        batch: Windows in one forward pass; None: 1 on a CPU; elsewhere what an earlier run found for this device and model,
            else what a search of some seconds finds now.

    Raises:
        ContractError: `batch` is below 1, or above 1 on a CPU.
        DeviceMemoryError: the device has not enough memory for a single window.
    """
    device = ensemble.device
    if batch is not None and (batch < 1 or (batch > 1 and device.type == "cpu")):
        limit = (
            "must be 1 on a CPU, where heights would change with a window's place in the batch"
            if batch > 1
            else "is below 1"
        )
        raise ContractError(f"batch {batch} {limit}; leave it out, or give a number of windows for a GPU")
    if device.type == "cpu":
        return Batch(size=1, lanes=None, found="one window a core")
    if batch is not None:
        return Batch(size=batch)
    path = platformdirs.user_cache_path("canopy") / "batch" / f"{_key(ensemble)}.json"
    return recall(path) or search(ensemble, path)


# --- the search ----------------------------------------------------------------------------------------------------------


def search(ensemble: Ensemble, path: Path) -> Batch:
    """The smallest batch at which a window takes no more than `GAIN` over the least time, remembered in `path`.

    Batches are doubled from 1 until memory ends or doubling saves less than `GAIN`.

    Raises:
        DeviceMemoryError: not even one window fits.
    """
    # What is compiled is compiled anew for every shape, in minutes; the plain network fills the device as well.
    plain = replace(ensemble, models=tuple(replace(model, compiled=None) for model in ensemble.models))
    taken_s: dict[int, float] = {}
    for size in takewhile(lambda size: size <= MOST, (2**power for power in range(64))):
        try:
            taken_s[size] = _window_s(plain, size)
        except DeviceMemoryError:
            if size == 1:
                raise
        free_memory(ensemble.device)
        if size not in taken_s or (size > 1 and taken_s[size] > (1 - GAIN) * taken_s[size // 2]):
            break
    least_s = min(taken_s.values())
    best = next(size for size, seconds in taken_s.items() if seconds <= least_s * (1 + GAIN))
    memory = _Memory(
        device=_device_name(ensemble.device), model=ensemble.name, batch=best,
        window_ms={size: round(1e3 * seconds, 4) for size, seconds in taken_s.items()},
    )  # fmt: skip
    batch = Batch(size=best, found=f"searched among {', '.join(map(str, taken_s))}")
    try:
        _remember(path, memory, size=best)
    except OSError as error:  # a home that is read-only or full takes nothing from the run but the next search
        batch.found += f", not remembered ({error.strerror}: {path})"
    else:
        batch.remembered = path
    return batch


def recall(path: Path) -> Batch | None:
    """What an earlier search remembered in `path`; None where there is nothing, or nothing of this layout."""
    try:
        memory = _Memory.model_validate_json(path.read_bytes())
    except (OSError, ValidationError):
        return None
    return Batch(size=memory.batch, found="remembered", remembered=path)


class _Memory(BaseModel):
    """What is remembered of a search."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    device: str
    model: str
    batch: int = Field(ge=1)
    window_ms: dict[int, float]
    """Batch -> milliseconds a window."""


def _remember(path: Path, memory: _Memory, *, size: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}")  # several runs may search at the same time
    try:
        part.write_text(memory.model_copy(update={"batch": size}).model_dump_json(indent=2) + "\n")
        part.replace(path)
    finally:
        delete(part)


def _key(ensemble: Ensemble) -> str:
    """Digest of all that decides what fits and how long it takes; turns do not, they follow one another."""
    parts = {
        "device": _device_name(ensemble.device), "torch": torch.__version__, "precision": ensemble.precision,
        "weights": [model.contract.weights_sha256 for model in ensemble.models], "window_px": ensemble.contract.window_px,
    }  # fmt: skip
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:32]


def _device_name(device: torch.device) -> str:
    if device.type != "cuda":
        return device.type
    properties = torch.cuda.get_device_properties(device)
    return f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB"


def _window_s(ensemble: Ensemble, size: int) -> float:
    """Seconds a window in batches of `size`, the better of two after one that chooses kernels."""
    images = sample_windows(ensemble.contract, size)
    taken = []
    for _ in range(3):
        start = time.perf_counter()
        opinion = ensemble.predict(images)
        opinion.spread_m.sum().item()  # waits for the device
        taken.append((time.perf_counter() - start) / size)
    return min(taken[1:])


def sample_windows(contract: Contract, count: int, seed: int = 0) -> NDArray[Any]:
    """(batch, band, row, col) noise that a contract allows; how long a network takes does not depend on what it sees."""
    low, high = contract.value_range
    shape = (count, len(contract.bands), contract.window_px, contract.window_px)
    values = np.random.default_rng(seed).uniform(math.ceil(low), math.floor(high), shape)
    return values.astype(contract.dtype)


def free_memory(device: torch.device) -> None:
    """Give back what torch keeps of a device's memory for later: pieces of the wrong size after one batch failed."""
    if device.type == "cuda":
        torch.cuda.empty_cache()


# --- lanes of a CPU --------------------------------------------------------------------------------------------------------


def resident_rise(future: Future[Any]) -> int:
    """Bytes by which the process grows at most until `future` is done."""
    process = psutil.Process()
    start = most = process.memory_info().rss
    while not wait([future], timeout=_SAMPLE_S).done:
        most = max(most, process.memory_info().rss)
    return int(most - start)


def lanes_that_fit(threads: int, window_bytes: int) -> int:
    """Windows side by side on `threads` cores when each takes `window_bytes` beyond what the process has now."""
    return max(1, min(threads, 1 + int(SHARE_OF_MEMORY * free_bytes() / max(window_bytes, 1))))


def free_bytes() -> int:
    """Memory that this process may still take: the machine's, or what is left of its share where a cluster has set one."""
    free = int(psutil.virtual_memory().available)
    for group in _memory_groups():
        try:
            limit, used, parts = ((group / f"memory.{name}").read_text().strip() for name in ("max", "current", "stat"))
        except OSError:  # the root has no limit, and so no such files
            continue
        if limit != "max":
            cached = dict(line.split() for line in parts.splitlines())["inactive_file"]  # the kernel takes it back at need
            free = min(free, max(0, int(limit) - int(used) + int(cached)))
    return free


def _memory_groups() -> list[Path]:
    """Linux control groups (version 2) that this process is in, itself and its parents; none elsewhere."""
    root, own = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")
    if os.name != "posix" or not own.is_file():
        return []
    lines = [line.partition("::")[2] for line in own.read_text().splitlines() if line.startswith("0::")]
    groups = [root / line.strip("/") for line in lines]
    return [parent for group in groups for parent in (group, *group.parents) if parent.is_relative_to(root)]

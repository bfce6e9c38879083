"""Where the time of a run goes: how long each stage worked, and which of them the run waited for."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Self


@dataclass(slots=True)
class Stages:
    """Seconds of each stage of a run; the one mutable record of it, which any thread may add to.

    Stages overlap, so `seconds` may add up to more than the run took. `waited` does not: at each moment the thread that
    keeps the others at work is held up by one thing or by nothing.
    """

    seconds: dict[str, float] = field(default_factory=dict)
    """Stage -> seconds of work, in whichever thread; of work that several threads share, the mean over them."""
    waited: dict[str, float] = field(default_factory=dict)
    """Stage -> seconds in which the run could only wait for it."""
    windows: int = 0
    """Windows that went through the network."""
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False, compare=False)

    @contextmanager
    def time(self, stage: str, *, alone: bool = False, shared_by: int = 1) -> Iterator[None]:
        """Add the time of the block to `stage`.

        Args:
            stage: Its name.
            alone: Nothing else goes on meanwhile, so the run waits for it.
            shared_by: Threads that do this work side by side.
        """
        start = time.perf_counter()
        try:
            yield
        finally:
            self._add(self.seconds, stage, (time.perf_counter() - start) / shared_by)
            if alone:
                self._add(self.waited, stage, time.perf_counter() - start)

    @contextmanager
    def wait(self, stage: str) -> Iterator[None]:
        """Add the time of the block, in which nothing is done but wait for `stage`, to what the run waited for it."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self._add(self.waited, stage, time.perf_counter() - start)

    def work(self, stage: str, seconds: float) -> None:
        """Add seconds of work that were measured elsewhere."""
        self._add(self.seconds, stage, seconds)

    def count(self, windows: int) -> None:
        """Add to the windows that went through the network."""
        with self._lock:
            self.windows += windows

    def add(self, other: Stages) -> None:
        """Take in what was measured elsewhere, in another sheet or another process."""
        for mine, theirs in ((self.seconds, other.seconds), (self.waited, other.waited)):
            for stage, seconds in theirs.items():
                self._add(mine, stage, seconds)
        self.count(other.windows)

    @property
    def bound_by(self) -> str:
        """The stage that the run waited for longest: making another one faster would save less."""
        assert self.waited, "nothing has been timed that a run waits for"
        return max(self.waited, key=lambda stage: self.waited[stage])

    def record(self) -> dict[str, Any]:
        """As a table for JSON; `of` reads it back."""
        seconds, waited = ({stage: round(value, 3) for stage, value in each.items()} for each in (self.seconds, self.waited))
        return {"stages_s": seconds, "waited_s": waited, "windows": self.windows}

    @classmethod
    def of(cls, record: Mapping[str, Any]) -> Self:
        """From what `record` gave."""
        return cls(seconds=dict(record["stages_s"]), waited=dict(record["waited_s"]), windows=record["windows"])

    def _add(self, table: dict[str, float], stage: str, seconds: float) -> None:
        with self._lock:
            table[stage] = table.get(stage, 0.0) + seconds

    def __getstate__(self) -> dict[str, Any]:
        return {"seconds": self.seconds, "waited": self.waited, "windows": self.windows}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.seconds, self.waited, self.windows = state["seconds"], state["waited"], state["windows"]
        self._lock = threading.Lock()


@dataclass(frozen=True, slots=True, kw_only=True)
class Rate:
    """How fast a run was, and what to make faster."""

    wall_s: float
    pixels: int
    """Pixels of the map, not of the windows."""
    gsd_m: float
    bound_by: str

    @property
    def mpx_per_s(self) -> float:
        """Millions of map pixels in a second."""
        return self.pixels / self.wall_s / 1e6

    @property
    def km2_per_h(self) -> float:
        """Square kilometres of map in an hour."""
        return self.pixels * self.gsd_m**2 / 1e6 / self.wall_s * 3600

    def record(self) -> dict[str, Any]:
        """As a table for JSON."""
        return {
            "wall_s": round(self.wall_s, 3), "mpx_per_s": round(self.mpx_per_s, 4), "km2_per_h": round(self.km2_per_h, 3),
            "bound_by": self.bound_by,
        }  # fmt: skip

    def __str__(self) -> str:
        return f"{self.mpx_per_s:.3g} Mpx/s, {self.km2_per_h:.3g} km²/h, bound by {self.bound_by}"

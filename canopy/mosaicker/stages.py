"""Where the time of a run goes: how long each stage worked, and which of them bounds it."""

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

    Stages overlap, so their seconds may add up to more than the run took. Those that are busy side by side, and those that
    have a time for themselves, are compared in `busy`: the busiest bounds the run, because all others wait for it.
    """

    seconds: dict[str, float] = field(default_factory=dict)
    """Stage -> seconds of work, in whichever thread; of work that several threads share, the mean over them."""
    busy: dict[str, float] = field(default_factory=dict)
    """Reading, forward, blending, writing and whatever nothing else goes on beside -> seconds that each was busy."""
    windows: int = 0
    """Windows that went through the network."""
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False, compare=False)

    @contextmanager
    def time(self, stage: str, *, alone: bool = False) -> Iterator[None]:
        """Add the time of the block to `stage`; `alone`: nothing else goes on meanwhile."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.work(stage, time.perf_counter() - start, side=alone)

    def work(self, stage: str, seconds: float, *, side: bool = False) -> None:
        """Add seconds of work to `stage`, and if it is one of the sides of the run to what they were busy."""
        self._add(self.seconds, stage, seconds)
        if side:
            self._add(self.busy, stage, seconds)

    @contextmanager
    def side(self, name: str, *, threads: int = 1) -> Iterator[None]:
        """Add the time of the block to a stage that is busy beside others, in so many threads at once."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.work(name, (time.perf_counter() - start) / threads, side=True)

    def held(self, name: str, seconds: float) -> None:
        """Add to what a side was busy whose stages are timed by those who do them."""
        self._add(self.busy, name, seconds)

    def count(self, windows: int) -> None:
        """Add to the windows that went through the network."""
        with self._lock:
            self.windows += windows

    def add(self, other: Stages) -> None:
        """Take in what was measured elsewhere, in another sheet or another process."""
        for mine, theirs in ((self.seconds, other.seconds), (self.busy, other.busy)):
            for stage, seconds in theirs.items():
                self._add(mine, stage, seconds)
        self.count(other.windows)

    @property
    def bound_by(self) -> str:
        """The side that was busy longest: making another one faster would save less."""
        assert self.busy, "nothing has been timed that a run consists of"
        return max(self.busy, key=lambda stage: self.busy[stage])

    def record(self) -> dict[str, Any]:
        """As a table for JSON; `of` reads it back."""
        seconds, busy = ({stage: round(value, 3) for stage, value in each.items()} for each in (self.seconds, self.busy))
        return {"stages_s": seconds, "busy_s": busy, "windows": self.windows}

    @classmethod
    def of(cls, record: Mapping[str, Any]) -> Self:
        """From what `record` gave."""
        return cls(seconds=dict(record["stages_s"]), busy=dict(record["busy_s"]), windows=record["windows"])

    def _add(self, table: dict[str, float], stage: str, seconds: float) -> None:
        with self._lock:
            table[stage] = table.get(stage, 0.0) + seconds

    def __getstate__(self) -> dict[str, Any]:
        return {"seconds": self.seconds, "busy": self.busy, "windows": self.windows}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.seconds, self.busy, self.windows = state["seconds"], state["busy"], state["windows"]
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

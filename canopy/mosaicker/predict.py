"""Predictions over a sheet: imagery in, finished strips of height and spread out, one band of windows in memory.

Four things happen at once. A thread reads the next row of windows; the network works on windows of this row and, at its
end, already of the next; a thread cuts windows out, hands them to the network and blends what comes back; and whoever asked
for the predictions makes files of the last strip. None runs ahead of the others by more than a row.

Windows are blended in one order, whichever of them is ready first, and on a CPU each goes through the network alone and on
one thread (see `canopy.mosaicker.batch`): a pixel does not depend on what else is computed, by how many, or when.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import NDArray

from canopy.errors import DeviceMemoryError
from canopy.grid import Box, Layout
from canopy.mosaicker.batch import Batch, find_batch, free_memory, lanes_that_fit, resident_rise
from canopy.mosaicker.blend import Blend, Strip
from canopy.mosaicker.ensemble import Ensemble, Opinion
from canopy.mosaicker.stages import Stages
from canopy.raster import Pixels
from canopy.tiler.imagery import Imagery

QUEUED = 2
"""Batches that wait for the network, so that it never waits for a batch."""

STRIP_ROWS = 128
"""Rows of a strip that is handed out: what is made of it takes memory a few times over."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Prediction:
    """A finished strip and its imagery."""

    strip: Strip
    image: NDArray[Any]
    """(band, row, col) in the contract's units; a view of what is read anyway."""
    valid: NDArray[np.bool_]
    """(row, col) True where the imagery is usable; where such a pixel's height is NaN every model abstained."""
    days: NDArray[np.int32] | None
    """(row, col) days since 1970-01-01 as `Imagery.days`, where they were asked for."""


def predict_sheet(
    ensemble: Ensemble,
    imagery: Imagery,
    layout: Layout,
    box: Box,
    *,
    wanted: Callable[[Box], NDArray[np.bool_]],
    stages: Stages,
    advance: Callable[[int], None],
    batch: Batch | int | None = None,
    dated: bool = False,
) -> Generator[Prediction, None, None]:
    """Heights and spreads of `box`, from the top, in strips of at most `STRIP_ROWS`.

    The next strip is computed while the caller is busy with this one. Close the generator (`contextlib.closing`) before the
    imagery: it ends its threads.

    Args:
        ensemble: The model or models.
        imagery: Imagery on the lattice; a reader thread of this call is its only user meanwhile.
        layout: Windows of the model.
        box: The sheet, in lattice pixels.
        wanted: (row, col) mask of the pixels that are asked for, for any part of `box`, called from the reader thread;
            windows without a wanted valid pixel are not run.
        stages: Gets the times of "read", "forward" and "blend", and how long the caller was busy with strips as "write".
        advance: Called with the number of windows done, run or not, in the caller's thread.
        batch: Windows at once, made by `find_batch` for the whole run; or as that takes it.
        dated: Whether the days of the imagery are handed out too.

    Raises:
        ContractError: see `find_batch`, and a usable pixel that the contract does not allow.
        DeviceMemoryError: the device has not enough memory for one window.
    """
    if not isinstance(batch, Batch):
        batch = find_batch(ensemble, batch)
    sheet = _Sheet(
        ensemble=ensemble, imagery=imagery, layout=layout, box=box, wanted=wanted, stages=stages, batch=batch,
        threads=torch.get_num_threads(), dated=dated,
    )  # fmt: skip
    strips = sheet.strips()
    with ThreadPoolExecutor(max_workers=1, thread_name_prefix="blend") as driver:
        try:
            ahead = driver.submit(next, strips, None)
            while (rows := ahead.result()) is not None:
                ahead = driver.submit(next, strips, None)
                advance(rows.windows)
                start = time.perf_counter()
                yield from rows.pieces()
                stages.held("write", time.perf_counter() - start)
        finally:
            sheet.stopped.set()
            driver.submit(strips.close).result()


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Rows:
    """Rows of the sheet that are finished when a row of windows is."""

    strip: Strip | None
    image: NDArray[Any]
    valid: NDArray[np.bool_]
    days: NDArray[np.int32] | None
    windows: int

    def pieces(self) -> Generator[Prediction, None, None]:
        """The rows in strips of at most `STRIP_ROWS`."""
        if self.strip is None:
            return
        box, mean_m, spread_m = self.strip.box, self.strip.mean_m, self.strip.spread_m
        for start in range(0, box.shape[0], STRIP_ROWS):
            rows = slice(start, min(start + STRIP_ROWS, box.shape[0]))
            part = Box(box.row0 + rows.start, box.col0, box.row0 + rows.stop, box.col1)
            strip = Strip(box=part, mean_m=mean_m[rows], spread_m=spread_m[rows])
            days = None if self.days is None else self.days[rows]
            yield Prediction(strip=strip, image=self.image[:, rows], valid=self.valid[rows], days=days)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Band:
    """The imagery of a row of windows."""

    row: int
    box: Box
    pixels: Pixels
    days: NDArray[np.int32] | None
    usable: list[int]
    """Columns of the windows that have weight at a wanted valid pixel."""


@dataclass(slots=True, kw_only=True, eq=False)
class _Work:
    """Windows of one row on their way through the network, or, without columns, the end of that row."""

    band: _Band
    cols: list[int]
    images: torch.Tensor
    """(batch, band, row, col), filled up with zeros to the size of the batch."""
    valids: torch.Tensor
    lanes: int
    """How many went through the network side by side when this was sent."""
    future: Future[_Answer] | None = None
    answer: _Answer | None = None

    def settle(self) -> None:
        """Wait until it is through. What failed for lack of memory has no answer, and lets go of what it holds."""
        future, self.future = self.future, None
        if future is not None:
            try:
                self.answer = future.result()
            except DeviceMemoryError:
                self.answer = None


class _StoppedError(Exception):
    """The caller has closed the generator."""


@dataclass(kw_only=True, eq=False)
class _Sheet:
    """One call of `predict_sheet`."""

    ensemble: Ensemble
    imagery: Imagery
    layout: Layout
    box: Box
    wanted: Callable[[Box], NDArray[np.bool_]]
    stages: Stages
    batch: Batch
    threads: int
    dated: bool

    def __post_init__(self) -> None:
        self.stopped = threading.Event()
        self.rows = self.layout.windows_over(self.box.row0, self.box.row1)
        self.cols = self.layout.windows_over(self.box.col0, self.box.col1)
        col0, col1 = self.layout.window_span(self.cols[0])[0], self.layout.window_span(self.cols[-1])[1]
        self.reader = _Reader(self.imagery, col0, col1, dated=self.dated)
        self.blend = Blend(self.layout, self.box)
        self.sent: deque[_Work] = deque()

    def strips(self) -> Generator[_Rows, None, None]:
        """The finished rows, from the top; runs in a thread of its own, and ends in `_StoppedError` when told to."""
        with (
            ThreadPoolExecutor(max_workers=1, thread_name_prefix="read") as reader,
            _Lanes(self.ensemble, self.stages, self.threads, self.batch.lanes or 1) as lanes,
        ):
            ahead = reader.submit(self._read, self.rows[0])
            for row in self.rows:
                while self.sent and not ahead.done():
                    yield from self._collect(lanes)
                band = ahead.result()
                if row != self.rows[-1]:
                    ahead = reader.submit(self._read, row + 1)
                start = 0
                while start < len(band.usable):
                    cols = band.usable[start : start + self.batch.size]
                    start += len(cols)
                    self._send(lanes, band, cols)
                    while sum(bool(work.cols) for work in self.sent) > lanes.count + QUEUED:
                        yield from self._collect(lanes)
                self.sent.append(_Work(band=band, cols=[], images=_NONE, valids=_NONE, lanes=lanes.count))
            while self.sent:
                yield from self._collect(lanes)

    # --- reading

    def _read(self, row: int) -> _Band:
        with self.stages.side("read"):
            row0, row1 = self.layout.window_span(row)
            pixels, days = self.reader.read(row0, row1)
            box = Box(row0, self.reader.col0, row1, self.reader.col1)
            part = box.intersect(self.box)
            assert part is not None, f"window row {row} does not touch {self.box}"
            place, asked = part.slices_in(box), np.zeros(box.shape, bool)
            asked[place] = pixels.valid[place] & self.wanted(part)
            usable = [col for col in self.cols if asked[self._support(row, col).slices_in(box)].any()]
            return _Band(row=row, box=box, pixels=pixels, days=days, usable=usable)

    def _support(self, row: int, col: int) -> Box:
        """The part of the sheet in which a window has weight."""
        support = self.layout.support_box(row, col).intersect(self.box)
        assert support is not None, f"window {(row, col)} has no weight in {self.box}"
        return support

    # --- the network

    def _send(self, lanes: _Lanes, band: _Band, cols: list[int]) -> None:
        """Cut windows out of the imagery and hand them to the network."""
        places = [self.layout.window_box(band.row, col).slices_in(band.box) for col in cols]
        side, pinned = self.layout.window_px, self.ensemble.device.type == "cuda"
        data = band.pixels.data
        dtype = torch.from_numpy(np.empty(0, data.dtype)).dtype
        # From pinned memory the copy to the device takes place while it computes.
        images = torch.empty((self.batch.size, len(data), side, side), dtype=dtype, pin_memory=pinned)
        valids = torch.empty((self.batch.size, side, side), dtype=torch.bool, pin_memory=pinned)
        into, usable = images.numpy(), valids.numpy()
        for index, place in enumerate(places):
            into[index], usable[index] = data[(slice(None), *place)], band.pixels.valid[place]
        # A row's last batch keeps the shape of the others: the same kernels run for every window.
        into[len(cols) :], usable[len(cols) :] = 0, False
        work = _Work(band=band, cols=cols, images=images, valids=valids, lanes=lanes.count)
        work.future = lanes.submit(images, valids)
        self.sent.append(work)
        if self.batch.lanes is None:
            # Only the first window of a run can tell how much memory one takes, so it goes alone.
            bytes_each = resident_rise(work.future) if self.threads > 1 else 0
            self.batch.lanes = lanes_that_fit(self.threads, bytes_each)
            lanes.resize(self.batch.lanes)

    def _collect(self, lanes: _Lanes) -> Generator[_Rows, None, None]:
        """Blend the windows that were sent first, or hand out the rows that their end finishes."""
        if self.stopped.is_set():
            raise _StoppedError
        work = self.sent.popleft()
        if not work.cols:
            yield self._finished(work.band)
            return
        work.settle()
        if work.answer is None:
            self._again(lanes, work)
        assert work.answer is not None, "windows without an answer"
        mean_m, spread_m, abstain = work.answer.arrays(self.stages)
        with self.stages.side("blend"):
            usable = work.valids.numpy() & ~abstain
            for index, col in enumerate(work.cols):
                self.blend.add(work.band.row, col, mean_m[index], spread_m[index], usable[index])
        self.stages.count(len(work.cols))

    def _again(self, lanes: _Lanes, work: _Work) -> None:
        """Put windows through the network once more, fewer at a time; what was done before them stays done."""
        for other in self.sent:  # nothing else may hold memory meanwhile, not even the traceback of a failure
            other.settle()
        count = len(work.images)
        while work.answer is None:
            # Others that were sent before the first of them failed are no reason to take still fewer.
            if self.batch.size >= count and lanes.count >= work.lanes:
                if self.batch.size > 1:
                    self.batch.halve()
                elif lanes.count > 1:
                    self.batch.lanes = lanes.count // 2
                    lanes.resize(self.batch.lanes)
            count, work.lanes = self.batch.size, lanes.count
            free_memory(self.ensemble.device)
            parts = range(0, len(work.images), self.batch.size)
            final = self.batch.size == lanes.count == 1
            work.answer = self._in_parts(lanes, work, parts, last=final)

    def _in_parts(self, lanes: _Lanes, work: _Work, starts: Sequence[int], *, last: bool) -> _Answer | None:
        answers = []
        for start in starts:
            chosen = slice(start, start + self.batch.size)
            try:
                answers.append(lanes.submit(work.images[chosen], work.valids[chosen]).result())
            except DeviceMemoryError:
                if last:
                    raise
                return None
        return _Answer.joined(answers)

    # --- the result

    def _finished(self, band: _Band) -> _Rows:
        with self.stages.side("blend"):
            row = band.row
            strip = self.blend.take(self.layout.support_span(row + 1)[0] if row != self.rows[-1] else self.box.row1)
        # Without a strip, no rows of it.
        place = (slice(0, 0), slice(0, 0)) if strip is None else strip.box.slices_in(band.box)
        image, valid = band.pixels.data[(slice(None), *place)], band.pixels.valid[place]
        days = None if band.days is None else band.days[place]
        return _Rows(strip=strip, image=image, valid=valid, days=days, windows=len(self.cols))


_NONE = torch.empty(0)


class _Reader:
    """Reads rows of windows from the top; the rows that two of them share are read once."""

    def __init__(self, imagery: Imagery, col0: int, col1: int, *, dated: bool) -> None:
        self.col0, self.col1 = col0, col1
        self._imagery, self._dated = imagery, dated
        self._last: tuple[int, Pixels, NDArray[np.int32] | None] | None = None

    def read(self, row0: int, row1: int) -> tuple[Pixels, NDArray[np.int32] | None]:
        """Rows [row0, row1) of lattice pixels and, where asked for, their days."""
        if self._last is None:
            pixels, days = self._read(row0, row1)
        else:
            last_row0, last, last_days = self._last
            kept = slice(row0 - last_row0, None)
            new, days = self._read(last_row0 + last.valid.shape[0], row1)
            pixels = Pixels(
                data=np.concatenate([last.data[:, kept], new.data], axis=1),
                valid=np.concatenate([last.valid[kept], new.valid]),
            )
            if last_days is not None and days is not None:
                days = np.concatenate([last_days[kept], days])
        self._last = (row0, pixels, days)
        return pixels, days

    def _read(self, row0: int, row1: int) -> tuple[Pixels, NDArray[np.int32] | None]:
        box = Box(row0, self.col0, row1, self.col1)
        pixels = self._imagery.read(box)
        # Of the box that was just read the days are known without another reading.
        return pixels, self._imagery.days(box) if self._dated else None


# --- the network's own threads -------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Answer:
    """Mean, spread and abstention of a batch, (3, batch, row, col) float32 in the host's memory, maybe still on the way."""

    values: torch.Tensor
    span: tuple[Any, Any] | None = None
    """Events of a CUDA device before the windows and after their values have arrived."""

    def arrays(self, stages: Stages) -> tuple[NDArray[np.float32], NDArray[np.float32], NDArray[np.bool_]]:
        """Mean, spread and abstention, once they are there."""
        if self.span is not None:
            start, end = self.span
            end.synchronize()
            stages.work("forward", start.elapsed_time(end) / 1e3, side=True)
        mean_m, spread_m, abstain = self.values.numpy()
        return mean_m, spread_m, abstain > 0

    @classmethod
    def joined(cls, answers: Sequence[_Answer]) -> Self:
        """The answers to parts of a batch, waited for."""
        for answer in answers:
            if answer.span is not None:
                answer.span[1].synchronize()
        return cls(values=torch.cat([answer.values for answer in answers], dim=1))


class _Lanes:
    """Threads that put batches through the network: on a CPU one for every window at once, for a GPU one that queues."""

    def __init__(self, ensemble: Ensemble, stages: Stages, threads: int, count: int) -> None:
        self._ensemble, self._stages, self._threads = ensemble, stages, threads
        self._start(count)

    def submit(self, images: torch.Tensor, valids: torch.Tensor) -> Future[_Answer]:
        """Start on a batch."""
        return self._pool.submit(self._forward, images, valids)

    def resize(self, count: int) -> None:
        """Go on with another number of threads, once the batches that were started are through."""
        if count != self.count:
            self._pool.shutdown(wait=True)
            self._start(count)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._pool.shutdown(wait=True, cancel_futures=True)

    def _start(self, count: int) -> None:
        self.count = count
        self._pool = ThreadPoolExecutor(max_workers=count, thread_name_prefix="forward")
        if self._ensemble.device.type == "cpu":
            started = threading.Barrier(count + 1)
            for _ in range(count):
                self._pool.submit(_on_one_core, started)
            started.wait()
            # Torch's setting is each thread's own, but the last one that was made is what threads yet to come begin with.
            torch.set_num_threads(self._threads)

    def _forward(self, images: torch.Tensor, valids: torch.Tensor) -> _Answer:
        if self._ensemble.device.type == "cuda":
            return self._on_cuda(images, valids)
        with self._stages.side("forward", threads=self.count), torch.inference_mode():
            return _Answer(values=_stacked(self._ensemble.predict(images, valids)).cpu())

    def _on_cuda(self, images: torch.Tensor, valids: torch.Tensor) -> _Answer:
        """Queue a batch on the device, and the copy of its values to pinned memory; nothing here waits for either."""
        stream = torch.cuda.current_stream(self._ensemble.device)
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        with torch.cuda.device(self._ensemble.device), torch.inference_mode():
            start.record(stream)
            values = _stacked(self._ensemble.predict(images, valids))
            there = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
            there.copy_(values, non_blocking=True)
            end.record(stream)
        return _Answer(values=there, span=(start, end))


def _on_one_core(started: threading.Barrier) -> None:
    torch.set_num_threads(1)
    started.wait()


def _stacked(opinion: Opinion) -> torch.Tensor:
    return torch.stack([opinion.mean_m, opinion.spread_m, opinion.abstain.float()])

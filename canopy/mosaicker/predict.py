"""Predictions over a sheet: imagery in, finished strips of height and spread out, one band of windows in memory.

A thread reads the imagery of the next row of windows while the model works on this one. On a CPU windows go through the
network one at a time: its kernels round differently at other places of a batch, and a pixel must not depend on which
windows happened to share its batch.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray

from canopy.errors import ContractError
from canopy.grid import Box, Layout
from canopy.mosaicker.blend import Blend, Strip
from canopy.mosaicker.ensemble import Ensemble
from canopy.raster import Pixels
from canopy.tiler.imagery import Imagery

GPU_BATCH = 8
"""Windows in one forward pass on an accelerator, unless told otherwise; a fixed shape, a row's last batch is filled up."""


def windows_at_once(device_type: str, batch: int | None) -> int:
    """Windows in one forward pass: `batch`, or by default 1 on a CPU and `GPU_BATCH` elsewhere.

    Raises:
        ContractError: below 1, or above 1 on a CPU, where a window's heights would depend on its place in the batch.
    """
    if batch is None:
        return 1 if device_type == "cpu" else GPU_BATCH
    if batch < 1 or (batch > 1 and device_type == "cpu"):
        limit = (
            "must be 1 on a CPU, where heights would change with a window's place in the batch"
            if batch > 1
            else "is below 1"
        )
        raise ContractError(f"batch {batch} {limit}; leave it out, or give a number of windows for a GPU")
    return batch


@dataclass(slots=True)
class Stages:
    """Seconds spent in each stage of a run; the one mutable record of it."""

    seconds: dict[str, float] = field(default_factory=dict)
    windows: int = 0
    """Windows that went through the network."""

    @contextmanager
    def time(self, stage: str) -> Iterator[None]:
        """Add the time of the block to `stage`."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[stage] = self.seconds.get(stage, 0.0) + time.perf_counter() - start


@dataclass(frozen=True, slots=True, kw_only=True)
class Prediction:
    """A finished strip and the validity of its imagery."""

    strip: Strip
    valid: NDArray[np.bool_]
    """(row, col) True where the imagery is usable; a valid pixel whose height is NaN is one the model abstained from."""


def predict_sheet(
    ensemble: Ensemble,
    imagery: Imagery,
    layout: Layout,
    box: Box,
    *,
    wanted: Callable[[Box], NDArray[np.bool_]],
    stages: Stages,
    advance: Callable[[int], None],
    batch: int | None = None,
) -> Generator[Prediction, None, None]:
    """Heights and spreads of `box`, from the top, in strips.

    Args:
        ensemble: The model or models.
        imagery: Imagery on the lattice; a reader thread of this call is its only user meanwhile.
        layout: Windows of the model.
        box: The sheet, in lattice pixels.
        wanted: (row, col) mask of the pixels that are asked for, for any part of `box`; windows without a wanted valid
            pixel are not run.
        stages: Times are added to "read wait", "forward" and "blend".
        advance: Called with the number of windows done, run or not.
        batch: See `windows_at_once`.
    """
    rows = layout.windows_over(box.row0, box.row1)
    cols = layout.windows_over(box.col0, box.col1)
    col0, col1 = layout.window_span(cols[0])[0], layout.window_span(cols[-1])[1]
    blend = Blend(layout, box)
    count = windows_at_once(ensemble.device.type, batch)
    band = _Band(imagery, col0, col1)
    with ThreadPoolExecutor(max_workers=1, thread_name_prefix="read") as reader:
        ahead: Future[Pixels] = reader.submit(band.read, *layout.window_span(rows[0]))
        for row in rows:
            with stages.time("read wait"):
                pixels = ahead.result()
            if row != rows[-1]:
                ahead = reader.submit(band.read, *layout.window_span(row + 1))
            row0, row1 = layout.window_span(row)
            strip_box = Box(row0, col0, row1, col1)
            usable = np.zeros(strip_box.shape, bool)
            part = strip_box.intersect(box)
            assert part is not None, f"window row {row} does not touch {box}"
            place = part.slices_in(strip_box)
            usable[place] = pixels.valid[place] & wanted(part)
            due = [col for col in cols if usable[_support(layout, row, col, box).slices_in(strip_box)].any()]
            for start in range(0, len(due), count):
                _run(
                    ensemble, layout, blend, row, due[start : start + count],
                    batch=count, strip_box=strip_box, pixels=pixels, stages=stages,
                )  # fmt: skip
            advance(len(cols))
            with stages.time("blend"):
                strip = blend.take(layout.support_span(row + 1)[0] if row != rows[-1] else box.row1)
            if strip is not None:
                yield Prediction(strip=strip, valid=pixels.valid[strip.box.slices_in(strip_box)])


def _support(layout: Layout, row: int, col: int, box: Box) -> Box:
    """The part of `box` in which a window has weight."""
    support = layout.support_box(row, col).intersect(box)
    assert support is not None, f"window {(row, col)} has no weight in {box}"
    return support


def _run(
    ensemble: Ensemble,
    layout: Layout,
    blend: Blend,
    row: int,
    cols: list[int],
    *,
    batch: int,
    strip_box: Box,
    pixels: Pixels,
    stages: Stages,
) -> None:
    """Put windows of one row through the network and add them to the blend, in order."""
    places = [layout.window_box(row, col).slices_in(strip_box) for col in cols]
    images = np.stack([pixels.data[(slice(None), *place)] for place in places])
    valids = np.stack([pixels.valid[place] for place in places])
    if len(cols) < batch:  # keep the batch's shape: the same kernels run for every window
        images = np.concatenate([images, np.zeros((batch - len(cols), *images.shape[1:]), images.dtype)])
        valids = np.concatenate([valids, np.zeros((batch - len(cols), *valids.shape[1:]), bool)])
    with stages.time("forward"):
        heights = ensemble.predict(torch.from_numpy(images), torch.from_numpy(valids))
        mean, spread = heights.mean_m.cpu().numpy(), heights.spread_m.cpu().numpy()
        abstain = heights.abstain.cpu().numpy()
    with stages.time("blend"):
        for index, col in enumerate(cols):
            blend.add(row, col, mean[index], spread[index], valids[index] & ~abstain[index])
    stages.windows += len(cols)


class _Band:
    """Reads rows of windows from the top; the rows that two of them share are read once."""

    def __init__(self, imagery: Imagery, col0: int, col1: int) -> None:
        self._imagery, self._col0, self._col1 = imagery, col0, col1
        self._last: tuple[int, Pixels] | None = None

    def read(self, row0: int, row1: int) -> Pixels:
        if self._last is None:
            pixels = self._imagery.read(Box(row0, self._col0, row1, self._col1))
        else:
            last_row0, last = self._last
            kept = slice(row0 - last_row0, None)
            new = self._imagery.read(Box(last_row0 + last.valid.shape[0], self._col0, row1, self._col1))
            pixels = Pixels(
                data=np.concatenate([last.data[:, kept], new.data], axis=1),
                valid=np.concatenate([last.valid[kept], new.valid]),
            )
        self._last = (row0, pixels)
        return pixels

"""What a map will take, before it is begun: a few windows are mapped and measured, the rest is counted.

The probe goes the way of the run, from reading to compressed files, through the same functions. The forecast is arithmetic
on what it measured.
"""

from __future__ import annotations

import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import shapely
import torch
from numpy.typing import NDArray
from pyproj import CRS
from shapely.geometry.base import BaseGeometry

from canopy.grid import Box, Lattice, Layout
from canopy.model.package import Contract
from canopy.mosaicker.batch import Batch, find_batch, sample_windows
from canopy.mosaicker.ensemble import Ensemble
from canopy.mosaicker.predict import Prediction, predict_sheet
from canopy.mosaicker.publish import ERROR_BANDS, HEIGHT_BANDS, STAGED_BYTES_PER_PIXEL, stage_sheet, write_cog
from canopy.mosaicker.quantum import error_bands, quantise
from canopy.mosaicker.stages import Stages
from canopy.mosaicker.vrt import BLOCK_PX
from canopy.raster import Pixels
from canopy.tiler.imagery import Imagery

ROUNDS = 2
"""In each of its rows the probe has so many times the windows that go through the network at once."""

WRITTEN_PX, WRITTEN_ROWS = 1 << 20, 1 << 12
"""Pixels and rows of the files that the probe makes, at most."""

_PLACES = ((1, 1), (1, 2), (2, 1), (1, 3), (3, 1), (3, 3), (0, 0), (0, 3), (3, 0))
"""Where in the region to look for imagery, in quarters of its sides from the top left; the first with any is taken."""

_METRES = CRS.from_epsg(32631)


@dataclass(frozen=True, slots=True, kw_only=True)
class Probe:
    """What a few windows took on this machine."""

    window_s: float
    """Seconds a window through the network, when as many as fit go at once."""
    batch: Batch
    """How many that was."""
    memory_bytes: int
    """Memory of the process while they went, the model and the libraries included; the bands of a sheet come on top."""
    device_bytes: int
    """Memory of the GPU; 0 on a CPU."""
    read_px_s: float
    """Seconds a pixel of imagery."""
    write_px_s: float
    """Seconds a pixel of the map to make intervals of it and stage it."""
    publish_px_s: float
    """Seconds a pixel of the map to make its files of what was staged."""
    stored_px_bytes: float
    """Bytes a pixel of the map in the finished files, all bands and overviews."""
    imagery_px_bytes: int
    """Bytes a pixel of imagery in memory, its mask included."""
    is_real: bool
    """Whether imagery was found to map; else it was noise, which takes as long and compresses worse than forest."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """What there is to do, counted."""

    windows: int
    """Windows to run, those that several sheets run counted in each."""
    pixels: int
    """Pixels of the map."""
    read_px: int
    """Pixels of imagery to read, the surroundings of the sheets included."""
    width_px: int
    """Width of the widest sheet."""
    staged_px: int
    """Pixels of the sheets that are on disk uncompressed at the same time: all of them where the map is one file."""
    gsd_m: float

    @classmethod
    def of(
        cls,
        layout: Layout,
        lattice: Lattice,
        sheets: Iterator[Box] | tuple[Box, ...] | list[Box],
        *,
        area: BaseGeometry | None,
        staged_sheets: int | None,
    ) -> Workload:
        """The work on `sheets`.

        Args:
            layout: Windows of the model.
            lattice: Where the sheets lie.
            sheets: The sheets.
            area: The area of interest in the lattice's CRS; None: everywhere. Windows that do not touch it are not run.
            staged_sheets: Sheets staged at the same time; None: all.
        """
        boxes = list(sheets)
        assert boxes, "a region has at least one sheet"
        halos = [layout.halo_box(box) for box in boxes]
        sizes = sorted((box.shape[0] * box.shape[1] for box in boxes), reverse=True)
        return cls(
            windows=sum(windows_over(layout, lattice, box, area) for box in boxes),
            pixels=sum(sizes),
            read_px=sum(halo.shape[0] * halo.shape[1] for halo in halos),
            width_px=max(halo.shape[1] for halo in halos),
            staged_px=sum(sizes[:staged_sheets]),
            gsd_m=lattice.gsd_m,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Forecast:
    """Time, memory and disk of a map; what the imagery hides, clouds and empty corners, makes it less."""

    seconds: float
    windows: int
    pixels: int
    gsd_m: float
    bound_by: str
    memory_bytes: int
    """Of each process that predicts."""
    device_bytes: int
    """Of each GPU; 0 on a CPU."""
    disk_bytes: int
    """At the most, while the map is made: what is staged and the finished files."""
    map_bytes: int
    """Of the finished files."""

    @property
    def area_km2(self) -> float:
        """Extent of the map."""
        return self.pixels * self.gsd_m**2 / 1e6

    def record(self) -> dict[str, Any]:
        """As a table for JSON."""
        return {
            "seconds": round(self.seconds, 1), "windows": self.windows, "pixels": self.pixels,
            "extent_km2": round(self.area_km2, 6), "km2_per_h": round(self.area_km2 / self.seconds * 3600, 3),
            "bound_by": self.bound_by, "memory_bytes": self.memory_bytes, "device_bytes": self.device_bytes,
            "disk_bytes": self.disk_bytes, "map_bytes": self.map_bytes,
        }  # fmt: skip

    def __str__(self) -> str:
        device = f" and {_gb(self.device_bytes)} of the GPU's" if self.device_bytes else ""
        disk, files = _gb(self.disk_bytes), _gb(self.map_bytes)
        return (
            f"about {_duration(self.seconds)} for {self.windows:,} windows, {self.area_km2:.3g} km², bound by "
            f"{self.bound_by}; {_gb(self.memory_bytes)} of memory{device}; up to {disk} of disk for files of {files}"
        )


def forecast(probe: Probe, work: Workload, layout: Layout, *, workers: int = 1, started_s: float = 0.0) -> Forecast:
    """What `work` takes where `probe` was measured.

    Reading, forward and writing overlap, so the slowest of them counts, and publishing the finished sheets comes on top.

    Args:
        probe: What was measured.
        work: What was counted.
        layout: Windows of the model.
        workers: Processes on machines like this one that share the work; those on one machine share its cores, and are one.
        started_s: Seconds that have to pass before the first window, such as loading the model.
    """
    sides = {
        "read": work.read_px * probe.read_px_s, "forward": work.windows * probe.window_s,
        "write": work.pixels * probe.write_px_s,
    }  # fmt: skip
    publish_s = work.pixels * probe.publish_px_s
    map_bytes = int(work.pixels * probe.stored_px_bytes)
    return Forecast(
        seconds=started_s + (max(sides.values()) + publish_s) / workers,
        windows=work.windows, pixels=work.pixels, gsd_m=work.gsd_m,
        bound_by=max({**sides, "publish": publish_s}.items(), key=lambda side: side[1])[0],
        memory_bytes=probe.memory_bytes + band_bytes(layout, work.width_px, probe.imagery_px_bytes),
        device_bytes=probe.device_bytes,
        disk_bytes=work.staged_px * STAGED_BYTES_PER_PIXEL + map_bytes, map_bytes=map_bytes,
    )  # fmt: skip


def band_bytes(layout: Layout, width_px: int, imagery_px_bytes: int) -> int:
    """Memory of a sheet that grows with its width: bands of imagery and of sums, and the strips made of them.

    Of imagery a row of windows, the next one and the pieces it is made of; three sums, a copy of those that are kept when a
    strip is taken, and its height and spread twice, since the next strip is ready when this one is written; all float32.
    """
    imagery = 3 * layout.window_px * imagery_px_bytes
    sums = (3 * layout.window_px + 3 * layout.overlap_px + 3 * 2 * layout.stride_px) * 4
    return width_px * (imagery + sums)


def windows_over(layout: Layout, lattice: Lattice, sheet: Box, area: BaseGeometry | None) -> int:
    """Windows with weight in `sheet` and in the area (in the lattice's CRS; None: everywhere)."""
    rows, cols = layout.windows_over(sheet.row0, sheet.row1), layout.windows_over(sheet.col0, sheet.col1)
    if area is None:
        return len(rows) * len(cols)
    tops, lefts = (
        np.clip([layout.support_span(index) for index in indices], low, high)
        for indices, low, high in ((rows, sheet.row0, sheet.row1), (cols, sheet.col0, sheet.col1))
    )
    gsd_m = lattice.gsd_m
    boxes = shapely.box(
        lefts[None, :, 0] * gsd_m, -tops[:, None, 1] * gsd_m, lefts[None, :, 1] * gsd_m, -tops[:, None, 0] * gsd_m
    )
    shapely.prepare(area)
    return int(shapely.intersects(area, boxes).sum())


# --- the probe -----------------------------------------------------------------------------------------------------------


def probe(
    ensemble: Ensemble,
    imagery: Imagery,
    layout: Layout,
    box: Box,
    *,
    wanted: Callable[[Box], NDArray[np.bool_]],
    batch: Batch | int | None = None,
) -> Probe:
    """Map a few windows of a region, to see what a window takes.

    Args:
        ensemble: The model or models.
        imagery: Imagery on the lattice.
        layout: Windows of the model.
        box: The region.
        wanted: (row, col) mask of the area of interest for any part of `box`.
        batch: As for `predict_sheet`.

    Raises:
        CanopyError: imagery that cannot be read, a device without memory for one window, no place for temporary files.
    """
    counts = batch if isinstance(batch, Batch) else find_batch(ensemble, batch)
    parts = (_part(layout, box, *place) for place in _PLACES)
    place = next((part for part in parts if (imagery.read(part).valid & wanted(part)).any()), None)
    noise = _Noise(ensemble.contract)
    first = _part(layout, box, 1, 1) if place is None else place
    # What the first windows wait for, the choice of kernels above all, is over soon; the other windows are of one length.
    _mapped(ensemble, noise, layout, first, batch=counts, stages=Stages())
    cols = layout.windows_over(first.col0, first.col1)[0] + ROUNDS * counts.size * (counts.lanes or 1)
    wide = Box(first.row0, first.col0, first.row1, layout.support_span(cols)[0])
    stages = Stages()
    if ensemble.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(ensemble.device)
    with _peak_memory() as peak:
        strips = _mapped(ensemble, noise, layout, wide, batch=counts, stages=stages)
    device_bytes = torch.cuda.max_memory_reserved(ensemble.device) if ensemble.device.type == "cuda" else 0
    if place is not None:
        strips = _mapped(ensemble, imagery, layout, place, batch=counts, stages=Stages())
    start, halo = time.perf_counter(), layout.halo_box(first)
    pixels = imagery.read(halo)
    read_s = time.perf_counter() - start
    write_px_s, publish_px_s, stored_px_bytes = _written(strips)
    return Probe(
        window_s=stages.seconds["forward"] / stages.windows, batch=counts, memory_bytes=peak[0], device_bytes=device_bytes,
        read_px_s=read_s / pixels.valid.size, write_px_s=write_px_s, publish_px_s=publish_px_s,
        stored_px_bytes=stored_px_bytes, imagery_px_bytes=1 + pixels.data.itemsize * len(pixels.data),
        is_real=place is not None,
    )  # fmt: skip


def _part(layout: Layout, box: Box, down: int, right: int) -> Box:
    """A square of one window at so many quarters of the region's sides, within the region."""
    row, col = box.row0 + (box.shape[0] * down) // 4, box.col0 + (box.shape[1] * right) // 4
    part = Box(row, col, row + layout.window_px, col + layout.window_px).intersect(box)
    assert part is not None, f"({row}, {col}) is not in {box}"
    return part


class _Noise:
    """Imagery without an edge that is the same noise in every window."""

    def __init__(self, contract: Contract) -> None:
        self._tile = sample_windows(contract, 1)[0]

    def read(self, box: Box) -> Pixels:
        """Pixels of `box`, all valid."""
        rows, cols = (-(-length // side) for length, side in zip(box.shape, self._tile.shape[1:], strict=True))
        data = np.tile(self._tile, (1, rows, cols))[:, : box.shape[0], : box.shape[1]]
        return Pixels(data=data, valid=np.ones(box.shape, bool))


def _mapped(ensemble: Ensemble, imagery: Any, layout: Layout, box: Box, *, batch: Batch, stages: Stages) -> list[Prediction]:
    return list(
        predict_sheet(
            ensemble, imagery, layout, box,
            wanted=lambda part: np.ones(part.shape, bool), stages=stages, advance=lambda _: None, batch=batch,
        )
    )  # fmt: skip


def _written(strips: list[Prediction]) -> tuple[float, float, float]:
    """Seconds a pixel to stage and to publish what was predicted, and bytes a pixel in the files.

    The strips are repeated downwards, so that opening and checking files counts as little as it does in a map. A repeat is
    too far from the first for the compressor to see.
    """
    mean_m, spread_m, valid = (
        np.concatenate([getattr(each, name) for each in of])
        for of, name in (([s.strip for s in strips], "mean_m"), ([s.strip for s in strips], "spread_m"), (strips, "valid"))
    )
    rows, cols = valid.shape
    repeats = max(1, min(WRITTEN_PX // valid.size, WRITTEN_ROWS // rows))
    lattice = Lattice(crs=_METRES, gsd_m=1.0)  # where it is has no part in how long it takes
    box = Box(BLOCK_PX, BLOCK_PX, BLOCK_PX + repeats * rows, BLOCK_PX + cols)
    with tempfile.TemporaryDirectory(prefix="canopy-") as name:
        folder, start = Path(name), time.perf_counter()
        with stage_sheet(folder, lattice, box) as (staged, writer):
            for row in range(box.row0, box.row1, rows):
                mean = np.where(valid, mean_m, np.float32(np.nan))
                error = error_bands(np.maximum(mean - spread_m, np.float32(0)), mean + spread_m)
                writer.write(Box(row, box.col0, row + rows, box.col1), quantise(mean), error)
        middle = time.perf_counter()
        for kind, names in (("height", HEIGHT_BANDS), ("error", ERROR_BANDS)):
            parts = [(box, getattr(staged, kind))]
            write_cog(folder / f"{kind}.tif", parts, lattice=lattice, box=box, band_names=names, tags={})
        end = time.perf_counter()
        stored = sum((folder / f"{kind}.tif").stat().st_size for kind in ("height", "error"))
    size = valid.size * repeats
    filled = -(-cols // BLOCK_PX) * BLOCK_PX / cols  # blocks are compressed whole
    return (middle - start) / size, (end - middle) / (size * filled), stored / size


@contextmanager
def _peak_memory() -> Iterator[list[int]]:
    """The largest memory of this process while the block runs, in bytes, as the one entry of a list."""
    process, done = psutil.Process(), threading.Event()
    peak = [int(process.memory_info().rss)]

    def watch() -> None:
        while not done.wait(0.002):
            peak[0] = max(peak[0], int(process.memory_info().rss))

    watcher = threading.Thread(target=watch, name="memory", daemon=True)
    watcher.start()
    try:
        yield peak
    finally:
        done.set()
        watcher.join()


def _gb(count: int) -> str:
    return f"{count / 1e9:.2g} GB" if count < 1e10 else f"{count / 1e9:.0f} GB"


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"

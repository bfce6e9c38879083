"""Regions of billions of pixels with a model that costs nothing: two worker processes of which one is killed twice, and
the memory of a run on its own from its first sheets to its last.

Every pixel is compared with what the model says of it, so what was lost, doubled or put elsewhere is found.
"""

import contextlib
import shutil
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
import rasterio

from canopy.region import region_status
from tests.bench.free_model import environment, height_of, photo, start_map

GROWTH_TARGET = 1.02
"""Of the second half of a run over the first: heaps settle within the first hundred sheets, and must not grow after that."""
QUANTUM_M = 1 / 32


def say(text):
    print(f"\n{text}", flush=True)  # noqa: T201 - a benchmark's result is what it prints


def records(out):
    """How many stages of sheets are on record."""
    return len(list(out.glob(".canopy-work/*/records/*.json")))


def wrong_pixels(out, image):
    """Pixels (wrong, all) of the published heights against what the model says of the image, band of rows by band."""
    wrong = seen = 0
    with rasterio.open(out / "height.vrt") as heights, rasterio.open(image) as photo_file:
        assert heights.shape == photo_file.shape
        for row in range(0, heights.height, 1024):
            window = rasterio.windows.Window(0, row, heights.width, min(1024, heights.height - row))
            expected = height_of(photo_file.read(window=window))
            # Unknown is wrong too: NaN is not close to anything.
            close = np.abs(heights.read(1, window=window) - expected) <= QUANTUM_M
            wrong, seen = wrong + int((~close).sum()), seen + close.size
    return wrong, seen


@contextlib.contextmanager
def cluster(workers):
    """A dask scheduler and its workers, each with a nanny; the scheduler's address and the nannies."""
    dask = str(Path(sys.executable).with_name("dask"))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    address = f"tcp://127.0.0.1:{port}"
    given = environment() | {"OMP_NUM_THREADS": "1"}
    commands = [[dask, "scheduler", "--host", "127.0.0.1", "--port", str(port), "--no-dashboard"]]
    worker = [dask, "worker", address, "--nthreads", "1", "--no-dashboard", "--preload", "tests.bench.free_model"]
    commands += [worker] * workers
    processes = [
        subprocess.Popen(command, env=given, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) for command in commands
    ]
    try:
        yield address, processes[1:]
    finally:
        for process in processes:
            for child in psutil.Process(process.pid).children(recursive=True):
                with contextlib.suppress(psutil.NoSuchProcess):
                    child.kill()
            process.kill()
            process.wait()


def kill_worker(nanny):
    """The process that works, not its nanny, which starts another."""
    inside = [c for c in psutil.Process(nanny.pid).children(recursive=True) if "spawn_main" in " ".join(c.cmdline())]
    assert inside, "there is no worker to kill"
    for child in inside:
        child.kill()


@pytest.mark.bench
def test_two_workers_and_two_gigabytes(tmp_path):
    """26 624 px, 2.13 GB of bytes; one worker is killed after a fifth and after a half of the sheets."""
    image = photo(tmp_path / "image.tif", 26_624)
    folder = tmp_path / "map"
    out = folder / "out"
    with cluster(2) as (address, nannies):
        start = time.perf_counter()
        process = start_map(folder, image, sheet_px=2048, max_file_px=8192, scheduler=address)
        sheets, killed = None, []
        while process.poll() is None:
            if sheets is None and records(out):
                sheets = region_status(out).sheets
            if sheets and len(killed) < 2 and records(out) >= (0.2, 0.5)[len(killed)] * 2 * sheets:
                kill_worker(nannies[0])
                killed.append(records(out))
            time.sleep(0.2)
        errors = process.communicate()[1]
        wall_s = time.perf_counter() - start
    assert process.returncode == 0, errors
    assert len(killed) == 2, f"{len(killed)} workers were killed; the benchmark says nothing"
    status = region_status(out)
    wrong, seen = wrong_pixels(out, image)
    say(
        f"two dask workers, {seen * 3 / 1e9:.2f} GB of imagery, {status.sheets} sheets, a worker killed at records "
        f"{killed}: {status.state}, {status.done} sheets done, {wrong} of {seen} pixels wrong, {wall_s:.0f} s"
    )
    files = len(list((out / "sheets").glob("*.tif")))
    assert (status.state, status.done, files, wrong) == ("finished", status.sheets, 2 * status.sheets, 0)
    # The negative control: the check sees a map of which one sheet is another's.
    first, second = sorted((out / "sheets").glob("*height*"))[:2]
    shutil.copy(second, first)
    assert wrong_pixels(out, image)[0] > 0


@pytest.mark.bench
def test_memory_is_flat_to_the_last_sheet(tmp_path):
    """40 960 px, 1.7 billion: the highest memory of the second half of the run over that of the first half."""
    image = photo(tmp_path / "image.tif", 40_960)
    folder = tmp_path / "map"
    out = folder / "out"
    process = start_map(folder, image, sheet_px=2048, max_file_px=8192)
    measured = []  # (records, GB)

    def watch():
        it = psutil.Process(process.pid)
        while process.poll() is None:
            with contextlib.suppress(psutil.NoSuchProcess):
                measured.append((records(out), it.memory_info().rss / 1e9))
            time.sleep(0.25)

    watcher = threading.Thread(target=watch)
    start = time.perf_counter()
    watcher.start()
    printed, errors = process.communicate()
    wall_s = time.perf_counter() - start
    watcher.join()
    assert process.returncode == 0, errors
    status = region_status(out)
    early = max(gb for count, gb in measured if count <= 2 * status.sheets / 16)
    stages = 2 * status.sheets
    peaks = [max((gb for count, gb in measured if part <= count * 8 / stages < part + 1), default=0.0) for part in range(8)]
    growth = max(peaks[4:]) / max(peaks[:4])
    wrong, seen = wrong_pixels(out, image)
    say(
        f"{status.sheets} sheets, {seen / 1e9:.2f} Gpx in {wall_s:.0f} s: {wrong} wrong; peak memory of the second half "
        f"over the first {growth:.3f} (target < {GROWTH_TARGET}), of all over the first sixteenth {max(peaks) / early:.3f}; "
        f"GB by eighths {[round(gb, 2) for gb in peaks]}; {printed.partition('RESULT')[2]}"
    )
    assert (status.state, wrong) == ("finished", 0)
    assert growth < GROWTH_TARGET

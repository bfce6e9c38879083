"""Who does the sheets: real dask schedulers and workers in processes of their own, killed and started again."""

import contextlib
import os
import queue
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

import canopy.region.engine
import canopy.region.plan
import canopy.region.run
from canopy.errors import ClusterError, RegionError
from canopy.region import map_region, region_status, resume_region
from canopy.region.engine import Engine, visible_gpus, worker_environment
from canopy.tiler.imagery import ImageFiles
from tests.region.conftest import COUNT, SHEET_PX, SHEETS, content

DASK = Path(sys.executable).parent / "dask"
WORK = ".canopy-work"


def records(out, stage="*"):
    return sorted(out.glob(f"{WORK}/*/records/*.{stage}.json"))


# --- which workers -------------------------------------------------------------------------------------------------------


def test_one_way_of_finding_workers_at_a_time(image, tiny_model, tmp_path):
    for options, message in (
        ({"scheduler": "tcp://127.0.0.1:9", "workers": 2}, "--scheduler and --workers are both given"),
        ({"scheduler": "tcp://127.0.0.1:9", "cluster": tmp_path / "a.toml"}, "--scheduler and --cluster are both given"),
        ({"workers": 0}, "workers = 0 is not at least 1"),
    ):
        with pytest.raises(ClusterError, match=message):
            map_region(imagery=image, model=tiny_model, out=tmp_path / "out", **options)
    assert not list(tmp_path.iterdir())


def test_processes_are_for_many_sheets_and_many_gpus(monkeypatch):
    monkeypatch.setattr(canopy.region.engine, "visible_gpus", lambda device: ["4", "7"] if device == "cuda" else [])
    assert Engine().processes("cpu", 100) == 0
    assert Engine().processes("cuda", 100) == 2
    assert Engine().processes("cuda", 1) == 0, "one sheet is done here"
    assert Engine().processes("cuda:1", 100) == 0, "a GPU that is named is the one"
    assert Engine(workers=3).processes("cpu", 100) == 3
    assert Engine(workers=3).processes("cpu", 2) == 2
    assert Engine(workers=1).processes("cuda", 100) == 0
    assert Engine(scheduler="tcp://host:8786").processes("cuda", 100) == 0


def test_each_worker_has_a_gpu_and_its_share_of_the_cores(monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    monkeypatch.setattr(canopy.region.engine, "visible_gpus", lambda device: ["4", "7"] if device == "cuda" else [])
    assert worker_environment("cuda", 2, 0) == {"OMP_NUM_THREADS": "4", "CUDA_VISIBLE_DEVICES": "4"}
    assert worker_environment("cuda", 2, 1) == {"OMP_NUM_THREADS": "4", "CUDA_VISIBLE_DEVICES": "7"}
    assert worker_environment("cpu", 4, 3) == {"OMP_NUM_THREADS": "2"}


def test_gpus_that_the_batch_system_leaves(monkeypatch):
    import torch

    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert visible_gpus("cuda") == ["0", "1"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5,GPU-a1")
    assert visible_gpus("cuda") == ["5", "GPU-a1"]
    assert visible_gpus("cpu") == visible_gpus("cuda:0") == []


# --- this process ----------------------------------------------------------------------------------------------------------


def test_one_sheet_starts_no_cluster(image, tiny_model, tmp_path, monkeypatch):
    """It does not even load dask."""
    monkeypatch.setitem(sys.modules, "distributed", None)
    map_region(imagery=image, model=tiny_model, out=tmp_path / "out")
    with pytest.raises(ImportError):  # negative control
        map_region(imagery=image, model=tiny_model, out=tmp_path / "other", sheet_px=SHEET_PX)


def test_few_sheets_are_in_flight(image, tiny_model, whole_sheets, tmp_path, monkeypatch):
    """At any moment the files of two sheets are staged at most, and one is being predicted."""
    real, staged = canopy.region.engine.queue.SimpleQueue.get, []
    out = tmp_path / "out"

    class Watched(queue.SimpleQueue):
        def get(self, *args, **kwargs):
            attempts = {path.name.partition(".")[0] for path in out.glob(f"{WORK}/*/attempts/*")}
            staged.append(len({path.name for path in out.glob(f"{WORK}/*/staged/*_height.tif")} | attempts))
            return real(self, *args, **kwargs)

    monkeypatch.setattr(canopy.region.run.queue, "SimpleQueue", Watched)
    map_region(imagery=image, model=tiny_model, out=out, **SHEETS)
    assert 1 <= max(staged) <= 4
    assert content(out) == whole_sheets


def test_an_error_in_the_callers_code_comes_through(image, tiny_model, tmp_path):
    """The progress of sheets that other threads do is told in the caller's own."""
    seen = []

    def stop(done, total):
        seen.append((done, total))
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        map_region(imagery=image, model=tiny_model, out=tmp_path / "out", sheet_px=SHEET_PX, progress=stop)
    assert len(seen) == 1


# --- other processes -----------------------------------------------------------------------------------------------------


def test_no_scheduler_is_one_line(image, tiny_model, tmp_path, monkeypatch):
    monkeypatch.setattr(canopy.region.engine, "CONNECT_S", 0.5)
    for address in ("nowhere", "http://127.0.0.1:9", "tcp://127.0.0.1:9"):
        with pytest.raises(ClusterError, match=f"no dask scheduler answers at {re.escape(address)}; give its address"):
            map_region(imagery=image, model=tiny_model, out=tmp_path / "out", sheet_px=SHEET_PX, scheduler=address)
        assert not (tmp_path / "out").exists()


def test_imagery_that_cannot_travel(image, tiny_model, tmp_path):
    class Other:
        """The same imagery as an object of somebody else's."""

        def __init__(self, path):
            self._files = ImageFiles(path)
            self.info, self.open, self.record = self._files.info, self._files.open, self._files.record

    with pytest.raises(ClusterError, match="Python object cannot go to other processes"):
        map_region(imagery=Other(image), model=tiny_model, out=tmp_path / "out", sheet_px=SHEET_PX, workers=2)
    map_region(imagery=Other(image), model=tiny_model, out=tmp_path / "out", sheet_px=SHEET_PX)


@contextlib.contextmanager
def scheduler():
    """A dask scheduler in a process; its address."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    process = subprocess.Popen(
        [DASK, "scheduler", "--host", "127.0.0.1", "--port", str(port), "--no-dashboard"],
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=environment(),
    )  # fmt: skip
    try:
        address = f"tcp://127.0.0.1:{port}"
        end = time.monotonic() + 60
        while True:
            try:
                socket.create_connection(("127.0.0.1", port), timeout=1).close()
                break
            except OSError:
                assert time.monotonic() < end, "the scheduler did not start"
                time.sleep(0.1)
        yield address
    finally:
        process.kill()
        process.wait()


def environment():
    """What scheduler and workers need to find this canopy and no other."""
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[2])}


def worker(address, *words, nanny=True):
    return subprocess.Popen(
        [DASK, "worker", address, "--nthreads", "1", "--no-dashboard", "--nanny" if nanny else "--no-nanny", *words],
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=environment(),
    )  # fmt: skip


def end(*processes):
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            for child in psutil.Process(process.pid).children(recursive=True):
                with contextlib.suppress(psutil.NoSuchProcess):
                    child.kill()
        process.kill()
        process.wait()


@pytest.mark.slow
def test_two_workers_one_of_them_killed_twice(forks, image, tiny_model, whole_sheets, tmp_path):
    """Nothing is lost, nothing doubled: the files are those of an unbroken run, byte for byte, and no more."""
    out = tmp_path / "out"
    with scheduler() as address:
        workers = [worker(address), worker(address)]
        try:
            fork = forks.start(
                "map", "--imagery", image, "--model", tiny_model, "--out", out, "--sheet-size", SHEET_PX,
                "--max-file-size", SHEETS["max_file_px"], "--scheduler", address,
            )  # fmt: skip
            for count in (1, 3):
                wait_for(lambda count=count: len(records(out)) >= count or not fork.is_running)
                inside = [
                    child
                    for child in psutil.Process(workers[0].pid).children(recursive=True)
                    if "spawn_main" in " ".join(child.cmdline())
                ]
                for child in inside:
                    child.kill()  # its nanny starts another
            assert fork.wait() == 0, fork.stderr.read_text()
        finally:
            end(*workers)
    assert "Traceback" not in fork.stderr.read_text()
    assert content(out) == whole_sheets
    assert region_status(out).done == COUNT


def wait_for(what, seconds=180.0):
    stop = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < stop, "nothing happened"
        time.sleep(0.005)


@pytest.mark.slow
def test_processes_of_this_machine(forks, image, tiny_model, whole, tmp_path):
    """Two of them, one killed; and, when the run itself is killed, they end with it."""
    out = tmp_path / "out"
    words = ("map", "--imagery", image, "--model", tiny_model, "--sheet-size", SHEET_PX, "--workers", 2, "--out")
    fork = forks.start(*words, out)

    def children():
        return [c for c in psutil.Process(fork.pid).children() if "spawn_main" in " ".join(c.cmdline())]

    wait_for(lambda: records(out) or not fork.is_running)
    children()[0].kill()
    assert fork.wait() == 0, fork.stderr.read_text()
    assert "Traceback" not in fork.stderr.read_text()
    assert content(out) == whole

    out = tmp_path / "killed"
    fork = forks.start(*words, out)
    wait_for(lambda: records(out) or not fork.is_running)
    left = children()
    fork.kill()
    wait_for(lambda: not any(child.is_running() and child.status() != "zombie" for child in left), 60)
    resume_region(out)
    assert content(out) == whole


@pytest.mark.slow
def test_a_scheduler_without_a_worker_for_the_work(image, tiny_model, whole, tmp_path, monkeypatch):
    monkeypatch.setattr(canopy.region.engine, "WORKERS_S", 1.0)
    with scheduler() as address:
        with pytest.raises(ClusterError, match=r"had no worker for a sheet in 1 s; start dask worker"):
            map_region(imagery=image, model=tiny_model, out=tmp_path / "out", sheet_px=SHEET_PX, scheduler=address)
        assert not (tmp_path / "out").exists()
        monkeypatch.setattr(canopy.region.engine, "WORKERS_S", 120.0)
        one = worker(address, nanny=False)
        try:
            map_region(imagery=image, model=tiny_model, out=tmp_path / "out", sheet_px=SHEET_PX, scheduler=address)
        finally:
            end(one)
    assert content(tmp_path / "out") == whole


@pytest.mark.slow
def test_a_sheet_that_takes_its_workers_down_is_named(image, tiny_model, tmp_path, monkeypatch):
    """A worker that is ended for want of memory looks like this one, which ends itself. The sheets that wait beside it for
    the same worker are not blamed."""
    monkeypatch.setattr(canopy.region.engine, "run_stage_elsewhere", dying)
    monkeypatch.setattr(canopy.region.engine, "ALLOWED_FAILURES", 0)
    with pytest.raises(RegionError, match=rf"1 of {COUNT} sheets failed: \S+ \(took 1 workers down"):
        map_region(imagery=image, model=tiny_model, out=tmp_path / "out", sheet_px=SHEET_PX, workers=2)
    monkeypatch.undo()
    assert region_status(tmp_path / "out").done == COUNT - 1
    resume_region(tmp_path / "out")


def dying(folder, digest, stage, number):
    from canopy.region.sheet import run_stage_elsewhere

    if number == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    return run_stage_elsewhere(folder, digest, stage, number)


@pytest.mark.slow
def test_tasks_on_a_gpu_go_to_workers_that_offer_one(image, tiny_model, whole, tmp_path, monkeypatch):
    """The workers compute on a CPU here; what is tested is who is asked."""
    monkeypatch.setattr(canopy.region.plan.Plan, "device_type", "cuda")
    monkeypatch.setattr(canopy.region.engine, "WORKERS_S", 5.0)
    call = {"imagery": image, "model": tiny_model, "out": tmp_path / "out", "sheet_px": SHEET_PX}
    with scheduler() as address:
        without = worker(address, nanny=False)
        try:
            with pytest.raises(ClusterError, match=r"start dask worker with --resources GPU=1, or map with --device cpu"):
                map_region(**call, scheduler=address)
            monkeypatch.setattr(canopy.region.engine, "WORKERS_S", 120.0)
            with_one = worker(address, "--resources", "GPU=1", nanny=False)
            try:
                map_region(**call, scheduler=address)
                assert cpu_s(with_one) > cpu_s(without), "the worker without a GPU did the work"
            finally:
                end(with_one)
        finally:
            end(without)
    # Both of these say what the map was made on.
    found = {name: text for name, text in content(tmp_path / "out").items() if name not in ("README.txt", "item.json")}
    assert found == {name: whole[name] for name in found}
    assert {"height.tif", "error.tif", "region.qgz"} <= found.keys()


def cpu_s(process):
    times = psutil.Process(process.pid).cpu_times()
    return times.user + times.system

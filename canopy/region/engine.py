"""Who does the sheets: this process, processes of this machine, or the workers of a dask scheduler.

A bounded number of sheets is in flight: two for each that can be predicted at once, so that none waits for the next, and
neither the staged files nor the scheduler's memory grow with the region. On a GPU a task that predicts holds the resource
GPU=1, so that a worker of any number of threads predicts one sheet at a time and publishes the one before beside it.
A worker may die; what it had in hand is done by another.
"""

from __future__ import annotations

import logging
import os
import queue
import socket
import time
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from canopy.errors import CanopyError, ClusterError, ContractError, OutputError
from canopy.region.plan import Plan
from canopy.region.records import FailedSheet, SheetRecord, Stage, Work
from canopy.region.sheet import run_sheet, run_stage_elsewhere

ATTEMPTS: Final = 2
"""Times that a sheet is tried before it has failed: a file server hiccups, a block that cannot be decoded stays so."""

ALLOWED_FAILURES: Final = 3
"""Workers that one task may take down with it before it has failed."""

CONNECT_S: Final = 20.0
"""How long a scheduler may take to answer."""

WORKERS_S: Final = 60.0
"""How long a running scheduler may be without a worker that can take a sheet."""

THREADS: Final = 2
"""Threads of a worker: one predicts while the other publishes the sheet before."""

LOCAL_RESOURCE: Final = "MODEL"
"""What a task that predicts on a CPU holds on workers that we start, in place of a GPU."""

_NO_PORT: Final = "127.0.0.1:0"
"""Where a scheduler of ours says how it is: any port, or a second run would be warned that the usual one is taken."""

_LOGGERS: Final = ("distributed", "distributed.nanny", "distributed.worker", "distributed.scheduler", "distributed.core")


@dataclass(frozen=True, slots=True, kw_only=True)
class Engine:
    """Which workers a run wants."""

    scheduler: str | None = None
    """Address of a running dask scheduler."""
    cluster: Path | None = None
    """TOML that describes a cluster to start."""
    workers: int | None = None
    """Processes on this machine."""

    def __post_init__(self) -> None:
        given = [f"--{name}" for name in ("scheduler", "cluster", "workers") if getattr(self, name) is not None]
        if len(given) > 1:
            raise ClusterError(f"{given[0]} and {given[1]} are both given; give one of them")
        if self.workers is not None and self.workers < 1:
            raise ClusterError(f"workers = {self.workers} is not at least 1; 1 is this process alone")

    @property
    def elsewhere(self) -> bool:
        """Whether the workers are not processes that this one starts on its own machine."""
        return self.scheduler is not None or self.cluster is not None

    def processes(self, device: str, sheets: int) -> int:
        """Worker processes to start here for so many sheets; 0 is this process alone."""
        if self.elsewhere or sheets <= 1:
            return 0
        wanted = len(visible_gpus(device)) if self.workers is None else self.workers
        count = min(wanted, sheets)
        return count if count > 1 else 0


def visible_gpus(device: str) -> list[str]:
    """The GPUs of this machine that `device` leaves to choose from, as CUDA_VISIBLE_DEVICES names them; none for others."""
    if device != "cuda":  # cuda:1 is a choice
        return []
    import torch

    count = torch.cuda.device_count()
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    return [str(number) for number in range(count)] if named is None else named.split(",")[:count]


class WorkersDiedError(ClusterError):
    """A sheet that took several workers down with it."""


class SchedulerGoneError(ClusterError):
    """A scheduler that has ended, or that cannot take tasks of this canopy."""


# --- a crew ----------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Crew:
    """Workers that take tasks."""

    client: Any
    """A `distributed.Client`."""
    resources: dict[str, float]
    """What a task that predicts holds."""
    told: dict[str, Any]
    """What a run's record says of it."""
    patience_s: float | None
    """How long there may be no worker; None: as long as it takes, a queue is a queue."""

    def slots(self) -> int:
        """Sheets that can be predicted at once now."""
        info = self.client.scheduler_info(n_workers=-1)["workers"].values()
        if not self.resources:
            return sum(int(worker["nthreads"]) for worker in info)
        return sum(int(worker["resources"].get(name, 0) // n) for worker in info for name, n in self.resources.items())


@contextmanager
def crew_for(plan: Plan, engine: Engine, sheets: int) -> Iterator[Crew | None]:
    """Workers for so many sheets of a plan; None: this process does them one after the other.

    One sheet is done without any of this: a cluster takes longer to start than a small map to make.

    Raises:
        ClusterError: a scheduler does not answer, a cluster cannot be started, or the imagery cannot travel.
    """
    if not engine.elsewhere and sheets <= 1:
        yield None
        return
    processes = engine.processes(plan.device, sheets)
    if (engine.elsewhere or processes) and plan.imagery.kind == "object":
        raise ClusterError(
            "imagery that is a Python object cannot go to other processes; give files or a manifest, or use no workers"
        )
    import dask
    from distributed import Client

    # What dask logs of a lost worker or connection is told in one line by who waits for the task.
    for name in _LOGGERS:
        logging.getLogger(name).setLevel(logging.CRITICAL)
    settings = {
        "distributed.scheduler.allowed-failures": ALLOWED_FAILURES,
        # A stolen sheet is one that two workers may have begun; there are few and they are large.
        "distributed.scheduler.work-stealing": False,
    }
    with ExitStack() as stack:
        stack.enter_context(dask.config.set(settings))
        resources = {"GPU": 1.0} if plan.device_type == "cuda" else {}
        address: Any = engine.scheduler
        if engine.cluster is not None:
            from canopy.region.cluster import start_cluster

            resources = resources or {LOCAL_RESOURCE: 1.0}
            address = stack.enter_context(start_cluster(engine.cluster, next(iter(resources))))
        elif engine.scheduler is None:
            resources = resources or {LOCAL_RESOURCE: 1.0}
            address = stack.enter_context(_local_cluster(plan, processes, resources))
        try:
            if engine.scheduler is not None:
                # Asked before there is a client: one that never connects writes a traceback when it is taken away.
                _knock(engine.scheduler)
            connect: Any = Client
            client = stack.enter_context(connect(address, timeout=CONNECT_S, set_as_default=False))
        except (OSError, ValueError) as error:
            raise ClusterError(
                f"no dask scheduler answers at {engine.scheduler or engine.cluster}; give its address as tcp://host:8786"
            ) from error
        kind = engine.scheduler or (str(engine.cluster) if engine.cluster is not None else None)
        yield Crew(
            client=client,
            resources=resources,
            told={"cluster": kind or ("processes" if processes else "this process"), "workers": processes or None},
            patience_s=WORKERS_S if engine.cluster is None else None,
        )


def _knock(address: str) -> None:
    from distributed.comm.addressing import get_address_host_port

    socket.create_connection(get_address_host_port(address), timeout=CONNECT_S).close()


def _local_cluster(plan: Plan, processes: int, resources: dict[str, float]) -> Any:
    """A cluster in this process, or of so many processes on this machine."""
    from distributed import LocalCluster, Nanny, Scheduler, SpecCluster

    # No limit to memory: a worker that pauses until it falls may pause for ever; the system ends one that takes too much.
    options: dict[str, Any] = {"nthreads": THREADS, "memory_limit": 0, "resources": resources, "dashboard": False}
    if not processes:
        local: Any = LocalCluster
        return local(
            n_workers=1, threads_per_worker=THREADS, processes=False, memory_limit=0, resources=resources,
            dashboard_address=_NO_PORT, silence_logs=logging.CRITICAL,
        )  # fmt: skip
    spec: Any = SpecCluster
    scheduler = {
        "cls": Scheduler,
        "options": {"dashboard": False, "dashboard_address": _NO_PORT, "host": "127.0.0.1", "port": 0},
    }
    workers = {
        number: {
            "cls": Nanny,
            "options": {
                **options, "host": "127.0.0.1", "silence_logs": logging.CRITICAL,
                "env": worker_environment(plan.device, processes, number),
            },
        }
        for number in range(processes)
    }  # fmt: skip
    return spec(workers=workers, scheduler=scheduler, silence_logs=logging.CRITICAL)


def worker_environment(device: str, processes: int, number: int) -> dict[str, str]:
    """What worker `number` of so many on this machine has for itself: a share of the cores, and one GPU."""
    environment = {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS") or str(max(1, (os.cpu_count() or 1) // processes))}
    gpus = visible_gpus(device)
    if gpus:
        environment["CUDA_VISIBLE_DEVICES"] = gpus[number % len(gpus)]
    return environment


# --- working through the sheets ------------------------------------------------------------------------------------------


@dataclass(slots=True, kw_only=True)
class Outcome:
    """What became of the sheets of a run; filled while it goes on."""

    failed: list[FailedSheet] = field(default_factory=list)
    """In the order in which they failed."""
    left: int = 0
    """Sheets that were not begun, since what stopped one would have stopped them all."""
    first_error: CanopyError | None = None


@dataclass(slots=True, kw_only=True)
class Told:
    """Whom the work tells of its progress, in the thread that waits for it."""

    windows: Callable[[int], None]
    """Windows of a sheet in this process that are done."""
    done: Callable[[SheetRecord], None]
    """A sheet that is done."""


def work_alone(work: Work, todo: list[int], told: Told) -> Outcome:
    """Do sheets in this process, one after the other."""
    outcome = Outcome()
    waiting = list(todo)
    while waiting:
        number = waiting.pop(0)
        for attempt in range(1, ATTEMPTS + 1):
            try:
                told.done(run_sheet(str(work.folder), work.plan.digest, number))
                break
            except CanopyError as error:
                if attempt < ATTEMPTS and _is_worth_another(error):
                    continue
                if _give_up(work, outcome, number, error):
                    outcome.left, waiting = outcome.left + len(waiting), []
                break
    return outcome


def work_together(crew: Crew, work: Work, todo: list[int], told: Told, windows: queue.SimpleQueue[Any]) -> Outcome:
    """Have workers do sheets.

    Args:
        crew: The workers.
        work: What to work on.
        todo: Numbers of the sheets.
        told: Whom to tell.
        windows: What the tasks of this process put the numbers of windows into that are done; other things are put there
            as well.

    Raises:
        ClusterError: the scheduler is gone, or has no worker that could take a sheet.
    """
    outcome, events = Outcome(), windows
    waiting, attempts = list(reversed(todo)), dict.fromkeys(todo, 1)
    flying: dict[Any, int] = {}
    suspects: list[int] = []  # what workers that died had in hand, running or waiting
    limits = _Limits(crew)

    def submit(stage: Stage, number: int) -> None:
        future = crew.client.submit(
            run_stage_elsewhere, str(work.folder), work.plan.digest, stage, number,
            key=f"canopy-{work.plan.digest[:16]}-{stage}-{work.plan.sheet_name(number)}-{attempts[number]}-{time.time_ns()}",
            pure=False, resources=crew.resources if stage == "predict" else None, priority=int(stage == "publish"),
        )  # fmt: skip
        flying[future] = number
        future.add_done_callback(events.put)

    while waiting or flying or suspects:
        while waiting and len(flying) < limits.in_flight():
            submit("predict", waiting.pop())
        if suspects and not flying:  # alone, so that a worker that dies now was taken down by this sheet
            attempts[suspects[0]] += 1
            submit("predict", suspects.pop(0))
        try:
            event = events.get(timeout=1.0)
        except queue.Empty:
            limits.refuse_idleness()
            continue
        if isinstance(event, int):
            told.windows(event)
            continue
        if event not in flying:
            continue
        number = flying.pop(event)
        try:
            record = SheetRecord.model_validate(_result(event))
        except CanopyError as error:
            if isinstance(error, SchedulerGoneError):
                raise
            if isinstance(error, WorkersDiedError) and attempts[number] < ATTEMPTS:
                suspects.append(number)
            elif attempts[number] < ATTEMPTS and _is_worth_another(error):
                attempts[number] += 1
                submit("predict", number)  # which finds what is done, and does the rest
            elif _give_up(work, outcome, number, error):
                outcome.left, waiting, suspects = outcome.left + len(waiting) + len(suspects), [], []
            continue
        limits.seen()
        if record.stage == work.last_stage:
            told.done(record)
        else:
            submit(work.last_stage, number)
    return outcome


def _result(future: Any) -> Any:
    """What a task returned, or why it did not, as an error for people."""
    import distributed
    from distributed.comm.core import CommClosedError

    try:
        return future.result()
    except distributed.KilledWorker as error:
        raise WorkersDiedError(
            f"took {ALLOWED_FAILURES + 1} workers down with it, most often for want of memory; give each more, or choose a "
            f"smaller --sheet-size"
        ) from error
    except (CancelledError, CommClosedError) as error:
        raise SchedulerGoneError("the dask scheduler is gone; start it again, and go on with canopy map resume") from error
    except RuntimeError as error:
        if "deserialization" not in str(error):
            raise
        raise SchedulerGoneError(
            "the dask scheduler does not understand what it is given; install the same canopy where it runs"
        ) from error
    except ModuleNotFoundError as error:
        raise ClusterError(
            f"a worker lacks {error.name}; install the same canopy in the environment of all workers"
        ) from error


class _Limits:
    """How many sheets may be in flight with the workers that there are."""

    def __init__(self, crew: Crew) -> None:
        self._crew = crew
        self._slots, self._asked = crew.slots(), time.monotonic()
        self._busy = self._asked

    def in_flight(self) -> int:
        """Two for each sheet that can be predicted at once: one that is, and the next."""
        return 2 * max(1, self._slots)

    def seen(self) -> None:
        """A task came back: workers may have come or gone since the last look."""
        if time.monotonic() - self._asked > 1:
            self._slots, self._asked = self._crew.slots(), time.monotonic()

    def refuse_idleness(self) -> None:
        """Stop when there has long been nobody who could do the work."""
        self.seen()
        if self._slots:
            self._busy = time.monotonic()
            return
        patience_s = self._crew.patience_s
        if patience_s is not None and time.monotonic() - self._busy > patience_s:
            wants = " with --resources GPU=1, or map with --device cpu" if "GPU" in self._crew.resources else ""
            raise ClusterError(
                f"{self._crew.told['cluster']} had no worker for a sheet in {patience_s:.0f} s; start dask worker{wants}"
            )


def _is_worth_another(error: CanopyError) -> bool:
    """Whether trying again may help: not where the disk is full, the model does not fit, or several workers have died."""
    return not isinstance(error, OutputError | ContractError | WorkersDiedError)


def _give_up(work: Work, outcome: Outcome, number: int, error: CanopyError) -> bool:
    """Note a failure; whether it would stop every other sheet as well."""
    outcome.failed.append(work.fail(number, str(error)))
    outcome.first_error = outcome.first_error or error
    return isinstance(error, OutputError | ContractError)

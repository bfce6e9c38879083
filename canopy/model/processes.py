"""The processes that train together: who started them, how many there are, and how they are stopped.

torchrun and SLURM's srun start one process per device and say so in the environment; without them Lightning starts the
others itself, on this machine.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from types import FrameType
from typing import Any, Literal

from lightning.fabric.plugins.environments.cluster_environment import ClusterEnvironment
from lightning.fabric.plugins.environments.lightning import LightningEnvironment
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.fabric.plugins.environments.torchelastic import TorchElasticEnvironment
from lightning.pytorch.utilities import rank_zero_only

from canopy.errors import RecipeError
from canopy.model.recipe import Optim


def rank() -> int:
    """Which of the processes that train together this is; 0 is the one that writes."""
    return int(getattr(rank_zero_only, "rank", 0))


# --- how many ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Processes:
    """Where this process finds itself."""

    starter: Literal["torchrun", "srun", "none"]
    """Who started it together with others; none: nobody, Lightning may."""
    devices: int | Literal["auto"]
    """Processes on this node."""
    nodes: int

    def environment(self) -> ClusterEnvironment:
        """Lightning's view of it."""
        if self.starter == "torchrun":
            return TorchElasticEnvironment()
        # Its own answer to SLURM's signal saves wherever the signal meets the process, also in the middle of a step.
        return SLURMEnvironment(auto_requeue=False) if self.starter == "srun" else LightningEnvironment()


def processes(optim: Optim, environ: Mapping[str, str] | None = None) -> Processes:
    """The processes that torchrun or SLURM started, compared with what the recipe asks for.

    Args:
        optim: `devices` and `nodes` of the recipe.
        environ: the environment; default this process's.

    Raises:
        RecipeError: the recipe asks for another number, tasks are spread unevenly over the nodes, or a SLURM job of
            several tasks runs without srun.
    """
    env = os.environ if environ is None else environ
    if {"TORCHELASTIC_RUN_ID", "WORLD_SIZE", "LOCAL_WORLD_SIZE"} <= env.keys():
        world, per_node = int(env["WORLD_SIZE"]), int(env["LOCAL_WORLD_SIZE"])
        if world % per_node:
            raise RecipeError(f"torchrun started {world} processes, {per_node} of them here; start as many on every node")
        return _matching(optim, "torchrun", per_node, world // per_node)
    if "SLURM_STEP_ID" in env and "SLURM_PROCID" in env:
        tasks = int(env.get("SLURM_STEP_NUM_TASKS", env.get("SLURM_NTASKS", "1")))
        nodes = int(env.get("SLURM_STEP_NUM_NODES", env.get("SLURM_NNODES", "1")))
        if tasks % nodes or "," in env.get("SLURM_STEP_TASKS_PER_NODE", ""):
            raise RecipeError(f"srun started {tasks} tasks on {nodes} nodes; give every node as many with --ntasks-per-node")
        return _matching(optim, "srun", tasks // nodes, nodes)
    if "SLURM_JOB_ID" in env and int(env.get("SLURM_NTASKS", "1")) > 1:
        raise RecipeError(
            f"the SLURM job has {env['SLURM_NTASKS']} tasks, but srun did not start this process; "
            f"write `srun canopy train ...` in the job script"
        )
    if optim.nodes not in {1, "auto"}:
        raise RecipeError(
            f"the recipe's optim.nodes is {optim.nodes}, but neither torchrun nor srun started this process; "
            f"start it with one of them, or set nodes = 1"
        )
    return Processes(starter="none", devices=optim.devices, nodes=1)


def _matching(optim: Optim, starter: Literal["torchrun", "srun"], devices: int, nodes: int) -> Processes:
    option = {"torchrun": ("--nproc-per-node", "--nnodes"), "srun": ("--ntasks-per-node", "--nodes")}[starter]
    if optim.devices not in {"auto", devices}:
        raise RecipeError(
            f"{starter} runs {devices} processes per node, but the recipe's optim.devices is {optim.devices}; "
            f"use {option[0]}={optim.devices}, or set optim.devices to {devices} or 'auto'"
        )
    if optim.nodes not in {"auto", nodes}:
        raise RecipeError(
            f"{starter} runs on {nodes} nodes, but the recipe's optim.nodes is {optim.nodes}; "
            f"use {option[1]}={optim.nodes}, or set optim.nodes to {nodes} or 'auto'"
        )
    return Processes(starter=starter, devices=devices, nodes=nodes)


# --- stopping ------------------------------------------------------------------------------------------------------------

STOPPING = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
"""Signals that end a run after the step in hand, in the order of their say: SIGUSR1 is SLURM's word that the time is up."""


class Stopping:
    """Notes a signal, so that the training loop stops where it can; a second Ctrl-C interrupts at once."""

    def __init__(self) -> None:
        self.signal = 0
        """Number of the signal that came, 0 if none did."""
        self._before: dict[int, Any] = {}

    def watch(self) -> None:
        """Listen, instead of whoever did. Nothing happens outside the main thread, where signals cannot be had."""
        if threading.current_thread() is not threading.main_thread():
            return
        for number in STOPPING:
            self._before.setdefault(number, signal.getsignal(number))
            signal.signal(number, self._note)

    def release(self) -> None:
        """Hand the signals back."""
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before.clear()

    def _note(self, number: int, _frame: FrameType | None) -> None:
        if number == self.signal == signal.SIGINT:
            raise KeyboardInterrupt
        self.signal = number


def requeue(environ: Mapping[str, str] | None = None) -> str:
    """Ask SLURM to run this job again from its start; what came of it, as the rest of a sentence."""
    env = os.environ if environ is None else environ
    job = env.get("SLURM_JOB_ID")
    if job is None:
        return "no SLURM job to requeue"
    if "SLURM_ARRAY_JOB_ID" in env:
        job = f"{env['SLURM_ARRAY_JOB_ID']}_{env['SLURM_ARRAY_TASK_ID']}"
    if not re.fullmatch(r"[0-9_]+", job):
        return f"job {job!r} was not requeued, because that is no job number"
    try:
        done = subprocess.run(["scontrol", "requeue", job], capture_output=True, text=True, check=False, timeout=60)  # noqa: S603, S607
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"job {job} was not requeued ({error}); submit it again"
    if done.returncode:
        why = " ".join(done.stderr.split()) or f"scontrol ended with {done.returncode}"
        return f"job {job} was not requeued ({why}); submit it again"
    return f"job {job} was requeued"

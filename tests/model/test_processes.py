"""Who started this process, with how many others, and how signals are noted."""

import os
import signal
import stat

import pytest

from canopy.errors import RecipeError
from canopy.model.processes import Stopping, processes, requeue
from canopy.model.recipe import Optim

TORCHRUN = {"TORCHELASTIC_RUN_ID": "x", "WORLD_SIZE": "8", "LOCAL_WORLD_SIZE": "4", "RANK": "5", "LOCAL_RANK": "1"}
SRUN = {
    "SLURM_JOB_ID": "1", "SLURM_STEP_ID": "0", "SLURM_PROCID": "3", "SLURM_NTASKS": "8", "SLURM_NNODES": "2",
    "SLURM_STEP_NUM_TASKS": "8", "SLURM_STEP_NUM_NODES": "2", "SLURM_STEP_TASKS_PER_NODE": "4(x2)",
}  # fmt: skip


def optim(**changes) -> Optim:
    return Optim(steps=1, **changes)


@pytest.mark.parametrize(("environ", "starter"), [(TORCHRUN, "torchrun"), (SRUN, "srun")])
def test_what_started_the_others_says_how_many_they_are(environ, starter):
    for settings in (optim(), optim(devices=4, nodes=2), optim(devices=4), optim(nodes=2)):
        here = processes(settings, environ)
        assert (here.starter, here.devices, here.nodes) == (starter, 4, 2)


def test_nobody_started_others():
    here = processes(optim(devices=2), {"HOME": "/"})
    assert (here.starter, here.devices, here.nodes) == ("none", 2, 1)
    # One task of a job, in its script: as on any machine.
    assert processes(optim(), {"SLURM_JOB_ID": "1", "SLURM_NTASKS": "1"}).starter == "none"


@pytest.mark.parametrize(
    ("environ", "settings", "message"),
    [
        (TORCHRUN, {"devices": 8}, "torchrun runs 4 processes per node, .* optim.devices is 8; use --nproc-per-node=8"),
        (TORCHRUN, {"nodes": 1}, "torchrun runs on 2 nodes, but the recipe's optim.nodes is 1; use --nnodes=1"),
        (TORCHRUN | {"WORLD_SIZE": "7"}, {}, "as many on every node"),
        (SRUN, {"devices": 2}, "srun runs 4 processes per node, .* optim.devices is 2; use --ntasks-per-node=2"),
        (SRUN, {"nodes": 4}, "srun runs on 2 nodes, but the recipe's optim.nodes is 4; use --nodes=4"),
        (SRUN | {"SLURM_STEP_NUM_TASKS": "5"}, {}, "give every node as many"),
        (SRUN | {"SLURM_STEP_TASKS_PER_NODE": "5,3"}, {}, "give every node as many"),
        ({"SLURM_JOB_ID": "1", "SLURM_NTASKS": "8"}, {}, "write `srun canopy train ...` in the job script"),
        ({}, {"nodes": 2}, "neither torchrun nor srun started this process"),
    ],
)
def test_other_numbers_than_the_recipes_are_refused_in_one_line(environ, settings, message):
    with pytest.raises(RecipeError, match=message) as caught:
        processes(optim(**settings), environ)
    assert "\n" not in str(caught.value)


def test_signals_are_noted_and_handed_back():
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)]
    stopping = Stopping()
    stopping.watch()
    stopping.watch()  # twice is once
    try:
        assert stopping.signal == 0
        os.kill(os.getpid(), signal.SIGUSR1)
        assert stopping.signal == signal.SIGUSR1
        os.kill(os.getpid(), signal.SIGINT)
        assert stopping.signal == signal.SIGINT
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    finally:
        stopping.release()
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)] == before


def test_requeue_says_what_came_of_it(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    array = {"SLURM_JOB_ID": "9", "SLURM_ARRAY_JOB_ID": "7", "SLURM_ARRAY_TASK_ID": "3"}
    assert requeue({}) == "no SLURM job to requeue"
    assert "no job number" in requeue({"SLURM_JOB_ID": "1; rm"})
    assert "job 9 was not requeued" in requeue({"SLURM_JOB_ID": "9"})  # no scontrol here
    program = tmp_path / "scontrol"
    program.write_text('#!/bin/sh\n[ "$1 $2" = "requeue 7_3" ] || { echo "Job is not\nrequeueable" >&2; exit 1; }\n')
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    assert requeue(array) == "job 7_3 was requeued"
    assert requeue({"SLURM_JOB_ID": "9"}) == "job 9 was not requeued (Job is not requeueable); submit it again"

"""Training in real processes: two of them are one, and whatever ends a process, the run goes on as if nothing had."""

import os
import shutil
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from canopy.model.checkpoints import checkpoints
from canopy.model.package import load_model
from tests.model.train_driver import run, start
from tests.model.training import curve, make_tile_sets, recipe, same, weights

ROOT = Path(__file__).parents[2]

LOSS_TOLERANCE = 1e-5
"""Relative: sums in float32 in another order."""
WEIGHT_TOLERANCE = 1e-4
"""Absolute, of weights of about 0.1: Adam divides gradients by their size, so rounding in tiny ones counts in full."""

PVT = {"depths": [1, 1, 1, 1], "embed_dims": [8, 16, 16, 16], "num_heads": [1, 1, 2, 2]}
"""Without drop path, which each process would draw for itself."""
VIT = {
    "backbone": "vit_tiny_patch16_224",
    "backbone_options": {"depth": 4, "embed_dim": 32, "num_heads": 2},
    "decoder_channels": 8, "head_channels": 8, "bins": {"count": 16, "max_m": 24.0, "spacing": "linear"},
}  # fmt: skip


@pytest.fixture(scope="module")
def tile_sets(tmp_path_factory) -> Path:
    """With voids of many sizes: the two halves of a batch hardly ever have as many valid pixels."""
    return make_tile_sets(tmp_path_factory.mktemp("tiles"), voids=0.4)


def run_of(out: Path) -> Path:
    return out.parent / "runs" / out.name


def far(one: Path, other: Path, first: int = 0) -> tuple[float, float]:
    """Largest relative difference of the loss curves from step `first`, and largest difference of weights and averages."""
    w, v = weights(one), weights(other)
    assert w.keys() == v.keys()
    names = [name for name in w if not name.startswith("optimiser.")]
    loss = np.abs(curve(one)[first:] / curve(other, first) - 1).max()
    return float(loss), max(float((w[name] - v[name]).abs().max()) for name in names)


@pytest.mark.slow
def test_two_processes_are_one_with_the_same_batch(tile_sets, tmp_path):
    changes = {"model__network__backbone_options": PVT, "optim__devices": "auto", "optim__steps": 8}
    path = recipe(tile_sets, tmp_path, **changes)
    outs = {name: tmp_path / name / "model" for name in ("one", "two", "own")}
    for out in outs.values():
        out.parent.mkdir()
    assert run(path, outs["one"])[0] == [0]
    statuses, said = run(path, outs["two"], processes=2)
    assert statuses == [0, 0], said
    loss, weight = far(run_of(outs["one"]), run_of(outs["two"]))
    assert loss < LOSS_TOLERANCE
    assert weight < WEIGHT_TOLERANCE
    # The negative control: each process divides by its own count of valid pixels.
    assert run(path, outs["own"], processes=2, own_sums=True)[0] == [0, 0]
    loss, weight = far(run_of(outs["one"]), run_of(outs["own"]))
    assert loss > 100 * LOSS_TOLERANCE
    assert weight > WEIGHT_TOLERANCE


@pytest.mark.slow
def test_parted_weights_are_whole_ones_and_any_number_of_processes_goes_on(tile_sets, tmp_path):
    changes = {
        "model__network": VIT,
        "tuning": {"backbone": "lora", "lora_rank": 2, "checkpointing": True, "layer_decay": 0.8},
        "optim__devices": "auto",
        "optim__accumulate": 1,
    }
    one, two = tmp_path / "one" / "model", tmp_path / "two" / "model"
    path = recipe(tile_sets, one.parent, **changes)
    parted = recipe(tile_sets, two.parent, **changes, optim__strategy="fsdp")
    assert run(path, one)[0] == [0]
    # A signal to one process stops both, after the same step.
    statuses, said = run(parted, two, processes=2, accident=("SIGTERM", 1, 1))
    assert statuses == [1, 1], said
    assert said.count("line: training stopped at step 2 of 6; go on with --resume") == 2
    assert "by SIGTERM, checkpoint written" in said
    statuses, said = run(parted, two, processes=2, resume_if_any=True)
    assert statuses == [0, 0], said
    assert "from step 2 to 6 on cpu, 2 processes" in said
    there = run_of(two)
    assert not any("_orig_mod" in name for name in weights(there))
    loss, weight = far(run_of(one), there, first=2)
    assert loss < LOSS_TOLERANCE
    assert weight < WEIGHT_TOLERANCE
    # One process, without parts, goes on from the checkpoint of two.
    checkpoints(there)[0].unlink()
    assert checkpoints(there)[0].name == "step-0000003.ckpt"
    statuses, said = run(path, two, resume=there)
    assert statuses == [0], said
    loss, weight = far(run_of(one), there, first=3)
    assert loss < LOSS_TOLERANCE
    assert weight < WEIGHT_TOLERANCE


@pytest.mark.slow
def test_a_run_killed_at_any_moment_ends_with_the_same_bits(tile_sets, tmp_path):
    path = recipe(tile_sets, tmp_path, optim__steps=8, optim__checkpoint_every=2)
    whole, out = tmp_path / "whole" / "model", tmp_path / "killed" / "model"
    whole.parent.mkdir()
    out.parent.mkdir()
    there = run_of(out)
    assert run(path, whole)[0] == [0]
    # Whenever it happens to have written its first checkpoint: nobody knows what it is doing then.
    (worker,) = start(path, out, out.parent / "log")
    deadline = time.monotonic() + 300
    while not checkpoints(there):
        assert worker.is_alive()
        assert time.monotonic() < deadline
        time.sleep(0.01)
    worker.kill()
    worker.join()
    first = int(checkpoints(there)[0].stem.removeprefix("step-"))
    # In the middle of a step: before the second of its two batches.
    statuses, said = run(path, out, resume_if_any=True, accident=("SIGKILL", 3, 0))
    assert statuses == [-signal.SIGKILL], said
    # And half a checkpoint, as after a crash of the machine.
    newest = checkpoints(there)[0]
    damaged = newest.with_name("step-0000007.ckpt")
    damaged.write_bytes(newest.read_bytes()[:-1000])
    partial = newest.with_name(".step-0000009.ckpt.partial")
    partial.write_bytes(b"half")
    statuses, said = run(path, out, resume_if_any=True)
    assert statuses == [0], said
    assert f"{damaged} is damaged" in said
    assert f"from step {first} to 8" in said
    assert not partial.exists()
    assert same(weights(there), weights(run_of(whole)))
    assert torch.equal(torch.tensor(curve(there, first)), torch.tensor(curve(run_of(whole))[first:]))


@pytest.mark.slow
def test_what_ends_all_processes_leaves_a_line_and_the_checkpoint(tile_sets, tmp_path):
    changes = {"optim__devices": "auto", "optim__accumulate": 1, "optim__checkpoint_every": 2}
    path = recipe(tile_sets, tmp_path, **changes)
    out = tmp_path / "model"
    statuses, said = run(path, out, processes=2, accident=("nan", 3, 1))
    assert statuses == [1, 1], said
    assert said.count("line: step 4 has a loss or a gradient that is no number") == 2
    assert "step-0000002.ckpt, is kept" in said
    assert all(value.isfinite().all() for value in weights(run_of(out)).values())
    statuses, said = run(path, out, resume_if_any=True, accident=("memory", 0, 0))
    assert statuses == [1], said
    assert "line: out of memory in the step after 2" in said
    assert "go on with --resume" in said
    statuses, said = run(path, out, resume_if_any=True, accident=("SIGINT", 0, 0))
    assert statuses == [130], said
    assert "training stopped at step 3 of 6; go on with --resume" in said
    assert checkpoints(run_of(out))[0].name == "step-0000003.ckpt"
    # A batch that two processes cannot share.
    statuses, said = run(recipe(tile_sets, tmp_path, optim__devices="auto"), out.parent / "odd", processes=3)
    assert statuses == [1, 1, 1]
    assert said.count("line: a batch of 2 samples") == 3, said


# --- SLURM ---------------------------------------------------------------------------------------------------------------

SRUN = """#!{python}
'''What srun does: as many tasks as the job has, each with its variables; the first that fails ends the others.'''
import itertools, os, subprocess, sys, time
words = list(itertools.dropwhile(lambda word: word.startswith("--"), sys.argv[1:]))  # its own come first
nodes, each = int(os.environ["SLURM_NNODES"]), int(os.environ["SLURM_NTASKS_PER_NODE"])
tasks = []
for rank in range(nodes * each):
    step = {{
        "SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": nodes * each, "SLURM_STEP_NUM_NODES": nodes,
        "SLURM_STEP_TASKS_PER_NODE": f"{{each}}(x{{nodes}})" if nodes > 1 else each, "SLURM_PROCID": rank,
        "SLURM_LOCALID": rank % each, "SLURM_NODEID": rank // each,
    }}
    tasks.append(subprocess.Popen(words, env=os.environ | {{key: str(value) for key, value in step.items()}}))
with open(os.environ["TASKS"], "w") as file:
    file.write(" ".join(str(task.pid) for task in tasks))
while any(task.poll() is None for task in tasks):
    if any(task.poll() not in (None, 0) for task in tasks):
        time.sleep(20)
        for task in tasks:
            task.kill()
    time.sleep(0.1)
sys.exit(max(abs(task.returncode) for task in tasks))
"""

SCONTROL = """#!/bin/sh
echo "$*" >> "$REQUESTS"
"""


def executable(path: Path, text: str) -> None:
    path.write_text(text)
    path.chmod(path.stat().st_mode | stat.S_IXUSR)


def job(script: Path, words: list[str | Path], folder: Path, *, nodes: int, tasks_per_node: int) -> subprocess.Popen:
    """A job as sbatch starts it on its first node, with an srun that starts every task here."""
    programs = folder / "bin"
    programs.mkdir(exist_ok=True)
    executable(programs / "srun", SRUN.format(python=sys.executable))
    executable(programs / "scontrol", SCONTROL)
    executable(programs / "canopy", f'#!/bin/sh\nexec {sys.executable} -m canopy "$@"\n')
    environment = {
        **os.environ, "PATH": f"{programs}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT), "TASKS": str(folder / "tasks"),
        "REQUESTS": str(folder / "requests"), "SLURM_JOB_ID": "4711", "SLURM_JOB_NAME": "canopy-train",
        "SLURM_NTASKS": str(nodes * tasks_per_node), "SLURM_NTASKS_PER_NODE": str(tasks_per_node),
        "SLURM_NNODES": str(nodes), "SLURM_NODELIST": "127.0.0.1", "SLURM_CPUS_PER_TASK": "1", "SLURM_PROCID": "0",
    }  # fmt: skip
    return subprocess.Popen(
        ["bash", script, *words], cwd=folder, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )


@pytest.mark.slow
def test_a_job_out_of_time_is_requeued_and_ends_with_a_model(tile_sets, tmp_path):
    changes = {"optim__devices": "auto", "optim__accumulate": 1, "optim__steps": 40, "optim__checkpoint_every": 1000}
    path = recipe(tile_sets, tmp_path, **changes)
    out, there = tmp_path / "model", tmp_path / "runs" / "model"
    script = ROOT / "models" / "slurm" / "requeue.sbatch"
    first = job(script, [path, "--out", out], tmp_path, nodes=2, tasks_per_node=1)
    deadline = time.monotonic() + 600
    while not list((there / "csv").glob("*/metrics.csv")):
        assert first.poll() is None, first.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.1)
    # SLURM signals all tasks; here only the second hears it, which has to be enough.
    os.kill(int((tmp_path / "tasks").read_text().split()[1]), signal.SIGUSR1)
    said, _ = first.communicate(timeout=600)
    assert first.returncode == 1, said
    assert "by SIGUSR1, checkpoint written); job 4711 was requeued" in said
    assert (tmp_path / "requests").read_text() == "requeue 4711\n"
    assert "Traceback" not in said
    (checkpoint,) = checkpoints(there)
    step = int(checkpoint.stem.removeprefix("step-"))
    assert 0 < step < 40
    again = job(script, [path, "--out", out], tmp_path, nodes=2, tasks_per_node=1)
    said, _ = again.communicate(timeout=900)
    assert again.returncode == 0, said
    assert f"from step {step} to 40 on cpu, 2 processes" in said
    assert load_model(out).contract.training.sites == ("EAST", "WEST")


SCRIPTS = sorted((ROOT / "models" / "slurm").glob("*.sbatch"))


@pytest.mark.parametrize("script", SCRIPTS, ids=[script.stem for script in SCRIPTS])
def test_job_scripts_are_sound(script, tmp_path):
    subprocess.run(["bash", "-n", script], check=True)
    if checker := shutil.which("shellcheck"):
        subprocess.run([checker, script], check=True)
    lines = script.read_text().splitlines()
    # sbatch stops looking for its lines at the first command.
    command = next(number for number, line in enumerate(lines) if line and not line.startswith("#"))
    assert not [line for line in lines[command:] if line.startswith("#SBATCH")]
    programs = tmp_path / "bin"
    programs.mkdir()
    executable(programs / "srun", '#!/bin/sh\necho "$@"\n')
    environment = {**os.environ, "PATH": f"{programs}:{os.environ['PATH']}"}
    done = subprocess.run(
        ["bash", script, "a recipe.toml", "--overwrite"], env=environment, capture_output=True, text=True, check=True
    )
    assert "canopy train a recipe.toml" in done.stdout
    assert done.stdout.rstrip().endswith("--overwrite")
    assert ("--resume-if-any" in done.stdout) == (script.stem == "requeue")
    missing = subprocess.run(["bash", script], env=environment, capture_output=True, text=True, check=False)
    assert missing.returncode
    assert "usage: sbatch" in missing.stderr

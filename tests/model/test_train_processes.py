"""Training in real processes: two of them are one, and whatever ends a process, the run goes on as if nothing had."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from canopy.model import train as training
from canopy.model.checkpoints import checkpoints
from tests.model.training import curve, make_tile_sets, recipe, same, weights

ROOT = Path(__file__).parents[2]
DRIVER = "tests.model.train_driver"

LOSS_TOLERANCE = 1e-5
"""Relative: sums in float32 in another order."""
WEIGHT_TOLERANCE = 1e-4
"""Absolute, of weights of about 0.3: Adam divides tiny gradients by their size, so rounding in them counts in full."""

PVT = {"depths": [1, 1, 1, 1], "embed_dims": [8, 16, 16, 16], "num_heads": [1, 1, 2, 2]}
VIT = {
    "backbone": "vit_tiny_patch16_224",
    "backbone_options": {"depth": 4, "embed_dim": 32, "num_heads": 2},
    "decoder_channels": 8, "head_channels": 8, "bins": {"count": 16, "max_m": 24.0, "spacing": "linear"},
}  # fmt: skip


@pytest.fixture(scope="module")
def tile_sets(tmp_path_factory) -> Path:
    """With voids of many sizes: the two halves of a batch hardly ever have as many valid pixels."""
    return make_tile_sets(tmp_path_factory.mktemp("tiles"), voids=0.4)


def environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}


def start(*words: str | Path, processes: int = 1) -> subprocess.Popen:
    command = [sys.executable, "-m"]
    if processes > 1:
        command += ["torch.distributed.run", "--standalone", "--nproc-per-node", str(processes), "-m"]
    return subprocess.Popen(
        [*command, DRIVER, *map(str, words)], cwd=ROOT, env=environment(), text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True,
    )  # fmt: skip


def run(*words: str | Path, processes: int = 1) -> tuple[int, str]:
    """Exit status and output."""
    process = start(*words, processes=processes)
    output, _ = process.communicate(timeout=600)
    return process.returncode, output


def alone(path: Path, monkeypatch) -> Path:
    """Train in this process; the run folder."""
    monkeypatch.setattr(training, "finish", lambda *_, out, **__: out)
    training.train(path, out=path.parent / "model")
    return path.parent / "runs" / "model"


def far(one: Path, other: Path) -> tuple[float, float]:
    """Largest relative difference of the loss curves, and largest difference of weights and averages."""
    a, b = curve(one), curve(other)
    w, v = weights(one), weights(other)
    assert w.keys() == v.keys()
    names = [name for name in w if not name.startswith("optimiser.")]
    return float(np.max(np.abs(a / b - 1))), max(float((w[n] - v[n]).abs().max()) for n in names)


@pytest.mark.slow
def test_two_processes_are_one_with_the_same_batch(tile_sets, tmp_path, monkeypatch):
    changes = {"model__network__backbone_options": PVT, "optim__devices": "auto", "optim__steps": 8}
    one = alone(recipe(tile_sets, tmp_path / "one", **changes), monkeypatch)
    two = recipe(tile_sets, tmp_path / "two", **changes)
    status, output = run(two, tmp_path / "two" / "model", processes=2)
    assert status == 0, output
    loss, weight = far(one, tmp_path / "two" / "runs" / "model")
    assert loss < LOSS_TOLERANCE
    assert weight < WEIGHT_TOLERANCE
    # The negative control: each process divides by its own count of valid pixels.
    status, output = run(two, tmp_path / "own" / "model", "--own-sums", processes=2)
    assert status == 0, output
    loss, weight = far(one, tmp_path / "own" / "runs" / "model")
    assert loss > 100 * LOSS_TOLERANCE
    assert weight > WEIGHT_TOLERANCE


@pytest.mark.slow
def test_parted_weights_are_whole_ones_and_any_number_of_processes_goes_on(tile_sets, tmp_path, monkeypatch):
    changes = {
        "model__network": VIT,
        "tuning": {"backbone": "lora", "lora_rank": 2, "checkpointing": True, "layer_decay": 0.8},
        "optim__devices": "auto",
        "optim__accumulate": 1,
    }
    one = alone(recipe(tile_sets, tmp_path / "one", **changes), monkeypatch)
    two = recipe(tile_sets, tmp_path / "two", **changes, optim__strategy="fsdp")
    out = tmp_path / "two" / "model"
    # A signal to one process stops both, in the same step.
    status, output = run(two, out, "--accident", "SIGTERM", "--batch", "1", "--rank", "1", processes=2)
    assert status != 0
    assert "training stopped at step 2 of 6" in output
    assert "SIGTERM" in output
    assert "Traceback (most recent call last)" not in output.split("torch.distributed.elastic")[0]
    status, output = run(two, out, "--resume-if-any", processes=2)
    assert status == 0, output
    assert "from step 2 to 6" in output
    there = tmp_path / "two" / "runs" / "model"
    w, v = weights(one), weights(there)
    assert w.keys() == v.keys()
    assert all("_orig_mod" not in name for name in w)
    difference = max(float((w[n] - v[n]).abs().max()) for n in w if not n.startswith("optimiser."))
    loss = np.max(np.abs(curve(there, first=2) / curve(one)[2:] - 1))
    assert loss < LOSS_TOLERANCE
    assert difference < WEIGHT_TOLERANCE
    # One process goes on from a checkpoint of two.
    checkpoints(there)[0].unlink()
    last = checkpoints(there)[0]
    assert last.name == "step-0000003.ckpt"
    monkeypatch.setattr(training, "finish", lambda *_, out, **__: out)
    again = recipe(tile_sets, tmp_path / "two", **changes)
    training.train(again, out=out, resume=there)
    assert max(float((w[n] - v[n]).abs().max()) for n in w if not n.startswith("optimiser.")) < WEIGHT_TOLERANCE
    assert np.max(np.abs(curve(there, first=3) / curve(one)[3:] - 1)) < LOSS_TOLERANCE


@pytest.mark.slow
def test_a_run_killed_at_any_moment_ends_with_the_same_bits(tile_sets, tmp_path, monkeypatch):
    changes = {"optim__steps": 8, "optim__checkpoint_every": 2}
    whole = alone(recipe(tile_sets, tmp_path / "whole", **changes), monkeypatch)
    path = recipe(tile_sets, tmp_path / "killed", **changes)
    out, there = tmp_path / "killed" / "model", tmp_path / "killed" / "runs" / "model"
    # Whenever it happens to have written its first checkpoint: nobody knows what it was doing then.
    process = start(path, out)
    deadline = time.monotonic() + 300
    while not checkpoints(there):
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    # In the middle of a step: the second of its two batches.
    first = int(checkpoints(there)[0].stem.removeprefix("step-"))
    status, output = run(path, out, "--resume-if-any", "--accident", "SIGKILL", "--batch", "3")
    assert status == -signal.SIGKILL, output
    # And half a checkpoint, as after a kill of the machine.
    newest = checkpoints(there)[0]
    damaged = newest.with_name(f"step-{first + 2:07d}.ckpt")
    damaged.write_bytes(newest.read_bytes()[:-1000])
    partial = newest.with_name(".step-0000099.ckpt.partial")
    partial.write_bytes(b"half")
    status, output = run(path, out, "--resume-if-any")
    assert status == 0, output
    assert f"{damaged} is damaged" in output
    assert f"from step {first} to 8" in output
    assert not partial.exists()
    assert same(weights(there), weights(whole))
    assert torch.equal(torch.tensor(curve(there, first)), torch.tensor(curve(whole)[first:]))


@pytest.mark.slow
def test_a_number_that_is_none_stops_all_processes_and_spares_the_checkpoint(tile_sets, tmp_path):
    path = recipe(tile_sets, tmp_path, optim__devices="auto", optim__accumulate=1, optim__checkpoint_every=2)
    status, output = run(path, tmp_path / "model", "--accident", "nan", "--batch", "3", "--rank", "1", processes=2)
    assert status != 0
    lines = [line for line in output.splitlines() if "line: step 4 has a loss or a gradient that is no number" in line]
    assert len(lines) == 2, output
    assert "step-0000002.ckpt, is kept" in lines[0]
    kept = weights(tmp_path / "runs" / "model")
    assert all(value.isfinite().all() for value in kept.values())

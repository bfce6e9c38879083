"""One step of a recipe on this machine: time, memory, model FLOP utilisation; and windows per second when mapping.

    python tests/bench/bench_train_step.py models/recipes/vit-l-dinov3.toml --batch 16

prints a table for `notebooks/LOG.md` in a few minutes, on a GPU in bfloat16 with and without torch.compile. Weights are
random and images noise: neither changes what a step takes. Loading of data is not in it (`bench_loader.py`).
"""

from __future__ import annotations

import argparse
import gc
import platform
import re
import resource
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from canopy.errors import CanopyError
from canopy.model.distribution import Bins
from canopy.model.network import HeightNetwork, NetworkConfig
from canopy.model.package import Contract, HeightModel, Training, normalise
from canopy.model.recipe import TrainingRecipe, read_recipe
from canopy.model.train import HeightLearner, MovingAverage
from canopy.model.tuning import adapt

PEAKS_TFLOPS = {
    r"NVIDIA B200.*": 2250.0,
    r"NVIDIA H200": 989.0,
    r"NVIDIA H100 80GB HBM3": 989.0,
    r"NVIDIA H100 PCIe": 756.0,
    r"NVIDIA A100.*": 312.0,
    r"NVIDIA A10": 125.0,
    r"NVIDIA L40S": 362.0,
    r"NVIDIA L4": 121.0,
    r"NVIDIA GeForce RTX 4090": 165.0,
    r"NVIDIA GeForce RTX 3090": 71.0,
}
"""Dense bfloat16 with float32 sums, 1e12 operations per second, from the makers' data sheets, by torch's name of a card."""

WINDOW_PX = 448
AUTOCAST = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """What one optimiser step costs."""

    compiled: bool
    batch: int
    crop_px: int
    first_s: float
    """The first step, with what is compiled and chosen in it."""
    fastest_s: float
    median_s: float
    peak_bytes: int
    flop: int
    """Multiplications and additions that forward and backward need, without recomputing for checkpoints."""


def card(device: torch.device) -> str:
    """The device by its maker's name."""
    return (
        torch.cuda.get_device_name(device)
        if device.type == "cuda"
        else f"CPU ({platform.processor() or platform.machine()})"
    )


def peak_flop_per_s(name: str) -> float | None:
    """Of a card of that name; None: not in the table."""
    return next((peak * 1e12 for pattern, peak in PEAKS_TFLOPS.items() if re.fullmatch(pattern, name)), None)


def contract_of(recipe: TrainingRecipe) -> Contract:
    model = recipe.model
    return Contract(
        name=model.name, version=model.version, description="random weights", licence=model.licence,
        network=model.architecture(), bands=model.bands, gsd_range_m=model.gsd_range_m, dtype="uint8",
        value_range=model.value_range, mean=model.mean, std=model.std, window_px=model.window_px,
        stride_px=model.stride_px, training=Training(sites=(), tile_sets={}, recipe_sha256="", footprints_deg=()),
    )  # fmt: skip


def network_of(recipe: TrainingRecipe, *, checkpointing: bool) -> HeightNetwork:
    """The recipe's network with random weights, frozen and adapted as the recipe says."""
    network = HeightNetwork(recipe.model.architecture())
    tuning = recipe.tuning.model_copy(update={"checkpointing": checkpointing})
    adapt(network, tuning, torch.Generator().manual_seed(0))
    return network


def training_flop(recipe: TrainingRecipe, batch: int, side_px: int) -> int:
    """Operations of forward and backward, counted on tensors without data."""
    network = network_of(recipe, checkpointing=False).train().to("meta")
    image = torch.empty(batch, len(recipe.model.bands), side_px, side_px, device="meta")
    with FlopCounterMode(display=False) as counter:
        network(image).sum().backward()
    return counter.get_total_flops()


def forward_flop(network: HeightNetwork, batch: int, side_px: int) -> int:
    """Operations of one forward pass."""
    image = torch.empty(batch, network.config.in_channels, side_px, side_px, device="meta")
    empty = HeightNetwork(network.config).eval().to("meta")
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        empty(image)
    return counter.get_total_flops()


def timed(call: Callable[[], Any], device: torch.device, turns: int) -> tuple[float, float, float]:
    """(first, fastest, median) seconds of a call, to its end on the device; the second is not counted."""
    taken = []
    for _ in range(turns + 2):
        start = time.perf_counter()
        call()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        taken.append(time.perf_counter() - start)
    rest = sorted(taken[2:])
    return taken[0], rest[0], rest[len(rest) // 2]


@contextmanager
def peak_memory(device: torch.device) -> Iterator[Callable[[], int]]:
    """Greatest memory held by tensors on a GPU in the block; on a CPU by the whole process since it began, in bytes."""
    if device.type == "cuda":
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
        yield lambda: torch.cuda.max_memory_allocated(device)
    else:
        unit = 1 if platform.system() == "Darwin" else 1024
        yield lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def training_step(
    recipe: TrainingRecipe, device: torch.device, *, batch: int, crop_px: int, compiled: bool, turns: int
) -> Step:
    """Forward, loss, backward, clipping, AdamW and moving average, as `canopy train` does them, on one device."""
    network = network_of(recipe, checkpointing=recipe.tuning.checkpointing).train().to(device)
    learner = HeightLearner(network, recipe, contract_of(recipe), []).to(device)
    optimiser = learner.configure_optimizers()["optimizer"]
    average = MovingAverage(network, recipe.optim.ema_decay) if recipe.optim.ema_decay else None
    if compiled:
        network.compile(dynamic=False)
    draw = torch.Generator().manual_seed(0)
    shape = (batch, len(recipe.model.bands), crop_px, crop_px)
    image = torch.randint(0, 256, shape, dtype=torch.uint8, generator=draw).to(device)
    valid = torch.ones(batch, crop_px, crop_px, dtype=torch.bool, device=device)
    height_m = (20 * torch.rand(batch, crop_px, crop_px, generator=draw)).to(device)
    low = AUTOCAST.get(recipe.optim.precision)

    def step() -> None:
        x = normalise(image, valid, learner.contract)
        with torch.autocast(device.type, low, enabled=low is not None):
            logits = network(x)
        loss, _ = learner.loss(logits.float(), height_m, valid)
        loss.backward()
        torch.nn.utils.clip_grad_norm_([p for p in network.parameters() if p.grad is not None], recipe.optim.clip_norm)
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)
        if average is not None:
            average.update()

    with peak_memory(device) as peak:
        first_s, fastest_s, median_s = timed(step, device, turns)
        return Step(
            compiled=compiled, batch=batch, crop_px=crop_px, first_s=first_s, fastest_s=fastest_s, median_s=median_s,
            peak_bytes=peak(), flop=training_flop(recipe, batch, crop_px),
        )  # fmt: skip


def report_step(step: Step, recipe: TrainingRecipe, device: torch.device) -> str:
    """One row of the table."""
    peak = peak_flop_per_s(card(device)) if recipe.optim.precision == "bf16-mixed" else None
    rate = step.flop / step.median_s
    used = f"{rate / peak:.1%}" if peak else "not known"
    return (
        f"| {recipe.model.architecture().backbone} {recipe.optim.precision}{' compiled' * step.compiled} | "
        f"{step.batch} x {step.crop_px} px | {1e3 * step.median_s:.0f} ({1e3 * step.fastest_s:.0f}) | {step.first_s:.1f} | "
        f"{step.batch / step.median_s:.2f} | {step.peak_bytes / 2**30:.2f} | {step.flop / 1e9:.2f} | {rate / 1e12:.4g} | "
        f"{used} |"
    )


def report_prediction(
    recipe: TrainingRecipe, device: torch.device, *, precision: str, compiled: bool, batch: int, side_px: int, turns: int
) -> str:
    """One row: windows per second of `HeightModel.predict`, image to heights and spread."""
    dtype = getattr(torch, precision)
    network = HeightNetwork(recipe.model.architecture()).eval().to(device, dtype)
    flop = forward_flop(network, batch, side_px)
    if compiled:
        network.compile(dynamic=False)
    model = HeightModel(contract=contract_of(recipe), network=network, device=device, precision=precision)  # type: ignore[arg-type]
    image = torch.randint(0, 256, (batch, len(recipe.model.bands), side_px, side_px), dtype=torch.uint8)

    def one() -> torch.Tensor:
        return model.predict(image).spread_m.cpu()

    with peak_memory(device) as peak:
        first_s, fastest_s, median_s = timed(one, device, turns)
        held = peak()
    return (
        f"| {network.config.backbone} {precision}{' compiled' * compiled} | {batch} x {side_px} px | "
        f"{1e3 * median_s:.0f} ({1e3 * fastest_s:.0f}) | {first_s:.1f} | {batch / median_s:.2f} | {held / 2**30:.2f} | "
        f"{flop / 1e9:.2f} | {flop / median_s / 1e12:.4g} | |"
    )


HEAD = (
    "| | batch | ms a pass, median (fastest) | first, s | images/s | peak GiB | GFLOP a pass | TFLOP/s | of the peak |\n"
    "|---|---|---|---|---|---|---|---|---|"
)


def in_memory(call: Callable[[int], str], batch: int) -> str:
    """The row for the largest of `batch`, half of it, ... that the device holds."""
    while True:
        try:
            return call(batch)
        except (torch.OutOfMemoryError, CanopyError) as error:
            if batch == 1 or not (isinstance(error, torch.OutOfMemoryError) or "memory" in str(error)):
                raise
        print(f"{batch} images do not fit; trying {batch // 2}", flush=True)  # noqa: T201
        batch //= 2
        gc.collect()


def main(
    recipe: TrainingRecipe, device: torch.device, *, batch: int, crop_px: int, window_px: int, turns: int, compiled: bool
) -> None:
    """Print the tables."""
    name = card(device)
    print(  # noqa: T201
        f"{name}, torch {torch.__version__}, {torch.get_num_threads()} threads; peak of the card in bfloat16: "
        f"{f'{peak_flop_per_s(name) / 1e12:g} TFLOP/s' if peak_flop_per_s(name) else 'not known, so no utilisation'}\n\n"
        f"training step\n{HEAD}",
        flush=True,
    )
    for ahead in (False, True) if compiled else (False,):

        def row(count: int, ahead: bool = ahead) -> str:
            step = training_step(recipe, device, batch=count, crop_px=crop_px, compiled=ahead, turns=turns)
            return report_step(step, recipe, device)

        print(in_memory(row, batch), flush=True)  # noqa: T201
    print(f"\nprediction\n{HEAD}", flush=True)  # noqa: T201
    for precision in ("float32", "float16", "bfloat16") if device.type == "cuda" else ("float32",):
        for ahead in (False, True) if compiled else (False,):

            def pass_(count: int, precision: str = precision, ahead: bool = ahead) -> str:
                return report_prediction(
                    recipe, device, precision=precision, compiled=ahead, batch=count, side_px=window_px, turns=turns
                )

            print(in_memory(pass_, 8 if device.type == "cuda" else 1), flush=True)  # noqa: T201


TINY = {
    "seed": 0,
    "model": {
        "name": "tiny", "description": "", "licence": "Apache-2.0", "gsd_range_m": (0.4, 0.8), "mean": (100.0,) * 3,
        "std": (50.0,) * 3, "window_px": 64, "stride_px": 48,
        "network": NetworkConfig(
            backbone="vit_tiny_patch16_224",
            backbone_options={"depth": 4, "embed_dim": 64, "num_heads": 4},
            decoder_channels=32, head_channels=16, bins=Bins(count=32, max_m=64.0),
        ),
    },
    "data": {"set": [{"path": "."}]},
    "optim": {"steps": 10, "precision": "bf16-mixed"},
}  # fmt: skip


@pytest.mark.bench
def test_tables_of_a_tiny_network_on_a_cpu(capsys):
    recipe, cpu = TrainingRecipe.model_validate(TINY), torch.device("cpu")
    main(recipe, cpu, batch=2, crop_px=64, window_px=64, turns=3, compiled=False)
    told = capsys.readouterr().out
    print(told)  # noqa: T201
    assert "no utilisation" in told
    assert told.count("| vit_tiny_patch16_224") == 2


@pytest.mark.bench
def test_operations_are_those_of_the_layers():
    """A backward pass takes twice the forward's, but for the image, which needs no gradient; a batch of two twice one's."""
    recipe = TrainingRecipe.model_validate(TINY)
    forward = forward_flop(HeightNetwork(recipe.model.architecture()), 1, 64)
    whole, two = training_flop(recipe, 1, 64), training_flop(recipe, 2, 64)
    assert 2.8 * forward < whole < 3 * forward
    assert two == 2 * whole
    last_layer = 2 * 64 * 64 * 16 * 32  # pixels, channels in and out: the head's 1x1 convolution
    smaller = recipe.model.architecture().model_copy(update={"bins": Bins(count=16, max_m=64.0)})
    assert forward - forward_flop(HeightNetwork(smaller), 1, 64) == last_layer // 2
    frozen = recipe.model_copy(update={"tuning": recipe.tuning.model_copy(update={"backbone": "frozen"})})
    assert forward < training_flop(frozen, 1, 64) < 0.97 * whole  # most of the tiny network is decoder


@pytest.mark.parametrize(
    ("name", "peak"), [("NVIDIA H200", 989e12), ("NVIDIA A100-SXM4-80GB", 312e12), ("NVIDIA H200 NVL", None), ("CPU", None)]
)
@pytest.mark.bench
def test_only_cards_that_were_looked_up_have_a_peak(name, peak):
    assert peak_flop_per_s(name) == peak


if __name__ == "__main__":
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("recipe", type=Path, help="training recipe; its tile sets need not be there")
    arguments.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    arguments.add_argument("--batch", type=int, default=16, help="crops of one device in a step")
    arguments.add_argument("--crop", type=int, help="side of a crop in pixels; default that of the recipe's first set")
    arguments.add_argument("--window", type=int, default=WINDOW_PX, help="side of a window when mapping, in pixels")
    arguments.add_argument("--turns", type=int, default=20)
    arguments.add_argument("--no-compile", action="store_true")
    given = arguments.parse_args()
    read = read_recipe(given.recipe)
    main(
        read, torch.device(given.device), batch=given.batch, crop_px=given.crop or read.data.set[0].crop_px,
        window_px=given.window, turns=given.turns, compiled=not given.no_compile,
    )  # fmt: skip

"""Whether a model folder is whole, unaltered, and computes on this machine what it computed where it was made."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from canopy.model.package import FIXTURE, FIXTURE_TOLERANCE_M, fixture_deviation_m, load_model


@dataclass(frozen=True, slots=True, kw_only=True)
class Verification:
    """What was found; a folder that fails a check never gets this far."""

    folder: Path
    name: str
    version: str
    device: str
    weights_sha256: str
    tensors: int
    parameters: int
    deviation_m: dict[str, float]
    """Largest difference of mean and spread from the recorded ones, over the pixels of the fixture."""
    tolerance_m: float
    abstained_px: int
    """Pixels of the fixture for which the network preferred no bin."""

    def as_json(self) -> dict[str, Any]:
        """All of it."""
        return {**asdict(self), "folder": str(self.folder)}

    def as_text(self) -> list[str]:
        """The same in lines."""
        off = ", ".join(f"{name.removesuffix('_m')} {value:.2g} m" for name, value in self.deviation_m.items())
        return [
            f"{self.name} {self.version}: whole, unaltered and finite",
            f"weights: SHA-256 {self.weights_sha256}, {self.tensors} tensors, {self.parameters:,} parameters",
            f"fixture on {self.device}: largest deviation {off} (limit {self.tolerance_m:g} m)",
        ]


def verify_model(folder: Path, *, device: torch.device | str = "cpu") -> Verification:
    """Load a model with all its checks (contract, hash, tensors, finite weights, fixture) and measure the fixture once more.

    Raises:
        ContractError: A check failed; one line with the file and the remedy.
    """
    model = load_model(folder, device)
    deviation_m, heights = fixture_deviation_m(folder / FIXTURE, model)
    return Verification(
        folder=folder,
        name=model.contract.name,
        version=model.contract.version,
        device=str(model.device),
        weights_sha256=model.contract.weights_sha256,
        tensors=len(model.network.state_dict()),
        parameters=sum(parameter.numel() for parameter in model.network.parameters()),
        deviation_m=deviation_m,
        tolerance_m=FIXTURE_TOLERANCE_M,
        abstained_px=int(heights.abstain.sum()),
    )

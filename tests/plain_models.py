"""Models that compute next to nothing: a function of the image as a network, for tests of what happens around a model."""

import threading
import time
from types import SimpleNamespace

import torch
from torch import nn

from canopy.model.distribution import Bins
from canopy.model.network import NetworkConfig
from canopy.model.package import Contract, HeightModel, Training

BINS = Bins(count=2, min_m=1.0, max_m=41.0, spacing="linear")


def plain_contract(window_px=64, stride_px=48, **changes):
    """A contract for images of one band, 0 to 1."""
    given = {
        "name": "plain", "version": "0", "description": "computes next to nothing", "licence": "Apache-2.0",
        "network": NetworkConfig(backbone="vit_tiny_patch16_224", in_channels=1, bins=BINS),
        "bands": ("grey",), "gsd_range_m": (0.25, 2.0), "dtype": "float32", "value_range": (0.0, 1.0),
        "mean": (0.0,), "std": (1.0,), "window_px": window_px, "stride_px": stride_px,
        "training": Training(sites=("nowhere",), tile_sets={}, recipe_sha256="0" * 64, footprints_deg=()),
        "weights_sha256": "0" * 64,
    }  # fmt: skip
    return Contract(**given | changes)


class Plain(nn.Module):
    """Logits of two bins whose mean is what a function of the normalised image (batch, band, row, col) says, in metres.

    Args:
        heights: The function; NaN is where the model abstains.
        most: More windows at once than this are too many for the device.
        most_side_by_side: So are more threads in here than this.
        wait_s: Seconds that a batch takes, or a function of the batch that says so.
    """

    def __init__(self, heights, *, most=1 << 30, most_side_by_side=1 << 30, wait_s=0.0):
        super().__init__()
        self.config = SimpleNamespace(bins=BINS, normalisation="softmax")
        self.heights, self.most, self.most_side_by_side, self.wait_s = heights, most, most_side_by_side, wait_s
        self.batches, self.inside, self.lock = [], 0, threading.Lock()

    def forward(self, x_bchw):
        with self.lock:
            self.inside += 1
            inside = self.inside
        try:
            time.sleep(self.wait_s(x_bchw) if callable(self.wait_s) else self.wait_s)
            if len(x_bchw) > self.most or inside > self.most_side_by_side:
                raise torch.OutOfMemoryError("not a byte left")
            with self.lock:
                self.batches.append(len(x_bchw))
            share = (self.heights(x_bchw) - BINS.min_m) / (BINS.max_m - BINS.min_m)
            return torch.stack([torch.zeros_like(share), torch.logit(share)], dim=1)
        finally:
            with self.lock:
                self.inside -= 1


def pointwise(x_bchw):
    """A height of each pixel from its own value."""
    return 15.0 + 20.0 * x_bchw[:, 0]


def plain_model(heights=pointwise, *, contract=None, **options):
    """A `HeightModel` around `Plain`, on the CPU."""
    contract = contract or plain_contract()
    return HeightModel(contract=contract, network=Plain(heights, **options).eval(), device=torch.device("cpu"))

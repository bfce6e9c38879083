"""What a training run starts from, which parameters learn, and how fast.

`start_from` and `pretrained` fill a network with the weights of another one or with a backbone's published weights, band
by band; `adapt` decides what learns; `parameter_groups` gives the optimiser its groups; `merge` makes a plain network
again. In a run they come in this order, `adapt` before the moving average, DDP, FSDP or compile see the network.

What a block of a backbone is comes from timm: the layers of `group_matcher`, 0 for the stem (patch embedding, tokens and
positions), then 1 to n. In a plain ViT these are its blocks, in Swin and ConvNeXt the blocks of all stages, in PVT the stages.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Self

import torch
from pydantic import BaseModel, ConfigDict, Field, PositiveFloat, PositiveInt, model_validator
from timm.models._manipulate import group_with_matcher
from torch import Tensor, nn
from torch.nn.utils import parametrize

from canopy.errors import ContractError, RecipeError
from canopy.grid import TOTAL_STRIDE_PX
from canopy.model.network import HeightNetwork, NetworkConfig

RGB = ("red", "green", "blue")
"""Bands of the images that timm's published weights were trained on."""


class Tuning(BaseModel):
    """The recipe's [tuning] table: what of the backbone learns. Reassembly, decoder and head always do, at the full rate."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    backbone: Literal["full", "frozen", "last", "lora"] = "full"
    """All of it learns, or nothing, or its last blocks, or a low-rank addition to its linear layers (Hu et al. 2021)."""
    last_blocks: PositiveInt = 4
    """"last": so many blocks, and the norms after them, learn."""
    patch_embedding: bool = False
    """The first layer learns too, whatever `backbone` says: needed for bands that `start_from` did not know.

    Its gradient has to pass through all blocks, so a frozen backbone then needs the memory of one that learns.
    """
    backbone_lr_factor: PositiveFloat = 1.0
    """The backbone's learning rate over that of the rest."""
    layer_decay: float = Field(default=1.0, gt=0, le=1)
    """Block k of n learns at layer_decay^(n - k) times the backbone's rate, the stem (k = 0) slowest."""
    lora_rank: PositiveInt = 8
    lora_alpha: PositiveFloat = 16.0
    """The addition is lora_alpha / lora_rank times B A."""
    lora_layers: tuple[str, ...] | None = None
    """Names of linear layers or 1x1 convolutions in the blocks, for example qkv or attn.proj; None: all of them."""
    checkpointing: bool = False
    """Keep only the input of each block and compute it again in the backward pass: less memory, a third more time."""

    @model_validator(mode="after")
    def _has_effect(self) -> Self:
        if (
            learning := "frozen" if self.backbone == "frozen" and not self.patch_embedding else ""
        ) or self.backbone == "full":
            pass
        return self


@dataclass(frozen=True, slots=True, kw_only=True)
class Start:
    """What `start_from` could not take over."""

    new_bands: tuple[str, ...]
    """Bands that the start did not know; their weights in the first layer are 0."""
    dropped_bands: tuple[str, ...]
    """Bands of the start that the network does not take."""
    head_restarted: bool
    """The last layer keeps its random start, because it stands for other bins."""


def start_from(
    network: HeightNetwork,
    state: Mapping[str, Tensor],
    *,
    config: NetworkConfig,
    bands: Sequence[str],
    start_bands: Sequence[str],
) -> Start:
    """Fills a network with the weights of a model, band by band.

    Args:
        network: filled in place; a plain network, before `adapt`.
        state: the model's state dict.
        config: the model's network.
        bands: names of the network's bands, in order.
        start_bands: names of the model's bands, in order.

    Raises:
        ContractError: the model's network differs in more than bands, bins and drop rates; or no band is common to both.
    """
    raise NotImplementedError


def pretrained(config: NetworkConfig, *, bands: Sequence[str]) -> HeightNetwork:
    """A network whose backbone has its published weights, by band name: red, green and blue are copied, others start at 0.

    Raises:
        RecipeError: none of the bands is red, green or blue, or the weights cannot be fetched.
    """
    raise NotImplementedError


def adapt(network: HeightNetwork, tuning: Tuning, generator: torch.Generator, *, new_bands: Sequence[str] = ()) -> None:
    """Freezes what does not learn, adds LoRA, and switches gradient checkpointing; in place, outputs unchanged.

    Call it before the moving average, DDP, FSDP or compile see the network, and before a checkpoint is loaded.

    Args:
        network: a plain network.
        tuning: what learns.
        generator: draws the start of LoRA's A.
        new_bands: `Start.new_bands`.

    Raises:
        RecipeError: more last blocks than there are; LoRA layers that the backbone does not have; a rank too large; new
            bands that could never be learned; a backbone without layers or checkpointing.
    """
    raise NotImplementedError


def keep_frozen(network: HeightNetwork) -> None:
    """Puts what does not learn into eval mode: dropout, drop path and batch statistics. Call it after every `train()`."""
    raise NotImplementedError


def parameter_groups(network: HeightNetwork, tuning: Tuning, *, lr: float, weight_decay: float) -> list[dict[str, Any]]:
    """Groups for AdamW: the backbone's from the first layer to the last, then the rest; `name` says which.

    Biases, norms and whatever else is one-dimensional, positions and tokens are not decayed.
    """
    raise NotImplementedError


def merge(network: HeightNetwork) -> None:
    """Folds LoRA into the weights; the keys of the state dict are those of a plain network again. Outputs unchanged."""
    raise NotImplementedError


def summary(network: HeightNetwork) -> str:
    """How many parameters learn, for the log."""
    raise NotImplementedError

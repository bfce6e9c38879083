"""What a training run starts from, which parameters learn, and how fast.

`start_from` and `pretrained` fill a network with the weights of a model or with the published ones of its backbone, band by
band; `adapt` decides what learns; `parameter_groups` gives the optimiser its groups; `merge` makes a plain network again.
A run calls them in this order, and `adapt` before the moving average, DDP, FSDP or compile see the network.

What a block of a backbone is comes from timm's `group_matcher`: layer 0 is the stem (patch embedding, tokens, positions),
layers 1 to n are the blocks. In a plain ViT these are its blocks, in Swin and ConvNeXt those of all stages, in PVT stages.
"""

from __future__ import annotations

import contextlib
import math
import weakref
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Self

import torch
from pydantic import BaseModel, ConfigDict, Field, PositiveFloat, PositiveInt, model_validator
from timm.models._manipulate import group_with_matcher
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils import parametrize

from canopy.errors import ContractError, RecipeError
from canopy.grid import TOTAL_STRIDE_PX
from canopy.model.network import HeightNetwork, NetworkConfig

RGB = ("red", "green", "blue")
"""Bands of the images that the published weights of backbones were trained on."""

LAST_LAYER = ("head.conv3.weight", "head.conv3.bias")
"""The layer whose channels stand for the bins."""


class Tuning(BaseModel):
    """The recipe's [tuning] table: what of the backbone learns. Reassembly, decoder and head always do, at the full rate."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    backbone: Literal["full", "frozen", "last", "lora"] = "full"
    """All of it learns, nothing, its last blocks, or a low-rank addition to its linear layers (Hu et al. 2021)."""
    last_blocks: PositiveInt = 4
    """"last": so many blocks, and the norms after them, learn."""
    patch_embedding: bool = False
    """The first layer learns too, whatever `backbone` says: needed where bands are new to the weights.

    Its gradient passes through every block, so the memory is that of a backbone that learns.
    """
    backbone_lr_factor: PositiveFloat = 1.0
    """The backbone's learning rate over that of the rest."""
    layer_decay: float = Field(default=1.0, gt=0, le=1)
    """Block k of n learns at layer_decay^(n - k) times the backbone's rate; the stem is k = 0."""
    lora_rank: PositiveInt = 8
    lora_alpha: PositiveFloat = 16.0
    """lora_alpha / lora_rank times B A is added to a weight."""
    lora_layers: tuple[str, ...] | None = None
    """Names of linear layers or 1x1 convolutions in the blocks, such as "qkv" or "attn.proj"; None: all of them."""
    frozen_batch_norm: bool = False
    """Batch norms normalise by the statistics that the start's weights bring, and keep them; scales and offsets learn as the
    rest does. For sets that differ: a batch is of one set, so its own statistics are not those that the model maps with."""
    checkpointing: bool = False
    """Keep each block's input only and compute the block again in the backward pass: less memory, more time."""

    @model_validator(mode="after")
    def _takes_effect(self) -> Self:
        unused: dict[str, str] = {}
        if self.backbone != "last":
            unused |= {"last_blocks": 'backbone = "last"'}
        if self.backbone != "lora":
            unused |= dict.fromkeys(("lora_rank", "lora_alpha", "lora_layers"), 'backbone = "lora"')
        if self.backbone == "frozen" and not self.patch_embedding:
            unused |= dict.fromkeys(("backbone_lr_factor", "layer_decay", "checkpointing"), "a backbone that learns")
        for name, purpose in unused.items():
            if getattr(self, name) != type(self).model_fields[name].default:
                raise ValueError(f"{name} is for {purpose}, and backbone is {self.backbone!r}; remove it")
        if self.lora_layers == ():
            raise ValueError("lora_layers names no layer; remove it for all linear layers")
        return self


# --- where a run starts --------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Start:
    """What could not be taken over from the weights a run starts from; `adapt` and the log want to know."""

    new_bands: tuple[str, ...] = ()
    """Bands that the weights did not know; they start at 0 in the first layer, which changes no output."""
    dropped_bands: tuple[str, ...] = ()
    """Bands that the weights knew and the network does not take."""
    last_layer_restarted: bool = False
    """The last layer keeps its random start, because its channels stand for other bins."""

    def notes(self) -> Iterator[str]:
        """A sentence for each, for the log."""
        if self.new_bands:
            yield f"new to the weights, so without effect before the first step: {', '.join(self.new_bands)}"
        if self.dropped_bands:
            yield f"known to the weights but not among the bands: {', '.join(self.dropped_bands)}"
        if self.last_layer_restarted:
            yield "the weights were made for other bins or another normalisation: the last layer starts at random"


def start_from(
    network: HeightNetwork,
    state: Mapping[str, Tensor],
    *,
    config: NetworkConfig,
    bands: Sequence[str],
    start_bands: Sequence[str],
) -> Start:
    """Fills a network with the weights of a model, its first layer band by band.

    Why 0 for new bands and not the mean of the others: the network starts as exactly the one it was, and the new band's
    weights get a gradient from the first step on, because the image they multiply is not 0.

    Args:
        network: filled in place; plain, that is before `adapt`.
        state: the model's state dict.
        config: the model's network.
        bands: names of the network's bands in order.
        start_bands: names of the model's bands in order.

    Raises:
        ContractError: the networks differ in more than bands, bins, normalisation and drop rates; they have no band in
            common; or the state dict is not that of its config.
        RecipeError: the number of names is not that of the bands, or the first layer is none that takes bands.
    """
    for names, wanted in ((bands, network.config), (start_bands, config)):
        if len(set(names)) != wanted.in_channels:
            raise RecipeError(
                f"bands {', '.join(names)} are not {wanted.in_channels} different ones; "
                f"name as many as in_channels of the network says"
            )
    _check_same_but_for_bands_and_bins(network, config)
    own = network.state_dict()
    filled = dict(state)
    if tuple(bands) != tuple(start_bands):
        for name in _first_layers(network):
            if name in state:
                filled[name] = _by_band(state[name], bands, start_bands)
    restarted = (config.bins, config.normalisation) != (network.config.bins, network.config.normalisation)
    if restarted:
        filled |= {name: own[name] for name in LAST_LAYER}
    _check_tensors(filled, own)
    network.load_state_dict(filled)
    return Start(
        new_bands=tuple(band for band in bands if band not in start_bands),
        dropped_bands=tuple(band for band in start_bands if band not in bands),
        last_layer_restarted=restarted,
    )


def pretrained(config: NetworkConfig, *, bands: Sequence[str]) -> tuple[HeightNetwork, Start]:
    """A network whose backbone has its published weights, by band name; the rest is drawn from torch's generator.

    Why not timm's own way with other than three bands: it repeats the weights of red, green and blue in this order and
    scales them by 3 / bands, so that a first band nir would get red's weights and no band its own.

    Raises:
        ContractError: none of the bands is red, green or blue.
        RecipeError: the weights cannot be fetched, or were not trained on red, green and blue.
    """
    if tuple(bands) == RGB:
        return HeightNetwork(config, pretrained=True), Start()
    network = HeightNetwork(config)
    rgb_config = config.model_copy(update={"in_channels": len(RGB)})
    source = HeightNetwork(rgb_config, pretrained=True)
    published = source.backbone.body.pretrained_cfg["input_size"][0]
    if published != len(RGB):
        raise RecipeError(
            f"published weights of {config.backbone!r} are for {published} bands, not for {', '.join(RGB)}; "
            f"choose another backbone or set pretrained = false"
        )
    backbone = {name: value for name, value in source.state_dict().items() if name.startswith("backbone.")}
    state = network.state_dict() | backbone
    return network, start_from(network, state, config=rgb_config, bands=bands, start_bands=RGB)


def _check_same_but_for_bands_and_bins(network: HeightNetwork, config: NetworkConfig) -> None:
    def describe(config: NetworkConfig) -> dict[str, Any]:
        fields = config.model_dump(exclude={"in_channels", "bins", "normalisation", "backbone_options"})
        options = {f"backbone_options.{key}": value for key, value in config.backbone_options.items() if "drop" not in key}
        return fields | options | {"reassemble_channels": config.channels()}

    mine, theirs = describe(network.config), describe(config)
    if theirs["taps"] is not None and network.config.taps is None:
        mine["taps"] = tuple(network.backbone.taps)
    for name in sorted(mine.keys() | theirs.keys()):
        if mine.get(name) != theirs.get(name):
            raise ContractError(
                f"the network to start from has {name} = {theirs.get(name)}, the recipe's has {mine.get(name)}; copy its "
                f"[network] table (bands, bins, normalisation and drop rates may differ)"
            )


def _first_layers(network: HeightNetwork) -> list[str]:
    """Names of the weights that multiply the image; timm keeps them to adapt them to its own idea of other bands."""
    body, config = network.backbone.body, network.config
    listed = (getattr(body, "pretrained_cfg", None) or {}).get("first_conv") or ()
    names = [f"{module}.weight" for module in ([listed] if isinstance(listed, str) else listed)]
    parameters = dict(body.named_parameters())
    for name in names or ["(unknown)"]:
        if name not in parameters or parameters[name].ndim != 4 or parameters[name].shape[1] != config.in_channels:
            raise RecipeError(
                f"first layer {name} of backbone {config.backbone!r} has no axis of bands; start from a model with the same "
                f"bands, or choose another backbone"
            )
    return [f"backbone.body.{name}" for name in names]


def _by_band(weight_oikk: Tensor, bands: Sequence[str], start_bands: Sequence[str]) -> Tensor:
    """(out, start band, row, col) -> (out, band, row, col)."""
    if not set(bands) & set(start_bands):
        raise ContractError(
            f"bands {', '.join(bands)} have none in common with the {', '.join(start_bands)} of the weights to start from; "
            f"give bands the same names, or start from other weights"
        )
    out, _, rows, cols = weight_oikk.shape
    inflated_oikk = weight_oikk.new_zeros(out, len(bands), rows, cols)
    for place, band in enumerate(bands):
        if band in start_bands:
            inflated_oikk[:, place] = weight_oikk[:, list(start_bands).index(band)]
    return inflated_oikk


def _check_tensors(given: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> None:
    remedy = "they are not of the network they come with; load them with load_model, or merge LoRA first"
    for what, names in (("lack", wanted.keys() - given.keys()), ("have the unknown", given.keys() - wanted.keys())):
        if names:
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            raise ContractError(f"the weights to start from {what} tensor {min(names)}{more}: {remedy}")
    for name, tensor in given.items():
        if tensor.shape != wanted[name].shape:
            raise ContractError(
                f"tensor {name} of the weights to start from has shape {tuple(tensor.shape)}, not "
                f"{tuple(wanted[name].shape)}: {remedy}"
            )


# --- what learns ---------------------------------------------------------------------------------------------------------


class LowRank(nn.Module):
    """W -> W + alpha / rank B A, W frozen (Hu et al. 2021, "LoRA", arXiv 2106.09685, equation 3).

    A parametrisation of the weight and not a branch beside the layer, because some blocks read `layer.weight` without
    calling the layer (attention with separate biases, as in DINOv3), and because merging is then the same sum. The price:
    the sum is kept for the backward pass, so optimiser state and checkpoints shrink but activations do not.
    """

    def __init__(self, weight: Tensor, *, rank: int, alpha: float, generator: torch.Generator) -> None:
        super().__init__()
        out, into = weight.flatten(1).shape
        self.scale = alpha / rank
        a_ri = torch.empty(rank, into, device=generator.device)
        nn.init.kaiming_uniform_(a_ri, a=math.sqrt(5), generator=generator)  # as torch starts its linear layers
        self.a = nn.Parameter(a_ri.to(weight))
        self.b = nn.Parameter(weight.new_zeros(out, rank))

    def forward(self, weight: Tensor) -> Tensor:
        """Same shape in and out: (out, in) of a linear layer or (out, in, 1, 1) of a 1x1 convolution."""
        with torch.autocast(weight.device.type, enabled=False):  # so that merging changes nothing under bfloat16 either
            return weight + (self.scale * (self.b @ self.a)).reshape(weight.shape)


def adapt(network: HeightNetwork, tuning: Tuning, generator: torch.Generator, *, new_bands: Sequence[str] = ()) -> None:
    """Freezes what does not learn, adds LoRA and switches gradient checkpointing; in place, and no output changes.

    Call it before the moving average, DDP, FSDP or compile see the network, and before a checkpoint of an adapted network
    is loaded.

    Args:
        network: a plain network.
        tuning: what learns.
        generator: draws the start of LoRA's A.
        new_bands: `Start.new_bands`.

    Raises:
        RecipeError: more last blocks than there are; batch norms to freeze where there are none; LoRA layers that the blocks
            do not have; a rank that saves nothing; new bands that would never be learned; a backbone that knows no blocks,
            or no checkpointing.
    """
    assert not any(isinstance(module, LowRank) for module in network.modules()), "the network was adapted before"
    if new_bands and tuning.backbone != "full" and not tuning.patch_embedding:
        raise RecipeError(
            f"bands {', '.join(new_bands)} start at 0 and backbone = {tuning.backbone!r} would keep them there; "
            f"set patch_embedding = true in [tuning]"
        )
    body = network.backbone.body
    network.requires_grad_(True)
    if tuning.backbone != "full":
        body.requires_grad_(False)
    if tuning.backbone == "last":
        layers = _layers(network)
        depth = max(layers.values())
        if tuning.last_blocks > depth:
            raise RecipeError(
                f"last_blocks is {tuning.last_blocks}, but {network.config.backbone!r} has {depth} blocks here; "
                f"choose from 1 to {depth}"
            )
        for name, parameter in body.named_parameters():
            parameter.requires_grad_(layers[name] > depth - tuning.last_blocks)
    elif tuning.backbone == "lora":
        _add_low_rank(network, tuning, generator)
    if tuning.patch_embedding:
        for name in _first_layers(network):
            network.get_submodule(name.removesuffix(".weight")).requires_grad_(True)
    if tuning.frozen_batch_norm and not any(isinstance(module, _BatchNorm) for module in network.modules()):
        raise RecipeError(
            f"frozen_batch_norm is for networks with batch norms, and {network.config.backbone!r} has none here; remove it"
        )
    keep_frozen(network, tuning)
    if tuning.checkpointing:
        _switch_checkpointing_on(network)


def keep_frozen(network: HeightNetwork, tuning: Tuning) -> None:
    """Puts what does not learn into eval mode: dropout, drop path and batch statistics of frozen layers stand still.

    With `frozen_batch_norm`, the statistics of the others do too.

    `train()` undoes it, so whoever calls that calls this afterwards; a module that holds the network does both in its own
    `train`.
    """

    def visit(module: nn.Module) -> None:
        learns = [parameter.requires_grad for parameter in module.parameters()]
        if learns and not any(learns):
            module.eval()
            return
        for child in module.children():  # without parameters of its own, dropout has the mode of the layer it is in
            visit(child)

    visit(network.backbone)
    if tuning.frozen_batch_norm:
        for module in network.modules():
            if isinstance(module, _BatchNorm):
                module.eval()


def merge(network: HeightNetwork) -> None:
    """Makes an adapted network a plain one: LoRA folded into the weights, nothing frozen, no checkpointing.

    In place; the state dict has the keys it had before `adapt`, and no output changes.
    """
    for module in list(network.modules()):
        if isinstance(module, nn.Linear | nn.Conv2d) and _is_low_rank(module):
            weight = nn.Parameter(module.weight.detach())
            # Not torch's `remove_parametrizations`: it takes `weight` off the class that parametrising made, which deep
            # copies share, so that merging the moving average would break the network that trains on.
            del module.parametrizations
            module.__class__ = type(module).__mro__[1]
            module.weight = weight
    network.requires_grad_(True)
    if hasattr(network.backbone.body, "set_grad_checkpointing"):
        with contextlib.suppress(AssertionError):  # models that do not know checkpointing say so even when it goes off
            network.backbone.body.set_grad_checkpointing(False)


def summary(network: HeightNetwork) -> str:
    """How much learns, for the log."""
    sizes = [(parameter.numel(), parameter.requires_grad) for parameter in network.parameters()]
    learning, total = sum(size for size, learns in sizes if learns), sum(size for size, _ in sizes)
    return f"{learning:,} of {total:,} parameters learn ({learning / total:.1%})"


def _is_low_rank(module: nn.Module) -> bool:
    return parametrize.is_parametrized(module, "weight") and any(isinstance(part, LowRank) for part in module.modules())


def _layers(network: HeightNetwork) -> dict[str, int]:
    """Name of each of the backbone's parameters -> its layer, 0 (stem) to n.

    Parameters that timm's patterns leave out (learned rotary frequencies) act on all blocks and count as stem; timm would
    count them as a layer after the last, learning fastest.
    """
    body = network.backbone.body
    if not hasattr(body, "group_matcher"):
        raise RecipeError(
            f"backbone {network.config.backbone!r} does not say what its blocks are, so last_blocks, layer_decay and LoRA "
            f"cannot be used; set backbone to full or frozen without layer_decay, or choose for example pvt_v2_b0"
        )
    names = [name for name, _ in body.named_parameters()]
    no_layer = "?"
    layers = group_with_matcher(
        ((name, None) for name in [*names, no_layer]), body.group_matcher(coarse=False), reverse=True
    )
    return {name: 0 if layers[name] == layers[no_layer] else layers[name] for name in names}


def _add_low_rank(network: HeightNetwork, tuning: Tuning, generator: torch.Generator) -> None:
    body, layers = network.backbone.body, _layers(network)
    linear = {
        name: module
        for name, module in body.named_modules()
        if (
            isinstance(module, nn.Linear)
            or (isinstance(module, nn.Conv2d) and module.kernel_size == (1, 1) and module.groups == 1)
        )
        and layers[f"{name}.weight"] > 0
    }
    chosen = dict.fromkeys(linear) if tuning.lora_layers is None else {}
    for wanted in tuning.lora_layers or ():
        found = [name for name in linear if f".{name}".endswith(f".{wanted}")]
        if not found:
            names = sorted({name.rpartition(".")[2] for name in linear})
            raise RecipeError(
                f"lora_layers {wanted!r} is no linear layer in the blocks of {network.config.backbone!r}; "
                f"choose from {', '.join(names) or 'another backbone'}"
            )
        chosen |= dict.fromkeys(found)
    if not chosen:
        raise RecipeError(f"the blocks of {network.config.backbone!r} have no linear layer for LoRA; choose another tuning")
    for name in chosen:
        weight = linear[name].weight
        if tuning.lora_rank >= (least := min(weight.shape[:2])):
            raise RecipeError(
                f"lora_rank {tuning.lora_rank} saves nothing on {name} of {tuple(weight.shape[:2])}; "
                f"choose less than {least}, or leave that layer out of lora_layers"
            )
        low_rank = LowRank(weight, rank=tuning.lora_rank, alpha=tuning.lora_alpha, generator=generator)
        parametrize.register_parametrization(linear[name], "weight", low_rank)


def _switch_checkpointing_on(network: HeightNetwork) -> None:
    """Checkpointing by timm, once it was seen to keep less: some of its models take the switch and ignore it."""
    refusal = (
        f"backbone {network.config.backbone!r} cannot compute its blocks again (checkpointing); "
        f"set checkpointing = false, or choose a plain ViT, pvt_v2_b0, swin_tiny_patch4_window7_224 or convnext_tiny"
    )
    before = _kept_bytes(network)
    try:
        network.backbone.body.set_grad_checkpointing(True)
    except (AssertionError, AttributeError) as error:
        raise RecipeError(refusal) from error
    if not _kept_bytes(network) < before:
        raise RecipeError(refusal)


def _kept_bytes(network: HeightNetwork) -> int:
    """Bytes that the backbone keeps of a small window for the backward pass, besides its parameters."""
    weights = {parameter.data_ptr() for parameter in network.parameters()}
    alive: weakref.WeakSet[_Kept] = weakref.WeakSet()

    def keep(tensor: Tensor) -> _Kept:
        kept = _Kept(tensor)
        alive.add(kept)
        return kept

    x_bchw = torch.zeros(1, network.config.in_channels, TOTAL_STRIDE_PX, 2 * TOTAL_STRIDE_PX).to(next(network.parameters()))
    modes = [(module, module.training) for module in network.modules()]
    network.eval()  # neither random numbers nor batch statistics may notice
    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(keep, lambda kept: kept.tensor):
        maps = network.backbone(x_bchw)
    for module, training in modes:
        module.training = training
    storages = [kept.tensor.untyped_storage() for kept in alive]
    del maps  # up to here it held the graph
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages if storage.data_ptr() not in weights}.values())


class _Kept:
    """A tensor in the graph, for as long as the graph holds it."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor


# --- how fast ------------------------------------------------------------------------------------------------------------


def parameter_groups(network: HeightNetwork, tuning: Tuning, *, lr: float, weight_decay: float) -> list[dict[str, Any]]:
    """Groups for AdamW, with `name`, `lr` and `weight_decay`: the backbone's from the stem up, the rest last.

    Without decay: biases, norms and whatever else has one dimension, and what the backbone exempts (positions, tokens).

    Why not timm's `param_groups_layer_decay`: it knows the backbone only, gives factors that nothing but timm's schedules
    reads, makes two groups of every layer where all have one rate, and lets unlisted parameters learn fastest. The layers
    are timm's, and so is the formula.
    """
    body = network.backbone.body
    exempt = set(body.no_weight_decay()) if hasattr(body, "no_weight_decay") else set()
    backbone_lr = lr * tuning.backbone_lr_factor
    layers = _layers(network) if tuning.layer_decay < 1 else {}
    depth = max(layers.values(), default=0)
    groups: dict[tuple[int, bool], dict[str, Any]] = {}

    def put(parameter: nn.Parameter, part: str, order: int, rate: float, *, decays: bool) -> None:
        if not parameter.requires_grad:
            return
        group = {
            "name": part if decays else f"{part}, not decayed",
            "params": [],
            "lr": rate,
            "weight_decay": weight_decay if decays else 0.0,
        }
        groups.setdefault((order, not decays), group)["params"].append(parameter)

    for name, parameter in body.named_parameters():
        layer = layers.get(name, depth)
        part = f"backbone layer {layer}" if layers else "backbone"
        rate = backbone_lr * tuning.layer_decay ** (depth - layer)
        put(parameter, part, layer, rate, decays=parameter.ndim >= 2 and name not in exempt)
    for name, parameter in network.named_parameters():
        if not name.startswith("backbone."):
            put(parameter, "rest", depth + 1, lr, decays=parameter.ndim >= 2)
    return [groups[key] for key in sorted(groups)]

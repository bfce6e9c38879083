"""The network: a timm backbone's four feature maps -> DPT decoder -> logits over height bins at every pixel.

Tensor suffixes: b batch, c channel, n bin, h row, w column, l token, d token width.

The decoder is that of Ranftl et al. 2021 ("Vision Transformers for Dense Prediction", arXiv 2103.13413) with the order and
the head of CHMv1 (Tolan et al. 2024) and CHMv2 (Brandt et al. 2026), so that their weights fit when the config says so.
Read `HeightNetwork.forward` first; the parts above it appear in the order in which it uses them.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Literal, Self

import timm
import torch
from pydantic import BaseModel, ConfigDict, Field
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from canopy.errors import ContractError, RecipeError
from canopy.grid import TOTAL_STRIDE_PX
from canopy.model.distribution import Bins, HeightDistribution, Normalisation

STRIDES_PX = (4, 8, 16, 32)
"""Strides of the four maps that the decoder fuses, finest first."""

PATCH_PX = 16
"""Patch side of a plain ViT that the resize layers (x4, x2, x1, /2) bring to those strides."""

_OTHERS = "choose for example pvt_v2_b0, swin_tiny_patch4_window7_224 or a ViT with patch16"

PRIOR_MEAN_M = 5.0
"""Mean height that an untrained softmax head predicts; open forest, and low as most of the Earth's canopy is."""


class NetworkConfig(BaseModel):
    """Everything that decides the network's parameters; stored in the model folder."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    backbone: str
    """A timm model name: a ViT with 16 px patches, or a hierarchical one with maps at strides 4, 8, 16, 32."""
    backbone_options: dict[str, bool | int | float | str | tuple[int, ...]] = {}
    """Further arguments of that timm model, for example drop_path_rate or, for tests, a small depth."""
    in_channels: int = Field(default=3, ge=1)
    """Bands of the image."""
    taps: tuple[int, int, int, int] | None = None
    """Plain ViTs: the blocks (from 0) whose outputs are used; None: those that end each quarter of the depth."""
    tap_norm: bool = True
    """Plain ViTs: apply the backbone's final norm to each tapped block, as CHMv2 does and CHMv1 does not."""
    norm_eps: float | None = Field(default=None, gt=0)
    """Plain ViTs: what every LayerNorm of the backbone adds to the variance; None: timm's value for that model."""
    rope_periods: tuple[float, ...] | None = None
    """ViTs with DINOv3's rotary positions: their periods, in half windows; None: computed from the backbone's temperature.

    Why here: the authors' checkpoints carry them rounded to bfloat16, which moves heights by 2 mm.
    """
    position_resize: Literal["corners"] | None = None
    """ViTs with learned positions: `corners` resizes their grid on its corners as CHMv1 does; None: as timm does."""
    reassemble_channels: tuple[int, int, int, int] | None = None
    """Channels of the four maps before fusion, finest first; None: 1/2, 1, 2 and 4 times `decoder_channels`."""
    decoder_channels: int = Field(default=256, ge=8, multiple_of=2)
    """Channels of every fused map."""
    head_channels: int = Field(default=128, ge=1)
    """Channels of the last hidden map, at full resolution: the costliest number here."""
    residual_bias: bool = True
    """Bias in the residual units (CHMv2: yes, CHMv1: no)."""
    projection_after_fusion: bool = False
    """A further 3x3 convolution after the last fusion (CHMv1)."""
    align_corners: bool = False
    """Upsample on the corners of the map, as both published decoders do.

    Why not by default: it stretches each window about its centre, so a pixel near a window's edge moves by a fraction of
    a pixel, and neighbouring windows disagree where they are blended.
    """
    bins: Bins = Bins(count=64)
    """Heights that the logits stand for."""
    normalisation: Normalisation = "softmax"
    """How logits become probabilities."""

    def channels(self) -> tuple[int, int, int, int]:
        """Channels of the four maps before fusion, finest first."""
        d = self.decoder_channels
        return self.reassemble_channels or (d // 2, d, 2 * d, 4 * d)


# --- backbone ------------------------------------------------------------------------------------------------------------


class Backbone(nn.Module):
    """A timm model cut down to its four maps: all at one stride (plain ViT) or at strides 4, 8, 16, 32 (hierarchical)."""

    def __init__(self, config: NetworkConfig, *, pretrained: bool = False) -> None:
        super().__init__()
        self.body = _create(config, pretrained=pretrained)
        info = self.body.feature_info
        strides = [level["reduction"] for level in info]
        self.is_plain = len(set(strides)) == 1
        if self.is_plain:
            if strides[0] != PATCH_PX:
                raise RecipeError(
                    f"backbone {config.backbone!r} has patches of {strides[0]} px, but windows are multiples of "
                    f"{TOTAL_STRIDE_PX} px and need {PATCH_PX}; choose a ViT whose name says patch16, or "
                    f"resample its patches with backbone_options.patch_size = {PATCH_PX}"
                )
            depth = len(info)
            self.taps = list(config.taps or [depth * quarter // 4 - 1 for quarter in (1, 2, 3, 4)])
            if any(b <= a for a, b in zip([-1, *self.taps], self.taps, strict=False)) or self.taps[-1] >= depth:
                raise RecipeError(
                    f"taps {self.taps} are not four ascending blocks of {config.backbone!r}; choose from 0 to {depth - 1}"
                )
        else:
            if config.taps is not None:
                raise RecipeError(f"taps {config.taps} are for plain ViTs; leave them out for {config.backbone!r}")
            if not set(STRIDES_PX) <= set(strides):
                raise RecipeError(
                    f"backbone {config.backbone!r} gives maps at strides {strides}, but {list(STRIDES_PX)} are needed; "
                    f"choose for example pvt_v2_b0, swin_tiny_patch4_window7_224 or convnext_tiny"
                )
            self.taps = [strides.index(stride) for stride in STRIDES_PX]
        self.channels = [info[tap]["num_chs"] for tap in self.taps]
        self.has_class_token = self.is_plain and getattr(self.body, "cls_token", None) is not None
        # Parameters that no map depends on would never get a gradient; distributed training refuses such models.
        self.tap_norm = self.is_plain and config.tap_norm
        self.body.prune_intermediate_layers(self.taps, prune_norm=not self.tap_norm, prune_head=True)
        self.rope_periods = config.rope_periods
        self._adjust(config)
        self._try_a_window(config)

    def forward(self, x_bchw: Tensor) -> tuple[list[Tensor], list[Tensor] | None]:
        """Four maps, finest first, and their class tokens (batch, channel) if any.

        The maps are (batch, channel, row, col), those of a ViT with a class token as a view of its tokens: the channels of a
        pixel side by side in memory (channels last), as the decoder wants them.
        """
        options: dict[str, Any] = {"indices": self.taps, "norm": self.tap_norm, "intermediates_only": True}
        if not self.has_class_token:
            return self.body.forward_intermediates(x_bchw, **options), None
        rows, cols = x_bchw.shape[2] // PATCH_PX, x_bchw.shape[3] // PATCH_PX
        pairs = self.body.forward_intermediates(x_bchw, return_prefix_tokens=True, output_fmt="NLC", **options)
        maps = [token_bld.reshape(-1, rows, cols, token_bld.shape[-1]).permute(0, 3, 1, 2) for token_bld, _ in pairs]
        # timm puts the class token before any register tokens.
        return maps, [prefix_bld[:, 0] for _, prefix_bld in pairs]

    def _adjust(self, config: NetworkConfig) -> None:
        """What timm's constructors have no argument for."""
        if config.norm_eps is not None:
            for module in self.body.modules():
                if isinstance(module, nn.LayerNorm):
                    module.eps = config.norm_eps
        if config.rope_periods is not None:
            wanted = getattr(getattr(self.body, "rope", None), "periods", torch.empty(0)).numel()
            if wanted != len(config.rope_periods):
                raise RecipeError(
                    f"rope_periods has {len(config.rope_periods)} periods, backbone {config.backbone!r} takes {wanted}; "
                    f"leave them out, or give as many"
                )
            self._set_periods()
        if config.position_resize is not None:
            if type(self.body) is not VisionTransformer or self.body.pos_embed is None or self.body.no_embed_class:
                raise RecipeError(
                    f"position_resize {config.position_resize!r} is for ViTs with learned positions; "
                    f"leave it out for {config.backbone!r}"
                )
            self.body.__class__ = _CornerPositions  # the same parameters with another way of resizing them

    def _set_periods(self) -> None:
        if self.rope_periods is not None:
            periods = self.body.rope.periods
            self.body.rope.periods = torch.tensor(self.rope_periods, dtype=torch.float32, device=periods.device)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        # timm computes the periods anew when a model is cast to half precision; they are constants of the network.
        self._set_periods()
        return self

    @torch.no_grad()
    def _try_a_window(self, config: NetworkConfig) -> None:
        """Refuses at once a backbone that is tied to its classifier's image size; nothing in timm says so beforehand."""
        self.body.eval()
        rows, cols = 2 * TOTAL_STRIDE_PX, 3 * TOTAL_STRIDE_PX
        try:
            maps, _ = self(torch.zeros(1, config.in_channels, rows, cols))
        except Exception as error:  # each of timm's many models objects in its own way
            raise RecipeError(
                f"backbone {config.backbone!r} does not take windows of any size ({_first_line(error)}); {_OTHERS}"
            ) from error
        strides = [PATCH_PX] * 4 if self.is_plain else STRIDES_PX
        shapes = [tuple(map_bchw.shape[1:]) for map_bchw in maps]
        expected = [(c, rows // s, cols // s) for c, s in zip(self.channels, strides, strict=True)]
        if shapes != expected:
            raise RecipeError(
                f"backbone {config.backbone!r} makes maps of {shapes} of a window of {rows} x {cols} px, "
                f"but {expected} are needed; {_OTHERS}"
            )
        self.body.train()


class _CornerPositions(VisionTransformer):
    """timm's ViT with its grid of learned positions resized on the corners, for weights that were trained so (CHMv1).

    timm resizes between pixel edges and smooths when the grid shrinks, which puts the positions up to half a patch off
    what such weights expect: 2 cm of height already from 14 to 16 patches.
    """

    def _pos_embed(self, x: Tensor) -> Tensor:
        assert self.cls_token is not None, "these weights come with a class token"
        token_bld = torch.cat([self.cls_token.expand(x.shape[0], -1, -1), x.flatten(1, 2)], dim=1)
        return token_bld + self._positions(x.shape[1], x.shape[2])

    def _positions(self, rows: int, cols: int) -> Tensor:
        assert self.pos_embed is not None, "these weights come with positions"
        own_rows, own_cols = self.patch_embed.grid_size
        if (rows, cols) == (own_rows, own_cols):
            return self.pos_embed
        class_bld, patch_bld = self.pos_embed[:, :1], self.pos_embed[:, 1:]
        grid_bdhw = patch_bld.float().reshape(1, own_rows, own_cols, -1).permute(0, 3, 1, 2)
        grid_bdhw = functional.interpolate(grid_bdhw, size=(rows, cols), mode="bicubic", align_corners=True)
        return torch.cat([class_bld, grid_bdhw.flatten(2).transpose(1, 2).to(class_bld.dtype)], dim=1)


def _first_line(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]


def _create(config: NetworkConfig, *, pretrained: bool) -> Any:
    if not timm.is_model(config.backbone):
        near = difflib.get_close_matches(config.backbone, timm.list_models(), n=3) or ["pvt_v2_b0"]
        raise RecipeError(f"timm has no backbone {config.backbone!r}; did you mean {' or '.join(near)}?")
    options: dict[str, Any] = {"num_classes": 0, "in_chans": config.in_channels, **config.backbone_options}
    try:
        try:
            # Models with a fixed grid of positions take other window sizes only when built for it; the constructors of
            # the others do not know the word, and timm offers no way to ask beforehand.
            body = timm.create_model(config.backbone, pretrained=pretrained, dynamic_img_size=True, **options)
        except TypeError:
            body = timm.create_model(config.backbone, pretrained=pretrained, **options)
    except OSError as error:
        raise RecipeError(
            f"pretrained weights of {config.backbone!r} could not be fetched ({_first_line(error)}); "
            f"connect once, or train with pretrained = false"
        ) from error
    except Exception as error:  # as above: a KeyError of one, an AssertionError of the next
        asked = "pretrained = true and these backbone_options" if pretrained else "these backbone_options"
        raise RecipeError(
            f"timm cannot build {config.backbone!r} with {asked}: {_first_line(error)}; correct backbone_options, or choose "
            f"another backbone"
        ) from error
    if not hasattr(body, "forward_intermediates") or not hasattr(body, "prune_intermediate_layers"):
        raise RecipeError(f"backbone {config.backbone!r} cannot give feature maps; choose for example pvt_v2_b0")
    return body


# --- decoder -------------------------------------------------------------------------------------------------------------


class Readout(nn.Module):
    """The "project" readout: every patch token sees the class token, GELU(W [patch, class] + b).

    The product with the class token is the same for all patches of an image. Keeping its half of W apart costs half of
    what joining the class token to every patch does.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.patch = nn.Linear(width, width)
        self.token = nn.Linear(width, width, bias=False)

    def forward(self, x_bchw: Tensor, class_bc: Tensor) -> Tensor:
        """Same shape as `x_bchw` out, channels last."""
        x_bhwc = self.patch(x_bchw.permute(0, 2, 3, 1)) + self.token(class_bc)[:, None, None]
        return functional.gelu(x_bhwc).permute(0, 3, 1, 2)


class Reassemble(nn.Module):
    """Backbone maps -> maps at strides 4, 8, 16, 32 with the channels of the decoder's four levels."""

    def __init__(self, backbone: Backbone, channels: tuple[int, int, int, int]) -> None:
        super().__init__()
        width = backbone.channels
        self.readout = nn.ModuleList(Readout(d) for d in (width if backbone.has_class_token else ()))
        self.project = nn.ModuleList(nn.Conv2d(d, c, 1) for d, c in zip(width, channels, strict=True))
        finest, fine, _, coarsest = channels
        self.resize = nn.ModuleList(
            [
                nn.ConvTranspose2d(finest, finest, 4, stride=4),
                nn.ConvTranspose2d(fine, fine, 2, stride=2),
                nn.Identity(),
                nn.Conv2d(coarsest, coarsest, 3, stride=2, padding=1),
            ]
            if backbone.is_plain
            else [nn.Identity()] * 4
        )

    def forward(self, maps: list[Tensor], classes: list[Tensor] | None) -> list[Tensor]:
        """Backbone maps and class tokens as `Backbone.forward` gives them -> four maps (batch, channel, row, col)."""
        out = []
        for level, (project, resize) in enumerate(zip(self.project, self.resize, strict=True)):
            x_bchw = maps[level]
            if classes is not None:
                x_bchw = self.readout[level](x_bchw, classes[level])
            out.append(resize(project(x_bchw)))
        return out


class ResidualUnit(nn.Module):
    """x + conv(relu(conv(relu(x))))."""

    def __init__(self, channels: int, *, bias: bool) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1, bias=bias)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=bias)

    def forward(self, x_bchw: Tensor) -> Tensor:
        """Same shape in and out."""
        y_bchw: Tensor = self.conv2(functional.relu(self.conv1(functional.relu(x_bchw))))
        return x_bchw + y_bchw


class Fusion(nn.Module):
    """Adds one level to what comes from the coarser levels, then doubles the resolution."""

    def __init__(self, channels: int, *, bias: bool, align_corners: bool, coarsest: bool) -> None:
        super().__init__()
        self.align_corners = align_corners
        self.unit1 = None if coarsest else ResidualUnit(channels, bias=bias)
        self.unit2 = ResidualUnit(channels, bias=bias)
        self.project = nn.Conv2d(channels, channels, 1)

    def forward(self, level_bchw: Tensor, coarser_bchw: Tensor | None) -> Tensor:
        """`level_bchw` and what the next coarser fusion gave, of one shape -> (batch, channel, 2 row, 2 col)."""
        x_bchw = level_bchw
        if self.unit1 is not None:
            assert coarser_bchw is not None, "only the coarsest level has nothing below it"
            x_bchw = coarser_bchw + self.unit1(level_bchw)
        # The published order is upsample, then project. A 1x1 convolution and an interpolation commute (its weights sum
        # to 1, so the bias passes too), and this order costs a quarter.
        return _double(self.project(self.unit2(x_bchw)), align_corners=self.align_corners)


def _double(x_bchw: Tensor, *, align_corners: bool) -> Tensor:
    return functional.interpolate(x_bchw, scale_factor=2.0, mode="bilinear", align_corners=align_corners)


class Decoder(nn.Module):
    """Four maps at strides 4, 8, 16, 32 -> one map at stride 2, fused from the coarsest up."""

    def __init__(self, config: NetworkConfig) -> None:
        super().__init__()
        width = config.decoder_channels
        self.conv = nn.ModuleList(nn.Conv2d(c, width, 3, padding=1, bias=False) for c in config.channels())
        self.fusion = nn.ModuleList(  # in the order of use: the coarsest first
            Fusion(width, bias=config.residual_bias, align_corners=config.align_corners, coarsest=step == 0)
            for step in range(4)
        )
        self.project = nn.Conv2d(width, width, 3, padding=1) if config.projection_after_fusion else None

    def forward(self, maps: list[Tensor]) -> Tensor:
        """Maps of `Reassemble`, finest first -> (batch, channel, row / 2, col / 2) of the image's rows and columns."""
        levels = [conv(map_bchw) for conv, map_bchw in zip(self.conv, maps, strict=True)]
        x_bchw: Tensor | None = None
        for fusion, level_bchw in zip(self.fusion, reversed(levels), strict=True):
            x_bchw = fusion(level_bchw, x_bchw)  # strides 32 -> 16 -> 8 -> 4 -> 2
        assert x_bchw is not None, "four levels were fused"
        return x_bchw if self.project is None else functional.relu(self.project(x_bchw))


class Head(nn.Module):
    """Map at stride 2 -> logits over height bins at full resolution."""

    def __init__(self, config: NetworkConfig) -> None:
        super().__init__()
        self.align_corners = config.align_corners
        width = config.decoder_channels
        self.conv1 = nn.Conv2d(width, width // 2, 3, padding=1)
        self.conv2 = nn.Conv2d(width // 2, config.head_channels, 3, padding=1)
        self.conv3 = nn.Conv2d(config.head_channels, config.bins.count, 1)

    def forward(self, x_bchw: Tensor) -> Tensor:
        """(batch, channel, row / 2, col / 2) -> logits (batch, bin, row, col)."""
        x_bchw = _double(self.conv1(x_bchw), align_corners=self.align_corners)  # stride 2 -> 1
        logits_bnhw: Tensor = self.conv3(functional.relu(self.conv2(x_bchw)))
        return logits_bnhw


# --- network -------------------------------------------------------------------------------------------------------------


class HeightNetwork(nn.Module):
    """Normalised image -> logits over height bins at every pixel.

    Raises:
        RecipeError: timm does not have the backbone, or it does not give four maps at usable strides.
    """

    def __init__(self, config: NetworkConfig, *, pretrained: bool = False) -> None:
        super().__init__()
        self.config = config
        self.backbone = Backbone(config, pretrained=pretrained)
        self.reassemble = Reassemble(self.backbone, config.channels())
        self.decoder = Decoder(config)
        self.head = Head(config)
        initialise(self)
        # Weights that keep their channels together make every convolution do so with its maps: on CPUs and tensor cores
        # a step takes a quarter less time, and the bins of a pixel lie side by side for the softmax.
        self.to(memory_format=torch.channels_last)
        if any(isinstance(module, nn.GroupNorm) for module in self.backbone.modules()):
            # On CPUs the gradient of a group norm takes torch 30 times as long so, half of a whole step in bfloat16.
            self.backbone.to(memory_format=torch.contiguous_format)

    def forward(self, x_bchw: Tensor) -> Tensor:
        """Logits (batch, bin, row, col) for a normalised float image (batch, band, row, col) of the same rows and columns.

        Raises:
            ContractError: the number of bands is not the config's, or a side is not a multiple of 32 px.
        """
        bands, rows, cols = x_bchw.shape[1:]
        if bands != self.config.in_channels:
            raise ContractError(
                f"image has {bands} bands, the network takes {self.config.in_channels}; choose bands to match"
            )
        if rows % TOTAL_STRIDE_PX or cols % TOTAL_STRIDE_PX or not rows * cols:
            raise ContractError(
                f"image of {rows} x {cols} px has a side that is not a multiple of {TOTAL_STRIDE_PX}; "
                f"cut windows of such a size, or pad and mask the rest"
            )
        maps, classes = self.backbone(x_bchw)
        logits_bnhw: Tensor = self.head(self.decoder(self.reassemble(maps, classes)))
        assert logits_bnhw.shape[2:] == (rows, cols), f"logits {logits_bnhw.shape} for an image of {rows} x {cols} px"
        return logits_bnhw

    def distribution(self, x_bchw: Tensor) -> HeightDistribution:
        """The heights that the logits for `x_bchw` stand for."""
        return HeightDistribution.from_logits(self(x_bchw), self.config.bins, self.config.normalisation)


_DRAWS = frozenset(
    [Tensor.uniform_, Tensor.normal_, Tensor.erfinv_]
    + [getattr(nn.init, f"{name}_") for name in ("uniform", "normal", "trunc_normal", "kaiming_uniform", "kaiming_normal")]
    + [nn.init.xavier_uniform_, nn.init.xavier_normal_]
)


class _NoDraws(TorchFunctionMode):
    """Tensors that would be filled with random numbers keep what happens to be in memory."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        return (*args, *kwargs.values())[0] if func in _DRAWS else func(*args, **kwargs)


@contextmanager
def weights_to_come() -> Iterator[None]:
    """Networks built inside have no starting values, for weights that replace all of them; torch's generator is left alone.

    Drawing them takes two thirds of the time of building a large network.
    """
    with torch.random.fork_rng(devices=[]), _NoDraws():
        yield


@torch.no_grad()
def initialise(network: HeightNetwork) -> None:
    """Starting values of everything but the backbone, drawn from torch's generator.

    Kaiming for convolutions, because ReLUs follow them (CHMv2 found it worth 0.05 m). Two departures keep the first
    predictions near a prior: the second convolution of each residual unit starts small, so that four fusions do not
    blow the activations up, and so does the last layer, whose bias is the prior over bins.
    """
    for part in (network.reassemble, network.decoder, network.head):
        for module in part.modules():
            if isinstance(module, nn.Conv2d | nn.ConvTranspose2d | nn.Linear):
                nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
    for module in network.modules():
        if isinstance(module, Readout):  # two halves of one layer, whose fan-in is that of both
            module.patch.weight.mul_(0.5**0.5)
            module.token.weight.mul_(0.5**0.5)
        if isinstance(module, ResidualUnit):
            module.conv2.weight.mul_(0.1)
    network.head.conv3.weight.mul_(0.1)
    prior_n = prior_over_bins(network.config.bins)
    # softmax inverts the logarithm; the rectified normalisations get the prior itself, its peak at 1, above the noise.
    bias_n = prior_n.log() if network.config.normalisation == "softmax" else prior_n / prior_n.max()
    assert network.head.conv3.bias is not None, "the prior is the bias of the last layer"
    network.head.conv3.bias.copy_(bias_n)


def prior_over_bins(bins: Bins) -> Tensor:
    """Probability of each bin (bin,) before training: an exponential distribution of heights with mean `PRIOR_MEAN_M`."""
    scale_m = min(PRIOR_MEAN_M, bins.max_m / math.e)
    prior_n = torch.exp(-bins.centres_m().double() / scale_m) * bins.edges_m().double().diff()
    return (prior_n / prior_n.sum()).clamp_min(1e-6).float()

"""Published canopy height weights -> model folders: CHMv2 (Brandt et al. 2026) and CHMv1 (Tolan et al. 2024).

Read from top to bottom: which checkpoints there are (`import_model`), how files become tensors (`_Checkpoint`), what each
layout says about the network (`_chmv2`, `_chmv2_hugging_face`, `_chmv1`), and how their tensors become ours (`_Rule`).
Nothing is taken on trust: every tensor of a checkpoint is used, or named and left out on purpose, or the import refuses it.

What the published code does around its networks is not reproduced: images are cut into windows whose sides are multiples
of 32 px and never padded and resized, which moves pixels by up to 5 m; pixels for which no bin is preferred are `abstain`
and not 33.15 m; and the spread of the bins is there to be used.
"""

from __future__ import annotations

import itertools
import json
import logging
import math
import re
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, cast, get_args

import torch
from pydantic import ValidationError
from safetensors import SafetensorError, safe_open
from torch import Tensor

from canopy.errors import CanopyError, ContractError
from canopy.model.network import PATCH_PX, HeightNetwork, NetworkConfig, weights_to_come
from canopy.model.package import WRAPPERS, Contract, Training, file_sha256, save_model, unwrapped

_log = logging.getLogger(__name__)

Kind = Literal["chmv2", "chmv1"]
"""Whose weights: CHMv2, or CHMv1 (HighResCanopyHeight)."""

WEIGHT_FILES = (".pth", ".pt", ".ckpt", ".safetensors")
"""Endings of the files that are read as weights."""

_NESTS = ("state_dict", "model", "model_state_dict", "teacher", "student")
"""Keys under which training programs keep the tensors among other things."""

FIXTURE_SHAPE_PX = (64, 96)
"""Rows and columns of the fixture: not square, so that mixed-up axes show; small, so that loading stays quick."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Published:
    """What is known about a publication beyond its tensors."""

    title: str
    licence: str
    licence_says: str
    gsd_range_m: tuple[float, float]
    window_px: int
    stride_px: int
    sites: tuple[str, ...]
    footprints_deg: tuple[tuple[float, float, float, float], ...]
    training: str
    remedy: str


_PUBLISHED: dict[Kind, _Published] = {
    "chmv2": _Published(
        title="CHMv2 (Brandt et al. 2026, arXiv 2603.06382): DINOv3 ViT and DPT decoder with 256 mixed bins",
        licence="DINOv3 License",
        licence_says=(
            "The DINOv3 License goes with these weights and with anything made from them (fine-tuned weights included): "
            "pass it on with them, acknowledge DINOv3, and keep to its list of forbidden uses. "
            "https://ai.meta.com/resources/models-and-libraries/dinov3-license/"
        ),
        # Web-mercator mosaics of 0.597 m at the equator, so finer on the ground towards the poles, and NAIP at 0.6 m.
        gsd_range_m=(0.3, 0.7),
        window_px=416,
        stride_px=312,
        sites=("SatLidar v2", "NAIP-3DEP", "NAIP Sea"),
        # The places of SatLidar are published as a figure only; an audit must assume any place was seen.
        footprints_deg=((-180.0, -90.0, 180.0, 90.0),),
        training=(
            "SatLidar v2 training and validation sets, NAIP-3DEP and NAIP Sea (100,000 iterations of 16 crops on a frozen "
            "SAT-493M backbone). The list of places is not published, so no place counts as unseen."
        ),
        remedy="give the folder with the backbone and head files of the DINOv3 authors, or a Hugging Face checkpoint folder",
    ),
    "chmv1": _Published(
        title="CHMv1 (Tolan et al. 2024, doi 10.1016/j.rse.2023.113888): self-supervised ViT, DPT decoder, 256 linear bins",
        licence="Apache-2.0",
        licence_says="Apache-2.0: use, change and pass on; keep the licence and the notices of its authors.",
        gsd_range_m=(0.5, 0.7),
        window_px=256,
        stride_px=192,
        sites=("NEON",),
        # NEON's sites lie in these: the contiguous United States, Alaska and Puerto Rico.
        footprints_deg=((-125.0, 24.0, -66.0, 50.0), (-170.0, 51.0, -129.0, 72.0), (-67.5, 17.5, -65.0, 18.8)),
        training=(
            "Maxar imagery against ALS heights of NEON sites, on a frozen backbone that learned from Maxar imagery of the "
            "whole world. Its published maps were then scaled with GEDI; these weights alone do not do that."
        ),
        remedy="give a checkpoint of HighResCanopyHeight, for example SSLhuge_satellite.pth",
    ),
}


def import_model(
    kind: str,
    source: Path | str | Sequence[Path | str],
    out: Path | str,
    *,
    name: str | None = None,
    overwrite: bool = False,
    say: Callable[[str], None] | None = None,
) -> Path:
    """Writes a model folder with the weights of a published canopy height model.

    Args:
        kind: "chmv2" or "chmv1".
        source: CHMv2: the folder with the authors' two files (backbone and DPT head, or one file with both) or with a
            Hugging Face checkpoint (config.json and safetensors); or the two files. CHMv1: a checkpoint file, or the
            folder with the one there is. Sizes come from the tensors; those that tensors do not show (number of heads,
            tapped blocks) from what is published, or from a config.json beside the file with `num_heads` and `taps`.
        out: Folder to write.
        name: The model's name; default: the folder's.
        overwrite: Replace the model in `out`.
        say: Told, in a line each, what was done to the weights on the way; the card says it too.

    Returns:
        The folder.

    Raises:
        ContractError: The files are not complete, not readable, not this model's, or hold what no weight can be.
        OutputError: The folder exists, or cannot be written.
    """
    if kind not in get_args(Kind):
        raise ContractError(f"{kind!r} cannot be imported; choose from {', '.join(get_args(Kind))}")
    out, chosen = Path(out), cast("Kind", kind)
    published = _PUBLISHED[chosen]
    sources = [source] if isinstance(source, Path | str) else source
    checkpoint = _Checkpoint.read(chosen, [Path(each) for each in sources])
    layout = _LAYOUTS[checkpoint.layout](checkpoint)
    network = _network(checkpoint, layout)
    contract = Contract(
        name=name or out.resolve().name,
        version=checkpoint.digests[checkpoint.main][:8],
        description=published.title,
        licence=published.licence,
        network=network.config,
        bands=("red", "green", "blue"),
        gsd_range_m=published.gsd_range_m,
        dtype="uint8",
        value_range=(0.0, 255.0),
        # Of both publications' inference code, for RGB from 0 to 1.
        mean=tuple(255.0 * share for share in (0.420, 0.411, 0.296)),
        std=tuple(255.0 * share for share in (0.213, 0.156, 0.143)),
        window_px=published.window_px,
        stride_px=published.stride_px,
        training=Training(
            sites=published.sites, tile_sets={}, recipe_sha256="", footprints_deg=published.footprints_deg
        ),
    )  # fmt: skip
    draw = torch.Generator().manual_seed(0)
    image = torch.randint(0, 256, (3, *FIXTURE_SHAPE_PX), dtype=torch.uint8, generator=draw)
    for line in checkpoint.remarks:
        (say or _log.info)(line)
    return save_model(
        out, network=network, contract=contract, card=_card(contract, published, checkpoint), fixture_image=image,
        overwrite=overwrite,
    )  # fmt: skip


def _card(contract: Contract, published: _Published, checkpoint: _Checkpoint) -> str:
    low, high = contract.gsd_range_m
    network = contract.network
    return "\n".join([
        f"# {contract.name} {contract.version}",
        "",
        contract.description,
        "",
        f"- Input: {', '.join(contract.bands)} imagery, {contract.dtype}, {low:g} to {high:g} m per pixel",
        f"- Output: canopy height in metres above ground, up to {network.bins.max_m:g} m",
        f"- Network: {network.backbone}, DPT decoder, {network.bins.count} height bins, `{network.normalisation}`",
        f"- Windows: {contract.window_px} px every {contract.stride_px} px; positions depend on the window's size",
        f"- Licence of the weights: {contract.licence}",
        "",
        published.licence_says,
        "",
        "## Imported from",
        "",
        *(f"- `{file.name}`, {file.stat().st_size:,} bytes, SHA-256 {sha}" for file, sha in checkpoint.digests.items()),
        *(f"- {line}" for line in checkpoint.remarks),
        "",
        "## Training data",
        "",
        published.training,
        "",
        "## Scores and intervals",
        "",
        "None were measured here. The spread is that of the bins and is not calibrated; maps say so in their tags.",
        "",
    ])  # fmt: skip


# --- files -> tensors ----------------------------------------------------------------------------------------------------


@dataclass(slots=True, kw_only=True)
class _Checkpoint:
    """The tensors of one or more files under the names of one layout, and what had to be done to get there."""

    kind: Kind
    layout: str
    """Key of `_LAYOUTS`."""
    tensors: dict[str, Tensor]
    where: dict[str, Path]
    """File of each tensor."""
    digests: dict[Path, str]
    """SHA-256 of each file."""
    main: Path
    """The file whose hash is the model's version."""
    config: dict[str, Any] = field(default_factory=dict)
    """config.json beside the files; empty if there is none."""
    config_path: Path | None = None
    remarks: list[str] = field(default_factory=list)

    @classmethod
    def read(cls, kind: Kind, sources: Sequence[Path]) -> _Checkpoint:
        for path in sources:
            if not path.exists():
                raise ContractError(f"{path} does not exist; {_PUBLISHED[kind].remedy}")
        config_path = (sources[0] if sources[0].is_dir() else sources[0].parent) / "config.json"
        config = _read_json(config_path) if config_path.is_file() else {}
        remarks: list[str] = []
        if "model_type" in config:
            if kind != "chmv2" or config["model_type"] != "chmv2":
                raise ContractError(
                    f"{config_path} is of a {config['model_type']!r} checkpoint, not {kind}; {_PUBLISHED[kind].remedy}"
                )
            files = _safetensors_files(config_path.parent)
            loaded: dict[Path, Mapping[str, Any]] = {path: _read_safetensors(path) for path in files}
            layout = "hugging face"
        else:
            files = [file for path in sources for file in (_torch_files(path) if path.is_dir() else [path])]
            loaded = {
                path: _read_safetensors(path) if path.suffix == ".safetensors" else _read_torch(path, remarks)
                for path in files
            }
            layout = kind
        digests = {path: file_sha256(path) for path in files}
        for path, digest in digests.items():
            stated = re.search(r"-([0-9a-f]{8})\.[a-z]+$", path.name)
            if stated and not digest.startswith(stated[1]):
                raise ContractError(
                    f"{path} has SHA-256 {digest[:8]}…, but its name says {stated[1]}: the file was altered or cut short; "
                    f"download it again"
                )
        tensors: dict[str, Tensor] = {}
        where: dict[str, Path] = {}
        for path, state in loaded.items():
            plain = _plain_names(state, path, remarks)
            for key, tensor in (_one_module(plain) if layout == "chmv2" else plain).items():
                if key in tensors:
                    raise ContractError(f"{path} and {where[key]} both hold tensor {key}; leave one of the two out")
                tensors[key], where[key] = tensor, path
        main = next((path for path in files if any("conv_depth" in key for key in loaded[path])), files[0])
        return cls(
            kind=kind, layout=layout, tensors=tensors, where=where, digests=digests, main=main, config=config,
            config_path=config_path if config else None, remarks=remarks,
        )  # fmt: skip

    def shape(self, key: str) -> tuple[int, ...]:
        """Shape of a tensor that every checkpoint of the kind has; without it this is something else."""
        if key not in self.tensors:
            files = " and ".join(str(path) for path in self.digests)
            what = _likeness(self.tensors)
            raise ContractError(
                f"{files} is no {self.kind} checkpoint: it has no {key} and looks like {what}; {self._remedy(what)}"
            )
        return tuple(self.tensors[key].shape)

    def _remedy(self, likeness: str) -> str:
        other: Kind = "chmv1" if self.kind == "chmv2" else "chmv2"
        return f"import it as {other}" if other in likeness else _PUBLISHED[self.kind].remedy

    def count(self, pattern: str) -> int:
        """1 + the highest number in the place of `{}` among the tensors' names; 0 if there is none."""
        expression = re.compile("^" + re.escape(pattern).replace(r"\{\}", r"(\d+)"))
        return 1 + max((int(match[1]) for key in self.tensors if (match := expression.match(key))), default=-1)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ContractError(f"{path} is not readable JSON ({error}); download it again") from error
    if not isinstance(value, dict):
        raise ContractError(f"{path} holds no table; download it again")
    return value


def _safetensors_files(folder: Path) -> list[Path]:
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if single.is_file():
        return [single]
    if not index.is_file():
        raise ContractError(f"{folder} has neither {single.name} nor {index.name}; download the whole repository")
    shards = sorted({folder / str(name) for name in _read_json(index).get("weight_map", {}).values()})
    for shard in shards:
        if not shard.is_file():
            raise ContractError(f"{shard} is missing, but {index.name} names it; download the whole repository")
    if not shards:
        raise ContractError(f"{index} names no files; download it again")
    return shards


def _torch_files(folder: Path) -> list[Path]:
    files = sorted(path for path in folder.iterdir() if path.suffix in WEIGHT_FILES)
    if not files:
        raise ContractError(
            f"{folder} holds no file ending in {', '.join(WEIGHT_FILES)} and no config.json of Hugging Face; "
            f"give the folder with the downloaded weights"
        )
    return files


def _refuse_no_weights(path: Path) -> None:
    """A download that was refused or broken off leaves a page, a note or nothing under the file's name."""
    with path.open("rb") as file:
        start = file.read(512)
    text = start.lstrip()[:64].lower()
    if not start:
        raise ContractError(f"{path} is empty; download it again")
    if text.startswith((b"<!doctype", b"<html", b"<?xml")):
        raise ContractError(f"{path} is a web page and no weights; log in where it comes from and download it again")
    if text.startswith(b"version https://git-lfs"):
        raise ContractError(f"{path} is a pointer of git LFS and no weights; fetch the file itself (git lfs pull)")


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    _refuse_no_weights(path)
    try:
        with safe_open(path, framework="pt") as file:
            return {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - it is no mapping
    except (SafetensorError, OSError) as error:
        raise ContractError(f"{path} is not a whole safetensors file ({error}); download it again") from error


def _read_torch(path: Path, remarks: list[str]) -> dict[str, Any]:
    _refuse_no_weights(path)
    with path.open("rb") as file:
        zipped = file.read(2) == b"PK"
    if zipped and not zipfile.is_zipfile(path):
        raise ContractError(
            f"{path} ends early ({path.stat().st_size:,} bytes are there): a download that broke off; download it again"
        )
    try:
        # Tensors and containers only: loading must not run a file's own code. Mapped, so that nothing is read twice.
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)
    except Exception as error:  # torch passes on whatever its unpickler, its zip reader and the file's content raise
        reason = (str(error).strip() or type(error).__name__).splitlines()[0].split(". ")[0][:120]
        raise ContractError(
            f"{path} is no checkpoint of plain tensors ({reason}); download it again, or save its state dict alone"
        ) from error
    while isinstance(state, Mapping) and not any(isinstance(value, Tensor) for value in state.values()):
        nest = next((key for key in _NESTS if isinstance(state.get(key), Mapping)), None)
        if nest is None:
            break
        remarks.append(f"{path.name}: tensors taken from {nest!r}, {len(state) - 1} other entries left out")
        state = state[nest]
    if not isinstance(state, Mapping) or not any(isinstance(value, Tensor) for value in state.values()):
        raise ContractError(f"{path} holds no tensors by name; give a checkpoint's state dict")
    return {str(key): value for key, value in state.items()}


def _plain_names(state: Mapping[str, Any], path: Path, remarks: list[str]) -> dict[str, Tensor]:
    """The tensors without the names that wrappers add, and with the weights of quantised layers as float32."""
    plain: dict[str, Any] = {}
    stripped: set[str] = set()
    for key, value in state.items():
        stripped |= WRAPPERS.intersection(key.split("."))
        plain[unwrapped(key)] = value
    if all(key.startswith("chm_module_.") for key in plain):
        stripped.add("chm_module_")
        plain = {key.removeprefix("chm_module_."): value for key, value in plain.items()}
    if stripped:
        remarks.append(f"{path.name}: {', '.join(f'{name!r}' for name in sorted(stripped))} left out of the tensors' names")
    packed = [key for key in plain if key.endswith("._packed_params._packed_params")]
    for key in packed:
        layer = key.removesuffix("._packed_params._packed_params")
        weight, bias = plain.pop(key)
        for rest in (f"{layer}.scale", f"{layer}.zero_point", f"{layer}._packed_params.dtype"):
            plain.pop(rest, None)  # of activations, which float32 arithmetic does not round
        plain[f"{layer}.weight"] = weight.dequantize()
        if bias is not None:
            plain[f"{layer}.bias"] = bias
    if packed:
        remarks.append(
            f"{path.name}: {len(packed)} layers with 8-bit weights computed in float32 from now on; heights differ slightly "
            f"from the published program's, which rounds activations to 8 bits too"
        )
    for key, value in plain.items():
        if not isinstance(value, Tensor):
            raise ContractError(f"{path}: {key} is a {type(value).__name__} and no tensor; give a checkpoint's state dict")
    return {key: value.detach() for key, value in plain.items()}


def _one_module(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The authors' backbone and head saved as one module: their prefixes go."""
    prefixes = ("encoder.backbone.", "decoder.")
    if not any(key.startswith(prefixes[0]) for key in state):
        return dict(state)
    return {key.removeprefix(prefixes[0]).removeprefix(prefixes[1]): value for key, value in state.items()}


def _likeness(tensors: Mapping[str, Tensor]) -> str:
    """What tensors of these names are, for people who picked the wrong file."""
    signs = (
        ("decode_head.conv_depth.", "HighResCanopyHeight (chmv1)"),
        ("backbone.embeddings.register_tokens", "Hugging Face CHMv2 without its config.json (chmv2)"),
        ("backbone.body.", "a model folder of canopy, which needs no import"),
        ("depth_head.scratch.", "Depth Anything"),
        ("conv_depth.head.", "the DPT head of CHMv2 without its backbone (chmv2)"),
        ("storage_tokens", "a DINOv3 backbone without a head"),
        ("embeddings.register_tokens", "a Hugging Face DINOv3 backbone without a head"),
        ("blocks.0.attn.qkv.weight", "a ViT backbone without a head"),
        ("encoder.", "an encoder-decoder such as a U-Net"),
        ("layer1.0.conv1.weight", "a ResNet"),
    )
    for sign, what in signs:
        if any(key.startswith(sign) for key in tensors):
            return what
    return f"something else (its first tensor is {next(iter(tensors), 'none')})"


# --- tensors -> ours -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class _Rule:
    """Some of their tensors become some of ours; by default one becomes one, unchanged."""

    theirs: tuple[str, ...]
    ours: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...] | None = None
    """Of theirs; None: those of ours."""
    make: Callable[[list[Tensor]], list[Tensor]] = list


@dataclass(frozen=True, slots=True, kw_only=True)
class _Layout:
    """A network, where its tensors come from, and which tensors of the checkpoint it has no use for."""

    config: NetworkConfig
    rules: list[_Rule]
    unused: tuple[str, ...]
    """Beginnings of names."""


def _network(checkpoint: _Checkpoint, layout: _Layout) -> HeightNetwork:
    """The network of `layout` with the checkpoint's weights, after every one of them was checked."""
    with weights_to_come():
        network = HeightNetwork(layout.config)
    wanted = {key: tuple(value.shape) for key, value in network.state_dict().items()}
    named = {key for rule in layout.rules for key in rule.ours}
    assert named == wanted.keys(), f"rules do not make the network: {sorted(named ^ wanted.keys())[:5]}"
    theirs = [key for rule in layout.rules for key in rule.theirs]
    left_out = [key for key in checkpoint.tensors if key.startswith(layout.unused) and key not in set(theirs)]
    unknown = sorted(checkpoint.tensors.keys() - set(theirs) - set(left_out))
    missing = [key for key in theirs if key not in checkpoint.tensors]
    files = " and ".join(str(path) for path in checkpoint.digests)
    for what, names in (("lacks", missing), ("holds unknown", unknown)):
        if names:
            shown = ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
            raise ContractError(
                f"{files} {what} tensor{'s' * (len(names) > 1)} {shown}: not the {checkpoint.kind} network that the others "
                f"describe; {_PUBLISHED[checkpoint.kind].remedy}"
            )
    state: dict[str, Tensor] = {}
    converted: dict[str, int] = {}
    for rule in layout.rules:
        shapes = rule.shapes or tuple(wanted[key] for key in rule.ours)
        values = [_checked(checkpoint, key, shape, converted) for key, shape in zip(rule.theirs, shapes, strict=True)]
        state.update(zip(rule.ours, rule.make(values), strict=True))
    checkpoint.remarks += [f"{count} tensors converted from {dtype} to float32" for dtype, count in converted.items()]
    left_out = [key for key in left_out if key != _PERIODS]  # these are in the contract
    if left_out:
        groups = sorted({".".join(key.split(".")[:2]) for key in left_out})
        checkpoint.remarks.append(f"left out, for no height depends on them: {len(left_out)} of {', '.join(groups)}")
    network.load_state_dict(state, strict=True)
    return network.eval()


def _checked(checkpoint: _Checkpoint, key: str, shape: tuple[int, ...], converted: dict[str, int]) -> Tensor:
    tensor, path = checkpoint.tensors[key], checkpoint.where[key]
    dtype = str(tensor.dtype).removeprefix("torch.")
    if not tensor.is_floating_point():
        raise ContractError(f"{path}: tensor {key} is {dtype}, and weights are floating point; get the original checkpoint")
    if tuple(tensor.shape) != shape:
        raise ContractError(
            f"{path}: tensor {key} has shape {tuple(tensor.shape)}, the network its other tensors describe takes {shape}; "
            f"{_PUBLISHED[checkpoint.kind].remedy}"
        )
    if dtype != "float32":
        converted[dtype] = converted.get(dtype, 0) + 1
        tensor = tensor.float()
    if not tensor.isfinite().all():
        bad = int((~tensor.isfinite()).sum())
        raise ContractError(f"{path}: tensor {key} holds {bad} values that are NaN or infinite; get the original checkpoint")
    return tensor


def _same(ours: str, theirs: str, *leaves: str) -> Iterator[_Rule]:
    """Rules for tensors that only have another name; by default a weight and a bias."""
    for leaf in leaves or ("weight", "bias"):
        yield _Rule(theirs=(f"{theirs}.{leaf}",), ours=(f"{ours}.{leaf}",))


def _readout(ours: str, theirs: str, width: int) -> Iterator[_Rule]:
    """Their one layer over [patch, class] is our two layers, one for each."""
    yield _Rule(
        theirs=(f"{theirs}.weight", f"{theirs}.bias"),
        ours=(f"{ours}.patch.weight", f"{ours}.token.weight", f"{ours}.patch.bias"),
        shapes=((width, 2 * width), (width,)),
        make=lambda tensors: [tensors[0][:, :width], tensors[0][:, width:], tensors[1]],
    )


def _head_rules(config: NetworkConfig, width: int, prefix: str) -> Iterator[_Rule]:
    """The DPT head as both publications' own programs name it."""
    for level in range(4):
        yield from _same(f"reassemble.project.{level}", f"{prefix}reassemble_blocks.projects.{level}.conv")
        yield from _readout(
            f"reassemble.readout.{level}", f"{prefix}reassemble_blocks.readout_projects.{level}.0", width
        )  # fmt: skip
        yield from _same(f"decoder.conv.{level}", f"{prefix}convs.{level}.conv", "weight")
        yield from _same(f"decoder.fusion.{level}.project", f"{prefix}fusion_blocks.{level}.project.conv")
        leaves = ("weight", "bias") if config.residual_bias else ("weight",)
        for unit, conv in itertools.product((2,) if level == 0 else (1, 2), (1, 2)):
            theirs = f"{prefix}fusion_blocks.{level}.res_conv_unit{unit}.conv{conv}.conv"
            yield from _same(f"decoder.fusion.{level}.unit{unit}.conv{conv}", theirs, *leaves)
    for level in (0, 1, 3):
        yield from _same(f"reassemble.resize.{level}", f"{prefix}reassemble_blocks.resize_layers.{level}")
    if config.projection_after_fusion:
        yield from _same("decoder.project", f"{prefix}project.conv")
    for ours, place in ((1, 0), (2, 2), (3, 4)):
        yield from _same(f"head.conv{ours}", f"{prefix}conv_depth.head.{place}")


def _head_sizes(checkpoint: _Checkpoint, conv: str, output: str) -> dict[str, Any]:
    """What the shapes of the head say: `conv` with {} for the level, `output` with {} for the place in the head."""
    channels = tuple(checkpoint.shape(conv.format(level))[1] for level in range(4))
    bins, hidden = checkpoint.shape(output.format(4))[:2]
    return {
        "reassemble_channels": channels,
        "decoder_channels": checkpoint.shape(conv.format(0))[0],
        "head_channels": hidden,
        "align_corners": True,
        "bin_count": bins,
    }


def _config(checkpoint: _Checkpoint, **fields: Any) -> NetworkConfig:
    try:
        return NetworkConfig(**fields)
    except (ValidationError, CanopyError) as error:
        problem = error.errors()[0]["msg"] if isinstance(error, ValidationError) else str(error)
        raise ContractError(
            f"{' and '.join(map(str, checkpoint.digests))} describes no possible network ({problem}); "
            f"{_PUBLISHED[checkpoint.kind].remedy}"
        ) from error


def _taps(checkpoint: _Checkpoint, depth: int, published: Mapping[int, tuple[int, int, int, int]]) -> tuple[int, ...]:
    given = checkpoint.config.get("taps")
    if given is not None:
        if not isinstance(given, list) or len(given) != 4 or not all(isinstance(tap, int) for tap in given):
            raise ContractError(f"{checkpoint.config_path}: taps = {given!r} are not four block numbers; correct it")
        return tuple(given)
    if depth < 4:
        raise ContractError(
            f"{checkpoint.main} has {depth} blocks, and four are tapped; {_PUBLISHED[checkpoint.kind].remedy}"
        )
    return published.get(depth) or tuple(depth * quarter // 4 - 1 for quarter in (1, 2, 3, 4))


def _heads(checkpoint: _Checkpoint, width: int, known: int | None) -> int:
    heads = checkpoint.config.get("num_heads", known)
    if heads is None:
        raise ContractError(
            f"{checkpoint.main} has width {width}, for which the number of attention heads is not published and tensors do "
            f'not show it; put a config.json with {{"num_heads": ..., "taps": [...]}} beside it'
        )
    if not isinstance(heads, int) or heads < 1 or width % heads:
        raise ContractError(f"{checkpoint.config_path}: num_heads = {heads!r} does not divide the width {width}; correct it")
    return heads


# --- CHMv2 ---------------------------------------------------------------------------------------------------------------

_CHMV2_BACKBONE = "vit_large_patch16_dinov3_qkvb"
"""timm's DINOv3 with biases; all sizes are options of it, so other sizes of the family are it too."""

_PERIODS = "rope_embed.periods"

_CHMV2_TAPS = {24: (5, 11, 17, 23)}


def _dinov3_options(*, width: int, depth: int, heads: int, registers: int, mlp: int, key_bias: bool) -> dict[str, Any]:
    options: dict[str, Any] = {"embed_dim": width, "depth": depth, "num_heads": heads, "num_reg_tokens": registers}
    if mlp != 4 * width:
        options["mlp_ratio"] = mlp / width
    if key_bias:  # timm's usual attention for DINOv3 has none, as the published weights have none
        options["attn_type"] = "rope"
    return options


def _chmv2(checkpoint: _Checkpoint) -> _Layout:
    """The DINOv3 authors' backbone and head."""
    halves = {"conv_depth.head.0.weight": "DPT head", "storage_tokens": "backbone"}
    for key, file in halves.items():
        if key not in checkpoint.tensors and halves.keys() & checkpoint.tensors.keys():
            raise ContractError(
                f"{' and '.join(map(str, checkpoint.digests))}: the {file} is missing ({_likeness(checkpoint.tensors)}); "
                f"put both files into one folder, or give both"
            )
    sizes = _head_sizes(checkpoint, "convs.{}.conv.weight", "conv_depth.head.{}.weight")
    bins = sizes.pop("bin_count")
    width = checkpoint.shape("cls_token")[-1]
    depth = checkpoint.count("blocks.{}.")
    registers = checkpoint.shape("storage_tokens")[1]
    periods = checkpoint.tensors.get(_PERIODS)
    heads = _heads(checkpoint, width, 16 if width == 1024 else None if periods is None else width // (4 * periods.numel()))
    biases = [f"blocks.{i}.attn.qkv.bias" for i in range(depth)]
    masks = [f"{key}_mask" for key in biases if f"{key}_mask" in checkpoint.tensors]
    # Effective bias: that of K is masked out. Only a checkpoint without masks can have one, which no published one has.
    key_bias = not masks and any(
        bool(bias[width : 2 * width].any()) for key in biases if (bias := checkpoint.tensors.get(key)) is not None
    )  # fmt: skip
    config = _config(
        checkpoint,
        backbone=_CHMV2_BACKBONE,
        backbone_options=_dinov3_options(
            width=width, depth=depth, heads=heads, registers=registers, key_bias=key_bias,
            mlp=checkpoint.shape("blocks.0.mlp.fc1.weight")[0],
        ),
        taps=_taps(checkpoint, depth, _CHMV2_TAPS),
        norm_eps=1e-5,
        rope_periods=_periods(checkpoint, periods, heads, width),
        bins=_mixed_bins(bins, min_depth=0.001, max_depth=96.0),
        normalisation="mixlog",
        **sizes,
    )  # fmt: skip
    return _Layout(
        config=config,
        rules=[*_dinov3_rules(config, width, masked=bool(masks), key_bias=key_bias), *_head_rules(config, width, "")],
        unused=("mask_token", "storage_tokens", "rope_embed.", "local_cls_norm.", *_untapped(config, depth, "blocks.{}.")),
    )


def _untapped(config: NetworkConfig, depth: int, pattern: str) -> list[str]:
    """Beginnings of the names of blocks behind the last tap, on which no height depends."""
    assert config.taps is not None, "imported networks name their taps"
    return [pattern.format(block) for block in range(config.taps[-1] + 1, depth)]


def _mixed_bins(count: int, *, min_depth: float, max_depth: float) -> dict[str, Any]:
    """Their bins run from min_depth to max_depth / 8 and the height is then multiplied by 8."""
    return {"count": count, "min_m": 8.0 * min_depth, "max_m": max_depth, "spacing": "mixlog"}


def _periods(checkpoint: _Checkpoint, periods: Tensor | None, heads: int, width: int) -> tuple[float, ...] | None:
    """Periods of the rotary positions that the checkpoint holds; None: those timm computes, as the authors' code does."""
    if periods is None:
        return None
    if periods.numel() * 4 * heads != width or not periods.is_floating_point() or not (periods.float() > 0).all():
        raise ContractError(
            f"{checkpoint.where[_PERIODS]}: {_PERIODS} are not {width // (4 * heads)} positive numbers; "
            f"get the original checkpoint"
        )
    return tuple(periods.float().tolist())


def _dinov3_rules(config: NetworkConfig, width: int, *, masked: bool, key_bias: bool) -> Iterator[_Rule]:
    body = "backbone.body"
    yield _Rule(theirs=("cls_token",), ours=(f"{body}.cls_token",))
    if config.backbone_options["num_reg_tokens"]:
        yield _Rule(theirs=("storage_tokens",), ours=(f"{body}.reg_token",))
    yield from _same(f"{body}.patch_embed.proj", "patch_embed.proj")
    yield from _same(f"{body}.norm", "norm")
    assert config.taps is not None, "imported networks name their taps"
    for i in range(config.taps[-1] + 1):
        ours, theirs = f"{body}.blocks.{i}", f"blocks.{i}"
        for part in ("norm1", "attn.proj", "norm2", "mlp.fc1", "mlp.fc2"):
            yield from _same(f"{ours}.{part}", f"{theirs}.{part}")
        yield _Rule(theirs=(f"{theirs}.attn.qkv.weight",), ours=(f"{ours}.attn.qkv.weight",))
        for branch in (1, 2):
            yield _Rule(theirs=(f"{theirs}.ls{branch}.gamma",), ours=(f"{ours}.gamma_{branch}",))
        bias, mask = f"{theirs}.attn.qkv.bias", f"{theirs}.attn.qkv.bias_mask"
        if key_bias:
            yield _Rule(theirs=(bias,), ours=(f"{ours}.attn.qkv.bias",))
        else:
            yield _Rule(
                theirs=(bias, mask) if masked else (bias,),
                ours=(f"{ours}.attn.q_bias", f"{ours}.attn.v_bias"),
                shapes=((3 * width,),) * (2 if masked else 1),
                make=_query_and_value,
            )  # fmt: skip


def _query_and_value(tensors: list[Tensor]) -> list[Tensor]:
    bias = math.prod(tensors[1:], start=tensors[0])  # times its mask, if it has one
    query, key, value = bias.chunk(3)
    if key.any():
        raise ContractError(
            "attn.qkv.bias_mask leaves a bias of the keys, which DINOv3 has not; get the original checkpoint"
        )
    return [query, value]


# --- CHMv2 from Hugging Face ---------------------------------------------------------------------------------------------


def _chmv2_hugging_face(checkpoint: _Checkpoint) -> _Layout:
    """`CHMv2ForDepthEstimation`; both spellings of the blocks' names occur in files."""
    tensors, where = checkpoint.tensors, checkpoint.where
    checkpoint.tensors = {key.replace("backbone.model.layer.", "backbone.layer."): value for key, value in tensors.items()}
    checkpoint.where = {key.replace("backbone.model.layer.", "backbone.layer."): value for key, value in where.items()}
    sizes = _head_sizes(checkpoint, "head.convs.{}.weight", "head.conv_depth.head.{}.weight")
    bins = sizes.pop("bin_count")
    width = checkpoint.shape("backbone.embeddings.cls_token")[-1]
    depth = checkpoint.count("backbone.layer.{}.")
    says = _HuggingFaceConfig(checkpoint)
    heads = int(says.backbone("num_attention_heads", 16))
    if width % heads:
        raise ContractError(
            f"{checkpoint.config_path}: num_attention_heads {heads} does not divide the width {width}; download it again"
        )
    taps = says.taps(depth)
    key_bias = any(
        bool(checkpoint.tensors[key].any())
        for i in range(depth)
        if (key := f"backbone.layer.{i}.attention.k_proj.bias") in checkpoint.tensors
    )
    bins_strategy, normalisation = says.heights()
    low, high = says.head("min_depth", 0.001), says.head("max_depth", 96.0)
    options = _dinov3_options(
        width=width, depth=depth, heads=heads, key_bias=key_bias,
        registers=checkpoint.shape("backbone.embeddings.register_tokens")[1],
        mlp=checkpoint.shape("backbone.layer.0.mlp.up_proj.weight")[0],
    )  # fmt: skip
    if (theta := says.rope_theta()) != 100.0:
        options["rope_temperature"] = theta
    config = _config(
        checkpoint,
        backbone=_CHMV2_BACKBONE,
        backbone_options=options,
        taps=taps,
        norm_eps=says.backbone("layer_norm_eps", 1e-6),
        bins=(
            _mixed_bins(bins, min_depth=low, max_depth=high)
            if bins_strategy == "mixlog"
            else {"count": bins, "min_m": low, "max_m": high, "spacing": "linear"}
        ),
        normalisation=normalisation,
        **sizes,
    )
    rules = [*_hugging_face_backbone(checkpoint, config, width, key_bias=key_bias), *_hugging_face_head(width)]
    unused = (
        "backbone.embeddings.mask_token",
        "backbone.embeddings.register_tokens",
        *_untapped(config, depth, "backbone.layer.{}."),
    )
    return _Layout(config=config, rules=rules, unused=unused)


class _HuggingFaceConfig:
    """config.json of a CHMv2 checkpoint: what it leaves out has the value that transformers gives it."""

    # What this network can do in one way only; any other value is another network.
    ONLY_BACKBONE = {  # noqa: RUF012 - a constant
        "patch_size": PATCH_PX, "num_channels": 3, "hidden_act": "gelu", "use_gated_mlp": False, "apply_layernorm": True,
        "reshape_hidden_states": True, "return_class_token": True, "mlp_bias": True, "proj_bias": True, "query_bias": True,
        "value_bias": True,
    }  # fmt: skip
    ONLY_HEAD = {  # noqa: RUF012
        "patch_size": PATCH_PX, "readout_type": "project", "reassemble_factors": [4, 2, 1, 0.5],
    }  # fmt: skip

    def __init__(self, checkpoint: _Checkpoint) -> None:
        self.path = checkpoint.config_path
        self.of_head = checkpoint.config
        backbone = self.of_head.get("backbone_config")
        self.of_backbone: dict[str, Any] = backbone if isinstance(backbone, dict) else {}
        kind = self.of_backbone.get("model_type", "dinov3_vit")
        if kind != "dinov3_vit":
            raise ContractError(
                f"{self.path}: backbone_config is of a {kind!r} and not of a dinov3_vit; {_PUBLISHED['chmv2'].remedy}"
            )
        for table, only in ((self.of_backbone, self.ONLY_BACKBONE), (self.of_head, self.ONLY_HEAD)):
            for key, value in only.items():
                if table.get(key, value) != value:
                    raise ContractError(f"{self.path}: {key} = {table[key]!r} cannot be imported; CHMv2 has {value!r}")

    def backbone(self, key: str, default: float) -> float:
        """A number of backbone_config. `default` is that of a checkpoint without any backbone_config."""
        if self.of_backbone and key not in self.of_backbone:
            if key == "layer_norm_eps":
                return 1e-5  # of the backbone's own class, not of CHMv2's
            raise ContractError(f"{self.path}: backbone_config.{key} is missing; download it again")
        return self._positive(self.of_backbone.get(key, default), key)

    def head(self, key: str, default: float) -> float:
        """A number of the checkpoint itself."""
        return self._positive(self.of_head.get(key, default), key)

    def _positive(self, value: Any, key: str) -> float:
        if isinstance(value, bool) or not isinstance(value, int | float) or not value > 0:
            raise ContractError(f"{self.path}: {key} = {value!r} is not a positive number; download it again")
        return float(value)

    def taps(self, depth: int) -> tuple[int, ...]:
        """From 0; theirs count the embedding as stage 0."""
        stages = self.of_backbone.get("out_indices")
        if stages is None and (names := self.of_backbone.get("out_features")):
            stages = [int(re.sub(r"\D", "", str(name)) or 0) for name in names]
        if stages is None:
            stages = [6, 12, 18, 24]
        if not isinstance(stages, list) or len(stages) != 4 or not all(stage in range(1, depth + 1) for stage in stages):
            raise ContractError(f"{self.path}: out_indices = {stages!r} are not four of {depth} blocks; download it again")
        return tuple(stage - 1 for stage in stages)

    def rope_theta(self) -> float:
        nested = self.of_backbone.get("rope_parameters")
        value = nested.get("rope_theta", 100.0) if isinstance(nested, dict) else self.of_backbone.get("rope_theta", 100.0)
        return self._positive(value, "rope_theta")

    def heights(self) -> tuple[str, str]:
        """(spacing of the bins, how logits become probabilities)."""
        pair = (self.of_head.get("bins_strategy", "chmv2_mixlog"), self.of_head.get("norm_strategy", "chmv2_mixlog"))
        possible = {
            ("chmv2_mixlog", "chmv2_mixlog"): ("mixlog", "mixlog"),
            ("linear", "linear"): ("linear", "linear"),
            ("linear", "softmax"): ("linear", "softmax"),
        }
        if pair not in possible:
            raise ContractError(
                f"{self.path}: bins_strategy {pair[0]!r} with norm_strategy {pair[1]!r} cannot be imported; "
                f"CHMv2 has chmv2_mixlog for both"
            )
        return possible[pair]


def _hugging_face_backbone(checkpoint: _Checkpoint, config: NetworkConfig, width: int, *, key_bias: bool) -> Iterator[_Rule]:
    body = "backbone.body"
    yield _Rule(theirs=("backbone.embeddings.cls_token",), ours=(f"{body}.cls_token",))
    if config.backbone_options["num_reg_tokens"]:
        yield _Rule(theirs=("backbone.embeddings.register_tokens",), ours=(f"{body}.reg_token",))
    yield from _same(f"{body}.patch_embed.proj", "backbone.embeddings.patch_embeddings")
    yield from _same(f"{body}.norm", "backbone.norm")
    assert config.taps is not None, "imported networks name their taps"
    linear = (("attn.proj", "attention.o_proj"), ("norm1", "norm1"), ("norm2", "norm2"), ("mlp.fc1", "mlp.up_proj"))
    for i in range(config.taps[-1] + 1):
        ours, theirs = f"{body}.blocks.{i}", f"backbone.layer.{i}"
        for a, b in (*linear, ("mlp.fc2", "mlp.down_proj")):
            yield from _same(f"{ours}.{a}", f"{theirs}.{b}")
        for branch in (1, 2):
            yield _Rule(theirs=(f"{theirs}.layer_scale{branch}.lambda1",), ours=(f"{ours}.gamma_{branch}",))
        q, k, v = (f"{theirs}.attention.{each}_proj" for each in "qkv")
        yield _Rule(
            theirs=(f"{q}.weight", f"{k}.weight", f"{v}.weight"),
            ours=(f"{ours}.attn.qkv.weight",),
            shapes=((width, width),) * 3,
            make=lambda tensors: [torch.cat(tensors)],
        )
        if key_bias:
            yield _Rule(
                theirs=(f"{q}.bias", f"{k}.bias", f"{v}.bias"),
                ours=(f"{ours}.attn.qkv.bias",),
                shapes=((width,),) * 3,
                make=lambda tensors: [torch.cat(tensors)],
            )
            continue
        zero = (f"{k}.bias",) if f"{k}.bias" in checkpoint.tensors else ()
        yield _Rule(
            theirs=(f"{q}.bias", f"{v}.bias", *zero),
            ours=(f"{ours}.attn.q_bias", f"{ours}.attn.v_bias"),
            shapes=((width,),) * (2 + len(zero)),
            make=lambda tensors: tensors[:2],
        )


def _hugging_face_head(width: int) -> Iterator[_Rule]:
    stage = "head.reassemble_stage"
    for level in range(4):
        yield from _same(f"reassemble.project.{level}", f"{stage}.layers.{level}.projection")
        yield from _readout(f"reassemble.readout.{level}", f"{stage}.readout_projects.{level}.0", width)
        yield from _same(f"decoder.conv.{level}", f"head.convs.{level}", "weight")
        yield from _same(f"decoder.fusion.{level}.project", f"head.fusion_layers.{level}.projection")
        for unit, conv in itertools.product((2,) if level == 0 else (1, 2), (1, 2)):
            theirs = f"head.fusion_layers.{level}.residual_layer{unit}.convolution{conv}"
            yield from _same(f"decoder.fusion.{level}.unit{unit}.conv{conv}", theirs)
    for level in (0, 1, 3):
        yield from _same(f"reassemble.resize.{level}", f"{stage}.layers.{level}.resize")
    for ours, place in ((1, 0), (2, 2), (3, 4)):
        yield from _same(f"head.conv{ours}", f"head.conv_depth.head.{place}")


# --- CHMv1 ---------------------------------------------------------------------------------------------------------------

_CHMV1_TAPS = {24: (4, 11, 17, 23), 32: (9, 16, 22, 29)}
_CHMV1_HEADS = {1024: 16, 1280: 20}


def _chmv1(checkpoint: _Checkpoint) -> _Layout:
    """HighResCanopyHeight: a ViT with learned positions whose taps are not normalised, and linear bins up to 100 m."""
    conv = "decode_head.convs.{}.conv.weight"
    sizes = _head_sizes(checkpoint, conv, "decode_head.conv_depth.head.{}.weight")
    bins = sizes.pop("bin_count")
    width = checkpoint.shape("backbone.cls_token")[-1]
    depth = checkpoint.count("backbone.blocks.{}.")
    positions = checkpoint.shape("backbone.pos_embed")[1] - 1
    side = math.isqrt(max(positions, 0))
    if side * side != positions or not side:
        raise ContractError(
            f"{checkpoint.main}: backbone.pos_embed has {positions} patch positions, which make no square; "
            f"{_PUBLISHED['chmv1'].remedy}"
        )
    options: dict[str, Any] = {
        "embed_dim": width, "depth": depth, "init_values": 1.0,
        "num_heads": _heads(checkpoint, width, _CHMV1_HEADS.get(width)),
    }  # fmt: skip
    if side * PATCH_PX != 224:
        options["img_size"] = side * PATCH_PX
    mlp = checkpoint.shape("backbone.blocks.0.mlp.fc1.weight")[0]
    if mlp != 4 * width:
        options["mlp_ratio"] = mlp / width
    config = _config(
        checkpoint,
        backbone="vit_large_patch16_224",
        backbone_options=options,
        taps=_taps(checkpoint, depth, _CHMV1_TAPS),
        tap_norm=False,
        norm_eps=1e-6,
        position_resize="corners",
        residual_bias=False,
        projection_after_fusion=True,
        bins={"count": bins, "min_m": 0.01, "max_m": 100.0, "spacing": "linear"},
        normalisation="linear",
        **sizes,
    )
    assert config.taps is not None, "imported networks name their taps"
    body = "backbone.body"
    rules = [
        _Rule(theirs=("backbone.cls_token",), ours=(f"{body}.cls_token",)),
        _Rule(theirs=("backbone.pos_embed",), ours=(f"{body}.pos_embed",)),
        *_same(f"{body}.patch_embed.proj", "backbone.patch_embed.proj"),
    ]
    for i in range(config.taps[-1] + 1):
        for part in ("norm1", "attn.qkv", "attn.proj", "norm2", "mlp.fc1", "mlp.fc2"):
            rules += _same(f"{body}.blocks.{i}.{part}", f"backbone.blocks.{i}.{part}")
        for branch in (1, 2):
            rules += _same(f"{body}.blocks.{i}.ls{branch}", f"backbone.blocks.{i}.ls{branch}", "gamma")
    return _Layout(
        config=config,
        rules=[*rules, *_head_rules(config, width, "decode_head.")],
        unused=("backbone.mask_token", "backbone.norm.", *_untapped(config, depth, "backbone.blocks.{}.")),
    )


_LAYOUTS: dict[str, Callable[[_Checkpoint], _Layout]] = {
    "chmv2": _chmv2,
    "hugging face": _chmv2_hugging_face,
    "chmv1": _chmv1,
}

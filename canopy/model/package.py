"""A model is a folder: its contract, its weights, its card, and a fixture that proves it computes what it computed.

    model.toml            `Contract`: what the model is, what imagery it takes, what it was trained on, how wrong it is
    weights.safetensors   the network's parameters and buffers
    card.md               the same for people
    fixture.safetensors   `image` in the contract's units, and the `mean_m` and `spread_m` that must come out
    shift.safetensors     where the calibration data are described: what they look like (see `canopy.model.shift`)

Loading is strict: a folder that is not exactly that is refused with one line that names the file and the remedy.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import math
import shutil
import threading
import tomllib
import uuid
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, Self, cast, get_args

import numpy as np
import tomli_w
import torch
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, JsonValue, field_validator, model_validator
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch._dynamo.exc import TorchDynamoException

import canopy
from canopy.errors import CanopyError, ContractError, DeviceMemoryError, OutputError
from canopy.grid import Layout
from canopy.model.blocks import BlockTable
from canopy.model.calibration import CalibrationTable
from canopy.model.distribution import HeightDistribution
from canopy.model.network import HeightNetwork, NetworkConfig, weights_to_come
from canopy.model.shift import FILE as SHIFT
from canopy.model.shift import ShiftReference, load_shift, save_shift
from canopy.settings import read_settings
from canopy.textfile import write_text

CONTRACT, WEIGHTS, CARD, FIXTURE = FILES = ("model.toml", "weights.safetensors", "card.md", "fixture.safetensors")

FIXTURE_TOLERANCE_M = 0.01
"""How far mean and spread of the fixture may be from the recorded ones.

Why 1 cm: another processor or another release of torch rounds differently, which moves heights by well under 1 mm in
float32; a wrong, missing or misplaced weight moves them by decimetres. 1 cm is a third of the 1/32 m that maps are
rounded to.
"""

Precision = Literal["float32", "float16", "bfloat16"]
"""What a network computes in; its heights and spreads are summed in float32 either way.

Why float32 is the default on every device: a map is then the same whatever made it, to the last millimetres. Why the others
are for GPUs only: rounding may cost 0.05 m. On a CPU with matrix units for bfloat16 a forward pass takes 0.36 to 0.76 of the
time in it and moves heights by up to 0.9 m (a hundredth of the pixels by more than 0.17 m), float16 saves nothing, and 8-bit
linear layers save a third at most and move heights by 1 m. Measured by `tests/bench/bench_network.py`.
"""

PRECISION_TOLERANCE_M: dict[Precision, float] = {"float32": FIXTURE_TOLERANCE_M, "float16": 0.05, "bfloat16": 0.4}
"""How far the fixture may be off in each precision before the model is refused in it.

float16 keeps 11 binary digits, which costs centimetres of height; bfloat16 keeps 8, so eight times that. What this finds is
the model whose values do not fit: float16 ends at 65504, and beyond it heights are NaN.
"""

WRAPPERS = frozenset({"module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"})
"""What distributed training, checkpointing and torch.compile put before, or into, the names of a network's tensors."""

_FROZEN = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class Training(BaseModel):
    """What the model was trained on, for audits: a scene inside it says nothing about the model's skill."""

    model_config = _FROZEN

    sites: tuple[str, ...]
    """Names of the acquisition areas."""
    tile_sets: dict[str, str]
    """Name of each tile set -> SHA-256 of its index."""
    recipe_sha256: str
    """SHA-256 of the resolved training recipe."""
    footprints_deg: tuple[tuple[float, float, float, float], ...]
    """Bounding boxes (west, south, east, north) in longitude and latitude, WGS 84."""

    @field_validator("footprints_deg")
    @classmethod
    def _on_earth(
        cls, boxes: tuple[tuple[float, float, float, float], ...]
    ) -> tuple[tuple[float, float, float, float], ...]:
        for west, south, east, north in boxes:
            if not (-180 <= west <= east <= 180 and -90 <= south <= north <= 90):
                raise ValueError(f"({west}, {south}, {east}, {north}) is not (west, south, east, north) in degrees")
        return boxes


class Contract(BaseModel):
    """What a model is and what imagery it may be given; stored as `model.toml`."""

    model_config = _FROZEN

    format: Literal[1] = 1
    """Version of this file's layout."""
    name: str = Field(min_length=1)
    version: str = Field(min_length=1)
    description: str
    licence: str = Field(min_length=1)
    """SPDX identifier or name of the licence of the weights."""
    network: NetworkConfig
    bands: tuple[str, ...] = Field(min_length=1)
    """Names of the image's bands in order, for example red, green, blue."""
    gsd_range_m: tuple[float, float]
    """Smallest and largest ground sampling distance, metres per pixel."""
    dtype: Literal["uint8", "uint16", "float32"]
    """Data type of the imagery."""
    value_range: tuple[float, float]
    """Smallest and largest value a usable pixel may have."""
    mean: tuple[float, ...]
    """Per band, in the imagery's units: subtracted before the network."""
    std: tuple[float, ...]
    """Per band, in the imagery's units: divided by after that."""
    fill: Literal["mean", "mirror"] = "mean"
    """What the network sees where there is no usable imagery: the mean colour, or the imagery's mirror image."""
    window_px: int
    """Side of the windows the model was trained on and maps with; a multiple of 32."""
    stride_px: int
    """Distance between windows when mapping."""
    training: Training
    metrics: dict[str, JsonValue] = {}
    """Scores as nested tables of numbers."""
    calibration: CalibrationTable | None = None
    """None: the model's spread has not been calibrated, and its maps say so."""
    blocks: BlockTable | None = None
    """How wrong means over ground are; None: not known."""
    weights_dtype: Literal["float32", "float16"] = "float32"
    """How the weights are stored; they are computed with in float32 either way."""
    weights_sha256: str = Field(default="", pattern="^([0-9a-f]{64})?$")
    """SHA-256 of the weight file; filled in by `save_model`."""
    shift_sha256: str | None = Field(default=None, pattern="^[0-9a-f]{64}$")
    """SHA-256 of the description of the calibration data; None: there is none, and maps say that shift was not measured."""
    canopy_version: str = ""
    """Version of canopy that wrote the folder; filled in by `save_model`."""

    @field_validator("metrics")
    @classmethod
    def _numbers(cls, table: dict[str, JsonValue]) -> dict[str, JsonValue]:
        for key, value in table.items():
            if isinstance(value, dict):
                cls._numbers(value)
            elif isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
                raise ValueError(f"{key} = {value!r} is not a finite number")
        return table

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        try:
            Layout(window_px=self.window_px, stride_px=self.stride_px)
        except CanopyError as error:
            raise ValueError(str(error)) from error
        for name in ("mean", "std"):
            if len(getattr(self, name)) != len(self.bands):
                raise ValueError(f"{name} has {len(getattr(self, name))} entries for {len(self.bands)} bands")
        if min(self.std) <= 0:
            raise ValueError(f"std {self.std} has an entry that is not positive")
        if self.network.in_channels != len(self.bands):
            raise ValueError(f"network.in_channels is {self.network.in_channels} for {len(self.bands)} bands")
        for name in ("gsd_range_m", "value_range"):
            low, high = getattr(self, name)
            if low >= high:
                raise ValueError(f"{name} ({low}, {high}) does not ascend")
        if self.gsd_range_m[0] <= 0:
            raise ValueError(f"gsd_range_m {self.gsd_range_m} is not positive")
        return self

    def check_imagery(self, *, band_count: int, dtype: str, gsd_m: float) -> None:
        """Refuses imagery that the model was not made for.

        Args:
            band_count: number of bands that would be given to the model.
            dtype: numpy name of their data type.
            gsd_m: ground sampling distance in metres per pixel, after any resampling.

        Raises:
            ContractError: with the value, the contract's limit and what to do.
        """
        if band_count != len(self.bands):
            raise ContractError(
                f"imagery has {band_count} bands, but {self.name} takes {len(self.bands)} ({', '.join(self.bands)}); "
                f"choose them in this order with --bands"
            )
        if dtype != self.dtype:
            low, high = self.value_range
            raise ContractError(
                f"imagery is {dtype}, but {self.name} takes {self.dtype} from {low:g} to {high:g}; "
                f"rescale it as the model's training imagery was, or choose another model"
            )
        low, high = self.gsd_range_m
        # A GSD taken from a file's transform carries the rounding of its CRS; one part in a million is no difference.
        if not low * (1 - 1e-6) <= gsd_m <= high * (1 + 1e-6):
            raise ContractError(
                f"GSD {gsd_m:g} m is outside the {low:g} to {high:g} m of {self.name}; "
                f"resample with --gsd {min(max(gsd_m, low), high):g}, or choose another model"
            )


@dataclass(frozen=True, eq=False, kw_only=True)
class HeightModel:
    """A network with its contract: images in the contract's units in, metres out."""

    contract: Contract
    network: HeightNetwork
    """In evaluation mode, on `device`."""
    device: torch.device
    precision: Precision = "float32"
    """What the network's parameters and activations are."""
    shift: ShiftReference | None = None
    """What the calibration data look like; None: not known."""
    compiled: _Compiled | None = None
    """What runs instead of `network`; None: the network itself does."""

    def predict(
        self, image_bchw: Tensor | NDArray[Any], valid_bhw: Tensor | NDArray[np.bool_] | None = None
    ) -> HeightDistribution:
        """Height distribution of every pixel.

        Normalisation happens on the device, so only the image's own bytes travel there. Unusable pixels are filled with
        the normalisation mean; the heights there are the network's guess and must be masked by the caller. The network
        computes in the model's `precision` whatever autocast or TF32 is switched on around the call, the distribution in
        float32.

        On a CPU the result for an image does not depend on its position in the batch or on the other images, bit for
        bit, as long as the shape of the batch stays the same: kernels are chosen by shape.

        Args:
            image_bchw: (batch, band, row, col) uint8, uint16 or float in the contract's units; sides multiples of 32 px.
            valid_bhw: (batch, row, col) bool, True = usable; None: all are.

        Raises:
            ContractError: wrong number of bands, a side that is not a multiple of 32 px, or a usable pixel that is NaN
                or outside the contract's value range.
            DeviceMemoryError: the device has not enough memory.
            CanopyError: the network cannot be compiled.
        """
        return self.heights(self.prepare(image_bchw, valid_bhw))

    def prepare(self, image_bchw: Tensor | NDArray[Any], valid_bhw: Tensor | NDArray[np.bool_] | None = None) -> Tensor:
        """What the network is given for an image: the first half of `predict`, float32 on the device, filled and normalised.

        Arguments and errors as for `predict`. An image in pinned memory is read after this has returned.
        """
        image = torch.as_tensor(image_bchw)
        assert image.ndim == 4, f"image has {image.ndim} axes, (batch, band, row, col) expected"
        if image.shape[1] != len(self.contract.bands):
            raise ContractError(
                f"image has {image.shape[1]} bands, but {self.contract.name} takes {len(self.contract.bands)} "
                f"({', '.join(self.contract.bands)}); choose them in this order"
            )
        valid = None if valid_bhw is None else torch.as_tensor(valid_bhw)
        assert valid is None or (valid.dtype == torch.bool and valid.shape == (image.shape[0], *image.shape[2:])), (
            f"valid must be bool (batch, row, col) of an image {tuple(image.shape)}"
        )
        with torch.inference_mode(), self._within_memory(image):
            self._check_values(image, valid)
            return normalise(_sent(image, self.device), valid, self.contract)

    def heights(self, x_bchw: Tensor) -> HeightDistribution:
        """Height distribution of what `prepare` made: the second half of `predict`.

        Raises:
            DeviceMemoryError: the device has not enough memory.
            CanopyError: the network cannot be compiled.
        """
        run = self.network if self.compiled is None else self.compiled
        with torch.inference_mode(), _exact(self.device), self._within_memory(x_bchw):
            logits_bnhw = run(x_bchw.to(getattr(torch, self.precision)))
            heights = HeightDistribution.from_logits(
                logits_bnhw, self.network.config.bins, self.network.config.normalisation
            )
            _ = heights.mean_m  # now, where a lack of memory is told
        return heights

    @contextlib.contextmanager
    def _within_memory(self, image_bchw: Tensor) -> Iterator[None]:
        count, _, rows, cols = image_bchw.shape
        try:
            yield
        except RuntimeError as error:
            if not _lacks_memory(error):
                raise
            if count > 1:
                remedy = f"take fewer at once (--batch {count // 2})"
            elif self.device.type == "cpu":
                remedy = "close other programs, or choose a smaller model"
            else:
                remedy = "run with --precision float16 or --device cpu, or choose a smaller model"
            raise DeviceMemoryError(
                f"{self.device} has not enough memory for {count} window{'s' * (count > 1)} of {rows} x {cols} px "
                f"through {self.contract.name} in {self.precision}; {remedy}"
            ) from error

    def _check_values(self, image_bchw: Tensor, valid_bhw: Tensor | None) -> None:
        low, high = self.contract.value_range
        if not image_bchw.is_floating_point():
            limits = torch.iinfo(image_bchw.dtype)
            if low <= limits.min and limits.max <= high:
                return
        # float32 holds every uint16; comparison operators are not implemented for uint16 itself
        values = image_bchw.float()
        bad = ~((values >= low) & (values <= high))  # NaN is bad too
        if valid_bhw is not None:
            bad &= valid_bhw[:, None]
        if bad.any():
            raise ContractError(
                f"a usable pixel has the value {values[bad][0].item():g}, outside the {low:g} to {high:g} of "
                f"{self.contract.name}; rescale the imagery as the model's training imagery was, or mask the pixel"
            )


@dataclass(slots=True, eq=False)
class _Compiled:
    """A network that torch compiles for each shape it meets, checked on the first image of that shape.

    Why checked: a compiler is another program that computes the same, and nothing else would notice if it does not.
    """

    network: HeightNetwork
    tolerance_m: float
    run: Any = field(init=False)
    checked: set[torch.Size] = field(init=False, default_factory=set)

    def __post_init__(self) -> None:
        self.run = torch.compile(self.network, dynamic=False)  # a fixed shape: that of the model's windows

    def __call__(self, x_bchw: Tensor) -> Tensor:
        """Logits of `x_bchw`."""
        try:
            logits_bnhw: Tensor = self.run(x_bchw)
        except TorchDynamoException as error:
            reason = str(getattr(error, "inner_exception", error)).strip().splitlines()[0]
            raise CanopyError(f"the network cannot be compiled here ({reason}); run without --compile") from error
        if x_bchw.shape not in self.checked:
            self._check(x_bchw, logits_bnhw)
            self.checked.add(x_bchw.shape)
        return logits_bnhw

    def _check(self, x_bchw: Tensor, logits_bnhw: Tensor) -> None:
        config = self.network.config
        ours, plain = (
            HeightDistribution.from_logits(logits, config.bins, config.normalisation)
            for logits in (logits_bnhw, self.network(x_bchw))
        )
        # NaN where both are NaN is no difference: the image may hold a pixel that no precision can tell the height of.
        off_m = (ours.mean_m - plain.mean_m).nan_to_num(0.0).abs().max().item()
        if not off_m <= self.tolerance_m or not torch.equal(ours.mean_m.isnan(), plain.mean_m.isnan()):
            raise CanopyError(
                f"the compiled network is up to {off_m:.3g} m off the plain one, more than {self.tolerance_m} m; "
                f"run without --compile, or update torch"
            )


class _Float32:
    """Products in full float32 and the same convolution algorithm each time, while anybody predicts.

    Torch's settings are the process's, and predictions may run side by side: who comes first sets them, who leaves last puts
    them back as they were. Other libraries lower them when they are imported; on a CPU with matrix units for bfloat16 that
    moves heights by 8 cm.
    """

    def __init__(self) -> None:
        self._lock, self._inside, self._before = threading.Lock(), 0, contextlib.ExitStack()

    def __enter__(self) -> None:
        with self._lock:
            if self._inside == 0:
                self._before.enter_context(
                    torch.backends.cudnn.flags(enabled=True, deterministic=True, allow_tf32=False, fp32_precision="ieee")
                )
                mkldnn: Any = torch.backends.mkldnn  # torch does not type what it holds
                kinds = (torch.backends.cuda.matmul, mkldnn.matmul, mkldnn.conv)
                for kind in kinds:
                    self._before.callback(setattr, kind, "fp32_precision", kind.fp32_precision)
                    kind.fp32_precision = "ieee"
            self._inside += 1

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._inside -= 1
            if self._inside == 0:
                self._before.close()


_FLOAT32 = _Float32()


@contextlib.contextmanager
def _exact(device: torch.device) -> Iterator[None]:
    """No autocast, no reduced precision in products: what decides the numbers is the model alone."""
    with _FLOAT32, torch.autocast(device.type, enabled=False):
        yield


@functools.cache
def _copies(device: torch.device) -> Any:
    """The stream of a CUDA device in which images travel to it."""
    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]


def _sent(image: Tensor, device: torch.device) -> Tensor:
    """The image on the device; from pinned memory it travels while the device computes what it was given before."""
    if device.type != "cuda" or image.device.type != "cpu" or not image.is_pinned():
        return image.to(device)
    copies, compute = _copies(device), torch.cuda.current_stream(device)
    with torch.cuda.stream(copies):
        there = image.to(device, non_blocking=True)
    compute.wait_stream(copies)
    there.record_stream(compute)  # or its memory could be given to the next image while it is still read
    return there


def _lacks_memory(error: RuntimeError) -> bool:
    # A CPU allocator has no class for it.
    return (
        isinstance(error, torch.OutOfMemoryError)
        or "can't allocate memory" in str(error)
        or "not enough memory" in str(error)
    )


def normalise(image_bchw: Tensor, valid_bhw: Tensor | None, contract: Contract) -> Tensor:
    """(image - mean) / std per band in float32, the contract's fill where not usable; training uses this function too.

    The validity may be on another device than the image: the mirror image is found on the CPU.
    """
    # Without `non_blocking` a GPU finishes everything it has been given before it takes these few numbers.
    mean, std = (
        torch.tensor(values)[:, None, None].to(image_bchw.device, non_blocking=True)
        for values in (contract.mean, contract.std)
    )
    x_bchw = (image_bchw.float() - mean) / std
    if valid_bhw is None:
        return x_bchw
    x_bchw = x_bchw.masked_fill(~valid_bhw.to(image_bchw.device, non_blocking=True)[:, None], 0.0)
    return mirrored(x_bchw, valid_bhw) if contract.fill == "mirror" else x_bchw


def mirrored(x_bchw: Tensor, valid_bhw: Tensor) -> Tensor:
    """The images with every pixel that is not valid taken from its mirror image in the edge of the valid ones.

    An image without a valid pixel stays as it is.

    Why: a margin of one colour tells a network how large the imagery is. Where small plots come from one site and large
    ones from another it learns heights from that, and a norm over the whole image mixes the margin into every pixel.
    """
    out_bchw = x_bchw
    for number, valid in enumerate(valid_bhw.cpu().numpy()):
        if valid.all() or not valid.any():
            continue
        row, col = (torch.from_numpy(a).to(x_bchw.device) for a in _mirror(valid))
        if out_bchw is x_bchw:
            out_bchw = x_bchw.clone()
        out_bchw[number] = x_bchw[number][:, row, col]
    return out_bchw


def _mirror(valid: NDArray[np.bool_]) -> NDArray[np.int64]:
    """Row and column (2, row, col) of the valid pixel that each pixel is taken from; its own where it is valid.

    With n the valid pixel nearest to p, p is what 2n - p is. Where that is not valid either, the image so filled is
    mirrored in its own edge, and so on: a plot is repeated as far as the image goes. Next to what is but a pixel wide
    nothing can be mirrored, and n stands in.
    """
    from scipy.ndimage import distance_transform_edt

    here: NDArray[np.int64] = np.indices(valid.shape)
    source, known = here.copy(), valid.copy()
    while not known.all():
        nearest = distance_transform_edt(~known, return_distances=False, return_indices=True)
        rows, cols = across = 2 * nearest - here
        height, width = valid.shape
        new = ~known & (rows >= 0) & (rows < height) & (cols >= 0) & (cols < width)
        new[new] = known[rows[new], cols[new]]
        if not new.any():
            new, across = ~known, nearest
        source[:, new] = source[:, across[0][new], across[1][new]]
        known |= new
    return source


# --- writing -------------------------------------------------------------------------------------------------------------


def save_model(
    folder: Path | str,
    *,
    network: HeightNetwork,
    contract: Contract,
    card: str,
    fixture_image: Tensor | NDArray[Any],
    beside: Mapping[str, str] | None = None,
    shift: ShiftReference | None = None,
    overwrite: bool = False,
) -> Path:
    """Writes a model folder and returns its path.

    Everything is written and read back beside the folder first, so a full disk or a model that cannot be loaded leaves
    nothing under the final name. With `overwrite` only the files that are written are replaced, `model.toml` last: a
    folder caught in between is refused by `load_model`, and other files (logs) stay.

    Args:
        folder: where; must not exist unless `overwrite`.
        network: the trained network; its config must be the contract's.
        contract: its `weights_sha256` and `canopy_version` are filled in.
        card: text of card.md.
        fixture_image: (band, row, col) in the contract's units, sides multiples of 32 px; 64 px of real imagery do.
        beside: texts of further files by their names.
        shift: what the calibration data look like; its digest is filled into the contract.
        overwrite: replace the model that is in `folder`.

    Raises:
        OutputError: the folder exists, or cannot be written.
        ContractError: the network is not the contract's, or the fixture image is not what the contract says.
    """
    folder = Path(folder)
    if contract.network != network.config:
        raise ContractError(f"contract of {contract.name} describes another network; set its network to network.config")
    image = torch.as_tensor(fixture_image)
    if str(image.dtype).removeprefix("torch.") != contract.dtype:
        raise ContractError(f"fixture image is {image.dtype}, but {contract.name} takes {contract.dtype}; convert it")
    if folder.exists() and not overwrite:
        raise OutputError(f"{folder} exists; choose another folder, or overwrite it")
    if folder.exists() and not folder.is_dir():
        raise OutputError(f"{folder} is a file; choose another folder")
    if folder.exists() and any(folder.iterdir()) and not (folder / CONTRACT).is_file():
        raise OutputError(f"{folder} is not a model folder (no {CONTRACT}); choose another folder")
    with _staged(folder) as stage:
        storage = torch.float16 if contract.weights_dtype == "float16" else torch.float32
        state = {key: _stored(value, storage) for key, value in network.state_dict().items()}
        _check_finite(
            folder / WEIGHTS,
            state,
            f"training diverged, or {contract.weights_dtype} does not hold them; nothing was written",
        )
        save_file(state, stage / WEIGHTS)
        contract = contract.model_copy(
            update={
                "weights_sha256": file_sha256(stage / WEIGHTS), "canopy_version": canopy.__version__,
                "shift_sha256": None if shift is None else file_sha256(save_shift(stage, shift)),
            }
        )  # fmt: skip
        (stage / CONTRACT).write_text(tomli_w.dumps(contract.model_dump(exclude_none=True)), encoding="utf-8")
        for name, text in {CARD: card, **(beside or {})}.items():
            (stage / name).write_text(text, encoding="utf-8")
        # From the stored weights, not from `network`: half-precision storage rounds them.
        model = _load_unchecked(stage, torch.device("cpu"))
        heights = model.predict(image[None])
        expected = {"mean_m": heights.mean_m.clone(), "spread_m": heights.spread_m.clone()}
        save_file({"image": image[None].contiguous(), **expected}, stage / FIXTURE)
        load_model(stage)
        for name in (WEIGHTS, FIXTURE):  # safetensors makes files that only their owner may read
            (stage / name).chmod((stage / CARD).stat().st_mode)
    return folder


def update_contract(folder: Path, contract: Contract, **changes: Any) -> Contract:
    """The contract of a model folder with some fields changed, checked and written, whole or not at all.

    Raises:
        OutputError: it cannot be written.
    """
    # Through the validator: `model_copy` trusts what it is given.
    changed = Contract.model_validate(contract.model_copy(update=changes).model_dump())
    write_text(folder / CONTRACT, tomli_w.dumps(changed.model_dump(exclude_none=True)))
    return changed


def _stored(value: Tensor, storage: torch.dtype) -> Tensor:
    value = value.detach().cpu()
    return (value.to(storage) if value.is_floating_point() else value).contiguous().clone()


@contextlib.contextmanager
def _staged(folder: Path) -> Iterator[Path]:
    """A fresh folder beside `folder` whose files take their final place when the block ends without an error."""
    stage = folder.parent / f".{folder.name}.{uuid.uuid4().hex[:8]}.partial"
    try:
        stage.mkdir(parents=True)
        yield stage
        if folder.exists():
            for name in (CONTRACT, SHIFT):  # what describes the model that was there, whether or not it has a successor
                (folder / name).unlink(missing_ok=True)
            for path in sorted(stage.iterdir(), key=lambda path: path.name == CONTRACT):
                path.replace(folder / path.name)
        else:
            stage.rename(folder)
    except (OSError, SafetensorError) as error:
        raise OutputError(
            f"model folder {folder} could not be written ({error}); free space or choose another folder"
        ) from error
    finally:
        shutil.rmtree(stage, ignore_errors=True)


# --- reading -------------------------------------------------------------------------------------------------------------


def shelves() -> tuple[Path, Path]:
    """Where models are looked for by name: ./models, then the models folder of the source checkout."""
    return Path("models"), Path(canopy.__file__).parents[1] / "models"


def known_models() -> list[Path]:
    """Folders of the models in ./models and in the models folder of the source checkout, each once, by name."""
    found = {file.parent.resolve(): file.parent for shelf in shelves() for file in shelf.glob(f"*/{CONTRACT}")}
    return sorted(found.values(), key=lambda folder: folder.name)


def find_model(name_or_path: Path | str) -> Path:
    """The folder of a model given by path, or by name in ./models or in the models folder of the source checkout.

    Raises:
        ContractError: there is no such model; the message lists the ones there are.
    """
    for candidate in [Path(name_or_path), *(shelf / name_or_path for shelf in shelves())]:
        if (candidate / CONTRACT).is_file():
            return candidate
    raise ContractError(
        f"no model {str(name_or_path)!r}: neither a folder with a {CONTRACT} nor one of the known models "
        f"({', '.join(folder.name for folder in known_models()) or 'none'}); give the path of a model folder"
    )


def read_contract(folder: Path | str) -> Contract:
    """The contract of a model folder, without reading its weights.

    Raises:
        ContractError: no such folder, no `model.toml`, not TOML, an unknown or missing key, a wrong value.
    """
    folder = Path(folder)
    path = folder / CONTRACT
    if not folder.is_dir():
        raise ContractError(f"model folder {folder} does not exist; `canopy models list` shows the models there are")
    _require(path)
    contract = read_settings(path, Contract, what="a model's contract", error=ContractError)
    raw = tomllib.loads(path.read_text(encoding="utf-8"))
    # A default that stands in for a forgotten key would change what the network computes without a word.
    forgotten = sorted(_keys(contract.model_dump(exclude_none=True)) - _keys(raw))
    if forgotten:
        raise ContractError(f"{path}: {forgotten[0]} is missing; correct it or restore the file")
    return contract


def load_model(
    folder: Path | str,
    device: torch.device | str = "cpu",
    *,
    precision: str = "float32",
    compile: bool = False,  # noqa: A002 - torch's word for it
) -> HeightModel:
    """A model ready to predict, after checking that the folder is complete, unaltered, and computes its fixture.

    Args:
        folder: the model's folder.
        device: where it will run.
        precision: what the network computes in, a `Precision`. float32 on every device; float16 and bfloat16 on GPUs,
            where float16 is as fast and eight times finer. The fixture has to come out in it too.
        compile: have torch compile the network for the shape of the images: minutes once, then a few to 25 % less time on
            a CPU. For many windows of one size.

    Raises:
        ContractError: anything in the folder is missing, altered or inconsistent, or the model does not work in this
            precision on this device; one line with the file and the remedy.
        CanopyError: the device has not enough memory.
    """
    folder, device = Path(folder), torch.device(device)
    chosen = _usable_precision(precision, device)
    model = _load_unchecked(folder, device)
    _check_fixture(folder / FIXTURE, model)
    if chosen != "float32":
        model = _converted(model, chosen)
        _check_fixture(folder / FIXTURE, model)
    if not compile:
        return model
    return replace(model, compiled=_Compiled(network=model.network, tolerance_m=PRECISION_TOLERANCE_M[chosen]))


def _usable_precision(precision: str, device: torch.device) -> Precision:
    """`precision`, after refusing what is unknown or does not fit the device."""
    if precision not in get_args(Precision):
        raise ContractError(f"precision {precision!r} is unknown; choose {', '.join(get_args(Precision))}")
    if device.type == "cpu" and precision != "float32":
        raise ContractError(
            f"precision {precision} is for GPUs: on a CPU heights would move by more than 0.05 m or nothing be saved; "
            f"choose float32, or another device"
        )
    if device.type == "cuda" and precision == "bfloat16" and not torch.cuda.is_bf16_supported(including_emulation=False):
        raise ContractError(f"{torch.cuda.get_device_name(device)} does not compute in bfloat16; choose float16 or float32")
    return cast("Precision", precision)


def _converted(model: HeightModel, precision: Precision) -> HeightModel:
    """The model with parameters in `precision`, for half the memory; autocast would convert them in every call.

    The network itself is changed.
    """
    network = model.network.to(getattr(torch, precision))
    return replace(model, network=network, precision=precision)


def _load_unchecked(folder: Path, device: torch.device) -> HeightModel:
    contract = read_contract(folder)
    path = folder / WEIGHTS
    _require(path)
    digest = file_sha256(path)
    if digest != contract.weights_sha256:
        raise ContractError(
            f"{path} has SHA-256 {digest[:12]}…, but {CONTRACT} says {contract.weights_sha256[:12] or 'nothing'}…: "
            f"the file was altered or cut short; fetch the model again"
        )
    try:
        with weights_to_come():
            network = HeightNetwork(contract.network)
    except CanopyError as error:
        raise ContractError(f"{folder / CONTRACT}: {error}") from error
    stored = _read_tensors(path)
    _check_tensors(path, stored, network.state_dict(), contract.weights_dtype)
    network.load_state_dict(stored, strict=True)  # casts half-precision storage to float32
    try:
        network = network.eval().to(device)
    except RuntimeError as error:
        if not _lacks_memory(error):
            raise
        raise DeviceMemoryError(
            f"{device} has not enough memory for {contract.name}; choose a smaller model, or --device cpu"
        ) from error
    return HeightModel(contract=contract, network=network, device=device, shift=_read_shift(folder, contract))


def _read_shift(folder: Path, contract: Contract) -> ShiftReference | None:
    path = folder / SHIFT
    if contract.shift_sha256 is None:
        if path.exists():
            raise ContractError(f"{path} is not in {CONTRACT}; remove it, or calibrate the model with canopy calibrate")
        return None
    reference = load_shift(path)
    if file_sha256(path) != contract.shift_sha256 or reference.bands != len(contract.bands):
        raise ContractError(f"{path} is not the file that {CONTRACT} names; fetch the model again")
    return reference


def _check_tensors(path: Path, stored: Mapping[str, Tensor], wanted: Mapping[str, Tensor], storage: str) -> None:
    remedy = f"the weights are not those of the network in {CONTRACT}; restore both files from one model"
    bare = {unwrapped(name): name for name in stored}
    if bare.keys() == wanted.keys() != stored.keys():
        name = next(name for short, name in bare.items() if short != name)
        raise ContractError(
            f"{path} has tensors named as inside a wrapper ({name}); store the state of the network itself, as "
            f"it is before torch.compile and distributed training wrap it"
        )
    for what, names in (("lacks", wanted.keys() - stored.keys()), ("has the unknown", stored.keys() - wanted.keys())):
        if names:
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            raise ContractError(f"{path} {what} tensor {min(names)}{more}: {remedy}")
    for name, tensor in stored.items():
        if tensor.shape != wanted[name].shape:
            raise ContractError(
                f"{path}: tensor {name} has shape {tuple(tensor.shape)}, not {tuple(wanted[name].shape)}: {remedy}"
            )
        dtype = getattr(torch, storage) if wanted[name].is_floating_point() else wanted[name].dtype
        if tensor.dtype != dtype:
            raise ContractError(f"{path}: tensor {name} is {tensor.dtype}, not the {dtype} of {CONTRACT}: {remedy}")
    _check_finite(path, stored, "the model cannot work; fetch it again, or train it again from before it diverged")


def unwrapped(name: str) -> str:
    """The name of a tensor without those of wrappers."""
    return ".".join(part for part in name.split(".") if part not in WRAPPERS)


def _check_finite(path: Path, stored: Mapping[str, Tensor], remedy: str) -> None:
    for name, tensor in stored.items():
        if tensor.is_floating_point() and not tensor.isfinite().all():
            raise ContractError(f"{path}: tensor {name} holds NaN or infinite values: {remedy}")


def fixture_deviation_m(path: Path, model: HeightModel) -> tuple[dict[str, float], HeightDistribution]:
    """How far mean and spread of the fixture in `path` are from the recorded ones at most, and what was predicted for it.

    Raises:
        ContractError: the file is missing, or not a fixture.
    """
    _require(path)
    fixture = _read_tensors(path)
    if fixture.keys() != {"image", "mean_m", "spread_m"}:
        raise ContractError(f"{path} holds {sorted(fixture)}, not image, mean_m and spread_m; fetch the model again")
    heights = model.predict(fixture["image"])
    off_m = {}
    for name, values in (("mean_m", heights.mean_m.cpu()), ("spread_m", heights.spread_m.cpu())):
        if fixture[name].shape != values.shape:
            raise ContractError(f"{path}: {name} has another shape than the image; fetch the model again")
        off_m[name] = (values - fixture[name]).abs().max().item()
    return off_m, heights


def _check_fixture(path: Path, model: HeightModel) -> None:
    deviation_m, _ = fixture_deviation_m(path, model)
    tolerance_m = PRECISION_TOLERANCE_M[model.precision]
    remedy = (
        "the weights or the libraries do not compute what the model was; fetch the model again, or update timm"
        if model.precision == "float32"
        else "the network does not fit this precision; choose another --precision"
    )
    for name, off_m in deviation_m.items():
        if not off_m <= tolerance_m:
            raise ContractError(
                f"{path}: {name} comes out {off_m:.3g} m from the recorded value in {model.precision}, "
                f"more than {tolerance_m} m: {remedy}"
            )


def _read_tensors(path: Path) -> dict[str, Tensor]:
    try:
        return dict(load_file(path))
    except SafetensorError as error:
        raise ContractError(f"{path} is not a readable safetensors file ({error}); fetch the model again") from error


def _require(path: Path) -> None:
    if not path.is_file():
        raise ContractError(f"{path} is missing; fetch the model again, or point to a complete model folder")


def file_sha256(path: Path) -> str:
    """Digest of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _keys(table: Mapping[str, Any], prefix: str = "") -> set[str]:
    """Dotted names of all keys, those of tables in lists included."""
    names = {prefix + key for key in table}
    for key, value in table.items():
        for inner in value if isinstance(value, list | tuple) else [value]:
            if isinstance(inner, dict):
                names |= _keys(inner, f"{prefix}{key}.")
    return names

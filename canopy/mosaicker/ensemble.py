"""Several opinions on one window: a window turned and mirrored, several models, and what they amount to.

A turned window is turned after it has been normalised and filled: the network sees the same picture from another side, with
the same margins, and every opinion is about the same imagery. The members are asked one after another, in a fixed order.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, cast, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from canopy.errors import ContractError
from canopy.model.blocks import BlockTable
from canopy.model.calibration import CalibrationTable
from canopy.model.package import Contract, HeightModel, find_model, load_model
from canopy.model.shift import ShiftReference
from canopy.model.tables import Calibrated, Member

Tta = Literal["none", "flips", "d4"]
"""How a window is shown to a model: as it is; mirrored about either axis and both, 4 in all; or in all 8 symmetries of the
square, which takes 8 times as long. Forests look alike from all sides but for their shadows."""

_SHARED = ("bands", "gsd_range_m", "dtype", "value_range", "window_px", "stride_px")
"""What the contracts of an ensemble have to agree in: one window of imagery is given to every member."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Turn:
    """A symmetry of the square: mirrored left to right or not, then turned by quarters counter-clockwise."""

    quarters: int = 0
    mirrored: bool = False

    def apply(self, x: Tensor) -> Tensor:
        """(..., row, col) as this turn shows it; contiguous, because kernels are chosen by the order in memory."""
        if self == IDENTITY:
            return x
        turned = x.flip(-1) if self.mirrored else x
        return turned.rot90(self.quarters, (-2, -1)).contiguous()

    def undo(self, x: Tensor) -> Tensor:
        """(..., row, col) put back: `undo(apply(x))` is x."""
        if self == IDENTITY:
            return x
        turned = x.rot90(-self.quarters, (-2, -1))
        return (turned.flip(-1) if self.mirrored else turned).contiguous()


IDENTITY = Turn()

TURNS: dict[Tta, tuple[Turn, ...]] = {
    "none": (IDENTITY,),
    "flips": (IDENTITY, Turn(mirrored=True), Turn(quarters=2), Turn(quarters=2, mirrored=True)),
    "d4": tuple(Turn(quarters=quarters, mirrored=mirrored) for mirrored in (False, True) for quarters in range(4)),
}


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Opinion:
    """What is predicted for a batch of windows, (batch, row, col) on the device."""

    mean_m: Tensor
    """float32 height: the mean over the members that do not abstain."""
    spread_m: Tensor
    """float32 standard deviation: the root of the mean of their variances plus the variance of their means."""
    abstain: Tensor
    """bool: every member abstains, and mean and spread mean nothing."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Ensemble:
    """One or more models, each asked for one or more turns of a window, on one device.

    Raises:
        ContractError: the models take different imagery or windows.
    """

    models: tuple[HeightModel, ...]
    tta: Tta = "none"
    """Test-time augmentation."""
    given: Calibrated | None = None
    """Tables made for just these models and turns, in place of what the contract of a single model holds."""

    def __post_init__(self) -> None:
        assert self.models, "an ensemble has at least one model"
        first = self.models[0]
        for other in self.models[1:]:
            assert other.device == first.device, f"models on {first.device} and {other.device}"
            for key in _SHARED:
                one, two = getattr(first.contract, key), getattr(other.contract, key)
                if one != two:
                    raise ContractError(
                        f"{first.contract.name} has {key} {one} and {other.contract.name} {two}: they cannot be averaged "
                        f"window by window; choose models made for the same imagery and windows, or map with each of them"
                    )
        digests = [model.contract.weights_sha256 for model in self.models]
        if doubled := [model.contract.name for model in self.models if digests.count(model.contract.weights_sha256) > 1]:
            raise ContractError(f"{doubled[0]} is given twice, which would only give it more weight; give every model once")
        if self.given is not None:
            self._check_given(self.given)

    def _check_given(self, given: Calibrated) -> None:
        asked = sorted(model.contract.weights_sha256 for model in self.models)
        if asked != sorted(member.weights_sha256 for member in given.members):
            names = " + ".join(f"{member.name} {member.version}" for member in given.members)
            raise ContractError(
                f"the calibration is of {names}, not of {self.name} as asked for (their weights differ); "
                f"calibrate these models with canopy calibrate, or map with those"
            )
        if self.tta != given.tta:
            raise ContractError(
                f"the calibration is of test-time augmentation {given.tta!r}, not {self.tta!r}; map with --tta {given.tta}, "
                f"or calibrate with --tta {self.tta}"
            )

    @property
    def turns(self) -> tuple[Turn, ...]:
        """How each model is shown a window."""
        return TURNS[self.tta]

    @property
    def members(self) -> int:
        """Forward passes that a window takes."""
        return len(self.models) * len(self.turns)

    @property
    def device(self) -> torch.device:
        """Where all of them run."""
        return self.models[0].device

    @property
    def precision(self) -> str:
        """What the networks compute in."""
        return self.models[0].precision

    @property
    def compiled(self) -> bool:
        """Whether torch compiles a network."""
        return any(model.compiled is not None for model in self.models)

    @cached_property
    def contract(self) -> Contract:
        """What imagery and windows the ensemble takes: the contract that all models share.

        Its name is the ensemble's. Of a single model that is shown windows as they are it is the model's own; any other has
        the tables that were given for it or none, see `uncalibrated`.
        """
        own = self.models[0].contract
        if self.given is not None:
            return own.model_copy(update={"name": self.name, "calibration": self.given.pixels, "blocks": self.given.blocks})
        if self.members == 1:
            return own
        return own.model_copy(update={"name": self.name, "calibration": None, "blocks": None})

    @property
    def name(self) -> str:
        """The models' names, and the augmentation if any."""
        names = " + ".join(model.contract.name for model in self.models)
        return names if self.tta == "none" else f"{names}, {self.tta}"

    @property
    def calibration(self) -> CalibrationTable | None:
        """How many spreads the 90 % interval reaches; None: not known, see `uncalibrated`."""
        return self.contract.calibration

    @cached_property
    def tables(self) -> Calibrated | None:
        """What turns spreads into intervals, of pixels and of means over ground; None: not known, see `uncalibrated`."""
        if self.given is not None or self.calibration is None:
            return self.given
        return self.calibrated(self.calibration, self.contract.blocks)

    def calibrated(
        self, pixels: CalibrationTable, blocks: BlockTable | None, tile_sets: Mapping[str, str] | None = None
    ) -> Calibrated:
        """Tables as those of these models and turns; by name the index digests of what calibrated, where it is known."""
        members = tuple(
            Member(name=m.contract.name, version=m.contract.version, weights_sha256=m.contract.weights_sha256)
            for m in self.models
        )
        return Calibrated(members=members, tta=self.tta, tile_sets=dict(tile_sets or {}), pixels=pixels, blocks=blocks)

    @property
    def shift(self) -> ShiftReference | None:
        """What the calibration data look like; None: not known, see `unmeasured`.

        Why none for several opinions: what the model predicts is a part of what is compared. Nor for other tables than the
        model's own, which were fitted on other data.
        """
        return self.models[0].shift if self.members == 1 and self.given is None else None

    @property
    def unmeasured(self) -> str | None:
        """Why it is not known how unlike the calibration data a place is, None where it is."""
        if self.shift is not None:
            return None
        if self.given is not None:
            return "the intervals are from tables given for this map, which do not say what their calibration data look like"
        if self.members == 1 or all(model.shift is None for model in self.models):
            return f"{self.name} has no description of calibration data"
        return f"such a description is of one model on windows as they are, not of the mean of {self.members} predictions"

    @property
    def uncalibrated(self) -> str | None:
        """Why there is no calibration table, None where there is one.

        Why none for several opinions: a table says how many of a model's own spreads hold the true height. Averaging moves
        the errors and widens the spreads by what the members disagree in, so the factors no longer fit, in either direction.
        """
        if self.calibration is not None:
            return None
        if self.members == 1 or all(model.contract.calibration is None for model in self.models):
            return "the model has no calibration table" if len(self.models) == 1 else "no model has a calibration table"
        return (
            f"a model's table is for its windows as they are, not for the mean of {self.members} predictions; "
            f"canopy calibrate makes one for them"
        )

    def record(self) -> list[dict[str, Any]]:
        """What decides the pixels, a table a model, for records of runs: name, version, digest of the weights."""
        return [
            {
                "name": model.contract.name, "version": model.contract.version,
                "weights_sha256": model.contract.weights_sha256, "turns": len(self.turns),
            }
            for model in self.models
        ]  # fmt: skip

    def predict(self, image_bchw: Tensor | NDArray[Any], valid_bhw: Tensor | NDArray[np.bool_] | None = None) -> Opinion:
        """Heights of a batch of windows; arguments and errors as for `HeightModel.predict`.

        Members m = 1..n that do not abstain at a pixel count the same there: the height is the mean of their means, the
        variance by the law of total variance mean(spread_m²) + mean((mean_m - height)²). Both are running means (Welford
        1962), which do not cancel as E[h²] - E[h]² would, 2 cm of spread at 90 m in float32.
        """
        pool = _Pool()
        with torch.inference_mode():
            for model in self.models:
                x_bchw = model.prepare(image_bchw, valid_bhw)
                for turn in self.turns:
                    heights = model.heights(turn.apply(x_bchw))
                    pool.add(*(turn.undo(each) for each in (heights.mean_m, heights.spread_m, heights.abstain)))
            return pool.opinion()


class _Pool:
    """Running mean and variance of opinions, pixel by pixel."""

    def __init__(self) -> None:
        self._opinion: Opinion | None = None  # as long as there is but one, it is the result, bit for bit
        self._count = self._mean = self._within = self._between = torch.empty(0)

    def add(self, mean_m: Tensor, spread_m: Tensor, abstain: Tensor) -> None:
        """Take in one member's (batch, row, col) mean, spread and abstention."""
        if self._opinion is None and not self._count.numel():
            self._opinion = Opinion(mean_m=mean_m, spread_m=spread_m, abstain=abstain)
            return
        if self._opinion is not None:
            first, self._opinion = self._opinion, None
            self._count, self._mean, self._within, self._between = (torch.zeros_like(first.mean_m) for _ in range(4))
            self._take(first.mean_m, first.spread_m, first.abstain)
        self._take(mean_m, spread_m, abstain)

    def _take(self, mean_m: Tensor, spread_m: Tensor, abstain: Tensor) -> None:
        # An abstaining member's values may be NaN: they are left out, not multiplied by 0.
        self._count += ~abstain
        share = torch.where(abstain, 0.0, 1.0 / self._count)
        off = torch.where(abstain, 0.0, mean_m - self._mean)
        self._mean += off * share
        self._between += off * torch.where(abstain, 0.0, mean_m - self._mean)
        self._within += torch.where(abstain, 0.0, spread_m.square() - self._within) * share

    def opinion(self) -> Opinion:
        """The result; where every member abstains it is 0 m with a spread of 0 m, and says so."""
        if self._opinion is not None:
            return self._opinion
        variance = self._within + self._between / self._count.clamp_min(1)
        return Opinion(mean_m=self._mean, spread_m=variance.sqrt(), abstain=self._count == 0)


def load_ensemble(
    models: Path | str | Sequence[Path | str],
    device: torch.device | str = "cpu",
    *,
    tta: str = "none",
    precision: str = "float32",
    compile: bool = False,  # noqa: A002 - torch's word for it
    calibration: Calibrated | None = None,
) -> Ensemble:
    """One or several models, by folder or name, ready to predict; see `load_model` for what is checked.

    Args:
        models: Model folders or names; the heights of several are averaged.
        device: Where they will run, all on one.
        tta: Test-time augmentation, a `Tta`.
        precision: What the networks compute in.
        compile: Have torch compile the networks first.
        calibration: Tables of these models and turns.

    Raises:
        ContractError: a model is not found or not whole, the models take different imagery or windows, one is given twice,
            the augmentation is unknown, or the tables are of other models or turns.
        DeviceMemoryError: the device has not enough memory.
    """
    chosen = checked_tta(tta)
    folders = [models] if isinstance(models, Path | str) else list(models)
    if not folders:
        raise ContractError("no model is given; give the folder or the name of at least one")
    return Ensemble(
        models=tuple(
            load_model(find_model(folder), device=device, precision=precision, compile=compile) for folder in folders
        ),
        tta=chosen,
        given=calibration,
    )


def checked_tta(tta: str) -> Tta:
    """`tta`, after refusing what is unknown.

    Raises:
        ContractError: it is no `Tta`.
    """
    if tta not in get_args(Tta):
        raise ContractError(f"test-time augmentation {tta!r} is unknown; choose {', '.join(get_args(Tta))}")
    return cast("Tta", tta)

"""Sub-pixel shift between a height label and the image it lies on, applied only when it makes them agree better."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field
from scipy import ndimage

from canopy.raster import Pixels

Float32 = NDArray[np.float32]

APPLIED: Final = "applied"
"""The decision of a shift that label production takes; every other one is "kept: " and the reason."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Shift:
    """What has to be added to a label's coordinates so that it lies on the image, and whether to do it."""

    x_m: float
    """Eastwards, metres; NaN when nothing could be measured."""
    y_m: float
    """Northwards, metres; NaN when nothing could be measured."""
    score_before: float
    """Dependence of image and label as they came, nats a pixel; on the same pixels as `score_after`. NaN: not measured."""
    score_after: float
    """The same with the label shifted."""
    contrast: float
    """Share of the known heights that lie on edges of the canopy, 0 to 1: what there is to register by."""
    decision: str
    """"applied", or "kept: " and the reason. `x_m` and `y_m` are what was measured in both cases."""

    @property
    def applied(self) -> bool:
        """Whether the label is to be moved."""
        return self.decision == APPLIED


class RegistrationSettings(BaseModel):
    """The table [registration] of a recipe."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    apply: Literal["never", "chip", "acquisition"] = "chip"
    """"never": measure and report only; "chip": each chip by its own shift; "acquisition": all chips of one pair of image and
    label by one robust shift (`robust_shift`)."""
    max_shift_m: float = Field(default=8.0, gt=0, le=100)
    """Longest plausible shift; also at most a quarter of the chip's shorter side is searched."""
    min_contrast: float = Field(default=0.05, ge=0, le=1)
    """Least share of canopy edges (`Shift.contrast`)."""
    min_gain: float = Field(default=0.005, ge=0)
    """Least improvement of the score, nats a pixel."""
    min_votes: int = Field(default=3, ge=1)
    """Chips that must agree on the shift of an acquisition."""


def measure_shift(image: Pixels, height_m: Float32, gsd_m: float, settings: RegistrationSettings) -> Shift:
    """The shift of one chip, and whether it is to be applied.

    Args:
        image: (band, row, col), first three bands red, green, blue, a fourth near infrared.
        height_m: (row, col) of the same pixels, metres above ground, NaN = unknown.
        gsd_m: Pixel size; the raster is north-up.
        settings: Limits. `settings.apply` does not matter here.
    """
    raise NotImplementedError


def robust_shift(shifts: Sequence[Shift], settings: RegistrationSettings) -> Shift:
    """The one shift of an acquisition, from the shifts of its chips."""
    raise NotImplementedError


def shift_height(height_m: Float32, shift: Shift, gsd_m: float) -> Float32:
    """Move a height raster by a shift; heights are never invented and what was NaN stays so.

    Args:
        height_m: (row, col), north-up, NaN = unknown.
        shift: `x_m` east, `y_m` north, finite.
        gsd_m: Pixel size.

    Returns:
        (row, col) float32 on the same pixels; NaN where nothing known was moved to.
    """
    assert math.isfinite(shift.x_m) and math.isfinite(shift.y_m), f"{shift} was not measured"  # noqa: PT018
    across, down = shift.x_m / gsd_m, -shift.y_m / gsd_m
    rows, cols = np.indices(height_m.shape, dtype=np.float64)
    moved = ndimage.map_coordinates(
        height_m.astype(np.float64), (rows - down, cols - across), order=1, mode="constant", cval=np.nan, prefilter=False
    )
    return moved.astype(np.float32)

"""What a trained model says of chips it never saw, each pixel of the ground once."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from canopy.grid import Layout, weight
from canopy.model.baselines import Baselines
from canopy.model.data import ChipDataset
from canopy.model.package import Contract
from canopy.tiler.chips import read_index

Heights = NDArray[np.float32]


class Predicted(Protocol):
    """Heights of a batch of windows, (batch, row, col) tensors."""

    @property
    def mean_m(self) -> Tensor:
        """Predicted height."""

    @property
    def spread_m(self) -> Tensor:
        """Its standard deviation."""

    @property
    def abstain(self) -> Tensor:
        """Where nothing is predicted."""


class Predictor(Protocol):
    """What predicts windows: a model, or several that are asked as one."""

    @property
    def contract(self) -> Contract:
        """What imagery it takes."""

    def predict(self, image_bchw: NDArray[Any], valid_bhw: NDArray[np.bool_] | None = None, /) -> Predicted:
        """Heights of images (batch, band, row, col)."""


def predict_chip(model: Predictor, image_brc: NDArray[Any], valid_rc: NDArray[np.bool_]) -> tuple[Heights, Heights]:
    """(mean_m, spread_m) of a chip, both (row, col), as a map of it would have them.

    A chip that fits the model's window is one input; a larger one is covered by windows on a lattice that starts at its
    corner, blended with the weights of `canopy.grid`. Variances add as mean of variances plus variance of means.
    """
    layout = Layout(window_px=model.contract.window_px, stride_px=model.contract.stride_px)
    rows, cols = valid_rc.shape
    if max(rows, cols) <= layout.window_px:
        return _predict(model, image_brc, valid_rc)
    side = layout.window_px
    sums = np.zeros((3, rows, cols), np.float32)
    for window_row in layout.windows_over(0, rows):
        for window_col in layout.windows_over(0, cols):
            row, col = layout.window_span(window_row)[0], layout.window_span(window_col)[0]
            inside = slice(max(row, 0), min(row + side, rows)), slice(max(col, 0), min(col + side, cols))
            there = slice(inside[0].start - row, inside[0].stop - row), slice(inside[1].start - col, inside[1].stop - col)
            image = np.zeros((len(image_brc), side, side), image_brc.dtype)
            valid = np.zeros((side, side), bool)
            image[:, *there], valid[there] = image_brc[:, *inside], valid_rc[inside]
            if not valid.any():
                continue
            mean, spread = (a[there] for a in _predict(model, image, valid))
            w = np.outer(_weights(layout, window_row, inside[0]), _weights(layout, window_col, inside[1]))
            usable = np.isfinite(mean)
            for total, value in zip(sums, (np.ones_like(mean), mean, spread**2 + mean**2), strict=True):
                total[inside] += np.where(usable, w * value, np.float32(0))
    with np.errstate(invalid="ignore"):  # 0/0 is NaN where no window saw a valid pixel
        mean_m, square = sums[1] / sums[0], sums[2] / sums[0]
    return mean_m, np.sqrt(np.maximum(square - mean_m**2, 0.0))


def _predict(model: Predictor, image_brc: NDArray[Any], valid_rc: NDArray[np.bool_]) -> tuple[Heights, Heights]:
    """Mean and spread of one window, NaN where the model abstains."""
    heights = model.predict(image_brc[None], valid_rc[None])
    abstain = heights.abstain[0].cpu().numpy()
    mean, spread = (np.where(abstain, np.float32(np.nan), a[0].cpu().numpy()) for a in (heights.mean_m, heights.spread_m))
    return mean, spread


def _weights(layout: Layout, window: int, span: slice) -> NDArray[np.float32]:
    edge, feather = layout.support_span(window)[0] + layout.feather_px // 2, layout.feather_px
    return np.array(
        [weight(pixel, edge, edge + layout.stride_px, feather) / (2 * feather) for pixel in range(span.start, span.stop)],
        np.float32,
    )


# --- held-out chips ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ChipResult:
    """What is known and what was predicted on the part of a held-out chip that counts.

    Heights are (row, col) in metres, NaN where there is no height or no imagery. The arrays reach one pixel beyond `counts`
    where the chip does, so that gradients at its rim can be taken.
    """

    id: str
    site: str
    crs: str
    gsd_m: float
    row_px: int
    """Row of the arrays' first pixel on the lattice of `crs`."""
    col_px: int
    """Its column."""
    calibrates: bool
    """Whether the chip may have a part in the calibration table."""
    scores: bool
    """Whether it has a part in the scores."""
    counts: NDArray[np.bool_]
    """(row, col): pixels with a known height and imagery that count in this chip and in no other."""
    true_m: Heights
    mean_m: Heights
    """NaN as well where the model abstains."""
    spread_m: Heights
    forest_m: Heights
    """By the random-forest baseline; NaN everywhere where the chip is not scored or there is none."""


HeldOutSet = tuple[ChipDataset, bool, bool]
"""Chips, whether they calibrate, whether they are scored."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Place:
    """Where a chip lies, and which of its pixels have a known height and imagery, as bits."""

    chips: ChipDataset
    item: int
    lattice: tuple[str, str, float]
    """Site, CRS and GSD: pixels of two chips are the same ground only where all three are."""
    row_px: int
    col_px: int
    shape: tuple[int, int]
    bits: NDArray[np.uint8]
    calibrates: bool
    scores: bool

    @property
    def known(self) -> NDArray[np.bool_]:
        """(row, col), an array of its own."""
        rows, cols = self.shape
        return np.unpackbits(self.bits, count=rows * cols).reshape(self.shape).astype(bool)

    def slices(self, rows: slice, cols: slice) -> tuple[slice, slice]:
        """Lattice rows and columns as those of the chip's arrays."""
        return (
            slice(rows.start - self.row_px, rows.stop - self.row_px),
            slice(cols.start - self.col_px, cols.stop - self.col_px),
        )

    def distance(self, rows: slice, cols: slice) -> NDArray[np.int64]:
        """How far lattice pixels are from the chip's centre, along the farther axis, in half pixels."""
        r = 2 * (np.arange(rows.start, rows.stop) - self.row_px) + 1 - self.shape[0]
        c = 2 * (np.arange(cols.start, cols.stop) - self.col_px) + 1 - self.shape[1]
        far: NDArray[np.int64] = np.maximum(np.abs(r)[:, None], np.abs(c)[None, :])
        return far


def _places(held_out: Sequence[HeldOutSet]) -> list[Place]:
    places = []
    for chips, calibrates, scores in held_out:
        rows = read_index(chips.tile_set).set_index("id")
        for item, name in enumerate(chips.ids):
            known = chips[item]["valid"].numpy()
            row = rows.loc[name]
            places.append(
                Place(
                    chips=chips,
                    item=item,
                    lattice=(str(row["site"]), str(row["crs"]), float(row["gsd_m"])),
                    row_px=int(row["row_px"]),
                    col_px=int(row["col_px"]),
                    shape=known.shape,
                    bits=np.packbits(known),
                    calibrates=calibrates,
                    scores=scores,
                )
            )
    return places


def _overlaps(places: Sequence[Place]) -> list[list[int]]:
    """Per chip the other ones on the same ground, in order."""
    groups: dict[tuple[str, str, float], list[int]] = {}
    for number, place in enumerate(places):
        groups.setdefault(place.lattice, []).append(number)
    found: list[list[int]] = [[] for _ in places]
    for members in groups.values():
        corners = np.array([(places[k].row_px, places[k].col_px, *places[k].shape) for k in members], np.int64)
        top, left, height, width = corners.T
        for number, (row, col, rows, cols) in zip(members, corners, strict=True):
            touches = (top < row + rows) & (top + height > row) & (left < col + cols) & (left + width > col)
            found[number] = [members[k] for k in np.flatnonzero(touches) if members[k] != number]
    return found


def _shared(place: Place, other: Place) -> tuple[slice, slice]:
    """The lattice rows and columns that two overlapping chips have in common."""
    rows = slice(max(place.row_px, other.row_px), min(place.row_px + place.shape[0], other.row_px + other.shape[0]))
    cols = slice(max(place.col_px, other.col_px), min(place.col_px + place.shape[1], other.col_px + other.shape[1]))
    return rows, cols


def needed(places: Sequence[Place], reach_px: int) -> list[Place]:
    """The chips without those whose pixels others hold as well as a map would.

    A chip goes when each of its known pixels is known in a remaining one whose centre is within `reach_px` of it, or nearer
    than its own. Chips of a training set overlap many times, and each costs a pass of the network.
    """
    overlaps, gone = _overlaps(places), set()
    for number, place in enumerate(places):
        left = place.known
        for other in overlaps[number]:
            if other not in gone:
                rival = places[other]
                rows, cols = _shared(place, rival)
                near = rival.distance(rows, cols) <= np.maximum(place.distance(rows, cols), 2 * reach_px)
                left[place.slices(rows, cols)] &= ~(near & rival.known[rival.slices(rows, cols)])
        if not left.any():
            gone.add(number)
    return [place for number, place in enumerate(places) if number not in gone]


def counted(places: Sequence[Place]) -> Iterator[NDArray[np.bool_]]:
    """Per chip the pixels that count in it: each known pixel of the ground in one chip, the one whose centre is nearest.

    Why the nearest centre: chips overlap so that training sees a place in many crops; a score that counted it as often would
    be one of the middle of a site, and one taken from the rims of chips would be worse than the map is.
    """
    for number, (place, others) in enumerate(zip(places, _overlaps(places), strict=True)):
        counts = place.known
        for other in others:
            rival = places[other]
            rows, cols = _shared(place, rival)
            own, its = place.distance(rows, cols), rival.distance(rows, cols)
            nearer = (its < own) | ((its == own) & (other < number))
            counts[place.slices(rows, cols)] &= ~(nearer & rival.known[rival.slices(rows, cols)])
        yield counts


def evaluate_chips(
    model: Predictor,
    baselines: Baselines | None,
    held_out: Sequence[HeldOutSet],
    *,
    progress: Callable[[int, int], None] | None = None,
) -> Iterator[ChipResult]:
    """Predict held-out chips, one at a time; each pixel of the ground counts once, however many chips hold it.

    Of chips that overlap many times over, only so many are predicted that each pixel is as near to the centre of one as the
    windows of a map would bring it.

    Args:
        model: The trained model.
        baselines: Its baselines, fitted on the same training chips; None where nothing is to be compared with them.
        held_out: What is held out, as `DataSets.held_out` gives it.
        progress: Called with the number of chips done and of all.
    """
    places = needed(_places(held_out), model.contract.stride_px // 2)
    for done, (place, counts) in enumerate(zip(places, counted(places), strict=True), 1):
        if counts.any():
            yield _evaluate(model, baselines, place, counts)
        if progress is not None:
            progress(done, len(places))


def _evaluate(model: Predictor, baselines: Baselines | None, place: Place, counts: NDArray[np.bool_]) -> ChipResult:
    sample = place.chips[place.item]
    image, seen = sample["image"].numpy(), sample["image_valid"].numpy()
    known = sample["valid"].numpy()
    mean_m, spread_m = predict_chip(model, image, seen)
    rows, cols = (np.flatnonzero(counts.any(axis=axis)) for axis in (1, 0))
    part = slice(max(rows[0] - 1, 0), rows[-1] + 2), slice(max(cols[0] - 1, 0), cols[-1] + 2)
    wanted = np.zeros_like(known)
    wanted[part] = known[part]
    if baselines is not None and place.scores:
        forest_m = baselines.predict(image, wanted, seen)
    else:
        forest_m = np.full(known.shape, np.nan, np.float32)
    site, crs, gsd_m = place.lattice
    return ChipResult(
        id=sample["id"],
        site=site,
        crs=crs,
        gsd_m=gsd_m,
        row_px=place.row_px + part[0].start,
        col_px=place.col_px + part[1].start,
        calibrates=place.calibrates,
        scores=place.scores,
        counts=counts[part],
        **{
            name: np.where(wanted, heights, np.float32(np.nan))[part]
            for name, heights in (
                ("true_m", sample["height_m"].numpy()), ("mean_m", mean_m), ("spread_m", spread_m), ("forest_m", forest_m),
            )
        },
    )  # fmt: skip

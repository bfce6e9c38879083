"""Squares of a map in a few numbers each: colour, contrast, texture, noise, and what the model says there.

A square is `SQUARE_PX` lattice pixels wide and starts at a multiple of that, so which squares there are, and what is
measured in each, depends neither on the sheets of a map nor on its area (but for squares that an edge cuts). A plot of 20 m
gives one or a few, a sheet of 4096 px gives 16 384; both are compared with the same reference, see `canopy.model.shift`.

No square looks at its neighbours, and everything is a mean over pixels, or pairs of pixels, of the square itself: squares
can be measured in any order and grouping to the same bits. NumPy only.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Final, Self

import numpy as np
from numpy.typing import NDArray

from canopy.grid import Box

SQUARE_PX: Final = 32
"""Side of a square. Why so small: plots that calibrate are 40 to 80 px wide. Sides of sheets are multiples of it."""

LEAST_KNOWN: Final = 0.5
"""Share of a square's pixels that must have imagery and a height for the square to be measured."""

COARSE_PX: Final = 4
"""Distance of the coarser differences, pixels: about a crown's shaded side at 0.5 m."""

FLOOR: Final = 1e-3
"""Added to variances of normalised imagery before their logarithm: 3 % of the contract's deviation is no texture."""

HEIGHT_FLOOR_M: Final = 0.5
"""Added to predicted heights and spreads before their logarithm: below it, differences are none."""

Float32 = NDArray[np.float32]


def feature_names(bands: int) -> tuple[str, ...]:
    """Names of what is measured in a square of imagery of so many bands.

    All of it is in the contract's normalised units, deviations and spreads as natural logarithms:

    - `mean`, `contrast`: mean and standard deviation of each band
    - `colour`: standard deviation of the difference of neighbouring bands, small where the picture is grey
    - `fine`, `coarse`: root mean square difference of grey values 1 and `COARSE_PX` px apart (the variogram at two lags),
      which blur, another GSD and the size of crowns move apart
    - `noise`: root mean square of the mixed second difference, to which edges give little and speckle gives all
    - `colour_noise`: root mean square difference, 1 px apart, of the last band minus the first
    - `height`, `spread`: what the model predicts, means over the square
    """
    each = range(1, bands + 1)
    between = tuple(f"{a}_{b}" for a, b in pairwise(each))
    return (
        *(f"mean_{band}" for band in each),
        *(f"contrast_{band}" for band in each),
        *(f"colour_{pair}" for pair in between),
        "fine",
        "coarse",
        "noise",
        *(("colour_noise",) if bands > 1 else ()),
        "height",
        "spread",
    )


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Squares:
    """Squares that were measured."""

    features: Float32
    """(square, feature), as `feature_names` names them."""
    row: NDArray[np.int64]
    """(square,) first row of each, in pixels of whatever the arrays began at."""
    col: NDArray[np.int64]
    """Its first column."""

    def __len__(self) -> int:
        """How many."""
        return len(self.features)

    @classmethod
    def joined(cls, parts: Sequence[Squares], bands: int) -> Self:
        """All of them, in order."""
        empty = np.zeros((0, len(feature_names(bands))), np.float32)
        return cls(
            features=np.concatenate([empty, *(part.features for part in parts)]),
            row=np.concatenate([np.zeros(0, np.int64), *(part.row for part in parts)]),
            col=np.concatenate([np.zeros(0, np.int64), *(part.col for part in parts)]),
        )


def measure(
    image_brc: NDArray[Any],
    known_rc: NDArray[np.bool_],
    mean_m: Float32,
    spread_m: Float32,
    *,
    mean: Sequence[float],
    std: Sequence[float],
) -> Squares:
    """Measure the squares of an image that starts at the corner of one; the last ones may be cut.

    Args:
        image_brc: Imagery in the contract's units.
        known_rc: Where there is imagery and a height; nothing else is looked at.
        mean_m: (row, col) predicted height.
        spread_m: Its standard deviation.
        mean: The contract's, per band.
        std: The contract's, per band.

    Returns:
        Squares of which at least `LEAST_KNOWN` is known, in row-major order.
    """
    bands, (rows, cols) = len(image_brc), known_rc.shape
    assert image_brc.shape[1:] == mean_m.shape == spread_m.shape == (rows, cols), "image and heights differ in shape"
    assert len(mean) == len(std) == bands, f"{bands} bands and {len(mean)} means, {len(std)} standard deviations"
    known = _cut(known_rc, False)
    share = np.count_nonzero(known, axis=(2, 3)) / SQUARE_PX**2
    # A row at a time: what is worked on then stays in the processor's cache.
    centre, scale = (np.asarray(values, np.float32)[:, None, None] for values in (mean, 1 / np.asarray(std)))
    parts = []
    for number in range(len(share)):
        chosen = np.flatnonzero(share[number] >= LEAST_KNOWN)
        if not chosen.size:
            continue
        span = slice(number * SQUARE_PX, (number + 1) * SQUARE_PX)
        x = np.stack([_cut(band[span], 0)[0][chosen] for band in image_brc], axis=1, dtype=np.float32, casting="safe")
        x -= centre
        x *= scale
        heights, spreads = (_cut(a[span], 0)[0][chosen] for a in (mean_m, spread_m))
        cut = share[number][chosen] < 1
        if cut.any():
            features = np.empty((chosen.size, len(feature_names(bands))), np.float32)
            features[~cut] = _features(x[~cut], heights[~cut], spreads[~cut], None)
            features[cut] = _features(x[cut], heights[cut], spreads[cut], known[number][chosen[cut]])
        else:
            features = _features(x, heights, spreads, None)
        at = np.full(chosen.size, span.start, np.int64)
        parts.append(Squares(features=features, row=at, col=chosen * SQUARE_PX))
    return Squares.joined(parts, bands)


def _cut(array: NDArray[Any], fill: Any) -> NDArray[Any]:
    """(row, col) -> (row of squares, square, row, col), filled up to whole squares."""
    rows, cols = array.shape
    down, across = -(-rows // SQUARE_PX), -(-cols // SQUARE_PX)
    if (rows, cols) != (down * SQUARE_PX, across * SQUARE_PX):
        array = np.pad(array, ((0, down * SQUARE_PX - rows), (0, across * SQUARE_PX - cols)), constant_values=fill)
    return array.reshape(down, SQUARE_PX, across, SQUARE_PX).swapaxes(1, 2)


def _features(x_nbrc: Float32, mean_m: Float32, spread_m: Float32, known: NDArray[np.bool_] | None) -> Float32:
    """(square, feature) of normalised squares (square, band, row, col), which are used up; `known` None: every pixel is."""
    bands, pairs = x_nbrc.shape[1], _Pairs(known)
    if known is not None:
        x_nbrc, mean_m, spread_m = (
            np.where(known[:, None] if a.ndim == 4 else known, a, np.float32(0)) for a in (x_nbrc, mean_m, spread_m)
        )
    here = None if known is None else known[:, None]
    means = _average(x_nbrc, here)
    x_nbrc -= means[..., None, None]
    grey = functools.reduce(np.add, (x_nbrc[:, band] for band in range(bands))) * np.float32(1 / bands)
    right = grey[:, :, 1:] - grey[:, :, :-1]
    fine = _power(grey[:, 1:] - grey[:, :-1], pairs.down) + _power(right, pairs.right)
    coarse = _power(grey[:, COARSE_PX:] - grey[:, :-COARSE_PX], pairs.far_down)
    coarse += _power(grey[:, :, COARSE_PX:] - grey[:, :, :-COARSE_PX], pairs.far_right)
    columns = [
        means,
        _log(_power(x_nbrc, here)),
        _log(_power(x_nbrc[:, 1:] - x_nbrc[:, :-1], here)),
        _log(fine / np.float32(2))[:, None],
        _log(coarse / np.float32(2))[:, None],
        _log(_power(right[:, 1:] - right[:, :-1], pairs.mixed))[:, None],
    ]
    if bands > 1:
        tint = x_nbrc[:, -1] - x_nbrc[:, 0]
        columns.append(_log(_power(tint[:, :, 1:] - tint[:, :, :-1], pairs.right))[:, None])
    columns += [np.log(_average(a, known) + np.float32(HEIGHT_FLOOR_M))[:, None] for a in (mean_m, spread_m)]
    return np.concatenate(columns, axis=1)


class _Pairs:
    """Which pairs of pixels, and squares of four, are known altogether; None: all."""

    def __init__(self, known: NDArray[np.bool_] | None) -> None:
        self.down = self.right = self.far_down = self.far_right = self.mixed = None
        if known is not None:
            self.down, self.right = known[:, 1:] & known[:, :-1], known[:, :, 1:] & known[:, :, :-1]
            self.far_down = known[:, COARSE_PX:] & known[:, :-COARSE_PX]
            self.far_right = known[:, :, COARSE_PX:] & known[:, :, :-COARSE_PX]
            self.mixed = self.right[:, 1:] & self.right[:, :-1]


def _average(values: Float32, known: NDArray[np.bool_] | None) -> Float32:
    """Mean over the last two axes of what is known; the rest is 0."""
    flat = values.reshape(*values.shape[:-2], values.shape[-2] * values.shape[-1])
    return np.asarray(flat.sum(axis=-1) / _count(values, known), np.float32)


def _power(values: Float32, known: NDArray[np.bool_] | None) -> Float32:
    """Mean square over the last two axes of what is known; 0 where nothing is, as of pairs in a comb of single columns."""
    if known is not None:
        values = np.where(known, values, np.float32(0))
    flat = values.reshape(*values.shape[:-2], values.shape[-2] * values.shape[-1])
    return np.asarray(np.einsum("...i,...i->...", flat, flat) / _count(values, known), np.float32)


def _count(values: Float32, known: NDArray[np.bool_] | None) -> NDArray[np.int64]:
    every = values.shape[-2] * values.shape[-1]
    return np.asarray(every if known is None else np.maximum(known.sum(axis=(-2, -1)), 1), np.int64)


def _log(variance: NDArray[Any]) -> Float32:
    return np.asarray(np.log(variance + np.float32(FLOOR)) / 2, np.float32)


class StripSquares:
    """The squares of a sheet whose strips come from the top: rows wait until those of their squares are there."""

    def __init__(self, box: Box, *, mean: Sequence[float], std: Sequence[float]) -> None:
        """Begin.

        Args:
            box: The sheet, in lattice pixels.
            mean: The contract's, per band.
            std: The contract's, per band.
        """
        self._box, self._mean, self._std = box, tuple(mean), tuple(std)
        self._top = box.row0
        self._waiting: list[tuple[NDArray[Any], ...]] = []

    def add(
        self, box: Box, image_brc: NDArray[Any], known_rc: NDArray[np.bool_], mean_m: Float32, spread_m: Float32
    ) -> Squares:
        """Take the next strip, which is as wide as the sheet, and measure the squares that it completes.

        Args:
            box: Where the strip lies.
            image_brc: Its imagery.
            known_rc: Where there is imagery and a height.
            mean_m: (row, col) predicted height.
            spread_m: Its standard deviation.

        Returns:
            The squares, at lattice pixels.
        """
        held = self._top + sum(part[1].shape[0] for part in self._waiting)
        assert (box.row0, box.col0, box.col1) == (held, self._box.col0, self._box.col1), f"{box} does not follow row {held}"
        self._waiting.append((image_brc, known_rc, mean_m, spread_m))
        last = box.row1 == self._box.row1
        stop = box.row1 if last else box.row1 // SQUARE_PX * SQUARE_PX
        if stop <= self._top:
            # The strip's own arrays may be views of more than is needed until the next one comes.
            self._waiting[-1] = tuple(a.copy() for a in self._waiting[-1])
            return Squares.joined([], len(image_brc))
        whole = [
            np.concatenate(parts, axis=-2) if len(parts) > 1 else parts[0] for parts in zip(*self._waiting, strict=True)
        ]
        rows = stop - self._top
        self._waiting = [] if last else [tuple(a[..., rows:, :].copy() for a in whole)]
        # The first row and column of squares may begin outside the sheet, where nothing is known.
        above, left = self._top % SQUARE_PX, self._box.col0 % SQUARE_PX
        image, known, mean, spread = (a[..., :rows, :] for a in whole)
        if above or left:
            edge = ((above, 0), (left, 0))
            image, known, mean, spread = np.pad(image, ((0, 0), *edge)), *(np.pad(a, edge) for a in (known, mean, spread))
        found = measure(image, known, mean, spread, mean=self._mean, std=self._std)
        corner = self._top - above, self._box.col0 - left
        self._top = stop
        return Squares(features=found.features, row=found.row + corner[0], col=found.col + corner[1])

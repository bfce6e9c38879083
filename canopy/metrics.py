"""How far a height map is from a reference, as sums that merge.

Every measure is a property of a small frozen value of sums with a zero and `+`. The sums of two sets of pixels add up to the
sums of their union, so a score taken tile by tile, rank by rank or site by site is the score of the whole set: R² in
particular comes from the sums over the set and is never an average of R² values, which would be another (and worse) number.

Which pixels count: those where `valid` is True (everywhere, when it is not given) and the reference is not NaN. Where such
a pixel has no prediction (NaN) it cannot enter the sums; it is counted in `n_missing`, because a map that leaves out the
hard pixels scores well on the rest. Infinities are not unknowns: they enter the sums and show up in the measures.

Signs and units: bias is prediction minus reference; heights are metres; sums are float64. A measure of an empty set is NaN.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from itertools import pairwise
from typing import Self, TypeVar

import numpy as np
from numpy.typing import ArrayLike, NDArray

CLASS_EDGES_M = (2.0, 5.0, 10.0, 15.0, 20.0, 30.0)
"""Edges between the reference-height classes of reports: the field's usual ones, open at both ends."""

TREE_M = 2.0
"""Least height of a tree in the relative error and the default of tree cover."""

BLOCK_M = 30.0
"""Side of the blocks of block R², as in Tolan et al. (2024) and Brandt et al. (2026): 50 px of 0.6 m."""

RESAMPLED_M = 120.0
"""Side of the squares of ground that the bootstrap resamples: beyond it canopies hardly resemble each other."""

RESAMPLES = 2000
"""Resamples of a bootstrap."""

LEAST_SQUARES = 6
"""Fewest squares for a claim: of n squares that all favour one side, chance would give 2^(1-n), less than 5 % from 6 on."""


def _usable(reference_m: NDArray[np.float64], valid: ArrayLike | None) -> NDArray[np.bool_]:
    usable = ~np.isnan(reference_m)
    if valid is not None:
        mask = np.asarray(valid)
        assert mask.dtype == bool, f"valid has dtype {mask.dtype}, bool is required"
        assert mask.shape == reference_m.shape, f"valid {mask.shape} and reference {reference_m.shape} differ in shape"
        usable &= mask
    return usable


def _pairs(
    prediction_m: ArrayLike, reference_m: ArrayLike, valid: ArrayLike | None
) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.bool_], int]:
    """Float64 prediction and reference in full, where both are known, and the number of pixels without a prediction."""
    prediction = np.asarray(prediction_m, dtype=np.float64)
    reference = np.asarray(reference_m, dtype=np.float64)
    assert prediction.shape == reference.shape, (
        f"prediction {prediction.shape} and reference {reference.shape} differ in shape"
    )
    usable = _usable(reference, valid)
    known = usable & ~np.isnan(prediction)
    return prediction, reference, known, int(usable.sum()) - int(known.sum())


def _ratio(numerator: float, denominator: float) -> float:
    return numerator / denominator if denominator else math.nan


# --- heights -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class HeightSums:
    """Sums of the error of predicted heights over a set of pixels; `HeightSums()` is the empty set.

    Why mean and squared deviation instead of a sum of squares: the total variation of the reference, the denominator of R²,
    is a small difference of large numbers when taken from sums of squares. Merging means and deviations (Chan, Golub and
    LeVeque 1979, "Updating formulae and a pairwise algorithm for computing sample variances") does not cancel.
    """

    n: int = 0
    """Pixels with a reference and a prediction."""
    n_missing: int = 0
    """Pixels with a reference but no prediction."""
    error_sum_m: float = 0.0
    """Sum of prediction - reference."""
    absolute_sum_m: float = 0.0
    """Sum of |prediction - reference|."""
    square_sum_m2: float = 0.0
    """Sum of (prediction - reference)²."""
    reference_mean_m: float = 0.0
    """Mean of the reference; 0 for the empty set."""
    reference_deviation_m2: float = 0.0
    """Sum of (reference - its mean)²."""
    n_trees: int = 0
    """Pixels of `n` whose reference is at least 2 m."""
    relative_sum: float = 0.0
    """Sum of |prediction - reference| / reference over `n_trees`."""

    @classmethod
    def of(cls, prediction_m: ArrayLike, reference_m: ArrayLike, valid: ArrayLike | None = None) -> Self:
        """The sums of arrays of heights of any one shape.

        Args:
            prediction_m: Predicted heights, metres, NaN = no prediction.
            reference_m: Reference heights, metres, same shape, NaN = no reference.
            valid: Boolean, same shape; only pixels where it is True count. None: all.
        """
        prediction, reference, known, missing = _pairs(prediction_m, reference_m, valid)
        reference = reference[known]
        error = prediction[known] - reference
        if not error.size:
            return cls(n_missing=missing)
        mean = float(reference.mean())
        trees = reference >= TREE_M
        return cls(
            n=error.size,
            n_missing=missing,
            error_sum_m=float(error.sum()),
            absolute_sum_m=float(np.abs(error).sum()),
            square_sum_m2=float(np.square(error).sum()),
            reference_mean_m=mean,
            reference_deviation_m2=float(np.square(reference - mean).sum()),
            n_trees=int(trees.sum()),
            relative_sum=float((np.abs(error[trees]) / reference[trees]).sum()),
        )

    def __add__(self, other: HeightSums) -> HeightSums:
        n = self.n + other.n
        share = other.n / n if n else 0.0
        delta_m = other.reference_mean_m - self.reference_mean_m
        return HeightSums(
            n=n,
            n_missing=self.n_missing + other.n_missing,
            error_sum_m=self.error_sum_m + other.error_sum_m,
            absolute_sum_m=self.absolute_sum_m + other.absolute_sum_m,
            square_sum_m2=self.square_sum_m2 + other.square_sum_m2,
            reference_mean_m=self.reference_mean_m + delta_m * share,
            reference_deviation_m2=(
                self.reference_deviation_m2 + other.reference_deviation_m2 + delta_m * delta_m * self.n * share
            ),
            n_trees=self.n_trees + other.n_trees,
            relative_sum=self.relative_sum + other.relative_sum,
        )

    @property
    def mae_m(self) -> float:
        """Mean absolute error."""
        return _ratio(self.absolute_sum_m, self.n)

    @property
    def rmse_m(self) -> float:
        """Root of the mean squared error."""
        return math.sqrt(_ratio(self.square_sum_m2, self.n))

    @property
    def bias_m(self) -> float:
        """Mean of prediction minus reference: positive where the map is too tall."""
        return _ratio(self.error_sum_m, self.n)

    @property
    def prediction_mean_m(self) -> float:
        """Mean of the prediction; NaN for the empty set, as the measures are."""
        return self.reference_mean_m + self.bias_m

    @property
    def r2(self) -> float:
        """Coefficient of determination, 1 - sum of squared errors / total variation of the reference.

        0 is what the mean of the reference scores, negative is worse. NaN where the reference does not vary.
        """
        return 1.0 - _ratio(self.square_sum_m2, self.reference_deviation_m2)

    @property
    def nmae(self) -> float:
        """Mean of |prediction - reference| / reference over the pixels whose reference is at least 2 m."""
        return _ratio(self.relative_sum, self.n_trees)

    def summary(self) -> dict[str, float | int]:
        """The measures under their names, for reports and logs."""
        names = ("n", "n_missing", "mae_m", "rmse_m", "bias_m", "r2", "nmae")
        return {name: getattr(self, name) for name in names}


# --- height classes ------------------------------------------------------------------------------------------------------


def class_index(height_m: ArrayLike, edges_m: Sequence[float] = CLASS_EDGES_M) -> NDArray[np.intp]:
    """The class of each height: k where edges_m[k-1] <= height < edges_m[k], 0 below the first edge.

    The classes are open at both ends, so each height has one and the classes of a set add up to the set. NaN gets the last
    index; it is the caller's `valid` that leaves unknown heights out.
    """
    edges = np.asarray(edges_m, dtype=np.float64)
    assert edges.ndim == 1, f"class edges {edges_m} are not a list of heights"
    assert bool((np.diff(edges) > 0).all()), f"class edges {edges_m} do not increase"
    return np.searchsorted(edges, np.asarray(height_m, dtype=np.float64), side="right")


@dataclass(frozen=True, slots=True, kw_only=True)
class ClassSums:
    """`HeightSums` for each class of reference height; classes are those of `class_index`."""

    edges_m: tuple[float, ...]
    """Inner edges of the classes, increasing."""
    classes: tuple[HeightSums, ...]
    """One more than the edges, from the lowest class up."""

    def __post_init__(self) -> None:
        assert len(self.classes) == len(self.edges_m) + 1, f"{len(self.classes)} classes for edges {self.edges_m}"

    @classmethod
    def zero(cls, edges_m: Sequence[float] = CLASS_EDGES_M) -> Self:
        """The empty set."""
        return cls(edges_m=tuple(edges_m), classes=(HeightSums(),) * (len(edges_m) + 1))

    def __add__(self, other: ClassSums) -> ClassSums:
        assert self.edges_m == other.edges_m, f"classes with edges {self.edges_m} and {other.edges_m} do not add up"
        both = zip(self.classes, other.classes, strict=True)
        return ClassSums(edges_m=self.edges_m, classes=tuple(a + b for a, b in both))

    @property
    def total(self) -> HeightSums:
        """The sums over all classes."""
        return sum(self.classes, HeightSums())

    @property
    def labels(self) -> tuple[str, ...]:
        """Names of the classes: `< 2 m`, `2-5 m`, ..., `>= 30 m`."""
        if not self.edges_m:
            return ("all",)
        inner = (f"{low:g}-{high:g} m" for low, high in pairwise(self.edges_m))
        return (f"< {self.edges_m[0]:g} m", *inner, f">= {self.edges_m[-1]:g} m")


def by_class(
    prediction_m: ArrayLike,
    reference_m: ArrayLike,
    edges_m: Sequence[float] = CLASS_EDGES_M,
    valid: ArrayLike | None = None,
) -> ClassSums:
    """The sums of each class of reference height; arguments as in `HeightSums.of` and `class_index`."""
    reference = np.asarray(reference_m, dtype=np.float64)
    usable = _usable(reference, valid)
    index = class_index(reference, edges_m)
    classes = (HeightSums.of(prediction_m, reference, usable & (index == k)) for k in range(len(edges_m) + 1))
    return ClassSums(edges_m=tuple(edges_m), classes=tuple(classes))


# --- intervals -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class IntervalSums:
    """How often closed intervals [lower, upper] hold the reference, and how wide they are; `IntervalSums()` is empty."""

    n: int = 0
    """Pixels with a reference and an interval."""
    n_missing: int = 0
    """Pixels with a reference but without an interval (either end NaN)."""
    n_below: int = 0
    """Pixels whose reference is below the interval."""
    n_above: int = 0
    """Pixels whose reference is above the interval."""
    width_sum_m: float = 0.0
    """Sum of upper - lower."""

    @classmethod
    def of(cls, lower_m: ArrayLike, upper_m: ArrayLike, reference_m: ArrayLike, valid: ArrayLike | None = None) -> Self:
        """The counts of arrays of one shape, in metres; NaN = unknown; only pixels where `valid` is True count."""
        lower = np.asarray(lower_m, dtype=np.float64)
        upper = np.asarray(upper_m, dtype=np.float64)
        assert lower.shape == upper.shape, f"lower {lower.shape} and upper {upper.shape} differ in shape"
        # The width is NaN where either end is: it stands for the interval when pixels are selected.
        width, reference, known, missing = _pairs(upper - lower, reference_m, valid)
        lower, upper, width, reference = lower[known], upper[known], width[known], reference[known]
        assert bool((width >= 0).all()), "an interval has its lower end above its upper end"
        return cls(
            n=width.size,
            n_missing=missing,
            n_below=int((reference < lower).sum()),
            n_above=int((reference > upper).sum()),
            width_sum_m=float(width.sum()),
        )

    def __add__(self, other: IntervalSums) -> IntervalSums:
        return IntervalSums(**{f.name: getattr(self, f.name) + getattr(other, f.name) for f in fields(self)})

    @property
    def coverage(self) -> float:
        """Share of the references inside their interval, ends included."""
        return _ratio(self.n - self.n_below - self.n_above, self.n)

    @property
    def mean_width_m(self) -> float:
        """Mean of upper - lower."""
        return _ratio(self.width_sum_m, self.n)


# --- tree cover ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class CoverCounts:
    """Where prediction and reference see trees of at least `threshold_m`; without counts it is the empty set."""

    threshold_m: float = TREE_M
    """A pixel is tree cover when its height is at least this."""
    n_both: int = 0
    """Tree cover in both."""
    n_prediction_only: int = 0
    """Tree cover in the prediction only."""
    n_reference_only: int = 0
    """Tree cover in the reference only."""
    n_neither: int = 0
    """Tree cover in neither."""
    n_missing: int = 0
    """Pixels with a reference but no prediction."""

    @classmethod
    def of(
        cls,
        prediction_m: ArrayLike,
        reference_m: ArrayLike,
        threshold_m: float = TREE_M,
        valid: ArrayLike | None = None,
    ) -> Self:
        """The counts of arrays of heights; arguments as in `HeightSums.of`."""
        prediction, reference, known, missing = _pairs(prediction_m, reference_m, valid)
        predicted, referred = prediction[known] >= threshold_m, reference[known] >= threshold_m
        return cls(
            threshold_m=threshold_m,
            n_both=int((predicted & referred).sum()),
            n_prediction_only=int((predicted & ~referred).sum()),
            n_reference_only=int((~predicted & referred).sum()),
            n_neither=int((~predicted & ~referred).sum()),
            n_missing=missing,
        )

    def __add__(self, other: CoverCounts) -> CoverCounts:
        assert self.threshold_m == other.threshold_m, (
            f"tree cover at {self.threshold_m} m and at {other.threshold_m} m do not add up"
        )
        return CoverCounts(
            threshold_m=self.threshold_m,
            n_both=self.n_both + other.n_both,
            n_prediction_only=self.n_prediction_only + other.n_prediction_only,
            n_reference_only=self.n_reference_only + other.n_reference_only,
            n_neither=self.n_neither + other.n_neither,
            n_missing=self.n_missing + other.n_missing,
        )

    @property
    def iou(self) -> float:
        """Intersection over union of the two covers; NaN when neither has a tree."""
        return _ratio(self.n_both, self.n_both + self.n_prediction_only + self.n_reference_only)


# --- edges ---------------------------------------------------------------------------------------------------------------


def slope(height_m: ArrayLike, gsd_m: float) -> NDArray[np.float64]:
    """(row, col) magnitude of the Sobel gradient, metres of height per metre of ground; NaN at the rim and beside unknowns.

    The two 3 x 3 Sobel kernels are divided by 8, the sum of their positive weights times the two pixels between them, so a
    plane that rises by one metre per pixel has a gradient of 1 m per pixel; division by the GSD makes that metres per metre.
    """
    h = np.asarray(height_m, dtype=np.float64)
    assert h.ndim == 2, f"gradients need (row, col) arrays, not {h.ndim} dimensions"
    assert gsd_m > 0, f"GSD {gsd_m} m is not positive"
    magnitude = np.full(h.shape, np.nan)
    if min(h.shape) < 3:
        return magnitude
    down = h[2:] - h[:-2]
    right = h[:, 2:] - h[:, :-2]
    along_rows = down[:, :-2] + 2 * down[:, 1:-1] + down[:, 2:]
    along_cols = right[:-2] + 2 * right[1:-1] + right[2:]
    # The kernels do not read the centre, but a gradient at a pixel without a height would be one of nothing.
    magnitude[1:-1, 1:-1] = np.hypot(along_rows, along_cols) / (8 * gsd_m) + 0 * h[1:-1, 1:-1]
    return magnitude


@dataclass(frozen=True, slots=True, kw_only=True)
class EdgeSums:
    """How far the steepness of a predicted surface is from the reference's; `EdgeSums()` is the empty set.

    The edge error of Brandt et al. (2026) is "the difference of the Sobel gradients" of the two; its unit is not published.
    Here it is the mean over pixels of the absolute difference of the two gradient magnitudes of `slope`, in metres of height
    per metre of ground. A pixel counts where all nine of its neighbourhood do, so the rim of what is known never does.
    A flat map scores the mean steepness of the reference, which is therefore kept beside it.
    """

    n: int = 0
    """Pixels whose whole neighbourhood has a reference and a prediction."""
    n_missing: int = 0
    """Pixels whose whole neighbourhood has a reference, but not a prediction."""
    difference_sum: float = 0.0
    """Sum of |slope of the prediction| - |slope of the reference|: negative where the map is too smooth."""
    absolute_sum: float = 0.0
    """Sum of the absolute value of that difference."""
    reference_sum: float = 0.0
    """Sum of |slope of the reference|."""

    @classmethod
    def of(
        cls,
        prediction_m: ArrayLike,
        reference_m: ArrayLike,
        valid: ArrayLike | None = None,
        *,
        gsd_m: float,
        counted: ArrayLike | None = None,
    ) -> Self:
        """The sums of one tile.

        Args:
            prediction_m: (row, col) predicted heights, metres, NaN = no prediction.
            reference_m: (row, col) reference heights, metres, NaN = no reference.
            valid: (row, col) boolean; a pixel counts when its whole neighbourhood is True. None: all are.
            gsd_m: Side of a pixel, metres.
            counted: (row, col) boolean, the pixels to count, whatever their neighbours are; where tiles overlap, each pixel
                is counted in one of them. None: all.
        """
        reference = np.asarray(reference_m, dtype=np.float64)
        known = np.where(_usable(reference, valid), reference, np.nan)
        steep = slope(known, gsd_m)
        predicted, steep, both, missing = _pairs(slope(prediction_m, gsd_m), steep, counted)
        difference = predicted[both] - steep[both]
        return cls(
            n=difference.size,
            n_missing=missing,
            difference_sum=float(difference.sum()),
            absolute_sum=float(np.abs(difference).sum()),
            reference_sum=float(steep[both].sum()),
        )

    def __add__(self, other: EdgeSums) -> EdgeSums:
        return EdgeSums(**{f.name: getattr(self, f.name) + getattr(other, f.name) for f in fields(self)})

    @property
    def error(self) -> float:
        """Mean absolute difference of the gradient magnitudes, metres per metre."""
        return _ratio(self.absolute_sum, self.n)

    @property
    def bias(self) -> float:
        """Mean difference of the gradient magnitudes, metres per metre; negative where the map is too smooth."""
        return _ratio(self.difference_sum, self.n)

    @property
    def reference_mean(self) -> float:
        """Mean gradient magnitude of the reference, metres per metre: what a flat map's error is."""
        return _ratio(self.reference_sum, self.n)


# --- blocks --------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class BlockSums:
    """Sums of prediction and reference over square ground blocks, for R² at a stated ground size.

    Block R² compares means over blocks (50 px = 30 m at 0.6 m in Tolan et al. 2024), which forgives the metre or two by
    which image and LiDAR disagree. It rises with the block's size on the ground, hence the size is part of the value.
    Blocks are counted from the origin of the lattice, so a block cut by a tile edge is completed by the neighbour's sums.
    """

    side_px: int
    """Side of a block in pixels."""
    gsd_m: float
    """Side of a pixel in metres."""
    block: NDArray[np.int64]
    """(block, 2): row and column of each block with a pixel, in lexicographic order."""
    n: NDArray[np.int64]
    """(block,): pixels with prediction and reference."""
    prediction_sum_m: NDArray[np.float64]
    """(block,): sum of the predictions of those pixels."""
    reference_sum_m: NDArray[np.float64]
    """(block,): sum of their references."""
    n_missing: int
    """Pixels, in any block, with a reference but no prediction."""

    @classmethod
    def zero(cls, *, block_m: float, gsd_m: float) -> Self:
        """The empty set for blocks of the whole number of pixels nearest to `block_m`."""
        assert gsd_m > 0, f"GSD {gsd_m} m is not positive"
        assert block_m >= gsd_m, f"blocks of {block_m} m are smaller than a pixel of {gsd_m} m"
        nothing = np.zeros(0, dtype=np.float64)
        return cls(
            side_px=round(block_m / gsd_m),
            gsd_m=gsd_m,
            block=np.zeros((0, 2), dtype=np.int64),
            n=np.zeros(0, dtype=np.int64),
            prediction_sum_m=nothing,
            reference_sum_m=nothing,
            n_missing=0,
        )

    @classmethod
    def of(
        cls,
        prediction_m: ArrayLike,
        reference_m: ArrayLike,
        valid: ArrayLike | None = None,
        *,
        block_m: float,
        gsd_m: float,
        row0: int = 0,
        col0: int = 0,
    ) -> Self:
        """The sums of one tile.

        Args:
            prediction_m: (row, col) predicted heights, metres, NaN = no prediction.
            reference_m: (row, col) reference heights, metres, NaN = no reference.
            valid: (row, col) boolean; only pixels where it is True count. None: all.
            block_m: Wanted side of a block, metres; the side used is `side_m`.
            gsd_m: Side of a pixel, metres.
            row0: Lattice row of the tile's first pixel.
            col0: Lattice column of the tile's first pixel.
        """
        zero = cls.zero(block_m=block_m, gsd_m=gsd_m)
        prediction, reference, known, missing = _pairs(prediction_m, reference_m, valid)
        assert prediction.ndim == 2, f"blocks need (row, col) arrays, not {prediction.ndim} dimensions"
        # Blocks of this tile as a small dense table, one cell per block it touches; `place` is each pixel's cell in it.
        rows, cols = (
            (np.arange(size) + first) // zero.side_px for size, first in zip(known.shape, (row0, col0), strict=True)
        )
        width = int(cols[-1] - cols[0]) + 1
        place = ((rows - rows[0])[:, None] * width + (cols - cols[0])[None, :])[known]
        n = np.bincount(place)
        touched = np.flatnonzero(n)
        return replace(
            zero,
            block=np.stack([rows[0] + touched // width, cols[0] + touched % width], axis=1),
            n=n[touched],
            prediction_sum_m=np.asarray(np.bincount(place, weights=prediction[known])[touched], dtype=np.float64),
            reference_sum_m=np.asarray(np.bincount(place, weights=reference[known])[touched], dtype=np.float64),
            n_missing=missing,
        )

    def __add__(self, other: BlockSums) -> BlockSums:
        assert (self.side_px, self.gsd_m) == (other.side_px, other.gsd_m), (
            f"blocks of {self.side_px} px at {self.gsd_m} m and {other.side_px} px at {other.gsd_m} m do not add up"
        )
        block, place = np.unique(np.concatenate([self.block, other.block]), axis=0, return_inverse=True)
        n = np.zeros(len(block), dtype=np.int64)
        prediction_sum_m, reference_sum_m = np.zeros(len(block)), np.zeros(len(block))
        np.add.at(n, place, np.concatenate([self.n, other.n]))
        np.add.at(prediction_sum_m, place, np.concatenate([self.prediction_sum_m, other.prediction_sum_m]))
        np.add.at(reference_sum_m, place, np.concatenate([self.reference_sum_m, other.reference_sum_m]))
        return replace(
            self,
            block=block,
            n=n,
            prediction_sum_m=prediction_sum_m,
            reference_sum_m=reference_sum_m,
            n_missing=self.n_missing + other.n_missing,
        )

    @property
    def side_m(self) -> float:
        """Side of a block on the ground, metres: what a block R² must be quoted with."""
        return self.side_px * self.gsd_m

    def enough(self, least_fraction: float = 0.5) -> NDArray[np.bool_]:
        """(block,) True where at least this share of a block's pixels have prediction and reference."""
        return self.n >= max(1.0, least_fraction * self.side_px**2)

    def heights(self, *, least_fraction: float = 0.5) -> HeightSums:
        """The sums over block means, each block one sample.

        Args:
            least_fraction: Share of a block's pixels that must have prediction and reference for the block to count; blocks
                with fewer go to `n_missing` of the result.
        """
        enough = self.enough(least_fraction)
        n = self.n[enough]
        sums = HeightSums.of(self.prediction_sum_m[enough] / n, self.reference_sum_m[enough] / n)
        return sums + HeightSums(n_missing=int((~enough).sum()))


# --- how sure a score is -------------------------------------------------------------------------------------------------

BOOTSTRAPPED = ("mae_m", "rmse_m", "bias_m", "r2", "nmae", "reference_mean_m", "prediction_mean_m")
"""The measures of `HeightSums` that `block_bootstrap` knows."""

_BATCH = 2**22
"""Numbers in one draw of resamples, so that memory does not grow with the number of blocks."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Resampled:
    """A measure of many resamples of the blocks of a set, in the order in which they were drawn."""

    values: dict[str, NDArray[np.float64]]
    """By measure of `BOOTSTRAPPED`: (resample,)."""
    blocks: int
    """How many blocks there were to draw from."""

    def __sub__(self, other: Resampled) -> Resampled:
        """The differences, resample by resample: paired when both come from one call of `block_bootstrap`."""
        assert self.blocks == other.blocks, f"{self.blocks} and {other.blocks} blocks are not pairs"
        return replace(self, values={name: value - other.values[name] for name, value in self.values.items()})

    def interval(self, measure: str, level: float = 0.95) -> tuple[float, float]:
        """The percentile interval; NaN where a resample does not have the measure, or with fewer than two blocks."""
        if self.blocks < 2:
            return math.nan, math.nan
        low, high = np.quantile(self.values[measure], [(1 - level) / 2, (1 + level) / 2])
        return float(low), float(high)


def block_bootstrap(
    *sets: Sequence[HeightSums], generator: np.random.Generator, resamples: int = 2000
) -> tuple[Resampled, ...]:
    """Resample blocks of ground with replacement and take the measures of each resample.

    Why blocks: neighbouring pixels err alike, so pixels drawn one by one would give intervals that are far too narrow. A
    block should be larger than the distance over which errors are alike; whole plots are.

    Why not `scipy.stats.bootstrap`: it resamples the observations of one statistic, where here all measures of all sets must
    come from the same draws, which their differences need, and from sums, which one product with the counts of the draws
    gives at once. The intervals are the same (there is a test).

    Args:
        sets: One or more sequences of the sums of the same blocks in the same order, for example of two maps.
        generator: Draws the resamples.
        resamples: How many.

    Returns:
        For each of `sets` its resamples; the k-th resample of all of them has the same blocks.
    """
    count = _pairs_of_blocks(sets)
    centres_m = [sum(blocks, HeightSums()).reference_mean_m for blocks in sets]
    tables = [_moments(blocks, centre_m) for blocks, centre_m in zip(sets, centres_m, strict=True)]
    drawn = _resample(tables, count, generator, resamples)
    both = zip(drawn, centres_m, strict=True)
    return tuple(Resampled(values=_measures(sums, centre_m), blocks=count) for sums, centre_m in both)


Additive = TypeVar("Additive", IntervalSums, CoverCounts, EdgeSums)
"""Sums that are added field by field, so that a resample has sums of its own."""


def resample_sums(
    *sets: Sequence[Additive], measures: Sequence[str], generator: np.random.Generator, resamples: int = 2000
) -> tuple[Resampled, ...]:
    """`block_bootstrap` for the other sums.

    Args:
        sets: One or more sequences of the sums of the same blocks in the same order.
        measures: Names of the properties to take of each resample.
        generator: Draws the resamples.
        resamples: How many.

    Returns:
        For each of `sets` its resamples; the k-th resample of all of them has the same blocks.
    """
    count = _pairs_of_blocks(sets)
    # What tells two sets apart without being counted, such as the threshold of a tree, stays as it is.
    added = [f.name for f in fields(sets[0][0]) if f.name != "threshold_m"]
    tables = [np.array([[getattr(b, name) for name in added] for b in blocks], dtype=np.float64) for blocks in sets]
    found = []
    for blocks, drawn in zip(sets, _resample(tables, count, generator, resamples), strict=True):
        totals = [replace(blocks[0], **dict(zip(added, row, strict=True))) for row in drawn.tolist()]
        values = {name: np.array([getattr(total, name) for total in totals], dtype=np.float64) for name in measures}
        found.append(Resampled(values=values, blocks=count))
    return tuple(found)


def _pairs_of_blocks(sets: Sequence[Sequence[object]]) -> int:
    count = len(sets[0])
    assert count, "no block to resample"
    assert all(len(blocks) == count for blocks in sets), f"{[len(blocks) for blocks in sets]} blocks are not pairs"
    return count


def _resample(
    tables: Sequence[NDArray[np.float64]], count: int, generator: np.random.Generator, resamples: int
) -> list[NDArray[np.float64]]:
    """Of each table (block, column) the column sums of each resample, (resample, column)."""
    drawn: list[list[NDArray[np.float64]]] = [[] for _ in tables]
    rows = max(1, _BATCH // count)
    for start in range(0, resamples, rows):
        times = generator.multinomial(count, np.full(count, 1 / count), size=min(rows, resamples - start)).astype(np.float64)
        for sums, table in zip(drawn, tables, strict=True):
            sums.append(times @ table)
    return [np.concatenate(sums) for sums in drawn]


def _moments(blocks: Sequence[HeightSums], centre_m: float) -> NDArray[np.float64]:
    """(block, 8): what a resample adds up.

    n, the sums of error, |error| and error², of the reference's deviation from `centre_m` and its square, the trees and the
    sum of their relative errors.

    Deviations from the mean of the whole set, so that the variation of a resample does not come from sums of large squares.
    """
    return np.array(
        [
            (
                b.n,
                b.error_sum_m,
                b.absolute_sum_m,
                b.square_sum_m2,
                b.n * (b.reference_mean_m - centre_m),
                b.reference_deviation_m2 + b.n * (b.reference_mean_m - centre_m) ** 2,
                b.n_trees,
                b.relative_sum,
            )
            for b in blocks
        ],
        dtype=np.float64,
    )


def _measures(sums: NDArray[np.float64], centre_m: float) -> dict[str, NDArray[np.float64]]:
    n, error, absolute, square, first, second, trees, relative = sums.T
    # A resample of blocks without a pixel has no measure, and one of flat blocks no R²: NaN, as in `HeightSums`.
    n = np.where(n > 0, n, np.nan)
    deviation = second - first**2 / n
    return {
        "mae_m": absolute / n,
        "rmse_m": np.sqrt(square / n),
        "bias_m": error / n,
        "r2": 1 - square / np.where(deviation > 0, deviation, np.nan),
        "nmae": relative / np.where(trees > 0, trees, np.nan),
        "reference_mean_m": centre_m + first / n,
        "prediction_mean_m": centre_m + (first + error) / n,
    }

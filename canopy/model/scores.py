"""The figures of a model by site, next to its baselines and with their intervals, and the file that keeps them.

Everything is made from sums that merge (`canopy.metrics`), chip by chip, so that a site of any size is scored in little
memory. The figures, with what else a card says that is not in the contract, are the model folder's `metrics.json`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, NonNegativeInt, PositiveInt, ValidationError

from canopy.errors import ContractError
from canopy.metrics import (
    BLOCK_M,
    LEAST_SQUARES,
    RESAMPLED_M,
    RESAMPLES,
    BlockSums,
    ClassSums,
    EdgeSums,
    HeightSums,
    Resampled,
    block_bootstrap,
    by_class,
)
from canopy.model.calibration import Coverage
from canopy.model.evaluate import ChipResult, Heights

FILE = "metrics.json"

How = Literal["unseen site", "never-used site", "held-out blocks"]
"""How a model came to be judged on a site: by the model of the run without that site; by the model itself, which has never
used it; or by the model itself on blocks held out of a site whose other blocks trained it."""

Verdict = Literal["better", "as good", "worse", "too few blocks"]


class _Value(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


Interval = tuple[float, float] | None
"""Percentile 95 % interval of the block bootstrap; None where it could not be had."""


class Figures(_Value):
    """One map against the reference; None where a measure does not exist, such as R² where the reference is flat."""

    n: NonNegativeInt
    n_missing: NonNegativeInt
    mae_m: float | None
    mae_95_m: Interval
    rmse_m: float | None
    rmse_95_m: Interval
    bias_m: float | None
    bias_95_m: Interval
    r2: float | None
    r2_95: Interval
    nmae: float | None
    block_r2: float | None
    """R² of the means of the blocks."""
    edge_error: float | None
    """Mean absolute difference of the gradient magnitudes, metres per metre (`canopy.metrics.EdgeSums`)."""
    edge_bias: float | None
    """Its signed mean: negative where the map is too smooth."""


class ClassFigures(_Value):
    """The model in one class of true height."""

    label: str
    n: NonNegativeInt
    mae_m: float | None
    rmse_m: float | None
    bias_m: float | None


class Score(_Value):
    """The model and its baselines on one site."""

    site: str
    how: How
    gsd_m: float
    chips: PositiveInt
    squares: PositiveInt
    """Squares of `RESAMPLED_M` with a pixel in them, which the intervals were drawn from."""
    block_m: float
    """Side of the blocks of block R² that whole pixels give, nearest to `BLOCK_M`."""
    blocks: NonNegativeInt
    """Blocks of which at least half is known."""
    model: Figures
    training_mean: Figures
    random_forest: Figures
    mae_difference_95_m: Interval
    """Of the model's mean absolute error minus the random forest's, on the same squares in every resample."""
    rmse_difference_95_m: Interval
    r2_difference_95: Interval
    classes: tuple[ClassFigures, ...]

    def against_forest(self, measure: Literal["mae", "rmse"] = "mae") -> Verdict:
        """Whether the model is better than the random forest: only where the interval of the difference excludes 0."""
        difference = self.mae_difference_95_m if measure == "mae" else self.rmse_difference_95_m
        if difference is None or self.squares < LEAST_SQUARES:
            return "too few blocks"
        low, high = difference
        return "better" if high < 0 else "worse" if low > 0 else "as good"


class Source(_Value):
    """What trained the model, for the table of the card."""

    site: str
    chips: PositiveInt
    image_source: str
    lidar_source: str
    licence: str


class SiteCoverage(_Value):
    """What the intervals held of one site that had no part in making them."""

    site: str
    how: Literal["left out of the fit", "not used in the fit"]
    n: NonNegativeInt
    coverage: float | None
    mean_width_m: float | None

    @classmethod
    def of(cls, site: str, how: Literal["left out of the fit", "not used in the fit"], coverage: Coverage) -> SiteCoverage:
        """From the sums."""
        total = coverage.total
        return cls(site=site, how=how, n=total.n, coverage=_known(total.coverage), mean_width_m=_known(total.mean_width_m))


class Metrics(_Value):
    """All that was measured of a model, and what was said of its training: with the contract, all that its card says."""

    format: Literal[1] = 1
    steps: PositiveInt
    """Optimiser steps."""
    start: str
    """What the weights were before the first step."""
    sources: tuple[Source, ...]
    folds: tuple[str, ...]
    """Sites judged by the runs without them."""
    training_mean_m: float
    """What the constant baseline says."""
    forest_px: NonNegativeInt
    """Training pixels that the random forest saw."""
    scores: tuple[Score, ...]
    coverage: tuple[SiteCoverage, ...]
    not_for: tuple[str, ...]
    """What the recipe warns of."""


def metrics_text(metrics: Metrics) -> str:
    """What the file of a model folder holds."""
    return metrics.model_dump_json(indent=1) + "\n"


def read_metrics(folder: Path) -> Metrics:
    """The metrics of a model folder.

    Raises:
        ContractError: the file is missing or not one that this version reads.
    """
    path = folder / FILE
    try:
        return Metrics.model_validate_json(path.read_bytes())
    except FileNotFoundError as error:
        raise ContractError(f"{path} is missing: the model was not scored here; its card.md says what is known") from error
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise ContractError(f"{path}: {where or 'the file'}: {first['msg']}; restore the file") from error


# --- from chips to figures -----------------------------------------------------------------------------------------------


@dataclass(slots=True)
class _Map:
    """The running sums of one of the three maps of a site."""

    squares: dict[tuple[str, int, int], HeightSums] = field(default_factory=dict)
    """By CRS, row and column of the square."""
    blocks: dict[str, BlockSums] = field(default_factory=dict)
    """By CRS: lattices of two do not share their blocks."""
    edges: EdgeSums = field(default_factory=EdgeSums)

    def add(self, heights_m: Heights, chip: ChipResult) -> None:
        for square, (rows, cols) in _squares(chip):
            counts = chip.counts[rows, cols]
            if counts.any():
                sums = HeightSums.of(heights_m[rows, cols], chip.true_m[rows, cols], counts)
                self.squares[square] = self.squares.get(square, HeightSums()) + sums
        blocks = BlockSums.of(
            heights_m,
            chip.true_m,
            chip.counts,
            block_m=BLOCK_M,
            gsd_m=chip.gsd_m,
            row0=chip.row_px,
            col0=chip.col_px,
        )
        self.blocks[chip.crs] = self.blocks[chip.crs] + blocks if chip.crs in self.blocks else blocks
        self.edges += EdgeSums.of(heights_m, chip.true_m, gsd_m=chip.gsd_m, counted=chip.counts)

    def block_heights(self) -> HeightSums:
        return sum((blocks.heights() for blocks in self.blocks.values()), HeightSums())

    def figures(self, resampled: Resampled) -> Figures:
        total = sum(self.squares.values(), HeightSums())
        blocks = self.block_heights()
        return Figures(
            n=total.n,
            n_missing=total.n_missing,
            mae_m=_known(total.mae_m),
            mae_95_m=_interval(resampled, "mae_m"),
            rmse_m=_known(total.rmse_m),
            rmse_95_m=_interval(resampled, "rmse_m"),
            bias_m=_known(total.bias_m),
            bias_95_m=_interval(resampled, "bias_m"),
            r2=_known(total.r2),
            r2_95=_interval(resampled, "r2"),
            nmae=_known(total.nmae),
            block_r2=_known(blocks.r2) if blocks.n > 1 else None,
            edge_error=_known(self.edges.error),
            edge_bias=_known(self.edges.bias),
        )


def _squares(chip: ChipResult) -> Iterable[tuple[tuple[str, int, int], tuple[slice, slice]]]:
    """The squares of the lattice that a chip's pixels belong to, each with its part of the chip.

    A plot that fits in a square is one observation, wherever the lattice cuts it: it goes with the square of its centre.
    """
    side = max(1, round(RESAMPLED_M / chip.gsd_m))
    within = [np.flatnonzero(chip.counts.any(axis=axis)) for axis in (1, 0)]
    first = chip.row_px, chip.col_px
    if max(int(at[-1] - at[0]) for at in within) < side:
        row, col = ((start + int(at[0] + at[-1]) // 2) // side for start, at in zip(first, within, strict=True))
        yield (chip.crs, row, col), (slice(None), slice(None))
        return
    spans = []
    for start, size in zip(first, chip.counts.shape, strict=True):
        numbers = range(start // side, (start + size - 1) // side + 1)
        spans.append([(k, slice(max(k * side - start, 0), min((k + 1) * side - start, size))) for k in numbers])
    for row, rows in spans[0]:
        for col, cols in spans[1]:
            yield (chip.crs, row, col), (rows, cols)


def score_sites(
    chips: Iterable[ChipResult], how: Mapping[str, How], mean_m: float, *, edges_m: Sequence[float], seed: int
) -> list[Score]:
    """Scores by site, in the order of their names; a site with chips of two GSDs has two.

    Args:
        chips: Held-out chips, read once; those that are not scored are passed over.
        how: By site, how the model came to be judged on it.
        mean_m: What the constant baseline says.
        edges_m: Inner edges of the classes of true height.
        seed: Of the bootstrap; each site has draws of its own, whatever other sites there are.
    """
    sites: dict[tuple[str, float], _Site] = {}
    for chip in chips:
        if chip.scores:
            site = sites.setdefault((chip.site, chip.gsd_m), _Site(classes=ClassSums.zero(edges_m)))
            site.add(chip, mean_m)
    return [
        site.score(name, gsd_m, how[name], np.random.default_rng([seed, *name.encode()]))
        for (name, gsd_m), site in sorted(sites.items())
    ]


@dataclass(slots=True)
class _Site:
    """The running sums of a site."""

    classes: ClassSums
    chips: int = 0
    model: _Map = field(default_factory=_Map)
    training_mean: _Map = field(default_factory=_Map)
    random_forest: _Map = field(default_factory=_Map)

    def add(self, chip: ChipResult, mean_m: float) -> None:
        self.chips += 1
        self.classes += by_class(chip.mean_m, chip.true_m, self.classes.edges_m, chip.counts)
        self.model.add(chip.mean_m, chip)
        self.training_mean.add(np.where(np.isnan(chip.true_m), np.float32(np.nan), np.float32(mean_m)), chip)
        self.random_forest.add(chip.forest_m, chip)

    def score(self, site: str, gsd_m: float, how: How, generator: np.random.Generator) -> Score:
        maps = self.model, self.training_mean, self.random_forest
        names = sorted(self.model.squares)
        squares = ([m.squares[name] for name in names] for m in maps)
        model, mean, forest = block_bootstrap(*squares, generator=generator, resamples=RESAMPLES)
        difference = model - forest
        return Score(
            site=site,
            how=how,
            gsd_m=gsd_m,
            chips=self.chips,
            squares=len(names),
            block_m=next(iter(self.model.blocks.values())).side_m,
            blocks=self.model.block_heights().n,
            model=self.model.figures(model),
            training_mean=self.training_mean.figures(mean),
            random_forest=self.random_forest.figures(forest),
            mae_difference_95_m=_interval(difference, "mae_m"),
            rmse_difference_95_m=_interval(difference, "rmse_m"),
            r2_difference_95=_interval(difference, "r2"),
            classes=tuple(
                ClassFigures(label=label, n=c.n, mae_m=_known(c.mae_m), rmse_m=_known(c.rmse_m), bias_m=_known(c.bias_m))
                for label, c in zip(self.classes.labels, self.classes.classes, strict=True)
            ),
        )


def _known(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _interval(resampled: Resampled, measure: str) -> Interval:
    low, high = resampled.interval(measure)
    return (low, high) if math.isfinite(low) and math.isfinite(high) else None

"""Chips as tensors: crops, augmentation, and batches that are a function of (seed, step).

Nothing here keeps a position. A batch is computed from its step number alone, so a run that is resumed at step k, with any
number of loader processes, sees exactly the batches that it would have seen. Files are opened per chip and closed again, so
the datasets can be sent to loader processes started in any way.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, model_validator
from scipy.ndimage import gaussian_filter
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from canopy.errors import RecipeError
from canopy.tiler.chips import read_chip, read_index

Sample = dict[str, Any]
"""image: uint8 (band, row, col), 0 where there is none; image_valid: bool (row, col), where there is imagery; height_m:
float32 (row, col), NaN unknown; valid: bool (row, col), where a height is known and there is imagery; id, site: str."""

T = TypeVar("T", bound=np.generic)


class Augmentation(BaseModel):
    """What is varied at random, each with its own switch: 0 or false turns it off. Random crops are always taken."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    dihedral: bool = True
    """One of the eight rotations and reflections of the square; nadir imagery has no preferred direction but the sun's."""
    brightness: float = Field(default=0.1, ge=0, le=0.5)
    """Largest shift of all bands, as a share of the data type's range."""
    contrast: float = Field(default=0.2, ge=0, lt=1)
    """Largest relative change of the distance from the crop's mean."""
    gamma: float = Field(default=0.2, ge=0, le=1)
    """Largest absolute logarithm of the exponent on values in [0, 1]."""
    saturation: float = Field(default=0.3, ge=0, lt=1)
    """Largest relative change of the distance from the pixel's mean over the bands."""
    haze: float = Field(default=0.15, ge=0, lt=1)
    """Largest share of a white veil."""
    blur_px: float = Field(default=0.7, ge=0)
    """Largest standard deviation of a Gaussian blur: cameras and resampling differ in sharpness."""


OFF = Augmentation(dihedral=False, brightness=0, contrast=0, gamma=0, saturation=0, haze=0, blur_px=0)
"""Random crops and nothing else."""


class ChipDataset(Dataset[Sample]):
    """The chips of some splits of a tile set, in the order of their ids."""

    def __init__(
        self,
        tile_set: Path,
        split: str | tuple[str, ...],
        crop_px: int | None = None,
        *,
        sites: Sequence[str] | None = None,
        exclude_sites: Sequence[str] = (),
        augmentation: Augmentation | None = None,
        seed: int = 0,
        cache: bool = False,
    ) -> None:
        """Select chips.

        Args:
            tile_set: Folder that `build_tile_set` made.
            split: One split or several.
            crop_px: Side of a sample; smaller chips are padded and masked. Default: whole chips.
            sites: Only chips of these sites; default all.
            exclude_sites: No chips of these sites, as when one is held out.
            augmentation: Random crops and what is switched on; default nothing random: the centre of each chip.
            seed: Item i of epoch e is drawn from (seed, e, i).
            cache: Keep decoded chips in memory; each process keeps its own.

        Raises:
            RecipeError: no tile set, an unknown site, or no chip left.
        """
        index = read_index(tile_set)
        known = set(index["site"])
        if unknown := sorted({*(sites or ()), *exclude_sites} - known):
            raise RecipeError(f"{tile_set} has no site {unknown[0]!r}; its sites are {', '.join(sorted(known))}")
        splits = (split,) if isinstance(split, str) else tuple(split)
        chosen = index["split"].isin(splits) & ~index["site"].isin(list(exclude_sites))
        if sites is not None:
            chosen &= index["site"].isin(list(sites))
        index = index[chosen].sort_values("id")
        if index.empty:
            raise RecipeError(
                f"{tile_set} has no chip in split {'/'.join(splits)} of the sites asked for; change the split or the sites"
            )
        self.tile_set = tile_set
        self.crop_px = crop_px
        self.augmentation = augmentation
        self.seed = seed
        self.epoch = 0
        self.ids: tuple[str, ...] = tuple(index["id"])
        self.sites: tuple[str, ...] = tuple(index["site"])
        self.height_p95_m: NDArray[np.float64] = index["height_p95_m"].to_numpy(np.float64)
        self._cache: dict[int, tuple[NDArray[np.uint8], NDArray[np.bool_], NDArray[np.float32]]] | None = (
            {} if cache else None
        )

    def __len__(self) -> int:
        """Number of chips."""
        return len(self.ids)

    def __getitem__(self, item: int) -> Sample:
        """Chip `item`, drawn from (seed, epoch, item) when there is an augmentation."""
        if not 0 <= item < len(self):
            raise IndexError(f"chip {item} of {len(self)}")
        return self.sample(item, np.random.default_rng([self.seed, self.epoch, item]))

    def __getstate__(self) -> dict[str, Any]:
        """Without the cache: a loader process fills its own faster than it could be sent."""
        return self.__dict__ | {"_cache": None if self._cache is None else {}}

    def sample(self, item: int, generator: np.random.Generator) -> Sample:
        """Chip `item` with its crop and augmentation drawn from `generator`."""
        image, image_valid, height_m = self._chip(item)
        random = self.augmentation is not None
        if self.crop_px is not None:
            row, col = _crop_origin(np.isfinite(height_m), self.crop_px, generator if random else None)
            image = _window(image, row, col, self.crop_px, 0)
            image_valid = _window(image_valid, row, col, self.crop_px, False)
            height_m = _window(height_m, row, col, self.crop_px, np.nan)
        if self.augmentation is not None:
            image = jitter(image, image_valid, self.augmentation, generator)
            if self.augmentation.dihedral:
                turns, flip = int(generator.integers(4)), bool(generator.integers(2))
                image, image_valid = dihedral(image, turns, flip), dihedral(image_valid, turns, flip)
                height_m = dihedral(height_m, turns, flip)
        return {
            "image": torch.from_numpy(np.array(image, copy=True)),
            "image_valid": torch.from_numpy(np.array(image_valid, copy=True)),
            "height_m": torch.from_numpy(np.array(height_m, copy=True)),
            "valid": torch.from_numpy(np.isfinite(height_m) & image_valid),
            "id": self.ids[item],
            "site": self.sites[item],
        }

    def _chip(self, item: int) -> tuple[NDArray[np.uint8], NDArray[np.bool_], NDArray[np.float32]]:
        if self._cache is not None and item in self._cache:
            return self._cache[item]
        pixels, height_m = read_chip(self.tile_set, self.ids[item])
        if pixels.data.dtype != np.uint8:
            raise RecipeError(
                f"chip {self.ids[item]} is {pixels.data.dtype}; training reads uint8, rescale the imagery first"
            )
        if self._cache is not None:
            self._cache[item] = (pixels.data, pixels.valid, height_m)
        return pixels.data, pixels.valid, height_m


def evaluation_chips(
    tile_set: Path, split: str | tuple[str, ...], *, sites: Sequence[str] | None = None, exclude_sites: Sequence[str] = ()
) -> ChipDataset:
    """Whole chips in the order of their ids, nothing random."""
    return ChipDataset(tile_set, split, sites=sites, exclude_sites=exclude_sites)


# --- crops and augmentation ----------------------------------------------------------------------------------------------


def _crop_origin(known: NDArray[np.bool_], crop_px: int, generator: np.random.Generator | None) -> tuple[int, int]:
    """(row, col) of the crop in the chip; negative where the crop hangs over it.

    Why through a pixel: a crop placed uniformly over a chip with large voids may hold no known height at all. Drawing a
    known pixel first, and then one of the crops that hold it, never wastes a sample.
    """
    if generator is None:
        return (known.shape[0] - crop_px) // 2, (known.shape[1] - crop_px) // 2
    pixels = np.flatnonzero(known)
    assert pixels.size, "a chip without a known height is never written"
    through = np.unravel_index(generator.choice(pixels), known.shape)
    origin = []
    for position, side in zip(through, known.shape, strict=True):
        if side <= crop_px:  # anywhere that keeps the whole chip inside
            low, high = side - crop_px, 0
        else:
            low, high = max(0, int(position) - crop_px + 1), min(int(position), side - crop_px)
        origin.append(int(generator.integers(low, high, endpoint=True)))
    return origin[0], origin[1]


def _window(array: NDArray[T], row: int, col: int, side: int, fill: float) -> NDArray[T]:
    """The square window of an array (..., row, col) that starts at (row, col), filled where it hangs over."""
    rows, cols = array.shape[-2:]
    row0, row1, col0, col1 = max(row, 0), min(row + side, rows), max(col, 0), min(col + side, cols)
    out = np.full((*array.shape[:-2], side, side), fill, array.dtype)
    out[..., row0 - row : row1 - row, col0 - col : col1 - col] = array[..., row0:row1, col0:col1]
    return out


def dihedral(array: NDArray[T], turns: int, flip: bool) -> NDArray[T]:
    """An array (..., row, col) turned by `turns` quarters counter-clockwise, then mirrored left to right."""
    turned = np.rot90(array, turns, axes=(-2, -1))
    return turned[..., ::-1] if flip else turned


def jitter(
    image: NDArray[np.uint8], valid: NDArray[np.bool_], amount: Augmentation, generator: np.random.Generator
) -> NDArray[np.uint8]:
    """Vary the light, the air and the lens of an image (band, row, col).

    Values are rounded and saturate at 0 and 255, as a camera's do. Pixels without imagery stay 0 and have no part in the
    statistics. Every amount is drawn whether it is switched on or not, so that one switch does not change the others' draws.
    """
    shift, stretch, log_gamma, chroma = generator.uniform(-1, 1, 4) * (
        amount.brightness, amount.contrast, amount.gamma, amount.saturation,
    )  # fmt: skip
    veil, sigma_px = generator.uniform(0, 1, 2) * (amount.haze, amount.blur_px)
    if not valid.any() or not any((shift, stretch, log_gamma, chroma, veil, sigma_px)):
        return image
    x = image.astype(np.float32) / 255
    x **= np.float32(np.exp(log_gamma))
    mean = x[:, valid].mean(axis=1)[:, None, None]
    x = mean + (x - mean) * np.float32(1 + stretch)
    grey = x.mean(axis=0)
    x = grey + (x - grey) * np.float32(1 + chroma)
    x = (x + np.float32(shift)) * np.float32(1 - veil) + np.float32(veil)
    if sigma_px > 0:
        weight = np.maximum(gaussian_filter(valid.astype(np.float32), sigma_px), np.float32(1e-6))
        x = gaussian_filter(np.where(valid, x, np.float32(0)), (0, sigma_px, sigma_px)) / weight
    return np.where(valid, np.rint(np.clip(x, 0, 1) * 255), 0).astype(np.uint8)


# --- batches -------------------------------------------------------------------------------------------------------------


class TrainingSet(BaseModel):
    """A tile set's part in training; all crops of one batch come from one set, so they have one size and one GSD."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    tile_set: Path
    share: float = Field(default=1.0, gt=0)
    """Share of the batches, relative to the other sets'."""
    batch: int = Field(ge=1)
    """Samples in a batch, of all processes that train together."""
    crop_px: int = Field(ge=32, multiple_of=32)
    split: tuple[str, ...] = ("train",)
    sites: tuple[str, ...] | None = None
    exclude_sites: tuple[str, ...] = ()
    low_below_m: float = 1.0
    low_share: float = Field(default=0.0, ge=0, le=1)
    """Share of the samples drawn from chips whose 95th percentile is below `low_below_m`."""
    tall_above_m: float = 25.0
    tall_share: float = Field(default=0.0, ge=0, le=1)
    """Share of the samples drawn from chips whose 95th percentile is above `tall_above_m`."""

    @model_validator(mode="after")
    def _sum(self) -> Self:
        if self.low_share + self.tall_share > 1:
            raise ValueError(f"low_share + tall_share = {self.low_share + self.tall_share:g} must not exceed 1")
        return self


def chip_weights(height_p95_m: NDArray[np.float64], settings: TrainingSet) -> NDArray[np.float64]:
    """Probability of each chip for one draw, summing to 1.

    A category's share is spread evenly over its chips and the remainder evenly over all chips, so a category's chips are
    drawn *at least* that often. A category without chips leaves its share to all: a savanna set has no tall chip to give.
    """
    count = len(height_p95_m)
    weights = np.zeros(count)
    left = 1.0
    for members, share in (
        (height_p95_m < settings.low_below_m, settings.low_share),
        (height_p95_m > settings.tall_above_m, settings.tall_share),
    ):
        if members.any():
            weights[members] += share / members.sum()
            left -= share
    return weights + left / count


class TrainingBatches(Dataset[Sample]):
    """Item k is the batch of training step k: tensors stacked, ids and sites as lists, `tile_set` the name of its set."""

    def __init__(
        self,
        sets: Sequence[TrainingSet],
        *,
        seed: int,
        steps: int,
        augmentation: Augmentation | None = None,
        rank: int = 0,
        world: int = 1,
        cache: bool = True,
    ) -> None:
        """Open the sets.

        Args:
            sets: Tile sets with their shares.
            seed: Decides, with the step and the place in the batch, everything random.
            steps: Length of the whole training, in batches.
            augmentation: What is varied; default all, at its default strength.
            rank: Of this process among those that train together; it gets the `rank`-th part of every batch.
            world: Number of processes that train together.
            cache: Keep decoded chips in memory.

        Raises:
            RecipeError: no set, or a batch that `world` processes cannot share evenly.
        """
        assert 0 <= rank < world, f"rank {rank} of {world} processes"
        if not sets:
            raise RecipeError("no tile set to train on; name at least one")
        for s in sets:
            if s.batch % world:
                raise RecipeError(
                    f"a batch of {s.batch} samples of {s.tile_set} cannot be shared evenly by {world} processes; "
                    f"make batch a multiple of {world}, such as {-(-s.batch // world) * world}"
                )
        self.settings = tuple(sets)
        self.seed, self.steps, self.rank, self.world = seed, steps, rank, world
        self.chips = tuple(
            ChipDataset(
                s.tile_set,
                s.split,
                s.crop_px,
                sites=s.sites,
                exclude_sites=s.exclude_sites,
                augmentation=Augmentation() if augmentation is None else augmentation,
                cache=cache,
            )
            for s in sets
        )
        self._weights = tuple(chip_weights(c.height_p95_m, s) for c, s in zip(self.chips, sets, strict=True))
        shares = np.array([s.share for s in sets])
        self._shares = shares / shares.sum()

    def __len__(self) -> int:
        """Number of steps."""
        return self.steps

    def __getitem__(self, step: int) -> Sample:
        """The batch of training step `step`."""
        if not 0 <= step < self.steps:
            raise IndexError(f"step {step} of {self.steps}")
        generator = np.random.default_rng([self.seed, step])
        which = int(generator.choice(len(self.settings), p=self._shares))
        chips, settings, weights = self.chips[which], self.settings[which], self._weights[which]
        # Within a batch no chip twice, as long as there are enough that can be drawn.
        again = settings.batch > np.count_nonzero(weights)
        items = generator.choice(len(chips), settings.batch, replace=bool(again), p=weights)
        part = settings.batch // self.world
        return stack(
            [
                chips.sample(int(items[place]), np.random.default_rng([self.seed, step, 1 + place]))
                for place in range(self.rank * part, (self.rank + 1) * part)
            ]
        ) | {"tile_set": chips.tile_set.name}


def stack(samples: Sequence[Sample]) -> Sample:
    """Samples of one size as a batch: tensors stacked along a new first axis, the rest as lists."""
    return {
        key: torch.stack([sample[key] for sample in samples]) if isinstance(value, Tensor) else [s[key] for s in samples]
        for key, value in samples[0].items()
    }


def training_batches(
    sets: Sequence[TrainingSet],
    *,
    seed: int,
    start_step: int,
    steps: int,
    augmentation: Augmentation | None = None,
    rank: int = 0,
    world: int = 1,
    workers: int = 0,
) -> DataLoader[Sample]:
    """The batches of steps [start_step, steps), the same ones whatever `start_step` and `workers` are.

    A batch is that of all processes together: each sample of it is drawn from (seed, step, place in the batch), and a
    process gets its part. So the parts put together do not depend on how many processes there are.

    Args:
        sets: Tile sets with their shares.
        seed: Decides everything random.
        start_step: First step to deliver; where a resumed run goes on.
        steps: Length of the whole training.
        augmentation: What is varied; default all, at its default strength.
        rank: Of this process among those that train together.
        world: Number of processes that train together.
        workers: Loader processes; 0 loads in this one.

    Raises:
        RecipeError: no set, no chip in one of them, or a batch that `world` processes cannot share evenly.
    """
    dataset = TrainingBatches(sets, seed=seed, steps=steps, augmentation=augmentation, rank=rank, world=world)
    return DataLoader(
        dataset,
        batch_size=None,
        sampler=range(start_step, steps),
        num_workers=workers,
        # A forked process inherits the threads' locks of torch and GDAL in whatever state they are.
        multiprocessing_context="spawn" if workers else None,
    )

"""Chips as tensors: crops, and batches that are a function of (seed, step).

Nothing here keeps a position. A batch is computed from its step number alone, so a run that is resumed at step k, with any
number of loader processes, sees exactly the batches that it would have seen. Files are opened per chip and closed again, so
the datasets can be sent to loader processes started in any way.
"""

from __future__ import annotations

import multiprocessing.connection
import os
import signal
import sys
import threading
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Final, Literal, Self, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from canopy.errors import CanopyError, RasterError, RecipeError
from canopy.model.augmentation import Augmentation, crop_side_px, dihedral, draw_light, plot, relight, rescale
from canopy.raster import Pixels
from canopy.tiler.chips import read_chip, read_index

Sample = dict[str, Any]
"""image: uint8 or uint16 (band, row, col), 0 where there is none; image_valid: bool (row, col), where there is imagery;
height_m: float32 (row, col), NaN unknown; valid: bool (row, col), where a height is known and there is imagery; gsd_m:
float; id, site: str."""

T = TypeVar("T", bound=np.generic)

CACHE_MB: Final = 2048
"""Decoded chips that the loader processes keep in memory, all together."""

PREFETCH: Final = 4
"""Batches that a loader process prepares ahead: several, because a batch of chips that must be read takes longer."""


class Imagery(BaseModel):
    """What the model that is trained takes; the fields are those of its contract."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    bands: tuple[str, ...] = ("red", "green", "blue")
    dtype: Literal["uint8", "uint16"] = "uint8"
    value_range: tuple[float, float] = (0.0, 255.0)
    gsd_range_m: tuple[float, float] | None = None
    """GSDs that rescaling may make; default any."""


class ChipCache:
    """Decoded chips, up to a number of bytes; the one that was asked for longest ago goes first.

    A loader process gets it empty: it fills its own faster than it could be sent.
    """

    def __init__(self, limit_bytes: int) -> None:
        self.limit_bytes, self.held_bytes = limit_bytes, 0
        self._chips: OrderedDict[tuple[Path, str], Chip] = OrderedDict()

    def __len__(self) -> int:
        """Number of chips that are held."""
        return len(self._chips)

    def __reduce__(self) -> tuple[Any, ...]:
        """An empty one with the same limit."""
        return ChipCache, (self.limit_bytes,)

    def get(self, key: tuple[Path, str]) -> Chip | None:
        """The chip, if it is held."""
        if key in self._chips:
            self._chips.move_to_end(key)
        return self._chips.get(key)

    def put(self, key: tuple[Path, str], chip: Chip) -> None:
        """Hold a chip, and let go of others where it needs their room; a chip over the limit is not held."""
        size = _size_bytes(chip)
        if key in self._chips or size > self.limit_bytes:
            return
        self._chips[key] = chip
        self.held_bytes += size
        while self.held_bytes > self.limit_bytes:
            self.held_bytes -= _size_bytes(self._chips.popitem(last=False)[1])


Chip = tuple[NDArray[Any], NDArray[np.bool_], NDArray[np.float32]]
"""Image (band, row, col), its validity and heights (row, col)."""


def _size_bytes(chip: Chip) -> int:
    return sum(array.nbytes for array in chip)


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
        imagery: Imagery | None = None,
        seed: int = 0,
        cache: ChipCache | None = None,
    ) -> None:
        """Select chips.

        Args:
            tile_set: Folder that `build_tile_set` made.
            split: One split or several.
            crop_px: Side of a sample; smaller chips are padded and masked. Default: whole chips.
            sites: Only chips of these sites; default all.
            exclude_sites: No chips of these sites, as when one is held out.
            augmentation: Random crops and what is switched on; default nothing random: the centre of each chip.
            imagery: What the model takes, which every chip must be; default whatever the chips are or, where they are
                augmented, 8-bit red, green and blue.
            seed: Item i of epoch e is drawn from (seed, e, i).
            cache: Where decoded chips are kept; default nowhere.

        Raises:
            RecipeError: no tile set, an unknown site, or no chip left.
        """
        if augmentation is not None and augmentation.jpeg and imagery is not None and imagery.dtype != "uint8":
            raise RecipeError(f"augmentation.jpeg is for uint8 imagery, not {imagery.dtype}; set it to 0")
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
        self.imagery = Imagery() if imagery is None and augmentation is not None else imagery
        self.seed = seed
        self.epoch = 0
        self.ids: tuple[str, ...] = tuple(index["id"])
        self.sites: tuple[str, ...] = tuple(index["site"])
        self.gsd_m: NDArray[np.float64] = index["gsd_m"].to_numpy(np.float64)
        self.height_p95_m: NDArray[np.float64] = index["height_p95_m"].to_numpy(np.float64)
        self.height_mean_m: NDArray[np.float64] = index["height_mean_m"].to_numpy(np.float64)
        self._cache = cache

    def __len__(self) -> int:
        """Number of chips."""
        return len(self.ids)

    def __getitem__(self, item: int) -> Sample:
        """Chip `item`, drawn from (seed, epoch, item) when there is an augmentation."""
        if not 0 <= item < len(self):
            raise IndexError(f"chip {item} of {len(self)}")
        return self.sample(item, np.random.default_rng([self.seed, self.epoch, item]))

    def sample(self, item: int, generator: np.random.Generator) -> Sample:
        """Chip `item` with its crop and augmentation drawn from `generator`.

        Raises:
            RecipeError: the chip's files are missing or damaged, or not what the model takes.
        """
        image, image_valid, height_m = self.chip(item)
        gsd_m = float(self.gsd_m[item])
        amount = self.augmentation
        place, scaling, turning, lighting, cutting = generator.spawn(5)
        if self.crop_px is not None:
            side_px = self.crop_px
            if amount is not None:
                longest_px = max(side_px, min(height_m.shape))
                side_px = crop_side_px(amount.scale, side_px, longest_px, self._ratios(gsd_m), scaling)
            row, col = _crop_origin(np.isfinite(height_m), side_px, None if amount is None else place)
            image = _window(image, row, col, side_px, 0)
            image_valid = _window(image_valid, row, col, side_px, False)
            height_m = _window(height_m, row, col, side_px, np.nan)
            image, image_valid, height_m = rescale(image, image_valid, height_m, self.crop_px)
            gsd_m *= side_px / self.crop_px
        if amount is not None:
            assert self.imagery is not None, "augmentation knows its imagery"
            if (left := plot(amount.plot, np.isfinite(height_m) & image_valid, cutting)) is not None:
                hidden = np.ones(height_m.shape, bool)
                hidden[left] = False
                image = np.where(hidden, image.dtype.type(0), image)
                image_valid, height_m = image_valid & ~hidden, np.where(hidden, np.float32(np.nan), height_m)
            bands, value_range = self.imagery.bands, self.imagery.value_range
            light = draw_light(amount, len(bands), lighting)
            image = relight(image, image_valid, light, bands=bands, gsd_m=gsd_m, value_range=value_range)
            if amount.dihedral:
                turns, flip = int(turning.integers(4)), bool(turning.integers(2))
                image, image_valid = dihedral(image, turns, flip), dihedral(image_valid, turns, flip)
                height_m = dihedral(height_m, turns, flip)
        return {
            "image": torch.from_numpy(np.array(image, copy=True)),
            "image_valid": torch.from_numpy(np.array(image_valid, copy=True)),
            "height_m": torch.from_numpy(np.array(height_m, copy=True)),
            "valid": torch.from_numpy(np.isfinite(height_m) & image_valid),
            "gsd_m": gsd_m,
            "id": self.ids[item],
            "site": self.sites[item],
        }

    def _ratios(self, gsd_m: float) -> tuple[float, float]:
        """Least and largest change of the GSD that stay in the model's range."""
        low_m, high_m = (self.imagery and self.imagery.gsd_range_m) or (0.0, np.inf)
        return low_m / gsd_m, high_m / gsd_m

    def chip(self, item: int) -> Chip:
        """Chip `item` whole, from the cache or its files.

        Raises:
            RecipeError: its files are missing or damaged, or not what the model takes.
        """
        key = self.tile_set, self.ids[item]
        if self._cache is not None and (held := self._cache.get(key)) is not None:
            return held
        chip = self._read(self.ids[item])
        if self._cache is not None:
            self._cache.put(key, chip)
        return chip

    def _read(self, name: str) -> Chip:
        """Read and check a chip."""
        try:
            pixels, height_m = read_chip(self.tile_set, name)
        except RasterError as error:
            raise RecipeError(
                f"chip {name} of {self.tile_set} cannot be read: {error}; build the tile set again, or restore the file"
            ) from error
        where = f"chip {name} of {self.tile_set}"
        if pixels.valid.shape != height_m.shape:
            raise RecipeError(
                f"{where} has an image of {_sides(pixels.valid)} px and heights of {_sides(height_m)} px; "
                f"build the tile set again"
            )
        if height_m.dtype != np.float32:
            raise RecipeError(f"{where} has heights in {height_m.dtype} instead of float32; build the tile set again")
        if not (np.isfinite(height_m) & pixels.valid).any():
            raise RecipeError(f"{where} has no known height; take it out, or build the tile set again")
        if self.imagery is not None:
            self._check(where, pixels, self.imagery)
        elif pixels.data.dtype not in (np.uint8, np.uint16):
            raise RecipeError(f"{where} is {pixels.data.dtype}; chips hold uint8 or uint16, rescale the imagery")
        image = pixels.data if pixels.valid.all() else np.where(pixels.valid, pixels.data, pixels.data.dtype.type(0))
        return image, pixels.valid, height_m

    @staticmethod
    def _check(where: str, pixels: Pixels, takes: Imagery) -> None:
        if pixels.data.dtype != takes.dtype:
            raise RecipeError(
                f"{where} is {pixels.data.dtype}, but the model takes {takes.dtype}; rescale the imagery of the tile set"
            )
        if len(pixels.data) != len(takes.bands):
            raise RecipeError(
                f"{where} has {len(pixels.data)} bands, but the model takes {', '.join(takes.bands)}; "
                f"set `bands` of the tile set or of the model"
            )
        low, high = takes.value_range
        shown = pixels.data if pixels.valid.all() else pixels.data[:, pixels.valid]
        if shown.min() < low or shown.max() > high:
            raise RecipeError(
                f"{where} holds values from {shown.min()} to {shown.max()}, outside the model's value_range {low:g} to "
                f"{high:g}; widen it, or rescale the imagery"
            )


def _sides(array: NDArray[Any]) -> str:
    return " x ".join(str(side) for side in array.shape)


def evaluation_chips(
    tile_set: Path, split: str | tuple[str, ...], *, sites: Sequence[str] | None = None, exclude_sites: Sequence[str] = ()
) -> ChipDataset:
    """Whole chips in the order of their ids, nothing random."""
    return ChipDataset(tile_set, split, sites=sites, exclude_sites=exclude_sites)


# --- crops -------------------------------------------------------------------------------------------------------------


def _crop_origin(known: NDArray[np.bool_], crop_px: int, generator: np.random.Generator | None) -> tuple[int, int]:
    """(row, col) of the crop in the chip; negative where the crop hangs over it.

    Why through a pixel: a crop placed uniformly over a chip with large voids may hold no known height at all. Drawing a
    known pixel first, and then one of the crops that hold it, never wastes a sample.
    """
    if generator is None:
        return (known.shape[0] - crop_px) // 2, (known.shape[1] - crop_px) // 2
    pixels = np.flatnonzero(known)
    assert pixels.size, "a chip without a known height is never written"
    through = np.unravel_index(pixels[generator.integers(pixels.size)], known.shape)
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


# --- batches -------------------------------------------------------------------------------------------------------------


class HeightCategories(BaseModel):
    """Shares of the samples that are drawn from low and from tall chips (Brandt et al. 2026, section 3)."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    statistic: Literal["p95", "mean"] = "p95"
    """Of a chip's known heights, which says whether it is low or tall. The 95th percentile of a clearing with one tree is
    low and its maximum tall; the publishers of CHMv2 do not say what they take."""
    low_below_m: float = 1.0
    low_share: float = Field(default=0.0, ge=0, le=1)
    """Share of the samples drawn from chips whose statistic is below `low_below_m`."""
    tall_above_m: float = 25.0
    tall_share: float = Field(default=0.0, ge=0, le=1)
    """Share of the samples drawn from chips whose statistic is above `tall_above_m`."""

    @model_validator(mode="after")
    def _sum(self) -> Self:
        if self.low_share + self.tall_share > 1:
            raise ValueError(f"low_share + tall_share = {self.low_share + self.tall_share:g} must not exceed 1")
        if self.low_below_m > self.tall_above_m:
            raise ValueError(f"low_below_m = {self.low_below_m:g} must not exceed tall_above_m = {self.tall_above_m:g}")
        return self

    def categories(self, height_m: NDArray[np.float64]) -> NDArray[np.intp]:
        """0, 1 and 2 for low, middle and tall chips, of their statistics."""
        return np.digitize(height_m, [self.low_below_m, np.nextafter(self.tall_above_m, np.inf)])


class TrainingSet(HeightCategories):
    """A tile set's part in training; all crops of one batch come from one set, so they have one size."""

    tile_set: Path
    share: float = Field(default=1.0, gt=0)
    """Share of the batches, relative to the other sets'."""
    batch: int = Field(ge=1)
    """Samples in a batch, of all processes that train together."""
    crop_px: int = Field(ge=32, multiple_of=32)
    split: tuple[str, ...] = ("train",)
    sites: tuple[str, ...] | None = None
    exclude_sites: tuple[str, ...] = ()
    imagery: Imagery = Imagery()


def chip_weights(height_m: NDArray[np.float64], settings: TrainingSet) -> NDArray[np.float64]:
    """Probability of each chip for one draw, summing to 1, from the statistic of its heights.

    A category's share is spread evenly over its chips and the remainder evenly over all chips, so a category's chips are
    drawn *at least* that often. A category without chips leaves its share to all: a savanna set has no tall chip to give.
    """
    count, category = len(height_m), settings.categories(height_m)
    weights = np.zeros(count)
    left = 1.0
    for number, share in ((0, settings.low_share), (2, settings.tall_share)):
        members = category == number
        if members.any():
            weights[members] += share / members.sum()
            left -= share
    return weights + left / count


def draw_chips(
    weights: NDArray[np.float64], category: NDArray[np.intp], count: int, generator: np.random.Generator
) -> NDArray[np.intp]:
    """Chips for one batch, in random order, each `count` times its weight on average.

    Why not independent draws: laid end to end in random order within their category, the weights are a line from 0 to 1,
    and one comb of `count` teeth at a random place picks from it (systematic sampling). Every chip is then picked
    floor(count * weight) or one more time, so none comes twice while there are enough, and so do the categories, so that
    every batch has its share of tall trees and not only the average batch. Drawing without replacement would give a
    category with few chips less than its share.
    """
    order = generator.permutation(len(weights))
    order = order[np.argsort(category[order], kind="stable")]
    teeth = (generator.random() + np.arange(count)) / count
    ends = np.cumsum(weights[order])
    picked = np.searchsorted(ends / ends[-1], teeth, side="right")
    return generator.permutation(order[np.minimum(picked, len(order) - 1)])


class TrainingBatches(Dataset[Sample]):
    """Item k is the batch of training step k: tensors stacked, the rest as lists, `tile_set` the name of its set."""

    def __init__(
        self,
        sets: Sequence[TrainingSet],
        *,
        seed: int,
        steps: int,
        augmentation: Augmentation | None = None,
        rank: int = 0,
        world: int = 1,
        cache_bytes: int = CACHE_MB * 2**20,
    ) -> None:
        """Open the sets.

        Args:
            sets: Tile sets with their shares.
            seed: Decides, with the step and the place in the batch, everything random.
            steps: Length of the whole training, in batches.
            augmentation: What is varied; default its own defaults.
            rank: Of this process among those that train together; it gets the `rank`-th part of every batch.
            world: Number of processes that train together.
            cache_bytes: Decoded chips that are kept in memory; a copy in another process keeps as many again.

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
        self.cache = ChipCache(cache_bytes)
        self.chips = tuple(
            ChipDataset(
                s.tile_set,
                s.split,
                s.crop_px,
                sites=s.sites,
                exclude_sites=s.exclude_sites,
                augmentation=Augmentation() if augmentation is None else augmentation,
                imagery=s.imagery,
                cache=self.cache,
            )
            for s in sets
        )
        statistics = [c.height_p95_m if s.statistic == "p95" else c.height_mean_m for c, s in self._pairs()]
        self._categories = tuple(s.categories(h) for h, s in zip(statistics, sets, strict=True))
        self._weights = tuple(chip_weights(h, s) for h, s in zip(statistics, sets, strict=True))
        shares = np.array([s.share for s in sets])
        self._shares = shares / shares.sum()

    def _pairs(self) -> Iterator[tuple[ChipDataset, TrainingSet]]:
        return zip(self.chips, self.settings, strict=True)

    def remarks(self, copies: int = 1) -> list[str]:
        """What the author of the recipe should know about these sets, one line each.

        Args:
            copies: Processes that share the memory for decoded chips, each with a cache of its own.
        """
        lines = []
        for (chips, s), category in zip(self._pairs(), self._categories, strict=True):
            for number, share, what in (
                (0, s.low_share, f"below {s.low_below_m:g} m"),
                (2, s.tall_share, f"above {s.tall_above_m:g} m"),
            ):
                if share > 0 and not (category == number).any():
                    lines.append(
                        f"{chips.tile_set.name} has no training chip with a {s.statistic} {what}; the {share:.0%} of the "
                        f"samples meant for them are drawn from all its chips"
                    )
        needed_mb = sum(len(c) * _size_bytes(c.chip(0)) for c in self.chips) / 2**20
        if needed_mb > self.cache.limit_bytes / 2**20:
            each = f" in each of {copies} loader processes" if copies > 1 else ""
            lines.append(
                f"the training chips take {needed_mb:.0f} MB decoded and {self.cache.limit_bytes / 2**20:.0f} MB are kept"
                f"{each}; the others are read again whenever they are drawn"
            )
        return lines

    def __len__(self) -> int:
        """Number of steps."""
        return self.steps

    def __getitem__(self, step: int) -> Sample:
        """The batch of training step `step`."""
        if not 0 <= step < self.steps:
            raise IndexError(f"step {step} of {self.steps}")
        generator = np.random.default_rng([self.seed, step])
        which = int(generator.choice(len(self.settings), p=self._shares))
        chips, batch = self.chips[which], self.settings[which].batch
        items = draw_chips(self._weights[which], self._categories[which], batch, generator)
        part = batch // self.world
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


# --- loading -------------------------------------------------------------------------------------------------------------


class TrainingLoader(DataLoader[Sample]):
    """The batches of `training_batches`; what goes wrong in a loader process is one line here."""

    def __len__(self) -> int:
        """Batches of the whole training, those before the first one delivered included.

        Why: Lightning goes on counting where the checkpoint's run stopped, and ends the epoch at this number. Were it that
        of the batches left, a run resumed before its half would begin them anew in the middle.
        """
        return len(self.dataset)  # type: ignore[arg-type]

    def __iter__(self) -> Iterator[Sample]:  # type: ignore[override]
        """Batches in the order of their steps."""
        try:
            for batch in super().__iter__():
                if isinstance(batch, CanopyError):
                    raise batch
                yield batch
        except RuntimeError as error:
            if loader_failure(error) is None:
                raise
            # No name for it here: frame and error would keep each other, and with them the loader and its processes.
            raise loader_failure(error) from error  # type: ignore[misc]
        except (ConnectionError, EOFError, FileNotFoundError) as error:
            # A batch is handed over by a socket of the process that made it; that is gone with the process.
            if not self.num_workers:
                raise
            raise RecipeError(_KILLED) from error


_KILLED: Final = (
    "a loader process was killed, most often by the system because memory ran out; "
    "use fewer loader processes (data.workers) or free memory, and go on with --resume"
)


def loader_failure(error: RuntimeError) -> CanopyError | None:
    """The error to tell when a loader process died, or None where `error` is about something else.

    Torch raises it in the main thread as soon as the process is gone, whatever that thread is doing: also in the middle of
    a training step, so who iterates a `TrainingLoader` must ask here about a RuntimeError of the step's.
    """
    return RecipeError(_KILLED) if "DataLoader worker" in str(error) else None


class _Told(Dataset[Any]):
    """Batches, or the error instead of one: raised in a loader process it would arrive with that process' traceback."""

    def __init__(self, batches: TrainingBatches) -> None:
        self.batches = batches

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, step: int) -> Sample | CanopyError:
        try:
            return self.batches[step]
        except CanopyError as error:
            return error


def _as_it_is(batch: Any) -> Any:
    return batch


def _begin(_worker: int) -> None:
    """A loader process has one thread that works, and leaves Ctrl-C to the process that started it, with which it ends.

    Why a watcher: torch's own looks only between batches, and a process with a batch to hand over waits for a reader that
    is gone, for ever, because it holds the reading end of that pipe as well.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(1)
    os.environ["GDAL_NUM_THREADS"] = "1"
    starter = multiprocessing.parent_process()
    assert starter is not None, "a loader process was started by another"

    def leave_with_it() -> None:
        multiprocessing.connection.wait([starter.sentinel])
        os._exit(1)

    threading.Thread(target=leave_with_it, daemon=True).start()


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
    cache_mb: int = CACHE_MB,
) -> TrainingLoader:
    """The batches of steps [start_step, steps), the same ones whatever `start_step` and `workers` are.

    A batch is that of all processes together: each sample of it is drawn from (seed, step, place in the batch), and a
    process gets its part. So the parts put together do not depend on how many processes there are.

    With `workers`, whoever calls this must be importable without training again (`if __name__ == "__main__"`).

    Args:
        sets: Tile sets with their shares.
        seed: Decides everything random.
        start_step: First step to deliver; where a resumed run goes on.
        steps: Length of the whole training.
        augmentation: What is varied; default its own defaults.
        rank: Of this process among those that train together; rank 0 says on standard error what is odd about the sets.
        world: Number of processes that train together.
        workers: Loader processes of this process; 0 loads in this one.
        cache_mb: Memory for decoded chips, of all loader processes of this process together.

    Raises:
        RecipeError: no set, no chip in one of them, a first chip that cannot be used, or a batch that `world` processes
            cannot share evenly; when iterating, a chip that cannot be used or a loader process that was killed.
    """
    copies = max(workers, 1)
    batches = TrainingBatches(
        sets,
        seed=seed,
        steps=steps,
        augmentation=augmentation,
        rank=rank,
        world=world,
        cache_bytes=cache_mb * 2**20 // copies,
    )
    if rank == 0:
        for line in batches.remarks(copies):
            sys.stderr.write(line + "\n")
    return TrainingLoader(
        _Told(batches),
        batch_size=None,
        sampler=range(start_step, steps),
        collate_fn=_as_it_is,
        num_workers=workers,
        prefetch_factor=PREFETCH if workers else None,
        worker_init_fn=_begin,
        # Copying from pinned memory overlaps with computing.
        pin_memory=torch.cuda.is_available(),
        # A forked process inherits the threads' locks of torch and GDAL in whatever state they are.
        multiprocessing_context="spawn" if workers else None,
    )

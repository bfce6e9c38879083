"""From held-out chips to what their squares look like, site by site: what `canopy.model.shift` is fitted on."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from canopy.errors import RecipeError
from canopy.metrics import RESAMPLED_M
from canopy.model.evaluate import ChipResult
from canopy.model.package import Contract
from canopy.model.shift import ShiftReference, SiteSquares, fit_shift
from canopy.model.squares import measure
from canopy.tiler.chips import read_chip, read_index

MOST_SQUARES: Final = 5_000
"""Squares of a site from which a reference is fitted; of more, as many are drawn by even steps."""


class ChipImages:
    """The imagery of chips, by their ids, from the tile sets that hold them."""

    def __init__(self, tile_sets: Sequence[Path]) -> None:
        """Read the indices.

        Raises:
            RecipeError: one is missing, or lacks a column.
        """
        self._places: dict[str, tuple[Path, int, int]] = {}
        for tile_set in tile_sets:
            index = read_index(tile_set)
            for name, row, col in zip(index["id"], index["row_px"], index["col_px"], strict=True):
                self._places[str(name)] = tile_set, int(row), int(col)
        self._sets = ", ".join(str(tile_set) for tile_set in tile_sets)

    def of(self, chip: ChipResult) -> NDArray[Any]:
        """(band, row, col) imagery of the part of a chip that its arrays cover.

        Raises:
            RecipeError: no tile set holds the chip, or not on this ground.
        """
        if chip.id not in self._places:
            raise RecipeError(f"no tile set among {self._sets} holds chip {chip.id}; give the ones it was predicted from")
        tile_set, row_px, col_px = self._places[chip.id]
        image, _ = read_chip(tile_set, chip.id)
        rows, cols = chip.mean_m.shape
        row, col = chip.row_px - row_px, chip.col_px - col_px
        part = image.data[:, row : row + rows, col : col + cols]
        if min(row, col) < 0 or part.shape[1:] != (rows, cols):
            raise RecipeError(f"chip {chip.id} of {tile_set} covers other ground than was predicted; build the set again")
        return part


def squares_of(chips: Iterable[ChipResult], images: ChipImages, contract: Contract) -> dict[str, SiteSquares]:
    """What was measured in the squares of held-out chips, by site; each pixel of the ground counts in one chip.

    Args:
        chips: Held-out chips; those that may calibrate are to be chosen by the caller.
        images: Their imagery.
        contract: Of the model that predicted them.

    Raises:
        RecipeError: see `ChipImages.of`.
    """
    features: dict[str, list[NDArray[np.float32]]] = {}
    blocks: dict[str, list[tuple[str, float, int, int]]] = {}
    for chip, found, places in _measured(chips, images, contract):
        features.setdefault(chip.site, []).append(found)
        blocks.setdefault(chip.site, []).extend(places)
    result = {}
    for site in sorted(features):
        numbers = {place: number for number, place in enumerate(sorted(set(blocks[site])))}
        block = np.array([numbers[place] for place in blocks[site]], np.int64)
        every = max(-(-len(block) // MOST_SQUARES), 1)
        result[site] = SiteSquares(features=np.concatenate(features[site])[::every], block=block[::every])
    return result


def _measured(
    chips: Iterable[ChipResult], images: ChipImages, contract: Contract
) -> Iterator[tuple[ChipResult, NDArray[np.float32], list[tuple[str, float, int, int]]]]:
    """Per chip the features of its squares, and on which block of ground each square lies."""
    for chip in chips:
        known = chip.counts & np.isfinite(chip.mean_m)
        squares = measure(images.of(chip), known, chip.mean_m, chip.spread_m, mean=contract.mean, std=contract.std)
        side_px = max(round(RESAMPLED_M / chip.gsd_m), 1)
        rows, cols = (squares.row + chip.row_px) // side_px, (squares.col + chip.col_px) // side_px
        yield chip, squares.features, [(chip.crs, chip.gsd_m, int(r), int(c)) for r, c in zip(rows, cols, strict=True)]


def describe(
    chips: Iterable[ChipResult], tile_sets: Sequence[Path], contract: Contract
) -> tuple[ShiftReference | None, str | None]:
    """What the calibration data look like, or why that cannot be said: they are too few squares of ground.

    Args:
        chips: Held-out chips; those that calibrate are looked at.
        tile_sets: The sets that they are of.
        contract: Of the model that predicted them.

    Raises:
        RecipeError: a tile set is missing, or is not the one that was predicted from.
    """
    squares = squares_of((chip for chip in chips if chip.calibrates), ChipImages(tile_sets), contract)
    try:
        return fit_shift(squares), None
    except RecipeError as error:
        return None, f"maps will not say where they are unlike the calibration data: {error}"

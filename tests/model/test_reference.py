"""Squares of held-out chips: the imagery of a tile set, the part of it that counts, and which ground each square lies on."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest

from canopy.errors import RecipeError
from canopy.model.evaluate import ChipResult
from canopy.model.reference import ChipImages, squares_of
from canopy.model.squares import measure
from canopy.tiler.chips import build_tile_set, read_chip, read_index
from tests.tile_sets import pair, recipe

CONTRACT = SimpleNamespace(mean=(100.0, 100.0, 100.0), std=(60.0, 60.0, 60.0))


@pytest.fixture(scope="module")
def tile_set(tmp_path_factory):
    folder = tmp_path_factory.mktemp("set")
    pair(folder, "a", left=400_000, top=3_300_000, shape=(128, 160))
    return build_tile_set(recipe(folder))


@pytest.fixture(scope="module")
def chips(tile_set):
    """What would have been predicted for its chips, on the part from (3, 5) on."""
    found = []
    for row in read_index(tile_set).itertuples():
        shape = (60, 58)
        heights = np.full(shape, row.row_px % 40, np.float32)
        found.append(
            ChipResult(
                id=row.id, site=row.site, crs=row.crs, gsd_m=row.gsd_m, row_px=row.row_px + 3, col_px=row.col_px + 5,
                calibrates=True, scores=False, counts=np.ones(shape, bool), true_m=heights, mean_m=heights, spread_m=heights,
                forest_m=heights,
            )
        )  # fmt: skip
    return found


def test_squares_are_those_of_the_imagery_that_was_predicted(tile_set, chips):
    found = squares_of(chips, ChipImages([tile_set]), CONTRACT)
    assert list(found) == ["WOOD"]
    expected = []
    for chip in chips:
        image = read_chip(tile_set, chip.id)[0].data[:, 3:63, 5:63]
        expected.append(
            measure(image, chip.counts, chip.mean_m, chip.spread_m, mean=CONTRACT.mean, std=CONTRACT.std).features
        )
    assert len(chips) > 2
    assert found["WOOD"].features.tobytes() == np.concatenate(expected).tobytes()
    # 128 x 160 px of 0.5 m are no more than four blocks of 120 m, and neighbouring chips share one.
    assert len(np.unique(found["WOOD"].block)) <= 4


def test_what_does_not_count_has_no_square(tile_set, chips):
    away = [replace(chip, counts=np.zeros_like(chip.counts)) for chip in chips[1:]]
    abstaining = replace(chips[0], mean_m=np.full_like(chips[0].mean_m, np.nan))
    assert not sum(len(each.features) for each in squares_of([*away, abstaining], ChipImages([tile_set]), CONTRACT).values())


def test_chips_of_other_sets_and_other_ground_are_refused(tile_set, chips):
    images = ChipImages([tile_set])
    with pytest.raises(RecipeError, match="holds chip elsewhere; give the ones it was predicted from"):
        squares_of([replace(chips[0], id="elsewhere")], images, CONTRACT)
    with pytest.raises(RecipeError, match="covers other ground than was predicted; build the set again"):
        squares_of([replace(chips[0], row_px=chips[0].row_px + 9)], images, CONTRACT)

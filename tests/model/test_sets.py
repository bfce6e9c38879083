"""Tile sets that do not fit the model of the recipe are refused before anything is computed."""

import shutil
from pathlib import Path

import geopandas as gpd
import numpy as np
import pytest

from canopy.errors import RecipeError
from canopy.model.recipe import read_recipe
from canopy.model.sets import DataSets
from canopy.raster import read_raster, write_raster
from tests.model.training import make_tile_sets, recipe


@pytest.fixture(scope="module")
def tile_sets(tmp_path_factory) -> Path:
    return make_tile_sets(tmp_path_factory.mktemp("tiles"))


def opened(tile_sets: Path, folder: Path, **changes) -> DataSets:
    return DataSets(read_recipe(recipe(tile_sets, folder, **changes)), folder)


def with_images(tile_sets: Path, folder: Path, change, names=()) -> Path:
    """Copies of the sets, the images of the open one changed."""
    copy = folder / "tiles"
    shutil.copytree(tile_sets, copy)
    for path in (copy / "open" / "image").glob("*.tif"):
        pixels, grid = read_raster(path)
        write_raster(path, change(pixels.data), grid=grid, band_names=names)
    return copy


def test_a_set_that_fits_is_opened(tile_sets, tmp_path):
    assert opened(tile_sets, tmp_path).contract().training.sites == ("EAST", "WEST")
    named = with_images(tile_sets, tmp_path, lambda data: data, ["Red", "Green", "Blue"])
    assert opened(named, tmp_path)
    odd = with_images(named, tmp_path / "odd", lambda data: data, ["band 1", "band 2", "band 3"])
    assert opened(odd, tmp_path)


def test_a_gsd_outside_the_models_range_is_refused(tile_sets, tmp_path):
    with pytest.raises(RecipeError, match=r"GSD of 0.5 m, outside gsd_range_m 0.6 to 0.7 .* build the set again"):
        opened(tile_sets, tmp_path, model__gsd_range_m=[0.6, 0.7])


@pytest.mark.parametrize(
    ("change", "names", "message"),
    [
        (lambda data: data[:2], (), "chips of 2 bands, but the model takes 3 .red, green, blue."),
        (lambda data: data[::-1], ("blue", "green", "red"), "bands blue, green, red, but the model takes red, green, blue"),
        (lambda data: data.astype(np.uint16), (), "chips of uint16, but the model takes uint8"),
    ],
)
def test_other_bands_or_types_are_refused_in_one_line(tile_sets, tmp_path, change, names, message):
    other = with_images(tile_sets, tmp_path, change, names)
    with pytest.raises(RecipeError, match=message) as caught:
        opened(other, tmp_path)
    assert "\n" not in str(caught.value)


def test_labels_that_are_all_unknown_are_refused(tile_sets, tmp_path):
    copy = tmp_path / "tiles"
    shutil.copytree(tile_sets, copy)
    index = gpd.read_parquet(copy / "open" / "index.parquet")
    index["valid_fraction"] = 0.0
    index.to_parquet(copy / "open" / "index.parquet")
    with pytest.raises(RecipeError, match="not one pixel with a known height"):
        opened(copy, tmp_path)


def test_a_recipe_without_a_training_chip_says_what_there_is(tile_sets, tmp_path):
    only_scored = {"path": str(tile_sets / "open"), "train": ["elsewhere"], "calibrate": ["val"], "score": ["test"]}
    sets = opened(tile_sets, tmp_path, data={"set": [only_scored]})
    with pytest.raises(RecipeError, match=r"no tile set has a chip in the splits that train \(open has .*\d+ train"):
        sets.training()

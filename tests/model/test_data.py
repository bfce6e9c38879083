"""Samples and batches: aligned under every augmentation, and a function of (seed, step) alone."""

from collections import Counter
from itertools import chain

import numpy as np
import pytest
import torch
from affine import Affine
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError
from pyproj import CRS

from canopy.errors import RecipeError
from canopy.grid import Grid
from canopy.model.augmentation import OFF, Augmentation
from canopy.model.data import (
    ChipCache,
    ChipDataset,
    TrainingBatches,
    TrainingSet,
    chip_weights,
    evaluation_chips,
    training_batches,
)
from canopy.raster import write_raster
from canopy.tiler.chips import build_tile_set

UTM = CRS.from_epsg(32617)
RECIPE = """
name = "{name}"
gsd_m = 0.5
chip_px = {chip_px}
stride_px = {chip_px}
min_valid_fraction = 0.05
[split]
seed = 1
block_m = 1000.0
buffer_m = 0.0
train = 1.0
val = 0.0
test = 0.0
[split.sites]
val = ["HELD"]
"""
SOURCE = """
[[source]]
kind = "pair"
site = "{site}"
image = "{site}/*_rgb.tif"
height = "{site}/*_chm.tif"
licence = "CC0-1.0"
image_source = "drawn"
lidar_source = "drawn"
"""


def write_pair(folder, site, name, *, left, shape, rng):
    """Green is 10 grey values a metre of height, so that image and height can be compared after any move."""
    (folder / site).mkdir(parents=True, exist_ok=True)
    height_m = rng.integers(1, 20, shape).astype(np.float32)
    image = np.stack([height_m * 3, height_m * 10, height_m * 5]).astype(np.uint8)
    height_m[:3, :7] = np.nan
    grid = Grid(crs=UTM, transform=Affine(0.5, 0, left, 0, -0.5, 4_000_000.0), shape=shape)
    write_raster(folder / site / f"{name}_rgb.tif", image, grid=grid)
    write_raster(folder / site / f"{name}_chm.tif", height_m[None], grid=grid, nodata=np.nan)


@pytest.fixture(scope="module")
def sets(tmp_path_factory):
    """`large`: 128 px chips of two sites, one held out; `plots`: 20 px plots in 64 px chips."""
    folder = tmp_path_factory.mktemp("sets")
    rng = np.random.default_rng(0)
    for i in range(6):
        write_pair(folder, "KEPT", f"k{i}", left=400_000.0 + 64 * i, shape=(128, 128), rng=rng)
        write_pair(folder, "PLOT", f"p{i}", left=500_000.0 + 64 * i, shape=(20, 22), rng=rng)
    write_pair(folder, "HELD", "h", left=420_000.0, shape=(128, 128), rng=rng)
    (folder / "large.toml").write_text(
        RECIPE.format(name="large", chip_px=128) + SOURCE.format(site="KEPT") + SOURCE.format(site="HELD")
    )
    (folder / "plots.toml").write_text(
        RECIPE.format(name="plots", chip_px=64).replace("HELD", "PLOT") + SOURCE.format(site="PLOT")
    )
    return build_tile_set(folder / "large.toml"), build_tile_set(folder / "plots.toml")


def assert_aligned(sample):
    """Image and height still belong together, and validity says exactly where."""
    image, height_m, valid = (sample[k].numpy() for k in ("image", "height_m", "valid"))
    assert (valid == (np.isfinite(height_m) & sample["image_valid"].numpy())).all()
    assert valid.any()
    np.testing.assert_array_equal(image[1][valid], height_m[valid] * 10)
    assert not image[:, ~sample["image_valid"].numpy()].any()


def same(a, b):
    return all(torch.equal(a[k].nan_to_num(-1), b[k].nan_to_num(-1)) if torch.is_tensor(a[k]) else a[k] == b[k] for k in a)


def test_evaluation_gives_whole_chips_in_order_and_nothing_random(sets):
    chips = evaluation_chips(sets[0], ("train", "val"))
    assert list(chips.ids) == sorted(chips.ids)
    assert len(chips) == 7
    for i in range(len(chips)):
        sample = chips[i]
        assert sample["image"].shape == (3, 128, 128)
        assert sample["image"].dtype == torch.uint8
        assert sample["height_m"].dtype == torch.float32
        assert sample["id"].startswith(sample["site"])
        assert_aligned(sample)
        assert same(sample, chips[i])


def test_crops_of_large_chips_and_padding_of_small_ones(sets):
    moves = OFF.model_copy(update={"dihedral": True})
    large = ChipDataset(sets[0], "train", 64, augmentation=moves, cache=ChipCache(10**8))
    plots = ChipDataset(sets[1], "val", 96, augmentation=moves)
    for i in range(6):
        assert large[i]["image"].shape == (3, 64, 64)
        assert large[i]["image_valid"].all()
        assert_aligned(large[i])
        assert plots[i]["image"].shape == (3, 96, 96)
        assert plots[i]["image_valid"].sum() == 20 * 22  # never stretched, never cut
        assert_aligned(plots[i])
    centre = ChipDataset(sets[0], "train", 64)[0]
    whole = ChipDataset(sets[0], "train")[0]
    assert torch.equal(centre["image"], whole["image"][:, 32:96, 32:96])


def test_epochs_differ_and_repeat(sets):
    chips = ChipDataset(sets[0], "train", 64, augmentation=Augmentation(), seed=5)
    first = [chips[i] for i in range(3)]
    chips.epoch = 1
    assert not any(same(a, chips[i]) for i, a in enumerate(first))
    chips.epoch = 0
    assert all(same(a, chips[i]) for i, a in enumerate(first))
    other = ChipDataset(sets[0], "train", 64, augmentation=Augmentation(), seed=6)
    assert not same(first[0], other[0])


def test_every_crop_holds_a_known_height(sets):
    """A uniform crop of a chip that is 95 % void would mostly hold none."""
    plots = ChipDataset(sets[1], "val", 32, augmentation=OFF)
    rng = np.random.default_rng(1)
    assert all(plots.sample(i % 6, rng)["valid"].any() for i in range(60))


def test_sites_and_splits_are_selected(sets):
    assert set(ChipDataset(sets[0], ("train", "val"), exclude_sites=["HELD"]).sites) == {"KEPT"}
    assert set(ChipDataset(sets[0], "val").sites) == {"HELD"}
    with pytest.raises(RecipeError, match="no site 'NOWHERE'"):
        ChipDataset(sets[0], "train", sites=["NOWHERE"])
    with pytest.raises(RecipeError, match="no chip in split train"):
        ChipDataset(sets[0], "train", sites=["HELD"])
    with pytest.raises(IndexError):
        ChipDataset(sets[0], "val")[1]


@given(st.lists(st.floats(0, 60), min_size=1, max_size=50), st.floats(0, 0.5), st.floats(0, 0.5))
def test_weights_are_probabilities_that_give_categories_their_share(p95, low, tall):
    heights = np.array(p95)
    settings = TrainingSet(tile_set="x", batch=4, crop_px=32, low_share=low, tall_share=tall)
    weights = chip_weights(heights, settings)
    assert weights.sum() == pytest.approx(1)
    assert (weights >= 0).all()
    for members, share in ((heights < 1.0, low), (heights > 25.0, tall)):
        if members.any():
            assert weights[members].sum() >= share - 1e-9
    uniform = chip_weights(heights, TrainingSet(tile_set="x", batch=4, crop_px=32))
    np.testing.assert_allclose(uniform, 1 / len(heights))


def plan(sets, **changes):
    return [
        TrainingSet(tile_set=sets[0], batch=2, crop_px=64, share=1, **changes),
        TrainingSet(tile_set=sets[1], batch=5, crop_px=32, share=3, split=("val",)),
    ]


def test_batches_are_homogeneous_and_drawn_in_their_shares(sets):
    batches = TrainingBatches(plan(sets), seed=1, steps=200, augmentation=OFF)
    drawn = Counter()
    for step in range(200):
        batch = batches[step]
        drawn[batch["tile_set"]] += 1
        size, side = {"large": (2, 64), "plots": (5, 32)}[batch["tile_set"]]
        assert batch["image"].shape == (size, 3, side, side)
        assert batch["height_m"].shape == batch["valid"].shape == (size, side, side)
        assert len(set(batch["id"])) == size  # no chip twice in a batch
    assert abs(drawn["plots"] / 200 - 0.75) < 0.1
    small = [plan(sets)[1].model_copy(update={"batch": 9})]
    assert len(TrainingBatches(small, seed=1, steps=1)[0]["id"]) == 9  # more than there are chips


def test_a_resumed_run_sees_the_same_batches(sets):
    def run(start, workers=0):
        loader = training_batches(plan(sets), seed=4, start_step=start, steps=8, workers=workers)
        return list(loader)

    whole = run(0)
    assert len(whole) == 8
    assert all(same(a, b) for a, b in zip(whole[5:], run(5), strict=True))
    assert not same(whole[0], next(iter(training_batches(plan(sets), seed=5, start_step=0, steps=8))))


def parts_together(sets, world, steps=10):
    """Per step, the parts of all processes one after the other."""
    parts = [list(training_batches(sets, seed=4, start_step=0, steps=steps, rank=r, world=world)) for r in range(world)]
    return [
        {
            key: torch.cat([part[key] for part in step]) if torch.is_tensor(value) else list(chain(*(p[key] for p in step)))
            for key, value in step[0].items()
            if key != "tile_set"
        }
        for step in zip(*parts, strict=True)
    ]


def test_the_parts_of_all_processes_are_the_batch_of_one(sets):
    shared = [plan(sets)[0].model_copy(update={"batch": 6, "share": 3}), plan(sets)[1].model_copy(update={"batch": 12})]
    one = parts_together(shared, 1)
    assert {len(batch["id"]) for batch in one} == {6, 12}
    for world in (2, 3):
        assert all(same(a, b) for a, b in zip(one, parts_together(shared, world), strict=True))
    # Were every process to draw the whole batch for itself, as with the rank left out, half of it would come twice.
    first = next(iter(training_batches(shared, seed=4, start_step=0, steps=1)))
    half = len(first["id"]) // 2
    assert not torch.equal(first["image"][:half], first["image"][half:])
    mine = [next(iter(training_batches(shared, seed=4, start_step=0, steps=1, rank=r, world=2))) for r in range(2)]
    assert mine[0]["tile_set"] == mine[1]["tile_set"]
    assert not torch.equal(mine[0]["image"], mine[1]["image"])


def test_a_batch_that_cannot_be_shared_is_refused(sets):
    with pytest.raises(RecipeError, match=r"a batch of 5 samples .* by 2 processes; make batch a multiple of 2, such as 6"):
        training_batches(plan(sets), seed=1, start_step=0, steps=1, world=2)


@pytest.mark.slow
def test_spawned_loaders_give_the_same_batches(sets):
    here = list(training_batches(plan(sets), seed=4, start_step=0, steps=4))
    there = list(training_batches(plan(sets), seed=4, start_step=0, steps=4, workers=2))
    assert all(same(a, b) for a, b in zip(here, there, strict=True))


def test_impossible_settings_are_refused(sets):
    with pytest.raises(ValidationError, match="must not exceed 1"):
        TrainingSet(tile_set=sets[0], batch=1, crop_px=32, low_share=0.6, tall_share=0.6)
    with pytest.raises(ValidationError, match="crop_px"):
        TrainingSet(tile_set=sets[0], batch=1, crop_px=33)
    with pytest.raises(RecipeError, match="no tile set"):
        TrainingBatches([], seed=1, steps=1)
    with pytest.raises(IndexError):
        TrainingBatches(plan(sets), seed=1, steps=1)[1]

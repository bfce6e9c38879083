"""Samples and batches: aligned under every augmentation, and a function of (seed, step) alone."""

import os
import pickle
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from itertools import chain
from pathlib import Path

import numpy as np
import psutil
import pytest
import rasterio
import torch
from affine import Affine
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError
from pyproj import CRS

from canopy.errors import RecipeError
from canopy.grid import Grid
from canopy.model.augmentation import EVERYTHING, OFF, Augmentation
from canopy.model.data import (
    ChipCache,
    ChipDataset,
    Imagery,
    TrainingBatches,
    TrainingSet,
    chip_weights,
    draw_chips,
    evaluation_chips,
    loader_failure,
    stack,
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


def parts_together(sets, world, steps=6):
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


def test_impossible_settings_are_refused(sets):
    with pytest.raises(ValidationError, match="must not exceed 1"):
        TrainingSet(tile_set=sets[0], batch=1, crop_px=32, low_share=0.6, tall_share=0.6)
    with pytest.raises(ValidationError, match="crop_px"):
        TrainingSet(tile_set=sets[0], batch=1, crop_px=33)
    with pytest.raises(RecipeError, match="no tile set"):
        TrainingBatches([], seed=1, steps=1)
    with pytest.raises(IndexError):
        TrainingBatches(plan(sets), seed=1, steps=1)[1]
    assert TrainingSet(tile_set=sets[0], batch=1, crop_px=32).statistic == "p95"
    with pytest.raises(ValidationError, match="low_below_m = 30 must not exceed tall_above_m = 25"):
        TrainingSet(tile_set=sets[0], batch=1, crop_px=32, low_below_m=30)
    with pytest.raises(RecipeError, match="jpeg"):
        ChipDataset(sets[0], "train", 64, augmentation=EVERYTHING, imagery=Imagery(dtype="uint16"))


# --- which chips ---------------------------------------------------------------------------------------------------------


def frequencies(heights, settings, batch, batches=400):
    weights, category = chip_weights(heights, settings), settings.categories(heights)
    rng = np.random.default_rng(0)
    drawn = np.stack([draw_chips(weights, category, batch, rng) for _ in range(batches)])
    return weights, category, drawn


@pytest.mark.parametrize("few_tall", [False, True])
def test_chips_are_drawn_as_often_as_they_weigh(few_tall):
    rng = np.random.default_rng(1)
    heights = rng.uniform(0, 30, 60)
    if few_tall:  # one tall chip for a fifth of the samples: it must come 1.6 times in a batch of 8
        heights = np.append(rng.uniform(1, 20, 59), 40.0)
    settings = TrainingSet(tile_set="x", batch=8, crop_px=32, low_share=0.1, tall_share=0.2)
    weights, _, drawn = frequencies(heights, settings, 8)
    counts = np.bincount(drawn.ravel(), minlength=60)
    expected = weights * drawn.size
    chi_square = ((counts - expected) ** 2 / expected).sum()
    # Systematic samples vary less than independent ones, whose 99.9 % point for 59 degrees of freedom this is.
    assert chi_square < 98.3
    assert ((drawn == 0).sum(axis=1) <= np.ceil(8 * weights[0])).all()
    # Uniform weights, as if the categories were ignored, would be refused by the same bound.
    uniform = np.full(60, drawn.size / 60)
    assert ((counts - uniform) ** 2 / uniform).sum() > 98.3
    if few_tall:
        without = [np.random.default_rng(k).choice(60, 8, replace=False, p=weights) for k in range(400)]
        counts = np.bincount(np.ravel(without), minlength=60)
        assert ((counts - expected) ** 2 / expected).sum() > 98.3  # drawing without replacement does not give it its share


def test_every_batch_has_its_share_of_each_category_at_any_place():
    heights = np.random.default_rng(1).uniform(0, 30, 200)
    settings = TrainingSet(tile_set="x", batch=16, crop_px=32, low_share=0.25, tall_share=0.25)
    weights, category, drawn = frequencies(heights, settings, 16)
    for number in range(3):
        share = 16 * weights[category == number].sum()
        counts = (category[drawn] == number).sum(axis=1)
        assert set(counts) <= {int(share) - 1, int(share), int(share) + 1, int(share) + 2}
        by_place = (category[drawn] == number).mean(axis=0)
        assert np.abs(by_place - share / 16).max() < 0.1  # so that each process gets its share, too
    assert all(len(set(batch)) == 16 for batch in drawn)
    independent = np.random.default_rng(0).choice(200, (400, 16), p=weights)
    assert np.ptp((category[independent] == 2).sum(axis=1)) > 4


def test_statistics_that_say_what_is_tall(sets):
    p95 = TrainingBatches([plan(sets, tall_share=0.5, tall_above_m=15.0)[0]], seed=1, steps=1)
    mean = TrainingBatches([plan(sets, tall_share=0.5, tall_above_m=15.0, statistic="mean")[0]], seed=1, steps=1)
    assert not p95.remarks()  # heights are uniform from 1 to 19 m
    (line,) = mean.remarks()
    assert line.startswith("large has no training chip with a mean above 15 m; the 50% of the samples meant for them are")


def test_a_category_without_chips_is_said_once_and_by_one_process(sets, capsys):
    settings = plan(sets, low_share=0.1)
    batches = training_batches(settings, seed=1, start_step=0, steps=2)
    list(batches)
    assert capsys.readouterr().err.count("no training chip with a p95 below 1 m") == 1
    training_batches([plan(sets, low_share=0.1)[0]], seed=1, start_step=0, steps=2, rank=1, world=2)
    assert not capsys.readouterr().err


# --- memory --------------------------------------------------------------------------------------------------------------


def test_the_cache_keeps_to_its_limit_and_lets_go_of_the_oldest(sets):
    cache = ChipCache(2 * 8 * 128 * 128)
    chips = ChipDataset(sets[0], "train", cache=cache)
    for i in (0, 1, 0, 2):
        assert same(chips[i], ChipDataset(sets[0], "train")[i])
    assert len(cache) == 2
    assert cache.held_bytes == cache.limit_bytes
    assert cache.get((sets[0], chips.ids[0])) is not None
    assert cache.get((sets[0], chips.ids[1])) is None
    chip = chips.chip(0)
    assert chips.chip(0)[0] is chip[0]  # not read again
    none = ChipCache(100)
    none.put((sets[0], "x"), chip)
    assert len(none) == 0


def test_samples_do_not_change_what_is_kept(sets):
    cache = ChipCache(10**8)
    chips = ChipDataset(sets[0], "train", 128, augmentation=EVERYTHING, cache=cache)
    before = [array.copy() for array in chips.chip(0)]
    for seed in range(5):
        sample = chips.sample(0, np.random.default_rng(seed))
        sample["image"].zero_()
        sample["height_m"].zero_()
        sample["image_valid"].zero_()
    for array, kept in zip(before, chips.chip(0), strict=True):
        np.testing.assert_array_equal(array, kept)


def test_a_cache_that_is_too_small_is_said(sets, capsys):
    training_batches(plan(sets), seed=1, start_step=0, steps=1, cache_mb=0)
    assert "the training chips take 1 MB decoded and 0 MB are kept" in capsys.readouterr().err
    training_batches(plan(sets), seed=1, start_step=0, steps=1)
    assert not capsys.readouterr().err


# --- other imagery, and chips that cannot be used ------------------------------------------------------------------------


def copied(sets, tmp_path):
    """A copy of the large set whose files may be damaged, and the name of its first training chip."""
    folder = shutil.copytree(sets[0], tmp_path / "large")
    return folder, ChipDataset(folder, "train").ids[0]


def rewritten(path, *, dtype, factor=1, count=None, side=None):
    """The raster again with another type, number of bands or side."""
    with rasterio.open(path) as dataset:
        data, profile = dataset.read(), dataset.profile
    data = data[:count, :side, :side].astype(dtype) * factor
    profile |= {"dtype": dtype, "count": len(data), "height": data.shape[1], "width": data.shape[2], "predictor": 1}
    path.unlink()
    with rasterio.open(path, "w", **profile) as dataset:
        dataset.write(data)


def test_sixteen_bit_chips(sets, tmp_path):
    folder, _ = copied(sets, tmp_path)
    for path in (folder / "image").glob("KEPT*.tif"):
        rewritten(path, dtype="uint16", factor=10)
    takes = Imagery(dtype="uint16", value_range=(0, 4095))
    batches = TrainingBatches(
        [TrainingSet(tile_set=folder, batch=4, crop_px=64, imagery=takes)],
        seed=1, steps=2, augmentation=EVERYTHING.model_copy(update={"jpeg": 0}),
    )  # fmt: skip
    batch = batches[0]
    assert batch["image"].dtype == torch.uint16
    assert batch["image"].float().max() > 255
    chips = ChipDataset(folder, "train", 64, augmentation=OFF, imagery=takes)
    sample = chips[0]
    np.testing.assert_array_equal(sample["image"][1][sample["valid"]].float(), sample["height_m"][sample["valid"]] * 100)
    narrow = Imagery(dtype="uint16", value_range=(0, 1000))
    with pytest.raises(RecipeError, match=r"holds values from \d+ to \d+, outside the model's value_range 0 to 1000; widen"):
        ChipDataset(folder, "train", 64, augmentation=OFF, imagery=narrow)[0]


def hurt_nothing(folder, name):
    """Negative control: nothing is wrong."""


def hurt_missing(folder, name):
    (folder / "height" / f"{name}.tif").unlink()


def hurt_empty(folder, name):
    (folder / "image" / f"{name}.tif").write_bytes(b"")


def hurt_cut(folder, name):
    path = folder / "image" / f"{name}.tif"
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def hurt_unknown(folder, name):
    rewritten(folder / "height" / f"{name}.tif", dtype="float32", factor=np.float32(np.nan))


def hurt_shape(folder, name):
    rewritten(folder / "height" / f"{name}.tif", dtype="float32", side=64)


def hurt_double(folder, name):
    rewritten(folder / "height" / f"{name}.tif", dtype="float64")


def hurt_dtype(folder, name):
    rewritten(folder / "image" / f"{name}.tif", dtype="uint16")


def hurt_bands(folder, name):
    rewritten(folder / "image" / f"{name}.tif", dtype="uint8", count=2)


@pytest.mark.parametrize(
    ("hurt", "says"),
    [
        (hurt_nothing, None),
        (hurt_missing, "does not exist"),
        (hurt_empty, "is empty"),
        (hurt_cut, "cut short|cannot be"),
        (hurt_unknown, "has no known height; take it out"),
        (hurt_shape, "an image of 128 x 128 px and heights of 64 x 64 px; build"),
        (hurt_double, "heights in float64 instead of float32"),
        (hurt_dtype, "is uint16, but the model takes uint8; rescale"),
        (hurt_bands, "has 2 bands, but the model takes red, green, blue; set"),
    ],
)
def test_chips_that_cannot_be_used_are_named_in_one_line(sets, tmp_path, hurt, says):
    folder, name = copied(sets, tmp_path)
    hurt(folder, name)
    chips = ChipDataset(folder, "train", 64, augmentation=OFF)
    if says is None:
        chips[0]
        return
    with pytest.raises(RecipeError, match=says) as caught:
        chips[0]
    assert str(caught.value).startswith(f"chip {name} of {folder} ")
    assert "\n" not in str(caught.value)
    with pytest.raises(RecipeError, match=name):  # before anything is started
        training_batches([TrainingSet(tile_set=folder, batch=1, crop_px=64)], seed=1, start_step=0, steps=1)


def test_of_a_sample_cut_to_a_plot_image_and_heights_are_hidden_alike(sets):
    only = OFF.model_copy(update={"plot": 1.0})
    whole, cut = (ChipDataset(sets[0], "train", 128, augmentation=amount, imagery=Imagery()) for amount in (OFF, only))
    shares = []
    for seed in range(12):
        before, after = (chips.sample(0, np.random.default_rng(seed)) for chips in (whole, cut))
        shown = after["image_valid"]
        assert not after["image"][:, ~shown].any()
        assert after["height_m"][~shown].isnan().all()
        assert torch.equal(after["image"][:, shown], before["image"][:, shown])
        assert torch.equal(after["height_m"][shown].nan_to_num(-1), before["height_m"][shown].nan_to_num(-1))
        assert torch.equal(after["valid"], before["valid"] & shown)
        shares.append(shown.float().mean().item())
    assert min(shares) < 0.3
    assert len(set(shares)) > 6


def test_scaled_samples_stay_in_the_range_of_the_model_and_say_their_gsd(sets):
    amount = OFF.model_copy(update={"scale": 1.0})
    takes = Imagery(gsd_range_m=(0.4, 0.8))
    chips = ChipDataset(sets[0], "train", 64, augmentation=amount, imagery=takes)
    samples = [chips.sample(i % 6, np.random.default_rng(i)) for i in range(60)]
    gsds_m = np.array([sample["gsd_m"] for sample in samples])
    assert (gsds_m >= 0.4).all()
    assert (gsds_m <= 0.8).all()
    assert gsds_m.min() < 0.45
    assert gsds_m.max() > 0.75
    for sample in samples:
        assert sample["image"].shape == (3, 64, 64)
        assert sample["image_valid"].all()  # nothing is invented around the chip
        assert 1 <= sample["height_m"].nan_to_num(1).min() <= sample["height_m"].nan_to_num(1).max() <= 19
        assert sample["valid"].any()
    whole = ChipDataset(sets[0], "train", 128, augmentation=amount)
    assert all(whole.sample(0, np.random.default_rng(i))["gsd_m"] <= 0.5 for i in range(20))  # no larger crop to take
    assert stack(samples[:2])["gsd_m"] == [samples[0]["gsd_m"], samples[1]["gsd_m"]]


# --- loader processes ----------------------------------------------------------------------------------------------------


def open_rasters(process):
    return [file.path for file in process.open_files() if file.path.endswith(".tif")]


def ended(process, within_s=20.0):
    """Whether a process is gone, at last."""
    until = time.monotonic() + within_s
    while time.monotonic() < until:
        if not process.is_running() or process.status() == psutil.STATUS_ZOMBIE:
            return True
        time.sleep(0.1)
    return False


def test_what_is_sent_to_a_loader_process_is_small_and_opens_nothing(sets):
    batches = TrainingBatches(plan(sets), seed=4, steps=4)
    for step in range(4):
        batches[step]
    assert len(batches.cache) > 0
    sent = pickle.dumps(batches)
    assert len(sent) < 10_000  # without one decoded chip

    def chips_open():  # other tests of this process may have left files of theirs to the garbage collector
        return [path for path in open_rasters(psutil.Process()) if any(Path(path).is_relative_to(folder) for folder in sets)]

    assert not chips_open()
    with rasterio.open(next((sets[0] / "image").glob("*.tif"))):
        assert chips_open()  # one that is open would be seen
    again = pickle.loads(sent)
    assert len(again.cache) == 0
    assert same(again[2], batches[2])


@pytest.mark.slow
def test_loader_processes_give_the_same_batches_hold_no_raster_and_fail_in_one_line(sets):
    """One start of processes for all, because each costs seconds."""

    def loader(workers, start=0, augmentation=EVERYTHING):
        return training_batches(plan(sets), seed=4, start_step=start, steps=400, augmentation=augmentation, workers=workers)

    mine = psutil.Process()
    open_before = open_rasters(mine)
    before = {child.pid for child in mine.children(recursive=True)}
    here, there = iter(loader(0, 6)), iter(loader(2, 6))
    for _ in range(8):
        assert same(next(here), next(there))
    workers = [c for c in mine.children(recursive=True) if c.pid not in before and "spawn_main" in " ".join(c.cmdline())]
    assert len(workers) == 2
    for worker in workers:
        assert worker.is_running()
        assert not open_rasters(worker)
    assert set(open_rasters(mine)) <= set(open_before)
    os.kill(workers[0].pid, signal.SIGKILL)
    with pytest.raises((RecipeError, RuntimeError)) as caught:  # noqa: PT012
        for _ in range(400):
            next(there)
            time.sleep(0.01)
    error = caught.value
    if isinstance(error, RuntimeError):  # torch raises it wherever the main thread is: here, in the sleep
        error = loader_failure(error)
    assert isinstance(error, RecipeError)
    assert "a loader process was killed" in str(error)
    assert "data.workers" in str(error)
    assert "\n" not in str(error)
    del there, caught, error  # they hold the frames that hold the loader
    assert all(ended(worker) for worker in workers)
    assert loader_failure(RuntimeError("something else")) is None


@pytest.mark.slow
def test_a_damaged_chip_in_a_loader_process_is_one_line_here(sets, tmp_path):
    folder, name = copied(sets, tmp_path)
    last = ChipDataset(folder, "train").ids[-1]
    hurt_cut(folder, last)
    settings = [TrainingSet(tile_set=folder, batch=6, crop_px=64)]
    assert last != name  # the first is read when the loader is made
    with pytest.raises(RecipeError, match=f"^chip {last} of ") as caught:
        next(iter(training_batches(settings, seed=1, start_step=0, steps=2, workers=1)))
    assert "\n" not in str(caught.value)


SCRIPT = """
import sys
from pathlib import Path
from canopy.model.data import TrainingSet, training_batches
if __name__ == "__main__":
    settings = [TrainingSet(tile_set=Path(sys.argv[1]), batch=2, crop_px=64)]
    for _ in training_batches(settings, seed=1, start_step=0, steps=10**7, workers=2):
        print("batch", flush=True)
"""


@pytest.mark.slow
@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_no_loader_process_outlives_the_one_that_started_it(sets, tmp_path, how):
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    process = subprocess.Popen(
        [sys.executable, script, sets[0]], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        # A shell that runs the tests in the background has them ignore Ctrl-C, and programs inherit that.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),  # noqa: PLW1509
    )  # fmt: skip
    try:
        assert process.stdout.readline() == "batch\n"
        workers = [c for c in psutil.Process(process.pid).children(recursive=True) if "spawn_main" in " ".join(c.cmdline())]
        assert len(workers) == 2
        process.send_signal(how)
        _, errors = process.communicate(timeout=60)
        assert process.returncode != 0
        assert all(ended(worker) for worker in workers)
        assert "Process SpawnProcess" not in errors  # a loader process has nothing to say about Ctrl-C
    finally:
        process.kill()

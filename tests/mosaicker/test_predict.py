"""Predictions of a sheet: a pixel depends on the image around it, not on what else is asked for, by how many, or when."""

import threading
import time
import tracemalloc
from contextlib import closing
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pyproj import CRS

from canopy.errors import DeviceMemoryError, RasterError
from canopy.grid import Box, Lattice, Layout, iter_windows, sheets_over
from canopy.model.package import load_model
from canopy.mosaicker.batch import Batch
from canopy.mosaicker.ensemble import Ensemble
from canopy.mosaicker.predict import STRIP_ROWS, predict_sheet
from canopy.mosaicker.stages import Stages
from canopy.raster import Pixels, write_raster
from canopy.tiler.imagery import open_imagery
from tests.plain_models import plain_contract, plain_model

LATTICE = Lattice(crs=CRS.from_epsg(32610), gsd_m=0.6)
BOX = Box(-8_130_100, 833_310, -8_130_100 + 130, 833_310 + 160)
PART = Box(BOX.row0 + 37, BOX.col0 + 51, BOX.row0 + 101, BOX.col0 + 142)
NAMES = ("mean_m", "spread_m")


@pytest.fixture(scope="module")
def photo(tmp_path_factory):
    path = tmp_path_factory.mktemp("photo") / "image.tif"
    values = np.random.default_rng(3).integers(0, 256, (3, *BOX.shape), dtype=np.uint8)
    write_raster(path, values, grid=LATTICE.grid(BOX))
    return path


class Scene:
    """Imagery in memory: each pixel a function of its place, and what a test wants to happen when it is read."""

    def __init__(self, valid=lambda rows, cols: np.ones(np.broadcast_shapes(rows.shape, cols.shape), bool), read=None):
        self.valid, self.hook, self.reads = valid, read, []

    def read(self, box):
        self.reads.append(box)
        if self.hook is not None:
            self.hook(box)
        rows, cols = np.ogrid[box.row0 : box.row1, box.col0 : box.col1]
        data = ((rows * 7919 + cols * 104_729) % 1931 / 1931).astype(np.float32)
        valid = self.valid(rows, cols)
        return Pixels(data=np.where(valid, data, np.float32(np.nan))[None], valid=valid)


def everywhere(part):
    return np.ones(part.shape, bool)


def predictions(model, imagery, box, *, batch=None, stages=None, wanted=everywhere, advance=lambda _: None, tta="none"):
    contract = model.contract
    return predict_sheet(
        Ensemble(models=(model,), tta=tta), imagery, Layout(window_px=contract.window_px, stride_px=contract.stride_px), box,
        wanted=wanted, stages=stages or Stages(), advance=advance, batch=batch,
    )  # fmt: skip


def sheet(model, imagery, box, **options):
    """(2, row, col): heights and spreads of `box`, whose strips have to cover it once, in order."""
    strips = [prediction.strip for prediction in predictions(model, imagery, box, **options)]
    assert [s.box.row0 for s in strips] == [box.row0, *(s.box.row1 for s in strips[:-1])]
    assert strips[-1].box.row1 == box.row1
    assert max(s.box.shape[0] for s in strips) <= STRIP_ROWS
    return np.stack([np.concatenate([getattr(strip, name) for strip in strips]) for name in NAMES])


def photo_sheet(model, photo, box, **options):
    with open_imagery(photo, LATTICE) as imagery:
        return sheet(model, imagery, box, **options)


# --- what decides a pixel ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", ["float32", "float16", "bfloat16"])
def test_a_part_is_cut_from_the_whole_bit_for_bit(tiny_model, photo, precision):
    model = load_model(tiny_model)
    model = replace(model, network=model.network.to(getattr(torch, precision)), precision=precision)
    whole, part = photo_sheet(model, photo, BOX), photo_sheet(model, photo, PART)
    place = PART.slices_in(BOX)
    assert part.shape == (2, *PART.shape)
    assert np.isfinite(part).all()
    np.testing.assert_array_equal(whole[(slice(None), *place)], part)
    heights_m = photo_sheet(load_model(tiny_model), photo, PART)[0]
    assert np.array_equal(heights_m, part[0]) == (precision == "float32"), "the control: precision does move heights"


@pytest.mark.parametrize("tta", ["none", "flips"])
def test_neither_lanes_nor_threads_change_a_bit(tiny_model, photo, tta):
    model, threads = load_model(tiny_model), torch.get_num_threads()
    part = Box(PART.row0, PART.col0, PART.row0 + 30, PART.col0 + 70)
    alone = photo_sheet(model, photo, part, batch=Batch(size=1), tta=tta)
    try:
        for threads_now in (1, 3):
            torch.set_num_threads(threads_now)
            for batch in (None, Batch(size=1, lanes=3)):
                np.testing.assert_array_equal(photo_sheet(model, photo, part, batch=batch, tta=tta), alone)
                assert torch.get_num_threads() == threads_now, "the caller's threads are its own"
    finally:
        torch.set_num_threads(threads)
    assert not np.array_equal(photo_sheet(model, photo, part, tta="d4"), alone), "the control: turns do"


@settings(max_examples=10)
@given(size=st.integers(1, 7), lanes=st.integers(1, 4), sheet_px=st.integers(60, 200), seed=st.integers(0, 99))
def test_batches_sheets_and_the_order_of_work_change_no_bit(size, lanes, sheet_px, seed):
    """A network that computes each pixel for itself, and takes longer over some windows than over others."""
    delays = np.random.default_rng(seed).random(8) / 1000

    def wait_s(x_bchw):
        return delays[int(1000 * x_bchw[0, 0, 0, 0].nan_to_num()) % 8]

    box, scene = Box(-70, 33, 120, 250), Scene(valid=lambda rows, cols: (rows * 31 + cols * 17) % 100 > 2)
    whole = sheet(plain_model(), scene, box, batch=Batch(size=1))
    for part in sheets_over(box, sheet_px):
        found = sheet(plain_model(wait_s=wait_s), scene, part, batch=Batch(size=size, lanes=lanes))
        np.testing.assert_array_equal(found, whole[(slice(None), *part.slices_in(box))])
    other = sheet(plain_model(lambda x: 15.0 + 20.001 * x[:, 0]), scene, box)
    assert not np.array_equal(other, whole), "the control"


def test_all_that_is_valid_and_nothing_else_has_a_height():
    scene = Scene(valid=lambda rows, cols: (rows - 40) ** 2 + (cols - 60) ** 2 > 900)
    box, stages, done = Box(-50, -20, 150, 130), Stages(), []
    strips = list(predictions(plain_model(), scene, box, stages=stages, advance=done.append))
    valid = np.concatenate([prediction.valid for prediction in strips])
    rows, cols = np.ogrid[box.row0 : box.row1, box.col0 : box.col1]
    np.testing.assert_array_equal(valid, scene.valid(rows, cols))
    for name in NAMES:
        np.testing.assert_array_equal(np.isfinite(np.concatenate([getattr(p.strip, name) for p in strips])), valid)
    layout = Layout(window_px=64, stride_px=48)
    assert sum(done) == stages.windows == len(list(iter_windows(layout, box)))


def test_windows_that_nobody_asked_for_are_not_run():
    box, stages, done = Box(0, 0, 200, 200), Stages(), []

    def corner(part):
        rows, cols = np.ogrid[part.row0 : part.row1, part.col0 : part.col1]
        return (rows < 30) & (cols < 30)

    found = sheet(plain_model(), Scene(), box, wanted=corner, stages=stages, advance=done.append)
    assert np.isfinite(found[:, :30, :30]).all()
    assert 1 <= stages.windows <= 4
    assert sum(done) == len(list(iter_windows(Layout(window_px=64, stride_px=48), box))) > 16


# --- seams ---------------------------------------------------------------------------------------------------------------


def vignette(x_bchw):
    """Heights fall towards the edges of a window, as those of networks do that pad with zeros."""
    row, col = (torch.linspace(-1, 1, side) for side in x_bchw.shape[2:])
    return (25.0 - 6.0 * (row[:, None] ** 4 + col[None, :] ** 4)).expand(len(x_bchw), -1, -1)


def slope(x_bchw):
    """Heights rise across a window: neighbours disagree most where they meet."""
    row, col = (torch.linspace(0, 1, side) for side in x_bchw.shape[2:])
    return (15.0 + 6.0 * row[:, None] + 3.0 * col[None, :]).expand(len(x_bchw), -1, -1)


def step_ratio(map_m, borders, axis):
    """The largest step from pixel to pixel across the borders over the largest elsewhere, along one axis."""
    steps = np.abs(np.diff(map_m.astype(float), axis=axis)).max(axis=1 - axis)
    at_border = np.zeros(steps.size, bool)
    at_border[[border - 1 for border in borders if 0 < border <= steps.size]] = True
    return steps[at_border].max() / steps[~at_border].max()


def borders_along(layout, start, stop, sheets):
    """Where windows and their weights begin and end, and sheets, in pixels from `start`."""
    windows = layout.windows_over(start, stop)
    edges = {edge for i in windows for edge in (*layout.window_span(i), *layout.support_span(i))}
    return [edge - start for edge in edges | sheets if start < edge < stop]


@pytest.mark.parametrize(("window_px", "stride_px"), [(64, 48), (96, 64), (256, 192)])
@pytest.mark.parametrize("artefact", [vignette, slope])
def test_no_seam_where_the_network_knows_its_place_in_the_window(artefact, window_px, stride_px):
    layout, side = Layout(window_px=window_px, stride_px=stride_px), 5 * stride_px // 2
    model = plain_model(artefact, contract=plain_contract(window_px, stride_px))
    box = Box(-side - 7, 40, side - 7, 40 + 2 * side)
    sheets = list(sheets_over(box, side - 3))
    assert len(sheets) > 4
    blended, hard = np.full(box.shape, np.nan), np.full(box.shape, np.nan)
    for part in sheets:
        blended[part.slices_in(box)] = sheet(model, Scene(), part)[0]
    one = model.predict(np.zeros((1, 1, window_px, window_px), np.float32)).mean_m[0].numpy()
    for row, col in iter_windows(layout, box):  # the control: each window laid over those before it
        part = layout.window_box(row, col).intersect(box)
        hard[part.slices_in(box)] = one[part.slices_in(layout.window_box(row, col))]
    assert np.isfinite(blended).all()
    for axis, (start, stop) in enumerate(((box.row0, box.row1), (box.col0, box.col1))):
        edges = {edge for part in sheets for edge in ((part.row0, part.row1), (part.col0, part.col1))[axis]}
        borders = borders_along(layout, start, stop, edges)
        assert step_ratio(blended, borders, axis) <= 1.02
        assert step_ratio(hard, borders, axis) > 5 or artefact is vignette
        assert np.abs(np.diff(hard, axis=axis)).max() > 4 * np.abs(np.diff(blended, axis=axis)).max()


def test_sheets_with_windows_of_their_own_have_seams():
    """The control of the sheets: windows counted from each sheet's corner meet at its border with nothing between them."""
    layout, model = Layout(window_px=64, stride_px=48), plain_model(slope)
    whole = sheet(model, Scene(), Box(0, 0, 64, 240))[0]
    shifted = sheet(model, Scene(), Box(0, 130, 64, 240))[0]
    elsewhere = sheet(model, Scene(), Box(0, 0, 64, 110))[0]  # what a lattice that starts at column 130 would have there
    joined = np.concatenate([whole[:, :130], elsewhere], axis=1)
    edges = borders_along(layout, 0, 240, {130})
    assert step_ratio(joined, edges, 1) > 1.5
    assert step_ratio(np.concatenate([whole[:, :130], shifted], axis=1), edges, 1) <= 1.02


# --- memory that runs out --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("most", "left"), [(1, 1), (2, 2), (3, 2), (4, 4)])
def test_batches_too_large_for_the_device_are_halved_and_no_window_is_lost(most, left):
    box, scene, stages, batch = Box(0, 0, 130, 480), Scene(), Stages(), Batch(size=8, lanes=2)
    model = plain_model(most=most)
    found = sheet(model, scene, box, batch=batch, stages=stages)
    np.testing.assert_array_equal(found, sheet(plain_model(), scene, box, batch=Batch(size=1)))
    assert batch.size == left
    assert "halved" in batch.record()["found"]
    assert set(model.network.batches) == {left}
    assert stages.windows == len(list(iter_windows(Layout(window_px=64, stride_px=48), box)))


def test_fewer_windows_side_by_side_when_memory_runs_out():
    box, scene, batch = Box(0, 0, 130, 480), Scene(), Batch(size=1, lanes=4)
    found = sheet(plain_model(most_side_by_side=2, wait_s=0.003), scene, box, batch=batch)
    np.testing.assert_array_equal(found, sheet(plain_model(), scene, box))
    assert batch.lanes in {1, 2}
    assert batch.record()["windows_at_once"] == batch.lanes


def test_memory_that_does_not_do_for_one_window_ends_the_run_in_one_line():
    with pytest.raises(DeviceMemoryError, match=r"^cpu has not enough memory for 1 window of 64 x 64 px .*smaller model$"):
        sheet(plain_model(most=0), Scene(), Box(0, 0, 130, 480), batch=Batch(size=4, lanes=2))
    assert not ours()


# --- what happens at the same time -----------------------------------------------------------------------------------------


def ours():
    """Threads of `predict_sheet` that are alive."""
    return [t.name for t in threading.enumerate() if t.name.startswith(("read", "blend", "forward"))]


def test_a_caller_that_stops_listening_ends_the_threads():
    scene = Scene()
    with closing(predictions(plain_model(wait_s=0.002), scene, Box(0, 0, 4000, 300))) as strips:
        next(strips)
        assert ours()
    assert not ours()
    reads = len(scene.reads)
    time.sleep(0.05)
    assert len(scene.reads) == reads < 10


def test_nothing_runs_far_ahead_of_a_slow_caller():
    scene, network = Scene(), plain_model()
    with closing(predictions(network, scene, Box(0, 0, 4000, 300))) as strips:
        next(strips)
        time.sleep(0.3)  # enough for hundreds of rows of this network
        assert len(scene.reads) <= 5
    fast = Scene()
    assert len(list(predictions(network, fast, Box(0, 0, 4000, 300)))) > 30
    assert len(fast.reads) > 80, "the control"


def test_a_file_that_cannot_be_read_ends_the_run():
    def broken(box):
        if box.row1 > 300:
            raise RasterError("image.tif cannot be read; fetch it again")

    with pytest.raises(RasterError, match="fetch it again"):
        sheet(plain_model(), Scene(read=broken), Box(0, 0, 1000, 300))
    assert not ours()


@pytest.mark.parametrize("bound", ["read", "forward", "write"])
def test_what_bounds_a_run_is_found(bound):
    slow_s, stages = 0.03, Stages()
    scene = Scene(read=lambda box: time.sleep(slow_s if bound == "read" else 0))
    model = plain_model(wait_s=slow_s if bound == "forward" else 0)
    for _ in predictions(model, scene, Box(0, 0, 500, 60), stages=stages):
        time.sleep(4 * slow_s if bound == "write" else 0)
    assert stages.bound_by == bound, stages
    assert set(stages.seconds) == {"read", "forward", "blend"}


def peak_bytes(rows):
    tracemalloc.start()
    try:
        for _ in predictions(plain_model(), Scene(), Box(0, 0, rows, 200)):
            pass
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def test_memory_is_one_band_however_large_the_sheet():
    peak_bytes(400)  # what is imported and compiled on the way counts once
    small, large = peak_bytes(400), peak_bytes(3200)
    assert large < 1.25 * small, "which buffers live at the same moment is up to the threads, how many is not"
    assert large < 3200 * 200 * 4, "less than one band of the map"

"""Predictions of a sheet: a pixel depends on the image around it, not on what else is asked for, in any precision."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from pyproj import CRS

from canopy.grid import Box, Lattice, Layout
from canopy.model.package import load_model
from canopy.mosaicker.ensemble import Ensemble
from canopy.mosaicker.predict import predict_sheet
from canopy.mosaicker.stages import Stages
from canopy.raster import write_raster
from canopy.tiler.imagery import open_imagery

LATTICE = Lattice(crs=CRS.from_epsg(32610), gsd_m=0.6)
BOX = Box(-8_130_100, 833_310, -8_130_100 + 130, 833_310 + 160)
PART = Box(BOX.row0 + 37, BOX.col0 + 51, BOX.row0 + 101, BOX.col0 + 142)


@pytest.fixture(scope="module")
def photo(tmp_path_factory):
    path = tmp_path_factory.mktemp("photo") / "image.tif"
    values = np.random.default_rng(3).integers(0, 256, (3, *BOX.shape), dtype=np.uint8)
    write_raster(path, values, grid=LATTICE.grid(BOX))
    return path


def sheet(model, photo, box):
    """(row, col) heights and spreads of `box`."""
    layout = Layout(window_px=model.contract.window_px, stride_px=model.contract.stride_px)
    with open_imagery(photo, LATTICE) as imagery:
        strips = [
            prediction.strip
            for prediction in predict_sheet(
                Ensemble(models=(model,)), imagery, layout, box,
                wanted=lambda part: np.ones(part.shape, bool), stages=Stages(), advance=lambda _: None,
            )
        ]  # fmt: skip
    return [np.concatenate([getattr(strip, name) for strip in strips]) for name in ("mean_m", "spread_m")]


@pytest.mark.parametrize("precision", ["float32", "float16", "bfloat16"])
def test_a_part_is_cut_from_the_whole_bit_for_bit(tiny_model, photo, precision):
    model = load_model(tiny_model)
    model = replace(model, network=model.network.to(getattr(torch, precision)), precision=precision)
    whole, part = sheet(model, photo, BOX), sheet(model, photo, PART)
    place = PART.slices_in(BOX)
    for of_whole, of_part in zip(whole, part, strict=True):
        assert of_part.shape == PART.shape
        assert np.isfinite(of_part).all()
        np.testing.assert_array_equal(of_whole[place], of_part)
    heights_m = sheet(load_model(tiny_model), photo, PART)[0]
    assert np.array_equal(heights_m, part[0]) == (precision == "float32"), "the control: precision does move heights"

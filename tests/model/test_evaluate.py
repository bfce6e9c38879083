"""Predicting chips, each pixel of the ground once, and the baselines they are compared with."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from canopy.model.baselines import colour_and_texture, fit_baselines
from canopy.model.evaluate import (
    Place,
    counted,
    needed,
    predict_chip,
)


class Reader:
    """A model whose height is the first band, and whose spread is the second: what it says of a pixel does not depend on
    the window."""

    def __init__(self, window_px: int = 64, stride_px: int = 48, *, lift_m: float = 0.0, abstains_at: float = -1.0) -> None:
        self.contract = SimpleNamespace(window_px=window_px, stride_px=stride_px)
        self.lift_m, self.windows, self.abstains_at = lift_m, 0, abstains_at

    def predict(self, image, valid):
        self.windows += 1
        image = torch.as_tensor(image).float()
        lift = self.lift_m * (self.windows % 2)
        return SimpleNamespace(mean_m=image[:, 0] + lift, spread_m=image[:, 1], abstain=image[:, 0] == self.abstains_at)


@pytest.mark.parametrize("shape", [(64, 64), (40, 64), (65, 64), (200, 131)])
def test_a_blended_chip_is_what_each_pixel_says(shape):
    rng = np.random.default_rng(0)
    image = rng.integers(0, 60, (2, *shape)).astype(np.uint8)
    mean, spread = predict_chip(Reader(), image, np.ones(shape, bool))
    np.testing.assert_allclose(mean, image[0], atol=1e-4)
    np.testing.assert_allclose(spread, image[1], atol=2e-2)


def test_windows_that_disagree_add_to_the_spread():
    image = np.full((2, 160, 160), 5, np.uint8)
    mean, spread = predict_chip(Reader(lift_m=4.0), image, np.ones((160, 160), bool))
    assert mean.min() >= 5 - 1e-4
    assert mean.max() <= 9 + 1e-4
    assert spread.min() >= 5 - 1e-3
    assert spread.max() == pytest.approx(np.sqrt(5**2 + 2**2), abs=0.1)


@pytest.mark.parametrize("side", [64, 160])
def test_where_the_model_abstains_there_is_no_height(side):
    image = np.full((2, side, side), 5, np.uint8)
    image[0, 10:20, 30:50] = 9
    mean, spread = predict_chip(Reader(abstains_at=9.0), image, np.ones((side, side), bool))
    np.testing.assert_array_equal(np.isnan(mean), image[0] == 9)
    np.testing.assert_array_equal(np.isnan(spread), image[0] == 9)
    np.testing.assert_allclose(mean[image[0] == 5], 5, rtol=1e-6)


# --- each pixel once -----------------------------------------------------------------------------------------------------


def place(row: int, col: int, known: np.ndarray, site: str = "A") -> Place:
    return Place(
        chips=None, item=0, lattice=(site, "EPSG:32611", 0.5), row_px=row, col_px=col, shape=known.shape,
        bits=np.packbits(known), calibrates=True, scores=True,
    )  # fmt: skip


@st.composite
def layouts(draw):
    """Chips of random places, sizes and voids, of two sites."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    return [
        place(*rng.integers(-20, 20, 2), rng.random(tuple(rng.integers(1, 24, 2))) < 0.8, "AB"[int(rng.integers(2))])
        for _ in range(draw(st.integers(1, 9)))
    ]


def pixels(places, masks):
    """(site, row, col) of every pixel that counts, as often as it does."""
    found = []
    for p, mask in zip(places, masks, strict=True):
        found += [(p.lattice[0], int(r) + p.row_px, int(c) + p.col_px) for r, c in np.argwhere(mask)]
    return found


@given(layouts())
def test_every_known_pixel_counts_once_and_in_the_chip_with_the_nearest_centre(places):
    found = pixels(places, counted(places))
    every = pixels(places, [p.known for p in places])
    assert len(found) == len(set(found))
    assert set(found) == set(every)
    for p, mask in zip(places, counted(places), strict=True):
        for r, c in np.argwhere(mask):
            row, col = int(r) + p.row_px, int(c) + p.col_px
            at = slice(row, row + 1), slice(col, col + 1)
            rivals = [
                q.distance(*at).item() for q in places
                if q.lattice == p.lattice and 0 <= row - q.row_px < q.shape[0] and 0 <= col - q.col_px < q.shape[1]
                and q.known[row - q.row_px, col - q.col_px]
            ]  # fmt: skip
            assert p.distance(*at).item() == min(rivals)


@given(layouts(), st.integers(0, 12))
def test_chips_that_are_left_out_leave_no_pixel_without_a_near_one(places, reach):
    left = needed(places, reach)
    assert set(pixels(left, counted(left))) == set(pixels(places, [p.known for p in places]))
    before = {pixel: p.distance(slice(pixel[1], pixel[1] + 1), slice(pixel[2], pixel[2] + 1)).item()
              for p, mask in zip(places, counted(places), strict=True) for pixel in pixels([p], [mask])}  # fmt: skip
    for p, mask in zip(left, counted(left), strict=True):
        for pixel in pixels([p], [mask]):
            far = p.distance(slice(pixel[1], pixel[1] + 1), slice(pixel[2], pixel[2] + 1)).item()
            assert far <= max(before[pixel], 2 * reach)


def test_chips_that_overlap_many_times_are_thinned_and_those_that_do_not_are_all_kept():
    whole = np.ones((64, 64), bool)
    dense = [place(row, col, whole) for row in range(0, 145, 16) for col in range(0, 145, 16)]
    every = pixels(dense, [p.known for p in dense])
    assert len(every) > 4 * len(set(every))  # what a score without `counted` would be made of
    assert len(needed(dense, 24)) < len(dense) / 4
    assert len(needed(dense, 0)) == len(dense)
    apart = [place(row, col, whole) for row in range(0, 257, 64) for col in range(0, 257, 64)]
    assert len(needed(apart, 24)) == len(apart)
    assert len(needed([place(0, 0, whole, "A"), place(0, 0, whole, "B")], 24)) == 2


# --- baselines -----------------------------------------------------------------------------------------------------------


def chip(seed: int, side: int = 48, site: str = "A") -> dict:
    rng = np.random.default_rng(seed)
    height = np.kron(rng.uniform(0, 25, (side // 8, side // 8)), np.ones((8, 8))).astype(np.float32)
    image = np.stack([200 - 4 * height, 50 + 5 * height, 80 + 0 * height]) + rng.normal(0, 2, (3, side, side))
    valid = np.ones((side, side), bool)
    valid[:, :5] = False
    return {
        "image": torch.from_numpy(image.astype(np.uint8)),
        "image_valid": torch.ones(side, side, dtype=torch.bool),
        "height_m": torch.from_numpy(np.where(valid, height, np.nan).astype(np.float32)),
        "valid": torch.from_numpy(valid),
        "site": site,
        "id": f"{site}{seed}",
    }


def test_features_do_not_see_what_is_not_valid():
    image = chip(1)["image"].numpy()
    valid = np.ones(image.shape[1:], bool)
    valid[10:30, 20:40] = False
    other = np.where(valid, image, 255).astype(np.uint8)
    np.testing.assert_array_equal(colour_and_texture(image, valid)[valid], colour_and_texture(other, valid)[valid])
    everywhere = np.ones_like(valid)
    assert (colour_and_texture(image, everywhere)[valid] != colour_and_texture(other, everywhere)[valid]).any()


def test_the_forest_says_the_same_of_a_part_as_of_the_whole():
    baselines = fit_baselines((chip(k) for k in range(4)), np.random.default_rng(1), per_chip_px=200, trees=5)
    sample = chip(7, side=96)
    image, seen = sample["image"].numpy(), sample["image_valid"].numpy()
    part = np.zeros_like(seen)
    part[40:50, 30:60] = True
    whole = baselines.predict(image, np.ones_like(seen), seen)
    np.testing.assert_allclose(baselines.predict(image, part, seen)[part], whole[part], atol=0.3)
    assert np.isnan(baselines.predict(image, part, seen)[~part]).all()


def test_the_forest_learns_colour_and_the_same_draws_give_the_same_forest():
    fit = [fit_baselines((chip(k) for k in range(6)), np.random.default_rng(1), per_chip_px=200, trees=10) for _ in range(2)]
    test = chip(9)
    image, seen, known = test["image"].numpy(), test["image_valid"].numpy(), test["valid"].numpy()
    heights = [baselines.predict(image, known, seen) for baselines in fit]
    np.testing.assert_array_equal(heights[0], heights[1])
    assert np.isnan(heights[0][~known]).all()
    true = test["height_m"].numpy()[known]
    assert np.abs(heights[0][known] - true).mean() < 0.2 * np.abs(fit[0].mean_m - true).mean()
    assert fit[0].n == 1200

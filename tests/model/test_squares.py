"""Squares of a map: what is measured in them against plain arithmetic, and that nothing but the square itself counts."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from canopy.grid import Box
from canopy.model.squares import COARSE_PX, FLOOR, HEIGHT_FLOOR_M, SQUARE_PX, Squares, StripSquares, feature_names, measure

CONTRACT = {"mean": (100.0, 110.0, 90.0), "std": (50.0, 45.0, 40.0)}


def scene(rows, cols, seed=0, known=1.0, bands=3):
    rng = np.random.default_rng(seed)
    image = rng.integers(0, 256, (bands, rows, cols), dtype=np.uint8)
    height = rng.gamma(2, 5, (rows, cols)).astype(np.float32)
    return image, rng.random((rows, cols)) < known, height, (0.2 * height + 1).astype(np.float32)


def by_hand(image, known, mean_m, spread_m):
    """The features of one square, pixel by pixel and pair by pair, in float64."""
    mean, std = (np.array(CONTRACT[key])[:, None, None] for key in ("mean", "std"))
    x = (image - mean) / std
    rows, cols = known.shape
    at = [(r, c) for r in range(rows) for c in range(cols) if known[r, c]]

    def log(values):
        return 0.5 * np.log(np.mean(np.square(values)) + FLOOR)

    def steps(picture, dr, dc):
        return [
            picture[r + dr, c + dc] - picture[r, c]
            for r, c in at
            if r + dr < rows and c + dc < cols and known[r + dr, c + dc]
        ]

    means = [np.mean([band[p] for p in at]) for band in x]
    contrast = [log([band[p] - m for p in at]) for band, m in zip(x, means, strict=True)]
    colour = [
        log([(b[p] - n) - (a[p] - m) for p in at]) for a, b, m, n in zip(x[:-1], x[1:], means[:-1], means[1:], strict=True)
    ]
    grey = sum(band - m for band, m in zip(x, means, strict=True)) / len(x)

    def texture(lag):
        both = [np.mean(np.square(steps(grey, *lags))) for lags in ((lag, 0), (0, lag))]
        return 0.5 * np.log(np.mean(both) + FLOOR)

    mixed = [
        grey[r, c] - grey[r + 1, c] - grey[r, c + 1] + grey[r + 1, c + 1]
        for r, c in at
        if r + 1 < rows and c + 1 < cols and known[r + 1, c] and known[r, c + 1] and known[r + 1, c + 1]
    ]
    tint = steps((x[-1] - means[-1]) - (x[0] - means[0]), 0, 1)
    heights = [np.log(np.mean([a[p] for p in at]) + HEIGHT_FLOOR_M) for a in (mean_m, spread_m)]
    return [*means, *contrast, *colour, texture(1), texture(COARSE_PX), log(mixed), log(tint), *heights]


@pytest.mark.parametrize("share", [1.0, 0.8])
def test_features_are_plain_arithmetic_over_what_is_known(share):
    arrays = scene(SQUARE_PX, SQUARE_PX, known=share)
    squares = measure(*arrays, **CONTRACT)
    assert squares.features.dtype == np.float32
    assert squares.features.shape == (1, len(feature_names(3)))
    assert squares.features[0] == pytest.approx(by_hand(*arrays), rel=2e-4, abs=2e-4)


def test_whole_and_cut_squares_are_measured_alike():
    """Two ways through the code: with every pixel known, and with all but one."""
    image, known, mean_m, spread_m = scene(SQUARE_PX, SQUARE_PX)
    whole = measure(image, known, mean_m, spread_m, **CONTRACT).features
    known[-1, -1] = False
    cut = measure(image, known, mean_m, spread_m, **CONTRACT).features
    assert cut == pytest.approx(whole, abs=0.02)
    assert (cut != whole).any()


def test_what_is_not_known_does_not_count():
    image, known, mean_m, spread_m = scene(SQUARE_PX, 3 * SQUARE_PX, known=0.7)
    before = measure(image, known, mean_m, spread_m, **CONTRACT).features
    image[:, ~known], mean_m[~known], spread_m[~known] = 7, np.nan, np.nan
    assert measure(image, known, mean_m, spread_m, **CONTRACT).features.tobytes() == before.tobytes()
    image[:, known] ^= 1
    assert measure(image, known, mean_m, spread_m, **CONTRACT).features.tobytes() != before.tobytes()


def test_squares_that_are_less_than_half_known_are_not_measured():
    image, known, mean_m, spread_m = scene(SQUARE_PX, 3 * SQUARE_PX + 15)  # the last one is cut
    known[: SQUARE_PX // 2, :SQUARE_PX] = False
    known[: SQUARE_PX // 2 + 1, SQUARE_PX : 2 * SQUARE_PX] = False
    squares = measure(image, known, mean_m, spread_m, **CONTRACT)
    assert squares.col.tolist() == [0, 2 * SQUARE_PX]
    assert not len(measure(image, known & False, mean_m, spread_m, **CONTRACT))


def test_one_band_has_no_colours():
    image, known, mean_m, spread_m = scene(SQUARE_PX, SQUARE_PX, bands=1)
    features = measure(image, known, mean_m, spread_m, mean=(100.0,), std=(50.0,)).features
    assert features.shape == (1, len(feature_names(1)))
    assert np.isfinite(features).all()


@given(st.data())
def test_strips_of_any_height_give_the_squares_of_the_lattice_bit_by_bit(data):
    """The same as measuring a larger picture of which the sheet is a part that starts anywhere."""
    rows, cols = data.draw(st.integers(1, 100)), data.draw(st.integers(1, 80))
    box = Box(row0 := data.draw(st.integers(-70, 70)), col0 := data.draw(st.integers(-70, 70)), row0 + rows, col0 + cols)
    arrays = scene(rows, cols, seed=5, known=0.97)
    corner = row0 // SQUARE_PX * SQUARE_PX, col0 // SQUARE_PX * SQUARE_PX
    margin = (row0 - corner[0], 0), (col0 - corner[1], 0)
    padded = [np.pad(a, [(0, 0)] * (a.ndim - 2) + [*margin]) for a in arrays]
    expected = measure(*padded, **CONTRACT)
    strips, found, top = StripSquares(box, **CONTRACT), [], 0
    while top < rows:
        stop = min(top + data.draw(st.integers(1, 60)), rows)
        part = Box(row0 + top, col0, row0 + stop, col0 + cols)
        found.append(strips.add(part, *(a[..., top:stop, :] for a in arrays)))
        top = stop
    squares = Squares.joined(found, 3)
    assert squares.features.tobytes() == expected.features.tobytes()
    assert (squares.row - corner[0]).tolist() == expected.row.tolist()
    assert (squares.col - corner[1]).tolist() == expected.col.tolist()

"""What a model must beat to be worth anything: the mean height of its training data, and a random forest on looks.

The forest sees each pixel through colour and texture only: the bands, their ratios, the brightness and greenness at
several scales, and gradients. No convolution is learned, so what the network gains over it is what it reads from shape.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

SCALES_PX = (3, 7, 15, 31)
"""Sides of the square neighbourhoods; at 0.5 m they reach from a branch to beyond the largest crown."""


def colour_and_texture(image_brc: NDArray[Any], valid_rc: NDArray[np.bool_]) -> NDArray[np.float32]:
    """(row, col, feature) features of each pixel; neighbourhoods count valid pixels only.

    Bands, their shares of the sum, then at each scale the mean and standard deviation of the brightness, the mean of the
    normalised difference of the first two bands, and the mean gradient magnitude. With bands red, green, ... the
    difference is the green-red vegetation index.
    """
    from scipy.ndimage import sobel, uniform_filter

    bands = np.where(valid_rc, image_brc, 0).astype(np.float32)
    valid = valid_rc.astype(np.float32)
    bright = bands.mean(axis=0)
    features = [*bands, *(bands / np.maximum(bands.sum(axis=0), 1.0))]
    second = bands[min(1, len(bands) - 1)]
    green = (second - bands[0]) / np.maximum(second + bands[0], 1.0)
    steep = np.hypot(sobel(bright, axis=0), sobel(bright, axis=1))
    features += [green, steep]
    for side in SCALES_PX:
        count = np.maximum(uniform_filter(valid, side, mode="constant"), 1e-6)

        def local(x: NDArray[np.float32], side: int = side, count: NDArray[np.float32] = count) -> NDArray[np.float32]:
            mean: NDArray[np.float32] = uniform_filter(x * valid, side, mode="constant") / count
            return mean

        mean = local(bright)
        features += [mean, np.sqrt(np.maximum(local(bright**2) - mean**2, 0.0)), local(green), local(steep)]
    return np.stack(features, axis=-1).astype(np.float32)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Baselines:
    """Both baselines, fitted on training chips."""

    mean_m: float
    """Mean of the sampled training heights: the prediction of the constant baseline, metres."""
    n: int
    """Training pixels sampled."""
    forest: Any
    """The fitted `RandomForestRegressor`."""

    def predict(
        self, image_brc: NDArray[Any], wanted_rc: NDArray[np.bool_], seen_rc: NDArray[np.bool_]
    ) -> NDArray[np.float32]:
        """Heights (row, col) in metres by the random forest where `wanted_rc`, NaN elsewhere.

        `seen_rc` is where there is imagery; only it counts in neighbourhoods.
        """
        heights = np.full(wanted_rc.shape, np.nan, dtype=np.float32)
        if wanted_rc.any():
            # Features only as far around what is wanted as the widest neighbourhood reaches.
            reach = max(SCALES_PX) // 2 + 1
            rows, cols = (np.flatnonzero(wanted_rc.any(axis=axis)) for axis in (1, 0))
            part = slice(max(rows[0] - reach, 0), rows[-1] + reach + 1), slice(max(cols[0] - reach, 0), cols[-1] + reach + 1)
            features = colour_and_texture(image_brc[:, *part], seen_rc[part])
            heights[wanted_rc] = self.forest.predict(features[wanted_rc[part]])
        return heights


def fit_baselines(
    chips: Iterable[Mapping[str, Any]], rng: np.random.Generator, *, per_chip_px: int, trees: int = 100, threads: int = 1
) -> Baselines:
    """Fit both on at most `per_chip_px` random labelled pixels of each training chip.

    Args:
        chips: Training chips as `canopy.model.data.ChipDataset` gives them; read once, in order.
        rng: Draws the pixels and seeds the forest.
        per_chip_px: Most pixels taken from one chip.
        trees: Trees of the forest.
        threads: Threads to fit and predict with.
    """
    from sklearn.ensemble import RandomForestRegressor

    features, heights = [], []
    for chip in chips:
        rows, cols = np.nonzero(chip["valid"].numpy())
        take = rng.permutation(rows.size)[:per_chip_px]
        if take.size:
            at = rows[take], cols[take]
            features.append(colour_and_texture(chip["image"].numpy(), chip["image_valid"].numpy())[at])
            heights.append(chip["height_m"].numpy()[at])
    assert heights, "no labelled training pixel for the baselines"
    x, y = np.concatenate(features), np.concatenate(heights)
    forest = RandomForestRegressor(
        n_estimators=trees,
        min_samples_leaf=8,
        max_features="sqrt",
        n_jobs=threads,
        random_state=int(rng.integers(2**31)),
    )
    forest.fit(x, y)
    return Baselines(mean_m=float(y.mean(dtype=np.float64)), n=y.size, forest=forest)

"""Sub-pixel shift between a height label and the image it lies on, applied only when it makes them agree better.

How the two are compared. What tall trees look like differs from scene to scene (dark on a meadow, bright on a lava field),
so no single map of "canopy" is correlated with the heights. Instead a few maps of the heights (crown or not, log height, sky
openness, light) and a few of the image (log bands, texture, darkness), all high-passed, are taken for two Gaussian vectors,
and the score of a shift is their mutual information, -1/2 log det(I - C'C) with C the cross-covariance of the whitened maps
(Kay 1992; canonical correlation analysis). It does not care for sign, gain or colour balance. The cross-covariances of all
whole-pixel shifts come from FFTs, unknown pixels being zero and the sums being divided by the number of known pairs
(Padfield 2012); between pixels they are band-limited, so a spline through them is exact enough.

Shadows lie beside crowns and tree tops lean away from the camera, and both move the best match by a pixel or more. Where
there is enough canopy, the direction of the light, its height and the lean are therefore estimated together with the shift:
the maps of the heights are drawn as a camera would see them and the score is climbed in those four numbers. That light is
believed only when it explains the image much better than none (`LIGHT_GAIN`); real images rarely allow it, simulated ones
do. The shift is that of the ground: a lean is not corrected, since no shift of a raster can. Where no light was found it
is the shift of the crowns as they are seen.

A label is moved only when the shift is `CONFIDENCE` times longer than its uncertainty, which is put together from the
disagreement of two halves and from what simulated pairs showed of the rest (`LEAN_ERROR`, `UNLIT_ERROR_M`, `PLACE_ERROR`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal

import numpy as np
from numba import njit
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field
from scipy import fft, ndimage, optimize, special

from canopy.raster import Pixels

Float32 = NDArray[np.float32]
Float64 = NDArray[np.float64]
Mask = NDArray[np.bool_]

APPLIED: Final = "applied"
"""The decision of a shift that label production takes; every other one is "kept: " and the reason."""

FINE_GSD_M: Final = 0.5
"""Finer images are averaged to about this: leaves are not in the heights."""
COARSE_GSD_M: Final = 1.1
"""Resolution at which the light is first searched, and followed in COARSE_STEPS."""
BAND_M: Final = 2.0
"""Standard deviation of the Gaussian whose blur is subtracted from every map: crowns stay, fields and hills go."""
BLUR_PX: Final = 0.8
"""Of every map, so that its values between pixels are known."""
SEEN_BLUR_PX: Final = 1.0
"""Of the height maps before they lean, so that the resampling adds no blur of its own at some shifts and none at others."""
INDEPENDENT_M2: Final = 4.0
"""Area that counts as one independent observation in the priors below."""
SHIFT_PRIOR_M: Final = 3.0
LEAN_PRIOR: Final = 0.06
"""Standard deviation of the lean, m per m of height: 3.5 degrees off the zenith."""
SHADOW_PRIOR: Final = 1.2
"""Standard deviation of the length of a shadow, m per m of height."""
LIGHT_CELLS: Final = 300
"""Independent observations below which no light is searched: four numbers more would fit the noise."""
LIGHT_CAP: Final = 100.0
"""Independent observations that may speak against the prior of the light: the model is a likeness, not the truth."""
LIGHT_GAIN: Final = 0.2
"""Score, nats a pixel, that a light has to add to be believed."""
LIGHT_SHARE: Final = 0.25
"""The same as a share of the score without a light."""
SUNS: Final = 8
COARSE_STEPS: Final = (0.25, 0.12)
FINE_STEPS: Final = (0.08, 0.05)
"""Steps of the climb in the shadow, m per m of height; the lean takes `LEAN_STEP` of them."""
LEAN_STEP: Final = 0.2
LEAN_ERROR: Final = 0.15
"""Share of the fitted lean of the tree tops that counts as uncertainty of the ground's shift: a lean together with the
opposite shift looks nearly the same, and simulated leans come out short by about this much."""
UNLIT_ERROR_M: Final = 0.2
"""Uncertainty along an axis where no light was found: shadows pull the label towards the sun by about this much. A lean that
was not found is not in it; the label then goes to where the crowns are seen, not to where they stand."""
PLACE_ERROR: Final = 0.12
"""Uncertainty along an axis where the halves agree and nothing leans, in pixels as they are compared."""
CHANCE_M2: Final = 6.0
"""Area that counts as one independent observation when a score is held against chance, from pairs that do not belong."""
CONFIDENCE: Final = 3.0
"""A shift is applied when it is longer than this many times its uncertainty: a label that is in place stays there."""
CELL_M: Final = 4.0
"""Side of the cells of the chessboard whose colours vote on their own."""
EDGE_M: Final = 3.0
"""A pixel is at a canopy edge when the heights within `EDGE_REACH_M` differ by more than this."""
EDGE_REACH_M: Final = 1.5


@dataclass(frozen=True, slots=True, kw_only=True)
class Shift:
    """What has to be added to a label's coordinates so that it lies on the image, and whether to do it."""

    x_m: float
    """Eastwards, metres; NaN when nothing could be measured."""
    y_m: float
    """Northwards, metres; NaN when nothing could be measured."""
    score_before: float
    """Dependence of image and label as they came, nats a pixel; on the same pixels as `score_after`. NaN: not measured."""
    score_after: float
    """The same with the label shifted."""
    contrast: float
    """Share of the known heights that lie on edges of the canopy, 0 to 1: what there is to register by."""
    decision: str
    """"applied", or "kept: " and the reason. `x_m` and `y_m` are what was measured in both cases."""
    reliable: bool = False
    """Whether the measurement can be trusted, applied or not: it is then a vote on the shift of its acquisition."""

    @property
    def applied(self) -> bool:
        """Whether the label is to be moved."""
        return self.decision == APPLIED


class RegistrationSettings(BaseModel):
    """The table [registration] of a recipe."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    apply: Literal["never", "chip", "acquisition"] = "acquisition"
    """"never": measure and report only; "chip": each chip by its own shift; "acquisition": all chips of one image and one
    survey by one robust shift (`robust_shift`), the safer one on real imagery: see `notebooks/LOG.md`."""
    max_shift_m: float = Field(default=6.0, gt=0, le=100)
    """Longest plausible shift along an axis; at most a quarter of the chip's shorter side is searched."""
    min_contrast: float = Field(default=0.05, ge=0, le=1)
    """Least share of canopy edges (`Shift.contrast`)."""
    min_gain: float = Field(default=0.005, ge=0)
    """Least improvement of the score, nats a pixel."""
    max_disagreement_m: float = Field(default=1.0, gt=0)
    """Largest distance between the shifts that two interleaved halves of a chip measure each on its own."""
    max_rival: float = Field(default=0.6, gt=0, le=1)
    """Highest score elsewhere (more than 2 m away), as a share of the best, both above the median score."""
    max_chance: float = Field(default=0.01, gt=0, lt=1)
    """Highest probability that an image and heights that have nothing to do with each other score as well somewhere within
    the reach. A chip above it is not moved by its own shift, but votes on that of its acquisition."""
    min_votes: int = Field(default=3, ge=1)
    """Reliable chips that must agree on the shift of an acquisition."""


# --- what a camera would see of the heights -----------------------------------------------------------------------------


@njit(cache=True)
def _sunlight(h: Float32, step_m: float, row: float, col: float, rise: float) -> Float32:
    """Share of direct sunlight at each surface pixel; rays march by one pixel along (row, col) and rise `rise` m/m."""
    rows, cols = h.shape
    block = 8
    tops = np.zeros((rows // block + 1, cols // block + 1), np.float32)
    tallest = np.float32(0)
    for r in range(rows):
        for c in range(cols):
            tops[r // block, c // block] = max(tops[r // block, c // block], h[r, c])
            tallest = max(tallest, h[r, c])
    out = np.ones((rows, cols), np.float32)
    dz = rise * step_m
    for r in range(rows):
        for c in range(cols):
            z, y, x, leaves = h[r, c], float(r), float(c), 0.0
            while True:
                y, x, z = y + row, x + col, z + dz
                if z > tallest:
                    break
                i, j = int(y + 0.5), int(x + 0.5)
                if y < 0 or x < 0 or i >= rows or j >= cols:
                    break
                if z > tops[i // block, j // block]:
                    y, x, z = y + 2 * row, x + 2 * col, z + 2 * dz
                    continue
                if 0.3 * h[i, j] < z < h[i, j]:
                    leaves += step_m
                    if leaves > 6:
                        break
            out[r, c] = math.exp(-0.6 * leaves)
    return out


@njit(cache=True)
def _light(  # noqa: PLR0917 - numba takes arguments by position
    h: Float32, sunlight: Float32, openness: Float32, crown: Float32, step_m: float, row: float, col: float, up: float
) -> Float32:
    """Three maps of the heights, the sun at (row, col, up): light, light in crowns, direct sun.

    Crowns are clouds of leaves: slopes saturate and light wraps around them.
    """
    rows, cols = h.shape
    out = np.empty((3, rows, cols), np.float32)
    for r in range(rows):
        above, below = max(r - 1, 0), min(r + 1, rows - 1)
        for c in range(cols):
            west, east = max(c - 1, 0), min(c + 1, cols - 1)
            dy = (h[below, c] - h[above, c]) / (2 * step_m)
            dx = (h[r, east] - h[r, west]) / (2 * step_m)
            soft = 0.75 / (1 + 0.3 * math.sqrt(dx * dx + dy * dy))
            dy, dx = dy * soft, dx * soft
            facing = (-dy * row - dx * col + up) / math.sqrt(1 + dx * dx + dy * dy)
            direct = max(0.0, (facing + 0.22) / 1.22) * sunlight[r, c]
            light = math.log(direct + 0.25 * openness[r, c])
            out[0, r, c] = light
            out[1, r, c] = light * crown[r, c]
            out[2, r, c] = direct
    return out


@njit(cache=True)
def _leant(  # noqa: PLR0917 - numba takes arguments by position
    features: Float32, h: Float32, row: float, col: float, step_m: float, level_m: float
) -> Float32:
    """What a camera off the zenith sees: what stands at height z is displaced by (z - level_m) * (row, col)."""
    bands, rows, cols = features.shape
    slope = math.hypot(row, col)
    tallest = h.max()
    if slope * tallest < 0.02 * step_m:
        return features
    out = np.empty_like(features)
    uy, ux = row / slope, col / slope
    back = slope * level_m / step_m
    tests = 2
    longest = int(tallest * slope / step_m * tests) + 1
    drop = step_m / slope / tests
    for r in range(rows):
        for c in range(cols):
            y0, x0 = r + back * uy, c + back * ux
            y, x = y0, x0
            over = 0.0
            for t in range(longest, -1, -1):
                q, p = y0 - t / tests * uy, x0 - t / tests * ux
                if q < 0 or p < 0 or q >= rows - 1 or p >= cols - 1:
                    over = 0.0
                    continue
                i, j = int(q), int(p)
                fy, fx = q - i, p - j
                z = (h[i, j] * (1 - fx) + h[i, j + 1] * fx) * (1 - fy) + (h[i + 1, j] * (1 - fx) + h[i + 1, j + 1] * fx) * fy
                gap = t * drop - z
                if gap <= 0:
                    # The line of sight enters the surface between this test and the one before.
                    part = gap / (gap - over) if over > 0 else 0.0
                    y, x = q - part * uy / tests, p - part * ux / tests
                    break
                over = gap
            y, x = min(max(y, 0.0), rows - 1.001), min(max(x, 0.0), cols - 1.001)
            i, j = int(y), int(x)
            fy, fx = y - i, x - j
            for b in range(bands):
                top = features[b, i, j] * (1 - fx) + features[b, i, j + 1] * fx
                low = features[b, i + 1, j] * (1 - fx) + features[b, i + 1, j + 1] * fx
                out[b, r, c] = top * (1 - fy) + low * fy
    return out


# --- features ------------------------------------------------------------------------------------------------------------


def _binned(a: NDArray[Any], factor: int) -> NDArray[Any]:
    rows, cols = a.shape[-2] // factor * factor, a.shape[-1] // factor * factor
    cut = a[..., :rows, :cols]
    return cut.reshape(*a.shape[:-2], rows // factor, factor, cols // factor, factor).mean((-3, -1))  # type: ignore[no-any-return]


@njit(cache=True)
def _weighted(maps: Float32, taps: Float32) -> Float32:
    """Every map correlated with `taps` along rows and columns, mirrored at the edges."""
    bands, rows, cols = maps.shape
    n = len(taps) // 2
    out = np.zeros_like(maps)
    line = np.empty(cols + 2 * n, np.float32)
    middle = line[n : n + cols]
    for b in range(bands):
        for r in range(rows):
            line[:] = 0
            for k in range(2 * n + 1):
                q = (r + k - n) % (2 * rows)
                above = maps[b, q if q < rows else 2 * rows - 1 - q]
                for c in range(cols):
                    middle[c] += taps[k] * above[c]
            for k in range(n):
                for c, e in ((-1 - k, n - 1 - k), (cols + k, n + cols + k)):
                    p = c % (2 * cols)
                    line[e] = middle[p if p < cols else 2 * cols - 1 - p]
            sums = out[b, r]
            for k in range(2 * n + 1):
                beside = line[k : k + cols]
                for c in range(cols):
                    sums[c] += taps[k] * beside[c]
    return out


def _blurred(maps: Float32, sigma_px: float) -> Float32:
    """(band, row, col) maps under a Gaussian that ends at 2.5 standard deviations; several times faster than SciPy's."""
    radius = int(2.5 * sigma_px + 0.5)
    taps = np.exp(-0.5 * (np.arange(-radius, radius + 1) / sigma_px) ** 2)
    return _weighted(np.ascontiguousarray(maps, np.float32), (taps / taps.sum()).astype(np.float32))


def _high_passed(maps: Float32, known: Float32, smooth: tuple[Float32, Float32] | None, sigma_px: float) -> Float32:
    """Each map slightly blurred, less its wide blur, both over known pixels only; 0 at the others."""
    if smooth is None:
        soft = _blurred(maps, BLUR_PX)
        return soft - _blurred(soft, sigma_px)
    near, wide = smooth
    soft = _blurred(maps * known, BLUR_PX) / near * known
    return (soft - _blurred(soft, sigma_px) / wide) * known


def _local_weight(known: Float32, sigma_px: float) -> tuple[Float32, Float32] | None:
    """Share of known pixels under both blurs of `_high_passed`; None where all are known."""
    if known.all():
        return None
    near, wide = (np.maximum(_blurred(known[None], sigma)[0], np.float32(1e-3)) for sigma in (BLUR_PX, sigma_px))
    return near, wide


def _whitened(maps: Float32, known: Float32, ridge: float) -> Float32:
    """Linear combinations of the maps that are uncorrelated, of unit variance over the known pixels; others are 0."""
    flat = maps.reshape(len(maps), -1)
    covariance = (flat @ flat.T).astype(np.float64) / max(float(known.sum()), 1.0)
    scale = np.diag(covariance)
    keep = scale > 1e-10
    flat, covariance, scale = flat[keep], covariance[np.ix_(keep, keep)], scale[keep]
    if not keep.any():
        return maps[:0]
    inverse = np.linalg.inv(np.linalg.cholesky(covariance + ridge * np.diag(scale)))
    return np.ascontiguousarray((inverse.astype(np.float32) @ flat).reshape(-1, *maps.shape[1:]))


def _image_maps(data: Float32, valid: Mask, gsd_m: float) -> Float32:
    """What an image shows, unitless: log of each band, texture and darkness."""
    known = valid.astype(np.float32)
    top = np.quantile(data[:, valid], 0.98, axis=1)[:, None, None] + 1e-6
    bands = np.where(valid, np.clip(data / top, 0, None), 0.5).astype(np.float32)
    logs = np.log(bands + 0.03)
    light = logs.mean(0)
    sigma = 0.8 / gsd_m
    detail = light - ndimage.gaussian_filter(light, sigma)
    texture = np.log(ndimage.gaussian_filter(detail**2, sigma) + 1e-3)
    grey = bands.mean(0)
    quarter, middle = np.quantile(grey[valid], (0.25, 0.5))
    dark = 1 / (1 + np.exp(np.clip((grey - quarter) / max(0.25 * (middle - quarter), 1e-3), -30, 30)))
    return np.concatenate([logs, texture[None], dark[None]]).astype(np.float32) * known


def _dependence(c: Float64) -> Any:
    """Mutual information of two whitened Gaussian vectors, nats, from their cross-covariance (..., k, m)."""
    m = c.shape[-1]
    return -0.5 * np.linalg.slogdet(np.eye(m) - 0.998 * np.swapaxes(c, -1, -2) @ c)[1]


class _Pair:
    """Image and label at one resolution: scores label against image as a function of light, lean and shift."""

    def __init__(
        self, data: Float32, valid: Mask, height_m: Float32, *, gsd_m: float, reach_px: int, level_m: float
    ) -> None:
        self.gsd_m, self.reach = gsd_m, reach_px
        self.sigma = max(BAND_M, 1.7 * gsd_m) / gsd_m
        self.level_m = level_m
        known_y = valid.astype(np.float32)
        y = _high_passed(_image_maps(data, valid, gsd_m), known_y, _local_weight(known_y, self.sigma), self.sigma)
        self.known_y = known_y
        pad = reach_px + 2
        self.pad = pad
        self.y = np.pad(_whitened(y, known_y, 1e-4), ((0, 0), (pad, pad), (pad, pad)))
        known = np.isfinite(height_m)
        self.known = known.astype(np.float32)
        self.h = height_m if known.all() else _filled(height_m, known)
        self.smooth = _local_weight(self.known, self.sigma)
        around = ndimage.gaussian_filter(self.h, 2.6 / gsd_m, truncate=2.0)
        self.openness = (0.3 + 0.7 / (1 + np.exp(np.clip((around - self.h - 1) / 1.8, -30, 30)))).astype(np.float32)
        self.crown = (1 / (1 + np.exp(-np.clip((self.h - 1.5) / 0.5, -30, 30)))).astype(np.float32)
        self.shape_maps = _blurred(np.stack([self.crown, self.openness, np.log1p(np.maximum(self.h, 0))]), SEEN_BLUR_PX)
        self.f_known = np.conj(fft.rfft2(self.known, self._shape))
        n = fft.irfft2(self.f_known * fft.rfft2(known_y, self._shape), self._shape)
        lags = np.arange(-reach_px - 1, reach_px + 2)
        self.pairs = np.maximum(n[np.ix_(lags, lags)], 1.0)
        self.overlap = self.pairs[1:-1, 1:-1] / self.pairs.max()
        self.independent = float(self.known.sum()) * gsd_m**2 / INDEPENDENT_M2
        far = np.indices(self.overlap.shape) - reach_px
        self.far_price = 0.5 * (far**2).sum(0) * (gsd_m / SHIFT_PRIOR_M) ** 2 / self.independent
        self.fy: Any = None
        self.shift = (0.0, 0.0)

    @property
    def _shape(self) -> tuple[int, int]:
        rows, cols = self.known_y.shape
        return fft.next_fast_len(rows + self.reach + 2, real=True), fft.next_fast_len(cols + self.reach + 2, real=True)

    def lit(self, shadow_row: float, shadow_col: float) -> Float32:
        """The six height maps under a sun, seen from above: crown, openness, log height and those of `_light`."""
        shadow = math.hypot(shadow_row, shadow_col)
        if shadow > 1e-3:
            row, col, rise = -shadow_row / shadow, -shadow_col / shadow, 1 / shadow
            cosine, up = math.cos(math.atan(rise)), math.sin(math.atan(rise))
            sun = _sunlight(self.h, self.gsd_m, row, col, rise)
        else:
            row = col = cosine = 0.0
            up, sun = 1.0, np.ones_like(self.h)
        maps = _light(self.h, sun, self.openness, self.crown, self.gsd_m, row * cosine, col * cosine, up)
        return np.concatenate([self.shape_maps, _blurred(maps, SEEN_BLUR_PX)])

    def seen(self, light: Any, lit: Float32 | None = None) -> Float32:
        """Height maps as seen under `light` = (shadow row, shadow col, lean row, lean col), m per m of height.

        `lit`, the maps under its shadow, are drawn when they are not given.
        """
        maps = self.lit(light[0], light[1]) if lit is None else lit
        maps = _leant(maps, self.h, light[2], light[3], self.gsd_m, self.level_m)
        return _high_passed(maps, self.known, self.smooth, self.sigma)

    def score_map(self, x: Float32) -> Float64:
        """Score of every whole-pixel shift up to the reach, (2 reach + 1)²."""
        return self.scored(self.cross(self.spectrum(_whitened(x, self.known, 1e-3))))

    def spectrum(self, x: Float32) -> Any:
        """Fourier transform of whitened height maps, for `cross`."""
        return np.conj(fft.rfft2(x, self._shape))

    def scored(self, cross: Float64) -> Float64:
        """Scores (2 reach + 1)² of cross-covariances, per known pixel of the label: what hangs over gives none."""
        return _dependence(cross) * self.overlap - self.far_price  # type: ignore[no-any-return]

    def peak(self, scores: Float64) -> None:
        """Put `shift` on the highest of `scores`."""
        i, j = np.unravel_index(int(scores.argmax()), scores.shape)
        self.shift = (int(i) - self.reach, int(j) - self.reach)

    def cross(self, fx: Any, part: Float32 | None = None) -> Float64:
        """Cross-covariances at every whole-pixel shift up to the reach, (2 reach + 1, 2 reach + 1, k, m).

        Of the maps with spectrum `fx`, with the image, of which only the pixels in `part` when that is given.
        """
        y = self.y[:, self.pad : -self.pad, self.pad : -self.pad]
        if part is None:
            if self.fy is None:
                self.fy = fft.rfft2(y, self._shape)
            fy, pairs = self.fy, self.pairs[1:-1, 1:-1]
        else:
            fy, pairs = fft.rfft2(y * part, self._shape), self.pairs_with(part)
        lags = np.arange(-self.reach, self.reach + 1)
        c = np.empty((len(lags), len(lags), len(fx), len(y)))
        for k in range(len(fx)):
            # Only the rows of the lags go through the second inverse transform.
            some = fft.ifft(fx[k] * fy, axis=1)[:, lags]
            c[:, :, k] = np.moveaxis(fft.irfft(some, self._shape[1], axis=2)[:, :, lags], 0, -1)
        return np.asarray(c / pairs[:, :, None, None])

    def pairs_with(self, part: Float32) -> Float64:
        """Number of known pairs at every shift, counting the pixels of the image in `part` only."""
        n = fft.irfft2(self.f_known * fft.rfft2(self.known_y * part, self._shape), self._shape)
        lags = np.arange(-self.reach, self.reach + 1)
        return np.maximum(n[np.ix_(lags, lags)], 1.0)  # type: ignore[no-any-return]

    def settle(self, cross: Float64) -> tuple[float, float, float]:
        """Sub-pixel place (row, col) and height of the peak of the score near `shift`, from `cross` of whitened maps.

        The covariances are band-limited, so a quintic spline through a few of them is their value in between; the score
        itself is too pointed for that.
        """
        size = 2 * self.reach + 1
        start = [int(np.clip(round(v) + self.reach - 4, 0, max(size - 9, 0))) for v in self.shift]
        patch = cross[start[0] : start[0] + 9, start[1] : start[1] + 9]
        knots = ndimage.spline_filter1d(ndimage.spline_filter1d(patch, 5, axis=0, mode="mirror"), 5, axis=1, mode="mirror")

        def loss(v: Float64) -> Float64:
            rows, cols = (np.stack([_spline_weights(t, n) for t in v[:, i]]) for i, n in enumerate(knots.shape[:2]))
            along = (rows @ knots.reshape(len(knots), -1)).reshape(len(v), knots.shape[1], -1)
            return -_dependence((cols[:, None] @ along).reshape(len(v), *knots.shape[2:]))  # type: ignore[no-any-return]

        first = [
            float(np.clip(v + self.reach - s, 0, n - 1)) for v, s, n in zip(self.shift, start, knots.shape, strict=False)
        ]
        found = _least(
            loss, np.array(first), [(max(0, v - 1), min(v + 1, n - 1)) for v, n in zip(first, knots.shape, strict=False)]
        )
        row, col = (float(v) + s - self.reach for v, s in zip(found.x, start, strict=True))
        return row, col, -float(found.fun)

    def around(self, x: Float32, at: tuple[int, ...]) -> Float64:
        """Cross-covariances at the 3 x 3 shifts around `at`, (3, 3, k, m)."""
        rows, cols = x.shape[1:]
        flat = x.reshape(len(x), -1)
        out = np.empty((3, 3, len(x), len(self.y)))
        for i in range(3):
            for j in range(3):
                dy, dx = at[0] + i - 1, at[1] + j - 1
                y = self.y[:, self.pad + dy : self.pad + dy + rows, self.pad + dx : self.pad + dx + cols]
                out[i, j] = (flat @ y.reshape(len(y), -1).T) / self.pairs[dy + self.reach + 1, dx + self.reach + 1]
        return out

    def climb(self, light: Any, step: float) -> tuple[Any, float]:
        """One step of Gauss-Newton kind: light and shift that maximise the score where the maps are linear in the light.

        The maps are drawn once at `light` and once more for each of its four numbers moved by `step`. Their covariances with
        the image, at the 3 x 3 shifts around `at`, then give the score of any light and shift nearby without drawing again.
        """
        units = np.eye(4) * (step, step, LEAN_STEP * step, LEAN_STEP * step)
        lights = [light, *(light + sign * unit for unit in units for sign in (1, -1))]
        lit = self.lit(light[0], light[1])
        x = np.concatenate([self.seen(v, lit if number == 0 or number > 4 else None) for number, v in enumerate(lights)])
        bands = len(x) // 9
        flat = x.reshape(len(x), -1)
        inner = (flat @ flat.T).astype(np.float64).reshape(9, bands, 9, bands) / float(self.known.sum())
        at = tuple(int(np.clip(round(v), -self.reach, self.reach)) for v in self.shift)
        for _ in range(8):
            cross = self.around(x, at).reshape(9, 9, bands, -1)
            centre = _information(inner[0, :, 0], cross[:, 0])
            k = int(centre.argmax())
            to = tuple(int(np.clip(v + by[k], -self.reach, self.reach)) for v, by in zip(at, (_ROW, _COL), strict=True))
            if to == at:
                break
            at = to

        def loss(v: Float64) -> Float64:
            w = np.concatenate([np.ones((len(v), 1)), np.repeat(v[:, :4] / 2, 2, axis=1) * (1, -1, 1, -1, 1, -1, 1, -1)], 1)
            places = (_between(v[:, 4])[:, :, None] * _between(v[:, 5])[:, None]).reshape(len(v), 9)
            half = (w @ inner.reshape(9, -1)).reshape(len(v), bands, 9, bands)
            xx = (w[:, None, None] @ half)[:, :, 0]
            xy = (w[:, None] @ (places @ cross.reshape(9, -1)).reshape(len(v), 9, -1)).reshape(len(v), bands, -1)
            price = self.price(light + step * v[:, :4] * (1, 1, LEAN_STEP, LEAN_STEP))
            return price - _information(xx, xy)  # type: ignore[no-any-return]

        best = _least(loss, np.zeros(6), [(-2.0, 2.0)] * 4 + [(-1.0, 1.0)] * 2)
        self.shift = (at[0] + float(best.x[4]), at[1] + float(best.x[5]))
        return light + step * best.x[:4] * (1, 1, LEAN_STEP, LEAN_STEP), -float(best.fun)

    def price(self, lights: Float64) -> Float64:
        """Prior of lights (n, 4) in nats a pixel: few pixels cannot prove an unusual view."""
        unusual = (lights[:, :2] ** 2).sum(1) / SHADOW_PRIOR**2 + (lights[:, 2:] ** 2).sum(1) / LEAN_PRIOR**2
        return np.asarray(0.5 * unusual / min(self.independent, LIGHT_CAP))


def _least(loss: Callable[[Float64], Float64], start: Any, bounds: list[tuple[float, float]]) -> optimize.OptimizeResult:
    """Minimum of `loss`, which takes points (n, k) at once: a gradient by differences is one call."""
    small = 1e-6 * np.concatenate([np.zeros((1, len(start))), np.eye(len(start))])

    def with_gradient(v: Float64) -> tuple[float, Float64]:
        values = loss(v + small)
        return float(values[0]), (values[1:] - values[0]) / 1e-6

    return optimize.minimize(
        with_gradient, start, jac=True, method="L-BFGS-B", bounds=bounds, options={"maxiter": 40, "ftol": 1e-7}
    )


def _spline_weights(t: float, count: int) -> Float64:
    """Weights of quintic B-spline coefficients 0 .. count - 1 at t, the ends mirrored."""
    out = np.zeros(count)
    for k in range(math.floor(t) - 2, math.floor(t) + 4):
        x = abs(t - k)
        if x < 1:
            w = 11 / 20 - x**2 / 2 + x**4 / 4 - x**5 / 12
        elif x < 2:
            w = 17 / 40 + 5 * x / 8 - 7 * x**2 / 4 + 5 * x**3 / 4 - 3 * x**4 / 8 + x**5 / 24
        else:
            w = max(3 - x, 0.0) ** 5 / 120
        j = abs(k)
        out[j if j < count else 2 * (count - 1) - j] += w
    return out


def _between(t: Float64) -> Float64:
    """Weights (n, 3) of the values at -1, 0, 1 in the parabola through them, at t (n,)."""
    return np.stack([t * (t - 1) / 2, 1 - t * t, t * (t + 1) / 2], axis=-1)


def _information(xx: Float64, xy: Float64) -> Any:
    """Mutual information of a Gaussian vector x with a white one y, nats, from covariances (..., k, k) and (..., k, m)."""
    ridge = xx * (1 + 1e-3 * np.eye(xx.shape[-1]))
    c = np.linalg.solve(np.linalg.cholesky(ridge), xy)
    return _dependence(c)


def _filled(height_m: Float32, known: Mask) -> Float32:
    index = ndimage.distance_transform_edt(~known, return_distances=False, return_indices=True)
    return np.ascontiguousarray(height_m[tuple(index)])


_ROW, _COL = np.mgrid[-1:2, -1:2].reshape(2, 9)


# --- measuring -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class _Match:
    """Where a label fits an image, in metres (x east, y north), and what speaks for it."""

    x_m: float
    y_m: float
    score_before: float
    score_after: float
    apart_m: float
    """Between the shifts of two interleaved halves."""
    rival: float
    uncertainty_m: float
    chance: float
    """Probability of such a score, at any shift, without any dependence."""
    light: tuple[float, float, float, float] | None
    """Shadow and lean (row, col), m per m of height, when the image showed them."""


def _pair(image: Pixels, height_m: Float32, gsd_m: float, *, factor: int, reach_m: float, level_m: float) -> _Pair:
    """Both averaged over `factor` x `factor` pixels; a pixel with an unknown part is unknown."""
    data = _binned(image.data.astype(np.float32), factor).astype(np.float32)
    valid = _binned(image.valid.astype(np.float32), factor) == 1
    heights = _binned(height_m, factor).astype(np.float32)
    step_m = gsd_m * factor
    reach_px = max(1, math.floor(reach_m / step_m))
    return _Pair(data, valid, heights, gsd_m=step_m, reach_px=reach_px, level_m=level_m)


def _first_light(pair: _Pair) -> tuple[Float64, float]:
    """A light for the coarse pair, climbed from the best sun, and what it adds to the score; moves `shift`."""
    plain = pair.score_map(pair.seen(np.zeros(4)))
    best, light = -math.inf, np.zeros(4)
    for azimuth in np.arange(SUNS) * 2 * math.pi / SUNS:
        candidate = np.array([-0.9 * math.cos(azimuth), 0.9 * math.sin(azimuth), 0.0, 0.0])
        scores = pair.score_map(pair.seen(candidate))
        if scores.max() > best:
            best, light = float(scores.max()), candidate
            pair.peak(scores)
    for step in COARSE_STEPS:
        light, best = pair.climb(light, step)
    return light, best - float(plain.max())


def _match(image: Pixels, height_m: Float32, gsd_m: float, reach_m: float) -> _Match:
    tall = height_m[np.isfinite(height_m) & (height_m > 2)]
    level_m = float(np.median(tall)) if tall.size else 0.0
    factor = max(1, round(FINE_GSD_M / gsd_m))
    fine = _pair(image, height_m, gsd_m, factor=factor, reach_m=reach_m, level_m=level_m)
    light: Float64 | None = np.zeros(4)
    fx = fine.spectrum(_whitened(fine.seen(light), fine.known, 1e-3))
    cross = fine.cross(fx)
    fine.peak(fine.scored(cross))
    unlit, plain = fine.shift, fine.settle(cross)[2]
    light = None
    if fine.independent >= LIGHT_CELLS:
        coarse_factor = max(factor, round(COARSE_GSD_M / gsd_m))
        coarse = _pair(image, height_m, gsd_m, factor=coarse_factor, reach_m=reach_m, level_m=level_m)
        found, gain = _first_light(coarse)
        if gain > LIGHT_GAIN / 2:
            fine.shift = (coarse.shift[0] * coarse_factor / factor, coarse.shift[1] * coarse_factor / factor)
            for step in FINE_STEPS:
                found, _ = fine.climb(found, step)
            lit_fx = fine.spectrum(_whitened(fine.seen(found), fine.known, 1e-3))
            lit_cross = fine.cross(lit_fx)
            if fine.settle(lit_cross)[2] - plain >= max(LIGHT_GAIN, LIGHT_SHARE * plain):
                light, fx, cross = found, lit_fx, lit_cross
    if light is None:
        fine.shift = unlit
    row, col, _ = fine.settle(cross)
    scores = fine.scored(cross)
    away = np.indices(scores.shape) - fine.reach
    far = np.hypot(away[0] - row, away[1] - col) * fine.gsd_m > 2.0
    floor, top = float(np.median(scores)), float(scores.max())
    rival = (float(scores[far].max()) - floor) / max(top - floor, 1e-9) if far.any() else 1.0
    apart_m = _disagreement_m(fine, fx, cross, ~far)
    before, after = _on_common_pixels(fine, fx, (row, col))
    unseen_m = UNLIT_ERROR_M
    if light is not None:
        # The heights at `level_m` were held in place while leaning; what has to move is the ground.
        lean_m = math.hypot(light[2], light[3]) * level_m
        row, col = row - light[2] * level_m / fine.gsd_m, col - light[3] * level_m / fine.gsd_m
        unseen_m = LEAN_ERROR * lean_m
    uncertainty_m = math.hypot(PLACE_ERROR * fine.gsd_m, apart_m / 2, unseen_m)
    return _Match(
        x_m=col * fine.gsd_m, y_m=-row * fine.gsd_m, score_before=before, score_after=after, apart_m=apart_m, rival=rival,
        uncertainty_m=uncertainty_m, chance=_chance(fine, len(fx), after),
        light=None if light is None else tuple(light.tolist()),
    )  # fmt: skip


def _chance(pair: _Pair, maps: int, score: float) -> float:
    """Probability that the best of all shifts scores `score` though the `maps` of the heights do not depend on the image.

    Twice the information of n observations is then chi-squared, with as many degrees of freedom as there are covariances
    (Wilks 1938); the shifts count as independent trials, which they are not quite.
    """
    observations = pair.independent * INDEPENDENT_M2 / CHANCE_M2
    once = special.chdtrc(maps * len(pair.y), 2 * observations * max(score, 0.0))
    return float(min(1.0, once * pair.overlap.size))


def _disagreement_m(pair: _Pair, fx: Any, cross: Float64, near: Mask) -> float:
    """Distance between the best shifts, among those `near`, of the two colours of a chessboard laid over the image."""
    cells = np.indices(pair.known.shape) // max(1, round(CELL_M / pair.gsd_m))
    black = (cells.sum(0) % 2).astype(np.float32)
    pairs, black_pairs = pair.pairs[1:-1, 1:-1, None, None], pair.pairs_with(black)[:, :, None, None]
    black_cross = pair.cross(fx, black)
    white_cross = (cross * pairs - black_cross * black_pairs) / np.maximum(pairs - black_pairs, 1.0)
    kept, votes = pair.shift, []
    for part in (black_cross, white_cross):
        pair.peak(np.where(near, pair.scored(part), -np.inf))
        votes.append(pair.settle(part)[:2])
    pair.shift = kept
    return math.dist(*votes) * pair.gsd_m


def _on_common_pixels(pair: _Pair, fx: Any, shift: tuple[float, float]) -> tuple[float, float]:
    """Scores at no shift and at `shift`, both over the pixels of the image that have a height at either."""
    to = [int(np.clip(round(v), -pair.reach, pair.reach)) for v in shift]
    moved = ndimage.shift(pair.known, to, order=0, mode="constant", cval=0.0, prefilter=False)
    common = pair.known * moved
    if (common * pair.known_y).sum() < 1:
        return math.nan, math.nan
    cross = pair.cross(fx, common)
    kept, pair.shift = pair.shift, shift
    after = pair.settle(cross)[2]
    pair.shift = kept
    return float(_dependence(cross[pair.reach, pair.reach])), after


def _contrast(height_m: Float32, gsd_m: float) -> float:
    known = np.isfinite(height_m)
    size = 2 * max(1, round(EDGE_REACH_M / gsd_m)) + 1
    high = ndimage.maximum_filter(np.where(known, height_m, -np.inf), size)
    low = ndimage.minimum_filter(np.where(known, height_m, np.inf), size)
    return float((high[known] - low[known] > EDGE_M).mean()) if known.any() else 0.0


def measure_shift(image: Pixels, height_m: Float32, gsd_m: float, settings: RegistrationSettings) -> Shift:
    """The shift of one chip, and whether it is to be applied to that chip.

    It is measured in any case. It is "kept" when the chip has too little canopy contrast, when the two halves of the chip
    disagree, when another shift fits nearly as well, when it lies at the limit, when it is not much longer than its own
    uncertainty, when chance may have scored as well, or when it gains too little; always with `settings.apply = "never"`.

    Args:
        image: (band, row, col), at least one band (red, green, blue; others help), any unit that grows with radiance.
        height_m: (row, col) of the same pixels, metres above ground, NaN = unknown.
        gsd_m: Pixel size; the raster is north-up.
        settings: Limits.
    """
    assert image.valid.shape == height_m.shape, f"image {image.valid.shape} and heights {height_m.shape} differ"
    contrast = _contrast(height_m, gsd_m)
    reach_m = min(settings.max_shift_m, min(height_m.shape) * gsd_m / 4)
    known = np.isfinite(height_m) & image.valid

    def nothing(reason: str) -> Shift:
        unknown = math.nan
        return Shift(
            x_m=unknown,
            y_m=unknown,
            score_before=unknown,
            score_after=unknown,
            contrast=contrast,
            decision=f"kept: {reason}",
        )

    area_m2 = known.sum() * gsd_m**2
    if area_m2 < MIN_AREA_M2 or reach_m < 2 * gsd_m:
        return nothing(f"{area_m2:.0f} m2 with image and height, below {MIN_AREA_M2:.0f}, or less than 8 pixels across")
    if contrast < settings.min_contrast:
        return nothing(f"canopy contrast {contrast:.3f} below {settings.min_contrast}")
    match = _match(image, height_m, gsd_m, reach_m)
    length_m = math.hypot(match.x_m, match.y_m)
    gain = match.score_after - match.score_before
    unreliable = _why_unreliable(match, reach_m, gsd_m, settings)
    if unreliable:
        decision = f"kept: {unreliable}"
    elif length_m <= CONFIDENCE * match.uncertainty_m:
        decision = f"kept: {length_m:.2f} m is within {CONFIDENCE:g} times its uncertainty of {match.uncertainty_m:.2f} m"
    elif not match.chance <= settings.max_chance:
        decision = f"kept: chance may score as well with probability {match.chance:.2g}, above {settings.max_chance}"
    elif not gain >= settings.min_gain:
        decision = f"kept: score gains {gain:.4f}, below {settings.min_gain}"
    elif settings.apply == "never":
        decision = "kept: the recipe says never"
    else:
        decision = APPLIED
    return Shift(
        x_m=match.x_m, y_m=match.y_m, score_before=match.score_before, score_after=match.score_after,
        contrast=contrast, decision=decision, reliable=not unreliable,
    )  # fmt: skip


def _why_unreliable(match: _Match, reach_m: float, gsd_m: float, settings: RegistrationSettings) -> str:
    """The first test that a measurement fails, or nothing."""
    if match.apart_m > settings.max_disagreement_m:
        return f"two halves of the chip differ by {match.apart_m:.2f} m, more than {settings.max_disagreement_m} m"
    if match.rival > settings.max_rival:
        return f"another shift scores {match.rival:.2f} of the best, more than {settings.max_rival}"
    if max(abs(match.x_m), abs(match.y_m)) > reach_m - gsd_m:
        return f"({match.x_m:.2f}, {match.y_m:.2f}) m is at the limit of the search, {reach_m:.2f} m"
    return ""


MIN_AREA_M2: Final = 100.0
"""Of image and height together, below which nothing is measured."""


# --- acquisitions --------------------------------------------------------------------------------------------------------


VOTE_REACH_M: Final = 1.0
"""Votes this close to the centre agree with it."""


def robust_shift(shifts: Sequence[Shift], settings: RegistrationSettings) -> Shift:
    """The one shift of an acquisition (one image, one survey), from those of its chips; it may move chips that abstained.

    The reliable chips vote, weighted by their score; the shift is their geometric median (Weiszfeld 1937), which half of
    the weight cannot drag away. It is applied when `settings.min_votes` chips and more than half of the weight lie within
    `VOTE_REACH_M` of it, and it is longer than `CONFIDENCE` times its standard error.

    Args:
        shifts: Of all chips, with whatever decision.
        settings: Limits.

    Returns:
        The shift; scores and contrast are means over the votes, NaN without votes.
    """
    votes = [s for s in shifts if s.reliable]
    if not votes:
        reason = f"kept: none of {len(shifts)} chips has a reliable shift"
        return Shift(
            x_m=math.nan, y_m=math.nan, score_before=math.nan, score_after=math.nan, contrast=math.nan, decision=reason
        )
    places = np.array([[s.x_m, s.y_m] for s in votes])
    weights = np.maximum([s.score_after for s in votes], 1e-6)
    weights /= weights.sum()
    centre = np.average(places, axis=0, weights=weights)
    for _ in range(100):
        pull = weights / np.maximum(np.hypot(*(places - centre).T), 1e-4)
        centre = (places * pull[:, None]).sum(0) / pull.sum()
    distance = np.hypot(*(places - centre).T)
    agree = distance <= VOTE_REACH_M
    error_m = float(np.sqrt((weights * np.minimum(distance, VOTE_REACH_M) ** 2).sum() / len(votes)))
    before, after, contrast = (
        float(np.average([getattr(s, name) for s in votes], weights=weights))
        for name in ("score_before", "score_after", "contrast")
    )
    length_m = float(np.hypot(*centre))
    if agree.sum() < settings.min_votes:
        decision = f"kept: {agree.sum()} chips agree, below {settings.min_votes}"
    elif weights[agree].sum() <= 0.5:
        decision = f"kept: the {len(votes)} reliable chips do not agree within {VOTE_REACH_M} m"
    elif length_m <= CONFIDENCE * error_m:
        decision = f"kept: {length_m:.2f} m is within {CONFIDENCE:g} times its standard error of {error_m:.2f} m"
    elif after - before < settings.min_gain:
        decision = f"kept: score gains {after - before:.4f}, below {settings.min_gain}"
    elif settings.apply == "never":
        decision = "kept: the recipe says never"
    else:
        decision = APPLIED
    return Shift(
        x_m=float(centre[0]), y_m=float(centre[1]), score_before=before, score_after=after, contrast=contrast,
        decision=decision, reliable=bool(agree.sum() >= settings.min_votes and weights[agree].sum() > 0.5),
    )  # fmt: skip


# --- moving --------------------------------------------------------------------------------------------------------------


WHOLE_PX: Final = 1e-3
"""A shift this close to whole pixels is whole pixels."""


def shift_height(height_m: Float32, shift: Shift, gsd_m: float) -> Float32:
    """Move a height raster by a shift, without inventing heights.

    Whole pixels move unchanged. A fraction is bilinear: each result is a mean of at most four known heights and never
    beyond them, so a crown's single highest pixel comes out lower, by a metre at a sharp top. Where one of those that
    count is unknown, or outside, the result is NaN.

    Args:
        height_m: (row, col), north-up, NaN = unknown.
        shift: `x_m` east, `y_m` north, finite.
        gsd_m: Pixel size.

    Returns:
        (row, col) float32 on the same pixels.
    """
    assert math.isfinite(shift.x_m + shift.y_m), f"{shift} was not measured"
    rows, cols = height_m.shape
    down, right = (_whole_and_part(v / gsd_m) for v in (-shift.y_m, shift.x_m))
    out = np.zeros((rows, cols), np.float64)
    for i, row_weight in ((0, 1 - down[1]), (1, down[1])):
        for j, col_weight in ((0, 1 - right[1]), (1, right[1])):
            if row_weight * col_weight > 0:
                out += row_weight * col_weight * _rolled(height_m, down[0] + i, right[0] + j)
    return out.astype(np.float32)


def _whole_and_part(px: float) -> tuple[int, float]:
    """A distance as whole pixels and a part in [0, 1)."""
    if abs(px - round(px)) < WHOLE_PX:
        return round(px), 0.0
    return math.floor(px), px - math.floor(px)


def _rolled(a: Float32, down: int, right: int) -> Float32:
    """Moved by whole pixels; NaN comes in at the edges."""
    rows, cols = a.shape
    out = np.full_like(a, np.nan)
    if abs(down) < rows and abs(right) < cols:
        target = slice(max(down, 0), rows + min(down, 0)), slice(max(right, 0), cols + min(right, 0))
        source = slice(max(-down, 0), rows - max(down, 0)), slice(max(-right, 0), cols - max(right, 0))
        out[target] = a[source]
    return out

"""What is varied at random in a training sample: its place, its GSD, its light, its air, its lens and its coding.

A sample passes what a photograph passes, in that order: rescaling and turning move image and heights together; a tone curve,
shadows of clouds, haze, the blur of the optics, noise, the colours of the processing and the blocks of a JPEG change
the image alone. Each effect draws from a generator of its own, so switching one off leaves the others as they were; with all
of them off the image comes back bit for bit. Pixels without imagery stay so, and have no part in any other pixel.

Everything is float32 and single-threaded in a fixed order, so a sample does not depend on who computes it.

Left out: rotation by small angles, which interpolates the labels for little that the eight turns do not give.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, TypeVar, cast

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field
from scipy.ndimage import gaussian_filter
from scipy.special import expit, ndtri
from torch.nn.functional import interpolate

T = TypeVar("T", bound=np.generic)

SKY_SHARE: Final[Mapping[str, float]] = {"blue": 0.30, "green": 0.22, "red": 0.16, "nir": 0.10}
"""Share of the light on open ground that comes from the blue sky and not from the sun, so that stays in a shadow."""
VEIL: Final[Mapping[str, float]] = {"blue": 1.0, "green": 0.85, "red": 0.75, "nir": 0.5}
"""Strength of haze relative to that in blue: the air scatters short waves most. Bands of other names are as green here."""

PLOT_PX: Final = 32
"""Least side of the square that `Augmentation.plot` leaves."""

CLOUD_M: Final = (80.0, 400.0)
"""Wavelengths of the waves that make up a cloud's outline or a bank of haze."""
SOFTNESS: Final = (0.08, 0.4)
"""Of a cloud's shadow. The sun is half a degree wide, so a cloud 1 km up has an edge of 9 m: about 0.1 of the field."""
_WAVES: Final = 8
_COARSE_PX: Final = 4
"""A smooth field is computed every so many pixels and interpolated; its shortest wave is many times that."""

BLOCK_PX: Final = 8
"""Side of a block of a JPEG."""
JPEG_BEST: Final = 95


class Augmentation(BaseModel):
    """What is varied at random, each with its own switch: 0 or false turns it off. Random crops are always taken.

    The defaults are those that trained models so far; what starts at 0 has to be asked for.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    dihedral: bool = True
    """One of the eight rotations and reflections of the square; nadir imagery has no preferred direction but the sun's."""
    scale: float = Field(default=0.0, ge=0, le=1)
    """Largest relative change of the GSD: 0.25 makes 0.48 to 0.75 m of 0.6 m. Limited by the GSD range of the model and by
    the chip: the crop of a coarser sample is larger, and nothing is invented around a chip. Moderate is 0.25."""
    plot: float = Field(default=0.0, ge=0, le=1)
    """Share of the samples of which no more than a square is left, of `PLOT_PX` to the side of what is known, as if the
    imagery ended there. Where sites differ in the size of their plots the size must not tell the site. Moderate is 0.5."""
    gamma: float = Field(default=0.2, ge=0, le=1)
    """Largest absolute logarithm of the exponent on values in [0, 1]."""
    shadow: float = Field(default=0.0, ge=0, le=1)
    """Largest share of the sun's light that a cloud takes; half of the samples have no cloud. Moderate is 0.7."""
    haze: float = Field(default=0.15, ge=0, lt=1)
    """Largest mean share of a bluish white veil; it varies over the sample."""
    blur_px: float = Field(default=0.7, ge=0)
    """Largest standard deviation s of a Gaussian blur, the modulation transfer of optics and resampling: with
    q = exp(-1 / (2 s^2)) it leaves (1 - 2q) / (1 + 2q) of the contrast at the Nyquist frequency, 0.57 for 0.5 px and 0.16
    for 0.7 px. Cameras in orbit leave 0.1 to 0.3."""
    noise: float = Field(default=0.0, ge=0, le=0.2)
    """Largest standard deviation of the noise of a white pixel, as a share of the range; a black one has half of it (three
    quarters of the variance are the photons'). Moderate is 0.02."""
    contrast: float = Field(default=0.2, ge=0, lt=1)
    """Largest relative change of the distance from the crop's mean."""
    saturation: float = Field(default=0.3, ge=0, lt=1)
    """Largest relative change of the distance from the pixel's mean over the bands."""
    brightness: float = Field(default=0.1, ge=0, le=0.5)
    """Largest shift of all bands, as a share of the range."""
    gain: float = Field(default=0.0, ge=0, lt=1)
    """Largest relative change of each band by itself: white balance. Moderate is 0.1."""
    offset: float = Field(default=0.0, ge=0, le=0.5)
    """Largest shift of each band by itself, as a share of the range. Moderate is 0.03."""
    jpeg: int = Field(default=0, ge=0, le=JPEG_BEST)
    """Lowest quality of a JPEG that the image has been through; the highest is 95. For 8-bit imagery. Moderate is 60."""


OFF: Final = Augmentation(
    dihedral=False, gamma=0, haze=0, blur_px=0, contrast=0, saturation=0, brightness=0
)  # fmt: skip
"""Random crops and nothing else."""

EVERYTHING: Final = Augmentation(scale=0.25, plot=0.5, shadow=0.7, noise=0.02, gain=0.1, offset=0.03, jpeg=60)
"""All of it at moderate strength."""


# --- where a sample is -----------------------------------------------------------------------------------------------------


def crop_side_px(
    amount: float, side_px: int, longest_px: int, limits: tuple[float, float], generator: np.random.Generator
) -> int:
    """Side of the crop that becomes a sample of `side_px`; their ratio is the change of the GSD.

    Args:
        amount: `Augmentation.scale`.
        side_px: Side of the sample.
        longest_px: Longest side of a crop: what the chip has, or `side_px` where that is more.
        limits: Least and largest ratio that the model's GSD range allows.
        generator: Where the ratio is drawn from, uniform in its logarithm.
    """
    u = generator.random()
    low = max(1 / (1 + amount), limits[0], 1 / side_px)
    high = min(1 + amount, limits[1], longest_px / side_px)
    # Rounded inwards, so that no limit is passed by a part of a pixel.
    least, most = int(np.ceil(low * side_px - 1e-9)), int(np.floor(high * side_px + 1e-9))
    if amount == 0 or least > most:
        return side_px
    return int(np.clip(np.rint(side_px * np.exp(np.log(low) + u * np.log(high / low))), least, most))


def rescale(
    image: NDArray[T], valid: NDArray[np.bool_], height_m: NDArray[np.float32], side_px: int
) -> tuple[NDArray[T], NDArray[np.bool_], NDArray[np.float32]]:
    """A square crop at another GSD: image (band, row, col), validity and heights (row, col) with sides of `side_px`.

    The image is averaged with a triangle as wide as two new pixels (linear interpolation when enlarging), over usable
    pixels only. A new pixel's height is the largest known one of the old pixels whose centres lie in it, or that of the old
    pixel in which its own centre lies; it is usable where one of those is. Heights in metres are not scaled.

    Why the largest: a canopy height model holds the highest return in each pixel. Taking the old pixels for returns gives
    exactly the model that the same points would have given at the coarser GSD; a mean would be lower, the more so the
    rougher the canopy, and would teach the network that trees shrink with distance. Enlarged, each value stays what it is:
    the highest return in a pixel of the old size.
    """
    side = image.shape[-1]
    assert image.shape[-2] == side, f"a crop must be square, is {image.shape}"
    if side == side_px:
        return image, valid, height_m
    x = torch.from_numpy(image.astype(np.float32))
    weight = None
    if not valid.all():
        weight = torch.from_numpy(valid.astype(np.float32))
        x = torch.where(weight > 0, x, 0.0)
    y = _resize(x, side_px)
    height_m, valid = _pick(height_m, side_px), _pick(valid, side_px)
    if weight is not None:
        y = y / _resize(weight[None], side_px).clamp(min=1e-6)
        y = torch.where(torch.from_numpy(valid), y, 0.0)
    # An average never leaves the range of what it averages, so the cast is exact after rounding.
    return np.rint(y.numpy()).astype(image.dtype), valid, height_m


def plot(amount: float, known: NDArray[np.bool_], generator: np.random.Generator) -> tuple[slice, slice] | None:
    """The rows and columns that are left of a sample; None: all of them.

    Args:
        amount: `Augmentation.plot`.
        known: (row, col) pixels with imagery and a height; the square lies in the smallest rectangle around them,
            or over its shorter side.
        generator: Where it is drawn from, uniform in its side and then in its place.
    """
    happens, u_side, u_row, u_col = generator.random(4)
    if happens >= amount or not known.any():
        return None
    (row0, row1), (col0, col1) = ((int(i[0]), int(i[-1]) + 1) for i in map(np.flatnonzero, (known.any(1), known.any(0))))
    longest = max(row1 - row0, col1 - col0)
    side = longest if longest <= PLOT_PX else PLOT_PX + int(u_side * (longest - PLOT_PX + 1))
    row, col = (
        start + int(u * (max(stop - start - side, 0) + 1)) for start, stop, u in ((row0, row1, u_row), (col0, col1, u_col))
    )
    return slice(row, row + side), slice(col, col + side)


def _resize(x_crq: torch.Tensor, side_px: int) -> torch.Tensor:
    antialias = side_px < x_crq.shape[-1]
    return interpolate(x_crq[None], size=(side_px, side_px), mode="bilinear", align_corners=False, antialias=antialias)[0]


def _pick(array: NDArray[T], side_px: int) -> NDArray[T]:
    """A square array (row, col) with another side: the largest of those whose centres lie in a pixel, or the nearest."""
    side = array.shape[-1]
    if side < side_px:
        nearest = ((2 * np.arange(side_px) + 1) * side) // (2 * side_px)
        out: NDArray[T] = array[nearest[:, None], nearest]
        return out
    into = ((2 * np.arange(side) + 1) * side_px) // (2 * side)
    first = np.flatnonzero(np.diff(into, prepend=-1))
    last = np.append(first[1:], side) - 1
    larger = np.logical_or if array.dtype == bool else np.fmax  # fmax: unknown only where all are
    for _ in range(2):  # down the rows, then, turned over, down the columns
        out = array[first]
        for k in range(1, int((last - first).max()) + 1):
            out = larger(out, array[np.minimum(first + k, last)])
        array = np.ascontiguousarray(out.T)
    return array


def dihedral(array: NDArray[T], turns: int, flip: bool) -> NDArray[T]:
    """An array (..., row, col) turned by `turns` quarters counter-clockwise, then mirrored left to right."""
    turned = np.rot90(array, turns, axes=(-2, -1))
    return turned[..., ::-1] if flip else turned


# --- what it looks like ------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Light:
    """What one sample gets, drawn within an `Augmentation`; 0 everywhere changes nothing."""

    log_gamma: float
    shadow: float
    """Share of the sun's light that is lost in the core of a cloud's shadow."""
    cover: float
    """Share of the ground in shadow; none below 0."""
    softness: float
    """Of the shadow's edge, in standard deviations of the field that draws it."""
    haze: float
    """Mean share of the veil in blue."""
    patchiness: float
    """Standard deviation of the veil over its mean."""
    blur_px: float
    noise: float
    contrast: float
    saturation: float
    brightness: float
    gain: tuple[float, ...]
    """Of each band."""
    offset: tuple[float, ...]
    """Of each band."""
    jpeg: int
    """Quality; 0 for none."""
    block_px: tuple[int, int]
    """(rows, columns) of the first block that lie outside."""
    seeds: tuple[int, int, int]
    """Of the fields of shadow, haze and noise."""

    @property
    def changes(self) -> bool:
        """Whether any pixel may change."""
        single = (
            self.log_gamma, self.shadow if self.cover > 0 else 0.0, self.haze, self.blur_px, self.noise, self.contrast,
            self.saturation, self.brightness, self.jpeg,
        )  # fmt: skip
        return any(value != 0 for value in (*single, *self.gain, *self.offset))


def draw_light(amount: Augmentation, bands: int, generator: np.random.Generator) -> Light:
    """Draw what one sample gets; every effect has its own generator, and draws whether it is on or off."""
    gamma, shadow, haze, blur, noise, contrast, saturation, brightness, gain, offset, jpeg = generator.spawn(11)

    def within(limit: float, of: np.random.Generator) -> float:
        return limit * float(of.uniform(-1, 1))

    def up_to(limit: float, of: np.random.Generator) -> float:
        return limit * float(of.random())

    def seed(of: np.random.Generator) -> int:
        return int(of.integers(2**62))

    quality = round(float(jpeg.uniform(amount.jpeg, JPEG_BEST)))
    return Light(
        log_gamma=within(amount.gamma, gamma),
        shadow=amount.shadow * float(shadow.uniform(0.3, 1)),
        cover=float(shadow.uniform(-0.5, 0.5)),
        softness=float(np.exp(shadow.uniform(np.log(SOFTNESS[0]), np.log(SOFTNESS[1])))),
        haze=up_to(amount.haze, haze),
        patchiness=up_to(0.5, haze),
        blur_px=up_to(amount.blur_px, blur),
        noise=up_to(amount.noise, noise),
        contrast=within(amount.contrast, contrast),
        saturation=within(amount.saturation, saturation),
        brightness=within(amount.brightness, brightness),
        gain=tuple(within(amount.gain, gain) for _ in range(bands)),
        offset=tuple(within(amount.offset, offset) for _ in range(bands)),
        jpeg=quality if amount.jpeg else 0,
        block_px=(int(jpeg.integers(BLOCK_PX)), int(jpeg.integers(BLOCK_PX))),
        seeds=(seed(shadow), seed(haze), seed(noise)),
    )


def relight(
    image: NDArray[T],
    valid: NDArray[np.bool_],
    light: Light,
    *,
    bands: Sequence[str],
    gsd_m: float,
    value_range: tuple[float, float],
) -> NDArray[T]:
    """Change the light, the air, the lens and the coding of an image.

    Args:
        image: (band, row, col), uint8 or uint16, in `value_range` where it is usable.
        valid: (row, col), where there is imagery.
        light: What to do.
        bands: Names of the bands; shadow and haze depend on the colour.
        gsd_m: Pixel size; clouds have a size on the ground.
        value_range: Values of black and white; results are rounded and saturate there, as a camera's do.

    Returns:
        An image of the same type, 0 where there is no imagery; the very same one where nothing changes.
    """
    assert len(bands) == len(image) == len(light.gain), f"{len(image)} bands, named {tuple(bands)}"
    if not light.changes or not valid.any():
        return image
    whole = bool(valid.all())
    low, high = value_range
    levels = np.arange(np.iinfo(image.dtype).max + 1, dtype=np.float32)  # type: ignore[type-var]
    # What lies outside the range here is fill: whoever read the image has refused such values where it is usable.
    table = np.clip((levels - np.float32(low)) / np.float32(high - low), 0, 1) ** np.float32(np.exp(light.log_gamma))
    x = np.take(table, cast("NDArray[np.integer[Any]]", image))
    if not whole:
        x *= valid
    _shade(x, light, bands, gsd_m)
    _veil(x, light, bands, gsd_m)
    if light.blur_px > 0:
        if not whole:
            x *= valid  # haze lies where nothing is known as well
        x = _blur(x, None if whole else valid, light.blur_px)
    if light.noise > 0:
        noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(light.seeds[2])).numpy()
        noise *= np.sqrt(np.float32(0.25) + np.float32(0.75) * np.clip(x, 0, 1))
        x += np.float32(light.noise) * noise
    x = _recolour(x, None if whole else valid, light)
    np.clip(x, 0, 1, out=x)
    x *= np.float32(high - low)
    x += np.float32(low)
    out: NDArray[Any] = np.rint(x, out=x).astype(image.dtype)
    if light.jpeg:
        out = _code(out, None if whole else valid, light)
    return out if whole else np.where(valid, out, out.dtype.type(0))


def smooth_field(shape: tuple[int, int], gsd_m: float, seed: int) -> NDArray[np.float32]:
    """A random field (row, col) of mean 0 and standard deviation 1 that varies over `CLOUD_M`: a sum of plane waves."""
    generator = np.random.default_rng(seed)
    wavelength_m = CLOUD_M[0] * (CLOUD_M[1] / CLOUD_M[0]) ** generator.random(_WAVES)
    azimuth, phase = generator.uniform(0, 2 * np.pi, (2, _WAVES))
    coarse = tuple(-(-side // _COARSE_PX) for side in shape)
    row_m, col_m = ((np.arange(side) + 0.5) * _COARSE_PX * gsd_m for side in coarse)
    down = 2 * np.pi * (np.cos(azimuth) / wavelength_m)[:, None] * row_m + phase[:, None]
    across = 2 * np.pi * (np.sin(azimuth) / wavelength_m)[:, None] * col_m
    # cos(a + b) of every pair, as outer products; einsum adds in a fixed order, as a matrix product need not.
    field = np.einsum("wr,wq->rq", np.cos(down), np.cos(across)) - np.einsum("wr,wq->rq", np.sin(down), np.sin(across))
    fine = torch.from_numpy((field * np.sqrt(2 / _WAVES)).astype(np.float32))[None, None]
    fine = interpolate(fine, scale_factor=float(_COARSE_PX), mode="bilinear", align_corners=False)
    return fine[0, 0, : shape[0], : shape[1]].numpy()


def _shade(x: NDArray[np.float32], light: Light, bands: Sequence[str], gsd_m: float) -> None:
    """Take the sun, but not the sky, from under a cloud; in place."""
    if light.shadow == 0 or light.cover <= 0:
        return
    field = smooth_field(x.shape[1:], gsd_m, light.seeds[0])
    core = expit((field - np.float32(ndtri(1 - light.cover))) / np.float32(light.softness))
    for i, name in enumerate(bands):
        x[i] *= 1 - np.float32(light.shadow * (1 - _of(SKY_SHARE, name))) * core


def _veil(x: NDArray[np.float32], light: Light, bands: Sequence[str], gsd_m: float) -> None:
    """Mix with the light that the air scatters; in place."""
    if light.haze == 0:
        return
    field = smooth_field(x.shape[1:], gsd_m, light.seeds[1])
    veil = np.clip(np.float32(light.haze) * (1 + np.float32(light.patchiness) * field), 0, 1)
    for i, name in enumerate(bands):
        x[i] += np.float32(_of(VEIL, name)) * veil * (1 - x[i])


def _of(table: Mapping[str, float], band: str) -> float:
    return table.get(band, table["green"])


def _blur(x: NDArray[np.float32], valid: NDArray[np.bool_] | None, sigma_px: float) -> NDArray[np.float32]:
    """A Gaussian over usable pixels only; those that are not must be 0."""
    y: NDArray[np.float32] = gaussian_filter(x, (0, sigma_px, sigma_px), truncate=3)
    if valid is not None:
        y /= np.maximum(gaussian_filter(valid.astype(np.float32), sigma_px, truncate=3), np.float32(1e-6))
        y *= valid
    return y


def _mean(x: NDArray[np.float32], valid: NDArray[np.bool_] | None) -> NDArray[np.float64]:
    """Mean of each band over usable pixels."""
    total: NDArray[np.float64] = (x if valid is None else x * valid).sum(axis=(1, 2), dtype=np.float64)
    return total / float(x[0].size if valid is None else valid.sum())


def _recolour(x: NDArray[np.float32], valid: NDArray[np.bool_] | None, light: Light) -> NDArray[np.float32]:
    """Contrast about the mean, saturation about grey, brightness, then each band by itself: one affine map of the bands.

    With the mean m, contrast s and saturation c: y = (1 + c) z - c mean(z), z = (1 + s) x - s m; then gain and offset.
    """
    count = len(x)
    spread = (1 + light.saturation) * np.eye(count) - light.saturation / count
    matrix = (1 + np.array(light.gain))[:, None] * spread
    shift = light.brightness + np.array(light.offset)
    if light.contrast != 0:
        shift = shift - light.contrast * matrix @ _mean(x, valid)
        matrix = (1 + light.contrast) * matrix
    if not shift.any() and (matrix == np.eye(count)).all():
        return x
    # Not `matrix @ x`: how a threaded matrix product rounds depends on the number of threads.
    y = np.empty_like(x)
    for i in range(count):
        np.multiply(x[0], np.float32(matrix[i, 0]), out=y[i])
        for j in range(1, count):
            y[i] += np.float32(matrix[i, j]) * x[j]
        y[i] += np.float32(shift[i])
    return y


def _code(image: NDArray[T], valid: NDArray[np.bool_] | None, light: Light) -> NDArray[T]:
    """The image as it comes out of a JPEG: red, green and blue as a picture, further bands as grey ones.

    Where there is no imagery the blocks hold the mean, so that its edge does not ring more than any other.
    """
    # Torchvision brings all its models and torch's compiler: seconds and 300 MB that a loader process can do without.
    from torchvision.io import decode_jpeg, encode_jpeg

    assert image.dtype == np.uint8, "JPEG holds 8 bits"
    filled: NDArray[Any] = image
    if valid is not None:
        mean = np.rint(_mean(image.astype(np.float32), valid)).astype(image.dtype)
        filled = np.where(valid, image, mean[:, None, None])
    _, rows, cols = image.shape
    top, left = light.block_px
    padded = torch.from_numpy(np.pad(filled, ((0, 0), (top, 0), (left, 0)), mode="edge"))
    pictures = [padded[:3], *padded[3:, None]] if len(padded) >= 3 else list(padded[:, None])
    coded = torch.cat([decode_jpeg(encode_jpeg(picture, light.jpeg)) for picture in pictures])
    out: NDArray[T] = coded[:, top : top + rows, left : left + cols].numpy().astype(image.dtype)
    return out

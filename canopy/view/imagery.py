"""The images that a map was made of, as a layer: several files in their order of preference, in a fixed stretch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final, Self

import numpy as np
from numpy.typing import NDArray

from canopy.raster import RasterPool, open_raster
from canopy.tiler.headers import ImageFile, bands_of
from canopy.tiler.imagery import ImageFiles
from canopy.view.png import rgba_png
from canopy.view.tiles import Tile, TileSource

COLOURS: Final = ("red", "green", "blue")

STRETCH_PERCENT: Final = (2.0, 98.0)
"""Values between these percentiles of what was sampled get the greys of the screen."""

_SAMPLE_FILES = 16
_SAMPLES = 4
_SAMPLE_PX = 128
"""The stretch is measured on windows of this side, so many in each direction, of so many files."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageryPainter:
    """Images in their colours, or the one band that they have in greys."""

    sources: tuple[TileSource, ...]
    """The preferred first."""
    bands: tuple[tuple[int, ...], ...]
    """Of each file: red, green and blue, or one; 1-based."""
    alpha_is_mask: bool
    stretch: tuple[tuple[float, float], ...] | None
    """Per band: the values that become black and white. None: they are bytes, and shown as they are."""

    @classmethod
    def of(cls, images: ImageFiles, sources: tuple[TileSource, ...]) -> Self:
        """The painter of images; `sources` are those of `images.info.files`, in their order."""
        info = images.info
        bands = tuple(shown_bands(file, info.alpha) for file in info.files)
        stretch = None if info.dtype == "uint8" else _stretch(info.files, bands, alpha_is_mask=info.alpha == "mask")
        return cls(sources=sources, bands=bands, alpha_is_mask=info.alpha == "mask", stretch=stretch)

    def png(self, tile: Tile, pool: RasterPool) -> bytes | None:
        """As `Painter`."""
        target = tile.grid()
        rgba = np.zeros((*target.shape, 4), np.uint8)
        for source, bands in zip(self.sources, self.bands, strict=True):
            pixels = source.read(pool, target, bands, alpha_is_mask=self.alpha_is_mask)
            if pixels is None:
                continue
            take = pixels.valid & (rgba[:, :, 3] == 0)
            rgba[take, :3] = self._shown(pixels.data[:, take]).T
            rgba[take, 3] = 255
            if rgba[:, :, 3].all():
                break
        return rgba_png(rgba) if rgba[:, :, 3].any() else None

    def _shown(self, values: NDArray[Any]) -> NDArray[np.uint8]:
        """(3 or 1, pixel) values as bytes."""
        if self.stretch is None:
            return values.astype(np.uint8, copy=False)
        low, high = np.array(self.stretch, np.float64).T[:, :, None]
        return np.asarray(np.rint(np.clip((values - low) / (high - low), 0, 1) * 255), np.uint8)

    @property
    def note(self) -> str | None:
        """What was done to the values, in words."""
        if self.stretch is None:
            return None
        spans = ", ".join(f"{low:g}–{high:g}" for low, high in self.stretch)
        low, high = STRETCH_PERCENT
        return f"Shown from black to white: values {spans}, the {low:g}th to {high:g}th percentile."


def shown_bands(file: ImageFile, alpha: str) -> tuple[int, ...]:
    """The bands of a file that are shown: those named red, green and blue, else the first three, else the first."""
    names = [(name or "").strip().lower() for name in file.band_names]
    if all(colour in names for colour in COLOURS):
        return tuple(names.index(colour) + 1 for colour in COLOURS)
    data = bands_of(file, None, alpha)
    return tuple(data[:3]) if len(data) >= 3 else tuple(data[:1])


def _stretch(
    files: tuple[ImageFile, ...], bands: tuple[tuple[int, ...], ...], *, alpha_is_mask: bool
) -> tuple[tuple[float, float], ...]:
    """Per band the values that become black and white, of windows from all over the files."""
    step = max(1, len(files) // _SAMPLE_FILES)
    found: list[NDArray[Any]] = []
    for file, own in list(zip(files, bands, strict=True))[::step][:_SAMPLE_FILES]:
        with open_raster(file.path) as raster:
            rows, cols = raster.shape
            for row in np.linspace(0, max(0, rows - _SAMPLE_PX), _SAMPLES).astype(int).tolist():
                for col in np.linspace(0, max(0, cols - _SAMPLE_PX), _SAMPLES).astype(int).tolist():
                    shape = (min(_SAMPLE_PX, rows - row), min(_SAMPLE_PX, cols - col))
                    pixels = raster.read(row, col, shape, own, alpha_is_mask=alpha_is_mask)
                    found.append(pixels.data[:, pixels.valid])
    values = np.concatenate(found, axis=1)
    if not values.size:
        return ((0.0, 1.0),) * len(bands[0])
    spans = np.percentile(values, STRETCH_PERCENT, axis=1).T
    return tuple((float(low), float(high if high > low else low + 1)) for low, high in spans)

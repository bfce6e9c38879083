"""Tiles as PNG: classes by a palette, which is small and quick; images by their colours."""

from __future__ import annotations

import io
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray
from PIL import Image

LEVEL: Final = 1
"""Of 9. The tiles travel within this machine: time counts, size does not."""


def palette_png(index: NDArray[np.uint8], colours: tuple[tuple[int, int, int], ...]) -> bytes:
    """A PNG of classes (row, col): 0 is transparent, n has the nth colour."""
    assert len(colours) < 256, f"{len(colours)} colours"
    image = Image.fromarray(index)
    image.putpalette([0, 0, 0, *(part for colour in colours for part in colour)])
    return _encoded(image, transparency=0)


def rgba_png(rgba: NDArray[np.uint8]) -> bytes:
    """A PNG of colours (row, col, 4)."""
    return _encoded(Image.fromarray(rgba))


def _encoded(image: Image.Image, **options: Any) -> bytes:
    out = io.BytesIO()
    image.save(out, "png", compress_level=LEVEL, **options)
    return out.getvalue()


EMPTY: Final = palette_png(np.zeros((1, 1), np.uint8), ())
"""A tile where there is nothing, which a browser stretches over it: unlike no answer, it is no error to a page."""

"""Pictures of places: the map, the reference and, where it is there, the imagery, on the place and some ground around it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from affine import Affine
from numpy.typing import NDArray

from canopy.errors import CanopyError
from canopy.grid import Box, Grid
from canopy.page import photograph
from canopy.raster import Raster, open_raster, warp
from canopy.score.cells import HeightRasters, bounds_in
from canopy.score.compare import Ground
from canopy.score.pictures import PlaceChip
from canopy.score.result import Place

AROUND = 0.5
"""How far pictures reach beyond the place, in sides of it."""

MOST_PX = 360
"""Longest side of a photograph."""


def picture_of(
    place: Place, ground: Ground, rasters: HeightRasters, reference: HeightRasters, imagery: Sequence[Path]
) -> PlaceChip:  # fmt: skip
    """The place as map, reference and, of the first image that shows it, photograph.

    Args:
        place: Where.
        ground: The cells of the comparison.
        rasters: The map.
        reference: The reference.
        imagery: Local images; one that cannot be read shows nothing.
    """
    cells = ground.cells
    left, bottom, right, top = place.bounds
    across, up = AROUND * (right - left), AROUND * (top - bottom)
    box = cells.covering((left - across, bottom - up, right + across, top + up))
    assert box is not None, f"{place} is empty"
    map_m, reference_m = (
        source.read(cells, box, ground.statistic).height_m.astype(np.float32) for source in (rasters, reference)
    )
    return PlaceChip(map_m=map_m, reference_m=reference_m, photograph=_photograph(cells.grid(box), imagery), around=AROUND)


def _photograph(grid: Grid, imagery: Sequence[Path]) -> NDArray[np.uint8] | None:
    """(row, col, 3) colours of the ground of a grid, in pixels about as large as the image's."""
    for path in imagery:
        try:
            with open_raster(path) as raster:
                found = _colours(grid, raster)
        except CanopyError:  # a picture is there to be looked at only; without it the page has one less
            continue
        if found is not None:
            return found
    return None


def _colours(grid: Grid, raster: Raster) -> NDArray[np.uint8] | None:
    source = raster.grid
    bounds = bounds_in(grid, source.crs, str(raster.path))
    cols, rows = np.array([source.pixel(x, y) for x in bounds[::2] for y in bounds[1::2]]).T
    row, col = int(np.floor(rows.min())) - 2, int(np.floor(cols.min())) - 2
    shape = int(np.ceil(rows.max())) + 2 - row, int(np.ceil(cols.max())) + 2 - col
    inside = Box(row, col, row + shape[0], col + shape[1]).intersect(Box(0, 0, *source.shape))
    if inside is None or len(raster.data_bands) == 0:
        return None
    pixels = raster.read(row, col, shape, raster.data_bands[:3])
    side = min(MOST_PX, max(shape))
    step = max(grid.shape) / side
    target = Grid(
        crs=grid.crs, transform=grid.transform @ Affine.scale(step),
        shape=(max(1, round(grid.shape[0] / step)), max(1, round(grid.shape[1] / step))),
    )  # fmt: skip
    warped = warp(pixels, source.crop(row, col, shape), target)
    return photograph(warped) if warped.valid.any() else None

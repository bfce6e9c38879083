"""Maps and one reference on one set of cells, read once from end to end and counted as they go by.

Memory holds a tile of cells of each map and the sums by square of ground. What is counted does not depend on the tiles.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import product

import numpy as np
from numpy.typing import NDArray

from canopy.grid import Box
from canopy.metrics import CLASS_EDGES_M, class_index
from canopy.model.blocks import BlockTable
from canopy.score.cells import Cells, HeightRasters, corners, touched
from canopy.score.pictures import ErrorMap, ErrorMapSums
from canopy.score.registration import Site
from canopy.score.result import Shift, Statistic
from canopy.score.strata import LandCover, PlacedPolygons
from canopy.score.sums import Floats, Key, MapSums, Square, Squares

TILE_PX = 960
"""About how many cells are read along a side at a time: whole squares of ground."""

Progress = Callable[[int, int], None]
"""Called with (tiles done, tiles in all)."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Layers:
    """What of a map is read."""

    height: HeightRasters
    bounds: tuple[HeightRasters, HeightRasters] | None
    """Lower and upper ends of its intervals; None where it has none that would mean anything for the cells."""
    means: BlockTable | None = None
    """How wrong it says that its means over ground may be."""
    moves: tuple[tuple[Site, Shift], ...] = ()
    """Shifts to apply, by site, for the registered scores."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Ground:
    """Where to compare, and into which parts."""

    cells: Cells
    box: Box
    """The cells that are compared."""
    statistic: Statistic
    land_cover: LandCover | None = None
    polygons: PlacedPolygons | None = None
    edges_m: tuple[float, ...] = CLASS_EDGES_M


@dataclass(slots=True, kw_only=True)
class Counted:
    """All that was counted of a comparison."""

    cut: Squares
    maps: tuple[MapSums, ...]
    registered: tuple[MapSums | None, ...]
    """After the moves; None for a map that has none."""
    errors: tuple[ErrorMap, ...]
    n_reference: int = 0
    """Cells with a reference."""
    n_refused: int = 0
    n_negative: int = 0
    missing: dict[Key, int] = field(default_factory=dict)
    """By group that has a cell with a reference: those of them that some map lacks."""


def count(
    maps: Sequence[Layers],
    reference: HeightRasters,
    ground: Ground,
    *,
    tile_px: int = TILE_PX,
    progress: Progress | None = None,
) -> Counted:
    """Count maps against a reference.

    Args:
        maps: The maps, the one that is scored first.
        reference: The reference.
        ground: Where.
        tile_px: About how many cells to read along a side at a time; changes nothing that is counted.
        progress: Called as tiles are done.
    """
    cells, box = ground.cells, ground.box
    cut = Squares.of(cells.gsd_m)
    pictures = [ErrorMapSums(box.shape, cells.gsd_m) for _ in maps]
    counted = Counted(
        cut=cut,
        maps=tuple(MapSums(cut, edges_m=ground.edges_m) for _ in maps),
        registered=tuple(MapSums(cut, edges_m=ground.edges_m) if each.moves else None for each in maps),
        errors=(),
    )
    extents = [corners(rasters.boxes_on(cells)) for rasters in (maps[0].height, reference)]
    tiles = list(_tiles(box, cut, tile_px, extents))
    for number, tile in enumerate(tiles):
        _count_tile(counted, maps, reference, ground, tile=tile, pictures=pictures)
        if progress is not None:
            progress(number + 1, len(tiles))
    counted.errors = tuple(picture.map() for picture in pictures)
    return counted


def _tiles(box: Box, cut: Squares, tile_px: int, extents: Sequence[NDArray[np.int64]]) -> Iterator[Box]:
    """Tiles of whole squares of ground that cover `box`, but those where the map or the reference has no file."""
    side = max(1, tile_px // cut.side_px) * cut.side_px
    rows, cols = (range(a // side, (b - 1) // side + 1) for a, b in ((box.row0, box.row1), (box.col0, box.col1)))
    for row, col in product(rows, cols):
        tile = Box(row * side, col * side, (row + 1) * side, (col + 1) * side)
        inside = tile.intersect(box)
        if inside is not None and all(touched(boxes, inside).any() for boxes in extents):
            yield _whole_squares(inside, cut.side_px)


def _whole_squares(box: Box, side: int) -> Box:
    """The squares that a box touches."""
    row0, col0, row1, col1 = box.row0 // side, box.col0 // side, (box.row1 - 1) // side, (box.col1 - 1) // side
    return Box(row0 * side, col0 * side, (row1 + 1) * side, (col1 + 1) * side)


def _count_tile(
    counted: Counted,
    maps: Sequence[Layers],
    reference: HeightRasters,
    ground: Ground,
    *,
    tile: Box,
    pictures: Sequence[ErrorMapSums],
) -> None:
    cells, statistic = ground.cells, ground.statistic
    inside = tile.intersect(ground.box)
    assert inside is not None, f"tile {tile} lies outside {ground.box}"
    # One cell more on each side, for the gradients of the cells at the rim.
    wide = Box(tile.row0 - 1, tile.col0 - 1, tile.row1 + 1, tile.col1 + 1)
    heights = reference.read(cells, wide, statistic)
    reference_m = _only(heights.height_m, wide, ground.box)
    core = inside.slices_in(wide)
    known_reference = np.isfinite(reference_m)
    if not known_reference[core].any():
        return
    counted.n_reference += int(known_reference[core].sum())
    counted.n_refused += int(heights.refused[core].sum())
    counted.n_negative += int(heights.negative[core].sum())
    maps_m = [each.height.read(cells, wide, statistic).height_m for each in maps]
    known = [np.isfinite(map_m) for map_m in maps_m]
    common = np.logical_and.reduce([known_reference, *known])
    for sums, one in zip(counted.maps, known, strict=True):
        sums.n_missing += int((known_reference & ~one)[core].sum())
    bounds_m = [None if each.bounds is None else tuple(b.read(cells, wide).height_m for b in each.bounds) for each in maps]
    moved_m = [_moved(each, cells, wide, statistic) for each in maps]
    cover = None if ground.land_cover is None else ground.land_cover.read(cells, tile)
    for picture, map_m in zip(pictures, maps_m, strict=True):
        error_m = np.where(common, map_m - reference_m, np.nan)[core]
        picture.add(error_m, inside.row0 - ground.box.row0, inside.col0 - ground.box.col0)
    side = counted.cut.side_px
    for row, col in product(range(tile.row0 // side, tile.row1 // side), range(tile.col0 // side, tile.col1 // side)):
        place = Box(row * side, col * side, (row + 1) * side, (col + 1) * side)
        here, around = place.slices_in(wide), _grown(place).slices_in(wide)
        if not known_reference[here].any():
            continue
        groups = dict(_groups(ground, place, None if cover is None else cover[place.slices_in(tile)]))
        for key, mask in groups.items():
            mine = mask & known_reference[here]
            if mine.any():
                counted.missing[key] = counted.missing.get(key, 0) + int((mine & ~common[here]).sum())
        for number, sums in enumerate(counted.maps):
            seen = _Seen(reference_m=reference_m, map_m=maps_m[number], common=common, bounds_m=bounds_m[number])
            seen.count((row, col), sums, here, groups)
            seen.count_surfaces((row, col), sums, around, (place.row0, place.col0))
            if (table := maps[number].means) is not None:
                seen.count_means((row, col), sums, here, (place.row0, place.col0), table)
            registered, moved = counted.registered[number], moved_m[number]
            if registered is not None and moved is not None:
                both = common & np.isfinite(moved)
                seen = _Seen(reference_m=reference_m, map_m=moved, common=both, bounds_m=None)
                seen.count((row, col), registered, here, {})
                seen.count_surfaces((row, col), registered, around, (place.row0, place.col0))
        _limit(counted)
    lacking = known_reference[core] & ~common[core]
    classes = class_index(reference_m[core], ground.edges_m)
    for k in range(len(ground.edges_m) + 1):
        key = ("height", k)
        counted.missing[key] = counted.missing.get(key, 0) + int((lacking & (classes == k)).sum())


def _only(height_m: Floats, box: Box, within: Box) -> Floats:
    """Heights of `box`, NaN outside `within`."""
    part = within.intersect(box)
    out = np.full(height_m.shape, np.nan)
    if part is not None:
        out[part.slices_in(box)] = height_m[part.slices_in(box)]
    return out


def _grown(box: Box) -> Box:
    return Box(box.row0 - 1, box.col0 - 1, box.row1 + 1, box.col1 + 1)


def _moved(layers: Layers, cells: Cells, box: Box, statistic: Statistic) -> Floats | None:
    """The map after its moves, NaN beyond the sites that have one; None without moves."""
    if not layers.moves:
        return None
    out = np.full(box.shape, np.nan)
    for site, shift in layers.moves:
        mask = site.mask(box)
        if mask.any() and shift.x_m is not None and shift.y_m is not None:
            # A map that moves east by x is read x farther west.
            there = layers.height.read(cells.moved(-shift.x_m, -shift.y_m), box, statistic).height_m
            out[mask] = there[mask]
    return out


def _groups(ground: Ground, place: Box, cover: Floats | None) -> Iterator[tuple[Key, NDArray[np.bool_]]]:
    """The classes of land cover and the polygons of one square, each with (row, col) whether a cell belongs to it."""
    if cover is not None:
        for number in np.unique(cover[np.isfinite(cover)]).astype(int).tolist():
            yield ("cover", number), cover == number
    if ground.polygons is not None:
        for number, mask in ground.polygons.within(place):
            yield ("polygon", number), mask


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Seen:
    """A map and the reference in a tile; arrays are (row, col)."""

    reference_m: Floats
    map_m: Floats
    common: NDArray[np.bool_]
    """Cells that count."""
    bounds_m: tuple[Floats, ...] | None

    def count(
        self, square: Square, sums: MapSums, here: tuple[slice, slice], groups: dict[Key, NDArray[np.bool_]]
    ) -> None:  # fmt: skip
        """Count the cells of one square."""
        common = self.common[here]
        if not common.any():
            return
        map_m, reference_m = self.map_m[here][common], self.reference_m[here][common]
        bounds = None if self.bounds_m is None else tuple(b[here][common] for b in self.bounds_m)
        sums.add_heights(square, map_m, reference_m)
        classes = class_index(reference_m, sums.edges_m)
        for k in np.unique(classes).tolist():
            sums.add_group(("height", k), square, map_m[classes == k], reference_m[classes == k])
        if bounds is not None:
            sums.add_intervals(square, (bounds[0], bounds[1]), map_m, reference_m)
        for key, mask in groups.items():
            mine = mask[common]
            if mine.any():
                sums.add_group(key, square, map_m[mine], reference_m[mine])
                if bounds is not None:
                    sums.add_group_intervals(key, square, bounds[0][mine], bounds[1][mine], reference_m[mine])

    def count_surfaces(self, square: Square, sums: MapSums, around: tuple[slice, slice], first: tuple[int, int]) -> None:
        """Count the blocks and edges of one square."""
        common = self.common[around]
        if common[1:-1, 1:-1].any():
            map_m, reference_m = (np.where(common, h[around], np.nan) for h in (self.map_m, self.reference_m))
            sums.add_surfaces(square, map_m, reference_m, first)

    def count_means(
        self, square: Square, sums: MapSums, here: tuple[slice, slice], first: tuple[int, int], table: BlockTable
    ) -> None:  # fmt: skip
        """Count whether the map's intervals of means hold the blocks of one square."""
        common = self.common[here]
        if self.bounds_m is not None and common.any():
            map_m, reference_m = (np.where(common, h[here], np.nan) for h in (self.map_m, self.reference_m))
            half_m = (self.bounds_m[1][here] - self.bounds_m[0][here]) / 2
            sums.add_means(square, map_m, half_m, reference_m, first, table)


def _limit(counted: Counted) -> None:
    """Put squares together where there are too many, for all maps alike: their squares are pairs."""
    every = [*counted.maps, *(each for each in counted.registered if each is not None)]
    while any(each.too_many for each in every):
        for each in every:
            each.coarsen()

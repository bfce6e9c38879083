"""Connected pixels of a class in a raster that is read in strips: which are large enough, their sums and their outlines.

A component may cross any number of strips, so what it is in one strip is decided by the others. Two passes do it in the
memory of a strip. The first goes from the last strip to the first: it labels each strip (8-connected), joins its components
with those that reach up from the strip below, and keeps in memory only what reaches the strip's first row; how components
were joined goes to disk. When nothing of a component reaches any higher it is finished, and its size is known. The second
pass goes from the first strip to the last along those joins: every pixel learns whether its component is large enough, and
the outlines of the parts are put together.

The result does not depend on where the strips are cut.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import shapely
from affine import Affine
from numpy.typing import NDArray
from rasterio.features import shapes
from scipy import ndimage
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

NONE: Final = -1
"""No component, or one that is too small."""

_EIGHT: Final = np.ones((3, 3), bool)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Component:
    """Connected pixels of one class."""

    kind: int
    """Their class."""
    pixels: int
    sums: NDArray[np.float64]
    """Of each of the values that were given with the pixels."""
    last_px: int
    """Its last pixel in reading order, row * columns + column: no other component has it."""
    outline: Any
    """Multi-polygon in pixel coordinates (col, row); parts that touch at a corner only are polygons of their own."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Joins:
    """What the first pass learnt of a strip. A group is what its components and those below it are joined to."""

    below: NDArray[np.int64]
    """(component that reaches up from the strip below,) its group."""
    local: NDArray[np.int64]
    """(component within the strip,) its group."""
    above: NDArray[np.int64]
    """(group,) number among those that reach the strip above, or NONE."""
    kept: NDArray[np.int64]
    """(group,) number among `pixels` and on where the component is finished here and large enough, else NONE."""
    pixels: NDArray[np.int64]
    kind: NDArray[np.int64]
    last_px: NDArray[np.int64]
    sums: NDArray[np.float64]
    """(finished component, value)."""


class Components:
    """The components of a raster of classes; first every strip by `add`, from the last, then every strip by `take`."""

    def __init__(self, folder: Path, *, cols: int, kinds: tuple[int, ...], values: int, least_px: int) -> None:
        """Begin with nothing.

        Args:
            folder: For what memory need not hold; belongs to this object.
            cols: Columns of the raster.
            kinds: The classes whose pixels are connected; others are not looked at.
            values: How many values each pixel has to be summed.
            least_px: Components of fewer pixels are too small.
        """
        self._folder, self._cols, self._kinds, self._least_px = folder, cols, kinds, least_px
        self.small_px = dict.fromkeys(kinds, 0)
        """Pixels of each class in components that are too small, once all strips are added."""
        # What reaches up from the strip below: its number and class at each column, and what is known of each.
        self._edge, self._edge_kind = np.full(cols, NONE), np.zeros(cols, np.uint8)
        self._open = _Tally.empty(values)
        self._carry = np.zeros(0, np.int64)
        self._finished: dict[int, _Finished] = {}
        self._known = 0

    # --- from the last strip to the first ----------------------------------------------------------------------------------

    def add(self, row: int, kind: NDArray[np.uint8], values: NDArray[np.float64], *, first: bool) -> None:
        """Take in the strip above those taken before.

        Args:
            row: Its first row.
            kind: (row, col) classes.
            values: (value, pixel) of the pixels of `kinds`, in reading order.
            first: Whether there is no strip above it.
        """
        label, count = self._label(kind)
        marked = label > 0
        local = _Tally.of(label[marked] - 1, count, kind[marked], values, _places(marked, row, self._cols))
        joined = _touching(label[-1], kind[-1], self._edge, self._edge_kind)
        group = _groups(len(self._open.pixels), count, joined)
        whole = self._open.and_(local).grouped(group)
        top = np.where(marked[0], group[len(self._open.pixels) :][np.maximum(label[0], 1) - 1], NONE) if count else None
        reach = np.zeros(0, np.int64) if first or top is None else np.unique(top[top >= 0])
        above = np.full(len(whole.pixels), NONE)
        above[reach] = np.arange(len(reach))
        done = above == NONE
        large = done & (whole.pixels >= self._least_px)
        for one in self._kinds:
            self.small_px[one] += int(whole.pixels[done & ~large & (whole.kind == one)].sum())
        kept = np.full(len(whole.pixels), NONE)
        kept[large] = np.arange(np.count_nonzero(large))
        ended = whole.take(np.flatnonzero(large))
        np.savez(
            self._path(row), below=group[: len(self._open.pixels)], local=group[len(self._open.pixels) :], above=above,
            kept=kept, pixels=ended.pixels, kind=ended.kind, last_px=ended.last_px, sums=ended.sums,
        )  # fmt: skip
        self._open = whole.take(reach)
        self._edge = np.full(self._cols, NONE) if first or top is None else np.where(top >= 0, above[top], NONE)
        self._edge_kind = kind[0].copy()

    # --- from the first strip to the last ----------------------------------------------------------------------------------

    def take(self, row: int, kind: NDArray[np.uint8], *, last: bool) -> tuple[NDArray[np.bool_], list[Component]]:
        """Whether each pixel's component is large enough, and the components that end in this strip.

        Args:
            row: First row of the strip, as it was added.
            kind: (row, col) classes, as they were added.
            last: Whether there is no strip below it.

        Returns:
            (row, col) bool; and components in the order of their last pixels.
        """
        with np.load(self._path(row)) as file:
            joins = _Joins(**file)
        self._path(row).unlink()
        of_group = np.where(joins.above >= 0, self._carry[joins.above] if len(self._carry) else NONE, NONE)
        here = joins.kept >= 0
        of_group[here] = joins.kept[here] + self._known
        for place in range(len(joins.pixels)):
            self._finished[self._known + place] = _Finished(joins, place)
        self._known += len(joins.pixels)
        label, _ = self._label(kind)
        of_local = np.append(NONE, of_group[joins.local]) if len(joins.local) else np.array([NONE])
        number = of_local[label]
        kept = number >= 0
        self._outline(row, number, kept)
        self._carry = of_group[joins.below]
        below = set() if last else set(self._carry.tolist())
        ended = [self._finished.pop(each) for each in sorted(set(self._finished) - below)]
        return kept, sorted((each.component() for each in ended), key=lambda component: component.last_px)

    def _outline(self, row: int, number: NDArray[np.int64], kept: NDArray[np.bool_]) -> None:
        if not kept.any():
            return
        found, small = np.unique(number[kept], return_inverse=True)
        image = np.zeros(number.shape, np.int32)  # GDAL's polygons are of 32 bits
        image[kept] = small
        for polygon, value in shapes(image, mask=kept, connectivity=4, transform=Affine.translation(0, row)):
            self._finished[int(found[int(value)])].parts.append(shapely.geometry.shape(polygon))

    # --- both --------------------------------------------------------------------------------------------------------------

    def _label(self, kind: NDArray[np.uint8]) -> tuple[NDArray[np.int32], int]:
        """(row, col) numbers of the components within a strip from 1, 0 elsewhere; and how many there are."""
        label, count = np.zeros(kind.shape, np.int32), 0
        for one in self._kinds:
            found = np.empty(kind.shape, np.int32)
            more = int(ndimage.label(kind == one, structure=_EIGHT, output=found))
            label += np.where(found > 0, found + count, 0).astype(np.int32) if count else found
            count += more
        return label, count

    def _path(self, row: int) -> Path:
        return self._folder / f"joins_{row}.npz"


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Tally:
    """What is known of each of several components or parts of such."""

    pixels: NDArray[np.int64]
    kind: NDArray[np.int64]
    last_px: NDArray[np.int64]
    sums: NDArray[np.float64]
    """(component, value)."""

    @classmethod
    def empty(cls, values: int) -> _Tally:
        nothing = np.zeros(0, np.int64)
        return cls(pixels=nothing, kind=nothing, last_px=nothing, sums=np.zeros((0, values)))

    @classmethod
    def of(
        cls,
        number: NDArray[np.int32],
        count: int,
        kind: NDArray[np.uint8],
        values: NDArray[np.float64],
        place: NDArray[np.int64],
    ) -> _Tally:
        """Of pixels, each with the number of its component."""
        kinds, last = np.zeros(count, np.int64), np.zeros(count, np.int64)
        kinds[number] = kind
        last[number] = place  # in reading order, so that the last one stays
        sums = np.array([np.bincount(number, weights=each, minlength=count) for each in values])
        return cls(
            pixels=np.bincount(number, minlength=count), kind=kinds, last_px=last, sums=sums.reshape(len(values), count).T
        )

    def and_(self, other: _Tally) -> _Tally:
        return _Tally(
            **{
                name: np.concatenate([getattr(self, name), getattr(other, name)])
                for name in ("pixels", "kind", "last_px", "sums")
            }
        )

    def grouped(self, group: NDArray[np.int64]) -> _Tally:
        count = int(group.max()) + 1 if len(group) else 0
        pixels, kind, last = (np.zeros(count, np.int64) for _ in range(3))
        np.add.at(pixels, group, self.pixels)
        kind[group] = self.kind
        np.maximum.at(last, group, self.last_px)
        sums = np.zeros((count, self.sums.shape[1]))
        np.add.at(sums, group, self.sums)
        return _Tally(pixels=pixels, kind=kind, last_px=last, sums=sums)

    def take(self, index: NDArray[np.int64]) -> _Tally:
        return _Tally(pixels=self.pixels[index], kind=self.kind[index], last_px=self.last_px[index], sums=self.sums[index])


class _Finished:
    """A component whose outline is being put together."""

    def __init__(self, joins: _Joins, place: int) -> None:
        self._kind, self._pixels = int(joins.kind[place]), int(joins.pixels[place])
        self._last_px, self._sums = int(joins.last_px[place]), joins.sums[place].copy()
        self.parts: list[Any] = []

    def component(self) -> Component:
        return Component(
            kind=self._kind, pixels=self._pixels, sums=self._sums, last_px=self._last_px, outline=_together(self.parts)
        )


def _together(parts: list[Any]) -> Any:
    """Parts in whole pixel coordinates as one multi-polygon without needless corners."""
    whole = shapely.union_all(shapely.make_valid(parts))
    # A ring that begins at an outermost corner keeps it: only points on a straight line go.
    whole = shapely.simplify(shapely.normalize(whole), 0.0, preserve_topology=False)
    return shapely.normalize(shapely.multipolygons(shapely.get_parts(whole)))


def _places(marked: NDArray[np.bool_], row: int, cols: int) -> NDArray[np.int64]:
    """Where the marked pixels are in the raster, row * columns + column."""
    return np.flatnonzero(marked) + row * cols


def _touching(
    label: NDArray[np.int32], kind: NDArray[np.uint8], edge: NDArray[np.int64], edge_kind: NDArray[np.uint8]
) -> NDArray[np.int64]:
    """(pair, 2): number below and number here, from 0, of components that touch across the seam, diagonally too."""
    pairs = []
    cols = len(label)
    for step in (-1, 0, 1):
        here, there = slice(max(0, -step), cols - max(0, step)), slice(max(0, step), cols - max(0, -step))
        both = (label[here] > 0) & (edge[there] >= 0) & (kind[here] == edge_kind[there])
        pairs.append(np.stack([edge[there][both], label[here][both].astype(np.int64) - 1], axis=1))
    return np.unique(np.concatenate(pairs), axis=0)


def _groups(below: int, local: int, joined: NDArray[np.int64]) -> NDArray[np.int64]:
    """(below + local,) the group of each component when those that touch are one."""
    size = below + local
    if not size:
        return np.zeros(0, np.int64)
    ones = np.ones(len(joined), bool)
    graph = coo_array((ones, (joined[:, 0], joined[:, 1] + below)), shape=(size, size)).tocsr()
    return np.asarray(connected_components(graph, directed=False)[1], np.int64)

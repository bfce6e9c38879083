"""Where pixels are: grids, the global window lattice, sheets and blend weights.

Everything below `Lattice` is integer arithmetic on *lattice pixels*: column c covers x in [c*gsd, (c+1)*gsd) and row r
covers y in (-(r+1)*gsd, -r*gsd], both counted from the origin of the CRS. Rows grow southwards, so rows north of the
origin are negative. Because nothing is counted from the corner of an image or of an area of interest, the windows, the
sheets and so the value of a pixel do not depend on either.

The functions `ramp`, `boundary`, `weight`, `first_window`, `last_window` and `sheet_index` take their `clamp` and
`floordiv` as arguments so that the tests can run this very source on the terms of an SMT solver.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from affine import Affine
from pyproj import CRS

from canopy.errors import GridError

SNAP_TOLERANCE_PX = 1e-3
"""A grid whose edges are this close to lattice edges is on the lattice; 1 mm at 1 m is far below any image's accuracy."""

TOTAL_STRIDE_PX = 32
"""Total stride of the decoder: a window side that is not a multiple would be resized inside the network."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Grid:
    """A raster's place on Earth: CRS, affine transform (pixel (col, row) -> CRS (x, y)) and shape (row, col)."""

    crs: CRS
    transform: Affine
    shape: tuple[int, int]
    """(rows, columns), both at least 1."""

    def __post_init__(self) -> None:
        if min(self.shape) < 1:
            raise GridError(f"grid shape {self.shape} has an empty side; both rows and columns must be at least 1")
        if self.transform.determinant == 0:
            raise GridError(
                f"transform {tuple(self.transform)[:6]} maps the grid onto a line; georeference the raster again"
            )

    @property
    def gsd(self) -> tuple[float, float]:
        """Ground sampling distance (x, y) in CRS units, positive."""
        a, b, _, d, e, _ = tuple(self.transform)[:6]
        return math.hypot(a, d), math.hypot(b, e)

    @property
    def bounds(self) -> tuple[float, float, float, float]:
        """(left, bottom, right, top) of all four corners, in CRS units."""
        rows, cols = self.shape
        corners = [self.xy(c, r) for c in (0, cols) for r in (0, rows)]
        xs, ys = zip(*corners, strict=True)
        return min(xs), min(ys), max(xs), max(ys)

    def xy(self, col: Any, row: Any) -> tuple[Any, Any]:
        """CRS coordinates (x, y) of pixel coordinates (0 is the first pixel's outer edge); numbers or arrays."""
        a, b, c, d, e, f = tuple(self.transform)[:6]
        return a * col + b * row + c, d * col + e * row + f

    def pixel(self, x: Any, y: Any) -> tuple[Any, Any]:
        """Pixel coordinates (col, row) of CRS coordinates; numbers or arrays."""
        a, b, c, d, e, f = tuple(~self.transform)[:6]
        return a * x + b * y + c, d * x + e * y + f

    def crop(self, row: int, col: int, shape: tuple[int, int]) -> Grid:
        """The sub-grid of `shape` whose first pixel is (row, col); may hang over the edges."""
        return Grid(crs=self.crs, transform=self.transform @ Affine.translation(col, row), shape=shape)


@dataclass(frozen=True, slots=True, order=True)
class Box:
    """A half-open rectangle of lattice pixels: rows [row0, row1), columns [col0, col1)."""

    row0: int
    col0: int
    row1: int
    col1: int

    def __post_init__(self) -> None:
        if self.row1 <= self.row0 or self.col1 <= self.col0:
            raise GridError(f"{self} is empty; row1 > row0 and col1 > col0 are required")

    @property
    def shape(self) -> tuple[int, int]:
        """(rows, columns)."""
        return self.row1 - self.row0, self.col1 - self.col0

    def intersect(self, other: Box) -> Box | None:
        """The common rectangle, or None when there is none."""
        row0, row1 = max(self.row0, other.row0), min(self.row1, other.row1)
        col0, col1 = max(self.col0, other.col0), min(self.col1, other.col1)
        return Box(row0, col0, row1, col1) if row0 < row1 and col0 < col1 else None

    def slices_in(self, outer: Box) -> tuple[slice, slice]:
        """(row, col) slices of this box in an array that covers `outer`; this box must lie inside it."""
        assert self.intersect(outer) == self, f"{self} leaves {outer}"
        return (
            slice(self.row0 - outer.row0, self.row1 - outer.row0),
            slice(self.col0 - outer.col0, self.col1 - outer.col0),
        )


# --- integer arithmetic, shared with the solver ------------------------------------------------------------------------


def _clamp(value: int, low: int, high: int) -> int:
    return max(low, min(value, high))


def boundary(window: Any, stride: Any, overlap: Any, floordiv: Callable[[Any, Any], Any] = operator.floordiv) -> Any:
    """The pixel edge where `window` takes over from the one before it: the centre of their overlap."""
    return window * stride + floordiv(overlap, 2)


def ramp(pixel: Any, edge: Any, feather: Any, clamp: Callable[[Any, Any, Any], Any] = _clamp) -> Any:
    """The rise from 0 to 2*feather across `feather` pixels centred on `edge`, sampled at the centre of `pixel`."""
    return clamp(2 * (pixel - edge) + 1 + feather, 0, 2 * feather)


def weight(pixel: Any, edge: Any, next_edge: Any, feather: Any, clamp: Callable[[Any, Any, Any], Any] = _clamp) -> Any:
    """A window's weight at `pixel` in units of 1/(2*feather): its own ramp minus the next window's.

    Why a difference of ramps: consecutive differences telescope, so the weights of all windows sum to exactly
    2*feather at every pixel whatever the layout, with no division and nothing to renormalise at an edge.
    """
    return ramp(pixel, edge, feather, clamp) - ramp(pixel, next_edge, feather, clamp)


def first_window(
    pixel: Any, stride: Any, overlap: Any, feather: Any, floordiv: Callable[[Any, Any], Any] = operator.floordiv
) -> Any:
    """Index of the first window with weight at `pixel`."""
    return floordiv(pixel - floordiv(overlap, 2) - floordiv(feather, 2), stride)


def last_window(
    pixel: Any, stride: Any, overlap: Any, feather: Any, floordiv: Callable[[Any, Any], Any] = operator.floordiv
) -> Any:
    """Index of the last window with weight at `pixel`."""
    return floordiv(pixel - floordiv(overlap, 2) + floordiv(feather, 2), stride)


def sheet_index(pixel: Any, sheet: Any, floordiv: Callable[[Any, Any], Any] = operator.floordiv) -> Any:
    """Index of the one sheet that owns `pixel`."""
    return floordiv(pixel, sheet)


# --- the lattice ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """Sizes of the model's windows, in lattice pixels, the same along rows and columns."""

    window_px: int
    """Side of one model input; a multiple of 32."""
    stride_px: int
    """Distance between the starts of neighbouring windows; even, less than `window_px`."""

    def __post_init__(self) -> None:
        if self.window_px < TOTAL_STRIDE_PX or self.window_px % TOTAL_STRIDE_PX:
            raise GridError(
                f"window {self.window_px} px is not a multiple of {TOTAL_STRIDE_PX}; choose for example 256 or 448"
            )
        if self.stride_px % 2 or not 0 < self.stride_px <= self.window_px - 2:
            raise GridError(
                f"stride {self.stride_px} px must be even and between 2 and window - 2 = {self.window_px - 2} px; "
                f"three quarters of the window is usual"
            )

    @property
    def overlap_px(self) -> int:
        """What two neighbouring windows share."""
        return self.window_px - self.stride_px

    @property
    def feather_px(self) -> int:
        """Width of the blend: the largest power of two that fits the overlap.

        Why a power of two: the weights are then multiples of 1/(2*feather), which float32 holds exactly, and so is
        their sum, 1.
        """
        return 1 << (self.overlap_px.bit_length() - 1)

    def window_span(self, index: int) -> tuple[int, int]:
        """[start, stop) of window `index` along one axis."""
        start = index * self.stride_px
        return start, start + self.window_px

    def windows_over(self, start: int, stop: int) -> range:
        """Indices of the windows with weight anywhere in [start, stop) along one axis."""
        args = (self.stride_px, self.overlap_px, self.feather_px)
        return range(first_window(start, *args), last_window(stop - 1, *args) + 1)

    def support_span(self, index: int) -> tuple[int, int]:
        """[start, stop) of the pixels where window `index` has weight; inside its `window_span`."""
        half = self.feather_px // 2
        edge = boundary(index, self.stride_px, self.overlap_px)
        return edge - half, edge + self.stride_px + half

    def window_box(self, row: int, col: int) -> Box:
        """The rectangle that window (row, col) covers."""
        (row0, row1), (col0, col1) = self.window_span(row), self.window_span(col)
        return Box(row0, col0, row1, col1)

    def support_box(self, row: int, col: int) -> Box:
        """The rectangle in which window (row, col) has weight."""
        (row0, row1), (col0, col1) = self.support_span(row), self.support_span(col)
        return Box(row0, col0, row1, col1)

    def halo_box(self, box: Box) -> Box:
        """The rectangle of imagery that the windows with weight in `box` read."""
        rows, cols = self.windows_over(box.row0, box.row1), self.windows_over(box.col0, box.col1)
        return Box(
            self.window_span(rows[0])[0],
            self.window_span(cols[0])[0],
            self.window_span(rows[-1])[1],
            self.window_span(cols[-1])[1],
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Lattice:
    """Square, north-up pixels of `gsd_m` whose edges are multiples of `gsd_m` from the origin of a metric CRS."""

    crs: CRS
    gsd_m: float

    def __post_init__(self) -> None:
        if not math.isfinite(self.gsd_m) or self.gsd_m <= 0:
            raise GridError(f"GSD {self.gsd_m} m is not a positive length; give metres per pixel, for example 0.6")
        if not is_metric(self.crs):
            raise GridError(
                f"CRS {self.crs.name!r} is not projected in metres; choose a UTM zone, for example --crs EPSG:32610"
            )

    def grid(self, box: Box) -> Grid:
        """The grid of `box`."""
        transform = Affine(self.gsd_m, 0.0, box.col0 * self.gsd_m, 0.0, -self.gsd_m, -box.row0 * self.gsd_m)
        return Grid(crs=self.crs, transform=transform, shape=box.shape)

    def covering(self, bounds: tuple[float, float, float, float]) -> Box:
        """The smallest box that contains `bounds` = (left, bottom, right, top) in CRS units; near edges are snapped."""
        left, bottom, right, top = (v / self.gsd_m for v in bounds)
        return Box(
            math.floor(-top + SNAP_TOLERANCE_PX),
            math.floor(left + SNAP_TOLERANCE_PX),
            math.ceil(-bottom - SNAP_TOLERANCE_PX),
            math.ceil(right - SNAP_TOLERANCE_PX),
        )

    def box_of(self, grid: Grid) -> Box | None:
        """The box whose pixels are exactly those of `grid`, or None when `grid` is not on this lattice."""
        a, b, left, d, e, top = tuple(grid.transform)[:6]
        rows, cols = grid.shape
        if grid.crs != self.crs or b != 0 or d != 0:
            return None
        # A GSD error adds up along the raster, so the far corner is what must agree, not one pixel's size.
        near = (left / self.gsd_m, -top / self.gsd_m)
        far = ((left + cols * a) / self.gsd_m, -(top + rows * e) / self.gsd_m)
        if any(abs(v - round(v)) > SNAP_TOLERANCE_PX for v in (*near, *far)):
            return None
        box = (round(near[1]), round(near[0]), round(far[1]), round(far[0]))
        return Box(*box) if box[2] - box[0] == rows and box[3] - box[1] == cols else None


def sheets_over(box: Box, sheet_px: int) -> list[Box]:
    """Cut `box` at the multiples of `sheet_px` into the parts of each sheet, in row-major order."""
    if sheet_px < 1:
        raise GridError(f"sheet size {sheet_px} px is not positive; give for example 8192")
    rows = range(sheet_index(box.row0, sheet_px), sheet_index(box.row1 - 1, sheet_px) + 1)
    cols = range(sheet_index(box.col0, sheet_px), sheet_index(box.col1 - 1, sheet_px) + 1)
    whole = (Box(r * sheet_px, c * sheet_px, (r + 1) * sheet_px, (c + 1) * sheet_px) for r in rows for c in cols)
    return [part for sheet in whole if (part := sheet.intersect(box)) is not None]


# --- coordinate reference systems ----------------------------------------------------------------------------------------


def is_metric(crs: CRS) -> bool:
    """Whether distances in `crs` are metres on the ground: projected, unit metre, and not web or another normal Mercator.

    Their unit is called metre but is 2 m at 60 degrees of latitude, so heights and areas would not match. A compound CRS
    (with a vertical part) is judged by its horizontal part, a bound one by what is bound.
    """
    plane = next((part for part in crs.sub_crs_list if part.is_projected), crs)
    plane = plane.source_crs if plane.is_bound and plane.source_crs else plane
    operation = plane.coordinate_operation
    return (
        plane.is_projected
        and all(math.isclose(axis.unit_conversion_factor, 1.0) for axis in plane.axis_info[:2])
        and operation is not None
        and not operation.method_name.startswith(("Popular Visualisation Pseudo Mercator", "Mercator"))
    )


def utm_crs(lon_deg: float, lat_deg: float) -> CRS:
    """The WGS 84 / UTM zone of a point, 80 S to 84 N."""
    if not (-180 <= lon_deg <= 180 and -80 <= lat_deg <= 84):
        raise GridError(f"no UTM zone at longitude {lon_deg:.4f}, latitude {lat_deg:.4f}; give a metric CRS with --crs")
    zone = min(int((lon_deg + 180) // 6) + 1, 60)
    return CRS.from_epsg((32600 if lat_deg >= 0 else 32700) + zone)


def iter_windows(layout: Layout, box: Box) -> Iterator[tuple[int, int]]:
    """(row, col) of every window with weight in `box`, row-major: the one order in which sums are taken."""
    for row in layout.windows_over(box.row0, box.row1):
        for col in layout.windows_over(box.col0, box.col1):
            yield row, col

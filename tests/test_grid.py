"""Grids, the lattice, sheets and windows on plain integers and real CRSs; test_grid_proofs has the proofs for all sizes."""

import dataclasses
import math

import numpy as np
import pytest
from affine import Affine
from hypothesis import given
from hypothesis import strategies as st
from pyproj import CRS
from rasterio.transform import array_bounds

from canopy.errors import CanopyError, GridError
from canopy.grid import (
    SNAP_TOLERANCE_PX,
    Box,
    Grid,
    Lattice,
    Layout,
    boundary,
    is_metric,
    iter_windows,
    sheets_over,
    utm_crs,
    weight,
)
from tests.strategies import boxes, lattices, layouts

UTM = CRS.from_epsg(32610)


def error_line(info) -> str:
    """The message, checked to be one line."""
    message = str(info.value)
    assert "\n" not in message
    return message


# --- Grid


def test_bounds_and_gsd_of_a_north_up_grid_equal_rasterio():
    transform = Affine(0.6, 0, 500_000.2, 0, -0.6, 4_900_000.4)
    grid = Grid(crs=UTM, transform=transform, shape=(30, 70))
    assert grid.bounds == pytest.approx(array_bounds(30, 70, transform), abs=1e-9)
    assert grid.gsd == pytest.approx((0.6, 0.6))


@given(st.floats(-180, 180), st.floats(0.1, 5), st.floats(0.1, 5))
def test_rotation_keeps_gsd_and_bounds_hold_every_corner(angle_deg, x_m, y_m):
    transform = Affine.translation(1000, 2000) @ Affine.rotation(angle_deg) @ Affine.scale(x_m, -y_m)
    grid = Grid(crs=UTM, transform=transform, shape=(7, 4))
    assert grid.gsd == pytest.approx((x_m, y_m))
    left, bottom, right, top = grid.bounds
    corners = np.array([transform @ (c, r) for c in (0, 4) for r in (0, 7)])
    assert (left, bottom) == tuple(corners.min(axis=0))
    assert (right, top) == tuple(corners.max(axis=0))


@given(st.integers(-9, 9), st.integers(-9, 9), st.floats(-180, 180))
def test_crop_keeps_pixels_where_they_are(row, col, angle_deg):
    transform = Affine.translation(1000, 2000) @ Affine.rotation(angle_deg) @ Affine.scale(0.5, -0.5)
    cropped = Grid(crs=UTM, transform=transform, shape=(5, 5)).crop(row, col, (2, 3))
    assert cropped.shape == (2, 3)
    assert cropped.transform @ (1, 2) == pytest.approx(transform @ (col + 1, row + 2))


def test_impossible_grids_are_refused_in_one_line():
    with pytest.raises(GridError, match="empty side") as info:
        Grid(crs=UTM, transform=Affine.identity(), shape=(0, 5))
    assert "(0, 5)" in error_line(info)
    with pytest.raises(GridError, match="onto a line") as info:
        Grid(crs=UTM, transform=Affine(1, 1, 0, 1, 1, 0), shape=(5, 5))
    assert "georeference" in error_line(info)
    assert issubclass(GridError, CanopyError)


def test_values_are_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        Box(0, 0, 1, 1).row0 = 5
    with pytest.raises(dataclasses.FrozenInstanceError):
        Lattice(crs=UTM, gsd_m=1.0).gsd_m = 2.0


# --- Box


@given(boxes(most_px=20, far_px=30), boxes(most_px=20, far_px=30))
def test_intersection_is_that_of_the_pixel_sets(a, b):
    def pixels(box):
        return {(r, c) for r in range(box.row0, box.row1) for c in range(box.col0, box.col1)}

    common = a.intersect(b)
    assert (pixels(common) if common else set()) == pixels(a) & pixels(b)
    assert common == b.intersect(a)
    if common:
        assert common.intersect(a) == common
        rows, cols = common.slices_in(a)
        assert np.zeros(a.shape)[rows, cols].shape == common.shape


def test_empty_box_and_slices_outside_are_refused():
    for box in ((0, 0, 0, 5), (0, 5, 3, 5), (4, 0, 2, 3)):
        with pytest.raises(GridError, match="empty") as info:
            Box(*box)
        assert "row1 > row0" in error_line(info)
    with pytest.raises(AssertionError, match="leaves"):
        Box(0, 0, 5, 5).slices_in(Box(1, 0, 5, 5))


# --- Lattice


@given(lattices(), boxes())
def test_box_to_grid_and_back(lattice, box):
    grid = lattice.grid(box)
    assert grid.shape == box.shape
    assert lattice.box_of(grid) == box
    assert lattice.covering(grid.bounds) == box


@given(lattices(), boxes(), st.integers(-5, 5), st.integers(-5, 5))
def test_crop_of_a_lattice_grid_is_on_the_lattice(lattice, box, row, col):
    cropped = lattice.grid(box).crop(row, col, (3, 4))
    assert lattice.box_of(cropped) == Box(box.row0 + row, box.col0 + col, box.row0 + row + 3, box.col0 + col + 4)


@given(lattices(), st.data())
def test_covering_holds_the_bounds_and_no_row_or_column_more(lattice, data):
    px = st.floats(-10_000_000, 10_000_000)
    left, bottom = data.draw(px), data.draw(px)
    right, top = left + data.draw(st.floats(0.01, 500)), bottom + data.draw(st.floats(0.01, 500))
    box = lattice.covering(tuple(v * lattice.gsd_m for v in (left, bottom, right, top)))
    slack = SNAP_TOLERANCE_PX + 1e-6  # the second term is the rounding of coordinates this large
    assert box.col0 <= left + slack < box.col0 + 1 + 2 * slack
    assert box.row0 <= -top + slack < box.row0 + 1 + 2 * slack
    assert box.col1 - 1 - 2 * slack < right - slack <= box.col1
    assert box.row1 - 1 - 2 * slack < -bottom - slack <= box.row1


@pytest.mark.parametrize("sign", [-1, 1])
@pytest.mark.parametrize(("shift_px", "snaps"), [(0.0, True), (0.9e-3, True), (1.1e-3, False), (0.5, False)])
def test_a_grid_snaps_within_a_thousandth_of_a_pixel(shift_px, snaps, sign):
    lattice, box = Lattice(crs=UTM, gsd_m=0.6), Box(-8_000_000, 800_000, -7_999_900, 800_200)
    shift_m = sign * shift_px * lattice.gsd_m
    for shift in (Affine.translation(shift_m, 0), Affine.translation(0, shift_m)):
        grid = lattice.grid(box)
        moved = dataclasses.replace(grid, transform=shift @ grid.transform)
        assert lattice.box_of(moved) == (box if snaps else None)
        assert (lattice.covering(moved.bounds) == box) == snaps


def test_a_gsd_error_is_judged_at_the_far_corner():
    """One part in a million is nothing over 100 pixels and ten pixels over ten million."""
    lattice = Lattice(crs=UTM, gsd_m=1.0)
    transform = Affine(1.000001, 0, 0, 0, -1.000001, 0)
    assert lattice.box_of(Grid(crs=UTM, transform=transform, shape=(100, 100))) == Box(0, 0, 100, 100)
    assert lattice.box_of(Grid(crs=UTM, transform=transform, shape=(100, 10_000_000))) is None


@pytest.mark.parametrize(
    "transform",
    [
        pytest.param(Affine(1, 0, 0, 0, 1, 0), id="south-up"),
        pytest.param(Affine(-1, 0, 50, 0, -1, 0), id="mirrored"),
        pytest.param(Affine(0, 1, 0, -1, 0, 0), id="rotated"),
        pytest.param(Affine(2, 0, 0, 0, -2, 0), id="coarser"),
        pytest.param(Affine(1, 0, 0, 0, -2, 0), id="oblong"),
    ],
)
def test_other_pixels_are_not_on_the_lattice(transform):
    lattice = Lattice(crs=UTM, gsd_m=1.0)
    assert lattice.box_of(Grid(crs=UTM, transform=transform, shape=(50, 50))) is None


def test_another_crs_is_not_on_the_lattice():
    grid = Lattice(crs=CRS.from_epsg(32611), gsd_m=1.0).grid(Box(0, 0, 5, 5))
    assert Lattice(crs=UTM, gsd_m=1.0).box_of(grid) is None


@pytest.mark.parametrize("gsd_m", [0.0, -1.0, math.nan, math.inf])
def test_gsd_must_be_a_length(gsd_m):
    with pytest.raises(GridError, match="positive length") as info:
        Lattice(crs=UTM, gsd_m=gsd_m)
    assert str(gsd_m) in error_line(info)


MERCATOR = ("EPSG:3857", "EPSG:3857+5773", "ESRI:102100", "EPSG:3395")


@pytest.mark.parametrize("name", ["EPSG:4326", "EPSG:4978", "EPSG:2994", "EPSG:2994+6360", "EPSG:2227", *MERCATOR])
def test_degrees_feet_and_mercator_are_refused(name):
    crs = CRS.from_user_input(name)
    assert not is_metric(crs)
    with pytest.raises(GridError, match="not projected in metres") as info:
        Lattice(crs=crs, gsd_m=1.0)
    assert repr(crs.name) in error_line(info)
    assert "EPSG:32610" in error_line(info)


@pytest.mark.parametrize("name", ["EPSG:32610", "EPSG:32610+5703", "EPSG:2193", "EPSG:5070", "EPSG:3035", "EPSG:32661"])
def test_metric_crs_are_accepted(name):
    assert is_metric(CRS.from_user_input(name))


@given(st.floats(-180, 180), st.floats(-80, 84))
def test_utm_zone_holds_the_point(lon_deg, lat_deg):
    """Oracle: the area of use that the EPSG registry gives the zone."""
    crs = utm_crs(lon_deg, lat_deg)
    area = crs.area_of_use
    hair_deg = 1e-9  # the zone's arithmetic rounds: a point this close to a limit is on it
    assert area.west - hair_deg <= lon_deg <= area.east + hair_deg
    assert area.south - hair_deg <= lat_deg <= area.north + hair_deg
    assert is_metric(crs)


@pytest.mark.parametrize(("lon_deg", "lat_deg"), [(0, 85), (0, -81), (181, 0), (math.nan, 0), (0, math.nan)])
def test_no_utm_zone(lon_deg, lat_deg):
    with pytest.raises(GridError, match="no UTM zone") as info:
        utm_crs(lon_deg, lat_deg)
    assert "--crs" in error_line(info)


# --- sheets


@given(boxes(most_px=60), st.integers(1, 70))
def test_sheets_partition_a_box(box, sheet_px):
    owners = np.zeros(box.shape, dtype=int)
    parts = sheets_over(box, sheet_px)
    for part in parts:
        owners[part.slices_in(box)] += 1
        assert part.row0 // sheet_px == (part.row1 - 1) // sheet_px
        assert part.col0 // sheet_px == (part.col1 - 1) // sheet_px
    assert (owners == 1).all()
    assert parts == sorted(parts)


@given(boxes(most_px=60), st.integers(1, 70), st.data())
def test_a_pixel_has_the_same_sheet_whatever_the_area(box, sheet_px, data):
    """An area inside another is cut along the same lines."""
    row0, col0 = data.draw(st.integers(box.row0, box.row1 - 1)), data.draw(st.integers(box.col0, box.col1 - 1))
    part = Box(row0, col0, data.draw(st.integers(row0 + 1, box.row1)), data.draw(st.integers(col0 + 1, box.col1)))
    inherited = [cut for sheet in sheets_over(box, sheet_px) if (cut := sheet.intersect(part))]
    assert sheets_over(part, sheet_px) == inherited


@pytest.mark.parametrize("sheet_px", [0, -8])
def test_sheet_size_must_be_positive(sheet_px):
    with pytest.raises(GridError, match="not positive") as info:
        sheets_over(Box(0, 0, 1, 1), sheet_px)
    assert str(sheet_px) in error_line(info)


# --- windows


@pytest.mark.parametrize("window_px", [0, 31, 33, 100, -32])
def test_window_must_be_a_multiple_of_32(window_px):
    with pytest.raises(GridError, match="multiple of 32") as info:
        Layout(window_px=window_px, stride_px=16)
    assert str(window_px) in error_line(info)


@pytest.mark.parametrize("stride_px", [0, -2, 47, 63, 64, 66, 128])
def test_stride_must_be_even_and_leave_an_overlap(stride_px):
    with pytest.raises(GridError, match="must be even and between 2 and") as info:
        Layout(window_px=64, stride_px=stride_px)
    assert str(stride_px) in error_line(info)


@given(layouts(most_px=128), boxes(most_px=40))
def test_windows_over_a_box_are_those_with_weight_in_it(layout, box):
    rows = np.arange(box.row0, box.row1)
    named = layout.windows_over(box.row0, box.row1)
    for index in range(named.start - 2, named.stop + 2):
        edges = (boundary(i, layout.stride_px, layout.overlap_px) for i in (index, index + 1))
        low, high = edges
        weights = np.array([weight(int(r), low, high, layout.feather_px) for r in rows])
        start, stop = layout.support_span(index)
        assert np.array_equal(weights > 0, (rows >= start) & (rows < stop))
        assert bool((weights > 0).any()) == (index in named)


@given(layouts(most_px=128), boxes(most_px=40))
def test_weights_in_float32_sum_to_one_to_the_bit(layout, box):
    """Any order of float32 additions gives exactly 1, because weights are multiples of a power of two."""
    for pixel in (box.row0, box.row1 - 1):
        total, backwards = np.float32(0), np.float32(0)
        weights = []
        for index in layout.windows_over(pixel, pixel + 1):
            low, high = (boundary(i, layout.stride_px, layout.overlap_px) for i in (index, index + 1))
            weights.append(np.float32(weight(pixel, low, high, layout.feather_px)) / np.float32(2 * layout.feather_px))
        for forward, backward in zip(weights, reversed(weights), strict=True):
            total, backwards = total + forward, backwards + backward
        assert total == backwards == np.float32(1)


def test_a_feather_that_is_no_power_of_two_would_not_sum_to_one():
    """Negative control of the test above: thirds of a weight do not survive float32."""
    feather = 12
    pixels = [np.float32(weight(p, 0, 100, feather)) / np.float32(2 * feather) for p in range(-6, 6)]
    nexts = [np.float32(weight(p, -100, 0, feather)) / np.float32(2 * feather) for p in range(-6, 6)]
    squares = [sum((a * c for a in (p, q) for c in (p, q)), np.float32(0)) for p, q in zip(pixels, nexts, strict=True)]
    assert any(s != np.float32(1) for s in squares)


@given(layouts(most_px=96), boxes(most_px=60))
def test_halo_holds_every_window_and_supports_lie_in_windows(layout, box):
    halo = layout.halo_box(box)
    windows = list(iter_windows(layout, box))
    assert windows == sorted(set(windows))
    assert box.intersect(halo) == box
    spans = [layout.window_box(*w) for w in windows]
    assert all(span.intersect(halo) == span for span in spans)
    assert (min(s.row0 for s in spans), max(s.row1 for s in spans)) == (halo.row0, halo.row1)
    assert (min(s.col0 for s in spans), max(s.col1 for s in spans)) == (halo.col0, halo.col1)
    for window in windows:
        support = layout.support_box(*window)
        assert support.intersect(layout.window_box(*window)) == support
        assert support.intersect(box) is not None


@given(layouts(), st.integers(-9, 9), st.integers(-9, 9), boxes(most_px=60))
def test_moving_a_box_by_whole_strides_moves_its_windows(layout, down, right, box):
    s = layout.stride_px
    moved = Box(box.row0 + down * s, box.col0 + right * s, box.row1 + down * s, box.col1 + right * s)
    assert list(iter_windows(layout, moved)) == [(r + down, c + right) for r, c in iter_windows(layout, box)]

"""Local images on the lattice: untouched where they fit, and otherwise one resampling that no reader can influence."""

import itertools
import math

import numpy as np
import pytest
import rasterio
import shapely
from affine import Affine
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from pyproj import CRS, Transformer
from rasterio.enums import ColorInterp

from canopy import raster
from canopy.errors import GridError, RasterError
from canopy.grid import Box, Grid, Lattice
from canopy.raster import Pixels, open_raster, write_raster
from canopy.tiler import imagery
from canopy.tiler.imagery import ImageFiles, inspect, open_imagery

UTM = CRS.from_epsg(32610)
LATTICE = Lattice(crs=UTM, gsd_m=0.6)
ORIGIN = (-8_130_000, 833_300)  # lattice row and column near 500 km east, 4878 km north


def noise(*shape, dtype="uint8", seed=0):
    return np.random.default_rng(seed).integers(1, 255, shape).astype(dtype)


def lattice_box(rows, cols, *, row=0, col=0):
    return Box(ORIGIN[0] + row, ORIGIN[1] + col, ORIGIN[0] + row + rows, ORIGIN[1] + col + cols)


def grids():
    """Images of one place, each off the lattice in its own way."""
    left, top = ORIGIN[1] * 0.6, -ORIGIN[0] * 0.6
    lon, lat = Transformer.from_crs(UTM, "EPSG:4326", always_xy=True).transform(left, top)
    feet = CRS.from_epsg(2994)
    east, north = Transformer.from_crs(UTM, feet, always_xy=True).transform(left, top)
    turned = Affine.translation(left + 200, top) @ Affine.rotation(-23) @ Affine.scale(0.5, -0.5)
    return {
        "shifted": Grid(crs=UTM, transform=Affine(0.6, 0, left + 0.21, 0, -0.6, top - 0.37), shape=(300, 280)),
        "finer": Grid(crs=UTM, transform=Affine(0.31, 0, left + 0.1, 0, -0.31, top), shape=(600, 500)),
        "coarser": Grid(crs=UTM, transform=Affine(0.83, 0, left, 0, -0.83, top), shape=(200, 300)),
        "rotated": Grid(crs=UTM, transform=turned, shape=(300, 400)),
        "south up": Grid(crs=UTM, transform=Affine(0.6, 0, left + 0.1, 0, 0.6, top - 200), shape=(300, 280)),
        "feet": Grid(crs=feet, transform=Affine(1, 0, round(east), 0, -1, round(north)), shape=(500, 600)),
        "degrees": Grid(crs=CRS.from_epsg(4326), transform=Affine(8e-6, 0, lon, 0, -6e-6, lat), shape=(300, 280)),
        "other zone": other_zone(left, top),
    }


def other_zone(left, top):
    zone = CRS.from_epsg(32611)
    x, y = Transformer.from_crs(UTM, zone, always_xy=True).transform(left, top)
    return Grid(crs=zone, transform=Affine(0.6, 0, round(x), 0, -0.6, round(y)), shape=(250, 300))


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    folder = tmp_path_factory.mktemp("images")
    paths = {}
    for name, grid in grids().items():
        paths[name] = folder / f"{name}.tif"
        write_raster(paths[name], noise(2, *grid.shape), grid=grid)
    return paths


# --- on the lattice ------------------------------------------------------------------------------------------------------


def test_an_aligned_image_is_read_untouched(tmp_path):
    data, valid = noise(3, 70, 80), np.random.default_rng(1).random((70, 80)) < 0.9
    box = lattice_box(70, 80)
    write_raster(tmp_path / "a.tif", data, grid=LATTICE.grid(box), valid=valid)
    with open_imagery(tmp_path / "a.tif", LATTICE) as source:
        assert source.box == box
        assert source.resampled == "none"
        pixels = source.read(box)
        np.testing.assert_array_equal(pixels.data, data * valid)
        np.testing.assert_array_equal(pixels.valid, valid)
        part = source.read(lattice_box(100, 40, row=-20, col=50))
    np.testing.assert_array_equal(part.data[:, 20:90, :30], (data * valid)[:, :, 50:])
    assert not part.data[:, :20].any()
    assert not part.valid[90:].any()
    assert not part.valid[:, 30:].any()


def test_a_metric_image_on_its_own_pixels_is_not_resampled(tmp_path):
    """UTM metres are not quite metres on the ground (0.9996); the image's own pixel size must be the one that is taken."""
    write_raster(tmp_path / "a.tif", noise(3, 70, 80), grid=LATTICE.grid(lattice_box(70, 80)))
    info = inspect(tmp_path / "a.tif")
    assert info.gsd_m == 0.6
    with open_imagery(tmp_path / "a.tif", Lattice(crs=info.metric_crs, gsd_m=info.gsd_m)) as source:
        assert source.resampled == "none"


@pytest.mark.parametrize("bands", [(1,), (3, 2, 1), (4, 4)])
def test_bands_come_in_the_order_asked_for(tmp_path, bands):
    data = noise(4, 20, 20)
    box = lattice_box(20, 20)
    write_raster(tmp_path / "a.tif", data, grid=LATTICE.grid(box))
    with open_imagery(tmp_path / "a.tif", LATTICE, bands) as source:
        np.testing.assert_array_equal(source.read(box).data, data[[b - 1 for b in bands]])
    write_raster(tmp_path / "b.tif", data, grid=grids()["shifted"].crop(0, 0, (20, 20)))
    with open_imagery(tmp_path / "b.tif", LATTICE, bands) as some, open_imagery(tmp_path / "b.tif", LATTICE) as every:
        np.testing.assert_array_equal(some.read(box).data, every.read(box).data[[b - 1 for b in bands]])


@pytest.mark.parametrize("bands", [(0,), (5,), (1, 2, 9), (-1,)])
def test_a_band_that_is_not_there_is_refused(tmp_path, bands):
    write_raster(tmp_path / "a.tif", noise(4, 20, 20), grid=LATTICE.grid(lattice_box(20, 20)))
    with pytest.raises(RasterError, match="--bands"), open_imagery(tmp_path / "a.tif", LATTICE, bands):
        pass


# --- resampled -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", grids())
@settings(max_examples=4)
@given(data=st.data())
def test_any_box_of_any_reader_holds_the_same_pixels(images, name, data):
    """Bit for bit, with a fresh reader or one that has read elsewhere; boxes cross the borders of warp tiles."""
    with open_imagery(images[name], LATTICE) as source:
        box = source.box
        outer = Box(box.row0 - 20, box.col0 - 20, box.row1 + 20, box.col1 + 20)
        whole = source.read(outer)
        assert source.resampled == "bilinear"
    first_row = data.draw(st.integers(outer.row0, outer.row1 - 1))
    first_col = data.draw(st.integers(outer.col0, outer.col1 - 1))
    part = Box(
        first_row, first_col,
        data.draw(st.integers(first_row + 1, outer.row1)), data.draw(st.integers(first_col + 1, outer.col1)),
    )  # fmt: skip
    with open_imagery(images[name], LATTICE) as source:
        if data.draw(st.booleans()):
            source.read(lattice_box(3, 3, row=data.draw(st.integers(-600, 600))))
        pixels = source.read(part)
    rows, cols = part.slices_in(outer)
    np.testing.assert_array_equal(pixels.data, whole.data[:, rows, cols])
    np.testing.assert_array_equal(pixels.valid, whole.valid[rows, cols])


def test_the_boxes_cross_borders_of_warp_tiles(images):
    """Guards the test above: it would prove little inside one tile."""
    for path in images.values():
        with open_imagery(path, LATTICE) as source:
            side = imagery.WARP_TILE_PX
            tiles = [(source.box.row0 // side, source.box.col0 // side), (source.box.row1 // side, source.box.col1 // side)]
        if tiles[0] != tiles[1]:
            return
    pytest.fail("every image lies inside one warp tile")


@pytest.mark.parametrize("name", grids())
def test_the_whole_footprint_is_covered_and_nothing_else(images, name):
    """Every lattice pixel whose centre lies in the image is valid, up to all four edges; none farther out than rounding."""
    grid = grids()[name]
    with open_imagery(images[name], LATTICE) as source:
        box = source.box
        outer = Box(box.row0 - 3, box.col0 - 3, box.row1 + 3, box.col1 + 3)
        valid = source.read(outer).valid
    lattice_grid = LATTICE.grid(outer)
    rows, cols = outer.shape
    to_image = Transformer.from_crs(UTM, grid.crs, always_xy=True)
    x, y = lattice_grid.xy(np.arange(cols)[None, :] + 0.5 + 0 * np.arange(rows)[:, None], np.arange(rows)[:, None] + 0.5 + 0)
    col, row = grid.pixel(*to_image.transform(x, y + 0 * x))
    # signed distance to the nearest edge in image pixels, positive inside
    depth = np.minimum.reduce([col, row, grid.shape[1] - col, grid.shape[0] - row])
    assert valid[depth > 1e-3].all(), f"{(~valid[depth > 1e-3]).sum()} pixels are missing"
    assert not valid[depth < -1e-3].any()
    assert not valid[:3].any()
    assert not valid[-3:].any()
    assert not valid[:, :3].any()
    assert not valid[:, -3:].any()
    # and the same by area, against the polygon of the corners
    t = np.linspace(0, 1, 50)
    ring = np.concatenate([
        np.stack([t, 0 * t], 1), np.stack([0 * t + 1, t], 1), np.stack([1 - t, 0 * t + 1], 1), np.stack([0 * t, 1 - t], 1)
    ])  # fmt: skip
    corners = grid.xy(ring[:, 0] * grid.shape[1], ring[:, 1] * grid.shape[0])
    polygon = shapely.Polygon(np.stack(to_image.transform(*corners, direction="INVERSE"), 1))
    assert abs(valid.sum() - polygon.area / 0.36) < 0.5 * polygon.length / 0.6  # half a pixel at each edge


@pytest.mark.parametrize("name", grids())
def test_a_bright_pixel_lands_where_pyproj_says(tmp_path, name):
    grid = grids()[name]
    row, col = 117, 143
    data = np.zeros((1, *grid.shape), np.float32)
    data[0, row - 1 : row + 2, col - 1 : col + 2] = 100.0
    write_raster(tmp_path / "a.tif", data, grid=grid)
    to_lattice = Transformer.from_crs(grid.crs, UTM, always_xy=True)
    x, y = to_lattice.transform(*grid.xy(col + 0.5, row + 0.5))
    with open_imagery(tmp_path / "a.tif", LATTICE) as source:
        found = source.read(source.box)
        weights = np.nan_to_num(found.data[0]).astype(float)
        rows, cols = np.indices(weights.shape) + 0.5
        at = (
            source.box.row0 + (rows * weights).sum() / weights.sum(),
            source.box.col0 + (cols * weights).sum() / weights.sum(),
        )
    assert math.hypot(at[1] - x / 0.6, at[0] + y / 0.6) < 0.25


def test_the_bright_pixel_can_miss(tmp_path):
    """Negative control: an image moved by one pixel is told apart."""
    grid = grids()["feet"]
    data = np.zeros((1, *grid.shape), np.float32)
    data[0, 117, 143] = 100.0
    write_raster(tmp_path / "a.tif", data, grid=grid.crop(0, 3, grid.shape))
    x, y = Transformer.from_crs(grid.crs, UTM, always_xy=True).transform(*grid.xy(143.5, 117.5))
    with open_imagery(tmp_path / "a.tif", LATTICE) as source:
        found = np.nan_to_num(source.read(source.box).data[0])
        at = np.unravel_index(found.argmax(), found.shape)
    assert math.hypot(source.box.col0 + at[1] + 0.5 - x / 0.6, source.box.row0 + at[0] + 0.5 + y / 0.6) > 1


def test_invalid_pixels_stay_out_of_the_resampled_image(tmp_path):
    grid = grids()["finer"]
    valid = np.random.default_rng(5).random(grid.shape) < 0.6
    data = np.where(valid, 90, 255).astype("uint8")[None]
    write_raster(tmp_path / "a.tif", data, grid=grid, valid=valid)
    with open_imagery(tmp_path / "a.tif", LATTICE) as source:
        pixels = source.read(source.box)
    assert pixels.valid.any()
    assert (pixels.data[:, pixels.valid] == 90).all()


# --- the header ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", grids())
def test_the_ground_sampling_distance(images, name):
    info, grid = inspect(images[name]), grids()[name]
    known = {"feet": 0.3048, "rotated": 0.5, "degrees": 6e-6 * 111_100}.get(name, max(grid.gsd))
    assert info.gsd_m == pytest.approx(known, rel=2e-3)
    assert info.band_count == 2
    assert info.dtype == "uint8"
    west, south, east, north = -123.2, 43.8, -122.8, 44.3
    assert west < info.centre_lon_deg < east
    assert south < info.centre_lat_deg < north
    assert info.metric_crs == (grid.crs if name not in {"feet", "degrees"} else UTM)


@pytest.mark.parametrize("crs", ['LOCAL_CS["site",UNIT["metre",1]]', 'LOCAL_CS["site",UNIT["foot",0.3048]]'])
def test_a_crs_without_a_place_on_earth(tmp_path, crs):
    path = tmp_path / "a.tif"
    with rasterio.open(
        path, "w", driver="GTiff", width=9, height=9, count=1, dtype="uint8", crs=crs, transform=Affine(1, 0, 5, 0, -1, 5)
    ) as dataset:
        dataset.write(noise(1, 9, 9))
    with pytest.raises(RasterError, match="CRS") as error:
        inspect(path)
    assert "\n" not in str(error.value)


def test_coordinates_that_are_not_of_the_crs(tmp_path):
    path = tmp_path / "a.tif"
    grid = Grid(crs=CRS.from_epsg(4326), transform=Affine(0.6, 0, 500_000, 0, -0.6, 4_878_000), shape=(9, 9))
    write_raster(path, noise(1, 9, 9), grid=grid)
    with pytest.raises(RasterError, match="assign the right CRS") as error:
        inspect(path)
    assert "\n" not in str(error.value)


def test_a_lattice_that_ends_before_the_image(images):
    antipode = CRS.from_proj4("+proj=ortho +lat_0=-44 +lon_0=57 +datum=WGS84 +units=m")
    with pytest.raises(GridError, match="--crs"), open_imagery(images["degrees"], Lattice(crs=antipode, gsd_m=0.6)):
        pass


# --- real ----------------------------------------------------------------------------------------------------------------


def test_autzen_in_feet(samples):
    """1 ft pixels become 0.6 m ones; the valid area is the photo's, and sub-boxes equal the whole."""
    path = samples / "autzen" / "autzen.jpg"
    info = inspect(path)
    assert info.gsd_m == pytest.approx(0.3048, rel=1e-3)
    assert info.metric_crs.to_epsg() == 32610
    lattice = Lattice(crs=info.metric_crs, gsd_m=0.6)
    with open_imagery(path, lattice) as source:
        box = Box(source.box.row0 - 2, source.box.col0 + 300, source.box.row0 + 598, source.box.col0 + 700)
        whole = source.read(box)
        inner = Box(box.row0 + 77, box.col0 + 31, box.row0 + 400, box.col0 + 350)
    with open_imagery(path, lattice) as source:
        part = source.read(inner)
    rows, cols = inner.slices_in(box)
    np.testing.assert_array_equal(part.data, whole.data[:, rows, cols])
    assert whole.valid[80:].all()
    assert not whole.valid[:2].any()
    assert whole.data.std() > 10


# --- many files: cut apart and put together ------------------------------------------------------------------------------


def cut(folder, data, grid, rows, cols, *, valid=None, **options):
    """Write the parts of an image between the given rows and columns, each as a file with its own rounded transform."""
    folder.mkdir(exist_ok=True)
    for r0, r1 in itertools.pairwise([0, *rows, grid.shape[0]]):
        for c0, c1 in itertools.pairwise([0, *cols, grid.shape[1]]):
            part = (slice(r0, r1), slice(c0, c1))
            write_raster(
                folder / f"r{r0:04d}c{c0:04d}.tif", data[(slice(None), *part)],
                grid=grid.crop(r0, c0, (r1 - r0, c1 - c0)), valid=None if valid is None else valid[part], **options,
            )  # fmt: skip
    return folder


def around(box, margin=5):
    return Box(box.row0 - margin, box.col0 - margin, box.row1 + margin, box.col1 + margin)


def same(one, other):
    np.testing.assert_array_equal(one.valid, other.valid)
    np.testing.assert_array_equal(one.data, other.data)


@pytest.fixture(scope="module")
def holed():
    """Every grid, and one on the lattice, with an image that has a hole and a scatter of invalid pixels."""
    cases = {}
    for name, grid in (grids() | {"on the lattice": LATTICE.grid(lattice_box(270, 310, row=50, col=-60))}).items():
        valid = np.random.default_rng(4).random(grid.shape) > 0.03
        valid[40:70, 55:130] = False
        cases[name] = (noise(2, *grid.shape, seed=8), valid, grid)
    return cases


@pytest.mark.parametrize("name", [*grids(), "on the lattice"])
def test_a_cut_image_is_the_image(tmp_path, holed, name):
    """Bit for bit, on its own pixels and resampled, through holes and across cuts of odd sizes."""
    data, valid, grid = holed[name]
    write_raster(tmp_path / "whole.tif", data, grid=grid, valid=valid)
    folder = cut(tmp_path / "parts", data, grid, (33, 34, 61, 160), (7, 101, 128), valid=valid)
    with open_imagery(tmp_path / "whole.tif", LATTICE) as whole, open_imagery(folder, LATTICE) as parts:
        assert parts.box == whole.box
        assert parts.resampled == whole.resampled
        assert len(parts.sources) == 20
        same(parts.read(around(whole.box)), whole.read(around(whole.box)))


def test_a_part_alone_shows_its_edge(tmp_path, holed):
    """Negative control: at a cut the kernel lacks what lies beyond, so warping parts one by one would not do."""
    data, _, grid = holed["feet"]
    write_raster(tmp_path / "whole.tif", data, grid=grid)
    folder = cut(tmp_path / "parts", data, grid, (), (200,))
    with open_imagery(tmp_path / "whole.tif", LATTICE) as whole, open_imagery(folder / "r0000c0000.tif", LATTICE) as part:
        there, wanted = part.read(part.box), whole.read(part.box)
    assert (there.data != wanted.data)[:, there.valid].any()


def test_parts_that_are_not_of_one_grid_meet_without_a_gap(tmp_path, holed):
    """A part moved by a third of a pixel is warped apart: still every pixel between the two is there."""
    data, _, grid = holed["feet"]
    folder = cut(tmp_path / "parts", data, grid, (), (200,))
    moved = grid.crop(0, 200, (500, 400))
    write_raster(
        folder / "r0000c0200.tif", data[:, :, 200:],
        grid=Grid(crs=moved.crs, transform=moved.transform @ Affine.translation(-0.3, 0), shape=moved.shape),
    )  # fmt: skip
    write_raster(tmp_path / "whole.tif", data, grid=grid)
    with open_imagery(tmp_path / "whole.tif", LATTICE) as whole, open_imagery(folder, LATTICE) as parts:
        one, other = whole.read(whole.box), parts.read(whole.box)
    inside = np.zeros_like(one.valid)
    inside[3:-3, 3:-3] = one.valid[3:-3, 3:-3]
    assert other.valid[:, :300][one.valid[:, :300]].all()
    assert (one.data != other.data)[:, inside].any()


def test_pixel_sizes_with_the_noise_of_a_division_are_one_grid(tmp_path):
    """(right - left) / columns is 0.19999999999963 where 0.2 was meant."""
    grid = Grid(crs=UTM, transform=Affine(0.2, 0, 500_000.1, 0, -0.2, 4_878_000), shape=(100, 100))
    data = noise(1, 100, 100)
    write_raster(tmp_path / "whole.tif", data, grid=grid)
    folder = cut(tmp_path / "parts", data, grid, (), (41,))
    noisy = Affine(0.2 - 4e-13, 0, 500_000.1, 0, -0.2 - 3e-12, 4_878_000)
    write_raster(folder / "r0000c0000.tif", data[:, :, :41], grid=Grid(crs=UTM, transform=noisy, shape=(100, 41)))
    with open_imagery(tmp_path / "whole.tif", LATTICE) as whole, open_imagery(folder, LATTICE) as parts:
        same(parts.read(whole.box), whole.read(whole.box))


def test_the_pixel_grid_moves_no_image(images):
    """What is rounded to tell one grid from another stays a millionth of a pixel."""
    for name, grid in grids().items():
        (file,) = inspect(images[name]).files
        rows, cols = grid.shape
        corners = [(0, 0), (cols, 0), (0, rows), (cols, rows)]
        moved = [np.subtract(grid.pixel(*file.grid.xy(*corner)), corner) for corner in corners]
        assert np.abs(moved).max() < 1e-6, name


# --- many files: which one gives a pixel ---------------------------------------------------------------------------------


def days(text):
    return (np.datetime64(text) - np.datetime64("1970-01-01")).astype(int)


@st.composite
def piles(draw):
    """Files on the lattice that overlap, each of one value, with or without a date, some with a hole."""
    count = draw(st.integers(1, 6))
    dates = st.sampled_from(["", "1969-07-20", "2019-05-01", "2021-08-09"])
    corners = st.tuples(st.integers(0, 25), st.integers(0, 25), st.integers(1, 20), st.integers(1, 20))
    return [(draw(corners), draw(dates), draw(st.booleans())) for _ in range(count)]


@settings(max_examples=15)
@given(pile=piles())
def test_the_newest_then_the_first_by_name(tmp_path_factory, pile):
    folder = tmp_path_factory.mktemp("pile")
    seen, day_of = [], {}
    for number, ((row, col, rows, cols), day, hole) in enumerate(pile, start=1):
        valid = np.ones((rows, cols), bool)
        valid[rows // 3 : 2 * rows // 3, cols // 4 :] = not hole
        write_raster(
            folder / f"{number}.tif", np.full((1, rows, cols), number, "uint8"), valid=valid,
            grid=LATTICE.grid(lattice_box(rows, cols, row=row, col=col)),
            tags={"ACQUISITION_DATE": day} if day else {"TIFFTAG_DATETIME": "2024:01:01 00:00:00"},
        )  # fmt: skip
        full = np.zeros((50, 50), bool)
        full[row : row + rows, col : col + cols] = valid
        day_of[number] = days(day) if day else imagery.NO_DATE
        seen.append((number, full))
    wanted, wanted_days = np.zeros((50, 50), "uint8"), np.full((50, 50), imagery.NO_DATE)
    for number, full in sorted(seen, key=lambda file: (day_of[file[0]], -file[0])):  # the preferred last, over the others
        wanted[full], wanted_days[full] = number, day_of[number]
    box = lattice_box(50, 50)
    with open_imagery(folder, LATTICE) as source:
        pixels = source.read(box)
        np.testing.assert_array_equal(pixels.data[0], wanted)
        np.testing.assert_array_equal(pixels.valid, wanted > 0)
        np.testing.assert_array_equal(source.days(box), wanted_days)
        part = lattice_box(13, 9, row=11, col=5)
        np.testing.assert_array_equal(source.days(part), wanted_days[11:24, 5:14])
        assert source.days(part).dtype == np.int32


PILE = {"finer": "2001-01-01", "shifted": "2010-06-06", "rotated": "2020-02-02", "feet": "", "other zone": "2015-05-05"}


@pytest.fixture(scope="module")
def mixed(tmp_path_factory):
    """Five images of one place in three CRSs and four pixel sizes, with dates, and the same two cut into parts."""
    folder = tmp_path_factory.mktemp("mixed")
    for seed, (name, day) in enumerate(PILE.items()):
        grid = grids()[name]
        valid = np.random.default_rng(seed).random(grid.shape) > 0.02
        tags = {"ACQUISITION_DATE": day} if day else {}
        write_raster(folder / f"{name}.tif", noise(2, *grid.shape, seed=seed), grid=grid, valid=valid, tags=tags)
    return folder


def test_the_finest_then_the_newest_across_crss(mixed, all_of_mixed):
    """Against the files read one by one and laid over each other."""
    alone = {}
    box, pile, found_days = all_of_mixed
    for name in PILE:
        with open_imagery(mixed / f"{name}.tif", LATTICE) as source:
            alone[name] = source.read(box)
    data, valid, when = np.zeros_like(pile.data), np.zeros_like(pile.valid), np.full(box.shape, imagery.NO_DATE)
    order = ["feet", "finer", "rotated", "other zone", "shifted"]  # 0.3048, 0.31, 0.5, and 0.6 m twice: 2015 and 2010
    assert [file.path.stem for file in inspect(mixed).files] == order
    for name in reversed(order):
        data[:, alone[name].valid] = alone[name].data[:, alone[name].valid]
        valid |= alone[name].valid
        when[alone[name].valid] = days(PILE[name]) if PILE[name] else imagery.NO_DATE
    np.testing.assert_array_equal(pile.valid, valid)
    np.testing.assert_array_equal(pile.data, data)
    np.testing.assert_array_equal(found_days, when)


def test_a_foot_is_no_coarser_than_thirty_centimetres(tmp_path):
    """To two significant digits they are the same, and the date decides."""
    for name, gsd, day in (("a", 0.3, "2010-01-01"), ("b", 0.3048, "2020-01-01"), ("c", 0.32, "2024-01-01")):
        grid = Grid(crs=UTM, transform=Affine(gsd, 0, 5e5, 0, -gsd, 5e6), shape=(9, 9))
        write_raster(tmp_path / f"{name}.tif", noise(1, 9, 9), grid=grid, tags={"ACQUISITION_DATE": day})
    assert [file.path.stem for file in inspect(tmp_path).files] == ["b", "a", "c"]


@pytest.fixture(scope="module")
def all_of_mixed(mixed):
    with open_imagery(mixed, LATTICE) as source:
        outer = around(source.box)
        return outer, source.read(outer), source.days(outer)


@settings(max_examples=3)
@given(data=st.data())
def test_any_box_of_many_files_holds_the_same_pixels(mixed, all_of_mixed, data):
    outer, whole, whole_days = all_of_mixed
    row, col = data.draw(st.integers(outer.row0, outer.row1 - 1)), data.draw(st.integers(outer.col0, outer.col1 - 1))
    part = Box(row, col, data.draw(st.integers(row + 1, outer.row1)), data.draw(st.integers(col + 1, outer.col1)))
    with open_imagery(mixed, LATTICE) as source:
        if data.draw(st.booleans()):
            found_days = source.days(part)
            pixels = source.read(part)
        else:
            pixels = source.read(part)
            found_days = source.days(part)
    rows, cols = part.slices_in(outer)
    np.testing.assert_array_equal(pixels.data, whole.data[:, rows, cols])
    np.testing.assert_array_equal(pixels.valid, whole.valid[rows, cols])
    np.testing.assert_array_equal(found_days, whole_days[rows, cols])


def test_a_neighbour_changes_nothing_but_what_it_is_preferred_for(tmp_path, mixed):
    few = [mixed / "finer.tif", mixed / "shifted.tif"]
    with open_imagery(few, LATTICE) as source, open_imagery(mixed, LATTICE) as more:
        box = more.box
        before, after = source.read(box), more.read(box)
        from_these = np.isin(more.days(box), [days(PILE["finer"]), days(PILE["shifted"])])
    np.testing.assert_array_equal(after.data[:, from_these], before.data[:, from_these])
    assert from_these.any()
    assert not from_these[after.valid].all()


def test_owners_of_a_warped_pile_of_one_grid(tmp_path, holed):
    """Two dates on one pixel grid: the day of a resampled pixel is that of the file nearest to it, also beside holes."""
    data, valid, grid = holed["shifted"]
    cut(tmp_path / "parts", data, grid, (), (140,), valid=valid)
    for path, day in zip(sorted((tmp_path / "parts").iterdir()), ["2018-01-01", "2019-01-01"], strict=True):
        with rasterio.open(path, "r+") as dataset:
            dataset.update_tags(ACQUISITION_DATE=day)
    with open_imagery(tmp_path / "parts", LATTICE) as source:
        box = source.box
        found, usable = source.days(box), source.read(box).valid
    x, _ = LATTICE.grid(box).xy(np.arange(box.shape[1]) + 0.5, 0.5)
    column = np.floor(grid.pixel(x, 0)[0]) + 0 * usable
    np.testing.assert_array_equal(found == imagery.NO_DATE, ~usable)
    crowded = np.abs(column - 139.5) < 2  # beside a hole that reaches the cut the other file may be the nearest
    for day, side in (("2018-01-01", column < 140), ("2019-01-01", column >= 140)):
        assert (found[usable & side & ~crowded] == days(day)).all()
        assert (found[usable & side & crowded] == days(day)).mean() > 0.9


@pytest.mark.parametrize(
    ("domain", "tags", "day"),
    [
        ("IMAGERY", {"ACQUISITIONDATETIME": "2017-03-04 10:11:12"}, "2017-03-04"),
        (None, {"ACQUISITION_DATE": "2020-06-18"}, "2020-06-18"),
        (None, {"EXIF_DateTimeOriginal": "2019:06:12 10:11:12"}, "2019-06-12"),
        (None, {"EXIF_DateTimeOriginal": "0000:00:00 00:00:00"}, None),
        (None, {"TIFFTAG_DATETIME": "2019:06:12 10:11:12"}, None),
        (None, {}, None),
    ],
)
def test_the_day_an_image_was_taken(tmp_path, domain, tags, day):
    write_raster(tmp_path / "a.tif", noise(1, 9, 9), grid=LATTICE.grid(lattice_box(9, 9)))
    with rasterio.open(tmp_path / "a.tif", "r+") as dataset:
        dataset.update_tags(**({"ns": domain} if domain else {}), **tags)
    assert inspect(tmp_path / "a.tif").files[0].day == (days(day) if day else imagery.NO_DATE)


# --- many files: which files ---------------------------------------------------------------------------------------------


@pytest.fixture
def tiles(tmp_path):
    return cut(tmp_path / "tiles", noise(3, 40, 40), LATTICE.grid(lattice_box(40, 40)), (20,), (20,))


def test_what_lies_beside_the_images_is_left_out(tiles):
    for name in [
        ".DS_Store",
        "._r0000c0000.tif",
        "notes.txt",
        "r0000c0000.tif.aux.xml",
        "r0000c0000.tfw",
        "a.tif.ovr",
        "a.vrt",
    ]:
        (tiles / name).write_text("not an image")
    (tiles / "more.tif").mkdir()
    info = inspect(tiles)
    assert [file.path.name for file in info.files] == [f"r{r}c{c}.tif" for r in ("0000", "0020") for c in ("0000", "0020")]
    assert info.left_out == (".DS_Store", ".aux.xml", ".ovr", ".tfw", ".tif", ".txt", ".vrt")
    assert info.source == str(tiles)


def test_a_folder_a_pattern_and_a_list_are_the_same(tiles):
    paths = sorted(tiles.glob("*.tif"))
    deeper = tiles / "deeper"
    deeper.mkdir()
    paths[3].rename(deeper / paths[3].name)
    names = [*map(str, paths[:3]), str(deeper)]
    for source in (
        names,
        names[::-1],
        [*names, paths[0]],
        str(tiles / "**" / "*.tif"),
        tiles / "**" / "r*",
        [tiles, deeper],
    ):
        with open_imagery(source, LATTICE) as opened:
            assert opened.sources == (*names[:3], str(deeper / paths[3].name))
            same(opened.read(opened.box), Pixels(data=noise(3, 40, 40), valid=np.ones((40, 40), bool)))


def test_a_vrt_is_opened_by_its_name(tiles):
    """And a pattern that spells its ending out is a name."""
    (tiles / "two.vrt").write_text(
        f'<VRTDataset rasterXSize="40" rasterYSize="20"><SRS>EPSG:32610</SRS>'
        f"<GeoTransform>{ORIGIN[1] * 0.6}, 0.6, 0, {-ORIGIN[0] * 0.6}, 0, -0.6</GeoTransform>"
        + "".join(
            f'<VRTRasterBand dataType="Byte" band="{b}"><SimpleSource><SourceFilename relativeToVRT="1">r0000c{c:04d}.tif'
            f'</SourceFilename><SourceBand>{b}</SourceBand><SrcRect xOff="0" yOff="0" xSize="20" ySize="20"/>'
            f'<DstRect xOff="{c}" yOff="0" xSize="20" ySize="20"/></SimpleSource></VRTRasterBand>'
            for b, c in ((1, 0), (2, 20))
        )
        + "</VRTDataset>"
    )
    for source in (tiles / "two.vrt", str(tiles / "*.vrt"), [tiles / "two.vrt"]):
        with open_imagery(source, LATTICE) as opened:
            assert len(opened.sources) == 1
            assert opened.box == lattice_box(20, 40)
            data = opened.read(opened.box).data
        np.testing.assert_array_equal(data[0, :, :20], noise(3, 40, 40)[0, :20, :20])
        np.testing.assert_array_equal(data[1, :, 20:], noise(3, 40, 40)[1, :20, 20:])


def spoilt(tiles, what):
    victim = tiles / "r0020c0000.tif"
    match what:
        case "empty":
            victim.write_bytes(b"")
        case "header cut":
            victim.write_bytes(victim.read_bytes()[:100])
        case "cut":
            write_raster(victim, noise(3, 600, 600), grid=LATTICE.grid(lattice_box(600, 600)))
            victim.write_bytes(victim.read_bytes()[:-50_000])
        case "text":
            victim.write_text("not an image")
        case "type":
            write_raster(victim, noise(3, 20, 20, dtype="uint16"), grid=LATTICE.grid(lattice_box(20, 20)))
        case "bands":
            write_raster(victim, noise(2, 20, 20), grid=LATTICE.grid(lattice_box(20, 20)))
        case "no place":
            write_raster(
                victim, noise(3, 20, 20), grid=Grid(crs=UTM, transform=Affine(1, 0, 1e9, 0, -1, 1e9), shape=(20, 20))
            )
        case "palette":
            with rasterio.open(
                victim, "w", driver="GTiff", width=9, height=9, count=1, dtype="uint8", crs=UTM.to_wkt(),
                transform=Affine(1, 0, 5e5, 0, -1, 5e6), photometric="palette",
            ) as dataset:  # fmt: skip
                dataset.write(noise(1, 9, 9))
                dataset.write_colormap(1, {i: (i, 0, 0, 255) for i in range(256)})
        case "date":
            with rasterio.open(victim, "r+") as dataset:
                dataset.update_tags(ACQUISITION_DATE="last summer")
    return victim


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("empty", "0 bytes"), ("header cut", "cannot be read"), ("cut", "cut short"), ("text", "cannot be read"),
        ("type", "uint16"), ("bands", "2 bands"), ("no place", "assign the right CRS"), ("palette", "expand it first"),
        ("date", "2020-06-18"),
    ],
)  # fmt: skip
def test_one_bad_file_among_many_is_named(tiles, what, message):
    victim = spoilt(tiles, what)
    with pytest.raises(RasterError, match=message) as error, open_imagery(tiles, LATTICE):
        pass
    assert str(victim) in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("make", ["folder", "pattern", "list", "vrts", "missing"])
def test_no_file_at_all(tmp_path, make):
    (tmp_path / "a.vrt").write_text("<VRTDataset/>")
    source, message = {
        "folder": (tmp_path / "empty", "holds no image"),
        "pattern": (str(tmp_path / "*.tif"), "check the pattern"),
        "list": ([], "name at least one"),
        "vrts": (tmp_path, r"only \.vrt"),
        "missing": (tmp_path / "a.tif", "does not exist"),
    }[make]
    if make == "folder":
        source.mkdir()
    with pytest.raises(RasterError, match=message) as error:
        inspect(source)
    assert "\n" not in str(error.value)


def test_many_files_are_opened_once_for_their_headers_and_then_only_where_they_are_read(tmp_path, monkeypatch):
    """2,025 tiles of 32 px: 45 x 45."""
    side, count = 32, 45
    Image.fromarray(np.moveaxis(noise(3, side, side), 0, -1)).save(tmp_path / "first.png")
    png, prj = (tmp_path / "first.png").read_bytes(), UTM.to_wkt("WKT1_ESRI")
    folder = tmp_path / "tiles"
    folder.mkdir()
    for row, col in itertools.product(range(count), repeat=2):
        x, y = LATTICE.grid(lattice_box(1, 1, row=row * side, col=col * side)).xy(0.5, 0.5)
        stem = folder / f"{row:02d}_{col:02d}"
        stem.with_suffix(".png").write_bytes(png)
        stem.with_suffix(".pgw").write_text(f"0.6\n0\n0\n-0.6\n{x!r}\n{y!r}\n")
        stem.with_suffix(".prj").write_text(prj)
    opened, held = [], []
    really_open, really_close = raster._open, raster.Raster.close
    monkeypatch.setattr(raster, "_open", lambda path: (opened.append(path), held.append(path), really_open(path))[-1])
    monkeypatch.setattr(raster.Raster, "close", lambda self: (held.remove(self.path), really_close(self))[-1])
    files = ImageFiles(folder)
    assert len(opened) == len(set(opened)) == count**2
    opened.clear()
    held.clear()
    with files.open(LATTICE) as source:
        assert source.box == lattice_box(side * count, side * count)
        assert not opened
        pixels = source.read(lattice_box(20, 40, row=100, col=130))
        assert len(opened) == 2  # rows 100-119 lie in tile row 3, columns 130-169 in tile columns 4 and 5
        np.testing.assert_array_equal(pixels.data, np.tile(noise(3, side, side), (2, 2))[:, 4:24, 2:42])
        most = 0
        for row in range(0, 5 * side, side):
            source.read(lattice_box(side, side * count, row=row))
            most = max(most, len(held))
        assert most == imagery.OPEN_FILES
        assert len(opened) == 2 + 5 * count, "read in order, a file is opened once"
    assert not held


# --- sidecars, bit depths and bands --------------------------------------------------------------------------------------


def write_worldfile(path):
    x, y = LATTICE.grid(lattice_box(1, 1)).xy(0.5, 0.5)
    path.write_text(f"0.6\n0\n0\n-0.6\n{x!r}\n{y!r}\n")


PAM = f"""<PAMDataset><SRS>{UTM.to_wkt("WKT1_GDAL").replace('"', "&quot;")}</SRS>
<GeoTransform>{ORIGIN[1] * 0.6}, 0.6, 0, {-ORIGIN[0] * 0.6}, 0, -0.6</GeoTransform></PAMDataset>"""


@pytest.mark.parametrize("world", ["a.{0}w", "a.wld", "aux"])
@pytest.mark.parametrize("suffix", ["jpg", "png"])
@pytest.mark.parametrize("crs", ["WKT1_ESRI", "WKT1_GDAL", "WKT2_2019"])
def test_images_with_sidecars(tmp_path, suffix, world, crs):
    path = tmp_path / f"a.{suffix}"
    Image.fromarray(np.moveaxis(noise(3, 30, 40), 0, -1)).save(path)
    if world == "aux":
        (tmp_path / f"a.{suffix}.aux.xml").write_text(PAM)
    else:
        write_worldfile(tmp_path / world.format(suffix[0] + suffix[-1]))
        path.with_suffix(".prj").write_text(UTM.to_wkt(crs))
    for source in (path, tmp_path):
        with open_imagery(source, LATTICE) as opened:
            assert opened.resampled == "none", "the CRS of a .prj is not taken for that of the lattice"
            assert opened.box == lattice_box(30, 40)
            assert opened.read(opened.box).valid.all()
            if suffix == "png":
                np.testing.assert_array_equal(opened.read(opened.box).data, noise(3, 30, 40))


def test_a_sidecar_that_holds_no_crs(tmp_path):
    Image.fromarray(np.moveaxis(noise(3, 30, 40), 0, -1)).save(tmp_path / "a.png")
    write_worldfile(tmp_path / "a.pgw")
    with pytest.raises(RasterError, match=r"\.prj file beside it"):
        inspect(tmp_path)
    (tmp_path / "a.prj").write_text("UTM zone 10")
    with pytest.raises(RasterError, match="no CRS that PROJ can read") as error:
        inspect(tmp_path)
    assert str(tmp_path / "a.prj") in str(error.value)


@pytest.mark.parametrize("driver", ["PNG", "GTiff"])
def test_sixteen_bits(tmp_path, driver):
    data = np.random.default_rng(3).integers(0, 65536, (3, 30, 40)).astype("uint16")
    path = tmp_path / ("a.png" if driver == "PNG" else "a.tif")
    box = lattice_box(30, 40)
    with rasterio.open(
        path, "w", driver=driver, width=40, height=30, count=3, dtype="uint16", crs=UTM.to_wkt(),
        transform=LATTICE.grid(box).transform,
    ) as dataset:  # fmt: skip
        dataset.write(data)
    with open_imagery(tmp_path, LATTICE) as source:
        assert source.dtype == "uint16"
        same(source.read(box), Pixels(data=data, valid=np.ones(box.shape, bool)))


def tagged_alpha(path, data, *, mask=None, grid=None, **tags):
    """A GeoTIFF whose last band is tagged alpha, by rasterio alone."""
    count, rows, cols = data.shape
    grid = grid or LATTICE.grid(lattice_box(rows, cols))
    with rasterio.Env(GDAL_TIFF_INTERNAL_MASK="YES"), rasterio.open(
        path, "w", driver="GTiff", width=cols, height=rows, count=count, dtype=data.dtype.name, crs=grid.crs.to_wkt(),
        transform=grid.transform, photometric="rgb", ALPHA="YES",
    ) as dataset:  # fmt: skip
        dataset.write(data)
        dataset.update_tags(**tags)
        dataset.colorinterp = [*dataset.colorinterp[:-1], ColorInterp.alpha]
        if mask is not None:
            dataset.write_mask(mask)
    return path


def alphas(rows=80, cols=90, dtype="uint8"):
    """What a fourth band may hold, and what it then is."""
    rng = np.random.default_rng(6)
    top = np.iinfo(dtype).max
    hole = np.full((rows, cols), top)
    hole[20:50, 10:40] = 0
    soft = hole.copy()
    soft[18:20] = rng.integers(1, top, (2, cols))
    nir = rng.integers(0, top, (rows, cols))
    nir[30:40] = 0  # water
    return {
        "opaque": (np.full_like(hole, top), "mask"), "hole": (hole, "mask"), "soft edge": (soft, "mask"),
        "ones": (hole // top, "mask"), "translucent": (np.full_like(hole, top // 2), "mask"),
        "nothing": (0 * hole, "mask"), "near infrared": (nir, "data"), "dim near infrared": (nir // 5, "data"),
    }  # fmt: skip


@pytest.mark.parametrize("dtype", ["uint8", "uint16"])
@pytest.mark.parametrize("name", alphas())
def test_alpha_is_judged_by_what_it_holds(tmp_path, name, dtype):
    band, kind = alphas(dtype=dtype)[name]
    data = np.concatenate([noise(3, *band.shape, dtype=dtype), band[None].astype(dtype)])
    path = tagged_alpha(tmp_path / "a.tif", data)
    info = inspect(path)
    assert info.alpha == kind
    assert str(path) in info.alpha_reason
    assert info.band_count == (4 if kind == "data" else 3)
    box = lattice_box(*band.shape)
    everywhere = np.ones(band.shape, bool)
    usable = band > 0 if kind == "mask" else everywhere
    with open_imagery(path, LATTICE) as source:
        same(source.read(box), Pixels(data=data[: info.band_count] * usable, valid=usable))
    with open_imagery(path, LATTICE, (1, 2)) as source:
        same(source.read(box), Pixels(data=data[:2] * usable, valid=usable))
    with open_imagery(path, LATTICE, (4, 1)) as source:  # asked for, it is data whatever it looks like
        same(source.read(box), Pixels(data=data[[3, 0]], valid=everywhere))


def test_no_alpha_is_said(tmp_path):
    write_raster(tmp_path / "a.tif", noise(4, 20, 20), grid=LATTICE.grid(lattice_box(20, 20)))
    info = inspect(tmp_path / "a.tif")
    assert (info.alpha, info.band_count) == ("none", 4)


def test_an_internal_mask_counts_beside_near_infrared(tmp_path):
    nir, _ = alphas()["near infrared"]
    data = np.concatenate([noise(3, *nir.shape), nir[None].astype("uint8")])
    mask = np.random.default_rng(1).random(nir.shape) < 0.8
    path = tagged_alpha(tmp_path / "a.tif", data, mask=mask)
    assert inspect(path).alpha == "data"
    for bands in (None, (1, 2, 3), (4,)):
        with open_imagery(path, LATTICE, bands) as source:
            np.testing.assert_array_equal(source.read(source.box).valid, mask)


def test_a_mask_in_a_file_of_its_own_counts(tmp_path):
    """GDAL writes NAME.tif.msk when it is not told to keep the mask inside; a folder does not list it as an image."""
    box = lattice_box(30, 40)
    mask = np.random.default_rng(1).random(box.shape) < 0.8
    with rasterio.Env(GDAL_TIFF_INTERNAL_MASK="NO"), rasterio.open(
        tmp_path / "a.tif", "w", driver="GTiff", width=40, height=30, count=3, dtype="uint8", crs=UTM.to_wkt(),
        transform=LATTICE.grid(box).transform,
    ) as dataset:  # fmt: skip
        dataset.write(noise(3, 30, 40))
        dataset.write_mask(mask)
    assert (tmp_path / "a.tif.msk").exists()
    with open_imagery(tmp_path, LATTICE) as source:
        same(source.read(box), Pixels(data=noise(3, 30, 40) * mask, valid=mask))


def test_near_infrared_has_no_weight_when_warped(tmp_path):
    """Each band of the warped four is what it is when warped alone; where near infrared is 0 the others stay."""
    nir, _ = alphas(300, 280)["near infrared"]
    data = np.concatenate([noise(3, *nir.shape), nir[None].astype("uint8")])
    path = tagged_alpha(tmp_path / "a.tif", data, grid=grids()["shifted"])
    write_raster(tmp_path / "plain.tif", data[:3], grid=grids()["shifted"])
    with open_imagery(path, LATTICE) as four, open_imagery(tmp_path / "plain.tif", LATTICE) as three:
        found, wanted = four.read(four.box), three.read(three.box)
        np.testing.assert_array_equal(found.data[:3], wanted.data)
        np.testing.assert_array_equal(found.valid, wanted.valid)
    for band in range(1, 5):
        with open_imagery(path, LATTICE, (band,)) as one:
            np.testing.assert_array_equal(one.read(one.box).data[0], found.data[band - 1])


def test_files_that_disagree_about_alpha_are_refused(tmp_path):
    for name in ("hole", "near infrared"):
        band = alphas()[name][0]
        tagged_alpha(tmp_path / f"{name}.tif", np.concatenate([noise(3, *band.shape), band[None].astype("uint8")]))
    with pytest.raises(RasterError, match="undefined") as error:
        inspect(tmp_path)
    assert "hole.tif" in str(error.value)
    assert "\n" not in str(error.value)
    band = alphas()["opaque"][0]  # which says nothing, and follows the other
    tagged_alpha(tmp_path / "hole.tif", np.concatenate([noise(3, *band.shape), band[None].astype("uint8")]))
    assert inspect(tmp_path).alpha == "data"


def test_bands_by_name(tmp_path):
    data, box = noise(4, 20, 20), lattice_box(20, 20)
    names = ["Red", "green", "blue", "nir"]
    write_raster(tmp_path / "a.tif", data, grid=LATTICE.grid(box), band_names=names)
    with open_imagery(tmp_path / "a.tif", LATTICE, ("nir", "red", 2)) as source:
        assert source.bands == ("nir", "red", 2)
        np.testing.assert_array_equal(source.read(box).data, data[[3, 0, 1]])
    # In another order in the next file: the name counts, not the place.
    other = lattice_box(20, 20, col=20)
    write_raster(tmp_path / "b.tif", data[::-1], grid=LATTICE.grid(other), band_names=names[::-1])
    with open_imagery(tmp_path, LATTICE, ("nir", "red")) as source:
        np.testing.assert_array_equal(source.read(other).data, data[[3, 0]])
    with pytest.raises(RasterError, match=r"'swir', only Red, green, blue, nir; .*--bands") as error:
        open_imagery(tmp_path, LATTICE, ("red", "swir")).__enter__()
    assert "\n" not in str(error.value)
    write_raster(tmp_path / "b.tif", data, grid=LATTICE.grid(other))
    with pytest.raises(RasterError, match=r"b\.tif has no band 'red', its bands have no names"):
        open_imagery(tmp_path, LATTICE, ("red",)).__enter__()


# --- real: many files ----------------------------------------------------------------------------------------------------


def test_near_infrared_that_its_writer_tagged_as_alpha(samples):
    paths = sorted((samples / "pairs" / "FR_IGN_URBAN").glob("*rgbn_rgb.tif"))
    info = inspect(paths)
    assert len(paths) == 2
    assert (info.alpha, info.band_count) == ("data", 4)
    lattice = Lattice(crs=info.crs, gsd_m=0.5)
    with open_imagery(paths[0], lattice) as four, open_imagery(paths[0], lattice, (1, 2, 3)) as three:
        pixels = four.read(four.box)
        assert pixels.valid.all()
        np.testing.assert_array_equal(three.read(four.box).data, pixels.data[:3])
    with rasterio.open(paths[0]) as dataset:
        np.testing.assert_array_equal(dataset.read(), pixels.data)


@pytest.mark.slow
def test_autzen_cut_into_tiles_of_two_crss(samples, tmp_path):
    """Tiles in feet are the photo to the last bit; those carried to UTM first differ as much as resampling twice does."""
    with open_raster(samples / "autzen" / "autzen.jpg") as photo:
        data, grid = photo.read(2000, 1000, (400, 450)).data, photo.grid.crop(2000, 1000, (400, 450))
    write_raster(tmp_path / "whole.tif", data, grid=grid)
    folder = cut(tmp_path / "tiles", data, grid, (131, 277), (97, 250))
    lattice = Lattice(crs=UTM, gsd_m=0.6)
    with open_imagery(tmp_path / "whole.tif", lattice) as whole, open_imagery(folder, lattice) as parts:
        box = whole.box
        wanted = whole.read(box)
        same(parts.read(box), wanted)
    east = sorted(folder.glob("*c0250.tif"))
    fine = Lattice(crs=UTM, gsd_m=0.3)
    with open_imagery(tmp_path / "whole.tif", fine) as whole:
        for path in east:  # with an overlap, or the pixels of the two CRSs would leave gaps of parts of a pixel
            with open_imagery(path, fine) as source:
                where = around(source.box, 2)
            pixels = whole.read(where)
            write_raster(path, pixels.data, grid=fine.grid(where), valid=pixels.valid)
    with open_imagery(folder, lattice) as parts:
        found = parts.read(box)
        assert len({file.pixel_grid for file in inspect(folder).files}) == 2
    xy = lattice.grid(box).xy(*(np.stack(np.meshgrid(np.arange(box.shape[1]), np.arange(box.shape[0]))) + 0.5))
    column, row = grid.pixel(*Transformer.from_crs(UTM, grid.crs, always_xy=True).transform(*xy))
    inside = (np.minimum(row, 400 - row) > 3) & (np.minimum(column, 450 - column) > 3)
    assert found.valid[inside].all(), "pixels are lost where files of two CRSs meet"
    west = wanted.valid & (column < 243)
    np.testing.assert_array_equal(found.data[:, west], wanted.data[:, west])
    east = wanted.valid & found.valid & (column > 257)
    differences = found.data[:, east].astype(float) - wanted.data[:, east]
    assert 0 < np.sqrt((differences**2).mean()) < 6

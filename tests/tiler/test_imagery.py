"""Local images on the lattice: untouched where they fit, and otherwise one resampling that no reader can influence."""

import math

import numpy as np
import pytest
import rasterio
import shapely
from affine import Affine
from hypothesis import given, settings
from hypothesis import strategies as st
from pyproj import CRS, Transformer

from canopy.errors import GridError, RasterError
from canopy.grid import Box, Grid, Lattice
from canopy.raster import write_raster
from canopy.tiler import imagery
from canopy.tiler.imagery import inspect, open_imagery

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

"""`map_region` on a small image with a model of random weights: which pixels come out, and what decides them."""

import dataclasses
import itertools
import json
import math
import shutil
from datetime import UTC, datetime

import geopandas
import numpy as np
import pytest
import rasterio
import shapely
from hypothesis import given, settings
from hypothesis import strategies as st
from pyproj import CRS, Transformer

from canopy.errors import AreaError, CanopyError, ContractError, OutputError
from canopy.grid import Box, Grid, Lattice
from canopy.model.package import load_model
from canopy.mosaicker import ensemble
from canopy.mosaicker.publish import stage_sheet
from canopy.raster import open_raster, read_raster, write_raster
from canopy.region import map_region, sheet
from canopy.tiler.area import area_mask
from canopy.tiler.imagery import open_imagery
from canopy.tiler.manifest import AssetRecord, ItemRecord, Manifest, SearchRecord
from canopy.tiler.sources import Band as StacBand
from canopy.tiler.sources import StacSource
from tests.plain_models import Plain

UTM = CRS.from_epsg(32610)
LATTICE = Lattice(crs=UTM, gsd_m=0.6)
BOX = Box(-8_130_100, 833_310, -8_130_100 + 170, 833_310 + 200)


def photo(path, grid, *, valid=None, seed=0):
    rng = np.random.default_rng(seed)
    write_raster(path, rng.integers(0, 256, (3, *grid.shape), dtype=np.uint8), grid=grid, valid=valid)
    return path


@pytest.fixture(scope="module")
def image(tmp_path_factory):
    """170 x 200 px on the lattice, across borders of windows, with a few pixels of no data and a whole corner."""
    valid = np.random.default_rng(2).random(BOX.shape) > 0.01
    valid[:70, :75] = False
    return photo(tmp_path_factory.mktemp("image") / "photo.tif", LATTICE.grid(BOX), valid=valid)


@pytest.fixture(scope="module")
def whole(image, tiny_model, tmp_path_factory):
    return map_region(imagery=image, model=tiny_model, out=tmp_path_factory.mktemp("whole") / "out")


def bands(result):
    """(band, row, col): height, half-width, lower, upper; and the box."""
    height, grid = read_raster(result.height)
    error, other = read_raster(result.error)
    assert grid == other
    return np.concatenate([height.data, error.data]), Lattice(crs=grid.crs, gsd_m=grid.gsd[0]).box_of(grid)


def square(box):
    left, bottom, right, top = LATTICE.grid(box).bounds
    return shapely.box(left, bottom, right, top)


INNER = Box(BOX.row0 + 31, BOX.col0 + 90, BOX.row0 + 131, BOX.col0 + 177)


def area_file(path, polygons, crs=UTM):
    frame = geopandas.GeoDataFrame({"name": ["a"] * len(polygons)}, geometry=polygons, crs=UTM).to_crs(crs)
    if path.suffix == ".parquet":
        frame.to_parquet(path)
    else:
        frame.to_file(path)
    return path


# --- which pixels --------------------------------------------------------------------------------------------------------


def test_every_valid_pixel_of_the_image_is_mapped(image, whole):
    found, box = bands(whole)
    assert box == BOX
    np.testing.assert_array_equal(np.isfinite(found), np.broadcast_to(read_raster(image)[0].valid, found.shape))


@pytest.mark.parametrize("shape", [(3, 3), (64, 64), (1, 150), (97, 65)])
def test_every_pixel_up_to_all_edges(tmp_path, tiny_model, shape):
    box = Box(BOX.row0, BOX.col0, BOX.row0 + shape[0], BOX.col0 + shape[1])
    result = map_region(imagery=photo(tmp_path / "a.tif", LATTICE.grid(box)), model=tiny_model, out=tmp_path / "out")
    found, where = bands(result)
    assert where == box
    assert np.isfinite(found).all()


def test_a_resampled_image_is_mapped_to_its_edges(tmp_path, tiny_model):
    feet = CRS.from_epsg(2994)
    x, y = Transformer.from_crs(UTM, feet, always_xy=True).transform(*LATTICE.grid(BOX).bounds[:2])
    grid = Grid(crs=feet, transform=rasterio.Affine(1.5, 0, x, 0, -1.5, y), shape=(160, 150))
    path = photo(tmp_path / "a.tif", grid)
    result = map_region(imagery=path, model=tiny_model, out=tmp_path / "out", gsd_m=0.6)
    found, box = bands(result)
    with open_imagery(path, LATTICE) as source:
        assert source.box == box
        np.testing.assert_array_equal(np.isfinite(found[0]), source.read(box).valid)
    assert np.isfinite(found[0]).mean() > 0.9


def test_heights_are_those_of_the_model_alone(tmp_path, tiny_model):
    """One window has the middle of its support for itself: there the map is the model, rounded."""
    model = load_model(tiny_model)
    window, stride = model.contract.window_px, model.contract.stride_px
    rows, cols = (range(first, first + window) for first in (-169_376 * stride, 17_361 * stride))
    box = Box(rows[0], cols[0], rows[-1] + 1, cols[-1] + 1)
    path = photo(tmp_path / "a.tif", LATTICE.grid(box))
    found, where = bands(map_region(imagery=path, model=tiny_model, out=tmp_path / "out"))
    assert where == box
    heights = model.predict(read_raster(path)[0].data[None])
    middle = (slice(16, 48), slice(16, 48))
    np.testing.assert_allclose(found[0][middle], heights.mean_m[0].numpy()[middle], atol=1 / 64 + 1e-5)
    half = (found[3] - found[2])[middle] / 2
    np.testing.assert_allclose(
        half, np.minimum(1.6449 * heights.spread_m[0].numpy(), half.max())[middle], atol=1
    )  # cut at 0 m


def test_intervals_hold_the_height(whole):
    found, _ = bands(whole)
    height, half, lower, upper = (band[np.isfinite(found[0])] for band in found)
    assert (lower >= 0).all()
    assert (lower <= height).all()
    assert (height <= upper).all()
    assert (half >= (upper - lower) / 2).all()
    assert height.std() > 0.1


# --- nothing else decides them -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sheet_px", [50, 64, 111])
def test_sheets_change_no_bit(image, tiny_model, whole, tmp_path, sheet_px):
    result = map_region(imagery=image, model=tiny_model, out=tmp_path / "out", sheet_px=sheet_px)
    assert json.loads(result.run.read_text())["map"]["sheets"] > 4
    for one, all_ in zip(bands(result), bands(whole), strict=True):
        np.testing.assert_array_equal(one, all_)


@pytest.mark.parametrize("sheet_px", [None, 60])
def test_an_area_changes_no_bit(image, tiny_model, whole, tmp_path, sheet_px):
    area = area_file(tmp_path / "area.geojson", [square(INNER)], "EPSG:4326")
    options = {} if sheet_px is None else {"sheet_px": sheet_px}
    found, box = bands(map_region(area, imagery=image, model=tiny_model, out=tmp_path / "out", **options))
    wanted, _ = bands(whole)
    assert (
        max(
            abs(a - b) for a, b in zip((box.row0, box.col0, *box.shape), (INNER.row0, INNER.col0, *INNER.shape), strict=True)
        )
        <= 1
    )
    wanted = wanted[(slice(None), *box.slices_in(BOX))]
    inner = (slice(None), slice(2, -2), slice(2, -2))
    np.testing.assert_array_equal(found[inner], wanted[inner])
    both = np.isfinite(found)
    np.testing.assert_array_equal(found[both], wanted[both])


def test_another_image_changes_pixels(image, tiny_model, whole, tmp_path):
    """Negative control of the two tests above."""
    other = photo(tmp_path / "a.tif", LATTICE.grid(BOX), seed=9)
    found, _ = bands(map_region(imagery=other, model=tiny_model, out=tmp_path / "out"))
    assert (found[0] != bands(whole)[0][0]).mean() > 0.5


def test_the_same_run_gives_the_same_bytes(image, tiny_model, whole, tmp_path):
    again = map_region(imagery=image, model=tiny_model, out=tmp_path / "out")
    assert again.height.read_bytes() == whole.height.read_bytes()
    assert again.error.read_bytes() == whole.error.read_bytes()


# --- many files ----------------------------------------------------------------------------------------------------------


def cut(folder, image, rows, cols):
    """The parts of an image between the given rows and columns, each a file."""
    pixels, grid = read_raster(image)
    folder.mkdir()
    for r0, r1 in itertools.pairwise([0, *rows, grid.shape[0]]):
        for c0, c1 in itertools.pairwise([0, *cols, grid.shape[1]]):
            write_raster(
                folder / f"r{r0:03d}c{c0:03d}.tif", pixels.data[:, r0:r1, c0:c1],
                grid=grid.crop(r0, c0, (r1 - r0, c1 - c0)), valid=pixels.valid[r0:r1, c0:c1],
            )  # fmt: skip
    return folder


@pytest.fixture(scope="module")
def parts(image, tmp_path_factory):
    return cut(tmp_path_factory.mktemp("parts") / "tiles", image, (31, 32, 101), (17, 120))


@pytest.mark.parametrize("sheet_px", [None, 64])
def test_a_cut_image_gives_the_map_of_the_image(parts, tiny_model, whole, tmp_path, sheet_px):
    options = {} if sheet_px is None else {"sheet_px": sheet_px}
    result = map_region(imagery=parts, model=tiny_model, out=tmp_path / "out", **options)
    for one, all_ in zip(bands(result), bands(whole), strict=True):
        np.testing.assert_array_equal(one, all_)


def test_a_resampled_cut_image_gives_the_map_of_the_image(image, parts, tiny_model, tmp_path):
    maps = [
        bands(map_region(imagery=source, model=tiny_model, out=tmp_path / str(n), gsd_m=0.7, crs="EPSG:32611"))
        for n, source in enumerate((image, str(parts / "*.tif")))
    ]
    for one, all_ in zip(*maps, strict=True):
        np.testing.assert_array_equal(one, all_)


@pytest.fixture(scope="module")
def mixed(image, parts, tmp_path_factory):
    """The parts, the two in the north-east corner in the next zone and coarser, and a dated photo over two others."""
    folder = tmp_path_factory.mktemp("mixed") / "tiles"
    shutil.copytree(parts, folder)
    zone = Lattice(crs=CRS.from_epsg(32611), gsd_m=0.75)
    with open_imagery(image, zone) as whole:
        for name in ("r000c120.tif", "r032c120.tif"):
            with open_imagery(folder / name, zone) as source:  # with an overlap: the zones' pixels leave gaps otherwise
                box = Box(source.box.row0 - 2, source.box.col0 - 2, source.box.row1 + 2, source.box.col1 + 2)
            pixels = whole.read(box)
            write_raster(folder / name, pixels.data, grid=zone.grid(box), valid=pixels.valid)
    left, top = (BOX.col0 + 100) * 0.6 + 0.2, -(BOX.row0 + 110) * 0.6 + 0.1
    photo(folder / "newer.tif", Grid(crs=UTM, transform=rasterio.Affine(0.6, 0, left, 0, -0.6, top), shape=(50, 60)), seed=4)
    with rasterio.open(folder / "newer.tif", "r+") as dataset:
        dataset.update_tags(ACQUISITION_DATE="2020-05-05")
    return folder


@pytest.fixture(scope="module")
def mixed_map(mixed, tiny_model, tmp_path_factory):
    return map_region(imagery=mixed, model=tiny_model, out=tmp_path_factory.mktemp("mixed_map") / "out")


def test_files_of_two_crss_and_three_grids_are_one_map(mixed, mixed_map, whole):
    """Far from the new files the map is that of the uncut image. What was resampled twice lost some edge of its holes."""
    found, box = bands(mixed_map)
    wanted, _ = bands(whole)
    place = BOX.slices_in(box)
    found = found[(slice(None), *place)]
    assert np.isfinite(found[0])[np.isfinite(wanted[0])].mean() > 0.995
    # No window of 64 px that reaches a column left of 36 sees the photo, from column 100, or the other zone, from 117.
    np.testing.assert_array_equal(found[:, :, :36], wanted[:, :, :36])
    assert np.isfinite(wanted[0, :, :36]).any()
    assert (found[0] != wanted[0])[110:160, 100:160].mean() > 0.5


@pytest.mark.slow
@pytest.mark.parametrize("sheet_px", [50, 111])
def test_sheets_change_no_bit_of_a_mixed_folder(mixed, mixed_map, tiny_model, tmp_path, sheet_px):
    result = map_region(imagery=mixed, model=tiny_model, out=tmp_path / "out", sheet_px=sheet_px)
    for one, all_ in zip(bands(result), bands(mixed_map), strict=True):
        np.testing.assert_array_equal(one, all_)


def test_an_area_changes_no_bit_of_a_mixed_folder(mixed, mixed_map, tiny_model, tmp_path):
    area = area_file(tmp_path / "area.gpkg", [square(INNER)])
    found, box = bands(map_region(area, imagery=mixed, model=tiny_model, out=tmp_path / "out", sheet_px=60))
    wanted, outer = bands(mixed_map)
    assert box == INNER
    np.testing.assert_array_equal(found, wanted[(slice(None), *box.slices_in(outer))])


def test_a_run_names_every_file(mixed, mixed_map):
    record = json.loads(mixed_map.run.read_text())["imagery"]
    assert record["source"] == str(mixed)
    assert {file["path"]: file["bytes"] for file in record["files"]} == {
        str(path): path.stat().st_size for path in mixed.iterdir()
    }
    assert all(datetime.fromisoformat(file["modified"]).tzinfo == UTC for file in record["files"])
    assert (record["alpha"], record["resampling"]) == ("none", "bilinear")


def test_one_file_too_coarse_for_the_model_is_named(parts, tiny_model, tmp_path):
    folder = tmp_path / "tiles"
    shutil.copytree(parts, folder)
    left, top = BOX.col0 * 0.6, -BOX.row0 * 0.6
    photo(folder / "coarse.tif", Grid(crs=UTM, transform=rasterio.Affine(9, 0, left, 0, -9, top), shape=(20, 20)))
    with pytest.raises(ContractError, match=r"coarse\.tif has a GSD of 9 m"):
        map_region(imagery=folder, model=tiny_model, out=tmp_path / "out")


# --- scenes of a catalogue -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def bare(tmp_path_factory):
    """An image without a mask: a catalogue's files say what is nothing by a value."""
    box = Box(BOX.row0, BOX.col0, BOX.row0 + 90, BOX.col0 + 100)
    return photo(tmp_path_factory.mktemp("bare") / "photo.tif", LATTICE.grid(box))


@pytest.fixture(scope="module")
def found_scenes(bare, tmp_path_factory):
    """A search, frozen, that found each part of the image as an item."""
    folder = cut(tmp_path_factory.mktemp("scenes") / "tiles", bare, (31, 70), (17, 55))
    names = ("nir", "red", "green", "blue")
    source = StacSource(
        name="parts", title="parts of one image", kind="stac-static", endpoint="catalog.json", collection="parts",
        licence="none", attribution="nobody", gsd_m=0.6, dtype="uint8", value_range=(0, 255),
        band=[StacBand(name=name, asset="image", index=max(place, 1)) for place, name in enumerate(names)],
    )  # fmt: skip
    items = []
    for path in sorted(folder.iterdir()):
        with open_raster(path) as raster:
            grid = raster.grid
        asset = AssetRecord(href=str(path), crs="EPSG:32610", transform=tuple(grid.transform)[:6], shape=grid.shape)
        items.append(
            ItemRecord(
                id=path.stem,
                collection="parts",
                datetime="2020-05-05T10:00:00Z",
                day=18_387,
                cloud_percent=None,
                assets={"image": asset},
                offset=dict.fromkeys(names, 0.0),
            )
        )
    west, south, east, north = Transformer.from_crs(UTM, "EPSG:4326", always_xy=True).transform_bounds(
        *LATTICE.grid(BOX).bounds
    )
    search = SearchRecord(
        area="here", bounds_deg=(west, south, east, north), start=None, end=None, max_cloud_percent=None, prefer="newest",
        date=None, exclude=(),
    )  # fmt: skip
    return Manifest(source=source, search=search, items=items)


@pytest.mark.parametrize("written", [False, True])
def test_a_manifest_gives_the_map_of_its_files(found_scenes, bare, tiny_model, tmp_path, written):
    """Of its four bands the model's three are taken by their names."""
    imagery = found_scenes.write(tmp_path / "scenes.json") if written else found_scenes
    result = map_region(imagery=imagery, model=tiny_model, out=tmp_path / "out")
    of_the_file = map_region(imagery=bare, model=tiny_model, out=tmp_path / "file")
    for one, all_ in zip(bands(result), bands(of_the_file), strict=True):
        np.testing.assert_array_equal(one, all_)
    record = json.loads(result.run.read_text())["imagery"]
    assert record["bands"] == ["red", "green", "blue"]
    assert [file["item"] for file in record["files"]] == [f"parts/{item.id}" for item in found_scenes.items]


def test_scenes_of_two_days_give_each_pixel_its_own(found_scenes, tiny_model, tmp_path):
    items = [item.model_copy(update={"day": 18_387 + number % 2}) for number, item in enumerate(found_scenes.items)]
    result = map_region(
        imagery=Manifest(source=found_scenes.source, search=found_scenes.search, items=items), model=tiny_model,
        out=tmp_path / "out",
    )  # fmt: skip
    found, grid = read_raster(tmp_path / "out" / "date.tif")
    for item in items:
        row, col = LATTICE.box_of(item.assets["image"].grid).row0, LATTICE.box_of(item.assets["image"].grid).col0
        part = (slice(row - BOX.row0, None), slice(col - BOX.col0, None))
        assert found.data[0][part][0, 0] == (20200505 if item.day == 18_387 else 20200506)
    assert grid.shape == (90, 100)
    record = json.loads(result.run.read_text())["imagery"]
    assert (record["first_day"], record["last_day"], record["undated"]) == ("2020-05-05", "2020-05-06", False)
    assert (record["licence"], record["attribution"]) == ("none", "nobody")
    assert "none (nobody)" in (tmp_path / "out" / "README.txt").read_text(encoding="utf-8")
    assert not (tmp_path / "out" / "imagery_vrt").exists(), "there is no file to show"


def test_bands_are_taken_by_the_names_of_the_contract(image, tiny_model, whole, tmp_path):
    pixels, grid = read_raster(image)
    write_raster(
        tmp_path / "a.tif",
        pixels.data[[2, 0, 1, 0]],
        grid=grid,
        valid=pixels.valid,
        band_names=["Blue", "Red", "Green", "NIR"],
    )
    found, _ = bands(map_region(imagery=tmp_path / "a.tif", model=tiny_model, out=tmp_path / "out"))
    np.testing.assert_array_equal(found, bands(whole)[0])
    found, _ = bands(map_region(imagery=tmp_path / "a.tif", model=tiny_model, out=tmp_path / "other", bands=(1, 2, 3)))
    assert (found[0] != bands(whole)[0][0]).mean() > 0.5


# --- areas of interest ---------------------------------------------------------------------------------------------------


RING = shapely.difference(square(INNER), shapely.affinity.scale(square(INNER), 0.5, 0.5))


@pytest.mark.parametrize("name", ["a.geojson", "a.gpkg", "a.parquet", "a.shp"])
@pytest.mark.parametrize("crs", ["EPSG:4326", "EPSG:32610", "EPSG:2994"])
def test_formats_and_crss(image, tiny_model, tmp_path, name, crs):
    if name == "a.geojson" and crs != "EPSG:4326":
        pytest.skip("GeoJSON is in degrees")
    area = area_file(tmp_path / name, [RING], crs)
    found, box = bands(map_region(area, imagery=image, model=tiny_model, out=tmp_path / "out"))
    grid = LATTICE.grid(box)
    x, y = grid.xy(*np.meshgrid(np.arange(box.shape[1]) + 0.5, np.arange(box.shape[0]) + 0.5))
    points, finite = shapely.points(x, y), np.isfinite(found[0])
    valid = read_raster(image)[0].valid[box.slices_in(BOX)]
    margin = 0.02  # metres: what the other CRSs round
    assert finite[shapely.contains(shapely.buffer(RING, -margin), points) & valid].all()
    assert not finite[~shapely.contains(shapely.buffer(RING, margin), points)].any()
    assert not finite[box.shape[0] // 2, box.shape[1] // 2], "the hole is mapped"


def test_bbox(image, tiny_model, tmp_path):
    degrees = Transformer.from_crs(UTM, "EPSG:4326", always_xy=True).transform_bounds(*square(INNER).bounds)
    found, box = bands(map_region(degrees, imagery=image, model=tiny_model, out=tmp_path / "out"))
    assert square(box).intersection(square(INNER)).area > 0.97 * square(INNER).area
    assert np.isfinite(found[0]).mean() > 0.9


@settings(max_examples=30)
@given(data=st.data())
def test_an_area_is_the_same_in_every_box(data):
    """Edges that run through the very centres of pixels are the hard case: a rounding may fall either way."""
    step = st.integers(0, 120)
    half = data.draw(st.sampled_from([0.0, 0.5, 0.25]))
    points = data.draw(st.lists(st.tuples(step, step), min_size=3, max_size=6, unique=True))
    ring = shapely.MultiPoint([LATTICE.grid(BOX).xy(c + half, r + half) for r, c in points]).convex_hull
    if ring.geom_type != "Polygon":
        return
    area = geopandas.GeoSeries([ring], crs=UTM)
    whole = area_mask(area, LATTICE, BOX)
    row, col = data.draw(st.integers(BOX.row0, BOX.row1 - 1)), data.draw(st.integers(BOX.col0, BOX.col1 - 1))
    part = Box(row, col, data.draw(st.integers(row + 1, BOX.row1)), data.draw(st.integers(col + 1, BOX.col1)))
    np.testing.assert_array_equal(area_mask(area, LATTICE, part), whole[part.slices_in(BOX)])


# --- refusals that the command line shares (test_cli has the rest) -------------------------------------------------------


@pytest.mark.parametrize(
    "bbox",
    [(1.0, 2.0, 0.0, 3.0), (0.0, 2.0, 1.0, 2.0), (0.0, -100.0, 1.0, 0.0), (0.0, 0.0, 200.0, 1.0)],
)
def test_a_bbox_that_is_none(image, tiny_model, tmp_path, bbox):
    with pytest.raises(AreaError, match="bbox"):
        map_region(bbox, imagery=image, model=tiny_model, out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_area_of_nothing_but_invalid_pixels(image, tiny_model, tmp_path):
    corner = Box(BOX.row0 + 5, BOX.col0 + 5, BOX.row0 + 50, BOX.col0 + 50)
    area = area_file(tmp_path / "a.gpkg", [square(corner)])
    with pytest.raises(AreaError, match="no valid pixel"):
        map_region(area, imagery=image, model=tiny_model, out=tmp_path / "deep" / "out")
    assert not (tmp_path / "deep").exists()


def test_a_failing_run_leaves_what_was_there(image, tiny_model, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "notes.txt").write_text("mine")

    def stop(done, total):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        map_region(imagery=image, model=tiny_model, out=tmp_path / "out", overwrite=True, progress=stop)
    with pytest.raises(OutputError, match="not empty"):
        map_region(imagery=image, model=tiny_model, out=tmp_path / "out")
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["notes.txt"]


def test_a_second_run_into_the_same_folder_stops(image, tiny_model, whole, tmp_path):
    refused = []

    def start_another(done, total):
        with pytest.raises(OutputError, match="another run is writing") as error:
            map_region(imagery=image, model=tiny_model, out=tmp_path / "out", overwrite=True)
        refused.append(error)

    result = map_region(imagery=image, model=tiny_model, out=tmp_path / "out", progress=start_another)
    assert refused
    assert result.height.read_bytes() == whole.height.read_bytes(), "the refused run changed the other's work"


def test_what_is_no_polygon_is_not_dropped_in_silence(image, tiny_model, tmp_path):
    area = area_file(tmp_path / "area.gpkg", [square(INNER), square(INNER).centroid])
    with pytest.raises(AreaError, match="holds a Point; give polygons only"):
        map_region(area, imagery=image, model=tiny_model, out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_file_put_beside_a_failing_run_is_kept(image, tiny_model, tmp_path):
    def stop(done, total):
        (tmp_path / "out" / "notes.txt").write_text("mine")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        map_region(imagery=image, model=tiny_model, out=tmp_path / "out", progress=stop)
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["notes.txt"]


def test_a_disk_that_fills_up_during_the_run(image, tiny_model, whole, small_disk, tmp_path, monkeypatch):
    """The space is checked first, so it must vanish afterwards: here the check is told of more than there is."""
    import shutil

    usage = shutil.disk_usage("/")
    monkeypatch.setattr("canopy.region.run.shutil.disk_usage", lambda path: usage._replace(free=10**12))
    with stage_sheet(tmp_path, LATTICE, BOX) as (sheet, _):
        pass
    need = sum(path.stat().st_size for path in (sheet.height, sheet.error))
    for size, staged in ((16 << 10, False), (need // 2, False), (need - 4096, False), (need + (80 << 10), True)):
        disk = small_disk(size)
        with pytest.raises(CanopyError, match="free disk space") as error:
            map_region(imagery=image, model=tiny_model, out=disk / "out")
        assert "\n" not in str(error.value)
        # What is predicted is kept once it is whole; of less nothing is left.
        assert [p.name for p in disk.glob("*/*")] == ([".canopy-work"] if staged else [])
        assert ("canopy map resume" in str(error.value)) == staged
        assert disk.joinpath("out").exists() == staged


def test_what_the_run_says_about_itself(whole):
    record = json.loads(whole.run.read_text())
    assert record["map"] | {"shape": [170, 200], "gsd_m": 0.6, "window_px": 64, "stride_px": 48} == record["map"]
    assert record["time"]["bound_by"] in record["time"]["stages_s"]
    assert sum(record["time"]["stages_s"].values()) <= record["time"]["wall_s"] * 1.01
    assert record["calibration"].startswith("uncalibrated")
    assert [model["name"] for model in record["models"]] == ["tiny"]
    assert record["machine"] | {"precision": "float32", "compiled": False, "batch": 1} == record["machine"]
    for path in (whole.height, whole.error):
        with rasterio.open(path) as dataset:
            assert dataset.tags()["CANOPY_PRECISION"] == "float32"


def test_what_a_device_cannot_do_is_refused_before_anything_is_written(image, tiny_model, tmp_path):
    for options, message in (({"precision": "bfloat16"}, "bfloat16 is for GPUs"), ({"batch": 4}, "must be 1 on a CPU")):
        with pytest.raises(ContractError, match=message):
            map_region(imagery=image, model=tiny_model, out=tmp_path / "out", **options)
        assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("options", [{}, {"sheet_px": 512, "max_file_px": 50}])
def test_pixels_at_which_the_model_abstains_are_counted_and_told(image, tiny_model, tmp_path, monkeypatch, options):
    """They have no height, and are not to be taken for places without imagery."""
    import torch

    def shy(*arguments, **changes):
        network = Plain(lambda x: torch.where(x[:, 0] > 1.0, math.nan, 15.0)).eval()
        return dataclasses.replace(load_model(*arguments, **changes), network=network)

    monkeypatch.setattr(ensemble, "load_model", shy)
    monkeypatch.setattr(sheet, "_ensembles", {})
    result = map_region(imagery=image, model=tiny_model, out=tmp_path / "out", **options)
    with rasterio.open(image) as photo:
        usable, red = photo.dataset_mask() > 0, photo.read(1)
    expected = int((usable & ((red.astype(np.float32) - 100) / 60 > 1)).sum())
    told = json.loads(result.run.read_text())["map"]
    with rasterio.open(result.height) as height:
        known = int(np.isfinite(height.read(1)).sum())
        tags = height.tags()
    assert expected > 100
    assert (told["abstained_px"], told["known_px"]) == (expected, known) == (expected, int(usable.sum()) - expected)
    assert tags["CANOPY_ABSTAINED_PX"] == str(expected)

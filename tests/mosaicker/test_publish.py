"""The rules of a published map, one by one on the written file, and the broken files that must not pass for one."""

import math
import struct

import numpy as np
import pytest
import rasterio
import rasterio.shutil
from pyproj import CRS
from rio_cogeo.cogeo import cog_info, cog_validate

from canopy.errors import OutputError, RasterError
from canopy.grid import Box, Lattice, sheets_over
from canopy.mosaicker.publish import ERROR_BANDS, HEIGHT_BANDS, check_cog, check_whole, open_map, stage_sheet, write_cog
from canopy.mosaicker.quantum import error_bands, halve, quantise
from canopy.raster import create_raster

LATTICE = Lattice(crs=CRS.from_epsg(32610), gsd_m=0.6)
BOX = Box(-8_130_300, 833_200, -8_130_300 + 1100, 833_200 + 900)
TAGS = {"CANOPY_MODEL": "tiny 0", "CANOPY_IMAGERY": "a&b<c>.tif"}


def heights(box=BOX, seed=0):
    """Heights on the quantum with holes, and their error bands; a function of the lattice pixel."""
    rng = np.random.default_rng(seed)
    rows, cols = BOX.shape
    smooth = 15 + 10 * np.sin(np.arange(rows) / 40)[:, None] * np.cos(np.arange(cols) / 30)[None, :]
    height = quantise(np.maximum(smooth + rng.normal(0, 1, BOX.shape), 0).astype(np.float32))
    height[rng.random(BOX.shape) < 0.02] = np.nan
    height[:70, :130] = np.nan
    here = box.slices_in(BOX)
    return height[here], error_bands(np.maximum(height - 3, 0), height + 4)[(slice(None), *here)]


def staged(folder, boxes):
    """Each box staged in strips of 100 rows, as a run does."""
    sheets = []
    for box in boxes:
        height, error = heights(box)
        with stage_sheet(folder, LATTICE, box) as (sheet, writer):
            for row in range(0, box.shape[0], 100):
                stop = min(row + 100, box.shape[0])
                strip = Box(box.row0 + row, box.col0, box.row0 + stop, box.col1)
                writer.write(strip, height[row:stop], error[:, row:stop])
        sheets.append(sheet)
    return sheets


def published(folder, boxes=(BOX,)):
    work = folder / "work"
    work.mkdir(parents=True)
    sheets = staged(work, boxes)
    out = folder / "out"
    out.mkdir()
    for name, names in (("height", HEIGHT_BANDS), ("error", ERROR_BANDS)):
        parts = [(sheet.box, getattr(sheet, name)) for sheet in sheets]
        write_cog(out / f"{name}.tif", parts, lattice=LATTICE, box=BOX, band_names=names, tags=TAGS)
    return out


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    return published(tmp_path_factory.mktemp("map"))


FILES = pytest.mark.parametrize(("name", "names"), [("height.tif", HEIGHT_BANDS), ("error.tif", ERROR_BANDS)])


def truth(name):
    height, error = heights()
    return height[None] if name == "height.tif" else error


def test_a_staged_file_that_lacks_its_last_block_is_refused(tmp_path):
    """GDAL closes such a file without an error where the disk is full, and what is missing reads as NaN."""
    [sheet] = staged(tmp_path, (BOX,))
    for path, count in ((sheet.height, len(HEIGHT_BANDS)), (sheet.error, len(ERROR_BANDS))):
        check_whole(path, BOX, count)
        with path.open("r+b") as file:
            file.truncate(path.stat().st_size - 1024)
        with pytest.raises(OutputError, match=r"blocks of it are missing.*free disk space"):
            check_whole(path, BOX, count)


# --- the file ------------------------------------------------------------------------------------------------------------


@FILES
def test_values_and_place(out, name, names):
    with rasterio.open(out / name) as dataset:
        np.testing.assert_array_equal(dataset.read(), truth(name))
        assert dataset.dtypes == ("float32",) * len(names)
        assert all(math.isnan(v) for v in dataset.nodatavals)
        assert dataset.crs.to_epsg() == 32610
        assert dataset.transform == LATTICE.grid(BOX).transform
        assert dataset.shape == BOX.shape
        assert dataset.descriptions == names
        assert dataset.units == ("m",) * len(names)
        tags = dataset.tags()
    assert tags.items() >= TAGS.items()
    assert tags["AREA_OR_POINT"] == "Area"


@FILES
def test_layout(out, name, names):
    valid, errors, warnings = cog_validate(out / name, strict=True, quiet=True)
    assert (valid, errors, warnings) == (True, [], [])
    with rasterio.open(out / name) as dataset:
        assert dataset.profile["compress"] == "deflate"
        assert dataset.tags(ns="IMAGE_STRUCTURE")["PREDICTOR"] == "3"
        assert dataset.tags(ns="IMAGE_STRUCTURE")["LAYOUT"] == "COG"
        assert set(dataset.block_shapes) == {(512, 512)}
        assert all(dataset.overviews(i) == [2, 4] for i in dataset.indexes)
    assert cog_info(out / name).Compression == "DEFLATE"


@FILES
def test_nothing_else_is_left(out, name, names):
    assert sorted(p.name for p in out.iterdir()) == ["error.tif", "height.tif"]


@FILES
def test_statistics_are_exact_and_inside_the_file(out, name, names):
    wanted = truth(name).astype(np.float64)
    with rasterio.open(out / name) as dataset:
        for index, band in enumerate(wanted, start=1):
            tags = dataset.tags(index)
            valid = band[np.isfinite(band)]
            assert float(tags["STATISTICS_MINIMUM"]) == valid.min()
            assert float(tags["STATISTICS_MAXIMUM"]) == valid.max()
            assert float(tags["STATISTICS_MEAN"]) == pytest.approx(valid.mean(), rel=1e-12)
            assert float(tags["STATISTICS_STDDEV"]) == pytest.approx(valid.std(), rel=1e-9)
            assert float(tags["STATISTICS_VALID_PERCENT"]) == pytest.approx(100 * valid.size / band.size, abs=0.01)
            assert "STATISTICS_APPROXIMATE" not in tags
    assert b"STATISTICS_MEAN" in (out / name).read_bytes()


@FILES
def test_overviews_are_means_of_the_valid_pixels(out, name, names):
    """NaN has no part in a mean, a block of four is NaN only when all four are, and means are on the quantum."""
    fine = truth(name)
    with rasterio.open(out / name, overview_level=0) as dataset:
        coarse = dataset.read()
    count, rows, cols = coarse.shape
    blocks = fine[:, : rows * 2, : cols * 2].reshape(count, rows, 2, cols, 2).swapaxes(2, 3).reshape(count, rows, cols, 4)
    some = np.isfinite(blocks).any(axis=-1)
    np.testing.assert_array_equal(np.isfinite(coarse), some)
    np.testing.assert_array_equal(coarse[some], quantise(np.nanmean(blocks[some].astype(float), axis=-1)))


def test_the_second_overview_halves_the_first(out):
    with rasterio.open(out / "error.tif", overview_level=0) as dataset:
        first = dataset.read()
    with rasterio.open(out / "error.tif", overview_level=1) as dataset:
        np.testing.assert_array_equal(dataset.read(), halve(first))


def test_a_map_in_sheets_is_the_map_in_one(tmp_path, out):
    sheets = sheets_over(BOX, 512)
    assert len(sheets) > 4
    other = published(tmp_path, sheets)
    for name in ("height.tif", "error.tif"):
        with rasterio.open(out / name) as one, rasterio.open(other / name) as many:
            np.testing.assert_array_equal(many.read(), one.read())
            assert many.tags() == one.tags()
            assert [many.tags(index) for index in many.indexes] == [one.tags(index) for index in one.indexes]
        assert (other / name).read_bytes() == (out / name).read_bytes()


def test_a_misplaced_sheet_shows(tmp_path, out):
    """Negative control of the test above."""
    (tmp_path / "work").mkdir()
    sheets = staged(tmp_path / "work", sheets_over(BOX, 256))
    left, right = [index for index, sheet in enumerate(sheets) if sheet.box.shape == (256, 256)][:2]
    parts = [(sheet.box, sheet.height) for sheet in sheets]
    parts[left], parts[right] = (parts[left][0], parts[right][1]), (parts[right][0], parts[left][1])
    write_cog(tmp_path / "a.tif", parts, lattice=LATTICE, box=BOX, band_names=HEIGHT_BANDS, tags=TAGS)
    with rasterio.open(tmp_path / "a.tif") as swapped, rasterio.open(out / "height.tif") as right_one:
        assert not np.array_equal(swapped.read(), right_one.read(), equal_nan=True)


def test_what_no_sheet_covers_is_unknown(tmp_path):
    (tmp_path / "work").mkdir()
    sheets = staged(tmp_path / "work", sheets_over(BOX, 512)[1:])
    parts = [(sheet.box, sheet.height) for sheet in sheets]
    write_cog(tmp_path / "a.tif", parts, lattice=LATTICE, box=BOX, band_names=HEIGHT_BANDS, tags=TAGS)
    first = sheets_over(BOX, 512)[0].slices_in(BOX)
    with rasterio.open(tmp_path / "a.tif") as dataset:
        assert np.isnan(dataset.read(1)[first]).all()


@pytest.mark.parametrize("cols", [512, 1024])
def test_a_map_or_an_overview_as_wide_as_a_block(tmp_path, cols):
    """rio-cogeo takes it for a file in strips."""
    box = Box(0, 0, 1300, cols)
    with stage_sheet(tmp_path, LATTICE, box) as (sheet, writer):
        writer.write(box, np.ones(box.shape, np.float32), np.ones((3, *box.shape), np.float32))
    write_cog(tmp_path / "a.tif", [(box, sheet.height)], lattice=LATTICE, box=box, band_names=HEIGHT_BANDS, tags=TAGS)


# --- check_cog refuses ---------------------------------------------------------------------------------------------------


GOOD = {
    "driver": "COG", "COMPRESS": "DEFLATE", "PREDICTOR": "FLOATING_POINT", "BLOCKSIZE": 512,
    "OVERVIEW_RESAMPLING": "AVERAGE", "STATISTICS": "YES",
}  # fmt: skip


def broken(tmp_path, *, box=BOX, dtype="float32", nodata=math.nan, name="height_m", unit="m", copy=GOOD):
    source, target = tmp_path / "source.tif", tmp_path / "a.tif"
    data = heights()[0][None].astype(dtype)
    with create_raster(
        source, grid=LATTICE.grid(box), count=1, dtype=dtype, nodata=nodata, band_names=(name,), units=(unit,)
    ) as writer:
        writer.write(0, data)
    rasterio.shutil.copy(source, target, **copy)
    return target


def refusal(path):
    with pytest.raises(RasterError) as error:
        check_cog(path, LATTICE.grid(BOX), HEIGHT_BANDS)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_the_good_fixture_passes(tmp_path):
    check_cog(broken(tmp_path), LATTICE.grid(BOX), HEIGHT_BANDS)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"name": "height"}, "its bands are"),
        ({"unit": "ft"}, "its bands are"),
        ({"nodata": -9999.0}, "nodata -9999"),
        ({"nodata": None}, "nodata None"),
        ({"dtype": "float64"}, "float64"),
        ({"box": Box(BOX.row0 + 1, BOX.col0, BOX.row1 + 1, BOX.col1)}, "its grid"),
        ({"copy": GOOD | {"STATISTICS": "NO"}}, "lacks statistics"),
        ({"copy": GOOD | {"OVERVIEWS": "NONE"}}, "overview"),
        ({"copy": {"driver": "GTiff", "tiled": True, "compress": "deflate"}}, "not a valid COG"),
        ({"copy": {"driver": "GTiff"}}, "not a valid COG"),
        ({"copy": GOOD | {"COMPRESS": "LZW"}}, "LZW"),
        ({"copy": GOOD | {"PREDICTOR": "NO"}}, "predictor"),
        ({"copy": GOOD | {"BLOCKSIZE": 256}}, "256"),
    ],
)
def test_a_file_that_is_not_the_promised_cog_is_refused(tmp_path, change, message):
    assert message.lower() in refusal(broken(tmp_path, **change)).lower()


def test_a_damaged_block_is_refused(tmp_path):
    path = broken(tmp_path)
    with rasterio.open(path) as dataset:
        offset = int(dataset.get_tag_item("BLOCK_OFFSET_0_1", "TIFF", bidx=1))
    content = bytearray(path.read_bytes())
    content[offset : offset + 200] = struct.pack("200B", *([255] * 200))
    path.write_bytes(content)
    refusal(path)


def test_a_truncated_file_is_refused(tmp_path):
    path = broken(tmp_path)
    path.write_bytes(path.read_bytes()[:-1000])
    refusal(path)


def test_a_refused_file_does_not_take_its_name(tmp_path):
    (tmp_path / "work").mkdir()
    (sheet,) = staged(tmp_path / "work", [BOX])
    (tmp_path / "a.tif").write_text("the old map")
    with pytest.raises(OutputError, match="cannot write") as error:
        write_cog(
            tmp_path / "a.tif", [(BOX, sheet.error)], lattice=LATTICE, box=BOX, band_names=("one", "two", "three", "four"),
            tags=TAGS,
        )  # fmt: skip
    assert "\n" not in str(error.value)
    assert (tmp_path / "a.tif").read_text() == "the old map"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.tif", "work"]


def test_full_disk(tmp_path, small_disk):
    """Sizes of disk from far too small to a little too small: the message, and nothing left behind."""
    (tmp_path / "work").mkdir()
    (sheet,) = staged(tmp_path / "work", [BOX])
    write_cog(tmp_path / "a.tif", [(BOX, sheet.height)], lattice=LATTICE, box=BOX, band_names=HEIGHT_BANDS, tags=TAGS)
    need = (tmp_path / "a.tif").stat().st_size
    for size in (4096, need // 2, need - 8192, need - 4096):
        disk = small_disk(size)
        with pytest.raises(OutputError, match="free disk space") as error:
            write_cog(disk / "a.tif", [(BOX, sheet.height)], lattice=LATTICE, box=BOX, band_names=HEIGHT_BANDS, tags=TAGS)
        assert "\n" not in str(error.value)
        assert not list(disk.iterdir())


# --- reading back --------------------------------------------------------------------------------------------------------


def test_open_map(out):
    found = open_map(out)
    assert list(found.data_vars) == ["height_m", "error_90_m", "lower_90_m", "upper_90_m"]
    height, error = heights()
    np.testing.assert_array_equal(found.height_m.values, height)
    for name, band in zip(ERROR_BANDS, error, strict=True):
        np.testing.assert_array_equal(found[name].values, band)
    assert found.rio.crs.to_epsg() == 32610
    assert found.height_m.dims == ("y", "x")
    assert found.height_m.attrs["units"] == "m"
    assert found.attrs["CANOPY_MODEL"] == "tiny 0"
    x, y = LATTICE.grid(BOX).xy(0.5, 0.5)
    assert (float(found.x[0]), float(found.y[0])) == pytest.approx((x, y))


def test_open_map_says_what_is_missing(tmp_path):
    with pytest.raises(OutputError, match=r"height\.tif does not exist"):
        open_map(tmp_path)

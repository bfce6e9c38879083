"""Reading against rasterio's own reader, the traps of real files one by one, and what a failed write leaves behind."""

import math
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import rasterio
from affine import Affine
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from pyproj import CRS
from rasterio.enums import ColorInterp, Resampling
from rasterio.windows import Window

from canopy.errors import RasterError
from canopy.grid import Grid
from canopy.raster import Pixels, RasterPool, create_raster, open_raster, read_raster, warp, write_raster

UTM = CRS.from_epsg(32610)


def grid(rows, cols, gsd=0.6, left=499_998.0, top=4_878_000.0):
    return Grid(crs=UTM, transform=Affine(gsd, 0, left, 0, -gsd, top), shape=(rows, cols))


def noise(*shape, dtype="uint8", seed=0):
    return np.random.default_rng(seed).integers(1, 255, shape).astype(dtype)


def plain(path, data, *, alpha=False, mask=None, nodata=None, **profile):
    """A GeoTIFF by rasterio alone, so that the reader is not tested against the writer of its own module."""
    count, rows, cols = data.shape
    profile = {"crs": "EPSG:32610", "transform": grid(rows, cols).transform, "ALPHA": "YES" if alpha else "NO"} | profile
    with (
        rasterio.Env(GDAL_TIFF_INTERNAL_MASK="YES"),
        rasterio.open(
            path, "w", driver="GTiff", width=cols, height=rows, count=count, dtype=data.dtype, nodata=nodata, **profile
        ) as dataset,
    ):
        dataset.write(data)
        if alpha:
            dataset.colorinterp = [*dataset.colorinterp[:-1], ColorInterp.alpha]
        if mask is not None:
            dataset.write_mask(mask)
    return path


# --- reading -------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def cases(tmp_path_factory):
    """Every way of saying which pixels are usable, on one 40 x 50 px image, with the validity each should give."""
    folder = tmp_path_factory.mktemp("cases")
    rng = np.random.default_rng(3)
    hole = rng.random((40, 50)) < 0.3
    everywhere = np.ones((40, 50), bool)
    image = noise(3, 40, 50)
    one_band, all_bands = image.copy(), image.copy()
    one_band[1][hole] = 0
    all_bands[:, hole] = 0
    alpha = np.concatenate([image, np.where(hole, 0, 255)[None].astype("uint8")])
    floats = noise(1, 40, 50, dtype="float32")
    nans = np.where(hole, np.float32(np.nan), floats)
    return {
        "nothing declared": (plain(folder / "a.tif", all_bands), everywhere),
        "nodata in all bands": (plain(folder / "b.tif", all_bands, nodata=0), ~hole),
        "nodata in one band": (plain(folder / "c.tif", one_band, nodata=0), everywhere),
        "internal mask": (plain(folder / "d.tif", image, mask=~hole), ~hole),
        "alpha": (plain(folder / "e.tif", alpha, alpha=True), ~hole),
        "NaN undeclared": (plain(folder / "f.tif", nans), ~hole),
        "NaN declared": (plain(folder / "g.tif", nans, nodata=math.nan), ~hole),
        "float nodata": (plain(folder / "h.tif", np.where(hole, np.float32(-9999), floats), nodata=-9999), ~hole),
        "tiles": (plain(folder / "i.tif", all_bands, nodata=0, tiled=True, blockxsize=16, blockysize=16), ~hole),
    }


CASES = (
    "nothing declared", "nodata in all bands", "nodata in one band", "internal mask", "alpha", "NaN undeclared",
    "NaN declared", "float nodata", "tiles",
)  # fmt: skip


@pytest.mark.parametrize("name", CASES)
@given(row=st.integers(-60, 60), col=st.integers(-60, 60), rows=st.integers(1, 90), cols=st.integers(1, 90))
def test_any_window_equals_the_file_padded(cases, name, row, col, rows, cols):
    path, usable = cases[name]
    with rasterio.open(path) as dataset:
        bands = [i for i, kind in enumerate(dataset.colorinterp, start=1) if kind != ColorInterp.alpha]
        whole = dataset.read(bands)
        padding = math.nan if whole.dtype.kind == "f" else 0
        wanted = np.full((len(bands), 300, 300), padding, whole.dtype)
        wanted[:, 100:140, 100:150] = whole
        # rasterio's own reading of windows that hang over is the second oracle
        boundless = dataset.read(bands, window=Window(col, row, cols, rows), boundless=True, fill_value=padding)
    valid = np.zeros((300, 300), bool)
    valid[100:140, 100:150] = usable
    part = (slice(100 + row, 100 + row + rows), slice(100 + col, 100 + col + cols))
    with open_raster(path) as raster:
        pixels = raster.read(row, col, (rows, cols))
    np.testing.assert_array_equal(pixels.data, wanted[(slice(None), *part)])
    np.testing.assert_array_equal(pixels.valid, valid[part])
    inside = np.zeros((300, 300), bool)
    inside[100:140, 100:150] = True
    np.testing.assert_array_equal(pixels.data[:, inside[part]], boundless[:, inside[part]])


@pytest.mark.parametrize(("row", "col"), [(-5, 10), (38, 10), (10, -5), (10, 48), (-5, -5), (38, 48)])
def test_over_each_edge(tmp_path, row, col):
    data = noise(2, 40, 50, dtype="uint16")
    path = plain(tmp_path / "a.tif", data)
    with open_raster(path) as raster:
        pixels = raster.read(row, col, (7, 8))
    for r in range(7):
        for c in range(8):
            inside = 0 <= row + r < 40 and 0 <= col + c < 50
            assert pixels.valid[r, c] == inside
            assert (pixels.data[:, r, c] == (data[:, row + r, col + c] if inside else 0)).all()


@pytest.mark.parametrize(("row", "col"), [(-10, 0), (40, 0), (0, -10), (0, 50), (1000, 1000)])
@pytest.mark.parametrize("dtype", ["uint8", "float32"])
def test_fully_outside_is_all_invalid(tmp_path, row, col, dtype):
    with open_raster(plain(tmp_path / "a.tif", noise(1, 40, 50, dtype=dtype))) as raster:
        pixels = raster.read(row, col, (10, 10))
    assert not pixels.valid.any()
    assert pixels.data.dtype == dtype
    assert np.isnan(pixels.data).all() if dtype == "float32" else not pixels.data.any()


def test_bands_are_read_in_the_order_asked_for(tmp_path):
    data = noise(4, 10, 10)
    pixels, found = read_raster(plain(tmp_path / "a.tif", data), bands=(4, 1))
    np.testing.assert_array_equal(pixels.data, data[[3, 0]])
    assert found == grid(10, 10)


def test_a_nan_in_one_band_makes_the_pixel_unusable(tmp_path):
    data = noise(2, 5, 5, dtype="float32")
    data[1, 2, 3] = np.nan
    pixels, _ = read_raster(plain(tmp_path / "a.tif", data))
    assert np.argwhere(~pixels.valid).tolist() == [[2, 3]]


@pytest.mark.parametrize("nodata", ["-9999", "0.5", "nan", "256"])
def test_a_nodata_value_that_an_integer_cannot_hold_hides_nothing(tmp_path, nodata):
    """Common in the wild: GDAL tools keep -9999 when they convert to bytes."""
    plain(tmp_path / "a.tif", np.zeros((1, 8, 8), "uint8"))
    (tmp_path / "a.vrt").write_text(
        '<VRTDataset rasterXSize="8" rasterYSize="8"><SRS>EPSG:32610</SRS>'
        "<GeoTransform>499998, 0.6, 0, 4878000, 0, -0.6</GeoTransform>"
        f'<VRTRasterBand dataType="Byte" band="1"><NoDataValue>{nodata}</NoDataValue><SimpleSource>'
        '<SourceFilename relativeToVRT="1">a.tif</SourceFilename><SourceBand>1</SourceBand>'
        "</SimpleSource></VRTRasterBand></VRTDataset>"
    )
    pixels, _ = read_raster(tmp_path / "a.vrt")
    assert pixels.valid.all()


# --- traps ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("dtype", ["uint8", "uint16", "float32"])
def test_what_we_write_has_no_alpha(tmp_path, count, dtype):
    data = noise(count, 20, 20, dtype=dtype)
    data[-1, :5] = 0  # would be transparent
    write_raster(tmp_path / "a.tif", data, grid=grid(20, 20))
    with rasterio.open(tmp_path / "a.tif") as dataset:
        assert ColorInterp.alpha not in dataset.colorinterp
    pixels, _ = read_raster(tmp_path / "a.tif")
    assert pixels.valid.all()
    np.testing.assert_array_equal(pixels.data, data)


def test_gdal_itself_takes_the_fourth_band_for_alpha(tmp_path):
    """Negative control of the test above: without our options the band is transparent."""
    with rasterio.open(
        tmp_path / "a.tif", "w", driver="GTiff", width=4, height=4, count=4, dtype="uint8",
        crs="EPSG:32610", transform=grid(4, 4).transform,
    ) as dataset:  # fmt: skip
        dataset.write(noise(4, 4, 4))
        assert dataset.colorinterp[-1] == ColorInterp.alpha


def one_line(error):
    assert "\n" not in str(error.value)
    return str(error.value)


def jpeg(path, quality=95):
    Image.fromarray(np.moveaxis(noise(3, 200, 200), 0, -1)).save(path, quality=quality)
    path.with_suffix(".jgw").write_text("0.6\n0\n0\n-0.6\n499998.3\n4877999.7\n")
    return path


@pytest.mark.parametrize("in_thread", [False, True])
def test_truncated_jpeg(tmp_path, in_thread):
    path = jpeg(tmp_path / "a.jpg")
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    problems = []

    def read():
        try:
            raster.read(150, 0, (50, 200))
        except RasterError as error:
            problems.append(str(error))

    with open_raster(path) as raster:
        raster.read(0, 0, (20, 200))  # its first half is all right
        reader = threading.Thread(target=read) if in_thread else None
        if reader is None:
            read()
        else:
            reader.start()
            reader.join()
    assert len(problems) == 1
    assert str(path) in problems[0]
    assert "fetch it again" in problems[0]
    assert "\n" not in problems[0]


@pytest.mark.parametrize("keep", [0.1, 0.5, 0.95])
def test_truncated_tiff(tmp_path, keep):
    path = plain(tmp_path / "a.tif", noise(3, 200, 200), compress="deflate")
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * keep)])
    with pytest.raises(RasterError) as error:
        read_raster(path)
    assert str(path) in one_line(error)


def test_zero_bytes(tmp_path):
    (tmp_path / "a.tif").touch()
    with pytest.raises(RasterError, match="0 bytes") as error:
        read_raster(tmp_path / "a.tif")
    one_line(error)


def test_missing(tmp_path):
    with pytest.raises(RasterError, match="does not exist") as error:
        read_raster(tmp_path / "a.tif")
    one_line(error)


def test_directory(tmp_path):
    with pytest.raises(RasterError, match="cannot be read") as error:
        read_raster(tmp_path)
    one_line(error)


def test_text_file(tmp_path):
    (tmp_path / "a.tif").write_text("not a raster\n")
    with pytest.raises(RasterError, match="cannot be read as a raster") as error:
        read_raster(tmp_path / "a.tif")
    one_line(error)


def test_no_crs(tmp_path):
    plain(tmp_path / "a.tif", noise(1, 9, 9), crs=None)
    with open_raster(tmp_path / "a.tif") as raster, pytest.raises(RasterError, match="has no CRS") as error:
        _ = raster.grid
    one_line(error)


def test_no_geotransform(tmp_path):
    plain(tmp_path / "a.tif", noise(1, 9, 9), transform=None)
    with open_raster(tmp_path / "a.tif") as raster, pytest.raises(RasterError, match="has no geotransform") as error:
        _ = raster.grid
    one_line(error)


def test_mixed_data_types(tmp_path):
    plain(tmp_path / "a.tif", noise(1, 8, 8))
    plain(tmp_path / "b.tif", noise(1, 8, 8, dtype="uint16"))
    band = (
        '<VRTRasterBand dataType="{}" band="{}"><SimpleSource><SourceFilename relativeToVRT="1">{}</SourceFilename>'
        "<SourceBand>1</SourceBand></SimpleSource></VRTRasterBand>"
    )
    (tmp_path / "a.vrt").write_text(
        '<VRTDataset rasterXSize="8" rasterYSize="8">' + band.format("Byte", 1, "a.tif")
        + band.format("UInt16", 2, "b.tif") + "</VRTDataset>"
    )  # fmt: skip
    with open_raster(tmp_path / "a.vrt") as raster, pytest.raises(RasterError, match="mixes data types") as error:
        raster.read(0, 0, (8, 8))
    one_line(error)


# --- writing -------------------------------------------------------------------------------------------------------------


def test_everything_written_comes_back(tmp_path):
    data = noise(2, 30, 40, dtype="float32")
    data[:, 3, 4] = np.nan
    write_raster(
        tmp_path / "a.tif", data, grid=grid(30, 40), nodata=math.nan, band_names=("height_m", "error_m"), units=("m", "m"),
        tags={"MADE": "today"},
    )  # fmt: skip
    with open_raster(tmp_path / "a.tif") as raster:
        assert raster.grid == grid(30, 40)
        assert math.isnan(raster.nodata)
        assert raster.band_names == ("height_m", "error_m")
        assert raster.units == ("m", "m")
        assert raster.tags["MADE"] == "today"
        pixels = raster.read(0, 0, raster.shape)
    np.testing.assert_array_equal(pixels.data, data)
    assert np.argwhere(~pixels.valid).tolist() == [[3, 4]]
    assert [p.name for p in tmp_path.iterdir()] == ["a.tif"]


def test_validity_is_kept_beside_the_values(tmp_path):
    data, valid = noise(3, 30, 40), np.random.default_rng(1).random((30, 40)) < 0.5
    write_raster(tmp_path / "a.tif", data, grid=grid(30, 40), valid=valid)
    pixels, _ = read_raster(tmp_path / "a.tif")
    np.testing.assert_array_equal(pixels.data, data)
    np.testing.assert_array_equal(pixels.valid, valid)
    assert [p.name for p in tmp_path.iterdir()] == ["a.tif"]


def write_half(path, problem):
    with create_raster(path, grid=grid(9, 9), count=1, dtype="uint8") as writer:
        writer.write(0, noise(1, 4, 9))
        raise problem


@pytest.mark.parametrize("problem", [ValueError, KeyboardInterrupt, RasterError, OSError])
def test_an_interrupted_write_leaves_nothing(tmp_path, problem):
    with pytest.raises((problem, RasterError)):
        write_half(tmp_path / "a.tif", problem("stop"))
    assert not list(tmp_path.iterdir())


def test_an_interrupted_write_keeps_the_old_file(tmp_path):
    write_raster(tmp_path / "a.tif", noise(1, 9, 9), grid=grid(9, 9))
    before = (tmp_path / "a.tif").read_bytes()
    with pytest.raises(ValueError, match="stop"):
        write_half(tmp_path / "a.tif", ValueError("stop"))
    assert (tmp_path / "a.tif").read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["a.tif"]


def test_a_missing_folder_is_said(tmp_path):
    with pytest.raises(RasterError, match="cannot write") as error:
        write_raster(tmp_path / "no" / "a.tif", noise(1, 9, 9), grid=grid(9, 9))
    one_line(error)


def test_full_disk(tmp_path, small_disk):
    """Sizes from well below the disk to well above; between them is one where only the end of the file does not fit."""
    disk = small_disk(128 << 10)
    data = np.random.default_rng(0).random((1, 400, 400), np.float32)
    outcomes, messages = [], []
    for rows in (*range(60, 101), 400):
        try:
            write_raster(disk / "a.tif", data[:, :rows], grid=grid(rows, 400))
        except RasterError as error:
            messages.append(str(error))
            outcomes.append(False)
            assert not list(disk.iterdir())
        else:
            np.testing.assert_array_equal(read_raster(disk / "a.tif")[0].data, data[:, :rows])
            (disk / "a.tif").unlink()
            outcomes.append(True)
    assert outcomes[0]
    assert not outcomes[-1]
    assert all("free disk space" in message and "\n" not in message for message in messages)


def test_a_disk_full_at_the_very_end(small_disk):
    """The directory of an uncompressed file is written when it is closed, and GDAL is silent when it does not fit."""
    disk = small_disk(128 << 10)  # 131072 bytes
    data = np.ones((1, 1, 32_690), np.float32)
    failed = []
    for cols in (32_000, 32_600, 32_640, 32_680, 32_690):
        try:
            with create_raster(
                disk / "a.tif", grid=grid(1, cols), count=1, dtype="float32", tiled=False, compress="none"
            ) as writer:
                writer.write(0, data[:, :, :cols])
        except RasterError:
            failed.append(cols)
            assert not list(disk.iterdir())
        else:
            assert (read_raster(disk / "a.tif")[0].data == 1).all()
            (disk / "a.tif").unlink()
    assert failed, "the disk was never full"
    assert max(failed) * 4 < 128 << 10, "the pixels alone fit"


# --- warping -------------------------------------------------------------------------------------------------------------


def plane(target, east=0.3, south=0.7):
    """A linear function of the coordinates at the pixels' centres."""
    rows, cols = target.shape
    x, y = target.xy(np.arange(cols)[None, :] + 0.5, np.arange(rows)[:, None] + 0.5)
    return (50 + east * (x - 500_000) - south * (y - 4_878_000) + 0 * x * y).astype(np.float32)


def test_a_whole_pixel_shift_moves_the_pixels():
    data = noise(2, 60, 70)
    pixels = Pixels(data=data, valid=np.ones((60, 70), bool))
    out = warp(pixels, grid(60, 70), grid(60, 70).crop(5, -3, (40, 50)))
    np.testing.assert_array_equal(out.data[:, :, 3:], data[:, 5:45, :47])
    assert out.valid[:, 3:].all()
    assert not out.valid[:, :3].any()


def test_half_a_pixel_is_the_mean_of_two():
    data = noise(1, 20, 30, dtype="float32")
    out = warp(Pixels(data=data, valid=np.ones((20, 30), bool)), grid(20, 30), grid(20, 30).crop(0, 0.5, (20, 29)))
    np.testing.assert_allclose(out.data[0], (data[0, :, :-1] + data[0, :, 1:]) / 2, rtol=1e-6)


@pytest.mark.parametrize("gsd", [0.35, 0.6, 0.77, 1.5])
def test_a_plane_stays_a_plane(gsd):
    source = grid(300, 300)
    target = Grid(crs=UTM, transform=Affine(gsd, 0, 500_020.1, 0, -gsd, 4_877_980.3), shape=(60, 60))
    out = warp(Pixels(data=plane(source)[None], valid=np.ones((300, 300), bool)), source, target)
    assert out.valid.all()
    # Where pixels are merged, GDAL samples the kernel at whole source pixels: its centre is off by up to 0.1 px.
    np.testing.assert_allclose(out.data[0], plane(target), atol=2e-3 if gsd <= 0.6 else 0.1 * gsd)


def test_a_plane_stays_a_plane_across_crss():
    source = grid(400, 400, gsd=1.0, left=499_800.0, top=4_878_200.0)
    other = CRS.from_epsg(2992)  # Oregon, metres
    from pyproj import Transformer

    back = Transformer.from_crs(other, UTM, always_xy=True)
    x0, y0 = back.transform(500_000, 4_878_000, direction="INVERSE")
    target = Grid(crs=other, transform=Affine(1, 0, round(x0), 0, -1, round(y0)), shape=(90, 90))
    out = warp(Pixels(data=plane(source)[None], valid=np.ones((400, 400), bool)), source, target)
    cols, rows = np.meshgrid(np.arange(90) + 0.5, np.arange(90) + 0.5)
    x, y = back.transform(*target.xy(cols, rows))
    assert out.valid.all()
    np.testing.assert_allclose(out.data[0], 50 + 0.3 * (x - 500_000) - 0.7 * (y - 4_878_000), atol=0.02)


@given(seed=st.integers(0, 1000), gsd=st.sampled_from([0.35, 0.6, 0.9, 2.0]))
def test_constant_stays_constant_whatever_the_invalid_pixels_hold(seed, gsd):
    rng = np.random.default_rng(seed)
    valid = rng.random((50, 50)) < 0.7
    data = np.where(valid, 77, rng.integers(0, 256, (50, 50))).astype("uint8")[None]
    target = Grid(crs=UTM, transform=Affine(gsd, 0, 499_999.1, 0, -gsd, 4_877_999.2), shape=(20, 20))
    out = warp(Pixels(data=data, valid=valid), grid(50, 50), target)
    assert out.valid.any()
    assert (out.data[:, out.valid] == 77).all()


def test_without_validity_invalid_pixels_would_show():
    """Negative control of the test above."""
    data = np.full((1, 50, 50), 77, "uint8")
    data[0, 20] = 255
    target = Grid(crs=UTM, transform=Affine(0.6, 0, 499_998.3, 0, -0.6, 4_877_999.8), shape=(40, 40))
    out = warp(Pixels(data=data, valid=np.ones((50, 50), bool)), grid(50, 50), target)
    assert (out.data[:, out.valid] != 77).any()


def test_a_cubic_kernel_does_not_wrap_around():
    data = np.zeros((1, 40, 40), "uint8")
    data[0, :, 20:] = 255
    target = Grid(crs=UTM, transform=Affine(0.6, 0, 499_998.2, 0, -0.6, 4_878_000), shape=(40, 39))
    out = warp(Pixels(data=data, valid=np.ones((40, 40), bool)), grid(40, 40), target, resampling=Resampling.cubic)
    assert (out.data[0, 5:-5, 5:15] == 0).all()
    assert (out.data[0, 5:-5, 25:35] == 255).all()
    assert (np.diff(out.data[0, 20, 5:-5].astype(int)) >= 0).all()


# --- alpha, sidecars, damage that a header shows, many files ---------------------------------------------------------------


def test_alpha_is_no_mask_where_it_is_data(tmp_path):
    data = noise(4, 40, 50)
    data[3, 5:9] = 0
    path = plain(tmp_path / "a.tif", data, alpha=True, photometric="rgb")
    usable = data[3] > 0
    with open_raster(path) as raster:
        assert raster.alpha_band == 4
        np.testing.assert_array_equal(raster.read(0, 0, (40, 50)).valid, usable)
        assert raster.read(0, 0, (40, 50), alpha_is_mask=False).valid.all()
        for bands in ((4,), (1, 4)):  # asked for, it is data
            pixels = raster.read(0, 0, (40, 50), bands)
            assert pixels.valid.all()
            np.testing.assert_array_equal(pixels.data, data[[b - 1 for b in bands]])


def test_alpha_hides_beside_a_nodata_value(tmp_path):
    """GDAL's own mask forgets the alpha band of a file that declares a nodata value as well."""
    data = noise(4, 40, 50)
    data[3], data[:3, 20:30] = np.where(np.arange(50) < 10, 0, 255), 255
    path = plain(tmp_path / "a.tif", data, alpha=True, photometric="rgb", nodata=255)
    with open_raster(path) as raster:
        valid = raster.read(0, 0, (40, 50)).valid
    np.testing.assert_array_equal(valid, (data[:3] != 255).any(axis=0) & (data[3] > 0))


@pytest.mark.parametrize("layout", [{}, {"tiled": True, "blockxsize": 64, "blockysize": 64}])
def test_a_sample_of_alpha_reaches_from_corner_to_corner(tmp_path, layout):
    data = np.zeros((4, 700, 900), np.uint8)
    for number, place in enumerate([(0, 0), (0, 899), (699, 0), (699, 899)], start=1):
        data[(3, *place)] = number
    with open_raster(plain(tmp_path / "a.tif", data, alpha=True, photometric="rgb", **layout)) as raster:
        sample = raster.alpha_sample()
    assert set(sample) == {0, 1, 2, 3, 4}
    assert sample.size < 0.5 * data[3].size
    with open_raster(plain(tmp_path / "b.tif", data)) as raster:
        assert raster.alpha_sample().size == 0


def test_the_crs_of_a_sidecar(tmp_path):
    path = jpeg(tmp_path / "a.jpg")
    for name, wkt in (("a.prj", "WKT1_ESRI"), ("a.PRJ", "WKT2_2019")):
        (tmp_path / name).write_text(UTM.to_wkt(wkt) + "\n")
        with open_raster(path) as raster:
            assert raster.grid.crs == UTM
            assert raster.grid.crs.to_epsg() == 32610
        (tmp_path / name).unlink()
    (tmp_path / "a.prj").write_bytes(b"\xff\xfe\x00")
    with open_raster(path) as raster, pytest.raises(RasterError, match="no CRS that PROJ can read") as error:
        _ = raster.grid
    one_line(error)


def test_a_file_s_own_crs_counts_more_than_a_sidecar(tmp_path):
    path = plain(tmp_path / "a.tif", noise(1, 9, 9))
    path.with_suffix(".prj").write_text(CRS.from_epsg(2154).to_wkt())
    with open_raster(path) as raster:
        assert raster.grid.crs == UTM


@pytest.mark.parametrize("interleave", ["pixel", "band"])
@pytest.mark.parametrize("missing", [0, 1, 3000])
def test_a_tiff_that_ends_too_early_is_told_by_its_header(tmp_path, interleave, missing):
    data = noise(3, 200, 200)
    path = plain(tmp_path / "a.tif", data, interleave=interleave, tiled=True, blockxsize=64, blockysize=64)
    path.write_bytes(path.read_bytes()[: path.stat().st_size - missing])
    with open_raster(path) as raster:
        if not missing:
            raster.check_complete()
            return
        with pytest.raises(RasterError, match="cut short") as error:
            raster.check_complete()
        one_line(error)


def test_a_sparse_tiff_is_complete(tmp_path):
    """Blocks that were never written have no place in the file."""
    blocks = {"tiled": True, "blockxsize": 64, "blockysize": 64, "SPARSE_OK": "YES"}
    path = plain(tmp_path / "a.tif", np.zeros((1, 200, 200), np.uint8), **blocks)
    with open_raster(path) as raster:
        raster.check_complete()


def test_a_pool_keeps_few_files_open(tmp_path):
    paths = [plain(tmp_path / f"{n}.tif", noise(1, 9, 9, seed=n)) for n in range(5)]
    with RasterPool(3) as pool:
        first = pool.get(paths[0])
        assert pool.get(paths[0]) is first
        for path in paths[1:3]:
            pool.get(path)
        pool.get(paths[0])  # now the last used
        others = [pool.get(path) for path in paths[3:]]
        assert pool.get(paths[0]) is first
        assert [raster._dataset.closed for raster in (first, *others)] == [False, False, False]
        again = pool.get(paths[1])
        np.testing.assert_array_equal(again.read(0, 0, (9, 9)).data, noise(1, 9, 9, seed=1))
        assert others[0]._dataset.closed, "the one that was used longest ago makes place"
    assert all(raster._dataset.closed for raster in (first, again, *others))


def test_a_pool_keeps_overviews_apart_from_their_raster(tmp_path):
    path = plain(tmp_path / "a.tif", noise(1, 64, 64))
    with rasterio.open(path, "r+") as dataset:
        dataset.build_overviews([2], Resampling.average)
    with RasterPool(2) as pool:
        assert [pool.get(path, overview=level).shape for level in (None, 0, None)] == [(64, 64), (32, 32), (64, 64)]


def test_a_pool_says_what_cannot_be_opened_and_goes_on(tmp_path):
    path = plain(tmp_path / "a.tif", noise(1, 9, 9))
    with RasterPool(2) as pool:
        with pytest.raises(RasterError, match="does not exist"):
            pool.get(tmp_path / "b.tif")
        assert pool.get(path).shape == (9, 9)


def test_a_truncated_jpeg_opened_and_read_in_another_thread(tmp_path):
    """GDAL's options belong to a thread; without them the missing rows would come back grey."""
    path = jpeg(tmp_path / "a.jpg")
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])

    def opened():
        pool = RasterPool(1)
        return pool.get(path)

    with ThreadPoolExecutor(1) as one, ThreadPoolExecutor(1) as other:
        raster = one.submit(opened).result()
        with pytest.raises(RasterError, match="fetch it again"):
            other.submit(raster.read, 150, 0, (50, 200)).result()
        raster.close()

"""Heights from rasters: known surfaces and terrains in every unit, real models against their producer's difference."""

import numpy as np
import pytest
import rasterio
from affine import Affine
from pyproj import CRS

from canopy.errors import GridError, RasterError
from canopy.grid import Box, Grid, Lattice
from canopy.raster import write_raster
from canopy.tiler.heights import dsm_minus_dtm, open_chm, open_dsm_minus_dtm, read_chm

UTM = CRS.from_epsg(32610)
LATTICE = Lattice(crs=UTM, gsd_m=0.5)
BOX = Box(-9_000_120, 1_000_000, -9_000_000, 1_000_160)
GRID = LATTICE.grid(BOX)
FOOT = 0.3048


def crowns_m(shape=BOX.shape):
    """Trees of up to 20 m, open ground between, no symmetry."""
    row, col = np.indices(shape)
    return np.maximum(0, 20 * np.sin(row / 9.0) * np.cos(col / 13.0 + 0.4)).astype(np.float32)


def terrain_m(shape=BOX.shape):
    row, col = np.indices(shape)
    return (700 + 0.3 * col - 0.1 * row).astype(np.float32)


def write(path, values, grid=GRID, *, nodata=np.nan, units=()):
    write_raster(path, np.asarray(values)[None], grid=grid, nodata=nodata, units=units)
    return path


def models(folder, height_m=None, **how):
    height_m = crowns_m() if height_m is None else height_m
    return write(folder / "dsm.tif", terrain_m() + height_m, **how), write(folder / "dtm.tif", terrain_m())


# --- surface minus terrain -----------------------------------------------------------------------------------------------


def test_difference_of_models_on_the_lattice(tmp_path):
    heights = dsm_minus_dtm(*models(tmp_path), GRID)
    np.testing.assert_allclose(heights.height_m, crowns_m(), atol=2e-4)
    assert heights.height_m.dtype == np.float32
    assert heights.valid.all()
    # The control: models the other way round.
    with pytest.raises(RasterError, match=r"below -2 m; are they swapped"):
        dsm_minus_dtm(*reversed(models(tmp_path)), GRID)


def test_models_of_different_pixels_keep_the_slope_apart(tmp_path):
    """A terrain in pixels of 3 m, off the lattice, under a surface of 0.5 m: on a slope nothing of its pixels may show."""
    dsm, _ = models(tmp_path, np.zeros(BOX.shape, np.float32))
    left, bottom, right, top = GRID.bounds
    coarse = Grid(
        crs=UTM, transform=Affine(3.0, 0, left - 10.7, 0, -3.0, top + 10.3),
        shape=(int((top - bottom) / 3) + 8, int((right - left) / 3) + 8),
    )  # fmt: skip
    rows, cols = np.indices(coarse.shape)
    x, y = coarse.xy(cols + 0.5, rows + 0.5)
    there = 700 + 0.3 * ((x - left) / 0.5 - 0.5) - 0.1 * ((top - y) / 0.5 - 0.5)
    dtm = write(tmp_path / "coarse.tif", there.astype(np.float32), coarse)
    heights = dsm_minus_dtm(dsm, dtm, GRID)
    assert heights.valid.mean() > 0.99
    assert np.nanmax(heights.height_m) < 0.01
    # The control: the nearest pixel of the terrain is off by up to half of 3 m times the slope of 60 %.
    col, row = coarse.pixel(*GRID.xy(*np.meshgrid(np.arange(160) + 0.5, np.arange(120) + 0.5)))
    nearest = terrain_m() - there[np.floor(row).astype(int), np.floor(col).astype(int)]
    assert np.abs(nearest).max() > 0.5


def test_small_negatives_are_zero_and_large_ones_and_spikes_unknown(tmp_path):
    height_m = crowns_m()
    height_m[:4, :10] = -0.7
    height_m[6, :12] = -30.0
    height_m[8, :3] = 3191.0
    known = dsm_minus_dtm(*models(tmp_path, height_m), GRID)
    assert (known.negative_set_to_0, known.too_low, known.too_high) == (40, 12, 3)
    assert (known.height_m[:4, :10] == 0).all()
    assert np.isnan(known.height_m[6, :12]).all()
    assert np.isnan(known.height_m[8, :3]).all()
    np.testing.assert_array_equal(known.valid, np.isfinite(known.height_m))
    assert (~known.valid).sum() == 15


@pytest.mark.parametrize(
    ("tag", "option", "unit_m"), [("ft", None, FOOT), ("US survey foot", None, 1200 / 3937), ("", FOOT, FOOT)]
)
def test_units_of_each_model(tmp_path, tag, option, unit_m):
    dsm = write(tmp_path / "dsm.tif", (terrain_m() + crowns_m()) / np.float32(unit_m), units=(tag,) if tag else ())
    dtm = write(tmp_path / "dtm.tif", terrain_m())
    heights = dsm_minus_dtm(dsm, dtm, GRID, dsm_unit_m=option)
    np.testing.assert_allclose(heights.height_m, crowns_m(), atol=2e-3)
    # The control: taken for metres it is refused.
    with pytest.raises(RasterError, match="dsm_unit_m"):
        dsm_minus_dtm(dsm, dtm, GRID, dsm_unit_m=1.0)


def test_a_height_is_unknown_where_either_model_is(tmp_path):
    surface, terrain = terrain_m() + crowns_m(), terrain_m()
    surface[:10], terrain[:, :20] = np.nan, np.nan
    heights = dsm_minus_dtm(write(tmp_path / "s.tif", surface), write(tmp_path / "t.tif", terrain), GRID)
    expected = np.ones(BOX.shape, bool)
    expected[:10] = expected[:, :20] = False
    np.testing.assert_array_equal(heights.valid, expected)


def test_models_apart(tmp_path):
    dsm, _ = models(tmp_path)
    far = write(tmp_path / "far.tif", terrain_m(), GRID.crop(0, 100_000, BOX.shape))
    with pytest.raises(RasterError, match="no pixel in common"):
        dsm_minus_dtm(dsm, far, GRID)


# --- canopy height models -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("dtype", "unit_m", "tag"),
    [("float32", 1.0, ""), ("uint8", 1.0, ""), ("float32", FOOT, "ft"), ("int16", 0.1, ""), ("uint16", 0.01, "cm")],
)
def test_chm_in_any_unit(tmp_path, dtype, unit_m, tag):
    values = crowns_m() / unit_m
    chm = write(tmp_path / "chm.tif", values.astype(dtype), nodata=None, units=(tag,) if tag else ())
    heights = read_chm(chm, GRID, height_unit_m=None if unit_m == 1 or tag else unit_m)
    np.testing.assert_allclose(heights.height_m, crowns_m(), atol=unit_m if dtype != "float32" else 1e-4)


def test_chm_in_a_suspicious_unit_is_refused(tmp_path):
    feet = write(tmp_path / "feet.tif", crowns_m() * 3 / np.float32(FOOT))
    with pytest.raises(RasterError, match=r"above 120 m, the highest 19\d m; give height_unit_m, for example 0.3048"):
        read_chm(feet, GRID)
    integers = write(tmp_path / "dm.tif", (crowns_m() * 3).astype(np.uint16), nodata=None)  # at most 60, no sign of itself
    with pytest.raises(RasterError, match=r"uint16 and names no unit.*give height_unit_m, 1, 0.1 or 0.01"):
        read_chm(integers, GRID)
    fathoms = write(tmp_path / "fathoms.tif", crowns_m(), units=("fathom",))
    with pytest.raises(RasterError, match=r"unit 'fathom' of the values is not known; give height_unit_m"):
        read_chm(fathoms, GRID)
    with pytest.raises(RasterError, match=r"height_unit_m = -1 must be a finite number above 0"):
        read_chm(integers, GRID, height_unit_m=-1)
    # The control: a few spikes are no unit, they are unknown and counted.
    spiky = crowns_m()
    spiky[3, :5] = 3191
    assert read_chm(write(tmp_path / "spiky.tif", spiky), GRID).too_high == 5


def test_crs_in_feet_does_not_tell_the_unit_of_the_values(tmp_path):
    grid = Grid(crs=CRS.from_epsg(2994), transform=Affine(3, 0, 640_000, 0, -3, 862_000), shape=(50, 50))
    chm = write(tmp_path / "chm.tif", crowns_m((50, 50)), grid)
    with pytest.raises(RasterError, match="not in metres; give height_unit_m"), open_chm(chm, LATTICE):
        pass


def test_heights_do_not_depend_on_the_box(tmp_path):
    turned = Grid(crs=UTM, transform=GRID.transform @ Affine.rotation(7) @ Affine.scale(1.3), shape=(90, 110))
    chm = write(tmp_path / "chm.tif", crowns_m((90, 110)), turned)
    dsm = write(tmp_path / "dsm.tif", crowns_m((90, 110)) + 50, turned)
    dtm = write(tmp_path / "dtm.tif", np.full((90, 110), 50, np.float32), turned)
    with open_chm(chm, LATTICE) as source, open_dsm_minus_dtm(dsm, dtm, LATTICE) as difference:
        assert source.resampled == "bilinear"
        whole = source.read(source.box).height_m
        part = Box(source.box.row0 + 31, source.box.col0 + 17, source.box.row0 + 90, source.box.col0 + 95)
        np.testing.assert_array_equal(source.read(part).height_m, whole[31:90, 17:95])
        np.testing.assert_allclose(difference.read(part).height_m, whole[31:90, 17:95], atol=1e-3)


def test_grid_off_the_lattice(tmp_path):
    chm = write(tmp_path / "chm.tif", crowns_m())
    with pytest.raises(GridError, match="not on a lattice"):
        read_chm(chm, Grid(crs=UTM, transform=GRID.transform @ Affine.translation(0.3, 0), shape=(10, 10)))


# --- real models ---------------------------------------------------------------------------------------------------------


def test_difference_of_real_models_is_the_producers(samples):
    """New Zealand: surface, terrain and canopy model of one producer, who made the third not quite from the others.

    Pixel by pixel in their own files the median difference is 0.003 m and the 99 % limits are -2.0 and 1.2 m.
    """
    folder = samples / "lidar" / "nz_wellington"
    lattice = Lattice(crs=CRS.from_epsg(2193), gsd_m=1.0)
    with (
        open_chm(folder / "CHM.tif", lattice) as chm,
        open_dsm_minus_dtm(folder / "DSM.tif", folder / "DTM.tif", lattice) as difference,
    ):
        theirs, ours = chm.read(chm.box), difference.read(chm.box)
    both = ours.valid & theirs.valid
    assert both.mean() > 0.98
    error_m = np.abs(ours.height_m - theirs.height_m)[both]
    assert np.median(error_m) < 0.1
    assert np.percentile(error_m, 99) < 2
    # The control: one pixel to the side.
    shifted_m = np.abs(ours.height_m - np.roll(theirs.height_m, 1, axis=0))[both]
    assert np.nanmedian(shifted_m) > 0.5
    assert np.nanpercentile(shifted_m, 99) > 5


def test_chm_without_crs_is_refused(samples):
    paths = sorted((samples / "reference" / "brazil_chm_no_crs").glob("*.tif"))
    assert paths, "the sample folder has no CHM without CRS"
    with rasterio.open(paths[0]) as dataset:
        assert dataset.crs is None
    with pytest.raises(RasterError, match="no CRS"), open_chm(paths[0], LATTICE):
        pass

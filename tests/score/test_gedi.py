"""GEDI L2A: a real granule against plain h5py, every filter alone, and whatever can be wrong with a file."""

import gzip
import zipfile
from datetime import date

import h5py
import numpy as np
import pytest
from affine import Affine
from pydantic import ValidationError
from pyproj import CRS, Transformer

from canopy.errors import SourceError
from canopy.grid import Grid
from canopy.raster import write_raster
from canopy.score import References, score_map, sieve
from canopy.score.footprint import EDGE, OUTSIDE, UNKNOWN, WGS84, sample_footprints
from canopy.score.gedi import (
    COVERAGE,
    DAY,
    DEGRADED,
    GROUND,
    LEAF_OFF,
    LEAF_UNKNOWN,
    NO_TERRAIN,
    POWER_BEAMS,
    QUALITY,
    SENSITIVITY,
    GediSettings,
    read_gedi,
)
from tests.score.granules import seconds, write_gedi

ALL = ("BEAM0000", "BEAM0001", "BEAM0010", "BEAM0011", *POWER_BEAMS)
EVERYTHING = GediSettings(
    power_beams=False, quality=False, not_degraded=False, least_sensitivity=0, night=False, leaf_on=False,
    most_ground_gap_m=float("inf"),
)  # fmt: skip


@pytest.fixture(scope="module")
def granule(samples, tmp_path_factory):
    """The real granule, unpacked: a subset of version 1 of the product, Cerrado 2019-04-18, without leaf-off flags."""
    folder = tmp_path_factory.mktemp("gedi")
    (archive,) = (samples / "reference" / "gedi").glob("*.zip")
    with zipfile.ZipFile(archive) as packed:
        packed.extractall(folder)
    (path,) = folder.glob("*.h5")
    return path


@pytest.fixture(scope="module")
def real(granule):
    return read_gedi(granule)


# --- the real granule


def test_the_real_granule_counts_as_plain_h5py_does(granule, real):
    beams, left = 0, []
    with h5py.File(granule) as file:
        names = [name for name in file if name.startswith("BEAM")]
        read = sum(len(file[name]["shot_number"]) for name in names)
        for name in names:
            beam = file[name]
            if beam.attrs["description"][0] != "Full power beam":
                beams += len(beam["shot_number"])
                continue
            good = (beam["quality_flag"][:] == 1) & (beam["degrade_flag"][:] == 0) & (beam["sensitivity"][:] >= 0.95)
            good &= beam["solar_elevation"][:] < 0
            good &= np.abs(beam["digital_elevation_model"][:] - beam["elev_lowestmode"][:]) < 150
            left.extend(
                zip(beam["shot_number"][good].astype(str), beam["rh"][good, 98], beam["lon_lowestmode"][good], strict=True)
            )
    shots = real
    assert (shots.read, len(shots)) == (read, len(left)) == (301, 188)
    assert shots.dropped[COVERAGE] == beams == 113
    assert sum(shots.dropped.values()) == beams
    assert sorted(zip(shots.id, shots.height_m, shots.x, strict=True)) == sorted(left)
    assert set(shots.date.astype(str)) == {"2019-04-18"}
    assert shots.account() == "of 301 shots: 113 of coverage beams; 188 left"
    assert len(shots.notes) == 2
    assert "version 1 of the product" in shots.notes[0]
    assert shots.notes[1].startswith("188 shots kept without a leaf-off flag")
    # The control: all that night and flags leave to the weaker beams fails by sensitivity.
    weak = read_gedi(granule, GediSettings(power_beams=False))
    assert (len(weak), weak.dropped[SENSITIVITY]) == (188 + 59, 54)


def test_the_real_granule_in_parts(granule, real):
    """The rows of a rectangle are those of the whole; and by 99 % of sensitivity hardly a shot is good enough."""
    shots = real
    bounds = (-44.13, -13.735, -44.12, -13.725)
    part = read_gedi(granule, GediSettings(bounds_deg=bounds))
    lon, lat = shots.lonlat_deg
    inside = (lon >= bounds[0]) & (lon <= bounds[2]) & (lat >= bounds[1]) & (lat <= bounds[3])
    assert 0 < inside.sum() < len(shots)
    np.testing.assert_array_equal(part.id, shots.id[inside])
    np.testing.assert_array_equal(part.height_m, shots.height_m[inside])
    assert part.read == 301
    assert part.dropped[sieve.OUTSIDE_AREA] + part.dropped[COVERAGE] + len(part) == 301
    nothing = read_gedi(granule, GediSettings(bounds_deg=(10.0, 10.0, 11.0, 11.0)))
    assert (len(nothing), nothing.dropped[sieve.OUTSIDE_AREA], nothing.shape) == (0, 301, "none")
    assert len(read_gedi(granule, GediSettings(least_sensitivity=0.99))) == 0


def test_the_real_granule_and_a_map_of_its_heights(real, tmp_path):
    """A map with a stand of each shot's RH98 around it scores without an error; moved by 35 m it does not."""
    shots = real
    crs = CRS.from_epsg(32723)
    x, y = Transformer.from_crs(shots.crs, crs, always_xy=True).transform(shots.x, shots.y)
    left, top = np.floor(x.min()) - 50, np.ceil(y.max()) + 50
    shape = (int((top - y.min() + 50) / 2), int((x.max() - left + 50) / 2))
    grid = Grid(crs=crs, transform=Affine(2.0, 0, left, 0, -2.0, top), shape=shape)
    height_m = np.zeros(grid.shape, np.float32)
    for rh, col, row in zip(shots.height_m, *grid.pixel(x, y), strict=True):
        part = (slice(int(row) - 9, int(row) + 10), slice(int(col) - 9, int(col) + 10))
        height_m[part] = rh
    write_raster(tmp_path / "map.tif", height_m[None], grid=grid, nodata=np.nan)
    result = sample_footprints(tmp_path / "map.tif", shots)
    assert result.heights().n == 188
    assert result.heights().mae_m < 1e-6
    assert sample_footprints(tmp_path / "map.tif", shots, east_m=35.0).heights().mae_m > 4


# --- every filter alone


FILTERS = {
    QUALITY: ({"quality_flag": [1, 0, 1]}, {"quality": False}),
    DEGRADED: ({"degrade_flag": [0, 3, 0]}, {"not_degraded": False}),
    SENSITIVITY: ({"sensitivity": [0.97, 0.94, 0.97]}, {"least_sensitivity": 0.9}),
    DAY: ({"solar_elevation": [-20, 0.0, -1]}, {"night": False}),
    LEAF_OFF: ({"leaf_off_flag": [0, 1, 0]}, {"leaf_on": False}),
    GROUND: ({"digital_elevation_model": [800, 952.0, 800]}, {"most_ground_gap_m": 150.1}),
    NO_TERRAIN: ({"digital_elevation_model": [800, -999999.0, 800]}, {"most_ground_gap_m": float("inf")}),
    sieve.OUTSIDE_DATES: (
        {"delta_time": [seconds("2020-07-15"), seconds("2020-07-16"), seconds("2020-07-15T23:59:59")]},
        {"until": date(2020, 7, 16)},
    ),
    sieve.OUTSIDE_AREA: ({"lon_lowestmode": [-123, -122, -123]}, {"bounds_deg": (-124.0, 43.0, -121.0, 45.0)}),
}  # fmt: skip
ASKED = {"bounds_deg": (-124.0, 43.0, -122.5, 45.0), "since": date(2020, 7, 15), "until": date(2020, 7, 15)}


@pytest.mark.parametrize("reason", FILTERS)
def test_a_filter_and_only_it_drops_a_shot(tmp_path, reason):
    fields, without = FILTERS[reason]
    path = write_gedi(tmp_path / "g.h5", **fields)
    shots = read_gedi(path, GediSettings(**ASKED))
    assert {name: count for name, count in shots.dropped.items() if count} == {reason: 1}
    assert list(shots.height_m) == [np.float32(29.4), np.float32(31.4)]
    # The control: without the filter, or a little milder, the shot is there.
    assert len(read_gedi(path, GediSettings(**{**ASKED, **without}))) == 3


def test_coverage_beams_and_only_they_are_dropped(tmp_path):
    path = write_gedi(tmp_path / "g.h5", ALL)
    shots = read_gedi(path)
    assert {name: count for name, count in shots.dropped.items() if count} == {COVERAGE: 12}
    assert [name.rpartition("/")[2] for name in np.array(shots.tracks)[np.unique(shots.track)]] == list(POWER_BEAMS)
    assert len(read_gedi(path, GediSettings(power_beams=False))) == 24


@pytest.mark.parametrize(("height", "reason"), [(np.nan, sieve.NO_HEIGHT), (121.0, sieve.TOO_HIGH)])
def test_heights_that_are_none_are_dropped(tmp_path, height, reason):
    rh = np.full((3, 101), 20.0)
    rh[1, 98] = height
    shots = read_gedi(write_gedi(tmp_path / "g.h5", rh=rh), EVERYTHING)
    assert {name: count for name, count in shots.dropped.items() if count} == {reason: 1}


def test_a_shot_is_counted_by_the_first_filter_that_drops_it(tmp_path):
    shots = read_gedi(write_gedi(tmp_path / "g.h5", sensitivity=0.5, quality_flag=[1, 0, 1], solar_elevation=10))
    assert {name: count for name, count in shots.dropped.items() if count} == {QUALITY: 1, SENSITIVITY: 2}
    assert list(shots.dropped) == [
        sieve.OUTSIDE_AREA, COVERAGE, QUALITY, DEGRADED, SENSITIVITY, DAY, LEAF_OFF, NO_TERRAIN, GROUND,
        sieve.NO_HEIGHT, sieve.TOO_HIGH, sieve.TWICE,
    ]  # fmt: skip
    # Filters that are not asked for are not in the account.
    assert list(read_gedi(tmp_path / "g.h5", EVERYTHING).dropped) == [
        sieve.OUTSIDE_AREA, sieve.NO_HEIGHT, sieve.TOO_HIGH, sieve.TWICE,
    ]  # fmt: skip
    assert shots.account() == f"of 3 shots: 1 {QUALITY}, 2 {SENSITIVITY}; 0 left"


def test_unknown_leaves(tmp_path):
    path = write_gedi(tmp_path / "g.h5", leaf_off_flag=[0, 255, 1])
    kept = read_gedi(path)
    assert (len(kept), kept.dropped[LEAF_OFF]) == (2, 1)
    assert kept.notes == ("1 shots kept without a leaf-off flag: nobody says whether the trees had leaves",)
    dropped = read_gedi(path, GediSettings(leaf_unknown="drop"))
    assert (len(dropped), dropped.dropped[LEAF_UNKNOWN], dropped.notes) == (1, 1, ())
    # A flag that nobody asks for is not missed.
    assert read_gedi(path, GediSettings(leaf_on=False)).notes == ()


def test_nan_fails_every_filter_that_needs_the_number(tmp_path):
    path = write_gedi(
        tmp_path / "g.h5",
        sensitivity=[np.nan, 0.97, 0.97],
        solar_elevation=[-9, np.nan, -9],
        delta_time=[seconds("2020-07-15"), seconds("2020-07-15"), np.nan],
    )
    shots = read_gedi(path, GediSettings(since=date(2020, 1, 1)))
    assert (len(shots), shots.dropped[SENSITIVITY], shots.dropped[DAY], shots.dropped[sieve.OUTSIDE_DATES]) == (0, 1, 1, 1)
    assert np.isnat(read_gedi(path, EVERYTHING).date[2])


# --- what a shot is


def test_a_shot_is_rh98_of_its_place_and_day(tmp_path):
    shots = read_gedi(write_gedi(tmp_path / "g.h5", delta_time=seconds("2019-12-31T23:59:59.5")))
    assert list(shots.id) == ["196405000000000000", "196405000000000001", "196405000000000002"]
    np.testing.assert_allclose(shots.height_m, [29.4, 30.4, 31.4], rtol=1e-6)
    np.testing.assert_allclose(shots.lonlat_deg[1], [44.0, 44.0004, 44.0008])
    assert str(shots.date[0]) == "2019-12-31"
    assert (shots.statistic, shots.shape, shots.source) == ("p98", "disc of 12 m radius", "GEDI L2A RH98")
    assert shots.notes == ()
    top = read_gedi(tmp_path / "g.h5", GediSettings(rh=100, radius_m=12.5))
    assert (top.statistic, top.source, top.height_m[0], top.radius_m[0]) == ("p100", "GEDI L2A RH100", 30.0, 12.5)


def test_folders_and_files_given_twice(tmp_path):
    (tmp_path / "deep").mkdir()
    write_gedi(tmp_path / "a.h5", ["BEAM0101"])
    write_gedi(tmp_path / "deep" / "b.HDF5", ["BEAM0101", "BEAM0110"])  # overlaps: the same shots of BEAM0101
    (tmp_path / "readme.txt").write_text("not a granule")
    shots = read_gedi(tmp_path)
    assert (shots.read, len(shots), shots.dropped[sieve.TWICE]) == (9, 6, 3)
    assert read_gedi([tmp_path / "a.h5", tmp_path / "a.h5", tmp_path]).read == 9


def test_a_rectangle_across_the_antimeridian(tmp_path):
    path = write_gedi(tmp_path / "g.h5", lon_lowestmode=[179.99, -179.99, 170.0])
    shots = read_gedi(path, GediSettings(bounds_deg=(179.9, 40.0, 180.1, 50.0)))
    assert (len(shots), shots.dropped[sieve.OUTSIDE_AREA]) == (2, 1)


# --- in a score


def test_from_the_granule_to_the_score(tmp_path):
    """A map of 20 m with a gap and shots of 18 m: in it, in the gap, on its edge, beyond it, and one by day."""
    crs = CRS.from_epsg(32610)
    grid = Grid(crs=crs, transform=Affine(2.0, 0, 499_800, 0, -2.0, 4_873_000), shape=(400, 500))
    height_m = np.full(grid.shape, 20.0, np.float32)
    height_m[200:, 250:] = np.nan
    write_raster(tmp_path / "map.tif", height_m[None], grid=grid, nodata=np.nan, units=("m",))
    inside, gap, edge, beyond = (500_000, 4_872_800), (500_500, 4_872_300), (499_802, 4_872_500), (499_600, 4_872_500)
    x, y = np.transpose([inside, gap, edge, beyond, inside])
    lon, lat = Transformer.from_crs(crs, WGS84, always_xy=True).transform(x, y)
    path = write_gedi(
        tmp_path / "g.h5", ["BEAM0000", "BEAM0101"], count=5, lon_lowestmode=lon, lat_lowestmode=lat,
        rh=np.full((5, 101), 18.0), solar_elevation=[-9, -9, -9, -9, 9],
    )  # fmt: skip
    (comparison,) = score_map(tmp_path / "map.tif", References(gedi=(path,)), resamples=20).comparisons
    (score,) = comparison.maps
    assert (score.measures.n, score.n_missing) == (1, 1)
    assert score.measures.bias_m.value == pytest.approx(2.0, abs=1e-6)
    removed = {each.name: each.n for each in comparison.footprints.removed if each.n}
    assert removed == {COVERAGE: 5, DAY: 1, EDGE: 1, UNKNOWN: 1, OUTSIDE: 1}
    assert comparison.footprints.n_read == 10 == 1 + sum(removed.values())


# --- what can be wrong


@pytest.mark.parametrize("product", ["GEDI_L2B", "GEDI_L4A", "GEDI_L1B", "ATL08"])
def test_another_product_is_refused(tmp_path, product):
    with pytest.raises(SourceError, match=f"is of the product {product}, not GEDI_L2A; give a GEDI L2A granule"):
        read_gedi(write_gedi(tmp_path / "g.h5", product=product))


@pytest.mark.parametrize(
    ("field", "remedy"),
    [
        ("quality_flag", "set quality = false"), ("degrade_flag", "set not_degraded = false"),
        ("sensitivity", "set least_sensitivity = 0"), ("solar_elevation", "set night = false"),
        ("digital_elevation_model", "set most_ground_gap_m = inf"), ("elev_lowestmode", "set most_ground_gap_m = inf"),
        ("rh", ""), ("shot_number", ""), ("delta_time", ""), ("lon_lowestmode", ""),
    ],
)  # fmt: skip
def test_a_missing_field_is_named_with_its_remedy(tmp_path, field, remedy):
    path = write_gedi(tmp_path / "g.h5", without=(field,))
    with pytest.raises(SourceError, match=rf"has no BEAM0101/{field}; give a granule with it") as caught:
        read_gedi(path)
    assert str(caught.value).endswith(remedy)
    assert "\n" not in str(caught.value)
    if remedy:  # and the remedy is one
        assert len(read_gedi(path, EVERYTHING)) == 3


def broken(folder, kind):
    path = folder / "g.h5"
    if kind == "missing":
        return path
    write_gedi(path)
    data = path.read_bytes()
    if kind == "zip":
        with zipfile.ZipFile(folder / "g.zip", "w") as packed:
            packed.write(path)
        return folder / "g.zip"
    if kind == "a page":
        path.write_bytes(b"<!DOCTYPE html><html>Earthdata Login</html>")
    elif kind == "gzip":
        path.write_bytes(gzip.compress(data))
    elif kind == "cut":
        path.write_bytes(data[: len(data) // 2])
    elif kind == "empty folder":
        path.unlink()
        return folder
    elif kind == "folder of archives":
        path.rename(folder / "g.zip")
        return folder
    elif kind == "none":
        return []
    else:
        with h5py.File(path, "a") as file:
            if kind == "no name":
                del file.attrs["short_name"]
            elif kind == "no beams":
                del file["BEAM0101"]
            elif kind == "short rh":
                del file["BEAM0101/rh"]
                file["BEAM0101/rh"] = np.zeros((3, 50))
    return path


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("missing", "does not exist; give a granule"), ("zip", "is a ZIP archive; unpack it"),
        ("gzip", "is compressed with gzip; unpack it"), ("a page", "is no HDF5 file; .* web page"),
        ("cut", r"cannot be read \(.*\); fetch it again"), ("empty folder", "has no file that ends in .h5"),
        ("folder of archives", "unpack its ZIP archives first"), ("none", "no granule is given"),
        ("no name", "does not say which product it is"), ("no beams", "has no group BEAMxxxx"),
        ("short rh", r"BEAM0101/rh has the shape \(3, 50\), so there is no column 98"),
    ],
)  # fmt: skip
def test_whatever_is_wrong_is_said_in_one_line(tmp_path, kind, message):
    with pytest.raises(SourceError, match=message) as caught:
        read_gedi(broken(tmp_path, kind))
    assert "\n" not in str(caught.value)


def test_units_and_dates_that_cannot_be(tmp_path):
    with pytest.raises(SourceError, match="BEAM0101/rh is in 'cm', not in metres"):
        read_gedi(write_gedi(tmp_path / "cm.h5", units="cm"))
    assert len(read_gedi(write_gedi(tmp_path / "m.h5", units="m"))) == 3
    with pytest.raises(SourceError, match=r"delta_time is -2e\+08 s, which since 2018-01-01 makes 2011-"):
        read_gedi(write_gedi(tmp_path / "gps.h5", delta_time=-2e8))
    with pytest.raises(SourceError, match=r"delta_time is 4e\+09 s, which since 2018-01-01 makes 2144-"):
        read_gedi(write_gedi(tmp_path / "late.h5", delta_time=4e9))


def test_settings_that_cannot_be():
    with pytest.raises(ValidationError, match="since 2021-01-01 is after until 2020-01-01"):
        GediSettings(since=date(2021, 1, 1), until=date(2020, 1, 1))
    with pytest.raises(ValidationError, match="are not west < east"):
        GediSettings(bounds_deg=(10.0, 50.0, 9.0, 51.0))
    with pytest.raises(ValidationError, match="less than or equal to 1"):
        GediSettings(least_sensitivity=95)
    with pytest.raises(ValidationError, match="Extra inputs"):
        GediSettings(sensitivity=0.9)

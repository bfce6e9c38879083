"""What is known of a map: its days, its sheets, and what trained it, wherever that is written."""

import datetime as dt
import json

import numpy as np
import pytest
from pyproj import CRS

from canopy.grid import Lattice
from canopy.metrics import HeightSums
from canopy.mosaicker.vrt import mosaic_vrt
from canopy.raster import RasterPool, open_raster, read_raster, write_raster
from canopy.score import GivenMap, GivenReference, References, score_map
from canopy.score.leaks import model_of, models_of_tags
from canopy.score.maps import ends_of, open_maps, span
from canopy.score.reference import gap_days
from tests.score.rasters import LEFT_M, UTM, grid, write, write_map


def opened(given):
    with RasterPool(4) as pool:
        return open_maps([given], pool)[0].info


def test_days_in_words():
    assert span([]) is None
    assert span(["2020-03-01"]) == "2020-03-01"
    assert span(["2020-03-01", "2019-07-01", "2020-01-01"]) == "2019-07-01 to 2020-03-01"
    assert ends_of("2020") == (dt.date(2020, 1, 1), dt.date(2020, 12, 31))
    assert ends_of("2019-07-01 to 2020-03-01") == (dt.date(2019, 7, 1), dt.date(2020, 3, 1))
    assert ends_of(None) is None


def test_the_gap_is_the_largest_that_is_possible():
    assert gap_days(("2020-01-11",), "2020-01-01") == 10
    assert gap_days(("2020-01-11",), "2020") == 355
    assert gap_days(("2019-01-01", "2020-01-11"), "2020-01-01 to 2020-01-02") == 366
    assert gap_days((), "2020") is None
    assert gap_days(("2020",), None) is None


def test_the_days_of_the_imagery(tmp_path):
    photos = [
        write(tmp_path / f"{k}.tif", np.ones((4, 4)), tags={} if day is None else {"ACQUISITION_DATE": day})
        for k, day in enumerate(("2019-05-01", "2020-06-01", None))
    ]
    out = write_map(tmp_path / "map", np.ones((4, 4)))

    def told(*files):
        (out / "run.json").write_text(json.dumps({"models": [], "imagery": {"files": list(files)}}))
        return opened(GivenMap(path=out)).date

    assert told(*({"path": str(p)} for p in photos[:2])) == "2019-05-01 to 2020-06-01"
    assert told(*({"path": str(p)} for p in photos)) is None  # the day of one is not known
    assert told({"item": "naip/1", "datetime": "2021-08-02T10:00:00Z"}) == "2021-08-02"
    assert told({"path": str(tmp_path / "gone.tif")}) is None
    assert opened(GivenMap(path=out, date="2018")).date == "2018"


def test_sheets_are_scored_as_one_file(tmp_path):
    """A map in two sheets behind a VRT, as large regions have it."""
    rng = np.random.default_rng(0)
    heights, true = rng.uniform(0, 30, (2, 40, 60)).astype(np.float32)
    whole = write_map(tmp_path / "whole", heights)
    lattice = Lattice(crs=UTM, gsd_m=1.0)
    box = lattice.box_of(grid((40, 60)))
    folder = tmp_path / "sheets"
    parts = []
    for k, cols in enumerate((slice(0, 25), slice(25, 60))):
        path = write(folder / f"{k}.tif", heights[:, cols], left=LEFT_M + cols.start)
        parts.append((lattice.box_of(read_raster(path)[1]), path))
    (folder / "height.vrt").write_bytes(mosaic_vrt(parts, lattice.grid(box), box, ("height_m",), {}))
    chm = write(tmp_path / "chm.tif", true)
    one, two = (score_map(out, chm, resamples=20).comparisons[0].maps[0] for out in (whole, folder))
    assert one.measures == two.measures
    assert one.measures.mae_m.value == pytest.approx(HeightSums.of(heights, true).mae_m)
    assert one.edges == two.edges


def test_a_record_tells_what_trained_its_models():
    training = {"sites": ["x"], "footprints_deg": [[1, 2, 3, 4]], "tile_sets": {"t": "0" * 64}}
    told = model_of({"name": "a", "version": "1", "weights_sha256": "0" * 64, "licence": "MIT", "training": training})
    assert (told.sites, told.footprints_deg, told.licence) == (("x",), ((1, 2, 3, 4),), "MIT")
    assert models_of_tags({}) == ()


@pytest.mark.slow
def test_lineage_is_looked_up_by_the_weights(tmp_path):
    """A record of old, and a raster with nothing but tags, are known by the digest; another digest is not."""
    from canopy.model.package import find_model, read_contract

    folder = find_model("canopy-sample")
    contract = read_contract(folder)
    entry = {"name": "canopy-sample", "version": "2", "weights_sha256": contract.weights_sha256, "folder": str(folder)}
    assert model_of(entry).footprints_deg == contract.training.footprints_deg
    assert model_of({**entry, "folder": str(tmp_path)}).sites == contract.training.sites
    tags = {"CANOPY_MODEL": "canopy-sample 2", "CANOPY_MODEL_SHA256": contract.weights_sha256}
    raster = write(tmp_path / "copied.tif", np.ones((4, 4)), tags=tags)
    assert opened(GivenMap(path=raster)).lineage == "known"
    other = {**tags, "CANOPY_MODEL_SHA256": "1" * 64}
    info = opened(GivenMap(path=write(tmp_path / "other.tif", np.ones((4, 4)), tags=other)))
    assert (info.lineage, info.models[0].name, info.models[0].sites) == ("unknown", "canopy-sample", None)


# --- simulated and real


@pytest.mark.slow
def test_coverage_of_simulated_heights(tmp_path):
    """Intervals that hold 90 % by construction, with errors that a crown shares: within what so few crowns allow."""
    from canopy.simulate import simulate_scene

    rng = np.random.default_rng(2)
    true = simulate_scene(grid=grid((360, 360)), seed=3).height_m.astype(np.float64)
    cell = 6
    error = np.repeat(np.repeat(rng.normal(0, 2, (60, 60)), cell, axis=0), cell, axis=1)
    found = true + error
    chm = write(tmp_path / "chm.tif", true)
    for name, factor, holds in (("honest", 1.645, True), ("bold", 1.2, False)):
        half = factor * 2.0
        out = write_map(tmp_path / name, found, found - half, found + half)
        overall = score_map(out, chm, resamples=400).comparisons[0].maps[0].intervals.overall
        limit = 3 * np.sqrt(0.9 * 0.1 / (error.size / cell**2))
        assert (abs(overall.coverage.value - 0.9) < limit) == holds
        low, high = overall.coverage.interval_95
        assert (low - 0.01 <= 0.9 <= high + 0.01) == holds
        assert high - low > 4 * 1.96 * np.sqrt(0.09 / error.size)  # pixels drawn one by one would be far too sure


@pytest.mark.slow
def test_a_real_map_against_its_lidar(samples, tmp_path):
    """The sample model on a plot that trained it: refused, and with --allow-leak marked; on one that did not: the numbers
    of plain NumPy."""
    from canopy.errors import ScoreError
    from canopy.region import map_region

    teak, wellington = samples / "pairs" / "NEON_TEAK", samples / "pairs" / "NZ_WELLINGTON"
    rgb = next(teak.glob("*_rgb.tif"))
    map_region(imagery=rgb, model="canopy-sample", out=tmp_path / "teak")
    run = json.loads((tmp_path / "teak" / "run.json").read_text())
    assert "NEON_TEAK" in run["models"][0]["training"]["sites"]
    chm = teak / rgb.name.replace("_rgb", "_chm")
    with pytest.raises(ScoreError, match="site NEON_TEAK"):
        score_map(tmp_path / "teak", chm)
    marked = score_map(tmp_path / "teak", chm, allow_leak=True, resamples=50)
    assert marked.leaks[0].share == pytest.approx(1)
    assert marked.maps[0].calibration

    crop, _ = read_raster(wellington / "pycrown_rgb.tif")
    whole = read_raster(wellington / "pycrown_rgb.tif")[1]
    write_raster(tmp_path / "crop.tif", crop.data[:, 100:228, 200:328], grid=whole.crop(100, 200, (128, 128)))
    map_region(imagery=tmp_path / "crop.tif", model="canopy-sample", out=tmp_path / "nz")
    result = score_map(tmp_path / "nz", wellington / "pycrown_chm.tif", resamples=50)
    (score,) = result.comparisons[0].maps
    assert not result.leaked
    height = read_raster(tmp_path / "nz" / "height.tif")[0].data[0].astype(float)
    bounds = read_raster(tmp_path / "nz" / "error.tif")[0].data[1:].astype(float)
    true = read_raster(wellington / "pycrown_chm.tif")[0].data[0][100:228, 200:328].astype(float)
    true[true < 0] = 0
    both = np.isfinite(height) & np.isfinite(true)
    error = (height - true)[both]
    assert score.measures.n == both.sum()
    assert score.measures.mae_m.value == pytest.approx(np.abs(error).mean(), rel=1e-12)
    assert score.measures.r2.value == pytest.approx(1 - (error**2).mean() / true[both].var(), rel=1e-12)
    held = (true >= bounds[0]) & (true <= bounds[1])
    assert score.intervals.overall.coverage.value == pytest.approx(held[both].mean(), rel=1e-12)


@pytest.mark.slow
def test_the_real_ten_metre_product(samples, tmp_path):
    """The ETH clip, in degrees and whole metres, against heights laid out from itself in UTM: right where it is, and not
    when it is moved by two of its pixels."""
    from canopy.raster import nearest
    from canopy.tiler.headers import read_headers

    path = samples / "reference" / "eth_gch_10m" / "kuebini_gch.tif"
    pixels, source = read_raster(path)
    (header,) = read_headers([path])
    crs = CRS.from_epsg(32758)
    target = grid((120, 120), 2.0, left=702_000.0, top=7_541_000.0, crs=crs)
    heights = nearest(pixels.data[0].astype(np.float64), source, target)
    assert pixels.data.dtype == np.uint8
    eth = GivenMap(path=path, name="ETH", date="2020", statistic="RH98")
    maes = {}
    for name, x_m in (("in place", 0.0), ("moved", 18.0)):
        chm = write(tmp_path / f"{name}.tif", heights, 2.0, left=702_000.0 + x_m, top=7_541_000.0, crs=crs)
        mine = write(tmp_path / f"{name} map.tif", heights + 1, 2.0, left=702_000.0 + x_m, top=7_541_000.0, crs=crs)
        fine, both = score_map(mine, chm, against=[eth], resamples=50).comparisons
        assert [m.name for m in fine.maps] == [f"{name} map"]
        assert both.grid.gsd_m == pytest.approx(np.ceil(header.gsd_m * 10) / 10)
        assert both.maps[0].measures.n == both.maps[1].measures.n > 500
        assert both.maps[0].measures.bias_m.value == pytest.approx(1, abs=1e-5)
        maes[name] = both.maps[1].measures.mae_m.value
        assert "weighted by their area" in both.maps[1].resampled
    assert maes["in place"] < 0.1
    assert maes["moved"] > 5 * maes["in place"]
    alone = score_map(eth, tmp_path / "in place.tif", statistic="p98", resamples=50).comparisons[0]
    assert "98th percentile" in alone.statistic
    assert alone.reference_resampled.startswith("98th percentiles of 10 x 10 points")


@pytest.mark.slow
def test_the_real_heights_without_a_crs(samples, tmp_path):
    """Cauaxi 2012 against 2014: refused with the remedy, compared once it is said where they are."""
    from canopy.errors import NoCrsError

    first, second = (samples / "reference" / "brazil_chm_no_crs" / f"ALS_CHM_CAU_{year}.tif" for year in (2012, 2014))
    placed = grid((300, 300), left=779_170.0, top=9_585_524.0, crs=CRS.from_epsg(32722))
    with open_raster(first) as raster:
        pixels = raster.read(0, 0, raster.shape).data[0]
    map_2012 = write(tmp_path / "cauaxi 2012.tif", pixels, left=779_170.0, top=9_585_524.0, crs=CRS.from_epsg(32722))
    with pytest.raises(NoCrsError, match="--reference-crs"):
        score_map(map_2012, second)
    given = References(als=GivenReference(paths=second, crs="EPSG:32722", date="2014"))
    result = score_map(GivenMap(path=map_2012, date="2012"), given, resamples=50)
    (comparison,) = result.comparisons
    assert comparison.reference.crs_given
    assert comparison.grid.bounds == placed.bounds
    assert any("growth and loss" in warning for warning in result.warnings)
    assert comparison.maps[0].measures.n > 80_000

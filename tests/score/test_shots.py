"""Maps against footprints: the same measures as of pixels, on the shots that all maps have, and leaks among them."""

import numpy as np
import pytest
from pyproj import CRS

from canopy.errors import ScoreError
from canopy.metrics import HeightSums
from canopy.raster import RasterPool
from canopy.score import GivenMap, References, ShotSettings, score_map
from canopy.score.footprint import Shots
from canopy.score.leaks import leaks_of_shots
from canopy.score.maps import open_maps
from canopy.score.measures import Draws
from canopy.score.plots import PlotSettings
from canopy.score.shots import Reference, compared, sample
from canopy.score.table import lines
from tests.score.rasters import LEFT_M, TOP_M, UTM, model, write, write_map

SIDE = 40
"""Pixels of 60 m of ground each: the map spans 2.4 km, so that shots lie in several squares of 1 km."""


def shots_at(x, y, height_m):
    count = len(x)
    return Shots(
        source="GEDI L2A RH98", statistic="p98", crs=UTM, x=np.asarray(x, float), y=np.asarray(y, float),
        height_m=np.asarray(height_m, float), radius_m=np.full(count, 40.0), half_length_m=np.zeros(count),
        azimuth_deg=np.zeros(count), date=np.full(count, np.datetime64("2020-07-01"), "datetime64[D]"),
        id=np.arange(count).astype(str), track=np.zeros(count, np.intp), tracks=("one",), read=count + 5,
        dropped={"not at night": 5},
    )  # fmt: skip


@pytest.fixture
def scene(tmp_path):
    """A map whose pixels of 60 m hold a shot each, and a second that lacks a column."""
    rng = np.random.default_rng(0)
    heights = rng.uniform(0, 35, (SIDE, SIDE)).astype(np.float32)
    other = heights + 1
    other[:, 3] = np.nan
    rows, cols = np.mgrid[2:SIDE:4, 3:SIDE:4]
    x, y = LEFT_M + 60 * (cols.ravel() + 0.5), TOP_M - 60 * (rows.ravel() + 0.5)
    truth = np.maximum(heights[rows.ravel(), cols.ravel()] + rng.normal(1, 3, x.size), 0)
    maps = [
        GivenMap(path=write_map(tmp_path / "map", heights, gsd_m=60.0, models=[model(footprints=())]), date="2019"),
        GivenMap(path=write(tmp_path / "other.tif", other, 60.0), date="2021-07-01"),
    ]
    return maps, Reference(kind="gedi", files=(tmp_path / "granule.h5",), shots=shots_at(x, y, truth)), heights, (rows, cols)


def test_the_same_measures_as_of_pixels(scene):
    maps, reference, heights, (rows, cols) = scene
    with RasterPool(4) as pool:
        result = compared(sample(reference, open_maps(maps, pool)), Draws(seed=0, resamples=100))
    first, second = result.maps
    both = cols.ravel() != 3
    found = heights[rows.ravel(), cols.ravel()][both]
    expected = HeightSums.of(found, reference.shots.height_m[both])
    assert first.measures.n == both.sum() == second.measures.n
    assert first.measures.rmse_m.value == pytest.approx(expected.rmse_m)
    assert first.measures.r2.value == pytest.approx(expected.r2)
    assert second.measures.bias_m.value == pytest.approx(expected.bias_m + 1, abs=1e-6)
    assert (first.n_missing, second.n_missing, result.n_reference) == (0, 10, 100)
    assert first.measures.squares >= 6
    low, high = first.measures.mae_m.interval_95
    assert low < expected.mae_m < high
    assert sum(group.measures.n for group in first.by_height) == both.sum()
    assert sum(group.n_missing for group in first.by_height) == 10
    assert np.sum(first.scatter.counts) == both.sum()
    assert len(first.shots) == both.sum()
    assert result.differences[0].bias_m.value == pytest.approx(-1, abs=1e-6)
    assert result.reference.gap_days == 547  # from the first day of 2019
    assert result.footprints.n_read == 105
    assert {f.name: f.n for f in result.footprints.removed}["not at night"] == 5
    assert first.intervals is first.edges is first.blocks is None


def test_leaks_among_shots(scene):
    """Shots in a footprint of the training are told with their share; those outside are not."""
    maps, reference, *_ = scene
    with RasterPool(4) as pool:
        opened = open_maps(maps[:1], pool)
        lon, lat = sample(reference, opened).lonlat_deg
    west = model(sites=("west",), footprints=((-180.0, -90.0, float(np.median(lon)), 90.0),))
    info = opened[0].info.model_copy(update={"models": (info_of(west),)})
    (leak,) = leaks_of_shots([info], "GEDI", lon, lat)
    assert leak.site == "west"
    assert 0.4 < leak.share < 0.7
    beside = info.model_copy(update={"models": (info_of(model(footprints=((0.0, 0.0, 1.0, 1.0),))),)})
    assert not leaks_of_shots([beside], "GEDI", lon, lat)


def info_of(entry):
    from canopy.score.leaks import model_of

    return model_of(entry)


def test_no_shot_in_common_is_said(scene, tmp_path):
    maps, reference, *_ = scene
    away = Reference(kind="gedi", files=(), shots=shots_at([LEFT_M - 9000.0], [TOP_M], [20.0]))
    with RasterPool(4) as pool:
        opened = open_maps(maps, pool)
        with pytest.raises(ScoreError, match="no footprint of GEDI L2A RH98 is left") as caught:
            sample(away, opened)
        assert "1 outside the map" in str(caught.value)
        two = open_maps([GivenMap(path=tmp_path / "tiles" / "*.tif")], pool) if tiles(tmp_path) else []
        with pytest.raises(ScoreError, match="must be one raster"):
            sample(reference, two)


def tiles(tmp_path):
    for k in (0, 1):
        write(tmp_path / "tiles" / f"{k}.tif", np.ones((4, 4)), 60.0, left=LEFT_M + 240 * k)
    return True


def test_plots_from_end_to_end(tmp_path):
    heights = np.full((100, 100), 10.0)
    heights[:, 50:] = 20.0
    out = write_map(tmp_path / "map", heights, models=[model(footprints=())])
    table = tmp_path / "plots.csv"
    rows = [f"{LEFT_M + x},{TOP_M - 50},{h}" for x, h in ((20, 9.0), (80, 23.0))]
    table.write_text("x,y,top\n" + "\n".join(rows) + "\n")
    settings = ShotSettings(plots=PlotSettings(height_column="top", statistic="max", radius_m=8.0, crs=UTM.to_string()))
    result = score_map(out, References(plots=table, settings=settings), resamples=20)
    (comparison,) = result.comparisons
    (score,) = comparison.maps
    assert (score.measures.n, score.measures.mae_m.value, score.measures.bias_m.value) == (2, 2.0, -1.0)
    assert comparison.title == "field plots"
    assert any("footprints" in line for line in lines(result))
    with pytest.raises(ScoreError, match=r"how to read .*plots.csv is not said; give --settings with a table \[plots\]"):
        score_map(out, References(plots=table))
    leaky = write_map(tmp_path / "leaky", heights, models=[model()])
    with pytest.raises(ScoreError, match=r"100.0% of the compared shots \(2\)"):
        score_map(leaky, References(plots=table, settings=settings))
    assert CRS.from_epsg(32610) == UTM

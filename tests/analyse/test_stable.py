"""How wide intervals must be on stable ground, from scores that are known."""

import geopandas as gpd
import numpy as np
import pytest
from shapely.geometry import box

from canopy.analyse.stable import measure_stable
from canopy.errors import AnalysisError
from canopy.grid import Box
from tests.finished_maps import grid

SHAPE = (60, 100)
PARTS = (Box(0, 0, 40, 100), Box(40, 0, 60, 70), Box(40, 70, 60, 100))


@pytest.fixture
def everywhere(tmp_path):
    path = tmp_path / "stable.gpkg"
    gpd.GeoDataFrame(geometry=[box(*grid(SHAPE).bounds)], crs=grid(SHAPE).crs).to_file(path)
    return path


def measured(path, change_m, down_m, up_m, parts=PARTS):
    cut = lambda part: (slice(part.row0, part.row1), slice(part.col0, part.col1))  # noqa: E731
    return measure_stable(path, grid(SHAPE), parts, lambda part: tuple(a[cut(part)] for a in (change_m, down_m, up_m)))


def test_factors_are_conformal_quantiles(everywhere):
    rng = np.random.default_rng(2)
    change_m, down_m, up_m = rng.normal(0.3, 1, SHAPE), rng.uniform(1, 3, SHAPE), rng.uniform(1, 3, SHAPE)
    change_m[:10] = np.nan
    found = measured(everywhere, change_m, down_m, up_m)
    known = np.isfinite(change_m)
    rank = int(np.ceil((known.sum() + 1) * 0.95)) - 1
    for factor, scores in ((found.lower_factor, change_m / down_m), (found.upper_factor, -change_m / up_m)):
        assert factor == pytest.approx(np.sort(scores[known])[rank], abs=1 / 4096)
    assert found.pixels == known.sum() == 5000
    assert found.mean_m == pytest.approx(change_m[known].mean())
    missed = (change_m - found.lower_factor * down_m > 0) | (change_m + found.upper_factor * up_m < 0)
    assert missed[known].mean() == pytest.approx(0.1, abs=0.002)
    assert measured(everywhere, change_m, down_m, up_m, (Box(0, 0, *SHAPE),)) == found


def test_an_interval_that_ends_at_its_height_is_no_division_by_zero(everywhere):
    nothing = np.zeros(SHAPE)
    found = measured(everywhere, nothing, nothing, nothing)
    assert (found.lower_factor, found.upper_factor) == (0, 0)
    falling = np.full(SHAPE, -3.0)
    assert measured(everywhere, falling, nothing, np.full(SHAPE, 2.0)).upper_factor == 1.5


def test_ground_that_did_change_is_refused(everywhere):
    with pytest.raises(AnalysisError, match="differ there by more than 64 times their errors; did nothing change"):
        measured(everywhere, np.full(SHAPE, -20.0), np.full(SHAPE, 0.1), np.full(SHAPE, 0.1))

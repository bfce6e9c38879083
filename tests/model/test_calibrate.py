"""Which pixels calibrate and which only measure; the tables of squares of ground; the file of what is no single model."""

import numpy as np
import pytest

from canopy.errors import RecipeError
from canopy.model.calibrate import CALIBRATION_PX_PER_CHIP, calibrate
from canopy.model.evaluate import ChipResult
from canopy.model.recipe import Calibrate


def result(site: str, *, calibrates: bool, scores: bool, factor: float = 1.0, seed: int = 0) -> ChipResult:
    rng = np.random.default_rng(seed)
    shape = 80, 100
    mean = rng.gamma(2, 6, shape).astype(np.float32)
    spread = (1 + 0.1 * mean).astype(np.float32)
    true = np.maximum(mean + factor * spread * rng.normal(size=shape), 0).astype(np.float32)
    return ChipResult(
        id=f"{site}{seed}", site=site, crs="EPSG:32611", gsd_m=0.5, row_px=0, col_px=200 * seed, calibrates=calibrates,
        scores=scores, counts=np.ones(shape, bool), true_m=true, mean_m=mean, spread_m=spread, forest_m=mean + 1,
    )  # fmt: skip


def calibrated(chips):
    return calibrate(chips, Calibrate(), np.random.default_rng(0))


def test_chips_that_do_not_calibrate_only_measure():
    own = [result(site, calibrates=True, scores=True, seed=k) for k, site in enumerate("AB")]
    hard = result("C", calibrates=False, scores=True, factor=4.0, seed=9)
    alone, both = calibrated(own), calibrated([*own, hard])
    assert both.table.lower_factor == alone.table.lower_factor
    assert both.table.upper_factor == alone.table.upper_factor
    assert set(both.left_out) == {"A", "B"}
    assert set(both.other) == {"C"}
    assert both.other["C"].total.n == 8000
    assert both.other["C"].total.coverage < 0.6
    assert [m.how for m in both.table.measured] == ["sites left out in turn", "other held-out chips"]
    assert both.table.measured[1].overall == pytest.approx(both.other["C"].total.coverage)
    # One site alone has nothing to be measured on, and in-sample coverage is no substitute.
    assert calibrated(own[:1]).table.measured == ()


def test_what_calibrates_is_a_sample_of_what_counts_and_is_known():
    chip = result("A", calibrates=True, scores=True)
    assert sum(calibrated([chip]).table.pixels) == CALIBRATION_PX_PER_CHIP
    chip.counts[1:] = False
    chip.counts[:20] = True
    chip.mean_m[0, :7] = np.nan
    assert sum(calibrated([chip, result("B", calibrates=True, scores=True)]).table.pixels) == 1993 + CALIBRATION_PX_PER_CHIP


def test_without_a_chip_to_calibrate_on_there_is_no_table():
    with pytest.raises(RecipeError, match="no chip is left to calibrate on"):
        calibrated([result("A", calibrates=False, scores=True)])

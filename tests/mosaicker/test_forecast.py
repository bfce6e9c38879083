"""What a map will take: the arithmetic by hand, the counts by enumeration, the probe against the run it stands for."""

import time
import tracemalloc
from dataclasses import replace

import numpy as np
import pytest
import shapely
from hypothesis import given
from hypothesis import strategies as st
from pyproj import CRS

from canopy.grid import Box, Lattice, Layout, iter_windows, sheets_over
from canopy.mosaicker.batch import Batch
from canopy.mosaicker.ensemble import Ensemble
from canopy.mosaicker.forecast import Forecast, Probe, Workload, band_bytes, forecast, probe, windows_over
from canopy.mosaicker.predict import predict_sheet
from canopy.mosaicker.publish import STAGED_BYTES_PER_PIXEL
from canopy.mosaicker.stages import Stages
from canopy.raster import Pixels
from tests.plain_models import plain_model
from tests.strategies import layouts

LATTICE = Lattice(crs=CRS.from_epsg(32610), gsd_m=0.5)
LAYOUT = Layout(window_px=64, stride_px=48)


class Noise:
    """Imagery in memory, usable where a function of the box says."""

    def __init__(self, valid=lambda box: np.ones(box.shape, bool)):
        self.valid = valid

    def read(self, box):
        data = np.random.default_rng(0).random((1, *box.shape), dtype=np.float32)
        return Pixels(data=data, valid=self.valid(box))


def everywhere(part):
    return np.ones(part.shape, bool)


def square(box):
    left, bottom, right, top = LATTICE.grid(box).bounds
    return shapely.box(left, bottom, right, top)


PROBE = Probe(
    window_s=0.5, batch=Batch(size=1, lanes=2), memory_bytes=10**9, device_bytes=0, read_px_s=1e-8, write_px_s=2e-8,
    publish_px_s=3e-8, stored_px_bytes=4.5, imagery_px_bytes=4, is_real=True,
)  # fmt: skip
WORK = Workload(windows=1000, pixels=10**8, read_px=2 * 10**8, width_px=10_000, staged_px=4 * 10**7, gsd_m=0.5)


def test_the_arithmetic_is_that_by_hand():
    found = forecast(PROBE, WORK, LAYOUT, started_s=7.0)
    assert found.seconds == pytest.approx(7 + 1000 * 0.5 + 3)
    assert (found.bound_by, found.windows, found.area_km2) == ("forward", 1000, 25.0)
    assert found.map_bytes == 450_000_000
    assert found.disk_bytes == 4 * 10**7 * STAGED_BYTES_PER_PIXEL + 450_000_000
    assert found.memory_bytes == 10**9 + band_bytes(LAYOUT, 10_000, 4)
    assert forecast(PROBE, WORK, LAYOUT, workers=4, started_s=7.0).seconds == pytest.approx(7 + 503 / 4)
    for name, slow in (("read", {"read_px_s": 1.0}), ("write", {"write_px_s": 1.0}), ("publish", {"publish_px_s": 1.0})):
        assert forecast(replace(PROBE, **slow), WORK, LAYOUT).bound_by == name


def test_it_is_said_in_one_line():
    text = str(forecast(PROBE, WORK, LAYOUT))
    assert text == (
        "about 8 min for 1,000 windows, 25 km², bound by forward; 1 GB of memory; up to 1.3 GB of disk for files of 0.45 GB"
    )
    record = forecast(PROBE, WORK, LAYOUT).record()
    assert (record["km2_per_h"], record["seconds"]) == (pytest.approx(25 / 503 * 3600, abs=1e-3), 503.0)
    gpu = replace(PROBE, device_bytes=12 * 10**9, window_s=50.0)
    assert "13.9 h" in str(forecast(gpu, WORK, LAYOUT))
    assert "and 12 GB of the GPU's" in str(forecast(gpu, WORK, LAYOUT))


@given(layout=layouts(most_px=96), data=st.data())
def test_windows_are_counted_as_they_are_cut(layout, data):
    row, col = data.draw(st.integers(-500, 500)), data.draw(st.integers(-500, 500))
    sheet = Box(row, col, row + data.draw(st.integers(1, 90)), col + data.draw(st.integers(1, 90)))
    assert windows_over(layout, LATTICE, sheet, None) == len(list(iter_windows(layout, sheet)))
    inside = data.draw(st.integers(row - 20, row + 100)), data.draw(st.integers(col - 20, col + 100))
    area = square(Box(*inside, inside[0] + 30, inside[1] + 20)).buffer(-0.1)  # of pixels that it has more than an edge of
    holed = area.difference(area.centroid.buffer(2.0))
    for polygon in (area, holed):
        touched = [
            index for index in iter_windows(layout, sheet)
            if square(layout.support_box(*index).intersect(sheet)).intersects(polygon)
        ]  # fmt: skip
        assert windows_over(layout, LATTICE, sheet, polygon) == len(touched)


def test_work_is_counted_over_all_sheets():
    box = Box(-130, 20, 200, 500)
    sheets = list(sheets_over(box, 200))
    whole = Workload.of(LAYOUT, LATTICE, sheets, area=None, staged_sheets=None)
    assert whole.pixels == whole.staged_px == 330 * 480
    assert whole.windows == sum(len(list(iter_windows(LAYOUT, sheet))) for sheet in sheets)
    assert whole.width_px == max(LAYOUT.halo_box(sheet).shape[1] for sheet in sheets)
    some = Workload.of(LAYOUT, LATTICE, sheets, area=square(Box(0, 30, 50, 60)), staged_sheets=2)
    assert some.staged_px == sum(sorted(sheet.shape[0] * sheet.shape[1] for sheet in sheets)[-2:])
    assert 4 <= some.windows < whole.windows / 3


def run_s(ensemble, imagery, box, batch):
    start = time.perf_counter()
    for _ in predict_sheet(
        ensemble, imagery, LAYOUT, box, wanted=everywhere, stages=Stages(), advance=lambda _: None, batch=batch
    ):
        pass
    return time.perf_counter() - start


def test_the_probe_foresees_a_run_bound_by_its_network():
    box, batch = Box(0, 0, 200, 300), Batch(size=1, lanes=2)
    ensemble = Ensemble(models=(plain_model(wait_s=0.06),))
    found = probe(ensemble, Noise(), LAYOUT, box, wanted=everywhere, batch=batch)
    assert found.is_real
    assert found.window_s == pytest.approx(0.03, rel=0.6)
    assert found.imagery_px_bytes == 5
    assert 0 < found.stored_px_bytes < 16 * 4 / 3 + 8
    work = Workload.of(LAYOUT, LATTICE, [box], area=None, staged_sheets=None)
    told = forecast(found, work, LAYOUT)
    assert told.bound_by == "forward"
    assert told.seconds == pytest.approx(run_s(ensemble, Noise(), box, batch), rel=0.6)


def test_the_probe_looks_for_imagery_and_does_without():
    ensemble, box = Ensemble(models=(plain_model(),)), Box(0, 0, 600, 600)

    def corner(part):
        return np.broadcast_to(np.arange(part.row0, part.row1)[:, None] >= 430, part.shape)

    assert probe(ensemble, Noise(corner), LAYOUT, box, wanted=everywhere, batch=Batch(size=2)).is_real
    nothing = probe(ensemble, Noise(lambda part: np.zeros(part.shape, bool)), LAYOUT, box, wanted=everywhere)
    assert not nothing.is_real
    assert nothing.window_s > 0
    assert nothing.stored_px_bytes > 1
    slivers = probe(ensemble, Noise(), LAYOUT, Box(0, 0, 3, 2), wanted=everywhere)
    assert slivers.is_real


def peak_bytes(cols):
    """What NumPy and Python hold at most; torch's own memory is not counted."""
    ensemble = Ensemble(models=(plain_model(),))
    tracemalloc.start()
    try:
        for _ in predict_sheet(
            ensemble, Noise(), LAYOUT, Box(0, 0, 300, cols), wanted=everywhere, stages=Stages(), advance=lambda _: None
        ):
            pass
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def test_what_a_band_takes_is_what_it_was_said_to():
    peak_bytes(500)
    grown = peak_bytes(3500) - peak_bytes(500)
    assert 0.5 < grown / band_bytes(LAYOUT, 3000, 5) < 1.1


def test_a_forecast_is_a_value():
    assert forecast(PROBE, WORK, LAYOUT) == forecast(PROBE, WORK, LAYOUT)
    assert isinstance(forecast(PROBE, WORK, LAYOUT), Forecast)

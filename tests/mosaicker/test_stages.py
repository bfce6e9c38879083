"""Times of a run: merged, written down, and what they say."""

import json
import pickle
import threading
import time

import pytest

from canopy.mosaicker.stages import Rate, Stages


def test_times_of_sheets_add_up_and_survive_json_and_other_processes():
    one = Stages(seconds={"read": 1.0, "forward": 4.0}, busy={"forward": 3.0, "read": 0.5}, windows=7)
    two = Stages(seconds={"forward": 1.0, "blend": 2.0}, busy={"write": 3.25}, windows=2)
    total = Stages()
    for each in (one, two):
        total.add(Stages.of(json.loads(json.dumps(each.record()))))
        total.add(pickle.loads(pickle.dumps(Stages())))
    assert total == Stages(
        seconds={"read": 1.0, "forward": 5.0, "blend": 2.0}, busy={"forward": 3.0, "read": 0.5, "write": 3.25}, windows=9
    )
    assert (one.bound_by, two.bound_by, total.bound_by) == ("forward", "write", "write")


def test_blocks_are_timed_from_any_thread():
    stages = Stages()

    def work():
        for _ in range(200):
            with stages.side("forward", threads=4):
                time.sleep(0.0005)
            stages.count(1)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    with stages.time("publish", alone=True), stages.time("check"):
        for thread in threads:
            thread.join()
    assert stages.windows == 800
    assert stages.seconds["publish"] == pytest.approx(stages.busy["publish"], abs=0.01)
    assert 0.1 <= stages.seconds["forward"] <= stages.seconds["publish"] * 1.01
    assert set(stages.seconds) == {"forward", "publish", "check"}
    stages.held("write", 1.5)
    assert (set(stages.busy), stages.bound_by) == ({"publish", "forward", "write"}, "write")


def test_a_rate_says_how_fast_and_why():
    rate = Rate(wall_s=20.0, pixels=40_000_000, gsd_m=0.5, bound_by="forward")
    assert rate.mpx_per_s == 2.0
    assert rate.km2_per_h == pytest.approx(10 / 20 * 3600)
    assert str(rate) == "2 Mpx/s, 1.8e+03 km²/h, bound by forward"
    assert rate.record() == {"wall_s": 20.0, "mpx_per_s": 2.0, "km2_per_h": 1800.0, "bound_by": "forward"}

"""Points per second from LAZ, COPC and EPT on one core, over plain decoding by laspy; memory; what a small area costs."""

import json
import os
import subprocess
import sys

import laspy
import numpy as np
import pytest
from pyproj import CRS

from tests.octrees import write_copc, write_ept

pytestmark = pytest.mark.bench

POINTS = 2_000_000
SIDE_M = 500.0
RATIO = 0.8
"""Least speed of a source over that of laspy, which decodes every field and keeps integers."""
PEAK_MB = 400
AREA_SHARE = 0.3
"""Most points decoded for an area of a hundredth, of all points."""

# Runs alone in a process: its peak memory is this task's, and the affinity holds for the decoder's threads as well.
TASK = """
import json, os, sys, time
os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
from pathlib import Path
import laspy
from canopy.tiler.points import open_points

plain, kind = sys.argv[1], sys.argv[2]
with laspy.open(plain) as reader:  # once, so that loading is not timed
    reader.read_points(1000)
next(open_points(kind).chunks(chunk_points=1000))
best = {}
for _ in range(3):
    start = time.process_time()
    with laspy.open(plain) as reader:
        for _ in reader.chunk_iterator(1_000_000):
            pass
    laspy_s = time.process_time() - start
    source = open_points(kind)
    start = time.process_time()
    points = sum(chunk.size for chunk in source.chunks())
    ours_s = time.process_time() - start
    if ours_s / laspy_s < best.get("ours_s", 1e9) / best.get("laspy_s", 1):
        best = dict(points=points, laspy_s=laspy_s, ours_s=ours_s)
left, bottom, right, top = source.bounds
# Not the middle, where all branches of the tree meet.
x, y, step = left + 0.3 * (right - left), bottom + 0.3 * (top - bottom), (right - left) / 20
decoded = sum(chunk.decoded for chunk in source.chunks((x - step, y - step, x + step, y + step)))
status = Path("/proc/self/status").read_text().split()
print(json.dumps(best | dict(decoded=decoded, peak_mb=int(status[status.index("VmHWM:") + 1]) / 1024)))
"""


@pytest.fixture(scope="module")
def clouds(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clouds")
    rng = np.random.default_rng(0)
    header = laspy.LasHeader(version="1.4", point_format=6)
    header.scales, header.offsets = [0.01] * 3, [500_000.0, 4_100_000.0, 0.0]
    header.add_crs(CRS.from_epsg(32610))
    cloud = laspy.LasData(header)
    # In flight order, as scanners deliver: along lines, so that neighbours in the file are neighbours on the ground.
    x = np.sort(rng.uniform(0, SIDE_M, POINTS))
    y = (np.arange(POINTS) % 1000) / 1000 * SIDE_M + rng.uniform(0, 0.5, POINTS)
    cloud.x, cloud.y = 500_000 + x, 4_100_000 + y
    cloud.z = 100 + 10 * np.sin(x / 40) + np.where(rng.random(POINTS) < 0.6, rng.uniform(0, 25, POINTS), 0)
    cloud.classification = rng.choice([1, 2, 5], POINTS)
    cloud.number_of_returns = rng.integers(1, 4, POINTS)
    cloud.return_number = rng.integers(1, 1 + np.asarray(cloud.number_of_returns))
    cloud.intensity = rng.integers(0, 4000, POINTS)
    cloud.gps_time = 2e8 + np.arange(POINTS) * 2e-6
    cloud.update_header()
    cloud.write(folder / "cloud.laz")
    write_copc(folder / "cloud.copc.laz", cloud, span=128, leaf=20_000)
    write_ept(folder / "ept", cloud, span=128, leaf=20_000)
    return folder


@pytest.mark.parametrize("kind", ["cloud.laz", "cloud.copc.laz", "ept"])
def test_points_per_second(clouds, kind):
    done = subprocess.run(
        [sys.executable, "-c", TASK, str(clouds / "cloud.laz"), str(clouds / kind)],
        capture_output=True, text=True, check=True, env=os.environ | {"OMP_NUM_THREADS": "1", "RAYON_NUM_THREADS": "1"},
    )  # fmt: skip
    told = json.loads(done.stdout)
    ratio = told["laspy_s"] / told["ours_s"]
    share = told["decoded"] / told["points"]
    print(  # noqa: T201 - a benchmark's result is what it prints
        f"\n{kind}: {told['points'] / told['ours_s'] / 1e6:.2f} M points/s, {ratio:.2f} of laspy's own on the LAZ; peak "
        f"{told['peak_mb']:.0f} MB; an area of a hundredth decodes {share:.1%} of the points"
    )
    assert told["points"] == POINTS
    assert ratio >= RATIO
    assert told["peak_mb"] <= PEAK_MB
    if kind != "cloud.laz":
        assert share <= AREA_SHARE

"""LAZ -> canopy height model on one core: points per second, what decoding alone takes, and peak memory."""

import json
import os
import subprocess
import sys
from pathlib import Path

import laspy
import numpy as np
import pytest
from pyproj import CRS

pytestmark = pytest.mark.bench

POINTS_PER_S = 1e6
PEAK_MB_PER_KM2 = 1000
DENSITY_PER_M2 = 8

# Runs alone in a process: its peak memory is this task's, and the affinity holds for the decoder's threads as well.
TASK = """
import json, os, sys, time
core = min(os.sched_getaffinity(0))
os.sched_setaffinity(0, {core})
from pathlib import Path
import laspy
from affine import Affine
from pyproj import CRS, Transformer
from canopy.grid import Grid, Lattice
from canopy.tiler.lidar import LidarOptions, lidar_to_chm

path, epsg, algorithm, given = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3], json.loads(sys.argv[4])
crs = CRS.from_epsg(epsg)
with laspy.open(path) as reader:
    header = reader.header
    box = Transformer.from_crs(header.parse_crs(), crs, always_xy=True).transform_bounds(*header.mins[:2], *header.maxs[:2])
lattice = Lattice(crs=crs, gsd_m=0.5)
grid = lattice.grid(lattice.covering(box))

def peak_mb():
    # Not getrusage: its maximum includes that of the process before exec, which is pytest.
    status = Path("/proc/self/status").read_text().split()
    return int(status[status.index("VmHWM:") + 1]) / 1024

# Once on a corner, so that loading the compiled loops is not timed.
tiny = grid.crop(grid.shape[0] // 2, grid.shape[1] // 2, (40, 40))
lidar_to_chm(path, tiny, algorithm, options=LidarOptions(**given | {"keep_points": 0}))
start = time.process_time()
with laspy.open(path) as reader:
    for _ in reader.chunk_iterator(1_000_000):
        pass
decode_s = time.process_time() - start
start = time.process_time()
chm = lidar_to_chm(path, grid, algorithm, options=LidarOptions(**given))
total_s = time.process_time() - start
print(json.dumps(dict(points=header.point_count, decode_s=decode_s, total_s=total_s, peak_mb=peak_mb(),
                      method=chm.attrs["ground_method"], km2=chm.size * 0.25e-6)))
"""


def measure(path, epsg, algorithm="p2r", **options):
    command = [sys.executable, "-c", TASK, str(path), str(epsg), algorithm, json.dumps(options)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "RAYON_NUM_THREADS": "1"}
    result = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    return json.loads(result.stdout.splitlines()[-1])


def report(name, m):
    rate = m["points"] / m["total_s"]
    print(  # noqa: T201 - a benchmark's result is what it prints
        f"\n{name}: {m['points'] / 1e6:.2f} M points, {m['method']}: {m['total_s']:.2f} core-s, "
        f"{rate / 1e6:.2f} M points/s, "
        f"{m['total_s'] / m['decode_s']:.2f} x decoding alone ({m['decode_s']:.2f} s), "
        f"peak {m['peak_mb']:.0f} MB, {m['peak_mb'] / m['km2']:.0f} MB per km2"
    )
    return rate


@pytest.fixture(scope="module")
def square_km(tmp_path_factory):
    """1 km² at 8 points per m², in flight lines as scanners deliver them, ground classified."""
    rng = np.random.default_rng(11)
    n = DENSITY_PER_M2 * 1_000_000
    along = np.sort(rng.random(n).astype(np.float32))
    x, y = 500_000 + 1000 * rng.random(n), 4_500_000 + 1000 * along
    crown = np.maximum(0, 22 - 4 * np.hypot((x % 9) - 4.5, (y % 9) - 4.5)) * (rng.random(n) < 0.8)
    header = laspy.LasHeader(point_format=6, version="1.4")
    header.scales, header.offsets = [0.01] * 3, [500_000, 4_500_000, 0]
    header.add_crs(CRS.from_epsg(32610))
    cloud = laspy.LasData(header)
    cloud.x, cloud.y, cloud.z = x, y, 300 + 0.2 * (x - 500_000) + crown + rng.normal(0, 0.03, n)
    cloud.classification = np.where(crown > 0, 5, 2).astype(np.uint8)
    cloud.return_number = cloud.number_of_returns = np.ones(n, np.uint8)
    cloud.gps_time = along.astype(np.float64) * 600
    path = tmp_path_factory.mktemp("cloud") / "square_km.laz"
    cloud.write(path)
    return path


@pytest.mark.parametrize(
    ("epsg", "options"),
    [
        pytest.param(32610, {}, id="classes"),
        pytest.param(32611, {}, id="classes, reprojected"),
        pytest.param(32610, {"keep_points": 0}, id="classes, decoded twice"),
        pytest.param(32610, {"ground": "filter"}, id="filter"),
        pytest.param(32610, {"subcircle_m": 0.3}, id="classes, sub-circle 0.3 m"),
    ],
)
def test_square_kilometre(square_km, request, epsg, options):
    m = measure(square_km, epsg, **options)
    rate = report(request.node.callspec.id, m)
    assert rate >= POINTS_PER_S
    assert m["peak_mb"] <= PEAK_MB_PER_KM2


@pytest.mark.parametrize(
    ("algorithm", "options"),
    [
        pytest.param("p2r", {"ground_interpolation": "tin"}, id="p2r over triangulated ground"),
        pytest.param("pitfree", {}, id="pitfree"),
        pytest.param("p2r", {"isolated_points": 0}, id="p2r, isolated returns kept"),
    ],
)
def test_cost_of_options(square_km, request, algorithm, options):
    """Told as a ratio to p2r over gridded ground, in turns; only the memory has a limit."""
    plain = measure(square_km, 32610)
    m = measure(square_km, 32610, algorithm, **options)
    report(request.node.callspec.id, m)
    print(f"  {m['total_s'] / plain['total_s']:.2f} x the time of p2r over gridded ground")  # noqa: T201 - as above
    assert m["peak_mb"] <= PEAK_MB_PER_KM2


def test_autzen(samples: Path):
    m = measure(samples / "autzen" / "autzen_unclassified_epsg2994_ft.laz", 32610)
    rate = report("Autzen, no classes, feet, reprojected", m)
    assert m["method"] == "progressive morphological filter"
    assert rate >= POINTS_PER_S
    assert m["peak_mb"] <= PEAK_MB_PER_KM2 * m["km2"]

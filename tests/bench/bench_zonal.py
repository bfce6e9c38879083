"""How often the bounds of statistics over polygons hold the true ones, on simulated sites that had no part in the tables.

Half of the sites calibrate (pixels and means over squares), the others are mapped and cut into polygons of all shapes; the
sample model saw none of them. What is true of a polygon is what the same statistics say of the true heights. Beside the
bounds the simpler way that is wrong: the whole surface moved by the error of its mean. Prints also how long a polygon of a
million pixels takes, and how the memory of one polygon grows with its area.
"""

import subprocess
import sys
import time
from functools import partial

import geopandas
import numpy as np
import pandas as pd
import pytest
import shapely
from scipy.spatial import Voronoi

from canopy.analyse.zonal import zonal_statistics, zones
from canopy.grid import Box, Lattice
from canopy.model.blocks import BlockKey, BlockMeans, fit_blocks
from canopy.model.calibration import fit_calibration, interval
from canopy.model.package import find_model, load_model
from canopy.mosaicker.quantum import error_bands, quantise
from canopy.simulate import ForestConfig, simulate_scene
from tests.finished_maps import CRS_M, GSD_M, some_heights, write_map

SITES, SIDE_PX = 48, 384
SEED = 771
CELLS = (400, 100, 20, 4)
"""Polygons that a site of 5.3 ha is cut into: 130 m², 530 m², 2 650 m² and 1.3 ha on average."""
EVERY = 37
"""Every so many pixels calibrate."""

BOUNDS = {
    "mean": "{}_m", "p50": "{}_m", "p95": "{}_m", "cover_2m": "{}", "cover_5m": "{}", "gap_fraction": "{}",
}  # fmt: skip


def say(text):
    print(text, flush=True)  # noqa: T201 - a benchmark's result is what it prints


def predicted(model, number):
    """Heights, spreads and true heights of a site, (row, col), and where it is."""
    box = Box(-8_130_000, 823_000 + 1000 * number, -8_130_000 + SIDE_PX, 823_000 + 1000 * number + SIDE_PX)
    where = Lattice(crs=CRS_M, gsd_m=GSD_M).grid(box)
    forest = ForestConfig.random(np.random.default_rng([SEED, number]))
    scene = simulate_scene(grid=where, seed=900_000 + number, forest=forest)
    found = model.predict(scene.image[None])
    return found.mean_m[0].numpy(), found.spread_m[0].numpy(), scene.height_m, where


def tables(sites):
    """What turns spreads into intervals, and how wrong means over squares are."""
    parts = [[each.ravel()[::EVERY] for each in site[:3]] for site in sites]
    names = np.repeat([f"S{number}" for number in range(len(sites))], parts[0][0].size)
    pixels = fit_calibration(*(np.concatenate(each) for each in zip(*parts, strict=True)), names)
    means = BlockMeans()
    for number, (mean_m, spread_m, true_m, _) in enumerate(sites):
        half_width_m = error_bands(*interval(mean_m, spread_m, pixels))[0]
        key = BlockKey(site=f"S{number}", crs="simulated", gsd_m=GSD_M)
        means.add(key, mean_m, half_width_m, true_m, np.ones(mean_m.shape, bool), row_px=0, col_px=0)
    return pixels, fit_blocks(means)


def cells(rng, count, where):
    """Cells of random points, clipped to the site: polygons of all sizes and shapes."""
    x, y = rng.uniform(0, SIDE_PX, (2, count))
    # Mirrored in all four edges, whose cells then end there.
    x, y = np.concatenate([x, -x, 2 * SIDE_PX - x, x, x]), np.concatenate([y, y, y, -y, 2 * SIDE_PX - y])
    found = Voronoi(np.stack([x, y], axis=1))
    corners = (found.vertices[found.regions[found.point_region[k]]] for k in range(count))
    return [shapely.Polygon(np.stack(where.xy(*each.T), axis=1)) for each in corners]


def shifted(zone, row):
    """The wrong way: bounds by the heights moved as a whole by the error of their mean."""
    down, up = row["mean_m"] - row["mean_lower_90_m"], row["mean_upper_90_m"] - row["mean_m"]
    out = {}
    for name in ("p50", "p95"):
        out[name] = (max(row[f"{name}_m"] - down, 0), row[f"{name}_m"] + up)
    for above_m in (2, 5):
        out[f"cover_{above_m}m"] = (zone.heights.share_above(above_m + down), zone.heights.share_above(above_m - up))
    return out


def told(true, low, high):
    """Whether the ends hold the true value up to rounding, how far apart they are, and on which side it is missed."""
    below, above = true < low - 1e-6, true > high + 1e-6
    return not (below or above), high - low, below, above


@pytest.mark.bench
def test_how_often_bounds_hold(tmp_path):
    model = load_model(find_model("canopy-sample"), "cpu")
    sites = [predicted(model, number) for number in range(SITES)]
    pixels, blocks = tables(sites[: SITES // 2])
    say(f"means: sides {blocks.sides_m}, lower {blocks.lower_factor}, upper {blocks.upper_factor}, squares {blocks.blocks}")
    rng, rows, inside = np.random.default_rng(SEED), [], []
    for number, (mean_m, spread_m, true_m, where) in enumerate(sites[SITES // 2 :]):
        lower_m, upper_m = interval(mean_m, spread_m, pixels)
        inside.append(((lower_m <= true_m) & (true_m <= upper_m)).mean())
        intervals = error_bands(lower_m, upper_m)
        made = write_map(tmp_path / f"map{number}", quantise(mean_m), where=where, error_m=intervals, blocks=blocks)
        truth = write_map(tmp_path / f"true{number}", quantise(true_m), where=where, half_width_m=None)
        for count in CELLS:
            frame = geopandas.GeoDataFrame(geometry=cells(rng, count, where), crs=where.crs)
            truths = dict(zones(truth, frame))
            for row, zone in zones(made, frame):
                known, found = (each.statistics(blocks) for each in (truths[row], zone))
                moved = shifted(zone, found)
                for name, suffix in BOUNDS.items():
                    true, low, high = (
                        known[suffix.format(name)],
                        *(found[suffix.format(f"{name}_{end}_90")] for end in ("lower", "upper")),
                    )
                    rows.append((name, "bounds", count, *told(true, low, high)))
                    if name in moved:
                        rows.append((name, "moved", count, *told(true, *moved[name])))
    say(f"pixels: intervals hold {np.mean(inside):.1%} of the true heights of {len(inside)} sites")
    table = pd.DataFrame(rows, columns=["statistic", "how", "cells", "held", "width", "below", "above"])
    means = table.groupby(["statistic", "how", "cells"]).mean()
    sizes = {count: (SIDE_PX * GSD_M) ** 2 / count for count in CELLS}
    say(f"{'':24}" + "".join(f"{f'{size:.0f} m²':>36}" for size in sizes.values()))
    for (name, how), part in means.groupby(level=[0, 1]):
        line = "".join(
            f"{f'{r.held:.1%} wide {r.width:.2f} (-{r.below:.0%} +{r.above:.0%})':>36}"
            for r in (part.loc[name, how, count] for count in CELLS)
        )
        say(f"{name:14} {how:9}{line}")
    for name in BOUNDS:
        assert means.loc[name, "bounds"]["held"].min() > 0.8, f"the bounds of {name} do not hold"
    assert means.loc["cover_2m", "moved", 4]["held"] < 0.5, "moving the surface would do as well"


def polygon_of(folder, side_px):
    made = write_map(folder, np.tile(some_heights((512, 512), unknown=0), (-(-side_px // 512),) * 2)[:side_px, :side_px])
    left, bottom, right, top = made.grid.bounds
    circle = shapely.Point((left + right) / 2, (bottom + top) / 2).buffer((right - left) * 0.564)
    frame = geopandas.GeoDataFrame(geometry=[circle.intersection(shapely.box(*made.grid.bounds))], crs=made.grid.crs)
    return made, frame


@pytest.mark.bench
def test_how_long_a_polygon_takes(tmp_path):
    made, frame = polygon_of(tmp_path / "map", 1000)
    measure = partial(zonal_statistics, made, frame)
    measure()
    times = []
    for _ in range(15):
        start = time.perf_counter()
        measure()
        times.append(time.perf_counter() - start)
    say(f"a polygon of 1 Mpx: {1000 * np.median(times):.0f} ms (fastest {1000 * min(times):.0f} ms)")


MEASURE = """
import sys
from pathlib import Path
import geopandas
from canopy.analyse.zonal import zonal_statistics
from canopy.region.folder import RegionFolder
made = RegionFolder.open(Path(sys.argv[1]))
zonal_statistics(made, geopandas.read_parquet(sys.argv[2]))
lines = Path("/proc/self/status").read_text().splitlines()  # not getrusage, which counts what the parent had before the fork
print(next(line.split()[1] for line in lines if line.startswith("VmHWM")))
"""


@pytest.mark.bench
def test_memory_of_a_polygon(tmp_path):
    peaks = []
    for side_px in (2048, 8192):
        _, frame = polygon_of(tmp_path / str(side_px), side_px)
        table = tmp_path / f"{side_px}.parquet"
        frame.to_parquet(table)
        done = subprocess.run(
            [sys.executable, "-c", MEASURE, str(tmp_path / str(side_px)), str(table)], check=True, capture_output=True
        )
        peaks.append(int(done.stdout) / 1024)
    say(f"one polygon of 4 and of 67 Mpx: {peaks[0]:.0f} and {peaks[1]:.0f} MB, ratio {peaks[1] / peaks[0]:.2f}")
    assert peaks[1] < 1.2 * peaks[0]

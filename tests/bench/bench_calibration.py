"""Intervals on simulated sites that differ in structure, split by site: half of them calibrate, the model saw none of them.

Prints what the 90 % interval holds, overall and by class, of pixels, squares and polygons, and how wide it is beside two
simpler intervals that are scaled to hold the same share: a constant one, and one factor on the raw spread.
"""

import numpy as np
import pytest
import shapely
from rasterio.features import rasterize
from scipy.optimize import brentq
from scipy.spatial import Voronoi

from canopy.metrics import CLASS_EDGES_M, class_index
from canopy.model.blocks import BlockKey, BlockMeans, block_coverage, mean_interval
from canopy.model.calibration import SPREAD_FLOOR_M, interval, measure_coverage
from canopy.model.data import ChipDataset
from canopy.model.evaluate import evaluate_chips
from canopy.mosaicker.calibrate import calibrate_models
from canopy.mosaicker.ensemble import load_ensemble
from canopy.mosaicker.publish import open_map
from canopy.raster import read_raster
from canopy.region import map_region
from canopy.tiler.chips import build_tile_set

CALIBRATE, TEST = range(300, 330), range(400, 430)
SIZE_PX, GSD_M = 768, 0.6
LEAST_PX = 5000


def say(text):
    print(text, flush=True)  # noqa: T201 - a benchmark's result is what it prints


def built(folder, name, seeds):
    """A tile set of grown forests, each a site of its own in one chip."""
    sources = "".join(
        f'[[source]]\nkind = "simulated"\nsite = "S{seed}"\nseeds = [{seed}]\nsize_m = {SIZE_PX * GSD_M}\n'
        f'licence = "Apache-2.0"\nimage_source = "canopy.simulate"\nlidar_source = "canopy.simulate"\n\n'
        for seed in seeds
    )
    recipe = folder / f"{name}.toml"
    recipe.write_text(
        f'name = "{name}"\ngsd_m = {GSD_M}\nchip_px = {SIZE_PX}\nstride_px = {SIZE_PX}\nmin_valid_fraction = 0.8\n'
        f"bands = [1, 2, 3]\n\n[split]\nseed = 1\nblock_m = 1536.0\nbuffer_m = 0.0\ntrain = 0.0\nval = 1.0\ntest = 0.0\n\n"
        f"{sources}"
    )
    return build_tile_set(recipe)


def voronoi_cells(rng, count):
    """Cells of random points, clipped to the site: polygons (col, row) in pixels of all sizes and shapes."""
    x, y = rng.uniform(0, SIZE_PX, (2, count))
    # Mirrored in all four edges, whose cells then end there.
    x, y = np.concatenate([x, -x, 2 * SIZE_PX - x, x, x]), np.concatenate([y, y, y, -y, 2 * SIZE_PX - y])
    cells = Voronoi(np.stack([x, y], axis=1))
    return [shapely.Polygon(cells.vertices[cells.regions[cells.point_region[k]]]) for k in range(count)]


def scaled_to(goal, arm, mean, true, *, cut=True, within=None):
    """Mean width of mean -/+ factor * arm with the factor that makes it hold the share `goal` of the true heights.

    Args:
        goal: The share.
        arm: Half-width for a factor of 1.
        mean: Predicted heights.
        true: True heights.
        cut: Whether the lower end stays above 0 m, as ours does.
        within: Classes (pixel,): the goal is for the worst of them; None: for all pixels together.
    """

    def ends(factor):
        lower = mean - factor * arm
        return np.maximum(lower, np.minimum(mean, 0)) if cut else lower, mean + factor * arm

    def excess(factor):
        lower, upper = ends(factor)
        inside = (lower <= true) & (true <= upper)
        return (inside.mean() if within is None else shares(inside, within).min()) - goal

    lower, upper = ends(brentq(excess, 0.01, 1000.0, xtol=1e-4))
    return float((upper - lower).mean())


def shares(inside, classes):
    """Share that is inside, of each class of at least `LEAST_PX`."""
    n = np.bincount(classes)
    return (np.bincount(classes, weights=inside) / np.maximum(n, 1))[n >= LEAST_PX]


@pytest.mark.bench
def test_coverage_on_simulated_sites(tmp_path):
    sets = [built(tmp_path, name, seeds) for name, seeds in (("calibrate", CALIBRATE), ("test", TEST))]
    result = calibrate_models("canopy-sample", [sets[0]])
    tables = result.calibrated
    for line in result.lines():
        say(line)

    ensemble = load_ensemble("canopy-sample")
    chips = list(evaluate_chips(ensemble, None, [(ChipDataset(sets[1], "val"), False, False)]))
    assert len(chips) >= 20
    known = [chip.counts & np.isfinite(chip.mean_m) for chip in chips]
    mean, spread, true = (
        np.concatenate([getattr(chip, name)[ok] for chip, ok in zip(chips, known, strict=True)])
        for name in ("mean_m", "spread_m", "true_m")
    )
    coverage = measure_coverage(tables.pixels, mean, spread, true, CLASS_EDGES_M)
    share = coverage.total.coverage
    say(f"{len(chips)} test sites, {coverage.total.n} px: coverage {share:.2%}")
    by_site = [
        measure_coverage(tables.pixels, c.mean_m[ok], c.spread_m[ok], c.true_m[ok]).total.coverage
        for c, ok in zip(chips, known, strict=True)
    ]
    say(f"by site: {', '.join(f'{v:.0%}' for v in sorted(by_site))}")
    predicted = {k: (c.n, c.coverage) for k, c in enumerate(coverage.classes) if c.n >= LEAST_PX}
    say(f"by class of predicted height: {', '.join(f'{k}: {v:.1%} of {n}' for k, (n, v) in predicted.items())}")
    lower, upper = interval(mean, spread, tables.pixels)
    inside = (lower <= true) & (true <= upper)
    index = class_index(true)
    say(f"by class of true height: {', '.join(f'{k}: {inside[index == k].mean():.1%}' for k in np.unique(index))}")

    raw, classes = np.maximum(spread, SPREAD_FLOOR_M), class_index(mean)
    worst = shares(inside, classes).min()
    constant, one_factor = (scaled_to(share, arm, mean, true, cut=False) for arm in (np.ones_like(mean), raw))
    cut, fair = scaled_to(share, raw, mean, true), scaled_to(worst, raw, mean, true, within=classes)
    say(
        f"mean width {coverage.total.mean_width_m:.2f} m; at the same coverage: constant {constant:.2f} m, one factor "
        f"on the raw spread {one_factor:.2f} m, the same cut at 0 m {cut:.2f} m, or with as much in its worst class of "
        f"predicted height ({worst:.1%}) {fair:.2f} m"
    )

    squares, cells = BlockMeans(), []
    rng = np.random.default_rng(0)
    for chip, ok in zip(chips, known, strict=True):
        low, high = interval(chip.mean_m, chip.spread_m, tables.pixels)
        half = (high - low) / np.float32(2)
        key = BlockKey(site=chip.site, crs=chip.crs, gsd_m=chip.gsd_m)
        squares.add(key, chip.mean_m, half, chip.true_m, ok, row_px=chip.row_px, col_px=chip.col_px)
        for count in (4, 12, 40):
            labels = rasterize(
                [(cell, k + 1) for k, cell in enumerate(voronoi_cells(rng, count))], out_shape=chip.mean_m.shape
            )
            for k in range(1, count + 1):
                own = ok & (labels == k)
                if own.sum() > 100:
                    cells.append((chip.mean_m[own].mean(), half[own].mean(), own.sum() * GSD_M**2, chip.true_m[own].mean()))
    held = block_coverage(tables.blocks, squares)
    say("squares: " + ", ".join(f"{side_m:g} m {sums.coverage:.1%} of {sums.n}" for side_m, sums in held.items()))
    mean_m, half_m, area_m2, true_m = np.array(cells).T
    low, high = mean_interval(mean_m, half_m, area_m2, tables.blocks)
    polygons = ((low <= true_m) & (true_m <= high)).mean()
    naive = half_m / np.sqrt(area_m2 / GSD_M**2)
    say(
        f"polygons: {len(cells)} of {area_m2.min():.0f} to {area_m2.max():.0f} m2, {polygons:.1%} held, mean half-width "
        f"{((high - low) / 2).mean():.2f} m; as if pixels were independent {(np.abs(mean_m - true_m) <= naive).mean():.1%}"
    )

    # The published files hold what the table promises: three sites as whole maps.
    tables.write(tmp_path / "tables.json")
    for chip in chips[:3]:
        image = sets[1] / "image" / f"{chip.id}.tif"
        map_region(imagery=image, model="canopy-sample", out=tmp_path / chip.id, calibration=tmp_path / "tables.json")
        published = open_map(tmp_path / chip.id)
        heights, _ = read_raster(sets[1] / "height" / f"{chip.id}.tif")
        known_m = heights.data[0]
        low, high = published["lower_90_m"].to_numpy(), published["upper_90_m"].to_numpy()
        ok = np.isfinite(low) & heights.valid
        mapped = ((low <= known_m) & (known_m <= high))[ok].mean()
        say(f"{chip.site} as a map: coverage {mapped:.1%}")
    assert 0.88 <= share <= 0.92
    assert all(0.85 <= v <= 0.95 for _, v in predicted.values())
    assert coverage.total.mean_width_m < min(constant, one_factor)
    assert naive.size

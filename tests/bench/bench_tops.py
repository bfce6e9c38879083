"""Are the tree tops trees? On simulated forests, whose trees are known: the true canopy height model, and a map of it.

A tree is one that a picture from above can show: 5 m high or more, inside the site, and its top no lower than a metre under
the canopy there. Tops and trees are paired one to one, nearest first, no farther apart than the radius of the tree's crown.
Beside the window that grows with the height two fixed ones. And: how often the interval of a top's pixel holds the true
height there, which is less often than it holds that of any pixel, since the highest were picked out.
"""

import numpy as np
import pytest
from scipy.ndimage import maximum_filter
from scipy.spatial import cKDTree

from canopy.analyse.tops import TopRule, find_tops
from canopy.model.calibration import interval
from canopy.model.package import find_model, load_model
from canopy.mosaicker.quantum import quantise
from canopy.simulate import ForestConfig, simulate_scene
from tests.bench.bench_zonal import GSD_M, SEED, predicted, say, tables
from tests.finished_maps import grid

SITES, SIDE_PX = 16, 512
RULES = {
    "0.7 of a crown": TopRule(),
    "a whole crown": TopRule(share=1.0),
    **{f"fixed, {side_m:g} m": TopRule(base_m=side_m, per_m=0.0, share=1.0) for side_m in (2.0, 3.0, 4.0, 6.0, 10.0)},
}


def found(height_m, rule):
    whole = tuple(slice(0, side) for side in height_m.shape)
    row, col, _ = find_tops(height_m, whole, rule, GSD_M)
    return row, col


def trees_of(scene):
    """(row, col) in pixels, height and crown radius in metres of the trees that can be seen from above."""
    trees = scene.trees
    col, row = scene.grid.pixel(trees.x, trees.y)
    inside = (row >= 0) & (col >= 0) & (row < SIDE_PX) & (col < SIDE_PX)
    tall = inside & (trees.height_m >= 5)
    canopy_m = maximum_filter(scene.height_m, 3)[row[tall].astype(int), col[tall].astype(int)]
    seen = np.flatnonzero(tall)[trees.height_m[tall] >= canopy_m - 1]
    return np.stack([row[seen], col[seen]], axis=1), trees.height_m[seen], trees.radius_m[seen]


def pairs(tops, trees, radius_m):
    """How many tops have a tree of their own, nearest first."""
    near = cKDTree(tops).query_ball_point(trees, np.maximum(radius_m / GSD_M, 1.5))
    candidates = sorted(
        (float(np.hypot(*(tops[top] - trees[tree]))), tree, top) for tree, there in enumerate(near) for top in there
    )
    taken: set[int] = set()
    paired: set[int] = set()
    for _, tree, top in candidates:
        if tree not in paired and top not in taken:
            paired.add(tree)
            taken.add(top)
    return len(paired)


@pytest.mark.bench
def test_tops_are_trees():
    counts = {name: np.zeros(3) for name in RULES}
    for number in range(SITES):
        forest = ForestConfig.random(np.random.default_rng([SEED, 1, number]))
        scene = simulate_scene(grid=grid((SIDE_PX, SIDE_PX), row=1000 * number), seed=910_000 + number, forest=forest)
        trees, _, radius_m = trees_of(scene)
        for name, rule in RULES.items():
            row, col = found(quantise(scene.height_m), rule)
            tops = np.stack([row, col], axis=1) + 0.5
            counts[name] += pairs(tops, trees, radius_m), len(tops), len(trees)
    scores = {}
    for name, (paired, tops, trees) in counts.items():
        precision, recall = paired / tops, paired / trees
        scores[name] = 2 * precision * recall / (precision + recall)
        say(
            f"{name:18} {tops:6.0f} tops of {trees:.0f} trees: precision {precision:.3f}, recall {recall:.3f}, "
            f"F1 {scores[name]:.3f}"
        )
    assert scores["0.7 of a crown"] == max(scores.values()), "a fixed window would do as well"


@pytest.mark.bench
def test_intervals_at_tops():
    model = load_model(find_model("canopy-sample"), "cpu")
    sites = [predicted(model, number) for number in range(32)]
    pixels, _ = tables(sites[:16])
    everywhere, tops, errors = [], [], []
    for mean_m, spread_m, true_m, _ in sites[16:]:
        lower_m, upper_m = interval(mean_m, spread_m, pixels)
        holds = (lower_m <= true_m) & (true_m <= upper_m)
        at = found(quantise(mean_m), TopRule())
        everywhere.append(holds.mean())
        tops.append(holds[at])
        errors.append((mean_m - true_m)[at])
    say(
        f"intervals hold {np.mean(everywhere):.1%} of all pixels and {np.concatenate(tops).mean():.1%} of those of tops "
        f"(bias there {np.concatenate(errors).mean():+.2f} m)"
    )

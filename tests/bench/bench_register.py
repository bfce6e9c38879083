"""Registration, judged: simulated pairs with a planted shift, and real pairs with one added. Prints the table.

Simulated pairs are forests grown with everything random (lean up to 9 degrees included) and real CHMs photographed anew; the
aligned pair is the truth. They are displaced by up to 5 px, and by up to 0.5 px to see that nothing is made worse.

Real pairs have an offset of their own that nobody knows, so two numbers are given: how well the difference of the shifts
measured with and without the added shift recovers it, and how well the measured shift itself does, as if the pair were
aligned. The first can be right for a wrong reason, the second wrong for a right one. Each chip is also registered against
the heights of another chip, where every one that is applied is a false one.
"""

import math
import time
from collections import Counter

import numpy as np
import pytest
from affine import Affine
from pyproj import CRS
from scipy import ndimage

from canopy.grid import Grid
from canopy.raster import Pixels, read_raster
from canopy.simulate import Conditions, ForestConfig, refine_heights, reimage, simulate_scene
from canopy.tiler.register import RegistrationSettings, Shift, measure_shift, robust_shift, shift_height

MARGIN_PX = 20
SIDE_PX = 256
SEEDS = range(100, 125)
SITES = {
    "IDTReeS": (("NEON_OSBS", "idt_"), ("NEON_MLBS", "idt_")),
    "TEAK": (("NEON_TEAK", ""),),
    "OSBS": (("NEON_OSBS", "OSBS_"),),
    "NZ": (("NZ_WELLINGTON", ""),),
}
UNSEEN_SITES = {"Autzen": (("US_AUTZEN", ""),), "Kootenay": (("CA_KOOTENAY_SFM", ""),)}
"""Nothing was chosen while looking at these."""


def pixels(image):
    return Pixels(data=image, valid=np.ones(image.shape[1:], np.bool_))


def settle(gsd_m):
    return RegistrationSettings(max_shift_m=12 * gsd_m)


def grown(seed, *, nadir=False, gsd_m=0.6):
    forest = ForestConfig.random(np.random.default_rng(seed))
    if nadir:
        forest = forest.model_copy(update={"conditions": forest.conditions.model_copy(update={"view_zenith_deg": 0.0})})
    side = SIDE_PX + 2 * MARGIN_PX
    grid = Grid(crs=CRS.from_epsg(32631), transform=Affine(gsd_m, 0, 5e5, 0, -gsd_m, 1e5), shape=(side, side))
    scene = simulate_scene(grid=grid, seed=seed, forest=forest)
    return scene.image, scene.height_m, gsd_m


def photographed(folder, seed, *, nadir=False, gsd_m=0.5):
    """A window of a real CHM with some forest in it, refined to 0.5 m, under a random light."""
    rng = np.random.default_rng(seed)
    files = sorted((folder / "lidar" / "neon_chm_1km").glob("*.tif"))
    chm, _ = read_raster(files[seed % len(files)])
    height = np.where(chm.valid, chm.data[0], np.nan).astype(np.float32)
    side = (SIDE_PX + 2 * MARGIN_PX) // 2
    while True:
        row, col = (int(rng.integers(0, n - side)) for n in height.shape)
        window = height[row : row + side, col : col + side]
        if np.isfinite(window).all() and (window > 2).mean() > 0.05:
            break
    fine = refine_heights(np.maximum(window, 0), 2)
    conditions = Conditions.random(rng)
    if nadir:
        conditions = conditions.model_copy(update={"view_zenith_deg": 0.0})
    return reimage(fine, gsd_m=gsd_m, rng=rng, conditions=conditions), fine, gsd_m


def displaced(height, shift_px, margin):
    """The label of the middle, lying `shift_px` (row, col) away from where it belongs: what is to be added is minus that."""
    moved = ndimage.shift(height, shift_px, order=3, mode="nearest")
    return np.clip(moved[margin:-margin, margin:-margin], 0, None).astype(np.float32)


def simulated_error(image, height, gsd_m, shift_px):
    """(measured - planted, px; residual after the decision, px; decision; seconds)."""
    cut = slice(MARGIN_PX, -MARGIN_PX)
    label = displaced(height, shift_px, MARGIN_PX)
    start = time.process_time()
    found = measure_shift(pixels(image[:, cut, cut]), label, gsd_m, settle(gsd_m))
    seconds = time.process_time() - start
    wrong = np.array([-found.y_m / gsd_m + shift_px[0], found.x_m / gsd_m + shift_px[1]])
    residual = float(np.hypot(*(wrong if found.applied else np.asarray(shift_px))))
    return float(np.hypot(*wrong)), residual, found, seconds


def simulated(make, seeds, longest_px=5.0):
    rows = []
    for seed in seeds:
        image, height, gsd_m = make(seed)
        rng = np.random.default_rng(10_000 + seed)
        azimuth, length = rng.uniform(0, 2 * math.pi), longest_px * rng.uniform()
        shift_px = (length * math.cos(azimuth), length * math.sin(azimuth))
        rows.append((*simulated_error(image, height, gsd_m, shift_px), length))
    return rows


def summary(name, rows):
    errors = np.array([r[0] for r in rows])
    applied = np.array([r[2].applied for r in rows])
    left = np.array([r[1] for r in rows])
    worse = np.array([r[1] - r[4] for r in rows])
    taken = errors[applied] if applied.any() else np.array([math.nan])
    print(  # noqa: T201 - a benchmark's result is what it prints
        f"\n{name}: {len(rows)} pairs, applied {applied.sum()}; error of the applied, px: median {np.median(taken):.3f}, "
        f"90 % {np.quantile(taken, 0.9):.3f}, most {taken.max():.2f}; of all measured: median {np.nanmedian(errors):.3f}; "
        f"left after the decision: median {np.median(left):.3f}; made worse by > 0.3 px: {(worse > 0.3).sum()}, most by "
        f"{worse.max():.2f}; median {np.median([r[3] for r in rows]):.2f} core-s; kept: {reasons([r[2] for r in rows])}",
        flush=True,
    )
    return np.median(taken), (worse > 0.3).sum()


def reasons(shifts):
    """How often each test kept a label, by the first words of the reason."""
    words = {
        "canopy": "contrast",
        "two": "halves",
        "another": "rival",
        "score": "gain",
        "chance": "chance",
        "(": "limit",
        "m2": "area",
    }
    kept = Counter()
    for found in shifts:
        if not found.applied:
            text = found.decision.removeprefix("kept: ")
            name = next((name for start, name in words.items() if text.startswith(start)), "")
            kept[name or ("uncertainty" if "uncertainty" in text else text[:40])] += 1
    return dict(kept)


def real_chips(folder, parts):
    for site, prefix in parts:
        for path in sorted((folder / "pairs" / site).glob(f"{prefix}*_rgb.tif")):
            image, grid = read_raster(path)
            chm, _ = read_raster(str(path).replace("_rgb.tif", "_chm.tif"))
            height = np.where(chm.valid, np.maximum(chm.data[0], 0), np.nan).astype(np.float32)
            rows, cols = grid.shape
            side = 128
            for row in range(0, max(rows - side, 0) + 1, side):
                for col in range(0, max(cols - side, 0) + 1, side):
                    cut = slice(row, row + side), slice(col, col + side)
                    yield (
                        path.stem,
                        Pixels(data=image.data[:3, cut[0], cut[1]], valid=image.valid[cut]),
                        height[cut],
                        grid.gsd[0],
                    )


def real(folder, parts, seed=11):
    """For each chip: name, its own shift, that with one added, the errors of both kinds in px, and that against another."""
    rng = np.random.default_rng(seed)
    chips = list(real_chips(folder, parts))
    rows = []
    for number, (name, image, height, gsd_m) in enumerate(chips):
        azimuth, length_m = rng.uniform(0, 2 * math.pi), gsd_m * rng.uniform(1, 5)
        x_m, y_m = length_m * math.sin(azimuth), length_m * math.cos(azimuth)
        none = {"score_before": 0.0, "score_after": 0.0, "contrast": 0.0, "decision": ""}
        moved = shift_height(height, Shift(x_m=-x_m, y_m=-y_m, **none), gsd_m)
        settings = settle(gsd_m)
        own, found = (measure_shift(image, h, gsd_m, settings) for h in (height, moved))
        consistent = math.hypot(found.x_m - own.x_m - x_m, found.y_m - own.y_m - y_m) / gsd_m
        absolute = math.hypot(found.x_m - x_m, found.y_m - y_m) / gsd_m
        foreign = next(
            (h for _, _, h, _ in chips[number + 1 :] + chips[:number] if h.shape == height.shape and h is not height), None
        )
        false = None if foreign is None else measure_shift(image, foreign, gsd_m, settings)
        rows.append((name, own, found, consistent, absolute, false))
    return rows


def real_summary(name, rows):
    """Share of the reliable measurements that recover the added shift to 1 px, and their number; prints more."""
    enough = [r for r in rows if r[2].contrast >= RegistrationSettings().min_contrast]
    trusted = [r for r in enough if r[2].reliable]
    right = {limit: [np.mean([r[k] <= limit for r in trusted]) if trusted else math.nan for k in (3, 4)] for limit in (1, 2)}
    wrong = [r[5] for r in enough if r[5] is not None]
    together = robust_shift([r[1] for r in rows], RegistrationSettings())
    print(  # noqa: T201
        f"\n{name}: {len(rows)} chips, {len(enough)} with enough contrast, {len(trusted)} of them reliable "
        f"({sum(r[2].applied for r in rows)} applied; kept: {reasons([r[2] for r in rows])}); "
        f"added shift recovered to <= 1 px: {right[1][0]:.2f} of the reliable, "
        f"{np.mean([r[2].reliable and r[3] <= 1 for r in enough]):.2f} of those with contrast; "
        f"as if aligned: {right[1][1]:.2f} to <= 1 px, {right[2][1]:.2f} to <= 2 px; "
        f"of {len(wrong)} pairs that do not belong {sum(f.reliable for f in wrong)} reliable, "
        f"{sum(f.applied for f in wrong)} applied; "
        f"robust own shift x {together.x_m:.2f} y {together.y_m:.2f} m ({together.decision})",
        flush=True,
    )
    return right[1][0], len(trusted)


@pytest.mark.bench
@pytest.mark.parametrize("longest_px", [5.0, 0.5])
@pytest.mark.parametrize("nadir", [False, True], ids=["any view", "nadir"])
def test_simulated_pairs(samples, nadir, longest_px):
    view = f"{'nadir' if nadir else 'any view'}, up to {longest_px} px"
    summary(f"grown forests, {view}", simulated(lambda s: grown(s, nadir=nadir), SEEDS, longest_px))
    summary(f"real CHMs photographed, {view}", simulated(lambda s: photographed(samples, s, nadir=nadir), SEEDS, longest_px))


@pytest.mark.bench
@pytest.mark.parametrize("site", [*SITES, *UNSEEN_SITES])
def test_real_pairs(samples, site):
    real_summary(site, real(samples, {**SITES, **UNSEEN_SITES}[site]))

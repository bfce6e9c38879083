"""How often is change reported where there is none, and how often is true change found?

Simulated forests are photographed twice, under another sun, haze and colour, with other noise, from another side and up to
a pixel away, and mapped by the sample model; and a third time after trees were felled. The sample model is small and wrong
by about 5 m in a pixel of these forests, so what is found here is what intervals of such a width can show.
"""

import json
from itertools import pairwise
from pathlib import Path

import geopandas as gpd
import numpy as np
import pytest
import shapely
from pyproj import CRS
from scipy import ndimage

from canopy.analyse.change import NOMINAL, change_maps
from canopy.analyse.difference import GAIN, LOSS
from canopy.grid import Box, Lattice
from canopy.model.calibration import LEAST_PX
from canopy.raster import read_raster, write_raster
from canopy.region import map_region
from canopy.simulate import Conditions, ForestConfig, simulate_scene

ROOT = Path(__file__).parents[2]
LATTICE = Lattice(crs=CRS.from_epsg(32610), gsd_m=0.6)
SIDE_PX = 320
BOX = Box(-8_130_000, 823_000, -8_130_000 + SIDE_PX, 823_000 + SIDE_PX)
GRID = LATTICE.grid(BOX)
SITES = 24
MIN_AREA_M2 = 100.0
UNIT_PX = 16
"""Side of the squares that a false polygon may touch, about 10 m, the minimum mapping unit."""
RULES = ("root-sum-square", "sum")
RESAMPLES = 2000
CUTS = ((0.3, 0.3, 6.0), (0.7, 0.3, 10.0), (0.3, 0.7, 15.0), (0.7, 0.7, 25.0))
"""Places (share of the side across and down) and radii in metres of the discs in which trees are felled."""


def say(text=""):
    print(text, flush=True)  # noqa: T201 - a benchmark's result is what it prints


def moved(image, shift_px):
    """The image as a camera sees it whose place is wrong by less than a pixel."""
    bands = [ndimage.shift(band.astype(float), shift_px, order=1, mode="nearest") for band in image]
    return np.clip(np.rint(bands), 0, 255).astype(np.uint8)


def felled(trees):
    left, bottom, right, top = GRID.bounds
    cut = np.zeros(len(trees), bool)
    for across, down, radius_m in CUTS:
        x, y = left + across * (right - left), top - down * (top - bottom)
        cut |= np.hypot(trees.x - x, trees.y - y) < radius_m
    return cut


class Site:
    """A forest, three maps of it (once, again, and after felling), and its true heights."""

    def __init__(self, number, folder):
        rng = np.random.default_rng([7, number])
        forest = ForestConfig.random(rng).model_copy(update={"pulses_per_m2": 0.1})
        # Leaves on in both: a forest without leaves is another one.
        light = [Conditions.random(rng).model_copy(update={"autumn": 0.0}) for _ in range(3)]
        self.folder = folder
        self.heights_m = {}
        for visit, (name, cut) in enumerate({"once": None, "again": None, "felled": felled}.items()):
            seen = forest.model_copy(update={"conditions": light[visit]})
            scene = simulate_scene(grid=GRID, seed=number, forest=seen, exposure=visit, felled=cut)
            image = moved(scene.image, rng.uniform(-1, 1, 2)) if visit else scene.image
            write_raster(folder / f"{name}.tif", image, grid=GRID)
            map_region(imagery=folder / f"{name}.tif", model=ROOT / "models" / "canopy-sample", out=folder / name)
            self.heights_m[name] = scene.height_m
        assert (self.heights_m["once"] == self.heights_m["again"]).all()

    def change(self, after, **settings):
        name = "-".join([after, *(getattr(value, "stem", str(value)) for value in settings.values())])
        out = self.folder / f"change-{name}"
        change_maps(self.folder / "once", self.folder / after, out=out, min_area_m2=MIN_AREA_M2, **settings)
        return out

    def errors_m(self):
        return [
            read_raster(self.folder / name / "height.tif")[0].data[0] - self.heights_m[name] for name in ("once", "again")
        ]


@pytest.fixture(scope="module")
def sites(tmp_path_factory):
    made = []
    for number in range(SITES):
        folder = tmp_path_factory.mktemp(f"site{number}")
        made.append(Site(number, folder))
    return made


def bands_of(out):
    return read_raster(out / "change.tif")[0].data.astype(float)


def called(bands, width=1.0):
    """Pixels called changed by intervals of so many of their widths."""
    change, lower, upper = bands
    return (change + width * (upper - change) < 0) | (change - width * (change - lower) > 0)


def units_touched(changed):
    """Share of squares of the minimum mapping unit with a pixel in a polygon of change."""
    side = SIDE_PX // UNIT_PX
    return changed[: side * UNIT_PX, : side * UNIT_PX].reshape(side, UNIT_PX, side, UNIT_PX).any(axis=(1, 3)).mean()


def bounds(rates, rng):
    """95 % interval of the mean over sites, sites drawn anew."""
    draws = rng.choice(rates, (RESAMPLES, len(rates))).mean(axis=1)
    return np.quantile(draws, [0.025, 0.975])


def row(name, rates, rng):
    low, high = bounds(np.array(rates), rng)
    say(f"{name:58s} {np.mean(rates):7.2%}  ({low:.2%} to {high:.2%})  worst site {np.max(rates):.2%}")
    return high


@pytest.mark.bench
def test_false_changes(sites):
    """Nominal: at most 10 % of pixels, and of squares of the minimum mapping unit, where nothing changed."""
    rng = np.random.default_rng(0)
    alike = [np.corrcoef(*(error.ravel() for error in site.errors_m()))[0, 1] for site in sites]
    say(f"\n{SITES} forests of {SIDE_PX}² px at {LATTICE.gsd_m} m seen twice; nothing changed; 95 % by drawing sites anew")
    say(f"correlation of the two maps' errors: {np.mean(alike):.2f}, {np.min(alike):.2f} to {np.max(alike):.2f}")
    mae_m = [np.abs(error).mean() for site in sites for error in site.errors_m()]
    say(f"mean absolute error of the maps: {np.mean(mae_m):.1f} m, {np.min(mae_m):.1f} to {np.max(mae_m):.1f} m")
    assert np.min(alike) > 0
    for rule in RULES:
        outs = [site.change("again", rule=rule) for site in sites]
        pixels = [called(bands_of(out)).mean() for out in outs]
        kinds = [np.isin(read_raster(out / "classes.tif")[0].data[0], (LOSS, GAIN)) for out in outs]
        polygons = sum(len(gpd.read_file(out / "changes.gpkg")) for out in outs)
        high = [
            row(f"{rule}: pixels", pixels, rng),
            row(f"{rule}: area in polygons of {MIN_AREA_M2:g} m² and more", [kind.mean() for kind in kinds], rng),
            row(f"{rule}: squares of 10 m that a polygon touches", [units_touched(kind) for kind in kinds], rng),
        ]
        km2 = SITES * (SIDE_PX * LATTICE.gsd_m / 1000) ** 2
        say(f"{rule}: {polygons / km2:.0f} false polygons a km²")
        assert max(high) <= 1 - NOMINAL
        assert max(pixels) <= 1 - NOMINAL


@pytest.mark.bench
def test_intervals_that_are_too_narrow_are_found_out(sites):
    """Negative control: the check above must be able to fail."""
    rng = np.random.default_rng(0)
    bands = [bands_of(site.change("again", rule="root-sum-square", strip_px=256)) for site in sites]
    say("\nthe same pairs, other rules (negative control)")
    rates = {}
    for width in (1.0, 0.5, 0.35, 0.25, 0.15, 0.1):
        rates[width] = np.mean([called(each, width).mean() for each in bands])
        row(f"root-sum-square, {width:g} of the width", [called(each, width).mean() for each in bands], rng)
    for limit_m in (1, 2, 5, 10):
        rate = [(np.abs(each[0]) > limit_m).mean() for each in bands]
        row(f"a difference of more than {limit_m} m, whatever the errors", rate, rng)
        assert limit_m > 5 or np.mean(rate) > 1 - NOMINAL
    assert rates[0.1] > 1 - NOMINAL


@pytest.mark.bench
def test_stable_ground(sites):
    """The west half of each forest says how wide the intervals must be; the east half is looked at."""
    rng = np.random.default_rng(0)
    left, bottom, right, top = GRID.bounds
    half = (left + right) / 2
    rates, factors = [], []
    for site in sites:
        path = site.folder / "stable.gpkg"
        gpd.GeoDataFrame(geometry=[shapely.box(left, bottom, half, top)], crs=GRID.crs).to_file(path)
        out = site.change("again", stable=path)
        rates.append(called(bands_of(out))[:, SIDE_PX // 2 + UNIT_PX :].mean())
        measured = json.loads((out / "change.json").read_text())["stable"]
        factors += [measured["lower_factor"], measured["upper_factor"]]
    say(f"\nintervals fitted to stable ground in the west, over {LEAST_PX} px; pixels of the east called changed")
    row("stable ground of the same forest", rates, rng)
    say(f"factors on the intervals: median {np.median(factors):.2f}, {np.min(factors):.2f} to {np.max(factors):.2f}")
    assert bounds(np.array(rates), rng)[0] <= 1 - NOMINAL


def standing(path):
    """Polygons of the ground farther than a tree's shadow from where any was felled."""
    left, bottom, right, top = GRID.bounds
    cuts = [
        shapely.Point(left + across * (right - left), top - down * (top - bottom)).buffer(radius_m + 20)
        for across, down, radius_m in CUTS
    ]
    ground = shapely.box(*GRID.bounds).difference(shapely.union_all(cuts))
    gpd.GeoDataFrame(geometry=[ground], crs=GRID.crs).to_file(path)
    return path


@pytest.mark.bench
def test_true_losses(sites):
    """Trees are felled in discs: which of the losses are found, by their size and height, and what else is."""
    areas, losses = (MIN_AREA_M2, 300, 1000, np.inf), (2, 5, 10, 15, np.inf)
    say("\ntrue losses found: a quarter of the area or more in polygons of loss; found of all, by area and mean loss")
    for rule in ("sum", "root-sum-square", "stable ground"):
        found, every = np.zeros((3, 4), int), np.zeros((3, 4), int)
        polygons = []
        for site in sites:
            given = {"rule": rule} if rule in RULES else {"stable": standing(site.folder / "standing.gpkg")}
            out = site.change("felled", **given)
            kind = read_raster(out / "classes.tif")[0].data[0]
            true_m = site.heights_m["felled"] - site.heights_m["once"]
            label, count = ndimage.label(true_m < -2, structure=np.ones((3, 3)))
            pixels = np.bincount(label.ravel(), minlength=count + 1)[1:]
            mean_m = -ndimage.mean(true_m, label, range(1, count + 1)) if count else np.zeros(0)
            share = ndimage.mean(kind == LOSS, label, range(1, count + 1)) if count else np.zeros(0)
            for area_m2, loss_m, seen in zip(pixels * LATTICE.gsd_m**2, mean_m, share, strict=True):
                if area_m2 >= MIN_AREA_M2:
                    place = np.searchsorted(areas, area_m2, "right") - 1, np.searchsorted(losses, loss_m, "right") - 1
                    every[place] += 1
                    found[place] += seen >= 0.25
            for _, polygon in gpd.read_file(out / "changes.gpkg").iterrows():
                there = shapely.contains_xy(polygon.geometry, *centres())
                truth = true_m[there].mean()
                held = polygon.mean_change_lower_90_m <= truth <= polygon.mean_change_upper_90_m
                polygons.append([(true_m[there] < -2).mean() > 0.25, polygon.change_to_error > 1, held])
        say(f"\n{rule}\n{'':16s}" + "".join(f"{low:>4g} to {high:<6g} m" for low, high in pairwise(losses)))
        for number, (low, high) in enumerate(pairwise(areas)):
            cells = (f"{f:4d} of {n:<3d}    " for f, n in zip(found[number], every[number], strict=True))
            say(f"{low:5g} to {high:<5g} m² " + "".join(cells))
        true, sure, held = np.array(polygons, bool).reshape(-1, 3).T
        say(
            f"{true.sum()} polygons of change are true losses, {(true & sure).sum()} of them with change_to_error above 1; "
            f"{(~true).sum()} are not, {(~true & sure).sum()} of them with that"
        )
        say(
            f"intervals of the mean change that hold the true one: {held.mean():.0%}, of true losses {held[true].mean():.0%}"
        )


def centres():
    rows, cols = np.indices((SIDE_PX, SIDE_PX)) + 0.5
    return GRID.xy(cols, rows)

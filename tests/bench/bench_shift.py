"""Does the covariate-shift score tell what is unlike the calibration data from what is not? And what does it cost?

Real sites left out in turn and a site that is a picture coloured from LiDAR points; unseen blocks of the calibration sites;
simulated sites of one distribution; simulated photographs that are worse by degrees; and next to the distance that is used,
the ones that were tried: one ellipsoid around all sites, nearest neighbours, a logistic regression between a place and the
calibration data, and the same distance on what the network's encoder makes of a square.

The real sites need `CANOPY_SAMPLES`. The sample model saw a part of them in training, so the heights it predicts there are
better than a new place's; the runs without each site give nearly the same scores (`CANOPY_RUNS`: the folder of such runs).
"""

import os
import time
from functools import partial
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from pyproj import CRS
from scipy.ndimage import gaussian_filter, zoom
from scipy.spatial import cKDTree
from sklearn.covariance import LedoitWolf
from sklearn.decomposition import PCA
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.model_selection import GroupKFold, cross_val_predict
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from canopy.grid import Box, Lattice
from canopy.model.evaluate import predict_chip
from canopy.model.held_out import read_held_out
from canopy.model.package import find_model, load_model
from canopy.model.reference import ChipImages, squares_of
from canopy.model.scores import read_metrics
from canopy.model.shift import (
    FLAG_SHARE,
    FOLDS,
    SiteSquares,
    _distance,
    _fit,
    _folds,
    _limit,
    fit_shift,
    held_out_distances,
    shift_score,
)
from canopy.model.squares import LEAST_KNOWN, SQUARE_PX, measure
from canopy.raster import read_raster
from canopy.simulate import Conditions, ForestConfig, simulate_scene

ROOT = Path(__file__).parents[2]
LATTICE = Lattice(crs=CRS.from_epsg(32610), gsd_m=0.6)
SIDE_PX = 256
SITES = 48
"""Simulated sites."""
UNSEEN = "wrong GSD *"
"""What the score hardly sees: forests look alike at all scales, and a wrong GSD is no other picture but other heights."""
BLOCK_PX = 240
"""120 m at the pairs' 0.5 m."""
CALIBRATION = {"US_AUTZEN": "AUTZEN", "NEON_MLBS": "NEON_MLBS", "NEON_OSBS": "NEON_OSBS", "NEON_TEAK": "NEON_TEAK"}
ELSEWHERE = ("NZ_WELLINGTON", "CA_KOOTENAY_SFM", "FR_IGN_URBAN", "US_AUTZEN_BUILT")
COVERAGE = {site.site: site.coverage for site in read_metrics(find_model("canopy-sample")).coverage}
"""What the intervals of the sample model held at sites that had no part in the fit."""


def say(text=""):
    print(text, flush=True)  # noqa: T201 - a benchmark's result is what it prints


@pytest.fixture(scope="module")
def model():
    torch.set_num_threads(1)
    return load_model(ROOT / "models" / "canopy-sample")


def measured(model, image, valid):
    """The squares of an image and of what the model says there; a plot lies in the corner of a window."""
    rows, cols = (max(model.contract.window_px - side, 0) for side in valid.shape)
    image, valid = np.pad(image, ((0, 0), (0, rows), (0, cols))), np.pad(valid, ((0, rows), (0, cols)))
    mean_m, spread_m = predict_chip(model, image, valid)
    contract = model.contract
    return measure(image, valid & np.isfinite(mean_m), mean_m, spread_m, mean=contract.mean, std=contract.std)


def site_of(parts):
    """Squares of several images as a site, with the blocks of ground they lie on."""
    blocks, features = [], []
    for number, squares in enumerate(parts):
        features.append(squares.features)
        blocks += [(number, r, c) for r, c in zip(squares.row // BLOCK_PX, squares.col // BLOCK_PX, strict=True)]
    number = {block: k for k, block in enumerate(sorted(set(blocks)))}
    return SiteSquares(features=np.concatenate(features), block=np.array([number[block] for block in blocks]))


# --- simulated -------------------------------------------------------------------------------------------------------------


def photograph(seed, **changes):
    forest = ForestConfig.random(np.random.default_rng([1, seed])).model_copy(update=changes)
    box = Box(-8_130_000, 823_000, -8_130_000 + SIDE_PX, 823_000 + SIDE_PX)
    return simulate_scene(grid=LATTICE.grid(box), seed=seed, forest=forest).image


@pytest.fixture(scope="module")
def simulated(model):
    """(photograph, squares) of each simulated site."""
    found = []
    for seed in range(SITES):
        image = photograph(seed)
        found.append((image, site_of([measured(model, image, np.ones(image.shape[1:], bool))])))
    return found


def rescaled(image, factor, *, fills):
    """The picture of a camera with pixels coarser by `factor`, resampled to its old ones or, wrongly, taken for them."""
    coarse = np.stack([gaussian_filter(band.astype(float), factor / 2 if factor > 1 else 0) for band in image])
    coarse = np.stack([zoom(band, 1 / factor, order=1) for band in coarse])
    if fills:
        return np.stack([zoom(band, image.shape[1] / coarse.shape[1], order=1) for band in coarse])
    times = -(-image.shape[1] // coarse.shape[1])
    return np.tile(coarse, (1, times, times))[:, : image.shape[1], : image.shape[2]]


def degrees(rng):
    """Name -> the picture made worse by one of four degrees, 0 as it is."""

    def graded(change, grades):
        return [lambda image, grade=grade: change(image.astype(float), grade) for grade in grades]

    noise = rng.normal(size=(3, SIDE_PX, SIDE_PX))
    return {
        "brightness + (DN)": graded(lambda x, g: x + g, (0, 30, 60, 90, 120)),
        "brightness * 1/": graded(lambda x, g: x / g, (1, 1.5, 2, 3, 4)),
        "blur (px)": graded(lambda x, g: gaussian_filter(x, (0, g, g)), (0, 0.5, 1, 2, 3)),
        "noise (DN)": graded(lambda x, g: x + g * noise, (0, 10, 20, 30, 40)),
        "resampled, GSD *": graded(partial(rescaled, fills=True), (1, 1.5, 2, 3, 4)),
        UNSEEN: graded(partial(rescaled, fills=False), (1, 1.5, 2, 3, 4)),
        "colour cast (DN)": graded(lambda x, g: x + g * np.array([1, 0, -1])[:, None, None], (0, 20, 40, 60, 80)),
        "haze": graded(lambda x, g: x * (1 - g) + 200 * g, (0, 0.2, 0.4, 0.6, 0.8)),
    }


@pytest.mark.bench
def test_sites_of_one_distribution(simulated):
    """Nominal: 5 % of the squares beyond the limit, at most 10 % of the sites flagged."""
    rng = np.random.default_rng(0)
    sites = {f"{k:02d}": squares for k, (_, squares) in enumerate(simulated)}
    say(f"\n{SITES} simulated sites alike, {(SIDE_PX // SQUARE_PX) ** 2} squares each; 10 draws of calibration sites")
    say("calibration sites  limit by  limit  squares beyond  new sites flagged")
    for count in (4, 10, 16, 24, 32):
        shares, flags, limits = [], [], []
        for _ in range(10):
            order = rng.permutation(sorted(sites))
            reference = fit_shift({name: sites[name] for name in order[:count]})
            new = [shift_score(sites[name].features, reference) for name in order[count:]]
            shares += [shift.share for shift in new]
            flags += [shift.flagged for shift in new]
            limits.append(reference.limit)
        say(
            f"{count:17d}  {reference.held_out:>8s}  {np.mean(limits):5.2f}  {np.mean(shares):14.1%}  {np.mean(flags):17.1%}"
        )
        if reference.held_out == "sites":
            assert np.mean(flags) <= 0.1
            assert np.mean(shares) <= 0.1


@pytest.mark.bench
def test_degrees_of_change_raise_the_score(model):
    """Twelve forests calibrate and eight others are photographed worse and worse, all by one camera in one light.

    In one light, because the first degree of darkness of a bright photograph is nothing new where others are dark.
    """
    every = [photograph(1000 + k, conditions=Conditions()) for k in range(20)]
    whole = np.ones(every[0].shape[1:], bool)
    reference = fit_shift({str(k): site_of([measured(model, image, whole)]) for k, image in enumerate(every[:12])})
    images = every[12:]
    say(f"\nmedian distance over the limit, mean of {len(images)} sites (share of the squares beyond it; sites flagged)")
    fallen = []
    for name, changes in degrees(np.random.default_rng(3)).items():
        row = []
        for change in changes:
            changed = [np.clip(np.rint(change(image)), 0, 255).astype(np.uint8) for image in images]
            row.append([shift_score(measured(model, image, whole).features, reference) for image in changed])
        medians = [np.mean([shift.median for shift in shifts]) for shifts in row]
        told = (
            f"{median:.2f} ({np.mean([shift.share for shift in shifts]):4.0%}; {sum(shift.flagged for shift in shifts)})"
            for median, shifts in zip(medians, row, strict=True)
        )
        say(f"{name:18s} {'   '.join(told)}")
        if name != UNSEEN and (medians[-1] < 1 or not all(a < b for a, b in pairwise(medians))):
            fallen.append(name)
    assert not fallen, f"the score does not rise with {fallen}"


# --- real ------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def images(samples):
    """Site -> (image, valid) of each of its pictures: those of the first three bands."""
    found = {}
    for site in (*CALIBRATION, *ELSEWHERE):
        for path in sorted((samples / "pairs" / site).glob("*_rgb.tif")):
            pixels, _ = read_raster(path)
            # A picture coloured from first returns is no photograph: it is what is to be found elsewhere, not calibrated on.
            if "colorlas" not in path.name:
                found.setdefault(CALIBRATION.get(site, site), []).append((pixels.data[:3], pixels.valid))
    return found


@pytest.fixture(scope="module")
def real(model, images):
    """Site -> squares; of the calibration sites by the runs without each, where those are at hand."""
    predicted = {site: site_of([measured(model, *each) for each in pictures]) for site, pictures in images.items()}
    if runs := os.environ.get("CANOPY_RUNS"):
        chips = ChipImages([ROOT / "tiles" / name for name in ("neon", "autzen")])
        for site in CALIBRATION.values():
            held_out = read_held_out(Path(runs) / f"canopy-sample-without-{site}" / "held_out.npz")
            predicted |= squares_of((chip for chip in held_out if chip.site == site), chips, model.contract)
    return predicted


@pytest.mark.bench
def test_real_sites_left_out_in_turn(real):
    calibration = {site: real[site] for site in CALIBRATION.values()}
    say("\nreal places: squares, share of them beyond the limit, median distance over it; what the intervals held")

    def row(name, shift, coverage):
        flag = "flagged" if shift.flagged else "-"
        say(f"{name:38s} {shift.squares:5d}  {shift.share:6.1%}  {shift.median:5.2f}  {flag:8s} {coverage}")

    for site in calibration:
        shift = shift_score(
            real[site].features, fit_shift({other: squares for other, squares in calibration.items() if other != site})
        )
        row(f"{site}, by the other three", shift, f"{COVERAGE[site]:.1%}")
        assert shift.flagged or 0.85 <= COVERAGE[site] <= 0.95
    reference = fit_shift(calibration)
    for site in ELSEWHERE:
        shift = shift_score(real[site].features, reference)
        row(f"{site}, by all four", shift, f"{COVERAGE[site]:.1%}" if site in COVERAGE else "")
    assert shift_score(real["NZ_WELLINGTON"].features, reference).share > 0.95

    say("\nunseen blocks of 120 m of the calibration sites, each as a sheet of its own")
    for site, distance in held_out_distances(calibration, "blocks").items():
        block = calibration[site].block
        each = [(distance[block == k] > reference.limit).mean() for k in np.unique(block)]
        beyond = (distance > reference.limit).mean()
        flagged = np.mean(np.array(each) >= FLAG_SHARE)
        say(f"{site:12s} {len(each):3d} blocks, {flagged:6.1%} flagged; {beyond:.1%} of the squares beyond")


# --- the alternatives ------------------------------------------------------------------------------------------------------


class Nearest:
    """The distance that is used."""

    def fit(self, sites):
        self.model = _fit([site.astype(float) for site in sites])
        return self

    def distance(self, features):
        return _distance(features, self.model)


class Ellipsoid:
    """One centre and covariance of all sites, each with the same weight."""

    def fit(self, sites):
        most = max(len(site) for site in sites)
        self.fitted = LedoitWolf().fit(np.concatenate([np.resize(site, (most, site.shape[1])) for site in sites]))
        return self

    def distance(self, features):
        return np.sqrt(self.fitted.mahalanobis(features))


class Neighbours:
    """Mean distance to the five nearest of 150 squares a site, where squares of a site have unit covariance."""

    def fit(self, sites):
        within = np.mean([LedoitWolf().fit(site).covariance_ for site in sites], axis=0)
        values, vectors = np.linalg.eigh(within)
        self.white = vectors / np.sqrt(values)
        rng = np.random.default_rng(0)
        drawn = [site[rng.permutation(len(site))[:150]] for site in sites]
        self.tree = cKDTree(np.concatenate(drawn) @ self.white)
        return self

    def distance(self, features):
        return self.tree.query(features @ self.white, k=5)[0].mean(axis=1)


def held_out_limit(kind, sites):
    distances = {}
    folds = {name: _folds(site.block) for name, site in sites.items()}
    for fold in range(FOLDS):
        fitted = kind().fit([site.features[folds[name] != fold] for name, site in sites.items()])
        for name, site in sites.items():
            own = folds[name] == fold
            distances.setdefault(name, np.zeros(len(own)))[own] = fitted.distance(site.features[own])
    return _limit(distances)


def separation(place, sites):
    """How well a logistic regression tells a place from the calibration data: area under the curve, held out by blocks."""
    rng = np.random.default_rng(0)
    features, label, group = [], [], []
    for number, squares in enumerate((place, *sites)):
        kept = rng.permutation(len(squares.features))[:200]
        features.append(squares.features[kept])
        label.append(np.full(len(kept), number > 0))
        group.append(squares.block[kept] + 10_000 * number)
    features, label, group = (np.concatenate(each) for each in (features, label, group))
    classifier = make_pipeline(StandardScaler(), LogisticRegression(class_weight="balanced", max_iter=2000))
    score = cross_val_predict(classifier, features, label, groups=group, cv=GroupKFold(5), method="decision_function")
    return roc_auc_score(label, score)


def encoded(model, image, valid):
    """Squares of an image as the network's encoder sees them: the means of all its maps over each."""
    rows, cols = (-(-side // SQUARE_PX) * SQUARE_PX for side in valid.shape)
    parts = []
    for top in range(0, rows, SIDE_PX):
        for left in range(0, cols, SIDE_PX):
            span = slice(top, min(top + SIDE_PX, rows)), slice(left, min(left + SIDE_PX, cols))
            shape = tuple(part.stop - part.start for part in span)
            seen, picture = np.zeros(shape, bool), np.zeros((3, *shape), np.uint8)
            cut = valid[span]
            seen[: cut.shape[0], : cut.shape[1]], picture[:, : cut.shape[0], : cut.shape[1]] = (
                cut,
                image[(slice(None), *span)],
            )
            if not seen.any():
                continue
            with torch.inference_mode():
                maps, _ = model.network.backbone(model.prepare(picture[None], seen[None]))
                cells = tuple(side // SQUARE_PX for side in shape)
                pooled = [torch.nn.functional.adaptive_avg_pool2d(each, cells)[0] for each in maps]
            share = seen.reshape(cells[0], SQUARE_PX, cells[1], SQUARE_PX).mean(axis=(1, 3))
            features = torch.cat(pooled).permute(1, 2, 0).numpy()[share >= LEAST_KNOWN]
            at = np.argwhere(share >= LEAST_KNOWN) * SQUARE_PX + (top, left)
            parts.append((features, at))
    return parts


def encoded_site(model, pictures, most=60):
    features, blocks = [], []
    rng = np.random.default_rng(0)
    for number, (image, valid) in enumerate(pictures):
        parts = encoded(model, image, valid)
        chosen = rng.permutation(len(parts))[:most]
        for part in (parts[k] for k in chosen):
            features.append(part[0])
            blocks += [(number, *place) for place in (part[1] // BLOCK_PX).tolist()]
    names = {block: k for k, block in enumerate(sorted(set(blocks)))}
    return SiteSquares(features=np.concatenate(features), block=np.array([names[block] for block in blocks]))


def projected(sites, places, count=14):
    """Sites and places on the main directions of the sites, each site with the same weight."""
    most = max(len(site.features) for site in sites.values())
    stacked = np.concatenate([np.resize(site.features, (most, site.features.shape[1])) for site in sites.values()])
    scaler = StandardScaler().fit(stacked)
    pca = PCA(count, random_state=0).fit(scaler.transform(stacked))

    def turned(squares):
        return SiteSquares(features=pca.transform(scaler.transform(squares.features)), block=squares.block)

    return {name: turned(site) for name, site in sites.items()}, {name: turned(site) for name, site in places.items()}


@pytest.mark.bench
def test_what_else_was_tried(model, images, real):
    names = list(CALIBRATION.values())
    encoder = {site: encoded_site(model, images[site]) for site in (*names, "NZ_WELLINGTON")}
    say("\nshare of the squares beyond the limit by unseen blocks; calibration sites by the other three, NZ by all four")
    say(f"{'':34s} {'  '.join(f'{name:>13s}' for name in (*names, 'NZ_WELLINGTON'))}")
    rows = [("nearest site", Nearest, real, False), ("one ellipsoid", Ellipsoid, real, False)]
    rows += [("nearest neighbours", Neighbours, real, False), ("nearest site, encoder's features", Nearest, encoder, True)]
    for label, kind, data, projecting in rows:
        shares = []
        for place in (*names, "NZ_WELLINGTON"):
            sites, places = {name: data[name] for name in names if name != place}, {place: data[place]}
            if projecting:
                sites, places = projected(sites, places)
            fitted = kind().fit([site.features for site in sites.values()])
            shares.append((fitted.distance(places[place].features) > held_out_limit(kind, sites)).mean())
        say(f"{label:34s} {'  '.join(f'{share:13.1%}' for share in shares)}")
    area = [separation(real[p], [real[n] for n in names if n != p]) for p in (*names, "NZ_WELLINGTON")]
    say(f"{'logistic regression, area':34s} {'  '.join(f'{each:13.3f}' for each in area)}")
    rng = np.random.default_rng(1)
    unseen = []
    for name in names:
        blocks = rng.permutation(np.unique(real[name].block))
        half = np.isin(real[name].block, blocks[: len(blocks) // 2])
        parts = [SiteSquares(features=real[name].features[h], block=real[name].block[h]) for h in (half, ~half)]
        unseen.append(separation(parts[0], [parts[1], *(real[n] for n in names if n != name)]))
    say(f"{'  the same of unseen blocks':34s} {'  '.join(f'{each:13.3f}' for each in unseen)}")


# --- cost ------------------------------------------------------------------------------------------------------------------


@pytest.mark.bench
def test_cost(model, simulated):
    """What measuring takes of the time that the model takes for the same ground, both on one thread, in turns."""
    image = simulated[0][0]
    valid = np.ones(image.shape[1:], bool)
    contract = model.contract
    side, stride = contract.window_px, contract.stride_px
    wide = np.tile(image, (1, 1, 16))[:, :stride, : 16 * stride]
    heights = np.tile(predict_chip(model, image, valid)[0], (1, 16))[:stride, : 16 * stride]
    known = np.ones(heights.shape, bool)
    reference = fit_shift({str(k): squares for k, (_, squares) in enumerate(simulated[:4])})
    ratios = []
    for _ in range(15):
        start = time.thread_time()
        _ = model.predict(image[None, :, :side, :side], valid[None, :side, :side]).spread_m
        forward = time.thread_time() - start
        start = time.thread_time()
        shift_score(measure(wide, known, heights, heights, mean=contract.mean, std=contract.std).features, reference)
        ratios.append((time.thread_time() - start) / 16 / forward)
    say(f"\nmeasuring the ground of a window over predicting it: {np.median(ratios):.2%} of the processor's time")
    assert np.median(ratios) < 0.015

"""The audit's speed on one core, and how well fingerprints tell copies from other forests."""

import io
import time

import geopandas as gpd
import numpy as np
import pytest
from affine import Affine
from PIL import Image
from pyproj import CRS
from shapely.geometry import box

from canopy.grid import Grid
from canopy.raster import Pixels, open_raster
from canopy.simulate import simulate_scene
from canopy.tiler.audit import audit_pair
from canopy.tiler.fingerprint import MIN_VOTES, fingerprint, near_duplicates


def show(line):
    print(line)  # noqa: T201 - a benchmark's result is what it prints


@pytest.mark.bench
def test_20_000_by_4_000_footprints(tmp_path):
    """Chips of 256 m over 40 UTM zones, a tenth of the test chips near a training chip; target 1 s on an idle core."""
    rng = np.random.default_rng(1)

    def squares(lon, lat):
        size = 0.0023
        return gpd.GeoDataFrame(geometry=[box(x, y, x + size, y + size) for x, y in zip(lon, lat, strict=True)], crs=4326)

    lon, lat = rng.uniform(-120, 120, 20_000), rng.uniform(-60, 60, 20_000)
    squares(lon, lat).to_parquet(tmp_path / "train.parquet")
    near = rng.choice(20_000, 400)
    squares(np.r_[lon[near] + 0.002, rng.uniform(-120, 120, 3600)], np.r_[lat[near], rng.uniform(-60, 60, 3600)]).to_parquet(
        tmp_path / "test.parquet"
    )
    audit_pair(tmp_path / "train.parquet", tmp_path / "test.parquet")
    start, start_cpu = time.perf_counter(), time.process_time()
    report = audit_pair(tmp_path / "train.parquet", tmp_path / "test.parquet", buffer_m=100)
    wall, cpu = time.perf_counter() - start, time.process_time() - start_cpu
    assert sum(finding.count for finding in report.findings) >= 400
    show(f"\n20 000 x 4 000 footprints: {wall:.2f} s, {cpu:.2f} s of processor (target 1 s), files read and report made")


GRID = Grid(crs=CRS.from_epsg(32631), transform=Affine(0.6, 0, 500_000, 0, -0.6, 100_000), shape=(256, 256))


@pytest.fixture(scope="module")
def images(samples):
    """Real chips of 80 px and more, and simulated forests of different seeds: textures alike, layouts not."""
    found = {
        "simulated": [
            Pixels(data=simulate_scene(grid=GRID, seed=s).image, valid=np.ones(GRID.shape, bool)) for s in range(24)
        ]
    }
    for path in sorted(samples.glob("pairs/*/*_rgb.tif")):
        with open_raster(path) as raster:
            if raster.dtype == "uint8":
                kind = "real, 20 m plots of 40 px" if max(raster.shape) < 64 else "real, 80 px and more"
                found.setdefault(kind, []).append(raster.read(0, 0, raster.shape, (1, 2, 3)))
    return found


def crop(image, side, rng):
    rows, cols = (round(n * side) for n in image.shape[1:])
    r, c = rng.integers(0, image.shape[1] - rows + 1), rng.integers(0, image.shape[2] - cols + 1)
    return image[:, r : r + rows, c : c + cols]


def resize(image, zoom):
    rows, cols = (round(n * zoom) for n in image.shape[1:])
    picture = Image.fromarray(np.ascontiguousarray(np.moveaxis(image, 0, -1)))
    return np.moveaxis(np.asarray(picture.resize((cols, rows), Image.Resampling.BICUBIC)), -1, 0)


def jpeg(image):
    buffer = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(np.moveaxis(image, 0, -1))).save(buffer, "JPEG", quality=50)
    return np.moveaxis(np.asarray(Image.open(buffer)), -1, 0)


TREATMENTS = {
    "unchanged": lambda i, rng: i,
    "crop, 90 % of the area": lambda i, rng: crop(i, 0.9**0.5, rng),
    "crop, 70 % of the area": lambda i, rng: crop(i, 0.7**0.5, rng),
    "crop, 50 % of the area": lambda i, rng: crop(i, 0.5**0.5, rng),
    "crop, 50 % of the side": lambda i, rng: crop(i, 0.5, rng),
    "rescale 0.5": lambda i, rng: resize(i, 0.5),
    "rescale 0.7": lambda i, rng: resize(i, 0.7),
    "rescale 1.4": lambda i, rng: resize(i, 1.4),
    "rescale 2": lambda i, rng: resize(i, 2.0),
    "JPEG, quality 50": lambda i, rng: jpeg(i),
    "a flip or quarter turn": lambda i, rng: np.rot90(i[:, :, :: rng.choice((-1, 1))], rng.integers(1, 4), (1, 2)),
    "brightness and contrast": lambda i, rng: (i * 0.7 + 40).clip(0, 255).astype(np.uint8),
    "16 bit": lambda i, rng: i.astype(np.uint16) * 257,
    "crop 70 %, rescale 0.8, turn, JPEG": lambda i, rng: jpeg(resize(np.rot90(crop(i, 0.7**0.5, rng), 1, (1, 2)), 0.8)),
}


@pytest.mark.bench
def test_recall_of_copies(images):
    show(f"\nshare of treated copies found ({MIN_VOTES} votes)")
    for kind, originals in images.items():
        rng = np.random.default_rng(0)
        known = [fingerprint(image) for image in originals]
        show(f"{kind}: {len(originals)} images, {np.mean([len(codes) for codes in known]):.0f} codes each")
        for name, treat in TREATMENTS.items():
            found = []
            for image, codes in zip(originals, known, strict=True):
                data = np.ascontiguousarray(treat(image.data, rng))
                found.append(
                    len(near_duplicates([codes], [fingerprint(Pixels(data=data, valid=np.ones(data.shape[1:], bool)))]))
                )
            show(f"  {name:36s} {np.mean(found):.0%}")


@pytest.mark.bench
def test_false_positives(images):
    """All pairs; the plot that two sources cut from one photograph is the one true pair among them."""
    codes = [fingerprint(image) for group in images.values() for image in group]
    found = near_duplicates(codes, codes, min_votes=3)
    pairs = len(codes) * (len(codes) - 1) // 2
    for votes in (3, 4, 5, 6):
        others = int(((found.a < found.b) & (found.votes >= votes)).sum())
        show(f"{pairs} pairs of different images: {others} found with at least {votes} votes")


@pytest.mark.bench
def test_6_000_by_1_000_images(images):
    """Codes of real and simulated images in new places; the two sides are of different images. Target 10 s on one core."""
    rng = np.random.default_rng(0)
    sides = []
    for kind, count in (("simulated", 6000), ("real, 80 px and more", 1000)):
        own = [fingerprint(image) for image in images[kind]]
        pool = np.concatenate(own)
        codes = []
        for i in range(count):
            drawn = pool[rng.integers(0, len(pool), len(own[i % len(own)]))].copy()
            drawn["x_px"], drawn["y_px"] = rng.uniform(0, 256, (2, len(drawn)))
            codes.append(drawn)
        sides.append(codes)
    near_duplicates(sides[0][:2], sides[1][:2])
    start, start_cpu = time.perf_counter(), time.process_time()
    near_duplicates(*sides)
    wall, cpu = time.perf_counter() - start, time.process_time() - start_cpu
    show(
        f"6 000 x 1 000 images, {sum(map(len, sides[0]))} x {sum(map(len, sides[1]))} codes: "
        f"{wall:.1f} s, {cpu:.1f} s of processor"
    )
    start_cpu = time.process_time()
    for image in images["simulated"]:
        fingerprint(image)
    show(
        f"a fingerprint of 256 x 256 px: "
        f"{(time.process_time() - start_cpu) / len(images['simulated']) * 1000:.0f} ms of processor"
    )

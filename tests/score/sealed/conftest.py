"""Two sealed sites and a third to train on, drawn on the spot; a base model that costs nothing, and a sound submission."""

import hashlib
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import tomli_w
from affine import Affine
from pyproj import CRS
from safetensors.numpy import load_file, save_file
from scipy.ndimage import gaussian_filter

from canopy.grid import Grid
from canopy.model.package import read_contract
from canopy.raster import read_raster, write_raster
from canopy.score.sealed.confine import Ran
from canopy.score.sealed.judge import judge
from canopy.score.sealed.seal import SealSettings, seal
from canopy.score.sealed.submission import write_template
from canopy.score.sealed.task import read_task
from canopy.tiler.chips import build_tile_set
from tests.tile_sets import recipe

ROWS_PX, COLS_PX = 128, 256
CHIP_PX = 128
SECRET = bytes(range(32))

SITE = """
[[source]]
kind = "pair"
site = "{site}"
image = "{site}_rgb.tif"
height = "{site}_chm.tif"
licence = "CC0-1.0"
image_source = "drawn {site}"
lidar_source = "flight"
"""


def picture(seed: int) -> np.ndarray:
    """(band, row, col) uint8 with texture at several scales: what is found again by its content."""
    rng = np.random.default_rng(seed)
    waves = sum(gaussian_filter(rng.standard_normal((ROWS_PX, COLS_PX)), s) * s for s in (1.5, 3, 6, 12))
    grey = 128 + 45 * waves / waves.std()
    return np.stack([grey * share for share in (0.8, 1.0, 0.6)]).clip(0, 255).astype(np.uint8)


def height_of(image: np.ndarray) -> np.ndarray:
    """The true height of a pixel, which its green says."""
    return (image[1].astype(np.float32) / 255 * 34).astype(np.float32)


def draw_site(folder: Path, site: str, image: np.ndarray, *, left: float, gsd_m: float = 0.5) -> None:
    grid = Grid(crs=CRS.from_epsg(32617), transform=Affine(gsd_m, 0, left, 0, -gsd_m, 4_000_000), shape=image.shape[1:])
    write_raster(folder / f"{site}_rgb.tif", image, grid=grid)
    write_raster(folder / f"{site}_chm.tif", height_of(image)[None], grid=grid, nodata=np.nan)


def build(folder: Path, name: str, sites: dict[str, tuple[np.ndarray, float]], *, source: str = SITE, **changes) -> Path:
    """A tile set of drawn sites."""
    folder.mkdir()
    for site, (image, left) in sites.items():
        draw_site(folder, site, image, left=left)
    text = "".join(source.format(site=site) for site in sites)
    made = recipe(
        folder, text, chip_px=CHIP_PX, stride_px=CHIP_PX, block_m=100_000.0, buffer_m=0.0, name=f'"{name}"', **changes
    )
    return build_tile_set(made, workers=1)


def says(
    share: float,
    lift_m: float,
    *,
    seconds: float = 1.0,
    ended: str = "itself",
    code: int = 0,
    change=None,
    means: str = "Landlock 7, no network",
):
    """A model that says so much of the true height, and so much more; run in this process, with every file it was given."""

    def predict(model: Path, images: Path, out: Path, budget) -> Ran:
        for path in sorted(images.glob("*.tif")):
            pixels, _ = read_raster(path)
            heights = (share * height_of(pixels.data) + lift_m).astype(np.float32)
            np.save(out / f"{path.stem}.npy", heights if change is None else change(path.stem, heights))
        return Ran(ended=ended, code=code, seconds=seconds, memory_mib=100, said="", means=means)

    return predict


BASE, BETTER = says(0.7, 2.0), says(0.9, 0.6)


def retrained(model: Path, out: Path, *, noise: float, keep: float = 1.0, seed: int = 0, **changes) -> Path:
    """A copy of a model whose weights were moved, and whose contract tells so."""
    out.mkdir(parents=True)
    for name in ("card.md", "fixture.safetensors"):
        shutil.copyfile(model / name, out / name)
    rng = np.random.default_rng(seed)
    weights = {
        name: (keep * value + noise * value.std() * rng.standard_normal(value.shape)).astype(value.dtype)
        if value.dtype.kind == "f" and value.ndim > 1
        else value
        for name, value in load_file(model / "weights.safetensors").items()
    }
    save_file(weights, out / "weights.safetensors")
    contract = read_contract(model)
    digest = hashlib.sha256((out / "weights.safetensors").read_bytes()).hexdigest()
    training = contract.training.model_copy(update=changes)
    contract = contract.model_copy(update={"name": "ours", "weights_sha256": digest, "training": training})
    (out / "model.toml").write_text(tomli_w.dumps(contract.model_dump(exclude_none=True)))
    return out


@pytest.fixture(scope="session")
def world(tmp_path_factory, tiny_model):
    """A task with its key, a tile set of elsewhere, and a sound submission trained on that."""
    room = tmp_path_factory.mktemp("sealed")
    sites = {"WOOD": (picture(1), 480_000.0), "FIELD": (picture(2), 540_032.0)}
    tiles = build(room / "tiles", "closed", sites)
    elsewhere = build(room / "elsewhere", "open", {"ELSEWHERE": (picture(3), 600_000.0)})
    made = seal(
        [tiles], room / "task", key=room / "task.key", base=tiny_model, predict=BASE, secret=SECRET,
        settings=SealSettings(splits=("all",), by_site=True, least_px=200, buffer_m=50.0),
    )  # fmt: skip
    model = retrained(tiny_model, room / "model", noise=0.3, sites=("ELSEWHERE",))
    sound = write_template(made.task, room / "sound", model=model, tile_sets=[elsewhere], compute="1 CPU minute")
    return SimpleNamespace(
        room=room, tiles=tiles, elsewhere=elsewhere, task=made.folder, key=made.key, sealed=made, model=model, sound=sound,
        base=tiny_model, sites=sites,
    )  # fmt: skip


@pytest.fixture(scope="session")
def honest(world):
    """The verdict on the sound submission."""
    return judge(world.task, world.key, world.sound, predict=BETTER)


@pytest.fixture
def submit(world, tmp_path):
    """A copy of the sound submission to be made unsound, and the judge's verdict on it."""
    folder = tmp_path / "submission"
    shutil.copytree(world.sound, folder)

    def verdict(predict=BETTER, **arguments):
        return judge(world.task, world.key, folder, predict=predict, **arguments)

    return SimpleNamespace(folder=folder, verdict=verdict, task=read_task(world.task), replace=replace)

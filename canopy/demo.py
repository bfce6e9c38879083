"""The whole pipeline on a forest whose heights are known: simulate, label, map, score, and show.

Where the real samples are at hand (`CANOPY_SAMPLES`), the Autzen photograph is mapped as well. It has no truth to be
scored against here: the sample model was trained on a part of it.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from pyproj import CRS

from canopy.errors import OutputError
from canopy.grid import Box, Lattice
from canopy.metrics import HeightSums, IntervalSums
from canopy.raster import read_raster, write_raster

if TYPE_CHECKING:
    from canopy.region import Progress

GSD_M = 0.6
SIDE_PX = 1667
"""1 km at 0.6 m."""
SEED = 20_260
"""Of the demo's forest; the recipes of the training sets use others."""
FIRST_ROW, FIRST_COL = -8_130_000, 823_000
"""Lattice pixel of the scene's north-west corner in UTM 10 N: in Oregon, where forests like it stand."""

_MARK = ".canopy-demo"


@dataclass(frozen=True, slots=True, kw_only=True)
class DemoResult:
    """What the demo made and how well it did."""

    out: Path
    to_open: tuple[Path, ...]
    """Files worth opening, the pictures first."""
    height: HeightSums
    """The map against the known heights."""
    coverage: IntervalSums
    """The map's 90 % interval against the known heights."""
    label: HeightSums
    """The canopy height model from the simulated point cloud against the known heights."""
    seconds: float


def demo(
    out: Path,
    *,
    model: Path | str,
    samples: Path | None = None,
    say: Callable[[str], None],
    progress: Progress | None = None,
) -> DemoResult:
    """Run the demo into `out`.

    Args:
        out: Folder; made anew. Only a folder that an earlier demo made is replaced.
        model: Model folder or name.
        samples: Folder of the real samples; None: without them.
        say: Called with a line per step.
        progress: Called with (windows done, windows in all) while a map is made.

    Raises:
        CanopyError: the model is not usable, or `out` holds something else.
    """
    from canopy.model.package import find_model, read_contract
    from canopy.region import map_region
    from canopy.simulate import simulate_scene, write_scene
    from canopy.tiler.lidar import lidar_to_chm

    start = time.perf_counter()
    contract = read_contract(find_model(model))
    _prepare(out)
    lattice = Lattice(crs=CRS.from_epsg(32610), gsd_m=GSD_M)
    grid = lattice.grid(Box(FIRST_ROW, FIRST_COL, FIRST_ROW + SIDE_PX, FIRST_COL + SIDE_PX))

    say(f"growing 1 km² of forest and surveying it (seed {SEED})")
    scene = simulate_scene(grid=grid, seed=SEED)
    scene_folder = out / "scene"
    write_scene(scene, scene_folder)

    say(f"canopy heights from its {len(scene.points) / 1e6:.1f} million LiDAR points")
    chm = lidar_to_chm(scene_folder / "points.laz", grid).to_numpy()
    write_raster(out / "lidar_chm.tif", chm[None], grid=grid, nodata=float("nan"), band_names=("height_m",), units=("m",))
    label = HeightSums.of(chm, scene.height_m)

    say(f"mapping it with {contract.name}")
    result = map_region(imagery=scene_folder / "image.tif", model=model, out=out / "map", progress=progress)
    height, _ = read_raster(result.height)
    error, _ = read_raster(result.error)
    scored = HeightSums.of(height.data[0], scene.height_m)
    coverage = IntervalSums.of(error.data[1], error.data[2], scene.height_m)
    sheet = out / "contact_sheet.png"
    title = (
        f"simulated forest: MAE {scored.mae_m:.2f} m, bias {scored.bias_m:+.2f} m, interval holds {coverage.coverage:.0%}"
    )
    _contact_sheet(
        sheet, title, image=scene.image, truth=scene.height_m, truth_name="known height (m)", height=height.data[0],
        error=error.data[0],
    )  # fmt: skip
    to_open = [sheet, result.project, result.height, result.error]

    if samples is not None:
        say("mapping the Autzen photograph (1.4 km²)")
        photo = samples / "autzen" / "autzen.jpg"
        real = map_region(imagery=photo, model=model, out=out / "autzen", gsd_m=GSD_M, progress=progress)
        image, real_height, real_error = _autzen_arrays(photo, real.height, real.error)
        sheet = out / "autzen.png"
        _contact_sheet(sheet, "Autzen, Oregon", image=image, truth=None, truth_name="", height=real_height, error=real_error)
        to_open[1:1] = [sheet]
        to_open.append(real.height)
    return DemoResult(
        out=out, to_open=tuple(to_open), height=scored, coverage=coverage, label=label, seconds=time.perf_counter() - start
    )


def _prepare(out: Path) -> None:
    """A new, marked folder; an unmarked one with anything in it is somebody's and stays."""
    if out.exists() and any(out.iterdir()) and not (out / _MARK).exists():
        raise OutputError(f"{out} is not empty and was not made by canopy demo; choose another folder with --out")
    shutil.rmtree(out, ignore_errors=True)
    try:
        out.mkdir(parents=True)
        (out / _MARK).touch()
    except OSError as error:
        raise OutputError(f"cannot make folder {out} ({error.strerror}); choose another with --out") from error


def _autzen_arrays(photo: Path, height: Path, error: Path) -> tuple[NDArray[np.uint8], NDArray[Any], NDArray[Any]]:
    from canopy.tiler.imagery import open_imagery

    height_pixels, grid = read_raster(height)
    error_pixels, _ = read_raster(error)
    lattice = Lattice(crs=grid.crs, gsd_m=GSD_M)
    box = lattice.box_of(grid)
    assert box is not None, f"{height} is not on its lattice"
    with open_imagery(photo, lattice) as source:
        image = source.read(box).data
    return image, height_pixels.data[0], error_pixels.data[0]


def _contact_sheet(
    path: Path,
    title: str,
    *,
    image: NDArray[np.uint8],
    truth: NDArray[Any] | None,
    truth_name: str,
    height: NDArray[Any],
    error: NDArray[Any],
) -> None:
    """Image, truth where there is one, height and error side by side, as a PNG."""
    from matplotlib.figure import Figure

    step = max(1, max(image.shape[1:]) // 900)
    thin = (slice(None, None, step), slice(None, None, step))
    known = truth if truth is not None else height
    top = float(np.nanpercentile(known, 99.5))
    panels: list[tuple[str, NDArray[Any], dict[str, Any]]] = [("image", np.moveaxis(image, 0, -1)[thin], {})]
    if truth is not None:
        panels.append((truth_name, truth[thin], {"cmap": "viridis", "vmin": 0, "vmax": top}))
    panels.append(("mapped height (m)", height[thin], {"cmap": "viridis", "vmin": 0, "vmax": top}))
    panels.append(("90 % error: ± m", error[thin], {"cmap": "magma", "vmin": 0, "vmax": float(np.nanpercentile(error, 99))}))
    figure = Figure(figsize=(5.2 * len(panels), 5.6 * image.shape[1] / image.shape[2] + 0.4), layout="constrained", dpi=110)
    figure.suptitle(title)
    for axes, (name, array, style) in zip(figure.subplots(1, len(panels)), panels, strict=True):
        shown = axes.imshow(array, interpolation="nearest", **style)
        axes.set_title(name)
        axes.set_axis_off()
        if style:
            figure.colorbar(shown, ax=axes, shrink=0.8)
    figure.savefig(path)

"""A region from its imagery: plan its sheets, run each, publish one map.

What a user sees in the output folder is a finished map or nothing: work happens in a hidden folder beside the results and
the files take their names last. A sheet reads its own halo and shares nothing with the others.
"""

from __future__ import annotations

import json
import math
import platform
import shutil
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from filelock import FileLock, Timeout
from numpy.typing import NDArray
from pyproj import CRS

from canopy import __version__
from canopy.errors import AreaError, CanopyError, ContractError, GridError, OutputError
from canopy.grid import Box, Lattice, Layout, sheets_over, utm_crs
from canopy.mosaicker.publish import (
    BYTES_PER_PIXEL,
    ERROR_BANDS,
    HEIGHT_BANDS,
    StagedSheet,
    error_bands,
    quantise,
    stage_sheet,
    write_cog,
)
from canopy.tiler.area import Area, BoundsLonLat, area_mask, as_area
from canopy.tiler.find import imagery_source
from canopy.tiler.imagery import Band, Imagery, ImageryInfo, ImagerySource, LocalPaths, ground_gsd_m

if TYPE_CHECKING:
    import geopandas

    from canopy.model.package import Contract, HeightModel
    from canopy.mosaicker.predict import Stages
    from canopy.tiler.manifest import Manifest

SHEET_PX = 16_384
"""Side of a sheet: a region no larger is one sheet. The pixels do not depend on it."""

GSD_SLACK = 0.05
"""How much coarser than the model's range an image may be and still be resampled into it; a CRS distorts by as much."""

GAUSSIAN_90 = 1.6449
"""Half-width of the central 90 % of a normal distribution in standard deviations, for models without a calibration."""

_WORK = ".canopy-work"
_RESULTS = ("height.tif", "error.tif", "run.json")

Progress = Callable[[int, int], None]
"""Called with (windows done, windows in all)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MapResult:
    """The files of a finished map."""

    height: Path
    """Height above ground in metres."""
    error: Path
    """Half-width, lower and upper end of the 90 % interval in metres."""
    run: Path
    """What it was made of and how long it took (JSON)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Plan:
    """Everything that decides the pixels, settled before the first of them is computed."""

    source: ImagerySource
    bands: tuple[Band, ...] | None
    lattice: Lattice
    layout: Layout
    box: Box
    sheets: tuple[Box, ...]
    area: geopandas.GeoSeries | None
    """The area of interest in the lattice's CRS; None: the whole image."""
    resampled: str
    """How the imagery's pixels become lattice pixels."""

    @property
    def info(self) -> ImageryInfo:
        """What the imagery is."""
        return self.source.info


def map_region(
    aoi: Area | Path | BoundsLonLat | None = None,
    *,
    imagery: LocalPaths | Manifest | ImagerySource,
    model: Path | str,
    out: Path,
    gsd_m: float | None = None,
    crs: CRS | str | None = None,
    bands: Sequence[Band] | None = None,
    sheet_px: int = SHEET_PX,
    device: str = "cpu",
    precision: str = "float32",
    compile: bool = False,  # noqa: A002 - torch's word for it
    batch: int | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> MapResult:
    """Map canopy height and its error over an area.

    Args:
        aoi: Area of interest: an `Area`, a vector file in any CRS, (west, south, east, north) in degrees, or None for the
            whole imagery. Only pixels whose centre lies inside get a value; the model sees the imagery around them too.
        imagery: An image file with a CRS, a folder of such, a pattern, or a list of these: of overlapping files the finer
            gives the pixel, then the newer (see `canopy.tiler.imagery`). Or the manifest of a search of a STAC catalogue, or
            the JSON file it was written to. Or any other source of imagery.
        model: A model folder, or the name of one.
        out: Folder for the results; created, and refused when it holds anything, unless `overwrite`.
        gsd_m: Ground sampling distance of the map in metres; default the imagery's own, the finest where it is mixed.
        crs: Metric CRS of the map; default the imagery's own if metric, else the UTM zone of its centre.
        bands: 1-based image bands, or their names, in the order of the model's contract; default the bands of these names
            where the imagery has such, else all but a mask.
        sheet_px: Side of the sheets that the region is cut into; does not change a pixel.
        device: torch device.
        precision: What the network computes in: float32, or on a GPU float16 or bfloat16 (see `load_model`).
        compile: Have torch compile the network first: minutes once, for large regions.
        batch: Windows in one forward pass on a GPU; default 8.
        overwrite: Replace the results of an earlier run in `out`, once the new ones are whole.
        progress: Called with (windows done, windows in all).

    Returns:
        The paths of the files.

    Raises:
        CanopyError: bad input; nothing is left in `out` that was not there before.
    """
    from canopy.model.package import find_model, load_model
    from canopy.mosaicker.predict import windows_at_once

    started, clock = datetime.now(UTC), time.perf_counter()
    source = imagery_source(imagery)
    _check_device(device)
    count = windows_at_once(device.partition(":")[0], batch)
    height_model = load_model(find_model(model), device=device, precision=precision, compile=compile)
    loaded_s = time.perf_counter() - clock
    plan = _plan(aoi, source, height_model.contract, gsd_m=gsd_m, crs=crs, bands=bands, sheet_px=sheet_px)
    out = Path(out)
    with _work_folder(out, overwrite=overwrite, need_bytes=BYTES_PER_PIXEL * math.prod(plan.box.shape)) as work:
        staged, stages = _run_sheets(plan, height_model, work, progress, batch=count)
        tags = _tags(plan, height_model)
        with stages.time("publish"), ThreadPoolExecutor(max_workers=2, thread_name_prefix="publish") as publishers:
            # GDAL compresses on all cores but reads, averages and counts on one, so the two files keep two cores busy.
            jobs = [
                publishers.submit(
                    write_cog,
                    work / f"{kind}.tif",
                    [(sheet.box, getattr(sheet, kind)) for sheet in staged],
                    lattice=plan.lattice,
                    box=plan.box,
                    band_names=names,
                    tags=tags,
                )
                for kind, names in (("height", HEIGHT_BANDS), ("error", ERROR_BANDS))
            ]
            for job in jobs:
                job.result()
        stages.seconds = {"load model": loaded_s, **stages.seconds}
        wall_s = time.perf_counter() - clock
        record = _record(plan, height_model, stages, tags, batch=count, started=started, wall_s=wall_s)
        try:
            (work / "run.json").write_text(json.dumps(record, indent=2) + "\n")
            for name in _RESULTS:
                (work / name).replace(out / name)
        except OSError as error:
            raise OutputError(f"cannot write {out} ({error.strerror}); free disk space or choose another folder") from error
    return MapResult(height=out / "height.tif", error=out / "error.tif", run=out / "run.json")


# --- planning ------------------------------------------------------------------------------------------------------------


def _plan(
    aoi: Area | Path | BoundsLonLat | None,
    source: ImagerySource,
    contract: Contract,
    *,
    gsd_m: float | None,
    crs: CRS | str | None,
    bands: Sequence[Band] | None,
    sheet_px: int,
) -> _Plan:
    info = source.info
    coarsest = contract.gsd_range_m[1]
    if info.coarsest_gsd_m > coarsest * (1 + GSD_SLACK):
        raise ContractError(
            f"{info.coarsest} has a GSD of {info.coarsest_gsd_m:.3g} m, coarser than the {coarsest:g} m of {contract.name}: "
            f"resampling cannot bring back crowns that it does not show; use finer imagery or another model"
        )
    map_gsd_m = info.gsd_m if gsd_m is None else gsd_m
    named = {name.casefold(): name for name in info.band_names if name}
    if bands is None and all(name.casefold() in named for name in contract.bands):
        bands = [named[name.casefold()] for name in contract.bands]
    contract.check_imagery(band_count=info.band_count if bands is None else len(bands), dtype=info.dtype, gsd_m=map_gsd_m)
    lattice = Lattice(crs=_crs(crs) if crs is not None else info.metric_crs, gsd_m=map_gsd_m)
    layout = Layout(window_px=contract.window_px, stride_px=contract.stride_px)
    with source.open(lattice, bands) as opened:
        image_box, resampled = opened.box, opened.resampled
    on_ground_m = ground_gsd_m(lattice.grid(image_box))
    if abs(on_ground_m / lattice.gsd_m - 1) > GSD_SLACK:
        raise GridError(
            f"pixels of {lattice.gsd_m:g} m in {lattice.crs.name!r} are {on_ground_m:.3g} m on the ground at {info.source}, "
            f"more than {GSD_SLACK:.0%} off; choose a CRS made for that place with --crs, for example "
            f"{utm_crs(info.centre_lon_deg, info.centre_lat_deg).to_string()}"
        )
    wanted = None if aoi is None else as_area(aoi)
    area = None if wanted is None else wanted.polygons_in(lattice.crs)
    box = image_box
    if area is not None:
        covered = lattice.covering(tuple(area.total_bounds)).intersect(image_box)
        if covered is None:
            raise AreaError(
                f"the area of interest ({wanted}) lies outside {info.source} "
                f"(centre {info.centre_lon_deg:.4f}, {info.centre_lat_deg:.4f}); check its CRS and coordinates"
            )
        box = covered
    # A region that fits one sheet is one, wherever the sheet borders are: no window is then computed twice.
    sheets = (box,) if max(box.shape) <= sheet_px else tuple(sheets_over(box, sheet_px))
    return _Plan(
        source=source, bands=tuple(bands) if bands is not None else None, lattice=lattice, layout=layout, box=box,
        sheets=sheets, area=area, resampled=resampled,
    )  # fmt: skip


def _check_device(device: str) -> None:
    import torch

    try:
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise CanopyError(f"device {device!r} cannot be used ({reason}); give cpu, or cuda where there is a GPU") from error


def _crs(text: CRS | str) -> CRS:
    from pyproj.exceptions import CRSError

    try:
        return CRS.from_user_input(text)
    except CRSError as error:
        raise GridError(f"CRS {text!r} is not known; give for example EPSG:32610") from error


# --- running -------------------------------------------------------------------------------------------------------------


def _run_sheets(
    plan: _Plan, model: HeightModel, work: Path, progress: Progress | None, *, batch: int
) -> tuple[list[StagedSheet], Stages]:
    from canopy.mosaicker.predict import Stages

    stages = Stages()
    total = sum(
        len(plan.layout.windows_over(s.row0, s.row1)) * len(plan.layout.windows_over(s.col0, s.col1)) for s in plan.sheets
    )
    done = 0

    def advance(windows: int) -> None:
        nonlocal done
        done += windows
        if progress is not None:
            progress(done, total)

    staged: list[StagedSheet] = []
    has_height = False
    with plan.source.open(plan.lattice, plan.bands) as source:
        for sheet in plan.sheets:
            part, found = _run_sheet(
                plan, sheet, model=model, source=source, work=work, stages=stages, advance=advance, batch=batch
            )
            staged.append(part)
            has_height = has_height or found
    if not has_height:
        raise AreaError(
            f"{plan.info.source} has no valid pixel in the area of interest; choose an area that the imagery covers"
        )
    return staged, stages


def _run_sheet(
    plan: _Plan,
    sheet: Box,
    *,
    model: HeightModel,
    source: Imagery,
    work: Path,
    stages: Stages,
    advance: Callable[[int], None],
    batch: int,
) -> tuple[StagedSheet, bool]:
    """Predict one sheet into its staged files; whether it has any height."""
    from canopy.model.calibration import interval
    from canopy.mosaicker.ensemble import Ensemble
    from canopy.mosaicker.predict import predict_sheet

    ensemble = Ensemble(models=(model,))
    table = model.contract.calibration
    has_height = False

    def wanted(box: Box) -> NDArray[np.bool_]:
        return area_mask(plan.area, plan.lattice, box)

    with ExitStack() as stack:
        staged, writer = stack.enter_context(stage_sheet(work, plan.lattice, sheet))
        # Closed before the image is: an error while writing must not leave the reader thread on a closed file.
        predictions = stack.enter_context(
            closing(
                predict_sheet(
                    ensemble, source, plan.layout, sheet, wanted=wanted, stages=stages, advance=advance, batch=batch
                )
            )
        )
        for prediction in predictions:
            strip = prediction.strip
            with stages.time("blend"):
                keep = prediction.valid & wanted(strip.box)
                mean = np.where(keep, strip.mean_m, np.float32(np.nan))
                if table is None:
                    half_m = np.float32(GAUSSIAN_90) * strip.spread_m
                    lower, upper = np.maximum(mean - half_m, np.float32(0)), mean + half_m
                else:
                    lower, upper = interval(mean, strip.spread_m, table)
                height = quantise(mean)
                error = error_bands(lower, upper)
                has_height = has_height or bool(np.isfinite(height).any())
            with stages.time("write"):
                writer.write(strip.box, height, error)
    return staged, has_height


@contextmanager
def _work_folder(out: Path, *, overwrite: bool, need_bytes: int) -> Any:
    """A folder for unfinished work inside `out`; afterwards it is gone, and so are the folders that a failed run made."""
    if out.exists() and not out.is_dir():
        raise OutputError(f"{out} is a file; give a folder")
    work = out / _WORK
    others = [p.name for p in out.iterdir() if p.name != _WORK] if out.exists() else []
    if others and not overwrite:
        raise OutputError(f"{out} is not empty (it holds {others[0]}); choose another folder or pass --overwrite")
    missing = [folder for folder in (out, *out.parents) if not folder.exists()]
    try:
        work.mkdir(parents=True, exist_ok=True)
        lock = FileLock(work / "lock")
        lock.acquire(blocking=False)
    except Timeout as error:
        raise OutputError(f"another run is writing to {out}; wait for it, or choose another folder") from error
    except OSError as error:
        raise OutputError(f"cannot create {work} ({error.strerror}); choose another folder") from error
    finished = False
    try:
        for left in work.iterdir():  # by a run that was killed; its work cannot be told from that of other settings
            if left.name != "lock":
                left.unlink()
        free = shutil.disk_usage(work).free
        if free < need_bytes:
            raise OutputError(
                f"{out} has {free / 1e9:.2f} GB free and the map needs up to {need_bytes / 1e9:.2f} GB while it is made; "
                f"free disk space or choose another folder"
            )
        yield work
        finished = True
    finally:
        shutil.rmtree(work, ignore_errors=True)
        lock.release()
        if missing and not finished:
            for name in _RESULTS:
                (out / name).unlink(missing_ok=True)
            for folder in missing:  # the folders this run made, innermost first; one that somebody has used since stays
                if not any(folder.iterdir()):
                    folder.rmdir()


# --- what the run says about itself ----------------------------------------------------------------------------------------


def _tags(plan: _Plan, model: HeightModel) -> dict[str, str]:
    """Tags of both files: what the numbers mean and what they come from. No dates: the same run gives the same bytes."""
    contract = model.contract
    calibration, scenes = contract.calibration, len(plan.source.record())
    if calibration is None:
        promise = f"uncalibrated: {GAUSSIAN_90:g} times the model's spread, coverage not measured"
    else:
        sites = ", ".join(calibration.sites)
        promise = f"split-conformal by class of predicted height, nominal {calibration.nominal:.0%}, sites {sites}"
        held = "; ".join(f"{m.overall:.1%} on {m.how} ({', '.join(m.sites)})" for m in calibration.measured)
        promise += f"; measured coverage {held or 'none: nothing was held out to measure it on'}"
    return {
        "CANOPY_VERSION": __version__,
        "CANOPY_MODEL": f"{contract.name} {contract.version}",
        "CANOPY_MODEL_SHA256": contract.weights_sha256,
        "CANOPY_PRECISION": model.precision,
        "CANOPY_CALIBRATION": promise,
        "CANOPY_IMAGERY": Path(plan.info.source).name + (f", {scenes} files or items" if scenes > 1 else ""),
        "CANOPY_IMAGERY_RESAMPLING": plan.resampled,
        "CANOPY_WINDOW_PX": f"{plan.layout.window_px} every {plan.layout.stride_px}",
    }


def _record(
    plan: _Plan,
    model: HeightModel,
    stages: Stages,
    tags: dict[str, str],
    *,
    batch: int,
    started: datetime,
    wall_s: float,
) -> dict[str, Any]:
    import rasterio
    import torch

    rows, cols = plan.box.shape
    area_km2 = rows * cols * plan.lattice.gsd_m**2 / 1e6
    pixels = rows * cols
    return {
        "canopy": __version__,
        "started": started.isoformat(timespec="seconds"),
        "imagery": {
            "source": plan.info.source, "files": plan.source.record(), "gsd_m": plan.info.gsd_m,
            "dtype": plan.info.dtype, "bands": plan.bands,
            "crs": plan.info.crs.to_string(), "resampling": plan.resampled, "alpha": plan.info.alpha,
            "alpha_reason": plan.info.alpha_reason, "left_out": plan.info.left_out,
        },
        "model": {
            "name": model.contract.name, "version": model.contract.version, "weights_sha256": model.contract.weights_sha256,
            "calibration": tags["CANOPY_CALIBRATION"],
        },
        "map": {
            "crs": plan.lattice.crs.to_string(), "gsd_m": plan.lattice.gsd_m, "shape": [rows, cols],
            "extent_km2": area_km2, "sheets": len(plan.sheets), "window_px": plan.layout.window_px,
            "stride_px": plan.layout.stride_px, "windows": stages.windows,
        },
        "time": {
            "wall_s": round(wall_s, 3),
            "stages_s": {name: round(seconds, 3) for name, seconds in stages.seconds.items()},
            "bound_by": max(stages.seconds, key=lambda name: stages.seconds[name]),
            "mpx_per_s": round(pixels / wall_s / 1e6, 4),
            "km2_per_h": round(area_km2 / wall_s * 3600, 3),
        },
        "machine": {
            "device": str(model.device), "precision": model.precision, "compiled": model.compiled is not None,
            "batch": batch, "threads": torch.get_num_threads(), "python": platform.python_version(),
            "torch": torch.__version__, "rasterio": rasterio.__version__, "gdal": rasterio.__gdal_version__,
        },
    }  # fmt: skip

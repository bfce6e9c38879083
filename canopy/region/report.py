"""What a run says about itself: `run.json`, the one file of a map that is not the same twice."""

from __future__ import annotations

import platform
from datetime import datetime
from pathlib import Path
from typing import Any

from canopy import __version__
from canopy.errors import CanopyError
from canopy.mosaicker.stages import Rate, Stages
from canopy.region.plan import PlannedModel
from canopy.region.records import Stage, Work


def run_record(
    work: Work,
    stages: Stages,
    crew: dict[str, Any],
    *,
    shift: dict[str, Any],
    days: dict[str, Any],
    started: datetime,
    load_s: float,
    wall_s: float,
    fresh: int,
) -> dict[str, Any]:
    """The record of a run that has made its map.

    Args:
        work: All of whose sheets are done.
        stages: What was timed besides the sheets.
        crew: Who did them.
        shift: How unlike the calibration data the map is, see `canopy.region.shift.shift_record`.
        days: When its imagery was taken, see `canopy.region.dates.days_record`.
        started: When this run began.
        load_s: Seconds that loading the model took in this process.
        wall_s: Seconds since this run began.
        fresh: Sheets that it did itself; it found the others done.
    """
    import rasterio
    import torch

    plan = work.plan
    total = Stages(seconds={"load model": load_s} if load_s else {}, busy={"load model": load_s} if load_s else {})
    batch: dict[str, Any] = {}
    known_px = abstained_px = 0
    hosts: set[str] = set()
    every: tuple[Stage, ...] = ("predict",) if plan.one_file else ("predict", "publish")
    for record in (work.record_of(number, stage) for number in range(len(plan.sheets)) for stage in every):
        assert record is not None, "a sheet without a record"
        total.add(Stages.of(record.stages))
        batch = record.batch or batch
        hosts.add(record.host)
        if record.stage == "predict":
            known_px, abstained_px = known_px + record.known_px, abstained_px + record.abstained_px
    total.add(stages)
    rows, cols = plan.extent.shape
    pixels = rows * cols
    rate = Rate(wall_s=wall_s, pixels=pixels * fresh // len(plan.sheets), gsd_m=plan.gsd_m, bound_by=total.bound_by)
    return {
        "canopy": __version__,
        "started": started.isoformat(timespec="seconds"),
        "plan": {"identity": plan.identity, "sheets_found_done": len(plan.sheets) - fresh},
        "imagery": {**plan.imagery.told, **days, "bands": plan.bands, "resampling": plan.resampled},
        "models": [_told(model) for model in plan.models],
        "tta": plan.tta,
        "calibration": plan.tags["CANOPY_CALIBRATION"],
        "intervals": None if plan.calibration is None else plan.calibration.model_dump(mode="json"),
        "shift": shift,
        "map": {
            "crs": plan.crs, "crs_chosen": plan.crs_chosen, "gsd_m": plan.gsd_m, "shape": [rows, cols],
            "extent_km2": pixels * plan.gsd_m**2 / 1e6, "sheets": len(plan.sheets), "one_file": plan.one_file,
            "window_px": plan.window_px, "stride_px": plan.stride_px, "windows": total.windows,
            "area": None if plan.area is None else plan.area.name, "known_px": known_px, "abstained_px": abstained_px,
        },
        "time": {**total.record(), **rate.record()},
        "machine": {
            **crew, "hosts": sorted(hosts), "device": plan.device, "precision": plan.precision, "compiled": plan.compiled,
            **batch, "threads": torch.get_num_threads(), "python": platform.python_version(), "torch": torch.__version__,
            "rasterio": rasterio.__version__, "gdal": rasterio.__gdal_version__,
        },
    }  # fmt: skip


def abstained_tag(pixels: int) -> dict[str, str]:
    """A tag for how many pixels of a file have usable imagery and no height because every model abstained."""
    return {"CANOPY_ABSTAINED_PX": str(pixels)}


def _told(model: PlannedModel) -> dict[str, Any]:
    """A model and what trained it, so that nobody scores the map on that ground without knowing.

    The training is left out where the model's folder is no longer the one that made the map: then it is not known here.
    """
    from canopy.model.package import read_contract

    told: dict[str, Any] = {
        "name": model.name, "version": model.version, "weights_sha256": model.weights_sha256, "folder": model.folder,
    }  # fmt: skip
    try:
        contract = read_contract(Path(model.folder))
    except CanopyError:
        return told
    if contract.weights_sha256 == model.weights_sha256:
        training = contract.training.model_dump(mode="json", include={"sites", "footprints_deg", "tile_sets"})
        told |= {"licence": contract.licence, "training": training}
    return told

"""A region from its imagery: plan it, do its sheets, finish the map; go on with one that was stopped; say how one stands.

What a user sees in the output folder is a finished map or nothing: work happens in a hidden folder beside the results and
the files take their names last. What is done of a map that was stopped, by an error, by Ctrl-C or by `kill -9`, stays there,
and `resume_region` goes on from it to the same bytes.
"""

from __future__ import annotations

import json
import math
import queue
import shutil
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Literal

import numpy as np
from numpy.typing import NDArray
from pyproj import CRS

from canopy.errors import AreaError, CanopyError, OutputError, RegionError
from canopy.grid import Box
from canopy.model.tables import Calibrated
from canopy.mosaicker.dates import write_dates
from canopy.mosaicker.publish import COG_BYTES_PER_PIXEL, DATE_BYTES_PER_PIXEL, STAGED_BYTES_PER_PIXEL, write_pair
from canopy.mosaicker.stages import Stages
from canopy.region.cluster import read_cluster
from canopy.region.dates import days_of, days_record
from canopy.region.description import NAMES as DESCRIPTION
from canopy.region.description import describe_map
from canopy.region.engine import Crew, Engine, Outcome, Told, crew_for, work_alone, work_together
from canopy.region.folder import DATE, ERROR, HEIGHT, RUN
from canopy.region.plan import MAX_FILE_PX, SHEET_PX, Plan, manifest_of, plan_region
from canopy.region.project import PROJECT
from canopy.region.records import (
    MOVES,
    PLAN,
    WORK,
    FailedSheet,
    SheetRecord,
    Work,
    alone,
    discard,
    is_held,
    move_results,
    unfinished,
)
from canopy.region.report import abstained_tag, run_record
from canopy.region.sheet import Desk, check_known, leave_seat, open_source, published_sheet, staged_sheet, take_seat
from canopy.region.shift import FILES as SHIFT
from canopy.region.shift import map_tags, shift_record, write_shift
from canopy.textfile import write_text
from canopy.tiler.area import Area, BoundsLonLat, area_mask
from canopy.tiler.find import imagery_source
from canopy.tiler.imagery import Band, ImagerySource, LocalPaths

if TYPE_CHECKING:
    from canopy.mosaicker.ensemble import Ensemble
    from canopy.mosaicker.forecast import Forecast
    from canopy.mosaicker.quantum import Statistics
    from canopy.tiler.manifest import Manifest

RESULTS: Final = (
    *HEIGHT, *ERROR, *DATE, "date.vrt.ovr", RUN, "sheets", *SHIFT, *DESCRIPTION,
    *(f"{kind}.{end}" for kind in ("height", "error") for end in ("vrt.ovr", "gti.gpkg", "gti.gpkg.ovr")),
)  # fmt: skip
"""Everything that a map may have in its folder."""

NAMED: Final = 10
"""Sheets that a message names; `canopy map status` names them all."""

Progress = Callable[[int, int], None]
"""Called with (windows done, windows in all)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MapResult:
    """The files of a finished map."""

    height: Path
    """Height above ground in metres: `height.tif`, or `height.vrt` over the files of the sheets."""
    error: Path
    """Half-width, lower and upper end of the 90 % interval in metres."""
    run: Path
    """What it was made of and how long it took (JSON)."""
    project: Path
    """The map as a QGIS project."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RegionStatus:
    """How a map stands."""

    state: Literal["finished", "running", "unfinished"]
    done: int
    """Sheets that are done."""
    sheets: int
    failed: tuple[FailedSheet, ...]
    """What could not be made when it was last tried."""
    changed: str | None
    """Why it cannot be gone on with as it is: what it was planned with has changed."""
    identity: str
    """SHA-256 of what decides the pixels."""

    def as_json(self) -> dict[str, Any]:
        """As a table."""
        failed = [{"sheet": each.name, "message": each.message} for each in self.failed]
        return {
            "state": self.state, "done": self.done, "sheets": self.sheets, "failed": failed, "changed": self.changed,
            "identity": self.identity,
        }  # fmt: skip


def map_region(
    aoi: Area | Path | BoundsLonLat | None = None,
    *,
    imagery: LocalPaths | Manifest | ImagerySource,
    model: Path | str | Sequence[Path | str],
    out: Path,
    gsd_m: float | None = None,
    crs: CRS | str | None = None,
    bands: Sequence[Band] | None = None,
    tta: str = "none",
    calibration: Calibrated | Path | None = None,
    sheet_px: int = SHEET_PX,
    max_file_px: int = MAX_FILE_PX,
    device: str = "cpu",
    precision: str = "float32",
    compile: bool = False,  # noqa: A002 - torch's word for it
    batch: int | None = None,
    scheduler: str | None = None,
    cluster: Path | None = None,
    workers: int | None = None,
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
        model: A model folder, or the name of one; of several the heights are averaged.
        out: Folder for the results; created, and refused when it holds anything, unless `overwrite`.
        gsd_m: Ground sampling distance of the map in metres; default the imagery's own, the finest where it is mixed.
        crs: Metric CRS of the map; default the imagery's own if metric, else the UTM zone of its centre. One for all of it,
            also where it reaches over the border of a zone.
        bands: 1-based image bands, or their names, in the order of the model's contract; default the bands of these names
            where the imagery has such, else all but a mask.
        tta: Test-time augmentation: none, flips (4 predictions of each window) or d4 (8).
        calibration: Tables for just these models and turns, or the file that `calibrate_models` wrote them to; default the
            model's own, which several models or turns do not have.
        sheet_px: Side of the sheets that the region is cut into; does not change a pixel.
        max_file_px: Longest side of a map that is one file; a larger one is a file a sheet, with a VRT over them.
        device: torch device. On "cuda" every GPU of the machine is used when there are as many sheets.
        precision: What the network computes in: float32, or on a GPU float16 or bfloat16 (see `load_model`).
        compile: Have torch compile the network first: minutes once, for large regions.
        batch: Windows in one forward pass on a GPU; default as many as make most of the device.
        scheduler: Address of a running dask scheduler, such as tcp://host:8786, whose workers see the same files under the
            same paths; on a GPU they offer the resource GPU=1.
        cluster: TOML that describes a cluster to start (see `canopy.region.cluster`).
        workers: Processes on this machine; default: one a GPU, otherwise this one. Needs the usual
            `if __name__ == "__main__"` in a script.
        overwrite: Replace the results of an earlier run in `out`, once the new ones are whole, and start anew where one was
            not finished.
        progress: Called with (windows done, windows in all).

    Returns:
        The paths of the files.

    Raises:
        RegionError: sheets failed; those that are done are kept in `out`, and `resume_region` goes on from there.
        CanopyError: bad input; nothing is left in `out` that was not there before.
    """
    clock = _Clock()
    engine = Engine(scheduler=scheduler, cluster=cluster, workers=workers)
    out = Path(out)
    ready = _prepare(
        aoi, imagery, model, engine, clock,
        gsd_m=gsd_m, crs=crs, bands=bands, tta=tta, calibration=calibration, sheet_px=sheet_px, max_file_px=max_file_px,
        device=device, precision=precision, compiled=compile, batch=batch,
    )  # fmt: skip
    with alone(out) as base:
        _refuse_other_work(out, ready.plan, overwrite=overwrite)
        _check_disk(out, ready.plan, range(len(ready.plan.sheets)), engine)
        with _begun(base, ready.plan, manifest_of_source(ready.source)) as work:
            desk = _Desk(source=ready.source, ensemble=ready.ensemble if ready.here else None)
            return _finish_map(work, engine, desk, clock=clock, progress=progress)


def forecast_region(
    aoi: Area | Path | BoundsLonLat | None = None,
    *,
    imagery: LocalPaths | Manifest | ImagerySource,
    model: Path | str | Sequence[Path | str],
    tta: str = "none",
    calibration: Calibrated | Path | None = None,
    gsd_m: float | None = None,
    crs: CRS | str | None = None,
    bands: Sequence[Band] | None = None,
    sheet_px: int = SHEET_PX,
    max_file_px: int = MAX_FILE_PX,
    device: str = "cpu",
    precision: str = "float32",
    compile: bool = False,  # noqa: A002 - torch's word for it
    batch: int | None = None,
    cluster: Path | None = None,
    workers: int | None = None,
) -> tuple[Plan, Forecast]:
    """What `map_region` would do with the same arguments, and what it would take; measured on a few windows here.

    Workers of a cluster are taken to be machines like this one; those on this machine share its cores, but have a GPU each.

    Raises:
        CanopyError: as `map_region`.
    """
    from canopy.mosaicker.forecast import Workload, forecast, probe
    from canopy.region.engine import visible_gpus

    clock, engine = _Clock(), Engine(workers=workers)
    ready = _prepare(
        aoi, imagery, model, engine, clock,
        gsd_m=gsd_m, crs=crs, bands=bands, tta=tta, calibration=calibration, sheet_px=sheet_px, max_file_px=max_file_px,
        device=device, precision=precision, compiled=compile, batch=batch, here=True,
    )  # fmt: skip
    plan = ready.plan
    sheets = [plan.sheet(number) for number in range(len(plan.sheets))]
    machines = 1 if cluster is None else read_cluster(cluster).workers
    sharing = max(1, min(machines * max(1, len(visible_gpus(device)) if cluster is None else 1), len(sheets)))

    def wanted(box: Box) -> NDArray[np.bool_]:
        return area_mask(plan.polygons, plan.lattice, box)

    with ready.source.open(plan.lattice, plan.bands) as source:
        measured = probe(ready.ensemble, source, plan.layout, plan.extent, wanted=wanted, batch=batch)
    work = Workload.of(
        plan.layout, plan.lattice, sheets,
        area=None if plan.polygons is None else plan.polygons.union_all(),
        staged_sheets=None if plan.one_file else 2 * sharing,
    )  # fmt: skip
    return plan, forecast(measured, work, plan.layout, workers=sharing, started_s=clock.load_s)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Ready:
    """What a map begins with."""

    source: ImagerySource
    ensemble: Ensemble
    plan: Plan
    here: bool
    """Whether the models are where this process would predict."""


def _prepare(
    aoi: Area | Path | BoundsLonLat | None,
    imagery: LocalPaths | Manifest | ImagerySource,
    model: Path | str | Sequence[Path | str],
    engine: Engine,
    clock: _Clock,
    *,
    tta: str,
    calibration: Calibrated | Path | None,
    device: str,
    precision: str,
    compiled: bool,
    here: bool | None = None,
    **options: Any,
) -> _Ready:
    """Open the imagery, load the models, and plan."""
    from canopy.model.package import find_model
    from canopy.mosaicker.ensemble import load_ensemble

    source = imagery_source(imagery)
    folders = [find_model(each) for each in ([model] if isinstance(model, str | Path) else model)]
    # Workers load it for themselves; what is wrong with it is found here, before anything is written.
    here = _loads_here(engine, device) if here is None else here
    if not engine.elsewhere:
        _check_device(device)
    if isinstance(calibration, Path):
        calibration = Calibrated.read(calibration)
    ensemble = load_ensemble(
        folders, device if here else "cpu", tta=tta, precision=precision if here else "float32", compile=compiled and here,
        calibration=calibration,
    )  # fmt: skip
    clock.loaded()
    plan = plan_region(
        aoi, source, ensemble, folders=folders, device=device, precision=precision, compiled=compiled, **options
    )
    return _Ready(source=source, ensemble=ensemble, plan=plan, here=here)


def resume_region(
    out: Path,
    *,
    scheduler: str | None = None,
    cluster: Path | None = None,
    workers: int | None = None,
    progress: Progress | None = None,
) -> MapResult:
    """Go on with a map that was stopped, however hard, to the same bytes as if it had not been.

    Args:
        out: The output folder of a map.
        scheduler: As for `map_region`; who does the sheets may be others than before.
        cluster: As for `map_region`.
        workers: As for `map_region`.
        progress: As for `map_region`.

    Raises:
        OutputError: there is nothing to go on with; another run is at work; or the model or the imagery is not the one that
            the map was planned with.
        RegionError: sheets failed again.
    """
    clock, out = _Clock(), Path(out)
    engine = Engine(scheduler=scheduler, cluster=cluster, workers=workers)
    if unfinished(out) is None:
        if (out / RUN).is_file():
            return _result(out)
        raise OutputError(f"{out} holds no map to go on with; start one with canopy map … --out {out}")
    with alone(out):
        folder = unfinished(out)
        if folder is None:  # the run that held it has just finished
            return _result(out)
        work = Work.read(folder)
        if not (work.folder / MOVES).exists():
            work.plan.refuse_changed()
            work.clear_attempts()
            _check_disk(out, work.plan, _todo(work), engine)
        return _finish_map(work, engine, _Desk(source=None, ensemble=None), clock=clock, progress=progress)


def region_status(out: Path) -> RegionStatus:
    """How the map in a folder stands; changes nothing.

    Raises:
        OutputError: the folder holds no map.
    """
    out = Path(out)
    folder = unfinished(out)
    if folder is None:
        if not (out / RUN).is_file():
            raise OutputError(f"{out} holds no map; start one with canopy map … --out {out}")
        run = json.loads((out / RUN).read_bytes())
        sheets = int(run["map"]["sheets"])
        return RegionStatus(
            state="finished", done=sheets, sheets=sheets, failed=(), changed=None, identity=run["plan"]["identity"]
        )
    work = Work.read(folder)
    changed = None
    try:
        work.plan.refuse_changed()
    except CanopyError as error:
        changed = str(error)
    return RegionStatus(
        state="running" if is_held(out) else "unfinished",
        done=len(work.done()),
        sheets=len(work.plan.sheets),
        failed=tuple(work.failed()),
        changed=changed,
        identity=work.plan.identity,
    )


def stopped_map(out: Path) -> str | None:
    """What to say of a map that was stopped and can be gone on with; None where there is nothing of it."""
    folder = unfinished(out)
    if folder is None:
        return None
    work = Work.read(folder)
    done = len(work.done())
    return f"{done} of {len(work.plan.sheets)} sheets are kept in {out}: canopy map resume {out} goes on from there"


# --- before the work -----------------------------------------------------------------------------------------------------


class _Clock:
    """When a run began and what it did before its sheets."""

    def __init__(self) -> None:
        self.started, self._start = datetime.now(UTC), time.perf_counter()
        self.load_s = 0.0

    def loaded(self) -> None:
        self.load_s = self.wall_s

    @property
    def wall_s(self) -> float:
        return time.perf_counter() - self._start


@dataclass(frozen=True, slots=True, kw_only=True)
class _Desk:
    """What this process has opened already."""

    source: ImagerySource | None
    ensemble: Ensemble | None


def _loads_here(engine: Engine, device: str) -> bool:
    """Whether this process may come to predict: then it loads the model where it will run."""
    from canopy.region.engine import visible_gpus

    several = len(visible_gpus(device)) if engine.workers is None else engine.workers
    return not engine.elsewhere and several <= 1


def _check_device(device: str) -> None:
    import torch

    try:
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise CanopyError(f"device {device!r} cannot be used ({reason}); give cpu, or cuda where there is a GPU") from error


def manifest_of_source(source: ImagerySource) -> Manifest | None:
    """The frozen search behind a source; local files need no look at what reads catalogues."""
    from canopy.tiler.imagery import ImageFiles

    return None if isinstance(source, ImageFiles) else manifest_of(source)


def _refuse_other_work(out: Path, plan: Plan, *, overwrite: bool) -> None:
    """Stop before anything is lost: results in the folder, or sheets of a map that was not finished."""
    others = [path.name for path in out.iterdir() if path.name != WORK]
    if others and not overwrite:
        raise OutputError(f"{out} is not empty (it holds {others[0]}); choose another folder or pass --overwrite")
    # What a map is about to replace must be what a map left: a README.txt may well be somebody's own.
    foreign = [] if RUN in others or unfinished(out) is not None else [name for name in others if name in RESULTS]
    if foreign:
        raise OutputError(
            f"{out} holds {foreign[0]} and no {RUN}, so no map left it there; move it away, or choose another folder"
        )
    for path in (out / WORK).glob(f"*/{PLAN}"):
        if not overwrite:
            _refuse_begun(out, path.parent, plan)
        discard(path.parent)
    for path in (out / WORK).iterdir():
        if path.is_dir():  # without a plan it is nothing
            shutil.rmtree(path, ignore_errors=True)


def _refuse_begun(out: Path, folder: Path, plan: Plan) -> None:
    work = Work.read(folder)
    done = len(work.done())
    if not done:
        return
    same = work.plan.identity == plan.identity
    what = "of the same" if same else f"which this is not: it has {work.plan.difference(plan)}"
    raise OutputError(
        f"{out} holds an unfinished map {what} ({done} of {len(work.plan.sheets)} sheets); finish that with canopy map "
        f"resume {out}, or start anew with --overwrite"
    )


def _check_disk(out: Path, plan: Plan, todo: Sequence[int], engine: Engine) -> None:
    """Refuse a map that the disk may not hold, at worst; what is staged of sheets that become files goes with each."""
    pixels = sorted((math.prod(plan.sheet(number).shape) for number in todo), reverse=True)
    staged = pixels
    if not plan.one_file and not engine.elsewhere:
        staged = pixels[: 2 * max(1, engine.processes(plan.device, len(pixels)))]
    free, dates = shutil.disk_usage(out).free, DATE_BYTES_PER_PIXEL if plan.is_dated else 0
    need = (COG_BYTES_PER_PIXEL + dates) * sum(pixels) + (STAGED_BYTES_PER_PIXEL + dates) * sum(staged)
    if free < need:
        raise OutputError(
            f"{out} has {free / 1e9:.2f} GB free and the map needs up to {need / 1e9:.2f} GB while it is made; "
            f"free disk space or choose another folder"
        )


@contextmanager
def _begun(base: Path, plan: Plan, manifest: Manifest | None) -> Iterator[Work]:
    """The folder of new work; it goes again when nothing in it is worth going on with."""
    work = Work.begin(base, plan, manifest)
    try:
        yield work
    except BaseException:
        if work.folder.exists() and not any((work.folder / "records").glob("*.p*.json")):
            discard(work.folder)
        raise


# --- the work --------------------------------------------------------------------------------------------------------------


def _finish_map(work: Work, engine: Engine, desk: _Desk, *, clock: _Clock, progress: Progress | None) -> MapResult:
    """Do what is left of a map."""
    out = work.out
    if not (work.folder / MOVES).exists():
        todo = _todo(work)
        crew_told = _do_sheets(work, todo, engine, desk, progress)
        _finish_files(work, out, clock, crew_told, fresh=len(todo))
    move_results(work, out, RESULTS)
    discard(work.folder)
    return _result(out)


def _result(out: Path) -> MapResult:
    height, error = (next(out / name for name in names if (out / name).exists()) for names in (HEIGHT, ERROR))
    return MapResult(height=height, error=error, run=out / RUN, project=out / PROJECT)


def _todo(work: Work) -> list[int]:
    return [number for number in range(len(work.plan.sheets)) if work.record(number, work.last_stage) is None]


def _do_sheets(work: Work, todo: list[int], engine: Engine, desk: _Desk, progress: Progress | None) -> dict[str, Any]:
    """Do the sheets that have no record; what to say of who did them."""
    if not todo:
        return {"cluster": "nobody: all sheets were done", "workers": None}
    plan = work.plan
    meter = _Meter(plan, todo, progress)
    with crew_for(plan, engine, len(todo)) as crew:
        in_process = crew is None or (not engine.elsewhere and not engine.processes(plan.device, len(todo)))
        if in_process:
            outcome = _with_seat(crew, work, todo, desk, meter)
        else:
            assert crew is not None, "sheets that are not done here are done by a crew"
            outcome = work_together(crew, work, todo, meter.told(), queue.SimpleQueue())
        told = {"cluster": "this process", "workers": None} if crew is None else crew.told
    if outcome.failed:
        raise _failure(work, outcome)
    return told


def _with_seat(crew: Crew | None, work: Work, todo: list[int], desk: _Desk, meter: _Meter) -> Outcome:
    """Do sheets in this process, with what it has opened already."""
    from canopy.region.sheet import ensemble_of

    events: queue.SimpleQueue[Any] = queue.SimpleQueue()
    stopped = threading.Event()

    def advance(windows: int) -> None:
        if stopped.is_set():
            raise OutputError("stopped; canopy map resume goes on")
        if crew is None:
            meter.windows(windows)
        else:  # in a thread of its own, where nobody expects the caller's code
            events.put(windows)

    source = desk.source or open_source(work)
    ensemble = desk.ensemble or ensemble_of(work.plan)
    take_seat(Desk.furnish(work, source, ensemble, advance))
    try:
        if crew is None:
            return work_alone(work, todo, meter.told())
        return work_together(crew, work, todo, meter.told(), events)
    finally:
        stopped.set()
        leave_seat(work)


class _Meter:
    """Counts windows for whoever watches."""

    def __init__(self, plan: Plan, todo: Sequence[int], progress: Progress | None) -> None:
        self._plan, self._progress = plan, progress
        self._total = sum(plan.windows(number) for number in range(len(plan.sheets)))
        self._done = self._total - sum(plan.windows(number) for number in todo)
        self._beside = 0
        if progress is not None and self._done:
            progress(self._done, self._total)

    def told(self) -> Told:
        return Told(windows=self.windows, done=self.sheet)

    def windows(self, count: int) -> None:
        """Windows of a sheet that is being done; its whole is not counted again."""
        self._beside += count
        self._show()

    def sheet(self, record: SheetRecord) -> None:
        windows = self._plan.windows(record.sheet)
        self._done += windows
        self._beside = max(0, self._beside - windows)
        self._show()

    def _show(self) -> None:
        if self._progress is not None:
            self._progress(min(self._done + self._beside, self._total), self._total)


def _failure(work: Work, outcome: Outcome) -> CanopyError:
    """What to say of sheets that failed, in one line."""
    first = outcome.first_error
    assert first is not None, "sheets failed without an error"
    if len(work.plan.sheets) == 1:
        return first
    total, done = len(work.plan.sheets), len(work.done())
    names = ", ".join(each.name for each in outcome.failed[:NAMED])
    if len(outcome.failed) > NAMED:
        names += f" and {len(outcome.failed) - NAMED} more"
    left = f"; {outcome.left} more were not begun" if outcome.left else ""
    out = work.out
    kept = f"; {done} are kept: canopy map resume {out} goes on from there" if done else ""
    kind = RegionError if done else type(first)
    return kind(f"{len(outcome.failed)} of {total} sheets failed: {names} ({first}){left}{kept}")


# --- after the work ------------------------------------------------------------------------------------------------------


def _finish_files(work: Work, out: Path, clock: _Clock, crew: dict[str, Any], *, fresh: int) -> None:
    """Make the files of the whole map from those of its sheets."""
    plan, records, stages = work.plan, work.done(), Stages()
    assert len(records) == len(plan.sheets), f"{len(plan.sheets) - len(records)} sheets have no record"
    if not any(record.known_px for record in records):
        discard(work.folder)
        raise AreaError(
            f"{plan.imagery.told['source']} has no valid pixel in the area of interest; choose an area that the imagery "
            f"covers, and no narrower than a pixel of {plan.gsd_m:g} m"
        )
    abstained_px = sum(record.abstained_px for record in records)
    tags, days = map_tags(plan, records) | abstained_tag(abstained_px), days_of(plan, records)
    statistics: tuple[Statistics, Statistics] | None = None
    try:
        with stages.time("publish", alone=True):
            write_shift(work.result, plan, records)
            if plan.one_file:
                staged = [staged_sheet(work, record.sheet) for record in records]
                statistics = write_pair(
                    work.result / HEIGHT[0], work.result / ERROR[0], staged,
                    lattice=plan.lattice, box=plan.extent, tags=tags,
                )  # fmt: skip
                check_known(work, statistics[0][0].count, sum(record.known_px for record in records))
                if plan.is_dated:
                    dates = [(sheet.box, sheet.date) for sheet in staged if sheet.date is not None]
                    write_dates(work.result / DATE[0], dates, lattice=plan.lattice, box=plan.extent, tags=tags)
            else:
                from canopy.mosaicker.sheets import index_sheets

                index_sheets(
                    work.result, [published_sheet(record) for record in records],
                    lattice=plan.lattice, box=plan.extent, sheet_px=plan.sheet_px, tags=tags,
                )  # fmt: skip
        record = run_record(
            work, stages, crew,
            shift=shift_record(plan, records), days=days_record(days), started=clock.started, load_s=clock.load_s,
            wall_s=clock.wall_s, fresh=fresh,
        )  # fmt: skip
        describe_map(work, record, records, statistics=statistics, days=days)
        write_text(work.result / RUN, json.dumps(record, indent=2) + "\n")
    except OutputError as error:
        done = len(records)
        raise OutputError(
            f"{error}; {done} of {done} sheets are kept: canopy map resume {out} goes on from there"
        ) from error

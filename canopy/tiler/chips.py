"""A tile set: image and height chips on the lattice with an index, built from a recipe by a plan of small tasks.

On disk it is a folder with `index.parquet` (GeoParquet, one row a chip, geometry in EPSG:4326), `image/<id>.tif`,
`height/<id>.tif`, `recipe.toml`, the recipe as it was given, `plan.json`, what was built from which state of which files,
and `manifests/`, the frozen searches where there were any. Validity is kept twice: the image has an internal mask (so 0
stays black), the height is NaN where no height is known *or* no imagery exists.

A chip is a window of the CRS-anchored lattice: where an image is larger than a chip, windows start at multiples of the
stride, counted from the origin of the CRS; where it is smaller, one window is centred on it, and what the image does not
fill is masked. Nothing is stretched. So a chip's id (site and place) and its pixels do not depend on what else is in the
recipe.

Building is planning, then running tasks that depend on the plan alone, then putting their records together. A task writes
its files under temporary names, renames them, and writes its record last; it may be run twice, by anybody, with the same
bytes. So a build that was killed goes on where it was, and ends with the bytes of one that was not. Until the set is whole
it lives in a hidden folder beside its place (`.NAME.build`), which holds the plan, the records and what is written so far.
"""

from __future__ import annotations

import base64
import hashlib
import io
import json
import logging
import math
import os
import shutil
import socket
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from datetime import date
from functools import lru_cache
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Literal

import numpy as np
from filelock import FileLock, Timeout
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict
from pyproj import Transformer

from canopy import __version__
from canopy.errors import CanopyError, NoPointsError, OutputError, RecipeError
from canopy.grid import Box, Lattice
from canopy.raster import Pixels, create_raster, read_raster
from canopy.textfile import write_text
from canopy.tiler.area import PlannedArea
from canopy.tiler.quality import ChipFacts, JudgedChip, Verdict, judge, judge_set
from canopy.tiler.recipe import TileSetRecipe, load_recipe, resolve
from canopy.tiler.register import Shift, measure_shift, robust_shift, shift_height
from canopy.tiler.scenes import (
    Finder,
    Item,
    Label,
    Scene,
    acquisition_day,
    gap_days,
    label_tiles,
    make_label,
    median_day,
    open_scene,
    refuse_changed,
)
from canopy.tiler.split import Place, assign, crs_key, take_out_buffer

if TYPE_CHECKING:
    import geopandas as gpd

    from canopy.tiler.area import Area, BoundsLonLat

INDEX: Final = "index.parquet"
PLAN: Final = "plan.json"
RECIPE: Final = "recipe.toml"

DROPPED: Final = "dropped"
"""The split of a chip that a quality check took out: its files are there to be looked at, no split holds it."""

COLUMNS: Final = (
    "id", "geometry", "site", "block", "split", "image_date", "lidar_date", "gap_days", "gsd_m", "valid_fraction",
    "height_mean_m", "height_p95_m", "shift_x_m", "shift_y_m", "shift_score", "flags", "image_source", "lidar_source",
    "licence", "sha256", "item", "crs", "row_px", "col_px", "quality", "reasons", "shift_applied", "shift_decision",
    "derived_from", "refused_px",
)  # fmt: skip
"""Columns of the index.

`geometry` is the imagery inside the window, in EPSG:4326; `image_date` the median day of the valid pixels where the imagery
knows days, else the recipe's; `lidar_date` the recipe's, else the middle of the flights where the points tell; `gap_days`
the days between the two dates, empty when one is unknown; `valid_fraction` the share of the whole window with a known
height. `shift_x_m`, `shift_y_m` and `shift_score` are what registration measured on this chip (NaN: not measured),
`shift_applied` whether its heights were moved, `shift_decision` why, or by how much where the acquisition's shift was taken.
`quality` is keep, flag or drop, `flags` the names of the checks that found something and `reasons` their sentences. `sha256`
is the digest of the bytes of the image file followed by those of the height file; `item` names the image; (`row_px`,
`col_px`) is the window's first pixel on the lattice of `crs`. `derived_from` names, with ";" between them, what the chip
was made from besides its own imagery and LiDAR, for the audit. `refused_px` counts the pixels of the window where a raster
of heights holds what cannot be one (`canopy.tiler.heights`), which are unknown; it is empty for other labels.
"""

_LATER: Final[Mapping[str, Any]] = {
    "quality": "keep", "reasons": "", "shift_applied": False, "shift_decision": "kept: not measured", "derived_from": "",
    "refused_px": None,
}  # fmt: skip
"""What the last columns say of a set that was built before they existed."""

TASK_WINDOWS: Final = 32
"""Windows a task cuts: about a second of work, so that little is lost with a worker and the records stay few."""

WINDOWS_A_WORKER: Final = 500
"""A local build starts one worker process for so many windows, up to one a core: starting one takes seconds."""

CONNECT_S = 20.0
"""How long a scheduler may take to answer."""

ALLOWED_FAILURES: Final = 3
"""Workers that one task may take down with it before the build gives up."""

Progress = Callable[[str, int, int], None]
"""Called with the stage ("labels", "shifts", "chips"), what is done of it and how much there is."""


# --- the plan ------------------------------------------------------------------------------------------------------------


class _Value(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, ser_json_inf_nan="constants")


class Span(_Value):
    """Consecutive windows of one item, in row-major order."""

    item: int
    first: int
    stop: int


class Plan(_Value):
    """All that decides what a tile set will hold. Equal plans give equal bytes."""

    canopy: str
    """Version that made it."""
    recipe: TileSetRecipe
    area: PlannedArea | None
    manifests: dict[str, str]
    """SHA-256 of the frozen searches by file name."""
    items: tuple[Item, ...]
    labels: tuple[tuple[int, tuple[int, int, int, int]], ...]
    """(item, tile) whose heights are made from points before any chip is cut."""
    chips: tuple[tuple[Span, ...], ...]
    """The windows of each task."""

    @property
    def digest(self) -> str:
        """SHA-256 of the plan."""
        return hashlib.sha256(self.model_dump_json().encode()).hexdigest()

    @property
    def stages(self) -> dict[Stage, int]:
        """Number of tasks by stage, in the order in which the stages run."""
        registration = self.recipe.registration
        measured = len(self.chips) if registration is not None and registration.apply == "acquisition" else 0
        return {"labels": len(self.labels), "shifts": measured, "chips": len(self.chips)}


Stage = Literal["labels", "shifts", "chips"]


def chip_starts(start: int, stop: int, chip_px: int, stride_px: int) -> list[int]:
    """First pixels of the windows along one axis of an image that covers [start, stop) of the lattice.

    An image that fits a window gets one, centred on it. A larger one gets every window that starts at a multiple of the
    stride and touches it.
    """
    size = stop - start
    if size <= chip_px:
        return [start - (chip_px - size) // 2]
    first = -((chip_px - 1 - start) // stride_px)  # ceil((start - chip_px + 1) / stride_px)
    return [k * stride_px for k in range(first, (stop - 1) // stride_px + 1)]


def _starts(item: Item, recipe: TileSetRecipe) -> tuple[list[int], list[int]]:
    box = item.lattice_box
    side, stride = recipe.chip_px, recipe.stride_px
    return chip_starts(box.row0, box.row1, side, stride), chip_starts(box.col0, box.col1, side, stride)


def _window_count(item: Item, recipe: TileSetRecipe) -> int:
    rows, cols = _starts(item, recipe)
    return len(rows) * len(cols)


def _tasks(items: Sequence[Item], recipe: TileSetRecipe) -> Iterator[tuple[Span, ...]]:
    """Windows in the order of items and rows, so many a task. An item that is dear to open is one task."""
    spans: list[Span] = []
    room = TASK_WINDOWS
    for number, item in enumerate(items):
        count, first = _window_count(item, recipe), 0
        if item.whole:
            if spans:
                yield tuple(spans)
                spans, room = [], TASK_WINDOWS
            yield (Span(item=number, first=0, stop=count),)
            continue
        while first < count:
            stop = min(first + room, count)
            spans.append(Span(item=number, first=first, stop=stop))
            room, first = room - (stop - first), stop
            if not room:
                yield tuple(spans)
                spans, room = [], TASK_WINDOWS
    if spans:
        yield tuple(spans)


def _plan(recipe: TileSetRecipe, folder: Path, area: Area | None, manifests: Path, earlier: Path) -> Plan:
    finder = Finder(recipe=recipe, folder=folder, area=area, manifests=manifests, earlier=(earlier,))
    items = tuple(finder.items())
    used = sorted({name for item in items for name in item.manifests})
    return Plan(
        canopy=__version__,
        recipe=recipe,
        area=PlannedArea.of(area) if area is not None else None,
        manifests={name: hashlib.sha256((manifests / name).read_bytes()).hexdigest() for name in used},
        items=items,
        labels=tuple(
            (number, (tile.row0, tile.col0, tile.row1, tile.col1))
            for number, item in enumerate(items)
            for tile in label_tiles(item)
        ),
        chips=tuple(_tasks(items, recipe)),
    )


def _what_changed(before: Plan, now: Plan) -> str:
    """The first difference between two plans, in words."""
    if before.canopy != now.canopy:
        return f"by canopy {before.canopy}, this is {now.canopy}"
    for name in TileSetRecipe.model_fields:
        if getattr(before.recipe, name) != getattr(now.recipe, name):
            return f"with another {name} in the recipe"
    stamps = {stamp.path: stamp for item in before.items for stamp in item.stamps}
    for stamp in (stamp for item in now.items for stamp in item.stamps):
        if stamps.get(stamp.path) != stamp:
            return f"with another {stamp.path}"
    return "with another area" if before.area != now.area else "with other files"


# --- building ------------------------------------------------------------------------------------------------------------


def build_tile_set(
    recipe: Path,
    out: Path | None = None,
    *,
    area: Area | Path | BoundsLonLat | None = None,
    overwrite: bool = False,
    scheduler: str | None = None,
    workers: int | None = None,
    progress: Progress | None = None,
) -> Path:
    """Build a tile set from a recipe; it takes its name only when it is whole.

    A build that was stopped, however hard, is gone on with by the same call: what its tasks have recorded is not done again.

    Args:
        recipe: TOML file, a `TileSetRecipe`.
        out: Folder to make; default the recipe's name beside the recipe.
        area: In place of the recipe's: an area, a file with polygons, or (west, south, east, north) in degrees.
        overwrite: Replace `out` when it exists, and what is left of a build with another recipe or other files.
        scheduler: Address of a dask scheduler, such as tcp://host:8786, whose workers see the same files under the same
            paths; default: this machine alone.
        workers: Processes on this machine; 1 is this process; default: one for `WINDOWS_A_WORKER` windows, up to one a core.
            Needs the usual `if __name__ == "__main__"` in a script.
        progress: See `Progress`.

    Returns:
        The folder.

    Raises:
        RecipeError: the recipe is wrong, a file of it is missing or changed, or it gives no chip or two chips of one id.
        OutputError: `out` exists and `overwrite` is False; another build is at work; or what is there was begun with
            another recipe or other files; no scheduler answers.
        RasterError, LidarError, GridError, AreaError, SourceError, ImageryError: a source cannot be read or placed.
    """
    settings = load_recipe(recipe)
    out = recipe.parent / settings.name if out is None else out
    if out.exists() and not overwrite:
        raise OutputError(f"{out} exists; choose another folder with --out or replace it with --overwrite")
    folder = recipe.parent.resolve()
    within = _area(settings, folder, area)
    build = out.resolve().parent / f".{out.name}.build"
    with _alone(build, out):
        plan = _plan(settings, folder, within, build / "manifests", out / "manifests")
        work = _work(build, plan, overwrite=overwrite, out=out)
        with _engine(scheduler, workers, plan) as engine:
            for stage, count in plan.stages.items():
                _run(engine, stage, count, plan=plan, work=work, progress=progress)
                if stage == "labels" and count:
                    _write_json(work / DAYS, _acquisition_days(plan, work))
                if stage == "shifts" and count:
                    _write_json(work / SHIFTS, _acquisition_shifts(plan, work))
        _finish(plan, work, recipe)
        if out.exists():
            out.rename(work / "replaced")
        (work / "set").rename(out)
    return out


def _area(recipe: TileSetRecipe, folder: Path, given: Area | Path | BoundsLonLat | None) -> Area | None:
    from canopy.tiler.area import area_of_bbox, as_area, read_area

    if given is not None:
        return as_area(given)
    if recipe.bbox_deg is not None:
        return area_of_bbox(recipe.bbox_deg)
    return None if recipe.area is None else read_area(resolve(recipe.area, folder))


@contextmanager
def _alone(build: Path, out: Path) -> Iterator[None]:
    """Hold the working folder; afterwards it is gone, unless there is something in it to go on with."""
    missing = [folder for folder in build.parents if not folder.exists()]
    try:
        build.mkdir(parents=True, exist_ok=True)
        lock = FileLock(build / "lock")
        lock.acquire(blocking=False)
    except Timeout as error:
        raise OutputError(f"another build of {out} is at work; wait for it, or choose another folder with --out") from error
    except OSError as error:
        raise OutputError(f"cannot create {build} ({error.strerror}); choose another folder with --out") from error
    keep = False
    try:
        yield
    except RecipeError:  # the recipe has to change, and with it the plan
        raise
    except BaseException as error:
        keep = any(build.glob("*/records/*.json"))
        if keep and isinstance(error, CanopyError):
            raise type(error)(
                f"{error}; what is done is kept in {build}, and the same command goes on from there"
            ) from error
        raise
    finally:
        if not keep:
            shutil.rmtree(build, ignore_errors=True)
        lock.release()
        for folder in () if keep else missing:  # the folders this build made, innermost first, unless there is a set in them
            if folder.exists() and not any(folder.iterdir()):
                folder.rmdir()


def _work(build: Path, plan: Plan, *, overwrite: bool, out: Path) -> Path:
    """The folder for the work on a plan, begun or gone on with.

    It is named after the plan: a task of an abandoned plan that a distant worker still has in hand finds nothing to write
    to.
    """
    work = build / plan.digest[:16]
    for other in (folder for folder in build.iterdir() if folder.is_dir() and folder.name not in (work.name, "manifests")):
        if not overwrite and any((other / "records").glob("*.json")):
            before = Plan.model_validate_json((other / PLAN).read_bytes())
            raise OutputError(
                f"a build of {out} was begun {_what_changed(before, plan)} and not finished; "
                f"go back to that, or start anew with --overwrite"
            )
        shutil.rmtree(other)
    for name in ("records", "labels", "set/image", "set/height"):
        (work / name).mkdir(parents=True, exist_ok=True)
    if plan.manifests:
        (work / "set" / "manifests").mkdir(exist_ok=True)
    for name in plan.manifests:
        _copy(build / "manifests" / name, work / "set" / "manifests" / name)
    write_text(work / PLAN, plan.model_dump_json(indent=1))
    return work


def _copy(source: Path, target: Path) -> None:
    part = target.with_name(f".{target.name}.part")
    shutil.copyfile(source, part)
    part.replace(target)


def _write_json(path: Path, value: Any) -> None:
    write_text(path, json.dumps(value))


# --- running the tasks ---------------------------------------------------------------------------------------------------


@contextmanager
def _engine(scheduler: str | None, workers: int | None, plan: Plan) -> Iterator[Any]:
    """A dask client, or None for this process alone."""
    if workers is not None and workers < 1:
        raise OutputError(f"workers = {workers} is not at least 1; 1 is this process alone")
    if scheduler is None:
        windows = sum(span.stop - span.first for task in plan.chips for span in task)
        wanted = min(os.cpu_count() or 1, windows // WINDOWS_A_WORKER) if workers is None else workers
        count = min(wanted, len(plan.chips) + len(plan.labels))
        if count <= 1:
            yield None
            return
    import dask
    from distributed import Client, LocalCluster
    from distributed.comm.addressing import get_address_host_port

    # What dask logs of a lost worker or connection is told in one line by who waits for the task.
    for name in ("distributed", "distributed.nanny", "distributed.worker", "distributed.scheduler", "distributed.core"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    with ExitStack() as stack:
        stack.enter_context(dask.config.set({"distributed.scheduler.allowed-failures": ALLOWED_FAILURES}))
        address: Any = scheduler
        if scheduler is None:
            address = stack.enter_context(_local_cluster(LocalCluster, count))
        try:
            if scheduler is not None:
                # Asked before there is a client: one that never connects writes a traceback when it is taken away.
                socket.create_connection(get_address_host_port(scheduler), timeout=CONNECT_S).close()
            connect: Any = Client
            client = stack.enter_context(connect(address, timeout=CONNECT_S, set_as_default=False))
        except (OSError, ValueError) as error:
            raise OutputError(f"no dask scheduler answers at {scheduler}; give its address as tcp://host:8786") from error
        yield client


def _local_cluster(kind: Any, count: int) -> Any:
    address = "127.0.0.1:0"  # any free port for its page, or a second build would be warned that the usual one is taken
    return kind(
        n_workers=count, threads_per_worker=1, processes=True, dashboard_address=address, silence_logs=logging.CRITICAL
    )


def _run(engine: Any, stage: Stage, count: int, *, plan: Plan, work: Path, progress: Progress | None) -> None:
    """Run the tasks of a stage that have no record yet."""
    todo = [number for number in range(count) if not _is_done(work, stage, number)]
    done = count - len(todo)
    if progress is not None and count:
        progress(stage, done, count)
    for _ in _results(engine, stage, todo, plan, work):
        done += 1
        if progress is not None:
            progress(stage, done, count)


def _results(engine: Any, stage: Stage, todo: list[int], plan: Plan, work: Path) -> Iterator[int]:
    call = (str(work), plan.digest, stage)
    if engine is None:
        for number in todo:
            yield run_task(*call, number)
        return
    import distributed

    # So many at a time that no worker waits, and the scheduler's memory does not grow with the plan.
    waiting = iter(todo)
    ahead = 4 * max(1, sum(engine.nthreads().values()))
    futures: Any = distributed.as_completed(loop=engine.loop, raise_errors=False)  # type: ignore[no-untyped-call]
    numbers: dict[str, int] = {}

    def submit(count: int) -> None:
        for number, _ in zip(waiting, range(count), strict=False):
            future = engine.submit(_told_task, *call, number, pure=False)
            numbers[future.key] = number
            futures.add(future)

    submit(ahead)
    for future in futures:
        try:
            yield future.result()
        except distributed.KilledWorker as error:
            raise OutputError(
                f"task {numbers[future.key]} of stage {stage} took {ALLOWED_FAILURES + 1} workers down with it, "
                f"most often for want of memory; give each worker more"
            ) from error
        submit(1)


def _told_task(work: str, digest: str, stage: Stage, number: int) -> int:
    """`run_task`, whose errors travel to another process: what caused them, GDAL's own among it, often cannot."""
    failed: CanopyError
    try:
        return run_task(work, digest, stage, number)
    except CanopyError as error:
        failed = type(error)(str(error))
    raise failed


def run_task(work: str, digest: str, stage: Stage, number: int) -> int:
    """Do one task of a plan and write its record. Everything it opens, it opens here: it may run in any process.

    Args:
        work: Folder of the work on the plan.
        digest: The plan's `digest`.
        stage: Which tasks.
        number: Which of them.

    Returns:
        `number`.
    """
    folder = Path(work)
    plan = _read_plan(folder, digest)
    match stage:
        case "labels":
            item, tile = plan.labels[number]
            refuse_changed(plan.items[item].stamps)
            label = make_label(plan.items[item], item, Box(*tile), plan.recipe, folder)
            rows: list[Any] = [label.model_dump(mode="json")]
        case "shifts":
            rows = [row for span in plan.chips[number] for row in _measure(plan, span, folder)]
        case "chips":
            known = _measured_before(plan, folder, number)
            rows = [chip.model_dump(mode="json") for span in plan.chips[number] for chip in _cut(plan, span, folder, known)]
    _write_json(_record(folder, stage, number), rows)
    return number


@lru_cache(maxsize=2)
def _read_plan(work: Path, digest: str) -> Plan:
    try:
        plan = Plan.model_validate_json((work / PLAN).read_bytes())
    except OSError as error:
        raise OutputError(
            f"{work / PLAN} cannot be read by a worker ({error.strerror}); the workers must see the folder under this path"
        ) from error
    if plan.canopy != __version__:
        raise OutputError(f"a worker runs canopy {__version__} and the build canopy {plan.canopy}; install one version")
    assert plan.digest == digest, f"{work} holds another plan than the task belongs to"
    return plan


def _record(work: Path, stage: Stage, number: int) -> Path:
    return work / "records" / f"{stage}-{number:07}.json"


def _rows(work: Path, stage: Stage, number: int) -> list[Any]:
    return json.loads(_record(work, stage, number).read_bytes())  # type: ignore[no-any-return]


def _is_done(work: Path, stage: Stage, number: int) -> bool:
    """Whether a task has its record, and for chips the files that it tells of."""
    if not _record(work, stage, number).exists():
        return False
    return stage != "chips" or all(
        path.exists() for row in _rows(work, stage, number) for path in _chip_paths(work / "set", row["id"])
    )


# --- windows -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Window:
    """What there is at one window that is to become a chip."""

    box: Box
    footprint: Box
    """The part with imagery of the item."""
    image: Pixels
    height_m: NDArray[np.float32]
    """As the source has it, NaN where the image is not valid or the recipe leaves heights out."""
    left_out: NDArray[np.bool_]
    """Where the recipe leaves heights out."""


def _windows(plan: Plan, span: Span, scene: Scene) -> Iterator[_Window]:
    """The windows of a span that have enough known heights."""
    recipe, item = plan.recipe, plan.items[span.item]
    rows, cols = _starts(item, recipe)
    outer, lattice = item.lattice_box, item.lattice(recipe)
    area = None if plan.area is None or item.seed is not None else plan.area.mask_on(lattice)
    for number in range(span.first, span.stop):
        row, col = rows[number // len(cols)], cols[number % len(cols)]
        box = Box(row, col, row + recipe.chip_px, col + recipe.chip_px)
        footprint = box.intersect(outer)
        assert footprint is not None, f"window {box} misses its image {outer}"
        usable = np.zeros(box.shape, bool)
        usable[footprint.slices_in(box)] = True
        if area is not None:
            usable &= area(box)
        least = recipe.min_valid_fraction * usable.size
        if np.count_nonzero(usable) < least:
            continue
        pixels = scene.image(box)
        image = replace(pixels, valid=pixels.valid & usable)
        if np.count_nonzero(image.valid) < least:
            continue
        left_out = np.zeros(box.shape, bool)
        for masked in scene.unlabelled:
            if (part := masked.intersect(box)) is not None:
                left_out[part.slices_in(box)] = True
        height_m = np.where(image.valid & ~left_out, scene.height_m(box), np.float32(np.nan))
        if np.count_nonzero(np.isfinite(height_m)) < least:
            continue
        yield _Window(box=box, footprint=footprint, image=image, height_m=height_m, left_out=left_out)


SHIFTS: Final = "shifts.json"
"""The shift of each acquisition, in the working folder."""

DAYS: Final = "days.json"
"""The day of each point cloud that knows it, in the working folder."""


def _measure(plan: Plan, span: Span, work: Path) -> list[tuple[int, dict[str, Any]]]:
    """(item, shift) of every chip of a span."""
    settings = plan.recipe.registration
    assert settings is not None, "shifts are measured by a recipe with registration"
    item = plan.items[span.item]
    with open_scene(item, span.item, plan.recipe, work) as scene:
        return [
            (span.item, asdict(measure_shift(window.image, window.height_m, plan.recipe.gsd_m, settings)))
            for window in _windows(plan, span, scene)
        ]


def _acquisition_days(plan: Plan, work: Path) -> dict[str, str]:
    """The day of each item's cloud where it is known.

    Raises:
        LidarError: clouds that give no height anywhere on their image.
    """
    labels: dict[int, list[Label]] = defaultdict(list)
    for number, (item, _) in enumerate(plan.labels):
        labels[item] += [Label.model_validate(row) for row in _rows(work, "labels", number)]
    days = {}
    for number, found in labels.items():
        cloud = plan.items[number]
        if not any(label.known_px for label in found):
            raise NoPointsError(
                f"none of the {len(cloud.points)} clouds of {cloud.name}, {cloud.points[0]} the first, gives a height on "
                f"the imagery; check CRS and extent of both"
            )
        if (day := acquisition_day(found)) is not None:
            days[str(number)] = day.isoformat()
    return days


def _acquisition_shifts(plan: Plan, work: Path) -> dict[str, dict[str, Any]]:
    """The one shift of each item, from the records of its chips, in their order."""
    settings = plan.recipe.registration
    assert settings is not None, "shifts are measured by a recipe with registration"
    found: dict[int, list[Shift]] = defaultdict(list)
    for number in range(len(plan.chips)):
        for item, shift in _rows(work, "shifts", number):
            found[item].append(Shift(**shift))
    return {str(item): asdict(robust_shift(shifts, settings)) for item, shifts in sorted(found.items())}


# --- chips ---------------------------------------------------------------------------------------------------------------


class Chip(_Value):
    """A chip that has been written: its row in a record."""

    id: str
    item: int
    row_px: int
    col_px: int
    footprint: tuple[int, int, int, int]
    """Lattice pixels with imagery: row0, col0, row1, col1."""
    image_date: date | None
    lidar_date: date | None
    valid_fraction: float
    height_mean_m: float
    height_p95_m: float
    sha256: str
    shift_x_m: float = math.nan
    shift_y_m: float = math.nan
    shift_score: float = math.nan
    shift_applied: bool = False
    shift_decision: str = "kept: not measured"
    verdict: Verdict = Verdict()
    refused_px: int | None = None
    codes: str | None = None
    """Fingerprint of the image, an .npy in base64, where duplicates are looked for."""


def _measured_before(plan: Plan, work: Path, number: int) -> Iterator[Shift] | None:
    """The shifts of a task's windows, in their order, where a stage of their own has measured them."""
    if plan.recipe.registration is None or plan.recipe.registration.apply != "acquisition":
        return None
    return (Shift(**shift) for _, shift in _rows(work, "shifts", number))


def _cut(plan: Plan, span: Span, work: Path, known: Iterator[Shift] | None) -> Iterator[Chip]:
    recipe, item = plan.recipe, plan.items[span.item]
    acquisition = None
    if recipe.registration is not None and recipe.registration.apply == "acquisition":
        shifts = json.loads((work / SHIFTS).read_bytes())
        acquisition = Shift(**shifts[str(span.item)]) if str(span.item) in shifts else None
    with open_scene(item, span.item, recipe, work) as scene:
        for found in _windows(plan, span, scene):
            measured = None
            if recipe.registration is not None:
                measured = (
                    measure_shift(found.image, found.height_m, recipe.gsd_m, recipe.registration)
                    if known is None
                    else next(known)
                )
            taken = measured if acquisition is None else acquisition
            may = recipe.registration is not None and recipe.registration.apply != "never"
            moved = may and taken is not None and taken.applied
            height_m = _moved(found, scene, taken, recipe.gsd_m) if moved and taken is not None else found.height_m
            if np.count_nonzero(np.isfinite(height_m)) < recipe.min_valid_fraction * height_m.size:
                continue  # what was moved in lies over an edge or a void
            yield _write(
                plan, span.item, found, folder=work / "set", scene=scene, height_m=height_m, measured=measured, taken=taken,
                moved=moved,
            )  # fmt: skip


def _moved(found: _Window, scene: Scene, shift: Shift, gsd_m: float) -> NDArray[np.float32]:
    """The heights of a window, moved by a shift; what moves in comes from beyond the window's edge."""
    margin = math.ceil(max(abs(shift.x_m), abs(shift.y_m)) / gsd_m) + 1
    box = found.box
    outer = Box(box.row0 - margin, box.col0 - margin, box.row1 + margin, box.col1 + margin)
    height_m = shift_height(scene.height_m(outer), shift, gsd_m)[box.slices_in(outer)]
    return np.where(found.image.valid & ~found.left_out, height_m, np.float32(np.nan))


def _beside(found: _Window, scene: Scene, shift: Shift | None, gsd_m: float) -> dict[str, Any]:
    """What else the labels know of a window, moved as its heights were."""
    if scene.beside is None:
        return {}
    layers = scene.beside(found.box)
    return layers if shift is None else {name: shift_height(layer, shift, gsd_m) for name, layer in layers.items()}


def _write(
    plan: Plan,
    number: int,
    found: _Window,
    *,
    folder: Path,
    scene: Scene,
    height_m: NDArray[np.float32],
    measured: Shift | None,
    taken: Shift | None,
    moved: bool,
) -> Chip:
    recipe, item, image = plan.recipe, plan.items[number], found.image
    source = recipe.source[item.source]
    if image.data.dtype not in (np.uint8, np.uint16):
        raise RecipeError(f"{item.name} is {image.data.dtype}; chips hold uint8 or uint16, convert the image first")
    name = "_".join([source.site, *([item.variant] if item.variant else []), f"r{found.box.row0}_c{found.box.col0}"])
    lattice = item.lattice(recipe)
    known_m = height_m[np.isfinite(height_m)]
    taken_on = median_day(scene.days(found.box), image.valid) if scene.days is not None else None
    image_date = taken_on or source.image_date
    lidar_date = source.lidar_date or _flown_on(plan, number, folder.parent)
    facts: dict[str, Any] = {}
    if measured is not None and taken is not None:
        facts = {
            "shift_x_m": measured.x_m, "shift_y_m": measured.y_m, "shift_score": measured.score_after,
            "shift_applied": moved, "shift_decision": _decision(measured, taken, moved=moved),
        }  # fmt: skip
    if recipe.quality is not None:
        facts["verdict"] = judge(
            ChipFacts(
                image=image, height_m=height_m, gsd_m=recipe.gsd_m, colours=scene.colours,
                value_range=scene.value_range, left_out=found.left_out, image_date=image_date,
                lidar_date=lidar_date, latitude_deg=_latitude_deg(lattice, found.box),
                shift=None if measured is None or taken is None else _for_quality(measured, taken, moved=moved),
                **_beside(found, scene, taken if moved else None, recipe.gsd_m),
            ),
            recipe.quality,
        )  # fmt: skip
        if recipe.quality.duplicate_chips.on:
            facts["codes"] = _codes(image)
    footprint = found.footprint
    return Chip(
        id=name,
        item=number,
        row_px=found.box.row0,
        col_px=found.box.col0,
        footprint=(footprint.row0, footprint.col0, footprint.row1, footprint.col1),
        image_date=image_date,
        lidar_date=lidar_date,
        valid_fraction=known_m.size / height_m.size,
        height_mean_m=float(known_m.mean(dtype=np.float64)),
        height_p95_m=float(np.percentile(known_m, 95)),
        refused_px=None if scene.refused_px is None else scene.refused_px(found.box),
        sha256=_write_files(folder, name, lattice=lattice, box=found.box, image=image, height_m=height_m),
        **facts,
    )


def _flown_on(plan: Plan, number: int, work: Path) -> date | None:
    item = plan.items[number]
    if item.flown is not None or not item.points:
        return item.flown
    day = json.loads((work / DAYS).read_bytes()).get(str(number))
    return None if day is None else date.fromisoformat(day)


def _decision(measured: Shift, taken: Shift, *, moved: bool) -> str:
    if moved and taken is not measured:
        return f"applied: the acquisition's, {taken.x_m:+.2f} m east and {taken.y_m:+.2f} m north"
    if taken.applied and not moved:
        return "kept: registration only measures"
    return taken.decision


def _for_quality(measured: Shift, taken: Shift, *, moved: bool) -> Shift:
    """The shift as the checks see it: what was taken out of the label, or what was measured and left in."""
    return taken if moved else replace(measured, decision=_decision(measured, taken, moved=moved))


def _latitude_deg(lattice: Lattice, box: Box) -> float:
    left, bottom, right, top = lattice.grid(box).bounds
    to_lonlat = Transformer.from_crs(lattice.crs, "EPSG:4326", always_xy=True)
    return float(to_lonlat.transform((left + right) / 2, (bottom + top) / 2)[1])


def _codes(image: Pixels) -> str:
    from canopy.tiler.fingerprint import fingerprint

    buffer = io.BytesIO()
    np.save(buffer, fingerprint(image), allow_pickle=False)
    return base64.b64encode(buffer.getvalue()).decode()


def _chip_paths(tile_set: Path, chip: str) -> tuple[Path, Path]:
    return tile_set / "image" / f"{chip}.tif", tile_set / "height" / f"{chip}.tif"


def _write_files(
    folder: Path, name: str, *, lattice: Lattice, box: Box, image: Pixels, height_m: NDArray[np.float32]
) -> str:
    """Write the two files of a chip; their digest."""
    grid, paths = lattice.grid(box), _chip_paths(folder, name)
    # Two processes may have one task in hand, when one is believed to be lost: each writes for itself and renames.
    parts = folder.parent / "parts" / f"{socket.gethostname()}-{os.getpid()}"
    parts.mkdir(parents=True, exist_ok=True)
    written = parts / "image.tif", parts / "height.tif"
    # One TIFF tile a chip; tile sides are multiples of 16, and chip sides of 32.
    tiling: dict[str, Any] = {"blockxsize": box.shape[1], "blockysize": box.shape[0]}
    data = np.where(image.valid, image.data, image.data.dtype.type(0))
    with create_raster(
        written[0], grid=grid, count=len(data), dtype=data.dtype.name, predictor=2, **tiling
    ) as writer:  # fmt: skip
        writer.write(0, data)
        writer.write_valid(image.valid)
    with create_raster(
        written[1], grid=grid, count=1, dtype="float32", nodata=float("nan"), band_names=["height_m"], units=["m"],
        predictor=3, **tiling,
    ) as writer:  # fmt: skip
        writer.write(0, height_m[None])
    digest = hashlib.sha256(b"".join(path.read_bytes() for path in written)).hexdigest()
    for part, path in zip(written, paths, strict=True):
        part.replace(path)
    return digest


# --- the index -----------------------------------------------------------------------------------------------------------


def _finish(plan: Plan, work: Path, recipe: Path) -> None:
    """Put the records together into the index, and the recipe and the plan beside it."""
    chips = sorted(
        (Chip.model_validate(row) for number in range(len(plan.chips)) for row in _rows(work, "chips", number)),
        key=lambda chip: chip.id,
    )
    names = [item.name for item in plan.items]
    for one, other in pairwise(chips):
        if one.id == other.id:
            raise RecipeError(
                f"{names[one.item]} and {names[other.item]} both give chip {one.id}; give each its own site in the recipe"
            )
    if not chips:
        raise RecipeError(
            f"{recipe} gives no chip with at least {plan.recipe.min_valid_fraction:.0%} known heights; "
            f"lower min_valid_fraction or check that imagery and heights overlap"
        )
    part = work / f".{INDEX}.part"
    try:
        _index(chips, plan).to_parquet(part, index=False)
        part.replace(work / "set" / INDEX)
        _copy(recipe, work / "set" / RECIPE)
        _copy(work / PLAN, work / "set" / PLAN)
    except OSError as error:
        raise OutputError(
            f"cannot write the index in {work} ({error.strerror}); free disk space or choose another folder"
        ) from error


def _verdicts(chips: Sequence[Chip], places: Sequence[Place], plan: Plan) -> dict[str, Verdict]:
    settings = plan.recipe.quality
    if settings is None:
        return {chip.id: chip.verdict for chip in chips}
    judged = [
        JudgedChip(
            id=chip.id, site=place.site, verdict=chip.verdict, crs=crs_key(place.crs), bounds_m=place.footprint_m
        )
        for chip, place in zip(chips, places, strict=True)
    ]  # fmt: skip
    return judge_set(judged, settings, duplicates=_duplicates(chips) if settings.duplicate_chips.on else ())


def _duplicates(chips: Sequence[Chip]) -> Iterator[tuple[str, str]]:
    """Pairs of ids whose images show the same content."""
    from canopy.tiler.fingerprint import near_duplicates

    codes = [np.load(io.BytesIO(base64.b64decode(chip.codes or "")), allow_pickle=False) for chip in chips]
    pairs = near_duplicates(codes, codes)
    for a, b in zip(pairs.a.tolist(), pairs.b.tolist(), strict=True):
        if a < b:
            yield chips[a].id, chips[b].id


def _index(chips: Sequence[Chip], plan: Plan) -> gpd.GeoDataFrame:
    import geopandas as gpd
    import pandas as pd
    import pyarrow as pa
    from shapely import Polygon

    recipe = plan.recipe
    side = recipe.chip_px
    items = [plan.items[chip.item] for chip in chips]
    sources = [recipe.source[item.source] for item in items]
    lattices = [item.lattice(recipe) for item in items]
    to_lonlat = {crs: Transformer.from_crs(crs, "EPSG:4326", always_xy=True) for crs in {each.crs for each in lattices}}
    places, outlines = [], []
    for chip, item, source, lattice in zip(chips, items, sources, lattices, strict=True):
        window = Box(chip.row_px, chip.col_px, chip.row_px + side, chip.col_px + side)
        left, bottom, right, top = lattice.grid(window).bounds
        footprint = lattice.grid(Box(*chip.footprint)).bounds
        places.append(
            Place(
                id=chip.id,
                site=source.site,
                item=item.name,
                crs=lattice.crs,
                centre_m=((left + right) / 2, (bottom + top) / 2),
                footprint_m=footprint,
                height_p95_m=chip.height_p95_m,
            )
        )
        west, south, east, north = footprint
        corners = to_lonlat[lattice.crs].transform([west, east, east, west], [south, south, north, north])
        outlines.append(Polygon(zip(*corners, strict=True)))
    verdicts = _verdicts(chips, places, plan)
    assigned = assign(places, recipe.split)
    splits = [
        DROPPED if verdicts[chip.id].decision == "drop" else split
        for chip, (_, split) in zip(chips, assigned, strict=True)
    ]  # fmt: skip
    splits = take_out_buffer(places, splits, recipe.split.buffer_m)
    dates = pd.ArrowDtype(pa.date32())
    gaps = [gap_days(chip.image_date, chip.lidar_date) for chip in chips]
    columns = {
        "id": [chip.id for chip in chips],
        "geometry": outlines,
        "site": [source.site for source in sources],
        "block": [block for block, _ in assigned],
        "split": splits,
        "image_date": pd.array([chip.image_date for chip in chips], dtype=dates),
        "lidar_date": pd.array([chip.lidar_date for chip in chips], dtype=dates),
        "gap_days": pd.array(gaps, dtype="Int32"),
        "gsd_m": np.full(len(chips), recipe.gsd_m),
        "valid_fraction": [chip.valid_fraction for chip in chips],
        "height_mean_m": [chip.height_mean_m for chip in chips],
        "height_p95_m": [chip.height_p95_m for chip in chips],
        "shift_x_m": [chip.shift_x_m for chip in chips],
        "shift_y_m": [chip.shift_y_m for chip in chips],
        "shift_score": [chip.shift_score for chip in chips],
        "flags": [verdicts[chip.id].flags for chip in chips],
        "image_source": [source.image_source for source in sources],
        "lidar_source": [source.lidar_source for source in sources],
        "licence": [source.licence for source in sources],
        "sha256": [chip.sha256 for chip in chips],
        "item": [item.name for item in items],
        "crs": [crs_key(lattice.crs) for lattice in lattices],
        "row_px": [chip.row_px for chip in chips],
        "col_px": [chip.col_px for chip in chips],
        "quality": [verdicts[chip.id].decision for chip in chips],
        "reasons": [verdicts[chip.id].reasons for chip in chips],
        "shift_applied": [chip.shift_applied for chip in chips],
        "shift_decision": [chip.shift_decision for chip in chips],
        "derived_from": [
            ";".join([*source.derived_from, *(Path(height).stem for height in item.heights if item.seed is not None)])
            for source, item in zip(sources, items, strict=True)
        ],
        "refused_px": pd.array([chip.refused_px for chip in chips], dtype="Int32"),
    }
    assert tuple(columns) == COLUMNS, "the index and its documentation differ"
    return gpd.GeoDataFrame(columns, geometry="geometry", crs="EPSG:4326")


# --- reading a tile set --------------------------------------------------------------------------------------------------


def read_index(tile_set: Path) -> gpd.GeoDataFrame:
    """The index of a tile set, one row a chip in the order of their ids; the columns are those of `COLUMNS`.

    A set that was built before chips were judged and registered reads as one whose chips were all kept as they are.

    Raises:
        RecipeError: no tile set, or one without some of the columns.
    """
    import geopandas as gpd

    path = tile_set / INDEX
    if not path.is_file():
        raise RecipeError(f"{tile_set} is no tile set ({INDEX} is missing); build it with: canopy tile RECIPE")
    index = gpd.read_parquet(path)
    for name, value in _LATER.items():
        if name not in index.columns:
            index[name] = value
    if missing := [name for name in COLUMNS if name not in index.columns]:
        raise RecipeError(f"{path} lacks the column {missing[0]!r}; build the tile set again with this version")
    return index


def read_chip(tile_set: Path, chip: str) -> tuple[Pixels, NDArray[np.float32]]:
    """Image (band, row, col) with its validity, and height (row, col) in metres, NaN unknown, of one chip."""
    image, _ = read_raster(tile_set / "image" / f"{chip}.tif")
    height, _ = read_raster(tile_set / "height" / f"{chip}.tif")
    return image, height.data[0]


def tile_set_hash(tile_set: Path) -> str:
    """SHA-256 over id, split and file digests of all chips: changes with any pixel, any chip and any split."""
    index = read_index(tile_set).sort_values("id")
    lines = (
        f"{chip}\t{split}\t{digest}\n" for chip, split, digest in index[["id", "split", "sha256"]].itertuples(index=False)
    )
    return hashlib.sha256("".join(lines).encode()).hexdigest()

"""One sheet, done: predicted into staged files and, where every sheet becomes a file, published.

A task is named by the folder of work and the number of the sheet, and takes everything else from the plan: any process may
do it, and do it again. What a process needs for many sheets - the model, the headers of the imagery - it keeps on its desk.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Self

import numpy as np
from numpy.typing import NDArray

from canopy.errors import CanopyError, ClusterError, OutputError, RasterError
from canopy.grid import Box
from canopy.heap import trim_heap
from canopy.mosaicker.dates import as_numbers
from canopy.mosaicker.publish import StagedSheet, stage_sheet, staged_in
from canopy.mosaicker.quantum import error_bands, quantise
from canopy.mosaicker.stages import Stages
from canopy.region.plan import GAUSSIAN_90, Plan
from canopy.region.records import MANIFEST, SheetDays, SheetRecord, Stage, Work, keep
from canopy.region.report import abstained_tag
from canopy.region.shift import ShiftMeter, sheet_tags
from canopy.tiler.area import area_mask
from canopy.tiler.headers import NO_DATE
from canopy.tiler.imagery import ImageFiles, ImagerySource

if TYPE_CHECKING:
    from canopy.mosaicker.batch import Batch
    from canopy.mosaicker.ensemble import Ensemble
    from canopy.mosaicker.sheets import PublishedSheet

DESKS: Final = 2
"""Plans whose desks a process keeps: one, and the next while the last sheet of the one before is being finished."""

Advance = Callable[[int], None]
"""Called with a number of windows that are done."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Desk:
    """What a process needs for the sheets of one plan."""

    work: Work
    source: ImagerySource
    ensemble: Ensemble
    batch: Batch
    """Windows at once, found once."""
    advance: Advance
    """What to tell of progress in this process."""

    @classmethod
    def furnish(cls, work: Work, source: ImagerySource, ensemble: Ensemble, advance: Advance) -> Self:
        """A desk with as many windows at once as suit the device; raises as `find_batch`."""
        from canopy.mosaicker.batch import find_batch

        return cls(work=work, source=source, ensemble=ensemble, batch=find_batch(ensemble, work.plan.batch), advance=advance)


_desks: OrderedDict[str, Desk] = OrderedDict()
_ensembles: OrderedDict[tuple[Any, ...], Ensemble] = OrderedDict()
_lock = threading.Lock()


def take_seat(desk: Desk) -> None:
    """Have this process do the sheets of a plan with what its run has opened already."""
    with _lock:
        _desks[str(desk.work.folder)] = desk


def leave_seat(work: Work) -> None:
    """Let go of a plan's imagery and model."""
    with _lock:
        _desks.pop(str(work.folder), None)


def desk_of(folder: str, digest: str) -> Desk:
    """The desk for a plan, made when this process first needs it.

    Raises:
        OutputError: the folder of work is not to be seen here, or what the plan was made with has changed.
        CanopyError: the model or the imagery cannot be opened.
    """
    with _lock:
        if folder in _desks:
            _desks.move_to_end(folder)
            return _desks[folder]
        work = Work.read(Path(folder))
        assert work.plan.digest == digest, f"{folder} holds another plan than the task belongs to"
        work.plan.refuse_changed()
        desk = Desk.furnish(work, open_source(work), ensemble_of(work.plan), lambda _: None)
        _desks[folder] = desk
        while len(_desks) > DESKS:
            _desks.popitem(last=False)
        return desk


def open_source(work: Work) -> ImagerySource:
    """The imagery of a plan.

    Raises:
        OutputError: it was given as a Python object.
    """
    imagery = work.plan.imagery
    match imagery.kind:
        case "files":
            return ImageFiles([Path(path) for path in imagery.files])
        case "manifest":
            from canopy.tiler.manifest import Manifest
            from canopy.tiler.stac import StacItems

            manifest = Manifest.read(work.folder / MANIFEST)
            assert manifest.sha256 == imagery.manifest_sha256, f"{work.folder / MANIFEST} is not the manifest of the plan"
            return StacItems(manifest, None if imagery.cache is None else Path(imagery.cache))
        case "object":
            raise OutputError(
                f"the imagery of {work.out} was a Python object, which another process cannot open; "
                f"call map_region with it again and overwrite=True, or give files or a manifest"
            )


def ensemble_of(plan: Plan) -> Ensemble:
    """The models of a plan; a process that goes from plan to plan with the same ones loads them once."""
    from canopy.mosaicker.ensemble import load_ensemble

    key = (
        *((model.weights_sha256, model.contract_sha256) for model in plan.models),
        plan.tta, plan.device, plan.precision, plan.compiled, plan.calibration,
    )  # fmt: skip
    if key not in _ensembles:
        _ensembles.clear()  # first, since two may not fit a device
        _ensembles[key] = load_ensemble(
            [model.folder for model in plan.models], plan.device,
            tta=plan.tta, precision=plan.precision, compile=plan.compiled, calibration=plan.calibration,
        )  # fmt: skip
    return _ensembles[key]


# --- tasks ---------------------------------------------------------------------------------------------------------------


def run_stage(folder: str, digest: str, stage: Stage, number: int) -> SheetRecord:
    """Do a stage of a sheet and write its record; one that is done is not done again.

    Args:
        folder: Folder of the work on the plan.
        digest: The plan's `digest`.
        stage: What to do.
        number: Number of the sheet.

    Raises:
        CanopyError: the sheet cannot be made; nothing of it is left.
    """
    desk = desk_of(folder, digest)
    done = desk.work.record(number, stage)
    if done is not None:
        return done
    return _predict(desk, number) if stage == "predict" else _publish(desk.work, number)


def run_stage_elsewhere(folder: str, digest: str, stage: Stage, number: int) -> dict[str, Any]:
    """`run_stage` for another process: as JSON, with errors that travel. What caused them, GDAL's own among it, cannot."""
    failed: CanopyError
    try:
        return run_stage(folder, digest, stage, number).model_dump(mode="json")
    except CanopyError as error:
        failed = type(error)(str(error))
    except MemoryError:
        failed = ClusterError("a worker has not enough memory for a sheet; give it more, or choose a smaller --sheet-size")
    raise failed


def run_sheet(folder: str, digest: str, number: int) -> SheetRecord:
    """All stages of a sheet, one after the other; see `run_stage`."""
    record = run_stage(folder, digest, "predict", number)
    last = desk_of(folder, digest).work.last_stage
    return record if last == "predict" else run_stage(folder, digest, last, number)


def _predict(desk: Desk, number: int) -> SheetRecord:
    from canopy.model.calibration import interval
    from canopy.mosaicker.predict import predict_sheet

    work, plan = desk.work, desk.work.plan
    sheet, stages, table = plan.sheet(number), Stages(), desk.ensemble.calibration
    known_px, abstained_px, meter = 0, 0, ShiftMeter.of(desk.ensemble, sheet)
    dated = plan.is_dated
    days = SheetDays()

    def wanted(box: Box) -> NDArray[np.bool_]:
        return area_mask(plan.polygons, plan.lattice, box)

    plan.refuse_changed_imagery()
    with work.attempt(number) as attempt:
        with _told_apart(attempt), ExitStack() as stack:
            stack.callback(trim_heap)
            source = stack.enter_context(desk.source.open(plan.lattice, plan.bands))
            staged, writer = stack.enter_context(stage_sheet(attempt, plan.lattice, sheet, dated=dated))
            # Closed before the image is: an error while writing must not leave the reader thread on a closed file.
            predictions = stack.enter_context(
                closing(
                    predict_sheet(
                        desk.ensemble, source, plan.layout, sheet,
                        wanted=wanted, stages=stages, advance=desk.advance, batch=desk.batch,
                        dated=dated,
                    )
                )
            )  # fmt: skip
            for prediction in predictions:
                strip = prediction.strip
                with stages.time("blend"):
                    usable = prediction.valid & wanted(strip.box)
                    mean = np.where(usable, strip.mean_m, np.float32(np.nan))
                    abstained_px += int((usable & np.isnan(mean)).sum())
                    if table is None:
                        half_m = np.float32(GAUSSIAN_90) * strip.spread_m
                        lower, upper = np.maximum(mean - half_m, np.float32(0)), mean + half_m
                    else:
                        lower, upper = interval(mean, strip.spread_m, table)
                    height, error = quantise(mean), error_bands(lower, upper)
                    known_px += int(np.isfinite(height).sum())
                if meter is not None:
                    with stages.time("shift"):
                        meter.add(strip, prediction.image, np.isfinite(mean))
                with stages.time("write"):
                    writer.write(strip.box, height, error)
                    if prediction.days is not None:
                        known = usable & (prediction.days != NO_DATE)
                        writer.write_dates(strip.box, as_numbers(prediction.days, known))
                        days += SheetDays.of(prediction.days[known], undated_px=int((usable & ~known).sum()))
        # A file that changed while it was being read may have given both states.
        plan.refuse_changed_imagery()
        places = {path: work.staged / path.name for path in staged.paths}
        record = work.new_record(
            number, "predict", files=keep(places, work.folder),
            known_px=known_px, abstained_px=abstained_px, stages=stages.record(), batch=desk.batch.record(),
            shift=None if meter is None else meter.shift, days=days if dated else None,
        )  # fmt: skip
        return work.finish(record)


@contextmanager
def _told_apart(attempt: Path) -> Iterator[None]:
    """A file that cannot be written is the output's fault, which every sheet shares; one that cannot be read is its own."""
    try:
        yield
    except RasterError as error:
        if str(error).startswith(f"cannot write {attempt}"):
            raise OutputError(str(error)) from error
        raise


def _publish(work: Work, number: int) -> SheetRecord:
    """Make the two files of a predicted sheet; what was staged is deleted once they are on record."""
    from canopy.mosaicker.sheets import publish_sheet

    plan, stages = work.plan, Stages()
    predicted = work.record(number, "predict")
    if predicted is None:
        raise OutputError(
            f"the staged files of sheet {plan.sheet_name(number)} in {work.staged} are gone; canopy map resume makes them"
        )
    staged = staged_sheet(work, number)
    with work.attempt(number) as attempt:
        with stages.time("publish"):
            tags = sheet_tags(plan, predicted.shift) | abstained_tag(predicted.abstained_px)
            sheet = publish_sheet(attempt, staged, lattice=plan.lattice, sheet_px=plan.sheet_px, tags=tags)
        check_known(work, sheet.height[0].count, predicted.known_px)
        places = {path: work.result / path.relative_to(attempt) for path in sheet.paths(attempt)}
        record = work.new_record(
            number, "publish", files=keep(places, work.folder), known_px=predicted.known_px,
            abstained_px=predicted.abstained_px, stages=stages.record(), statistics=(sheet.height, sheet.error),
            shift=predicted.shift, days=predicted.days,
        )  # fmt: skip
        work.finish(record)
    staged.unlink()
    return record


def check_known(work: Work, found_px: int, predicted_px: int) -> None:
    """Refuse files that do not hold every height that was predicted for them.

    Raises:
        OutputError: some got lost on the disk, after they were written and before they were read again.
    """
    if found_px != predicted_px:
        raise OutputError(
            f"{work.staged} holds {found_px} heights of {predicted_px} that were predicted, so its disk loses data; start "
            f"anew on another with canopy map …"
        )


def staged_sheet(work: Work, number: int) -> StagedSheet:
    """The staged files of a predicted sheet."""
    return staged_in(work.staged, work.plan.sheet(number), dated=work.plan.is_dated)


def published_sheet(record: SheetRecord) -> PublishedSheet:
    """A published sheet from its record."""
    from canopy.mosaicker.sheets import PublishedSheet

    height, error = record.statistics
    return PublishedSheet(box=Box(*record.box), name=record.name, height=height, error=error, dated=record.days is not None)

"""The folder in which a map is made: its lock, its plan, and the records of what is done.

Inside the output folder, while a map is unfinished:

    .canopy-work/lock               held by the one run at work; the system lets go of it when the process ends, whyever
    .canopy-work/NAME/plan.json     named after the plan's digest
    .canopy-work/NAME/sheets.parquet   where the sheets are (GeoParquet), for plans of several
    .canopy-work/NAME/manifest.json    the frozen search that the imagery comes from, where there is one
    .canopy-work/NAME/records/      a JSON file per finished stage of a sheet, and per sheet that failed
    .canopy-work/NAME/staged/       predicted sheets
    .canopy-work/NAME/attempts/     a folder per attempt at a sheet; what is whole is moved out of it
    .canopy-work/NAME/result/       files that are whole, and moved to the output folder when all are

A file counts when its record does, and a record is written last. A sheet may be attempted twice, by two processes at once:
both end with the same bytes.
"""

from __future__ import annotations

import json
import shutil
import socket
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Literal, Self

import numpy as np
from filelock import FileLock, Timeout
from numpy.typing import NDArray
from pydantic import ValidationError

from canopy.errors import OutputError
from canopy.model.shift import Shift
from canopy.mosaicker.quantum import Statistics
from canopy.region.plan import Corners, Plan, Value
from canopy.textfile import write_text

if TYPE_CHECKING:
    from canopy.tiler.manifest import Manifest

WORK: Final = ".canopy-work"
PLAN: Final = "plan.json"
SHEETS: Final = "sheets.parquet"
MANIFEST: Final = "manifest.json"
LOCK: Final = "lock"
MOVES: Final = "moves.json"

Stage = Literal["predict", "publish"]
"""What is done to a sheet: predicted into staged files; and, where each sheet becomes a file, made one."""


class SheetDays(Value):
    """Days, since 1970-01-01, on which the imagery of a sheet's pixels was taken."""

    first: int | None = None
    """None: of none it is known."""
    last: int | None = None
    undated_px: int = 0
    """Usable pixels of imagery whose day is not known."""

    @classmethod
    def of(cls, days: NDArray[np.int32], *, undated_px: int) -> Self:
        """Of pixels whose days are known, and how many others there are."""
        first, last = (int(days.min()), int(days.max())) if days.size else (None, None)
        return cls(first=first, last=last, undated_px=undated_px)

    def __add__(self, other: SheetDays) -> SheetDays:
        """Of both sets of pixels together."""
        known = [day for part in (self, other) for day in (part.first, part.last) if day is not None]
        return SheetDays(
            first=min(known, default=None), last=max(known, default=None), undated_px=self.undated_px + other.undated_px
        )


class SheetRecord(Value):
    """A stage of a sheet that is done."""

    sheet: int
    """Its number in the plan."""
    name: str
    box: Corners
    stage: Stage
    files: dict[str, int]
    """Path within the work folder -> bytes."""
    known_px: int
    """Pixels with a height."""
    abstained_px: int = 0
    """Pixels with usable imagery that every model abstained at; they have no height."""
    stages: dict[str, Any]
    """How long each part of the work took; see `canopy.mosaicker.stages.Stages`."""
    batch: dict[str, Any] | None = None
    """How many windows went through the network at once."""
    host: str
    finished: str
    """When, ISO 8601 in UTC."""
    statistics: tuple[Statistics, ...] = ()
    """Of the bands of the two published files."""
    shift: Shift | None = None
    """How unlike the calibration data it is; None: not measured."""
    days: SheetDays | None = None
    """When the imagery of its pixels was taken; None: the plan says it of all of them."""


class FailedSheet(Value):
    """A sheet that could not be made."""

    sheet: int
    name: str
    message: str


@dataclass(frozen=True, kw_only=True)
class Work:
    """The folder of the work on one plan."""

    folder: Path
    plan: Plan

    # --- the plan ---

    @classmethod
    def begin(cls, base: Path, plan: Plan, manifest: Manifest | None) -> Self:
        """Make the folder and write the plan, last."""
        work = cls(folder=base / plan.digest[:16], plan=plan)
        try:
            for name in ("records", "staged", "attempts", "result", *(() if plan.one_file else ("result/sheets",))):
                (work.folder / name).mkdir(parents=True, exist_ok=True)
            if manifest is not None:
                manifest.write(work.folder / MANIFEST)
            if len(plan.sheets) > 1:
                _write_sheets(work.folder / SHEETS, plan)
        except OSError as error:
            raise _cannot_write(work.folder, error) from error
        write_text(work.folder / PLAN, plan.model_dump_json(indent=1))
        return work

    @classmethod
    def read(cls, folder: Path) -> Self:
        """The work in a folder.

        Raises:
            OutputError: its plan cannot be read, or is not of this version of canopy.
        """
        try:
            plan = Plan.model_validate_json((folder / PLAN).read_bytes())
        except OSError as error:
            raise OutputError(
                f"{folder / PLAN} cannot be read ({error.strerror}); every process that works on a map must see its folder "
                f"under this path"
            ) from error
        except ValidationError as error:
            raise OutputError(
                f"{folder / PLAN} is no plan of this version of canopy; finish the map with the version that began it, or "
                f"start anew with canopy map … --overwrite"
            ) from error
        return cls(folder=folder, plan=plan)

    @property
    def out(self) -> Path:
        """The output folder."""
        return self.folder.parent.parent

    @property
    def staged(self) -> Path:
        """Folder of predicted sheets."""
        return self.folder / "staged"

    @property
    def result(self) -> Path:
        """Folder of files that are whole."""
        return self.folder / "result"

    @cached_property
    def last_stage(self) -> Stage:
        """The stage after which a sheet is done."""
        return "predict" if self.plan.one_file else "publish"

    # --- records ---

    def record(self, number: int, stage: Stage) -> SheetRecord | None:
        """The record of a stage of a sheet whose files are all there, else None."""
        record = self.record_of(number, stage)
        for name, size in record.files.items() if record is not None else ():
            path = self.folder / name
            if not path.is_file() or path.stat().st_size != size:
                return None
        return record

    def record_of(self, number: int, stage: Stage) -> SheetRecord | None:
        """The record of a stage of a sheet, whatever has become of its files."""
        try:
            return SheetRecord.model_validate_json(self._path(number, stage).read_bytes())
        except (FileNotFoundError, ValidationError):
            return None

    def done(self) -> list[SheetRecord]:
        """The records of the sheets that are done, in the plan's order."""
        found = (self.record(number, self.last_stage) for number in range(len(self.plan.sheets)))
        return [record for record in found if record is not None]

    def failed(self) -> list[FailedSheet]:
        """The sheets that failed in the last run, in the plan's order."""
        paths = sorted((self.folder / "records").glob("*.failed.json"))
        found = [FailedSheet.model_validate_json(path.read_bytes()) for path in paths]
        return sorted(found, key=lambda each: each.sheet)

    def finish(self, record: SheetRecord) -> SheetRecord:
        """Write a record; from then on what it tells of is done."""
        write_text(self._path(record.sheet, record.stage), record.model_dump_json(indent=1))
        self._path(record.sheet, "failed").unlink(missing_ok=True)
        return record

    def fail(self, number: int, message: str) -> FailedSheet:
        """Write down that a sheet failed, where that is still possible."""
        failed = FailedSheet(sheet=number, name=self.plan.sheet_name(number), message=message)
        try:
            write_text(self._path(number, "failed"), failed.model_dump_json(indent=1))
        except OutputError:
            # On a full disk there is no place to say so; the run itself says it.
            return failed
        return failed

    def _path(self, number: int, stage: str) -> Path:
        return self.folder / "records" / f"{self.plan.sheet_name(number)}.{stage}.json"

    @contextmanager
    def attempt(self, number: int) -> Iterator[Path]:
        """A folder for one attempt at a sheet, which nobody else writes to; gone afterwards."""
        try:
            folder = Path(tempfile.mkdtemp(prefix=f"{self.plan.sheet_name(number)}.", dir=self.folder / "attempts"))
        except OSError as error:
            raise _cannot_write(self.folder / "attempts", error) from error
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def clear_attempts(self) -> None:
        """Remove what killed processes left of their attempts."""
        for folder in (self.folder / "attempts").iterdir():
            shutil.rmtree(folder, ignore_errors=True)

    def new_record(self, number: int, stage: Stage, **rest: Any) -> SheetRecord:
        """A record, made here and now."""
        return SheetRecord(
            sheet=number,
            name=self.plan.sheet_name(number),
            box=self.plan.sheets[number],
            stage=stage,
            host=socket.gethostname(),
            finished=datetime.now(UTC).isoformat(timespec="milliseconds"),
            **rest,
        )


def keep(files: dict[Path, Path], folder: Path) -> dict[str, int]:
    """Move finished files to their places; their paths within `folder` and sizes, for a record.

    Raises:
        OutputError: that is not possible.
    """
    sizes: dict[str, int] = {}
    try:
        for source, target in files.items():
            sizes[target.relative_to(folder).as_posix()] = source.stat().st_size
            source.replace(target)
    except OSError as error:
        raise _cannot_write(folder, error) from error
    return sizes


def _cannot_write(path: Path, error: OSError) -> OutputError:
    return OutputError(f"cannot write {path} ({error.strerror}); free disk space or choose another folder")


def _write_sheets(path: Path, plan: Plan) -> None:
    """The sheets as a GeoParquet table, for people to look at; the plan itself is JSON."""
    import geopandas
    import shapely

    boxes = [plan.sheet(number) for number in range(len(plan.sheets))]
    frame = geopandas.GeoDataFrame(
        {
            "sheet": range(len(boxes)),
            "name": [plan.sheet_name(number) for number in range(len(boxes))],
            **{key: [getattr(box, key) for box in boxes] for key in ("row0", "col0", "row1", "col1")},
            "windows": [plan.windows(number) for number in range(len(boxes))],
        },
        geometry=[shapely.box(*plan.lattice.grid(box).bounds) for box in boxes],
        crs=plan.lattice.crs,
    )
    part = path.with_name(f".{path.name}.part")
    frame.to_parquet(part)
    part.replace(path)


# --- the folder of all work ----------------------------------------------------------------------------------------------


@contextmanager
def alone(out: Path) -> Iterator[Path]:
    """Hold the output folder: the folder of all work in it, with its lock held.

    Afterwards the folder of work is gone unless there is work to go on with, and so are the folders made for it.

    Raises:
        OutputError: `out` is a file, cannot be made, or another run holds it.
    """
    if out.exists() and not out.is_dir():
        raise OutputError(f"{out} is a file; give a folder")
    base = out / WORK
    missing = [folder for folder in (out, *out.parents) if not folder.exists()]
    try:
        base.mkdir(parents=True, exist_ok=True)
        lock = FileLock(base / LOCK)
        lock.acquire(blocking=False)
    except Timeout as error:
        raise OutputError(f"another run is writing to {out}; wait for it, or choose another folder") from error
    except OSError as error:
        raise OutputError(f"cannot create {base} ({error.strerror}); choose another folder") from error
    try:
        yield base
    finally:
        if unfinished(out) is None:
            shutil.rmtree(base, ignore_errors=True)
            lock.release()
            for folder in missing:  # the folders this run made, innermost first; one that holds something stays
                if folder.exists() and not any(folder.iterdir()):
                    folder.rmdir()
        else:
            lock.release()


def unfinished(out: Path) -> Path | None:
    """The folder of the work in an output folder; None where there is none."""
    found = sorted((out / WORK).glob(f"*/{PLAN}"))
    return found[0].parent if found else None


def discard(folder: Path) -> None:
    """Remove a folder of work, its plan first: without that it is nothing."""
    (folder / PLAN).unlink(missing_ok=True)
    shutil.rmtree(folder)


def is_held(out: Path) -> bool:
    """Whether a run holds the output folder now."""
    path = out / WORK / LOCK
    if not path.exists():
        return False
    lock = FileLock(path)
    try:
        lock.acquire(blocking=False)
    except Timeout:
        return True
    lock.release()
    return False


# --- results take their names --------------------------------------------------------------------------------------------


def move_results(work: Work, out: Path, known: tuple[str, ...]) -> None:
    """Give the files in `work.result` their names in `out`, and take away those of an earlier map that have no successor.

    A kill in between is made good by doing it again: what is moved is written down first.

    Args:
        work: Whose `result` holds files that are whole and nothing else.
        out: The output folder.
        known: All names that a map may have in it.

    Raises:
        OutputError: a file cannot be moved.
    """
    moves = work.folder / MOVES
    if not moves.exists():
        write_text(moves, json.dumps(sorted(path.name for path in work.result.iterdir())))
    names: list[str] = json.loads(moves.read_bytes())
    try:
        for name in known:
            if name not in names:
                _remove(out / name)
        for name in names:
            if (work.result / name).exists():
                if (out / name).is_dir():
                    _remove(out / name)
                (work.result / name).replace(out / name)
    except OSError as error:
        raise _cannot_write(out, error) from error


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)

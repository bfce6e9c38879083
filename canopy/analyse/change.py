"""Change between two maps of one place: by how much, where it is more than both errors, and how sure that is.

    change.tif     change_m (later minus earlier), lower_90_m, upper_90_m: the difference and its interval, metres
    classes.tif    0 unknown, 1 loss, 2 no detectable change, 3 gain, after the minimum mapping unit
    changes.gpkg   the losses and gains of that map as polygons, with area, mean change and its interval
    change.json    areas and what they rest on
    change.qml, classes.qml, changes.qml   their colours in QGIS

A pixel is a loss or a gain where the whole interval of its difference is on one side of 0 m (`canopy.analyse.difference`),
so that at most one pixel in ten is called changed where nothing did. Losses and gains of fewer connected pixels than the
minimum mapping unit are called undetected: edges of crowns, which two images never show in one place.

What is found is what can be shown. A change that is smaller than the errors is in "no detectable change", so the areas are
no estimates of what changed: from above they are bounded by nothing, and from below by the false ones among them.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import mkdtemp
from typing import Final, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict
from pyproj import CRS
from pyproj.exceptions import CRSError

from canopy import __version__
from canopy.analyse.change_polygons import SUMMED, MeanErrors, PolygonWriter, mean_change_interval
from canopy.analyse.change_style import STYLES
from canopy.analyse.class_map import write_class_cog
from canopy.analyse.components import Components
from canopy.analyse.difference import (
    ASSUMPTIONS,
    GAIN,
    LOSS,
    NO_DETECTABLE_CHANGE,
    UNKNOWN,
    Combination,
    Ends,
    Rule,
    change_class,
    checked_rule,
)
from canopy.analyse.pair import Heights, MapPair, Side
from canopy.analyse.stable import Stable, measure_stable
from canopy.errors import AnalysisError, OutputError
from canopy.grid import Box
from canopy.heap import trim_heap
from canopy.mosaicker.publish import STAGED, check_whole, write_cog
from canopy.mosaicker.quantum import QUANTUM_M, quantise
from canopy.raster import RasterPool, create_raster, open_raster
from canopy.region.shift import shift_line
from canopy.score.maps import GivenMap
from canopy.symbology import CHANGE_VALUES
from canopy.textfile import write_text

CHANGE: Final = "change.tif"
CLASSES: Final = "classes.tif"
POLYGONS: Final = "changes.gpkg"
SUMMARY: Final = "change.json"
NAMES: Final = (CHANGE, CLASSES, POLYGONS, SUMMARY, *STYLES)
"""Everything that a change has in its folder."""

BANDS: Final = ("change_m", "lower_90_m", "upper_90_m")
CLASS_BAND: Final = "change"

MIN_AREA_M2: Final = 100.0
"""A crown of a large tree; also the smallest square of ground whose mean a model's block table is measured on."""

NOMINAL: Final = 0.9

STRIP_PX: Final = 512
"""Rows that are looked at at a time; no pixel depends on it."""

_CHUNK_PX: Final = 2048
"""Columns of a strip that are read at a time."""

_OPEN_FILES: Final = 64

_HA: Final = 1e4

Progress = Callable[[int, int], None]
"""Called with (strips done, strips in all)."""


class _Value(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Compared(_Value):
    """One of the two maps."""

    path: str
    kind: Literal["canopy map", "product"]
    models: tuple[str, ...]
    """Name and version, as far as the map says."""
    date: str | None
    """Day or span of days of its imagery; None where it is unknown."""
    intervals: str
    """Where its error comes from."""
    shift: str | None = None
    """Where it is unlike the calibration data, so that its intervals are not promised; None where nothing says so."""


class AreaHa(_Value):
    """Hectares of one kind of change, after the minimum mapping unit."""

    area_ha: float
    polygons: int
    left_out_ha: float
    """In pieces smaller than the minimum mapping unit, which count as no detectable change."""


class MeanChange(_Value):
    """Change of the mean height over all ground that is known in both maps, metres."""

    mean_m: float
    lower_90_m: float
    upper_90_m: float
    interval_from: str


class ChangeSummary(_Value):
    """What became of the ground between two maps; `change.json`."""

    canopy: str
    before: Compared
    after: Compared
    years: float | None
    """Between the middles of their days; None where one is unknown."""
    rule: Rule
    assumption: str
    """What the intervals of change take for granted."""
    nominal: float = NOMINAL
    """Share of unchanged pixels that is not to be called changed, at least."""
    crs: str
    gsd_m: float
    shape: tuple[int, int]
    min_area_m2: float
    loss: AreaHa
    gain: AreaHa
    no_detectable_change_ha: float
    unknown_ha: float
    """Where one of the two maps has no height."""
    false_change_ha_at_most: float
    """What the errors alone may be expected to put into loss and gain before the minimum mapping unit, were nothing changed:
    1 - nominal of the ground that is known. A bound on an expectation and no interval: errors come in patches."""
    mean_change: MeanChange | None
    """None where nothing is known."""
    stable: Stable | None = None
    """What was measured on ground that did not change; None where no such ground was given."""
    resampled: str | None = None
    """How maps of different pixels were brought together; None: they were not resampled."""
    different_models: str | None = None
    """In what the maps differ though they are compared; None where they do not."""

    def line(self) -> str:
        """The areas in a line."""
        return (
            f"loss {self.loss.area_ha:.2f} ha in {self.loss.polygons} polygons, gain {self.gain.area_ha:.2f} ha in "
            f"{self.gain.polygons}, no detectable change {self.no_detectable_change_ha:.2f} ha, unknown "
            f"{self.unknown_ha:.2f} ha"
        )

    def lines(self) -> Iterator[str]:
        """The areas, and what one must know to read them."""
        yield self.line()
        if (mean := self.mean_change) is not None:
            years = "" if self.years is None else f" in {self.years:.1f} years"
            yield (
                f"mean change {mean.mean_m:+.2f} m{years}, 90 % interval {mean.lower_90_m:+.2f} to {mean.upper_90_m:+.2f} m"
            )
        yield f"errors combined by {self.rule}: {self.assumption}; changes smaller than the errors are not detected"
        if self.stable is None:
            yield "what the maps get wrong alike cancels: polygons of ground that did not change (--stable) say how much"
        else:
            yield self.stable.text
        for each in (self.before, self.after):
            if each.shift is not None:
                yield f"{each.path}: {each.shift}"
        if self.resampled is not None:
            yield f"resampled: {self.resampled}"
        if self.different_models is not None:
            yield f"the maps are not of one model: {self.different_models}"


@dataclass(frozen=True, slots=True, kw_only=True)
class ChangeResult:
    """The files of a change, and what they say."""

    folder: Path
    summary: ChangeSummary

    @property
    def files(self) -> tuple[Path, ...]:
        """All of them."""
        return tuple(self.folder / name for name in NAMES)


def change_maps(
    before: GivenMap | Path | str,
    after: GivenMap | Path | str,
    *,
    out: Path,
    min_area_m2: float = MIN_AREA_M2,
    rule: str | None = None,
    error_before_m: float | None = None,
    error_after_m: float | None = None,
    stable: Path | None = None,
    crs: CRS | str | None = None,
    resample: bool = False,
    allow_different_models: bool = False,
    overwrite: bool = False,
    strip_px: int = STRIP_PX,
    progress: Progress | None = None,
) -> ChangeResult:
    """Say what changed between two maps of one place, where it is more than their errors.

    Args:
        before: The earlier map: an output folder of `canopy map`, or a raster of heights.
        after: The later one.
        out: Folder for the files of this module's docstring.
        min_area_m2: Minimum mapping unit: connected losses (or gains) of less are left out; pixels that touch at a corner
            are connected.
        rule: How the errors of the two maps become one, as in `canopy.analyse.difference`; default root-sum-square for two
            maps by one model, sum for anything else.
        error_before_m: Half-width of the 90 % interval of every pixel of a map that has no intervals of its own.
        error_after_m: The same of the later map.
        stable: Polygons of ground on which nothing changed: the intervals of change are then as wide as they must be to
            hold there.
        crs: Of rasters that name none.
        resample: Bring maps of different pixels onto the coarser ones.
        allow_different_models: Compare maps by different models, or of which it is not known.
        overwrite: Replace the files of an earlier comparison.
        strip_px: Rows that are looked at at a time; no result depends on it.
        progress: Called with (strips done, strips in all).

    Raises:
        AnalysisError: the maps must not be compared.
        OutputError: there are files already, or they cannot be written.
        CanopyError: a map cannot be read.
    """
    if not (math.isfinite(min_area_m2) and min_area_m2 >= 0):
        raise AnalysisError(f"--min-area {min_area_m2:g} m² is no area; give square metres, 0 for every pixel")
    asked = None if rule is None else checked_rule(rule)
    refuse_existing(out, overwrite=overwrite)
    given = _as_given(before, crs), _as_given(after, crs)
    with RasterPool(_OPEN_FILES) as pool, _workplace(out) as work:
        pair = MapPair.open(
            given, pool, errors_m=(error_before_m, error_after_m), resample=resample,
            allow_different_models=allow_different_models,
        )  # fmt: skip
        alike = pair.different_models is None and all(side.error_m is None for side in (pair.a, pair.b))
        comparison = _Comparison(pair, asked or ("root-sum-square" if alike else "sum"), strip_px)
        if stable is not None:
            parts = comparison.parts(_CHUNK_PX)
            comparison.fit_to(measure_stable(stable, pair.grid, parts, comparison.reaches))
        summary = _write(comparison, work, min_area_m2, progress or (lambda _done, _total: None))
        write_text(work / SUMMARY, summary.model_dump_json(indent=2) + "\n")
        for name, style in STYLES.items():
            write_text(work / name, style())
        _publish(work, out)
    return ChangeResult(folder=out, summary=summary)


def _as_given(given: GivenMap | Path | str, crs: CRS | str | None) -> GivenMap:
    named = given if isinstance(given, GivenMap) else GivenMap(path=Path(given))
    if crs is None:
        return named
    try:
        return replace(named, crs=CRS.from_user_input(crs))
    except CRSError as error:
        raise AnalysisError(f"--crs {crs!r} is no CRS; give for example EPSG:32722") from error


# --- the work ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Difference:
    """What is known of the change of a box of pixels."""

    change_m: NDArray[np.float64]
    lower_m: NDArray[np.float64]
    upper_m: NDArray[np.float64]
    values: NDArray[np.float64]
    """(2 * SUMMED, row, col): height, ends and half-width of either map; NaN in all where one is unknown."""

    @property
    def bands(self) -> NDArray[np.float32]:
        """(band, row, col) on the quantum, the ends rounded outwards: rounding makes no change of what may be none."""
        lower, upper = np.floor(self.lower_m / QUANTUM_M) * QUANTUM_M, np.ceil(self.upper_m / QUANTUM_M) * QUANTUM_M
        return np.stack([quantise(self.change_m), lower.astype(np.float32), upper.astype(np.float32)])


class _Comparison:
    """Two maps, a rule, and strips."""

    def __init__(self, pair: MapPair, rule: Rule, strip_px: int) -> None:
        self.pair, self.errors, self._strip_px = pair, Combination(rule=rule), strip_px
        self.stable: Stable | None = None
        self.rows, self.cols = pair.box.shape

    def fit_to(self, stable: Stable) -> None:
        """Have intervals as wide as ground that did not change says."""
        self.stable = stable
        self.errors = replace(self.errors, lower_factor=stable.lower_factor, upper_factor=stable.upper_factor)

    @property
    def mean_errors(self) -> MeanErrors:
        """How the errors of means become those of their difference."""
        return MeanErrors(combination=self.errors, blocks=(self.pair.a.blocks, self.pair.b.blocks))

    @property
    def strips(self) -> list[tuple[int, int]]:
        """(first row, rows) of each, from the first."""
        return [(row, min(self._strip_px, self.rows - row)) for row in range(0, self.rows, self._strip_px)]

    def chunks(self) -> Iterator[tuple[int, int]]:
        """(first column, columns) of each."""
        yield from ((col, min(_CHUNK_PX, self.cols - col)) for col in range(0, self.cols, _CHUNK_PX))

    def parts(self, side_px: int) -> Iterator[Box]:
        """Boxes of the common pixels, counted from the first of them."""
        for row in range(0, self.rows, side_px):
            for col in range(0, self.cols, side_px):
                yield Box(row, col, min(row + side_px, self.rows), min(col + side_px, self.cols))

    def reaches(self, part: Box) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
        """The change of a part, and how far its interval reaches down and up from there."""
        found = self.read(part)
        return found.change_m, found.change_m - found.lower_m, found.upper_m - found.change_m

    def read(self, part: Box) -> _Difference:
        """Read a box of the common pixels, counted from the first of them."""
        box = self.pair.box
        here = Box(box.row0 + part.row0, box.col0 + part.col0, box.row0 + part.row1, box.col0 + part.col1)
        a, b = (side.read(self.pair.cells, here) for side in (self.pair.a, self.pair.b))
        lower, upper = self.errors.interval(_ends(a), _ends(b))
        change = b.height_m - a.height_m
        values = np.stack([*_ends(a), a.half_width_m, *_ends(b), b.half_width_m])
        values[:, np.isnan(change)] = np.nan
        return _Difference(change_m=change, lower_m=lower, upper_m=upper, values=values)


def _ends(heights: Heights) -> Ends:
    return heights.height_m, heights.lower_m, heights.upper_m


class _Passes:
    """Two passes over the strips: differences, classes and components; then classes after the sieve, and polygons."""

    def __init__(self, comparison: _Comparison, scratch: Path, least_px: int) -> None:
        self._comparison, self._least_px = comparison, least_px
        self.staged, self.raw, self.sieved = (scratch / name for name in (CHANGE, f"raw_{CLASSES}", CLASSES))
        self.components = Components(scratch, cols=comparison.cols, kinds=(LOSS, GAIN), values=2 * SUMMED, least_px=least_px)
        self.found_px, self.kept_px = (np.zeros(len(CHANGE_VALUES), np.int64) for _ in range(2))
        """Pixels of each class before and after the sieve."""
        self.sums = np.zeros(2 * SUMMED)
        """Over all pixels that are known."""

    def find(self, progress: Callable[[int], None]) -> None:
        """From the last strip to the first."""
        comparison = self._comparison
        grid = comparison.pair.grid
        with (
            create_raster(self.staged, grid=grid, count=len(BANDS), dtype="float32", nodata=math.nan, **STAGED) as change,
            create_raster(self.raw, grid=grid, count=1, dtype="uint8", **STAGED) as classes,
        ):
            for done, (row, rows) in enumerate(reversed(comparison.strips), start=1):
                kind = np.empty((rows, comparison.cols), np.uint8)
                values, places = [], []
                for col, cols in comparison.chunks():
                    found = comparison.read(Box(row, col, row + rows, col + cols))
                    bands = found.bands
                    change.write(row, bands, col)
                    here = change_class(bands[1], bands[2])
                    kind[:, col : col + cols] = here
                    down, along = np.nonzero((here == LOSS) | (here == GAIN))
                    values.append(found.values[:, down, along])
                    places.append(down * comparison.cols + along + col)
                    self.sums += np.nansum(found.values, axis=(1, 2))
                classes.write(row, kind[None])
                self.found_px += np.bincount(kind.ravel(), minlength=len(CHANGE_VALUES))
                order = np.argsort(np.concatenate(places))
                self.components.add(row, kind, np.concatenate(values, axis=1)[:, order], first=row == 0)
                trim_heap()
                progress(done)
        check_whole(self.staged, Box(0, 0, *grid.shape), len(BANDS))

    def sieve(self, writer: PolygonWriter, tags: dict[str, str], progress: Callable[[int], None]) -> None:
        """From the first strip to the last."""
        comparison, found_px = self._comparison, np.zeros(len(CHANGE_VALUES), np.int64)
        tags = tags | {f"CANOPY_CLASS_{each.value}": each.name for each in CHANGE_VALUES}
        where, names = comparison.pair.grid, (CLASS_BAND,)
        with (
            open_raster(self.raw) as classes,
            create_raster(self.sieved, grid=where, count=1, dtype="uint8", band_names=names, tags=tags, **STAGED) as out,
        ):
            out.write_palette({each.value: each.rgb for each in CHANGE_VALUES})
            for done, (row, rows) in enumerate(comparison.strips, start=1):
                kind = classes.read(row, 0, (rows, comparison.cols)).data[0]
                found_px += np.bincount(kind.ravel(), minlength=len(CHANGE_VALUES))
                kept, ended = self.components.take(row, kind, last=row + rows == comparison.rows)
                writer.add(ended)
                kind[((kind == LOSS) | (kind == GAIN)) & ~kept] = NO_DETECTABLE_CHANGE
                self.kept_px += np.bincount(kind.ravel(), minlength=len(CHANGE_VALUES))
                out.write(row, kind[None])
                progress(done)
        writer.close()
        if (found_px != self.found_px).any():  # GDAL only logs what it cannot write when it closes a file
            raise OutputError(f"cannot write {self.raw} (blocks are missing); free disk space or choose another folder")


def _write(comparison: _Comparison, work: Path, min_area_m2: float, progress: Progress) -> ChangeSummary:
    """Make all files but the summary and the styles."""
    pair, cells = comparison.pair, comparison.pair.cells
    tags, strips = _tags(comparison, min_area_m2), len(comparison.strips)
    scratch = work / "scratch"
    scratch.mkdir()
    passes = _Passes(comparison, scratch, max(1, math.ceil(min_area_m2 / cells.gsd_m**2 - 1e-9)))
    passes.find(lambda done: progress(done, 2 * strips))
    parts = [(pair.box, passes.staged)]
    write_cog(work / CHANGE, parts, lattice=cells, box=pair.box, band_names=BANDS, tags=tags)
    passes.staged.unlink()
    dates = pair.a.map.info.date, pair.b.map.info.date
    writer = PolygonWriter(work / POLYGONS, grid=pair.grid, errors=comparison.mean_errors, dates=dates, years=pair.years)
    passes.sieve(writer, tags, lambda done: progress(strips + done, 2 * strips))
    write_class_cog(work / CLASSES, passes.sieved, counts=dict(enumerate(passes.kept_px.tolist())))
    shutil.rmtree(scratch)
    return _summary(comparison, passes, writer.counts, min_area_m2)


def _summary(comparison: _Comparison, passes: _Passes, polygons: Mapping[int, int], min_area_m2: float) -> ChangeSummary:
    pair, cells = comparison.pair, comparison.pair.cells
    ha = cells.gsd_m**2 / _HA
    loss, gain = (
        AreaHa(
            area_ha=float(passes.kept_px[kind] * ha), polygons=polygons[kind],
            left_out_ha=passes.components.small_px[kind] * ha,
        )
        for kind in (LOSS, GAIN)
    )  # fmt: skip
    known_px = int(passes.found_px.sum() - passes.found_px[UNKNOWN])
    return ChangeSummary(
        canopy=__version__,
        before=_compared(pair.a),
        after=_compared(pair.b),
        years=pair.years,
        rule=comparison.errors.rule,
        assumption=ASSUMPTIONS[comparison.errors.rule],
        crs=cells.crs.to_string(),
        gsd_m=cells.gsd_m,
        shape=pair.box.shape,
        min_area_m2=min_area_m2,
        loss=loss,
        gain=gain,
        no_detectable_change_ha=float(passes.kept_px[NO_DETECTABLE_CHANGE] * ha),
        unknown_ha=float(passes.kept_px[UNKNOWN] * ha),
        false_change_ha_at_most=(1 - NOMINAL) * known_px * ha,
        mean_change=_mean_change(comparison, passes.sums, known_px) if known_px else None,
        stable=comparison.stable,
        resampled=pair.resampled,
        different_models=pair.different_models,
    )


def _mean_change(comparison: _Comparison, sums: NDArray[np.float64], known_px: int) -> MeanChange:
    pair = comparison.pair
    means = sums[:, None] / known_px
    area_m2 = np.array([known_px * pair.cells.gsd_m**2])
    a, b = means[:SUMMED], means[SUMMED:]
    lower, upper, source = mean_change_interval(a, b, area_m2, comparison.mean_errors)
    return MeanChange(
        mean_m=float(b[0, 0] - a[0, 0]), lower_90_m=float(lower[0]), upper_90_m=float(upper[0]), interval_from=source
    )


def _compared(side: Side) -> Compared:
    info = side.map.info
    models = tuple(f"{model.name} {model.version}".strip() for model in info.models)
    told = None if side.folder is None or side.folder.run is None else side.folder.run.get("shift")
    return Compared(
        path=info.path, kind=info.kind, models=models, date=info.date, intervals=side.intervals,
        shift=None if told is None else shift_line(told),
    )  # fmt: skip


def _tags(comparison: _Comparison, min_area_m2: float) -> dict[str, str]:
    """What the rasters say of themselves; no paths, which are nobody's business but the summary's."""
    pair = comparison.pair
    tags = {"CANOPY_VERSION": __version__}
    for key, side in (("BEFORE", pair.a), ("AFTER", pair.b)):
        tags[f"CANOPY_{key}"] = side.map.info.name
        tags[f"CANOPY_{key}_DATE"] = side.map.info.date or "unknown"
        tags[f"CANOPY_{key}_INTERVALS"] = side.intervals
    tags["CANOPY_CHANGE_RULE"] = f"{comparison.errors.rule}: {ASSUMPTIONS[comparison.errors.rule]}; nominal {NOMINAL:.0%}"
    tags["CANOPY_MIN_AREA_M2"] = f"{min_area_m2:g}"
    if comparison.stable is not None:
        tags["CANOPY_STABLE_GROUND"] = comparison.stable.text
    if pair.resampled is not None:
        tags["CANOPY_RESAMPLED"] = pair.resampled
    if pair.different_models is not None:
        tags["CANOPY_DIFFERENT_MODELS"] = pair.different_models
    return tags


# --- files ---------------------------------------------------------------------------------------------------------------


def refuse_existing(out: Path, *, overwrite: bool) -> None:
    """Refuse to write over the files of an earlier comparison unasked.

    Raises:
        OutputError: there is one.
    """
    there = [name for name in NAMES if (out / name).exists()]
    if there and not overwrite:
        raise OutputError(f"{out / there[0]} exists; choose another folder or pass --overwrite")


@contextmanager
def _workplace(out: Path) -> Iterator[Path]:
    """A hidden folder beside the results, on their disk, that is gone afterwards; `out` too where it was not there."""
    made = not out.exists()
    try:
        out.mkdir(parents=True, exist_ok=True)
        work = Path(mkdtemp(prefix=".change-", dir=out))
    except OSError as error:
        raise OutputError(f"cannot write into {out} ({error.strerror}); choose another folder") from error
    try:
        yield work
    finally:
        shutil.rmtree(work, ignore_errors=True)
        if made and not any(out.iterdir()):
            out.rmdir()


def _publish(work: Path, out: Path) -> None:
    """Give the finished files their names."""
    assert sorted(path.name for path in work.iterdir()) == sorted(NAMES), "a file of the comparison is missing"
    try:
        for name in NAMES:
            (work / name).replace(out / name)
    except OSError as error:
        raise OutputError(f"cannot write into {out} ({error.strerror}); choose another folder") from error

"""Two maps of one place, read together: the earlier and the later one, on the pixels that both have.

What must not be compared is refused: a map with itself, maps by different models, maps whose intervals promise nothing, maps
whose pixels are not the same ground. Two of these a user may insist on, and the result says so.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import date
from functools import cached_property
from pathlib import Path
from typing import Final, Self

import numpy as np
from numpy.typing import NDArray

from canopy.errors import AnalysisError, NoCrsError
from canopy.grid import Box, Grid
from canopy.model.blocks import BlockTable
from canopy.model.tables import Calibrated
from canopy.mosaicker.quantum import QUANTUM_M
from canopy.raster import RasterPool
from canopy.region.folder import RegionFolder
from canopy.score.cells import Cells, HeightRasters
from canopy.score.maps import GivenMap, OpenMap, ends_of, open_maps

DAYS_A_YEAR: Final = 365.25

UNCALIBRATED: Final = "uncalibrated"
"""How the text of a map's calibration begins when there is none."""

OPTIONS: Final = ("--error-before", "--error-after")


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Heights:
    """Heights of a box of pixels and how wrong they may be, metres, (row, col) float64; NaN in all where one is unknown."""

    height_m: NDArray[np.float64]
    lower_m: NDArray[np.float64]
    upper_m: NDArray[np.float64]
    half_width_m: NDArray[np.float64]
    """As `error_90_m`."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Side:
    """One of the two maps."""

    map: OpenMap
    folder: RegionFolder | None
    """Of a map by canopy."""
    error_m: float | None
    """Half-width of the 90 % interval of every pixel, where the user says it; None: the map's own intervals count."""

    @property
    def name(self) -> str:
        """What the user calls it."""
        return self.map.info.path

    @cached_property
    def calibrated(self) -> Calibrated | None:
        """The tables behind the intervals; None where the map does not say."""
        return None if self.folder is None else self.folder.calibrated

    @property
    def blocks(self) -> BlockTable | None:
        """How wrong means over ground may be; None where that was not measured, or the error is one that the user says."""
        return None if self.error_m is not None or self.calibrated is None else self.calibrated.blocks

    @cached_property
    def day(self) -> date | None:
        """The middle of the days of its imagery."""
        ends = ends_of(self.map.info.date)
        return None if ends is None else ends[0] + (ends[1] - ends[0]) / 2

    @property
    def intervals(self) -> str:
        """Where its error comes from, in words."""
        if self.error_m is not None:
            return f"stated: ± {self.error_m:g} m"
        return self.map.info.calibration or "the map's own"

    def read(self, cells: Cells, box: Box) -> Heights:
        """The heights of a box of cells."""
        height = self.map.height.read(cells, box).height_m
        if self.error_m is not None:
            half = np.where(np.isnan(height), math.nan, self.error_m)
            return Heights(height_m=height, lower_m=height - half, upper_m=height + half, half_width_m=half)
        assert self.map.bounds is not None, f"{self.name} has no intervals"
        lower, upper = (ends.read(cells, box).height_m for ends in self.map.bounds)
        known = np.isfinite(height) & np.isfinite(lower) & np.isfinite(upper)
        height, lower, upper = (np.where(known, values, math.nan) for values in (height, lower, upper))
        half = np.ceil((upper - lower) / (2 * QUANTUM_M)) * QUANTUM_M
        return Heights(height_m=height, lower_m=lower, upper_m=upper, half_width_m=half)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class MapPair:
    """The earlier map a and the later map b on common pixels."""

    a: Side
    b: Side
    cells: Cells
    """The pixels; those of both maps, unless resampled."""
    box: Box
    """The pixels that both have."""
    resampled: str | None
    """How the pixels of the maps became these, in words; None where they are these."""
    different_models: str | None
    """In what the maps differ though they are compared; None where they do not."""

    @classmethod
    def open(
        cls,
        given: tuple[GivenMap, GivenMap],
        pool: RasterPool,
        *,
        errors_m: tuple[float | None, float | None] = (None, None),
        resample: bool = False,
        allow_different_models: bool = False,
    ) -> Self:
        """Open two maps, the earlier first.

        Args:
            given: Output folders of canopy map, or height rasters.
            pool: Keeps files open.
            errors_m: Half-widths of the 90 % interval of each map that has no intervals of its own; None for one that has.
            resample: Bring maps of different pixels onto the coarser ones.
            allow_different_models: Compare maps by different models, or of which it is not known.

        Raises:
            AnalysisError: the maps must not be compared.
            CanopyError: a map cannot be read.
        """
        folders = [RegionFolder.find(each.path) for each in given]
        _refuse_itself(given, folders)
        try:
            opened = open_maps(given, pool)
        except NoCrsError as error:
            first, *_ = str(error).split(";")
            raise AnalysisError(f"{first}; name it with --crs, for example EPSG:32722") from error
        a, b = (
            Side(map=found, folder=folder, error_m=error_m)
            for found, folder, error_m in zip(opened, folders, errors_m, strict=True)
        )
        for side, option in zip((a, b), OPTIONS, strict=True):
            _check_error(side, option)
        different = _difference(a, b)
        if different is not None and not allow_different_models:
            raise AnalysisError(
                f"{a.name} and {b.name} cannot be compared: {different}, and what changes may be the model; map both with "
                f"one model, or --allow-different-models"
            )
        _refuse_reversed(a, b)
        cells, resampled = _common_cells(a, b, resample=resample)
        return cls(a=a, b=b, cells=cells, box=_overlap(a, b, cells), resampled=resampled, different_models=different)

    @property
    def grid(self) -> Grid:
        """Where the common pixels lie."""
        return self.cells.grid(self.box)

    @property
    def years(self) -> float | None:
        """Between the two; None where a date is not known."""
        return None if self.a.day is None or self.b.day is None else (self.b.day - self.a.day).days / DAYS_A_YEAR


# --- what is refused -----------------------------------------------------------------------------------------------------


def _refuse_itself(given: Sequence[GivenMap], folders: Sequence[RegionFolder | None]) -> None:
    paths = [each.path if folder is None else folder.height for each, folder in zip(given, folders, strict=True)]
    bands = [each.band or 1 for each in given]
    same = all(path.exists() for path in paths) and Path(paths[0]).samefile(paths[1]) and bands[0] == bands[1]
    identities = [_identity(folder) for folder in folders]
    if same or (identities[0] is not None and identities[0] == identities[1]):
        what = "is the same map" if same else "is a map of the same imagery by the same model"
        raise AnalysisError(f"{given[1].path} {what} as {given[0].path}; give the maps of two dates")


def _identity(folder: RegionFolder | None) -> str | None:
    run = None if folder is None else folder.run
    return None if run is None else run.get("plan", {}).get("identity")


def _check_error(side: Side, option: str) -> None:
    """That the error of each pixel is known from one source."""
    error_m, calibrated = side.error_m, _is_calibrated(side)
    if error_m is not None and not (math.isfinite(error_m) and error_m > 0):
        raise AnalysisError(f"{option} {error_m:g} m is no error; give metres above 0, the half-width of a 90 % interval")
    if error_m is None and not calibrated:
        what = "is uncalibrated, so its intervals promise nothing" if side.map.bounds else "is a raster without intervals"
        other = "" if side.folder is None else ", or calibrate the model with canopy calibrate and map again"
        raise AnalysisError(
            f"{side.name} {what}; say how wrong its heights may be with {option}, ± metres that hold the truth in 90 % of "
            f"the pixels{other}"
        )
    if error_m is not None and calibrated:
        raise AnalysisError(f"{option} {error_m:g} m is given for {side.name}, whose pixels have intervals; leave it out")


def _is_calibrated(side: Side) -> bool:
    """Whether its intervals promise something: by its record or, where that is gone, by its tags."""
    if side.map.bounds is None or side.folder is None:
        return False
    if side.folder.run is not None:
        return side.calibrated is not None
    return not (side.map.info.calibration or UNCALIBRATED).startswith(UNCALIBRATED)


def _difference(a: Side, b: Side) -> str | None:
    """The first thing in which the contracts of two maps differ, in words; None where none is known."""
    if (a.folder is None) != (b.folder is None):
        return f"{(a if a.folder is not None else b).name} is a map by canopy and the other is not"
    digests = [tuple(model.weights_sha256 for model in side.map.info.models) for side in (a, b)]
    if digests[0] != digests[1]:
        names = (", ".join(f"{m.name} {m.version}".strip() for m in side.map.info.models) or "no model" for side in (a, b))
        one, two = names
        return f"one is by {one}, the other by {two}" + ("" if one != two else " with other weights")
    return None if a.folder is None or b.folder is None else _difference_of_runs(a, b)


def _difference_of_runs(a: Side, b: Side) -> str | None:
    runs = []
    for side in (a, b):
        run = None if side.folder is None else side.folder.run
        if run is None:
            return f"{side.name} has no run.json, so it is not known what made it"
        runs.append(run)
    one, two = (run.get("tta") for run in runs)
    if one != two:
        return f"one is mapped with test-time augmentation {one}, the other with {two}"
    if a.error_m is None and b.error_m is None and runs[0].get("intervals") != runs[1].get("intervals"):
        return "their intervals are of different calibration tables"
    return None


def _refuse_reversed(a: Side, b: Side) -> None:
    if a.day is not None and b.day is not None and b.day < a.day:
        raise AnalysisError(
            f"{b.name} of {b.map.info.date} is older than {a.name} of {a.map.info.date}; give the earlier map first"
        )


# --- common pixels -------------------------------------------------------------------------------------------------------


def _common_cells(a: Side, b: Side, *, resample: bool) -> tuple[Cells, str | None]:
    cells = a.map.height.own_cells()
    if cells is not None and all(each.untouched_by(cells) for each in _rasters(a, b)):
        return cells, None
    if not resample:
        raise AnalysisError(
            f"the pixels of {b.name} are not those of {a.name}: {_in_what(a, b)}; map both with one --gsd and --crs, or "
            f"--resample"
        )
    # Nothing is interpolated: a coarse pixel says nothing of the finer ones in it.
    coarser = max((a, b), key=lambda side: side.map.height.gsd_m)
    cells = coarser.map.height.own_cells()
    if cells is None:
        raise AnalysisError(f"the pixels of {coarser.name} are not square, north up and in metres; warp it onto such first")
    how = "; ".join(f"{side.name}: {side.map.height.resampled(cells, 'mean')}" for side in (a, b))
    return cells, how


def _rasters(*sides: Side) -> list[HeightRasters]:
    return [raster for side in sides for raster in (side.map.height, *(side.map.bounds or ()))]


def _in_what(a: Side, b: Side) -> str:
    """In what two pixel grids differ."""
    files = [side.map.height.files for side in (a, b)]
    for side, some in zip((a, b), files, strict=True):
        if side.map.height.own_cells() is None:
            return f"those of {side.name} are not square, north up and in metres, or of {len(some)} files that do not fit"
    one, two = (some[0] for some in files)
    if one.grid.crs != two.grid.crs:
        return f"they are in {two.grid.crs.to_string()}, not {one.grid.crs.to_string()}"
    if not math.isclose(one.gsd_m, two.gsd_m, rel_tol=1e-6):
        return f"they have {two.gsd_m:.6g} m, not {one.gsd_m:.6g} m"
    col, row = ((v + 0.5) % 1 - 0.5 for v in one.grid.pixel(*two.grid.xy(0, 0)))
    return f"they are moved by {abs(col):.3g} px along and {abs(row):.3g} px across"


def _overlap(a: Side, b: Side, cells: Cells) -> Box:
    boxes = []
    for side in (a, b):
        found = side.map.height.boxes_on(cells)
        boxes.append(
            Box(
                min(box.row0 for box in found), min(box.col0 for box in found),
                max(box.row1 for box in found), max(box.col1 for box in found),
            )
        )  # fmt: skip
    box = boxes[0].intersect(boxes[1])
    if box is None:
        where = (", ".join(f"{v:.0f}" for v in cells.grid(each).bounds) for each in boxes)
        raise AnalysisError(
            f"{a.name} and {b.name} have no ground in common: ({next(where)}) and ({next(where)}) in "
            f"{cells.crs.to_string()}; give two maps of one place"
        )
    return box

"""The maps that are scored: a finished output of `canopy map`, or a height raster of any other product."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import date
from pathlib import Path
from typing import Self

import numpy as np
from numpy.typing import NDArray
from pyproj import CRS

from canopy.errors import CanopyError, RasterError, ScoreError
from canopy.model.blocks import BlockTable
from canopy.raster import RasterPool, open_raster
from canopy.region.folder import RegionFolder
from canopy.score.cells import HeightRasters
from canopy.score.leaks import model_of, models_of_tags
from canopy.score.result import MapInfo, ModelInfo
from canopy.tiler.days import as_date, span
from canopy.tiler.headers import NO_DATE, ImageFile, find_files, read_headers
from canopy.tiler.heights import refuse_implausible, unit_m_of

BOUNDS = ("lower_90_m", "upper_90_m")

DEEPEST_M = -20.0
"""No map that is only noisy says less of bare ground; what does stands for something else."""

COLOURS = 3
"""A raster of so many bands of bytes is an image."""

_SAMPLE_FILES = 16
_SAMPLE_PX = 128
_SAMPLES = 5
"""Heights are judged by windows of `_SAMPLE_PX` in so many files, `_SAMPLES` windows in each direction."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GivenMap:
    """A map as the user names it."""

    path: Path
    """Output folder of `canopy map`, or one of its files; or a raster, a folder or a pattern of rasters of a product."""
    band: int | None = None
    """Band of the heights, default 1."""
    unit_m: float | None = None
    """Metres per unit of the values, in place of what the file says."""
    name: str | None = None
    date: str | None = None
    """Day or year of its imagery, ISO text."""
    statistic: str | None = None
    """What its heights mean, in words."""
    crs: CRS | None = None
    """CRS of rasters that name none."""

    @classmethod
    def parse(cls, text: str) -> Self:
        """`PATH[,name=…][,band=…][,unit=…][,date=…][,statistic=…]`, as the command line takes it.

        Raises:
            ScoreError: a number is none.
        """
        rest, options = text, {}
        while "," in rest:
            head, _, last = rest.rpartition(",")
            key, mark, value = last.partition("=")
            if not mark or key not in ("name", "band", "unit", "date", "statistic"):
                break
            rest, options[key] = head, value
        try:
            band = int(options["band"]) if "band" in options else None
            unit_m = float(options["unit"]) if "unit" in options else None
        except ValueError as error:
            raise ScoreError(f"map {text!r}: band and unit are numbers; give for example {rest},band=1,unit=0.1") from error
        return cls(
            path=Path(rest), band=band, unit_m=unit_m, name=options.get("name"), date=options.get("date"),
            statistic=options.get("statistic"),
        )  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class OpenMap:
    """A map whose heights can be read."""

    info: MapInfo
    height: HeightRasters
    height_path: Path
    """The raster of the heights, or the first of several."""
    bounds: tuple[HeightRasters, HeightRasters] | None
    """Lower and upper end of the 90 % interval; None without."""
    means: BlockTable | None
    """How wrong the map says that its means over ground may be; None where it does not."""
    imagery: tuple[Path, ...]
    """The local images that it was made of, those that are there."""


def open_maps(given: Sequence[GivenMap], pool: RasterPool) -> list[OpenMap]:
    """Open the maps for reading; those of one name are told apart by numbers.

    Raises:
        OutputError: a folder holds no finished map.
        ScoreError: a date is none, or a band or unit is given for a map that has its own.
        RasterError: a raster is unreadable, has no CRS, or heights in a unit that is not known.
    """
    opened: list[OpenMap] = []
    for each in given:
        found = _open(each, pool)
        names = [other.info.name for other in opened]
        name, number = found.info.name, 2
        while name in names:
            name, number = f"{found.info.name} ({number})", number + 1
        info = found.info.model_copy(update={"name": name})
        opened.append(replace(found, info=info))
    return opened


def _open(given: GivenMap, pool: RasterPool) -> OpenMap:
    checked_date(given.date, f"date of {given.path}")
    folder = RegionFolder.find(given.path)
    return _open_product(given, pool) if folder is None else _open_output(given, folder, pool)


# --- maps of canopy --------------------------------------------------------------------------------------------------------


def _open_output(given: GivenMap, folder: RegionFolder, pool: RasterPool) -> OpenMap:
    for name, value in (("band", given.band), ("unit", given.unit_m)):
        if value is not None:
            raise ScoreError(f"{name} is given for {folder.path}, whose heights are metres in band 1; leave it out")
    height = _rasters([folder.height], pool, band=1, unit_m=None, option="unit", crs_if_none=None)
    tags, run = folder.tags, folder.run
    models = models_of_tags(tags) if run is None else tuple(model_of(entry) for entry in run.get("models", []))
    imagery, days = _imagery(folder)
    info = _info(
        given, height, default=folder.path.resolve().name or "map", kind="canopy map", models=models, path=folder.path
    )
    return OpenMap(
        info=info.model_copy(
            update={
                "date": given.date or folder.days or days,
                "statistic": given.statistic or "mean of the predicted distribution of each pixel",
                "has_intervals": folder.error is not None,
                "calibration": tags.get("CANOPY_CALIBRATION"),
                "tags": tags,
            }
        ),
        height=height,
        height_path=folder.height,
        bounds=None if folder.error is None else _bounds(folder.error, pool),
        means=folder.blocks,
        imagery=imagery,
    )


def _bounds(path: Path, pool: RasterPool) -> tuple[HeightRasters, HeightRasters]:
    with open_raster(path) as raster:
        names = raster.band_names
    for name in BOUNDS:
        if name not in names:
            raise RasterError(f"{path} has no band {name}, only {names}; make the map again, or move the file away")
    files = read_headers([path])
    lower, upper = (
        open_heights(files, pool, band=names.index(name) + 1, unit_m=None, option="unit", crs_if_none=None, judged=False)
        for name in BOUNDS
    )
    return lower, upper


def _imagery(folder: RegionFolder) -> tuple[tuple[Path, ...], str | None]:
    """The local images behind a map that are still there, and the days on which the imagery was taken."""
    told = [] if folder.run is None else folder.run.get("imagery", {}).get("files", [])
    there = folder.images
    days = [day for entry in told if (day := str(entry.get("datetime") or "")[:10])]
    try:
        files = read_headers(there)
    except CanopyError:  # an image that has become unreadable tells no day; its map is as good as before
        return (), span(days)
    days += [as_date(file.day) for file in files if file.day != NO_DATE]
    known = len(days) == len(told)
    return there, span(days) if known else None


# --- products --------------------------------------------------------------------------------------------------------------


def _open_product(given: GivenMap, pool: RasterPool) -> OpenMap:
    paths, _, _ = find_files(given.path)
    option = f"unit, as in {given.path},unit=0.1"
    height = _rasters(paths, pool, band=given.band or 1, unit_m=given.unit_m, option=option, crs_if_none=given.crs)
    sample = sample_m(height)
    refuse_implausible(sample, str(given.path), option)
    _refuse_sunken(sample, paths[0])
    with open_raster(paths[0]) as raster:
        tags = {key: value for key, value in raster.tags.items() if key.startswith("CANOPY_")}
    days = [as_date(file.day) for file in height.files if file.day != NO_DATE]
    info = _info(given, height, default=given.path.stem, kind="product", models=models_of_tags(tags), path=given.path)
    return OpenMap(
        info=info.model_copy(
            update={
                "date": given.date or (span(days) if len(days) == len(height.files) else None),
                "statistic": given.statistic or "not said",
                "tags": tags,
            }
        ),
        height=height,
        height_path=paths[0],
        bounds=None,
        means=None,
        imagery=(),
    )


def _refuse_sunken(sample: NDArray[np.float64], path: Path) -> None:
    """Refuse a map with a value for "nothing" that it does not declare: it would be taken for heights."""
    if sample.size and sample.min() < DEEPEST_M:
        share = float(np.mean(sample < DEEPEST_M))
        raise RasterError(
            f"{path}: {share:.1%} of the heights are below {DEEPEST_M:g} m, the lowest {sample.min():g} m; if that means no "
            f"height, declare it: rio edit-info --nodata {sample.min():g} {path.name}"
        )


def _info(
    given: GivenMap, height: HeightRasters, *, default: str, kind: str, models: tuple[ModelInfo, ...], path: Path
) -> MapInfo:
    first = height.files[0]
    known = bool(models) and all(model.footprints_deg is not None for model in models)
    return MapInfo(
        name=given.name or default,
        path=str(path),
        kind="canopy map" if kind == "canopy map" else "product",
        models=models,
        lineage="known" if known else "unknown",
        gsd_m=height.gsd_m,
        crs=first.grid.crs.to_string(),
        date=None,
        statistic="",
        band=given.band or 1,
        unit_m=given.unit_m or 1.0,
        has_intervals=False,
    )


# --- rasters ---------------------------------------------------------------------------------------------------------------


def _rasters(
    paths: Sequence[Path], pool: RasterPool, *, band: int, unit_m: float | None, option: str, crs_if_none: CRS | None
) -> HeightRasters:
    return open_heights(
        read_headers(paths, crs_if_none),
        pool,
        band=band,
        unit_m=unit_m,
        option=option,
        crs_if_none=crs_if_none,
        judged=False,
    )


def open_heights(
    files: Sequence[ImageFile],
    pool: RasterPool,
    *,
    band: int,
    unit_m: float | None,
    option: str,
    crs_if_none: CRS | None,
    judged: bool,
) -> HeightRasters:
    """Height rasters, with each file's own unit, scale and offset.

    Args:
        files: Their headers.
        pool: Keeps files open.
        band: Which band holds the heights, from 1.
        unit_m: Metres per unit of the values, in place of what the files say.
        option: What the user calls that, for messages.
        crs_if_none: CRS of the files that name none.
        judged: As for `HeightRasters`.

    Raises:
        RasterError: a band is missing, the unit of a file is not known, or it is an image.
    """
    if unit_m is not None and not (np.isfinite(unit_m) and unit_m > 0):
        raise RasterError(f"unit {unit_m} must be a finite number above 0; give metres per unit")
    metres: dict[Path, tuple[float, float]] = {}
    for file in files:
        if file.dtype == "uint8" and file.band_count >= COLOURS:
            raise RasterError(
                f"{file.path} holds {file.band_count} bands of bytes, which are colours and not heights; name the height "
                f"rasters alone, for example with a quoted pattern such as '*_chm.tif'"
            )
        if not 1 <= band <= file.band_count:
            raise RasterError(f"{file.path} has bands 1-{file.band_count}, not {band}; give the band of the heights")
        with open_raster(file.path) as raster:
            scale, offset = raster.scaling[band - 1]
            tag, crs = raster.units[band - 1], raster.grid_or(crs_if_none).crs
            # A scale turns whole numbers into something that is read as any other raster of heights.
            dtype = raster.dtype if (scale, offset) == (1.0, 0.0) else "float32"
        per_unit = unit_m if unit_m is not None else unit_m_of(tag, crs, dtype, str(file.path), option)
        metres[file.path] = scale * per_unit, offset * per_unit
    return HeightRasters(files, band=band, metres=metres, judged=judged, pool=pool)


def sample_m(rasters: HeightRasters) -> NDArray[np.float64]:
    """Known heights from all over rasters, as they are before they are judged."""
    step = max(1, len(rasters.files) // _SAMPLE_FILES)
    return np.concatenate([rasters.sample(file, _SAMPLES, _SAMPLE_PX) for file in rasters.files[::step][:_SAMPLE_FILES]])


# --- days ----------------------------------------------------------------------------------------------------------------


def ends_of(text: str | None) -> tuple[date, date] | None:
    """First and last day that a text of `span`, or a year alone, means."""
    if text is None:
        return None
    first, _, last = text.partition(" to ")
    return _day(first, last=False), _day(last or first, last=True)


def _day(text: str, *, last: bool) -> date:
    if len(text) == 4:
        return date(int(text), 12, 31) if last else date(int(text), 1, 1)
    return date.fromisoformat(text)


def checked_date(text: str | None, option: str) -> str | None:
    """A day or a year that a user gives, as it is.

    Raises:
        ScoreError: it is none.
    """
    try:
        ends_of(text)
    except ValueError as error:
        raise ScoreError(f"{option} {text!r} is neither a day nor a year; give for example 2019-07-01 or 2019") from error
    return text

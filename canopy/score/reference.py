"""Canopy heights from airborne lidar, as rasters, that a map is held against."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from pyproj import CRS
from pyproj.exceptions import CRSError

from canopy.errors import NoCrsError, RasterError, ScoreError
from canopy.raster import RasterPool, open_raster
from canopy.score.cells import HeightRasters
from canopy.score.maps import checked_date, ends_of, open_heights, sample_m
from canopy.score.result import MapInfo, ReferenceInfo, Statistic
from canopy.tiler.days import as_date
from canopy.tiler.headers import NO_DATE, LocalPaths, find_files, read_headers
from canopy.tiler.heights import MAX_BELOW_GROUND_M, MAX_HEIGHT_M, refuse_implausible

UNIT_OPTION = "--reference-unit"

LONG_GAP_DAYS = 730
"""Beyond two years between lidar and imagery trees have grown or gone, and the score is also of that."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GivenReference:
    """A lidar canopy height model as the user names it."""

    paths: LocalPaths
    """A raster, a folder, a pattern, or a list of these."""
    crs: str | None = None
    """CRS of files that name none."""
    unit_m: float | None = None
    """Metres per unit of the values, in place of what the files say."""
    band: int = 1
    date: str | None = None
    """Its day or year, in place of what the files say."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class OpenReference:
    """A lidar canopy height model whose heights can be read."""

    name: str
    rasters: HeightRasters
    dates: tuple[str, ...]
    """One, or the first and the last; none where a file's is unknown."""
    crs_given: bool
    unit_m: float
    licence: str | None

    def info(self, statistic: Statistic, maps: list[MapInfo], *, refused: int, negative: int) -> ReferenceInfo:
        """What a result says of it."""
        gaps = [gap for each in maps if (gap := gap_days(self.dates, each.date)) is not None]
        return ReferenceInfo(
            kind="als",
            name=self.name,
            files=tuple(str(file.path) for file in self.rasters.files),
            dates=self.dates,
            gap_days=max(gaps) if len(gaps) == len(maps) else None,
            statistic=STATISTICS[statistic].format(what="the canopy height model"),
            gsd_m=self.rasters.gsd_m,
            crs=self.rasters.files[0].grid.crs.to_string(),
            crs_given=self.crs_given,
            unit_m=self.unit_m,
            mask=f"its known pixels from -{MAX_BELOW_GROUND_M:g} m to {MAX_HEIGHT_M:g} m; those below 0 m count as 0 m",
            n_refused=refused,
            n_negative=negative,
            licence=self.licence,
        )


STATISTICS: dict[Statistic, str] = {
    "mean": "mean of {what} over the cell",
    "max": "greatest height of {what} in the cell",
    "p98": "98th percentile of {what} in the cell",
}


def open_reference(given: GivenReference, pool: RasterPool) -> OpenReference:
    """Open lidar heights for reading.

    Raises:
        ScoreError: the CRS or the day that is given is none.
        RasterError: unreadable; without a CRS; or values that cannot be heights in the unit found.
    """
    checked_date(given.date, "--reference-date")
    paths, name, _ = find_files(given.paths)
    crs = _crs(given.crs)
    lacking = [path for path in paths if _names_no_crs(path)]
    if lacking and crs is None:
        raise NoCrsError(
            f"{lacking[0]} has no CRS, so its place on Earth is unknown; say which it is, for example "
            f"--reference-crs EPSG:32610"
        )
    files = read_headers(paths, crs)
    rasters = open_heights(
        files, pool, band=given.band, unit_m=given.unit_m, option=UNIT_OPTION, crs_if_none=crs, judged=True
    )
    refuse_implausible(sample_m(rasters), name, UNIT_OPTION)
    days = sorted({file.day for file in files})
    known = () if days[0] == NO_DATE else tuple(dict.fromkeys((as_date(days[0]), as_date(days[-1]))))
    return OpenReference(
        name=name,
        rasters=rasters,
        dates=known if given.date is None else tuple(given.date.split(" to ")),
        crs_given=bool(lacking),
        unit_m=rasters.unit_m,
        licence=_licence(paths[0]),
    )


def gap_days(dates: tuple[str, ...], imagery: str | None) -> int | None:
    """Days between a reference and a map's imagery, the largest that is possible; None where one is unknown."""
    taken = ends_of(imagery)
    if not dates or taken is None:
        return None
    first, last = ends_of(dates[0]), ends_of(dates[-1])
    assert first is not None, "no first day"
    assert last is not None, "no last day"
    return max(abs((one - other).days) for one in (first[0], last[1]) for other in taken)


def _crs(text: str | None) -> CRS | None:
    if text is None:
        return None
    try:
        return CRS.from_user_input(text)
    except CRSError as error:
        raise ScoreError(f"--reference-crs {text!r} is not known; give for example EPSG:32610") from error


def _names_no_crs(path: Path) -> bool:
    with open_raster(path) as raster:
        try:
            _ = raster.grid
        except NoCrsError:
            return True
        except RasterError:  # said in full by whoever reads the header
            return False
    return False


def _licence(path: Path) -> str | None:
    with open_raster(path) as raster:
        tags = {key.upper(): value for key, value in raster.tags.items()}
    return next((tags[key] for key in ("LICENCE", "LICENSE", "TIFFTAG_COPYRIGHT") if tags.get(key)), None)

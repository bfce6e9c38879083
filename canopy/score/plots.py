"""Reference heights from field plots: points with a height, a radius, and the statistic of the map to compare with.

Foresters measure trees, a map has pixels, and hardly any height of the one is a height of the other. What to compare with
which:

    field height                                      statistic of the map's pixels in the plot
    ------------------------------------------------  ------------------------------------------------------------------
    tallest tree                                      max
    dominant or top height (mean of the tallest)      p98 or p95
    98th or 95th percentile of lidar returns          p98, p95 (of a canopy surface, which lies above returns below it)
    mean of a canopy height model, gaps included      mean

Lorey's height, the mean of tree heights weighted by basal area, is none of these. It is a mean of trees, and the mean of a
canopy height model one of area, with the gaps as 0 m: the latter is lower by metres, in open stands by half. The same holds
for the plain mean height of trees, in which the suppressed ones count that no map from above sees. A comparison of them with
`mean` shows a bias that is not the map's; if at all, they go with a percentile, and the score then says how well the one
predicts the other, not how wrong the map is. So there is no default: the statistic must be named.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, model_validator
from pyproj import CRS
from pyproj.exceptions import CRSError

from canopy.errors import SourceError
from canopy.score.footprint import MAX_REACH_M, WGS84, Shots, check_statistic
from canopy.score.sieve import NO_HEIGHT, Sieve, SiftSettings
from canopy.settings import nearest
from canopy.tiler.heights import MAX_HEIGHT_M

if TYPE_CHECKING:
    import geopandas
    import pandas as pd

NO_PLACE: Final = "without a place"

_TABLES: Final = (".csv", ".txt")
_PARQUET: Final = (".parquet", ".geoparquet")
_DEGREES: Final = ("lon", "lat")


class PlotSettings(SiftSettings):
    """How to read a file of field plots."""

    height_column: str
    """The column of heights."""
    statistic: str
    """What of the map's pixels in a plot to compare with: max, mean, or a percentile such as p98; see this module."""
    height_unit_m: float = Field(default=1.0, gt=0, allow_inf_nan=False)
    """Metres per unit of the heights: 0.3048 for feet."""
    radius_m: float | None = Field(default=None, gt=0, le=MAX_REACH_M)
    """Radius of all plots, metres; or"""
    radius_column: str | None = None
    """the column of radii."""
    radius_unit_m: float = Field(default=1.0, gt=0, allow_inf_nan=False)
    """Metres per unit of the column of radii."""
    x_column: str | None = None
    """Of a CSV: easting or longitude; default `x`, or `lon`."""
    y_column: str | None = None
    """Of a CSV: northing or latitude; default `y`, or `lat`."""
    crs: str | None = None
    """CRS of the places where the file does not say it, for example EPSG:32610; columns `lon` and `lat` are WGS 84."""
    id_column: str | None = None
    """The column of names; default the number of the row."""
    date_column: str | None = None
    """The column of days (ISO: 2021-07-15)."""

    @model_validator(mode="after")
    def _whole(self) -> PlotSettings:
        try:
            check_statistic(self.statistic)
        except SourceError as error:
            raise ValueError(str(error)) from error
        if (self.radius_m is None) == (self.radius_column is None):
            raise ValueError("give the plots' radius as radius_m or as radius_column, one of the two")
        if (self.x_column is None) != (self.y_column is None):
            raise ValueError("give x_column and y_column both, or neither")
        if (self.since or self.until) and self.date_column is None:
            raise ValueError("since and until need the days of the plots: give date_column")
        return self


def read_plots(path: Path | str, settings: PlotSettings) -> Shots:
    """The field plots of a file.

    Args:
        path: Points in a GeoPackage, GeoJSON, GeoParquet or what else GDAL reads, or a CSV with columns of coordinates.
        settings: Which columns hold what.

    Raises:
        SourceError: missing or unreadable; not points; without CRS; without a column that is named; heights, radii or days
            that are none; or heights that no tree has.
    """
    path = Path(path)
    table = _read_table(path, settings)
    x, y = (np.asarray(axis, dtype=np.float64) for axis in (table.geometry.x, table.geometry.y))
    count = len(table)
    height_m = _numbers(path, table, settings.height_column) * settings.height_unit_m
    _refuse_impossible(path, height_m, settings)
    radius_m = np.full(count, settings.radius_m) if settings.radius_m is not None else _radii_m(path, table, settings)
    day = np.full(count, np.datetime64("NaT"), dtype="datetime64[D]")
    if settings.date_column is not None:
        day = _days(path, table, settings.date_column)
    names = np.arange(1, count + 1) if settings.id_column is None else _column(path, table, settings.id_column).to_numpy()

    sieve = Sieve(count)
    sieve.drop(NO_PLACE, ~(np.isfinite(x) & np.isfinite(y)))
    points = table.geometry.to_crs(WGS84)
    if settings.bounds_deg is not None:
        sieve.drop_outside(np.asarray(points.x), np.asarray(points.y), settings.bounds_deg)
    sieve.drop_dates(day, settings.since, settings.until)
    sieve.drop(NO_HEIGHT, np.isnan(height_m))
    left = sieve.left
    kept = int(left.sum())
    return Shots(
        source=f"field plots, {settings.height_column}",
        statistic=settings.statistic,
        crs=CRS.from_user_input(table.crs),
        x=x[left],
        y=y[left],
        height_m=height_m[left],
        radius_m=radius_m[left],
        half_length_m=np.zeros(kept),
        azimuth_deg=np.zeros(kept),
        date=day[left],
        id=names[left].astype(np.str_),
        track=np.zeros(kept, dtype=np.intp),
        tracks=(path.name,),
        read=count,
        dropped=sieve.dropped,
    )


# --- the file ------------------------------------------------------------------------------------------------------------


def _read_table(path: Path, settings: PlotSettings) -> geopandas.GeoDataFrame:
    """The rows as points in a CRS."""
    if not path.is_file():
        raise SourceError(f"{path} does not exist; give a file of points (GPKG, GeoJSON, GeoParquet or CSV)")
    table = _read_csv(path, settings) if path.suffix.lower() in _TABLES else _read_points(path)
    if table.crs is None:
        if settings.crs is None:
            raise SourceError(f"{path} has no CRS, so its places on Earth are unknown; give crs, for example EPSG:32610")
        return table.set_crs(_crs(settings.crs))
    if settings.crs is not None and CRS.from_user_input(table.crs) != _crs(settings.crs):
        raise SourceError(
            f"{path} is in {CRS.from_user_input(table.crs).name!r}, not in {settings.crs}; leave crs out, or correct it"
        )
    return table


def _read_points(path: Path) -> geopandas.GeoDataFrame:
    import geopandas
    from pyarrow.lib import ArrowException
    from pyogrio.errors import DataLayerError, DataSourceError

    try:
        table = geopandas.read_parquet(path) if path.suffix.lower() in _PARQUET else geopandas.read_file(path)
    except (DataSourceError, DataLayerError, ArrowException, ValueError, OSError) as error:
        reason = " ".join(str(error).split())
        raise SourceError(
            f"{path} cannot be read as points ({reason:.200}); give a GPKG, GeoJSON, GeoParquet or CSV"
        ) from error
    if not isinstance(table, geopandas.GeoDataFrame) or table.active_geometry_name is None:
        raise SourceError(f"{path} has no points; give a layer of points, or a CSV with columns of coordinates")
    if not len(table):
        raise SourceError(f"{path} has no rows; give at least one plot")
    kinds = set(table.geometry[~(table.geometry.isna() | table.geometry.is_empty)].geom_type)
    if kinds - {"Point"}:
        raise SourceError(
            f"{path} holds {', '.join(sorted(kinds))}, not points; give the centres of the plots and their radius"
        )
    return table


def _read_csv(path: Path, settings: PlotSettings) -> geopandas.GeoDataFrame:
    import geopandas
    import pandas as pd

    try:
        table = pd.read_csv(path)
    except (ValueError, OSError, pd.errors.ParserError) as error:
        raise SourceError(f"{path} cannot be read as CSV ({' '.join(str(error).split()):.200}); correct it") from error
    if not len(table):
        raise SourceError(f"{path} has no rows; give at least one plot")
    pair = (settings.x_column, settings.y_column) if settings.x_column and settings.y_column else None
    if pair is None:
        pair = next((each for each in (("x", "y"), _DEGREES) if set(each) <= set(table.columns)), None)
    if pair is None:
        raise SourceError(
            f"{path} has the columns {', '.join(map(str, table.columns)):.200} and none of x and y, or lon and lat; name "
            f"them with x_column and y_column"
        )
    x, y = (_numbers(path, table, name) for name in pair)
    if pair == _DEGREES:
        if bool((np.abs(x) > 180).any() or (np.abs(y) > 90).any()):
            raise SourceError(f"{path} has places in lon and lat that are no degrees; name the columns x and y and give crs")
        return geopandas.GeoDataFrame(table, geometry=geopandas.points_from_xy(x, y), crs=WGS84)
    return geopandas.GeoDataFrame(table, geometry=geopandas.points_from_xy(x, y))


def _crs(text: str) -> CRS:
    try:
        return CRS.from_user_input(text)
    except CRSError as error:
        raise SourceError(f"crs {text!r} is not known to PROJ; give for example EPSG:32610") from error


# --- columns -------------------------------------------------------------------------------------------------------------


def _column(path: Path, table: pd.DataFrame, name: str) -> pd.Series:
    if name not in table.columns:
        names = [str(column) for column in table.columns if column != "geometry"]
        raise SourceError(f"{path} has no column {name!r}; {nearest(name, names)}")
    return table[name]


def _numbers(path: Path, table: pd.DataFrame, name: str) -> NDArray[np.float64]:
    """A column of numbers, NaN where it is empty."""
    import pandas as pd

    column = _column(path, table, name)
    numbers = pd.to_numeric(column, errors="coerce")
    bad = np.asarray(numbers.isna() & column.notna())
    if pd.api.types.is_bool_dtype(column) or bad.any():
        row = int(np.flatnonzero(bad)[0]) if bad.any() else 0
        raise SourceError(
            f"{path}: {name} of row {row + 1} is {str(column.iloc[row])!r}, not a number; correct it, or leave it empty"
        )
    values: NDArray[Any] = numbers.to_numpy(dtype=np.float64, na_value=np.nan)
    if np.isinf(values).any():
        raise SourceError(f"{path}: {name} of row {int(np.flatnonzero(np.isinf(values))[0]) + 1} is infinite; correct it")
    return values


def _refuse_impossible(path: Path, height_m: NDArray[np.float64], settings: PlotSettings) -> None:
    with np.errstate(invalid="ignore"):
        wrong = np.flatnonzero((height_m < 0) | (height_m > MAX_HEIGHT_M))
    if wrong.size:
        row = int(wrong[0])
        remedy = "leave unknown heights empty" if height_m[row] < 0 else "heights in feet need height_unit_m = 0.3048"
        raise SourceError(
            f"{path}: {settings.height_column} of row {row + 1} is {height_m[row]:g} m, and trees have 0 m to "
            f"{MAX_HEIGHT_M:g} m; {remedy}"
        )


def _radii_m(path: Path, table: pd.DataFrame, settings: PlotSettings) -> NDArray[np.float64]:
    assert settings.radius_column is not None, "no column of radii"
    radius_m = _numbers(path, table, settings.radius_column) * settings.radius_unit_m
    wrong = np.flatnonzero(~((radius_m > 0) & (radius_m <= MAX_REACH_M)))
    if wrong.size:
        row = int(wrong[0])
        raise SourceError(
            f"{path}: {settings.radius_column} of row {row + 1} is {radius_m[row]:g} m; a plot's radius is above 0 m and at "
            f"most {MAX_REACH_M:g} m"
        )
    return radius_m


def _days(path: Path, table: pd.DataFrame, name: str) -> NDArray[np.datetime64]:
    """A column of days, NaT where it is empty."""
    import pandas as pd

    column = _column(path, table, name)
    if not pd.api.types.is_datetime64_any_dtype(column):
        # A bare number could be a year, a day of a spreadsheet's calendar or seconds; pandas would take nanoseconds.
        bad = pd.to_numeric(column, errors="coerce").notna()
        days = pd.to_datetime(column.where(~bad), errors="coerce", format="ISO8601", utc=True)
        bad |= column.notna() & days.isna()
        if bad.any():
            row = int(np.flatnonzero(bad)[0])
            raise SourceError(
                f"{path}: {name} of row {row + 1} is {str(column.iloc[row])!r}, not a day; write days as 2021-07-15"
            )
        column = days
    days = pd.to_datetime(column, utc=True).dt.tz_localize(None)
    return np.asarray(days.to_numpy().astype("datetime64[D]"))

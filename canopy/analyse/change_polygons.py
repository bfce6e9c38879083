"""Polygons of change as a GeoPackage: where, how much, how sure.

The interval of a polygon's mean change is that of means over ground (`canopy.model.blocks`), not the mean of its pixels'
intervals: errors of neighbouring pixels cancel in part, and the block table measures how much of them does not. Polygons
smaller than the smallest square that was measured have at least the mean of their pixels' intervals. Where there is no such
table, as for rasters with a stated error, the pixels count as if they all erred together: a mean cannot be more wrong.

A polygon is where it is because its pixels looked changed: of many places those are picked that err most. So its interval
reaches at least as far as the mean of its pixels' own. That makes up for most of it, not for all: of the polygons of
tests/bench/bench_change.py it holds the true mean change of 82 to 88 %, of those that are true losses 94 % and more. Where
`change_to_error`, the mean change in units of how far its interval reaches towards 0 m, is above 1 the interval excludes
0 m; of false polygons that is so for a fifth, of true losses for two thirds and more. It is no probability.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import shapely
from numpy.typing import NDArray
from pyproj import CRS

from canopy.analyse.components import Component
from canopy.analyse.difference import GAIN, LOSS, Combination, Ends, difference_interval
from canopy.errors import OutputError
from canopy.grid import Grid
from canopy.model.blocks import BlockTable, mean_interval
from canopy.mosaicker.gti import undated

LAYER: Final = "changes"
NAMES: Final[Mapping[int, str]] = {LOSS: "loss", GAIN: "gain"}

SUMMED: Final = 4
"""Values of a map that are summed over a component: height, lower end, upper end, half-width."""

_BATCH: Final = 4096
"""Polygons that are written at a time."""

BY_SQUARES: Final = "squares of ground"
BY_PIXELS: Final = "pixels as if they all erred together"


@dataclass(frozen=True, slots=True, kw_only=True)
class MeanErrors:
    """How the errors of means over ground become those of their difference."""

    combination: Combination
    blocks: tuple[BlockTable | None, BlockTable | None]
    """Of the two maps."""


class PolygonWriter:
    """A GeoPackage that components are added to, in order."""

    def __init__(
        self,
        path: Path,
        *,
        grid: Grid,
        errors: MeanErrors,
        dates: tuple[str | None, str | None],
        years: float | None,
    ) -> None:
        """Begin a file.

        Args:
            path: Its name; it must not exist.
            grid: The pixels that the components are outlined on.
            errors: How the errors of means become those of their difference.
            dates: Of the two maps, ISO text.
            years: Between them.
        """
        self._path, self._grid, self._errors = path, grid, errors
        self._dates, self._years = dates, years
        self._waiting: list[Component] = []
        self.counts = dict.fromkeys(NAMES, 0)
        """Class -> polygons."""

    def add(self, components: Sequence[Component]) -> None:
        """Take components in the order in which they are to be numbered.

        Raises:
            OutputError: they cannot be written.
        """
        self._waiting += components
        if len(self._waiting) >= _BATCH:
            self._flush()

    def close(self) -> None:
        """Write what is left; a file without polygons has its columns all the same.

        Raises:
            OutputError: as `add`.
        """
        if self._waiting or not self._path.exists():
            self._flush()

    def _flush(self) -> None:
        import geopandas
        import pyogrio

        columns = self._columns(self._waiting)
        outlines = shapely.transform([each.outline for each in self._waiting], _to_crs(self._grid)) if self._waiting else []
        table = geopandas.GeoDataFrame(columns, geometry=outlines, crs=CRS(self._grid.crs))
        exists = self._path.exists()
        try:
            with undated():
                pyogrio.write_dataframe(
                    table, self._path, layer=LAYER, driver="GPKG", append=exists, geometry_type="MultiPolygon"
                )
        except (pyogrio.errors.DataSourceError, pyogrio.errors.FeatureError, pyogrio.errors.DataLayerError) as error:
            raise OutputError(f"cannot write {self._path} ({error}); free disk space or choose another folder") from error
        for each in self._waiting:
            self.counts[each.kind] += 1
        self._waiting = []

    def _columns(self, components: Sequence[Component]) -> dict[str, Any]:
        x_m, y_m = self._grid.gsd
        pixels = np.array([each.pixels for each in components], np.int64)
        area_m2 = np.asarray(pixels * (x_m * y_m), np.float64)
        sums = np.array([each.sums for each in components]).reshape(-1, 2 * SUMMED)
        means = sums / pixels[:, None]
        a, b = means[:, :SUMMED].T, means[:, SUMMED:].T
        lower, upper, source = picked_change_interval(a, b, area_m2, self._errors)
        change = b[0] - a[0]
        # How far the interval reaches towards 0 m.
        reach = np.where(change < 0, upper - change, change - lower)
        start, none = sum(self.counts.values()), np.full(len(pixels), np.nan)
        per_year = none if not self._years else change / self._years
        return {
            "id": np.arange(start + 1, start + 1 + len(pixels)),
            "class": np.array([NAMES[each.kind] for each in components], dtype=object),
            "area_m2": area_m2,
            "mean_before_m": a[0],
            "mean_after_m": b[0],
            "mean_change_m": change,
            "mean_change_lower_90_m": lower,
            "mean_change_upper_90_m": upper,
            "change_to_error": np.abs(change) / np.where(reach > 0, reach, np.nan),
            "interval_from": np.array([source] * len(pixels), dtype=object),
            "date_before": np.array([self._dates[0]] * len(pixels), dtype=object),
            "date_after": np.array([self._dates[1]] * len(pixels), dtype=object),
            "years": none if self._years is None else np.full(len(pixels), self._years),
            "change_per_year_m": per_year,
        }


def mean_change_interval(
    a: NDArray[np.float64], b: NDArray[np.float64], area_m2: NDArray[np.float64], errors: MeanErrors
) -> tuple[NDArray[np.float64], NDArray[np.float64], str]:
    """The interval of the mean change of patches of ground.

    Args:
        a: (4, patch) means of the earlier map's heights, lower ends, upper ends and half-widths.
        b: The same of the later map.
        area_m2: (patch,).
        errors: How the errors of means become those of their difference.

    Returns:
        (patch,) lower and upper ends in metres, and what they are made of.
    """
    one, two = errors.blocks
    if one is None or two is None:
        return *_of_pixels(a, b, errors), BY_PIXELS
    lower, upper = difference_interval(_of_squares(a, area_m2, one), _of_squares(b, area_m2, two), errors.combination.rule)
    return lower, upper, BY_SQUARES


def picked_change_interval(
    a: NDArray[np.float64], b: NDArray[np.float64], area_m2: NDArray[np.float64], errors: MeanErrors
) -> tuple[NDArray[np.float64], NDArray[np.float64], str]:
    """As `mean_change_interval`, of patches that were picked because they look changed: at least that of their pixels."""
    (lower, upper, source), (least, most) = mean_change_interval(a, b, area_m2, errors), _of_pixels(a, b, errors)
    return np.minimum(lower, least), np.maximum(upper, most), source


def _of_pixels(
    a: NDArray[np.float64], b: NDArray[np.float64], errors: MeanErrors
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Of means whose pixels all err together."""
    return errors.combination.interval((a[0], a[1], a[2]), (b[0], b[1], b[2]))


def _of_squares(means: NDArray[np.float64], area_m2: NDArray[np.float64], table: BlockTable) -> Ends:
    """Mean heights of patches and the ends of their intervals; small patches have at least the mean of their pixels' own."""
    mean, lower, upper, half_width = means
    least, most = mean_interval(mean, half_width, area_m2, table)
    small = area_m2 < table.sides_m[0] ** 2
    return mean, np.where(small, np.minimum(least, lower), least), np.where(small, np.maximum(most, upper), most)


def _to_crs(grid: Grid) -> Callable[[NDArray[np.float64]], NDArray[np.float64]]:
    def transformed(xy: NDArray[np.float64]) -> NDArray[np.float64]:
        return np.stack(grid.xy(xy[:, 0], xy[:, 1]), axis=1)

    return transformed

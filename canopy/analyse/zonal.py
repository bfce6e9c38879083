"""Statistics of a map over polygons, each with its error; `canopy zonal`.

Every pixel counts with the area of it that a polygon covers. The sums are histograms of heights in steps of 1/32 m, which is
how the heights are stored, so means, quantiles and shares are exact and a polygon of the whole region takes no more memory
than a window.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import pandas as pd
import shapely
from numpy.typing import NDArray
from pyproj import CRS

from canopy.analyse.bounds import NOT_MEASURED, mean_bounds, quantile_bounds, share_bounds
from canopy.analyse.coverage import covered, in_pixels
from canopy.analyse.gaps import GAP_BELOW_M, LEAST_GAP_M2, checked_gap, gaps, halo_px
from canopy.analyse.histogram import HeightHistogram
from canopy.analyse.surfaces import Window, open_surfaces
from canopy.analyse.table import check_out, read_table, write_table
from canopy.errors import AnalysisError
from canopy.grid import Box
from canopy.model.blocks import BlockTable
from canopy.region.folder import RegionFolder

if TYPE_CHECKING:
    import geopandas

ZONES: Final = "zones"
"""Name of the layer that is written."""

Progress = Callable[[int, int], None]

COVER_ABOVE_M: Final = (2.0, 5.0)
"""Canopy cover is the share of ground with canopy higher than this."""

LEVELS: Final = {"p50": 0.5, "p95": 0.95}
"""Quantiles of the heights."""

WINDOW_PX: Final = 1024
"""A polygon is read as a whole up to twice this side squared, else in squares of this side that are fixed to the map."""

COLUMNS: Final[Mapping[str, str]] = {
    "area_m2": "area of the polygon in the map's CRS, m²",
    "known_fraction": "share of it where the map has a height, 0 to 1; all other columns are about that ground",
    "mean_m": "mean canopy height, m",
    "mean_lower_90_m": "lower end of the 90 % interval of the mean, m",
    "mean_upper_90_m": "its upper end, m",
    **{
        f"{name}{suffix}": text
        for name, level in LEVELS.items()
        for suffix, text in (
            ("_m", f"height that {level:.0%} of the ground does not exceed, m"),
            ("_lower_90_m", "its lower bound, m"),
            ("_upper_90_m", "its upper bound, m"),
        )
    },
    "max_m": "height of the highest pixel that the polygon touches, m; its error is not measured",
    **{
        f"cover_{above_m:g}m{suffix}": text
        for above_m in COVER_ABOVE_M
        for suffix, text in (
            ("", f"canopy cover: share of ground with canopy above {above_m:g} m, 0 to 1"),
            ("_lower_90", "its lower bound"),
            ("_upper_90", "its upper bound"),
        )
    },
    "gap_fraction": "share of ground in canopy gaps, 0 to 1",
    "gap_fraction_lower_90": "its lower bound",
    "gap_fraction_upper_90": "its upper bound",
}
"""What is added to each polygon, in this order. Bounds are NaN where no error is known, as all are of uncalibrated maps."""


@dataclass(slots=True, kw_only=True, eq=False)
class Zone:
    """What was summed over one polygon; parts of it add up in any order."""

    area_m2: float
    """Of the polygon, in the map's CRS."""
    pixel_m2: float
    heights: HeightHistogram = field(default_factory=HeightHistogram)
    """Covered pixels by height."""
    lower: HeightHistogram = field(default_factory=HeightHistogram)
    """The same of the lower ends of the intervals."""
    upper: HeightHistogram = field(default_factory=HeightHistogram)
    half_width: HeightHistogram = field(default_factory=HeightHistogram)
    """The same of `error_90_m`."""
    gap_px: NDArray[np.float64] = field(default_factory=lambda: np.zeros(3))
    """Covered pixels in gaps of the heights, of the upper surface (the fewest) and of the lower one (the most)."""
    without_error_px: float = 0.0
    """Covered pixels with a height and without an interval."""

    @property
    def known_m2(self) -> float:
        """Ground with a height."""
        return self.heights.total * self.pixel_m2

    @property
    def has_bounds(self) -> bool:
        """Whether all known pixels have an interval."""
        return self.heights.total > 0 and self.without_error_px == 0

    def add(self, window: Window, weight: NDArray[np.float32], gap: tuple[NDArray[np.bool_], ...]) -> None:
        """Take in pixels with the share of each that the polygon covers."""
        known = np.isfinite(window.height_m)
        self.heights.add(window.height_m, weight)
        bounded = known & np.isfinite(window.lower_m) & np.isfinite(window.upper_m) & np.isfinite(window.half_width_m)
        self.without_error_px += float(weight[known & ~bounded].sum(dtype=np.float64))
        if bounded.any():
            inside = weight if bounded.all() else np.where(bounded, weight, np.float32(0))
            for total, band in (
                (self.lower, window.lower_m),
                (self.upper, window.upper_m),
                (self.half_width, window.half_width_m),
            ):
                total.add(band, inside)
        self.gap_px += [weight[here].sum(dtype=np.float64) for here in gap]

    def statistics(self, table: BlockTable | None) -> dict[str, float]:
        """The columns of `COLUMNS`; `table` is that of the map."""
        total, bounded = self.heights.total, self.has_bounds
        row = dict.fromkeys(COLUMNS, math.nan) | {
            "area_m2": self.area_m2,
            "known_fraction": min(self.known_m2 / self.area_m2, 1.0),
            "mean_m": self.heights.mean_m,
            "max_m": self.heights.max_m,
        }
        if bounded:
            ends = mean_bounds(self.heights, self.half_width, (self.lower, self.upper), self.known_m2, table)
            row["mean_lower_90_m"], row["mean_upper_90_m"] = ends
        for name, level in LEVELS.items():
            row[f"{name}_m"] = self.heights.quantile_m(level)
            ends = quantile_bounds(self.lower, self.upper, level) if bounded else NOT_MEASURED
            row[f"{name}_lower_90_m"], row[f"{name}_upper_90_m"] = ends
        for above_m in COVER_ABOVE_M:
            name = f"cover_{above_m:g}m"
            row[name] = self.heights.share_above(above_m)
            ends = share_bounds(self.lower, self.upper, above_m) if bounded else NOT_MEASURED
            row[f"{name}_lower_90"], row[f"{name}_upper_90"] = ends
        gap = self.gap_px / total if total > 0 else np.full(3, np.nan)
        row["gap_fraction"] = float(gap[0])
        row["gap_fraction_lower_90"], row["gap_fraction_upper_90"] = (
            (float(gap[1]), float(gap[2])) if bounded else NOT_MEASURED
        )
        return row


def zonal_statistics(
    folder: RegionFolder,
    polygons: geopandas.GeoDataFrame,
    *,
    gap_below_m: float = GAP_BELOW_M,
    least_gap_m2: float = LEAST_GAP_M2,
    prefix: str = "",
    progress: Progress | None = None,
) -> geopandas.GeoDataFrame:
    """The polygons with the columns of `COLUMNS`, in their order and CRS, their own columns first.

    Args:
        folder: A finished map.
        polygons: Polygons and multi-polygons in any CRS. They may reach beyond the map: `known_fraction` tells.
        gap_below_m: Canopy lower than this is open, metres.
        least_gap_m2: Least area of a gap, square metres.
        prefix: Put before the names of the new columns.
        progress: Called with the number of polygons done and of all.

    Raises:
        AnalysisError: no polygons, or one that is none (the message names its row); no CRS; a column of that name exists.
        RasterError: the map cannot be read.
    """
    refuse_clashes(polygons, prefix)
    rows: list[dict[str, float]] = [{}] * len(polygons)
    for done, (row, zone) in enumerate(zones(folder, polygons, gap_below_m=gap_below_m, least_gap_m2=least_gap_m2), start=1):
        rows[row] = zone.statistics(folder.blocks)
        if progress is not None:
            progress(done, len(polygons))
    columns = pd.DataFrame(rows, columns=[*COLUMNS], dtype=np.float64).add_prefix(prefix)
    return pd.concat([polygons.reset_index(drop=True), columns], axis=1)


def zones(
    folder: RegionFolder,
    polygons: geopandas.GeoDataFrame,
    *,
    gap_below_m: float = GAP_BELOW_M,
    least_gap_m2: float = LEAST_GAP_M2,
) -> Iterator[tuple[int, Zone]]:
    """(row, sums) of every polygon, neighbours after each other, so that blocks of the map are decoded few times.

    Arguments and errors as for `zonal_statistics`.
    """
    checked_gap(gap_below_m, least_gap_m2)
    with open_surfaces(folder) as surfaces:
        projected = project(polygons, surfaces.grid.crs)
        in_px = in_pixels(projected, surfaces.grid)
        halo = halo_px(least_gap_m2, surfaces.pixel_m2)
        for row in _spatial_order(in_px, surfaces.grid.shape):
            polygon = in_px[row]
            zone = Zone(area_m2=float(shapely.area(polygon)) * surfaces.pixel_m2, pixel_m2=surfaces.pixel_m2)
            shapely.prepare(polygon)
            for box in _windows(polygon, surfaces.grid.shape):
                wide = Box(box.row0 - halo, box.col0 - halo, box.row1 + halo, box.col1 + halo)
                reading = surfaces.start(wide)
                weight, around = covered(polygon, box), reading()
                gap = tuple(
                    gaps(surface, below_m=gap_below_m, least_m2=least_gap_m2, pixel_m2=surfaces.pixel_m2)
                    for surface in (around.height_m, around.upper_m, around.lower_m)
                )
                inner = box.slices_in(wide)
                zone.add(around.part(inner), weight, tuple(each[inner] for each in gap))
            yield row, zone


def _windows(polygon: Any, shape: tuple[int, int]) -> Iterator[Box]:
    """The parts of the map in which a polygon is summed; each pixel that it touches in one of them."""
    left, bottom, right, top = shapely.bounds(polygon)
    row0, col0 = max(math.floor(-top), 0), max(math.floor(left), 0)
    row1, col1 = min(math.ceil(-bottom), shape[0]), min(math.ceil(right), shape[1])
    if row0 >= row1 or col0 >= col1:
        return
    if (row1 - row0) * (col1 - col0) <= 2 * WINDOW_PX**2:
        yield Box(row0, col0, row1, col1)
        return
    for row in range(row0 // WINDOW_PX * WINDOW_PX, row1, WINDOW_PX):
        for col in range(col0 // WINDOW_PX * WINDOW_PX, col1, WINDOW_PX):
            box = Box(max(row, row0), max(col, col0), min(row + WINDOW_PX, row1), min(col + WINDOW_PX, col1))
            if shapely.intersects(polygon, shapely.box(box.col0, -box.row1, box.col1, -box.row0)):
                yield box


def _spatial_order(in_px: NDArray[Any], shape: tuple[int, int]) -> list[int]:
    """Rows of blocks from the top, to and fro: what two neighbours share is still decoded."""
    left, bottom, right, top = shapely.bounds(in_px).T
    row, col = (-(top + bottom) / 2).clip(0, shape[0]), ((left + right) / 2).clip(0, shape[1])
    band = (row // WINDOW_PX).astype(np.int64)
    along = np.where(band % 2 == 0, col, -col)
    return [int(i) for i in np.lexsort((along, band))]


def project(polygons: geopandas.GeoDataFrame, crs: CRS) -> NDArray[Any]:
    """The polygons in the map's CRS.

    Raises:
        AnalysisError: there is none, no CRS, or one of them is no valid polygon as given or in that CRS.
    """
    if polygons.empty:
        raise AnalysisError("there is no polygon; give a layer with at least one")
    if polygons.crs is None:
        raise AnalysisError("the polygons have no CRS; assign the right one first")
    shapes = polygons.geometry.reset_index(drop=True)
    _refuse(shapes.isna() | shapes.is_empty, "is empty; delete it")
    others = ~shapes.geom_type.isin(["Polygon", "MultiPolygon"])
    _refuse(others, lambda row: f"is a {shapes.geom_type[row]}; give polygons only")
    _refuse(~shapes.is_valid, lambda row: f"is invalid ({shapely.is_valid_reason(shapes[row])}); repair its geometry first")
    shapes = shapes.force_2d()
    if CRS.from_user_input(shapes.crs) != crs:
        # A straight line in one CRS is a curve in another: between points 100 m apart the two differ by millimetres.
        extent = float(np.nanmax(shapes.bounds[["maxx", "maxy"]].to_numpy() - shapes.bounds[["minx", "miny"]].to_numpy()))
        step = 0.001 if shapes.crs.is_geographic else 100.0 / shapes.crs.axis_info[0].unit_conversion_factor
        shapes = shapes.segmentize(max(step, extent / 1000)).to_crs(crs)
    bounds = shapes.bounds.to_numpy()
    _refuse(
        pd.Series(~np.isfinite(bounds).all(axis=1)), f"reaches outside the domain of {crs.name!r}, the map's CRS; cut it"
    )
    _refuse(~shapes.is_valid, lambda row: f"is invalid in the map's CRS ({shapely.is_valid_reason(shapes[row])}); repair it")
    return np.asarray(shapes.array)


def _refuse(wrong: pd.Series, reason: str | Callable[[int], str]) -> None:
    if wrong.any():
        rows = np.flatnonzero(wrong.to_numpy())
        text = reason if isinstance(reason, str) else reason(int(rows[0]))
        more = f" ({len(rows) - 1} more: rows {', '.join(str(r) for r in rows[1:6])}{', …' if len(rows) > 6 else ''})"
        raise AnalysisError(f"the polygon in row {rows[0]} (from 0) {text}{more if len(rows) > 1 else ''}")


def refuse_clashes(polygons: geopandas.GeoDataFrame, prefix: str) -> None:
    """Refuse to put a column in the place of one that is there; GeoPackages do not tell capitals from small letters.

    Raises:
        AnalysisError: there is one.
    """
    there = {str(name).lower(): name for name in polygons.columns}
    for name in COLUMNS:
        if (found := there.get(f"{prefix}{name}".lower())) is not None:
            raise AnalysisError(
                f"the polygons have a column {found!r} already; choose another --prefix or rename the column"
            )


# --- the command -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class ZonalSummary:
    """What was written, and what is missing in it."""

    table: Path
    polygons: int
    outside: int
    """Polygons of which the map knows nothing."""
    partly: int
    """Polygons of which the map knows a part."""
    without_bounds: int
    """Polygons that are known, the errors of which are not."""
    without_mean_interval: int
    """Polygons whose bounds are known, but for those of the mean."""

    def as_json(self) -> dict[str, Any]:
        """As a table, with what the columns are."""
        return {**asdict(self), "table": str(self.table), "columns": dict(COLUMNS)}

    def lines(self) -> Iterator[str]:
        """What to tell people."""
        yield f"{self.table}: {self.polygons} polygons"
        if self.outside or self.partly:
            yield f"of {self.outside} the map knows nothing, of {self.partly} a part: see known_fraction"
        if self.without_bounds:
            yield (
                f"{self.without_bounds} lie on ground whose heights have no error (an uncalibrated map, or error.tif is not "
                f"there): their bounds are empty"
            )
        if self.without_mean_interval:
            yield f"the errors of {self.without_mean_interval} means were not measured for this model: they are empty"


def write_zonal(
    folder: Path,
    polygons: Path,
    out: Path,
    *,
    layer: str | None = None,
    gap_below_m: float = GAP_BELOW_M,
    least_gap_m2: float = LEAST_GAP_M2,
    prefix: str = "",
    overwrite: bool = False,
    progress: Progress | None = None,
) -> ZonalSummary:
    """The table of `zonal_statistics` as a file.

    Args:
        folder: Of a finished map.
        polygons: As `read_table` takes it.
        out: As `write_table` takes it.
        layer: Of `polygons`.
        gap_below_m: As `zonal_statistics`.
        least_gap_m2: As `zonal_statistics`.
        prefix: As `zonal_statistics`.
        overwrite: Replace a file.
        progress: As `zonal_statistics`.

    Raises:
        AnalysisError: as `zonal_statistics`, `read_table` and `check_out`.
        OutputError: as `check_out` and `write_table`, or there is no finished map.
        RasterError: the map cannot be read.
    """
    check_out(out, overwrite=overwrite)
    found = RegionFolder.open(folder)
    frame = zonal_statistics(
        found, read_table(polygons, layer), gap_below_m=gap_below_m, least_gap_m2=least_gap_m2, prefix=prefix,
        progress=progress,
    )  # fmt: skip
    write_table(frame, out, ZONES)
    known, bounded, mean = (frame[f"{prefix}{name}"] for name in ("known_fraction", "p50_lower_90_m", "mean_lower_90_m"))
    return ZonalSummary(
        table=out,
        polygons=len(frame),
        outside=int((known == 0).sum()),
        partly=int(((known > 0) & (known < 1 - 1e-6)).sum()),
        without_bounds=int(((known > 0) & bounded.isna()).sum()),
        without_mean_interval=int((bounded.notna() & mean.isna()).sum()),
    )

"""Reference heights of footprints on the ground, and what a height map says within each of them.

A reference such as a GEDI shot, an ICESat-2 segment or a field plot is not a pixel: it is one statistic of all the canopy
within a footprint of tens of metres. The map is therefore asked for the same statistic of its pixels within the same
footprint, those whose centre lies in it. Which one is part of the reference: `Shots.statistic`.

Distances are metres on the ground, on the ellipsoid of the map's CRS: neither the scale of a projection nor feet nor degrees
of longitude change which pixels lie within 12 m of a shot.

Intervals. A map's pixels come with bounds that hold each pixel's height in 90 % of the cases. Nothing follows from them
about a percentile of many pixels: the 98th percentile of the upper bounds would be its upper bound if all the pixels were
inside theirs at once, and lies far above it where errors are independent; how far depends on how alike the errors of
neighbours are, which a map of pixel bounds does not say. So a result here has no interval and no coverage; those are
measured pixel by pixel, against a reference that has pixels.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np
from numpy.typing import ArrayLike, NDArray
from pyproj import CRS, Transformer

from canopy.errors import SourceError
from canopy.grid import Grid
from canopy.metrics import CLASS_EDGES_M, ClassSums, HeightSums, by_class
from canopy.raster import Raster, open_raster
from canopy.tiler.heights import band_unit_m

if TYPE_CHECKING:
    import geopandas

WGS84: Final = CRS.from_epsg(4326)

COMPARED: Final = "compared"
OUTSIDE: Final = "outside the map"
EDGE: Final = "over the edge of the map"
UNKNOWN: Final = "height unknown in the map"
TOO_SMALL: Final = "no pixel centre inside"
OTHER: Final = "not compared in the other map"
OUTCOMES: Final = (COMPARED, OUTSIDE, EDGE, UNKNOWN, TOO_SMALL, OTHER)
"""What can become of a shot; all but the first are reasons why it is in no score."""

LEAST_KNOWN: Final = 0.9
"""Default of the least share of a footprint whose height the map must know."""

BLOCK_M: Final = 1000.0
"""Default side of the squares of ground that are resampled together: the errors of shots along one track are alike."""

MAX_REACH_M: Final = 500.0
"""No footprint reaches further from its centre: what does is an area, and its pixels would not fit the memory."""

_TILE_PX: Final = 1024
"""Shots whose centres lie in one tile of so many pixels share one reading of the map."""

_DEGREE_M: Final = 111_195.0
"""A degree of latitude on the sphere; squares of ground need no better."""


_COLUMNS: Final = ("x", "y", "height_m", "radius_m", "half_length_m", "azimuth_deg", "date", "id", "track")


# --- the reference -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Shots:
    """Footprints with a reference height; arrays are (shot,).

    A footprint is all ground within `radius_m` of a line of `2 * half_length_m` through its centre, in the direction
    `azimuth_deg`: a disc where the line has no length.
    """

    source: str
    """What the heights are, for reports: `GEDI L2A RH98`."""
    statistic: str
    """What of the map's pixels in a footprint to compare with: `max`, `mean`, or a percentile such as `p98`."""
    crs: CRS
    """CRS of `x` and `y`."""
    x: NDArray[np.float64]
    """Centres: easting or longitude."""
    y: NDArray[np.float64]
    """Centres: northing or latitude."""
    height_m: NDArray[np.float64]
    """Reference heights, finite."""
    radius_m: NDArray[np.float64]
    half_length_m: NDArray[np.float64]
    """0 for a disc."""
    azimuth_deg: NDArray[np.float64]
    """Of the line, clockwise from north; of no meaning for a disc."""
    date: NDArray[np.datetime64]
    """Days (UTC); NaT where unknown."""
    id: NDArray[np.str_]
    track: NDArray[np.intp]
    """Index in `tracks`: neighbours on one track were measured seconds apart by one beam."""
    tracks: tuple[str, ...]
    """Names of the tracks, `granule/beam`, or of the file of field plots."""
    read: int
    """Shots in the files, before any filter."""
    dropped: Mapping[str, int]
    """Shots that each filter took away, in the order applied; each shot is counted once."""
    notes: tuple[str, ...] = ()
    """What a reader of the score must know: fields that the files lack, unknown flags."""

    def __post_init__(self) -> None:
        check_statistic(self.statistic)
        count = len(self.height_m)
        shapes = {name: getattr(self, name).shape for name in _COLUMNS}
        assert set(shapes.values()) == {(count,)}, f"columns of shapes {shapes}, not {count}"
        assert np.isfinite(self.height_m).all(), "a reference height is not finite"
        reach_m = self.radius_m + self.half_length_m
        assert bool((self.radius_m > 0).all() and (reach_m <= MAX_REACH_M).all()), "a footprint's size is out of range"
        assert self.read == count + sum(self.dropped.values()), f"{self.read} read, {count} kept, dropped {self.dropped}"

    def __len__(self) -> int:
        return len(self.height_m)

    @property
    def lonlat_deg(self) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Longitudes and latitudes of the centres (WGS 84)."""
        lon, lat = Transformer.from_crs(self.crs, WGS84, always_xy=True).transform(self.x, self.y)
        return np.asarray(lon), np.asarray(lat)

    @property
    def shape(self) -> str:
        """What of the ground a footprint is, in words."""
        if not len(self):
            return "none"
        radii, lengths = np.unique(self.radius_m), np.unique(2 * self.half_length_m)
        radius = " to ".join(f"{value:g}" for value in sorted({radii[0], radii[-1]}))
        if not lengths.any():
            return f"disc of {radius} m radius"
        length = " to ".join(f"{value:g}" for value in sorted({lengths[0], lengths[-1]}))
        return f"all within {radius} m of a line of {length} m along the track"

    def without(self, reason: str, drop: NDArray[np.bool_]) -> Shots:
        """The shots but those to drop, which are counted under `reason`, as one more filter."""
        counts = {**self.dropped, reason: self.dropped.get(reason, 0) + int(drop.sum())}
        return replace(self, dropped=counts, **{name: getattr(self, name)[~drop] for name in _COLUMNS})

    def part(self, index: NDArray[np.intp]) -> Shots:
        """Some of the shots as a reference of their own, with an account of its own."""
        columns = {name: getattr(self, name)[index] for name in _COLUMNS}
        return replace(self, read=len(index), dropped={}, **columns)

    def account(self) -> str:
        """How many shots there were and what became of them, in one line."""
        return _account(self.read, self.dropped, f"{len(self):,} left")


def _account(read: int, dropped: Mapping[str, int], rest: str) -> str:
    lost = ", ".join(f"{count:,} {reason}" for reason, count in dropped.items() if count)
    return f"of {read:,} shots: {lost}; {rest}" if lost else f"of {read:,} shots: {rest}"


def check_statistic(name: str) -> None:
    """Refuse the name of a statistic that there is not.

    Raises:
        SourceError: neither max nor mean nor a percentile p0 to p100.
    """
    if name in ("max", "mean"):
        return
    if not re.fullmatch(r"p\d{1,3}(\.\d+)?", name) or float(name[1:]) > 100:
        raise SourceError(f"statistic {name!r} is not known; give max, mean, or a percentile from p0 to p100, such as p98")


def statistic_name(statistic: str) -> str:
    """A statistic in words: `98th percentile`, `maximum`."""
    if statistic in ("max", "mean"):
        return {"max": "maximum", "mean": "mean"}[statistic]
    number = f"{float(statistic[1:]):g}"
    ending = "th" if number[-2:] in ("11", "12", "13") else {"1": "st", "2": "nd", "3": "rd"}.get(number[-1], "th")
    return f"{number}{ending} percentile"


def statistic_of(heights_m: NDArray[Any], statistic: str) -> float:
    """The statistic of at least one height; percentiles interpolate linearly between neighbours (NumPy's `linear`)."""
    if statistic == "max":
        return float(heights_m.max())
    if statistic == "mean":
        return float(heights_m.mean(dtype=np.float64))
    return float(np.percentile(heights_m.astype(np.float64), float(statistic[1:]), method="linear"))


# --- the comparison ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class FootprintResult:
    """What a map says in each footprint; arrays are (shot,), in the order of `shots`."""

    shots: Shots
    map_m: NDArray[np.float64]
    """`shots.statistic` of the map's pixels in the footprint; NaN unless the outcome is `COMPARED`."""
    known_share: NDArray[np.float64]
    """Share of the footprint's pixels whose height the map knows; what lies beyond the map's edge is unknown."""
    pixels: NDArray[np.int64]
    """How many pixels that is: with a handful, any high percentile is the maximum."""
    outcome: NDArray[np.int8]
    """Index in `OUTCOMES`."""
    least_known: float
    """Share of a footprint that had to be known."""

    @property
    def compared(self) -> NDArray[np.bool_]:
        """Which shots are in the scores."""
        return np.asarray(self.outcome == OUTCOMES.index(COMPARED))

    @property
    def dropped(self) -> dict[str, int]:
        """Shots that are in no score, by reason: first the filters of the reference in their order, then the map."""
        counts = np.bincount(self.outcome, minlength=len(OUTCOMES))
        return {**self.shots.dropped, **{OUTCOMES[k]: int(counts[k]) for k in range(1, len(OUTCOMES))}}

    @property
    def error_m(self) -> NDArray[np.float64]:
        """Map minus reference; NaN where not compared."""
        return self.map_m - self.shots.height_m

    def account(self) -> str:
        """How many shots there were and what became of them, in one line."""
        return _account(self.shots.read, self.dropped, f"{int(self.compared.sum()):,} compared")

    @property
    def _counting(self) -> NDArray[np.bool_]:
        # A map that abstains inside its own extent lacks a height that it could have; beyond its edge it promises none.
        return np.asarray(self.compared | (self.outcome == OUTCOMES.index(UNKNOWN)))

    def heights(self) -> HeightSums:
        """The sums over the compared shots; shots where the map knows too little are in `n_missing`."""
        return HeightSums.of(self.map_m, self.shots.height_m, self._counting)

    def classes(self, edges_m: Sequence[float] = CLASS_EDGES_M) -> ClassSums:
        """The sums in classes of reference height."""
        return by_class(self.map_m, self.shots.height_m, edges_m, self._counting)

    def block_index(self, side_m: float = BLOCK_M) -> NDArray[np.int64]:
        """(shot, 2): row and column of the square of ground in which each shot lies.

        The squares are those of a sinusoidal grid on the globe, so they do not depend on the map or its CRS.
        """
        assert side_m > 0, f"blocks of {side_m} m"
        lon, lat = self.shots.lonlat_deg
        row = np.floor(lat * _DEGREE_M / side_m)
        middle_deg = (row + 0.5) * side_m / _DEGREE_M
        col = np.floor(lon * np.cos(np.radians(middle_deg)) * _DEGREE_M / side_m)
        return np.stack([row, col], axis=1).astype(np.int64)

    def blocks(self, side_m: float = BLOCK_M) -> list[HeightSums]:
        """The sums of each square of ground with a shot that counts, for `canopy.metrics.block_bootstrap`."""
        counting = self._counting
        if not counting.any():
            return []
        _, place = np.unique(self.block_index(side_m)[counting], axis=0, return_inverse=True)
        order = np.argsort(place, kind="stable")
        parts = np.split(order, np.flatnonzero(np.diff(place[order])) + 1)
        map_m, reference_m = self.map_m[counting], self.shots.height_m[counting]
        return [HeightSums.of(map_m[part], reference_m[part]) for part in parts]

    def table(self) -> geopandas.GeoDataFrame:
        """One row a shot, its centre as a point in longitude and latitude, for writing out and for plots."""
        import geopandas

        shots = self.shots
        lon, lat = shots.lonlat_deg
        columns = {
            "id": shots.id,
            "track": np.array(shots.tracks)[shots.track] if len(shots) else np.zeros(0, dtype="U1"),
            "date": shots.date.astype("datetime64[s]"),
            "reference_m": shots.height_m,
            f"map_{shots.statistic}_m": self.map_m,
            "error_m": self.error_m,
            "known_share": self.known_share,
            "pixels": self.pixels,
            "outcome": np.array(OUTCOMES)[self.outcome],
        }
        return geopandas.GeoDataFrame(columns, geometry=geopandas.points_from_xy(lon, lat), crs=WGS84)


def on_same_shots(*results: FootprintResult) -> tuple[FootprintResult, ...]:
    """The results of several maps, with the shots that all of them have, for a comparison side by side.

    Args:
        results: Of the same shots.
    """
    assert results, "no result"
    assert all(result.shots is results[0].shots for result in results), "results of different shots"
    everywhere = np.logical_and.reduce([result.compared for result in results])
    narrowed = []
    for result in results:
        lost = result.compared & ~everywhere
        outcome = np.where(lost, np.int8(OUTCOMES.index(OTHER)), result.outcome)
        narrowed.append(replace(result, outcome=outcome, map_m=np.where(lost, np.nan, result.map_m)))
    return tuple(narrowed)


# --- reading the map -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Places:
    """Where the footprints lie among the map's pixels."""

    cols: NDArray[np.float64]
    rows: NDArray[np.float64]
    """(shift, shot): centres in pixel coordinates: 0 is the first pixel's outer edge."""
    ground_m: NDArray[np.float64]
    """(shot, 2, 2): metres across and along the footprint's line for one pixel to the right and one down."""
    reach_px: NDArray[np.float64]
    """(shot, 2): how far a footprint reaches to both sides of its centre, in columns and rows."""


def map_bounds_deg(height: Path, margin_m: float = MAX_REACH_M) -> tuple[float, float, float, float]:
    """(west, south, east, north) of a map with a margin, to read only the shots near it; east may be beyond 180.

    Raises:
        RasterError: the map cannot be read, or has no CRS.
    """
    with open_raster(height) as raster:
        grid = raster.grid
    west, south, east, north = Transformer.from_crs(grid.crs, WGS84, always_xy=True).transform_bounds(
        *grid.bounds, densify_pts=21
    )
    east += 360 if east < west else 0  # across the antimeridian
    high = margin_m / _DEGREE_M
    wide = high / max(0.01, math.cos(math.radians(max(abs(south), abs(north)))))
    return max(-180.0, west - wide), max(-90.0, south - high), east + wide, min(90.0, north + high)


def sample_footprints(
    height: Path,
    shots: Shots,
    *,
    least_known: float = LEAST_KNOWN,
    height_unit_m: float | None = None,
    east_m: ArrayLike = 0.0,
    north_m: ArrayLike = 0.0,
) -> FootprintResult:
    """Ask a map for the statistic of its pixels in each footprint.

    Only windows around the shots are read, tile by tile, so memory does not grow with the map.

    Args:
        height: The map, a raster in any CRS whose first band holds the heights; many sheets as their VRT.
        shots: The footprints.
        least_known: Share of a footprint's pixels whose height must be known; the others are counted with the reason.
        height_unit_m: Metres per unit of the map's values, in place of what the file says.
        east_m: Moves the footprints east by so many metres on the ground: one number, or one a shot.
        north_m: Likewise north.

    Raises:
        SourceError: `least_known` is not above 0 and at most 1.
        RasterError: the map cannot be read, has no CRS, or the unit of its values is not known.
    """
    (result,) = sample_shifted(height, shots, [(east_m, north_m)], least_known=least_known, height_unit_m=height_unit_m)
    return result


def sample_shifted(
    height: Path,
    shots: Shots,
    shifts_m: Sequence[tuple[ArrayLike, ArrayLike]],
    *,
    least_known: float = LEAST_KNOWN,
    height_unit_m: float | None = None,
) -> list[FootprintResult]:
    """`sample_footprints` with the footprints moved in several ways; the map is read once for all of them.

    Args:
        height: As there.
        shots: As there.
        shifts_m: Metres east and north on the ground, each one number or one a shot.
        least_known: As there.
        height_unit_m: As there.

    Returns:
        One result a shift.

    Raises:
        SourceError: as `sample_footprints`.
        RasterError: as `sample_footprints`.
    """
    if not 0 < least_known <= 1:
        raise SourceError(f"least known share {least_known} is not above 0 and at most 1; 0.9 is usual")
    table = (len(shifts_m), len(shots))
    map_m, known_share = np.full(table, np.nan), np.zeros(table)
    pixels, outcome = np.zeros(table, dtype=np.int64), np.full(table, OUTCOMES.index(OUTSIDE), dtype=np.int8)
    with open_raster(height) as raster:
        unit_m = band_unit_m(raster, height_unit_m)
        places = _places(raster.grid, shots, shifts_m)
        for tile in _tiles(places, raster.shape):
            for at, heights, overhangs, total in _footprints(raster, places, shots, tile):
                pixels[at] = heights.size
                if not total:
                    outcome[at] = OUTCOMES.index(TOO_SMALL)
                    continue
                known_share[at] = heights.size / total
                if known_share[at] < least_known:
                    outcome[at] = OUTCOMES.index(EDGE if overhangs else UNKNOWN)
                    continue
                map_m[at] = statistic_of(heights, shots.statistic) * unit_m
                outcome[at] = OUTCOMES.index(COMPARED)
    return [
        FootprintResult(
            shots=shots,
            map_m=map_m[k],
            known_share=known_share[k],
            pixels=pixels[k],
            outcome=outcome[k],
            least_known=least_known,
        )
        for k in range(len(shifts_m))
    ]


def _places(grid: Grid, shots: Shots, shifts_m: Sequence[tuple[ArrayLike, ArrayLike]]) -> _Places:
    x, y = Transformer.from_crs(shots.crs, grid.crs, always_xy=True).transform(shots.x, shots.y)
    with np.errstate(invalid="ignore", divide="ignore"):
        col, row = grid.pixel(np.asarray(x), np.asarray(y))
        east_north = _ground_m(grid, col, row)
        # From metres to pixels: the inverse of each 2 x 2 matrix, written out so that shots outside the CRS stay NaN.
        (a, b), (c, d) = east_north.transpose(1, 2, 0)
        inverse = np.array([[d, -b], [-c, a]]) / (a * d - b * c)
        reach_px = np.hypot(inverse[:, 0], inverse[:, 1]).T * (shots.radius_m + shots.half_length_m)[:, None]
        steps = [np.broadcast_to(np.asarray(east_m, np.float64), col.shape) for east_m, _ in shifts_m]
        climbs = [np.broadcast_to(np.asarray(north_m, np.float64), col.shape) for _, north_m in shifts_m]
        cols, rows = (
            at + inverse[axis, 0] * np.array(steps) + inverse[axis, 1] * np.array(climbs)
            for axis, at in enumerate((col, row))
        )
    sine, cosine = np.sin(np.radians(shots.azimuth_deg)), np.cos(np.radians(shots.azimuth_deg))
    turn = np.array([[cosine, -sine], [sine, cosine]]).transpose(2, 0, 1)
    return _Places(cols=cols, rows=rows, ground_m=turn @ east_north, reach_px=reach_px)


def _ground_m(grid: Grid, col: NDArray[np.float64], row: NDArray[np.float64]) -> NDArray[np.float64]:
    """(shot, 2, 2): metres east and north on the ellipsoid for one pixel to the right and one down.

    By differences over two pixels, which holds for any CRS in any unit, and for grids that are turned; over the tens of
    metres of a footprint no CRS is anything but linear. Shots that the CRS does not reach become NaN, with NumPy's warnings.
    """
    geodetic = grid.crs.geodetic_crs
    assert geodetic is not None, f"CRS {grid.crs.name} has no geodetic CRS"
    to_degrees = Transformer.from_crs(grid.crs, geodetic, always_xy=True)
    radians = geodetic.axis_info[0].unit_conversion_factor
    ellipsoid = geodetic.ellipsoid
    assert ellipsoid is not None, f"CRS {geodetic.name} has no ellipsoid"
    major, minor = ellipsoid.semi_major_metre, ellipsoid.semi_minor_metre
    squeeze = 1 - (minor / major) ** 2

    columns = []
    for dcol, drow in ((1.0, 0.0), (0.0, 1.0)):
        lon0, lat0 = (np.asarray(v) * radians for v in to_degrees.transform(*grid.xy(col - dcol, row - drow)))
        lon1, lat1 = (np.asarray(v) * radians for v in to_degrees.transform(*grid.xy(col + dcol, row + drow)))
        lat = (lat0 + lat1) / 2
        width = 1 - squeeze * np.sin(lat) ** 2
        across = (lon1 - lon0 + np.pi) % (2 * np.pi) - np.pi  # the antimeridian is between two pixels
        east = across / 2 * major / np.sqrt(width) * np.cos(lat)
        north = (lat1 - lat0) / 2 * major * (1 - squeeze) / width**1.5
        columns.append(np.stack([east, north], axis=1))
    return np.stack(columns, axis=2)


def _tiles(places: _Places, shape: tuple[int, int]) -> Iterator[NDArray[np.intp]]:
    """The shots that may touch the map, tile by tile of their centres."""
    rows, cols = shape
    reach_cols, reach_rows = places.reach_px.T
    with np.errstate(invalid="ignore"):
        near = (places.cols + reach_cols > 0) & (places.cols - reach_cols < cols)
        near &= (places.rows + reach_rows > 0) & (places.rows - reach_rows < rows)
    shots = np.flatnonzero(near.any(axis=0))
    if not shots.size:
        return
    tile = np.stack([places.rows[0, shots] // _TILE_PX, places.cols[0, shots] // _TILE_PX])
    order = np.lexsort(tile[::-1])
    ends = np.flatnonzero((np.diff(tile[:, order], axis=1) != 0).any(axis=0)) + 1
    yield from np.split(shots[order], ends)


def _footprints(
    raster: Raster, places: _Places, shots: Shots, tile: NDArray[np.intp]
) -> Iterator[tuple[tuple[int, int], NDArray[Any], bool, int]]:
    """Of a tile's shots: (shift, shot), the known heights in the footprint, whether it leaves the map, all its pixels."""
    reach = places.reach_px[tile, ::-1].T[:, None]
    middle = np.stack([places.rows[:, tile], places.cols[:, tile]])
    first, last = np.floor(middle - reach).astype(np.int64), np.ceil(middle + reach).astype(np.int64)
    (row0, col0), (row1, col1) = first.min(axis=(1, 2)), last.max(axis=(1, 2))
    window = raster.read(int(row0), int(col0), (int(row1 - row0), int(col1 - col0)), (1,))
    heights, valid = window.data[0], window.valid
    rows, cols = raster.shape
    for shift, place in np.ndindex(first.shape[1:]):
        shot = int(tile[place])
        (top, left), (bottom, right) = first[:, shift, place], last[:, shift, place]
        down = np.arange(top, bottom) + 0.5 - places.rows[shift, shot]
        along = np.arange(left, right) + 0.5 - places.cols[shift, shot]
        to_right, to_bottom = places.ground_m[shot].T
        # (row, col): metres across the footprint's line, and along it beyond its end.
        across_m = to_right[0] * along + to_bottom[0] * down[:, None]
        beyond_m = np.maximum(np.abs(to_right[1] * along + to_bottom[1] * down[:, None]) - shots.half_length_m[shot], 0.0)
        inside = across_m**2 + beyond_m**2 <= shots.radius_m[shot] ** 2
        part = (slice(top - row0, bottom - row0), slice(left - col0, right - col0))
        hit_rows, hit_cols = np.flatnonzero(inside.any(axis=1)) + top, np.flatnonzero(inside.any(axis=0)) + left
        total = int(inside.sum())
        overhangs = bool(total and (hit_rows[0] < 0 or hit_rows[-1] >= rows or hit_cols[0] < 0 or hit_cols[-1] >= cols))
        yield (shift, shot), heights[part][inside & valid[part]], overhangs, total

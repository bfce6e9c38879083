"""From a point cloud to a canopy height model: points -> heights above ground -> the canopy per pixel.

Two passes over the points. The first finds the ground and the cubes of space in which points are alone; the second takes
every point's height above that ground and raises its pixel, or, for `pitfree`, keeps the highest first return per cell,
between which triangles are stretched. Points arrive in chunks and only grids are held, so memory follows the grid and not
the cloud. Points are kept between the passes up to a fixed number, which saves small clouds the second decoding; the
result is the same either way. It does not depend, to the last bit, on the order of files and points, on how a cloud is cut
into files, or on points that several files have in common (but for their density).

Units. x and y are in the unit of the cloud's CRS and are reprojected to the grid's; they are rounded to 2^-14 of it (0.06
mm), so that files of one survey agree whatever scale and offset each stores them with. z is in the unit that
`canopy.tiler.points.z_unit_m_of` finds. A shift between vertical datums moves ground and canopy alike and so does not
matter here.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import date, datetime, timedelta
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

import numpy as np
from affine import Affine
from numpy.typing import NDArray
from pyproj import CRS, Transformer
from pyproj.exceptions import ProjError
from scipy import ndimage

from canopy.errors import LidarError, NoPointsError
from canopy.grid import Grid
from canopy.tiler.ground import (
    MARGIN_M,
    MAX_BELOW_GROUND_M,
    GroundCells,
    Surface,
    centred,
    farther_than,
    low_noise,
    membrane,
    morphological_ground,
    plane,
)
from canopy.tiler.points import PointSource, crs_of, horizontal, point_sources, unbound, z_unit_m_of
from canopy.tiler.tin import (
    TILE_M,
    Bounds,
    Floats,
    TiledTin,
    compiled,
    delaunay,
    inside,
    longest_edge,
    one_per_place,
    raise_to_triangles,
    snapped,
    tiles_over,
    union,
    widened,
)
from canopy.tiler.voxels import Voxels

if TYPE_CHECKING:
    import xarray

GROUND_CLASSES = (2, 9)
"""ASPRS classes ground and water: the surface that heights are counted from."""
NOISE_CLASSES = (7, 18)
"""ASPRS classes low and high noise."""
BUILDING_CLASSES = (6,)
"""ASPRS class building."""
NON_VEGETATION_CLASSES = (6, 17, 64, 65, 66)
"""Buildings (6), bridges (17) and what producers put into 64-66 (structures, artefacts, virtual points)."""

MIN_GROUND_SHARE = 0.005
"""With `ground="auto"`, classes are believed when at least this share of the points is ground; dense tropical canopy lets
1-5 % through, whereas a handful of stray class codes in an unclassified cloud is far below."""
MAX_TOO_HIGH_SHARE = 0.01
"""Were more of the returns above `max_height_m`, the unit of z would be wrong, or the ground: refused."""
MAX_PLACEMENT_ERROR_M = 1e-3
"""Largest error of interpolated instead of computed map coordinates; LiDAR itself is good to some 0.1 m."""
PITFREE_BUFFER_M = 16.0
"""How far around its tile the vertices of a pit-free triangulation reach, several times its longest edge."""

GPS_EPOCH = datetime(1980, 1, 6)  # noqa: DTZ001 - UTC throughout
GPS_LEAP_S = 18
"""By which GPS time is ahead of UTC since 2017, and 1-5 s less in the years of airborne LiDAR before: enough for a day."""

_IS_GROUND, _IS_BUILDING, _IS_WANTED, _IS_EXCLUDED, _IS_NOISE = 1, 2, 4, 8, 16


@dataclass(frozen=True, slots=True, kw_only=True)
class LidarOptions:
    """How points become heights; the defaults suit airborne clouds of 2-60 points per m² in metres above some datum."""

    crs: CRS | None = None
    """CRS of the points, in place of what the headers say; needed where they say nothing."""
    z_unit_m: float | None = None
    """Metres per unit of z, in place of the rule in `canopy.tiler.points.z_unit_m_of`."""
    normalised: bool = False
    """z is a height above ground already."""
    drop_classes: tuple[int, ...] = NOISE_CLASSES
    """ASPRS classes left out; add `NON_VEGETATION_CLASSES` for canopy without buildings (their pixels become void)."""
    drop_overlap: bool = False
    """Leave out what the producer flags as overlap between flight lines."""
    returns: Literal["auto", "all", "first", "last"] = "auto"
    """Which returns of a pulse make the canopy; "auto" is all for p2r and first for pitfree. The ground uses all."""
    spacing_m: float = 0.0
    """Mean distance between points that is close enough, metres; COPC and EPT then leave out their finer levels. 0: all."""
    isolated_points: int = 6
    """Returns are left out (birds, haze, spikes, whatever their class) where the 27 cubes of `isolated_cube_m` around them
    hold no more than this many. 0: none are."""
    isolated_cube_m: float = 5.0
    """Side of these cubes, metres."""
    ground: Literal["auto", "classes", "filter"] = "auto"
    """Where the ground comes from: classes 2 and 9, the morphological filter, or classes where the cloud has them."""
    ground_interpolation: Literal["grid", "tin"] = "grid"
    """Between ground returns: bilinear between means of cells, or linear in the triangles of the returns themselves."""
    ground_cell_m: float = 1.0
    """Cell of the ground lattice, metres."""
    ground_tin_cell_m: float = 0.5
    """The triangulation takes at most one ground return per cell of this side, the one nearest to its centre, metres.
    0: all, and of those in one place the lowest."""
    ground_gap_m: float = 50.0
    """Ground is interpolated up to this distance from a ground return; beyond it is unknown, metres."""
    filter_window_m: float = 40.0
    """Full width of the filter's largest window: wider objects (large halls) stay part of the ground, metres."""
    filter_slope: float = 0.2
    """Rise over run that the filter takes for terrain roughness within a window."""
    max_height_m: float = 100.0
    """Points higher above ground than this are spikes, birds or cloud: dropped and counted, metres."""
    subcircle_m: float = 0.0
    """Radius of the disc that a return stands for, metres; it raises every pixel that the disc touches (p2r), or gives eight
    more vertices on its rim (pitfree). 0: its own place."""
    pitfree_thresholds_m: tuple[float, ...] = (0.0, 2.0, 5.0, 10.0, 15.0)
    """Heights from which up returns are triangulated, one triangulation each, metres; the first is 0."""
    pitfree_max_edge_m: tuple[float, float] = (5.0, 1.5)
    """Triangles with a longer edge are left out, metres: of the first triangulation, where it decides how wide a void is
    closed, and of the others, where it decides how far apart returns of one crown are."""
    fill_holes_px: int = 0
    """Voids of at most this many 4-connected pixels, and not at the grid's edge, are interpolated from around them."""
    void_radius_m: float = 2.5
    """A large void is what a circle of this radius covers that holds no return, metres."""
    chunk_points: int = 250_000
    """Points decoded at a time."""
    keep_points: int = 16_000_000
    """Points kept between the passes (21 bytes each); a larger cloud is decoded twice."""

    def __post_init__(self) -> None:
        for name in (
            "z_unit_m", "ground_cell_m", "ground_gap_m", "filter_window_m", "filter_slope", "max_height_m", "chunk_points",
            "isolated_cube_m", "void_radius_m",
        ):  # fmt: skip
            value = getattr(self, name)
            if value is not None and not (math.isfinite(value) and value > 0):
                raise LidarError(f"{name} = {value} must be a finite number above 0")
        for name in ("subcircle_m", "fill_holes_px", "keep_points", "spacing_m", "isolated_points", "ground_tin_cell_m"):
            if not (math.isfinite(value := getattr(self, name)) and value >= 0):
                raise LidarError(f"{name} = {value} must be 0 or more")
        if clash := set(self.drop_classes) & set(GROUND_CLASSES):
            raise LidarError(f"drop_classes has the ground class {min(clash)}; leave 2 and 9 in, their heights are 0 m")
        for name, known in (
            ("ground", ("auto", "classes", "filter")),
            ("ground_interpolation", ("grid", "tin")),
            ("returns", ("auto", "all", "first", "last")),
        ):
            if getattr(self, name) not in known:
                choices = f"{', '.join(map(repr, known[:-1]))} or {known[-1]!r}"
                raise LidarError(f"{name} = {getattr(self, name)!r} is not known; use {choices}")
        steps = self.pitfree_thresholds_m
        if not steps or steps[0] != 0 or not all(a < b < math.inf for a, b in pairwise(steps)):
            raise LidarError(f"pitfree_thresholds_m = {steps} must begin with 0 and rise, for example (0, 2, 5, 10, 15)")
        edges = self.pitfree_max_edge_m
        if len(edges) != 2 or not all(0 < edge <= PITFREE_BUFFER_M for edge in edges):
            raise LidarError(
                f"pitfree_max_edge_m = {edges} must be two lengths above 0 and at most {PITFREE_BUFFER_M:g}, "
                f"for example (5, 1.5)"
            )


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class LidarLayers:
    """Canopy heights on a grid and what is known about them; all arrays are (row, col)."""

    grid: Grid
    height_m: NDArray[np.float32]
    """Height above ground, metres; NaN is unknown."""
    valid: NDArray[np.bool_]
    """Where the height is known."""
    density_per_m2: NDArray[np.float32]
    """Returns of any class but noise per m² of the pixel, whether they gave a height or not."""
    void: NDArray[np.bool_]
    """In a large void: a circle of `void_radius_m` with no return covers the pixel. Returns beyond the grid count."""
    building_fraction: NDArray[np.float32] | None
    """Share of the pixel's returns that are buildings (class 6), NaN where it has none; None where the cloud has no classes
    other than 0 and 1, noise and ground, so that nothing is known about buildings."""
    class_counts: dict[int, int]
    """Points read per ASPRS class, near the grid."""
    days: tuple[date, date] | None
    """UTC days of the earliest and latest return near the grid; None where a source has no GPS time, or only seconds of an
    unnamed week."""
    facts: dict[str, Any]
    """How the heights were made, and counts: the attributes of `lidar_to_chm`."""


Points = Path | str | Sequence[Path | str]
"""Files, folders, patterns and links as `canopy.tiler.points.point_sources` takes them."""


def lidar_to_chm(
    points: Points,
    grid: Grid,
    algorithm: str = "p2r",
    *,
    options: LidarOptions = LidarOptions(),
) -> xarray.DataArray:
    """Canopy height model of a point cloud on `grid`.

    `p2r` is per pixel the greatest height above ground of any return in it. Ground returns count too, so open ground is
    about 0 m. Pixels without a return are void, NaN: nothing is interpolated but by `options.fill_holes_px`.

    `pitfree` is Khosravipour et al. 2014 (PE&RS 80, 863-872): at each pixel's centre the highest of several surfaces, each
    linear in the Delaunay triangles of the first returns above a threshold. Returns inside a crown then no longer make pits
    in it. Per pixel only the highest first return is a vertex. Triangles with long edges are left out; pixels under none
    are void.

    Heights below 0 m, by noise of ground and return, are set to 0 and counted.

    Args:
        points: one or several sources that together cover the grid, in any order; each in its own CRS.
        grid: any projected grid, metres or feet, not web mercator.
        algorithm: "p2r" or "pitfree".
        options: see `LidarOptions`.

    Returns:
        (y, x) float32 metres, with `x`, `y` at pixel centres and the CRS as rioxarray has them. Attributes: `units`,
        `algorithm`, `ground_method`, `density_per_m2` (points used over the grid's area), `void_fraction`, and the numbers
        `points_read`, `points_used`, `points_dropped_<reason>`, `points_negative_set_to_0`, `pixels_hole_filled`,
        `files_outside` (not read: their header's box misses the grid). The points read are used or dropped, without rest.

    Raises:
        LidarError: a source cannot be read, is without CRS or vertical unit; no point falls on the grid; no ground is
            found; heights are implausible for the unit; an option is out of range or the algorithm is not known.
    """
    layers = lidar_layers(points, grid, algorithm, options=options)
    attrs = {"units": "m", "long_name": "height above ground", **layers.facts}
    return _data_array(layers.height_m, grid, "height", attrs)


def lidar_layers(
    points: Points,
    grid: Grid,
    algorithm: str = "p2r",
    *,
    options: LidarOptions = LidarOptions(),
) -> LidarLayers:
    """Canopy heights of a point cloud on `grid` with the masks and facts that tell where to trust them.

    Args:
        points: as in `lidar_to_chm`.
        grid: as in `lidar_to_chm`.
        algorithm: as in `lidar_to_chm`.
        options: as in `lidar_to_chm`.

    Raises:
        LidarError: as in `lidar_to_chm`.
    """
    if algorithm not in ("p2r", "pitfree"):
        raise LidarError(f"algorithm {algorithm!r} is not known; use 'p2r' or 'pitfree'")
    scene = _Scene(points, grid, options, pitfree=algorithm == "pitfree")
    surface, method, _ = scene.survey()
    canvas = _Canvas(scene)
    counts = np.zeros(len(_FATES), np.int64)
    for chunk in scene.chunks(survey=False):
        height_m = chunk.z_m - surface.under(chunk.x, chunk.y)
        canvas.add(chunk, height_m, counts)
    fate = dict(zip(_FATES, counts.tolist(), strict=True))
    negative, used = fate.pop("negative"), fate.pop("used")
    dropped = {reason: scene.dropped.get(reason, 0) + fate.get(reason, 0) for reason in dict.fromkeys((*_REFUSED, *fate))}
    assert scene.read == used + sum(dropped.values()), f"{scene.read} points read, {used} used, {dropped} do not add up"
    too_high, kept = dropped["above_max_height"], used + dropped["above_max_height"]
    if too_high > MAX_TOO_HIGH_SHARE * kept:
        raise LidarError(
            f"{too_high} of {kept} returns of {scene.names} are more than max_height_m = {options.max_height_m:g} above the "
            f"ground; if z is in feet give option z_unit_m, 0.3048 for feet, else raise max_height_m"
        )
    if not used:
        raise NoPointsError(
            f"none of {scene.read} points of {scene.names} gives a height on the grid ({_told(dropped)}); "
            f"check CRS and extent"
        )
    heights_m, filled = _fill_holes(canvas.height_m(), options.fill_holes_px)
    pixel_m2 = abs(grid.transform.determinant) * scene.metres_per_unit**2
    facts = {
        "algorithm": algorithm,
        "returns": scene.returns,
        "subcircle_m": options.subcircle_m,
        "ground_method": method,
        "density_per_m2": used / (pixel_m2 * heights_m.size),
        "void_fraction": float(np.isnan(heights_m).mean()),
        "points_read": scene.read,
        "points_used": used,
        **{f"points_dropped_{reason}": n for reason, n in dropped.items()},
        "points_negative_set_to_0": negative,
        "pixels_hole_filled": filled,
        "files_outside": scene.files_outside,
    }
    returns, buildings = canvas.cropped(canvas.returns), canvas.cropped(canvas.buildings)
    says_buildings = set(scene.class_counts) - {0, 1, *NOISE_CLASSES, *GROUND_CLASSES}
    share = np.divide(buildings, returns, out=np.full(grid.shape, np.nan, np.float32), where=returns > 0)
    return LidarLayers(
        grid=grid,
        height_m=heights_m,
        valid=np.isfinite(heights_m),
        density_per_m2=(returns / pixel_m2).astype(np.float32),
        void=canvas.large_voids(),
        building_fraction=share if says_buildings else None,
        class_counts=dict(sorted(scene.class_counts.items())),
        days=scene.days,
        facts=facts,
    )


def ground_surface(
    points: Points,
    grid: Grid,
    *,
    options: LidarOptions = LidarOptions(),
) -> xarray.DataArray:
    """Terrain under a point cloud at the pixel centres of `grid`: the surface that `lidar_to_chm` counts heights from.

    On the grid of cells, from classes: the mean of the ground returns of a cell, moved to the cell's centre along the local
    slope. From the filter: the same with the lowest return, so about 0.05 m lower. Between cells bilinear, in gaps a
    membrane. With `ground_interpolation="tin"`: linear in the triangles of the ground returns (or of the lowest returns
    that the filter accepts), and the surface of cells outside their hull.

    Args:
        points: as in `lidar_to_chm`.
        grid: as in `lidar_to_chm`.
        options: as in `lidar_to_chm`; `normalised` makes no sense here and is refused.

    Returns:
        (y, x) float32 metres in the vertical datum of the files, NaN farther than `ground_gap_m` from any ground return.
        Attributes: `units`, `ground_method`, `ground_cells`, and for the filter `cells_low_noise`.

    Raises:
        LidarError: as in `lidar_to_chm`.
    """
    if options.normalised:
        raise LidarError("normalised = True has no ground to return; leave it out for z above a vertical datum")
    surface, method, facts = _Scene(points, grid, options, pitfree=False).survey()
    z_m = np.empty(grid.shape, np.float32)
    cols = np.arange(grid.shape[1]) + 0.5
    for row in range(grid.shape[0]):
        z_m[row] = surface.under(*grid.xy(cols, np.full(cols.size, row + 0.5)))
    attrs = {"units": "m", "long_name": "terrain elevation", "ground_method": method, **facts}
    return _data_array(z_m, grid, "ground", attrs)


# --- reading -----------------------------------------------------------------------------------------------------------

_REFUSED = ("noise", "excluded_class", "withheld", "overlap", "other_return", "isolated", "outside_grid")
"""Why the reader leaves a point out, the first that holds."""
_NOISE, _CLASS, _WITHHELD, _OVERLAP, _OUTSIDE = (
    _REFUSED.index(reason) for reason in ("noise", "excluded_class", "withheld", "overlap", "outside_grid")
)
_FATES = ("used", "outside_grid", "no_ground", "above_max_height", "below_ground", "negative")
"""What becomes of the others; "negative" are among the used."""


@dataclass(frozen=True, slots=True, eq=False)
class _Chunk:
    x: Floats
    """Grid CRS."""
    y: Floats
    z_m: NDArray[np.float32]
    flags: NDArray[np.uint8]
    """Sums of the `_IS_...`; what is excluded by its class is here only if it is a building."""

    def part(self, keep: NDArray[np.bool_]) -> _Chunk:
        return _Chunk(self.x[keep], self.y[keep], self.z_m[keep], self.flags[keep])


class _Scene:
    """The sources that touch a grid, read as often as needed and counted once."""

    def __init__(self, points: Points, grid: Grid, options: LidarOptions, *, pitfree: bool) -> None:
        self.grid, self.options, self.pitfree = grid, options, pitfree
        self.metres_per_unit = _metres_per_unit(grid.crs)
        self.returns = options.returns if options.returns != "auto" else "first" if pitfree else "all"
        self.sources = point_sources(points)
        unit_m = self.metres_per_unit
        # What circles and discs reach from outside into the grid; whole tiles where triangulations need them.
        self.pad_px = tuple(math.ceil((2 * options.void_radius_m + options.subcircle_m) / unit_m / gsd) for gsd in grid.gsd)
        padded = grid.crop(
            -self.pad_px[1], -self.pad_px[0], (grid.shape[0] + 2 * self.pad_px[1], grid.shape[1] + 2 * self.pad_px[0])
        )
        self.canopy_bounds = padded.bounds
        if pitfree:
            self.canopy_bounds = widened(snapped(padded.bounds, TILE_M / unit_m), PITFREE_BUFFER_M / unit_m)
        reach = widened(self.canopy_bounds, MARGIN_M / unit_m)
        if options.ground_interpolation == "tin" and not options.normalised:
            buffered = widened(snapped(self.canopy_bounds, TILE_M / unit_m), options.ground_gap_m / unit_m)
            reach = union(reach, buffered)
        self.cells = GroundCells.over(
            reach, options.ground_cell_m, unit_m,
            options.ground_tin_cell_m if options.ground_interpolation == "tin" else None,
        )  # fmt: skip
        self.bounds = self.cells.bounds
        self.voxels: Voxels | None = None
        if options.isolated_points:
            side_m = options.isolated_cube_m
            self.voxels = Voxels(self.bounds[0], self.bounds[1], side_m / unit_m, side_m)
        self.read = 0
        self.dropped: dict[str, int] = {}
        self.class_counts: dict[int, int] = {}
        self.files_outside = 0
        self._seconds = np.array([math.inf, -math.inf])
        self._undated = False
        self._kept: list[_Chunk] | None = None

    @property
    def names(self) -> str:
        first, rest = self.sources[0].name, len(self.sources) - 1
        return f"{first} and {rest} more" if rest else first

    def survey(self) -> tuple[Surface, str, dict[str, int]]:
        """First pass: the ground surface around the grid, how it was found, and counts; isolated points become known."""
        options, cells = self.options, self.cells
        if options.normalised and self.voxels is None:
            return Surface.flat(), _NORMALISED, {}
        for chunk in self.chunks(survey=True):
            if self.voxels is not None:
                self.voxels.add(chunk.x, chunk.y, chunk.z_m)
            if options.normalised:
                continue
            if options.ground != "filter":
                cells.add_ground(chunk.x, chunk.y, chunk.z_m, chunk.flags & _IS_GROUND > 0)
            if options.ground != "classes":
                cells.add_lowest(chunk.x, chunk.y, chunk.z_m)
        if self.voxels is not None:
            self.voxels.find_alone(options.isolated_points)
        if options.normalised:
            return Surface.flat(), _NORMALISED, {}
        return self._ground()

    def _ground(self) -> tuple[Surface, str, dict[str, int]]:
        options, cells = self.options, self.cells
        ground, seen = cells.seen.tolist()
        if options.ground != "filter" and not seen:
            raise NoPointsError(f"none of {self.read} points of {self.names} falls on the grid; check CRS and extent")
        if options.ground == "classes" and not ground:
            raise LidarError(
                f"{self.names}: no point of class 2 or 9 on the grid, ground = 'classes' needs them; use ground = 'filter'"
            )
        facts: dict[str, int] = {}
        vertices = None
        if options.ground == "classes" or (options.ground == "auto" and ground > MIN_GROUND_SHARE * seen):
            method = "classes 2 and 9"
            place = cells.mean_place()
            known = np.isfinite(place[0])
            if cells.vertex_cell is not None:
                vertices = cells.ground_vertices()
        else:
            method = "progressive morphological filter"
            place = cells.low.astype(np.float64)
            if not np.isfinite(place[0]).any():
                raise NoPointsError(f"none of {self.read} points of {self.names} falls on the grid; check CRS and extent")
            x, y, z_m = cells.low_place()
            noise = low_noise(place[0], options.ground_cell_m)
            if self.voxels is not None:
                has = np.isfinite(place[0])
                noise[has] |= self.voxels.alone(x[has], y[has], cells.low[0][has])
            facts["cells_low_noise"] = int(np.count_nonzero(noise))
            place[0][noise] = np.nan
            known = morphological_ground(
                place[0] - plane(place[0]),
                cell_m=options.ground_cell_m, window_m=options.filter_window_m, slope=options.filter_slope,
            )  # fmt: skip
            place[:, ~known] = np.nan
            if cells.vertex_cell is not None:
                vertices = one_per_place(x[known], y[known], z_m[known], 0.0)
        facts["ground_cells"] = int(np.count_nonzero(known))
        z_m = centred(place)
        z_m[farther_than(options.ground_gap_m, known, (options.ground_cell_m, options.ground_cell_m))] = np.nan
        tin = None
        if vertices is not None:
            method += ", triangulated"
            facts["ground_vertices"] = vertices[0].size
            tin = TiledTin(*vertices, unit_m=self.metres_per_unit, buffer_m=options.ground_gap_m)
        return Surface(z_m=z_m, left=cells.left, top=cells.top, cell=cells.cell, tin=tin), method, facts

    def chunks(self, *, survey: bool) -> Iterator[_Chunk]:
        """The points near the grid, less noise, withheld and dropped classes.

        Args:
            survey: the first pass, with every return; else those that make canopy, and buildings, less isolated points.
        """
        chunks = self._decoded() if survey or self._kept is None else iter(self._kept)
        if survey:
            for chunk in chunks:
                excluded = chunk.flags & _IS_EXCLUDED > 0
                yield chunk.part(~excluded) if excluded.any() else chunk
            return
        for chunk in chunks:
            alone = np.zeros(chunk.x.size, bool) if self.voxels is None else self.voxels.alone(chunk.x, chunk.y, chunk.z_m)
            excluded = chunk.flags & _IS_EXCLUDED > 0
            other = (chunk.flags & _IS_WANTED == 0) & ~excluded
            alone &= ~other & ~excluded
            self.dropped["other_return"] += int(np.count_nonzero(other))
            self.dropped["isolated"] += int(np.count_nonzero(alone))
            yield chunk.part(~alone) if alone.any() else chunk

    def _decoded(self) -> Iterator[_Chunk]:
        dated = self.read > 0  # once is enough
        self.read, self.dropped, self.class_counts, self.files_outside = 0, dict.fromkeys(_REFUSED, 0), {}, 0
        kept: list[_Chunk] | None = []
        kept_points = 0
        for source in self.sources:
            for chunk in self._source_chunks(source, gps_time=not dated):
                kept_points += chunk.x.size
                if kept is not None and kept_points <= self.options.keep_points:
                    kept.append(chunk)
                else:
                    kept = None
                yield chunk
        self._kept = kept

    def _source_chunks(self, source: PointSource, *, gps_time: bool) -> Iterator[_Chunk]:
        options = self.options
        crs = crs_of(source, options.crs)
        z_unit_m = options.z_unit_m or z_unit_m_of(source, options.crs)
        place = _Placer(horizontal(crs), self.grid, self.bounds, source.name)
        if place.misses(source.bounds):
            self.files_outside += 1
            return
        spacing = options.spacing_m / place.metres_per_unit if options.spacing_m else None
        class_flags = _flags_of_classes(options.drop_classes)
        for points in source.chunks(place.source_bounds, spacing, options.chunk_points, gps_time=gps_time):
            self.read += points.decoded
            wanted = np.ones(0, bool)
            if self.returns != "all":
                if not points.return_number.all():
                    raise LidarError(
                        f"{source.name} has points without return number, of which no {self.returns!r} can be chosen; "
                        f"give option returns = 'all'"
                    )
                of = points.number_of_returns if self.returns == "last" else 1
                wanted = points.return_number == of
            overlap = points.overlap if options.drop_overlap and points.overlap is not None else np.ones(0, bool)
            times = np.empty(0) if points.gps_time_s is None else points.gps_time_s
            self._undated |= gps_time and points.gps_time_s is None
            x, y = place(points.x, points.y)
            z_m, flags = np.empty(x.size, np.float32), np.empty(x.size, np.uint8)
            refused, class_counts = np.zeros(len(_REFUSED), np.int64), np.zeros(256, np.int64)
            kept = _sort_out(
                x, y, points.z, points.classification, points.withheld, overlap, wanted, times, np.array(self.bounds),
                z_unit_m, class_flags, z_m, flags, refused, class_counts, self._seconds,
            )  # fmt: skip
            refused[_OUTSIDE] += points.decoded - points.size
            for reason, n in zip(_REFUSED, refused.tolist(), strict=True):
                self.dropped[reason] += n
            for code in np.flatnonzero(class_counts).tolist():
                self.class_counts[code] = self.class_counts.get(code, 0) + int(class_counts[code])
            if kept == x.size:
                yield _Chunk(x, y, z_m, flags)
            else:  # copies, so that what was refused takes no memory
                yield _Chunk(x[:kept].copy(), y[:kept].copy(), z_m[:kept].copy(), flags[:kept].copy())

    @property
    def days(self) -> tuple[date, date] | None:
        """UTC days of the earliest and the latest point read; None unless every source tells."""
        if self._undated or self._seconds[0] > self._seconds[1]:
            return None
        first, last = (GPS_EPOCH + timedelta(seconds=s + 1e9 - GPS_LEAP_S) for s in self._seconds.tolist())
        return first.date(), last.date()


def _flags_of_classes(drop_classes: tuple[int, ...]) -> NDArray[np.uint8]:
    """The `_IS_...` that follow from a point's class, for all 256 of them."""
    flags = np.zeros(256, np.uint8)
    for classes, flag in (
        (GROUND_CLASSES, _IS_GROUND),
        (BUILDING_CLASSES, _IS_BUILDING),
        (drop_classes, _IS_EXCLUDED),
        (set(drop_classes) & set(NOISE_CLASSES), _IS_NOISE),
    ):
        flags[list(classes)] |= flag
    return flags


_NORMALISED = "none, heights above ground as delivered"


def _told(dropped: dict[str, int]) -> str:
    return ", ".join(f"{n} {reason.replace('_', ' ')}" for reason, n in dropped.items() if n) or "none dropped"


def _metres_per_unit(crs: CRS) -> float:
    """Metres per unit of x and y of a grid, refusing those whose units are not lengths on the ground."""
    crs = unbound(crs)
    operation = crs.coordinate_operation
    if not crs.is_projected or (operation and "Pseudo" in operation.method_name):
        raise LidarError(
            f"grid CRS {crs.name!r} has no true lengths; heights and cells need a projected one, for example a UTM zone"
        )
    return float(crs.axis_info[0].unit_conversion_factor)


class _Placer:
    """Points of one source -> the grid's CRS; outside the region asked for NaN.

    Projections are smooth, so they are computed at the nodes of a net and interpolated between, which is many times
    faster than computing each point. The net's nodes are at multiples of its mesh from the origin of the source's CRS,
    whatever the region; the mesh is halved until the error at the centres, where it is greatest, is below
    `MAX_PLACEMENT_ERROR_M`.
    """

    def __init__(self, crs: CRS, grid: Grid, bounds: Bounds, name: str) -> None:
        self.net: Floats | None = None
        self.source_bounds = bounds
        geographic = unbound(crs).is_geographic
        self.metres_per_unit = 111_320.0 if geographic else float(unbound(crs).axis_info[0].unit_conversion_factor)
        # A file stores decimals; the halves of these steps are none of them, so rounding never depends on the last bit.
        self.steps = float(1 << (30 if geographic else 14))
        if crs.equals(grid.crs, ignore_axis_order=True):
            return
        try:
            forward = Transformer.from_crs(crs, grid.crs, always_xy=True)
            box = forward.transform_bounds(*bounds, direction="INVERSE", errcheck=True)
        except ProjError as error:
            raise LidarError(
                f"{name}: CRS {crs.name!r} does not reach the grid's {grid.crs.name!r} ({str(error).splitlines()[0]}); "
                f"check option crs and the grid"
            ) from error
        unit_m = _metres_per_unit(grid.crs)
        self.mesh = 2.0**-8 if geographic else 512.0
        while True:
            self.source_bounds = snapped(box, self.mesh)
            west, south, east, north = self.source_bounds
            cols, rows = round((east - west) / self.mesh), round((north - south) / self.mesh)
            fine_x, fine_y = (
                start + np.arange(2 * n + 1) * (self.mesh / 2) for start, n in ((west, cols), (south, rows))
            )  # fmt: skip
            fine = np.stack(forward.transform(*np.meshgrid(fine_x, fine_y)))
            net, middle = fine[:, ::2, ::2], fine[:, 1::2, 1::2]
            mean = (net[:, :-1, :-1] + net[:, 1:, :-1] + net[:, :-1, 1:] + net[:, 1:, 1:]) / 4
            if np.abs(mean - middle).max() * unit_m <= MAX_PLACEMENT_ERROR_M:
                self.net = np.ascontiguousarray(net)
                return
            self.mesh /= 2
            assert cols * rows < 1 << 24, f"projection {crs.name!r} -> {grid.crs.name!r} is not smooth on the grid"

    def misses(self, box: Bounds) -> bool:
        """Whether a box in the source's CRS lies wholly outside."""
        left, bottom, right, top = self.source_bounds
        return box[0] > right or box[2] < left or box[1] > top or box[3] < bottom

    def __call__(self, x: Floats, y: Floats) -> tuple[Floats, Floats]:
        x, y = np.rint(x * self.steps) / self.steps, np.rint(y * self.steps) / self.steps
        if self.net is None:
            return x, y
        out = np.empty((2, x.size))
        _interpolate_net(x, y, self.net, self.source_bounds[0], self.source_bounds[1], self.mesh, out)
        return out[0], out[1]


# --- canopy ------------------------------------------------------------------------------------------------------------


class _Canvas:
    """The pixels that points are drawn on: the grid with a rim around it, or, for pitfree, cells for its vertices."""

    def __init__(self, scene: _Scene) -> None:
        self.scene = scene
        grid, (pad_x, pad_y) = scene.grid, scene.pad_px
        self.inner = (slice(pad_y, pad_y + grid.shape[0]), slice(pad_x, pad_x + grid.shape[1]))
        self.grid = grid.crop(-pad_y, -pad_x, (grid.shape[0] + 2 * pad_y, grid.shape[1] + 2 * pad_x))
        self.returns = np.zeros(self.grid.shape, np.int32)
        self.buildings = np.zeros(self.grid.shape, np.int32)
        self.chm = np.full(self.grid.shape, np.nan, np.float32)
        unit_m, options = scene.metres_per_unit, scene.options
        self.radius_px = np.array([options.subcircle_m / unit_m / gsd for gsd in grid.gsd])
        self.to_pixel = np.array(tuple(~self.grid.transform)[:6])
        self.inside = np.array([pad_y, pad_y + grid.shape[0], pad_x, pad_x + grid.shape[1]])
        self.vertices: _HighestFirst | None = None
        if scene.pitfree:
            self.vertices = _HighestFirst.over(scene.canopy_bounds, grid)

    def add(self, chunk: _Chunk, height_m: Floats, counts: NDArray[np.int64]) -> None:
        """Draw points of known height."""
        if self.vertices is None:
            chm, radius_px = self.chm, self.radius_px
        else:  # the fates are the same; what is drawn are the vertices
            chm, radius_px = np.empty((0, 0), np.float32), np.zeros(2)
        max_height_m = self.scene.options.max_height_m
        _highest(
            chunk.x, chunk.y, height_m, chunk.flags, self.to_pixel, self.inside, max_height_m, radius_px, chm, self.returns,
            self.buildings, counts,
        )  # fmt: skip
        if self.vertices is not None:
            wanted = chunk.flags & (_IS_WANTED | _IS_EXCLUDED) == _IS_WANTED
            ok = wanted & (height_m <= max_height_m) & (height_m >= -MAX_BELOW_GROUND_M)
            radius = self.scene.options.subcircle_m / self.scene.metres_per_unit
            self.vertices.add(chunk.x[ok], chunk.y[ok], height_m[ok], radius)

    def cropped(self, pixels: NDArray[Any]) -> NDArray[Any]:
        """The grid's part of an array with the rim."""
        return np.ascontiguousarray(pixels[self.inner])

    def height_m(self) -> NDArray[np.float32]:
        """The canopy height model on the grid."""
        if self.vertices is None:
            return self.cropped(self.chm)
        return _pitfree(self.vertices, self.scene)

    def large_voids(self) -> NDArray[np.bool_]:
        """Pixels of the grid covered by a circle of `void_radius_m` without a return."""
        options, grid, unit_m = self.scene.options, self.scene.grid, self.scene.metres_per_unit
        pixel_m = (grid.gsd[1] * unit_m, grid.gsd[0] * unit_m)
        has_return = self.returns > 0
        centres = farther_than(options.void_radius_m, has_return, pixel_m)
        return self.cropped(~farther_than(options.void_radius_m, centres, pixel_m) & ~has_return)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _HighestFirst:
    """The highest return per cell with its place; cells are the lattice's pixels, anchored to the origin of the CRS."""

    row0: int
    """Row of the first cell; row r covers y in (-(r+1)*cell, -r*cell]."""
    col0: int
    cell: float
    high: NDArray[np.float32]
    """Planes: height_m, and the offsets of the point from the cell's centre along columns and rows, in cells."""

    @classmethod
    def over(cls, bounds: Bounds, grid: Grid) -> _HighestFirst:
        cell = min(grid.gsd)
        left, bottom, right, top = (round(edge / cell) for edge in snapped(bounds, cell))
        return cls(row0=-top, col0=left, cell=cell, high=np.full((3, top - bottom, right - left), np.nan, np.float32))

    def add(self, x: Floats, y: Floats, height_m: Floats, radius: float) -> None:
        _highest_per_cell(x, y, np.maximum(height_m, 0.0), self.row0, self.col0, self.cell, radius, self.high)

    def within(self, bounds: Bounds) -> tuple[Floats, Floats, Floats]:
        """x, y and height_m of the vertices in `bounds`."""
        left, bottom, right, top = bounds
        rows, cols = self.high.shape[1:]
        c0, c1 = math.floor(left / self.cell) - self.col0, math.ceil(right / self.cell) - self.col0
        r0, r1 = math.floor(-top / self.cell) - self.row0, math.ceil(-bottom / self.cell) - self.row0
        c0, c1, r0, r1 = max(c0, 0), min(c1, cols), max(r0, 0), min(r1, rows)
        part = self.high[:, r0:r1, c0:c1]
        row, col = np.nonzero(np.isfinite(part[0]))
        height_m, across, down = part[:, row, col].astype(np.float64)
        x = (self.col0 + c0 + col + 0.5 + across) * self.cell
        y = -(self.row0 + r0 + row + 0.5 + down) * self.cell
        near = inside(x, y, bounds)
        return one_per_place(x[near], y[near], height_m[near], 0.0)


def _pitfree(vertices: _HighestFirst, scene: _Scene) -> NDArray[np.float32]:
    """The highest of the triangulations of the vertices above each threshold, at the pixels' centres."""
    grid, options, unit_m = scene.grid, scene.options, scene.metres_per_unit
    chm = np.full(grid.shape, np.nan, np.float32)
    for tile in tiles_over(grid.bounds, TILE_M / unit_m):
        window = _pixels_over(grid, tile)
        if window is None:
            continue
        rows, cols = window
        part = grid.crop(rows.start, cols.start, (rows.stop - rows.start, cols.stop - cols.start))
        v, u = np.meshgrid(np.arange(part.shape[0]) + 0.5, np.arange(part.shape[1]) + 0.5, indexing="ij")
        centre_x, centre_y = part.xy(u, v)
        # Half-open, so that every pixel is one tile's.
        own = (centre_x >= tile[0]) & (centre_x < tile[2]) & (centre_y >= tile[1]) & (centre_y < tile[3])
        x, y, height_m = vertices.within(widened(tile, PITFREE_BUFFER_M / unit_m))
        for step, threshold_m in enumerate(options.pitfree_thresholds_m):
            tall = height_m >= threshold_m
            px, py, pz = x[tall] - tile[0], y[tall] - tile[1], height_m[tall]
            triangles, _ = delaunay(px, py)
            most = options.pitfree_max_edge_m[min(step, 1)] / unit_m
            triangles = triangles[longest_edge(px, py, triangles) <= most]
            col, row = part.pixel(px + tile[0], py + tile[1])
            raise_to_triangles(col, row, pz, triangles, own, chm[rows, cols])
    return chm


def _pixels_over(grid: Grid, bounds: Bounds) -> tuple[slice, slice] | None:
    """(row, col) slices of the grid's pixels that may have their centre in `bounds`."""
    left, bottom, right, top = bounds
    cols, rows = grid.pixel(np.array([left, right, left, right]), np.array([bottom, bottom, top, top]))
    c0, c1 = max(math.floor(cols.min()), 0), min(math.ceil(cols.max()), grid.shape[1])
    r0, r1 = max(math.floor(rows.min()), 0), min(math.ceil(rows.max()), grid.shape[0])
    return (slice(r0, r1), slice(c0, c1)) if r0 < r1 and c0 < c1 else None


def _fill_holes(chm: NDArray[np.float32], most_px: int) -> tuple[NDArray[np.float32], int]:
    void = np.isnan(chm)
    if not most_px or not void.any():
        return chm, 0
    labels, count = ndimage.label(void)
    sizes = np.bincount(labels.ravel(), minlength=count + 1)
    small = sizes <= most_px
    small[0] = False
    # At the edge a hole may be the tip of a large void outside.
    for edge in (labels[0], labels[-1], labels[:, 0], labels[:, -1]):
        small[edge] = False
    fill = small[labels]
    return np.where(fill, membrane(chm.astype(np.float64)), chm).astype(np.float32), int(np.count_nonzero(fill))


# --- inner loops -------------------------------------------------------------------------------------------------------


@compiled
def _interpolate_net(  # noqa: PLR0917 - compiled loops take plain arrays and numbers
    x: Floats, y: Floats, net: Floats, x0: float, y0: float, mesh: float, out: Floats
) -> None:
    rows, cols = net.shape[1] - 1, net.shape[2] - 1
    for i in range(x.size):
        u, v = (x[i] - x0) / mesh, (y[i] - y0) / mesh
        if not (0.0 <= u <= cols and 0.0 <= v <= rows):
            out[0, i] = out[1, i] = np.nan
            continue
        c, r = min(int(u), cols - 1), min(int(v), rows - 1)
        u, v = u - c, v - r
        for k in range(2):
            low = net[k, r, c] + u * (net[k, r, c + 1] - net[k, r, c])
            high = net[k, r + 1, c] + u * (net[k, r + 1, c + 1] - net[k, r + 1, c])
            out[k, i] = low + v * (high - low)


@compiled
def _sort_out(  # noqa: PLR0917 - as above
    x: Floats,
    y: Floats,
    z: Floats,
    classes: NDArray[np.uint8],
    withheld: NDArray[np.bool_],
    overlap: NDArray[np.bool_],
    wanted: NDArray[np.bool_],
    gps_time_s: Floats,
    bounds: Floats,
    z_unit_m: float,
    flags_of_class: NDArray[np.uint8],
    z_m: NDArray[np.float32],
    flags: NDArray[np.uint8],
    refused: NDArray[np.int64],
    class_counts: NDArray[np.int64],
    seconds: Floats,
) -> int:
    """Move the points that are kept to the front of `x`, `y`, `z_m` and `flags`, and count the others; how many are kept.

    Of `overlap`, `wanted` and `gps_time_s` an empty array means: none is, all are, none is known.
    """
    kept = 0
    for i in range(x.size):
        code = classes[i]
        near = bounds[0] <= x[i] <= bounds[2] and bounds[1] <= y[i] <= bounds[3]  # NaN is not
        if near:
            class_counts[code] += 1
            if gps_time_s.size and gps_time_s[i] != 0.0:  # 0 is what producers write who have none
                seconds[0], seconds[1] = min(seconds[0], gps_time_s[i]), max(seconds[1], gps_time_s[i])
        flag = flags_of_class[code]
        fine = False
        if flag & _IS_NOISE:
            refused[_NOISE] += 1
        elif flag & _IS_EXCLUDED:
            refused[_CLASS] += 1
        elif withheld[i]:
            refused[_WITHHELD] += 1
        elif overlap.size and overlap[i]:
            refused[_OVERLAP] += 1
        elif not near:
            refused[_OUTSIDE] += 1
        else:
            fine = True
        if fine or (flag & _IS_BUILDING and flag & _IS_EXCLUDED and near and not withheld[i]):
            if wanted.size == 0 or wanted[i]:
                flag |= _IS_WANTED
            x[kept], y[kept], z_m[kept], flags[kept] = x[i], y[i], z[i] * z_unit_m, flag
            kept += 1
    return kept


@compiled
def _highest(  # noqa: PLR0917 - as above
    x: Floats,
    y: Floats,
    height_m: Floats,
    flags: NDArray[np.uint8],
    to_pixel: Floats,
    own: NDArray[np.int64],
    max_height_m: float,
    radius_px: Floats,
    chm: NDArray[np.float32],
    returns: NDArray[np.int32],
    buildings: NDArray[np.int32],
    counts: NDArray[np.int64],
) -> None:
    rows, cols = returns.shape
    radius_c, radius_r = radius_px
    draws = chm.size > 0
    for i in range(x.size):
        col = to_pixel[0] * x[i] + to_pixel[1] * y[i] + to_pixel[2]
        row = to_pixel[3] * x[i] + to_pixel[4] * y[i] + to_pixel[5]
        on_canvas = 0.0 <= col < cols and 0.0 <= row < rows
        if on_canvas:
            returns[int(row), int(col)] += 1
            if flags[i] & _IS_BUILDING:
                buildings[int(row), int(col)] += 1
        if flags[i] & (_IS_WANTED | _IS_EXCLUDED) != _IS_WANTED:
            continue  # counted by the reader
        if not (
            own[0] - radius_r <= row < own[1] + radius_r and own[2] - radius_c <= col < own[3] + radius_c
        ):  # NaN is outside
            counts[1] += 1
            continue
        height = height_m[i]
        if np.isnan(height):
            counts[2] += 1
            continue
        if height > max_height_m:
            counts[3] += 1
            continue
        if height < -MAX_BELOW_GROUND_M:
            counts[4] += 1
            continue
        touched = True
        raised = np.float32(max(height, 0.0))
        if radius_c == 0.0:
            if draws:
                c, r = int(col), int(row)
                if not chm[r, c] >= raised:  # NaN is not >=
                    chm[r, c] = raised
        else:
            touched = False
            for r in range(max(own[0], math.floor(row - radius_r)), min(own[1] - 1, math.floor(row + radius_r)) + 1):
                for c in range(max(own[2], math.floor(col - radius_c)), min(own[3] - 1, math.floor(col + radius_c)) + 1):
                    # Distance to the nearest point of the pixel, in radii.
                    away_c = max(c - col, 0.0, col - (c + 1)) / radius_c
                    away_r = max(r - row, 0.0, row - (r + 1)) / radius_r
                    if away_c * away_c + away_r * away_r <= 1.0:
                        touched = True
                        if not chm[r, c] >= raised:
                            chm[r, c] = raised
        if touched:
            counts[0] += 1
            if height < 0.0:
                counts[5] += 1
        else:
            counts[1] += 1


@compiled
def _highest_per_cell(  # noqa: PLR0917 - as above
    x: Floats,
    y: Floats,
    height_m: Floats,
    row0: int,
    col0: int,
    cell: float,
    radius: float,
    high: NDArray[np.float32],
) -> None:
    """The highest return per cell, or with a radius the highest of the returns and eight places on a circle around each."""
    rows, cols = high.shape[1:]
    places = 9 if radius > 0.0 else 1
    for i in range(x.size):
        for k in range(places):
            px, py = x[i], y[i]
            if k:
                px, py = px + radius * math.cos(math.pi / 4 * k), py + radius * math.sin(math.pi / 4 * k)
            u, v = px / cell, -py / cell  # from the origin, so that the place in the cell does not depend on the region
            left, top = np.floor(u), np.floor(v)
            c, r = int(left) - col0, int(top) - row0
            if not (0 <= c < cols and 0 <= r < rows):
                continue
            height, held = np.float32(height_m[i]), high[0, r, c]
            if height < held:  # NaN, no return yet, is not
                continue
            across, down = np.float32(u - left - 0.5), np.float32(v - top - 0.5)
            if height == held and (across, -down) >= (high[1, r, c], -high[2, r, c]):
                continue
            high[0, r, c], high[1, r, c], high[2, r, c] = height, across, down


# --- result ------------------------------------------------------------------------------------------------------------


def _data_array(values: NDArray[np.float32], grid: Grid, name: str, attrs: dict[str, Any]) -> xarray.DataArray:
    import rioxarray  # noqa: F401 - registers the accessor
    import xarray

    transform = Affine(*tuple(grid.transform)[:6])
    coords = {}
    if transform.b == 0 and transform.d == 0:
        coords["x"] = transform.c + (np.arange(grid.shape[1]) + 0.5) * transform.a
        coords["y"] = transform.f + (np.arange(grid.shape[0]) + 0.5) * transform.e
    array = xarray.DataArray(values, dims=("y", "x"), coords=coords, name=name, attrs=attrs)
    array = array.rio.write_crs(grid.crs).rio.write_transform(transform).rio.write_nodata(np.nan)
    return cast("xarray.DataArray", array)

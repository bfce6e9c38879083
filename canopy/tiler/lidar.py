"""From a point cloud to a canopy height model: LAS/LAZ files -> height above ground -> the highest return per pixel.

Two passes over the points. The first finds the ground on a lattice of cells anchored to the origin of the CRS; the second
takes every point's height above that ground and keeps the highest per pixel. Points arrive in chunks and only two grids
are held, the ground and the result, so memory follows the grid and not the file. Points are kept between the passes up
to a fixed number, which saves small clouds the second decoding; the result is the same either way.

Units. x and y are in the unit of the file's CRS and are reprojected to the grid's. z is in the unit of the vertical axis
where the file names one (the vertical part of a compound CRS, a third axis, or the GeoTIFF keys 4096 and 4099); a
projected CRS that names none has z in the unit of x and y, which is how clouds in feet are delivered (EPSG:2994 is
international feet in all three). Nothing else is assumed: a file without CRS, or with longitude and latitude and no
vertical unit, is refused. A shift between vertical datums moves ground and canopy alike and so does not matter here.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar, cast

import numpy as np
from affine import Affine
from numba import njit
from numpy.typing import NDArray
from pyproj import CRS, Transformer
from pyproj.exceptions import CRSError, ProjError
from scipy import ndimage

from canopy.errors import LidarError
from canopy.grid import Grid

if TYPE_CHECKING:
    import xarray

GROUND_CLASSES = (2, 9)
"""ASPRS classes ground and water: the surface that heights are counted from."""
NOISE_CLASSES = (7, 18)
"""ASPRS classes low and high noise."""
NON_VEGETATION_CLASSES = (6, 17, 64, 65, 66)
"""Buildings (6), bridges (17) and what producers put into 64-66 (structures, artefacts, virtual points)."""

MIN_GROUND_SHARE = 0.005
"""With `ground="auto"`, classes are believed when at least this share of the points is ground; dense tropical canopy lets
1-5 % through, whereas a handful of stray class codes in an unclassified cloud is far below."""
MAX_BELOW_GROUND_M = 2.0
"""A point deeper than this is low noise (or its ground is wrong): dropped and counted, not set to 0."""
MARGIN_M = 60.0
"""The ground is built this far beyond the grid, so that the filter's largest window sees both sides of its edge."""
MAX_PLACEMENT_ERROR_M = 1e-3
"""Largest error of interpolated instead of computed map coordinates; LiDAR itself is good to some 0.1 m."""

Floats = NDArray[np.float64]
_F = TypeVar("_F", bound=Callable[..., Any])


@dataclass(frozen=True, slots=True, kw_only=True)
class LidarOptions:
    """How points become heights; the defaults suit airborne clouds of 2-60 points per m² in metres above some datum."""

    crs: CRS | None = None
    """CRS of the points, in place of what the headers say; needed where they say nothing."""
    z_unit_m: float | None = None
    """Metres per unit of z, in place of the rule in the module's docstring."""
    normalised: bool = False
    """z is a height above ground already."""
    drop_classes: tuple[int, ...] = NOISE_CLASSES
    """ASPRS classes left out; add `NON_VEGETATION_CLASSES` for canopy without buildings (their pixels become void)."""
    ground: Literal["auto", "classes", "filter"] = "auto"
    """Where the ground comes from: classes 2 and 9, the morphological filter, or classes where the cloud has them."""
    ground_cell_m: float = 1.0
    """Cell of the ground lattice, metres."""
    ground_gap_m: float = 50.0
    """Ground is interpolated up to this distance from a ground return; beyond it is unknown, metres."""
    filter_window_m: float = 40.0
    """Full width of the filter's largest window: wider objects (large halls) stay part of the ground, metres."""
    filter_slope: float = 0.2
    """Rise over run that the filter takes for terrain roughness within a window."""
    max_height_m: float = 100.0
    """Points higher above ground than this are spikes, birds or cloud: dropped and counted, metres."""
    subcircle_m: float = 0.0
    """Radius of the disc that a return stands for; it raises every pixel that the disc touches, metres. 0: its own pixel."""
    fill_holes_px: int = 0
    """Voids of at most this many 4-connected pixels, and not at the grid's edge, are interpolated from around them."""
    chunk_points: int = 1_000_000
    """Points decoded at a time."""
    keep_points: int = 16_000_000
    """Points kept between the passes (20 bytes each); a larger cloud is decoded twice."""

    def __post_init__(self) -> None:
        for name, low in (
            ("z_unit_m", 0.0),
            ("ground_cell_m", 0.0),
            ("ground_gap_m", 0.0),
            ("filter_window_m", 0.0),
            ("filter_slope", 0.0),
            ("max_height_m", 0.0),
            ("chunk_points", 0.0),
        ):
            value = getattr(self, name)
            if value is not None and not (math.isfinite(value) and value > low):
                raise LidarError(f"{name} = {value} must be a finite number above 0")
        for name in ("subcircle_m", "fill_holes_px", "keep_points"):
            if not (math.isfinite(value := getattr(self, name)) and value >= 0):
                raise LidarError(f"{name} = {value} must be 0 or more")
        if clash := set(self.drop_classes) & set(GROUND_CLASSES):
            raise LidarError(f"drop_classes has the ground class {min(clash)}; leave 2 and 9 in, their heights are 0 m")
        if self.ground not in ("auto", "classes", "filter"):
            raise LidarError(f"ground = {self.ground!r} is not known; use 'auto', 'classes' or 'filter'")


def lidar_to_chm(
    points: Path | Sequence[Path],
    grid: Grid,
    algorithm: str = "p2r",
    *,
    options: LidarOptions = LidarOptions(),
) -> xarray.DataArray:
    """Canopy height model of LAS/LAZ files on `grid`: per pixel the greatest height above ground of any return in it.

    Ground returns count too, so open ground is about 0 m. Heights below 0 m, by noise of ground and return, are set to 0
    and counted. Pixels without a return are void, NaN: nothing is interpolated but by `options.fill_holes_px`.

    Args:
        points: one LAS/LAZ file or several that together cover the grid; each in its own CRS.
        grid: any projected grid, metres or feet, not web mercator.
        algorithm: "p2r", the point-to-raster maximum.
        options: see `LidarOptions`.

    Returns:
        (y, x) float32 metres, with `x`, `y` at pixel centres and the CRS as rioxarray has them. Attributes: `units`,
        `algorithm`, `ground_method`, `density_per_m2` (points used over the grid's area), `void_fraction`, and the numbers
        `points_read`, `points_used`, `points_dropped_<reason>`, `points_negative_set_to_0`, `pixels_hole_filled`,
        `files_outside` (not read: their header's box misses the grid). The points read are used or dropped, without rest.

    Raises:
        LidarError: a file is missing, truncated, not LAS, without CRS or vertical unit; no point falls on the grid; no
            ground is found; an option is out of range or the algorithm is not known.
    """
    if algorithm != "p2r":
        raise LidarError(f"algorithm {algorithm!r} is not known; use 'p2r'")
    scene = _Scene(points, grid, options)
    if options.normalised:
        surface, method = _Surface.flat(), "none, heights above ground as delivered"
    else:
        surface, method, _ = scene.ground()

    to_pixel = np.array(tuple(~grid.transform)[:6])
    radius_m = options.subcircle_m / scene.metres_per_unit
    radius_px = np.array([radius_m / grid.gsd[0], radius_m / grid.gsd[1]])
    chm = np.full(grid.shape, np.nan, np.float32)
    counts = np.zeros(len(_FATES), np.int64)
    for chunk in scene.chunks():
        _highest(
            chunk.x,
            chunk.y,
            chunk.z_m,
            to_pixel,
            surface.z_m,
            surface.left,
            surface.top,
            surface.cell,
            options.max_height_m,
            radius_px,
            chm,
            counts,
        )
    fate = dict(zip(_FATES, counts.tolist(), strict=True))
    negative = fate.pop("negative")
    used = fate.pop("used")
    read = scene.read
    dropped = {reason: scene.dropped.get(reason, 0) + fate.get(reason, 0) for reason in (*scene.dropped, *fate)}
    assert read == used + sum(dropped.values()), f"{read} points read, {used} used, {dropped} dropped do not add up"
    if not used:
        raise LidarError(
            f"none of {read} points of {scene.names} gives a height on the grid ({_told(dropped)}); check CRS and extent"
        )
    chm, filled = _fill_holes(chm, options.fill_holes_px)
    area_m2 = abs(grid.transform.determinant) * scene.metres_per_unit**2 * chm.size
    attrs = {
        "units": "m",
        "long_name": "height above ground",
        "algorithm": algorithm,
        "subcircle_m": options.subcircle_m,
        "ground_method": method,
        "density_per_m2": used / area_m2,
        "void_fraction": float(np.isnan(chm).mean()),
        "points_read": read,
        "points_used": used,
        **{f"points_dropped_{reason}": n for reason, n in dropped.items()},
        "points_negative_set_to_0": negative,
        "pixels_hole_filled": filled,
        "files_outside": scene.files_outside,
    }
    return _data_array(chm, grid, "height", attrs)


def ground_surface(
    points: Path | Sequence[Path],
    grid: Grid,
    *,
    options: LidarOptions = LidarOptions(),
) -> xarray.DataArray:
    """Terrain under a point cloud at the pixel centres of `grid`: the surface that `lidar_to_chm` counts heights from.

    From classes: the mean of the ground returns of a cell, moved to the cell's centre along the local slope. From the
    filter: the same with the lowest return, so about 0.05 m lower. Between cells bilinear, in gaps a membrane.

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
    surface, method, facts = _Scene(points, grid, options).ground()
    rows, cols = np.meshgrid(np.arange(grid.shape[0]) + 0.5, np.arange(grid.shape[1]) + 0.5, indexing="ij")
    a, b, c, d, e, f = tuple(grid.transform)[:6]
    x, y = a * cols + b * rows + c, d * cols + e * rows + f
    place = [(surface.top - y) / surface.cell - 0.5, (x - surface.left) / surface.cell - 0.5]
    z_m = ndimage.map_coordinates(surface.z_m, place, order=1, mode="nearest").astype(np.float32)
    attrs = {"units": "m", "long_name": "terrain elevation", "ground_method": method, **facts}
    return _data_array(z_m, grid, "ground", attrs)


# --- reading -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Chunk:
    x: Floats
    """Grid CRS."""
    y: Floats
    z_m: NDArray[np.float32]
    is_ground: NDArray[np.bool_]


@dataclass(slots=True, eq=False)
class _Scene:
    """The files that touch a grid, read as often as needed and counted once."""

    points: Path | Sequence[Path]
    grid: Grid
    options: LidarOptions
    metres_per_unit: float = 0.0
    read: int = 0
    dropped: dict[str, int] = field(default_factory=dict)
    files_outside: int = 0
    _kept: list[_Chunk] | None = None

    def __post_init__(self) -> None:
        self.metres_per_unit = _metres_per_unit(self.grid.crs)
        if not self.paths:
            raise LidarError("no point cloud given; name at least one LAS or LAZ file")

    @property
    def paths(self) -> tuple[Path, ...]:
        return (Path(self.points),) if isinstance(self.points, str | Path) else tuple(Path(p) for p in self.points)

    @property
    def names(self) -> str:
        return str(self.paths[0]) if len(self.paths) == 1 else f"{self.paths[0]} and {len(self.paths) - 1} more"

    def chunks(self) -> Iterator[_Chunk]:
        """The points within the grid's margin, file by file in file order, less noise, withheld and dropped classes."""
        if self._kept is not None:
            yield from self._kept
            return
        self.read, self.dropped, self.files_outside = 0, dict.fromkeys(_REFUSED, 0), 0
        kept: list[_Chunk] | None = []
        kept_points = 0
        for path in self.paths:
            for chunk in self._file_chunks(path):
                kept_points += chunk.x.size
                if kept is not None and kept_points <= self.options.keep_points:
                    kept.append(chunk)
                else:
                    kept = None
                yield chunk
        self._kept = kept

    def _file_chunks(self, path: Path) -> Iterator[_Chunk]:
        import laspy

        if not path.is_file():
            raise LidarError(f"{path} does not exist or is not a file; give a LAS or LAZ file")
        selection = laspy.DecompressionSelection
        wanted = selection.XY_RETURNS_CHANNEL | selection.Z | selection.CLASSIFICATION | selection.FLAGS
        try:
            reader = laspy.open(path, decompression_selection=wanted)
        except Exception as error:  # laspy, lazrs, struct and numpy each raise their own on malformed bytes
            raise LidarError(f"{path} is not a readable LAS or LAZ file ({_first_line(error)}); fetch it again") from error
        with reader:
            header = reader.header
            if not header.point_count:
                raise LidarError(f"{path} holds 0 points; leave it out")
            crs = self.options.crs or _header_crs(header, path)
            z_unit_m = self.options.z_unit_m or _z_unit_m(crs, None if self.options.crs else header, path)
            place = _Placer(_horizontal(crs), self.grid, MARGIN_M / self.metres_per_unit, path)
            if place.misses(header.mins, header.maxs):
                self.files_outside += 1
                return
            read = 0
            while read < header.point_count:
                try:
                    record = reader.read_points(self.options.chunk_points)
                    x, y, z = (np.asarray(v, np.float64) for v in (record.x, record.y, record.z))
                    classes = np.asarray(record.classification)
                    withheld = np.asarray(record.withheld, bool)
                except Exception as error:  # as above
                    raise _truncated(path, read, header.point_count, error) from error
                if not x.size:
                    raise _truncated(path, read, header.point_count, None)
                read += x.size
                px, py = place(x, y)
                fate = np.zeros(x.size, np.uint8)
                fate[~place.near(px, py)] = 1 + _REFUSED.index("outside_grid")
                fate[withheld] = 1 + _REFUSED.index("withheld")
                fate[np.isin(classes, self.options.drop_classes)] = 1 + _REFUSED.index("excluded_class")
                noise = [c for c in self.options.drop_classes if c in NOISE_CLASSES]
                fate[np.isin(classes, noise)] = 1 + _REFUSED.index("noise")
                for reason, n in zip(_REFUSED, np.bincount(fate, minlength=len(_REFUSED) + 1)[1:], strict=True):
                    self.dropped[reason] += int(n)
                keep = fate == 0
                yield _Chunk(
                    x=px[keep],
                    y=py[keep],
                    z_m=(z[keep] * z_unit_m).astype(np.float32),
                    is_ground=np.isin(classes[keep], GROUND_CLASSES),
                )
            self.read += read

    def ground(self) -> tuple[_Surface, str, dict[str, int]]:
        """The ground surface around the grid, how it was found, and counts."""
        options = self.options
        cells = _GroundCells.around(self.grid, options.ground_cell_m / self.metres_per_unit, self.metres_per_unit)
        seen = np.zeros(2, np.int64)
        for chunk in self.chunks():
            args = (cells.left, cells.top, cells.cell)
            if options.ground != "filter":
                _sum_ground(chunk.x, chunk.y, chunk.z_m, chunk.is_ground, *args, cells.count, cells.total, seen)
            if options.ground != "classes":
                _lowest(chunk.x, chunk.y, chunk.z_m, *args, cells.low)
        if options.ground == "classes" and not seen[0]:
            raise LidarError(
                f"{self.names}: no point of class 2 or 9 on the grid, ground = 'classes' needs them; use ground = 'filter'"
            )
        facts: dict[str, int] = {}
        if options.ground == "classes" or (options.ground == "auto" and seen[0] > MIN_GROUND_SHARE * seen[1]):
            method = "classes 2 and 9"
            known = cells.count > 0
            place = np.divide(cells.total, cells.count, out=np.full(cells.total.shape, np.nan), where=known)
        else:
            method = "progressive morphological filter"
            place = cells.low.astype(np.float64)
            if not np.isfinite(place[0]).any():
                raise LidarError(f"none of {self.read} points of {self.names} falls on the grid; check CRS and extent")
            noise = _low_noise(place[0], options.ground_cell_m)
            facts["cells_low_noise"] = int(np.count_nonzero(noise))
            place[0][noise] = np.nan
            known = _morphological_ground(place[0] - _plane(place[0]), options)
            place[:, ~known] = np.nan
        facts["ground_cells"] = int(np.count_nonzero(known))
        z_m = _centred(place)
        z_m[ndimage.distance_transform_edt(~known) * options.ground_cell_m > options.ground_gap_m] = np.nan
        return _Surface(z_m=z_m, left=cells.left, top=cells.top, cell=cells.cell), method, facts


def _truncated(path: Path, read: int, promised: int, error: Exception | None) -> LidarError:
    why = f" ({_first_line(error)})" if error else ""
    return LidarError(f"{path} breaks off after {read} of {promised} points{why}; fetch it again")


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:120]


def _told(dropped: dict[str, int]) -> str:
    return ", ".join(f"{n} {reason.replace('_', ' ')}" for reason, n in dropped.items() if n) or "none dropped"


# --- coordinate reference systems and units ----------------------------------------------------------------------------


def _header_crs(header: Any, path: Path) -> CRS:
    try:
        crs = header.parse_crs()
    except CRSError as error:
        raise LidarError(f"{path}: CRS in the header is not understood ({_first_line(error)}); give option crs") from error
    if crs is None:
        raise LidarError(f"{path} has no CRS in its header; give it with option crs, for example EPSG:32610")
    return cast("CRS", crs)


def _horizontal(crs: CRS) -> CRS:
    if crs.is_compound:
        crs = crs.sub_crs_list[0]
    return crs if len(crs.axis_info) == 2 else crs.to_2d()


def _unbound(crs: CRS) -> CRS:
    return crs.source_crs if crs.is_bound and crs.source_crs is not None else crs


def _metres_per_unit(crs: CRS) -> float:
    """Metres per unit of x and y of a grid, refusing those whose units are not lengths on the ground."""
    crs = _unbound(crs)
    operation = crs.coordinate_operation
    if not crs.is_projected or (operation and "Pseudo" in operation.method_name):
        raise LidarError(
            f"grid CRS {crs.name!r} has no true lengths; heights and cells need a projected one, for example a UTM zone"
        )
    return float(crs.axis_info[0].unit_conversion_factor)


def _z_unit_m(crs: CRS, header: Any | None, path: Path) -> float:
    """Metres per unit of z by the rule in the module's docstring; `header` None leaves the GeoTIFF keys out."""
    for part in crs.sub_crs_list if crs.is_compound else [crs]:
        for axis in _unbound(part).axis_info:
            if axis.direction in ("up", "down"):
                return float(axis.unit_conversion_factor)
    if header is not None and (unit_m := _geokey_z_unit_m(header, path)) is not None:
        return unit_m
    plane = _unbound(_horizontal(crs))
    if not plane.is_projected:
        raise LidarError(f"{path}: CRS {crs.name!r} says nothing about the unit of z; give option z_unit_m, 1.0 for metres")
    return float(plane.axis_info[0].unit_conversion_factor)


def _geokey_z_unit_m(header: Any, path: Path) -> float | None:
    """Unit of z in the GeoTIFF keys: VerticalUnitsGeoKey (4099) first, else the axis of VerticalCSTypeGeoKey (4096)."""
    keys = {
        key.id: key.value_offset
        for vlr in header.vlrs.get("GeoKeyDirectoryVlr")
        for key in vlr.geo_keys
        if key.tiff_tag_location == 0
    }
    units = {9001: 1.0, 9002: 0.3048, 9003: 1200 / 3937}
    undefined = (0, 32767)
    if (code := keys.get(4099, 0)) not in undefined:
        if code not in units:
            raise LidarError(f"{path}: unit {code} of z (GeoTIFF key 4099) is not known; give option z_unit_m")
        return units[code]
    if (code := keys.get(4096, 0)) not in undefined:
        try:
            return float(CRS.from_epsg(code).axis_info[-1].unit_conversion_factor)
        except CRSError as error:
            raise LidarError(f"{path}: vertical CRS {code} (GeoTIFF key 4096) is not known; give option z_unit_m") from error
    return None


class _Placer:
    """Points of one file -> the grid's CRS; outside the grid and its margin NaN.

    Projections are smooth, so they are computed at the nodes of a net and interpolated between, which is many times
    faster than computing each point. The net is refined until the error at the centres of its meshes, where it is
    greatest, is below `MAX_PLACEMENT_ERROR_M`.
    """

    def __init__(self, crs: CRS, grid: Grid, margin: float, path: Path) -> None:
        left, bottom, right, top = grid.bounds
        self.bounds = (left - margin, bottom - margin, right + margin, top + margin)
        self.forward = None
        if crs.equals(grid.crs, ignore_axis_order=True):
            return
        try:
            self.forward = Transformer.from_crs(crs, grid.crs, always_xy=True)
            west, south, east, north = self.forward.transform_bounds(*self.bounds, direction="INVERSE", errcheck=True)
        except ProjError as error:
            raise LidarError(
                f"{path}: CRS {crs.name!r} does not reach the grid's {grid.crs.name!r} ({_first_line(error)}); "
                f"check option crs and the grid"
            ) from error
        unit_m = _metres_per_unit(grid.crs)
        meshes = max(1, math.ceil(max(right - left, top - bottom) * unit_m / 512))
        while True:
            self.x0, self.y0 = west, south
            self.dx, self.dy = (east - west) / meshes, (north - south) / meshes
            self.net = self._nodes(np.arange(meshes + 1, dtype=np.float64))
            middle = self._nodes(np.arange(meshes, dtype=np.float64) + 0.5)
            mean = (self.net[:, :-1, :-1] + self.net[:, 1:, :-1] + self.net[:, :-1, 1:] + self.net[:, 1:, 1:]) / 4
            if np.abs(mean - middle).max() * unit_m <= MAX_PLACEMENT_ERROR_M:
                return
            meshes *= 2
            assert meshes < 1 << 13, f"projection {crs.name!r} -> {grid.crs.name!r} is not smooth on the grid"

    def _nodes(self, steps: Floats) -> Floats:
        assert self.forward is not None
        y, x = np.meshgrid(self.y0 + steps * self.dy, self.x0 + steps * self.dx, indexing="ij")
        return np.stack(self.forward.transform(x, y))

    def misses(self, low: Floats, high: Floats) -> bool:
        """Whether a box in the file's CRS lies wholly outside."""
        box = (low[0], low[1], high[0], high[1])
        left, bottom, right, top = self.bounds
        if self.forward is not None:
            left, bottom = self.x0, self.y0
            right, top = left + self.dx * (self.net.shape[2] - 1), bottom + self.dy * (self.net.shape[1] - 1)
        return bool(box[0] > right or box[2] < left or box[1] > top or box[3] < bottom)

    def near(self, x: Floats, y: Floats) -> NDArray[np.bool_]:
        """Which points in the grid's CRS lie on the grid or its margin; NaN does not."""
        left, bottom, right, top = self.bounds
        return (x >= left) & (x <= right) & (y >= bottom) & (y <= top)

    def __call__(self, x: Floats, y: Floats) -> tuple[Floats, Floats]:
        if self.forward is None:
            return x, y
        out = np.empty((2, x.size))
        _interpolate_net(x, y, self.net, self.x0, self.y0, self.dx, self.dy, out)
        return out[0], out[1]


# --- ground ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Surface:
    """Elevations at the centres of square cells; row 0 is north."""

    z_m: Floats
    left: float
    top: float
    cell: float

    @classmethod
    def flat(cls) -> _Surface:
        return cls(z_m=np.zeros((1, 1)), left=0.0, top=0.0, cell=1.0)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _GroundCells:
    """What the first pass gathers per ground cell.

    Planes of `total` and `low`: z_m, and the offsets of the point from the cell's centre along columns and rows, in cells.
    """

    left: float
    top: float
    cell: float
    count: NDArray[np.int32]
    total: Floats
    """Sums over the ground returns."""
    low: NDArray[np.float32]
    """The lowest return; the first of equals."""

    @classmethod
    def around(cls, grid: Grid, cell: float, metres_per_unit: float) -> _GroundCells:
        # Whole blocks from the origin of the CRS, so that cells and noise blocks do not depend on the grid's corner.
        block = cell * _block_cells(cell * metres_per_unit)
        margin = MARGIN_M / metres_per_unit
        left, bottom, right, top = grid.bounds
        col0, col1 = math.floor((left - margin) / block), math.ceil((right + margin) / block)
        row0, row1 = math.floor(-(top + margin) / block), math.ceil(-(bottom - margin) / block)
        per = _block_cells(cell * metres_per_unit)
        shape = ((row1 - row0) * per, (col1 - col0) * per)
        return cls(
            left=col0 * block,
            top=-row0 * block,
            cell=cell,
            count=np.zeros(shape, np.int32),
            total=np.zeros((3, *shape)),
            low=np.full((3, *shape), np.nan, np.float32),
        )


def _block_cells(cell_m: float) -> int:
    """Cells along one side of a block of about 20 m."""
    return max(2, round(20 / cell_m))


def _low_noise(z_m: Floats, cell_m: float) -> NDArray[np.bool_]:
    """Cells whose lowest return is noise: more than `MAX_BELOW_GROUND_M` below the third lowest cell of its 20 m block.

    Why the third: under dense canopy true ground shows in a few cells only, far below their neighbours, so being lower
    than the neighbours proves nothing; being alone does.
    """
    per = _block_cells(cell_m)
    rows, cols = z_m.shape
    blocks = np.where(np.isfinite(z_m), z_m, np.inf).reshape(rows // per, per, cols // per, per)
    third = np.partition(blocks.swapaxes(1, 2).reshape(rows // per, cols // per, -1), 2, axis=-1)[..., 2]
    third = np.where(np.isfinite(third), third, -np.inf)  # fewer than three cells: nothing to compare with
    return np.asarray(z_m < third.repeat(per, 0).repeat(per, 1) - MAX_BELOW_GROUND_M)


def _morphological_ground(z_m: Floats, options: LidarOptions) -> NDArray[np.bool_]:
    """Which cells of lowest returns are ground, by openings with growing windows.

    An opening with a window wider than an object removes the object and leaves a plane, however steep, as it is. A cell
    that an opening lowers by more than slope * window radius is an object. Zhang et al. 2003 (IEEE TGRS 41, 872-882), with
    the linear thresholds of Pingel et al. 2013 (ISPRS J. 77, 21-30); the radii grow by about a quarter instead of by one
    cell, 9 openings for a window of 40 cells.
    """
    ground = np.isfinite(z_m)
    surface = _membrane(z_m)
    radius, last = 1, max(1, round(options.filter_window_m / options.ground_cell_m / 2))
    while radius <= last:
        side = 2 * radius + 1
        opened = ndimage.grey_opening(surface, size=(side, side), mode="nearest")
        ground &= surface - opened <= options.filter_slope * radius * options.ground_cell_m
        surface = opened
        radius = last if radius < last < radius * 1.25 + 1 else math.ceil(radius * 1.25 + 0.5)
    return ground


def _plane(z_m: Floats) -> Floats:
    """The plane through the known cells by least squares, at all cells."""
    rows, cols = np.nonzero(np.isfinite(z_m))
    middle = rows.mean(), cols.mean()
    steps = np.column_stack([np.ones(rows.size), rows - middle[0], cols - middle[1]])
    # By the normal equations; a single row or column of cells leaves one slope open, which `pinv` sets to 0.
    level, per_row, per_col = np.linalg.pinv(steps.T @ steps) @ (steps.T @ z_m[rows, cols])
    return np.asarray(
        level + per_row * (np.arange(z_m.shape[0]) - middle[0])[:, None] + per_col * (np.arange(z_m.shape[1]) - middle[1])
    )


def _centred(place: Floats) -> Floats:
    """Elevations at all cell centres from (z_m, column offset, row offset) of one return per cell, NaN where there is none.

    The slope comes from a first surface smoothed over about five cells; without it a lowest return, which lies at the
    lower edge of its cell, would pull steep ground down by half a cell times the slope.
    """
    plane = _plane(place[0])  # where the ground ends on a slope a membrane sags; what the plane leaves over does not
    first = ndimage.gaussian_filter(_membrane(place[0] - plane), 2.0, mode="nearest") + plane
    rise_row, rise_col = np.gradient(first)
    return _membrane(place[0] - rise_col * place[1] - rise_row * place[2] - plane) + plane


def _membrane(z_m: Floats, sweeps: int = 24) -> Floats:
    """`z_m` with its NaN replaced by a membrane stretched between the known cells (Laplace's equation), coarse to fine.

    A plane stays a plane across a gap. At least one cell must be known.
    """
    known = np.isfinite(z_m)
    assert known.any(), "membrane needs a known cell"
    if known.all():
        return z_m.copy()
    rows, cols = z_m.shape
    if max(rows, cols) <= 2:
        return np.where(known, z_m, z_m[known].mean())
    half = ((rows + 1) // 2, (cols + 1) // 2)
    pairs = np.full((half[0] * 2, half[1] * 2), np.nan)
    pairs[:rows, :cols] = z_m
    quads = pairs.reshape(half[0], 2, half[1], 2)
    n = np.isfinite(quads).sum(axis=(1, 3))
    coarse = np.divide(np.nansum(quads, axis=(1, 3)), n, out=np.full(half, np.nan), where=n > 0)
    coarse = _membrane(coarse, sweeps)
    places = np.meshgrid((np.arange(rows) - 0.5) / 2, (np.arange(cols) - 0.5) / 2, indexing="ij")
    out = np.where(known, z_m, ndimage.map_coordinates(coarse, places, order=1, mode="nearest"))
    _relax(out, known, sweeps)
    return out


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
    return np.where(fill, _membrane(chm.astype(np.float64)), chm).astype(np.float32), int(np.count_nonzero(fill))


# --- inner loops -------------------------------------------------------------------------------------------------------

_REFUSED = ("noise", "excluded_class", "withheld", "outside_grid")
"""Why the reader leaves a point out, the first that holds."""
_FATES = ("used", "outside_grid", "no_ground", "above_max_height", "below_ground", "negative")
"""What `_highest` counts; "negative" are among the used."""


def _compiled(function: _F) -> _F:
    return cast("_F", njit(cache=True, nogil=True)(function))


@_compiled
def _interpolate_net(  # noqa: PLR0917 - compiled loops take plain arrays and numbers
    x: Floats, y: Floats, net: Floats, x0: float, y0: float, dx: float, dy: float, out: Floats
) -> None:
    rows, cols = net.shape[1] - 1, net.shape[2] - 1
    for i in range(x.size):
        u, v = (x[i] - x0) / dx, (y[i] - y0) / dy
        if not (0.0 <= u <= cols and 0.0 <= v <= rows):
            out[0, i] = out[1, i] = np.nan
            continue
        c, r = min(int(u), cols - 1), min(int(v), rows - 1)
        u, v = u - c, v - r
        for k in range(2):
            low = net[k, r, c] + u * (net[k, r, c + 1] - net[k, r, c])
            high = net[k, r + 1, c] + u * (net[k, r + 1, c + 1] - net[k, r + 1, c])
            out[k, i] = low + v * (high - low)


@_compiled
def _sum_ground(  # noqa: PLR0917 - compiled loops take plain arrays and numbers
    x: Floats,
    y: Floats,
    z_m: NDArray[np.float32],
    is_ground: NDArray[np.bool_],
    left: float,
    top: float,
    cell: float,
    count: NDArray[np.int32],
    total: Floats,
    seen: NDArray[np.int64],
) -> None:
    rows, cols = count.shape
    for i in range(x.size):
        u, v = (x[i] - left) / cell, (top - y[i]) / cell
        if 0.0 <= u < cols and 0.0 <= v < rows:
            seen[1] += 1
            if is_ground[i]:
                c, r = int(u), int(v)
                seen[0] += 1
                count[r, c] += 1
                total[0, r, c] += z_m[i]
                total[1, r, c] += u - c - 0.5
                total[2, r, c] += v - r - 0.5


@_compiled
def _lowest(  # noqa: PLR0917 - compiled loops take plain arrays and numbers
    x: Floats, y: Floats, z_m: NDArray[np.float32], left: float, top: float, cell: float, low: NDArray[np.float32]
) -> None:
    rows, cols = low.shape[1:]
    for i in range(x.size):
        u, v = (x[i] - left) / cell, (top - y[i]) / cell
        if 0.0 <= u < cols and 0.0 <= v < rows:
            c, r = int(u), int(v)
            if not z_m[i] >= low[0, r, c]:  # NaN, no return yet, is not >=
                low[0, r, c] = z_m[i]
                low[1, r, c] = u - c - 0.5
                low[2, r, c] = v - r - 0.5


@_compiled
def _relax(z_m: Floats, known: NDArray[np.bool_], sweeps: int) -> None:
    """Gauss-Seidel sweeps of Laplace's equation, over-relaxed but for the last four, which smooth what that roughens."""
    rows, cols = z_m.shape
    for sweep in range(sweeps):
        step = 1.5 if sweep < sweeps - 4 else 1.0
        for r in range(rows):
            for c in range(cols):
                if known[r, c]:
                    continue
                total, n = 0.0, 0
                if r > 0:
                    total, n = total + z_m[r - 1, c], n + 1
                if r < rows - 1:
                    total, n = total + z_m[r + 1, c], n + 1
                if c > 0:
                    total, n = total + z_m[r, c - 1], n + 1
                if c < cols - 1:
                    total, n = total + z_m[r, c + 1], n + 1
                z_m[r, c] += step * (total / n - z_m[r, c])


@_compiled
def _highest(  # noqa: PLR0917 - compiled loops take plain arrays and numbers
    x: Floats,
    y: Floats,
    z_m: NDArray[np.float32],
    to_pixel: Floats,
    ground_m: Floats,
    left: float,
    top: float,
    cell: float,
    max_height_m: float,
    radius_px: Floats,
    chm: NDArray[np.float32],
    counts: NDArray[np.int64],
) -> None:
    rows, cols = chm.shape
    last_row, last_col = ground_m.shape[0] - 1, ground_m.shape[1] - 1
    radius_c, radius_r = radius_px
    for i in range(x.size):
        col = to_pixel[0] * x[i] + to_pixel[1] * y[i] + to_pixel[2]
        row = to_pixel[3] * x[i] + to_pixel[4] * y[i] + to_pixel[5]
        if not (-radius_c <= col < cols + radius_c and -radius_r <= row < rows + radius_r):  # NaN is outside
            counts[1] += 1
            continue
        # Bilinear ground.
        u = min(max((x[i] - left) / cell - 0.5, 0.0), float(last_col))
        v = min(max((top - y[i]) / cell - 0.5, 0.0), float(last_row))
        c0, r0 = int(u), int(v)
        c1, r1 = min(c0 + 1, last_col), min(r0 + 1, last_row)
        u, v = u - c0, v - r0
        north = ground_m[r0, c0] + u * (ground_m[r0, c1] - ground_m[r0, c0])
        south = ground_m[r1, c0] + u * (ground_m[r1, c1] - ground_m[r1, c0])
        height = z_m[i] - (north + v * (south - north))
        if np.isnan(height):
            counts[2] += 1
            continue
        if height > max_height_m:
            counts[3] += 1
            continue
        if height < -MAX_BELOW_GROUND_M:
            counts[4] += 1
            continue
        if radius_c == 0.0:
            c, r = int(col), int(row)
            touched = True
            if not chm[r, c] >= max(height, 0.0):
                chm[r, c] = max(height, 0.0)
        else:
            touched = False
            for r in range(max(0, math.floor(row - radius_r)), min(rows - 1, math.floor(row + radius_r)) + 1):
                for c in range(max(0, math.floor(col - radius_c)), min(cols - 1, math.floor(col + radius_c)) + 1):
                    # Distance to the nearest point of the pixel, in radii.
                    away_c = max(c - col, 0.0, col - (c + 1)) / radius_c
                    away_r = max(r - row, 0.0, row - (r + 1)) / radius_r
                    if away_c * away_c + away_r * away_r <= 1.0:
                        touched = True
                        if not chm[r, c] >= max(height, 0.0):
                            chm[r, c] = max(height, 0.0)
        if touched:
            counts[0] += 1
            if height < 0.0:
                counts[5] += 1
        else:
            counts[1] += 1


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

"""Points as the tiler knows them, and how LAS records become points: fields, CRS, unit of z, and files of either kind.

Units. x, y and z stay in the units of the file. z is in the unit of the vertical axis where the file names one (the
vertical part of a compound CRS, a third axis, or the GeoTIFF keys 4096 and 4099); a projected CRS that names none has z
in the unit of x and y, which is how clouds in feet are delivered (EPSG:2994 is international feet in all three). Nothing
else is assumed: a cloud without CRS, or with longitude and latitude and no vertical unit, is refused; so is one in web
mercator, in which nobody delivers: its x and y were reprojected, its z may well be in feet still, as in many of the USGS'
Entwine folders (https://github.com/hobuinc/usgs-lidar/issues/10).
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, cast

import numpy as np
from numpy.typing import NDArray
from pyproj import CRS
from pyproj.exceptions import CRSError

from canopy.errors import LidarError

if TYPE_CHECKING:
    import laspy

Floats = NDArray[np.float64]
Bounds = tuple[float, float, float, float]
"""left, bottom, right, top; the edges belong to it."""

CHUNK_POINTS = 1_000_000

# laspy logs what it also raises; without a handler of its own that would be a second line beside ours.
logging.getLogger("laspy").addHandler(logging.NullHandler())


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class RawPoints:
    """Points as delivered: n of them, in the units of their source; n may be 0."""

    x: Floats
    y: Floats
    z: Floats
    classification: NDArray[np.uint8]
    """ASPRS class."""
    return_number: NDArray[np.uint8]
    """1 is the first return of its pulse; 0 where the producer left it out."""
    number_of_returns: NDArray[np.uint8]
    withheld: NDArray[np.bool_]
    """The producer asks that the point be not used."""
    decoded: int
    """Points decoded to get these; the rest lies outside the bounds asked for."""
    overlap: NDArray[np.bool_] | None = None
    """Between flight lines, by its flag or, in formats below 6, class 12; None where the format knows of no such thing."""
    gps_time_s: Floats | None = None
    """Adjusted standard GPS time as stored, seconds since the GPS epoch less 1e9; None where the source has no GPS time or
    only seconds of an unnamed week, or where it was not asked for."""

    @property
    def size(self) -> int:
        """How many points."""
        return self.x.size


class PointSource(Protocol):
    """Where points come from: a LAS or LAZ file, a COPC file or an EPT, local or behind HTTP.

    A source is a value: it holds what its header says and no open file, can be pickled and read by several processes.
    """

    @property
    def name(self) -> str:
        """The path or link that messages name; without the signature of a signed link."""

    @property
    def crs(self) -> CRS | None:
        """As the source names it, None where it does not; LidarError where it is not understood. See `crs_of`."""

    @property
    def z_unit_m(self) -> float | None:
        """Metres per unit of z where the source names it beside its CRS, else None; may read files. See `z_unit_m_of`."""

    @property
    def bounds(self) -> Bounds:
        """Of all points, in the unit of x and y, as the header has them."""

    @property
    def point_count(self) -> int:
        """Points in all, at least 1."""

    def chunks(
        self,
        bounds: Bounds | None = None,
        spacing: float | None = None,
        chunk_points: int = CHUNK_POINTS,
        *,
        gps_time: bool = True,
    ) -> Iterator[RawPoints]:
        """The points within `bounds`, at most `chunk_points` at a time, always in the same order.

        Args:
            bounds: left, bottom, right, top in the source's CRS; points on the edges are in. None: all points.
            spacing: mean distance between points that is close enough, in the unit of x and y. A source with levels of
                detail leaves out the levels that are finer; one without, a plain LAS or LAZ file, has all its points in
                one level and gives them all.
            chunk_points: most points in a chunk.
            gps_time: whether the times of the points are of use; without them decoding takes less time.

        Raises:
            LidarError: the points cannot be read whole: the file breaks off, a part of it is missing, a server refuses.
        """


# --- CRS and units -----------------------------------------------------------------------------------------------------


def crs_of(source: PointSource, crs: CRS | None = None) -> CRS:
    """CRS of a source: `crs`, the user's word, before the source's own.

    Raises:
        LidarError: neither says it, or the source's is not understood.
    """
    if (found := crs or source.crs) is None:
        raise LidarError(f"{source.name} has no CRS in its header; give it with option crs, for example EPSG:32610")
    return found


def z_unit_m_of(source: PointSource, crs: CRS | None = None) -> float:
    """Metres per unit of z by the rule in the module's docstring.

    Args:
        source: the points.
        crs: the user's word in place of the source's CRS; the source's other hints about z then do not count either.

    Raises:
        LidarError: nothing says it.
    """
    found = crs_of(source, crs)
    for part in found.sub_crs_list if found.is_compound else [found]:
        for axis in unbound(part).axis_info:
            if axis.direction in ("up", "down"):
                return float(axis.unit_conversion_factor)
    if crs is None and (unit_m := source.z_unit_m) is not None:
        return unit_m
    plane = unbound(horizontal(found))
    operation = plane.coordinate_operation
    if not plane.is_projected or (operation and "Pseudo" in operation.method_name):
        raise LidarError(
            f"{source.name}: CRS {found.name!r} says nothing about the unit of z; give option z_unit_m, 1.0 for metres"
        )
    return float(plane.axis_info[0].unit_conversion_factor)


def horizontal(crs: CRS) -> CRS:
    """The part of a CRS that places x and y."""
    if crs.is_compound:
        crs = crs.sub_crs_list[0]
    return crs if len(crs.axis_info) == 2 else crs.to_2d()


def unbound(crs: CRS) -> CRS:
    """A CRS without the datum shift that may be tied to it."""
    return crs.source_crs if crs.is_bound and crs.source_crs is not None else crs


def header_crs(header: laspy.LasHeader, name: str) -> CRS | None:
    """What the header of a LAS file says about the CRS."""
    try:
        return cast("CRS | None", header.parse_crs())
    except CRSError as error:
        raise LidarError(f"{name}: CRS in the header is not understood ({first_line(error)}); give option crs") from error


def header_z_unit_m(header: laspy.LasHeader, name: str) -> float | None:
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
            raise LidarError(f"{name}: unit {code} of z (GeoTIFF key 4099) is not known; give option z_unit_m")
        return units[code]
    if (code := keys.get(4096, 0)) not in undefined:
        try:
            return float(CRS.from_epsg(code).axis_info[-1].unit_conversion_factor)
        except CRSError as error:
            raise LidarError(f"{name}: vertical CRS {code} (GeoTIFF key 4096) is not known; give option z_unit_m") from error
    return None


# --- records -----------------------------------------------------------------------------------------------------------


def wanted_fields(*, standard_time: bool = True) -> laspy.DecompressionSelection:
    """The fields that `RawPoints` has; formats 6 and up store fields apart and need not decode the others.

    Args:
        standard_time: with GPS time, which is of no use unless `has_standard_time`.
    """
    import laspy

    fields = laspy.DecompressionSelection
    wanted = fields.XY_RETURNS_CHANNEL | fields.Z | fields.CLASSIFICATION | fields.FLAGS
    return wanted | fields.GPS_TIME if standard_time else wanted


def has_standard_time(header: laspy.LasHeader) -> bool:
    """Whether the GPS times of a file tell days."""
    from laspy.header import GpsTimeType

    return "gps_time" in header.point_format.dimension_names and header.global_encoding.gps_time_type == GpsTimeType.STANDARD


def points_within(
    record: laspy.PackedPointRecord, scales: Floats, offsets: Floats, bounds: Bounds | None, *, standard_time: bool = False
) -> RawPoints:
    """The points of one record of a LAS file, scaled, within `bounds`; `standard_time` is `has_standard_time`."""
    # Copies throughout, so that the record, which has more fields, need not be kept.
    x, y, z = (record[axis] * scale for axis, scale in zip("XYZ", scales, strict=True))
    x += offsets[0]
    y += offsets[1]
    z += offsets[2]
    classes = np.array(record["classification"], np.uint8)
    flagged = "overlap" in record.point_format.dimension_names
    times = {"gps_time_s": np.array(record["gps_time"], np.float64)} if standard_time else {}
    return clipped(
        {
            **times,
            "overlap": np.asarray(record["overlap"], bool) if flagged else classes == 12,
            "x": x,
            "y": y,
            "z": z,
            "classification": classes,
            "return_number": np.asarray(record["return_number"], np.uint8),
            "number_of_returns": np.asarray(record["number_of_returns"], np.uint8),
            "withheld": np.asarray(record["withheld"], bool),
        },
        bounds,
    )


def clipped(fields: Mapping[str, NDArray[Any]], bounds: Bounds | None) -> RawPoints:
    """The points within `bounds`, edges in, out of arrays named as the fields of `RawPoints`."""
    x, y = fields["x"], fields["y"]
    if bounds is not None:
        left, bottom, right, top = bounds
        inside = (x >= left) & (x <= right) & (y >= bottom) & (y <= top)
        if not inside.all():
            fields = {name: values[inside] for name, values in fields.items()}
    return RawPoints(**fields, decoded=x.size)


def checked(bounds: Bounds | None, spacing: float | None, chunk_points: int) -> Bounds | None:
    """`bounds` of a request for points that makes sense."""
    if chunk_points < 1:
        raise LidarError(f"chunk_points = {chunk_points} must be 1 or more")
    if spacing is not None and not (math.isfinite(spacing) and spacing > 0):
        raise LidarError(f"spacing = {spacing} must be a finite number above 0; leave it out for all points")
    if bounds is None:
        return None
    left, bottom, right, top = bounds
    if not (all(map(math.isfinite, bounds)) and left <= right and bottom <= top):
        raise LidarError(
            f"bounds {tuple(bounds)} are not left, bottom, right, top in finite numbers; put them in that order"
        )
    return left, bottom, right, top


def apart(a: Bounds, b: Bounds) -> bool:
    """Whether two boxes have no point in common."""
    return a[0] > b[2] or a[2] < b[0] or a[1] > b[3] or a[3] < b[1]


def header_bounds(header: laspy.LasHeader, name: str) -> Bounds:
    """The box of all points by the header of a LAS file."""
    (left, bottom), (right, top) = map(float, header.mins[:2]), map(float, header.maxs[:2])
    if not (all(map(math.isfinite, (left, bottom, right, top))) and left <= right and bottom <= top):
        raise LidarError(
            f"{name}: box ({left}, {bottom}, {right}, {top}) in the header is no box; write the file anew, for example "
            f"with pdal translate"
        )
    return left, bottom, right, top


def breaks_off(name: str, read: int, promised: int, error: Exception | None) -> LidarError:
    """The error of a file with fewer points than its header promises."""
    why = f" ({first_line(error)})" if error else ""
    return LidarError(f"{name} breaks off after {read} of {promised} points{why}; fetch it again")


def unreadable(name: str, error: Exception) -> LidarError:
    """The error of a file that no LAS reader understands."""
    return LidarError(f"{name} is not a readable LAS or LAZ file ({first_line(error)}); fetch it again")


def first_line(error: Exception) -> str:
    """What an error of a library says, short enough to stand in a message of ours."""
    return (str(error).strip() or type(error).__name__).splitlines()[0][:120]


# --- files -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class LasFile:
    """A plain LAS or LAZ file: one level of detail, read from the first point to the last."""

    path: Path
    header: laspy.LasHeader = field(repr=False)

    @classmethod
    def open(cls, path: Path) -> LasFile:
        """Read the header.

        Raises:
            LidarError: no file, not LAS, or no points in it.
        """
        import laspy

        if not path.is_file():
            raise LidarError(f"{path} does not exist or is not a file; give a LAS or LAZ file")
        try:
            with laspy.open(path) as reader:
                header = reader.header
        except Exception as error:  # laspy, lazrs, struct and numpy each raise their own on malformed bytes
            raise unreadable(str(path), error) from error
        if not header.point_count:
            raise LidarError(f"{path} holds 0 points; leave it out")
        return cls(path=path, header=header)

    @property
    def name(self) -> str:
        """See `PointSource`."""
        return str(self.path)

    @property
    def crs(self) -> CRS | None:
        """See `PointSource`."""
        return header_crs(self.header, self.name)

    @property
    def z_unit_m(self) -> float | None:
        """See `PointSource`."""
        return header_z_unit_m(self.header, self.name)

    @property
    def bounds(self) -> Bounds:
        """See `PointSource`."""
        return header_bounds(self.header, self.name)

    @property
    def point_count(self) -> int:
        """See `PointSource`."""
        return int(self.header.point_count)

    def chunks(
        self,
        bounds: Bounds | None = None,
        spacing: float | None = None,
        chunk_points: int = CHUNK_POINTS,
        *,
        gps_time: bool = True,
    ) -> Iterator[RawPoints]:
        """See `PointSource`; all points are decoded unless the whole file lies outside `bounds`."""
        import laspy

        bounds = checked(bounds, spacing, chunk_points)
        if bounds is not None and apart(self.bounds, bounds):
            return
        try:
            wanted = wanted_fields(standard_time=gps_time and has_standard_time(self.header))
            reader = laspy.open(self.path, decompression_selection=wanted)
        except Exception as error:  # as above; the file was replaced since
            raise unreadable(self.name, error) from error
        with reader:
            scales, offsets = reader.header.scales, reader.header.offsets
            standard_time = gps_time and has_standard_time(reader.header)
            read, promised = 0, int(reader.header.point_count)
            while read < promised:
                try:
                    record = reader.read_points(chunk_points)
                    points = points_within(record, scales, offsets, bounds, standard_time=standard_time)
                except Exception as error:  # as above
                    raise breaks_off(self.name, read, promised, error) from error
                if not points.decoded:
                    raise breaks_off(self.name, read, promised, None)
                read += points.decoded
                yield points

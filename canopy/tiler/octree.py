"""Points in an octree: COPC files and EPT folders, of which only the nodes that an area and a spacing need are read.

Both cut a cube into eight again and again. Every node holds some points of its cube, the nodes below it the further
ones: the points of all levels down to d together lie about (spacing of the root) / 2^d apart. So an area needs the
nodes whose cube touches it, and a spacing ends the descent.

COPC 1.0: https://copc.io; EPT 1.1: https://entwine.io/en/latest/entwine-point-tile.html
"""

from __future__ import annotations

import io
import json
import math
import re
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, fields
from itertools import islice
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from pyproj import CRS
from pyproj.exceptions import CRSError

from canopy.errors import LidarError
from canopy.tiler.byteranges import Bytes, Folder, RefusedError, ahead
from canopy.tiler.las import (
    CHUNK_POINTS,
    Bounds,
    Floats,
    RawPoints,
    apart,
    breaks_off,
    checked,
    clipped,
    first_line,
    has_standard_time,
    header_bounds,
    header_crs,
    header_z_unit_m,
    points_within,
    unreadable,
    wanted_fields,
)

if TYPE_CHECKING:
    import laspy

HEAD_BYTES = 1 << 16
"""Fetched first of a COPC file: its header and, nearly always, all records before the points."""
MAX_GAP_BYTES = 1 << 15
"""Unwanted bytes between two nodes that are fetched along, which costs less than another request."""
MAX_REQUEST_BYTES = 1 << 22
"""Nodes that lie side by side are fetched together up to this."""
MAX_SOURCE_FILES = 256
"""Files of metadata of an EPT that are read to learn the unit of z; with more of them the user has to say it."""
MAX_LEVEL = 31
"""Deeper than any file; a node below it is a sign of a broken hierarchy."""


class _Cube(NamedTuple):
    """The root node of an octree."""

    left: float
    bottom: float
    side: float
    spacing: float
    """Of the root's points."""
    step: tuple[float, float]
    """Resolution of x and y: so far a rounded point may lie outside its node."""

    def levels(self, spacing: float | None) -> int:
        """How many levels have to be read for points `spacing` apart, the root among them."""
        if spacing is None:
            return MAX_LEVEL + 1
        return min(MAX_LEVEL, max(0, math.ceil(math.log2(self.spacing / spacing)))) + 1

    def touched(self, key: NDArray[np.int64], bounds: Bounds | None) -> NDArray[np.bool_]:
        """Which nodes touch `bounds`; `key` is (n, 3): level, x, y."""
        if bounds is None:
            return np.ones(len(key), bool)
        side = self.side / 2.0 ** key[:, 0]
        left, bottom = self.left + key[:, 1] * side, self.bottom + key[:, 2] * side
        dx, dy = self.step
        return (
            (left - dx <= bounds[2])
            & (left + side + dx >= bounds[0])
            & (bottom - dy <= bounds[3])
            & (bottom + side + dy >= bounds[1])
        )


def _regrouped(pieces: Iterator[RawPoints], chunk_points: int) -> Iterator[RawPoints]:
    """The same points in the same order, in chunks of `chunk_points` and a last one with the rest."""
    waiting: list[RawPoints] = []
    held = 0
    for piece in pieces:
        waiting.append(piece)
        held += piece.size
        while held >= chunk_points:
            whole = _joined(waiting)
            # The points left out count with the first part.
            yield _part(whole, slice(0, chunk_points), whole.decoded - whole.size)
            held -= chunk_points
            waiting = [_part(whole, slice(chunk_points, None), 0)] if held else []
    if waiting:
        yield _joined(waiting)


_ARRAYS = tuple(f.name for f in fields(RawPoints) if f.name != "decoded")


def _joined(pieces: Sequence[RawPoints]) -> RawPoints:
    if len(pieces) == 1:
        return pieces[0]
    arrays: dict[str, Any] = {}
    for name in _ARRAYS:
        parts = [getattr(p, name) for p in pieces]
        # What one of the pieces does not know is not known of the whole.
        arrays[name] = None if any(part is None for part in parts) else np.concatenate(parts)
    return RawPoints(**arrays, decoded=sum(p.decoded for p in pieces))


def _part(points: RawPoints, where: slice, left_out: int) -> RawPoints:
    values = {name: getattr(points, name) for name in _ARRAYS}
    arrays: dict[str, Any] = {name: None if array is None else array[where] for name, array in values.items()}
    return RawPoints(**arrays, decoded=arrays["x"].size + left_out)


# --- COPC --------------------------------------------------------------------------------------------------------------

_ENTRY = np.dtype(
    [("level", "<i4"), ("x", "<i4"), ("y", "<i4"), ("z", "<i4"), ("offset", "<u8"), ("size", "<i4"), ("count", "<i4")]
)
"""A line of a page of the hierarchy. count -1: `offset` and `size` are those of the page that goes on from there."""


def is_copc(head: bytes) -> bool:
    """Whether a file that starts so is COPC: LAS whose first record is COPC's own."""
    return head[:4] == b"LASF" and head[377:381] == b"copc" and head[393:395] == b"\x01\x00"


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class CopcFile:
    """A COPC file, local or behind HTTP. See `canopy.tiler.las.PointSource`."""

    file: Bytes
    header: laspy.LasHeader = field(repr=False)
    cube: _Cube
    root: NDArray[Any] = field(repr=False)
    """First page of the hierarchy, `_ENTRY`s."""
    laszip: bytes = field(repr=False)
    """How the points are compressed, for the decoder."""
    late_wkt: str | None = field(repr=False)
    """CRS in a record behind the points."""

    @classmethod
    def open(cls, file: Bytes) -> CopcFile:
        """Read the header and the first page of the hierarchy.

        Raises:
            LidarError: the file is not COPC, broken or empty.
        """
        import laspy

        head = file.read(0, min(HEAD_BYTES, file.size))
        if not is_copc(head):
            raise LidarError(f"{file.name} is not a COPC file; give it to open_points, which knows plain LAS and LAZ too")
        (before_points,) = struct.unpack_from("<I", head, 96)
        if before_points > len(head):
            head += file.read(len(head), before_points - len(head))
        try:
            header = laspy.LasHeader.read_from(io.BytesIO(head))
            info = header.vlrs[0]
            laszip = bytes(header.vlrs.get("LasZipVlr")[0].record_data)
            x, y = map(float, info.center[:2])
            half, spacing = float(info.halfsize), float(info.spacing)
            place, size = int(info.hierarchy_root_offset), int(info.hierarchy_root_size)
        except Exception as error:  # laspy, struct and numpy each raise their own on malformed bytes
            raise unreadable(file.name, error) from error
        if not header.point_count:
            raise LidarError(f"{file.name} holds 0 points; leave it out")
        if not (math.isfinite(x) and math.isfinite(y) and 0 < half < math.inf and 0 < spacing < math.inf):
            raise LidarError(
                f"{file.name}: COPC record with centre ({x}, {y}), half side {half}, spacing {spacing} makes no octree; "
                f"fetch it again"
            )
        scales = header.scales
        return cls(
            file=file,
            header=header,
            cube=_Cube(x - half, y - half, 2 * half, spacing, (float(scales[0]), float(scales[1]))),
            root=_page(file, place, size),
            laszip=laszip,
            late_wkt=_late_wkt(file, head) if not header.vlrs.get_by_id("LASF_Projection") else None,
        )

    @property
    def name(self) -> str:
        """See `PointSource`."""
        return self.file.name

    @property
    def crs(self) -> CRS | None:
        """See `PointSource`."""
        if self.late_wkt is None:
            return header_crs(self.header, self.name)
        try:
            return CRS.from_wkt(self.late_wkt)
        except CRSError as error:
            raise LidarError(f"{self.name}: CRS is not understood ({first_line(error)}); give option crs") from error

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

    def nodes(self, bounds: Bounds | None = None, spacing: float | None = None) -> NDArray[Any]:
        """The nodes with points that are needed, `_ENTRY`s in the order of the file."""
        levels = self.cube.levels(spacing)
        found: list[NDArray[Any]] = []
        seen: set[int] = set()

        def kept(page: NDArray[Any]) -> list[tuple[int, int]]:
            """Take the nodes of a page; where those pages are that go on from it."""
            key = np.stack([page["level"], page["x"], page["y"]], axis=1).astype(np.int64)
            if key[:, 0].min(initial=0) < 0 or key[:, 0].max(initial=0) > MAX_LEVEL:
                raise LidarError(f"{self.name}: its hierarchy has a node of level {key[:, 0].max()}; fetch it again")
            page = page[(page["level"] < levels) & self.cube.touched(key, bounds)]
            found.append(page[page["count"] > 0])
            further = page[page["count"] == -1]
            places = further["offset"].tolist()
            if len(set(places)) < len(places) or not seen.isdisjoint(places):
                raise LidarError(f"{self.name}: its hierarchy leads in a circle; fetch it again")
            seen.update(places)
            return list(zip(places, further["size"].tolist(), strict=True))

        pages = kept(self.root)
        while pages:
            arrive = ahead(pages, lambda page: _page(self.file, *page), self.file.connections)
            pages = [further for page in arrive for further in kept(page)]
        nodes = np.concatenate(found)
        nodes = nodes[np.argsort(nodes["offset"], kind="stable")]
        ends = nodes["offset"].astype(np.int64) + nodes["size"]
        if nodes.size and (
            nodes["size"].min() <= 0 or ends.max() > self.file.size or (ends[:-1] > nodes["offset"][1:]).any()
        ):
            raise LidarError(f"{self.name}: its hierarchy names bytes that are not its points'; fetch it again")
        listed = int(nodes["count"].astype(np.int64).sum())
        whole = bounds is None and spacing is None
        if listed > self.point_count or (whole and listed < self.point_count):
            raise LidarError(
                f"{self.name}: its hierarchy lists {listed} points, its header {self.point_count}; fetch it again"
            )
        return nodes

    def chunks(
        self,
        bounds: Bounds | None = None,
        spacing: float | None = None,
        chunk_points: int = CHUNK_POINTS,
        *,
        gps_time: bool = True,
    ) -> Iterator[RawPoints]:
        """See `PointSource`."""
        bounds = checked(bounds, spacing, chunk_points)
        if bounds is not None and apart(self.bounds, bounds):
            return
        yield from _regrouped(
            self._pieces(self.nodes(bounds, spacing), bounds, chunk_points, gps_time=gps_time), chunk_points
        )

    def _pieces(
        self, nodes: NDArray[Any], bounds: Bounds | None, chunk_points: int, *, gps_time: bool
    ) -> Iterator[RawPoints]:
        batches = list(_batches(nodes, chunk_points))
        spans = [span for batch in batches for span in _spans(batch)]
        arrive = ahead(spans, lambda span: self.file.read(span[0], span[1] - span[0]), self.file.connections)
        for batch in batches:
            spans = _spans(batch)
            yield self._decoded(batch, spans, list(islice(arrive, len(spans))), bounds, gps_time=gps_time)

    def _decoded(
        self,
        batch: NDArray[Any],
        spans: list[tuple[int, int]],
        parts: list[bytes],
        bounds: Bounds | None,
        *,
        gps_time: bool,
    ) -> RawPoints:
        import laspy
        import lazrs

        compressed, table, span = [], [], iter(zip(spans, parts, strict=True))
        (start, stop), data = next(span)
        for entry in batch:
            place, size = int(entry["offset"]), int(entry["size"])
            while place >= stop:
                (start, stop), data = next(span)
            compressed.append(memoryview(data)[place - start : place - start + size])
            table.append((int(entry["count"]), size))
        count = sum(n for n, _ in table)
        standard_time = gps_time and has_standard_time(self.header)
        try:
            points = np.empty(count * self.header.point_format.size, np.uint8)
            lazrs.decompress_points_with_chunk_table(
                b"".join(compressed), self.laszip, points, table, wanted_fields(standard_time=standard_time).to_lazrs()
            )
            record = laspy.PackedPointRecord.from_buffer(points, self.header.point_format)
        except Exception as error:  # as in `open`
            raise LidarError(
                f"{self.name}: the {count} points in bytes {spans[0][0]} to {spans[-1][1] - 1} cannot be decoded "
                f"({first_line(error)}); fetch it again"
            ) from error
        return points_within(record, self.header.scales, self.header.offsets, bounds, standard_time=standard_time)


def _page(file: Bytes, place: int, size: int) -> NDArray[Any]:
    if size <= 0 or size % _ENTRY.itemsize:
        raise LidarError(f"{file.name}: a page of its hierarchy has {size} bytes, not a multiple of 32; fetch it again")
    return np.frombuffer(file.read(place, size), _ENTRY)


def _late_wkt(file: Bytes, head: bytes) -> str | None:
    """WKT of the CRS among the extended records, which stand behind the points."""
    place, count = struct.unpack_from("<QI", head, 235)
    for _ in range(count):
        user, record, size = struct.unpack("<2x16sHQ", file.read(place, 60)[:28])
        if user.rstrip(b"\0") == b"LASF_Projection" and record == 2112:
            return file.read(place + 60, size).rstrip(b"\0").decode(errors="replace")
        place += 60 + size
    return None


def _batches(nodes: NDArray[Any], most_points: int) -> Iterator[NDArray[Any]]:
    """Consecutive nodes of at most so many points together, or a single node of more."""
    start, points = 0, 0
    for i, count in enumerate(nodes["count"].tolist()):
        if i > start and points + count > most_points:
            yield nodes[start:i]
            start, points = i, 0
        points += count
    if start < len(nodes):
        yield nodes[start:]


def _spans(nodes: NDArray[Any]) -> list[tuple[int, int]]:
    """Ranges of bytes, start and stop, that hold nodes given in the order of the file; never half a node."""
    spans: list[tuple[int, int]] = []
    for place, size in zip(nodes["offset"].tolist(), nodes["size"].tolist(), strict=True):
        stop = place + size
        if spans and place - spans[-1][1] <= MAX_GAP_BYTES and stop - spans[-1][0] <= MAX_REQUEST_BYTES:
            spans[-1] = (spans[-1][0], stop)
        else:
            spans.append((place, stop))
    return spans


# --- EPT ---------------------------------------------------------------------------------------------------------------


class _Foreign(BaseModel):
    """JSON that others write: more keys may come, those known must be right."""

    model_config = ConfigDict(frozen=True, extra="ignore")


class _Dimension(_Foreign):
    name: str
    type: Literal["signed", "unsigned", "float"]
    size: Literal[1, 2, 4, 8]
    scale: float = 1.0
    offset: float = 0.0

    @property
    def dtype(self) -> str:
        return f"<{'iuf'[('signed', 'unsigned', 'float').index(self.type)]}{self.size}"


class _Srs(_Foreign):
    authority: str | None = None
    horizontal: str | None = None
    vertical: str | None = None
    wkt: str | None = None


class _Ept(_Foreign):
    """ept.json."""

    version: str
    bounds: tuple[float, float, float, float, float, float]
    boundsConforming: tuple[float, float, float, float, float, float]  # noqa: N815 - the format's own name
    dataType: str  # noqa: N815
    hierarchyType: str = "json"  # noqa: N815
    points: int = Field(ge=0)
    span: int = Field(gt=0)
    dimensions: tuple[_Dimension, ...] = Field(alias="schema")
    srs: _Srs = _Srs()


Key = tuple[int, int, int, int]
"""level, x, y, z of a node."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class EptFolder:
    """An Entwine Point Tile folder, local or behind HTTP. See `canopy.tiler.las.PointSource`."""

    folder: Folder
    ept: _Ept = field(repr=False)

    @classmethod
    def open(cls, folder: Folder) -> EptFolder:
        """Read ept.json.

        Raises:
            LidarError: it is missing or not understood, its points are stored in a way that cannot be read, or there are
                none.
        """
        name = folder.name("ept.json")
        text = folder.read("ept.json")
        if text is None:
            raise LidarError(f"{name} is not there; give the ept.json of an EPT folder")
        try:
            ept = _Ept.model_validate_json(text)
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(map(str, first["loc"]))
            raise LidarError(
                f"{name} is not an ept.json ({where + ': ' if where else ''}{first['msg']}); check it, or fetch it again"
            ) from error
        if not ept.version.startswith("1."):
            raise LidarError(
                f"{name}: EPT version {ept.version} is not known, 1.0 and 1.1 are; convert it, for example to COPC"
            )
        if ept.dataType not in {"laszip", "binary"} or ept.hierarchyType != "json":
            stored = ept.dataType if ept.hierarchyType == "json" else f"{ept.hierarchyType} hierarchy"
            raise LidarError(
                f"{name}: points stored as {stored} cannot be read, laszip and binary can; convert it with pdal translate"
            )
        if not ept.points:
            raise LidarError(f"{name} holds 0 points; leave it out")
        left, bottom, _, right, top, _ = ept.bounds
        if not (all(map(math.isfinite, ept.bounds + ept.boundsConforming)) and right > left and top > bottom):
            raise LidarError(f"{name}: bounds {ept.bounds} are no box; fetch it again")
        if missing := {"X", "Y", "Z"} - {d.name for d in ept.dimensions}:
            raise LidarError(f"{name}: its schema has no dimension {min(missing)}; fetch it again")
        return cls(folder=folder, ept=ept)

    @property
    def name(self) -> str:
        """See `PointSource`."""
        return self.folder.name("ept.json")

    @property
    def crs(self) -> CRS | None:
        """See `PointSource`."""
        srs = self.ept.srs
        try:
            if srs.wkt:
                return CRS.from_wkt(srs.wkt)
            if srs.authority and srs.horizontal:
                codes = srs.horizontal + (f"+{srs.vertical}" if srs.vertical else "")
                return CRS.from_user_input(f"{srs.authority}:{codes}")
        except CRSError as error:
            raise LidarError(f"{self.name}: its srs is not understood ({first_line(error)}); give option crs") from error
        return None

    @property
    def z_unit_m(self) -> float | None:
        """See `PointSource`. The vertical code of srs; without one, what all files that the EPT was made of agree upon.

        Why the files: EPTs are often reprojected to web mercator, and srs then says nothing about z, which stays as it
        was. Their metadata, where kept, name the CRS that they had.
        """
        srs = self.ept.srs
        if srs.authority and srs.vertical:
            try:
                return float(CRS.from_user_input(f"{srs.authority}:{srs.vertical}").axis_info[-1].unit_conversion_factor)
            except (CRSError, IndexError) as error:
                raise LidarError(
                    f"{self.name}: vertical CRS {srs.authority}:{srs.vertical} is not known; give option z_unit_m"
                ) from error
        units = {_vertical_unit_m(metadata) for metadata in self._sources()}
        if len(units) > 1 and None not in units:
            told = " and ".join(f"{unit:g} m" for unit in sorted(filter(None, units)))
            raise LidarError(f"{self.name} is made of clouds with z in units of {told}; give z_unit_m of those in the area")
        return units.pop() if len(units) == 1 else None

    def _sources(self) -> Iterator[Any]:
        """Metadata of the files that the EPT was made of; none where they are not kept or are too many to ask."""
        listed, link = self._optional("ept-sources/manifest.json"), "metadataPath"  # version 1.1
        if listed is None:
            listed, link = self._optional("ept-sources/list.json"), "url"  # version 1.0
        entries = [e for e in listed if isinstance(e, dict)] if isinstance(listed, list) else []
        entries = [e for e in entries if e.get("points") != 0]
        files = list(dict.fromkeys(e[link] for e in entries if isinstance(e.get(link), str)))
        if not files or len(files) > MAX_SOURCE_FILES or not all(isinstance(e.get(link), str) for e in entries):
            return
        for metadata in ahead(files, lambda file: _json(self.folder, f"ept-sources/{file}"), self.folder.connections):
            if link == "url" and isinstance(metadata, dict):
                yield from metadata.values()
            else:
                yield metadata

    def _optional(self, file: str) -> Any:
        try:
            return _json(self.folder, file)
        except RefusedError:
            return None  # so some servers say that it is not there

    @property
    def bounds(self) -> Bounds:
        """See `PointSource`."""
        left, bottom, _, right, top, _ = self.ept.boundsConforming
        return left, bottom, right, top

    @property
    def point_count(self) -> int:
        """See `PointSource`."""
        return self.ept.points

    @property
    def cube(self) -> _Cube:
        """The root node."""
        left, bottom, _, right, _, _ = self.ept.bounds
        scale = {d.name: d.scale for d in self.ept.dimensions if d.type != "float"}
        return _Cube(left, bottom, right - left, (right - left) / self.ept.span, (scale.get("X", 0.0), scale.get("Y", 0.0)))

    def nodes(self, bounds: Bounds | None = None, spacing: float | None = None) -> dict[Key, int]:
        """Points of the nodes that are needed, root first."""
        cube = self.cube
        levels = cube.levels(spacing)
        found: dict[Key, int] = {}
        files: list[Key] = [(0, 0, 0, 0)]
        opened = set(files)
        while files:
            arrive = ahead(files, self._hierarchy, self.folder.connections)
            files = []
            for page in arrive:
                key = np.array(list(page), np.int64).reshape(-1, 4)[:, :3]
                for node, touched in zip(page, cube.touched(key, bounds).tolist(), strict=True):
                    if not touched or node[0] >= levels:
                        continue
                    if page[node] == -1:
                        if node in opened:
                            raise LidarError(
                                f"{self.name}: its hierarchy leads in a circle at {_text(node)}; fetch it again"
                            )
                        opened.add(node)
                        files.append(node)
                    elif page[node] > 0:
                        found[node] = page[node]
        listed = sum(found.values())
        if bounds is None and spacing is None and listed != self.point_count:
            raise LidarError(f"{self.name} promises {self.point_count} points, its hierarchy {listed}; fetch it again")
        return dict(sorted(found.items()))

    def _hierarchy(self, key: Key) -> dict[Key, int]:
        file = f"ept-hierarchy/{_text(key)}.json"
        text = _json(self.folder, file)
        if text is None:
            raise LidarError(f"{self.folder.name(file)} is not there, the hierarchy needs it; fetch the whole EPT again")
        try:
            page = {_key(k): int(n) for k, n in text.items()}
        except (ValueError, AttributeError, TypeError) as error:
            raise LidarError(
                f"{self.folder.name(file)} is not a hierarchy of an EPT ({first_line(error)}); fetch it again"
            ) from error
        return page

    def chunks(
        self,
        bounds: Bounds | None = None,
        spacing: float | None = None,
        chunk_points: int = CHUNK_POINTS,
        *,
        gps_time: bool = True,
    ) -> Iterator[RawPoints]:
        """See `PointSource`. A node that the hierarchy names and the folder lacks is an error."""
        bounds = checked(bounds, spacing, chunk_points)
        if bounds is not None and apart(self.bounds, bounds):
            return
        yield from _regrouped(self._pieces(self.nodes(bounds, spacing), bounds, gps_time=gps_time), chunk_points)

    def _pieces(self, nodes: dict[Key, int], bounds: Bounds | None, *, gps_time: bool) -> Iterator[RawPoints]:
        suffix = "laz" if self.ept.dataType == "laszip" else "bin"
        files = [f"ept-data/{_text(key)}.{suffix}" for key in nodes]
        decode = self._laszip if suffix == "laz" else self._binary
        arrive = ahead(files, self.folder.read, self.folder.connections)
        for file, count, data in zip(files, nodes.values(), arrive, strict=True):
            name = self.folder.name(file)
            if data is None:
                raise LidarError(f"{name} is not there, the hierarchy has {count} points in it; fetch the whole EPT again")
            yield decode(name, data, count, bounds, gps_time=gps_time)

    def _laszip(self, name: str, data: bytes, count: int, bounds: Bounds | None, *, gps_time: bool) -> RawPoints:
        import laspy

        try:
            with laspy.open(io.BytesIO(data), decompression_selection=wanted_fields(standard_time=gps_time)) as reader:
                held = int(reader.header.point_count)
                record = reader.read_points(-1) if held == count else None
                scales, offsets = reader.header.scales, reader.header.offsets
                standard_time = gps_time and has_standard_time(reader.header)
        except Exception as error:  # laspy, lazrs, struct and numpy each raise their own on malformed bytes
            raise unreadable(name, error) from error
        if record is None:
            raise LidarError(f"{name} holds {held} points, the hierarchy says {count}; fetch the whole EPT again")
        if len(record) != count:
            raise breaks_off(name, len(record), count, None)
        return points_within(record, scales, offsets, bounds, standard_time=standard_time)

    def _binary(self, name: str, data: bytes, count: int, bounds: Bounds | None, *, gps_time: bool) -> RawPoints:
        del gps_time  # bare records name no kind of time, so none is given
        dimensions = {d.name: d for d in self.ept.dimensions}
        record = np.dtype([(d.name, d.dtype) for d in self.ept.dimensions])
        if len(data) != count * record.itemsize:
            raise LidarError(
                f"{name} has {len(data)} bytes, {count} points of {record.itemsize} bytes are expected; fetch it again"
            )
        points = np.frombuffer(data, record)

        def scaled(axis: str) -> Floats:
            return np.asarray(points[axis] * dimensions[axis].scale + dimensions[axis].offset, np.float64)

        def whole(field_name: str) -> NDArray[np.uint8]:
            # Left out: 0, which ASPRS reads as "never classified" and "no returns recorded".
            return points[field_name].astype(np.uint8) if field_name in dimensions else np.zeros(count, np.uint8)

        classes, flags = whole("Classification"), whole("ClassFlags")
        withheld = whole("Withheld") if "Withheld" in dimensions else flags & 0b100
        overlap = whole("Overlap") if "Overlap" in dimensions else flags & 0b1000
        if not {"Overlap", "ClassFlags"} & dimensions.keys():
            overlap = classes == 12
        return clipped(
            {
                "x": scaled("X"),
                "y": scaled("Y"),
                "z": scaled("Z"),
                "classification": classes,
                "return_number": whole("ReturnNumber"),
                "number_of_returns": whole("NumberOfReturns"),
                "withheld": withheld.astype(bool),
                "overlap": overlap.astype(bool),
            },
            bounds,
        )


def _json(folder: Folder, file: str) -> Any:
    """A file's content, None where there is no such file."""
    text = folder.read(file)
    if text is None:
        return None
    try:
        return json.loads(text)
    except ValueError as error:
        raise LidarError(f"{folder.name(file)} is not JSON ({first_line(error)}); fetch it again") from error


def _vertical_unit_m(source: Any) -> float | None:
    """Metres per unit of z by the metadata of one file, None where they do not say it."""
    read = source.get("metadata") if isinstance(source, dict) else None
    read = read if isinstance(read, dict) else {}
    texts = [read.get("comp_spatialreference")]  # as the reader of the file names it
    for srs in (read.get("srs"), source.get("srs") if isinstance(source, dict) else None):
        if isinstance(srs, dict):
            texts += [srs.get("vertical"), srs.get("compoundwkt"), srs.get("wkt")]
    for text in texts:
        if not (isinstance(text, str) and "[" in text):
            continue
        try:
            crs = CRS.from_wkt(text)
        except CRSError:
            continue  # an unreadable text says as little as none; the others may say it
        for part in crs.sub_crs_list if crs.is_compound else [crs]:
            for axis in part.axis_info:
                if axis.direction in {"up", "down"}:
                    return float(axis.unit_conversion_factor)
    return None


def _text(key: Key) -> str:
    return "-".join(map(str, key))


def _key(text: str) -> Key:
    if not (match := re.fullmatch(r"(\d+)-(\d+)-(\d+)-(\d+)", text)) or int(match[1]) > MAX_LEVEL:
        raise ValueError(f"{text!r} is no node")
    return int(match[1]), int(match[2]), int(match[3]), int(match[4])

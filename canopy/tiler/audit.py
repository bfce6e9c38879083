"""Whether what a model is judged on has leaked into what it learns from, for any split: ours, or one made elsewhere.

Every pair of splits is compared: what trains with what chooses the model, and both with what tests it. Four kinds of leak
are looked for, each on its own evidence, so that one hole in the data does not blind the others:

- `overlap`: footprints within the buffer of each other, measured in metres on the ground;
- `content`: the same picture, also cropped, rescaled, compressed, flipped or turned (`canopy.tiler.fingerprint`);
- `lineage`: one file on both sides; heights that are the same although the places or the pictures differ, such as a canopy
  height model photographed anew by a simulation; or a declared ancestor on the other side;
- `acquisition`: one flight, image scene or, where sites are to be held out, site on both sides.

Why a shared acquisition is a warning and not a leak in a split by blocks: blocks of one flight share its light, season and
sensor by design, and such a split answers how a model does on more of the same. It says nothing about elsewhere, and the
warning says so. Where the split claims whole sites, the same finding breaks the claim and is a leak. The name of a product
alone is no acquisition: it is one together with the site and, where known, the date.

What could not be checked, because a file or a column is missing, is in the report as well.
"""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Literal

import numpy as np
import shapely
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field
from pyproj import CRS, Geod, Transformer
from pyproj.exceptions import CRSError
from scipy.spatial import cKDTree

from canopy.errors import AuditError, OutputError
from canopy.raster import open_raster
from canopy.tiler.chips import DROPPED, INDEX, RECIPE
from canopy.tiler.fingerprint import fingerprint, near_duplicates
from canopy.tiler.recipe import load_recipe
from canopy.tiler.split import BUFFER

if TYPE_CHECKING:
    import geopandas as gpd

Kind = Literal["overlap", "content", "lineage", "acquisition"]
Severity = Literal["leak", "warning"]

LEARNS_FIRST: Final = ("train", "val", "test")
"""What the first has seen must not be in the later ones. Other names of splits stand before test, in alphabetical order."""

IMAGE_COLUMNS: Final = ("image", "image_path")
HEIGHT_COLUMNS: Final = ("height", "height_path", "label", "label_path")
LINEAGE_COLUMNS: Final = ("derived_from", "lineage")
"""Columns that are used where they exist, besides `id`; the first of each line counts.

Paths are relative to the table's folder. An entry of lineage is a list, or names with a semicolon between them: ids, items,
acquisitions, digests or products.
"""

MOST_EXAMPLES: Final = 1000
"""Pairs that a finding lists, worst first; it counts them all."""

TOUCH_M: Final = 1e-3
"""Footprints this close touch."""

SCALE_ERROR: Final = 1e-3
"""Distances are right to this share. A pair at exactly the buffer is not reported for the projection it is measured in."""

NEAR_M: Final = 100_000.0
"""Up to here distances are from edge to edge, in a local projection; beyond, between corners on the ellipsoid."""

_STRIP_DEG: Final = 3.0
_EARTH_RADIUS_M: Final = 6_371_000.0
_QUANTILES: Final = (0.0, 0.01, 0.05, 0.1, 0.25, 0.5, 0.75, 0.9, 1.0)
_CURVE_POINTS: Final = 101


class AuditSettings(BaseModel):
    """What a split promises."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    buffer_m: float = Field(default=0.0, ge=0, allow_inf_nan=False)
    """Footprints of two splits must be further apart than this, edge to edge; 0 still parts those that touch."""
    by_site: bool = False
    """The split claims whole sites: a shared site or acquisition is then a leak and no warning."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Example:
    """Two chips, or what they share."""

    first: str
    """Id in the split that learns."""
    second: str
    """Id in the split that judges."""
    said: str
    """What was measured of the pair."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """One kind of evidence between two splits."""

    kind: Kind
    severity: Severity
    splits: tuple[str, str]
    """The split that learns, and the one that judges it."""
    said: str
    """What was found, in one sentence."""
    count: int
    """Pairs of chips, or shared names."""
    examples: tuple[Example, ...]
    """Worst first, at most MOST_EXAMPLES."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Profile:
    """How far the chips that judge are from the nearest ground that was learned from."""

    splits: tuple[str, str]
    quantile_m: Mapping[str, float]
    """Distance in metres, edge to edge, by the share of judging chips at most that far ("0.05")."""
    distance_m: tuple[float, ...]
    """For a plot: sorted distances ..."""
    share: tuple[float, ...]
    """... and the share of chips at most that far."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AuditReport:
    """What an audit found."""

    audited: tuple[str, ...]
    settings: AuditSettings
    chips: Mapping[str, int]
    """Number of chips by split; `buffer` and `dropped` belong to none."""
    findings: tuple[Finding, ...]
    profiles: tuple[Profile, ...]
    notes: tuple[str, ...]
    """What could not be checked, and why."""

    @property
    def clean(self) -> bool:
        """No leak; there may be warnings."""
        return not any(finding.severity == "leak" for finding in self.findings)

    def as_json(self) -> dict[str, Any]:
        """Values that JSON holds."""
        return {
            "clean": self.clean,
            "audited": list(self.audited),
            "settings": self.settings.model_dump(),
            "chips": dict(self.chips),
            "findings": [asdict(finding) for finding in self.findings],
            "profiles": [asdict(profile) for profile in self.profiles],
            "notes": list(self.notes),
        }

    def as_text(self, examples: int = 5) -> str:
        """The report to read, with the first examples of every finding."""
        claim = "whole sites" if self.settings.by_site else "blocks"
        chips = ", ".join(f"{n} {name}" for name, n in self.chips.items())
        promise = f"buffer {self.settings.buffer_m:g} m, split by {claim}"
        lines = [f"audit of {' and '.join(self.audited)}: {chips}; {promise}"]
        for finding in self.findings:
            lines.append(f"{finding.severity.upper()} {finding.kind}, {' and '.join(finding.splits)}: {finding.said}")
            lines += [f"  {e.first} - {e.second}: {e.said}" for e in finding.examples[:examples]]
            if finding.count > examples:
                lines.append(f"  and {finding.count - examples} more")
        lines += [f"not checked: {note}" for note in self.notes]
        for profile in self.profiles:
            table = ", ".join(f"{float(q):.0%} {_length(m)}" for q, m in profile.quantile_m.items())
            lines.append(f"distance from {profile.splits[1]} to the nearest {profile.splits[0]} chip: {table}")
        leaks = sum(finding.severity == "leak" for finding in self.findings)
        lines.append("no leak found" if not leaks else f"{leaks} leak{'s' if leaks > 1 else ''} found")
        return "\n".join(lines)


def _length(metres: float) -> str:
    return f"{metres:.1f} m" if metres < 1000 else f"{metres / 1000:.4g} km"


# --- the two questions -----------------------------------------------------------------------------------------------------


def audit(tile_set: Path, *, buffer_m: float | None = None, by_site: bool | None = None) -> AuditReport:
    """Look for leaks between the splits of one tile set, or of one table with a column `split`.

    Args:
        tile_set: Folder of a tile set, or a GeoParquet file with a geometry, its CRS and `split`.
        buffer_m: Buffer to check; default that of the set's recipe, 0 without one.
        by_site: Whether the split claims whole sites; default what the recipe's method says, no without one.

    Raises:
        AuditError: the table is missing, unreadable, empty, or without geometry, CRS or splits to compare.
        RecipeError, RasterError: the set's recipe or an image is broken.
    """
    table = tile_set / INDEX if tile_set.is_dir() else tile_set
    frame = _read(table)
    if "split" not in frame.columns:
        raise AuditError(
            f"{table} has no column 'split'; add it, or give two files: canopy audit TRAIN.parquet TEST.parquet"
        )
    recipe = table.parent / RECIPE
    split = load_recipe(recipe).split if table.name == INDEX and recipe.is_file() else None
    settings = _promised(
        buffer_m=buffer_m if buffer_m is not None else split.buffer_m if split else 0.0,
        by_site=by_site if by_site is not None else split is not None and split.method == "site-folds",
    )
    names = frame["split"].astype(str)
    chips = {name: int((names == name).sum()) for name in sorted(set(names), key=_rank)}
    compared = [name for name in chips if name not in (BUFFER, DROPPED)]
    if len(compared) < 2:
        raise AuditError(f"{table} holds only {', '.join(chips)}; an audit compares at least two of train, val and test")
    sides = [_side(name, frame[names == name], table) for name in compared]
    return _compare(sides, settings, audited=(str(tile_set),), chips=chips)


def _promised(*, buffer_m: float, by_site: bool) -> AuditSettings:
    if not (math.isfinite(buffer_m) and buffer_m >= 0):
        raise AuditError(f"buffer {buffer_m:g} m must be a finite length of 0 or more; give metres, for example --buffer 50")
    return AuditSettings(buffer_m=buffer_m, by_site=by_site)


def audit_pair(train: Path, test: Path, *, buffer_m: float = 0.0, by_site: bool = False) -> AuditReport:
    """Look for leaks from one table of chips into another; whoever made them.

    Args:
        train: GeoParquet file, or folder of a tile set; all its rows count as train, but for chips in no split.
        test: The same for test.
        buffer_m: Footprints must be further apart than this.
        by_site: Whether the split claims whole sites.

    Raises:
        AuditError: a table is missing, unreadable, empty, or without geometry or CRS.
        RasterError: an image that a table names cannot be read.
    """
    settings = _promised(buffer_m=buffer_m, by_site=by_site)
    sides, chips = [], {}
    for name, path in (("train", train), ("test", test)):
        table = path / INDEX if path.is_dir() else path
        frame = _read(table)
        if "split" in frame.columns and (unused := frame["split"].isin((BUFFER, DROPPED))).any():
            chips[f"{name}: in no split"] = int(unused.sum())
            frame = frame[~unused]
            if frame.empty:
                raise AuditError(f"{table} holds no chip that is in a split; give the table of the chips that {name} uses")
        chips[name] = len(frame)
        sides.append(_side(name, frame, table))
    return _compare(sides, settings, audited=(str(train), str(test)), chips=chips)


def write_report(report: AuditReport, path: Path) -> Path:
    """Write all values as JSON (name ending in .json), else the text with up to MOST_EXAMPLES pairs a finding.

    Raises:
        OutputError: the file cannot be written.
    """
    text = json.dumps(report.as_json(), indent=2) if path.suffix == ".json" else report.as_text(MOST_EXAMPLES)
    part = path.with_name(f".{path.name}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        part.write_text(text + "\n", encoding="utf-8")
        part.replace(path)
    except OSError as error:
        with suppress(OSError):
            part.unlink()
        raise OutputError(f"cannot write {path} ({error.strerror}); choose another place with --out") from error
    return path


def _rank(split: str) -> tuple[float, str]:
    return {"train": 0.0, "val": 2.0, "test": 3.0, BUFFER: 4.0, DROPPED: 5.0}.get(split, 1.0), split


def _compare(
    sides: Sequence[_Side], settings: AuditSettings, *, audited: tuple[str, ...], chips: Mapping[str, int]
) -> AuditReport:
    findings: list[Finding] = []
    profiles = []
    pictures = _all_codes([side.images for side in sides])
    heights = _all_codes([side.heights for side in sides])
    for number, judges in enumerate(sides):
        for learns in sides[:number]:
            splits = (learns.name, judges.name)
            near = _distances(learns, judges, settings.buffer_m)
            profiles.append(_profile(splits, near.nearest_m))
            ground = {(a, b) for (a, b), share in zip(near.pairs.tolist(), near.share.tolist(), strict=True) if share > 0}
            findings += _overlap(learns, judges, settings, near)
            seen, same_picture = _content(learns, judges, pictures)
            findings += seen
            findings += _lineage(learns, judges, settings, heights, ground & same_picture)
            findings += _acquisition(learns, judges, settings)
    order = {"leak": 0, "warning": 1}
    findings.sort(key=lambda finding: order[finding.severity])
    return AuditReport(
        audited=audited,
        settings=settings,
        chips=chips,
        findings=tuple(findings),
        profiles=tuple(profiles),
        notes=tuple(_unchecked(sides, pictures, heights)),
    )


def _finding(
    kind: Kind, severity: Severity, sides: tuple[_Side, _Side], said: str, found: Sequence[tuple[Any, Example]]
) -> list[Finding]:
    """A finding with its examples in the order of their keys, or none."""
    if not found:
        return []
    examples = tuple(example for _, example in sorted(found, key=lambda item: (item[0], item[1].first, item[1].second)))
    names = (sides[0].name, sides[1].name)
    return [
        Finding(
            kind=kind, severity=severity, splits=names, said=said, count=len(examples), examples=examples[:MOST_EXAMPLES]
        )
    ]  # fmt: skip


# --- tables of chips -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Side:
    """The chips of one split."""

    name: str
    table: Path
    frame: gpd.GeoDataFrame
    ids: tuple[str, ...]
    outlines: NDArray[Any]
    """(chip,) shapely geometries, longitude and latitude on WGS 84."""
    images: tuple[Path | None, ...]
    heights: tuple[Path | None, ...]

    def column(self, names: Sequence[str]) -> list[Any] | None:
        """The values of the first of these columns that exists; None for what is empty."""
        for name in names:
            if name in self.frame.columns:
                return [None if _is_empty(value) else value for value in self.frame[name].tolist()]
        return None


def _is_empty(value: Any) -> bool:
    import pandas as pd

    if isinstance(value, (list, tuple, np.ndarray)):
        return len(value) == 0
    return bool(pd.isna(value)) or value == ""


def _read(table: Path) -> gpd.GeoDataFrame:
    import geopandas as gpd
    import pyarrow as pa
    from pyarrow import parquet

    if not table.is_file():
        raise AuditError(f"{table} does not exist; give a tile set or a GeoParquet file")
    try:
        schema = parquet.read_schema(table)
    except (pa.ArrowException, OSError) as error:
        raise AuditError(f"{table} cannot be read as Parquet; give a GeoParquet file with the chips' footprints") from error
    if b"geo" not in (schema.metadata or {}):
        raise AuditError(f"{table} has no geometry column; write it as GeoParquet, for example with geopandas to_parquet")
    try:
        frame = gpd.read_parquet(table)
    except (pa.ArrowException, OSError, ValueError, KeyError, shapely.errors.GEOSException, CRSError) as error:
        raise AuditError(f"{table} cannot be read as GeoParquet ({str(error).splitlines()[0]}); write it again") from error
    if frame.empty:
        raise AuditError(f"{table} holds no chip; give a table with one row a chip")
    if frame.crs is None:
        raise AuditError(f"{table} has no CRS, so its footprints have no place on Earth; set it with geopandas set_crs")
    empty = frame.geometry.isna() | frame.geometry.is_empty
    if empty.any():
        raise AuditError(f"{table} has no footprint in row {int(empty.to_numpy().argmax())}; remove the row or draw it")
    return frame


def _side(name: str, frame: gpd.GeoDataFrame, table: Path) -> _Side:
    if "id" in frame.columns:
        # The order of the rows is no property of a split, and must not show in the report.
        frame = frame.assign(id=frame["id"].astype(str)).sort_values("id", kind="stable")
        ids = tuple(frame["id"])
    else:
        ids = tuple(f"row {row}" for row in frame.index)
    return _Side(
        name=name,
        table=table,
        frame=frame,
        ids=ids,
        outlines=_in_degrees(frame, table),
        images=_files(frame, table, IMAGE_COLUMNS, "image", ids),
        heights=_files(frame, table, HEIGHT_COLUMNS, "height", ids),
    )


def _files(
    frame: gpd.GeoDataFrame, table: Path, columns: Sequence[str], part: str, ids: Sequence[str]
) -> tuple[Path | None, ...]:
    """The raster of each chip: named by a column, or beside the index of a tile set."""
    for name in columns:
        # A column called height may as well hold metres.
        if name in frame.columns and all(_is_empty(value) or isinstance(value, str) for value in frame[name]):
            return tuple(None if _is_empty(value) else table.parent / str(value) for value in frame[name])
    if table.name == INDEX and (table.parent / part).is_dir():
        return tuple(table.parent / part / f"{chip}.tif" for chip in ids)
    return (None,) * len(frame)


def _in_degrees(frame: gpd.GeoDataFrame, table: Path) -> NDArray[Any]:
    """Footprints on WGS 84. Long edges are cut first: what is straight in one CRS is not in another."""
    crs = CRS.from_user_input(frame.crs)
    longest = 0.01 if crs.is_geographic else 1000.0 / (crs.axis_info[0].unit_conversion_factor or 1.0)
    outlines: NDArray[Any] = frame.geometry.to_numpy()
    unheld = AuditError(f"{table} has footprints that {crs.name} cannot hold; correct its CRS")
    if not np.isfinite(shapely.bounds(outlines)).all():
        raise unheld
    outlines = shapely.segmentize(_unwrapped(outlines) if crs.is_geographic else outlines, longest)
    if not crs.equals(CRS.from_epsg(4326), ignore_axis_order=True):
        to_degrees = Transformer.from_crs(crs, "EPSG:4326", always_xy=True)
        outlines = shapely.transform(outlines, to_degrees.transform, interleaved=False)
    if not np.isfinite(shapely.bounds(outlines)).all():
        raise unheld
    return outlines


def _unwrapped(outlines: NDArray[Any]) -> NDArray[Any]:
    """Footprints in degrees whose corners lie within half a turn of their first.

    One that crosses the antimeridian from 179.9 to -179.9 degrees is narrow, and does not go round the Earth.
    """
    corners, of = shapely.get_coordinates(outlines, return_index=True)
    first = _first_corners(outlines)[of, 0]
    if (np.abs(corners[:, 0] - first) <= 180).all():
        return outlines
    corners[:, 0] = first + _turn(corners[:, 0] - first)
    unwrapped: NDArray[Any] = shapely.set_coordinates(outlines.copy(), corners)
    return unwrapped


# --- distances on the ground -----------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Near:
    """How two splits lie on the ground."""

    pairs: NDArray[np.int64]
    """(pair, 2): positions of a learning and a judging chip within the buffer."""
    distance_m: NDArray[np.float64]
    """(pair,): from edge to edge."""
    share: NDArray[np.float64]
    """(pair,): of the judging chip's area that the other covers."""
    nearest_m: NDArray[np.float64]
    """(judging chip,): to the nearest learning one."""


def _distances(learns: _Side, judges: _Side, buffer_m: float) -> _Near:
    """Pairs within the buffer, and the nearest learning chip of each judging one.

    Measured in transverse Mercator strips of 3 degrees with scale 1 on the axis, where lengths are right to 4e-4, also at
    the poles and across the antimeridian.
    """
    reach_m = max(TOUCH_M, buffer_m * (1 - SCALE_ERROR))
    pairs, distances_m, shares = [], [], []
    nearest_m = np.full(len(judges.outlines), math.inf)
    for local_m, inside, around in _strips(learns.outlines, judges.outlines):
        known, asked = (
            shapely.transform(side.outlines[chosen], local_m, interleaved=False)
            for side, chosen in ((learns, around), (judges, inside))
        )
        tree = shapely.STRtree(known)
        (who, which), metres = tree.query_nearest(asked, max_distance=NEAR_M, return_distance=True, all_matches=False)
        nearest_m[inside[who]] = metres
        who, which = tree.query(asked, predicate="dwithin", distance=reach_m)
        pairs.append(np.stack([around[which], inside[who]], axis=1))
        distances_m.append(shapely.distance(known[which], asked[who]))
        common = shapely.area(shapely.intersection(shapely.make_valid(known[which]), shapely.make_valid(asked[who])))
        shares.append(common / np.maximum(shapely.area(asked[who]), 1e-9))
    far = np.flatnonzero(np.isinf(nearest_m))
    if len(far):
        corners, asked_corners = _first_corners(learns.outlines), _first_corners(judges.outlines[far])
        found = cKDTree(_on_sphere(corners)).query(_on_sphere(asked_corners))[1]
        nearest_m[far] = Geod(ellps="WGS84").inv(*asked_corners.T, *corners[found].T)[2]
    empty = np.empty(0)
    return _Near(
        pairs=np.concatenate([np.empty((0, 2), np.int64), *pairs]),
        distance_m=np.concatenate([empty, *distances_m]),
        share=np.concatenate([empty, *shares]),
        nearest_m=nearest_m,
    )


def _first_corners(outlines: NDArray[Any]) -> NDArray[np.float64]:
    """(footprint, 2): longitude and latitude of a corner of each. A mean would be elsewhere across the antimeridian."""
    corners, of = shapely.get_coordinates(outlines, return_index=True)
    first: NDArray[np.float64] = corners[np.searchsorted(of, np.arange(len(outlines)))]
    return first


def _on_sphere(lonlat_deg: NDArray[np.float64]) -> NDArray[np.float64]:
    lon, lat = np.radians(lonlat_deg).T
    return np.stack([np.cos(lat) * np.cos(lon), np.cos(lat) * np.sin(lon), np.sin(lat)], axis=1)


def _strips(
    known: NDArray[Any], asked: NDArray[Any]
) -> Iterator[tuple[Callable[..., Any], NDArray[np.int64], NDArray[np.int64]]]:
    """(projection, asked footprints in a strip, known ones within NEAR_M of them), strips with nothing known left out."""
    known_deg, known_of = shapely.get_coordinates(known, return_index=True)
    asked_deg, asked_of = shapely.get_coordinates(asked, return_index=True)
    first = _first_corners(asked)
    strip = np.floor((first[:, 0] + 180) / _STRIP_DEG).astype(int) % round(360 / _STRIP_DEG)
    reach_deg = math.degrees(NEAR_M / _EARTH_RADIUS_M)
    for number in np.unique(strip):
        inside = np.flatnonzero(strip == number)
        corners = asked_deg[strip[asked_of] == number]
        axis_deg = (number + 0.5) * _STRIP_DEG - 180
        south, north = corners[:, 1].min(), corners[:, 1].max()
        near = (known_deg[:, 1] >= south - reach_deg) & (known_deg[:, 1] <= north + reach_deg)
        poleward = max(abs(south), abs(north))
        if poleward + reach_deg < 90:  # else the pole is in reach, and with it every longitude
            # The easternmost point of a circle around a point of this latitude.
            beyond_deg = math.degrees(math.asin(math.sin(math.radians(reach_deg)) / math.cos(math.radians(poleward))))
            near &= np.abs(_turn(known_deg[:, 0] - axis_deg)) <= np.abs(_turn(corners[:, 0] - axis_deg)).max() + beyond_deg
        around = np.unique(known_of[near])
        if len(around):
            yield partial(_local_m, axis_deg=axis_deg), inside, around


@lru_cache
def _transverse_mercator() -> Transformer:
    return Transformer.from_crs(
        "EPSG:4326", CRS.from_proj4("+proj=tmerc +lat_0=0 +lon_0=0 +k=1 +datum=WGS84"), always_xy=True
    )


def _local_m(
    lon_deg: NDArray[np.float64], lat_deg: NDArray[np.float64], *, axis_deg: float
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Metres east of an axis and north of the equator; one projection serves all axes, making one takes milliseconds."""
    x_m, y_m = _transverse_mercator().transform(_turn(lon_deg - axis_deg), lat_deg)
    return x_m, y_m


def _turn(deg: NDArray[np.float64]) -> NDArray[np.float64]:
    """Differences of longitude in [-180, 180): the antimeridian is no border."""
    return (deg + 180) % 360 - 180


def _overlap(learns: _Side, judges: _Side, settings: AuditSettings, near: _Near) -> list[Finding]:
    found = []
    for (a, b), metres, share in zip(near.pairs.tolist(), near.distance_m.tolist(), near.share.tolist(), strict=True):
        said = f"covers {share:.1%} of it" if share > 0 else f"{metres:.2f} m apart"
        found.append(((-share, metres), Example(first=learns.ids[a], second=judges.ids[b], said=said)))
    chips = len(np.unique(near.pairs[:, 1]))
    said = (
        f"{len(found)} pairs of footprints overlap or lie within {settings.buffer_m:g} m; "
        f"they touch {chips} of the {len(judges.ids)} {judges.name} chips"
    )
    return _finding("overlap", "leak", (learns, judges), said, found)


def _profile(splits: tuple[str, str], nearest_m: NDArray[np.float64]) -> Profile:
    points = np.linspace(0, 1, min(_CURVE_POINTS, len(nearest_m)))
    ordered = np.sort(nearest_m)
    at = np.ceil(points * len(ordered)).astype(int).clip(1) - 1
    quantiles = np.quantile(ordered, _QUANTILES, method="inverted_cdf")
    return Profile(
        splits=splits,
        quantile_m={f"{q:g}": round(float(m), 3) for q, m in zip(_QUANTILES, quantiles, strict=True)},
        distance_m=tuple(round(float(m), 3) for m in ordered[at]),
        share=tuple(round(float(i + 1) / len(ordered), 6) for i in at),
    )


# --- content and lineage ---------------------------------------------------------------------------------------------------

_Codes = dict[Path, NDArray[Any]]


def _all_codes(files: Sequence[Sequence[Path | None]]) -> _Codes:
    """The fingerprint of every raster that is needed: none where only one side has any."""
    if sum(any(path is not None for path in side) for side in files) < 2:
        return {}
    paths = sorted({path for side in files for path in side if path is not None})
    with ThreadPoolExecutor() as pool:
        return dict(zip(paths, pool.map(_codes_of, paths), strict=True))


def _codes_of(path: Path) -> NDArray[Any]:
    with open_raster(path) as raster:
        return fingerprint(raster.read(0, 0, raster.shape))


def _same(
    files_a: Sequence[Path | None], files_b: Sequence[Path | None], codes: _Codes
) -> list[tuple[int, int, int, float]]:
    """(position in a, in b, votes, distance) of the rasters that show the same."""
    a, b = ([i for i, path in enumerate(side) if path in codes] for side in (files_a, files_b))
    found = near_duplicates([codes[files_a[i]] for i in a], [codes[files_b[i]] for i in b])  # type: ignore[index]
    return [
        (a[i], b[j], votes, distance)
        for i, j, votes, distance in zip(
            found.a.tolist(), found.b.tolist(), found.votes.tolist(), found.distance.tolist(), strict=True
        )
    ]


def _content(learns: _Side, judges: _Side, codes: _Codes) -> tuple[list[Finding], set[tuple[int, int]]]:
    pairs = _same(learns.images, judges.images, codes)
    found = []
    for a, b, votes, distance in pairs:
        said = f"{votes} places agree, {distance:.0%} of their signs differ"
        found.append(((-votes, distance), Example(first=learns.ids[a], second=judges.ids[b], said=said)))
    chips = len({b for _, b, *_ in pairs})
    said = (
        f"{len(pairs)} pairs of images show the same content; "
        f"they touch {chips} of the {len(judges.ids)} {judges.name} chips"
    )
    return _finding("content", "leak", (learns, judges), said, found), {(a, b) for a, b, *_ in pairs}


def _lineage(
    learns: _Side, judges: _Side, settings: AuditSettings, codes: _Codes, one_scene: set[tuple[int, int]]
) -> list[Finding]:
    """Files, heights and declared ancestors that both sides share.

    Args:
        learns: The split that learns.
        judges: The split that judges it.
        settings: Whether whole sites are claimed.
        codes: Fingerprints of the height rasters.
        one_scene: Pairs that overlap on the ground and show the same picture; that their heights agree says nothing new.
    """
    sides = (learns, judges)
    parents = [_ancestors(side) for side in sides]
    called = [_names(side) for side in sides]
    names = [{name: i for i, own in reversed(list(enumerate(side))) for name in own} for side in called]
    findings: list[Finding] = []
    digests = [side.column(("sha256",)) or [] for side in sides]
    first_with = {digest: i for i, digest in reversed(list(enumerate(digests[0]))) if digest is not None}
    found = [
        ((), Example(first=learns.ids[first_with[digest]], second=judges.ids[b], said=f"sha256 {str(digest)[:12]}"))
        for b, digest in enumerate(digests[1])
        if digest in first_with
    ]
    findings += _finding(
        "lineage", "leak", sides, f"{len(found)} {judges.name} chips are the same files byte for byte", found
    )

    derived = []
    for own, other in ((0, 1), (1, 0)):
        for i, ancestors in enumerate(parents[own]):
            for name in sorted(ancestors & names[other].keys()):
                ids = sides[own].ids[i], sides[other].ids[names[other][name]]
                said = f"{ids[0]} derives from {name}"
                derived.append(((), Example(first=ids[own], second=ids[other], said=said)))
    said = f"{len(derived)} chips declare an ancestor on the other side"
    findings += _finding("lineage", "leak", sides, said, derived)

    common = []
    for name in sorted(set().union(*parents[0]) & set().union(*parents[1])):
        heirs = [[i for i, ancestors in enumerate(side) if name in ancestors] for side in parents]
        said = f"{len(heirs[0])} {learns.name} and {len(heirs[1])} {judges.name} chips derive from {name}"
        common.append(((), Example(first=learns.ids[heirs[0][0]], second=judges.ids[heirs[1][0]], said=said)))
    said = f"{len(common)} declared ancestors are shared"
    findings += _finding("lineage", "leak" if settings.by_site else "warning", sides, said, common)

    copied = []
    undeclared = 0
    for a, b, votes, _ in _same(learns.heights, judges.heights, codes):
        if (a, b) in one_scene:
            continue
        declared = bool(parents[0][a] & (parents[1][b] | called[1][b]) or parents[1][b] & called[0][a])
        undeclared += not declared
        said = f"the same heights at {votes} places, {'declared' if declared else 'undeclared'}"
        copied.append(((-votes,), Example(first=learns.ids[a], second=judges.ids[b], said=said)))
    said = f"{len(copied)} pairs of chips have the same heights, {undeclared} of them without saying so"
    return findings + _finding("lineage", "leak", sides, said, copied)


def _ancestors(side: _Side) -> list[set[str]]:
    """What each chip declares that it derives from."""
    values = side.column(LINEAGE_COLUMNS) or [None] * len(side.ids)
    return [
        {name for part in (value.split(";") if isinstance(value, str) else value) if (name := str(part).strip())}
        if value is not None
        else set()
        for value in values
    ]


_NAMES: Final = ("id", "item", "acquisition", "sha256", *IMAGE_COLUMNS, *HEIGHT_COLUMNS)
"""Columns by whose values a chip may be named as an ancestor."""


def _names(side: _Side) -> list[set[str]]:
    """The names that each chip goes by."""
    names: list[set[str]] = [set() for _ in side.ids]
    for column in _NAMES:
        for i, value in enumerate(side.column((column,)) or []):
            if value is not None:
                names[i].add(str(value))
    return names


# --- acquisitions ----------------------------------------------------------------------------------------------------------

_SITE: Final = ("site", ("site",), ())
_ACQUISITIONS: Final = (
    ("acquisition", ("acquisition",), ()),
    ("image", ("item",), ()),
    ("LiDAR flight", ("site", "lidar_source"), ("lidar_date",)),
    ("image scene", ("site", "image_source"), ("image_date",)),
)
"""What it is, the columns that must all be filled to name it, and those that are used where they are."""


def _acquisition(learns: _Side, judges: _Side, settings: AuditSettings) -> list[Finding]:
    sides = (learns, judges)
    found = []
    touched: set[int] = set()
    for what, needed, optional in (*((_SITE,) if settings.by_site else ()), *_ACQUISITIONS):
        groups = [_groups(side, needed, optional) for side in sides]
        for key in sorted(groups[0].keys() & groups[1].keys()):
            a, b = (group[key] for group in groups)
            touched |= set(b)
            name = ", ".join(part for part in key if part)
            said = f"{what} {name}: {len(a)} {learns.name} and {len(b)} {judges.name} chips"
            found.append(((-len(b), what), Example(first=learns.ids[a[0]], second=judges.ids[b[0]], said=said)))
    meaning = "the split claims whole sites" if settings.by_site else "scores say little about other flights and sites"
    said = f"{len(touched)} of the {len(judges.ids)} {judges.name} chips share an acquisition: {meaning}"
    return _finding("acquisition", "leak" if settings.by_site else "warning", sides, said, found)


def _groups(side: _Side, needed: Sequence[str], optional: Sequence[str]) -> dict[tuple[str, ...], list[int]]:
    """The chips of every acquisition."""
    columns = [side.column((name,)) for name in needed]
    if any(column is None for column in columns):
        return {}
    extra = [side.column((name,)) or [None] * len(side.ids) for name in optional]
    groups: dict[tuple[str, ...], list[int]] = defaultdict(list)
    for chip, values in enumerate(zip(*columns, strict=True)):
        if all(value is not None for value in values):
            dates = ("" if column[chip] is None else str(column[chip]) for column in extra)
            groups[(*map(str, values), *dates)].append(chip)
    return groups


# --- what could not be checked ---------------------------------------------------------------------------------------------


def _unchecked(sides: Sequence[_Side], pictures: _Codes, heights: _Codes) -> Iterator[str]:
    for what, part, codes in (("images", "images", pictures), ("heights", "heights", heights)):
        for side in sides:
            files: tuple[Path | None, ...] = getattr(side, part)
            missing = sum(path is None for path in files)
            columns = IMAGE_COLUMNS if part == "images" else HEIGHT_COLUMNS
            if missing:
                yield f"{missing} of {len(files)} {side.name} chips have no {what} (column {' or '.join(columns[:2])})"
            blank = sum(path is not None and path in codes and len(codes[path]) == 0 for path in files)
            if blank:
                yield f"{blank} of {len(files)} {side.name} {what} have no texture to compare"
    for needed in (("site",), ("item", "acquisition"), ("lidar_source", "acquisition")):
        for side in sides:
            if not any(name in side.frame.columns for name in needed):
                yield f"{side.name} has no column {' or '.join(needed)} to tell shared acquisitions by"

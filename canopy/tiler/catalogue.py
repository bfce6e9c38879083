"""Searching a STAC catalogue: an API through pystac-client, or static files by walking them; the answer is a manifest."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, date, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from affine import Affine
from pyproj import CRS
from pyproj.exceptions import CRSError

from canopy.errors import GridError, ImageryError, SourceError
from canopy.grid import Grid
from canopy.settings import nearest
from canopy.tiler.area import Area, BoundsLonLat
from canopy.tiler.manifest import AssetRecord, ItemRecord, Manifest, Prefer, SearchRecord, as_day
from canopy.tiler.patience import PATIENCE, Patience
from canopy.tiler.remote import Reader, in_utc, reason_of, remedy_for, stac_io
from canopy.tiler.sources import Band, BaselineOffset, DeclaredOffset, StacSource

if TYPE_CHECKING:
    import pystac

MARGIN_PX: Final = 512
"""How far around the area items are searched, so that what a model sees around it does not depend on the area."""

PAGE_ITEMS: Final = 100
"""Items asked for in one request of a search."""

_EPOCH: Final = date(1970, 1, 1)


def search(
    source: StacSource,
    area: Area,
    *,
    start: date | str | None = None,
    end: date | str | None = None,
    max_cloud_percent: float | None = None,
    prefer: Prefer = "newest",
    date: date | str | None = None,
    exclude: Sequence[str] = (),
    patience: Patience = PATIENCE,
) -> Manifest:
    """Find the items of a source over an area and freeze them.

    Args:
        source: What to search.
        area: Where. The rectangle around it is searched, with a margin of `MARGIN_PX` pixels.
        start: First day, default from the beginning.
        end: Last day, default to the end.
        max_cloud_percent: Items with more cloud are left out; default the source's own limit.
        prefer: Which of several items gives a pixel: the newest, the one with the least cloud (then the newest), or the one
            closest to `date` (then the newest). What is still equal goes by the item's id.
        date: The day that "closest" means.
        exclude: Ids of items to leave out.
        patience: How long the service may fail.

    Raises:
        SourceError: no item; an item without one of the assets, a date or a known offset; a catalogue that is none.
        ImageryError: the service does not answer, or refuses.
    """
    first, last, target = as_day(start, "start"), as_day(end, "end"), as_day(date, "date")
    if first and last and first > last:
        raise SourceError(f"start {first} is after end {last}; give an earlier start or a later end")
    if prefer == "closest" and target is None:
        raise SourceError("prefer 'closest' needs the date to be close to; give --date, for example 2021-07-01")
    if prefer == "least-cloud" and source.cloud.property is None:
        raise SourceError(f"{source.name} does not say how cloudy its items are; prefer newest or closest")
    limit = source.cloud.max_percent if max_cloud_percent is None else max_cloud_percent
    if limit is not None and source.cloud.property is None:
        raise SourceError(f"{source.name} does not say how cloudy its items are; search without a limit of cloud")
    bounds = _with_margin(area.bounds_deg, MARGIN_PX * source.gsd_m)
    request = _Request(source=source, bounds_deg=bounds, first=first, last=last, cloud_percent=limit, exclude=tuple(exclude))
    find = _find_by_api if source.kind == "stac-api" else _find_by_walking
    found = find(request, patience)
    reader = Reader(source, patience)
    records = [_record(item, source, reader) for item in found if request.wants(item)]
    if not records:
        when = f"from {first or 'the beginning'} to {last or 'today'}"
        cloud = f", at most {limit:g} % cloud" if limit is not None else ""
        raise SourceError(
            f"{source.name} has no item over {area.name} ({area}) {when}{cloud}; widen the dates"
            f"{' or allow more cloud' if cloud else ''}, or choose another source"
        )
    return Manifest(
        source=source,
        search=SearchRecord(
            area=area.name,
            bounds_deg=bounds,
            start=first.isoformat() if first else None,
            end=last.isoformat() if last else None,
            max_cloud_percent=limit,
            prefer=prefer,
            date=target.isoformat() if target else None,
            exclude=tuple(exclude),
        ),
        items=tuple(sorted(records, key=lambda item: _preference(item, prefer, target))),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Request:
    """What is asked of a catalogue."""

    source: StacSource
    bounds_deg: BoundsLonLat
    first: date | None
    last: date | None
    cloud_percent: float | None
    exclude: tuple[str, ...]

    def wants(self, item: pystac.Item) -> bool:
        """Whether an item answers the request, whatever the catalogue thinks."""
        import shapely
        from shapely.geometry import shape

        if item.id in self.exclude:
            return False
        if item.geometry is None:
            raise SourceError(f"item {item.id} of {self.source.name} has no geometry; leave it out (exclude)")
        if not shapely.box(*self.bounds_deg).intersects(shape(item.geometry)):
            return False
        begins, ends = _period(item, self.source)
        if (self.first and ends.date() < self.first) or (self.last and begins.date() > self.last):
            return False
        if self.cloud_percent is None:
            return True
        cloud = item.properties.get(str(self.source.cloud.property))
        return cloud is not None and float(cloud) <= self.cloud_percent


def search_once(path: Path | str, source: StacSource, area: Area, **request: Any) -> Manifest:
    """The manifest in `path`; if there is none yet, that of a `search`, written there.

    Raises:
        SourceError: the manifest is of another source or another request; or as `search` and `Manifest.read`.
    """
    path = Path(path)
    if not path.exists():
        manifest = search(source, area, **request)
        manifest.write(path)
        return manifest
    manifest = Manifest.read(path)
    asked = {
        "bounds_deg": _with_margin(area.bounds_deg, MARGIN_PX * source.gsd_m),
        "prefer": request.get("prefer", "newest"),
        **{
            name: (day.isoformat() if (day := as_day(request.get(name), name)) else None)
            for name in ("start", "end", "date")
        },
        "max_cloud_percent": source.cloud.max_percent
        if request.get("max_cloud_percent") is None
        else request["max_cloud_percent"],
        "exclude": tuple(request.get("exclude", ())),
    }
    frozen = manifest.search.model_dump()
    for name, value in asked.items():
        if frozen[name] != value:
            raise SourceError(f"{path} is the manifest of another search ({name} {frozen[name]}, not {value}); delete it")
    if manifest.source != source:
        raise SourceError(f"{path} is the manifest of another source, or of {source.name} before it was changed; delete it")
    return manifest


def _with_margin(bounds: BoundsLonLat, margin_m: float) -> BoundsLonLat:
    """`bounds` grown by `margin_m` on all sides, up to the poles and the antimeridian; rounded to 1e-7 degrees (1 cm)."""
    west, south, east, north = bounds
    up = margin_m / 111_320
    aside = up / max(math.cos(math.radians(max(abs(south), abs(north)))), 0.01)
    grown = (max(west - aside, -180.0), max(south - up, -90.0), min(east + aside, 180.0), min(north + up, 90.0))
    return round(grown[0], 7), round(grown[1], 7), round(grown[2], 7), round(grown[3], 7)


@contextmanager
def _asking(source: StacSource, patience: Patience) -> Iterator[None]:
    """What a catalogue can answer wrongly becomes one line."""
    import pystac
    from pystac_client.errors import ClientTypeError
    from pystac_client.exceptions import APIError

    try:
        yield
    except (APIError, pystac.STACError) as error:
        asked = _cause(error, APIError)
        if asked is None:
            raise SourceError(_no_catalogue(source, error)) from error
        status = getattr(asked, "status_code", None)
        what = f"answers {status}" if status else f"cannot be reached ({reason_of(asked)})"
        raise ImageryError(
            f"the catalogue {source.endpoint} of {source.name} {what} after {patience.attempts} attempts; "
            f"{remedy_for(status)}"
        ) from error
    except FileNotFoundError as error:
        raise SourceError(f"the catalogue {source.endpoint} of {source.name} does not exist; correct endpoint") from error
    except (pystac.STACTypeError, ClientTypeError, KeyError, TypeError, ValueError, AttributeError, OSError) as error:
        raise SourceError(_no_catalogue(source, error)) from error


def _no_catalogue(source: StacSource, error: Exception) -> str:
    return (
        f"{source.endpoint} of {source.name} is not the {source.kind} catalogue that it should be ({reason_of(error)}); "
        f"correct endpoint or kind"
    )


def _cause(error: BaseException | None, kind: type[Exception]) -> Exception | None:
    """The first error of a kind among an error and what it came from."""
    while error is not None and not isinstance(error, kind):
        error = error.__cause__
    return error


def _find_by_api(request: _Request, patience: Patience) -> list[pystac.Item]:
    from pystac_client import Client

    source, first, last, limit = request.source, request.first, request.last, request.cloud_percent
    with _asking(source, patience):
        client = Client.open(source.endpoint, stac_io=stac_io(patience))
        interval = None
        if first or last:
            begins = f"{first}T00:00:00Z" if first else ".."
            ends = f"{last}T23:59:59.999Z" if last else ".."
            interval = f"{begins}/{ends}"
        # What an API cannot filter by cloud is filtered here; it only costs more pages.
        by_cloud = limit is not None and client.conforms_to("QUERY")
        query = {str(source.cloud.property): {"lte": limit}} if by_cloud else None
        found = client.search(
            collections=[source.collection], bbox=request.bounds_deg, datetime=interval, query=query, limit=PAGE_ITEMS
        )
        items = list(found.items())
        for item in items:
            item.make_asset_hrefs_absolute()
        return items


def _find_by_walking(request: _Request, patience: Patience) -> list[pystac.Item]:
    import pystac

    source = request.source
    with _asking(source, patience):
        io = stac_io(patience)
        kind = io.read_json(source.endpoint).get("type")
        opened = pystac.Collection if kind == "Collection" else pystac.Catalog
        root: pystac.Catalog = opened.from_file(source.endpoint, stac_io=io)
        catalogue = root if root.id == source.collection else root.get_child(source.collection, recursive=True)
        if catalogue is None:
            known = [child.id for child in root.get_children()]
            raise SourceError(
                f"{source.endpoint} has no collection {source.collection!r}; "
                f"{nearest(source.collection, known) if known else 'it has none'}"
            )
        items = list(catalogue.get_items(recursive=True))
        for item in items:
            item.make_asset_hrefs_absolute()
        return items


def _period(item: pystac.Item, source: StacSource) -> tuple[datetime, datetime]:
    """When an item begins and ends, in UTC; both are its one datetime where it has one."""
    common = item.common_metadata
    begins, ends = item.datetime or common.start_datetime, item.datetime or common.end_datetime
    if begins is None or ends is None:
        raise SourceError(f"item {item.id} of {source.name} has no date; leave it out (exclude)")
    return in_utc(begins), in_utc(ends)


def _preference(item: ItemRecord, prefer: Prefer, target: date | None) -> tuple[float, float, str]:
    """Sort key: smaller is preferred."""
    taken = datetime.fromisoformat(item.datetime).timestamp()
    match prefer:
        case "newest":
            return 0.0, -taken, item.id
        case "least-cloud":
            return math.inf if item.cloud_percent is None else item.cloud_percent, -taken, item.id
        case "closest":
            assert target is not None, "closest needs a date"
            noon = datetime(target.year, target.month, target.day, 12, tzinfo=UTC).timestamp()
            return abs(taken - noon), -taken, item.id


def _record(item: pystac.Item, source: StacSource, reader: Reader) -> ItemRecord:
    """An item as the manifest keeps it: only what its pixels depend on, checked."""
    begins, ends = _period(item, source)
    for name in source.assets:
        if name not in item.assets:
            raise SourceError(
                f"item {item.id} of {source.name} has no asset {name!r} ({nearest(name, list(item.assets))}); correct the "
                f"source's bands, or leave the item out (exclude)"
            )
    cloud = item.properties.get(source.cloud.property) if source.cloud.property else None
    return ItemRecord(
        id=item.id,
        collection=item.collection_id or source.collection,
        datetime=ends.isoformat(),
        day=(ends.date() - _EPOCH).days if begins.date() == ends.date() else None,
        cloud_percent=None if cloud is None else float(cloud),
        assets={name: _asset_record(item, name, source, reader) for name in source.assets},
        offset={band.name: _offset(item, band, source) for band in source.band},
    )


def _asset_record(item: pystac.Item, name: str, source: StacSource, reader: Reader) -> AssetRecord:
    asset = item.assets[name]
    grid = _declared_grid(item, name) if source.grids == "catalogue" else None
    if grid is None:
        grid = reader.header(asset.href, f"item {item.id}, asset {name}").grid
    code = grid.crs.to_authority(min_confidence=100)
    a, b, c, d, e, f = tuple(grid.transform)[:6]
    extra = asset.extra_fields
    return AssetRecord(
        href=asset.href,
        crs=":".join(code) if code else grid.crs.to_wkt(),
        transform=(a, b, c, d, e, f),
        shape=grid.shape,
        checksum=extra.get("file:checksum"),
        size_bytes=extra.get("file:size"),
    )


def _declared_grid(item: pystac.Item, name: str) -> Grid | None:
    """The grid that the projection extension gives for an asset, of its own or of the item; None where a part is missing."""
    import pystac
    from pystac.extensions.projection import ProjectionExtension

    try:
        projection = ProjectionExtension.ext(item.assets[name])
    except pystac.ExtensionNotImplemented:
        return None
    crs, transform, shape = projection.crs_string, projection.transform, projection.shape
    if not crs or not transform or not shape or len(transform) not in (6, 9):
        return None
    try:
        return Grid(crs=CRS.from_user_input(crs), transform=Affine(*transform[:6]), shape=(int(shape[0]), int(shape[1])))
    except (CRSError, GridError, TypeError, ValueError):
        return None


def _offset(item: pystac.Item, band: Band, source: StacSource) -> float:
    """What has to be added to the digital numbers of a band."""
    rule = source.offset
    asset = item.assets[band.asset]
    listed = asset.extra_fields.get("raster:bands") or asset.extra_fields.get("bands") or []
    declared: dict[str, Any] = listed[band.index - 1] if band.index <= len(listed) else {}
    own = {key: declared.get(key, declared.get(f"raster:{key}")) for key in ("scale", "offset")}
    scale = own["scale"] if own["scale"] is not None else asset.extra_fields.get("raster:scale")
    offset = own["offset"] if own["offset"] is not None else asset.extra_fields.get("raster:offset")
    if source.scale is not None and scale is not None and not math.isclose(float(scale), source.scale, rel_tol=1e-6):
        raise SourceError(
            f"item {item.id} of {source.name} declares a scale of {scale:g} for {band.name}, not {source.scale:g}: its "
            f"numbers cannot stand beside the others'; correct scale, or leave the item out (exclude)"
        )
    if isinstance(rule, BaselineOffset | DeclaredOffset) and rule.applied_property is not None:
        applied = item.properties.get(rule.applied_property)
        if applied is not None and str(applied).lower() == "true":
            return 0.0
    if isinstance(rule, BaselineOffset):
        baseline = item.properties.get(rule.baseline_property)
        try:
            numbers = _numbers(str(baseline))
        except ValueError:
            raise SourceError(
                f"item {item.id} of {source.name} has the {rule.baseline_property} {baseline!r}, so its offset is unknown; "
                f"leave the item out (exclude)"
            ) from None
        return rule.add if numbers >= _numbers(rule.from_baseline) else 0.0
    if isinstance(rule, DeclaredOffset) and offset:
        if scale is None:
            raise SourceError(
                f"item {item.id} of {source.name} declares an offset of {offset:g} for {band.name} but no scale, so it is "
                f"unknown in digital numbers; leave the item out (exclude)"
            )
        return round(float(offset) / float(scale), 6)
    return 0.0


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split("."))

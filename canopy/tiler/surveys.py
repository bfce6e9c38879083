"""LiDAR surveys of an area: what a catalogue lists, frozen, so that a second run reads the list and not the network.

    source = load_points_source("3dep")
    manifest = search_points(source, area)
    for survey in manifest.surveys:
        heights = lidar_to_chm(manifest.open(survey), grid)     # valid within survey.part_deg

Surveys of different years are not mixed: a tree that grew, or was felled, would be two trees. Each survey has a part of
the area to itself.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Sequence
from datetime import date, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final, Literal, Self
from urllib.parse import urlsplit

from pydantic import BaseModel, ConfigDict, Field, model_validator

from canopy.errors import ImageryError, LidarError, SourceError
from canopy.settings import nearest, read_settings
from canopy.tiler.area import Area, BoundsLonLat
from canopy.tiler.byteranges import fetch
from canopy.tiler.manifest import Sealed, as_day
from canopy.tiler.patience import PATIENCE, Patience
from canopy.tiler.points import PointSource, point_sources
from canopy.tiler.remote import in_utc, reason_of, remedy_for, stac_io
from canopy.tiler.sources import NoSigning, PlanetaryComputerSigning, find_source

if TYPE_CHECKING:
    import pystac
    from shapely.geometry.base import BaseGeometry

PAGE_ITEMS: Final = 100
"""Items asked for in one request of a search."""
MIN_PART: Final = 1e-6
"""A survey that adds less than this share of the area is left out: borders of footprints are not exact to that."""
FOOTPRINT_MARGIN_DEG: Final = 0.002
"""So far beyond its footprint a cloud may reach, about 200 m: footprints in catalogues and files do not always agree
(https://github.com/microsoft/PlanetaryComputer/issues/323)."""
_FRESH_S: Final = 2.0
"""A token younger than this is not the one that a server has just refused: another thread has renewed it."""


class _Frozen(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


# --- what a source is ----------------------------------------------------------------------------------------------------


class StacOfPoints(_Frozen):
    """A collection of a STAC API whose items are COPC files."""

    kind: Literal["stac-api"]
    endpoint: str
    collection: str
    asset: str = "data"
    survey_property: str | None = None
    """Property of an item that names its survey; without it every item is a survey of its own."""
    signing: Annotated[NoSigning | PlanetaryComputerSigning, Field(discriminator="kind")] = NoSigning()


class EptIndex(_Frozen):
    """A GeoJSON file with one feature an EPT folder: its footprint in longitude and latitude, `name`, `url` and `count`."""

    kind: Literal["ept-index"]
    href: str


Catalogue = Annotated[StacOfPoints | EptIndex, Field(discriminator="kind")]


class PointsSource(_Frozen):
    """A source of point clouds; one TOML each, in `data/`."""

    name: str = Field(pattern=r"^[A-Za-z0-9_.-]+$")
    title: str
    licence: str
    attribution: str
    notes: str = ""
    catalogue: tuple[Catalogue, ...] = Field(min_length=1)
    """Where its clouds are listed, the preferred first."""

    @model_validator(mode="after")
    def _one_of_a_kind(self) -> Self:
        kinds = [c.kind for c in self.catalogue]
        if len(set(kinds)) < len(kinds):
            raise ValueError("two catalogues are of one kind; make a source of each")
        return self

    def of_kind(self, kind: str | None) -> StacOfPoints | EptIndex:
        """The catalogue of a kind; None is the first."""
        for catalogue in self.catalogue:
            if kind is None or catalogue.kind == kind:
                return catalogue
        raise SourceError(f"{self.name} has no catalogue {kind!r}; {nearest(str(kind), [c.kind for c in self.catalogue])}")


def load_points_source(name_or_path: Path | str) -> PointsSource:
    """The source of a name in `data/`, or of the path of its description.

    Raises:
        SourceError: not found, no TOML, an unknown key (the nearest valid one is named), or a wrong value.
    """
    return read_settings(find_source(name_or_path), PointsSource, what="a source of points", error=SourceError)


# --- what a search finds -------------------------------------------------------------------------------------------------


class CloudRecord(_Frozen):
    """One COPC file or EPT folder."""

    id: str
    href: str
    """Link without signature."""
    start: str | None
    """First day of the flights, ISO 8601; None where the catalogue does not say it."""
    end: str | None
    crs: str | None
    """As the catalogue has it: an authority's code or WKT. The file's own counts."""
    points: int | None
    density_per_m2: float | None
    """Mean over the cloud, where the catalogue says it."""
    bounds_deg: BoundsLonLat
    """Box around its footprint."""


class Survey(_Frozen):
    """Clouds flown together."""

    name: str
    start: str | None
    """First day of its flights over the area."""
    end: str | None
    part_deg: str
    """WKT, longitude and latitude: the part of the area that the survey covers and no preferred one does."""
    share: float = Field(gt=0, le=1)
    """Of the area."""
    clouds: tuple[CloudRecord, ...] = Field(min_length=1)


class PointsSearch(_Frozen):
    """What was asked."""

    area: str
    bounds_deg: BoundsLonLat
    catalogue: str
    start: str | None
    end: str | None
    survey: str | None


class PointsManifest(Sealed):
    """A search for point clouds: what was asked, and the surveys in the order in which they are preferred."""

    holds = "points"

    version: Literal[1] = 1
    source: PointsSource
    search: PointsSearch
    surveys: tuple[Survey, ...] = Field(min_length=1)
    covered: float = Field(gt=0, le=1)
    """Share of the area that has points."""
    passed_over: tuple[str, ...] = ()
    """Surveys that lie in the area too and add nothing to the preferred ones."""

    def open(
        self, survey: Survey, *, bounds_deg: BoundsLonLat | None = None, patience: Patience = PATIENCE
    ) -> list[PointSource]:
        """The clouds of one of the surveys, with links that are signed where the source wants it.

        Args:
            survey: one of `surveys`.
            bounds_deg: only the clouds near this box: (west, south, east, north) in degrees.
            patience: how long a service may fail.

        Raises:
            LidarError: as `canopy.tiler.points.open_points`.
        """
        catalogue = self.source.of_kind(self.search.catalogue)
        sign = None
        if isinstance(catalogue, StacOfPoints) and isinstance(catalogue.signing, PlanetaryComputerSigning):
            sign = TokenSign(catalogue.signing, patience)
        near = [c.href for c in survey.clouds if bounds_deg is None or _near(c.bounds_deg, bounds_deg)]
        return point_sources(near, sign=sign, patience=patience) if near else []


def _near(a: BoundsLonLat, b: BoundsLonLat) -> bool:
    margin = FOOTPRINT_MARGIN_DEG
    return a[0] - margin <= b[2] and b[0] <= a[2] + margin and a[1] - margin <= b[3] and b[1] <= a[3] + margin


# --- signatures ------------------------------------------------------------------------------------------------------------


class TokenSign:
    """Signs links with the tokens of an endpoint, one token for all links until it is refused. See `byteranges.Sign`."""

    def __init__(self, signing: PlanetaryComputerSigning, patience: Patience = PATIENCE) -> None:
        self._signing = signing
        self._patience = patience
        self._token = ""
        self._made = 0.0
        self._lock = threading.Lock()

    def __reduce__(self) -> tuple[type[TokenSign], tuple[PlanetaryComputerSigning, Patience]]:
        return type(self), (self._signing, self._patience)  # a token is no part of the value

    def __call__(self, href: str, /, *, renew: bool = False) -> str:
        """The link with a token, if its host may see one."""
        host = urlsplit(href).hostname or ""
        if not any(host.endswith(end) for end in self._signing.hosts):
            return href
        with self._lock:
            if not self._token or (renew and time.monotonic() - self._made > _FRESH_S):
                self._token = self._new_token()
                self._made = time.monotonic()
            return f"{href}{'&' if '?' in href else '?'}{self._token}"

    def _new_token(self) -> str:
        url = self._signing.token_url
        answer = fetch(url, patience=self._patience)
        try:
            return str(json.loads(answer or b"")["token"])
        except (ValueError, KeyError, TypeError) as error:
            raise LidarError(f"{url} gives no token ({type(error).__name__}); correct token_url in the source") from error


# --- searching -------------------------------------------------------------------------------------------------------------


class _Found(BaseModel):
    """A cloud with its place."""

    model_config = ConfigDict(frozen=True, arbitrary_types_allowed=True)

    survey: str
    footprint: Any
    """shapely, longitude and latitude."""
    record: CloudRecord


def search_points(
    source: PointsSource,
    area: Area,
    *,
    catalogue: Literal["stac-api", "ept-index"] | None = None,
    start: date | str | None = None,
    end: date | str | None = None,
    survey: str | None = None,
    patience: Patience = PATIENCE,
) -> PointsManifest:
    """The surveys of an area, the newest first, each with the part of the area that no newer one covers; frozen.

    Args:
        source: what to search.
        area: where.
        catalogue: kind of the catalogue to ask; None: the source's first.
        start: surveys that ended before this day are left out.
        end: surveys that began after this day are left out.
        survey: the name of the one survey to use.
        patience: how long a service may fail.

    Raises:
        SourceError: no survey there, none of that name, or several of unknown date of which one has to be named; a
            catalogue that is none or has no dates to choose by.
        ImageryError: the catalogue does not answer, or refuses.
        LidarError: the index or the token cannot be fetched.
    """
    first, last = as_day(start, "start"), as_day(end, "end")
    if first and last and first > last:
        raise SourceError(f"start {first} is after end {last}; give an earlier start or a later end")
    listed = source.of_kind(catalogue)
    if isinstance(listed, StacOfPoints):
        found = _of_stac(source, listed, area, patience)
    else:
        if first or last:
            raise SourceError(
                f"the {listed.kind} of {source.name} has no dates; leave out start and end, or name the survey"
            )
        found = _of_index(source, listed, area, patience)
    found = [f for f in found if f.footprint.intersects(area.geometry) and _within(f.record, first, last)]
    when = f" from {first or 'the beginning'} to {last or 'today'}" if first or last else ""
    if not found:
        raise SourceError(
            f"{source.name} ({listed.kind}) has no point cloud over {area.name}{when}; choose another source, catalogue "
            f"or dates"
        )
    surveys, passed_over = _shared_out(source, found, area, survey)
    return PointsManifest(
        source=source,
        search=PointsSearch(
            area=area.name,
            bounds_deg=area.bounds_deg,
            catalogue=listed.kind,
            start=first.isoformat() if first else None,
            end=last.isoformat() if last else None,
            survey=survey,
        ),
        surveys=surveys,
        covered=min(1.0, sum(s.share for s in surveys)),
        passed_over=passed_over,
    )


def _shared_out(
    source: PointsSource, found: Sequence[_Found], area: Area, wanted: str | None
) -> tuple[tuple[Survey, ...], tuple[str, ...]]:
    """The surveys in the order of preference, each with what the ones before it leave of the area; and the rest's names."""
    import shapely

    by_name: dict[str, list[_Found]] = {}
    for one in sorted(found, key=lambda f: f.record.id):
        by_name.setdefault(one.survey, []).append(one)
    if wanted is not None:
        if wanted not in by_name:
            raise SourceError(f"{source.name} has no survey {wanted!r} over {area.name}; {nearest(wanted, sorted(by_name))}")
        by_name = {wanted: by_name[wanted]}
    undated = sorted(name for name, clouds in by_name.items() if any(c.record.end is None for c in clouds))
    if undated and len(by_name) > 1:
        raise SourceError(
            f"{source.name} has {len(by_name)} surveys over {area.name} and no date for {undated[0]}; name the survey "
            f"to use: {', '.join(sorted(by_name))}"
        )

    def newest(name: str) -> str:
        return max(c.record.end or "" for c in by_name[name])

    whole = area.geometry
    left: BaseGeometry = whole
    surveys, passed_over = [], []
    # Names in reverse, so that of two with one date the order of the catalogue does not decide.
    for name in sorted(sorted(by_name), key=newest, reverse=True):
        clouds = by_name[name]
        part = left.intersection(shapely.union_all([c.footprint for c in clouds]))
        share = part.area / whole.area
        if share < MIN_PART:
            passed_over.append(name)
            continue
        left = left.difference(part)
        used = [c.record for c in clouds if c.footprint.intersects(part)]
        starts, ends = [c.start for c in used if c.start], [c.end for c in used if c.end]
        surveys.append(
            Survey(
                name=name,
                start=min(starts) if starts else None,
                end=max(ends) if ends else None,
                part_deg=shapely.to_wkt(part, rounding_precision=7),
                share=min(1.0, round(share, 6) or MIN_PART),
                clouds=tuple(used),
            )
        )
    if not surveys:
        raise SourceError(f"{source.name} only touches {area.name}; choose another source or area")
    return tuple(surveys), tuple(passed_over)


def _within(cloud: CloudRecord, first: date | None, last: date | None) -> bool:
    begins, ends = cloud.start or cloud.end, cloud.end or cloud.start
    if begins is None or ends is None:
        return True
    return not ((first and date.fromisoformat(ends) < first) or (last and date.fromisoformat(begins) > last))


def _of_stac(source: PointsSource, listed: StacOfPoints, area: Area, patience: Patience) -> list[_Found]:
    import pystac
    import requests
    from pystac_client import Client
    from pystac_client.errors import ClientTypeError
    from pystac_client.exceptions import APIError

    where = f"the catalogue {listed.endpoint} of {source.name}"
    try:
        client = Client.open(listed.endpoint, stac_io=stac_io(patience))
        search = client.search(collections=[listed.collection], bbox=area.bounds_deg, limit=PAGE_ITEMS)
        items = list(search.items())
        for item in items:
            item.make_asset_hrefs_absolute()
        return [_of_item(item, source, listed) for item in items]
    except APIError as error:
        status = getattr(error, "status_code", None)
        what = f"answers {status}" if status else f"cannot be reached ({reason_of(error)})"
        raise ImageryError(f"{where} {what} after {patience.attempts} attempts; {remedy_for(status)}") from error
    except requests.RequestException as error:
        raise ImageryError(f"{where} cannot be reached ({reason_of(error)}); {remedy_for(None)}") from error
    except (
        pystac.STACError, ClientTypeError, KeyError, TypeError, ValueError, AttributeError, NotImplementedError
    ) as error:  # fmt: skip
        raise SourceError(f"{where} is no STAC API ({reason_of(error)}); correct endpoint") from error


def _of_item(item: pystac.Item, source: PointsSource, listed: StacOfPoints) -> _Found:
    from shapely.geometry import shape

    if listed.asset not in item.assets:
        raise SourceError(
            f"item {item.id} of {source.name} has no asset {listed.asset!r} ({nearest(listed.asset, list(item.assets))}); "
            f"correct asset in the source"
        )
    if item.geometry is None:
        raise SourceError(f"item {item.id} of {source.name} has no geometry; choose another catalogue")
    asked = item.properties
    common = item.common_metadata
    begins, ends = common.start_datetime or item.datetime, common.end_datetime or item.datetime
    points, density = asked.get("pc:count"), asked.get("pc:density")
    footprint = shape(item.geometry)
    return _Found(
        survey=str(asked.get(listed.survey_property) or item.id) if listed.survey_property else item.id,
        footprint=footprint,
        record=CloudRecord(
            id=item.id,
            href=item.assets[listed.asset].href,
            start=_date_of(begins),
            end=_date_of(ends),
            crs=_declared_crs(item),
            points=None if points is None else int(points),
            density_per_m2=None if density is None else float(density),
            bounds_deg=_bounds_of(footprint),
        ),
    )


def _bounds_of(footprint: BaseGeometry) -> BoundsLonLat:
    west, south, east, north = (round(float(edge), 7) for edge in footprint.bounds)
    return west, south, east, north


def _date_of(when: datetime | None) -> str | None:
    return None if when is None else in_utc(when).date().isoformat()


def _declared_crs(item: pystac.Item) -> str | None:
    asked = item.properties
    if code := asked.get("proj:code"):
        return str(code)
    if epsg := asked.get("proj:epsg"):
        return f"EPSG:{epsg}"
    for key in ("proj:wkt2", "proj:projjson"):
        if text := asked.get(key):
            return text if isinstance(text, str) else json.dumps(text, sort_keys=True)
    return None


def _of_index(source: PointsSource, listed: EptIndex, area: Area, patience: Patience) -> list[_Found]:
    import shapely
    from shapely.geometry import shape

    box = shapely.box(*area.bounds_deg)
    text = fetch(listed.href, patience=patience)
    if text is None:
        raise SourceError(f"the index {listed.href} of {source.name} is not there (HTTP 404); correct href")
    found = []
    try:
        for feature in json.loads(text)["features"]:
            footprint = shape(feature["geometry"])
            if not footprint.intersects(box):
                continue
            told = feature["properties"]
            record = CloudRecord(
                id=str(told["name"]), href=str(told["url"]), start=None, end=None, crs=None,
                points=None if told.get("count") is None else int(told["count"]), density_per_m2=None,
                bounds_deg=_bounds_of(footprint),
            )  # fmt: skip
            # Footprints traced from tiles cross themselves now and then.
            valid = footprint if footprint.is_valid else shapely.make_valid(footprint)
            found.append(_Found(survey=record.id, footprint=valid, record=record))
    except (ValueError, KeyError, TypeError, AttributeError, shapely.GEOSException) as error:
        raise SourceError(
            f"{listed.href} is no index of EPT folders ({type(error).__name__}: {reason_of(error)}); correct href"
        ) from error
    return found

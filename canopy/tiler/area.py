"""The area of interest: from a file, a rectangle in degrees, or the name of a place."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict
from pyproj import CRS

from canopy import __version__
from canopy.errors import AreaError
from canopy.grid import Box, Lattice, sheets_over, utm_crs

if TYPE_CHECKING:
    import geopandas
    from shapely.geometry.base import BaseGeometry

AREA_TILE_PX: Final = 512
"""Side of the lattice-fixed tiles in which an area becomes a mask. Where its edge runs through a pixel's centre a rounding
decides, and rounds differently from another corner; from the corner of a fixed tile it is always the same."""

GEOCODER: Final = "https://nominatim.openstreetmap.org"
"""Where the names of places are looked up unless the environment variable CANOPY_GEOCODER names another service."""

GEOCODER_TIMEOUT_S: Final = 20.0

BoundsLonLat = tuple[float, float, float, float]
"""(west, south, east, north) in degrees."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Area:
    """Polygons on Earth, none of them across the antimeridian; made by `read_area`, `area_of_bbox`, `area_of_place`."""

    name: str
    """What the user gave: a path, the corners, or a place as the geocoder writes it."""
    polygons: geopandas.GeoSeries
    """At least one polygon, in the CRS of their source: each use transforms them once, so that nothing is rounded twice."""

    @property
    def geometry(self) -> BaseGeometry:
        """The area as one geometry in longitude and latitude (EPSG:4326)."""
        return self.polygon_in(CRS.from_epsg(4326))

    @property
    def bounds_deg(self) -> BoundsLonLat:
        """(west, south, east, north) in degrees."""
        west, south, east, north = self.geometry.bounds
        return west, south, east, north

    def polygons_in(self, crs: CRS) -> geopandas.GeoSeries:
        """The polygons in another CRS.

        Raises:
            AreaError: the area reaches outside the domain of `crs`, or a polygon is not valid there.
        """
        parts = self.polygons
        if parts.crs.is_geographic:
            # A straight line in degrees is a curve in metres: between points 0.001 degrees apart the two differ by
            # millimetres.
            parts = parts.segmentize(max(0.001, *(parts.bounds.maxx - parts.bounds.minx) / 1000))
        projected = parts.to_crs(crs)
        if not np.isfinite(projected.total_bounds).all():
            raise AreaError(
                f"the area of interest {self.name} reaches outside the domain of {crs.name!r}; choose another --crs"
            )
        _check_valid(self.name, projected)
        return projected

    def polygon_in(self, crs: CRS) -> BaseGeometry:
        """The area as one geometry in another CRS; raises as `polygons_in`."""
        return self.polygons_in(crs).union_all()

    def utm_crs(self) -> CRS:
        """The UTM zone that the whole area lies in.

        Raises:
            AreaError: the area lies across the border of two zones, where no zone is the obvious one.
            GridError: there is no UTM that far north or south.
        """
        west, south, east, north = self.bounds_deg
        middle = (south + north) / 2
        # What only touches the next zone's edge is not in it.
        zones = [utm_crs(lon, middle) for lon in (west, max(west, east - 1e-9))]
        if zones[0] != zones[1]:
            raise AreaError(
                f"the area of interest {self.name} (longitude {west:.4f} to {east:.4f}) lies across UTM zones: the west is "
                f"in {zones[0].to_string()} and the east in {zones[1].to_string()}; choose the CRS with --crs (recipe: crs)"
            )
        return zones[0]

    def __str__(self) -> str:
        west, south, east, north = self.bounds_deg
        return f"longitude {west:.4f} to {east:.4f}, latitude {south:.4f} to {north:.4f}"


class PlannedArea(BaseModel):
    """An area as a plan holds it."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    crs: str
    """WKT."""
    polygons: tuple[str, ...]
    """WKB in hexadecimal digits, so that no coordinate is rounded."""

    @classmethod
    def of(cls, area: Area) -> PlannedArea:
        """From the area itself."""
        polygons = tuple(str(polygon.wkb_hex) for polygon in area.polygons)
        return cls(name=area.name, crs=CRS.from_user_input(area.polygons.crs).to_wkt(), polygons=polygons)

    @property
    def area(self) -> Area:
        """The area itself."""
        import geopandas
        import shapely

        return Area(name=self.name, polygons=geopandas.GeoSeries(shapely.from_wkb([*self.polygons]), crs=self.crs))

    def bounds_on(self, lattice: Lattice) -> tuple[float, float, float, float]:
        """(left, bottom, right, top) in the lattice's CRS."""
        left, bottom, right, top = self.area.polygon_in(lattice.crs).bounds
        return left, bottom, right, top

    def mask_on(self, lattice: Lattice) -> Callable[[Box], NDArray[np.bool_]]:
        """Any box -> (row, col) True inside the area."""
        polygons = self.area.polygons_in(lattice.crs)
        return lambda box: area_mask(polygons, lattice, box)


def as_area(given: Area | Path | str | BoundsLonLat) -> Area:
    """An area from whatever a caller has: an area, the path of a file, or (west, south, east, north) in degrees."""
    if isinstance(given, Area):
        return given
    return area_of_bbox(given) if isinstance(given, tuple) else read_area(Path(given))


def read_area(path: Path | str) -> Area:
    """The polygons of a vector file: GeoJSON, GeoPackage, GeoParquet or what else GDAL reads, in any CRS.

    Raises:
        AreaError: missing or unreadable, without CRS, without polygons, with anything else than polygons, off the Earth,
            or across the antimeridian.
    """
    path = Path(path)
    return _checked(str(path), _read(path))


def area_of_bbox(bounds_deg: BoundsLonLat) -> Area:
    """A rectangle.

    Args:
        bounds_deg: (west, south, east, north) in degrees.

    Raises:
        AreaError: not west < east and south < north, or off the Earth.
    """
    import geopandas
    import shapely

    west, south, east, north = bounds_deg
    if -180 <= east < west <= 180:
        raise AreaError(
            f"bbox {bounds_deg} has its west edge east of its east edge; give west < east, and an area across the "
            f"antimeridian as two runs, one up to longitude 180 and one from -180 on"
        )
    if not (-180 <= west < east <= 180 and -90 <= south < north <= 90):
        raise AreaError(
            f"bbox {bounds_deg} is not west < east, south < north in degrees; for example -123.08 44.04 -123.06 44.05"
        )
    return _checked(f"bbox {bounds_deg}", geopandas.GeoSeries([shapely.box(west, south, east, north)], crs="EPSG:4326"))


def area_of_place(place: str, endpoint: str | None = None) -> Area:
    """The outline of a named place, from a geocoder that speaks Nominatim's API.

    Args:
        place: For example "Willamette National Forest, Oregon". The geocoder's first answer is taken; `Area.name` says
            which place that is.
        endpoint: Address of the service; default: the environment variable CANOPY_GEOCODER, or OpenStreetMap's.

    Raises:
        AreaError: no such place, a place without an outline, or a service that cannot be reached or refuses.
    """
    import geopandas
    import requests
    from shapely.errors import ShapelyError
    from shapely.geometry import shape

    if not place.strip():
        raise AreaError("the name of the place is empty; give one, or the area as a file or --bbox")
    endpoint = (endpoint or os.environ.get("CANOPY_GEOCODER") or GEOCODER).rstrip("/")
    remedy = "give the area as a file or --bbox, or another geocoder in CANOPY_GEOCODER"
    try:
        answer = requests.get(
            f"{endpoint}/search",
            params={"q": place, "format": "geojson", "polygon_geojson": "1", "limit": "1"},
            headers={"User-Agent": f"canopy-height/{__version__}"},
            timeout=GEOCODER_TIMEOUT_S,
        )
    except requests.RequestException as error:
        raise AreaError(
            f"the geocoder {endpoint} cannot be reached for place {place!r} ({_kind(error)}); {remedy}"
        ) from error
    if answer.status_code != requests.codes.ok:
        raise AreaError(f"the geocoder {endpoint} answers {answer.status_code} to place {place!r}; {remedy}")
    try:
        features = answer.json()["features"]
        found: dict[str, Any] | None = features[0] if features else None
        geometry = shape(found["geometry"]) if found else None
        name = str(found["properties"].get("display_name", place)) if found else place
    except (ValueError, KeyError, TypeError, AttributeError, ShapelyError) as error:
        raise AreaError(f"the geocoder {endpoint} does not answer in GeoJSON; {remedy}") from error
    if geometry is None:
        raise AreaError(f"the geocoder {endpoint} knows no place {place!r}; correct its name, or {remedy}")
    if geometry.geom_type not in {"Polygon", "MultiPolygon"}:
        raise AreaError(
            f"place {place!r} ({name}) is a {geometry.geom_type} without an outline in {endpoint}; "
            f"give the area as a file or --bbox"
        )
    return _checked(name, geopandas.GeoSeries([geometry], crs="EPSG:4326"))


def _kind(error: Exception) -> str:
    return type(error).__name__


def _read(path: Path) -> geopandas.GeoSeries:
    import geopandas
    import pyarrow as pa
    from pyogrio.errors import DataSourceError

    if not path.exists():
        raise AreaError(f"the area of interest {path} does not exist; check the path")
    try:
        frame = geopandas.read_parquet(path) if path.suffix == ".parquet" else geopandas.read_file(path)
    except (DataSourceError, pa.ArrowInvalid, ValueError) as error:
        raise AreaError(f"the area of interest {path} cannot be read; give GeoJSON, GeoPackage or GeoParquet") from error
    series = getattr(frame, "geometry", None) if isinstance(frame, geopandas.GeoDataFrame) else None
    if series is None:
        raise AreaError(f"the area of interest {path} holds no geometry; give one with at least one polygon")
    if series.crs is None:
        raise AreaError(f"the area of interest {path} has no CRS; assign the right one first")
    return series


def _checked(name: str, series: geopandas.GeoSeries) -> Area:
    """The area of the polygons in `series`, or one line that says why it cannot be one."""
    parts = series[~(series.is_empty | series.isna())].explode(ignore_index=True)
    if parts.empty:
        raise AreaError(f"the area of interest {name} holds no polygon; give one with at least one polygon")
    others = parts[parts.geom_type != "Polygon"]
    if not others.empty:
        raise AreaError(f"the area of interest {name} holds a {others.geom_type.iloc[0]}; give polygons only")
    # As given: points added along the edges can hide where an edge crosses another.
    _check_valid(name, parts)
    west, south, east, north = parts.to_crs("EPSG:4326").total_bounds
    # A CRS of longitudes may count from 0 to 360; what it places beyond 180 is still on Earth.
    if not (-360 <= west <= east <= 360 and -90 <= south <= north <= 90):
        raise AreaError(
            f"the area of interest {name} reaches to ({west:g}, {south:g}, {east:g}, {north:g}), which are not longitudes "
            f"and latitudes; check its CRS ({parts.crs.name})"
        )
    if west < -180 or east > 180 or east - west > 180:
        raise AreaError(
            f"the area of interest {name} lies across the antimeridian (longitude {west:.4f} to {east:.4f}); cut it at "
            f"longitude 180 and give the parts one by one"
        )
    return Area(name=name, polygons=parts)


def _check_valid(name: str, polygons: geopandas.GeoSeries) -> None:
    import shapely

    invalid = ~polygons.is_valid
    if invalid.any():
        reason = shapely.is_valid_reason(polygons[invalid].iloc[0])
        raise AreaError(
            f"the area of interest {name} has an invalid polygon ({reason}); repair it, for example with Fix "
            f"geometries of QGIS"
        )


def area_mask(polygons: geopandas.GeoSeries | None, lattice: Lattice, box: Box) -> NDArray[np.bool_]:
    """(row, col) True where the pixel's centre lies in one of the polygons; None is everywhere.

    Args:
        polygons: In the lattice's CRS, as `Area.polygons_in` gives them.
        lattice: The pixels.
        box: The rectangle of them to look at; does not change whether a pixel is inside.
    """
    if polygons is None:
        return np.ones(box.shape, bool)
    from rasterio.features import rasterize

    inside = np.zeros(box.shape, bool)
    for part in sheets_over(box, AREA_TILE_PX):
        row0, col0 = part.row0 // AREA_TILE_PX * AREA_TILE_PX, part.col0 // AREA_TILE_PX * AREA_TILE_PX
        tile = Box(row0, col0, row0 + AREA_TILE_PX, col0 + AREA_TILE_PX)
        transform = lattice.grid(tile).transform
        burnt = rasterize(polygons, out_shape=tile.shape, transform=transform, fill=0, default_value=1, dtype="uint8")
        inside[part.slices_in(box)] = burnt[part.slices_in(tile)] > 0
    return inside

"""The map for catalogues: a STAC item, or for a map in sheets a STAC collection with an item per sheet.

    item.json                             a map in one file
    collection.json, sheets/NAME.json     a map in sheets

All links are relative, so the folder can be moved or served. It has no checksums of the rasters: to read a map of a hundred
gigabytes once more would take longer than to write it; the sizes tell a file that is cut short.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime, time, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np
from pyproj import Transformer

from canopy.grid import Box, Grid
from canopy.mosaicker.dates import DATE_BAND
from canopy.mosaicker.publish import ERROR_BANDS, HEIGHT_BANDS
from canopy.mosaicker.quantum import QUANTUM_M, BandStatistics, Statistics
from canopy.region.readme import summary_of, title_of
from canopy.textfile import write_text
from canopy.tiler.days import EPOCH

if TYPE_CHECKING:
    import pystac
    from pystac.extensions.raster import Statistics as RasterStatistics

    from canopy.region.plan import Plan
    from canopy.region.records import SheetDays, SheetRecord

ITEM: Final = "item.json"
COLLECTION: Final = "collection.json"

_COG: Final = "image/tiff; application=geotiff; profile=cloud-optimized"
_VRT: Final = "application/x-gdal-vrt"
_GPKG: Final = "application/geopackage+sqlite3"

_FIRST_PHOTOGRAPH: Final = datetime(1858, 1, 1, tzinfo=UTC)
"""Nothing was photographed from the air before. Imagery that does not say when it was taken was taken after this and before
its file was last written: an item must have a time, and this is what is known of it."""

_EDGE_STEPS: Final = 8

_FILES: Final = {
    "project": ("region.qgz", "application/x-qgis-project", ["metadata", "style"], "QGIS project"),
    "style-height": ("height.qml", "application/x-qgis-style", ["style"], "Colours of the heights in QGIS"),
    "style-error": ("error.qml", "application/x-qgis-style", ["style"], "Colours of the errors in QGIS"),
    "style-date": ("date.qml", "application/x-qgis-style", ["style"], "Colours of the days in QGIS"),
    "area": ("area.gpkg", _GPKG, ["metadata"], "The area that was asked for"),
    "shift": ("shift.gpkg", _GPKG, ["metadata"], "Where the map is unlike the calibration data"),
    "readme": ("README.txt", "text/plain", ["overview", "metadata"], "What the numbers mean"),
    "run": ("run.json", "application/json", ["metadata"], "What it was made of"),
}
"""Key of the asset -> file, media type, roles, title."""


def write_item(
    out: Path,
    plan: Plan,
    record: Mapping[str, Any],
    records: Sequence[SheetRecord],
    *,
    statistics: tuple[Statistics, Statistics] | None,
    days: SheetDays,
    files: Sequence[str],
) -> None:
    """Write the item of a map in one file, or the collection of one in sheets, into a folder.

    A map whose imagery says neither when it was taken nor when its files were written gets none: a STAC item needs a time.

    Args:
        out: The folder.
        plan: The map's.
        record: What `run.json` says; nothing of it that differs from run to run is used.
        records: Of all its sheets.
        statistics: Of the bands of heights and errors of a map in one file.
        days: When its imagery was taken.
        files: Names of what lies, or will lie, in the folder.

    Raises:
        OutputError: a file cannot be written.
    """
    import pystac

    ends = _ends(plan, days)
    if ends is None:
        return
    grid = plan.lattice.grid(plan.extent)
    if plan.one_file:
        assert statistics is not None, "a map in one file has statistics"
        item = _item(plan, record, plan.identity[:16], grid, ends, known=not days.undated_px)
        _add_rasters(item, out, "", statistics, grid, dated="date.tif" in files)
        _add_files(item, files)
        write_text(out / ITEM, _text(item.to_dict(include_self_link=False, transform_hrefs=False)))
        return
    from canopy.mosaicker.sheets import SHEETS, sheet_extent

    box, _ = _footprint(grid)
    collection = pystac.Collection(
        id=plan.identity[:16], title=title_of(record), description=summary_of(record), license="other",
        extent=pystac.Extent(pystac.SpatialExtent([box]), pystac.TemporalExtent([[*ends]])),
    )  # fmt: skip
    _add_files(collection, files)
    for key, title in (("height", "Canopy height"), ("error", "Error of the height"), ("date", "Day of the imagery")):
        if f"{key}.vrt" in files:
            collection.add_asset(key, pystac.Asset(f"./{key}.vrt", title=title, media_type=_VRT, roles=["data"]))
    for sheet in records:
        if not sheet.known_px:
            continue
        sheet_grid = plan.lattice.grid(sheet_extent(Box(*sheet.box)))
        own = sheet.days or days
        item = _item(plan, record, sheet.name, sheet_grid, _ends(plan, own) or ends, known=not own.undated_px)
        height, error = sheet.statistics
        _add_rasters(item, out / SHEETS, f"{sheet.name}_", (height, error), sheet_grid, dated=plan.is_dated)
        item.collection_id = collection.id
        for relation in (pystac.RelType.ROOT, pystac.RelType.PARENT, pystac.RelType.COLLECTION):
            item.add_link(pystac.Link(relation, f"../{COLLECTION}", media_type=pystac.MediaType.JSON))
        write_text(out / SHEETS / f"{sheet.name}.json", _text(item.to_dict(include_self_link=False, transform_hrefs=False)))
        collection.add_link(pystac.Link(pystac.RelType.ITEM, f"./{SHEETS}/{sheet.name}.json", pystac.MediaType.GEOJSON))
    write_text(out / COLLECTION, _text(collection.to_dict(include_self_link=False, transform_hrefs=False)))


def _text(content: Mapping[str, Any]) -> str:
    return json.dumps(content, indent=1, ensure_ascii=False, allow_nan=False) + "\n"


def _item(
    plan: Plan, record: Mapping[str, Any], name: str, grid: Grid, ends: tuple[datetime, datetime], *, known: bool
) -> pystac.Item:
    import pystac
    from pystac.extensions.projection import ProjectionExtension

    box, geometry = _footprint(grid)
    tables = None if plan.calibration is None else plan.calibration.pixels
    first, last = ends
    one_day = known and first.date() == last.date()
    properties: dict[str, Any] = {
        "title": title_of(record), "description": summary_of(record), "gsd": plan.gsd_m,
        "canopy:version": plan.canopy, "canopy:identity": plan.identity,
        "canopy:models": [
            {"name": model["name"], "version": model["version"], "weights_sha256": model["weights_sha256"],
             "licence": model.get("licence")}
            for model in record["models"]
        ],
        "canopy:calibrated": tables is not None,
        "canopy:calibration": record["calibration"],
        "canopy:coverage": [] if tables is None else [
            {"how": m.how, "sites": [*m.sites], "overall": round(m.overall, 4), "edges_m": [*tables.edges_m],
             "by_class": [None if math.isnan(share) else round(share, 4) for share in m.by_class]}
            for m in tables.measured
        ],
        "canopy:shift": {key: record["shift"].get(key) for key in ("reference", "measured", "share", "flagged")},
        "canopy:imagery": [_named(entry) for entry in record["imagery"]["files"]],
        "canopy:imagery_licence": record["imagery"]["licence"],
        "canopy:imagery_date_known": known,
    }  # fmt: skip
    item = pystac.Item(
        id=name, geometry=geometry, bbox=box, properties=properties,
        datetime=first if one_day else None,
        start_datetime=None if one_day else first, end_datetime=None if one_day else last,
    )  # fmt: skip
    code = grid.crs.to_authority()
    ProjectionExtension.ext(item, add_if_missing=True).apply(
        code=None if code is None else ":".join(code), wkt2=None if code is not None else grid.crs.to_wkt(),
        shape=[*grid.shape], transform=[*grid.transform][:6], bbox=[*map(float, grid.bounds)],
    )  # fmt: skip
    return item


def _named(entry: Mapping[str, Any]) -> str:
    """An image by the name of its file, an item by its own."""
    return Path(entry["path"]).name if "path" in entry else str(entry.get("item"))


def _ends(plan: Plan, days: SheetDays) -> tuple[datetime, datetime] | None:
    """First and last moment at which the imagery may have been taken; None where nothing is known of it."""
    if days.first is not None and days.last is not None and not days.undated_px:
        return _midnight(days.first), _midnight(days.last + 1) - timedelta(seconds=1)
    written = [stamp.mtime_ns for stamp in plan.imagery.stamps]
    if not written:
        return None
    return _FIRST_PHOTOGRAPH, datetime.fromtimestamp(max(written) // 10**9, UTC)


def _midnight(day: int) -> datetime:
    return datetime.combine(EPOCH + timedelta(days=day), time(), UTC)


def _footprint(grid: Grid) -> tuple[list[float], dict[str, Any]]:
    """The bounding box (west, south, east, north) in degrees and the outline of a grid, as GeoJSON has them."""
    to_degrees = Transformer.from_crs(grid.crs, "EPSG:4326", always_xy=True)
    rows, cols = grid.shape
    t = np.linspace(0, 1, _EDGE_STEPS, endpoint=False)
    low, high = np.zeros(_EDGE_STEPS), np.ones(_EDGE_STEPS)
    # Counter-clockwise from the upper left, as GeoJSON wants it.
    col, row = np.concatenate([low, t, high, 1 - t]) * cols, np.concatenate([t, high, 1 - t, low]) * rows
    lon, lat = to_degrees.transform(*grid.xy(col, row))
    ring = [[round(float(x), 7), round(float(y), 7)] for x, y in zip(lon, lat, strict=True)]
    ring.append(ring[0])
    west, south = (min(point[axis] for point in ring) for axis in (0, 1))
    east, north = (max(point[axis] for point in ring) for axis in (0, 1))
    if east - west <= _HALF_WAY_DEG:
        return [west, south, east, north], {"type": "Polygon", "coordinates": [ring]}
    return _across(ring, south, north)


_HALF_WAY_DEG: Final = 180.0
"""No map in one metric CRS is wider: one that seems to be lies across the antimeridian."""


def _across(ring: list[list[float]], south: float, north: float) -> tuple[list[float], dict[str, Any]]:
    """Box and outline of what lies across the antimeridian: a part on either side (RFC 7946, sections 3.1.9 and 5.2)."""
    import shapely

    whole = shapely.Polygon([(lon % 360, lat) for lon, lat in ring])
    west, _, east, _ = whole.bounds
    parts = [
        whole.intersection(shapely.box(0, -90, 180, 90)),
        shapely.transform(whole.intersection(shapely.box(180, -90, 360, 90)), lambda points: points - [360, 0]),
    ]
    outline = shapely.geometry.mapping(shapely.MultiPolygon([shapely.orient_polygons(part) for part in parts]))
    return [west, south, east - 360, north], json.loads(json.dumps(outline))


# --- assets --------------------------------------------------------------------------------------------------------------


def _add_rasters(
    item: pystac.Item, folder: Path, prefix: str, statistics: tuple[Statistics, Statistics], grid: Grid, *, dated: bool
) -> None:
    """The rasters of heights, errors and, where there are some, days of a file of the map."""
    import pystac
    from pystac.extensions.file import FileExtension
    from pystac.extensions.raster import DataType, NoDataStrings, RasterBand, RasterExtension, Sampling

    titles = {"height": "Canopy height, metres above ground", "error": "Half-width and ends of the 90 % interval, metres"}
    for (key, title), names, bands in zip(titles.items(), (HEIGHT_BANDS, ERROR_BANDS), statistics, strict=True):
        asset = pystac.Asset(f"./{prefix}{key}.tif", title=title, media_type=_COG, roles=["data"])
        item.add_asset(key, asset)
        RasterExtension.ext(asset, add_if_missing=True).apply(
            [
                RasterBand.create(
                    nodata=NoDataStrings.NAN, data_type=DataType.FLOAT32, unit="m", spatial_resolution=grid.gsd[0],
                    sampling=Sampling.AREA, statistics=_statistics(band, grid),
                )
                for band in bands
            ]
        )  # fmt: skip
        for described, name in zip(asset.extra_fields["raster:bands"], names, strict=True):
            described["name"] = name
        FileExtension.ext(asset, add_if_missing=True).size = (folder / f"{prefix}{key}.tif").stat().st_size
    if dated:
        path = folder / f"{prefix}date.tif"
        asset = pystac.Asset(f"./{path.name}", title="Day of the imagery, yyyymmdd", media_type=_COG, roles=["data", "date"])
        item.add_asset("date", asset)
        RasterExtension.ext(asset, add_if_missing=True).apply(
            [RasterBand.create(nodata=0, data_type=DataType.INT32, spatial_resolution=grid.gsd[0], sampling=Sampling.AREA)]
        )
        asset.extra_fields["raster:bands"][0]["name"] = DATE_BAND
        FileExtension.ext(asset, add_if_missing=True).size = path.stat().st_size


def _statistics(band: BandStatistics, grid: Grid) -> RasterStatistics | None:
    from pystac.extensions.raster import Statistics as RasterStatistics

    if band.least is None or band.largest is None:
        return None
    return RasterStatistics.create(
        minimum=band.least * QUANTUM_M, maximum=band.largest * QUANTUM_M, mean=band.mean_m, stddev=band.stddev_m,
        valid_percent=100 * band.count / math.prod(grid.shape),
    )  # fmt: skip


def _add_files(owner: pystac.Item | pystac.Collection, files: Sequence[str]) -> None:
    import pystac

    for key, (name, media_type, roles, title) in _FILES.items():
        if name in files:
            owner.add_asset(key, pystac.Asset(f"./{name}", title=title, media_type=media_type, roles=roles))

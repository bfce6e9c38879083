"""A GDAL tile index (GTI, GDAL 3.9 and later): a GeoPackage whose footprints are a mosaic of the files that they name.

What GDAL opens at once however many files there are; an older GDAL, and QGIS as a vector layer, shows the footprints.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING
from xml.etree import ElementTree as ET

from canopy.errors import RasterError
from canopy.grid import Grid
from canopy.mosaicker.vrt import BLOCK_PX, add_band, add_metadata

if TYPE_CHECKING:
    import geopandas

GPKG_VERSION = "1.2"
"""The GDAL of QGIS 3.22 warns of later ones."""

_LAYER = "sheets"

_NO_DATE = "1970-01-01T00:00:00.000Z"
"""A GeoPackage says when it was written; the same map shall be the same bytes."""


def write_gti(
    path: Path,
    files: geopandas.GeoDataFrame,
    grid: Grid,
    band_names: Sequence[str],
    tags: Mapping[str, str],
    *,
    band_tags: Sequence[Mapping[str, str]],
) -> None:
    """Write the index of a mosaic.

    Args:
        path: The file, `NAME.gti.gpkg`.
        files: Footprints in the CRS of `grid`, and the column `location`: paths relative to the folder of `path`.
        grid: Where the mosaic lies; the files lie on its pixels.
        band_names: One a band.
        tags: Tags of the mosaic.
        band_tags: Tags of each band.

    Raises:
        RasterError: the file cannot be written.
    """
    import pyogrio
    from pyogrio.errors import DataLayerError, DataSourceError, FeatureError

    root = ET.Element("GDALMultiDomainMetadata")
    domain = ET.SubElement(root, "Metadata", domain="xml:GTI", format="xml")
    domain.append(_description(grid, band_names, tags, band_tags))
    try:
        with undated():
            # Any item makes pyogrio create the tables of metadata; GDAL's own text then takes its place.
            pyogrio.write_dataframe(
                files, path, layer=_LAYER, driver="GPKG", VERSION=GPKG_VERSION, layer_metadata={"AREA_OR_POINT": "Area"}
            )
        # pyogrio hands GDAL no domain of metadata but the default one, in which bands have no names and no statistics.
        with closing(sqlite3.connect(path)) as connection, connection:
            done = connection.execute("UPDATE gpkg_metadata SET metadata = ?", (ET.tostring(root, encoding="unicode"),))
            assert done.rowcount == 1, f"{path} holds {done.rowcount} metadata records, not one"
    except (DataLayerError, DataSourceError, FeatureError, sqlite3.Error) as error:
        raise RasterError(f"cannot write {path} ({error}); free disk space or choose another folder") from error


@contextmanager
def undated() -> Iterator[None]:
    """Has GDAL write the same date into every GeoPackage instead of the present."""
    import pyogrio

    before = pyogrio.get_gdal_config_option("OGR_CURRENT_DATE")
    pyogrio.set_gdal_config_options({"OGR_CURRENT_DATE": _NO_DATE})
    try:
        yield
    finally:
        pyogrio.set_gdal_config_options({"OGR_CURRENT_DATE": before})


def _description(
    grid: Grid, band_names: Sequence[str], tags: Mapping[str, str], band_tags: Sequence[Mapping[str, str]]
) -> ET.Element:
    rows, cols = grid.shape
    a, b, c, d, e, f = (float(v) for v in tuple(grid.transform)[:6])
    root = ET.Element("GDALTileIndexDataset")
    for key, value in {
        "SRS": grid.crs.to_wkt(),
        "GeoTransform": ",".join(repr(v) for v in (c, a, b, f, d, e)),
        "XSize": cols,
        "YSize": rows,
        "BlockXSize": BLOCK_PX,
        "BlockYSize": BLOCK_PX,
    }.items():
        ET.SubElement(root, key).text = str(value)
    for index, (name, statistics) in enumerate(zip(band_names, band_tags, strict=True), start=1):
        add_band(ET.SubElement(root, "Band", band=str(index), dataType="Float32"), name, statistics)
    add_metadata(root, {"AREA_OR_POINT": "Area", **tags})
    return root

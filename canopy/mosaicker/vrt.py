"""A GDAL virtual raster (VRT, XML) that lays rasters of heights or days side by side; any QGIS opens it."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from xml.etree import ElementTree as ET

from canopy.grid import Box, Grid

BLOCK_PX = 512
"""Side of the blocks of all rasters of a map."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Values:
    """What the pixels of a mosaic are, in GDAL's words."""

    dtype: str
    nodata: str
    unit: str | None


METRES = Values(dtype="Float32", nodata="nan", unit="m")
"""Heights and errors."""

DAYS = Values(dtype="Int32", nodata="0", unit=None)
"""Days as numbers such as 20210714."""


def mosaic_vrt(
    parts: Sequence[tuple[Box, Path]],
    grid: Grid,
    box: Box,
    band_names: Sequence[str],
    tags: Mapping[str, str],
    *,
    band_tags: Sequence[Mapping[str, str]] = (),
    overviews: Sequence[Path] = (),
    beside: Path | None = None,
    values: Values = METRES,
) -> bytes:
    """The XML of a mosaic of parts; they are disjoint, so none hides another, and what none covers is unknown.

    Args:
        parts: Rasters of such values and the lattice pixels they hold.
        grid: Where `box` lies.
        box: The pixels of the mosaic.
        band_names: One a band.
        tags: Tags of the file.
        band_tags: Tags of each band, such as its statistics, or none.
        overviews: Rasters of `box`, each with half the pixels of the one before.
        beside: Folder of the VRT, for paths relative to it, so that it can be moved with its parts, which are COGs; None:
            absolute paths of anything.
        values: What the pixels are.
    """
    rows, cols = grid.shape
    root = ET.Element("VRTDataset", rasterXSize=str(cols), rasterYSize=str(rows))
    ET.SubElement(root, "SRS").text = grid.crs.to_wkt()
    a, b, c, d, e, f = tuple(grid.transform)[:6]
    ET.SubElement(root, "GeoTransform").text = ", ".join(repr(float(v)) for v in (c, a, b, f, d, e))
    add_metadata(root, {"AREA_OR_POINT": "Area", **tags})
    for index, name in enumerate(band_names, start=1):
        band = ET.SubElement(root, "VRTRasterBand", dataType=values.dtype, band=str(index))
        band.set("blockXSize", str(BLOCK_PX))
        band.set("blockYSize", str(BLOCK_PX))
        add_band(band, name, band_tags[index - 1] if band_tags else {}, values)
        for part, path in parts:
            source = ET.SubElement(band, "SimpleSource")
            _add_file(source, path, index, beside)
            height, width = part.shape
            if beside is not None:
                # These are COGs, perhaps thousands: told what they are, GDAL need not open them to open the mosaic.
                ET.SubElement(
                    source, "SourceProperties", RasterXSize=str(width), RasterYSize=str(height), DataType=values.dtype,
                    BlockXSize=str(BLOCK_PX), BlockYSize=str(BLOCK_PX),
                )  # fmt: skip
            size: dict[str, Any] = {"xSize": str(width), "ySize": str(height)}
            ET.SubElement(source, "SrcRect", xOff="0", yOff="0", **size)
            ET.SubElement(source, "DstRect", xOff=str(part.col0 - box.col0), yOff=str(part.row0 - box.row0), **size)
        for path in overviews:
            _add_file(ET.SubElement(band, "Overview"), path, index, beside)
    ET.indent(root)
    return ET.tostring(root)


def add_band(element: ET.Element, name: str, tags: Mapping[str, str], values: Values = METRES) -> None:
    """What GDAL's mosaics, VRT and GTI alike, say of a band."""
    if tags:
        add_metadata(element, tags)
    ET.SubElement(element, "Description").text = name
    if values.unit is not None:
        ET.SubElement(element, "UnitType").text = values.unit
    ET.SubElement(element, "NoDataValue").text = values.nodata


def add_metadata(element: ET.Element, tags: Mapping[str, str]) -> None:
    """Tags, in the order given."""
    metadata = ET.SubElement(element, "Metadata")
    for key, value in tags.items():
        ET.SubElement(metadata, "MDI", key=key).text = value


def _add_file(element: ET.Element, path: Path, band: int, beside: Path | None) -> None:
    name = str(path.resolve()) if beside is None else Path(os.path.relpath(path, beside)).as_posix()
    ET.SubElement(element, "SourceFilename", relativeToVRT="0" if beside is None else "1").text = name
    ET.SubElement(element, "SourceBand").text = str(band)

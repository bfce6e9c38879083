"""The images that a map was made of, as layers that open whatever becomes of them: a VRT per CRS over the files.

    imagery_vrt/1.vrt, 2.vrt, ...    paths to the images, the preferred on top; bands in the order of the model, and alpha

A VRT that says what its files are is opened without them: thousands cost nothing until they are drawn, and one that is gone
leaves its ground empty instead of a layer that cannot be opened.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final
from xml.etree import ElementTree as ET

import numpy as np
from affine import Affine
from pyproj import CRS

from canopy.errors import OutputError
from canopy.grid import Grid
from canopy.textfile import write_text

if TYPE_CHECKING:
    from canopy.region.plan import Plan, Scene

FOLDER: Final = "imagery_vrt"
"""Not a name that people give to the folder of their images: what an earlier map left under it is deleted."""

_GDAL_TYPES: Final = {
    "uint8": "Byte", "int8": "Int8", "uint16": "UInt16", "int16": "Int16", "uint32": "UInt32", "int32": "Int32",
    "float32": "Float32", "float64": "Float64",
}  # fmt: skip
_COLOURS: Final = ("Red", "Green", "Blue")


@dataclass(frozen=True, slots=True, kw_only=True)
class Picture:
    """Images of one CRS as one raster."""

    name: str
    """Path within the map's folder."""
    crs: str
    """As `Scene.crs`."""
    bands: int
    """Without alpha, which is the last."""
    dtype: str


def write_pictures(out: Path, plan: Plan, home: Path) -> tuple[Picture, ...]:
    """Write the VRTs of the local images that touch the map into `out/imagery_vrt`.

    Args:
        out: Folder to write to.
        plan: The map's.
        home: Where the map's folder will be, for the relative paths.

    Returns:
        What was written, none for a map of other imagery.

    Raises:
        OutputError: one cannot be written.
    """
    if plan.imagery.kind != "files":
        return ()
    groups: dict[tuple[str, ...], list[Scene]] = {}
    for scene in plan.imagery.scenes:
        _, b, _, d, e, _ = scene.transform
        # A VRT lays rectangles side by side; a turned image is one by itself.
        upright = b == d == 0 and e < 0
        groups.setdefault((scene.crs,) if upright else (scene.crs, scene.name), []).append(scene)
    folder = out / FOLDER
    try:
        folder.mkdir(exist_ok=True)
    except OSError as error:
        raise OutputError(f"cannot create {folder} ({error.strerror}); choose another folder") from error
    dtype, pictures = str(plan.imagery.told["dtype"]), []
    masked = plan.imagery.told["alpha"] != "data"
    for number, scenes in enumerate(groups.values(), start=1):
        name = f"{FOLDER}/{number}.vrt"
        write_text(out / name, _vrt(scenes, dtype, home.resolve() / FOLDER, masked=masked))
        pictures.append(Picture(name=name, crs=scenes[0].crs, bands=len(scenes[0].bands), dtype=dtype))
    return tuple(pictures)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Placed:
    """An image on the pixels of a mosaic."""

    scene: Scene
    name: str
    """Path, relative to the VRT where there is such a path."""
    relative: bool
    place: dict[str, str]
    """The destination's rectangle in a VRT."""


def _vrt(scenes: Sequence[Scene], dtype: str, beside: Path, *, masked: bool) -> str:
    """The XML of a mosaic of upright images of one CRS, or of a single image."""
    crs = CRS.from_user_input(scenes[0].crs)
    grids = [Grid(crs=crs, transform=Affine(*scene.transform), shape=scene.shape) for scene in scenes]
    whole = _whole(grids)
    # The preferred one last, and on top.
    placed = [_placed(scene, grid, whole, beside) for scene, grid in zip(scenes, grids, strict=True)][::-1]
    rows, cols = whole.shape
    root = ET.Element("VRTDataset", rasterXSize=str(cols), rasterYSize=str(rows))
    ET.SubElement(root, "SRS").text = crs.to_wkt()
    a, b, c, d, e, f = tuple(whole.transform)[:6]
    ET.SubElement(root, "GeoTransform").text = ", ".join(repr(float(v)) for v in (c, a, b, f, d, e))
    count = len(scenes[0].bands)
    for index in range(count):
        band = ET.SubElement(root, "VRTRasterBand", dataType=_GDAL_TYPES[dtype], band=str(index + 1))
        if index < len(_COLOURS) <= count:
            ET.SubElement(band, "ColorInterp").text = _COLOURS[index]
        for each in placed:
            source = _add_source(band, each, str(each.scene.bands[index]), dtype)
            if masked:
                ET.SubElement(source, "UseMaskBand").text = "true"
    # A band of its own: not every program shows the mask of a VRT.
    mask = ET.SubElement(root, "VRTRasterBand", dataType="Byte", band=str(count + 1))
    ET.SubElement(mask, "ColorInterp").text = "Alpha"
    for each in placed:
        first = each.scene.bands[0]
        if masked:
            source = _add_source(mask, each, f"mask,{first}", "uint8")
            ET.SubElement(source, "UseMaskBand").text = "true"
        else:  # what is tagged alpha is one more band of data: all of the image is there
            source = _add_source(mask, each, str(first), dtype)
            ET.SubElement(source, "ScaleOffset").text = "255"
            ET.SubElement(source, "ScaleRatio").text = "0"
    ET.indent(root)
    return ET.tostring(root, encoding="unicode") + "\n"


def _whole(grids: Sequence[Grid]) -> Grid:
    """The smallest grid of the finest pixels that holds all of upright grids; a single one as it is."""
    if len(grids) == 1:
        return grids[0]
    width, height = min(grid.transform.a for grid in grids), min(-grid.transform.e for grid in grids)
    bounds = np.array([grid.bounds for grid in grids])
    (left, bottom), (right, top) = bounds[:, :2].min(axis=0).tolist(), bounds[:, 2:].max(axis=0).tolist()
    shape = (max(1, round((top - bottom) / height)), max(1, round((right - left) / width)))
    return Grid(crs=grids[0].crs, transform=Affine(width, 0, left, 0, -height, top), shape=shape)


def _placed(scene: Scene, grid: Grid, whole: Grid, beside: Path) -> _Placed:
    rows, cols = scene.shape
    # Through both corners: a turned image is alone on its own grid, where they are its own.
    (x0, x1), (y0, y1) = whole.pixel(*grid.xy(np.array([0.0, cols]), np.array([0.0, rows])))
    place = {"xOff": x0, "yOff": y0, "xSize": x1 - x0, "ySize": y1 - y0}
    try:
        name, relative = Path(os.path.relpath(Path(scene.name).resolve(), beside)).as_posix(), True
    except ValueError:  # on another drive of Windows
        name, relative = scene.name, False
    return _Placed(
        scene=scene, name=name, relative=relative, place={key: f"{round(value, 6):.10g}" for key, value in place.items()}
    )


def _add_source(band: ET.Element, placed: _Placed, source_band: str, dtype: str) -> ET.Element:
    rows, cols = placed.scene.shape
    source = ET.SubElement(band, "ComplexSource")
    ET.SubElement(source, "SourceFilename", relativeToVRT="1" if placed.relative else "0").text = placed.name
    ET.SubElement(source, "SourceBand").text = source_band
    ET.SubElement(
        source, "SourceProperties", RasterXSize=str(cols), RasterYSize=str(rows), DataType=_GDAL_TYPES[dtype],
        BlockXSize="256", BlockYSize="256",
    )  # fmt: skip
    ET.SubElement(source, "SrcRect", xOff="0", yOff="0", xSize=str(cols), ySize=str(rows))
    ET.SubElement(source, "DstRect", placed.place)
    return source

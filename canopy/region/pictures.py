"""The images that a map was made of, as layers that open whatever becomes of them: a VRT per CRS over the files.

    imagery_vrt/1.vrt, 2.vrt, ...    paths to the images, the preferred on top; bands in the order of the model, and alpha

A VRT that says what its files are is opened without them: thousands cost nothing until they are drawn, and one that is gone
leaves its ground empty instead of a layer that cannot be opened.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final
from xml.sax.saxutils import escape

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


def _vrt(scenes: Sequence[Scene], dtype: str, beside: Path, *, masked: bool) -> str:
    """The XML of a mosaic of upright images of one CRS, or of a single image.

    Written as text: of ten thousand images a tree of elements takes seconds.
    """
    crs = CRS.from_user_input(scenes[0].crs)
    grids = [Grid(crs=crs, transform=Affine(*scene.transform), shape=scene.shape) for scene in scenes]
    whole, count, gdal_type = _whole(grids), len(scenes[0].bands), _GDAL_TYPES[dtype]
    rows, cols = whole.shape
    a, b, c, d, e, f = tuple(whole.transform)[:6]
    # The preferred image last, and on top.
    placed = [*zip(scenes, _files(scenes, beside), _places(grids, whole), strict=True)][::-1]

    def sources(band_of: Callable[[Scene], str], kind: str, more: str) -> Iterator[str]:
        for scene, file, place in placed:
            size = f'xSize="{scene.shape[1]}" ySize="{scene.shape[0]}"'
            raster = f'RasterXSize="{scene.shape[1]}" RasterYSize="{scene.shape[0]}"'
            yield (
                f"<ComplexSource>{file}<SourceBand>{band_of(scene)}</SourceBand>"
                f'<SourceProperties {raster} DataType="{kind}" BlockXSize="256" BlockYSize="256"/>'
                f'<SrcRect xOff="0" yOff="0" {size}/>{place}{more}</ComplexSource>'
            )

    masking = "<UseMaskBand>true</UseMaskBand>" if masked else ""
    lines = [
        f'<VRTDataset rasterXSize="{cols}" rasterYSize="{rows}">',
        f"<SRS>{escape(crs.to_wkt())}</SRS>",
        f"<GeoTransform>{', '.join(repr(float(v)) for v in (c, a, b, f, d, e))}</GeoTransform>",
    ]
    for index in range(count):
        lines.append(f'<VRTRasterBand dataType="{gdal_type}" band="{index + 1}">')
        if index < len(_COLOURS) <= count:
            lines.append(f"<ColorInterp>{_COLOURS[index]}</ColorInterp>")
        lines += sources(lambda scene, index=index: str(scene.bands[index]), gdal_type, masking)  # type: ignore[misc]
        lines.append("</VRTRasterBand>")
    # A band of its own: not every program shows the mask of a VRT.
    lines += [f'<VRTRasterBand dataType="Byte" band="{count + 1}">', "<ColorInterp>Alpha</ColorInterp>"]
    if masked:
        lines += sources(lambda scene: f"mask,{scene.bands[0]}", "Byte", masking)
    else:  # what is tagged alpha is one more band of data: all of the image is there
        all_of_it = "<ScaleOffset>255</ScaleOffset><ScaleRatio>0</ScaleRatio>"
        lines += sources(lambda scene: str(scene.bands[0]), gdal_type, all_of_it)
    return "\n".join([*lines, "</VRTRasterBand>", "</VRTDataset>", ""])


def _whole(grids: Sequence[Grid]) -> Grid:
    """The smallest grid of the finest pixels that holds all of upright grids; a single one as it is."""
    if len(grids) == 1:
        return grids[0]
    width, height = min(grid.transform.a for grid in grids), min(-grid.transform.e for grid in grids)
    bounds = np.array([grid.bounds for grid in grids])
    (left, bottom), (right, top) = bounds[:, :2].min(axis=0).tolist(), bounds[:, 2:].max(axis=0).tolist()
    shape = (max(1, round((top - bottom) / height)), max(1, round((right - left) / width)))
    return Grid(crs=grids[0].crs, transform=Affine(width, 0, left, 0, -height, top), shape=shape)


def _files(scenes: Sequence[Scene], beside: Path) -> Iterator[str]:
    """The path of each image as XML, relative to the VRT where there is such a path."""
    folders: dict[Path, tuple[str, bool]] = {}
    for path in (Path(scene.name) for scene in scenes):
        if path.parent not in folders:
            try:
                folders[path.parent] = Path(os.path.relpath(path.parent.resolve(), beside)).as_posix(), True
            except ValueError:  # on another drive of Windows
                folders[path.parent] = path.parent.as_posix(), False
        folder, relative = folders[path.parent]
        yield f'<SourceFilename relativeToVRT="{relative:d}">{escape(f"{folder}/{path.name}")}</SourceFilename>'


def _places(grids: Sequence[Grid], whole: Grid) -> Iterator[str]:
    """Where each image lies in the mosaic, as XML."""
    for grid in grids:
        rows, cols = grid.shape
        # Through both corners: a turned image is alone on its own grid, where they are its own.
        x0, y0 = whole.pixel(*grid.xy(0.0, 0.0))
        x1, y1 = whole.pixel(*grid.xy(float(cols), float(rows)))
        sides = (("xOff", x0), ("yOff", y0), ("xSize", x1 - x0), ("ySize", y1 - y0))
        yield "<DstRect " + " ".join(f'{key}="{round(side, 6):.10g}"' for key, side in sides) + "/>"

"""`region.qgz`: the map as a QGIS project, with its layers in their order, groups and styles, and paths relative to itself.

Written without QGIS, which the machines that make maps seldom have: what QGIS reads of a project is XML in a zip, and what
is left out of it QGIS fills with its defaults. The same map gives the same bytes.
"""

from __future__ import annotations

import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Literal
from xml.etree import ElementTree as ET

from pyproj import CRS

from canopy.region import styles
from canopy.region.layers import AREA, AREA_LAYER
from canopy.region.shift import LAYER as SHIFT
from canopy.textfile import write_bytes

if TYPE_CHECKING:
    from canopy.grid import Grid
    from canopy.region.pictures import Picture
    from canopy.region.plan import Plan

PROJECT: Final = "region.qgz"

_AREA_COLOUR: Final = "#d7191c"
_SHIFT_COLOUR: Final = "#e3342f"
_SHEET_COLOUR: Final = "#4d4d4d"
_UNCALIBRATED_COLOUR: Final = "#3a3a3a"

_ZIP_DATE: Final = (1980, 1, 1, 0, 0, 0)
"""A zip says when its files were written; the same map shall be the same bytes."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Layer:
    """A layer of the project."""

    key: str
    title: str
    source: str
    """As QGIS writes it, relative to the project."""
    kind: Literal["raster", "vector"]
    style: ET.Element
    """Pipe of a raster, renderer of polygons."""
    crs: CRS
    shown: bool
    abstract: str
    unfolded: bool = True
    """Whether its legend is shown."""

    @property
    def id(self) -> str:
        """What the project calls it; QGIS replaces what is of ten characters or fewer."""
        return f"canopy_map_{self.key}"


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Group:
    """Layers under one heading, the uppermost first."""

    title: str
    members: tuple[_Layer | _Group, ...]
    shown: bool = True


def write_project(
    out: Path,
    plan: Plan,
    pictures: Sequence[Picture],
    *,
    shift: Mapping[str, Any],
    dates: Sequence[int],
    title: str,
    abstract: str,
) -> None:
    """Write `region.qgz` into a folder that holds all other files of the map.

    Args:
        out: The folder.
        plan: The map's.
        pictures: The images that it was made of, as `canopy.region.pictures.write_pictures` left them.
        shift: What the run's record says of it, see `canopy.region.shift.shift_record`.
        dates: Days since 1970-01-01 that the legend of `date.tif` names; none where there is no such file.
        title: Of the project.
        abstract: What to know of the map, in plain words.

    Raises:
        OutputError: the file cannot be written.
    """
    groups = _groups(plan, pictures, shift=shift, dates=dates)
    text = styles.document(_project(groups, plan.lattice.grid(plan.extent), title, abstract))
    buffer = BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        entry = zipfile.ZipInfo("region.qgs", date_time=_ZIP_DATE)
        entry.create_system, entry.external_attr, entry.compress_type = 3, 0o644 << 16, zipfile.ZIP_DEFLATED
        archive.writestr(entry, text)
    write_bytes(out / PROJECT, buffer.getvalue())


# --- which layers --------------------------------------------------------------------------------------------------------


def _groups(
    plan: Plan, pictures: Sequence[Picture], *, shift: Mapping[str, Any], dates: Sequence[int]
) -> tuple[_Group, ...]:
    crs = plan.lattice.crs
    kind = "tif" if plan.one_file else "vrt"
    where: list[_Layer | _Group] = []
    if plan.area is not None:
        where.append(
            _Layer(
                key="area", title="Area of interest", source=_table(AREA, AREA_LAYER), kind="vector", crs=crs, shown=True,
                style=styles.outlined(_AREA_COLOUR, 0.6), abstract="What was asked for.",
            )
        )  # fmt: skip
    if shift["measured"]:
        where.append(
            _Layer(
                key="shift", title="Likeness to the calibration data", source=_table(SHIFT, "shift"), kind="vector", crs=crs,
                shown=bool(shift["sheets_flagged"]),
                style=styles.hatched_where(
                    "flagged", _SHIFT_COLOUR, yes="unlike it: 90 % not promised here", no="like it", unknown="not measured"
                ),
                abstract="Sheets of the map, and how much of each looks unlike the data that the error was measured on.",
            )
        )  # fmt: skip
    if not plan.one_file:
        where.append(
            _Layer(
                key="sheets", title="Sheets", source=_table("height.gti.gpkg", "sheets"), kind="vector", crs=crs,
                shown=False, style=styles.outlined(_SHEET_COLOUR, 0.3), abstract="The files that the map consists of.",
            )
        )  # fmt: skip
    values: list[_Layer | _Group] = []
    error = _Layer(
        key="error", title="Error, ± m", source=f"./error.{kind}", kind="raster", crs=crs, shown=False,
        style=styles.error_pipe(calibrated=plan.calibration is not None),
        abstract="Half-width of the 90 % interval in metres; lower and upper end are its other bands.",
    )  # fmt: skip
    values.append(error if plan.calibration is not None else _uncalibrated(error))
    values.append(
        _Layer(
            key="height", title="Canopy height, m above ground", source=f"./height.{kind}", kind="raster", crs=crs,
            shown=True, style=styles.height_pipe(), abstract="Metres above ground; unknown where there is no value.",
        )
    )  # fmt: skip
    if dates:
        values.append(
            _Layer(
                key="date", title="Date of the imagery", source=f"./date.{kind}", kind="raster", crs=crs, shown=False,
                style=styles.date_pipe([styles.day_of(day) for day in dates]), unfolded=False,
                abstract="Day of the image that each pixel comes from, as a number: 20210714 is 14 July 2021.",
            )
        )  # fmt: skip
    values.append(
        _Layer(
            key="unknown", title="Unknown: no imagery, or no model has an answer", source=_table(AREA, AREA_LAYER),
            kind="vector", crs=crs, shown=True, style=styles.filled(),
            abstract="What was asked for, in grey below the heights: it shows where there is none.",
        )
    )  # fmt: skip
    groups = [_Group(title="Where", members=tuple(where)), _Group(title="Canopy height", members=tuple(values))]
    if pictures:
        groups.append(_Group(title="Imagery", members=tuple(_image(picture, len(pictures)) for picture in pictures)))
    return tuple(group for group in groups if group.members)


def _uncalibrated(error: _Layer) -> _Group:
    """An error that nothing is promised of: grey, hatched and called so."""
    hatch = _Layer(
        key="uncalibrated", title="Uncalibrated: nothing is promised of the error", source=_table(AREA, AREA_LAYER),
        kind="vector", crs=error.crs, shown=True, style=styles.hatched(_UNCALIBRATED_COLOUR),
        abstract="The model has no calibration: its error is its own spread, whose coverage nobody has measured.",
    )  # fmt: skip
    shown = _Layer(
        key=error.key, title="Error, ± m (uncalibrated)", source=error.source, kind=error.kind, style=error.style,
        crs=error.crs, shown=True, abstract=f"{error.abstract} Uncalibrated: coverage not measured.",
    )  # fmt: skip
    return _Group(title="Error (uncalibrated)", members=(hatch, shown), shown=False)


def _image(picture: Picture, count: int) -> _Layer:
    name = Path(picture.name).stem
    return _Layer(
        key=f"imagery_{name}", title="Imagery" if count == 1 else f"Imagery {name}", source=f"./{picture.name}",
        kind="raster", crs=CRS.from_user_input(picture.crs), shown=True, unfolded=False,
        style=styles.image_pipe(picture.bands, stretched=picture.dtype != "uint8"),
        abstract="The local images that the map was made of, read from where they were.",
    )  # fmt: skip


def _table(file: str, layer: str) -> str:
    return f"./{file}|layername={layer}"


# --- their XML -----------------------------------------------------------------------------------------------------------


def _project(groups: Sequence[_Group], grid: Grid, title: str, abstract: str) -> ET.Element:
    root = ET.Element("qgis", version=styles.QGIS, projectname=title)
    ET.SubElement(root, "homePath", path="")
    ET.SubElement(root, "title").text = title
    _add_crs(ET.SubElement(root, "projectCrs"), grid.crs)
    tree = ET.SubElement(root, "layer-tree-group")
    for group in groups:
        _add_group(tree, group)
    ET.SubElement(tree, "custom-order", enabled="0")
    canvas = ET.SubElement(root, "mapcanvas", name="theMapCanvas", annotationsVisible="1")
    ET.SubElement(canvas, "units").text = "meters"
    _add_extent(ET.SubElement(canvas, "extent"), grid)
    ET.SubElement(canvas, "rotation").text = "0"
    _add_crs(ET.SubElement(canvas, "destinationsrs"), grid.crs)
    layers = [layer for group in groups for layer in _flat(group)]
    projected = ET.SubElement(root, "projectlayers")
    projected.extend(_map_layer(layer) for layer in layers)
    order = ET.SubElement(root, "layerorder")
    for layer in layers:
        ET.SubElement(order, "layer", id=layer.id)
    properties = ET.SubElement(root, "properties")
    ET.SubElement(ET.SubElement(properties, "Paths"), "Absolute", type="bool").text = "false"
    ET.SubElement(ET.SubElement(properties, "SpatialRefSys"), "ProjectionsEnabled", type="int").text = "1"
    _add_metadata(ET.SubElement(root, "projectMetadata"), title, abstract)
    view = ET.SubElement(root, "ProjectViewSettings", UseProjectScales="0", rotation="0")
    left, bottom, right, top = (repr(float(side)) for side in grid.bounds)
    _add_crs(ET.SubElement(view, "DefaultViewExtent", xmin=left, ymin=bottom, xmax=right, ymax=top), grid.crs)
    return root


def _flat(group: _Group) -> list[_Layer]:
    return [layer for member in group.members for layer in ([member] if isinstance(member, _Layer) else _flat(member))]


def _add_group(parent: ET.Element, group: _Group) -> None:
    element = ET.SubElement(parent, "layer-tree-group", name=group.title, checked=_checked(shown=group.shown), expanded="1")
    for member in group.members:
        if isinstance(member, _Group):
            _add_group(element, member)
            continue
        ET.SubElement(
            element, "layer-tree-layer", id=member.id, name=member.title, source=member.source,
            providerKey=_provider(member), checked=_checked(shown=member.shown), expanded="1" if member.unfolded else "0",
        )  # fmt: skip


def _checked(*, shown: bool) -> str:
    return "Qt::Checked" if shown else "Qt::Unchecked"


def _provider(layer: _Layer) -> str:
    return "gdal" if layer.kind == "raster" else "ogr"


def _map_layer(layer: _Layer) -> ET.Element:
    element = ET.Element("maplayer", type=layer.kind, styleCategories="AllStyleCategories")
    if layer.kind == "vector":
        element.attrib |= {"geometry": "Polygon", "wkbType": "MultiPolygon", "readOnly": "1", "labelsEnabled": "0"}
    ET.SubElement(element, "id").text = layer.id
    ET.SubElement(element, "datasource").text = layer.source
    ET.SubElement(element, "layername").text = layer.title
    _add_crs(ET.SubElement(element, "srs"), layer.crs)
    _add_metadata(ET.SubElement(element, "resourceMetadata"), layer.title, layer.abstract)
    provider = ET.SubElement(element, "provider")
    provider.text = _provider(layer)
    if layer.kind == "vector":
        provider.set("encoding", "UTF-8")
    flags = ET.SubElement(element, "flags")
    for name, value in {"Identifiable": "1", "Removable": "1", "Searchable": "1", "Private": "0"}.items():
        ET.SubElement(flags, name).text = value
    element.append(layer.style)
    ET.SubElement(element, "blendMode").text = "0"
    return element


def _add_metadata(element: ET.Element, title: str, abstract: str) -> None:
    ET.SubElement(element, "type").text = "dataset"
    ET.SubElement(element, "title").text = title
    ET.SubElement(element, "abstract").text = abstract


def _add_extent(element: ET.Element, grid: Grid) -> None:
    for name, side in zip(("xmin", "ymin", "xmax", "ymax"), grid.bounds, strict=True):
        ET.SubElement(element, name).text = repr(float(side))


def _add_crs(parent: ET.Element, crs: CRS) -> None:
    """A CRS as QGIS reads it: the text says all, and QGIS finds its number by itself."""
    element = ET.SubElement(parent, "spatialrefsys")
    ET.SubElement(element, "wkt").text = crs.to_wkt()
    code = crs.to_authority()
    if code is not None:
        ET.SubElement(element, "authid").text = ":".join(code)
    ET.SubElement(element, "description").text = crs.name
    ET.SubElement(element, "geographicflag").text = "true" if crs.is_geographic else "false"

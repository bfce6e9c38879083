"""The plan of a region: everything that decides its pixels, and how the work is cut into sheets, settled before the first.

A plan is a value that travels as JSON. A worker process and a run that goes on after a kill take from it alone what they
do, so they cannot do anything else; what they read must still be what was planned with.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Literal
from xml.etree import ElementTree as ET

from affine import Affine
from pydantic import BaseModel, ConfigDict
from pyproj import CRS, Transformer

from canopy import __version__
from canopy.errors import AreaError, ContractError, GridError, OutputError
from canopy.grid import Box, Lattice, Layout, sheets_over, utm_crs
from canopy.model.shift import FLAG_SHARE
from canopy.model.squares import SQUARE_PX
from canopy.model.tables import Calibrated
from canopy.tiler.area import Area, BoundsLonLat, PlannedArea, as_area
from canopy.tiler.headers import NO_DATE, Band, bands_of, ground_gsd_m
from canopy.tiler.imagery import ImageFiles, ImageryInfo, ImagerySource
from canopy.tiler.stamps import Stamp, changed, files_behind

if TYPE_CHECKING:
    import geopandas

    from canopy.model.package import Contract
    from canopy.mosaicker.ensemble import Ensemble
    from canopy.tiler.manifest import Manifest

SHEET_PX: Final = 16_384
"""Side of a sheet: a region no larger is one sheet. The pixels do not depend on it."""

MAX_FILE_PX: Final = 32_768
"""Longest side of a map that is one file; a larger one is a file a sheet with an index over them. GDAL and QGIS open larger
files, but copying, repairing and reading one in parts is work in pieces of this size anyway."""

GSD_SLACK: Final = 0.05
"""How much coarser than the model's range an image may be and still be resampled into it; a CRS distorts by as much."""

GAUSSIAN_90: Final = 1.6449
"""Half-width of the central 90 % of a normal distribution in standard deviations, for models without a calibration."""

_LONLAT: Final = CRS.from_epsg(4326)

Corners = tuple[int, int, int, int]
"""row0, col0, row1, col1 of a box."""


class Value(BaseModel):
    """What is kept as JSON: unknown keys are refused, nothing changes."""

    model_config = ConfigDict(extra="forbid", frozen=True, ser_json_inf_nan="constants")


class PlannedModel(Value):
    """A model as it was when the region was planned."""

    folder: str
    name: str
    version: str
    weights_sha256: str
    contract_sha256: str

    @classmethod
    def of(cls, folder: Path) -> PlannedModel:
        """The model in a folder as its contract describes it now."""
        from canopy.model.package import read_contract

        contract = read_contract(folder)
        return cls(
            folder=str(folder.absolute()),
            name=contract.name,
            version=contract.version,
            weights_sha256=contract.weights_sha256,
            contract_sha256=hashlib.sha256(contract.model_dump_json().encode()).hexdigest(),
        )


class Scene(Value):
    """An image, or an item of a catalogue, that may give pixels of the map."""

    name: str
    """Absolute path of a local image; collection and id of an item."""
    day: int | None
    """Days from 1970-01-01 to the day it was taken; None: unknown."""
    crs: str
    """Authority code, or WKT where there is none."""
    transform: tuple[float, float, float, float, float, float]
    """Pixel (col, row) -> CRS (x, y), as affine's first six numbers."""
    shape: tuple[int, int]
    """(rows, columns)."""
    bands: tuple[int, ...] = ()
    """The bands of a local image that the model sees, from 1."""


class PlannedImagery(Value):
    """Imagery as it was when the region was planned."""

    kind: Literal["files", "manifest", "object"]
    """Local files; a search of a catalogue; or a Python object, which no other process can open."""
    files: tuple[str, ...] = ()
    """Absolute paths of local images."""
    manifest_sha256: str | None = None
    """Digest of the frozen search, whose file lies beside the plan."""
    cache: str | None = None
    """Folder to keep what is fetched."""
    stamps: tuple[Stamp, ...] = ()
    """The local files behind it, sidecars and what a VRT is made of among them."""
    scenes: tuple[Scene, ...] = ()
    """What of it touches the map, the preferred first; of a Python object nothing is known."""
    told: dict[str, Any]
    """What a run's record says of it."""


class Plan(Value):
    """All that decides what a map will hold, and how the work on it is cut. Equal plans give equal bytes."""

    canopy: str
    """Version that made it."""
    imagery: PlannedImagery
    bands: tuple[Band, ...] | None
    crs: str
    """Authority code of the map's CRS, or WKT where there is none."""
    crs_chosen: str
    """Why this CRS, in words."""
    gsd_m: float
    window_px: int
    stride_px: int
    resampled: str
    """How the imagery's pixels become lattice pixels."""
    area: PlannedArea | None
    """None: the whole imagery."""
    models: tuple[PlannedModel, ...]
    tta: str
    calibration: Calibrated | None
    """What turns spreads into intervals; None: the maps are uncalibrated, and say so."""
    device: str
    precision: str
    compiled: bool
    batch: int | None
    """Windows in one forward pass; None: as many as suit the device."""
    box: Corners
    """The map's pixels."""
    sheet_px: int
    """Side of a whole sheet."""
    sheets: tuple[Corners, ...]
    """Those of its parts that the area touches, in row-major order."""
    one_file: bool
    """Whether the sheets become one file; otherwise each is one."""
    tags: dict[str, str]
    """Tags of the files."""

    @cached_property
    def lattice(self) -> Lattice:
        """The map's pixels."""
        return Lattice(crs=CRS.from_user_input(self.crs), gsd_m=self.gsd_m)

    @property
    def layout(self) -> Layout:
        """The model's windows."""
        return Layout(window_px=self.window_px, stride_px=self.stride_px)

    @property
    def days(self) -> tuple[int, ...]:
        """Days since 1970-01-01 on which scenes that touch the map were taken, ascending, as far as they are known."""
        return tuple(sorted({scene.day for scene in self.imagery.scenes if scene.day is not None}))

    @property
    def is_dated(self) -> bool:
        """Whether these scenes differ in their day, so that each pixel's day is worth a file."""
        return len({scene.day for scene in self.imagery.scenes}) > 1

    @property
    def extent(self) -> Box:
        """`box` as a box."""
        return Box(*self.box)

    @property
    def device_type(self) -> str:
        """Kind of device: cpu, cuda."""
        return self.device.partition(":")[0]

    @property
    def pixels(self) -> int:
        """Pixels of all sheets."""
        return sum(math.prod(self.sheet(number).shape) for number in range(len(self.sheets)))

    def sheet(self, number: int) -> Box:
        """The pixels of a sheet."""
        return Box(*self.sheets[number])

    def sheet_name(self, number: int) -> str:
        """What a sheet is called, by its first pixel on the lattice."""
        row0, col0, _, _ = self.sheets[number]
        return f"r{row0}_c{col0}"

    def windows(self, number: int) -> int:
        """Windows with weight in a sheet, whether they will be run or not."""
        box = self.sheet(number)
        return len(self.layout.windows_over(box.row0, box.row1)) * len(self.layout.windows_over(box.col0, box.col1))

    @cached_property
    def polygons(self) -> geopandas.GeoSeries | None:
        """The area in the map's CRS; None is everywhere."""
        return None if self.area is None else self.area.area.polygons_in(self.lattice.crs)

    @cached_property
    def digest(self) -> str:
        """SHA-256 of the plan: of what decides the pixels and of how the work is cut."""
        return hashlib.sha256(self.model_dump_json().encode()).hexdigest()

    @cached_property
    def identity(self) -> str:
        """SHA-256 of what decides the pixels, and of nothing else: maps of one identity hold the same heights."""
        imagery = self.imagery
        value = {
            "canopy": self.canopy,
            "imagery": [stamp.model_dump() for stamp in imagery.stamps],
            "manifest": imagery.manifest_sha256,
            "object": imagery.told["files"] if imagery.kind == "object" else None,
            "bands": self.bands,
            "crs": self.crs,
            "gsd_m": self.gsd_m,
            "windows": [self.window_px, self.stride_px],
            "area": None if self.area is None else [self.area.crs, *self.area.polygons],
            "models": [[model.weights_sha256, model.contract_sha256] for model in self.models],
            "tta": self.tta,
            "calibration": None if self.calibration is None else self.calibration.model_dump(mode="json"),
            "device": self.device_type,
            "precision": self.precision,
            "compiled": self.compiled,
        }
        return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()

    def difference(self, other: Plan) -> str:
        """The first thing in which another plan would give other pixels, in words."""
        return next(self._differences(other), "other settings")

    def _differences(self, other: Plan) -> Iterator[str]:
        if self.canopy != other.canopy:
            yield f"canopy {other.canopy} instead of {self.canopy}"
        for one, two in zip(self.models, other.models, strict=False):
            if (one.weights_sha256, one.contract_sha256) != (two.weights_sha256, two.contract_sha256):
                yield f"model {two.name} {two.version} ({two.weights_sha256[:12]}…, contract {two.contract_sha256[:12]}…)"
        if len(self.models) != len(other.models):
            yield f"{len(other.models)} models instead of {len(self.models)}"
        before = {stamp.path: stamp for stamp in self.imagery.stamps}
        for stamp in other.imagery.stamps:
            if before.get(stamp.path) != stamp:
                yield f"a changed {stamp.path}" if stamp.path in before else f"imagery {stamp.path}"
        if self.imagery.manifest_sha256 != other.imagery.manifest_sha256 or len(before) != len(other.imagery.stamps):
            yield "other imagery"
        names = {
            "bands": "bands", "crs": "CRS", "gsd_m": "GSD", "area": "area of interest", "tta": "test-time augmentation",
            "calibration": "calibration",
            "device_type": "device", "precision": "precision", "compiled": "compilation",
        }  # fmt: skip
        yield from (f"other {name}" for key, name in names.items() if getattr(self, key) != getattr(other, key))

    def refuse_changed(self) -> None:
        """Stop when what the plan was made with is no longer there: a map is of one state of its inputs.

        Raises:
            OutputError: canopy, a model or a file of the imagery is not the one that was planned with.
        """
        remedy = "put it back, or start anew with canopy map … --overwrite"
        if self.canopy != __version__:
            raise OutputError(f"the map was planned by canopy {self.canopy} and this is canopy {__version__}; {remedy}")
        self.refuse_changed_imagery()
        for model in self.models:
            now = PlannedModel.of(Path(model.folder))
            if (now.weights_sha256, now.contract_sha256) != (model.weights_sha256, model.contract_sha256):
                raise OutputError(
                    f"model {model.folder} changed since the map was planned (weights {model.weights_sha256[:12]}… then, "
                    f"{now.weights_sha256[:12]}… now); {remedy}"
                )

    def refuse_changed_imagery(self) -> None:
        """The part of `refuse_changed` that costs next to nothing."""
        if (path := changed(self.imagery.stamps)) is not None:
            raise OutputError(
                f"imagery {path} changed since the map was planned; put it back, or start anew with canopy map … --overwrite"
            )


# --- planning ------------------------------------------------------------------------------------------------------------


def plan_region(
    aoi: Area | Path | BoundsLonLat | None,
    source: ImagerySource,
    ensemble: Ensemble,
    *,
    folders: Sequence[Path],
    gsd_m: float | None = None,
    crs: CRS | str | None = None,
    bands: Sequence[Band] | None = None,
    sheet_px: int = SHEET_PX,
    max_file_px: int = MAX_FILE_PX,
    device: str = "cpu",
    precision: str = "float32",
    compiled: bool = False,
    batch: int | None = None,
) -> Plan:
    """Settle what will be mapped, from headers only.

    Args:
        aoi: Area of interest; see `map_region`.
        source: Imagery.
        ensemble: The models, on whatever device.
        folders: Where they are.
        gsd_m: Ground sampling distance of the map in metres.
        crs: Its CRS.
        bands: Image bands in the order of the model's contract.
        sheet_px: Side of the sheets.
        max_file_px: Longest side of a map in one file.
        device: torch device of the run.
        precision: What the network computes in.
        compiled: Whether torch compiles it.
        batch: Windows in one forward pass.

    Raises:
        ContractError: the imagery is none for the model.
        GridError: the CRS is unknown or wrong for the place, or the sheets are of no size.
        AreaError: the area is unreadable, lies outside the imagery, or holds no pixel.
    """
    info, contract = source.info, ensemble.contract
    map_gsd_m = info.gsd_m if gsd_m is None else gsd_m
    chosen_bands = _bands(info.band_names, contract, bands)
    _check_contract(source, contract, chosen_bands, map_gsd_m)
    if max_file_px < 1:
        raise GridError(f"max_file_px = {max_file_px} is not positive; give for example {MAX_FILE_PX}")
    if crs is not None:
        map_crs, why = _crs(crs), "as asked for"
    else:
        map_crs = info.metric_crs
        why = "the imagery's own" if map_crs == info.crs else "the UTM zone of the imagery's centre"
    lattice = Lattice(crs=map_crs, gsd_m=map_gsd_m)
    wanted = None if aoi is None else as_area(aoi)
    polygons = None if wanted is None else wanted.polygons_in(lattice.crs)
    with source.open(lattice, chosen_bands) as opened:
        image_box, resampled = opened.box, opened.resampled
        box = image_box if polygons is None else _covered(lattice, wanted, polygons, image_box, info)
        scenes = _scenes(source, chosen_bands, opened.touching(box))
    why += _check_place(lattice, box, info.source)
    one_file = max(box.shape) <= max_file_px
    if not one_file:
        from canopy.mosaicker.sheets import check_sheet_px

        check_sheet_px(sheet_px)
    # A file that fits one sheet is one, wherever the sheet borders are: no window is then computed twice.
    cut = (box,) if one_file and max(box.shape) <= sheet_px else tuple(sheets_over(box, sheet_px))
    sheets = cut if polygons is None else _touched(cut, lattice, polygons)
    if not sheets:
        raise AreaError(
            f"the area of interest ({wanted}) touches no pixel of {info.source}; choose an area that the imagery covers"
        )
    told = {
        "source": info.source, "files": source.record(), "gsd_m": info.gsd_m, "dtype": info.dtype,
        "crs": info.crs.to_string(), "alpha": info.alpha, "alpha_reason": info.alpha_reason, "left_out": [*info.left_out],
        **_rights(source),
    }  # fmt: skip
    return Plan(
        canopy=__version__,
        imagery=_planned_imagery(source, told, scenes),
        bands=chosen_bands,
        crs=lattice.crs.to_string(),
        crs_chosen=why,
        gsd_m=lattice.gsd_m,
        window_px=contract.window_px,
        stride_px=contract.stride_px,
        resampled=resampled,
        area=None if wanted is None else PlannedArea.of(wanted),
        models=tuple(PlannedModel.of(folder) for folder in folders),
        tta=ensemble.tta,
        calibration=ensemble.tables,
        device=device,
        precision=precision,
        compiled=compiled,
        batch=batch,
        box=_corners(box),
        sheet_px=sheet_px,
        sheets=tuple(_corners(sheet) for sheet in sheets),
        one_file=one_file,
        tags=_tags(source, ensemble, precision, resampled),
    )


def _covered(lattice: Lattice, area: Area | None, polygons: geopandas.GeoSeries, image: Box, info: ImageryInfo) -> Box:
    """The pixels of the imagery that the rectangle around the area holds."""
    covered = lattice.covering(tuple(polygons.total_bounds)).intersect(image)
    if covered is None:
        raise AreaError(
            f"the area of interest ({area}) lies outside {info.source} "
            f"(centre {info.centre_lon_deg:.4f}, {info.centre_lat_deg:.4f}); check its CRS and coordinates"
        )
    return covered


def _corners(box: Box) -> Corners:
    return box.row0, box.col0, box.row1, box.col1


def _bands(
    names: Sequence[str | None], contract: Contract, asked: Sequence[Band] | None
) -> tuple[Band, ...] | None:  # fmt: skip
    """The bands to read: those asked for, else those of the contract's names, else None for all."""
    if asked is not None:
        return tuple(asked)
    named = {name.casefold(): name for name in names if name}
    if all(name.casefold() in named for name in contract.bands):
        return tuple(named[name.casefold()] for name in contract.bands)
    return None


def _check_contract(source: ImagerySource, contract: Contract, bands: Sequence[Band] | None, map_gsd_m: float) -> None:
    info = source.info
    coarsest = contract.gsd_range_m[1]
    if info.coarsest_gsd_m > coarsest * (1 + GSD_SLACK):
        raise ContractError(
            f"{info.coarsest} has a GSD of {info.coarsest_gsd_m:.3g} m, coarser than the {coarsest:g} m of {contract.name}: "
            f"resampling cannot bring back crowns that it does not show; use finer imagery or another model"
        )
    contract.check_imagery(band_count=info.band_count if bands is None else len(bands), dtype=info.dtype, gsd_m=map_gsd_m)


def _crs(text: CRS | str) -> CRS:
    from pyproj.exceptions import CRSError

    try:
        return CRS.from_user_input(text)
    except CRSError as error:
        raise GridError(f"CRS {text!r} is not known; give for example EPSG:32610") from error


def _check_place(lattice: Lattice, box: Box, source: str) -> str:
    """Refuse a CRS that was not made for the place; what to say where a map in a UTM zone reaches into the next."""
    grid = lattice.grid(box)
    left, bottom, right, top = grid.bounds
    west, south, east, north = Transformer.from_crs(lattice.crs, _LONLAT, always_xy=True).transform_bounds(
        left, bottom, right, top
    )
    on_ground_m = ground_gsd_m(grid)
    lon, lat = (west + east) / 2, (south + north) / 2
    if not abs(on_ground_m / lattice.gsd_m - 1) <= GSD_SLACK:  # NaN, outside the CRS's domain, is as wrong
        raise GridError(
            f"pixels of {lattice.gsd_m:g} m in {lattice.crs.name!r} are {on_ground_m:.3g} m on the ground at {source}, "
            f"more than {GSD_SLACK:.0%} off; choose a CRS made for that place with --crs, for example "
            f"{utm_crs(lon, lat).to_string()}"
        )
    if lattice.crs.utm_zone is None or not (-80 <= lat <= 84 and west <= east):
        return ""
    zones = [utm_crs(edge, lat).to_string() for edge in (west, max(west, east - 1e-9))]
    if zones[0] == zones[1]:
        return ""
    return f"; the map reaches from {zones[0]} in the west to {zones[1]} in the east and is all in this one"


def _touched(sheets: Sequence[Box], lattice: Lattice, polygons: geopandas.GeoSeries) -> tuple[Box, ...]:
    """The sheets that a polygon touches: an area of scattered parts has many others."""
    import shapely

    squares = shapely.box(*zip(*(lattice.grid(sheet).bounds for sheet in sheets), strict=True))
    touched = set(shapely.STRtree(squares).query(polygons.to_numpy(), predicate="intersects")[1].tolist())
    return tuple(sheet for number, sheet in enumerate(sheets) if number in touched)


def _planned_imagery(source: ImagerySource, told: dict[str, Any], scenes: tuple[Scene, ...]) -> PlannedImagery:
    if isinstance(source, ImageFiles):
        files = [file.path.absolute() for file in source.info.files]
        return PlannedImagery(kind="files", files=tuple(map(str, files)), stamps=_stamps(files), scenes=scenes, told=told)
    manifest = manifest_of(source)
    if manifest is None:
        return PlannedImagery(kind="object", told=told)
    # A catalogue of local files changes with them; what a service holds its manifest tells by checksums where it has any.
    local = [Path(asset.href) for item in manifest.items for asset in item.assets.values() if Path(asset.href).is_file()]
    cache = source.cache  # type: ignore[attr-defined]  # a source with a manifest is `StacItems`
    return PlannedImagery(
        kind="manifest",
        manifest_sha256=manifest.sha256,
        cache=None if cache is None else str(Path(cache).absolute()),
        stamps=_stamps([path.absolute() for path in local]),
        scenes=scenes,
        told=told,
    )


def _scenes(source: ImagerySource, bands: Sequence[Band] | None, places: Iterable[int]) -> tuple[Scene, ...]:
    """The scenes at these places of the source's record."""
    if isinstance(source, ImageFiles):
        files = [source.info.files[place] for place in places]
        return tuple(
            Scene(
                name=str(file.path.absolute()), day=None if file.day == NO_DATE else file.day, crs=file.grid.crs.to_string(),
                transform=_six(file.grid.transform), shape=file.grid.shape, bands=bands_of(file, bands, source.info.alpha),
            )
            for file in files
        )  # fmt: skip
    manifest = manifest_of(source)
    if manifest is None:
        return ()
    asset = manifest.source.band[0].asset
    items = [manifest.items[place] for place in places]
    return tuple(
        Scene(
            name=f"{item.collection}/{item.id}", day=item.day, crs=item.assets[asset].crs,
            transform=item.assets[asset].transform, shape=item.assets[asset].shape,
        )
        for item in items
    )  # fmt: skip


def _rights(source: ImagerySource) -> dict[str, str | None]:
    """Licence and attribution of the imagery, where its source says; local files do not."""
    manifest = None if isinstance(source, ImageFiles) else manifest_of(source)
    if manifest is None:
        return {"licence": None, "attribution": None}
    return {"licence": manifest.source.licence, "attribution": manifest.source.attribution}


def _six(transform: Affine) -> tuple[float, float, float, float, float, float]:
    return transform.a, transform.b, transform.c, transform.d, transform.e, transform.f


def manifest_of(source: ImagerySource) -> Manifest | None:
    """The frozen search that imagery comes from; None for other imagery."""
    from canopy.tiler.stac import StacItems

    return source.manifest if isinstance(source, StacItems) else None


def _stamps(files: Iterable[Path]) -> tuple[Stamp, ...]:
    """Stamps of files, their sidecars, and what VRTs among them are made of; each once, in the order of their paths."""
    found: set[Path] = set()
    for file in files:
        for behind in (*files_behind(file), *_behind_vrt(file)):
            found.add(behind)
    return tuple(Stamp.of(path) for path in sorted(found))


def _behind_vrt(path: Path) -> list[Path]:
    """The local files that a VRT is made of, through VRTs in it; none for another file."""
    if path.suffix.lower() != ".vrt":
        return []
    named = [
        path.parent / (element.text or "") if element.get("relativeToVRT") == "1" else Path(element.text or "")
        for element in ET.parse(path).getroot().iter("SourceFilename")  # noqa: S314 - GDAL has read this file before
    ]
    return [each for file in dict.fromkeys(named) if file.is_file() for each in (file, *_behind_vrt(file))]


def _tags(source: ImagerySource, ensemble: Ensemble, precision: str, resampled: str) -> dict[str, str]:
    """Tags of both files: what the numbers mean and what they come from. No dates: the same run gives the same bytes."""
    contract = ensemble.contract
    scenes = len(source.record())
    told = {
        "CANOPY_VERSION": __version__,
        "CANOPY_MODEL": "; ".join(f"{model.contract.name} {model.contract.version}" for model in ensemble.models),
        "CANOPY_MODEL_SHA256": "; ".join(model.contract.weights_sha256 for model in ensemble.models),
        "CANOPY_PRECISION": precision,
        "CANOPY_CALIBRATION": calibration_text(ensemble),
        "CANOPY_SHIFT": shift_text(ensemble),
        "CANOPY_IMAGERY": Path(source.info.source).name + (f", {scenes} files or items" if scenes > 1 else ""),
        "CANOPY_IMAGERY_RESAMPLING": resampled,
        "CANOPY_WINDOW_PX": f"{contract.window_px} every {contract.stride_px}",
    }
    if ensemble.tta != "none":
        told["CANOPY_TTA"] = ensemble.tta
    return told


def shift_text(ensemble: Ensemble) -> str:
    """What places are compared with, and from when on they are unlike it."""
    reference = ensemble.shift
    if reference is None:
        return f"not measured: {ensemble.unmeasured}"
    return (
        f"squares of {SQUARE_PX} px against {', '.join(reference.sites)}, limit by {reference.held_out} left out, flagged "
        f"from {FLAG_SHARE:.0%} beyond it"
    )


def calibration_text(ensemble: Ensemble) -> str:
    """What the 90 % interval promises, and what of it was measured."""
    calibration = ensemble.calibration
    if calibration is None:
        return f"uncalibrated: {GAUSSIAN_90:g} times the spread, coverage not measured ({ensemble.uncalibrated})"
    sites = ", ".join(calibration.sites)
    promise = f"split-conformal by class of predicted height, nominal {calibration.nominal:.0%}, sites {sites}"
    held = "; ".join(f"{m.overall:.1%} on {m.how} ({', '.join(m.sites)})" for m in calibration.measured)
    return f"{promise}; measured coverage {held or 'none: nothing was held out to measure it on'}"

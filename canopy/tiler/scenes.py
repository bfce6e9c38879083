"""The sources of a recipe become items, and an item becomes pixels: imagery and heights on one lattice.

An `Item` is one image, mosaic or simulated forest with its labels. It is a value that travels as JSON: finding the items
reads headers only, and a worker process opens an item by itself with `open_scene`.

Heights from point clouds are made first, once, as rasters on the lattice (`label_tiles`, `make_label`), because the cloud's
files and the chips' windows are cut differently. An item no larger than `LABEL_TILE_PX` is one tile and its heights are
those of `lidar_to_chm` over all of it. A larger one is cut at the multiples of `LABEL_TILE_PX` on the lattice, each tile
with a halo that takes in every hole and disc that reaches over its edge. A ground filter looks at its surroundings and so
may differ by centimetres across a tile's edge; the tiles are fixed by the lattice, so that no chip depends on the number of
workers, on the chips beside it or on the order of work.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from datetime import date, timedelta
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict
from pyproj import CRS

from canopy.errors import NoPointsError, RecipeError
from canopy.grid import Box, Lattice, sheets_over
from canopy.raster import Pixels, open_raster, write_raster
from canopy.tiler.area import PlannedArea
from canopy.tiler.imagery import NO_DATE, ImageFiles, Imagery
from canopy.tiler.recipe import (
    SIMULATED_SEEDS,
    ImagedSource,
    LidarSearch,
    LidarSource,
    PairSource,
    SimulatedSource,
    StacImagery,
    TileSetRecipe,
    lidar_options,
    matches,
    resolve,
)
from canopy.tiler.stamps import Stamp, changed, files_behind

if TYPE_CHECKING:
    from canopy.tiler.area import Area

SIMULATED_CRS: Final = "EPSG:32631"
"""Where grown scenes lie unless the recipe says otherwise: the Gulf of Guinea, where no real chip can be."""

SIMULATED_GAP_M: Final = 1000.0
"""Least distance between two grown scenes; wider than any buffer."""

LABEL_TILE_PX: Final = 2048
"""Side of the tiles in which heights are made from points: some 100 MB of grids, and few files are read twice."""

LABEL_HALO_PX: Final = 16
"""Least halo of such a tile; more where larger holes are filled."""

Days = NDArray[np.int32]


class Item(BaseModel):
    """One image with its labels, before any pixel is read."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    source: int
    """Position of its source in the recipe."""
    crs: str
    """WKT of the chips' metric CRS."""
    box: tuple[int, int, int, int]
    """The lattice pixels that may be used: row0, col0, row1, col1."""
    variant: str = ""
    """Tells apart the ids of several images of one place at one site."""
    images: tuple[str, ...] = ()
    manifest: str | None = None
    """File name of a frozen search for imagery, in place of `images`."""
    points_manifest: str | None = None
    """File name of a frozen search for point clouds, the source of `points`."""
    survey: str | None = None
    """Which survey of that search."""
    part: PlannedArea | None = None
    """Where that survey's heights count."""
    flown: date | None = None
    """The middle of that survey's flights, where the catalogue says it."""
    heights: tuple[str, ...] = ()
    dsm: tuple[str, ...] = ()
    dtm: tuple[str, ...] = ()
    points: tuple[str, ...] = ()
    seed: int | None = None
    """Of a simulated scene."""
    stamps: tuple[Stamp, ...] = ()
    """The files behind it."""

    @property
    def manifests(self) -> tuple[str, ...]:
        """File names of the frozen searches it rests on."""
        return tuple(name for name in (self.manifest, self.points_manifest) if name is not None)

    @property
    def lattice_box(self) -> Box:
        """`box` as a box."""
        return Box(*self.box)

    @property
    def whole(self) -> bool:
        """Whether opening it costs as much as reading all of it, so that it is not shared among tasks."""
        return self.seed is not None

    def lattice(self, recipe: TileSetRecipe) -> Lattice:
        """The lattice of its chips."""
        return Lattice(crs=_crs_of(self.crs), gsd_m=recipe.gsd_m)


@lru_cache(maxsize=64)
def _crs_of(wkt: str) -> CRS:
    return CRS.from_wkt(wkt)


@dataclass(frozen=True, slots=True, kw_only=True)
class Scene:
    """Imagery and heights of one item on the lattice, open for reading."""

    image: Callable[[Box], Pixels]
    """Any box -> (band, row, col) with its validity."""
    height_m: Callable[[Box], NDArray[np.float32]]
    """Any box -> (row, col) float32 metres, NaN unknown."""
    refused_px: Callable[[Box], int] | None = None
    """A box that was read -> how many of its pixels hold in the label's raster what cannot be a height; None: no raster."""
    days: Callable[[Box], Days] | None = None
    """Any box -> (row, col) days since 1970-01-01 of the imagery; None where the imagery knows no days."""
    beside: Callable[[Box], dict[str, NDArray[np.float32]]] | None = None
    """Any box -> what else the labels know, by the field of `canopy.tiler.quality.ChipFacts`."""
    unlabelled: tuple[Box, ...] = ()
    """Where the heights are not canopy."""
    colours: tuple[str, ...] | None = None
    """Names of the bands where the imagery knows them."""
    value_range: tuple[float, float] | None = None
    """Least and greatest value of a pixel where the imagery knows it."""


# --- finding the items ---------------------------------------------------------------------------------------------------


@dataclass(slots=True, kw_only=True)
class Finder:
    """Finds the items of a recipe; reads headers, and asks the network only for what no manifest holds yet."""

    recipe: TileSetRecipe
    folder: Path
    """Of the recipe."""
    area: Area | None = None
    """None for all of every image."""
    manifests: Path
    """Folder for the searches that are made."""
    earlier: tuple[Path, ...] = ()
    """Folders with searches made before; one of the same question is taken over, not repeated."""
    _stamps: dict[Path, Stamp] = field(default_factory=dict)

    def items(self) -> list[Item]:
        """All items, in the order of the recipe.

        Raises:
            RecipeError: a file is missing or has no partner, or the area misses every image.
            RasterError, LidarError, AreaError: a source cannot be read or placed.
        """
        found: list[Item] = []
        for number, source in enumerate(self.recipe.source):
            match source:
                case PairSource():
                    found += self._pairs(number, source)
                case LidarSource():
                    found += self._clouds(number, source)
                case SimulatedSource(chm=None):
                    found += self._grown(number, source)
                case SimulatedSource():
                    found += self._reimaged(number, source)
        if not found:
            assert self.area is not None, "only an area leaves no item"
            raise RecipeError(f"no image of the recipe touches the area {self.area.name}; correct the area or the images")
        return found

    def _pairs(self, number: int, source: PairSource) -> Iterator[Item]:
        labels = {"heights": source.height, "dsm": source.dsm, "dtm": source.dtm}
        given = {key: paths for key, paths in labels.items() if paths is not None}
        if not _one_item_per_file(source.image):
            _refuse_unknown(source, set())
            files = {key: _files_of(self._resolved(paths)) for key, paths in given.items()}
            for item in self._imaged(number, source):
                yield self._with(item, **files)
            return
        assert source.image is not None, "items per file have files"
        images = matches(source.image[0], self.folder)
        partners = {key: self._partners(source, key, images, paths) for key, paths in given.items()}
        _refuse_unknown(source, set(images))
        for name in sorted(images.keys() - set(source.exclude)):
            if (paired := self._imaged_by(number, source, name, (images[name],))) is not None:
                yield self._with(paired, **{key: (paths[name],) for key, paths in partners.items()})

    def _partners(self, source: PairSource, key: str, images: dict[str, Path], paths: tuple[str, ...]) -> dict[str, Path]:
        what = "height" if key == "heights" else key
        if len(paths) > 1:
            raise RecipeError(f"{source.site}: image is a glob, so {what} must be one glob too, not {len(paths)} paths")
        found = matches(paths[0], self.folder)
        if unpaired := sorted(images.keys() ^ found.keys()):
            side = what if unpaired[0] in images else "image"
            raise RecipeError(
                f"{source.site}: {unpaired[0]!r} has no {side} file; add it, or name it in `exclude` and rename it"
            )
        return found

    def _clouds(self, number: int, source: LidarSource) -> Iterator[Item]:
        lidar_options(source)  # a wrong option is found before anything is read
        for item in self._imaged(number, source):
            if source.lidar is None:
                yield self._with(item, points=self._points(source))
            else:
                yield from self._surveyed(item, source, source.lidar)

    def _surveyed(self, item: Item, source: LidarSource, query: LidarSearch) -> Iterator[Item]:
        """An item for each survey that covers a part of the imagery."""
        import shapely

        from canopy.tiler import surveys

        area = self._area_for(source, f"LiDAR from {query.source}")
        catalogue = surveys.load_points_source(self._described(query.source))
        path = self._frozen(
            f"points-{source.site}",
            {
                "query": query.model_dump(mode="json"), "area": area.geometry.wkb_hex,
                "source": catalogue.model_dump(mode="json"),
            },
            lambda path: surveys.search_points(
                catalogue, area, catalogue=query.catalogue, start=query.start, end=query.end, survey=query.survey
            ).write(path),
        )  # fmt: skip
        manifest = surveys.PointsManifest.read(path)
        lattice = item.lattice(self.recipe)
        for survey in manifest.surveys:
            part = shapely.from_wkt(survey.part_deg)
            planned = PlannedArea(name=survey.name, crs=_LONLAT.to_wkt(), polygons=tuple(_polygons_of(part)))
            box = item.lattice_box.intersect(lattice.covering(planned.bounds_on(lattice)))
            if box is None:
                continue
            several = len(manifest.surveys) > 1
            yield item.model_copy(
                update={
                    "name": f"{item.name}-{survey.name}" if several else item.name,
                    "variant": re.sub(r"[^A-Za-z0-9.-]", "-", survey.name) if several else "",
                    "box": (box.row0, box.col0, box.row1, box.col1),
                    "points": tuple(cloud.href for cloud in survey.clouds),
                    "points_manifest": path.name,
                    "survey": survey.name,
                    "part": planned,
                    "flown": _middle(survey.start, survey.end),
                }
            )

    def _imaged(self, number: int, source: ImagedSource) -> Iterator[Item]:
        """The items of a source whose labels do not come in files paired with its images."""
        if source.imagery is not None:
            yield self._searched(number, source, source.imagery)
            return
        assert source.image is not None, "a source without a search has files"
        if _one_item_per_file(source.image):
            groups: dict[str, Sequence[Path]] = {n: (p,) for n, p in matches(source.image[0], self.folder).items()}
        else:
            paths = self._resolved(source.image)
            groups = {paths[0].stem if len(paths) == 1 else source.site: paths}
        for name, group in groups.items():
            if (item := self._imaged_by(number, source, name, group)) is not None:
                yield item

    def _imaged_by(self, number: int, source: ImagedSource, name: str, paths: Sequence[Path]) -> Item | None:
        files = ImageFiles(paths)
        crs = self._crs(files)
        with files.open(Lattice(crs=crs, gsd_m=self.recipe.gsd_m), self.recipe.bands) as opened:
            box = self._inside(opened.box, source, crs, files.info.source)
        if box is None:
            return None
        return self._item(name, number, crs, box, images=tuple(file.path for file in files.info.files))

    def _crs(self, files: ImageFiles) -> CRS:
        given = self.recipe.crs
        return CRS.from_user_input(given) if given is not None else files.info.metric_crs

    def _inside(self, box: Box, source: ImagedSource, crs: CRS, what: str) -> Box | None:
        """`box` within the source's bounds and the bounds of the area; None where the area misses it."""
        lattice = Lattice(crs=crs, gsd_m=self.recipe.gsd_m)
        inside = box if source.bounds_m is None else box.intersect(lattice.covering(source.bounds_m))
        if inside is None:
            raise RecipeError(
                f"bounds_m {source.bounds_m} of site {source.site} do not touch {what}; give them in {crs.name}"
            )
        if self.area is None:
            return inside
        return inside.intersect(lattice.covering(self.area.polygon_in(crs).bounds))

    def _searched(self, number: int, source: ImagedSource, query: StacImagery) -> Item:
        from canopy.tiler import stac

        area = self._area_for(source, f"imagery from {query.source}")
        described = self._described(query.source)
        catalogue = stac.load_source(described)
        manifest = self._frozen(
            f"imagery-{source.site}",
            {
                "query": query.model_dump(mode="json"), "area": area.geometry.wkb_hex,
                "source": catalogue.model_dump(mode="json"),
            },
            lambda path: stac.search(
                catalogue, area, start=query.start, end=query.end, max_cloud_percent=query.max_cloud_percent,
                prefer=query.prefer, date=query.date, exclude=query.exclude,
            ).write(path),
        )  # fmt: skip
        crs = CRS.from_user_input(self.recipe.crs) if self.recipe.crs is not None else area.utm_crs()
        lattice = Lattice(crs=crs, gsd_m=self.recipe.gsd_m)
        box = self._inside(lattice.covering(area.polygon_in(crs).bounds), source, crs, f"the area {area.name}")
        assert box is not None, "an area touches itself"
        return self._item(query.source.rsplit("/", 1)[-1].removesuffix(".toml"), number, crs, box, manifest=manifest)

    def _area_for(self, source: ImagedSource, what: str) -> Area:
        if self.area is None:
            raise RecipeError(f"{source.site}: {what} needs an area; give area or bbox_deg in the recipe, or --area")
        return self.area

    def _described(self, name: str) -> str:
        """A catalogue: a name as it is, a file's path relative to the recipe."""
        return str(resolve(name, self.folder)) if name.endswith(".toml") else name

    def _frozen(self, stem: str, question: dict[str, Any], search: Callable[[Path], Any]) -> Path:
        """The manifest that answers a question: one that is there already, else from a search."""
        digest = hashlib.sha256(json.dumps(question, sort_keys=True).encode()).hexdigest()[:12]
        path = self.manifests / f"{stem}-{digest}.json"
        if not path.exists():
            self.manifests.mkdir(parents=True, exist_ok=True)
            for folder in self.earlier:
                if (before := folder / path.name).is_file():
                    part = path.with_name(f".{path.name}.part")
                    part.write_bytes(before.read_bytes())
                    part.replace(path)
                    break
            else:
                search(path)
        return path

    def _points(self, source: LidarSource) -> tuple[str, ...]:
        """The clouds of a source: paths and links, each of which `open_points` takes."""
        from canopy.tiler.points import point_sources

        assert source.points is not None, "a catalogue of clouds"
        found: set[str] = set()
        for text in source.points:
            if _remote(text):
                found.add(text)
            else:
                found.update(cloud.name for cloud in point_sources(resolve(text, self.folder)))
        return tuple(sorted(found))

    def _grown(self, number: int, source: SimulatedSource) -> Iterator[Item]:
        assert source.size_m is not None, "a grown scene has a size"
        self._refuse_bands(source)
        gsd_m, stride_px = self.recipe.gsd_m, self.recipe.stride_px
        side = math.floor(source.size_m / gsd_m)
        # Scenes start at a multiple of the stride, so that their windows fill them from the corner, and of the pitch, so
        # that blocks of this size hold one scene each.
        pitch = math.ceil((source.size_m + SIMULATED_GAP_M) / gsd_m / stride_px) * stride_px
        west = round(500_000 / gsd_m / pitch) * pitch
        crs = CRS.from_user_input(self.recipe.crs or SIMULATED_CRS)
        for seed in source.seeds:
            row, col = divmod(seed, math.isqrt(SIMULATED_SEEDS))
            box = Box(-(row + 1) * pitch, west + col * pitch, -(row + 1) * pitch + side, west + col * pitch + side)
            yield self._item(f"seed{seed}", number, crs, box, seed=seed)

    def _reimaged(self, number: int, source: SimulatedSource) -> Iterator[Item]:
        assert source.chm is not None, "a canopy height model to photograph"
        self._refuse_bands(source)
        for name, path in matches(source.chm, self.folder).items():
            files = ImageFiles(path)
            crs = self._crs(files)
            with files.open(Lattice(crs=crs, gsd_m=self.recipe.gsd_m), (1,)) as chm:
                box = chm.box
            for seed in source.seeds:
                item = self._item(f"{name}-s{seed}", number, crs, box, seed=seed, variant=f"s{seed}")
                yield self._with(item, heights=(path,))

    def _refuse_bands(self, source: SimulatedSource) -> None:
        if self.recipe.bands != (1, 2, 3):
            raise RecipeError(
                f"{source.site} is simulated, in red, green and blue; bands must be [1, 2, 3], not {[*self.recipe.bands]}"
            )

    def _resolved(self, texts: Sequence[str]) -> list[Path]:
        return [resolve(text, self.folder) for text in texts]

    def _item(
        self,
        name: str,
        number: int,
        crs: CRS,
        box: Box,
        *,
        images: tuple[Path, ...] = (),
        manifest: Path | None = None,
        seed: int | None = None,
        variant: str = "",
    ) -> Item:
        files = images if manifest is None else (manifest,)
        return Item(
            name=name,
            source=number,
            crs=crs.to_wkt(),
            box=(box.row0, box.col0, box.row1, box.col1),
            images=tuple(map(str, images)),
            manifest=manifest.name if manifest is not None else None,
            seed=seed,
            variant=variant,
            stamps=() if manifest is not None else tuple(self._stamped(files)),
        )

    def _with(self, item: Item, **files: Iterable[Path | str]) -> Item:
        """The item with its label files, which are stamped like its images."""
        named = {key: tuple(str(path) for path in paths) for key, paths in files.items()}
        local = (Path(path) for paths in named.values() for path in paths if not _remote(path))
        return item.model_copy(update={**named, "stamps": (*item.stamps, *self._stamped(local))})

    def _stamped(self, paths: Iterable[Path]) -> Iterator[Stamp]:
        for path in paths:
            for file in files_behind(path):
                if file not in self._stamps:
                    self._stamps[file] = Stamp.of(file)
                yield self._stamps[file]


def _refuse_unknown(source: PairSource, names: set[str]) -> None:
    if unknown := sorted(set(source.exclude) - names):
        raise RecipeError(f"{source.site}: `exclude` names {unknown[0]!r}, which matches no file; correct the name")


_LONLAT: Final = CRS.from_epsg(4326)


def _polygons_of(geometry: Any) -> Iterator[str]:
    """The polygons of a geometry, as `PlannedArea` has them."""
    for part in getattr(geometry, "geoms", (geometry,)):
        if part.geom_type == "Polygon" and part.area > 0:
            yield str(part.wkb_hex)


def _middle(start: str | None, end: str | None) -> date | None:
    """The day in the middle of two, written as ISO 8601."""
    if start is None or end is None:
        return None
    first, last = date.fromisoformat(start), date.fromisoformat(end)
    return first + (last - first) // 2


def _remote(text: str) -> bool:
    return text.startswith(("http://", "https://"))


def _one_item_per_file(image: tuple[str, ...] | None) -> bool:
    return image is not None and len(image) == 1 and "*" in image[0]


def _files_of(paths: Sequence[Path]) -> tuple[Path, ...]:
    return tuple(file.path for file in ImageFiles(paths).info.files)


# --- heights from points -------------------------------------------------------------------------------------------------


def label_tiles(item: Item) -> list[Box]:
    """The tiles in which an item's heights are made from points; none for other labels."""
    if not item.points:
        return []
    box = item.lattice_box
    return [box] if max(box.shape) <= LABEL_TILE_PX else sheets_over(box, LABEL_TILE_PX)


def label_path(work: Path, number: int, tile: Box) -> Path:
    """Where the heights of a tile of item `number` are kept."""
    return work / "labels" / str(number) / f"r{tile.row0}_c{tile.col0}.tif"


LABEL_BANDS: Final = ("height_m", "density_per_m2", "building_fraction")
"""Bands of the rasters in which heights from points are kept until the chips are cut; NaN where unknown."""


class Label(BaseModel):
    """What is known of a tile of heights besides its pixels: the record of its task."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    known_px: int
    first_day: date | None = None
    """UTC day of the earliest return."""
    last_day: date | None = None


def make_label(item: Item, number: int, tile: Box, recipe: TileSetRecipe, work: Path) -> Label:
    """Make the heights of one tile from the item's clouds.

    Where the item is larger than a tile, the clouds may miss this one: its heights are then unknown.

    Raises:
        LidarError: as `canopy.tiler.lidar.lidar_layers`.
    """
    from canopy.tiler.lidar import lidar_layers

    source = recipe.source[item.source]
    assert isinstance(source, LidarSource), f"{item.name} has no point cloud"
    options, lattice, outer = lidar_options(source), item.lattice(recipe), tile
    if tile != item.lattice_box:
        halo = max(LABEL_HALO_PX, options.fill_holes_px + 1)
        around = Box(tile.row0 - halo, tile.col0 - halo, tile.row1 + halo, tile.col1 + halo).intersect(item.lattice_box)
        assert around is not None, f"{tile} lies outside {item.name}"
        outer = around
    bands = np.full((len(LABEL_BANDS), *tile.shape), np.nan, np.float32)
    days = None
    try:
        layers = lidar_layers(_clouds_of(item, work), lattice.grid(outer), source.algorithm, options=options)
    except NoPointsError:
        if tile == item.lattice_box:
            raise
    else:
        days = layers.days
        for band, values in zip(bands, (layers.height_m, layers.density_per_m2, layers.building_fraction), strict=True):
            if values is not None:
                band[:] = values[tile.slices_in(outer)]
    path = label_path(work, number, tile)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_raster(path, bands, grid=lattice.grid(tile), nodata=math.nan, band_names=LABEL_BANDS)
    first, last = days if days is not None else (None, None)
    return Label(known_px=int(np.isfinite(bands[0]).sum()), first_day=first, last_day=last)


def _clouds_of(item: Item, work: Path) -> Any:
    """What `lidar_layers` takes: paths and links, or the sources of a survey with their signatures."""
    if item.points_manifest is None:
        return item.points
    from canopy.tiler.surveys import PointsManifest

    manifest = PointsManifest.read(work / "set" / "manifests" / item.points_manifest)
    return manifest.open(next(survey for survey in manifest.surveys if survey.name == item.survey))


def acquisition_day(labels: Sequence[Label]) -> date | None:
    """The day in the middle of an acquisition; None where a tile with heights does not know its days.

    Raises:
        LidarError: the clouds give no height on any tile.
    """
    first = [label.first_day for label in labels if label.known_px]
    last = [label.last_day for label in labels if label.known_px]
    if None in first or None in last or not first:
        return None
    earliest, latest = min(day for day in first if day), max(day for day in last if day)
    return earliest + (latest - earliest) // 2


# --- opening an item -----------------------------------------------------------------------------------------------------


@contextmanager
def open_scene(item: Item, number: int, recipe: TileSetRecipe, work: Path) -> Iterator[Scene]:
    """Open item `number` of a plan for reading; `work` holds its manifest and the heights made from points.

    Raises:
        RecipeError: a file is not the one that was planned with.
    """
    refuse_changed(item.stamps)
    source = recipe.source[item.source]
    lattice = item.lattice(recipe)
    if isinstance(source, SimulatedSource):
        yield _grown_scene(item, lattice) if source.chm is None else _reimaged_scene(item, lattice)
        return
    with ExitStack() as stack:
        facts: dict[str, Any] = {}
        if item.manifest is not None:
            from canopy.tiler.stac import Manifest, open_stac

            manifest = Manifest.read(work / "set" / "manifests" / item.manifest)
            # Tasks share the tiles that have been fetched, and so does a build that goes on after a stop.
            found = stack.enter_context(open_stac(manifest, lattice, recipe.bands, cache=work / "imagery"))
            facts = {"colours": tuple(str(band) for band in found.bands), "value_range": found.value_range}
            imagery: Imagery = found
        else:
            imagery = stack.enter_context(_image_files(item.images, item.stamps).open(lattice, recipe.bands))
        height_m, refused_px = _heights_of(item, number, recipe, work, stack)
        yield Scene(
            image=imagery.read,
            days=imagery.days,
            height_m=height_m,
            refused_px=refused_px,
            unlabelled=tuple(lattice.covering(bounds) for bounds in source.unlabelled_m),
            beside=(lambda box: _beside(item, number, work, box)) if item.points else None,
            **facts,
        )


def _beside(item: Item, number: int, work: Path, box: Box) -> dict[str, NDArray[np.float32]]:
    names = LABEL_BANDS[1:]
    layers = dict(zip(names, _from_tiles(item, number, work, box, names), strict=True))
    # Where no return's class is known nothing is known of buildings, which is not the same as that there are none.
    return {name: layer for name, layer in layers.items() if np.isfinite(layer).any()}


@lru_cache(maxsize=8)
def _image_files(paths: tuple[str, ...], _state: tuple[Stamp, ...]) -> ImageFiles:
    """Headers, read once a process for as long as the files stay as they are."""
    return ImageFiles(paths)


def refuse_changed(stamps: Iterable[Stamp]) -> None:
    """Stop when a file is not the one that was planned with: a tile set is of one state of its sources."""
    if (path := changed(stamps)) is not None:
        raise RecipeError(f"{path} changed while the tile set was being built; leave it alone and run the build again")


def _heights_of(
    item: Item, number: int, recipe: TileSetRecipe, work: Path, stack: ExitStack
) -> tuple[Callable[[Box], NDArray[np.float32]], Callable[[Box], int] | None]:
    if item.points:
        inside = None if item.part is None else item.part.mask_on(item.lattice(recipe))

        def made(box: Box) -> NDArray[np.float32]:
            height_m = _from_tiles(item, number, work, box, LABEL_BANDS[:1])[0]
            return height_m if inside is None else np.where(inside(box), height_m, np.float32(np.nan))

        return made, None
    lattice = item.lattice(recipe)
    from canopy.tiler.heights import open_chm, open_dsm_minus_dtm

    source = recipe.source[item.source]
    assert isinstance(source, PairSource), f"{item.name} has neither points nor rasters of height"
    if item.heights:
        raster = stack.enter_context(open_chm(item.heights, lattice, height_unit_m=source.height_unit_m))
    else:
        units = {"dsm_unit_m": source.dsm_unit_m, "dtm_unit_m": source.dtm_unit_m}
        raster = stack.enter_context(open_dsm_minus_dtm(item.dsm, item.dtm, lattice, **units))
    refused_px: dict[Box, int] = {}

    def read(box: Box) -> NDArray[np.float32]:
        found = raster.read(box)
        refused_px[box] = found.too_low + found.too_high
        return found.height_m

    return read, refused_px.__getitem__


def _from_tiles(item: Item, number: int, work: Path, box: Box, names: Sequence[str]) -> NDArray[np.float32]:
    """(band, row, col) of the rasters made by `make_label`."""
    out = np.full((len(names), *box.shape), np.nan, np.float32)
    bands = [LABEL_BANDS.index(name) + 1 for name in names]
    for tile in label_tiles(item):
        if (part := tile.intersect(box)) is not None:
            with open_raster(label_path(work, number, tile)) as raster:
                pixels = raster.read(part.row0 - tile.row0, part.col0 - tile.col0, part.shape, bands)
            out[(slice(None), *part.slices_in(box))] = pixels.data
    return out


def _grown_scene(item: Item, lattice: Lattice) -> Scene:
    from canopy.simulate import ForestConfig, simulate_scene

    assert item.seed is not None, "a grown scene has a seed"
    forest = ForestConfig.random(np.random.default_rng(item.seed))
    grown = simulate_scene(grid=lattice.grid(item.lattice_box), seed=item.seed, forest=forest)
    return _in_memory(grown.image, grown.height_m, item.lattice_box)


def _reimaged_scene(item: Item, lattice: Lattice) -> Scene:
    from canopy.simulate import reimage

    assert item.seed is not None, "a photographed model has a seed"
    with ImageFiles(item.heights).open(lattice, (1,)) as chm:
        height_m = heights(chm.read(chm.box))
    # The name goes in as well, so that the models of a folder are not all seen in one light.
    name = item.name.removesuffix(f"-{item.variant}")
    rng = np.random.default_rng([item.seed, zlib.crc32(name.encode())])
    return _in_memory(reimage(height_m, gsd_m=lattice.gsd_m, rng=rng), height_m, item.lattice_box)


def _in_memory(image: NDArray[np.uint8], height_m: NDArray[np.float32], outer: Box) -> Scene:
    """Arrays that cover `outer`; there is imagery wherever a height is known."""
    known = np.isfinite(height_m)

    def pixels(box: Box) -> Pixels:
        data, valid = np.zeros((len(image), *box.shape), np.uint8), np.zeros(box.shape, bool)
        if (part := outer.intersect(box)) is not None:
            data[(slice(None), *part.slices_in(box))] = image[(slice(None), *part.slices_in(outer))]
            valid[part.slices_in(box)] = known[part.slices_in(outer)]
        return Pixels(data=data, valid=valid)

    return Scene(image=pixels, height_m=lambda box: window(height_m, outer, box))


def heights(pixels: Pixels) -> NDArray[np.float32]:
    """(row, col) float32 of a single band, NaN where invalid."""
    return np.where(pixels.valid, pixels.data[0].astype(np.float32), np.float32(np.nan))


def window(height_m: NDArray[np.float32], outer: Box, box: Box) -> NDArray[np.float32]:
    """The pixels of `box` from an array that covers `outer`, NaN outside."""
    out = np.full(box.shape, np.nan, np.float32)
    if (part := outer.intersect(box)) is not None:
        out[part.slices_in(box)] = height_m[part.slices_in(outer)]
    return out


def median_day(days: Days, valid: NDArray[np.bool_]) -> date | None:
    """The median of the days of the valid pixels, the earlier of two; None where no valid pixel has one."""
    known = days[valid & (days != NO_DATE)]
    if not known.size:
        return None
    return date(1970, 1, 1) + timedelta(days=int(np.sort(known)[(known.size - 1) // 2]))


def gap_days(image_date: date | None, lidar_date: date | None) -> int | None:
    """Days between imagery and LiDAR; None when either date is unknown."""
    return abs((image_date - lidar_date).days) if image_date and lidar_date else None

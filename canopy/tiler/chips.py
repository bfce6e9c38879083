"""A tile set: image and height chips on the lattice with an index, built from a recipe.

On disk it is a folder with `index.parquet` (GeoParquet, one row a chip, geometry in EPSG:4326), `image/<id>.tif`,
`height/<id>.tif` and `recipe.toml`, the recipe as it was given. Validity is kept twice: the image has an internal mask (so 0
stays black), the height is NaN where no height is known *or* no imagery exists.

The recipe names the sources. Paths are relative to the recipe's folder; `${CANOPY_SAMPLES}` and other environment variables
are expanded. A chip is a window of the CRS-anchored lattice: where an image is larger than a chip, windows start at
multiples of the stride, counted from the origin of the CRS; where it is smaller, one window is centred on it, and what the
image does not fill is masked. Nothing is stretched. So a chip's id (site and place) and its pixels do not depend on what
else is in the recipe.
"""

from __future__ import annotations

import hashlib
import math
import os
import re
import shutil
import tempfile
import tomllib
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import date
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final, Literal, Self

import numpy as np
from numpy.typing import NDArray
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator
from pyproj import CRS, Transformer
from pyproj.exceptions import CRSError

from canopy.errors import OutputError, RecipeError
from canopy.grid import Box, Lattice
from canopy.raster import Pixels, create_raster, read_raster
from canopy.tiler.imagery import inspect, open_imagery
from canopy.tiler.split import Place, SplitSettings, assign, crs_key, take_out_buffer

if TYPE_CHECKING:
    import geopandas as gpd

INDEX: Final = "index.parquet"

COLUMNS: Final = (
    "id", "geometry", "site", "block", "split", "image_date", "lidar_date", "gap_days", "gsd_m", "valid_fraction",
    "height_mean_m", "height_p95_m", "shift_x_m", "shift_y_m", "shift_score", "flags", "image_source", "lidar_source",
    "licence", "sha256", "item", "crs", "row_px", "col_px",
)  # fmt: skip
"""Columns of the index.

`geometry` is the imagery inside the window, in EPSG:4326; `valid_fraction` the share of the whole window with a known
height; `gap_days` the days between the two dates, empty when one is unknown; `shift_*` and `flags` belong to registration
and quality checks and are NaN and "" until these have run; `sha256` is the digest of the bytes of the image file followed by
those of the height file; `item` names the image; (`row_px`, `col_px`) is the window's first pixel on the lattice of `crs`.
"""


SIMULATED_CRS: Final = "EPSG:32631"
"""Where grown scenes lie unless the recipe says otherwise: the Gulf of Guinea, where no real chip can be."""

SIMULATED_SEEDS: Final = 10_000
"""Scenes have places of their own in a square of this many, so that the split parts them as it parts real sites."""

SIMULATED_GAP_M: Final = 1000.0
"""Least distance between two grown scenes; wider than any buffer."""


# --- the recipe ----------------------------------------------------------------------------------------------------------


class _Table(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


def _ordered(bounds: tuple[float, float, float, float]) -> tuple[float, float, float, float]:
    if not (bounds[0] < bounds[2] and bounds[1] < bounds[3]):
        raise ValueError("must be left, bottom, right, top with left < right and bottom < top")
    return bounds


Bounds = Annotated[tuple[float, float, float, float], AfterValidator(_ordered)]


class _Source(_Table):
    site: str = Field(pattern=r"^[A-Za-z0-9_.-]+$")
    """Acquisition area; part of every chip's id."""
    image_date: date | None = None
    lidar_date: date | None = None
    licence: str
    image_source: str
    """What the imagery is and who made it, for the index and the model card."""
    lidar_source: str

    @property
    def gap_days(self) -> int | None:
        """Days between imagery and LiDAR; None when either date is unknown."""
        return abs((self.image_date - self.lidar_date).days) if self.image_date and self.lidar_date else None


class _Imaged(_Source):
    image: str
    """A raster, or a glob with one `*`."""
    bounds_m: Bounds | None = None
    """(left, bottom, right, top) in the chips' CRS; nothing outside is used."""
    unlabelled_m: tuple[Bounds, ...] = ()
    """Rectangles in the chips' CRS whose heights are not canopy, such as bridges and houses; the imagery stays."""


class PairSource(_Imaged):
    """Images with the canopy height models that belong to them; with globs, what `*` stands for pairs the files."""

    kind: Literal["pair"]
    height: str
    """A canopy height model in metres, or a glob with one `*`."""
    exclude: tuple[str, ...] = ()
    """What `*` stands for in the files to leave out."""


class LidarSource(_Imaged):
    """An image with a point cloud, from which the heights are made on the image's lattice."""

    kind: Literal["lidar"]
    points: tuple[str, ...] = Field(min_length=1)
    """LAS or LAZ files, or globs."""
    algorithm: str = "p2r"
    options: dict[str, Any] = Field(default_factory=dict)
    """Fields of `canopy.tiler.lidar.LidarOptions`."""


class SimulatedSource(_Source):
    """Forests whose heights are known: grown from seeds, or real canopy height models photographed anew."""

    kind: Literal["simulated"]
    seeds: tuple[Annotated[int, Field(ge=0, lt=SIMULATED_SEEDS)], ...] = Field(min_length=1)
    """One scene a seed: trees, terrain, light and season are all drawn from it."""
    size_m: float | None = Field(default=None, gt=0)
    """Side of a grown scene."""
    chm: str | None = None
    """In place of `size_m`: a canopy height model in metres, or a glob with one `*`; each is photographed once a seed."""

    @model_validator(mode="after")
    def _one(self) -> Self:
        if (self.size_m is None) == (self.chm is None):
            raise ValueError("give either size_m, to grow forests, or chm, to photograph real ones")
        return self


Source = Annotated[PairSource | LidarSource | SimulatedSource, Field(discriminator="kind")]


class TileSetRecipe(_Table):
    """A tile set as its author writes it."""

    name: str = Field(pattern=r"^[A-Za-z0-9_.-]+$")
    """Name of the folder, beside the recipe unless another is given."""
    gsd_m: float = Field(gt=0)
    chip_px: int = Field(ge=32, multiple_of=32)
    """Side of a chip; a multiple of the decoder's total stride."""
    stride_px: int = Field(gt=0)
    """Distance between the starts of neighbouring chips; less than `chip_px` makes them overlap."""
    crs: str | None = None
    """Metric CRS of all chips; default each image's own when it is metric, else its UTM zone."""
    min_valid_fraction: float = Field(gt=0, le=1)
    """Windows with a smaller share of known heights give no chip."""
    bands: tuple[int, ...] = Field(default=(1, 2, 3), min_length=1)
    """1-based bands of the images, in the order the model is to see."""
    split: SplitSettings
    source: tuple[Source, ...] = Field(min_length=1)

    @field_validator("crs")
    @classmethod
    def _known(cls, crs: str | None) -> str | None:
        try:
            if crs is not None:
                CRS.from_user_input(crs)
        except CRSError as error:
            raise ValueError(f"{crs!r} is no CRS; give for example EPSG:32610") from error
        return crs

    @model_validator(mode="after")
    def _covers(self) -> Self:
        if self.stride_px > self.chip_px:
            raise ValueError(f"stride_px {self.stride_px} leaves gaps between chips of {self.chip_px} px; make it smaller")
        return self


def load_recipe(path: Path) -> TileSetRecipe:
    """Read and check a recipe.

    Raises:
        RecipeError: missing or no TOML, an unknown key, or a value out of its range; the message names the key.
    """
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise RecipeError(f"{path} does not exist; give the path of a tile-set recipe (TOML)") from None
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise RecipeError(f"{path} is no TOML file ({error}); correct it") from error
    try:
        return TileSetRecipe.model_validate(table)
    except ValidationError as error:
        raise RecipeError(f"{path}: {_first_problem(error)}") from error


def _first_problem(error: ValidationError) -> str:
    problem = error.errors(include_url=False)[0]
    # The tag of the union ("pair") stands between the list index and the key; readers of a TOML file do not know it.
    names = [part for part in problem["loc"] if part not in ("pair", "lidar", "simulated")]
    key = ".".join(str(part) for part in names) or "recipe"
    if problem["type"] == "extra_forbidden":
        return f"unknown key {key!r}; remove it or correct its name"
    if problem["type"] == "missing":
        return f"key {key!r} is missing; add it"
    return f"{key}: {problem['msg'].removeprefix('Value error, ')}, not {problem['input']!r:.80}"


# --- where files are -----------------------------------------------------------------------------------------------------


def resolve(text: str, folder: Path) -> Path:
    """A recipe's path: environment variables expanded, relative to the recipe's folder.

    Raises:
        RecipeError: a variable is not set.
    """
    for name in re.findall(r"\$\{(\w+)\}", text):
        if not os.environ.get(name):
            raise RecipeError(f"{text} needs the environment variable {name}, which is not set; export {name}=FOLDER")
    return folder / re.sub(r"\$\{(\w+)\}", lambda match: os.environ[match[1]], text)


def matches(text: str, folder: Path) -> dict[str, Path]:
    """The files that a path or glob names, keyed by what `*` stands for (by the stem, without one).

    Raises:
        RecipeError: a variable is not set, more than one `*`, or no file.
    """
    path = resolve(text, folder)
    if "*" not in str(path):
        if not path.is_file():
            raise RecipeError(f"{path} does not exist; correct the path in the recipe or fetch the file")
        return {path.stem: path}
    if str(path.parent).count("*") or path.name.count("*") != 1:
        raise RecipeError(f"{text} must hold one * at most, in the file name; write one [[source]] per folder")
    before, after = path.name.split("*")
    found = {p.name[len(before) : len(p.name) - len(after)]: p for p in sorted(path.parent.glob(path.name))}
    if not found:
        raise RecipeError(f"{path} matches no file; correct the path in the recipe or fetch the files")
    return found


# --- sources become scenes -----------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Scene:
    """Imagery and heights of one item on the lattice, open for reading."""

    box: Box
    """The lattice pixels that may be used."""
    image: Callable[[Box], Pixels]
    """Any box -> (band, row, col) with its validity."""
    height_m: Callable[[Box], NDArray[np.float32]]
    """Any box -> (row, col) float32 metres, NaN unknown."""
    unlabelled: tuple[Box, ...] = ()
    """Where the heights are not canopy."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Item:
    """One image with its heights, before any pixel is read."""

    name: str
    source: _Source
    crs: CRS
    open: Callable[[Lattice], Any]
    """Lattice -> context manager of a `Scene`."""
    variant: str = ""
    """Tells apart the ids of several images of one place at one site."""


def _items(recipe: TileSetRecipe, folder: Path) -> Iterator[Item]:
    for source in recipe.source:
        match source:
            case PairSource():
                yield from _pair_items(source, recipe, folder)
            case LidarSource():
                yield from _lidar_items(source, recipe, folder)
            case SimulatedSource(chm=None):
                yield from _grown_items(source, recipe)
            case SimulatedSource():
                yield from _reimaged_items(source, recipe, folder)


def _crs(recipe: TileSetRecipe, image: Path) -> CRS:
    return CRS.from_user_input(recipe.crs) if recipe.crs is not None else inspect(image).metric_crs


def _pair_items(source: PairSource, recipe: TileSetRecipe, folder: Path) -> Iterator[Item]:
    images, heights = matches(source.image, folder), matches(source.height, folder)
    if "*" not in source.image and "*" not in source.height:
        heights = dict(zip(images, heights.values(), strict=True))
    if unpaired := sorted(images.keys() ^ heights.keys()):
        side = "height" if unpaired[0] in images else "image"
        raise RecipeError(
            f"{source.site}: {unpaired[0]!r} has no {side} file; add it, or name it in `exclude` and rename it"
        )
    if unknown := sorted(set(source.exclude) - images.keys()):
        raise RecipeError(f"{source.site}: `exclude` names {unknown[0]!r}, which matches no file; correct the name")
    for name in sorted(images.keys() - set(source.exclude)):

        @contextmanager
        def scene(lattice: Lattice, image: Path = images[name], height: Path = heights[name]) -> Iterator[Scene]:
            with open_imagery(image, lattice, recipe.bands) as colours, open_imagery(height, lattice, (1,)) as chm:
                box = _bounded(colours.box, source, lattice, image)
                yield Scene(
                    box=box,
                    image=colours.read,
                    height_m=lambda part: _heights(chm.read(part)),
                    unlabelled=_unlabelled(source, lattice),
                )

        yield Item(name=name, source=source, crs=_crs(recipe, images[name]), open=scene)


def _lidar_items(source: LidarSource, recipe: TileSetRecipe, folder: Path) -> Iterator[Item]:
    from canopy.tiler.lidar import LidarOptions, lidar_to_chm

    clouds = sorted({path for text in source.points for path in matches(text, folder).values()})
    try:
        given = source.options | ({"crs": CRS.from_user_input(source.options["crs"])} if "crs" in source.options else {})
        options = LidarOptions(**given)
    except (TypeError, ValueError, CRSError) as error:
        raise RecipeError(f"{source.site}: options of the source: {' '.join(str(error).split())}; correct it") from error
    for name, image in matches(source.image, folder).items():

        @contextmanager
        def scene(lattice: Lattice, image: Path = image) -> Iterator[Scene]:
            with open_imagery(image, lattice, recipe.bands) as colours:
                box = _bounded(colours.box, source, lattice, image)
                chm = lidar_to_chm(clouds, lattice.grid(box), source.algorithm, options=options).to_numpy()
                yield Scene(
                    box=box,
                    image=colours.read,
                    height_m=lambda part: _window(chm, box, part),
                    unlabelled=_unlabelled(source, lattice),
                )

        yield Item(name=name, source=source, crs=_crs(recipe, image), open=scene)


def _grown_items(source: SimulatedSource, recipe: TileSetRecipe) -> Iterator[Item]:
    from canopy.simulate import ForestConfig, simulate_scene

    assert source.size_m is not None, "a grown scene has a size"
    _refuse_bands(source, recipe)
    side = math.floor(source.size_m / recipe.gsd_m)
    # Scenes start at a multiple of the stride, so that their windows fill them from the corner, and of the pitch, so that
    # blocks of this size hold one scene each.
    pitch = math.ceil((source.size_m + SIMULATED_GAP_M) / recipe.gsd_m / recipe.stride_px) * recipe.stride_px
    west = round(500_000 / recipe.gsd_m / pitch) * pitch
    for seed in source.seeds:
        row, col = divmod(seed, math.isqrt(SIMULATED_SEEDS))
        box = Box(-(row + 1) * pitch, west + col * pitch, -(row + 1) * pitch + side, west + col * pitch + side)

        @contextmanager
        def scene(lattice: Lattice, seed: int = seed, box: Box = box) -> Iterator[Scene]:
            forest = ForestConfig.random(np.random.default_rng(seed))
            grown = simulate_scene(grid=lattice.grid(box), seed=seed, forest=forest)
            yield _scene_of(grown.image, grown.height_m, box)

        crs = CRS.from_user_input(recipe.crs or SIMULATED_CRS)
        yield Item(name=f"seed{seed}", source=source, crs=crs, open=scene)


def _reimaged_items(source: SimulatedSource, recipe: TileSetRecipe, folder: Path) -> Iterator[Item]:
    from canopy.simulate import reimage

    assert source.chm is not None, "a canopy height model to photograph"
    _refuse_bands(source, recipe)
    for name, path in matches(source.chm, folder).items():
        for seed in source.seeds:

            @contextmanager
            def scene(lattice: Lattice, path: Path = path, name: str = name, seed: int = seed) -> Iterator[Scene]:
                with open_imagery(path, lattice, (1,)) as chm:
                    box, height_m = chm.box, _heights(chm.read(chm.box))
                # The name goes in as well, so that the models of a folder are not all seen in one light.
                rng = np.random.default_rng([seed, zlib.crc32(name.encode())])
                yield _scene_of(reimage(height_m, gsd_m=lattice.gsd_m, rng=rng), height_m, box)

            yield Item(name=f"{name}-s{seed}", source=source, crs=_crs(recipe, path), open=scene, variant=f"s{seed}")


def _refuse_bands(source: SimulatedSource, recipe: TileSetRecipe) -> None:
    if recipe.bands != (1, 2, 3):
        raise RecipeError(
            f"{source.site} is simulated, in red, green and blue; bands must be [1, 2, 3], not {[*recipe.bands]}"
        )


def _scene_of(image: NDArray[np.uint8], height_m: NDArray[np.float32], outer: Box) -> Scene:
    """A scene held in memory: arrays that cover `outer`; there is imagery wherever a height is known."""
    known = np.isfinite(height_m)

    def pixels(box: Box) -> Pixels:
        data, valid = np.zeros((len(image), *box.shape), np.uint8), np.zeros(box.shape, bool)
        if (part := outer.intersect(box)) is not None:
            data[(slice(None), *part.slices_in(box))] = image[(slice(None), *part.slices_in(outer))]
            valid[part.slices_in(box)] = known[part.slices_in(outer)]
        return Pixels(data=data, valid=valid)

    return Scene(box=outer, image=pixels, height_m=lambda box: _window(height_m, outer, box))


def _heights(pixels: Pixels) -> NDArray[np.float32]:
    """(row, col) float32 of a single band, NaN where invalid."""
    return np.where(pixels.valid, pixels.data[0].astype(np.float32), np.float32(np.nan))


def _bounded(box: Box, source: _Imaged, lattice: Lattice, image: Path) -> Box:
    inside = box if source.bounds_m is None else box.intersect(lattice.covering(source.bounds_m))
    if inside is None:
        raise RecipeError(
            f"bounds_m {source.bounds_m} of site {source.site} do not touch {image}; give them in {lattice.crs.name}"
        )
    return inside


def _unlabelled(source: _Imaged, lattice: Lattice) -> tuple[Box, ...]:
    return tuple(lattice.covering(bounds) for bounds in source.unlabelled_m)


def _window(height_m: NDArray[np.float32], outer: Box, box: Box) -> NDArray[np.float32]:
    """The pixels of `box` from an array that covers `outer`, NaN outside."""
    out = np.full(box.shape, np.nan, np.float32)
    if (part := outer.intersect(box)) is not None:
        out[part.slices_in(box)] = height_m[part.slices_in(outer)]
    return out


# --- chips ---------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Chip:
    """A chip that has been written."""

    id: str
    item: Item
    box: Box
    footprint: Box
    valid_fraction: float
    height_mean_m: float
    height_p95_m: float
    sha256: str


def chip_starts(start: int, stop: int, chip_px: int, stride_px: int) -> list[int]:
    """First pixels of the windows along one axis of an image that covers [start, stop) of the lattice.

    An image that fits a window gets one, centred on it. A larger one gets every window that starts at a multiple of the
    stride and touches it.
    """
    size = stop - start
    if size <= chip_px:
        return [start - (chip_px - size) // 2]
    first = -((chip_px - 1 - start) // stride_px)  # ceil((start - chip_px + 1) / stride_px)
    return [k * stride_px for k in range(first, (stop - 1) // stride_px + 1)]


def build_tile_set(
    recipe: Path,
    out: Path | None = None,
    *,
    overwrite: bool = False,
    progress: Callable[[str, int], None] | None = None,
) -> Path:
    """Build a tile set from a recipe; it takes its name only when it is whole.

    Args:
        recipe: TOML file, a `TileSetRecipe`.
        out: Folder to make; default the recipe's name beside the recipe.
        overwrite: Replace `out` when it exists.
        progress: Called after each image with its name and the number of chips so far.

    Returns:
        The folder.

    Raises:
        RecipeError: the recipe is wrong, a file of it is missing, or it gives no chip or two chips of one id.
        OutputError: `out` exists and `overwrite` is False.
        RasterError, LidarError, GridError: a source cannot be read or placed.
    """
    settings = load_recipe(recipe)
    out = recipe.parent / settings.name if out is None else out
    if out.exists() and not overwrite:
        raise OutputError(f"{out} exists; choose another folder with --out or replace it with --overwrite")
    items = list(_items(settings, recipe.parent.resolve()))
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{out.name}-", dir=out.parent, ignore_cleanup_errors=True) as scratch:
        folder = Path(scratch) / out.name
        (folder / "image").mkdir(parents=True)
        (folder / "height").mkdir()
        chips: list[Chip] = []
        for item in items:
            chips += _cut(item, settings, folder)
            if progress is not None:
                progress(item.name, len(chips))
        chips.sort(key=lambda chip: chip.id)
        for one, other in pairwise(chips):
            if one.id == other.id:
                raise RecipeError(
                    f"{one.item.name} and {other.item.name} both give chip {one.id}; give each its own site in the recipe"
                )
        if not chips:
            raise RecipeError(
                f"{recipe} gives no chip with at least {settings.min_valid_fraction:.0%} known heights; "
                f"lower min_valid_fraction or check that imagery and heights overlap"
            )
        _index(chips, settings).to_parquet(folder / INDEX, index=False)
        shutil.copyfile(recipe, folder / "recipe.toml")
        if out.exists():
            out.rename(Path(scratch) / "replaced")
        folder.rename(out)
    return out


def _cut(item: Item, recipe: TileSetRecipe, folder: Path) -> list[Chip]:
    lattice = Lattice(crs=item.crs, gsd_m=recipe.gsd_m)
    side, stride = recipe.chip_px, recipe.stride_px
    chips = []
    with item.open(lattice) as scene:
        for row in chip_starts(scene.box.row0, scene.box.row1, side, stride):
            for col in chip_starts(scene.box.col0, scene.box.col1, side, stride):
                box = Box(row, col, row + side, col + side)
                footprint = box.intersect(scene.box)
                assert footprint is not None, f"window {box} misses its image {scene.box}"
                usable = np.zeros(box.shape, bool)
                usable[footprint.slices_in(box)] = True
                pixels = scene.image(box)
                image = replace(pixels, valid=pixels.valid & usable)
                height_m = np.where(image.valid, scene.height_m(box), np.float32(np.nan))
                for masked in scene.unlabelled:
                    if (part := masked.intersect(box)) is not None:
                        height_m[part.slices_in(box)] = np.nan
                known = height_m[np.isfinite(height_m)]
                if known.size < recipe.min_valid_fraction * height_m.size:
                    continue
                chips.append(_write(item, lattice, folder, box=box, footprint=footprint, image=image, height_m=height_m))
    return chips


def _write(
    item: Item,
    lattice: Lattice,
    folder: Path,
    *,
    box: Box,
    footprint: Box,
    image: Pixels,
    height_m: NDArray[np.float32],
) -> Chip:
    if image.data.dtype not in (np.uint8, np.uint16):
        raise RecipeError(f"{item.name} is {image.data.dtype}; chips hold uint8 or uint16, convert the image first")
    name = "_".join([item.source.site, *([item.variant] if item.variant else []), f"r{box.row0}_c{box.col0}"])
    grid = lattice.grid(box)
    known_m = height_m[np.isfinite(height_m)]
    paths = folder / "image" / f"{name}.tif", folder / "height" / f"{name}.tif"
    # One TIFF tile a chip; tile sides are multiples of 16, and chip sides of 32.
    tiling: dict[str, Any] = {"blockxsize": box.shape[1], "blockysize": box.shape[0]}
    data = np.where(image.valid, image.data, image.data.dtype.type(0))
    with create_raster(
        paths[0], grid=grid, count=len(data), dtype=data.dtype.name, predictor=2, **tiling
    ) as writer:  # fmt: skip
        writer.write(0, data)
        writer.write_valid(image.valid)
    with create_raster(
        paths[1], grid=grid, count=1, dtype="float32", nodata=float("nan"), band_names=["height_m"], units=["m"],
        predictor=3, **tiling,
    ) as writer:  # fmt: skip
        writer.write(0, height_m[None])
    return Chip(
        id=name,
        item=item,
        box=box,
        footprint=footprint,
        valid_fraction=known_m.size / height_m.size,
        height_mean_m=float(known_m.mean(dtype=np.float64)),
        height_p95_m=float(np.percentile(known_m, 95)),
        sha256=hashlib.sha256(b"".join(path.read_bytes() for path in paths)).hexdigest(),
    )


def _index(chips: Sequence[Chip], recipe: TileSetRecipe) -> gpd.GeoDataFrame:
    import geopandas as gpd
    import pandas as pd
    import pyarrow as pa
    from shapely import Polygon

    places, outlines = [], []
    for chip in chips:
        lattice = Lattice(crs=chip.item.crs, gsd_m=recipe.gsd_m)
        left, bottom, right, top = lattice.grid(chip.box).bounds
        footprint = lattice.grid(chip.footprint).bounds
        places.append(
            Place(
                id=chip.id,
                site=chip.item.source.site,
                item=chip.item.name,
                crs=chip.item.crs,
                centre_m=((left + right) / 2, (bottom + top) / 2),
                footprint_m=footprint,
            )
        )
        to_lonlat = Transformer.from_crs(lattice.crs, "EPSG:4326", always_xy=True)
        west, south, east, north = footprint
        outlines.append(
            Polygon(zip(*to_lonlat.transform([west, east, east, west], [south, south, north, north]), strict=True))
        )
    assigned = assign(places, recipe.split)
    splits = take_out_buffer(places, [split for _, split in assigned], recipe.split.buffer_m)
    sources = [chip.item.source for chip in chips]
    dates = pd.ArrowDtype(pa.date32())
    unmeasured = np.full(len(chips), np.nan)
    columns = {
        "id": [chip.id for chip in chips],
        "geometry": outlines,
        "site": [source.site for source in sources],
        "block": [block for block, _ in assigned],
        "split": splits,
        "image_date": pd.array([source.image_date for source in sources], dtype=dates),
        "lidar_date": pd.array([source.lidar_date for source in sources], dtype=dates),
        "gap_days": pd.array([source.gap_days for source in sources], dtype="Int32"),
        "gsd_m": np.full(len(chips), recipe.gsd_m),
        "valid_fraction": [chip.valid_fraction for chip in chips],
        "height_mean_m": [chip.height_mean_m for chip in chips],
        "height_p95_m": [chip.height_p95_m for chip in chips],
        "shift_x_m": unmeasured,
        "shift_y_m": unmeasured,
        "shift_score": unmeasured,
        "flags": [""] * len(chips),
        "image_source": [source.image_source for source in sources],
        "lidar_source": [source.lidar_source for source in sources],
        "licence": [source.licence for source in sources],
        "sha256": [chip.sha256 for chip in chips],
        "item": [chip.item.name for chip in chips],
        "crs": [crs_key(chip.item.crs) for chip in chips],
        "row_px": [chip.box.row0 for chip in chips],
        "col_px": [chip.box.col0 for chip in chips],
    }
    assert tuple(columns) == COLUMNS, "the index and its documentation differ"
    return gpd.GeoDataFrame(columns, geometry="geometry", crs="EPSG:4326")


# --- reading a tile set --------------------------------------------------------------------------------------------------


def read_index(tile_set: Path) -> gpd.GeoDataFrame:
    """The index of a tile set, one row a chip in the order of their ids; the columns are those of `COLUMNS`.

    Raises:
        RecipeError: no tile set, or one without some of the columns.
    """
    import geopandas as gpd

    path = tile_set / INDEX
    if not path.is_file():
        raise RecipeError(f"{tile_set} is no tile set ({INDEX} is missing); build it with: canopy tile RECIPE")
    index = gpd.read_parquet(path)
    if missing := [name for name in COLUMNS if name not in index.columns]:
        raise RecipeError(f"{path} lacks the column {missing[0]!r}; build the tile set again with this version")
    return index


def read_chip(tile_set: Path, chip: str) -> tuple[Pixels, NDArray[np.float32]]:
    """Image (band, row, col) with its validity, and height (row, col) in metres, NaN unknown, of one chip."""
    image, _ = read_raster(tile_set / "image" / f"{chip}.tif")
    height, _ = read_raster(tile_set / "height" / f"{chip}.tif")
    return image, height.data[0]


def tile_set_hash(tile_set: Path) -> str:
    """SHA-256 over id, split and file digests of all chips: changes with any pixel, any chip and any split."""
    index = read_index(tile_set).sort_values("id")
    lines = (
        f"{chip}\t{split}\t{digest}\n" for chip, split, digest in index[["id", "split", "sha256"]].itertuples(index=False)
    )
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def contact_sheet(tile_set: Path, png: Path, *, count: int = 24, per_line: int = 2) -> Path:
    """Draw chips as image, image with the outline of heights above 5 m, height, and validity, side by side.

    Args:
        tile_set: Folder of a tile set.
        png: File to write.
        count: Number of chips, taken evenly from the index.
        per_line: Chips in a line of the sheet.

    Returns:
        `png`.
    """
    from matplotlib.figure import Figure

    index = read_index(tile_set)
    rows = index.iloc[np.unique(np.linspace(0, len(index) - 1, min(count, len(index))).round().astype(int))]
    lines = -(-len(rows) // per_line)
    figure = Figure(figsize=(10.0 * per_line, 2.75 * lines), layout="constrained")
    axes = figure.subplots(lines, 4 * per_line, squeeze=False)
    for axis in axes.flat:
        axis.set_axis_off()
    top_m = max(float(rows["height_p95_m"].max()), 1.0)
    for number, row in enumerate(rows.itertuples(index=False)):
        line, first = divmod(number, per_line)
        panels = axes[line, 4 * first : 4 * first + 4]
        image, height_m = read_chip(tile_set, row.id)
        colours = image.data[:3] if len(image.data) >= 3 else np.repeat(image.data[:1], 3, axis=0)
        colours = np.moveaxis(colours / np.iinfo(colours.dtype).max, 0, -1)
        known = np.isfinite(height_m)
        for panel in panels[:2]:
            panel.imshow(colours)
        if (np.nan_to_num(height_m, nan=0.0) > 5).any():
            panels[1].contour(np.nan_to_num(height_m, nan=0.0), levels=[5.0], colors="yellow", linewidths=0.6)
        shown = panels[2].imshow(height_m, vmin=0, vmax=top_m, cmap="viridis")
        panels[3].imshow(known.astype(int) + image.valid, vmin=0, vmax=2, cmap="gray")
        panels[0].set_title(f"{row.id}\n{row.split} · {row.gsd_m:g} m", fontsize=6, loc="left")
        panels[1].set_title("heights > 5 m outlined", fontsize=6, loc="left")
        panels[2].set_title(f"height, mean {row.height_mean_m:.1f} p95 {row.height_p95_m:.1f} m", fontsize=6, loc="left")
        panels[3].set_title(f"valid {row.valid_fraction:.0%} (grey: image only)", fontsize=6, loc="left")
    figure.colorbar(shown, ax=axes, shrink=0.5 / lines**0.5, label="height (m)")
    png.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(png, dpi=110)
    return png

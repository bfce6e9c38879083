"""The recipe of a tile set: what its author writes, checked before any pixel is read.

Imagery and labels are chosen independently of each other. Imagery is local files (`image`) or a search in a STAC catalogue
(`imagery`); labels are rasters (`kind = "pair"`: `height`, or `dsm` with `dtm`) or point clouds (`kind = "lidar"`: `points`,
or `lidar` for a catalogue). Paths are relative to the recipe's folder; `${CANOPY_SAMPLES}` and other environment variables
are expanded.
"""

from __future__ import annotations

import os
import re
from dataclasses import fields
from datetime import date as Day  # noqa: N812 - a key of the recipe is called date
from pathlib import Path
from typing import Annotated, Any, Final, Literal, Self

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, field_validator, model_validator
from pyproj import CRS
from pyproj.exceptions import CRSError

from canopy.errors import RecipeError
from canopy.settings import nearest, read_settings
from canopy.tiler.quality import QualitySettings
from canopy.tiler.register import RegistrationSettings
from canopy.tiler.split import SplitSettings

SIMULATED_SEEDS: Final = 10_000
"""Scenes have places of their own in a square of this many, so that the split parts them as it parts real sites."""


class _Table(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


def _ordered(bounds: tuple[float, float, float, float]) -> tuple[float, float, float, float]:
    if not (bounds[0] < bounds[2] and bounds[1] < bounds[3]):
        raise ValueError("must be left, bottom, right, top with left < right and bottom < top")
    return bounds


Bounds = Annotated[tuple[float, float, float, float], AfterValidator(_ordered)]

Paths = Annotated[
    tuple[str, ...], BeforeValidator(lambda value: (value,) if isinstance(value, str) else value), Field(min_length=1)
]
"""One path or several; a path may be a file, a folder or a glob with one `*`."""


class StacImagery(_Table):
    """Imagery from a catalogue: what is searched for over the recipe's area. What is found is frozen into a manifest."""

    source: str
    """A name in `data/`, for example "naip", or the path of such a file."""
    start: Day | None = None
    end: Day | None = None
    prefer: Literal["newest", "least-cloud", "closest"] = "newest"
    """Which of several scenes of one place lies on top."""
    date: Day | None = None
    """The day that "closest" is counted from."""
    max_cloud_percent: float | None = Field(default=None, ge=0, le=100)
    """Default the source's own limit."""
    exclude: tuple[str, ...] = ()
    """Ids of items to leave out."""

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if (self.prefer == "closest") != (self.date is not None):
            raise ValueError('prefer = "closest" goes with `date`, and only with it')
        if self.start is not None and self.end is not None and self.end < self.start:
            raise ValueError(f"end {self.end} is before start {self.start}")
        return self


class LidarSearch(_Table):
    """Point clouds from a catalogue over the recipe's area, survey by survey. What is found is frozen into a manifest."""

    source: str
    """A name in `data/`, for example "3dep", or the path of such a file."""
    catalogue: Literal["stac-api", "ept-index"] | None = None
    """Which of the source's catalogues; default its first."""
    start: Day | None = None
    end: Day | None = None
    survey: str | None = None
    """The one survey to use; default the newest at each place."""


class AnySource(_Table):
    """What every source has."""

    site: str = Field(pattern=r"^[A-Za-z0-9_.-]+$")
    """Acquisition area; part of every chip's id."""
    image_date: Day | None = None
    """Of imagery that does not know the day of its pixels."""
    lidar_date: Day | None = None
    licence: str
    image_source: str
    """What the imagery is and who made it, for the index and the model card."""
    lidar_source: str
    derived_from: tuple[str, ...] = ()
    """Items, products or files that imagery or labels were made from, for the audit; real height models photographed anew
    are named by themselves."""


class ImagedSource(AnySource):
    """A source with real imagery, whatever its labels."""

    image: Paths | None = None
    """A raster; a glob with one `*`, each file of which is an item of its own; a folder or several of these, which are one
    mosaic."""
    imagery: StacImagery | None = None
    """In place of `image`: a search in a catalogue over the recipe's area."""
    bounds_m: Bounds | None = None
    """(left, bottom, right, top) in the chips' CRS; nothing outside is used."""
    unlabelled_m: tuple[Bounds, ...] = ()
    """Rectangles in the chips' CRS whose heights are not canopy, such as bridges and houses; the imagery stays."""

    @model_validator(mode="after")
    def _one_imagery(self) -> Self:
        if (self.image is None) == (self.imagery is None):
            raise ValueError("give either image, for local files, or imagery, for a catalogue")
        return self


class PairSource(ImagedSource):
    """Imagery with rasters of canopy height; with globs, what `*` stands for pairs the files."""

    kind: Literal["pair"]
    height: Paths | None = None
    """Canopy height models, above ground."""
    dsm: Paths | None = None
    """In place of `height`: surface models, from which `dtm` is taken off."""
    dtm: Paths | None = None
    """Terrain models in the vertical datum of `dsm`."""
    height_unit_m: float | None = Field(default=None, gt=0)
    """Metres per unit of `height`, in place of what its files say: 0.3048 for feet, 0.1 for decimetres."""
    dsm_unit_m: float | None = Field(default=None, gt=0)
    dtm_unit_m: float | None = Field(default=None, gt=0)
    exclude: tuple[str, ...] = ()
    """What `*` stands for in the files to leave out."""

    @model_validator(mode="after")
    def _one_label(self) -> Self:
        if (self.dsm is None) != (self.dtm is None) or (self.height is None) == (self.dsm is None):
            raise ValueError("give either height, or dsm and dtm")
        return self


class LidarSource(ImagedSource):
    """Imagery with point clouds, from which the heights are made on the imagery's lattice."""

    kind: Literal["lidar"]
    points: Paths | None = None
    """LAS, LAZ, COPC or EPT: files, folders, globs or http addresses."""
    lidar: Annotated[
        LidarSearch | None, BeforeValidator(lambda value: {"source": value} if isinstance(value, str) else value)
    ] = None
    """In place of `points`: a search in a catalogue over the recipe's area, or only its name, for example "3dep"."""
    algorithm: str = "p2r"
    options: dict[str, Any] = Field(default_factory=dict)
    """Fields of `canopy.tiler.lidar.LidarOptions`."""

    @model_validator(mode="after")
    def _one_cloud(self) -> Self:
        if (self.points is None) == (self.lidar is None):
            raise ValueError("give either points, for files, or lidar, for a catalogue")
        return self


class SimulatedSource(AnySource):
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
    bands: tuple[int | str, ...] = Field(default=(1, 2, 3), min_length=1)
    """Bands of the imagery in the order the model is to see: 1-based numbers, for a catalogue also names."""
    area: str | None = None
    """File with the polygons to stay inside (GeoJSON, GeoPackage, GeoParquet); simulated scenes are everywhere."""
    bbox_deg: tuple[float, float, float, float] | None = None
    """In place of `area`: west, south, east, north."""
    split: SplitSettings
    registration: RegistrationSettings | None = None
    """How labels are moved onto the imagery; without the table shifts are neither measured nor applied."""
    quality: QualitySettings | None = None
    """Which chips are flagged or dropped; without the table every chip is kept."""
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
        if self.area is not None and self.bbox_deg is not None:
            raise ValueError("area and bbox_deg are both given; keep one")
        return self


def load_recipe(path: Path) -> TileSetRecipe:
    """Read and check a recipe.

    Raises:
        RecipeError: missing or no TOML, an unknown key, or a value out of its range; the message names the key, and for an
            unknown one the nearest valid.
    """
    return read_settings(path, TileSetRecipe, what="a tile-set recipe")


def lidar_options(source: LidarSource) -> Any:
    """The `LidarOptions` that a source's table `options` describes.

    Raises:
        RecipeError: an unknown option or a value out of its range; the message names it.
    """
    from canopy.tiler.lidar import LidarOptions

    names = [field.name for field in fields(LidarOptions)]
    if unknown := [name for name in source.options if name not in names]:
        raise RecipeError(f"{source.site}: options has no {unknown[0]!r}; {nearest(unknown[0], names)}")
    given: dict[str, Any] = {name: tuple(v) if isinstance(v, list) else v for name, v in source.options.items()}
    try:
        return LidarOptions(**given | ({"crs": CRS.from_user_input(given["crs"])} if "crs" in given else {}))
    except (TypeError, ValueError, CRSError) as error:
        raise RecipeError(f"{source.site}: options of the source: {' '.join(str(error).split())}; correct it") from error


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
    """The files, or the one folder, that a path or glob names, keyed by what `*` stands for (by the stem, without one).

    Raises:
        RecipeError: a variable is not set, more than one `*`, or no file.
    """
    path = resolve(text, folder)
    if "*" not in str(path):
        if not path.exists():
            raise RecipeError(f"{path} does not exist; correct the path in the recipe or fetch the file")
        return {path.stem: path}
    if str(path.parent).count("*") or path.name.count("*") != 1:
        raise RecipeError(f"{text} must hold one * at most, in the file name; write one [[source]] per folder")
    before, after = path.name.split("*")
    found = {p.name[len(before) : len(p.name) - len(after)]: p for p in sorted(path.parent.glob(path.name))}
    if not found:
        raise RecipeError(f"{path} matches no file; correct the path in the recipe or fetch the files")
    return found

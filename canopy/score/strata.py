"""Parts of the ground that a score is also given for: classes of land cover and the user's polygons."""

from __future__ import annotations

import tomllib
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

import numpy as np
from numpy.typing import NDArray
from pyproj import Transformer

from canopy.errors import AreaError, ScoreError
from canopy.grid import Box, Grid
from canopy.raster import Raster, nearest, open_raster
from canopy.score.cells import Cells
from canopy.tiler.area import read_area

if TYPE_CHECKING:
    import geopandas

MOST_CLASSES: Final = 64
"""A raster with more classes of land cover than this is none."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class LandCover:
    """A raster of classes, open for reading."""

    raster: Raster
    grid: Grid
    names: dict[int, str]
    """By class, where they are known."""

    @property
    def said(self) -> str:
        """Where the classes come from, in words."""
        side = max(self.grid.gsd)
        return (
            f"{self.raster.path.name}: the class of the pixel ({side:.4g} in units of {self.grid.crs.name}) in which the "
            f"centre of the cell lies"
        )

    def label(self, number: int) -> str:
        """What a class is called."""
        return self.names.get(number, f"class {number}")

    def read(self, cells: Cells, box: Box) -> NDArray[np.float64]:
        """(row, col) class of each cell, NaN where there is none.

        Raises:
            ScoreError: it holds values that are no whole numbers.
        """
        target = cells.grid(box)
        source = self._window(target)
        if source is None:
            return np.full(box.shape, np.nan)
        row, col, shape = source
        pixels = self.raster.read(row, col, shape, (1,), alpha_is_mask=False)
        values = np.where(pixels.valid, pixels.data[0].astype(np.float64), np.nan)
        found = nearest(values, self.grid.crop(row, col, shape), target)
        if (np.floor(found[np.isfinite(found)]) != found[np.isfinite(found)]).any():
            raise ScoreError(f"{self.raster.path} holds values that are no whole numbers; give a raster of classes")
        return found

    def _window(self, target: Grid) -> tuple[int, int, tuple[int, int]] | None:
        """(row, col, shape) of the pixels that `target` needs, two more on each side; None where there are none."""
        bounds = Transformer.from_crs(target.crs, self.grid.crs, always_xy=True).transform_bounds(
            *target.bounds, densify_pts=21
        )
        corners = [self.grid.pixel(x, y) for x in bounds[::2] for y in bounds[1::2]]
        cols, rows = np.array(corners).T
        if not (np.isfinite(cols).all() and np.isfinite(rows).all()):
            return None
        row0, row1 = max(0, int(np.floor(rows.min())) - 2), min(self.grid.shape[0], int(np.ceil(rows.max())) + 2)
        col0, col1 = max(0, int(np.floor(cols.min())) - 2), min(self.grid.shape[1], int(np.ceil(cols.max())) + 2)
        return (row0, col0, (row1 - row0, col1 - col0)) if row0 < row1 and col0 < col1 else None


@contextmanager
def open_land_cover(path: Path, names: Path | None = None) -> Iterator[LandCover]:
    """Open a raster of classes; its first band counts.

    Args:
        path: The raster, in any CRS.
        names: TOML file with a name for each class: 10 = "tree cover".

    Raises:
        RasterError: the raster is unreadable or has no CRS.
        ScoreError: the names are no such file.
    """
    with open_raster(path) as raster:
        yield LandCover(raster=raster, grid=raster.grid, names={} if names is None else _names(names))


def _names(path: Path) -> dict[int, str]:
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8"))
        return {int(key): str(value) for key, value in table.items()}
    except FileNotFoundError:
        raise ScoreError(f"{path} does not exist; give a TOML file of names, for example 10 = 'tree cover'") from None
    except (OSError, ValueError) as error:
        raise ScoreError(f"{path} is no table of names; write for example 10 = 'tree cover', a line a class") from error


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Polygons:
    """The user's polygons, each with a name."""

    path: Path
    frame: geopandas.GeoSeries
    """In the CRS of the file, one (multi-)polygon a name."""
    names: tuple[str, ...]
    said: str
    """Where they come from, in words."""

    def on(self, cells: Cells) -> PlacedPolygons:
        """The polygons in the CRS of cells."""
        series = self.frame
        if series.crs.is_geographic:
            series = series.segmentize(0.001)
        shapes = tuple(series.to_crs(cells.crs))
        return PlacedPolygons(cells=cells, shapes=shapes, bounds=np.array([shape.bounds for shape in shapes]))


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class PlacedPolygons:
    """Polygons where cells are."""

    cells: Cells
    shapes: tuple[object, ...]
    bounds: NDArray[np.float64]
    """(polygon, 4): left, bottom, right, top."""

    def within(self, box: Box) -> Iterator[tuple[int, NDArray[np.bool_]]]:
        """(number, (row, col) whether a cell's centre lies in it) of each polygon that touches a box."""
        from rasterio.features import rasterize

        grid = self.cells.grid(box)
        left, bottom, right, top = grid.bounds
        west, south, east, north = self.bounds.T
        for number in np.flatnonzero((west < right) & (east > left) & (south < top) & (north > bottom)).tolist():
            mask = rasterize([self.shapes[number]], out_shape=box.shape, transform=grid.transform, dtype="uint8")
            if mask.any():
                yield number, mask > 0


def read_polygons(path: Path, name: str | None = None) -> Polygons:
    """Polygons of a vector file.

    Args:
        path: GeoJSON, GeoPackage, GeoParquet or what else GDAL reads, in any CRS.
        name: Column of the names; default a column called name, in any case, else the number of the row. Rows of one name
            are one polygon.

    Raises:
        AreaError: as `canopy.tiler.area.read_area`; or there is no such column.
    """
    import geopandas

    read_area(path)  # says what is wrong with the geometry
    frame = geopandas.read_parquet(path) if path.suffix == ".parquet" else geopandas.read_file(path)
    columns = [str(column) for column in frame.columns if column != frame.geometry.name]
    if name is None:
        name = next((column for column in columns if column.casefold() == "name"), None)
    elif name not in columns:
        raise AreaError(f"{path} has no column {name!r}, only {', '.join(columns) or 'none'}; choose another")
    frame = frame[~(frame.geometry.is_empty | frame.geometry.isna())]
    labels = [f"polygon {number}" for number in range(1, len(frame) + 1)] if name is None else frame[name].astype(str)
    joined = frame.assign(_label=list(labels)).dissolve("_label", sort=False)
    said = (
        f"{path.name}, by {'the number of the row' if name is None else f'column {name}'}; a cell counts where its centre is"
    )
    return Polygons(path=path, frame=joined.geometry, names=tuple(str(label) for label in joined.index), said=said)


@dataclass(frozen=True, slots=True, kw_only=True)
class Strata:
    """Parts of the ground to score apart."""

    land_cover: Path | None = None
    """Raster of classes."""
    land_cover_names: Path | None = None
    """TOML file with their names."""
    polygons: Path | None = None
    """Vector file."""
    polygon_name: str | None = None
    """Its column of names."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class OpenStrata:
    """Land cover and polygons whose cells can be told."""

    land_cover: LandCover | None
    polygons: Polygons | None


@contextmanager
def open_strata(given: Strata) -> Iterator[OpenStrata]:
    """Open what is given; raises as `open_land_cover` and `read_polygons`."""
    with ExitStack() as stack:
        cover = given.land_cover
        yield OpenStrata(
            land_cover=None if cover is None else stack.enter_context(open_land_cover(cover, given.land_cover_names)),
            polygons=None if given.polygons is None else read_polygons(given.polygons, given.polygon_name),
        )


def check_classes(path: Path, numbers: Sequence[int]) -> None:
    """Refuse what has too many classes to be land cover.

    Raises:
        ScoreError: it has.
    """
    if len(numbers) > MOST_CLASSES:
        raise ScoreError(
            f"{path} has more than {MOST_CLASSES} classes ({len(numbers)}) on this ground; give a raster of land cover"
        )

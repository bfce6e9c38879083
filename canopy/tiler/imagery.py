"""Imagery on the lattice, from local files that GDAL can read: GeoTIFF, JPEG or PNG with its sidecars, VRT; one or many.

Files whose pixels already are lattice pixels are read as they are. Any other is resampled once, in warp tiles that are
fixed by the lattice: each is warped whole, from the same source pixels, whoever asks for a part of it. So a pixel does not
depend on the area of interest or on the sheet it is read for, not even by a rounding.

Files of one pixel grid (same CRS, pixel size and phase) are one image, cut up: they are put together on that grid first
and warped together, so that the cuts cannot be seen. Files of different grids are warped apart. Where files overlap every
pixel comes whole from one of them: from the one of finer GSD (to two significant digits), among these from the newer (a
known date before an unknown one), among these from the first by name. A pixel that this file holds but masks comes from
the next.
"""

from __future__ import annotations

import math
from collections import OrderedDict, defaultdict
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray
from pyproj import CRS, Transformer
from rasterio.enums import Resampling

from canopy.errors import GridError, RasterError
from canopy.grid import Box, Grid, Lattice, is_metric, utm_crs
from canopy.raster import Pixels, RasterPool, warp
from canopy.tiler.headers import (
    NO_DATE,
    Band,
    ImageFile,
    LocalPaths,
    PixelGrid,
    Place,
    bands_of,
    find_files,
    ground_gsd_m,
    judge_alpha,
    leading_crs,
    middle,
    read_headers,
)

__all__ = [
    "NO_DATE", "Band", "ImageFiles", "Imagery", "ImageryInfo", "ImagerySource", "LocalImagery", "LocalPaths", "ground_gsd_m",
    "inspect", "open_imagery",
]  # fmt: skip

WARP_TILE_PX = 512
"""Side of the warp tiles. Larger tiles warp no faster per pixel; smaller ones re-read more of the kernel's margin."""

OPEN_FILES = 64
"""Files held open at a time, far below the 1024 that a process may have on most systems."""

_EDGE_STEPS = 16
"""Points per tile edge that are carried into the image's CRS to find what the tile needs of it."""


class Imagery(Protocol):
    """Imagery on a lattice, wherever it comes from: one file, many files, the items of a catalogue.

    Open for as long as its context manager is, for one thread at a time. What `read` and `days` say of a pixel depends on
    the imagery and the lattice, never on the box that was asked for.
    """

    @property
    def lattice(self) -> Lattice:
        """The pixels that are delivered."""

    @property
    def box(self) -> Box:
        """The lattice pixels that the imagery touches; outside, all is invalid."""

    @property
    def bands(self) -> tuple[int | str, ...]:
        """1-based indices or names, in the order delivered."""

    @property
    def dtype(self) -> str:
        """Data type of the pixels."""

    @property
    def resampled(self) -> str:
        """How the sources' pixels became lattice pixels: "none", or the kernel's name."""

    @property
    def sources(self) -> tuple[str, ...]:
        """The files or items that the pixels are taken from."""

    def read(self, box: Box) -> Pixels:
        """The pixels of `box` as (band, row, col); where there is no imagery they are 0 (NaN for floats) and invalid."""

    def days(self, box: Box) -> NDArray[np.int32]:
        """(row, col) days since 1970-01-01 of the scene each pixel came from; `NO_DATE` where unknown or invalid."""

    def touching(self, box: Box) -> tuple[int, ...]:
        """The scenes that may give a pixel of `box`, by their places in the record of the source."""


class ImagerySource(Protocol):
    """Where imagery comes from, looked up once; it can be opened on any lattice."""

    @property
    def info(self) -> ImageryInfo:
        """What the imagery is."""

    def open(self, lattice: Lattice, bands: Sequence[Band] | None = None) -> AbstractContextManager[Imagery]:
        """The imagery on a lattice."""

    def record(self) -> list[dict[str, Any]]:
        """The files or items, each with what tells it from a later version, for a run's record."""


# --- what imagery is -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageryInfo:
    """What imagery is, before any of its pixels are read."""

    source: str
    """As it was named, for messages."""
    crs: CRS
    """The CRS of the image; of several, the one that covers most, metric ones first."""
    band_count: int
    """Bands that are delivered unless others are chosen: all that do not serve as a mask."""
    band_names: tuple[str | None, ...]
    """Descriptions of the bands of the preferred file."""
    dtype: str
    gsd_m: float
    """Ground sampling distance in metres, the coarser of the two axes: in a metric CRS the pixel size as it is, so that the
    image's own pixels can be lattice pixels; in any other, measured on the ground at the centre. Of several the finest."""
    coarsest_gsd_m: float
    """The same, of the coarsest of several."""
    coarsest: str
    """Which that is, for messages."""
    alpha: Literal["none", "mask", "data"]
    """What the band tagged alpha is used as unless it is asked for: the mask of the others, or one more band of data."""
    alpha_reason: str
    """Why."""
    centre_lon_deg: float
    centre_lat_deg: float
    files: tuple[ImageFile, ...] = ()
    """The local files, the preferred first."""
    left_out: tuple[str, ...] = ()
    """Endings of the files that a folder holds besides its images."""

    @property
    def metric_crs(self) -> CRS:
        """The imagery's own CRS when its unit is the metre on the ground, else the UTM zone of its centre."""
        return self.crs if is_metric(self.crs) else utm_crs(self.centre_lon_deg, self.centre_lat_deg)


class ImageFiles:
    """Local image files, their headers read once.

    Args:
        paths: A file, a folder, a pattern, or a list of these.

    Raises:
        RasterError: none found; one unreadable, cut short, without CRS or geotransform, or unlike the others in data type.
    """

    def __init__(self, paths: LocalPaths) -> None:
        found, name, left_out = find_files(paths)
        files = tuple(sorted(read_headers(found), key=lambda file: file.preference))
        first = min(files, key=lambda file: file.path)
        for file in files:
            if file.dtype != first.dtype:
                raise RasterError(
                    f"{file.path} is {file.dtype} but {first.path} is {first.dtype}; files that are mapped together must "
                    f"share one data type: convert one, or name them apart"
                )
        alpha, reason = judge_alpha(files)
        where = [Place(file.gsd_m, file.centre_lon_deg, file.centre_lat_deg) for file in files]
        lon_deg, lat_deg = middle(where)
        coarsest = max(files, key=lambda file: file.gsd_m)
        self.info = ImageryInfo(
            source=name, crs=leading_crs([file.grid for file in files], where),
            band_count=len(bands_of(files[0], None, alpha)), band_names=files[0].band_names, dtype=first.dtype,
            gsd_m=min(file.gsd_m for file in files),
            coarsest_gsd_m=coarsest.gsd_m, coarsest=str(coarsest.path), alpha=alpha, alpha_reason=reason,
            centre_lon_deg=lon_deg, centre_lat_deg=lat_deg, files=files, left_out=left_out,
        )  # fmt: skip

    @contextmanager
    def open(self, lattice: Lattice, bands: Sequence[Band] | None = None) -> Iterator[LocalImagery]:
        """The files on `lattice`; see `open_imagery`."""
        with RasterPool(OPEN_FILES) as pool:
            yield LocalImagery(self.info, lattice, bands, pool)

    def record(self) -> list[dict[str, Any]]:
        """Path, size and time of each file."""
        return [{"path": str(f.path), "bytes": f.size_bytes, "modified": f.modified} for f in self.info.files]


def inspect(paths: LocalPaths) -> ImageryInfo:
    """Read the headers of local images.

    Args:
        paths: A file, a folder, a pattern, or a list of these.

    Raises:
        RasterError: as `ImageFiles`.
    """
    return ImageFiles(paths).info


def open_imagery(
    paths: LocalPaths | ImageFiles, lattice: Lattice, bands: Sequence[Band] | None = None
) -> AbstractContextManager[LocalImagery]:
    """Open local images for reading on `lattice`.

    Args:
        paths: A GeoTIFF, JPEG or PNG with its CRS, or VRT; a folder of images; a pattern; a list of these; or what
            `ImageFiles` made of them, which saves reading the headers again.
        lattice: The pixels to deliver.
        bands: 1-based indices or descriptions in the order wanted, default all that do not serve as a mask. A band tagged
            alpha that is named here is data and masks nothing.

    Raises:
        RasterError: as `ImageFiles`, or a file is without one of the bands.
        GridError: an image cannot be carried into the lattice's CRS.
    """
    return (paths if isinstance(paths, ImageFiles) else ImageFiles(paths)).open(lattice, bands)


# --- reading -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class _Placed:
    """A file on the pixel grid of its mosaic."""

    file: ImageFile
    rank: int
    """Place in the order of preference among all files."""
    bands: tuple[int, ...]
    box: Box
    """Its pixels, on the grid of the mosaic."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Owned:
    """Pixels, and which file each came from."""

    pixels: Pixels
    owner: NDArray[np.int32]
    """(row, col) rank of the file, -1 where invalid."""


class _NativeMosaic:
    """Files of one pixel grid, put together pixel by pixel without resampling."""

    def __init__(self, placed: Sequence[_Placed], pool: RasterPool, *, alpha_is_mask: bool) -> None:
        self.placed = sorted(placed, key=lambda p: p.rank)
        self._pool = pool
        self._alpha_is_mask = alpha_is_mask
        self._tree = _tree([p.box for p in self.placed])

    def read(self, box: Box) -> _Owned:
        """The pixels of `box` on the mosaic's own grid."""
        some = self.placed[0]
        dtype = np.dtype(some.file.dtype)
        data = np.full((len(some.bands), *box.shape), math.nan if dtype.kind == "f" else 0, dtype)
        owner = np.full(box.shape, -1, np.int32)
        for index in _hits(self._tree, box):
            placed = self.placed[index]
            part = placed.box.intersect(box)
            if part is None:
                continue
            here = part.slices_in(box)
            left = owner[here] < 0
            if not left.any():
                continue
            pixels = self._pool.get(placed.file.path).read(
                part.row0 - placed.box.row0, part.col0 - placed.box.col0, part.shape, placed.bands,
                alpha_is_mask=self._alpha_is_mask,
            )  # fmt: skip
            take = left & pixels.valid
            if not take.all():
                np.copyto(data[(slice(None), *here)], pixels.data, where=take)
                owner[here][take] = placed.rank
                continue
            if part == box:  # the usual case, and as it comes from the file
                return _Owned(pixels=pixels, owner=np.full(box.shape, placed.rank, np.int32))
            data[(slice(None), *here)], owner[here] = pixels.data, placed.rank
        return _Owned(pixels=Pixels(data=data, valid=owner >= 0), owner=owner)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Layer:
    """A mosaic and how its pixels become lattice pixels."""

    mosaic: _NativeMosaic
    grid: PixelGrid | None
    """None: they are lattice pixels."""
    crs: CRS
    to_image: Transformer = field(repr=False)


class LocalImagery:
    """Open image files, read in boxes of lattice pixels; made by `open_imagery`. Not for use by two threads at once."""

    resampled: Literal["none", "bilinear"]
    """How the files' pixels became lattice pixels; "bilinear" when those of any file were resampled."""
    box: Box
    """The lattice pixels that the files touch."""

    def __init__(self, info: ImageryInfo, lattice: Lattice, bands: Sequence[Band] | None, pool: RasterPool) -> None:
        self.lattice = lattice
        self.dtype = info.dtype
        self.sources = tuple(str(file.path) for file in info.files)
        indices = [bands_of(file, bands, info.alpha) for file in info.files]
        if unlike := next((i for i, own in enumerate(indices) if len(own) != len(indices[0])), None):
            raise RasterError(
                f"{info.files[unlike].path} has {len(indices[unlike])} bands but {info.files[0].path} has "
                f"{len(indices[0])}; choose those to read with --bands"
            )
        self.bands: tuple[Band, ...] = tuple(bands) if bands is not None else indices[0]
        native = [lattice.box_of(file.grid) for file in info.files]
        self.resampled = "none" if None not in native else "bilinear"
        boxes = _boxes_on(lattice, info.files, native)
        self.box = Box(
            min(b.row0 for b in boxes), min(b.col0 for b in boxes), max(b.row1 for b in boxes), max(b.col1 for b in boxes)
        )
        members: dict[PixelGrid | None, list[_Placed]] = defaultdict(list)
        for rank, (file, own, on_lattice) in enumerate(zip(info.files, indices, native, strict=True)):
            rows, cols = file.grid.shape
            row, col = file.origin_px
            place = on_lattice if on_lattice is not None else Box(row, col, row + rows, col + cols)
            members[None if on_lattice is not None else file.pixel_grid].append(
                _Placed(file=file, rank=rank, bands=own, box=place)
            )
        transformers: dict[str, Transformer] = {}
        self._layers: list[_Layer] = []
        self._layer_of = np.empty(len(info.files), np.intp)
        for key, placed in members.items():
            crs = placed[0].file.grid.crs
            name = placed[0].file.pixel_grid.crs
            if name not in transformers:
                transformers[name] = Transformer.from_crs(lattice.crs, crs, always_xy=True)
            self._layer_of[[p.rank for p in placed]] = len(self._layers)
            mosaic = _NativeMosaic(placed, pool, alpha_is_mask=info.alpha == "mask")
            self._layers.append(_Layer(mosaic=mosaic, grid=key, crs=crs, to_image=transformers[name]))
        self._boxes = boxes
        self._tree = _tree(boxes)
        self._day_of = np.array([file.day for file in info.files], np.int32)
        self._tiles: OrderedDict[tuple[int, int], _Owned | None] = OrderedDict()
        self._last: tuple[Box, NDArray[np.int32]] | None = None

    def read(self, box: Box) -> Pixels:
        """The pixels of `box` as (band, row, col); where there is no image they are 0 (NaN for floats) and invalid."""
        owned = self._read(box)
        self._last = (box, owned.owner)
        return owned.pixels

    def days(self, box: Box) -> NDArray[np.int32]:
        """(row, col) days since 1970-01-01 on which the file of each pixel was taken; `NO_DATE` if unknown or invalid."""
        if (self._day_of == NO_DATE).all():
            return np.full(box.shape, NO_DATE, np.int32)
        # Who owns a pixel depends on what is masked, so it takes a reading; usually `read` has just done it.
        owner = self._last[1] if self._last is not None and self._last[0] == box else self._read(box).owner
        return np.where(owner >= 0, self._day_of[owner], NO_DATE)

    def touching(self, box: Box) -> tuple[int, ...]:
        """The files that hold a pixel of `box`, whether masked or not, by their places among `ImageryInfo.files`."""
        # The tree finds also what only touches an edge of it.
        return tuple(int(index) for index in _hits(self._tree, box) if self._boxes[index].intersect(box) is not None)

    def _read(self, box: Box) -> _Owned:
        if self.resampled == "none":
            return self._layers[0].mosaic.read(box)
        dtype = np.dtype(self.dtype)
        data = np.full((len(self.bands), *box.shape), math.nan if dtype.kind == "f" else 0, dtype)
        owner = np.full(box.shape, -1, np.int32)
        tile_rows = range(box.row0 // WARP_TILE_PX, (box.row1 - 1) // WARP_TILE_PX + 1)
        tile_cols = range(box.col0 // WARP_TILE_PX, (box.col1 - 1) // WARP_TILE_PX + 1)
        for tile_row in tile_rows:
            for tile_col in tile_cols:
                tile = Box(
                    tile_row * WARP_TILE_PX, tile_col * WARP_TILE_PX,
                    (tile_row + 1) * WARP_TILE_PX, (tile_col + 1) * WARP_TILE_PX,
                )  # fmt: skip
                part = tile.intersect(box)
                owned = self._tile(tile_row, tile_col, tile)
                if part is None or owned is None:
                    continue
                here, there = part.slices_in(box), part.slices_in(tile)
                data[(slice(None), *here)] = owned.pixels.data[(slice(None), *there)]
                owner[here] = owned.owner[there]
        # What one box needs is kept for the next one below or beside it; boxes are read along rows.
        while len(self._tiles) > 2 * len(tile_cols) * len(tile_rows):
            self._tiles.popitem(last=False)
        return _Owned(pixels=Pixels(data=data, valid=owner >= 0), owner=owner)

    def _tile(self, row: int, col: int, box: Box) -> _Owned | None:
        """A warp tile, None where no file reaches into it."""
        if (row, col) in self._tiles:
            self._tiles.move_to_end((row, col))
            return self._tiles[row, col]
        hits = _hits(self._tree, box)
        layers = [self._layers[i] for i in np.unique(self._layer_of[hits])]
        # Whose a pixel is matters only where another layer may have a better one, or another file another day.
        exact = len(layers) > 1 or len(np.unique(self._day_of[hits])) > 1
        tile: _Owned | None = None
        for layer in layers:
            owned = layer.mosaic.read(box) if layer.grid is None else self._warped(layer, layer.grid, box, exact=exact)
            tile = owned if tile is None else _preferred(tile, owned)
        self._tiles[row, col] = tile
        return tile

    def _warped(self, layer: _Layer, pixel_grid: PixelGrid, box: Box, *, exact: bool) -> _Owned:
        """A layer's part in a warp tile; unless `exact`, any of its files stands for all as the owner."""
        target = self.lattice.grid(box)
        endless = Grid(crs=layer.crs, transform=pixel_grid.transform, shape=(1, 1))
        cols, rows = endless.pixel(*layer.to_image.transform(*edges(target, _EDGE_STEPS)))
        if not (np.isfinite(cols).all() and np.isfinite(rows).all()):
            raise GridError(
                f"{layer.mosaic.placed[0].file.path} lies at the end of the domain of {layer.crs.name!r}; map it in another "
                f"CRS with --crs"
            )
        # The kernel reaches one source pixel, or as many as one target pixel spans; the tile's own span says how many.
        span = max(np.ptp(cols), np.ptp(rows)) / WARP_TILE_PX
        margin = 2 * math.ceil(max(span, 1.0)) + 2
        source_box = Box(
            math.floor(rows.min()) - margin, math.floor(cols.min()) - margin,
            math.ceil(rows.max()) + margin, math.ceil(cols.max()) + margin,
        )  # fmt: skip
        source = endless.crop(source_box.row0, source_box.col0, source_box.shape)
        native = layer.mosaic.read(source_box)
        pixels = warp(native.pixels, source, target)
        ranks = np.unique(native.owner[native.pixels.valid])
        if len(ranks) == 0 or not pixels.valid.any():
            owner = np.full(box.shape, -1, np.int32)
        elif len(ranks) == 1 or not exact:
            owner = np.where(pixels.valid, ranks[0], -1).astype(np.int32)
        else:
            owner = np.where(pixels.valid, _nearest_owner(native, source, target), -1).astype(np.int32)
        return _Owned(pixels=_zeroed(pixels), owner=owner)


def _nearest_owner(native: _Owned, source: Grid, target: Grid) -> NDArray[np.int32]:
    """The file of the source pixel nearest to each target pixel; beside holes, of the nearest that is valid."""
    owner = native.owner
    if not native.pixels.valid.all():
        from scipy.ndimage import distance_transform_edt

        nearest = distance_transform_edt(~native.pixels.valid, return_distances=False, return_indices=True)
        owner = owner[tuple(nearest)]
    # Ranks are whole numbers far below 2^24, so float32 holds them as they are.
    known = Pixels(data=owner[None].astype(np.float32), valid=np.ones(owner.shape, bool))
    ranks = warp(known, source, target, resampling=Resampling.nearest)
    assert ranks.valid.all(), "the source window does not cover its warp tile"
    owners: NDArray[np.int32] = ranks.data[0].astype(np.int32)
    return owners


def _preferred(one: _Owned, other: _Owned) -> _Owned:
    """Each pixel from the file that ranks first."""
    take = other.pixels.valid & (~one.pixels.valid | (other.owner < one.owner))
    owner = np.where(take, other.owner, one.owner)
    return _Owned(pixels=Pixels(data=np.where(take, other.pixels.data, one.pixels.data), valid=owner >= 0), owner=owner)


def _zeroed(pixels: Pixels) -> Pixels:
    """What is invalid is 0, or NaN in floats."""
    fill = math.nan if pixels.data.dtype.kind == "f" else 0
    return Pixels(data=np.where(pixels.valid, pixels.data, pixels.data.dtype.type(fill)), valid=pixels.valid)


# --- where files are -----------------------------------------------------------------------------------------------------


def _boxes_on(lattice: Lattice, files: Sequence[ImageFile], native: Sequence[Box | None]) -> list[Box]:
    """The lattice pixels that each file touches."""
    found: list[Box | None] = list(native)
    by_crs: dict[str, list[int]] = defaultdict(list)
    for index, file in enumerate(files):
        if native[index] is None:
            by_crs[file.pixel_grid.crs].append(index)
    for some in by_crs.values():
        to_lattice = Transformer.from_crs(files[some[0]].grid.crs, lattice.crs, always_xy=True)
        points = np.array([edges(files[i].grid, 4 * _EDGE_STEPS) for i in some])  # (file, x or y, point)
        xs, ys = to_lattice.transform(points[:, 0], points[:, 1])
        for index, x, y in zip(some, xs, ys, strict=True):
            if not (np.isfinite(x).all() and np.isfinite(y).all()):
                raise GridError(
                    f"{files[index].path} reaches outside the domain of {lattice.crs.name!r}; choose another CRS with --crs"
                )
            found[index] = lattice.covering((x.min(), y.min(), x.max(), y.max()))
    return [box for box in found if box is not None]


def edges(grid: Grid, steps: int) -> tuple[Any, Any]:
    """CRS coordinates (xs, ys) of `steps` points along each of the four edges of a grid."""
    rows, cols = grid.shape
    t = np.linspace(0.0, 1.0, steps)
    low, high = np.zeros(steps), np.ones(steps)
    return grid.xy(np.concatenate([t, t, low, high]) * cols, np.concatenate([low, high, t, t]) * rows)


def _tree(boxes: Sequence[Box]) -> Any:
    """A search tree over boxes of pixels."""
    import shapely

    sides = np.array([(b.col0, b.row0, b.col1, b.row1) for b in boxes], np.float64)
    return shapely.STRtree(shapely.box(*sides.T))


def _hits(tree: Any, box: Box) -> NDArray[np.intp]:
    """Indices, in order, of the boxes that touch `box`."""
    import shapely

    found: NDArray[np.intp] = np.sort(tree.query(shapely.box(box.col0, box.row0, box.col1, box.row1)))
    return found

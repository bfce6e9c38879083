"""Imagery from a STAC catalogue: search once, freeze what was found, read it on the lattice.

`search` asks an API or walks a static catalogue and puts the items into the order in which they are preferred. The answer
is a `Manifest`, which holds all that the pixels depend on: a second run reads it and asks nobody. `open_stac` reads pixels
through odc-stac in tiles fixed by the lattice; each pixel is taken whole from the first item that has a usable one there, so
that its day is the day of all its bands.

Why each item is loaded on its own grid and then carried to the lattice by `canopy.raster.warp`, and not by odc-stac's warp:
a value that means "nothing here" then has no part in its neighbours, whether it stands in one band or has to stand in all,
and an item's pixels are those that the same file gives as local imagery, bit for bit. Where an item's grid is on the lattice
nothing is resampled.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import zipfile
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray
from pyproj import CRS, Transformer
from rasterio.enums import Resampling

from canopy.errors import GridError, ImageryError, OutputError, SourceError
from canopy.grid import Box, Grid, Lattice, is_metric
from canopy.raster import Pixels, warp
from canopy.tiler.catalogue import search, search_once
from canopy.tiler.imagery import NO_DATE, ImageryInfo, edges, ground_gsd_m
from canopy.tiler.manifest import ItemRecord, Manifest
from canopy.tiler.patience import PATIENCE, Patience
from canopy.tiler.remote import AssetBands, Header, Reader, stage
from canopy.tiler.sources import StacSource, load_source

__all__ = [
    "Manifest", "Patience", "StacImagery", "StacItems", "StacSource", "load_source", "open_stac", "search", "search_once",
    "stage",
]  # fmt: skip

TILE_PX: Final = 1024
"""Side of the lattice-fixed tiles that are fetched, put together and kept: 0.6 km of NAIP, 10 km of Sentinel-2."""

GRID_TOLERANCE_PX: Final = 1e-2
"""How far a catalogue's grid may be from the file's own, at the corners."""

_EDGE_STEPS: Final = 16


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Tile:
    data: NDArray[Any]
    valid: NDArray[np.bool_]
    days: NDArray[np.int32]
    negatives: NDArray[np.int64]
    """Per item of the manifest: values below 0 after the offset, which became 0."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Scene:
    """An item on the lattice."""

    index: int
    item: ItemRecord
    box: Box
    groups: tuple[tuple[Grid, tuple[AssetBands, ...]], ...]
    """(grid, (asset, bands of its file)...) for the assets with the bands wanted."""
    offsets: tuple[float, ...]
    """Per band in the order of `groups`."""
    order: tuple[int, ...]
    """Place in `groups` of each band wanted."""


@dataclass(slots=True, kw_only=True)
class _Memory:
    tiles: OrderedDict[tuple[int, int], _Tile] = field(default_factory=OrderedDict)
    headers: dict[tuple[str, str], Header] = field(default_factory=dict)


class StacImagery:
    """The items of a manifest as one image on the lattice; made by `open_stac`. Not for use by two threads at once.

    Surface reflectance may be slightly below 0 once an offset is added; as whole numbers it is held at 0, and `negatives`
    counts how often.
    """

    def __init__(
        self, manifest: Manifest, lattice: Lattice, bands: Sequence[int | str] | None, cache: Path | None, patience: Patience
    ) -> None:
        self.manifest = manifest
        self.lattice = lattice
        self._source = manifest.source
        self._bands = self._source.bands_named(tuple(bands) if bands is not None else None)
        self.bands: tuple[int | str, ...] = tuple(band.name for band in self._bands)
        self.dtype: str = self._source.dtype
        self.value_range = self._source.value_range
        self._reader = Reader(self._source, patience)
        self._memory = _Memory()
        self._searched = _searched_box(manifest, lattice)
        self._scenes = tuple(
            scene for index, item in enumerate(manifest.items) if (scene := self._scene(index, item)) is not None
        )
        if not self._scenes:
            raise ImageryError(
                f"no item of {self._source.name} over {manifest.search.area} touches the lattice in {lattice.crs.name!r}; "
                f"choose another CRS with --crs"
            )
        self.box = Box(
            min(s.box.row0 for s in self._scenes), min(s.box.col0 for s in self._scenes),
            max(s.box.row1 for s in self._scenes), max(s.box.col1 for s in self._scenes),
        )  # fmt: skip
        native = [lattice.box_of(grid) is not None for scene in self._scenes for grid, _ in scene.groups]
        self.resampled: str = "none" if all(native) else "bilinear"
        self.sources: tuple[str, ...] = tuple(f"{s.item.collection}/{s.item.id}" for s in self._scenes)
        key = {
            "manifest": manifest.sha256, "crs": lattice.crs.to_wkt(), "gsd_m": lattice.gsd_m, "bands": list(self.bands),
            "tile_px": TILE_PX,
        }  # fmt: skip
        digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()
        self._cache = cache / digest[:32] if cache is not None else None
        self._negatives: dict[tuple[int, int], NDArray[np.int64]] = {}

    @property
    def negatives(self) -> dict[str, int]:
        """Item id -> values of usable pixels that were below 0 after the offset and became 0.

        Counted in the item's own pixels, tile by tile, in the tiles read so far.
        """
        totals = sum(self._negatives.values(), np.zeros(len(self.manifest.items), np.int64))
        return {item.id: int(n) for item, n in zip(self.manifest.items, totals, strict=True) if n}

    def read(self, box: Box) -> Pixels:
        """The pixels of `box` as (band, row, col); where no item has a usable pixel they are 0 (NaN for floats), invalid.

        Raises:
            ImageryError: the service refuses, a file is damaged or not what the manifest says.
        """
        data = np.full((len(self._bands), *box.shape), _fill(self.dtype), self.dtype)
        valid = np.zeros(box.shape, bool)
        for tile, here, there in self._tiles(box):
            data[(slice(None), *here)] = tile.data[(slice(None), *there)]
            valid[here] = tile.valid[there]
        return Pixels(data=data, valid=valid)

    def days(self, box: Box) -> NDArray[np.int32]:
        """(row, col) days since 1970-01-01 of the item each pixel came from; `NO_DATE` where unknown or invalid."""
        days = np.full(box.shape, NO_DATE, np.int32)
        for tile, here, there in self._tiles(box):
            days[here] = tile.days[there]
        return days

    def touching(self, box: Box) -> tuple[int, ...]:
        """The items that reach into `box`, by their places in the manifest."""
        return tuple(scene.index for scene in self._scenes if scene.box.intersect(box) is not None)

    def _tiles(self, box: Box) -> Iterator[tuple[_Tile, tuple[slice, slice], tuple[slice, slice]]]:
        rows = range(box.row0 // TILE_PX, (box.row1 - 1) // TILE_PX + 1)
        cols = range(box.col0 // TILE_PX, (box.col1 - 1) // TILE_PX + 1)
        for row in rows:
            for col in cols:
                whole = Box(row * TILE_PX, col * TILE_PX, (row + 1) * TILE_PX, (col + 1) * TILE_PX)
                part = whole.intersect(box)
                # Beyond the rectangle that was searched there may be items that nobody asked for.
                part = part.intersect(self.box) if part is not None else None
                if part is not None:
                    yield self._tile(row, col, whole), part.slices_in(box), part.slices_in(whole)
        # Boxes are read along rows; what one needs is kept for the one beside or below it.
        while len(self._memory.tiles) > 2 * len(rows) * len(cols):
            self._memory.tiles.popitem(last=False)

    def _tile(self, row: int, col: int, box: Box) -> _Tile:
        tiles = self._memory.tiles
        if (row, col) not in tiles:
            path = self._cache / f"r{row}_c{col}.npz" if self._cache is not None else None
            tile = _read_tile(path) if path is not None else None
            if tile is None:
                tile = self._put_together(box)
                if path is not None:
                    _write_tile(path, tile)
            tiles[row, col] = tile
            self._negatives[row, col] = tile.negatives
        tiles.move_to_end((row, col))
        return tiles[row, col]

    def _put_together(self, box: Box) -> _Tile:
        """The tile `box`: each pixel whole from the first item with a usable one."""
        data = np.full((len(self._bands), *box.shape), _fill(self.dtype), self.dtype)
        valid = np.zeros(box.shape, bool)
        days = np.full(box.shape, NO_DATE, np.int32)
        negatives = np.zeros(len(self.manifest.items), np.int64)
        inner = self.box.intersect(box)
        assert inner is not None, f"{box} lies outside {self.box}"
        needed = inner.slices_in(box)
        for scene in self._scenes:
            if scene.box.intersect(box) is None:
                continue
            pixels, negatives[scene.index] = self._scene_pixels(scene, box)
            assert pixels.data.dtype == data.dtype, f"{scene.item.id} came as {pixels.data.dtype}, not {data.dtype}"
            take = pixels.valid & ~valid
            data[:, take] = pixels.data[:, take]
            days[take] = NO_DATE if scene.item.day is None else scene.item.day
            valid |= take
            if valid[needed].all():
                break
        return _Tile(data=data, valid=valid, days=days, negatives=negatives)

    # --- one item ---

    def _scene(self, index: int, item: ItemRecord) -> _Scene | None:
        by_asset: dict[str, list[int]] = {}
        for band in self._bands:
            by_asset.setdefault(band.asset, []).append(band.index)
        by_grid: list[tuple[Grid, list[AssetBands]]] = []
        for name, indices in by_asset.items():
            grid = item.assets[name].grid
            group = next((members for known, members in by_grid if known == grid), None)
            if group is None:
                by_grid.append((grid, [(name, tuple(indices))]))
            else:
                group.append((name, tuple(indices)))
        box: Box | None = self._searched
        for grid, _ in by_grid:
            box = box.intersect(_box_of(grid, self.lattice, item.id)) if box is not None else None
        if box is None:
            return None
        places = [(name, i) for _, members in by_grid for name, indices in members for i in indices]
        names = {(band.asset, band.index): band.name for band in self._bands}
        return _Scene(
            index=index, item=item, box=box,
            groups=tuple((grid, tuple(members)) for grid, members in by_grid),
            offsets=tuple(item.offset[names[place]] for place in places),
            order=tuple(places.index((band.asset, band.index)) for band in self._bands),
        )  # fmt: skip

    def _scene_pixels(self, scene: _Scene, box: Box) -> tuple[Pixels, int]:
        """An item's pixels on a tile, and how many values its offset took below 0."""
        target = self.lattice.grid(box)
        parts: list[Pixels] = []
        below = done = 0
        for grid, members in scene.groups:
            count = sum(len(indices) for _, indices in members)
            offset = np.array(scene.offsets[done : done + count])
            done += count
            raw = self._native(scene.item, grid, members, target)
            if raw is None:
                return Pixels(data=np.zeros((len(self._bands), *box.shape), self.dtype), valid=np.zeros(box.shape, bool)), 0
            values, inside, where = raw
            usable = self._usable(values, inside)
            clear = self._clear(scene.item, where)
            if clear is not None:
                usable &= clear  # before the pixels are resampled, so that no cloud has a part in its neighbours
            shifted, dark = self._harmonised(values, usable, offset, scene.item)
            below += dark
            part = Pixels(data=shifted, valid=usable)
            if where != target:
                part = warp(part, where, target)
                if clear is not None:  # and after, since what surrounds a cloud would fill its rim
                    seen = Pixels(data=clear[None].astype(np.uint8), valid=inside)
                    nearest = warp(seen, where, target, resampling=Resampling.nearest)
                    part = Pixels(data=part.data, valid=part.valid & nearest.valid & (nearest.data[0] > 0))
            parts.append(part)
        data = np.concatenate([part.data for part in parts])[list(scene.order)]
        valid = np.logical_and.reduce([part.valid for part in parts])
        self._check_range(data, valid, scene.item)
        return Pixels(data=data, valid=valid), below

    def _native(
        self, item: ItemRecord, grid: Grid, members: Sequence[AssetBands], target: Grid
    ) -> tuple[NDArray[Any], NDArray[np.bool_], Grid] | None:
        """What `target` needs of assets with one grid; None where they have nothing.

        Returns:
            (band, row, col) values, (row, col) whether a pixel is inside the files, and where these pixels are: on `target`
            where both are on the lattice, else on the assets' own grid.
        """
        own, wanted = self.lattice.box_of(grid), self.lattice.box_of(target)
        if own is not None and wanted is not None:
            first, shape, where = (wanted.row0 - own.row0, wanted.col0 - own.col0), target.shape, target
        else:
            first, shape = _source_window(target, grid)
            where = grid.crop(*first, shape)
        row0, row1 = max(first[0], 0), min(first[0] + shape[0], grid.shape[0])
        col0, col1 = max(first[1], 0), min(first[1] + shape[1], grid.shape[1])
        if row0 >= row1 or col0 >= col1:
            return None
        headers = {name: self._checked_header(item, name) for name, _ in members}
        for name, indices in members:
            if max(indices) > headers[name].count:
                raise SourceError(
                    f"item {item.id} of {self._source.name}: asset {name} has {headers[name].count} bands, but the source "
                    f"takes band {max(indices)}; correct the source's bands"
                )
        loaded = self._reader.load(item, members, headers, grid.crop(row0, col0, (row1 - row0, col1 - col0)))
        part = (slice(row0 - first[0], row1 - first[0]), slice(col0 - first[1], col1 - first[1]))
        values, inside = np.zeros((loaded.shape[0], *shape), loaded.dtype), np.zeros(shape, bool)
        values[(slice(None), *part)], inside[part] = loaded, True
        for name, _ in members:
            if headers[name].masked:
                what = f"item {item.id}, asset {name}"
                inside[part] &= self._reader.mask(item.assets[name].href, what, (row0, col0), loaded.shape[1:])
        return values, inside, where

    def _usable(self, values: NDArray[Any], inside: NDArray[np.bool_]) -> NDArray[np.bool_]:
        """(row, col) True where a pixel is inside the files and not nodata."""
        usable = inside.copy()
        nodata = self._source.nodata
        if nodata is not None:
            empty = values == nodata
            usable &= ~(empty.any(axis=0) if self._source.nodata_when == "any" else empty.all(axis=0))
        if values.dtype.kind == "f":
            usable &= np.isfinite(values).all(axis=0)
        return usable

    def _harmonised(
        self, values: NDArray[Any], usable: NDArray[np.bool_], offset: NDArray[np.float64], item: ItemRecord
    ) -> tuple[NDArray[Any], int]:
        """Values with the offsets added, in the same data type, and how many fell below the type's least and stay there."""
        if not offset.any():
            return values, 0
        shifted = values.astype(np.float64) + offset[:, None, None]
        dtype = values.dtype
        if dtype.kind == "f":
            return shifted.astype(dtype), 0
        limits = np.iinfo(dtype)
        if (shifted[:, usable] > limits.max).any():
            raise ImageryError(
                f"item {item.id} of {self._source.name}: its offset {offset.max():g} takes values beyond {limits.max} of "
                f"{dtype}; correct the source's offset"
            )
        low = max(float(limits.min), 0.0) if self._source.value_range[0] >= 0 else float(limits.min)
        below = int((shifted[:, usable] < low).sum())
        return np.rint(np.clip(shifted, low, limits.max)).astype(dtype), below

    def _clear(self, item: ItemRecord, target: Grid) -> NDArray[np.bool_] | None:
        """(row, col) True where the cloud mask's class is a clear one, nearest neighbour; None where there is no mask."""
        name = self._source.cloud.mask_asset
        if name is None:
            return None
        raw = self._native(item, item.assets[name].grid, ((name, (1,)),), target)
        if raw is None:
            return np.zeros(target.shape, bool)
        classes, inside, where = raw
        pixels = Pixels(data=classes, valid=inside)
        if where != target:
            pixels = warp(pixels, where, target, resampling=Resampling.nearest)
        return np.asarray(pixels.valid & np.isin(pixels.data[0], self._source.cloud.clear_classes))

    def _check_range(self, data: NDArray[Any], valid: NDArray[np.bool_], item: ItemRecord) -> None:
        if self._source.in_range():
            return
        low, high = self.value_range
        bad = data[:, valid]
        bad = bad[~((bad >= low) & (bad <= high))]
        if bad.size:
            raise ImageryError(
                f"item {item.id} of {self._source.name} has a usable pixel of {bad[0]:g}, outside its value_range {low:g} "
                f"to {high:g}; correct value_range or nodata in the source, or leave the item out (exclude)"
            )

    def _checked_header(self, item: ItemRecord, name: str) -> Header:
        """The header of an asset's file, after comparing it with what the manifest says of it."""
        key = (item.id, name)
        if key in self._memory.headers:
            return self._memory.headers[key]
        asset = item.assets[name]
        header = self._reader.header(asset.href, f"item {item.id}, asset {name}")
        if not _same_grid(header.grid, asset.grid):
            raise ImageryError(
                f"item {item.id} of {self._source.name}: the catalogue places asset {name} elsewhere than its file does "
                f"({asset.crs}, {asset.shape} pixels, against {header.grid.crs.name}, {header.grid.shape}); set "
                f'grids = "files" in the source and search again'
            )
        if name != self._source.cloud.mask_asset and header.dtype != self.dtype:
            raise ImageryError(
                f"item {item.id} of {self._source.name}: asset {name} is {header.dtype}, not the {self.dtype} of its "
                f"source; correct dtype and value_range"
            )
        self._memory.headers[key] = header
        return header


def _fill(dtype: str) -> float:
    return math.nan if np.dtype(dtype).kind == "f" else 0


def _same_grid(one: Grid, other: Grid) -> bool:
    if one.shape != other.shape or not (one.crs.equals(other.crs, ignore_axis_order=True) or _same_code(one.crs, other.crs)):
        return False
    rows, cols = one.shape
    corners = [(0, 0), (cols, 0), (0, rows), (cols, rows)]
    return all(
        abs(a - b) <= GRID_TOLERANCE_PX
        for corner in corners
        for a, b in zip(other.pixel(*one.xy(*corner)), corner, strict=True)
    )


def _same_code(one: CRS, other: CRS) -> bool:
    code = one.to_epsg(min_confidence=70)
    return code is not None and code == other.to_epsg(min_confidence=70)


def _source_window(target: Grid, source: Grid) -> tuple[tuple[int, int], tuple[int, int]]:
    """First pixel (row, col) and shape of what a warp onto `target` needs of `source`; may hang over its edges."""
    to_source = Transformer.from_crs(target.crs, source.crs, always_xy=True)
    cols, rows = source.pixel(*to_source.transform(*edges(target, _EDGE_STEPS)))
    if not (np.isfinite(cols).all() and np.isfinite(rows).all()):
        raise GridError(
            f"a tile in {target.crs.name!r} leaves the domain of {source.crs.name!r}, the CRS of an item; choose another"
        )
    # The kernel reaches one source pixel, or as many as one target pixel spans.
    span = max(np.ptp(cols), np.ptp(rows)) / max(target.shape)
    margin = 2 * math.ceil(max(span, 1.0)) + 2
    first = (math.floor(rows.min()) - margin, math.floor(cols.min()) - margin)
    last = (math.ceil(rows.max()) + margin, math.ceil(cols.max()) + margin)
    return first, (last[0] - first[0], last[1] - first[1])


def _box_of(grid: Grid, lattice: Lattice, item: str) -> Box:
    """The lattice pixels that a file touches."""
    own = lattice.box_of(grid)
    if own is not None:
        return own
    to_lattice = Transformer.from_crs(grid.crs, lattice.crs, always_xy=True)
    xs, ys = to_lattice.transform(*edges(grid, 4 * _EDGE_STEPS))
    if not (np.isfinite(xs).all() and np.isfinite(ys).all()):
        raise GridError(f"item {item} reaches outside the domain of {lattice.crs.name!r}; choose another CRS with --crs")
    return lattice.covering((xs.min(), ys.min(), xs.max(), ys.max()))


def _searched_box(manifest: Manifest, lattice: Lattice) -> Box:
    """The lattice pixels in the rectangle that was searched: beyond it there may be items that nobody asked for."""
    bounds = Transformer.from_crs("EPSG:4326", lattice.crs, always_xy=True).transform_bounds(*manifest.search.bounds_deg)
    if not np.isfinite(bounds).all():
        raise GridError(
            f"the area {manifest.search.area} reaches outside the domain of {lattice.crs.name!r}; choose another --crs"
        )
    return lattice.covering(bounds)


def _read_tile(path: Path) -> _Tile | None:
    """A tile kept by an earlier run; None where there is none, or one that is damaged and has to be fetched again."""
    try:
        with np.load(path, allow_pickle=False) as kept:
            return _Tile(**{name: kept[name] for name in ("data", "valid", "days", "negatives")})
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        return None


def _write_tile(path: Path, tile: _Tile) -> None:
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with part.open("wb") as file:
            np.savez_compressed(file, data=tile.data, valid=tile.valid, days=tile.days, negatives=tile.negatives)
        part.replace(path)
    except OSError as error:
        raise OutputError(f"cannot write {path} ({error.strerror}); free disk space or choose another cache") from error
    finally:
        with suppress(OSError):
            part.unlink(missing_ok=True)


@contextmanager
def open_stac(
    manifest: Manifest,
    lattice: Lattice,
    bands: Sequence[int | str] | None = None,
    cache: Path | str | None = None,
    *,
    patience: Patience = PATIENCE,
) -> Iterator[StacImagery]:
    """The items of a manifest as imagery on `lattice`.

    Args:
        manifest: What to read; the catalogue is not asked again.
        lattice: The pixels to deliver.
        bands: Names of the source's bands, or 1-based places in its description, in the order wanted; default all.
        cache: Folder for finished tiles. A run that was stopped does not fetch again what is there.
        patience: How long the services may fail.

    Raises:
        SourceError: a band that the source does not have.
        GridError: an item cannot be carried into the lattice's CRS.
        ImageryError: no item touches the lattice.
    """
    yield StacImagery(manifest, lattice, bands, Path(cache) if cache is not None else None, patience)


class StacItems:
    """The items of a manifest as a source of imagery, for everything that takes local files as well.

    Args:
        manifest: What to read.
        cache: Folder for finished tiles; see `open_stac`.
        patience: How long the services may fail.
    """

    def __init__(self, manifest: Manifest, cache: Path | None = None, patience: Patience = PATIENCE) -> None:
        self.manifest = manifest
        self.cache, self._patience = cache, patience
        source = manifest.source
        names = tuple(band.name for band in source.band)
        grids = [(item.id, item.assets[source.band[0].asset].grid) for item in manifest.items]
        crs_wkts = [grid.crs.to_wkt() for _, grid in grids]
        # The CRS of most items; of two that share the first place, that of the preferred item.
        leading = max(range(len(grids)), key=lambda index: (crs_wkts.count(crs_wkts[index]), -index))
        sizes = [(max(grid.gsd) if is_metric(grid.crs) else ground_gsd_m(grid), item) for item, grid in grids]
        west, south, east, north = manifest.search.bounds_deg
        self.info = ImageryInfo(
            source=f"{source.name} ({len(grids)} items over {manifest.search.area})", crs=grids[leading][1].crs,
            band_count=len(names), band_names=names, dtype=source.dtype, gsd_m=min(sizes)[0],
            coarsest_gsd_m=max(sizes)[0], coarsest=f"item {max(sizes)[1]} of {source.name}",
            alpha="none", alpha_reason="a catalogue's source names the bands that are data",
            centre_lon_deg=(west + east) / 2, centre_lat_deg=(south + north) / 2,
        )  # fmt: skip

    def open(self, lattice: Lattice, bands: Sequence[int | str] | None = None) -> AbstractContextManager[StacImagery]:
        """The items on `lattice`; raises as `open_stac`."""
        return open_stac(self.manifest, lattice, bands, self.cache, patience=self._patience)

    def record(self) -> list[dict[str, Any]]:
        """Id, day and links of each item, and the digest of the manifest."""
        return [
            {
                "item": f"{item.collection}/{item.id}", "datetime": item.datetime, "manifest_sha256": self.manifest.sha256,
                "assets": {name: asset.href for name, asset in item.assets.items()},
            }
            for item in self.manifest.items
        ]  # fmt: skip

"""Headers of local images: which files there are, what their pixels and bands are, when and where they were taken.

Everything that is known of an image before its pixels are read, apart from a sample of a band tagged alpha.
"""

from __future__ import annotations

import glob
import math
import os
from collections import defaultdict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from datetime import UTC, date, datetime
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from affine import Affine
from numpy.typing import NDArray
from pyproj import CRS, Geod, Transformer
from pyproj.exceptions import ProjError

from canopy.errors import RasterError
from canopy.grid import SNAP_TOLERANCE_PX, Grid, is_metric
from canopy.raster import Raster, open_raster

NO_DATE = np.int32(np.iinfo(np.int32).min)
"""The day of a pixel that has none: its date is unknown, or there is no imagery."""

RASTER_SUFFIXES = (".tif", ".tiff", ".jpg", ".jpeg", ".png", ".jp2", ".img")
"""What a folder's images end in; its other files are left out. A VRT is opened by its name: beside its own tiles it would
be the same pixels again, and its gaps black."""

ALPHA_SAMPLE_FILES = 16
"""Of many files with an alpha band so many are looked into to tell a mask from data."""

MASK_TONES_PERCENT = 10
"""An alpha band is a mask when fewer of its pixels than these have a value between its lowest and highest: soft edges."""

MASK_TONES = 16
"""... or when it has no more different values than these: an evenly translucent layer."""

_PHASE_STEPS = 1 << 20
"""Files are of one pixel grid when their phases agree to a millionth of a pixel: hundreds of times what floats round."""

LocalPaths = str | os.PathLike[str] | Sequence[str | os.PathLike[str]]
"""A file, a folder, a pattern such as photos/**/*.tif, or a list of these."""

Band = int | str
"""A band by its 1-based index or its description."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageFile:
    """An image file's header."""

    path: Path
    grid: Grid
    """Its pixels. The pixel size is the round number that was meant when that moves no pixel by more than
    `SNAP_TOLERANCE_PX`, and the phase is rounded to 2^-20 px: files cut from one image then agree to the last bit."""
    pixel_grid: PixelGrid
    """Equal for files whose pixels are those of one larger grid."""
    origin_px: tuple[int, int]
    """(row, col) of the first pixel on that grid."""
    band_count: int
    band_names: tuple[str | None, ...]
    """Descriptions of the bands."""
    alpha_band: int | None
    """1-based index of the band tagged alpha."""
    dtype: str
    day: int
    """Days since 1970-01-01 on which the image was taken, or `NO_DATE`."""
    size_bytes: int
    modified: str
    """When the file was last written, ISO 8601 in UTC."""
    gsd_m: float = math.nan
    """Ground sampling distance in metres, as `ImageryInfo.gsd_m`."""
    centre_lon_deg: float = math.nan
    centre_lat_deg: float = math.nan

    @property
    def preference(self) -> tuple[float, int, str, str]:
        """Where files overlap, the one with the lowest of these gives the pixel."""
        return float(f"{self.gsd_m:.2g}"), -self.day, self.path.name, str(self.path)


class PixelGrid(NamedTuple):
    """A grid without ends: what files that are cut from one image have in common."""

    crs: str
    a: float
    b: float
    d: float
    e: float
    col_phase: int
    """Where the CRS's origin lies in its pixel, along the columns, in parts of 2^-20."""
    row_phase: int

    @property
    def transform(self) -> Affine:
        """Pixel (col, row) to CRS (x, y), counted from the pixel of the CRS's origin."""
        col, row = self.col_phase / _PHASE_STEPS, self.row_phase / _PHASE_STEPS
        return Affine(
            self.a, self.b, -(self.a * col + self.b * row), self.d, self.e, -(self.d * col + self.e * row)
        )  # fmt: skip


class Place(NamedTuple):
    """How fine a raster is, and where."""

    gsd_m: float
    """As in `ImageryInfo`."""
    lon_deg: float
    lat_deg: float


# --- finding the files ---------------------------------------------------------------------------------------------------


def find_files(paths: LocalPaths) -> tuple[list[Path], str, tuple[str, ...]]:
    """The files in order of their paths, each once; what to call them; the endings that were left out."""
    texts = [paths] if isinstance(paths, str | os.PathLike) else list(paths)
    if not texts:
        raise RasterError("the list of imagery is empty; name at least one file")
    found: dict[Path, Path] = {}
    left_out: set[str] = set()
    for text in texts:
        path = Path(text)
        if path.is_dir():
            inside = sorted(path.iterdir())
            images = [p for p in inside if _is_image(p)]
            left_out |= {_ending(p) for p in inside if p.is_file() and not _is_image(p)}
            remedy = f"name its files, or its sub-folders with {path / '**' / '*.tif'}"
        elif path.exists() or not glob.has_magic(os.fspath(text)):
            images, remedy = [path], ""  # a file that is not there is reported where it is opened
        else:
            inside = [Path(p) for p in sorted(glob.glob(os.fspath(text), recursive=True))]  # noqa: PTH207  Path.glob takes no absolute pattern
            # What a pattern spells out is wanted, whatever it ends in.
            images = [p for p in inside if _is_image(p) or (p.is_file() and path.suffix and p.suffix == path.suffix)]
            left_out |= {_ending(p) for p in inside if p.is_file() and p not in set(images)}
            remedy = "check the pattern"
        if not images:
            others = f", only {', '.join(sorted(left_out))}" if left_out else ""
            raise RasterError(f"{text} holds no image ({', '.join(RASTER_SUFFIXES)}){others}; {remedy}")
        # Absolute, since where two files are alike the path decides, and the folder one happens to be in may not.
        found |= {p.resolve(): p.absolute() for p in images if p.resolve() not in found}
    name = os.fspath(texts[0]) if len(texts) == 1 else f"{os.fspath(texts[0])} and {len(texts) - 1} more"
    return sorted(found.values()), name, tuple(sorted(left_out))


def _is_image(path: Path) -> bool:
    return path.suffix.lower() in RASTER_SUFFIXES and not path.name.startswith(".") and path.is_file()


def _ending(path: Path) -> str:
    return "".join(path.suffixes[-2:]) if path.name.endswith(".aux.xml") else path.suffix or path.name


# --- headers -------------------------------------------------------------------------------------------------------------


def read_headers(paths: Sequence[Path], crs_if_none: CRS | None = None) -> list[ImageFile]:
    """Read the headers of image files, several at a time.

    Args:
        paths: The files.
        crs_if_none: CRS of those that name none; one that names another is refused.

    Raises:
        RasterError: one is unreadable, cut short, without CRS or geotransform, of mixed data types or of indices of colours.
    """
    with ThreadPoolExecutor(max_workers=8, thread_name_prefix="header") as readers:
        files = list(readers.map(lambda path: _header(path, crs_if_none), paths))
    where = places([file.grid for file in files], [str(file.path) for file in files])
    return [
        replace(file, gsd_m=place.gsd_m, centre_lon_deg=place.lon_deg, centre_lat_deg=place.lat_deg)
        for file, place in zip(files, where, strict=True)
    ]


def _header(path: Path, crs_if_none: CRS | None) -> ImageFile:
    with open_raster(path) as raster:
        raster.check_complete()
        if raster.has_palette:
            raise RasterError(
                f"{path} holds indices into a colour table, not colours; expand it first, for example: "
                f"gdal_translate -expand rgb {path.name} rgb.tif"
            )
        grid, pixel_grid, origin_px = _on_pixel_grid(raster.grid_or(crs_if_none))
        status = path.stat()
        return ImageFile(
            path=path, grid=grid, pixel_grid=pixel_grid, origin_px=origin_px,
            band_count=raster.count, band_names=raster.band_names, alpha_band=raster.alpha_band, dtype=raster.dtype,
            day=_day_taken(raster), size_bytes=status.st_size,
            modified=datetime.fromtimestamp(status.st_mtime, UTC).isoformat(timespec="seconds"),
        )  # fmt: skip


def _on_pixel_grid(grid: Grid) -> tuple[Grid, PixelGrid, tuple[int, int]]:
    """The grid with the pixel size that was meant, the endless grid it is part of, and where on it: (row, col).

    Why rounded instead of compared within a tolerance: being close is not transitive, and whether two files are one image
    would depend on a third.
    """
    a, b, c, d, e, f = tuple(grid.transform)[:6]
    rows, cols = grid.shape
    if b == 0 and d == 0:
        a, e = _meant(a, cols), _meant(e, rows)
    transform = Affine(a, b, c, d, e, f)
    # The CRS's own origin in pixels of the file: its fraction is the phase, which files of one grid share.
    zero_col, zero_row = Grid(crs=grid.crs, transform=transform, shape=grid.shape).pixel(0.0, 0.0)
    col0, col_phase = divmod(round(zero_col * _PHASE_STEPS), _PHASE_STEPS)
    row0, row_phase = divmod(round(zero_row * _PHASE_STEPS), _PHASE_STEPS)
    endless = PixelGrid(grid.crs.srs, a, b, d, e, col_phase, row_phase)
    transform = endless.transform @ Affine.translation(-col0, -row0)
    return Grid(crs=grid.crs, transform=transform, shape=grid.shape), endless, (-row0, -col0)


def _meant(side: float, pixels: int) -> float:
    """A pixel side without the noise of bounds divided by a count: 0.2 for 0.19999999999963."""
    short = float(f"{side:.6g}")
    return short if abs(short - side) * pixels <= SNAP_TOLERANCE_PX * abs(side) else side


def _day_taken(raster: Raster) -> int:
    """Days since 1970-01-01, or `NO_DATE`.

    Why not TIFFTAG_DATETIME: it says when the file was written, often months after the flight.
    """
    tags = raster.tags
    stated = raster.tags_in("IMAGERY").get("ACQUISITIONDATETIME") or tags.get("ACQUISITION_DATE")
    if stated:
        try:
            return (datetime.fromisoformat(stated.strip()).date() - date(1970, 1, 1)).days
        except ValueError as error:
            raise RasterError(
                f"{raster.path} states the acquisition date {stated!r}; write it as 2020-06-18, for example: "
                f"rio edit-info --tag ACQUISITION_DATE=2020-06-18 {raster.path.name}"
            ) from error
    try:  # a camera writes blanks or zeros when its clock was never set
        taken = datetime.strptime(tags.get("EXIF_DateTimeOriginal", "")[:10], "%Y:%m:%d")  # noqa: DTZ007  a day, no moment
    except ValueError:
        return int(NO_DATE)
    return (taken.date() - date(1970, 1, 1)).days


# --- where they are ------------------------------------------------------------------------------------------------------


def places(grids: Sequence[Grid], names: Sequence[str]) -> list[Place]:
    """Centre and GSD of each grid; one transformer for all of a CRS, as making one takes longer than opening a file.

    Args:
        grids: Where the rasters are.
        names: What to call them in messages.

    Raises:
        RasterError: a CRS has no known place on Earth, or a centre lies outside its domain.
    """
    by_crs: dict[str, list[int]] = defaultdict(list)
    for index, grid in enumerate(grids):
        by_crs[grid.crs.srs].append(index)
    found: dict[int, Place] = {}
    for some in by_crs.values():
        crs = grids[some[0]].crs
        try:
            lons, lats, gsds = _on_the_ground(crs, [grids[i] for i in some])
        except ProjError as error:
            raise RasterError(
                f"{names[some[0]]} has the CRS {crs.name!r}, which has no known place on Earth; assign the right one first, "
                f"for example: rio edit-info --crs EPSG:32610 {Path(names[some[0]]).name}"
            ) from error
        metric = is_metric(crs)
        for index, lon, lat, gsd_m in zip(some, lons.tolist(), lats.tolist(), gsds.tolist(), strict=True):
            grid = grids[index]
            if not (abs(lon) <= 360 and abs(lat) <= 90):  # infinite where the CRS ends; metres in a CRS of degrees
                raise RasterError(
                    f"{names[index]}: the centre {grid.xy(grid.shape[1] / 2, grid.shape[0] / 2)} lies outside the domain of "
                    f"{crs.name!r}; assign the right CRS"
                )
            found[index] = Place(max(grid.gsd) if metric else gsd_m, lon, lat)
    return [found[index] for index in range(len(grids))]


def _on_the_ground(crs: CRS, grids: Sequence[Grid]) -> tuple[NDArray[Any], NDArray[Any], NDArray[Any]]:
    """Longitude and latitude of the centres in degrees, and the coarser side of the pixel there in metres."""
    to_degrees = Transformer.from_crs(crs, "EPSG:4326", always_xy=True)
    # The centre, its neighbour one pixel along the row and its neighbour one pixel down the column.
    steps = [(0, 0), (1, 0), (0, 1)]
    points = [g.xy(g.shape[1] / 2 + col, g.shape[0] / 2 + row) for g in grids for col, row in steps]
    lons, lats = (v.reshape(-1, 3) for v in to_degrees.transform(*np.array(points).T))
    sides = [
        Geod(ellps="WGS84").inv(lons[:, 0], lats[:, 0], lons[:, i], lats[:, i])[2]
        if (np.abs(lats) <= 90).all()
        else np.full(len(grids), math.nan)
        for i in (1, 2)
    ]
    return lons[:, 0], lats[:, 0], np.maximum(*sides)


def middle(where: Sequence[Place]) -> tuple[float, float]:
    """Longitude and latitude of the middle of all, also across the antimeridian."""
    if len(where) == 1:
        return where[0].lon_deg, where[0].lat_deg
    lon, lat = np.radians([place.lon_deg for place in where]), np.radians([place.lat_deg for place in where])
    x, y, z = (np.cos(lat) * np.cos(lon)).mean(), (np.cos(lat) * np.sin(lon)).mean(), np.sin(lat).mean()
    return math.degrees(math.atan2(y, x)), math.degrees(math.atan2(z, math.hypot(x, y)))


def leading_crs(grids: Sequence[Grid], where: Sequence[Place]) -> CRS:
    """The CRS in which most ground is covered, metric ones before others."""
    covered_m2: dict[str, float] = defaultdict(float)
    crss = {grid.crs.srs: grid.crs for grid in grids}
    for grid, place in zip(grids, where, strict=True):
        covered_m2[grid.crs.srs] += math.prod(grid.shape) * place.gsd_m**2
    return crss[max(covered_m2, key=lambda name: (is_metric(crss[name]), covered_m2[name], name))]


def ground_gsd_m(grid: Grid) -> float:
    """The coarser side of the pixel at the grid's centre, in metres on the ground."""
    return float(_on_the_ground(grid.crs, [grid])[2][0])


# --- bands ---------------------------------------------------------------------------------------------------------------


def judge_alpha(files: Sequence[ImageFile]) -> tuple[Literal["none", "mask", "data"], str]:
    """Whether bands tagged alpha are masks, by what they hold: some writers tag the fourth band so, whatever it is.

    Why one verdict for all files: a tile of nothing but water or nothing but land looks like a mask to itself alone.
    """
    tagged = sorted((file for file in files if file.alpha_band is not None), key=lambda file: file.path)
    if not tagged:
        return "none", "no band is tagged alpha"
    step = max(1, len(tagged) // ALPHA_SAMPLE_FILES)
    sampled = tagged[::step][:ALPHA_SAMPLE_FILES]
    found: dict[str, tuple[ImageFile, str]] = {}
    for file in sampled:
        with open_raster(file.path) as raster:
            values = raster.alpha_sample()
        low, high = values.min(), values.max()
        if low == high:
            continue  # a file without a hole, or without an image: it says nothing
        percent, tones = 100 * float(((values > low) & (values < high)).mean()), len(np.unique(values))
        kind = "data" if percent >= MASK_TONES_PERCENT and tones > MASK_TONES else "mask"
        found.setdefault(
            kind,
            (file, f"{percent:.1f} % of its sampled pixels lie between {low} and {high}, in {tones} different values"),
        )
    if len(found) > 1:
        (data, why), (mask, why_not) = found["data"], found["mask"]
        raise RasterError(
            f"the band tagged alpha is data in {data.path} ({why}) and a mask in {mask.path} ({why_not}); name the files "
            f"apart, or untag the data: rio edit-info --colorinterp red,green,blue,undefined {data.path.name}"
        )
    for kind, (file, why) in found.items():
        role = "data, and masks nothing" if kind == "data" else "the mask of the others"
        return ("data" if kind == "data" else "mask"), f"band {file.alpha_band} of {file.path} is {role}: {why}"
    return "mask", f"band {tagged[0].alpha_band} of {tagged[0].path} is the mask of the others: its sample is all one value"


def bands_of(file: ImageFile, bands: Sequence[Band] | None, alpha: str) -> tuple[int, ...]:
    """1-based indices, in one file, of the bands asked for."""
    if bands is None:
        return tuple(i for i in range(1, file.band_count + 1) if alpha == "data" or i != file.alpha_band)
    names = {name.casefold(): i for i, name in reversed([*enumerate(file.band_names, start=1)]) if name}
    indices = []
    for band in bands:
        index = names.get(band.strip().casefold()) if isinstance(band, str) else band
        if index is None:
            known = f"only {', '.join(name for name in file.band_names if name)}" if names else "its bands have no names"
            raise RasterError(f"{file.path} has no band {band!r}, {known}; choose others with --bands")
        if not 1 <= index <= file.band_count:
            raise RasterError(f"{file.path} has bands 1-{file.band_count}, not {band}; choose others with --bands")
        indices.append(index)
    return tuple(indices)

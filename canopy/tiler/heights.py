"""Canopy heights from rasters: a canopy height model as somebody made it, or a surface model minus a terrain model.

Both are resampled onto the lattice by the bilinear kernel of `canopy.tiler.imagery` unless their pixels already are lattice
pixels. Bilinear, because it is linear: the difference of two resampled models is the resampled difference, so crowns are
neither raised, as by a maximum, nor do models of different pixel sizes leave steps. A source finer than the lattice is
averaged over the lattice's pixel. Unknown pixels have no part in a height, which is unknown where most of its pixel is;
rasters of integers stay integers, so theirs are rounded once more.

Units. The unit of the values is what the caller says, else the unit tag of the band, else that of the vertical axis of the
CRS, else metres where the CRS is in metres. What then still looks wrong is refused rather than believed: integers of 16
bits and more without a unit (decimetres and centimetres are delivered so), values beyond any tree, and a surface below its
terrain.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
from numpy.typing import NDArray
from pyproj import CRS

from canopy.errors import GridError, RasterError
from canopy.grid import Box, Grid, Lattice
from canopy.raster import Raster, open_raster
from canopy.tiler.imagery import ImageFiles, Imagery, LocalPaths

MAX_HEIGHT_M = 120.0
"""No tree is taller; the tallest measured has 116 m."""
MAX_BELOW_GROUND_M = 2.0
"""Heights down to this far below 0 m are noise of both surfaces, set to 0 m; lower ones are wrong, set to unknown."""
MAX_IMPLAUSIBLE_SHARE = 0.001
"""Were more of the heights sampled above `MAX_HEIGHT_M`, the unit would be wrong: refused. Fewer are spikes."""
MAX_SUNKEN_SHARE = 0.1
"""Were more of the differences sampled below -`MAX_BELOW_GROUND_M`, the models would not belong together: refused."""

_UNITS_M = {
    "m": 1.0, "metre": 1.0, "meter": 1.0, "metres": 1.0, "meters": 1.0, "dm": 0.1, "cm": 0.01, "mm": 0.001,
    "decimetre": 0.1, "decimeter": 0.1, "centimetre": 0.01, "centimeter": 0.01,
    "ft": 0.3048, "foot": 0.3048, "feet": 0.3048, "international foot": 0.3048,
    "us survey foot": 1200 / 3937, "us survey feet": 1200 / 3937, "ussft": 1200 / 3937, "us-ft": 1200 / 3937,
    "ftus": 1200 / 3937,
}  # fmt: skip
_SAMPLE_PX = 128
_SAMPLES = 5
"""Units are judged by this many windows of `_SAMPLE_PX` in each direction, spread evenly over the raster."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Heights:
    """Canopy heights of a box of lattice pixels; arrays are (row, col)."""

    height_m: NDArray[np.float32]
    """Metres above ground, NaN where unknown."""
    valid: NDArray[np.bool_]
    """Where the height is known."""
    negative_set_to_0: int
    """Pixels whose height was below 0 m by no more than `MAX_BELOW_GROUND_M`."""
    too_low: int
    """Pixels lower than that, now unknown."""
    too_high: int
    """Pixels above `MAX_HEIGHT_M`, now unknown."""


class HeightSource(Protocol):
    """Canopy heights on a lattice, open for as long as its context manager is."""

    @property
    def box(self) -> Box:
        """The lattice pixels that have heights."""

    @property
    def resampled(self) -> str:
        """How the rasters' pixels became lattice pixels."""

    def read(self, box: Box) -> Heights:
        """The heights of `box`; they do not depend on the box that is asked for."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Rasters:
    box: Box
    resampled: str
    values_m: Callable[[Box], NDArray[np.float64]] = field(repr=False)
    """Heights before they are judged, NaN where unknown."""

    def read(self, box: Box) -> Heights:
        values_m = self.values_m(box)
        too_low, too_high = values_m < -MAX_BELOW_GROUND_M, values_m > MAX_HEIGHT_M
        negative = (values_m < 0) & ~too_low
        values_m[negative] = 0.0
        values_m[too_low | too_high] = math.nan
        return Heights(
            height_m=values_m.astype(np.float32),
            valid=np.isfinite(values_m),
            negative_set_to_0=int(np.count_nonzero(negative)),
            too_low=int(np.count_nonzero(too_low)),
            too_high=int(np.count_nonzero(too_high)),
        )

    def sample_m(self) -> NDArray[np.float64]:
        """Known heights from all over the raster."""
        box, found = self.box, []
        for row in _starts(box.row0, box.row1):
            for col in _starts(box.col0, box.col1):
                part = Box(row, col, row + _SAMPLE_PX, col + _SAMPLE_PX).intersect(box)
                assert part is not None, f"window at {row}, {col} misses {box}"
                values_m = self.values_m(part)
                found.append(values_m[np.isfinite(values_m)])
        return np.concatenate(found)


@contextmanager
def open_chm(paths: LocalPaths, lattice: Lattice, *, height_unit_m: float | None = None) -> Iterator[HeightSource]:
    """Open a canopy height model for reading on `lattice`.

    Args:
        paths: a raster, a folder, a pattern, or a list of these; the first band counts.
        lattice: the pixels to deliver.
        height_unit_m: metres per unit of the values, in place of what the files say: 0.1 for decimetres.

    Raises:
        RasterError: unreadable; or values that cannot be heights in the unit found.
        GridError: the rasters cannot be carried into the lattice's CRS.
    """
    files = ImageFiles(paths)
    unit_m = _unit_m(files, height_unit_m, "height_unit_m")
    with ExitStack() as stack:
        chm = stack.enter_context(files.open(lattice, (1,)))
        source = _Rasters(box=chm.box, resampled=chm.resampled, values_m=lambda box: _values_m(chm, box, unit_m))
        refuse_implausible(source.sample_m(), files.info.source, "height_unit_m")
        yield source


@contextmanager
def open_dsm_minus_dtm(
    dsm: LocalPaths,
    dtm: LocalPaths,
    lattice: Lattice,
    *,
    dsm_unit_m: float | None = None,
    dtm_unit_m: float | None = None,
) -> Iterator[HeightSource]:
    """Open a surface model and a terrain model for reading their difference on `lattice`.

    Args:
        dsm: the surface, canopy tops included, as `paths` of `open_chm`.
        dtm: the ground, in the same vertical datum; pixel size and CRS may be others.
        lattice: the pixels to deliver.
        dsm_unit_m: metres per unit of the surface's values, in place of what the files say.
        dtm_unit_m: likewise for the terrain.

    Raises:
        RasterError: unreadable; units unknown; or the two do not overlap, or do not belong together.
        GridError: a raster cannot be carried into the lattice's CRS.
    """
    surface_files, terrain_files = ImageFiles(dsm), ImageFiles(dtm)
    names = f"{surface_files.info.source} minus {terrain_files.info.source}"
    dsm_m, dtm_m = _unit_m(surface_files, dsm_unit_m, "dsm_unit_m"), _unit_m(terrain_files, dtm_unit_m, "dtm_unit_m")
    with ExitStack() as stack:
        surface = stack.enter_context(surface_files.open(lattice, (1,)))
        terrain = stack.enter_context(terrain_files.open(lattice, (1,)))
        box = surface.box.intersect(terrain.box)
        if box is None:
            raise RasterError(f"{names}: the rasters have no pixel in common; give two models of one place")
        source = _Rasters(
            box=box,
            resampled=f"surface {surface.resampled}, terrain {terrain.resampled}",
            values_m=lambda part: _values_m(surface, part, dsm_m) - _values_m(terrain, part, dtm_m),
        )
        sample_m = source.sample_m()
        if (sunken := float(np.mean(sample_m < -MAX_BELOW_GROUND_M)) if sample_m.size else 0.0) > MAX_SUNKEN_SHARE:
            raise RasterError(
                f"{names}: {sunken:.0%} of the differences are below -{MAX_BELOW_GROUND_M:g} m; are they swapped, in "
                f"different units or vertical datums? Give dsm_unit_m and dtm_unit_m, or bring them to one datum"
            )
        refuse_implausible(sample_m, names, "dsm_unit_m and dtm_unit_m")
        yield source


def read_chm(paths: LocalPaths, grid: Grid, *, height_unit_m: float | None = None) -> Heights:
    """A canopy height model on `grid`; see `open_chm`.

    Raises:
        RasterError: as `open_chm`.
        GridError: as `open_chm`; or `grid` does not lie on a lattice.
    """
    lattice, box = _lattice_of(grid)
    with open_chm(paths, lattice, height_unit_m=height_unit_m) as source:
        return source.read(box)


def dsm_minus_dtm(
    dsm: LocalPaths,
    dtm: LocalPaths,
    grid: Grid,
    *,
    dsm_unit_m: float | None = None,
    dtm_unit_m: float | None = None,
) -> Heights:
    """Surface minus terrain on `grid`; see `open_dsm_minus_dtm`.

    Raises:
        RasterError: as `open_dsm_minus_dtm`.
        GridError: as `open_dsm_minus_dtm`; or `grid` does not lie on a lattice.
    """
    lattice, box = _lattice_of(grid)
    with open_dsm_minus_dtm(dsm, dtm, lattice, dsm_unit_m=dsm_unit_m, dtm_unit_m=dtm_unit_m) as source:
        return source.read(box)


def _lattice_of(grid: Grid) -> tuple[Lattice, Box]:
    lattice = Lattice(crs=grid.crs, gsd_m=grid.gsd[0])
    box = lattice.box_of(grid)
    if box is None:
        raise GridError(
            f"grid at {grid.bounds[:2]} with GSD {grid.gsd} is not on a lattice; its edges must be multiples of its GSD "
            f"from the origin of the CRS, as those of Lattice.grid are"
        )
    return lattice, box


def _values_m(imagery: Imagery, box: Box, unit_m: float) -> NDArray[np.float64]:
    pixels = imagery.read(box)
    return np.where(pixels.valid, pixels.data[0].astype(np.float64) * unit_m, math.nan)


def _starts(start: int, stop: int) -> list[int]:
    """First pixels of the windows to sample along one axis."""
    return sorted({round(v) for v in np.linspace(start, max(start, stop - _SAMPLE_PX), _SAMPLES)})


def refuse_implausible(sample_m: NDArray[np.float64], names: str, option: str) -> None:
    """Refuse heights of which too many are higher than any tree.

    Args:
        sample_m: heights from all over, metres.
        names: what to call them in messages.
        option: what the user calls their unit, for messages.

    Raises:
        RasterError: more than `MAX_IMPLAUSIBLE_SHARE` are.
    """
    if not sample_m.size:
        return
    share = float(np.mean(sample_m > MAX_HEIGHT_M))
    if share > MAX_IMPLAUSIBLE_SHARE:
        raise RasterError(
            f"{names}: {share:.1%} of the heights are above {MAX_HEIGHT_M:g} m, the highest {sample_m.max():.0f} m; give "
            f"{option}, for example 0.3048 for feet, 0.1 for decimetres or 0.01 for centimetres"
        )


def _unit_m(files: ImageFiles, given: float | None, option: str) -> float:
    """Metres per unit of the first band by the rule in the module's docstring."""
    found = {}
    for file in files.info.files:
        with open_raster(file.path) as raster:
            found[band_unit_m(raster, given, option)] = file.path
    if len(found) > 1:
        (one, a), (other, b), *_ = found.items()
        raise RasterError(f"{a} is in units of {one:g} m and {b} of {other:g} m; convert one of them")
    return next(iter(found))


def band_unit_m(raster: Raster, given: float | None = None, option: str = "height_unit_m") -> float:
    """Metres per unit of a raster's first band by the rule in the module's docstring.

    Args:
        raster: the raster.
        given: what the user says it is, or None.
        option: what the user calls that, for messages.

    Raises:
        RasterError: the unit is not known, or `given` is no length.
    """
    if given is not None:
        if not (math.isfinite(given) and given > 0):
            raise RasterError(f"{option} = {given} must be a finite number above 0; give metres per unit")
        return given
    return unit_m_of(raster.units[0], raster.grid.crs, raster.dtype, f"{raster.path}", option)


def unit_m_of(tag: str | None, crs: CRS, dtype: str, name: str, option: str) -> float:
    """Metres per unit of heights by the rule in the module's docstring.

    Args:
        tag: the band's unit.
        crs: the CRS of the raster.
        dtype: the data type of the values.
        name: what to call the raster in messages.
        option: what the user calls a unit that is given, for messages.

    Raises:
        RasterError: the unit is not known.
    """
    if tag:
        if (known := _UNITS_M.get(tag.strip().lower())) is None:
            raise RasterError(f"{name}: unit {tag!r} of the values is not known; give {option}, 1 for metres")
        return known
    for part in crs.sub_crs_list if crs.is_compound else [crs]:
        for axis in part.axis_info:
            if axis.direction in ("up", "down"):
                return float(axis.unit_conversion_factor)
    if np.dtype(dtype).kind in "iu" and np.dtype(dtype).itemsize > 1:
        raise RasterError(
            f"{name} holds heights as {dtype} and names no unit, which may be metres, decimetres or centimetres; "
            f"give {option}, 1, 0.1 or 0.01"
        )
    plane = crs.sub_crs_list[0] if crs.is_compound else crs
    plane = plane.source_crs if plane.is_bound and plane.source_crs is not None else plane
    if plane.is_projected and not math.isclose(plane.axis_info[0].unit_conversion_factor, 1.0):
        raise RasterError(
            f"{name}: neither the band nor the CRS {plane.name!r} names the unit of the values, and the CRS is not in "
            f"metres; give {option}, 1 for metres or 0.3048 for feet"
        )
    return 1.0

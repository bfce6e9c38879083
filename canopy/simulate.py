"""A forest whose heights are known: terrain, trees, the LiDAR returns from them and an aerial photograph of them.

A scene is built in metres on a local frame, `row_m` south and `col_m` east of a corner that lies `MARGIN_M` outside the
grid, so that trees beyond the edge cast their shadows into the picture. Trees are solids of revolution with lobed
outlines; the canopy is their maximum. The photograph is rendered above the GSD of the grid (`_oversample`) and
comes down to it through the optics: nothing in it depends on height except through what height does in life, that is
crown size, illuminated slopes, cast shadows and lean.

Reflectances and irradiances are linear and relative; the three values are always (red, green, blue).
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
from numba import njit
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, model_validator
from scipy import ndimage

from canopy.errors import CanopyError, GridError, OutputError
from canopy.grid import Grid, is_metric

Float32 = NDArray[np.float32]
"""Shorthand; shapes are given where it is used."""

MARGIN_M = 32.0
"""How far the simulated forest reaches beyond the grid: the shadow of a 32 m tree with the sun at 45 degrees."""

FINEST_STEP_M = 0.35
"""The renderer's sampling step is at most this; finer adds cost, and no detail that a 0.5 m image could resolve."""

NATURAL, ROAD, PATH, WATER = 0, 1, 2, 3
"""Values of `Scene.cover`."""

NOT_A_CROWN = -1

CONE_EXPONENT = 1.2
"""Conifer crowns fall as (r / radius)**1.2 from the top, between a cone and a paraboloid."""


# --- configuration -------------------------------------------------------------------------------------------------------


class Conditions(BaseModel):
    """Light, season, view and sensor of one photograph."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    sun_azimuth_deg: float = Field(default=150.0, ge=0, le=360)
    """Clockwise from grid north to the sun."""
    sun_elevation_deg: float = Field(default=48.0, ge=10, le=90)
    view_zenith_deg: float = Field(default=0.0, ge=0, le=30)
    """Trees lean away from the camera by height * tan(this); 0 is a true orthophoto."""
    view_azimuth_deg: float = Field(default=0.0, ge=0, le=360)
    """Direction in which the tree tops are displaced, clockwise from grid north."""
    haze: float = Field(default=0.15, ge=0, le=1)
    """Strength of the airlight added by the atmosphere."""
    dryness: float = Field(default=0.45, ge=0, le=1)
    """Share of the grass that has turned to straw."""
    bare_soil: float = Field(default=0.2, ge=0, le=1)
    """Share of the open ground without a cover of grass."""
    autumn: float = Field(default=0.0, ge=0, le=1)
    """Share of the broadleaved trees in autumn colours."""
    soil: tuple[float, float, float] = (0.30, 0.235, 0.165)
    """Reflectance of bare soil."""
    foliage: tuple[float, float, float] = (1.0, 1.0, 1.0)
    """Factors on the reflectance of all leaves: the flora and the film of this scene."""
    warmth: float = Field(default=0.0, ge=-0.3, le=0.3)
    """White balance error; positive is red."""
    exposure: float = Field(default=0.8, gt=0, le=1.2)
    """Where the 99th percentile of the green radiance falls on the sensor's scale of 0 to 1; brighter than 1 saturates."""
    gamma: float = Field(default=2.1, ge=1, le=3)
    """Digital number = 255 * signal**(1 / gamma)."""
    blur_px: float = Field(default=0.55, ge=0, le=3)
    """Standard deviation of the optics' point spread, in pixels of the image."""
    sharpen: float = Field(default=0.2, ge=0, le=2)
    """Unsharp mask of the image supplier."""
    noise_dn: float = Field(default=1.5, ge=0, le=20)
    """Standard deviation of the sensor noise at mid grey, in digital numbers."""

    @classmethod
    def random(cls, rng: np.random.Generator) -> Self:
        """Conditions as they differ between flights: summer noon in the desert to hazy autumn afternoon."""
        soils = ((0.30, 0.235, 0.165), (0.34, 0.20, 0.13), (0.46, 0.42, 0.34), (0.17, 0.125, 0.085), (0.24, 0.21, 0.17))
        return cls(
            sun_azimuth_deg=float(rng.uniform(80, 280)),
            sun_elevation_deg=float(rng.uniform(30, 68)),
            view_zenith_deg=float(np.clip(abs(rng.normal(0, 3.5)), 0, 9)),
            view_azimuth_deg=float(rng.uniform(0, 360)),
            haze=float(rng.beta(1.4, 4.0)),
            dryness=float(rng.beta(1.2, 1.2)),
            bare_soil=float(rng.beta(1.2, 2.5)),
            autumn=float(rng.choice([0.0, 0.0, 0.0, 0.0, 0.08, 0.5]) * rng.uniform(0.3, 1)),
            soil=_scaled(soils[int(rng.integers(len(soils)))], rng, 0.12),
            foliage=_scaled((1.0, 1.0, 1.0), rng, 0.12),
            warmth=float(np.clip(rng.normal(0, 0.05), -0.15, 0.15)),
            exposure=float(rng.uniform(0.5, 1.0)),
            gamma=float(rng.uniform(1.7, 2.4)),
            blur_px=float(rng.uniform(0.35, 0.95)),
            sharpen=float(rng.uniform(0, 0.6)),
            noise_dn=float(rng.uniform(0.7, 3.5)),
        )


class ForestConfig(BaseModel):
    """What grows on the scene, on what terrain, and how it is surveyed."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    cover: float = Field(default=0.6, ge=0, le=1)
    """Share of the scene inside stands (their gaps included); outside are meadows with single trees."""
    stand_size_m: float = Field(default=220.0, gt=0)
    """Wavelength of the pattern of stands and meadows."""
    gaps: float = Field(default=0.12, ge=0, le=1)
    """Share of a stand that is gaps."""
    conifer_share: float = Field(default=0.4, ge=0, le=1)
    stand_height_low_m: float = Field(default=8.0, ge=2, le=80)
    """Dominant height of the youngest stands."""
    stand_height_high_m: float = Field(default=32.0, ge=2, le=80)
    """Dominant height of the oldest stands."""
    spread: float = Field(default=0.16, ge=0, le=0.6)
    """Standard deviation of the log height of the dominant trees of a stand, whose tails end at twice this."""
    crown_width: float = Field(default=1.0, ge=0.5, le=2)
    """Factor on all crown radii: floras differ in it."""
    spacing: float = Field(default=0.68, ge=0.3, le=3)
    """Least distance between two stems over the sum of their crown radii: below 1 crowns interlock."""
    lone_trees_per_ha: float = Field(default=4.0, ge=0)
    shrub_cover: float = Field(default=0.06, ge=0, le=1)
    """Share of the open ground, about, that is shrubs of 0.3 to 3 m."""
    crown_relief: float = Field(default=1.0, ge=0, le=2)
    """How lobed and lumpy the crowns are; 0 gives exact solids of revolution."""
    terrain_relief_m: float = Field(default=12.0, ge=0)
    """Standard deviation of the terrain."""
    terrain_slope: float = Field(default=0.04, ge=0, le=1)
    """Mean slope in m/m, in a direction drawn from the seed."""
    roads: int = Field(default=1, ge=0, le=10)
    paths: int = Field(default=2, ge=0, le=10)
    ponds: int = Field(default=1, ge=0, le=10)
    pulses_per_m2: float = Field(default=6.0, gt=0)
    """LiDAR pulses; a forest gives about 1.4 returns per pulse."""
    lidar_noise_m: float = Field(default=0.03, ge=0)
    """Standard deviation of the vertical error of a return."""
    classified: bool = True
    """Ground returns are class 2, others 1; when False all are 0, never classified."""
    conditions: Conditions = Conditions()

    @model_validator(mode="after")
    def _low_below_high(self) -> Self:
        if self.stand_height_low_m > self.stand_height_high_m:
            raise ValueError(
                f"stand_height_low_m {self.stand_height_low_m} exceeds stand_height_high_m {self.stand_height_high_m}; "
                f"swap them"
            )
        return self

    @classmethod
    def random(cls, rng: np.random.Generator) -> Self:
        """A forest and conditions of its own, for training sites that differ."""
        low_m = float(rng.uniform(3, 20))
        forest = cls(
            cover=float(rng.beta(2.2, 0.8)),
            stand_size_m=float(rng.uniform(90, 400)),
            gaps=float(rng.uniform(0.02, 0.3)),
            conifer_share=float(rng.beta(0.7, 0.7)),
            stand_height_low_m=low_m,
            stand_height_high_m=low_m + float(rng.uniform(4, 28)),
            spread=float(rng.uniform(0.08, 0.28)),
            crown_width=float(rng.uniform(0.8, 1.3)),
            spacing=float(rng.choice([rng.uniform(0.58, 0.8), rng.uniform(0.8, 1.5)], p=[0.75, 0.25])),
            lone_trees_per_ha=float(rng.exponential(4.0)),
            shrub_cover=float(rng.beta(1, 8)),
            crown_relief=float(rng.uniform(0.7, 1.4)),
            terrain_relief_m=float(rng.exponential(10.0)),
            terrain_slope=float(rng.beta(1, 8)),
            roads=int(rng.integers(0, 3)),
            paths=int(rng.integers(0, 4)),
            ponds=int(rng.integers(0, 3)),
            conditions=Conditions.random(rng),
        )
        # A quarter of the forests is old growth: trees of 40 to 70 m, of which the real training sites have hardly any.
        if rng.random() < 0.25:
            stretch = float(rng.uniform(1.2, 1.7))
            low_m, high_m = (min(h * stretch, 60.0) for h in (forest.stand_height_low_m, forest.stand_height_high_m))
            forest = forest.model_copy(update={"stand_height_low_m": low_m, "stand_height_high_m": high_m})
        return forest


def _scaled(rgb: tuple[float, float, float], rng: np.random.Generator, sigma: float) -> tuple[float, float, float]:
    """A colour brighter or darker as a whole by `sigma` (log), each band by a quarter of that on its own."""
    factor = np.exp(rng.normal(0, sigma) + rng.normal(0, sigma / 4, 3))
    red, green, blue = (np.asarray(rgb) * factor).tolist()
    return red, green, blue


# --- values --------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Trees:
    """Trees and shrubs, one value per tree; a crown is a solid of revolution around its stem."""

    x: NDArray[np.float64]
    """Stem, in the CRS of the scene."""
    y: NDArray[np.float64]
    height_m: Float32
    """Top of the crown above the ground at the stem."""
    radius_m: Float32
    depth_m: Float32
    """Fall of the upper crown surface from the top to the edge, less than `height_m`."""
    base_m: Float32
    """Height of the lowest leaves, at most `height_m - depth_m`."""
    conifer: NDArray[np.bool_]
    """Cone-like when True, else half an ellipsoid."""
    reflectance: Float32
    """(tree, 3) of the leaves."""
    phase: Float32
    """Turns the lobes of the outline, radians."""

    def __post_init__(self) -> None:
        count = len(self.x)
        for name in ("y", "height_m", "radius_m", "depth_m", "base_m", "conifer", "phase"):
            assert getattr(self, name).shape == (count,), f"{name} has shape {getattr(self, name).shape}, not ({count},)"
        assert self.reflectance.shape == (count, 3), f"reflectance has shape {self.reflectance.shape}, not ({count}, 3)"

    def __len__(self) -> int:
        return len(self.x)

    def take(self, index: NDArray[Any]) -> Trees:
        """The trees at `index`, in that order."""
        return Trees(**{name: getattr(self, name)[index] for name in self.__slots__})


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Points:
    """LiDAR returns in the order of the scan, one value per return."""

    x: NDArray[np.float64]
    y: NDArray[np.float64]
    z: NDArray[np.float64]
    """Absolute height, m, in the vertical datum of `Scene.ground_m`."""
    classification: NDArray[np.uint8]
    """ASPRS: 1 unclassified (vegetation here), 2 ground, 0 never classified."""
    return_number: NDArray[np.uint8]
    """From 1."""
    number_of_returns: NDArray[np.uint8]
    """Of the pulse that this return belongs to."""

    def __len__(self) -> int:
        return len(self.x)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Scene:
    """A simulated site: what is there, and what a camera and a LiDAR see of it."""

    grid: Grid
    image: NDArray[np.uint8]
    """(3, row, col): red, green, blue."""
    height_m: Float32
    """(row, col) canopy height at the pixel centres, 0 in the open."""
    ground_m: Float32
    """(row, col) terrain at the pixel centres."""
    cover: NDArray[np.uint8]
    """(row, col) ground under the canopy: NATURAL, ROAD, PATH or WATER."""
    points: Points
    trees: Trees
    """Every tree that touches the simulated area, those in the margin around the grid included."""


# --- gradient noise ------------------------------------------------------------------------------------------------------

_GRADIENTS = np.array([(math.cos(k * math.pi / 8), math.sin(k * math.pi / 8)) for k in range(16)])


@njit(cache=True)
def _gradient(i: int, j: int, dy: float, dx: float, seed: int) -> float:
    """Dot product of (dy, dx) with the gradient of lattice node (i, j): one of 16, chosen by an integer hash."""
    h = (i * 374761393 + j * 668265263 + seed * 1442695041) & 0xFFFFFFFF
    h = ((h ^ (h >> 13)) * 1274126177) & 0xFFFFFFFF
    k = (h ^ (h >> 16)) & 15
    return _GRADIENTS[k, 0] * dy + _GRADIENTS[k, 1] * dx  # type: ignore[no-any-return]


@njit(cache=True)
def _noise(y: float, x: float, seed: int) -> float:
    """Perlin's gradient noise with his quintic fade (Perlin 2002); wavelength 1, standard deviation about 0.25."""
    i, j = math.floor(y), math.floor(x)
    dy, dx = y - i, x - j
    fy, fx = dy * dy * dy * (dy * (dy * 6 - 15) + 10), dx * dx * dx * (dx * (dx * 6 - 15) + 10)
    top = _gradient(i, j, dy, dx, seed) * (1 - fx) + _gradient(i, j + 1, dy, dx - 1, seed) * fx
    low = _gradient(i + 1, j, dy - 1, dx, seed) * (1 - fx) + _gradient(i + 1, j + 1, dy - 1, dx - 1, seed) * fx
    return top * (1 - fy) + low * fy


@njit(cache=True)
def _octaves(y: float, x: float, octaves: int, seed: int) -> float:
    """Noise of wavelengths 1, 1/2, 1/4..., each half as strong, standard deviation about 1."""
    total, power, size, scale = 0.0, 0.0, 1.0, 1.0
    for k in range(octaves):
        # Octaves are turned against each other: the lattice of one does not show through the next.
        total += size * _noise(scale * (0.8 * y - 0.6 * x) + 17.3 * k, scale * (0.6 * y + 0.8 * x) - 9.1 * k, seed + k)
        power += size * size
        size, scale = size * 0.5, scale * 2.0
    return 4.0 * total / math.sqrt(power)


@njit(cache=True)
def _field(rows: int, cols: int, step_m: float, wavelength_m: float, octaves: int, seed: int) -> NDArray[Any]:
    """Noise at the pixel centres of a local raster, (row, col) float32."""
    out = np.empty((rows, cols), np.float32)
    for r in range(rows):
        for c in range(cols):
            out[r, c] = _octaves((r + 0.5) * step_m / wavelength_m, (c + 0.5) * step_m / wavelength_m, octaves, seed)
    return out


@njit(cache=True)
def _field_at(row_m: NDArray[Any], col_m: NDArray[Any], wavelength_m: float, octaves: int, seed: int) -> NDArray[np.float64]:
    """The same noise at points."""
    out = np.empty(len(row_m))
    for k in range(len(row_m)):
        out[k] = _octaves(row_m[k] / wavelength_m, col_m[k] / wavelength_m, octaves, seed)
    return out


def _seed(rng: np.random.Generator) -> int:
    """A seed for the noise above."""
    return int(rng.integers(2**31))


# --- the local frame -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class _Frame:
    """The square raster, `margin_px` wider than the grid on each side, on which a scene is simulated."""

    rows: int
    cols: int
    step_m: float
    margin_px: int

    @property
    def size_m(self) -> tuple[float, float]:
        return self.rows * self.step_m, self.cols * self.step_m

    def field(self, rng: np.random.Generator, wavelength_m: float, octaves: int) -> NDArray[Any]:
        """Noise of a new seed over the frame."""
        return _field(self.rows, self.cols, self.step_m, wavelength_m, octaves, _seed(rng))


def _oversample(gsd_m: float) -> int:
    """Samples of the renderer along one side of a pixel."""
    return max(1, math.ceil(gsd_m / FINEST_STEP_M))


def _gsd_m(grid: Grid) -> float:
    """The GSD of a grid that a scene can be simulated on: north-up, square, metres."""
    a, b, _, d, e, _ = tuple(grid.transform)[:6]
    if not is_metric(grid.crs):
        raise GridError(f"CRS {grid.crs.name!r} is not projected in metres; simulate in a UTM zone, for example EPSG:32610")
    if b != 0 or d != 0 or a <= 0 or not math.isclose(a, -e, rel_tol=1e-9):
        raise GridError(f"transform {(a, b, d, e)} is not north-up with square pixels; simulate on Lattice.grid(box)")
    if not 0.05 <= a <= 3.0:
        raise GridError(f"GSD {a} m is outside 0.05 to 3 m, where single crowns can be drawn; simulate at 0.6 m")
    return float(a)


# --- the canopy ----------------------------------------------------------------------------------------------------------


@njit(cache=True)
def _stamp(
    row_m: NDArray[Any],
    col_m: NDArray[Any],
    top_m: NDArray[Any],
    radius_m: NDArray[Any],
    depth_m: NDArray[Any],
    base_m: NDArray[Any],
    conifer: NDArray[Any],
    phase: NDArray[Any],
    relief: float,
    seed: int,
    rows: int,
    cols: int,
    step_m: float,
) -> tuple[NDArray[Any], NDArray[Any], NDArray[Any]]:
    """Maximum of the crown surfaces, the crown base under it and the index of its tree, each (row, col).

    The relief is noise fixed in space, not in the pixel, so the renderer's fine raster and the truth sample one surface.
    """
    height = np.zeros((rows, cols), np.float32)
    base = np.zeros((rows, cols), np.float32)
    crown = np.full((rows, cols), NOT_A_CROWN, np.int32)
    for k in range(len(row_m)):
        reach = radius_m[k] * (1 + 0.3 * relief)
        # Branches of a conifer; leaf masses of a broadleaved tree, larger in larger crowns.
        wave = 1.2 if conifer[k] else 1.1 + 0.33 * radius_m[k]
        lump = relief * min(0.13 * radius_m[k] + 0.08, 0.9) * (0.55 if conifer[k] else 1.0) * min(1.0, top_m[k] / 4)
        for r in range(max(0, int((row_m[k] - reach) / step_m)), min(rows, int((row_m[k] + reach) / step_m) + 1)):
            for c in range(max(0, int((col_m[k] - reach) / step_m)), min(cols, int((col_m[k] + reach) / step_m) + 1)):
                y, x = (r + 0.5) * step_m, (c + 0.5) * step_m
                dy, dx = y - row_m[k], x - col_m[k]
                distance = math.sqrt(dy * dy + dx * dx)
                if distance >= reach:
                    continue
                t = math.atan2(dy, dx)
                p = phase[k]
                lobes = 0.08 * math.sin(2 * t + p) + 0.07 * math.sin(3 * t - 2 * p) + 0.05 * math.sin(5 * t + 3 * p)
                q = distance / (radius_m[k] * (1 + relief * lobes))
                rough = 0.0
                if relief > 0:
                    rough = _octaves(y / wave + 0.31 * p, x / wave, 3, seed)
                    q *= 1 + 0.10 * relief * rough
                if q >= 1:
                    continue
                fall = q**CONE_EXPONENT if conifer[k] else 1 - math.sqrt(1 - q * q)
                z = np.float32(max(top_m[k] - depth_m[k] * fall + lump * rough, 0.05))
                # Ties go to the taller tree, so that the order of the trees does not matter.
                old = crown[r, c]
                if z > height[r, c] or (z == height[r, c] and old >= 0 and top_m[k] > top_m[old]):
                    height[r, c], base[r, c], crown[r, c] = z, min(base_m[k], 0.8 * z), k
    return height, base, crown


def _stamped(
    trees: Trees, grid: Grid, frame: _Frame, *, relief: float, seed: int
) -> tuple[Float32, Float32, NDArray[np.int32]]:
    """`_stamp` for trees in the CRS of `grid`."""
    margin_m = frame.margin_px * frame.step_m
    left, _, _, top = grid.bounds
    return _stamp(
        top - trees.y + margin_m,
        trees.x - left + margin_m,
        trees.height_m,
        trees.radius_m,
        trees.depth_m,
        trees.base_m,
        trees.conifer,
        trees.phase,
        relief,
        seed,
        frame.rows,
        frame.cols,
        frame.step_m,
    )


def canopy_height(trees: Trees, grid: Grid) -> Float32:
    """Maximum of the crown surfaces at the pixel centres of `grid`, without relief.

    A crown of height H, radius R and depth D is H - D (r/R)**1.2 (conifer) or H - D (1 - sqrt(1 - (r/R)**2)) at
    distance r < R from its stem, the upper half of an ellipsoid.

    Args:
        trees: In the CRS of `grid`.
        grid: North-up, square pixels, metres.

    Returns:
        (row, col) float32, m; 0 where there is no crown. The order of the trees does not matter.

    Raises:
        GridError: The grid is not metric, not north-up or not square.
    """
    frame = _Frame(rows=grid.shape[0], cols=grid.shape[1], step_m=_gsd_m(grid), margin_px=0)
    return _stamped(trees, grid, frame, relief=0.0, seed=0)[0]


@njit(cache=True)
def _thin(
    row_m: NDArray[Any], col_m: NDArray[Any], radius_m: NDArray[Any], spacing: float, size_row_m: float, size_col_m: float
) -> NDArray[np.bool_]:
    """Which candidates stand: each, in order, unless nearer than spacing * (sum of radii) to one that already stands."""
    cell_m = 4.0
    rows, cols = int(size_row_m / cell_m) + 1, int(size_col_m / cell_m) + 1
    first = np.full((rows, cols), -1, np.int64)
    following = np.full(len(row_m), -1, np.int64)
    largest = radius_m.max() if len(radius_m) else 0.0
    stands = np.zeros(len(row_m), np.bool_)
    for k in range(len(row_m)):
        r, c = int(row_m[k] / cell_m), int(col_m[k] / cell_m)
        reach = int(spacing * (radius_m[k] + largest) / cell_m) + 1
        free = True
        for i in range(max(0, r - reach), min(rows, r + reach + 1)):
            for j in range(max(0, c - reach), min(cols, c + reach + 1)):
                other = first[i, j]
                while free and other >= 0:
                    apart = (row_m[k] - row_m[other]) ** 2 + (col_m[k] - col_m[other]) ** 2
                    free = apart >= (spacing * (radius_m[k] + radius_m[other])) ** 2
                    other = following[other]
        if free:
            stands[k] = True
            following[k] = first[r, c]
            first[r, c] = k
    return stands


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Plants:
    """Stems on the local frame before they get leaves; sorted tallest first."""

    row_m: NDArray[np.float64]
    col_m: NDArray[np.float64]
    height_m: NDArray[np.float64]
    radius_m: NDArray[np.float64]
    conifer: NDArray[np.bool_]

    def take(self, index: NDArray[Any]) -> _Plants:
        return _Plants(**{name: getattr(self, name)[index] for name in self.__slots__})


def _share_threshold(rng_seed: int, frame: _Frame, wavelength_m: float, octaves: int, share: float) -> float:
    """The value that `share` of a noise field over the frame exceeds."""
    step_m = max(frame.step_m, min(wavelength_m / 8, min(frame.size_m) / 16))
    rows, cols = (max(1, int(s / step_m)) for s in frame.size_m)
    return float(np.quantile(_field(rows, cols, step_m, wavelength_m, octaves, rng_seed), 1 - share))


def _tree_stems(config: ForestConfig, frame: _Frame, rng: np.random.Generator) -> _Plants:
    """Candidates where stands and meadows let them grow, thinned by competition from the tallest down."""
    rows_m, cols_m = frame.size_m
    count = int(0.33 * rows_m * cols_m)
    row_m, col_m = rng.uniform(0, rows_m, count), rng.uniform(0, cols_m, count)
    stand_seed, gap_seed, age_seed, kind_seed = (_seed(rng) for _ in range(4))
    stand = _field_at(row_m, col_m, config.stand_size_m, 4, stand_seed)
    edge = _share_threshold(stand_seed, frame, config.stand_size_m, 4, config.cover)
    in_gap = _field_at(row_m, col_m, 26.0, 2, gap_seed) > _share_threshold(gap_seed, frame, 26.0, 2, config.gaps)
    in_stand = (stand > edge if 0 < config.cover < 1 else np.full(count, config.cover == 1)) & ~in_gap
    lone = ~in_stand & (rng.uniform(size=count) < config.lone_trees_per_ha / 1e4 * rows_m * cols_m / count)
    age = _field_at(row_m, col_m, config.stand_size_m * 0.7, 2, age_seed)
    age = 1 / (1 + np.exp(-1.8 * age))
    dominant_m = config.stand_height_low_m + age * (config.stand_height_high_m - config.stand_height_low_m)
    dominant_m = np.where(lone, dominant_m * rng.uniform(0.35, 1.0, count), dominant_m)
    suppressed = np.where(rng.uniform(size=count) < 0.35, rng.uniform(0.3, 0.9, count), 1.0)
    height_m = np.maximum(dominant_m * suppressed * np.exp(config.spread * np.clip(rng.normal(0, 1, count), -2, 2)), 1.5)
    kind = _field_at(row_m, col_m, config.stand_size_m * 0.5, 3, kind_seed) + rng.normal(0, 0.5, count)
    conifer = kind > np.quantile(kind, 1 - config.conifer_share)
    if config.conifer_share in (0.0, 1.0):
        conifer = np.full(count, config.conifer_share == 1.0)
    # Crown radius against height as in stand-grown trees: 2.9 m at 25 m for conifers, 4.3 m for broadleaved trees; in the
    # open a crown is half as wide again.
    radius_m = np.where(conifer, 0.8 + 0.085 * height_m, 0.8 + 0.14 * height_m)
    radius_m = config.crown_width * radius_m * np.exp(rng.normal(0, 0.15, count)) * np.where(lone, 1.4, 1.0)
    plants = _Plants(row_m=row_m, col_m=col_m, height_m=height_m, radius_m=radius_m, conifer=conifer)
    plants = plants.take(np.flatnonzero(in_stand | lone))
    plants = plants.take(np.argsort(-plants.height_m, kind="stable"))
    return plants.take(np.flatnonzero(_thin(plants.row_m, plants.col_m, plants.radius_m, config.spacing, rows_m, cols_m)))


def _shrub_stems(config: ForestConfig, frame: _Frame, rng: np.random.Generator) -> _Plants:
    """Shrubs in patches."""
    rows_m, cols_m = frame.size_m
    count = int(0.12 * rows_m * cols_m)
    row_m, col_m = rng.uniform(0, rows_m, count), rng.uniform(0, cols_m, count)
    seed = _seed(rng)
    patch = _field_at(row_m, col_m, 35.0, 3, seed) + rng.normal(0, 0.6, count)
    # A mean shrub covers about 2.5 m2, so 0.4 stems per m2 would close the cover.
    wanted = min(1.0, config.shrub_cover * 0.4 / 0.12)
    grows = patch > np.quantile(patch, 1 - wanted) if 0 < wanted < 1 else np.full(count, wanted == 1)
    height_m = np.clip(rng.lognormal(-0.1, 0.5, count), 0.3, 3.0)
    radius_m = height_m * rng.uniform(0.5, 1.1, count)
    conifer = np.zeros(count, np.bool_)
    plants = _Plants(row_m=row_m, col_m=col_m, height_m=height_m, radius_m=radius_m, conifer=conifer)
    return plants.take(np.flatnonzero(grows))


BROADLEAF = ((0.060, 0.100, 0.030), (0.048, 0.085, 0.033), (0.085, 0.120, 0.036), (0.066, 0.092, 0.045))
CONIFER = ((0.034, 0.056, 0.030), (0.045, 0.064, 0.030), (0.038, 0.060, 0.037), (0.062, 0.074, 0.034))
AUTUMN = ((0.200, 0.155, 0.030), (0.190, 0.090, 0.030), (0.150, 0.060, 0.030), (0.120, 0.090, 0.040))
SNAG = (0.145, 0.130, 0.115)
"""Reflectances of the leaves of a few species of each kind, and of a dead crown."""


def _foliage(
    row_m: NDArray[Any], col_m: NDArray[Any], conifer: NDArray[np.bool_], conditions: Conditions, rng: np.random.Generator
) -> Float32:
    """Reflectance of each crown, (tree, 3): species in patches, individuals around the species. No height goes in."""
    count = len(row_m)
    species = _field_at(row_m, col_m, 120.0, 2, _seed(rng)) + rng.normal(0, 0.6, count)
    rank = np.digitize(species, (-0.9, 0.0, 0.9))
    order = [rng.permutation(4) for _ in range(3)]
    broadleaf, needles, turned = (
        np.asarray(kind)[shuffled][rank] for kind, shuffled in zip((BROADLEAF, CONIFER, AUTUMN), order, strict=True)
    )
    leaves = np.where(conifer[:, None], needles, broadleaf)
    turns = ~conifer & (rng.uniform(size=count) < conditions.autumn)
    leaves = np.where(turns[:, None], turned * rng.uniform(0.5, 1, (count, 1)) + 0.3 * leaves, leaves)
    leaves = leaves * np.asarray(conditions.foliage)
    vigour = np.exp(rng.normal(0, 0.17, (count, 1)) + rng.normal(0, 0.04, (count, 3)))
    # Yellower and bluer individuals of one species.
    yellow = rng.normal(0, 0.09, (count, 1)) * np.array([1.0, 0.25, -0.8])
    leaves = np.where((rng.uniform(size=count) < 0.004)[:, None], SNAG, leaves * vigour * (1 + yellow))
    return np.clip(leaves, 0.005, 0.7).astype(np.float32)


def _grow(config: ForestConfig, grid: Grid, frame: _Frame, cover: NDArray[np.uint8], rng: np.random.Generator) -> Trees:
    """All trees and shrubs of a scene; none reaches over a road or over water."""
    stems_rng, shrubs_rng, shape_rng, leaf_rng = rng.spawn(4)
    trees, shrubs = _tree_stems(config, frame, stems_rng), _shrub_stems(config, frame, shrubs_rng)
    plants = _Plants(**{name: np.concatenate([getattr(trees, name), getattr(shrubs, name)]) for name in _Plants.__slots__})
    # A coarse distance map will do: it is only asked to within a metre, which is added to the clearance.
    stride = max(1, round(1.0 / frame.step_m))
    coarse_m = frame.step_m * stride
    where = (
        np.minimum((plants.row_m / coarse_m).astype(int), (frame.rows - 1) // stride),
        np.minimum((plants.col_m / coarse_m).astype(int), (frame.cols - 1) // stride),
    )
    open_ground = cover[::stride, ::stride]
    stands = np.ones(len(plants.row_m), np.bool_)
    for kind, clearance in ((ROAD, 1.32), (WATER, 1.32), (PATH, 0.35)):
        if np.any(open_ground == kind):
            away_m = ndimage.distance_transform_edt(open_ground != kind)[where] * coarse_m
            stands &= away_m > clearance * plants.radius_m * max(1.0, 1 + 0.3 * (config.crown_relief - 1)) + 2 * coarse_m
    plants = plants.take(np.flatnonzero(stands))
    count = len(plants.row_m)
    depth_share = np.where(plants.conifer, shape_rng.uniform(0.55, 0.8, count), shape_rng.uniform(0.22, 0.42, count))
    wide_m = np.where(plants.conifer, np.inf, 1.5 * plants.radius_m)
    depth_m = np.minimum(depth_share * plants.height_m, wide_m)
    under = np.where(plants.conifer, 0.05, shape_rng.uniform(0.1, 0.3, count)) * plants.height_m
    margin_m = frame.margin_px * frame.step_m
    left, _, _, top = grid.bounds
    return Trees(
        x=left - margin_m + plants.col_m,
        y=top + margin_m - plants.row_m,
        height_m=plants.height_m.astype(np.float32),
        radius_m=plants.radius_m.astype(np.float32),
        depth_m=depth_m.astype(np.float32),
        base_m=np.maximum(plants.height_m - depth_m - under, 0.0).astype(np.float32),
        conifer=plants.conifer,
        reflectance=_foliage(plants.row_m, plants.col_m, plants.conifer, config.conditions, leaf_rng),
        phase=shape_rng.uniform(0, 2 * math.pi, count).astype(np.float32),
    )


# --- the ground ----------------------------------------------------------------------------------------------------------


def _ground_cover(config: ForestConfig, frame: _Frame, rng: np.random.Generator) -> NDArray[np.uint8]:
    """Roads over paths over natural ground, drowned by ponds, (row, col)."""
    cover = np.full((frame.rows, frame.cols), NATURAL, np.uint8)
    rows_m, cols_m = frame.size_m
    y = ((np.arange(frame.rows, dtype=np.float32) + 0.5) * frame.step_m)[:, None]
    x = ((np.arange(frame.cols, dtype=np.float32) + 0.5) * frame.step_m)[None, :]
    for kind, number, widths_m in ((PATH, config.paths, (1.4, 2.8)), (ROAD, config.roads, (4.0, 8.0))):
        for _ in range(number):
            row_m, col_m = rng.uniform(0.2, 0.8, 2) * frame.size_m
            turn = rng.uniform(0, math.pi)
            along = (y - row_m) * math.sin(turn) + (x - col_m) * math.cos(turn)
            across = (x - col_m) * math.sin(turn) - (y - row_m) * math.cos(turn)
            knots_m = np.arange(-1.5 * max(rows_m, cols_m), 1.5 * max(rows_m, cols_m), 2.0)
            bend_m = _field_at(np.zeros_like(knots_m), knots_m, 280.0, 2, _seed(rng)) * 22.0
            half_m = rng.uniform(*widths_m) / 2
            cover[np.abs(across - np.interp(along, knots_m, bend_m)) < half_m] = kind
    for _ in range(config.ponds):
        row_m, col_m = rng.uniform(0.2, 0.8, 2) * frame.size_m
        radius_m = rng.uniform(0.04, 0.1) * min(frame.size_m)
        ragged = frame.field(rng, 1.3 * radius_m, 3)
        cover[np.hypot(y - row_m, (x - col_m) * rng.uniform(0.6, 1.4)) < radius_m * (1 + 0.25 * ragged)] = WATER
    return cover


def _terrain(config: ForestConfig, frame: _Frame, cover: NDArray[np.uint8], rng: np.random.Generator) -> Float32:
    """Absolute height of the ground, (row, col): a slope, fractal relief, level ponds."""
    relief = frame.field(rng, 620.0, 6)
    turn = rng.uniform(0, 2 * math.pi)
    y = (np.arange(frame.rows, dtype=np.float32) * frame.step_m)[:, None]
    x = (np.arange(frame.cols, dtype=np.float32) * frame.step_m)[None, :]
    datum_m = rng.uniform(50, 900)
    ground = datum_m + config.terrain_relief_m * relief + config.terrain_slope * (math.sin(turn) * y + math.cos(turn) * x)
    lakes, count = ndimage.label(cover == WATER)
    if count:
        levels = np.concatenate([[0.0], ndimage.mean(ground, lakes, np.arange(1, count + 1))]).astype(np.float32)
        # The land comes down to the water over a bank of this width; distances of a coarser raster are smooth enough.
        bank_m, stride = 45.0, max(1, round(2.0 / frame.step_m))
        away, nearest = ndimage.distance_transform_edt(lakes[::stride, ::stride] == 0, return_indices=True)
        t = np.clip(away * (stride * frame.step_m / bank_m), 0, 1)
        shape = frame.rows / t.shape[0], frame.cols / t.shape[1]
        level = levels[lakes[::stride, ::stride][tuple(nearest)]]
        share, level = (
            ndimage.zoom(v.astype(np.float32), shape, order=1, mode="nearest", grid_mode=True)
            for v in (t * t * (3 - 2 * t), level)
        )
        ground = np.where(lakes > 0, levels[lakes], level + share * (ground - level))
    return np.asarray(ground, np.float32)


# --- the photograph ------------------------------------------------------------------------------------------------------


@njit(cache=True)
def _sunlight(
    height: NDArray[Any],
    base: NDArray[Any],
    ground: NDArray[Any],
    step_m: float,
    to_sun_row: float,
    to_sun_col: float,
    tan_elevation: float,
    extinction_per_m: float,
) -> NDArray[Any]:
    """Share of the direct sunlight that reaches the top surface of each pixel, (row, col).

    A ray marches from the surface towards the sun. Between the base and the top of the crowns it passes, it is weakened
    by the law of Beer and Lambert, so light falls through the edges of crowns and between the stems below them.
    """
    rows, cols = height.shape
    block = 8
    tops = np.zeros((rows // block + 1, cols // block + 1), np.float32)
    tallest = np.float32(0)
    for r in range(rows):
        for c in range(cols):
            tops[r // block, c // block] = max(tops[r // block, c // block], height[r, c] + ground[r, c])
            tallest = max(tallest, height[r, c])
    out = np.ones((rows, cols), np.float32)
    length_m = step_m / math.cos(math.atan(tan_elevation))
    rise_m = tan_elevation * step_m
    for r in range(rows):
        for c in range(cols):
            z = ground[r, c] + height[r, c]
            y, x, optical = float(r), float(c), 0.0
            while True:
                y, x, z = y + to_sun_row, x + to_sun_col, z + rise_m
                i, j = int(y + 0.5), int(x + 0.5)
                if y < 0 or x < 0 or i >= rows or j >= cols:
                    break
                if z > tops[i // block, j // block]:
                    # Nothing in this block reaches the ray: go half a block on, which misses at most a crown's corner.
                    if z > ground[i, j] + tallest:
                        break
                    y, x, z = y + 3 * to_sun_row, x + 3 * to_sun_col, z + 3 * rise_m
                    continue
                above = z - ground[i, j]
                if above < 0:
                    optical = 99.0
                elif base[i, j] < above < height[i, j]:
                    optical += extinction_per_m * length_m
                if optical > 4:
                    break
            out[r, c] = math.exp(-optical)
    return out


@njit(cache=True)
def _lean(
    radiance: NDArray[Any], height: NDArray[Any], to_row: float, to_col: float, tangent: float, step_m: float, seed: int
) -> NDArray[Any]:
    """What a camera sees that stands off the zenith: each point is displaced by height * tangent, tops hide what is behind.

    The flank of a crown shows below its rim, darker with depth and with leaf masses of its own.
    """
    bands, rows, cols = radiance.shape
    out = np.empty_like(radiance)
    longest = int(height.max() * tangent / step_m) + 1
    for r in range(rows):
        for c in range(cols):
            i, j, light = r, c, 1.0
            for t in range(longest, 0, -1):
                q, p = int(r - t * to_row + 0.5), int(c - t * to_col + 0.5)
                if 0 <= q < rows and 0 <= p < cols and height[q, p] * tangent / step_m >= t - 0.5:
                    i, j = q, p
                    below_m = height[q, p] - t * step_m / tangent
                    if below_m > step_m / tangent:
                        lumps = _octaves(r * step_m / 1.3, c * step_m / 1.3, 2, seed)
                        light = max(0.2, math.exp(-0.06 * below_m) * (1 + 0.3 * lumps))
                    break
            for b in range(bands):
                out[b, r, c] = radiance[b, i, j] * light
    return out


@njit(cache=True)
def _shade(
    height: NDArray[Any],
    ground: NDArray[Any],
    crown: NDArray[Any],
    leaves: NDArray[Any],
    soil: NDArray[Any],
    sunlight: NDArray[Any],
    openness: NDArray[Any],
    leaf: NDArray[Any],
    step_m: float,
    sun: NDArray[Any],
    direct: NDArray[Any],
    sky: NDArray[Any],
) -> NDArray[Any]:
    """Radiance that leaves each pixel, (3, row, col): reflectance times sunlight on the slope plus light of the open sky.

    Args:
        height: (row, col), m, above `ground`.
        ground: (row, col), m.
        crown: (row, col), index into `leaves` or NOT_A_CROWN.
        leaves: (crown, 3) reflectance.
        soil: (3, row, col) reflectance of the ground.
        sunlight: (row, col), share of the direct light.
        openness: (row, col), share of the sky.
        leaf: (row, col), unit noise of the leaf masses.
        step_m: GSD.
        sun: Unit vector to the sun (row, col, up).
        direct: (3,) irradiance of a surface that faces the sun.
        sky: (3,) irradiance of a level surface under the whole sky.
    """
    rows, cols = height.shape
    out = np.empty((3, rows, cols), np.float32)
    for r in range(rows):
        up, down = max(r - 1, 0), min(r + 1, rows - 1)
        for c in range(cols):
            west, east = max(c - 1, 0), min(c + 1, cols - 1)
            k = crown[r, c]
            dy = (ground[down, c] - ground[up, c]) / (2 * step_m)
            dx = (ground[r, east] - ground[r, west]) / (2 * step_m)
            wrap, texture = 0.0, 1.0
            if k >= 0:
                lumps = 0.16 * min(1.0, height[r, c] / 3)
                hy = (height[down, c] - height[up, c] + lumps * (leaf[down, c] - leaf[up, c])) / (2 * step_m)
                hx = (height[r, east] - height[r, west] + lumps * (leaf[r, east] - leaf[r, west])) / (2 * step_m)
                # A crown is a cloud of leaves, not a wall: slopes saturate and light wraps around them.
                soft = 0.75 / (1 + 0.3 * math.sqrt(hy * hy + hx * hx))
                dy, dx = dy + soft * hy, dx + soft * hx
                wrap = 0.22
                texture = max(0.35, 1 + 0.17 * leaf[r, c])
            facing = (-dy * sun[0] - dx * sun[1] + sun[2]) / math.sqrt(1 + dy * dy + dx * dx)
            facing = max(0.0, (facing + wrap) / (1 + wrap))
            for b in range(3):
                reflectance = leaves[k, b] * texture if k >= 0 else soil[b, r, c]
                light = direct[b] * facing * sunlight[r, c] + sky[b] * openness[r, c]
                out[b, r, c] = reflectance * light
    return out


GRASS = (0.085, 0.125, 0.045)
STRAW = (0.270, 0.215, 0.125)
LITTER = (0.120, 0.095, 0.070)
ASPHALT = (0.125, 0.125, 0.130)
GRAVEL = (0.330, 0.300, 0.255)
POND = (0.018, 0.030, 0.028)
"""Reflectances of the ground."""


def _soil_reflectance(
    frame: _Frame,
    cover: NDArray[np.uint8],
    closed: Float32,
    conditions: Conditions,
    rng: np.random.Generator,
) -> Float32:
    """Reflectance of the ground, (3, row, col): grass, straw, soil and litter in patches of many scales; roads; water."""
    shade_rng, kind_rng, grain_rng, extra_rng = rng.spawn(4)
    patches = frame.field(kind_rng, 90.0, 6)
    bare = frame.field(kind_rng, 24.0, 6)
    grain = frame.field(grain_rng, 1.4, 3)
    broad = frame.field(shade_rng, 55.0, 4)

    def share(noise: NDArray[Any], wanted: float, softness: float) -> Float32:
        """0 to 1, about `wanted` of it above a half."""
        centre = float(np.quantile(noise[::7, ::7], 1 - wanted)) if 0 < wanted < 1 else (9.0 if wanted == 0 else -9.0)
        return np.asarray(1 / (1 + np.exp((centre - noise) / softness)), np.float32)

    dry = share(patches + 0.18 * grain, conditions.dryness, 0.5)
    naked = share(bare + 0.35 * grain - 0.4 * closed, conditions.bare_soil, 0.25)
    tone = np.exp(0.13 * grain + 0.10 * broad).astype(np.float32)
    road = np.asarray(ASPHALT if extra_rng.uniform() < 0.5 else GRAVEL) * math.exp(extra_rng.normal(0, 0.2))
    path = np.asarray(conditions.soil) * math.exp(extra_rng.normal(0.1, 0.1))
    silt = math.exp(extra_rng.normal(0, 0.4))
    out = np.empty((3, frame.rows, frame.cols), np.float32)
    for b in range(3):
        band = GRASS[b] * conditions.foliage[b] + dry * (STRAW[b] - GRASS[b] * conditions.foliage[b])
        band += closed * 0.7 * (LITTER[b] - band)
        band += naked * (conditions.soil[b] - band)
        band *= tone
        for kind, value, roughness in ((ROAD, road[b], 0.04), (PATH, path[b], 0.10), (WATER, POND[b] * silt, 0.03)):
            where = cover == kind
            band[where] = value * np.exp(roughness * (grain[where] + 2 * broad[where]))
        out[b] = band
    return out


def _direction(azimuth_deg: float) -> tuple[float, float]:
    """(row, col) unit vector of a bearing clockwise from grid north; rows grow southwards."""
    azimuth = math.radians(azimuth_deg)
    return -math.cos(azimuth), math.sin(azimuth)


def _photograph(
    *,
    height_m: Float32,
    base_m: Float32,
    crown: NDArray[np.int32],
    leaves: Float32,
    ground_m: Float32,
    cover: NDArray[np.uint8],
    frame: _Frame,
    oversample: int,
    conditions: Conditions,
    rng: np.random.Generator,
) -> NDArray[np.uint8]:
    """The image of a canopy on the frame, (3, row, col) uint8, margin cut off, at `oversample` times the step.

    Args:
        height_m: (row, col) above ground.
        base_m: (row, col) height of the lowest leaves.
        crown: (row, col) index into `leaves` or NOT_A_CROWN.
        leaves: (crown, 3) reflectance.
        ground_m: (row, col).
        cover: (row, col).
        frame: The raster of the above.
        oversample: Steps per side of an image pixel; divides the margin and both sides of the frame.
        conditions: Light, season, view, sensor.
        rng: For texture and noise.
    """
    soil_rng, leaf_rng, sensor_rng = rng.spawn(3)
    sun_row, sun_col = _direction(conditions.sun_azimuth_deg)
    elevation = math.radians(conditions.sun_elevation_deg)
    sunlight = _sunlight(height_m, base_m, ground_m, frame.step_m, sun_row, sun_col, math.tan(elevation), _EXTINCTION_PER_M)
    # Sky seen from a point: less the deeper it lies below its surroundings.
    around_m = ndimage.gaussian_filter(height_m, 2.6 / frame.step_m, truncate=2.0)
    openness = (0.30 + 0.70 / (1 + np.exp((around_m - height_m - 1.0) / 1.8))).astype(np.float32)
    closed = np.clip(around_m / 4.0, 0, 1)
    leaf = 0.8 * frame.field(leaf_rng, 1.6, 2) + 0.6 * frame.field(leaf_rng, 0.75, 1)
    air_mass = 1 / math.sin(elevation)
    # Bluer light is scattered out of the beam and comes back from the sky (Rayleigh: shadows are blue).
    direct = np.array([1.00, 0.97, 0.90]) * np.exp(-np.array([0.08, 0.13, 0.22]) * air_mass)
    sky = np.array([0.095, 0.130, 0.200]) * (1 + 1.2 * conditions.haze)
    sun = np.array([sun_row * math.cos(elevation), sun_col * math.cos(elevation), math.sin(elevation)])
    radiance = _shade(
        height_m,
        ground_m,
        crown,
        leaves,
        _soil_reflectance(frame, cover, closed, conditions, soil_rng),
        sunlight,
        openness,
        leaf,
        frame.step_m,
        sun,
        direct,
        sky,
    )
    if conditions.view_zenith_deg > 0:
        to_row, to_col = _direction(conditions.view_azimuth_deg)
        tangent = math.tan(math.radians(conditions.view_zenith_deg))
        radiance = _lean(radiance, height_m, to_row, to_col, tangent, frame.step_m, _seed(leaf_rng))
    return _expose(radiance, frame=frame, oversample=oversample, conditions=conditions, rng=sensor_rng)


_EXTINCTION_PER_M = 0.75
"""Of sunlight in a crown: 3 m of leaves let a tenth through, as at a leaf area density of 1.5 m2/m3 and G = 0.5."""


def _expose(
    radiance: Float32, *, frame: _Frame, oversample: int, conditions: Conditions, rng: np.random.Generator
) -> NDArray[np.uint8]:
    """Optics, atmosphere, sensor and the supplier's processing: radiance on the frame to digital numbers on the image.

    Saturation at 0 and 255 is the sensor's.
    """
    rows, cols = frame.rows // oversample, frame.cols // oversample
    margin = frame.margin_px // oversample
    keep = slice(margin, rows - margin), slice(margin, cols - margin)
    signal = np.empty((3, rows - 2 * margin, cols - 2 * margin), np.float32)
    airlight = np.array([0.0050, 0.0068, 0.0100]) * (1 + 4 * conditions.haze)
    white = np.array([1 + conditions.warmth, 1.0, 1 - conditions.warmth])
    for b in range(3):
        pixel = radiance[b].reshape(rows, oversample, cols, oversample).mean((1, 3))
        signal[b] = (ndimage.gaussian_filter(pixel, conditions.blur_px) + airlight[b])[keep] * white[b]
    gain = conditions.exposure / float(np.quantile(signal[1], 0.99))
    signal = (signal * gain) ** (1 / conditions.gamma)
    if conditions.sharpen > 0:
        signal += conditions.sharpen * (signal - ndimage.gaussian_filter(signal, (0, 1.0, 1.0)))
    grain = rng.standard_normal(signal.shape, dtype=np.float32)
    # Shot noise grows with the root of the radiance, which the tone curve about cancels; read noise stays in the dark.
    signal = 255 * signal + conditions.noise_dn * (0.7 + 0.6 * np.clip(signal, 0, 1)) * grain
    return np.asarray(np.clip(np.rint(signal), 0, 255), np.uint8)


# --- the LiDAR -----------------------------------------------------------------------------------------------------------


@njit(cache=True)
def _bilinear(raster: NDArray[Any], y: float, x: float) -> float:
    """Value at (y, x) in pixels from the corner of the first pixel, inside the raster."""
    rows, cols = raster.shape
    y, x = min(max(y - 0.5, 0.0), rows - 1.001), min(max(x - 0.5, 0.0), cols - 1.001)
    i, j = int(y), int(x)
    fy, fx = y - i, x - j
    top = raster[i, j] * (1 - fx) + raster[i, j + 1] * fx
    return top * (1 - fy) + (raster[i + 1, j] * (1 - fx) + raster[i + 1, j + 1] * fx) * fy  # type: ignore[no-any-return]


@njit(cache=True)
def _scan(
    row_px: NDArray[Any],
    col_px: NDArray[Any],
    chance: NDArray[Any],
    height: NDArray[Any],
    base: NDArray[Any],
    ground: NDArray[Any],
    cover: NDArray[Any],
) -> tuple[NDArray[Any], ...]:
    """Returns of vertical pulses at (row_px, col_px) of the frame; `chance` is (pulse, 4) uniform in [0, 1).

    A pulse goes an exponential depth into the crown under it before its first return; one that passes the crown base
    returns from the ground only. Half of the others give a second return from lower in the crown, and a third reach
    the ground. Still water swallows six of ten pulses.
    """
    most = 3 * len(row_px)
    pulse, z = np.empty(most, np.int64), np.empty(most)
    is_ground = np.empty(most, np.bool_)
    number, total = np.empty(most, np.uint8), np.empty(most, np.uint8)
    n = 0
    for k in range(len(row_px)):
        i, j = int(row_px[k]), int(col_px[k])
        floor = _bilinear(ground, row_px[k], col_px[k])
        top = height[i, j]
        if cover[i, j] == WATER and top == 0 and chance[k, 0] < 0.6:
            continue
        first = n
        if top > 0.1:
            # The lower of the two: a beam on the rim of a crown must not return from the air above its slope.
            surface = min(top, _bilinear(height, row_px[k], col_px[k]))
            hit = surface + math.log(1 - chance[k, 0]) * (0.15 + 0.015 * top)
            if hit > base[i, j] and hit > 0.1:
                pulse[n], z[n], is_ground[n] = k, floor + hit, False
                n += 1
                lower = base[i, j] + chance[k, 1] * (hit - base[i, j])
                if chance[k, 2] < 0.5 and hit - lower > 1.5 and lower > 0.3:
                    pulse[n], z[n], is_ground[n] = k, floor + lower, False
                    n += 1
        if n == first or chance[k, 3] < 0.34:
            pulse[n], z[n], is_ground[n] = k, floor, True
            n += 1
        for m in range(first, n):
            number[m], total[m] = m - first + 1, n - first
    return pulse[:n], z[:n], is_ground[:n], number[:n], total[:n]


def _survey(
    *,
    config: ForestConfig,
    grid: Grid,
    frame: _Frame,
    canopy: tuple[Float32, Float32],
    ground_m: Float32,
    cover: NDArray[np.uint8],
    rng: np.random.Generator,
) -> Points:
    """Fly the LiDAR over the grid (not over the margin): one pulse in a random place of each cell of a fine net."""
    left, bottom, right, top = grid.bounds
    side_m = 1 / math.sqrt(config.pulses_per_m2)
    lines, columns = max(1, round((top - bottom) / side_m)), max(1, round((right - left) / side_m))
    down = (np.repeat(np.arange(lines), columns) + rng.uniform(size=lines * columns)) * ((top - bottom) / lines)
    along = (np.tile(np.arange(columns), lines) + rng.uniform(size=lines * columns)) * ((right - left) / columns)
    chance = rng.uniform(size=(lines * columns, 4)).astype(np.float32)
    row_px, col_px = down / frame.step_m + frame.margin_px, along / frame.step_m + frame.margin_px
    pulse, z, is_ground, number, total = _scan(row_px, col_px, chance, canopy[0], canopy[1], ground_m, cover)
    z += rng.normal(0, config.lidar_noise_m, len(z))
    classes = np.where(is_ground, 2, 1) if config.classified else np.zeros(len(z))
    return Points(
        x=(left + along)[pulse],
        y=(top - down)[pulse],
        z=z,
        classification=classes.astype(np.uint8),
        return_number=number,
        number_of_returns=total,
    )


# --- scenes --------------------------------------------------------------------------------------------------------------


def simulate_scene(
    *,
    grid: Grid,
    seed: int,
    forest: ForestConfig = ForestConfig(),  # noqa: B008 frozen
    exposure: int = 0,
    felled: Callable[[Trees], NDArray[np.bool_]] | None = None,
) -> Scene:
    """Grow a forest on `grid` and survey it by LiDAR and camera; or come back to it another time.

    A second visit has the same seed and forest, its own conditions and `exposure`, and may find trees `felled`: terrain,
    stems and crowns are those of the first.

    Why spawned generators: ground, trees, photograph and LiDAR each draw from their own, so that for example another
    pulse density leaves the photograph as it is. The same seed, grid and forest give identical bytes on one machine.

    Args:
        grid: North-up, square pixels of 0.05 to 3 m, metric CRS.
        seed: Non-negative.
        forest: What grows there and under what light it is seen.
        exposure: Which of its photographs: each has its own noise, and its own texture of soil and leaves.
        felled: Which of the trees no longer stand, told from what they are: (tree,) bool.

    Raises:
        GridError: The grid is not metric, not north-up, not square, or too coarse or too fine.
    """
    gsd_m = _gsd_m(grid)
    oversample = _oversample(gsd_m)
    margin_px = math.ceil(MARGIN_M / gsd_m) * oversample
    rows, cols = grid.shape
    frame = _Frame(
        rows=rows * oversample + 2 * margin_px,
        cols=cols * oversample + 2 * margin_px,
        step_m=gsd_m / oversample,
        margin_px=margin_px,
    )
    cover_rng, terrain_rng, tree_rng, relief_rng, photo_rng, lidar_rng = np.random.default_rng(seed).spawn(6)
    cover = _ground_cover(forest, frame, cover_rng)
    ground = _terrain(forest, frame, cover, terrain_rng)
    trees = _grow(forest, grid, frame, cover, tree_rng)
    if felled is not None:
        trees = trees.take(np.flatnonzero(~felled(trees)))
    if exposure:
        photo_rng = np.random.default_rng([seed, exposure])
    relief_seed = _seed(relief_rng)
    height, base, crown = _stamped(trees, grid, frame, relief=forest.crown_relief, seed=relief_seed)
    image = _photograph(
        height_m=height,
        base_m=base,
        crown=crown,
        leaves=trees.reflectance,
        ground_m=ground,
        cover=cover,
        frame=frame,
        oversample=oversample,
        conditions=forest.conditions,
        rng=photo_rng,
    )
    points = _survey(
        config=forest, grid=grid, frame=frame, canopy=(height, base), ground_m=ground, cover=cover, rng=lidar_rng
    )
    pixels = _Frame(
        rows=frame.rows // oversample, cols=frame.cols // oversample, step_m=gsd_m, margin_px=margin_px // oversample
    )
    inner = slice(pixels.margin_px, -pixels.margin_px)
    truth, _, _ = _stamped(trees, grid, pixels, relief=forest.crown_relief, seed=relief_seed)
    # Terrain is smooth at the scale of a pixel, so the mean of its samples is its value at the centre.
    terrain = ground.reshape(pixels.rows, oversample, pixels.cols, oversample).mean((1, 3), dtype=np.float64)
    return Scene(
        grid=grid,
        image=image,
        height_m=np.ascontiguousarray(truth[inner, inner]),
        ground_m=terrain[inner, inner].astype(np.float32),
        cover=np.ascontiguousarray(cover[oversample // 2 :: oversample, oversample // 2 :: oversample][inner, inner]),
        points=points,
        trees=trees,
    )


# --- real canopies, imagined photographs ---------------------------------------------------------------------------------


def refine_heights(height_m: Float32, factor: int) -> Float32:
    """A CHM on pixels `factor` times smaller: cubic, so crowns are round, but never beyond the heights around a pixel.

    Args:
        height_m: (row, col), m, NaN = unknown.
        factor: At least 1.

    Returns:
        (row * factor, col * factor) float32; NaN where the pixel it lies in is NaN.
    """
    if factor < 1:
        raise CanopyError(f"refinement factor {factor} is below 1; give how many pixels replace one along a side")
    unknown = np.isnan(height_m)
    known = np.where(unknown, 0.0, height_m).astype(np.float32)
    if factor > 1:
        low, high = (
            ndimage.zoom(extreme(known, 3), factor, order=0, mode="nearest", grid_mode=True)
            for extreme in (ndimage.minimum_filter, ndimage.maximum_filter)
        )
        known = np.clip(ndimage.zoom(known, factor, order=3, mode="nearest", grid_mode=True), low, high)
    return np.where(np.kron(unknown, np.ones((factor, factor), np.bool_)), np.nan, known).astype(np.float32)


@njit(cache=True)
def _climb(smooth: NDArray[Any], tall: NDArray[Any]) -> tuple[NDArray[Any], int]:
    """Number the crowns: each pixel belongs to the local maximum that steepest ascent leads to; others NOT_A_CROWN."""
    rows, cols = smooth.shape
    towards = np.empty(rows * cols, np.int32)
    for r in range(rows):
        for c in range(cols):
            best_r, best_c = r, c
            for i in range(max(r - 1, 0), min(r + 2, rows)):
                for j in range(max(c - 1, 0), min(c + 2, cols)):
                    if smooth[i, j] > smooth[best_r, best_c]:
                        best_r, best_c = i, j
            towards[r * cols + c] = best_r * cols + best_c
    crown = np.full(rows * cols, NOT_A_CROWN, np.int32)
    number = np.full(rows * cols, NOT_A_CROWN, np.int32)
    count = 0
    for k in range(rows * cols):
        if not tall[k // cols, k % cols]:
            continue
        top = k
        while towards[top] != top:
            top = towards[top]
        towards[k] = top
        if number[top] < 0:
            number[top] = count
            count += 1
        crown[k] = number[top]
    return crown.reshape(rows, cols), count


def reimage(
    height_m: Float32,
    *,
    gsd_m: float,
    rng: np.random.Generator,
    conditions: Conditions | None = None,
    conifer_share: float | None = None,
) -> NDArray[np.uint8]:
    """Photograph a real canopy height model: real structure, simulated light and leaves, over level natural ground.

    Crowns are the hills of the smoothed CHM, and each gets the colour of a species. A 1 m CHM is best refined first:
    `reimage(refine_heights(chm, 2), gsd_m=0.5, rng=rng)`.

    Args:
        height_m: (row, col) canopy height, m. Where it is NaN the image is black, (0, 0, 0).
        gsd_m: Of `height_m` and of the image.
        rng: For everything drawn.
        conditions: Light, season, view, sensor; drawn from `rng` by default.
        conifer_share: Of the crowns, 0 to 1; drawn from `rng` by default.

    Returns:
        (3, row, col) uint8: red, green, blue.

    Raises:
        CanopyError: The heights are not a raster, negative, infinite or unknown throughout.
    """
    if height_m.ndim != 2 or min(height_m.shape) < 2:
        raise CanopyError(f"heights have shape {height_m.shape}; give (row, col), both at least 2")
    unknown = np.isnan(height_m)
    if unknown.all():
        raise CanopyError(f"all {height_m.size} heights are NaN; give a CHM with at least one known pixel")
    lowest, highest = float(np.nanmin(height_m)), float(np.nanmax(height_m))
    if lowest < 0 or highest > 150:
        raise CanopyError(f"heights run from {lowest} to {highest} m, outside 0 to 150; set nodata to NaN and clean the CHM")
    if not 0.05 <= gsd_m <= 3.0:
        raise CanopyError(f"GSD {gsd_m} m is outside 0.05 to 3 m, where single crowns can be seen; use about 0.6 m")
    scene_rng, leaf_rng, relief_rng, photo_rng = rng.spawn(4)
    conditions = conditions if conditions is not None else Conditions.random(scene_rng)
    conifer_share = conifer_share if conifer_share is not None else float(scene_rng.beta(0.7, 0.7))
    oversample = _oversample(gsd_m)
    margin = min(math.ceil(MARGIN_M / gsd_m), *height_m.shape)
    # Beyond its edge the forest goes on as its mirror image, whose shadows fall into the picture.
    padded = np.pad(np.where(unknown, 0.0, height_m).astype(np.float32), margin, mode="symmetric")
    height = refine_heights(padded, oversample)
    frame = _Frame(rows=height.shape[0], cols=height.shape[1], step_m=gsd_m / oversample, margin_px=margin * oversample)
    tall = height > 0.3
    smooth = ndimage.gaussian_filter(height, 0.9 / frame.step_m, truncate=3.0)
    crown, count = _climb(smooth, tall)
    rows_px, cols_px = np.indices(crown.shape, dtype=np.float32)
    index = np.arange(count)
    row_m = ndimage.mean(rows_px, crown, index) * frame.step_m if count else np.zeros(0)
    col_m = ndimage.mean(cols_px, crown, index) * frame.step_m if count else np.zeros(0)
    del rows_px, cols_px
    tops = ndimage.maximum(height, crown, index) if count else np.zeros(0)
    kind = _field_at(np.asarray(row_m), np.asarray(col_m), 110.0, 3, _seed(leaf_rng)) + leaf_rng.normal(0, 0.5, count)
    conifer = kind > np.quantile(kind, 1 - conifer_share) if count else np.zeros(0, np.bool_)
    leaves = _foliage(np.asarray(row_m), np.asarray(col_m), conifer, conditions, leaf_rng)
    base_of = np.append(np.asarray(tops) * leaf_rng.uniform(0.2, 0.55, count), 0.0).astype(np.float32)
    base = np.minimum(base_of[crown], 0.8 * height)
    # A CHM of a few returns per square metre has lost the leaf masses that a photograph shows.
    lumps = 0.35 * relief_rng.uniform(0.6, 1.3) * np.clip(height / 6.0, 0, 1) * frame.field(relief_rng, 1.9, 2)
    height = np.where(tall, np.maximum(height + lumps, 0.05), 0).astype(np.float32)
    image = _photograph(
        height_m=height,
        base_m=base,
        crown=crown,
        leaves=leaves,
        ground_m=np.zeros_like(height),
        cover=np.full(height.shape, NATURAL, np.uint8),
        frame=frame,
        oversample=oversample,
        conditions=conditions,
        rng=photo_rng,
    )
    image[:, unknown] = 0
    return image


# --- files ---------------------------------------------------------------------------------------------------------------


def write_scene(scene: Scene, folder: Path) -> None:
    """Write `image.tif`, `height.tif`, `ground.tif` and `points.laz` (LAS 1.4, format 6, 1 cm, CRS inside) into `folder`.

    Each file appears under its name only when it is complete.

    Args:
        scene: Of any size.
        folder: Made when missing; files of these names in it are replaced.

    Raises:
        OutputError: The folder or a file cannot be written.
    """
    from canopy.raster import write_raster

    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"cannot make folder {folder}: {error.strerror}; choose another output folder") from error
    write_raster(folder / "image.tif", scene.image, grid=scene.grid, band_names=("red", "green", "blue"))
    for name, data in (("height", scene.height_m), ("ground", scene.ground_m)):
        path = folder / f"{name}.tif"
        write_raster(path, data[None], grid=scene.grid, nodata=math.nan, band_names=(f"{name}_m",), units=("m",))
    _write_points(scene, folder / "points.laz")


def _write_points(scene: Scene, path: Path) -> None:
    import laspy

    points = scene.points
    header = laspy.LasHeader(point_format=6, version="1.4")
    header.add_crs(scene.grid.crs)
    header.scales = np.full(3, 0.01)
    left, bottom, _, _ = scene.grid.bounds
    header.offsets = np.array([math.floor(left), math.floor(bottom), 0.0])
    record = laspy.LasData(header)
    record.x, record.y, record.z = points.x, points.y, points.z
    record.classification = points.classification
    record.return_number = points.return_number
    record.number_of_returns = points.number_of_returns
    partial = path.with_name(f".{path.stem}.{os.getpid()}.partial.laz")
    try:
        record.write(str(partial))
        partial.replace(path)
    except OSError as error:
        raise OutputError(f"cannot write {path}: {error.strerror}; free space or choose another folder") from error
    finally:
        partial.unlink(missing_ok=True)

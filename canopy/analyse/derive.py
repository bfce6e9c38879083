"""What is derived from a map for analysts: cover, gaps and percentiles in larger cells, and tree tops; `canopy derive`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, Final

import numpy as np
from numpy.typing import NDArray

from canopy.analyse.cells import Cells, CellWindow
from canopy.analyse.coarse import COVER_BANDS, PERCENTILE_BANDS, GapRule, cell_raster, cover, percentiles
from canopy.analyse.gaps import GAP_BELOW_M, LEAST_GAP_M2, checked_gap
from canopy.analyse.surfaces import Surfaces, open_surfaces
from canopy.analyse.tops import TopRule, find_tops
from canopy.errors import AnalysisError, OutputError
from canopy.grid import Box
from canopy.region.folder import RegionFolder

if TYPE_CHECKING:
    import geopandas

Progress = Callable[[str, int, int], None]
Make = Callable[[Surfaces, CellWindow], NDArray[np.float32]]

TOPS: Final = "tree_tops.gpkg"
TOPS_LAYER: Final = "tree_tops"

_COVER: Final = "shares of known ground: canopy above 2 m and 5 m; gaps below {0.below_m:g} m of at least {0.least_m2:g} m²"
_PERCENTILES: Final = "heights that 25, 50, 75 and 95 % of the known ground do not exceed"

_STRIP_PX: Final = 1024
"""Rows and columns of the windows in which tops are looked for."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """What to derive."""

    cover_m: tuple[float, ...] = ()
    """Sides of the cells of cover and gaps."""
    percentiles_m: tuple[float, ...] = ()
    """Sides of the cells of percentiles."""
    tops: TopRule | None = None
    """None: no tree tops."""
    crowns: bool = False
    """Whether tops get the radius of a crown of their height."""
    gap_below_m: float = GAP_BELOW_M
    least_gap_m2: float = LEAST_GAP_M2

    def __post_init__(self) -> None:
        checked_gap(self.gap_below_m, self.least_gap_m2)
        if not (self.cover_m or self.percentiles_m or self.tops):
            raise AnalysisError("nothing is asked for; give --cover 10, --percentiles 30 or --tree-tops")
        if self.crowns and self.tops is None:
            raise AnalysisError("--crowns is about tree tops; give --tree-tops as well")
        for option, sides in (("--cover", self.cover_m), ("--percentiles", self.percentiles_m)):
            if len(set(sides)) != len(sides):
                raise AnalysisError(f"{option} {sides[0]:g} is given twice; give each side once")

    @property
    def files(self) -> tuple[str, ...]:
        """Names of what is made."""
        return (
            *(f"cover_{side_m:g}m.tif" for side_m in self.cover_m),
            *(f"percentiles_{side_m:g}m.tif" for side_m in self.percentiles_m),
            *([TOPS] if self.tops else []),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Derived:
    """What was made."""

    files: tuple[Path, ...]
    tops: int | None
    """Tree tops; None where none were looked for."""

    def as_json(self) -> dict[str, Any]:
        """As a table."""
        return {"files": [str(path) for path in self.files], "tree_tops": self.tops}

    def lines(self) -> Iterator[str]:
        """What to tell people."""
        yield from map(str, self.files)
        if self.tops is not None:
            yield f"{self.tops} tree tops"


def derive(folder: Path, out: Path, wanted: Wanted, *, overwrite: bool = False, progress: Progress | None = None) -> Derived:
    """Derive layers from a finished map; all of them are in `out` afterwards, or none is.

    Args:
        folder: Of the map.
        out: Folder for the layers; made if need be.
        wanted: What to derive.
        overwrite: Replace layers of these names.
        progress: Called with a layer's name, and how much of it is done, of how much.

    Raises:
        AnalysisError: cells that cannot be, or a map that is none.
        OutputError: a layer exists or cannot be written, or there is no finished map.
        RasterError: the map cannot be read.
    """
    found = RegionFolder.open(folder)
    there = [name for name in wanted.files if (out / name).exists()]
    if there and not overwrite:
        raise OutputError(f"{out / there[0]} exists; choose another folder or pass --overwrite")
    say = progress or (lambda _name, _done, _all: None)
    tops = None
    try:
        out.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(prefix=".derive-", dir=out) as name, open_surfaces(found) as surfaces:
            stage, tags = Path(name), found.tags
            rule = GapRule(below_m=wanted.gap_below_m, least_m2=wanted.least_gap_m2)
            layers: list[tuple[str, float, tuple[str, ...], str, Make]] = [
                *(
                    ("cover", side_m, COVER_BANDS, _COVER.format(rule), partial(cover, rule=rule))
                    for side_m in wanted.cover_m
                ),
                *(("percentiles", side_m, PERCENTILE_BANDS, _PERCENTILES, percentiles) for side_m in wanted.percentiles_m),
            ]
            for kind, side_m, bands, told, make in layers:
                cells = Cells.over(surfaces.grid, side_m)
                file = stage / f"{kind}_{side_m:g}m.tif"
                with cell_raster(file, cells, bands, {**tags, "CANOPY_DERIVED": told}) as writer:
                    chunks = [*cells.chunks()]
                    for done, (row, col, window) in enumerate(chunks, start=1):
                        writer.write(row, make(surfaces, window), col)
                        say(file.name, done, len(chunks))
            if wanted.tops is not None:
                tops = _tops(surfaces, stage / TOPS, wanted.tops, crowns=wanted.crowns, say=say)
            for made in wanted.files:
                (stage / made).replace(out / made)
    except OSError as error:
        raise OutputError(f"cannot write into {out} ({error}); free disk space or choose another folder") from error
    return Derived(files=tuple(out / name for name in wanted.files), tops=tops)


def _tops(surfaces: Surfaces, out: Path, rule: TopRule, *, crowns: bool, say: Progress) -> int:
    """Write the tops, window by window, and return how many there are."""
    import pyogrio

    from canopy.mosaicker.gti import undated

    rows, cols = surfaces.grid.shape
    boxes = [
        Box(row, col, min(row + _STRIP_PX, rows), min(col + _STRIP_PX, cols))
        for row in range(0, rows, _STRIP_PX)
        for col in range(0, cols, _STRIP_PX)
    ]
    count = 0
    with undated():
        for done, box in enumerate(boxes, start=1):
            frame = tops_in(surfaces, box, rule, crowns=crowns)
            if len(frame) or done == 1:
                pyogrio.write_dataframe(frame, out, layer=TOPS_LAYER, driver="GPKG", append=done > 1, geometry_type="Point")
            count += len(frame)
            say(out.name, done, len(boxes))
    return count


def tops_in(surfaces: Surfaces, box: Box, rule: TopRule, *, crowns: bool = False) -> geopandas.GeoDataFrame:
    """The tops in a part of a map, as points at the centres of their pixels.

    Columns: `height_m`; `error_90_m`, `lower_90_m` and `upper_90_m` of that pixel, whose interval was made for pixels, not
    for the highest of a crown; `surroundings_known`, False where something higher may stand on unknown ground; and by
    `crowns` `crown_radius_m`, which the regression gives to a tree of that height: it is not measured.
    """
    import geopandas

    halo = rule.halo_px(max(surfaces.grid.gsd))
    wide = Box(box.row0 - halo, box.col0 - halo, box.row1 + halo, box.col1 + halo)
    window = surfaces.read(wide)
    row, col, unknown = find_tops(window.height_m, box.slices_in(wide), rule, max(surfaces.grid.gsd))
    height_m = window.height_m[row, col]
    columns: dict[str, Any] = {
        "height_m": height_m, "error_90_m": window.half_width_m[row, col], "lower_90_m": window.lower_m[row, col],
        "upper_90_m": window.upper_m[row, col], "surroundings_known": ~unknown,
    }  # fmt: skip
    if crowns:
        columns["crown_radius_m"] = (rule.crown_m(height_m) / 2).astype(np.float32)
    x, y = surfaces.grid.xy(col + wide.col0 + 0.5, row + wide.row0 + 0.5)
    return geopandas.GeoDataFrame(columns, geometry=geopandas.points_from_xy(x, y), crs=surfaces.grid.crs)

"""Maps against canopy heights from airborne lidar: on which cells they meet, and all that is said of them there."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from pyproj import CRS, Transformer

from canopy.errors import ScoreError
from canopy.grid import Box, is_metric, utm_crs
from canopy.metrics import RESAMPLED_M, ClassSums, Resampled
from canopy.score.cells import FINER, LEAST_SHARE, Cells, HeightRasters, bounds_deg, refuse_finer
from canopy.score.chips import picture_of
from canopy.score.compare import Counted, Ground, Layers, Progress, count
from canopy.score.maps import OpenMap
from canopy.score.measures import (
    Draws,
    blocks_of,
    cover_of,
    difference_of,
    edges_of,
    groups_of,
    intervals_of,
    measures_of,
    residuals_of,
    scatter_of,
)
from canopy.score.pictures import ErrorMap, PlaceChip
from canopy.score.reference import STATISTICS, OpenReference
from canopy.score.registration import Site, measure, sites_of
from canopy.score.result import CompareGrid, Comparison, MapScore, Place, Registered, Shift, Statistic
from canopy.score.strata import OpenStrata, check_classes
from canopy.score.sums import Key, MapSums

OWN_BOUNDS = "the map's own bounds of each pixel"
AVERAGED_BOUNDS = (
    "bounds of the map's pixels, averaged over the cell: wider than an interval for the mean of the cell would be, as "
    "errors of neighbours are not wholly alike"
)

# --- cells -----------------------------------------------------------------------------------------------------------------


def grids(
    maps: Sequence[OpenMap], reference: OpenReference, gsd_m: float | None
) -> list[tuple[tuple[OpenMap, ...], float | None]]:
    """Which maps are compared with each other, and the side of the cells where it is given.

    Coarser maps beside the first do not take from it the comparison on its own pixels: there is one more with them.
    """
    if gsd_m is not None:
        return [(tuple(maps), gsd_m)]
    finest = max(maps[0].height.gsd_m, reference.rasters.gsd_m) * FINER
    fine = tuple(each for each in maps if each.height.gsd_m <= finest)
    return [(fine, None)] if len(fine) == len(maps) else [(fine, None), (tuple(maps), None)]


def _cells(maps: Sequence[OpenMap], reference: OpenReference, gsd_m: float | None) -> tuple[Cells, str]:
    """The cells to compare on, and why these.

    Raises:
        GridError: the side that is given is less than that of a raster's pixels.
        ScoreError: it is no length.
    """
    named: list[tuple[str, HeightRasters]] = [(f"the pixels of {each.info.name}", each.height) for each in maps]
    named.append(("the reference's pixels", reference.rasters))
    if gsd_m is not None:
        if not (math.isfinite(gsd_m) and gsd_m > 0):
            raise ScoreError(f"--gsd {gsd_m} is not a positive length; give metres, for example 10")
        for _, rasters in named:
            refuse_finer(rasters, gsd_m)
        anchor = next((own for _, rasters in named if (own := rasters.own_cells()) is not None), None)
        if anchor is None:
            return Cells(crs=_metric_crs(maps, reference), gsd_m=gsd_m), "as asked for"
        return Cells(crs=anchor.crs, gsd_m=gsd_m, x0_m=anchor.x0_m, y0_m=anchor.y0_m), "as asked for"
    coarsest = max(rasters.gsd_m for _, rasters in named)
    for name, rasters in named:
        own = rasters.own_cells()
        if own is not None and rasters.gsd_m * FINER >= coarsest:
            return own, f"{name}, the coarsest there are"
    side = math.ceil(round(coarsest * 10, 6)) / 10
    crs = _metric_crs(maps, reference)
    return Cells(crs=crs, gsd_m=side), (
        f"squares of {side:g} m from the origin of {crs.to_string()}: the coarsest pixels ({coarsest:.4g} m) are not square "
        f"in metres, or not all of one grid"
    )


def _metric_crs(maps: Sequence[OpenMap], reference: OpenReference) -> CRS:
    files = [*(each.height.files[0] for each in maps), reference.rasters.files[0]]
    own = next((file.grid.crs for file in files if is_metric(file.grid.crs)), None)
    return utm_crs(files[0].centre_lon_deg, files[0].centre_lat_deg) if own is None else own


def _common_box(first: OpenMap, reference: OpenReference, cells: Cells) -> Box:
    """The cells that may have both.

    Raises:
        ScoreError: map and reference are not in one place.
    """
    one, other = (_hull(rasters.boxes_on(cells)) for rasters in (first.height, reference.rasters))
    both = one.intersect(other)
    if both is None:
        here, there = first.height.files[0], reference.rasters.files[0]
        raise ScoreError(
            f"{first.info.path} (longitude {here.centre_lon_deg:.4f}, latitude {here.centre_lat_deg:.4f}) and {there.path} "
            f"({there.centre_lon_deg:.4f}, {there.centre_lat_deg:.4f}) have no ground in common; check their CRS, or give a "
            f"reference of that place"
        )
    return both


def _hull(boxes: Sequence[Box]) -> Box:
    return Box(
        min(b.row0 for b in boxes), min(b.col0 for b in boxes), max(b.row1 for b in boxes), max(b.col1 for b in boxes)
    )


# --- one comparison --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Pictured:
    """What there is to look at of one comparison, by map."""

    errors: dict[str, ErrorMap]
    places: dict[str, tuple[PlaceChip | None, ...]]


def compare_lidar(
    maps: Sequence[OpenMap],
    reference: OpenReference,
    parts: OpenStrata,
    *,
    gsd_m: float | None,
    statistic: Statistic,
    draws: Draws,
    progress: Progress | None,
) -> tuple[Comparison, Pictured]:
    """Compare maps with lidar on one set of cells.

    Args:
        maps: The map that is scored, and those beside it.
        reference: The lidar heights.
        parts: Parts of the ground to score apart.
        gsd_m: Side of the cells; None: that of the coarsest pixels there are.
        statistic: What of finer pixels is the height of a coarser cell.
        draws: Where the resamples come from.
        progress: Called as tiles are read.

    Raises:
        ScoreError: no cell is known in all of them.
        GridError: the cells would be finer than somebody's pixels, or a raster cannot be carried to them.
    """
    cells, chosen = _cells(maps, reference, gsd_m)
    box = _common_box(maps[0], reference, cells)
    ground = Ground(
        cells=cells, box=box, statistic=statistic, land_cover=parts.land_cover,
        polygons=None if parts.polygons is None else parts.polygons.on(cells),
    )  # fmt: skip
    sites = sites_of([file.path for file in reference.rasters.files], reference.rasters.boxes_on(cells))
    sites = [site for site in sites if site.extent.intersect(box) is not None]
    shifts = [
        [measure(each.height, reference.rasters, cells, site=site, within=box, statistic=statistic) for site in sites]
        for each in maps
    ]
    layers = [_layers(each, statistic, sites, moves) for each, moves in zip(maps, shifts, strict=True)]
    counted = count(layers, reference.rasters, ground, progress=progress)
    _refuse_empty(counted, maps, reference)
    grid = CompareGrid(
        crs=cells.crs.to_string(), gsd_m=cells.gsd_m, bounds=cells.grid(box).bounds, bounds_deg=bounds_deg(cells.grid(box)),
        shape=box.shape, chosen=chosen, least_share=LEAST_SHARE,
    )  # fmt: skip
    what = ("als", round(1000 * cells.gsd_m), statistic)
    scores, resampled = _map_scores(maps, counted, layers, ground, shifts, draws, what)
    of_height = [_keys_of_height(counted.maps[0])]
    groups = [groups_of(counted.maps, keys, counted.missing, [x.bounds is not None for x in layers], draws) for keys in (
        *of_height, _keys_of_cover(counted, parts), _keys_of_polygons(counted, parts))]  # fmt: skip
    finished: list[MapScore] = []
    places: dict[str, tuple[PlaceChip | None, ...]] = {}
    for number, (each, score) in enumerate(zip(maps, scores, strict=True)):
        worst = _places(counted.maps[number], cells)
        by_height, by_cover, by_polygon = (some[number] for some in groups)
        finished.append(
            score.model_copy(
                update={"by_height": by_height, "by_land_cover": by_cover, "by_polygon": by_polygon, "worst": worst}
            )
        )
        places[each.info.name] = tuple(
            picture_of(place, ground, each.height, reference.rasters, maps[0].imagery) for place in worst
        )
    firsts = list(zip([each.info.name for each in maps], [score.measures for score in scores], resampled, strict=True))
    said = STATISTICS[statistic]
    comparison = Comparison(
        title=f"airborne lidar, {cells.gsd_m:g} m" + ("" if statistic == "mean" else f", {said.format(what='heights')}"),
        reference=reference.info(
            statistic, [each.info for each in maps], refused=counted.n_refused, negative=counted.n_negative
        ),
        reference_resampled=reference.rasters.resampled(cells, statistic),
        grid=grid,
        statistic=f"reference: {said.format(what='the lidar canopy height model')}; map: {said.format(what='its heights')}",
        mask=f"cells that the reference and every map know, each of at least {LEAST_SHARE:.0%} of its area",
        n_reference=counted.n_reference,
        square_m=counted.maps[0].square_m,
        maps=tuple(finished),
        differences=tuple(difference_of(firsts[0], other) for other in firsts[1:]),
        land_cover=None if parts.land_cover is None else parts.land_cover.said,
        polygons=None if parts.polygons is None else parts.polygons.said,
        notes=_notes(counted, cells, statistic),
    )
    errors = {each.info.name: picture for each, picture in zip(maps, counted.errors, strict=True)}
    return comparison, Pictured(errors=errors, places=places)


def _layers(each: OpenMap, statistic: Statistic, sites: Sequence[Site], shifts: Sequence[Shift]) -> Layers:
    moves = tuple((site, shift) for site, shift in zip(sites, shifts, strict=True) if shift.applied)
    bounds, means = (each.bounds, each.means) if statistic == "mean" else (None, None)
    return Layers(height=each.height, bounds=bounds, means=means, moves=moves)


def _refuse_empty(counted: Counted, maps: Sequence[OpenMap], reference: OpenReference) -> None:
    if not counted.n_reference:
        raise ScoreError(
            f"{reference.name} holds no known height where {maps[0].info.path} is; give a reference that is not empty there"
        )
    if not counted.maps[0].heights:
        lacking = ", ".join(
            f"{each.info.name} lacks {sums.n_missing}" for each, sums in zip(maps, counted.maps, strict=True)
        )
        raise ScoreError(
            f"of {counted.n_reference} cells with a reference none is known in every map ({lacking}); "
            f"give maps and a reference of the same ground"
        )


def _map_scores(  # noqa: PLR0917 - all that a comparison has
    maps: Sequence[OpenMap],
    counted: Counted,
    layers: Sequence[Layers],
    ground: Ground,
    shifts: Sequence[Sequence[Shift]],
    draws: Draws,
    what: tuple[str | int, ...],
) -> tuple[list[MapScore], tuple[Resampled, ...]]:
    """The scores of the maps but for their groups and places, and the resamples of their measures."""
    measures, resampled = measures_of([sums.heights.values() for sums in counted.maps], draws, *what)
    scores = []
    for number, each in enumerate(maps):
        sums, registered = counted.maps[number], counted.registered[number]
        own = each.height.untouched_by(ground.cells)
        how = OWN_BOUNDS if own else AVERAGED_BOUNDS
        scores.append(
            MapScore(
                name=each.info.name,
                resampled=each.height.resampled(ground.cells, ground.statistic),
                n_missing=sums.n_missing,
                measures=measures[number],
                blocks=blocks_of(sums, draws, *what, "blocks"),
                edges=edges_of(sums, draws, *what, "edges"),
                cover=cover_of(sums, draws, *what),
                by_height=(),
                intervals=None if layers[number].bounds is None else intervals_of(sums, how, draws, *what),
                scatter=scatter_of(sums),
                residuals=residuals_of(sums),
                registered=_registered(shifts[number], registered, draws, what),
            )
        )
    return scores, resampled


def _registered(
    shifts: Sequence[Shift], sums: MapSums | None, draws: Draws, what: tuple[str | int, ...]
) -> Registered | None:  # fmt: skip
    if sums is None or not sums.heights:
        return Registered(shifts=tuple(shifts), measures=None, blocks=None, edges=None) if shifts else None
    (measures,), _ = measures_of([sums.heights.values()], draws, *what, "registered")
    return Registered(
        shifts=tuple(shifts), measures=measures, blocks=blocks_of(sums, draws, *what, "registered blocks"),
        edges=edges_of(sums, draws, *what, "registered edges"),
    )  # fmt: skip


def _keys_of_height(sums: MapSums) -> list[tuple[Key, str]]:
    return [(("height", k), label) for k, label in enumerate(ClassSums.zero(sums.edges_m).labels)]


def _keys_of_cover(counted: Counted, parts: OpenStrata) -> list[tuple[Key, str]]:
    if parts.land_cover is None:
        return []
    numbers = sorted(number for kind, number in counted.missing if kind == "cover")
    check_classes(parts.land_cover.raster.path, numbers)
    return [(("cover", number), parts.land_cover.label(number)) for number in numbers]


def _keys_of_polygons(counted: Counted, parts: OpenStrata) -> list[tuple[Key, str]]:
    """All polygons that hold a cell with a reference."""
    if parts.polygons is None:
        return []
    return [(("polygon", k), name) for k, name in enumerate(parts.polygons.names) if ("polygon", k) in counted.missing]


def _places(sums: MapSums, cells: Cells) -> tuple[Place, ...]:
    """The worst blocks of ground, the worst first."""
    side = sums.cut.block_px
    to_degrees = Transformer.from_crs(cells.crs, "EPSG:4326", always_xy=True)
    found = []
    for spot in sorted(sums.worst, key=lambda spot: (-spot.off_m, spot.row, spot.col)):
        box = Box(spot.row * side, spot.col * side, (spot.row + 1) * side, (spot.col + 1) * side)
        bounds = cells.grid(box).bounds
        lon, lat = to_degrees.transform((bounds[0] + bounds[2]) / 2, (bounds[1] + bounds[3]) / 2)
        found.append(
            Place(
                lon_deg=lon, lat_deg=lat, bounds=bounds, n=spot.n, mean_error_m=spot.map_mean_m - spot.reference_mean_m,
                map_mean_m=spot.map_mean_m, reference_mean_m=spot.reference_mean_m,
            )
        )  # fmt: skip
    return tuple(found)


def _notes(counted: Counted, cells: Cells, statistic: Statistic) -> tuple[str, ...]:
    notes = []
    if statistic != "mean":
        notes.append("Intervals are for heights of pixels and say nothing of a statistic of many: coverage is not given.")
    if not counted.cut.block_px:
        notes.append(f"Cells of {cells.gsd_m:g} m are larger than the blocks of 30 m, of which nothing is therefore said.")
    if counted.maps[0].level:
        notes.append(
            f"The ground is large: intervals are drawn from squares of {counted.maps[0].square_m:g} m instead of "
            f"{RESAMPLED_M:g} m."
        )
    return tuple(notes)

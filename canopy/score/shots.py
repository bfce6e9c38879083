"""Maps against GEDI and ICESat-2 shots and field plots: the same measures, of footprints instead of cells."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict

from canopy.errors import ScoreError
from canopy.metrics import ClassSums, class_index
from canopy.score.atl08 import Atl08Settings
from canopy.score.footprint import (
    BLOCK_M,
    LEAST_KNOWN,
    OUTCOMES,
    UNKNOWN,
    FootprintResult,
    Shots,
    on_same_shots,
    sample_footprints,
    statistic_name,
)
from canopy.score.gedi import GediSettings
from canopy.score.geolocation import Relocated, relocate
from canopy.score.maps import OpenMap
from canopy.score.measures import Draws, cover_of, difference_of, groups_of, measures_of, residuals_of, scatter_of
from canopy.score.plots import PlotSettings
from canopy.score.reference import gap_days
from canopy.score.result import Comparison, FilterCount, Footprints, MapScore, ReferenceInfo, Registered, Shift, Shot
from canopy.score.sums import Key, MapSums, Squares

MOST_SHOTS: Final = 4000
"""Shots that a result keeps one by one, for a figure; of more, every so many-th."""

TITLES: Final = {"gedi": "GEDI L2A shots", "atl08": "ICESat-2 ATL08 segments", "plots": "field plots"}

Kind = Literal["gedi", "atl08", "plots"]


class ShotSettings(BaseModel):
    """Which shots count and how plots are read: the tables of the file that `--settings` names."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    gedi: GediSettings = GediSettings()
    atl08: Atl08Settings = Atl08Settings()
    plots: PlotSettings | None = None
    relocate: bool = False
    """Whether GEDI and ICESat-2 shots are also scored where each track fits the map best, beside where they say they are."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Reference:
    """Shots of one kind and the files they come from."""

    kind: Kind
    files: tuple[Path, ...]
    shots: Shots


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Sampled:
    """Maps in the footprints of one reference, all on the same ones."""

    reference: Reference
    maps: tuple[OpenMap, ...]
    alone: tuple[FootprintResult, ...]
    """Of each map by itself."""
    results: tuple[FootprintResult, ...]
    """On the shots that all maps have."""
    relocated: tuple[Relocated | None, ...]
    """The same with each track moved to where it fits the map best; None where that was not asked for."""

    @property
    def lonlat_deg(self) -> tuple[np.ndarray, np.ndarray]:
        """Longitudes and latitudes of the compared shots."""
        lon, lat = self.reference.shots.lonlat_deg
        compared = self.results[0].compared
        return lon[compared], lat[compared]


def sample(reference: Reference, maps: Sequence[OpenMap], *, relocated: bool = False) -> Sampled:
    """Ask maps for their heights in footprints.

    Args:
        reference: The footprints.
        maps: The maps.
        relocated: Whether to ask them also where each track fits best; field plots have no tracks.

    Raises:
        ScoreError: a map is no single raster, or no footprint is known in all of them.
        RasterError: a map cannot be read.
    """
    alone = []
    for each in maps:
        if len(each.height.files) > 1 or each.info.band != 1 or not each.height.starts_at_zero:
            raise ScoreError(
                f"{each.info.path} must be one raster with the heights in band 1 and no offset to be held against "
                f"{TITLES[reference.kind]}; make a VRT of it first, for example gdalbuildvrt -b {each.info.band} map.vrt …"
            )
        alone.append(sample_footprints(each.height_path, reference.shots, height_unit_m=each.height.unit_m))
    results = on_same_shots(*alone)
    if not results[0].compared.any():
        names = ", ".join(each.info.name for each in maps)
        raise ScoreError(
            f"no footprint of {reference.shots.source} is left to compare with {names}: {alone[0].account()}; choose other "
            f"files, or loosen the filters with --settings"
        )
    moved = [
        relocate(each.height_path, result, height_unit_m=each.height.unit_m)
        if relocated and reference.kind != "plots"
        else None
        for each, result in zip(maps, results, strict=True)
    ]
    return Sampled(reference=reference, maps=tuple(maps), alone=tuple(alone), results=results, relocated=tuple(moved))


def compared(sampled: Sampled, draws: Draws) -> Comparison:
    """What is said of maps in footprints."""
    reference, results, maps = sampled.reference, sampled.results, sampled.maps
    shots, kind = reference.shots, reference.kind
    sums = [_sums(result) for result in results]
    measures, resampled = measures_of([each.heights.values() for each in sums], draws, kind)
    labels = ClassSums.zero(sums[0].edges_m).labels
    keys: list[tuple[Key, str]] = [(("height", k), label) for k, label in enumerate(labels)]
    unknown = OUTCOMES.index(UNKNOWN)
    lacking = np.logical_or.reduce([result.outcome == unknown for result in sampled.alone])
    missing: dict[Key, int] = {
        ("height", k): int((lacking & (class_index(shots.height_m, sums[0].edges_m) == k)).sum()) for k in range(len(labels))
    }
    groups = groups_of(sums, keys, missing, [False] * len(maps), draws)
    scores = tuple(
        MapScore(
            name=each.info.name,
            resampled=f"{statistic_name(shots.statistic)} of its pixels whose centre lies in the footprint",
            n_missing=int((result.outcome == unknown).sum()),
            measures=one,
            blocks=None,
            edges=None,
            cover=cover_of(mine, draws, kind),
            by_height=by_height,
            intervals=None,
            scatter=scatter_of(mine),
            residuals=residuals_of(mine),
            registered=_registered(moved, draws, kind),
            shots=_sample(narrowed),
        )
        for each, result, narrowed, moved, mine, one, by_height in zip(
            maps, sampled.alone, results, sampled.relocated, sums, measures, groups, strict=True
        )
    )
    firsts = list(zip([each.info.name for each in maps], measures, resampled, strict=True))
    days = shots.date[results[0].compared]
    days = days[~np.isnat(days)]
    dates = () if len(days) < int(results[0].compared.sum()) else tuple(dict.fromkeys((str(days.min()), str(days.max()))))
    gaps = [gap_days(dates, each.info.date) for each in maps]
    return Comparison(
        title=TITLES[kind],
        reference=ReferenceInfo(
            kind=kind,
            name=shots.source,
            files=tuple(str(path) for path in reference.files),
            dates=dates,
            gap_days=None if any(gap is None for gap in gaps) else max(gap for gap in gaps if gap is not None),
            statistic=f"{shots.source} of the footprint",
            gsd_m=None,
            crs=shots.crs.to_string(),
            mask="; ".join(f"none {name}" for name in shots.dropped) or "all",
        ),
        reference_resampled="not resampled: a height a footprint",
        grid=None,
        footprints=Footprints(
            shape=shots.shape,
            map_statistic=statistic_name(shots.statistic),
            n_read=shots.read,
            removed=tuple(FilterCount(name=name, n=n) for name, n in results[0].dropped.items()),
            notes=shots.notes,
        ),
        statistic=f"reference: {shots.source}; map: {statistic_name(shots.statistic)} of its pixels in the footprint",
        mask=f"footprints of which every map knows at least {LEAST_KNOWN:.0%}",
        n_reference=int((results[0].compared | lacking).sum()),
        square_m=BLOCK_M,
        maps=scores,
        differences=tuple(difference_of(firsts[0], other) for other in firsts[1:]),
        notes=(
            "Pixel intervals say nothing of a statistic of many pixels, so that coverage is not given here.",
            "Blocks, edges, land cover and polygons need a reference with pixels.",
        ),
    )


def _sums(result: FootprintResult) -> MapSums:
    """The sums of the compared shots by square of ground."""
    sums = MapSums(Squares(gsd_m=BLOCK_M, block_px=0, side_px=1))
    compared = result.compared
    squares, place = np.unique(result.block_index()[compared], axis=0, return_inverse=True)
    map_m, reference_m = result.map_m[compared], result.shots.height_m[compared]
    classes = class_index(reference_m, sums.edges_m)
    for number, (row, col) in enumerate(squares.tolist()):
        here = place == number
        sums.add_heights((row, col), map_m[here], reference_m[here])
        for k in np.unique(classes[here]).tolist():
            some = here & (classes == k)
            sums.add_group(("height", k), (row, col), map_m[some], reference_m[some])
        if sums.too_many:
            sums.coarsen()
    return sums


def _registered(relocated: Relocated | None, draws: Draws, kind: Kind) -> Registered | None:
    """The measures of the moved shots beside the raw ones; a map moves the other way than the shots."""
    if relocated is None:
        return None
    shifts = tuple(
        Shift(
            site=each.track,
            x_m=None if each.east_m is None else 0.0 - each.east_m,
            y_m=None if each.north_m is None else 0.0 - each.north_m,
            agreement_before=each.agreement_before,
            agreement_after=each.agreement_after,
            applied=each.applied,
            reason=each.reason,
        )
        for each in relocated.shifts
    )
    if not any(shift.applied for shift in shifts):
        return Registered(shifts=shifts, measures=None, blocks=None, edges=None)
    (measures,), _ = measures_of([_sums(relocated.result).heights.values()], draws, kind, "registered")
    return Registered(shifts=shifts, measures=measures, blocks=None, edges=None)


def _sample(result: FootprintResult) -> tuple[Shot, ...]:
    lon, lat = result.shots.lonlat_deg
    chosen = np.flatnonzero(result.compared)
    chosen = chosen[:: max(1, -(-len(chosen) // MOST_SHOTS))]
    return tuple(
        Shot(
            lon_deg=float(lon[k]), lat_deg=float(lat[k]), reference_m=float(result.shots.height_m[k]),
            map_m=float(result.map_m[k]),
        )
        for k in chosen
    )  # fmt: skip

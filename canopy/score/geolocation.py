"""Where the shots of a track really lie: one shift a track, found by the map, told beside the raw score.

Shots of spaceborne lidar lie some metres from where they say: GEDI's about 10 m (one standard deviation), which at the edge
of a stand is another stand. Most of that error is the same for all shots that a beam makes within seconds. So each track may
be moved as a whole, within what the error can be, to where the map agrees best with it.

The best of many shifts agrees better than none whatever the truth is, and best of all with a map that is wrong in the same
places. Two things are done about it. The agreement is the correlation, so a shift does not make up for a bias. And what is
told of a shift is held out: the shots of a track are split in two halves, each is scored where the other one fits best, and
the shift is applied only if that is better than no shift and both halves ask for nearly the same. A score of moved shots is
still a score of the most favourable places, so it stands beside the raw one and never replaces it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

import numpy as np
from numpy.typing import NDArray

from canopy.errors import SourceError
from canopy.score.footprint import FootprintResult, sample_footprints, sample_shifted

REACH_M: Final = 20.0
"""Default of how far a track may be moved in each direction: two standard deviations of GEDI's error."""

STEP_M: Final = 4.0
"""Default distance of the shifts tried: a footprint of 24 m says little of less."""

LEAST_SHOTS: Final = 40
"""Tracks with fewer compared shots are left where they are: a correlation of 20 shots, half of them, is off by 0.2."""

MOST_SHOTS: Final = 400
"""Of tracks with more, so many are asked, evenly spread."""

_RUN: Final = 4
"""Shots in a row that go into the same half: neighbours are alike, and so would be halves of every other shot."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TrackShift:
    """How far the shots of one track lie off the map."""

    track: str
    n: int
    """Compared shots that were asked."""
    east_m: float | None
    """How far the shots have to move east to fit the map best; None where it could not be measured."""
    north_m: float | None
    """How far north."""
    agreement_before: float | None
    """Correlation of map and reference as they are: the mean of the two halves."""
    agreement_after: float | None
    """The same with each half where the other fits best."""
    applied: bool
    reason: str
    """Why it was applied or not."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Relocated:
    """A map in footprints that were moved track by track."""

    result: FootprintResult
    """Of the shots compared before, those of tracks without a shift where they were."""
    shifts: tuple[TrackShift, ...]
    """One a track with a compared shot."""


def relocate(
    height: Path,
    raw: FootprintResult,
    *,
    reach_m: float = REACH_M,
    step_m: float = STEP_M,
    least_shots: int = LEAST_SHOTS,
    height_unit_m: float | None = None,
) -> Relocated:
    """Move the shots of each track to where the map agrees best with them.

    Args:
        height: The map.
        raw: What it says where the shots are.
        reach_m: How far a track may be moved in each direction.
        step_m: Distance of the shifts tried.
        least_shots: Compared shots that a track must have.
        height_unit_m: As `sample_footprints`.

    Raises:
        SourceError: not 0 < step <= reach.
        RasterError: as `sample_footprints`.
    """
    if not 0 < step_m <= reach_m < math.inf:
        raise SourceError(
            f"shifts every {step_m:g} m up to {reach_m:g} m are none; give 0 < step <= reach, such as 4 and 20"
        )
    steps = round(reach_m / step_m)
    axis_m = np.arange(-steps, steps + 1) * step_m
    candidates = [(float(east), float(north)) for north in axis_m for east in axis_m]
    shots = raw.shots
    asked = [_spread(np.flatnonzero(raw.compared & (shots.track == track))) for track in range(len(shots.tracks))]
    enough = [track for track, index in enumerate(asked) if len(index) >= least_shots]
    index = np.concatenate([asked[track] for track in enough]) if enough else np.zeros(0, dtype=np.intp)
    moved = sample_shifted(height, shots.part(index), candidates, least_known=raw.least_known, height_unit_m=height_unit_m)
    map_m = np.array([result.map_m for result in moved])
    part = moved[0].shots

    shifts = []
    east_m, north_m = np.zeros(len(shots)), np.zeros(len(shots))
    for track, name in enumerate(shots.tracks):
        if not len(asked[track]):
            continue
        if track not in enough:
            shifts.append(_kept(name, len(asked[track]), f"{len(asked[track])} shots are fewer than {least_shots}"))
            continue
        mine = part.track == track
        shift = _shift_of(
            name,
            map_m=map_m[:, mine],
            reference_m=part.height_m[mine],
            candidates=candidates,
            least_shots=least_shots,
            step_m=step_m,
        )
        shifts.append(shift)
        if shift.applied:
            east_m[shots.track == track], north_m[shots.track == track] = shift.east_m, shift.north_m
    result = sample_footprints(
        height, shots, least_known=raw.least_known, height_unit_m=height_unit_m, east_m=east_m, north_m=north_m
    )
    # The same shots as before, or fewer: what one score has and the other lacks would be taken for the effect of the move.
    result = replace(
        result,
        map_m=np.where(raw.compared, result.map_m, np.nan),
        outcome=np.where(raw.compared, result.outcome, raw.outcome),
    )
    return Relocated(result=result, shifts=tuple(shifts))


def _spread(index: NDArray[np.intp]) -> NDArray[np.intp]:
    if len(index) <= MOST_SHOTS:
        return index
    return index[np.linspace(0, len(index) - 1, MOST_SHOTS).round().astype(np.intp)]


def _kept(track: str, n: int, reason: str) -> TrackShift:
    return TrackShift(
        track=track,
        n=n,
        east_m=None,
        north_m=None,
        agreement_before=None,
        agreement_after=None,
        applied=False,
        reason=reason,
    )


def _shift_of(
    track: str,
    *,
    map_m: NDArray[np.float64],
    reference_m: NDArray[np.float64],
    candidates: list[tuple[float, float]],
    least_shots: int,
    step_m: float,
) -> TrackShift:
    """The shift of one track.

    Args:
        track: Its name.
        map_m: (candidate, shot) what the map says.
        reference_m: (shot,).
        candidates: Shifts, metres east and north.
        least_shots: Shots that must be known in all of them.
        step_m: Distance of the candidates.
    """
    known = np.isfinite(map_m).all(axis=0)  # the same shots for all shifts, or the agreements would not compare
    n = int(known.sum())
    if n < least_shots:
        return _kept(track, n, f"{n} shots that the map knows wherever they are moved are fewer than {least_shots}")
    map_m, reference_m = map_m[:, known], reference_m[known]
    second = np.arange(n) // _RUN % 2 == 1
    agreement = np.array([_correlations(map_m[:, half], reference_m[half]) for half in (~second, second)])
    whole = _correlations(map_m, reference_m)
    here = candidates.index((0.0, 0.0))
    if not (np.isfinite(agreement).any(axis=1).all() and np.isfinite(agreement[:, here]).all()):
        return _kept(
            track, n, "the map or the reference has one height along the track, so no place fits better than another"
        )
    best = [int(np.nanargmax(each)) for each in agreement]
    before = float(agreement[:, here].mean())
    after = float((agreement[0, best[1]] + agreement[1, best[0]]) / 2)
    chosen = int(np.nanargmax(whole))
    east_m, north_m = candidates[chosen]
    edge_m = max(candidates)[0]
    apart_m = math.dist(candidates[best[0]], candidates[best[1]])
    against = None
    if chosen == here:
        against = "the shots fit best where they are"
    elif not after > before:
        against = f"held out it does not help: agreement {before:.3f} before and {after:.3f} after"
    elif apart_m > 2 * step_m:
        against = f"the two halves of the track ask for shifts {apart_m:.0f} m apart"
    elif max(abs(east_m), abs(north_m)) >= edge_m:
        against = f"the best fit is at the end of the search, {edge_m:g} m, and may lie beyond it"
    return TrackShift(
        track=track,
        n=n,
        east_m=east_m,
        north_m=north_m,
        agreement_before=before,
        agreement_after=after,
        applied=against is None,
        reason=against or f"held out, the agreement rises from {before:.3f} to {after:.3f}",
    )


def _correlations(map_m: NDArray[np.float64], reference_m: NDArray[np.float64]) -> NDArray[np.float64]:
    """(candidate,) Pearson's correlation; NaN where either does not vary."""
    map_m = map_m - map_m.mean(axis=1, keepdims=True)
    reference_m = reference_m - reference_m.mean()
    spread = np.sqrt((map_m**2).sum(axis=1) * (reference_m**2).sum())
    return np.asarray((map_m @ reference_m) / np.where(spread > 0, spread, np.nan))

"""Reference heights from ICESat-2 ATL08 granules: the 98 % height of the canopy photons of a segment.

ATL08 gives heights along the ground track of each beam: of segments of 100 m and, from release 5 on, of the five parts of
20 m of each. `h_canopy` and `h_canopy_20m` are the 98th percentile of the heights above ground of the photons that were
classified as canopy (ATL08 algorithm document, parameters 2.2.6 and 2.2.7). What comes nearest in a map is the 98th
percentile of its pixels within 7 m of a 20 m segment's centre; of a 100 m segment, which a disc of 7 m says nothing about,
that of all pixels within 7 m of its line.

Segments in which no photon was classified as canopy have no height, not 0 m. So open ground is not in this reference, and a
map that puts trees where there are none is not found out by it.

The places are float32 degrees: off by up to 0.4 m at longitudes beyond 64 degrees and 0.8 m beyond 128. The geolocation
itself is good to some 4 m.
"""

from __future__ import annotations

from typing import Final, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from canopy.errors import SourceError
from canopy.score.footprint import WGS84, Shots
from canopy.score.granule import Granule, Paths, granule_paths, open_granule
from canopy.score.sieve import TWICE, Sieve, SiftSettings, add_up

BEAMS: Final = ("gt1l", "gt1r", "gt2l", "gt2r", "gt3l", "gt3r")

TURNING: Final = "with strong and weak beams not known"
WEAK: Final = "of weak beams"
DAY: Final = "by day"
CLOUD: Final = "under cloud"
SCATTERING: Final = "with scattering, or unknown"
NO_DIRECTION: Final = "without a direction"

PART_M: Final = 20.0
SEGMENT_M: Final = 100.0

_STRONG_SIDE: Final = {0: "l", 1: "r"}
"""Of each pair the beam on this side is the strong one while the satellite flies backward (0) or forward (1)."""

_UNKNOWN_M: Final = -999.0
"""Some releases hold this, or less, where there is no height, beside the fill value that they declare."""

_NEIGHBOUR_M: Final = 5000.0
"""Segments further apart do not say in which direction the track runs between them."""

NO_OPEN_GROUND: Final = "segments without canopy photons have no height in ATL08, so open ground is not in this reference"


class Atl08Settings(SiftSettings):
    """Which segments count; the defaults are those of the studies that validate metre-resolution maps with ICESat-2."""

    strong_beams: bool = True
    """Only the three strong beams; while the satellite turns nobody knows which these are, and all segments are dropped."""
    night: bool = True
    """Only segments with `night_flag` 1."""
    cloud_free: bool = False
    """Only segments with `cloud_flag_atm` 0."""
    no_scattering: bool = False
    """Only segments with `msw_flag` 0: no warning of photons scattered by cloud, fog or blowing snow."""
    segment_m: Literal[20, 100] | None = None
    """Length of the segments; None takes those of 20 m where a granule has them, and those of 100 m where it does not."""
    radius_m: float = Field(default=7.0, gt=0, le=50)
    """What lies so near to the centre of a 20 m segment, or to the line of a 100 m segment, is compared with it."""


def read_atl08(paths: Paths, settings: Atl08Settings | None = None) -> Shots:
    """The segments of ATL08 granules (HDF5, releases 5 to 7 and, with segments of 100 m only, before) that pass the filters.

    The filters are applied in the order of the settings; a segment that one takes away does not reach the next. A shot is a
    segment of 20 m or of 100 m.

    Args:
        paths: A granule, several, or a folder of them.
        settings: Which segments count; default `Atl08Settings()`.

    Raises:
        SourceError: no granule; packed, damaged, no HDF5 or of another product; without a field that is needed; or with
            dates or units that cannot be.
    """
    settings = settings or Atl08Settings()
    beams: list[_Beam] = []
    notes = {NO_OPEN_GROUND: None}
    for path in granule_paths(paths):
        with open_granule(path, product="ATL08", title="an ICESat-2 ATL08 granule") as granule:
            names = [name for name in granule.groups if name in BEAMS and granule.has(f"{name}/land_segments/latitude")]
            if not names:
                raise SourceError(
                    f"{path} has no segments of land (no gt1l to gt3r with land_segments); give an ATL08 granule over land"
                )
            fine = settings.segment_m == PART_M or (
                settings.segment_m is None
                and all(granule.has(f"{name}/land_segments/canopy/h_canopy_20m") for name in names)
            )
            if not fine and settings.segment_m is None:
                notes[f"{path.name} has no heights of 20 m segments: those of 100 m are taken"] = None
            strong = _strong_beams(granule, names) if settings.strong_beams else {}
            beams.extend(_Beam(granule, name, settings, fine=fine, strong=strong.get(name, True)) for name in names)

    dropped: dict[str, int] = {}
    for beam in beams:
        add_up(dropped, beam.sieve.dropped)
    ids = np.concatenate([beam.id for beam in beams])
    count = len(ids)
    shots = Shots(
        source="ICESat-2 ATL08 h_canopy",
        statistic="p98",
        crs=WGS84,
        x=np.concatenate([beam.lon_deg for beam in beams]),
        y=np.concatenate([beam.lat_deg for beam in beams]),
        height_m=np.concatenate([beam.height_m for beam in beams]),
        radius_m=np.full(count, settings.radius_m),
        half_length_m=np.concatenate([beam.half_length_m for beam in beams]),
        azimuth_deg=np.concatenate([beam.azimuth_deg for beam in beams]),
        date=np.concatenate([beam.day for beam in beams]),
        id=ids,
        track=np.repeat(np.arange(len(beams)), [len(beam.id) for beam in beams]),
        tracks=tuple(beam.name for beam in beams),
        read=sum(beam.read for beam in beams),
        dropped=dropped,
        notes=tuple(notes),
    )
    _, first = np.unique(ids, return_index=True)
    again = np.ones(count, dtype=bool)
    again[first] = False
    return shots.without(TWICE, again)


def _strong_beams(granule: Granule, names: list[str]) -> dict[str, bool | None]:
    """Which beams are strong; None while the satellite turns.

    Raises:
        SourceError: the granule does not say how the satellite flies, or says it in two ways that disagree.
    """
    found = np.unique(granule.column("orbit_info/sc_orient", option="set strong_beams = false"))
    side = _STRONG_SIDE.get(int(found[0])) if len(found) == 1 else None
    if side is None:
        return dict.fromkeys(names)
    strong: dict[str, bool | None] = {name: name.endswith(side) for name in names}
    for name in names:
        said = granule.attribute(name, "atlas_beam_type")
        if said in ("strong", "weak") and (said == "strong") != strong[name]:
            raise SourceError(
                f"{granule.path}: {name} is said to be a {said} beam, but with sc_orient {int(found[0])} it is not; give "
                f"the granule as delivered"
            )
    return strong


class _Beam:
    """The segments of one beam that pass the filters."""

    def __init__(self, granule: Granule, beam: str, settings: Atl08Settings, *, fine: bool, strong: bool | None) -> None:
        self.name = f"{granule.path.stem}/{beam}"
        land = f"{beam}/land_segments"
        parts = round(SEGMENT_M / PART_M) if fine else 1
        ending = "_20m" if fine else ""
        lon_deg, lat_deg = (granule.numbers(f"{land}/{axis}{ending}") for axis in ("longitude", "latitude"))
        height_m = granule.numbers(f"{land}/canopy/h_canopy{ending}", unit="m")
        shape = (len(lon_deg), parts) if fine else (len(lon_deg),)
        if not lon_deg.shape == lat_deg.shape == height_m.shape == shape:
            raise SourceError(
                f"{granule.path}: {land} has places of shape {lon_deg.shape} and heights of shape {height_m.shape}, not "
                f"{shape}; give the granule as delivered"
            )
        height_m[height_m <= _UNKNOWN_M] = np.nan
        lon_deg, lat_deg, height_m = lon_deg.ravel(), lat_deg.ravel(), height_m.ravel()

        def flag(field: str, option: str) -> NDArray[np.float64]:
            return np.repeat(granule.numbers(f"{land}/{field}", option=option), parts)

        self.read = len(height_m)
        self.sieve = sieve = Sieve(self.read)
        sieve.drop_outside(lon_deg, lat_deg, settings.bounds_deg)
        day = np.repeat(granule.days(f"{land}/delta_time"), parts)
        sieve.drop_dates(day, settings.since, settings.until)
        if settings.strong_beams:
            sieve.drop(TURNING, np.full(self.read, strong is None))
            sieve.drop(WEAK, np.full(self.read, strong is False))
        if settings.night:
            sieve.drop(DAY, flag("night_flag", "set night = false") != 1)
        if settings.cloud_free:
            sieve.drop(CLOUD, flag("cloud_flag_atm", "set cloud_free = false") != 0)
        if settings.no_scattering:
            sieve.drop(SCATTERING, flag("msw_flag", "set no_scattering = false") != 0)
        sieve.drop_heights(height_m)
        azimuth_deg = np.zeros(self.read) if fine else _azimuths(lon_deg, lat_deg)
        if not fine:
            sieve.drop(NO_DIRECTION, np.isnan(azimuth_deg))

        left = sieve.left
        self.lon_deg, self.lat_deg, self.height_m = lon_deg[left], lat_deg[left], height_m[left]
        self.azimuth_deg, self.day = azimuth_deg[left], day[left]
        # A segment is all within the radius of its line, so its ends are round and the line is shorter by two radii.
        self.half_length_m = np.full(len(self.day), 0.0 if fine else SEGMENT_M / 2 - settings.radius_m)
        first = granule.column(f"{land}/segment_id_beg").astype(np.int64)
        number = (np.repeat(first, parts) + np.tile(np.arange(parts), len(first)))[left]
        orbit = self._orbit(granule)
        self.id = np.char.add(f"{orbit}-{beam}-{'20' if fine else '100'}m-", number.astype(np.str_))

    @staticmethod
    def _orbit(granule: Granule) -> str:
        """What a segment's number is unique in: ground track and cycle, or the file where it does not name them."""
        fields = ("orbit_info/rgt", "orbit_info/cycle_number")
        if not all(granule.has(field) for field in fields):
            return granule.path.stem
        return "-".join(str(int(granule.column(field).ravel()[0])) for field in fields)


def _azimuths(lon_deg: NDArray[np.float64], lat_deg: NDArray[np.float64]) -> NDArray[np.float64]:
    """Directions of the track at its segments, degrees from north, from the neighbours of each; NaN without one near."""
    if len(lon_deg) < 2:
        return np.full(len(lon_deg), np.nan)
    before, after = np.arange(len(lon_deg)) - 1, np.arange(len(lon_deg)) + 1
    before[0], after[-1] = 0, len(lon_deg) - 1
    metres = np.radians(1.0) * 6_371_000.0
    north_m = (lat_deg[after] - lat_deg[before]) * metres
    across_deg = (lon_deg[after] - lon_deg[before] + 180) % 360 - 180
    east_m = across_deg * np.cos(np.radians(lat_deg)) * metres
    azimuth = np.asarray(np.degrees(np.arctan2(east_m, north_m)) % 360)
    azimuth[~(np.hypot(east_m, north_m) <= _NEIGHBOUR_M)] = np.nan
    return azimuth

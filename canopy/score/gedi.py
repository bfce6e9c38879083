"""Reference heights from GEDI L2A granules: RH98 of the shots that are good enough to judge a map by.

A shot is a disc of about 25 m; 98 % of the energy that its canopy and ground returned came from below RH98. What comes
nearest in a map is the 98th percentile of its pixels within 12 m of the shot. It is not the same: RH98 is of energy, so a
sparse top weighs less than its area, and on a slope the ground itself reaches up. And a shot lies within about 10 m (one
standard deviation, version 2 of the product) of where it says, so along edges the two are of different trees.

The shots kept by default are those that studies of maps keep: of full power beams, at night, leaf-on, with a sensitivity of
at least 0.95, with the quality flag and without the flag of degraded pointing, and with a ground within 150 m of the terrain
model that the product carries. All else is counted by reason.
"""

from __future__ import annotations

import re
from typing import Final, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from canopy.errors import SourceError
from canopy.score.footprint import MAX_REACH_M, WGS84, Shots
from canopy.score.granule import Granule, Paths, granule_paths, open_granule
from canopy.score.sieve import TWICE, Sieve, SiftSettings, add_up

POWER_BEAMS: Final = ("BEAM0101", "BEAM0110", "BEAM1000", "BEAM1011")
"""The beams of the two lasers that are not split; the others, coverage beams, have half their energy."""

_BEAM = re.compile(r"BEAM[01]{4}")

COVERAGE = "of coverage beams"
QUALITY = "without the quality flag"
DEGRADED = "degraded in pointing or position"
SENSITIVITY = "below the sensitivity"
DAY = "by day"
LEAF_OFF = "leaf-off"
LEAF_UNKNOWN = "without a leaf-off flag"
NO_TERRAIN = "without a terrain model"
GROUND = "with a ground far from the terrain model"

_NO_TERRAIN_M: Final = -9999.0
"""The terrain model's fill values, -999999 and others, lie below; no land does."""

_VERSION_1: Final = 2
"""The last processing (PGE version) of version 1 of the product."""


class GediSettings(SiftSettings):
    """Which shots count; the defaults are those of the studies that validate metre-resolution maps with GEDI."""

    power_beams: bool = True
    """Only the four beams of full power."""
    quality: bool = True
    """Only shots with `quality_flag` 1."""
    not_degraded: bool = True
    """Only shots with `degrade_flag` 0."""
    least_sensitivity: float = Field(default=0.95, ge=0, le=1)
    """Least canopy cover through which the shot would have seen the ground; 0 takes all shots."""
    night: bool = True
    """Only shots with the sun below the horizon."""
    leaf_on: bool = True
    """Only shots with `leaf_off_flag` 0."""
    leaf_unknown: Literal["keep", "drop"] = "keep"
    """What to do with shots that have no such flag (255, or a granule of version 1); those kept are counted in the notes."""
    most_ground_gap_m: float = Field(default=150.0, gt=0)
    """Largest distance of the ground found from the product's terrain model; inf takes all shots."""
    rh: int = Field(default=98, ge=0, le=100)
    """Which relative height; the map is asked for the percentile of the same number."""
    radius_m: float = Field(default=12.0, gt=0, le=MAX_REACH_M)
    """Radius of the disc in which the map is asked."""


def read_gedi(paths: Paths, settings: GediSettings | None = None) -> Shots:
    """The shots of GEDI L2A granules (HDF5) that pass the filters.

    The filters are applied in the order of the settings; a shot that one takes away does not reach the next. Of a granule
    only the rows are read that the rectangle leaves.

    Args:
        paths: A granule, several, or a folder of them.
        settings: Which shots count; default `GediSettings()`.

    Raises:
        SourceError: no granule; packed, damaged, no HDF5 or of another product; without a field that a filter needs; or
            with dates or units that cannot be.
    """
    settings = settings or GediSettings()
    beams: list[_Beam] = []
    notes: dict[str, None] = {}
    for path in granule_paths(paths):
        with open_granule(path, product="GEDI_L2A", title="a GEDI L2A granule") as granule:
            names = [name for name in granule.groups if _BEAM.fullmatch(name)]
            if not names:
                raise SourceError(f"{path} has no group BEAMxxxx, so no shots; give a GEDI L2A granule as delivered")
            beams.extend(_Beam(granule, name, settings) for name in names)
            processing = granule.attribute("METADATA/DatasetIdentification", "PGEVersion") or ""
            if processing.isdigit() and int(processing) <= _VERSION_1:
                notes[
                    f"{path.name} is of version 1 of the product, whose shots lie about 20 m off (one standard deviation), "
                    f"twice as far as those of version 2"
                ] = None
    if unknown := sum(beam.leaf_unknown for beam in beams):
        notes[f"{unknown:,} shots kept without a leaf-off flag: nobody says whether the trees had leaves"] = None

    dropped: dict[str, int] = {}
    for beam in beams:
        add_up(dropped, beam.sieve.dropped)
    number = np.concatenate([beam.number for beam in beams])
    count = len(number)
    shots = Shots(
        source=f"GEDI L2A RH{settings.rh}",
        statistic=f"p{settings.rh}",
        crs=WGS84,
        x=np.concatenate([beam.lon_deg for beam in beams]),
        y=np.concatenate([beam.lat_deg for beam in beams]),
        height_m=np.concatenate([beam.height_m for beam in beams]),
        radius_m=np.full(count, settings.radius_m),
        half_length_m=np.zeros(count),
        azimuth_deg=np.zeros(count),
        date=np.concatenate([beam.day for beam in beams]),
        id=number.astype(np.str_),
        track=np.repeat(np.arange(len(beams)), [len(beam.number) for beam in beams]),
        tracks=tuple(beam.name for beam in beams),
        read=sum(beam.read for beam in beams),
        dropped=dropped,
        notes=tuple(notes),
    )
    _, first = np.unique(number, return_index=True)
    again = np.ones(count, dtype=bool)
    again[first] = False
    return shots.without(TWICE, again)


class _Beam:
    """The shots of one beam that pass the filters."""

    def __init__(self, granule: Granule, beam: str, settings: GediSettings) -> None:
        self.name = f"{granule.path.stem}/{beam}"
        lon_deg = granule.numbers(f"{beam}/lon_lowestmode")
        lat_deg = granule.numbers(f"{beam}/lat_lowestmode")
        self.read = len(lon_deg)
        # Where the rectangle leaves nothing nothing more is read; else the rows between the first and the last it leaves.
        place = Sieve(self.read)
        place.drop_outside(lon_deg, lat_deg, settings.bounds_deg)
        near = np.flatnonzero(place.left)
        rows = slice(int(near[0]), int(near[-1]) + 1) if near.size else slice(0, 0)
        self.sieve = sieve = Sieve(rows.stop - rows.start)
        sieve.dropped = dict(place.dropped)
        sieve.left = place.left[rows]

        def number_of(field: str, option: str = "") -> NDArray[np.float64]:
            return granule.numbers(f"{beam}/{field}", rows, option=option)

        day = granule.days(f"{beam}/delta_time", rows)
        sieve.drop_dates(day, settings.since, settings.until)
        if settings.power_beams:
            sieve.drop(COVERAGE, np.full(len(day), beam not in POWER_BEAMS))
        if settings.quality:
            sieve.drop(QUALITY, number_of("quality_flag", "set quality = false") != 1)
        if settings.not_degraded:
            sieve.drop(DEGRADED, number_of("degrade_flag", "set not_degraded = false") != 0)
        if settings.least_sensitivity > 0:
            sensitivity = number_of("sensitivity", "set least_sensitivity = 0")
            sieve.drop(SENSITIVITY, ~(sensitivity >= settings.least_sensitivity))
        if settings.night:
            sieve.drop(DAY, ~(number_of("solar_elevation", "set night = false") < 0))
        self.leaf_unknown = 0
        unknown = self._filter_leaves(granule, beam, rows, settings) if settings.leaf_on else np.zeros(len(day), dtype=bool)
        if np.isfinite(settings.most_ground_gap_m):
            option = "set most_ground_gap_m = inf"
            terrain_m = granule.numbers(f"{beam}/digital_elevation_model", rows, option=option, unit="m")
            ground_m = granule.numbers(f"{beam}/elev_lowestmode", rows, option=option, unit="m")
            sieve.drop(NO_TERRAIN, ~(terrain_m > _NO_TERRAIN_M))
            sieve.drop(GROUND, ~(np.abs(terrain_m - ground_m) < settings.most_ground_gap_m))
        height_m = granule.numbers(f"{beam}/rh", rows, settings.rh, unit="m")
        sieve.drop_heights(height_m)
        self.leaf_unknown = int((sieve.left & unknown).sum())

        left = sieve.left
        self.lon_deg, self.lat_deg = lon_deg[rows][left], lat_deg[rows][left]
        self.height_m, self.day = height_m[left], day[left]
        self.number = granule.column(f"{beam}/shot_number", rows)[left]

    def _filter_leaves(self, granule: Granule, beam: str, rows: slice, settings: GediSettings) -> NDArray[np.bool_]:
        """Take away shots without leaves and return which of the others are not known to have any."""
        field = f"{beam}/land_cover_data/leaf_off_flag"
        flag = granule.numbers(field, rows) if granule.has(field) else np.full(rows.stop - rows.start, np.nan)
        self.sieve.drop(LEAF_OFF, flag == 1)
        unknown = np.asarray(flag != 0)
        if settings.leaf_unknown == "drop":
            self.sieve.drop(LEAF_UNKNOWN, unknown)
        return unknown

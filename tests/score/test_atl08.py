"""ICESat-2 ATL08: granules made with the published layout (names, types, fill values), no real one being at hand."""

from datetime import date

import h5py
import numpy as np
import pytest
from pydantic import ValidationError

from canopy.errors import SourceError
from canopy.score import sieve
from canopy.score.atl08 import (
    BEAMS,
    CLOUD,
    DAY,
    NO_DIRECTION,
    NO_OPEN_GROUND,
    SCATTERING,
    TURNING,
    WEAK,
    Atl08Settings,
    read_atl08,
)
from tests.score.granules import ATL08_FILL, seconds, write_atl08, write_gedi


def counts(shots):
    return {name: count for name, count in shots.dropped.items() if count}


# --- what a segment is


def test_segments_of_20_m(tmp_path):
    """Of the strong beam (right, when the satellite flies forward) 5 parts of each of 3 segments, in their order."""
    shots = read_atl08(write_atl08(tmp_path / "a.h5"))
    assert (shots.read, len(shots), counts(shots)) == (30, 15, {WEAK: 15})
    np.testing.assert_array_equal(shots.height_m, 10.0 + np.arange(15))
    assert (shots.statistic, shots.shape, shots.source) == ("p98", "disc of 7 m radius", "ICESat-2 ATL08 h_canopy")
    assert set(shots.date.astype(str)) == {"2020-07-16"}
    assert list(shots.id[[0, 4, 5]]) == ["328-8-gt1r-20m-600000", "328-8-gt1r-20m-600004", "328-8-gt1r-20m-600005"]
    steps_m = np.diff(shots.lonlat_deg[1]) * 111_132
    np.testing.assert_allclose(steps_m, 20.0, atol=0.5)  # places are float32
    assert np.all(shots.lonlat_deg[0] == np.float32(-122.98))
    assert shots.notes == (NO_OPEN_GROUND,)


def test_segments_of_100_m_are_lines_along_the_track(tmp_path):
    """Where a granule has no parts, as before release 5, or where they are asked for."""
    old = read_atl08(write_atl08(tmp_path / "old.h5", parts=False))
    asked = read_atl08(write_atl08(tmp_path / "new.h5"), Atl08Settings(segment_m=100))
    for shots in (old, asked):
        assert (shots.read, len(shots)) == (6, 3)
        np.testing.assert_array_equal(shots.height_m, [20, 21, 22])
        assert shots.shape == "all within 7 m of a line of 86 m along the track"
        np.testing.assert_allclose((shots.azimuth_deg + 180) % 360 - 180, 0, atol=1)
    assert old.notes == (NO_OPEN_GROUND, "old.h5 has no heights of 20 m segments: those of 100 m are taken")
    assert asked.notes == (NO_OPEN_GROUND,)
    with pytest.raises(SourceError, match=r"has no gt1l/land_segments/l.*_20m"):
        read_atl08(tmp_path / "old.h5", Atl08Settings(segment_m=20))


def test_direction_of_a_track(tmp_path):
    """South-west at 44 N, one segment far from the others, and a beam of a single segment."""
    metre = 1 / 111_132
    lat = 44 - np.array([0, 100, 200, 9000]) * metre
    lon = -123 - np.array([0, 100, 200, 9000]) * metre / np.cos(np.radians(44))
    shots = read_atl08(
        write_atl08(tmp_path / "a.h5", ["gt1r"], count=4, parts=False, latitude=lat, longitude=lon),
    )
    assert counts(shots) == {NO_DIRECTION: 2}  # the last, and the one before it, whose neighbours are 8.9 km apart
    np.testing.assert_allclose(shots.azimuth_deg, 225, atol=1.5)
    single = read_atl08(write_atl08(tmp_path / "b.h5", ["gt1r"], count=1, parts=False))
    assert counts(single) == {NO_DIRECTION: 1}
    # The control: parts of 20 m are discs and need none.
    assert len(read_atl08(write_atl08(tmp_path / "c.h5", ["gt1r"], count=1))) == 5


@pytest.mark.parametrize(("orient", "strong"), [(0, "l"), (1, "r")])
def test_strong_beams_depend_on_the_flight(tmp_path, orient, strong):
    types = {beam: "strong" if beam.endswith(strong) else "weak" for beam in BEAMS}
    shots = read_atl08(write_atl08(tmp_path / "a.h5", BEAMS, orient=orient, types=types))
    assert (len(shots), counts(shots)) == (45, {WEAK: 45})
    used = {shots.tracks[k].rpartition("/")[2] for k in np.unique(shots.track)}
    assert used == {f"gt{k}{strong}" for k in (1, 2, 3)}
    assert len(read_atl08(tmp_path / "a.h5", Atl08Settings(strong_beams=False))) == 90


@pytest.mark.parametrize("orient", [2, [0, 1], [1, 2]])
def test_while_the_satellite_turns_no_beam_is_known_to_be_strong(tmp_path, orient):
    path = write_atl08(tmp_path / "a.h5", orient=orient)
    assert counts(read_atl08(path)) == {TURNING: 30}
    assert len(read_atl08(path, Atl08Settings(strong_beams=False))) == 30


def test_a_granule_that_contradicts_itself_is_refused(tmp_path):
    path = write_atl08(tmp_path / "a.h5", types={"gt1l": "strong", "gt1r": "weak"})
    with pytest.raises(SourceError, match="gt1l is said to be a strong beam, but with sc_orient 1 it is not"):
        read_atl08(path)


# --- every filter alone


NIGHTS = [1, 0, 1]
FILTERS = {
    DAY: ({"night_flag": NIGHTS}, {"night": False}),
    CLOUD: ({"cloud_flag_atm": [0, 3, 0]}, {"cloud_free": False}),
    SCATTERING: ({"msw_flag": [0, -1, 0]}, {"no_scattering": False}),
    sieve.OUTSIDE_DATES: (
        {"delta_time": [seconds("2020-07-16"), seconds("2020-07-15T23:59:59"), seconds("2020-07-16")]},
        {"since": date(2020, 7, 15)},
    ),
    sieve.OUTSIDE_AREA: (
        {"latitude": [44, 45, 44.001], "latitude_20m": np.repeat([44, 45, 44.001], 5).reshape(3, 5)},
        {"bounds_deg": (-124.0, 43.0, -121.0, 46.0)},
    ),
}
ASKED = {
    "bounds_deg": (-124.0, 43.0, -121.0, 44.5), "since": date(2020, 7, 16), "until": date(2020, 7, 16),
    "cloud_free": True, "no_scattering": True,
}  # fmt: skip


@pytest.mark.parametrize("reason", FILTERS)
def test_a_filter_and_only_it_drops_a_segment(tmp_path, reason):
    fields, without = FILTERS[reason]
    path = write_atl08(tmp_path / "a.h5", ["gt1r"], **fields)
    shots = read_atl08(path, Atl08Settings(**ASKED))
    assert counts(shots) == {reason: 5}
    np.testing.assert_array_equal(shots.height_m, 10.0 + np.r_[0:5, 10:15])
    # The control: without the filter, or a milder one, the segment is there.
    assert len(read_atl08(path, Atl08Settings(**{**ASKED, **without}))) == 15


def test_cloud_and_scattering_are_asked_for(tmp_path):
    path = write_atl08(tmp_path / "a.h5", ["gt1r"], cloud_flag_atm=3, msw_flag=5)
    assert len(read_atl08(path)) == 15


@pytest.mark.parametrize("fill", [ATL08_FILL, np.nan, -999.0, np.inf])
def test_segments_without_canopy_have_no_height(tmp_path, fill):
    height_m = 10.0 + np.arange(15.0).reshape(3, 5)
    height_m[1, 2] = fill
    shots = read_atl08(write_atl08(tmp_path / "a.h5", ["gt1r"], h_canopy_20m=height_m))
    assert counts(shots) == {sieve.NO_HEIGHT: 1}
    assert 17.0 not in shots.height_m
    assert shots.height_m.max() == 24


def test_heights_of_clouds_are_dropped(tmp_path):
    shots = read_atl08(write_atl08(tmp_path / "a.h5", ["gt1r"], parts=False, h_canopy=[20, 121.0, 22]))
    assert counts(shots) == {sieve.TOO_HIGH: 1}


def test_places_that_are_none_are_outside(tmp_path):
    lat = np.repeat([44, 44.001, 44.002], 5).reshape(3, 5)
    lat[0, 0] = ATL08_FILL
    shots = read_atl08(write_atl08(tmp_path / "a.h5", ["gt1r"], latitude_20m=lat))
    assert counts(shots) == {sieve.OUTSIDE_AREA: 1}


def test_a_segment_read_twice_counts_once(tmp_path):
    """A subset of a granule beside the granule, under another name."""
    write_atl08(tmp_path / "ATL08_20200716202251_03280806_007_01.h5", ["gt1r"])
    write_atl08(tmp_path / "processed_ATL08_20200716202251_03280806_007_01.h5", ["gt1r"], count=2)
    shots = read_atl08(tmp_path)
    assert (shots.read, len(shots), counts(shots)) == (25, 15, {sieve.TWICE: 10})


# --- what can be wrong


def test_another_product_is_refused(tmp_path):
    with pytest.raises(SourceError, match="is of the product ATL03, not ATL08; give an ICESat-2 ATL08 granule"):
        read_atl08(write_atl08(tmp_path / "a.h5", product="ATL03"))
    with pytest.raises(SourceError, match="is of the product GEDI_L2A, not ATL08"):
        read_atl08(write_gedi(tmp_path / "g.h5"))


@pytest.mark.parametrize(
    ("field", "asked", "remedy"),
    [
        ("night_flag", {}, "set night = false"), ("cloud_flag_atm", {"cloud_free": True}, "set cloud_free = false"),
        ("msw_flag", {"no_scattering": True}, "set no_scattering = false"), ("delta_time", {}, ""),
        ("segment_id_beg", {}, ""), ("longitude_20m", {}, ""),
    ],
)  # fmt: skip
def test_a_missing_field_is_named_with_its_remedy(tmp_path, field, asked, remedy):
    path = write_atl08(tmp_path / "a.h5", without=(field,))
    with pytest.raises(SourceError, match=f"has no gt1l/land_segments/{field}; give a granule with it") as caught:
        read_atl08(path, Atl08Settings(**asked))
    assert str(caught.value).endswith(remedy)
    assert "\n" not in str(caught.value)


def test_a_granule_that_does_not_say_how_the_satellite_flies(tmp_path):
    path = write_atl08(tmp_path / "a.h5")
    with h5py.File(path, "a") as file:
        del file["orbit_info"]
    with pytest.raises(SourceError, match=r"has no orbit_info/sc_orient; .* or set strong_beams = false"):
        read_atl08(path)
    shots = read_atl08(path, Atl08Settings(strong_beams=False))
    assert shots.id[0] == "a-gt1l-20m-600000"  # without ground track and cycle the file's name tells segments apart


def test_granules_over_the_sea_and_of_another_shape(tmp_path):
    with pytest.raises(SourceError, match="has no segments of land"):
        read_atl08(write_atl08(tmp_path / "sea.h5", []))
    path = write_atl08(tmp_path / "a.h5")
    with h5py.File(path, "a") as file:
        del file["gt1r/land_segments/canopy/h_canopy_20m"]
        file["gt1r/land_segments/canopy/h_canopy_20m"] = np.zeros((3, 4), np.float32)
    with pytest.raises(SourceError, match=r"has places of shape \(3, 5\) and heights of shape \(3, 4\)"):
        read_atl08(path)


def test_units_and_dates_that_cannot_be(tmp_path):
    with pytest.raises(SourceError, match="h_canopy_20m is in 'feet', not in metres"):
        read_atl08(write_atl08(tmp_path / "a.h5", units="feet"))
    with pytest.raises(SourceError, match="makes 2018-01-01, and nothing was measured before 2018-10-01"):
        read_atl08(write_atl08(tmp_path / "a.h5", delta_time=0.0))


def test_settings_that_cannot_be():
    with pytest.raises(ValidationError, match="after until"):
        Atl08Settings(since=date(2021, 1, 1), until=date(2020, 1, 1))
    with pytest.raises(ValidationError, match="20 or 100"):
        Atl08Settings(segment_m=50)
    with pytest.raises(ValidationError, match="Extra inputs"):
        Atl08Settings(beams="strong")

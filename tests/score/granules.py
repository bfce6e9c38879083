"""HDF5 granules for tests, laid out as the products' data dictionaries say.

GEDI L2A: fields, types and fill values of version 2 of the product. ATL08: groups, fields, types and fill values of releases
6 and 7 as their data dictionary and published file listings have them; no real granule of it is at hand.
"""

from pathlib import Path

import h5py
import numpy as np

EPOCH = np.datetime64("2018-01-01T00:00:00")
GEDI_DAY = "2020-07-15T03:00:00"
ATL08_FILL = np.finfo(np.float32).max


def seconds(when):
    return (np.datetime64(when) - EPOCH) / np.timedelta64(1, "s")


def write_gedi(
    path: Path,
    beams=None,
    *,
    lon=-123.0,
    lat=44.0,
    count=3,
    product="GEDI_L2A",
    without=(),
    units=None,
    version="003",
    **fields,
) -> Path:
    """A granule of good shots, 60 m apart on each beam; `fields` give other values, one for all or one a shot of each beam.

    Args:
        path: The file.
        beams: Names of the beams.
        lon: Of the first shot.
        lat: Of the first shot.
        count: Shots a beam.
        product: What it says it is.
        without: Fields to leave out.
        units: Unit of `rh`.
        version: Of the processing; 003 and on is version 2 of the product.
        fields: Values; `rh` is of all relative heights or a table of them.
    """
    with h5py.File(path, "w") as file:
        file.attrs["short_name"] = np.array([product], dtype=h5py.string_dtype())
        file.create_group("METADATA/DatasetIdentification").attrs["PGEVersion"] = version
        for index, beam in enumerate(beams if beams is not None else ["BEAM0101"]):
            number = 196_405_000_000_000_000 + index * 10_000_000 + np.arange(count, dtype=np.uint64)
            columns = {
                "shot_number": (number, np.uint64),
                "delta_time": (seconds(GEDI_DAY), np.float64),
                "lon_lowestmode": (lon + np.arange(count) * 0.0005, np.float64),
                "lat_lowestmode": (lat + np.arange(count) * 0.0004 + index * 0.01, np.float64),
                "rh": (np.linspace(0, 30, 101)[None] + np.arange(count)[:, None], np.float32),
                "quality_flag": (1, np.uint8), "degrade_flag": (0, np.uint8), "sensitivity": (0.97, np.float32),
                "solar_elevation": (-20.0, np.float32), "digital_elevation_model": (800.0, np.float32),
                "elev_lowestmode": (802.0, np.float32), "land_cover_data/leaf_off_flag": (0, np.uint8),
            }  # fmt: skip
            for name, (usual, kind) in columns.items():
                if name in without:
                    continue
                value = fields.get(name.rpartition("/")[2], usual)
                shape = (count, 101) if name == "rh" and np.ndim(value) < 2 else np.shape(value) or (count,)
                file[f"{beam}/{name}"] = np.broadcast_to(np.asarray(value, kind), shape)
            if units and "rh" not in without:
                file[f"{beam}/rh"].attrs["units"] = units
    return path


def write_atl08(
    path: Path, beams=("gt1l", "gt1r"), *, orient=1, lon=-123.0, lat=44.0, count=3, product="ATL08", parts=True, without=(),
    types=None, units="meters", **fields
) -> Path:  # fmt: skip
    """A granule of segments 100 m apart along a track to the north; `fields` give other values.

    Args:
        path: The file.
        beams: Names of the beams.
        orient: `sc_orient`: 0 backward, 1 forward, 2 in transition; or several.
        lon: Of the track.
        lat: Of the first segment.
        count: Segments a beam.
        product: What it says it is.
        parts: Whether there are heights of 20 m segments.
        without: Fields to leave out.
        types: Name of a beam -> what it says it is, "strong" or "weak".
        units: Unit of the heights.
        fields: Values.
    """
    metre = 1 / 111_132.0
    along = np.arange(count) * 100.0
    middle = along[:, None] + np.arange(-40, 41, 20)
    with h5py.File(path, "w") as file:
        file.attrs["short_name"] = np.bytes_(product)
        file["orbit_info/sc_orient"] = np.atleast_1d(np.asarray(orient, np.int8))
        file["orbit_info/rgt"] = np.array([328], np.int16)
        file["orbit_info/cycle_number"] = np.array([8], np.int8)
        for index, beam in enumerate(beams):
            columns = {
                "latitude": (lat + along * metre, np.float32), "longitude": (lon + index * 0.02, np.float32),
                "delta_time": (seconds("2020-07-16T20:22:51"), np.float64), "night_flag": (1, np.int8),
                "msw_flag": (0, np.int8), "cloud_flag_atm": (0, np.int8),
                "segment_id_beg": (600_000 + 5 * np.arange(count), np.int32),
                "canopy/h_canopy": (20.0 + np.arange(count), np.float32),
            }  # fmt: skip
            if parts:
                columns |= {
                    "latitude_20m": (lat + middle * metre, np.float32), "longitude_20m": (lon + index * 0.02, np.float32),
                    "canopy/h_canopy_20m": (10.0 + np.arange(5 * count).reshape(count, 5), np.float32),
                }  # fmt: skip
            land = file.create_group(f"{beam}/land_segments")
            if types:
                file[beam].attrs["atlas_beam_type"] = np.bytes_(types[beam])
            for name, (usual, kind) in columns.items():
                if name in without:
                    continue
                value = fields.get(name.rpartition("/")[2], usual)
                shape = (count, 5) if name.endswith("_20m") else (count,)
                land[name] = np.broadcast_to(np.asarray(value, kind), shape)
                if kind == np.float32:
                    land[name].attrs["_FillValue"] = ATL08_FILL
                if "canopy/" in name:
                    land[name].attrs["units"] = units
    return path

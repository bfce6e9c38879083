"""HDF5 granules of spaceborne lidar: found, recognised and read, with one clear line for whatever is wrong with one."""

from __future__ import annotations

import math
import os
import zipfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import h5py
import numpy as np
from numpy.typing import NDArray

from canopy.errors import SourceError

SUFFIXES: Final = (".h5", ".hdf5")

EPOCH: Final = np.datetime64("2018-01-01T00:00:00", "ms")
"""Where `delta_time` starts for both missions, UTC; there has been no leap second since."""

EPOCH_DAY: Final = EPOCH.astype("datetime64[D]")

_FIRST_DAY: Final = np.datetime64("2018-10-01")
"""ICESat-2 measures from October 2018 on, GEDI from March 2019 on: an earlier day is no day in seconds since the epoch."""
_LAST_DAY: Final = np.datetime64("2100-01-01")

_FILL: Final = 1e30
"""Values beyond it stand for nothing: granules hold the largest float32, 3.4e38, where there is no height."""

_METRES: Final = ("m", "meter", "meters", "metre", "metres")

Paths = str | os.PathLike[str] | Sequence[str | os.PathLike[str]]
"""A file, a folder, or several of these."""


def granule_paths(paths: Paths) -> list[Path]:
    """The files that are meant, each once; of a folder all HDF5 files in it and in its folders, in order of name.

    Raises:
        SourceError: missing, or a folder without an HDF5 file.
    """
    given = [paths] if isinstance(paths, (str, os.PathLike)) else list(paths)
    found: dict[Path, None] = {}
    for each in given:
        path = Path(each)
        if path.is_dir():
            files = sorted(file for file in path.rglob("*") if file.suffix.lower() in SUFFIXES and file.is_file())
            if not files:
                archives = any(file.suffix.lower() == ".zip" for file in path.rglob("*"))
                remedy = "unpack its ZIP archives first" if archives else "give the folder of the granules"
                raise SourceError(f"{path} has no file that ends in {' or '.join(SUFFIXES)}; {remedy}")
        elif path.is_file():
            files = [path]
        else:
            raise SourceError(f"{path} does not exist; give a granule (HDF5), several, or a folder of them")
        found |= dict.fromkeys(files)
    if not found:
        raise SourceError("no granule is given; give an HDF5 file, several, or a folder of them")
    return list(found)


class Granule:
    """A granule open for reading; made by `open_granule`."""

    def __init__(self, path: Path, file: Any) -> None:
        self.path = path
        self._file = file

    @property
    def groups(self) -> list[str]:
        """Names of the groups at the top, in order of name."""
        return sorted(name for name in self._file if isinstance(self._file.get(name), h5py.Group))

    def has(self, name: str) -> bool:
        """Whether there is a dataset of that name."""
        return isinstance(self._file.get(name), h5py.Dataset)

    def attribute(self, group: str, name: str) -> str | None:
        """An attribute as text, of a group ("/" for the file's own); None where there is none."""
        holder = self._file.get(group)
        value = None if holder is None else holder.attrs.get(name)
        if value is None:
            return None
        flat = np.asarray(value).ravel()
        first = flat[0] if flat.size else ""
        return first.decode(errors="replace") if isinstance(first, bytes) else str(first)

    def column(
        self, name: str, rows: slice | None = None, cols: int | None = None, *, option: str = "", unit: str = ""
    ) -> NDArray[Any]:
        """A dataset, or the part of its rows (and the one column) that is asked for.

        Args:
            name: Path in the file.
            rows: Which rows; None for all.
            cols: Which column of a table; None for all.
            option: How to do without it, for the message when it is missing.
            unit: `m` refuses a dataset whose unit is said to be another.

        Raises:
            SourceError: missing, of another unit, without that column, or damaged.
        """
        dataset = self._file.get(name)
        if not isinstance(dataset, h5py.Dataset):
            remedy = f", or {option}" if option else ""
            raise SourceError(f"{self.path} has no {name}; give a granule with it (subsetters can leave it out){remedy}")
        said = self.attribute(name, "units")
        if unit == "m" and said is not None and said.strip().lower() not in _METRES:
            raise SourceError(f"{self.path}: {name} is in {said!r}, not in metres; give the product as delivered")
        if cols is not None and (dataset.ndim != 2 or dataset.shape[1] <= cols):
            raise SourceError(
                f"{self.path}: {name} has the shape {dataset.shape}, so there is no column {cols} in it; "
                f"give the product as delivered"
            )
        span = slice(None) if rows is None else rows
        try:
            return np.asarray(dataset[span] if cols is None else dataset[span, cols])
        except OSError as error:
            raise SourceError(f"{self.path}: {name} cannot be read ({_one_line(error)}); fetch the file again") from error

    def numbers(
        self, name: str, rows: slice | None = None, cols: int | None = None, *, option: str = "", unit: str = ""
    ) -> NDArray[np.float64]:
        """A column as float64, NaN where the granule holds its fill value; as `column`."""
        values = self.column(name, rows, cols, option=option, unit=unit).astype(np.float64)
        unknown = ~(np.abs(values) < _FILL)
        if (fill := self._file[name].attrs.get("_FillValue")) is not None:
            unknown |= values == float(np.asarray(fill).ravel()[0])
        values[unknown] = math.nan
        return values

    def days(self, name: str, rows: slice | None = None) -> NDArray[np.datetime64]:
        """A column of seconds since 2018 as days (UTC), NaT where unknown.

        Raises:
            SourceError: as `column`; or on a day without a satellite, so the seconds count from another epoch.
        """
        seconds = self.numbers(name, rows)
        known = np.isfinite(seconds)
        days = np.full(seconds.shape, np.datetime64("NaT"), dtype="datetime64[D]")
        milliseconds = np.round(np.clip(seconds[known], -1e12, 1e12) * 1000).astype("timedelta64[ms]")
        days[known] = (EPOCH + milliseconds).astype("datetime64[D]")
        wrong = known & ~((days >= _FIRST_DAY) & (days < _LAST_DAY))
        if wrong.any():
            first = int(np.flatnonzero(wrong)[0])
            raise SourceError(
                f"{self.path}: {name} is {seconds[first]:g} s, which since {EPOCH_DAY} makes {days[first]}, "
                f"and nothing was measured before {_FIRST_DAY}; give the product as delivered"
            )
        return days


@contextmanager
def open_granule(path: Path, *, product: str, title: str) -> Iterator[Granule]:
    """Open a granule.

    Args:
        path: The file.
        product: What it must say it is: `GEDI_L2A`.
        title: What that is, with its article, for messages: "a GEDI L2A granule".

    Raises:
        SourceError: missing, packed, no HDF5, damaged, or another product.
    """
    if not path.is_file():
        raise SourceError(f"{path} does not exist; give {title} (HDF5)")
    if zipfile.is_zipfile(path):
        raise SourceError(f"{path} is a ZIP archive; unpack it and give the HDF5 file in it")
    with path.open("rb") as stream:
        if stream.read(2) == b"\x1f\x8b":
            raise SourceError(f"{path} is compressed with gzip; unpack it and give the HDF5 file in it")
    if not h5py.is_hdf5(path):
        raise SourceError(
            f"{path} is no HDF5 file; give {title}, and fetch it again if it is one: without a login a web page may come in "
            f"its place"
        )
    try:
        file = h5py.File(path, "r", locking="best-effort")  # shared file systems may know no locks
    except OSError as error:
        raise SourceError(f"{path} cannot be read ({_one_line(error)}); fetch it again") from error
    with file:
        granule = Granule(path, file)
        names = [
            granule.attribute(group, name)
            for group, name in (("/", "short_name"), ("METADATA/DatasetIdentification", "shortName"))
        ]
        name = next((name for name in names if name), None)
        if name is None:
            raise SourceError(f"{path} does not say which product it is (no attribute short_name); give {title}")
        if name != product:
            raise SourceError(f"{path} is of the product {name}, not {product}; give {title}")
        yield granule


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())

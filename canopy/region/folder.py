"""The output folder of a finished map, as whoever reads it finds it: its files, and what its record says of them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Final, Self

from pydantic import ValidationError

from canopy.errors import OutputError
from canopy.grid import Grid
from canopy.model.blocks import BlockTable
from canopy.model.tables import Calibrated
from canopy.raster import open_raster
from canopy.tiler.days import span

HEIGHT: Final = ("height.tif", "height.vrt")
ERROR: Final = ("error.tif", "error.vrt")
DATE: Final = ("date.tif", "date.vrt")
RUN: Final = "run.json"


@dataclass(frozen=True, kw_only=True)
class RegionFolder:
    """A finished map."""

    path: Path
    height: Path
    """`height.tif`, or `height.vrt` over the sheets: band `height_m`."""
    error: Path | None
    """Bands `error_90_m`, `lower_90_m`, `upper_90_m`; None where somebody took the file away."""
    date: Path | None = None
    """Band `date_yyyymmdd`, the day of each pixel's image, 0 where unknown; None where all are of one day, or unknown."""
    run: dict[str, Any] | None
    """`run.json`; None where there is none, so that the map's lineage is unknown."""

    @classmethod
    def find(cls, path: Path) -> Self | None:
        """The finished map that a folder, or the raster of heights in one, means; None for anything else.

        Raises:
            OutputError: the map is not finished, or its record is unreadable.
        """
        folder = path
        if not path.is_dir():
            if path.name not in HEIGHT or not (path.parent / RUN).is_file():
                return None
            folder = path.parent
        height, error, date = (
            next((folder / name for name in names if (folder / name).exists()), None) for names in (HEIGHT, ERROR, DATE)
        )
        if height is None:
            from canopy.region.records import WORK  # what makes maps, and takes its time to load

            if (folder / WORK).exists():
                raise OutputError(f"{folder} holds no finished map; finish it first with canopy map resume {folder}")
            return None
        return cls(path=folder, height=height, error=error, date=date, run=_record(folder / RUN))

    @classmethod
    def open(cls, path: Path) -> Self:
        """As `find`, for those who need a map.

        Raises:
            OutputError: there is none, or as `find`.
        """
        if not path.exists():
            raise OutputError(f"{path} does not exist; give the output folder of canopy map")
        found = cls.find(path)
        if found is None:
            raise OutputError(f"{path} holds no {HEIGHT[0]}; give the output folder of canopy map")
        return found

    @cached_property
    def grid(self) -> Grid:
        """Where the pixels of all its rasters lie."""
        with open_raster(self.height) as raster:
            return raster.grid

    @cached_property
    def tags(self) -> dict[str, str]:
        """The tags CANOPY_… of the heights."""
        with open_raster(self.height) as raster:
            return {key: value for key, value in raster.tags.items() if key.startswith("CANOPY_")}

    @cached_property
    def calibrated(self) -> Calibrated | None:
        """The tables behind the intervals; None for a map that is uncalibrated or does not say.

        Raises:
            OutputError: they are of another version of canopy.
        """
        intervals = None if self.run is None else self.run.get("intervals")
        if intervals is None:
            return None
        try:
            return Calibrated.model_validate(intervals)
        except ValidationError as error:
            raise OutputError(
                f"{self.path / RUN} holds intervals of another version ({error.errors()[0]['msg']}); make the map again"
            ) from error

    @property
    def blocks(self) -> BlockTable | None:
        """How wrong means over ground may be; None where that was not measured."""
        return None if self.calibrated is None else self.calibrated.blocks

    @property
    def days(self) -> str | None:
        """The day of the imagery, or the first and the last of several; None unless it is known of every pixel."""
        return None if self.run is None else span_of(self.run)

    @property
    def images(self) -> tuple[Path, ...]:
        """The local images that the map was made of, those that are there."""
        told = [] if self.run is None else self.run.get("imagery", {}).get("files", [])
        paths = [Path(entry["path"]) for entry in told if "path" in entry]
        return tuple(path for path in paths if path.is_file())


def span_of(run: Mapping[str, Any]) -> str | None:
    """The day of the imagery that a run's record says, or the first and the last; None unless it is known of every pixel."""
    told = run.get("imagery", {})
    first, last = told.get("first_day"), told.get("last_day")
    return span([first, last]) if first and last and not told.get("undated") else None


def _record(path: Path) -> dict[str, Any] | None:
    try:
        run = json.loads(path.read_bytes())
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise OutputError(f"{path} is no JSON; restore it, or delete it and the lineage of the map is unknown") from error
    return run if isinstance(run, dict) else None

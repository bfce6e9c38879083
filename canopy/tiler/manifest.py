"""A search of a catalogue, frozen: all that the pixels depend on, as JSON that is checked when it is read."""

from __future__ import annotations

import hashlib
import json
from contextlib import suppress
from datetime import date
from functools import cached_property
from pathlib import Path
from typing import ClassVar, Literal, Self

from affine import Affine
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from pyproj import CRS

from canopy.errors import OutputError, SourceError
from canopy.grid import Grid
from canopy.settings import first_problem
from canopy.tiler.area import BoundsLonLat
from canopy.tiler.sources import StacSource

Prefer = Literal["newest", "least-cloud", "closest"]


class _Frozen(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class AssetRecord(_Frozen):
    """One file of an item, as the catalogue describes it."""

    href: str
    """Address without signature, or path."""
    crs: str
    """Authority code, or WKT where there is none."""
    transform: tuple[float, float, float, float, float, float]
    """Pixel (col, row) -> CRS (x, y), as affine's first six numbers."""
    shape: tuple[int, int]
    """(rows, columns)."""
    checksum: str | None = None
    """Multihash in hexadecimal digits (file extension)."""
    size_bytes: int | None = None

    @cached_property
    def grid(self) -> Grid:
        """Where the file's pixels are."""
        return Grid(crs=CRS.from_user_input(self.crs), transform=Affine(*self.transform), shape=self.shape)


class ItemRecord(_Frozen):
    """One scene."""

    id: str
    collection: str
    datetime: str
    """When it was taken, ISO 8601 in UTC; the end of the period where the catalogue gives a period."""
    day: int | None
    """Days from 1970-01-01 to the day it was taken; None: a period of several."""
    cloud_percent: float | None
    assets: dict[str, AssetRecord]
    offset: dict[str, float]
    """Band name -> what has to be added to its digital numbers."""


class SearchRecord(_Frozen):
    """What was asked."""

    area: str
    bounds_deg: BoundsLonLat
    """(west, south, east, north) that was searched, the margin around the area included."""
    start: str | None
    end: str | None
    max_cloud_percent: float | None
    prefer: Prefer
    date: str | None
    exclude: tuple[str, ...]


class Sealed(_Frozen):
    """A search that was frozen, with a digest of itself.

    It has no date of its own, so the same search of the same catalogue gives the same bytes.
    """

    sha256: str = ""
    """Digest of the rest, for the provenance of products."""

    @model_validator(mode="after")
    def _sealed(self) -> Self:
        text = json.dumps(self.model_dump(mode="json", exclude={"sha256"}), sort_keys=True, separators=(",", ":"))
        digest = hashlib.sha256(text.encode()).hexdigest()
        if self.sha256 not in {"", digest}:
            raise ValueError("sha256 is not that of the contents: the file was altered; search again")
        object.__setattr__(self, "sha256", digest)
        return self

    def write(self, path: Path | str) -> Path:
        """Write as JSON; the file is whole or absent.

        Raises:
            OutputError: it cannot be written.
        """
        path = Path(path)
        part = path.with_name(f".{path.name}.part")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            part.write_text(json.dumps(self.model_dump(mode="json"), indent=1) + "\n", encoding="utf-8")
            part.replace(path)
        except OSError as error:
            raise OutputError(f"cannot write {path} ({error.strerror}); free disk space or choose another path") from error
        finally:
            with suppress(OSError):
                part.unlink(missing_ok=True)
        return path

    @classmethod
    def read(cls, path: Path | str) -> Self:
        """Read what `write` wrote.

        Raises:
            SourceError: missing, no manifest of this kind, or altered.
        """
        try:
            return cls.model_validate(json.loads(Path(path).read_text(encoding="utf-8")))
        except FileNotFoundError:
            raise SourceError(f"manifest {path} does not exist; search first") from None
        except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
            raise SourceError(f"{path} is no manifest ({' '.join(str(error).split())}); search again") from error
        except ValidationError as error:
            raise SourceError(f"{path} is no manifest of {cls.holds} ({first_problem(error, cls)}); search again") from error

    holds: ClassVar[str]
    """What is listed, for messages."""


class Manifest(Sealed):
    """A search for imagery: what was asked of which source, and the items in the order in which they are preferred."""

    holds = "imagery"

    version: Literal[1] = 1
    source: StacSource
    search: SearchRecord
    items: tuple[ItemRecord, ...] = Field(min_length=1)


def as_day(value: date | str | None, name: str) -> date | None:
    """A day as people write it.

    Raises:
        SourceError: it is none; the message calls it `name`.
    """
    if value is None or isinstance(value, date):
        return value
    try:
        return date.fromisoformat(value)
    except ValueError:
        raise SourceError(f"{name} {value!r} is not a day; give for example 2021-07-01") from None

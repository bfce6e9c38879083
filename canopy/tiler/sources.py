"""What a source of imagery is: one TOML a source, in `data/`, with everything that is not in the catalogue itself.

`data/template.toml` explains each key; `load_source` reads one.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Final, Literal, Self

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

import canopy
from canopy.errors import SourceError
from canopy.settings import nearest, read_settings

SUFFIX: Final = ".toml"


class _Table(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Band(_Table):
    """One band of the imagery and where it is in an item: a band of an asset of many, or an asset of its own."""

    name: str = Field(pattern=r"^[A-Za-z0-9_.-]+$")
    asset: str
    index: int = Field(default=1, ge=1)
    """1-based band of the asset's file."""


class Cloud(_Table):
    """What the source says about clouds."""

    property: str | None = None
    """Property of an item that holds its cloud cover in percent, for example eo:cloud_cover."""
    max_percent: float | None = Field(default=None, ge=0, le=100)
    """Items with more are not used unless the search says otherwise."""
    mask_asset: str | None = None
    """Asset with one class per pixel, in band 1."""
    clear_classes: tuple[int, ...] = ()
    """Classes of `mask_asset` whose pixels are usable."""

    @model_validator(mode="after")
    def _whole(self) -> Self:
        if (self.mask_asset is None) != (not self.clear_classes):
            raise ValueError("mask_asset and clear_classes belong together; give both or none")
        if self.max_percent is not None and self.property is None:
            raise ValueError("max_percent needs the property that holds the cloud cover")
        return self


class NoSigning(_Table):
    """The files are public."""

    kind: Literal["none"] = "none"


class PlanetaryComputerSigning(_Table):
    """Files want a short-lived signature (SAS), which a token endpoint hands out to everybody."""

    kind: Literal["planetary-computer"]
    token_url: str
    """Answers {"msft:expiry": ..., "token": ...}."""
    hosts: tuple[str, ...] = (".blob.core.windows.net",)
    """Ends of the names of the hosts that are shown the token; no other sees it."""


class RequesterPays(_Table):
    """Files in a bucket whose readers pay; GDAL takes the credentials from the environment (AWS_ACCESS_KEY_ID, ...)."""

    kind: Literal["requester-pays"]


class NoOffset(_Table):
    """Digital numbers of all items mean the same."""

    kind: Literal["none"] = "none"


class BaselineOffset(_Table):
    """Items from a processing baseline on are shifted by an offset that has to be added to their digital numbers."""

    kind: Literal["baseline"]
    add: float
    """Offset in digital numbers, for example -1000."""
    baseline_property: str
    """Property of an item with its processing baseline, for example s2:processing_baseline."""
    from_baseline: str = Field(pattern=r"^\d+(\.\d+)*$")
    applied_property: str | None = None
    """Property that is true where the producer of the files has added the offset already."""


class DeclaredOffset(_Table):
    """Each item declares the offset of its bands (raster extension), in units of the scaled value."""

    kind: Literal["raster:bands"]
    applied_property: str | None = None
    """Property that is true where the producer of the files has added the offset already."""


Signing = Annotated[NoSigning | PlanetaryComputerSigning | RequesterPays, Field(discriminator="kind")]
Offset = Annotated[NoOffset | BaselineOffset | DeclaredOffset, Field(discriminator="kind")]


class StacSource(_Table):
    """A collection of a STAC catalogue as imagery."""

    name: str = Field(pattern=r"^[A-Za-z0-9_.-]+$")
    title: str
    kind: Literal["stac-api", "stac-static"]
    endpoint: str
    """Address of the API's landing page, or address or path of a static catalogue's catalog.json or collection.json."""
    collection: str
    licence: str
    attribution: str
    notes: str = ""
    gsd_m: float = Field(gt=0)
    dtype: Literal["uint8", "uint16", "int16", "float32"]
    value_range: tuple[float, float]
    """Least and greatest value of a usable pixel, offsets added."""
    scale: float | None = Field(default=None, gt=0)
    """Physical value of one digital number, for example 0.0001 for reflectance; items that declare another are refused."""
    nodata: float | None = None
    nodata_when: Literal["any", "all"] = "all"
    """Whether a pixel is nodata when one of its bands has that value, or only when all of them do."""
    grids: Literal["catalogue", "files"] = "catalogue"
    """Where an item's grid is read from. What the catalogue does not say is read from the file in either case."""
    band: tuple[Band, ...] = Field(min_length=1)
    cloud: Cloud = Cloud()
    signing: Signing = NoSigning()
    offset: Offset = NoOffset()

    @field_validator("band")
    @classmethod
    def _once(cls, bands: tuple[Band, ...]) -> tuple[Band, ...]:
        names = [band.name for band in bands]
        if len(set(names)) < len(names):
            raise ValueError("two bands have one name; give each its own")
        return bands

    @model_validator(mode="after")
    def _range(self) -> Self:
        low, high = self.value_range
        if not low < high:
            raise ValueError(f"value_range {self.value_range} is not low < high")
        return self

    @property
    def assets(self) -> tuple[str, ...]:
        """The assets that an item must have, each once, the cloud mask last."""
        wanted = dict.fromkeys(band.asset for band in self.band)
        if self.cloud.mask_asset is not None:
            wanted[self.cloud.mask_asset] = None
        return tuple(wanted)

    def bands_named(self, wanted: tuple[int | str, ...] | None) -> tuple[Band, ...]:
        """The bands by name or by 1-based place in the description, in the order wanted; None is all.

        Raises:
            SourceError: one that the source does not have.
        """
        if wanted is None:
            return self.band
        found = []
        known = {band.name: band for band in self.band}
        for each in wanted:
            if isinstance(each, int):
                if not 1 <= each <= len(self.band):
                    raise SourceError(
                        f"{self.name} has bands 1-{len(self.band)} ({', '.join(known)}), not {each}; choose among them"
                    )
                found.append(self.band[each - 1])
            elif each in known:
                found.append(known[each])
            else:
                raise SourceError(f"{self.name} has no band {each!r}; {nearest(each, list(known))}")
        return tuple(found)

    def in_range(self) -> bool:
        """Whether every value of the data type is in `value_range`."""
        if self.dtype == "float32":
            return False
        limits = np.iinfo(self.dtype)
        return self.value_range[0] <= limits.min and limits.max <= self.value_range[1]


def _shelves() -> tuple[Path, Path]:
    return Path("data"), Path(canopy.__file__).parents[1] / "data"


def known_sources() -> list[str]:
    """The names of the sources in ./data and in the data folder of the source checkout."""
    return sorted({path.stem for shelf in _shelves() for path in shelf.glob(f"*{SUFFIX}")} - {"template"})


def find_source(name_or_path: Path | str) -> Path:
    """The description of a source given by path, or by name in ./data or in the data folder of the source checkout.

    Raises:
        SourceError: there is none; the message lists the ones there are.
    """
    for candidate in (Path(name_or_path), *(shelf / f"{name_or_path}{SUFFIX}" for shelf in _shelves())):
        if candidate.is_file() and candidate.suffix == SUFFIX:
            return candidate
    raise SourceError(
        f"no source {str(name_or_path)!r}: neither a description (TOML) nor one of {', '.join(known_sources()) or 'none'}; "
        f"give the path of one, for example a copy of data/template.toml"
    )


def load_source(name_or_path: Path | str) -> StacSource:
    """The source of a name in `data/`, or of the path of its description.

    Raises:
        SourceError: not found, no TOML, an unknown key (the nearest valid one is named), or a wrong value.
    """
    return read_settings(find_source(name_or_path), StacSource, what="a source", error=SourceError)

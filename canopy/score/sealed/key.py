"""The private key: one file with the labels, the salts and all that must not be known before a submission is scored.

A zip archive, readable by its owner only: `record.json` (`Record`), and arrays as .npy files: for each chip `height` (the
scored labels in metres, NaN where nothing is scored), `base` (what the base model says there), `image_codes` and
`height_codes` (fingerprints), and `sketch/TENSOR` of the base model's weights. It is read chip by chip.
"""

from __future__ import annotations

import io
import os
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import date
from pathlib import Path
from typing import Any, Literal

import numpy as np
from affine import Affine
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from pyproj import CRS

from canopy.errors import OutputError, SealError
from canopy.grid import Grid
from canopy.model.package import Training
from canopy.score.sealed.task import Task
from canopy.score.sealed.tree import leaf_hash, salt_of, tree_root
from canopy.settings import first_problem

RECORD = "record.json"
ARRAYS = ("height", "base", "image_codes", "height_codes")
"""What is kept of every chip."""

RECORD_LEAF, SKETCH_LEAF = "record", "base-model"
"""Leaves after those of the chips: they bind the rules, the floor and the sketch of the base model as well."""


class SealedChip(BaseModel):
    """Where a chip of the task comes from."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    name: str
    """Its public, opaque name."""
    region: str
    tile_set: str
    id: str
    """Its id in the tile set."""
    site: str
    crs_wkt: str
    transform: tuple[float, float, float, float, float, float]
    """Of the image, pixel (col, row) to CRS."""
    shape: tuple[int, int]
    row_px: int
    """On the lattice of its CRS; squares of ground are counted from its origin."""
    col_px: int
    gsd_m: float
    footprint_wkb: str
    """Exact outline in longitude and latitude, in hexadecimal digits."""
    item: str
    image_source: str
    lidar_source: str
    image_date: date | None
    lidar_date: date | None
    derived_from: str
    sha256: str
    """Of the image and height files of the tile set."""

    @property
    def grid(self) -> Grid:
        """Where its pixels are."""
        return Grid(crs=CRS.from_wkt(self.crs_wkt), transform=Affine(*self.transform), shape=self.shape)


class Record(BaseModel):
    """All of a key but its arrays."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    format: Literal[1] = 1
    secret: str = Field(pattern="^[0-9a-f]{64}$")
    task: Task
    """The task as it was sealed, without the root: that binds this record."""
    chips: tuple[SealedChip, ...] = Field(min_length=1)
    base_training: Training
    """What the base model was trained on: held against nobody who starts from it."""
    floor_m: dict[str, tuple[float | None, ...]]
    """By region and height class, lowest first; None where nothing could be measured."""


Arrays = Mapping[str, NDArray[Any]]


def chip_leaf(chip: SealedChip, arrays: Arrays, secret: bytes) -> bytes:
    """The leaf hash of a chip."""
    return leaf_hash(
        _bytes(chip.model_dump_json().encode(), {name: arrays[name] for name in ARRAYS}), salt_of(secret, chip.name)
    )


def record_leaf(record: Record) -> bytes:
    """The leaf hash of the record."""
    return leaf_hash(record.model_dump_json().encode(), salt_of(bytes.fromhex(record.secret), RECORD_LEAF))


def sketch_leaf(sketch: Arrays, secret: bytes) -> bytes:
    """The leaf hash of the sketch of the base model."""
    return leaf_hash(_bytes(b"", dict(sorted(sketch.items()))), salt_of(secret, SKETCH_LEAF))


def _bytes(head: bytes, arrays: Arrays) -> bytes:
    """A text and arrays such that different ones never give the same bytes: every part is preceded by its length."""
    parts = [head]
    for name, array in arrays.items():
        parts += [f"{name} {np.lib.format.dtype_to_descr(array.dtype)} {array.shape}".encode(), array.tobytes()]
    return b"".join(len(part).to_bytes(8, "big") + part for part in parts)


# --- writing -------------------------------------------------------------------------------------------------------------


class KeyWriter:
    """A key being written; made by `create_key`."""

    def __init__(self, archive: zipfile.ZipFile) -> None:
        self._archive = archive

    def add(self, name: str, array: NDArray[Any]) -> None:
        """Add an array as `name`.npy."""
        buffer = io.BytesIO()
        np.save(buffer, array, allow_pickle=False)
        self._write(f"{name}.npy", buffer.getvalue())

    def add_record(self, record: Record) -> None:
        """Add the record."""
        self._write(RECORD, record.model_dump_json(indent=1).encode())

    def _write(self, name: str, data: bytes) -> None:
        # A fixed date, so that equal contents are equal bytes.
        self._archive.writestr(zipfile.ZipInfo(name), data, compress_type=zipfile.ZIP_DEFLATED)


@contextmanager
def create_key(path: Path) -> Iterator[KeyWriter]:
    """A key file that only its owner may read from its first byte on; it takes its name when the block ends well.

    Raises:
        OutputError: it exists, or cannot be written.
    """
    part = path.with_name(f".{path.name}.part")
    if path.exists():
        raise OutputError(f"{path} exists; a key cannot be made again: choose another name with --key")
    try:
        part.unlink(missing_ok=True)
        # Not `open` and `chmod`: between the two anybody could open it.
        handle = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(handle, "wb") as file, zipfile.ZipFile(file, "w") as archive:
            yield KeyWriter(archive)
        part.replace(path)
    except OSError as error:
        raise OutputError(f"cannot write {path} ({error.strerror}); choose another place with --key") from error
    finally:
        part.unlink(missing_ok=True)


# --- reading -------------------------------------------------------------------------------------------------------------


class Key:
    """An open key; made by `open_key`."""

    def __init__(self, path: Path, archive: zipfile.ZipFile, record: Record) -> None:
        self.path = path
        self.record = record
        self._archive = archive

    def array(self, name: str) -> NDArray[Any]:
        """One array.

        Raises:
            SealError: it is missing or damaged.
        """
        try:
            with self._archive.open(f"{name}.npy") as file:
                array: NDArray[Any] = np.load(io.BytesIO(file.read()), allow_pickle=False)
        except (KeyError, ValueError, zipfile.BadZipFile, EOFError) as error:
            raise SealError(f"{self.path} lacks {name}, or it is damaged; restore the key from a copy") from error
        return array

    def arrays(self, chip: SealedChip) -> Arrays:
        """Height, base prediction and fingerprints of a chip."""
        return {name: self.array(f"{name}/{chip.name}") for name in ARRAYS}

    def sketch(self) -> Arrays:
        """The sketch of the base model's weights by tensor."""
        names = [
            name.removeprefix("sketch/").removesuffix(".npy")
            for name in self._archive.namelist()
            if name.startswith("sketch/")
        ]
        return {name: self.array(f"sketch/{name}") for name in sorted(names)}

    def leaves(self) -> Iterator[tuple[str, bytes]]:
        """The name and hash of every leaf, in the order of the tree."""
        secret = bytes.fromhex(self.record.secret)
        for chip in self.record.chips:
            yield chip.name, chip_leaf(chip, self.arrays(chip), secret)
        yield RECORD_LEAF, record_leaf(self.record)
        yield SKETCH_LEAF, sketch_leaf(self.sketch(), secret)

    def refuse_other(self, task: Task, published: Mapping[str, bytes]) -> None:
        """Refuses a task that this key does not belong to, and a key whose contents were changed since the task was sealed.

        Args:
            task: The task as it is read now.
            published: Its leaf hashes.

        Raises:
            SealError: the first field or leaf that differs is named.
        """
        sealed, now = self.record.task.model_dump(), task.model_copy(update={"root": ""}).model_dump()
        for field, value in sealed.items():
            if now[field] != value:
                inner = (
                    next((f"{field}.{k}" for k, v in value.items() if now[field].get(k) != v), field)
                    if isinstance(value, dict)
                    else field
                )
                raise SealError(
                    f"{inner} of the task is not what it was when {self.path} was made; score the task as it was published"
                )
        own = dict(self.leaves())
        for name, leaf in own.items():
            if published.get(name) != leaf:
                raise SealError(
                    f"leaf {name} of {self.path} is not the one that was published; restore the key, or fetch the task again"
                )
        if [*published] != [*own]:
            raise SealError("the published leaves are not those of the key, or in another order; fetch the task again")
        if (root := tree_root([*published.values()]).hex()) != task.root:
            raise SealError(
                f"root {task.root[:12]}… of the task is not that of its leaves, {root[:12]}…; fetch the task again"
            )


@contextmanager
def open_key(path: Path) -> Iterator[Key]:
    """Open a key.

    Raises:
        SealError: it is missing, no key, or others may read it.
    """
    if not path.is_file():
        raise SealError(f"{path} does not exist; give the key that canopy bench seal wrote")
    if os.name == "posix" and (mode := path.stat().st_mode & 0o077):
        raise SealError(f"{path} may be read or written by others than its owner (mode {mode:03o}); run chmod 600 {path}")
    try:
        with zipfile.ZipFile(path) as archive:
            record = Record.model_validate_json(archive.read(RECORD))
            yield Key(path, archive, record)
    except (zipfile.BadZipFile, KeyError) as error:
        raise SealError(f"{path} is no key of a sealed task; give the file that canopy bench seal wrote") from error
    except ValidationError as error:
        raise SealError(f"{path}: {first_problem(error, Record)}; restore the key from a copy") from error

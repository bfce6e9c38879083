"""What tells that a file is still the one that a plan was made with: its path, size and time of last change."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Final

from pydantic import BaseModel, ConfigDict

SIDECARS: Final = (".prj", ".wld", ".tfw", ".jgw", ".pgw")
"""Endings of the files that say where an image lies, in place of the image's own."""


class Stamp(BaseModel):
    """What tells that a file is still the one that was planned with."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    path: str
    size_bytes: int
    mtime_ns: int

    @classmethod
    def of(cls, path: Path) -> Stamp:
        """The stamp of a file as it is now."""
        state = path.stat()
        return cls(path=str(path), size_bytes=state.st_size, mtime_ns=state.st_mtime_ns)


def files_behind(path: Path) -> Iterator[Path]:
    """A file and the sidecars that say where it lies; of a folder with an Entwine octree its description."""
    if path.is_dir():
        yield path / "ept.json"
        return
    yield path
    for sidecar in (path.with_name(path.name + ".aux.xml"), *(path.with_suffix(suffix) for suffix in SIDECARS)):
        if sidecar.is_file():
            yield sidecar


def changed(stamps: Iterable[Stamp]) -> Path | None:
    """The first file that is gone or not the one that was stamped; None when all are."""
    for stamp in stamps:
        path = Path(stamp.path)
        if not path.is_file() or Stamp.of(path) != stamp:
            return path
    return None

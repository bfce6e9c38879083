"""Which program a score comes from: digests of the sources that decide it, and versions of the packages that do."""

from __future__ import annotations

import hashlib
import json
from importlib.metadata import version
from pathlib import Path
from typing import Final, Self

from pydantic import BaseModel, ConfigDict

import canopy
from canopy.errors import SealError

SOURCES: Final = (
    "grid.py", "metrics.py", "raster.py",
    "model/calibration.py", "model/distribution.py", "model/evaluate.py", "model/network.py", "model/package.py",
    "score/sealed/*.py", "tiler/audit.py", "tiler/fingerprint.py",
)  # fmt: skip
"""Sources, below the package, that decide a score or what is held against a submission.

Named one by one and not found by following imports: the audit imports the index, which imports the whole tiler, and a task
would end with every change of a LiDAR reader.
"""

PACKAGES: Final = ("numba", "numpy", "pyproj", "rasterio", "scipy", "shapely", "timm", "torch")
"""Packages whose releases may move a number."""


class Scorer(BaseModel):
    """A pinned scorer."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    canopy: str
    """Version of canopy, for people; what counts are the sources."""
    sources: dict[str, str]
    """SHA-256 of each of `SOURCES` by its path below the package."""
    packages: dict[str, str]
    """Version of each of `PACKAGES`."""

    @classmethod
    def here(cls, package: Path | None = None) -> Self:
        """The scorer that is running, or the one whose package lies at `package`."""
        root = Path(canopy.__file__).parent if package is None else package
        found = {pattern: sorted(root.glob(pattern)) for pattern in SOURCES}
        assert all(found.values()), f"{[pattern for pattern, paths in found.items() if not paths]} match no source"
        files = sorted(path for paths in found.values() for path in paths)
        return cls(
            canopy=canopy.__version__,
            sources={path.relative_to(root).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in files},
            packages={name: version(name) for name in PACKAGES},
        )

    @property
    def digest(self) -> str:
        """SHA-256 over all of it but the version for people."""
        text = json.dumps([self.sources, self.packages], sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()

    def refuse_other(self, pinned: Scorer) -> None:
        """Refuses to go on as another scorer than the pinned one.

        Raises:
            SealError: a source was edited, added or removed, or a package has another version; the first one is named.
        """
        for path in sorted(self.sources.keys() | pinned.sources.keys()):
            if self.sources.get(path) != pinned.sources.get(path):
                raise SealError(
                    f"canopy/{path} is not that of the scorer this task is pinned to (canopy {pinned.canopy}, digest "
                    f"{pinned.digest[:12]}…); score with that version, unedited"
                )
        for name in sorted(self.packages.keys() | pinned.packages.keys()):
            if self.packages.get(name) != pinned.packages.get(name):
                raise SealError(
                    f"{name} {self.packages.get(name)} is not the {name} {pinned.packages.get(name)} of the scorer this "
                    f"task is pinned to; install that version"
                )

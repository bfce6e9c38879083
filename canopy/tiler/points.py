"""Where points come from: what a user writes -> point sources, to be read in chunks.

for source in point_sources("clouds/"):
    crs, z_unit_m = crs_of(source), z_unit_m_of(source)
    for points in source.chunks(bounds):
        ...  # points.x, points.y, points.z, points.classification
"""

from __future__ import annotations

import glob
from collections.abc import Sequence
from pathlib import Path

from canopy.errors import LidarError
from canopy.tiler.las import (
    CHUNK_POINTS,
    Bounds,
    LasFile,
    PointSource,
    RawPoints,
    crs_of,
    horizontal,
    unbound,
    z_unit_m_of,
)

__all__ = [
    "CHUNK_POINTS",
    "Bounds",
    "PointSource",
    "RawPoints",
    "crs_of",
    "horizontal",
    "open_points",
    "point_sources",
    "unbound",
    "z_unit_m_of",
]


def open_points(source: Path | str) -> PointSource:
    """One source of points, its header read.

    Args:
        source: a LAS or LAZ file.

    Raises:
        LidarError: it is missing, not what its name says, or empty.
    """
    return LasFile.open(Path(source))


def point_sources(where: Path | str | Sequence[Path | str]) -> list[PointSource]:
    """All sources that a user means, in the order given; those of a folder or a pattern by name.

    Args:
        where: a file, a folder with LAS and LAZ files (the folders in it are not searched), a pattern such as
            `clouds/*.laz`, or several of these.

    Raises:
        LidarError: as `open_points`; a folder or pattern without a file.
    """
    if not isinstance(where, str | Path):
        if not where:
            raise LidarError("no point cloud given; name at least one LAS or LAZ file")
        return [source for one in where for source in point_sources(one)]
    path = Path(where)
    if path.is_dir():
        found = sorted(p for p in path.iterdir() if p.suffix.lower() in (".las", ".laz") and p.is_file())
        if not found:
            raise LidarError(f"folder {path} holds no .las or .laz file; name the folder that does, or the files")
        return [open_points(p) for p in found]
    if not path.exists() and glob.has_magic(str(where)):
        found = sorted(Path(p) for p in glob.glob(str(where), recursive=True))  # noqa: PTH207 - an absolute pattern too
        if not found:
            raise LidarError(f"no file matches {str(where)!r}; check the pattern")
        return [open_points(p) for p in found]
    return [open_points(path)]

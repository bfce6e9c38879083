"""Where points come from: what a user writes -> point sources, to be read in chunks.

for source in point_sources("clouds/"):
    crs, z_unit_m = crs_of(source), z_unit_m_of(source)
    for points in source.chunks(bounds):
        ...  # points.x, points.y, points.z, points.classification
"""

from __future__ import annotations

import glob
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import cast
from urllib.parse import urlsplit

from canopy.errors import LidarError
from canopy.tiler.byteranges import (
    CONNECTIONS,
    LocalBytes,
    LocalFolder,
    RemoteBytes,
    RemoteFolder,
    Sign,
    ahead,
    is_link,
)
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
from canopy.tiler.octree import HEAD_BYTES, CopcFile, EptFolder, is_copc
from canopy.tiler.patience import PATIENCE, Patience

__all__ = [
    "CHUNK_POINTS",
    "Bounds",
    "Patience",
    "PointSource",
    "Points",
    "RawPoints",
    "Sign",
    "crs_of",
    "horizontal",
    "open_points",
    "point_sources",
    "unbound",
    "z_unit_m_of",
]


def open_points(source: Path | str, *, sign: Sign | None = None, patience: Patience = PATIENCE) -> PointSource:
    """One source of points, its header read.

    A plain LAS or LAZ file behind HTTP is refused: without an octree each tile would fetch all of it again.

    Args:
        source: a LAS, LAZ or COPC file, a folder with an ept.json or that ept.json itself; or the link of a COPC file or an
            ept.json.
        sign: makes a link that its server accepts; called again when the signature is refused.
        patience: how long a server is waited for.

    Raises:
        LidarError: it is missing, not what its name says, empty, or its server refuses.
    """
    if isinstance(source, str) and is_link(source):
        if urlsplit(source).path.rpartition("/")[2] == "ept.json":
            return EptFolder.open(RemoteFolder(href=source, sign=sign, patience=patience))
        file = RemoteBytes.open(source, head_bytes=HEAD_BYTES, sign=sign, patience=patience)
        if is_copc(file.head):
            return CopcFile.open(file)
        if file.head[:4] == b"LASF":
            raise LidarError(f"{file.name} is plain LAS or LAZ, which only COPC has in parts; download it and give the file")
        raise LidarError(f"{file.name} is no COPC file, and no ept.json by its name; check the link")
    if isinstance(source, str) and "://" in source:
        raise LidarError(f"{source}: links of this kind are not read; give the http(s) link or a local file")
    path = Path(source)
    if path.name == "ept.json" or (path / "ept.json").is_file():
        return EptFolder.open(LocalFolder(path=path.parent if path.name == "ept.json" else path))
    local = LocalBytes.open(path)
    if is_copc(local.read(0, min(local.size, 512))):
        return CopcFile.open(local)
    return LasFile.open(path)


Points = Path | str | PointSource
"""One thing that a user may name."""


def point_sources(
    where: Points | Sequence[Points], *, sign: Sign | None = None, patience: Patience = PATIENCE
) -> list[PointSource]:
    """All sources that a user means, in the order given; those of a folder or a pattern by name.

    Args:
        where: what `open_points` takes, a folder with LAS, LAZ and COPC files (the folders in it are not searched), a
            pattern such as `clouds/*.laz`, a source that is open already, or several of these.
        sign: as in `open_points`.
        patience: as in `open_points`.

    Raises:
        LidarError: as `open_points`; a folder or pattern without a file.
    """
    if hasattr(where, "chunks"):
        return [cast("PointSource", where)]
    if not isinstance(where, str | Path):
        where = cast("Sequence[Points]", where)
        if not where:
            raise LidarError("no point cloud given; name at least one LAS or LAZ file")
        # Links answer slowly and independently, files at once.
        workers = CONNECTIONS if any(map(is_link, where)) else 1
        found_of = partial(point_sources, sign=sign, patience=patience)
        return [source for found in ahead(where, found_of, workers) for source in found]
    if is_link(where):
        return [open_points(str(where), sign=sign, patience=patience)]
    path = Path(where)
    if path.is_dir():
        found = sorted(p for p in path.iterdir() if p.suffix.lower() in (".las", ".laz") and p.is_file())
        if (path / "ept.json").is_file():
            if found:
                raise LidarError(f"folder {path} holds an ept.json and {found[0].name}; name the one that is meant")
            found = [path / "ept.json"]
        if not found:
            raise LidarError(
                f"folder {path} holds no .las or .laz file and no ept.json; name the folder that does, or the files"
            )
        return [open_points(p) for p in found]
    if not path.exists() and glob.has_magic(str(where)):
        found = sorted(Path(p) for p in glob.glob(str(where), recursive=True))  # noqa: PTH207 - an absolute pattern too
        if not found:
            raise LidarError(f"no file matches {str(where)!r}; check the pattern")
        return [open_points(p) for p in found]
    return [open_points(where)]

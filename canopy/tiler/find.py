"""One search for every source in `data/`, imagery or point clouds: what it finds is frozen, and told as a table."""

from __future__ import annotations

import os
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

from canopy.errors import AreaError, OutputError, SourceError
from canopy.settings import nearest
from canopy.tiler.area import Area, BoundsLonLat, as_area
from canopy.tiler.imagery import ImageFiles, ImagerySource, LocalPaths
from canopy.tiler.manifest import Manifest, Prefer
from canopy.tiler.sources import find_source, known_sources


@dataclass(frozen=True, slots=True, kw_only=True)
class Findings:
    """What was found, for people; the manifest holds the rest."""

    columns: tuple[str, ...]
    rows: tuple[tuple[Any, ...], ...]
    """In the order of preference."""
    remarks: tuple[str, ...]


def find(
    source: str,
    area: Area | Path | BoundsLonLat | None,
    *,
    out: Path,
    start: str | None = None,
    end: str | None = None,
    prefer: str = "newest",
    date: str | None = None,
    max_cloud_percent: float | None = None,
    survey: str | None = None,
    overwrite: bool = False,
) -> Findings:
    """Search a source over an area and write the manifest.

    Args:
        source: Name in `data/`, or path of a description.
        area: Where.
        out: Manifest to write.
        start: First day, ISO 8601.
        end: Last day.
        prefer: Which of several images gives a pixel; of imagery only.
        date: The day that "closest" means; of imagery only.
        max_cloud_percent: Most cloud cover of an image; of imagery only.
        survey: The one survey to use; of point clouds only.
        overwrite: Replace `out`.

    Raises:
        AreaError: no area, or one that cannot be read.
        OutputError: `out` exists, or cannot be written.
        SourceError, ImageryError, LidarError: as `canopy.tiler.catalogue.search` and `canopy.tiler.surveys.search_points`;
            an option that the kind of source does not have.
    """
    if area is None:
        raise AreaError(f"a search of {source} needs an area; give a file, --bbox or --place")
    if out.exists() and not overwrite:
        raise OutputError(f"{out} exists; choose another name with --out or replace it with --overwrite")
    if prefer not in get_args(Prefer):
        raise SourceError(f"--prefer {prefer!r} is not known; {nearest(prefer, get_args(Prefer))}")
    where = as_area(area)
    if _is_points(find_source(source)):
        for option, value in (("--prefer", prefer != "newest"), ("--date", date), ("--max-cloud", max_cloud_percent)):
            if value:
                raise SourceError(f"{source} is a source of point clouds, which has no {option}; leave it out")
        return _surveys(source, where, out, start=start, end=end, survey=survey)
    if survey is not None:
        raise SourceError(f"{source} is a source of imagery, which has no --survey {survey}; leave it out")
    return _images(
        source, where, out, start=start, end=end, prefer=prefer, date=date, max_cloud_percent=max_cloud_percent
    )  # fmt: skip


def imagery_source(imagery: LocalPaths | Manifest | ImagerySource, cache: Path | None = None) -> ImagerySource:
    """Imagery from whatever a caller names it by.

    Args:
        imagery: Local files, folders or patterns; a manifest, or the file (.json) it was written to; or a source as it is.
        cache: Folder to keep what is fetched for a manifest.

    Raises:
        RasterError: as `ImageFiles`.
        SourceError: a manifest among other files, no manifest, or a source that has not been searched yet; a cache for
            anything but a manifest.
    """
    if isinstance(imagery, str | os.PathLike):
        imagery = [imagery]
    if isinstance(imagery, Sequence):
        paths = [Path(path) for path in imagery]
        manifest = next((path for path in paths if path.suffix == ".json"), None)
        if manifest is not None and len(paths) > 1:
            raise SourceError(f"{manifest} is a manifest and goes alone, not with {len(paths) - 1} more; map them apart")
        for path in paths:
            if not path.exists() and str(path) in known_sources():
                raise SourceError(
                    f"{path} is a source in a catalogue, which is searched first: canopy search {path} AREA "
                    f"--out {path}.json; then give {path}.json"
                )
        if manifest is not None:
            imagery = Manifest.read(manifest)
    if isinstance(imagery, Manifest):
        from canopy.tiler.stac import StacItems

        return StacItems(imagery, cache)
    if cache is not None:
        raise SourceError(f"a cache ({cache}) is for what a manifest lists; local imagery needs none, leave it out")
    return ImageFiles(imagery) if isinstance(imagery, Sequence) else imagery


def _is_points(path: Path) -> bool:
    """Point clouds are listed in catalogues, imagery in one collection; what else is wrong the reader of either says."""
    try:
        return "catalogue" in tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError):
        return False


def _images(name: str, area: Area, out: Path, **request: Any) -> Findings:
    from canopy.tiler.stac import load_source, search

    manifest = search(load_source(name), area, **request)
    manifest.write(out)
    rows = tuple(
        (item.id, item.datetime[:10], None if item.cloud_percent is None else f"{item.cloud_percent:g}", asset.crs[:20])
        for item in manifest.items
        for asset in [next(iter(item.assets.values()))]
    )
    return Findings(columns=("item", "day", "cloud_percent", "crs"), rows=rows, remarks=())


def _surveys(name: str, area: Area, out: Path, **request: Any) -> Findings:
    from canopy.tiler.surveys import load_points_source, search_points

    manifest = search_points(load_points_source(name), area, **request)
    manifest.write(out)
    rows = tuple((s.name, s.start, s.end, len(s.clouds), f"{s.share:.1%}") for s in manifest.surveys)
    remarks = [f"{manifest.covered:.1%} of the area has points"]
    if manifest.passed_over:
        remarks.append(f"passed over, since newer surveys cover the same ground: {', '.join(manifest.passed_over)}")
    return Findings(columns=("survey", "first_day", "last_day", "clouds", "share"), rows=rows, remarks=tuple(remarks))

"""A score from end to end: open maps and references, refuse leaks, compare, and write what was found."""

from __future__ import annotations

import platform
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Final, cast, get_args

import numpy as np

from canopy import __version__
from canopy.errors import OutputError, ScoreError
from canopy.metrics import LEAST_SQUARES, RESAMPLED_M, RESAMPLES
from canopy.raster import RasterPool
from canopy.score.cells import bounds_deg
from canopy.score.leaks import leaks_of_ground, leaks_of_shots, lineage_text, refuse_leaks
from canopy.score.lidar import Pictured, compare_lidar, grids
from canopy.score.maps import GivenMap, OpenMap, open_maps
from canopy.score.measures import Draws
from canopy.score.pictures import Pictures
from canopy.score.reference import LONG_GAP_DAYS, GivenReference, OpenReference, open_reference
from canopy.score.result import FILE, SIGN, Bootstrap, Comparison, Leak, ScoreResult, Statistic, Versions, write_result
from canopy.score.shots import Kind, Reference, ShotSettings, compared, sample
from canopy.score.strata import Strata, open_strata
from canopy.tiler.headers import LocalPaths

PAGE: Final = "report.html"

OPEN_FILES: Final = 64
"""Rasters that are kept open."""

MUCH_MISSING: Final = 0.05
"""Share of the reference beyond which what a map lacks is worth a warning."""

Progress = Callable[[int, int], None]
"""Called with (tiles done, tiles in all) of each comparison."""


@dataclass(frozen=True, slots=True, kw_only=True)
class References:
    """What a map is held against; at least one."""

    als: GivenReference | None = None
    """Airborne lidar canopy height models."""
    gedi: tuple[Path, ...] = ()
    """GEDI L2A granules."""
    atl08: tuple[Path, ...] = ()
    """ICESat-2 ATL08 granules."""
    plots: Path | None = None
    """Field plots."""
    settings: ShotSettings = field(default_factory=ShotSettings)
    """Which shots count, and how the plots are read."""


def score_map(
    given: GivenMap | Path | str,
    references: References | LocalPaths,
    *,
    against: Sequence[GivenMap | Path | str] = (),
    strata: Strata | None = None,
    gsd_m: float | None = None,
    statistic: str = "mean",
    allow_leak: bool = False,
    out: Path | None = None,
    overwrite: bool = False,
    seed: int = 0,
    resamples: int = RESAMPLES,
    command: str | None = None,
    progress: Progress | None = None,
) -> ScoreResult:
    """Score a height map against references, alone or beside others on the same pixels.

    Args:
        given: Output folder of `canopy map`, or a height raster of any product.
        references: What to hold it against; paths alone are lidar canopy height models.
        against: Other maps of the same ground.
        strata: Parts of the ground to score apart.
        gsd_m: Side of the cells to compare on, metres; default that of the coarsest of map and reference, and with coarser
            maps beside it once more on theirs.
        statistic: What of finer pixels is the height of a coarser cell.
        allow_leak: Score ground that trained a map's model, and mark the result.
        out: Folder for `score.json` and `report.html`; None writes nothing.
        overwrite: Replace those of an earlier score.
        seed: Of the bootstrap.
        resamples: Of the bootstrap.
        command: The command line, to be kept in the result.
        progress: Called as tiles are read.

    Raises:
        ScoreError: nothing to compare with, nothing in common, or a leak.
        CanopyError: bad input; nothing is written.
    """
    if out is not None:
        _refuse_existing(out, overwrite=overwrite)
    references = references if isinstance(references, References) else References(als=GivenReference(paths=references))
    chosen = _statistic(statistic)
    if references.als is None and not (references.gedi or references.atl08 or references.plots):
        raise ScoreError("no reference is given; give --reference, --gedi, --atl08 or --plots")
    draws = Draws(seed=seed, resamples=resamples)
    pictures = Pictures(errors={}, places={})
    with ExitStack() as stack:
        pool = stack.enter_context(RasterPool(OPEN_FILES))
        maps = open_maps([_as_given(each) for each in (given, *against)], pool)
        als = None if references.als is None else open_reference(references.als, pool)
        sampled = [sample(each, maps, relocated=references.settings.relocate) for each in _shots(references, maps)]
        leaks = [] if als is None else _ground_leaks(maps, als)
        for each in sampled:
            leaks += leaks_of_shots([m.info for m in maps], each.reference.shots.source, *each.lonlat_deg)
        if not allow_leak:
            refuse_leaks(leaks)
        comparisons: list[Comparison] = []
        warnings: list[str] = []
        if als is not None:
            parts = stack.enter_context(open_strata(strata or Strata()))
            for some, gsd in grids(maps, als, gsd_m):
                comparison, seen = compare_lidar(
                    some, als, parts, gsd_m=gsd, statistic=chosen, draws=draws, progress=progress
                )
                pictures = _with_pictures(pictures, len(comparisons), seen)
                comparisons.append(comparison)
        elif strata is not None and (strata.land_cover or strata.polygons):
            warnings.append("land cover and polygons need a reference with pixels (--reference); shots are not cut by them")
        comparisons += [compared(each, draws) for each in sampled]
    result = ScoreResult(
        made=datetime.now(UTC).isoformat(timespec="seconds"),
        command=command,
        versions=_versions(),
        sign=SIGN,
        maps=tuple(each.info for each in maps),
        comparisons=tuple(comparisons),
        leaks=tuple(leaks),
        lineage=lineage_text([each.info for each in maps]),
        bootstrap=Bootstrap(resamples=resamples, square_m=RESAMPLED_M, seed=seed),
        warnings=(*warnings, *_warnings(maps, comparisons, leaks)),
    )
    if out is not None:
        _write(result, pictures, out)
    return result


def _as_given(given: GivenMap | Path | str) -> GivenMap:
    return given if isinstance(given, GivenMap) else GivenMap(path=Path(given))


def _statistic(text: str) -> Statistic:
    for name in get_args(Statistic):
        if text == name:
            return cast("Statistic", name)
    raise ScoreError(f"statistic {text!r} is not known; give {', '.join(get_args(Statistic))}")


def _refuse_existing(out: Path, *, overwrite: bool) -> None:
    there = [name for name in (FILE, PAGE) if (out / name).exists()]
    if there and not overwrite:
        raise OutputError(f"{out / there[0]} exists; choose another folder or pass --overwrite")


def _write(result: ScoreResult, pictures: Pictures, out: Path) -> None:
    from canopy.score.report import write_report

    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"{out} cannot be made ({error.strerror}); choose another folder") from error
    write_report(result, out, pictures)
    write_result(result, out)


def _versions() -> Versions:
    import rasterio

    return Versions(
        canopy=__version__, python=platform.python_version(), numpy=np.__version__, rasterio=rasterio.__version__,
        gdal=rasterio.__gdal_version__,
    )  # fmt: skip


# --- references ------------------------------------------------------------------------------------------------------------


def _shots(references: References, maps: Sequence[OpenMap]) -> list[Reference]:
    """The shots and plots near the first map."""
    from canopy.score.footprint import map_bounds_deg

    if not (references.gedi or references.atl08 or references.plots):
        return []
    settings = references.settings
    near = map_bounds_deg(maps[0].height_path)
    found: list[Reference] = []

    def add(kind: Kind, files: Sequence[Path], shots: object) -> None:
        found.append(Reference(kind=kind, files=tuple(files), shots=shots))  # type: ignore[arg-type]

    if references.gedi:
        from canopy.score.gedi import read_gedi

        chosen = settings.gedi if settings.gedi.bounds_deg else settings.gedi.model_copy(update={"bounds_deg": near})
        add("gedi", references.gedi, read_gedi(list(references.gedi), chosen))
    if references.atl08:
        from canopy.score.atl08 import read_atl08

        own = settings.atl08 if settings.atl08.bounds_deg else settings.atl08.model_copy(update={"bounds_deg": near})
        add("atl08", references.atl08, read_atl08(list(references.atl08), own))
    if references.plots is not None:
        from canopy.score.plots import read_plots

        if settings.plots is None:
            raise ScoreError(
                f"how to read {references.plots} is not said; give --settings with a table [plots]: height_column, "
                f"statistic, and radius_m or radius_column"
            )
        add("plots", [references.plots], read_plots(references.plots, settings.plots))
    return found


def _ground_leaks(maps: Sequence[OpenMap], reference: OpenReference) -> list[Leak]:
    """Leaks on the ground that a map and the reference share, file by file of the reference."""
    leaks: list[Leak] = []
    grounds = [(str(file.path), bounds_deg(file.grid)) for file in reference.rasters.files]
    for each in maps:
        covered = np.array([bounds_deg(file.grid) for file in each.height.files])
        west, south = covered[:, :2].min(axis=0)
        east, north = covered[:, 2:].max(axis=0)
        shared = [
            (name, (max(box[0], west), max(box[1], south), min(box[2], east), min(box[3], north))) for name, box in grounds
        ]
        leaks += leaks_of_ground([each.info], [(n, b) for n, b in shared if b[0] < b[2] and b[1] < b[3]])
    return leaks


# --- what a reader must know -----------------------------------------------------------------------------------------------


def _warnings(maps: Sequence[OpenMap], comparisons: Sequence[Comparison], leaks: Sequence[Leak]) -> list[str]:
    found = [f"LEAK: {leak.finding}" for leak in leaks]
    found += [
        f"{each.info.name}: what trained it is not known, so that a leak cannot be excluded"
        for each in maps
        if each.info.lineage == "unknown"
    ]
    for comparison in comparisons:
        reference = comparison.reference
        if reference.gap_days is None:
            found.append(f"{reference.name}: the time between it and a map's imagery is not known")
        elif reference.gap_days > LONG_GAP_DAYS:
            found.append(
                f"{reference.name}: up to {reference.gap_days} days lie between it and a map's imagery, more than two "
                f"years: growth and loss are in the errors"
            )
        if reference.n_refused:
            found.append(
                f"{comparison.title}: {reference.n_refused} cells have reference pixels with no possible height, taken as "
                f"unknown"
            )
        for score in comparison.maps:
            if score.n_missing > MUCH_MISSING * comparison.n_reference:
                found.append(
                    f"{comparison.title}: {score.name} lacks {score.n_missing / comparison.n_reference:.1%} of what the "
                    f"reference has; its score is of the rest"
                )
        if comparison.maps[0].measures.squares < LEAST_SQUARES:
            found.append(
                f"{comparison.title}: {comparison.maps[0].measures.squares} squares of ground are too few for intervals to "
                f"mean much"
            )
    return list(dict.fromkeys(found))


def _with_pictures(pictures: Pictures, number: int, seen: Pictured) -> Pictures:
    return Pictures(
        errors={**pictures.errors, **{(number, name): error for name, error in seen.errors.items()}},
        places={**pictures.places, **{(number, name): chips for name, chips in seen.places.items()}},
    )

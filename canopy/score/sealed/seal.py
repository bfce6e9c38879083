"""From a labelled tile set to a public task and a private key.

What is taken from the public side, because it leads to the labels: ids, sites and block names (they say where), positions
(outlines are coarsened to cells, images lose their place), exact dates, every column that comes from heights or their flight
(heights, shifts, gaps, valid fractions, names of LiDAR), and digests over label files. What stays is what a model needs: the
pixels with their validity, bands, pixel size, region by an opaque name, the month, licence and attribution. Chips get opaque
names in an order that the secret decides, because neighbours by name would be neighbours on the ground.

What cannot be taken away: imagery that is public elsewhere can be found again by its content. Therefore a submission's
lineage is audited.
"""

from __future__ import annotations

import math
import secrets
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Self, get_args

import numpy as np
import pandas as pd
import shapely
from affine import Affine
from numpy.typing import NDArray
from pyproj import CRS

from canopy.errors import OutputError, SealError
from canopy.grid import Grid
from canopy.metrics import RESAMPLED_M, ClassSums
from canopy.model.evaluate import Place, counted
from canopy.model.package import WEIGHTS, Contract, file_sha256, find_model, read_contract
from canopy.raster import Pixels, open_raster, read_raster, write_raster
from canopy.score.sealed.cells import coarse_outline
from canopy.score.sealed.confine import Ran
from canopy.score.sealed.headroom import Cell, Headroom, RegionSums, floor_sums, floors, headroom
from canopy.score.sealed.key import KeyWriter, Record, SealedChip, create_key, open_key
from canopy.score.sealed.kinship import parameters_in, sketch_of
from canopy.score.sealed.predict import Predict, Predictions, predictions, run_model
from canopy.score.sealed.scorer import Scorer
from canopy.score.sealed.task import IMAGES, INDEX, LEAVES, Base, Budget, Kind, Positions, Rules, Start, Task, write_task
from canopy.score.sealed.tree import SALT_BYTES, keyed, tree_root
from canopy.textfile import write_text
from canopy.tiler.chips import DROPPED, RECIPE, read_index
from canopy.tiler.fingerprint import fingerprint
from canopy.tiler.recipe import load_recipe
from canopy.tiler.split import BUFFER

NOWHERE: Final = CRS.from_wkt(
    'ENGCRS["place withheld",EDATUM["place withheld"],CS[Cartesian,2],AXIS["x",east],AXIS["y",north],LENGTHUNIT["metre",1]]'
)
"""The CRS of images whose place is withheld: metres from their own corner."""

DAY_S: Final = 86_400.0

Heights = NDArray[np.float32]

Progress = Callable[[str, int, int], None]
"""Called with the stage, what is done of it and how much there is."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """The budget, as far as it is given; what is None follows from what the base model takes."""

    seconds: float | None = None
    """None: ten times the base model's, at least 60."""
    parameters: int | None = None
    """None: ten times the base model's."""
    memory_mib: int | None = None
    """None: four times the base model's, at least 4096."""
    threads: int = 2

    def budget(self, base: Base) -> Budget:
        """The budget of a task."""
        return Budget(
            seconds=math.ceil(max(60.0, 10 * base.seconds)) if self.seconds is None else self.seconds,
            parameters=10 * base.parameters if self.parameters is None else self.parameters,
            memory_mib=max(4096, 4 * base.memory_mib) if self.memory_mib is None else self.memory_mib,
            threads=self.threads,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class SealSettings:
    """What kind of task it will be."""

    splits: Sequence[str] = ("test",)
    """Splits whose chips are sealed; "all" for every chip that is in one."""
    positions: Positions = "coarse"
    """Whether positions are coarsened or told exactly."""
    grid_km: float = 10.0
    """Side of the cells that outlines are coarsened to."""
    accepts: Sequence[Kind] = ("model", "map", "predictions")
    """What may be submitted."""
    starts_from: Start = "base"
    """Whether submissions have to descend from the base model."""
    buffer_m: float | None = None
    """What training has to keep away from sealed ground; None: the widest buffer of the sets' recipes."""
    by_site: bool | None = None
    """Whether whole sites and acquisitions are held out; None: what the recipes' splits say."""
    least_px: int = 500
    """A class of a region with fewer pixels is not scored."""
    jitter_m: float = 0.5
    """By how much labels and images may be apart, see `canopy.score.sealed.headroom`."""
    acquisitions: Sequence[str] = ()
    """Names under which the sealed LiDAR is published, to be left out of training; they become public."""
    limits: Limits = Limits()

    @classmethod
    def checked(cls, **given: Any) -> Self:
        """From words and numbers as people give them; what is None takes its default.

        Raises:
            SealError: a word that is none of those there are, or a number out of its range.
        """
        settings = cls(**{name: value for name, value in given.items() if value is not None})
        words = {"positions": get_args(Positions), "starts_from": get_args(Start), "accepts": get_args(Kind)}
        for name, valid in words.items():
            value = getattr(settings, name)
            for word in (value,) if isinstance(value, str) else value:
                if word not in valid:
                    raise SealError(f"{name.replace('_', ' ')} {word!r} is unknown; choose {', '.join(valid)}")
        limits = settings.limits
        least = {
            "least_px": (settings.least_px, 1), "jitter_m": (settings.jitter_m, 0), "buffer_m": (settings.buffer_m or 0, 0),
            "seconds": (limits.seconds or 1, 1e-9), "parameters": (limits.parameters or 1, 1),
            "memory_mib": (limits.memory_mib or 1, 1), "threads": (limits.threads, 1),
        }  # fmt: skip
        for name, (number, low) in least.items():
            if not (math.isfinite(number) and number >= low):
                raise SealError(f"{name} = {number:g} is out of range; give a number of at least {low:g}")
        return settings

    def rules(self, tile_sets: Sequence[Path]) -> Rules:
        """The rules of the task, with what the recipes of the tile sets promise where nothing else is asked for."""
        promised = [load_recipe(path / RECIPE).split for path in tile_sets if (path / RECIPE).is_file()]
        sites = all(split.method == "site-folds" for split in promised)
        return Rules(
            accepts=tuple(self.accepts),
            starts_from=self.starts_from,
            buffer_m=max((s.buffer_m for s in promised), default=0.0) if self.buffer_m is None else self.buffer_m,
            by_site=sites if self.by_site is None else self.by_site,
            least_px=self.least_px,
            jitter_m=self.jitter_m,
            square_m=RESAMPLED_M,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Sealed:
    """A task that was made."""

    folder: Path
    key: Path
    task: Task
    cells: tuple[Cell, ...]
    """What the base model scores, and where the floor is; not public."""
    warnings: tuple[str, ...]
    """What makes the base model a doubtful zero."""

    def as_json(self) -> dict[str, Any]:
        """Values that JSON holds; for who sealed it, not for the public."""
        cells = [
            {
                "region": cell.region, "height_class": cell.height_class, "pixels": cell.base.n, "left_out": cell.left_out,
                "floor_m": cell.floor_m, "base_mae_m": cell.base.mae_m if cell.base.n else None,
            }
            for cell in self.cells
        ]  # fmt: skip
        return {
            "root": self.task.root, "chips": self.task.chips, "regions": list(self.task.regions),
            "budget": self.task.budget.model_dump(), "base": self.task.base.model_dump(), "cells": cells,
            "warnings": list(self.warnings),
        }  # fmt: skip

    def as_text(self) -> str:
        """What was made, to read."""
        task = self.task
        budget, base = task.budget, task.base
        lines = [
            f"{self.folder}: {task.chips} chips of {len(task.regions)} regions without labels, root {task.root}",
            f"{self.key}: the labels; keep it, nobody can make it again",
            f"budget {budget.seconds:g} s, {budget.parameters:,} parameters, {budget.memory_mib} MiB",
            f"{base.name} takes {base.seconds:.1f} s, {base.parameters:,} parameters, {base.memory_mib} MiB here",
        ]
        for cell in self.cells:
            if cell.base.n:
                floor = "-" if cell.floor_m is None else f"{cell.floor_m:.2f} m"
                why = f", not scored: {cell.left_out}" if cell.left_out else ""
                lines.append(
                    f"{cell.region}, {cell.height_class}: {cell.base.n} pixels, MAE of the base model "
                    f"{cell.base.mae_m:.2f} m, floor {floor}{why}"
                )
        return "\n".join([*lines, *(f"warning: {warning}" for warning in self.warnings)])


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Source:
    """A chip of a tile set that will be sealed."""

    tile_set: Path
    row: Any
    """Its row in the index."""
    name: str
    """Its public name."""
    region: str

    def part(self, folder: str) -> Path:
        """Its image or height file."""
        return self.tile_set / folder / f"{self.row['id']}.tif"


def seal(
    tile_sets: Sequence[Path],
    out: Path,
    *,
    key: Path,
    base: Path | str,
    name: str | None = None,
    settings: SealSettings | None = None,
    predict: Predict = run_model,
    secret: bytes | None = None,
    progress: Progress | None = None,
) -> Sealed:
    """Make a public task and its private key.

    Args:
        tile_sets: Folders of labelled tile sets.
        out: The public folder; must not exist.
        key: The private file, outside `out`; must not exist.
        base: Model folder or name; submissions are measured from it.
        name: Of the task; default that of `out`.
        settings: What kind of task it will be.
        predict: What runs a model.
        secret: 32 bytes that salts, names and their order come from; default drawn from the system's generator.
        progress: Called as work goes on.

    Raises:
        SealError: nothing to seal or to score, chips that are not alike, or a base model that does not predict.
        OutputError: a place exists, or the key would be public.
        ContractError, RecipeError, RasterError: the base model or a tile set cannot be used.
    """
    settings = SealSettings() if settings is None else settings
    _refuse_places(out, key, settings.grid_km)
    drawn = secrets.token_bytes(SALT_BYTES) if secret is None else secret
    model = find_model(base)
    contract = read_contract(model)
    rules = settings.rules(tile_sets)
    chosen = _chosen(tile_sets, settings.splits, drawn)
    stage = out.with_name(f".{out.name}.part")
    with ExitStack() as cleaning:
        cleaning.callback(shutil.rmtree, stage, ignore_errors=True)
        shutil.rmtree(stage, ignore_errors=True)
        try:
            (stage / IMAGES).mkdir(parents=True)
            chips, places, imagery = _publish(chosen, stage, positions=settings.positions, progress=progress)
            index = _index(chosen, chips, stage, settings)
            index.to_parquet(stage / INDEX)
            # The base model has a day: what it takes is measured here, and the budget follows from it.
            generous = Budget(seconds=DAY_S, parameters=2**62, memory_mib=2**40, threads=settings.limits.threads)
            with predictions(model, stage / IMAGES, generous, predict=predict) as (ran, predicted):
                took = _base(model, contract, ran)
                task = Task(
                    name=name or out.name,
                    chips=len(chips),
                    regions=tuple(sorted({chip.region for chip in chips})),
                    bands=imagery[0],
                    dtype=imagery[1],
                    gsd_m=tuple(sorted({chip.gsd_m for chip in chips})),
                    positions=settings.positions,
                    grid_km=settings.grid_km,
                    licence=tuple(sorted(set(index["licence"]))),
                    attribution=tuple(sorted(set(index["image_source"]))),
                    acquisitions=tuple(settings.acquisitions),
                    budget=settings.limits.budget(took),
                    base=took,
                    rules=rules,
                    scorer=Scorer.here(),
                    files={INDEX: file_sha256(stage / INDEX)},
                )
                with create_key(key) as writer:
                    labels = _labels(chosen, chips, places, predicted, writer, task=task, progress=progress)
                    for tensor, numbers in sketch_of(model / WEIGHTS, drawn).items():
                        writer.add(f"sketch/{tensor}", numbers)
                    record = Record(
                        secret=drawn.hex(), task=task, chips=tuple(chips), base_training=contract.training,
                        floor_m=labels.floor_m,
                    )  # fmt: skip
                    writer.add_record(record)
            undo = cleaning.push(ExitStack())
            undo.callback(key.unlink, missing_ok=True)
            with open_key(key) as made:
                leaves = dict(made.leaves())
            write_text(stage / LEAVES, "".join(f"{leaf.hex()} {leaf_name}\n" for leaf_name, leaf in leaves.items()))
            task = task.model_copy(update={"root": tree_root([*leaves.values()]).hex()})
            write_task(stage, task)
            stage.rename(out)
            undo.pop_all()
        except OSError as error:
            raise OutputError(f"cannot write {out} ({error.strerror}); free disk space or choose another folder") from error
    return Sealed(folder=out, key=key, task=task, cells=labels.base.cells, warnings=tuple(_doubts(contract, chips, rules)))


@dataclass(frozen=True, slots=True, kw_only=True)
class _Labels:
    """What was measured while the labels were written."""

    floor_m: dict[str, tuple[float | None, ...]]
    base: Headroom


def _labels(
    chosen: Sequence[_Source],
    chips: Sequence[SealedChip],
    places: Sequence[Place],
    predicted: Predictions,
    writer: KeyWriter,
    *,
    task: Task,
    progress: Progress | None,
) -> _Labels:
    """Write what the key holds of every chip."""
    rules = task.rules
    floor = {region: ClassSums.zero(rules.class_edges_m) for region in task.regions}
    regions = {region: RegionSums(edges_m=rules.class_edges_m) for region in task.regions}
    for number, (chip, source, counts) in enumerate(zip(chips, chosen, counted(places), strict=True), 1):
        image, height_m = _labelled(source)
        base_m = predicted.heights(chip.name, chip.shape)
        scored = counts & ~np.isnan(base_m)
        label_m = np.where(scored, height_m, np.float32(np.nan))
        known = Pixels(data=height_m[None], valid=np.isfinite(height_m))
        arrays = {
            "height": label_m, "base": base_m, "image_codes": fingerprint(image), "height_codes": fingerprint(known),
        }  # fmt: skip
        for part, array in arrays.items():
            writer.add(f"{part}/{chip.name}", array)
        floor[chip.region] += floor_sums(
            height_m, scored, jitter_m=rules.jitter_m, gsd_m=chip.gsd_m, edges_m=rules.class_edges_m
        )
        add_chip(regions[chip.region], chip, heights_m=base_m, base_m=base_m, label_m=label_m, rules=rules)
        if progress is not None:
            progress("labels", number, len(chips))
    floor_m = {region: floors(sums) for region, sums in floor.items()}
    base = headroom(regions, floor_m, least_px=rules.least_px, generator=np.random.default_rng(0), resamples=1)
    if base is None:
        raise SealError(
            f"no class of any region has {rules.least_px} scored pixels and a base model that can be improved on; "
            f"seal more chips, or lower --least-px"
        )
    return _Labels(floor_m=floor_m, base=base)


def _base(model: Path, contract: Contract, ran: Ran) -> Base:
    """The base model with what it took."""
    if ran.ended != "itself" or ran.code:
        raise SealError(
            f"base model {contract.name} {contract.version} did not predict: {ran.said or ran.ended}; raise the budget, or "
            f"choose another base model with --base"
        )
    return Base(
        name=contract.name, version=contract.version, weights_sha256=file_sha256(model / WEIGHTS), licence=contract.licence,
        parameters=parameters_in(model / WEIGHTS), seconds=round(ran.seconds, 3), memory_mib=max(ran.memory_mib, 1),
    )  # fmt: skip


def _doubts(contract: Contract, chips: Sequence[SealedChip], rules: Rules) -> Iterator[str]:
    """Where the base model itself has seen what is sealed."""
    sites = {chip.site for chip in chips} & set(contract.training.sites)
    if rules.by_site and sites:
        yield f"the base model {contract.name} was trained at {', '.join(sorted(sites))}, which is sealed now"
    seen = shapely.union_all([shapely.box(*box) for box in contract.training.footprints_deg])
    inside = sum(seen.intersects(shapely.from_wkb(chip.footprint_wkb)) for chip in chips)
    if inside:
        yield f"{inside} of the {len(chips)} sealed chips lie in the training footprint of the base model {contract.name}"


def add_chip(
    sums: RegionSums, chip: SealedChip, *, heights_m: Heights, base_m: Heights, label_m: Heights, rules: Rules
) -> None:
    """Add a chip to the sums of its region, by the rules of its task."""
    sums.add(
        heights_m,
        base_m,
        label_m,
        first_px=(chip.row_px, chip.col_px),
        side_px=max(1, round(rules.square_m / chip.gsd_m)),
        place=f"{chip.crs_wkt} {chip.gsd_m:g}",
    )


def _refuse_places(out: Path, key: Path, grid_km: float) -> None:
    if key.resolve().is_relative_to(out.resolve()):
        raise OutputError(f"{key} lies in the public folder {out}, which would publish it; put the key elsewhere with --key")
    for path in (out, key):
        if path.exists() or path.is_symlink():
            raise OutputError(f"{path} exists; what was sealed cannot be sealed again: choose another name")
    if not key.parent.is_dir():
        raise OutputError(f"{key.parent} does not exist; make it first, or choose another place with --key")
    if not (math.isfinite(grid_km) and grid_km > 0):
        raise SealError(f"grid of {grid_km:g} km is not a positive length; give for example --grid-km 10")


def _chosen(tile_sets: Sequence[Path], splits: Sequence[str], secret: bytes) -> list[_Source]:
    """The chips to seal, under their public names and in their order."""
    found = []
    for path in tile_sets:
        index = read_index(path)
        usable = index[~index["split"].isin((BUFFER, DROPPED))]
        picked = usable if "all" in splits else usable[usable["split"].isin(splits)]
        if picked.empty:
            have = ", ".join(sorted(set(usable["split"]))) or "no chip that may be used"
            raise SealError(f"{path} has no chip in split {', '.join(splits)} (it has {have}); choose with --split, or all")
        found += [(path, row) for _, row in picked.iterrows()]
    sites = sorted({str(row["site"]) for _, row in found}, key=lambda site: keyed(secret, "region", site))
    regions = {site: f"region-{number}" for number, site in enumerate(sites, 1)}
    found.sort(key=lambda each: keyed(secret, "order", f"{each[0].resolve()}\0{each[1]['id']}"))
    digits = len(str(len(found)))
    return [
        _Source(tile_set=path, row=row, name=f"chip-{number:0{digits}d}", region=regions[str(row["site"])])
        for number, (path, row) in enumerate(found, 1)
    ]


def _labelled(source: _Source) -> tuple[Pixels, Any]:
    with open_raster(source.part("image")) as raster:
        image = raster.read(0, 0, raster.shape)
    height, _ = read_raster(source.part("height"))
    if height.data.dtype != np.float32 or height.data.shape[1:] != image.valid.shape:
        raise SealError(
            f"{source.part('height')} is {height.data.dtype} {height.data.shape[1:]}, not float32 {image.valid.shape}; "
            f"build the tile set again"
        )
    return image, height.data[0]


def _publish(
    chosen: Sequence[_Source], stage: Path, *, positions: str, progress: Progress | None
) -> tuple[list[SealedChip], list[Place], tuple[tuple[str, ...], str]]:
    """Write the public images; the chips as the key knows them, what is known of each, and bands and data type of all."""
    chips, places = [], []
    alike: tuple[tuple[str, ...], str] | None = None
    for number, source in enumerate(chosen, 1):
        with open_raster(source.part("image")) as raster:
            grid, names = raster.grid, tuple(name or f"band {k}" for k, name in enumerate(raster.band_names, 1))
        image, height_m = _labelled(source)
        names = names[: len(image.data)]
        if alike is None:
            alike = (names, image.data.dtype.name)
        elif alike != (names, image.data.dtype.name):
            raise SealError(
                f"chip {source.row['id']} of {source.tile_set} has {image.data.dtype} {', '.join(names)}, others have "
                f"{alike[1]} {', '.join(alike[0])}; seal sets of one kind of imagery"
            )
        gsd_m = float(source.row["gsd_m"])
        there = Grid(crs=NOWHERE, transform=Affine(gsd_m, 0, 0, 0, -gsd_m, 0), shape=grid.shape)
        # What an image holds under its mask is nobody's business, and may be more than was meant to be shown.
        shown = np.where(image.valid, image.data, image.data.dtype.type(0))
        write_raster(
            stage / IMAGES / f"{source.name}.tif", shown, grid=grid if positions == "exact" else there, valid=image.valid,
            band_names=names,
        )  # fmt: skip
        chips.append(_sealed_chip(source, grid))
        places.append(
            Place(
                chips=None,  # type: ignore[arg-type]  # nothing is read through it: the pixels are known
                item=number,
                lattice=(str(source.row["site"]), str(source.row["crs"]), gsd_m),
                row_px=int(source.row["row_px"]),
                col_px=int(source.row["col_px"]),
                shape=grid.shape,
                bits=np.packbits(image.valid & np.isfinite(height_m)),
                calibrates=False,
                scores=True,
            )
        )
        if progress is not None:
            progress("images", number, len(chosen))
    assert alike is not None, "there is a chip"
    return chips, places, alike


def _sealed_chip(source: _Source, grid: Grid) -> SealedChip:
    row = source.row
    days = {name: None if pd.isna(row[name]) else row[name] for name in ("image_date", "lidar_date")}
    a, b, c, d, e, f = tuple(grid.transform)[:6]
    return SealedChip(
        name=source.name, region=source.region, tile_set=source.tile_set.name, id=str(row["id"]), site=str(row["site"]),
        crs_wkt=grid.crs.to_wkt(), transform=(a, b, c, d, e, f), shape=grid.shape, row_px=int(row["row_px"]),
        col_px=int(row["col_px"]), gsd_m=float(row["gsd_m"]), footprint_wkb=shapely.to_wkb(row["geometry"], hex=True),
        item=str(row["item"]), image_source=str(row["image_source"]), lidar_source=str(row["lidar_source"]),
        derived_from=str(row["derived_from"]), sha256=str(row["sha256"]), **days,
    )  # fmt: skip


def _index(chosen: Sequence[_Source], chips: Sequence[SealedChip], stage: Path, settings: SealSettings) -> Any:
    """The public index."""
    import geopandas as gpd

    outlines = [source.row["geometry"] for source in chosen]
    columns = {
        "id": [chip.name for chip in chips],
        "region": [chip.region for chip in chips],
        "gsd_m": [chip.gsd_m for chip in chips],
        "rows_px": [chip.shape[0] for chip in chips],
        "cols_px": [chip.shape[1] for chip in chips],
        "image_month": ["" if chip.image_date is None else f"{chip.image_date:%Y-%m}" for chip in chips],
        "image_source": [chip.image_source for chip in chips],
        "licence": [str(source.row["licence"]) for source in chosen],
        "image_sha256": [file_sha256(stage / IMAGES / f"{chip.name}.tif") for chip in chips],
    }
    coarse = [coarse_outline(outline, settings.grid_km) for outline in outlines]
    shown = outlines if settings.positions == "exact" else coarse
    return gpd.GeoDataFrame(columns, geometry=shown, crs="EPSG:4326")

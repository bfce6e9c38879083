"""What models say of ground with known heights that none of them was trained on, and the tables made from it.

The tables turn the spread of a model, of several, or of one that is shown windows in several turns into intervals.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from canopy.errors import ContractError, OutputError, RecipeError
from canopy.model.calibrate import Calibration, calibrate
from canopy.model.card import rewrite_card
from canopy.model.data import ChipDataset, Imagery
from canopy.model.evaluate import evaluate_chips
from canopy.model.held_out import About, write_held_out
from canopy.model.package import file_sha256, find_model, read_contract, update_contract
from canopy.model.recipe import Calibrate
from canopy.model.reference import describe
from canopy.model.scores import SiteCoverage
from canopy.model.shift import FILE as SHIFT
from canopy.model.shift import ShiftReference, save_shift
from canopy.model.tables import Calibrated
from canopy.mosaicker.ensemble import Ensemble, load_ensemble
from canopy.raster import delete
from canopy.tiler.chips import DROPPED, read_index, tile_set_hash
from canopy.tiler.split import BUFFER

LEAST_SITES = 10
"""Fewer sites than this do not show how much places differ."""

Progress = Callable[[int, int], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class CalibrationResult:
    """The tables and what they were measured to hold."""

    calibrated: Calibrated
    shift: ShiftReference | None
    """What the calibration data look like; None for augmented or averaged predictions, and where they are too few."""
    coverage: tuple[SiteCoverage, ...]
    """Each site by tables fitted on the others."""
    warnings: tuple[str, ...]
    """What weakens the promise."""

    def as_json(self) -> dict[str, Any]:
        """As a table."""
        return {
            "calibration": self.calibrated.model_dump(mode="json"),
            "coverage": [site.model_dump() for site in self.coverage], "warnings": [*self.warnings],
        }  # fmt: skip

    def lines(self) -> Iterator[str]:
        """What to tell people."""
        pixels, blocks = self.calibrated.pixels, self.calibrated.blocks
        yield f"{pixels.nominal:.0%} intervals fitted on {sum(pixels.pixels)} pixels of {', '.join(pixels.sites)}"
        for site in self.coverage:
            if site.coverage is not None:
                yield (
                    f"  {site.site}, by the other sites: held {site.coverage:.1%} of {site.n} pixels, "
                    f"mean width {site.mean_width_m:.2f} m"
                )
        if blocks is not None:
            factors = zip(blocks.sides_m, blocks.lower_factor, blocks.upper_factor, strict=True)
            told = ", ".join(f"{side_m:g} m -{down:.2f} +{up:.2f}" for side_m, down, up in factors)
            yield f"error of means over squares, in half-widths of a pixel's: {told}"
        yield from self.warnings


def calibrate_models(
    models: Path | str | Sequence[Path | str],
    tile_sets: Sequence[Path],
    *,
    splits: Sequence[str] | None = None,
    tta: str = "none",
    settings: Calibrate | None = None,
    device: str = "cpu",
    precision: str = "float32",
    allow_leak: bool = False,
    seed: int = 0,
    progress: Progress | None = None,
) -> CalibrationResult:
    """Fit the tables of a way of predicting on tile sets.

    Nothing is written; see `keep_tables`.

    Args:
        models: Model folder or name, or several whose heights are averaged.
        tile_sets: Folders of tile sets on the imagery that the models take.
        splits: Splits whose chips calibrate. Default: all, but of a set that trained one of the models only `val`.
        tta: Test-time augmentation, as for `map_region`.
        settings: How to fit.
        device: Where the models run.
        precision: What they compute in.
        allow_leak: Calibrate on ground that a model was trained on as well, which promises more than will be held.
        seed: Draws the pixels of large chips.
        progress: Called with the number of chips done and of all, tile set by tile set.

    Raises:
        RecipeError: no tile set; chips that trained one of the models; too few pixels.
        ContractError: the models do not go together, or the chips are not what they take.
    """
    settings = Calibrate() if settings is None else settings
    ensemble = load_ensemble(models, device, tta=tta, precision=precision)
    contract = ensemble.contract
    if not tile_sets:
        raise RecipeError("no tile set is given; give the folder of at least one that canopy tile made")
    imagery = Imagery(bands=contract.bands, value_range=contract.value_range, gsd_range_m=contract.gsd_range_m)
    chips = []
    for path in tile_sets:
        wanted = tuple(splits) if splits is not None else _splits(path, ensemble)
        dataset = ChipDataset(path, wanted, imagery=imagery)
        if not allow_leak:
            _refuse_training_ground(dataset, ensemble)
        chips.append((dataset, True, False))
    with TemporaryDirectory(prefix="canopy-calibrate-") as scratch:
        about = About(
            name=ensemble.name, training_sha256="", weights_sha256="", tile_sets={}, trained_sites=(), training_mean_m=0.0,
            forest_px=0,
        )  # fmt: skip
        # On disk, since the predictions are read several times and those of a large set do not fit into memory.
        held_out = write_held_out(Path(scratch), about, evaluate_chips(ensemble, None, chips, progress=progress))
        fitted = calibrate(held_out, settings, np.random.default_rng([seed, 2]))
        # Features of other predictions than a model's own would be compared with those of no map.
        shift, unknown = describe(held_out, tile_sets, contract) if ensemble.members == 1 else (None, None)
    digests = {path.name: tile_set_hash(path) for path in tile_sets}
    calibrated = ensemble.calibrated(fitted.table, fitted.blocks, digests)
    coverage = tuple(SiteCoverage.of(site, "left out of the fit", c) for site, c in fitted.left_out.items())
    warnings = (*_warnings(fitted), *([] if unknown is None else [unknown]))
    return CalibrationResult(calibrated=calibrated, shift=shift, coverage=coverage, warnings=warnings)


def _splits(tile_set: Path, ensemble: Ensemble) -> tuple[str, ...]:
    found = tuple(sorted(set(read_index(tile_set)["split"]) - {BUFFER, DROPPED}))
    if not _trained(tile_set, ensemble):
        return found
    if "val" not in found:
        raise RecipeError(
            f"{tile_set} trained {ensemble.name} and has no chip in split val; give another tile set, or --split"
        )
    return ("val",)


def _trained(tile_set: Path, ensemble: Ensemble) -> bool:
    digest = tile_set_hash(tile_set)
    return any(digest in model.contract.training.tile_sets.values() for model in ensemble.models)


def _refuse_training_ground(chips: ChipDataset, ensemble: Ensemble) -> None:
    """Intervals fitted where a model was trained are too narrow anywhere else."""
    import shapely

    index = read_index(chips.tile_set).set_index("id").loc[list(chips.ids)]
    remedy = "calibrate on other ground, or give --allow-leak for tables that promise more than they hold"
    if _trained(chips.tile_set, ensemble):
        # The boxes of its sites hold the blocks that were kept from training too, so the split decides.
        if (index["split"] == "train").any():
            raise RecipeError(f"split train of {chips.tile_set} trained {ensemble.name}; take --split val, {remedy}")
        return
    outlines = index.to_crs("EPSG:4326").geometry
    for model in ensemble.models:
        training = model.contract.training
        for box in training.footprints_deg:
            inside = outlines.intersects(shapely.box(*box))
            if inside.any():
                first = outlines.index[inside][0]
                where = ", ".join(f"{edge:.4f}" for edge in box)
                raise RecipeError(
                    f"{int(inside.sum())} of {len(index)} chips of {chips.tile_set}, {first} for one, lie in ({where}) "
                    f"degrees, on which {model.contract.name} was trained; {remedy}"
                )


def _warnings(fitted: Calibration) -> Iterator[str]:
    sites = fitted.table.sites
    if len(sites) < LEAST_SITES:
        yield (
            f"only {len(sites)} site{'s' * (len(sites) > 1)} calibrated ({', '.join(sites)}): at a place unlike "
            f"{'them' if len(sites) > 1 else 'it'} the intervals may hold far less than {fitted.table.nominal:.0%}; "
            f"{LEAST_SITES} or more that differ are needed to say how much"
        )
    if fitted.blocks is None:
        yield "too few squares of ground to say how wrong means over areas are; calibrate on larger sites"


# --- keeping -------------------------------------------------------------------------------------------------------------


def keep_tables(
    result: CalibrationResult, models: Sequence[Path | str], *, out: Path | None = None, overwrite: bool = False
) -> Path:
    """Write the tables into a file or, with what they hold, into the contract and the card of the model.

    Args:
        result: Of these models.
        models: Model folders or names.
        out: The file; None: the folder of the model.
        overwrite: Replace the file, or the tables that the model has.

    Returns:
        The file or the folder.

    Raises:
        ContractError: no file is given for the tables of several models or of augmented predictions, or the model has
            tables.
        OutputError: the file exists, or something cannot be written.
    """
    if out is not None:
        if out.exists() and not overwrite:
            raise OutputError(f"{out} exists; choose another file, or --overwrite")
        result.calibrated.write(out)
        return out
    made = result.calibrated
    if made.tta != "none" or len(made.members) > 1:
        raise ContractError(
            f"tables of {' + '.join(m.name for m in made.members)} with test-time augmentation {made.tta} are of no single "
            f"model; keep them in a file with --out, for canopy map --calibration"
        )
    folder = find_model(models[0])
    contract = read_contract(folder)
    if contract.calibration is not None and not overwrite:
        raise ContractError(
            f"{contract.name} is calibrated on {', '.join(contract.calibration.sites)}; replace that with --overwrite, or "
            f"keep the new tables in a file with --out"
        )
    assert [m.weights_sha256 for m in made.members] == [contract.weights_sha256], f"{folder} is another model by now"
    digest = None if result.shift is None else file_sha256(save_shift(folder, result.shift))
    update_contract(folder, contract, calibration=made.pixels, blocks=made.blocks, shift_sha256=digest)
    if digest is None:
        delete(folder / SHIFT)
    rewrite_card(folder, result.coverage)
    return folder

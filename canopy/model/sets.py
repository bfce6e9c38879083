"""The tile sets of a recipe: what trains, what is held out, and what the model's contract says about them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Final

from canopy.errors import RecipeError
from canopy.model.data import ChipDataset, Imagery, TrainingSet
from canopy.model.package import Contract, Training
from canopy.model.recipe import TrainingRecipe
from canopy.raster import open_raster
from canopy.tiler.chips import read_index, tile_set_hash
from canopy.tiler.recipe import resolve

DTYPE: Final = "uint8"
"""Of the imagery that models are trained on here."""


class DataSets:
    """The recipe's tile sets, opened, and what is taken from each."""

    def __init__(self, recipe: TrainingRecipe, folder: Path) -> None:
        self.recipe, self.folder = recipe, folder
        self.paths = [resolve(s.path, folder) for s in recipe.data.set]
        self.indexes = [read_index(path) for path in self.paths]
        known = {site for index in self.indexes for site in index["site"]}
        if unknown := sorted(set(recipe.data.hold_out_sites) - known):
            raise RecipeError(
                f"site {unknown[0]!r} is to be held out but is in no tile set; the sites are {', '.join(sorted(known))}"
            )
        for which in range(len(self.paths)):
            self._check_fits(which)

    def _check_fits(self, which: int) -> None:
        """Refuses a set that the model could not be trained on, before anything is computed.

        Bands, type and values are looked at on the first chip of the set; every other chip is looked at when it is read.
        """
        path, index, model = self.paths[which], self.indexes[which], self.recipe.model
        low, high = model.gsd_range_m
        for gsd_m in sorted(set(index["gsd_m"])):
            if not low <= gsd_m <= high:
                raise RecipeError(
                    f"{path} has a GSD of {gsd_m:g} m, outside gsd_range_m {low:g} to {high:g} of the model; "
                    f"widen the range, build the set again with a gsd_m inside it, or leave the set out"
                )
        used = index[~index["site"].isin(list(self._excluded(which, held_out=False)))].sort_values("id")
        if used.empty:
            return
        if not (used["valid_fraction"] > 0).any():
            raise RecipeError(
                f"{path} has {len(used)} chips and not one pixel with a known height; "
                f"look at them with `canopy tile inspect {path}`, or leave the set out"
            )
        first = path / "image" / f"{used['id'].iloc[0]}.tif"
        with open_raster(first) as raster:
            names, count, dtype = raster.band_names, raster.count, raster.dtype
        wanted = ", ".join(model.bands)
        if count != len(model.bands):
            raise RecipeError(
                f"{path} has chips of {count} bands, but the model takes {len(model.bands)} ({wanted}); "
                f"set `bands` of the tile set's recipe and build it again, or set model.bands to what the chips hold"
            )
        # Names are compared where the chips carry some of those the model uses; others say nothing about the order.
        given = tuple((name or "").casefold() for name in names)
        if set(given) & {band.casefold() for band in model.bands} and given != tuple(b.casefold() for b in model.bands):
            raise RecipeError(
                f"{path} has chips of the bands {', '.join(given)}, but the model takes {wanted} in this order; "
                f"set `bands` of the tile set's recipe and build it again, or set model.bands to what the chips hold"
            )
        if dtype != DTYPE:
            raise RecipeError(
                f"{path} has chips of {dtype}, but the model takes {DTYPE}; rescale the imagery and build the set again"
            )

    def _excluded(self, which: int, *, held_out: bool) -> tuple[str, ...]:
        """The sites of a set not to use; those held out among them when asked for."""
        unwanted = {*self.recipe.data.set[which].exclude_sites, *(self.recipe.data.hold_out_sites if held_out else ())}
        return tuple(sorted(unwanted & set(self.indexes[which]["site"])))

    def _has(self, which: int, splits: Sequence[str], excluded: Sequence[str]) -> bool:
        index = self.indexes[which]
        return bool((index["split"].isin(list(splits)) & ~index["site"].isin(list(excluded))).any())

    def training(self) -> list[TrainingSet]:
        """What trains.

        Raises:
            RecipeError: nothing does.
        """
        sampling, model = self.recipe.sampling.model_dump(), self.recipe.model
        imagery = Imagery(bands=model.bands, value_range=model.value_range, gsd_range_m=model.gsd_range_m)
        sets = [
            TrainingSet(
                tile_set=self.paths[k],
                share=s.share,
                batch=s.batch,
                crop_px=s.crop_px,
                split=s.train,
                exclude_sites=self._excluded(k, held_out=True),
                imagery=imagery,
                **sampling,
            )
            for k, s in enumerate(self.recipe.data.set)
            if self._has(k, s.train, self._excluded(k, held_out=True))
        ]
        if not sets:
            found = "; ".join(
                f"{path.name} has {', '.join(f'{n} {name}' for name, n in sorted(index['split'].value_counts().items()))}"
                for path, index in zip(self.paths, self.indexes, strict=True)
            )
            raise RecipeError(
                f"no tile set has a chip in the splits that train ({found}); name others in `train`, hold fewer "
                f"sites out, or change [split] or [quality] of the tile set's recipe and build it again"
            )
        return sets

    def training_chips(self) -> list[ChipDataset]:
        """The whole chips that train, nothing random."""
        return [ChipDataset(s.tile_set, s.split, exclude_sites=s.exclude_sites) for s in self.training()]

    def held_out(self) -> list[tuple[ChipDataset, bool, bool]]:
        """(chips, whether they calibrate, whether they are scored), every held-out chip once."""
        result = []
        for k, s in enumerate(self.recipe.data.set):
            excluded = self._excluded(k, held_out=True)
            for split in sorted({*s.calibrate, *s.score}):
                if self._has(k, (split,), excluded):
                    chips = ChipDataset(self.paths[k], split, exclude_sites=excluded)
                    result.append((chips, split in s.calibrate, split in s.score))
            sites = sorted(
                set(self.recipe.data.hold_out_sites) & set(self.indexes[k]["site"]) - set(self._excluded(k, held_out=False))
            )
            if sites:
                # The whole site is held out, so its split, buffer included, does not matter.
                splits = tuple(sorted(set(self.indexes[k]["split"])))
                use = self.recipe.data.hold_out_use
                chips = ChipDataset(self.paths[k], splits, sites=sites)
                result.append((chips, "calibrate" in use and s.ships, "score" in use or not s.ships))
        return result

    def sources(self) -> list[dict[str, str]]:
        """Site, sources and licence of what trains, without repetition, for the card."""
        rows = []
        for s in self.training():
            index = self.indexes[self.paths.index(s.tile_set)]
            used = index[index["split"].isin(list(s.split)) & ~index["site"].isin(list(s.exclude_sites))]
            for values, chips in used.groupby(["site", "image_source", "lidar_source", "licence"]):
                names = ("site", "image_source", "lidar_source", "licence")
                rows.append(dict(zip(names, values, strict=True)) | {"chips": str(len(chips))})
        return rows

    def footprints_deg(self) -> dict[str, tuple[float, float, float, float]]:
        """Bounding box of the training chips of each site, (west, south, east, north)."""
        boxes: dict[str, tuple[float, float, float, float]] = {}
        for s in self.training():
            index = self.indexes[self.paths.index(s.tile_set)]
            used = index[index["split"].isin(list(s.split)) & ~index["site"].isin(list(s.exclude_sites))]
            for site, chips in used.groupby("site"):
                west, south, east, north = (float(v) for v in chips.total_bounds)
                extend(boxes, site, (west, south, east, north))
        return boxes

    def contract(self) -> Contract:
        """What the model will be and may be given, before it has scores and a calibration."""
        model = self.recipe.model
        footprints = self.footprints_deg()
        trained = {s.tile_set: s for s in self.training()}
        fields = model.model_dump(
            include={
                "name", "version", "description", "licence", "bands", "gsd_range_m", "value_range", "mean", "std", "fill",
                "window_px", "stride_px", "weights_dtype",
            }
        )  # fmt: skip
        return Contract(
            **fields,
            network=model.architecture(),
            dtype=DTYPE,
            training=Training(
                sites=tuple(sorted(footprints)),
                tile_sets={path.name: tile_set_hash(path) for path in trained},
                recipe_sha256=self.recipe.sha256(),
                footprints_deg=tuple(footprints[site] for site in sorted(footprints)),
            ),
        )


def extend(boxes: dict[str, tuple[float, float, float, float]], site: str, box: tuple[float, float, float, float]) -> None:
    """Make the (west, south, east, north) of `site` hold `box` as well."""
    west, south, east, north = boxes.get(site, box)
    boxes[site] = (min(west, box[0]), min(south, box[1]), max(east, box[2]), max(north, box[3]))

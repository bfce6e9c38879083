"""Which chips train, which choose the model and which test it: geographic blocks, whole sites, and a buffer between them.

Pure functions of where the chips are. Three ways to draw, of which a recipe names one as its `method`:

- `hash`: a block's split is a hash of its name and the seed, so it does not depend on which other chips exist: adding an
  acquisition never moves a chip from test to train. The price is chance: a split may get no tall forest.
- `stratified`: the blocks are dealt so that every split gets its share of every height class. It depends on the other
  chips: adding an acquisition may move old chips from test to train, and a model trained before must then not be scored on
  the new test set. It is for a tile set that is finished, or too small for chance to balance.
- `site-folds`: whole sites, in n folds of which one tests; the question is then how a model does where it has never been.
  Over the n recipes every site tests once. Folds keep to a difference of one site, and adding a site moves few others
  (consistent hashing with bounded loads, Mirrokni et al. 2018).
"""

from __future__ import annotations

import hashlib
import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Final, Literal, Self

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, model_validator
from pyproj import CRS, Transformer
from shapely import STRtree, box

from canopy.errors import RecipeError

Split = Literal["train", "val", "test"]

TOUCHING_M: Final = 1e-3
"""Chips no farther apart than this touch: edges at large coordinates are rounded, and LiDAR is good to decimetres."""

BUFFER: Final = "buffer"
"""The split of a chip that is given up because it lies too near a chip of another split."""


class SplitSettings(BaseModel):
    """How a tile set is divided. Explicit blocks go before explicit sites, and these before what the method draws."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    seed: int
    """Another seed draws another assignment of blocks."""
    block_m: float = Field(gt=0)
    """Side of the square blocks, which are anchored to the origin of the chips' CRS."""
    buffer_m: float = Field(ge=0)
    """Chips of two splits are more than this far apart, edge to edge; 0 still parts chips that touch."""
    method: Literal["hash", "stratified", "site-folds"] = "hash"
    """How what is not named is drawn; see the head of this module."""
    train: float = Field(default=0.0, ge=0, le=1)
    """Share of the blocks with `hash`, of the chips with `stratified`; `site-folds` has no shares."""
    val: float = Field(default=0.0, ge=0, le=1)
    test: float = Field(default=0.0, ge=0, le=1)
    class_limits_m: tuple[float, ...] = (2.0, 10.0, 20.0, 30.0)
    """Limits between the height classes that `stratified` balances; a chip's height is its 95th percentile."""
    folds: int = Field(default=0, ge=0)
    """Number of `site-folds`, at least 3: one tests, the next one validates, the others train."""
    fold: int = Field(default=0, ge=0)
    """The fold that tests, 1 to `folds`."""
    sites: dict[Split, tuple[str, ...]] = Field(default_factory=dict)
    """Whole sites that go to one split."""
    blocks: dict[Split, tuple[str, ...]] = Field(default_factory=dict)
    """Whole blocks, by the name the index gives them, that go to one split."""
    groups: tuple[tuple[str, ...], ...] = ()
    """Chips that must share a split, by id or by the name of the image they were cut from."""

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        shares = self.train + self.val + self.test
        if self.method == "site-folds":
            if self.folds < 3 or not 1 <= self.fold <= self.folds:
                raise ValueError(
                    f"fold {self.fold} of {self.folds} folds: site-folds needs folds >= 3 and 1 <= fold <= folds"
                )
            if shares:
                raise ValueError("site-folds has no shares; remove train, val and test")
            if self.blocks:
                raise ValueError("site-folds keeps sites whole; remove blocks, or name whole sites under sites")
        elif self.folds or self.fold:
            raise ValueError(f"folds and fold belong to method = 'site-folds', not to {self.method!r}; remove them")
        elif not math.isclose(shares, 1.0, abs_tol=1e-9):
            raise ValueError(f"train + val + test = {shares:g} must be 1")
        if any(low >= high for low, high in pairwise(self.class_limits_m)):
            raise ValueError(f"class_limits_m {self.class_limits_m} must rise")
        for what, table in (("site", self.sites), ("block", self.blocks)):
            names = [name for members in table.values() for name in members]
            if twice := sorted({name for name in names if names.count(name) > 1}):
                raise ValueError(f"{what} {twice[0]!r} is given to two splits; keep one")
        return self


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """What a split needs to know of a chip."""

    id: str
    site: str
    item: str
    """Name of the image, or simulated scene, that the chip was cut from."""
    crs: CRS
    """Metric CRS of the lattice."""
    centre_m: tuple[float, float]
    """(x, y) of the centre of the chip's window, which the lattice alone fixes."""
    footprint_m: tuple[float, float, float, float]
    """(left, bottom, right, top) of the imagery in the window: padding is no ground and leaks nothing."""
    height_p95_m: float = math.nan
    """95th percentile of the chip's heights; only `stratified` needs it."""


def crs_key(crs: CRS) -> str:
    """A short, stable name of a CRS: its authority code, else a hash of its definition."""
    epsg = crs.to_epsg()
    return f"EPSG:{epsg}" if epsg else f"WKT:{hashlib.sha256(crs.to_wkt().encode()).hexdigest()[:8]}"


def block_of(crs: CRS, centre_m: tuple[float, float], block_m: float) -> str:
    """The name of the block that holds a point: CRS, row (southwards, as on the lattice) and column from the CRS origin."""
    x, y = centre_m
    return f"{crs_key(crs)}/{math.floor(-y / block_m)}/{math.floor(x / block_m)}"


def draw_split(block: str, settings: SplitSettings) -> Split:
    """The split that the seed draws for a block; the same whatever other blocks there are."""
    uniform = _draw(settings.seed, block)
    if uniform < settings.test:
        return "test"
    return "val" if uniform < settings.test + settings.val else "train"


def _draw(seed: int, name: str) -> float:
    """A number in [0, 1) that a name and the seed fix."""
    return int.from_bytes(hashlib.sha256(f"{seed}:{name}".encode()).digest()[:8], "big") / 2**64


def assign(places: Sequence[Place], settings: SplitSettings) -> list[tuple[str, str]]:
    """(block, split) of every chip, the buffer not yet taken out.

    Chips of a group take the block of the group's first member (by id), and so does every chip that shares a group with one
    of them. With `site-folds`, the sites of a group share a fold.

    Raises:
        RecipeError: a site, block or group member that no chip has, a group that is given to two splits, fewer sites than
            folds, or a chip without a height to stratify by.
    """
    blocks = {place.id: block_of(place.crs, place.centre_m, settings.block_m) for place in places}
    sites = {place.id: place.site for place in places}
    joined = _join(places, settings.groups)
    for members in joined:
        for member in members:
            blocks[member] = blocks[members[0]]
    _refuse_unknown("site", settings.sites, set(sites.values()))
    _refuse_unknown("block", settings.blocks, set(blocks.values()))
    by_site = {name: split for split, names in settings.sites.items() for name in names}
    by_block = {name: split for split, names in settings.blocks.items() for name in names}

    splits = {chip: by_block.get(blocks[chip]) or by_site.get(sites[chip]) for chip in blocks}
    free = [place for place in places if splits[place.id] is None]
    match settings.method:
        case "hash":
            splits |= {place.id: draw_split(blocks[place.id], settings) for place in free}
        case "stratified":
            dealt = deal_by_height(places, [blocks[place.id] for place in places], [splits[p.id] for p in places], settings)
            splits |= {place.id: dealt[blocks[place.id]] for place in free}
        case "site-folds":
            units = _join_sites(
                {place.site for place in free}, [{sites[m] for m in members} - by_site.keys() for members in joined]
            )
            folds = site_folds(units, settings)
            splits |= {place.id: _split_of_fold(folds[place.site], settings) for place in free}
    for members in joined:
        if len({splits[member] for member in members}) > 1:
            raise RecipeError(
                f"the group of {members[0]!r} and {members[-1]!r} is given to two splits by their sites; "
                f"give the sites to one split or take the group apart"
            )
    return [(blocks[place.id], splits[place.id] or "") for place in places]


def _refuse_unknown(what: str, table: dict[Split, tuple[str, ...]], known: set[str]) -> None:
    if unknown := sorted({name for names in table.values() for name in names} - known):
        some = ", ".join(sorted(known)[:5])
        raise RecipeError(f"no chip lies in {what} {unknown[0]!r} named by the split; the tile set has for example {some}")


def _join(places: Sequence[Place], groups: Sequence[Sequence[str]]) -> list[list[str]]:
    """The ids of the chips that hang together through `groups`, each list sorted."""
    named: dict[str, set[str]] = defaultdict(set)
    for place in places:
        named[place.id].add(place.id)
        named[place.item].add(place.id)
    joined: list[set[str]] = []
    for group in groups:
        if unknown := [name for name in group if name not in named]:
            raise RecipeError(f"no chip and no image is called {unknown[0]!r}, as a split group says; correct the name")
        members = set().union(*(named[name] for name in group))
        touching = [other for other in joined if other & members]
        joined = [other for other in joined if not other & members] + [members.union(*touching)]
    return [sorted(members) for members in joined if members]


# --- whole sites, in folds ------------------------------------------------------------------------------------------------


def _join_sites(sites: Iterable[str], groups: Iterable[set[str]]) -> list[tuple[str, ...]]:
    """The sites in units that must share a fold, each sorted."""
    units = [{site} for site in sites]
    for group in groups:
        touching = [unit for unit in units if unit & group]
        units = [unit for unit in units if not unit & group] + ([set().union(*touching)] if touching else [])
    return sorted(tuple(sorted(unit)) for unit in units)


def site_folds(units: Sequence[tuple[str, ...]], settings: SplitSettings) -> dict[str, int]:
    """The fold (1 to `folds`) of every site.

    Every unit has an order of preference among the folds, drawn by the seed, and takes the first fold that has room. A fold
    has room below the average load, rounded up, unless the units left are all needed to bring others to the average,
    rounded down. So folds differ by one unit at most, and a new site displaces few others.

    Args:
        units: Sites that must stay together, by their first the unit's name.
        settings: Seed and number of folds.

    Raises:
        RecipeError: fewer units than folds.
    """
    folds = settings.folds
    if len(units) < folds:
        raise RecipeError(
            f"{len(units)} sites that may be parted make no {folds} folds; lower folds to {len(units)} or fewer, at least 3"
        )
    least, most = len(units) // folds, -(-len(units) // folds)
    load = [0] * folds
    chosen: dict[str, int] = {}
    for done, unit in enumerate(sorted(units, key=lambda unit: (_draw(settings.seed, unit[0]), unit))):
        needed = sum(max(least - n, 0) for n in load)
        limit = least if len(units) - done <= needed else most
        room = [fold for fold in range(folds) if load[fold] < limit]
        fold = min(room, key=lambda fold: _draw(settings.seed, f"{unit[0]}:{fold}"))
        load[fold] += 1
        chosen |= dict.fromkeys(unit, fold + 1)
    return chosen


def _split_of_fold(fold: int, settings: SplitSettings) -> Split:
    if fold == settings.fold:
        return "test"
    return "val" if fold == settings.fold % settings.folds + 1 else "train"


# --- blocks, balanced by height --------------------------------------------------------------------------------------------


def deal_by_height(
    places: Sequence[Place], blocks: Sequence[str], fixed: Sequence[str | None], settings: SplitSettings
) -> dict[str, Split]:
    """The split of every block that is not fixed, so that each split holds its share of the chips of every height class.

    Iterative stratification (Sechidis et al. 2011) with blocks for examples: in an order that the seed draws, each block
    goes where its classes are missed most; then single blocks move as long as that lowers the sum over splits and classes
    of (chips - wanted)^2 / wanted.

    Args:
        places: All chips.
        blocks: The block of each.
        fixed: The split of each chip that the recipe names; None for those to deal. Fixed chips count.
        settings: Seed, shares and class limits.

    Raises:
        RecipeError: a chip without a height.
    """
    if unknown := [place.id for place in places if not math.isfinite(place.height_p95_m)]:
        raise RecipeError(f"chip {unknown[0]!r} has no 95th percentile of heights; split by method = 'hash' instead")
    classes = np.searchsorted(settings.class_limits_m, [place.height_p95_m for place in places], side="right")
    kinds: tuple[Split, ...] = ("train", "val", "test")
    shares = np.array([settings.train, settings.val, settings.test])
    total = np.bincount(classes, minlength=len(settings.class_limits_m) + 1)
    wanted = shares[:, None] * total
    cost = 1 / np.maximum(wanted, 1e-3)  # a split without a share wants nothing, and every chip in it is dear
    held = np.zeros_like(wanted)
    counts: dict[str, NDArray[np.float64]] = defaultdict(lambda: np.zeros(len(total)))
    for block, split, kind in zip(blocks, fixed, classes, strict=True):
        if split is None:
            counts[block][kind] += 1
        else:
            held[kinds.index(split)][kind] += 1
    order = sorted(counts, key=lambda block: (_draw(settings.seed, block), block))

    def price(chips: NDArray[np.float64]) -> NDArray[np.float64]:
        """(split,) what adding these chips to each split adds to the sum."""
        return (cost * ((held + chips - wanted) ** 2 - (held - wanted) ** 2)).sum(axis=1)  # type: ignore[no-any-return]

    dealt: dict[str, int] = {}
    moved = True
    while moved:
        moved = False
        for block in order:
            before = dealt.get(block)
            if before is not None:
                held[before] -= counts[block]
            prices = price(counts[block])
            best = int(prices.argmin())
            # A move must gain more than rounding, or blocks could change places for ever.
            if before is not None and prices[before] <= prices[best] + 1e-9:
                best = before
            moved |= best != before
            dealt[block] = best
            held[best] += counts[block]
    return {block: kinds[split] for block, split in dealt.items()}


# --- the buffer ------------------------------------------------------------------------------------------------------------


def take_out_buffer(places: Sequence[Place], splits: Sequence[str], buffer_m: float) -> list[str]:
    """`splits` with "buffer" for every chip that lies within `buffer_m` of a chip that ranks above it.

    Test ranks above val and val above train, so the test set never shrinks, and each split is judged on ground that the one
    before has not seen. Distances are between footprints, edge to edge, in the CRS of the chip that may be given up.
    """
    kept = list(splits)
    above: list[int] = []
    for split in ("test", "val", "train"):
        candidates = [i for i, s in enumerate(splits) if s == split]
        for crs in {places[i].crs for i in candidates} if above else ():
            inside = [i for i in candidates if places[i].crs == crs]
            tree = STRtree(box(*_footprints_in(crs, [places[i] for i in above]).T))
            own = box(*np.array([places[i].footprint_m for i in inside]).T)
            near = tree.query(own, predicate="dwithin", distance=buffer_m + TOUCHING_M)[0]
            for i in np.unique(near):
                kept[inside[i]] = BUFFER
        above += [i for i in candidates if kept[i] == split]
    return kept


def _footprints_in(crs: CRS, places: Sequence[Place]) -> NDArray[np.float64]:
    """(chip, 4) footprints carried into `crs`; chips that it cannot hold are on another side of the Earth and left out."""
    parts = []
    for other in {place.crs for place in places}:
        bounds = np.array([place.footprint_m for place in places if place.crs == other])
        if other != crs:
            left, bottom, right, top = bounds.T
            to_crs = Transformer.from_crs(other, crs, always_xy=True)
            xs, ys = to_crs.transform(np.stack([left, right, right, left]), np.stack([bottom, bottom, top, top]))
            bounds = np.stack([xs.min(0), ys.min(0), xs.max(0), ys.max(0)], axis=1)
            bounds = bounds[np.isfinite(bounds).all(axis=1)]
        parts.append(bounds)
    return np.concatenate(parts)

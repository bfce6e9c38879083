"""Which chips train, which choose the model and which test it: geographic blocks, whole sites, and a buffer between them.

Pure functions of where the chips are. A block's split is a hash of its name and the seed, so it does not depend on which
other chips exist: adding an acquisition never moves a chip from test to train.
"""

from __future__ import annotations

import hashlib
import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, Literal, Self

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, model_validator
from pyproj import CRS, Transformer
from shapely import STRtree, box

from canopy.errors import RecipeError

Split = Literal["train", "val", "test"]

BUFFER: Final = "buffer"
"""The split of a chip that is given up because it lies too near a chip of another split."""


class SplitSettings(BaseModel):
    """How a tile set is divided. Explicit blocks go before explicit sites, and these before the drawn fractions."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    seed: int
    """Another seed draws another assignment of blocks."""
    block_m: float = Field(gt=0)
    """Side of the square blocks, which are anchored to the origin of the chips' CRS."""
    buffer_m: float = Field(ge=0)
    """Chips of two splits are more than this far apart, edge to edge; 0 still parts chips that touch."""
    train: float = Field(ge=0, le=1)
    """Share of the blocks, not of the chips."""
    val: float = Field(ge=0, le=1)
    test: float = Field(ge=0, le=1)
    sites: dict[Split, tuple[str, ...]] = Field(default_factory=dict)
    """Whole sites that go to one split."""
    blocks: dict[Split, tuple[str, ...]] = Field(default_factory=dict)
    """Whole blocks, by the name the index gives them, that go to one split."""
    groups: tuple[tuple[str, ...], ...] = ()
    """Chips that must share a split, by id or by the name of the image they were cut from."""

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if not math.isclose(self.train + self.val + self.test, 1.0, abs_tol=1e-9):
            raise ValueError(f"train + val + test = {self.train + self.val + self.test:g} must be 1")
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
    digest = hashlib.sha256(f"{settings.seed}:{block}".encode()).digest()
    uniform = int.from_bytes(digest[:8], "big") / 2**64
    if uniform < settings.test:
        return "test"
    return "val" if uniform < settings.test + settings.val else "train"


def assign(places: Sequence[Place], settings: SplitSettings) -> list[tuple[str, str]]:
    """(block, split) of every chip, the buffer not yet taken out.

    Chips of a group take the block of the group's first member (by id), and so does every chip that shares a group with one
    of them.

    Raises:
        RecipeError: a site, block or group member that no chip has, or a group that is given to two splits.
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

    def split_of(chip: str) -> str:
        block = blocks[chip]
        return by_block.get(block) or by_site.get(sites[chip]) or draw_split(block, settings)

    splits = {place.id: split_of(place.id) for place in places}
    for members in joined:
        if len({splits[member] for member in members}) > 1:
            raise RecipeError(
                f"the group of {members[0]!r} and {members[-1]!r} is given to two splits by their sites; "
                f"give the sites to one split or take the group apart"
            )
    return [(blocks[place.id], splits[place.id]) for place in places]


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
            near = tree.query(own, predicate="dwithin", distance=buffer_m)[0]
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

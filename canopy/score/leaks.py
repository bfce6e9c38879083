"""What trained a map, and where a reference lies on that ground: a score there says nothing of the model's skill.

A map's record says which models made it and what ground trained them. A map without that record is looked up by the digest
of the weights in its tags among the models at hand; where none is found its lineage is unknown, and the score says so.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from canopy.errors import CanopyError, ScoreError
from canopy.score.result import Leak, MapInfo, ModelInfo

if TYPE_CHECKING:
    from canopy.model.package import Contract

BoundsLonLat = tuple[float, float, float, float]


# --- lineage -------------------------------------------------------------------------------------------------------------


def model_of(entry: Mapping[str, Any]) -> ModelInfo:
    """A model from a run's record, whose training ground the record holds or the model's own folder."""
    training = entry.get("training")
    name, version, digest = (str(entry.get(key, "")) for key in ("name", "version", "weights_sha256"))
    if isinstance(training, Mapping):
        return ModelInfo(
            name=name, version=version, weights_sha256=digest, licence=entry.get("licence"),
            sites=tuple(training["sites"]), footprints_deg=tuple(tuple(box) for box in training["footprints_deg"]),
            tile_sets=dict(training["tile_sets"]),
        )  # fmt: skip
    folder = entry.get("folder")
    return _looked_up(name, version, digest, [] if folder is None else [Path(str(folder))])


def models_of_tags(tags: Mapping[str, str]) -> tuple[ModelInfo, ...]:
    """The models that a map's tags name, looked up among those at hand; none without tags."""
    digests = [part for part in tags.get("CANOPY_MODEL_SHA256", "").split("; ") if part]
    names = tags.get("CANOPY_MODEL", "").split("; ")
    found = []
    for index, digest in enumerate(digests):
        name, _, version = (names[index] if index < len(names) else "").rpartition(" ")
        found.append(_looked_up(name, version, digest, []))
    return tuple(found)


def _looked_up(name: str, version: str, digest: str, folders: Sequence[Path]) -> ModelInfo:
    from canopy.model.package import known_models, read_contract

    for folder in (*folders, *known_models()):
        try:
            contract = read_contract(folder)
        except CanopyError:  # gone, or not a model any more: then it does not tell where it was trained
            continue
        if digest and contract.weights_sha256 == digest:
            return _of_contract(contract)
    return ModelInfo(name=name, version=version, weights_sha256=digest)


def _of_contract(contract: Contract) -> ModelInfo:
    return ModelInfo(
        name=contract.name, version=contract.version, weights_sha256=contract.weights_sha256, licence=contract.licence,
        sites=contract.training.sites, footprints_deg=contract.training.footprints_deg,
        tile_sets=dict(contract.training.tile_sets),
    )  # fmt: skip


def lineage_text(maps: Iterable[MapInfo]) -> str:
    """What is known of what trained the maps, in one line."""
    parts = []
    for each in maps:
        if each.lineage == "known":
            sites = sorted({site for model in each.models for site in model.sites or ()})
            parts.append(f"{each.name}: trained on {', '.join(sites) or 'no site'}")
        else:
            parts.append(f"{each.name}: lineage unknown, so that a leak cannot be excluded")
    return "; ".join(parts)


# --- leaks ---------------------------------------------------------------------------------------------------------------


def leaks_of_ground(maps: Sequence[MapInfo], ground: Sequence[tuple[str, BoundsLonLat]]) -> list[Leak]:
    """Where rectangles of compared ground lie on the training ground of a map's models.

    Args:
        maps: The maps.
        ground: Of each file of the reference its name and the rectangle of it that the map covers.
    """
    found = []
    for info, model, site, box in _footprints(maps):
        for name, bounds in ground:
            width, height = _overlap(bounds, box)
            if width > 0 and height > 0:
                area = (bounds[2] - bounds[0]) * (bounds[3] - bounds[1])
                found.append(_leak(info, model, site, box, name, width * height / area, "of the compared ground"))
    return found


def leaks_of_shots(
    maps: Sequence[MapInfo], name: str, lon_deg: NDArray[np.float64], lat_deg: NDArray[np.float64]
) -> list[Leak]:
    """Where compared shots lie on the training ground of a map's models."""
    found = []
    for info, model, site, box in _footprints(maps):
        inside = (lon_deg >= box[0]) & (lon_deg <= box[2]) & (lat_deg >= box[1]) & (lat_deg <= box[3])
        if inside.any():
            what = f"of the compared shots ({int(inside.sum()):,})"
            found.append(_leak(info, model, site, box, name, float(inside.mean()), what))
    return found


def refuse_leaks(leaks: Sequence[Leak]) -> None:
    """Stop a score of ground that trained a map.

    Raises:
        ScoreError: there is such ground.
    """
    if leaks:
        more = f" (and {len(leaks) - 1} more)" if len(leaks) > 1 else ""
        raise ScoreError(
            f"{leaks[0].finding}{more}; a score there says nothing of the model's skill: choose other ground, or pass "
            f"--allow-leak to have the result marked as leaked"
        )


def _footprints(maps: Sequence[MapInfo]) -> Iterable[tuple[MapInfo, ModelInfo, str, BoundsLonLat]]:
    for info in maps:
        for model in info.models:
            boxes, sites = model.footprints_deg or (), model.sites or ()
            # A contract has a box a site; of one that has not, each box may be any site's.
            names = sites if len(sites) == len(boxes) else (", ".join(sites) or "not named",) * len(boxes)
            for site, box in zip(names, boxes, strict=True):
                yield info, model, site, box


def _overlap(one: BoundsLonLat, other: BoundsLonLat) -> tuple[float, float]:
    return min(one[2], other[2]) - max(one[0], other[0]), min(one[3], other[3]) - max(one[1], other[1])


def _leak(  # noqa: PLR0917 - a finding is its parts
    info: MapInfo, model: ModelInfo, site: str, box: BoundsLonLat, reference: str, share: float, what: str
) -> Leak:
    return Leak(
        map=info.name, model=f"{model.name} {model.version}".strip(), site=site, reference=reference, footprint_deg=box,
        share=share,
        finding=f"{share:.1%} {what} in {reference} lies on ground that trained {model.name} {model.version}: site {site}, "
        f"longitude {box[0]:.4f} to {box[2]:.4f}, latitude {box[1]:.4f} to {box[3]:.4f}",
    )  # fmt: skip

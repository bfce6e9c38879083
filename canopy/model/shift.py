"""How unlike the calibration data a place is: where the 90 % of the intervals are promised, and where they are not.

An interval that held on the calibration sites says nothing of imagery unlike theirs (covariate shift). So the squares of a
map (`canopy.model.squares`) are compared with those of the calibration sites. Each site has its own centre and its own scale
in each feature, all have one matrix of correlations, and a square's distance is that to the nearest site, in the units of
that site (Mahalanobis 1936, site by site as Lee et al. 2018 do with classes):

    d(x)^2 = min over sites s of  z R^-1 z' / F,    z = (x - centre_s) / scale_s,    F features

Why site by site: a forest photographed by one camera and a park photographed by another have nothing in between, and one
ellipsoid around both would call everything in between known. Why one matrix of correlations: sites have tens of squares.
What was tried as well on the sample sites (`tests/bench/bench_shift.py`): one ellipsoid around all sites and the distance
to the nearest calibration squares do not flag one of the sites whose intervals fail, and on what the network's encoder
makes of a square this distance flags none of them; a logistic regression between a place and the calibration data tells
unseen blocks of a calibration site from the rest as surely as it tells a new site.

**The limit** is the distance that 5 % of the calibration squares exceed when they are compared with a reference that has
not seen them, every site with the same weight. With `MANY_SITES` sites or more, what has not seen them is the reference of
the *other sites*: the sites then show how far apart places of their kind are. With fewer it is the reference without the
square's own *block of ground*: a handful of sites cannot tell what the next one may be like, so a new site is unlike them
unless it is like one of them.

**The rule**: a sheet is flagged when at least half of its squares are beyond the limit. For a place like the calibration
data the expected share is 5 %, however its squares hang together, so by Markov's inequality at most one such place in ten
is flagged, and of the large ones far fewer.

NumPy only; scikit-learn where a reference is fitted.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal, Self, get_args

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, NonNegativeFloat, NonNegativeInt
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from canopy.errors import ContractError, OutputError, RecipeError
from canopy.model.squares import feature_names

FILE: Final = "shift.safetensors"
"""Name of the reference in a model's folder."""

LEVEL: Final = 0.95
"""Share of the held-out calibration squares within the limit."""

FLAG_SHARE: Final = 0.5
"""Share of a place's squares beyond the limit from which it is flagged."""

MANY_SITES: Final = 10
"""Calibration sites from which the limit comes from leaving out sites. Of fewer, their 95 % quantile would be the largest
distance of the oddest site, and nothing would ever be flagged."""

LEAST_SQUARES: Final = 20
"""Fewest calibration squares: of fewer, 5 % are less than one."""

FOLDS: Final = 10
"""Parts that the blocks of a site are held out in."""

PRIOR_SQUARES: Final = 2
"""Squares that the typical scale of the other sites counts for in that of a site."""

_FORMAT: Final = "1"

HeldOutBy = Literal["blocks", "sites"]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class SiteSquares:
    """What was measured in the held-out squares of one site."""

    features: NDArray[np.float32]
    """(square, feature)."""
    block: NDArray[np.int64]
    """(square,) number of the piece of ground that each lies on: neighbours are alike, and are held out together."""

    def __post_init__(self) -> None:
        assert len(self.features) == len(self.block), f"{len(self.features)} squares on {len(self.block)} blocks"


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ShiftReference:
    """What the calibration data look like."""

    bands: int
    """Bands of the imagery."""
    sites: tuple[str, ...]
    """The calibration sites."""
    squares: tuple[int, ...]
    """Squares of each."""
    centre: NDArray[np.float32]
    """(site, feature) mean of each site."""
    scale: NDArray[np.float32]
    """(site, feature) standard deviation of a new square of the site about that mean."""
    whitening: NDArray[np.float32]
    """(feature, feature) W with W W' the inverse of the matrix of correlations, divided by the number of features."""
    limit: float
    """Distance that 5 % of the held-out calibration squares exceed."""
    held_out: HeldOutBy
    """What the calibration squares were compared without: their own block of ground, or their own site."""
    beyond_elsewhere: tuple[float, ...]
    """Per site: share of its squares beyond the limit when they are compared with the other sites; NaN for an only site."""

    def __post_init__(self) -> None:
        count, features = len(self.sites), len(feature_names(self.bands))
        shapes = {"centre": (count, features), "scale": (count, features), "whitening": (features, features)}
        for name, shape in shapes.items():
            found = getattr(self, name).shape
            if found != shape:
                raise ValueError(f"{name} has the shape {found}, not the {shape} of {count} sites and {self.bands} bands")
            if not np.isfinite(getattr(self, name)).all():
                raise ValueError(f"{name} holds NaN or infinite values")
        if not count or not len(self.squares) == len(self.beyond_elsewhere) == count:
            raise ValueError(f"{count} sites have {len(self.squares)} numbers of squares")
        if not (self.scale > 0).all() or not 0 < self.limit < np.inf:
            raise ValueError("a scale or the limit is not positive")
        if self.held_out not in get_args(HeldOutBy):
            raise ValueError(f"held_out is {self.held_out!r}")

    @property
    def flagged_elsewhere(self) -> tuple[str, ...]:
        """Sites that are unlike the other ones."""
        return tuple(site for site, share in zip(self.sites, self.beyond_elsewhere, strict=True) if share >= FLAG_SHARE)


class Shift(BaseModel):
    """How unlike the calibration data a place is."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    squares: NonNegativeInt
    """Squares that were measured."""
    beyond: NonNegativeInt
    """Those beyond the limit."""
    median: NonNegativeFloat | None = Field(default=None)
    """Median distance over the limit, 1 where half of the squares are beyond it; None without squares."""

    @property
    def share(self) -> float | None:
        """Share of the squares beyond the limit; 5 % is what is expected of a place like the calibration data."""
        return self.beyond / self.squares if self.squares else None

    @property
    def flagged(self) -> bool | None:
        """Whether the place is unlike the calibration data; None where no square could be measured."""
        return None if self.share is None else self.share >= FLAG_SHARE

    @classmethod
    def of(cls, distances: NDArray[np.float64]) -> Self:
        """From the distances of a place's squares over the limit, in any order, as `unlikeness` gives them."""
        # Rounded, so that a sum in another order on another machine is still the same record.
        median = round(float(np.median(distances)), 4) if distances.size else None
        return cls(squares=distances.size, beyond=int((distances > 1).sum()), median=median)


def unlikeness(features: NDArray[Any], reference: ShiftReference) -> NDArray[np.float64]:
    """(square,) distance of squares to the nearest calibration site, over the reference's limit.

    Args:
        features: (square, feature) as `canopy.model.squares.measure` gives them.
        reference: What they are compared with.
    """
    distance: NDArray[np.float64] = _distance(features, _Model.of(reference)) / reference.limit
    return distance


def shift_score(features: NDArray[Any], reference: ShiftReference) -> Shift:
    """How unlike the calibration data the place with these squares (square, feature) is."""
    return Shift.of(unlikeness(features, reference))


# --- fitting -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Model:
    """Centres, scales and correlations."""

    centre: NDArray[np.float64]
    scale: NDArray[np.float64]
    whitening: NDArray[np.float64]

    @classmethod
    def of(cls, reference: ShiftReference) -> Self:
        return cls(
            centre=reference.centre.astype(np.float64),
            scale=reference.scale.astype(np.float64),
            whitening=reference.whitening.astype(np.float64),
        )


def _distance(features: NDArray[Any], model: _Model) -> NDArray[np.float64]:
    """(square,) distance to the nearest site."""
    nearest = np.full(len(features), np.inf)
    for centre, scale in zip(model.centre, model.scale, strict=True):
        z = (features.astype(np.float64) - centre) / scale
        # Not `@`: a matrix product rounds differently with the number of squares that go through it together.
        white = np.einsum("nf,fg->ng", z, model.whitening)
        nearest = np.minimum(nearest, np.einsum("ng,ng->n", white, white))
    distance: NDArray[np.float64] = np.sqrt(nearest)
    return distance


def _fit(sites: list[NDArray[np.float64]]) -> _Model:
    """Centres, scales and correlations of sites (square, feature)."""
    from sklearn.covariance import ledoit_wolf

    counts = np.array([len(f) for f in sites], np.float64)[:, None]
    centre = np.array([f.mean(axis=0) for f in sites])
    squares = np.array([((f - c) ** 2).sum(axis=0) for f, c in zip(sites, centre, strict=True)])
    several = counts[:, 0] > 1
    own = np.divide(squares, counts - 1, out=np.zeros_like(squares), where=counts > 1)
    # The typical variance keeps a site of two or three squares from a scale of about nothing.
    typical = np.median(own[several], axis=0)
    variance = (own * (counts - 1) + typical * PRIOR_SQUARES) / (counts - 1 + PRIOR_SQUARES)
    # A feature that does not vary, as the colour of a grey picture, would make any other value infinitely far.
    scale = np.sqrt(np.maximum(variance, 1e-6))
    total, every = counts.sum(), len(sites)
    # Rows weighted so that every site has the same part in the correlations, however many squares it has.
    rows = np.concatenate(
        [(f - c) / s * np.sqrt(total / (every * n)) for f, c, s, n in zip(sites, centre, scale, counts, strict=True)]
    )
    covariance, _ = ledoit_wolf(rows, assume_centered=True)
    values, vectors = np.linalg.eigh(covariance)
    features = len(values)
    whitening = vectors / np.sqrt(np.maximum(values, 1e-4) * features)
    # The centre is not known better than its squares say: a new square is sqrt(1 + 1/n) scales off.
    return _Model(centre=centre, scale=scale * np.sqrt(1 + 1 / counts), whitening=whitening)


def fit_shift(squares_by_site: Mapping[str, SiteSquares]) -> ShiftReference:
    """The reference of the calibration data, from squares that the model was not trained on.

    Args:
        squares_by_site: What was measured where the intervals were calibrated: imagery, and predictions that were held out.

    Raises:
        RecipeError: fewer than `LEAST_SQUARES` squares in all.
    """
    sites = {name: squares_by_site[name] for name in sorted(squares_by_site) if len(squares_by_site[name].features)}
    total = sum(len(squares.features) for squares in sites.values())
    if total < LEAST_SQUARES or all(len(squares.features) < 2 for squares in sites.values()):
        raise RecipeError(
            f"{total} held-out squares of ground are too few to tell what is unlike them, {LEAST_SQUARES} are needed; hold "
            f"out more blocks or sites"
        )
    features = next(iter(sites.values())).features.shape[1]
    bands = next(count for count in range(1, features) if len(feature_names(count)) == features)
    arrays = {name: squares.features.astype(np.float64) for name, squares in sites.items()}
    held_out: HeldOutBy = "sites" if len(sites) >= MANY_SITES else "blocks"
    model = _fit(list(arrays.values()))
    limit = _limit(held_out_distances(sites, held_out))
    elsewhere = held_out_distances(sites, "sites")
    return ShiftReference(
        bands=bands,
        sites=tuple(sites),
        squares=tuple(len(f) for f in arrays.values()),
        centre=model.centre.astype(np.float32),
        scale=model.scale.astype(np.float32),
        whitening=model.whitening.astype(np.float32),
        limit=limit,
        held_out=held_out,
        beyond_elsewhere=tuple(
            float((elsewhere[name] > limit).mean()) if name in elsewhere else float("nan") for name in sites
        ),
    )


def held_out_distances(sites: Mapping[str, SiteSquares], held_out: HeldOutBy) -> dict[str, NDArray[np.float64]]:
    """By site the distances of its squares to a reference that has not seen their site, or their block of ground.

    A site of one square has none by blocks, since it is no site without that square; and one whose other sites all have
    only one has none by sites, since those have no scale.
    """
    arrays = {name: squares.features.astype(np.float64) for name, squares in sites.items()}
    if held_out == "sites":
        others = {name: [other for key, other in arrays.items() if key != name] for name in arrays}
        return {
            name: _distance(own, _fit(others[name]))
            for name, own in arrays.items()
            if any(len(other) > 1 for other in others[name])
        }
    folds = {name: _folds(squares.block) for name, squares in sites.items()}
    found = {name: np.full(len(own), np.nan) for name, own in arrays.items()}
    for fold in range(FOLDS):
        kept = [own[folds[name] != fold] for name, own in arrays.items()]
        model = _fit([own for own in kept if len(own)])
        for name, own in arrays.items():
            found[name][folds[name] == fold] = _distance(own[folds[name] == fold], model)
    return {name: distance for name, distance in found.items() if len(distance) > 1}


def _folds(block: NDArray[np.int64]) -> NDArray[np.int64]:
    """(square,) which part each square is held out in: blocks one after the other, or squares where there is but one."""
    names, number = np.unique(block, return_inverse=True)
    part: NDArray[np.int64] = (np.arange(len(block)) if len(names) == 1 else number) % FOLDS
    return part


def _limit(distances: Mapping[str, NDArray[np.float64]]) -> float:
    """The distance that 5 % of the held-out squares exceed, each site of `LEAST_SQUARES` or more with the same weight."""
    distance = np.concatenate(list(distances.values()))
    weight = np.concatenate([np.full(len(each), 1 / max(len(each), LEAST_SQUARES)) for each in distances.values()])
    order = np.argsort(distance, kind="stable")
    reached = np.cumsum(weight[order]) / weight.sum()
    return float(distance[order][np.searchsorted(reached, LEVEL * (1 - 1e-12))])


# --- the file ------------------------------------------------------------------------------------------------------------

_ARRAYS = ("centre", "scale", "whitening")


def shift_bytes(reference: ShiftReference) -> bytes:
    """The content of the file of a reference; the same reference gives the same bytes."""
    about = {
        "format": _FORMAT,
        "bands": reference.bands,
        "features": feature_names(reference.bands),
        "sites": reference.sites,
        "squares": reference.squares,
        "limit": reference.limit,
        "held_out": reference.held_out,
        "beyond_elsewhere": [None if np.isnan(share) else share for share in reference.beyond_elsewhere],
    }
    tensors = {name: np.ascontiguousarray(getattr(reference, name)) for name in _ARRAYS}
    return bytes(save(tensors, metadata={"shift": json.dumps(about, sort_keys=True)}))


def save_shift(folder: Path, reference: ShiftReference) -> Path:
    """Write the reference into a model's folder, whole or not at all; its digest belongs into the contract.

    Raises:
        OutputError: it cannot be written.
    """
    path, part = folder / FILE, folder / f".{FILE}.part"
    try:
        part.write_bytes(shift_bytes(reference))
        part.replace(path)
    except OSError as error:
        raise OutputError(f"cannot write {path} ({error.strerror}); free disk space or choose another folder") from error
    finally:
        if folder.is_dir():
            part.unlink(missing_ok=True)
    return path


def load_shift(path: Path) -> ShiftReference:
    """Read a reference, strictly.

    Raises:
        ContractError: there is none, or it is not one that this version reads.
    """
    remedy = "fetch the model again, or calibrate it with canopy calibrate"
    if not path.is_file():
        raise ContractError(f"{path} is missing; {remedy}")
    try:
        with safe_open(path, framework="numpy") as file:
            about = json.loads((file.metadata() or {})["shift"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
        _check_layout(about.pop("format"), tuple(about.pop("features")), feature_names(about["bands"]), tensors)
        about["beyond_elsewhere"] = tuple(
            float("nan") if share is None else float(share) for share in about["beyond_elsewhere"]
        )
        about |= {name: tuple(about[name]) for name in ("sites", "squares")}
        return ShiftReference(**about, **tensors)
    except (SafetensorError, KeyError, TypeError, ValueError, OSError) as error:
        raise ContractError(f"{path} is no reference of calibration data of this version ({error}); {remedy}") from error


def _check_layout(
    layout: str, features: tuple[str, ...], measured: tuple[str, ...], tensors: Mapping[str, NDArray[Any]]
) -> None:
    if layout != _FORMAT or features != measured:
        raise ValueError("it describes other features than this version measures")
    if tensors.keys() != set(_ARRAYS) or any(array.dtype != np.float32 for array in tensors.values()):
        raise ValueError(f"it holds {', '.join(sorted(tensors))}, not float32 {', '.join(_ARRAYS)}")

"""Whether one model's weights descend from another's.

Training moves weights, but not far: a tensor that was trained on stays correlated with what it was. Tensors that were drawn
anew, or belong to another model, are not correlated at all (0 ± 1/sqrt(n) for n numbers). So a sketch of the base model,
some numbers of each of its weight tensors at secret places, tells a descendant from a stranger that carries the same name.

Why tensor by tensor: models that share a published backbone are kin in its tensors, and would be in a correlation over all
numbers; here each tensor has one vote.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from canopy.errors import SealError
from canopy.score.sealed.tree import keyed

SAMPLE = 1024
"""Numbers kept of a tensor."""

LEAST_NUMBERS = 256
"""Tensors with fewer say nothing: their correlation is by chance up to 4/sqrt(256) = 0.25 in one case of 30 000."""

CORRELATED = 0.3
"""A tensor with at least this correlation descends from the base's."""

LEAST_SHARE = 0.75
"""Share of the base's tensors that must descend; a new head and a new band may not."""


def sketch_of(weights: Path, secret: bytes) -> dict[str, NDArray[np.float32]]:
    """Numbers of each weight tensor (two axes and more) at places that the secret decides.

    Args:
        weights: A safetensors file.
        secret: Who does not know it cannot put the base's numbers where they are looked for.
    """
    found = {}
    for name, tensor in _tensors(weights):
        if tensor.ndim > 1 and tensor.size >= LEAST_NUMBERS and tensor.dtype.kind == "f":
            found[name] = tensor.ravel()[_places(name, tensor.size, secret)].astype(np.float32)
    return found


def kin_share(base: Mapping[str, NDArray[np.float32]], weights: Path, secret: bytes) -> float:
    """Share of the base's tensors that those of `weights` descend from.

    Raises:
        SealError: `weights` is no safetensors file.
    """
    own = sketch_of(weights, secret)
    alike = 0
    for name, numbers in base.items():
        other = own.get(name)
        if other is not None and other.shape == numbers.shape and numbers.std() > 0 and other.std() > 0:
            alike += bool(np.corrcoef(numbers, other)[0, 1] >= CORRELATED)
    return alike / max(len(base), 1)


def parameters_in(weights: Path) -> int:
    """Numbers in a safetensors file.

    Raises:
        SealError: it is none.
    """
    return sum(tensor.size for _, tensor in _tensors(weights))


def _places(name: str, size: int, secret: bytes) -> NDArray[np.int64]:
    generator = np.random.default_rng(int.from_bytes(keyed(secret, "sketch", name), "big"))
    return np.sort(generator.choice(size, min(size, SAMPLE), replace=False))


def _tensors(weights: Path) -> Any:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(weights, framework="np") as file:
            for name in sorted(file.keys()):
                yield name, file.get_tensor(name)
    except (SafetensorError, OSError, TypeError) as error:
        raise SealError(
            f"{weights} is not a readable safetensors file ({error}); submit a folder that canopy wrote"
        ) from error

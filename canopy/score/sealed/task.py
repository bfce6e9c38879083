"""The public task: what is asked, by what rules, and the hashes that bind who sealed it."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Final, Literal

import tomli_w
from pydantic import BaseModel, ConfigDict, Field, NonNegativeFloat, PositiveFloat, PositiveInt

from canopy.errors import SealError
from canopy.metrics import CLASS_EDGES_M
from canopy.score.sealed.scorer import Scorer
from canopy.settings import read_settings
from canopy.textfile import write_text

if TYPE_CHECKING:
    import geopandas as gpd

TASK: Final = "task.toml"
INDEX: Final = "index.parquet"
IMAGES: Final = "image"
LEAVES: Final = "leaves.txt"

Kind = Literal["model", "map", "predictions"]
"""What may be submitted: a model folder, a raster of heights with its place on Earth, or an array of heights a chip.

Only a model is run here, within the budget and without the labels; how the others were made is what their makers say.
"""

Positions = Literal["coarse", "exact"]
"""Whether images are georeferenced and the index tells outlines, or cells only."""

Start = Literal["base", "any"]
"""Whether a submission has to descend from the base model, or may start anywhere, as long as it says where."""

Digest = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]


class _Value(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class Budget(_Value):
    """What a submitted model may take to predict all chips, on a CPU in float32."""

    seconds: PositiveFloat
    """Wall-clock time of the process that predicts, its start included."""
    parameters: PositiveInt
    """Numbers in the weight file."""
    memory_mib: PositiveInt
    """Resident memory of the process."""
    threads: PositiveInt


class Base(_Value):
    """The model that submissions start from, and whose score is that of a submission that is turned down."""

    name: str
    version: str
    weights_sha256: Digest
    licence: str
    parameters: PositiveInt
    seconds: PositiveFloat
    """What it took on the machine where the task was sealed."""
    memory_mib: PositiveInt
    """What it took there."""


class Rules(_Value):
    """What is counted, and what is held against a submission."""

    accepts: tuple[Kind, ...] = Field(min_length=1)
    starts_from: Start
    buffer_m: NonNegativeFloat
    """Ground that was learned from must be further than this from sealed ground, edge to edge."""
    by_site: bool
    """Whole sites and acquisitions are held out: sharing one is a leak."""
    class_edges_m: tuple[float, ...] = CLASS_EDGES_M
    """Edges between the classes of reference height."""
    least_px: PositiveInt
    """A class of a region with fewer scored pixels has no part in the score."""
    jitter_m: NonNegativeFloat
    """By how much label and image may be apart; decides the floor, see `canopy.score.sealed.headroom`."""
    square_m: PositiveFloat
    """Side of the squares of ground that the bootstrap draws."""


class Task(_Value):
    """`task.toml`."""

    format: Literal[1] = 1
    name: str = Field(min_length=1)
    root: str = Field(default="", pattern="^([0-9a-f]{64})?$")
    """Root of the hash tree over the labels and the record of the key; empty in the copy that the key keeps."""
    chips: PositiveInt
    regions: tuple[str, ...]
    """Opaque names of the sites."""
    bands: tuple[str, ...]
    dtype: str
    gsd_m: tuple[PositiveFloat, ...]
    """The pixel sizes there are."""
    positions: Positions
    grid_km: PositiveFloat
    licence: tuple[str, ...]
    """Of the imagery."""
    attribution: tuple[str, ...]
    """Whose imagery it is."""
    acquisitions: tuple[str, ...] = ()
    """Names of the sealed LiDAR, where who sealed it wants them known so that they can be left out of training."""
    budget: Budget
    base: Base
    rules: Rules
    scorer: Scorer
    files: dict[str, Digest]
    """SHA-256 of the other files of the folder; the images are in the index."""


def write_task(folder: Path, task: Task) -> None:
    """Write `task.toml`.

    Raises:
        OutputError: it cannot be written.
    """
    write_text(folder / TASK, tomli_w.dumps(task.model_dump(mode="json")))


def read_task(folder: Path) -> Task:
    """Read `task.toml`.

    Raises:
        SealError: it is missing or wrong.
    """
    return read_settings(folder / TASK, Task, what="a sealed task", error=SealError)


def read_chips(folder: Path, task: Task) -> gpd.GeoDataFrame:
    """The public index, after every file of the task has been compared with its digest.

    Raises:
        SealError: a file is missing or was changed since the task was sealed.
    """
    import geopandas as gpd

    for name, digest in task.files.items():
        refuse_changed(folder / name, digest)
    index = gpd.read_parquet(folder / INDEX)
    for chip, digest in zip(index["id"], index["image_sha256"], strict=True):
        refuse_changed(folder / IMAGES / f"{chip}.tif", digest)
    return index


def refuse_changed(path: Path, digest: str) -> None:
    """Refuses a file that is not the one that was sealed.

    Raises:
        SealError: it is missing, a link, or has other bytes.
    """
    if path.is_symlink() or not path.is_file():
        raise SealError(f"{path} is missing from the task, or is no plain file; fetch the task again")
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != digest:
        raise SealError(
            f"{path} has SHA-256 {found[:12]}…, but the task was sealed with {digest[:12]}…; fetch the task again"
        )


def read_leaves(folder: Path) -> dict[str, bytes]:
    """The published leaf hashes by name, in the order of the tree.

    Raises:
        SealError: the file is missing, or holds something else.
    """
    path = folder / LEAVES
    try:
        rows = [line.split() for line in path.read_text(encoding="ascii").splitlines()]
        leaves = {name: bytes.fromhex(digest) for digest, name in rows}
    except (OSError, ValueError) as error:
        raise SealError(f"{path} is missing, or holds no hashes and names; fetch the task again") from error
    if len(leaves) != len(rows) or any(len(leaf) != 32 for leaf in leaves.values()):
        raise SealError(f"{path} names a leaf twice, or one with no SHA-256; fetch the task again")
    return leaves

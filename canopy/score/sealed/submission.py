"""What is handed in: a folder with `submission.toml`, a declaration, and a model, a map or predictions.

    submission.toml
    model/                  kind = "model": a model folder
    heights.tif             kind = "map": float32 metres with a CRS
    heights/NAME.npy        kind = "predictions": float32 metres, one array a chip of the task
    lineage/SET/            of every tile set that was learned from: index.parquet, and image/ and height/, or codes.npz

`canopy bench template` writes one. The declaration says what the submission was made of; see `Submission`. Fingerprints in
`codes.npz` (arrays `image/ID` and `height/ID`) stand in for chips that are too large to hand in.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal

import numpy as np
import tomli_w
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field

from canopy.errors import CanopyError, OutputError, SealError
from canopy.model.package import FILES, WEIGHTS, file_sha256, read_contract
from canopy.raster import Pixels, open_raster
from canopy.score.sealed.task import Kind, Task
from canopy.settings import read_settings
from canopy.textfile import write_text
from canopy.tiler.chips import INDEX, read_chip, read_index, tile_set_hash
from canopy.tiler.fingerprint import fingerprint

SUBMISSION: Final = "submission.toml"
CODES: Final = "codes.npz"

HARMLESS: Final = frozenset(
    {".csv", ".json", ".md", ".npy", ".npz", ".parquet", ".png", ".safetensors", ".svg", ".tif", ".toml", ".txt"}
)
"""Endings of files that hold data. What may hold a program, a pickle among them, has no place in a submission."""


class _Value(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class BaseDeclared(_Value):
    """The model that training started from."""

    name: str = Field(min_length=1)
    """"none" for one that was trained from scratch or from published weights of a backbone."""
    weights_sha256: str = Field(default="", pattern="^([0-9a-f]{64})?$")


class TileSetDeclared(_Value):
    """A set of chips that was learned from, or that a model was chosen by."""

    name: str = Field(min_length=1)
    index_sha256: str = Field(pattern="^[0-9a-f]{64}$")
    """As in a model's contract: over ids, splits and digests of the files of all chips."""
    path: str
    """Folder in the submission with its index and its images, or fingerprints of them."""


class LabelDeclared(_Value):
    """A product that heights were learned from."""

    product: str = Field(min_length=1)
    source: str = Field(min_length=1)
    """Whose measurements it was made from, as in the tile set's `lidar_source`."""
    sites: tuple[str, ...] = ()
    """Where those were taken."""
    derived_from: tuple[str, ...] = ()
    """Names of acquisitions, files and products it was made from; a product trained on LiDAR derives from that LiDAR."""


class Submission(_Value):
    """`submission.toml`."""

    format: Literal[1] = 1
    name: str = Field(min_length=1)
    kind: Kind
    path: str
    """The model folder, the raster, or the folder of arrays, in the submission."""
    base: BaseDeclared
    compute: str = Field(min_length=1)
    """What training took, for people: device hours, for example."""
    untrained: bool = False
    """Nothing was learned from beyond the base model."""
    sites: tuple[str, ...] = ()
    footprints_deg: tuple[tuple[float, float, float, float], ...] = ()
    """Boxes (west, south, east, north) of all ground that was learned from and is in no declared tile set."""
    tile_set: tuple[TileSetDeclared, ...] = ()
    label: tuple[LabelDeclared, ...] = ()


Check = Literal["files", "declaration", "base", "ground", "content", "labels", "acquisition", "budget", "run"]
"""What a reason is about."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Reason:
    """Why a submission is turned down."""

    check: Check
    said: str


def read_submission(folder: Path) -> Submission:
    """The declaration.

    Raises:
        SealError: it is missing or wrong.
    """
    return read_settings(folder / SUBMISSION, Submission, what="a submission", error=SealError)


def part_of(folder: Path, path: str) -> Path | None:
    """A file or folder of the submission; None where the path leads out of it, or nowhere."""
    there = folder / path
    inside = folder.resolve()
    return there if there.exists() and there.resolve().is_relative_to(inside) and there.resolve() != inside else None


def suspicious_files(folder: Path, key: Path) -> list[Reason]:
    """What a submission must not hold: links, which may lead anywhere, the key itself, and programs."""
    found = []
    own = key.stat()
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_symlink():
            said = f"{name} is a link to {path.readlink()}; a submission holds its files itself"
        elif path.is_dir():
            continue
        elif not path.is_file():
            said = f"{name} is no plain file"
        elif (path.stat().st_dev, path.stat().st_ino) == (own.st_dev, own.st_ino):
            said = f"{name} is the key"
        elif path.suffix not in HARMLESS:
            said = f"{name} may hold a program; weights are handed in as safetensors, and no code is run"
        else:
            continue
        found.append(Reason(check="files", said=said))
    return found


Codes = dict[str, NDArray[Any]]


def codes_of(folder: Path, ids: Sequence[str]) -> tuple[Codes, Codes]:
    """Fingerprints of the images and the heights of a declared tile set, computed where the chips are there.

    Raises:
        SealError: neither images nor fingerprints of all chips are there.
        RasterError: an image cannot be read.
    """
    if (folder / "image").is_dir():
        return _drawn(folder / "image", ids), _drawn(folder / "height", ids) if (folder / "height").is_dir() else {}
    path = folder / CODES
    try:
        with np.load(path, allow_pickle=False) as archive:
            images, heights = (
                {name.split("/", 1)[1]: archive[name] for name in archive.files if name.startswith(f"{part}/")}
                for part in ("image", "height")
            )
    except (OSError, ValueError) as error:
        raise SealError(f"{folder.name} has neither its images nor their fingerprints ({CODES})") from error
    if missing := set(ids) - images.keys():
        raise SealError(f"{folder.name} lacks the fingerprints of {len(missing)} of {len(ids)} chips, {min(missing)} first")
    return images, heights


def _drawn(folder: Path, ids: Sequence[str]) -> Codes:
    found = {}
    for name in ids:
        with open_raster(folder / f"{name}.tif") as raster:
            if raster.driver != "GTiff":
                raise SealError(f"{folder.name}/{name}.tif is no GeoTIFF but {raster.driver}, which may lead elsewhere")
            found[name] = fingerprint(raster.read(0, 0, raster.shape))
    return found


# --- a folder to hand in -------------------------------------------------------------------------------------------------


def write_template(
    task: Task, out: Path, *, model: Path, tile_sets: Sequence[Path], name: str | None = None, compute: str | None = None
) -> Path:
    """Make a submission of a model, with the lineage that its contract and its tile sets tell.

    What cannot be known is left for its makers to write: what their labels were made from in turn, ground in no tile set,
    and the compute where it is not given.

    Args:
        task: What it is for.
        out: Folder to make; must not exist.
        model: Model folder.
        tile_sets: Tile sets that were trained on.
        name: Of the submission; default the model's.
        compute: What training took.

    Raises:
        OutputError: `out` exists or cannot be written.
        ContractError, RecipeError, RasterError: the model or a tile set cannot be read.
    """
    if out.exists():
        raise OutputError(f"{out} exists; choose another folder")
    contract = read_contract(model)
    stage = out.with_name(f".{out.name}.part")
    shutil.rmtree(stage, ignore_errors=True)
    try:
        (stage / "model").mkdir(parents=True)
        for file in FILES:
            shutil.copyfile(model / file, stage / "model" / file)
        declared, labels, sites = [], {}, set(contract.training.sites)
        for path in tile_sets:
            index = read_index(path)
            lineage = stage / "lineage" / path.name
            lineage.mkdir(parents=True)
            shutil.copyfile(path / INDEX, lineage / INDEX)
            codes: Codes = {}
            for chip in index["id"]:
                image, height_m = read_chip(path, chip)
                codes[f"image/{chip}"] = fingerprint(image)
                codes[f"height/{chip}"] = fingerprint(Pixels(data=height_m[None], valid=np.isfinite(height_m)))
            np.savez_compressed(lineage / CODES, allow_pickle=False, **codes)
            declared.append(TileSetDeclared(name=path.name, index_sha256=tile_set_hash(path), path=f"lineage/{path.name}"))
            sites |= set(index["site"])
            for (source, site), rows in index.groupby(["lidar_source", "site"]):
                parents = {part.strip() for value in rows["derived_from"] for part in str(value).split(";")} - {""}
                labels[source, site] = LabelDeclared(
                    product=f"heights of {path.name}", source=source, sites=(site,), derived_from=tuple(sorted(parents))
                )
        fresh = file_sha256(model / WEIGHTS) == task.base.weights_sha256
        submission = Submission(
            name=name or contract.name, kind="model", path="model",
            base=BaseDeclared(name=task.base.name, weights_sha256=task.base.weights_sha256),
            compute=compute or "TELL WHAT TRAINING TOOK", untrained=fresh and not tile_sets, sites=tuple(sorted(sites)),
            footprints_deg=contract.training.footprints_deg, tile_set=tuple(declared), label=tuple(labels.values()),
        )  # fmt: skip
        write_text(stage / SUBMISSION, tomli_w.dumps(submission.model_dump(mode="json")))
        stage.rename(out)
    except OSError as error:
        raise OutputError(f"cannot write {out} ({error.strerror}); free disk space or choose another folder") from error
    finally:
        with suppress(OSError):
            shutil.rmtree(stage)
    return out


def index_of(folder: Path, declared: TileSetDeclared) -> Any:
    """The index of a declared tile set, compared with its digest.

    Raises:
        SealError: it is missing, unreadable, or another one.
    """
    try:
        found = tile_set_hash(folder)
        index = read_index(folder)
    except (CanopyError, ValueError, OSError) as error:
        raise SealError(f"the index of {declared.name} cannot be read ({' '.join(str(error).split())})") from error
    if found != declared.index_sha256:
        raise SealError(
            f"{declared.name} is declared with index {declared.index_sha256[:12]}…, but {found[:12]}… was handed in"
        )
    return index

"""Published weights, fetched: openly downloadable ones become model folders, for gated ones it says what to do.

`models/sources.toml` says what there is. A download is written to a `.part` beside its place, goes on where it stopped
(in the same run after a broken connection, in a later one after Ctrl-C), and gets its name only when its length and, where
one is published, its checksum are right.
"""

from __future__ import annotations

import json
import re
import shutil
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from filelock import FileLock, Timeout
from pydantic import BaseModel, ConfigDict, Field, StringConstraints

from canopy.errors import OutputError, RecipeError, SourceError
from canopy.model.foreign import Kind, import_model
from canopy.model.package import file_sha256, shelves
from canopy.settings import nearest, read_settings
from canopy.tiler.patience import PATIENCE, Patience

if TYPE_CHECKING:
    import requests

_FROZEN = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

SOURCES = "sources.toml"

_BLOCK_BYTES = 1 << 20
_BUSY = frozenset({408, 425, 429, 500, 502, 503, 504})


class WeightFile(BaseModel):
    """One file of a publication."""

    model_config = _FROZEN

    name: str = Field(pattern=r"^[\w.-]+$")
    url: str | None = None
    size_bytes: int | None = Field(default=None, gt=0)
    sha256: Annotated[str, StringConstraints(pattern="^([0-9a-f]{8}|[0-9a-f]{64})$")] | None = None
    """All of it, or the first 8 digits that torch's hub puts into file names."""


class Check(BaseModel):
    """Heights that the publisher expects of its weights."""

    model_config = _FROZEN

    image: str
    padded_px: tuple[int, int]
    top_left_m: tuple[tuple[float, ...], ...]
    tolerance_m: float = Field(gt=0)


class WeightSource(BaseModel):
    """One publication of weights."""

    model_config = _FROZEN

    kind: Kind
    title: str
    licence: str
    licence_url: str
    licence_says: str
    """The licence in a line; its text is at `licence_url`."""
    file: tuple[WeightFile, ...] = ()
    steps: tuple[str, ...] = ()
    """What a person has to do where a program may not; empty: the files are there for everybody."""
    unverified: tuple[str, ...] = ()
    """Facts of this table that have not been checked against the source."""
    check: Check | None = None


class WeightSources(BaseModel):
    """`models/sources.toml`."""

    model_config = _FROZEN

    models: dict[str, WeightSource]


def read_sources(path: Path | None = None) -> dict[str, WeightSource]:
    """What can be pulled, by name: from `path`, or from ./models/sources.toml or that of the source checkout.

    Raises:
        SourceError: There is no such file, or it is not what `WeightSources` says.
    """
    if path is None:
        places = [shelf / SOURCES for shelf in shelves()]
        path = next((place for place in places if place.is_file()), places[0])
    return read_settings(path, WeightSources, what="a list of published weights", error=SourceError).models


def pull_model(
    name: str,
    out: Path | str | None = None,
    *,
    sources: Path | None = None,
    overwrite: bool = False,
    keep: bool = False,
    say: Callable[[str], None] = lambda _line: None,
    progress: Callable[[int, int], None] = lambda _done, _total: None,
    patience: Patience = PATIENCE,
) -> Path:
    """Downloads published weights and writes their model folder.

    Args:
        name: One of `read_sources`.
        out: Folder to write; default: models/NAME. Downloads go to OUT.download, which is removed at the end.
        sources: Another list than models/sources.toml.
        overwrite: Replace the model in `out`.
        keep: Leave the downloaded files.
        say: Told the licence and what happened, in lines.
        progress: Told (MiB done, MiB in all) of the current file.
        patience: How long a server is waited for.

    Raises:
        SourceError: No such name, weights that a person has to ask for (the message says how), or a server that does not
            deliver, or not what it should.
        ContractError: The files are not the model's.
        OutputError: The folder exists, or cannot be written.
    """
    known = read_sources(sources)
    if name not in known:
        raise SourceError(f"no published weights {name!r}; {nearest(name, sorted(known))}")
    source = known[name]
    if source.steps:
        names = " and ".join(file.name for file in source.file)
        steps = "; ".join(f"({number}) {step}" for number, step in enumerate(source.steps, 1))
        raise SourceError(f"{name} is not openly downloadable ({source.licence}){f' [{names}]' if names else ''}: {steps}")
    out = Path(out) if out is not None else Path("models") / name
    if out.exists() and not overwrite:
        raise OutputError(f"{out} exists; choose another folder with --out, or --overwrite it")
    say(source.title)
    say(f"licence: {source.licence}, {source.licence_says} ({source.licence_url})")
    for fact in source.unverified:
        say(f"not verified: {fact}")
    folder = out.with_name(f"{out.name}.download")
    files = [download(file, folder, progress=progress, patience=patience) for file in source.file]
    for path in files:
        say(f"{path.name}: {path.stat().st_size:,} bytes")
    result = import_model(source.kind, files[0] if len(files) == 1 else files, out, overwrite=overwrite, say=say)
    if not keep:
        shutil.rmtree(folder)
    return result


def is_backbone(name: str) -> bool:
    """Whether timm has pretrained weights of this name."""
    import timm

    return bool(timm.is_model(name) and timm.is_model_pretrained(name))


def pull_backbone(name: str, *, say: Callable[[str], None] = lambda _line: None) -> int:
    """Fetches the pretrained weights of a timm backbone into the cache of its hub, where training finds them offline.

    Returns:
        Number of parameters.

    Raises:
        SourceError: timm has no such weights, or they cannot be fetched.
    """
    import timm

    from canopy.model.network import Backbone, NetworkConfig

    published = timm.get_pretrained_cfg(name) if is_backbone(name) else None
    if published is None:
        raise SourceError(
            f"timm has no pretrained weights {name!r}; "
            f"give a name with its tag, for example vit_large_patch16_dinov3.sat493m"
        )
    say(f"licence: {published.license or 'not stated by timm'}; see the model's page before use")
    try:
        backbone = Backbone(NetworkConfig(backbone=name), pretrained=True)
    except RecipeError as error:
        raise SourceError(f"{error}") from error
    return sum(parameter.numel() for parameter in backbone.parameters())


# --- one file ------------------------------------------------------------------------------------------------------------


def download(
    file: WeightFile,
    folder: Path,
    *,
    progress: Callable[[int, int], None] = lambda _done, _total: None,
    patience: Patience = PATIENCE,
) -> Path:
    """Fetches one file, or what is still missing of it, and returns its path.

    Raises:
        SourceError: The server refuses, does not answer, or sends something else than it should.
        OutputError: The disk is full, or another process fetches the same file.
    """
    assert file.url is not None, f"{file.name} has no address"
    path = folder / file.name
    part = folder / f"{file.name}.part"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(folder / f".{file.name}.lock", timeout=0):
            if path.is_file() and _problem(file, path) is None:
                return path
            total = _fetch(file, part, progress, patience)
            problem = _problem(file, part) or (
                f"it has {part.stat().st_size:,} bytes, and the server says {total:,}"
                if total is not None and part.stat().st_size != total
                else None
            )
            if problem is not None:
                _forget(part)
                raise SourceError(f"{file.url}: {problem}; run the command again, and if it stays so get the file by hand")
            part.replace(path)
            _forget(part)
            return path
    except Timeout as error:
        raise OutputError(f"{folder} is being filled by another process; wait for it") from error
    except OSError as error:
        raise OutputError(
            f"{part} cannot be written ({error.strerror or error}); free space and run the command again, it goes on there"
        ) from error


def _fetch(file: WeightFile, part: Path, progress: Callable[[int, int], None], patience: Patience) -> int | None:
    """Fills `part`; returns the length that the server promised, if it did."""
    import requests

    tries, pause_s, reason = 0, patience.first_pause_s, "nothing was tried"
    while tries < patience.attempts:
        if tries:
            time.sleep(pause_s)
            pause_s = min(2 * pause_s, patience.longest_pause_s)
        tries += 1
        start = part.stat().st_size if part.is_file() else 0
        told_s = 0.0
        try:
            with _open(file, part, start, patience) as answer:
                if answer.status_code in _BUSY:
                    reason = f"HTTP {answer.status_code}"
                    told = answer.headers.get("Retry-After", "")
                    told_s = float(told) if told.isdigit() else 0.0
                elif answer.status_code == requests.codes.requested_range_not_satisfiable:
                    # All of it is there already, or what is there is not of this file.
                    promised = re.fullmatch(r"bytes \*/(\d+)", answer.headers.get("Content-Range", ""))
                    if promised and int(promised[1]) == start:
                        return start
                    _forget(part)
                    reason = "the file there is another one by now"
                else:
                    _refuse(file, answer)
                    return _receive(file, part, answer, start, progress)
        except requests.RequestException as error:
            reason = _told(error)
        if part.is_file() and part.stat().st_size > start:
            tries, pause_s = 1, patience.first_pause_s  # it moves: only tries without a byte count
        if told_s > patience.longest_pause_s:
            reason += f", and asks for a pause of {told_s:.0f} s"
            break
        pause_s = max(pause_s, told_s)
    raise SourceError(
        f"{file.url} cannot be fetched ({reason}; {tries} tries); run the command again later, it goes on where it stopped"
    )


def _open(file: WeightFile, part: Path, start: int, patience: Patience) -> requests.Response:
    import requests

    headers = {"Accept-Encoding": "identity"}  # lengths and ranges are those of the file itself
    if start:
        headers["Range"] = f"bytes={start}-"
        if (mark := _mark(part)) is not None:
            headers["If-Range"] = mark  # a file that was replaced meanwhile comes whole
    assert file.url is not None, f"{file.name} has no address"
    return requests.get(file.url, headers=headers, stream=True, timeout=(patience.connect_s, patience.silence_s))


def _refuse(file: WeightFile, answer: requests.Response) -> None:
    status = answer.status_code
    if status in {401, 403}:
        raise SourceError(f"{file.url} is not there for everybody (HTTP {status}); get it by hand and import it")
    if status in {404, 410}:
        raise SourceError(f"{file.url} is not there any more (HTTP {status}); look for it at its authors' and import it")
    if status not in {200, 206}:
        raise SourceError(f"{file.url} cannot be fetched (HTTP {status}); get it by hand and import it")


def _receive(
    file: WeightFile, part: Path, answer: requests.Response, start: int, progress: Callable[[int, int], None]
) -> int | None:
    length = answer.headers.get("Content-Length", "")
    if answer.status_code == 206:
        place = re.fullmatch(r"bytes (\d+)-\d+/(\d+)", answer.headers.get("Content-Range", ""))
        if place is None or int(place[1]) != start:
            _forget(part)
            raise SourceError(f"{file.url}: the server sends other bytes than it was asked for; run the command again")
        total: int | None = int(place[2])
    else:
        start, total = 0, int(length) if length.isdigit() else None
    if file.size_bytes is not None and total not in {None, file.size_bytes}:
        raise SourceError(
            f"{file.url} has {total:,} bytes, and {file.size_bytes:,} are published; get the file by hand and import it"
        )
    mark = answer.headers.get("ETag") or answer.headers.get("Last-Modified")
    if mark is not None and not mark.startswith("W/"):
        _mark_path(part).write_text(json.dumps({"url": file.url, "mark": mark}), encoding="utf-8")
    done = start
    with part.open("ab" if start else "wb") as stream:
        for block in answer.iter_content(_BLOCK_BYTES):
            stream.write(block)
            done += len(block)
            progress(done >> 20, (total or done) >> 20)
    return total


def _problem(file: WeightFile, path: Path) -> str | None:
    """What is wrong with a downloaded file, or None."""
    size = path.stat().st_size
    if file.size_bytes is not None and size != file.size_bytes:
        return f"it has {size:,} bytes, and {file.size_bytes:,} are published"
    if file.sha256 is None:
        return None
    found = file_sha256(path)
    return None if found.startswith(file.sha256) else f"its SHA-256 is {found[:8]}…, and {file.sha256[:8]} is published"


def _mark_path(part: Path) -> Path:
    return part.with_name(f"{part.name}.json")


def _mark(part: Path) -> str | None:
    """ETag or date of the file that `part` is the beginning of."""
    try:
        table: Any = json.loads(_mark_path(part).read_text(encoding="utf-8"))
        return str(table["mark"])
    except (OSError, ValueError, KeyError, TypeError):
        return None  # asked for without; a checksum or the length shows at the end if it was another file


def _forget(part: Path) -> None:
    for path in (part, _mark_path(part)):
        with suppress(FileNotFoundError):
            path.unlink()


def _told(error: Exception) -> str:
    import requests

    if isinstance(error, requests.Timeout):
        return "no answer in time"
    if isinstance(error, requests.ConnectionError):
        return "no connection; is there a network?"
    return "the answer broke off" if isinstance(error, requests.exceptions.ChunkedEncodingError) else type(error).__name__

"""Bytes of local files and of files behind HTTP: exact ranges of one file, whole files of one folder.

A server is asked again, with growing pauses, when it is busy (429), ill (5xx), silent, or breaks off; a signed link is
signed again when it is refused. What cannot be had ends with one LidarError that names the link, without its signature,
since a signature is a secret.
"""

from __future__ import annotations

import os
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, TypeVar
from urllib.parse import urljoin, urlsplit, urlunsplit

from canopy.errors import LidarError
from canopy.tiler.patience import PATIENCE, Patience

if TYPE_CHECKING:
    import requests

CONNECTIONS = 8
"""Requests under way at a time, for one reader of one source."""
_BUSY = frozenset({408, 425, 429, 500, 502, 503, 504})
"""Answers that another try may change."""
_READ_BYTES = 1 << 16


class RefusedError(LidarError):
    """A server that knows the file and does not give it, or, as S3 does where listing is not open, one that lacks it."""


_J = TypeVar("_J")
_R = TypeVar("_R")


class Sign(Protocol):
    """Makes a link that a server accepts, for example by appending a token."""

    def __call__(self, href: str, /, *, renew: bool = False) -> str:
        """The link signed; `renew` asks for a signature other than the last, which the server has refused."""


class Bytes(Protocol):
    """One file of which parts can be read."""

    @property
    def name(self) -> str:
        """What messages call it."""

    @property
    def size(self) -> int:
        """Bytes in all."""

    @property
    def connections(self) -> int:
        """How many reads at a time make sense."""

    def read(self, start: int, size: int) -> bytes:
        """Exactly `size` bytes from byte `start` on, or a LidarError."""


class Folder(Protocol):
    """Files that are read whole, by their name within one folder."""

    @property
    def connections(self) -> int:
        """As in `Bytes`."""

    def name(self, file: str) -> str:
        """What messages call a file."""

    def read(self, file: str) -> bytes | None:
        """All bytes of a file, None where there is no such file, or a LidarError."""


# --- local -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class LocalBytes:
    """A file on disk; opened for each read, so that the value holds no handle."""

    path: Path
    size: int
    connections: int = 1

    @classmethod
    def open(cls, path: Path) -> LocalBytes:
        """See whether it is there."""
        if not path.is_file():
            raise LidarError(f"{path} does not exist or is not a file; give a LAS or LAZ file")
        return cls(path=path, size=path.stat().st_size)

    @property
    def name(self) -> str:
        """See `Bytes`."""
        return str(self.path)

    def read(self, start: int, size: int) -> bytes:
        """See `Bytes`."""
        try:
            with self.path.open("rb") as file:
                file.seek(start)
                data = file.read(size)
        except OSError as error:
            raise LidarError(f"{self.path} cannot be read ({error.strerror}); check the disk") from error
        if len(data) < size:
            raise _too_short(self.name, start, size, self.size)
        return data


@dataclass(frozen=True, slots=True, kw_only=True)
class LocalFolder:
    """A folder on disk."""

    path: Path
    connections: int = 1

    def name(self, file: str) -> str:
        """See `Folder`."""
        return str(self.path / file)

    def read(self, file: str) -> bytes | None:
        """See `Folder`."""
        try:
            return (self.path / file).read_bytes()
        except FileNotFoundError:
            return None
        except OSError as error:
            raise LidarError(f"{self.path / file} cannot be read ({error.strerror}); check the disk") from error


def _too_short(name: str, start: int, size: int, total: int) -> LidarError:
    return LidarError(f"{name} breaks off: bytes {start} to {start + size - 1} are not in its {total}; fetch it again")


# --- remote ------------------------------------------------------------------------------------------------------------


def is_link(text: object) -> bool:
    """Whether something names a file behind HTTP."""
    return isinstance(text, str) and text.lower().startswith(("http://", "https://"))


def without_secrets(href: str) -> str:
    """A link without user, query and fragment, where signatures stand."""
    parts = urlsplit(href)
    return urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], parts.path, "", ""))


def fetch(href: str, *, sign: Sign | None = None, patience: Patience = PATIENCE) -> bytes | None:
    """A whole file behind HTTP, None where there is none.

    Raises:
        LidarError: its server refuses or fails for good.
    """
    reply = _get(href, None, sign, patience)
    return None if reply is None else reply.body


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class RemoteBytes:
    """A file behind HTTP, read by ranges."""

    href: str
    head: bytes = field(repr=False)
    """The first bytes, which come with the request that finds the size."""
    size: int
    sign: Sign | None = None
    patience: Patience = PATIENCE
    connections: int = CONNECTIONS

    @classmethod
    def open(cls, href: str, *, head_bytes: int, sign: Sign | None = None, patience: Patience = PATIENCE) -> RemoteBytes:
        """Fetch the first bytes.

        Raises:
            LidarError: the file is not there, or its server gives no ranges, refuses or fails for good.
        """
        reply = _get(href, (0, head_bytes), sign, patience)
        if reply is None:
            raise LidarError(f"{without_secrets(href)} is not there (HTTP 404); check the link")
        return cls(href=href, head=reply.body, size=reply.total, sign=sign, patience=patience)

    @property
    def name(self) -> str:
        """See `Bytes`."""
        return without_secrets(self.href)

    def read(self, start: int, size: int) -> bytes:
        """See `Bytes`."""
        if start + size > self.size:
            raise _too_short(self.name, start, size, self.size)
        if start + size <= len(self.head):
            return self.head[start : start + size]
        reply = _get(self.href, (start, size), self.sign, self.patience)
        if reply is None or reply.total != self.size:
            now = "is gone" if reply is None else f"has {reply.total} bytes"
            raise LidarError(f"{self.name} had {self.size} bytes and now {now}: it changed while it was read; run again")
        return reply.body


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class RemoteFolder:
    """A folder behind HTTP; a query on its link, a signature for instance, goes to every file in it."""

    href: str
    """Link of the folder, or of a file in it: as in a browser, what follows the last slash does not count."""
    sign: Sign | None = None
    patience: Patience = PATIENCE
    connections: int = CONNECTIONS

    def _link(self, file: str) -> str:
        parts = urlsplit(self.href)
        return urlunsplit((parts.scheme, parts.netloc, urljoin(parts.path, file), parts.query, ""))

    def name(self, file: str) -> str:
        """See `Folder`."""
        return without_secrets(self._link(file))

    def read(self, file: str) -> bytes | None:
        """See `Folder`."""
        return fetch(self._link(file), sign=self.sign, patience=self.patience)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Reply:
    body: bytes
    total: int
    """Bytes of the whole file."""


class _AgainError(Exception):
    """The request failed in a way that may pass."""

    def __init__(self, why: str, pause_s: float = 0.0) -> None:
        super().__init__(why)
        self.pause_s = pause_s


def _get(href: str, span: tuple[int, int] | None, sign: Sign | None, patience: Patience) -> _Reply | None:
    """A file, or `span` (start, size) of it as far as it reaches; None where there is none."""
    name = without_secrets(href)
    link = href if sign is None else sign(href)
    renewed = False
    pause_s = patience.first_pause_s
    tries = 0
    while True:
        tries += 1
        try:
            with _request(link, span, patience) as response:
                if response.status_code in {401, 403} and sign is not None and not renewed:
                    # An expired signature looks like any other refusal; a new one shows which it was.
                    link, renewed, tries = sign(href, renew=True), True, tries - 1
                    continue
                return _reply(response, span, name, signed=sign is not None)
        except _AgainError as error:
            why = f"{error}" if tries == 1 else f"{error}; {tries} tries"
            wait_s = max(pause_s, error.pause_s)
            if tries >= patience.attempts or error.pause_s > patience.longest_pause_s:
                if error.pause_s > patience.longest_pause_s:
                    why += f", and asks for a pause of {error.pause_s:.0f} s"
                raise LidarError(f"{name} cannot be fetched ({why}); run again later") from error
        time.sleep(min(wait_s, patience.longest_pause_s))
        pause_s *= 2


def _request(link: str, span: tuple[int, int] | None, patience: Patience) -> requests.Response:
    import requests

    # What is stored is what is wanted: a body compressed on the way has other lengths than the ranges say.
    headers = {"Accept-Encoding": "identity"}
    if span is not None:
        headers["Range"] = f"bytes={span[0]}-{span[0] + span[1] - 1}"
    try:
        return _session().get(link, headers=headers, stream=True, timeout=(patience.connect_s, patience.silence_s))
    except (
        requests.exceptions.InvalidURL,
        requests.exceptions.InvalidSchema,
        requests.exceptions.TooManyRedirects,
    ) as error:
        raise LidarError(f"{without_secrets(link)} is no usable link ({type(error).__name__}); check it") from error
    except requests.exceptions.SSLError as error:
        raise LidarError(f"{without_secrets(link)}: the server's certificate is not accepted; check the link") from error
    except requests.RequestException as error:
        raise _AgainError(_told(error)) from error


def _reply(response: requests.Response, span: tuple[int, int] | None, name: str, *, signed: bool) -> _Reply | None:
    status = response.status_code
    if status in _BUSY:
        told = response.headers.get("Retry-After", "")
        raise _AgainError(f"HTTP {status}", float(told) if told.isdigit() else 0.0)
    if status in {404, 410}:
        return None
    if status in {401, 403}:
        remedy = "check the source's signing" if signed else "check the link, or sign it"
        raise RefusedError(f"{name} is not there or not for everybody (HTTP {status}); {remedy}")
    if span is None:
        if status != 200:
            raise LidarError(f"{name} cannot be fetched (HTTP {status}); check the link")
        body = _body(response, None)
        return _Reply(body=body, total=len(body))
    if status == 200:
        raise LidarError(f"{name}: its server gives whole files only, no ranges; download it and give the file")
    if status == 416:
        raise LidarError(f"{name} has no bytes from {span[0]} on (HTTP 416); fetch it again or check the link")
    if status != 206:
        raise LidarError(f"{name} cannot be fetched (HTTP {status}); check the link")
    if _is_encoded(response):
        raise LidarError(f"{name}: its server compresses on the way, so ranges mean nothing; download it and give the file")
    told = response.headers.get("Content-Range", "")
    try:
        place, total = told.removeprefix("bytes ").split("/")
        first, last = map(int, place.split("-"))
        whole = int(total)
    except ValueError as error:
        raise LidarError(f"{name}: Content-Range {told!r} is not understood; download it and give the file") from error
    wanted = min(span[1], whole - span[0])
    if first != span[0] or last - first + 1 != wanted:
        raise _AgainError(f"bytes {first} to {last} where {span[0]} to {span[0] + wanted - 1} were asked for")
    return _Reply(body=_body(response, wanted), total=whole)


def _body(response: requests.Response, size: int | None) -> bytes:
    """The body, of the length that is known from elsewhere or from its header."""
    import requests

    promised = -1
    if size is not None:
        promised = size
    elif not _is_encoded(response):  # else the length is that of the compressed body, which requests has decoded
        promised = int(response.headers.get("Content-Length", -1))
    parts: list[bytes] = []
    got = 0
    try:
        for part in response.iter_content(_READ_BYTES):
            parts.append(part)
            got += len(part)
            if 0 <= promised < got:
                break
    except requests.RequestException as error:
        raise _AgainError(_told(error) if isinstance(error, requests.Timeout) else "the answer broke off") from error
    if promised >= 0 and got != promised:
        raise _AgainError(f"{got} of {promised} bytes")
    return b"".join(parts)


def _is_encoded(response: requests.Response) -> bool:
    """Whether the body is compressed, though we asked for it as it is; objects stored so are sent so."""
    return response.headers.get("Content-Encoding", "identity") not in {"", "identity"}


def _told(error: Exception) -> str:
    """What a failed connection comes down to; the library's own text is long and holds the signed link."""
    import requests

    if isinstance(error, requests.Timeout):
        return "no answer in time"
    if isinstance(error, requests.ConnectionError):
        text = str(error)
        if "Name or service not known" in text or "NameResolution" in text or "getaddrinfo" in text:
            return "the server's name is not known"
        return "no connection" if "refused" in text else "the connection broke off"
    return type(error).__name__


_SESSIONS = threading.local()


def _session() -> requests.Session:
    """One session for each thread of each process: connections are used again, and never by two at a time."""
    import requests

    if getattr(_SESSIONS, "pid", None) != os.getpid():
        _SESSIONS.pid, _SESSIONS.session = os.getpid(), requests.Session()
    session: requests.Session = _SESSIONS.session
    return session


# --- ahead -------------------------------------------------------------------------------------------------------------


def ahead(jobs: Iterable[_J], work: Callable[[_J], _R], workers: int) -> Iterator[_R]:
    """`work` of each job, in their order, up to `workers` of them at a time and no more than that ahead.

    With one worker it is done in the caller's thread. A job that fails ends the rest.
    """
    if workers <= 1:
        yield from map(work, jobs)
        return
    waiting: deque[Future[_R]] = deque()
    remaining = iter(jobs)
    pool = ThreadPoolExecutor(workers, thread_name_prefix="canopy-points")
    try:
        for job in remaining:
            waiting.append(pool.submit(work, job))
            if len(waiting) >= workers:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)

"""Real servers on loopback: files with byte ranges, signatures and faults on demand, and a STAC API.

The fixtures `file_server` and `stac_api` are known to every test. What goes over the wire is what a user's run sends.
"""

import fnmatch
import json
import re
import secrets
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Literal
from urllib.parse import parse_qs, quote, unquote, urlsplit

import pytest

BLOCK_BYTES = 1 << 16


@dataclass(kw_only=True)
class Fault:
    """What goes wrong, for which paths, and how often."""

    pattern: str
    kind: Literal["status", "hang", "truncate", "drop"]
    times: int | None
    """Requests left that it strikes; None: all of them."""
    status: int = 0
    retry_after_s: int | None = None
    hang_s: float = 0.0
    after: int = 0
    """Matching requests that pass before the first one is struck."""
    methods: tuple[str, ...] = ("GET", "HEAD", "POST")


@dataclass(kw_only=True)
class Request:
    """One request as the server saw it."""

    method: str
    path: str
    query: str
    range: str | None
    status: int
    sent_bytes: int


_PORTS: set[int] = set()
"""Of all file servers of this process so far."""


def _on_a_new_port(handler: type[BaseHTTPRequestHandler]) -> ThreadingHTTPServer:
    """A server on a port that none of this process had before.

    GDAL keeps what it has read of an address for as long as a process lives, and would give one test the file of another.
    """
    taken = []
    while True:
        server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        if (port := server.server_address[1]) not in _PORTS:
            break
        taken.append(server)  # kept open meanwhile, so that the system offers another
    for each in taken:
        each.server_close()
    _PORTS.add(port)
    return server


class FileServer:
    """A threaded HTTP/1.1 server of one folder: HEAD, single byte ranges (206, 416), keep-alive, Last-Modified.

    `requests` is the log; `count` and `sent_bytes` sum it per path. `fail` injects faults, `require_signature` closes paths
    to requests without a valid `sig`; such signatures come from `/api/sas/v1/token/ANYTHING` and `/api/sas/v1/sign?href=`,
    which answer as the Planetary Computer's do.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.requests: list[Request] = []
        self.signature_lifetime_s = 3600.0
        self._faults: list[Fault] = []
        self._signed: list[str] = []
        self._tokens: dict[str, float] = {}
        self._lock = threading.Lock()
        self._stopping = threading.Event()
        self._server = _on_a_new_port(self._handler())
        self._server.daemon_threads = True
        self._server.handle_error = lambda *_: None  # clients that give up in the middle are what many tests are about
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
        self._thread.start()

    # --- what tests use ---

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_address[1]}"

    def href(self, path: Path | str) -> str:
        """The address of a file of the folder."""
        relative = Path(path).relative_to(self.folder) if Path(path).is_absolute() else Path(path)
        return f"{self.url}/{quote(relative.as_posix())}"

    def fail(
        self,
        pattern: str,
        *,
        status: int = 0,
        times: int | None = None,
        retry_after_s: int | None = None,
        hang_s: float = 0.0,
        truncate: bool = False,
        drop: bool = False,
        after: int = 0,
        methods: tuple[str, ...] = ("GET", "HEAD", "POST"),
    ) -> Fault:
        """Lets the next `times` requests (None: all) whose path matches `pattern` go wrong in one way.

        Args:
            pattern: As in a shell, against the path without its query, for example "/scenes/*.tif".
            status: Answer with this status, for example 429, 500, 503.
            times: How many requests.
            retry_after_s: Value of Retry-After beside a status.
            hang_s: Say nothing for so long, then close.
            truncate: Promise the whole body and send its first half, then close.
            drop: Close without a word.
            after: Let so many matching requests pass first.
            methods: Which methods it strikes.
        """
        kind: Literal["status", "hang", "truncate", "drop"] = (
            "status" if status else "hang" if hang_s else "truncate" if truncate else "drop"
        )
        assert kind != "drop" or drop, "say what is to go wrong"
        fault = Fault(
            pattern=pattern, kind=kind, times=times, status=status, retry_after_s=retry_after_s, hang_s=hang_s,
            after=after, methods=methods,
        )  # fmt: skip
        with self._lock:
            self._faults.append(fault)
        return fault

    def heal(self) -> None:
        """No more faults."""
        with self._lock:
            self._faults.clear()

    def require_signature(self, pattern: str, *, lifetime_s: float = 3600.0) -> None:
        """From now on paths that match answer 403 to a request without a valid signature."""
        self.signature_lifetime_s = lifetime_s
        self._signed.append(pattern)

    def revoke_signatures(self) -> None:
        """Every signature given out so far has expired, whatever it says about itself."""
        with self._lock:
            self._tokens.clear()

    @property
    def token_url(self) -> str:
        """The token endpoint, without the collection."""
        return f"{self.url}/api/sas/v1/token"

    @property
    def sign_url(self) -> str:
        """The endpoint that signs one address."""
        return f"{self.url}/api/sas/v1/sign"

    def count(self, pattern: str = "*", *, status: int | None = None) -> int:
        """Requests for paths that match, or those of them with one status."""
        return sum(fnmatch.fnmatch(r.path, pattern) and status in (None, r.status) for r in list(self.requests))

    @property
    def sent_bytes(self) -> Counter[str]:
        """Bytes of bodies sent per path."""
        total: Counter[str] = Counter()
        for request in list(self.requests):
            total[request.path] += request.sent_bytes
        return total

    def forget(self) -> None:
        """Empties the log."""
        self.requests.clear()

    def stop(self) -> None:
        """From now on nobody listens there."""
        self._stopping.set()
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    # --- how it answers ---

    def _strike(self, method: str, path: str) -> Fault | None:
        with self._lock:
            for fault in self._faults:
                if method in fault.methods and fnmatch.fnmatch(path, fault.pattern) and fault.times != 0:
                    if fault.after:
                        fault.after -= 1
                        continue
                    if fault.times is not None:
                        fault.times -= 1
                    return fault
        return None

    def _token(self) -> tuple[str, str]:
        expiry = time.time() + self.signature_lifetime_s
        secret = secrets.token_hex(8)
        with self._lock:
            self._tokens[secret] = expiry
        text = datetime.fromtimestamp(expiry, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
        return text, f"se={quote(text)}&sp=rl&sig={secret}"

    def _is_signed(self, path: str, query: str) -> bool:
        if not any(fnmatch.fnmatch(path, pattern) for pattern in self._signed):
            return True
        with self._lock:
            return self._tokens.get(parse_qs(query).get("sig", [""])[0], 0.0) > time.time()

    def _handler(owner) -> type[BaseHTTPRequestHandler]:  # noqa: N805 - the handler's `self` is inside
        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            disable_nagle_algorithm = True

            def log_message(self, *_: Any) -> None:
                pass

            def do_HEAD(self) -> None:
                self._answer()

            def do_GET(self) -> None:
                self._answer()

            def _answer(self) -> None:
                parts = urlsplit(self.path)
                path = unquote(parts.path)
                self._logged = Request(
                    method=self.command,
                    path=path,
                    query=parts.query,
                    range=self.headers.get("Range"),
                    status=0,
                    sent_bytes=0,
                )
                owner.requests.append(self._logged)
                fault = owner._strike(self.command, path)
                if fault is not None and fault.kind != "truncate":
                    if fault.kind == "status":
                        extra = {} if fault.retry_after_s is None else {"Retry-After": str(fault.retry_after_s)}
                        self._send(fault.status, b"refused by the test\n", extra)
                    else:
                        owner._stopping.wait(fault.hang_s)
                        self.close_connection = True
                    return
                if path.startswith("/api/sas/v1/"):
                    self._sign(path, parts.query)
                elif not owner._is_signed(path, parts.query):
                    self._send(403, b"AuthenticationFailed: signature missing or expired\n")
                else:
                    self._file(path, truncate=fault is not None)

            def _sign(self, path: str, query: str) -> None:
                expiry, token = owner._token()
                answer = {"msft:expiry": expiry}
                if path.startswith("/api/sas/v1/token/"):
                    answer["token"] = token
                else:
                    answer["href"] = f"{parse_qs(query)['href'][0]}?{token}"
                self._send(200, json.dumps(answer).encode(), {"Content-Type": "application/json"})

            def _file(self, path: str, *, truncate: bool) -> None:
                file = (owner.folder / path.lstrip("/")).resolve()
                if not file.is_relative_to(owner.folder.resolve()) or not file.is_file():
                    self._send(404, b"not here\n")
                    return
                size = file.stat().st_size
                start, stop, status = 0, size, 200
                if (match := re.fullmatch(r"bytes=(\d*)-(\d*)", self.headers.get("Range", ""))) and match[0] != "bytes=-":
                    status = 206
                    if match[1]:
                        start, stop = int(match[1]), min(int(match[2]) + 1 if match[2] else size, size)
                    else:
                        start = max(size - int(match[2]), 0)
                    if start >= size or stop <= start:
                        self._send(416, b"", {"Content-Range": f"bytes */{size}"})
                        return
                headers = {
                    "Accept-Ranges": "bytes",
                    "Last-Modified": formatdate(file.stat().st_mtime, usegmt=True),
                    "Content-Type": "application/json"
                    if file.suffix in {".json", ".geojson"}
                    else "application/octet-stream",
                }
                if status == 206:
                    headers["Content-Range"] = f"bytes {start}-{stop - 1}/{size}"
                with file.open("rb") as stream:
                    stream.seek(start)
                    self._send(status, stream, headers, length=stop - start, truncate=truncate)

            def _send(
                self,
                status: int,
                body: Any,
                headers: dict[str, str] | None = None,
                *,
                length: int | None = None,
                truncate: bool = False,
            ) -> None:
                length = len(body) if length is None else length
                self._logged.status = status
                self.send_response(status)
                for name, value in (headers or {}).items():
                    self.send_header(name, value)
                self.send_header("Content-Length", str(length))
                self.end_headers()
                if self.command == "HEAD":
                    return
                left = length // 2 if truncate else length
                try:
                    while left > 0:
                        block = body[:left] if isinstance(body, bytes) else body.read(min(left, BLOCK_BYTES))
                        self.wfile.write(block)
                        self._logged.sent_bytes += len(block)
                        left -= len(block)
                except (BrokenPipeError, ConnectionResetError):
                    self.close_connection = True  # the client has what it wanted
                if truncate:
                    self.close_connection = True

        return Handler


# --- the STAC API --------------------------------------------------------------------------------------------------------


@dataclass(kw_only=True)
class StacApiServer:
    """stac-fastapi over items in memory; `items` and `collections` may be changed while it runs."""

    collections: list[dict[str, Any]]
    items: list[dict[str, Any]]
    url: str = ""
    searches: list[dict[str, Any]] = field(default_factory=list)
    """Every search that reached the API, one entry a page."""
    faults: list[tuple[int, dict[str, str]]] = field(default_factory=list)
    """(status, headers) with which the next requests are answered."""
    always: int | None = None
    """A status with which every request is answered."""
    hang_s: float = 0.0
    """Silence before every answer."""
    _stop: Callable[[], None] | None = None

    def stop(self) -> None:
        """From now on nobody listens there."""
        if self._stop is not None:
            self._stop()
            self._stop = None


def _matching(server: StacApiServer, asked: dict[str, Any]) -> list[dict[str, Any]]:
    from shapely.geometry import box, shape
    from stac_fastapi.types.rfc3339 import str_to_interval

    area = shape(asked["intersects"]) if asked.get("intersects") else None
    if asked.get("bbox"):
        area = box(*asked["bbox"])
    interval: Any = str_to_interval(asked["datetime"]) if asked.get("datetime") else None
    first, last = interval if isinstance(interval, tuple) else (interval, interval)
    operators: dict[str, Callable[[Any, Any], bool]] = {
        "eq": lambda a, b: a == b, "neq": lambda a, b: a != b, "lt": lambda a, b: a < b, "lte": lambda a, b: a <= b,
        "gt": lambda a, b: a > b, "gte": lambda a, b: a >= b, "in": lambda a, b: a in b,
    }  # fmt: skip
    found = []
    for item in server.items:
        properties = item["properties"]
        when = datetime.fromisoformat(properties.get("datetime") or properties["start_datetime"])
        if asked.get("collections") and item["collection"] not in asked["collections"]:
            continue
        if asked.get("ids") and item["id"] not in asked["ids"]:
            continue
        if area is not None and (item["geometry"] is None or not shape(item["geometry"]).intersects(area)):
            continue
        if (first is not None and when < first) or (last is not None and when > last):
            continue
        tests = [
            (key, operator, value)
            for key, conditions in (asked.get("query") or {}).items()
            for operator, value in conditions.items()
        ]
        if not all(key in properties and operators[operator](properties[key], value) for key, operator, value in tests):
            continue
        found.append(item)
    return found


def _application(server: StacApiServer) -> Any:
    """The ASGI application of a real stac-fastapi with the item search, query and token paging extensions."""
    import attr
    from fastapi import Request as HttpRequest
    from fastapi.responses import JSONResponse
    from stac_fastapi.api.app import StacApi
    from stac_fastapi.api.models import create_get_request_model, create_post_request_model
    from stac_fastapi.extensions import QueryExtension, TokenPaginationExtension
    from stac_fastapi.types.config import ApiSettings
    from stac_fastapi.types.core import BaseCoreClient
    from stac_fastapi.types.errors import NotFoundError

    def page(asked: dict[str, Any], request: HttpRequest) -> dict[str, Any]:
        server.searches.append(asked)
        found = _matching(server, asked)
        start, limit = int(asked.get("token") or 0), int(asked.get("limit") or 10)
        links = []
        if start + limit < len(found):
            body = {key: value for key, value in asked.items() if value is not None} | {"token": str(start + limit)}
            address = str(request.base_url)
            if request.method == "POST":
                links.append({"rel": "next", "method": "POST", "href": f"{address}search", "body": body})
            else:
                pairs = [
                    (key, json.dumps(value) if isinstance(value, dict) else ",".join(map(str, value)))
                    if isinstance(value, dict | list | tuple)
                    else (key, str(value))
                    for key, value in body.items()
                ]
                text = "&".join(f"{key}={quote(value)}" for key, value in pairs)
                links.append(
                    {"rel": "next", "type": "application/geo+json", "method": "GET", "href": f"{address}search?{text}"}
                )
        return {"type": "FeatureCollection", "features": found[start : start + limit], "links": links}

    def one(items: Sequence[dict[str, Any]], name: str) -> dict[str, Any]:
        for item in items:
            if item["id"] == name:
                return item
        raise NotFoundError(f"{name} not found")

    @attr.s
    class Client(BaseCoreClient):
        def post_search(self, search_request: Any, **kwargs: Any) -> Any:
            asked = search_request.model_dump(mode="json", exclude_none=True)
            return page(asked, kwargs["request"])

        def get_search(self, **kwargs: Any) -> Any:
            request = kwargs.pop("request")
            for name in ("intersects", "query"):
                if isinstance(kwargs.get(name), str):
                    kwargs[name] = json.loads(kwargs[name])
            return page({key: value for key, value in kwargs.items() if value is not None}, request)

        def get_item(self, item_id: str, collection_id: str, **kwargs: Any) -> Any:
            return one([item for item in server.items if item["collection"] == collection_id], item_id)

        def all_collections(self, **kwargs: Any) -> Any:
            return {"collections": server.collections, "links": []}

        def get_collection(self, collection_id: str, **kwargs: Any) -> Any:
            return one(server.collections, collection_id)

        def item_collection(self, collection_id: str, limit: int = 10, **kwargs: Any) -> Any:
            return page({"collections": [collection_id], "limit": limit}, kwargs["request"])

    extensions = [QueryExtension(), TokenPaginationExtension()]
    api = StacApi(
        settings=ApiSettings(
            enable_response_models=False,
            stac_fastapi_title="test",
            stac_fastapi_description="test",
            stac_fastapi_landing_id="test",
            stac_fastapi_version="1",
        ),
        client=Client(extensions=extensions),
        extensions=extensions,
        search_get_request_model=create_get_request_model(extensions),
        search_post_request_model=create_post_request_model(extensions),
    )

    async def faults(request: HttpRequest, call_next: Any) -> Any:
        import asyncio

        if server.hang_s:
            await asyncio.sleep(server.hang_s)
        if server.always is not None:
            return JSONResponse({"detail": "refused by the test"}, status_code=server.always)
        if server.faults:
            status, headers = server.faults.pop(0)
            return JSONResponse({"detail": "refused by the test"}, status_code=status, headers=headers)
        return await call_next(request)

    api.app.middleware("http")(faults)
    return api.app


def serve_stac(collections: list[dict[str, Any]], items: list[dict[str, Any]]) -> StacApiServer:
    """Starts a STAC API; the caller stops it."""
    import uvicorn

    server = StacApiServer(collections=collections, items=items)
    listener = socket.socket()
    listener.bind(("127.0.0.1", 0))
    server.url = f"http://127.0.0.1:{listener.getsockname()[1]}"
    running = uvicorn.Server(
        uvicorn.Config(_application(server), log_level="error", lifespan="off", timeout_graceful_shutdown=1)
    )
    thread = threading.Thread(target=running.run, kwargs={"sockets": [listener]}, daemon=True)
    thread.start()
    until = time.monotonic() + 20
    while not running.started:
        assert thread.is_alive(), "the STAC API did not start"
        assert time.monotonic() < until, "the STAC API did not start within 20 s"
        time.sleep(0.01)

    def stop() -> None:
        running.should_exit = True
        thread.join(timeout=10)
        listener.close()

    server._stop = stop
    return server


# --- fixtures ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def file_server(tmp_path: Path) -> Iterator[FileServer]:
    """A server of the folder `served` of the test's own temporary folder."""
    folder = tmp_path / "served"
    folder.mkdir(exist_ok=True)
    server = FileServer(folder)
    yield server
    server.stop()


@pytest.fixture
def serve_folder() -> Iterator[Callable[[Path], FileServer]]:
    """Starts servers of any folders; stopped with the test."""
    started: list[FileServer] = []

    def start(folder: Path) -> FileServer:
        started.append(FileServer(folder))
        return started[-1]

    yield start
    for server in started:
        server.stop()


@pytest.fixture
def stac_api() -> Iterator[Callable[[list[dict[str, Any]], list[dict[str, Any]]], StacApiServer]]:
    """Starts STAC APIs from (collections, items); stopped with the test."""
    started: list[StacApiServer] = []

    def start(collections: list[dict[str, Any]], items: list[dict[str, Any]]) -> StacApiServer:
        started.append(serve_stac(collections, items))
        return started[-1]

    yield start
    for server in started:
        server.stop()

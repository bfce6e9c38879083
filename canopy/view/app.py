"""The web server of a map: addresses to calls, results to JSON and PNG.

No part of an address ever becomes a path: layers are known by their ids, and the files of the page by the names that they
had at the start. Answers are for this page alone: no other site may read them (no CORS), put the page in a frame, or have it
load anything from elsewhere but the tiles of the base map that the user named.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Final
from urllib.parse import urlsplit

import anyio
import anyio.to_thread
from fastapi import FastAPI, HTTPException, Query, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.datastructures import MutableHeaders
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from canopy import __version__
from canopy.errors import AnalysisError, CanopyError, ViewError
from canopy.view.png import EMPTY
from canopy.view.point import PointValues
from canopy.view.scene import Scene
from canopy.view.statistics import TooLargeError, drawn_polygon, polygon_statistics
from canopy.view.tiles import ZOOM_LIMIT, Tile

PAGE: Final = Path(__file__).parent / "page"

TYPES: Final = {
    ".css": "text/css; charset=utf-8", ".html": "text/html; charset=utf-8", ".js": "text/javascript; charset=utf-8",
    ".mjs": "text/javascript; charset=utf-8", ".svg": "image/svg+xml", ".png": "image/png", ".ico": "image/x-icon",
}  # fmt: skip
"""What the page may consist of."""

MAX_BODY_BYTES: Final = 1_000_000
"""A polygon of `MAX_VERTICES` corners takes half of it."""

READERS: Final = max(2, min(8, os.cpu_count() or 2))
"""Tiles of a layer that are read at the same time: more would only wait for each other. Each layer has its own, so that one
whose overviews are being made holds up no other."""


def create_app(scene: Scene, *, allowed_hosts: Sequence[str] = ("*",)) -> FastAPI:
    """The server of a map.

    Args:
        scene: The map, open.
        allowed_hosts: Names that a browser may know the server by, "*" for all. A page of another site can make its own name
            mean this computer (DNS rebinding), and would then be let in.
    """
    app = FastAPI(title="canopy view", docs_url=None, redoc_url=None, openapi_url=None, redirect_slashes=False)
    app.add_middleware(TrustedHostMiddleware, allowed_hosts=list(allowed_hosts), www_redirect=False)
    app.add_middleware(_Guard, headers=_headers(scene.basemap))
    assets = {path.name: path for path in sorted(PAGE.rglob("*")) if path.suffix in TYPES and path.is_file()}
    readers = {name: anyio.CapacityLimiter(READERS) for name in scene.layers}
    clicking, counting = anyio.CapacityLimiter(READERS), anyio.CapacityLimiter(1)

    @app.exception_handler(RequestValidationError)
    async def invalid(_: Request, error: RequestValidationError) -> JSONResponse:
        first = error.errors()[0]
        return JSONResponse({"detail": f"{first['loc'][-1]}: {first['msg']}"}, status_code=422)

    @app.exception_handler(CanopyError)
    async def failed(_: Request, error: CanopyError) -> JSONResponse:
        wrong = isinstance(error, ViewError | AnalysisError)
        status = 413 if isinstance(error, TooLargeError) else 422 if wrong else 500
        return JSONResponse({"detail": str(error)}, status_code=status)

    @app.get("/")
    async def page(request: Request) -> Response:
        return await asset("index.html", request)

    @app.get("/assets/{name}")
    async def asset(name: str, request: Request) -> Response:
        if name not in assets:
            raise HTTPException(404, "the page has no file of this name")
        path = assets[name]
        content = await anyio.to_thread.run_sync(path.read_bytes)
        return _cached(request, hashlib.sha256(content).hexdigest()[:16], TYPES[path.suffix], content)

    @app.get("/map.json")
    async def description() -> dict[str, Any]:
        return scene.description()

    @app.get("/tiles/{layer}/{z}/{x}/{y}.png")
    async def tile(layer: str, z: int, x: int, y: int, request: Request) -> Response:
        found = scene.layers.get(layer)
        if found is None:
            raise HTTPException(404, f"there is no such layer, only {', '.join(scene.layers)}")
        if not 0 <= z <= min(found.max_zoom, ZOOM_LIMIT):
            raise HTTPException(404, f"there are zooms 0 to {found.max_zoom}")
        if not (0 <= x < 1 << z and 0 <= y < 1 << z):
            raise HTTPException(404, f"at zoom {z}, x and y are 0 to {(1 << z) - 1}")
        tag = f"{__version__}-{found.version}-{z}-{x}-{y}"
        if (unchanged := _unchanged(request, tag)) is not None:
            return unchanged
        png = await anyio.to_thread.run_sync(scene.tile, found, Tile(zoom=z, x=x, y=y), limiter=readers[layer])
        return _cached(request, tag, "image/png", EMPTY if png is None else png)

    @app.get("/point")
    async def point(
        lon: Annotated[float, Query(ge=-180, le=180, allow_inf_nan=False)],
        lat: Annotated[float, Query(ge=-90, le=90, allow_inf_nan=False)],
    ) -> PointValues:
        return await anyio.to_thread.run_sync(scene.point, lon, lat, limiter=clicking)

    @app.post("/statistics")
    async def statistics(request: Request) -> dict[str, Any]:
        # A form of another site can send text, but JSON only with this server's leave, which it never gives.
        if request.headers.get("content-type", "").partition(";")[0].strip().lower() not in _JSON:
            raise HTTPException(415, "send the polygon as application/json")
        polygon = drawn_polygon(await _body(request))
        return await anyio.to_thread.run_sync(polygon_statistics, scene.folder, polygon, limiter=counting)

    return app


_JSON = ("application/json", "application/geo+json")


async def _body(request: Request) -> bytes:
    body = bytearray()
    async for part in request.stream():
        body += part
        if len(body) > MAX_BODY_BYTES:
            raise HTTPException(413, f"the body is longer than {MAX_BODY_BYTES} bytes; use canopy zonal for such a polygon")
    return bytes(body)


# --- headers ---------------------------------------------------------------------------------------------------------------


def _unchanged(request: Request, tag: str) -> Response | None:
    """The answer to a browser that has this already; None where it has not."""
    known = [each.strip().removeprefix("W/") for each in request.headers.get("if-none-match", "").split(",")]
    return Response(status_code=304, headers=_cache_headers(tag)) if f'"{tag}"' in known else None


def _cached(request: Request, tag: str, media_type: str, content: bytes) -> Response:
    unchanged = _unchanged(request, tag)
    return unchanged or Response(content, media_type=media_type, headers=_cache_headers(tag))


def _cache_headers(tag: str) -> dict[str, str]:
    # Kept, but asked for each time: the next map may be served at the same address.
    return {"ETag": f'"{tag}"', "Cache-Control": "private, no-cache"}


def _headers(basemap: str | None) -> dict[str, str]:
    """What every answer says to the browser."""
    parts = None if basemap is None else urlsplit(basemap)
    other = "" if parts is None else f" {parts.scheme}://{parts.netloc}"
    policy = {
        "default-src": "'self'",
        "img-src": f"'self' data: blob:{other}",
        "connect-src": f"'self'{other}",
        "worker-src": "'self' blob:",
        "object-src": "'none'",
        "base-uri": "'none'",
        "form-action": "'none'",
        "frame-ancestors": "'none'",
    }
    return {
        "Content-Security-Policy": "; ".join(f"{name} {value}" for name, value in policy.items()),
        "X-Content-Type-Options": "nosniff",
        "Referrer-Policy": "no-referrer",
        "Cross-Origin-Resource-Policy": "same-origin",
        "Cross-Origin-Opener-Policy": "same-origin",
    }


class _Guard:
    """Puts headers on every answer, those of errors too."""

    def __init__(self, app: ASGIApp, headers: dict[str, str]) -> None:
        self._app, self._headers = app, headers

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def guarded(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in self._headers.items():
                    headers[name] = value
            await send(message)

        await self._app(scope, receive, guarded)

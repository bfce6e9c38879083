"""The life of the server: a free port, a browser, and an end with Ctrl-C."""

from __future__ import annotations

import ipaddress
import os
import socket
import sys
import threading
import warnings
import webbrowser
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final
from urllib.parse import urlsplit

from rasterio.errors import NotGeoreferencedWarning

from canopy.errors import ViewError
from canopy.raster import keep_blocks
from canopy.region.folder import RegionFolder
from canopy.view import maplibre
from canopy.view.app import create_app
from canopy.view.scene import Scene

if TYPE_CHECKING:
    from canopy.score.reference import GivenReference

LOOPBACK: Final = "127.0.0.1"

FIRST_PORT: Final = 8765
PORTS: Final = 100
"""Without `--port` the first free one of so many is taken."""

CACHE_MB: Final = 256
"""Of decoded blocks, from which neighbouring tiles are read."""

_STOP_S = 2
"""Seconds that an answer under way has when the server ends."""

Say = Callable[[str], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Address:
    """Where the server listens, and what browsers may call it."""

    host: str = LOOPBACK
    port: int | None = None
    """None: the first free one from `FIRST_PORT` up."""
    names: tuple[str, ...] = ()
    """Names by which browsers may ask for it besides its own, as behind a proxy."""

    def __post_init__(self) -> None:
        if self.port is not None and not 1 <= self.port <= 65_535:
            raise ViewError(f"--port {self.port} is not one of 1 to 65535; leave it out to have a free one found")

    @property
    def is_loopback(self) -> bool:
        """Whether only this computer can reach it."""
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return self.host == "localhost"

    @property
    def allowed_hosts(self) -> tuple[str, ...]:
        """Names that browsers may know the server by; on other than loopback any, unless some are given."""
        if self.is_loopback:
            return ("localhost", "127.0.0.1", "[::1]", "::1", self.host, *self.names)
        return self.names or ("*",)


def serve(
    out: Path,
    *,
    address: Address | None = None,
    reference: GivenReference | None = None,
    basemap: str | None = None,
    attribution: str | None = None,
    open_browser: bool = False,
    say: Say,
    warn: Say,
) -> None:
    """Serve a finished map to browsers until the process is interrupted.

    Args:
        out: Output folder of `canopy map`.
        address: Where to listen.
        reference: Heights to hold the map against.
        basemap: Address of the tiles of a base map, with {z}, {x} and {y}: the page asks its server for them.
        attribution: Who is to be named for it.
        open_browser: Whether to open the page in one.
        say: Told the address of the page.
        warn: Told what may not be wanted.

    Raises:
        CanopyError: the map or the reference cannot be read, or the port is taken.
    """
    import uvicorn

    address = address or Address()
    if not maplibre.in_place():
        raise ViewError(f"the page lacks MapLibre GL {maplibre.VERSION}; put it in place once: {maplibre.COMMAND}")
    keep_blocks(CACHE_MB)
    # rasterio silences this about its own work arrays, but Python's filters belong to all threads, and one lifts another's.
    warnings.simplefilter("ignore", NotGeoreferencedWarning)
    with Scene(
        RegionFolder.open(out), reference=reference, basemap=checked_basemap(basemap), attribution=attribution
    ) as scene:
        if not address.is_loopback:
            warn(f"anybody who can reach {address.host} on the network can see this map; leave --host out to keep it here")
        with _listening(address) as listener:
            url = _url(address.host, listener.getsockname()[1])
            say(url)
            scene.prepare()
            app = create_app(scene, allowed_hosts=address.allowed_hosts)
            config = uvicorn.Config(
                app, log_level="warning", access_log=False, server_header=False, ws="none", lifespan="off",
                timeout_graceful_shutdown=_STOP_S,
            )  # fmt: skip
            if open_browser:
                # The socket listens already, so that the page waits for the server, not the other way round.
                threading.Thread(target=webbrowser.open, args=(url,), daemon=True).start()
            try:
                uvicorn.Server(config).run(sockets=[listener])
            except KeyboardInterrupt:  # how a server ends
                return


def checked_basemap(url: str | None) -> str | None:
    """The address of a base map's tiles.

    Raises:
        ViewError: it is none.
    """
    if url is None:
        return None
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.netloc or any(f"{{{part}}}" not in url for part in "zxy"):
        raise ViewError(
            f"--basemap {url!r} is no address of tiles; give for example https://example.org/{{z}}/{{x}}/{{y}}.png"
        )
    if any(character in parts.netloc for character in " ;,'\"{}*"):
        raise ViewError(f"--basemap {url!r} does not name one server; leave out patterns such as {{a-c}} or {{s}}")
    return url


def can_open_browser() -> bool:
    """Whether there is a screen to open a browser on."""
    if sys.platform in ("win32", "darwin"):
        return True
    return bool(os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY"))


def _listening(address: Address) -> socket.socket:
    """A socket that listens at the address.

    Raises:
        ViewError: it cannot be had.
    """
    ports: Sequence[int] = range(FIRST_PORT, FIRST_PORT + PORTS) if address.port is None else (address.port,)
    for port in ports:
        try:
            family, _, _, _, where = socket.getaddrinfo(address.host, port, type=socket.SOCK_STREAM)[0]
        except OSError as error:
            raise ViewError(
                f"--host {address.host!r} is not known ({error.strerror}); give for example {LOOPBACK}"
            ) from error
        # Named as TCP: asyncio sends what it has at once (TCP_NODELAY) only then, else each answer waits 40 ms for its end.
        listener = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
        if os.name == "posix":  # elsewhere it would let two servers have one port
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind(where)
            listener.listen(128)
        except OSError as error:
            listener.close()
            if address.port is not None:
                raise ViewError(
                    f"port {port} of {address.host} cannot be had ({error.strerror}); give another --port, or none to have "
                    f"a free one found"
                ) from error
            continue
        return listener
    raise ViewError(f"no port of {ports[0]} to {ports[-1]} is free on {address.host}; give one with --port")


def _url(host: str, port: int) -> str:
    return f"http://[{host}]:{port}/" if ":" in host else f"http://{host}:{port}/"

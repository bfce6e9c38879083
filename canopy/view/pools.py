"""Rasters kept open between the requests of a web server."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from queue import Empty, LifoQueue
from typing import Final

from canopy.raster import RasterPool

OPEN_FILES: Final = 64
"""Of each thread that reads at the same time, far below the 1024 that a process may have on most systems."""


class Pools:
    """Pools of open rasters, one for each thread that reads at the same time.

    Why not one for all: GDAL's handles must not be shared between threads. Why not one a thread: a server's threads come and
    go, and opening a raster for every tile costs as much as reading a tile of it.
    """

    def __init__(self) -> None:
        self._idle: LifoQueue[RasterPool] = LifoQueue()

    @contextmanager
    def pool(self) -> Iterator[RasterPool]:
        """A pool for this thread, to be used inside the block only."""
        try:
            pool = self._idle.get_nowait()
        except Empty:
            pool = RasterPool(OPEN_FILES)
        try:
            yield pool
        finally:
            self._idle.put(pool)

    def close(self) -> None:
        """Close all that is open; no pool may be in use."""
        while not self._idle.empty():
            self._idle.get_nowait().close()

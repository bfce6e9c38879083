"""Rasters kept open for tiles: a handle serves one thread at a time and goes back for the next."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from queue import Empty, LifoQueue

from canopy.raster import Raster, open_raster


class Handles:
    """Open handles of one raster.

    Why a pool: GDAL's handles must not be shared between threads, opening one for every tile costs more than reading from
    it, and threads of a web server come and go. There are never more handles than threads that ever read at once.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._idle: LifoQueue[Raster] = LifoQueue()
        self._stack = ExitStack()

    @contextmanager
    def raster(self) -> Iterator[Raster]:
        """A handle for this thread, to be used inside the block only.

        Raises:
            RasterError: as `open_raster`.
        """
        try:
            raster = self._idle.get_nowait()
        except Empty:
            raster = self._stack.enter_context(open_raster(self.path))
        try:
            yield raster
        finally:
            self._idle.put(raster)

    def close(self) -> None:
        """Close all of them; none may be in use."""
        self._stack.close()

"""The server's life: a free port, a browser, and an end with Ctrl-C."""

from __future__ import annotations

from pathlib import Path

from canopy.region.folder import RegionFolder
from canopy.view.app import create_app
from canopy.view.scene import Scene


def serve(out: Path, *, host: str = "127.0.0.1", port: int = 8765) -> None:
    """Serve a map until it is interrupted."""
    import uvicorn

    scene = Scene(RegionFolder.open(out))
    uvicorn.run(create_app(scene), host=host, port=port, log_level="warning")

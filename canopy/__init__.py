"""canopy: metre-resolution canopy height maps that say how wrong they may be.

The names below are the public interface; they are imported when first used, so `import canopy` stays fast and the parts
that need no torch work without it.
"""

from __future__ import annotations

from importlib import import_module
from importlib.metadata import version
from typing import Any

__version__ = version("canopy-height")

_PUBLIC = {
    "CanopyError": "canopy.errors",
    "import_model": "canopy.model.foreign",
    "lidar_to_chm": "canopy.tiler.lidar",
    "load_model": "canopy.model.package",
    "map_region": "canopy.region.run",
    "open_map": "canopy.mosaicker.publish",
}

__all__ = ["CanopyError", "__version__", "import_model", "lidar_to_chm", "load_model", "map_region", "open_map"]


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'canopy' has no attribute {name!r}; public names are {', '.join(sorted(_PUBLIC))}")
    return getattr(import_module(_PUBLIC[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)

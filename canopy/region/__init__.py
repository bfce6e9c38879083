"""Regions of any size: planned as sheets, done by one process or many, gone on with after a stop, published as one map.

The names below are imported when first used: who only reads a finished map (`canopy.region.folder`) needs little of what it
takes to make one, and starts in a quarter of the time.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from canopy.region.plan import MAX_FILE_PX, SHEET_PX, Plan, plan_region
    from canopy.region.run import (
        MapResult,
        Progress,
        RegionStatus,
        forecast_region,
        map_region,
        region_status,
        resume_region,
        stopped_map,
    )

__all__ = [
    "MAX_FILE_PX",
    "SHEET_PX",
    "MapResult",
    "Plan",
    "Progress",
    "RegionStatus",
    "forecast_region",
    "map_region",
    "plan_region",
    "region_status",
    "resume_region",
    "stopped_map",
]

_PLANNED = ("MAX_FILE_PX", "SHEET_PX", "Plan", "plan_region")


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'canopy.region' has no attribute {name!r}; public names are {', '.join(__all__)}")
    return getattr(import_module("canopy.region.plan" if name in _PLANNED else "canopy.region.run"), name)

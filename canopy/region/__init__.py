"""Regions of any size: planned as sheets, done by one process or many, gone on with after a stop, published as one map."""

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

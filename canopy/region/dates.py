"""When the imagery of a map was taken, in its record."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from canopy.region.records import SheetDays
from canopy.tiler.days import as_date

if TYPE_CHECKING:
    from canopy.region.plan import Plan
    from canopy.region.records import SheetRecord


def days_of(plan: Plan, records: Sequence[SheetRecord]) -> SheetDays:
    """Days of the pixels of a map, from the records of all its sheets where its scenes differ in them."""
    total = SheetDays()
    for record in records if plan.is_dated else ():
        assert record.days is not None, f"sheet {record.name} has no days"
        total += record.days
    if plan.is_dated:
        return total
    day = plan.days[0] if plan.days else None
    return SheetDays(first=day, last=day, undated_px=0 if plan.days else sum(record.known_px for record in records))


def days_record(days: SheetDays) -> dict[str, Any]:
    """What a run's record says of them: ISO dates, null where no pixel's day is known, and whether some pixels have none."""
    return {
        "first_day": None if days.first is None else as_date(days.first),
        "last_day": None if days.last is None else as_date(days.last),
        "undated": days.undated_px > 0,
    }

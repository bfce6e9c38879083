"""Days of imagery as text."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import date, timedelta

EPOCH = date(1970, 1, 1)
"""Days are counted from here."""


def as_date(day: int) -> str:
    """ISO text of days since 1970-01-01."""
    return (EPOCH + timedelta(days=day)).isoformat()


def span(days: Sequence[str]) -> str | None:
    """The days as one text: one, or the first and the last; None of none."""
    if not days:
        return None
    first, last = min(days), max(days)
    return first if first == last else f"{first} to {last}"

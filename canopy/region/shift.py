"""Where a map is unlike the calibration data: measured sheet by sheet, said in tags, a table, a layer for QGIS and a line.

    shift.json   the whole map and every sheet: squares measured, share of them beyond the limit, median distance, flagged
    shift.gpkg   the same as polygons of the sheets

A map by a model without a description of its calibration data has neither, and says "not measured".
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Self

import numpy as np
from numpy.typing import NDArray

from canopy.grid import Box, Lattice
from canopy.model.shift import FLAG_SHARE, Shift, ShiftReference, unlikeness
from canopy.model.squares import SQUARE_PX, StripSquares
from canopy.mosaicker.blend import Strip
from canopy.region.layers import write_layer
from canopy.textfile import write_text

if TYPE_CHECKING:
    import geopandas

    from canopy.mosaicker.ensemble import Ensemble
    from canopy.region.plan import Plan
    from canopy.region.records import SheetRecord

JSON: Final = "shift.json"
LAYER: Final = "shift.gpkg"
FILES: Final = (JSON, LAYER)
TAG: Final = "CANOPY_SHIFT"


@dataclass(slots=True, kw_only=True, eq=False)
class ShiftMeter:
    """Measures a sheet as its strips come from the top."""

    squares: StripSquares
    reference: ShiftReference
    _found: list[NDArray[np.float64]] = field(default_factory=list)

    @classmethod
    def of(cls, ensemble: Ensemble, sheet: Box) -> Self | None:
        """A meter for a sheet; None where there is nothing to compare it with."""
        if ensemble.shift is None:
            return None
        contract = ensemble.contract
        return cls(squares=StripSquares(sheet, mean=contract.mean, std=contract.std), reference=ensemble.shift)

    def add(self, strip: Strip, image_brc: NDArray[Any], known_rc: NDArray[np.bool_]) -> None:
        """Take the next strip.

        Args:
            strip: Its heights and spreads.
            image_brc: Its imagery.
            known_rc: Its pixels that have a height in the map.
        """
        squares = self.squares.add(strip.box, image_brc, known_rc, strip.mean_m, strip.spread_m)
        self._found.append(unlikeness(squares.features, self.reference))

    @property
    def shift(self) -> Shift:
        """What was found; the same whatever the strips were."""
        return Shift.of(np.concatenate([np.zeros(0), *self._found]))


# --- what is said of it --------------------------------------------------------------------------------------------------


def sheet_tags(plan: Plan, shift: Shift | None) -> dict[str, str]:
    """Tags of files: those of the plan, and how unlike the calibration data what they show is; None: not measured."""
    return plan.tags if shift is None else plan.tags | {TAG: f"{_verdict(shift)}; {plan.tags[TAG]}"}


def map_tags(plan: Plan, records: Sequence[SheetRecord]) -> dict[str, str]:
    """Tags of the files of the whole map: the same however it was cut into sheets, since squares are not cut by them."""
    return sheet_tags(plan, _total(records))


def _verdict(shift: Shift) -> str:
    if shift.share is None:
        return "no square measured"
    said = "unlike the calibration data" if shift.flagged else "like the calibration data"
    return f"{said}: {shift.share:.1%} of {shift.squares} squares beyond the limit"


def _total(records: Sequence[SheetRecord]) -> Shift | None:
    """All sheets together, whose median is not known; None where nothing was measured."""
    shifts = [record.shift for record in records if record.shift is not None]
    if not shifts:
        return None
    return Shift(squares=sum(shift.squares for shift in shifts), beyond=sum(shift.beyond for shift in shifts))


def _row(shift: Shift) -> dict[str, Any]:
    return {**shift.model_dump(), "share": None if shift.share is None else round(shift.share, 4), "flagged": shift.flagged}


def shift_record(plan: Plan, records: Sequence[SheetRecord]) -> dict[str, Any]:
    """What a run's record says of a map with the records of all its sheets."""
    total = _total(records)
    told: dict[str, Any] = {"reference": plan.tags[TAG], "measured": total is not None}
    if total is None:
        return told
    shown = [(record.shift, record.name) for record in records if record.shift is not None and record.shift.squares]
    # Of several as far beyond, the first: the record does not depend on who did what.
    worst = max(shown, key=lambda each: (each[0].share, each[0].median), default=None)
    flagged = sum(bool(shift.flagged) for shift, _ in shown)
    return {
        **told, **_row(total), "sheets": len(records), "sheets_measured": len(shown), "sheets_flagged": flagged,
        "worst": None if worst is None else worst[1],
    }  # fmt: skip


def shift_line(told: dict[str, Any]) -> str | None:
    """What a user should know of `shift_record`, in one line; None where nothing is out of the ordinary."""
    if not told["measured"]:
        return f"shift {told['reference']}"
    if not told["sheets_measured"]:
        return f"shift not measured: no square of {SQUARE_PX} px is half known"
    flagged, sheets = told["sheets_flagged"], told["sheets"]
    if not flagged:
        return None
    where = f" ({told['worst']} worst)" if sheets > 1 else ""
    which = "the map looks" if sheets == 1 else f"{flagged} of {sheets} sheets {'look' if flagged > 1 else 'looks'}"
    return f"{which} unlike the calibration data{where}: the 90 % interval is not promised there; see {LAYER}"


# --- files ---------------------------------------------------------------------------------------------------------------


def write_shift(out: Path, plan: Plan, records: Sequence[SheetRecord]) -> None:
    """Write both files into a folder; nothing where nothing was measured.

    Raises:
        OutputError: one cannot be written.
    """
    total = _total(records)
    if total is None:
        return
    sheets = [{"sheet": record.name, **_row(record.shift)} for record in records if record.shift is not None]
    told = {
        "reference": plan.tags[TAG], "square_px": SQUARE_PX, "flagged_from_share": FLAG_SHARE, "map": _row(total),
        "sheets": sheets,
    }  # fmt: skip
    write_text(out / JSON, json.dumps(told, indent=1) + "\n")
    outlines = [Box(*record.box) for record in records if record.shift is not None]
    write_layer(out / LAYER, _frame(plan.lattice, outlines, sheets), "shift")


def _frame(lattice: Lattice, boxes: Sequence[Box], rows: Sequence[dict[str, Any]]) -> geopandas.GeoDataFrame:
    import geopandas
    import pandas as pd
    import shapely

    frame = pd.DataFrame(rows).astype({"share": "float64", "median": "float64", "flagged": "boolean"})
    return geopandas.GeoDataFrame(frame, geometry=[shapely.box(*lattice.grid(box).bounds) for box in boxes], crs=lattice.crs)

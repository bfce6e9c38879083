"""What lies beside the rasters of a map so that others can open and understand it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final

from canopy.region import styles
from canopy.region.folder import RUN
from canopy.region.item import COLLECTION, ITEM, write_item
from canopy.region.layers import AREA, write_area
from canopy.region.pictures import FOLDER, write_pictures
from canopy.region.project import PROJECT, write_project
from canopy.region.readme import README, summary_of, title_of, write_readme
from canopy.textfile import write_text

if TYPE_CHECKING:
    from canopy.mosaicker.quantum import Statistics
    from canopy.region.records import SheetDays, SheetRecord, Work

NAMES: Final = (*styles.NAMES, AREA, FOLDER, PROJECT, ITEM, COLLECTION, README)
"""All that it may be, in the map's folder; the items of sheets lie beside them."""


def describe_map(
    work: Work,
    record: Mapping[str, Any],
    records: Sequence[SheetRecord],
    *,
    statistics: tuple[Statistics, Statistics] | None,
    days: SheetDays,
) -> None:
    """Write styles, project, area, catalogue entry and README into `work.result`, which holds the rasters.

    The same map gives the same bytes: nothing is taken from the record that differs from run to run.

    Args:
        work: The finished work.
        record: What `run.json` will say.
        records: Of all sheets.
        statistics: Of the bands of heights and errors of a map in one file.
        days: When its imagery was taken.

    Raises:
        OutputError: a file cannot be written.
    """
    plan, out = work.plan, work.result
    title, abstract = title_of(record), summary_of(record)
    legend = plan.days if plan.is_dated else ()
    write_text(out / "height.qml", styles.qml(styles.height_pipe()))
    write_text(out / "error.qml", styles.qml(styles.error_pipe(calibrated=plan.calibration is not None)))
    if legend:
        write_text(out / "date.qml", styles.qml(styles.date_pipe([styles.day_of(day) for day in legend])))
    write_area(out, plan)
    pictures = write_pictures(out, plan, work.out)
    write_project(out, plan, pictures, shift=record["shift"], dates=legend, title=title, abstract=abstract)
    files = [*(path.name for path in out.iterdir()), README, RUN]
    write_item(out, plan, record, records, statistics=statistics, days=days, files=files)
    write_readme(out, plan, record, [*(path.name for path in out.iterdir()), README, RUN])

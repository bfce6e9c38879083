"""`README.txt`: what a map's folder holds and what its numbers mean, in plain words for whoever is handed it."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from canopy.model.shift import FLAG_SHARE
from canopy.region.folder import span_of
from canopy.region.layers import AREA
from canopy.region.plan import MAX_FILE_PX, SHEET_PX
from canopy.region.shift import shift_line
from canopy.symbology import ERROR_CLASSES, HEIGHT_CLASSES
from canopy.textfile import write_text

if TYPE_CHECKING:
    from jinja2 import Template

    from canopy.model.calibration import CalibrationTable, MeasuredCoverage
    from canopy.region.plan import Plan

README: Final = "README.txt"


def title_of(record: Mapping[str, Any]) -> str:
    """What a map is called: its model and the days of its imagery.

    Args:
        record: What `run.json` says.
    """
    models = " and ".join(f"{model['name']} {model['version']}" for model in record["models"])
    days = span_of(record)
    return f"Canopy height by {models}" + (f", imagery of {days}" if days else "")


def summary_of(record: Mapping[str, Any]) -> str:
    """What one should know of a map before using it, in a few lines."""
    lines = [
        f"Canopy height in metres above ground, one value every {record['map']['gsd_m']:g} m, and its error.",
        f"Imagery: {Path(record['imagery']['source']).name}, {span_of(record) or 'of unknown date'}.",
        f"Error: {record['calibration']}.",
    ]
    shift = shift_line(dict(record["shift"]))
    return "\n".join([*lines, *([f"Note: {shift}."] if shift else []), "README.txt says more."])


def write_readme(out: Path, plan: Plan, record: Mapping[str, Any], files: Sequence[str]) -> None:
    """Write `README.txt` into a folder.

    Args:
        out: The folder.
        plan: The map's.
        record: What `run.json` says; nothing of it that differs from run to run is used.
        files: Names of what lies in the folder.

    Raises:
        OutputError: the file cannot be written.
    """
    tables = None if plan.calibration is None else plan.calibration.pixels
    text = _template().render(
        title=title_of(record), plan=plan, run=record, has=set(files), days=span_of(record), tables=tables,
        coverage=[] if tables is None else [*_coverage(tables)], shift=shift_line(dict(record["shift"])),
        flag_percent=round(100 * FLAG_SHARE), heights=HEIGHT_CLASSES, errors=ERROR_CLASSES, command=_command(plan, record),
        area_file=AREA,
    )  # fmt: skip
    write_text(out / README, text)


def _coverage(table: CalibrationTable) -> Iterator[tuple[MeasuredCoverage, list[tuple[str, float, int]]]]:
    """How coverage was measured, and (class, share held, pixels) of each class in which there was something to measure."""
    ends = [*(f"{low:g}-{high:g} m" for low, high in pairwise(table.edges_m)), f"over {table.edges_m[-1]:g} m"]
    for measured in table.measured:
        rows = zip(ends, measured.by_class, measured.pixels, strict=True)
        yield measured, [(name, share, pixels) for name, share, pixels in rows if pixels]


def _command(plan: Plan, record: Mapping[str, Any]) -> str:
    """The command line that makes the same map again."""
    words = ["canopy", "map"]
    if plan.area is not None:
        words.append(AREA)
    words += ["--imagery", str(record["imagery"]["source"])]
    for model in plan.models:
        words += ["--model", model.folder]
    words += ["--gsd", f"{plan.gsd_m:g}", "--crs", plan.crs]
    if plan.bands is not None:
        words += ["--bands", ",".join(map(str, plan.bands))]
    if plan.tta != "none":
        words += ["--tta", plan.tta]
    if plan.calibration is not None and (len(plan.models) > 1 or plan.tta != "none"):  # a model has none of these itself
        words += ["--calibration", "TABLES.json"]
    # Of sheets that become one file only the measure of shift is left, where there is one.
    told_apart = not plan.one_file or (len(plan.sheets) > 1 and record["shift"]["measured"])
    if plan.sheet_px != SHEET_PX and told_apart:
        words += ["--sheet-size", str(plan.sheet_px)]
    longest = max(plan.extent.shape)
    if plan.one_file != (longest <= MAX_FILE_PX):
        words += ["--max-file-size", str(longest if plan.one_file else longest - 1)]
    if plan.device != "cpu" or plan.precision != "float32":
        words += ["--device", plan.device, "--precision", plan.precision]
    return " ".join(shlex.quote(word) for word in [*words, "--out", "again"])


@cache
def _template() -> Template:
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(  # noqa: S701 - plain text, where an ampersand is an ampersand
        loader=PackageLoader("canopy.region", ""), undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True,
        keep_trailing_newline=True,
    )  # fmt: skip
    environment.filters["percent"] = lambda share: f"{100 * share:.1f} %"
    return environment.get_template("README.txt.j2")

"""The command line: arguments to calls, results to lines or JSON. No logic; heavy modules load inside the commands."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer
from typer.core import TyperCommand, TyperGroup

from canopy.errors import CanopyError


class _Commands(TyperGroup):
    """What a user can cause becomes one line and an exit code: 1 bad input, 130 interrupted. A bug keeps its traceback."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except CanopyError as error:
            typer.echo(f"canopy: {error}", err=True)
            raise typer.Exit(1) from None
        except KeyboardInterrupt:
            typer.echo("canopy: interrupted; no unfinished file has its final name", err=True)
            raise typer.Exit(130) from None


class _BuildByDefault(TyperGroup):
    """`canopy tile RECIPE` is `canopy tile build RECIPE`."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if args and args[0] not in self.commands and args[0] != "--help":
            args = ["build", *args]
        return list(super().parse_args(ctx, args))


class _RunByDefault(TyperGroup):
    """`canopy map AREA …` is the command `map` itself; `canopy map resume OUT` is one beside it."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if args and args[0] not in self.commands:
            args = [_MAP_ITSELF, *args]
        return list(super().parse_args(ctx, args))


class _MapItself(TyperCommand):
    """Called by no name of its own, in its help either."""

    def make_context(self, info_name: str | None, args: list[str], parent: Any = None, **extra: Any) -> Any:
        return super().make_context("" if info_name == _MAP_ITSELF else info_name, args, parent, **extra)


_MAP_ITSELF = "area"

app = typer.Typer(
    cls=_Commands, no_args_is_help=True, pretty_exceptions_enable=False, add_completion=False, rich_markup_mode="rich",
    help="From an area of interest to a metre-resolution canopy height map that says how wrong it may be.",
)  # fmt: skip
tile_app = typer.Typer(cls=_BuildByDefault, no_args_is_help=True, help="Build a tile set from a recipe, or look at one.")
map_app = typer.Typer(
    cls=_RunByDefault, no_args_is_help=True, help="Map canopy height over an area; go on with a map; say how one stands."
)
models_app = typer.Typer(no_args_is_help=True, help="The models at hand.")
bench_app = typer.Typer(no_args_is_help=True, help="Sealed benchmarks: make one, prepare a submission, score it.")
app.add_typer(tile_app, name="tile")
app.add_typer(map_app, name="map")
app.add_typer(models_app, name="models")
app.add_typer(bench_app, name="bench")

Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON on standard output.")]
Bbox = Annotated[tuple[float, float, float, float] | None, typer.Option(help="Area as west south east north, in degrees.")]
Place = Annotated[str | None, typer.Option(help="Area as the name of a place, which a geocoder is asked for.")]
Scheduler = Annotated[str | None, typer.Option(help="Address of a running dask scheduler, for example tcp://host:8786.")]
Cluster = Annotated[Path | None, typer.Option(help="Cluster to start (TOML): SLURM, PBS and others, or Kubernetes.")]
Workers = Annotated[int | None, typer.Option(help="Processes on this machine; default: one a GPU, else this one.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace what an earlier run left there.")]


def main() -> NoReturn:
    """Entry point; a polite kill (SIGTERM) cleans up as Ctrl-C does."""
    signal.signal(signal.SIGTERM, _interrupt)
    app()
    sys.exit(0)


def _interrupt(_signal: int, _frame: Any) -> NoReturn:
    raise KeyboardInterrupt


# --- commands ------------------------------------------------------------------------------------------------------------


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Folder for everything the demo makes.")] = Path("demo"),
    model: Annotated[str, typer.Option(help="Model folder or name.")] = "canopy-sample",
    *,
    as_json: Json = False,
) -> None:
    """Run the whole pipeline on a simulated forest whose heights are known, then say what to open.

    Example: canopy demo --out demo
    """
    from canopy.demo import demo as run_demo

    samples = os.environ.get("CANOPY_SAMPLES")
    with _progress() as progress:
        result = run_demo(out, model=model, samples=Path(samples) if samples else None, say=_say, progress=progress)
    if as_json:
        _print_json({
            "map": result.height.summary(), "coverage_90": result.coverage.coverage, "lidar_chm": result.label.summary(),
            "seconds": result.seconds, "open": [str(p) for p in result.to_open],
        })  # fmt: skip
        return
    typer.echo(f"LiDAR heights against the known ones: MAE {result.label.mae_m:.2f} m, bias {result.label.bias_m:+.2f} m")
    typer.echo(
        f"the map against the known heights:     MAE {result.height.mae_m:.2f} m, RMSE {result.height.rmse_m:.2f} m, "
        f"bias {result.height.bias_m:+.2f} m, R² {result.height.r2:.2f}"
    )
    typer.echo(f"its 90 % interval holds the known height in {result.coverage.coverage:.1%} of the pixels")
    typer.echo(f"done in {result.seconds:.0f} s; open")
    for path in result.to_open:
        typer.echo(f"  {path}")


@tile_app.command("build")
def tile_build(
    recipe: Annotated[Path, typer.Argument(help="Recipe (TOML), for example tiles/autzen.toml.")],
    out: Annotated[Path | None, typer.Option(help="Folder to make; default: the recipe's name beside it.")] = None,
    *,
    area: Annotated[
        Path | None, typer.Option(help="Area in place of the recipe's (GeoJSON, GeoPackage, GeoParquet).")
    ] = None,
    bbox: Bbox = None,
    place: Place = None,
    workers: Annotated[
        int | None, typer.Option(help="Processes; default: as many as the work is worth, at most one a core.")
    ] = None,
    scheduler: Annotated[str | None, typer.Option(help="Address of a dask scheduler, for example tcp://host:8786.")] = None,
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """Cut imagery and canopy heights into training chips with an index and a split.

    A build that was stopped goes on where it was. Example: canopy tile tiles/autzen.toml
    """
    from canopy.tiler.chips import build_tile_set, read_index

    with _stages() as progress:
        folder = build_tile_set(
            recipe, out, area=_area(area, bbox, place), overwrite=overwrite, scheduler=scheduler, workers=workers,
            progress=progress,
        )  # fmt: skip
    index = read_index(folder)
    splits = index["split"].value_counts().to_dict()
    if refused_px := int(index["refused_px"].fillna(0).sum()):
        _say(f"{refused_px} pixels of the height rasters hold no possible height and are unknown; see the column refused_px")
    if as_json:
        _print_json({"tile_set": str(folder), "chips": sum(splits.values()), "splits": splits})
        return
    typer.echo(f"{folder}: {sum(splits.values())} chips ({', '.join(f'{n} {name}' for name, n in sorted(splits.items()))})")


@tile_app.command("inspect")
def tile_inspect(
    tile_set: Annotated[Path, typer.Argument(help="Tile set folder.")],
    out: Annotated[
        Path | None, typer.Option(help="Folder for the page and its PNGs; default: inspection in the tile set.")
    ] = None,
    judge: Annotated[
        bool, typer.Option("--judge", help="Run the quality checks on every chip now, with their standard limits.")
    ] = False,
    *,
    as_json: Json = False,
) -> None:
    """Show what a tile set holds: counts, heights, shifts, maps, the best and the worst chips, as one HTML page and PNGs.

    Example: canopy tile inspect tiles/autzen
    """
    from canopy.tiler.inspection import inspect_tile_set
    from canopy.tiler.quality import QualitySettings

    with _progress("chips") as progress:
        report = inspect_tile_set(tile_set, out, settings=QualitySettings() if judge else None, progress=progress)
    if as_json:
        _print_json({
            "tile_set": str(tile_set), "page": str(report.page), "pngs": [str(p) for p in report.pngs],
            "chips": report.chips, "splits": report.by_site_split, "quality": report.by_quality,
            "findings": report.by_check, "notes": report.notes,
        })  # fmt: skip
        return
    for site, splits in report.by_site_split.items():
        typer.echo(f"{site}: {', '.join(f'{n} {split}' for split, n in splits.items())}")
    if report.by_quality:
        typer.echo(", ".join(f"{n} {level}" for level, n in report.by_quality.items()))
    for check, n in report.by_check.items():
        typer.echo(f"{check}: {n}")
    for note in report.notes:
        typer.echo(note)
    typer.echo(f"{report.page}")


@app.command()
def audit(
    tile_set: Annotated[
        Path, typer.Argument(metavar="SET|TRAIN", help="Tile set, or GeoParquet file of the chips that train.")
    ],
    test: Annotated[
        Path | None,
        typer.Argument(metavar="[TEST]", help="GeoParquet file of the chips that test; none: the set's own splits."),
    ] = None,
    buffer: Annotated[
        float | None, typer.Option(help="Metres that must lie between splits; default: the recipe's buffer, else 0.")
    ] = None,
    *,
    by_site: Annotated[
        bool, typer.Option("--by-site", help="The split claims whole sites: shared acquisitions are leaks.")
    ] = False,
    out: Annotated[Path | None, typer.Option(help="Report to write: .json with all values, else text.")] = None,
    as_json: Json = False,
) -> None:
    """Look for leaks between the splits of a tile set, or between two tables; exit code 3 when there is one.

    Example: canopy audit tiles/autzen
    """
    from canopy.tiler.audit import audit as audit_set
    from canopy.tiler.audit import audit_pair, write_report

    if test is None:
        report = audit_set(tile_set, buffer_m=buffer, by_site=by_site or None)
    else:
        report = audit_pair(tile_set, test, buffer_m=0.0 if buffer is None else buffer, by_site=by_site)
    if out is not None:
        write_report(report, out)
    if as_json:
        _print_json(report.as_json())
    else:
        typer.echo(report.as_text())
    if not report.clean:
        raise typer.Exit(3)


@app.command()
def train(
    recipe: Annotated[Path, typer.Argument(help="Recipe (TOML), for example models/recipes/sample.toml.")],
    out: Annotated[Path | None, typer.Option(help="Model folder to write; default: the recipe's name in models/.")] = None,
    resume: Annotated[Path | None, typer.Option(help="Run folder of a stopped run of the same recipe.")] = None,
    hold_out: Annotated[list[str] | None, typer.Option(help="A site to keep out of training; may be repeated.")] = None,
    *,
    resume_if_any: Annotated[
        bool, typer.Option("--resume-if-any", help="Go on with the run that is there, or begin it: for job scripts.")
    ] = False,
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """Train a model from tile sets, score it on held-out ground, calibrate it, and write its folder.

    Example: canopy train models/recipes/sample.toml
    """
    from canopy.model.processes import rank
    from canopy.model.train import train as run_training

    folder = run_training(
        recipe, out=out, resume=resume, resume_if_any=resume_if_any, hold_out=hold_out or (), overwrite=overwrite
    )
    if rank() != 0:
        return  # one process writes the model and says so
    if as_json:
        _print_json({"model": str(folder)})
        return
    typer.echo(f"{folder}: read card.md for its scores")


@app.command()
def calibrate(
    model: Annotated[list[str], typer.Argument(help="Model folder or name; of several the heights are averaged.")],
    *,
    tiles: Annotated[list[Path], typer.Option(help="Tile set on ground that no model was trained on; may be repeated.")],
    split: Annotated[
        list[str] | None,
        typer.Option(help="Split whose chips calibrate, may be repeated; default: all, of the model's own sets val only."),
    ] = None,
    tta: Annotated[
        str, typer.Option(help="Test-time augmentation that maps will be made with: none, flips or d4.")
    ] = "none",
    out: Annotated[
        Path | None,
        typer.Option(help="File for the tables (JSON), for canopy map --calibration; default: the model folder."),
    ] = None,
    device: Annotated[str, typer.Option(help="Where the model runs: cpu, cuda, cuda:1, ...")] = "cpu",
    allow_leak: Annotated[bool, typer.Option("--allow-leak", help="Calibrate on training ground as well.")] = False,
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """Fit what turns a model's spread into 90 % intervals, on ground with known heights.

    Example: canopy calibrate models/my-model --tiles tiles/other-sites
    """
    from canopy.mosaicker.calibrate import calibrate_models, keep_tables

    with _progress() as progress:
        result = calibrate_models(
            model, tiles, splits=split, tta=tta, device=device, allow_leak=allow_leak, progress=progress
        )
    kept = keep_tables(result, model, out=out, overwrite=overwrite)
    if as_json:
        _print_json({"kept": str(kept), **result.as_json()})
        return
    for line in result.lines():
        typer.echo(line)
    typer.echo(f"{kept}")


@app.command()
def search(
    source: Annotated[str, typer.Argument(help="Source by name (naip, sentinel-2-l2a, 3dep) or path of its TOML.")],
    aoi: Annotated[Path | None, typer.Argument(help="Area of interest (GeoJSON, GeoPackage, GeoParquet).")] = None,
    *,
    out: Annotated[Path, typer.Option(help="Manifest to write (JSON).")],
    bbox: Bbox = None,
    place: Place = None,
    start: Annotated[str | None, typer.Option(help="First day, for example 2021-06-01.")] = None,
    end: Annotated[str | None, typer.Option(help="Last day.")] = None,
    prefer: Annotated[
        str, typer.Option(help="Which of several images gives a pixel: newest, least-cloud, or closest to --date.")
    ] = "newest",
    date: Annotated[str | None, typer.Option(help="The day that closest means.")] = None,
    max_cloud: Annotated[float | None, typer.Option(help="Most cloud cover of an image, in percent.")] = None,
    survey: Annotated[str | None, typer.Option(help="The one LiDAR survey to use.")] = None,
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """Find imagery or LiDAR of an area in a catalogue, and freeze what was found into a manifest.

    Example: canopy search naip area.geojson --start 2021-01-01 --out naip.json
    """
    import pandas as pd

    from canopy.tiler.find import find

    result = find(
        source, _area(aoi, bbox, place), out=out, start=start, end=end, prefer=prefer, date=date,
        max_cloud_percent=max_cloud, survey=survey, overwrite=overwrite,
    )  # fmt: skip
    if as_json:
        _print_json({"manifest": str(out), "found": [dict(zip(result.columns, row, strict=True)) for row in result.rows]})
        return
    typer.echo(pd.DataFrame(result.rows, columns=list(result.columns)).to_string(index=False, na_rep="-"))
    for line in result.remarks:
        typer.echo(line)
    typer.echo(f"{out}")


@map_app.command(
    _MAP_ITSELF, cls=_MapItself, hidden=True,
    epilog="A map that was stopped: canopy map resume OUT goes on with it, canopy map status OUT says how it stands.",
)  # fmt: skip
def map_(
    aoi: Annotated[
        Path | None, typer.Argument(help="Area of interest (GeoJSON, GeoPackage, GeoParquet); none: the whole image.")
    ] = None,
    *,
    imagery: Annotated[
        list[Path],
        typer.Option(
            help="Image file with a CRS, a folder of such, or a quoted pattern, may be repeated; "
            "or a manifest made by canopy search."
        ),
    ],
    out: Annotated[Path, typer.Option(help="Folder for height.tif, error.tif, a QGIS project and what explains them.")],
    model: Annotated[
        list[str] | None,
        typer.Option(help="Model folder or name, default canopy-sample; may be repeated: their heights are averaged."),
    ] = None,
    bbox: Bbox = None,
    place: Place = None,
    cache: Annotated[
        Path | None,
        typer.Option(help="Folder to keep what is fetched for a manifest, for later runs."),
    ] = None,
    gsd: Annotated[float | None, typer.Option(help="Pixel size of the map in metres; default: the image's own.")] = None,
    crs: Annotated[
        str | None, typer.Option(help="Metric CRS of the map; default: the image's own, or its UTM zone.")
    ] = None,
    bands: Annotated[
        str | None, typer.Option(help="Image bands in the model's order, for example 1,2,3 or red,green,blue.")
    ] = None,
    tta: Annotated[
        str, typer.Option(help="Show each window as it is (none), mirrored too (flips, 4 times the work) or in all (d4, 8).")
    ] = "none",
    calibration: Annotated[
        Path | None, typer.Option(help="Tables of these models and --tta, made by canopy calibrate --out.")
    ] = None,
    sheet_size: Annotated[int | None, typer.Option(help="Side of the working sheets in pixels; changes no pixel.")] = None,
    max_file_size: Annotated[
        int | None, typer.Option(help="Longest side of a map in one file, in pixels; a larger one is a file a sheet.")
    ] = None,
    device: Annotated[str, typer.Option(help="Where the model runs: cpu, cuda, cuda:1, ...")] = "cpu",
    precision: Annotated[
        str, typer.Option(help="What the network computes in: float32; on a GPU also float16 and bfloat16.")
    ] = "float32",
    compile_first: Annotated[
        bool, typer.Option("--compile", help="Compile the network first: minutes once, then less per window.")
    ] = False,
    batch: Annotated[
        int | None, typer.Option(help="Windows in one forward pass on a GPU; default: what a short search finds.")
    ] = None,
    scheduler: Scheduler = None,
    cluster: Cluster = None,
    workers: Workers = None,
    plan: Annotated[
        bool, typer.Option("--plan", help="Say what it would take in time, memory and disk, and do nothing.")
    ] = False,
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """Map canopy height and its error over an area.

    Example: canopy map area.geojson --imagery photo.tif --model models/canopy-sample --out map
    """
    from canopy.region import MAX_FILE_PX, SHEET_PX, forecast_region, map_region
    from canopy.tiler.find import imagery_source

    area, source = _area(aoi, bbox, place), imagery_source(imagery, cache)
    settings: dict[str, Any] = {
        "imagery": source, "model": model or "canopy-sample", "gsd_m": gsd, "crs": crs, "bands": _band_list(bands),
        "tta": tta, "calibration": calibration, "sheet_px": SHEET_PX if sheet_size is None else sheet_size,
        "max_file_px": MAX_FILE_PX if max_file_size is None else max_file_size, "device": device, "precision": precision,
        "compile": compile_first, "batch": batch, "cluster": cluster, "workers": workers,
    }  # fmt: skip
    if plan:
        if scheduler is not None:
            raise CanopyError("--plan measures on this machine, not on workers of a --scheduler; run it on one of those")
        planned, forecast = forecast_region(area, **settings)
        if as_json:
            _print_json(
                {"sheets": len(planned.sheets), "one_file": planned.one_file, "crs": planned.crs, **forecast.record()}
            )
            return
        files = "one file" if planned.one_file else "a file a sheet"
        typer.echo(f"{len(planned.sheets)} sheets, {files}, in {planned.crs}, {planned.crs_chosen}")
        typer.echo(str(forecast))
        return
    with _kept(out), _progress() as progress:
        result = map_region(area, out=out, scheduler=scheduler, overwrite=overwrite, progress=progress, **settings)
    _show_map(result, as_json=as_json)


@map_app.command("resume")
def map_resume(
    out: Annotated[Path, typer.Argument(help="Folder of a map that was stopped.")],
    *,
    scheduler: Scheduler = None,
    cluster: Cluster = None,
    workers: Workers = None,
    as_json: Json = False,
) -> None:
    """Go on with a map that was stopped, however hard; it ends as if it had not been.

    Example: canopy map resume map
    """
    from canopy.region import resume_region

    with _kept(out), _progress() as progress:
        result = resume_region(out, scheduler=scheduler, cluster=cluster, workers=workers, progress=progress)
    _show_map(result, as_json=as_json)


@map_app.command("status")
def map_status(out: Annotated[Path, typer.Argument(help="Folder of a map.")], *, as_json: Json = False) -> None:
    """Say how a map stands: finished, running, or stopped, and which sheets failed.

    Example: canopy map status map
    """
    from canopy.region import region_status

    status = region_status(out)
    if as_json:
        _print_json(status.as_json())
        return
    typer.echo(f"{out}: {status.state}, {status.done} of {status.sheets} sheets")
    for failed in status.failed:
        typer.echo(f"sheet {failed.name} failed: {failed.message}")
    if status.changed is not None:
        typer.echo(status.changed)
    elif status.state == "unfinished":
        typer.echo(f"canopy map resume {out} goes on with it")


@contextmanager
def _kept(out: Path) -> Iterator[None]:
    """Says, when a map is interrupted, what of it is kept."""
    try:
        yield
    except KeyboardInterrupt:
        from canopy.region import stopped_map

        if (kept := stopped_map(out)) is not None:
            _say(kept)
        raise


def _show_map(result: Any, *, as_json: bool) -> None:
    from canopy.region.shift import shift_line

    run = json.loads(result.run.read_text())
    if as_json:
        _print_json({"height": str(result.height), "error": str(result.error), "project": str(result.project), "run": run})
        return
    told = run["imagery"]
    if told["alpha"] != "none":
        typer.echo(f"band tagged alpha used as {told['alpha']}: {told['alpha_reason']}")
    if told["left_out"]:
        typer.echo(f"files of the folder that are no imagery by their ending: {', '.join(told['left_out'])}")
    if "reaches" in run["map"]["crs_chosen"]:
        typer.echo(f"the map is in {run['map']['crs']}, {run['map']['crs_chosen']}; another with --crs")
    took = run["time"]
    stages = ", ".join(f"{name} {seconds:.1f} s" for name, seconds in took["stages_s"].items())
    typer.echo(f"{result.height}\n{result.error}\n{result.run}\n{result.project}")
    typer.echo(f"{took['wall_s']:.1f} s ({stages}); {took['km2_per_h']:.1f} km²/h, bound by {took['bound_by']}")
    if abstained := run["map"]["abstained_px"]:
        typer.echo(
            f"{abstained} of {abstained + run['map']['known_px']} pixels: the model abstained, their height is unknown"
        )
    if (line := shift_line(run["shift"])) is not None:
        typer.echo(line)


@app.command()
def score(
    tested: Annotated[
        str, typer.Argument(metavar="MAP", help="Output folder of canopy map, or a height raster of any product.")
    ],
    *,
    reference: Annotated[
        list[Path] | None, typer.Option(help="Lidar canopy heights: raster, folder or quoted pattern; may be repeated.")
    ] = None,
    gedi: Annotated[list[Path] | None, typer.Option(help="GEDI L2A granule (HDF5) or folder; may be repeated.")] = None,
    atl08: Annotated[list[Path] | None, typer.Option(help="ICESat-2 ATL08 granule or folder; may be repeated.")] = None,
    plots: Annotated[Path | None, typer.Option(help="Field plots: points with heights, read as --settings says.")] = None,
    settings: Annotated[
        Path | None, typer.Option(help="Which shots count and how plots are read: TOML with tables gedi, atl08, plots.")
    ] = None,
    against: Annotated[
        list[str] | None,
        typer.Option(
            help="Another map on the same pixels, may be repeated; its name, unit, band, date and statistic after commas: "
            "eth.tif,name=ETH,unit=1,date=2020."
        ),
    ] = None,
    land_cover: Annotated[Path | None, typer.Option(help="Raster of classes to score apart.")] = None,
    land_cover_names: Annotated[Path | None, typer.Option(help="Their names: TOML, 10 = 'tree cover'.")] = None,
    polygons: Annotated[Path | None, typer.Option(help="Polygons to score apart (GeoJSON, GeoPackage, GeoParquet).")] = None,
    polygon_name: Annotated[str | None, typer.Option(help="Their column of names; default: name.")] = None,
    gsd: Annotated[
        float | None, typer.Option(help="Side of the cells to compare on, metres; default: the coarsest pixels'.")
    ] = None,
    statistic: Annotated[
        str, typer.Option(help="What of finer pixels is the height of a coarser cell: mean, max or p98.")
    ] = "mean",
    reference_crs: Annotated[str | None, typer.Option(help="CRS of --reference where the files name none.")] = None,
    reference_unit: Annotated[float | None, typer.Option(help="Metres per unit of --reference, 0.3048 for feet.")] = None,
    reference_date: Annotated[
        str | None, typer.Option(help="Day or year of --reference where the files do not say.")
    ] = None,
    allow_leak: Annotated[
        bool, typer.Option("--allow-leak", help="Score ground that trained the model, and mark the result.")
    ] = False,
    out: Annotated[Path, typer.Option(help="Folder for score.json and report.html.")],
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """Score a height map against lidar, GEDI, ICESat-2 and field plots; error is map minus reference.

    Example: canopy score map --reference chm.tif --out score
    """
    import shlex

    from canopy.score import GivenMap, GivenReference, References, ShotSettings, Strata, score_map
    from canopy.score.table import lines
    from canopy.settings import read_settings

    shots = ShotSettings() if settings is None else read_settings(settings, ShotSettings, what="the settings of a score")
    als = None
    if reference:
        als = GivenReference(paths=reference, crs=reference_crs, unit_m=reference_unit, date=reference_date)
    with _progress("tiles") as progress:
        result = score_map(
            GivenMap.parse(tested),
            References(als=als, gedi=tuple(gedi or ()), atl08=tuple(atl08 or ()), plots=plots, settings=shots),
            against=[GivenMap.parse(text) for text in against or ()],
            strata=Strata(
                land_cover=land_cover, land_cover_names=land_cover_names, polygons=polygons, polygon_name=polygon_name
            ),
            gsd_m=gsd, statistic=statistic, allow_leak=allow_leak, out=out, overwrite=overwrite,
            command=shlex.join(["canopy", *sys.argv[1:]]), progress=progress,
        )  # fmt: skip
    if as_json:
        _print_json(result.model_dump(mode="json"))
        return
    for line in lines(result):
        typer.echo(line)
    typer.echo(f"{out / 'report.html'}")


@app.command()
def zonal(
    out_map: Annotated[Path, typer.Argument(metavar="MAP", help="Output folder of canopy map.")],
    polygons: Annotated[Path, typer.Argument(help="Polygons: GeoPackage, GeoJSON, Shapefile or GeoParquet, in any CRS.")],
    *,
    out: Annotated[Path, typer.Option(help="Table to write: .gpkg, .parquet, .geojson or .csv (without geometries).")],
    layer: Annotated[str | None, typer.Option(help="Layer of POLYGONS, where it has several.")] = None,
    gap_below: Annotated[float, typer.Option(help="Ground under canopy lower than this many metres may be a gap.")] = 2.0,
    least_gap: Annotated[float, typer.Option(help="Least area of a gap, square metres.")] = 10.0,
    prefix: Annotated[str, typer.Option(help="Put before the names of the new columns.")] = "",
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """Statistics of a map over polygons, each with its error; pixels on an edge count with the area that lies inside.

    The polygons keep their columns and get: area_m2, known_fraction (where the map has a height; the rest is about that
    ground), mean_m, p50_m, p95_m, max_m, cover_2m and cover_5m (share of ground with canopy above 2 and 5 m), gap_fraction.
    Each but max_m has a lower and an upper end, such as mean_lower_90_m and cover_2m_upper_90, empty where it is not known.
    Names that end in _m are metres, in _m2 square metres, the others shares from 0 to 1.

    Example: canopy zonal demo/map stands.gpkg --out stands-heights.gpkg
    """
    from canopy.analyse.zonal import write_zonal

    with _progress("polygons") as progress:
        summary = write_zonal(
            out_map, polygons, out, layer=layer, gap_below_m=gap_below, least_gap_m2=least_gap, prefix=prefix,
            overwrite=overwrite, progress=progress,
        )  # fmt: skip
    if as_json:
        _print_json(summary.as_json())
        return
    for line in summary.lines():
        typer.echo(line)


@app.command()
def change(
    before: Annotated[
        str, typer.Argument(help="Earlier map: output folder of canopy map, or a raster of heights such as a lidar CHM.")
    ],
    after: Annotated[str, typer.Argument(help="Later map.")],
    *,
    out: Annotated[Path, typer.Option(help="Folder for change.tif, classes.tif, changes.gpkg and change.json.")],
    min_area: Annotated[
        float, typer.Option(help="Minimum mapping unit, square metres; smaller losses and gains count as undetected.")
    ] = 100.0,
    combine: Annotated[
        str | None,
        typer.Option(
            help="How two errors become one: root-sum-square (they are independent or alike; default for maps by one model) "
            "or sum (nothing is known of that; default for anything else)."
        ),
    ] = None,
    error_before: Annotated[
        float | None,
        typer.Option(help="± metres that hold the true height in 90 % of the pixels, for an earlier map without intervals."),
    ] = None,
    error_after: Annotated[float | None, typer.Option(help="The same of the later map.")] = None,
    stable: Annotated[
        Path | None,
        typer.Option(help="Polygons where nothing changed; intervals become as wide as they must be to hold there."),
    ] = None,
    crs: Annotated[str | None, typer.Option(help="CRS of rasters that name none, for example EPSG:32722.")] = None,
    resample: Annotated[
        bool, typer.Option("--resample", help="Bring maps of different pixels onto the coarser ones, and mark the result.")
    ] = False,
    allow_different_models: Annotated[
        bool,
        typer.Option("--allow-different-models", help="Compare maps by different or unknown models, and mark the result."),
    ] = False,
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """Say what changed between two maps of one place: loss or gain only where it exceeds the errors of both.

    Dates, where files do not say them, and the unit or band of a raster follow a comma: chm_2012.tif,date=2012,unit=0.01.

    Example: canopy change map-2020 map-2023 --out change
    """
    from canopy.analyse.change import change_maps
    from canopy.score.maps import GivenMap

    with _progress("strips") as progress:
        result = change_maps(
            GivenMap.parse(before), GivenMap.parse(after), out=out, min_area_m2=min_area, rule=combine,
            error_before_m=error_before, error_after_m=error_after, stable=stable, crs=crs, resample=resample,
            allow_different_models=allow_different_models, overwrite=overwrite, progress=progress,
        )  # fmt: skip
    if as_json:
        _print_json(result.summary.model_dump(mode="json"))
        return
    for line in result.summary.lines():
        typer.echo(line)
    typer.echo("\n".join(str(path) for path in result.files if path.suffix != ".qml"))


@app.command()
def view(
    out: Annotated[Path, typer.Argument(help="Output folder of canopy map.")],
    *,
    reference: Annotated[
        list[Path] | None,
        typer.Option(help="Lidar canopy heights as a layer: raster, folder or quoted pattern; may be repeated."),
    ] = None,
    reference_crs: Annotated[str | None, typer.Option(help="CRS of --reference where the files name none.")] = None,
    reference_unit: Annotated[float | None, typer.Option(help="Metres per unit of --reference, 0.3048 for feet.")] = None,
    basemap: Annotated[
        str | None, typer.Option(help="Tiles to lay below: an address with {z}, {x} and {y}; asked for by the browser.")
    ] = None,
    attribution: Annotated[str | None, typer.Option(help="Who is to be named for --basemap.")] = None,
    host: Annotated[str, typer.Option(help="Address to listen at; default: this computer's own.")] = "127.0.0.1",
    port: Annotated[int | None, typer.Option(help="Port; default: the first free one from 8765 up.")] = None,
    allow_host: Annotated[
        list[str] | None, typer.Option(help="Name by which browsers may ask for it, as behind a proxy; may be repeated.")
    ] = None,
    open_browser: Annotated[
        bool | None, typer.Option("--open/--no-open", help="Open the page in a browser; default: where there is a screen.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Show a finished map in the browser: height, error, imagery and reference, values on a click; Ctrl-C ends it.

    Example: canopy view map --reference chm.tif
    """
    from canopy.view.serve import Address, can_open_browser, serve

    given = None
    if reference:
        from canopy.score.reference import GivenReference

        given = GivenReference(paths=reference, crs=reference_crs, unit_m=reference_unit)

    def say(url: str) -> None:
        if as_json:
            _print_json({"url": url, "map": str(out)})
        else:
            typer.echo(f"{url}  (Ctrl-C ends)")

    serve(
        out, address=Address(host=host, port=port, names=tuple(allow_host or ())), reference=given, basemap=basemap,
        attribution=attribution, open_browser=can_open_browser() if open_browser is None else open_browser,
        say=say, warn=_say,
    )  # fmt: skip


@app.command()
def derive(
    out_map: Annotated[Path, typer.Argument(metavar="MAP", help="Output folder of canopy map.")],
    *,
    out: Annotated[Path, typer.Option(help="Folder for the layers.")],
    cover: Annotated[
        list[float] | None, typer.Option(help="Cover and gaps in cells of this side, metres; may be repeated.")
    ] = None,
    percentiles: Annotated[
        list[float] | None, typer.Option(help="Percentiles of height in cells of this side, metres; may be repeated.")
    ] = None,
    tree_tops: Annotated[bool, typer.Option("--tree-tops", help="Tree tops as points.")] = False,
    crowns: Annotated[bool, typer.Option("--crowns", help="Tree tops get the crown radius usual for their height.")] = False,
    least_height: Annotated[float, typer.Option(help="Lower tops are no trees, metres.")] = 5.0,
    crown_base: Annotated[float, typer.Option(help="A tree of height h has a crown of this many metres ...")] = 2.51503,
    crown_slope: Annotated[float, typer.Option(help="... plus this many h squared, per metre, ...")] = 0.00901,
    crown_most: Annotated[float, typer.Option(help="... but no more than this, metres.")] = 20.0,
    window_share: Annotated[float, typer.Option(help="A top is highest in this share of its crown's diameter.")] = 0.7,
    gap_below: Annotated[float, typer.Option(help="Ground under canopy lower than this many metres may be a gap.")] = 2.0,
    least_gap: Annotated[float, typer.Option(help="Least area of a gap, square metres.")] = 10.0,
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """Derive layers from a map: cover and gaps or percentiles in larger cells, tree tops; each with its error.

    cover_10m.tif has the shares of ground (0 to 1) with canopy above 2 m and 5 m and in gaps; percentiles_30m.tif the
    heights in metres that 25, 50, 75 and 95 % of the ground do not exceed, and the greatest. Bands _lower_90 and _upper_90
    are their bounds. Cells begin at the origin of the CRS, and are empty where less than half is known. tree_tops.gpkg has
    the height of each top with the interval of its pixel, in metres.

    Example: canopy derive demo/map --out demo/layers --cover 10 --percentiles 30 --tree-tops
    """
    from canopy.analyse.derive import Wanted
    from canopy.analyse.derive import derive as derive_layers
    from canopy.analyse.tops import TopRule

    rule = TopRule(base_m=crown_base, per_m=crown_slope, most_m=crown_most, share=window_share, least_height_m=least_height)
    wanted = Wanted(
        cover_m=tuple(cover or ()), percentiles_m=tuple(percentiles or ()), tops=rule if tree_tops else None, crowns=crowns,
        gap_below_m=gap_below, least_gap_m2=least_gap,
    )  # fmt: skip
    with _stages() as progress:
        derived = derive_layers(out_map, out, wanted, overwrite=overwrite, progress=progress)
    if as_json:
        _print_json(derived.as_json())
        return
    for line in derived.lines():
        typer.echo(line)


@bench_app.command("seal")
def bench_seal(
    tile_sets: Annotated[list[Path], typer.Argument(help="Folders of labelled tile sets.", metavar="TILESET...")],
    *,
    out: Annotated[Path, typer.Option(help="Public folder to make.")],
    key: Annotated[Path, typer.Option(help="Private file to make, outside of it; readable by its owner only.")],
    base: Annotated[str, typer.Option(help="Model folder or name that submissions are measured from.")],
    name: Annotated[str | None, typer.Option(help="Name of the task; default: that of its folder.")] = None,
    split: Annotated[
        list[str] | None, typer.Option(help="Split whose chips are sealed, or all; may be repeated; default: test.")
    ] = None,
    positions: Annotated[str, typer.Option(help="coarse: places by cells only; exact: as they are.")] = "coarse",
    grid_km: Annotated[float, typer.Option(help="Side of these cells, km.")] = 10.0,
    accept: Annotated[
        list[str] | None, typer.Option(help="model, map or predictions; may be repeated; default: all.")
    ] = None,
    starts_from: Annotated[
        str, typer.Option(help="base: submissions descend from the base model; any: they may start anywhere.")
    ] = "base",
    buffer: Annotated[
        float | None, typer.Option(help="Metres that training keeps away from sealed ground; default: the sets' buffer.")
    ] = None,
    by_site: Annotated[
        bool | None, typer.Option("--by-site/--by-block", help="Hold out whole sites and flights; default: as split.")
    ] = None,
    least_px: Annotated[int, typer.Option(help="Fewest pixels of a height class of a region that is scored.")] = 500,
    jitter: Annotated[float, typer.Option(help="Metres by which label and image may be apart; sets the floor.")] = 0.5,
    acquisition: Annotated[
        list[str] | None, typer.Option(help="Published name of the sealed LiDAR; becomes public; may be repeated.")
    ] = None,
    seconds: Annotated[
        float | None, typer.Option(help="Time to predict all chips; default: ten times the base model's, at least 60 s.")
    ] = None,
    parameters: Annotated[int | None, typer.Option(help="Numbers in the weights; default: ten times the base's.")] = None,
    memory: Annotated[
        int | None, typer.Option(help="Memory, MiB; default: four times the base model's, at least 4096.")
    ] = None,
    threads: Annotated[int, typer.Option(help="Threads that a submitted model is told to use.")] = 2,
    as_json: Json = False,
) -> None:
    """Turn labelled tile sets into a public task without labels and a private key with them.

    Example: canopy bench seal tiles/closed --out task --key task.key --base canopy-sample
    """
    from canopy.score.sealed.seal import Limits, SealSettings, seal

    limits = Limits(seconds=seconds, parameters=parameters, memory_mib=memory, threads=threads)
    settings = SealSettings.checked(
        splits=split, positions=positions, grid_km=grid_km, accepts=accept, starts_from=starts_from, buffer_m=buffer,
        by_site=by_site, least_px=least_px, jitter_m=jitter, acquisitions=acquisition, limits=limits,
    )  # fmt: skip
    with _stages() as progress:
        made = seal(tile_sets, out, key=key, base=base, name=name, settings=settings, progress=progress)
    if as_json:
        _print_json({"task": str(out), "key": str(key), **made.as_json()})
        return
    typer.echo(made.as_text())


@bench_app.command("template")
def bench_template(
    task: Annotated[Path, typer.Argument(help="Public task folder.")],
    out: Annotated[Path, typer.Argument(help="Submission to make.")],
    *,
    model: Annotated[str, typer.Option(help="Model folder or name to submit.")],
    tile_set: Annotated[list[Path] | None, typer.Option(help="Tile set that it was trained on; may be repeated.")] = None,
    name: Annotated[str | None, typer.Option(help="Name of the submission; default: the model's.")] = None,
    compute: Annotated[str | None, typer.Option(help="What training took, for example '8 h on one H100'.")] = None,
    as_json: Json = False,
) -> None:
    """Prepare a submission: the model with its declared lineage, as far as its contract and tile sets tell it.

    Example: canopy bench template task submission --model models/mine --tile-set tiles/open
    """
    from canopy.model.package import find_model
    from canopy.score.sealed.submission import SUBMISSION, write_template
    from canopy.score.sealed.task import read_task

    folder = write_template(
        read_task(task), out, model=find_model(model), tile_sets=tile_set or [], name=name, compute=compute
    )
    if as_json:
        _print_json({"submission": str(folder)})
        return
    typer.echo(f"{folder}: complete {folder / SUBMISSION} with what its labels were made from, then hand in the folder")


@bench_app.command("score")
def bench_score(
    task: Annotated[Path, typer.Argument(help="Public task folder.")],
    key: Annotated[Path, typer.Argument(help="Its private key.")],
    submission: Annotated[Path, typer.Argument(help="Folder that was handed in.")],
    *,
    out: Annotated[Path | None, typer.Option(help="JSON file for the result.")] = None,
    as_json: Json = False,
) -> None:
    """Score a submission against the sealed labels; one that is turned down gets the base model's score and exit code 3.

    Example: canopy bench score task task.key submission --out result.json
    """
    from canopy.score.sealed.judge import judge, write_verdict

    with _stages() as progress:
        verdict = judge(task, key, submission, progress=progress)
    if out is not None:
        write_verdict(verdict, out)
    if as_json:
        _print_json(verdict.as_json())
    else:
        typer.echo(verdict.as_text())
    if verdict.reasons:
        raise typer.Exit(3)


@app.command()
def doctor(
    model: Annotated[str, typer.Option(help="Model folder or name to try.")] = "canopy-sample",
    *,
    online: Annotated[bool, typer.Option("--online", help="Also ask the catalogues whether they answer.")] = False,
    as_json: Json = False,
) -> None:
    """Say what this machine can do and what is missing; exit code 1 when something that is needed does not work.

    Example: canopy doctor
    """
    from dataclasses import asdict

    from canopy.doctor import examine, summary

    findings = []
    for finding in examine(model=model, online=online):
        findings.append(finding)
        if not as_json:
            typer.echo(finding.line())
    if as_json:
        _print_json({"summary": summary(findings), "findings": [asdict(finding) for finding in findings]})
    else:
        typer.echo(summary(findings))
    if any(finding.state == "broken" for finding in findings):
        raise typer.Exit(1)


@models_app.command("list")
def models_list(*, as_json: Json = False) -> None:
    """List the models in ./models and in the source checkout, and the published weights that can be had.

    Example: canopy models list
    """
    from canopy.model.package import known_models, read_contract
    from canopy.model.pull import read_sources

    rows = [(folder, read_contract(folder)) for folder in known_models()]
    sources = read_sources()
    if as_json:
        _print_json({
            "models": [
                {"folder": str(f), "name": c.name, "version": c.version, "licence": c.licence, "gsd_range_m": c.gsd_range_m}
                for f, c in rows
            ],
            "published": [
                {"name": name, "title": each.title, "licence": each.licence, "open": not each.steps}
                for name, each in sources.items()
            ],
        })  # fmt: skip
        return
    for folder, contract in rows:
        low, high = contract.gsd_range_m
        typer.echo(f"{contract.name} {contract.version}  {low:g}-{high:g} m  {contract.licence}  {folder}")
    typer.echo("published weights, for canopy models pull:")
    for name, each in sources.items():
        typer.echo(f"  {name}  {each.licence}{'  (on request)' if each.steps else ''}  {each.title}")


@models_app.command("show")
def models_show(model: Annotated[str, typer.Argument(help="Model folder or name.")], *, as_json: Json = False) -> None:
    """Show a model's card, or with --json its contract.

    Example: canopy models show canopy-sample
    """
    from canopy.model.package import CARD, find_model, read_contract

    folder = find_model(model)
    contract = read_contract(folder)
    if as_json:
        _print_json(contract.model_dump(mode="json"))
        return
    typer.echo((folder / CARD).read_text())


@models_app.command("verify")
def models_verify(
    model: Annotated[str, typer.Argument(help="Model folder or name.")],
    device: Annotated[str, typer.Option(help="Where the model runs: cpu, cuda, cuda:1, ...")] = "cpu",
    *,
    as_json: Json = False,
) -> None:
    """Check that a model is whole and unaltered, and that it computes here what it computed where it was made.

    Example: canopy models verify canopy-sample
    """
    from canopy.model.package import find_model
    from canopy.model.verify import verify_model

    report = verify_model(find_model(model), device=device)
    if as_json:
        _print_json(report.as_json())
        return
    for line in report.as_text():
        typer.echo(line)


@models_app.command("import")
def models_import(
    kind: Annotated[str, typer.Argument(help="Whose weights: chmv2 or chmv1.")],
    path: Annotated[
        Path | None,
        typer.Argument(
            help="chmv2: folder with the authors' two files, or of a Hugging Face checkpoint. chmv1: checkpoint file."
        ),
    ] = None,
    *,
    out: Annotated[Path, typer.Option(help="Model folder to write.")],
    backbone: Annotated[Path | None, typer.Option(help="chmv2: the authors' backbone file, with --head, for PATH.")] = None,
    head: Annotated[Path | None, typer.Option(help="chmv2: the authors' DPT head file, with --backbone.")] = None,
    name: Annotated[str | None, typer.Option(help="Name of the model; default: that of its folder.")] = None,
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """Make a model folder of published weights that you have on disk.

    Example: canopy models import chmv2 downloads/chmv2 --out models/chmv2
    """
    from canopy.model.foreign import import_model

    files = [file for file in (backbone, head) if file is not None]
    if path is not None and files:
        raise CanopyError(f"{path} and --{'backbone' if backbone else 'head'} are both given; give one or the other")
    if len(files) == 1:
        raise CanopyError(f"--{'backbone' if backbone else 'head'} is given alone; give both --backbone and --head")
    if path is None and not files:
        raise CanopyError("nothing to import is given; give a PATH, or --backbone and --head")
    folder = import_model(kind, path if path is not None else files, out, name=name, overwrite=overwrite, say=_say)
    if as_json:
        _print_json({"model": str(folder)})
        return
    typer.echo(f"{folder}: canopy models verify {folder} checks it, canopy models show {folder} tells what it is")


@models_app.command("pull")
def models_pull(
    name: Annotated[str, typer.Argument(help="A name of canopy models list, or of a pretrained timm backbone to train on.")],
    out: Annotated[Path | None, typer.Option(help="Model folder to write; default: models/NAME.")] = None,
    *,
    keep: Annotated[bool, typer.Option("--keep", help="Leave the downloaded files in OUT.download.")] = False,
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """Download published weights and make a model folder of them; where a person has to ask for them, say how.

    A download that was stopped goes on where it was. Example: canopy models pull chmv1-huge
    """
    from canopy.model.pull import is_backbone, pull_backbone, pull_model, read_sources

    if name not in read_sources() and is_backbone(name):
        parameters = pull_backbone(name, say=_say)
        if as_json:
            _print_json({"backbone": name, "parameters": parameters})
            return
        typer.echo(f"{name}: {parameters:,} parameters are in timm's cache; a recipe takes them with pretrained = true")
        return
    with _progress("MiB") as progress:
        folder = pull_model(name, out, overwrite=overwrite, keep=keep, say=_say, progress=progress)
    if as_json:
        _print_json({"model": str(folder)})
        return
    typer.echo(f"{folder}: canopy models verify {folder} checks it, canopy models show {folder} tells what it is")


# --- lines and bars ------------------------------------------------------------------------------------------------------


def _say(line: str) -> None:
    typer.echo(line, err=True)


def _print_json(value: Any) -> None:
    typer.echo(json.dumps(value, indent=2))


def _band_list(text: str | None) -> tuple[int | str, ...] | None:
    if text is None:
        return None
    parts = [part.strip() for part in text.split(",")]
    if not all(parts):
        raise CanopyError(f"--bands {text!r} has an empty place; give for example 1,2,3 or red,green,blue")
    return tuple(int(part) if part.isdecimal() else part for part in parts)


def _area(
    path: Path | None, bbox: tuple[float, float, float, float] | None, place: str | None
) -> Path | tuple[float, float, float, float] | Any | None:
    """The one area among three ways of giving it, or none."""
    from canopy.errors import AreaError

    given = [name for name, value in (("an area", path), ("--bbox", bbox), ("--place", place)) if value is not None]
    if len(given) > 1:
        raise AreaError(f"{given[0]} and {given[1]} are both given; give one of them")
    if place is not None:
        from canopy.tiler.area import area_of_place

        found = area_of_place(place)
        _say(f"{place}: {found.name}")
        return found
    return path if path is not None else bbox


@contextmanager
def _stages() -> Iterator[Callable[[str, int, int], None]]:
    """As `_progress`, for work in stages: a bar each on a terminal; elsewhere lines."""
    if sys.stderr.isatty():
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
            tasks: dict[str, TaskID] = {}

            def show(stage: str, done: int, total: int) -> None:
                if stage not in tasks:
                    tasks[stage] = bar.add_task(stage, total=total)
                bar.update(tasks[stage], completed=done, total=total)

            yield show
        return
    last = time.monotonic()

    def line(stage: str, done: int, total: int) -> None:
        nonlocal last
        if done == total or time.monotonic() - last > 10:
            last = time.monotonic()
            _say(f"{stage}: {done} of {total} tasks")

    yield line


@contextmanager
def _progress(what: str = "windows") -> Iterator[Callable[[int, int], None]]:
    """A bar on a terminal; elsewhere a line at most every ten seconds, so that a job's log stays readable."""
    if sys.stderr.isatty():
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        columns = (TextColumn(what), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
            task = bar.add_task(what, total=None)
            yield lambda done, total: bar.update(task, completed=done, total=total)
        return
    last = time.monotonic()

    def line(done: int, total: int) -> None:
        nonlocal last
        if done == total or time.monotonic() - last > 10:
            last = time.monotonic()
            _say(f"{done} of {total} {what}")

    yield line


if __name__ == "__main__":
    main()

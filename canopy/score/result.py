"""All that a score says: `score.json` is written from it and the page is made from it.

Signs, units and pixels are part of what is said. Errors are the map minus the reference, in metres. Everything of one
`Comparison` is of exactly the same pixels (or shots): those where the reference and every map of it are known; how many each
map lacked is counted beside it. A measure that does not exist, such as R² where the reference is flat, is None.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    ValidationError,
)

from canopy.errors import OutputError
from canopy.settings import first_problem
from canopy.textfile import write_text

FILE = "score.json"
"""Name of the file that keeps a score."""

SIGN = "error = map minus reference; a positive bias is a map that is too tall"

Statistic = Literal["mean", "max", "p98"]
"""How the fine reference becomes one height of a coarser cell: the mean of its area, its greatest height, or the 98th
percentile of its area, which is what products trained on lidar's RH98 estimate."""


class _Value(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class Estimate(_Value):
    """A measure and how sure it is."""

    value: float | None
    """None where the measure does not exist."""
    interval_95: tuple[float, float] | None = None
    """Percentile 95 % interval of the block bootstrap; None where it could not be had, as with a single square of ground."""


# --- what was compared ---------------------------------------------------------------------------------------------------


class ModelInfo(_Value):
    """A model that made a map, as far as the map says."""

    name: str
    version: str
    weights_sha256: str
    licence: str | None = None
    sites: tuple[str, ...] | None = None
    """Training sites; None where the lineage is unknown."""
    footprints_deg: tuple[tuple[float, float, float, float], ...] | None = None
    """Boxes (west, south, east, north) of the training ground, in degrees; None where the lineage is unknown."""
    tile_sets: dict[str, str] | None = None
    """Name of each tile set that trained it -> SHA-256 of its index; None where the lineage is unknown."""


class MapInfo(_Value):
    """A map that was scored, or a product beside it."""

    name: str
    """What tables call it; unique in a result."""
    path: str
    kind: Literal["canopy map", "product"]
    models: tuple[ModelInfo, ...] = ()
    lineage: Literal["known", "unknown"]
    """Whether it is known what trained it; where it is unknown, a leak cannot be excluded."""
    gsd_m: PositiveFloat
    """The longer side of its pixels on the ground."""
    crs: str
    date: str | None
    """Day or span of days of its imagery as ISO text; None where it is unknown."""
    statistic: str
    """What its heights mean, such as "mean height of the pixel"."""
    band: PositiveInt = 1
    unit_m: PositiveFloat = 1.0
    """Metres per unit of the file's values."""
    has_intervals: bool
    """Whether it comes with a lower and an upper bound for every pixel."""
    calibration: str | None = None
    """What the map says of its intervals."""
    tags: dict[str, str] = {}


class ReferenceInfo(_Value):
    """What the maps were compared with."""

    kind: Literal["als", "gedi", "atl08", "plots"]
    name: str
    files: tuple[str, ...]
    dates: tuple[str, ...] = ()
    """Its days as ISO text, one or the first and the last; empty where unknown."""
    gap_days: int | None = None
    """Days between it and the map's imagery, the largest; None where a date is unknown."""
    statistic: str
    """What its heights mean, such as "mean of the canopy height model over the cell" or "RH98 of the shot"."""
    gsd_m: PositiveFloat | None
    """Side of its pixels; None for shots and plots."""
    crs: str
    crs_given: bool = False
    """Whether the CRS was said by the user because the files have none."""
    unit_m: PositiveFloat = 1.0
    """Metres per unit of the files' values."""
    mask: str
    """Which of its pixels or shots count."""
    n_refused: NonNegativeInt = 0
    """Cells of the comparison with a pixel that holds no possible height (below -2 m or above 120 m) and is unknown."""
    n_negative: NonNegativeInt = 0
    """Cells with a pixel between -2 m and 0 m, which counts as 0 m."""
    licence: str | None = None


class CompareGrid(_Value):
    """The pixels on which maps and reference met."""

    crs: str
    gsd_m: PositiveFloat
    bounds: tuple[float, float, float, float]
    """(left, bottom, right, top) in its CRS."""
    bounds_deg: tuple[float, float, float, float]
    """(west, south, east, north) in longitude and latitude."""
    shape: tuple[PositiveInt, PositiveInt]
    """(rows, columns)."""
    chosen: str
    """Why these pixels."""
    least_share: float
    """Least share of a cell's area that must be known for the cell to be."""


class FilterCount(_Value):
    """Shots that a filter took away."""

    name: str
    n: NonNegativeInt


class Footprints(_Value):
    """How shots or plots and a map met."""

    shape: str
    """What of the ground a shot is, such as "disc of 12 m radius"."""
    map_statistic: str
    """What of the map's pixels in it was compared, such as "98th percentile"."""
    n_read: NonNegativeInt
    """Shots in the files and on the map, before any filter."""
    removed: tuple[FilterCount, ...]
    """What each filter took away, in the order in which they were applied."""
    notes: tuple[str, ...] = ()


class Shift(_Value):
    """How far a map lies off the reference, at one site."""

    site: str
    """The reference's file, or the name of the whole."""
    x_m: float | None
    """How far the map has to move east to fit the reference best; None where it could not be measured."""
    y_m: float | None
    """How far north."""
    agreement_before: float | None
    """Correlation of map and reference as they are."""
    agreement_after: float | None
    """The same after the move."""
    applied: bool
    reason: str
    """Why it was applied or not."""


# --- measures ------------------------------------------------------------------------------------------------------------


class Measures(_Value):
    """One map against the reference over one set of pixels or shots."""

    n: NonNegativeInt
    """Pixels (or shots) compared."""
    squares: NonNegativeInt
    """Squares of ground with one of them, from which the intervals were drawn."""
    reference_mean_m: Estimate
    prediction_mean_m: Estimate
    mae_m: Estimate
    rmse_m: Estimate
    bias_m: Estimate
    r2: Estimate
    """From the sums over the set, never an average; None within classes of reference height, where it says nothing."""
    nmae: Estimate
    """Mean of |error| / reference over the references of at least 2 m."""


class BlockMeasures(_Value):
    """Means over square blocks of ground, each one sample."""

    side_m: PositiveFloat
    n: NonNegativeInt
    """Blocks of which at least half is known."""
    r2: Estimate
    rmse_m: Estimate
    mae_m: Estimate
    coverage: Coverage | None = None
    """Whether the map's own 90 % intervals of such means hold the reference's; None where it gives none."""


class EdgeMeasures(_Value):
    """Steepness of the map's surface against the reference's, metres of height per metre of ground."""

    n: NonNegativeInt
    error: Estimate
    """Mean absolute difference of the two Sobel gradient magnitudes."""
    bias: Estimate
    """Its signed mean: negative where the map is too smooth."""
    reference_mean: Estimate
    """Mean gradient magnitude of the reference: the error of a flat map."""


class CoverMeasures(_Value):
    """Tree cover in the map and in the reference."""

    threshold_m: float
    n_both: NonNegativeInt
    n_map_only: NonNegativeInt
    n_reference_only: NonNegativeInt
    n_neither: NonNegativeInt
    iou: Estimate
    """Intersection over union."""


class Coverage(_Value):
    """What the map's 90 % intervals held."""

    label: str
    n: NonNegativeInt
    n_below: NonNegativeInt
    """References below the interval."""
    n_above: NonNegativeInt
    coverage: Estimate
    """Share of the references inside the closed interval."""
    mean_width_m: Estimate


class StatedError(_Value):
    """Pixels of one class of stated error: is the error map right where it says little, and where it says much?"""

    label: str
    n: NonNegativeInt
    stated_m: float | None
    """Mean of the half widths of the 90 % intervals."""
    observed_m: float | None
    """90th percentile of |reference - middle of the interval|: where the intervals are right it is the stated one."""
    coverage: Estimate


class Intervals(_Value):
    """The map's 90 % intervals against the reference."""

    nominal: float = 0.9
    how: str
    """Whether the intervals are the map's own, or bounds averaged over cells."""
    n_missing: NonNegativeInt
    """Pixels of those compared for which the map gives no interval."""
    overall: Coverage
    by_predicted_height: tuple[Coverage, ...]
    by_reference_height: tuple[Coverage, ...]
    by_stated_error: tuple[StatedError, ...]


class Group(_Value):
    """The pixels of one class or polygon."""

    label: str
    n_missing: NonNegativeInt
    """Pixels of it with a reference that some map of the comparison lacks."""
    measures: Measures
    coverage: Coverage | None
    """None for a map without intervals."""


class Scatter(_Value):
    """How many pixels have which pair of heights."""

    reference_edges_m: tuple[float, ...]
    map_edges_m: tuple[float, ...]
    counts: tuple[tuple[NonNegativeInt, ...], ...]
    """One row a class of reference height, one number a class of the map's height in it."""
    n_outside: NonNegativeInt
    """Pixels beyond the edges."""


class Residuals(_Value):
    """Quantiles of the error in a class of reference height."""

    low_m: float
    high_m: float
    n: PositiveInt
    mean_m: float
    q05_m: float
    q25_m: float
    q50_m: float
    q75_m: float
    q95_m: float


class Place(_Value):
    """A square of ground, with how wrong the map is in it."""

    lon_deg: float
    """Of its centre."""
    lat_deg: float
    bounds: tuple[float, float, float, float]
    """(left, bottom, right, top) in the CRS of the comparison's grid."""
    n: PositiveInt
    mean_error_m: float
    map_mean_m: float
    reference_mean_m: float


class Shot(_Value):
    """One shot or plot with the map's height there."""

    lon_deg: float
    lat_deg: float
    reference_m: float
    map_m: float


class Registered(_Value):
    """The same measures after the map was moved onto the reference; beside the raw ones, never instead."""

    shifts: tuple[Shift, ...]
    measures: Measures | None
    """None where no shift was applied."""
    blocks: BlockMeasures | None
    edges: EdgeMeasures | None


class MapScore(_Value):
    """One map of a comparison."""

    name: str
    """That of its `MapInfo`."""
    resampled: str
    """What was done to its pixels to bring them to those of the comparison."""
    n_missing: NonNegativeInt
    """Pixels with a reference that this map lacks."""
    measures: Measures
    blocks: BlockMeasures | None
    """None for shots, and where the pixels are larger than the blocks."""
    edges: EdgeMeasures | None
    cover: tuple[CoverMeasures, ...]
    """At 2 m and at 5 m."""
    by_height: tuple[Group, ...]
    """By class of reference height, from the lowest up; all classes, empty ones with n = 0."""
    by_land_cover: tuple[Group, ...] = ()
    by_polygon: tuple[Group, ...] = ()
    intervals: Intervals | None
    scatter: Scatter
    residuals: tuple[Residuals, ...]
    """By class of reference height, those with pixels."""
    worst: tuple[Place, ...] = ()
    """The squares of ground with the largest mean errors, the worst first."""
    registered: Registered | None = None
    """None where it was not asked for, or makes no sense, as for field plots."""
    shots: tuple[Shot, ...] = ()
    """A sample of the shots, at most a few thousand, for a figure; empty for rasters."""


class Difference(_Value):
    """The first map minus another on the same pixels, with the same squares of ground in every resample."""

    first: str
    other: str
    mae_m: Estimate
    """Negative where the first map is better."""
    rmse_m: Estimate
    r2: Estimate
    """Positive where the first map is better."""
    bias_m: Estimate


class Comparison(_Value):
    """Maps and one reference on one set of pixels or shots."""

    title: str
    """For example "airborne lidar, 1 m" or "GEDI L2A shots"."""
    reference: ReferenceInfo
    reference_resampled: str
    """What was done to the reference's pixels to bring them to those of the comparison."""
    grid: CompareGrid | None
    """None for shots and plots."""
    footprints: Footprints | None = None
    """None for rasters."""
    statistic: str
    """What both heights mean, as every table has to say: that of the reference, and that of the maps."""
    mask: str
    """Which pixels count, in one line."""
    n_reference: NonNegativeInt
    """Pixels (or shots) with a reference where the first map could be."""
    square_m: PositiveFloat | None = None
    """Side of the squares of ground from which the intervals were drawn."""
    maps: Annotated[tuple[MapScore, ...], Field(min_length=1)]
    differences: tuple[Difference, ...] = ()
    land_cover: str | None = None
    """Where the classes come from and how they were brought to the pixels; None without."""
    polygons: str | None = None
    """Where the polygons come from; None without."""
    notes: tuple[str, ...] = ()


# --- the whole -----------------------------------------------------------------------------------------------------------


class Leak(_Value):
    """Ground that a map's model was trained on and is scored on: there the score says nothing of its skill."""

    map: str
    model: str
    site: str
    """The training site or sites that the ground may be of."""
    reference: str
    """The reference's file."""
    footprint_deg: tuple[float, float, float, float]
    """Training ground as (west, south, east, north)."""
    share: NonNegativeFloat
    """Of the reference's ground (its rectangle, or its shots) that lies in it, 0 to 1."""
    finding: str
    """The same in one line."""


class Bootstrap(_Value):
    """How the intervals were drawn."""

    level: float = 0.95
    resamples: PositiveInt
    square_m: PositiveFloat
    """Wanted side of the squares of ground that are drawn as one."""
    seed: int


class Versions(_Value):
    """What computed the score."""

    canopy: str
    python: str
    numpy: str
    rasterio: str
    gdal: str


class ScoreResult(_Value):
    """All that a score says."""

    format: Literal[1] = 1
    made: str
    """When, ISO text with its zone."""
    command: str | None
    """The command line; None from Python."""
    versions: Versions
    sign: str = SIGN
    maps: Annotated[tuple[MapInfo, ...], Field(min_length=1)]
    """The map that was scored, then those it was scored against."""
    comparisons: Annotated[tuple[Comparison, ...], Field(min_length=1)]
    leaks: tuple[Leak, ...] = ()
    """Found and, since there is a result, allowed: the result must be marked wherever it is shown."""
    lineage: str
    """What is known of the training of the maps, in one line."""
    bootstrap: Bootstrap
    warnings: tuple[str, ...] = ()

    @property
    def leaked(self) -> bool:
        """Whether the score is of ground that a map's model was trained on."""
        return bool(self.leaks)


def write_result(result: ScoreResult, folder: Path) -> Path:
    """Write `score.json`, whole or not at all.

    Raises:
        OutputError: it cannot be written.
    """
    path = folder / FILE
    write_text(path, result.model_dump_json(indent=1) + "\n")
    return path


def read_result(path: Path) -> ScoreResult:
    """The result in a `score.json`.

    Raises:
        OutputError: missing, or not one that this version reads.
    """
    try:
        return ScoreResult.model_validate_json(path.read_bytes())
    except OSError as error:
        raise OutputError(
            f"{path} cannot be read ({error.strerror}); make it with canopy score … --out {path.parent}"
        ) from error
    except ValidationError as error:
        raise OutputError(f"{path}: {first_problem(error, ScoreResult)}; make it again with canopy score") from error

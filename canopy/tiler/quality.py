"""What may be wrong with a chip: named checks with limits, and the verdict keep, flag or drop with its reasons.

A check measures one number on one chip; the larger, the worse. Above its `flag` limit the chip is marked, above its `drop`
limit it belongs in no training set. What cannot be known (a gap between dates that nobody wrote down, the agreement of an
image with a label that is forest everywhere) is None, never 0, and gives no finding: a verdict of "keep" says that nothing
was found, not that nothing is wrong.

`judge` looks at one chip alone, so chips can be judged as they are cut, in any order and in many processes. `judge_set`
adds what only shows among all chips: content that occurs twice, and chips unlike the rest of their site.

Limits are the recipe's table `[quality]`, one sub-table a check:

    [quality.void_fraction]
    flag = 0.2
    drop = 0.6
    [quality.date_gap]
    flag_days = 60
    drop_days = inf     # never
    [quality.buildings]
    on = false

The defaults come from the samples that the tests run on; what they found there is in `notebooks/LOG.md`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from functools import cached_property
from typing import Any, ClassVar, Final, Literal, Self

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, model_validator
from scipy import ndimage
from scipy.stats import rankdata

from canopy.raster import Pixels
from canopy.tiler.register import Shift

Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]

Decision = Literal["keep", "flag", "drop"]
Level = Literal["flag", "drop"]


# --- settings ------------------------------------------------------------------------------------------------------------


class _Check(BaseModel):
    """Limits of one check. A value above `flag` marks the chip, above `drop` takes it out; `inf` never does."""

    model_config = ConfigDict(extra="forbid", frozen=True, ser_json_inf_nan="strings")
    unit: ClassVar[str] = ""
    """Suffix of the two limits' names; empty for shares and ratios."""

    on: bool = True
    """False: not measured at all."""

    @property
    def limits(self) -> tuple[float, float]:
        """(flag, drop)."""
        suffix = f"_{self.unit}" if self.unit else ""
        return getattr(self, f"flag{suffix}"), getattr(self, f"drop{suffix}")

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        flag, drop = self.limits
        if math.isnan(flag) or math.isnan(drop) or flag > drop:
            raise ValueError(f"flag {flag:g} must not be above drop {drop:g}; write inf for a limit that never applies")
        return self


class DateGap(_Check):
    """Days between image and LiDAR. Trees grow 0.2 to 1 m a year, but are felled or burnt in a day."""

    unit = "days"
    flag_days: float = Field(default=366, ge=0)
    """More than a year: another growing season lies between."""
    drop_days: float = Field(default=1827, ge=0)
    """More than five years: growth is as large as a good model's error, and every tenth stand may be another."""


class LeafOff(_Check):
    """Share of the tall pixels without green (roofs left out), where the date allows bare trees (or is unknown).

    What it can know: a photograph in the leafless season of its latitude in which tall things are not green shows bare
    broad-leaved trees, or needles or dead wood under a brown light. Greenness depends on the camera's colours, so between
    sites it is no measurement. Inside the growing season nothing is reported.
    """

    flag: float = Field(default=0.9, ge=0)
    drop: float = Field(default=math.inf, ge=0)
    tall_m: float = Field(default=5.0, gt=0)
    green_index: float = 0.0
    """Least excess green of a green pixel, (2g - r - b) / (r + g + b), after Woebbecke et al. (1995)."""
    green_ndvi: float = 0.0
    """Least NDVI of a green pixel, used where the image has a near-infrared band; of digital numbers, so well below the
    0.3 and more of leaves in reflectance."""


class LeafOffLidar(_Check):
    """How deep in the leafless season the LiDAR was flown, in days, when the photograph was taken in leaf.

    Pulses pass between bare branches: broad-leaved heights come out too low by decimetres to metres and the void under
    crowns is seen as ground. What it can know is the calendar only, neither species nor altitude: over conifers it is a
    false alarm, so it never drops unless told.
    """

    unit = "days"
    flag_days: float = Field(default=14, ge=0)
    """Two weeks are within the scatter of spring from year to year."""
    drop_days: float = Field(default=math.inf, ge=0)


class VoidFraction(_Check):
    """Share of the photographed pixels without a height, those left out by the recipe's rectangles not counted."""

    flag: float = Field(default=0.2, ge=0)
    """Point clouds of 4 per square metre and more leave a few per cent on a pixel of 0.5 m; a fifth is lost swaths."""
    drop: float = Field(default=0.6, ge=0)


class Striping(_Check):
    """Periodic stripes in heights, voids or pulse density: scan lines that do not fit together.

    Statistic: the power at one frequency over the usual power of other directions at its wavelength and of other
    wavelengths in its direction (`stripe_ratio`), the highest of all frequencies. Canopy has no preferred direction, so its
    ratios follow an exponential law; scan lines put all their power in one place. Rows of planted trees do too, but the
    photograph shows them: frequencies at which it has a peak of its own are left out.
    """

    flag: float = Field(default=40.0, ge=0)
    """Natural forests reach 25 on 50 chips. Stripes in heights are found from about 0.5 m of amplitude over low plants and
    1 m in forest, stripes of voids from a tenth of the pixels."""
    drop: float = Field(default=600.0, ge=0)
    shortest_m: float = Field(default=2.5, gt=0)
    """Shorter wavelengths are the raster's: a CHM of 1 m repeated on pixels of 0.5 m has some at 1 m."""
    longest_m: float = Field(default=15.0, gt=0)
    """Longer wavelengths are the land's: groups of trees, meadows, shores."""
    amplitude_m: float = Field(default=0.25, gt=0)
    """Stripes in heights below this amplitude are within the LiDAR's own error."""
    amplitude_share: float = Field(default=0.1, gt=0)
    """The same for voids (share of pixels) and density (share of its mean)."""
    image_peak: float = Field(default=20.0, gt=0)
    """A frequency with this ratio in the photograph belongs to the ground, not to the scanner."""


class HeightRange(_Check):
    """Share of the heights that no tree has. One pixel is enough to be marked: it sets the scale of a loss."""

    flag: float = Field(default=0.0, ge=0)
    drop: float = Field(default=0.01, ge=0)
    lowest_m: float = -0.5
    """Ground noise reaches 0.3 m below the ground surface; deeper is a wrong surface."""
    highest_m: float = 80.0
    """Above the tallest trees outside of coast redwood, mountain ash and a few dipterocarps (up to 116 m)."""


class HeightSpikes(_Check):
    """Share of pixels that stand above everything around them by more than a crown can: birds, wires, noise."""

    flag: float = Field(default=1e-3, ge=0)
    drop: float = Field(default=0.02, ge=0)
    excess_m: float = Field(default=15.0, gt=0)
    """Above the highest pixel of the ring around it. Spires of 50 m conifers reach 10 m."""
    inner_m: float = Field(default=1.25, gt=0)
    """Radius inside which the ring is empty: a return with its sub-circle fills a few pixels."""
    outer_m: float = Field(default=3.0, gt=0)


class ConstantHeights(_Check):
    """Share of the pixels above 0.5 m that have one and the same height to the centimetre: a fill value, a clipped range."""

    flag: float = Field(default=0.3, ge=0)
    drop: float = Field(default=0.9, ge=0)


class WholeMetres(_Check):
    """Share of the pixels above 0.5 m whose height is whole metres: an integer product, good to 0.3 m at best."""

    flag: float = Field(default=0.95, ge=0)
    drop: float = Field(default=math.inf, ge=0)


class Buildings(_Check):
    """Share of the pixels that are roofs: class 6 where the labels know it, else high, plane and not green.

    Without classes the check sees roofs of more than `least_m2` that are plane to `plane_m`; flat vegetation under a brown
    light can pass for one, and a green roof or a small shed is missed.
    """

    flag: float = Field(default=0.02, ge=0)
    drop: float = Field(default=0.25, ge=0)
    tall_m: float = Field(default=2.5, gt=0)
    plane_m: float = Field(default=0.15, gt=0)
    """Root-mean-square deviation from a plane over 2.5 m; roofs have 0.02 to 0.1, crowns 0.5 and more."""
    least_m2: float = Field(default=20.0, gt=0)
    green_index: float = 0.05
    green_ndvi: float = 0.1


class Water(_Check):
    """Share of the pixels that are water: class 9 where the labels know it, else dark, smooth and without a height.

    Pulses are swallowed by still water or come back from ripples, so heights there are holes, noise or interpolation.
    Shadow on a lawn looks alike; pieces below `least_m2` are not counted. Water is worth training on where its heights are
    0, so it is marked and not dropped.
    """

    flag: float = Field(default=0.25, ge=0)
    drop: float = Field(default=math.inf, ge=0)
    smooth: float = Field(default=0.02, gt=0)
    """Largest local standard deviation of the brightness, as a share of the value range."""
    dark: float = Field(default=0.4, gt=0)
    """Largest brightness, as a share of the value range."""
    low_m: float = Field(default=0.5, gt=0)
    least_m2: float = Field(default=200.0, gt=0)


class ImageLabelDisagreement(_Check):
    """How little the image says about where the label is tall: 1 minus the best area under the curve of three cues.

    The cues are greenness, darkness and texture, the area is the chance that a tall pixel has more of the cue than a low
    one (Mann-Whitney). 0.2 is usual in natural forest, 0.45 is what a label of another place gets, more means that tall
    pixels look like road and the other way round. In chips that are tall or low almost everywhere it is unknown.
    """

    flag: float = Field(default=0.45, ge=0)
    drop: float = Field(default=0.65, ge=0)
    tall_m: float = Field(default=2.0, gt=0)
    least_share: float = Field(default=0.1, gt=0, lt=0.5)
    """Both tall and low pixels must have this share of the chip."""


class UnlikeTheSite(_Check):
    """How many robust standard deviations (from median and MAD) the disagreement of a chip is above its site's."""

    flag: float = Field(default=4.0, ge=0)
    drop: float = Field(default=math.inf, ge=0)
    least_chips: int = Field(default=8, ge=3)
    """Sites with fewer chips to compare with are compared with the whole set, and sets with fewer not at all."""
    least_disagreement: float = Field(default=0.35, ge=0)
    """Below this an odd chip is still a good one."""


class WrongCover(_Check):
    """For chips that are tall, or low, almost everywhere: how far they look like the site's other kind in every cue.

    Robust standard deviations beyond the median of the site's low (or tall) pixels, the least of all cues. A chip labelled
    forest that is less green, brighter and smoother than the usual open ground is above 0, and so is one labelled bare that
    is greener, darker and rougher than the usual forest.
    """

    flag: float = Field(default=0.0, ge=0)
    drop: float = Field(default=math.inf, ge=0)
    least_chips: int = Field(default=8, ge=3)
    """As in `UnlikeTheSite`; counted are the chips with pixels of the other kind."""


class DuplicateChips(_Check):
    """With how many chips of another place the image is shared; overlapping windows of one place are no duplicates."""

    flag: float = Field(default=0, ge=0)
    drop: float = Field(default=math.inf, ge=0)


class ShiftApplied(_Check):
    """Length of the shift that registration took out of the label, in metres: large ones deserve a look."""

    unit = "m"
    flag_m: float = Field(default=4.0, ge=0)
    drop_m: float = Field(default=math.inf, ge=0)


class ShiftLeft(_Check):
    """Length of a measured shift that would make the label fit better and was not applied, in metres."""

    unit = "m"
    flag_m: float = Field(default=1.0, ge=0)
    """About two pixels of 0.6 m: crowns and their shadows begin to swap."""
    drop_m: float = Field(default=math.inf, ge=0)
    least_gain: float = Field(default=0.005, ge=0)
    """Shifts that raise the score (`Shift`, nats a pixel) by less are noise."""


class QualitySettings(BaseModel):
    """All checks with their limits: the recipe's `[quality]`."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    date_gap: DateGap = DateGap()
    leaf_off: LeafOff = LeafOff()
    leaf_off_lidar: LeafOffLidar = LeafOffLidar()
    void_fraction: VoidFraction = VoidFraction()
    striping: Striping = Striping()
    height_range: HeightRange = HeightRange()
    height_spikes: HeightSpikes = HeightSpikes()
    constant_heights: ConstantHeights = ConstantHeights()
    whole_metres: WholeMetres = WholeMetres()
    buildings: Buildings = Buildings()
    water: Water = Water()
    image_label_disagreement: ImageLabelDisagreement = ImageLabelDisagreement()
    unlike_the_site: UnlikeTheSite = UnlikeTheSite()
    wrong_cover: WrongCover = WrongCover()
    duplicate_chips: DuplicateChips = DuplicateChips()
    shift_applied: ShiftApplied = ShiftApplied()
    shift_left: ShiftLeft = ShiftLeft()


CHECKS: Final = tuple(QualitySettings.model_fields)
"""Names of the checks, in the order of the findings."""


# --- facts and verdicts --------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ChipFacts:
    """What is known of one chip. None means unknown; everything with (row, col) has the chip's shape."""

    image: Pixels
    """(band, row, col); `valid` is where there is imagery."""
    height_m: NDArray[np.float32]
    """(row, col) metres above ground, NaN unknown; as it goes into the tile set, so after registration."""
    gsd_m: float
    colours: tuple[str, ...] | None = None
    """What each band is: "red", "green", "blue", "nir", or any other name; None takes 3 bands as red, green, blue and 4 as
    these and near-infrared, and knows nothing of the bands of another number."""
    value_range: tuple[float, float] | None = None
    """Darkest and brightest value an instrument gives; None takes 0 to 255 for uint8 and is unknown for other types."""
    left_out: Bools | None = None
    """(row, col), True where the recipe takes heights out on purpose."""
    image_date: date | None = None
    lidar_date: date | None = None
    gap_days: float | None = None
    """Days between them where the dates themselves are not known; the dates go before."""
    latitude_deg: float | None = None
    building_fraction: NDArray[np.float32] | None = None
    """(row, col) share of the returns in class 6, NaN where there is none; None when the labels know no classes."""
    water_fraction: NDArray[np.float32] | None = None
    """(row, col) share of the returns in class 9, likewise."""
    density_per_m2: NDArray[np.float32] | None = None
    """(row, col) returns per square metre."""
    shift: Shift | None = None
    """None where registration did not measure."""

    def __post_init__(self) -> None:
        shape = self.height_m.shape
        assert self.image.valid.shape == shape, f"image {self.image.valid.shape} and heights {shape} differ in shape"
        for name in ("left_out", "building_fraction", "water_fraction", "density_per_m2"):
            array = getattr(self, name)
            assert array is None or array.shape == shape, f"{name} {array.shape} and heights {shape} differ in shape"
        assert self.colours is None or len(self.colours) == len(self.image.data), (
            f"{len(self.colours)} names for {len(self.image.data)} bands"
        )

    @property
    def days_apart(self) -> float | None:
        """Days between image and LiDAR."""
        if self.image_date is not None and self.lidar_date is not None:
            return abs((self.image_date - self.lidar_date).days)
        return self.gap_days


class Finding(BaseModel):
    """One limit that one chip exceeds."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    check: str
    """Name of the check, a field of `QualitySettings`."""
    level: Level
    value: float
    limit: float
    reason: str
    """One sentence without semicolon that a person understands."""


class Verdict(BaseModel):
    """What the checks say of one chip; goes to JSON and back."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    findings: tuple[Finding, ...] = ()
    values: dict[str, float | None] = Field(default_factory=dict)
    """What each check that is on measured, None where it could not know; and the cues `judge_set` compares."""

    @property
    def decision(self) -> Decision:
        """keep, flag or drop: the worst finding's."""
        levels = {finding.level for finding in self.findings}
        return "drop" if "drop" in levels else "flag" if levels else "keep"

    @property
    def flags(self) -> str:
        """Names of the checks that found something, joined by ";": the index column."""
        return ";".join(finding.check for finding in self.findings)

    @property
    def reasons(self) -> str:
        """Their sentences, joined by "; ": the index column."""
        return "; ".join(finding.reason for finding in self.findings)


@dataclass(frozen=True, slots=True)
class _Measured:
    value: float
    sentence: str
    """Without the limit, which the verdict adds."""


class _Chip:
    """The facts of a chip with what several checks derive from them, each computed once."""

    def __init__(self, facts: ChipFacts) -> None:
        self.facts = facts
        self.gsd_m = facts.gsd_m
        self.height_m = facts.height_m
        self.valid = facts.image.valid
        self.known: Bools = np.isfinite(facts.height_m)

    @cached_property
    def asked(self) -> Bools:
        """Where a height should be: photographed, and not left out by the recipe."""
        return self.valid if self.facts.left_out is None else self.valid & ~self.facts.left_out

    @cached_property
    def bands(self) -> dict[str, Floats]:
        """The bands by name, smoothed over a pixel so that a cue is of crowns and not of noise."""
        names = self.facts.colours
        if names is None:
            names = {3: ("red", "green", "blue"), 4: ("red", "green", "blue", "nir")}.get(len(self.facts.image.data), ())
        weight = ndimage.gaussian_filter(self.valid.astype(np.float64), 1.0)
        return {name: self._smooth(self.facts.image.data[i], weight) for i, name in enumerate(names)}

    def _smooth(self, band: NDArray[Any], weight: Floats) -> Floats:
        """A Gaussian of one pixel over the valid pixels only: padding does not darken the edge."""
        total = ndimage.gaussian_filter(np.where(self.valid, band, 0).astype(np.float64), 1.0)
        return _ratio(total, weight, self.valid)

    @cached_property
    def greenness(self) -> Floats | None:
        """NDVI where the bands allow it, else excess green; None without colours."""
        bands = self.bands
        if {"nir", "red"} <= bands.keys():
            return _ratio(bands["nir"] - bands["red"], bands["nir"] + bands["red"])
        return (
            excess_green(bands["red"], bands["green"], bands["blue"]) if {"red", "green", "blue"} <= bands.keys() else None
        )

    def green(self, least_index: float, least_ndvi: float) -> Bools | None:
        """Where plants are, by the limit that fits the bands; None without colours."""
        return None if self.greenness is None else self.greenness > (least_ndvi if "nir" in self.bands else least_index)

    @cached_property
    def brightness(self) -> Floats | None:
        """Mean of the visible bands as a share of the value range, or of the image's own brightest pixels where unknown."""
        visible = [band for name, band in self.bands.items() if name in {"red", "green", "blue", "pan"}]
        if not visible or not self.valid.any():
            return None
        mean = np.mean(visible, axis=0)
        if self.facts.value_range is not None:
            low, high = self.facts.value_range
        elif self.facts.image.data.dtype == np.uint8:
            low, high = 0.0, 255.0
        else:
            low, high = 0.0, float(np.percentile(mean[self.valid], 99)) or 1.0
        return np.asarray((mean - low) / (high - low))

    @cached_property
    def plane_deviation_m(self) -> Floats:
        """How far the heights around each pixel are from a plane; roofs have 0.02 to 0.1 m, crowns 0.5 and more."""
        return _plane_deviation_m(self.height_m, self.gsd_m)

    @cached_property
    def cues(self) -> dict[str, Floats]:
        """(row, col) of each of `CUES` that the bands allow."""
        cues = {} if self.greenness is None else {"greenness": self.greenness}
        if self.brightness is not None:
            grey = self.facts.image.data.mean(axis=0, dtype=np.float64)
            grey = np.where(self.valid, grey / max(float(grey[self.valid].mean()), 1e-9), 1.0)
            cues |= {"darkness": -self.brightness, "texture": _local_deviation(grey, _window_px(3.5, self.gsd_m))}
        return cues


def judge(facts: ChipFacts, settings: QualitySettings) -> Verdict:
    """Run every check that needs no other chip.

    Deterministic, and nothing is read or written: the arrays in `facts` are all it sees.
    """
    values: dict[str, float | None] = {}
    findings = []
    chip = _Chip(facts)
    for name, measure in _CHIP_CHECKS:
        check: _Check = getattr(settings, name)
        if not check.on:
            continue
        measured = measure(chip, check)
        values[name] = None if measured is None else measured.value
        if measured is not None:
            findings += _exceeded(name, check, measured)
    if settings.wrong_cover.on:
        values |= _cue_medians(chip, settings.image_label_disagreement)
    return Verdict(findings=tuple(findings), values=values)


def _exceeded(name: str, check: _Check, measured: _Measured) -> list[Finding]:
    assert not math.isnan(measured.value), f"{name} measured NaN: unknown is None"
    flag, drop = check.limits
    level: Level | None = "drop" if measured.value > drop else "flag" if measured.value > flag else None
    if level is None:
        return []
    limit = drop if level == "drop" else flag
    unit = f" {check.unit}" if check.unit else ""
    reason = f"{measured.sentence} (limit {limit:.3g}{unit})"
    return [Finding(check=name, level=level, value=measured.value, limit=limit, reason=reason)]


# --- the calendar --------------------------------------------------------------------------------------------------------


def leafless_days(day: date, latitude_deg: float) -> float:
    """How deep in the leafless season of its latitude a day is: days since leaf fall or until leaf-out, whichever is less.

    Negative inside the growing season. By Hopkins' bioclimatic law (1920) spring is four days later for a degree of
    latitude; leaf-out is set to day 100 at 35 degrees, and leaf fall to day 315 there and three days earlier a degree.
    Below 30 degrees there is no leafless season of the year (dry seasons are not known here): -183. Altitude, which
    delays spring by four days for 120 m, is unknown too.
    """
    latitude = abs(latitude_deg)
    if latitude < 30:
        return -183.0
    of_year = day.timetuple().tm_yday
    if latitude_deg < 0:
        of_year = (of_year + 182) % 365
    leaf_out = min(100 + 4 * (latitude - 35), 170.0)
    leaf_fall = max(315 - 3 * (latitude - 35), 250.0)
    if leaf_out <= of_year <= leaf_fall:
        return -min(of_year - leaf_out, leaf_fall - of_year)
    return min((of_year - leaf_fall) % 365, (leaf_out - of_year) % 365)


def _date_gap(chip: _Chip, _: DateGap) -> _Measured | None:
    days = chip.facts.days_apart
    return None if days is None else _Measured(days, f"image and LiDAR are {days:.0f} days apart")


def _leaf_off(chip: _Chip, check: LeafOff) -> _Measured | None:
    season = "on an unknown date"
    if chip.facts.image_date is not None and chip.facts.latitude_deg is not None:
        if leafless_days(chip.facts.image_date, chip.facts.latitude_deg) <= 0:
            return _Measured(0.0, "the image is from the growing season")
        season = f"in the leafless season ({chip.facts.image_date})"
    green = chip.green(check.green_index, check.green_ndvi)
    if green is None:
        return None
    # Roofs are green in no season.
    tall = chip.valid & (chip.height_m > check.tall_m) & (chip.plane_deviation_m > 0.25)
    if np.count_nonzero(tall) * chip.gsd_m**2 < 25.0:
        return None
    share = 1.0 - float(green[tall].mean())
    return _Measured(share, f"{share:.0%} of the pixels above {check.tall_m:g} m are not green, {season}")


def _leaf_off_lidar(chip: _Chip, _: LeafOffLidar) -> _Measured | None:
    if chip.facts.image_date is None or chip.facts.lidar_date is None or chip.facts.latitude_deg is None:
        return None
    days = leafless_days(chip.facts.lidar_date, chip.facts.latitude_deg)
    if leafless_days(chip.facts.image_date, chip.facts.latitude_deg) > 0:
        return _Measured(0.0, "the image is from the leafless season too")
    sentence = (
        f"the LiDAR of {chip.facts.lidar_date} was flown {days:.0f} days inside the leafless season, the image was not"
    )
    return _Measured(max(days, 0.0), sentence)


# --- heights -------------------------------------------------------------------------------------------------------------


def _void_fraction(chip: _Chip, _: VoidFraction) -> _Measured | None:
    if not chip.asked.any():
        return None
    share = 1.0 - float(chip.known[chip.asked].mean())
    return _Measured(share, f"{share:.0%} of the photographed pixels have no height")


def _height_range(chip: _Chip, check: HeightRange) -> _Measured | None:
    heights = chip.height_m[chip.known]
    if not heights.size:
        return None
    share = float(np.mean((heights < check.lowest_m) | (heights > check.highest_m)))
    sentence = (
        f"{share:.2%} of the heights are outside {check.lowest_m:g} to {check.highest_m:g} m, "
        f"which run from {heights.min():.1f} to {heights.max():.1f} m"
    )
    return _Measured(share, sentence)


def _height_spikes(chip: _Chip, check: HeightSpikes) -> _Measured | None:
    if not chip.known.any():
        return None
    reach = max(2, math.ceil(check.outer_m / chip.gsd_m))
    offset = np.arange(-reach, reach + 1)
    distance = np.hypot(*np.meshgrid(offset, offset, indexing="ij"))
    # On coarse pixels a return fills one; the ring begins behind it.
    down, across = np.nonzero((distance > max(check.inner_m / chip.gsd_m, 0.5)) & (distance <= reach))
    heights = np.pad(np.where(chip.known, chip.height_m, -np.inf), reach, constant_values=-np.inf)

    def neighbour(row: int, col: int) -> NDArray[Any]:
        rows, cols = chip.known.shape
        return heights[row : row + rows, col : col + cols]

    # Four pixels of the ring rule out nearly everything; only the rest is compared with all of it.
    corners = np.maximum.reduce(
        [neighbour(r, c) for r, c in ((0, reach), (2 * reach, reach), (reach, 0), (reach, 2 * reach))]
    )
    row, col = np.nonzero(chip.known & (chip.height_m > corners + check.excess_m))
    ring = heights[row[:, None] + down, col[:, None] + across]
    alone = (chip.height_m[row, col] > ring.max(axis=1, initial=-np.inf) + check.excess_m) & (
        np.isfinite(ring).mean(axis=1) >= 0.5  # at the edge of the data there is nothing to stand out from
    )
    share = float(np.count_nonzero(alone) / np.count_nonzero(chip.known))
    return _Measured(share, f"{share:.2%} of the heights stand {check.excess_m:g} m above all around them")


def _above_ground(chip: _Chip) -> NDArray[np.float32] | None:
    """The heights above 0.5 m, or None when there are too few to speak of a distribution."""
    heights = chip.height_m[chip.known & (chip.height_m > 0.5)]
    return heights if heights.size >= 100 else None


def _constant_heights(chip: _Chip, _: ConstantHeights) -> _Measured | None:
    heights = _above_ground(chip)
    if heights is None:
        return None
    centimetres, counts = np.unique(np.round(heights * 100), return_counts=True)
    most = int(counts.argmax())
    share = float(counts[most] / heights.size)
    return _Measured(share, f"{share:.0%} of the heights above ground are {centimetres[most] / 100:.2f} m")


def _whole_metres(chip: _Chip, _: WholeMetres) -> _Measured | None:
    heights = _above_ground(chip)
    if heights is None:
        return None
    share = float(np.mean(np.abs(heights - np.round(heights)) < 1e-3))
    return _Measured(share, f"{share:.0%} of the heights above ground are whole metres")


# --- stripes -------------------------------------------------------------------------------------------------------------

LEAST_STRIPED_PX: Final = 32
"""Shorter sides hold too few wavelengths to tell a stripe from a crown."""
LEAST_FREQUENCY: Final = 5
"""Cycles over the chip that make a period; below, a ring of frequencies also has too few cells for a median."""


def _striping(chip: _Chip, check: Striping) -> _Measured | None:
    if not chip.asked.any():
        return None
    rows, cols = (np.flatnonzero(chip.asked.any(axis=axis)) for axis in (1, 0))
    part = (slice(rows[0], rows[-1] + 1), slice(cols[0], cols[-1] + 1))
    known, asked = chip.known[part], chip.asked[part]
    if min(known.shape) < LEAST_STRIPED_PX:
        return None
    maps: list[tuple[str, NDArray[Any], Bools, float, str]] = []
    if known.mean() > 0.25:
        heights = np.where(known, chip.height_m[part], 0.0)
        maps.append(("heights", heights, known, check.amplitude_m, " m"))
        # Crowns are metres high and hide a stripe of decimetres, which clipping brings out; it also halves it, about.
        relief = np.clip(heights - ndimage.median_filter(heights, 7), -4 * check.amplitude_m, 4 * check.amplitude_m)
        maps.append(("clipped heights", relief, known, check.amplitude_m / 2, " m"))
    maps.append(("voids", (~known).astype(np.float64), asked, check.amplitude_share, ""))
    if chip.facts.density_per_m2 is not None:
        density = chip.facts.density_per_m2[part]
        counted = asked & np.isfinite(density)
        if counted.any() and density[counted].mean() > 0:
            maps.append(("pulse density", density / density[counted].mean(), counted, check.amplitude_share, " of the mean"))
    cycles = np.fft.fftfreq(max(known.shape), chip.gsd_m)  # per metre
    frequency = np.hypot(*np.meshgrid(cycles, cycles, indexing="ij"))
    left_out = (frequency > 1 / check.shortest_m) | (frequency < 1 / check.longest_m)
    photographed = False
    worst = _Measured(0.0, "no stripes")
    for what, values, where, least, unit in maps:
        if values[where].std() < least / math.sqrt(2):
            continue  # a sine of that amplitude has this deviation
        ratio, amplitude = stripe_ratio(values, where)
        ratio[amplitude < least] = 0.0
        if not photographed and ratio[~left_out].max(initial=0.0) > check.flag:
            photographed = True
            grey = chip.facts.image.data[(slice(None), *part)].mean(axis=0, dtype=np.float64)
            photograph, _ = stripe_ratio(grey, chip.valid[part])
            left_out |= ndimage.maximum_filter(photograph, 3, mode="wrap") > check.image_peak
        ratio[left_out] = 0.0
        peak = np.unravel_index(int(ratio.argmax()), ratio.shape)
        if ratio[peak] > worst.value:
            worst = _Measured(
                float(ratio[peak]),
                f"{what} have stripes {1 / frequency[peak]:.1f} m apart of amplitude {amplitude[peak]:.2g}{unit}, with "
                f"{ratio[peak]:.0f} times the power of other directions and wavelengths",
            )
    return worst


def stripe_ratio(values: NDArray[Any], where: Bools) -> tuple[Floats, Floats]:
    """How far each frequency of a map stands out among other directions and among its neighbours in wavelength.

    The map loses its plane and is tapered (Hann) to its known pixels. The power of each cell of the two-dimensional
    periodogram is divided by the median power of the ring of cells at the same distance from zero frequency, and by the
    median of the cells in the same direction at 0.5 to 0.8 and 1.25 to 1.6 times the frequency; the lesser counts. The
    first is what a stripe has and a crown has not; the second is what a stripe has and a straight edge (the border of a
    flight, a road through the forest) has not. In an isotropic random map the first is exponentially distributed, about
    10 at most for a chip of 100 pixels.

    Args:
        values: (row, col), anything where `where` is False.
        where: (row, col), at least one True.

    Returns:
        (ratio, amplitude), both (n, n) in the order of `numpy.fft.fftfreq(n)`, n the longer side; the ratio is 0 below
        `LEAST_FREQUENCY`, the amplitude is that of a sine wave in the unit of `values`.
    """
    side = max(values.shape)
    down, across = (np.linspace(-1, 1, n) for n in values.shape)
    terms = np.stack([np.ones(values.shape), *np.meshgrid(down, across, indexing="ij")])
    known = terms[:, where]
    plane = np.linalg.lstsq(known @ known.T, known @ values[where].astype(np.float64), rcond=None)[0]
    taper = np.outer(*(np.hanning(n + 2)[1:-1] for n in values.shape)) * where
    flat = np.where(where, values - np.tensordot(plane, terms, 1), 0.0)
    flat -= np.where(where, (flat * taper).sum() / taper.sum(), 0.0)
    power = np.abs(np.fft.fft2(flat * taper, (side, side))) ** 2
    cycles = np.fft.fftfreq(side, 1 / side)
    v, u = np.meshgrid(cycles, cycles, indexing="ij")
    ring = np.hypot(v, u).round().astype(np.intp)
    order = np.lexsort((power.ravel(), ring.ravel()))
    counts = np.bincount(ring.ravel())
    floor = power.ravel()[order][np.cumsum(counts) - counts + counts // 2][ring]
    usable = (ring >= LEAST_FREQUENCY) & (ring <= side // 2) & (floor > 0)
    ratio = np.divide(power, floor, out=np.zeros_like(power), where=usable)
    # The second median only matters where the first test is passed: some hundred cells.
    row, col = np.nonzero(ratio > 10)
    steps = np.array([0.5, 0.6, 0.7, 0.8, 1.25, 1.35, 1.45, 1.6])
    y, x = (np.rint(cycle[row, col][:, None] * steps).astype(np.intp) for cycle in (v, u))
    # The main lobe of the taper is two cells wide to each side.
    apart = np.hypot(y - v[row, col][:, None], x - u[row, col][:, None]) > 2.5
    apart &= np.maximum(np.abs(y), np.abs(x)) < side // 2
    beside = np.sort(np.where(apart, power[y % side, x % side], np.inf), axis=1)
    middle = apart.sum(axis=1) // 2
    usual = np.where(apart.any(axis=1), beside[np.arange(len(row)), np.minimum(middle, len(steps) - 1)], 0.0)
    ratio[row, col] = np.minimum(
        ratio[row, col], np.where(usual > 0, power[row, col] / np.where(usual > 0, usual, 1.0), np.inf)
    )
    return ratio, 2 * np.sqrt(power) / taper.sum()


# --- what the ground is --------------------------------------------------------------------------------------------------


def _ratio(part: Floats, whole: Floats, where: Bools | None = None) -> Floats:
    """Part by whole, 0 where `whole` is 0 or `where` is False."""
    usable = whole > 0 if where is None else where & (whole > 0)
    return np.asarray(np.divide(part, whole, out=np.zeros_like(part), where=usable))


def excess_green(red: Floats, green: Floats, blue: Floats) -> Floats:
    """(2g - r - b) / (r + g + b), -1 to 2, after Woebbecke et al. (1995); 0 where all are 0."""
    return _ratio(2 * green - red - blue, red + green + blue)


def _window_px(length_m: float, gsd_m: float) -> int:
    """The odd number of pixels next to a length, at least 3."""
    return max(3, 2 * round((length_m / gsd_m - 1) / 2) + 1)


def _local_deviation(values: Floats, side: int) -> Floats:
    """Standard deviation over `side` x `side` pixels around each."""
    mean = ndimage.uniform_filter(values, side)
    return np.asarray(np.sqrt(np.maximum(ndimage.uniform_filter(values**2, side) - mean**2, 0.0)))


def _plane_deviation_m(height_m: NDArray[np.float32], gsd_m: float) -> Floats:
    """Root mean square deviation from the best plane over 2.5 m around each pixel; inf where a height is missing."""
    side = _window_px(2.5, gsd_m)
    known = np.isfinite(height_m)
    heights = np.where(known, height_m, 0.0).astype(np.float64)
    offset = np.arange(side) - side // 2
    flat = np.full(side, 1.0 / side)
    spread = float((offset**2).mean())

    def over(values: Floats, down: Floats, across: Floats) -> Floats:
        result = ndimage.correlate1d(values, down, axis=0, mode="nearest")
        return np.asarray(ndimage.correlate1d(result, across, axis=1, mode="nearest"))

    # Least squares on a symmetric window: the slopes and the mean are uncorrelated, so their parts subtract.
    mean = over(heights, flat, flat)
    square = over(heights**2, flat, flat) - mean**2
    down, across = over(heights, offset / side, flat), over(heights, flat, offset / side)
    deviation = np.sqrt(np.maximum(square - (down**2 + across**2) / spread, 0.0))
    whole = ndimage.minimum_filter(known, side, mode="constant", cval=False)
    return np.where(whole, deviation, np.inf)


def _large(mask: Bools, least_m2: float, gsd_m: float) -> Bools:
    """The connected parts of `mask` of at least this area."""
    labels, count = ndimage.label(mask)
    sizes = np.bincount(labels.ravel(), minlength=count + 1)
    keep = sizes * gsd_m**2 >= least_m2
    keep[0] = False
    return np.asarray(keep[labels])


def _class_share(fraction: NDArray[np.float32], valid: Bools) -> float | None:
    counted = valid & np.isfinite(fraction)
    return float(fraction[counted].mean(dtype=np.float64)) if counted.any() else None


def _buildings(chip: _Chip, check: Buildings) -> _Measured | None:
    if chip.facts.building_fraction is not None:
        share = _class_share(chip.facts.building_fraction, chip.valid)
        return None if share is None else _Measured(share, f"{share:.0%} of the returns are of buildings (class 6)")
    known = chip.known & chip.valid
    green = chip.green(check.green_index, check.green_ndvi)
    if green is None or not known.any():
        return None
    high = known & (chip.height_m > check.tall_m) & ~green
    plane = high & (chip.plane_deviation_m < check.plane_m)
    plane = _large(ndimage.binary_opening(plane), check.least_m2 / 2, chip.gsd_m)
    # Windows at a wall are not plane, so the roof is found without its rim.
    rim = _window_px(2.5, chip.gsd_m) // 2 + 1
    roofs = _large(ndimage.binary_dilation(plane, iterations=rim) & high, check.least_m2, chip.gsd_m)
    share = float(roofs.sum() / known.sum())
    return _Measured(share, f"{share:.0%} of the pixels are high, plane and not green, like roofs")


def _water(chip: _Chip, check: Water) -> _Measured | None:
    if chip.facts.water_fraction is not None:
        share = _class_share(chip.facts.water_fraction, chip.valid)
        return None if share is None else _Measured(share, f"{share:.0%} of the returns are of water (class 9)")
    brightness, bands = chip.brightness, chip.bands
    if brightness is None:
        return None
    wet = chip.valid & (_local_deviation(brightness, _window_px(3.0, chip.gsd_m)) < check.smooth) & (brightness < check.dark)
    if "nir" in bands:
        wet &= bands["nir"] < bands["green"]  # McFeeters' water index above 0
    wet &= ~(chip.height_m >= check.low_m)  # also where there is no height
    share = float(_large(wet, check.least_m2, chip.gsd_m).sum() / chip.valid.sum())
    return _Measured(share, f"{share:.0%} of the pixels are dark, smooth and without a height, like water")


# --- agreement -----------------------------------------------------------------------------------------------------------

CUES: Final = ("greenness", "darkness", "texture")
"""What tells trees from the ground in a photograph, for most light and most seasons at least one of them."""


def auc(values: NDArray[Any], positive: Bools) -> float:
    """Area under the receiver operating characteristic: the chance that a positive has the larger value, ties half.

    Args:
        values: (n,).
        positive: (n,), with both True and False in it.
    """
    ranks = rankdata(values)
    n = np.count_nonzero(positive)
    return float((ranks[positive].sum() - n * (n + 1) / 2) / (n * (len(positive) - n)))


def _tall_share(chip: _Chip, tall_m: float) -> tuple[Bools, Bools, float] | None:
    """Where both image and height are known, where they are tall, and the share of the latter."""
    known = chip.known & chip.valid
    if np.count_nonzero(known) < 100:
        return None
    tall = known & (chip.height_m > tall_m)
    return known, tall, float(tall.sum() / known.sum())


def _disagreement(chip: _Chip, check: ImageLabelDisagreement) -> _Measured | None:
    parts, cues = _tall_share(chip, check.tall_m), chip.cues
    if parts is None or not cues or not check.least_share <= parts[2] <= 1 - check.least_share:
        return None
    known, tall, _ = parts
    areas = {name: auc(cue[known], tall[known]) for name, cue in cues.items()}
    best = max(areas, key=lambda name: areas[name])
    wrong = 1.0 - areas[best]
    sentence = f"{best}, the best of its signs, puts {wrong:.2f} of the pairs of pixels above and below {check.tall_m:g} m"
    return _Measured(wrong, f"image and heights disagree: {sentence} in the wrong order, where 0.5 is chance")


def _cue_medians(chip: _Chip, check: ImageLabelDisagreement) -> dict[str, float | None]:
    """Medians of the cues over the chip's tall and low pixels; None where there are too few."""
    parts, cues = _tall_share(chip, check.tall_m), chip.cues
    medians: dict[str, float | None] = {}
    for kind in ("tall", "low"):
        for name in CUES:
            median = None
            if parts is not None and name in cues:
                known, tall, share = parts
                where = tall if kind == "tall" else known & ~tall
                if (share if kind == "tall" else 1 - share) >= check.least_share:
                    median = float(np.median(cues[name][where]))
            medians[f"{kind}_{name}"] = median
    return medians


# --- registration --------------------------------------------------------------------------------------------------------


def _shift_applied(chip: _Chip, _: ShiftApplied) -> _Measured | None:
    if chip.facts.shift is None:
        return None
    length_m = math.hypot(chip.facts.shift.x_m, chip.facts.shift.y_m) if chip.facts.shift.applied else 0.0
    return _Measured(length_m, f"the heights were moved by {length_m:.1f} m") if math.isfinite(length_m) else None


def _shift_left(chip: _Chip, check: ShiftLeft) -> _Measured | None:
    if chip.facts.shift is None:
        return None
    length_m = math.hypot(chip.facts.shift.x_m, chip.facts.shift.y_m)
    gain = chip.facts.shift.score_after - chip.facts.shift.score_before
    if not (math.isfinite(length_m) and math.isfinite(gain)):
        return None
    if chip.facts.shift.applied or gain < check.least_gain:
        length_m = 0.0
    return _Measured(length_m, f"the heights seem {length_m:.1f} m off and were not moved ({chip.facts.shift.decision})")


_CHIP_CHECKS: Final[tuple[tuple[str, Callable[[_Chip, Any], _Measured | None]], ...]] = (
    ("date_gap", _date_gap),
    ("leaf_off", _leaf_off),
    ("leaf_off_lidar", _leaf_off_lidar),
    ("void_fraction", _void_fraction),
    ("striping", _striping),
    ("height_range", _height_range),
    ("height_spikes", _height_spikes),
    ("constant_heights", _constant_heights),
    ("whole_metres", _whole_metres),
    ("buildings", _buildings),
    ("water", _water),
    ("image_label_disagreement", _disagreement),
    ("shift_applied", _shift_applied),
    ("shift_left", _shift_left),
)


# --- among all chips -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class JudgedChip:
    """A chip with its own verdict and what places it among the others."""

    id: str
    site: str
    verdict: Verdict
    crs: str = ""
    """Name of the CRS of `bounds_m`; chips of different CRSs are taken for different places."""
    bounds_m: tuple[float, float, float, float] | None = None
    """(left, bottom, right, top) of its footprint; None never explains a duplicate."""


def judge_set(
    chips: Sequence[JudgedChip],
    settings: QualitySettings,
    *,
    duplicates: Iterable[tuple[str, str]] = (),
) -> dict[str, Verdict]:
    """The verdicts of all chips, with what only shows among them added.

    Args:
        chips: Every chip once.
        settings: The same as for `judge`.
        duplicates: Pairs of ids with the same content, as `canopy.tiler.fingerprint.near_duplicates` finds them; in any
            order, a pair once or twice. Pairs whose footprints overlap are windows of one place and not counted.

    Returns:
        Verdicts by id; it does not matter in which order chips and pairs come.
    """
    by_id = {chip.id: chip for chip in chips}
    assert len(by_id) == len(chips), f"{len(chips) - len(by_id)} ids occur twice"
    tables: dict[str, dict[str, _Measured]] = {
        "unlike_the_site": _unlike(chips, settings.unlike_the_site) if settings.unlike_the_site.on else {},
        "wrong_cover": _wrong_cover(chips, settings.wrong_cover) if settings.wrong_cover.on else {},
        "duplicate_chips": _twins(by_id, duplicates) if settings.duplicate_chips.on else {},
    }
    result = {}
    for chip in chips:
        # Judging a set twice is judging it once.
        findings = [finding for finding in chip.verdict.findings if finding.check not in tables]
        values = dict(chip.verdict.values)
        for name, table in tables.items():
            check: _Check = getattr(settings, name)
            if check.on:
                measured = table.get(chip.id)
                values[name] = None if measured is None else measured.value
                findings += [] if measured is None else _exceeded(name, check, measured)
        findings.sort(key=lambda finding: CHECKS.index(finding.check))
        result[chip.id] = Verdict(findings=tuple(findings), values=values)
    return result


def _twins(chips: Mapping[str, JudgedChip], duplicates: Iterable[tuple[str, str]]) -> dict[str, _Measured]:
    pairs = {tuple(sorted(pair)) for pair in duplicates if pair[0] != pair[1]}
    assert all(one in chips and other in chips for one, other in pairs), "a duplicate of a chip that is not in the set"
    others: dict[str, list[str]] = {chip: [] for chip in chips}
    for one, other in sorted(pairs):
        if not _overlap(chips[one], chips[other]):
            others[one].append(other)
            others[other].append(one)
    return {
        chip: _Measured(
            len(twins),
            f"the image is that of {', '.join(twins[:3])}{' and more' if len(twins) > 3 else ''}, {len(twins)} elsewhere"
            if twins
            else "the image occurs once",
        )
        for chip, twins in others.items()
    }


def _overlap(one: JudgedChip, other: JudgedChip) -> bool:
    if one.bounds_m is None or other.bounds_m is None or one.crs != other.crs:
        return False
    (left, bottom, right, top), (west, south, east, north) = one.bounds_m, other.bounds_m
    return left < east and west < right and bottom < north and south < top


class _Typical:
    """Median and 1.4826 MAD of a value over the chips of each site and over the set."""

    def __init__(self, chips: Sequence[JudgedChip], name: str, least_chips: int) -> None:
        by_site: dict[str, list[float]] = {}
        for chip in chips:
            if (value := chip.verdict.values.get(name)) is not None:
                by_site.setdefault(chip.site, []).append(value)
        self._sites = {site: self._of(values) for site, values in by_site.items() if len(values) >= least_chips}
        everything = [value for values in by_site.values() for value in values]
        self._set = self._of(everything) if len(everything) >= least_chips else None

    @staticmethod
    def _of(values: Sequence[float]) -> tuple[float, float]:
        centre = float(np.median(values))
        # At least 0.02 of cues and areas that run from 0 to 1: equal chips do not make an odd one of a hair.
        return centre, max(1.4826 * float(np.median(np.abs(np.asarray(values) - centre))), 0.02)

    def at(self, site: str) -> tuple[float, float, str] | None:
        """(median, scale, what with) for a chip of `site`; None where there is nothing to compare with."""
        if site in self._sites:
            return *self._sites[site], "the site"
        return None if self._set is None else (*self._set, "the set")


def _unlike(chips: Sequence[JudgedChip], check: UnlikeTheSite) -> dict[str, _Measured]:
    typical = _Typical(chips, "image_label_disagreement", check.least_chips)
    measured = {}
    for chip in chips:
        value, usual = chip.verdict.values.get("image_label_disagreement"), typical.at(chip.site)
        if value is None or usual is None:
            continue
        centre, scale, where = usual
        deviations = max((value - centre) / scale, 0.0) if value >= check.least_disagreement else 0.0
        measured[chip.id] = _Measured(
            deviations,
            f"image and heights disagree by {value:.2f}, {deviations:.1f} standard deviations more than usual in {where} "
            f"({centre:.2f})",
        )
    return measured


def _wrong_cover(chips: Sequence[JudgedChip], check: WrongCover) -> dict[str, _Measured]:
    typical = {
        f"{kind}_{cue}": _Typical(chips, f"{kind}_{cue}", check.least_chips) for kind in ("tall", "low") for cue in CUES
    }
    measured = {}
    for chip in chips:
        values = chip.verdict.values
        # Chips with both kinds are judged by their own contrast.
        kinds = [kind for kind in ("tall", "low") if any(values.get(f"{kind}_{cue}") is not None for cue in CUES)]
        if len(kinds) != 1:
            continue
        kind = kinds[0]
        other, towards = ("low", -1.0) if kind == "tall" else ("tall", 1.0)
        beyond, where = [], ""
        for cue in CUES:
            value, usual = values.get(f"{kind}_{cue}"), typical[f"{other}_{cue}"].at(chip.site)
            if value is not None and usual is not None:
                beyond.append(towards * (value - usual[0]) / usual[1])
                where = usual[2]
        if not beyond:
            continue
        deviations = max(min(beyond), 0.0)
        looks = "open ground" if kind == "tall" else "forest"
        measured[chip.id] = _Measured(
            deviations,
            f"labelled {kind} almost everywhere but looks more like {looks} than the usual {looks} of {where}, by "
            f"{deviations:.1f} standard deviations in every cue",
        )
    return measured

"""The page of a score says what the result says, for every kind of result, and no more than the intervals allow."""

import base64
import json
import re
import shutil
import subprocess
from dataclasses import dataclass
from html.parser import HTMLParser
from io import BytesIO
from itertools import pairwise

import numpy as np
import pytest
from matplotlib import colormaps
from matplotlib.image import imread

from canopy import page
from canopy.errors import OutputError
from canopy.metrics import CoverCounts, HeightSums, IntervalSums, block_bootstrap, class_index
from canopy.page import Drawn
from canopy.score import figures, report
from canopy.score.pictures import ErrorMapSums, Pictures, PlaceChip
from canopy.score.report import metres, percent, ratio, signed, some, verdict, write_report
from canopy.score.result import (
    BlockMeasures,
    Bootstrap,
    CompareGrid,
    Comparison,
    Coverage,
    CoverMeasures,
    Difference,
    EdgeMeasures,
    Estimate,
    FilterCount,
    Footprints,
    Group,
    Intervals,
    Leak,
    MapInfo,
    MapScore,
    Measures,
    ModelInfo,
    Place,
    ReferenceInfo,
    Registered,
    Residuals,
    Scatter,
    ScoreResult,
    Shift,
    Shot,
    StatedError,
    Versions,
)

SQUARE = 20
"""Side of a square of ground, pixels."""
LABELS = ("< 2 m", "2-5 m", "5-10 m", "10-15 m", "15-20 m", "20-30 m", ">= 30 m")
NONE = Estimate(value=None)


MODEL = ModelInfo(name="canopy-sample", version="2", weights_sha256="ab" * 32, licence="CC BY 4.0", sites=("MLBS", "TEAK"))


# --- results of a simulated map ------------------------------------------------------------------------------------------


def finite(value):
    return float(value) if np.isfinite(value) else None


def measures_of(map_m, reference_m, square, *, r2=True):
    """Measures of the pixels of these arrays (1-D), with intervals where they lie in two squares or more."""
    which = np.unique(square)
    sums = [HeightSums.of(map_m[square == k], reference_m[square == k]) for k in which]
    total = sum(sums, HeightSums())
    drawn = block_bootstrap(sums, generator=np.random.default_rng(1), resamples=50)[0] if len(which) > 1 else None

    def estimate(name):
        value = finite(getattr(total, name))
        if drawn is None or value is None:
            return Estimate(value=value)
        ends = drawn.interval(name)
        return Estimate(value=value, interval_95=ends if np.isfinite(ends).all() else None)

    return Measures(
        n=total.n, squares=len(which),
        reference_mean_m=Estimate(value=finite(reference_m.mean()) if total.n else None),
        prediction_mean_m=Estimate(value=finite(map_m.mean()) if total.n else None),
        mae_m=estimate("mae_m"), rmse_m=estimate("rmse_m"), bias_m=estimate("bias_m"),
        r2=estimate("r2") if r2 else NONE, nmae=Estimate(value=finite(total.nmae)),
    )  # fmt: skip


def coverage_of(label, lower_m, upper_m, reference_m, square):
    sums = IntervalSums.of(lower_m, upper_m, reference_m)
    inside = (reference_m >= lower_m) & (reference_m <= upper_m)
    which, at = np.unique(square, return_inverse=True)
    interval = None
    if len(which) > 1:
        hits, n = np.bincount(at, inside), np.bincount(at)
        draws = np.random.default_rng(2).integers(0, len(which), (50, len(which)))
        interval = tuple(np.quantile(hits[draws].sum(1) / n[draws].sum(1), [0.025, 0.975]).tolist())
    return Coverage(
        label=label, n=sums.n, n_below=sums.n_below, n_above=sums.n_above,
        coverage=Estimate(value=finite(sums.coverage), interval_95=interval),
        mean_width_m=Estimate(value=finite(sums.mean_width_m)),
    )  # fmt: skip


def scatter_of(map_m, reference_m, step=1.0, top=50.0):
    edges = np.arange(0, top + step, step)
    counts, _, _ = np.histogram2d(reference_m, map_m, (edges, edges))
    return Scatter(
        reference_edges_m=tuple(edges.tolist()), map_edges_m=tuple(edges.tolist()),
        counts=tuple(tuple(int(n) for n in row) for row in counts), n_outside=int(reference_m.size - counts.sum()),
    )  # fmt: skip


def residuals_of(map_m, reference_m, width=2.0):
    index, error = np.floor(reference_m / width).astype(int), map_m - reference_m
    made = []
    for k in np.unique(index):
        part = error[index == k]
        q = np.quantile(part, [0.05, 0.25, 0.5, 0.75, 0.95])
        made.append(Residuals(low_m=width * k, high_m=width * (k + 1), n=part.size, mean_m=part.mean(),
                              q05_m=q[0], q25_m=q[1], q50_m=q[2], q75_m=q[3], q95_m=q[4]))  # fmt: skip
    return tuple(made)


@dataclass(frozen=True, kw_only=True)
class Case:
    """What a result is of."""

    references: tuple[str, ...] = ("als",)
    maps: tuple[str, ...] = ("region",)
    side: int = 60
    leaked: bool = False
    intervals: bool = True
    calibration: str | None = "split-conformal by class of predicted height"
    unknown: bool = False
    squares: int = SQUARE
    name: str = "NEON_OSBS 2019"
    tall: bool = False
    """Whether any reference is 30 m tall; otherwise that class is empty."""
    nothing: bool = False
    """Whether no pixel could be compared."""
    places: bool = True
    """Whether the worst places have pictures."""


def heights(side, *, tall=False, seed=0):
    rng = np.random.default_rng(seed)
    rows, cols = np.mgrid[:side, :side]
    wave = 12 + 9 * np.sin(rows / 9) * np.cos(cols / 13) + rng.normal(0, 2.5, (side, side))
    reference = np.clip(wave, 0, 29.5).astype(np.float32)
    if tall:
        reference[:5, :5] = 34
    return reference, rng


def map_score(name, map_m, reference_m, square, case, *, shots=False):
    """The score of one map over all pixels of the arrays (1-D or 2-D); square: the number of each one's square."""
    lower, upper = np.maximum(map_m - 4.2, 0), map_m + 4.2
    chosen = slice(0) if case.nothing else slice(None)
    map_f, ref_f, sq = map_m.ravel().astype(float)[chosen], reference_m.ravel().astype(float)[chosen], square.ravel()[chosen]
    low_f, up_f = lower.ravel()[chosen], upper.ravel()[chosen]
    groups = []
    for k, label in enumerate(LABELS):
        here = class_index(ref_f) == k
        groups.append(Group(
            label=label, n_missing=0, measures=measures_of(map_f[here], ref_f[here], sq[here], r2=False),
            coverage=coverage_of(label, low_f[here], up_f[here], ref_f[here], sq[here]) if case.intervals else None,
        ))  # fmt: skip
    by_map = class_index(map_f)
    intervals = Intervals(
        how="The map's own bounds of each pixel", n_missing=0, overall=coverage_of("all", low_f, up_f, ref_f, sq),
        by_predicted_height=tuple(
            coverage_of(label, *(v[by_map == k] for v in (low_f, up_f, ref_f, sq))) for k, label in enumerate(LABELS)
        ),
        by_reference_height=tuple(group.coverage for group in groups),
        by_stated_error=(
            StatedError(label="2-4 m", n=900, stated_m=3.1, observed_m=3.4, coverage=Estimate(value=0.88)),
            StatedError(label="4-8 m", n=400, stated_m=5.2, observed_m=5.0, coverage=Estimate(value=0.91)),
            StatedError(label=">= 8 m", n=0, stated_m=None, observed_m=None, coverage=NONE),
        ),
    ) if case.intervals else None  # fmt: skip
    cover = [CoverCounts.of(map_f, ref_f, t) for t in (2.0, 5.0)]
    raw = measures_of(map_f, ref_f, sq)
    sample = tuple(
        Shot(lon_deg=-82 + 0.01 * (i % 7), lat_deg=29.6 + 0.001 * i, reference_m=r, map_m=m)
        for i, (m, r) in enumerate(zip(map_f, ref_f, strict=True))
    )
    worst = tuple(
        Place(
            lon_deg=-82.0 - i / 100, lat_deg=29.6 + i / 100, n=case.squares**2,
            bounds=(400_000 + 20.0 * i, 3_280_000 - 40 - 20 * i, 400_020 + 20.0 * i, 3_280_000 - 20.0 - 20 * i),
            mean_error_m=-6.25 + i, map_mean_m=10.5, reference_mean_m=16.75 - i,
        )
        for i in range(3)
    )  # fmt: skip
    return MapScore(
        name=name, resampled="area-weighted mean of 0.5 m pixels", n_missing=17, measures=raw,
        blocks=None if shots else BlockMeasures(side_m=30.0, n=6, r2=Estimate(value=0.91), rmse_m=Estimate(value=1.2),
                                                mae_m=Estimate(value=1.0)),
        edges=None if shots else EdgeMeasures(n=5000, error=Estimate(value=0.61), bias=Estimate(value=-0.33),
                                              reference_mean=Estimate(value=1.02)),
        cover=tuple(CoverMeasures(threshold_m=c.threshold_m, n_both=c.n_both, n_map_only=c.n_prediction_only,
                                  n_reference_only=c.n_reference_only, n_neither=c.n_neither,
                                  iou=Estimate(value=finite(c.iou))) for c in cover),
        by_height=tuple(groups),
        by_land_cover=() if shots else (Group(label="Evergreen <forest>", n_missing=3, measures=raw, coverage=None),),
        by_polygon=() if shots else (Group(label="Stand & 7", n_missing=0, measures=raw, coverage=None),),
        intervals=intervals, scatter=scatter_of(map_f, ref_f), residuals=residuals_of(map_f, ref_f),
        worst=() if shots or case.nothing else worst, shots=sample if shots else (),
        registered=None if shots else Registered(
            shifts=(Shift(site="OSBS.tif", x_m=0.8, y_m=-0.4, agreement_before=0.71, agreement_after=0.76, applied=True,
                          reason="the agreement rises by 0.05"),),
            measures=raw, blocks=None, edges=None),
    )  # fmt: skip


def result_of(case):
    """A result and its pictures."""
    infos = [
        MapInfo(
            name=name, path=f"/maps/{name}", kind="product" if name.startswith("ETH") else "canopy map",
            models=(MODEL,),
            lineage="unknown" if case.unknown else "known", gsd_m=0.5, crs="EPSG:32617", date="2019-05-14",
            statistic="mean height of the pixel", has_intervals=case.intervals,
            calibration=case.calibration,
        )
        for name in case.maps
    ]  # fmt: skip
    comparisons, pictures = [], Pictures(errors={}, places={})
    for number, kind in enumerate(case.references):
        reference, rng = heights(case.side, tall=case.tall)
        square = (np.arange(case.side) // case.squares)[:, None] * 1000 + (np.arange(case.side) // case.squares)
        scores = []
        for k, name in enumerate(case.maps):
            noise = rng.normal(0, 2 + 1.5 * k, reference.shape)
            mapped = np.clip(0.85 * reference + 1.2 + noise, 0, None).astype(np.float32)
            if kind == "als":
                scores.append(map_score(name, mapped, reference, square, case))
                error = ErrorMapSums(reference.shape, 1.0)
                holes = mapped - reference
                holes[30:40, 10:25] = np.nan
                error.add(holes, 0)
                pictures.errors[number, name] = error.map()
                if not case.places or case.nothing:
                    continue
                chip = PlaceChip(map_m=mapped[:40, :40], reference_m=reference[:40, :40],
                                 photograph=rng.integers(0, 255, (80, 80, 3), dtype=np.uint8))  # fmt: skip
                plain = PlaceChip(map_m=mapped[:30, :40], reference_m=reference[:30, :40])
                pictures.places[number, name] = (chip, plain, None)
            else:
                pick = (slice(None, None, 9), slice(None, None, 9))
                scores.append(map_score(name, mapped[pick], reference[pick], square[pick], case, shots=True))
        n = scores[0].measures.n
        comparisons.append(
            Comparison(
                title={"als": "Airborne lidar, 1 m", "gedi": "GEDI L2A shots"}[kind],
                reference=ReferenceInfo(
                    kind=kind, name=case.name, files=tuple(f"{case.name}_{i}.tif" for i in range(14)), dates=("2019-05-01",),
                    gap_days=13, statistic="mean of the canopy height model", gsd_m=1.0 if kind == "als" else None,
                    crs="EPSG:32617", mask="all pixels with a height", n_refused=4, n_negative=11, licence="CC0",
                ),
                reference_resampled="as it is",
                grid=CompareGrid(
                    crs="EPSG:32617", gsd_m=1.0, bounds=(400_000, 3_280_000 - case.side, 400_000 + case.side, 3_280_000),
                    bounds_deg=(-82.03, 29.64, -82.02, 29.65), shape=(case.side, case.side),
                    chosen="the coarser of map and reference", least_share=0.5,
                ) if kind == "als" else None,
                footprints=None if kind == "als" else Footprints(
                    shape="disc of 12 m radius", map_statistic="98th percentile", n_read=412,
                    removed=(FilterCount(name="quality flag", n=201), FilterCount(name="sensitivity below 0.95", n=30)),
                ),
                statistic="mean of the reference, mean of the map" if kind == "als" else "RH98, 98th percentile of the map",
                mask="where both are known", n_reference=n + 17, maps=tuple(scores),
                differences=tuple(difference_of(scores[0], other, case) for other in scores[1:]),
                land_cover="cover.tif, the class of the centre" if kind == "als" else None,
                polygons="stands.gpkg" if kind == "als" else None, notes=("The reference is three years older.",),
            )
        )  # fmt: skip
    leak = Leak(
        map=case.maps[0], model="canopy-sample", site="OSBS", reference="OSBS.tif",
        footprint_deg=(-82.1, 29.6, -81.9, 29.7), share=0.4,
        finding="40 % of OSBS.tif lies in the training ground OSBS of canopy-sample",
    )  # fmt: skip
    return ScoreResult(
        made="2026-11-22T11:00:00+00:00", command="canopy score region --reference OSBS.tif",
        versions=Versions(canopy="0.6", python="3.11", numpy="2.3", rasterio="1.4", gdal="3.9"), maps=tuple(infos),
        comparisons=tuple(comparisons), leaks=(leak,) if case.leaked else (),
        lineage="The model's training ground is known.",
        warnings=("one file was skipped", *([f"LEAK: {leak.finding}"] if case.leaked else [])),
        bootstrap=Bootstrap(resamples=2000, square_m=120.0, seed=0),
    ), pictures  # fmt: skip


def difference_of(first, other, case):
    def minus(name):
        a, b = getattr(first.measures, name), getattr(other.measures, name)
        if a.value is None or b.value is None:
            return NONE
        value = a.value - b.value
        return Estimate(value=value, interval_95=(value - 0.2, value + 0.2) if a.interval_95 else None)

    return Difference(
        first=first.name, other=other.name, **{name: minus(name) for name in ("mae_m", "rmse_m", "r2", "bias_m")}
    )


# --- reading the page ----------------------------------------------------------------------------------------------------


class Page(HTMLParser):
    """The elements, texts and tables of a page; fails on tags that do not match."""

    VOID = ("meta", "img", "br")

    def __init__(self, html):
        super().__init__()
        self.open, self.tags, self.texts, self.tables = [], [], [], {}
        self.caption, self.rows = None, None
        self.feed(html)
        assert not self.open, f"{self.open} are never closed"

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)
        if tag == "table":
            self.caption, self.rows = [], []
        elif tag == "tr":
            self.rows.append([])
        elif tag in ("th", "td"):
            self.rows[-1].append("")

    def handle_endtag(self, tag):
        assert self.open[-1:] == [tag], f"</{tag}> closes {self.open[-1:]}"
        self.open.pop()
        if tag == "table":
            caption = " ".join("".join(self.caption).split())
            assert caption not in self.tables, f"two tables are called {caption!r}"
            self.tables[caption] = self.rows

    def handle_data(self, data):
        if not self.open or self.open[-1] in ("script", "style"):
            return
        self.texts.append(data)
        if "caption" in self.open:
            self.caption.append(data)
        elif {"th", "td"} & set(self.open):
            # A value and its interval are two elements of one cell.
            self.rows[-1][-1] += data if "span" not in self.open else f" [{data}]"

    @property
    def text(self):
        return " ".join(" ".join(self.texts).split())

    def table(self, start):
        """Rows of the first table whose caption starts so, by their first cell."""
        found = [rows for caption, rows in self.tables.items() if caption.startswith(start)]
        assert found, f"no table {start!r} in {list(self.tables)}"
        heads, *rows = found[0]
        assert all(len(row) == len(heads) for row in rows), f"{start!r}: rows of other lengths than {heads}"
        return {row[0]: dict(zip(heads, row, strict=True)) for row in rows}


def cell(estimate, write=metres):
    ends = "" if estimate.interval_95 is None else " [{} to {}]".format(*map(write, estimate.interval_95))
    return write(estimate.value) + ends


def check_measures(row, m, *, r2=True):
    assert row["bias, m"] == cell(m.bias_m, signed)
    assert row["MAE, m"] == cell(m.mae_m)
    assert row["RMSE, m"] == cell(m.rmse_m)
    assert row["reference, mean m"] == cell(m.reference_mean_m)
    if r2:
        assert row["R²"] == cell(m.r2, ratio)


def check_numbers(html, result):
    """Every number of the tables is that of the result, as it is written there."""
    page = Page(html)
    for comparison in result.comparisons:
        about = report.capitalised(comparison.statistic)
        unit = "pixels" if comparison.grid else "shots"

        def table(start, about=about):
            return page.table(f"{start} {about};")

        for score in comparison.maps:
            row = table("All measures")[score.name]
            check_measures(row, score.measures)
            assert row[unit] == f"{score.measures.n:,}"
            assert row["not mapped"] == f"{score.n_missing:,}"
            for label, group in zip(PRETTY, score.by_height, strict=True):
                row = table(f"{score.name} by reference height")[label]
                check_measures(row, group.measures, r2=False)
                assert "R²" not in row
                assert row[unit] == f"{group.measures.n:,}"
                if group.coverage:
                    assert row["in the 90 % interval, %"] == cell(group.coverage.coverage, percent)
            for name, groups in (("land cover", score.by_land_cover), ("polygon", score.by_polygon)):
                for group in groups:
                    where = comparison.land_cover if name == "land cover" else comparison.polygons
                    check_measures(table(f"{score.name} by {name} ({where})")[group.label], group.measures)
            if score.intervals:
                rows = table(f"{score.name}: references inside the 90 % interval, by height in the map")
                for label, each in zip(
                    ("all", *PRETTY), (score.intervals.overall, *score.intervals.by_predicted_height), strict=True
                ):
                    assert rows[label]["inside, %"] == cell(each.coverage, percent)
                    assert rows[label][unit] == f"{each.n:,}"
                    assert rows[label]["below, %"] == percent(each.n_below / each.n if each.n else None)
                    assert rows[label]["mean width, m"] == cell(each.mean_width_m)
            if score.registered:
                rows = table(f"{score.name}: raw and registered")
                check_measures_raw = {"raw": score.measures, "registered": score.registered.measures}
                for name, m in check_measures_raw.items():
                    assert rows[name]["MAE, m"] == cell(m.mae_m)
        for difference in comparison.differences:
            row = table(f"Differences between maps on exactly the same {unit}")[
                f"{difference.first} minus {difference.other}"
            ]
            assert row["difference of MAE, m"] == cell(difference.mae_m, signed)
            assert row["of R²"] == cell(difference.r2, signed)


PRETTY = ("< 2 m", "2–5 m", "5–10 m", "10–15 m", "15–20 m", "20–30 m", "≥ 30 m")
PIXEL = bytes.fromhex(
    "89504e470d0a1a0a0000000d49484452000000010000000108060000001f15c4890000000d4944415478da63f8ffff3f0005fe02fea7c4a6ff0000000049454e44ae426082"
)


@pytest.fixture
def unrendered(monkeypatch):
    """Figures are not drawn, which takes a hundred times as long as the page: what it says does not depend on them."""

    def draw(name):
        return lambda first, *args, **kwargs: Drawn(name=name, title=name, alt=f"A figure of the kind {name}", png=PIXEL)

    for name in ("scatter", "residual", "error_map", "shot_map", "coverage", "stated"):
        monkeypatch.setattr(report, f"{name}_figure", draw(name))


CASES = {
    "one map, lidar": Case(),
    "shots only": Case(references=("gedi",)),
    "two maps, lidar and shots": Case(maps=("region", "ETH 10 m"), references=("als", "gedi")),
    "three maps": Case(maps=("region", "ETH 10 m", "other")),
    "leaked": Case(leaked=True),
    "without intervals": Case(intervals=False, calibration=None),
    "uncalibrated": Case(calibration="uncalibrated: 1.64 times the spread"),
    "unknown lineage": Case(unknown=True),
    "no class is empty": Case(tall=True),
    "one square": Case(squares=60, maps=("region", "ETH 10 m")),
    "nothing compared": Case(nothing=True, references=("als", "gedi"), maps=("region", "ETH 10 m")),
    "no pictures": Case(places=False),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_every_result_has_a_page_that_says_what_it_says(case, tmp_path, unrendered):
    result, pictures = result_of(case)
    path = write_report(result, tmp_path, None if case == CASES["no pictures"] else pictures)
    assert path == tmp_path / "report.html"
    assert [entry.name for entry in tmp_path.iterdir()] == ["report.html"]
    html = path.read_text(encoding="utf-8")
    check_numbers(html, result)
    text = Page(html).text
    assert not re.search(r"\b(nan|None|inf|Undefined|NaN)\b", text)
    assert ("Leak: trained on the ground" in text) == case.leaked
    assert ("Uncalibrated: no promise" in text) == (case in (CASES["without intervals"], CASES["uncalibrated"]))
    assert ("cannot be excluded" in text) == case.unknown
    assert ("is better than" in text) == (len(case.maps) > 1 and case.squares == SQUARE and not case.nothing)
    if case.leaked:
        assert text.count("40 % of OSBS.tif lies in the training ground OSBS of canopy-sample") == 1
    if case.squares > SQUARE:
        assert "intervals need at least two squares" in text
        assert "without an interval it is not claimed" in text
    if case.nothing:
        assert "No pixels could be compared, so nothing can be said of “region”." in text
        assert "No shots could be compared" in text


def test_another_number_is_found(tmp_path, unrendered):
    """Negative control of the comparison of page and result: each is a change of one digit that is shown."""
    result, pictures = result_of(CASES["two maps, lidar and shots"])
    html = write_report(result, tmp_path, pictures).read_text(encoding="utf-8")
    score = result.comparisons[0].maps[1]
    bias = score.by_height[2].measures.bias_m
    measures = score.by_height[2].measures.model_copy(
        update={"bias_m": bias.model_copy(update={"value": bias.value + 0.011})}
    )
    group = score.by_height[2].model_copy(update={"measures": measures})
    by_height = (*score.by_height[:2], group, *score.by_height[3:])
    comparison = result.comparisons[0]
    maps = (comparison.maps[0], score.model_copy(update={"by_height": by_height}))
    changed = result.model_copy(
        update={"comparisons": (comparison.model_copy(update={"maps": maps}), *result.comparisons[1:])}
    )
    with pytest.raises(AssertionError):
        check_numbers(html, changed)
    with pytest.raises(AssertionError):
        check_numbers(html.replace(f"{score.n_missing:,}</td>", "18</td>"), result)


def test_the_page_holds_everything_and_can_be_read_aloud(tmp_path, unrendered):
    result, pictures = result_of(CASES["two maps, lidar and shots"])
    html = write_report(result, tmp_path, pictures).read_text(encoding="utf-8")
    page = Page(html)
    assert not re.search(r"https?://|//[a-z]+\.|@import|url\(", re.sub(r"base64,[^\"]*", "", html))
    assert not [tag for tag, _ in page.tags if tag in ("link", "script", "iframe", "object")]
    images = [attrs for tag, attrs in page.tags if tag == "img"]
    assert all(attrs["src"].startswith("data:image/") and len(attrs["alt"]) > 20 for attrs in images)
    # Five figures of each map on pixels and on shots, and 3 + 3 panels and a photograph for each of two places.
    assert len(images) == 2 * 2 * 5 + 2 * (4 + 3)
    ids = [attrs["id"] for _, attrs in page.tags if "id" in attrs]
    assert len(ids) == len(set(ids))
    assert all(attrs["href"].removeprefix("#") in ids for tag, attrs in page.tags if tag == "a")
    levels = [int(tag[1]) for tag, _ in page.tags if re.fullmatch("h[1-6]", tag)]
    assert levels.count(1) == 1
    assert levels[0] == 1
    assert all(deeper <= level + 1 for level, deeper in pairwise(levels))
    assert ("html", {"lang": "en"}) in page.tags
    assert all("scope" in attrs for tag, attrs in page.tags if tag == "th")
    measured = [caption for caption in page.tables if "NEON_OSBS 2019" not in caption and caption[:4] != "Maps"]
    assert len(measured) > 20
    for caption in measured:
        assert "Bias = map minus reference." in caption
        assert ("pixels of 1 m" in caption) or ("disc of 12 m radius, 98th percentile of the map" in caption)
        assert "where both are known" in caption


def test_names_are_text_and_never_markup(tmp_path, unrendered):
    bad = '<script>alert("&")</script>'
    result, pictures = result_of(Case(maps=(bad, "<b>ETH</b>"), name=bad, leaked=True))
    html = write_report(result, tmp_path, pictures).read_text(encoding="utf-8")
    assert "<script" not in html
    assert "<b>ETH" not in html
    page = Page(html)
    assert bad in page.text
    check_numbers(html, result)
    assert "Evergreen <forest>" in page.text
    assert "Stand & 7" in page.text


# --- what is claimed -----------------------------------------------------------------------------------------------------


def estimate(value, *interval):
    return Estimate(value=value, interval_95=interval or None)


@pytest.mark.parametrize(
    ("mae", "words"),
    [
        (estimate(-0.5, -0.8, -0.2), "“A” is better than “B”: its mean absolute error is 0.50 m smaller"),
        (estimate(0.5, 0.2, 0.8), "“B” is better than “A”: its mean absolute error is 0.50 m smaller"),
        (estimate(-0.5, -1.1, 0.1), "Neither “A” nor “B” is shown to be better"),
        (estimate(-0.5, -1.0, 0.0), "Neither “A” nor “B” is shown to be better"),
        (estimate(0.5, -0.1, 1.1), "Neither “A” nor “B” is shown to be better"),
        (estimate(-0.5), "0.50 m smaller than that of “B” here; without an interval it is not claimed"),
        (estimate(None), "“A” and “B” cannot be compared"),
    ],
)
def test_a_map_is_better_only_where_the_interval_says_so(mae, words):
    none = estimate(0.0)
    said = verdict(Difference(first="A", other="B", mae_m=mae, rmse_m=none, r2=none, bias_m=none), 6)
    assert words in " ".join(said.split())
    assert ("is better than" in said) == (mae.interval_95 is not None and (mae.interval_95[1] < 0 or mae.interval_95[0] > 0))


@pytest.mark.parametrize(
    ("coverage", "words"),
    [
        (estimate(0.912, 0.905, 0.919), "held: 91.2 % of the references are inside them, 95 % interval 90.5 to 91.9 %"),
        (estimate(0.86, 0.80, 0.91), "held: 86.0 %"),
        (estimate(0.86, 0.84, 0.88), "did not hold: 86.0 %"),
        (estimate(0.95, 0.94, 0.96), "are wider than they promise: 95.0 %"),
        (estimate(0.86), "did not hold: 86.0 %"),
        (estimate(None), "whether its 90 % intervals hold is unknown"),
    ],
)
def test_intervals_hold_where_their_coverage_allows_it(coverage, words):
    width = estimate(7.0)
    overall = Coverage(label="all", n=10, n_below=1, n_above=0, coverage=coverage, mean_width_m=width)
    low = Coverage(label="2-5 m", n=10, n_below=4, n_above=0, coverage=estimate(0.6, 0.5, 0.7), mean_width_m=width)
    fine = Coverage(label="5-10 m", n=10, n_below=4, n_above=0, coverage=estimate(0.6, 0.5, 0.95), mean_width_m=width)
    intervals = Intervals(
        how="own", n_missing=0, overall=overall, by_predicted_height=(low, fine), by_reference_height=(), by_stated_error=()
    )
    said = report._held(intervals, "pixels")
    assert words in said[0]
    assert ("7.00 m wide" in said[0]) == (coverage.value is not None)
    if coverage.value is not None:
        assert said[1] == "They hold too few where the map says 2–5 m (60.0 %)."


def test_few_squares_claim_nothing(tmp_path, unrendered):
    none = estimate(0.0)
    difference = Difference(first="A", other="B", mae_m=estimate(-0.5, -0.8, -0.2), rmse_m=none, r2=none, bias_m=none)
    assert "is better than" in verdict(difference, 6)
    few = verdict(difference, 5)
    assert "is better than" not in few
    assert "from fewer than 6 squares of ground it is not claimed" in few
    result, pictures = result_of(Case(side=40, maps=("region", "ETH 10 m"), places=False))
    assert result.comparisons[0].maps[0].measures.squares == 4
    text = Page(write_report(result, tmp_path, pictures).read_text(encoding="utf-8")).text
    assert "Intervals from fewer than 6 squares of ground are too narrow to be trusted." in text
    assert "is better than" not in text


def test_a_bias_is_named_only_where_it_is_shown():
    assert "A bias is not shown: the mean error is +0.10 m (95 % interval −0.20 to +0.40 m)" in report._bias_said(
        estimate(0.1, -0.2, 0.4)
    )
    assert "0.30 m too low (bias −0.30 m" in report._bias_said(estimate(-0.3, -0.4, -0.2))
    assert "0.30 m too tall." in report._bias_said(estimate(0.3))


def test_numbers_are_written_with_what_they_need():
    assert [signed(value) for value in (1.234, -1.236, 0.0, -0.004, 0.004, None)] == [
        "+1.23",
        "−1.24",
        "0.00",
        "0.00",
        "0.00",
        "–",
    ]
    assert [metres(value) for value in (1.234, -0.5, None)] == ["1.23", "−0.50", "–"]
    assert (ratio(-0.126), percent(0.9449), percent(None)) == ("−0.13", "94.5", "–")
    assert some(["a", "b", "c"], 2) == "a, b and 1 more"
    assert some(["a", "b"], 2) == "a, b"
    assert [figures.short(n) for n in (0, 812, 999, 1000, 9949, 44_900, 999_700, 1_234_000)] == [
        "0", "812", "999", "1.0 k", "9.9 k", "45 k", "1.0 M", "1.2 M",
    ]  # fmt: skip


def test_a_folder_that_is_none(tmp_path):
    result, pictures = result_of(Case(side=20, squares=20))
    with pytest.raises(OutputError, match="is not a folder"):
        write_report(result, tmp_path / "nowhere", pictures)


# --- figures -------------------------------------------------------------------------------------------------------------


def picture_of(drawn):
    return imread(BytesIO(base64.b64decode(drawn.data.split(",")[1])))[..., :3]


def like(picture, colour):
    """Where a picture has about this colour, as mean (row, col) in shares of its sides, and how much of it."""
    here = (np.abs(picture - np.array(colour)) < 0.12).all(axis=2)
    rows, cols = np.nonzero(here)
    return here.mean(), (rows.mean() / here.shape[0], cols.mean() / here.shape[1]) if rows.size else (np.nan, np.nan)


def test_too_tall_is_red_too_low_is_blue_and_unknown_grey(monkeypatch):
    monkeypatch.setattr(page, "DPI", 40)
    result, _ = result_of(Case(side=60))
    error = np.full((60, 60), -9.0, np.float32)
    error[:, 30:] = 9.0
    error[40:] = np.nan
    sums = ErrorMapSums((60, 60), 1.0)
    sums.add(error, 0)
    scale = figures.error_scale([error])
    assert scale.reach_m == 10
    grid = result.comparisons[0].grid
    drawn = figures.error_map_figure("m", sums.map(), scale=scale, grid=grid)
    assert "means of" not in drawn.title
    picture = picture_of(drawn)
    blue, red = (colormaps["RdBu_r"](share)[:3] for share in (0.05, 0.95))
    for colour, (row, col) in ((blue, (0.3, 0.22)), (red, (0.3, 0.62)), ((0.741, 0.741, 0.741), (0.75, 0.42))):
        share, place = like(picture, colour)
        assert share > 0.1
        assert place == pytest.approx((row, col), abs=0.1)


def test_a_map_that_is_too_tall_lies_above_the_line(monkeypatch):
    monkeypatch.setattr(page, "DPI", 40)
    score = result_of(Case(side=40))[0].comparisons[0].maps[0]
    counts = np.zeros((50, 50), int)
    counts[2:6, 20:24] = 1000  # references of 2 to 6 m, mapped as 20 to 24 m
    scatter = score.scatter.model_copy(update={"counts": tuple(tuple(int(n) for n in row) for row in counts)})
    assert figures.scatter_top([scatter]) == 24
    drawn = figures.scatter_figure(
        score.model_copy(update={"scatter": scatter}), top_m=30, unit="pixels", reference="reference"
    )
    picture = picture_of(drawn)[:, :150]  # without the bar of colours
    share, (row, col) = like(picture, colormaps["cividis"](1.0)[:3])
    assert 0.001 < share < 0.1
    assert row < 0.45
    assert col < 0.4


def draw_all(case, folder, monkeypatch):
    drawn = []
    monkeypatch.setattr(figures, "Drawn", lambda **values: drawn.append(Drawn(**values)) or drawn[-1])
    result, pictures = result_of(case)
    write_report(result, folder, pictures)
    return drawn


ALL = ["error", "scatter", "residuals", "coverage", "stated"]


@pytest.mark.slow
def test_every_figure_has_something_on_it(tmp_path, monkeypatch):
    monkeypatch.setattr(page, "DPI", 40)
    drawn = draw_all(Case(references=("als", "gedi")), tmp_path, monkeypatch)
    assert [each.name.split("_")[0] for each in drawn] == [*ALL, "shots", *ALL[1:]]
    for each in drawn:
        picture = picture_of(each)
        assert min(picture.shape[:2]) > 100
        assert picture.std() > 0.03


@pytest.mark.parametrize("case", ["one map, lidar", "nothing compared"])
def test_figures_are_made_of_much_and_of_nothing(case, tmp_path, monkeypatch):
    monkeypatch.setattr(figures, "png_of", lambda figure: PIXEL)
    drawn = draw_all(CASES[case], tmp_path, monkeypatch)
    assert {each.name.split("_")[0] for each in drawn} == set(ALL)
    for each in drawn:
        assert not re.search(r"\b(nan|None|inf)\b", each.alt + each.title)
        if case == "nothing compared" and each.name.startswith("scatter"):
            assert "There is nothing to measure." in each.alt


def test_map_and_reference_of_a_place_are_on_one_scale_and_few_pixels():
    heights = np.linspace(0, 20, 300 * 300, dtype=np.float32).reshape(300, 300)
    heights[0, 0] = np.nan
    chip = PlaceChip(map_m=heights, reference_m=heights[::-1], photograph=np.zeros((900, 900, 3), np.uint8))
    panels = figures.place_pictures(chip, top_m=10.0, scale=figures.ErrorScale(reach_m=5.0))
    assert [panel.label for panel in panels] == ["imagery", "map", "reference", "map minus reference"]
    photograph, mapped, reference, error = (
        imread(BytesIO(base64.b64decode(panel.data.split(",")[1])), format=kind)[..., :3]
        for panel, kind in zip(panels, ("jpeg", "png", "png", "png"), strict=True)
    )
    assert max(photograph.shape) <= 2 * figures.CHIP_PX
    assert mapped.shape[0] <= figures.CHIP_PX
    assert np.array_equal(mapped[1:], reference[::-1][1:])
    assert mapped[0, 0] == pytest.approx(np.full(3, 0xBD / 255), abs=0.01)
    assert mapped[-1, -1] == pytest.approx(colormaps["viridis"](1.0)[:3], abs=0.01)
    assert error[-2, 9, 0] > 2 * error[-2, 9, 2]  # the map is too tall at the bottom: red
    assert error[1, 9, 2] > 2 * error[1, 9, 0]
    assert error[0, 0] == pytest.approx(np.full(3, 0xBD / 255), abs=0.01)
    assert chip.inset == 0.25


@pytest.mark.slow
def test_a_phone_shows_the_page_without_scrolling_sideways(tmp_path):
    browser = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if browser is None:
        pytest.skip("no Chromium on this machine")
    long = "a_region_with_a_very_long_name_of_a_folder_of_2026_11_22"
    result, pictures = result_of(Case(maps=(long, "ETH 10 m"), references=("als", "gedi")))
    path = write_report(result, tmp_path, pictures)
    # Windows of headless Chromium are at least 500 px wide; a frame may be narrower.
    (tmp_path / "frame.html").write_text(
        f"""<body><iframe src="{path.as_uri()}" style="width:380px;height:800px;border:0"></iframe><script>
        onload = () => {{ const d = document.querySelector("iframe").contentDocument;
        const wide = [...d.querySelectorAll("body *")]
          .filter(e => !e.closest(".scroll") && e.getBoundingClientRect().right > 381);
        document.body.textContent = JSON.stringify([d.documentElement.scrollWidth, wide.length, d.images.length]); }}
        </script></body>"""
    )
    done = subprocess.run(
        [browser, "--headless=new", "--no-sandbox", "--disable-gpu", "--allow-file-access-from-files",
         f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom", (tmp_path / "frame.html").as_uri()],
        capture_output=True, text=True, check=True, timeout=60,
    )  # fmt: skip
    width, wide, images = json.loads(re.search(r"<body>(.*)</body>", done.stdout, re.DOTALL)[1])
    assert width <= 380
    assert wide == 0
    assert images == 34

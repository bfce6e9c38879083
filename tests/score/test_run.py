"""`score_map` on maps that fit on a slip of paper, against plain NumPy, and in any pieces."""

import json
import math

import numpy as np
import pytest
from numpy.testing import assert_allclose

from canopy.errors import CanopyError, NoCrsError, OutputError, ScoreError
from canopy.model.blocks import BlockTable
from canopy.model.calibration import CalibrationTable
from canopy.model.tables import Calibrated, Member
from canopy.raster import write_raster
from canopy.region.records import WORK
from canopy.score import GivenMap, GivenReference, References, Strata, read_result, score_map
from canopy.score import compare as compare_module
from canopy.score.cells import bounds_deg
from canopy.score.table import lines
from tests.score.rasters import LEFT_M, TOP_M, UTM, grid, model, write, write_map

NAN = math.nan


def scored(*arguments, **options):
    return score_map(*arguments, **{"resamples": 20, **options})


def only(result):
    """The one comparison and the one map of a result."""
    (comparison,) = result.comparisons
    (score,) = comparison.maps
    return comparison, score


# --- by hand


MAP_M = np.array([[0, 3, 6, 12], [1, 4, NAN, 16], [0, 0, 8, 20], [2, 6, 10, 40]])
TRUE_M = np.array([[0, 2, 8, 10], [0, 4, 9, NAN], [0, 3, 8, 24], [2, 5, 13, 32]])
"""14 pixels have both. The errors are 0 1 -2 2 | 1 0 - - | 0 -3 0 -4 | 0 1 -3 8."""
ERROR_M = np.array([0, 1, -2, 2, 1, 0, 0, -3, 0, -4, 0, 1, -3, 8])
HALF_M = 2.0


@pytest.fixture(scope="module")
def slip(tmp_path_factory):
    """A map of 4 x 4 pixels and its reference."""
    folder = tmp_path_factory.mktemp("slip")
    lower = np.maximum(MAP_M - HALF_M, 0)
    out = write_map(folder / "map", MAP_M, lower, MAP_M + HALF_M, models=[model(footprints=())])
    return out, write(folder / "chm.tif", TRUE_M)


@pytest.fixture(scope="module")
def by_hand(slip):
    return scored(*slip)


def test_measures_by_hand(by_hand):
    comparison, score = only(by_hand)
    m = score.measures
    assert (m.n, score.n_missing, comparison.n_reference, m.squares) == (14, 1, 15, 1)
    assert m.mae_m.value == pytest.approx(25 / 14)
    assert m.bias_m.value == pytest.approx(1 / 14)
    assert m.rmse_m.value == pytest.approx(math.sqrt(109 / 14))
    true = TRUE_M[np.isfinite(TRUE_M) & np.isfinite(MAP_M)]
    assert m.reference_mean_m.value == pytest.approx(111 / 14)
    assert m.prediction_mean_m.value == pytest.approx(112 / 14)
    assert m.r2.value == pytest.approx(1 - 109 / ((true**2).sum() - 111**2 / 14))
    # Trees of 2 m and more: 2 8 10 4 3 8 24 2 5 13 32 with |errors| 1 2 2 0 3 0 4 0 1 3 8.
    assert m.nmae.value == pytest.approx((1 / 2 + 2 / 8 + 2 / 10 + 3 / 3 + 4 / 24 + 1 / 5 + 3 / 13 + 8 / 32) / 11)
    assert m.mae_m.interval_95 is None  # one square of ground says nothing of how sure it is
    assert comparison.square_m == 120


def test_tree_cover_by_hand(by_hand):
    two, five = only(by_hand)[1].cover
    assert (two.n_both, two.n_map_only, two.n_reference_only, two.n_neither) == (10, 0, 1, 3)
    assert two.iou.value == pytest.approx(10 / 11)
    assert (five.n_both, five.n_map_only, five.n_reference_only, five.n_neither) == (7, 0, 0, 7)


def test_classes_of_height_by_hand(by_hand):
    classes = {group.label: group for group in only(by_hand)[1].by_height}
    assert [group.measures.n for group in classes.values()] == [3, 4, 3, 2, 0, 1, 1]
    assert classes["< 2 m"].measures.mae_m.value == pytest.approx(1 / 3)
    assert classes["5-10 m"].n_missing == 1
    assert classes["5-10 m"].measures.bias_m.value == pytest.approx((-2 + 0 + 1) / 3)
    assert classes["15-20 m"].measures.mae_m.value is None
    assert all(group.measures.r2.value is None for group in classes.values())


def test_intervals_by_hand(by_hand):
    found = only(by_hand)[1].intervals
    # |error| <= 2 m is inside: all but -3, -4, -3 (the reference above) and 8 (below).
    assert (found.overall.n, found.overall.n_above, found.overall.n_below) == (14, 3, 1)
    assert found.overall.coverage.value == pytest.approx(10 / 14)
    # Below 2 m the lower end is 0 m: 0 1 0 0 -> widths 2 3 2 2, the others are 4 m.
    assert found.overall.mean_width_m.value == pytest.approx((2 + 3 + 2 + 2 + 10 * 4) / 14)
    assert [c.n for c in found.by_predicted_height] == [4, 3, 3, 2, 0, 1, 1]
    assert found.by_reference_height[2].coverage.value == 1.0
    stated = {s.label: s for s in found.by_stated_error}
    assert (stated["1-2 m"].n, stated["2-3 m"].n) == (4, 10)
    assert stated["2-3 m"].stated_m == pytest.approx(2.0)
    assert found.how.startswith("the map's own")


def test_edges_need_all_nine_of_a_neighbourhood(by_hand):
    """The hole of the map is in the neighbourhood of all four inner pixels."""
    edges = only(by_hand)[1].edges
    assert edges.n == 0
    assert edges.error.value is None


def test_scatter_and_residuals_by_hand(by_hand):
    score = only(by_hand)[1]
    counts = np.array(score.scatter.counts)
    assert counts.sum() == 14
    assert counts[8, 6] == 1  # a reference of 8 m, a map of 6 m
    assert counts[0, 0] == 2
    assert score.scatter.reference_edges_m[-1] == 33
    assert score.scatter.map_edges_m[-1] == 41
    low, *_, high = score.residuals
    assert (low.low_m, low.high_m, low.n) == (0, 2, 3)
    assert low.mean_m == pytest.approx(1 / 3)
    assert (high.low_m, high.n, high.mean_m) == (32, 1, 8)
    assert high.q50_m == pytest.approx(8, abs=0.1)


def test_what_a_table_must_say(by_hand, slip):
    comparison, _ = only(by_hand)
    text = "\n".join(lines(by_hand))
    for said in (
        "GSD 1 m",
        "map minus reference",
        "mean of the lidar canopy height model",
        "at least 50%",
        "1.79",
        "lineage",
    ):
        assert said in text, said
    assert comparison.reference.files == (str(slip[1].resolve()),)
    assert comparison.maps[0].resampled == comparison.reference_resampled == "not resampled: its pixels are the cells"
    assert comparison.grid.shape == (4, 4)
    assert by_hand.lineage == "map: trained on here"


def test_blocks_by_hand(tmp_path):
    """Two blocks of 30 m side by side whose means are 10 m and 20 m in the reference, 12 m and 19 m in the map."""
    true, found = (np.repeat([[a, b]], 30, axis=0).repeat(30, axis=1).astype(float) for a, b in ((10, 20), (12, 19)))
    rng = np.random.default_rng(0)
    noise = rng.normal(size=true.shape)
    for half in (slice(0, 30), slice(30, 60)):
        noise[:, half] -= noise[:, half].mean()
    _, score = only(scored(write_map(tmp_path / "map", found + noise), write(tmp_path / "chm.tif", true)))
    assert (score.blocks.n, score.blocks.side_m) == (2, 30)
    assert score.blocks.mae_m.value == pytest.approx(1.5, abs=1e-5)
    assert score.blocks.r2.value == pytest.approx(1 - 5 / 50, abs=1e-5)
    first, second = score.worst
    assert (first.mean_error_m, second.mean_error_m) == pytest.approx((2, -1), abs=1e-5)
    assert first.bounds == (LEFT_M, TOP_M - 30, LEFT_M + 30, TOP_M)
    assert first.n == 900
    assert -123.1 < first.lon_deg < -122.9


def test_intervals_of_means_by_hand(tmp_path):
    """The same two blocks, whose pixels are said to be good to 4 m and their means to three tenths of that, so to 1.2 m."""
    true, found = (np.repeat([[a, b]], 30, axis=0).repeat(30, axis=1).astype(float) for a, b in ((10, 20), (12, 19)))
    blocks = BlockTable(sides_m=(30.0,), lower_factor=(0.3,), upper_factor=(0.3,), blocks=(100,), sites=("A",))
    pixels = CalibrationTable(edges_m=(0.0,), lower_factor=(2.0,), upper_factor=(2.0,), pixels=(9000,), sites=("A",))
    one = Member(name="m", version="1", weights_sha256="0" * 64)
    tables = Calibrated(members=(one,), tta="none", tile_sets={}, pixels=pixels, blocks=blocks).model_dump(mode="json")
    chm = write(tmp_path / "chm.tif", true)
    _, score = only(scored(write_map(tmp_path / "map", found, found - 4, found + 4, intervals=tables), chm))
    held = score.blocks.coverage
    assert (held.n, held.n_below, held.n_above) == (2, 1, 0)
    assert held.mean_width_m.value == pytest.approx(2.4, abs=1e-5)
    _, untold = only(scored(write_map(tmp_path / "untold", found, found - 4, found + 4), chm))
    assert untold.blocks.coverage is None
    with pytest.raises(CanopyError, match=r"run.json holds intervals of another version \(.*\); make the map again"):
        scored(write_map(tmp_path / "odd", found, intervals={"format": 9}), chm)


def test_edges_of_a_ramp(tmp_path):
    """A map whose surface rises by 1 m a pixel where the reference's rises by 3: off by 2, and too smooth."""
    col = np.arange(12.0)[None].repeat(10, axis=0)
    _, score = only(scored(write_map(tmp_path / "map", col), write(tmp_path / "chm.tif", 3 * col)))
    assert score.edges.n == 8 * 10
    assert (score.edges.error.value, score.edges.bias.value, score.edges.reference_mean.value) == pytest.approx((2, -2, 3))


# --- several maps


def test_two_maps_are_compared_on_the_same_pixels(slip, tmp_path):
    other = np.where(np.isfinite(TRUE_M), TRUE_M + 1, NAN)
    other[0, 0] = NAN
    result = scored(*slip, against=[GivenMap(path=write(tmp_path / "other.tif", other), name="one off")])
    (comparison,) = result.comparisons
    first, second = comparison.maps
    assert first.measures.n == second.measures.n == 13
    assert (first.n_missing, second.n_missing) == (1, 1)
    assert second.measures.mae_m.value == pytest.approx(1)
    assert first.measures.mae_m.value == pytest.approx(25 / 13)
    assert comparison.differences[0].mae_m.value == pytest.approx(25 / 13 - 1)
    assert (comparison.differences[0].first, comparison.differences[0].other) == ("map", "one off")
    assert [g.n_missing for g in first.by_height] == [1, 0, 1, 0, 0, 0, 0]
    assert second.intervals is None


def test_differences_are_paired(tmp_path):
    """Two maps that fail at the same places: their difference is surer than either."""
    rng = np.random.default_rng(1)
    shape = (24, 240)
    hard = np.repeat(np.repeat(rng.gamma(1, 5, (1, 10)), 24, axis=1), 24, axis=0)
    true = rng.gamma(2, 6, shape)
    one, two = (np.maximum(true + rng.normal(0, hard + more), 0) for more in (0.0, 1.5))
    result = scored(
        write_map(tmp_path / "map", one, gsd_m=5.0), write(tmp_path / "chm.tif", true, 5.0), resamples=300,
        against=[write(tmp_path / "two.tif", two, 5.0)],
    )  # fmt: skip
    (comparison,) = result.comparisons
    assert comparison.maps[0].measures.squares == 10
    low, high = comparison.differences[0].mae_m.interval_95
    assert high < 0
    a, b = comparison.maps[0].measures.mae_m.interval_95
    assert high - low < 0.4 * (b - a)


def test_a_coarser_product_gets_a_comparison_of_its_own(slip, tmp_path):
    """On its pixels, where the map's are averaged, beside the one on the map's own."""
    coarse = write(tmp_path / "coarse.tif", np.array([[2.0, 10], [4, 20]]), 2.0)
    result = scored(*slip, against=[coarse])
    fine, both = result.comparisons
    assert (fine.grid.gsd_m, [m.name for m in fine.maps]) == (1, ["map"])
    assert (both.grid.gsd_m, [m.name for m in both.maps]) == (2, ["map", "coarse"])
    assert both.maps[0].resampled.startswith("means of 2 x 2 pixels")
    assert both.maps[1].resampled.startswith("not resampled")
    map_2m = [[2, 34 / 3], [2, 19.5]]
    true_2m = [[1.5, 9], [2.5, 77 / 4]]
    assert both.maps[0].measures.mae_m.value == pytest.approx(np.abs(np.subtract(map_2m, true_2m)).mean())
    assert both.maps[1].measures.bias_m.value == pytest.approx(np.mean(np.subtract([[2, 10], [4, 20]], true_2m)))
    assert both.maps[0].intervals.how.startswith("bounds of the map's pixels, averaged")


@pytest.mark.parametrize(
    ("statistic", "of"), [("max", np.max), ("p98", lambda block: np.percentile(block, 98)), ("mean", np.mean)]
)
def test_statistics_of_finer_pixels(tmp_path, statistic, of):
    rng = np.random.default_rng(2)
    true = rng.gamma(2, 6, (20, 30)).astype(np.float32)
    expected = np.array([[of(true[r : r + 10, c : c + 10].astype(float)) for c in (0, 10, 20)] for r in (0, 10)])
    product = write(tmp_path / "product.tif", expected.astype(np.float32), 10.0)
    comparison, score = only(scored(product, write(tmp_path / "chm.tif", true), statistic=statistic))
    assert score.measures.n == 6
    assert score.measures.mae_m.value == pytest.approx(0, abs=1e-5)
    assert {"max": "greatest", "p98": "98th", "mean": "mean"}[statistic] in comparison.statistic
    assert score.blocks.n == 1  # 6 of its 9 cells are known


# --- against plain NumPy, and in pieces


@pytest.fixture(scope="module")
def rough(tmp_path_factory):
    """A map of 5 m, a product, a reference of 2.5 m and classes, on twenty squares of ground, with gaps in all."""
    folder = tmp_path_factory.mktemp("rough")
    rng = np.random.default_rng(3)
    true = rng.gamma(2, 6, (60, 82)).astype(np.float32)
    found = np.maximum(true + rng.normal(0.5, 3, true.shape), 0).astype(np.float32)
    other = np.maximum(true + rng.normal(0, 4, true.shape), 0).astype(np.float32)
    for heights in (true, found, other):
        heights[rng.random(true.shape) < 0.05] = np.nan
    at = {"left": LEFT_M - 35, "top": TOP_M + 55}
    fine = np.repeat(np.repeat(true, 2, axis=0), 2, axis=1)
    classes = (np.arange(16)[:, None] + np.arange(20) > 14).astype(np.uint8) + 1
    return {
        "map": write_map(folder / "map", found, np.maximum(found - 4, 0), found + 4, 5.0, **at),
        "other": write(folder / "other.tif", other, 5.0, **at),
        "chm": write(folder / "chm.tif", fine, 2.5, **at),
        "classes": write(folder / "classes.tif", classes, 25.0, unit=None, nodata=None, **at),
        "arrays": (found, other, true),
    }  # fmt: skip


def measured(rough, **options):
    return scored(
        rough["map"], rough["chm"], against=[rough["other"]], strata=Strata(land_cover=rough["classes"]), **options
    )


@pytest.fixture(scope="module")
def whole(rough):
    """Its score, read in one piece."""
    return measured(rough)


def test_equals_numpy(rough, whole):
    found, other, true = (a.astype(float) for a in rough["arrays"])
    (comparison,) = whole.comparisons
    both = np.isfinite(found) & np.isfinite(other) & np.isfinite(true)
    assert comparison.reference_resampled.startswith("means of 2 x 2 pixels")
    for heights, score in zip((found, other), comparison.maps, strict=True):
        error = (heights - true)[both]
        m = score.measures
        assert m.n == both.sum()
        assert score.n_missing == (np.isfinite(true) & ~np.isfinite(heights)).sum()
        assert_allclose(
            [m.mae_m.value, m.bias_m.value, m.rmse_m.value, m.r2.value],
            [np.abs(error).mean(), error.mean(), np.sqrt((error**2).mean()), 1 - (error**2).mean() / true[both].var()],
            rtol=1e-12,
        )  # fmt: skip
        assert sum(g.measures.n for g in score.by_height) == both.sum()
        tall = both & (true >= 20) & (true < 30)
        assert score.by_height[5].measures.mae_m.value == pytest.approx(np.abs(heights - true)[tall].mean(), rel=1e-12)
        assert sum(g.measures.n for g in score.by_land_cover) == both.sum()
        quantiles = np.quantile(error[(true[both] >= 10) & (true[both] < 12)], [0.05, 0.5, 0.95])
        row = next(r for r in score.residuals if r.low_m == 10)
        assert_allclose([row.q05_m, row.q50_m, row.q95_m], quantiles, atol=0.12)
    held = np.abs((found - true)[both]) <= 4
    assert comparison.maps[0].intervals.overall.coverage.value == pytest.approx(held.mean())
    classes = np.arange(60)[:, None] // 5 + np.arange(82) // 5 > 14
    second = comparison.maps[1].by_land_cover[1]
    assert second.label == "class 2"
    assert second.measures.mae_m.value == pytest.approx(np.abs(other - true)[both & classes].mean(), rel=1e-12)


def test_in_pieces_as_in_one(rough, whole, monkeypatch):
    """Tiles of any size give the same score to the last bit, but for two curves whose sums follow the tiles."""
    monkeypatch.setattr(compare_module.count, "__kwdefaults__", {"tile_px": 24, "progress": None})
    pieces = measured(rough)

    curves = {"comparisons": {"__all__": {"maps": {"__all__": {"residuals", "intervals"}}}}}

    def plain(result):
        return result.model_dump(exclude={"made": True, **curves})

    assert plain(pieces) == plain(whole)
    for one, two in zip(pieces.comparisons[0].maps, whole.comparisons[0].maps, strict=True):
        for a, b in zip(one.residuals, two.residuals, strict=True):
            assert a.model_dump() == pytest.approx(b.model_dump(), rel=1e-12)
    assert pieces.comparisons[0].maps[0].intervals.overall == whole.comparisons[0].maps[0].intervals.overall


def test_moved_by_whole_squares_the_score_is_the_same(rough, tmp_path):
    found, _, true = rough["arrays"]
    near, far = (
        only(scored(write_map(tmp_path / f"{k}" / "map", found, gsd_m=5.0, left=LEFT_M + k * 240, top=TOP_M - 35),
                    write(tmp_path / f"{k}.tif", true, 5.0, left=LEFT_M + k * 240, top=TOP_M - 35)))[1]
        for k in (0, 1)
    )  # fmt: skip
    assert near.measures == far.measures
    assert near.blocks == far.blocks
    assert near.edges == far.edges


def test_too_many_squares_are_put_together(rough, whole, monkeypatch):
    monkeypatch.setattr("canopy.score.sums.MOST_SQUARES", 9)
    (a,), (b,) = measured(rough).comparisons, whole.comparisons
    assert (a.square_m, b.square_m) == (240, 120)
    assert a.maps[0].measures.squares < b.maps[0].measures.squares
    assert a.maps[0].measures.mae_m.value == pytest.approx(b.maps[0].measures.mae_m.value, rel=1e-12)
    assert a.maps[0].blocks.r2.value == pytest.approx(b.maps[0].blocks.r2.value, rel=1e-12)
    assert any("240 m instead of 120 m" in note for note in a.notes)


# --- leaks


def test_ground_that_trained_the_model_is_refused(slip, tmp_path):
    trained = model(sites=("elsewhere", "here"), footprints=((0, 0, 1, 1), (-124, 44, -122, 45)))
    leaky = write_map(tmp_path / "map", MAP_M, models=[trained])
    with pytest.raises(ScoreError, match=r"100.0% .*chm.tif lies on ground that trained trained 1: site here") as refused:
        scored(leaky, slip[1], out=tmp_path / "out")
    assert "\n" not in str(refused.value)
    assert "--allow-leak" in str(refused.value)
    assert not (tmp_path / "out").exists()
    result = scored(leaky, slip[1], allow_leak=True)
    assert result.leaked
    (leak,) = result.leaks
    assert (leak.site, leak.share) == ("here", pytest.approx(1))
    assert lines(result)[0].startswith("LEAK")
    assert any(warning.startswith("LEAK") for warning in result.warnings)


def test_ground_beside_the_training_ground_is_no_leak(slip, tmp_path):
    """Negative control: a footprint that ends short of the map, and one that only the reference's far end reaches."""
    beside = write_map(tmp_path / "map", MAP_M, models=[model(footprints=((-124, 44, -123.0, 45),))])
    assert not scored(beside, slip[1]).leaked
    wide = np.full((4, 40_000), 5.0)
    assert not scored(beside, write(tmp_path / "wide.tif", wide, left=LEFT_M - 39_990)).leaked


def test_part_of_the_ground_is_told(tmp_path):
    heights = np.full((10, 100), 5.0)
    # The map's ground spans 100 m from LEFT_M; a footprint over its eastern half, in degrees from the map's own bounds.
    west, south, east, north = bounds_deg(grid((10, 100)))
    half = model(footprints=(((west + east) / 2, south - 1, east + 1, north + 1),))
    leaky = write_map(tmp_path / "map", heights, models=[half])
    result = scored(leaky, write(tmp_path / "chm.tif", heights + 1), allow_leak=True)
    assert result.leaks[0].share == pytest.approx(0.5, abs=1e-6)


def test_a_map_without_lineage_says_so(slip, tmp_path):
    product = write(tmp_path / "product.tif", MAP_M)
    result = scored(product, slip[1])
    assert result.maps[0].lineage == "unknown"
    assert "lineage unknown" in result.lineage
    assert any("a leak cannot be excluded" in warning for warning in result.warnings)


def test_the_file_of_a_map_has_the_lineage_of_its_folder(slip, tmp_path):
    leaky = write_map(tmp_path / "map", MAP_M, models=[model()])
    with pytest.raises(ScoreError, match="lies on ground that trained"):
        scored(leaky / "height.tif", slip[1])
    copied = tmp_path / "copy.tif"
    copied.write_bytes((leaky / "height.tif").read_bytes())
    assert scored(copied, slip[1]).maps[0].lineage == "unknown"  # negative control: a copy alone tells nothing


# --- what can be wrong with the input


def refusal(*arguments, **options):
    with pytest.raises(CanopyError) as caught:
        scored(*arguments, **options)
    assert "\n" not in str(caught.value)
    return caught.value


def test_errors_are_one_line(slip, tmp_path):
    out, chm = slip
    far = write(tmp_path / "far.tif", TRUE_M, left=LEFT_M + 5000)
    assert "have no ground in common" in str(refusal(out, far))
    empty = write(tmp_path / "empty.tif", np.full((4, 4), NAN))
    assert "holds no known height where" in str(refusal(out, empty))
    hole = write(tmp_path / "hole.tif", np.where(np.isfinite(MAP_M), NAN, 5.0))
    assert "none is known in every map (map lacks 1)" in str(refusal(out, hole))
    assert isinstance(refusal(out, References()), ScoreError)
    assert "--gsd 0.5 m is finer than the 1 m" in str(refusal(out, chm, gsd_m=0.5))
    assert "mean, max, p98" in str(refusal(out, chm, statistic="median"))
    assert "--gsd -1" in str(refusal(out, chm, gsd_m=-1))
    assert "does not exist" in str(refusal(out, tmp_path / "none.tif"))
    assert "holds no finished map" in str(refusal(unfinished(tmp_path), chm))
    assert "neither a day nor a year" in str(refusal(GivenMap.parse(f"{out},date=soon"), chm))
    assert "whose heights are metres in band 1" in str(refusal(GivenMap.parse(f"{out},unit=0.1"), chm))


def unfinished(tmp_path):
    (tmp_path / "unfinished" / WORK).mkdir(parents=True)
    return tmp_path / "unfinished"


def test_units(slip, tmp_path):
    out, _ = slip
    feet = write(tmp_path / "feet.tif", TRUE_M / 0.3048, unit="ft")
    assert only(scored(out, feet))[1].measures.mae_m.value == pytest.approx(25 / 14, rel=1e-5)
    decimetres = write(tmp_path / "dm.tif", np.nan_to_num(TRUE_M * 10, nan=-1).astype(np.int16), unit=None, nodata=-1)
    assert "--reference-unit" in str(refusal(out, decimetres))
    given = References(als=GivenReference(paths=decimetres, unit_m=0.1))
    assert only(scored(out, given))[1].measures.mae_m.value == pytest.approx(25 / 14, rel=1e-5)
    centimetres = write(tmp_path / "cm.tif", TRUE_M * 100)
    assert "are above 120 m" in str(refusal(out, centimetres))
    assert "unit fathom" not in str(refusal(out, write(tmp_path / "fathom.tif", TRUE_M, unit="fathom")))


def test_scale_and_offset_of_a_file_are_applied(slip, tmp_path):
    import rasterio

    packed = write(tmp_path / "packed.tif", np.nan_to_num(MAP_M * 10 + 50, nan=0).astype(np.uint16), unit=None, nodata=0)
    with rasterio.open(packed, "r+") as file:
        file.scales, file.offsets = (0.1,), (-5.0,)
    assert only(scored(packed, slip[1]))[1].measures.mae_m.value == pytest.approx(25 / 14, rel=1e-6)


def test_what_is_no_height_is_refused(slip, tmp_path):
    """A value for nothing that the file does not declare, and an image among the heights."""
    filled = write(tmp_path / "filled.tif", np.nan_to_num(MAP_M, nan=-9999.0), nodata=None)
    assert "rio edit-info --nodata -9999 filled.tif" in str(refusal(filled, slip[1]))
    image = tmp_path / "chms" / "photo.tif"
    image.parent.mkdir()
    write_raster(image, np.ones((3, 4, 4), np.uint8), grid=grid((4, 4)))
    assert "colours and not heights" in str(refusal(slip[0], image.parent))


def test_a_product_in_another_unit_and_band(slip, tmp_path):
    product = write(tmp_path / "product.tif", np.nan_to_num(MAP_M * 10, nan=255).astype(np.uint16), unit=None, nodata=255)
    assert "unit" in str(refusal(product, slip[1]))
    given = GivenMap.parse(f"{product},unit=0.1,name=tenths,date=2019")
    assert (given.unit_m, given.name, given.date, given.path) == (0.1, "tenths", "2019", product)
    result = scored(given, slip[1])
    assert only(result)[1].measures.mae_m.value == pytest.approx(25 / 14, rel=1e-5)
    assert result.maps[0].date == "2019"
    assert "bands 1-1, not 2" in str(refusal(GivenMap(path=product, unit_m=0.1, band=2), slip[1]))


def test_impossible_reference_heights_are_unknown_and_counted(slip, tmp_path):
    odd = TRUE_M.copy()
    odd[0, 0], odd[0, 1] = -30, -1
    comparison, score = only(scored(slip[0], write(tmp_path / "odd.tif", odd)))
    assert (comparison.reference.n_refused, comparison.reference.n_negative) == (1, 1)
    assert score.measures.n == 13
    assert score.measures.mae_m.value == pytest.approx((25 + 2) / 13)  # 3 m against 0 m instead of 2 m, and one 0 less


def test_the_crs_of_a_reference_without_one(slip, tmp_path):
    import rasterio

    bare = tmp_path / "bare.tif"
    with rasterio.open(slip[1]) as source, rasterio.open(bare, "w", **{**source.profile, "crs": None}) as target:
        target.write(source.read())
    refused = refusal(slip[0], bare)
    assert isinstance(refused, NoCrsError)
    assert "--reference-crs" in str(refused)
    comparison, score = only(scored(slip[0], References(als=GivenReference(paths=bare, crs=UTM.to_string()))))
    assert score.measures.n == 14
    assert comparison.reference.crs_given
    other = References(als=GivenReference(paths=slip[1], crs="EPSG:32611"))
    assert "has the CRS" in str(refusal(slip[0], other))
    assert "is not known" in str(refusal(slip[0], References(als=GivenReference(paths=bare, crs="EPSG:0"))))


def test_the_gap_between_the_days(slip, tmp_path):
    dated = write(tmp_path / "dated.tif", TRUE_M, tags={"ACQUISITION_DATE": "2015-06-01"})
    result = scored(GivenMap(path=slip[0], date="2018-06-01"), dated)
    assert only(result)[0].reference.gap_days == 1096
    assert any("1096 days lie between" in warning for warning in result.warnings)
    close = scored(GivenMap(path=slip[0], date="2015-07-01"), dated)
    assert only(close)[0].reference.gap_days == 30
    assert not any("days" in warning for warning in close.warnings)
    unknown = scored(slip[0], dated)
    assert only(unknown)[0].reference.gap_days is None
    assert any("is not known" in warning for warning in unknown.warnings)


# --- files


def test_result_and_page_are_written_once(slip, tmp_path, monkeypatch):
    def page(result, folder, pictures):
        assert set(pictures.errors) == {(0, "map")}
        np.testing.assert_allclose(pictures.errors[0, "map"].error_m, MAP_M - TRUE_M)
        assert len(pictures.places[0, "map"]) == len(only(result)[1].worst)
        (folder / "report.html").write_text("page")

    monkeypatch.setattr("canopy.score.report.write_report", page)
    out = tmp_path / "score"
    result = scored(*slip, out=out, command="canopy score map")
    assert sorted(p.name for p in out.iterdir()) == ["report.html", "score.json"]
    assert read_result(out / "score.json") == result
    assert json.loads((out / "score.json").read_text())["sign"].startswith("error = map minus reference")
    with pytest.raises(OutputError, match="exists; choose another folder or pass --overwrite"):
        scored(*slip, out=out)


def test_a_broken_result_is_refused(tmp_path):
    with pytest.raises(OutputError, match="cannot be read"):
        read_result(tmp_path / "score.json")
    (tmp_path / "score.json").write_text('{"format": 1}')
    with pytest.raises(OutputError, match="is missing"):
        read_result(tmp_path / "score.json")

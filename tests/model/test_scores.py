"""Figures by site: those of all its pixels at once, whatever chips they come in, and claims that the figures bear."""

import dataclasses

import numpy as np
import pytest

from canopy.errors import ContractError
from canopy.metrics import LEAST_SQUARES, BlockSums, EdgeSums, HeightSums, by_class
from canopy.model.evaluate import ChipResult
from canopy.model.scores import FILE, Metrics, metrics_text, read_metrics, score_sites

EDGES = (2.0, 10.0)


def chip(
    site="A", *, row=0, col=0, shape=(60, 90), seed=0, error_m=2.0, forest_error_m=3.0, scores=True, gsd_m=0.5
) -> ChipResult:
    rng = np.random.default_rng([seed, row + 10**6, col + 10**6])
    true = rng.gamma(2, 5, shape).astype(np.float32)
    true[rng.random(shape) < 0.1] = np.nan
    mean, forest = (true + rng.normal(0, e, shape).astype(np.float32) for e in (error_m, forest_error_m))
    mean[rng.random(shape) < 0.01] = np.nan
    return ChipResult(
        id=f"{site}_r{row}_c{col}", site=site, crs="EPSG:32611", gsd_m=gsd_m, row_px=row, col_px=col, calibrates=False,
        scores=scores, counts=np.isfinite(true), true_m=true, mean_m=mean, spread_m=np.ones_like(true), forest_m=forest,
    )  # fmt: skip


def score(chips, **changes):
    (found,) = score_sites(chips, {"A": "unseen site"}, 9.0, edges_m=EDGES, seed=0, **changes)
    return found


def test_figures_are_those_of_all_pixels_at_once():
    chips = [chip(row=row, col=col) for row in (-60, 0, 60) for col in (0, 90, 180)]
    found = score([*chips, chip(row=600, scores=False)])
    mean, true, forest = (
        np.block([[getattr(c, name) for c in chips[k : k + 3]] for k in (0, 3, 6)])
        for name in ("mean_m", "true_m", "forest_m")
    )
    sums = HeightSums.of(mean, true)
    assert (found.chips, found.model.n, found.model.n_missing) == (9, sums.n, sums.n_missing)
    assert found.model.n_missing > 0
    for name in ("mae_m", "rmse_m", "bias_m", "r2", "nmae"):
        assert getattr(found.model, name) == pytest.approx(getattr(sums, name))
    assert found.random_forest.mae_m == pytest.approx(HeightSums.of(forest, true).mae_m)
    assert found.training_mean.bias_m == pytest.approx(9 - np.nanmean(true), rel=1e-4)
    assert found.training_mean.edge_bias == pytest.approx(-found.training_mean.edge_error)
    blocks = BlockSums.of(mean, true, block_m=30.0, gsd_m=0.5, row0=-60)
    assert (found.block_m, found.blocks) == (30.0, blocks.heights().n)
    assert found.model.block_r2 == pytest.approx(blocks.heights().r2)
    for figures, sums in zip(found.classes, by_class(mean, true, EDGES).classes, strict=True):
        assert (figures.n, figures.mae_m) == (sums.n, pytest.approx(sums.mae_m))
    low, high = found.model.mae_95_m
    assert low < found.model.mae_m < high


def test_edges_need_the_rim_of_a_chip_and_count_it_nowhere():
    whole = chip(shape=(60, 60))
    cut = slice(0, 31), slice(0, 60)
    rest = slice(29, 60), slice(0, 60)
    halves = []
    for part, inside in ((cut, slice(0, 30)), (rest, slice(1, None))):
        arrays = {f: getattr(whole, f)[part] for f in ("counts", "true_m", "mean_m", "spread_m", "forest_m")}
        counts = np.zeros_like(arrays["counts"])
        counts[inside] = arrays["counts"][inside]
        halves.append(dataclasses.replace(whole, **arrays | {"counts": counts}, row_px=part[0].start))
    found, one = score(halves), score([whole])
    assert found.model.n == one.model.n
    assert found.model.edge_error == pytest.approx(one.model.edge_error)
    assert one.model.edge_error == pytest.approx(EdgeSums.of(whole.mean_m, whole.true_m, gsd_m=0.5).error)


def test_order_of_chips_and_other_sites_change_nothing():
    chips = [chip(row=240 * k, seed=k) for k in range(7)]
    alone = score(chips)
    how = {"A": "unseen site", "B": "held-out blocks"}
    both = score_sites([chip("B"), *chips[::-1]], how, 9.0, edges_m=EDGES, seed=0)
    assert [s.site for s in both] == ["A", "B"]
    for name, value in alone.model.model_dump().items():
        assert both[0].model.model_dump()[name] == pytest.approx(value)
    assert score_sites(chips, how, 9.0, edges_m=EDGES, seed=1)[0].model.mae_95_m != alone.model.mae_95_m


def test_a_site_of_two_resolutions_has_two_scores():
    found = score_sites([chip(), chip(gsd_m=1.0)], {"A": "unseen site"}, 9.0, edges_m=EDGES, seed=0)
    assert [(s.site, s.gsd_m) for s in found] == [("A", 0.5), ("A", 1.0)]


@pytest.mark.parametrize(("shape", "squares"), [((80, 80), 1), ((240, 240), 1), ((241, 240), 4), ((480, 480), 9)])
def test_a_plot_is_one_observation_and_a_large_chip_is_cut(shape, squares):
    """Squares of 240 px; the chip lies across the corner of four of them."""
    whole = chip(row=-shape[0] // 3, col=-shape[1] // 3, shape=shape)
    whole.counts[:] = True
    found = score([whole])
    assert found.squares == squares
    assert found.model.n + found.model.n_missing == np.isfinite(whole.true_m).sum()


@pytest.mark.parametrize(
    ("error_m", "forest_error_m", "count", "verdict"),
    [
        (2.0, 3.0, 8, "better"),
        (3.0, 2.0, 8, "worse"),
        (3.0, 3.0, 8, "as good"),
        (2.0, 3.0, LEAST_SQUARES - 1, "too few blocks"),
        (2.0, 3.0, 1, "too few blocks"),
    ],
)
def test_better_is_said_only_where_the_interval_of_the_difference_leaves_out_zero(error_m, forest_error_m, count, verdict):
    chips = [chip(row=240 * k, seed=k, error_m=error_m, forest_error_m=forest_error_m) for k in range(count)]
    found = score(chips)
    assert found.squares == count
    assert found.against_forest("mae") == verdict
    assert found.against_forest("rmse") == verdict
    if verdict in {"better", "worse"}:
        low, high = found.mae_difference_95_m
        assert low <= found.model.mae_m - found.random_forest.mae_m <= high
        assert low * high > 0


def metrics(**changes) -> Metrics:
    table = {
        "steps": 5, "start": "trained from scratch", "folds": (), "training_mean_m": 9.0, "forest_px": 1, "coverage": (),
        "sources": ({"site": "B", "chips": 3, "image_source": "x", "lidar_source": "y", "licence": "z"},),
        "scores": tuple(score_sites([chip(), chip(row=300)], {"A": "unseen site"}, 9.0, edges_m=EDGES, seed=0)),
        "not_for": ("anything",),
    }  # fmt: skip
    return Metrics.model_validate(table | changes)


def test_metrics_come_back_from_their_file_to_the_bit(tmp_path):
    (tmp_path / FILE).write_text(metrics_text(metrics()))
    assert read_metrics(tmp_path) == metrics()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "is missing: the model was not scored here"),
        ("{", "the file: Invalid JSON"),
        ('{"format": 2}', "format: Input should be 1"),
        (metrics().model_dump_json().replace('"steps"', '"stpes"'), "steps: Field required"),
        (metrics().model_dump_json().replace('"steps":5', '"steps":NaN'), "steps"),
    ],
)
def test_a_wrong_file_is_refused_in_one_line(tmp_path, text, message):
    if text is not None:
        (tmp_path / "metrics.json").write_text(text)
    with pytest.raises(ContractError, match=message) as caught:
        read_metrics(tmp_path)
    assert "\n" not in str(caught.value)

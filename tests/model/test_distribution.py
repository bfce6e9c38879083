"""Moments, quantiles and abstention against plain float64 NumPy, and the published facts of the CHMv2 bins."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from canopy.errors import CanopyError
from canopy.model import distribution
from canopy.model.distribution import Bins, HeightDistribution

CHMV2 = Bins(count=256)
NORMALISATIONS = ("softmax", "mixlog", "linear")


def random_logits(seed, shape=(2, 64, 6, 5), scale=3.0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * scale


def oracle(logits, bins, normalisation):
    """(probabilities, mean, spread) in float64."""
    z = logits.numpy().astype(np.float64)
    if normalisation == "softmax":
        p = np.exp(z - z.max(axis=1, keepdims=True))
    else:
        p = np.maximum(z, 0) + {"mixlog": 1e-8, "linear": 0.1}[normalisation]
    p /= p.sum(axis=1, keepdims=True)
    h = bins.centres_m().numpy().astype(np.float64)[:, None, None]
    mean = (p * h).sum(axis=1)
    return p, mean, np.sqrt((p * (h - mean[:, None]) ** 2).sum(axis=1))


def test_the_mixlog_bins_are_those_of_chmv2():
    centres = CHMV2.centres_m()
    assert centres.mean().item() == pytest.approx(33.147, abs=5e-4)
    assert centres[:3].tolist() == pytest.approx([0.008, 0.0098, 0.0145], abs=5e-5)
    assert centres[-1].item() == pytest.approx(96.0)
    assert [int((centres < limit).sum()) for limit in (1, 5, 20, 30)] == [26, 58, 116, 142]


def test_building_the_bins_in_metres_equals_the_published_eighths():
    lin, t = np.linspace(0.001, 12.0, 256), np.linspace(1, 0, 256)
    published = 8 * (t * np.exp(np.linspace(np.log(0.001), np.log(12.0), 256)) + (1 - t) * lin)
    np.testing.assert_allclose(CHMV2.centres_m().numpy(), published, rtol=1e-6)


@pytest.mark.parametrize("spacing", ["mixlog", "linear"])
@pytest.mark.parametrize("count", [2, 64, 256])
def test_centres_ascend_inside_their_edges(spacing, count):
    bins = Bins(count=count, max_m=60.0, spacing=spacing)
    centres, edges = bins.centres_m(), bins.edges_m()
    assert (centres.diff() > 0).all()
    assert edges.shape == (count + 1,)
    assert ((edges[:-1] <= centres) & (centres <= edges[1:])).all()
    assert edges[0] == centres[0]
    assert edges[-1] == centres[-1]


@pytest.mark.parametrize(
    "wrong", [{"count": 1}, {"count": 8, "max_m": 0.001}, {"count": 8, "spacing": "log"}, {"count": 8, "m": 1}]
)
def test_impossible_bins_are_refused(wrong):
    with pytest.raises(ValidationError):
        Bins(**wrong)


@pytest.mark.parametrize("normalisation", NORMALISATIONS)
@given(seed=st.integers(0, 2**31), scale=st.sampled_from([0.01, 1.0, 30.0]))
def test_moments_are_those_of_numpy(normalisation, seed, scale):
    logits, bins = random_logits(seed, scale=scale), Bins(count=64)
    d = HeightDistribution.from_logits(logits, bins, normalisation)
    p, mean, spread = oracle(logits, bins, normalisation)
    np.testing.assert_allclose(d.probabilities().numpy(), p, atol=1e-6)
    np.testing.assert_allclose(d.mean_m.numpy(), mean, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(d.spread_m.numpy(), spread, rtol=1e-4, atol=1e-4)


def test_the_spread_of_a_tall_certain_pixel_is_small_and_not_nan():
    # E[h²] - mean² in float32 is wrong by centimetres here, and can be negative.
    logits = torch.full((1, 256, 1, 1), -1e4)
    logits[0, 250] = 0.0
    d = HeightDistribution.from_logits(logits, CHMV2, "softmax")
    assert d.spread_m.item() < 1e-4
    p, h = d.probabilities().flatten(), CHMV2.centres_m()
    logits[0, 251] = -9.0
    d, (_, _, spread) = HeightDistribution.from_logits(logits, CHMV2, "softmax"), oracle(logits, CHMV2, "softmax")
    assert d.spread_m.item() == pytest.approx(spread.item(), rel=1e-4)
    p = d.probabilities().flatten()
    naive = ((p * h.square()).sum() - (p * h).sum().square()).clamp_min(0).sqrt().item()
    assert naive != pytest.approx(spread.item(), rel=1e-3), "the control: the short formula should fail here"


@pytest.mark.parametrize("normalisation", NORMALISATIONS)
def test_results_do_not_depend_on_the_strips(normalisation, monkeypatch):
    logits, bins = random_logits(3, (2, 32, 37, 8)), Bins(count=32)
    whole = HeightDistribution.from_logits(logits, bins, normalisation)
    expected = [whole.mean_m, whole.spread_m, whole.quantile_m(0.3)]
    monkeypatch.setitem(distribution._STRIP_BYTES, "cpu", 4 * 2 * 32 * 8 * 5)
    cut = HeightDistribution.from_logits(logits, bins, normalisation)
    assert len(list(cut._strips())) == 8
    for a, b in zip([cut.mean_m, cut.spread_m, cut.quantile_m(0.3)], expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)  # sums are vectorised by position, so not to the last bit
    assert torch.equal(cut.abstain, whole.abstain)


@pytest.mark.parametrize("normalisation", NORMALISATIONS)
@given(seed=st.integers(0, 2**31), q=st.floats(0, 1))
def test_quantiles_invert_the_cumulative_distribution(normalisation, seed, q):
    logits, bins = random_logits(seed), Bins(count=64)
    height = HeightDistribution.from_logits(logits, bins, normalisation).quantile_m(q).numpy()
    p = oracle(logits, bins, normalisation)[0]
    edges = bins.edges_m().numpy().astype(np.float64)
    for b, r, c in np.ndindex(*height.shape):
        cdf = np.concatenate([[0.0], p[b, :, r, c].cumsum()])
        assert np.interp(height[b, r, c], edges, cdf) == pytest.approx(q, abs=1e-5)


def test_quantiles_of_a_certain_pixel_lie_in_its_bin_and_ends_are_the_outer_bins():
    bins = Bins(count=64)
    logits = torch.full((1, 64, 1, 1), -100.0)
    logits[0, 40] = 100.0
    d, edges = HeightDistribution.from_logits(logits, bins, "softmax"), bins.edges_m()
    assert d.quantile_m(0.5).item() == pytest.approx((edges[40] + edges[41]).item() / 2, rel=1e-5)
    flat = HeightDistribution.from_logits(torch.zeros(1, 64, 1, 1), bins, "softmax")
    assert flat.quantile_m(0.0).item() == pytest.approx(0.008)
    assert flat.quantile_m(1.0).item() == pytest.approx(96.0, rel=1e-5)


@pytest.mark.parametrize("q", [-0.1, 1.01, float("nan")])
def test_a_quantile_outside_0_to_1_is_refused(q):
    with pytest.raises(CanopyError, match="from 0 to 1"):
        HeightDistribution.from_logits(torch.zeros(1, 4, 1, 1), Bins(count=4), "softmax").quantile_m(q)


def test_chmv2_returns_the_mean_of_its_bins_where_it_abstains():
    logits = -torch.rand(1, 256, 1, 3)
    logits[0, 7, 0, 1] = 1e-3
    d = HeightDistribution.from_logits(logits, CHMV2, "mixlog")
    assert d.abstain.tolist() == [[[True, False, True]]]
    assert d.mean_m[0, 0, 0].item() == pytest.approx(33.147, abs=5e-4)
    assert d.mean_m[0, 0, 1].item() == pytest.approx(CHMV2.centres_m()[7].item(), abs=0.1)
    assert not HeightDistribution.from_logits(logits, CHMV2, "softmax").abstain.any()


@pytest.mark.parametrize("normalisation", NORMALISATIONS)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_a_logit_that_is_not_finite_abstains(normalisation, value):
    logits = random_logits(1, (1, 16, 1, 2))
    logits[0, 5, 0, 1] = value
    d = HeightDistribution.from_logits(logits, Bins(count=16), normalisation)
    assert d.abstain.tolist() == [[[False, True]]]
    if np.isnan(value):
        assert d.mean_m.isnan().tolist() == [[[False, True]]]
        assert d.spread_m.isnan().tolist() == [[[False, True]]]
        assert d.quantile_m(0.5).isnan().tolist() == [[[False, True]]]


@pytest.mark.parametrize("normalisation", NORMALISATIONS)
def test_moments_are_the_same_and_have_gradients_when_differentiated(normalisation):
    logits = random_logits(5, (1, 16, 3, 4)).requires_grad_()
    d = HeightDistribution.from_logits(logits, Bins(count=16), normalisation)
    plain = HeightDistribution.from_logits(logits.detach(), Bins(count=16), normalisation)
    torch.testing.assert_close(d.mean_m.detach(), plain.mean_m)
    torch.testing.assert_close(d.spread_m.detach(), plain.spread_m)
    (d.mean_m.sum() + d.spread_m.sum()).backward()
    assert logits.grad is not None
    assert logits.grad.isfinite().all()
    assert logits.grad.any()


@pytest.mark.parametrize("normalisation", NORMALISATIONS)
def test_the_memory_order_of_the_logits_does_not_matter(normalisation):
    logits = random_logits(4, (2, 64, 32, 32))
    logits[0, :, 3, 4] = -1.0
    rows_last = HeightDistribution.from_logits(logits, Bins(count=64), normalisation)
    bins_last = HeightDistribution.from_logits(logits.to(memory_format=torch.channels_last), Bins(count=64), normalisation)
    torch.testing.assert_close(bins_last.mean_m, rows_last.mean_m, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(bins_last.spread_m, rows_last.spread_m, rtol=1e-5, atol=1e-5)
    assert torch.equal(bins_last.abstain, rows_last.abstain)


def test_half_precision_logits_are_computed_in_float32():
    logits = random_logits(2).bfloat16()
    d = HeightDistribution.from_logits(logits, Bins(count=64), "softmax")
    same = HeightDistribution.from_logits(logits.float(), Bins(count=64), "softmax")
    assert d.mean_m.dtype == d.spread_m.dtype == torch.float32
    assert torch.equal(d.mean_m, same.mean_m)
    assert torch.equal(d.spread_m, same.spread_m)


def test_logits_made_in_inference_mode_can_be_read_outside():
    with torch.inference_mode():
        d = HeightDistribution.from_logits(torch.randn(1, 8, 4, 4), Bins(count=8), "mixlog")
    assert d.mean_m.shape == d.spread_m.shape == d.abstain.shape == d.quantile_m(0.5).shape == (1, 4, 4)


def test_logits_of_another_bin_count_break_an_invariant():
    with pytest.raises(AssertionError, match="8 logits per pixel for 16 bins"):
        HeightDistribution.from_logits(torch.zeros(1, 8, 2, 2), Bins(count=16), "softmax")

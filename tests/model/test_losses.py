"""The losses against NumPy written from the formulas, and the rule that invalid pixels do not exist."""

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.multiprocessing
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from canopy.model import losses
from canopy.model.losses import (
    LossConfig,
    PatchGradientConfig,
    charbonnier,
    curriculum,
    histogram_cross_entropy,
    patch_gradient,
    ramp,
    silog,
)

CENTRES_M = torch.tensor([0.0, 0.5, 1.5, 4.0, 10.0, 25.0, 64.0], dtype=torch.float64)


def scene(seed: int = 0, shape: tuple[int, int, int] = (2, 24, 20)) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    rng = np.random.default_rng(seed)
    p = torch.from_numpy(rng.gamma(1.5, 6.0, shape))
    t = torch.from_numpy(rng.gamma(1.5, 6.0, shape))
    valid = torch.ones(shape, dtype=torch.bool)
    valid[0, 3:9, 4:15] = False
    valid[-1, :, 17:] = False
    return p, t, valid


def bins(seed: int = 0, shape: tuple[int, int, int] = (2, 24, 20)) -> torch.Tensor:
    logits = torch.from_numpy(np.random.default_rng(seed).normal(size=(shape[0], len(CENTRES_M), *shape[1:])))
    return logits.log_softmax(dim=1)


TERMS = {
    "silog": silog,
    "charbonnier": charbonnier,
    "patch_gradient": patch_gradient,
    "histogram": lambda p, t, v: histogram_cross_entropy(
        -((p[:, None] - CENTRES_M[None, :, None, None].to(p)) ** 2) / 50, t, v, CENTRES_M.to(p)
    ),
}


# --- oracles -------------------------------------------------------------------------------------------------------------


def test_silog_equals_numpy():
    p, t, valid = scene()
    g = np.log(p[valid].numpy() + 1e-3) - np.log(t[valid].numpy() + 1e-3)
    assert float(silog(p, t, valid)) == pytest.approx(np.sqrt(g.var() + 0.15 * g.mean() ** 2), rel=1e-12)


def test_silog_forgives_scale_only_as_far_as_its_mean_weight_says():
    _, t, valid = scene()
    # Offsets aside, p = e t has g = 1 everywhere.
    assert float(silog(np.e * t, t, valid, offset_m=1e-12)) == pytest.approx(np.sqrt(0.15), rel=1e-6)
    assert float(silog(np.e * t, t, valid, offset_m=1e-12, mean_weight=0.0)) == pytest.approx(0.0, abs=1e-4)


def test_silog_without_variance_is_its_mean_part():
    p, t, valid = scene()
    g = np.log(p[valid].numpy() + 1e-3) - np.log(t[valid].numpy() + 1e-3)
    assert float(silog(p, t, valid, variance=False)) == pytest.approx(np.sqrt(0.15) * abs(g.mean()), rel=1e-12)
    config = LossConfig(silog_variance_from=0.1)
    assert [curriculum(step, 100, config).silog_variance for step in (0, 9, 10, 99)] == [False, False, True, True]


def test_charbonnier_equals_numpy():
    p, t, valid = scene()
    expected = np.sqrt((p[valid].numpy() - t[valid].numpy()) ** 2 + 0.3**2).mean()
    assert float(charbonnier(p, t, valid, epsilon_m=0.3)) == pytest.approx(expected, rel=1e-12)


def test_histogram_cross_entropy_equals_numpy():
    _, t, valid = scene()
    t[0, 0, 0] = 80.0  # beyond the last centre counts as the last
    log_p = bins()
    centres = CENTRES_M.numpy()
    expected = []
    for b, r, c in np.argwhere(valid.numpy()):
        target = np.array([np.interp(min(float(t[b, r, c]), 64.0), centres, row) for row in np.eye(len(centres))])
        assert target @ centres == pytest.approx(min(float(t[b, r, c]), 64.0))
        expected.append(-(target * log_p[b, :, r, c].numpy()).sum())
    assert float(histogram_cross_entropy(log_p, t, valid, CENTRES_M)) == pytest.approx(np.mean(expected), rel=1e-12)


def test_histogram_cross_entropy_is_least_for_its_own_target():
    t = torch.full((1, 1, 1), 7.0, dtype=torch.float64)
    valid = torch.ones_like(t, dtype=torch.bool)
    logits = torch.zeros(1, len(CENTRES_M), 1, 1, dtype=torch.float64, requires_grad=True)
    optimiser = torch.optim.Adam([logits], lr=0.1)
    for _ in range(600):
        optimiser.zero_grad()
        histogram_cross_entropy(logits.log_softmax(dim=1), t, valid, CENTRES_M).backward()
        optimiser.step()
    p = logits.softmax(dim=1)[0, :, 0, 0].detach()
    assert float(p @ CENTRES_M) == pytest.approx(7.0, abs=0.05)
    assert p[3].item() == pytest.approx(0.5, abs=0.01)
    assert p[4].item() == pytest.approx(0.5, abs=0.01)


def numpy_patch_gradient(p: np.ndarray, t: np.ndarray, config: PatchGradientConfig) -> float:
    """Algorithm 1 for one fully valid image, pixel by pixel and with slices only."""
    total = 0.0
    for cell in config.scales:
        maps = []
        for h in (p, t):
            rows, cols = h.shape[0] // cell, h.shape[1] // cell
            x = h[: rows * cell, : cols * cell].reshape(rows, cell, cols, cell).mean(axis=(1, 3))
            x = np.log(np.maximum(x, config.floor_m))
            x = x - x.mean()
            gx = (x[:-2, 2:] + 2 * x[1:-1, 2:] + x[2:, 2:]) - (x[:-2, :-2] + 2 * x[1:-1, :-2] + x[2:, :-2])
            gy = (x[2:, :-2] + 2 * x[2:, 1:-1] + x[2:, 2:]) - (x[:-2, :-2] + 2 * x[:-2, 1:-1] + x[:-2, 2:])
            m = np.sqrt(gx**2 + gy**2 + 1e-8)
            r = np.zeros((m.shape[0] - 2, m.shape[1] - 2))
            for i, j in np.ndindex(*r.shape):
                near = m[i : i + 3, j : j + 3].ravel()
                high = np.exp((near - near.max()) / config.temperature)
                low = np.exp(-(near - near.min()) / config.temperature)
                r[i, j] = (high * near).sum() / high.sum() - (low * near).sum() / low.sum()
            maps.append((gx, gy, m, r))
        (gx_p, gy_p, m_p, r_p), (gx_t, gy_t, m_t, r_t) = maps
        cosine = (gx_p * gx_t + gy_p * gy_t) / ((m_p + config.epsilon) * (m_t + config.epsilon))
        total += (
            config.magnitude * np.abs(m_p - m_t).mean()
            + config.range * np.abs(r_p - r_t).mean()
            + config.direction * (1 - np.clip(cosine, -1, 1)).mean()
        )
    return total / len(config.scales)


def test_patch_gradient_equals_numpy():
    p, t, _ = scene(shape=(1, 27, 22))
    config = PatchGradientConfig()
    valid = torch.ones_like(p, dtype=torch.bool)
    assert float(patch_gradient(p, t, valid, config)) == pytest.approx(
        numpy_patch_gradient(p[0].numpy(), t[0].numpy(), config), rel=1e-9
    )


def test_diagonal_gradients_are_those_of_the_turned_pattern():
    """A slope along a diagonal has no gradient across it, and the steepest along it."""
    rows, cols = torch.meshgrid(torch.arange(9.0), torch.arange(9.0), indexing="ij")
    gradient = losses._sobel((rows + cols)[None], diagonal=True)[0, :, 1:-1, 1:-1]
    assert torch.equal(gradient.abs().amax(dim=(1, 2)), torch.tensor([8.0, 8.0, 0.0, 12.0]))
    assert torch.equal(losses._sobel((rows + cols)[None], diagonal=False)[0, :, 1:-1, 1:-1], gradient[:2])
    p, t, valid = scene()
    plain, diagonal = (patch_gradient(p, t, valid, PatchGradientConfig(diagonal=d)) for d in (False, True))
    assert float(plain) != float(diagonal)


def test_patch_gradient_of_a_masked_border_is_that_of_the_inside():
    p, t, _ = scene(shape=(1, 24, 24))
    valid = torch.zeros_like(p, dtype=torch.bool)
    valid[:, 4:20, 8:24] = True
    inside = (slice(None), slice(4, 20), slice(8, 24))
    assert float(patch_gradient(p, t, valid)) == pytest.approx(float(patch_gradient(p[inside], t[inside], valid[inside])))


def test_patch_gradient_prefers_sharp_crowns_to_blurred_ones():
    rows, cols = torch.meshgrid(torch.arange(32.0), torch.arange(32.0), indexing="ij")
    t = (20.0 * (((rows // 8) + (cols // 8)) % 2))[None]
    blurred = torch.nn.functional.avg_pool2d(t[:, None], 5, stride=1, padding=2)[:, 0]
    valid = torch.ones_like(t, dtype=torch.bool)
    assert float(patch_gradient(t, t, valid)) < float(patch_gradient(blurred, t, valid))


# --- masks ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", TERMS)
@pytest.mark.parametrize("poison", [float("nan"), float("inf"), -5.0, 1e6])
def test_invalid_pixels_change_neither_value_nor_gradient(name, poison):
    p, t, valid = scene()
    results = []
    for fill in (1.0, poison):
        # Predictions are always finite; labels may hold anything where they are not valid.
        prediction = torch.where(valid, p, 7.0 if fill == 1.0 else 3.0).requires_grad_()
        value = TERMS[name](prediction, torch.where(valid, t, fill), valid)
        value.backward()
        results.append((value.detach(), prediction.grad))
    assert torch.equal(results[0][0], results[1][0])
    assert torch.equal(results[0][1], results[1][1])
    assert results[0][1].isfinite().all()
    assert (results[0][1][~valid] == 0).all()
    assert (results[0][1][valid] != 0).any()


@pytest.mark.parametrize("name", TERMS)
def test_the_mask_matters(name):
    """The negative control of the test above: with every pixel valid, what was poison is seen."""
    p, t, valid = scene()
    everywhere = torch.ones_like(valid)
    clean, other = TERMS[name](p, t, everywhere), TERMS[name](p, torch.where(valid, t, 60.0), everywhere)
    assert float(clean) != float(other)


@pytest.mark.parametrize("name", TERMS)
def test_no_valid_pixel_is_no_loss_and_no_gradient(name):
    p, t, valid = scene()
    p = p.requires_grad_()
    value = TERMS[name](p, torch.full_like(t, float("nan")), torch.zeros_like(valid))
    value.backward()
    assert value.item() == 0.0
    assert (p.grad == 0).all()


@pytest.mark.parametrize("name", TERMS)
def test_terms_are_means_so_repeating_the_batch_changes_nothing(name):
    p, t, valid = scene()
    twice = [x.repeat(2, 1, 1) for x in (p, t, valid)]
    assert float(TERMS[name](*twice)) == pytest.approx(float(TERMS[name](p, t, valid)), rel=1e-9)


@pytest.mark.parametrize("name", TERMS)
def test_a_perfect_prediction_has_a_finite_gradient(name):
    _, t, valid = scene()
    t[0, :3] = 0.0
    p = t.clone().requires_grad_()
    TERMS[name](p, t, valid).backward()
    assert p.grad.isfinite().all()


def test_gradients_are_those_of_finite_differences():
    p, t, valid = scene(shape=(2, 9, 8))
    config = PatchGradientConfig(scales=(1, 2))
    for term in (silog, charbonnier, lambda a, b, v: patch_gradient(a, b, v, config)):
        assert torch.autograd.gradcheck(lambda a, term=term: term(a, t, valid), (p.clone().requires_grad_(),))


# --- several processes ---------------------------------------------------------------------------------------------------


def part_of_a_batch(rank: int, folder: Path) -> None:
    """Loss and gradient of every term on one of the two samples, as process `rank` of two; saved in `folder`."""
    torch.set_num_threads(1)
    store = torch.distributed.FileStore(str(folder / "store"), 2)
    torch.distributed.init_process_group("gloo", store=store, rank=rank, world_size=2)
    results = {}
    whole = losses.over_processes
    for kind, sums in (("whole", whole), ("own", lambda x: x)):
        losses.over_processes = sums
        for name, term in TERMS.items():
            p, t, valid = (x[rank : rank + 1] for x in scene())
            p = p.clone().requires_grad_()
            value = term(p, t, valid)
            value.backward()
            results[kind, name] = (value.detach(), p.grad)
    torch.save(results, folder / f"{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_two_processes_have_the_loss_and_the_gradient_of_one(tmp_path):
    torch.multiprocessing.spawn(part_of_a_batch, (tmp_path,), nprocs=2)
    parts = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in (0, 1)]
    for name, term in TERMS.items():
        p, t, valid = scene()
        p = p.clone().requires_grad_()
        value = term(p, t, valid)
        value.backward()
        for kind in ("whole", "own"):
            values, gradients = zip(*(part[kind, name] for part in parts), strict=True)
            # What DDP makes of it: every process has half of the gradients of its own sample.
            gradient = torch.cat(gradients) / 2
            equal = all(float(v) == pytest.approx(value.item(), rel=1e-12) for v in values)
            close = torch.allclose(gradient, p.grad, rtol=1e-9, atol=1e-15)
            # The negative control: means over the pixels of one process are other means.
            assert (equal, close) == ((True, True) if kind == "whole" else (False, False)), (name, kind)


# --- the curriculum ------------------------------------------------------------------------------------------------------


@given(step=st.integers(0, 1000), start=st.floats(0, 1), stop=st.floats(0, 1))
def test_ramp_stays_between_0_and_1_and_does_not_fall(step, start, stop):
    start, stop = min(start, stop), max(start, stop)
    here, there = ramp(step, 1000, start, stop), ramp(step + 1, 1000, start, stop)
    assert 0.0 <= here <= there <= 1.0


def test_curriculum_hands_silog_over_to_charbonnier():
    config = LossConfig(silog=2.0, charbonnier=0.5, patch_gradient=0.08, histogram=1.0)
    first, middle, last = (curriculum(step, 1000, config) for step in (0, 150, 1000))
    assert (first.silog, first.charbonnier, first.patch_gradient) == (2.0, 0.0, 0.0)
    assert (middle.silog, middle.charbonnier) == (pytest.approx(1.0), pytest.approx(0.25))
    assert middle.patch_gradient == pytest.approx(0.08 * (0.15 - 0.05) / 0.45)
    assert (last.silog, last.charbonnier, last.patch_gradient, last.histogram) == (0.0, 0.5, 0.08, 1.0)


@pytest.mark.parametrize(
    "wrong",
    [
        {"patch_gradient_ramp": (0.5, 0.1)},
        {"histogram": 0.0, "silog": 0.0, "charbonnier": 0.0, "patch_gradient": 0.0},
        {"histogram": 0.0, "silog": 0.0},  # Charbonnier alone, which has no weight at first
        {"histogram": 0.0, "charbonnier": 0.0, "patch_gradient": 0.0},  # SiLog alone, which has none in the end
        {"charbonier": 1.0},
        {"patch": {"range_px": (4,)}},
    ],
)
def test_impossible_settings_are_refused(wrong):
    with pytest.raises(ValidationError):
        LossConfig(**wrong)

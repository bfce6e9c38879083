"""What training minimises: five terms on height maps, each over the valid pixels only and divided by their count.

Shapes: `_brc` = (batch, row, col), `_bnrc` = (batch, bin, row, col). Heights are metres above ground. Every term is a
scalar; where no pixel is valid it is 0 with a gradient of 0, and what an invalid pixel holds (NaN included) changes
neither the value nor the gradient. Logarithms are taken of heights clamped from below, as each function says, because
0 m is a height.

Where several processes train together, "the valid pixels" are those of all of them: sums and counts are added up before
they are divided, so the loss of N processes is that of one process with the whole batch, and the average of their
gradients, which is what DDP and FSDP take, is its gradient. Without it a process whose part of the batch holds few valid
pixels would weigh as much as one with many. Every process must call the same terms with crops of the same size.

The recipe follows Brandt et al. 2026 (arXiv 2603.06382): SiLog gives way to Charbonnier, the patch-gradient term joins
late. The histogram term is this project's addition: it fits the whole distribution over the bins, which the other terms
leave free as long as its mean is right, so that the spread can be calibrated.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Annotated, Any

import torch
import torch.distributed
from pydantic import BaseModel, ConfigDict, Field, NonNegativeFloat, PositiveFloat, model_validator
from torch import Tensor
from torch.nn.functional import avg_pool2d, conv2d, pad, unfold

Fraction = Annotated[float, Field(ge=0.0, le=1.0)]


class PatchGradientConfig(BaseModel):
    """Constants of the patch-gradient term; the paper gives the three weights and the scales, not the rest."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    scales: tuple[Annotated[int, Field(ge=1)], ...] = (1, 2, 4)
    """Cell sides in pixels at which the term is evaluated; 2 is the paper's scale 1/2."""
    range_px: tuple[Annotated[int, Field(ge=3)], ...] = (3,)
    """Sides of the neighbourhoods of the local range; odd. The paper's pseudo-code has 3, its text 3 and 5."""
    temperature: PositiveFloat = 0.1
    """Of the soft maximum and minimum, in units of the gradient magnitude; towards 0 they become the hard ones."""
    floor_m: PositiveFloat = 0.5
    """Heights below it count as it. Why not a tiny number: grass at 0.01 and 0.1 m would be as steep as a tree's edge."""
    diagonal: bool = False
    """Gradients along the diagonals too: the paper's text has them, its pseudo-code does not."""
    epsilon: PositiveFloat = 0.1
    """Gradient magnitude that counts as flat: below it the direction of a gradient is noise."""
    magnitude: NonNegativeFloat = 0.3
    range: NonNegativeFloat = 0.6
    direction: NonNegativeFloat = 0.4

    @model_validator(mode="after")
    def _odd(self) -> PatchGradientConfig:
        if even := [side for side in self.range_px if side % 2 == 0]:
            raise ValueError(f"range_px {even} is even; a neighbourhood needs a centre, for example 3 or 5")
        return self


class LossConfig(BaseModel):
    """Weights of the terms and the ramps between them, as fractions of all steps."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    histogram: NonNegativeFloat = 1.0
    silog: NonNegativeFloat = 1.0
    charbonnier: NonNegativeFloat = 0.1
    """Per metre of error."""
    patch_gradient: NonNegativeFloat = 0.075
    silog_to_charbonnier: tuple[Fraction, Fraction] = (0.0, 0.3)
    """SiLog alone before the first fraction, Charbonnier alone after the second. Why SiLog first: Charbonnier from the
    start collapses to the mean height; why not SiLog to the end: it underestimates tall canopy (paper, section 4)."""
    patch_gradient_ramp: tuple[Fraction, Fraction] = (0.05, 0.5)
    """From no weight to full weight; from the start it makes grid artefacts (paper, Table 6)."""
    silog_mean: Fraction = 0.15
    """Weight of the squared mean log-ratio; 0 would leave the scale of the heights free."""
    silog_variance_from: Fraction = 0.0
    """Fraction of the steps before which SiLog is its mean part alone, so that the scale is right before the shape; the
    published code takes 100 steps of its 100,000."""
    charbonnier_epsilon_m: PositiveFloat = 0.1
    """Errors below it count quadratically."""
    patch: PatchGradientConfig = PatchGradientConfig()

    @model_validator(mode="after")
    def _ordered(self) -> LossConfig:
        for name in ("silog_to_charbonnier", "patch_gradient_ramp"):
            start, stop = getattr(self, name)
            if start > stop:
                raise ValueError(f"{name} ({start}, {stop}) runs backwards; the first fraction must not exceed the second")
        if not any((self.histogram, self.silog, self.charbonnier, self.patch_gradient)):
            raise ValueError("all loss weights are 0; give at least one of histogram, silog, charbonnier, patch_gradient")
        # Between these fractions every weight is linear, so it is 0 at a place between only if it is 0 halfway.
        corners = sorted({0.0, 1.0, *self.silog_to_charbonnier, *self.patch_gradient_ramp})
        for corner in corners + [(a + b) / 2 for a, b in pairwise(corners)]:
            w = curriculum(round(corner * 1_000_000), 1_000_000, self)
            if not any((w.histogram, w.silog, w.charbonnier, w.patch_gradient)):
                raise ValueError(
                    f"no term has any weight at {100 * corner:g} % of the steps, so nothing would be learned there; "
                    f"give histogram a weight, or change silog_to_charbonnier or patch_gradient_ramp"
                )
        return self


@dataclass(frozen=True, slots=True, kw_only=True)
class LossWeights:
    """Weights of the terms at one step."""

    histogram: float
    silog: float
    silog_variance: bool
    """Whether SiLog holds more than its mean part."""
    charbonnier: float
    patch_gradient: float


def ramp(step: int, steps: int, start: float, stop: float) -> float:
    """0 up to the fraction `start` of `steps`, 1 from the fraction `stop`, linear between them."""
    done = step / max(steps, 1)
    if done >= stop:
        return 1.0
    return 0.0 if done <= start else (done - start) / (stop - start)


def curriculum(step: int, steps: int, config: LossConfig) -> LossWeights:
    """The weights at `step` of `steps`."""
    late = ramp(step, steps, *config.silog_to_charbonnier)
    return LossWeights(
        histogram=config.histogram,
        silog=config.silog * (1.0 - late),
        silog_variance=step >= config.silog_variance_from * steps,
        charbonnier=config.charbonnier * late,
        patch_gradient=config.patch_gradient * ramp(step, steps, *config.patch_gradient_ramp),
    )


class _OverProcesses(torch.autograd.Function):
    """Sum over all processes, of the values going forward and of the gradients going back."""

    @staticmethod
    def forward(_ctx: Any, x: Tensor) -> Tensor:
        total = x.clone()
        torch.distributed.all_reduce(total)
        return total

    @staticmethod
    def backward(_ctx: Any, *gradient: Tensor) -> Tensor:
        total = gradient[0].clone()
        torch.distributed.all_reduce(total)
        return total


def over_processes(x: Tensor) -> Tensor:
    """The sum of `x` over all processes that train together, differentiable.

    Each process gets the derivative of the sum of all their (equal) losses: as many times too much as there are processes,
    which the average that DDP and FSDP take puts right. Why not multiply by the number of processes without asking the
    others: a mean that goes into a further sum, as in a variance, is used by all of them, and each knows its own use only.
    """
    alone = not (torch.distributed.is_available() and torch.distributed.is_initialized())
    if alone or torch.distributed.get_world_size() == 1:
        return x
    summed: Tensor = _OverProcesses.apply(x)
    return summed


def masked_mean(value: Tensor, valid: Tensor) -> Tensor:
    """Mean of `value` over the valid pixels of all processes, 0 when there are none.

    Why `where` and not a product: NaN times 0 is NaN, and an invalid pixel may hold NaN.
    """
    total = torch.where(valid, value, 0.0).sum()
    total, count = over_processes(torch.stack((total, valid.sum().to(total.dtype))))
    mean: Tensor = total / count.clamp(min=1)
    return mean


def _at_valid(height_brc: Tensor, valid_brc: Tensor) -> Tensor:
    """The heights with 1 m where they are not valid, so that no logarithm or root sees what is there."""
    return torch.where(valid_brc, height_brc, 1.0)


def silog(
    predicted_brc: Tensor,
    true_brc: Tensor,
    valid_brc: Tensor,
    *,
    mean_weight: float = 0.15,
    offset_m: float = 1e-3,
    variance: bool = True,
) -> Tensor:
    """Scale-invariant log error: sqrt(var(g) + mean_weight * mean(g)^2) with g = log(p + offset) - log(t + offset).

    Heights below 0 m count as 0 m. The variance is the population's (Eigen et al. 2014, equation 4); without `variance`
    it is left out.
    """
    p, t = _at_valid(predicted_brc, valid_brc), _at_valid(true_brc, valid_brc)
    g = torch.log(p.clamp(min=0) + offset_m) - torch.log(t.clamp(min=0) + offset_m)
    mean = masked_mean(g, valid_brc)
    square = mean_weight * mean**2
    if variance:
        square = square + masked_mean((g - mean) ** 2, valid_brc)
    # A root has no finite slope at 0, which is where a perfect or an empty batch stands.
    positive = square > 0
    return torch.where(positive, torch.where(positive, square, 1.0).sqrt(), 0.0)


def charbonnier(predicted_brc: Tensor, true_brc: Tensor, valid_brc: Tensor, *, epsilon_m: float = 0.1) -> Tensor:
    """Smooth absolute error in metres: mean of sqrt((p - t)^2 + epsilon^2) (Charbonnier et al. 1994)."""
    error = torch.where(valid_brc, predicted_brc - _at_valid(true_brc, valid_brc), 0.0)
    return masked_mean((error**2 + epsilon_m**2).sqrt(), valid_brc)


def histogram_cross_entropy(log_probability_bnrc: Tensor, true_brc: Tensor, valid_brc: Tensor, centres_m: Tensor) -> Tensor:
    """Cross-entropy between the predicted bins and the true height shared between its two neighbouring bin centres.

    The target puts weight (c1 - t)/(c1 - c0) on centre c0 and the rest on c1, so the mean of the target is the true
    height exactly (two-hot, Imani and White 2018). Heights outside the centres count as the nearest one.

    Args:
        log_probability_bnrc: logarithms of the probabilities of the bins.
        true_brc: heights in metres.
        valid_brc: pixels that count.
        centres_m: (bin,) centres, increasing.
    """
    t = _at_valid(true_brc, valid_brc).clamp(centres_m[0], centres_m[-1])
    upper = torch.searchsorted(centres_m, t).clamp(1, len(centres_m) - 1)
    c0, c1 = centres_m[upper - 1], centres_m[upper]
    share = (t - c0) / (c1 - c0)
    pair = torch.stack((upper - 1, upper), dim=1)
    log_p = log_probability_bnrc.gather(1, pair)
    return masked_mean(-((1 - share) * log_p[:, 0] + share * log_p[:, 1]), valid_brc)


# --- the patch-gradient term ---------------------------------------------------------------------------------------------


def _eroded(valid_brc: Tensor, side: int) -> Tensor:
    """Pixels whose whole neighbourhood of `side` is valid; the rim, whose neighbourhood leaves the array, is not."""
    low = avg_pool2d(pad(valid_brc[:, None].float(), (side // 2,) * 4), side, stride=1)[:, 0]
    return low > 1 - 0.5 / side**2


def _coarse(height_brc: Tensor, valid_brc: Tensor, cell: int) -> tuple[Tensor, Tensor]:
    """Means over square cells, valid where every pixel of the cell is; an incomplete last row or column is left out."""
    if cell == 1:
        return height_brc, valid_brc
    height = avg_pool2d(height_brc[:, None], cell)[:, 0]
    share = avg_pool2d(valid_brc[:, None].to(height.dtype), cell)[:, 0]
    return height, share > 1 - 0.5 / cell**2


def _centred_log(height_brc: Tensor, valid_brc: Tensor, floor_m: float) -> Tensor:
    """Log of the heights minus its mean over the valid pixels of each image."""
    x = torch.where(valid_brc, height_brc.clamp(min=floor_m).log(), 0.0)
    count = valid_brc.sum(dim=(1, 2), keepdim=True).clamp(min=1)
    return torch.where(valid_brc, x - x.sum(dim=(1, 2), keepdim=True) / count, 0.0)


_SOBEL = ((-1.0, 0.0, 1.0), (-2.0, 0.0, 2.0), (-1.0, 0.0, 1.0))
_DIAGONAL = ((0.0, 1.0, 2.0), (-1.0, 0.0, 1.0), (-2.0, -1.0, 0.0))


def _sobel(x_brc: Tensor, *, diagonal: bool) -> Tensor:
    """(batch, 2, row, col) gradients along columns and rows with the 3x3 Sobel kernels; 4 with those along the diagonals."""
    kernels = [torch.tensor(k, device=x_brc.device, dtype=x_brc.dtype) for k in (_SOBEL, _DIAGONAL)[: 2 if diagonal else 1]]
    turned = [k for kernel in kernels for k in (kernel, kernel.rot90(-1))]
    return conv2d(x_brc[:, None], torch.stack(turned)[:, None], padding=1)


def _soft_range(m_brc: Tensor, side: int, temperature: float) -> Tensor:
    """Soft maximum minus soft minimum over the neighbourhood of `side` of each pixel."""
    batch, rows, cols = m_brc.shape
    near = unfold(m_brc[:, None], side, padding=side // 2)
    high = ((near / temperature).softmax(dim=1) * near).sum(dim=1)
    low = ((-near / temperature).softmax(dim=1) * near).sum(dim=1)
    return (high - low).view(batch, rows, cols)


def patch_gradient(
    predicted_brc: Tensor, true_brc: Tensor, valid_brc: Tensor, config: PatchGradientConfig | None = None
) -> Tensor:
    """Difference of local gradient patterns: magnitude, local range and direction, averaged over scales.

    Algorithm 1 of Brandt et al. 2026 with masks: a gradient counts where its 3x3 neighbourhood is valid, a local range
    where every gradient in its neighbourhood counts. Comparing ranges over a neighbourhood rather than gradients pixel
    by pixel forgives labels that lie a pixel off.
    """
    config = config or PatchGradientConfig()
    p, t = _at_valid(predicted_brc, valid_brc), _at_valid(true_brc, valid_brc)
    total = p.new_zeros(())
    for cell in config.scales:
        if min(p.shape[1:]) < cell:
            continue  # not one whole cell fits, so no pixel is valid at this scale
        p_s, valid = _coarse(p, valid_brc, cell)
        t_s, _ = _coarse(t, valid_brc, cell)
        g_p = _sobel(_centred_log(p_s, valid, config.floor_m), diagonal=config.diagonal)
        g_t = _sobel(_centred_log(t_s, valid, config.floor_m), diagonal=config.diagonal)
        # The small constant gives the root a slope where the canopy is flat.
        m_p = (g_p.square().sum(dim=1) + 1e-8).sqrt()
        m_t = (g_t.square().sum(dim=1) + 1e-8).sqrt()
        inner = _eroded(valid, 3)
        l_mag = masked_mean((m_p - m_t).abs(), inner)
        l_rng = p.new_zeros(())
        for side in config.range_px:
            r_p, r_t = _soft_range(m_p, side, config.temperature), _soft_range(m_t, side, config.temperature)
            l_rng = l_rng + masked_mean((r_p - r_t).abs(), _eroded(inner, side)) / len(config.range_px)
        cosine = (g_p / (m_p + config.epsilon)[:, None] * (g_t / (m_t + config.epsilon)[:, None])).sum(dim=1)
        l_dir = masked_mean(1 - cosine.clamp(-1, 1), inner)
        total = total + config.magnitude * l_mag + config.range * l_rng + config.direction * l_dir
    return total / len(config.scales)

"""A height per pixel as a distribution over height bins: mean, spread, quantiles, abstention.

Tensor suffixes: b batch, n bin, h row, w column.

The distribution keeps the network's logits and works through them a strip of rows at a time, because a second copy of
them is the largest thing in the whole prediction: 64 bins of one 448 px window are 51 MB.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, Self

import torch
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Tensor

from canopy.errors import CanopyError

Normalisation = Literal["softmax", "mixlog", "linear"]
"""How logits become probabilities: `softmax`; `mixlog` (CHMv2) and `linear` (CHMv1): relu, plus a floor, over their sum."""

_FLOOR = {"mixlog": 1e-8, "linear": 0.1}
"""What is added to relu(logit) so that the sum is never 0: the published constants of CHMv2 and CHMv1."""

_STRIP_BYTES = {"cpu": 1 << 20}
_STRIP_BYTES_ACCELERATOR = 256 << 20
"""Float32 logits worked on at once: about a CPU's second-level cache; on an accelerator enough to fill it with work."""


class Bins(BaseModel):
    """Heights that the classes of a network's head stand for."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    count: int = Field(ge=2, le=4096)
    """Number of bins."""
    min_m: float = Field(default=0.008, gt=0)
    """Centre of the first bin, metres above ground; 8 mm as published for CHMv2."""
    max_m: float = Field(default=96.0, gt=0)
    """Centre of the last bin, metres above ground: no prediction can be higher."""
    spacing: Literal["mixlog", "linear"] = "mixlog"
    """`linear`: equal steps. `mixlog`: logarithmic near the ground turning linear at the top."""

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if self.min_m >= self.max_m:
            raise ValueError(f"min_m {self.min_m} is not below max_m {self.max_m}")
        return self

    def centres_m(self) -> Tensor:
        """Heights of the bins, ascending, float32 (bin,).

        `mixlog` is t*log + (1-t)*lin with t falling from 1 to 0 along the bins (Brandt et al. 2026, arXiv 2603.06382).
        Their code builds the bins for heights divided by 8 and multiplies the result by 8; both spacings scale with
        their ends, so building them in metres is the same.
        """
        linear = torch.linspace(self.min_m, self.max_m, self.count, dtype=torch.float64)
        if self.spacing == "linear":
            return linear.float()
        logarithmic = torch.linspace(math.log(self.min_m), math.log(self.max_m), self.count, dtype=torch.float64).exp()
        t = torch.linspace(1.0, 0.0, self.count, dtype=torch.float64)
        return (t * logarithmic + (1.0 - t) * linear).float()

    def edges_m(self) -> Tensor:
        """Borders between the bins, float32 (bin + 1,): halfway between centres, the outermost at the outermost centres."""
        centres = self.centres_m()
        return torch.cat([centres[:1], (centres[1:] + centres[:-1]) / 2, centres[-1:]])


@dataclass(frozen=True, eq=False, kw_only=True)
class HeightDistribution:
    """Probability of each height bin at each pixel, held as logits; results are computed when asked for and kept.

    `mean_m` is the height map and `spread_m` what its error map is made from. Both are differentiable. Where `abstain` is
    True they are not a measurement: the network preferred no bin, and the rectified normalisations then return the
    plain average of the bins (33.15 m for CHMv2), or a logit was not finite and they are NaN.
    """

    logits_bnhw: Tensor
    """The network's output, any float type; computations are in float32."""
    bins: Bins
    normalisation: Normalisation

    @classmethod
    def from_logits(cls, logits_bnhw: Tensor, bins: Bins, normalisation: Normalisation) -> Self:
        """The distribution that `logits_bnhw` (batch, bin, row, col) stand for; the tensor is kept, not copied."""
        assert logits_bnhw.ndim == 4, f"logits have {logits_bnhw.ndim} axes, (batch, bin, row, col) expected"
        assert logits_bnhw.shape[1] == bins.count, f"{logits_bnhw.shape[1]} logits per pixel for {bins.count} bins"
        return cls(logits_bnhw=logits_bnhw, bins=bins, normalisation=normalisation)

    def probabilities(self) -> Tensor:
        """(batch, bin, row, col) float32, summing to 1 over the bins; a full-size tensor, for losses and inspection."""
        return self._normalise(self.logits_bnhw)

    @cached_property
    def mean_m(self) -> Tensor:
        """Expected height in metres, (batch, row, col) float32."""
        if self._differentiable:
            return (self.probabilities() * self._centres_n11).sum(1)
        return self._summary[0]

    @cached_property
    def spread_m(self) -> Tensor:
        """Standard deviation of the height under the probabilities in metres, (batch, row, col) float32, >= 0."""
        if self._differentiable:
            p_bnhw = self.probabilities()
            squares = (self._centres_n11 - self.mean_m[:, None]).square()
            # The root has no derivative at 0; 1 mm² keeps it finite and is far below any spread that matters.
            return (p_bnhw * squares).sum(1).clamp_min(1e-6).sqrt()
        return self._summary[1]

    @cached_property
    def abstain(self) -> Tensor:
        """Pixels without a prediction, (batch, row, col) bool: a logit is not finite, or relu leaves nothing."""
        return self._summary[2]

    def quantile_m(self, q: float) -> Tensor:
        """Height in metres below which a share `q` of the probability lies, (batch, row, col) float32.

        Each bin's probability is spread evenly between its `Bins.edges_m`, so the cumulative distribution is piecewise
        linear and the result lies between the first and the last bin.

        Raises:
            CanopyError: `q` is not between 0 and 1.
        """
        if not 0.0 <= q <= 1.0:
            raise CanopyError(f"quantile {q} is not a share of 1; ask for a value from 0 to 1, for example 0.9")
        edges = self.bins.edges_m().to(self.logits_bnhw.device)

        def of_strip(logits_bnhw: Tensor) -> tuple[Tensor]:
            p_bnhw = self._normalise(logits_bnhw)
            cdf_bnhw = p_bnhw.cumsum(1)
            # The first bin whose upper edge reaches q; rounding may leave the total a hair under 1.
            bin_b1hw = (cdf_bnhw < q).sum(1, keepdim=True).clamp_max(self.bins.count - 1)
            p = p_bnhw.gather(1, bin_b1hw)[:, 0]
            below = cdf_bnhw.gather(1, bin_b1hw)[:, 0] - p
            share = ((q - below) / p.clamp_min(torch.finfo(p.dtype).tiny)).clamp(0.0, 1.0)
            index = bin_b1hw[:, 0]
            return (torch.lerp(edges[index], edges[index + 1], share) + 0.0 * p,)  # a NaN probability stays NaN

        return self._by_strips(of_strip)[0]

    @property
    def _differentiable(self) -> bool:
        return torch.is_grad_enabled() and self.logits_bnhw.requires_grad

    @cached_property
    def _centres_n11(self) -> Tensor:
        # Without `non_blocking` a GPU would finish the network before it is told what to do with its logits.
        return self.bins.centres_m().to(self.logits_bnhw.device, non_blocking=True)[:, None, None]

    @cached_property
    def _summary(self) -> tuple[Tensor, Tensor, Tensor]:
        """(mean, spread, abstain) from one pass over the logits."""
        with torch.no_grad():
            mean, spread, abstain = self._by_strips(self._summarise)
        return mean, spread, abstain

    def _summarise(self, logits_bnhw: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        # Two reductions take a fifth of torch.aminmax's time here. Sums and no matrix products throughout: autocast and
        # reduced-precision products, which a caller may have switched on, would cost centimetres.
        logits, axis, centres = logits_bnhw.float(), 1, self._centres_n11
        if logits.stride(1) == 1:  # channels last, as most networks give them: sum along the axis that is contiguous
            logits, axis, centres = logits.permute(0, 2, 3, 1), 3, centres[:, 0, 0]
        low, high = logits.amin(axis, keepdim=True), logits.amax(axis, keepdim=True)
        abstain = ~(low.isfinite() & high.isfinite())
        if self.normalisation == "softmax":
            weight = (logits - high).exp_()
        else:
            abstain |= high <= 0
            weight = logits.relu() + _FLOOR[self.normalisation]
        total = weight.sum(axis, keepdim=True)
        mean = (weight * centres).sum(axis, keepdim=True).div_(total)
        # Why about the mean and not E[h²] - mean²: that difference cancels, 2 cm of spread at 90 m in float32.
        spread = (centres - mean).square_().mul_(weight).sum(axis, keepdim=True).div_(total).sqrt_()
        return mean.squeeze(axis), spread.squeeze(axis), abstain.squeeze(axis)

    def _normalise(self, logits_bnhw: Tensor) -> Tensor:
        logits_bnhw = logits_bnhw.float()
        if self.normalisation == "softmax":
            return logits_bnhw.softmax(1)
        positive = logits_bnhw.relu() + _FLOOR[self.normalisation]
        return positive / positive.sum(1, keepdim=True)

    def _by_strips(self, compute: Callable[[Tensor], tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
        strips = [compute(strip) for strip in self._strips()]
        return tuple(torch.cat(parts, dim=1) for parts in zip(*strips, strict=True))

    def _strips(self) -> Iterator[Tensor]:
        """Runs of rows of the logits that fit the strip size; the split depends on the shape only, never on the values."""
        batch, count, rows, cols = self.logits_bnhw.shape
        limit = _STRIP_BYTES.get(self.logits_bnhw.device.type, _STRIP_BYTES_ACCELERATOR)
        step = max(1, limit // (4 * batch * count * cols))
        for row in range(0, rows, step):
            yield self.logits_bnhw[:, :, row : row + step]

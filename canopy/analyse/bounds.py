"""Between what the statistics of the true heights of a piece of ground lie, and why.

**Means** have the interval of `canopy.model.blocks.mean_interval`: how wrong means over squares of ground of that area
were, in units of the mean `error_90_m` of their pixels, was measured where the heights are known. It is not the pixels'
errors averaged (too wide) nor divided by the root of their number (far too narrow). Ground smaller than the smallest square
that was measured has at least the mean of its pixels' own intervals: the smaller it is the larger its error.

**Shares** of ground above a height, **gaps** and **quantiles** have no such table. Their bounds are the same statistic of
the two surfaces that the pixels' intervals span: of all lower ends, and of all upper ends. Let a share m of the pixels have
a true height above its upper end. Then the share of ground above any height exceeds that of the upper surface by at most m,
however the errors hang together, and the quantile at a level q is at most that of the upper surface at q + m; below
likewise. m is about 5 % on average (what a 90 % interval may miss on either side), and differs from place to place. Nothing
is added for it, since far more pixels have a true height well inside their interval than outside, except where nothing makes
up for it: in a tail that is no thicker than m. So the upper bound of the 95th percentile is the highest upper end there is.
**The highest pixel** has no bounds: nothing limits the most extreme of many errors.

What is promised: of means, what the table promises (measured on other ground). Of the rest, nothing by theory beyond the
inequality above; how often the bounds hold is measured (tests/bench/bench_zonal.py). On simulated sites whose pixels'
intervals hold 90 % of the pixels, they hold the cover, the gaps and the median in 93 to 97 % of polygons of 0.01 ha and in
99 to 100 % of those of 1.3 ha, and the 95th percentile in 89 and 100 %: they are wide. To move the whole surface by the
error of its mean instead is narrower, and wrong: it holds the cover above 2 m in 68 and 37 % and the 95th percentile in 50
and 43 %.
"""

from __future__ import annotations

import math

from canopy.analyse.histogram import HeightHistogram
from canopy.model.blocks import BlockTable, mean_interval

MISSED_EACH_SIDE = 0.05
"""Share of true heights that 90 % intervals are made to miss above, and below."""

Ends = tuple[float, float]
"""(lower, upper)."""

NOT_MEASURED: Ends = (math.nan, math.nan)


def mean_bounds(
    heights: HeightHistogram,
    half_width: HeightHistogram,
    surfaces: tuple[HeightHistogram, HeightHistogram],
    area_m2: float,
    table: BlockTable | None,
) -> Ends:
    """The ends of the 90 % interval of a mean; NaN without a table, and where nothing is known.

    Args:
        heights: Ground by height.
        half_width: The same ground by `error_90_m`.
        surfaces: The same by `lower_90_m` and by `upper_90_m`.
        area_m2: Of that ground.
        table: Of the map.
    """
    if table is None or not area_m2 > 0:
        return NOT_MEASURED
    lower, upper = (float(end) for end in mean_interval(heights.mean_m, half_width.mean_m, area_m2, table))
    if area_m2 < table.sides_m[0] ** 2:
        return min(lower, surfaces[0].mean_m), max(upper, surfaces[1].mean_m)
    return lower, upper


def share_bounds(lower: HeightHistogram, upper: HeightHistogram, height_m: float) -> Ends:
    """Of the share of ground above a height, from the histograms of the two surfaces."""
    return lower.share_above(height_m), upper.share_above(height_m)


def levels_of(level: float) -> tuple[float, float]:
    """Levels at which the lower and the upper surface bound the quantile at `level`."""
    return (
        0.0 if level <= MISSED_EACH_SIDE + 1e-9 else level,
        1.0 if 1 - level <= MISSED_EACH_SIDE + 1e-9 else level,
    )


def quantile_bounds(lower: HeightHistogram, upper: HeightHistogram, level: float) -> Ends:
    """Of the quantile at a level, from the histograms of the two surfaces."""
    below, above = levels_of(level)
    return lower.quantile_m(below), upper.quantile_m(above)

"""Did the height of a pixel change, and by how much: the arithmetic of two heights that may both be wrong.

Each height h comes with an interval [l, u] that holds the true height with 90 %. Which interval of the difference d = b - a
of two of them holds the true difference with 90 %?

    sum                 [l_b - u_a,  u_b - l_a]                                                                  (1)
    root-sum-square     [d - hypot(b - l_b, u_a - a),  d + hypot(u_b - b, a - l_a)]                              (2)

(1) is reached when both heights are at opposite ends of their intervals. It holds with 90 % whatever the two errors have to
do with each other, as long as quantiles of errors add up at most, as those of elliptical distributions do, the normal one
among them. Without any assumption only the union bound is left, the misses of both maps added: 80 %. (2) takes besides that
the errors are independent or positively correlated: then the variance of b - a, var a + var b - 2 cov, is at most the sum of
the two. The ends of an interval are taken as they are, down of one map against up of the other, so that lopsided intervals
stay lopsided.

Which is taken: two maps by one model are wrong alike. On one forest imaged twice, under another sun, from another side and
a fraction of a pixel away, the errors of the sample model are positively correlated on every site, by 0.3 to 0.9, and 0.2 %
of the pixels are called changed by (2), 0.1 % by (1), where 10 % would be allowed (tests/bench/bench_change.py); so for
them it is (2). For anything else, maps by different models and rasters whose error is stated, nothing is known of it and it
is (1).

Either promises more than it need: what both maps get wrong alike cancels, and how much that is differs from pair to pair. A
third of the width would do on those forests; it finds 25 of 25 fellings of 300 m² and more where the full width finds 4.
Which part of the width a pair needs is measured on ground that did not change (`canopy.analyse.stable`), never assumed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final, Literal, cast, get_args

import numpy as np
from numpy.typing import NDArray

from canopy.errors import AnalysisError

Rule = Literal["root-sum-square", "sum"]
"""How two errors become one."""

RULES: Final = get_args(Rule)

ASSUMPTIONS: Final[dict[Rule, str]] = {
    "root-sum-square": "the errors of the two maps are independent or alike, never opposed",
    "sum": "the errors of the two maps may be of any correlation",
}
"""What each rule takes for granted."""

UNKNOWN: Final = 0
LOSS: Final = 1
NO_DETECTABLE_CHANGE: Final = 2
GAIN: Final = 3
"""Values of the map of classes."""


def checked_rule(text: str) -> Rule:
    """A rule as the user names it.

    Raises:
        AnalysisError: there is no such rule.
    """
    if text in RULES:
        return cast("Rule", text)
    raise AnalysisError(f"errors cannot be combined by {text!r}; give {' or '.join(RULES)}")


Ends = tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]
"""Height, lower and upper end, metres, arrays of one shape."""


def difference_interval(a: Ends, b: Ends, rule: Rule) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """The ends (lower_m, upper_m) of the interval of b minus a, by equation (1) or (2); NaN where anything is.

    Args:
        a: Of the earlier map.
        b: Of the later one.
        rule: How two errors become one.
    """
    (h_a, l_a, u_a), (h_b, l_b, u_b) = a, b
    down, up = (h_b - l_b, u_a - h_a), (u_b - h_b, h_a - l_a)
    change = h_b - h_a
    if rule == "sum":
        return change - sum(down), change + sum(up)
    return change - np.hypot(*down), change + np.hypot(*up)


@dataclass(frozen=True, slots=True, kw_only=True)
class Combination:
    """How the errors of two maps become the error of their difference."""

    rule: Rule
    lower_factor: float = 1.0
    """How many times its reach the interval reaches down, where ground that did not change says so."""
    upper_factor: float = 1.0
    """The same up."""

    def interval(self, a: Ends, b: Ends) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """The ends (lower_m, upper_m) of the interval of b minus a."""
        lower, upper = difference_interval(a, b, self.rule)
        if self.lower_factor == self.upper_factor == 1:
            return lower, upper
        change = b[0] - a[0]
        return change - self.lower_factor * (change - lower), change + self.upper_factor * (upper - change)


def change_class(lower_m: NDArray[Any], upper_m: NDArray[Any]) -> NDArray[np.uint8]:
    """Loss where the whole interval of the difference is below 0 m, gain where it is above; unknown where it is NaN."""
    found = np.full(lower_m.shape, NO_DETECTABLE_CHANGE, np.uint8)
    found[upper_m < 0] = LOSS
    found[lower_m > 0] = GAIN
    found[np.isnan(lower_m) | np.isnan(upper_m)] = UNKNOWN
    return found

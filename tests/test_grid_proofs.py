"""Proofs by an SMT solver that the window arithmetic is right for all sizes and all pixels.

The functions under proof are those of `canopy.grid` themselves: they take `clamp` and `floordiv` as arguments, so the source
that cuts real images is run here on terms of z3. A statement is proved by finding its negation unsatisfiable. Each proof is
followed by a negative control: the same statement about a deliberately wrong layout, for which the solver must find a
counterexample; a proof that cannot fail proves nothing. Enumeration over small sizes checks that ints and terms agree.

Products of two unknowns (window index x stride) are beyond what a solver decides, so indices appear as window *starts*:
`Start` is an index known by its product with the stride. Of the starts k = index * stride only what floor division gives is
assumed (k <= pixel < k + stride, different starts at least a stride apart), which makes every statement linear and a little
stronger than needed: it is proved for starts anywhere, multiples of the stride included.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import z3

from canopy.grid import Layout, boundary, first_window, last_window, ramp, sheet_index, weight

pixel, stride, overlap, feather = z3.Ints("pixel stride overlap feather")
window, other, edge, edge1, edge2, size = z3.Ints("window other edge edge1 edge2 size")

SIZES = (stride >= 1, overlap >= feather, feather >= 1)
"""All that the proofs assume of a layout, unless they say more. Each `Layout` satisfies it, see the last tests."""


def clamp(value: Any, low: Any, high: Any) -> Any:
    return z3.If(value < low, low, z3.If(value > high, high, value))


def halve(value: Any, two: int) -> Any:
    """Floor division by 2, for which the solver has a linear theory."""
    assert two == 2
    return value / 2  # z3 rounds integers down when the divisor is positive


def truncating(value: Any, divisor: Any) -> Any:
    """Division that rounds towards zero, as C does: the classic error west and north of an origin."""
    return z3.If(value >= 0, value / divisor, -((-value) / divisor))


def counterexample(claim: Any, *assumptions: Any) -> z3.ModelRef | None:
    """A case in which the assumptions hold and the claim does not, or None when there is none at all."""
    solver = z3.Solver()
    solver.set("timeout", 60_000)
    solver.add(*assumptions, z3.Not(claim))
    answer = solver.check()
    assert answer != z3.unknown, f"the solver gave up: {solver.reason_unknown()}"
    return solver.model() if answer == z3.sat else None


def consistent(*assumptions: Any) -> bool:
    """Whether the assumptions can hold at all; from assumptions that cannot, everything follows."""
    solver = z3.Solver()
    solver.add(*assumptions)
    return solver.check() == z3.sat


def prove(claim: Any, *assumptions: Any) -> None:
    assert consistent(*assumptions), "the assumptions contradict each other"
    case = counterexample(claim, *assumptions)
    assert case is None, f"counterexample: {case}"


def refute(claim: Any, *assumptions: Any) -> None:
    assert counterexample(claim, *assumptions) is not None, "a wrong statement was proved"


@dataclass(frozen=True)
class Start:
    """A window index known only through its product with the stride, the window's first pixel."""

    px: Any

    def __mul__(self, by: Any) -> Any:
        assert by is stride, "an index is multiplied by the stride only"
        return self.px

    def __add__(self, windows: int) -> Start:
        return Start(self.px + windows * stride)


class Floor:
    """Floor division by the stride as a relation: it names the start k of the quotient and records what k satisfies."""

    def __init__(self) -> None:
        self.facts: list[Any] = []

    def __call__(self, value: Any, divisor: Any) -> Any:
        if isinstance(divisor, int):
            return halve(value, divisor)
        assert divisor is stride, "only halving and division by the stride occur"
        k = z3.FreshInt("k")
        self.facts += [k <= value, value < k + stride]
        return Start(k)


def edges(start: Any, shift: Any = 0) -> tuple[Any, Any]:
    """Boundaries of the window at `start` and of the next one; `shift` spoils both for the negative controls."""
    own = Start(start)
    return boundary(own, stride, overlap, halve) + shift, boundary(own + 1, stride, overlap, halve) + shift


def weight_at(start: Any, shift: Any = 0) -> Any:
    return weight(pixel, *edges(start, shift), feather, clamp)


def same_lattice(a: Any, b: Any) -> Any:
    """Two starts of one lattice are equal or at least a stride apart: what multiples of the stride have in common."""
    return z3.Or(a == b, a <= b - stride, a >= b + stride)


# --- (a) the weights of consecutive windows telescope


def test_neighbouring_weights_telescope():
    """w(a, b) + w(b, c) = s(a) - s(c) for any three edges; by induction the same for any number of windows."""
    pair = weight(pixel, edge, edge1, feather, clamp) + weight(pixel, edge1, edge2, feather, clamp)
    prove(pair == ramp(pixel, edge, feather, clamp) - ramp(pixel, edge2, feather, clamp))


def test_neighbouring_weights_telescope_control():
    """Neighbours that disagree by one pixel about their common edge leave a seam."""
    pair = weight(pixel, edge, edge1, feather, clamp) + weight(pixel, edge1 + 1, edge2, feather, clamp)
    refute(pair == ramp(pixel, edge, feather, clamp) - ramp(pixel, edge2, feather, clamp), *SIZES)


def whole_weight(floor_first: Any, floor_last: Any) -> Any:
    """The telescoped sum of windows first..last at `pixel`: the ramp of the first minus that of the one after the last."""
    first = first_window(pixel, stride, overlap, feather, floor_first)
    last = last_window(pixel, stride, overlap, feather, floor_last)
    low = ramp(pixel, boundary(first, stride, overlap, halve), feather, clamp)
    return low - ramp(pixel, boundary(last + 1, stride, overlap, halve), feather, clamp)


def test_first_to_last_window_sum_to_the_full_weight():
    first, last = Floor(), Floor()
    total = whole_weight(first, last)
    prove(total == 2 * feather, *SIZES, *first.facts, *last.facts)


def test_first_to_last_window_sum_to_the_full_weight_control():
    """Leaving half a feather out of the search for the first or the last window loses weight."""

    class Narrow(Floor):
        shift: Any = 0

        def __call__(self, value: Any, divisor: Any) -> Any:
            return super().__call__(value if isinstance(divisor, int) else value + self.shift, divisor)

    for which in (0, 1):
        floors = Narrow(), Narrow()
        floors[which].shift = (halve(feather, 2), -halve(feather, 2))[which]
        refute(whole_weight(*floors) == 2 * feather, *SIZES, *floors[0].facts, *floors[1].facts)


# --- (b) weights are never negative


def test_weights_are_not_negative():
    prove(weight_at(window) >= 0, *SIZES)
    prove(weight_at(window) <= 2 * feather, *SIZES)


def test_weights_are_not_negative_control():
    """Windows that run backwards would subtract."""
    refute(weight_at(window) >= 0, stride <= -1, overlap >= feather, feather >= 1)


# --- (c) a window has no weight outside its own pixels


def inside_window() -> Any:
    return z3.And(window <= pixel, pixel < window + stride + overlap)


def test_support_lies_in_the_window():
    prove(z3.Implies(weight_at(window) != 0, inside_window()), *SIZES)


@pytest.mark.parametrize(
    ("shift", "sizes"),
    [
        pytest.param(0, (stride >= 1, overlap >= 0, feather == overlap + 2), id="feather wider than the overlap"),
        pytest.param(1, SIZES, id="boundary one pixel late"),
        pytest.param(-1, SIZES, id="boundary one pixel early"),
    ],
)
def test_support_lies_in_the_window_control(shift, sizes):
    refute(z3.Implies(weight_at(window, shift) != 0, inside_window()), *sizes)


def test_support_span_is_exactly_where_the_weight_is():
    """`Layout.support_span`: [edge - feather/2, edge + stride + feather/2), no pixel more and no pixel less."""
    edge_px = edges(window)[0]
    half = halve(feather, 2)
    span = z3.And(edge_px - half <= pixel, pixel < edge_px + stride + half)
    even = feather % 2 == 0
    prove((weight_at(window) > 0) == span, *SIZES, even)
    refute((weight_at(window) > 0) == z3.And(edge_px - half < pixel, pixel < edge_px + stride + half), *SIZES, even)


# --- (d) first_window and last_window name exactly the windows with weight


def test_windows_with_weight_lie_between_first_and_last():
    floor = Floor()
    first = first_window(pixel, stride, overlap, feather, floor).px
    last = last_window(pixel, stride, overlap, feather, floor).px
    lattice = same_lattice(window, first), same_lattice(window, last)
    between = z3.And(first <= window, window <= last)
    prove(z3.Implies(weight_at(window) != 0, between), *SIZES, *floor.facts, *lattice)


def test_windows_with_weight_lie_between_first_and_last_control():
    floor = Floor()
    first = first_window(pixel, stride, overlap, 0, floor).px  # forgets the feather
    assumed = *SIZES, *floor.facts, same_lattice(window, first)
    refute(z3.Implies(weight_at(window) != 0, first <= window), *assumed)


def test_first_and_last_window_have_weight():
    """So no window is run for nothing."""
    for end in (first_window, last_window):
        floor = Floor()
        start = end(pixel, stride, overlap, feather, floor).px
        prove(weight_at(start) > 0, *SIZES, *floor.facts)


def test_first_and_last_window_have_weight_control():
    for end, beyond in ((first_window, -1), (last_window, 1)):
        floor = Floor()
        start = end(pixel, stride, overlap, feather, floor).px
        refute(weight_at(start + beyond * stride) > 0, *SIZES, *floor.facts)


def test_windows_of_a_range_hold_those_of_each_of_its_pixels():
    """`Layout.windows_over` asks only the two ends: first and last window never decrease from one pixel to a later one."""
    for end in (first_window, last_window):
        floor = Floor()
        here = end(pixel, stride, overlap, feather, floor).px
        later = end(pixel + size, stride, overlap, feather, floor).px
        prove(here <= later, *SIZES, *floor.facts, same_lattice(here, later), size >= 0)
        refute(here < later, *SIZES, *floor.facts, same_lattice(here, later), size >= 0)


# --- symmetry: nothing prefers one direction


def mirrored(ramp_like: Any) -> Any:
    """A rise plus the same rise seen from the other side of its edge."""
    return ramp_like(pixel, edge) + ramp_like(2 * edge - 1 - pixel, edge) == 2 * feather


def test_ramp_is_its_own_mirror_image():
    prove(mirrored(lambda x, e: ramp(x, e, feather, clamp)), feather >= 1)


def test_ramp_is_its_own_mirror_image_control():
    """Sampled at the left edge of pixels instead of at their centres, the ramp is half a pixel off."""
    refute(mirrored(lambda x, e: clamp(2 * (x - e) + feather, 0, 2 * feather)), feather >= 1)


def test_a_window_weighs_its_two_halves_alike():
    """Which is why overlap must be even: the centre of an odd one is inside a pixel."""
    mirror = 2 * window + stride + overlap - 1 - pixel
    both = weight_at(window) == weight(mirror, *edges(window), feather, clamp)
    prove(both, *SIZES, overlap % 2 == 0)
    refute(both, *SIZES, overlap % 2 == 1)


# --- (e) a pixel belongs to one sheet


def owns(index: Any) -> Any:
    """`sheets_over`: sheet `index` covers [index * size, (index + 1) * size)."""
    return z3.And(index * size <= pixel, pixel < (index + 1) * size)


def test_the_sheet_of_a_pixel_covers_it():
    """With the true integer division; one product, which the solver can still decide."""
    prove(owns(sheet_index(pixel, size, lambda a, b: a / b)), size >= 1)


def test_the_sheet_of_a_pixel_covers_it_control():
    """Truncation gives the first pixel north or west of the origin to the wrong sheet."""
    refute(owns(sheet_index(pixel, size, truncating)), size >= 1)


def test_no_pixel_has_two_sheets():
    """Sheets as starts: of two that cover one pixel, neither can be a whole sheet away from the other."""
    both = z3.And(window <= pixel, pixel < window + size, other <= pixel, pixel < other + size)
    apart = z3.Or(window == other, window <= other - size, window >= other + size)
    prove(z3.Implies(both, window == other), size >= 1, apart)
    too_wide = z3.And(window <= pixel, pixel <= window + size, other <= pixel, pixel <= other + size)
    refute(z3.Implies(too_wide, window == other), size >= 1, apart)


# --- from the solver's sizes to real ones


def test_every_layout_satisfies_what_is_assumed():
    """`Layout` allows any window that is a multiple of 32 and any even stride from 2 to window - 2."""
    side, step = z3.Ints("side step")
    allowed = side >= 32, side % 32 == 0, step % 2 == 0, step >= 2, step <= side - 2
    prove(z3.And(step >= 1, side - step >= 2, (side - step) % 2 == 0), *allowed)
    refute((side - step) % 2 == 0, side >= 32, side % 32 == 0, step >= 2, step <= side - 2)  # if odd strides were allowed


@pytest.mark.parametrize("window_px", [32, 64, 96, 448, 4096])
def test_the_feather_of_every_layout_is_a_power_of_two_within_the_overlap(window_px):
    for stride_px in range(2, window_px, 2):
        layout = Layout(window_px=window_px, stride_px=stride_px)
        assert layout.overlap_px + layout.stride_px == window_px
        assert layout.feather_px <= layout.overlap_px < 2 * layout.feather_px
        assert layout.feather_px >= 2
        assert layout.feather_px & (layout.feather_px - 1) == 0


def test_enumeration_agrees():
    """Every stride, overlap and feather up to 9 px, even or odd, at every pixel of several windows around the origin."""
    for stride_px in range(1, 10):
        for overlap_px in range(1, 10):
            for feather_px in range(1, overlap_px + 1):
                size_px = stride_px + overlap_px
                reach = range(-size_px - 2, size_px + 3)
                bounds = {i: boundary(i, stride_px, overlap_px) for i in range(-60, 62)}
                for x in reach:
                    weights = {i: weight(x, bounds[i], bounds[i + 1], feather_px) for i in range(-60, 61)}
                    with_weight = [i for i, w in weights.items() if w]
                    first, last = (f(x, stride_px, overlap_px, feather_px) for f in (first_window, last_window))
                    assert sum(weights.values()) == 2 * feather_px
                    assert min(weights.values()) >= 0
                    assert with_weight == list(range(first, last + 1))
                    assert all(i * stride_px <= x < i * stride_px + size_px for i in with_weight)


def test_solver_terms_and_integers_agree():
    """The substitutes for `max`/`min` and `//` give Python's values, negative numbers included."""
    for value in range(-12, 13):
        assert z3.simplify(halve(z3.IntVal(value), 2)).as_long() == value // 2
        for divisor in (1, 2, 3, 7):
            assert z3.simplify(z3.IntVal(value) / divisor).as_long() == value // divisor
        for low, high in ((0, 8), (-3, 3)):
            assert z3.simplify(clamp(z3.IntVal(value), low, high)).as_long() == max(low, min(value, high))

"""Codes of an image's content that survive crop, rescale, recompression, flip, quarter turns and a change of light.

A fingerprint is a set of codes, one for each distinctive blob of the picture. The blobs are extrema of the difference of
Gaussians over position and scale (Lowe 2004), so they sit on the same trees in a crop, an enlargement or a compressed copy.
The code of a blob is the signs of 63 low-frequency DCT coefficients of the square around it: signs do not change with
brightness or contrast, and a flip or a quarter turn changes them in a known way, so no direction is ever estimated and the
eight symmetries of the square are tried when two fingerprints meet.

Two pictures are near-duplicates when several of their codes agree *and* the blobs lie in the same constellation: one scale,
one shift and one of the eight symmetries must carry one set onto the other. Forests look alike, but not in their layout; a
code alone says little, five at once in the same places are no accident. So a pair is found also when only a part of the
ground is shared.

Images are compared by the mean of their first three bands. Nothing is found in a picture without texture (open water,
saturated snow): it has no codes, and whoever calls is told by the length of the array.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final, NamedTuple

import numpy as np
from numba import njit
from numpy.typing import NDArray
from scipy import ndimage

from canopy.raster import Pixels

CODE: Final = np.dtype([("bits", "<u8"), ("x_px", "<f4"), ("y_px", "<f4"), ("sigma_px", "<f4")])
"""One code: signs of DCT coefficients; centre of the blob, from the image's upper left corner, and its size, in pixels."""

WORKING_SIDE_PX: Final = 192.0
"""Images are brought to this many pixels along the side of the square of their usable area.

Why: the number of codes and the time then depend on the picture and not on its pixel count. A crop starts at finer scales
than the whole, and holds the whole's coarser ones as well.
"""

FIRST_SIGMA_PX: Final = 1.6
"""Blur of the finest level, in working pixels."""

STEPS_PER_OCTAVE: Final = 3
LEVELS: Final = 11
"""Blurs of 1.6 * 2^(i/3) working pixels; blobs are looked for at all but the outermost differences."""

MIN_CONTRAST: Final = 0.02
"""Least difference of Gaussians of a blob, in standard deviations of the image."""

MAX_EDGE_RATIO: Final = 10.0
"""Largest ratio of the principal curvatures: along an edge a blob has no place of its own (Lowe 2004, section 4.1)."""

PATCH_PX: Final = 16
PATCH_HALF_SIGMAS: Final = 4.5
"""A code sees 4.5 sigma to every side, in 16 x 16 samples."""

FREQUENCIES: Final = 8

CLOSED_PX: Final = 2
"""Invalid specks up to twice this wide are filled by their surroundings; larger ones keep codes away."""

BITS: Final = FREQUENCIES**2 - 1
"""Signs in a code; the mean of the square is no property of its content."""

BANDS: Final = 4
BAND_BITS: Final = 15
"""Codes are compared when they agree in one of four groups of 15 bits, those of the slowest waves, and then bit by bit."""

MAX_BITS: Final = 14
"""Codes that differ in more signs than this are of different blobs."""

MIN_VOTES: Final = 5
"""Blobs in one constellation that make two images near-duplicates."""

ENOUGH_VOTES: Final = 24
"""Votes are counted up to this many: more say nothing new and cost time."""

SCALE_TOLERANCE: Final = 0.35
"""Largest difference of the scales that two pairs of blobs give, as log2."""

PLACE_TOLERANCE: Final = (1.0, 0.1)
"""How far a blob may lie from where another pair of blobs puts it: so many sigma, and so much of the way between the two."""


def fingerprint(image: Pixels) -> NDArray[Any]:
    """The codes of an image, or of a raster of heights.

    Args:
        image: (band, row, col) of any data type, with its validity.

    Returns:
        (code,) of `CODE`, from the coarsest blob to the finest; empty when the image has no texture or no usable area.
    """
    grey = image.data[:3].astype(np.float32).mean(axis=0)
    valid = image.valid & np.isfinite(grey)
    if not valid.any():
        return np.empty(0, CODE)
    known = grey[valid].astype(np.float64)
    spread = float(known.std())
    if spread <= 1e-6 * max(1.0, float(np.abs(known).max())):
        return np.empty(0, CODE)
    grey = np.where(valid, (grey - known.mean()) / spread, 0).astype(np.float32)
    # A margin of invalid pixels, so that closing does not reach beyond the image.
    margin = CLOSED_PX + 1
    support = ndimage.binary_closing(np.pad(valid, margin), iterations=CLOSED_PX)[margin:-margin, margin:-margin]
    work, room_px, zoom = _working(grey, valid, support)
    stack = _levels(work)
    blobs = _blobs(np.diff(stack, axis=0), MIN_CONTRAST, MAX_EDGE_RATIO)
    sigma = FIRST_SIGMA_PX * 2 ** (blobs[:, 0] / STEPS_PER_OCTAVE)
    at = np.rint(blobs[:, 1:]).astype(int)
    kept = room_px[at[:, 0], at[:, 1]] >= PATCH_HALF_SIGMAS * sigma
    blobs, sigma = blobs[kept], sigma[kept]
    codes = np.empty(len(blobs), CODE)
    codes["bits"] = (_DCT @ _patches(stack, blobs, sigma) @ _DCT.T > 0)[:, _U, _V] @ _WEIGHTS
    codes["y_px"] = (blobs[:, 1] + 0.5) / zoom[0]
    codes["x_px"] = (blobs[:, 2] + 0.5) / zoom[1]
    codes["sigma_px"] = sigma / math.sqrt(zoom[0] * zoom[1])
    return codes[np.lexsort((codes["x_px"], codes["y_px"], -codes["sigma_px"]))]


def _working(
    grey: NDArray[np.float32], valid: NDArray[np.bool_], support: NDArray[np.bool_]
) -> tuple[NDArray[np.float32], NDArray[np.float64], tuple[float, float]]:
    """The image at its working size, its distance to unusable ground (working pixels), and the zoom (rows, columns)."""
    zoom = WORKING_SIDE_PX / math.sqrt(float(support.sum()))
    shape = tuple(max(8, round(n * zoom)) for n in grey.shape)
    zooms = (shape[0] / grey.shape[0], shape[1] / grey.shape[1])
    # A pixel of the original is taken to be blurred by half a pixel already.
    blur = math.sqrt(max((FIRST_SIGMA_PX / zoom) ** 2 - 0.25, 0.01))
    smooth = ndimage.gaussian_filter(grey, blur, mode="constant", truncate=3.0)
    weight = ndimage.gaussian_filter(valid.astype(np.float32), blur, mode="constant", truncate=3.0)
    filled = np.where(weight > 1e-3, smooth / np.maximum(weight, 1e-3), np.float32(0))
    rows, cols = (((np.arange(n) + 0.5) / z - 0.5) for n, z in zip(shape, zooms, strict=True))
    work = ndimage.map_coordinates(filled, np.meshgrid(rows, cols, indexing="ij"), order=1, mode="nearest")
    usable = support[
        np.ix_(np.rint(rows).astype(int).clip(0, len(support) - 1), np.rint(cols).astype(int).clip(0, support.shape[1] - 1))
    ]
    return work, ndimage.distance_transform_edt(np.pad(usable, 1))[1:-1, 1:-1], zooms


def _levels(work: NDArray[np.float32]) -> NDArray[np.float32]:
    """(level, row, col): the working image at blurs of FIRST_SIGMA_PX * 2^(level / STEPS_PER_OCTAVE)."""
    levels = [work]
    for i in range(1, LEVELS):
        before, after = (FIRST_SIGMA_PX * 2 ** (k / STEPS_PER_OCTAVE) for k in (i - 1, i))
        levels.append(ndimage.gaussian_filter(levels[-1], math.sqrt(after**2 - before**2), mode="nearest", truncate=3.0))
    return np.stack(levels)


@njit(cache=True, nogil=True)
def _blobs(dog: NDArray[np.float32], contrast: float, edge_ratio: float) -> NDArray[np.float64]:
    """(blob, 3): level, row and col of the extrema of the differences of Gaussians, refined by a parabola along each axis.

    The levels are those of the blurs; a difference lies half a step above the blur it starts from.
    """
    found = []
    levels, rows, cols = dog.shape
    for k in range(1, levels - 1):
        for r in range(1, rows - 1):
            for c in range(1, cols - 1):
                value = dog[k, r, c]
                if abs(value) <= contrast:
                    continue
                sign = 1.0 if value > 0 else -1.0
                peak = True
                for dk in (0, -1, 1):
                    for dr in (-1, 0, 1):
                        for dc in (-1, 0, 1):
                            if sign * dog[k + dk, r + dr, c + dc] >= sign * value and (dk != 0 or dr != 0 or dc != 0):
                                peak = False
                                break
                        if not peak:
                            break
                    if not peak:
                        break
                if not peak:
                    continue
                yy = dog[k, r + 1, c] + dog[k, r - 1, c] - 2 * value
                xx = dog[k, r, c + 1] + dog[k, r, c - 1] - 2 * value
                kk = dog[k + 1, r, c] + dog[k - 1, r, c] - 2 * value
                xy = (dog[k, r + 1, c + 1] + dog[k, r - 1, c - 1] - dog[k, r + 1, c - 1] - dog[k, r - 1, c + 1]) / 4
                determinant = yy * xx - xy * xy
                if determinant <= 0 or (yy + xx) ** 2 * edge_ratio >= (edge_ratio + 1) ** 2 * determinant:
                    continue
                # A strict extremum bends along every axis, and its parabola's vertex is within half a step.
                level = k + 0.5 - (dog[k + 1, r, c] - dog[k - 1, r, c]) / 2 / kk
                found.append((level, r - (dog[k, r + 1, c] - dog[k, r - 1, c]) / 2 / yy,
                              c - (dog[k, r, c + 1] - dog[k, r, c - 1]) / 2 / xx))  # fmt: skip
    out = np.empty((len(found), 3))
    for i in range(len(found)):
        out[i, 0], out[i, 1], out[i, 2] = found[i]
    return out


@njit(cache=True, nogil=True)
def _patches(stack: NDArray[np.float32], blobs: NDArray[np.float64], sigma: NDArray[np.float64]) -> NDArray[np.float64]:
    """(blob, PATCH_PX, PATCH_PX): the square around each blob at its own blur, linear between levels and pixels."""
    levels, rows, cols = stack.shape
    out = np.empty((len(blobs), PATCH_PX, PATCH_PX))
    for i in range(len(blobs)):
        k = min(int(blobs[i, 0]), levels - 2)
        wk = blobs[i, 0] - k
        for p in range(PATCH_PX):
            y = blobs[i, 1] + sigma[i] * PATCH_HALF_SIGMAS * ((p + 0.5) / PATCH_PX * 2 - 1)
            y = min(max(y, 0.0), rows - 1.0)
            r = min(int(y), rows - 2)
            for q in range(PATCH_PX):
                x = blobs[i, 2] + sigma[i] * PATCH_HALF_SIGMAS * ((q + 0.5) / PATCH_PX * 2 - 1)
                x = min(max(x, 0.0), cols - 1.0)
                c = min(int(x), cols - 2)
                value = 0.0
                for dk in range(2):
                    low = stack[k + dk, r, c] * (c + 1 - x) + stack[k + dk, r, c + 1] * (x - c)
                    high = stack[k + dk, r + 1, c] * (c + 1 - x) + stack[k + dk, r + 1, c + 1] * (x - c)
                    value += (low * (r + 1 - y) + high * (y - r)) * (wk if dk else 1 - wk)
                out[i, p, q] = value
    return out


_DCT: Final = np.cos(math.pi * (np.arange(PATCH_PX) + 0.5) * np.arange(FREQUENCIES)[:, None] / PATCH_PX)
_UV: Final = sorted(
    ((u, v) for u in range(FREQUENCIES) for v in range(FREQUENCIES) if u + v), key=lambda uv: (sum(uv), max(uv), uv)
)
_U, _V = (np.array(part) for part in zip(*_UV, strict=True))
"""Half waves along the rows and the columns of each bit, the slowest first: these are the surest, and make the bands."""
_WEIGHTS: Final = np.uint64(1) << np.arange(BITS, dtype=np.uint64)


# --- the eight symmetries ------------------------------------------------------------------------------------------------


def _symmetries(codes: NDArray[Any]) -> NDArray[Any]:
    """(8, code): what the fingerprint of the image would be after each flip and quarter turn, up to a shift.

    A flip along an axis changes the sign of the odd coefficients along it; a transposition exchanges the axes.
    """
    flip_y, flip_x = (np.bitwise_or.reduce(_WEIGHTS[waves % 2 == 1]) for waves in (_U, _V))
    swapped = np.array([_UV.index((v, u)) for u, v in _UV])
    bits = (codes["bits"][:, None] >> np.arange(BITS, dtype=np.uint64)) & np.uint64(1)
    transposed = bits[:, swapped] @ _WEIGHTS
    out = np.empty((8, len(codes)), CODE)
    for symmetry, variant in enumerate(out):
        turned, y, x = symmetry & 4, symmetry & 2, symmetry & 1
        variant["sigma_px"] = codes["sigma_px"]
        variant["bits"] = transposed if turned else codes["bits"]
        variant["x_px"], variant["y_px"] = (codes[name] for name in (("y_px", "x_px") if turned else ("x_px", "y_px")))
        if y:
            variant["bits"] ^= flip_y
            variant["y_px"] *= -1
        if x:
            variant["bits"] ^= flip_x
            variant["x_px"] *= -1
    return out


# --- comparing -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class NearDuplicates:
    """Pairs of images that show the same content, ordered by their positions; one row a pair."""

    a: NDArray[np.int64]
    """Position of the image in the first sequence."""
    b: NDArray[np.int64]
    """Position in the second."""
    votes: NDArray[np.int64]
    """Blobs that agree in their codes and lie in one constellation, counted up to ENOUGH_VOTES."""
    distance: NDArray[np.float64]
    """Mean share of the signs that differ in the agreeing codes, 0 to MAX_BITS / 63."""

    def __len__(self) -> int:
        return len(self.a)


def near_duplicates(
    codes_a: Sequence[NDArray[Any]],
    codes_b: Sequence[NDArray[Any]],
    *,
    max_bits: int = MAX_BITS,
    min_votes: int = MIN_VOTES,
) -> NearDuplicates:
    """Which images of one sequence show content of which images of another.

    Args:
        codes_a: `fingerprint` of each image; the longer sequence, when speed matters.
        codes_b: `fingerprint` of each image of the other sequence.
        max_bits: Codes that differ in more signs do not agree.
        min_votes: Agreeing blobs in one constellation that a pair needs; fewer find smaller shares of common ground and
            more accidents.
    """
    bits = _joined([codes["bits"] for codes in codes_a], np.uint64)
    place = np.stack([_joined([codes[name] for codes in codes_a], np.float32) for name in ("x_px", "y_px", "sigma_px")])
    keys = [((bits >> np.uint64(k * BAND_BITS)) & np.uint64(2**BAND_BITS - 1)).astype(np.int64) for k in range(BANDS)]
    order = np.stack([np.argsort(key, kind="stable") for key in keys])
    known = _Known(
        bits=bits[order],
        order=order,
        starts=np.stack([np.searchsorted(k[o], np.arange(2**BAND_BITS + 1)) for k, o in zip(keys, order, strict=True)]),
        image=np.repeat(np.arange(len(codes_a)), [len(codes) for codes in codes_a]),
    )
    rows = []
    for number, codes in enumerate(codes_b):
        variants = _symmetries(codes)
        asked = np.ascontiguousarray(variants["bits"])
        at = np.stack([variants[name] for name in ("x_px", "y_px", "sigma_px")])
        found = _agreeing(asked, known, max_bits)
        for a, votes, distance in _constellations(found, place, at, min_votes):
            rows.append((a, number, votes, distance / BITS))
    rows.sort()
    columns = list(zip(*rows, strict=True)) if rows else [(), (), (), ()]
    return NearDuplicates(
        a=np.array(columns[0], np.int64),
        b=np.array(columns[1], np.int64),
        votes=np.array(columns[2], np.int64),
        distance=np.array(columns[3], np.float64),
    )


def _joined(parts: list[NDArray[Any]], dtype: Any) -> NDArray[Any]:
    return np.concatenate(parts) if parts else np.empty(0, dtype)


class _Known(NamedTuple):
    """The codes to search in, sorted by each of their bands."""

    bits: NDArray[np.uint64]
    """(band, code): the codes in the order of that band."""
    order: NDArray[np.int64]
    """(band, code): which code that is."""
    starts: NDArray[np.int64]
    """(band, key + 1): where the codes with a band's key start."""
    image: NDArray[np.int64]
    """(code,): position of the image it comes from."""


@njit(cache=True, nogil=True)
def _ones(word: np.uint64) -> int:
    """Number of ones, in parallel over fields of 2, 4 and 8 bits (Warren 2013, figure 5-2)."""
    word = word - ((word >> np.uint64(1)) & np.uint64(0x5555555555555555))
    word = (word & np.uint64(0x3333333333333333)) + ((word >> np.uint64(2)) & np.uint64(0x3333333333333333))
    word = (word + (word >> np.uint64(4))) & np.uint64(0x0F0F0F0F0F0F0F0F)
    return int((word * np.uint64(0x0101010101010101)) >> np.uint64(56))


@njit(cache=True, nogil=True)
def _agreeing(asked: NDArray[np.uint64], known: _Known, max_bits: int) -> NDArray[np.int64]:
    """(match, 4): image * 8 + symmetry, the known code, the asked code, differing signs; each pair of codes once."""
    capacity, count = 1024, 0
    out = np.empty((capacity, 4), np.int64)
    mask = np.uint64(2**BAND_BITS - 1)
    for symmetry in range(asked.shape[0]):
        for j in range(asked.shape[1]):
            word = asked[symmetry, j]
            for band in range(BANDS):
                key = int((word >> np.uint64(band * BAND_BITS)) & mask)
                for k in range(known.starts[band, key], known.starts[band, key + 1]):
                    unlike = word ^ known.bits[band, k]
                    bits = _ones(unlike)
                    if bits > max_bits:
                        continue
                    earlier = False
                    for before in range(band):
                        if (unlike >> np.uint64(before * BAND_BITS)) & mask == 0:
                            earlier = True
                    if earlier:
                        continue
                    if count == capacity:
                        capacity *= 2
                        grown = np.empty((capacity, 4), np.int64)
                        grown[:count] = out
                        out = grown
                    code = known.order[band, k]
                    out[count, 0] = known.image[code] * 8 + symmetry
                    out[count, 1] = code
                    out[count, 2] = j
                    out[count, 3] = bits
                    count += 1
    return out[:count]


@njit(cache=True, nogil=True)
def _constellations(
    found: NDArray[np.int64], place: NDArray[np.float32], at: NDArray[np.float32], min_votes: int
) -> list[tuple[int, int, float]]:
    """(image, votes, distance) of the images with enough blobs that one scale, shift and symmetry carry onto the asked."""
    order = np.argsort(found[:, 0], kind="mergesort")
    result = []
    best_image, best_votes, best_bits = -1, 0, 0.0
    first = 0
    while first < len(order):
        key = found[order[first], 0]
        last = first
        while last < len(order) and found[order[last], 0] == key:
            last += 1
        if last - first >= min_votes:
            votes, bits = _largest(found[order[first:last]], place, at[:, key % 8])
            if votes >= min_votes:
                if key // 8 != best_image:
                    if best_image >= 0:
                        result.append((best_image, best_votes, best_bits))
                    best_image, best_votes, best_bits = key // 8, votes, bits
                elif votes > best_votes:
                    best_votes, best_bits = votes, bits
        first = last
    if best_image >= 0:
        result.append((best_image, best_votes, best_bits))
    return result


@njit(cache=True, nogil=True)
def _largest(matches: NDArray[np.int64], place: NDArray[np.float32], at: NDArray[np.float32]) -> tuple[int, float]:
    """Votes and mean differing bits of the largest constellation.

    Each match in turn gives a scale and a shift; the others vote for it when they agree with both. Matches that share a
    blob, or lie on the same spot, have one vote together: one tree at several scales is one observation.
    """
    n = len(matches)
    most, most_bits = 0, 0.0
    counted = np.empty(n, np.int64)
    for i in range(n):
        a, b = matches[i, 1], matches[i, 2]
        scale = place[2, a] / at[2, b]
        votes, bits = 0, 0.0
        for j in range(n):
            c, d = matches[j, 1], matches[j, 2]
            if abs(math.log2(place[2, c] / at[2, d] / scale)) > SCALE_TOLERANCE:
                continue
            away_x, away_y = place[0, c] - place[0, a], place[1, c] - place[1, a]
            off = math.hypot(away_x - scale * (at[0, d] - at[0, b]), away_y - scale * (at[1, d] - at[1, b]))
            if off > PLACE_TOLERANCE[0] * place[2, c] + PLACE_TOLERANCE[1] * math.hypot(away_x, away_y):
                continue
            again = False
            for k in range(votes):
                e, f = matches[counted[k], 1], matches[counted[k], 2]
                near_a = math.hypot(place[0, c] - place[0, e], place[1, c] - place[1, e])
                near_b = math.hypot(at[0, d] - at[0, f], at[1, d] - at[1, f])
                if near_a <= max(place[2, c], place[2, e]) or near_b <= max(at[2, d], at[2, f]):
                    again = True
                    break
            if not again:
                counted[votes] = j
                votes += 1
                bits += matches[j, 3]
                if votes == ENOUGH_VOTES:
                    return votes, bits / votes
        if votes > most:
            most, most_bits = votes, bits / votes
    return most, most_bits

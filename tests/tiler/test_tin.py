"""Triangulated surfaces against SciPy's own interpolation, and in tiles against themselves."""

import numpy as np
import pytest
from scipy.interpolate import LinearNDInterpolator

from canopy.tiler import tin as tin_module
from canopy.tiler.tin import TILE_M, TiledTin, Tin, delaunay, longest_edge, one_per_place, raise_to_triangles, tiles_over

LEFT, BOTTOM = 493_952.0, 4_878_080.0  # a corner of a tile


@pytest.fixture
def rng():
    return np.random.default_rng(5)


def vertices(rng, n, low=-60.0, high=320.0):
    """Places to the centimetre, as files have them, and a rough surface."""
    x, y = np.round(rng.uniform(low, high, (2, n)), 2)
    return one_per_place(LEFT + x, BOTTOM + y, 3 * np.sin(x / 20) + 0.2 * y + rng.normal(0, 0.3, n), 0.0)


def test_a_tile_is_linear_in_the_triangles_that_scipy_finds(rng):
    x, y, z = vertices(rng, 4000, -40, 170)
    tin = Tin.of(x, y, z, (LEFT, BOTTOM, LEFT + TILE_M, BOTTOM + TILE_M), 1.0)
    px, py = LEFT + rng.uniform(0, TILE_M, 5000), BOTTOM + rng.uniform(0, TILE_M, 5000)
    theirs = LinearNDInterpolator(np.column_stack([x - LEFT, y - BOTTOM]), z)(px - LEFT, py - BOTTOM)
    np.testing.assert_allclose(tin.under(px, py), theirs, atol=1e-6)
    # The control: a vertex moved by a metre in height shows.
    z = z.copy()
    z[np.hypot(x - px[0], y - py[0]).argmin()] += 1
    assert not np.allclose(Tin.of(x, y, z, tin.tile, 1.0).under(px, py), theirs, atol=1e-3)


@pytest.mark.parametrize("moat", [False, True])
def test_vertices_close_to_a_tile_suffice_where_they_are_dense(rng, monkeypatch, moat):
    """A moat beside the tile is the case where they do not, though those in the tile are as dense."""
    x, y, z = vertices(rng, 16_000, -50, 178)
    if moat:
        keep = (x < LEFT + TILE_M + 1) | (x > LEFT + TILE_M + 35)
        x, y, z = x[keep], y[keep], z[keep]
    tile = (LEFT, BOTTOM, LEFT + TILE_M, BOTTOM + TILE_M)
    px, py = LEFT + rng.uniform(0, TILE_M, 5000), BOTTOM + rng.uniform(0, TILE_M, 5000)
    px[:500] = LEFT + TILE_M - rng.uniform(0, 1, 500)
    taken = []

    def counted(x, y):
        taken.append(x.size)
        return delaunay(x, y)

    monkeypatch.setattr(tin_module, "delaunay", counted)
    ours = Tin.of(x, y, z, tile, 1.0).under(px, py)
    assert taken[0] < 0.7 * x.size
    assert taken[1:] == ([x.size] if moat else [])
    with monkeypatch.context() as all_vertices:
        all_vertices.setattr(tin_module, "_first_reach", lambda *_: np.inf)
        whole = Tin.of(x, y, z, tile, 1.0).under(px, py)
    np.testing.assert_allclose(ours, whole, atol=1e-9)
    # The control: without the proof the moat's shore would be unknown or another surface.
    monkeypatch.setattr(tin_module, "_settled", lambda *_: True)
    assert np.allclose(Tin.of(x, y, z, tile, 1.0).under(px, py), whole, atol=1e-3) == (not moat)


@pytest.mark.parametrize("shape", ["scan lines", "regular", "strip", "around a hole"])
def test_awkward_layouts(rng, shape):
    """Many places on one line, circles through many places, slivers at the hull: the walk must still end right."""
    step = 1.25 * np.arange(120)
    x, y = (v.ravel() for v in np.meshgrid(step, step[::4] if shape == "scan lines" else step))
    if shape == "strip":
        x, y = rng.uniform(40, 47, 3000).round(2), rng.uniform(-60, 190, 3000).round(2)
    keep = np.hypot(x - 60, y - 60) > 40 if shape == "around a hole" else np.ones(x.size, bool)
    x, y, z = one_per_place(LEFT + x[keep], BOTTOM + y[keep], rng.normal(0, 1, keep.sum()), 0.0)
    tin = Tin.of(x, y, z, (LEFT, BOTTOM, LEFT + TILE_M, BOTTOM + TILE_M), 1.0)
    at = rng.integers(0, x.size, 300)
    inside = (x[at] - LEFT < TILE_M) & (y[at] - BOTTOM < TILE_M) & (y[at] > BOTTOM) & (x[at] > LEFT)
    at = at[inside]
    np.testing.assert_allclose(tin.under(x[at], y[at]), z[at], atol=1e-6)
    px, py = LEFT + rng.uniform(0, TILE_M, 3000), BOTTOM + rng.uniform(0, TILE_M, 3000)
    theirs = LinearNDInterpolator(np.column_stack([x - LEFT, y - BOTTOM]), z)(px - LEFT, py - BOTTOM)
    np.testing.assert_array_equal(np.isnan(tin.under(px, py)), np.isnan(theirs))


def test_what_cannot_be_triangulated_is_unknown(rng):
    line = np.arange(50.0)
    for x, y in ((line[:2], line[:2]), (line, line), (line, np.zeros(50)), (line[:0], line[:0])):
        assert delaunay(x, y)[0].size == 0
        tin = Tin.of(LEFT + x, BOTTOM + y, x, (LEFT, BOTTOM, LEFT + TILE_M, BOTTOM + TILE_M), 1.0)
        assert np.isnan(tin.under(LEFT + line, BOTTOM + line)).all()


def test_tiles_do_not_show(rng):
    """Across seams the surface is that of one triangulation of everything, but for rounding."""
    x, y, z = vertices(rng, 40_000)
    px, py = LEFT + rng.uniform(0, 256, 20_000), BOTTOM + rng.uniform(0, 256, 20_000)
    tiled = TiledTin(x, y, z, 1.0, 50.0).under(px, py)
    theirs = LinearNDInterpolator(np.column_stack([x - LEFT, y - BOTTOM]), z)(px - LEFT, py - BOTTOM)
    np.testing.assert_allclose(tiled, theirs, atol=1e-6)
    # The control: without a buffer the seams show.
    bare = TiledTin(x, y, z, 1.0, 0.0).under(px, py)
    assert not np.allclose(bare, theirs, atol=1e-3, equal_nan=False)


def test_a_height_does_not_depend_on_what_else_is_asked(rng):
    x, y, z = vertices(rng, 8000)
    px, py = LEFT + rng.uniform(0, 256, 2000), BOTTOM + rng.uniform(0, 256, 2000)
    whole = TiledTin(x, y, z, 1.0, 50.0).under(px, py)
    some = rng.permutation(2000)[:300]
    np.testing.assert_array_equal(TiledTin(x, y, z, 1.0, 50.0).under(px[some], py[some]), whole[some])


@pytest.mark.parametrize("cell", [0.0, 0.25])
def test_one_vertex_per_place_whatever_the_order(rng, cell):
    x, y = LEFT + np.round(rng.uniform(0, 5, 3000), 1), BOTTOM + np.round(rng.uniform(0, 5, 3000), 1)
    z = np.round(rng.normal(0, 1, 3000), 1)
    once = one_per_place(x, y, z, cell)
    order = rng.permutation(3000)
    for a, b in zip(once, one_per_place(x[order], y[order], z[order], cell), strict=True):
        np.testing.assert_array_equal(a, b)
    for a, b in zip(once, one_per_place(*(np.tile(v, 2) for v in (x, y, z)), cell), strict=True):
        np.testing.assert_array_equal(a, b)
    if not cell:
        lowest = {}
        for place, height in zip(zip(x, y, strict=True), z, strict=True):
            lowest[place] = min(height, lowest.get(place, np.inf))
        assert {(a, b): c for a, b, c in zip(*once, strict=True)} == lowest
    else:
        best = {}
        for a, b, c in zip(x, y, z, strict=True):
            u, v = np.floor(a / cell), np.floor(b / cell)
            away = (a / cell - u - 0.5) ** 2 + (b / cell - v - 0.5) ** 2
            best[u, v] = min((away, a, b, c), best.get((u, v), (np.inf,)))
        assert list(zip(*once, strict=True)) == [best[place][1:] for place in sorted(best)]


def test_pixels_are_raised_to_the_triangles_over_their_centres(rng):
    x, y = rng.uniform(0, 40, (2, 300))
    z = rng.uniform(0, 20, 300)
    triangles, _ = delaunay(x, y)
    short = triangles[longest_edge(x, y, triangles) < 5]
    own = np.ones((30, 40), bool)
    own[:, :3] = False
    chm = np.full((30, 40), np.nan, np.float32)
    chm[10, 10] = 99
    raise_to_triangles(x, y, z, short, own, chm)
    v, u = np.indices(chm.shape) + 0.5
    theirs = LinearNDInterpolator(np.column_stack([x, y]), z)(u, v)
    theirs[:, :3] = np.nan
    theirs[10, 10] = 99
    known = np.isfinite(chm)
    np.testing.assert_allclose(chm[known], theirs[known], atol=1e-4)
    assert 0 < (np.isfinite(theirs) & ~known).sum() < 400, "long triangles are left out, most are not"
    # A pixel is left out only where the triangle over it is long.
    assert longest_edge(x, y, triangles).max() > 5


def test_tiles_over_a_box():
    assert list(tiles_over((-1, 5, 9, 6), 10)) == [(-10, 0, 0, 10), (0, 0, 10, 10)]

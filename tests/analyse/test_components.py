"""Connected components over strips, against scikit-image on the whole raster."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from shapely import box, union_all
from skimage.measure import label

from canopy.analyse.components import Components

LOSS, GAIN = 1, 3


def over_strips(folder, kind, values, *, least_px, strip_px):
    """The pixels of components that are large enough, the components, and the pixels of small ones."""
    rows, cols = kind.shape
    components = Components(folder, cols=cols, kinds=(LOSS, GAIN), values=len(values), least_px=least_px)
    starts = range(0, rows, strip_px)
    for row in reversed(starts):
        part = kind[row : row + strip_px]
        marked = (part == LOSS) | (part == GAIN)
        components.add(row, part, values[:, row : row + strip_px][:, marked], first=row == 0)
    kept, found = np.zeros(kind.shape, bool), []
    for row in starts:
        kept[row : row + strip_px], ended = components.take(row, kind[row : row + strip_px], last=row + strip_px >= rows)
        found += ended
    assert not list(folder.iterdir()), "what memory need not hold is gone"
    return kept, found, components.small_px


def whole(kind, least_px):
    """(row, col) labels of the components that are large enough, by scikit-image."""
    labels = label(np.where((kind == LOSS) | (kind == GAIN), kind, 0), connectivity=2, background=0)
    small = np.bincount(labels.ravel()) < least_px
    return np.where(small[labels], 0, labels)


@settings(max_examples=max(20, settings().max_examples // 3))
@given(
    shape=st.tuples(st.integers(1, 16), st.integers(1, 16)), share=st.floats(0.02, 0.7), least_px=st.integers(1, 9),
    seed=st.integers(0, 10_000), strip_px=st.integers(1, 25),
)  # fmt: skip
def test_strips_are_as_the_whole(tmp_path_factory, shape, share, least_px, seed, strip_px):
    rng = np.random.default_rng(seed)
    kind = np.where(rng.random(shape) < share, rng.choice([LOSS, GAIN], shape), rng.choice([0, 2], shape)).astype(np.uint8)
    values = rng.integers(-100, 100, (2, *shape)).astype(float)
    folder = tmp_path_factory.mktemp("strips")
    kept, found, small_px = over_strips(folder, kind, values, least_px=least_px, strip_px=strip_px)
    expected = whole(kind, least_px)
    np.testing.assert_array_equal(kept, expected > 0)
    numbers = np.unique(expected[expected > 0])
    assert len(found) == len(numbers)
    last = {int(np.flatnonzero((expected == number).ravel())[-1]): expected == number for number in numbers}
    assert [each.last_px for each in found] == sorted(last)
    for each in found:
        there = last[each.last_px]
        assert each.pixels == there.sum()
        assert each.kind == kind[there][0]
        np.testing.assert_array_equal(each.sums, values[:, there].sum(axis=1))
        assert each.outline.is_valid
        assert each.outline.area == there.sum()
        y, x = np.indices(shape)
        assert each.outline.equals(union_all(box(x[there], y[there], x[there] + 1, y[there] + 1)))
    for one in (LOSS, GAIN):
        assert small_px[one] == ((kind == one) & (expected == 0)).sum()


def test_outlines_do_not_show_the_strips(tmp_path):
    rng = np.random.default_rng(3)
    kind = np.where(rng.random((28, 30)) < 0.55, LOSS, 2).astype(np.uint8)
    values = np.ones((1, 28, 30))
    outlines = {
        strip_px: [each.outline.wkt for each in over_strips(tmp_path, kind, values, least_px=4, strip_px=strip_px)[1]]
        for strip_px in (3, 28)
    }
    assert outlines[3] == outlines[28]
    assert max(len(text) for text in outlines[3]) > 1000, "something crosses the strips"


def test_a_corner_connects_and_another_class_does_not(tmp_path):
    kind = np.array([[1, 2, 2], [2, 1, 3], [2, 3, 1]], np.uint8)
    kept, found, _ = over_strips(tmp_path, kind, np.zeros((0, 3, 3)), least_px=3, strip_px=2)
    assert [(each.kind, each.pixels) for each in found] == [(LOSS, 3)]
    np.testing.assert_array_equal(kept, np.eye(3, dtype=bool))
    assert len(found[0].outline.geoms) == 3, "parts that touch at a corner only"


def test_a_thin_column_through_many_strips_is_one(tmp_path):
    column = 5
    kind = np.full((100, 6), 2, np.uint8)
    kind[:, column] = GAIN
    kept, found, _ = over_strips(tmp_path, kind, np.ones((1, 100, 6)), least_px=100, strip_px=3)
    assert [(each.pixels, each.sums[0]) for each in found] == [(100, 100.0)]
    assert kept.sum() == 100
    assert found[0].outline.equals(box(column, 0, column + 1, 100))
    assert len(found[0].outline.geoms[0].exterior.coords) == 5, "no corner where a strip ends"

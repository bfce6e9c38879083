"""Hypothesis strategies for the values of `canopy.grid`, with sizes a test can afford."""

from hypothesis import strategies as st
from pyproj import CRS

from canopy.grid import Box, Lattice, Layout

METRIC_CRS = ("EPSG:32610", "EPSG:32733", "EPSG:2193", "EPSG:5070", "EPSG:2154")
"""Metric CRSs north and south, UTM and not, with false origins of several sizes."""

GSDS_M = (0.1, 0.25, 0.3048, 0.5, 0.6, 1.0, 1.194328566955879, 10.0)
"""Pixel sizes in metres of real imagery; most have no exact binary form, which is the point."""

FAR_PX = 100_000_000
"""Farther from the origin than any metric CRS reaches at 0.1 m."""


@st.composite
def layouts(draw: st.DrawFn, most_px: int = 256) -> Layout:
    """Every layout up to `most_px`: any multiple of 32, any even stride from 2 to window - 2."""
    window_px = 32 * draw(st.integers(1, most_px // 32))
    return Layout(window_px=window_px, stride_px=2 * draw(st.integers(1, window_px // 2 - 1)))


@st.composite
def boxes(draw: st.DrawFn, most_px: int = 200, far_px: int = FAR_PX) -> Box:
    """Rectangles of sides up to `most_px`, on all sides of the origin and often across it."""
    near = st.integers(-most_px, most_px)
    first = st.one_of(near, st.integers(-far_px, far_px))
    row0, col0 = draw(first), draw(first)
    side = st.integers(1, most_px)
    return Box(row0, col0, row0 + draw(side), col0 + draw(side))


@st.composite
def lattices(draw: st.DrawFn) -> Lattice:
    """Lattices of real CRSs and pixel sizes."""
    crs = CRS.from_user_input(draw(st.sampled_from(METRIC_CRS)))
    return Lattice(crs=crs, gsd_m=draw(st.sampled_from(GSDS_M)))

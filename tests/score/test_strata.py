"""Scores by land cover and by polygon: which cells are in which, in any CRS, and what is wrong with the files."""

import geopandas as gpd
import numpy as np
import pytest
import shapely
from pyproj import CRS

from canopy.errors import AreaError, CanopyError, ScoreError
from canopy.score import Strata, score_map
from tests.score.rasters import LEFT_M, TOP_M, UTM, write, write_map

SHAPE = (20, 30)


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """A map that errs by its row, and its reference."""
    folder = tmp_path_factory.mktemp("pair")
    true = np.full(SHAPE, 10.0)
    found = true + np.arange(20.0)[:, None]
    return write_map(folder / "map", found, np.zeros(SHAPE), found), write(folder / "chm.tif", true)


def by(pair, **strata):
    return score_map(*pair, strata=Strata(**strata), resamples=20).comparisons[0]


def box(row0, col0, row1, col1):
    return shapely.box(LEFT_M + col0, TOP_M - row1, LEFT_M + col1, TOP_M - row0)


def polygons(path, shapes, names=None, column="Name", crs=UTM):
    data = {} if names is None else {column: names}
    gpd.GeoDataFrame(data, geometry=list(shapes), crs=UTM).to_crs(crs).to_file(path)
    return path


@pytest.mark.parametrize("crs", [UTM, CRS.from_epsg(4326)])
def test_polygons_by_hand(pair, tmp_path, crs):
    shapes = [box(0, 0, 5, 30), box(5, 0, 7, 10), box(10, 20, 12, 30), box(0, 100, 5, 110)]
    path = polygons(tmp_path / "a.gpkg", shapes, ["north", "two parts", "two parts", "away"], crs=crs)
    comparison = by(pair, polygons=path)
    groups = {group.label: group for group in comparison.maps[0].by_polygon}
    assert list(groups) == ["north", "two parts"]
    assert groups["north"].measures.n == 5 * 30
    assert groups["north"].measures.bias_m.value == pytest.approx(2)
    assert groups["two parts"].measures.n == 40
    assert groups["two parts"].measures.bias_m.value == pytest.approx((5 + 6 + 10 + 11) / 4)
    assert groups["north"].coverage.coverage.value == 1.0
    assert "column Name" in comparison.polygons


def test_overlapping_polygons_each_have_their_cells(pair, tmp_path):
    path = polygons(tmp_path / "a.gpkg", [box(0, 0, 10, 30), box(5, 0, 15, 30)])
    found = by(pair, polygons=path).maps[0].by_polygon
    assert [(g.label, g.measures.n) for g in found] == [("polygon 1", 300), ("polygon 2", 300)]


def test_land_cover_is_of_the_centre(pair, tmp_path):
    """Classes of 4 m whose borders are not those of the cells, with a hole and a class that no reference is in."""
    classes = np.array([[10, 10, 0, 20, 20, 20, 20, 20]] * 5, dtype=np.uint8)
    path = write(tmp_path / "classes.tif", classes, 4.0, left=LEFT_M - 1.3, unit=None, nodata=0)
    names = tmp_path / "names.toml"
    names.write_text('10 = "tree cover"\n')
    comparison = by(pair, land_cover=path, land_cover_names=names)
    groups = {group.label: group.measures.n for group in comparison.maps[0].by_land_cover}
    assert groups == {"tree cover": 7 * 20, "class 20": (30 - 11) * 20}
    assert "the centre of the cell" in comparison.land_cover


def test_errors_are_one_line(pair, tmp_path):
    lines = polygons(tmp_path / "lines.gpkg", [shapely.LineString([(LEFT_M, TOP_M), (LEFT_M + 9, TOP_M - 9)])])
    good = polygons(tmp_path / "good.gpkg", [box(0, 0, 5, 5)], ["a"])
    many = np.arange(20 * 30, dtype=np.uint16).reshape(20, 30) + 1
    bad_names = tmp_path / "names.toml"
    bad_names.write_text("tree = 10\n")
    classes = write(tmp_path / "classes.tif", many, unit=None, nodata=0)
    half = write(tmp_path / "half.tif", np.full(SHAPE, 1.5))
    for error, message, strata in (
        (AreaError, "polygons only", {"polygons": lines}),
        (AreaError, "has no column 'name', only Name", {"polygons": good, "polygon_name": "name"}),
        (AreaError, "does not exist", {"polygons": tmp_path / "none.gpkg"}),
        (ScoreError, "more than 64 classes", {"land_cover": classes}),
        (ScoreError, "no whole numbers", {"land_cover": half}),
        (ScoreError, "no table of names", {"land_cover": classes, "land_cover_names": bad_names}),
        (CanopyError, "does not exist", {"land_cover": tmp_path / "none.tif"}),
    ):
        with pytest.raises(error, match=message) as caught:
            by(pair, **strata)
        assert "\n" not in str(caught.value)

"""Plans: which sheets an area needs, in which CRS, what a plan is the same as, and what of its inputs it knows."""

import json
import shutil
from pathlib import Path

import geopandas
import numpy as np
import pytest
import rasterio.shutil
import shapely
from hypothesis import given, settings
from hypothesis import strategies as st
from pyproj import CRS, Transformer

from canopy.errors import AreaError, GridError
from canopy.grid import Box, Grid, Lattice
from canopy.mosaicker.ensemble import load_ensemble
from canopy.raster import read_raster, write_raster
from canopy.region import Plan, map_region, plan_region
from canopy.region.plan import _touched
from canopy.region.records import SHEETS, Work
from canopy.tiler.area import area_mask, as_area
from canopy.tiler.imagery import ImageFiles
from tests.region.conftest import BOX, COUNT, LATTICE, SHEET_PX


@pytest.fixture(scope="module")
def ensemble(tiny_model):
    return load_ensemble(tiny_model)


@pytest.fixture(scope="module")
def planned(image, tiny_model, ensemble):
    """Makes plans of the image."""

    def plan(area=None, source=image, **options):
        return plan_region(
            area, ImageFiles(source), ensemble, folders=[Path(tiny_model)], **({"sheet_px": SHEET_PX} | options)
        )

    return plan


def area_file(path, *polygons, crs=LATTICE.crs):
    geopandas.GeoDataFrame(geometry=list(polygons), crs=crs).to_file(path)
    return path


def square(box, lattice=LATTICE):
    return shapely.box(*lattice.grid(box).bounds)


# --- what a plan is ------------------------------------------------------------------------------------------------------


def test_a_plan_survives_its_file(planned, tmp_path):
    plan = planned()
    work = Work.begin(tmp_path, plan, None)
    again = Work.read(work.folder).plan
    assert (again, again.digest, again.identity) == (plan, plan.digest, plan.identity)
    assert again.lattice == plan.lattice == LATTICE
    table = geopandas.read_parquet(work.folder / SHEETS)
    assert table.crs == LATTICE.crs
    assert [*table["name"]] == [plan.sheet_name(number) for number in range(COUNT)]
    assert [geometry.bounds for geometry in table.geometry] == [
        pytest.approx(LATTICE.grid(plan.sheet(number)).bounds) for number in range(COUNT)
    ]


def test_identity_is_what_decides_the_pixels_and_nothing_else(planned, image, tiny_model, ensemble, tmp_path):
    plan = planned()
    for options in ({"sheet_px": 128}, {"max_file_px": 100}, {"batch": 1}):
        same = planned(**options)
        assert same.identity == plan.identity, options
        assert same.digest != plan.digest, options
    area = area_file(tmp_path / "area.gpkg", square(BOX))
    others = [
        planned(gsd_m=0.8), planned(crs="EPSG:32611"), planned(bands=(3, 2, 1)), planned(area), planned(device="cuda"),
        planned(precision="bfloat16"), planned(compiled=True),
        plan_region(None, ImageFiles(image), load_ensemble(tiny_model, tta="flips"), folders=[Path(tiny_model)]),
    ]  # fmt: skip
    assert len({plan.identity, *(other.identity for other in others)}) == len(others) + 1
    assert all(plan.difference(other) != "other settings" for other in others)


def test_a_plan_does_not_depend_on_the_folder_one_is_in(planned, image, monkeypatch):
    plan = planned()
    monkeypatch.chdir(image.parent)
    relative = planned(source=image.name)
    assert relative.identity == plan.identity
    assert relative.imagery.files == plan.imagery.files == (str(image),)


def test_what_a_vrt_is_made_of_is_stamped(planned, image, tmp_path):
    shutil.copy2(image, tmp_path / "part.tif")
    rasterio.shutil.copy(tmp_path / "part.tif", tmp_path / "inner.vrt", driver="VRT")
    text = (tmp_path / "inner.vrt").read_text()
    (tmp_path / "outer.vrt").write_text(text.replace("part.tif", "inner.vrt"))
    plan = planned(source=tmp_path / "outer.vrt")
    assert {Path(stamp.path).name for stamp in plan.imagery.stamps} == {"outer.vrt", "inner.vrt", "part.tif"}
    assert planned(source=tmp_path / "part.tif").imagery.stamps != plan.imagery.stamps


# --- areas -----------------------------------------------------------------------------------------------------------------


@settings(max_examples=25)
@given(data=st.data())
def test_sheets_are_those_that_the_area_touches(data):
    """Against the mask of every pixel: no sheet with a pixel of the area is left out, and no sheet far from it is kept."""
    boxes = [Box(-100 + row, col, -100 + row + 50, col + 50) for row in range(0, 200, 50) for col in range(0, 250, 50)]
    number = st.floats(0, 240, allow_nan=False)
    parts = [
        shapely.Point(data.draw(number), 100 - data.draw(number)).buffer(data.draw(st.floats(0.05, 40)))
        for _ in range(data.draw(st.integers(1, 4)))
    ]
    holed = [part.difference(part.centroid.buffer(0.5 * np.sqrt(part.area / np.pi))) for part in parts]
    lattice = Lattice(crs=LATTICE.crs, gsd_m=1.0)
    polygons = geopandas.GeoSeries(holed, crs=lattice.crs)
    found = _touched(boxes, lattice, polygons)
    for box in boxes:
        if area_mask(polygons, lattice, box).any():
            assert box in found
        if polygons.distance(shapely.box(*lattice.grid(box).bounds)).min() > 0:
            assert box not in found


def test_scattered_parts_with_holes(planned, image, tiny_model, tmp_path):
    """Two parts far from each other, one with a hole: no sheet between them, and the pixels are those of the whole map."""
    first = Box(BOX.row0 + 5, BOX.col0 + 70, BOX.row0 + 35, BOX.col0 + 110)
    hole = Box(BOX.row0 + 12, BOX.col0 + 80, BOX.row0 + 20, BOX.col0 + 95)
    second = Box(BOX.row0 + 3, BOX.col0 + 330, BOX.row0 + 30, BOX.col0 + 355)
    area = area_file(tmp_path / "area.gpkg", square(first).difference(square(hole)), square(second))
    plan = planned(area)
    assert plan.extent == Box(second.row0, first.col0, first.row1, second.col1)
    assert [sheet[1] for sheet in plan.sheets] == [BOX.col0 + 70, BOX.col0 + 320]
    result = map_region(area, imagery=image, model=tiny_model, out=tmp_path / "out", sheet_px=SHEET_PX)
    whole = map_region(imagery=image, model=tiny_model, out=tmp_path / "whole")
    found, wanted = read_raster(result.height)[0].data[0], read_raster(whole.height)[0].data[0]
    wanted = wanted[plan.extent.slices_in(BOX)]
    inside = area_mask(plan.polygons, LATTICE, plan.extent)
    assert inside.sum() == 30 * 40 - 8 * 15 + 27 * 25
    np.testing.assert_array_equal(found, np.where(inside, wanted, np.nan))


def test_a_sliver_between_the_centres_of_pixels(planned, image, tiny_model, tmp_path):
    """As wide as a third of a pixel, it has no pixel's centre in it: that is said, and nothing is left."""
    left, _, _, top = LATTICE.grid(BOX).bounds
    sliver = shapely.box(left + 60.05, top - 20, left + 60.25, top - 2)
    area = area_file(tmp_path / "area.gpkg", sliver)
    with pytest.raises(AreaError, match=r"no valid pixel in the area of interest; .* no narrower than a pixel of 0\.6 m"):
        map_region(area, imagery=image, model=tiny_model, out=tmp_path / "out", sheet_px=SHEET_PX)
    assert not (tmp_path / "out").exists()
    wider = area_file(tmp_path / "wider.gpkg", sliver.buffer(0.4))
    found = read_raster(map_region(wider, imagery=image, model=tiny_model, out=tmp_path / "out", sheet_px=SHEET_PX).height)[
        0
    ].data
    assert 30 <= np.isfinite(found).sum() <= 70


# --- the one CRS of a map ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def border(tmp_path_factory):
    """Imagery in degrees across the border of the zones 10 and 11 at 120 W, 44 N, more of it in the west."""
    step = 0.6 / 111_000
    grid = Grid(
        crs=CRS.from_epsg(4326), transform=rasterio.Affine(step, 0, -120 - 120 * step, 0, -step, 44.0), shape=(80, 200)
    )
    path = tmp_path_factory.mktemp("border") / "photo.tif"
    write_raster(path, np.random.default_rng(1).integers(0, 256, (3, *grid.shape), dtype=np.uint8), grid=grid)
    return path


def test_an_area_across_the_border_of_zones_is_one_map(planned, border, tiny_model, tmp_path):
    area = (-120.0004, 43.9996, -119.9997, 43.9999)
    plan = planned(area, source=border)
    assert plan.crs == "EPSG:32610"
    assert plan.crs_chosen == (
        "the UTM zone of the imagery's centre; the map reaches from EPSG:32610 in the west to EPSG:32611 in the east and is "
        "all in this one"
    )
    result = map_region(area, imagery=border, model=tiny_model, out=tmp_path / "out")
    assert json.loads(result.run.read_text())["map"]["crs_chosen"] == plan.crs_chosen
    height, grid = read_raster(result.height)
    rows, cols = np.nonzero(np.isfinite(height.data[0]))
    lon, _ = Transformer.from_crs(grid.crs, "EPSG:4326", always_xy=True).transform(*grid.xy(cols + 0.5, rows + 0.5))
    assert lon.min() < -120.0003
    assert lon.max() > -119.9998
    # Every pixel of the area that the imagery covers, on both sides of the border.
    inside = area_mask(as_area(area).polygons_in(grid.crs), plan.lattice, plan.extent)
    assert np.isfinite(height.data[0])[inside].mean() > 0.99
    chosen = planned(area, source=border, crs="EPSG:32611")
    assert (chosen.crs, chosen.crs_chosen.partition(";")[0]) == ("EPSG:32611", "as asked for")


def test_the_crs_does_not_depend_on_the_area(planned, border):
    """Or the same pixel would have two values. An area that lies in the other zone alone is mapped in the imagery's."""
    assert planned((-119.9999, 43.9996, -119.9997, 43.9999), source=border).crs == planned(source=border).crs == "EPSG:32610"


def test_a_crs_is_judged_where_the_area_is(planned, tmp_path):
    """Imagery may reach far beyond a zone; pixels that would be wrong there are refused with the zone of the place."""
    grid = Grid(crs=CRS.from_epsg(4326), transform=rasterio.Affine(0.1, 0, -125, 0, -0.1, 45), shape=(20, 400))
    path = tmp_path / "wide.tif"
    write_raster(path, np.zeros((3, *grid.shape), np.uint8), grid=grid)

    class Coarse(ImageFiles):
        """Said to be finer than it is: no file of a continent is small enough for a test."""

        def __init__(self, source):
            super().__init__(source)
            self.info = type(self.info)(
                **{name: getattr(self.info, name) for name in self.info.__slots__} | {"gsd_m": 1.0, "coarsest_gsd_m": 1.0}
            )

    source = Coarse(path)
    assert source.info.metric_crs.to_epsg() == 32613
    options = {"folders": [], "sheet_px": 10**6, "max_file_px": 10**9}
    ensemble = planned.__closure__[0].cell_contents
    with pytest.raises(GridError, match=r"more than 5% off; choose a CRS .* for example EPSG:32616"):
        plan_region((-86.01, 44.0, -86.0, 44.01), source, ensemble, crs="EPSG:32610", **options)
    assert isinstance(plan_region((-105.01, 44.0, -105.0, 44.01), source, ensemble, **options), Plan)

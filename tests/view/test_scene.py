"""What is told of a map besides its pixels: flagged sheets and notices; and references that are unusual."""

import geopandas
import numpy as np
import pytest
import shapely
from affine import Affine
from pyproj import CRS

from canopy.errors import OutputError, RasterError, ViewError
from canopy.grid import Grid
from canopy.raster import write_raster
from canopy.region.folder import RegionFolder
from canopy.score.reference import GivenReference
from canopy.view.flags import flagged_sheets
from canopy.view.scene import Scene
from tests.finished_maps import CRS_M, LEFT_M, TOP_M, grid, write_map
from tests.view.conftest import degrees, put

SHAPE = (40, 60)
WHERE = grid(SHAPE)
SHIFT = {"reference": "some", "measured": True, "sheets": 2, "sheets_measured": 2, "sheets_flagged": 1, "worst": "east"}


@pytest.fixture
def folder(tmp_path):
    return write_map(tmp_path / "map", np.full(SHAPE, 10, np.float32)).path


def flag(folder, flags):
    boxes = [shapely.box(LEFT_M + 18 * i, TOP_M - 24, LEFT_M + 18 * (i + 1), TOP_M) for i in range(len(flags))]
    rows = {"sheet": [f"s{i}" for i in range(len(flags))], "share": np.linspace(0.1, 0.9, len(flags)), "flagged": flags}
    frame = geopandas.GeoDataFrame(rows, geometry=boxes, crs=CRS_M).astype({"flagged": "boolean"})
    frame.to_file(folder / "shift.gpkg", layer="shift", driver="GPKG")


def test_flagged_sheets_are_outlined_in_degrees(folder):
    flag(folder, [False, True])
    put(folder, shift=SHIFT)
    with Scene(RegionFolder.open(folder)) as scene:
        told = scene.description()
    (feature,) = told["flagged"]["features"]
    assert feature["properties"] == {"sheet": "s1", "share": 0.9}
    outline = shapely.geometry.shape(feature["geometry"])
    west, _, east, north = outline.bounds
    assert (west, north) == pytest.approx(degrees(WHERE, 0, 30), abs=1e-5)
    assert east == pytest.approx(degrees(WHERE, 0, 60)[0], abs=1e-5)
    (notice,) = told["notices"]
    assert notice.startswith(
        "1 of 2 sheets looks unlike the calibration data (east worst): the 90 % interval is not promised"
    )


def test_where_none_is_flagged_nothing_is_outlined(folder):
    assert flagged_sheets(folder) is None
    flag(folder, [False, None])
    assert flagged_sheets(folder) is None
    put(folder, shift=SHIFT | {"sheets_flagged": 0})
    with Scene(RegionFolder.open(folder)) as scene:
        assert (scene.description()["flagged"], scene.description()["notices"]) == (None, [])


def test_damaged_flags_are_a_line(folder):
    (folder / "shift.gpkg").write_bytes(b"nothing")
    with pytest.raises(OutputError, match=r"shift\.gpkg cannot be read .* or delete the file"):
        flagged_sheets(folder)


def referenced(folder, heights_m, where=WHERE, **options):
    path = folder.parent / "reference.tif"
    write_raster(path, np.asarray(heights_m, np.float32)[None], grid=where, nodata=np.nan)
    return Scene(RegionFolder.open(folder), reference=GivenReference(paths=[path], **options))


def test_heights_of_a_reference_are_judged_as_by_canopy_score(folder):
    """A little below the ground is 0 m; deep below it, and above any tree, is unknown."""
    heights_m = np.full(SHAPE, 7.0)
    heights_m[5, 5:8] = -0.5, -30, 500
    with referenced(folder, heights_m) as scene:
        at = [scene.point(*degrees(WHERE, 5.5, col + 0.5)).reference_m for col in (4, 5, 6, 7)]
    assert at == [7.0, 0.0, None, None]


def test_a_reference_in_another_crs_is_read_in_its_own(folder):
    lon, lat = degrees(WHERE, 0, 0)
    where = Grid(crs=CRS.from_epsg(4326), transform=Affine(1e-5, 0, lon, 0, -1e-5, lat), shape=(30, 50))
    heights_m = np.arange(1500.0).reshape(30, 50) / 100
    with referenced(folder, heights_m, where, unit_m=1.0) as scene:
        row, col = 11, 23
        said = scene.point(lon + (col + 0.5) * 1e-5, lat - (row + 0.5) * 1e-5)
    assert said.reference_m == pytest.approx(heights_m[row, col], abs=1e-5)


def test_a_reference_elsewhere_or_of_no_heights_is_a_line(folder):
    with pytest.raises(ViewError, match=r"lies nowhere on the map .*; check its CRS and place"):
        referenced(folder, np.zeros(SHAPE), grid(SHAPE, col=10_000))
    with pytest.raises(RasterError, match="above 120 m"):
        referenced(folder, np.full(SHAPE, 900.0))
    with pytest.raises(RasterError, match="not 2"):
        referenced(folder, np.zeros(SHAPE), band=2)


def test_a_map_without_a_record_can_be_viewed(folder):
    (folder / "run.json").unlink()
    (folder / "error.tif").unlink()
    with Scene(RegionFolder.open(folder)) as scene:
        told = scene.description()
        assert (told["model"], told["date"], told["calibrated"]) == (None, None, False)
        assert list(scene.layers) == ["height", "hillshade"]
        said = scene.point(*degrees(WHERE, 5.5, 5.5))
        assert (said.height_m, said.error_90_m, said.state) == (10.0, None, "known")

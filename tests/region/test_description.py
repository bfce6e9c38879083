"""What lies beside the rasters of a map: project, catalogue entry, README, area, imagery. tests/qgis asks QGIS itself."""

import json
import shlex
import zipfile
from datetime import UTC, datetime
from pathlib import Path
from types import SimpleNamespace
from xml.etree import ElementTree as ET

import geopandas
import numpy as np
import pystac
import pytest
import shapely
from jsonschema import Draft7Validator
from pyproj import CRS
from pystac.validation.local_validator import get_local_schema_cache
from rasterio import Affine
from referencing import Registry, Resource

from canopy.errors import OutputError
from canopy.grid import Box, Grid, Lattice
from canopy.model.calibration import CalibrationTable, MeasuredCoverage
from canopy.raster import open_raster, read_raster, write_raster
from canopy.region import item, map_region, pictures, readme
from canopy.region.layers import write_area
from canopy.region.pictures import write_pictures
from canopy.region.plan import Scene
from tests.region.conftest import BOX, COUNT, LATTICE, content

ITEM_SCHEMA = "https://schemas.stacspec.org/v1.1.0/item-spec/json-schema/item.json"
COLLECTION_SCHEMA = "https://schemas.stacspec.org/v1.1.0/collection-spec/json-schema/collection.json"


def problems(content, schema):
    """What the schema of STAC itself, which pystac brings along, finds; those of the extensions are on the net only."""
    schemas = get_local_schema_cache()
    registry = Registry().with_resources([(key, Resource.from_contents(value)) for key, value in schemas.items()])
    return [error.message for error in Draft7Validator(schemas[schema], registry=registry).iter_errors(content)]


def project_of(out):
    with zipfile.ZipFile(out / "region.qgz") as archive:
        assert archive.namelist() == ["region.qgs"]
        assert archive.infolist()[0].date_time == (1980, 1, 1, 0, 0, 0)
        return ET.fromstring(archive.read("region.qgs").decode().split("\n", 1)[1])


# --- the project ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["one file", "sheets"])
def test_the_project_names_what_is_there(whole_out, sheets_out, kind):
    out = whole_out if kind == "one file" else sheets_out
    root = project_of(out)
    layers = {layer.find("id").text: layer.find("datasource").text for layer in root.iter("maplayer")}
    ending = "tif" if kind == "one file" else "vrt"
    assert layers["canopy_map_height"] == f"./height.{ending}"
    assert ("canopy_map_sheets" in layers) == (kind == "sheets")
    for source in layers.values():
        assert source.startswith("./"), "a path that does not move with the folder"
        assert (out / source.partition("|")[0]).exists()
    assert [layer.get("id") for layer in root.iter("layer-tree-layer")] == [*layers]
    assert all(len(key) > 10 for key in layers), "QGIS gives such a layer another name"
    assert root.find("properties/Paths/Absolute").text == "false"
    extent = root.find("mapcanvas/extent")
    with open_raster(out / f"height.{ending}") as raster:
        bounds = raster.grid.bounds
    left, bottom, right, top = (float(extent.find(side).text) for side in ("xmin", "ymin", "xmax", "ymax"))
    assert left <= bounds[0] + 64 * 0.6
    assert (right - left, top - bottom) <= (bounds[2] - bounds[0] + 1e-6, bounds[3] - bounds[1] + 1e-6)


def test_an_uncalibrated_error_says_so_everywhere(whole_out):
    root = project_of(whole_out)
    names = {layer.find("id").text: layer.find("layername").text for layer in root.iter("maplayer")}
    assert names["canopy_map_error"] == "Error, ± m (uncalibrated)"
    assert "canopy_map_uncalibrated" in names
    assert "uncalibrated ± 1–2 m" in (whole_out / "error.qml").read_text(encoding="utf-8")
    assert "UNCALIBRATED" in (whole_out / "README.txt").read_text(encoding="utf-8")


# --- the catalogue -------------------------------------------------------------------------------------------------------


def test_the_item_is_stac(whole_out, image):
    content = json.loads((whole_out / "item.json").read_text(encoding="utf-8"))
    assert problems(content, ITEM_SCHEMA) == []
    found = pystac.Item.from_file(str(whole_out / "item.json"))
    assert found.id == json.loads((whole_out / "run.json").read_text())["plan"]["identity"][:16]
    for asset in found.get_assets().values():
        assert Path(asset.get_absolute_href()).is_file()
        assert asset.roles
        assert asset.media_type
    assert set(found.assets) == {"height", "error", "project", "style-height", "style-error", "area", "readme", "run"}
    height, grid = read_raster(whole_out / "height.tif")
    assert found.ext.proj.code == "EPSG:32610"
    assert found.ext.proj.shape == [*grid.shape]
    assert found.ext.proj.transform == [*grid.transform][:6]
    band = found.assets["height"].ext.raster.bands[0]
    assert (band.unit, band.data_type, band.nodata) == ("m", "float32", "nan")
    assert band.statistics.maximum == np.nanmax(height.data)
    assert band.statistics.mean == pytest.approx(np.nanmean(height.data))
    assert len(found.assets["error"].ext.raster.bands) == 3
    assert found.assets["height"].ext.file.size == (whole_out / "height.tif").stat().st_size
    assert found.properties["canopy:calibrated"] is False
    # The photograph says no day: what is known of it is that it was taken before its file was written.
    assert found.datetime is None
    assert found.properties["canopy:imagery_date_known"] is False
    written = datetime.fromtimestamp(int(image.stat().st_mtime), UTC)
    assert found.common_metadata.end_datetime == written
    outline = shapely.geometry.shape(found.geometry)
    assert outline.exterior.is_ccw
    assert outline.bounds == pytest.approx(found.bbox)
    ground = geopandas.GeoSeries([outline], crs="EPSG:4326").to_crs(LATTICE.crs).iloc[0]
    assert ground.symmetric_difference(shapely.box(*grid.bounds)).area < 1e-3 * ground.area


def test_what_is_not_stac_is_found(whole_out):
    """Negative control of the schema."""
    content = json.loads((whole_out / "item.json").read_text(encoding="utf-8"))
    assert problems({**content, "properties": {"datetime": None}}, ITEM_SCHEMA)
    assert problems({**content, "assets": {"height": {}}}, ITEM_SCHEMA)


def test_a_map_in_sheets_is_a_collection(sheets_out):
    content = json.loads((sheets_out / "collection.json").read_text(encoding="utf-8"))
    assert problems(content, COLLECTION_SCHEMA) == []
    assert not (sheets_out / "item.json").exists()
    collection = pystac.Collection.from_file(str(sheets_out / "collection.json"))
    assert {"height", "error", "project", "readme"} <= set(collection.assets)
    items = [*collection.get_items()]
    assert len(items) == COUNT - 1, "the empty sheet has no files"
    for each in items:
        assert problems(json.loads(Path(each.get_self_href()).read_text(encoding="utf-8")), ITEM_SCHEMA) == []
        assert each.get_root().id == each.get_parent().id == collection.id == each.collection_id
        for asset in each.get_assets().values():
            assert Path(asset.get_absolute_href()).is_file()
        with open_raster(each.assets["height"].get_absolute_href()) as raster:
            assert each.ext.proj.shape == [*raster.shape]


@pytest.mark.parametrize(
    ("first", "last", "undated", "told"),
    [
        (18_822, 18_822, 0, ("2021-07-14T00:00:00+00:00", "2021-07-14T23:59:59+00:00")),
        (18_078, 18_822, 0, ("2019-07-01T00:00:00+00:00", "2021-07-14T23:59:59+00:00")),
        (18_078, 18_822, 5, ("1858-01-01T00:00:00+00:00", "2023-11-14T22:13:20+00:00")),
        (None, None, 5, ("1858-01-01T00:00:00+00:00", "2023-11-14T22:13:20+00:00")),
    ],
)
def test_when_the_imagery_was_taken(first, last, undated, told):
    stamps = [SimpleNamespace(mtime_ns=1_700_000_000_123_456_789), SimpleNamespace(mtime_ns=1)]
    plan = SimpleNamespace(imagery=SimpleNamespace(stamps=stamps))
    found = item._ends(plan, SimpleNamespace(first=first, last=last, undated_px=undated))
    assert tuple(moment.isoformat() for moment in found) == told
    nothing = SimpleNamespace(imagery=SimpleNamespace(stamps=[]))
    assert (item._ends(nothing, SimpleNamespace(first=first, last=last, undated_px=undated)) is None) == bool(undated)


def test_an_outline_across_the_antimeridian_has_two_parts():
    grid = Grid(crs=CRS.from_epsg(32601), transform=Affine(100, 0, 300_000, 0, -100, 7_100_000), shape=(600, 1000))
    box, outline = item._footprint(grid)
    assert outline["type"] == "MultiPolygon"
    assert 178 < box[0] < 180
    assert -180 <= box[2] < -177
    parts = [shapely.geometry.shape({"type": "Polygon", "coordinates": part}) for part in outline["coordinates"]]
    assert all(part.exterior.is_ccw for part in parts)
    assert sorted(part.bounds[0] > 0 for part in parts) == [False, True]


# --- README --------------------------------------------------------------------------------------------------------------


def test_the_readme_names_every_file(whole_out, sheets_out):
    for out in (whole_out, sheets_out):
        text = (out / "README.txt").read_text(encoding="utf-8")
        listed = text.split("WHAT IS HERE")[1].split("The folder can be moved")[0]
        patterns = [line.split()[0] for line in listed.splitlines() if line.startswith("  ")]
        for path in out.iterdir():
            assert path.name == "README.txt" or any(path.match(pattern.rstrip("/")) for pattern in patterns), path.name
        for pattern in patterns:
            assert list(out.glob(pattern.rstrip("/"))), f"{pattern} is not there"
        assert "tiny, version 0" in text
        assert "Apache-2.0" in text
        assert "unknown: the imagery does not say" in text


@pytest.mark.slow
def test_the_command_of_the_readme_makes_the_same_map(sheets_out, tmp_path, monkeypatch):
    """Options that change a byte are in it, the sizes of sheets among them."""
    from canopy.cli import main

    lines = (sheets_out / "README.txt").read_text(encoding="utf-8").splitlines()
    words = shlex.split(next(line for line in lines if line.startswith("  canopy map ")))
    words[-1] = str(tmp_path / "again")
    monkeypatch.setattr("sys.argv", words)
    with pytest.raises(SystemExit) as stopped:
        main()
    assert not stopped.value.code
    assert content(tmp_path / "again") == content(sheets_out)


def test_coverage_is_told_by_class():
    table = CalibrationTable(
        edges_m=(0.0, 10.0), lower_factor=(1.0, 1.5), upper_factor=(1.5, 1.0), pixels=(5000, 4000), sites=("HERE", "THERE"),
        measured=(
            MeasuredCoverage(how="sites left out in turn", sites=("HERE", "THERE"), pixels=(1000, 0), inside=(900, 0)),
        ),
    )  # fmt: skip
    ((measured, rows),) = readme._coverage(table)
    assert measured.overall == 0.9
    assert rows == [("0-10 m", 0.9, 1000)], "nothing is said of a class in which nothing was measured"


# --- area and imagery ----------------------------------------------------------------------------------------------------


def scene(path, grid, bands=(1, 2, 3)):
    return Scene(
        name=str(path), day=None, crs=grid.crs.to_string(), transform=[*grid.transform][:6], shape=grid.shape, bands=bands
    )


def planned(scenes, **told):
    imagery = SimpleNamespace(kind="files", scenes=scenes, told={"dtype": "uint8", "alpha": "none", **told})
    return SimpleNamespace(imagery=imagery, polygons=None, area=None, lattice=LATTICE, extent=BOX)


def test_the_area_of_a_whole_image_is_its_ground(whole_out):
    frame = geopandas.read_file(whole_out / "area.gpkg")
    assert frame["name"].tolist() == ["the whole imagery"]
    assert frame.crs == LATTICE.crs
    assert frame.geometry.iloc[0].equals_exact(shapely.box(*LATTICE.grid(BOX).bounds).normalize(), 1e-6) or (
        frame.geometry.iloc[0].symmetric_difference(shapely.box(*LATTICE.grid(BOX).bounds)).area < 1e-3
    )


def test_the_area_of_scattered_images_has_gaps(tmp_path):
    left = Box(BOX.row0, BOX.col0, BOX.row1, BOX.col0 + 100)
    right = Box(BOX.row0, BOX.col0 + 200, BOX.row1, BOX.col1)
    write_area(tmp_path, planned([scene("a", LATTICE.grid(left)), scene("b", LATTICE.grid(right))]))
    area_m2 = geopandas.read_file(tmp_path / "area.gpkg").geometry.iloc[0].area
    assert area_m2 == pytest.approx(260 * BOX.shape[0] * 0.36)


def test_images_are_one_layer_per_crs(tmp_path):
    """The preferred on top, masked pixels from the next, another CRS and a turned image apart."""
    rng = np.random.default_rng(1)
    box = Box(-100, 50, -60, 110)
    grids = {
        "fine": LATTICE.grid(box),
        "below": LATTICE.grid(Box(-100, 80, -60, 140)),
        "feet": Lattice(crs=CRS.from_epsg(32611), gsd_m=1.0).grid(Box(-500, 70, -470, 100)),
        "turned": Grid(crs=LATTICE.crs, transform=Affine.translation(100, 900) @ Affine.rotation(30), shape=(20, 20)),
    }
    data = {}
    for name, grid in grids.items():
        data[name] = rng.integers(1, 256, (3, *grid.shape), dtype=np.uint8)
        valid = np.ones(grid.shape, bool)
        valid[5:10, 40:50] = name != "fine"
        write_raster(tmp_path / f"{name}.tif", data[name], grid=grid, valid=valid)
    out = tmp_path / "out"
    out.mkdir()
    found = write_pictures(out, planned([scene(tmp_path / f"{n}.tif", g, (3, 2, 1)) for n, g in grids.items()]), out)
    assert [(each.name, each.bands) for each in found] == [
        ("imagery_vrt/1.vrt", 3),
        ("imagery_vrt/2.vrt", 3),
        ("imagery_vrt/3.vrt", 3),
    ]
    pixels, grid = read_raster(out / "imagery_vrt" / "1.vrt")
    assert grid.bounds == pytest.approx(LATTICE.grid(Box(-100, 50, -60, 140)).bounds)
    np.testing.assert_array_equal(pixels.data[:, :5, :60], data["fine"][::-1, :5])
    np.testing.assert_array_equal(pixels.data[:, :, 60:], data["below"][::-1, :, 30:])
    np.testing.assert_array_equal(pixels.data[:, 5:10, 40:50], data["below"][::-1, 5:10, 10:20])
    assert pixels.valid.all()
    for name, number in (("feet", 2), ("turned", 3)):
        pixels, grid = read_raster(out / "imagery_vrt" / f"{number}.vrt")
        np.testing.assert_array_equal(pixels.data, data[name][::-1])
        assert grid.transform.almost_equals(grids[name].transform)
    assert str(tmp_path) not in (out / "imagery_vrt" / "1.vrt").read_text()


def test_a_band_that_is_no_mask_hides_nothing(tmp_path):
    """Near infrared that is tagged alpha, with zeros in it."""
    grid = LATTICE.grid(Box(0, 0, 20, 30))
    data = np.zeros((3, *grid.shape), np.uint8)
    write_raster(tmp_path / "a.tif", data, grid=grid)
    write_pictures(tmp_path, planned([scene(tmp_path / "a.tif", grid)], alpha="data"), tmp_path)
    pixels, _ = read_raster(tmp_path / "imagery_vrt" / "1.vrt")
    assert pixels.valid.all()


def test_imagery_of_a_catalogue_has_no_layer(tmp_path):
    plan = planned([])
    plan.imagery.kind = "manifest"
    assert write_pictures(tmp_path, plan, tmp_path) == ()
    assert not list(tmp_path.iterdir())


def test_many_images_are_written_at_once(tmp_path):
    """Their files are not opened, and their CRS is looked up once."""
    looked = []
    real = pictures.CRS.from_user_input
    grids = [LATTICE.grid(Box(0, 50 * number, 40, 50 * number + 50)) for number in range(100)]
    scenes = [scene(tmp_path / f"{number}.tif", grid) for number, grid in enumerate(grids)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pictures, "CRS", SimpleNamespace(from_user_input=lambda text: looked.append(text) or real(text)))
        (found,) = write_pictures(tmp_path, planned(scenes), tmp_path)
    assert len(looked) == 1
    with open_raster(tmp_path / found.name) as raster:
        assert raster.shape == (40, 5000)


# --- what is somebody's own ------------------------------------------------------------------------------------------------


def test_what_no_map_left_is_not_replaced(image, tiny_model, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "README.txt").write_text("mine")
    with pytest.raises(OutputError, match=r"out holds README.txt and no run.json, so no map left it there; move it away"):
        map_region(imagery=image, model=tiny_model, out=out, overwrite=True)
    assert [path.name for path in out.iterdir()] == ["README.txt"]
    assert (out / "README.txt").read_text() == "mine"

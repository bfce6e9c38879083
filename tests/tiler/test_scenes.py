"""Sources become scenes: catalogues of imagery and of surveys, mosaics, areas, surface minus terrain."""

import json
from datetime import date

import laspy
import numpy as np
import pytest
import shapely
from affine import Affine
from pyproj import Transformer
from shapely.geometry import mapping

from canopy.errors import RecipeError, SourceError
from canopy.grid import Box, Grid, Lattice
from canopy.raster import write_raster
from canopy.simulate import ForestConfig, simulate_scene, write_scene
from canopy.tiler.chips import build_tile_set, read_chip, read_index
from tests.octrees import write_copc
from tests.tile_sets import PAIR, UTM, pair, recipe

LATTICE = Lattice(crs=UTM, gsd_m=0.5)
HOME = Box(-8_000_160, 800_000, -8_000_000, 800_192)
TO_DEG = Transformer.from_crs(UTM, 4326, always_xy=True)
COLLECTIONS = [
    {
        "type": "Collection", "id": name, "stac_version": "1.0.0", "description": name, "license": "CC0-1.0", "links": [],
        "extent": {"spatial": {"bbox": [[-180, -90, 180, 90]]}, "temporal": {"interval": [[None, None]]}},
    }
    for name in ("scenes", "lidar")
]  # fmt: skip
IMAGERY = """
name = "photos"
title = "photos"
kind = "stac-api"
endpoint = "{url}"
collection = "scenes"
licence = "CC0-1.0"
attribution = "nobody"
gsd_m = 0.5
dtype = "uint8"
value_range = [0, 255]
band = [
    {{ name = "red", asset = "image", index = 1 }},
    {{ name = "green", asset = "image", index = 2 }},
    {{ name = "blue", asset = "image", index = 3 }},
]
"""
SURVEYS = """
name = "surveys"
title = "surveys"
licence = "CC0-1.0"
attribution = "nobody"
[[catalogue]]
kind = "stac-api"
endpoint = "{url}"
collection = "lidar"
survey_property = "survey"
"""
CATALOGUED = """
[[source]]
kind = "lidar"
site = "WOOD"
imagery = { source = "photos.toml", prefer = "newest" }
lidar = "surveys.toml"
options = { fill_holes_px = 6 }
licence = "CC0-1.0"
image_source = "drawn"
lidar_source = "drawn"
"""


def footprint(box):
    left, bottom, right, top = LATTICE.grid(box).bounds
    xs, ys = TO_DEG.transform([left, right, right, left], [bottom, bottom, top, top])
    return shapely.Polygon(zip(xs, ys, strict=True))


def bbox_of(box, margin_px=4):
    """A rectangle in degrees a little inside a box."""
    inner = Box(box.row0 + margin_px, box.col0 + margin_px, box.row1 - margin_px, box.col1 - margin_px)
    return [float(v) for v in footprint(inner).bounds]


def item(collection, name, box, href, *, properties):
    shape = footprint(box)
    grid = LATTICE.grid(box)
    asset = {"href": href, "proj:shape": list(grid.shape), "proj:transform": list(grid.transform)[:6]}
    return {
        "type": "Feature", "stac_version": "1.0.0", "id": name, "collection": collection, "geometry": mapping(shape),
        "bbox": list(shape.bounds), "links": [],
        "stac_extensions": ["https://stac-extensions.github.io/projection/v2.0.0/schema.json"],
        "assets": {"image" if collection == "scenes" else "data": asset},
        "properties": {"proj:code": "EPSG:32617", **properties},
    }  # fmt: skip


@pytest.fixture(scope="module")
def forest(tmp_path_factory):
    """A forest on HOME with a point cloud."""
    folder = tmp_path_factory.mktemp("forest")
    scene = simulate_scene(grid=LATTICE.grid(HOME), seed=1, forest=ForestConfig(pulses_per_m2=8))
    write_scene(scene, folder)
    return scene, folder


@pytest.fixture
def services(forest, file_server, stac_api, tmp_path):
    """A STAC API with two photographs of the forest, west older than east, and a survey as COPC; all behind HTTP."""
    scene, folder = forest
    west = Box(HOME.row0, HOME.col0, HOME.row1, HOME.col0 + 120)
    east = Box(HOME.row0, HOME.col0 + 96, HOME.row1, HOME.col1)
    items = []
    for name, box, day in (("west", west, "2020-06-01"), ("east", east, "2021-07-01")):
        path = file_server.folder / f"{name}.tif"
        write_raster(path, scene.image[(slice(None), *box.slices_in(HOME))], grid=LATTICE.grid(box))
        items.append(item("scenes", name, box, file_server.href(path), properties={"datetime": f"{day}T18:00:00Z"}))
    cloud = laspy.convert(laspy.read(folder / "points.laz"), point_format_id=6, file_version="1.4")
    if not cloud.header.parse_crs():
        cloud.header.add_crs(UTM)
    write_copc(file_server.folder / "cloud.copc.laz", cloud, span=16, leaf=4000)
    flown = {"datetime": None, "start_datetime": "2020-05-01T00:00:00Z", "end_datetime": "2020-05-11T00:00:00Z"}
    href = file_server.href(file_server.folder / "cloud.copc.laz")
    items.append(item("lidar", "cloud", HOME, href, properties={"survey": "A_2020", **flown}))
    api = stac_api(COLLECTIONS, items)
    (tmp_path / "photos.toml").write_text(IMAGERY.format(url=api.url))
    (tmp_path / "surveys.toml").write_text(SURVEYS.format(url=api.url))
    return api


def test_a_tile_set_from_two_catalogues(services, forest, tmp_path):
    """Imagery and points over HTTP, found by a search, and a second build that asks no catalogue."""
    scene, _ = forest
    path = recipe(tmp_path, CATALOGUED, crs=f"bbox_deg = {bbox_of(HOME)}\ncrs = 'EPSG:32617'", least=0.2)
    out = build_tile_set(path)
    index = read_index(out)
    assert len(index) > 10
    errors = []
    for row in index.itertuples():
        image, height_m = read_chip(out, row.id)
        box = Box(row.row_px, row.col_px, row.row_px + 64, row.col_px + 64)
        part = box.intersect(HOME)
        here, there = part.slices_in(box), part.slices_in(HOME)
        valid = image.valid[here]
        np.testing.assert_array_equal(
            image.data[(slice(None), *here)][:, valid], scene.image[(slice(None), *there)][:, valid]
        )
        assert not image.valid.sum() > valid.sum()
        errors.append((height_m[here] - scene.height_m[there]).ravel())
        assert row.lidar_date == date(2020, 5, 6), "the middle of the flights"
        mostly_east = box.col0 + 32 > HOME.col0 + 96
        if abs(box.col0 + 32 - HOME.col0 - 96) > 8:
            assert row.image_date == (date(2021, 7, 1) if mostly_east else date(2020, 6, 1)), "the median day of the pixels"
        assert row.gap_days == (row.image_date - row.lidar_date).days
    errors = np.concatenate(errors)
    assert abs(np.nanmedian(errors)) < 0.5
    manifests = sorted(p.name.rsplit("-", 1)[0] for p in (out / "manifests").iterdir())
    assert manifests == ["imagery-WOOD", "points-WOOD"]
    assert json.loads((out / "plan.json").read_text())["manifests"].keys() == {p.name for p in (out / "manifests").iterdir()}
    asked = len(services.searches)
    assert asked
    again = build_tile_set(path, overwrite=True)
    assert len(services.searches) == asked
    assert read_index(again).equals(index)
    path.write_text(path.read_text().replace('"newest"', '"newest", end = 2020-12-31'))  # another question is asked
    older = read_index(build_tile_set(path, overwrite=True))
    assert len(services.searches) > asked
    assert set(older["image_date"]) == {date(2020, 6, 1)}


def test_catalogues_need_an_area_that_they_cover(services, tmp_path):
    with pytest.raises(RecipeError, match=r"WOOD: imagery from photos\.toml needs an area; give area or bbox_deg"):
        build_tile_set(recipe(tmp_path, CATALOGUED))
    with pytest.raises(SourceError, match="photos has no item over"):
        build_tile_set(recipe(tmp_path, CATALOGUED, crs="bbox_deg = [10.0, 10.0, 10.1, 10.1]"))
    assert not (tmp_path / "set").exists()
    assert not (tmp_path / ".set.build").exists()


def test_surveys_keep_to_their_parts(services, tmp_path):
    """Two surveys: each chip's heights come from one of them, and say from when."""
    half = Box(HOME.row0, HOME.col0, HOME.row1, HOME.col0 + 96)
    href = services.items[-1]["assets"]["data"]["href"]
    flown = {"datetime": None, "start_datetime": "2022-03-01T00:00:00Z", "end_datetime": "2022-03-03T00:00:00Z"}
    services.items.append(item("lidar", "newer", half, href, properties={"survey": "B 2022", **flown}))
    out = build_tile_set(recipe(tmp_path, CATALOGUED, crs=f"bbox_deg = {bbox_of(HOME)}\ncrs = 'EPSG:32617'", least=0.2))
    index = read_index(out)
    assert set(index["item"]) == {"photos-A_2020", "photos-B 2022"}
    assert set(index["lidar_date"]) == {date(2020, 5, 6), date(2022, 3, 2)}
    covered = np.zeros(HOME.shape, int)
    for row in index.itertuples():
        assert row.id.split("_r")[0] in ("WOOD_A-2020", "WOOD_B-2022")
        _, height_m = read_chip(out, row.id)
        box = Box(row.row_px, row.col_px, row.row_px + 64, row.col_px + 64)
        cols = np.nonzero(np.isfinite(height_m).any(axis=0))[0] + box.col0
        assert (cols < HOME.col0 + 97).all() if row.lidar_date.year == 2022 else (cols >= HOME.col0 + 95).all()
        part = box.intersect(HOME)
        covered[part.slices_in(HOME)] += np.isfinite(height_m)[part.slices_in(box)]
    assert (covered[20:-20, 20:-20] > 0).mean() > 0.9


# --- areas ---------------------------------------------------------------------------------------------------------------


def test_nothing_outside_the_area_is_used(tmp_path):
    """A triangle: chips hold what lies in it, with the pixels they have without an area."""
    pair(tmp_path, "a", left=400_000.0, top=4_000_000.0, shape=(160, 192))
    whole = build_tile_set(recipe(tmp_path), tmp_path / "whole")
    left, bottom, right, top = LATTICE.grid(Box(-8_000_000, 800_000, -7_999_840, 800_192)).bounds
    xs, ys = TO_DEG.transform([left, right, left], [bottom, bottom, top])
    triangle = shapely.Polygon(zip(xs, ys, strict=True))
    feature = {"type": "Feature", "properties": {}, "geometry": mapping(triangle)}
    (tmp_path / "area.geojson").write_text(json.dumps({"type": "FeatureCollection", "features": [feature]}))
    path = recipe(tmp_path, crs='area = "area.geojson"')
    out = build_tile_set(path)
    index = read_index(out)
    assert 0 < len(index) < len(read_index(whole))
    for row in index.itertuples():
        image, height_m = read_chip(out, row.id)
        full, full_m = read_chip(whole, row.id)
        rows, cols = np.nonzero(image.valid)
        x, y = (cols + row.col_px + 0.5) * 0.5, -(rows + row.row_px + 0.5) * 0.5
        inside = (top - y) / (top - bottom) >= (x - left) / (right - left) - 0.01
        assert inside.all()
        np.testing.assert_array_equal(image.data[:, image.valid], full.data[:, image.valid])
        known = np.isfinite(height_m)
        np.testing.assert_array_equal(height_m[known], full_m[known])
        assert not known[~image.valid].any()
    other = build_tile_set(
        path, tmp_path / "other", area=tuple(footprint(Box(-8_000_000, 800_000, -7_999_936, 800_064)).bounds)
    )
    assert len(read_index(other)) < len(index)


# --- files ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("image", ['"data/photos"', '["data/photos/w_rgb.tif", "data/photos/e_rgb.tif"]'])
def test_a_folder_is_one_mosaic(tmp_path, image):
    """Two halves give the chips of the whole."""
    pixels, _ = pair(tmp_path, "all", left=400_000.0, top=4_000_000.0, shape=(128, 192))
    whole = build_tile_set(recipe(tmp_path), tmp_path / "whole")
    (tmp_path / "data" / "photos").mkdir()
    for name, cols in (("w", slice(0, 101)), ("e", slice(101, 192))):
        place = Affine(0.5, 0, 400_000 + 0.5 * cols.start, 0, -0.5, 4_000_000)
        grid = Grid(crs=UTM, transform=place, shape=(128, cols.stop - cols.start))
        write_raster(tmp_path / "data" / "photos" / f"{name}_rgb.tif", pixels[:, :, cols], grid=grid)
    source = PAIR.replace('"data/*_rgb.tif"', image)
    halves = build_tile_set(recipe(tmp_path, source))
    assert read_index(halves)[["id", "sha256"]].equals(read_index(whole)[["id", "sha256"]])


def test_surface_minus_terrain(tmp_path):
    _, height_m = pair(tmp_path, "a", left=400_000.0, top=4_000_000.0, shape=(128, 192))
    whole = build_tile_set(recipe(tmp_path), tmp_path / "whole")
    rows, cols = np.indices(height_m.shape, dtype=np.float32)
    terrain = 100 + 0.25 * rows + 0.5 * cols
    grid = Grid(crs=UTM, transform=Affine(0.5, 0, 400_000, 0, -0.5, 4_000_000), shape=height_m.shape)
    write_raster(tmp_path / "data" / "a_dtm.tif", terrain[None], grid=grid)
    write_raster(tmp_path / "data" / "a_dsm.tif", (terrain + height_m)[None], grid=grid, nodata=np.nan)
    source = PAIR.replace('height = "data/*_chm.tif"', 'dsm = "data/*_dsm.tif"\ndtm = "data/*_dtm.tif"')
    difference = build_tile_set(recipe(tmp_path, source))
    index = read_index(difference)
    assert list(index["id"]) == list(read_index(whole)["id"])
    for name in index["id"]:
        np.testing.assert_allclose(read_chip(difference, name)[1], read_chip(whole, name)[1], atol=1e-4)

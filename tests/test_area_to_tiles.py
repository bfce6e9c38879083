"""From an area to an audited tile set and a map, as a user goes: the command line, a STAC API of photographs, one of LiDAR
surveys, signed files behind HTTP ranges, and services that fail on the way."""

import json
import shutil
import sys

import laspy
import numpy as np
import pytest
import tomli_w
from pyproj import CRS, Transformer

from canopy import cli
from canopy.grid import Box, Lattice
from canopy.raster import read_raster, write_raster
from canopy.simulate import ForestConfig, simulate_scene, write_scene
from canopy.tiler import byteranges
from canopy.tiler.chips import read_chip, read_index
from tests.octrees import write_copc
from tests.tile_sets import content

LATTICE = Lattice(crs=CRS.from_epsg(32610), gsd_m=0.6)
WHOLE = Box(-8_000_320, 833_010, -8_000_000, 833_330)
"""192 m square."""
WEST, EAST = Box(WHOLE.row0, WHOLE.col0, WHOLE.row1, 833_190), Box(WHOLE.row0, 833_150, WHOLE.row1, WHOLE.col1)
"""Two photographs that overlap by 40 columns."""
TO_DEGREES = Transformer.from_crs(LATTICE.crs, "EPSG:4326", always_xy=True)

RECIPE = {
    "name": "set", "gsd_m": 0.6, "chip_px": 96, "stride_px": 96, "crs": "EPSG:32610", "min_valid_fraction": 0.5,
    "split": {"seed": 2, "block_m": 57.6, "buffer_m": 0.0, "train": 0.6, "val": 0.2, "test": 0.2},
    "registration": {"apply": "acquisition"}, "quality": {},
}  # fmt: skip
COMMON = {"kind": "lidar", "site": "WOOD", "licence": "CC0-1.0", "image_source": "simulated", "lidar_source": "simulated"}


def degrees(box, grow_m=0.0):
    left, bottom, right, top = LATTICE.grid(box).bounds
    west, south = TO_DEGREES.transform(left - grow_m, bottom - grow_m)
    east, north = TO_DEGREES.transform(right + grow_m, top + grow_m)
    return float(west), float(south), float(east), float(north)


def item(name, box, collection, assets, **properties):
    west, south, east, north = degrees(box)
    ring = [[west, south], [east, south], [east, north], [west, north], [west, south]]
    return {
        "type": "Feature", "stac_version": "1.0.0", "id": name, "collection": collection, "links": [],
        "stac_extensions": [], "geometry": {"type": "Polygon", "coordinates": [ring]}, "bbox": [west, south, east, north],
        "properties": {"datetime": None} | properties, "assets": assets,
    }  # fmt: skip


def collection(name):
    return {
        "type": "Collection", "stac_version": "1.0.0", "id": name, "description": name, "license": "other", "links": [],
        "extent": {"spatial": {"bbox": [[-180, -90, 180, 90]]}, "temporal": {"interval": [[None, None]]}},
    }  # fmt: skip


@pytest.fixture(scope="module")
def wood(tmp_path_factory):
    """What the services have: two photographs of four bands and two clouds of one forest, and the same as local files."""
    folder = tmp_path_factory.mktemp("wood")
    scene = simulate_scene(grid=LATTICE.grid(WHOLE), seed=5, forest=ForestConfig(pulses_per_m2=6))
    write_scene(scene, folder / "local")
    image = np.maximum(np.concatenate([scene.image, 255 - scene.image[:1]]), 1)  # 0 in all bands would be nodata
    write_raster(folder / "local" / "image.tif", image, grid=LATTICE.grid(WHOLE))
    served = folder / "served"
    served.mkdir()
    for name, box in (("west", WEST), ("east", EAST)):
        part = image[(slice(None), *box.slices_in(WHOLE))]
        write_raster(served / f"{name}.tif", np.ascontiguousarray(part), grid=LATTICE.grid(box))
    cloud = laspy.read(folder / "local" / "points.laz")
    middle = (cloud.x.min() + cloud.x.max()) / 2
    for name, half in (("south-west", cloud.x < middle), ("south-east", cloud.x >= middle)):
        part = laspy.LasData(cloud.header)
        part.points = cloud.points[half]
        write_copc(served / f"{name}.copc.laz", part)
    return folder


@pytest.fixture
def services(wood, serve_folder, stac_api, tmp_path, monkeypatch):
    """The APIs, the files behind signatures, and the descriptions of both sources in ./data; failures are told quickly."""
    files = serve_folder(wood / "served")
    files.require_signature("/*")
    photographs = [
        item(
            name, box, "photographs", {"image": {"href": files.href(f"{name}.tif"), "type": "image/tiff"}},
            datetime=f"{day}T18:00:00Z",
        )
        for name, box, day in (("west", WEST, "2020-07-01"), ("east", EAST, "2020-07-12"))
    ]  # fmt: skip
    half = (WHOLE.col0 + WHOLE.col1) // 2
    clouds = [
        item(
            name, Box(WHOLE.row0, col0, WHOLE.row1, col1), "clouds", {"data": {"href": files.href(f"{name}.copc.laz")}},
            start_datetime="2020-06-01T00:00:00Z", end_datetime="2020-06-20T00:00:00Z", **{"3dep:usgs_id": "WOOD_2020"},
        )
        for name, col0, col1 in (("south-west", WHOLE.col0, half), ("south-east", half, WHOLE.col1))
    ]  # fmt: skip
    api = stac_api([collection("photographs"), collection("clouds")], [*photographs, *clouds])
    signing = {"kind": "planetary-computer", "hosts": ["127.0.0.1"], "token_url": f"{files.token_url}/any"}
    shelf = tmp_path / "data"
    shelf.mkdir()
    bands = [{"name": name, "asset": "image", "index": i + 1} for i, name in enumerate(("red", "green", "blue", "nir"))]
    (shelf / "photographs.toml").write_text(tomli_w.dumps({
        "name": "photographs", "title": "t", "kind": "stac-api", "endpoint": api.url, "collection": "photographs",
        "licence": "CC0-1.0", "attribution": "a", "gsd_m": 0.6, "dtype": "uint8", "value_range": [0.0, 255.0], "nodata": 0.0,
        "band": bands, "signing": signing,
    }))  # fmt: skip
    (shelf / "clouds.toml").write_text(tomli_w.dumps({
        "name": "clouds", "title": "t", "licence": "CC0-1.0", "attribution": "a",
        "catalogue": [{
            "kind": "stac-api", "endpoint": api.url, "collection": "clouds", "survey_property": "3dep:usgs_id",
            "signing": signing,
        }],
    }))  # fmt: skip
    monkeypatch.chdir(tmp_path)
    return files, api


@pytest.fixture
def run(capsys, monkeypatch):
    """Runs `canopy WORDS`; gives the exit code, standard output and the last line of standard error."""

    def run(*words):
        monkeypatch.setattr(sys, "argv", ["canopy", *map(str, words)])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        out, err = capsys.readouterr()
        return ended.value.code, out, (err.splitlines() or [""])[-1]

    return run


def write_recipe(path, **source):
    path.write_text(tomli_w.dumps(RECIPE | {"source": [COMMON | source]}))
    return path


BOX = [f"{value:.6f}" for value in degrees(Box(WHOLE.row0 + 20, WHOLE.col0 + 20, WHOLE.row1 - 20, WHOLE.col1 - 20))]


@pytest.mark.slow
def test_an_area_becomes_an_audited_tile_set(services, wood, run, tmp_path):
    files, api = services
    recipe = write_recipe(tmp_path / "set.toml", imagery={"source": "photographs"}, lidar="clouds")
    # What happens on any day with a public service, and must not be seen in the result.
    files.fail("/*.tif", status=429, times=2, retry_after_s=0)
    files.fail("/*.copc.laz", status=503, times=2)
    files.fail("/east.tif", truncate=True, times=1, after=3, methods=("GET",))
    code, _, told = run("tile", recipe, "--bbox", *BOX, "--workers", "1")
    assert code == 0, told
    index = read_index(tmp_path / "set").set_index("id")
    assert len(index) >= 4
    assert {str(day) for day in index.image_date} == {"2020-07-01", "2020-07-12"}  # the newer scene on top, the older beside
    assert set(index.gap_days) <= set(range(11, 42))
    assert "sig=" not in "".join(p.read_text() for p in (tmp_path / "set").glob("*manifest*.json"))

    # The oracle: the same pixels and points as local files.
    local = write_recipe(
        tmp_path / "local.toml", image=str(wood / "local" / "image.tif"), points=[str(wood / "local" / "points.laz")]
    )
    code, _, told = run("tile", local, "--bbox", *BOX, "--out", tmp_path / "local", "--workers", "1")
    assert code == 0, told
    assert list(read_index(tmp_path / "local")["id"]) == list(index.index)
    for name in index.index:
        image, height_m = read_chip(tmp_path / "set", name)[:2]
        image_there, height_there_m = read_chip(tmp_path / "local", name)[:2]
        np.testing.assert_array_equal(image.data, image_there.data)
        np.testing.assert_array_equal(image.valid, image_there.valid)
        np.testing.assert_array_equal(np.isnan(height_m), np.isnan(height_there_m))
        assert np.nanmax(np.abs(height_m - height_there_m)) < 0.01  # returns in another order, summed in another order

    # A second run asks no catalogue, and gives the same bytes.
    before = content(tmp_path / "set")
    asked = len(api.searches)
    code, _, told = run("tile", recipe, "--bbox", *BOX, "--workers", "1", "--overwrite")
    assert code == 0, told
    assert len(api.searches) == asked > 0
    assert content(tmp_path / "set") == before

    # The split passes its audit, and a wider buffer than it kept does not.
    code, out, _ = run("audit", tmp_path / "set", "--json")
    assert code == 0, out
    code, out, _ = run("audit", tmp_path / "set", "--buffer", "60", "--json")
    assert code == 3, out
    code, _, told = run("tile", "inspect", tmp_path / "set")
    assert code == 0, told


def test_a_service_that_fails_for_good_ends_the_run_and_the_next_run_goes_on(services, run, tmp_path, monkeypatch):
    files, _ = services
    # Its pauses are the only thing about a failure that is not real here.
    monkeypatch.setattr(byteranges.time, "sleep", lambda _seconds: None)
    recipe = write_recipe(tmp_path / "set.toml", imagery={"source": "photographs"}, lidar="clouds")
    fault = files.fail("/*.copc.laz", truncate=True, times=None, after=2, methods=("GET",))
    code, _, told = run("tile", recipe, "--bbox", *BOX, "--workers", "1")
    assert code == 1
    assert told.startswith("canopy: ")
    assert ".copc.laz" in told
    assert "Traceback" not in told
    assert not (tmp_path / "set").exists()
    fault.times = 0
    code, _, told = run("tile", recipe, "--bbox", *BOX, "--workers", "1")
    assert code == 0, told
    assert len(read_index(tmp_path / "set")) >= 4


def test_what_is_not_there_is_said_in_one_line(services, run, tmp_path):
    recipe = write_recipe(tmp_path / "set.toml", imagery={"source": "photographs"}, lidar="clouds")
    for words, text in (
        ((), "needs an area"),
        (("--bbox", "10", "50", "10.01", "50.01"), "no item"),
        (("--bbox", "179.9", "50", "-179.9", "50.1"), "antimeridian"),
    ):
        code, _, told = run("tile", recipe, *words)
        assert code == 1
        assert text in told
        assert not (tmp_path / "set").exists()


def test_an_area_across_two_utm_zones_needs_a_crs(services, run, tmp_path):
    recipe = tmp_path / "set.toml"
    source = COMMON | {"imagery": {"source": "photographs"}, "lidar": "clouds"}
    recipe.write_text(tomli_w.dumps({key: value for key, value in RECIPE.items() if key != "crs"} | {"source": [source]}))
    # Wide enough to hold the photographs and the border at longitude -120.
    west, south, _, north = degrees(WHOLE)
    box = [f"{value:.6f}" for value in (west, south, -119.999, north)]
    code, _, told = run("tile", recipe, "--bbox", *box)
    assert code == 1
    assert "EPSG:32610" in told
    assert "EPSG:32611" in told
    assert "crs" in told
    assert not (tmp_path / "set").exists()


def test_a_search_and_the_map_of_it(services, tiny_model, wood, run, tmp_path):
    code, out, _ = run("search", "photographs", "--bbox", *BOX, "--out", "found.json", "--json")
    assert code == 0
    assert [found["item"] for found in json.loads(out)["found"]] == ["east", "west"]
    code, out, told = run("search", "clouds", "--bbox", *BOX, "--out", "clouds.json")
    assert code == 0, told
    assert "WOOD_2020" in out
    code, _, told = run("map", "--imagery", "found.json", "--bbox", *BOX, "--model", tiny_model, "--out", "map")
    assert code == 0, told
    words = ("--bands", "1,2,3", "--bbox", *BOX, "--model", tiny_model)
    code, _, told = run("map", "--imagery", wood / "local" / "image.tif", *words, "--out", "oracle")
    assert code == 0, told
    for name in ("height.tif", "error.tif"):
        (found, grid), (expected, grid_there) = (read_raster(tmp_path / where / name) for where in ("map", "oracle"))
        assert grid == grid_there
        np.testing.assert_array_equal(found.valid, expected.valid)
        np.testing.assert_array_equal(found.data, expected.data)
    shutil.rmtree(tmp_path / "map")
    code, _, told = run("map", "--imagery", "photographs", "--bbox", *BOX, "--model", tiny_model, "--out", "map")
    assert code == 1
    assert "canopy search photographs" in told
    assert not (tmp_path / "map").exists()

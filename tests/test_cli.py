"""The `canopy` command as people run it: one line for bad input, nothing half-made on the disk, and clean interruptions."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import geopandas
import numpy as np
import pytest
import rasterio
import shapely
from affine import Affine
from pyproj import CRS
from safetensors.numpy import load_file, save_file

from canopy.grid import Box, Grid, Lattice
from canopy.raster import write_raster

CANOPY = Path(sys.executable).parent / "canopy"
UTM = CRS.from_epsg(32610)
LATTICE = Lattice(crs=UTM, gsd_m=0.6)
BOX = Box(-8_130_100, 833_310, -8_130_100 + 150, 833_310 + 130)
WORK = ".canopy-work"


SERVER = """
import contextlib, json, os, resource, sys
import geopandas, jinja2, pystac.extensions.projection, timm, torch, segmentation_models_pytorch
import canopy.cli, canopy.model.package, canopy.region.description, canopy.region.run
torch.set_num_threads(1)
print("ready", flush=True)
for line in sys.stdin:
    order = json.loads(line)
    child = os.fork()
    if child == 0:
        for stream, name in ((1, "stdout"), (2, "stderr")):
            os.dup2(os.open(order[name], os.O_WRONLY | os.O_CREAT | os.O_TRUNC), stream)
        os.chdir(order["cwd"])
        if order["limit"]:
            resource.setrlimit(resource.RLIMIT_FSIZE, (order["limit"], order["limit"]))
        sys.argv = ["canopy", *order["words"]]
        canopy.cli.main()
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""
"""Runs the command's own entry point in a fresh process per order, from one that has the libraries loaded already: a
hundred starts of torch would take ten times as long as everything that is tested here."""


@pytest.fixture(scope="session")
def canopy(tmp_path_factory):
    """Runs `canopy WORDS`; gives returncode, stdout and stderr."""
    folder = tmp_path_factory.mktemp("server")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "200", "NO_COLOR": "1"}
    server = subprocess.Popen(
        [sys.executable, "-c", SERVER], env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert server.stdout.readline() == "ready\n"

    def run(*words, cwd=folder, limit=0):
        files = {name: str(folder / name) for name in ("stdout", "stderr")}
        order = {"words": [str(word) for word in words], "cwd": str(cwd), "limit": limit, **files}
        server.stdin.write(json.dumps(order) + "\n")
        server.stdin.flush()
        code = int(server.stdout.readline())
        texts = {name: Path(file).read_text() for name, file in files.items()}
        return subprocess.CompletedProcess(words, code, **texts)

    yield run
    server.stdin.close()
    assert server.wait(timeout=30) == 0


def executable(*words, **options):
    """The same by the installed program."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "NO_COLOR": "1"}
    return subprocess.run(
        [str(CANOPY), *map(str, words)], env=environment, capture_output=True, text=True, check=False, **options
    )


def photo(path, *, count=3, gsd=0.6, crs=UTM, dtype="uint8", shape=BOX.shape, seed=0):
    """An image in place; `crs=None` for none."""
    left, _, _, top = LATTICE.grid(BOX).bounds
    data = np.random.default_rng(seed).integers(0, 256, (count, *shape)).astype(dtype)
    if crs is None:
        with rasterio.open(
            path, "w", driver="GTiff", width=shape[1], height=shape[0], count=count, dtype=dtype,
            transform=Affine(gsd, 0, left, 0, -gsd, top),
        ) as dataset:  # fmt: skip
            dataset.write(data)
    else:
        write_raster(path, data, grid=Grid(crs=crs, transform=Affine(gsd, 0, left, 0, -gsd, top), shape=shape))
    return path


def area(path, box=BOX, crs=UTM, polygons=None):
    left, bottom, right, top = LATTICE.grid(box).bounds
    shapes = [shapely.box(left, bottom, right, top)] if polygons is None else polygons
    geopandas.GeoDataFrame({"name": ["a"] * len(shapes)}, geometry=shapes, crs=crs).to_file(path)
    return path


def tree(folder):
    """Every path below a folder with its bytes."""
    return {p.relative_to(folder): p.read_bytes() if p.is_file() else None for p in folder.rglob("*")}


@pytest.fixture
def image(tmp_path):
    return photo(tmp_path / "photo.tif")


def refused(done, *words):
    """One line on standard error that begins with the program's name and holds all `words`; failure; no traceback."""
    assert done.returncode == 1, done.stderr
    assert "Traceback" not in done.stderr
    lines = done.stderr.strip().splitlines()
    assert len(lines) == 1, done.stderr
    assert lines[0].startswith("canopy: ")
    assert all(word in lines[0] for word in words), f"{lines[0]} lacks one of {words}"
    assert ";" in lines[0], f"no remedy in: {lines[0]}"
    return lines[0]


FILES = {
    "README.txt", "area.gpkg", "error.qml", "error.tif", "height.qml", "height.tif", "imagery_vrt", "item.json",
    "region.qgz", "run.json",
}  # fmt: skip
"""What lies in the folder of a map in one file, of one day, by a model that knows nothing of its calibration data."""


# --- what works ----------------------------------------------------------------------------------------------------------


def test_map(canopy, image, tiny_model, tmp_path):
    done = canopy("map", "--imagery", image, "--model", tiny_model, "--out", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    assert [Path(line).name for line in done.stdout.splitlines()[:4]] == [
        "height.tif", "error.tif", "run.json", "region.qgz",
    ]  # fmt: skip
    assert {p.name for p in (tmp_path / "out").iterdir()} == FILES
    assert "windows" in done.stderr
    with rasterio.open(tmp_path / "out" / "height.tif") as dataset:
        assert np.isfinite(dataset.read()).all()
    again = canopy(
        "map", "--imagery", image, "--model", tiny_model, "--out", tmp_path / "out2", "--json", "--sheet-size", 70
    )
    assert again.returncode == 0, again.stderr
    result = json.loads(again.stdout)
    assert result["run"]["map"]["sheets"] > 1
    with rasterio.open(result["height"]) as one, rasterio.open(tmp_path / "out" / "height.tif") as other:
        np.testing.assert_array_equal(one.read(), other.read())


def test_map_of_an_area_with_options(canopy, image, tiny_model, tmp_path):
    part = Box(BOX.row0 + 20, BOX.col0 + 20, BOX.row0 + 90, BOX.col0 + 80)
    done = canopy(
        "map", area(tmp_path / "area.gpkg", part), "--imagery", image, "--model", tiny_model, "--out", tmp_path / "out",
        "--bands", "3,2,1", "--gsd", 1.2, "--crs", "EPSG:32610", "--json",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    run = json.loads(done.stdout)["run"]
    assert run["map"]["gsd_m"] == 1.2
    assert run["imagery"]["bands"] == [3, 2, 1]
    assert run["map"]["shape"] == [35, 30]


@pytest.mark.slow
def test_a_plan_says_what_a_map_would_take_and_does_nothing(canopy, image, tiny_model, tmp_path):
    before = tree(tmp_path)
    command = ("map", "--imagery", image, "--model", tiny_model, "--out", tmp_path / "out", "--sheet-size", 70, "--plan")
    done = canopy(*command, "--json")
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert (told["one_file"], told["crs"], told["pixels"]) == (True, "EPSG:32610", 150 * 130)
    assert told["sheets"] > 1
    assert min(told["seconds"] + 1, told["memory_bytes"], told["disk_bytes"]) > 0
    refused(canopy(*command, "--scheduler", "tcp://127.0.0.1:9"), "--plan", "--scheduler")
    assert tree(tmp_path) == before


@pytest.mark.slow
def test_the_same_command_twice_gives_the_same_bytes(canopy, image, tiny_model, tmp_path):
    command = ("map", "--imagery", image, "--model", tiny_model, "--out", tmp_path / "out")
    assert canopy(*command).returncode == 0
    first = [(tmp_path / "out" / name).read_bytes() for name in ("height.tif", "error.tif")]
    assert canopy(*command, "--overwrite").returncode == 0
    assert [(tmp_path / "out" / name).read_bytes() for name in ("height.tif", "error.tif")] == first


# --- bad input -----------------------------------------------------------------------------------------------------------


def no_crs(folder):
    return ["--imagery", photo(folder / "a.tif", crs=None)]


def four_bands(folder):
    return ["--imagery", photo(folder / "a.tif", count=4)]


def sixteen_bits(folder):
    return ["--imagery", photo(folder / "a.tif", dtype="uint16")]


def too_fine(folder):
    return ["--imagery", photo(folder / "a.tif", gsd=0.1)]


def asked_too_coarse(folder):
    return ["--imagery", photo(folder / "a.tif"), "--gsd", "10"]


def natively_too_coarse(folder):
    return ["--imagery", photo(folder / "a.tif", gsd=3.0), "--gsd", "1"]


def text(folder):
    (folder / "a.tif").write_text("no raster")
    return ["--imagery", folder / "a.tif"]


def truncated(folder):
    path = photo(folder / "a.tif")
    path.write_bytes(path.read_bytes()[: path.stat().st_size * 2 // 3])
    return ["--imagery", path]


def truncated_jpeg(folder):
    from PIL import Image

    path = folder / "a.jpg"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (150, 150, 3), dtype=np.uint8)).save(path, quality=95)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    left, _, _, top = LATTICE.grid(BOX).bounds
    (folder / "a.jgw").write_text(f"0.6\n0\n0\n-0.6\n{left}\n{top}\n")
    (folder / "a.jpg.aux.xml").write_text(f"<PAMDataset><SRS>{UTM.to_wkt('WKT1_GDAL').replace('<', '')}</SRS></PAMDataset>")
    return ["--imagery", path]


def empty_file(folder):
    (folder / "a.tif").touch()
    return ["--imagery", folder / "a.tif"]


def missing(folder):
    return ["--imagery", folder / "a.tif"]


def a_folder(folder):
    return ["--imagery", folder]


def with_area(folder, **options):
    return [area(folder / "area.gpkg", **options), "--imagery", photo(folder / "a.tif")]


def area_outside(folder):
    return with_area(folder, box=Box(BOX.row0 - 500, BOX.col0, BOX.row0 - 400, BOX.col0 + 50))


def area_elsewhere(folder):
    return with_area(folder, polygons=[shapely.box(10, 50, 11, 51)], crs="EPSG:4326")


def area_empty(folder):
    (folder / "area.geojson").write_text('{"type": "FeatureCollection", "features": []}')
    return [folder / "area.geojson", "--imagery", photo(folder / "a.tif")]


def area_of_points(folder):
    return with_area(folder, polygons=[shapely.Point(500_000, 4_878_000)])


def area_of_empty_polygons(folder):
    return with_area(folder, polygons=[shapely.Polygon()])


def area_without_crs(folder):
    return with_area(folder, crs=None)


def area_parquet_without_crs(folder):
    frame = geopandas.GeoDataFrame(geometry=[shapely.box(*LATTICE.grid(BOX).bounds)])
    frame.to_parquet(folder / "area.parquet")
    return [folder / "area.parquet", "--imagery", photo(folder / "a.tif")]


def area_text(folder):
    (folder / "area.geojson").write_text("somewhere in Oregon")
    return [folder / "area.geojson", "--imagery", photo(folder / "a.tif")]


def area_table(folder):
    (folder / "area.csv").write_text("name,height\nfir,60\n")
    return [folder / "area.csv", "--imagery", photo(folder / "a.tif")]


def area_parquet_text(folder):
    (folder / "area.parquet").write_text("no parquet")
    return [folder / "area.parquet", "--imagery", photo(folder / "a.tif")]


def area_parquet_truncated(folder):
    frame = geopandas.GeoDataFrame(geometry=[shapely.box(*LATTICE.grid(BOX).bounds)], crs=UTM)
    frame.to_parquet(folder / "area.parquet")
    content = (folder / "area.parquet").read_bytes()
    (folder / "area.parquet").write_bytes(content[: len(content) // 2])
    return [folder / "area.parquet", "--imagery", photo(folder / "a.tif")]


def area_folder(folder):
    (folder / "areas").mkdir()
    return [folder / "areas", "--imagery", photo(folder / "a.tif")]


def area_missing(folder):
    return [folder / "area.gpkg", "--imagery", photo(folder / "a.tif")]


def area_bow_tie(folder):
    x, y = 500_000, 4_878_000
    return with_area(folder, polygons=[shapely.Polygon([(x, y), (x + 40, y + 40), (x + 40, y), (x, y + 40)])])


def area_and_bbox(folder):
    return [*with_area(folder), "--bbox", "-123.1", "44", "-123", "44.1"]


def bbox_turned(folder):
    return ["--imagery", photo(folder / "a.tif"), "--bbox", "-123", "44", "-123.1", "44.1"]


def option(*words):
    def arguments(folder):
        return ["--imagery", photo(folder / "a.tif"), *words]

    return arguments


def out_is_a_file(folder):
    (folder / "out").write_text("a file")
    return option()(folder)


def engineering_crs(folder):
    return ["--imagery", photo(folder / "a.tif", crs=CRS.from_wkt('LOCAL_CS["site",UNIT["metre",1]]'))]


def metres_as_degrees(folder):
    return ["--imagery", photo(folder / "a.tif", crs=CRS.from_epsg(4326))]


BAD = [
    (no_crs, ["a.tif", "no CRS"]),
    (engineering_crs, ["a.tif", "CRS"]),
    (metres_as_degrees, ["a.tif", "CRS"]),
    (four_bands, ["4 bands", "--bands"]),
    (sixteen_bits, ["uint16", "uint8"]),
    (too_fine, ["0.1 m", "--gsd 0.25"]),
    (asked_too_coarse, ["10 m", "--gsd 2"]),
    (natively_too_coarse, ["3 m", "2 m", "finer imagery"]),
    (text, ["a.tif", "cannot be read"]),
    (truncated, ["a.tif"]),
    (truncated_jpeg, ["a.jpg", "fetch it again"]),
    (empty_file, ["a.tif", "0 bytes"]),
    (missing, ["a.tif", "does not exist"]),
    (a_folder, ["holds no image", ".tif"]),
    (area_outside, ["area of interest", "outside"]),
    (area_elsewhere, ["area of interest", "outside"]),
    (area_empty, ["no polygon"]),
    (area_of_points, ["holds a Point", "polygons only"]),
    (area_of_empty_polygons, ["no polygon"]),
    (area_without_crs, ["CRS"]),
    (area_parquet_without_crs, ["CRS"]),
    (area_text, ["area.geojson", "cannot be read"]),
    (area_table, ["area.csv"]),
    (area_parquet_text, ["area.parquet", "cannot be read"]),
    (area_parquet_truncated, ["area.parquet", "cannot be read"]),
    (area_folder, ["areas", "cannot be read"]),
    (area_missing, ["area.gpkg", "does not exist"]),
    (area_bow_tie, ["invalid polygon"]),
    (area_and_bbox, ["--bbox"]),
    (bbox_turned, ["bbox"]),
    (option("--crs", "EPSG:2994"), ["metres", "--crs"]),
    (option("--crs", "EPSG:4326"), ["metres", "--crs"]),
    (option("--crs", "EPSG:3857"), ["metres", "--crs"]),
    (option("--crs", "EPSG:999999"), ["EPSG:999999"]),
    (option("--crs", "nonsense"), ["nonsense"]),
    (option("--crs", "EPSG:32630"), ["on the ground", "--crs", "EPSG:32610"]),
    (option("--bands", "1,2"), ["2 bands"]),
    (option("--bands", "1,2,x"), ["--bands"]),
    (option("--bands", "1,2,9"), ["--bands"]),
    (option("--bands", "0,1,2"), ["--bands"]),
    (option("--gsd", "0"), ["--gsd"]),
    (option("--gsd", "nan"), ["--gsd"]),
    (option("--sheet-size", "0"), ["sheet size"]),
    (option("--sheet-size", "-5"), ["sheet size"]),
    (option("--device", "abacus"), ["abacus"]),
    (out_is_a_file, ["out", "is a file"]),
]


@pytest.mark.slow
@pytest.mark.parametrize(("arguments", "words"), BAD, ids=lambda v: getattr(v, "__name__", None))
def test_bad_input_is_one_line_and_leaves_nothing(canopy, tmp_path, tiny_model, arguments, words):
    line = arguments(tmp_path)
    before = tree(tmp_path)
    refused(canopy("map", *line, "--model", tiny_model, "--out", tmp_path / "out"), *words)
    assert tree(tmp_path) == before


def test_bad_input_to_the_installed_program(tiny_model, tmp_path):
    refused(executable("map", *no_crs(tmp_path), "--model", tiny_model, "--out", tmp_path / "out"), "no CRS")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_folder_that_holds_something(canopy, image, tiny_model, tmp_path, overwrite):
    """Without --overwrite it is refused; with it, a failing run changes nothing and a good one only its own files."""
    out = tmp_path / "out"
    out.mkdir()
    for name in ("height.tif", "error.tif", "run.json", "notes.txt"):
        (out / name).write_text(f"old {name}")
    before = tree(out)
    command = ["map", "--model", tiny_model, "--out", out]
    if not overwrite:
        refused(canopy(*command, "--imagery", image), "not empty", "--overwrite")
        assert tree(out) == before
        return
    refused(canopy(*command, "--overwrite", "--imagery", truncated(tmp_path)[1]), "a.tif")
    assert tree(out) == before
    assert canopy(*command, "--overwrite", "--imagery", image).returncode == 0
    after = tree(out)
    assert {path.parts[0] for path in after} == {*FILES, "notes.txt"}
    assert after[Path("notes.txt")] == b"old notes.txt"
    assert after[Path("height.tif")] != before[Path("height.tif")]


# --- models --------------------------------------------------------------------------------------------------------------


def no_folder(model):
    shutil.rmtree(model)


def no_weights(model):
    (model / "weights.safetensors").unlink()


def no_contract(model):
    (model / "model.toml").unlink()


def no_fixture(model):
    (model / "fixture.safetensors").unlink()


def one_byte_of_the_weights(model):
    content = bytearray((model / "weights.safetensors").read_bytes())
    content[-1] ^= 1
    (model / "weights.safetensors").write_bytes(content)


def weights_cut_short(model):
    content = (model / "weights.safetensors").read_bytes()
    (model / "weights.safetensors").write_bytes(content[:-100])


def another_fixture(model):
    fixture = load_file(model / "fixture.safetensors")
    save_file(fixture | {"mean_m": fixture["mean_m"] + 0.5}, model / "fixture.safetensors")


def contract_with_an_unknown_key(model):
    content = (model / "model.toml").read_text()
    (model / "model.toml").write_text('surprise = "yes"\n' + content)


def contract_that_is_no_toml(model):
    (model / "model.toml").write_text("= = =")


@pytest.mark.parametrize(
    "damage",
    [
        no_folder, no_weights, no_contract, no_fixture, one_byte_of_the_weights, weights_cut_short, another_fixture,
        contract_with_an_unknown_key, contract_that_is_no_toml,
    ],
)  # fmt: skip
def test_a_damaged_model(canopy, image, tiny_model, tmp_path, damage):
    model = tmp_path / "model"
    shutil.copytree(tiny_model, model)
    damage(model)
    refused(canopy("map", "--imagery", image, "--model", model, "--out", tmp_path / "out"), str(model))
    assert not (tmp_path / "out").exists()


# --- the disk ------------------------------------------------------------------------------------------------------------


def test_a_disk_too_small_is_refused_before_the_work(canopy, image, tiny_model, tmp_path, small_disk):
    disk = small_disk(64 << 10)
    refused(canopy("map", "--imagery", image, "--model", tiny_model, "--out", disk / "deep" / "out"), "GB free")
    assert not list(disk.iterdir())


@pytest.mark.slow
@pytest.mark.parametrize("limit", [20_000, 80_000, 150_000, 300_000])
def test_a_file_that_cannot_grow(canopy, tiny_model, tmp_path, limit):
    """A limit on file sizes acts as a full disk that the check before the work cannot see."""
    image = photo(tmp_path / "photo.tif", shape=(200, 260))

    done = canopy("map", "--imagery", image, "--model", tiny_model, "--out", tmp_path / "out", limit=limit)
    assert done.returncode == 1, done.stderr
    assert "Traceback" not in done.stderr
    last = done.stderr.strip().splitlines()[-1]  # libtiff has lines of its own before it
    assert last.startswith("canopy: ")
    assert "free disk space" in last
    # 300 kB are not enough for the files of the sheet, so nothing of it is kept.
    assert not (tmp_path / "out").exists()


# --- interruptions -------------------------------------------------------------------------------------------------------


def slow_map(tmp_path, tiny_model, out):
    """A run of a minute, and the moment when it has begun to write."""
    image = tmp_path / "large.tif"
    if not image.exists():
        photo(image, shape=(2000, 2600))
    process = subprocess.Popen(
        [str(CANOPY), "map", "--imagery", str(image), "--model", str(tiny_model), "--out", str(out)],
        env={**os.environ, "OMP_NUM_THREADS": "1"}, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        # a test run started in the background of a shell hands its ignored Ctrl-C down
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),  # noqa: PLW1509
    )  # fmt: skip
    deadline = time.monotonic() + 90
    while not list(out.glob(f"{WORK}/*/attempts/*/.*.part")):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline, "the run did not begin"
        time.sleep(0.05)
    time.sleep(1.0)
    assert process.poll() is None, "the run was over before it could be interrupted"
    return process


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("existing", [False, True])
def test_an_interrupted_run_cleans_up(tmp_path, tiny_model, number, existing):
    out = tmp_path / "out"
    if existing:
        out.mkdir()
    process = slow_map(tmp_path, tiny_model, out)
    process.send_signal(number)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    assert "Traceback" not in errors
    assert errors.strip().splitlines()[-1].startswith("canopy: interrupted")
    assert out.exists() == existing
    assert not existing or not list(out.iterdir())


@pytest.mark.slow
def test_a_killed_run_leaves_no_result_and_the_next_one_succeeds(canopy, tmp_path, tiny_model, image):
    """Before a sheet was done there is nothing to go on with, and another map may be made there."""
    out = tmp_path / "out"
    process = slow_map(tmp_path, tiny_model, out)
    process.kill()
    process.communicate(timeout=60)
    assert [p.name for p in out.iterdir()] == [WORK]
    told = canopy("map", "status", out, "--json")
    assert {"state": "unfinished", "done": 0, "sheets": 1, "failed": []}.items() <= json.loads(told.stdout).items()
    done = canopy("map", "--imagery", image, "--model", tiny_model, "--out", out)
    assert done.returncode == 0, done.stderr
    assert {p.name for p in out.iterdir()} == FILES


# --- the other commands --------------------------------------------------------------------------------------------------


def test_models_show(canopy, tiny_model):
    done = canopy("models", "show", tiny_model, "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["name"] == "tiny"
    assert canopy("models", "show", tiny_model).stdout.strip() == "# tiny"


@pytest.mark.slow
def test_tile_and_inspect(canopy, tmp_path):
    recipe = tmp_path / "wood.toml"
    recipe.write_text(
        'name = "wood"\ngsd_m = 0.6\nchip_px = 64\nstride_px = 64\nmin_valid_fraction = 0.5\n[quality]\n'
        "[split]\nseed = 1\nblock_m = 50.0\nbuffer_m = 0.0\ntrain = 1.0\nval = 0.0\ntest = 0.0\n"
        '[[source]]\nkind = "simulated"\nsite = "WOOD"\nseeds = [3]\nsize_m = 80.0\nlicence = "Apache-2.0"\n'
        'image_source = "simulated"\nlidar_source = "simulated"\n'
    )
    built = canopy("tile", recipe, "--json")
    assert built.returncode == 0, built.stderr
    done = canopy("tile", "inspect", tmp_path / "wood", "--json")
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert told["chips"] == json.loads(built.stdout)["chips"] == sum(told["quality"].values())
    assert told["page"] == str(tmp_path / "wood" / "inspection" / "index.html")
    assert all(Path(path).is_file() for path in (told["page"], *told["pngs"]))
    judged = canopy("tile", "inspect", tmp_path / "wood", "--judge", "--out", tmp_path / "page")
    assert judged.returncode == 0, judged.stderr
    assert judged.stdout.splitlines()[-1] == str(tmp_path / "page" / "index.html")
    assert "keep" in judged.stdout


@pytest.mark.slow
@pytest.mark.parametrize(
    "words",
    [
        ["models", "show", "no-such-model"],
        ["tile", "no-such.toml"],
        ["tile", "inspect", "no-such"],
        ["train", "no-such.toml"],
    ],
)
def test_what_does_not_exist(canopy, tmp_path, words):
    refused(canopy(*words, cwd=tmp_path), "no-such")
    assert not list(tmp_path.iterdir())


def test_a_bug_keeps_its_traceback(tmp_path, tiny_model, image):
    """Negative control: only what a user can cause is put in one line."""
    code = (
        "import sys, canopy.region, canopy.cli\n"
        "canopy.region.map_region = lambda *a, **k: 1 / 0\n"
        f"sys.argv = ['canopy', 'map', '--imagery', {str(image)!r}, '--out', {str(tmp_path / 'out')!r}]\n"
        "canopy.cli.main()\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "ZeroDivisionError" in done.stderr
    assert "Traceback" in done.stderr

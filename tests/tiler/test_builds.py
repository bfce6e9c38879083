"""Builds of tile sets as runs: killed and gone on with, by many processes, alone in their folder, and with wrong input."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
import rasterio
from affine import Affine
from filelock import FileLock

from canopy import cli
from canopy.errors import OutputError, RecipeError
from canopy.grid import Box, Grid, Lattice
from canopy.raster import write_raster
from canopy.simulate import ForestConfig, simulate_scene, write_scene
from canopy.tiler import chips, scenes
from canopy.tiler.chips import build_tile_set, read_chip, read_index
from tests.tile_sets import HEAD, LIDAR, PAIR, UTM, content, pair, recipe

CANOPY = Path(sys.executable).parent / "canopy"
TASKS = 8


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A recipe of some 220 chips in eight tasks, and the bytes of its tile set built without a break."""
    folder = tmp_path_factory.mktemp("source")
    pair(folder, "large", left=400_003.5, top=4_000_001.0, shape=(400, 420))
    pair(folder, "small", left=401_000.0, top=4_000_100.0, shape=(30, 20), seed=1)
    path = recipe(folder)
    whole = content(build_tile_set(path, folder / "whole", workers=1))
    assert len(json.loads(whole["plan.json"])["chips"]) == TASKS
    return path, whole


def wait_for(what, process, seconds=120.0):
    end = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < end, "nothing happened"
        if process is not None and process.poll() is not None:
            pytest.fail(f"ended too early with {process.returncode}: {process.stderr.read()}")
        time.sleep(0.005)


def records(out):
    return sorted(out.parent.glob(f".{out.name}.build/*/records/chips-*.json"))


def start(path, out, *words):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "NO_COLOR": "1"}
    return subprocess.Popen(
        [CANOPY, "tile", path, "--out", out, *words],
        env=environment, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip


def test_a_killed_build_goes_on_and_ends_with_the_same_bytes(source, tmp_path, monkeypatch):
    path, whole = source
    out = tmp_path / "set"
    process = start(path, out, "--workers", "1")
    wait_for(lambda: len(records(out)) >= 2, process)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    assert not out.exists()
    done = len(records(out))
    assert 2 <= done < TASKS
    # What a kill may leave of a record that was being written is no record.
    (records(out)[0].parent / ".chips-0000007.json.1.part").write_text("[{")
    ran = []
    real = chips.run_task
    monkeypatch.setattr(chips, "run_task", lambda *args: ran.append(args[-1]) or real(*args))
    build_tile_set(path, out, workers=1)
    assert len(ran) == TASKS - done
    assert content(out) == whole
    assert list(tmp_path.iterdir()) == [out]


def test_chips_that_were_lost_are_cut_again(source, tmp_path, monkeypatch):
    path, whole = source
    out = tmp_path / "set"

    def stop(*args):
        raise OutputError("disk full")

    with monkeypatch.context() as patch:
        patch.setattr(chips, "_finish", stop)
        with pytest.raises(OutputError, match="goes on from there"):
            build_tile_set(path, out, workers=1)
    next(iter(records(out)[0].parents[1].glob("set/height/*.tif"))).unlink()
    ran = []
    real = chips.run_task
    monkeypatch.setattr(chips, "run_task", lambda *args: ran.append(args[-1]) or real(*args))
    build_tile_set(path, out, workers=1)
    assert len(ran) == 1
    assert content(out) == whole


@pytest.mark.slow
def test_a_killed_worker_changes_nothing(source, tmp_path):
    path, whole = source
    out = tmp_path / "set"
    process = start(path, out, "--workers", "2")
    wait_for(lambda: records(out), process)
    workers = [child for child in psutil.Process(process.pid).children() if "spawn_main" in " ".join(child.cmdline())]
    assert len(workers) == 2
    workers[0].kill()
    _, told = process.communicate(timeout=300)
    assert process.returncode == 0, told
    assert "Traceback" not in told
    assert content(out) == whole


@pytest.mark.slow
def test_a_cluster_of_processes_gives_the_same_bytes(source, tmp_path):
    from distributed import LocalCluster

    path, whole = source
    with LocalCluster(n_workers=2, threads_per_worker=1, processes=True, dashboard_address=None) as cluster:
        out = build_tile_set(path, tmp_path / "set", scheduler=cluster.scheduler_address)
    assert content(out) == whole


@pytest.mark.slow
def test_errors_of_a_worker_arrive_in_one_line(source, tmp_path, run_canopy):
    path, _ = source
    for name in ("data", "set.toml"):
        (shutil.copytree if (path.parent / name).is_dir() else shutil.copy)(path.parent / name, tmp_path / name)
    image = tmp_path / "data" / "large_rgb.tif"
    with rasterio.open(image) as raster:
        start = int(raster.get_tag_item("BLOCK_OFFSET_0_0", "TIFF", bidx=1))
    data = image.read_bytes()
    image.write_bytes(data[:start] + b"\xff" * 64 + data[start + 64 :])  # the head of the first block's zlib stream
    told = run_canopy("tile", tmp_path / "set.toml", "--workers", "2")
    assert "large_rgb.tif cannot be decoded" in told
    assert not (tmp_path / "set").exists()


def test_no_scheduler_and_no_worker(source, tmp_path, monkeypatch):
    path, _ = source
    with pytest.raises(OutputError, match="workers = 0"):
        build_tile_set(path, tmp_path / "set", workers=0)
    monkeypatch.setattr(chips, "CONNECT_S", 0.5)
    with pytest.raises(OutputError, match=r"answers at tcp://127\.0\.0\.1:9; .*tcp://host"):
        build_tile_set(path, tmp_path / "set", scheduler="tcp://127.0.0.1:9")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("address", ["nowhere", "http://127.0.0.1:9", "tcp://127.0.0.1:9"])
def test_no_scheduler_is_one_line_of_the_installed_program(source, tmp_path, address):
    process = start(source[0], tmp_path / "set", "--scheduler", address)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 1
    assert err.splitlines() == [f"canopy: no dask scheduler answers at {address}; give its address as tcp://host:8786"]
    assert list(tmp_path.iterdir()) == []


def test_one_build_at_a_time(source, tmp_path):
    path, _ = source
    (tmp_path / ".set.build").mkdir()
    with FileLock(tmp_path / ".set.build" / "lock"), pytest.raises(OutputError, match="another build of"):
        build_tile_set(path, tmp_path / "set")


@pytest.fixture
def begun(tmp_path, monkeypatch):
    """A build that stopped after its first task, and its recipe."""
    pair(tmp_path, "large", left=400_003.5, top=4_000_001.0, shape=(200, 210))
    path = recipe(tmp_path)
    real = chips.run_task

    def once(work, digest, stage, number):
        if number:
            raise OutputError("disk full")
        return real(work, digest, stage, number)

    with monkeypatch.context() as patch:
        patch.setattr(chips, "run_task", once)
        with pytest.raises(OutputError, match="disk full; what is done is kept"):
            build_tile_set(path)
    assert len(records(tmp_path / "set")) == 1
    return path


def test_what_was_begun_with_another_recipe_is_not_gone_on_with(begun):
    folder = begun.parent
    recipe(folder, least=0.2)
    with pytest.raises(OutputError, match=r"begun with another min_valid_fraction in the recipe .*--overwrite"):
        build_tile_set(begun)
    assert not (folder / "set").exists()
    build_tile_set(begun, overwrite=True)
    assert content(folder / "set") == content(build_tile_set(begun, folder / "fresh"))


def test_what_was_begun_with_another_file_is_not_gone_on_with(begun):
    folder = begun.parent
    pair(folder, "large", left=400_003.5, top=4_000_001.0, shape=(200, 210), seed=5)
    with pytest.raises(OutputError, match=r"begun with another .*large_rgb\.tif .*--overwrite"):
        build_tile_set(begun)
    build_tile_set(begun, overwrite=True)
    assert content(folder / "set") == content(build_tile_set(begun, folder / "fresh"))


def test_a_file_that_changes_under_a_build_stops_it(begun, monkeypatch):
    real = chips._work

    def late(*args, **kwargs):
        work = real(*args, **kwargs)
        pair(begun.parent, "large", left=400_003.5, top=4_000_001.0, shape=(200, 210), seed=5)
        return work

    monkeypatch.setattr(chips, "_work", late)
    with pytest.raises(RecipeError, match=r"large_rgb\.tif changed while"):
        build_tile_set(begun)
    assert not (begun.parent / "set").exists()
    assert not (begun.parent / ".set.build").exists()


# --- heights from points, in tiles ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def forest(tmp_path_factory):
    """An image of 140 x 150 pixels with a point cloud."""
    folder = tmp_path_factory.mktemp("forest")
    grid = Lattice(crs=UTM, gsd_m=0.5).grid(Box(-8_000_140, 800_010, -8_000_000, 800_160))
    write_scene(simulate_scene(grid=grid, seed=1, forest=ForestConfig(pulses_per_m2=6)), folder / "data")
    return folder


def heights(tile_set):
    return {name: read_chip(tile_set, name)[1] for name in read_index(tile_set)["id"]}


@pytest.mark.slow
@pytest.mark.parametrize("ground", ["classes", "filter"])
def test_tiles_of_heights_do_not_show(forest, monkeypatch, ground):
    """Chips of a cloud that is made in many tiles are those of one that is made at once: to a millimetre or two over ground
    returns, where the surface across gaps feels its surroundings, and to the filter's centimetres without them."""
    options = f'options = {{ fill_holes_px = 6, ground = "{ground}" }}\n'
    path = recipe(forest, LIDAR + options)
    whole = heights(build_tile_set(path, forest / f"whole-{ground}", overwrite=True))
    monkeypatch.setattr(scenes, "LABEL_TILE_PX", 64)
    out = build_tile_set(path, forest / f"tiles-{ground}", overwrite=True)
    cut = heights(out)
    assert cut.keys() == whole.keys()
    for name, height_m in whole.items():
        np.testing.assert_array_equal(np.isnan(cut[name]), np.isnan(height_m))
        error_m = np.abs(cut[name] - height_m)
        assert np.nanmax(error_m) < 0.01 if ground == "classes" else np.nanquantile(error_m, 0.99) < 0.05
    monkeypatch.setattr(scenes, "LABEL_HALO_PX", 0)  # negative control: the halo is what fills the holes at the cuts
    if ground == "classes":
        bare = heights(build_tile_set(recipe(forest, LIDAR), forest / "bare", overwrite=True))
        assert any((bare[name] != whole[name]).any() for name in whole)


def test_a_cloud_over_a_part_of_a_large_image(forest, monkeypatch, tmp_path):
    """Tiles that no point falls on are void; the others are as if they were alone."""
    grid = Lattice(crs=UTM, gsd_m=0.5).grid(Box(-8_000_140, 800_010, -8_000_000, 800_460))
    image = np.random.default_rng(1).integers(0, 255, (3, *grid.shape), np.uint8)
    (tmp_path / "data").mkdir()
    write_raster(tmp_path / "data" / "image.tif", image, grid=grid)
    shutil.copy(forest / "data" / "points.laz", tmp_path / "data")
    monkeypatch.setattr(scenes, "LABEL_TILE_PX", 64)
    index = read_index(build_tile_set(recipe(tmp_path, LIDAR, least=0.5)))
    assert 0 < index["col_px"].max() < 800_160
    grid = Grid(crs=UTM, transform=Affine(0.5, 0, 500_000, 0, -0.5, 4_000_000), shape=(140, 300))
    write_raster(tmp_path / "data" / "image.tif", image[:, :, :300], grid=grid)
    with pytest.raises(chips.NoPointsError, match="check CRS and extent"):
        build_tile_set(tmp_path / "set.toml", tmp_path / "none")


# --- wrong input through the command line --------------------------------------------------------------------------------


@pytest.fixture
def run_canopy(capsys, monkeypatch):
    """Runs `canopy WORDS`, which has to fail with one line; gives the line."""

    def run(*words):
        monkeypatch.setattr(sys, "argv", ["canopy", *map(str, words)])
        before = signal.getsignal(signal.SIGTERM)
        with pytest.raises(SystemExit) as ended:
            cli.main()
        signal.signal(signal.SIGTERM, before)
        assert ended.value.code == 1
        told = [line for line in capsys.readouterr().err.splitlines() if not line.startswith(("labels:", "chips:"))]
        assert len(told) == 1, told
        assert told[0].startswith("canopy: ")
        return told[0]

    return run


def nothing_left(folder):
    return not any(p.name in ("set", ".set.build") for p in folder.iterdir())


@pytest.mark.parametrize(
    ("change", "remedy"),
    [
        (("stride_px", "strid_px"), "unknown key 'strid_px'; did you mean 'stride_px'?"),
        (("buffer_m", "bufer_m"), "unknown key 'split.bufer_m'; did you mean 'buffer_m'?"),
        (("licence", "license"), "unknown key 'source.0.license'; did you mean 'licence'?"),
        (('"pair"', '"pears"'), "source.0.kind: 'pears' is not known; did you mean 'pair'?"),
        (("[split]", "[registration]\nmax_shift = 2\n[split]"), "unknown key 'registration.max_shift'; did you mean 'max_"),
        (("[split]", "[quality.water]\nflagg = 2\n[split]"), "unknown key 'quality.water.flagg'; did you mean 'flag'?"),
        (('height = "data/*_chm.tif"', 'dsm = "data/*_dsm.tif"'), "give either height, or dsm and dtm"),
        (('image = "data/*_rgb.tif"', ""), "give either image, for local files, or imagery"),
    ],
)
def test_a_wrong_key_is_named_with_the_nearest_valid_one(tmp_path, run_canopy, change, remedy):
    path = tmp_path / "set.toml"
    path.write_text((HEAD.format(least=0.1, crs="") + PAIR).replace(*change))
    assert remedy in run_canopy("tile", path)
    assert nothing_left(tmp_path)


def test_an_image_without_crs(tmp_path, run_canopy):
    pair(tmp_path, "a", left=400_000.0, top=4_000_000.0, shape=(64, 64))
    place = {"transform": Affine(0.5, 0, 400_000, 0, -0.5, 4_000_000), "width": 64, "height": 64, "count": 3}
    with rasterio.open(tmp_path / "data" / "a_rgb.tif", "w", driver="GTiff", dtype="uint8", **place) as raster:
        raster.write(np.ones((3, 64, 64), np.uint8))
    assert "a_rgb.tif has no CRS" in run_canopy("tile", recipe(tmp_path))
    assert nothing_left(tmp_path)


def cloud_of(folder, *, change=None, crs=UTM, shift_m=(0.0, 0.0), factor=1.0):
    """The forest's cloud, with its points moved or scaled, or with bytes of it changed."""
    import laspy

    cloud = laspy.read(folder / "data" / "points.laz")
    header = laspy.LasHeader(point_format=cloud.header.point_format.id, version=cloud.header.version)
    header.scales, header.offsets = cloud.header.scales, cloud.header.offsets + np.array([*shift_m, 0.0])
    if crs is not None:
        header.add_crs(crs)
    new = laspy.LasData(header)
    new.x, new.y, new.z = cloud.x + shift_m[0], cloud.y + shift_m[1], cloud.z * factor
    new.classification = cloud.classification
    return new


@pytest.mark.parametrize(
    ("wrong", "remedy"),
    [
        ({"shift_m": (9000.0, 0.0)}, "check CRS and extent"),
        ({"crs": None}, "has no CRS in its header; give it with option crs"),
        ({"factor": 10 / 0.3048}, "z_unit_m"),
    ],
)
def test_clouds_that_cannot_be(forest, tmp_path, run_canopy, wrong, remedy):
    shutil.copytree(forest / "data", tmp_path / "data")
    cloud_of(forest, **wrong).write(tmp_path / "data" / "points.laz")
    assert remedy in run_canopy("tile", recipe(tmp_path, LIDAR))
    assert nothing_left(tmp_path)


def test_a_corrupt_cloud(forest, tmp_path, run_canopy):
    shutil.copytree(forest / "data", tmp_path / "data")
    cloud = tmp_path / "data" / "points.laz"
    cloud.write_bytes(cloud.read_bytes()[: cloud.stat().st_size // 2])
    assert "points.laz" in run_canopy("tile", recipe(tmp_path, LIDAR))
    assert nothing_left(tmp_path)


def test_areas_that_cannot_be(source, tmp_path, run_canopy):
    path, _ = source
    out = tmp_path / "set"
    words = ("tile", path, "--out", out)
    assert "no image of the recipe touches the area" in run_canopy(*words, "--bbox", 10, 10, 10.1, 10.1)
    assert "antimeridian" in run_canopy(*words, "--bbox", 179.9, 10, -179.9, 10.1)
    assert "does not exist" in run_canopy(*words, "--area", tmp_path / "none.geojson")
    assert "are both given" in run_canopy(*words, "--area", tmp_path / "none.geojson", "--bbox", 1, 1, 2, 2)
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_and_then_more_room(tmp_path, small_disk, run_canopy):
    """What is done stays, and the same command goes on when there is room."""
    source = tmp_path / "source"
    source.mkdir()
    pair(source, "large", left=400_003.5, top=4_000_001.0, shape=(200, 210))
    path = recipe(source)
    disk = small_disk(1 << 19)
    told = run_canopy("tile", path, "--out", disk / "set", "--workers", "1")
    assert "disk" in told
    assert "goes on from there" in told
    assert not (disk / "set").exists()
    subprocess.run(["mount", "-o", "remount,size=64m", str(disk)], check=True)
    build_tile_set(path, disk / "set", workers=1)
    assert content(disk / "set") == content(build_tile_set(path, tmp_path / "fresh", workers=1))

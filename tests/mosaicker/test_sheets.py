"""A map in sheets: every program sees one layer, with the pixels, statistics and overviews of the same map in one file."""

import json
import os
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import rasterio
from pydantic import TypeAdapter
from pyproj import CRS
from rasterio.enums import Resampling
from rio_cogeo.cogeo import cog_validate

from canopy.errors import GridError, OutputError
from canopy.grid import Box, Lattice, sheets_over
from canopy.mosaicker.publish import ERROR_BANDS, HEIGHT_BANDS, open_map, stage_sheet
from canopy.mosaicker.quantum import error_bands, halve, quantise, statistics_of
from canopy.mosaicker.sheets import (
    SHEET_MULTIPLE_PX,
    PublishedSheet,
    check_sheet_px,
    index_sheets,
    publish_sheet,
    sheet_extent,
)

LATTICE = Lattice(crs=CRS.from_epsg(32610), gsd_m=0.6)
BOX = Box(-8_130_301, 833_177, -8_130_301 + 1443, 833_177 + 1299)
"""Of no even size, and starting nowhere in particular."""
EXTENT = sheet_extent(BOX)
TAGS = {"CANOPY_MODEL": "tiny 0", "CANOPY_IMAGERY": "a&b<c>.tif"}
EMPTY = Box(BOX.row1 - 700, BOX.col0, BOX.row1, BOX.col0 + 700)
"""Without any height; larger than a sheet."""
FILES = pytest.mark.parametrize(("kind", "names"), [("height", HEIGHT_BANDS), ("error", ERROR_BANDS)])
LAYERS = pytest.mark.parametrize("layer", ["vrt", "gti.gpkg"])


def truth():
    """(band, row, col) of `BOX`: heights on the quantum with holes, and their error bands."""
    rng = np.random.default_rng(11)
    rows, cols = BOX.shape
    smooth = 15 + 10 * np.sin(np.arange(rows) / 40)[:, None] * np.cos(np.arange(cols) / 30)[None, :]
    height = quantise((smooth + 5 * (rng.random(BOX.shape) < 0.02)).astype(np.float32))  # little noise: quickly compressed
    height[rng.random(BOX.shape) < 0.02] = np.nan
    height[EMPTY.slices_in(BOX)] = np.nan
    return {"height": height[None], "error": error_bands(np.maximum(height - 3, 0), height + 4)}


TRUTH = truth()


def whole(kind):
    """The map in the extent of the sheets' files, NaN around it."""
    pixels = np.full((len(TRUTH[kind]), *EXTENT.shape), np.nan, np.float32)
    pixels[(slice(None), *BOX.slices_in(EXTENT))] = TRUTH[kind]
    return pixels


def staged(folder, box):
    folder.mkdir(exist_ok=True)
    with stage_sheet(folder, LATTICE, box) as (sheet, writer):
        here = box.slices_in(BOX)
        writer.write(box, TRUTH["height"][0][here], TRUTH["error"][(slice(None), *here)])
    return sheet


def published(folder, sheet_px, threads=None):
    out = folder / "out"
    sheets = [
        publish_sheet(out, staged(folder / "work", box), lattice=LATTICE, sheet_px=sheet_px, tags=TAGS, threads=threads)
        for box in sheets_over(BOX, sheet_px)
    ]
    index_sheets(out, sheets, lattice=LATTICE, box=BOX, sheet_px=sheet_px, tags=TAGS, threads=threads)
    return out, sheets


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return published(tmp_path_factory.mktemp("map"), 640)


@pytest.fixture(scope="module")
def out(made):
    return made[0]


def overview(kind, factor):
    pixels = whole(kind)
    while factor > 1:
        pixels, factor = halve(pixels), factor // 2
    return pixels


# --- the layer -----------------------------------------------------------------------------------------------------------


@FILES
@LAYERS
def test_one_layer(out, layer, kind, names):
    with rasterio.open(out / f"{kind}.{layer}") as dataset:
        np.testing.assert_array_equal(dataset.read(), whole(kind))
        assert dataset.driver == ("VRT" if layer == "vrt" else "GTI")
        assert dataset.transform == LATTICE.grid(EXTENT).transform
        assert dataset.crs.to_epsg() == 32610
        assert dataset.shape == EXTENT.shape
        assert dataset.descriptions == names
        assert dataset.units == ("m",) * len(names)
        assert dataset.dtypes == ("float32",) * len(names)
        assert all(np.isnan(v) for v in dataset.nodatavals)
        assert dataset.tags().items() >= TAGS.items()


@FILES
@LAYERS
def test_statistics_are_those_of_the_whole(out, layer, kind, names):
    """To the last digit: they are sums of whole numbers."""
    with rasterio.open(out / f"{kind}.{layer}") as dataset:
        for index, (statistics, band) in enumerate(zip(statistics_of(whole(kind)), TRUTH[kind], strict=True), start=1):
            tags = dataset.tags(index)
            assert tags.items() >= statistics.tags(EXTENT.shape[0] * EXTENT.shape[1]).items()
            known = band[np.isfinite(band)].astype(float)
            assert float(tags["STATISTICS_MINIMUM"]) == known.min()
            assert float(tags["STATISTICS_MAXIMUM"]) == known.max()
            assert float(tags["STATISTICS_MEAN"]) == pytest.approx(known.mean(), rel=1e-14)
            assert float(tags["STATISTICS_STDDEV"]) == pytest.approx(known.std(), rel=1e-12)


@FILES
@LAYERS
@pytest.mark.parametrize("factor", [2, 4])
def test_overviews_are_those_of_the_whole(out, layer, kind, names, factor):
    """What a program gets that asks for fewer pixels: the sheets' own up to 2, beyond that those beside the layer."""
    rows, cols = EXTENT.shape
    with rasterio.open(out / f"{kind}.{layer}") as dataset:
        got = dataset.read(out_shape=(dataset.count, rows // factor, cols // factor), resampling=Resampling.nearest)
    np.testing.assert_array_equal(got, overview(kind, factor))


@LAYERS
def test_without_the_file_of_overviews_they_are_others(out, layer, tmp_path):
    """Negative control: it is that file that a program is given."""
    shutil.copytree(out, tmp_path / "bare")
    (tmp_path / "bare" / f"height.{layer}.ovr").unlink()
    rows, cols = EXTENT.shape
    with rasterio.open(tmp_path / "bare" / f"height.{layer}") as dataset:
        got = dataset.read(out_shape=(1, rows // 4, cols // 4))
    assert not np.array_equal(got, overview("height", 4), equal_nan=True)


def test_overviews_do_not_depend_on_the_size_of_the_sheets(out, tmp_path):
    other, _ = published(tmp_path, 1024)
    for name in ("height.vrt", "error.vrt"):
        with rasterio.open(out / name) as small, rasterio.open(other / name) as large:
            assert small.shape == large.shape
            for factor in (1, 2, 4):
                shape = (small.count, small.height // factor, small.width // factor)
                np.testing.assert_array_equal(small.read(out_shape=shape), large.read(out_shape=shape))
            assert [small.tags(i) for i in small.indexes] == [large.tags(i) for i in large.indexes]


@FILES
def test_the_folder_can_be_moved(out, tmp_path, kind, names):
    shutil.copytree(out, tmp_path / "there")
    (tmp_path / "there").rename(tmp_path / "moved")
    for layer in ("vrt", "gti.gpkg"):
        content = (tmp_path / "moved" / f"{kind}.{layer}").read_bytes()
        assert str(out).encode() not in content
        with rasterio.open(tmp_path / "moved" / f"{kind}.{layer}") as dataset:
            np.testing.assert_array_equal(dataset.read(), whole(kind))
            small = dataset.read(out_shape=(dataset.count, EXTENT.shape[0] // 4, EXTENT.shape[1] // 4))
    np.testing.assert_array_equal(small, overview(kind, 4))


def test_a_lost_sheet_shows(out, tmp_path):
    """Negative control of the moved folder: the layer is read from the sheets that lie beside it."""
    shutil.copytree(out, tmp_path / "moved")
    next((tmp_path / "moved" / "sheets").glob("*_height.tif")).unlink()
    with rasterio.open(tmp_path / "moved" / "height.vrt") as dataset:
        try:
            pixels = dataset.read()
        except rasterio.errors.RasterioIOError:
            return  # GDAL says so; versions that only log it leave the sheet unknown
    assert not np.array_equal(pixels, whole("height"), equal_nan=True)


def test_the_footprints_are_a_layer(out):
    import geopandas

    frame = geopandas.read_file(out / "height.gti.gpkg")
    assert frame.crs.to_epsg() == 32610
    assert all((out / location).is_file() for location in frame["location"])
    assert frame["known_px"].sum() == np.isfinite(TRUTH["height"]).sum()
    assert frame.total_bounds == pytest.approx(LATTICE.grid(EXTENT).bounds)


def test_open_map_of_sheets(out):
    found = open_map(out)
    here = (slice(None), *BOX.slices_in(EXTENT))
    np.testing.assert_array_equal(found.height_m.values[here[1:]], TRUTH["height"][0])
    assert found.attrs["CANOPY_MODEL"] == "tiny 0"


# --- the sheets ----------------------------------------------------------------------------------------------------------


def test_each_sheet_is_a_map_of_its_own(made):
    out, sheets = made
    for sheet in sheets:
        for kind, path in zip(("height", "error"), sheet.paths(out), strict=not sheet.is_empty):
            assert cog_validate(path, strict=True, quiet=True)[0]
            with rasterio.open(path) as dataset:
                here = sheet_extent(sheet.box)
                assert dataset.transform == LATTICE.grid(here).transform
                pixels = whole(kind)[(slice(None), *here.slices_in(EXTENT))]
                np.testing.assert_array_equal(dataset.read(), pixels)
                assert all(dataset.overviews(i) == [2] for i in dataset.indexes)
                for index, statistics in enumerate(getattr(sheet, kind), start=1):
                    assert dataset.tags(index).items() >= statistics.tags(pixels[0].size).items()


def test_sheets_without_a_height_have_no_files(made):
    out, sheets = made
    empty = [sheet for sheet in sheets if sheet.is_empty]
    assert empty
    assert not any(sheet.paths(out) for sheet in empty)
    assert not any(list((out / "sheets").glob(f"{sheet.name}_*")) for sheet in empty)
    assert len(list((out / "sheets").iterdir())) == 2 * (len(sheets) - len(empty))


def test_nothing_else_is_left(out):
    assert sorted(path.name for path in out.iterdir()) == [
        "error.gti.gpkg", "error.gti.gpkg.ovr", "error.vrt", "error.vrt.ovr",
        "height.gti.gpkg", "height.gti.gpkg.ovr", "height.vrt", "height.vrt.ovr", "sheets",
    ]  # fmt: skip


def test_the_same_map_is_the_same_bytes(made, tmp_path):
    """Whatever the number of threads; and a sheet that is published again, as after a kill, is the same file."""
    out, sheets = made
    other, _ = published(tmp_path, 640, threads=1)
    again = publish_sheet(
        other, staged(tmp_path / "work", sheets[0].box), lattice=LATTICE, sheet_px=640, tags=TAGS, threads=3
    )
    assert again == sheets[0]
    files = sorted(path.relative_to(out) for path in out.rglob("*") if path.is_file())
    assert len(files) > 20
    for file in files:
        assert (out / file).read_bytes() == (other / file).read_bytes(), file


def test_what_a_killed_process_left_changes_nothing(made, tmp_path):
    out, sheets = made
    shutil.copytree(out, tmp_path / "out")
    for path in sorted((tmp_path / "out").glob("height.*")):
        path.rename(path.with_name(f".part.{path.name}"))
    index(tmp_path / "out", sheets)
    for path in out.glob("height.*"):
        assert (tmp_path / "out" / path.name).read_bytes() == path.read_bytes(), path.name


def test_a_sheet_goes_on_record(made):
    adapter = TypeAdapter(PublishedSheet)
    for sheet in made[1]:
        assert adapter.validate_json(adapter.dump_json(sheet)) == sheet


def test_a_map_smaller_than_a_block_needs_no_overviews(tmp_path):
    box = Box(BOX.row0, BOX.col0, BOX.row0 + 100, BOX.col0 + 300)
    sheet = publish_sheet(tmp_path, staged(tmp_path / "work", box), lattice=LATTICE, sheet_px=1024, tags=TAGS)
    index_sheets(tmp_path, [sheet], lattice=LATTICE, box=box, sheet_px=1024, tags=TAGS)
    assert not list(tmp_path.glob("*.ovr"))
    extent = sheet_extent(box)
    with rasterio.open(tmp_path / "height.vrt") as dataset:
        assert dataset.shape == extent.shape
        got = dataset.read(1)[box.slices_in(extent)]
    np.testing.assert_array_equal(got, TRUTH["height"][0][box.slices_in(BOX)])


@pytest.mark.parametrize("side_px", [0, 63, 1000, 16_390])
def test_a_size_whose_overviews_do_not_fit_is_refused(side_px):
    with pytest.raises(GridError, match=rf"{side_px} px are not a multiple of {SHEET_MULTIPLE_PX}") as error:
        check_sheet_px(side_px)
    check_sheet_px(int(str(error.value).rpartition(" ")[2]))


# --- what goes wrong -----------------------------------------------------------------------------------------------------


def index(out, sheets):
    return index_sheets(out, sheets, lattice=LATTICE, box=BOX, sheet_px=640, tags=TAGS)


def refusal(out, sheets):
    """The one line, after which the folder holds what it held."""
    before = sorted(path.name for path in out.iterdir())
    with pytest.raises(OutputError) as error:
        index(out, sheets)
    assert sorted(path.name for path in out.iterdir()) == before
    assert "\n" not in str(error.value)
    return str(error.value)


def test_a_missing_sheet_is_named(made, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(made[0], out)
    lost = next(sheet for sheet in made[1] if not sheet.is_empty).paths(out)[0]
    lost.unlink()
    assert f"{lost} does not exist" in refusal(out, made[1])


def test_a_sheet_of_another_run_is_named(made, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(made[0], out)
    first, second = [sheet for sheet in made[1] if not sheet.is_empty][:2]
    shutil.copy(second.paths(out)[0], first.paths(out)[0])
    assert f"{first.paths(out)[0]} is not the file that this run wrote" in refusal(out, made[1])


def test_a_map_without_any_height_is_refused(made, tmp_path):
    assert "none of the 1 sheets" in refusal(tmp_path, [sheet for sheet in made[1] if sheet.is_empty][:1])


def test_full_disk(made, small_disk):
    """From far too small to a little too small, for the layer and for a sheet: the message, and nothing left behind."""
    out, sheets = made
    need = {path.name: path.stat().st_size for path in out.iterdir() if path.is_file()}
    have = sum(path.stat().st_size for path in (out / "sheets").iterdir())
    for spare in (4096, need["height.vrt.ovr"], sum(v for k, v in need.items() if k.startswith("height")) - 8192):
        disk = small_disk(have + spare + 4096 * (2 * len(sheets) + 2))  # a page at the end of each file is not full
        shutil.copytree(out / "sheets", disk / "sheets")
        assert "free disk space" in refusal(disk, sheets)


def test_full_disk_under_a_sheet(tmp_path, small_disk):
    sheet = staged(tmp_path / "work", sheets_over(BOX, 640)[4])
    done = publish_sheet(tmp_path / "out", sheet, lattice=LATTICE, sheet_px=640, tags=TAGS)
    need = sum(path.stat().st_size for path in done.paths(tmp_path / "out"))
    for size in (8192, need // 2, need - 4096):
        disk = small_disk(size)
        with pytest.raises(OutputError, match="free disk space") as error:
            publish_sheet(disk, sheet, lattice=LATTICE, sheet_px=640, tags=TAGS)
        assert "\n" not in str(error.value)
        assert not list((disk / "sheets").iterdir())


def test_read_only_volume(made, small_disk, tmp_path):
    out, sheets = made
    disk = small_disk(50_000_000)
    shutil.copytree(out / "sheets", disk / "sheets")
    subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
    assert "Read-only file system" in refusal(disk, sheets)
    sheet = staged(tmp_path / "work", sheets[0].box)
    for folder in (disk, disk / "deeper"):
        with pytest.raises(OutputError, match="Read-only file system") as error:
            publish_sheet(folder, sheet, lattice=LATTICE, sheet_px=640, tags=TAGS)
        assert "\n" not in str(error.value)


# --- QGIS ----------------------------------------------------------------------------------------------------------------

_ASK_QGIS = """
import json, sys
from qgis.core import QgsApplication, QgsRasterBandStats, QgsRasterLayer
app = QgsApplication([], False); app.initQgis()
answers = {}
for path in sys.argv[1:]:
    layer = QgsRasterLayer(path, path, "gdal")
    provider = layer.dataProvider()
    extent, bands = layer.extent(), range(1, layer.bandCount() + 1)
    kept = QgsRasterBandStats.Min | QgsRasterBandStats.Max | QgsRasterBandStats.Mean | QgsRasterBandStats.StdDev
    stats = [provider.bandStatistics(b, kept, extent, 0) for b in bands]
    block = provider.block(1, extent, layer.width() // 4, layer.height() // 4)
    answers[path] = {
        "valid": layer.isValid(), "crs": layer.crs().authid(), "shape": [layer.height(), layer.width()],
        "names": [layer.bandName(b) for b in bands], "nodata": [provider.sourceHasNoDataValue(b) for b in bands],
        "stats": [[s.minimumValue, s.maximumValue, s.mean, s.stdDev] for s in stats],
        "small": [[None if block.isNoData(r, c) else block.value(r, c) for c in range(0, block.width(), 9)]
                  for r in range(0, block.height(), 9)],
    }
print("ANSWERS" + json.dumps(answers))
app.exitQgis()
"""


@pytest.fixture(scope="module")
def qgis():
    """The system's Python, if QGIS is installed for it: not the one of our environment."""
    program = "/usr/bin/python3"
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "GDAL", "PROJ"))}
    environment |= {"QT_QPA_PLATFORM": "offscreen"}

    def run(script, *arguments):
        return subprocess.run(
            [program, "-c", script, *map(str, arguments)], env=environment, capture_output=True, text=True, check=False
        )

    if not Path(program).exists() or run("import qgis.core").returncode:
        pytest.skip("QGIS is not installed for the system's Python (on Debian: apt install python3-qgis)")
    return run


def test_qgis_opens_the_map_with_its_statistics(made, qgis, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(made[0], out)
    sheet = next(sheet for sheet in made[1] if not sheet.is_empty)
    paths = [out / "height.vrt", out / "error.vrt", *sheet.paths(out)]
    before = sorted(out.rglob("*"))
    done = qgis(_ASK_QGIS, *paths)
    assert "ANSWERS" in done.stdout, done.stderr
    answers = json.loads(done.stdout.partition("ANSWERS")[2])
    for path, kind in zip(paths, ("height", "error") * 2, strict=True):
        found, names = answers[str(path)], HEIGHT_BANDS if kind == "height" else ERROR_BANDS
        assert (found["valid"], found["crs"], found["nodata"]) == (True, "EPSG:32610", [True] * len(names))
        assert [name.partition(": ")[2] for name in found["names"]] == list(names)
        wanted = statistics_of(TRUTH[kind]) if path.suffix == ".vrt" else getattr(sheet, kind)
        for numbers, band in zip(found["stats"], wanted, strict=True):
            assert numbers == [band.least / 32, band.largest / 32, band.mean_m, band.stddev_m]
    small = np.array(answers[str(paths[0])]["small"], float)
    np.testing.assert_array_equal(small, overview("height", 4)[0, ::9, ::9].astype(float))
    for path in set(out.rglob("*")) - set(before):  # histograms, by which it stretches the colours of three bands
        assert "STATISTICS_" not in path.read_text(), "QGIS counted for itself what the file says"

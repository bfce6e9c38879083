"""What tiles look like, pixel by pixel, and what overviews are made where there are none."""

import io
import threading
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from canopy.errors import OutputError
from canopy.metrics import class_index
from canopy.raster import RasterPool, write_raster
from canopy.region.folder import RegionFolder
from canopy.symbology import DIFFERENCE_CLASSES, ERROR_CLASSES, HEIGHT_CLASSES, UNKNOWN_COLOUR
from canopy.view.layers import date_layer, hillshade
from canopy.view.png import palette_png
from canopy.view.reduced import ReducedLevels
from canopy.view.scene import UNCALIBRATED, Scene
from canopy.view.tiles import LON_LAT, WEB_MERCATOR, Tile, TileSource, transformer
from tests.finished_maps import grid, write_map
from tests.view.conftest import SHAPE, put, tile_at

ZOOM = 18
TILE = tile_at(grid(SHAPE), ZOOM, 150, 170)


def rgba(png):
    return np.array(Image.open(io.BytesIO(png)).convert("RGBA"))


def painted(scene, layer, tile=TILE):
    png = scene.tile(scene.layers[layer], tile)
    return None if png is None else rgba(png)


def values(path, band=1, tile=TILE):
    with RasterPool(2) as pool:
        return TileSource.of(path).read(pool, tile.grid(), (band,)).data[0]


def in_classes(data, classes):
    """(row, col, 4) what values in the colours of their classes look like."""
    colours = np.array([[*each.rgb, 255] for each in classes] + [[0, 0, 0, 0]], np.uint8)
    index = class_index(data, [each.low for each in classes[1:]])
    return colours[np.where(np.isfinite(data), index, len(classes))]


def test_heights_and_errors_have_the_colours_of_their_classes(scene, made):
    height_m, error_m = values(made.out / "height.tif"), values(made.out / "error.tif")
    assert np.isnan(height_m).any()
    np.testing.assert_array_equal(painted(scene, "height"), in_classes(height_m, HEIGHT_CLASSES))
    np.testing.assert_array_equal(painted(scene, "error"), in_classes(error_m, ERROR_CLASSES))
    assert (painted(scene, "height") != in_classes(height_m + 1, HEIGHT_CLASSES)).any(), "the check sees a metre"


def test_a_reference_in_feet_is_shown_in_metres(scene, made):
    reference_m = values(made.folder / "reference.tif") * np.float32(0.3048)
    np.testing.assert_array_equal(painted(scene, "reference"), in_classes(reference_m, HEIGHT_CLASSES))


def test_the_difference_is_map_minus_reference(scene, made):
    """The reference is at most 10 m lower in the west, and 12 m higher in the east."""
    shown = painted(scene, "difference")
    difference_m = values(made.out / "height.tif") - values(made.folder / "reference.tif") * np.float32(0.3048)
    known = np.isfinite(difference_m)
    clear = known & (np.abs(difference_m[..., None] - [each.low for each in DIFFERENCE_CLASSES[1:]]).min(axis=2) > 1e-3)
    np.testing.assert_array_equal(shown[clear], in_classes(difference_m, DIFFERENCE_CLASSES)[clear])
    assert (shown[~known, 3] == 0).all()
    cols = np.flatnonzero((known & (difference_m < -10)).any(axis=0))
    assert cols.size
    assert tuple(shown[difference_m < -11][0, :3]) == DIFFERENCE_CLASSES[0].rgb


def test_shade_is_dark_away_from_the_light(scene):
    ramp_m = np.arange(20, dtype=np.float32)[None].repeat(20, 0)
    level = hillshade(np.zeros((20, 20), np.float32), 1.0)
    to_east, to_west = hillshade(ramp_m, 1.0), hillshade(ramp_m[:, ::-1], 1.0)
    assert level.shape == (18, 18)
    np.testing.assert_allclose(level, np.sin(np.radians(45)), atol=1e-6)
    assert (to_east > level).all(), "a slope that rises eastwards faces west, where the light is"
    assert (to_west < level).all()
    np.testing.assert_allclose(hillshade(ramp_m.T[::-1], 1.0), hillshade(np.rot90(ramp_m), 1.0))
    hole_m = ramp_m.copy()
    hole_m[10, 10] = np.nan
    assert np.isnan(hillshade(hole_m, 1.0)).sum() == 1, "only the unknown pixel has no shade"
    assert np.unique(painted(scene, "hillshade")[..., 3]).tolist() == [0, 255]


def test_days_have_the_colours_of_their_style(scene, made):
    """Numbers of days are larger than what float32 holds exactly, as which pixels are warped."""
    shown, tile = painted(scene, "date"), TILE
    entries = scene.layers["date"].legend
    assert [entry.label for entry in entries] == ["2020-06-18", "2021-07-03"]
    wanted = {tuple(int(entry.colour[i : i + 2], 16) for i in (1, 3, 5)) for entry in entries}
    assert {tuple(colour) for colour in shown[shown[..., 3] > 0][:, :3].tolist()} == wanted
    lon, lat = transformer(WEB_MERCATOR, LON_LAT).transform(*tile.grid().xy(200.5, 128.5))
    day = scene.point(lon, lat).date
    assert tuple(shown[128, 200, :3]) == HEIGHT_CLASSES[{"2020-06-18": 0, "2021-07-03": -1}[day]].rgb


def test_a_damaged_style_of_days_is_a_line(tmp_path):
    for text in ("<qgis", "<qgis/>", '<qgis><paletteEntry value="x"/></qgis>'):
        (tmp_path / "date.qml").write_text(text)
        with pytest.raises(OutputError, match=r"date\.qml .*; delete it"):
            date_layer(None, tmp_path / "date.qml", max_zoom=1, version="")


def test_bytes_become_a_palette(scene):
    image = Image.open(io.BytesIO(scene.tile(scene.layers["height"], TILE)))
    assert (image.mode, image.size) == ("P", (256, 256))
    assert rgba(palette_png(np.array([[0, 1, 2]], np.uint8), ((1, 2, 3), (4, 5, 6)))).tolist() == [
        [[0, 0, 0, 0], [1, 2, 3, 255], [4, 5, 6, 255]]
    ]


def test_there_is_no_tile_where_the_map_is_not(scene):
    assert [painted(scene, name, Tile(zoom=ZOOM, x=1, y=1)) for name in scene.layers] == [None] * len(scene.layers)


def test_an_uncalibrated_map_shows_its_error_in_grey(tmp_path):
    folder = write_map(tmp_path / "map", np.full((60, 60), 7, np.float32), half_width_m=5.0)
    put(folder.path, intervals=None)
    with Scene(RegionFolder.open(folder.path)) as scene:
        tile = tile_at(grid((60, 60)), ZOOM, 30, 30)
        shown = painted(scene, "error", tile)
        grey = [int(UNKNOWN_COLOUR[i : i + 2], 16) for i in (1, 3, 5)]
        assert np.unique(shown[shown[..., 3] > 0][:, :3], axis=0).tolist() == [grey]
        told = scene.description()
        assert (told["calibrated"], told["notices"][0], told["coverage"]) == (False, UNCALIBRATED, None)
        assert [layer["note"] for layer in told["layers"] if layer["id"] == "error"] != [None]


def test_a_map_of_sheets_shows_as_one_of_a_file(scene, made, tmp_path):
    """The VRT over the sheets is read as the file is."""
    from canopy.grid import Box
    from canopy.mosaicker.publish import HEIGHT_BANDS
    from canopy.mosaicker.vrt import mosaic_vrt

    parts = []
    for col in (0, 200):
        part, box = made.height_m[:, col : col + 200], Box(0, col, SHAPE[0], min(col + 200, SHAPE[1]))
        write_raster(tmp_path / f"{col}.tif", part[None], grid=grid(part.shape, col=col), nodata=np.nan)
        parts.append((box, tmp_path / f"{col}.tif"))
    vrt = mosaic_vrt(parts, grid(SHAPE), Box(0, 0, *SHAPE), HEIGHT_BANDS, {}, beside=tmp_path)
    (tmp_path / "height.vrt").write_bytes(vrt)
    (tmp_path / "run.json").write_text("{}")
    with Scene(RegionFolder.open(tmp_path)) as sheets:
        np.testing.assert_array_equal(painted(sheets, "height"), painted(scene, "height"))
        assert "error" not in sheets.layers


# --- overviews -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def plain(tmp_path):
    """4100 x 90 px without overviews, of which the first 2000 rows are masked and one pixel in two of the others."""
    data = np.broadcast_to(np.arange(4100, dtype=np.uint16)[None, :, None], (2, 4100, 90)).copy()
    valid = np.ones((4100, 90), bool)
    valid[:2000] = valid[:, ::2] = False
    data[:, ~valid] = 60_000
    write_raster(tmp_path / "a.tif", data, grid=grid((4100, 90)), valid=valid)
    return TileSource.of(tmp_path / "a.tif")


def test_overviews_are_means_of_what_is_valid(plain, tmp_path):
    (folder := tmp_path / "made").mkdir()
    (level,) = ReducedLevels(plain, folder)()
    assert (level.factor, level.grid.shape) == (4.0, (1025, 23))
    with RasterPool(1) as pool:
        pixels = pool.get(level.path).read(0, 0, level.grid.shape)
    assert not pixels.valid[:500].any()
    assert pixels.valid[500:].all()
    means = np.arange(4100).reshape(1025, 4).mean(axis=1)
    np.testing.assert_array_equal(pixels.data[0, 500:, 0], np.rint(means)[500:])
    assert level.grid.xy(1, 1) == pytest.approx(plain.grid.xy(4, 4))


def test_overviews_are_made_once_and_only_when_they_are_needed(plain, tmp_path):
    (folder := tmp_path / "made").mkdir()
    source = replace(plain, more=ReducedLevels(plain, folder))
    with RasterPool(4) as pool:
        source.read(pool, tile_at(plain.grid, ZOOM, 3000, 45).grid(), (1,))
        assert not list(folder.iterdir())
        whole = tile_at(plain.grid, 12, 3000, 45).grid()
        shown = source.read(pool, whole, (1,))
        assert shown.valid.any()
        assert 2000 <= shown.data[0][shown.valid].min() <= shown.data[0][shown.valid].max() < 4100
    made = []
    threads = [threading.Thread(target=lambda: made.append(source.more())) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(list(folder.iterdir())) == 1
    assert all(levels is made[0] for levels in made)

"""The images behind a map, as a layer."""

import io

import numpy as np
import pytest
import rasterio
from PIL import Image

from canopy.raster import RasterPool, write_raster
from canopy.region.folder import RegionFolder
from canopy.tiler.imagery import ImageFiles
from canopy.view.imagery import ImageryPainter, shown_bands
from canopy.view.scene import Scene
from canopy.view.tiles import TileSource
from tests.finished_maps import grid, write_map
from tests.view.conftest import SHAPE, put, tile_at

SIDE = (120, 120)
TILE = tile_at(grid(SIDE), 18, 60, 60)


def painted(*paths, tile=TILE):
    images = ImageFiles(list(paths))
    painter = ImageryPainter.of(images, tuple(TileSource.of(file.path) for file in images.info.files))
    with RasterPool(4) as pool:
        png = painter.png(tile, pool)
    return None if png is None else np.array(Image.open(io.BytesIO(png)))


def flat(path, colour, *, dtype=np.uint8, col=0, **options):
    data = np.ones((len(colour), *SIDE), dtype) * np.array(colour, dtype)[:, None, None]
    write_raster(path, data, grid=grid(SIDE, col=col), **options)
    return path


def colours(rgba):
    return np.unique(rgba[rgba[..., 3] > 0][:, :3], axis=0).tolist()


def test_bytes_are_shown_as_they_are(tmp_path):
    valid = np.ones(SIDE, bool)
    valid[:, 60:] = False
    shown = painted(flat(tmp_path / "a.tif", (10, 120, 200, 77), valid=valid))
    assert colours(shown) == [[10, 120, 200]]
    assert colours(painted(flat(tmp_path / "b.tif", (50,)))) == [[50, 50, 50]]
    whole = painted(flat(tmp_path / "c.tif", (10, 120, 200)))
    assert 0.1 < (shown[..., 3] > 0).sum() / (whole[..., 3] > 0).sum() < 0.6, "what is masked is transparent"


def test_the_bands_are_found_by_their_names(tmp_path):
    named = flat(tmp_path / "a.tif", (9, 1, 2, 3), band_names=["NIR", "Blue", "Green", "Red"])
    assert shown_bands(ImageFiles(named).info.files[0], "none") == (4, 3, 2)
    plain = flat(tmp_path / "b.tif", (9, 1, 2, 3))
    assert shown_bands(ImageFiles(plain).info.files[0], "none") == (1, 2, 3)


def test_of_two_images_the_newer_lies_above(tmp_path):
    flat(tmp_path / "a.tif", (1, 1, 1), tags={"ACQUISITION_DATE": "2018-01-01"})
    flat(tmp_path / "b.tif", (2, 2, 2), tags={"ACQUISITION_DATE": "2020-01-01"}, col=60)
    shown = painted(tmp_path / "a.tif", tmp_path / "b.tif")
    assert colours(shown) == [[1, 1, 1], [2, 2, 2]]
    assert colours(shown[:, (shown[..., 0] == 2).any(axis=0)]) == [[2, 2, 2]]


def test_a_fourth_band_that_is_tagged_alpha_but_holds_data_hides_nothing(tmp_path):
    rng = np.random.default_rng(0)
    data = rng.integers(0, 255, (4, *SIDE), dtype=np.uint8)
    data[:3], data[3, :60] = 90, rng.integers(0, 40, (60, 120))
    with rasterio.open(
        tmp_path / "a.tif", "w", driver="GTiff", width=120, height=120, count=4, dtype="uint8", photometric="rgb",
        ALPHA="YES", crs=grid(SIDE).crs.to_wkt(), transform=grid(SIDE).transform,
    ) as file:  # fmt: skip
        file.write(data)
    assert ImageFiles(tmp_path / "a.tif").info.alpha == "data"
    shown = painted(tmp_path / "a.tif")
    assert colours(shown) == [[90, 90, 90]]
    assert (shown[..., 3] > 0).sum() == (painted(flat(tmp_path / "b.tif", (90, 90, 90)))[..., 3] > 0).sum()


def test_the_stretch_is_the_same_in_every_tile(tmp_path):
    """A dark half and a light half: a stretch of each tile by itself would show both alike."""
    data = np.full((3, 120, 800), 400, np.uint16)
    data[:, :, 400:] = 4000
    data += np.random.default_rng(0).integers(0, 100, data.shape).astype(np.uint16)
    where = grid((120, 800))
    write_raster(tmp_path / "a.tif", data, grid=where)
    dark, light = (painted(tmp_path / "a.tif", tile=tile_at(where, 19, 60, col)) for col in (100, 700))
    means = [shown[shown[..., 3] > 0][:, :3].mean() for shown in (dark, light)]
    assert means[0] < 10
    assert means[1] > 245


def test_images_that_are_gone_are_told(scene, made, tmp_path):
    assert "Shown from black to white" in next(layer for layer in scene.layers.values() if layer.id == "imagery").note
    folder = write_map(tmp_path / "map", np.zeros(SHAPE, np.float32))
    put(folder.path, imagery={"files": [{"path": str(tmp_path / "gone.tif")}, {"path": str(made.folder / "image.tif")}]})
    with Scene(RegionFolder.open(folder.path)) as some:
        assert "imagery" in some.layers
        assert any("1 of the 2 images" in notice for notice in some.description()["notices"])
    put(folder.path, imagery={"files": [{"path": str(tmp_path / "gone.tif")}]})
    with Scene(RegionFolder.open(folder.path)) as none:
        assert "imagery" not in none.layers
    put(folder.path, imagery={"files": [{"href": "https://somewhere/a.tif"}]})
    with Scene(RegionFolder.open(folder.path)) as remote:
        assert any("catalogue" in notice for notice in remote.description()["notices"])
    (tmp_path / "gone.tif").write_bytes(b"no image")
    put(folder.path, imagery={"files": [{"path": str(tmp_path / "gone.tif")}]})
    with Scene(RegionFolder.open(folder.path)) as broken:
        assert any("not shown: " in notice for notice in broken.description()["notices"])


def test_an_image_of_16_bits_uses_the_whole_range(scene):
    shown = np.array(Image.open(io.BytesIO(scene.tile(scene.layers["imagery"], tile_at(grid(SHAPE), 18, 200, 170)))))
    inside = shown[shown[..., 3] > 0][:, :3]
    assert inside.min() == 0
    assert inside.max() == 255
    assert inside.mean() == pytest.approx(127, abs=6)

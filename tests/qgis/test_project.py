"""A map's folder in the real QGIS: the project opens without a missing layer, values are metres, styles are as meant."""

import shutil
import zipfile

import geopandas
import numpy as np
import pytest
from PIL import Image

from canopy.grid import Box
from canopy.raster import open_raster, read_raster, write_raster
from canopy.region import styles
from canopy.symbology import ERROR_CLASSES, HEIGHT_CLASSES, UNKNOWN_COLOUR
from tests.qgis.conftest import BOX, HALF, LATTICE

pytestmark = pytest.mark.qgis

HEIGHT, ERROR, DATE = "canopy_map_height", "canopy_map_error", "canopy_map_date"
NOTHING = "#123456"
"""Background that is no colour of a map."""


def rgb(colour):
    return [int(colour[place : place + 2], 16) for place in (1, 3, 5)]


def predicted(values, classes, colours, elsewhere=NOTHING):
    """(row, col, 3) what a raster (row, col) should look like, by numpy alone."""
    edges = [each.low for each in classes[1:]]
    table = np.array([*map(rgb, colours), rgb(elsewhere)], np.uint8)
    return table[np.where(np.isnan(values), len(classes), np.searchsorted(edges, np.nan_to_num(values), side="right"))]


def picture(path):
    """(row, col, 3) of a PNG."""
    return np.asarray(Image.open(path).convert("RGB"))


def unlike(one, two):
    """Share of the pixels of two pictures whose colours differ."""
    return float((np.abs(one.astype(int) - two.astype(int)).max(axis=-1) > 1).mean())


def grid_of(path):
    with open_raster(path) as raster:
        return raster.grid


def drawn(layers, grid, file):
    """The question for a picture of a grid, pixel by pixel."""
    left, bottom, right, top = grid.bounds
    rows, cols = grid.shape
    return {
        "layers": layers, "background": NOTHING, "extent": [left, bottom, right, top], "size": [cols, rows],
        "file": str(file),
    }  # fmt: skip


def centres(grid, pixels):
    return [list(map(float, grid.xy(col + 0.5, row + 0.5))) for row, col in pixels]


def flat(tree):
    """(headings, layer, shown) of a legend, from the top."""
    for node in tree:
        if "layer" in node:
            yield (), node["layer"].removeprefix("canopy_map_"), node["shown"]
        else:
            yield from (((node["group"], *above), layer, shown) for above, layer, shown in flat(node["members"]))


# --- the project ---------------------------------------------------------------------------------------------------------


def invalid(answer):
    return sorted(key for key, layer in answer["layers"].items() if not layer["valid"])


def test_all_layers_are_there_in_their_order(qgis, calibrated):
    answer = qgis(project=str(calibrated / "region.qgz"))
    assert answer["read"]
    assert invalid(answer) == []
    assert [*flat(answer["tree"])] == [
        (("Where",), "area", True),
        (("Canopy height",), "error", False),
        (("Canopy height",), "height", True),
        (("Canopy height",), "date", False),
        (("Canopy height",), "unknown", True),
        (("Imagery",), "imagery_1", True),
    ]
    assert answer["order"] == [f"canopy_map_{name}" for _, name, _ in flat(answer["tree"])]
    assert {layer["crs"] for layer in answer["layers"].values()} == {"EPSG:32610"} == {answer["crs"]}
    assert answer["view"] == pytest.approx(grid_of(calibrated / "height.tif").bounds)
    assert answer["title"] == "Canopy height by tiny 0, imagery of 2019-07-01 to 2021-07-14"
    assert "measured coverage 86.7%" in answer["abstract"]
    assert answer["layers"][HEIGHT]["name"] == "Canopy height, m above ground"
    assert answer["layers"]["canopy_map_area"]["features"] == 1


def test_classes_have_their_colours_and_names(qgis, calibrated):
    layers = qgis(project=str(calibrated / "region.qgz"))["layers"]
    assert layers[HEIGHT]["renderer"] == layers[ERROR]["renderer"] == "singlebandpseudocolor"
    assert layers[HEIGHT]["symbols"] == [[each.label(), each.colour] for each in HEIGHT_CLASSES]
    assert layers[ERROR]["symbols"] == [[each.label(sign="± "), each.colour] for each in ERROR_CLASSES]
    assert layers[DATE]["renderer"] == "paletted"
    assert [label for label, _ in layers[DATE]["symbols"]] == ["2019-07-01", "2021-07-14"]


def test_a_click_tells_metres_and_the_day(qgis, calibrated):
    grid = grid_of(calibrated / "height.tif")
    pixels = [(5, 10), (30, 45), (64, 130), (100, 200), (127, 255)]
    answer = qgis(
        project=str(calibrated / "region.qgz"), points={key: centres(grid, pixels) for key in (HEIGHT, ERROR, DATE)}
    )
    for key, name in ((HEIGHT, "height"), (ERROR, "error")):
        bands = read_raster(calibrated / f"{name}.tif")[0].data
        for (row, col), found in zip(pixels, answer["identified"][key], strict=True):
            values = [found[str(band + 1)] for band in range(len(bands))]
            np.testing.assert_array_equal([np.nan if v is None else v for v in values], bands[:, row, col])
    assert [found["1"] for found in answer["identified"][DATE]] == [20190701, None, 20210714, 20210714, 20210714]
    assert np.isfinite(read_raster(calibrated / "height.tif")[0].data[0, 64, 130])


def test_it_opens_wherever_it_is_moved(qgis, moved, calibrated, tmp_path):
    grid = grid_of(calibrated / "height.tif")
    here, there = (
        qgis(project=str(folder / "region.qgz"), points={HEIGHT: centres(grid, [(64, 130)])}, pictures=[
            drawn([HEIGHT, "canopy_map_imagery_1"], grid, tmp_path / f"{name}.png")
        ])
        for name, folder in (("here", calibrated), ("there", moved))
    )  # fmt: skip
    assert invalid(there) == []
    assert all(layer["source"].startswith(str(moved)) for layer in there["layers"].values())
    assert there["identified"] == here["identified"]
    values = read_raster(calibrated / "height.tif")[0].data[0]
    known = np.isfinite(values)
    np.testing.assert_array_equal(picture(tmp_path / "here.png")[known], picture(tmp_path / "there.png")[known])


def test_imagery_that_is_gone_is_no_missing_layer(qgis, photos, calibrated_model, tmp_path):
    from canopy.region import map_region

    own = shutil.copytree(photos, tmp_path / "photos")
    map_region(imagery=own / "0.tif", model=calibrated_model, out=tmp_path / "map")
    shutil.rmtree(own)
    assert invalid(qgis(project=str(tmp_path / "map" / "region.qgz"))) == []


def test_a_missing_layer_is_seen(qgis, moved):
    """Negative control: what the tests above look for can be found."""
    (moved / "height.tif").unlink()
    assert invalid(qgis(project=str(moved / "region.qgz"))) == [HEIGHT]
    path = moved / "region.qgz"
    with zipfile.ZipFile(path) as archive:
        text = archive.read("region.qgs").decode()
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("region.qgs", text.replace("./error.tif", "../error.tif"))
    assert invalid(qgis(project=str(path))) == [ERROR, HEIGHT]


# --- what is drawn -------------------------------------------------------------------------------------------------------


def test_pictures_are_what_the_classes_say(qgis, colourful, tmp_path):
    grid = grid_of(colourful / "height.tif")
    qgis(project=str(colourful / "region.qgz"), pictures=[
        drawn([HEIGHT], grid, tmp_path / "height.png"),
        drawn([ERROR], grid, tmp_path / "error.png"),
        drawn([HEIGHT, "canopy_map_unknown"], grid, tmp_path / "unknown.png"),
    ])  # fmt: skip
    height, error = (read_raster(colourful / f"{name}.tif")[0].data[0] for name in ("height", "error"))
    wanted = predicted(height, HEIGHT_CLASSES, [each.colour for each in HEIGHT_CLASSES])
    assert len(np.unique(wanted.reshape(-1, 3), axis=0)) == len(HEIGHT_CLASSES) + 1
    assert unlike(picture(tmp_path / "height.png"), wanted) < 1e-3
    told = predicted(error, ERROR_CLASSES, [each.colour for each in ERROR_CLASSES])
    assert unlike(picture(tmp_path / "error.png"), told) < 1e-3
    assert unlike(picture(tmp_path / "height.png"), told) > 0.5, "the comparison finds nothing"
    # Unknown is grey inside of the area that was asked for, and nothing outside.
    found = picture(tmp_path / "unknown.png")
    assert (found[25:35, 35:55] == rgb(UNKNOWN_COLOUR)).all()
    assert (found[0, -20:] == rgb(NOTHING)).all()


def test_days_are_drawn(qgis, calibrated, tmp_path):
    grid = grid_of(calibrated / "date.tif")
    qgis(project=str(calibrated / "region.qgz"), pictures=[drawn([DATE], grid, tmp_path / "date.png")])
    found = picture(tmp_path / "date.png")
    first, last = found[100, HALF - 20].tolist(), found[100, HALF + 20].tolist()
    assert [first, last] == [rgb(HEIGHT_CLASSES[0].colour), rgb(HEIGHT_CLASSES[-1].colour)]


def test_imagery_is_drawn_as_it_is(qgis, calibrated, photos, tmp_path):
    grid = LATTICE.grid(BOX)
    qgis(project=str(calibrated / "region.qgz"), pictures=[drawn(["canopy_map_imagery_1"], grid, tmp_path / "imagery.png")])
    found = picture(tmp_path / "imagery.png")
    for name, cols in (("0.tif", slice(0, HALF)), ("1.tif", slice(HALF, None))):
        pixels, _ = read_raster(photos / name)
        wanted = np.where(pixels.valid[..., None], np.moveaxis(pixels.data, 0, -1), np.array(rgb(NOTHING), np.uint8))
        assert unlike(found[:, cols], wanted) < 1e-3


def test_values_that_are_no_colours_are_stretched(qgis, tmp_path):
    """Reflectances in whole numbers, of which a screen would show the lowest 255; one band, and three."""
    grid = LATTICE.grid(Box(0, 0, 40, 60))
    rng = np.random.default_rng(3)
    for bands in (1, 3):
        data = np.concatenate([rng.integers(500, 3000, (bands, *grid.shape)), np.full((1, *grid.shape), 255)])
        write_raster(tmp_path / f"{bands}.tif", data.astype(np.uint16), grid=grid)
        (tmp_path / f"{bands}.qml").write_text(styles.qml(styles.image_pipe(bands, stretched=True)), encoding="utf-8")
    paths = [str(tmp_path / f"{bands}.tif") for bands in (1, 3)]
    qgis(rasters=paths, pictures=[drawn([path], grid, f"{path}.png") for path in paths])
    grey, colours = (picture(f"{path}.png").astype(int) for path in paths)
    assert (grey == grey[..., :1]).all()
    for found in (grey, colours):
        assert np.percentile(found, 5) < 40
        assert np.percentile(found, 95) > 215


def test_a_style_beside_a_raster_is_found_by_its_name(qgis, tmp_path):
    """Every value that a height can have up to 45 m, edges of classes among them; another style gives another picture."""
    values = (np.arange(45 * 32, dtype=np.float32) / 32).reshape(32, 45)
    grid = LATTICE.grid(Box(0, 0, *values.shape))
    for name, pipe in (
        ("height", styles.height_pipe()), ("error", styles.error_pipe(calibrated=True)),
        ("grey", styles.error_pipe(calibrated=False)),
    ):  # fmt: skip
        write_raster(tmp_path / f"{name}.tif", values[None], grid=grid, nodata=np.nan)
        (tmp_path / f"{name}.qml").write_text(styles.qml(pipe), encoding="utf-8")
    names = {name: str(tmp_path / f"{name}.tif") for name in ("height", "error", "grey")}
    answer = qgis(
        rasters=[*names.values()],
        pictures=[drawn([path], grid, tmp_path / f"{name}.png") for name, path in names.items()],
    )
    assert {layer["renderer"] for layer in answer["layers"].values()} == {"singlebandpseudocolor"}
    wanted = {
        "height": predicted(values, HEIGHT_CLASSES, [each.colour for each in HEIGHT_CLASSES]),
        "error": predicted(values, ERROR_CLASSES, [each.colour for each in ERROR_CLASSES]),
        "grey": predicted(values, ERROR_CLASSES, [styles.grey(each) for each in ERROR_CLASSES]),
    }
    for name, colours in wanted.items():
        assert unlike(picture(tmp_path / f"{name}.png"), colours) == 0
    assert unlike(picture(tmp_path / "error.png"), wanted["height"]) > 0.9


# --- sheets, and a model without a calibration -----------------------------------------------------------------------------


def test_sheets_open_as_one_map(qgis, sheeted, tmp_path):
    grid = grid_of(sheeted / "height.vrt")
    pixels = [(10, 10), (70, 100)]
    answer = qgis(
        project=str(sheeted / "region.qgz"), points={HEIGHT: centres(grid, pixels), ERROR: centres(grid, pixels)},
        pictures=[drawn([HEIGHT], grid, tmp_path / "height.png")],
    )  # fmt: skip
    assert invalid(answer) == []
    assert [*flat(answer["tree"])] == [
        (("Where",), "shift", True),
        (("Where",), "sheets", False),
        (("Canopy height", "Error (uncalibrated)"), "uncalibrated", True),
        (("Canopy height", "Error (uncalibrated)"), "error", True),
        (("Canopy height",), "height", True),
        (("Canopy height",), "unknown", True),
        (("Imagery",), "imagery_1", True),
    ]
    groups = answer["tree"][1]["members"]
    assert groups[0]["group"] == "Error (uncalibrated)"
    assert not groups[0]["shown"]
    assert answer["layers"]["canopy_map_sheets"]["features"] == 4
    height, error = (read_raster(sheeted / f"{name}.vrt")[0].data for name in ("height", "error"))
    for place, (row, col) in enumerate(pixels):
        assert answer["identified"][HEIGHT][place] == {"1": height[0, row, col]}
        assert [*answer["identified"][ERROR][place].values()] == error[:, row, col].tolist()
    wanted = predicted(height[0], HEIGHT_CLASSES, [each.colour for each in HEIGHT_CLASSES])
    assert unlike(picture(tmp_path / "height.png"), wanted) < 1e-3


def test_an_uncalibrated_error_is_grey_hatched_and_says_so(qgis, sheeted, tmp_path):
    grid = grid_of(sheeted / "error.vrt")
    answer = qgis(
        project=str(sheeted / "region.qgz"),
        pictures=[
            drawn([ERROR], grid, tmp_path / "error.png"),
            drawn(["canopy_map_uncalibrated", ERROR], grid, tmp_path / "hatched.png"),
        ],
    )
    layer = answer["layers"][ERROR]
    assert "uncalibrated" in layer["name"]
    assert "coverage not measured" in layer["abstract"]
    for label, colour in layer["symbols"]:
        assert label.startswith("uncalibrated ± ")
        assert len(set(rgb(colour))) == 1
    plain, hatched = picture(tmp_path / "error.png"), picture(tmp_path / "hatched.png")
    assert (plain == plain[..., :1]).all()
    assert 0.02 < unlike(plain, hatched) < 0.6


def test_what_is_unlike_the_calibration_data_is_hatched(qgis, sheeted, tmp_path):
    """Only the sheets that `shift.gpkg` flags."""
    frame = geopandas.read_file(sheeted / "shift.gpkg")
    assert frame["flagged"].all()
    copy = shutil.copytree(sheeted, tmp_path / "map")
    frame["flagged"] = frame["flagged"] & (frame["sheet"] != frame["sheet"][0])
    frame.to_file(copy / "shift.gpkg", layer="shift")
    grid = grid_of(sheeted / "height.vrt")
    answer = qgis(project=str(copy / "region.qgz"), pictures=[drawn(["canopy_map_shift"], grid, tmp_path / "shift.png")])
    assert answer["layers"]["canopy_map_shift"]["symbols"][0][0] == "unlike it: 90 % not promised here"
    found = (picture(tmp_path / "shift.png") != rgb(NOTHING)).any(axis=-1)
    assert found[70:120, 70:120].mean() > 0.05
    assert found[6:58, 6:58].mean() == 0

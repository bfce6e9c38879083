"""Change in the real QGIS: values are metres and classes, in the colours of the symbology, without being told."""

import json

import numpy as np
import pytest

from canopy.analyse.change import change_maps
from canopy.raster import read_raster
from canopy.symbology import CHANGE_CLASSES, CHANGE_VALUES
from tests.finished_maps import grid, write_map
from tests.qgis.test_project import drawn, picture, predicted, rgb, unlike

pytestmark = pytest.mark.qgis

SHAPE = (40, 60)


@pytest.fixture(scope="module")
def changed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("change")
    before_m = np.full(SHAPE, 20, np.float32)
    before_m[:5, :5] = np.nan
    # Multiples of 2 m are ends of classes, where QGIS and we must agree on the class.
    after_m = before_m + np.repeat(np.arange(-15, 15), 2).astype(np.float32)[None]
    for name, height_m in (("before", before_m), ("after", after_m)):
        write_map(folder / name, height_m, half_width_m=3.0)
        run = json.loads((folder / name / "run.json").read_text())
        (folder / name / "run.json").write_text(json.dumps(run | {"tta": "none"}))
    return change_maps(folder / "before", folder / "after", out=folder / "out").folder


def test_change_looks_and_reads_as_it_is(qgis, changed, tmp_path):
    paths = {name: str(changed / f"{name}.tif") for name in ("change", "classes")}
    pictures = [drawn([path], grid(SHAPE), tmp_path / f"{name}.png") for name, path in paths.items()]
    x, y = grid(SHAPE).xy(10.5, 20.5)
    answer = qgis(rasters=list(paths.values()), points={path: [[x, y]] for path in paths.values()}, pictures=pictures)
    assert answer["errors"] == [[], []]
    legends = {name: answer["layers"][path]["symbols"] for name, path in paths.items()}
    assert legends["change"][-len(CHANGE_CLASSES) :] == [[each.name, each.colour] for each in CHANGE_CLASSES]
    assert legends["classes"][-len(CHANGE_VALUES) :] == [[each.name, each.colour] for each in CHANGE_VALUES]
    change_m, kind = (read_raster(paths[name])[0].data for name in ("change", "classes"))
    identified = answer["identified"]
    assert identified[paths["change"]] == [{str(band + 1): pytest.approx(change_m[band, 20, 10]) for band in range(3)}]
    assert identified[paths["classes"]] == [{"1": kind[0, 20, 10]}] == [{"1": 1}]
    expected = predicted(change_m[0], CHANGE_CLASSES, [each.colour for each in CHANGE_CLASSES])
    assert unlike(picture(tmp_path / "change.png"), expected) == 0
    expected = np.array([rgb(each.colour) for each in CHANGE_VALUES], np.uint8)[kind[0]]
    assert unlike(picture(tmp_path / "classes.png"), expected) == 0

"""Layers derived from a map: what is in the files, wherever windows end, and nothing half-made."""

import json

import geopandas
import numpy as np
import pytest
from rio_cogeo.cogeo import cog_validate
from typer.testing import CliRunner

from canopy.analyse import cells, derive
from canopy.analyse.coarse import COVER_BANDS, PERCENTILE_BANDS
from canopy.analyse.derive import Wanted
from canopy.analyse.tops import TopRule
from canopy.analyse.zonal import zonal_statistics
from canopy.cli import app
from canopy.errors import AnalysisError, OutputError
from canopy.raster import open_raster, read_raster
from tests.finished_maps import some_heights, write_map

SHAPE = (40, 52)
RULE = TopRule(most_m=3.0)
WANTED = Wanted(cover_m=(7.0, 10.0), percentiles_m=(10.0,), tops=RULE, crowns=True)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    height_m = some_heights(SHAPE, seed=2)
    height_m[:, :22] = np.nan
    half_width_m = np.random.default_rng(1).uniform(1, 4, SHAPE).astype(np.float32)
    return write_map(
        tmp_path_factory.mktemp("maps") / "map", height_m, half_width_m=half_width_m, tags={"CANOPY_MODEL": "m 1"}
    )


@pytest.fixture(scope="module")
def layers(made, tmp_path_factory):
    out = tmp_path_factory.mktemp("layers")
    result = derive.derive(made.path, out, WANTED)
    assert [path.name for path in result.files] == ["cover_7m.tif", "cover_10m.tif", "percentiles_10m.tif", "tree_tops.gpkg"]
    assert {path.name for path in out.iterdir()} == {path.name for path in result.files}
    return result


def test_cells_say_what_polygons_of_them_say(made, layers):
    """Two ways to the same numbers: cells by products of lengths, polygons by exactextract."""
    import shapely

    for path, names in ((layers.files[1], COVER_BANDS), (layers.files[2], PERCENTILE_BANDS)):
        pixels, where = read_raster(path)
        rows, cols = np.indices(where.shape)
        x, y = where.xy(cols.ravel(), rows.ravel())
        squares = geopandas.GeoDataFrame(geometry=shapely.box(x, y - 10, x + 10, y), crs=where.crs)
        expected = zonal_statistics(made, squares)
        known = expected["known_fraction"].to_numpy()
        assert (known < 0.5).sum() > 5, "no cell of which too little is known"
        for name, band in zip(names, pixels.data.reshape(len(names), -1), strict=True):
            if name == "known_fraction":
                np.testing.assert_allclose(band, known, atol=1e-6)
            elif name in expected:
                wanted = np.where(known >= 0.5, expected[name], np.nan)
                np.testing.assert_allclose(band, wanted, atol=1e-5, err_msg=name)
        assert len({*names} & {*expected}) >= 7


@pytest.mark.parametrize(("index", "names"), [(0, COVER_BANDS), (2, PERCENTILE_BANDS)])
def test_files_are_cogs_that_say_what_they_hold(layers, index, names):
    assert not [line for line in cog_validate(layers.files[index], quiet=True)[1] if "not tiled" not in line]
    with open_raster(layers.files[index]) as raster:
        assert raster.band_names == names
        assert raster.units == tuple("m" if name.endswith("_m") else "1" for name in names)
        assert raster.tags["CANOPY_MODEL"] == "m 1"
        assert "known ground" in raster.tags["CANOPY_DERIVED"]
        assert raster.structure["LAYOUT"] == "COG"
        data = raster.read_heights(0, 0, raster.shape)
        for band, tags in zip(data, raster.band_tags, strict=True):
            assert float(tags["STATISTICS_MEAN"]) == pytest.approx(np.nanmean(band, dtype=np.float64), rel=1e-6)


def test_bounds_hold_what_they_bound(layers):
    for path, names in ((layers.files[0], COVER_BANDS), (layers.files[2], PERCENTILE_BANDS)):
        pixels, _ = read_raster(path)
        bands = dict(zip(names, pixels.data, strict=True))
        for name in names:
            if name.endswith("_lower_90"):
                value, upper = bands[name.removesuffix("_lower_90")], bands[name.replace("lower", "upper")]
            elif name.endswith("_lower_90_m"):
                value, upper = bands[name.replace("_lower_90", "")], bands[name.replace("lower", "upper")]
            else:
                continue
            some = np.isfinite(value)
            assert some.any()
            assert (bands[name][some] <= value[some]).all()
            assert (value[some] <= upper[some]).all()


def test_windows_do_not_show(made, layers, tmp_path, monkeypatch):
    monkeypatch.setattr(cells, "_CHUNK_PX", 25)
    monkeypatch.setattr(derive, "_STRIP_PX", 19)
    pieces = derive.derive(made.path, tmp_path, WANTED)
    for one, other in zip(layers.files[:3], pieces.files[:3], strict=True):
        np.testing.assert_array_equal(read_raster(one)[0].data, read_raster(other)[0].data)
    tables = [
        geopandas.read_file(each.files[3]).assign(x=lambda t: t.geometry.x, y=lambda t: t.geometry.y).sort_values(["y", "x"])
        for each in (layers, pieces)
    ]
    assert layers.tops == pieces.tops == len(tables[0]) > 20
    assert (
        tables[0]
        .drop(columns="geometry")
        .reset_index(drop=True)
        .equals(tables[1].drop(columns="geometry").reset_index(drop=True))
    )


def test_the_same_bytes_again(made, layers, tmp_path):
    again = derive.derive(made.path, tmp_path, WANTED)
    for one, other in zip(layers.files, again.files, strict=True):
        assert one.read_bytes() == other.read_bytes(), one.name


def test_tops_say_what_the_map_says(made, layers):
    tops = geopandas.read_file(layers.files[3])
    height_m, where = read_raster(made.height)
    error, _ = read_raster(made.error)
    col, row = (np.floor(v).astype(int) for v in where.pixel(tops.geometry.x.to_numpy(), tops.geometry.y.to_numpy()))
    np.testing.assert_array_equal(tops["height_m"], height_m.data[0][row, col])
    for name, band in zip(("error_90_m", "lower_90_m", "upper_90_m"), error.data, strict=True):
        np.testing.assert_array_equal(tops[name], band[row, col])
    np.testing.assert_allclose(tops["crown_radius_m"], RULE.crown_m(tops["height_m"].to_numpy()) / 2, rtol=1e-6)
    assert set(tops["surroundings_known"]) == {True, False}


def test_an_uncalibrated_map_has_no_bounds(tmp_path):
    made = write_map(tmp_path / "map", some_heights(SHAPE), half_width_m=None)
    result = derive.derive(made.path, tmp_path / "out", Wanted(cover_m=(10.0,), percentiles_m=(10.0,)))
    for path, names in zip(result.files, (COVER_BANDS, PERCENTILE_BANDS), strict=True):
        for name, band in zip(names, read_raster(path)[0].data, strict=True):
            assert np.isfinite(band).any() == ("_90" not in name), name


def test_existing_layers_stay(made, layers):
    before = layers.files[0].read_bytes()
    with pytest.raises(OutputError, match=r"cover_7m\.tif exists; choose another folder or pass --overwrite"):
        derive.derive(made.path, layers.files[0].parent, Wanted(cover_m=(7.0,)))
    assert layers.files[0].read_bytes() == before


def test_a_layer_that_fails_leaves_none(made, tmp_path):
    with pytest.raises(AnalysisError, match="cells of 1 m"):
        derive.derive(made.path, tmp_path / "out", Wanted(cover_m=(10.0, 1.0)))
    assert [*(tmp_path / "out").iterdir()] == []


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "nothing is asked for; give --cover 10"),
        (["--cover", "10", "--crowns"], "give --tree-tops as well"),
        (["--cover", "10", "--cover", "10"], "given twice"),
        (["--cover", "10", "--least-gap", "-1"], "gaps of at least -1 m²"),
        (["--tree-tops", "--crown-most", "0"], "tree tops by"),
    ],
)
def test_what_is_refused(made, tmp_path, words, message):
    failed = CliRunner().invoke(app, ["derive", str(made.path), "--out", str(tmp_path / "out"), *words])
    assert failed.exit_code == 1
    assert message in failed.stderr
    assert not (tmp_path / "out").exists()


def test_the_command(made, tmp_path):
    few = ["--crown-most", "3"]
    done = CliRunner().invoke(app, ["derive", str(made.path), "--out", str(tmp_path / "out"), "--tree-tops", "--json", *few])
    assert done.exit_code == 0, done.output
    told = json.loads(done.stdout)
    assert told["files"] == [str(tmp_path / "out" / "tree_tops.gpkg")]
    assert told["tree_tops"] > 20

"""Tile sets: chips on the lattice, validity kept, deterministic, whole or absent."""

import hashlib
from datetime import date
from pathlib import Path

import numpy as np
import pytest
from affine import Affine
from hypothesis import given
from hypothesis import strategies as st
from pyproj import CRS
from shapely.geometry import box as rectangle

from canopy.errors import OutputError, RecipeError
from canopy.grid import Box, Grid, Lattice
from canopy.raster import read_raster, write_raster
from canopy.simulate import ForestConfig, simulate_scene, write_scene
from canopy.tiler import chips
from canopy.tiler.chips import (
    COLUMNS,
    build_tile_set,
    chip_starts,
    read_chip,
    read_index,
    tile_set_hash,
)
from canopy.tiler.recipe import load_recipe
from canopy.tiler.register import Shift
from tests.tile_sets import HEAD, LIDAR, PAIR, UTM, pair, recipe

RECIPES = Path(__file__).parents[2] / "tiles"


@pytest.fixture
def wood(tmp_path):
    """A large image whose corner is off the stride and a small plot, 30 x 20 px."""
    large = pair(tmp_path, "large", left=400_003.5, top=4_000_001.0, shape=(150, 170))
    small = pair(tmp_path, "small", left=401_000.0, top=4_000_100.0, shape=(30, 20), seed=1)
    return tmp_path, {"large": large, "small": small}


def test_chips_hold_the_pixels_of_their_place(wood):
    folder, truth = wood
    tile_set = build_tile_set(recipe(folder))
    assert tile_set == folder / "set"
    index = read_index(tile_set)
    assert tuple(index.columns) == COLUMNS
    assert list(index["id"]) == sorted(index["id"])
    assert set(index["item"]) == {"large", "small"}
    corners = {"large": (-8_000_002, 800_007), "small": (-8_000_200, 802_000)}
    for row in index.itertuples():
        image, height_m = read_chip(tile_set, row.id)
        pixels, heights = truth[row.item]
        assert image.data.shape == (3, 64, 64)
        assert image.data.dtype == np.uint8
        assert row.id == f"WOOD_r{row.row_px}_c{row.col_px}"
        # The same window by padding the whole image, a second way to find the pixels.
        top, left = row.row_px - corners[row.item][0] + 64, row.col_px - corners[row.item][1] + 64
        window = (slice(top, top + 64), slice(left, left + 64))
        around = ((64, 64), (64, 64))
        np.testing.assert_array_equal(image.data, np.pad(pixels, ((0, 0), *around))[:, *window])
        np.testing.assert_array_equal(height_m, np.pad(heights, around, constant_values=np.nan)[window])
        np.testing.assert_array_equal(image.valid, np.pad(np.ones(heights.shape, bool), around)[window])


def test_the_index_says_what_the_files_hold(wood):
    folder, _ = wood
    source = PAIR.replace('site = "WOOD"', 'site = "WOOD"\nimage_date = 2021-07-01\nlidar_date = 2021-06-21')
    tile_set = build_tile_set(recipe(folder, source))
    index = read_index(tile_set)
    assert index.crs == CRS.from_epsg(4326)
    for row in index.itertuples():
        files = [tile_set / kind / f"{row.id}.tif" for kind in ("image", "height")]
        assert row.sha256 == hashlib.sha256(files[0].read_bytes() + files[1].read_bytes()).hexdigest()
        _, grid = read_raster(files[1])
        _, height_m = read_chip(tile_set, row.id)
        known = height_m[np.isfinite(height_m)]
        assert row.valid_fraction == known.size / 64**2
        assert row.height_mean_m == pytest.approx(known.mean(), rel=1e-6)
        assert row.height_p95_m == pytest.approx(np.percentile(known, 95))
        assert Lattice(crs=UTM, gsd_m=0.5).box_of(grid).row0 == row.row_px
        assert (row.site, row.licence, row.image_source, row.flags) == ("WOOD", "CC0-1.0", "drawn", "")
        assert (row.image_date, row.lidar_date, row.gap_days) == (date(2021, 7, 1), date(2021, 6, 21), 10)
        assert np.isnan([row.shift_x_m, row.shift_y_m, row.shift_score]).all()
        assert row.split in ("train", "val", "test", "buffer")
    plot = index[index["item"] == "small"].to_crs(UTM).geometry.iloc[0]
    assert plot.symmetric_difference(rectangle(401_000, 4_000_085, 401_010, 4_000_100)).area < 0.01  # not the padding


def test_small_plots_are_centred_and_never_stretched(wood):
    folder, _ = wood
    tile_set = build_tile_set(recipe(folder))
    index = read_index(tile_set)
    (plot,) = index[index["item"] == "small"]["id"]
    image, _ = read_chip(tile_set, plot)
    rows, cols = np.nonzero(image.valid)
    assert (rows.min(), rows.max(), cols.min(), cols.max()) == (17, 46, 22, 41)
    assert image.valid.sum() == 30 * 20


def test_black_pixels_are_kept_and_hidden_ones_are_not(tmp_path):
    hidden = np.ones((64, 64), bool)
    hidden[10:20] = False
    image, heights = pair(tmp_path, "a", left=400_000.0, top=4_000_000.0, shape=(64, 64), valid=hidden)
    image[:, 5, 5] = 0
    grid = Grid(crs=UTM, transform=Affine(0.5, 0, 400_000, 0, -0.5, 4_000_000), shape=(64, 64))
    write_raster(tmp_path / "data" / "a_rgb.tif", image, grid=grid, valid=hidden)
    tile_set = build_tile_set(recipe(tmp_path))
    (chip,) = read_index(tile_set)["id"]
    read, height_m = read_chip(tile_set, chip)
    np.testing.assert_array_equal(read.valid, hidden)
    assert read.valid[5, 5]
    assert height_m[5, 5] == heights[5, 5]
    assert np.isnan(height_m[~hidden]).all()


def test_a_rebuild_is_identical_and_another_source_changes_nothing_of_the_others(wood, tmp_path_factory):
    folder, _ = wood
    first = read_index(build_tile_set(recipe(folder)))
    digest = tile_set_hash(folder / "set")
    again = folder / "again"
    assert build_tile_set(folder / "set.toml", again) == again
    assert tile_set_hash(again) == digest
    assert (again / "index.parquet").read_bytes() == (folder / "set" / "index.parquet").read_bytes()
    pair(folder, "third", left=410_000.0, top=4_000_000.0, shape=(64, 64), seed=2)
    more = read_index(build_tile_set(folder / "set.toml", overwrite=True))
    assert len(more) == len(first) + 1
    assert tile_set_hash(folder / "set") != digest
    kept = more[more["item"] != "third"].reset_index(drop=True)
    assert kept.drop(columns="geometry").equals(first.drop(columns="geometry"))


def test_the_hash_follows_the_split(wood):
    folder, _ = wood
    build_tile_set(recipe(folder))
    digest = tile_set_hash(folder / "set")
    build_tile_set(recipe(folder, train=0.0, test=0.8), overwrite=True)
    assert tile_set_hash(folder / "set") != digest


def test_an_existing_folder_is_kept_and_an_unfinished_one_has_no_name(wood, monkeypatch):
    folder, _ = wood
    path = recipe(folder)
    build_tile_set(path)
    digest = tile_set_hash(folder / "set")
    with pytest.raises(OutputError, match="--overwrite"):
        build_tile_set(path)

    def disk_full(*args, **kwargs):
        raise OutputError("disk full")

    before = sorted(p.name for p in folder.iterdir())
    monkeypatch.setattr(chips, "_index", disk_full)
    with pytest.raises(OutputError, match=r"disk full; what is done is kept in .*\.set\.build"):
        build_tile_set(path, overwrite=True)
    assert tile_set_hash(folder / "set") == digest
    with pytest.raises(OutputError, match="disk full"):
        build_tile_set(path, folder / "other")
    hidden = [".other.build", ".set.build"]
    assert sorted(p.name for p in folder.iterdir()) == sorted([*before, *hidden])
    monkeypatch.undo()
    monkeypatch.setattr(chips, "_cut", disk_full)  # what has a record is not cut again
    build_tile_set(path, folder / "other")
    build_tile_set(path, overwrite=True)
    assert tile_set_hash(folder / "set") == tile_set_hash(folder / "other") == digest
    assert sorted(p.name for p in folder.iterdir()) == sorted([*before, "other"])


def test_windows_with_few_heights_give_no_chip(wood):
    folder, _ = wood
    index = read_index(build_tile_set(recipe(folder, least=0.9)))
    assert (index["valid_fraction"] >= 0.9).all()
    assert "small" not in set(index["item"])
    small = PAIR.replace("data/*", "data/small")
    with pytest.raises(RecipeError, match="min_valid_fraction"):
        build_tile_set(recipe(folder, small, least=0.9), folder / "none")


def test_bounds_and_unlabelled_areas(wood):
    folder, _ = wood
    bounds = (
        "bounds_m = [400010.0, 3999930.0, 400080.0, 3999995.0]\nunlabelled_m = [[400030.0, 3999950.0, 400040.0, 3999960.0]]"
    )
    source = PAIR.replace("data/*", "data/large").replace('site = "WOOD"', f'site = "WOOD"\n{bounds}')
    index = read_index(build_tile_set(recipe(folder, source)))
    lattice = Lattice(crs=UTM, gsd_m=0.5)
    inside = lattice.covering((400_010.0, 3_999_930.0, 400_080.0, 3_999_995.0))
    masked = lattice.covering((400_030.0, 3_999_950.0, 400_040.0, 3_999_960.0))
    seen = 0
    for row in index.itertuples():
        image, height_m = read_chip(folder / "set", row.id)
        y, x = np.indices((64, 64)) + np.array([row.row_px, row.col_px])[:, None, None]
        outside = (y < inside.row0) | (y >= inside.row1) | (x < inside.col0) | (x >= inside.col1)
        bridge = (y >= masked.row0) & (y < masked.row1) & (x >= masked.col0) & (x < masked.col1)
        assert not image.valid[outside].any()
        assert np.isnan(height_m[bridge | outside]).all()
        assert image.valid[bridge & ~outside].all()
        seen += int(bridge.sum())
    assert seen


def test_heights_on_another_grid_are_resampled(tmp_path):
    """A 1 m model under a 0.5 m image: a plane stays the same plane."""
    pair(tmp_path, "a", left=400_000.0, top=4_000_000.0, shape=(64, 64))
    rows, cols = np.indices((40, 40), dtype=np.float32)
    plane = (10 + 0.2 * cols + 0.1 * rows).astype(np.float32)
    grid = Grid(crs=UTM, transform=Affine(1, 0, 399_996, 0, -1, 4_000_004), shape=(40, 40))
    write_raster(tmp_path / "data" / "a_chm.tif", plane[None], grid=grid, nodata=np.nan)
    tile_set = build_tile_set(recipe(tmp_path))
    (chip,) = read_index(tile_set)["id"]
    _, height_m = read_chip(tile_set, chip)
    rows, cols = np.indices((64, 64))
    expected = 10 + 0.2 * ((cols + 0.5) / 2 + 4 - 0.5) + 0.1 * ((rows + 0.5) / 2 + 4 - 0.5)
    np.testing.assert_allclose(height_m, expected, atol=1e-3)


@given(st.integers(-5000, 5000), st.integers(1, 400), st.sampled_from([32, 64, 96]), st.integers(1, 96))
def test_windows_cover_an_image_and_depend_on_the_lattice_only(start, size, chip_px, stride_px):
    stride_px = min(stride_px, chip_px)
    starts = chip_starts(start, start + size, chip_px, stride_px)
    covered = set().union(*(range(s, s + chip_px) for s in starts))
    assert covered.issuperset(range(start, start + size))
    assert all(s < start + size and s + chip_px > start for s in starts)
    if size > chip_px:
        assert all(s % stride_px == 0 for s in starts)
        beyond = (starts[0] - stride_px + chip_px <= start, starts[-1] + stride_px >= start + size)
        assert all(beyond)  # no window that touches the image is left out
    else:
        assert len(starts) == 1
        assert abs((start - starts[0]) - (starts[0] + chip_px - start - size)) <= 1


def test_two_images_of_one_place_need_two_sites(wood):
    folder, _ = wood
    pair(folder, "same", left=401_000.0, top=4_000_100.0, shape=(30, 20), seed=3)
    with pytest.raises(RecipeError, match=r"(same and small|small and same) both give chip"):
        build_tile_set(recipe(folder))
    assert not (folder / "set").exists()


@pytest.mark.parametrize(
    ("text", "named"),
    [
        (HEAD.format(least=0.1, crs="colour = 3") + PAIR, "unknown key 'colour'"),
        (HEAD.format(least=0.1, crs="") + PAIR + "halo = 3\n", "unknown key 'source.0.halo'"),
        (HEAD.format(least=0.1, crs="") + PAIR.replace("licence", "license"), "licence"),
        (HEAD.format(least=2, crs="") + PAIR, "min_valid_fraction"),
        (HEAD.format(least=0.1, crs='crs = "EPSG:1"') + PAIR, "EPSG:1"),
        (HEAD.format(least=0.1, crs="").replace("stride_px = 32", "stride_px = 65") + PAIR, "65"),
        (HEAD.format(least=0.1, crs="") + PAIR.replace('"pair"', '"pear"'), "source.0"),
        (HEAD.format(least=0.1, crs="") + PAIR + "bounds_m = [1, 2, 0, 3]\n", "left < right"),
        ("name = ", "no TOML"),
    ],
)
def test_a_wrong_recipe_gets_one_line_that_names_the_key(tmp_path, text, named):
    path = tmp_path / "wrong.toml"
    path.write_text(text)
    with pytest.raises(RecipeError, match=named) as caught:
        load_recipe(path)
    assert "\n" not in str(caught.value)


def test_missing_files_and_variables_are_named(tmp_path, monkeypatch):
    with pytest.raises(RecipeError, match=r"nowhere\.toml does not exist"):
        build_tile_set(tmp_path / "nowhere.toml")
    with pytest.raises(RecipeError, match="matches no file"):
        build_tile_set(recipe(tmp_path))
    monkeypatch.delenv("CANOPY_SAMPLES", raising=False)
    with pytest.raises(RecipeError, match="CANOPY_SAMPLES, which is not set; export"):
        build_tile_set(recipe(tmp_path, PAIR.replace("data/", "${CANOPY_SAMPLES}/")))
    pair(tmp_path, "a", left=400_000.0, top=4_000_000.0, shape=(64, 64))
    (tmp_path / "data" / "a_chm.tif").rename(tmp_path / "data" / "b_chm.tif")
    with pytest.raises(RecipeError, match="'a' has no height file"):
        build_tile_set(recipe(tmp_path))
    with pytest.raises(RecipeError, match="`exclude` names 'c'"):
        build_tile_set(recipe(tmp_path, PAIR.replace("*", "a", 1).replace("*_chm", "b_chm") + 'exclude = ["c"]\n'))
    with pytest.raises(RecipeError, match="canopy tile"):
        read_index(tmp_path)


def test_variables_and_relative_paths(wood, monkeypatch):
    folder, _ = wood
    monkeypatch.setenv("CANOPY_SAMPLES", str(folder))
    text = PAIR.replace("data/", "${CANOPY_SAMPLES}/data/")
    assert len(read_index(build_tile_set(recipe(folder, text)))) > 1
    monkeypatch.chdir("/")
    assert build_tile_set(recipe(folder), folder / "relative").exists()


def test_simulated_scenes_have_places_of_their_own(tmp_path):
    source = """
[[source]]
kind = "simulated"
site = "SIM"
seeds = [3, 104]
size_m = 40.0
licence = "Apache-2.0"
image_source = "simulated"
lidar_source = "simulated"
"""
    index = read_index(build_tile_set(recipe(tmp_path, source, gsd_m=0.6)))
    outlines = index.to_crs(32631).geometry
    three, other = outlines[index["item"] == "seed3"].union_all(), outlines[index["item"] == "seed104"].union_all()
    assert three.distance(other) > 900
    assert np.isfinite(index["height_mean_m"]).all()
    alone = read_index(build_tile_set(recipe(tmp_path, source.replace("3, 104", "104"), gsd_m=0.6), tmp_path / "alone"))
    digests = dict(zip(index["id"], index["sha256"], strict=True))
    assert all(digests[row.id] == row.sha256 for row in alone.itertuples())
    with pytest.raises(RecipeError, match="either size_m"):
        build_tile_set(recipe(tmp_path, source.replace("size_m = 40.0\n", "")), tmp_path / "none")


def test_a_height_model_photographed_anew(tmp_path):
    _, height_m = pair(tmp_path, "a", left=400_000.0, top=4_000_000.0, shape=(64, 64))
    source = """
[[source]]
kind = "simulated"
site = "SIM"
seeds = [1, 2]
chm = "data/a_chm.tif"
licence = "Apache-2.0"
image_source = "simulated"
lidar_source = "drawn"
"""
    tile_set = build_tile_set(recipe(tmp_path, source + 'derived_from = ["PRODUCT"]\n'))
    index = read_index(tile_set)
    assert set(index["derived_from"]) == {"PRODUCT;a_chm"}
    assert [name.split("_")[1] for name in index["id"]] == ["s1", "s2"]
    assert index["block"].nunique() == 1  # the same ground
    images = []
    for name in index["id"]:
        image, heights = read_chip(tile_set, name)
        np.testing.assert_array_equal(heights, height_m)
        np.testing.assert_array_equal(image.valid, np.isfinite(height_m))
        images.append(image.data)
    assert (images[0] != images[1]).any()


def test_what_cannot_be_a_height_is_unknown_and_counted(tmp_path):
    pair(tmp_path, "a", left=400_000.0, top=4_000_000.0, shape=(64, 64))
    path = tmp_path / "data" / "a_chm.tif"
    pixels, grid = read_raster(path)
    height_m = pixels.data.copy()
    height_m[0, 10, 10:13] = [-9.0, 130.0, -1.0]  # too low, too high, noise of the ground
    write_raster(path, height_m, grid=grid, nodata=np.nan)
    tile_set = build_tile_set(recipe(tmp_path, chip_px=64, stride_px=64))
    (row,) = read_index(tile_set).itertuples()
    _, found_m = read_chip(tile_set, row.id)
    assert row.refused_px == 2
    assert np.isnan(found_m[10, 10:12]).all()
    assert found_m[10, 12] == 0.0


def test_heights_from_a_point_cloud(tmp_path):
    """The whole way on a forest whose heights are known: image and cloud in, chips with the right heights out."""
    grid = Lattice(crs=UTM, gsd_m=0.5).grid(Box(-8_000_064, 800_000, -8_000_000, 800_064))
    forest = ForestConfig(pulses_per_m2=20, terrain_relief_m=0.0, terrain_slope=0.0, roads=0, paths=0, ponds=0)
    scene = simulate_scene(grid=grid, seed=1, forest=forest)
    write_scene(scene, tmp_path / "data")
    tile_set = build_tile_set(recipe(tmp_path, LIDAR + "options = { fill_holes_px = 20 }\n"))
    (chip,) = read_index(tile_set)["id"]
    image, height_m = read_chip(tile_set, chip)
    np.testing.assert_array_equal(image.data, scene.image)
    known = np.isfinite(height_m)
    assert known.mean() > 0.95
    error_m = (height_m - scene.height_m)[known]
    assert np.abs(np.median(error_m)) < 0.5
    assert np.corrcoef(height_m[known], scene.height_m[known])[0, 1] > 0.85
    turned = np.rot90(scene.height_m, 2)  # negative control: the wrong way up does not agree
    assert np.corrcoef(height_m[known], turned[known])[0, 1] < 0.5
    with pytest.raises(RecipeError, match="'halo_m'"):
        build_tile_set(recipe(tmp_path, LIDAR + "options = { halo_m = 1 }\n"), tmp_path / "none")


# --- the recipes of the project ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(path.stem for path in RECIPES.glob("*.toml")))
def test_the_recipes_load(name):
    assert load_recipe(RECIPES / f"{name}.toml").name == name


@pytest.mark.slow
def test_neon_plots_on_the_same_ground_share_a_split(samples, tmp_path):
    """IDTReeS plots OSBS_7, 9, 32 and 36 lie on OSBS_029, 006, 003 and 006."""
    tile_set = build_tile_set(RECIPES / "neon.toml", tmp_path / "neon")
    index = read_index(tile_set)
    assert len(index) == 72
    assert set(index["split"]) - {"buffer"} == {"train", "val", "test"}
    rows = {row.item: row for row in index.itertuples()}
    for one, other in (("7", "029"), ("9", "006"), ("32", "003"), ("36", "006")):
        a, b = rows[f"idt_OSBS_{one}"], rows[f"OSBS_{other}"]
        assert a.geometry.intersects(b.geometry)
        assert (a.block, a.split) == (b.block, b.split)
    shapes = {item: row.geometry for item, row in rows.items()}
    assert not shapes["idt_OSBS_7"].intersects(shapes["OSBS_006"])  # negative control


@pytest.mark.slow
def test_neon_plots_are_parted_by_geometry_alone(samples, tmp_path):
    """Without the groups, the buffer gives up one of two overlapping plots whenever a seed parts them."""
    text = (RECIPES / "neon.toml").read_text()
    start = text.index("groups = [")
    path = tmp_path / "neon.toml"
    given_up = 0
    source = text[
        text.index('[[source]]\nkind = "pair"\nsite = "NEON_OSBS"') : text.index(
            '[[source]]\nkind = "pair"\nsite = "NEON_MLBS"'
        )
    ]
    for seed in range(4):
        split = text[:start].replace("seed = 3", f"seed = {seed}").replace("block_m = 250.0", "block_m = 15.0")
        path.write_text(split + "\n" + source)
        rows = {row.item: row.split for row in read_index(build_tile_set(path, overwrite=True)).itertuples()}
        for one, other in (("7", "029"), ("9", "006"), ("32", "003"), ("36", "006")):
            pair_of = {rows[f"idt_OSBS_{one}"], rows[f"OSBS_{other}"]}
            assert len(pair_of - {"buffer"}) <= 1
            given_up += "buffer" in pair_of
    assert given_up


# --- registration and quality in a build ---------------------------------------------------------------------------------


SETTINGS = """
[quality.void_fraction]
flag = 0.3
drop = 0.5
[quality.duplicate_chips]
flag = 0
[quality.constant_heights]
on = false
[quality.whole_metres]
on = false
"""


def with_tables(folder, tables, source=PAIR, **changes):
    path = recipe(folder, source, **changes)
    text = path.read_text()
    path.write_text(text.replace("[split]", f"{tables}\n[split]", 1))
    return path


def test_without_the_tables_nothing_is_measured_or_judged(wood):
    folder, _ = wood
    index = read_index(build_tile_set(recipe(folder)))
    assert set(index["shift_decision"]) == {"kept: not measured"}
    assert not index["shift_applied"].any()
    assert index[["shift_x_m", "shift_y_m", "shift_score"]].isna().all(axis=None)
    assert set(index["quality"]) == {"keep"}
    assert set(index["reasons"]) == {""}


def test_a_dropped_chip_is_in_no_split_and_keeps_its_files(tmp_path):
    _, height_m = pair(tmp_path, "a", left=400_000.0, top=4_000_000.0, shape=(128, 192))
    height_m[:64, :64] = np.nan
    growth_m = np.random.default_rng(1).uniform(1, 9, height_m.shape).astype(np.float32)
    height_m[:26, :64] = growth_m[:26, :64]  # 40 % of the window
    height_m[:64, 128:] = np.nan
    height_m[:40, 128:] = growth_m[:40, 128:]  # 62 %
    grid = Grid(crs=UTM, transform=Affine(0.5, 0, 400_000, 0, -0.5, 4_000_000), shape=height_m.shape)
    write_raster(tmp_path / "data" / "a_chm.tif", height_m[None], grid=grid, nodata=np.nan)
    plain = read_index(build_tile_set(recipe(tmp_path, stride_px=64), tmp_path / "plain"))
    out = build_tile_set(with_tables(tmp_path, SETTINGS, stride_px=64))
    index = read_index(out)
    assert list(index["sha256"]) == list(plain["sha256"])
    rows = {(row.row_px, row.col_px): row for row in index.itertuples()}
    dropped, flagged, kept = (rows[-8_000_000, 800_000 + col] for col in (0, 128, 64))
    assert (dropped.quality, dropped.split) == ("drop", "dropped")
    assert "59% of the photographed pixels have no height (limit 0.5)" in dropped.reasons
    assert "void_fraction" in dropped.flags.split(";")
    assert flagged.quality == "flag"
    assert flagged.split == plain.set_index("id")["split"][flagged.id]
    assert "void_fraction" not in kept.flags
    assert kept.quality != "drop"
    assert kept.split != "dropped"
    read_chip(out, dropped.id)  # to be looked at


def test_the_same_picture_elsewhere_is_a_duplicate(tmp_path):
    from canopy.simulate import reimage

    rng = np.random.default_rng(2)
    smooth = np.abs(np.cumsum(np.cumsum(rng.normal(size=(64, 64)), 0), 1)).astype(np.float32)
    smooth *= 25 / smooth.max()
    image = reimage(smooth, gsd_m=0.5, rng=rng)
    (tmp_path / "data").mkdir()
    for number, name in enumerate(("here", "there", "other")):
        grid = Grid(crs=UTM, transform=Affine(0.5, 0, 400_000 + 1000 * number, 0, -0.5, 4_000_000), shape=(64, 64))
        pixels = image if name != "other" else rng.integers(0, 255, image.shape, np.uint8)
        write_raster(tmp_path / "data" / f"{name}_rgb.tif", pixels, grid=grid)
        write_raster(tmp_path / "data" / f"{name}_chm.tif", smooth[None], grid=grid)
    index = read_index(build_tile_set(with_tables(tmp_path, SETTINGS))).set_index("item")
    assert "duplicate_chips" in index["flags"]["here"].split(";")
    assert "duplicate_chips" in index["flags"]["there"].split(";")
    assert "duplicate_chips" not in index["flags"]["other"].split(";")


@pytest.fixture
def fixed_shift(monkeypatch):
    """Registration that finds one pixel east and two pixels north on every chip, and says what it was asked."""
    asked = []
    shift = Shift(x_m=0.5, y_m=1.0, score_before=0.1, score_after=0.2, contrast=0.5, decision="applied")

    def measure(image, height_m, gsd_m, settings):
        asked.append(height_m.copy())
        return shift

    def robust(shifts, settings):
        assert set(shifts) == {shift}
        return shift

    monkeypatch.setattr(chips, "measure_shift", measure)
    monkeypatch.setattr(chips, "robust_shift", robust)
    return asked


@pytest.mark.parametrize("apply", ["never", "chip", "acquisition"])
def test_heights_are_moved_when_the_recipe_says_so(wood, fixed_shift, apply):
    """By whole pixels, so that the oracle is an index; what moves in over a chip's edge comes from the file beyond it."""
    folder, truth = wood
    source = PAIR.replace("data/*", "data/large")
    out = build_tile_set(with_tables(folder, f'[registration]\napply = "{apply}"', source), workers=1)
    index = read_index(out)
    _, heights = truth["large"]
    moved = np.full_like(heights, np.nan)
    if apply == "never":
        moved = heights
    else:
        moved[:-2, 1:] = heights[2:, :-1]
    for row in index.itertuples():
        _, height_m = read_chip(out, row.id)
        top, left = row.row_px + 8_000_002 + 64, row.col_px - 800_007 + 64
        padded = np.pad(moved, 64, constant_values=np.nan)
        expected = padded[top : top + 64, left : left + 64]
        known = np.isfinite(height_m)
        np.testing.assert_allclose(height_m[known], expected[known], atol=1e-5)
        lost = np.isfinite(expected) & ~known  # beside an unknown height the moved one is unknown too
        assert lost.mean() < 0.1
        assert (row.shift_x_m, row.shift_y_m, row.shift_score) == (0.5, 1.0, 0.2)
        assert row.shift_applied == (apply != "never")
        assert row.shift_decision.startswith("kept: registration only measures" if apply == "never" else "applied")
    # Once a window, also where the acquisition's shift is found first; some windows give no chip after all.
    assert len(index) <= len(fixed_shift) < 1.5 * len(index)


@pytest.mark.slow
@pytest.mark.parametrize("apply", ["chip", "acquisition"])
def test_a_label_that_is_off_is_moved_back(tmp_path, apply):
    """A drawn forest whose heights lie 1.5 m east and 1 m south of the image."""
    grid = Lattice(crs=UTM, gsd_m=0.5).grid(Box(-8_000_256, 800_000, -8_000_000, 800_256))
    scene = simulate_scene(grid=grid, seed=4, forest=ForestConfig())
    (tmp_path / "data").mkdir()
    write_raster(tmp_path / "data" / "a_rgb.tif", scene.image, grid=grid)
    off = Grid(crs=UTM, transform=Affine.translation(1.5, -1.0) @ grid.transform, shape=grid.shape)
    write_raster(tmp_path / "data" / "a_chm.tif", scene.height_m[None], grid=off, nodata=np.nan)
    sizes = {"chip_px": 128, "stride_px": 128}
    table = f'[registration]\napply = "{apply}"\nmin_votes = 2\n[quality]'
    left = read_index(build_tile_set(recipe(tmp_path, **sizes), tmp_path / "left"))
    out = build_tile_set(with_tables(tmp_path, table, **sizes))
    index = read_index(out)
    applied = index[index["shift_applied"]]
    assert len(applied) >= len(index) / 2
    if apply == "acquisition":
        assert len(applied) == len(index)
    assert np.nanmedian(np.abs(applied["shift_x_m"] + 1.5)) < 0.3
    assert np.nanmedian(np.abs(applied["shift_y_m"] - 1.0)) < 0.3

    def error_m(tile_set, row):
        _, height_m = read_chip(tile_set, row.id)
        part = (slice(row.row_px + 8_000_256, row.row_px + 8_000_384), slice(row.col_px - 800_000, row.col_px - 799_872))
        return np.nanmean(np.abs(height_m - scene.height_m[part]))

    assert set(applied["id"]) <= set(left["id"])
    for row in applied.itertuples():
        assert error_m(out, row) < 0.6 * error_m(tmp_path / "left", row)

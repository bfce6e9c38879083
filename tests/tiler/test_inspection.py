"""The inspection page says what index and pixels say, holds everything inside, and is drawn of any set in little memory."""

import base64
import dataclasses
import json
import re
import shutil
import subprocess
import weakref
from datetime import date
from html.parser import HTMLParser
from io import BytesIO
from itertools import pairwise

import geopandas as gpd
import numpy as np
import pandas as pd
import pytest
from affine import Affine
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.image import imread
from pyproj import CRS
from shapely import box

from canopy import page
from canopy.errors import OutputError, RasterError, RecipeError
from canopy.grid import Grid
from canopy.raster import Pixels, create_raster, write_raster
from canopy.tiler import inspection
from canopy.tiler.chips import COLUMNS, read_index
from canopy.tiler.inspection import HeightCounts, choose_chips, inspect_tile_set
from canopy.tiler.quality import QualitySettings

SIDE = 32
BLOCK_M = 200.0
SITES = {"NORTH": (500_000, 5_000_000), "BESIDE": (500_300, 5_000_000), "FAR": (900_000, 5_200_000)}
SPLITS = ("train", "train", "train", "val", "test", "buffer")


def write_chip(folder, name, *, left, top, seed, dtype="uint8", bands=3, valid=None):
    rng = np.random.default_rng(seed)
    grid = Grid(crs=CRS.from_epsg(32610), transform=Affine(1, 0, left, 0, -1, top), shape=(SIDE, SIDE))
    image = rng.integers(0, np.iinfo(dtype).max // 2, (bands, SIDE, SIDE)).astype(dtype)
    height = np.maximum(rng.normal(8, 8, (SIDE, SIDE)), 0).astype(np.float32)
    height[: seed % 7] = np.nan
    with create_raster(folder / "image" / f"{name}.tif", grid=grid, count=bands, dtype=dtype) as writer:
        writer.write(0, image)
        writer.write_valid(np.ones((SIDE, SIDE), bool) if valid is None else valid)
    write_raster(folder / "height" / f"{name}.tif", height[None], grid=grid, nodata=float("nan"))
    return height


def make_set(folder, count=24, *, judged=True, text="Orthophotograph", **image):
    """A tile set of noise, and its heights by id."""
    for name in ("image", "height"):
        (folder / name).mkdir(parents=True)
    rows, heights = [], {}
    for i in range(count):
        site = list(SITES)[i % 3]
        left, top = SITES[site][0] + 40 * (i // 3), SITES[site][1] - 37 * (i % 2)
        name = f"{site}_r{-top}_c{left}"
        heights[name] = write_chip(folder, name, left=left, top=top, seed=i, **image)
        known = heights[name][np.isfinite(heights[name])]
        bad = {7: ("drop", "void_fraction", "62% of the photographed pixels have no height (limit 0.6)")}
        bad |= dict.fromkeys((1, 4, 10, 13), ("flag", "water", "30% of the pixels are like water (limit 0.25)"))
        bad[8] = (
            "flag",
            "striping;water",
            "heights have stripes 7.0 m apart; 26% of the pixels are like water (limit 0.25)",
        )
        quality, flags, reasons = bad.get(i, ("keep", "", "")) if judged else ("keep", "", "")
        rows.append({
            "id": name, "geometry": box(left, top - SIDE, left + SIDE, top), "site": site,
            "block": f"EPSG:32610/{-top // 200}/{left // 200}",
            "split": "dropped" if quality == "drop" else SPLITS[i % len(SPLITS)],
            "image_date": date(2020, 7, 1) if i % 2 else None, "lidar_date": date(2019, 7, 1),
            "gap_days": 366 if i % 2 else None, "gsd_m": 1.0, "valid_fraction": known.size / SIDE**2,
            "height_mean_m": float(known.mean()), "height_p95_m": float(np.percentile(known, 95)),
            "shift_x_m": 0.1 * i if i % 4 else np.nan, "shift_y_m": -0.2 if i % 4 else np.nan, "shift_score": 0.1,
            "flags": flags,
            "image_source": text, "lidar_source": "Airborne LiDAR", "licence": "CC0", "sha256": "0" * 64, "item": f"item{i}",
            "crs": "EPSG:32610", "row_px": -top, "col_px": left, "quality": quality, "reasons": reasons,
            "shift_applied": bool(i % 4 == 1), "shift_decision": "applied" if i % 4 == 1 else "kept: no gain",
            "derived_from": "", "refused_px": None,
        })  # fmt: skip
    index = gpd.GeoDataFrame(rows, geometry="geometry", crs="EPSG:32610").to_crs(4326)
    index["gap_days"] = index["gap_days"].astype("Int32")
    assert set(index.columns) == set(COLUMNS)
    index.sort_values("id").to_parquet(folder / "index.parquet", index=False)
    quality = "[quality]\n" if judged else ""
    (folder / "recipe.toml").write_text(f'name = "set"\nchip_px = {SIDE}\n[split]\nblock_m = {BLOCK_M}\n{quality}')
    return heights


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    folder = tmp_path_factory.mktemp("drawn")
    heights = make_set(folder / "set")
    return folder / "set", heights, inspect_tile_set(folder / "set", folder / "out", sheet_chips=6)


@pytest.fixture(autouse=True)
def coarse(drawn, monkeypatch):
    """Pages other than `drawn` are looked at for their words: coarse pictures do, and take less time."""
    monkeypatch.setattr(page, "DPI", 30)


class Page(HTMLParser):
    """Elements of a page; fails on tags that do not match."""

    VOID = ("meta", "img", "input", "br")

    def __init__(self, html):
        super().__init__()
        self.open, self.tags, self.texts = [], [], []
        self.feed(html)
        assert not self.open, f"{self.open} are never closed"

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open[-1:] == [tag], f"</{tag}> closes {self.open[-1:]}"
        self.open.pop()

    def handle_data(self, data):
        if self.open and self.open[-1] not in ("script", "style"):
            self.texts.append(data)

    @property
    def text(self):
        return " ".join(" ".join(self.texts).split())


def rows_of(html):
    return json.loads(re.search(r'<script id="rows" type="application/json">(.*?)</script>', html, re.DOTALL)[1])


# --- the page ------------------------------------------------------------------------------------------------------------


def test_the_page_holds_everything_and_points_nowhere(drawn):
    html = drawn[2].page.read_text()
    page = Page(html)
    assert all(attrs["src"].startswith("data:image/") for tag, attrs in page.tags if tag == "img")
    assert not [tag for tag, _ in page.tags if tag in ("link", "iframe", "object")]
    assert not re.search(r"https?://|@import|url\(", html)
    ids = [attrs["id"] for _, attrs in page.tags if "id" in attrs]
    assert len(ids) == len(set(ids))
    targets = [attrs["href"] for tag, attrs in page.tags if tag == "a"]
    assert len(targets) >= 8
    assert all(target.removeprefix("#") in ids for target in targets)


def test_the_page_can_be_read_aloud_and_driven_by_keyboard(drawn):
    page = Page(drawn[2].page.read_text())
    assert all(len(attrs["alt"]) > 20 for tag, attrs in page.tags if tag == "img")
    assert ("html", {"lang": "en"}) in page.tags
    levels = [int(tag[1]) for tag, _ in page.tags if re.fullmatch("h[1-6]", tag)]
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(deeper <= level + 1 for level, deeper in pairwise(levels))
    scrolling = [attrs for _, attrs in page.tags if attrs.get("class") == "scroll"]
    assert all(attrs["tabindex"] == "0" and attrs["aria-label"] for attrs in scrolling)
    assert len([1 for tag, _ in page.tags if tag == "button"]) == 12  # a heading each, and "show more"


def test_counts_are_those_of_the_index(drawn):
    tile_set, _, report = drawn
    index = read_index(tile_set)
    assert report.chips == len(index)
    assert sum(sum(splits.values()) for splits in report.by_site_split.values()) == len(index)
    for site, splits in report.by_site_split.items():
        assert splits == index[index["site"] == site]["split"].value_counts().to_dict()
    assert report.by_quality == {"keep": 18, "flag": 5, "drop": 1}
    assert report.by_check == {"void_fraction": 1, "striping": 1, "water": 5}
    html = report.page.read_text()
    assert [row[0] for row in rows_of(html)] == list(index["id"])
    text = Page(html).text
    assert "62% of the photographed pixels have no height (limit 0.6)" in text
    assert "12 of 24 chips lack the date" in text
    assert "No shift could be measured on 6 of 24 chips" in text


def test_charts_maps_and_sheets_are_pictures(drawn):
    report = drawn[2]
    names = {path.name for path in report.pngs}
    assert {"heights.png", "validity.png", "gaps.png", "shifts.png", "best.png", "worst.png"} <= names
    # Neighbouring sites share a map; one hundreds of kilometres away has its own.
    assert {name for name in names if name.startswith("map")} == {"map_BESIDE_NORTH.png", "map_FAR.png"}
    for path in report.pngs:
        picture = imread(path)
        assert min(picture.shape[:2]) > 300
        assert picture[..., :3].std() > 0.02
    assert not list(report.page.parent.glob(".*"))


def test_what_others_wrote_is_text_and_never_markup(tmp_path):
    make_set(tmp_path / "set", 6, text='</script><script>alert("&")</script><b>')
    index = gpd.read_parquet(tmp_path / "set" / "index.parquet")
    index.loc[0, ["quality", "flags", "reasons"]] = ["flag", "<i>odd</i>", "</script><script>alert(1)</script>"]
    index.to_parquet(tmp_path / "set" / "index.parquet", index=False)
    html = inspect_tile_set(tmp_path / "set").page.read_text()
    assert "alert(1)</script>" not in html
    assert "<script>alert" not in html
    assert html.count("<script") == html.count("</script>") == 2
    assert rows_of(html)[0][4] == "<i>odd</i>"
    assert "A check that this version does not know." in Page(html).text


def test_a_set_from_before_quality_and_registration(tmp_path):
    make_set(tmp_path / "set", 9, judged=False)
    index = gpd.read_parquet(tmp_path / "set" / "index.parquet")
    index[["shift_x_m", "shift_y_m", "shift_score"]] = np.nan
    index["image_date"], index["gap_days"] = None, pd.array([None] * 9, dtype="Int32")
    index = index.drop(columns=["quality", "reasons", "shift_applied", "shift_decision"])
    index.to_parquet(tmp_path / "set" / "index.parquet", index=False)
    (tmp_path / "set" / "recipe.toml").unlink()
    report = inspect_tile_set(tmp_path / "set", sheet_chips=4)
    assert report.by_quality == report.by_check == {}
    said = " ".join(report.notes)
    for words in ("never judged", "--judge", "dates of both", "without registration", "recipe.toml"):
        assert words in said
    text = Page(report.page.read_text()).text
    assert "Chips with the fewest known heights" in text
    assert "keep" not in text.split("All chips")[-1]
    assert "gaps.png" not in {path.name for path in report.pngs}


def test_judging_for_the_page_leaves_the_index_alone(tmp_path):
    make_set(tmp_path / "set", 9, judged=False)
    before = (tmp_path / "set" / "index.parquet").read_bytes()
    settings = QualitySettings.model_validate({"void_fraction": {"flag": 0.0, "drop": 0.1}})
    report = inspect_tile_set(tmp_path / "set", settings=settings)
    assert (tmp_path / "set" / "index.parquet").read_bytes() == before
    assert report.by_check["void_fraction"] == 7  # chips 0 and 7 have no void
    assert report.by_quality["drop"] == 3  # 4, 5 and 6 of 32 rows
    assert any("judged for this page" in note for note in report.notes)


@pytest.mark.parametrize(("dtype", "bands"), [("uint16", 4), ("uint8", 1), ("uint16", 2)])
def test_any_bands_are_drawn(tmp_path, dtype, bands):
    make_set(tmp_path / "set", 1, dtype=dtype, bands=bands)
    card = inspection._card(tmp_path / "set", read_index(tmp_path / "set").iloc[0], 30.0, judged=True)
    assert card.strip.shape[2] == 3
    assert card.pictures[0].std() > 20
    assert imread(BytesIO(base64.b64decode(card.data.split(",")[1])), format="jpeg").shape == card.strip.shape


def test_padding_is_cut_off_and_unknown_heights_are_grey():
    valid = np.zeros((64, 64), bool)
    valid[10:30, 20:60] = True
    image = Pixels(data=np.where(valid, np.uint8(90), np.uint8(0))[None].repeat(3, 0), valid=valid)
    height = np.where(valid, 20, np.nan).astype(np.float32)
    height[10:15] = np.nan
    photograph, outlined, heights = inspection._pictures(image, height, 40.0)
    assert photograph.shape[0] * 2 == photograph.shape[1]
    assert (photograph == 90).all()
    quarter = photograph.shape[0] // 4
    assert (heights[:quarter] == 216).all()
    assert len(np.unique(heights[quarter:].reshape(-1, 3), axis=0)) == 1
    assert (outlined[:quarter] == 90).all()
    assert (outlined[quarter:] != 90).any()


# --- heights -------------------------------------------------------------------------------------------------------------


@given(
    st.lists(st.tuples(st.sampled_from(["train", "val"]), st.lists(st.floats(-5, 90, width=32), max_size=20)), max_size=8)
)
def test_height_counts_add_up_to_one_histogram(chips):
    """Chip by chip, in halves, and all at once give the same."""
    parts = [HeightCounts.of(split, np.array([*heights, np.nan], np.float32)) for split, heights in chips]
    left = sum(parts, HeightCounts())
    right = sum(parts[::-1][: len(parts) // 2], HeightCounts()) + sum(parts[::-1][len(parts) // 2 :], HeightCounts())
    for split in {split for split, _ in chips}:
        everything = np.array([h for name, heights in chips if name == split for h in heights], np.float32)
        metres, shares = left.shares(split)
        assert np.array_equal(shares, right.shares(split)[1])
        if everything.size:
            expected, _ = np.histogram(everything, np.append(metres, metres[-1] + 1))
            assert shares == pytest.approx(expected / everything.size)
    heights = np.array([h for _, part in chips for h in part], np.float32)
    if heights.size:
        quantile = left.quantile_m(0.5)
        assert (heights < quantile).mean() >= 0.5 > (heights < quantile - 1).mean()


# --- choosing ------------------------------------------------------------------------------------------------------------


def test_the_worst_show_every_kind_of_finding_and_the_best_every_site(drawn):
    index = read_index(drawn[0])
    best, worst = choose_chips(index, 3, judged=True)
    assert set(worst["flags"]) == {"void_fraction", "striping;water", "water"}
    assert worst["quality"].iloc[0] == "drop"
    assert set(best["site"]) == set(SITES)
    best, worst = choose_chips(index, 100, judged=True)
    assert set(best["quality"]) == {"keep"}
    assert len(best) + len(worst) == len(index)
    best, worst = choose_chips(index, 6, judged=False)
    assert best["valid_fraction"].min() >= worst["valid_fraction"].max()
    assert not set(best["id"]) & set(worst["id"])
    best, worst = choose_chips(index.head(1), 6, judged=False)
    assert (len(best), len(worst)) == (1, 0)


# --- maps ----------------------------------------------------------------------------------------------------------------


def test_blocks_hold_their_chips(drawn):
    index = read_index(drawn[0]).to_crs(32610)
    squares = gpd.GeoSeries([box(*square.min(0), *square.max(0)) for square in inspection._block_squares(index, BLOCK_M)])
    corners = gpd.points_from_xy(index["col_px"] + 0.5, -index["row_px"] - 0.5)
    assert all(squares.contains(corner).sum() == 1 for corner in corners)
    assert not inspection._block_squares(index, None)


def test_maps_beyond_the_limit_are_told(drawn, tmp_path, monkeypatch):
    monkeypatch.setattr(inspection, "MAP_PANELS", 1)
    report = inspect_tile_set(drawn[0], tmp_path / "out", sheet_chips=1)
    assert sum(path.name.startswith("map") for path in report.pngs) == 1
    assert any("1 with 8 chips are not drawn" in note for note in report.notes)


# --- scale and bad input -------------------------------------------------------------------------------------------------


def test_pixels_of_few_chips_are_in_memory_at_once(tmp_path, monkeypatch):
    make_set(tmp_path / "set", 60)
    alive, most, read = weakref.WeakSet(), 0, 0

    class Held:
        """A mark on a chip's heights that goes when they go."""

    class Heights(np.ndarray):
        pass

    def counting(tile_set, chip, original=inspection.read_chip):
        nonlocal most, read
        image, height_m = original(tile_set, chip)
        height_m = height_m.view(Heights)
        height_m.mark = Held()
        alive.add(height_m.mark)
        most, read = max(most, len(alive)), read + 1
        return image, height_m

    monkeypatch.setattr(inspection, "read_chip", counting)
    seen = []
    inspect_tile_set(
        tmp_path / "set", settings=QualitySettings(), sheet_chips=4, progress=lambda done, total: seen.append((done, total))
    )
    assert most <= 3
    assert 60 < read <= 60 + 4 + 4
    assert seen[-1] == (60, 60)


def test_bad_sets_and_folders(tmp_path):
    make_set(tmp_path / "set", 3)
    with pytest.raises(RecipeError, match="no tile set"):
        inspect_tile_set(tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="--out"):
        inspect_tile_set(tmp_path / "set", tmp_path / "file")
    gpd.read_parquet(tmp_path / "set" / "index.parquet").head(0).to_parquet(tmp_path / "empty.parquet")
    (tmp_path / "none").mkdir()
    shutil.move(tmp_path / "empty.parquet", tmp_path / "none" / "index.parquet")
    with pytest.raises(RecipeError, match="no chips"):
        inspect_tile_set(tmp_path / "none")
    next((tmp_path / "set" / "height").iterdir()).unlink()
    with pytest.raises(RasterError, match="does not exist"):
        inspect_tile_set(tmp_path / "set", tmp_path / "out")
    assert not (tmp_path / "out").exists()


# --- in a browser --------------------------------------------------------------------------------------------------------


def test_the_table_sorts_and_filters_in_a_browser(drawn, tmp_path):
    browser = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if browser is None:
        pytest.skip("no Chromium on this machine")
    drive = """<script>{
      const heads = [...document.querySelectorAll("#table th button")], said = {};
      const ids = () => [...document.querySelectorAll("#table tbody th")].map(cell => cell.textContent);
      const gaps = () => [...document.querySelectorAll("#table tbody tr")].map(row => row.children[8].textContent);
      const control = id => document.getElementById(id);
      const type = (id, value) => { control(id).value = value; control(id).dispatchEvent(new Event("input")); };
      said.start = ids(); heads[6].click(); said.mean_down = ids(); heads[6].click(); said.mean_up = ids();
      said.sorted = heads[6].parentElement.getAttribute("aria-sort"); heads[8].click(); said.gap = gaps();
      type("quality", "flag"); said.flag = ids(); type("search", "striping far"); said.search = ids();
      said.shown = control("shown").textContent; type("search", "<b>"); said.none = ids();
      document.body.textContent = JSON.stringify(said);
    }</script></body>"""
    html = drawn[2].page.read_text()
    (tmp_path / "driven.html").write_text(html.replace("</body>", drive))
    done = subprocess.run(
        [browser, "--headless=new", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}",
         "--dump-dom", (tmp_path / "driven.html").as_uri()],
        capture_output=True, text=True, check=True, timeout=60,
    )  # fmt: skip
    said = json.loads(re.search(r"<body>(.*)</body>", done.stdout, re.DOTALL)[1].replace("&lt;", "<").replace("&amp;", "&"))
    index = read_index(drawn[0])
    by_mean = index.assign(mean=index["height_mean_m"].round(2)).sort_values(["mean", "id"])
    assert said["start"] == sorted(index["id"])
    assert said["mean_up"] == list(by_mean["id"])
    assert said["mean_down"] == list(by_mean.sort_values("mean", ascending=False, kind="stable")["id"])
    assert said["sorted"] == "ascending"
    assert said["gap"] == ["366"] * 12 + ["–"] * 12  # unknown last
    assert set(said["flag"]) == set(index[index["quality"] == "flag"]["id"])
    assert said["search"] == list(index[index["flags"] == "striping;water"]["id"])
    assert said["shown"] == "1 of 1 shown"
    assert said["none"] == []


def test_reports_are_values(drawn):
    with pytest.raises(dataclasses.FrozenInstanceError):
        drawn[2].chips = 3
    assert imread(BytesIO(drawn[2].pngs[0].read_bytes())).ndim == 3

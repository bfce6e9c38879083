"""STAC imagery as a user's run reads it: a real API or static catalogue, a real file server, and what goes wrong there."""

import hashlib
import json
from datetime import date
from pathlib import Path

import numpy as np
import pytest
from pyproj import CRS, Transformer

from canopy.errors import CanopyError, ImageryError, SourceError
from canopy.grid import Box, Lattice
from canopy.raster import read_raster, write_raster
from canopy.tiler.area import area_of_bbox
from canopy.tiler.imagery import NO_DATE, WARP_TILE_PX, Imagery, open_imagery
from canopy.tiler.stac import Manifest, Patience, StacSource, load_source, open_stac, search, search_once, stage
from tests.servers import serve_stac

UTM10 = Lattice(crs=CRS.from_epsg(32610), gsd_m=10.0)
UTM11 = Lattice(crs=CRS.from_epsg(32611), gsd_m=10.0)
UTM_HALF = Lattice(crs=UTM10.crs, gsd_m=0.5)
HOME = Box(-480_000, 50_000, -480_000 + 200, 50_000 + 240)
"""200 x 240 px near longitude -123, latitude 43."""

QUICK = Patience(attempts=3, first_pause_s=0.02, connect_s=1, silence_s=1)
"""Services on loopback either answer at once or not at all."""

RGB = tuple({"name": name, "asset": "image", "index": i} for i, name in enumerate(("red", "green", "blue"), start=1))
EACH = tuple({"name": name, "asset": asset} for name, asset in (("red", "B04"), ("green", "B03"), ("blue", "B02")))


def source(endpoint, **changes):
    """One asset of three bytes a pixel, no clouds, no signatures."""
    table = {
        "name": "test", "title": "test", "kind": "stac-api", "endpoint": endpoint, "collection": "scenes",
        "licence": "CC0-1.0", "attribution": "nobody", "gsd_m": 10.0, "dtype": "uint8", "value_range": (0, 255),
        "nodata": 0, "band": RGB,
    }  # fmt: skip
    return StacSource.model_validate(table | changes)


def outline(grid):
    """The corners of a grid in longitude and latitude, as GeoJSON."""
    to_degrees = Transformer.from_crs(grid.crs, "EPSG:4326", always_xy=True)
    rows, cols = grid.shape
    ring = [to_degrees.transform(*grid.xy(c, r)) for c, r in ((0, 0), (cols, 0), (cols, rows), (0, rows), (0, 0))]
    return {"type": "Polygon", "coordinates": [[list(point) for point in ring]]}


def area_of(*boxes, lattice=UTM10, shrink_deg=0.0):
    """The rectangle around boxes, as a user would give it."""
    points = np.array([p for box in boxes for p in outline(lattice.grid(box))["coordinates"][0]])
    (west, south), (east, north) = points.min(axis=0) + shrink_deg, points.max(axis=0) - shrink_deg
    return area_of_bbox((float(west), float(south), float(east), float(north)))


def truth(box, bands=3, *, dtype="uint8", seed=3):
    """(band, row, col) of one large texture without 0: the same pixel of the lattice has the same value in every scene."""
    rng = np.random.default_rng(seed)
    whole = Box(HOME.row0 - 100, HOME.col0 - 100, HOME.row1 + 100, HOME.col1 + 100)
    high = 256 if dtype == "uint8" else 9000
    return rng.integers(1, high, (bands, *whole.shape)).astype(dtype)[(slice(None), *box.slices_in(whole))]


COLLECTION = {
    "type": "Collection", "id": "scenes", "stac_version": "1.0.0", "description": "scenes", "license": "CC0-1.0",
    "links": [],
    "extent": {"spatial": {"bbox": [[-180, -90, 180, 90]]}, "temporal": {"interval": [[None, None]]}},
}  # fmt: skip


class Catalogue:
    """Scenes on a file server with their items."""

    def __init__(self, server, shared_api):
        self.server, self.shared_api = server, shared_api
        self.items = []

    def file(self, name, data, grid, **options):
        path = self.server.folder / f"{name}.tif"
        write_raster(path, data, grid=grid, **options)
        return path

    def scene(
        self,
        name,
        box,
        data=None,
        *,
        lattice=UTM10,
        taken="2021-07-01",
        cloud=None,
        projection=True,
        assets=None,
        **properties,
    ):
        """A scene whose assets are single files with all bands, or one file a band where `assets` names them."""
        grid = lattice.grid(box)
        data = truth(box) if data is None else data
        files = {}
        if assets is None:
            files["image"] = (self.file(name, data, grid), grid)
        else:
            for i, asset in enumerate(assets):
                files[asset] = (self.file(f"{name}_{asset}", data[i : i + 1], grid), grid)
        return self.item(name, files, grid, taken=taken, cloud=cloud, projection=projection, **properties)

    def item(self, name, files, grid, *, taken="2021-07-01", cloud=None, projection=True, **properties):
        assets = {}
        for asset, (path, own) in files.items():
            assets[asset] = {"href": self.server.href(path), "type": "image/tiff; application=geotiff", "roles": ["data"]}
            if projection:
                assets[asset] |= {"proj:shape": list(own.shape), "proj:transform": list(own.transform)[:6]}
        shape = outline(grid)
        points = np.array(shape["coordinates"][0])
        item = {
            "type": "Feature", "stac_version": "1.0.0", "id": name, "collection": "scenes", "geometry": shape,
            "bbox": [*points.min(axis=0), *points.max(axis=0)], "links": [], "assets": assets,
            "stac_extensions": ["https://stac-extensions.github.io/projection/v2.0.0/schema.json"] if projection else [],
            "properties": {"datetime": f"{taken}T18:30:00Z"} | properties,
        }  # fmt: skip
        if projection:
            item["properties"]["proj:code"] = f"EPSG:{grid.crs.to_epsg()}"
        if cloud is not None:
            item["properties"]["eo:cloud_cover"] = cloud
        self.items.append(item)
        return item

    def mask(self, item, box, classes, *, lattice):
        """Adds a scene classification of 20 m to an item."""
        grid = lattice.grid(box)
        path = self.file(f"{item['id']}_SCL", classes[None].astype("uint8"), grid)
        item["assets"]["SCL"] = {
            "href": self.server.href(path), "type": "image/tiff", "roles": ["data"],
            "proj:shape": list(grid.shape), "proj:transform": list(grid.transform)[:6],
        }  # fmt: skip

    def api(self):
        self.shared_api.items, self.shared_api.hang_s, self.shared_api.always = self.items, 0.0, None
        self.shared_api.faults.clear()
        self.shared_api.searches.clear()
        return self.shared_api


@pytest.fixture(autouse=True)
def _small_tiles(monkeypatch):
    """So that every read of these small scenes crosses borders of tiles."""
    monkeypatch.setattr("canopy.tiler.stac.TILE_PX", 160)


@pytest.fixture(scope="module")
def shared_api():
    """One STAC API for the tests of this file; each gives it its own items."""
    server = serve_stac([COLLECTION], [])
    yield server
    server.stop()


@pytest.fixture
def catalogue(file_server, shared_api):
    return Catalogue(file_server, shared_api)


def found(catalogue, area=None, *, changes=None, **request):
    """The manifest of a search of everything over HOME."""
    described = source(catalogue.api().url, **(changes or {}))
    return search(described, area_of(HOME) if area is None else area, patience=QUICK, **request)


def whole(manifest, box):
    """The pixels of a box."""
    with open_stac(manifest, UTM10, patience=QUICK) as image:
        return image.read(box)


def days_of(text):
    return (date.fromisoformat(text) - date(1970, 1, 1)).days


WEST = Box(HOME.row0, HOME.col0, HOME.row1, HOME.col0 + 150)
EAST = Box(HOME.row0, HOME.col0 + 100, HOME.row1, HOME.col1)


# --- mosaics -------------------------------------------------------------------------------------------------------------


def test_a_mosaic_of_overlapping_scenes_is_the_ground_itself(catalogue):
    """Four scenes with overlaps, cut from one picture: every pixel is there once, unchanged, also at the scenes' borders."""
    for row in (0, 1):
        for col in (0, 1):
            box = Box(HOME.row0 + 90 * row, HOME.col0 + 110 * col, HOME.row0 + 90 * row + 110, HOME.col0 + 110 * col + 130)
            catalogue.scene(f"s{row}{col}", box, taken=f"2021-0{1 + 2 * row + col}-05")
    manifest = found(catalogue)
    assert [item.id for item in manifest.items] == ["s11", "s10", "s01", "s00"], "newest first"
    with open_stac(manifest, UTM10, patience=QUICK) as image:
        checked: Imagery = image
        assert checked.box == HOME
        assert checked.resampled == "none"
        assert checked.bands == ("red", "green", "blue")
        assert checked.dtype == "uint8"
        pixels, days = image.read(HOME), image.days(HOME)
    assert pixels.valid.all()
    np.testing.assert_array_equal(pixels.data, truth(HOME))
    np.testing.assert_array_equal(days[[0, 105, 0, 105], [0, 0, 125, 125]], [days_of(f"2021-0{m}-05") for m in (1, 3, 2, 4)])


def test_the_same_pixels_for_every_box(catalogue):
    shifted = Lattice(crs=UTM10.crs, gsd_m=9.3)
    catalogue.scene("west", WEST)
    catalogue.scene("east", EAST, taken="2021-08-01")
    manifest = found(catalogue)
    rng = np.random.default_rng(5)
    with open_stac(manifest, shifted, patience=QUICK) as image:
        assert image.resampled == "bilinear"
        whole, days = image.read(image.box), image.days(image.box)
        box = image.box
    for _ in range(5):
        row0, col0 = rng.integers(box.row0 - 20, box.row1 - 1), rng.integers(box.col0 - 20, box.col1 - 1)
        part = Box(int(row0), int(col0), int(row0 + rng.integers(1, 150)), int(col0 + rng.integers(1, 150)))
        with open_stac(manifest, shifted, patience=QUICK) as image:
            pixels, dates = image.read(part), image.days(part)
        inside = part.intersect(box)
        assert inside is not None
        here, there = inside.slices_in(part), inside.slices_in(box)
        np.testing.assert_array_equal(pixels.valid[here], whole.valid[there])
        np.testing.assert_array_equal(pixels.data[(slice(None), *here)], whole.data[(slice(None), *there)])
        np.testing.assert_array_equal(dates[here], days[there])
        assert pixels.valid.sum() == whole.valid[there].sum(), "something valid beyond the imagery"


def test_an_item_is_what_its_file_is_as_local_imagery(catalogue, monkeypatch):
    """Bit for bit, nodata included, on a lattice in another zone."""
    # A rounding at a file's very edge may fall the other way from another tile's corner.
    monkeypatch.setattr("canopy.tiler.stac.TILE_PX", WARP_TILE_PX)
    data = truth(HOME)
    data[:, 20:60, 30:90] = 0
    data[0, 100:140, 100:140] = 0  # black in one band alone is a shadow
    item = catalogue.scene("a", HOME, data)
    path = catalogue.server.folder / "local.tif"
    write_raster(path, data, grid=UTM10.grid(HOME), nodata=0)
    with open_stac(found(catalogue), UTM11, patience=QUICK) as image, open_imagery(path, UTM11) as local:
        assert image.resampled == local.resampled == "bilinear"
        box = image.box
        ours, theirs = image.read(box), local.read(box)
    assert item["id"] == "a"
    assert 0.5 < ours.valid.mean() < 0.99
    np.testing.assert_array_equal(ours.valid, theirs.valid)
    np.testing.assert_array_equal(ours.data[:, ours.valid], theirs.data[:, theirs.valid])


def smooth(lattice, box):
    """(3, row, col) of a smooth function of the place on Earth, so that it is the same in every CRS."""
    grid = lattice.grid(box)
    cols, rows = np.meshgrid(np.arange(box.shape[1]) + 0.5, np.arange(box.shape[0]) + 0.5)
    x, y = Transformer.from_crs(lattice.crs, UTM10.crs, always_xy=True).transform(*grid.xy(cols, rows))
    bands = [120 + 100 * np.sin(x / 400), 120 + 100 * np.cos(y / 500), 120 + 60 * np.sin((x + y) / 700)]
    return np.rint(np.stack(bands)).astype("uint8")


def test_scenes_of_two_utm_zones_meet_without_a_gap(catalogue):
    """Around longitude -120, the border of zones 10 and 11; one scene lies in each."""
    x, y = Transformer.from_crs("EPSG:4326", UTM10.crs, always_xy=True).transform(-120.0, 43.35)
    row, col = int(-y // 10), int(x // 10)
    west = Box(row, col - 200, row + 200, col + 20)
    x, y = Transformer.from_crs("EPSG:4326", UTM11.crs, always_xy=True).transform(-120.0, 43.35)
    row11, col11 = int(-y // 10), int(x // 10)
    east = Box(row11 - 60, col11 - 20, row11 + 260, col11 + 200)
    catalogue.scene("zone10", west, smooth(UTM10, west), taken="2021-07-02")
    catalogue.scene("zone11", east, smooth(UTM11, east), lattice=UTM11)
    middle = Box(row + 40, col - 100, row + 160, col + 100)
    area = area_of(middle)
    with pytest.raises(CanopyError, match=r"EPSG:32610.*EPSG:32611.*--crs"):
        area.utm_crs()
    manifest = found(catalogue, area)
    with open_stac(manifest, UTM10, patience=QUICK) as image:
        assert image.resampled == "bilinear"
        pixels, days = image.read(middle), image.days(middle)
    assert pixels.valid.all()
    assert set(np.unique(days)) == {days_of("2021-07-01"), days_of("2021-07-02")}
    off = np.abs(pixels.data.astype(int) - smooth(UTM10, middle).astype(int))
    assert off.max() <= 3, "the two zones do not lie on one another"
    assert off[:, days == days_of("2021-07-02")].max() == 0, "what lies on the lattice was resampled"


@pytest.mark.parametrize(
    ("prefer", "options", "order"),
    [
        ("newest", {}, ["c", "b", "d", "a"]),
        ("least-cloud", {}, ["d", "a", "b", "c"]),
        ("closest", {"date": "2021-05-20"}, ["b", "d", "c", "a"]),
    ],
)
def test_preferences(catalogue, prefer, options, order):
    """b and d are of one day: the id decides, not the order in which the API names them."""
    days = {"a": "2021-01-01", "d": "2021-06-01", "c": "2021-07-01", "b": "2021-06-01"}
    clouds = {"a": 5.0, "b": 10.0, "c": 30.0, "d": 0.0}
    for value, name in enumerate(days, start=1):
        catalogue.scene(name, HOME, np.full((3, *HOME.shape), value, "uint8"), taken=days[name], cloud=clouds[name])
    manifest = found(catalogue, changes={"cloud": {"property": "eo:cloud_cover"}}, prefer=prefer, **options)
    assert [item.id for item in manifest.items] == order
    with open_stac(manifest, UTM10, patience=QUICK) as image:
        assert np.unique(image.read(HOME).data) == 1 + list(days).index(order[0])
        assert np.unique(image.days(HOME)) == days_of(days[order[0]])


def test_dates_and_clouds_filter(catalogue):
    for month, cloud in ((3, 10), (5, 20), (7, 60), (9, 5)):
        catalogue.scene(f"m{month}", HOME, taken=f"2021-0{month}-15", cloud=cloud)
    catalogue.scene("unknown", HOME, taken="2021-06-15")
    server = catalogue.api()
    described = source(server.url, cloud={"property": "eo:cloud_cover", "max_percent": 50})

    def ids(**request):
        return [item.id for item in search(described, area_of(HOME), patience=QUICK, **request).items]

    assert ids() == ["m9", "m5", "m3"], "the source's own limit, and what does not say how cloudy it is stays out"
    assert ids(max_cloud_percent=15) == ["m9", "m3"]
    assert ids(max_cloud_percent=100, start="2021-05-15", end=date(2021, 7, 15)) == ["m7", "m5"], "both days belong to it"
    assert ids(exclude=["m9"]) == ["m5", "m3"]
    assert any("query" in asked for asked in server.searches), "the API was not asked to filter"
    with pytest.raises(SourceError, match=r"no item .* from 2022-01-01 .* 50 % cloud; widen the dates or allow more cloud"):
        ids(start="2022-01-01")
    with pytest.raises(SourceError, match="start 2021-02-01 is after end 2021-01-01"):
        ids(start="2021-02-01", end="2021-01-01")
    with pytest.raises(SourceError, match="'July' is not a day"):
        ids(start="July")
    with pytest.raises(SourceError, match="closest"):
        ids(prefer="closest")


def test_the_area_changes_no_pixel(catalogue):
    """Of two areas each search finds what matters for its own; where they overlap the images are one."""
    lattice = Lattice(crs=UTM10.crs, gsd_m=9.3)
    for name, box in (("west", WEST), ("east", EAST)):
        catalogue.scene(name, box, taken="2021-08-01" if name == "east" else "2021-07-01")
    areas = [area_of(WEST, shrink_deg=2e-3), area_of(EAST, shrink_deg=2e-3)]
    boxes = [lattice.covering(area.polygon_in(lattice.crs).bounds) for area in areas]
    both = boxes[0].intersect(boxes[1])
    assert both is not None
    images = []
    for area in areas:
        with open_stac(found(catalogue, area), lattice, patience=QUICK) as image:
            images.append((image.read(both), image.days(both)))
    assert images[0][0].valid.all()
    np.testing.assert_array_equal(images[0][0].data, images[1][0].data)
    np.testing.assert_array_equal(images[0][1], images[1][1])


def test_many_pages(catalogue, monkeypatch):
    monkeypatch.setattr("canopy.tiler.catalogue.PAGE_ITEMS", 3)
    item = catalogue.scene("s0", HOME)
    catalogue.items = [json.loads(json.dumps(item)) | {"id": f"s{i}"} for i in range(10)]
    server = catalogue.api()
    assert len(search(source(server.url), area_of(HOME), patience=QUICK).items) == 10
    assert len(server.searches) == 4


def test_the_bytes_of_a_file_with_many_bands_are_fetched_once(catalogue, monkeypatch):
    monkeypatch.setattr("canopy.tiler.stac.TILE_PX", 1024)
    box = Box(HOME.row0, HOME.col0, HOME.row0 + 1030, HOME.col0 + 1100)  # three by three blocks
    data = np.random.default_rng(1).integers(1, 256, (3, *box.shape)).astype("uint8")
    catalogue.scene("a", box, data)
    manifest = found(catalogue, area_of(box))
    with open_stac(manifest, UTM10, patience=QUICK) as image:
        np.testing.assert_array_equal(image.read(box).data, data)
    size = (catalogue.server.folder / "a.tif").stat().st_size
    assert size <= catalogue.server.sent_bytes["/a.tif"] <= 1.2 * size


def test_what_a_file_masks_is_not_there(catalogue):
    """Masked pixels of an item are another item's, whatever value lies under the mask; without another they are invalid."""
    here = Box(HOME.row0, HOME.col0, HOME.row0 + 60, HOME.col0 + 80)
    valid = np.ones(here.shape, bool)
    valid[10:30, 20:50] = False
    grid = UTM10.grid(here)
    covered = catalogue.file("covered", np.where(valid, truth(here), 77).astype("uint8"), grid, valid=valid)
    catalogue.item("covered", {"image": (covered, grid)}, grid, taken="2021-08-01")
    alone = whole(found(catalogue, area_of(here)), here)
    np.testing.assert_array_equal(alone.valid, valid)
    np.testing.assert_array_equal(alone.data[:, valid], truth(here)[:, valid])
    catalogue.scene("below", here, taken="2021-07-01")
    both = whole(found(catalogue, area_of(here)), here)
    assert both.valid.all()
    np.testing.assert_array_equal(both.data, truth(here))


def test_an_asset_for_each_band(catalogue):
    catalogue.scene("a", HOME, assets=("B04", "B03", "B02"))
    with open_stac(found(catalogue, changes={"band": EACH}), UTM10, ["blue", 1], patience=QUICK) as image:
        assert image.bands == ("blue", "red")
        np.testing.assert_array_equal(image.read(HOME).data, truth(HOME)[[2, 0]])


def test_a_period_of_several_days_has_no_day(catalogue):
    item = catalogue.scene("a", HOME)
    item["properties"] |= {
        "datetime": None,
        "start_datetime": "2021-01-01T00:00:00Z",
        "end_datetime": "2021-12-31T00:00:00Z",
    }
    with open_stac(found(catalogue), UTM10, patience=QUICK) as image:
        assert np.unique(image.days(HOME)) == NO_DATE
        assert image.read(HOME).valid.all()


# --- clouds and offsets --------------------------------------------------------------------------------------------------

SCL = {"property": "eo:cloud_cover", "mask_asset": "SCL", "clear_classes": (4, 5)}
COARSE = Lattice(crs=UTM10.crs, gsd_m=20.0)
COARSE_HOME = Box(HOME.row0 // 2, HOME.col0 // 2, HOME.row1 // 2, HOME.col1 // 2)


def test_clouds_give_way_to_the_next_scene(catalogue):
    """The newer scene has a cloud in its west, the older one in its north: where both have one there is nothing."""
    rows, cols = COARSE_HOME.shape
    newer = catalogue.scene("newer", HOME, np.full((3, *HOME.shape), 7, "uint8"), taken="2021-08-01", cloud=30)
    older = catalogue.scene("older", HOME, np.full((3, *HOME.shape), 9, "uint8"), taken="2021-07-01", cloud=30)
    west, north = np.full((rows, cols), 4), np.full((rows, cols), 5)
    west[:, : cols // 3], north[: rows // 4] = 9, 3
    catalogue.mask(newer, COARSE_HOME, west, lattice=COARSE)
    catalogue.mask(older, COARSE_HOME, north, lattice=COARSE)
    with open_stac(found(catalogue, changes={"cloud": SCL}), UTM10, patience=QUICK) as image:
        pixels, days = image.read(HOME), image.days(HOME)
    cloudy_west, cloudy_north = (np.repeat(np.repeat(m, 2, 0), 2, 1) for m in (west == 9, north == 3))
    wanted = np.where(~cloudy_west, 7, np.where(~cloudy_north, 9, 0))
    np.testing.assert_array_equal(pixels.valid, wanted > 0)
    np.testing.assert_array_equal(pixels.data[0], wanted)
    assert set(np.unique(days[pixels.valid])) == {days_of("2021-07-01"), days_of("2021-08-01")}
    np.testing.assert_array_equal(days == days_of("2021-08-01"), wanted == 7)
    assert (days[~pixels.valid] == NO_DATE).all()


def test_a_cloud_has_no_part_in_its_neighbours(catalogue):
    """Resampled onto another lattice, what is left of a grey scene with a white cloud is grey up to the cloud's rim."""
    cloud = np.zeros(COARSE_HOME.shape, bool)
    cloud[20:60, 30:90] = True
    data = np.where(np.repeat(np.repeat(cloud, 2, 0), 2, 1), 250, 100).astype("uint8")
    item = catalogue.scene("a", HOME, np.stack([data] * 3), cloud=20)
    catalogue.mask(item, COARSE_HOME, np.where(cloud, 9, 4), lattice=COARSE)
    lattice = Lattice(crs=UTM10.crs, gsd_m=9.3)
    with open_stac(found(catalogue, changes={"cloud": SCL}), lattice, patience=QUICK) as image:
        pixels = image.read(image.box)
    assert np.unique(pixels.data[:, pixels.valid]) == 100
    # Which pixel of 10 m the centre of each pixel of 9.3 m lies in; the scene's own edge is left out.
    cols, rows = np.meshgrid(np.arange(image.box.col0, image.box.col1), np.arange(image.box.row0, image.box.row1))
    row, col = np.floor((rows + 0.5) * 0.93).astype(int) - HOME.row0, np.floor((cols + 0.5) * 0.93).astype(int) - HOME.col0
    inner = (row > 1) & (row < HOME.shape[0] - 2) & (col > 1) & (col < HOME.shape[1] - 2)
    wanted = data[np.clip(row, 0, HOME.shape[0] - 1), np.clip(col, 0, HOME.shape[1] - 1)] == 100
    np.testing.assert_array_equal(pixels.valid[inner], wanted[inner])


BASELINE = {
    "kind": "baseline", "add": -1000, "baseline_property": "s2:processing_baseline", "from_baseline": "04.00",
    "applied_property": "earthsearch:boa_offset_applied",
}  # fmt: skip
REFLECTANCE = {"dtype": "uint16", "value_range": (0, 65535), "band": EACH, "scale": 1e-4, "nodata_when": "any"}
ASSETS = ("B04", "B03", "B02")


def test_two_baselines_of_one_ground_are_one_image(catalogue):
    """Same reflectance in digital numbers before and after the offset came; without the rule they differ by 1000."""
    ground = truth(HOME, dtype="uint16")
    catalogue.scene("before", WEST, truth(WEST, dtype="uint16"), assets=ASSETS, **{"s2:processing_baseline": "03.01"})
    shifted = truth(EAST, dtype="uint16") + np.uint16(1000)
    catalogue.scene("after", EAST, shifted, taken="2022-07-01", assets=ASSETS, **{"s2:processing_baseline": "04.00"})
    manifest = found(catalogue, changes=REFLECTANCE | {"offset": BASELINE})
    with open_stac(manifest, UTM10, patience=QUICK) as image:
        pixels = image.read(HOME)
        assert image.negatives == {}
    assert pixels.valid.all()
    np.testing.assert_array_equal(pixels.data, ground)
    with open_stac(found(catalogue, changes=REFLECTANCE), UTM10, patience=QUICK) as image:
        off = image.read(HOME).data.astype(int) - ground
    assert set(np.unique(off)) == {0, 1000}, "the control is not off by the offset"


@pytest.mark.parametrize(
    ("properties", "added"),
    [
        ({"s2:processing_baseline": "05.10"}, -1000),
        ({"s2:processing_baseline": "02.14"}, 0),
        ({"s2:processing_baseline": "05.09", "earthsearch:boa_offset_applied": True}, 0),
        ({"s2:processing_baseline": "05.09", "earthsearch:boa_offset_applied": False}, -1000),
    ],
)
def test_offset_by_baseline(catalogue, properties, added):
    catalogue.scene("a", HOME, truth(HOME, dtype="uint16"), assets=ASSETS, **properties)
    manifest = found(catalogue, changes=REFLECTANCE | {"offset": BASELINE})
    assert manifest.items[0].offset == dict.fromkeys(("red", "green", "blue"), added)


@pytest.mark.parametrize(("applied", "added"), [(False, -1000), (True, 0)])
def test_offset_as_declared(catalogue, applied, added):
    item = catalogue.scene(
        "a", HOME, truth(HOME, dtype="uint16"), assets=ASSETS, **{"earthsearch:boa_offset_applied": applied}
    )
    for asset in item["assets"].values():
        asset["raster:bands"] = [{"nodata": 0, "data_type": "uint16", "scale": 0.0001, "offset": -0.1}]
    rule = {"kind": "raster:bands", "applied_property": "earthsearch:boa_offset_applied"}
    assert found(catalogue, changes=REFLECTANCE | {"offset": rule}).items[0].offset["green"] == added


def test_reflectance_below_zero_is_held_there_and_counted(catalogue):
    data = np.full((3, *HOME.shape), 1400, "uint16")
    data[0, :10, :10], data[1, 50, 50], data[2, 100:, :] = 400, 0, 1000
    catalogue.scene("a", HOME, data, assets=ASSETS, **{"s2:processing_baseline": "05.00"})
    with open_stac(found(catalogue, changes=REFLECTANCE | {"offset": BASELINE}), UTM10, patience=QUICK) as image:
        pixels = image.read(HOME)
        assert image.negatives == {"a": 100}, "1000 is a reflectance of 0, not below it"
    assert pixels.data[0, 5, 5] == 0
    assert pixels.valid[5, 5], "0 is dark, not nodata"
    assert not pixels.valid[50, 50], "0 in the file is nodata, in every band by itself"
    assert pixels.valid.sum() == pixels.valid.size - 1


@pytest.mark.parametrize("baseline", [None, "soon"])
def test_an_unknown_baseline_is_refused(catalogue, baseline):
    properties = {} if baseline is None else {"s2:processing_baseline": baseline}
    catalogue.scene("odd", HOME, truth(HOME, dtype="uint16"), assets=ASSETS, **properties)
    with pytest.raises(SourceError, match=r"item odd .*s2:processing_baseline.*exclude"):
        found(catalogue, changes=REFLECTANCE | {"offset": BASELINE})


def test_another_scale_is_refused(catalogue):
    item = catalogue.scene("odd", HOME, truth(HOME, dtype="uint16"), assets=ASSETS)
    item["assets"]["B03"]["raster:bands"] = [{"scale": 2e-4}]
    with pytest.raises(SourceError, match=r"item odd .*scale of 0.0002 for green, not 0.0001"):
        found(catalogue, changes=REFLECTANCE)


# --- the manifest --------------------------------------------------------------------------------------------------------


def test_a_second_run_asks_nobody(catalogue, stac_api, tmp_path):
    catalogue.scene("a", HOME)
    server = stac_api([COLLECTION], catalogue.items)
    described, path = source(server.url), tmp_path / "run" / "items.json"
    first = search_once(path, described, area_of(HOME), start="2021-01-01", patience=QUICK)
    again = search(described, area_of(HOME), start="2021-01-01", patience=QUICK)
    assert first == again
    assert first.sha256 == again.sha256
    assert len(first.sha256) == 64
    server.stop()
    with pytest.raises(ImageryError, match=r"the catalogue http://127.* cannot be reached .*check the network"):
        search(described, area_of(HOME), patience=QUICK)
    second = search_once(path, described, area_of(HOME), start="2021-01-01", patience=QUICK)
    assert second == first
    assert Manifest.read(path) == first
    with open_stac(second, UTM10, patience=QUICK) as image:
        np.testing.assert_array_equal(image.read(HOME).data, truth(HOME))
    for request in ({"start": "2021-02-01"}, {"start": "2021-01-01", "prefer": "closest", "date": "2021-01-01"}):
        with pytest.raises(SourceError, match=r"manifest of another search .*delete it"):
            search_once(path, described, area_of(HOME), patience=QUICK, **request)
    changed = described.model_copy(update={"nodata": 255.0})
    with pytest.raises(SourceError, match="manifest of another source"):
        search_once(path, changed, area_of(HOME), start="2021-01-01", patience=QUICK)
    assert [p.name for p in path.parent.iterdir()] == ["items.json"]


def test_hrefs_are_frozen_without_signature(catalogue):
    catalogue.server.require_signature("*.tif")
    catalogue.scene("a", HOME)
    manifest = found(catalogue, changes={"signing": signing(catalogue.server)})
    assert manifest.items[0].assets["image"].href == catalogue.server.href("a.tif")
    assert "sig" not in manifest.model_dump_json().replace("signing", "")


@pytest.mark.parametrize("how", ["edit", "cut", "text", "missing", "key"])
def test_a_manifest_that_was_altered(catalogue, tmp_path, how):
    catalogue.scene("a", HOME)
    path = found(catalogue).write(tmp_path / "items.json")
    text = path.read_text()
    match how:
        case "edit":
            path.write_text(text.replace("a.tif", "b.tif"))
        case "cut":
            path.write_text(text[: len(text) // 2])
        case "text":
            path.write_bytes(b"\xff\xfe")
        case "missing":
            path.unlink()
        case "key":
            path.write_text(text.replace('"crs":', '"crz":'))
    with pytest.raises(SourceError, match="search") as error:
        Manifest.read(path)
    assert "\n" not in str(error.value)


# --- catalogues and items that are not as they should be -----------------------------------------------------------------


def test_an_item_without_projection_metadata(catalogue):
    """Where it lies is read from its file, once, when it is found."""
    catalogue.scene("bare", HOME, projection=False)
    manifest = found(catalogue)
    record = manifest.items[0].assets["image"]
    assert record.crs == "EPSG:32610"
    assert record.shape == HOME.shape
    with open_stac(manifest, UTM10, patience=QUICK) as image:
        np.testing.assert_array_equal(image.read(HOME).data, truth(HOME))
        assert image.resampled == "none"


def test_a_catalogue_that_places_a_file_elsewhere(catalogue):
    item = catalogue.scene("moved", HOME)
    item["assets"]["image"]["proj:transform"][2] += 25.0
    with (
        open_stac(found(catalogue), UTM10, patience=QUICK) as image,
        pytest.raises(ImageryError, match=r'item moved .*elsewhere than its file.*grids = "files"'),
    ):
        image.read(HOME)
    with open_stac(found(catalogue, changes={"grids": "files"}), UTM10, patience=QUICK) as image:
        np.testing.assert_array_equal(image.read(HOME).data, truth(HOME))


def test_an_item_without_the_asset(catalogue):
    catalogue.scene("odd", HOME)
    bands = ({"name": "red", "asset": "imagery"},)
    with pytest.raises(SourceError, match=r"item odd of test has no asset 'imagery' \(did you mean 'image'\?\)"):
        found(catalogue, changes={"band": bands})


def test_a_file_without_the_band(catalogue):
    catalogue.scene("odd", HOME)
    manifest = found(catalogue, changes={"band": ({"name": "nir", "asset": "image", "index": 4},)})
    with open_stac(manifest, UTM10, patience=QUICK) as image, pytest.raises(SourceError, match=r"has 3 bands.*band 4"):
        image.read(HOME)


@pytest.mark.parametrize(
    ("bands", "words"), [(["rde"], "'rde'; did you mean 'red'"), ([4], "bands 1-3"), ([0], "bands 1-3")]
)
def test_a_band_that_the_source_does_not_have(catalogue, bands, words):
    catalogue.scene("a", HOME)
    with pytest.raises(SourceError, match=words), open_stac(found(catalogue), UTM10, bands, patience=QUICK):
        pass


def test_a_file_of_another_data_type(catalogue):
    catalogue.scene("odd", HOME, truth(HOME, dtype="uint16"))
    with (
        open_stac(found(catalogue), UTM10, patience=QUICK) as image,
        pytest.raises(ImageryError, match=r"item odd .* uint16, not the uint8"),
    ):
        image.read(HOME)


def test_a_value_that_the_source_does_not_allow(catalogue):
    catalogue.scene("odd", HOME)
    manifest = found(catalogue, changes={"value_range": (0, 200)})
    with open_stac(manifest, UTM10, patience=QUICK) as image, pytest.raises(ImageryError, match=r"value_range 0 to 200"):
        image.read(HOME)


def test_an_area_without_items(catalogue):
    catalogue.scene("a", HOME)
    with pytest.raises(SourceError, match=r"no item over bbox .*longitude 10.0000 to 10.1000.*widen the dates"):
        found(catalogue, area_of_bbox((10.0, 50.0, 10.1, 50.1)))


def test_items_are_searched_around_the_area_too(catalogue):
    """A window of a model reaches beyond the area; what it sees there is not to depend on the area."""
    catalogue.scene("here", HOME)
    beside = Box(HOME.row0, HOME.col1, HOME.row1, HOME.col1 + 60)
    catalogue.scene("beside", beside)
    assert {item.id for item in found(catalogue, area_of(HOME, shrink_deg=1e-4)).items} == {"here", "beside"}


@pytest.mark.parametrize("endpoint", ["{url}/nowhere", "{file}/a.tif", "{file}/text.json", "{file}/other.json"])
def test_an_endpoint_that_is_no_catalogue(catalogue, endpoint):
    catalogue.scene("a", HOME)
    (catalogue.server.folder / "text.json").write_text("somewhere in Oregon")
    (catalogue.server.folder / "other.json").write_text('{"type": "FeatureCollection", "features": []}')
    url = endpoint.format(url=catalogue.api().url, file=catalogue.server.url)
    for kind in ("stac-api", "stac-static"):
        with pytest.raises(CanopyError, match=r"test .*(correct|address)") as error:
            search(source(url, kind=kind), area_of(HOME), patience=QUICK)
        assert "\n" not in str(error.value)


# --- static catalogues ---------------------------------------------------------------------------------------------------


def static(catalogue, folder):
    """The catalogue's items as pystac writes them, with relative links; returns the path of catalog.json."""
    import pystac

    root = pystac.Catalog("root", "root")
    extent = pystac.Extent(pystac.SpatialExtent([[-180, -90, 180, 90]]), pystac.TemporalExtent([[None, None]]))
    collection = pystac.Collection("scenes", "scenes", extent)
    root.add_child(collection)
    collection.add_items(pystac.Item.from_dict(item) for item in catalogue.items)
    root.normalize_and_save(str(folder), catalog_type=pystac.CatalogType.SELF_CONTAINED)
    return folder / "catalog.json"


def test_a_static_catalogue_behind_a_server_and_in_a_folder(catalogue):
    catalogue.scene("west", WEST)
    catalogue.scene("east", EAST, taken="2021-08-01")
    catalogue.scene(
        "far",
        Box(HOME.row0 + 9000, HOME.col0, HOME.row0 + 9050, HOME.col0 + 50),
        truth(Box(HOME.row0, HOME.col0, HOME.row0 + 50, HOME.col0 + 50)),
    )
    path = static(catalogue, catalogue.server.folder / "stac")
    catalogue.server.fail("/stac/scenes/collection.json", status=503, times=1)
    for endpoint in (
        catalogue.server.href(path),
        str(path),
        catalogue.server.href(path.parent / "scenes" / "collection.json"),
    ):
        manifest = search(source(endpoint, kind="stac-static"), area_of(HOME), patience=QUICK)
        assert [item.id for item in manifest.items] == ["east", "west"]
        with open_stac(manifest, UTM10, patience=QUICK) as image:
            np.testing.assert_array_equal(image.read(HOME).data, truth(HOME))
    with pytest.raises(SourceError, match=r"no collection 'scene'; did you mean 'scenes'"):
        search(source(str(path), kind="stac-static", collection="scene"), area_of(HOME), patience=QUICK)
    with pytest.raises(SourceError, match=r"does not exist; correct endpoint"):
        search(source(str(path.with_name("cat.json")), kind="stac-static"), area_of(HOME), patience=QUICK)


# --- services that fail --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("failures", [[(429, {"Retry-After": "0"})] * 2, [(500, {})], [(503, {}), (502, {})]])
def test_a_search_outlives_passing_failures(catalogue, failures):
    catalogue.scene("a", HOME)
    server = catalogue.api()
    server.faults.extend(failures)
    assert len(search(source(server.url), area_of(HOME), patience=QUICK).items) == 1
    assert not server.faults


@pytest.mark.parametrize(
    ("status", "words"),
    [
        (500, "answers 500.*fault: run again later"),
        (429, "answers 429.*limits.*wait"),
        (403, "answers 403.*access is refused"),
    ],
)
def test_a_catalogue_that_refuses_for_good(catalogue, status, words):
    catalogue.scene("a", HOME)
    server = catalogue.api()
    server.always = status
    with pytest.raises(ImageryError, match=words) as error:
        search(source(server.url), area_of(HOME), patience=QUICK)
    assert "\n" not in str(error.value)


def test_a_catalogue_that_says_nothing(catalogue):
    catalogue.scene("a", HOME)
    server = catalogue.api()
    server.hang_s = 1.0
    quick = Patience(attempts=2, first_pause_s=0.01, connect_s=0.2, silence_s=0.2)
    with pytest.raises(ImageryError, match=r"cannot be reached.*check the network"):
        search(source(server.url), area_of(HOME), patience=quick)


FAULTS = {
    "429 twice": {"status": 429, "times": 2, "retry_after_s": 0},
    "503 once": {"status": 503, "times": 1},
    "500 twice": {"status": 500, "times": 2},
    "cut short once": {"truncate": True, "times": 1, "methods": ("GET",)},
    "dropped once": {"drop": True, "times": 1},
    "500 on the pixels": {"status": 500, "times": 1, "after": 2},
    "cut short on the pixels": {"truncate": True, "times": 1, "after": 2},
    "silence once": {"hang_s": 20, "times": 1},
}


@pytest.mark.parametrize("fault", FAULTS)
def test_pixels_outlive_passing_failures(catalogue, fault):
    catalogue.scene("a", HOME)
    manifest = found(catalogue)
    catalogue.server.fail("/a.tif", **FAULTS[fault])
    with open_stac(manifest, UTM10, patience=QUICK) as image:
        pixels = image.read(HOME)
    assert pixels.valid.all()
    np.testing.assert_array_equal(pixels.data, truth(HOME))
    assert catalogue.server.count("/a.tif") > 2


FOR_GOOD = {
    "500": ({"status": 500}, r"127.0.0.1:\d+ answers 500 to item a.*a\.tif\).*run again later"),
    "429": ({"status": 429}, r"answers 429 .*limits.*wait"),
    "403": ({"status": 403}, r"answers 403 .*access is refused: check the source's signing"),
    "404": ({"status": 404}, r"answers 404 .*exclude"),
    "cut short": ({"truncate": True, "methods": ("GET",)}, r"item a.*cannot be decoded.*cut short; leave the item out"),
    "pixels cut short": ({"truncate": True, "after": 2}, r"item a.*cannot be decoded.*cut short; leave the item out"),
    "pixels 500": ({"status": 500, "after": 2}, r"answers 500"),
    "silence": ({"hang_s": 20}, r"does not answer within 1 s.*check the network"),
}


@pytest.mark.parametrize("fault", FOR_GOOD)
def test_pixels_that_never_come_are_an_error_and_never_nodata(catalogue, tmp_path, fault):
    options, words = FOR_GOOD[fault]
    catalogue.scene("a", HOME)
    catalogue.scene("older", HOME, taken="2020-01-01")  # would step in if the failure passed for nodata
    manifest = found(catalogue)
    catalogue.server.fail("/a.tif", **options)
    patience = Patience(attempts=2, first_pause_s=0.01, connect_s=1, silence_s=1)
    with open_stac(manifest, UTM10, cache=tmp_path / "cache", patience=patience) as image:
        with pytest.raises(ImageryError, match=words) as error:
            image.read(HOME)
        assert "\n" not in str(error.value)
        assert not list((tmp_path / "cache").rglob("*.npz")), "an unfinished tile was kept"
        catalogue.server.heal()
        np.testing.assert_array_equal(image.read(HOME).data, truth(HOME), err_msg="the failure was remembered")


def test_the_control_of_never_nodata(catalogue, monkeypatch):
    """With odc-stac told to go on, the same failure does pass for nodata: the tests above can fail."""
    import odc.stac

    catalogue.scene("a", HOME)
    manifest = found(catalogue)
    load = odc.stac.load
    monkeypatch.setattr(odc.stac, "load", lambda *a, **k: load(*a, **(k | {"fail_on_error": False})))
    with open_stac(manifest, UTM10, patience=Patience(attempts=1, first_pause_s=0.01, connect_s=1, silence_s=1)) as image:
        image.read(Box(HOME.row0, HOME.col0, HOME.row0 + 1, HOME.col0 + 1))  # the header is known
        image._memory.tiles.clear()
        image._reader._forget([catalogue.server.href("a.tif")])
        catalogue.server.fail("/a.tif", status=404)
        assert not image.read(HOME).valid.any()


# --- signatures ----------------------------------------------------------------------------------------------------------


def signing(server, hosts=("127.0.0.1",)):
    return {"kind": "planetary-computer", "token_url": f"{server.token_url}/scenes", "hosts": hosts}


def test_files_that_want_a_signature(catalogue):
    server = catalogue.server
    server.require_signature("*.tif")
    catalogue.scene("a", HOME, assets=ASSETS)
    manifest = found(catalogue, changes={"signing": signing(server), "band": EACH})
    with open_stac(manifest, UTM10, patience=QUICK) as image:
        np.testing.assert_array_equal(image.read(HOME).data, truth(HOME))
    assert server.count("/api/sas/*") == 1, "a token serves until it ends"
    assert server.count("*.tif", status=403) == 0


def test_a_signature_that_expires_between_two_reads_is_renewed(catalogue):
    server = catalogue.server
    server.require_signature("*.tif")
    far = Box(HOME.row0 + 3000, HOME.col0, HOME.row1 + 3000, HOME.col1)
    catalogue.scene("a", HOME)
    catalogue.scene("b", far, truth(HOME))
    manifest = found(catalogue, area_of(HOME, far), changes={"signing": signing(server)})
    with open_stac(manifest, UTM10, patience=QUICK) as image:
        np.testing.assert_array_equal(image.read(HOME).data, truth(HOME))
        server.revoke_signatures()
        np.testing.assert_array_equal(image.read(far).data, truth(HOME))
    assert server.count("*.tif", status=403) > 0, "nothing had expired"
    assert server.count("/api/sas/*") == 2


def test_a_signature_near_its_end_is_not_used(catalogue):
    server = catalogue.server
    server.require_signature("*.tif", lifetime_s=1.0)
    catalogue.scene("a", HOME)
    manifest = found(catalogue, changes={"signing": signing(server)})
    with open_stac(manifest, UTM10, patience=QUICK) as image:
        np.testing.assert_array_equal(image.read(HOME).data, truth(HOME))
    assert server.count("/api/sas/*") > 1
    assert server.count("*.tif", status=403) == 0


def test_a_token_is_shown_to_its_own_hosts_only(catalogue):
    server = catalogue.server
    catalogue.scene("a", HOME)
    manifest = found(catalogue, changes={"signing": signing(server, hosts=(".blob.core.windows.net",))})
    with open_stac(manifest, UTM10, patience=QUICK) as image:
        assert image.read(HOME).valid.all()
    assert server.count("/api/sas/*") == 0
    assert not any("sig" in request.query for request in server.requests)


def test_access_that_is_refused_with_every_signature(catalogue):
    server = catalogue.server
    catalogue.scene("a", HOME)
    manifest = found(catalogue, changes={"signing": signing(server)})
    server.fail("/a.tif", status=403)
    with (
        open_stac(manifest, UTM10, patience=QUICK) as image,
        pytest.raises(ImageryError, match=r"403.*access is refused") as error,
    ):
        image.read(HOME)
    assert server.count("/api/sas/*") == 2, "it is signed anew once"
    assert "sig=" not in str(error.value), "the message shows a secret"
    server.fail("/api/*", status=500)
    with (
        open_stac(manifest, UTM10, patience=QUICK) as image,
        pytest.raises(ImageryError, match=r"needs signatures.*answers 500"),
    ):
        image.read(HOME)


def test_a_bucket_whose_readers_pay(catalogue, monkeypatch):
    """No bucket is asked here: what GDAL is told, and what a reader without an account is told."""
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_PROFILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_S3_ENDPOINT", "127.0.0.1:9")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("CPL_AWS_AUTODETECT_EC2", "NO")
    item = catalogue.scene("a", HOME)
    item["assets"]["image"]["href"] = "s3://bucket/a.tif"
    manifest = found(catalogue, changes={"signing": {"kind": "requester-pays"}})
    with open_stac(manifest, UTM10, patience=Patience(attempts=1, first_pause_s=0.01, connect_s=1, silence_s=1)) as image:
        assert image._reader._options()["AWS_REQUEST_PAYER"] == "requester"
        with pytest.raises(ImageryError, match=r"s3://bucket/a.tif\) cannot be read .*AWS_ACCESS_KEY_ID") as error:
            image.read(HOME)
    assert "\n" not in str(error.value)


# --- what is kept --------------------------------------------------------------------------------------------------------


def test_a_run_that_is_resumed_fetches_nothing_again(catalogue, tmp_path, monkeypatch):
    catalogue.scene(
        "a", HOME, truth(HOME, dtype="uint16") + np.uint16(300), assets=ASSETS, **{"s2:processing_baseline": "05.00"}
    )
    manifest = found(catalogue, changes=REFLECTANCE | {"offset": BASELINE})
    with open_stac(manifest, UTM10, cache=tmp_path, patience=QUICK) as image:
        first, days, negatives = image.read(HOME), image.days(HOME), image.negatives
    assert negatives["a"] > 0
    with open_stac(manifest, UTM10, ["red"], cache=tmp_path, patience=QUICK) as image:
        np.testing.assert_array_equal(image.read(HOME).data, first.data[:1], err_msg="other bands are other tiles")
    catalogue.server.stop()
    monkeypatch.setattr("canopy.tiler.remote.Reader.load", None)  # GDAL remembers files in memory, too
    with open_stac(manifest, UTM10, cache=tmp_path, patience=QUICK) as image:
        again = image.read(HOME)
        np.testing.assert_array_equal(image.days(HOME), days)
        assert image.negatives == negatives
    np.testing.assert_array_equal(again.data, first.data)
    np.testing.assert_array_equal(again.valid, first.valid)


def test_a_damaged_tile_is_fetched_again(catalogue, tmp_path):
    catalogue.scene("a", HOME)
    manifest = found(catalogue)
    with open_stac(manifest, UTM10, cache=tmp_path, patience=QUICK) as image:
        image.read(HOME)
    for path in tmp_path.rglob("*.npz"):
        path.write_bytes(path.read_bytes()[:-500])
    with open_stac(manifest, UTM10, cache=tmp_path, patience=QUICK) as image:
        np.testing.assert_array_equal(image.read(HOME).data, truth(HOME))


def checksum(path):
    return "1220" + hashlib.sha256(path.read_bytes()).hexdigest()


def test_staged_files_need_no_network(catalogue, tmp_path):
    server = catalogue.server
    server.require_signature("*.tif")
    item = catalogue.scene("a", HOME)
    item["assets"]["image"] |= {"file:checksum": checksum(server.folder / "a.tif")}
    manifest = found(catalogue, changes={"signing": signing(server)})
    server.fail("/a.tif", truncate=True, times=1, methods=("GET",))
    staged = stage(manifest, tmp_path / "files", patience=QUICK)
    assert read_raster(staged.items[0].assets["image"].href)[0].data.shape == (3, *HOME.shape)
    before = server.count("/a.tif")
    assert stage(manifest, tmp_path / "files", patience=QUICK) == staged
    assert server.count("/a.tif") == before, "it was fetched again"
    server.stop()
    with open_stac(staged, UTM10, patience=QUICK) as image:
        np.testing.assert_array_equal(image.read(HOME).data, truth(HOME))


@pytest.mark.parametrize(
    ("changes", "fault", "words"),
    [
        ({"file:checksum": "1220" + "0" * 64}, {}, r"item a, asset image .*sha256 is .*catalogue says 000000000000"),
        ({"file:size": 17}, {}, "bytes, and the catalogue says 17"),
        ({"file:checksum": "ffff00"}, {}, "no known kind"),
        ({}, {"status": 500}, "cannot be fetched: 127.0.0.1.* answers 500.*run again later"),
        ({}, {"truncate": True}, "cannot be fetched"),
        ({}, {"status": 404}, "answers 404.*exclude"),
    ],
)
def test_what_is_staged_wrongly_is_refused(catalogue, tmp_path, changes, fault, words):
    item = catalogue.scene("a", HOME)
    item["assets"]["image"] |= changes
    manifest = found(catalogue)
    if fault:
        catalogue.server.fail("/a.tif", **fault)
    with pytest.raises(ImageryError, match=words) as error:
        stage(manifest, tmp_path / "files", patience=QUICK)
    assert "\n" not in str(error.value)
    assert not [p for p in (tmp_path / "files").rglob("*") if p.is_file()]


# --- descriptions of sources ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["naip", "sentinel-2-l2a", "sentinel-2-c1-l2a", "template"])
def test_the_catalogue_of_sources(name):
    described = load_source(name)
    assert described.name == name
    assert described.licence
    assert {band.name for band in described.band} >= {"red", "green", "blue"}


def test_naip_is_one_asset_and_sentinel_2_many():
    assert load_source("naip").assets == ("image",)
    assert load_source("sentinel-2-l2a").assets == ("B04", "B03", "B02", "B08", "SCL")


WRONG = [
    ('endpoint = "', 'endpiont = "', r"unknown key 'endpiont'; did you mean 'endpoint'"),
    ('token_url = "', 'token = "', r"unknown key 'signing.token'; did you mean 'token_url'"),
    ("index = 2", "index = 0", r"band.1.index"),
    ('name = "green"', 'name = "red"', r"two bands have one name"),
    ('kind = "planetary-computer"', 'kind = "planetary"', r"'planetary' is not known; did you mean 'planetary-computer'"),
    ("value_range = [0.0, 255.0]", "value_range = [255.0, 0.0]", r"not low < high"),
    ('licence = "public domain"', "", r"key 'licence' is missing"),
    ('[[band]]\nname = "nir"', '[cloud]\nmask_asset = "SCL"\n\n[[band]]\nname = "nir"', r"mask_asset and clear_classes"),
    ("gsd_m = 0.6", "gsd_m = =", r"no TOML"),
]


@pytest.mark.parametrize(("old", "new", "words"), WRONG)
def test_a_description_with_a_mistake(tmp_path, old, new, words):
    text = Path("data/naip.toml").read_text()
    assert old in text
    path = tmp_path / "mine.toml"
    path.write_text(text.replace(old, new, 1))
    with pytest.raises(SourceError, match=words) as error:
        load_source(path)
    assert "\n" not in str(error.value)


def test_a_source_that_is_not_there(tmp_path):
    with pytest.raises(SourceError, match=r"no source 'nap'.*naip, .*template"):
        load_source("nap")


# --- real imagery --------------------------------------------------------------------------------------------------------


def test_real_imagery_cut_into_scenes_is_whole_again(samples, catalogue):
    """Woods and a river in four overlapping scenes of different days, each with clouds, one in the neighbouring zone."""
    with open_imagery(samples / "pairs" / "US_AUTZEN" / "autzen_south_riparian_rgb.tif", UTM_HALF) as local:
        box = local.box
        box = Box(box.row0 + 300, box.col0 + 200, box.row0 + 800, box.col0 + 1000)
        ground = local.read(box)
    assert ground.valid.all()
    assert ground.data.min() > 0
    rng = np.random.default_rng(8)
    side = (box.shape[0] * 6 // 10, box.shape[1] * 6 // 10)
    for number, taken in enumerate(("2020-06-01", "2020-08-01", "2020-07-01", "2020-09-01")):
        row0 = box.row1 - side[0] if number // 2 else box.row0
        col0 = box.col1 - side[1] if number % 2 else box.col0
        part = Box(row0, col0, row0 + side[0], col0 + side[1])
        lattice, data = UTM_HALF, ground.data[(slice(None), *part.slices_in(box))]
        if number == 1:
            lattice = Lattice(crs=UTM11.crs, gsd_m=0.5)
            path = catalogue.file("whole", data, UTM_HALF.grid(part))
            with open_imagery(path, lattice) as other:
                part, data = other.box, other.read(other.box).data
        rows, cols = np.mgrid[: part.shape[0], : part.shape[1]]
        row, col = rng.integers(0, side[0]), rng.integers(0, side[1])
        cloud = (rows - row) ** 2 + (cols - col) ** 2 < 40**2
        item = catalogue.scene(f"s{number}", part, np.where(cloud, 255, data), lattice=lattice, taken=taken, cloud=5)
        catalogue.mask(item, part, np.where(cloud, 9, 4), lattice=lattice)
    changes = {"gsd_m": 0.5, "cloud": SCL}
    manifest = found(catalogue, area_of(box, lattice=UTM_HALF), changes=changes)
    assert [item.id for item in manifest.items] == ["s3", "s1", "s2", "s0"]
    with open_stac(manifest, UTM_HALF, patience=QUICK) as image:
        pixels, days = image.read(box), image.days(box)
    assert 0.95 < pixels.valid.mean() < 1, "what one scene hides another shows, where it is there"
    native = pixels.valid & (days != days_of("2020-08-01"))
    np.testing.assert_array_equal(pixels.data[:, native], ground.data[:, native])
    off = np.abs(pixels.data.astype(int) - ground.data)[:, pixels.valid & ~native]
    assert np.percentile(off, 95) < 12, "the scene of the other zone does not lie on the ground"
    assert len(np.unique(days[pixels.valid])) == 4

"""What a cloud says besides heights, the ground in triangles, the pit-free canopy, and clouds cut into files."""

import itertools
from datetime import date

import laspy
import numpy as np
import pytest
from affine import Affine
from pyproj import CRS, Transformer
from scipy import ndimage
from scipy.interpolate import LinearNDInterpolator

from canopy.errors import LidarError
from canopy.grid import Box, Grid, Lattice
from canopy.tiler.lidar import LidarOptions, ground_surface, lidar_layers, lidar_to_chm

UTM = CRS.from_epsg(32610)
LATTICE = Lattice(crs=UTM, gsd_m=0.5)
# A corner of four triangulation tiles lies 30 m inside.
LEFT, BOTTOM, SIDE_M = 493_922.0, 4_878_050.0, 60.0
BOX = LATTICE.covering((LEFT, BOTTOM, LEFT + SIDE_M, BOTTOM + SIDE_M))
GRID = LATTICE.grid(BOX)
TIN = LidarOptions(ground_interpolation="tin")


def terrain_m(x, y):
    return 300 + 0.3 * (x - LEFT) - 0.15 * (y - BOTTOM) + np.sin((x - LEFT) / 6) * np.cos((y - BOTTOM) / 8)


def crown_m(x, y):
    """Rows of cones of 7 m pitch and up to 18 m."""
    u, v = (x - LEFT) % 7 - 3.5, (y - BOTTOM) % 7 - 3.2
    return np.maximum(0.0, 18 - 5.5 * np.hypot(u, v))


def cloud(rng, *, per_m2=10.0):
    """Fields of a cloud: half of the first returns that meet a crown go on to a second, lower one, or to the ground."""
    n = int(per_m2 * SIDE_M**2)
    x, y = (np.round(corner + rng.uniform(0.01, SIDE_M - 0.01, n), 2) for corner in (LEFT, BOTTOM))
    height = crown_m(x, y)
    sunk = (height > 0) & (rng.random(n) < 0.15)  # first returns from inside a crown: what makes pits
    height = np.where(sunk, height * rng.uniform(0.1, 0.5, n), height)
    more = np.flatnonzero((height > 0) & (rng.random(n) < 0.5))
    fields = {
        "x": np.r_[x, x[more]],
        "y": np.r_[y, y[more]],
        "height": np.r_[height, np.zeros(more.size)],
        "return_number": np.r_[np.ones(n, int), np.full(more.size, 2)],
        "number_of_returns": np.r_[np.ones(n, int), np.full(more.size, 2)],
    }
    fields["number_of_returns"][more] = 2
    fields["z"] = np.round(terrain_m(fields["x"], fields["y"]) + fields["height"], 2)
    fields["classification"] = np.where(fields["height"] > 0, 5, 2)
    return fields


def part(fields, keep):
    return {name: values[keep] for name, values in fields.items()}


def write(path, fields, *, crs=UTM, scale=0.01, offset=(0.0, 0.0, 0.0), gps=None, **flags):
    header = laspy.LasHeader(point_format=6, version="1.4")
    header.scales, header.offsets = [scale, scale, 0.01], offset
    if crs is not None:
        header.add_crs(crs)
    if gps is not None:
        header.global_encoding.gps_time_type = gps[0]
    las = laspy.LasData(header)
    for name, values in fields.items():
        if name != "height":
            setattr(las, name, values)
    if gps is not None:
        las.gps_time = gps[1]
    for name, values in flags.items():
        setattr(las, name, values)
    las.write(path)
    return path


@pytest.fixture
def rng():
    return np.random.default_rng(23)


# --- triangulated ground ---------------------------------------------------------------------------------------------------


def test_heights_over_triangles_are_scipys(tmp_path, rng):
    """Every return's height above one triangulation of all ground returns, made by SciPy, then the greatest per pixel."""
    fields = cloud(rng, per_m2=4)
    options = LidarOptions(ground_interpolation="tin", ground_tin_cell_m=0.0, isolated_points=0)
    chm = lidar_to_chm(write(tmp_path / "a.laz", fields), GRID, options=options)
    assert chm.attrs["ground_method"] == "classes 2 and 9, triangulated"
    x, y, z = fields["x"], fields["y"], fields["z"]
    order = np.lexsort((z, y, x))
    order = order[fields["classification"][order] == 2]
    _, first = np.unique(np.column_stack([x, y])[order], axis=0, return_index=True)
    lowest = order[first]
    surface = LinearNDInterpolator(np.column_stack([x - LEFT, y - BOTTOM])[lowest], z[lowest])
    height = z - surface(x - LEFT, y - BOTTOM)
    inside = np.isfinite(height)
    truth = np.full(GRID.shape, -np.inf)
    cols, rows = GRID.pixel(x[inside], y[inside])
    np.maximum.at(truth, (np.floor(rows).astype(int), np.floor(cols).astype(int)), np.maximum(height[inside], 0))
    # At the hull some returns of a pixel have no triangle, ours then has the cells' ground.
    inner = (slice(4, -4), slice(4, -4))
    ours, truth = chm.to_numpy()[inner], np.where(np.isfinite(truth), truth, np.nan)[inner]
    np.testing.assert_allclose(ours, truth, atol=2e-4)
    # The control: the gridded ground is another surface.
    gridded = lidar_to_chm(tmp_path / "a.laz", GRID).to_numpy()[inner]
    assert np.nanmedian(np.abs(gridded - truth)) > 1e-3


def test_triangles_follow_a_break_that_cells_round_off(tmp_path, rng):
    """A dam with a slope of 60 degrees: means of cells round its edges."""
    fields = cloud(rng, per_m2=8)

    def dam_m(x):
        return np.clip(1.7 * (x - LEFT - 25), 0, 8)

    fields["z"] = np.round(dam_m(fields["x"]) + fields["height"], 2)
    path = write(tmp_path / "dam.laz", fields)
    px, _ = GRID.xy(np.arange(GRID.shape[1]) + 0.5, 0.5)
    errors = [
        np.abs(ground_surface(path, GRID, options=options).to_numpy() - dam_m(px)[None]).mean()
        for options in (TIN, LidarOptions())
    ]
    assert errors[0] < 0.7 * errors[1]


def test_triangulated_ground_does_not_depend_on_the_grid(tmp_path, rng):
    path = write(tmp_path / "a.laz", cloud(rng))
    whole = lidar_to_chm(path, GRID, options=TIN).to_numpy()
    small = lidar_to_chm(path, GRID.crop(20, 37, (50, 40)), options=TIN).to_numpy()
    np.testing.assert_array_equal(small, whole[20:70, 37:77])


@pytest.mark.parametrize("ground", ["classes", "filter"])
def test_filtered_ground_in_triangles(tmp_path, rng, ground):
    fields = cloud(rng)
    path = write(tmp_path / "a.laz", fields)
    options = LidarOptions(ground=ground, ground_interpolation="tin")
    surface = ground_surface(path, GRID, options=options)
    assert surface.attrs["ground_vertices"] > 500
    cols, rows = np.meshgrid(np.arange(120) + 0.5, np.arange(120) + 0.5)
    error = np.abs(surface.to_numpy() - terrain_m(*GRID.xy(cols, rows)))
    assert np.median(error) < (0.02 if ground == "classes" else 0.1)


# --- pit-free ------------------------------------------------------------------------------------------------------------


def khosravipour(x, y, height, grid, thresholds, edges):
    """The method as the paper tells it, from all returns given, triangle by triangle."""
    from scipy.spatial import Delaunay

    cols, rows = np.meshgrid(np.arange(grid.shape[1]) + 0.5, np.arange(grid.shape[0]) + 0.5)
    px, py = grid.xy(cols, rows)
    out = np.full(grid.shape, np.nan)
    for threshold in thresholds:
        tall = height >= threshold
        places = np.column_stack([x - LEFT, y - BOTTOM])[tall]
        mesh = Delaunay(places)
        surface = LinearNDInterpolator(mesh, height[tall])(px - LEFT, py - BOTTOM)
        triangle = mesh.find_simplex(np.column_stack([(px - LEFT).ravel(), (py - BOTTOM).ravel()])).reshape(px.shape)
        corners = places[mesh.simplices]
        longest = np.linalg.norm(corners - np.roll(corners, 1, axis=1), axis=2).max(axis=1)
        surface[longest[triangle] > edges[threshold > 0]] = np.nan
        out = np.fmax(out, surface)
    return out


@pytest.fixture
def canopy(rng):
    """First returns only, one per pixel, heights as delivered."""
    fields = cloud(rng, per_m2=6)
    cols, rows = GRID.pixel(fields["x"], fields["y"])
    order = np.lexsort((-fields["height"], np.floor(cols), np.floor(rows)))
    order = order[fields["return_number"][order] == 1]
    pixel = np.floor(rows[order]) * 1000 + np.floor(cols[order])
    fields = part(fields, order[np.unique(pixel, return_index=True)[1]])
    fields["height"] = fields["z"] = np.round(fields["height"], 2)
    return fields


def test_pitfree_is_the_papers(tmp_path, canopy):
    path = write(tmp_path / "a.laz", canopy)
    options = LidarOptions(normalised=True, isolated_points=0)
    ours = lidar_to_chm(path, GRID, "pitfree", options=options).to_numpy()
    args = canopy["x"], canopy["y"], canopy["height"], GRID, options.pitfree_thresholds_m, options.pitfree_max_edge_m
    theirs = khosravipour(*args)
    # A centre on a triangle's edge may be in or out by a rounding, and a tile's rim may know another triangle.
    same = (np.abs(ours - theirs) < 1e-3) | (np.isnan(ours) & np.isnan(theirs))
    assert same.mean() > 0.998
    assert np.isfinite(ours).mean() > 0.98
    # The controls: another set of thresholds, another longest edge.
    assert (np.abs(ours - khosravipour(*args[:4], (0,), args[5])) < 1e-3).mean() < 0.95
    assert (np.abs(ours - khosravipour(*args[:5], (5.0, 6.0))) < 1e-3).mean() < 0.95


def test_pitfree_closes_pits(tmp_path, rng):
    fields = cloud(rng)
    path = write(tmp_path / "a.laz", fields)
    cols, rows = np.meshgrid(np.arange(120) + 0.5, np.arange(120) + 0.5)
    truth = crown_m(*GRID.xy(cols, rows))
    sunken = {}
    for algorithm in ("p2r", "pitfree"):
        chm = lidar_to_chm(path, GRID, algorithm).to_numpy()
        sunken[algorithm] = np.mean((chm < truth - 3)[truth > 6])
    assert sunken["p2r"] > 0.02
    assert sunken["pitfree"] < 0.25 * sunken["p2r"]


def test_pitfree_does_not_depend_on_the_grid_nor_on_tiles(tmp_path, canopy):
    path = write(tmp_path / "a.laz", canopy)
    options = LidarOptions(normalised=True, isolated_points=0)
    whole = lidar_to_chm(path, GRID, "pitfree", options=options).to_numpy()
    small = lidar_to_chm(path, GRID.crop(33, 20, (60, 70)), "pitfree", options=options).to_numpy()
    np.testing.assert_array_equal(small, whole[33:93, 20:90])
    # Moved by half a tile the seams lie elsewhere; the canopy may not show them.
    moved = dict(canopy, x=canopy["x"] + 64, y=canopy["y"] + 64)
    grid = LATTICE.grid(Box(BOX.row0 - 128, BOX.col0 + 128, BOX.row1 - 128, BOX.col1 + 128))
    other = lidar_to_chm(write(tmp_path / "b.laz", moved), grid, "pitfree", options=options).to_numpy()
    both = np.isfinite(whole) & np.isfinite(other)
    assert (np.isnan(whole) != np.isnan(other)).mean() < 0.002
    assert (np.abs(whole - other)[both] > 1e-3).mean() < 0.002


def test_pitfree_leaves_wide_voids_open_and_subcircles_widen(tmp_path, canopy):
    lake = np.hypot(canopy["x"] - LEFT - 30, canopy["y"] - BOTTOM - 30) < 8
    path = write(tmp_path / "lake.laz", part(canopy, ~lake))
    options = LidarOptions(normalised=True, isolated_points=0)
    layers = lidar_layers(path, GRID, "pitfree", options=options)
    cols, rows = np.meshgrid(np.arange(120) + 0.5, np.arange(120) + 0.5)
    px, py = GRID.xy(cols, rows)
    away = np.hypot(px - LEFT - 30, py - BOTTOM - 30)
    assert np.isnan(layers.height_m[away < 5]).all()
    assert layers.void[away < 7].all()
    assert not layers.void[(away > 9) & (away < 20)].any()
    assert np.isfinite(layers.height_m[away > 10]).mean() > 0.97
    wide = lidar_to_chm(path, GRID, "pitfree", options=LidarOptions(normalised=True, isolated_points=0, subcircle_m=0.3))
    both = np.isfinite(layers.height_m)
    wide_m = wide.to_numpy()
    assert np.isfinite(wide_m[both]).mean() > 0.99
    both &= np.isfinite(wide_m)
    assert np.mean(wide_m[both]) > np.mean(layers.height_m[both]) + 0.1


def count_pits(chm):
    """Pixels more than 3 m below the median of the nine around them."""
    filled = np.where(np.isnan(chm), 0, chm)
    return int(np.count_nonzero((ndimage.median_filter(filled, 3) - filled > 3) & np.isfinite(chm)))


@pytest.mark.parametrize(
    ("name", "epsg", "bounds"),
    [
        pytest.param("lidar/osbs_color_59pts.laz", 32617, (400_850, 3_280_400, 400_950, 3_280_500), id="OSBS 59 pts"),
        pytest.param("lidar/bc_lasr/bcts_2.laz", 3005, (885_060, 629_460, 885_100, 629_500), id="bc_lasr"),
    ],
)
def test_fewer_pits_in_real_canopy(samples, name, epsg, bounds):
    """Measured at 0.5 m, whole clouds: OSBS 270 pits by p2r, 119 pit-free; bc_lasr 52,574 and 12,960."""
    lattice = Lattice(crs=CRS.from_epsg(epsg), gsd_m=0.5)
    grid = lattice.grid(lattice.covering(bounds))
    pits = {a: count_pits(lidar_to_chm(samples / name, grid, a).to_numpy()) for a in ("p2r", "pitfree")}
    assert pits["p2r"] > 100
    assert pits["pitfree"] < 0.6 * pits["p2r"]


# --- clouds cut into files -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("algorithm", "options"),
    [
        pytest.param("p2r", LidarOptions(), id="p2r"),
        pytest.param("p2r", TIN, id="p2r over triangles"),
        pytest.param("pitfree", LidarOptions(ground="filter"), id="pitfree over filtered ground"),
    ],
)
def test_a_cloud_in_four_files_is_the_cloud(tmp_path, rng, algorithm, options):
    """Bit for bit: cut along lines that cross crowns, in any order, with other offsets and scales, points shuffled."""
    fields = cloud(rng, per_m2=5)
    whole = lidar_layers(write(tmp_path / "whole.laz", fields), GRID, algorithm, options=options)
    east, north = fields["x"] > LEFT + 27.3, fields["y"] > BOTTOM + 33.1
    paths = []
    for number, (a, b) in enumerate(itertools.product((False, True), repeat=2)):
        keep = rng.permutation(np.flatnonzero((east == a) & (north == b)))
        offset = (100.0 * number, 4_000_000.0 + 7 * number, 3.0)
        paths.append(write(tmp_path / f"{number}.laz", part(fields, keep), scale=0.001, offset=offset))
    for order in (paths, paths[::-1]):
        cut = lidar_layers(order, GRID, algorithm, options=options)
        np.testing.assert_array_equal(cut.height_m, whole.height_m)
        np.testing.assert_array_equal(cut.density_per_m2, whole.density_per_m2)
        assert cut.facts == whole.facts
    # The control: one file less is another canopy.
    assert not np.array_equal(
        lidar_layers(paths[:3], GRID, algorithm, options=options).height_m, whole.height_m, equal_nan=True
    )


@pytest.mark.parametrize("algorithm", ["p2r", "pitfree"])
def test_points_that_files_have_in_common_do_no_harm(tmp_path, rng, algorithm):
    """Files that overlap by 10 m, every point of the overlap in both. (The density there is double.)"""
    fields = cloud(rng, per_m2=5)
    whole = lidar_layers(write(tmp_path / "whole.laz", fields), GRID, algorithm, options=TIN)
    west, east = fields["x"] < LEFT + 35, fields["x"] > LEFT + 25
    for name, keep in (("west", west), ("east", east)):
        write(tmp_path / f"{name}.laz", part(fields, keep))
    both = lidar_layers([tmp_path / "west.laz", tmp_path / "east.laz"], GRID, algorithm, options=TIN)
    # Outside the hull the ground is that of the cells, means in which a point that comes twice counts twice.
    np.testing.assert_allclose(both.height_m, whole.height_m, atol=1e-4)


def test_tiles_in_different_crs(tmp_path, rng):
    """The east in the neighbouring UTM zone: within a tenth of a metre but where a point changes its pixel."""
    fields = cloud(rng)
    whole = lidar_to_chm(write(tmp_path / "whole.laz", fields), GRID).to_numpy()
    east = fields["x"] > LEFT + 27.3
    zone = CRS.from_epsg(32611)
    there = part(fields, east)
    there["x"], there["y"] = Transformer.from_crs(UTM, zone, always_xy=True).transform(there["x"], there["y"])
    paths = [tmp_path / "west.laz", tmp_path / "east.laz"]
    write(paths[0], part(fields, ~east))
    write(paths[1], there, crs=zone, scale=0.001, offset=(0, 4_800_000, 0))
    mixed = lidar_to_chm(paths, GRID).to_numpy()
    both = np.isfinite(whole) & np.isfinite(mixed)
    assert (np.isnan(whole) != np.isnan(mixed)).mean() < 0.01
    # Two of a hundred points, which are whole centimetres, lie on an edge of a pixel.
    assert (np.abs(whole - mixed)[both] > 0.1).mean() < 0.03


def test_folders_and_patterns(tmp_path, rng):
    fields = cloud(rng, per_m2=3)
    for name, keep in (("a", fields["x"] < LEFT + 30), ("b", fields["x"] >= LEFT + 30)):
        write(tmp_path / f"{name}.laz", part(fields, keep))
    one = lidar_to_chm([tmp_path / "a.laz", tmp_path / "b.laz"], GRID)
    np.testing.assert_array_equal(lidar_to_chm(tmp_path, GRID), one)
    np.testing.assert_array_equal(lidar_to_chm(str(tmp_path / "*.laz"), GRID), one)


# --- which points ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("returns", ["first", "last"])
def test_returns(tmp_path, rng, returns):
    fields = cloud(rng)
    path = write(tmp_path / "a.laz", fields)
    chosen = fields["return_number"] == (1 if returns == "first" else fields["number_of_returns"])
    layers = lidar_layers(path, GRID, options=LidarOptions(returns=returns))
    assert layers.facts["points_used"] == chosen.sum()
    assert layers.facts["points_dropped_other_return"] == (~chosen).sum()
    cols, rows = GRID.pixel(fields["x"][chosen], fields["y"][chosen])
    truth = np.full(GRID.shape, np.nan)
    np.fmax.at(truth, (np.floor(rows).astype(int), np.floor(cols).astype(int)), fields["height"][chosen])
    np.testing.assert_array_equal(np.isnan(layers.height_m), np.isnan(truth))
    assert np.nanpercentile(np.abs(layers.height_m - truth), 95) < 0.15
    # The ground is that of all returns, so the density is too.
    np.testing.assert_array_equal(layers.density_per_m2, lidar_layers(path, GRID).density_per_m2)


def test_points_of_the_overlap_are_left_out_when_asked(tmp_path, rng):
    fields = cloud(rng)
    overlap = rng.random(fields["x"].size) < 0.3
    path = write(tmp_path / "a.laz", fields, overlap=overlap)
    assert lidar_to_chm(path, GRID).attrs["points_dropped_overlap"] == 0
    left_out = lidar_to_chm(path, GRID, options=LidarOptions(drop_overlap=True))
    assert left_out.attrs["points_dropped_overlap"] == overlap.sum()
    alone = lidar_to_chm(write(tmp_path / "b.laz", part(fields, ~overlap)), GRID)
    np.testing.assert_array_equal(left_out, alone)


@pytest.mark.parametrize("algorithm", ["p2r", "pitfree"])
def test_birds_are_left_out_and_tree_tops_are_not(tmp_path, rng, algorithm):
    """Points in mid-air, far below max_height_m, of no class that would tell."""
    fields = cloud(rng)
    clean = lidar_to_chm(write(tmp_path / "clean.laz", fields), GRID, algorithm)
    birds = part(fields, rng.integers(0, fields["x"].size, 5))
    birds["classification"][:] = birds["return_number"][:] = birds["number_of_returns"][:] = 1
    birds["z"] = birds["z"] + np.array([40, 45, 60, 75, 80]) - birds["height"]
    both = {name: np.r_[fields[name], birds[name]] for name in fields}
    path = write(tmp_path / "birds.laz", both)
    chm = lidar_to_chm(path, GRID, algorithm)
    np.testing.assert_array_equal(chm, clean)
    assert chm.attrs["points_dropped_isolated"] >= 4
    assert clean.attrs["points_dropped_isolated"] == 0
    # The control: without the test they are trees.
    assert float(lidar_to_chm(path, GRID, algorithm, options=LidarOptions(isolated_points=0)).max()) > 35


@pytest.mark.parametrize("erased", [False, True])
@pytest.mark.parametrize("isolated_points", [0, 6])
def test_spike_of_a_real_cloud(samples, tmp_path, erased, isolated_points):
    """TEAK: a point at 3191 m above ground at 2100 m, of class 7; right by its class, and with all classes erased."""
    paths = sorted((samples / "plots" / "TEAK" / "lidar").glob("*.laz"))
    spiked = [path for path in paths if np.ptp(np.asarray(laspy.read(path).z)) > 500]
    assert len(spiked) == 1
    las = laspy.read(spiked[0])
    x, y, z, noise = np.asarray(las.x), np.asarray(las.y), np.asarray(las.z), np.asarray(las.classification) == 7
    assert noise[np.argmax(z)]
    if erased:
        las.classification = np.where(noise, 1, las.classification)
    las.write(tmp_path / "spike.laz")
    lattice = Lattice(crs=CRS.from_epsg(32611), gsd_m=1.0)
    grid = lattice.grid(lattice.covering((x.min(), y.min(), x.max(), y.max())))
    options = LidarOptions(crs=lattice.crs, isolated_points=isolated_points)
    chm = lidar_to_chm(tmp_path / "spike.laz", grid, options=options)
    reason = "noise" if not erased else "isolated" if isolated_points else "above_max_height"
    assert chm.attrs[f"points_dropped_{reason}"] >= 1
    las.points = las.points[~noise]
    las.write(tmp_path / "clean.laz")
    clean = lidar_to_chm(tmp_path / "clean.laz", grid, options=options).to_numpy()
    same = np.isclose(chm, clean, atol=0.05) | (np.isnan(chm) & np.isnan(clean))
    assert same.mean() > (0.99 if erased else 0.999)
    assert 20 < np.nanmax(chm) < 75


def test_heights_that_cannot_be_metres_are_refused(tmp_path, rng):
    """Feet in a file that says metres: trees of 40 m become 131."""
    fields = cloud(rng)
    fields["z"] = np.round((terrain_m(fields["x"], fields["y"]) + 2.5 * fields["height"]) / 0.3048, 2)
    path = write(tmp_path / "feet.laz", fields)
    with pytest.raises(
        LidarError, match=r"above the ground; if z is in feet give option z_unit_m, 0.3048 for feet"
    ) as caught:
        lidar_to_chm(path, GRID)
    assert "\n" not in str(caught.value)
    right = lidar_to_chm(path, GRID, options=LidarOptions(z_unit_m=0.3048))
    assert 40 < float(right.max()) < 50


# --- layers ----------------------------------------------------------------------------------------------------------------


def test_density_and_buildings(tmp_path, rng):
    fields = cloud(rng)
    house = (np.abs(fields["x"] - LEFT - 40) < 6) & (np.abs(fields["y"] - BOTTOM - 20) < 4)
    fields["classification"] = np.where(house, 6, fields["classification"])
    path = write(tmp_path / "a.laz", fields)
    cols, rows = GRID.pixel(fields["x"], fields["y"])
    at = np.floor(rows).astype(int), np.floor(cols).astype(int)
    count, houses = np.zeros(GRID.shape), np.zeros(GRID.shape)
    np.add.at(count, at, 1)
    np.add.at(houses, at, house)
    with np.errstate(invalid="ignore"):
        share = houses / count
    for drop in ((7, 18), (6, 7, 18)):  # left out of the heights or not, the house is there
        layers = lidar_layers(path, GRID, options=LidarOptions(drop_classes=drop))
        np.testing.assert_allclose(layers.density_per_m2, count / 0.25)
        np.testing.assert_allclose(layers.building_fraction, share, atol=1e-6)
        np.testing.assert_array_equal(layers.valid, np.isfinite(layers.height_m))
        assert layers.facts["points_dropped_excluded_class"] == (house.sum() if 6 in drop else 0)
        assert layers.class_counts == {int(c): int((fields["classification"] == c).sum()) for c in (2, 5, 6)}
    fields["classification"] = np.where(fields["classification"] == 2, 2, 1)
    assert lidar_layers(write(tmp_path / "b.laz", fields), GRID).building_fraction is None


def test_large_voids(tmp_path, rng):
    """A pixel is in a large void when some circle without a return covers it; scattered empty pixels are none."""
    fields = cloud(rng, per_m2=2)
    square = (np.abs(fields["x"] - LEFT - 30) < 10) & (np.abs(fields["y"] - BOTTOM - 25) < 10)
    slit = np.abs(fields["y"] - BOTTOM - 50) < 1.0
    layers = lidar_layers(write(tmp_path / "a.laz", part(fields, ~(square | slit))), GRID)
    cols, rows = np.meshgrid(np.arange(120) + 0.5, np.arange(120) + 0.5)
    px, py = GRID.xy(cols, rows)
    middle = (np.abs(px - LEFT - 30) < 8) & (np.abs(py - BOTTOM - 25) < 8)
    assert layers.void[middle].all()
    inner = np.abs(px - LEFT - 30) < 25
    assert not layers.void[inner & (np.abs(py - BOTTOM - 50) < 3)].any(), "2 m are no large void"
    assert not (layers.void & layers.valid).any()
    empty = ~layers.valid & ~layers.void
    assert empty.sum() > 2000
    # The part of a grid knows what lies beyond its edge.
    part_of = lidar_layers(tmp_path / "a.laz", GRID.crop(45, 50, (40, 30)))
    np.testing.assert_array_equal(part_of.void, layers.void[45:85, 50:80])


def test_days_of_the_flight(tmp_path, rng):
    fields = cloud(rng, per_m2=2)
    n = fields["x"].size
    standard, week = laspy.header.GpsTimeType.STANDARD, laspy.header.GpsTimeType.WEEK_TIME
    # 2021-06-30 23:59:00 UTC is 1,309,132,758 s after the GPS epoch, leap seconds included.
    late = np.full(n, 1_309_132_758.0 - 1e9)
    over = late + np.where(np.arange(n) < n // 2, 0, 90)
    assert lidar_layers(write(tmp_path / "a.laz", fields, gps=(standard, late)), GRID).days == (date(2021, 6, 30),) * 2
    dated = write(tmp_path / "b.laz", fields, gps=(standard, over))
    assert lidar_layers(dated, GRID).days == (date(2021, 6, 30), date(2021, 7, 1))
    assert lidar_layers(dated, GRID, options=LidarOptions(keep_points=0)).days == (date(2021, 6, 30), date(2021, 7, 1))
    undated = write(tmp_path / "c.laz", fields, gps=(week, np.full(n, 300_000.0)))
    assert lidar_layers(undated, GRID).days is None
    assert lidar_layers([dated, undated], GRID).days is None, "half of it known is not known"
    assert lidar_layers(write(tmp_path / "d.laz", fields, gps=(standard, np.zeros(n))), GRID).days is None


def test_rotated_grid_in_every_way(tmp_path, rng):
    fields = cloud(rng, per_m2=5)
    turned = GRID.transform @ Affine.translation(60, 20) @ Affine.rotation(30) @ Affine.scale(0.8)
    grid = Grid(crs=UTM, transform=turned, shape=(50, 60))
    cols, rows = np.meshgrid(np.arange(60) + 0.5, np.arange(50) + 0.5)
    truth = crown_m(*grid.xy(cols, rows))
    path = write(tmp_path / "a.laz", fields)
    for algorithm, options in itertools.product(("p2r", "pitfree"), (LidarOptions(), TIN)):
        chm = lidar_to_chm(path, grid, algorithm, options=options).to_numpy()
        assert np.nanmedian(np.abs(chm - truth)) < 1.0, "crowns of cones change by metres within a pixel"
        assert np.corrcoef(chm[np.isfinite(chm)], truth[np.isfinite(chm)])[0, 1] > 0.85

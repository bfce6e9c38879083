"""Splits: stable, seeded, and with nothing of one split within the buffer of another."""

import hashlib
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError
from pyproj import CRS, Transformer

from canopy.errors import RecipeError
from canopy.tiler.split import Place, SplitSettings, assign, block_of, crs_key, draw_split, site_folds, take_out_buffer

UTM17 = CRS.from_epsg(32617)
UTM18 = CRS.from_epsg(32618)


def settings(**changes):
    return SplitSettings(**{"seed": 1, "block_m": 200, "buffer_m": 30, "train": 0.6, "val": 0.2, "test": 0.2} | changes)


def place(name, x, y, *, side=60.0, site="A", crs=UTM17, item=None):
    half = side / 2
    return Place(
        id=name,
        site=site,
        item=item or name,
        crs=crs,
        centre_m=(x, y),
        footprint_m=(x - half, y - half, x + half, y + half),
    )


def gap_m(a, b):
    """Distance between two rectangles, edge to edge."""
    dx = max(a[0] - b[2], b[0] - a[2], 0.0)
    dy = max(a[1] - b[3], b[1] - a[3], 0.0)
    return float(np.hypot(dx, dy))


def leaks(places, splits, buffer_m):
    """Pairs of chips of different splits that lie within the buffer: the plain double loop."""
    kept = [(p, s) for p, s in zip(places, splits, strict=True) if s != "buffer"]
    return [
        (p.id, q.id)
        for i, (p, s) in enumerate(kept)
        for q, t in kept[i + 1 :]
        if s != t and gap_m(p.footprint_m, q.footprint_m) <= buffer_m
    ]


@st.composite
def many_places(draw):
    spots = draw(
        st.lists(st.tuples(st.integers(-900, 900), st.integers(-900, 900), st.integers(10, 150)), min_size=1, max_size=40)
    )
    return [place(f"c{i}", 500_000.0 + x, 4_000_000.0 + y, side=float(side)) for i, (x, y, side) in enumerate(spots)]


@given(many_places(), st.integers(0, 1000), st.integers(0, 200))
def test_no_chip_lies_within_the_buffer_of_another_split(places, seed, buffer_m):
    chosen = settings(seed=seed, buffer_m=buffer_m)
    drawn = [split for _, split in assign(places, chosen)]
    kept = take_out_buffer(places, drawn, buffer_m)
    assert not leaks(places, kept, buffer_m)
    for before, after in zip(drawn, kept, strict=True):
        assert after in (before, "buffer")  # no chip changes sides
        assert before != "test" or after == "test"  # the test set never shrinks


@given(many_places(), st.integers(0, 1000), st.integers(0, 200))
def test_a_chip_is_given_up_only_for_a_reason(places, seed, buffer_m):
    drawn = [split for _, split in assign(places, settings(seed=seed))]
    kept = take_out_buffer(places, drawn, buffer_m)
    rank = {"train": 0, "val": 1, "test": 2}
    for p, before, after in zip(places, drawn, kept, strict=True):
        if after == "buffer":
            assert any(
                rank[s] > rank[before] and t != "buffer" and gap_m(p.footprint_m, q.footprint_m) <= buffer_m
                for q, s, t in zip(places, drawn, kept, strict=True)
            )


def test_without_the_buffer_the_same_check_finds_leaks():
    """Negative control: blocks alone put neighbours into different splits."""
    places = [place(f"c{i}", 500_000.0 + 40 * i, 4_000_000.0) for i in range(60)]
    drawn = [split for _, split in assign(places, settings())]
    assert len(set(drawn)) == 3
    assert leaks(places, drawn, 30)
    assert not leaks(places, take_out_buffer(places, drawn, 30), 30)


def test_chips_that_touch_are_parted_also_where_their_edge_is_rounded():
    """Windows of 0.6 m pixels, edge to edge: as the lattice computes them, the same edge differs in its last bit."""
    edge, nearly = 302592.0, 302591.99999999994
    assert edge != nearly
    left = replace(place("l", 0, 0), footprint_m=(302438.4, 0.0, nearly, 153.6))
    right = replace(place("r", 0, 0), footprint_m=(edge, 0.0, 302745.6, 153.6))
    beyond = replace(place("b", 0, 0), footprint_m=(302592.6, 0.0, 302746.2, 153.6))
    assert take_out_buffer([left, right], ["train", "val"], 0.0) == ["buffer", "val"]
    assert take_out_buffer([left, beyond], ["train", "val"], 0.0) == ["train", "val"]


def test_the_buffer_reaches_across_coordinate_systems():
    """Two UTM zones overlap at their border: the same ground has two pairs of coordinates."""
    x, y = 800_000.0, 4_000_000.0
    there = Transformer.from_crs(UTM17, UTM18, always_xy=True).transform(x, y)
    same, far = place("b", *there, crs=UTM18), place("c", there[0] + 500, there[1], crs=UTM18)
    places = [place("a", x, y), same, far, place("d", 700_000.0, -4_000_000.0, crs=CRS.from_epsg(32757))]
    assert take_out_buffer(places, ["test", "train", "train", "train"], 10) == ["test", "buffer", "train", "train"]


@given(many_places(), st.integers(0, 1000), st.data())
def test_adding_chips_moves_no_other(places, seed, data):
    some = data.draw(st.lists(st.sampled_from(places), min_size=1, unique_by=lambda p: p.id))
    everything = {p.id: a for p, a in zip(places, assign(places, settings(seed=seed)), strict=True)}
    assert assign(some, settings(seed=seed)) == [everything[p.id] for p in some]


def test_seeds_draw_different_splits_in_the_asked_shares():
    blocks = [block_of(UTM17, (500_000.0 + 200 * i, 4_000_000.0), 200) for i in range(4000)]
    one, two = ([draw_split(block, settings(seed=seed)) for block in blocks] for seed in (1, 2))
    assert one != two
    for drawn in (one, two):
        shares = Counter(drawn)
        assert abs(shares["test"] / 4000 - 0.2) < 0.03
        assert abs(shares["val"] / 4000 - 0.2) < 0.03


def test_blocks_are_anchored_to_the_origin_of_the_crs():
    assert block_of(UTM17, (399.9, 0.1), 200) == "EPSG:32617/-1/1"
    assert block_of(UTM17, (400.0, -0.1), 200) == "EPSG:32617/0/2"
    assert block_of(UTM18, (400.0, -0.1), 200) != block_of(UTM17, (400.0, -0.1), 200)
    local = CRS.from_proj4("+proj=tmerc +lat_0=10 +lon_0=20 +datum=WGS84")
    assert crs_key(local).startswith("WKT:")
    assert crs_key(local) != crs_key(CRS.from_proj4("+proj=tmerc +lat_0=11 +lon_0=20 +datum=WGS84"))


def test_groups_share_one_split_also_through_a_common_member():
    places = [place(f"c{i}", 500_000.0 + 1000 * i, 4_000_000.0, item=f"plot{i}") for i in range(30)]
    alone = {split for _, split in assign(places, settings())[:12:3]}
    assert len(alone) > 1  # negative control: the seed parts them
    assigned = assign(places, settings(groups=[["plot0", "plot3"], ["c6", "c9"], ["c3", "c6"]]))
    assert len({assigned[i] for i in (0, 3, 6, 9)}) == 1
    untouched = [i for i in range(30) if i not in (0, 3, 6, 9)]
    assert [assigned[i] for i in untouched] == [assign(places, settings())[i] for i in untouched]


def test_explicit_sites_and_blocks_go_before_the_draw():
    places = [place(f"c{i}", 500_000.0 + 1000 * i, 4_000_000.0, site="AB"[i % 2]) for i in range(20)]
    block = block_of(UTM17, places[0].centre_m, 200)
    splits = [s for _, s in assign(places, settings(sites={"test": ["A"]}, blocks={"val": [block]}))]
    assert splits[0] == "val"
    assert set(splits[2::2]) == {"test"}
    assert splits[1::2] == [s for _, s in assign(places, settings())][1::2]


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"sites": {"test": ["B"]}}, "site 'B'"),
        ({"blocks": {"test": ["EPSG:32617/0/0"]}}, "block 'EPSG:32617/0/0'"),
        ({"groups": [["c0", "nobody"]]}, "'nobody'"),
    ],
)
def test_names_that_no_chip_has_are_refused(changes, named):
    with pytest.raises(RecipeError, match=named):
        assign([place("c0", 500_000.0, 4_000_000.0)], settings(**changes))


def test_a_group_pulled_apart_by_its_sites_is_refused():
    places = [place("c0", 0.0, 0.0, site="A"), place("c1", 0.0, 0.0, site="B")]
    with pytest.raises(RecipeError, match="group of 'c0' and 'c1'"):
        assign(places, settings(sites={"test": ["A"], "train": ["B"]}, groups=[["c0", "c1"]]))


@pytest.mark.parametrize(
    "changes",
    [
        {"train": 0.7},
        {"block_m": 0},
        {"buffer_m": -1},
        {"sites": {"test": ["A"], "val": ["A"]}},
        {"halo_m": 3},
        {"sites": {"tset": ["A"]}},
    ],
)
def test_impossible_settings_are_refused(changes):
    with pytest.raises(ValidationError):
        settings(**changes)


# --- whole sites, in folds


def site_places(names, per_site=3):
    return [
        place(f"{name}{i}", 500_000.0 + 10_000 * n + 100 * i, 4_000_000.0, site=name)
        for n, name in enumerate(names)
        for i in range(per_site)
    ]


def folds(k, n=4, **changes):
    return SplitSettings(
        **{"seed": 1, "block_m": 200, "buffer_m": 30, "method": "site-folds", "folds": n, "fold": k} | changes
    )


@given(st.integers(3, 30), st.integers(3, 8), st.integers(0, 1000))
def test_folds_partition_the_sites(count, n, seed):
    names = [f"S{i}" for i in range(max(count, n))]
    places = site_places(names)
    tested, validated = [], []
    for k in range(1, n + 1):
        splits = [split for _, split in assign(places, folds(k, n, seed=seed))]
        by_site = {name: {s for p, s in zip(places, splits, strict=True) if p.site == name} for name in names}
        assert all(len(found) == 1 for found in by_site.values())  # sites stay whole
        tested += [name for name, found in by_site.items() if found == {"test"}]
        validated += [name for name, found in by_site.items() if found == {"val"}]
        assert {s for found in by_site.values() for s in found} == {"train", "val", "test"}
    assert sorted(tested) == sorted(names)  # every site tests once
    assert sorted(validated) == sorted(names)


@given(st.integers(3, 40), st.integers(3, 8), st.integers(0, 1000))
def test_folds_differ_by_one_site_at_most(count, n, seed):
    units = [(f"S{i}",) for i in range(max(count, n))]
    sizes = Counter(site_folds(units, folds(1, n, seed=seed)).values())
    assert len(sizes) == n
    assert max(sizes.values()) - min(sizes.values()) <= 1


def test_a_new_site_displaces_few_others():
    """Dealing the sites in the order of their hashes is the control: it is as balanced, and a new site shifts half of it."""

    def in_turn(units, seed):
        order = sorted(units, key=lambda unit: hashlib.sha256(f"{seed}:{unit[0]}".encode()).digest())
        return {unit[0]: i % 5 for i, unit in enumerate(order)}

    units = [(f"S{i}",) for i in range(24)]
    moved, control = [], []
    for seed in range(40):
        chosen = folds(1, 5, seed=seed)
        for store, draw in ((moved, lambda u: site_folds(u, chosen)), (control, lambda u: in_turn(u, seed))):  # noqa: B023
            before, after = draw(units), draw([*units, ("NEW",)])
            store.append(np.mean([before[unit[0]] != after[unit[0]] for unit in units]))
    assert np.mean(moved) < 0.2
    assert np.mean(control) > 0.3


def test_sites_of_a_group_share_a_fold():
    places = site_places([f"S{i}" for i in range(9)])
    units = [(f"S{i}",) for i in range(9)]
    alone = site_folds(units, folds(1))
    other = next(name for name in alone if alone[name] != alone["S0"])  # negative control: drawn apart
    for k in range(1, 5):
        splits = dict(zip([p.site for p in places], assign(places, folds(k, groups=[["S00", f"{other}1"]])), strict=True))
        assert splits["S0"][1] == splits[other][1]


def test_a_named_site_leaves_the_folds():
    places = site_places([f"S{i}" for i in range(6)])
    for k in range(1, 5):
        splits = {p.site: s for p, (_, s) in zip(places, assign(places, folds(k, sites={"train": ["S2"]})), strict=True)}
        assert splits["S2"] == "train"


def test_too_few_sites_for_the_folds_are_refused():
    with pytest.raises(RecipeError, match="2 sites that may be parted make no 4 folds"):
        assign(site_places("AB"), folds(1))


@pytest.mark.parametrize(
    "changes",
    [
        {"fold": 0},
        {"fold": 5},
        {"folds": 2, "fold": 1},
        {"train": 1.0},
        {"blocks": {"test": ["EPSG:32617/0/0"]}},
        {"method": "hash"},
        {"method": "random"},
        {"class_limits_m": (3.0, 3.0)},
    ],
)
def test_impossible_folds_are_refused(changes):
    with pytest.raises(ValidationError):
        folds(**{"k": 1} | ({"k": changes.pop("fold")} if "fold" in changes else {}), **changes)


# --- blocks, balanced by height


def tall_and_low(seed, count=300):
    """Chips of which few are tall, neighbours alike: where chance hurts."""
    rng = np.random.default_rng(seed)
    stands_m = rng.gamma(1.5, 8.0, (count // 5,))
    return [
        replace(place(f"c{i}", 500_000.0 + 60 * i, 4_000_000.0, side=20.0), height_p95_m=float(stands_m[i // 5]))
        for i in range(count)
    ]


def imbalance(places, splits, limits_m=(2.0, 10.0, 20.0, 30.0)):
    """Largest difference between a split's share of a height class and its share of the recipe, over classes and splits."""
    classes = np.digitize([p.height_p95_m for p in places], limits_m)
    wanted = {"train": 0.6, "val": 0.2, "test": 0.2}
    return max(
        abs(np.mean([s == split for s, c in zip(splits, classes, strict=True) if c == kind]) - share)
        for kind in set(classes)
        for split, share in wanted.items()
    )


def test_stratified_splits_are_better_balanced_than_hashed_ones():
    hashed, dealt = [], []
    for seed in range(10):
        places = tall_and_low(seed)
        for store, method in ((hashed, "hash"), (dealt, "stratified")):
            splits = [s for _, s in assign(places, settings(seed=seed, method=method))]
            store.append(imbalance(places, splits))
    assert np.mean(dealt) < 0.5 * np.mean(hashed)  # the hash is the control
    assert all(a <= b for a, b in zip(dealt, hashed, strict=True))


@given(many_places(), st.integers(0, 1000), st.integers(0, 200), st.data())
def test_stratified_splits_keep_blocks_and_buffers(places, seed, buffer_m, data):
    heights = data.draw(st.lists(st.floats(0, 60), min_size=len(places), max_size=len(places)))
    places = [replace(p, height_p95_m=h) for p, h in zip(places, heights, strict=True)]
    chosen = settings(seed=seed, buffer_m=buffer_m, method="stratified")
    assigned = assign(places, chosen)
    assert assigned == assign(places, chosen)
    assert assign(places[::-1], chosen) == assigned[::-1]  # the order of the chips does not matter
    by_block = {}
    for block, split in assigned:
        assert by_block.setdefault(block, split) == split
    assert not leaks(places, take_out_buffer(places, [s for _, s in assigned], buffer_m), buffer_m)


def test_stratified_splits_keep_groups_and_names():
    places = tall_and_low(3)
    blocks = [block for block, _ in assign(places, settings())]
    chosen = settings(
        method="stratified", groups=[["c0", "c150"], ["c150", "c280"]], blocks={"test": [blocks[20]]}, sites={"val": []}
    )
    assigned = assign(places, chosen)
    assert len({assigned[i] for i in (0, 150, 280)}) == 1
    assert len({blocks[i] for i in (0, 150, 280)}) == 3  # negative control: three blocks without the groups
    assert assigned[20][1] == "test"


def test_a_split_without_a_share_gets_nothing():
    splits = Counter(s for _, s in assign(tall_and_low(1), settings(method="stratified", train=0.8, val=0.0)))
    assert splits["val"] == 0
    assert splits["test"] > 0


def test_a_chip_without_height_cannot_be_stratified():
    with pytest.raises(RecipeError, match="'c0' has no 95th percentile"):
        assign([place("c0", 0.0, 0.0)], settings(method="stratified"))


def test_hashed_splits_stay_what_they_were():
    """The draw is part of every published tile set."""
    blocks = [f"EPSG:32617/{i}/0" for i in range(12)]
    assert [draw_split(block, settings(seed=3))[:2] for block in blocks] == [
        "te",
        "va",
        "tr",
        "tr",
        "va",
        "tr",
        "va",
        "te",
        "tr",
        "te",
        "tr",
        "te",
    ]

"""How unlike the calibration data a place is: distances against SciPy, rates on known distributions, the file of it all."""

import shutil

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.spatial.distance import mahalanobis

from canopy.errors import ContractError, RecipeError
from canopy.model.package import load_model, read_contract, save_model, update_contract
from canopy.model.shift import (
    FILE,
    FLAG_SHARE,
    LEAST_SQUARES,
    MANY_SITES,
    Shift,
    SiteSquares,
    fit_shift,
    held_out_distances,
    load_shift,
    save_shift,
    shift_bytes,
    shift_score,
    unlikeness,
)
from canopy.model.squares import feature_names

BANDS = 3
FEATURES = len(feature_names(BANDS))
MIXING = np.random.default_rng(1).normal(size=(FEATURES, FEATURES)) + 3 * np.eye(FEATURES)
"""What makes features correlated."""


def squares(count, seed, *, centre=0.0, scale=1.0, per_block=4):
    """Squares of a site around `centre` with correlated features."""
    rng = np.random.default_rng(seed)
    features = centre + scale * rng.normal(size=(count, FEATURES)) @ MIXING / 3
    return SiteSquares(features=features.astype(np.float32), block=np.arange(count) // per_block)


def site(seed, *, count=60, apart=1.5):
    """A site drawn from one distribution of sites."""
    return squares(count, seed, centre=apart * np.random.default_rng([seed, 1]).normal(size=FEATURES))


def nearest(reference, row):
    """The distance as SciPy has it, site by site."""
    inverse = reference.whitening.astype(np.float64) @ reference.whitening.T.astype(np.float64)
    found = []
    for centre, scale in zip(reference.centre.astype(np.float64), reference.scale.astype(np.float64), strict=True):
        found.append(mahalanobis(row, centre, inverse / np.outer(scale, scale)))
    return min(found)


def test_distances_are_mahalanobis_distances_to_the_nearest_site():
    reference = fit_shift({"a": squares(80, 1), "b": squares(30, 2, centre=9.0, scale=0.3)})
    rows = np.concatenate([squares(5, 3).features, squares(5, 4, centre=9.0).features, squares(5, 5, centre=4.0).features])
    expected = [nearest(reference, row.astype(np.float64)) / reference.limit for row in rows]
    assert unlikeness(rows, reference) == pytest.approx(expected, rel=1e-6)


def test_the_correlations_are_those_of_the_squares():
    """Along a direction in which squares hardly vary, a short step is far; along another it is not."""
    reference = fit_shift({"a": squares(4000, 1)})
    values, vectors = np.linalg.eigh(np.cov((np.eye(FEATURES) @ MIXING / 3).T, bias=True))
    steps = np.array([vectors[:, 0], vectors[:, -1]]) * 1.0
    near, far = unlikeness((steps[::-1]).astype(np.float32), reference)
    assert values[0] < values[-1] / 20
    assert far > 3 * near


def test_five_percent_of_held_out_squares_are_beyond_the_limit_whichever_site_is_larger():
    sites = {"large": squares(2000, 1), "small": squares(100, 2, centre=20.0)}
    reference = fit_shift(sites)
    assert reference.held_out == "blocks"
    beyond = {name: (d > reference.limit).mean() for name, d in held_out_distances(sites, "blocks").items()}
    assert np.mean(list(beyond.values())) == pytest.approx(0.05, abs=0.006)


def test_unseen_squares_of_a_calibration_site_are_like_it_and_moved_ones_are_not():
    reference = fit_shift({"a": squares(300, 1), "b": squares(300, 2, centre=20.0)})
    unseen = shift_score(squares(500, 3, centre=20.0).features, reference)
    assert unseen.flagged is False
    assert 0.01 < unseen.share < 0.12
    for centre in (10.0, 40.0):  # between the two as well: one ellipsoid around both would call it the very middle
        moved = shift_score(squares(500, 4, centre=centre).features, reference)
        assert moved.flagged is True
        assert moved.share == 1
        assert moved.median > 2


def test_a_square_far_in_one_feature_only_is_seen():
    reference = fit_shift({"a": squares(400, 1)})
    row = np.zeros((1, FEATURES), np.float32)
    assert unlikeness(row, reference) < 1
    row[0, 5] = 12
    assert unlikeness(row, reference) > 1


def test_sites_of_one_distribution_are_flagged_no_more_often_than_said():
    """Twelve sites calibrate, forty others come from the same distribution of sites."""
    reference = fit_shift({str(k): site(k) for k in range(12)})
    assert reference.held_out == "sites"
    new = [shift_score(site(100 + k).features, reference) for k in range(40)]
    assert np.mean([shift.flagged for shift in new]) <= 0.1
    assert 0.01 < np.mean([shift.share for shift in new]) < 0.12
    other = [shift_score(site(200 + k, apart=6.0).features, reference) for k in range(10)]
    assert all(shift.flagged for shift in other)


def test_few_sites_cannot_tell_what_the_next_one_is_like():
    """Of the same distribution, but four of them: most others are held to be unlike, and so would each of the four be."""
    reference = fit_shift({str(k): site(k) for k in range(4)})
    assert reference.held_out == "blocks"
    assert np.mean([shift_score(site(100 + k).features, reference).flagged for k in range(20)]) > 0.5
    assert len(reference.flagged_elsewhere) >= 3
    assert MANY_SITES > 4


def test_a_site_of_one_square_has_the_scale_of_the_others():
    sites = {"a": squares(100, 1), "b": squares(100, 2, centre=30.0), "plot": squares(1, 3, centre=60.0)}
    reference = fit_shift(sites)
    assert reference.squares == (100, 100, 1)
    assert shift_score(squares(200, 4, centre=60.0).features, reference).median < 2
    assert shift_score(squares(200, 4, centre=90.0).features, reference).flagged


@given(st.randoms(use_true_random=False), st.integers(0, 40))
def test_a_score_does_not_depend_on_order_or_grouping(random, count):
    reference = _SMALL
    features = squares(count, 7, centre=0.5).features
    order = list(range(count))
    random.shuffle(order)
    cut = random.randint(0, count)
    parts = [unlikeness(features[order][:cut], reference), unlikeness(features[order][cut:], reference)]
    assert Shift.of(np.concatenate(parts)) == shift_score(features, reference)
    assert sorted(np.concatenate(parts).tobytes()) == sorted(unlikeness(features, reference).tobytes())


_SMALL = fit_shift({"a": squares(60, 1)})


def test_a_place_is_flagged_from_half_of_its_squares_on():
    assert FLAG_SHARE == 0.5
    for beyond, flagged in ((4, False), (5, True)):
        shift = Shift.of(np.array([2.0] * beyond + [0.5] * (10 - beyond)))
        assert (shift.squares, shift.beyond, shift.flagged) == (10, beyond, flagged)
    nothing = Shift.of(np.zeros(0))
    assert (nothing.share, nothing.flagged, nothing.median) == (None, None, None)


def test_too_few_squares_are_refused_with_the_remedy():
    with pytest.raises(RecipeError, match=rf"^{LEAST_SQUARES - 1} held-out squares .* {LEAST_SQUARES} are needed; hold out"):
        fit_shift({"a": squares(LEAST_SQUARES - 1, 1)})


# --- the file, and the model that has it -----------------------------------------------------------------------------------


def test_a_reference_comes_back_from_its_file(tmp_path):
    reference = fit_shift({"a": squares(60, 1), "b": squares(40, 2, centre=3.0)})
    again = load_shift(save_shift(tmp_path, reference))
    assert shift_bytes(again) == shift_bytes(reference)
    features = squares(50, 3).features
    assert unlikeness(features, again).tobytes() == unlikeness(features, reference).tobytes()
    assert np.isnan(load_shift(save_shift(tmp_path, _SMALL)).beyond_elsewhere[0])
    many = fit_shift({str(k): site(k, count=20) for k in range(50)})
    assert len(shift_bytes(many)) < 20_000


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (lambda content: content[:-8], "no reference"),
        (lambda content: content.replace(b'\\"spread\\"', b'\\"sprawl\\"'), "other features"),
        (lambda content: content.replace(b'\\"limit\\"', b'\\"lemit\\"'), "no reference"),
        (lambda content: content[:-4] + np.float32(np.nan).tobytes(), "NaN"),
        (lambda content: content.replace(b'"centre"', b'"center"'), "not float32"),
    ],
)
def test_a_damaged_file_is_refused_in_one_line(tmp_path, damage, says):
    content = shift_bytes(_SMALL)
    path = tmp_path / FILE
    path.write_bytes(damage(content))
    assert path.read_bytes() != content
    with pytest.raises(ContractError, match=says) as refused:
        load_shift(path)
    assert "\n" not in str(refused.value)
    assert str(path) in str(refused.value)


@pytest.fixture
def folder(tiny_model, tmp_path):
    shutil.copytree(tiny_model, tmp_path / "model")
    return tmp_path / "model"


def described(folder):
    """Puts a reference into a model's folder."""
    import hashlib

    path = save_shift(folder, _SMALL)
    update_contract(folder, read_contract(folder), shift_sha256=hashlib.sha256(path.read_bytes()).hexdigest())
    return path


def test_a_model_without_a_reference_loads_as_before(folder):
    assert load_model(folder).shift is None
    assert "shift" not in (folder / "model.toml").read_text()


def test_a_model_has_its_reference_or_is_refused(folder):
    path = described(folder)
    assert load_model(folder).shift.sites == ("a",)
    path.write_bytes(shift_bytes(fit_shift({"other": squares(60, 9)})))
    with pytest.raises(ContractError, match=r"is not the file that model\.toml names"):
        load_model(folder)
    path.unlink()
    with pytest.raises(ContractError, match="is missing"):
        load_model(folder)
    update_contract(folder, read_contract(folder), shift_sha256=None)
    save_shift(folder, _SMALL)
    with pytest.raises(ContractError, match=r"is not in model\.toml; remove it"):
        load_model(folder)


def test_a_saved_model_keeps_the_reference_it_is_given_and_no_other(folder):
    described(folder)
    model = load_model(folder)
    given = {
        "network": model.network, "contract": model.contract, "card": "# tiny\n",
        "fixture_image": np.random.default_rng(7).integers(0, 256, (3, 64, 64), dtype=np.uint8), "overwrite": True,
    }  # fmt: skip
    save_model(folder, shift=_SMALL, **given)
    assert load_model(folder).shift.sites == ("a",)
    save_model(folder, **given)
    assert load_model(folder).shift is None
    assert not (folder / FILE).exists()

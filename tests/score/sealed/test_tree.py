"""The hash tree against the definition of RFC 6962 written out, and what must change its root."""

import hashlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from canopy.score.sealed.tree import keyed, leaf_hash, node_hash, salt_of, tree_root

SECRET = bytes(32)
LEAVES = st.lists(st.binary(min_size=32, max_size=32), min_size=1, max_size=40)


def sha(data):
    return hashlib.sha256(data).digest()


def test_the_root_of_seven_leaves_is_what_the_rfc_draws():
    d = [leaf_hash(bytes([k]), SECRET) for k in range(7)]
    g, h, i = (sha(b"\1" + d[k] + d[k + 1]) for k in (0, 2, 4))
    k, left = sha(b"\1" + i + d[6]), sha(b"\1" + g + h)
    assert tree_root(d) == sha(b"\1" + left + k)


@given(LEAVES, st.data())
def test_any_other_leaf_gives_another_root(leaves, data):
    at = data.draw(st.integers(0, len(leaves) - 1))
    changed = [*leaves]
    changed[at] = data.draw(st.binary(min_size=32, max_size=32).filter(lambda leaf: leaf != leaves[at]))
    assert tree_root(changed) != tree_root(leaves)
    assert tree_root([*leaves, leaves[-1]]) != tree_root(leaves)


def test_a_node_is_no_leaf():
    left, right = sha(b"a"), sha(b"b")
    assert node_hash(left, right) != leaf_hash(left[:0] + right, left)  # the same bytes but for the first
    assert tree_root([left, right]) != sha(left + right)


def test_without_the_salt_a_guess_cannot_be_confirmed():
    meadow = bytes(64)
    published = leaf_hash(meadow, salt_of(b"\7" * 32, "chip-1"))
    assert published == leaf_hash(meadow, salt_of(b"\7" * 32, "chip-1"))
    assert published != leaf_hash(meadow, bytes(32))
    assert published != leaf_hash(meadow, salt_of(b"\7" * 32, "chip-2")), "equal labels have equal leaves"


def test_salts_have_one_length_and_purposes_do_not_meet():
    with pytest.raises(AssertionError, match="32 bytes"):
        leaf_hash(b"", b"short")
    assert keyed(SECRET, "salt", "x") != keyed(SECRET, "order", "x")

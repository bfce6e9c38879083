"""A hash tree over sealed values: one root binds them all, and says nothing about any of them.

Hashes are SHA-256 and told apart as in RFC 6962, section 2.1: a leaf is the hash of a 0 byte and its data, a node that of
a 1 byte and its children, so that no node can be passed off as a leaf. The tree of n leaves is split at the largest power of
two below n.

Why salts: heights of a chip can be guessed (all zero in a meadow) or recomputed from public LiDAR, and a bare hash would
confirm the guess. The salt of a leaf is 32 secret bytes before its data, drawn from one secret by HMAC: one leaf can be
opened to somebody without opening the others.
"""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Sequence

SALT_BYTES = 32
"""Length of a secret and of every salt; fixed, so that salt and data cannot be shifted against each other."""


def salt_of(secret: bytes, name: str) -> bytes:
    """The salt of the leaf `name`: HMAC-SHA-256 of its name under the secret."""
    return keyed(secret, "salt", name)


def keyed(secret: bytes, purpose: str, name: str) -> bytes:
    """32 bytes that depend on the secret, a purpose and a name, and tell nothing of the secret."""
    assert len(secret) == SALT_BYTES, f"a secret has {SALT_BYTES} bytes, not {len(secret)}"
    return hmac.digest(secret, f"{purpose}\0{name}".encode(), "sha256")


def leaf_hash(data: bytes, salt: bytes) -> bytes:
    """Hash of one sealed value."""
    assert len(salt) == SALT_BYTES, f"a salt has {SALT_BYTES} bytes, not {len(salt)}"
    return hashlib.sha256(b"\x00" + salt + data).digest()


def node_hash(left: bytes, right: bytes) -> bytes:
    """Hash of two subtrees."""
    return hashlib.sha256(b"\x01" + left + right).digest()


def tree_root(leaves: Sequence[bytes]) -> bytes:
    """The root over leaf hashes in their order."""
    assert leaves, "a tree has at least one leaf"
    if len(leaves) == 1:
        return leaves[0]
    split = 1 << (len(leaves) - 1).bit_length() - 1
    return node_hash(tree_root(leaves[:split]), tree_root(leaves[split:]))

"""The Merkle-sum tree of rewards, byte for byte as the contract checks it. Knows no peer, round or chain.

A leaf stands at its member's registry index. Every node is hashed together with the sums of both its children, so that
"the leaves sum to the announced total" is a property of the root: a tree whose leaves pay more than its root announces
has no valid proof. The law: node = keccak256(left digest, left sums, right digest, right sums), leaf = keccak256 twice.
"""

from collections.abc import Sequence
from functools import lru_cache

import msgspec
from eth_hash.auto import keccak

from p2pfm.settlement.ledger import LeafValue, Sums
from p2pfm.types import Digest, MemberIndex, Wei

AMOUNT_MAX = 2**128 - 1
"""Wei and sums are 128-bit on chain: two fit a storage slot [wei]."""

EMPTY_ROOT = Digest(bytes(32))
"""Digest of a tree without leaves, and of padding: no 32-byte keccak preimage is known for it."""


_hash = lru_cache(maxsize=2**15)(keccak)
"""A tree is built again for every proposal and every proof, and little of it has changed (30 us a hash in Python)."""


class Node(msgspec.Struct, frozen=True):
    """A subtree: its digest and what its leaves add up to."""

    digest: Digest
    sums: Sums


EMPTY = Node(EMPTY_ROOT, Sums(Wei(0), Wei(0), 0))

Levels = tuple[tuple[Node, ...], ...]
"""levels[0]: one node a leaf, in registry order; levels[-1]: the root alone."""


def compute_leaf_node(leaf: LeafValue) -> Node:
    """The node of one leaf; only a positive contribution enters the sums, and nothing of what is for serving.

    Raises:
        ValueError: a value does not fit its type on chain (uint128, uint128, int128, uint128).
    """
    amounts = (leaf.cumulative_wei, leaf.reward_wei, leaf.served_wei)
    if min(amounts) < 0 or max(amounts) > AMOUNT_MAX:
        raise ValueError(f"expected wei of 0 to 2**128 - 1, got {', '.join(map(str, amounts))}")
    if not -(2**127) <= leaf.contribution < 2**127:
        raise ValueError(f"expected a contribution of at most 127 bits, got {leaf.contribution}")
    encoded = (
        leaf.cumulative_wei.to_bytes(32, "big")
        + leaf.reward_wei.to_bytes(32, "big")
        + leaf.contribution.to_bytes(32, "big", signed=True)
        + leaf.served_wei.to_bytes(32, "big")
    )
    sums = Sums(leaf.cumulative_wei, leaf.reward_wei, max(0, leaf.contribution))
    return Node(Digest(_hash(_hash(encoded))), sums)


def compute_parent(left: Node, right: Node) -> Node:
    """The node above two. Raises: ValueError if a sum overflows 128 bits (the contract would revert)."""
    sums = Sums(
        Wei(left.sums.cumulative_wei + right.sums.cumulative_wei),
        Wei(left.sums.reward_wei + right.sums.reward_wei),
        left.sums.contribution + right.sums.contribution,
    )
    if max(sums.cumulative_wei, sums.reward_wei, sums.contribution) > AMOUNT_MAX:
        raise ValueError("the leaves sum to more than 2**128 - 1")
    return Node(Digest(_hash(_encode(left) + _encode(right))), sums)


def build(leaves: Sequence[LeafValue]) -> Levels:
    """All levels of the tree, padded with EMPTY to a power of two. Raises: ValueError (see compute_leaf_node)."""
    level = tuple(compute_leaf_node(leaf) for leaf in leaves) or (EMPTY,)
    levels = [level]
    while len(level) > 1:
        padded = level if len(level) % 2 == 0 else (*level, EMPTY)
        level = tuple(compute_parent(padded[i], padded[i + 1]) for i in range(0, len(padded), 2))
        levels.append(level)
    return tuple(levels)


def compute_root(leaves: Sequence[LeafValue]) -> Node:
    """Digest and sums of the whole tree; no leaves give `EMPTY`. Raises: ValueError (see compute_leaf_node)."""
    return build(leaves)[-1][0]


def prove(levels: Levels, index: MemberIndex) -> tuple[Node, ...]:
    """The siblings from the leaf at `index` up to the root. Raises: IndexError if there is no such leaf."""
    if not 0 <= index < len(levels[0]) or levels[0] == (EMPTY,):
        raise IndexError(f"expected a leaf of 0 to {len(levels[0]) - 1}, got {index}")
    siblings = []
    position = int(index)
    for level in levels[:-1]:
        sibling = position ^ 1
        siblings.append(level[sibling] if sibling < len(level) else EMPTY)
        position //= 2
    return tuple(siblings)


def compute_height(num_leaves: int) -> int:
    """How many siblings a proof has: the height of a tree with so many leaves."""
    return max(0, num_leaves - 1).bit_length()


def verify(
    root: Digest, sums: Sums, num_leaves: int, index: MemberIndex, leaf: LeafValue, siblings: Sequence[Node]
) -> bool:
    """Whether `leaf` stands at `index` of the tree of `num_leaves` leaves with this root digest and these sums."""
    if not 0 <= index < num_leaves or len(siblings) != compute_height(num_leaves):
        return False
    try:
        node = compute_leaf_node(leaf)
        for height, sibling in enumerate(siblings):
            is_right = index >> height & 1
            node = compute_parent(sibling, node) if is_right else compute_parent(node, sibling)
    except (ValueError, OverflowError):
        return False
    return node == Node(root, sums)


def _encode(node: Node) -> bytes:
    sums = node.sums
    return (
        node.digest
        + sums.cumulative_wei.to_bytes(16, "big")
        + sums.reward_wei.to_bytes(16, "big")
        + sums.contribution.to_bytes(32, "big")
    )

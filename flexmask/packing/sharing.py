"""Which trees begin alike, so that they are worth a common tree."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from hashlib import blake2b

import numpy as np

from ..mask import BLOCK_SIZE
from ..tree import TokenTree, common_prefix_length

# Tokens of a common beginning. With fewer, the attention of every block of queries visits one tile more, for the keys of that
# beginning, and so pays more than is saved; a word or two all conversations of a template have in common.
LEAST_SHARED = BLOCK_SIZE


@dataclass
class Group:
    """Trees that begin alike.

    Attributes:
        outer: the group around it, None for the group of all.
        shared: how many tokens all of them have in common, their beginning and whatever else.
        alone: those that are in no group inside.
    """

    outer: Group | None
    shared: int
    alone: list[int] = field(default_factory=list)


def groups(count: int, trunk: Callable[[int], np.ndarray], tree: Callable[[int], TokenTree]) -> list[Group]:
    """All groups, outer ones before those within; the first is that of all trees, with nothing in common.

    A group shares at least LEAST_SHARED tokens of beginning more than the one around it. It is found by the trunks, one path of
    each tree; the trees of it may have branches in common, too, and those count. What only some of them share beside that, less
    than another group would be worth, does not: a common tree may turn out smaller than counted, never larger.

    Args:
        count: of trees.
        trunk: of a tree, the tokens of one of its paths, integers (n,).
        tree: the tree itself; called for few.
    """
    found = [Group(None, 0)]
    pending: list[tuple[Group, int, Iterable[int]]] = [(found[0], 0, range(count))]
    while pending:
        group, depth, members = pending.pop()
        by_next: dict[bytes, list[int]] = {}
        for i in members:
            following = trunk(i)[depth : depth + LEAST_SHARED]
            if len(following) < LEAST_SHARED:
                group.alone.append(i)
            else:
                # A digest, as there are as many as trees; if two were equal by chance, their beginning below would be short.
                digest = blake2b(following.astype(np.int64).tobytes(), digest_size=16).digest()
                by_next.setdefault(digest, []).append(i)
        for alike in by_next.values():
            if len(alike) == 1:
                group.alone += alike
                continue
            beginning = trunk(alike[0])
            for i in alike[1:]:
                beginning = beginning[: common_prefix_length(beginning, trunk(i))]
            found.append(Group(group, _common_tokens(alike, len(beginning), tree)))
            pending.append((found[-1], len(beginning), alike))
    return found


def _common_tokens(members: Sequence[int], at_least: int, tree: Callable[[int], TokenTree]) -> int:
    """How many tokens all trees have in common: with the same ancestors."""
    common = np.sort(_identities(tree(members[0])))
    # A row of a stream is several trees, which may begin alike a little.
    common = common[np.append(True, common[1:] != common[:-1])]
    for i in members[1:]:
        if len(common) == at_least:
            break
        others = np.sort(_identities(tree(i)))
        places = np.searchsorted(others, common)
        common = common[others[np.minimum(places, len(others) - 1)] == common]
    return len(common)


@functools.cache  # for powers of two, which together are twice the largest
def _powers(count: int) -> np.ndarray:
    """uint64[count]: factor, factor², …; the factor is any odd number of 64 bits without a pattern."""
    return np.multiply.accumulate(np.full(count, 0x9E3779B97F4A7C15, np.uint64))


def _identities(tree: TokenTree) -> np.ndarray:
    """uint64[L], the same for tokens with the same ancestors in any tree: Σ mixed(token) · factor^(position + 1) over a path."""
    positions = tree.position_ids
    mixed = (tree.input_ids.astype(np.uint64) + np.uint64(1)) * np.uint64(0xD6E8FEB86659FD93)
    mixed ^= mixed >> np.uint64(32)
    length = tree.max_length
    mixed *= _powers(1 << length.bit_length())[positions]
    found, path = np.empty_like(mixed), np.zeros(length + 1, np.uint64)  # path[n]: of its first n tokens
    # Of chains; any other token is the child of the one before.
    starts = np.append(0, np.flatnonzero(positions[1:] != positions[:-1] + 1) + 1)
    for start, stop in zip(starts.tolist(), [*starts[1:].tolist(), len(positions)], strict=True):
        depth = positions[start]
        found[start:stop] = path[depth] + mixed[start:stop].cumsum()
        path[depth + 1 : depth + 1 + stop - start] = found[start:stop]
    return found

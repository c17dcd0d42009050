"""Trees -> rows, with those together that begin alike, so that their common beginning is there once."""

from __future__ import annotations

import bisect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from ..tree import TokenTree
from .sharing import groups
from .splitting import part_of, split_passes


def pack(trees: Sequence[TokenTree], max_tokens: int) -> Rows:
    """Fill rows with trees.

    Trees that begin with the same tokens, at least a block of attention of them (`sharing.LEAST_SHARED`), become one tree where
    they are in one row, and those that share most are put together first: samples of one conversation, then conversations
    with the same system prompt and tools. Beyond that it is best fit: the largest first, each into the fullest row that still
    has room. Losses, weights and the passes of a conversation stay what they are; a token that several conversations supervise
    in the same context is one target with all their weights.

    Args:
        trees: what to pack. Nothing is dropped or cut; a tree larger than a row is split (see `split`).
        max_tokens: tokens in a row, at most; a multiple of 128 leaves the least padding.

    Returns:
        Rows (forests), ordered by the first tree, or part of one, in them. Only the plan is made; a row is when it is asked
        for, so that trees on disk stay there.

    Raises:
        ValueError: naming a tree of which a single pass is longer than a row, or that is larger and has no targets.
    """
    lengths = getattr(trees, "lengths", None)
    parts: list[_Part] = []
    trunks: dict[int, np.ndarray] = {}
    for index, size in enumerate(map(len, trees) if lengths is None else lengths.tolist()):
        if size <= max_tokens:
            parts.append(_Part(index, None, size))
            continue
        tree = trees[index]
        try:
            of_tree = split_passes(tree, max_tokens)
        except ValueError as error:
            raise ValueError(f"tree {index}: {error}") from error
        paths = tree.paths()
        for passes, of_part in of_tree:
            trunks[len(parts)] = tree.input_ids[paths[passes[0]]]
            parts.append(_Part(index, passes, of_part))

    of_tree = trees.trunk if hasattr(trees, "trunk") else [tree.trunk for tree in trees].__getitem__

    def trunk(i: int) -> np.ndarray:
        return trunks[i] if i in trunks else of_tree(parts[i].tree)

    found = groups(len(parts), trunk, lambda i: parts[i].of(trees))
    members = {id(group): [_Family([i], parts[i].tokens) for i in group.alone] for group in found}
    for group in reversed(found[1:]):  # what is inside comes before what is around it
        for bin_ in _best_fit(members[id(group)], max_tokens, group.shared):
            together = sum(family.tokens - group.shared for family in bin_) + group.shared
            members[id(group.outer)].append(_Family(sorted(i for family in bin_ for i in family.parts), together))
    rows = [sorted(bin_) for bin_ in _best_fit(members[id(found[0])], max_tokens)]
    rows.sort()
    plan = [[[parts[i] for i in family.parts] for family in row] for row in rows]
    return Rows(trees, plan, [sum(family.tokens for family in row) for row in rows])


def join(trees: Sequence[TokenTree]) -> TokenTree:
    """All of them in one row, as `pack` puts them there."""
    return pack(trees, sum(map(len, trees)))[0]


class _Part(NamedTuple):
    """A tree, or some of its passes, and how many tokens it has."""

    tree: int
    passes: Sequence[int] | None
    tokens: int

    def of(self, trees: Sequence[TokenTree]) -> TokenTree:
        return trees[self.tree] if self.passes is None else part_of(trees[self.tree], self.passes)


@dataclass(frozen=True, order=True)
class _Family:
    """Parts that become one tree, ascending, and how many tokens that has, at most."""

    parts: list[int]
    tokens: int


def _best_fit(families: Sequence[_Family], max_tokens: int, shared: int = 0) -> list[list[_Family]]:
    """Bins of at most `max_tokens`, in each of which the tokens that all families share count once."""
    bins: list[list[_Family]] = []
    room: list[tuple[int, int]] = []  # (free tokens, bin), ascending
    for family in sorted(families, key=lambda family: -family.tokens):
        size = family.tokens - shared
        fullest = bisect.bisect_left(room, (size, -1))
        if fullest == len(room):
            bins.append([family])
            bisect.insort(room, (max_tokens - shared - size, len(bins) - 1))
        else:
            free, at = room.pop(fullest)
            bins[at].append(family)
            bisect.insort(room, (free - size, at))
    return bins


class Rows(Sequence):
    """Packed rows: a `train_dataset`. Each is put together when it is asked for.

    Attributes:
        lengths: int64, tokens of each, at most: trees may have a little more in common than was counted (`sharing.groups`).
        split: how many trees were larger than a row.
        shared: how many tokens are not there again, because trees begin alike; at least.
    """

    def __init__(self, trees: Sequence[TokenTree], plan: Sequence[Sequence[Sequence[_Part]]], lengths: Sequence[int]):
        self._trees = trees
        self._plan = plan
        self.lengths = np.array(lengths, np.int64)
        parts = [part for row in plan for family in row for part in family]
        self.split = len({part.tree for part in parts if part.passes is not None})
        self.shared = sum(part.tokens for part in parts) - int(self.lengths.sum())

    @property
    def visible_pairs(self) -> np.ndarray:
        """int64, of each row those of its trees (`TokenTree.visible_pairs`), as if they shared nothing; of a part of a tree in
        proportion to its tokens."""
        of_tree = getattr(self._trees, "visible_pairs", None)
        of_tree = np.array([tree.visible_pairs for tree in self._trees]) if of_tree is None else of_tree
        lengths = getattr(self._trees, "lengths", None)
        lengths = np.array(list(map(len, self._trees))) if lengths is None else lengths
        parts = ([part for family in row for part in family] for row in self._plan)
        return np.array(
            [sum(int(of_tree[p.tree]) * p.tokens // int(lengths[p.tree]) for p in row) for row in parts], np.int64
        )

    def __len__(self) -> int:
        return len(self._plan)

    def __getitem__(self, index):
        if isinstance(index, slice):
            return Rows(self._trees, self._plan[index], self.lengths[index])
        families = [[part.of(self._trees) for part in family] for family in self._plan[index]]
        return TokenTree.concat([family[0] if len(family) == 1 else TokenTree.merge(family) for family in families])

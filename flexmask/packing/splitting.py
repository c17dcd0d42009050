"""A tree that is larger than a row -> several parts, with as few tokens repeated as can be."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import numpy as np

from ..tree import TokenTree

EXACT_LEAVES = 10  # up to here every way of splitting a tree is considered; 3^n of them


def split(tree: TokenTree, max_tokens: int) -> list[TokenTree]:
    """A tree in as few parts as fit into `max_tokens` tokens each, with as few tokens repeated in several as can be.

    A part is the tree of some of the passes, so each pass is whole in one part, and every supervised token keeps its
    weight: sums of weighted losses, and their gradients, are those of the whole. With one part this is one-pass training,
    with a part for each pass it is N-pass training. Passes keep their order within a part. Of a tree that is split, passes
    without a target of any weight are left out, since a part of those alone could not be trained.

    The parts are the best there are up to `EXACT_LEAVES` leaves. Beyond that (the problem contains bin packing) they are
    the better of two: the best cut of the leaves in their order, and each leaf put where it adds the fewest tokens.

    Args:
        tree: a tree or a forest.
        max_tokens: tokens of a part, at most.

    Raises:
        ValueError: a single pass is longer than that; or the tree is larger and has no targets.
    """
    if len(tree) <= max_tokens:
        return [tree]
    return [part_of(tree, passes) for passes, _ in split_passes(tree, max_tokens)]


def part_of(tree: TokenTree, passes: Sequence[int]) -> TokenTree:
    """The tree of some of the passes."""
    every = tree.passes()
    return TokenTree.from_passes([every[i] for i in passes])


def split_passes(tree: TokenTree, max_tokens: int) -> list[tuple[list[int], int]]:
    """For each part of a tree that is larger: its passes, and how many tokens it has."""
    passes = tree.passes()
    trained = [i for i, p in enumerate(passes) if np.any(p.token_weight)]
    if not trained:
        raise ValueError("no pass has a target with a weight, so there is nothing to train on")
    longest = max(trained, key=lambda i: tree.pass_lengths[i])
    if tree.pass_lengths[longest] > max_tokens:
        raise ValueError(
            f"pass {longest} has {tree.pass_lengths[longest]} tokens, more than the {max_tokens} of a row (max_tokens); a "
            "tree can be split between its passes, not inside one: raise max_tokens, or cap passes with max_length"
        )
    if len(trained) < len(passes):
        rest = TokenTree.from_passes([passes[i] for i in trained])
        parts = split_passes(rest, max_tokens) if len(rest) > max_tokens else [(range(len(trained)), len(rest))]
        return [([trained[i] for i in part], size) for part, size in parts]
    ends = np.unique(tree.pass_end)
    is_leaf = np.append(ends[1:], len(tree)) >= tree.subtree_end[ends]  # no other pass goes on from there
    leaves = ends[is_leaf]
    depth = (tree.position_ids[leaves] + 1).tolist()
    # Ancestors that a leaf shares with the next one. With a later one it shares the least of those between.
    shared = [int((tree.subtree_end[: a + 1] > b).sum()) for a, b in pairwise(leaves)]
    if len(leaves) <= EXACT_LEAVES:
        groups = _best_groups(depth, shared, max_tokens)
    else:
        candidates = (_consecutive_groups(depth, shared, max_tokens), _greedy_groups(depth, shared, max_tokens))
        groups = min(candidates, key=lambda groups: (len(groups), sum(_size(g, depth, shared) for g in groups)))

    leaf_of = np.searchsorted(leaves, tree.pass_end)  # the first leaf under a pass, in depth-first order
    return [(np.flatnonzero(np.isin(leaf_of, group)).tolist(), _size(group, depth, shared)) for group in sorted(groups)]


def _size(group: Sequence[int], depth: list[int], shared: list[int]) -> int:
    """Tokens of the tree with these leaves, ascending."""
    return sum(depth[leaf] for leaf in group) - sum(min(shared[a:b]) for a, b in pairwise(group))


def _best_groups(depth: list[int], shared: list[int], max_tokens: int) -> list[list[int]]:
    """The fewest groups, and of those the fewest tokens: dynamic programming over sets of leaves, as bits."""
    n = len(depth)
    members = [[i for i in range(n) if leaves >> i & 1] for leaves in range(2**n)]
    sizes = [_size(group, depth, shared) for group in members]
    best: list[tuple] = [(0, 0, 0)]  # groups, tokens, the group taken last
    for leaves in range(1, 2**n):
        highest, found = 1 << leaves.bit_length() - 1, (n + 1, 0, 0)
        rest = others = leaves - highest
        while True:
            group = leaves - rest  # the highest leaf, with any of the others
            if sizes[group] <= max_tokens:
                found = min(found, (best[rest][0] + 1, best[rest][1] + sizes[group], group))
            if not rest:
                break
            rest = rest - 1 & others
        best.append(found)
    groups, leaves = [], 2**n - 1
    while leaves:
        groups.append(members[best[leaves][2]])
        leaves -= best[leaves][2]
    return groups


def _consecutive_groups(depth: list[int], shared: list[int], max_tokens: int) -> list[list[int]]:
    """The best cut of the leaves in their order."""
    best = [(0, 0, 0)]  # of the first leaves: groups, tokens, where the last group begins
    for end in range(1, len(depth) + 1):
        found, size, begin = None, 0, end
        while begin:
            begin -= 1
            size += depth[begin] - (shared[begin] if begin < end - 1 else 0)
            if size > max_tokens:
                break
            candidate = (best[begin][0] + 1, best[begin][1] + size, begin)
            found = candidate if found is None else min(found, candidate)
        best.append(found)
    groups, end = [], len(depth)
    while end:
        groups.append(list(range(best[end][2], end)))
        end = best[end][2]
    return groups


def _greedy_groups(depth: list[int], shared: list[int], max_tokens: int) -> list[list[int]]:
    """Each leaf, the deepest first, where it adds the fewest tokens."""
    groups: list[list[int]] = []
    for leaf in sorted(range(len(depth)), key=lambda leaf: -depth[leaf]):
        choices = []
        for i, group in enumerate(groups):
            larger = sorted([*group, leaf])
            size = _size(larger, depth, shared)
            if size <= max_tokens:
                choices.append((size - _size(group, depth, shared), i, larger))
        if choices:
            _, i, larger = min(choices)
            groups[i] = larger
        else:
            groups.append([leaf])
    return groups

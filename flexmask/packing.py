"""Trees -> rows: several trees in one sequence of at most `max_tokens` tokens, a larger tree in several parts."""

from __future__ import annotations

import bisect
import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice, pairwise

import numpy as np
import torch
from torch.utils.data import IterableDataset, get_worker_info

from .tree import TokenTree

EXACT_LEAVES = 10  # up to here every way of splitting a tree is considered; 3^n of them


def pack(trees: Sequence[TokenTree], max_tokens: int) -> Rows:
    """Fill rows with trees, best fit: the largest tree first, each into the fullest row that still has room.

    Args:
        trees: what to pack. Nothing is dropped or cut; a tree larger than a row is split (see `split`).
        max_tokens: tokens in a row, at most; a multiple of 128 leaves the least padding.

    Returns:
        Rows (forests), ordered by the first tree, or part of one, in them; within a row those keep their order. Only the plan
        is made; a row is when it is asked for, so that trees on disk stay there.

    Raises:
        ValueError: naming a tree of which a single pass is longer than a row, or that is larger and has no targets.
    """
    lengths = getattr(trees, "lengths", None)
    parts: list[_Part] = []
    sizes: list[int] = []
    for index, size in enumerate(map(len, trees) if lengths is None else lengths.tolist()):
        if size <= max_tokens:
            parts.append((index, None))
            sizes.append(size)
            continue
        try:
            groups = _split(trees[index], max_tokens)
        except ValueError as error:
            raise ValueError(f"tree {index}: {error}") from error
        parts += [(index, passes) for passes, _ in groups]
        sizes += [size for _, size in groups]
    rows: list[list[int]] = []
    room: list[tuple[int, int]] = []  # (free tokens, row), ascending
    for index in sorted(range(len(parts)), key=lambda i: -sizes[i]):
        size = sizes[index]
        fullest = bisect.bisect_left(room, (size, -1))
        if fullest == len(room):
            rows.append([index])
            bisect.insort(room, (max_tokens - size, len(rows) - 1))
        else:
            free, row = room.pop(fullest)
            rows[row].append(index)
            bisect.insort(room, (free - size, row))
    rows = sorted(map(sorted, rows))
    return Rows(trees, [[parts[i] for i in row] for row in rows], [sum(sizes[i] for i in row) for row in rows])


_Part = tuple[int, Sequence[int] | None]  # a tree, and which of its passes; None: the tree as it is


class Rows(Sequence):
    """Packed rows: a `train_dataset`. Each is put together when it is asked for.

    Attributes:
        lengths: int64, tokens of each.
        split: how many trees were larger than a row.
    """

    def __init__(self, trees: Sequence[TokenTree], plan: Sequence[Sequence[_Part]], lengths: Sequence[int]):
        self._trees = trees
        self._plan = plan
        self.lengths = np.array(lengths, np.int64)
        self.split = len({index for row in plan for index, passes in row if passes is not None})

    def __len__(self) -> int:
        return len(self._plan)

    def __getitem__(self, index):
        if isinstance(index, slice):
            return Rows(self._trees, self._plan[index], self.lengths[index])
        return TokenTree.concat([_part(self._trees[tree], passes) for tree, passes in self._plan[index]])


def pack_stream(trees: Iterable[TokenTree], max_tokens: int, buffer_size: int = 512) -> RowStream:
    """The same for a stream, of which the end is not known: packs `buffer_size` trees at a time, and keeps the emptiest row
    open for the next ones.

    Args:
        trees: anything that can be iterated, once for each epoch.
        max_tokens, buffer_size: as above.

    Returns:
        An `IterableDataset`, see `RowStream`.
    """
    return RowStream(trees, max_tokens, buffer_size=buffer_size)


class RowStream(IterableDataset):
    """Rows packed from a stream. Every item of the stream is in exactly one row of an epoch: of several DataLoader workers,
    and of several ranks, each takes every n-th item and packs those.

    Ranks then have different numbers of rows. `flexmask.train.OnePassTrainer` gives each its share (`for_rank`), and batches
    without weight to those that run out before the others. With the library's own Trainer leave `for_rank` alone: Accelerate
    gives each rank every n-th row, and the first rows again where the last ones do not suffice for all; and it needs
    `accelerator_config={"dispatch_batches": False}`, in one process too: its default joins the batches of all processes into
    one, and a batch is one row.

    Args:
        items: anything that can be iterated, once for each epoch, and gives the same items in the same order to everyone
            (a hub stream does not: `sources.HubDataset` reads it so).
        max_tokens: tokens in a row, at most.
        make: an item -> its tree, or None if it is left out, and what there is to count. Of names like `note: this`, which
            may be any number, the rarest become `note: others` where there are too many to keep.
        buffer_size: how many trees are packed at a time.
    """

    _SLOTS, _BYTES = 256, 4096

    def __init__(
        self,
        items: Iterable,
        max_tokens: int,
        *,
        make: Callable[[object], tuple[TokenTree | None, Counter]] | None = None,
        buffer_size: int = 512,
    ):
        self.items = items
        self.max_tokens = max_tokens
        self.make = make
        self.buffer_size = buffer_size
        self._rank, self._ranks = 0, 1
        # In memory that workers share: they are processes, and what they count is asked for here. One line of JSON for each.
        shape = (0 if make is None else self._SLOTS, self._BYTES)
        self._counted = torch.zeros(shape, dtype=torch.uint8).share_memory_()

    def for_rank(self, rank: int, ranks: int) -> None:
        """Take the share of a rank from now on."""
        self._rank, self._ranks = rank, ranks

    @property
    def counted(self) -> Counter:
        """What was counted in all items of this rank that were read so far, by all workers, in every epoch anew. Workers read
        ahead of what was trained."""
        return sum(map(self._told, range(len(self._counted))), Counter())

    def __iter__(self) -> Iterator[TokenTree]:
        worker = get_worker_info()
        worker, workers = (0, 1) if worker is None else (worker.id, worker.num_workers)
        share = islice(self.items, self._rank + self._ranks * worker, None, self._ranks * workers)
        pending: list[TokenTree] = []
        for tree in self._trees(share, worker):
            pending.append(tree)
            if len(pending) >= self.buffer_size:
                rows = list(pack(pending, self.max_tokens))
                emptiest = rows.pop(min(range(len(rows)), key=lambda i: len(rows[i])))
                yield from rows
                pending = [emptiest]
        if pending:
            yield from pack(pending, self.max_tokens)

    def _trees(self, items: Iterable, worker: int) -> Iterator[TokenTree]:
        if self.make is None:
            yield from items
            return
        if worker >= self._SLOTS:
            raise ValueError(f"a stream counts for {self._SLOTS} workers at most, use fewer (dataloader_num_workers)")
        before, counted = self._told(worker), Counter()  # before: in earlier epochs
        for item in items:
            tree, of_item = self.make(item)
            counted.update(of_item)
            self._tell(before + counted, worker)
            if tree is not None:
                yield tree

    def _told(self, worker: int) -> Counter:
        text = self._counted[worker].numpy().tobytes().rstrip(b"\0")
        return Counter(json.loads(text) if text else {})

    def _tell(self, counted: Counter, worker: int) -> None:
        text = json.dumps(counted).encode()
        if len(text) > self._BYTES:
            text = json.dumps(_shortened(counted, self._BYTES)).encode()
        self._counted[worker] = torch.frombuffer(bytearray(text.ljust(self._BYTES, b"\0")), dtype=torch.uint8)


def _shortened(counted: Counter, size: int) -> Counter:
    """In so many bytes of JSON: of names like `note: this` the rarest become `note: others`; all other names stay."""
    kept = Counter({name: count for name, count in counted.items() if ": " not in name})
    others = {name: name.partition(": ")[0] + ": others" for name in counted if ": " in name}
    room = size - len(json.dumps({**kept, **dict.fromkeys(others.values(), 10**18)}))
    for name, count in counted.most_common():
        if name in others:
            room -= len(json.dumps({name: count}))  # its braces are as long as a comma and a space
            kept[name if room >= 0 else others[name]] += count
    return kept


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
    return [_part(tree, passes) for passes, _ in _split(tree, max_tokens)]


def _part(tree: TokenTree, passes: Sequence[int] | None) -> TokenTree:
    """The tree of some of the passes."""
    if passes is None:
        return tree
    every = tree.passes()
    return TokenTree.from_passes([every[i] for i in passes])


def _split(tree: TokenTree, max_tokens: int) -> list[tuple[list[int], int]]:
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
        parts = _split(rest, max_tokens) if len(rest) > max_tokens else [(range(len(trained)), len(rest))]
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

"""Rows packed while trees are read."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from itertools import islice

import torch
from torch.utils.data import IterableDataset, get_worker_info

from ..tree import TokenTree
from .rows import pack


def pack_stream(trees: Iterable[TokenTree], max_tokens: int, buffer_size: int = 512) -> RowStream:
    """`pack` for a stream, of which the end is not known: packs `buffer_size` trees at a time, and keeps the emptiest row open
    for the next ones.

    Args:
        trees: anything that can be iterated, once for each epoch.
        max_tokens: tokens in a row, at most.
        buffer_size: how many trees are packed at a time.

    Returns:
        An `IterableDataset`, see `RowStream`.
    """
    return RowStream(trees, max_tokens, buffer_size=buffer_size)


class RowStream(IterableDataset):
    """Rows packed from a stream. Every item of the stream is in exactly one row of an epoch: of several DataLoader workers,
    and of several ranks, each takes every n-th item and packs those.

    Ranks then have different numbers of rows. `flexmask.OnePassTrainer` gives each its share (`for_rank`), and batches
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

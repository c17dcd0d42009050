"""Trees -> rows: several trees in one sequence of at most `max_tokens` tokens."""

from __future__ import annotations

import bisect
from collections.abc import Iterable, Iterator, Sequence

from .tree import TokenTree


def pack(trees: Sequence[TokenTree], max_tokens: int) -> list[TokenTree]:
    """Fill rows with trees, best fit: the largest tree first, each into the fullest row that still has room.

    Args:
        trees: what to pack. Nothing is dropped or cut.
        max_tokens: tokens in a row, at most; a multiple of 128 leaves the least padding.

    Returns:
        Rows (forests), ordered by the first tree in them; within a row trees keep their order.

    Raises:
        ValueError: a tree is larger than a row, naming its index.
    """
    for index, tree in enumerate(trees):
        if len(tree) > max_tokens:
            raise ValueError(
                f"tree {index} has {len(tree)} tokens, more than the {max_tokens} of a row; raise max_tokens"
            )
    rows: list[list[int]] = []
    room: list[tuple[int, int]] = []  # (free tokens, row), ascending
    for index in sorted(range(len(trees)), key=lambda i: -len(trees[i])):
        size = len(trees[index])
        fullest = bisect.bisect_left(room, (size, -1))
        if fullest == len(room):
            rows.append([index])
            bisect.insort(room, (max_tokens - size, len(rows) - 1))
        else:
            free, row = room.pop(fullest)
            rows[row].append(index)
            bisect.insort(room, (free - size, row))
    return [TokenTree.concat([trees[i] for i in row]) for row in sorted(map(sorted, rows))]


def pack_stream(trees: Iterable[TokenTree], max_tokens: int, buffer_size: int = 512) -> Iterator[TokenTree]:
    """The same for a stream: packs `buffer_size` trees at a time and keeps the emptiest row open for the next ones.

    As an `IterableDataset` in several processes it needs `accelerator_config={"dispatch_batches": False}` in the
    TrainingArguments: the library's default joins the batches of all processes into one, and a batch is one row.
    """
    pending: list[TokenTree] = []
    for tree in trees:
        pending.append(tree)
        if len(pending) >= buffer_size:
            rows = pack(pending, max_tokens)
            emptiest = rows.pop(min(range(len(rows)), key=lambda i: len(rows[i])))
            yield from rows
            pending = [emptiest]
    if pending:
        yield from pack(pending, max_tokens)

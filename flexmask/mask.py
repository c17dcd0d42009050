"""subtree_end -> which tiles of the attention matrix hold anything, and the mask inside them. Never anything L×L.

A tile is a block of queries against a block of keys. With `visible(q, k) = k <= q < subtree_end[k]`, for key block K
left of query block Q (first token q0, last token q1):

    empty    max(subtree_end[K]) <= q0         no key reaches the first query, so none reaches a later one
    full     min(subtree_end[K]) >  q1         every key reaches the last query, so also every earlier one
    partial  otherwise, and every tile on the diagonal

which is exact, from two numbers per key block. So what a key block reaches, and what of it is full, are ranges of query
blocks: listing the tiles takes memory for those that hold something, and not for all.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask
from torch.utils.weak import WeakIdKeyDictionary
from transformers.utils.import_utils import is_tracing

BLOCK_SIZE = 128


def depths(subtree_end: Tensor) -> Tensor:
    """How many ancestors each token has, which is its position: before it lie they, and subtrees that have ended.

    Args:
        subtree_end: int32 (batch, L).

    Returns:
        int64 (batch, L).
    """
    ended = torch.zeros(len(subtree_end), subtree_end.shape[1] + 1, dtype=torch.int64, device=subtree_end.device)
    ended = ended.scatter_add_(1, subtree_end.long(), torch.ones_like(subtree_end, dtype=torch.int64)).cumsum(1)
    return torch.arange(subtree_end.shape[1], device=subtree_end.device) - ended[:, :-1]


@dataclass(frozen=True)
class BlockLists:
    """For each query block the key blocks to read, and the transpose; n = ceil(L / block_size) blocks, or m of queries.

    All are int32: `*_num` (batch, 1, m or n), `*_indices` (batch, 1, m, n) or its transpose, of which the first `*_num` entries
    of a line count. `kv_*` lists key blocks per query block, `q_*` query blocks per key block; `full_*` tiles need no mask.
    """

    kv_num: Tensor
    kv_indices: Tensor
    full_kv_num: Tensor
    full_kv_indices: Tensor
    q_num: Tensor
    q_indices: Tensor
    full_q_num: Tensor
    full_q_indices: Tensor


def check_dtype(subtree_end: Tensor) -> None:
    """Refuse what is not an int32 tensor with a TypeError."""
    if not isinstance(subtree_end, Tensor) or subtree_end.dtype != torch.int32:
        came = subtree_end.dtype if isinstance(subtree_end, Tensor) else type(subtree_end).__name__
        raise TypeError(f"subtree_end is {came}, expected an int32 tensor")


def check_subtree_end(subtree_end: Tensor) -> None:
    """Refuse what is not the subtree ends of a forest in depth-first order.

    Args:
        subtree_end: int32 (batch, L).

    Raises:
        TypeError: not an int32 tensor.
        ValueError: wrong shape; an end outside (k, L]; subtrees that cross.
    """
    check_dtype(subtree_end)
    if subtree_end.ndim != 2 or not subtree_end.shape[1]:
        raise ValueError(f"subtree_end has shape {tuple(subtree_end.shape)}, expected (batch, L) with L >= 1")
    place = torch.arange(subtree_end.shape[1], dtype=torch.int32, device=subtree_end.device)
    wrong = (subtree_end <= place) | (subtree_end > subtree_end.shape[1])
    crossing = _largest_end_within(subtree_end.clamp(max=subtree_end.shape[1])) > subtree_end
    if not (wrong | crossing).any():  # the one place where a GPU is waited for
        return
    if wrong.any():
        b, k = wrong.nonzero()[0].tolist()
        raise ValueError(
            f"subtree_end[{b}, {k}] is {subtree_end[b, k].item()}, expected an end in {k + 1}..{subtree_end.shape[1]} "
            "(a padding token sees itself only: its end is its place + 1)"
        )
    b, k = crossing.nonzero()[0].tolist()
    raise ValueError(
        f"subtree_end[{b}, {k}] is {subtree_end[b, k].item()}, but a token of that subtree has a later end: "
        "subtrees must be nested or apart, never cross"
    )


def _largest_end_within(subtree_end: Tensor) -> Tensor:
    """max(subtree_end[k : subtree_end[k]]) for every k, by doubling windows: O(L log L), no loop over tokens."""
    place = torch.arange(subtree_end.shape[1], device=subtree_end.device)
    size = subtree_end - place
    largest = subtree_end.clone()
    window, width = subtree_end, 1  # window[:, i] = max(subtree_end[:, i : i + width])
    while width * 2 <= subtree_end.shape[1]:
        window = torch.maximum(window[:, :-width], window[:, width:])
        width *= 2
        fits = size >= width
        last = (subtree_end - width).clamp(0, window.shape[1] - 1).long()
        first = place.clamp(max=window.shape[1] - 1).expand_as(last)
        both = torch.maximum(window.gather(1, first), window.gather(1, last))
        largest = torch.where(fits, torch.maximum(largest, both), largest)
    return largest


def block_lists(
    subtree_end: Tensor,
    *,
    first: int = 0,
    position_ids: Tensor | None = None,
    sliding_window: int | None = None,
    block_size: int = BLOCK_SIZE,
) -> BlockLists:
    """The tiles that hold visible pairs, as index lists, on the device of `subtree_end`.

    Args:
        subtree_end: int32 (batch, L).
        first: the first query, a multiple of `block_size`; the blocks of queries are counted from there.
        position_ids: integer (batch, L), needed with a sliding window.
        sliding_window: a query sees keys fewer than this many positions before it. The positions of a block are known
            by their extremes only, so a few tiles that the window empties may stay listed as partial.
        block_size: queries, and keys, of a tile.
    """
    tiles = _tiles(subtree_end, position_ids, sliding_window, block_size)
    partial, full = (x[:, first // block_size :] for x in tiles)
    return BlockLists(*_ordered(partial), *_ordered(full), *_ordered(partial.mT), *_ordered(full.mT))


@dataclass(frozen=True)
class TileLists:
    """The same in memory for the tiles that there are: lines one after the other, n of them for each row of the batch.

    All are int32: line i of a list has the entries `*_begin[i]` to `*_begin[i + 1]` of `*_indices`. `*_begin` (batch · n + 1,);
    what else is in `*_indices` is of no meaning, but there is always one entry more to read. `kv_*` lists key blocks per query
    block, `q_*` query blocks per key block, ascending; `full_*` tiles need no mask.
    """

    kv_begin: Tensor
    kv_indices: Tensor
    full_kv_begin: Tensor
    full_kv_indices: Tensor
    q_begin: Tensor
    q_indices: Tensor
    full_q_begin: Tensor
    full_q_indices: Tensor


def tile_lists(
    subtree_end: Tensor, *, position_ids: Tensor | None = None, sliding_window: int | None = None
) -> TileLists:
    """The tiles that hold visible pairs, for kernels that do not ask for more. Arguments as in `block_lists`."""
    return TileLists(*_tile_lists(subtree_end, position_ids, sliding_window))


@torch.library.custom_op("flexmask::tile_lists", mutates_args=())
def _tile_lists(subtree_end: Tensor, position_ids: Tensor | None, sliding_window: int | None) -> list[Tensor]:
    blocks = _Blocks.of(subtree_end, position_ids, BLOCK_SIZE)
    capturing = subtree_end.is_cuda and torch.cuda.is_current_stream_capturing()
    row, query, key = blocks.all_pairs() if capturing else blocks.pairs()
    visible, full = blocks.kinds(row, query, key, sliding_window)
    partial = visible & ~full
    n = len(blocks.first)
    total = n * len(subtree_end)
    found = []
    for line, other in ((query, key), (key, query)):
        for chosen in (partial, full):
            # The pairs come by key blocks, and of each the query blocks ascend; what is not chosen goes behind all lines.
            lines, order = torch.where(chosen, row * n + line, total).sort(stable=True)
            begin = torch.searchsorted(lines, torch.arange(total + 1, device=lines.device))
            found += [begin, torch.nn.functional.pad(other[order], (0, 1))]
    return [x.to(torch.int32) for x in found]


@_tile_lists.register_fake
def _(subtree_end, position_ids, sliding_window):
    lines = subtree_end.shape[0] * -(-subtree_end.shape[1] // BLOCK_SIZE) + 1
    found = []
    for _ in range(4):
        found += [
            subtree_end.new_empty(lines),
            subtree_end.new_empty(torch.library.get_ctx().new_dynamic_size(min=1)),
        ]
    return found


def count_tiles(
    subtree_end: Tensor,
    *,
    position_ids: Tensor | None = None,
    sliding_window: int | None = None,
    block_size: int = BLOCK_SIZE,
) -> tuple[int, int]:
    """How many tiles the kernels visit, (full, partial). Arguments as in `block_lists`."""
    blocks = _Blocks.of(subtree_end, position_ids, block_size)
    visible, full = (int(x.sum()) for x in blocks.kinds(*blocks.pairs(), sliding_window))
    return full, visible - full


@dataclass(frozen=True)
class _Blocks:
    """What is known of the n blocks of a row: the places of their first and last tokens, (n,); the least and largest end of
    their tokens, and the least and largest position (with a window), (batch, n)."""

    first: Tensor
    last: Tensor
    ends: tuple[Tensor, Tensor]
    positions: tuple[Tensor, Tensor] | None

    @classmethod
    def of(cls, subtree_end: Tensor, position_ids: Tensor | None, size: int) -> _Blocks:
        length = subtree_end.shape[1]
        n = -(-length // size)
        place = torch.arange(n * size, device=subtree_end.device).clamp(max=length - 1)

        def extremes(x: Tensor) -> tuple[Tensor, Tensor]:
            return tuple(x[:, place].unflatten(1, (n, size)).aminmax(dim=-1))

        first = torch.arange(n, device=subtree_end.device) * size
        return cls(
            first=first,
            last=(first + size - 1).clamp(max=length - 1),
            ends=extremes(subtree_end),
            positions=None if position_ids is None else extremes(position_ids),
        )

    def pairs(self) -> tuple[Tensor, Tensor, Tensor]:
        """Row, query block and key block of all tiles that hold something without a window, int64 (P,); by rows, then by key
        blocks, then by query blocks."""
        n, device = len(self.first), self.first.device
        reached = torch.searchsorted(
            self.first, self.ends[1].long().flatten()
        )  # query blocks that begin before the end
        key = torch.arange(n, device=device).repeat(len(self.ends[1]))
        count = (reached - key).clamp(min=1)  # its own among them
        line = torch.repeat_interleave(count)
        query = torch.arange(len(line), device=device) - (count.cumsum(0) - count - key)[line]
        return line // n, query, key[line]

    def all_pairs(self) -> tuple[Tensor, Tensor, Tensor]:
        """All tiles on the diagonal and left of it, as `pairs`. While a CUDA graph is captured nobody can be asked how many of
        them hold anything."""
        n, rows = len(self.first), len(self.ends[0])
        key, query = torch.triu_indices(n, n, device=self.first.device).repeat(1, rows)
        row = torch.arange(rows, device=self.first.device).repeat_interleave(n * (n + 1) // 2, output_size=len(key))
        return row, query, key

    def kinds(self, row: Tensor, query: Tensor, key: Tensor, window: int | None) -> tuple[Tensor, Tensor]:
        """bool, which of the tiles (not right of the diagonal) hold a visible pair, and in which every pair is visible. The
        arguments broadcast."""
        visible, full = self.ends[1][row, key] > self.first[query], self.ends[0][row, key] > self.last[query]
        if window is not None:
            low, high = self.positions
            visible = visible & (low[row, query] - high[row, key] < window)
            full = full & (high[row, query] - low[row, key] < window)
        return visible | (query == key), full & (query != key)


def _tiles(
    subtree_end: Tensor, position_ids: Tensor | None, sliding_window: int | None, block_size: int
) -> tuple[Tensor, Tensor]:
    """bool (batch, query blocks, key blocks): which tiles are partial, and which are full."""
    blocks = _Blocks.of(subtree_end, position_ids, block_size)
    block = torch.arange(len(blocks.first), device=subtree_end.device)
    row = torch.arange(len(subtree_end), device=subtree_end.device)
    tile = row[:, None, None], block[:, None], block
    visible, full = (x & (block <= block[:, None]) for x in blocks.kinds(*tile, sliding_window))
    return visible & ~full, full


def _ordered(tiles: Tensor) -> tuple[Tensor, Tensor]:
    """bool (batch, n, m) -> per line how many are set, and their indices first: int32 (batch, 1, n), (batch, 1, n, m)."""
    indices = (
        tiles.to(torch.int8, memory_format=torch.contiguous_format)
        .argsort(dim=-1, descending=True, stable=True)
        .to(torch.int32)
    )
    return tiles.sum(-1, dtype=torch.int32)[:, None], indices[:, None]


_kept = WeakIdKeyDictionary()  # subtree_end -> what was built from it


def once_per_forward(build: Callable, subtree_end: Tensor, *, position_ids: Tensor | None = None, **arguments):
    """`build(subtree_end, …)`, computed by the first layer and shared by the others, which get the same tensor.

    What is built must not hold `subtree_end` itself, or the two would keep each other alive. Tensors of inference mode
    do not count their changes, so nothing is kept for them. Under torch.compile nothing is kept, because the compiler
    merges equal computations of one graph by itself; nor while a CUDA graph is captured, which will be replayed with other
    values in the same tensors. Nothing is checked in either, nor for fake tensors, because a check reads values.
    """
    tensors = {} if position_ids is None else {"position_ids": position_ids}
    if is_tracing(subtree_end):
        return None if build is check_subtree_end else build(subtree_end, **tensors, **arguments)
    if any(x.is_inference() for x in (subtree_end, *tensors.values())):
        return build(subtree_end, **tensors, **arguments)
    kept = _kept.setdefault(subtree_end, {})
    versions = tuple(x._version for x in (subtree_end, *tensors.values()))
    key = (build, *versions, *(x.data_ptr() for x in tensors.values()), *arguments.items())
    if key not in kept:
        # position_ids are kept too, so that their address cannot be taken by others meanwhile
        kept[key] = build(subtree_end, **tensors, **arguments), tensors
    return kept[key][0]


def mask_mod(
    subtree_end: Tensor, *, first: int = 0, position_ids: Tensor | None = None, sliding_window: int | None = None
) -> Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]:
    """The tree mask as FlexAttention's `mask_mod(b, h, q_idx, kv_idx)`. Arguments as in `block_lists`."""
    if first:
        whole = mask_mod(subtree_end, position_ids=position_ids, sliding_window=sliding_window)
        offset = subtree_end.new_full((), first)  # a number would be compiled in, one variant for each
        return lambda b, h, q_idx, kv_idx: whole(b, h, q_idx + offset, kv_idx)

    def tree_mask(b, h, q_idx, kv_idx):
        return (kv_idx <= q_idx) & (q_idx < subtree_end[b, kv_idx])

    if sliding_window is None:
        return tree_mask
    # A tensor, since FlashAttention 4 takes no number that varies, as a model's second window does.
    too_far = once_per_forward(_before_windows, subtree_end, position_ids=position_ids, sliding_window=sliding_window)

    def windowed_tree_mask(b, h, q_idx, kv_idx):
        return tree_mask(b, h, q_idx, kv_idx) & (position_ids[b, kv_idx] > too_far[b, q_idx])

    return windowed_tree_mask


def _before_windows(subtree_end: Tensor, *, position_ids: Tensor, sliding_window: int) -> Tensor:
    """The last position before the window of each query: (batch, L up to whole blocks), because FlashAttention 4 may ask for
    the queries of a block that lie behind the end."""
    return _before(position_ids, sliding_window)


# An operator, or Inductor would put the subtraction into the mask, which it cannot.
@torch.library.custom_op("flexmask::before_windows", mutates_args=())
def _before(position_ids: Tensor, sliding_window: int) -> Tensor:
    return F.pad(position_ids - sliding_window, (0, -position_ids.shape[1] % BLOCK_SIZE))


@_before.register_fake
def _(position_ids, sliding_window):
    batch, length = position_ids.shape
    return position_ids.new_empty(batch, -(-length // BLOCK_SIZE) * BLOCK_SIZE)


def score_mod(
    *,
    softcap: float | None = None,
    subtree_end: Tensor | None = None,
    position_ids: Tensor | None = None,
    sliding_window: int | None = None,
) -> Callable | None:
    """FlexAttention's `score_mod(score, b, h, q_idx, kv_idx)`: soft-capping, and the mask for callers without block lists.

    Args:
        softcap: scores become `softcap * tanh(score / softcap)` (Gemma 2, arXiv 2408.00118, section 2).
        subtree_end: int32 (batch, L); if given, invisible pairs get a score of -inf.
        position_ids, sliding_window: as in `block_lists`.

    Returns:
        The function, or None if there is nothing to do.
    """
    visible = None
    if subtree_end is not None:
        visible = mask_mod(subtree_end, position_ids=position_ids, sliding_window=sliding_window)

    def capped(score, b, h, q_idx, kv_idx):
        return softcap * torch.tanh(score / softcap)

    def masked(score, b, h, q_idx, kv_idx):
        return torch.where(visible(b, h, q_idx, kv_idx), score, -float("inf"))

    def capped_and_masked(score, b, h, q_idx, kv_idx):
        return masked(capped(score, b, h, q_idx, kv_idx), b, h, q_idx, kv_idx)

    if visible is None:
        return None if softcap is None else capped
    return masked if softcap is None else capped_and_masked


def tree_block_mask(
    subtree_end: Tensor,
    block_size: int = BLOCK_SIZE,
    *,
    first: int = 0,
    position_ids: Tensor | None = None,
    sliding_window: int | None = None,
) -> BlockMask:
    """A torch `BlockMask` for the tree mask, with forward and transposed lists, made without `create_block_mask`.

    Arguments as in `block_lists`. The lists are made once for a tensor `subtree_end`. The result lives on its device,
    where it must be used (`BlockMask.to` would not move the tensors its `mask_mod` reads).
    """
    lists = once_per_forward(
        block_lists,
        subtree_end,
        first=first,
        position_ids=position_ids,
        sliding_window=sliding_window,
        block_size=block_size,
    )
    return BlockMask(
        seq_lengths=(subtree_end.shape[1] - first, subtree_end.shape[1]),
        kv_num_blocks=lists.kv_num,
        kv_indices=lists.kv_indices,
        full_kv_num_blocks=lists.full_kv_num,
        full_kv_indices=lists.full_kv_indices,
        q_num_blocks=lists.q_num,
        q_indices=lists.q_indices,
        full_q_num_blocks=lists.full_q_num,
        full_q_indices=lists.full_q_indices,
        BLOCK_SIZE=(block_size, block_size),
        mask_mod=mask_mod(subtree_end, first=first, position_ids=position_ids, sliding_window=sliding_window),
    )

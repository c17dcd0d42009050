"""Tree attention by chains, without a mask, on stock kernels: FlashAttention on CUDA, PyTorch's fused attention on a CPU.

A tree lies depth-first, so a chain of n tokens with p ancestors is a sequence: n queries, which lie in the row one after the
other, against p + n keys, causal and aligned at the end. Positions along a path are consecutive, so a sliding window is one
of the sequence, and ancestors beyond it are not touched. Gradients of keys, which several chains read, are added up in
float32 in a fixed order.

On CUDA a row is one call of the variable-length kernel. It wants the keys of a sequence side by side, so those of all chains
are gathered into one tensor, each after its ancestors'; it lives during the call, and is made again for the backward. The
most it can be: 24 steps of an agent (30,000 tokens) gather 190,000 keys, a thousand forks off one beginning a thousand times
that beginning. Repeatability is that of the kernel: FlashAttention 2 adds up the gradients of queries in any order, unless
`torch.use_deterministic_algorithms(True)`. Its forward repeats bit by bit, and so does everything on a CPU.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from einops import rearrange
from torch import Tensor
from torch.nn.functional import pad

from ..chains import chains
from ..mask import depths, once_per_forward

MAX_HEAD_DIM = 256  # of FlashAttention 2
_MULTIPLE = 8  # of which FlashAttention takes head sizes
# Queries that are computed at once on a CPU, of groups and of windows. More of them means fewer calls, and more of their work
# in causal and masked pieces, which are slower than whole ones.
_BLOCK = 256


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    subtree_end: Tensor,
    *,
    scale: float,
    softcap: float | None,
    sliding_window: int | None,
    position_ids: Tensor | None,
    sinks: Tensor | None,
) -> Tensor:
    """See `flexmask.tree_attention`, which checks the arguments.

    Raises:
        NotImplementedError: float64, or on CUDA float32; soft-cap, sinks, head sizes above 256; a window that is not counted
            in positions along paths.
    """
    head_dim, value_dim = query.shape[-1], value.shape[-1]
    size = -(-max(head_dim, value_dim) // _MULTIPLE) * _MULTIPLE
    for what, unsupported in (
        ("float64", query.dtype == torch.float64),
        (f"{query.dtype} on {query.device.type}", query.is_cuda and query.dtype == torch.float32),
        ("a soft-cap", softcap is not None),
        ("sinks", sinks is not None),
        (f"a head size of {size}", size > MAX_HEAD_DIM),
    ):
        if unsupported:
            raise NotImplementedError(f"backend 'flash' cannot do {what}; backend 'blockwise' can")
    query, key, value = (pad(x, (0, size - x.shape[-1])) for x in (query, key, value))  # nothing is done where they fit
    return _forward(query, key, value, subtree_end, position_ids, scale, sliding_window)[0][..., :value_dim]


@torch.library.custom_op("flexmask::flash_forward", mutates_args=())
def _forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    subtree_end: Tensor,
    position_ids: Tensor | None,
    scale: float,
    sliding_window: int | None,
) -> tuple[Tensor, Tensor]:
    """The output, (batch, heads, L, head_dim), and the log-sum-exp of the scores, float32 (heads, batch · L)."""
    _check_positions(subtree_end, position_ids)
    q, k, v = map(_tokens_first, (query, key, value))
    out, lse = _kernel(q).forward(q, k, v, subtree_end, scale, sliding_window)
    alone = once_per_forward(_alone, subtree_end)
    if len(alone):
        out[alone] = v[alone].repeat_interleave(q.shape[1] // k.shape[1], 1)
    return _heads_first(out, query), lse


@_forward.register_fake
def _(query, key, value, subtree_end, position_ids, scale, sliding_window):
    batch, heads, length, head_dim = query.shape
    out = query.new_empty(batch, length, heads, head_dim).transpose(1, 2)
    return out, query.new_empty(heads, batch * length, dtype=torch.float32)


@torch.library.custom_op("flexmask::flash_backward", mutates_args=())
def _backward(
    grad_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    subtree_end: Tensor,
    scale: float,
    sliding_window: int | None,
) -> tuple[Tensor, Tensor, Tensor]:
    do, q, k, v, o = map(_tokens_first, (grad_out, query, key, value, out))
    alone = once_per_forward(_alone, subtree_end)
    of_alone = do[alone]
    if len(alone):
        do = do.index_fill(0, alone, 0)
    dq, dk, dv = _kernel(q).backward(do, q, k, v, o, lse, subtree_end, scale, sliding_window)
    dv[alone] += rearrange(of_alone, "t (g r) d -> t g r d", g=k.shape[1]).sum(2, dtype=torch.float32)
    return tuple(_heads_first(x, query) for x in (dq, dk, dv))


@_backward.register_fake
def _(grad_out, query, key, value, out, lse, subtree_end, scale, sliding_window):
    return tuple(x.new_empty(x.transpose(1, 2).shape).transpose(1, 2) for x in (query, key, value))


def _setup_context(ctx, inputs, output):
    query, key, value, subtree_end, _, *ctx.options = inputs
    ctx.set_materialize_grads(False)  # nothing depends on the log-sum-exp
    ctx.save_for_backward(query, key, value, *output, subtree_end)


def _autograd(ctx, grad_out, _grad_lse):
    return *_backward(grad_out, *ctx.saved_tensors, *ctx.options), None, None, None, None


_forward.register_autograd(_autograd, setup_context=_setup_context)


def _tokens_first(x: Tensor) -> Tensor:
    return rearrange(x, "b h l d -> (b l) h d")


def _heads_first(x: Tensor, like: Tensor) -> Tensor:
    """In memory tokens come first, as models want it."""
    return rearrange(x.to(like.dtype).contiguous(), "(b l) h d -> b h l d", b=len(like))


def _check_positions(subtree_end: Tensor, position_ids: Tensor | None) -> None:
    if position_ids is None or once_per_forward(_count_ancestors, subtree_end, position_ids=position_ids):
        return
    raise NotImplementedError(
        "backend 'flash' cannot do a window over position_ids that do not count the ancestors of a token; backend "
        "'blockwise' can"
    )


def _count_ancestors(subtree_end: Tensor, *, position_ids: Tensor) -> bool:
    return torch.equal(position_ids.long(), depths(subtree_end))


def _kernel(x: Tensor) -> type[_Cuda] | type[_Cpu]:
    return _Cuda if x.is_cuda else _Cpu


# ------------------------------------------------------------------------------------------------------------- chains

Ranges = list[tuple[int, int]]


@dataclass(frozen=True)
class _Chain:
    """Queries start … stop, the rows of a batch put one after the other, and the places of their keys: of ancestors, as far as
    the window of the first query reaches, and of the chain itself."""

    start: int
    stop: int
    keys: Ranges


def _chains(subtree_end: Tensor, *, sliding_window: int | None) -> list[_Chain]:
    row, found = chains(subtree_end), []
    for path, start, stop in zip(row.paths(), row.start.tolist(), row.stop.tolist(), strict=True):
        keys, count = [*path, (start, stop)], sum(b - a for a, b in path) + stop - start
        if sliding_window is not None:
            keys = _cut(keys, max(0, count - (stop - start) - (sliding_window - 1)), count)
        found.append(_Chain(start, stop, keys))
    return found


def _cut(ranges: Ranges, first: int, last: int) -> Ranges:
    """The first-th to the last-th place of the ranges."""
    found, before = [], 0
    for a, b in ranges:
        low, high = max(a, a + first - before), min(b, a + last - before)
        if low < high:
            found.append((low, high))
        before += b - a
    return found


def gathered_keys(subtree_end: Tensor, *, sliding_window: int | None) -> int:
    """How many keys are gathered on CUDA for a call with these ends."""
    return sum(b - a for chain in _chains(subtree_end, sliding_window=sliding_window) for a, b in chain.keys)


def _alone(subtree_end: Tensor) -> Tensor:
    """int64, the trees of one token, which is padding. They are one chain and would see each other, so nothing is taken of
    what a kernel computes for them."""
    return torch.from_numpy(chains(subtree_end).alone).to(subtree_end.device)


# --------------------------------------------------------------------------------------------------------------- CUDA


@dataclass(frozen=True)
class Sequences:
    """The chains of a batch as a variable-length kernel takes them: C of them, with K gathered keys.

    Attributes:
        queries, keys: int32 (C + 1,), where in the row, and among the gathered keys, each begins.
        longest: of queries, and of keys.
        read: int64 (K,), the token of each gathered key.
        rounds: (places among the gathered, their tokens), int64: in round r those that are gathered for the r-th time.
    """

    queries: Tensor
    keys: Tensor
    longest: tuple[int, int]
    read: Tensor
    rounds: list[tuple[Tensor, Tensor]]

    def add_up(self, gathered: Tensor, length: int) -> Tensor:
        """Gradients of gathered keys -> of the row's, float32 (length, …). No token occurs twice in a round, so the order in
        which it is added to is that of the rounds."""
        total = gathered.new_zeros(length, *gathered.shape[1:], dtype=torch.float32)
        for places, tokens in self.rounds:
            total.index_add_(0, tokens, gathered[places].float())
        return total


def sequences(subtree_end: Tensor, *, sliding_window: int | None) -> Sequences:
    """Args:
    subtree_end: int32 (batch, L).
    sliding_window: None, or how far a query sees.
    """
    found = _chains(subtree_end, sliding_window=sliding_window)
    begin, end = np.array([r for chain in found for r in chain.keys]).T
    size = end - begin
    read = np.repeat(begin - (size.cumsum() - size), size) + np.arange(size.sum())

    order = np.argsort(read, kind="stable")
    ordered, place = read[order], np.arange(len(read))
    first = np.maximum.accumulate(np.where(np.append(True, ordered[1:] != ordered[:-1]), place, 0))
    times = np.empty_like(place)  # a key was gathered before
    times[order] = place - first
    by_times = np.argsort(times, kind="stable")
    rounds = np.split(by_times, np.bincount(times).cumsum()[:-1])

    def tensor(x: np.ndarray) -> Tensor:
        return torch.from_numpy(x).to(subtree_end.device)

    lengths = np.array([(chain.stop - chain.start, sum(b - a for a, b in chain.keys)) for chain in found])
    starts = np.concatenate([np.zeros((1, 2), np.int64), lengths.cumsum(0)]).astype(np.int32)
    return Sequences(
        queries=tensor(starts[:, 0].copy()),
        keys=tensor(starts[:, 1].copy()),
        longest=tuple(lengths.max(0).tolist()),
        read=tensor(read),
        rounds=[(tensor(places), tensor(read[places])) for places in rounds],
    )


class _Cuda:
    """The operators below `torch.nn.attention.varlen` (FlashAttention 2, or what `activate_flash_attention_impl` put there):
    through it the gathered keys would be kept until the backward. Arguments: (T, heads, D), T the tokens of the batch."""

    @staticmethod
    def forward(q, k, v, subtree_end: Tensor, scale: float, window: int | None) -> tuple[Tensor, Tensor]:
        row = once_per_forward(sequences, subtree_end, sliding_window=window)
        out, lse, *_ = torch.ops.aten._flash_attention_forward(
            q, k[row.read], v[row.read], row.queries, row.keys, *row.longest, 0.0, True, False,
            scale=scale, **_window_of(window),
        )  # fmt: skip
        return out, lse

    @staticmethod
    def backward(do, q, k, v, out, lse, subtree_end: Tensor, scale: float, window: int | None) -> tuple[Tensor, ...]:
        row = once_per_forward(sequences, subtree_end, sliding_window=window)
        state = torch.zeros(2, dtype=torch.uint64, device=q.device)  # of random numbers: there is no dropout
        dq, dk, dv = torch.ops.aten._flash_attention_backward(
            do, q, k[row.read], v[row.read], out, lse, row.queries, row.keys, *row.longest, 0.0, True, state,
            q.new_empty(0), scale=scale, **_window_of(window),
        )  # fmt: skip
        return dq, row.add_up(dk, len(q)), row.add_up(dv, len(q))


def _window_of(window: int | None) -> dict[str, int]:
    return {"window_size_left": -1 if window is None else window - 1, "window_size_right": 0}


# ---------------------------------------------------------------------------------------------------------------- CPU


class _Cpu:
    """The operator below PyTorch's attention on a CPU, piece by piece: queries' own places, causally, and what lies before
    them, as a whole. It knows no window; there an edge is masked.

    The pieces of the forward are put together by their log-sum-exps; a backward that is given the output and log-sum-exp
    of the whole gives the gradients of the whole. 16 bits are forward only: the backward is computed in float32.

    The operator knows no groups either. Queries of a group lie below each other as one head where all of them see all keys,
    and each beside the same keys, without a copy of them, elsewhere.
    """

    @staticmethod
    def forward(q, k, v, subtree_end: Tensor, scale: float, window: int | None) -> tuple[Tensor, Tensor]:
        out, lse = q.new_empty(q.shape), q.new_empty(q.shape[1], len(q), dtype=torch.float32)
        together = _together(q, k)
        for queries, pieces in _pieces(once_per_forward(_chains, subtree_end, sliding_window=window), window, together):
            of_block, merged, norm = _grouped(q[queries], k), None, None
            for keys, options in pieces:
                heads = _Heads.of(of_block, together and options is _whole)
                part, part_norm = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
                    heads.queries(of_block), *(heads.keys(_gather(x, keys)) for x in (k, v)), **options(q), scale=scale
                )
                part, part_norm = heads.back(part), part_norm.view(of_block.shape[:3])
                if merged is None:
                    merged, norm = part, part_norm
                    continue
                total = torch.logaddexp(norm, part_norm)
                before, here = ((x - total).exp_()[..., None] for x in (norm, part_norm))
                merged, norm = merged * before + part * here, total
            out[queries] = rearrange(merged, "g r n d -> n (g r) d")
            lse[:, queries] = norm.flatten(0, 1)
        return out, lse

    @staticmethod
    def backward(do, q, k, v, out, lse, subtree_end: Tensor, scale: float, window: int | None) -> tuple[Tensor, ...]:
        dq, dk, dv = (x.new_zeros(x.shape, dtype=torch.float32) for x in (q, k, v))
        k, v = k.float(), v.float()  # once, and not for every piece
        together = _together(q, k)
        for queries, pieces in _pieces(once_per_forward(_chains, subtree_end, sliding_window=window), window, together):
            of_block = [_grouped(x[queries].float(), k) for x in (do, q, out)]
            norm = lse[:, queries].contiguous()
            for keys, options in pieces:
                heads = _Heads.of(of_block[0], together and options is _whole)
                of_queries = [heads.queries(x) for x in of_block]
                found = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
                    *of_queries[:2], *(heads.keys(_gather(x, keys)) for x in (k, v)), of_queries[2],
                    norm.view(of_queries[0].shape[:3]), 0.0, **options(dq), scale=scale,
                )  # fmt: skip
                dq[queries] += rearrange(heads.back(found[0]), "g r n d -> n (g r) d")
                for total, x in zip((dk, dv), found[1:], strict=True):
                    _add(total, keys, rearrange(x.sum(1), "g m d -> m g d"))
        return dq, dk, dv


def _together(q: Tensor, k: Tensor) -> bool:
    """Whether to compute the heads of a group as one: larger products, but the operator's backward gives a thread a head."""
    return q.shape[1] > k.shape[1] >= torch.get_num_threads()


@dataclass(frozen=True)
class _Heads:
    """How (groups, heads of each, n, D) queries and (m, groups, D) keys are shown to the operator."""

    each: int
    together: bool

    @classmethod
    def of(cls, grouped: Tensor, together: bool) -> _Heads:
        return cls(grouped.shape[1], together)

    def queries(self, x: Tensor) -> Tensor:
        return rearrange(x, "g r n d -> g 1 (r n) d") if self.together else x

    def back(self, x: Tensor) -> Tensor:
        return rearrange(x, "g 1 (r n) d -> g r n d", r=self.each) if self.together else x

    def keys(self, x: Tensor) -> Tensor:
        x = rearrange(x, "m g d -> g 1 m d")
        return x if self.together else x.expand(-1, self.each, -1, -1)


def _grouped(x: Tensor, k: Tensor) -> Tensor:
    return rearrange(x, "n (g r) d -> g r n d", g=k.shape[1]).contiguous()


def _gather(x: Tensor, ranges: Ranges) -> Tensor:
    pieces = [x[a:b] for a, b in ranges]
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces)


def _add(total: Tensor, ranges: Ranges, addend: Tensor) -> None:
    for (a, b), piece in zip(ranges, addend.split([b - a for a, b in ranges]), strict=True):
        total[a:b] += piece


def _pieces(
    row: list[_Chain], window: int | None, together: bool
) -> Iterator[tuple[slice, list[tuple[Ranges, Callable]]]]:
    """Queries, and the keys they see piece by piece, with what the kernel is told of each."""
    for chain in row:
        n, m = chain.stop - chain.start, sum(b - a for a, b in chain.keys)
        step = _BLOCK if together else n
        step = step if window is None else max(1, min(_BLOCK, window - 1))
        for first in range(0, n, step):
            last = min(first + step, n)
            a, b = first + m - n, last + m - n  # their own keys, among those of the chain
            pieces, whole = [(a, b, _causal)], 0
            if window is not None:
                reached, whole = (max(0, query - window + 1) for query in (a, b - 1))
                if reached < whole:
                    # Query a + i sees the keys from a + i - window + 1 on. One more, which all see, so that nobody sees none.
                    hidden = a - window + 1 - reached
                    whole += 1
                    pieces.append((reached, whole, partial(_edge, queries=b - a, keys=whole - reached, hidden=hidden)))
            if whole < a:
                pieces.append((whole, a, _whole))
            yield (
                slice(chain.start + first, chain.start + last),
                [(_cut(chain.keys, low, high), options) for low, high, options in pieces],
            )


def _causal(q: Tensor) -> dict:
    return {"is_causal": True}


def _whole(q: Tensor) -> dict:
    return {"is_causal": False}


def _edge(q: Tensor, *, queries: int, keys: int, hidden: int) -> dict:
    """Hides the first hidden + i keys from query i."""
    mask = q.new_full((queries, keys), -torch.inf).tril_(hidden - 1)
    return {"is_causal": False, "attn_mask": mask[None, None]}

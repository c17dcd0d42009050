"""Tree attention by chains, without a mask, on stock kernels: FlashAttention on CUDA, PyTorch's fused attention on a CPU.

A tree lies depth-first, so a chain of n tokens with p ancestors is a sequence: n queries, which lie in the row one after the
other, against p + n keys, causal and aligned at the end. Positions along a path are consecutive, so a sliding window is one
of the sequence, and ancestors beyond it are not touched. Gradients of keys, which several chains read, are added up in
float32 in a fixed order.

On CUDA a row is one call of the variable-length kernel. It wants the keys of a sequence side by side, so those of all chains
are gathered into one tensor, each after its ancestors'; it lives during the call, and is made again for the backward, where
the kernel takes their gradients as well, for each query head if those share keys. The most it can be: 24 steps of an agent
(22,000 tokens) gather 180,000 keys; a thousand forks off one beginning, a thousand times that beginning, whose gradients are
then added up in a thousand steps. Repeatability is that of the kernel: FlashAttention 2 adds up the gradients of queries in
any order, unless `torch.use_deterministic_algorithms(True)` (with `warn_only=True` it warns and does). Its forward repeats bit by
bit, and so does everything on a CPU.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from inspect import signature

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
_LEAST_QUERIES = 32  # of a call, on average, on a CPU: see `pays`


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
            in positions along paths; a device that has no such kernel; while a CUDA graph is captured.
    """
    head_dim, value_dim, device = query.shape[-1], value.shape[-1], query.device
    size = max(head_dim, value_dim)
    no_kernel = device.type not in ("cpu", "cuda") or (query.is_cuda and not _has_flash_attention(device))
    for what, unsupported, who in (
        ("float64", query.dtype == torch.float64, "blockwise"),
        (f"{query.dtype} on cuda", query.is_cuda and query.dtype == torch.float32, "blockwise"),
        ("a soft-cap", softcap is not None, "blockwise"),
        ("sinks", sinks is not None, "blockwise"),
        (f"a head size of {size}", size > MAX_HEAD_DIM, "blockwise"),
        ("an empty batch", not query.numel(), "blockwise"),
        (f"attention on this {device.type} device, for which PyTorch has no FlashAttention", no_kernel, "blockwise"),
        ("CUDA graphs", query.is_cuda and torch.cuda.is_current_stream_capturing(), "triton"),
    ):
        if unsupported:
            raise NotImplementedError(f"backend 'flash' cannot do {what}; backend '{who}' can")
    if not torch.compiler.is_compiling():
        _check_positions(subtree_end, position_ids)  # before anything is copied
    size = head_size(head_dim, value_dim)  # of the kernel
    query, key, value = (x if x.shape[-1] == size else pad(x, (0, size - x.shape[-1])) for x in (query, key, value))
    return _forward(query, key, value, subtree_end, position_ids, scale, sliding_window)[0][..., :value_dim]


def head_size(head_dim: int, value_dim: int) -> int:
    """The kernels know one size, of queries, keys and values."""
    return -(-max(head_dim, value_dim) // _MULTIPLE) * _MULTIPLE


def _has_flash_attention(device: torch.device) -> bool:
    # ROCm's passes for CUDA, and takes a window of -1 on the left for one.
    if torch.version.hip is not None:
        return False
    return torch.backends.cuda.is_flash_attention_available() and torch.cuda.get_device_capability(device) >= (8, 0)


def pays(subtree_end: Tensor, *, first: int, sliding_window: int | None) -> bool:
    """Whether a CPU gains by it: each call of the kernel costs the same however few queries it has. Measured on two cores
    (benchmarks/LOG.md), a call of 50 is faster than `blockwise`, one of 20 slower."""
    row = once_per_forward(_chains, subtree_end, first=first, sliding_window=sliding_window)
    lengths = [chain.stop - chain.start for chain in row if not chain.alone]
    step = _BLOCK if sliding_window is None else _window_step(sliding_window)
    return sum(lengths) >= _LEAST_QUERIES * sum(-(-n // step) for n in lengths)


# It reads subtree_end, which no CUDA graph can.
_takes_tags = hasattr(torch.Tag, "cudagraph_unsafe") and "tags" in signature(torch.library.custom_op).parameters
_unsafe = {"tags": (torch.Tag.cudagraph_unsafe,)} if _takes_tags else {}


@torch.library.custom_op("flexmask::flash_forward", mutates_args=(), **_unsafe)
def _forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    subtree_end: Tensor,
    position_ids: Tensor | None,
    scale: float,
    sliding_window: int | None,
) -> tuple[Tensor, Tensor]:
    """The output, (batch, heads, L, head_dim), and the log-sum-exp of the scores, float32 (heads, batch · L); of n queries, n in
    place of L."""
    _check_positions(subtree_end, position_ids)
    q, k, v = map(_tokens_first, (query, key, value))
    out, lse = _kernel(q).forward(q, k, v, subtree_end, scale, sliding_window)
    alone = once_per_forward(_alone, subtree_end, first=len(k) - len(q))
    if len(alone):
        out[alone - (len(k) - len(q))] = v[alone].repeat_interleave(q.shape[1] // k.shape[1], 1)
    return _heads_first(out, query), lse


@_forward.register_fake
def _(query, key, value, subtree_end, position_ids, scale, sliding_window):
    batch, heads, length, head_dim = query.shape
    out = query.new_empty(batch, length, heads, head_dim).transpose(1, 2)
    return out, query.new_empty(heads, batch * length, dtype=torch.float32)


@torch.library.custom_op("flexmask::flash_backward", mutates_args=(), **_unsafe)
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
    alone = once_per_forward(_alone, subtree_end, first=len(k) - len(q))
    queries = alone - (len(k) - len(q))
    of_alone = do[queries]
    if len(alone):
        do = do.index_fill(0, queries, 0)
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
    """The kernels take any strides but in the last dimension."""
    x = rearrange(x, "b h l d -> (b l) h d")
    return x if x.stride(-1) == 1 else x.contiguous()


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
    the window of the first query reaches, and of the queries themselves. Queries are counted from the first that there is.

    Trees of one token, which is padding, are one chain (`alone`) and would see each other, so nothing is taken of what a kernel
    computes for them."""

    start: int
    stop: int
    keys: Ranges
    alone: bool


def _chains(subtree_end: Tensor, *, first: int, sliding_window: int | None) -> list[_Chain]:
    row, found = once_per_forward(chains, subtree_end), []
    alone = np.isin(row.start, row.alone).tolist()
    for path, start, stop, of_one in zip(row.paths(), row.start.tolist(), row.stop.tolist(), alone, strict=True):
        if stop <= first:
            continue
        keys, count = [*path, (start, stop)], sum(b - a for a, b in path) + stop - start
        start = max(start, first)
        if sliding_window is not None:
            keys = _cut(keys, max(0, count - (stop - start) - (sliding_window - 1)), count)
        found.append(_Chain(start - first, stop - first, keys, of_one))
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
    return sum(b - a for chain in _chains(subtree_end, first=0, sliding_window=sliding_window) for a, b in chain.keys)


def _alone(subtree_end: Tensor, *, first: int) -> Tensor:
    """int64, the trees of one token, from the first query on."""
    alone = once_per_forward(chains, subtree_end).alone
    return torch.from_numpy(alone[alone >= first]).to(subtree_end.device)


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


def sequences(subtree_end: Tensor, *, first: int = 0, sliding_window: int | None) -> Sequences:
    """Args:
    subtree_end: int32 (batch, L).
    first: the first query.
    sliding_window: None, or how far a query sees.
    """
    found = _chains(subtree_end, first=first, sliding_window=sliding_window)
    begin, end = np.array([r for chain in found for r in chain.keys]).T
    size = end - begin
    read = np.repeat(begin - (size.cumsum() - size), size) + np.arange(size.sum())

    order = np.argsort(read, kind="stable")
    ordered, place = read[order], np.arange(len(read))
    first = np.maximum.accumulate(np.where(np.append(True, ordered[1:] != ordered[:-1]), place, 0))
    times = np.empty_like(place)  # a key was gathered before
    times[order] = place - first
    by_times = np.argsort(times, kind="stable")
    sizes = np.bincount(times).tolist()

    def tensor(x: np.ndarray) -> Tensor:
        return torch.from_numpy(x).to(subtree_end.device)

    lengths = np.array([(chain.stop - chain.start, sum(b - a for a, b in chain.keys)) for chain in found])
    starts = np.concatenate([np.zeros((1, 2), np.int64), lengths.cumsum(0)]).astype(np.int32)
    return Sequences(
        queries=tensor(starts[:, 0].copy()),
        keys=tensor(starts[:, 1].copy()),
        longest=tuple(lengths.max(0).tolist()),
        read=tensor(read),
        rounds=list(zip(*(tensor(x).split(sizes) for x in (by_times, read[by_times])), strict=True)),
    )


class _Cuda:
    """The operators below `torch.nn.attention.varlen` (FlashAttention 2, or what `activate_flash_attention_impl` put there):
    through it the gathered keys would be kept until the backward. Arguments: (T, heads, D), T the tokens of the batch."""

    @staticmethod
    def forward(q, k, v, subtree_end: Tensor, scale: float, window: int | None) -> tuple[Tensor, Tensor]:
        row = once_per_forward(sequences, subtree_end, first=len(k) - len(q), sliding_window=window)
        out, lse, *_ = torch.ops.aten._flash_attention_forward(
            q, k[row.read], v[row.read], row.queries, row.keys, *row.longest, 0.0, True, False,
            scale=scale, **_window_of(window),
        )  # fmt: skip
        return out, lse

    @staticmethod
    def backward(do, q, k, v, out, lse, subtree_end: Tensor, scale: float, window: int | None) -> tuple[Tensor, ...]:
        row = once_per_forward(sequences, subtree_end, first=len(k) - len(q), sliding_window=window)
        state = torch.zeros(2, dtype=torch.uint64, device=q.device)  # of random numbers: there is no dropout
        dq, dk, dv = torch.ops.aten._flash_attention_backward(
            do, q, k[row.read], v[row.read], out, lse, row.queries, row.keys, *row.longest, 0.0, True, state,
            q.new_empty(0), scale=scale, **_window_of(window),
        )  # fmt: skip
        return dq, row.add_up(dk, len(k)), row.add_up(dv, len(k))


def _window_of(window: int | None) -> dict[str, int]:
    return {"window_size_left": -1 if window is None else window - 1, "window_size_right": 0}


# ---------------------------------------------------------------------------------------------------------------- CPU


class _Cpu:
    """The operator below PyTorch's attention on a CPU, piece by piece: queries' own places, causally, and what lies before
    them, as a whole. It knows no window; there an edge is masked.

    The pieces of the forward are put together by their log-sum-exps; a backward that is given the output and log-sum-exp
    of the whole gives the gradients of the whole. The operator's backward in 16 bits is several times slower than in float32,
    unless the processor has products of its own for them: elsewhere it is computed in float32.

    The operator knows no groups either. Queries of a group lie below each other as one head where all of them see all keys,
    and each beside the same keys, without a copy of them, elsewhere.
    """

    @staticmethod
    def forward(q, k, v, subtree_end: Tensor, scale: float, window: int | None) -> tuple[Tensor, Tensor]:
        out, lse = q.new_empty(q.shape), q.new_zeros(q.shape[1], len(q), dtype=torch.float32)
        together = _together(q, k)
        row = once_per_forward(_chains, subtree_end, first=len(k) - len(q), sliding_window=window)
        for queries, pieces in _pieces(row, window, together):
            of_block, merged, norm = _grouped(q[queries], k), None, None
            for piece in pieces:
                heads = _Heads(of_block.shape[1], together and piece.kind == "whole")
                part, part_norm = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
                    heads.queries(of_block), *(heads.keys(_gather(x, piece.keys)) for x in (k, v)),
                    **piece.options(of_block), scale=scale,
                )  # fmt: skip
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
        dtype = q.dtype if _has_products_of(q.dtype) else torch.float32
        k, v = k.to(dtype), v.to(dtype)  # once, and not for every piece
        together = _together(q, k)
        row = once_per_forward(_chains, subtree_end, first=len(k) - len(q), sliding_window=window)
        for queries, pieces in _pieces(row, window, together):
            of_block = [_grouped(x[queries].to(dtype), k) for x in (do, q, out)]
            norm = lse[:, queries].contiguous()
            for piece in pieces:
                heads = _Heads(of_block[0].shape[1], together and piece.kind == "whole")
                of_queries = [heads.queries(x) for x in of_block]
                found = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
                    *of_queries[:2], *(heads.keys(_gather(x, piece.keys)) for x in (k, v)), of_queries[2],
                    norm.view(of_queries[0].shape[:3]), 0.0, **piece.options(of_block[0]), scale=scale,
                )  # fmt: skip
                dq[queries] += rearrange(heads.back(found[0]), "g r n d -> n (g r) d")
                for total, x in zip((dk, dv), found[1:], strict=True):
                    _add(total, piece.keys, rearrange(x.sum(1, dtype=torch.float32), "g m d -> m g d"))
        return dq, dk, dv


def _has_products_of(dtype: torch.dtype) -> bool:
    """Of Intel's AMX, which PyTorch tells of in private."""
    return dtype == torch.bfloat16 and getattr(torch.cpu, "_is_amx_tile_supported", lambda: False)()


def _together(q: Tensor, k: Tensor) -> bool:
    """Whether to compute the heads of a group as one: larger products, but the operator's backward gives a thread a head."""
    return q.shape[1] > k.shape[1] >= torch.get_num_threads()


@dataclass(frozen=True)
class _Heads:
    """How (groups, heads of each, n, D) queries and (m, groups, D) keys are shown to the operator."""

    each: int
    together: bool

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


@dataclass(frozen=True)
class _Piece:
    """Keys that a block of queries sees "whole", as its own places ("causal"), or through the "edge" of its window, which hides
    the first hidden + i of them from query i."""

    keys: Ranges
    kind: str
    hidden: int = 0

    def options(self, q: Tensor) -> dict:
        """What the operator is told, for (…, n, D) queries."""
        if self.kind != "edge":
            return {"is_causal": self.kind == "causal"}
        mask = q.new_full((q.shape[-2], sum(b - a for a, b in self.keys)), -torch.inf).tril_(self.hidden - 1)
        return {"is_causal": False, "attn_mask": mask[None, None]}


def _pieces(row: list[_Chain], window: int | None, together: bool) -> Iterator[tuple[slice, list[_Piece]]]:
    """Blocks of queries, and what they see, piece by piece."""
    for chain in row:
        if chain.alone:
            continue
        n, m = chain.stop - chain.start, sum(b - a for a, b in chain.keys)
        step = _window_step(window) if window is not None else _BLOCK if together else n
        for first in range(0, n, step):
            last = min(first + step, n)
            a, b = first + m - n, last + m - n  # their own keys, among those of the chain
            pieces, whole = [_Piece(_cut(chain.keys, a, b), "causal")], 0
            if window is not None:
                reached, whole = (max(0, query - window + 1) for query in (a, b - 1))
                if reached < whole:
                    # Query a + i sees the keys from a + i - window + 1 on. One more, which all see, so that nobody sees none.
                    whole += 1
                    pieces.append(_Piece(_cut(chain.keys, reached, whole), "edge", a - window + 1 - reached))
            if whole < a:
                pieces.append(_Piece(_cut(chain.keys, whole, a), "whole"))
            yield slice(chain.start + first, chain.start + last), pieces


def _window_step(window: int) -> int:
    """Queries of a block that share a key which all of them see."""
    return max(1, min(_BLOCK, window - 1))

"""Tree attention in plain PyTorch: any device PyTorch runs on, float64 too, forward and backward.

Queries are taken a block at a time. The keys that any of them sees are the ancestors of the block's first query (the
tokens before it whose subtree reaches it), a few contiguous ranges, and the block itself; nothing else is touched. The
ancestors' ends never grow along the path, so those that see the whole block come first and only the tail is masked.
The backward recomputes the probabilities from the saved log-sum-exp. Memory grows linearly with L.

    s = softcap(scale · q·kᵀ),  lse = log(Σ exp s + exp sink),  p = exp(s − lse),  o = p·v
    ds = p ∘ (do·vᵀ − Σ do∘o),  dq = scale · ds·k,  dk = scale · dsᵀ·q,  dv = pᵀ·do      (FlashAttention-2, 2307.08691)
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from einops import rearrange
from torch import Tensor

# Larger blocks mean fewer, larger products; smaller ones mask less. Measured on two CPU cores, see benchmarks/LOG.md.
QUERY_BLOCK = 128


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
    """See `flexmask.tree_attention`, which checks the arguments."""
    return _forward(query, key, value, subtree_end, position_ids, sinks, scale, softcap, sliding_window)[0]


@dataclass(frozen=True)
class _Tile:
    """A block of queries [start, stop) and the keys it reads: ranges of places, in order."""

    start: int
    stop: int
    ranges: list[tuple[int, int]]
    keys: np.ndarray  # the same, place by place
    masked_from: int  # keys before this one (in order) are visible to every query of the block

    def gather(self, x_GLD: Tensor) -> Tensor:
        pieces = [x_GLD[:, a:b] for a, b in self.ranges]
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces, 1)

    def add_to(self, x_GLD: Tensor, addend_GKD: Tensor) -> None:
        for (a, b), piece in zip(self.ranges, addend_GKD.split([b - a for a, b in self.ranges], 1)):
            x_GLD[:, a:b] += piece

    def hidden(self, subtree_end: np.ndarray, positions: np.ndarray | None, window: int | None) -> np.ndarray:
        """bool (queries, keys from `masked_from` on): what must not be seen."""
        queries = np.arange(self.start, self.stop)[:, None]
        keys = self.keys[self.masked_from :]
        hidden = (keys > queries) | (subtree_end[keys] <= queries)
        if window is not None:
            hidden |= positions[queries] - positions[keys] >= window
        return hidden


def _tiles(subtree_end: np.ndarray, positions: np.ndarray | None, window: int | None) -> Iterator[_Tile]:
    for start in range(0, len(subtree_end), QUERY_BLOCK):
        stop = min(start + QUERY_BLOCK, len(subtree_end))
        ancestors = np.flatnonzero(subtree_end[:start] > start)
        if window is not None:
            ancestors = ancestors[positions[ancestors] > positions[start:stop].min() - window]
        keys = np.concatenate([ancestors, np.arange(start, stop)])
        breaks = np.flatnonzero(np.diff(keys) != 1) + 1
        ranges = [(int(r[0]), int(r[-1]) + 1) for r in np.split(keys, breaks)]
        masked_from = 0 if window is not None else int((subtree_end[ancestors] >= stop).sum())
        yield _Tile(start, stop, ranges, keys, masked_from)


class _Problem:
    """The arrays of one attention call, head groups split out, and the work on one tile.

    Shapes: G key/value heads, R query heads per key/value head, L tokens, D and V head sizes, Q queries and K keys of
    a tile. Low precision is computed in float32.
    """

    def __init__(self, query, key, value, subtree_end, position_ids, sinks, scale, softcap, window):
        self.dtype = torch.float64 if query.dtype == torch.float64 else torch.float32
        self.heads, self.groups = query.shape[0], key.shape[0]
        self.query, self.key, self.value = query, key, value
        self.sinks = None if sinks is None else self.split(sinks.to(self.dtype)[:, None])  # G R 1
        self.subtree_end = subtree_end.cpu().numpy()
        self.positions = None if window is None else position_ids.cpu().numpy()
        self.scale, self.softcap, self.window = scale, softcap, window

    def split(self, x: Tensor) -> Tensor:
        return rearrange(x, "(g r) ... -> g r ...", g=self.groups)

    def tiles(self) -> Iterator[_Tile]:
        return _tiles(self.subtree_end, self.positions, self.window)

    def rows(self, x_HLD: Tensor, tile: _Tile) -> Tensor:
        """Queries of a tile as G (R Q) D, so that the query heads of a group share one product with its keys."""
        rows = rearrange(x_HLD[:, tile.start : tile.stop], "(g r) q d -> g (r q) d", g=self.groups)
        return rows.to(self.dtype)

    def scores(self, tile: _Tile) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Scaled queries, keys, capped scores with -inf where hidden, and the derivative of the cap (or None)."""
        q = self.rows(self.query, tile) * self.scale
        k = tile.gather(self.key).to(self.dtype)
        s = q @ k.mT
        slope = None
        if self.softcap is not None:
            s = s.div_(self.softcap).tanh_()
            slope = 1 - s * s
            s = s.mul_(self.softcap)
        if tile.masked_from < len(tile.keys):
            hidden = torch.from_numpy(tile.hidden(self.subtree_end, self.positions, self.window)).to(s.device)
            s.unflatten(1, (-1, tile.stop - tile.start))[..., tile.masked_from :].masked_fill_(hidden, -torch.inf)
        return q, k, s, slope


@torch.library.custom_op("flexmask::blockwise_forward", mutates_args=())
def _forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    subtree_end: Tensor,
    position_ids: Tensor | None,
    sinks: Tensor | None,
    scale: float,
    softcap: float | None,
    sliding_window: int | None,
) -> tuple[Tensor, Tensor]:
    out, lse = _empty_outputs(query, value)
    for b in range(query.shape[0]):
        positions = None if position_ids is None else position_ids[b]
        p = _Problem(query[b], key[b], value[b], subtree_end[b], positions, sinks, scale, softcap, sliding_window)
        for tile in p.tiles():
            _, _, s, _ = p.scores(tile)
            top = s.amax(-1, keepdim=True)
            weights = s.sub_(top).exp_()
            total = weights.sum(-1, keepdim=True)
            o = weights @ tile.gather(p.value).to(p.dtype)
            norm = top + total.log()
            if p.sinks is not None:
                norm = torch.logaddexp(norm.unflatten(1, (-1, tile.stop - tile.start)), p.sinks[..., None]).flatten(
                    1, 2
                )
            o *= (top - norm).exp()
            queries = slice(tile.start, tile.stop)
            out[b, :, queries] = rearrange(o, "g (r q) d -> (g r) q d", q=tile.stop - tile.start)
            lse[b, :, queries] = rearrange(norm, "g (r q) 1 -> (g r) q", q=tile.stop - tile.start)
    return out, lse


def _empty_outputs(query: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    batch, heads, length, _ = query.shape
    lse_dtype = torch.float64 if query.dtype == torch.float64 else torch.float32
    return query.new_empty(batch, heads, length, value.shape[-1]), query.new_empty(
        batch, heads, length, dtype=lse_dtype
    )


@_forward.register_fake
def _(query, key, value, subtree_end, position_ids, sinks, scale, softcap, sliding_window):
    return _empty_outputs(query, value)


@torch.library.custom_op("flexmask::blockwise_backward", mutates_args=())
def _backward(
    grad_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    subtree_end: Tensor,
    position_ids: Tensor | None,
    sinks: Tensor | None,
    scale: float,
    softcap: float | None,
    sliding_window: int | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dq, dk, dv, dsinks = _empty_gradients(query, key, value, sinks)
    dsinks.zero_()
    for b in range(query.shape[0]):
        positions = None if position_ids is None else position_ids[b]
        p = _Problem(query[b], key[b], value[b], subtree_end[b], positions, sinks, scale, softcap, sliding_window)
        dk_GLD = torch.zeros_like(key[b], dtype=p.dtype, memory_format=torch.contiguous_format)
        dv_GLV = torch.zeros_like(value[b], dtype=p.dtype, memory_format=torch.contiguous_format)
        for tile in p.tiles():
            q, k, s, slope = p.scores(tile)
            do = p.rows(grad_out[b], tile)
            delta = (do * p.rows(out[b], tile)).sum(-1, keepdim=True)
            norm = p.rows(lse[b, :, :, None], tile)
            weights = s.sub_(norm).exp_()
            tile.add_to(dv_GLV, weights.mT @ do)
            ds = (do @ tile.gather(p.value).to(p.dtype).mT).sub_(delta).mul_(weights)
            if slope is not None:
                ds *= slope
            tile.add_to(dk_GLD, ds.mT @ q)
            block = rearrange(ds @ k, "g (r q) d -> (g r) q d", q=tile.stop - tile.start)
            dq[b, :, tile.start : tile.stop] = block.mul_(scale)
            if p.sinks is not None:
                by_head = (-1, tile.stop - tile.start)
                share = (p.sinks[..., None] - norm.unflatten(1, by_head)).exp() * delta.unflatten(1, by_head)
                dsinks -= share.sum((-1, -2)).flatten().to(dsinks.dtype)
        dk[b], dv[b] = dk_GLD, dv_GLV
    return dq, dk, dv, dsinks


def _empty_gradients(query, key, value, sinks) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dsinks = query.new_empty(0) if sinks is None else torch.empty_like(sinks)
    return *(torch.empty_like(x, memory_format=torch.contiguous_format) for x in (query, key, value)), dsinks


@_backward.register_fake
def _(grad_out, query, key, value, out, lse, subtree_end, position_ids, sinks, scale, softcap, sliding_window):
    return _empty_gradients(query, key, value, sinks)


def _setup_context(ctx, inputs, output):
    *tensors, ctx.scale, ctx.softcap, ctx.sliding_window = inputs
    ctx.save_for_backward(*tensors, *output)


def _autograd(ctx, grad_out, _grad_lse):
    query, key, value, subtree_end, position_ids, sinks, out, lse = ctx.saved_tensors
    dq, dk, dv, dsinks = _backward(
        grad_out, query, key, value, out, lse, subtree_end, position_ids, sinks,
        ctx.scale, ctx.softcap, ctx.sliding_window,
    )  # fmt: skip
    return dq, dk, dv, None, None, None if sinks is None else dsinks, None, None, None


_forward.register_autograd(_autograd, setup_context=_setup_context)

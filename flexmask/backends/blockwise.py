"""Tree attention in plain PyTorch: any device PyTorch runs on, float64 too, forward and backward.

Queries are taken a block at a time. The keys that any of them sees are the ancestors of the block's first query (the
tokens before it whose subtree reaches it), a few contiguous ranges, and the block itself; nothing else is touched. The
ancestors' ends never grow along the path, so those that see the whole block come first and only the tail is masked.
Keys are taken a chunk at a time, so that the scores stay in the cache, under a running softmax. The backward
recomputes the probabilities from the saved log-sum-exp. Memory grows linearly with L.

    s = softcap(scale · q·kᵀ),  lse = log(Σ exp s + exp sink),  p = exp(s − lse),  o = p·v
    ds = p ∘ (do·vᵀ − Σ do∘o),  dq = scale · ds·k,  dk = scale · dsᵀ·q,  dv = pᵀ·do      (FlashAttention-2, 2307.08691)
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

# Larger blocks mean fewer, larger products; smaller ones mask less. Measured on two CPU cores, see benchmarks/LOG.md.
QUERY_BLOCK = 128
KEY_CHUNK = 1024  # at least QUERY_BLOCK: see `_Tile`
_LOG2_E = math.log2(math.e)  # exponentials are of base 2, which PyTorch has three times faster on a CPU


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
class _Chunk:
    """Keys that a block of queries reads: ranges of places, in order."""

    ranges: list[tuple[int, int]]
    hidden: np.ndarray | None  # bool (queries, keys from `masked_from` on): what must not be seen
    masked_from: int  # keys before this one (in order) are visible to every query of the block

    def gather(self, x_GLD: Tensor) -> Tensor:
        pieces = [x_GLD[:, a:b] for a, b in self.ranges]
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces, 1)

    def add_to(self, x_GLD: Tensor, addend_GKD: Tensor) -> None:
        done = 0
        for a, b in self.ranges:
            x_GLD[:, a:b] += addend_GKD[:, done : done + b - a]
            done += b - a


@dataclass(frozen=True)
class _Tile:
    """A block of queries [start, stop) and the keys it reads. The first chunk holds the queries' own places, so a running
    softmax has a score for each of them from the beginning."""

    start: int
    stop: int
    chunks: list[_Chunk]


def _tiles(subtree_end: np.ndarray, first: int, positions: np.ndarray | None, window: int | None) -> Iterator[_Tile]:
    for start in range(first, len(subtree_end), QUERY_BLOCK):
        stop = min(start + QUERY_BLOCK, len(subtree_end))
        ancestors = np.flatnonzero(subtree_end[:start] > start)
        if window is not None:
            ancestors = ancestors[positions[ancestors] > positions[start:stop].min() - window]
        queries = np.arange(start, stop)
        keys = np.concatenate([ancestors, queries])
        masked_from = 0 if window is not None else int((subtree_end[ancestors] >= stop).sum())
        chunks = []
        for end in range(len(keys), 0, -KEY_CHUNK):
            begin = max(end - KEY_CHUNK, 0)
            of_chunk, first_masked = keys[begin:end], min(max(masked_from - begin, 0), end - begin)
            breaks = np.flatnonzero(np.diff(of_chunk) != 1) + 1
            edges = [0, *breaks.tolist(), end - begin]
            ranges = [(int(of_chunk[i]), int(of_chunk[j - 1]) + 1) for i, j in itertools.pairwise(edges)]
            masked = of_chunk[first_masked:]
            hidden = (masked > queries[:, None]) | (subtree_end[masked] <= queries[:, None])
            if window is not None:
                hidden |= positions[queries][:, None] - positions[masked] >= window
            chunks.append(_Chunk(ranges, hidden if hidden.any() else None, first_masked))
        yield _Tile(start, stop, chunks)


class _Problem:
    """The tensors of one attention call without its batch dimension, heads split into groups, and the scores of a chunk.

    G key/value heads, R query heads for each of them, L tokens, D head size; Q queries of a tile and K keys of a chunk. The
    query heads of a group lie below each other in one matrix of R·Q lines, so that they share one product with its keys. Low
    precision is computed in float32.
    """

    def __init__(self, query, key, value, subtree_end, position_ids, sinks, scale, softcap, window):
        self.dtype = torch.float64 if query.dtype == torch.float64 else torch.float32
        self.groups = key.shape[0]
        self.query = self.split(query)
        self.key, self.value = key.to(self.dtype), value.to(self.dtype)
        self.sinks = None if sinks is None else self.split(sinks.to(self.dtype))[..., None]  # G R 1
        self.scale, self.softcap = scale, softcap
        # Of the queries: such that the product with the keys is what `scores` goes on with.
        self.query_scale = scale * _LOG2_E if softcap is None else scale / softcap
        positions = None if window is None else position_ids.cpu().numpy()
        self.first = key.shape[1] - query.shape[1]
        self.tiles = _tiles(subtree_end.cpu().numpy(), self.first, positions, window)

    def split(self, x: Tensor) -> Tensor:
        """(heads, …) -> (G, R, …), a view."""
        return x.unflatten(0, (self.groups, -1))

    def queries(self, tile: _Tile) -> slice:
        """Where those of a tile are among the queries, which may be those of the last tokens only."""
        return slice(tile.start - self.first, tile.stop - self.first)

    def rows(self, x_GRLD: Tensor, tile: _Tile) -> Tensor:
        """The queries of a tile as G (R Q) D."""
        return x_GRLD[:, :, self.queries(tile)].flatten(1, 2).to(self.dtype)

    def scores(self, q: Tensor, k: Tensor, tile: _Tile, chunk: _Chunk) -> tuple[Tensor, Tensor | None]:
        """Of queries that are scaled: capped scores times log2(e), -inf where hidden; the derivative of the cap (or None)."""
        s = q @ k.mT
        slope = None
        if self.softcap is not None:
            s = s.tanh_()
            slope = 1 - s * s
            s = s.mul_(self.softcap * _LOG2_E)
        if chunk.hidden is not None:
            hidden = torch.from_numpy(chunk.hidden).to(s.device)
            s.unflatten(1, (-1, tile.stop - tile.start))[..., chunk.masked_from :].masked_fill_(hidden, -torch.inf)
        return s, slope


def _without_autocast(function):
    """Autocast reaches into operators, and would round every product here."""

    @functools.wraps(function)
    def run(*args):
        device = next(x.device.type for x in args if isinstance(x, Tensor))
        with torch.autocast(device, enabled=False):
            return function(*args)

    return run


@torch.library.custom_op("flexmask::blockwise_forward", mutates_args=())
@_without_autocast
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
        out_GRLV, lse_GRL = p.split(out[b]), p.split(lse[b])
        for tile in p.tiles:
            q = p.rows(p.query, tile) * p.query_scale
            top = q.new_full((*q.shape[:2], 1), -torch.inf)
            total, o = torch.zeros_like(top), q.new_zeros(*q.shape[:2], value.shape[-1])
            for chunk in tile.chunks:
                s, _ = p.scores(q, chunk.gather(p.key), tile, chunk)
                before, top = top, torch.maximum(top, s.amax(-1, keepdim=True))
                weights, shrink = s.sub_(top).exp2_(), (before - top).exp2_()
                total.mul_(shrink).add_(weights.sum(-1, keepdim=True))
                o.mul_(shrink).baddbmm_(weights, chunk.gather(p.value))
            shape = (p.groups, -1, tile.stop - tile.start)
            norm = (top / _LOG2_E + total.log()).view(shape)
            o = o.div_(total).view(*shape, value.shape[-1])
            if p.sinks is not None:
                o *= torch.sigmoid(norm - p.sinks)[..., None]
                norm = torch.logaddexp(norm, p.sinks)
            out_GRLV[:, :, p.queries(tile)] = o
            lse_GRL[:, :, p.queries(tile)] = norm
    return out, lse


def _empty_outputs(query: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    batch, heads, length, _ = query.shape
    lse_dtype = torch.float64 if query.dtype == torch.float64 else torch.float32
    out = query.new_empty(batch, length, heads, value.shape[-1]).transpose(1, 2)  # models want it so
    return out, query.new_empty(batch, heads, length, dtype=lse_dtype)


@_forward.register_fake
def _(query, key, value, subtree_end, position_ids, sinks, scale, softcap, sliding_window):
    return _empty_outputs(query, value)


@torch.library.custom_op("flexmask::blockwise_backward", mutates_args=())
@_without_autocast
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
        dq_GRLD, dk_GLD, dv_GLV = p.split(dq[b]), torch.zeros_like(p.key), torch.zeros_like(p.value)
        do_GRLV, lse_GRL = p.split(grad_out[b]), p.split(lse[b])
        delta_GRL = (grad_out[b].to(p.dtype) * out[b]).sum(-1).unflatten(0, (p.groups, -1))
        for tile in p.tiles:
            q, do = p.rows(p.query, tile) * p.query_scale, p.rows(do_GRLV, tile)
            log2_norm, delta = p.rows(lse_GRL[..., None], tile) * _LOG2_E, p.rows(delta_GRL[..., None], tile)
            dq_block = torch.zeros_like(q)
            for chunk in tile.chunks:
                k = chunk.gather(p.key)
                s, slope = p.scores(q, k, tile, chunk)
                weights = s.sub_(log2_norm).exp2_()
                chunk.add_to(dv_GLV, weights.mT @ do)
                ds = (do @ chunk.gather(p.value).mT).sub_(delta).mul_(weights)
                if slope is not None:
                    ds *= slope
                chunk.add_to(dk_GLD, ds.mT @ q)
                dq_block.baddbmm_(ds, k)
            dq_block = dq_block.mul_(scale).view(p.groups, -1, tile.stop - tile.start, query.shape[-1])
            dq_GRLD[:, :, p.queries(tile)] = dq_block
        dk_GLD *= scale / p.query_scale
        dk[b], dv[b] = dk_GLD, dv_GLV
        if p.sinks is not None:
            dsinks -= ((p.sinks - lse_GRL).exp() * delta_GRL).sum(-1).flatten().to(dsinks.dtype)
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

"""Recurrences along a tree by chunks, in PyTorch: any device and dtype, float32 inside (float64 for float64).

No chunk crosses a fork. Products within all chunks are made at once; then states go from chunk to chunk, all chunks of a depth
in one step. The backward is written out: it keeps what each token writes and makes everything else again, so that memory is
linear in the length.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ..chains import chains
from ..mask import once_per_forward

# Tokens of a chunk. Longer ones mean fewer steps from state to state, and more work within.
CHUNK = 64
# With a gate per channel the pairs of a chunk are weighted channel by channel: memory grows with the chunk.
CHUNK_PER_CHANNEL = 16
# Bytes of the states of the heads that are computed at once. On a CPU fewer mean many small calls, each of which may have to wake
# threads, and more mean memory (benchmarks/LOG.md).
STATES_AT_ONCE = {False: 2**23, True: 2**30}


def forward(query, key, value, gate, beta, subtree_end: Tensor, scale: float) -> tuple[Tensor, Tensor, Tensor]:
    """Arguments as of `tree_scan`.

    Returns:
        out, as of `tree_scan`; what each token writes, like `value`; and of that (delta rule) what a state takes away, times
        which, (batch, L, heads, key_size or 0).
    """
    plan = _plan_for(gate, subtree_end)
    parts = []
    for few, many in _by_heads(key, value, plan):
        q, k = (x[:, :, few] for x in (query, key))
        v, g, b = (None if x is None else x[:, :, many] for x in (value, gate, beta))
        parts.append(_forward_of(q, k, v, g, b, plan, scale))
    return tuple(torch.cat(columns, 2) for columns in zip(*parts, strict=True))


def backward(
    d_out: Tensor, query, key, value, gate, beta, subtree_end: Tensor, scale: float, written: Tensor, taken: Tensor
) -> tuple[Tensor | None, ...]:
    """Gradients of the first five arguments of `forward`, from that of its first result and the other two."""
    plan = _plan_for(gate, subtree_end)
    of_keys = tuple(x.new_zeros(x.shape, dtype=exact(value)) for x in (query, key))  # which several heads may share
    of_heads = []
    for few, many in _by_heads(key, value, plan):
        q, k = (x[:, :, few] for x in (query, key))
        others = (None if x is None else x[:, :, many] for x in (value, gate, beta, d_out, written, taken))
        *d_keys, d_v, d_g, d_b = _backward_of(q, k, *others, plan, scale)
        for total, part in zip(of_keys, d_keys, strict=True):
            total[:, :, few] += part
        of_heads.append((d_v, d_g, d_b))
    return *of_keys, *(None if x[0] is None else torch.cat(x, 2) for x in zip(*of_heads, strict=True))


def _forward_of(query, key, value, gate, beta, plan: _Plan, scale: float) -> tuple[Tensor, Tensor, Tensor]:
    chunks = _Chunks.of(query, key, value, gate, beta, plan, scale)
    written, taken = chunks.written_without_state()
    states = _states(chunks, written, taken, plan)
    out = (chunks.q * chunks.since_begin) @ states + _pairs(chunks.q, chunks.k, chunks.decay) @ written
    taken = written[..., :0] if taken is None else taken
    rows = [plan.from_chunks(x, value) for x in (out, written, taken)]
    return rows[0].to(value.dtype), *rows[1:]


def _backward_of(query, key, value, gate, beta, d_out, written, taken, plan: _Plan, scale: float) -> tuple[Tensor, ...]:
    c = _Chunks.of(query, key, value, gate, beta, plan, scale)
    d_out, written = (plan.to_chunks(x, c.v.dtype, like=c.v) for x in (d_out, written))
    taken = None if beta is None else plan.to_chunks(taken, c.v.dtype, like=c.v)
    states = _states(c, written, None, plan)

    # out = (q · since_begin) states + pairs(q, k) written
    scores = _pairs(c.q, c.k, c.decay)
    from_begin = c.q * c.since_begin
    d_from_begin = d_out @ states.mT
    d_q = d_from_begin * c.since_begin
    d_written, d_end = _states_backward(c, from_begin.mT @ d_out, scores.mT @ d_out, taken, plan)
    d_q_pairs, d_k = _pairs_backward((d_out @ written.mT).tril(), c.q, c.k, c.decay)
    d_sum = d_from_begin * from_begin + c.q * d_q_pairs - c.k * d_k  # of the summed gates, here for each channel
    d_q = d_q + d_q_pairs

    # end = total · state + (k · until_end)ᵀ written
    d_until = written @ d_end.mT
    kept = c.k * c.until_end
    d_k = d_k + d_until * c.until_end
    d_sum = d_sum - d_until * kept
    d_last = (d_until * kept).sum(-2, keepdim=True) + (d_end * states).sum(-1)[..., None, :] * c.total.mT
    d_v, d_beta = d_written, None
    if beta is not None:
        # (I + strict lower triangle of beta · pairs(k, k)) [written without state, taken] = beta · [v, k · since_begin]
        d_taken = -d_written @ states.mT
        products = _pairs(c.k, c.k, c.decay).tril(-1)
        d_right = torch.linalg.solve_triangular(
            (products * c.beta).mT, torch.cat([d_written, d_taken], -1), upper=True, unitriangular=True
        )
        d_products = -(d_right @ torch.cat([written + taken @ states, taken], -1).mT).tril(-1)
        d_right_v, d_right_k = d_right.split([c.v.shape[-1], c.k.shape[-1]], -1)
        since = c.k * c.since_begin
        d_beta = (d_right_v * c.v).sum(-1) + (d_right_k * since).sum(-1) + (d_products * products).sum(-1)
        d_v = d_right_v * c.beta
        d_k = d_k + d_right_k * c.beta * c.since_begin
        d_left, d_right = _pairs_backward(d_products * c.beta, c.k, c.k, c.decay)
        d_k = d_k + d_left + d_right
        d_sum = d_sum + d_right_k * c.beta * since + c.k * (d_left - d_right)

    d_sum = torch.cat([d_sum[..., :-1, :], d_sum[..., -1:, :] + d_last], -2)
    if gate.ndim == 3:
        d_sum = d_sum.sum(-1, keepdim=True)
    d_gate = d_sum.flip(-2).cumsum(-2).flip(-2)
    found = (d_q.sum_to_size(c.q.shape) * scale, d_k.sum_to_size(c.k.shape), d_v, d_gate, d_beta)
    return tuple(None if x is None else plan.from_chunks(x, value) for x in found)


def _by_heads(key: Tensor, value: Tensor, plan: _Plan) -> Iterator[tuple[slice, slice]]:
    """Heads of keys, and of values, to be computed at once: heads are independent, and the states of these are at most
    STATES_AT_ONCE, or of one head."""
    (key_heads, key_size), (heads, value_size) = key.shape[2:], value.shape[2:]
    groups = heads // key_heads
    fit = STATES_AT_ONCE[value.is_cuda] // (
        len(plan.place) // plan.size * key_size * value_size * exact(value).itemsize
    )
    if fit >= groups:
        for first in range(0, key_heads, fit // groups):
            last = min(first + fit // groups, key_heads)
            yield slice(first, last), slice(first * groups, last * groups)
        return
    for key_head in range(key_heads):
        end = (key_head + 1) * groups
        for first in range(key_head * groups, end, max(1, fit)):
            yield slice(key_head, key_head + 1), slice(first, min(first + max(1, fit), end))


@dataclass(frozen=True)
class _Chunks:
    """A row cut into N chunks of S tokens. All are (N, key_heads, heads of each, S, …), zeros for padding.

    Attributes:
        q, k: key size last, and one head of each.
        v: value size last.
        beta: 1 last; or None.
        decay: from token to token, rows after columns: S, or with gates per channel S × key size, last.
        since_begin: decay from the beginning of the chunk to each token, 1 or key size last.
        until_end: and from each token to the end.
        total: of the whole chunk, (…, 1 or key size, 1).
    """

    q: Tensor
    k: Tensor
    v: Tensor
    beta: Tensor | None
    decay: Tensor
    since_begin: Tensor
    until_end: Tensor
    total: Tensor

    @classmethod
    def of(cls, query, key, value, gate, beta, plan: _Plan, scale: float) -> _Chunks:
        dtype, shape = exact(value), (key.shape[2], -1)
        q, k, v, g = (plan.to_chunks(x, dtype).unflatten(1, shape) for x in (query, key, value, gate))
        q = q * scale
        g = (g if gate.ndim == 4 else g[..., None]).cumsum(-2)
        last = g[..., -1:, :]
        later = torch.ones(plan.size, plan.size, dtype=torch.bool, device=g.device).triu(1)
        decay = (g[..., :, None, :] - g[..., None, :, :]).masked_fill_(later[..., None], float("-inf")).exp_()
        beta = None if beta is None else plan.to_chunks(beta, dtype).unflatten(1, shape)[..., None]
        decay = decay if gate.ndim == 4 else decay[..., 0]
        return cls(q, k, v, beta, decay, g.exp(), (last - g).exp(), last.exp().mT)

    def written_without_state(self) -> tuple[Tensor, Tensor | None]:
        """What each token writes where the state of the chunk is 0, and, of the delta rule, what a state takes away of it."""
        if self.beta is None:
            return self.v, None
        right = torch.cat([self.v * self.beta, self.k * self.beta * self.since_begin], -1)
        left = _pairs(self.k, self.k, self.decay) * self.beta  # what is not below the diagonal is not read
        solved = torch.linalg.solve_triangular(left, right, upper=False, unitriangular=True)
        written, taken = solved.split([self.v.shape[-1], self.k.shape[-1]], -1)
        return written.clone(), taken


def exact(value: Tensor) -> torch.dtype:
    return torch.float64 if value.dtype == torch.float64 else torch.float32


def _pairs(x: Tensor, y: Tensor, decay: Tensor) -> Tensor:
    """x_iᵀ y_j, decayed from j to i."""
    if decay.ndim == x.ndim:
        return x @ y.mT * decay
    return torch.einsum("...ik,...jk,...ijk->...ij", x, y, decay)


def _pairs_backward(d_pairs: Tensor, x: Tensor, y: Tensor, decay: Tensor) -> tuple[Tensor, Tensor]:
    if decay.ndim == x.ndim:
        d_products = d_pairs * decay
        return d_products @ y, d_products.mT @ x
    both = "...ij,...{}k,...ijk->...{}k"
    return torch.einsum(both.format("j", "i"), d_pairs, y, decay), torch.einsum(
        both.format("i", "j"), d_pairs, x, decay
    )


def _states(c: _Chunks, written: Tensor, taken: Tensor | None, plan: _Plan) -> Tensor:
    """The state at the beginning of each chunk, (N, key_heads, heads of each, key size, value size).

    `taken` times the state is taken from `written`, in place.
    """
    kept = (c.k * c.until_end).mT
    states = written.new_zeros(*written.shape[:3], kept.shape[-2], written.shape[-1])
    first, end = 0, None
    for count, parents in plan.steps:
        here = slice(first, first + count)
        if parents is not None:
            torch.index_select(end, 0, parents, out=states[here])
            if taken is not None:
                written[here] -= taken[here] @ states[here]
        end = kept[here] @ written[here]
        if parents is not None:
            end.addcmul_(states[here], c.total[here])
        first += count
    return states


def _states_backward(
    c: _Chunks, d_states: Tensor, d_written: Tensor, taken: Tensor | None, plan: _Plan
) -> tuple[Tensor, Tensor]:
    """Gradients of what is written and of the states at the ends, from those of what is written and of the states at the
    beginnings as far as they are read within their chunk. Both arguments are changed."""
    kept = c.k * c.until_end
    d_end = torch.zeros_like(d_states)
    last = len(d_states)
    for step in range(len(plan.steps) - 1, -1, -1):
        count, parents = plan.steps[step]
        here = slice(last - count, last)
        d_written[here] += kept[here] @ d_end[here]
        last -= count
        if parents is not None:
            d_state = d_states[here].addcmul_(d_end[here], c.total[here])
            if taken is not None:
                d_state -= taken[here].mT @ d_written[here]
            d_end[last - plan.steps[step - 1][0] : last].index_add_(0, parents, d_state)
    return d_written, d_end


# ------------------------------------------------------------------------------------------------------------- chunks


@dataclass(frozen=True)
class _Plan:
    """N chunks of S tokens, ordered by their depth: how many chunks lead to each.

    Attributes:
        place: int64 (N · S,), the token in the row, or the number of tokens for padding.
        slot: int64 (tokens,), where in `place` each token is.
        steps: for each depth how many chunks there are, and the parent of each, int64, counted within the depth above (None
            at depth 0).
        size: S.
    """

    place: Tensor
    slot: Tensor
    steps: list[tuple[int, Tensor | None]]
    size: int

    def to_chunks(self, x: Tensor, dtype: torch.dtype, like: Tensor | None = None) -> Tensor:
        """(batch, L, heads, …) -> (N, heads, S, …), zeros for padding; heads split as in `like`."""
        x = x.flatten(0, 1)
        outside = (self.place == len(x)).view(-1, *[1] * (x.ndim - 1))
        moved = x.index_select(0, self.place.clamp(max=len(x) - 1)).masked_fill_(outside, 0)
        chunks = moved.unflatten(0, (-1, self.size)).transpose(1, 2).to(dtype, memory_format=torch.contiguous_format)
        return chunks if like is None else chunks.unflatten(1, like.shape[1:3])

    def from_chunks(self, x: Tensor, like: Tensor) -> Tensor:
        """(N, key_heads, heads of each, S, …) -> (batch, L, heads, …), batch and L those of `like`."""
        moved = x.flatten(1, 2).transpose(1, 2).flatten(0, 1).index_select(0, self.slot)
        return moved.unflatten(0, like.shape[:2])


def _plan_for(gate: Tensor, subtree_end: Tensor) -> _Plan:
    return once_per_forward(_plan, subtree_end, size=CHUNK if gate.ndim == 3 else CHUNK_PER_CHANNEL)


def _plan(subtree_end: Tensor, *, size: int) -> _Plan:
    row = once_per_forward(chains, subtree_end)
    chunks = -(-(row.run_stop - row.run_start) // size)  # of each run
    depth_of_run = []
    for parent in row.run_parent.tolist():
        depth_of_run.append(depth_of_run[parent] + int(chunks[parent]) if parent >= 0 else 0)
    after = chunks.cumsum()  # one past the last chunk of each run
    run = np.repeat(np.arange(len(chunks)), chunks)
    number = np.arange(len(run)) - (after - chunks)[run]  # of the chunk in its run
    depth = np.array(depth_of_run)[run] + number
    parent = np.where(number > 0, np.arange(len(run)) - 1, after[row.run_parent[run]] - 1)  # of roots: not used

    order = np.argsort(depth, kind="stable")
    count = np.bincount(depth)
    rank = np.empty(len(order), np.int64)  # of each chunk within its depth
    rank[order] = np.arange(len(order)) - np.repeat(count.cumsum() - count, count)
    parents = np.split(rank[parent[order]], count.cumsum()[:-1])

    begin = (row.run_start[run] + number * size)[order]
    end = np.minimum(begin + size, row.run_stop[run][order])
    place = begin[:, None] + np.arange(size)
    place[place >= end[:, None]] = row.length
    place = place.ravel()
    slot = np.empty(row.length + 1, np.int64)
    slot[place] = np.arange(len(place))

    def tensor(x: np.ndarray) -> Tensor:
        return torch.from_numpy(x).to(subtree_end.device)

    steps = [(int(n), tensor(p) if d else None) for d, (n, p) in enumerate(zip(count, parents, strict=True))]
    return _Plan(tensor(place), tensor(slot[:-1]), steps, size)

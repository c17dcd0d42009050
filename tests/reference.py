"""Plain references: dense masks, float64, one sequence at a time. Shares no code with flexmask."""

import numpy as np
import torch

from flexmask import Pass


def random_passes(rng: np.random.Generator, num_passes: int, *, vocab: int = 3, max_length: int = 12) -> list[Pass]:
    """Passes over a tiny vocabulary, so that they share prefixes in every way; each starts with token 0."""
    passes = []
    for _ in range(num_passes):
        tail = rng.integers(0, vocab, rng.integers(1, max_length))
        if passes and rng.random() < 0.7:
            other = np.asarray(passes[rng.integers(len(passes))].input_ids)
            tail = np.concatenate([other[1 : rng.integers(1, len(other) + 1)], tail])
        mask = rng.random(len(tail) + 1) < 0.5
        mask[0] = False
        passes.append(Pass(np.concatenate([[0], tail]), mask))
    return passes


def conversation_passes(rng, turns: int, h: int, t: int, r: int, vocab: int = 1000) -> list[Pass]:
    """N passes h_1 r_1 … h_i | t_i r_i of random tokens; exactly h, t, r tokens a part."""
    context, passes = np.empty(0, np.int64), []
    for _ in range(turns):
        question, thought, response = (rng.integers(0, vocab, n) for n in (h, t, r))
        context = np.concatenate([context, question])
        ids = np.concatenate([context, thought, response])
        passes.append(Pass(ids, np.arange(len(ids)) >= len(context)))
        context = np.concatenate([context, response])
    return passes


def random_parents(rng: np.random.Generator, length: int, num_roots: int = 2) -> np.ndarray:
    """parent[k] of a random forest in depth-first preorder, -1 for roots."""
    parent = np.full(length, -1)
    path: list[int] = []  # from the root to the token before
    for k in range(length):
        if path and rng.random() < 0.15:  # fork: go back up
            path = path[: rng.integers(1, len(path) + 1)]
        if k and rng.random() < (num_roots - 1) / length:
            path = []
        parent[k] = path[-1] if path else -1
        path.append(k)
    return parent


def forest(parent: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """parents -> (subtree_end int32[L], position_ids int64[L], visible bool[L, L]) by walking up from every token."""
    length = len(parent)
    visible = np.zeros((length, length), bool)
    for q in range(length):
        k = q
        while k >= 0:
            visible[q, k] = True
            k = parent[k]
    last_seeing = np.array([np.flatnonzero(visible[:, k])[-1] for k in range(length)])
    return (last_seeing + 1).astype(np.int32), visible.sum(1) - 1, visible


def dense_attention(q, k, v, visible, *, scale=None, softcap=None, window=None, positions=None, sinks=None):
    """softmax(scores) v with a dense mask, as written in the textbooks; k and v repeated for grouped queries.

    q (B, H, L, D), k and v (B, G, L, D), visible bool (B, L, L), positions (B, L), sinks (H,).
    """
    repeat = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(repeat, 1), v.repeat_interleave(repeat, 1)
    scores = q @ k.transpose(-1, -2) * (q.shape[-1] ** -0.5 if scale is None else scale)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if window is not None:
        visible = visible & (positions[:, :, None] - positions[:, None, :] < window)
    scores = scores.masked_fill(~visible[:, None], -torch.inf)
    if sinks is not None:
        column = sinks[None, :, None, None].expand(*scores.shape[:3], 1)
        return torch.softmax(torch.cat([scores, column], -1), -1)[..., :-1] @ v
    return torch.softmax(scores, -1) @ v

"""Short convolutions and linear recurrences along a tree: functions of tensors and `subtree_end`, which know no model.

A causal layer that carries a state from token to token is exact on a tree if every run of tokens starts from the state at
the end of the run that it continues; a short convolution, if the first tokens of every chain see their true ancestors. All
other tokens have their ancestors to their left, as in a sequence.

The recurrence is, for each token t after its parent, with state S (key size × value size) and float32 inside,

    S_t = exp(g_t) S_parent + k_t (x) new_t        new_t = v_t, or beta_t (v_t − k_tᵀ exp(g_t) S_parent) by the delta rule
    o_t = scale q_tᵀ S_t

which is Mamba 2's (q = C, k = B, v = x·dt, g = A·dt; Dao and Gu, arXiv 2405.21060), with beta the gated delta rule (Yang
et al., arXiv 2412.06464), and with a gate for each channel of the key Kimi's delta attention (arXiv 2510.26692). It is
computed by chunks, as is done for sequences: products within all chunks at once, states from chunk to chunk. Here no chunk
crosses a fork, and the state of a chunk comes from the chunk that its first token follows.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from einops import rearrange
from torch import Tensor

from ..chains import chains
from ..mask import once_per_forward
from . import chunks, fla

# ------------------------------------------------------------------------------------------------------- convolutions


def tree_conv(x: Tensor, width: int, subtree_end: Tensor, conv: Callable[[Tensor], Tensor]) -> Tensor:
    """A short causal convolution along a tree.

    Args:
        x: (batch, channels, L).
        width: of the filter; a token sees itself and the width − 1 before it.
        subtree_end: int32 (batch, L).
        conv: (any batch, channels, any length) -> the same shape: the convolution of sequences, zeros before the first
            token, with whatever is applied to each token by itself afterwards.

    Returns:
        (batch, channels, L).
    """
    out = conv(x)
    window, places = once_per_forward(_windows, subtree_end, width=width)
    if not torch.compiler.is_compiling() and not len(places):  # compiled code serves any number, and must not ask
        return out
    flat, corrected = (rearrange(y, "b d l -> d (b l)") for y in (x, out))
    pieces = rearrange(torch.nn.functional.pad(flat, (0, 1))[:, window], "d t w -> t d w")
    corrected = corrected.index_copy(1, places, conv(pieces)[..., -1].T)
    return rearrange(corrected, "d (b l) -> b d l", b=len(x))


def _windows(subtree_end: Tensor, *, width: int) -> tuple[Tensor, Tensor]:
    return _windows_of(subtree_end, width)


@torch.library.custom_op("flexmask::conv_windows", mutates_args=())
def _windows_of(subtree_end: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """What the filter covers where it is not what lies to the left: int64 (T, width), with the number of tokens of the batch
    where there is nothing; and which tokens these are, int64 (T,)."""
    row = once_per_forward(chains, subtree_end)
    within = np.arange(width - 1)
    places = row.start[:, None] + within
    places = places[(places < row.stop[:, None]) & (places > within)]  # before the first chain there are zeros anyhow
    window = np.concatenate([row.ancestors(places, width - 1), places[:, None]], axis=1)
    window[window < 0] = row.length
    window, places = (torch.from_numpy(x).to(subtree_end.device) for x in (window, places))
    return window, places


@_windows_of.register_fake
def _(subtree_end, width):
    count = torch.library.get_ctx().new_dynamic_size()
    return subtree_end.new_empty((count, width), dtype=torch.int64), subtree_end.new_empty(count, dtype=torch.int64)


# -------------------------------------------------------------------------------------------------------- recurrences


def tree_scan(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    gate: Tensor,
    beta: Tensor | None,
    subtree_end: Tensor,
    *,
    scale: float = 1.0,
) -> Tensor:
    """A gated linear recurrence along a tree.

    Args:
        query, key: (batch, L, key_heads, key_size).
        value: (batch, L, heads, value_size), heads a multiple of key_heads.
        gate: (batch, L, heads), or (batch, L, heads, key_size): logarithms of the decay, finite and at most 0.
        beta: (batch, L, heads) for the delta rule, None without it.
        subtree_end: int32 (batch, L).
        scale: of the output.

    Returns:
        (batch, L, heads, value_size), in the dtype of `value`.

    Raises:
        ValueError: shapes that do not fit.

    On CUDA by the kernels of `fla` where it is installed (16 bits, key_size ≤ 256), which round as they do in its own models;
    everywhere else by chunks in PyTorch, in float32 or float64.
    """
    batch, length, heads, _ = value.shape
    key_heads, key_size = key.shape[2:]
    expected = {
        "query": (query, [(batch, length, key_heads, key_size)]),
        "key": (key, [(batch, length, key_heads, key_size)]),
        "gate": (gate, [(batch, length, heads), (batch, length, heads, key_size)]),
        "beta": (beta, [(batch, length, heads)]),
        "subtree_end": (subtree_end, [(batch, length)]),
    }
    for name, (x, shapes) in expected.items():
        if x is not None and tuple(x.shape) not in shapes:
            wanted = " or ".join(map(str, shapes))
            raise ValueError(
                f"{name} has shape {tuple(x.shape)}, expected {wanted} beside a value of {tuple(value.shape)}"
            )
    if heads % key_heads or not length:
        raise ValueError(
            f"value has {heads} heads and {length} tokens, expected a multiple of {key_heads} heads and a token"
        )
    return _forward(query, key, value, gate, beta, subtree_end, scale)[0]


@torch.library.custom_op("flexmask::tree_scan", mutates_args=())
def _forward(
    query: Tensor, key: Tensor, value: Tensor, gate: Tensor, beta: Tensor | None, subtree_end: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """The output, and two tensors for the backward."""
    inputs = (query, key, value, gate, beta, subtree_end, scale)
    with torch.autocast(value.device.type, enabled=False):
        if fla.serves(*inputs[:5]):
            return fla.forward(*inputs), value.new_empty(0), value.new_empty(0)
        return chunks.forward(*inputs)


@_forward.register_fake
def _(query, key, value, gate, beta, subtree_end, scale):
    if fla.serves(query, key, value, gate, beta):
        return value.new_empty(value.shape), value.new_empty(0), value.new_empty(0)
    exact = chunks.exact(value)
    taken = (*value.shape[:3], 0 if beta is None else key.shape[-1])
    return value.new_empty(value.shape), value.new_empty(value.shape, dtype=exact), value.new_empty(taken, dtype=exact)


@torch.library.custom_op("flexmask::tree_scan_backward", mutates_args=())
def _backward(
    d_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    gate: Tensor,
    beta: Tensor | None,
    subtree_end: Tensor,
    written: Tensor,
    taken: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of the first five; of beta there is one, without a meaning, where there is no beta."""
    inputs = (query, key, value, gate, beta, subtree_end, scale)
    with torch.autocast(value.device.type, enabled=False):
        found = (
            fla.backward(d_out, *inputs) if fla.serves(*inputs[:5]) else chunks.backward(d_out, *inputs, written, taken)
        )
    shapes = (query, key, value, gate, value[..., 0] if beta is None else beta)
    return tuple(
        like.new_empty(like.shape) if x is None else x.view(like.shape).to(like.dtype)
        for x, like in zip(found, shapes, strict=True)
    )


@_backward.register_fake
def _(d_out, query, key, value, gate, beta, subtree_end, written, taken, scale):
    like = (query, key, value, gate, value[..., 0] if beta is None else beta)
    return tuple(x.new_empty(x.shape) for x in like)


def _setup_context(ctx, inputs, output):
    query, key, value, gate, beta, subtree_end, scale = inputs
    ctx.save_for_backward(query, key, value, gate, beta, subtree_end, *output[1:])
    ctx.scale = scale


def _autograd(ctx, d_out, _, __):
    saved = ctx.saved_tensors
    *found, d_beta = _backward(d_out, *saved, ctx.scale)
    return *found, None if saved[4] is None else d_beta, None, None


_forward.register_autograd(_autograd, setup_context=_setup_context)

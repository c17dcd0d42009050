"""Tree attention through FlexAttention, with our BlockMask: CUDA; on a CPU the forward only."""

from __future__ import annotations

import functools

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import AuxRequest, flex_attention

from ..mask import once_per_forward, score_mod, tree_block_mask


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
        NotImplementedError: float64, or gradients outside CUDA.
        torch._dynamo.exc.FailOnRecompileLimitHit: too many different shapes (never a silent dense run).
    """
    needs_grad = torch.is_grad_enabled() and any(x.requires_grad for x in (query, key, value))
    if query.dtype == torch.float64 or (needs_grad and query.device.type != "cuda"):
        raise NotImplementedError(
            f"backend 'flex' cannot do {query.dtype} {'with' if needs_grad else 'without'} gradients on "
            f"{query.device.type}; backend 'blockwise' can"
        )
    block_mask = once_per_forward(
        tree_block_mask, subtree_end, position_ids=position_ids, sliding_window=sliding_window
    )
    out, aux = _flex_attention()(
        query,
        key,
        value,
        score_mod=score_mod(softcap=softcap),
        block_mask=block_mask,
        scale=scale,
        enable_gqa=query.shape[1] != key.shape[1],
        return_aux=AuxRequest(lse=True),
    )
    if sinks is None:
        return out
    # A sink adds exp(sink) to the denominator: o * exp(lse) / (exp(lse) + exp(sink)).
    return out * torch.sigmoid(aux.lse - sinks[None, :, None]).unsqueeze(-1).to(out.dtype)


def _flex_attention():
    # A model that is being compiled takes the operator as it is.
    return flex_attention if torch.compiler.is_compiling() else _compiled()


@functools.cache
def _compiled():
    # dynamic: a new length must not cost a compilation. fullgraph: past dynamo's recompile limit this raises, where
    # without it FlexAttention would silently run uncompiled and materialise the L x L scores.
    return torch.compile(flex_attention, dynamic=True, fullgraph=True)

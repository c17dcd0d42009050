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
        NotImplementedError: float64; gradients or sinks outside CUDA.
        torch._dynamo.exc.FailOnRecompileLimitHit: too many different shapes (never a silent dense run).
    """
    cpu = query.device.type != "cuda"
    needs_grad = torch.is_grad_enabled() and any(x.requires_grad for x in (query, key, value))
    for what, unsupported in (
        ("float64", query.dtype == torch.float64),
        (f"gradients on {query.device.type}", cpu and needs_grad),
        (f"sinks on {query.device.type}", cpu and sinks is not None),
    ):
        if unsupported:
            raise NotImplementedError(f"backend 'flex' cannot do {what}; backend 'blockwise' can")
    flex = functools.partial(
        _flex_attention(),
        query,
        key,
        value,
        score_mod=score_mod(softcap=softcap),
        block_mask=once_per_forward(
            tree_block_mask, subtree_end, position_ids=position_ids, sliding_window=sliding_window
        ),
        scale=scale,
        enable_gqa=query.shape[1] != key.shape[1],
    )
    if sinks is None:
        return flex()
    # A sink adds exp(sink) to the denominator: o * exp(lse) / (exp(lse) + exp(sink)).
    out, aux = flex(return_aux=AuxRequest(lse=True))
    return out * torch.sigmoid(aux.lse - sinks[None, :, None]).unsqueeze(-1).to(out.dtype)


def _flex_attention():
    # A model that is being compiled takes the operator as it is.
    return flex_attention if torch.compiler.is_compiling() else _compiled()


@functools.cache
def _compiled():
    # The first length is compiled as it is, the second makes the length symbolic, later ones cost nothing. (With
    # dynamic=True the soft-cap would become symbolic too, which CPU kernels do not take.) fullgraph: past dynamo's
    # recompile limit this raises; without it FlexAttention would silently run uncompiled and materialise L x L scores.
    return torch.compile(flex_attention, fullgraph=True)

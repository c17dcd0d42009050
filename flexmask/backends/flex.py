"""Tree attention through FlexAttention, with our BlockMask: CUDA; on a CPU the forward only."""

from __future__ import annotations

import functools
import importlib.util

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import AuxRequest, flex_attention

from ..mask import score_mod, tree_block_mask


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
    kernel_options: dict[str, str] | None = None,
) -> Tensor:
    """See `flexmask.tree_attention`, which checks the arguments. `kernel_options` are FlexAttention's.

    Raises:
        NotImplementedError: float64; gradients or sinks outside CUDA; compilation switched off.
        torch._dynamo.exc.FailOnRecompileLimitHit: too many variants compiled (never a silent dense run).
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
        block_mask=tree_block_mask(
            subtree_end,
            first=subtree_end.shape[1] - query.shape[2],
            position_ids=position_ids,
            sliding_window=sliding_window,
        ),
        scale=scale,
        enable_gqa=query.shape[1] != key.shape[1],
        kernel_options=kernel_options,
    )
    if sinks is None:
        return flex()
    # A sink adds exp(sink) to the denominator: o * exp(lse) / (exp(lse) + exp(sink)). In float32, for its gradient's sake.
    out, aux = flex(return_aux=AuxRequest(lse=True))
    return (out * torch.sigmoid(aux.lse - sinks[None, :, None].float()).unsqueeze(-1)).to(out.dtype)


MIN_FLASH_HEAD_DIM, MAX_FLASH_HEAD_DIM = 16, 128


def flash_attention(query: Tensor, key: Tensor, value: Tensor, subtree_end: Tensor, **arguments) -> Tensor:
    """`attention` by FlashAttention 4's kernels, which FlexAttention calls with the same mask where it is told to. They compile
    for 9.0, and our mask in them is right (tests/flash_ahead.py); no GPU has run them yet. Their gradients are added in no
    fixed order.

    Raises:
        NotImplementedError: whatever FlexAttention would not do so, or not with blocks of 128 queries and keys.
    """
    if reason := _without_flash(query, key, value, arguments["sinks"]):
        raise NotImplementedError(f"backend 'flex_flash' cannot run: {reason}; backend 'flex' can")
    return attention(query, key, value, subtree_end, kernel_options={"BACKEND": "FLASH"}, **arguments)


def _without_flash(query: Tensor, key: Tensor, value: Tensor, sinks: Tensor | None) -> str | None:
    if query.device.type != "cuda" or query.dtype.itemsize != 2:
        return f"{query.dtype} on {query.device.type}, only 16 bits on cuda"
    major, minor = torch.cuda.get_device_capability(query.device)
    size, value_size = query.shape[-1], value.shape[-1]
    for reason, holds in (
        (f"compute capability {major}.{minor}, only 9.0", major != 9),  # 10.0 wants blocks of 256 queries
        (f"a head size of {size}, only up to {MAX_FLASH_HEAD_DIM}", size > MAX_FLASH_HEAD_DIM),
        (f"a head size of {size}, only from {MIN_FLASH_HEAD_DIM}", size < MIN_FLASH_HEAD_DIM),
        (f"a head size of {size}, only multiples of 8", size % 8 != 0),
        ("a row of one token", key.shape[2] == 1),
        (f"values of size {value_size} beside keys of size {size}", value_size != size),
        ("sinks, whose gradient goes through the log-sum-exp", sinks is not None),
        ("queries of a part of the row", query.shape[2] != key.shape[2]),
        ("repeatable gradients", torch.are_deterministic_algorithms_enabled()),
    ):
        if holds:
            return reason
    if not _has_flash():
        return "without PyTorch 2.13 or newer and the package flash-attn-4 (pip install --pre flash-attn-4)"
    return None


@torch.compiler.assume_constant_result
@functools.cache
def _has_flash() -> bool:
    try:
        return torch.__version__ >= (2, 13) and importlib.util.find_spec("flash_attn.cute") is not None
    except ImportError:  # no flash_attn, or one that does not work
        return False


def _flex_attention():
    # A model that is being compiled takes the operator as it is.
    return flex_attention if torch.compiler.is_compiling() else _compiled


# One model needs many variants: with and without gradients, float32 and 16 bits, full and sliding layers, the first
# length and the symbolic one. Dynamo's own limit is 8.
RECOMPILE_LIMIT = 64


def _compiled(*args, **kwargs):
    # specialize_float: the soft-cap is compiled in. A second value would become symbolic, which CPU kernels do not take.
    with torch._dynamo.config.patch(recompile_limit=RECOMPILE_LIMIT, specialize_float=True):
        return _compile()(*args, **kwargs)


def _traced(*args, **kwargs):
    if not torch.compiler.is_compiling():  # compilation is switched off: this would materialise L x L scores
        raise NotImplementedError(
            "backend 'flex' needs torch.compile, which is switched off; backend 'blockwise' does not"
        )
    return flex_attention(*args, **kwargs)


@functools.cache
def _compile():
    # The first length is compiled as it is, the second makes the length symbolic, later ones cost nothing. fullgraph:
    # past the limit this raises; without it FlexAttention would silently run uncompiled and materialise L x L scores.
    return torch.compile(_traced, fullgraph=True)

"""Tree attention on Triton as PyTorch operators: `flexmask::triton_forward`, `flexmask::triton_backward`.

An operator, and not a call, so that a model compiles around it without a graph break, and checkpointing, autocast,
FSDP and CUDA graphs treat it like any other.
"""

from __future__ import annotations

import contextlib

import torch
import triton
from torch import Tensor

from .backward import delta_kernel, dkv_kernel, dq_kernel
from .configs import DELTA, LIST_BLOCK, PRECISION, TF32, Configs, configs
from .forward import forward_kernel
from .tiles import LOG2_E

INTERPRETED = triton.knobs.runtime.interpret  # the kernels were decorated for Triton's interpreter
DTYPES = (torch.float16, torch.bfloat16, torch.float32)
MIN_HEAD_DIM, MAX_HEAD_DIM = 16, 256


def tree_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    subtree_end: Tensor,
    lists: list[Tensor],
    *,
    scale: float,
    softcap: float | None = None,
    sliding_window: int | None = None,
    position_ids: Tensor | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """Attention with `visible(q, k) = k <= q < subtree_end[k]`.

    Args:
        query: (batch, heads, L, head_dim) float16, bfloat16 or float32; any strides but in the last dimension. float32
            is computed to float32 accuracy unless `torch.set_float32_matmul_precision` allows TF32.
        key: (batch, kv_heads, L, head_dim). value: (batch, kv_heads, L, value_dim).
        subtree_end: int32 (batch, n · 128), n = ceil(L / 128), 0 beyond the row.
        lists: int32, which blocks of 128 keys a block of queries reads, then the transpose: kv_begin
            (batch · n + 1,), kv_indices, full_kv_begin, full_kv_indices, q_begin, q_indices, full_q_begin, full_q_indices.
            Line b · n + i lists what begin[line] … begin[line + 1] of indices are, which have one entry more than that.
        scale: factor of the scores, positive. softcap: scores become softcap * tanh(scores / softcap).
        sliding_window: a query sees keys fewer than this many positions before it; needs position_ids, laid out as
            subtree_end.
        sinks: (heads,), a score per head that has no value.

    Returns:
        (batch, heads, L, value_dim), laid out in memory as (batch, L, heads, value_dim).

    Raises:
        NotImplementedError: a dtype, head size or device that the kernels do not have.
        ValueError: lists of other blocks; lists or ends that are not contiguous; a window without position_ids.
    """
    if query.dtype not in DTYPES:
        raise NotImplementedError(f"the Triton kernels take {', '.join(map(str, DTYPES))}; query is {query.dtype}")
    for name, size in (("head_dim", query.shape[-1]), ("value_dim", value.shape[-1])):
        if not MIN_HEAD_DIM <= size <= MAX_HEAD_DIM:
            raise NotImplementedError(
                f"the Triton kernels take head sizes from {MIN_HEAD_DIM} to {MAX_HEAD_DIM}; {name} is {size}"
            )
    if not (query.is_cuda or INTERPRETED):
        raise NotImplementedError(f"the Triton kernels run on CUDA; query is on {query.device}")
    blocks = triton.cdiv(query.shape[2], LIST_BLOCK)
    if len(lists[0]) != query.shape[0] * blocks + 1:
        raise ValueError(
            f"lists have {len(lists[0]) - 1} lines, expected {query.shape[0] * blocks}, of blocks of {LIST_BLOCK} tokens"
        )
    if sliding_window is not None and position_ids is None:
        raise ValueError(f"sliding_window is {sliding_window} without position_ids, in which a window is counted")
    for name, x in (("subtree_end", subtree_end), ("position_ids", position_ids)):
        if x is not None and (x.shape != (query.shape[0], blocks * LIST_BLOCK) or x.dtype != torch.int32):
            raise ValueError(
                f"{name} is {x.dtype} {tuple(x.shape)}, expected int32 ({query.shape[0]}, {blocks * LIST_BLOCK})"
            )
    if not all(x.is_contiguous() for x in (subtree_end, *lists, *([] if position_ids is None else [position_ids]))):
        raise ValueError("subtree_end, position_ids and lists must be contiguous; call .contiguous() on them")
    if sinks is not None:
        sinks = sinks.contiguous()
    return _forward(query, key, value, subtree_end, lists, position_ids, sinks, scale, softcap, sliding_window)[0]


@torch.library.custom_op("flexmask::triton_forward", mutates_args=())
def _forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    subtree_end: Tensor,
    lists: list[Tensor],
    position_ids: Tensor | None,
    sinks: Tensor | None,
    scale: float,
    softcap: float | None,
    sliding_window: int | None,
) -> tuple[Tensor, Tensor]:
    query, key, value = map(_rows_contiguous, (query, key, value))
    out, lse = _empty_outputs(query, value)
    config = pinned_configs(query, value).forward
    mask = subtree_end, subtree_end if position_ids is None else position_ids
    with _on(query.device):
        forward_kernel[_grid(query, config.block_m)](
            query, key, value, out, lse, *mask, lse if sinks is None else sinks, *lists[:4],
            *_strides(query, key, value, out), *_scalars(query, scale, softcap, sliding_window),
            SINKS=sinks is not None, **_constants(query, key, value, softcap, sliding_window), **config.options(),
        )  # fmt: skip
    return out, lse


@torch.library.custom_op("flexmask::triton_backward", mutates_args=())
def _backward(
    grad_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    subtree_end: Tensor,
    lists: list[Tensor],
    position_ids: Tensor | None,
    sinks: Tensor | None,
    scale: float,
    softcap: float | None,
    sliding_window: int | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    grad_out, query, key, value = map(_rows_contiguous, (grad_out, query, key, value))
    dq, dk, dv, dsinks = _empty_gradients(query, key, value, sinks)
    delta = torch.empty_like(lse)
    config = pinned_configs(query, value)
    constants = _constants(query, key, value, softcap, sliding_window)
    scalars = _scalars(query, scale, softcap, sliding_window)
    mask = subtree_end, subtree_end if position_ids is None else position_ids
    with _on(query.device):
        delta_kernel[_grid(query, DELTA.block_m)](
            out, grad_out, delta, *_strides(out, grad_out), *scalars[:3],
            VALUE_DIM=constants["VALUE_DIM"], VDIM=constants["VDIM"], LIST_BLOCK=LIST_BLOCK, BLOCK_M=DELTA.block_m,
            num_warps=DELTA.num_warps,
        )  # fmt: skip
        blocks, kv_heads, batch = _grid(key, config.dkv.block_n)
        dkv_kernel[kv_heads, blocks, batch](
            query, key, value, grad_out, lse, delta, dk, dv, *mask, *lists[4:],
            *_strides(query, key, value, grad_out, dk, dv), *scalars, **constants, **config.dkv.options(),
        )  # fmt: skip
        dq_kernel[_grid(query, config.dq.block_m)](
            query, key, value, grad_out, lse, delta, dq, *mask, *lists[:4],
            *_strides(query, key, value, grad_out, dq), *scalars, **constants, **config.dq.options(),
        )  # fmt: skip
    if sinks is not None:
        # The value of a sink is zero, so its ds is -p · delta.
        p = torch.exp2(sinks.float()[:, None] * LOG2_E.value - lse)
        dsinks.copy_(-(p * delta).sum((0, 2)))
    return dq, dk, dv, dsinks


def _rows_contiguous(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def _empty_outputs(query: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    batch, heads, length, _ = query.shape
    out = query.new_empty(batch, length, heads, value.shape[-1]).transpose(1, 2)  # models want it so
    return out, query.new_empty(batch, heads, triton.cdiv(length, LIST_BLOCK) * LIST_BLOCK, dtype=torch.float32)


def _empty_gradients(query, key, value, sinks) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dsinks = query.new_empty(0) if sinks is None else torch.empty_like(sinks)
    shapes = ((x.shape[0], x.shape[2], x.shape[1], x.shape[3]) for x in (query, key, value))
    return *(query.new_empty(shape).transpose(1, 2) for shape in shapes), dsinks


@_forward.register_fake
def _(query, key, value, subtree_end, lists, position_ids, sinks, scale, softcap, sliding_window):
    return _empty_outputs(query, value)


@_backward.register_fake
def _(grad_out, query, key, value, out, lse, subtree_end, lists, position_ids, sinks, scale, softcap, sliding_window):
    return _empty_gradients(query, key, value, sinks)


def _setup_context(ctx, inputs, output):
    query, key, value, subtree_end, lists, position_ids, sinks, *ctx.options = inputs
    ctx.set_materialize_grads(False)  # nothing depends on lse
    ctx.save_for_backward(query, key, value, *output, subtree_end, position_ids, sinks, *lists)


def _autograd(ctx, grad_out, _grad_lse):
    query, key, value, out, lse, subtree_end, position_ids, sinks, *lists = ctx.saved_tensors
    dq, dk, dv, dsinks = _backward(
        grad_out, query, key, value, out, lse, subtree_end, lists, position_ids, sinks, *ctx.options
    )
    return dq, dk, dv, None, [None] * len(lists), None, None if sinks is None else dsinks, None, None, None


_forward.register_autograd(_autograd, setup_context=_setup_context)


def pinned_configs(query: Tensor, value: Tensor) -> Configs:
    """The configurations that a call with these tensors runs with. Raises as `configs` does."""
    capability = torch.cuda.get_device_capability(query.device) if query.is_cuda else (9, 0)
    return configs(capability, max(query.shape[-1], value.shape[-1]), query.dtype)


def _grid(x: Tensor, block: int) -> tuple[int, int, int]:
    """Whole listed blocks: lse and delta are written to their end."""
    batch, heads, length, _ = x.shape
    return triton.cdiv(length, LIST_BLOCK) * (LIST_BLOCK // block), heads, batch


def _strides(*tensors: Tensor) -> list[int]:
    return [stride for x in tensors for stride in x.stride()[:3]]


def _scalars(query, scale, softcap, sliding_window) -> tuple:
    blocks = triton.cdiv(query.shape[2], LIST_BLOCK)
    return query.shape[1], query.shape[2], blocks, scale, softcap or 1.0, sliding_window or 0


def _constants(query, key, value, softcap, sliding_window) -> dict:
    head_dim, value_dim = query.shape[-1], value.shape[-1]
    return {
        "GROUP": query.shape[1] // key.shape[1],
        "HEAD_DIM": head_dim,
        "VALUE_DIM": value_dim,
        "DIM": triton.next_power_of_2(head_dim),
        "VDIM": triton.next_power_of_2(value_dim),
        "LIST_BLOCK": LIST_BLOCK,
        "RAGGED": query.shape[2] % LIST_BLOCK != 0,
        "SOFTCAP": softcap is not None,
        "WINDOW": sliding_window is not None,
        "PRECISION": _precision(),
    }


def _precision() -> str:
    """How float32 products are made."""
    if INTERPRETED:
        return "ieee"  # it knows no other
    return PRECISION if torch.get_float32_matmul_precision() == "highest" else TF32


def _on(device: torch.device):
    """Triton launches on the current device."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()

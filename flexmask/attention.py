"""tree_attention(): one function, and the one place that chooses the backend."""

from __future__ import annotations

import contextlib
import logging
import os
import traceback
from collections.abc import Iterator

import torch
from torch import Tensor

from .backends import blockwise, flash, flex, triton
from .mask import BLOCK_SIZE, check_dtype, check_subtree_end, once_per_forward

logger = logging.getLogger(__name__)

BACKENDS = {
    "flex": flex.attention,
    "flex_flash": flex.flash_attention,
    "flash": flash.attention,
    "triton": triton.attention,
    "blockwise": blockwise.attention,
}


def tree_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    subtree_end: Tensor,
    *,
    scale: float | None = None,
    softcap: float | None = None,
    sliding_window: int | None = None,
    position_ids: Tensor | None = None,
    sinks: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """Attention in which a token sees its ancestors in the tree and itself.

    Args:
        query: (batch, heads, L, head_dim), float64, float32, bfloat16 or float16. With a batch of 1 it may be the queries of the
            last n tokens alone, (1, heads, n, head_dim), where L − n is a multiple of 128.
        key: (batch, kv_heads, L, head_dim); heads must be a multiple of kv_heads (grouped-query attention).
        value: (batch, kv_heads, L, value_dim).
        subtree_end: int32 (batch, L), one past the last token of the subtree under each token.
        scale: factor of the scores, positive; default head_dim ** -0.5.
        softcap: scores become softcap * tanh(scores / softcap), after the scale.
        sliding_window: a query sees ancestors fewer than this many positions before it; needs `position_ids`.
        position_ids: integer (batch, L), or (1, L) for all, the logical position of each token.
        sinks: (heads,), per head a score that takes part in the softmax and has no value (gpt-oss).
        backend: "flex" (CUDA; CPU without gradients), "triton" (CUDA, our own kernels), "flash" (PyTorch's own kernels; CUDA
            in 16 bits, and CPU), "blockwise" (any device), or "auto": the one that `set_backend` or the environment variable
            FLEXMASK_BACKEND names, else the fastest that can do this call and be compiled here, forward and backward. What
            cannot be compiled is logged once, with the reason. Only where it is named: "flex_flash", "flex" with
            FlashAttention 4's kernels.

    Returns:
        (batch, heads, L, value_dim), or n in place of L, in the dtype of `query`, or of autocast where that is on.

    Raises:
        TypeError, ValueError: an argument of the wrong type, dtype, shape or range, or ends that cross.
        NotImplementedError: the backend asked for cannot do this; the text names one that can.
        torch._dynamo.exc.FailOnRecompileLimitHit: backend="flex", and more variants than can be kept compiled.
    Under torch.compile the values of `subtree_end` are not checked, and no other backend is tried.
    """
    if backend == "auto":
        backend = _override
    query, key, value = _as_autocast(query, key, value)
    if position_ids is not None:
        position_ids = position_ids.expand(query.shape[0], -1)
    _check(query, key, value, subtree_end, scale, softcap, sliding_window, position_ids, sinks, backend)
    arguments = {
        "scale": query.shape[-1] ** -0.5 if scale is None else scale,
        "softcap": softcap,
        "sliding_window": sliding_window,
        "position_ids": position_ids if sliding_window is not None else None,
        "sinks": sinks,
    }
    if backend != "auto":
        return BACKENDS[backend](query, key, value, subtree_end, **arguments)
    for name in _preferred(query, value, subtree_end, sliding_window):
        try:
            if name in _COMPILED:
                _probe_backward(name, query, key, value, subtree_end, arguments)
            return BACKENDS[name](query, key, value, subtree_end, **arguments)
        except NotImplementedError:
            continue  # not this call; another one may fit
        except Exception as error:
            if not _is_compilation_error(error) or torch.compiler.is_compiling():
                raise
            _broken[name] = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
            logger.warning("flexmask: backend %r failed and is not used any more (%s)", name, _broken[name])
            logger.debug("flexmask: backend %r", name, exc_info=error)
    raise AssertionError("unreachable: blockwise can do everything")


def _check_backend(backend: str) -> None:
    if backend not in ("auto", *BACKENDS):
        raise ValueError(f"backend is {backend!r}, expected one of {', '.join(('auto', *BACKENDS))}")


_override = "auto"


def set_backend(backend: str) -> None:
    """Choose what `backend="auto"` means in this process; "auto" gives the choice back. FLEXMASK_BACKEND does the same.

    Raises:
        ValueError: an unknown backend.
    """
    global _override
    _check_backend(backend)
    _override = backend


@contextlib.contextmanager
def using_backend(backend: str) -> Iterator[None]:
    """`set_backend` within a block; afterwards as before."""
    before = _override
    set_backend(backend)
    try:
        yield
    finally:
        set_backend(before)


set_backend(os.environ.get("FLEXMASK_BACKEND", "auto"))

# In the order in which they are tried.
_ON_CUDA = ("flex", "triton", "flash", "blockwise")
_ELSEWHERE = ("flash", "blockwise")
# (compute capability, bytes of the dtype, head sizes up to) -> what goes before "flex": a GPU has shown it exact, and faster
# forward and backward together in every row of benchmarks/attention.py that it ran.
_FASTER_THAN_FLEX = {
    # NVIDIA H100 and H200, results/attention_gpu.json and attention_gpu_more.json.
    ((9, 0), 2, 128): "triton",
}
_COMPILED = ("flex", "triton")
_broken: dict[str, str] = {}  # backends that could not be compiled under "auto", and why
# Kind of call -> length -> why it is refused, if it is. Not the exception, which would keep the tensors of every frame it passed.
_probed: dict[tuple, dict[int, str | None]] = {}


def _preferred(query: Tensor, value: Tensor, subtree_end: Tensor, sliding_window: int | None) -> list[str]:
    """Backends to try, best first."""
    if not query.is_cuda:
        first = subtree_end.shape[1] - query.shape[2]
        fits = query.device.type == "cpu" and _flash_fits(subtree_end, first, sliding_window)
        return [name for name in _ELSEWHERE if name not in _broken and (fits or name != "flash")]
    here = (torch.cuda.get_device_capability(query.device), query.dtype.itemsize)
    size = max(query.shape[-1], value.shape[-1])
    first = [name for (*kind, largest), name in _FASTER_THAN_FLEX.items() if tuple(kind) == here and size <= largest]
    return [name for name in dict.fromkeys((*first, *_ON_CUDA)) if name not in _broken]


def _flash_fits(subtree_end: Tensor, first: int, sliding_window: int | None) -> bool:
    """On a CPU. In compiled code it refuses positions when it is too late to ask another, so it gets no window there."""
    if torch.compiler.is_compiling():
        return sliding_window is None
    return once_per_forward(flash.pays, subtree_end, first=first, sliding_window=sliding_window)


def _probe_backward(name: str, query, key, value, subtree_end, arguments: dict) -> None:
    """Run forward and backward once per kind of call, so that a backward that cannot be compiled is found out here.

    In the training step itself it would fail inside `loss.backward()`, where no other backend can be chosen any more.
    Twice, in fact: a compiler takes the first length as it is, and the second as a symbol for all others.
    """
    tensors = {"query": query, "key": key, "value": value, "sinks": arguments["sinks"]}
    needs_grad = {n: x.requires_grad for n, x in tensors.items() if x is not None}
    if not torch.is_grad_enabled() or not any(needs_grad.values()) or torch.compiler.is_compiling():
        return
    options = (arguments["softcap"], arguments["sliding_window"])
    kind = (name, query.device, query.dtype, query.shape[1], key.shape[1], query.shape[-1], value.shape[-1], *options)
    kind += (query.shape[2] == key.shape[2], *needs_grad.items())
    lengths, length = _probed.setdefault(kind, {}), key.shape[2]
    for refused in lengths.values():
        if refused is not None:
            raise NotImplementedError(refused)
    if length in lengths or len(lengths) == 2:
        return
    lengths[length] = None
    copies = {n: tensors[n].detach().requires_grad_(needed) for n, needed in needs_grad.items()}
    arguments = arguments | {"sinks": copies.pop("sinks", None)}
    # Hooks of gradient checkpointing would recompute the layer here.
    with torch.autograd.graph.saved_tensors_hooks(lambda x: x, lambda x: x):
        try:
            BACKENDS[name](*copies.values(), subtree_end, **arguments).sum().backward()
        except NotImplementedError as error:
            lengths[length] = str(error)
            raise


def _is_compilation_error(error: Exception) -> bool:
    """Of dynamo, inductor or Triton: also a kernel that needs more shared memory than the device has, or no C compiler.

    Triton also raises what Python has, a plain RuntimeError say where there is no driver or a binary cannot be loaded: so
    the frames count too. Running out of memory is not one of them.
    """
    classes = [cls.__module__ for cls in type(error).__mro__]
    if isinstance(error, torch.OutOfMemoryError):
        return False
    frames = [str(frame.f_globals.get("__name__")) for frame, _ in traceback.walk_tb(error.__traceback__)]
    return any(name.startswith(("torch._dynamo.", "torch._inductor.", "triton.")) for name in classes) or any(
        name.startswith(("triton.runtime.", "triton.compiler.", "triton.backends.")) for name in frames
    )


def _as_autocast(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Under autocast, cast as PyTorch's own attention would: models hand over float32 q and k with a bfloat16 v."""
    device = query.device.type
    if torch.is_autocast_enabled(device) and query.dtype != torch.float64:
        dtype = torch.get_autocast_dtype(device)
        return query.to(dtype), key.to(dtype), value.to(dtype)
    return query, key, value


def _check(query, key, value, subtree_end, scale, softcap, sliding_window, position_ids, sinks, backend) -> None:
    _check_backend(backend)
    for name, x in (("query", query), ("key", key), ("value", value)):
        if x.ndim != 4:
            raise ValueError(f"{name} has shape {tuple(x.shape)}, expected (batch, heads, L, head_dim)")
        if x.dtype not in (torch.float64, torch.float32, torch.bfloat16, torch.float16) or x.dtype != query.dtype:
            raise TypeError(f"{name} is {x.dtype} beside a query of {query.dtype}, expected one floating dtype for all")
    batch, heads, queries, head_dim = query.shape
    kv_heads, length = key.shape[1:3]
    first = length - queries
    of_part = batch == 1 and 0 < first < length and first % BLOCK_SIZE == 0
    if (
        key.shape != (batch, kv_heads, length, head_dim)
        or value.shape[:3] != key.shape[:3]
        or heads % kv_heads
        or (first and not of_part)
    ):
        raise ValueError(
            f"query {tuple(query.shape)}, key {tuple(key.shape)} and value {tuple(value.shape)} do not fit; expected "
            "(batch, heads, L, head_dim), (batch, kv_heads, L, head_dim) and (batch, kv_heads, L, value_dim), with heads "
            "a multiple of kv_heads (a key/value cache cannot be combined with subtree_end); or a query of the last tokens, "
            f"for a batch of 1, {BLOCK_SIZE} · m tokens after the first key"
        )
    check_dtype(subtree_end)
    once_per_forward(check_subtree_end, subtree_end)
    if subtree_end.shape != (batch, length):
        raise ValueError(f"subtree_end has shape {tuple(subtree_end.shape)}, expected ({batch}, {length})")
    if subtree_end.device != query.device:
        raise ValueError(f"subtree_end is on {subtree_end.device}, the query on {query.device}; expected one device")
    for name, number in (("scale", scale), ("softcap", softcap)):
        if number is not None and not number > 0:
            raise ValueError(f"{name} is {number}, expected a positive number or None")
    if sliding_window is not None:
        if sliding_window < 1:
            raise ValueError(f"sliding_window is {sliding_window}, expected at least 1 (the token itself) or None")
        if position_ids is None:
            raise ValueError(
                "sliding_window needs position_ids: a window counts logical positions, not places in the row"
            )
        if position_ids.shape != (batch, length) or position_ids.is_floating_point():
            raise ValueError(
                f"position_ids is {position_ids.dtype} {tuple(position_ids.shape)}, expected integers ({batch}, {length})"
            )
    if sinks is not None and sinks.shape != (heads,):
        raise ValueError(f"sinks has shape {tuple(sinks.shape)}, expected one per head ({heads},)")

"""Tree attention through our own Triton kernels (`flexmask_kernels`): CUDA, without torch.compile."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from ..mask import BLOCK_SIZE, once_per_forward, tile_lists


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
        NotImplementedError: Triton is not installed; or a dtype, head size or device that the kernels do not have.
    """
    try:
        from flexmask_kernels.attention import tree_attention
    except ModuleNotFoundError as error:
        raise NotImplementedError(f"backend 'triton' needs Triton ({error}); backend 'blockwise' does not") from error
    if query.shape[2] < subtree_end.shape[1]:
        raise NotImplementedError("backend 'triton' cannot do queries of a part of the row; backend 'flash' can")
    lists = once_per_forward(tile_lists, subtree_end, position_ids=position_ids, sliding_window=sliding_window)
    if position_ids is not None:
        position_ids = once_per_forward(_whole_blocks_of_positions, subtree_end, position_ids=position_ids)
    return tree_attention(
        query,
        key,
        value,
        once_per_forward(_whole_blocks, subtree_end),
        [getattr(lists, name) for name in lists.__dataclass_fields__],
        scale=scale,
        softcap=softcap,
        sliding_window=sliding_window,
        position_ids=position_ids,
        sinks=sinks,
    )


def _whole_blocks(x: Tensor) -> Tensor:
    """int32, 0 beyond the row, so that no load of the kernels needs a bound. A copy: what is kept for a tensor must not be it."""
    return pad(x.to(torch.int32), (0, -x.shape[1] % BLOCK_SIZE)).clone(memory_format=torch.contiguous_format)


def _whole_blocks_of_positions(subtree_end: Tensor, *, position_ids: Tensor) -> Tensor:
    return _whole_blocks(position_ids)

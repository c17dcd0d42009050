"""A row on several ranks: some of its tokens on each, and in attention some heads (DeepSpeed-Ulysses, arXiv 2309.14509).

Outside attention no token of a row needs another, so each rank runs the model on its own share of them. In attention the ranks
exchange: queries, keys and values of a rank's tokens and all heads become those of all tokens and its share of the heads, and the
output goes the other way. So the attention of a tree is that of the whole row, on any backend.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
import torch.distributed as dist
from einops import rearrange
from torch import Tensor
from transformers import PreTrainedConfig

from ..collator import target_weight
from ..mask import BLOCK_SIZE


class RankShare:
    """A rank's share of a row: a keyword of `model(…)`, which reaches every attention layer.

    Attributes:
        group: the ranks that have the row.
    """

    def __init__(self, group: dist.ProcessGroup):
        self.group = group
        self.rank, self.ranks = dist.get_rank(group), dist.get_world_size(group)

    def own(self, x: Tensor, dim: int = 1) -> Tensor:
        """Of something of all tokens, or all heads, the part of this rank."""
        return x.chunk(self.ranks, dim)[self.rank]

    def to_heads(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(1, heads, L / ranks, head_dim) each, keys and values of fewer heads -> (1, heads / ranks, L, head_dim). Heads of keys
        that are fewer than ranks are there on several.

        Raises:
            NotImplementedError: heads that cannot be shared out.
        """
        copies = _copies(query.shape[1], key.shape[1], self.ranks)
        if copies > 1:
            key, value = (x.repeat_interleave(copies, 1) for x in (key, value))
        return tuple(_Exchange.apply(x, self, True) for x in (query, key, value))

    def to_tokens(self, out: Tensor) -> Tensor:
        """(1, heads / ranks, L, head_dim) -> (1, heads, L / ranks, head_dim)."""
        return _Exchange.apply(out, self, False)


def _copies(heads: int, kv_heads: int, ranks: int) -> int:
    """On how many ranks each head of keys is."""
    copies = ranks // math.gcd(ranks, kv_heads)
    if heads % ranks or heads % (kv_heads * copies):
        raise NotImplementedError(
            f"{heads} heads of queries and {kv_heads} of keys cannot be shared out to {ranks} ranks (sequence_parallel_size); "
            f"take a divisor of {heads} that divides {kv_heads}, or is a multiple of it"
        )
    return copies


def check_heads(config: PreTrainedConfig, ranks: int) -> None:
    """Refuse a model whose heads cannot be shared out, as far as its configuration tells.

    Raises:
        NotImplementedError: as `RankShare.to_heads`.
    """
    text = config.get_text_config(decoder=True)
    heads, kv_heads = (getattr(text, name, None) for name in ("num_attention_heads", "num_key_value_heads"))
    if heads:
        _copies(heads, kv_heads or heads, ranks)


class _Exchange(torch.autograd.Function):
    """All-to-all: heads for tokens, or tokens for heads."""

    @staticmethod
    def forward(ctx, x: Tensor, share: RankShare, to_heads: bool) -> Tensor:
        ctx.share, ctx.to_heads = share, to_heads
        pattern = "1 (p h) n d -> p h n d" if to_heads else "1 h (p n) d -> p h n d"
        given = rearrange(x, pattern, p=share.ranks).contiguous()
        taken = torch.empty_like(given)
        dist.all_to_all_single(taken, given, group=share.group)
        return rearrange(taken, "p h n d -> 1 h (p n) d" if to_heads else "p h n d -> 1 (p h) n d")

    @staticmethod
    def backward(ctx, grad: Tensor):
        return _Exchange.apply(grad, ctx.share, not ctx.to_heads), None, None


def share_row(batch: Mapping[str, Tensor], group: dist.ProcessGroup) -> dict:
    """What a rank of a group runs of a batch that all of them have: for `model(…)` and `tree_loss`.

    Sums over its targets, with `total_weight` that of the whole batch, add up over the ranks to those of the batch; so do their
    gradients. (Where a wrapper averages gradients over ranks, multiply the loss by their number.)

    Args:
        batch: of the collator, the same on every rank.
        group: the ranks.

    Returns:
        input_ids, position_ids: (1, L / ranks); subtree_end: (1, L), of the whole row; its targets, with target_weight (one of
        weight 0, if it has none); rank_share. L is padded to a multiple of the ranks, and of the blocks of attention.
    """
    share = RankShare(group)
    length = batch["subtree_end"].shape[1]
    padding = -length % math.lcm(BLOCK_SIZE, share.ranks)
    ids, positions = (torch.nn.functional.pad(batch[name], (0, padding)) for name in ("input_ids", "position_ids"))
    alone = torch.arange(length + 1, length + padding + 1, dtype=torch.int32, device=ids.device)
    own = (length + padding) // share.ranks
    index = batch["logits_to_keep"] - share.rank * own
    mine = ((index >= 0) & (index < own)).nonzero().flatten()
    weight = target_weight(batch).to(ids.device)
    targets = index[mine], batch["shift_labels"][:, mine], weight[None, mine]
    if not len(mine):
        targets = index.new_zeros(1), index.new_zeros(1, 1), weight.new_zeros(1, 1)
    return {
        "input_ids": share.own(ids),
        "position_ids": share.own(positions),
        "subtree_end": torch.cat([batch["subtree_end"], alone[None]], 1),
        **dict(zip(("logits_to_keep", "shift_labels", "target_weight"), targets, strict=True)),
        "rank_share": share,
    }

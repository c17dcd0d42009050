"""What a training step does with the same conversations: one-pass, and what a user would do instead. Batches, the
attention that they need, and the FLOPs they take.

Each method is a function (conversations, vocabulary, max_tokens of a row or batch) -> `Work`.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from common import DEVICE, DTYPE, Vocabulary, additive_mask, repeat_heads
from torch.nn.attention.varlen import varlen_attn
from torch.nn.functional import pad, scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedConfig

import flexmask.loss
from flexmask import OnePassCollator, Pass, TokenTree, cost, pack, split
from flexmask.branches import _bins
from flexmask.collator import to_batch
from flexmask.cost import Cost
from flexmask.mask import BLOCK_SIZE, count_tiles, once_per_forward


@dataclass(frozen=True)
class Work:
    """A step's batches (keywords of the model), their attention implementation, and what is counted for them, by the model's
    configuration; and how many tokens are in memory at a time, where a row is run branch by branch."""

    attention: str
    batches: list[dict]
    costs: Callable[[PreTrainedConfig], list[Cost]]
    tokens_in_memory: int | None = None


def one_pass(conversations: Sequence[Sequence[Pass]], vocab: int, max_tokens: int) -> Work:
    """Trees packed into rows."""
    rows = pack([TokenTree.from_passes(passes) for passes in conversations], max_tokens)
    return Work("flexmask", _batches(rows, vocab), _counted(rows, keeps_logits=_library_sums()))


def by_branches(conversations, vocab, max_tokens):
    """The same rows, with the activations of the longest pass at a time."""
    return replace(one_pass(conversations, vocab, max_tokens), tokens_in_memory=0)


def by_larger_branches(conversations, vocab, max_tokens):
    """The same with half as many again."""
    longest = max(len(p.input_ids) for p in flat(conversations))
    return replace(one_pass(conversations, vocab, max_tokens), tokens_in_memory=longest * 3 // 2)


def split_rows(conversations, vocab, max_tokens):
    """One-pass in rows of the longest pass."""
    return one_pass(conversations, vocab, max(len(p.input_ids) for p in flat(conversations)))


def in_parts(conversations: Sequence[Sequence[Pass]], vocab: int, parts: int) -> Work:
    """One-pass with every conversation split into so many parts, each a batch of its own."""
    trees = []
    for passes in conversations:
        tree = TokenTree.from_passes(passes)
        low, high = tree.max_length, len(tree)
        while low < high:  # the fewest tokens that do with so many parts
            middle = (low + high) // 2
            low, high = (low, middle) if len(split(tree, middle)) <= parts else (middle + 1, high)
        found = split(tree, low)
        if len(found) != parts:
            raise ValueError(f"the tree cannot be split into {parts} parts by a limit of tokens")
        trees += found
    return Work("flexmask", _batches(trees, vocab), _counted(trees, keeps_logits=_library_sums()))


def sequences(conversations, vocab, max_tokens):
    """N-pass, one sequence at a time, labels of -100 where nothing is trained: what most scripts do."""
    passes = flat(conversations)
    return Work("sdpa", [labelled([p]) for p in passes], _counted(_single_trees(passes), all_logits=True))


def sequences_targets(conversations, vocab, max_tokens):
    """The same, with logits where there is a target, all of them at once, as the library's loss has them."""
    passes = flat(conversations)
    return Work("sdpa", [_targets_only(p) for p in passes], _counted(_single_trees(passes), keeps_logits=True))


def padded(conversations, vocab, max_tokens):
    """N-pass, batches of passes of like lengths, padded on the right, of at most max_tokens."""
    batches, batch = [], []
    for p in sorted(flat(conversations), key=lambda p: len(p.input_ids)):
        if batch and (len(batch) + 1) * len(p.input_ids) > max_tokens:
            batches.append(batch)
            batch = []
        batch.append(p)
    batches.append(batch)
    costs = [
        _counted(_single_trees([batch[-1]] * len(batch)), all_logits=True, dense=len(batch) > 1) for batch in batches
    ]  # one sequence alone has no mask
    return Work("sdpa", [labelled(batch) for batch in batches], lambda config: [c for of in costs for c in of(config)])


def packed(conversations, vocab, max_tokens):
    """N-pass, passes packed into rows in which no pass sees another, with the loss of one-pass."""
    rows = _documents(flat(conversations), max_tokens)
    return Work("each-pass", [_one_after_the_other(row) for row in rows], _counted(rows, keeps_logits=_library_sums()))


def packed_trees(conversations, vocab, max_tokens):
    """The same with our attention: to it a tree without forks is a document, and it skips the tiles between documents."""
    rows = _documents(flat(conversations), max_tokens)
    return Work("flexmask", _batches(rows, vocab), _counted(rows, keeps_logits=_library_sums()))


def _documents(passes: Sequence[Pass], max_tokens: int) -> list[TokenTree]:
    """Rows of whole passes that share nothing, the longest first, each in the first row with room (`pack` would merge them)."""
    trees = _single_trees(passes)
    rows = _bins(list(range(len(trees))), np.array(list(map(len, trees))), max_tokens)
    return [TokenTree.concat([trees[i] for i in row]) for row in rows]


def interleaved(conversations, vocab, max_tokens):
    """The published one-pass method: one conversation at a time, turn by turn in one sequence, with a dense mask handed to
    SDPA. (Targets are those of the tree; the published label shift gets one of each turn wrong.)"""
    trees = [TokenTree.from_passes(passes) for passes in conversations]
    return Work("dense-mask", [_turn_by_turn(tree) for tree in trees], _counted(trees, keeps_logits=True, dense=True))


def aligned(conversations, vocab, max_tokens):
    """One padded batch: prompts padded on the left, completions on the right, logits at completions, as TRL's GRPO has it."""
    passes = flat(conversations)
    longest = [_longest(passes)] * len(passes)
    return Work("sdpa", [_aligned(passes)], _counted(_single_trees(longest), keeps_logits=True, dense=True))


def shared(conversations, vocab, max_tokens):
    """The same batch, and `flexmask.share_prefixes`."""
    passes = flat(conversations)
    logits = len(passes) * int(np.sum(_longest(passes).loss_mask))
    return Work(
        "flexmask", [_aligned(passes)], _counted([TokenTree.from_passes(passes)], keeps_logits=True, logits=logits)
    )


def _longest(passes: Sequence[Pass]) -> Pass:
    """A pass of the longest prompt and the longest completion."""
    prompt, completion = (max(map(len, parts)) for parts in zip(*map(_prompt_and_completion, passes)))
    return Pass(np.arange(prompt + completion), np.arange(prompt + completion) >= prompt)


METHODS: dict[str, Callable[..., Work]] = {
    "one-pass": one_pass,
    "N-pass, sequences": sequences,
    "N-pass, sequences, logits at targets": sequences_targets,
    "N-pass, padded batches": padded,
    "N-pass, packed": packed,
    "published one-pass": interleaved,
}
if DEVICE == "cuda":  # our attention beside the library's, to tell layout and kernel apart
    METHODS["N-pass, packed, our kernels"] = packed_trees
MEMORY_METHODS = {
    "one-pass, branch by branch": by_branches,
    "one-pass, branches of 1.5 passes": by_larger_branches,
    "one-pass, split": split_rows,
}
GROUP_METHODS = {"padded batch": aligned, "padded batch, share_prefixes": shared, "trees": one_pass}


def _counted(trees: Sequence[TokenTree], **how) -> Callable[[PreTrainedConfig], list[Cost]]:
    return lambda config: [_cost(tree, config, **how) for tree in trees]


def _library_sums() -> bool:
    """Whether `tree_loss` computes logits once however many there are."""
    return flexmask.loss._library_loss(DEVICE, DTYPE) is not None


def _cost(
    tree: TokenTree,
    config: PreTrainedConfig,
    *,
    all_logits: bool = False,
    keeps_logits: bool = False,
    dense: bool = False,
    logits: int | None = None,
) -> Cost:
    """As `flexmask.cost` counts it for the tree, but for what a method does otherwise.

    Args:
        all_logits: logits of every token.
        keeps_logits: a loss that never computes logits twice.
        dense: no tile is skipped.
        logits: how many places have logits, if not the targets.
    """
    found = cost(tree, config)
    counted = found.n_pass_all_logits if all_logits else found.one_pass
    attention, loss = found.one_pass.attention_flops, counted.loss_flops
    if keeps_logits:
        kept = found.n_pass_all_logits
        loss = kept.loss_flops / kept.logits * (counted.logits if logits is None else logits)
    if dense:
        blocks = -(-len(tree) // BLOCK_SIZE)
        attention *= blocks**2 / sum(count_tiles(torch.from_numpy(tree.subtree_end)[None]))
    return replace(found.one_pass, attention_flops=attention, loss_flops=loss)


def _single_trees(passes: Sequence[Pass]) -> list[TokenTree]:
    return [TokenTree.from_passes([p]) for p in passes]


def labelled(passes: Sequence[Pass]) -> dict[str, torch.Tensor]:
    """Passes as a right-padded batch with labels."""
    length = max(len(p.input_ids) for p in passes)
    ids, mask, labels = (torch.full((len(passes), length), fill) for fill in (0, 0, -100))
    for row, p in enumerate(passes):
        tokens, trained = torch.from_numpy(np.asarray(p.input_ids)), torch.from_numpy(np.asarray(p.loss_mask))
        ids[row, : len(tokens)], mask[row, : len(tokens)] = tokens, 1
        labels[row, : len(tokens)] = tokens.masked_fill(~trained, -100)
    return {"input_ids": ids, "labels": labels} | ({"attention_mask": mask} if len(passes) > 1 else {})


def _prompt_and_completion(p: Pass) -> tuple[torch.Tensor, torch.Tensor]:
    ids = torch.from_numpy(np.asarray(p.input_ids))
    at = int(np.argmax(p.loss_mask))
    return ids[:at], ids[at:]


def _aligned(passes: Sequence[Pass]) -> dict[str, torch.Tensor]:
    """All completions begin at the same place; logits where a token of them, or their padding, is predicted."""
    prompts, completions = zip(*map(_prompt_and_completion, passes))
    at, length = max(map(len, prompts)), max(map(len, completions))
    ids, mask = (torch.zeros(len(passes), at + length, dtype=torch.long) for _ in range(2))
    labels = torch.full((len(passes), length), -100)
    for row, (prompt, completion) in enumerate(zip(prompts, completions)):
        ids[row, at - len(prompt) : at + len(completion)] = torch.cat([prompt, completion])
        mask[row, at - len(prompt) : at + len(completion)] = 1
        labels[row, : len(completion)] = completion
    where = torch.arange(at - 1, at + length - 1)
    return {"input_ids": ids, "attention_mask": mask, "logits_to_keep": where, "labels": labels, "shift_labels": labels}


def flat(conversations: Sequence[Sequence[Pass]]) -> list[Pass]:
    return [p for passes in conversations for p in passes]


def _batches(rows: Sequence[TokenTree], vocab: int) -> list[dict[str, torch.Tensor]]:
    collator = OnePassCollator(Vocabulary(vocab))
    return [collator([row]) for row in rows]


def _targets_only(p: Pass) -> dict[str, torch.Tensor]:
    ids = torch.from_numpy(np.asarray(p.input_ids))
    trained = torch.from_numpy(np.flatnonzero(p.loss_mask))
    labels = ids[trained][None]
    return {"input_ids": ids[None], "logits_to_keep": trained - 1, "labels": labels, "shift_labels": labels}


def _one_after_the_other(row: TokenTree) -> dict[str, torch.Tensor]:
    """The batch of a row of passes, with their lengths in place of the ends of subtrees."""
    batch = to_batch(row, pad_to_multiple_of=1)
    del batch["subtree_end"]
    return batch | {"pass_lengths": torch.from_numpy(row.pass_lengths)}


def _turn_by_turn(tree: TokenTree) -> dict[str, torch.Tensor]:
    """The tokens of each pass that no earlier one has, pass after pass: the tree in the order of the conversation. Padded
    to a multiple of 8, as the kernels want a mask."""
    order, placed = [], np.zeros(len(tree), bool)
    for path in tree.paths():
        order.extend(path[~placed[path]].tolist())
        placed[path] = True
    order = np.array(order)
    place = np.argsort(order)
    padding = -len(tree) % 8
    visible = np.eye(len(tree) + padding, dtype=bool)
    visible[: len(tree), : len(tree)] = (order <= order[:, None]) & (order[:, None] < tree.subtree_end[order])
    labels = torch.from_numpy(tree.target_ids)[None]
    return {
        "input_ids": torch.from_numpy(np.pad(tree.input_ids[order], (0, padding)))[None],
        "position_ids": torch.from_numpy(np.pad(tree.position_ids[order], (0, padding)))[None],
        "dense_mask": additive_mask(torch.from_numpy(visible), DTYPE)[None, None],
        "logits_to_keep": torch.from_numpy(place[tree.target_index]),
        "labels": labels,
        "shift_labels": labels,
    }


def _dense_attention(module, query, key, value, attention_mask, *, dense_mask, scaling=None, **kwargs):
    """SDPA with the dense mask (a keyword of the model's call, which reaches every layer), keys and values repeated, as
    transformers does where there is a mask."""
    key, value = repeat_heads(query, key, value)
    out = scaled_dot_product_attention(query, key, value, attn_mask=dense_mask, scale=scaling)
    return out.transpose(1, 2).contiguous(), None


def _attention_of_each_pass(module, query, key, value, attention_mask, *, pass_lengths, scaling=None, **kwargs):
    """Causal attention on each pass by itself (their lengths are a keyword of the model's call): on a GPU FlashAttention on
    all at once, elsewhere SDPA on one after the other."""
    if DEVICE == "cuda":
        starts, longest = once_per_forward(_starts, pass_lengths)
        tensors = (x[0].transpose(0, 1) for x in (query, key, value))
        options = {"scale": scaling, "window_size": (-1, 0), **GROUPED}
        return varlen_attn(*tensors, starts, starts, longest, longest, **options)[None], None
    outs = [
        scaled_dot_product_attention(q, k, v, is_causal=True, scale=scaling, enable_gqa=True).transpose(1, 2)
        for q, k, v in zip(*(x.split(pass_lengths.tolist(), 2) for x in (query, key, value)))
    ]
    return torch.cat(outs, 1), None


def _starts(lengths: torch.Tensor) -> tuple[torch.Tensor, int]:
    """Where passes begin, and the last one ends; and the greatest length."""
    return pad(lengths.cumsum(0, dtype=torch.int32), (1, 0)), int(lengths.max())


# Newer versions want to be told that there are fewer heads of keys than of queries; older ones have no such argument.
GROUPED = {"enable_gqa": True} if "enable_gqa" in inspect.signature(varlen_attn).parameters else {}
for name, attention in (("dense-mask", _dense_attention), ("each-pass", _attention_of_each_pass)):
    AttentionInterface.register(name, attention)
    AttentionMaskInterface.register(name, lambda **_: None)

"""Examples -> the batch a model takes: one row of plain tensors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from .mask import BLOCK_SIZE
from .passes import ConversationError, render_conversation
from .tree import TokenTree


class OnePassCollator:
    """Joins examples into one row, pads it, and makes the batch. A `data_collator` for the Hugging Face Trainer.

    An example is a conversation (a dict with `messages`, and `tools` if it has any; or the list of messages), or a
    tree made ahead: a TokenTree, a packed row of `pack`, or a dict of the columns of `TokenTree.to_dict`.

    Args:
        tokenizer: renders and tokenises conversations; its pad token (or token 0) fills the padding.
        max_tokens: tokens of a row before padding, at most. More is an error, never a cut.
        max_length: tokens of one path from the first to the last token the model sees in a row, at most.
        pad_to_multiple_of: rows are padded to a multiple of this. 128 is the block of the attention kernels; a larger
            number (say `max_tokens`) gives fewer different shapes.
        **template_options: for `render_passes`: chat_template, reasoning_format, end_of_turn, template arguments.
    """

    def __init__(
        self,
        tokenizer,
        max_tokens: int | None = None,
        *,
        max_length: int | None = None,
        pad_to_multiple_of: int = BLOCK_SIZE,
        **template_options,
    ):
        self.tokenizer = tokenizer
        self.max_tokens = max_tokens
        self.max_length = max_length
        self.pad_to_multiple_of = pad_to_multiple_of
        self.template_options = template_options

    def __call__(self, examples: Sequence) -> dict[str, Tensor]:
        """One batch from any number of examples.

        Returns:
            input_ids, position_ids: int64 (1, L); subtree_end: int32 (1, L); logits_to_keep: int64 (M,), where targets
            are predicted; labels, shift_labels: int64 (1, M), the targets.

        Raises:
            ConversationError: an example cannot be rendered (its place in the batch is named).
            ValueError: too long; token ids outside the vocabulary; no targets; weights other than 1.
        """
        trees = []
        for index, example in enumerate(examples):
            try:
                trees.append(self.tree(example))
            except (ValueError, TypeError) as error:
                kind = ConversationError if isinstance(error, ConversationError) else ValueError
                raise kind(f"example {index} of the batch: {error}") from error
        row = TokenTree.concat(trees)
        if self.max_tokens is not None and len(row) > self.max_tokens:
            raise ValueError(
                f"{len(examples)} examples have {len(row)} tokens together, a row has {self.max_tokens} (max_tokens); "
                "use a smaller per_device_train_batch_size, or pack the dataset ahead with flexmask.pack"
            )
        return self.batch(row)

    def tree(self, example) -> TokenTree:
        """The tree of one example, checked against `max_length` and the vocabulary."""
        tree = self._tree(example)
        if self.max_length is not None and tree.max_length > self.max_length:
            raise ConversationError(
                f"the longest pass has {tree.max_length} tokens, the model takes {self.max_length} (max_length)"
            )
        vocabulary = len(self.tokenizer)
        for outside in tree.input_ids[(tree.input_ids < 0) | (tree.input_ids >= vocabulary)][:1]:
            raise ValueError(f"token id {outside} is outside the tokenizer's vocabulary of {vocabulary}")
        return tree

    def _tree(self, example) -> TokenTree:
        if isinstance(example, TokenTree):
            return example
        if isinstance(example, Mapping) and "subtree_end" in example:
            return TokenTree.from_dict(example)
        return TokenTree.from_passes(render_conversation(example, self.tokenizer, **self.template_options))

    def batch(self, row: TokenTree) -> dict[str, Tensor]:
        """The batch of one row."""
        if not row.num_targets:
            raise ValueError("the row has no targets, so there is nothing to train on")
        if (row.target_weight != 1).any():
            raise ValueError(
                f"target weights are {row.target_weight.min()} to {row.target_weight.max()}, expected 1: a weight other "
                "than 1, or a token that two passes supervise, cannot be expressed in the model's own loss"
            )
        padding = -len(row) % self.pad_to_multiple_of
        pad_id = self.tokenizer.pad_token_id or 0
        # A padding token is a tree of its own: it sees itself, and nothing sees it.
        subtree_end = np.concatenate([row.subtree_end, np.arange(len(row) + 1, len(row) + padding + 1, dtype=np.int32)])
        labels = torch.from_numpy(row.target_ids)[None]
        return {
            "input_ids": torch.from_numpy(np.pad(row.input_ids, (0, padding), constant_values=pad_id))[None],
            "position_ids": torch.from_numpy(np.pad(row.position_ids, (0, padding)))[None],
            "subtree_end": torch.from_numpy(subtree_end)[None],
            "logits_to_keep": torch.from_numpy(row.target_index),
            "labels": labels,
            "shift_labels": labels,
        }

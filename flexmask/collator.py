"""Examples -> the batch a model takes: one row of plain tensors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from .mask import BLOCK_SIZE
from .messages import ConversationError
from .packing import join
from .passes import Pass, render_conversation
from .tree import LOSS_REDUCTIONS, TokenTree


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
        loss_reduction: what the loss is a mean of, see `TokenTree.from_passes`. Trees made ahead keep their weights.
        target_per_position: for trainers that compute a loss of their own from shift_labels of every token, such as TRL's
            SFTTrainer. Without weights, and with one target for a token at most.
        **template_options: options of `render_passes`, arguments of the template among them.

    Raises:
        ValueError: an unknown loss_reduction, or an option of `build_trees` that a collator has not.
    """

    def __init__(
        self,
        tokenizer,
        max_tokens: int | None = None,
        *,
        max_length: int | None = None,
        pad_to_multiple_of: int = BLOCK_SIZE,
        loss_reduction: str = "token",
        target_per_position: bool = False,
        **template_options,
    ):
        if loss_reduction not in LOSS_REDUCTIONS:
            raise ValueError(f"loss_reduction is {loss_reduction!r}, expected one of {', '.join(LOSS_REDUCTIONS)}")
        for name in ("columns", "num_proc", "overlong"):
            if name in template_options:
                raise ValueError(
                    f"{name} is an option of flexmask.data.build_trees, which makes trees of conversations ahead; a collator "
                    "would hand it to the chat template"
                )
        self.tokenizer = tokenizer
        self.max_tokens = max_tokens
        self.max_length = max_length
        self.pad_to_multiple_of = pad_to_multiple_of
        self.loss_reduction = loss_reduction
        self.target_per_position = target_per_position
        self.template_options = template_options

    def __call__(self, examples: Sequence) -> dict[str, Tensor]:
        """One batch from any number of examples.

        Returns:
            input_ids, position_ids: int64 (1, L); subtree_end: int32 (1, L); logits_to_keep: int64 (M,), where targets
            are predicted; labels, shift_labels: int64 (1, M), the targets; and target_weight: float32 (1, M) if not
            all are 1. The model's own loss knows no weights, and a model with such a batch raises: take `tree_loss`, or
            flexmask.OnePassTrainer.
            With `target_per_position`, in place of logits_to_keep: shift_labels (1, L), the target that is predicted at each
            token, or -100; and labels (1, L), -100 everywhere, because who shifts those by one token must not find any.

        Raises:
            ConversationError: an example cannot be rendered (its place in the batch is named).
            ValueError: too long; token ids outside the vocabulary; no targets.
        """
        return self.batch(self.row(examples))

    def row(self, examples: Sequence) -> TokenTree:
        """The row that they are in together; raises what a call does."""
        trees = []
        for index, example in enumerate(examples):
            try:
                trees.append(self.tree(example))
            except (ValueError, TypeError) as error:
                kind = ConversationError if isinstance(error, ConversationError) else ValueError
                raise kind(f"example {index} of the batch: {error}") from error
        row = join(trees)
        if self.max_tokens is not None and len(row) > self.max_tokens:
            raise ValueError(
                f"a batch of {len(examples)} has {len(row)} tokens, a row has {self.max_tokens} (max_tokens); "
                + "use a smaller per_device_train_batch_size, or " * (len(examples) > 1)
                + "pack the dataset ahead with flexmask.pack, which splits a tree that is larger than a row, or "
                * (row.max_length <= self.max_tokens)
                + f"raise max_tokens; the longest pass, which must fit into a row, has {row.max_length}"
            )
        return row

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
        passes = render_conversation(example, self.tokenizer, **self.template_options)
        return TokenTree.from_passes(passes, loss_reduction=self.loss_reduction)

    def batch(self, row: TokenTree) -> dict[str, Tensor]:
        """The batch of one row."""
        padding = {
            "pad_to_multiple_of": self.pad_to_multiple_of, "pad_token_id": self.tokenizer.pad_token_id or 0,
        }  # fmt: skip
        return (_with_target_per_position if self.target_per_position else to_batch)(row, **padding)


def to_batch(row: TokenTree, *, pad_to_multiple_of: int = BLOCK_SIZE, pad_token_id: int = 0) -> dict[str, Tensor]:
    """The batch of one row, as `OnePassCollator` makes it.

    Raises:
        ValueError: no targets, or none with a weight.
    """
    weight = row.target_weight
    if not weight.any():
        raise ValueError("the row has no targets, or none with a weight, so there is nothing to train on")
    labels = torch.from_numpy(row.target_ids)[None]
    batch = to_inputs(row, pad_to_multiple_of=pad_to_multiple_of, pad_token_id=pad_token_id) | {
        "logits_to_keep": torch.from_numpy(row.target_index),
        "labels": labels,
        "shift_labels": labels,
    }
    return batch if (weight == 1).all() else batch | {"target_weight": torch.from_numpy(weight)[None]}


def _with_target_per_position(row: TokenTree, **padding) -> dict[str, Tensor]:
    if (row.target_weight != 1).any():
        raise ValueError(
            "targets have weights, which the loss of another trainer would ignore; use flexmask's OnePassTrainer, or leave out "
            "weights and loss_reduction"
        )
    if len(np.unique(row.target_index)) < row.num_targets:
        raise ValueError(
            "some token of the row has several targets, because passes that begin alike are trained from there on; a label per "
            "token cannot hold them: use flexmask's OnePassTrainer, or put such conversations into different rows"
        )
    batch = to_inputs(row, **padding)
    labels = torch.full_like(batch["input_ids"], -100)
    targets = labels.clone()
    targets[0, row.target_index] = torch.from_numpy(row.target_ids)
    return batch | {"labels": labels, "shift_labels": targets}


def targets_of(batch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Of a batch where its targets are predicted, and their token ids: int64 (M,) each.

    Raises:
        ValueError: a batch with `target_per_position`.
    """
    if "logits_to_keep" not in batch:
        raise ValueError(
            "the batch has a label for every token (target_per_position), which is for trainers with a loss of their own; "
            "flexmask's losses take that of OnePassCollator without it"
        )
    return batch["logits_to_keep"], batch["shift_labels"][0]


def target_weight(batch: Mapping[str, Tensor]) -> Tensor:
    """The weights of the targets of a batch, float32 (M,); raises what `targets_of` does."""
    _, ids = targets_of(batch)
    weight = batch.get("target_weight")
    return torch.ones(len(ids)) if weight is None else weight[0]


def empty_batch(pad_to_multiple_of: int = BLOCK_SIZE) -> dict[str, Tensor]:
    """A batch that counts for nothing: one target, of weight 0. For a rank that has nothing left while others have."""
    row = TokenTree.from_passes([Pass([0, 0], [False, True])])
    return to_batch(row, pad_to_multiple_of=pad_to_multiple_of) | {"target_weight": torch.zeros(1, 1)}


def to_inputs(row: TokenTree, *, pad_to_multiple_of: int = BLOCK_SIZE, pad_token_id: int = 0) -> dict[str, Tensor]:
    """input_ids, position_ids and subtree_end of one row, as in its batch: what a model needs without targets."""
    padding = -len(row) % pad_to_multiple_of
    # A padding token is a tree of its own: it sees itself, and nothing sees it.
    subtree_end = np.concatenate([row.subtree_end, np.arange(len(row) + 1, len(row) + padding + 1, dtype=np.int32)])
    return {
        "input_ids": torch.from_numpy(np.pad(row.input_ids, (0, padding), constant_values=pad_token_id))[None],
        "position_ids": torch.from_numpy(np.pad(row.position_ids, (0, padding)))[None],
        "subtree_end": torch.from_numpy(subtree_end)[None],
    }

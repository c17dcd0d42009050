"""Losses and log-probabilities of targets. The logits of all targets never exist at once where they are large."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from .collator import to_batch
from .tree import TokenTree

# Logits of one chunk: 64 MiB in float32, with their exponentials and gradient a few times that. Larger chunks are no
# faster: 110 targets already fill the product with a vocabulary of 150,000 tokens.
CHUNK_LOGITS = 2**24


def tree_logprobs(model, tree: TokenTree | Mapping[str, Tensor]) -> Tensor:
    """Log-probability of every target, given its ancestors in the tree.

    Args:
        model: a causal LM loaded with attn_implementation="flexmask", wrapped or not.
        tree: a tree, a forest of several, or a batch of the collator.

    Returns:
        (M,) float32, differentiable; float64 for a model in float64. `tree.per_pass` of it are the log-probabilities of
        the supervised tokens of each pass.
    """
    batch = to_batch(tree) if isinstance(tree, TokenTree) else tree
    return -target_losses(model, batch)


def tree_loss(model, batch: Mapping[str, Tensor], total_weight: float | Tensor | None = None) -> Tensor:
    """Σ weight · loss / total_weight over the targets of a batch: a scalar.

    Args:
        model: as for `tree_logprobs`.
        batch: of the collator.
        total_weight: by default that of the batch, which makes it a mean. For a mean over several batches (gradient
            accumulation, several ranks) the weight of all of them: `target_weight(batch).sum()` of each.
    """
    losses = target_losses(model, batch)
    weight = target_weight(batch).to(losses)
    return (losses * weight).sum() / (weight.sum() if total_weight is None else total_weight)


def target_weight(batch: Mapping[str, Tensor]) -> Tensor:
    """The weights of the targets of a batch, float32 (M,)."""
    weight = batch.get("target_weight")
    return torch.ones(batch["shift_labels"].shape[1]) if weight is None else weight[0]


def target_losses(model, batch: Mapping[str, Tensor]) -> Tensor:
    """Cross-entropy of every target, (M,) float32 (float64 in float64), differentiable.

    Where the logits are large, the model runs once up to its last hidden states, and then its own output layer, with
    whatever it does to logits (soft-cap, scale), on one chunk of targets after the other. Their logits are computed
    again in the backward.

    Raises:
        TypeError: not a Hugging Face model, nor one around it.
    """
    inner = next((m for m in model.modules() if isinstance(m, PreTrainedModel)), None)
    if inner is None:
        raise TypeError(f"got a {type(model).__name__}, expected a Hugging Face model")
    device = next(model.parameters()).device
    batch = {name: x.to(device) for name, x in batch.items() if name not in ("labels", "target_weight")}
    index, targets = batch.pop("logits_to_keep"), batch.pop("shift_labels")[0]
    size = max(1, CHUNK_LOGITS // inner.config.get_text_config().vocab_size)
    if len(index) <= size or inner.base_model is inner:
        return _cross_entropy(model(**batch, logits_to_keep=index, use_cache=False).logits, targets)

    hidden = []

    def keep_hidden(module, args, output):
        hidden.append(output)

    def add_losses(module, args, kwargs, output):  # inside the forward of what is around the model (DDP, FSDP)
        base_hook.remove()

        def losses_of(last_hidden_state, index, targets):
            with _returning(
                module.base_model, type(hidden[0])(**{**hidden[0], "last_hidden_state": last_hidden_state})
            ):
                return _cross_entropy(module.forward(*args, **kwargs | {"logits_to_keep": index}).logits, targets)

        output.loss = torch.cat(
            [
                checkpoint(losses_of, hidden[0].last_hidden_state, i, t, use_reentrant=False)
                for i, t in zip(index.split(size), targets.split(size))
            ]
        )
        return output

    base_hook = inner.base_model.register_forward_hook(keep_hidden)
    hook = inner.register_forward_hook(add_losses, with_kwargs=True, prepend=True)
    try:
        return model(**batch, logits_to_keep=index[:1], use_cache=False).loss
    finally:
        base_hook.remove()
        hook.remove()


@contextmanager
def _returning(module: torch.nn.Module, output):
    """Calls of the module give this output, and run nothing."""
    own = module.__dict__.get("forward")
    module.forward = lambda *args, **kwargs: output
    try:
        yield
    finally:
        if own is None:
            del module.forward
        else:
            module.forward = own


def _cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    logits = logits[0] if logits.dtype == torch.float64 else logits[0].float()
    return cross_entropy(logits, targets, reduction="none")

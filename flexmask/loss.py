"""Losses and log-probabilities of targets. The logits of all targets never exist at once where they are large."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from contextlib import contextmanager
from importlib import metadata

import torch
from packaging.version import Version
from torch import Tensor
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel
from torch.distributed.tensor import DTensor
from torch.nn.functional import cross_entropy
from torch.utils.checkpoint import checkpoint

from .collator import target_weight, to_batch
from .integrations.transformers import inner_model
from .tree import TokenTree

# Logits of one chunk: 256 MiB in float32, with their exponentials and gradient a few times that. Each chunk also reads
# and writes the gradient of the output layer, which with far fewer targets would cost more than their products.
CHUNK_LOGITS = 2**26
# Weights of targets that may differ for a sum with gradients that are ready after the forward: thoughts and answers, say.
MOST_WEIGHTS = 2
LIGER_VERSION = "0.8.2"  # the first whose losses of single targets have right gradients


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
        batch: of the collator; what else is in it is handed to the model as it is.
        total_weight: by default that of the batch, which makes it a mean. For a mean over several batches (gradient
            accumulation, several ranks) the weight of all of them: `target_weight(batch).sum()` of each.
    """
    weight = target_weight(batch)
    return _losses(model, batch, weight) / (weight.sum() if total_weight is None else total_weight)


def target_losses(model, batch: Mapping[str, Tensor]) -> Tensor:
    """Cross-entropy of every target, (M,) float32 (float64 in float64), differentiable.

    Where the logits are large, the model runs once up to its last hidden states; unless the output layer is spread over ranks by
    itself (ZeRO 3, Accelerate's FSDP2), which has all logits at once. If its logits are a linear layer of
    those and nothing else, a library's fused loss takes over: Liger-Kernel on CUDA where it is installed, PyTorch's own
    (2.13) in float32 and float64. Otherwise the model's output layer, with whatever it does to logits (soft-cap, scale,
    adapters), runs on one chunk of targets after the other. All of them compute logits again in the backward, but for the
    libraries in `tree_loss` where no more than MOST_WEIGHTS different weights occur: of a sum they have the gradients ready
    after the forward. The gradient of 16-bit weights is summed over chunks in 16 bits, as gradient
    accumulation sums it.

    Raises:
        TypeError: not a Hugging Face model, nor one around it.
    """
    return _losses(model, batch, None)


def _losses(model, batch: Mapping[str, Tensor], weight: Tensor | None) -> Tensor:
    """As `target_losses`; with weights (M,) the weighted sum."""
    inner = inner_model(model)
    device = next(model.parameters()).device
    weight = None if weight is None else weight.to(device)

    def result(losses: Tensor) -> Tensor:
        return losses if weight is None else (losses * weight.to(losses)).sum()

    inputs = {name: x for name, x in batch.items() if name not in ("labels", "target_weight")}
    inputs = {name: x.to(device) if isinstance(x, Tensor) else x for name, x in inputs.items()}
    index, targets = inputs.pop("logits_to_keep"), inputs.pop("shift_labels")[0]
    size = chunk_size(inner.config.get_text_config().vocab_size)
    head = inner.get_output_embeddings()
    if len(index) <= size or inner.base_model is inner or _is_spread(head):
        return result(_cross_entropy(model(**inputs, logits_to_keep=index, use_cache=False).logits, targets))

    seen = {}  # what the body gave, and what went into and came out of the output layer: for the last target only

    def keep_hidden(module, args, output):
        seen["body"] = output

    def keep_logits(module, args, output):
        seen["head"] = args[0], output

    def with_loss(output, loss: Tensor):
        # As an item: an attribute would be missed by FSDP, which looks for tensors that go backward.
        output["loss"] = loss
        return output

    def add_losses(module, args, kwargs, output):  # inside the forward of what is around the model (DDP, FSDP)
        states = seen["body"].last_hidden_state[0, index]
        fused = _fused_losses(head, states, *seen["head"], output.logits) if "head" in seen else None
        while hooks:
            hooks.pop().remove()
        if fused is not None:
            loss = _weighted_sum(fused, states, targets, weight)
            return with_loss(output, result(fused(states, targets)) if loss is None else loss)

        def losses_of(last_hidden_state, index, targets):
            body = type(seen["body"])(**{**seen["body"], "last_hidden_state": last_hidden_state})
            again = kwargs | {"logits_to_keep": index, "subtree_end": None}  # no layer runs that would need it
            with _returning(module.base_model, body):
                return _cross_entropy(module.forward(*args, **again).logits, targets)

        losses = [
            checkpoint(losses_of, seen["body"].last_hidden_state, i, t, use_reentrant=False)
            for i, t in zip(index.split(size), targets.split(size))
        ]
        return with_loss(output, result(torch.cat(losses)))

    hooks = [inner.base_model.register_forward_hook(keep_hidden)]
    if head is not None:
        hooks.append(head.register_forward_hook(keep_logits))
    outermost = inner.register_forward_hook(add_losses, with_kwargs=True, prepend=True)
    try:
        return model(**inputs, logits_to_keep=index[-1:], use_cache=False).loss
    finally:
        for hook in (outermost, *hooks):
            hook.remove()


def _is_spread(head: torch.nn.Module | None) -> bool:
    """Whether every call of the output layer gathers its weights from all ranks, and lets go of them afterwards."""
    if head is None:
        return False
    return isinstance(head, FSDPModule | FullyShardedDataParallel) or any(
        hasattr(p, "ds_id") for p in head.parameters()
    )


def chunk_size(vocab_size: int) -> int:
    """How many targets have their logits at the same time, at most."""
    return max(1, CHUNK_LOGITS // vocab_size)


def _fused_losses(head, states: Tensor, inputs: Tensor, outputs: Tensor, logits: Tensor) -> Callable | None:
    """A library's loss of (last hidden states, targets) that never holds all logits; None if none is right or installed.

    Args:
        head: the output layer.
        states: (M, hidden), the last hidden states that predict the targets.
        inputs, outputs: (1, 1, hidden), (1, 1, vocabulary): what the layer was given and gave for the last of them.
        logits: (1, 1, vocabulary), the model's logits of it.
    """
    if type(head) is not torch.nn.Linear or isinstance(head.weight, DTensor) or not head.weight.numel():
        return None  # an adapter, or sharded
    if "forward" in head.__dict__ or len(head._forward_hooks) != 1:
        return None  # changed from outside; the one hook is ours
    dtype = outputs.dtype  # that of autocast, too, wherever it was switched on
    with torch.no_grad():  # is there anything before the layer or after it? Zeros would not tell.
        same = torch.equal(inputs[0, -1], states[-1]) and torch.equal(outputs.to(logits.dtype), logits)
        if not same or not outputs.any():
            return None
    library = _library_loss(states.device.type, dtype)
    if library is None:
        return None
    weight, bias = head.weight.to(dtype), None if head.bias is None else head.bias.to(dtype)
    return lambda states, targets, **how: library(states.to(dtype), weight, targets, bias, **how)


def _weighted_sum(fused: Callable, states: Tensor, targets: Tensor, weight: Tensor | None) -> Tensor | None:
    """Σ weight · loss by sums over targets of the same weight; None without weights, or with many different ones. (Each sum holds
    a gradient of the output layer until the backward.)"""
    if weight is None:
        return None
    values = weight.unique().tolist()
    if len(values) > MOST_WEIGHTS:
        return None
    sums = [value * fused(states[weight == value], targets[weight == value], reduction="sum") for value in values]
    return torch.stack(sums).sum()


def _library_loss(device: str, dtype: torch.dtype) -> Callable | None:
    """(states, weight, targets, bias, reduction="none") -> losses in float32 (float64 in float64), by what is installed."""
    if device == "cuda" and dtype != torch.float64 and _has_liger():
        from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

        return functools.partial(liger_fused_linear_cross_entropy, reduction="none", accum_dtype=torch.float32)
    # In 16 bits PyTorch's rounds the losses themselves to 16 bits.
    if dtype in (torch.float32, torch.float64) and hasattr(torch.nn.functional, "linear_cross_entropy"):

        def losses(states, weight, targets, bias, reduction="none"):
            # Its own choice of chunks goes down to one target each, where the vocabulary is much the larger side.
            options = torch.nn.LinearCrossEntropyOptions(batch_chunk_size=chunk_size(len(weight)))
            return torch.nn.functional.linear_cross_entropy(
                states, weight, targets, linear_bias=bias, reduction=reduction, options=options
            )

        return losses
    return None


@functools.cache
def _has_liger() -> bool:
    try:
        return Version(metadata.version("liger-kernel")) >= Version(LIGER_VERSION)
    except metadata.PackageNotFoundError:
        return False


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

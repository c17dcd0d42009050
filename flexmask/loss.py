"""Losses and log-probabilities of targets. The logits of all targets never exist at once where they are large."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from importlib import metadata

import torch
from packaging.version import Version
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.utils.checkpoint import checkpoint

from .collator import target_weight, targets_of, to_batch
from .integrations.output_layer import OutputLayer, aside, run_with_losses
from .integrations.transformers import inner_model
from .tree import TokenTree

# Logits of one chunk: 256 MiB in float32, with their exponentials and gradient a few times that. Each chunk also reads
# and writes the gradient of the output layer, which with far fewer targets would cost more than their products.
CHUNK_LOGITS = 2**26
# Weights of targets that may differ for a sum with gradients that are ready after the forward: thoughts and answers, say.
MOST_WEIGHTS = 2
OBSERVED = 128  # targets of a row that metrics are taken of: their logits cost well below 1% of a step
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


def tree_loss(
    model,
    batch: Mapping[str, Tensor],
    total_weight: float | Tensor | None = None,
    *,
    observe: Callable[[Tensor, Tensor], object] | None = None,
) -> Tensor:
    """Σ weight · loss / total_weight over the targets of a batch: a scalar.

    Args:
        model: as for `tree_logprobs`.
        batch: of the collator; what else is in it is handed to the model as it is.
        total_weight: by default that of the batch, which makes it a mean. For a mean over several batches (gradient
            accumulation, several ranks) the weight of all of them: `target_weight(batch).sum()` of each.
        observe: called with logits (n, vocabulary), without gradients, and the targets (n,) that they predict, of up to OBSERVED
            targets from all over the row: for metrics.
    """
    weight = target_weight(batch)
    return _losses(model, batch, weight, observe) / (weight.sum() if total_weight is None else total_weight)


def target_losses(model, batch: Mapping[str, Tensor]) -> Tensor:
    """Cross-entropy of every target, (M,) float32 (float64 in float64), differentiable.

    Where the logits are large, losses are computed in the place of logits, where the model calls its output layer. If its logits
    are a linear layer and nothing else, a library's fused loss takes over: Liger-Kernel on CUDA where it is installed, PyTorch's
    own (2.13) in float32 and float64. Otherwise the output layer, with whatever the model does to logits (soft-cap, scale,
    adapters), runs on one chunk of targets after the other. All of them compute logits again in the backward, but for the
    libraries in `tree_loss` where no more than MOST_WEIGHTS different weights occur: of a sum they have the gradients ready
    after the forward. The gradient of 16-bit weights is summed over chunks in 16 bits, as gradient accumulation sums it. A model
    without an output layer of its own, or spread over ranks in a way that gathers it part by part, has all logits at once.

    Raises:
        TypeError: not a Hugging Face model, nor one around it.
        ValueError: a batch with `target_per_position`.
        NotImplementedError: the model does not compute logits of just the targets; AdaLoRA is trained.
    """
    return _losses(model, batch, None)


def _losses(model, batch: Mapping[str, Tensor], weight: Tensor | None, observe: Callable | None = None) -> Tensor:
    """As `target_losses`; with weights (M,) the weighted sum."""
    inner = inner_model(model)
    adapters = getattr(inner, "peft_config", {}).values()
    if inner.training and torch.is_grad_enabled() and any(adapter.peft_type == "ADALORA" for adapter in adapters):
        raise NotImplementedError(
            "AdaLoRA adds a loss of its own to that of the model, which flexmask's losses are not; take the library's Trainer "
            "with OnePassCollator, or LoRA"
        )
    index, targets = targets_of(batch)
    if weight is not None:  # of no weight are thoughts, where answers alone are trained
        counted = weight.nonzero().flatten()
        if not len(counted):  # something must go backward, and nothing is to be seen
            counted, observe = torch.zeros(1, dtype=torch.int64), None
        index, targets, weight = (x[counted.to(x.device)] for x in (index, targets, weight))
    inputs = {name: x for name, x in batch.items() if name not in ("labels", "shift_labels", "target_weight")}
    inputs["logits_to_keep"] = index
    device = next(model.parameters()).device
    inputs = {name: x.to(device) if isinstance(x, Tensor) else x for name, x in inputs.items()}
    size = chunk_size(inner.config.get_text_config().vocab_size)
    observed = torch.linspace(0, len(targets) - 1, min(len(targets), OBSERVED, size)).long()

    def summed(losses: Tensor) -> Tensor:
        return losses if weight is None else (losses * weight.to(losses)).sum()

    # Where the output layer is need not be where the first parameters are (offloaded, several devices).
    def losses_of(layer: OutputLayer, states: Tensor) -> Tensor:
        """Of what the model gives to its output layer, (1, M, hidden)."""
        _check_count(inner, states, targets)
        here = targets.to(states.device)
        if observe is not None:
            with aside():
                observe(layer.logits(states[:, observed])[0], here[observed])
        fused = _fused_losses(layer, states)
        if fused is not None:
            loss = None if weight is None else _weighted_sum(fused, states[0], here, weight.to(states.device))
            return summed(fused(states[0], here)) if loss is None else loss

        def of_chunk(states: Tensor, targets: Tensor) -> Tensor:
            return _cross_entropy(layer.logits(states), targets)

        chunks = zip(states.split(size, 1), here.split(size), strict=True)
        return summed(torch.cat([checkpoint(of_chunk, *chunk, use_reentrant=False) for chunk in chunks]))

    losses, logits = run_with_losses(model, inner, inputs, losses_of) if len(targets) > size else (None, None)
    if losses is not None:
        return losses
    logits = model(**inputs, use_cache=False).logits if logits is None else logits
    _check_count(inner, logits, targets)
    if observe is not None:
        observe(logits[0, observed].detach(), targets.to(logits.device)[observed])
    return summed(_cross_entropy(logits, targets.to(logits.device)))


def _check_count(inner, found: Tensor, targets: Tensor) -> None:
    if found.shape[1] != len(targets):
        raise NotImplementedError(
            f"{type(inner).__name__} computed logits of {found.shape[1]} tokens where logits_to_keep names {len(targets)}: it "
            "does not know that argument, or what was put in its place (a fused output layer) ignores it"
        )


def chunk_size(vocab_size: int) -> int:
    """How many targets have their logits at the same time, at most."""
    return max(1, CHUNK_LOGITS // vocab_size)


def _fused_losses(layer: OutputLayer, states: Tensor) -> Callable | None:
    """A library's loss of (what the model gives to its output layer (n, hidden), targets) that never holds all logits; None if
    none is right or installed."""
    linear = layer.linear(states)
    library = None if linear is None else _library_loss(states.device.type, linear[0].dtype)
    if library is None:
        return None
    weight, bias = linear
    return lambda states, targets, **how: library(states.to(weight.dtype), weight, targets, bias, **how)


def _weighted_sum(fused: Callable, states: Tensor, targets: Tensor, weight: Tensor) -> Tensor | None:
    """Σ weight · loss by sums over targets of the same weight; None with many different ones. (Each sum holds a gradient of the
    output layer until the backward.)"""
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


def _cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    logits = logits[0] if logits.dtype == torch.float64 else logits[0].float()
    return cross_entropy(logits, targets, reduction="none")

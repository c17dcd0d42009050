"""One pass against N passes, on the user's own model and conversations.

The N passes are run the plain way: each its own sequence, the library's own attention, a left-to-right shift. Nothing
of that shares code with the tree, its mask, its positions or its targets.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel

from .collator import OnePassCollator
from .integrations.transformers import NAME, check_config, inner_model, with_router_loss
from .packing import join
from .passes import Pass, render_conversation
from .tree import TokenTree

# (per-token loss, gradient), relative to the largest. float64 still rounds to float32 inside the library's norms.
# In 16 bits two right ways of computing attention differ this much (measured, see benchmarks/LOG.md).
TOLERANCE = {
    torch.float64: (1e-10, 1e-7),
    torch.float32: (1e-5, 1e-4),
    torch.bfloat16: (5e-2, 5e-2),
    torch.float16: (1e-2, 1e-2),
}


@dataclass(frozen=True)
class Comparison:
    """One row both ways: a conversation, or two packed. Differences are relative to the largest of the N passes' values.

    Attributes:
        conversations: their indices.
        passes, targets: how many the row has.
        tokens_n_pass, tokens_one_pass: tokens of the passes as separate sequences, and of the row without padding.
        seconds_n_pass, seconds_one_pass: of a single run each, without warming up: no benchmark.
        loss_n_pass: mean over targets.
        loss_one_pass: mean over targets, as the model itself returns it.
        loss_difference: largest difference of a single target's loss.
        gradient_difference: largest over all trainable parameters; None if not asked for.
    """

    conversations: tuple[int, ...]
    passes: int
    targets: int
    tokens_n_pass: int
    tokens_one_pass: int
    seconds_n_pass: float
    seconds_one_pass: float
    loss_n_pass: float
    loss_one_pass: float
    loss_difference: float
    gradient_difference: float | None


@dataclass(frozen=True)
class Report:
    """What `verify` found. True if every difference is within the tolerance. `str()` of it is a table.

    Attributes:
        comparisons: one per conversation, and one of the two smallest conversations packed into one row.
        dtype: the coarsest in the computation, which decides the tolerance.
        device: where both were run.
        reference: the library's attention that the N passes went through.
    """

    comparisons: list[Comparison]
    dtype: torch.dtype
    device: torch.device
    reference: str

    @property
    def loss_difference(self) -> float:
        return _largest(c.loss_difference for c in self.comparisons)

    @property
    def gradient_difference(self) -> float | None:
        if any(c.gradient_difference is None for c in self.comparisons):
            return None
        return _largest(c.gradient_difference for c in self.comparisons)

    def __bool__(self) -> bool:
        loss_tolerance, gradient_tolerance = TOLERANCE[self.dtype]
        # `<=` is False for NaN, so a comparison that is not a number fails.
        means_agree = all(
            abs(c.loss_one_pass - c.loss_n_pass) <= max(loss_tolerance, 1e-6) * abs(c.loss_n_pass)
            for c in self.comparisons
        )
        gradients_agree = self.gradient_difference is None or self.gradient_difference <= gradient_tolerance
        return means_agree and self.loss_difference <= loss_tolerance and gradients_agree

    def __str__(self) -> str:
        lines = [
            "conversation  passes  targets  tokens N-pass  one-pass  ratio   loss N-pass  one-pass"
            "   max loss diff  max grad diff  time N-pass / one-pass"
        ]
        for c in self.comparisons:
            gradient = "-" if c.gradient_difference is None else f"{c.gradient_difference:.1e}"
            lines.append(
                f"{' + '.join(map(str, c.conversations)):>12}"
                f"  {c.passes:>6}  {c.targets:>7}  {c.tokens_n_pass:>13}  {c.tokens_one_pass:>8}"
                f"  {c.tokens_n_pass / c.tokens_one_pass:>4.2f}x  {c.loss_n_pass:>12.6f}  {c.loss_one_pass:>8.6f}"
                f"  {c.loss_difference:>14.1e}  {gradient:>13}  {c.seconds_n_pass:.2f} s / {c.seconds_one_pass:.2f} s"
            )
        loss_tolerance, gradient_tolerance = TOLERANCE[self.dtype]
        verdict = "the same losses" if self else "DIFFERENT LOSSES"
        if self.dtype.itemsize == 2:
            verdict += (
                " (in 16 bits, where small faults do not show and experts may be routed differently; float32 tells)"
            )
        lines.append(
            f"{verdict}: one-pass against N-pass ({self.reference}, {str(self.dtype).removeprefix('torch.')} on "
            f"{self.device}), differences relative to the largest, tolerance {loss_tolerance:.0e} for losses, "
            f"{gradient_tolerance:.0e} for gradients; times are of one run each; a + b are two conversations in one row"
        )
        return "\n".join(lines)


def verify(
    model: PreTrainedModel,
    tokenizer,
    conversations: Sequence,
    *,
    gradients: bool = True,
    **template_options,
) -> Report:
    """Compare one-pass with N-pass losses and gradients.

    Args:
        model: a causal LM, on any device, loaded with any attention; also a PEFT model around one. It is run in eval
            mode (dropout would differ), outside autocast and without a router's load-balancing loss, and left as it was.
        tokenizer: its tokenizer.
        conversations: dicts with `messages` (and `tools`), or lists of messages.
        gradients: compare the gradients of all trainable parameters too, if there are any; this needs memory for three
            sets of them.
        **template_options: for `render_passes`.

    Raises:
        NotImplementedError: the architecture is not supported; the text names the reason.
        ConversationError: a conversation cannot be rendered.
        ValueError: no conversations; a dtype for which no tolerance is known.
    """
    if not conversations:
        raise ValueError("verify: got no conversations, expected at least one")
    inner = inner_model(model)
    check_config(inner.config)
    collator = OnePassCollator(tokenizer)
    # Weights change no loss of a token, and the model's own mean knows none.
    passes = [
        [replace(p, weight=1.0, token_weight=None) for p in render_conversation(c, tokenizer, **template_options)]
        for c in conversations
    ]
    trees = [TokenTree.from_passes(p) for p in passes]
    units = [(i,) for i in range(len(trees))]
    if len(trees) > 1:  # what packing does must be right too
        units.append(tuple(sorted(sorted(range(len(trees)), key=lambda i: len(trees[i]))[:2])))

    reference = "sdpa" if inner._supports_sdpa and not _has_softcap(inner.config) else "eager"
    device = next(model.parameters()).device
    gradients = gradients and any(p.requires_grad for p in model.parameters())
    comparisons = []
    with _as_found(model, inner), torch.autocast(device.type, enabled=False):
        for unit in units:
            tree = join([trees[i] for i in unit])
            inner.set_attn_implementation(NAME)
            start = time.perf_counter()
            one_pass, mean, logits_dtype = _one_pass_losses(model, collator.batch(tree), gradients)
            one_gradients = _take_gradients(model) if gradients else {}
            middle = time.perf_counter()
            inner.set_attn_implementation(reference)
            n_pass = [_plain_losses(model, p, gradients) for i in unit for p in passes[i]]
            n_gradients = _take_gradients(model) if gradients else {}
            end = time.perf_counter()

            expected = torch.cat(n_pass)
            comparisons.append(
                Comparison(
                    conversations=unit,
                    passes=tree.num_passes,
                    targets=tree.num_targets,
                    tokens_n_pass=int(tree.pass_lengths.sum()),
                    tokens_one_pass=len(tree),
                    seconds_n_pass=end - middle,
                    seconds_one_pass=middle - start,
                    loss_n_pass=expected.mean().item(),
                    loss_one_pass=mean,
                    loss_difference=_relative([(torch.cat(tree.per_pass(one_pass)), expected)]),
                    gradient_difference=_relative([(one_gradients[name], n_gradients[name]) for name in n_gradients])
                    if gradients
                    else None,
                )
            )
    return Report(comparisons, _coarsest_dtype(model, logits_dtype), device, reference)


def _one_pass_losses(model, batch: dict[str, Tensor], backward: bool) -> tuple[Tensor, float, torch.dtype]:
    """Losses of the targets, (M,); their mean, that of the model itself if no target is of several conversations; the dtype of
    its logits."""
    batch = {name: tensor.to(next(model.parameters()).device) for name, tensor in batch.items()}
    weight = batch.pop("target_weight", None)
    with torch.set_grad_enabled(backward):
        output = model(**batch, use_cache=False)
        losses = cross_entropy(_wide(output.logits[0]), batch["shift_labels"][0], reduction="none")
        weighted = losses if weight is None else losses * weight[0]
        if backward:
            weighted.sum().backward()
    mean = output.loss if weight is None else weighted.sum() / weight.sum()
    return losses.detach(), mean.item(), output.logits.dtype


def _plain_losses(model, p: Pass, backward: bool) -> Tensor:
    """Losses of the supervised tokens of one pass, run as a sequence of its own."""
    ids = torch.from_numpy(np.asarray(p.input_ids))[None].to(next(model.parameters()).device)
    supervised = torch.from_numpy(np.flatnonzero(p.loss_mask)).to(ids.device)
    with torch.set_grad_enabled(backward):
        logits = model(input_ids=ids, use_cache=False).logits[0, :-1]
        losses = cross_entropy(_wide(logits), ids[0, 1:], reduction="none")[supervised - 1]
        if backward:
            losses.sum().backward()
    return losses.detach()


@contextmanager
def _as_found(model, inner):
    """Eval mode, no gradients and no router loss inside; everything as it was afterwards."""
    attention, with_router = inner.config._attn_implementation, with_router_loss(inner.config)
    training = {module: module.training for module in model.modules()}
    kept = {name: p.grad for name, p in model.named_parameters()}
    model.eval()
    model.zero_grad(set_to_none=True)
    for config in with_router:
        config.output_router_logits = False
    try:
        yield
    finally:
        for config in with_router:
            config.output_router_logits = True
        inner.set_attn_implementation(attention)
        for module, mode in training.items():
            module.training = mode
        for name, p in model.named_parameters():
            p.grad = kept[name]


def _take_gradients(model) -> dict[str, Tensor]:
    taken = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return taken


def _coarsest_dtype(model, logits_dtype: torch.dtype) -> torch.dtype:
    dtypes = {logits_dtype} | {p.dtype for p in model.parameters() if p.is_floating_point()}
    if getattr(inner_model(model), "is_quantized", False):
        # bitsandbytes computes 4 bits in a dtype of its own. With 8 bits, as with most others, activations are rounded: by
        # steps that a difference in float32 can cross, so that they are no finer than 16 bits.
        of_layers = {
            m.compute_dtype for m in model.modules() if isinstance(getattr(m, "compute_dtype", None), torch.dtype)
        }
        dtypes |= of_layers or {torch.float16}
    coarsest = max(dtypes, key=lambda dtype: torch.finfo(dtype).eps)
    if coarsest not in TOLERANCE:
        raise ValueError(f"the model has {coarsest} weights, and no tolerance is known but for {list(TOLERANCE)}")
    return coarsest


def _relative(pairs: Iterable[tuple[Tensor, Tensor]]) -> float:
    """Largest difference over all pairs (found, expected), relative to the largest expected value of all."""
    pairs = list(pairs)
    difference = _largest((found - expected).abs().max().item() for found, expected in pairs)
    return difference / _largest(expected.abs().max().item() for _, expected in pairs)


def _largest(values: Iterable[float]) -> float:
    """max() that does not lose a NaN."""
    return float(np.max(list(values)))


def _wide(logits: Tensor) -> Tensor:
    return logits if logits.dtype == torch.float64 else logits.float()


def _has_softcap(config) -> bool:
    return getattr(config.get_text_config(), "attn_logit_softcapping", None) is not None

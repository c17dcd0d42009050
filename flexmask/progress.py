"""What a training has gone through: tokens of rows and of the passes they stand for, time, memory, accuracy."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor
from transformers import PreTrainedConfig

from .collator import OnePassCollator
from .tree import TokenTree

COUNTS = "counts"  # the key of a batch under which they are, until the model is called
_GIB = 2**30


def count(row: TokenTree, length: int) -> Tensor:
    """int64 (5,): tokens of a row, places of its batch, tokens of its passes; visible pairs of the row, and of the passes."""
    return torch.tensor([len(row), length, int(row.pass_lengths.sum()), row.visible_pairs, row.pass_pairs])


class Counting:
    """A collator that counts what it makes, in the batch, because it may run in a process of its own."""

    def __init__(self, collator: OnePassCollator):
        self.collator = collator

    @staticmethod
    def knows(collator) -> bool:
        """Whether a collator's calls are `row` and `batch`, one after the other."""
        return isinstance(collator, OnePassCollator) and type(collator).__call__ is OnePassCollator.__call__

    def __call__(self, examples: Sequence) -> dict[str, Tensor]:
        row = self.collator.row(examples)
        batch = self.collator.batch(row)
        return batch | {COUNTS: count(row, batch["input_ids"].shape[1])[None]}


class Progress:
    """Sums since the last log, and of the whole training."""

    def __init__(self, config: PreTrainedConfig):
        self.config = config
        self.start()

    def start(self) -> None:
        """Of a training: what was done before does not count."""
        self._total = torch.zeros(5, dtype=torch.int64)
        self._seconds = 0.0
        self._restart()

    def _restart(self) -> None:
        self._counts: Tensor | int = 0
        self._hits: Tensor | int = 0
        self._targets, self._paused, self._since = 0, 0.0, time.perf_counter()

    def see(self, batch: dict) -> None:
        """Take the counts out of a batch."""
        counts = batch.pop(COUNTS, None)
        if counts is not None:
            self._counts = counts[0] + self._counts

    def observe(self, logits: Tensor, targets: Tensor) -> None:
        """Logits (n, vocabulary) of some targets (n,), see `tree_loss`."""
        self._hits = (logits.argmax(-1) == targets).sum() + self._hits
        self._targets += len(targets)

    @contextmanager
    def paused(self):
        """What happens inside takes no time of the training."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self._paused += time.perf_counter() - start

    def log(self, device: torch.device, add_up: Callable[[Tensor], Tensor], ranks_of_a_row: int) -> dict[str, float]:
        """Since the last log, of all ranks.

        Args:
            add_up: int64 (7,) -> the sum over ranks.
            ranks_of_a_row: how many have counted the same row.
        """
        own = torch.zeros(7, dtype=torch.int64, device=device)
        own[:5] += torch.as_tensor(self._counts, device=device)
        own[5] += self._hits
        own[6] += self._targets
        sums = add_up(own).cpu()
        sums[:5] //= ranks_of_a_row
        seconds = max(time.perf_counter() - self._since - self._paused, 1e-9)
        self._restart()
        self._total += sums[:5]
        self._seconds += seconds
        found = _shares(sums[:5])
        if found:
            tokens, _, pass_tokens = sums[:3].tolist()
            found |= {"tokens_per_second": tokens / seconds, "pass_tokens_per_second": pass_tokens / seconds}
        found["peak_memory_gib"] = _peak_bytes(device) / _GIB
        if sums[6]:
            found["mean_token_accuracy"] = float(sums[5] / sums[6])
        return {name: float(f"{value:.4g}") for name, value in found.items()}

    def __str__(self) -> str:
        """What was saved against N passes."""
        shares = _shares(self._total)
        if not shares:
            return "nothing was counted: the collator is not flexmask's"
        tokens, _, pass_tokens, pairs, pass_pairs = self._total.tolist()
        saved = flops(self.config, pass_tokens, pass_pairs) / flops(self.config, tokens, pairs)
        return (
            f"trained {pass_tokens:,} tokens of passes as {tokens:,} tokens of rows: {shares['sharing_ratio']:.2f} times fewer, "
            f"and by counting {saved:.2f} times fewer FLOPs in layers; {shares['padding']:.1%} of the places were padding; "
            f"{tokens / self._seconds:,.0f} tokens of rows a second, {pass_tokens / self._seconds:,.0f} of passes"
        )


def flops(config: PreTrainedConfig, tokens, pairs):
    """What layers take, forward and backward, of so many tokens and visible pairs (numbers, or arrays): in a layer of a common
    shape 24·hidden² FLOPs for a token (Kaplan et al., arXiv 2001.08361, table 1), 4·heads·head_dim for a pair; a backward twice
    and 2.5 times that."""
    text = config.get_text_config(decoder=True)
    hidden, heads = text.hidden_size, getattr(text, "num_attention_heads", 0) or 0
    width = heads * (getattr(text, "head_dim", None) or hidden // max(heads, 1))
    return 3 * 24.0 * hidden**2 * tokens + 3.5 * 4.0 * width * pairs


def _shares(counts: Tensor) -> dict[str, float]:
    tokens, places, pass_tokens = counts[:3].tolist()
    if not tokens:
        return {}
    return {"sharing_ratio": pass_tokens / tokens, "padding": 1 - tokens / places}


def _peak_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        import resource
    except ImportError:  # Windows
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024

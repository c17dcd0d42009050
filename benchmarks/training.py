"""Training steps of models with random weights: their time, peak memory and FLOPs, by the methods of `methods.py`."""

from __future__ import annotations

import functools
import gc
import json
import sys
from collections.abc import Callable, Collection, Iterator, Sequence

import numpy as np
import torch
from common import (
    DEVICE,
    DTYPE,
    GIVE_BACK,
    KEEP,
    Benchmark,
    attempt,
    bars,
    conversation,
    drawn,
    elapsed,
    in_own_process,
    in_turns,
    peak_memory,
    spread,
)
from methods import GROUP_METHODS, MEMORY_METHODS, METHODS, flat, in_parts
from transformers import AutoModelForCausalLM, BambaConfig, Lfm2Config, LlamaConfig, Qwen3_5TextConfig, Qwen3Config

import flexmask.attention
from flexmask import Pass, backward_by_branches, share_prefixes, tree_loss
from flexmask.attention import using_backend

# The shapes of models people fine-tune; weights are random. The number of layers can be lowered for a small machine.
SHAPES = {
    "tiny": functools.partial(
        LlamaConfig, vocab_size=512, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=16,
    ),
    "SmolLM2-135M": functools.partial(
        LlamaConfig, vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30,
        num_attention_heads=9, num_key_value_heads=3, tie_word_embeddings=True,
    ),
    "SmolLM2-135M, 4,096 tokens": functools.partial(  # of vocabulary: what is not a layer is next to nothing
        LlamaConfig, vocab_size=4096, hidden_size=576, intermediate_size=1536, num_hidden_layers=30,
        num_attention_heads=9, num_key_value_heads=3, tie_word_embeddings=True,
    ),
    "Qwen3-0.6B": functools.partial(
        Qwen3Config, vocab_size=151936, hidden_size=1024, intermediate_size=3072, num_hidden_layers=28,
        num_attention_heads=16, num_key_value_heads=8, head_dim=128, tie_word_embeddings=True,
    ),
    "Qwen3-1.7B": functools.partial(
        Qwen3Config, vocab_size=151936, hidden_size=2048, intermediate_size=6144, num_hidden_layers=28,
        num_attention_heads=16, num_key_value_heads=8, head_dim=128, tie_word_embeddings=True,
    ),
    "Qwen3.5-0.8B": functools.partial(
        Qwen3_5TextConfig, vocab_size=248320, hidden_size=1024, intermediate_size=3584, num_hidden_layers=24,
        num_attention_heads=8, num_key_value_heads=2, head_dim=256, linear_num_key_heads=16, linear_num_value_heads=16,
        linear_key_head_dim=128, linear_value_head_dim=128, tie_word_embeddings=True,
    ),
    "tiny Qwen3.5": functools.partial(
        Qwen3_5TextConfig, vocab_size=2048, hidden_size=256, intermediate_size=768, num_hidden_layers=4,
        num_attention_heads=4, num_key_value_heads=2, head_dim=64, linear_num_key_heads=4, linear_num_value_heads=8,
        linear_key_head_dim=64, linear_value_head_dim=64,
    ),
    "tiny Bamba": functools.partial(
        BambaConfig, vocab_size=2048, hidden_size=256, intermediate_size=768, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, attn_layer_indices=[3], mamba_n_heads=8, mamba_d_head=64, mamba_d_state=64, mamba_n_groups=1,
        mamba_expand=2, mamba_chunk_size=128,
    ),
    "tiny LFM2": functools.partial(
        Lfm2Config, vocab_size=2048, hidden_size=256, intermediate_size=768, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, layer_types=["conv"] * 3 + ["full_attention"], block_auto_adjust_ff_dim=False,
    ),
}  # fmt: skip
# The output layer, which has as much to do in every method, is most of what four layers of such a model take.
SHAPES["Qwen3.5-0.8B, 4,096 tokens"] = functools.partial(SHAPES["Qwen3.5-0.8B"], vocab_size=4096)


def build(shape: str, layers: int | None = None, *, vocabulary: int | None = None, checkpointing: bool = False):
    """A model with random weights; bfloat16 on a GPU, gradients and optimiser too."""
    changed = {"num_hidden_layers": layers, "vocab_size": vocabulary}
    config = SHAPES[shape](max_position_embeddings=65536, **{name: n for name, n in changed.items() if n})
    torch.manual_seed(0)
    with torch.device(DEVICE):
        model = AutoModelForCausalLM.from_config(config, attn_implementation="flexmask", dtype=DTYPE)
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    return model.train()


class TrainingStep:
    """A model, its optimiser, and batches on the device; a call is a step: forward, backward, optimiser.

    Args:
        spec: shape, layers, checkpointing, backend; conversations (how many), turns (fewest, most), lengths (h, t, r), or
            conversations, completions, lengths (prompt, completion); method (of METHODS, GROUP_METHODS, MEMORY_METHODS) or parts;
            max_tokens of a row or batch.

    Attributes:
        tokens: of all passes.
        losses: of the steps so far.
    """

    def __init__(self, spec: dict):
        self._backend = spec.get("backend", flexmask.attention._override)
        rng = np.random.default_rng(0)
        vocab = SHAPES[spec["shape"]]().vocab_size
        conversations = [_conversation(rng, spec, vocab) for _ in range(spec["conversations"])]
        if spec.get("parts"):
            self.work = in_parts(conversations, vocab, spec["parts"])
        else:
            self.work = (METHODS | GROUP_METHODS | MEMORY_METHODS)[spec["method"]](
                conversations, vocab, spec["max_tokens"]
            )
        passes = flat(conversations)
        self.tokens = sum(len(p.input_ids) for p in passes)
        self._targets = sum(int(np.sum(p.loss_mask)) for p in passes)
        self._batches = [{name: x.to(DEVICE) for name, x in batch.items()} for batch in self.work.batches]
        self.model = build(spec["shape"], spec.get("layers"), checkpointing=spec.get("checkpointing", False))
        self.model.set_attn_implementation(self.work.attention)
        if self.work.attention == "flexmask":
            share_prefixes(self.model)  # which leaves batches of trees alone
        self._optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-5)
        self._run = []  # what goes through the model, whatever the batch looks like
        self.model.get_input_embeddings().register_forward_hook(lambda _, args, out: self._run.append(args[0].numel()))
        self.losses: list[float] = []

    def __call__(self) -> None:
        self.backward()
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)

    def backward(self) -> None:
        """Gradients of the mean over all targets, and its value at the end of `losses`."""
        losses = []
        for batch in self._batches:
            # A copy, because lists of tiles are kept for a tensor, and in training every batch is a new one.
            batch = {name: x.clone() for name, x in batch.items()}
            with using_backend(self._backend):
                if self.work.tokens_in_memory is not None:
                    budget = self.work.tokens_in_memory
                    losses.append(backward_by_branches(self.model, batch, self._targets, tokens_in_memory=budget))
                    continue
                losses.append(_loss(self.model, batch, self._targets))
                losses[-1].backward()
        self.losses.append(sum(loss.detach() for loss in losses).item())

    def later_step(self) -> None:
        """A step that begins with the optimiser's states, as every one but the first does."""
        for weights in self.model.parameters():
            weights.grad = torch.zeros_like(weights)
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        self()

    def found(self) -> dict:
        """What is known without a clock, after a step."""
        return {
            "tokens": self.tokens,
            "tokens run": sum(self._run) // len(self.losses),
            "batches": len(self._batches),
            "loss": self.losses[0],
            "TFLOP": sum(cost.flops for cost in self.work.costs(self.model.config)) / 1e12,
        }


def measure_steps(specs: Sequence[dict]) -> Iterator[dict]:
    """What the step of each specification takes: step (seconds), tokens (of the passes), tokens run (padding included),
    tokens/s (of the passes), batches, peak MiB beyond the weights (gradients and optimiser included), loss, TFLOP counted; or
    error.

    On a GPU one after the other. On a CPU memory is measured in processes of their own, and times in one process, where the
    steps take turns: what slows the machine down for a while slows all of them.
    """
    if DEVICE == "cuda":
        for spec in specs:
            yield attempt(lambda spec=spec: _on_the_gpu(spec))
        return
    peaks = [attempt(lambda spec=spec: _ask("memory", [spec])[0]) for spec in specs]
    times = attempt(lambda: {"each": _ask("times", specs)})
    yield from (peak | time for peak, time in zip(peaks, times.get("each", [times] * len(specs)), strict=True))


def against_first(bench: Benchmark, methods: Collection[str], ratios: Callable[[dict, dict], dict]) -> None:
    """A row for every method of every group of the settings, with its `ratios(first, found)` to the group's first method. If
    that fails, the group has no others."""
    settings, bench.more["methods"] = vars(bench.settings), list(methods)
    for group, what in settings["groups"].items():
        first = None
        for method, found in zip(methods, measure_steps([{**settings, **what, "method": m} for m in methods])):
            first = first or found
            if "error" not in found:
                found |= ratios(first, found)
            bench.add(group=group, method=method, **found)
            if "error" in first:
                break


def draw_speed_and_memory(rows: list[dict], ratio: str, label: str, speed, memory) -> None:
    """Bars of a ratio of times, with the prediction as a mark; and of peak memory."""
    bars(speed, rows, "group", "method", ratio, mark="predicted")
    bars(memory, rows, "group", "method", "peak MiB")
    speed.set(ylabel=f"{label} (line: predicted)", title="training step")
    memory.set(ylabel="MiB beyond the weights", title="peak memory")
    speed.legend(fontsize=7)


def _ask(what: str, specs: Sequence[dict]) -> list[dict]:
    """`_memory` or `_times` of them; of models that take more than a moment in a process of its own."""
    if specs[0]["shape"] == "tiny":
        return _ANSWERS[what](specs)
    return in_own_process(__file__, what, json.dumps(specs), **(GIVE_BACK if what == "memory" else KEEP))


def _on_the_gpu(spec: dict) -> dict:
    gc.collect()  # a model that shares prefixes refers to itself
    step = TrainingStep(spec)
    peak = peak_memory(step.later_step)
    return {"peak MiB": peak / 2**20} | _timed(step, [elapsed(step) for _ in range(spec["repeats"])])


def _memory(specs: Sequence[dict]) -> list[dict]:
    return [{"peak MiB": peak_memory(TrainingStep(spec).later_step) / 2**20} for spec in specs]


def _times(specs: Sequence[dict]) -> list[dict]:
    found = [attempt(lambda spec=spec: {"step": _warmed_up(spec)}) for spec in specs]
    steps = [of["step"] for of in found if "error" not in of]
    seconds = dict(zip(steps, in_turns(steps, specs[0]["repeats"])))
    return [of if "error" in of else _timed(of["step"], seconds[of["step"]]) for of in found]


def _warmed_up(spec: dict) -> TrainingStep:
    step = TrainingStep(spec)
    step()
    return step


def _timed(step: TrainingStep, seconds: list[float]) -> dict:
    found = step.found() | {"step": spread(seconds)}
    return found | {"tokens/s": found["tokens"] / found["step"]["median"]}


_ANSWERS = {"memory": _memory, "times": _times}


def _conversation(rng: np.random.Generator, spec: dict, vocab: int) -> list[Pass]:
    """Passes of random tokens: of a conversation, or of several completions of one prompt."""
    if "turns" in spec:
        fewest, most = spec["turns"]
        turns = int(rng.integers(fewest, most + 1))
        return conversation(rng, turns, *spec["lengths"], vocab, fixed=spec.get("fixed", False))
    prompt, *completions = (
        rng.integers(0, vocab, drawn(rng, mean))
        for mean in [spec["lengths"][0]] + [spec["lengths"][1]] * spec["completions"]
    )
    sequences = [np.concatenate([prompt, completion]) for completion in completions]
    return [Pass(ids, np.arange(len(ids)) >= len(prompt)) for ids in sequences]


def _loss(model, batch: dict, targets: int) -> torch.Tensor:
    """The sum over targets, divided by the number of all of them. Trees and packed passes as `flexmask train` does it, never
    with all logits; everything else through the library's own loss."""
    if "subtree_end" in batch or "pass_lengths" in batch:
        return tree_loss(model, batch, targets)
    return model(**batch, use_cache=False, num_items_in_batch=targets).loss


if __name__ == "__main__":
    print(json.dumps(_ANSWERS[sys.argv[1]](json.loads(sys.argv[2]))))

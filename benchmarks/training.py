"""Models and training steps that the benchmarks share: one-pass, and what a user would do instead."""

from __future__ import annotations

import gc
import json
import sys
from collections.abc import Callable, Iterable, Sequence

import numpy as np
import torch
from common import DEVICE, GIVE_BACK, Benchmark, Vocabulary, bars, conversation, in_own_process, measure, peak_memory
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface, AutoModelForCausalLM, LlamaConfig, Qwen3Config

import flexmask
from flexmask import OnePassCollator, Pass, TokenTree, cost, pack, share_prefixes, split, tree_loss
from flexmask.cost import Cost
from flexmask.mask import BLOCK_SIZE, count_tiles

# The shapes of models people fine-tune; weights are random. `layers` can be lowered for a small machine.
SHAPES = {
    "tiny": lambda: LlamaConfig(
        vocab_size=512, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=16,
    ),
    "SmolLM2-135M": lambda: LlamaConfig(
        vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9,
        num_key_value_heads=3, tie_word_embeddings=True,
    ),
    "Qwen3-0.6B": lambda: Qwen3Config(
        vocab_size=151936, hidden_size=1024, intermediate_size=3072, num_hidden_layers=28, num_attention_heads=16,
        num_key_value_heads=8, head_dim=128, tie_word_embeddings=True,
    ),
    "Qwen3-1.7B": lambda: Qwen3Config(
        vocab_size=151936, hidden_size=2048, intermediate_size=6144, num_hidden_layers=28, num_attention_heads=16,
        num_key_value_heads=8, head_dim=128, tie_word_embeddings=True,
    ),
}  # fmt: skip


def build(shape: str, layers: int | None = None, *, vocabulary: int | None = None, checkpointing: bool = False):
    """A model with random weights: float32 on a CPU, bfloat16 (gradients and optimiser too) on a GPU."""
    config = SHAPES[shape]()
    config.max_position_embeddings = 65536
    config.num_hidden_layers = layers or config.num_hidden_layers
    config.vocab_size = vocabulary or config.vocab_size
    torch.manual_seed(0)
    dtype = torch.bfloat16 if DEVICE == "cuda" else torch.float32
    model = AutoModelForCausalLM.from_config(config, attn_implementation="flexmask", dtype=dtype).to(DEVICE)
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    return model.train()


# Each method: (conversations, vocabulary, max_tokens) -> (attention, batches, FLOPs of a step by the model's configuration).


def one_pass(conversations: Sequence[Sequence[Pass]], vocab: int, max_tokens: int):
    """Trees packed into rows."""
    rows = pack([TokenTree.from_passes(passes) for passes in conversations], max_tokens)
    return "flexmask", _batches(rows, vocab), _counted(rows)


def in_parts(conversations, vocab: int, parts: int):
    """One-pass with every conversation split into so many parts, each a batch of its own."""
    trees = []
    for passes in conversations:
        tree = TokenTree.from_passes(passes)
        low, high = tree.max_length, len(tree)
        while low < high:  # the fewest tokens that do with so many parts
            middle = (low + high) // 2
            low, high = (low, middle) if len(split(tree, middle)) <= parts else (middle + 1, high)
        trees += split(tree, low)
    return "flexmask", _batches(trees, vocab), _counted(trees)


def sequences(conversations, vocab, max_tokens):
    """N-pass, one sequence at a time, labels of -100 where nothing is trained: what most scripts do."""
    passes = _passes(conversations)
    return "sdpa", [labelled([p]) for p in passes], _counted(_alone(passes), all_logits=True)


def sequences_targets(conversations, vocab, max_tokens):
    """The same, with logits where there is a target, all of them at once, as the library's loss has them."""
    passes = _passes(conversations)
    return "sdpa", [_targets_only(p) for p in passes], _counted(_alone(passes), keeps_logits=True)


def padded(conversations, vocab, max_tokens):
    """N-pass, batches of passes of like lengths, padded on the right, of at most max_tokens."""
    batches, batch = [], []
    for p in sorted(_passes(conversations), key=lambda p: len(p.input_ids)):
        if batch and (len(batch) + 1) * len(p.input_ids) > max_tokens:
            batches.append(batch)
            batch = []
        batch.append(p)
    batches.append(batch)
    longest = [batch[-1] for batch in batches for _ in batch]
    return "sdpa", [labelled(batch) for batch in batches], _counted(_alone(longest), all_logits=True, dense=True)


def packed(conversations, vocab, max_tokens):
    """N-pass, passes packed into rows in which no pass sees another, with our attention (a tree without forks is a document
    mask), which skips the tiles between documents, and our loss: the only thing not shared is the history."""
    rows = pack(_alone(_passes(conversations)), max_tokens)
    return "flexmask", _batches(rows, vocab), _counted(rows)


def interleaved(conversations, vocab, max_tokens):
    """The published one-pass method: turn by turn in one sequence, with a dense mask handed to SDPA. (Targets are those of
    the tree; the published label shift gets one of each turn wrong.)"""
    trees = [TokenTree.from_passes(passes) for passes in conversations]
    return "dense-mask", [_turn_by_turn(tree) for tree in trees], _counted(trees, keeps_logits=True, dense=True)


def aligned(conversations, vocab, max_tokens):
    """One padded batch: prompts padded on the left, completions on the right, logits at completions, as TRL's GRPO has it."""
    passes = _passes(conversations)
    longest = [_longest(passes)] * len(passes)
    return "sdpa", [_aligned(passes)], _counted(_alone(longest), keeps_logits=True, dense=True)


def shared(conversations, vocab, max_tokens):
    """The same batch, and `flexmask.share_prefixes`."""
    passes = _passes(conversations)
    logits = len(passes) * int(np.sum(_longest(passes).loss_mask))
    return "flexmask", [_aligned(passes)], _counted([TokenTree.from_passes(passes)], keeps_logits=True, logits=logits)


def _longest(passes: Sequence[Pass]) -> Pass:
    """A pass of the longest prompt and the longest completion."""
    prompt, completion = (max(map(len, parts)) for parts in zip(*map(_prompt_and_completion, passes)))
    return Pass(np.arange(prompt + completion), np.arange(prompt + completion) >= prompt)


METHODS: dict[str, Callable] = {
    "one-pass": one_pass,
    "N-pass, sequences": sequences,
    "N-pass, sequences, logits at targets": sequences_targets,
    "N-pass, padded batches": padded,
    "N-pass, packed": packed,
    "published one-pass": interleaved,
}
GROUP_METHODS = {"padded batch": aligned, "padded batch, share_prefixes": shared, "trees": one_pass}


def run(spec: dict) -> dict:
    """Measure the training step that a specification describes; on a CPU time and memory in processes of their own, and
    memory where it is given back at once.

    Args:
        spec: shape, layers, checkpointing; conversations (how many), turns (fewest, most), lengths (h, t, r), or
            conversations, completions, lengths (prompt, completion); method (of METHODS, GROUP_METHODS) or parts;
            max_tokens of a row or batch; repeats.

    Returns:
        step (seconds), tokens (of the passes), tokens/s (of these), tokens run (padding included), batches, peak MiB
        of two steps beyond the weights (gradients and optimiser included), loss, TFLOP counted.
    """
    if DEVICE == "cuda" or spec["shape"] == "tiny":
        return _measure(spec, "time and memory")
    return in_own_process(__file__, "memory", json.dumps(spec), **GIVE_BACK) | in_own_process(
        __file__, "time", json.dumps(spec)
    )


def against_first(bench: Benchmark, methods: Iterable[str], ratios: Callable[[dict, dict], dict]) -> None:
    """A row for every method of every group of the settings, with its `ratios(first, found)` to the group's first method. If
    that fails, the group has no others."""
    settings = vars(bench.settings)
    for group, what in settings["groups"].items():
        first = None
        for method in methods:

            def compared() -> dict:
                found = run({**settings, **what, "method": method})
                return found | ratios(first or found, found)

            found = bench.attempt(compared, group=group, method=method)
            first = first or found
            if first is None:
                break


def draw_speed_and_memory(rows: list[dict], ratio: str, label: str, speed, memory) -> None:
    """Bars of a ratio of times, with the prediction as a mark; and of peak memory."""
    bars(speed, rows, "group", "method", ratio, mark="predicted")
    bars(memory, rows, "group", "method", "peak MiB")
    speed.set(ylabel=f"{label} (line: predicted)", title="training step")
    memory.set(ylabel="MiB beyond the weights", title="peak memory")
    speed.legend(fontsize=7)


def _measure(spec: dict, what: str) -> dict:
    gc.collect()  # a model that shares prefixes refers to itself
    if DEVICE == "cuda":
        torch.cuda.empty_cache()
    flexmask.set_backend(spec.get("backend", "auto"))
    rng = np.random.default_rng(0)
    config = SHAPES[spec["shape"]]()
    conversations = [_conversation(rng, spec, config.vocab_size) for _ in range(spec["conversations"])]
    if spec.get("parts"):
        attention, batches, flops = in_parts(conversations, config.vocab_size, spec["parts"])
    else:
        method = (METHODS | GROUP_METHODS)[spec["method"]]
        attention, batches, flops = method(conversations, config.vocab_size, spec["max_tokens"])
    model = build(spec["shape"], spec.get("layers"), checkpointing=spec.get("checkpointing", False))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)
    model.set_attn_implementation(attention)
    if attention == "flexmask":
        share_prefixes(model)  # which leaves batches of trees alone
    passes = _passes(conversations)
    targets = sum(int(np.sum(p.loss_mask)) for p in passes)
    batches = [{name: x.to(DEVICE) for name, x in batch.items()} for batch in batches]
    run_tokens = []  # what goes through the model, whatever the batch looks like
    model.get_input_embeddings().register_forward_hook(lambda _, args, out: run_tokens.append(args[0].numel()))
    losses = []

    def step() -> None:
        total = 0.0
        for batch in batches:
            loss = _loss(model, batch, targets)
            loss.backward()
            total += loss.item()
        losses.append(total)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    def two_steps() -> None:
        step()
        step()  # the first that begins with the optimiser's states

    tokens = sum(len(p.input_ids) for p in passes)
    found = {"tokens": tokens, "batches": len(batches)}
    if "memory" in what:
        found["peak MiB"] = peak_memory(two_steps) / 2**20
    if "time" in what:
        found["step"] = measure(step, spec["repeats"], warmup="memory" not in what)
        found["tokens/s"] = tokens / found["step"]["median"]
    return found | {
        "tokens run": sum(run_tokens) // len(losses),
        "loss": losses[0],
        "TFLOP": flops(model.config) / 1e12,
    }


def _conversation(rng: np.random.Generator, spec: dict, vocab: int) -> list[Pass]:
    """Passes of random tokens: of a conversation, or of several completions of one prompt."""
    if "turns" in spec:
        fewest, most = spec["turns"]
        turns = int(rng.integers(fewest, most + 1))
        return conversation(rng, turns, *spec["lengths"], vocab, fixed=spec.get("fixed", False))
    prompt, *completions = (
        rng.integers(0, vocab, rng.integers(n // 2, n * 3 // 2 + 1))
        for n in [spec["lengths"][0]] + [spec["lengths"][1]] * spec["completions"]
    )
    sequences = [np.concatenate([prompt, completion]) for completion in completions]
    return [Pass(ids, np.arange(len(ids)) >= len(prompt)) for ids in sequences]


def _counted(trees: Sequence[TokenTree], **how) -> Callable:
    """FLOPs of a step on all of them, by the model's configuration."""
    return lambda config: sum(_flops(tree, config, **how) for tree in trees)


def _flops(
    tree: TokenTree,
    config,
    *,
    all_logits: bool = False,
    keeps_logits: bool = False,
    dense: bool = False,
    logits: int | None = None,
) -> float:
    """As `flexmask.cost` counts them for the tree, but for what a method does otherwise.

    Args:
        all_logits: logits of every token.
        keeps_logits: the library's loss, which never computes logits twice.
        dense: no tile is skipped.
        logits: how many places have logits, if not the targets.
    """
    found = cost(tree, config)
    counted: Cost = found.n_pass_all_logits if all_logits else found.one_pass
    attention, loss = found.one_pass.attention_flops, counted.loss_flops
    if keeps_logits:
        loss = 6 * config.hidden_size * config.vocab_size * (counted.logits if logits is None else logits)
    if dense:
        blocks = -(-len(tree) // BLOCK_SIZE)
        attention *= blocks**2 / sum(count_tiles(torch.from_numpy(tree.subtree_end)[None]))
    return found.one_pass.linear_flops + attention + loss


def _loss(model, batch: dict, targets: int) -> torch.Tensor:
    """The sum over targets, divided by the number of all of them. Trees as `flexmask train` does it, never with all logits;
    everything else through the library's own loss."""
    if "subtree_end" in batch:
        return tree_loss(model, batch, targets)
    return model(**batch, use_cache=False, num_items_in_batch=targets).loss


def _alone(passes: Sequence[Pass]) -> list[TokenTree]:
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


def _passes(conversations: Sequence[Sequence[Pass]]) -> list[Pass]:
    return [p for passes in conversations for p in passes]


def _batches(rows: Sequence[TokenTree], vocab: int) -> list[dict[str, torch.Tensor]]:
    collator = OnePassCollator(Vocabulary(vocab))
    return [collator([row]) for row in rows]


def _targets_only(p: Pass) -> dict[str, torch.Tensor]:
    ids = torch.from_numpy(np.asarray(p.input_ids))
    trained = torch.from_numpy(np.flatnonzero(p.loss_mask))
    labels = ids[trained][None]
    return {"input_ids": ids[None], "logits_to_keep": trained - 1, "labels": labels, "shift_labels": labels}


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
    # Added to the scores, in their dtype: what SDPA would otherwise make of a mask of bools in every layer.
    mask = torch.zeros(visible.shape, dtype=torch.bfloat16 if DEVICE == "cuda" else torch.float32)
    labels = torch.from_numpy(tree.target_ids)[None]
    return {
        "input_ids": torch.from_numpy(np.pad(tree.input_ids[order], (0, padding)))[None],
        "position_ids": torch.from_numpy(np.pad(tree.position_ids[order], (0, padding)))[None],
        "dense_mask": mask.masked_fill_(torch.from_numpy(~visible), float("-inf"))[None, None],
        "logits_to_keep": torch.from_numpy(place[tree.target_index]),
        "labels": labels,
        "shift_labels": labels,
    }


def _dense_attention(module, query, key, value, attention_mask, *, dense_mask, scaling=None, **kwargs):
    """SDPA with the dense mask (a keyword of the model's call, which reaches every layer), keys and values repeated, as
    transformers does where there is a mask."""
    repeat = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(repeat, 1), value.repeat_interleave(repeat, 1)
    out = scaled_dot_product_attention(query, key, value, attn_mask=dense_mask, scale=scaling)
    return out.transpose(1, 2).contiguous(), None


AttentionInterface.register("dense-mask", _dense_attention)
AttentionMaskInterface.register("dense-mask", lambda **_: None)

if __name__ == "__main__":
    print(json.dumps(_measure(json.loads(sys.argv[2]), what=sys.argv[1])))

"""Models and training steps that the benchmarks share: one-pass, and what a user would do instead."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Callable, Sequence

import numpy as np
import torch
from common import DEVICE, Vocabulary, conversation, in_own_process, measure, peak_memory
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface, AutoModelForCausalLM, LlamaConfig, Qwen3Config

from flexmask import OnePassCollator, Pass, TokenTree, cost, pack, share_prefixes, split, tree_loss
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


def build(shape: str, layers: int | None = None, *, checkpointing: bool = False, seed: int = 0):
    """A model with random weights: float32 on a CPU, bfloat16 on a GPU, as autocast would run it."""
    config = SHAPES[shape]()
    config.max_position_embeddings = 65536
    config.num_hidden_layers = layers or config.num_hidden_layers
    torch.manual_seed(seed)
    dtype = torch.bfloat16 if DEVICE == "cuda" else torch.float32
    model = AutoModelForCausalLM.from_config(config, attn_implementation="flexmask", dtype=dtype).to(DEVICE)
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    return model.train()


# Each method: (conversations, vocabulary, max_tokens) -> (attention, batches, FLOPs of a step by the model's configuration).


def one_pass(conversations: Sequence[Sequence[Pass]], vocab: int, max_tokens: int):
    """Trees packed into rows."""
    rows = pack([TokenTree.from_passes(passes) for passes in conversations], max_tokens)
    return "flexmask", _batches(rows, vocab), _flops(rows)


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
    return "flexmask", _batches(trees, vocab), _flops(trees)


def sequences(conversations, vocab, max_tokens):
    """N-pass, one sequence at a time, labels of -100 where nothing is trained: what most scripts do."""
    passes = _passes(conversations)
    return "sdpa", [labelled([p]) for p in passes], _flops(_alone(passes), "n_pass_all_logits")


def sequences_targets(conversations, vocab, max_tokens):
    """The same, with logits where there is a target, as one-pass has them."""
    passes = _passes(conversations)
    return "sdpa", [_targets_only(p) for p in passes], _flops(_alone(passes), "n_pass")


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
    return "sdpa", [labelled(batch) for batch in batches], _flops(_alone(longest), "n_pass_all_logits")


def packed(conversations, vocab, max_tokens):
    """N-pass, passes packed into rows in which no pass sees another, with logits at targets: the strongest N-pass. It runs
    on our attention (a tree without forks is a document mask), which skips the tiles between documents."""
    rows = pack(_alone(_passes(conversations)), max_tokens)
    return "flexmask", _batches(rows, vocab), _flops(rows)


def interleaved(conversations, vocab, max_tokens):
    """The published one-pass method: turn by turn in one sequence, with a dense mask handed to SDPA. (Targets are those of
    the tree; the published label shift gets one of each turn wrong.)"""
    trees = [TokenTree.from_passes(passes) for passes in conversations]
    return "dense-mask", [_turn_by_turn(tree) for tree in trees], lambda config: sum(_dense(t, config) for t in trees)


def aligned(conversations, vocab, max_tokens):
    """One padded batch as TRL makes it: prompts padded on the left, completions on the right, logits at completions."""
    return "sdpa", [_aligned(_passes(conversations))], lambda config: _aligned_flops(conversations, config, "n_pass")


def shared(conversations, vocab, max_tokens):
    """The same batch, and `flexmask.share_prefixes`."""
    return (
        "flexmask",
        [_aligned(_passes(conversations))],
        lambda config: _aligned_flops(conversations, config, "one_pass"),
    )


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
    """Measure the training step that a specification describes; on a CPU in a process of its own, for its peak memory.

    Args:
        spec: shape, layers, checkpointing; conversations (how many), turns (fewest, most), lengths (h, t, r), or
            conversations, completions, lengths (prompt, completion); method (of METHODS, GROUP_METHODS) or parts;
            max_tokens of a row or batch; repeats.

    Returns:
        step (seconds), tokens (of the passes), tokens/s (of these), tokens run (padding included), batches, peak MiB
        beyond the weights (gradients and optimiser included), loss, TFLOP counted.
    """
    return _measure(spec) if DEVICE == "cuda" or spec["shape"] == "tiny" else in_own_process(__file__, json.dumps(spec))


def _measure(spec: dict) -> dict:
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
    counter = model.get_input_embeddings().register_forward_hook(
        lambda _, args, out: run_tokens.append(args[0].numel())
    )
    with torch.no_grad():
        loss = sum(_loss(model, batch, targets).item() for batch in batches)
    counter.remove()

    def step() -> None:
        for batch in batches:
            _loss(model, batch, targets).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    peak = peak_memory(step)  # the first, which also allocates the optimiser's states
    seconds = measure(step, spec["repeats"], warmup=1)
    tokens = sum(len(p.input_ids) for p in passes)
    return {
        "step": seconds,
        "tokens": tokens,
        "tokens/s": tokens / seconds["median"],
        "tokens run": sum(run_tokens),
        "batches": len(batches),
        "peak MiB": peak / 2**20,
        "loss": loss,
        "TFLOP": flops(model.config) / 1e12,
    }


def _conversation(rng: np.random.Generator, spec: dict, vocab: int) -> list[Pass]:
    """Passes of random tokens: of a conversation, or of several completions of one prompt."""
    if "turns" in spec:
        fewest, most = spec["turns"]
        return conversation(rng, int(rng.integers(fewest, most + 1)), *spec["lengths"], vocab)
    prompt, *completions = (
        rng.integers(0, vocab, rng.integers(n // 2, n * 3 // 2 + 1))
        for n in [spec["lengths"][0]] + [spec["lengths"][1]] * spec["completions"]
    )
    sequences = [np.concatenate([prompt, completion]) for completion in completions]
    return [Pass(ids, np.arange(len(ids)) >= len(prompt)) for ids in sequences]


def _flops(trees: Sequence[TokenTree], of: str = "one_pass") -> Callable:
    return lambda config: sum(getattr(cost(tree, config), of).flops for tree in trees)


def _dense(tree: TokenTree, config) -> float:
    """FLOPs where no tile is skipped."""
    one_pass, blocks = cost(tree, config).one_pass, -(-len(tree) // BLOCK_SIZE)
    tiles = sum(count_tiles(torch.from_numpy(tree.subtree_end)[None]))
    return one_pass.flops + one_pass.attention_flops * (blocks**2 / tiles - 1)


def _aligned_flops(conversations: Sequence[Sequence[Pass]], config, of: str) -> float:
    """FLOPs of an aligned batch, whose logits are computed at padding too: N passes as long as the batch, or the tree."""
    passes = _passes(conversations)
    prompts, completions = zip(*map(_prompt_and_completion, passes))
    prompt, completion = max(map(len, prompts)), max(map(len, completions))
    padded = cost(
        TokenTree.from_passes([Pass(np.arange(prompt + completion), np.arange(prompt + completion) >= prompt)]), config
    ).n_pass
    if of == "n_pass":
        return padded.flops * len(passes)
    tree = cost(TokenTree.from_passes(passes), config).one_pass
    return tree.linear_flops + tree.attention_flops + padded.loss_flops * len(passes)


def _loss(model, batch: dict, targets: int) -> torch.Tensor:
    """The sum over targets, divided by the number of all of them. Trees as `flexmask train` does it, never with all logits;
    everything else through the library's own loss."""
    if "subtree_end" in batch:
        return tree_loss(model, batch, targets)
    with _dense_mask(batch):
        inputs = {name: x for name, x in batch.items() if name != "dense_mask"}
        return model(**inputs, use_cache=False, num_items_in_batch=targets).loss


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
    return ids.split([int(np.argmax(p.loss_mask)), len(ids) - int(np.argmax(p.loss_mask))])


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
    """The tokens of each pass that no earlier one has, pass after pass: the tree in the order of the conversation."""
    order, placed = [], np.zeros(len(tree), bool)
    for path in tree.paths():
        order.extend(path[~placed[path]].tolist())
        placed[path] = True
    order = np.array(order)
    place = np.argsort(order)
    visible = (order[None, :] <= order[:, None]) & (order[:, None] < tree.subtree_end[order][None, :])
    labels = torch.from_numpy(tree.target_ids)[None]
    return {
        "input_ids": torch.from_numpy(tree.input_ids[order])[None],
        "position_ids": torch.from_numpy(tree.position_ids[order])[None],
        "dense_mask": torch.from_numpy(visible)[None, None],
        "logits_to_keep": torch.from_numpy(place[tree.target_index]),
        "labels": labels,
        "shift_labels": labels,
    }


_mask = None  # of the batch that is being run: transformers' own way of a mask of four dimensions needs it as float


@contextlib.contextmanager
def _dense_mask(batch: dict):
    global _mask
    _mask = batch.get("dense_mask")
    try:
        yield
    finally:
        _mask = None


def _dense_attention(module, query, key, value, attention_mask, *, scaling=None, **kwargs):
    """SDPA with the dense mask, keys and values repeated, as transformers does where there is a mask."""
    repeat = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(repeat, 1), value.repeat_interleave(repeat, 1)
    out = scaled_dot_product_attention(query, key, value, attn_mask=_mask, scale=scaling)
    return out.transpose(1, 2).contiguous(), None


AttentionInterface.register("dense-mask", _dense_attention)
AttentionMaskInterface.register("dense-mask", lambda **_: None)

if __name__ == "__main__":
    print(json.dumps(_measure(json.loads(sys.argv[1]))))

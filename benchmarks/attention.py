"""Attention on a row of conversations: our backends, and what a user would pick instead. Forward, and backward by itself
(on a CPU FlexAttention has none).

TFLOP/s are over visible pairs: forward 4 · heads · head_dim · pairs, backward 2.5 times that. One contender computes
something else, as a yardstick: SDPA on a plain causal sequence of the same length, whose pairs are L (L + 1) / 2. The output
and gradients of all others must be those of `blockwise`.

python benchmarks/attention.py cpu
"""

from collections.abc import Callable, Iterator
from itertools import product

import numpy as np
import torch
from common import (
    CONVERSATIONS,
    DEVICE,
    PLAIN,
    Benchmark,
    additive_mask,
    attempt,
    bars,
    conversation,
    elapsed,
    measure,
    peak_memory,
    repeat_heads,
)
from torch.nn.attention.flex_attention import create_block_mask, flex_attention
from torch.nn.functional import scaled_dot_product_attention

from flexmask import TokenTree, tree_attention
from flexmask.backends import flash
from flexmask.mask import BLOCK_SIZE, block_lists, count_tiles, mask_mod, tile_lists, tree_block_mask

BY_HAND = "FlexAttention, create_block_mask"
# Without this a symbolic length makes FlexAttention's backward refuse retain_graph, by which it is timed alone.
torch._functorch.config.donated_buffer = False


def row_of(length: int, turns: tuple) -> torch.Tensor:
    """subtree_end int32 (1, length) of conversations in a row, the last one cut."""
    rng = np.random.default_rng(0)
    trees = []
    while sum(map(len, trees)) < length:
        trees.append(TokenTree.from_passes(conversation(rng, *turns, vocab=1000)))
    ends = TokenTree.concat(trees).subtree_end[:length].clip(max=length)
    return torch.from_numpy(ends)[None].to(DEVICE)


def dense_mask(ends: torch.Tensor) -> torch.Tensor:
    place = torch.arange(ends.shape[1], device=ends.device)
    return (place <= place[:, None]) & (place[:, None] < ends[0])


class Tree:
    """One of our backends."""

    def __init__(self, backend: str):
        self.backend = backend

    def mask(self, ends):
        makes = {
            "flash": lambda ends: flash.sequences(ends, sliding_window=None),
            "triton": tile_lists,
            "flex": block_lists,
        }
        return makes[self.backend](ends) if self.backend in makes else None

    def attend(self, q, k, v, ends, mask):
        return tree_attention(q, k, v, ends, backend=self.backend)


class Flex:
    """FlexAttention by itself, compiled for each length as it is."""

    def __init__(self, make_mask, **options):
        torch._dynamo.reset()  # past its limit of recompilations FlexAttention would run dense, silently
        self.make_mask = make_mask
        self.flex = torch.compile(flex_attention, dynamic=False, fullgraph=True, **options)

    def mask(self, ends):
        return self.make_mask(ends)

    def attend(self, q, k, v, ends, mask):
        return self.flex(q, k, v, block_mask=mask, enable_gqa=q.shape[1] != k.shape[1])


class Dense:
    """SDPA with the dense mask, keys and values repeated."""

    def __init__(self, dtype: torch.dtype):
        self.dtype = dtype

    def mask(self, ends):
        return additive_mask(dense_mask(ends), self.dtype)

    def attend(self, q, k, v, ends, mask):
        k, v = repeat_heads(q, k, v)
        return scaled_dot_product_attention(q, k, v, attn_mask=mask)


class PlainCausal:
    """SDPA on one plain sequence, with its flash kernel where the dtype has one: the ceiling of what PyTorch ships."""

    def mask(self, ends):
        return None

    def attend(self, q, k, v, ends, mask):
        return scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=q.shape[1] != k.shape[1])


def mask_by_hand(ends):
    length = ends.shape[1]
    return torch.compile(create_block_mask)(mask_mod(ends), 1, None, length, length, device=ends.device)


def contenders(device: str) -> list[dict[str, Callable]]:
    """name -> a function of the dtype that makes the contender. Those that take longest to compile are measured after
    everything else."""
    dense, plain = {"SDPA, dense mask": Dense}, {PLAIN: lambda dtype: PlainCausal()}
    flex, by_hand = {"flex": lambda dtype: Tree("flex")}, {BY_HAND: lambda dtype: Flex(mask_by_hand)}
    if device == "cpu":
        ours = {name: lambda dtype, name=name: Tree(name) for name in ("flash", "blockwise")}
        return [ours | dense | plain | flex | by_hand]
    return [
        {name: lambda dtype, name=name: Tree(name) for name in ("flash", "triton")} | flex | plain | dense,
        {"FlexAttention, our BlockMask, static": lambda dtype: Flex(tree_block_mask)}
        | by_hand
        | {
            "FlexAttention, our BlockMask, max-autotune": lambda dtype: Flex(
                tree_block_mask, mode="max-autotune-no-cudagraphs"
            )
        },
    ]


def visible_pairs(ends: torch.Tensor) -> int:
    """Each key is seen by its subtree."""
    return int((ends[0] - torch.arange(ends.shape[1], device=ends.device)).sum())


def output_and_gradients(attend, tensors) -> list[torch.Tensor]:
    """The output alone where the tensors need no gradients."""
    q, k, v, grad = tensors
    out = attend()
    return [out.detach(), *(torch.autograd.grad(out, (q, k, v), grad) if out.requires_grad else ())]


def check_equal(found: list[torch.Tensor], right: list[torch.Tensor], dtype: torch.dtype) -> None:
    """Raises: ValueError, if one of them is further off, as a norm, than rounding to its dtype explains."""
    bound = 1e-4 if dtype == torch.float32 else 3e-2
    for name, (a, b) in zip(("output", "dq", "dk", "dv"), zip(found, right, strict=True)):
        error = ((a.float() - b.float()).norm() / b.float().norm()).item()
        if not error < bound:
            raise ValueError(f"{name} differs from that of blockwise by {error:.1e}")


def compare(name: str, make, tensors, ends, right: list[torch.Tensor], repeats: int) -> dict:
    """What a contender takes."""
    q, k, v, grad = tensors
    heads, length, head_dim = q.shape[1:]
    pairs = length * (length + 1) // 2 if name == PLAIN else visible_pairs(ends)
    work = 4 * heads * head_dim * pairs / 1e12
    contender, found, row = make(q.dtype), [], {}
    differentiable = DEVICE == "cuda" or name not in ("flex", BY_HAND)
    if not differentiable:
        tensors = q, k, v, grad = [x.detach() for x in tensors]
    if DEVICE == "cuda":
        row["mask, MiB"] = peak_memory(lambda: contender.mask(ends.clone())) / 2**20
    row["mask"] = measure(lambda: contender.mask(ends.clone()), 3)  # a clone, since lists are kept for a tensor
    mask = contender.mask(ends)

    def attend():
        return contender.attend(q, k, v, ends, mask)

    with torch.set_grad_enabled(differentiable):
        row["first result"] = elapsed(lambda: found.extend(output_and_gradients(attend, tensors)))
    if name != PLAIN:
        check_equal(found, right if differentiable else right[:1], q.dtype)
    with torch.no_grad():
        row["forward"] = measure(attend, repeats)
    row["forward TFLOP/s"] = work / row["forward"]["median"]
    if differentiable:
        out = attend()
        row["backward"] = measure(lambda: torch.autograd.grad(out, (q, k, v), grad, retain_graph=True), repeats)
        row["backward TFLOP/s"] = 2.5 * work / row["backward"]["median"]
    return row


def main() -> None:
    bench = Benchmark("attention", __doc__)
    bench.run(lambda: fill(bench), lambda *axes: draw(bench.measured, *axes), width=12, panels=2)


def problems(settings) -> Iterator[tuple[dict, list[torch.Tensor], torch.Tensor]]:
    """What a row of the result is about; query, key, value and the gradient of the output; ends of subtrees."""
    for dtype, (heads, kv_heads, head_dim), length in product(settings.dtypes, settings.shapes, settings.lengths):
        q, k, v, grad = (
            torch.randn(1, length, n, head_dim, device=DEVICE, dtype=getattr(torch, dtype)).transpose(1, 2)
            for n in (heads, kv_heads, kv_heads, heads)
        )
        tensors = [*(x.requires_grad_() for x in (q, k, v)), grad]
        for turns in settings.conversations:
            ends = row_of(length, CONVERSATIONS[turns])
            visible, tiles = visible_pairs(ends), sum(count_tiles(ends))
            what = {
                "conversation": turns, "length": length, "heads": f"{heads}:{kv_heads}x{head_dim}", "dtype": dtype,
                "visible": visible / length**2, "visible of visited tiles": visible / (tiles * BLOCK_SIZE**2),
            }  # fmt: skip
            yield what, tensors, ends


def fill(bench: Benchmark) -> None:
    for some in contenders(DEVICE):
        for what, tensors, ends in problems(bench.settings):
            right = output_and_gradients(lambda: tree_attention(*tensors[:3], ends, backend="blockwise"), tensors)
            for name, make in some.items():
                found = attempt(lambda: compare(name, make, tensors, ends, right, bench.settings.repeats))
                bench.add(**what, attention=name, **found)


def draw(rows: list[dict], *axes) -> None:
    """Bars: forward and backward of every contender, at the largest length and first shape."""
    length, same = max(row["length"] for row in rows), ("heads", "dtype")
    chosen = [r for r in rows if r["length"] == length and all(r[name] == rows[0][name] for name in same)]
    for axis, direction in zip(axes, ("forward", "backward")):
        value = f"{direction} TFLOP/s"
        bars(axis, [row for row in chosen if value in row], "conversation", "attention", value)
        axis.set(title=f"{direction}, {length:,} tokens, {rows[0]['dtype']}", ylabel="TFLOP/s over visible pairs")
    handles = axes[0].get_legend_handles_labels()
    axes[0].figure.legend(*handles, loc="outside lower center", ncols=5, fontsize=7)


if __name__ == "__main__":
    main()

"""The convolution and the recurrence of one hybrid layer over a conversation, forward and backward: along the tree, on each of
its passes, and as tree-recurrence (a package for the same end; `pip install tree-recurrence`) does it on this device.

The same inputs, and the same outputs at every token: the largest difference to the passes is a column. On a CPU every one of
them is PyTorch: the passes and tree-recurrence take the library's functions.

python benchmarks/recurrence.py cpu
"""

import importlib.util
import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from common import (
    DEVICE,
    DTYPE,
    GIVE_BACK,
    Benchmark,
    attempt,
    bars,
    conversation,
    in_own_process,
    in_turns,
    peak_memory,
    ratio,
    spread,
)
from torch.nn.functional import normalize
from transformers.models.bamba import modeling_bamba
from transformers.models.qwen3_5 import modeling_qwen3_5

from flexmask import TokenTree
from flexmask.chains import chains
from flexmask.recurrence import tree_conv, tree_scan

WIDTH = 4  # of the convolution
NPASS, OURS, PEER = "N-pass", "flexmask", "tree-recurrence"


@dataclass
class Layer:
    """Inputs of a layer for the tokens of a tree: (1, L, …) each, leaves that take gradients."""

    mixed: torch.Tensor  # (1, channels, L), what is convolved
    key_heads: int
    heads: int
    key_size: int
    value_size: int
    weight: torch.Tensor
    gate: torch.Tensor
    beta: torch.Tensor | None

    @classmethod
    def random(cls, length: int, key_heads: int, heads: int, key_size: int, value_size: int, delta: bool) -> "Layer":
        torch.manual_seed(0)
        channels = 2 * key_heads * key_size + heads * value_size
        options = {"device": DEVICE, "dtype": DTYPE}
        leaves = [
            torch.randn(1, channels, length, **options),
            torch.randn(channels, WIDTH, **options),
            -0.1 * torch.rand(1, length, heads, device=DEVICE),
            torch.rand(1, length, heads, **options) if delta else None,
        ]
        mixed, weight, gate, beta = (None if x is None else x.requires_grad_() for x in leaves)
        return cls(mixed, key_heads, heads, key_size, value_size, weight, gate, beta)

    def leaves(self) -> list[torch.Tensor]:
        return [x for x in (self.mixed, self.weight, self.gate, self.beta) if x is not None]

    def split(self, convolved: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """(1, channels, T) -> queries, keys, values; with the delta rule keys of length 1."""
        sizes = [self.key_heads * self.key_size, self.key_heads * self.key_size, self.heads * self.value_size]
        q, k, v = convolved.transpose(1, 2).split(sizes, -1)
        q, k = (x.unflatten(-1, (self.key_heads, self.key_size)) for x in (q, k))
        return q, normalize(k, dim=-1) if self.beta is not None else k, v.unflatten(-1, (self.heads, self.value_size))

    def conv(self, x: torch.Tensor) -> torch.Tensor:
        return modeling_qwen3_5.causal_conv1d_fn(x, self.weight, activation="silu")

    def library_scan(self, q, k, v, gate, beta=None) -> torch.Tensor:
        """Of right-padded sequences."""
        if self.beta is not None:
            return modeling_qwen3_5.torch_chunk_gated_delta_rule(q, k, v, g=gate, beta=beta)[0]
        # Mamba 2 with A = −1: its dt is the gate, and what is written x times dt.
        a = -torch.ones(self.heads, device=v.device)
        return modeling_bamba.mamba2_chunk_scan(v, -gate, a, k, q * self.key_size**-0.5, chunk_size=64)


def flexmask(layer: Layer, tree: TokenTree) -> Iterator[torch.Tensor]:
    end = torch.from_numpy(tree.subtree_end)[None].to(DEVICE).clone()  # as in training, a new one for every batch
    q, k, v = layer.split(tree_conv(layer.mixed, WIDTH, end, layer.conv))
    v = v if layer.beta is not None else v * -layer.gate[..., None].to(v.dtype)
    yield tree_scan(q, k, v, layer.gate, layer.beta, end, scale=layer.key_size**-0.5)[0]


def n_pass(layer: Layer, tree: TokenTree) -> Iterator[torch.Tensor]:
    for path in tree.paths():
        at = torch.from_numpy(path).to(DEVICE)
        of_tokens = [x[:, at] for x in (layer.gate, layer.beta) if x is not None]
        yield layer.library_scan(*layer.split(layer.conv(layer.mixed[..., at])), *of_tokens)[0]


def tree_recurrence(layer: Layer, tree: TokenTree) -> Iterator[torch.Tensor]:
    from tree_recurrence import driver, plan

    row = chains(torch.from_numpy(tree.subtree_end)[None])
    starts = np.append(row.run_start, row.length)
    segments = plan.TreePlan.from_kwargs({"tree_cu_seqlens_q": starts, "tree_segment_parents": row.run_parent})

    def conv(x: torch.Tensor, _) -> torch.Tensor:
        return layer.conv(x.transpose(1, 2)).transpose(1, 2)

    scan = driver.padded_scan(
        lambda inputs, _: layer.library_scan(*inputs)
    )  # what it takes where there is no kernel of fla
    convolved = driver.tree_conv(conv, layer.mixed.transpose(1, 2), segments, WIDTH).transpose(1, 2)
    inputs = [*layer.split(convolved), layer.gate, *([] if layer.beta is None else [layer.beta])]
    yield driver.tree_scan(scan, inputs, segments, forkable=False)[0]


METHODS: dict[str, Callable[[Layer, TokenTree], Iterator[torch.Tensor]]] = {OURS: flexmask, NPASS: n_pass}
if importlib.util.find_spec("tree_recurrence"):
    METHODS[PEER] = tree_recurrence


class Step:
    """Forward and backward of a layer by a method; `outputs` are those of the last call, pass by pass."""

    def __init__(self, spec: dict):
        rng = np.random.default_rng(0)
        turns, *lengths = spec["conversation"]
        self.tree = TokenTree.from_passes(conversation(rng, turns, *lengths, 1000))
        self.layer = Layer.random(len(self.tree), **spec["layer"])
        weight = torch.from_numpy(rng.normal(size=(len(self.tree), *self._shape()))).to(DEVICE, DTYPE)
        self._method, self._weight = METHODS[spec["method"]], weight

    def _shape(self) -> tuple[int, int]:
        return self.layer.heads, self.layer.value_size

    def __call__(self) -> None:
        paths = [torch.from_numpy(path).to(DEVICE) for path in self.tree.paths()]
        outputs = []
        for out in self._method(self.layer, self.tree):  # a pass goes backward before the next one goes forward
            of_passes = paths if self._method is not n_pass else [paths[len(outputs)]]
            found = [out[at] if self._method is not n_pass else out for at in of_passes]
            sum((x * self._weight[at]).sum() for x, at in zip(found, of_passes, strict=True)).backward()
            outputs += [x.detach() for x in found]
        self.outputs = outputs
        self.gradients = [x.grad for x in self.layer.leaves()]
        for x in self.layer.leaves():
            x.grad = None


def main() -> None:
    bench = Benchmark("recurrence", __doc__)
    bench.run(lambda: fill(bench), lambda *axes: draw(bench.measured, *axes), width=11, panels=2)


def fill(bench: Benchmark) -> None:
    settings = bench.settings
    for kind, layer in settings.layers.items():
        for name, lengths in settings.conversations.items():
            spec = {"layer": layer, "conversation": lengths, "repeats": settings.repeats}
            specs = [{**spec, "method": method} for method in METHODS]
            if settings.repeats == 1:
                peaks, times = [attempt(lambda s=s: _memory(s)) for s in specs], _times(specs)
            else:
                peaks = [
                    attempt(lambda s=s: in_own_process(__file__, "memory", json.dumps(s), **GIVE_BACK)) for s in specs
                ]
                times = in_own_process(__file__, "times", json.dumps(specs))
            for method, peak, found in zip(METHODS, peaks, times, strict=True):
                bench.add(layer=kind, conversation=name, method=method, **peak, **found)


def _memory(spec: dict) -> dict:
    return {"peak MiB": peak_memory(Step(spec)) / 2**20}


def _times(specs: list[dict]) -> list[dict]:
    """Of the methods in turns, and how far their outputs and gradients are from those of the passes."""
    steps = [attempt(lambda s=s: {"step": _warmed_up(s)}) for s in specs]
    working = [found["step"] for found in steps if "error" not in found]
    passes = next(step for step in working if step._method is n_pass)
    seconds = dict(zip(working, in_turns(working, specs[0]["repeats"])))
    return [found if "error" in found else _found(found["step"], passes, seconds) for found in steps]


def _warmed_up(spec: dict) -> Step:
    step = Step(spec)
    step()
    return step


def _found(step: Step, passes: Step, seconds: dict) -> dict:
    tokens, row = sum(map(len, passes.outputs)), len(step.tree)
    time, other = spread(seconds[step]), spread(seconds[passes])
    return {
        "seconds": time, "N-pass over it": ratio(other, time), "tokens": tokens, "tokens of the tree": row,
        "of the ratio of tokens": ratio(other, time)["median"] * row / tokens,
        "output differs by": _difference(step.outputs, passes.outputs),
        "gradients differ by": _difference(step.gradients, passes.gradients),
    }  # fmt: skip


def _difference(found: list[torch.Tensor], expected: list[torch.Tensor]) -> float:
    """The largest, relative to the largest of each."""
    return max(((a - b).abs().max() / b.abs().max()).item() for a, b in zip(found, expected, strict=True))


def draw(rows: list[dict], time, memory) -> None:
    rows = [{**row, "row": f"{row['layer']}, {row['conversation']}"} for row in rows]
    bars(time, rows, "row", "method", "N-pass over it")
    bars(memory, rows, "row", "method", "peak MiB")
    time.set(ylabel="times faster than N-pass")
    memory.set(ylabel="peak MiB")
    time.legend()


if __name__ == "__main__":
    if sys.argv[1] in ("memory", "times"):
        print(json.dumps({"memory": _memory, "times": _times}[sys.argv[1]](json.loads(sys.argv[2]))))
    else:
        main()

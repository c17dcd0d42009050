"""Memory and time of the loss with a large vocabulary: the model's own loss on the logits of all targets, and ours.

The model has one layer, so that the output layer and the loss are nearly everything. On a CPU each runs in a
process of its own.

python benchmarks/loss_memory.py cpu
"""

import json
import sys
from unittest.mock import patch

import numpy as np
from common import DEVICE, DTYPE, Benchmark, Vocabulary, attempt, bars, in_own_process, measure, peak_memory
from training import build

import flexmask.attention
from flexmask import OnePassCollator, Pass, TokenTree, tree_loss

LOSSES = {
    "logits of all targets": lambda model, batch: model(**batch, use_cache=False).loss,
    "flexmask, a library's loss": tree_loss,
    "flexmask, chunks of our own": patch.object(flexmask.loss, "_library_loss", lambda *_: None)(tree_loss),
}


def main() -> None:
    bench = Benchmark("loss_memory", __doc__)
    bench.run(lambda: fill(bench), lambda *axes: draw(bench.measured, *axes), width=11, panels=2)


def fill(bench: Benchmark) -> None:
    for name in LOSSES:
        spec = {**vars(bench.settings), "loss": name}
        found = attempt(
            lambda spec=spec: _measure(spec) if DEVICE == "cuda" else in_own_process(__file__, json.dumps(spec))
        )
        bench.add(loss=name, **found)


def _measure(spec: dict) -> dict:
    if spec.get("chunk_logits"):
        flexmask.loss.CHUNK_LOGITS = spec["chunk_logits"]
    if "library" in spec["loss"] and flexmask.loss._library_loss(DEVICE, DTYPE) is None:
        raise NotImplementedError("no library's loss for this device and dtype is installed")
    flexmask.set_backend(spec.get("backend", flexmask.attention._override))
    model = build(spec["shape"], 1, vocabulary=spec["vocabulary"])
    ids = np.random.default_rng(0).integers(0, spec["vocabulary"], spec["targets"] + 1)
    tree = TokenTree.from_passes([Pass(ids, np.arange(len(ids)) > 0)])
    batch = {name: x.to(DEVICE) for name, x in OnePassCollator(Vocabulary(spec["vocabulary"]))([tree]).items()}
    losses = []

    def step() -> None:
        loss = LOSSES[spec["loss"]](model, batch)
        loss.backward()
        losses.append(loss.item())

    peak = peak_memory(step)
    seconds = measure(step, spec["repeats"], warmup=0)
    gradient = model.get_output_embeddings().weight.grad
    return {
        "step": seconds,
        "peak MiB": peak / 2**20,
        "gradient, MiB": gradient.nbytes / 2**20,
        "value": losses[0],
    }


def draw(rows: list[dict], memory, time) -> None:
    for axis, value in ((memory, "peak MiB"), (time, "seconds")):
        bars(axis, [row | {"seconds": row["step"]["median"], "": ""} for row in rows], "", "loss", value)
        axis.set(ylabel=value)
    memory.legend(fontsize=7)


if __name__ == "__main__":
    if "".join(sys.argv[1:2]).startswith("{"):
        print(json.dumps(_measure(json.loads(sys.argv[1]))))
    else:
        main()

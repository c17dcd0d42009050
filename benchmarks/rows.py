"""What rows save by sharing beginnings across conversations: tokens, FLOPs of a training step, and the time to plan them.

"separate" is the same packing with nothing shared. A stream is packed 512 trees at a time, and its rows are made, too. FLOPs are
counted (`flexmask.cost`) for the model of the settings.

python benchmarks/rows.py cpu
"""

import json
import sys
import time
from collections.abc import Iterator
from unittest.mock import patch

import numpy as np
from common import Benchmark, bars, in_own_process
from training import SHAPES

from flexmask import Pass, TokenTree, cost, pack, pack_stream
from flexmask.data import build_trees, load_conversations
from flexmask.demo import texts, train_tokenizer
from flexmask.packing import sharing

SAVED = "fewer tokens by"


def main() -> None:
    bench = Benchmark("rows", __doc__)
    bench.run(lambda: fill(bench), lambda axis: draw(bench.measured, axis))


def fill(bench: Benchmark) -> None:
    settings = vars(bench.settings)
    for name, what in settings["datasets"].items():
        spec = {**settings, "dataset": what}
        found = in_own_process(__file__, json.dumps(spec)) if settings.get("own_processes") else measured(spec)
        for row in found:
            bench.add(dataset=name, **row)


def measured(spec: dict) -> Iterator[dict]:
    """A row of the result for each size of rows that holds the longest pass."""
    config = SHAPES[spec["shape"]](max_position_embeddings=2**20)
    trees = trees_of(**spec["dataset"])
    for max_tokens in spec["max_tokens"]:
        if max_tokens < max(tree.max_length for tree in trees):
            continue
        with patch.object(sharing, "LEAST_SHARED", 2**62):
            separate, _ = planned(trees, max_tokens)
        rows, seconds = planned(trees, max_tokens)
        run, run_separate = (sum(map(len, of)) for of in (rows, separate))
        found = {"max_tokens": max_tokens, "trees": len(trees), "tokens": sum(map(len, trees)), "tokens run": run}
        found |= {"rows": len(rows), "rows, separate": len(separate), SAVED: run_separate / run}
        if spec["flops"]:
            flops, flops_separate = (sum(cost(row, config).one_pass.flops for row in of) for of in (rows, separate))
            found["fewer FLOPs by"] = flops_separate / flops
        if spec.get("stream"):
            start = time.perf_counter()
            found["rows of a stream"] = sum(1 for _ in pack_stream(trees, max_tokens))
            found["seconds of a stream"] = time.perf_counter() - start
        yield {**found, "seconds to plan": seconds}


def planned(trees, max_tokens: int):
    start = time.perf_counter()
    rows = pack(trees, max_tokens)
    return rows, time.perf_counter() - start


def trees_of(file: str | None = None, **lengths) -> list[TokenTree]:
    """Of a file of conversations, in the tokens of a tokenizer trained on it; or of random tokens."""
    if file is None:
        return random_trees(**lengths)
    conversations = load_conversations(file)
    return list(build_trees(conversations, train_tokenizer(texts(conversations), vocab_size=8192)).trees)


def random_trees(trees: int, beginning: int, samples: int, rest: int) -> list[TokenTree]:
    """Conversations of one pass: a beginning that all have in common; prompts, each answered several times; lengths of what
    follows drawn around the mean (0.5 to 1.5 times)."""
    rng = np.random.default_rng(0)
    common, found = rng.integers(0, 8192, beginning), []
    while len(found) < trees:
        prompt = np.concatenate([common, rng.integers(0, 8192, rng.integers(rest // 2, rest * 3 // 2))])
        for _ in range(min(samples, trees - len(found))):
            ids = np.concatenate([prompt, rng.integers(0, 8192, rng.integers(rest // 2, rest * 3 // 2))])
            found.append(TokenTree.from_passes([Pass(ids, np.arange(len(ids)) >= len(prompt))]))
    return found


def draw(rows: list[dict], axis) -> None:
    bars(axis, rows, "dataset", "max_tokens", SAVED)
    axis.axhline(1, color="k", linewidth=0.5)
    axis.set(ylabel="tokens separate over tokens run", title="rows that share beginnings")
    axis.legend(title="tokens of a row", fontsize=7)


if __name__ == "__main__":
    if "".join(sys.argv[1:2]).startswith("{"):
        print(json.dumps(list(measured(json.loads(sys.argv[1])))))
    else:
        main()

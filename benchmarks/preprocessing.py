"""Where the time goes between a chat file and packed rows: reading, rendering, tokenising, tree building, packing.

python benchmarks/preprocessing.py cpu
"""

from collections.abc import Callable
from unittest.mock import patch

from common import Benchmark, bars, measure

import flexmask
from flexmask import TokenTree, pack, render_passes
from flexmask.data import load_conversations
from flexmask.demo import conversations as generate_conversations
from flexmask.train import GENERATED_DATA, load_tokenizer


def main() -> None:
    bench = Benchmark("preprocessing", __doc__)
    bench.run(lambda: fill(bench), lambda *axes: draw(bench.rows, *axes), width=11, panels=2)


def fill(bench: Benchmark) -> None:
    for what in bench.settings.datasets:
        rows_of(bench, **what)


def rows_of(bench: Benchmark, name: str, dataset: str, tokenizer: str, count: int | None = None) -> None:
    """A row of the result for each stage."""
    seconds = {}

    def stage(what: str, function: Callable):
        seconds[what] = measure(function, bench.settings.repeats, warmup=0)
        return function()

    def read() -> list[dict]:
        return generate_conversations(count) if dataset == GENERATED_DATA else load_conversations(dataset)

    conversations = stage("generate" if dataset == GENERATED_DATA else "read and check", read)
    tokenizer = load_tokenizer(tokenizer, conversations)

    texts = []

    def render() -> None:
        texts.clear()
        for c in conversations:
            render_passes(c["messages"], tokenizer)

    tokenise = flexmask.passes._tokenize
    with patch.object(flexmask.passes, "_tokenize", lambda *rendered: texts.append(rendered) or []):
        stage("render", render)
    passes = stage("tokenise", lambda: [tokenise(*rendered) for rendered in texts])
    trees = stage("build trees", lambda: [TokenTree.from_passes(p) for p in passes])
    rows = stage("pack", lambda: pack(trees, bench.settings.max_tokens))

    tokens, everything = sum(map(len, trees)), sum(taken["median"] for taken in seconds.values())
    n_pass = sum(int(tree.pass_lengths.sum()) for tree in trees)
    for what, taken in seconds.items():
        bench.add(
            dataset=name, stage=what, seconds=taken, share=taken["median"] / everything,
            conversations=len(trees), tokens=tokens,
            **{
                "tokens/s": round(tokens / taken["median"]),
                "tokens N-pass / tree": n_pass / tokens,
                "padding of rows": 1 - tokens / (len(rows) * bench.settings.max_tokens),
            },
        )  # fmt: skip


def draw(rows: list[dict], share, speed) -> None:
    bars(share, rows, "stage", "dataset", "share")
    bars(speed, rows, "stage", "dataset", "tokens/s")
    share.set(ylabel="share of the time")
    speed.set(ylabel="tokens of the trees per second", yscale="log")
    share.legend()


if __name__ == "__main__":
    main()

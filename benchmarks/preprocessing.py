"""Where the time goes between a chat file and packed rows: reading, rendering, tokenising, tree building, packing. And what
preparing many conversations takes, and starting again with them prepared.

python benchmarks/preprocessing.py cpu
python benchmarks/preprocessing.py cpu_overhead
python benchmarks/preprocessing.py cpu_at_scale
"""

import json
import os
import pickle
import resource
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from unittest.mock import patch

import pyarrow as pa
from common import Benchmark, _status, bars, in_own_process, measure, ratio, spread
from transformers import AutoTokenizer

from flexmask import OnePassCollator, TokenTree, pack, render_passes
from flexmask.arguments import GENERATED_DATA
from flexmask.data import load_conversations, prepare, tree_maker
from flexmask.data.columns import SCHEMA
from flexmask.data.preparation import CHUNK, _batch
from flexmask.demo import conversations as generate_conversations
from flexmask.demo import texts as texts_of
from flexmask.demo import train_tokenizer
from flexmask.models import load_tokenizer
from flexmask.passes import render_conversation
from flexmask.passes.render import _Renderer
from flexmask.sources import open_source

DATA = "data.jsonl"
PROCESSES = len(os.sched_getaffinity(0))


def main() -> None:
    bench = Benchmark("preprocessing", __doc__)
    draw_it = draw if "datasets" in bench.settings else draw_at_scale
    bench.run(lambda: fill(bench), lambda *axes: draw_it(bench.rows, *axes), width=11, panels=2)


def fill(bench: Benchmark) -> None:
    for key, rows in (("datasets", rows_of), ("overhead", rows_of_overhead), ("at_scale", rows_at_scale)):
        for what in vars(bench.settings).get(key, []):
            rows(bench, **what)


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

    rendered = []

    def render() -> None:
        rendered.clear()
        for c in conversations:
            render_passes(c["messages"], tokenizer)

    tokenise = _Renderer._tokenize
    with patch.object(_Renderer, "_tokenize", lambda renderer, turns: rendered.append((renderer, turns)) or []):
        stage("render", render)
    passes = stage("tokenise", lambda: [tokenise(*one) for one in rendered])
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


def rows_of_overhead(bench: Benchmark, name: str, count: int) -> None:
    """What trees and Arrow take beyond reading, rendering and tokenising: both take turns every few conversations, and what
    counts is processor time, because other work on the machine counts in the other."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # as in the processes of a preparation
    folder = tempfile.TemporaryDirectory()
    source, maker = open_source(written(folder.name, count)), tree_maker(AutoTokenizer.from_pretrained(folder.name))

    def plain(indices: range) -> None:
        for record in source.read(indices.start, indices.stop):
            render_conversation(maker.conversation(record), maker.tokenizer)

    def whole(indices: range) -> None:
        batch, *_ = pickle.loads(pickle.dumps(_batch(source, maker, indices)))  # from process to process
        writer.write_batch(batch)

    rounds = []
    for _ in range(bench.settings.repeats):
        seconds = {plain: 0.0, whole: 0.0}
        with tempfile.TemporaryFile() as file, pa.ipc.new_file(file, SCHEMA) as writer:
            for first in range(0, count, CHUNK):
                for do in seconds:
                    before = time.process_time()
                    do(range(first, min(first + CHUNK, count)))
                    seconds[do] += time.process_time() - before
        rounds.append(tuple(seconds.values()))
    folder.cleanup()
    measured = [spread(list(column)) for column in zip(*rounds)]
    for what, seconds in zip(("read, render and tokenise", "prepare"), measured):
        bench.add(
            dataset=name, stage=f"{what}, processor time", conversations=count, seconds=seconds,
            **{"times rendering and tokenising": ratio(seconds, measured[0])},
        )  # fmt: skip


def rows_at_scale(bench: Benchmark, name: str, count: int) -> None:
    """Rows for preparing `count` conversations of a file, and for starting again; each in a process of its own that loads
    everything anew."""
    with tempfile.TemporaryDirectory() as folder:
        written(folder, count)
        for stage in (f"prepare, {PROCESSES} processes", "start again"):
            start = time.perf_counter()
            found = in_own_process("preprocessing.py", "start", folder, str(bench.settings.max_tokens))
            bench.add(
                dataset=name, stage=stage, conversations=count, tokens=found["tokens"],
                seconds=spread([time.perf_counter() - start]),
                **{
                    "of it until rows": found["seconds"], "processor time": found["cpu"], "rows": found["rows"],
                    "resident MiB": found["resident"] / 2**20, "of it not of files MiB": found["anonymous"] / 2**20,
                    "after 100 batches MiB": found["after batches"] / 2**20,
                    "peak MiB": found["peak"] / 2**20, "on disk MiB": found["disk"] / 2**20,
                },
            )  # fmt: skip


def written(folder: str, count: int) -> str:
    """The name of a file of generated conversations, with a tokenizer beside it."""
    with open(f"{folder}/{DATA}", "w") as lines:
        for seed in range(-(-count // 1000)):
            for conversation in generate_conversations(min(1000, count - seed * 1000), seed=seed):
                lines.write(json.dumps(conversation) + "\n")
    train_tokenizer(texts_of(generate_conversations(500))).save_pretrained(folder)
    return lines.name


def start(folder: str, max_tokens: int) -> dict:
    """What a rank does before it trains, and 100 batches."""
    tokenizer, cache = AutoTokenizer.from_pretrained(folder), Path(folder) / "cache"
    maker = tree_maker(tokenizer, max_length=max_tokens, max_tokens=max_tokens)
    begin = time.perf_counter()
    prepared = prepare(open_source(f"{folder}/{DATA}"), maker, cache_dir=cache, progress=False)
    rows = pack(prepared.trees, max_tokens)
    seconds = time.perf_counter() - begin
    resident, anonymous = _status("VmRSS"), _status("RssAnon")
    collator = OnePassCollator(tokenizer, max_tokens)
    for row in rows[:100]:
        collator([row])
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return {
        "seconds": seconds, "cpu": sum(u.ru_utime + u.ru_stime for u in used), "rows": len(rows),
        "tokens": prepared.tokens, "resident": resident, "anonymous": anonymous, "peak": _status("VmHWM"),
        "after batches": _status("VmRSS"), "disk": sum(path.stat().st_size for path in cache.rglob("*") if path.is_file()),
    }  # fmt: skip


def draw_at_scale(rows: list[dict], seconds, memory) -> None:
    stages = [row["stage"] for row in rows]
    seconds.bar(stages, [row["seconds"]["median"] for row in rows])
    seconds.set(ylabel="seconds", yscale="log")
    for name in ("resident MiB", "of it not of files MiB"):
        memory.bar(stages, [row.get(name, 0) for row in rows], label=name)
    memory.legend()


if __name__ == "__main__":
    if sys.argv[1:2] == ["start"]:
        print(json.dumps(start(sys.argv[2], int(sys.argv[3]))))
    else:
        main()

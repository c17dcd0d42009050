"""Where the time goes between a chat file and packed rows: reading, rendering, tokenising, tree building, packing. And what
preparing many conversations takes, and starting again with them prepared.

python benchmarks/preprocessing.py cpu
python benchmarks/preprocessing.py cpu_at_scale
"""

import json
import os
import resource
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from unittest.mock import patch

from common import Benchmark, _status, bars, elapsed, in_own_process, measure, ratio, spread
from transformers import AutoTokenizer

from flexmask import OnePassCollator, TokenTree, pack, render_passes
from flexmask.data import CHUNK, load_conversations, prepare, tree_maker
from flexmask.demo import conversations as generate_conversations
from flexmask.demo import texts as texts_of
from flexmask.demo import train_tokenizer
from flexmask.passes import render_conversation
from flexmask.passes.render import _Renderer
from flexmask.sources import open_source
from flexmask.train import GENERATED_DATA, load_tokenizer

PROCESSES = len(os.sched_getaffinity(0))


def main() -> None:
    bench = Benchmark("preprocessing", __doc__)
    draw_it = draw_at_scale if bench.settings.at_scale else draw
    bench.run(lambda: fill(bench), lambda *axes: draw_it(bench.rows, *axes), width=11, panels=2)


def fill(bench: Benchmark) -> None:
    for what in bench.settings.datasets:
        rows_of(bench, **what)
    for what in bench.settings.at_scale:
        rows_at_scale(bench, **what)


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


def rows_at_scale(bench: Benchmark, name: str, count: int, overhead_count: int) -> None:
    """Rows for preparing `count` conversations of a file, each stage in a process of its own that loads everything anew. What
    trees and Arrow take beyond rendering and tokenising is measured with fewer of them, in rounds, as processor time: other
    work on the machine would count in the other."""
    with tempfile.TemporaryDirectory() as folder:
        for file, size in (("all", count), ("some", overhead_count)):
            with open(f"{folder}/{file}.jsonl", "w") as lines:
                for seed in range(-(-size // 1000)):
                    for conversation in generate_conversations(min(1000, size - seed * 1000), seed=seed):
                        lines.write(json.dumps(conversation) + "\n")
        train_tokenizer(texts_of(generate_conversations(500))).save_pretrained(f"{folder}/tokenizer")

        def stage(what: str, file: str = "all", cache: str = "cache") -> dict:
            start = time.perf_counter()
            arguments = {"folder": folder, "file": file, "cache": cache, "max_tokens": bench.settings.max_tokens}
            found = in_own_process("preprocessing.py", what, json.dumps(arguments))
            return found | {"wall": time.perf_counter() - start}

        rounds = [
            (stage("plain", "some"), stage("first", "some", cache=f"cache {i}")) for i in range(bench.settings.repeats)
        ]
        cpu = [spread([of_round[i]["cpu"] for of_round in rounds]) for i in (0, 1)]
        overhead = ratio(cpu[1], cpu[0])
        for what, seconds in zip(("render and tokenise", "prepare"), cpu):
            bench.add(
                dataset=name, stage=f"{what}, processor time", conversations=overhead_count, seconds=seconds,
                **{"times rendering and tokenising": overhead if what == "prepare" else 1.0},
            )  # fmt: skip
        for what, text in (("first", "prepare"), ("second", "start again")):
            found = stage(what)
            bench.add(
                dataset=name, stage=f"{text}, {PROCESSES} processes" if what == "first" else text, conversations=count,
                tokens=found["tokens"], seconds=spread([found["wall"]]),
                **{
                    "of it until rows": found["seconds"], "rows": found["rows"], "processor time": found["cpu"],
                    "resident MiB": found["resident"] / 2**20, "of it not of files MiB": found["anonymous"] / 2**20,
                    "peak MiB": found["peak"] / 2**20, "on disk MiB": found["disk"] / 2**20,
                },
            )  # fmt: skip


def at_scale(what: str, folder: str, file: str, cache: str, max_tokens: int) -> dict:
    """One stage, in this process."""
    tokenizer = AutoTokenizer.from_pretrained(f"{folder}/tokenizer")
    source, cache = open_source(f"{folder}/{file}.jsonl"), Path(folder) / cache
    before = processor_time()
    if what == "plain":
        seconds = elapsed(lambda: render_only(source, tokenizer))
        return {"seconds": seconds, "cpu": processor_time() - before}
    maker = tree_maker(tokenizer, max_length=max_tokens, max_tokens=max_tokens)
    start = time.perf_counter()
    prepared = prepare(source, maker, cache_dir=cache, num_proc=PROCESSES, progress=False)
    rows = pack(prepared.trees, max_tokens)
    seconds, cpu = time.perf_counter() - start, processor_time() - before
    collator = OnePassCollator(tokenizer, max_tokens)
    for row in rows[:100]:
        collator([row])
    return {
        "seconds": seconds, "cpu": cpu, "rows": len(rows), "tokens": prepared.tokens,
        "resident": _status("VmRSS"), "anonymous": _status("RssAnon"), "peak": _status("VmHWM"),
        "disk": sum(path.stat().st_size for path in cache.rglob("*") if path.is_file()),
    }  # fmt: skip


def render_only(source, tokenizer) -> None:
    """What is left without trees and Arrow: the same records read, rendered and tokenised in as many processes."""
    global _render
    conversation_of = tree_maker(tokenizer).conversation

    def _render(start: int) -> int:
        records = source.read(start, start + CHUNK)
        return sum(len(render_conversation(conversation_of(record), tokenizer)) for record in records)

    starts = range(0, len(source), CHUNK)
    with ProcessPoolExecutor(
        PROCESSES, initializer=os.environ.update, initargs=({"TOKENIZERS_PARALLELISM": "false"},)
    ) as pool:
        sum(pool.map(render_there, starts))


def render_there(start: int) -> int:
    return _render(start)  # the process was forked, so it is there


def processor_time() -> float:
    """Seconds of this process and those it started, so far."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(u.ru_utime + u.ru_stime for u in used)


def draw_at_scale(rows: list[dict], seconds, memory) -> None:
    whole = [row for row in rows if "resident MiB" in row]
    seconds.bar([row["stage"] for row in whole], [row["seconds"]["median"] for row in whole])
    seconds.set(ylabel="seconds", yscale="log")
    memory.bar([row["stage"] for row in whole], [row["resident MiB"] for row in whole], label="with pages of files")
    memory.bar([row["stage"] for row in whole], [row["of it not of files MiB"] for row in whole], label="without")
    memory.set(ylabel="resident MiB")
    memory.legend()


if __name__ == "__main__":
    if sys.argv[1:2] in (["plain"], ["first"], ["second"]):
        print(json.dumps(at_scale(sys.argv[1], **json.loads(sys.argv[2]))))
    else:
        main()

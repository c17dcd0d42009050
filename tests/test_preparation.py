"""Datasets prepared once and kept, mixed, held out; and as streams."""

import itertools
import json
import multiprocessing
import operator
import os
import pickle
import signal
import subprocess
import sys
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path
from unittest.mock import patch

import datasets
import numpy as np
import pytest
from filelock import FileLock
from hypothesis import given, settings
from hypothesis import strategies as st
from templates import tokenizer as with_template
from test_data import ANSWER, GOOD, USER, lines, same_trees, write
from torch.utils.data import DataLoader
from transformers import AutoTokenizer, ByT5Tokenizer

from flexmask import ConversationError, Pass, TokenTree, demo, pack, pack_stream
from flexmask.arguments import DataArguments
from flexmask.data import (
    Counts,
    build_trees,
    columns,
    load_conversations,
    making,
    preparation,
    prepare,
    tokenizer_fingerprint,
    tree_maker,
)  # fmt: skip
from flexmask.loading import Loader, Part, TreeStream, hold_out, mix
from flexmask.packing import RowStream
from flexmask.sources import HubDataset, InMemory, Interleaved, open_source

CONVERSATIONS = demo.conversations(24, seed=3, turns=(1, 4))


@pytest.fixture(scope="module")
def tokenizer():
    return demo.train_tokenizer(demo.texts(CONVERSATIONS))


@pytest.fixture(autouse=True)
def inside_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def prepared(maker, name="data.jsonl", **options):
    return prepare(open_source(name), maker, cache_dir="cache", progress=False, **options)


def nothing_is_made():
    return patch.object(preparation, "_write", side_effect=AssertionError("made again"))


# Kept


def test_what_is_kept_is_what_is_built_in_memory(tokenizer):
    write("data.jsonl", lines(*CONVERSATIONS))
    kept = prepared(tree_maker(tokenizer), num_proc=2)
    built = build_trees(load_conversations("data.jsonl"), tokenizer)
    assert same_trees(kept.trees, built.trees) and str(kept) == str(built)
    assert kept.intact == built.intact == list(range(24))
    assert "nobody reads these keys of the records: answers (24)" in str(kept)
    assert kept.largest_token == max(int(tree.input_ids.max()) for tree in built.trees)
    assert kept.longest_pass == max(tree.max_length for tree in built.trees)


def test_it_is_found_again_in_another_process_with_a_tokenizer_loaded_anew(tokenizer):
    """The bug guarded: a tokenizer's hash changes when it is used with padding, and in each process."""
    write("data.jsonl", lines(*CONVERSATIONS))
    kept = prepared(tree_maker(tokenizer))
    tokenizer.save_pretrained("tokenizer")
    with nothing_is_made():
        loaded = AutoTokenizer.from_pretrained("tokenizer")
        loaded(["a", "a b c"], padding=True, truncation=True, max_length=2)
        assert prepared(tree_maker(loaded)).path == kept.path
        assert prepared(tree_maker(loaded), num_proc=2).path == kept.path
    script = (
        "from transformers import AutoTokenizer; from flexmask.data import prepare, tree_maker; "
        "from flexmask.sources import open_source; import flexmask.data; flexmask.data.preparation._write = None; "
        "maker = tree_maker(AutoTokenizer.from_pretrained('tokenizer')); "
        "print(prepare(open_source('data.jsonl'), maker, cache_dir='cache').path)"
    )
    found = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert found.stdout.strip() == str(kept.path), found.stderr


def test_a_change_of_anything_makes_other_trees(tokenizer, monkeypatch):
    """Nothing stale is ever used: each change is another preparation, and going back finds the first."""
    write("data.jsonl", lines(*CONVERSATIONS))
    stat = os.stat("data.jsonl")
    paths = [prepared(tree_maker(tokenizer)).path]

    def changed(maker, **options):
        paths.append(prepared(maker, **options).path)
        assert len(set(paths)) == len(paths), "this one was stale"

    write("data.jsonl", lines(*CONVERSATIONS).replace("apples", "pepper"))
    os.utime("data.jsonl", ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert os.stat("data.jsonl").st_size == stat.st_size, "neither its size nor its date tells"
    changed(tree_maker(tokenizer))
    write("data.jsonl", lines(*CONVERSATIONS))
    changed(tree_maker(tokenizer), max_samples=23)
    for options in (
        {"loss_reduction": "turn"},
        {"reasoning_format": "<think>{reasoning}</think>"},
        {"end_of_turn": "<|endoftext|>"},
        {"chat_template": demo.CHAT_TEMPLATE + "{#- -#}"},
        {"enable_thinking": True},
        {"train_on": "last"},
        {"columns": {"messages": "messages"}},
    ):
        changed(tree_maker(tokenizer, **options))
    other = demo.train_tokenizer(demo.texts(CONVERSATIONS[:20]))
    changed(tree_maker(other))
    other = demo.train_tokenizer(demo.texts(CONVERSATIONS), chat_template=demo.CHAT_TEMPLATE + "{# #}")
    changed(tree_maker(other))
    other = demo.train_tokenizer(demo.texts(CONVERSATIONS))
    other.add_tokens(["flower stall"])
    changed(tree_maker(other))
    other = demo.train_tokenizer(demo.texts(CONVERSATIONS))
    other.split_special_tokens = True
    changed(tree_maker(other))
    with nothing_is_made():
        assert prepared(tree_maker(tokenizer)).path == paths[0]
    monkeypatch.setattr(making, "_code", lambda: "of another version")
    changed(tree_maker(tokenizer))


def test_a_tokenizer_in_python_is_what_it_was_made_with(tmp_path):
    """The bug guarded: options of such a tokenizer, which has no description of itself, were not looked at."""
    ByT5Tokenizer().save_pretrained(tmp_path / "a")
    ByT5Tokenizer().save_pretrained(tmp_path / "b")
    made = [AutoTokenizer.from_pretrained(tmp_path / name) for name in "ab"]
    other = AutoTokenizer.from_pretrained(tmp_path / "a", add_prefix_space=True)
    assert not other.is_fast
    one, same, another = map(tokenizer_fingerprint, (*made, other))
    assert one == same != another


def test_the_code_that_reads_records_is_part_of_what_trees_depend_on(monkeypatch):
    """The bug guarded: sources.py was left out."""
    before, read = making._code.__wrapped__(), Path.read_text
    for name in ("sources", "messages", "tree", "making", "render"):

        def changed(path, name=name):
            return read(path) + "#" * (path.name == f"{name}.py")

        with monkeypatch.context() as patched:
            patched.setattr(Path, "read_text", changed)
            assert making._code.__wrapped__() != before, name


def test_options_that_are_no_json_cannot_be_kept(tokenizer):
    with pytest.raises(ConversationError, match="here: records must be JSON to be prepared"):
        prepare(InMemory("here", [GOOD | {"when": object()}]), tree_maker(tokenizer), cache_dir="cache")
    write("data.jsonl", lines(*CONVERSATIONS))
    with pytest.raises(ValueError, match="must be JSON to be prepared"):
        prepared(tree_maker(tokenizer, now=object()))


def test_limits_matter_only_where_a_pass_is_longer(tokenizer):
    """The bug guarded: a smaller row, tried for want of memory, took the whole preparation again."""
    write("data.jsonl", lines(*CONVERSATIONS))
    kept = prepared(tree_maker(tokenizer, max_length=4096, max_tokens=8192))
    longest = kept.longest_pass
    with nothing_is_made():
        for limits in ({}, {"max_length": longest}, {"max_tokens": longest, "overlong": "drop"}):
            assert prepared(tree_maker(tokenizer, **limits)).path == kept.path
    with pytest.raises(ConversationError, match=rf"^data.jsonl:\d+: its longest pass has {longest} tokens, more than"):
        prepared(tree_maker(tokenizer, max_tokens=longest - 1))
    dropped = prepared(tree_maker(tokenizer, max_length=longest - 1, overlong="drop"))
    assert dropped.path != kept.path and len(dropped.trees) == 24 - dropped.dropped < 24
    assert prepared(tree_maker(tokenizer, max_length=longest - 2, overlong="drop")).path != dropped.path
    assert prepared(tree_maker(tokenizer, max_length=longest - 1, overlong="truncate")).dropped == 0
    with nothing_is_made():
        assert prepared(tree_maker(tokenizer, max_length=longest - 1, overlong="drop")).path == dropped.path
        left = dropped.conversation.tolist()
        assert same_trees(dropped.trees, build_trees([CONVERSATIONS[i] for i in left], tokenizer).trees)


def test_processes_are_as_many_as_are_worth_it(tokenizer):
    """The bug guarded: their number was that of conversations by 256, so that one process rendered 255 long logs."""
    render, pools = preparation._batch, []

    class Pool(preparation.ProcessPoolExecutor):
        def __init__(self, num_proc, **options):
            pools.append(num_proc)
            super().__init__(num_proc, **options)

    with patch.object(preparation, "ProcessPoolExecutor", Pool), patch.object(preparation, "_cores", lambda: 2):
        write("data.jsonl", lines(*CONVERSATIONS))
        short = prepared(tree_maker(tokenizer))
        assert pools == []
        write("data.jsonl", lines(*CONVERSATIONS, CONVERSATIONS[0]))
        with patch.object(preparation, "_batch", lambda *given: time.sleep(2) or render(*given)):
            long = prepared(tree_maker(tokenizer))
        assert pools == [2] and same_trees(long.trees[:24], short.trees) and len(long.trees) == 25


@pytest.mark.parametrize("num_proc", [1, 2])
def test_a_fault_leaves_nothing_behind_and_is_told_in_one_line(tokenizer, num_proc):
    write("data.jsonl", lines(*CONVERSATIONS[:20], {"messages": [USER]}))
    with pytest.raises(ConversationError) as caught:
        prepared(tree_maker(tokenizer), num_proc=num_proc)
    assert str(caught.value).startswith("data.jsonl:21: no assistant message to train") and "\n" not in str(
        caught.value
    )
    assert [path for path in os.listdir("cache") if not path.endswith(".lock")] == []


def test_what_a_killed_run_left_is_cleared_away(tokenizer):
    write("data.jsonl", lines(*CONVERSATIONS))
    path = prepared(tree_maker(tokenizer)).path
    os.rename(path, f"{path}.making")
    (path.parent / f"{path.name}.making" / "trees.arrow").write_bytes(b"half")
    assert len(prepared(tree_maker(tokenizer)).trees) == 24
    assert sorted(os.listdir("cache")) == [path.name, f"{path.name}.lock"]


@pytest.mark.parametrize("name", ["trees.arrow", "counted.json"])
def test_what_was_cut_short_is_made_anew(tokenizer, name):
    """The bug guarded: a file that a crash had cut was an error of Arrow at every start."""
    write("data.jsonl", lines(*CONVERSATIONS))
    path = prepared(tree_maker(tokenizer)).path / name
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    assert len(prepared(tree_maker(tokenizer)).trees) == 24
    path.unlink()
    assert len(prepared(tree_maker(tokenizer)).trees) == 24


SLOW = """
import time
from flexmask import demo
from flexmask.data import preparation as data
from flexmask.sources import open_source

def slow(*given):
    time.sleep(60)

data._batch = slow
tokenizer = demo.train_tokenizer(demo.texts(demo.conversations(4)))
data.prepare(open_source("data.jsonl"), data.tree_maker(tokenizer), cache_dir="cache", num_proc=2, progress=False)
"""


@pytest.mark.parametrize("by", ["terminate", "kill"])
def test_workers_die_with_the_process_that_prepares(by):
    """The bug guarded: they waited for work for ever."""
    write("data.jsonl", lines(*CONVERSATIONS))
    process = subprocess.Popen([sys.executable, "-c", SLOW])
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    if not children.exists():
        process.kill()
        pytest.skip("no /proc")

    def wait_for(what):
        for _ in range(600):
            if what():
                return True
            time.sleep(0.1)
        return False

    try:
        assert wait_for(lambda: len(children.read_text().split()) >= 2)
        time.sleep(1)  # each has begun
        workers = children.read_text().split()
    finally:
        getattr(process, by)()
        process.wait()

    def is_gone(worker):
        try:
            return Path(f"/proc/{worker}/stat").read_text().rsplit(")", 1)[1].split()[0] == "Z"
        except OSError:
            return True

    all_gone = wait_for(lambda: all(map(is_gone, workers)))
    for worker in itertools.filterfalse(is_gone, workers):
        os.kill(int(worker), signal.SIGKILL)
    assert all_gone


def test_who_waits_for_another_process_says_so(tokenizer):
    write("data.jsonl", lines(*CONVERSATIONS))
    path = prepared(tree_maker(tokenizer)).path
    lock = FileLock(f"{path}.lock")
    lock.acquire()
    told = []

    def tell(line):
        told.append(line)
        lock.release()

    assert prepared(tree_maker(tokenizer), tell=tell).path == path
    assert told == [f"data.jsonl: another process prepares it, waiting for it to let go of {path}.lock"]


def test_of_several_processes_one_prepares(tokenizer):
    write("data.jsonl", lines(*CONVERSATIONS))
    fork = multiprocessing.get_context("fork")
    queue, started, write_it = fork.SimpleQueue(), fork.Barrier(3), preparation._write

    def make(*given):
        queue.put("made")
        return write_it(*given)

    def run():
        started.wait()
        queue.put(len(prepared(tree_maker(tokenizer)).trees))

    with patch.object(preparation, "_write", make):
        processes = [fork.Process(target=run) for _ in range(3)]
        for process in processes:
            process.start()
        for process in processes:
            process.join(timeout=60)
    assert Counter(queue.get() for _ in range(4)) == {"made": 1, 24: 3} and queue.empty()


def test_trees_stay_on_disk(tokenizer):
    """The bugs guarded: a second copy of all trees, in rows; and positions read where only beginnings are wanted, which was a
    GiB of 200,000 trees. Another process maps the file again instead of being sent it."""
    write("data.jsonl", lines(*CONVERSATIONS))
    trees = prepared(tree_maker(tokenizer)).trees
    longest = int(trees.lengths.max())
    with patch.object(columns.Columns, "_of", side_effect=columns.Columns._of, autospec=True) as read:
        rows = pack(trees, longest)
        assert {name for call in read.call_args_list for name in call.args[2:]} == {"input_ids"}
        sent = pickle.dumps(rows)
    assert len(sent) < 20_000 < os.stat(next(trees._columns.parts[0].parent.iterdir())).st_size
    assert same_trees(list(pickle.loads(sent)), list(rows))
    assert sum(rows.lengths) == sum(trees.lengths) and [len(row) for row in rows] == rows.lengths.tolist()
    assert same_trees(trees[3:5], [trees[3], trees[4]]) and trees[-1].num_passes == trees.num_passes[-1]
    with pytest.raises(IndexError):
        trees[24]
    assert trees.visible_pairs.tolist() == [tree.visible_pairs for tree in trees]
    assert [trees.trunk(i).tolist() for i in range(24)] == [tree.trunk.tolist() for tree in trees]
    split = pack(trees, longest - 1)
    assert split.split == sum(trees.lengths == longest) and [len(row) for row in split] == split.lengths.tolist()
    assert same_trees(list(split), list(pack(list(trees), longest - 1)))


# Sources


def test_the_same_records_from_every_source_by_index_and_as_a_stream(monkeypatch):
    talks = [{"messages": c["messages"]} for c in CONVERSATIONS]
    write("data.jsonl", "\n" + lines(*talks[:9]) + "\n \n" + lines(*talks[9:]))
    write("data.json", json.dumps(talks))
    rows = datasets.Dataset.from_list(talks)
    rows.to_parquet("data.parquet", batch_size=7)
    monkeypatch.setattr(
        datasets, "load_dataset", lambda *_, streaming, **__: rows.to_iterable_dataset() if streaming else rows
    )
    for name in ("data.jsonl", "data.json", "data.parquet", "org/chats"):
        source = open_source(name)
        assert len(source) == 24
        every = list(source.read(0, 24))
        assert [record["messages"] for _, record in every] == [talk["messages"] for talk in talks]
        assert len({origin for origin, _ in every}) == 24
        for start, stop in ((5, 9), (8, 12), (23, 99), (24, 30), (3, 3)):
            assert list(source.read(start, stop)) == every[start:stop], (name, start, stop)
        assert [record() for record in open_source(name, streaming=True).stream()] == every


def test_columns_of_other_names(tokenizer):
    write("data.jsonl", lines(*({"chat": c["messages"], "functions": "[]"} for c in CONVERSATIONS)))
    columns = {"messages": "chat"}
    found = load_conversations("data.jsonl", columns=columns)
    assert same_trees(
        prepared(tree_maker(tokenizer, columns=columns)).trees, build_trees(CONVERSATIONS, tokenizer).trees
    )
    assert same_trees(build_trees(found, tokenizer).trees, build_trees(CONVERSATIONS, tokenizer).trees)
    with pytest.raises(ConversationError, match=r"data\.jsonl:1: has the keys chat, functions, expected talk"):
        load_conversations("data.jsonl", columns={"messages": "talk"})


def test_a_column_that_no_record_has_is_told(tokenizer):
    """The bug guarded: nothing was said of it, and all were trained without their tools."""
    write("data.jsonl", lines(GOOD, GOOD | {"apis": "[]"}))
    assert "1 records lack the column apis" in str(prepared(tree_maker(tokenizer, columns={"tools": "apis"})))
    columns = {"tools": "my_tools"}
    expected = "data.jsonl: no record has the column 'my_tools', which columns names; is it misspelt?"
    for load in (
        lambda: load_conversations("data.jsonl", columns=columns),
        lambda: prepared(tree_maker(tokenizer, columns=columns)),
        lambda: prepared(tree_maker(tokenizer, columns=columns)),  # what is kept too
    ):
        with pytest.raises(ConversationError) as caught:
            load()
        assert str(caught.value) == expected
    with pytest.raises(ConversationError, match=r"^no record has the column 'my_tools'"):
        build_trees([GOOD], tokenizer, columns=columns)
    thinks, plain = ({"messages": chat(**of)} for of in ({"reasoning_content": "One."}, {}))
    # One that is dropped lacks it, too.
    with pytest.raises(ConversationError, match=r"^no record has the column 'my_tools'"):
        build_trees([thinks, plain], with_template("qwen3"), columns=columns, empty_reasoning="drop")


def chat(**answer):
    return [{"role": "user", "content": "1?"}, {"role": "assistant", "content": "1", **answer}]


# Fuzzing

JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 3) | st.floats() | st.text(max_size=4) | st.just("<think>"),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)
KEYS = st.sampled_from(
    [
        "messages",
        "role",
        "content",
        "reasoning_content",
        "tool_calls",
        "train",
        "weight",
        "tools",
        "system",
        "from",
        "value",
    ]
)


@st.composite
def damaged(draw):
    """A good record with something else in a few places."""
    record = json.loads(json.dumps({"messages": [USER, ANSWER, USER, ANSWER]}))
    for _ in range(draw(st.integers(0, 3))):
        where = record if draw(st.booleans()) else draw(st.sampled_from(CONTAINERS(record)))
        if isinstance(where, dict):
            where[draw(KEYS)] = draw(JSON)
        elif where:
            where[draw(st.integers(0, len(where) - 1))] = draw(JSON)
    return record


def CONTAINERS(value) -> list:
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    found = [value] if isinstance(value, dict | list) else []
    return found + [container for item in inner for container in CONTAINERS(item)]


@settings(deadline=None, max_examples=150)
@given(
    st.lists(damaged(), min_size=1, max_size=3), st.sampled_from([None, 12, 30]), st.sampled_from(["drop", "truncate"])
)
def test_damaged_records_are_refused_or_trained_and_all_are_counted(tokenizer, records, max_length, overlong):
    try:
        found = build_trees(records, tokenizer, max_length=max_length, overlong=overlong)
    except ConversationError as error:
        assert "conversation " in str(error)
        return
    assert found.conversations == len(records) == len(found.trees) + found.dropped
    trained = sum(len(tree.pass_targets) for tree in found.trees)
    assert found.targets - found.targets_lost == trained
    assert found.passes - found.passes_lost == sum(found.trees.num_passes)
    assert len(found.intact) == found.conversations - found.dropped - found.truncated


# Several


def part(tokenizer, count, seed=0, **options):
    source, maker = InMemory(f"seed {seed}", demo.conversations(count, seed=seed, turns=(1, 2))), tree_maker(tokenizer)
    found = prepare(source, maker, cache_dir="cache", progress=False)
    return Part(source, maker, found, np.arange(len(found.trees)), **options)


def names(trees) -> list[bytes]:
    return [tree.input_ids.tobytes() for tree in trees]


def test_held_out_conversations_are_disjoint_reproducible_and_decided_by_the_seed(tokenizer):
    parts = [part(tokenizer, 20, seed=1), part(tokenizer, 30, seed=2)]
    every = names(parts[0].trees) + names(parts[1].trees)
    for test_size, expected in ((0.2, 10), (7, 7), (0.001, 1)):
        train, held_out = hold_out(parts, test_size, seed=0)
        kept, drawn = names(mix(train, 0)), names(mix(held_out, 0))
        assert len(drawn) == expected and Counter(kept + drawn) == Counter(every)
    first, again, other = (names(mix(hold_out(parts, 10, seed=seed)[1], 0)) for seed in (0, 0, 1))
    assert first == again != other
    whole = list(hold_out(parts, 10, seed=0)[1][1].whole())
    assert names(build_trees(whole, tokenizer).trees)[0] in first
    with pytest.raises(ConversationError, match="test_size is 50, but there are only 50 conversations"):
        hold_out(parts, 50, seed=0)


def test_what_is_held_out_does_not_depend_on_what_is_dropped(tokenizer):
    write("data.jsonl", lines(*CONVERSATIONS))
    held_out = []
    for options in ({}, {"max_length": 400, "overlong": "drop"}):
        maker = tree_maker(tokenizer, **options)
        found = prepared(maker)
        whole = Part(open_source("data.jsonl"), maker, found, np.arange(len(found.trees)))
        [rest] = hold_out([whole], 0.5, seed=0)[1]
        held_out.append(set(found.conversation[rest.rows].tolist()))
    assert held_out[1] < held_out[0]


def test_weights_are_proportions_and_each_comes_at_least_once(tokenizer):
    parts = [part(tokenizer, 20, seed=1), part(tokenizer, 30, seed=2)]
    both = [names(p.trees) for p in parts]
    assert names(mix(parts, 0)) == both[0] + both[1]
    for weights, expected in (((2, 1), (60, 30)), ((1, 1), (30, 30)), ((1, 3), (20, 60)), ((0.4, 0.6), (20, 30))):
        weighted = [replace(p, weight=weight) for p, weight in zip(parts, weights)]
        found = Counter(names(mix(weighted, 0)))
        assert tuple(sum(found[name] for name in some) for some in both) == expected
        for some, count in zip(both, expected):
            assert {found[name] for name in some} <= {count // len(some), -(-count // len(some))}
    weighted = [replace(p, weight=1) for p in parts]
    assert names(mix(weighted, 0)) == names(mix(weighted, 0)) != names(mix(weighted, 1))


def test_a_dataset_of_which_nothing_is_left_cannot_have_a_weight(tokenizer):
    """The bug guarded: it was left out, while its share was announced."""
    kept, lost = part(tokenizer, 20, seed=1, weight=1), part(tokenizer, 30, seed=2, weight=3)
    lost = replace(lost, rows=lost.rows[:0])
    with pytest.raises(
        ConversationError, match=r"^seed 2: nothing is left to train on, so it cannot have a weight of 3"
    ):
        mix([kept, lost], 0)
    assert len(mix([replace(kept, weight=None), replace(lost, weight=None)], 0)) == 20
    write("a.jsonl", lines(*CONVERSATIONS))
    write("none.jsonl", "\n")
    weights = {"dataset_weights": [1, 1], "streaming": True}
    loader = Loader(arguments("a.jsonl", "none.jsonl", **weights), tokenizer, {}, demo.tiny_model(tokenizer).config)
    with pytest.raises(ConversationError, match=r"^none\.jsonl: among the first 64 records there is nothing"):
        loader.stream()


def test_the_shares_that_are_told_are_those_that_were_drawn(tokenizer):
    told, parts = [], [part(tokenizer, 3, seed=1, weight=1), part(tokenizer, 3, seed=2, weight=0.6)]
    Loader(arguments("x"), tokenizer, {}, demo.tiny_model(tokenizer).config, tell=told.append).rows(parts)
    assert told[0] == "in an epoch 8 trees: seed 1 62.5% (5), seed 2 37.5% (3)"


def test_interleaved_streams():
    a, b = [f"a{i}" for i in range(40)], [f"b{i}" for i in range(10)]
    mixed = Interleaved([a, b], seed=1)
    assert Counter(mixed) == Counter(a + b) and list(mixed) == list(mixed)
    assert [item for item in mixed if item in a] == a and list(mixed) not in (a + b, b + a)
    assert list(mixed) != list(Interleaved([a, b], seed=2))
    weighted = list(Interleaved([a, b], weights=[1, 3], seed=0))
    assert set(weighted) == {*a, *b} and weighted == list(Interleaved([a, b], weights=[1, 3], seed=0))
    share = sum(item in b for item in weighted) / len(weighted)
    assert 0.6 < share < 0.9
    assert list(Interleaved([[], []], weights=[1, 1])) == list(Interleaved([])) == []


def arguments(*names, **options):
    return DataArguments(list(names), max_tokens=2048, dataset_cache_dir="cache", **options)


def test_datasets_of_the_arguments(tokenizer):
    """Entries with settings of their own, common ones, and what does not go together."""
    own = '{"name": "org/chats", "config": "de", "split": "old", "columns": {"messages": "chat"}, "weight": 0.5}'
    found = arguments("a.jsonl", own, "org/x", dataset_config="en", columns='{"tools": "t"}', dataset_weights=[3, 2, 1])
    assert [(d.name, d.weight, d.config, d.split, d.columns) for d in found.train_datasets()] == [
        ("a.jsonl", 3, None, None, {"tools": "t"}),
        ("org/chats", 2, "de", "old", {"messages": "chat"}),
        ("org/x", 1, "en", None, {"tools": "t"}),
    ]
    found = arguments("org/x", dataset_train_split="a", eval_dataset_name=["a.jsonl", "org/x", "flexmask/generated"])
    assert [d.split for d in found.train_datasets() + found.eval_datasets()] == ["a", None, "test", "test"]
    for options, text in (
        ({"dataset_weights": [1.0]}, "dataset_weights has 1 numbers for 2 datasets"),
        ({"dataset_weights": [1.0, 0.0]}, "the weight of a.jsonl is 0.0, expected a number above 0"),
        ({"columns": "[]"}, r"columns is '\[\]', expected a JSON object"),
        ({"columns": '{"messages": 1}'}, "expected names of columns"),
        ({"columns": '{"mesages": "chat"}'}, "columns has the name 'mesages', expected one of messages, conversations"),
        ({"columns": '{"prompt": "a", "completion": "a"}'}, "expected each column of the records once"),
        ({"test_size": 1.5}, "test_size is 1.5, expected a part between 0 and 1, or a whole number"),
        ({"test_size": 0.1, "streaming": True}, "test_size and streaming exclude each other"),
        ({"test_size": 0.1, "eval_dataset_name": ["b.json"]}, "test_size and eval_dataset_name exclude"),
    ):
        with pytest.raises(ValueError, match=text):
            arguments(own, "a.jsonl", **options)
    with pytest.raises(ValueError, match="some datasets have a weight and some have none"):
        arguments(own, "a.jsonl")
    with pytest.raises(ValueError, match="expected an object with name, weight, config, split, columns"):
        arguments('{"name": "a.jsonl", "size": 3}')
    for entry, text in (
        ('{"name": "a.jsonl", "weight": "2"}', "the weight of a.jsonl is '2', expected a number above 0"),
        ('{"name": "a.jsonl", "weight": true}', "the weight of a.jsonl is True, expected a number above 0"),
        ('{"name": ["a.jsonl"]}', r"the name of dataset \['a.jsonl'\] is \['a.jsonl'\], expected a text"),
        ('{"name": "org/x", "config": 3}', "the config of dataset 'org/x' is 3, expected a text"),
        ('{"name": "a.jsonl", "columns": null}', "columns is null, expected names of columns"),
    ):
        with pytest.raises(ValueError, match=text):
            arguments(entry)


@pytest.mark.parametrize(
    "options",
    [
        {"dataset_train_split": "train[:90%]"},
        {"eval_dataset_name": ["a.jsonl"], "dataset_test_split": "train[90%:]"},
        {"eval_dataset_name": ['{"name": "b.JSON", "split": "train[90%:]"}']},
        {"dataset_config": "en"},
        {"eval_dataset_name": ['{"name": "b.json", "config": "en"}']},
    ],
)
def test_what_a_file_does_not_have_is_refused(options):
    """The bug guarded: ignored, the two splits of a file were the same data, trained and evaluated."""
    with pytest.raises(ValueError, match=r"is a file, which has no split '.*'; leave it out|config.*leave it out"):
        arguments("a.jsonl", **options)


# Streams


def test_workers_and_ranks_share_a_stream(tokenizer):
    """The bug guarded: every worker of a DataLoader gave all rows, so that everything was trained twice."""
    trees = build_trees(CONVERSATIONS, tokenizer).trees
    stream = pack_stream(trees, 2048, buffer_size=4)

    def passes(rows):
        return Counter(p.input_ids.tobytes() for row in rows for p in row.passes())

    expected = passes(trees)
    assert passes(stream) == expected == passes(stream), "each epoch again"
    loader = DataLoader(stream, batch_size=None, num_workers=2)
    assert passes(loader) == expected
    shares = []
    for rank in range(3):
        stream.for_rank(rank, 3)
        shares.append(passes(stream))
        assert shares[-1] == passes(trees[rank::3]) == passes(loader)
    assert sum(shares, Counter()) == expected


@pytest.mark.parametrize("workers", [0, 2])
def test_a_stream_counts_what_it_reads_and_drops(tokenizer, workers):
    """In the memory of the process that asks, whichever process reads."""
    write("data.jsonl", lines(*CONVERSATIONS))
    limits = {"max_length": 400, "overlong": "drop"}
    expected = prepared(tree_maker(tokenizer, **limits))
    assert expected.dropped
    items = TreeStream(open_source("data.jsonl", streaming=True), tree_maker(tokenizer, **limits))
    stream = RowStream(items, 2048, make=operator.call)
    loader = DataLoader(stream, batch_size=None, num_workers=workers)
    assert sum(row.num_passes for row in loader) == expected.passes - expected.passes_lost
    assert str(Counts.of(stream.counted)) == str(expected)
    # The bug guarded: an epoch that was not over when the training ended hid what earlier ones had dropped.
    next(iter(loader))
    assert Counts.of(stream.counted).dropped >= expected.dropped
    stream = RowStream(items, 2048, make=operator.call)
    for epoch in (1, 2):
        list(DataLoader(stream, batch_size=None, num_workers=workers))
        counts = Counts.of(stream.counted)
        assert (counts.conversations, counts.dropped) == (24 * epoch, expected.dropped * epoch)


@pytest.mark.parametrize("workers", [0, 2, 4])
@pytest.mark.parametrize("shards", [1, 4])
def test_a_hub_stream_in_shards_gives_every_record_once(tokenizer, workers, shards):
    """The bug guarded: in a DataLoader worker it gives that worker's shards, of which every n-th record was taken."""
    talks = [{"messages": c["messages"]} for c in CONVERSATIONS]
    rows = datasets.Dataset.from_list(talks).to_iterable_dataset(num_shards=shards)
    stream = RowStream(TreeStream(HubDataset("org/x", rows), tree_maker(tokenizer)), 2048, make=operator.call)
    loader = DataLoader(stream, batch_size=None, num_workers=workers)
    found = Counter(p.input_ids.tobytes() for row in loader for p in row.passes())
    built = build_trees(CONVERSATIONS, tokenizer).trees
    assert found == Counter(p.input_ids.tobytes() for tree in built for p in tree.passes())
    assert stream.counted["conversations"] == 24


def test_whatever_fails_while_a_hub_stream_is_read_is_told():
    """The bug guarded: only an OSError was; the errors of a network are of many kinds."""

    def rows():
        yield GOOD
        raise RuntimeError("timed\nout")

    source = HubDataset("org/x", datasets.IterableDataset.from_generator(rows))
    with pytest.raises(ConversationError, match=r"^org/x: reading it from the hub failed: RuntimeError: timed out$"):
        list(source.stream())


def test_the_stream_of_the_arguments(tokenizer):
    write("a.jsonl", lines(*CONVERSATIONS[:20]))
    write("b.json", json.dumps(CONVERSATIONS[20:]))
    loader = Loader(arguments("a.jsonl", "b.json", streaming=True), tokenizer, {}, demo.tiny_model(tokenizer).config)
    stream, trees, whole = loader.stream()
    assert len(trees) == len(whole) == 24
    found = Counter(p.input_ids.tobytes() for row in stream for p in row.passes())
    built = build_trees(CONVERSATIONS, tokenizer).trees
    assert found == Counter(p.input_ids.tobytes() for tree in built for p in tree.passes())
    loader = Loader(
        arguments("a.jsonl", streaming=True, max_samples=3), tokenizer, {}, demo.tiny_model(tokenizer).config
    )
    assert sum(row.num_passes for row in loader.stream()[0]) == sum(built.num_passes[:3])
    write("none.jsonl", "\n")
    loader = Loader(arguments("none.jsonl", streaming=True), tokenizer, {}, demo.tiny_model(tokenizer).config)
    with pytest.raises(
        ConversationError, match=r"none\.jsonl: among the first 64 records there is nothing to train on"
    ):
        loader.stream()


def test_records_of_others_are_not_parsed():
    """Each of many processes reads the whole file, but parses its own lines only."""
    write("data.jsonl", '{"a": 1}\nno JSON\n')
    own, other = open_source("data.jsonl").stream()
    assert own() == ("data.jsonl:1", {"a": 1})
    with pytest.raises(ConversationError, match=r"data\.jsonl:2:1: malformed JSON"):
        other()


def test_counts_of_many_names_fit():
    """Keys that nobody reads can be any number. The bug guarded: with them, all counts were lost."""
    names = Counter({f"ignored: {'k' * 50}{i}": 1 for i in range(500)}) | Counter(dict(KNOWN))
    names["ignored: often"] = 3
    tree = TokenTree.from_passes([Pass([1, 2, 3], [False, True, True])])
    stream = RowStream([1, 2], 100, make=lambda item: (tree, names))
    assert len(list(stream)) == 1
    assert {name: stream.counted[name] for name in KNOWN} == {name: 2 * count for name, count in KNOWN.items()}
    counts = Counts.of(stream.counted)
    assert counts.dropped == 10**6 and counts.ignored["often"] == 6 and sum(counts.ignored.values()) == 1006
    assert counts.ignored["others"] > 700 and len(counts.ignored) > 30


KNOWN = {"conversations": 10**6, "dropped": 5 * 10**5, "passes": 10**9, "targets_lost": 10**9, "note: of everything": 7}

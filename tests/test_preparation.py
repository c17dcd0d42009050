"""Datasets prepared once and kept, mixed, held out; and as streams."""

import json
import multiprocessing
import operator
import os
import pickle
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from unittest.mock import patch

import datasets
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_data import ANSWER, USER, lines, same_trees, write
from torch.utils.data import DataLoader
from transformers import AutoTokenizer

from flexmask import ConversationError, TokenTree, data, demo, pack, pack_stream
from flexmask.arguments import DataArguments
from flexmask.data import Counts, build_trees, load_conversations, prepare, tree_maker
from flexmask.loading import Loader, Part, TreeStream, hold_out, mix
from flexmask.packing import RowStream
from flexmask.sources import InMemory, Interleaved, open_source

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
    return patch.object(data, "_write", side_effect=AssertionError("made again"))


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
        "from transformers import AutoTokenizer; from flexmask.data import prepare, tree_maker, _write; "
        "from flexmask.sources import open_source; import flexmask.data; flexmask.data._write = None; "
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
    with nothing_is_made():
        assert prepared(tree_maker(tokenizer)).path == paths[0]
    monkeypatch.setattr(data, "_code", lambda: "of another version")
    changed(tree_maker(tokenizer))


def test_options_that_are_no_json_cannot_be_kept(tokenizer):
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


def test_of_several_processes_one_prepares(tokenizer):
    write("data.jsonl", lines(*CONVERSATIONS))
    fork = multiprocessing.get_context("fork")
    queue, started, write_it = fork.SimpleQueue(), fork.Barrier(3), data._write

    def make(*given):
        queue.put("made")
        return write_it(*given)

    def run():
        started.wait()
        queue.put(len(prepared(tree_maker(tokenizer)).trees))

    with patch.object(data, "_write", make):
        processes = [fork.Process(target=run) for _ in range(3)]
        for process in processes:
            process.start()
        for process in processes:
            process.join(timeout=60)
    assert Counter(queue.get() for _ in range(4)) == {"made": 1, 24: 3} and queue.empty()


def test_trees_stay_on_disk(tokenizer):
    """The bug guarded: a second copy of all trees, in rows. Planning rows reads lengths only, and another process maps the
    file again instead of being sent it."""
    write("data.jsonl", lines(*CONVERSATIONS))
    trees = prepared(tree_maker(tokenizer)).trees
    longest = int(trees.lengths.max())
    with patch.object(data._Columns, "tree", side_effect=AssertionError("read")):
        rows = pack(trees, longest)
        sent = pickle.dumps(rows)
    assert len(sent) < 20_000 < os.stat(next(trees._columns.parts[0].parent.iterdir())).st_size
    assert same_trees(list(pickle.loads(sent)), list(rows))
    assert sum(rows.lengths) == sum(trees.lengths) and [len(row) for row in rows] == rows.lengths.tolist()
    assert same_trees(trees[3:5], [trees[3], trees[4]]) and trees[-1].num_passes == trees.num_passes[-1]
    with pytest.raises(IndexError):
        trees[24]
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
        ("a.jsonl", 3, None, "train", {"tools": "t"}),
        ("org/chats", 2, "de", "old", {"messages": "chat"}),
        ("org/x", 1, "en", "train", {"tools": "t"}),
    ]
    for options, text in (
        ({"dataset_weights": [1.0]}, "dataset_weights has 1 numbers for 2 datasets"),
        ({"dataset_weights": [1.0, 0.0]}, "the weight of a.jsonl is 0.0, expected a number above 0"),
        ({"columns": "[]"}, r"columns is '\[\]', expected a JSON object"),
        ({"columns": '{"messages": 1}'}, "expected names of columns"),
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
    for _ in range(2):
        rows = list(DataLoader(stream, batch_size=None, num_workers=workers))
        assert str(Counts.of(stream.counted)) == str(expected)
        assert sum(row.num_passes for row in rows) == expected.passes - expected.passes_lost


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
    """Keys that nobody reads can be any number."""
    names = Counter({f"ignored: {'k' * 50}{i}": 1 for i in range(500)})
    tree = TokenTree.from_passes(build_trees_passes())
    stream = RowStream([1, 2], 100, make=lambda item: (tree, names))
    assert len(list(stream)) == 1 and stream.counted.total() == 1000


def build_trees_passes():
    from flexmask import Pass

    return [Pass([1, 2, 3], [False, True, True])]

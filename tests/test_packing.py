import dataclasses
import time
from collections import Counter
from itertools import pairwise
from unittest.mock import patch

import datasets
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import conversation_passes, random_passes
from templates import TOOL_LOOP, TOOLS, answer, tokenizer, user

from flexmask import OnePassCollator, Pass, TokenTree, pack, pack_stream, packing, render_passes, split


def chain(length, first=1):
    return TokenTree.from_passes([Pass(np.full(length, first), np.arange(length) > 0)])


def contents(rows):
    """The trees of all rows, as multisets of their tokens in order."""
    trees = []
    for row in rows:
        start = 0
        while start < len(row):
            end = int(row.subtree_end[start])
            trees.append(tuple(row.input_ids[start:end]))
            start = end
    return sorted(trees)


@settings(deadline=None, max_examples=100)
@given(st.lists(st.integers(2, 50), min_size=1, max_size=40), st.integers(50, 120))
def test_packing_loses_nothing_and_respects_the_budget(lengths, max_tokens):
    trees = [chain(n, first=i) for i, n in enumerate(lengths)]
    for rows in (pack(trees, max_tokens), list(pack_stream(iter(trees), max_tokens, buffer_size=7))):
        assert all(len(row) <= max_tokens for row in rows)
        assert contents(rows) == contents(trees)
        assert sum(row.num_targets for row in rows) == sum(tree.num_targets for tree in trees)
    rows = pack(trees, max_tokens)
    assert sum(len(row) <= max_tokens / 2 for row in rows) <= 1, "two half-empty rows would have been one"


def test_a_stream_keeps_its_order():
    """The bug guarded: rows came out longest first, so that a step's length told its place in the buffer."""
    trees = [chain(n, first=i) for i, n in enumerate([30, 60, 95, 20, 100, 40, 99])]
    firsts = [int(row.input_ids[0]) for row in pack_stream(iter(trees), 100, buffer_size=100)]
    assert firsts == sorted(firsts)


def test_best_fit_fills_exactly_where_it_can():
    trees = [chain(n) for n in (60, 40, 70, 30, 50, 50)]
    rows = pack(trees, 100)
    assert [len(row) for row in rows] == [100, 100, 100]


def test_padding_is_small_on_many_conversations():
    rng = np.random.default_rng(0)
    trees = [TokenTree.from_passes(conversation_passes(rng, rng.integers(1, 8), 20, 30, 10)) for _ in range(400)]
    fewest = -(-sum(map(len, trees)) // 2048)
    assert len(pack(trees, 2048)) <= fewest + 1
    assert len(list(pack_stream(iter(trees), 2048, buffer_size=64))) <= fewest + 2


def test_a_pass_longer_than_a_row_is_an_error():
    with pytest.raises(ValueError, match=r"tree 1: pass 0 has 30 tokens, more than the 20 of a row \(max_tokens\)"):
        pack([chain(10), chain(30)], 20)


def prefixes(ids):
    return {tuple(map(int, ids[: n + 1])) for n in range(len(ids))}


def weights_by_path(tree):
    """Path from the root -> summed weight, of every supervised token."""
    found = Counter()
    for p in tree.passes():
        for n in np.flatnonzero(p.loss_mask):
            found[tuple(p.input_ids[: n + 1].tolist())] += p.token_weight[n]
    return found


def partitions(items):
    """All ways to put items into groups."""
    if not items:
        yield []
        return
    for rest in partitions(items[1:]):
        yield [[items[0]], *rest]
        for i in range(len(rest)):
            yield [*rest[:i], [items[0], *rest[i]], *rest[i + 1 :]]


@settings(deadline=None, max_examples=60)
@given(st.integers(0, 2**32 - 1), st.integers(1, 6), st.floats(0, 1))
def test_a_split_has_the_fewest_parts_and_of_those_the_fewest_tokens(seed, num_passes, generosity):
    """Against every partition of the passes, counted in sets of prefixes."""
    passes = random_passes(np.random.default_rng(seed), num_passes)
    tree = TokenTree.from_passes(passes)
    longest = max(len(p.input_ids) for p in passes)
    budget = round(longest + generosity * (len(tree) - longest))
    if len(tree) > budget:
        passes = [p for p in passes if any(p.loss_mask)]
    sets = [prefixes(p.input_ids) for p in passes]
    best = min(
        (len(groups), sum(sizes))
        for groups in partitions(list(range(len(passes))))
        if max(sizes := [len(set.union(*(sets[i] for i in group))) for group in groups]) <= budget
    )
    parts = split(tree, budget)
    assert (len(parts), sum(map(len, parts))) == best


@settings(deadline=None, max_examples=100)
@given(st.integers(0, 2**32 - 1), st.integers(1, 40), st.floats(0, 1), st.booleans())
def test_a_split_loses_nothing(seed, num_passes, generosity, forest):
    """Every supervised token of every pass once, with its weight; for many passes and for forests too. What nothing is
    trained of is left out where a tree is split, and no part is without targets."""
    rng = np.random.default_rng(seed)
    passes = [dataclasses.replace(p, weight=rng.integers(1, 5) / 4) for p in random_passes(rng, num_passes)]
    tree = TokenTree.from_passes(passes)
    if forest:
        tree = TokenTree.concat([tree, TokenTree.from_passes(random_passes(rng, 3))])
    longest = tree.max_length
    budget = round(longest + generosity * (len(tree) - longest))
    parts = split(tree, budget)
    assert all(len(part) <= budget for part in parts)
    assert sum(map(weights_by_path, parts), Counter()) == weights_by_path(tree)
    was_split = len(tree) > budget
    assert not was_split or all(part.target_weight.any() for part in parts)
    found = Counter(tuple(p.input_ids.tolist()) for part in parts for p in part.passes())
    passes = [p for p in tree.passes() if not was_split or np.any(p.token_weight)]
    assert found == Counter(tuple(p.input_ids.tolist()) for p in passes)


def test_a_part_of_untrained_passes_alone_is_not_made():
    """The bug guarded: its row had no targets, and stopped the training."""
    mask = np.array([0, 0, 0, 0, 1, 1], bool)
    passes = [Pass([1, 2, 3, n, n, n], mask & (n != 9)) for n in (7, 8, 9)] + [Pass([1, 2, 3, 6, 6, 6], mask, 0.0)]
    tree = TokenTree.from_passes(passes)
    assert [part.num_passes for part in split(tree, 6)] == [1, 1] and split(tree, len(tree)) == [tree]
    too_long = [*passes[:2], Pass(np.arange(50), np.zeros(50))]
    assert [part.num_passes for part in split(TokenTree.from_passes(too_long), 9)] == [2]
    with pytest.raises(ValueError, match="tree 0: no pass has a target with a weight"):
        pack([TokenTree.from_passes(passes[2:])], 6)


@settings(deadline=None, max_examples=60)
@given(st.integers(0, 2**32 - 1), st.integers(2, 7), st.floats(0, 1))
def test_beyond_the_exact_search_it_is_the_better_of_two(seed, num_passes, generosity):
    """On trees small enough to count: no worse than any cut of the leaves in their order, and at times as good as greedy."""
    rng = np.random.default_rng(seed)
    tree = TokenTree.from_passes(random_passes(rng, num_passes))
    budget = round(tree.max_length + generosity * (len(tree) - tree.max_length))
    if len(tree) <= budget or not tree.target_weight.any():
        return
    best = split(tree, budget)
    with patch.object(packing, "EXACT_LEAVES", 0):
        found = split(tree, budget)
    # Leaves in the order of the row, which is that of the places of their last tokens.
    sets = [prefixes(p.input_ids) for p in sorted_leaves(tree)]
    cuts = (
        [sets[a:b] for a, b in pairwise([0, *(i + 1 for i in range(len(sets) - 1) if ends >> i & 1), len(sets)])]
        for ends in range(2 ** (len(sets) - 1))
    )
    sizes = ([len(set.union(*group)) for group in groups] for groups in cuts)
    ordered = min((len(s), sum(s)) for s in sizes if max(s) <= budget)
    assert (len(best), sum(map(len, best))) <= (len(found), sum(map(len, found))) <= ordered
    assert sum(map(weights_by_path, found), Counter()) == weights_by_path(tree)


def sorted_leaves(tree):
    """The trained passes that no other goes on from, in the order of the row."""
    passes = [p for p in tree.passes() if np.any(p.token_weight)]
    if passes and len(passes) < tree.num_passes:
        return sorted_leaves(TokenTree.from_passes(passes))
    last = {int(path[-1]): p for path, p in zip(tree.paths(), tree.passes())}
    starts = {tuple(map(int, p.input_ids[:n])) for p in passes for n in range(len(p.input_ids))}
    return [last[place] for place in sorted(last) if tuple(map(int, last[place].input_ids)) not in starts]


def test_greedy_fills_gaps_that_no_cut_in_order_can():
    """Branches of 6, 5, 4 and 3 tokens, in this order, in parts of 9 and a common token: 6 with 3, 5 with 4."""
    passes = [Pass([0] + [n] * n, np.arange(n + 1) > 0) for n in (3, 4, 5, 6)]
    with patch.object(packing, "EXACT_LEAVES", 0):
        assert [len(part) for part in split(TokenTree.from_passes(passes), 10)] == [10, 10]


def test_one_part_is_one_pass_and_a_part_for_each_is_n_pass():
    passes = conversation_passes(np.random.default_rng(0), 4, 5, 30, 10)
    tree = TokenTree.from_passes(passes)
    assert split(tree, len(tree)) == [tree]
    parts = split(tree, max(len(p.input_ids) for p in passes))
    assert sorted(len(part) for part in parts) == sorted(len(p.input_ids) for p in passes)


def test_a_tree_of_hundreds_of_branches_is_split_and_packed_well():
    """Beyond the exact search: a trunk of 20,000 tokens with 400 branches, 110,000 in all, in rows of 32,768."""
    rng = np.random.default_rng(0)
    trunk = rng.integers(0, 1000, 20_000)
    forks = np.sort(rng.integers(100, 20_000, 400))
    passes = []
    for at in forks:
        branch = rng.integers(0, 1000, rng.integers(50, 400))
        passes.append(Pass(np.append(trunk[:at], branch), np.arange(at + len(branch)) >= at))
    start = time.perf_counter()
    tree = TokenTree.from_passes(passes)
    assert time.perf_counter() - start < 1 and len(tree) > 100_000
    start = time.perf_counter()
    rows = pack([tree], 32_768)
    assert time.perf_counter() - start < 2
    branches = len(tree) - 20_000
    fewest = -(-branches // (32_768 - forks[0]))  # each part holds some trunk
    assert len(rows) <= fewest + 3
    assert sum(map(len, rows)) < len(tree) + (len(rows) - 1) * 20_000 * 0.6


class StubTokenizer:
    pad_token_id = 7

    def __len__(self):
        return 1000


def test_batch_of_one_row():
    tree = TokenTree.from_passes(conversation_passes(np.random.default_rng(0), 3, 20, 30, 10))
    batch = OnePassCollator(StubTokenizer(), pad_to_multiple_of=64)([tree, tree])
    length = 2 * len(tree)
    padded = batch["input_ids"].shape[1]
    assert padded % 64 == 0 and padded - length < 64
    assert set(batch) == {"input_ids", "position_ids", "subtree_end", "logits_to_keep", "labels", "shift_labels"}
    assert batch["subtree_end"].dtype == torch.int32 and batch["subtree_end"].shape == (1, padded)
    assert (batch["input_ids"][0, length:] == 7).all()
    assert batch["subtree_end"][0, length:].tolist() == list(range(length + 1, padded + 1))
    assert batch["logits_to_keep"].shape == (2 * tree.num_targets,)
    assert batch["labels"].shape == batch["shift_labels"].shape == (1, 2 * tree.num_targets)
    assert batch["logits_to_keep"].max() < length
    for name, tensor in batch.items():
        assert tensor.is_contiguous() and tensor.dtype in (torch.int64, torch.int32), name


def test_trees_columns_and_packed_rows_give_the_same_batch():
    rng = np.random.default_rng(0)
    trees = [TokenTree.from_passes(conversation_passes(rng, n, 20, 30, 10)) for n in (3, 1, 2)]
    collator = OnePassCollator(StubTokenizer())
    [row] = pack(trees, 4096)
    columns = [{name: column.tolist() for name, column in tree.to_dict().items()} for tree in trees]
    batches = [collator(trees), collator(columns), collator([row])]
    for name in batches[0]:
        assert torch.equal(batches[0][name], batches[1][name])
        assert torch.equal(batches[0][name], batches[2][name])


def test_raw_conversations_and_rows_of_a_dataset_give_the_same_batch():
    """The bug guarded: Arrow fills the keys that a tool call lacks with nulls, and a template would render them."""
    other = [user("Q"), answer("", tool_calls=[{"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}])]
    conversations = [{"messages": TOOL_LOOP, "tools": TOOLS}, {"messages": other, "tools": TOOLS}]
    collator = OnePassCollator(tokenizer("qwen3"))
    expected = collator(conversations)
    rows = datasets.Dataset.from_list(conversations)
    assert any("'x': None" in repr(row) for row in rows)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in collator(list(rows)).items())
    trees = [
        TokenTree.from_passes(render_passes(c["messages"], tokenizer("qwen3"), tools=TOOLS)) for c in conversations
    ]
    assert all(torch.equal(tensor, expected[name]) for name, tensor in collator(trees).items())
    mapped = rows.map(lambda row: collator.tree(row).to_dict(), remove_columns=rows.column_names, num_proc=2)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in collator(list(mapped)).items())


@pytest.mark.parametrize(
    "examples, options, text",
    [
        (
            [chain(40), chain(40)],
            {"max_tokens": 64},
            "a batch of 2 has 80 tokens, a row has 64 .max_tokens.; use a smaller",
        ),
        ([chain(80)], {"max_tokens": 64}, "row has 64 .max_tokens.; pack the dataset .* longest pass, .*, has 80"),
        ([chain(40)], {"max_length": 30}, "example 0 of the batch: the longest pass has 40 tokens.*max_length"),
        ([chain(4), chain(4, first=1000)], {}, "example 1 of the batch: token id 1000 is outside"),
        ([{"text": "hello"}], {}, r"example 0 of the batch: has the keys text, expected messages"),
        ([TokenTree.from_passes([Pass([1, 2], [False, False])])], {}, "no targets"),
        ([TokenTree.from_passes([Pass([1, 2], [False, True], 0.0)])], {}, "no targets, or none with a weight"),
        ([{"subtree_end": [1]}], {}, "example 0 of the batch: a pre-tokenised tree lacks the columns"),
    ],
)
def test_bad_batches(examples, options, text):
    with pytest.raises(ValueError, match=text):
        OnePassCollator(StubTokenizer(), **options)(examples)

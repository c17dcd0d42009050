import time
from collections import Counter
from dataclasses import replace
from itertools import pairwise
from unittest.mock import patch

import datasets
import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from reference import conversation_passes, random_passes
from templates import TOOL_LOOP, TOOLS, answer, tokenizer, user

from flexmask import OnePassCollator, Pass, TokenTree, pack, pack_stream, render_passes, split
from flexmask.packing import sharing, splitting
from flexmask.tree import LOSS_REDUCTIONS


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


# Trees that begin alike


def passes_of(trees):
    """Every pass, with the weights of its supervised tokens: what packing may not change."""
    return Counter(
        (tuple(p.input_ids.tolist()), tuple(np.flatnonzero(p.loss_mask)), tuple(p.token_weight.tolist()))
        for tree in trees
        for p in tree.passes()
    )


@settings(deadline=None, max_examples=150)
@given(st.integers(0, 2**32 - 1), st.integers(1, 12), st.floats(0, 2), st.integers(1, 4), st.booleans())
@example(
    497, 6, 0.25, 2, True
)  # what two trees of an open row have in common counted twice, and the next row was too long
def test_trees_that_begin_alike_become_one(seed, count, generosity, least, streamed):
    """Against sets of prefixes: no pass, target or weight changes, no row is too long, none is longer than was planned, and
    nothing that shares enough is there twice in a row."""
    rng = np.random.default_rng(seed)
    trees = [
        TokenTree.from_passes(
            [replace(p, weight=rng.integers(0, 5) / 4) for p in random_passes(rng, rng.integers(1, 4))]
        )
        for _ in range(count)
    ]
    trees += [trees[i] for i in rng.integers(0, count, rng.integers(0, 3))]  # some twice
    budget = round(max(map(len, trees)) * (1 + generosity))
    with patch.object(sharing, "LEAST_SHARED", least):
        if streamed:
            rows = list(pack_stream(trees, budget, buffer_size=4))
        else:
            rows = pack(trees, budget)
            assert rows.shared == sum(map(len, trees)) - sum(rows.lengths)
            assert all(len(row) <= planned for row, planned in zip(rows, rows.lengths, strict=True))
    assert all(len(row) <= budget for row in rows)
    assert passes_of(rows) == passes_of(trees)
    assert np.isclose(sum(r.target_weight.sum() for r in rows), sum(t.target_weight.sum() for t in trees))
    for row in rows:
        beginnings = Counter()
        for start in np.flatnonzero(row.position_ids == 0):
            tree = row.trunk if start == 0 else row.input_ids[start : row.subtree_end[start]]
            beginnings[tuple(tree[:least].tolist())] += (
                len(tree[:least]) == least and row.subtree_end[start] > start + 1
            )
        assert least > 1 or max(beginnings.values()) == 1


def test_a_common_tree_is_that_of_all_passes():
    rng = np.random.default_rng(0)
    conversations = [random_passes(rng, 4) for _ in range(3)]
    trees = [TokenTree.from_passes(passes) for passes in conversations]
    merged, expected = TokenTree.merge(trees), TokenTree.from_passes([p for passes in conversations for p in passes])
    for name, column in expected.to_dict().items():
        assert (getattr(merged, name) == column).all(), name


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("loss_reduction", LOSS_REDUCTIONS)
def test_a_common_tree_is_that_of_the_passes_of_its_trees(seed, loss_reduction):
    """Also of passes with weights, or without a target, of equal trees, and of a forest."""
    rng = np.random.default_rng(seed)
    conversations = []
    for _ in range(3):
        passes = [replace(p, weight=float(rng.choice([0, 1 / 3, 2]))) for p in random_passes(rng, 4)]
        passes.append(replace(passes[0], loss_mask=np.zeros(len(passes[0].input_ids), bool)))
        conversations.append(passes)
    trees = [TokenTree.from_passes(passes, loss_reduction=loss_reduction) for passes in conversations]
    trees += [trees[0], TokenTree.concat(trees[1:])]
    merged, expected = TokenTree.merge(trees), TokenTree.from_passes([p for tree in trees for p in tree.passes()])
    for name, column in expected.to_dict().items():
        np.testing.assert_array_equal(getattr(merged, name), column, err_msg=name, strict=True)


def beginning_with(beginning, *lengths):
    """Conversations of one pass that go on from there with tokens of their own."""
    first = 1000
    for n in lengths:
        first += 1
        yield TokenTree.from_passes([Pass(np.append(beginning, np.full(n, first)), np.arange(len(beginning) + n) > 0)])


def test_those_that_share_most_come_together():
    """Samples of three prompts, which have a system prompt in common, in rows for the samples of one prompt. The bug guarded:
    by size alone a row has some of each."""
    system = np.arange(200)
    trees = [t for k in range(3) for t in beginning_with(np.append(system, np.full(300, 500 + k)), 50, 60, 70)]
    trees = [trees[i] for i in (0, 3, 6, 1, 4, 7, 2, 5, 8)]
    rows = pack(trees, 700)
    assert [len(row) for row in rows] == [680] * 3 == rows.lengths.tolist()
    assert rows.shared == 3 * 2 * 500
    [row] = pack(trees, 2000)
    assert len(row) == 200 + 3 * (300 + 50 + 60 + 70)


def test_branches_in_common_count():
    """Two answers to the last of several turns: everything before, thoughts included, is there once, and is planned so."""
    passes = conversation_passes(np.random.default_rng(0), 5, 60, 150, 40)
    trees = []
    for k in range(3):
        last = np.append(np.asarray(passes[-1].input_ids)[:-90], np.full(90, 2000 + k))
        trees.append(TokenTree.from_passes([*passes[:-1], replace(passes[-1], input_ids=last)]))
    expected = len(trees[0]) + 2 * 90
    rows = pack(trees, expected)
    assert [len(row) for row in rows] == [expected] == rows.lengths.tolist()
    # Each conversation weighs what it weighs alone, and what they have in common weighs three times as much.
    assert rows[0].target_weight.sum() == sum(t.target_weight.sum() for t in trees)
    assert sorted(set(rows[0].target_weight.tolist())) == [1, 3]


@settings(deadline=None, max_examples=100)
@given(st.integers(0, 2**32 - 1))
def test_tokens_with_the_same_ancestors_are_told_from_all_others(seed):
    rng = np.random.default_rng(seed)
    conversations = [random_passes(rng, 5) for _ in range(2)]
    found = [sharing._identities(TokenTree.from_passes(passes)).tolist() for passes in conversations]
    expected = [set.union(*(prefixes(p.input_ids) for p in passes)) for passes in conversations]
    assert [len(set(of)) for of in found] == list(map(len, found)) == list(map(len, expected))
    assert len(set.union(*map(set, found))) == len(set.union(*expected))


def test_a_short_common_beginning_is_left_alone():
    few = list(beginning_with(np.arange(sharing.LEAST_SHARED - 1), 50, 60))
    [row] = pack(few, 1000)
    assert len(row) == sum(map(len, few)) and contents([row]) == contents(few)
    enough = list(beginning_with(np.arange(sharing.LEAST_SHARED), 50, 60))
    [row] = pack(enough, 1000)
    assert len(row) == sum(map(len, enough)) - sharing.LEAST_SHARED


def test_visible_pairs_of_rows():
    rng = np.random.default_rng(0)
    trees = [TokenTree.from_passes(random_passes(rng, 4, vocab=50)) for _ in range(5)]
    for row in (rows := pack(trees, 60)):
        expected = sum(len(prefixes(path)) for path in (row.input_ids[: n + 1] for n in row.position_ids))
        assert row.visible_pairs == expected
    assert rows.visible_pairs.tolist() == [row.visible_pairs for row in rows]
    large = TokenTree.from_passes(conversation_passes(rng, 5, 20, 50, 20))
    parts = pack([large], len(large) - 1)
    assert len(parts) == 2 and parts.visible_pairs.sum() > large.visible_pairs


def test_parts_of_a_tree_share_with_other_conversations():
    passes = conversation_passes(np.random.default_rng(0), 6, 200, 300, 50)
    large, small = TokenTree.from_passes(passes), TokenTree.from_passes(passes[:1])
    rows = pack([small, large], len(large) - 1)
    assert rows.split == 1 and passes_of(rows) == passes_of([small, large])
    assert rows.shared == len(small) and sum(map(len, rows)) == sum(map(len, split(large, len(large) - 1)))


def test_examples_of_a_batch_share_their_beginning():
    trees = list(beginning_with(np.arange(300), 50, 60))
    batch = OnePassCollator(StubTokenizer(2000), pad_to_multiple_of=1)(trees)
    assert batch["input_ids"].shape == (1, 300 + 50 + 60)
    assert batch["target_weight"].sum() == sum(tree.target_weight.sum() for tree in trees)


def test_many_trees_are_planned_in_time():
    """20,000 conversations behind one system prompt, in a tenth of the minute that 200,000 may take."""
    trees = list(beginning_with(np.arange(300), *np.random.default_rng(0).integers(50, 400, 20_000).tolist()))
    start = time.perf_counter()
    rows = pack(trees, 8192)
    assert time.perf_counter() - start < 6
    fewest = -(-sum(len(tree) - 300 for tree in trees) // (8192 - 300))
    assert len(rows) <= fewest * 1.01


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
        if not passes:
            return  # nothing to train, which is an error
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
    passes = [replace(p, weight=rng.integers(1, 5) / 4) for p in random_passes(rng, num_passes)]
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
    with patch.object(splitting, "EXACT_LEAVES", 0):
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
    with patch.object(splitting, "EXACT_LEAVES", 0):
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

    def __init__(self, size=1000):
        self.size = size

    def __len__(self):
        return self.size


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
        ([chain(80)], {"max_tokens": 64}, "row has 64 .max_tokens.; raise max_tokens; the longest pass, .*, has 80"),
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

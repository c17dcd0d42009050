import time

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import conversation_passes, random_passes

from flexmask import Pass, TokenTree


def paths(tree):
    """For every token the tuple of tokens from its root down to it, walking subtree ends one token at a time."""
    open_tokens, result = [], []
    for k in range(len(tree)):
        while open_tokens and tree.subtree_end[open_tokens[-1]] <= k:
            open_tokens.pop()
        open_tokens.append(k)
        result.append(tuple(int(tree.input_ids[i]) for i in open_tokens))
    return result


@settings(deadline=None, max_examples=200)
@given(st.integers(0, 2**32 - 1), st.integers(1, 9))
def test_tree_is_the_prefix_tree_of_its_passes(seed, num_passes):
    passes = random_passes(np.random.default_rng(seed), num_passes)
    tree = TokenTree.from_passes(passes)
    found = paths(tree)

    prefixes = {tuple(map(int, p.input_ids[: n + 1])) for p in passes for n in range(len(p.input_ids))}
    assert len(found) == len(set(found)) and set(found) == prefixes, "every prefix once"
    assert [len(path) - 1 for path in found] == tree.position_ids.tolist()
    assert tree.max_length == max(len(p.input_ids) for p in passes)

    # Every supervised token of every pass is a target, read at its parent, with the weights of all its passes.
    place = {path: k for k, path in enumerate(found)}
    expected = {}
    for p in passes:
        for n in np.flatnonzero(p.loss_mask):
            path = tuple(map(int, p.input_ids[: n + 1]))
            expected[place[path]] = expected.get(place[path], 0) + p.weight
    assert tree.target_weight.tolist() == [expected[k] for k in sorted(expected)]
    assert tree.target_ids.tolist() == [found[k][-1] for k in sorted(expected)]
    assert tree.target_index.tolist() == [place[found[k][:-1]] for k in sorted(expected)]

    values = np.array(sorted(expected))
    for p, of_pass in zip(passes, tree.per_pass(values), strict=True):
        assert [found[k] for k in of_pass] == [
            tuple(map(int, p.input_ids[: n + 1])) for n in np.flatnonzero(p.loss_mask)
        ]


@settings(deadline=None, max_examples=50)
@given(st.integers(0, 2**32 - 1))
def test_heaviest_child_comes_first(seed):
    tree = TokenTree.from_passes(random_passes(np.random.default_rng(seed), 8))
    found = paths(tree)
    children = {}
    for k, path in enumerate(found):
        children.setdefault(path[:-1], []).append(int(tree.subtree_end[k]) - k)
    for sizes in children.values():
        assert sizes == sorted(sizes, reverse=True)


def test_history_is_one_contiguous_trunk():
    tree = TokenTree.from_passes(conversation_passes(np.random.default_rng(0), 5, h=10, t=7, r=4))
    trunk = (10 + 4) * 4 + 10  # h_1 r_1 … h_5
    assert tree.position_ids[:trunk].tolist() == list(range(trunk))
    assert len(tree) == 5 * (10 + 7 + 4) + 4 * 4, "responses twice but for the last"


def test_order_of_passes_does_not_change_the_tokens_stored():
    passes = random_passes(np.random.default_rng(3), 9)
    assert len(TokenTree.from_passes(passes)) == len(TokenTree.from_passes(passes[::-1]))


def test_passes_without_a_common_first_token_give_a_forest():
    tree = TokenTree.from_passes([Pass([1, 2], [False, True]), Pass([3, 4, 5], [False, True, True])])
    assert tree.input_ids.tolist() == [3, 4, 5, 1, 2]
    assert tree.subtree_end.tolist() == [3, 3, 3, 5, 5]


def test_token_supervised_twice_is_one_target_with_both_weights():
    passes = [Pass([1, 2], [False, True], 1.0), Pass([1, 2, 3], [False, True, True], 0.5)]
    tree = TokenTree.from_passes(passes)
    assert tree.target_weight.tolist() == [1.5, 0.5]
    assert [x.tolist() for x in tree.per_pass(torch.tensor([10.0, 20.0]))] == [[10.0], [10.0, 20.0]]


def test_concat_shifts_everything_and_keeps_passes():
    rng = np.random.default_rng(1)
    trees = [TokenTree.from_passes(random_passes(rng, n)) for n in (3, 1, 4)]
    both = TokenTree.concat(trees)
    assert paths(both) == [path for tree in trees for path in paths(tree)]
    values = np.arange(both.num_targets)
    split = np.split(values, np.cumsum([t.num_targets for t in trees])[:-1])
    expected = [x.tolist() for tree, part in zip(trees, split, strict=True) for x in tree.per_pass(part)]
    assert [x.tolist() for x in both.per_pass(values)] == expected
    assert both.input_ids[both.target_index].tolist() == [x for t in trees for x in t.input_ids[t.target_index]]


def test_dict_round_trip_keeps_values_and_dtypes():
    tree = TokenTree.from_passes(random_passes(np.random.default_rng(2), 5))
    again = TokenTree.from_dict({name: column.tolist() for name, column in tree.to_dict().items()})
    for name, column in tree.to_dict().items():
        assert again.to_dict()[name].dtype == column.dtype and (again.to_dict()[name] == column).all()
    with pytest.raises(ValueError, match="position_ids"):
        TokenTree.from_dict({"input_ids": [1]})


@pytest.mark.parametrize(
    "passes, text",
    [
        ([], "no passes"),
        ([Pass([], [])], "pass 0: input_ids has shape"),
        ([Pass([1, 2], [True])], "loss_mask has 1 entries for 2"),
        ([Pass([1], [False]), Pass([1, -5], [False, True])], "pass 1: token id -5 is negative"),
        ([Pass([1, 2], [True, True])], "pass 0 supervises its first token"),
    ],
)
def test_bad_passes(passes, text):
    with pytest.raises(ValueError, match=text):
        TokenTree.from_passes(passes)


def test_building_does_not_loop_over_tokens():
    """24 turns, 5 million tokens in all passes: a Python loop per token would need seconds."""
    passes = conversation_passes(np.random.default_rng(0), 24, h=10_000, t=5_000, r=5_000)
    start = time.perf_counter()
    tree = TokenTree.from_passes(passes)
    assert len(tree) == 24 * 20_000 + 23 * 5_000
    assert time.perf_counter() - start < 1.5

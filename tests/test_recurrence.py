"""Chains, convolutions and recurrences along a tree, against loops over tokens in float64."""

import time

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peak_memory import allocated_bytes
from reference import conversation_passes, forest, random_parents

from flexmask import TokenTree
from flexmask import recurrence as functions
from flexmask.chains import Chains
from flexmask.recurrence import chunks, fla, tree_conv, tree_scan


def reference_scan(query, key, value, gate, beta, parent, scale):
    """Token by token, each from the state of its parent. One row; tensors without the batch dimension."""
    repeat = value.shape[1] // key.shape[1]
    query, key = (x.repeat_interleave(repeat, 1) for x in (query, key))
    states, out = [], []
    for token, above in enumerate(parent.tolist()):
        state = states[above] if above >= 0 else value.new_zeros(value.shape[1], key.shape[2], value.shape[2])
        state = state * (gate[token].unsqueeze(-1) if gate.ndim == 3 else gate[token][:, None, None]).exp()
        new = value[token]
        if beta is not None:
            new = beta[token][:, None] * (new - torch.einsum("hkv,hk->hv", state, key[token]))
        states.append(state + torch.einsum("hk,hv->hkv", key[token], new))
        out.append(scale * torch.einsum("hkv,hk->hv", states[-1], query[token]))
    return torch.stack(out)


def reference_conv(x, weight, parent):
    """x (channels, L), weight (channels, width)."""
    out = []
    for token in range(x.shape[1]):
        place, total = token, 0
        for back in range(weight.shape[1]):
            if place < 0:
                break
            total = total + weight[:, -1 - back] * x[:, place]
            place = parent[place]
        out.append(total)
    return torch.stack(out, 1)


def problem(rng, length, *, per_channel=False, delta=True, key_heads=1, heads=2, key_size=3, value_size=4):
    """Inputs of `tree_scan` without the batch dimension, float64; decays that keep states for hundreds of tokens."""
    draw = torch.Generator().manual_seed(int(rng.integers(2**31)))
    options = {"generator": draw, "dtype": torch.float64}
    query = torch.randn(length, key_heads, key_size, **options)
    key = torch.nn.functional.normalize(torch.randn(length, key_heads, key_size, **options), dim=-1)
    value = torch.randn(length, heads, value_size, **options)
    gate = -0.05 * torch.rand(length, heads, *([key_size] if per_channel else []), **options)
    beta = torch.rand(length, heads, **options) if delta else None
    return [query, key, value, gate, beta]


def leaves(tensors, batch=True):
    return [None if x is None else (x[None] if batch else x).clone().requires_grad_() for x in tensors]


def compare(found, expected, inputs, references, weight, tolerance=1e-12):
    """Values and gradients, where `weight` is not 0: relative to the largest."""
    kept = weight != 0
    assert ((found - expected) * kept).abs().max() <= tolerance * expected.abs().max()
    (found * weight).sum().backward()
    (expected * weight).sum().backward()
    for ours, theirs in zip(inputs, references, strict=True):
        if ours is not None:
            difference = (ours.grad.view_as(theirs.grad) - theirs.grad).abs().max()
            assert difference <= tolerance * theirs.grad.abs().max().clamp(min=1e-3)


def weights(rng, shape, parent, dim):
    """Random, and 0 for trees of one token: several of them count as one chain, being padding."""
    children = np.bincount(parent[parent >= 0], minlength=len(parent))
    alone = torch.from_numpy((parent < 0) & (children == 0))
    weight = torch.from_numpy(rng.normal(size=shape))
    return weight * ~alone.view([-1 if d == dim else 1 for d in range(len(shape))])


forests = st.tuples(st.integers(0, 2**31), st.integers(1, 90), st.integers(1, 4))


@given(forests)
@settings(deadline=None, max_examples=300)
def test_chains(drawn):
    seed, length, roots = drawn
    parent = random_parents(np.random.default_rng(seed), length, roots)
    row = Chains.of(forest(parent)[0])
    alone = [parent[k] < 0 and k not in parent for k in range(length)]
    start = [
        k for k in range(length) if k == 0 or (parent[k] != k - 1 and not (alone[k] and alone[k - 1]))
    ]  # fmt: skip
    assert row.start.tolist() == start
    assert row.parent.tolist() == [parent[k] for k in start]
    for run, (begin, end) in enumerate(zip(row.run_start, row.run_stop, strict=True)):
        assert all(parent[k] == k - 1 or alone[k] for k in range(begin + 1, end))
        above = row.run_parent[run]
        if above < 0:
            assert parent[begin] == -1 and row.run_level[run] == 0
        else:
            assert row.run_stop[above] - 1 == parent[begin]
            assert row.run_level[run] == row.run_level[above] + 1
    for count in range(4):
        for token, found in zip(row.run_start, row.ancestors(row.run_start, count), strict=True):
            expected = []
            for _ in range(count):
                token = parent[token] if token >= 0 else -1
                expected.insert(0, token)
            assert found.tolist() == expected


def test_a_thousand_chains_take_milliseconds():
    rng = np.random.default_rng(0)
    trees = [TokenTree.from_passes(conversation_passes(rng, 24, 30, 40, 20)) for _ in range(56)]
    end = TokenTree.concat(trees * 3).subtree_end[:131072].clip(max=131072)
    Chains.of(end)
    start = time.perf_counter()
    row = Chains.of(end)
    assert time.perf_counter() - start < 0.05
    assert len(row.start) > 1000


@given(forests, st.booleans(), st.booleans(), st.integers(2, 9))
@settings(deadline=None, max_examples=60)
def test_scan_of_random_forests(drawn, per_channel, delta, size):
    """Chunks so short that most runs have several, and long enough that some have one."""
    seed, length, roots = drawn
    rng = np.random.default_rng(seed)
    parent = random_parents(rng, length, roots)
    inputs = problem(rng, length, per_channel=per_channel, delta=delta)
    ours, theirs = leaves(inputs), leaves(inputs, batch=False)
    end = torch.from_numpy(forest(parent)[0])[None]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(chunks, "CHUNK", size)
        patch.setattr(chunks, "CHUNK_PER_CHANNEL", size)
        found = tree_scan(*ours, end, scale=0.7)[0]
        expected = reference_scan(*theirs, parent, 0.7)
        compare(found, expected, ours, theirs, weights(rng, expected.shape, parent, 0))


@pytest.mark.parametrize("per_channel", [False, True])
@pytest.mark.parametrize("delta", [False, True])
@pytest.mark.parametrize("turns", [1, 6, 24])
def test_scan_of_conversations(turns, delta, per_channel):
    """With chunks as they are: chains of 1 token to several chunks, padding at the end; heads in groups, several at once."""
    rng = np.random.default_rng(turns)
    sizes = {1: (100, 90, 40), 6: (20, 70, 8), 24: (1, 1, 1)}[turns]
    tree = TokenTree.from_passes(conversation_passes(rng, turns, *sizes))
    parent = np.append(parents(tree), [-1] * 5)
    end = torch.from_numpy(forest(parent)[0])[None]
    inputs = problem(rng, len(parent), per_channel=per_channel, delta=delta, key_heads=2, heads=6)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(chunks, "STATES_AT_ONCE", {False: 1, True: 1})  # one head of keys after the other
        ours, theirs = leaves(inputs), leaves(inputs, batch=False)
        expected = reference_scan(*theirs, parent, 1.0)
        compare(tree_scan(*ours, end)[0], expected, ours, theirs, weights(rng, expected.shape, parent, 0))
    rounded = [None if x is None else x[None].float() for x in inputs]
    found = tree_scan(*rounded, end)[0]
    assert found.dtype == torch.float32
    assert (found[:-5] - expected[:-5]).abs().max() <= 1e-5 * expected.abs().max()


def parents(tree) -> np.ndarray:
    return np.array([max(np.flatnonzero(tree.subtree_end[:k] > k), default=-1) for k in range(len(tree))])


@given(forests, st.integers(1, 7))
@settings(deadline=None, max_examples=150)
def test_convolution_of_random_forests(drawn, width):
    seed, length, roots = drawn
    rng = np.random.default_rng(seed)
    parent = random_parents(rng, length, roots)
    inputs = [torch.from_numpy(rng.normal(size=(3, length))), torch.from_numpy(rng.normal(size=(3, width)))]
    (x, weight), theirs = leaves(inputs, batch=False), leaves(inputs, batch=False)

    def conv(y):
        return torch.nn.functional.conv1d(y, weight[:, None], padding=width - 1, groups=3)[..., : y.shape[-1]]

    end = torch.from_numpy(forest(parent)[0])[None]
    expected = reference_conv(*theirs, parent)
    found = tree_conv(x[None], width, end, conv)[0]
    compare(found, expected, [x, weight], theirs, weights(rng, expected.shape, parent, 1))


def test_rows_of_a_batch_do_not_see_each_other():
    rng = np.random.default_rng(0)
    rows = [random_parents(rng, 70) for _ in range(3)]
    end = torch.from_numpy(np.stack([forest(parent)[0] for parent in rows]))
    inputs = [problem(rng, 70) for _ in rows]
    found = tree_scan(*(torch.stack(x) for x in zip(*inputs, strict=True)), end)
    for out, one, row in zip(found, inputs, end, strict=True):
        torch.testing.assert_close(out, tree_scan(*(x[None] for x in one), row[None])[0])
    x, weight = torch.randn(3, 4, 70, dtype=torch.float64), torch.randn(4, 1, 3, dtype=torch.float64)

    def conv(y):
        return torch.nn.functional.conv1d(y, weight, padding=2, groups=4)[..., : y.shape[-1]]

    for out, one, row in zip(tree_conv(x, 3, end, conv), x, end, strict=True):
        torch.testing.assert_close(out, tree_conv(one[None], 3, row[None], conv)[0])


@pytest.mark.parametrize("per_channel", [False, True])
@pytest.mark.parametrize("delta", [False, True])
def test_the_operators_keep_their_contracts(delta, per_channel):
    rng = np.random.default_rng(0)
    parent = random_parents(rng, 40)
    end = torch.from_numpy(forest(parent)[0])[None]
    inputs = leaves(problem(rng, 40, per_channel=per_channel, delta=delta))
    torch.library.opcheck(functions._forward, (*inputs, end, 0.5))


def test_compiled():
    rng = np.random.default_rng(0)
    inputs = leaves(problem(rng, 60))
    x, weight = torch.randn(1, 4, 60, dtype=torch.float64), torch.randn(4, 1, 4, dtype=torch.float64)

    def conv(y):
        return torch.nn.functional.conv1d(y, weight, padding=3, groups=4)[..., : y.shape[-1]]

    def both(end):
        return tree_scan(*inputs, end).square().sum() + tree_conv(x, 4, end, conv).square().sum()

    compiled = torch.compile(both, fullgraph=True)
    # Another tree with another number of chains, and one without any fork.
    for parent in (random_parents(rng, 60), random_parents(rng, 60), np.arange(-1, 59)):
        end = torch.from_numpy(forest(parent)[0])[None]
        found, expected = compiled(end), both(end)
        torch.testing.assert_close(found, expected)
        for a, b in zip(torch.autograd.grad(found, inputs), torch.autograd.grad(expected, inputs), strict=True):
            torch.testing.assert_close(a, b)


def test_what_a_row_is_like_is_worked_out_once(monkeypatch):
    counted = []
    library = chunks.chains
    monkeypatch.setattr(chunks, "chains", lambda end: counted.append(1) or library(end))
    rng = np.random.default_rng(0)
    end = torch.from_numpy(forest(random_parents(rng, 50))[0])[None]
    for _ in range(3):  # layers
        tree_scan(*leaves(problem(rng, 50)), end).sum().backward()
    assert len(counted) == 1


def test_memory_grows_linearly():
    peaks = []
    for length in (4096, 16384):
        rng = np.random.default_rng(0)
        tree = TokenTree.from_passes(conversation_passes(rng, 8, 60, 200, 60))
        end = TokenTree.concat([tree] * (length // len(tree) + 1)).subtree_end[:length].clip(max=length)
        end = torch.from_numpy(end)[None]
        inputs = [x.float() for x in problem(rng, length, key_heads=2, heads=4, key_size=32, value_size=32)]
        peaks.append(allocated_bytes(lambda end=end, inputs=inputs: tree_scan(*leaves(inputs), end).sum().backward()))
    assert peaks[1] < 4.5 * peaks[0]


def test_kernels_of_another_package_do_not_serve_here():
    inputs = [None if x is None else x[None] for x in problem(np.random.default_rng(0), 4)]
    assert not fla.serves(*inputs)
    assert not fla.serves(*(x.bfloat16() for x in inputs))

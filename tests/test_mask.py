import gc
import time
import weakref

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import conversation_passes, forest, random_parents
from torch.nn.attention.flex_attention import create_block_mask
from torch.utils._python_dispatch import TorchDispatchMode

import flexmask.mask
from flexmask import TokenTree, tree_block_mask
from flexmask.mask import block_lists, check_subtree_end, mask_mod, once_per_forward, score_mod, tile_lists


def random_row(seed, length):
    ends, positions, visible = forest(random_parents(np.random.default_rng(seed), length, num_roots=3))
    return torch.from_numpy(ends)[None], torch.from_numpy(positions)[None], torch.from_numpy(visible)


def tiles(visible, size):
    """(any, all) visible per tile of a dense mask; a short last block counts only what exists."""
    n = -(-len(visible) // size)
    blocks = [[visible[i * size : (i + 1) * size, j * size : (j + 1) * size] for j in range(n)] for i in range(n)]
    return (
        torch.tensor([[bool(b.any()) for b in row] for row in blocks]),
        torch.tensor([[bool(b.all()) for b in row] for row in blocks]),
    )


def listed(num, indices):
    table = torch.zeros(indices.shape[-2:], dtype=torch.bool)
    for i, n in enumerate(num[0, 0].tolist()):
        table[i, indices[0, 0, i, :n].long()] = True
        assert indices[0, 0, i, :n].tolist() == sorted(indices[0, 0, i, :n].tolist())
    return table


@settings(deadline=None, max_examples=100)
@given(st.integers(0, 2**32 - 1), st.integers(1, 70), st.sampled_from([1, 4, 16]))
def test_block_lists_are_exactly_the_tiles_that_hold_something(seed, length, size):
    ends, _, visible = random_row(seed, length)
    some, every = tiles(visible, size)
    lists = block_lists(ends, block_size=size)
    partial, full = listed(lists.kv_num, lists.kv_indices), listed(lists.full_kv_num, lists.full_kv_indices)
    assert ((partial | full) == some).all(), "tiles visited are the non-empty ones"
    assert not (partial & full).any()
    off_diagonal = ~torch.eye(len(some), dtype=torch.bool)
    assert (full[off_diagonal] == every[off_diagonal]).all(), "full tiles are those that need no mask"
    assert (listed(lists.q_num, lists.q_indices) == partial.T).all()
    assert (listed(lists.full_q_num, lists.full_q_indices) == full.T).all()


def of_lists(begin, indices, batch, n):
    """bool (batch, n, n) of compact lists; entries of a line ascend."""
    table = torch.zeros(batch * n, n, dtype=torch.bool)
    for line in range(batch * n):
        entries = indices[begin[line] : begin[line + 1]].tolist()
        assert entries == sorted(set(entries))
        table[line, entries] = True
    assert len(begin) == batch * n + 1 and len(indices) > begin[-1] and begin.dtype == indices.dtype == torch.int32
    return table.view(batch, n, n)


@pytest.mark.parametrize("every_pair", [False, True])
@pytest.mark.parametrize("windowed", [False, True])
@settings(deadline=None, max_examples=60)
@given(st.integers(0, 2**32 - 1), st.integers(1, 70), st.integers(1, 3), st.integers(1, 20))
def test_compact_lists_are_the_block_lists(every_pair, windowed, seed, length, batch, window):
    """`every_pair`: as while a CUDA graph is captured."""
    ends, positions, _ = map(torch.cat, zip(*(random_row(seed + i, length) for i in range(batch))))
    options = {"position_ids": positions, "sliding_window": window} if windowed else {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(flexmask.mask, "BLOCK_SIZE", 8)
        if every_pair:
            patch.setattr(flexmask.mask._Blocks, "pairs", flexmask.mask._Blocks.all_pairs)
        lists = tile_lists(ends, **options)
    right = block_lists(ends, block_size=8, **options)
    n = -(-length // 8)
    for name in ("kv", "full_kv", "q", "full_q"):
        found = of_lists(getattr(lists, f"{name}_begin"), getattr(lists, f"{name}_indices"), batch, n)
        for row in range(batch):
            num, indices = (getattr(right, f"{name}_{what}")[row : row + 1] for what in ("num", "indices"))
            assert torch.equal(found[row], listed(num, indices))


def test_operator_of_compact_lists_satisfies_pytorch():
    ends, positions, _ = random_row(0, 300)
    torch.library.opcheck(flexmask.mask._tile_lists, (ends, None, None))
    torch.library.opcheck(flexmask.mask._tile_lists, (ends, positions, 50))


def test_compact_lists_of_a_million_tokens():
    """As n×n lists of 8 tensors they would have 2 GiB."""
    tree = TokenTree.from_passes(conversation_passes(np.random.default_rng(0), 12, 80, 800, 250))
    row = TokenTree.concat([tree] * (2**20 // len(tree)))
    ends = torch.from_numpy(row.subtree_end)[None]
    with PeakBytes() as bytes_:
        tile_lists(ends)
    assert bytes_.peak < 256 * 2**20, f"{bytes_.peak / 2**20:.0f} MiB"


@settings(deadline=None, max_examples=100)
@given(st.integers(0, 2**32 - 1), st.integers(1, 70), st.integers(1, 20))
def test_windowed_block_lists_miss_nothing_and_mark_nothing_full_that_is_not(seed, length, window):
    ends, positions, visible = random_row(seed, length)
    visible = visible & (positions[0][:, None] - positions[0][None, :] < window)
    some, every = tiles(visible, 8)
    lists = block_lists(ends, position_ids=positions, sliding_window=window, block_size=8)
    partial, full = listed(lists.kv_num, lists.kv_indices), listed(lists.full_kv_num, lists.full_kv_indices)
    assert not (some & ~(partial | full)).any()
    assert not (full & ~every).any()


def test_windowed_block_lists_skip_what_is_far_away():
    length = 64 * 16
    ends = torch.full((1, length), length, dtype=torch.int32)  # one plain sequence
    lists = block_lists(ends, position_ids=torch.arange(length)[None], sliding_window=16, block_size=16)
    assert (lists.kv_num + lists.full_kv_num).max() == 2


@settings(deadline=None, max_examples=50)
@given(st.integers(0, 2**32 - 1), st.integers(1, 40), st.one_of(st.none(), st.integers(1, 10)))
def test_mask_mod_is_the_definition(seed, length, window):
    ends, positions, visible = random_row(seed, length)
    if window:
        visible = visible & (positions[0][:, None] - positions[0][None, :] < window)
    b, h, q, k = torch.meshgrid(torch.tensor([0]), torch.tensor([0]), *[torch.arange(length)] * 2, indexing="ij")
    assert (mask_mod(ends, position_ids=positions, sliding_window=window)(b, h, q, k)[0, 0] == visible).all()
    score = torch.randn(1, 1, length, length)
    masked = score_mod(softcap=2.0, subtree_end=ends, position_ids=positions, sliding_window=window)(score, b, h, q, k)
    expected = (2 * torch.tanh(score / 2)).masked_fill(~visible, -torch.inf)
    assert torch.equal(masked, expected)
    assert torch.equal(score_mod(subtree_end=ends)(score, b, h, q, k).isinf(), ~random_row(seed, length)[2][None, None])


def test_a_windowed_mask_can_be_asked_for_all_queries_of_a_block():
    """The bug guarded: FlashAttention 4 reads captured tensors for the queries of a block behind the end of the row, too."""
    ends, positions, _ = random_row(0, 300)
    mask = mask_mod(ends, position_ids=positions, sliding_window=7)
    queries, nothing = torch.arange(384), torch.tensor(0)
    assert not mask(nothing, nothing, queries, torch.tensor(0))[300:].any()


@pytest.mark.parametrize("window", [None, 100])
def test_queries_of_the_last_blocks_alone(window):
    """The last lines of the whole mask, in the lists, in their transpose and in what is asked inside tiles."""
    ends, positions, visible = random_row(3, 700)
    if window:
        visible = visible & (positions[0][:, None] - positions[0][None, :] < window)
    of_last = tree_block_mask(ends, first=256, position_ids=positions, sliding_window=window)
    b, h, q, k = torch.meshgrid(
        torch.tensor([0]), torch.tensor([0]), torch.arange(444), torch.arange(700), indexing="ij"
    )
    assert (of_last.mask_mod(b, h, q, k)[0, 0] == visible[256:]).all()
    lists = block_lists(ends, position_ids=positions, sliding_window=window)
    part = block_lists(ends, first=256, position_ids=positions, sliding_window=window)
    assert of_last.seq_lengths == (444, 700)
    for name in ("kv_num", "full_kv_num", "kv_indices", "full_kv_indices"):
        assert torch.equal(getattr(part, name), getattr(lists, name)[:, :, 2:])
    for kind in ("", "full_"):
        num, indices, found = (
            getattr(x, f"{kind}q_{n}") for x, n in ((part, "num"), (part, "indices"), (lists, "indices"))
        )
        for key in range(6):
            every = found[0, 0, key, : getattr(lists, f"{kind}q_num")[0, 0, key]].tolist()
            assert indices[0, 0, key, : num[0, 0, key]].tolist() == [query - 2 for query in every if query >= 2]


def test_score_mod_without_anything_to_do_is_none():
    assert score_mod() is None
    assert torch.allclose(
        score_mod(softcap=3.0)(torch.tensor(10.0), 0, 0, 0, 0), torch.tensor(3.0).mul(np.tanh(10 / 3))
    )


def test_block_mask_agrees_with_create_block_mask():
    tree = TokenTree.from_passes(conversation_passes(np.random.default_rng(0), 4, 60, 150, 100))
    ends = torch.from_numpy(tree.subtree_end[:1024].clip(max=1024))[None]
    ours, theirs = tree_block_mask(ends), create_block_mask(mask_mod(ends), 1, None, 1024, 1024, device="cpu")
    assert ours.shape == theirs.shape
    for name in ("kv_num_blocks", "full_kv_num_blocks", "q_num_blocks", "full_q_num_blocks"):
        assert torch.equal(getattr(ours, name), getattr(theirs, name)), name
    assert torch.equal(ours.to_dense(), theirs.to_dense())
    assert ours.kv_indices.dtype == torch.int32 and ours.kv_indices.shape == theirs.kv_indices.shape


class PeakBytes(TorchDispatchMode):
    """Largest sum of live bytes of tensors that operators returned, and the largest single tensor."""

    def __init__(self):
        super().__init__()
        self.live, self.peak, self.largest = {}, 0, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in torch.utils._pytree.tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                if storage.data_ptr() not in self.live:
                    self.live[storage.data_ptr()] = storage.nbytes()
                    weakref.finalize(storage, self.live.pop, storage.data_ptr(), None)
                    self.largest = max(self.largest, storage.nbytes())
        self.peak = max(self.peak, sum(self.live.values()))
        return result


def test_block_lists_of_131072_tokens_are_small_and_fast():
    """The issue's bound: under 64 MiB and under 1 s; a dense mask would have 16 GiB."""
    trees = [TokenTree.from_passes(conversation_passes(np.random.default_rng(i), 12, 80, 800, 250)) for i in range(9)]
    row = TokenTree.concat(trees)
    ends = torch.from_numpy(row.subtree_end[:131072].clip(max=131072))[None]
    assert ends.shape[1] == 131072
    start = time.perf_counter()
    tree_block_mask(ends)
    seconds = time.perf_counter() - start
    with PeakBytes() as bytes_:
        tree_block_mask(ends)
    assert bytes_.peak < 64 * 2**20, f"{bytes_.peak / 2**20:.0f} MiB"
    assert seconds < 1, f"{seconds:.2f} s"


@settings(deadline=None, max_examples=200)
@given(st.lists(st.integers(1, 12), min_size=1, max_size=12))
def test_check_accepts_exactly_nested_ends(ends):
    length = len(ends)
    nested = all(
        k < ends[k] <= length and all(ends[j] <= ends[k] for j in range(k, min(ends[k], length))) for k in range(length)
    )
    tensor = torch.tensor([ends], dtype=torch.int32)
    if nested:
        check_subtree_end(tensor)
    else:
        with pytest.raises(ValueError, match="subtree_end"):
            check_subtree_end(tensor)


@pytest.mark.parametrize(
    "subtree_end, error, text",
    [
        (torch.tensor([[1.0, float("nan")]]), TypeError, "float32, expected an int32"),
        (torch.tensor([[1, 2]]), TypeError, "int64"),
        ([1, 2], TypeError, "list"),
        (torch.tensor([1, 2], dtype=torch.int32), ValueError, r"shape \(2,\)"),
        (torch.empty(1, 0, dtype=torch.int32), ValueError, r"shape \(1, 0\)"),
        (torch.tensor([[1, 1]], dtype=torch.int32), ValueError, r"subtree_end\[0, 1\] is 1, expected an end in 2..2"),
        (torch.tensor([[3, 2]], dtype=torch.int32), ValueError, r"subtree_end\[0, 0\] is 3"),
        (torch.tensor([[2, 3, 3]], dtype=torch.int32), ValueError, "nested or apart, never cross"),
    ],
)
def test_bad_subtree_ends(subtree_end, error, text):
    with pytest.raises(error, match=text):
        check_subtree_end(subtree_end)


def test_lists_are_made_once_per_forward_and_again_when_the_tensor_changes():
    calls = []

    def build(subtree_end, *, position_ids=None, sliding_window=None):
        calls.append(sliding_window)
        return len(calls)

    ends = torch.tensor([[2, 2]], dtype=torch.int32)
    positions = torch.tensor([[0, 1]])
    first = once_per_forward(build, ends, position_ids=positions, sliding_window=4)
    assert once_per_forward(build, ends, position_ids=positions, sliding_window=4) == first
    assert once_per_forward(build, ends, position_ids=positions, sliding_window=5) != first
    assert once_per_forward(build, ends, position_ids=positions.clone(), sliding_window=4) != first
    ends.fill_(2)
    assert once_per_forward(build, ends, position_ids=positions, sliding_window=4) == 4


def test_a_row_that_is_no_longer_used_is_freed_at_once():
    """The bug guarded: the block mask kept the tensor that kept it, so a step's lists lived until a garbage collection."""
    ends = torch.full((1, 300), 300, dtype=torch.int32)
    mask = tree_block_mask(ends)
    assert tree_block_mask(ends).kv_indices is mask.kv_indices, "made once"
    freed = weakref.ref(ends), weakref.ref(mask.kv_indices)
    gc.disable()
    try:
        del ends, mask
        assert [reference() for reference in freed] == [None, None]
    finally:
        gc.enable()


def test_nothing_is_kept_for_tensors_that_do_not_count_their_changes():
    with torch.inference_mode():
        ends = torch.tensor([[2, 2]], dtype=torch.int32)
        once_per_forward(check_subtree_end, ends)
        ends.fill_(99)
        with pytest.raises(ValueError, match=r"expected an end in 1\.\.2"):
            once_per_forward(check_subtree_end, ends)

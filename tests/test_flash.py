"""Attention by chains: PyTorch's CPU kernel, and the operators of CUDA with a plain stand-in, against float64."""

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from peak_memory import needs_linux, peak_bytes
from reference import conversation_passes, dense_attention
from test_attention import close, gradients, problem, queries_of_the_last_tokens

import flexmask.attention
from flexmask import TokenTree, tree_attention
from flexmask.backends import flash


def sequences_of(cu_q, cu_k, longest_q, longest_k):
    """Of a variable-length call: the queries and keys of each sequence."""
    for cu, longest in ((cu_q, longest_q), (cu_k, longest_k)):
        assert cu.dtype == torch.int32 and cu[0] == 0 and int(cu.diff().max()) == longest
    return [
        (slice(*queries), slice(*keys))
        for queries, keys in zip(*(torch.stack([cu[:-1], cu[1:]], 1).tolist() for cu in (cu_q, cu_k)), strict=True)
    ]


def scores_of(q, k, left, scale):
    """Of one sequence, (n, heads, D) against (m, heads, D), aligned at the end: (heads, n, m)."""
    n, m = len(q), len(k)
    distance = torch.arange(n)[:, None] + m - n - torch.arange(m)
    hidden = (distance < 0) | (distance > left if left >= 0 else False)
    return (torch.einsum("nhd,mhd->hnm", q, k) * scale).masked_fill(hidden, -torch.inf)


def repeated(q, k, v):
    return [x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v)]


def stand_in_forward(
    q, k, v, cu_q, cu_k, max_q, max_k, dropout, is_causal, debug, *, scale=None, window_size_left=None,
    window_size_right=None, seqused_k=None, alibi_slopes=None, block_table=None, num_splits=None,
):  # fmt: skip
    assert not dropout and is_causal and not debug and window_size_right == 0
    out, lse = torch.empty_like(q), q.new_empty(q.shape[1], len(q), dtype=torch.float32)
    for queries, keys in sequences_of(cu_q, cu_k, max_q, max_k):
        k_, v_ = repeated(q, k[keys], v[keys])
        scores = scores_of(q[queries], k_, window_size_left, scale)
        out[queries] = torch.einsum("hnm,mhd->nhd", scores.softmax(-1), v_)
        lse[:, queries] = scores.logsumexp(-1)
    return out, lse, q.new_zeros(2, dtype=torch.uint64), q.new_empty(0), q.new_empty(0)


def stand_in_backward(
    do, q, k, v, out, lse, cu_q, cu_k, max_q, max_k, dropout, is_causal, state, unused, *, scale=None,
    window_size_left=None, window_size_right=None,
):  # fmt: skip
    assert not dropout and is_causal and window_size_right == 0 and out.shape == q.shape
    dq, dk, dv = (torch.empty_like(x) for x in (q, k, v))
    for queries, keys in sequences_of(cu_q, cu_k, max_q, max_k):
        k_, v_ = repeated(q, k[keys], v[keys])
        p = (scores_of(q[queries], k_, window_size_left, scale) - lse[:, queries, None]).exp()
        torch.testing.assert_close(p.sum(-1), torch.ones_like(p[..., 0]))
        dp = torch.einsum("nhd,mhd->hnm", do[queries], v_)
        ds = p * (dp - (do[queries] * out[queries]).sum(-1).T[..., None]) * scale
        dq[queries] = torch.einsum("hnm,mhd->nhd", ds, k_)
        for total, weights, x in ((dk, ds, q), (dv, p, do)):
            of_heads = torch.einsum("hnm,nhd->mhd", weights, x[queries])
            total[keys] = of_heads.unflatten(1, (k.shape[1], -1)).sum(2)
    return dq, dk, dv


@pytest.fixture(params=["CPU's kernel", "CUDA's operators"])
def kernel(request):
    if request.param == "CPU's kernel":
        yield
        return
    library = torch.library.Library("aten", "IMPL")
    library.impl("_flash_attention_forward", stand_in_forward, "CPU")
    library.impl("_flash_attention_backward", stand_in_backward, "CPU")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(flash, "_kernel", lambda x: flash._Cuda)
        yield
    library._destroy()


@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    seed=st.integers(0, 2**32 - 1),
    length=st.sampled_from([1, 2, 17, 64, 65, 130]),
    batch=st.integers(1, 2),
    kv_heads=st.sampled_from([1, 2, 4]),
    value_dim=st.sampled_from([8, 5, 16]),
    window=st.sampled_from([None, 1, 2, 7, 1000]),
    scale=st.sampled_from([None, 0.3]),
    layout=st.permutations(range(4)),
)
def test_flash_is_dense_attention(kernel, seed, length, batch, kv_heads, value_dim, window, scale, layout):
    """Tensors lie in memory in any order of their dimensions."""
    shapes = {"batch": batch, "kv_heads": kv_heads, "value_dim": value_dim, "dtype": torch.float32}
    *inputs, _, ends, positions, visible = problem(seed, length, **shapes)
    back = np.argsort(layout).tolist()
    inputs = [x.detach().permute(layout).contiguous().permute(back).requires_grad_() for x in inputs]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(flash, "_BLOCK", 5)
        options = {"sliding_window": window, "position_ids": positions, "scale": scale}
        found = tree_attention(*inputs, ends, backend="flash", **options)
        found_gradients = gradients(found, inputs)
    golden = [x.detach().double().requires_grad_() for x in inputs]
    expected = dense_attention(*golden, visible, window=window, positions=positions, scale=scale)
    close(found, expected, 1e-6)
    right = gradients(expected, golden)
    largest = max(x.abs().max() for x in right)  # with a window of 1 those of queries and keys are 0, but for rounding
    for a, b in zip(found_gradients, right, strict=True):
        assert (a.double() - b).abs().max() <= 1e-6 * max(1, largest)


@pytest.mark.parametrize("length, first", [(130, 128), (200, 128), (290, 128), (273, 256)])
@pytest.mark.parametrize("window", [None, 1, 9])
def test_queries_of_the_last_tokens_alone(kernel, length, first, window, monkeypatch):
    monkeypatch.setattr(flash, "_BLOCK", 16)
    options = {"window": window, "backend": "flash"}
    (found, expected), pairs = queries_of_the_last_tokens(length, length, first, torch.float32, **options)
    close(found, expected, 1e-6)
    for a, b in zip(*pairs, strict=True):
        close(a, b, 2e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("window", [None, 20])
def test_error_is_at_most_twice_that_of_sdpa_in_the_same_dtype(dtype, window):
    *inputs, _, ends, positions, visible = problem(0, 300, dim=32, value_dim=32, dtype=dtype)
    golden = [x.detach().double().requires_grad_() for x in inputs]
    exact = dense_attention(*golden, visible, window=window, positions=positions)
    if window is not None:
        visible = visible & (positions[:, :, None] - positions[:, None, :] < window)
    sdpa = torch.nn.functional.scaled_dot_product_attention(*inputs, attn_mask=visible[:, None], enable_gqa=True)
    found = tree_attention(*inputs, ends, backend="flash", sliding_window=window, position_ids=positions)
    assert found.dtype == dtype
    pairs = [(found, sdpa, exact)]
    pairs += zip(gradients(found, inputs), gradients(sdpa, inputs), gradients(exact, golden), strict=True)
    for ours, theirs, truth in pairs:
        assert (ours.double() - truth).norm() <= 2 * (theirs.double() - truth).norm()


@pytest.mark.parametrize("window", [None, 300])
def test_windows_of_real_size(window):
    """With blocks as they are, and chains longer and shorter than the window."""
    rng = np.random.default_rng(0)
    tree = TokenTree.from_passes(conversation_passes(rng, 3, 200, 400, 150))
    ends, positions = torch.from_numpy(tree.subtree_end)[None], torch.from_numpy(tree.position_ids)[None]
    inputs = [torch.randn(1, h, len(tree), 16, requires_grad=True) for h in (4, 2, 2)]
    options = {"sliding_window": window, "position_ids": positions}
    found, expected = (tree_attention(*inputs, ends, backend=b, **options) for b in ("flash", "blockwise"))
    close(found, expected, 1e-6)
    for a, b in zip(gradients(found, inputs), gradients(expected, inputs), strict=True):
        close(a, b, 2e-6)


def test_operators_satisfy_pytorch():
    *inputs, _, ends, positions, _ = problem(1, 20, dtype=torch.float32)
    for window in (None, 5):
        torch.library.opcheck(flash._forward, (*inputs, ends, positions, 0.5, window))
        of_last = inputs[0][:, :, 12:].detach().requires_grad_()
        torch.library.opcheck(flash._forward, (of_last, *inputs[1:], ends, positions, 0.5, window))
        q, k, v = (x.detach() for x in inputs)
        out, lse = flash._forward(q, k, v, ends, positions, 0.5, window)
        torch.library.opcheck(flash._backward, (torch.randn_like(out), q, k, v, out, lse, ends, 0.5, window))


def test_compiled_in_one_graph():
    *inputs, _, ends, _, visible = problem(3, 70, dtype=torch.float32)
    compiled = torch.compile(lambda *x: tree_attention(*x, ends, backend="flash"), fullgraph=True)
    found, expected = compiled(*inputs), dense_attention(*inputs, visible)
    close(found, expected, 1e-6)
    for a, b in zip(gradients(found, inputs), gradients(expected, inputs), strict=True):
        close(a, b, 2e-6)


def test_compiled_with_positions_that_are_not_counted():
    """Found: what can be told from the values of positions only was refused when nobody else could be asked any more."""
    *inputs, _, ends, positions, visible = problem(3, 70, dtype=torch.float32)
    for of_window in (positions, positions // 4 * 4):
        torch._dynamo.reset()
        options = {"sliding_window": 4, "position_ids": of_window}
        compiled = torch.compile(lambda *x, options=options: tree_attention(*x, ends, **options), backend="aot_eager")
        close(compiled(*inputs), dense_attention(*inputs, visible, window=4, positions=of_window), 1e-6)
    with pytest.raises(NotImplementedError, match="position_ids"):
        torch.compile(
            lambda *x: tree_attention(*x, ends, sliding_window=4, position_ids=positions // 4 * 4, backend="flash"),
            backend="aot_eager",
        )(*inputs)


def test_a_batch_of_no_rows():
    *inputs, _, ends, _, _ = problem(3, 70, dtype=torch.float32)
    assert tree_attention(*(x[:0] for x in inputs), ends[:0]).shape == (0, 4, 70, 8)


def test_what_it_cannot_do_is_refused():
    *inputs, sinks, ends, positions, _ = problem(0, 20, dtype=torch.float32)
    for options, what in (
        ({"softcap": 2.0}, "soft-cap"),
        ({"sinks": sinks}, "sinks"),
        ({"sliding_window": 4, "position_ids": positions // 4 * 4}, "position_ids"),
    ):
        with pytest.raises(NotImplementedError, match=f"'flash' cannot do .*{what}.*'blockwise' can"):
            tree_attention(*inputs, ends, backend="flash", **options)
    with pytest.raises(NotImplementedError, match="float64"):
        tree_attention(*(x.double() for x in inputs), ends, backend="flash")
    wide = [torch.randn(1, 2, 20, 257) for _ in range(3)]
    with pytest.raises(NotImplementedError, match="head size of 257"):
        tree_attention(*wide, ends, backend="flash")


def test_padding_sees_itself():
    """Many trees of one token are one sequence for the kernel, but see themselves only; their gradients reach nobody else."""
    length, real = 600, 200
    ends = torch.arange(1, length + 1, dtype=torch.int32)[None]
    ends[:, :real] = real
    q, k, v = (torch.randn(1, h, length, 8, requires_grad=True) for h in (4, 2, 2))
    out = tree_attention(q, k, v, ends, backend="flash")
    assert torch.equal(out[:, :, real:], v[:, :, real:].repeat_interleave(2, 1))
    dq, dk, dv = torch.autograd.grad(out[:, :, real:].sum(), (q, k, v))
    assert (
        not dq.any()
        and not dk.any()
        and torch.equal(dv, torch.full_like(dv, 2) * (torch.arange(length) >= real)[:, None])
    )
    assert len(flash.sequences(ends, sliding_window=None).queries) == 3


def test_gathered_keys_are_those_of_the_paths():
    """6 turns of 60, 150 and 100 tokens: five branches of 250 tokens, and of the history 60, 220, … tokens before them."""
    tree = TokenTree.from_passes(conversation_passes(np.random.default_rng(0), 6, 60, 150, 100))
    found = flash.sequences(torch.from_numpy(tree.subtree_end)[None], sliding_window=None)
    assert len(found.read) == len(tree) + 5 * 60 + 100 * 10 + 60 * 10 and len(found.queries) - 1 == 6
    window = 100
    near = flash.sequences(torch.from_numpy(tree.subtree_end)[None], sliding_window=window)
    assert len(near.read) - len(tree) == 60 + 4 * (window - 1)


@needs_linux
def test_memory_is_linear():
    """Forward and backward of 8,192 tokens: a matrix of L² would be 256 MiB a head."""
    rng = np.random.default_rng(0)
    tree = TokenTree.from_passes(conversation_passes(rng, 4, 400, 1200, 400))
    ends = torch.from_numpy(tree.subtree_end)[None]
    q, k, v = (torch.randn(1, 2, len(tree), 16, requires_grad=True) for _ in range(3))

    def step():
        tree_attention(q, k, v, ends, backend="flash").sum().backward()

    step()
    assert peak_bytes(step) < 64 * 2**20


def test_the_order_of_backends(monkeypatch):
    """On a CPU; on CUDA, and there where one was measured faster; and who answers."""
    module = flexmask.attention
    *inputs, _, ends, _, _ = problem(0, 20, dtype=torch.float32)
    asked = []
    for name, backend in list(module.BACKENDS.items()):
        monkeypatch.setitem(
            module.BACKENDS, name, lambda *a, name=name, backend=backend, **k: asked.append(name) or backend(*a, **k)
        )
    ends = torch.full_like(ends, 20)
    monkeypatch.setattr(flash, "_LEAST_QUERIES", 20)
    tree_attention(*inputs, ends)
    tree_attention(*inputs, ends, softcap=2.0)
    tree_attention(*(x.double() for x in inputs), ends)
    assert asked == ["flash", "flash", "blockwise", "flash", "blockwise"]
    asked.clear()
    positions = torch.arange(20)[None]
    tree_attention(*inputs, ends, sliding_window=21, position_ids=positions)  # blocks of 20 queries
    tree_attention(*inputs, ends, sliding_window=20, position_ids=positions)
    ends[:, 10:] = torch.arange(11, 21)  # padding does not count
    ends[:, :10] = 10
    tree_attention(*inputs, ends)
    assert asked == ["flash", "blockwise", "blockwise"]

    class Query:
        is_cuda, device = True, torch.device("cuda")

        def __init__(self, size, dtype=torch.bfloat16):
            self.shape, self.dtype = (1, 1, 20, size), dtype

    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    rest = ["flex", "triton", "flash", "blockwise"]
    assert module._preferred(Query(128), Query(64), ends, None) == ["triton", "flex", "flash", "blockwise"]
    assert module._preferred(Query(64), Query(192), ends, None) == rest
    assert module._preferred(Query(64, torch.float32), Query(64, torch.float32), ends, None) == rest
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    assert module._preferred(Query(128), Query(64), ends, None) == rest
    monkeypatch.setattr(module, "_broken", {"flex": "no compiler"})
    assert module._preferred(Query(128), Query(64), ends, None) == rest[1:]

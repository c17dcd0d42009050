import gc
import importlib.util
import json
import logging
import os
import re
import subprocess
import sys
import weakref
from pathlib import Path

import numpy as np
import pretended_cuda
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peak_memory import needs_linux, peak_bytes
from reference import conversation_passes, dense_attention, forest, random_parents

import flexmask.attention
from flexmask import TokenTree, tree_attention
from flexmask.backends import blockwise


def problem(seed, length, *, batch=1, heads=4, kv_heads=2, dim=8, value_dim=8, dtype=torch.float64):
    rng = np.random.default_rng(seed)
    rows = [forest(random_parents(rng, length)) for _ in range(batch)]
    ends, positions, visible = (torch.from_numpy(np.stack(part)) for part in zip(*rows, strict=True))
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()

    q, k = normal(batch, heads, length, dim), normal(batch, kv_heads, length, dim)
    return q, k, normal(batch, kv_heads, length, value_dim), normal(heads), ends, positions, visible


def gradients(out, inputs, seed=0):
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(out.shape, generator=generator, dtype=torch.float64).to(out.dtype)
    return torch.autograd.grad((out * weight).sum(), inputs)


def close(found, expected, tolerance):
    assert found.shape == expected.shape
    assert (found.double() - expected.double()).abs().max() <= tolerance * expected.double().abs().max().clamp(min=1)


@settings(deadline=None, max_examples=60)
@given(
    seed=st.integers(0, 2**32 - 1),
    length=st.sampled_from([1, 2, 17, 63, 64, 65, 130]),
    batch=st.integers(1, 2),
    kv_heads=st.sampled_from([1, 2, 4]),
    value_dim=st.sampled_from([8, 5]),
    softcap=st.sampled_from([None, 1.5]),
    window=st.sampled_from([None, 1, 7, 1000]),
    sinks=st.booleans(),
    scale=st.sampled_from([None, 0.3]),
)
def test_blockwise_is_dense_attention(seed, length, batch, kv_heads, value_dim, softcap, window, sinks, scale):
    q, k, v, s, ends, positions, visible = problem(seed, length, batch=batch, kv_heads=kv_heads, value_dim=value_dim)
    options = {"scale": scale, "softcap": softcap, "sinks": s if sinks else None}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(blockwise, "QUERY_BLOCK", 16)  # several blocks and chunks, and short last ones
        patch.setattr(blockwise, "KEY_CHUNK", 24)
        found = tree_attention(q, k, v, ends, sliding_window=window, position_ids=positions, **options)
        inputs = [q, k, v, s] if sinks else [q, k, v]
        found_gradients = gradients(found, inputs)
    expected = dense_attention(q, k, v, visible, window=window, positions=positions, **options)
    close(found, expected, 1e-12)
    for a, b in zip(found_gradients, gradients(expected, inputs), strict=True):
        close(a, b, 1e-11)


def queries_of_the_last_tokens(seed, length, first, dtype, **options):
    """(found, expected), (gradients found, expected) for them alone, whose keys are those of the whole row: trees, and two tokens
    of padding at each end."""
    *inputs, _, _, _, _ = problem(seed, length, dtype=dtype)
    parent = random_parents(np.random.default_rng(seed), length - 4)
    parent = np.concatenate([[-1, -1], np.where(parent < 0, -1, parent + 2), [-1, -1]])
    ends, positions, visible = (torch.from_numpy(x)[None] for x in forest(parent))
    options = {"sliding_window": options.pop("window"), "position_ids": positions, **options}
    q, k, v = inputs
    found = tree_attention(q[:, :, first:], k, v, ends, **options)
    golden = [x.detach().double().requires_grad_() for x in inputs]
    options = {"window": options.pop("sliding_window"), "positions": options.pop("position_ids"), **options}
    options.pop("backend")
    expected = dense_attention(*golden, visible, **options)[:, :, first:]
    return (found, expected), (gradients(found, inputs), gradients(expected, golden))


@pytest.mark.parametrize("length, first", [(130, 128), (200, 128), (290, 128), (273, 256)])
@pytest.mark.parametrize("window", [None, 1, 9])
def test_queries_of_the_last_tokens_alone(length, first, window, monkeypatch):
    monkeypatch.setattr(blockwise, "QUERY_BLOCK", 16)
    monkeypatch.setattr(blockwise, "KEY_CHUNK", 24)
    options = {"window": window, "softcap": 1.5, "backend": "blockwise"}
    (found, expected), pairs = queries_of_the_last_tokens(length, length, first, torch.float64, **options)
    close(found, expected, 1e-12)
    for a, b in zip(*pairs, strict=True):
        close(a, b, 1e-11)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_blockwise_error_is_at_most_twice_that_of_sdpa_in_the_same_dtype(dtype):
    """Error against float64, as a norm: the largest single error of one sample is noise of a factor two by itself."""
    *inputs, _, ends, _, visible = problem(0, 300, dim=32, value_dim=32, dtype=dtype)
    golden = [x.detach().double().requires_grad_() for x in inputs]
    exact = dense_attention(*golden, visible)
    sdpa = torch.nn.functional.scaled_dot_product_attention(*inputs, attn_mask=visible[:, None], enable_gqa=True)
    found = tree_attention(*inputs, ends, backend="blockwise")
    assert found.dtype == dtype
    pairs = [(found, sdpa, exact)]
    pairs += zip(gradients(found, inputs), gradients(sdpa, inputs), gradients(exact, golden), strict=True)
    for ours, theirs, truth in pairs:
        assert (ours.double() - truth).norm() <= 2 * (theirs.double() - truth).norm()


@pytest.mark.parametrize("sinks", [False, True])
def test_autocast_rounds_the_inputs_and_nothing_else(sinks):
    """Over several chunks of keys, forward and backward, in bits: as with inputs in bfloat16 and no autocast."""
    q, k, v, s, ends, *_ = problem(0, 2300, dtype=torch.float32)
    ends = torch.full_like(ends, 2300)
    inputs = [q, k, v, s][: 4 if sinks else 3]

    def run(autocast):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            tensors = inputs if autocast else [x.bfloat16() for x in inputs[:3]] + inputs[3:]
            out = tree_attention(*tensors[:3], ends, sinks=s if sinks else None, backend="blockwise")
            return [out, *torch.autograd.grad(out, inputs, torch.ones_like(out))]

    for a, b in zip(run(True), run(False), strict=True):
        assert torch.equal(a, b)


def test_gradcheck():
    q, k, v, s, ends, positions, _ = problem(1, 9, heads=2, kv_heads=1, dim=3, value_dim=2)
    assert torch.autograd.gradcheck(
        lambda q, k, v, s: tree_attention(
            q, k, v, ends, softcap=2.0, sliding_window=4, position_ids=positions, sinks=s, backend="blockwise"
        ),
        (q, k, v, s),
    )


def test_operators_satisfy_pytorch():
    q, k, v, s, ends, positions, _ = problem(1, 20, dtype=torch.float32)
    for softcap, window, sinks in ((None, None, None), (1.5, 5, s)):
        arguments = (q, k, v, ends, positions, sinks, 0.5, softcap, window)
        torch.library.opcheck(blockwise._forward, arguments)
        torch.library.opcheck(blockwise._forward, (q[:, :, 12:].detach().requires_grad_(), *arguments[1:]))


def test_noncontiguous_inputs():
    q, k, v, _, ends, _, visible = problem(2, 50)
    strided = [x.detach().transpose(1, 2).contiguous().transpose(1, 2).requires_grad_() for x in (q, k, v)]
    assert not strided[0].is_contiguous()
    found = tree_attention(*strided, ends)
    expected = dense_attention(q, k, v, visible)
    close(found, expected, 1e-12)
    for a, b in zip(gradients(found, strided), gradients(expected, (q, k, v)), strict=True):
        close(a, b, 1e-12)


def test_padding_sees_itself_only():
    """Rows of nothing but padding give the values back, and no NaN."""
    q, k, v, *_ = problem(3, 40)
    ends = torch.arange(1, 41, dtype=torch.int32)[None]
    out = tree_attention(q, k, v, ends)
    close(out, v.repeat_interleave(2, 1), 1e-12)
    assert all(g.isfinite().all() for g in gradients(out, (q, k, v)))


@needs_linux
@pytest.mark.parametrize("backend", ["blockwise", "flash"])
def test_memory_grows_linearly_with_the_length(backend):
    """Measured at two lengths: inputs, outputs, gradients and one tile's work, nothing that grows with L².

    One bit per pair would already be 512 MiB at the larger length, where one tensor has 16 MiB.
    """

    def forward_and_backward(length):
        tree = TokenTree.concat(
            [TokenTree.from_passes(conversation_passes(np.random.default_rng(0), 6, 60, 150, 100))]
            * (length // 2300 + 1)
        )
        ends = torch.from_numpy(tree.subtree_end[:length].clip(max=length))[None]
        q, k, v = (torch.randn(1, 2, length, 32, requires_grad=True) for _ in range(3))
        tree_attention(q, k, v, ends, backend=backend).sum().backward()

    forward_and_backward(4096)  # warm up
    for length in (16384, 65536):
        one_tensor = length * 2 * 32 * 4
        peak = peak_bytes(lambda length=length: forward_and_backward(length), runs=3)
        assert 4 * one_tensor < peak < 12 * one_tensor + 16 * 2**20, f"{peak / 2**20:.0f} MiB at L = {length}"


def test_only_visible_keys_are_touched(monkeypatch):
    """Many conversations in a row: the keys read per query block are its ancestors and itself, exactly."""
    monkeypatch.setattr(blockwise, "QUERY_BLOCK", 64)
    monkeypatch.setattr(blockwise, "KEY_CHUNK", 100)
    ends, _, visible = forest(random_parents(np.random.default_rng(0), 700, num_roots=6))
    read = 0
    for tile in blockwise._tiles(ends, 0, None, None):
        needed = np.flatnonzero(visible[tile.start : tile.stop].any(0))
        keys = []
        for chunk in reversed(tile.chunks):
            of_chunk = np.concatenate([np.arange(a, b) for a, b in chunk.ranges])
            assert len(of_chunk) <= 100
            assert visible[tile.start : tile.stop][:, of_chunk[: chunk.masked_from]].all()
            keys += of_chunk.tolist()
        assert needed.tolist() == keys, "every key that someone sees, and no other"
        assert set(range(tile.start, tile.stop)) <= set(of_chunk.tolist()), "the first chunk holds the queries' places"
        read += len(keys)
    assert read > 0


def detached(tensors):
    return [x.detach() for x in tensors]  # FlexAttention looks at requires_grad even where gradients are off


def test_flex_forward_on_cpu():
    q, k, v, _, ends, positions, visible = detached(problem(5, 256, dim=16, value_dim=16, dtype=torch.float32))
    with torch.no_grad():
        for softcap, window in ((None, None), (1.5, 40)):
            options = {"softcap": softcap, "position_ids": positions}
            found = tree_attention(q, k, v, ends, sliding_window=window, backend="flex", **options)
            wide = (x.double() for x in (q, k, v))
            expected = dense_attention(*wide, visible, window=window, positions=positions, softcap=softcap)
            close(found, expected, 1e-5)


def test_flex_with_a_window_inside_a_compiled_function():
    """The bug guarded: Inductor put what makes the window's tensor into the mask, and then found no kernel."""
    torch._dynamo.reset()
    q, k, v, _, ends, positions, visible = detached(problem(5, 300, dim=16, value_dim=16, dtype=torch.float32))
    attend = torch.compile(
        lambda *x: tree_attention(*x, ends, position_ids=positions, sliding_window=9, backend="flex")
    )
    with torch.no_grad():
        expected = dense_attention(*(x.double() for x in (q, k, v)), visible, window=9, positions=positions)
        close(attend(q, k, v), expected, 1e-5)
    torch._dynamo.reset()


def test_flex_raises_past_the_recompile_limit_and_never_runs_dense(monkeypatch):
    """The bug guarded: past dynamo's limit a compiled flex_attention silently materialised the L×L scores."""
    from flexmask.backends import flex

    torch._dynamo.reset()
    monkeypatch.setattr(flex, "RECOMPILE_LIMIT", 1)
    dtypes = (torch.float32, torch.bfloat16)  # a new dtype needs a compilation of its own
    with torch.no_grad(), pytest.raises(torch._dynamo.exc.FailOnRecompileLimitHit):
        for dtype in dtypes:
            q, k, v, _, ends, *_ = detached(problem(5, 128, dim=16, value_dim=16, dtype=dtype))
            tree_attention(q, k, v, ends, backend="flex")
    torch._dynamo.reset()


def test_flex_refuses_what_it_cannot_do():
    q, k, v, s, ends, *_ = problem(5, 128)
    with pytest.raises(NotImplementedError, match="'flex' cannot do float64; backend 'blockwise' can"):
        tree_attention(q, k, v, ends, backend="flex")
    q, k, v = q.float(), k.float(), v.float()
    with pytest.raises(NotImplementedError, match="gradients on cpu"):
        tree_attention(q, k, v, ends, backend="flex")
    with torch.no_grad(), pytest.raises(NotImplementedError, match="sinks on cpu"):
        tree_attention(q, k, v, ends, sinks=s, backend="flex")


@pytest.mark.skipif(pretended_cuda.missing() is not None, reason=str(pretended_cuda.missing()))
def test_flash_kernels_get_our_mask_and_scores():
    """Inductor writes their code for an H100 that is not here. `make kernels-check` compiles it, and runs what is ours of it."""
    script = Path(__file__).with_name("flash_ahead.py")
    run = subprocess.run([sys.executable, str(script), "--lower"], capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr[-3000:]
    sources = json.loads(run.stdout.splitlines()[-1])
    # Forward and backward, plain and with a soft-cap and a window; other windows and lengths need no kernels of their own.
    assert [("backward" in name, "def score_mod" in text) for name, text in sources.items()] == [
        (False, False), (True, False), (False, True), (True, True)
    ]  # fmt: skip
    for text in sources.values():
        assert "mask_mod=mask_mod" in text and re.search(r"block_size\W+\(128, 128\)", text)
        assert "ks0" not in text  # a length compiled in, which FlashAttention's cache does not tell from others


def test_flex_with_flash_kernels_is_asked_for_only_where_it_is_allowed(monkeypatch):
    """What FlexAttention is called with, and every reason not to; the GPU and the package are pretended."""
    from flexmask.backends import flex

    ends = torch.full((1, 256), 256, dtype=torch.int32)
    none = dict.fromkeys(("softcap", "sliding_window", "position_ids", "sinks"))

    class OnCuda(torch.Tensor):
        device = torch.device("cuda")

    def inputs(size=128, value_size=None, queries=256, dtype=torch.bfloat16):
        shapes = (queries, size), (256, size), (256, value_size or size)
        return [torch.zeros(1, 2, *shape, dtype=dtype).as_subclass(OnCuda) for shape in shapes]

    def refused(what, tensors, **options):
        with pytest.raises(NotImplementedError, match=f"'flex_flash' cannot run: {what}; backend 'flex' can"):
            flex.flash_attention(*tensors, ends, **none | {"scale": 1.0} | options)

    asked, capability = [], [9, 0]
    monkeypatch.setattr(flex, "_flex_attention", lambda: lambda *_, **options: asked.append(options))
    monkeypatch.setattr(flex, "_has_flash", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: tuple(capability))
    flex.flash_attention(*inputs(), ends, **none | {"scale": 1.0, "softcap": 2.0})
    assert asked[0]["kernel_options"] == {"BACKEND": "FLASH"} and asked[0]["score_mod"] is not None
    assert asked[0]["block_mask"].BLOCK_SIZE == (128, 128)

    refused("torch.float32 on cuda, only 16 bits on cuda", inputs(dtype=torch.float32))
    refused("torch.bfloat16 on cpu, only 16 bits on cuda", [x.as_subclass(torch.Tensor) for x in inputs()])
    refused("a head size of 136, only up to 128", inputs(136))
    refused("a head size of 100, only multiples of 8", inputs(100))
    refused("a head size of 8, only from 16", inputs(8))
    refused("a row of one token", [x[:, :, :1] for x in inputs()])
    refused("values of size 128 beside keys of size 64", inputs(64, 128))
    refused("queries of a part of the row", inputs(queries=128))
    refused("sinks, .*", inputs(), sinks=torch.zeros(2))
    torch.use_deterministic_algorithms(True)
    try:
        refused("repeatable gradients", inputs())
    finally:
        torch.use_deterministic_algorithms(False)
    monkeypatch.setattr(flex, "_has_flash", lambda: False)
    refused("without PyTorch 2.13 or newer and the package flash-attn-4 .*", inputs())
    capability[:] = 10, 0
    refused("compute capability 10.0, only 9.0", inputs())
    assert len(asked) == 1


def test_flash_attention_4_is_found_where_it_is_installed(tmp_path, monkeypatch):
    """Not in an older FlashAttention, which has the same name, and may not even import; also while a model is compiled."""
    from flexmask.backends import flex

    if importlib.util.find_spec("flash_attn"):
        pytest.skip("a package flash_attn is installed, in whose place made up ones are put here")
    monkeypatch.syspath_prepend(tmp_path)
    package = tmp_path / "flash_attn"
    package.mkdir()

    def found(version="2.13.0+cu130"):
        monkeypatch.setattr(torch, "__version__", torch.torch_version.TorchVersion(version))
        sys.modules.pop("flash_attn", None)
        importlib.invalidate_caches()
        flex._has_flash.cache_clear()
        return flex._has_flash()

    try:
        (package / "__init__.py").write_text("")
        assert not found()
        (package / "cute").mkdir()
        (package / "cute/__init__.py").write_text("")
        assert found() and not found("2.12.1")
        assert found()
        compiled = torch.compile(lambda x: x + flex._has_flash(), fullgraph=True, backend="eager")
        assert compiled(torch.zeros(1)) == 1
        (package / "__init__.py").write_text("raise ImportError('built for another PyTorch')")
        assert not found()
    finally:
        sys.modules.pop("flash_attn", None)
        flex._has_flash.cache_clear()


@pytest.fixture
def preferred(monkeypatch):
    """Puts a function in the place of "flex", first in the order of "auto"; returns the list of its calls."""

    def prefer(function):
        calls = []

        def backend(*args, **kwargs):
            calls.append(args[0].requires_grad)
            return function(*args, **kwargs)

        monkeypatch.setattr(flexmask.attention, "_broken", {})
        monkeypatch.setattr(flexmask.attention, "_probed", {})
        monkeypatch.setitem(flexmask.attention.BACKENDS, "flex", backend)
        monkeypatch.setattr(flexmask.attention, "_ELSEWHERE", flexmask.attention._ON_CUDA)
        return calls

    return prefer


def not_compilable(*args, **kwargs):
    raise torch._dynamo.exc.Unsupported("no compiler")


class FaultyBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx, out):
        return out.clone()

    @staticmethod
    def backward(ctx, grad):
        not_compilable()


def backward_not_compilable(*args, **kwargs):
    return FaultyBackward.apply(blockwise.attention(*args, **kwargs))


@pytest.mark.parametrize("fault", [not_compilable, backward_not_compilable])
def test_auto_falls_back_once_with_the_reason_and_the_same_result(fault, preferred, caplog):
    """Fault injected: the preferred backend cannot be compiled, at all or only in its backward."""
    q, k, v, _, ends, _, visible = problem(6, 64)
    calls = preferred(fault)
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            found, expected = tree_attention(q, k, v, ends), dense_attention(q, k, v, visible)
            close(found, expected, 1e-12)
            for a, b in zip(gradients(found, (q, k, v)), gradients(expected, (q, k, v)), strict=True):
                close(a, b, 1e-11)
    assert len(calls) == 1 and len(caplog.records) == 1
    assert "no compiler" in caplog.text and "'flex' failed" in caplog.text


def test_auto_probes_the_backward_once_per_kind_of_call(preferred):
    calls = preferred(blockwise.attention)
    q, k, v, _, ends, *_ = problem(6, 64)
    for softcap in (None, None, 2.0):
        tree_attention(q, k, v, ends, softcap=softcap).sum().backward()
    assert len(calls) == 5, "three calls, and a probe for each of the two kinds"
    with torch.no_grad():
        tree_attention(q, k, v, ends, softcap=3.0)
    assert len(calls) == 6
    grad = q.grad.clone()
    tree_attention(q, k, v, ends, softcap=4.0)
    assert torch.equal(q.grad, grad), "a probe leaves no gradient behind"


@pytest.mark.parametrize("reentrant", [True, False])
def test_probing_inside_gradient_checkpointing(preferred, reentrant):
    q, k, v, _, ends, *_ = problem(6, 64)
    expected = gradients(tree_attention(q, k, v, ends), (q, k, v))
    calls = preferred(blockwise.attention)
    out = torch.utils.checkpoint.checkpoint(
        lambda *qkv: tree_attention(*qkv, ends) * 1.0, q, k, v, use_reentrant=reentrant
    )
    weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    (out * weight).sum().backward()
    for x, gradient in zip((q, k, v), expected, strict=True):
        close(x.grad, gradient, 1e-12)
    assert len(calls) == 3, "forward, recomputation, and one probe"


def test_auto_goes_on_with_a_backend_that_cannot_do_one_call(preferred):
    """The bug guarded: one call in float64 banned FlexAttention for the rest of the process."""
    calls = preferred(flexmask.attention.flex.attention)
    q, k, v, _, ends, _, visible = problem(6, 64)
    for _ in range(2):
        close(tree_attention(q, k, v, ends), dense_attention(q, k, v, visible), 1e-12)
    assert len(calls) == 1 and not flexmask.attention._broken, "asked once for this kind, and not banned"


@pytest.mark.parametrize("calls", [1, 3])
def test_a_call_that_a_backend_refused_leaves_no_tensors_behind(preferred, calls):
    """The bug guarded: the refusal was kept as it was raised, with the tensors of every frame, and grew by each call's."""
    preferred(flexmask.attention.flex.attention)

    def layer():
        q, k, v, _, ends, *_ = problem(6, 64)
        hidden = torch.empty(1)
        tree_attention(q, k, v, ends)
        return [weakref.ref(x) for x in (q, k, v, hidden)]

    kept = [x for _ in range(calls) for x in layer()]
    gc.collect()
    assert not any(x() is not None for x in kept)


def test_a_backend_that_refuses_only_its_backward_is_asked_once_per_kind(preferred):
    """The bug guarded: the second step failed inside loss.backward(), because the refusal was not remembered."""

    class Refuses(torch.autograd.Function):
        @staticmethod
        def forward(ctx, out):
            return out.clone()

        @staticmethod
        def backward(ctx, grad):
            raise NotImplementedError("no backward")

    calls = preferred(lambda *args, **kwargs: Refuses.apply(blockwise.attention(*args, **kwargs)))
    q, k, v, _, ends, *_ = problem(6, 64)
    for _ in range(3):
        tree_attention(q, k, v, ends).sum().backward()
    assert len(calls) == 1 and not flexmask.attention._broken


def test_the_second_length_is_probed_too_and_no_third(preferred):
    calls = preferred(blockwise.attention)
    for length in (64, 65, 66, 64):
        q, k, v, _, ends, *_ = problem(6, length)
        tree_attention(q, k, v, ends)
    assert len(calls) == 4 + 2


def test_what_auto_means_can_be_set(preferred, monkeypatch):
    calls = preferred(blockwise.attention)
    monkeypatch.setattr(flexmask.attention, "_override", "auto")
    q, k, v, _, ends, *_ = problem(6, 64)
    flexmask.set_backend("blockwise")
    tree_attention(q, k, v, ends)
    assert not calls
    flexmask.set_backend("auto")
    tree_attention(q, k, v, ends)
    assert calls
    with pytest.raises(
        ValueError,
        match="backend is 'fast', expected one of auto, flex, flex_flash, flash, triton, blockwise",
    ):
        flexmask.set_backend("fast")
    code = "import flexmask.attention as a; print(a._override)"
    environment = os.environ | {"FLEXMASK_BACKEND": "triton"}
    run = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "triton"


def test_flex_never_runs_where_compilation_is_switched_off():
    """The bug guarded: uncompiled FlexAttention silently materialises the L×L scores."""
    q, k, v, _, ends, *_ = detached(problem(5, 128, dim=16, value_dim=16, dtype=torch.float32))
    torch._dynamo.reset()
    stance = torch.compiler.set_stance("force_eager")
    with stance, torch.no_grad(), pytest.raises(NotImplementedError, match=r"needs torch\.compile"):
        tree_attention(q, k, v, ends, backend="flex")
    torch._dynamo.reset()


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("of memory"), RuntimeError("device-side assert")])
def test_auto_does_not_hide_other_errors(preferred, error):
    def fails(*args, **kwargs):
        raise error

    preferred(fails)
    q, k, v, _, ends, *_ = problem(6, 64)
    with pytest.raises(type(error), match=str(error)):
        tree_attention(q, k, v, ends)
    assert not flexmask.attention._broken


def test_flex_is_compiled_for_queries_of_any_last_tokens():
    """Pieces of rows come in all sizes, each after another number of keys."""
    from flexmask.backends import flex

    torch._dynamo.reset()
    with torch.no_grad(), pytest.MonkeyPatch.context() as patch:
        pieces = [(384, 128), (640, 256), (640, 512), (512, 256), (896, 128), (700, 384), (384, 256)]
        for i, (length, first) in enumerate(pieces):
            if i == 3:  # one length, any, and a single block; it raises if there is more to compile
                patch.setattr(flex, "RECOMPILE_LIMIT", 1)
            q, k, v, _, ends, _, visible = detached(problem(5, length, dim=16, value_dim=16, dtype=torch.float32))
            found = tree_attention(q[:, :, first:], k, v, ends, backend="flex")
            close(found, dense_attention(*(x.double() for x in (q, k, v)), visible)[:, :, first:], 1e-5)
    torch._dynamo.reset()


def test_flex_compiles_more_variants_than_dynamos_limit_and_lengths_cost_none():
    """The bug guarded: a second soft-cap became symbolic, which the CPU kernel refused; and dynamo's limit is 8."""
    from flexmask.backends import flex

    torch._dynamo.reset()
    with torch.no_grad(), torch._dynamo.config.patch(recompile_limit=2):
        for softcap in (None, 2.0, 3.0):
            for length in (128, 256, 384):
                q, k, v, _, ends, *_ = detached(problem(5, length, dim=16, value_dim=16, dtype=torch.float32))
                tree_attention(q, k, v, ends, softcap=softcap, backend="flex")
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(flex, "RECOMPILE_LIMIT", 1)
            q, k, v, _, ends, *_ = detached(problem(5, 640, dim=16, value_dim=16, dtype=torch.float32))
            tree_attention(q, k, v, ends, softcap=3.0, backend="flex")  # would raise if it had to be compiled
    torch._dynamo.reset()


def test_autocast_casts_as_pytorchs_attention_does():
    """Models with float32 weights hand over float32 q and k with a bfloat16 v under autocast."""
    q, k, v, _, ends, _, visible = problem(7, 64, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        out = tree_attention(q, k, v.to(torch.bfloat16), ends)
    assert out.dtype == torch.bfloat16
    close(out, dense_attention(q, k, v, visible), 2e-2)


ends_of_8 = torch.full((1, 8), 8, dtype=torch.int32)
x8 = torch.zeros(1, 2, 8, 4)


@pytest.mark.parametrize(
    "change, error, text",
    [
        ({"query": torch.zeros(2, 8, 4)}, ValueError, r"query has shape \(2, 8, 4\)"),
        ({"key": torch.zeros(1, 2, 8, 4, dtype=torch.float64)}, TypeError, "key is torch.float64 beside"),
        ({"query": torch.zeros(1, 2, 8, 4, dtype=torch.int64)}, TypeError, "query is torch.int64"),
        ({"key": torch.zeros(1, 2, 9, 4)}, ValueError, "do not fit"),
        ({"query": torch.zeros(1, 3, 8, 4)}, ValueError, "multiple of kv_heads"),
        ({"query": torch.zeros(1, 2, 4, 4)}, ValueError, "a query of the last tokens, for a batch of 1, 128"),
        ({"subtree_end": ends_of_8.long()}, TypeError, "int64, expected an int32"),
        ({"subtree_end": [8] * 8}, TypeError, "list, expected an int32"),
        ({"subtree_end": None}, TypeError, "NoneType, expected an int32"),
        ({"subtree_end": ends_of_8.float()}, TypeError, "float32, expected an int32"),
        ({"subtree_end": ends_of_8[:, :7] - 1}, ValueError, r"shape \(1, 7\), expected \(1, 8\)"),
        ({"subtree_end": ends_of_8 + 1}, ValueError, "expected an end in 1..8"),
        ({"subtree_end": torch.tensor([[2, 3, 3, 8, 8, 8, 8, 8]], dtype=torch.int32)}, ValueError, "never cross"),
        ({"softcap": -1.0}, ValueError, "softcap is -1.0"),
        ({"scale": 0.0}, ValueError, "scale is 0.0, expected a positive number"),
        ({"sliding_window": 0}, ValueError, "sliding_window is 0"),
        ({"sliding_window": 4}, ValueError, "needs position_ids"),
        ({"sliding_window": 4, "position_ids": torch.zeros(1, 8)}, ValueError, "position_ids is torch.float32"),
        ({"sinks": torch.zeros(3)}, ValueError, r"sinks has shape \(3,\)"),
        ({"backend": "cuda"}, ValueError, "backend is 'cuda', expected one of auto"),
    ],
)
def test_bad_arguments(change, error, text):
    arguments = {"query": x8, "key": x8, "value": x8, "subtree_end": ends_of_8} | change
    with pytest.raises(error, match=text):
        tree_attention(**arguments)

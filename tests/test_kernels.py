"""The Triton kernels against dense attention in float64: on a GPU if there is one, else in Triton's interpreter.

The interpreter is wrong in bfloat16 (Triton's own limitation), so that dtype is tested on a GPU only.
"""

import dataclasses
import importlib.util
import logging
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import conversation_passes, dense_attention, forest
from test_attention import close, problem

import flexmask.attention
from flexmask import TokenTree, tree_attention
from flexmask.backends import blockwise
from flexmask.backends import triton as triton_backend
from flexmask.mask import tile_lists

triton = pytest.importorskip("triton", reason="the Triton kernels need Triton, which this platform does not have")
import triton.language as tl
from flexmask_kernels import attention as kernels
from flexmask_kernels.configs import TABLE, Config, Configs, architecture, configs
from flexmask_kernels.tiles import tanh


@triton.jit
def tanh_kernel(x, y, n, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    tl.store(y + at, tanh(tl.load(x + at, at < n, 0.0)), at < n)


DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TOLERANCE = {torch.float32: 4e-6, torch.float16: 4e-3, torch.bfloat16: 3e-2}


@pytest.fixture(autouse=True)
def unwritten_is_nan():
    """Whatever a kernel should have written and has not is NaN."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    with np.errstate(divide="ignore", invalid="ignore"):  # rows beyond the end, which are not stored
        yield
    torch.use_deterministic_algorithms(False)


def use_tiles(patch, m, n, *, on_gpu=False):
    """Large tiles are quick in the interpreter; a GPU keeps to the pinned ones, which fit into its shared memory."""
    if DEVICE == "cuda" and not on_gpu:
        return
    config = Config(m, n, num_warps=4, num_stages=1)
    patch.setattr(kernels, "configs", lambda *_: Configs(config, config, config))


def check(inputs, ends, positions, visible, *, window=None, softcap=None, sinks=None, scale=None, backend="triton"):
    """Output and gradients of the kernels against dense attention in float64."""
    options = {"softcap": softcap, "scale": scale}
    leaves = [*inputs, sinks] if sinks is not None else [*inputs]
    ours = [x.detach().to(DEVICE).requires_grad_() for x in leaves]
    found = tree_attention(
        *ours[:3], ends.to(DEVICE), sliding_window=window, position_ids=positions.to(DEVICE), backend=backend,
        sinks=ours[3] if sinks is not None else None, **options,
    )  # fmt: skip
    assert found.dtype == inputs[0].dtype and found.transpose(1, 2).is_contiguous()
    wide = [x.detach().double().requires_grad_() for x in leaves]
    expected = dense_attention(
        *wide[:3], visible, window=window, positions=positions, sinks=wide[3] if sinks is not None else None, **options
    )
    tolerance = TOLERANCE[inputs[0].dtype]
    close(found.cpu(), expected, tolerance)
    weight = torch.randn(found.shape, generator=torch.Generator().manual_seed(0)).to(found.dtype)
    found_gradients = torch.autograd.grad((found * weight.to(DEVICE)).sum(), ours)
    for a, b in zip(found_gradients, torch.autograd.grad((expected * weight.double()).sum(), wide), strict=True):
        close(a.cpu(), b, 4 * tolerance)


@settings(deadline=None, max_examples=20 if DEVICE == "cuda" else 12, print_blob=True)
@given(
    seed=st.integers(0, 2**32 - 1),
    length=st.sampled_from([1, 17, 113, 127, 128, 129, 256, 300]),
    batch=st.integers(1, 2),
    heads=st.sampled_from([(1, 1), (2, 1), (2, 2), (4, 2)]),
    dims=st.sampled_from([(16, 16), (24, 40), (80, 80), (48, 32)]),
    dtype=st.sampled_from([torch.float32, torch.float16]),
    softcap=st.sampled_from([None, 1.5]),
    window=st.sampled_from([None, 1, 7, 1000]),
    sinks=st.booleans(),
    scale=st.sampled_from([None, 0.3]),
    tiles=st.sampled_from([(128, 128), (128, 64), (64, 128)]),
)
def test_kernels_are_dense_attention(
    seed, length, batch, heads, dims, dtype, softcap, window, sinks, scale, tiles
):  # fmt: skip
    *inputs, s, ends, positions, visible = problem(
        seed, length, batch=batch, heads=heads[0], kv_heads=heads[1], dim=dims[0], value_dim=dims[1], dtype=dtype
    )
    with pytest.MonkeyPatch.context() as patch:
        use_tiles(patch, *tiles)
        check(inputs, ends, positions, visible, window=window, softcap=softcap, sinks=s if sinks else None, scale=scale)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16] + [torch.bfloat16] * (DEVICE == "cuda"))
@pytest.mark.parametrize("dims", [(256, 256), (192, 128), (96, 96), (64, 128)])
def test_head_sizes(dims, dtype, monkeypatch):
    use_tiles(monkeypatch, 128, 128)
    *inputs, _, ends, positions, visible = problem(
        0, 140, heads=2, kv_heads=1, dim=dims[0], value_dim=dims[1], dtype=dtype
    )
    check(inputs, ends, positions, visible)


def test_query_heads_read_the_key_heads_of_their_group(monkeypatch):
    """4 query heads on 2 key heads: 0, 0, 1, 1, and not 0, 1, 0, 1."""
    use_tiles(monkeypatch, 128, 128)
    *inputs, s, ends, positions, visible = problem(
        5, 140, heads=4, kv_heads=2, dim=16, value_dim=16, dtype=torch.float32
    )
    check(inputs, ends, positions, visible, sinks=s)


@pytest.mark.parametrize("sinks", ["column", "expanded", "nothing"])
def test_sinks_of_any_layout(sinks, monkeypatch):
    """The bug guarded: a column or an expanded scalar was read as if contiguous, and a sink of -inf gave NaN."""
    use_tiles(monkeypatch, 128, 128)
    *inputs, _, ends, _, visible = problem(5, 140, heads=4, dim=16, value_dim=16, dtype=torch.float32)
    values = torch.randn(4, 3, generator=torch.Generator().manual_seed(0))
    s = {"column": values[:, 1], "expanded": values[0, :1].expand(4), "nothing": torch.full((4,), -torch.inf)}[sinks]
    found = tree_attention(*(x.to(DEVICE) for x in inputs), ends.to(DEVICE), sinks=s.to(DEVICE), backend="triton")
    close(found.cpu(), dense_attention(*(x.double() for x in inputs), visible, sinks=s.double()), 4e-6)


def test_queries_keys_and_values_are_not_copied(monkeypatch):
    """As transformers hands them over: slices of a projection, heads after places."""
    launched = []

    class Recorded:
        def __getitem__(self, grid):
            return lambda *args, **kwargs: launched.append(args)

    monkeypatch.setattr(kernels, "forward_kernel", Recorded())
    fused = torch.randn(1, 140, 6, 16, device=DEVICE)
    q, k, v = (x.transpose(1, 2) for x in fused.split(2, dim=2))
    tree_attention(q, k, v, torch.full((1, 140), 140, dtype=torch.int32, device=DEVICE), backend="triton")
    assert [x.data_ptr() for x in launched[0][:3]] == [x.data_ptr() for x in (q, k, v)]


def test_a_long_row_of_conversations(monkeypatch):
    """Full, partial and empty tiles; a length that is no multiple of a block; and padding at the end."""
    use_tiles(monkeypatch, 128, 128)
    rng = np.random.default_rng(0)
    row = TokenTree.concat([TokenTree.from_passes(conversation_passes(rng, n, 30, 150, 60)) for n in (2, 1)])
    length, padding = 1023, 1023 - len(row)
    assert 5 < padding < 400
    ends = torch.from_numpy(np.append(row.subtree_end, np.arange(len(row) + 1, length + 1)).astype(np.int32))[None]
    lists = tile_lists(ends)
    assert lists.full_kv_begin[-1] > 0 and lists.kv_begin[-1] + lists.full_kv_begin[-1] < 36
    places = torch.arange(length)
    visible = (places[None] <= places[:, None]) & (places[:, None] < ends[0][None])
    *inputs, _, _, positions, _ = problem(1, length, heads=2, kv_heads=1, dim=16, value_dim=16, dtype=torch.float32)
    check(inputs, ends, positions, visible[None])


PINNED = {
    (config.block_m, config.block_n)
    for sizes in TABLE.values()
    for chosen in sizes.values()
    for config in (chosen.forward, chosen.dkv, chosen.dq)
}


@pytest.mark.parametrize("tiles", sorted(PINNED))
def test_every_pinned_tile_size(tiles, monkeypatch):
    use_tiles(monkeypatch, *tiles, on_gpu=True)
    *inputs, _, ends, positions, visible = problem(
        2, 150, heads=1, kv_heads=1, dim=16, value_dim=16, dtype=torch.float32
    )
    check(inputs, ends, positions, visible)


def test_rows_of_nothing_but_padding(monkeypatch):
    """They give the values back, and no NaN; beside a batch entry that is one long sequence."""
    use_tiles(monkeypatch, 128, 128)
    *inputs, _, _, _, _ = problem(3, 200, batch=2, heads=2, dim=16, value_dim=16, dtype=torch.float32)
    places = torch.arange(200)
    ends = torch.stack([places + 1, torch.full((200,), 200)]).to(torch.int32)
    causal = places[None] <= places[:, None]
    check(inputs, ends, places.expand(2, -1), torch.stack([torch.eye(200, dtype=torch.bool), causal]))


def test_a_full_tile_that_reaches_beyond_the_row(monkeypatch):
    """One plain sequence: queries 128 to 129 are a full tile against the first keys, cut into tiles that hold none."""
    use_tiles(monkeypatch, 32, 64, on_gpu=True)
    *inputs, _, _, _, _ = problem(3, 130, heads=2, dim=16, value_dim=16, dtype=torch.float32)
    places = torch.arange(130)
    causal = (places[None] <= places[:, None])[None]
    check(inputs, torch.full((1, 130), 130, dtype=torch.int32), places[None], causal)


def test_strided_inputs_as_transformers_hands_them_over(monkeypatch):
    """(batch, L, heads, head_dim) in memory, slices of one fused projection; and a gradient that is an expanded scalar."""
    use_tiles(monkeypatch, 128, 128)
    *_, ends, _, visible = problem(4, 140, heads=2)
    fused = torch.randn(1, 140, 2 + 2 + 2, 16, generator=torch.Generator().manual_seed(0))
    q, k, v = (x.transpose(1, 2) for x in fused.to(DEVICE).split(2, dim=2))
    q, k, v = (x.detach().requires_grad_() for x in (q, k, v))
    assert not q.is_contiguous()
    wide = [x.detach().cpu().double().requires_grad_() for x in (q, k, v)]
    tree_attention(q, k, v, ends.to(DEVICE), backend="triton").sum().backward()
    dense_attention(*wide, visible).sum().backward()
    for a, b in zip((q, k, v), wide, strict=True):
        close(a.grad.cpu(), b.grad, 2e-5)


def test_soft_cap_is_accurate_where_scores_are_small():
    """The bug guarded: 1 - 2 / (exp(2x) + 1) cancels for small x, and a cap of 50 multiplies that."""
    x = torch.cat([torch.logspace(-6, 1.5, 3000), torch.tensor([0.0, 0.6, 0.5999999])])
    x = torch.cat([x, -x]).to(DEVICE)
    y = torch.empty_like(x)
    tanh_kernel[(1,)](x, y, len(x), BLOCK=8192)
    exact = torch.tanh(x.double())
    assert ((y.double() - exact).abs() <= 4e-7 * exact.abs()).all()


@pytest.mark.skipif(DEVICE == "cuda", reason="counts calls of the interpreter; a compiled kernel makes none")
def test_kernels_visit_exactly_the_tiles_that_hold_something(monkeypatch):
    use_tiles(monkeypatch, 128, 128)
    tree = TokenTree.from_passes(conversation_passes(np.random.default_rng(0), 3, 40, 150, 60))
    ends = torch.from_numpy(tree.subtree_end)[None]
    _, _, visible = forest(_parents(tree))
    blocks = -(-len(tree) // 128)
    padded = np.zeros((blocks * 128,) * 2, bool)
    padded[: len(tree), : len(tree)] = visible
    expected = padded.reshape(blocks, 128, blocks, 128).any((1, 3)).sum()
    assert expected < blocks * (blocks + 1) // 2, "some tile is empty"

    from flexmask_kernels import backward, forward

    calls = {}
    for module in (forward, backward):

        def counting(*args, right=module.load_tile, name=module.__name__, **kwargs):
            calls[name] = calls.get(name, 0) + 1
            return right(*args, **kwargs)

        monkeypatch.setattr(module, "load_tile", counting)
    q, k, v = (torch.randn(1, 2, len(tree), 16, requires_grad=True) for _ in range(3))
    out = tree_attention(q, k, v, ends, backend="triton")
    heads = 2
    assert calls == {forward.__name__: heads * (blocks + 2 * expected)}, "q once; k and v of every tile"
    out.sum().backward()
    delta, dkv, dq = 2 * 4 * blocks, 2 * blocks + 2 * expected, 2 * blocks + 2 * expected
    assert calls[backward.__name__] == heads * (delta + dkv + dq)


def _parents(tree):
    parent = np.full(len(tree), -1)
    path = []
    for k, depth in enumerate(tree.position_ids):
        path = path[:depth]
        parent[k] = path[-1] if path else -1
        path.append(k)
    return parent


def no_c_compiler():
    """What Triton itself does where gcc is missing, under FlexAttention or alone: a plain RuntimeError."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PATH", "")
        patch.delenv("CC", raising=False)
        triton.runtime.build._build("driver", "", "", [], [], [], [])


def no_driver():
    """Triton's driver module where there is none: an AssertionError."""
    exec(
        compile("raise AssertionError('libcuda.so cannot found')", "driver.py", "exec"),
        {"__name__": "triton.backends.x"},
    )


def no_valid_choices():
    from torch._inductor import select_algorithm

    raise select_algorithm.NoValidChoicesError("No choices to select")


def out_of_shared_memory():
    raise triton.runtime.errors.OutOfResources(280_000, 232_448, "shared memory")


@pytest.mark.parametrize("fault", [no_c_compiler, no_driver, no_valid_choices, out_of_shared_memory])
@pytest.mark.parametrize("where", ["forward", "backward"])
def test_auto_goes_from_flex_to_triton(fault, where, monkeypatch, caplog):
    """FlexAttention fails: said once with the reason, the same result from our kernels."""

    class Fails(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone() if where == "backward" else fault()

        @staticmethod
        def backward(ctx, grad):
            fault()

    def flex(*args, **kwargs):
        return Fails.apply(blockwise.attention(*args, **kwargs))

    used = []
    monkeypatch.setitem(flexmask.attention.BACKENDS, "flex", flex)
    monkeypatch.setitem(
        flexmask.attention.BACKENDS, "triton", lambda *a, **k: used.append(1) or triton_backend.attention(*a, **k)
    )
    for name, value in (("_broken", {}), ("_probed", {}), ("_ELSEWHERE", flexmask.attention._ON_CUDA)):
        monkeypatch.setattr(flexmask.attention, name, value)
    use_tiles(monkeypatch, 128, 128)
    *inputs, _, ends, positions, visible = problem(6, 64, heads=2, dim=16, value_dim=16, dtype=torch.float32)
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            check(inputs, ends, positions, visible, backend="auto")
    assert len(used) == 3, "two calls and a probe"
    message = caplog.messages[0]
    assert len(caplog.messages) == 1 and "'flex' failed" in message
    assert any(
        reason in message for reason in ("C compiler", "libcuda", "No choices", "out of resource: shared memory")
    )


def test_float32_products_are_exact_unless_tf32_is_asked_for(monkeypatch):
    monkeypatch.setattr(kernels, "INTERPRETED", False)
    assert kernels._precision() == "bf16x6"
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("high")
        assert kernels._precision() == "tf32"
    finally:
        torch.set_float32_matmul_precision(before)


@pytest.mark.parametrize("length", [1, 17, 113, 127, 129, 1023])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_awkward_lengths_with_every_feature(length, dtype, monkeypatch):
    use_tiles(monkeypatch, 128, 128)
    *inputs, s, ends, positions, visible = problem(
        length, length, batch=2, heads=2, kv_heads=1, dim=16, value_dim=24, dtype=dtype
    )
    check(inputs, ends, positions, visible, window=50, softcap=1.5, sinks=s)


def test_operators_satisfy_pytorch(monkeypatch):
    use_tiles(monkeypatch, 128, 128)
    q, k, v, s, ends, positions, _ = (
        x.to(DEVICE) for x in problem(1, 40, heads=2, dim=16, value_dim=24, dtype=torch.float32)
    )
    q, k, v, s = (x.detach().requires_grad_() for x in (q, k, v, s))
    lists = tile_lists(ends)
    tensors = [getattr(lists, field.name) for field in dataclasses.fields(lists)]
    ends, positions = (triton_backend._whole_blocks(x) for x in (ends, positions))
    for softcap, window, sinks in ((None, None, None), (1.5, 5, s)):
        arguments = (q, k, v, ends, tensors, positions, sinks, 0.5, softcap, window)
        torch.library.opcheck(kernels._forward, arguments)


def test_what_the_kernels_do_not_have_is_refused():
    *inputs, _, ends, _, _ = problem(1, 20, dim=8, value_dim=8)
    with pytest.raises(NotImplementedError, match=r"take torch.float16.*query is torch.float64"):
        tree_attention(*inputs, ends, backend="triton")
    with pytest.raises(NotImplementedError, match="head sizes from 16 to 256; head_dim is 8"):
        tree_attention(*(x.float() for x in inputs), ends, backend="triton")
    q, k, v, ends = (x.to(DEVICE) for x in (*(x.float().new_ones(1, 2, 20, 16) for x in inputs), ends))
    lists = [getattr(tile_lists(ends), field.name) for field in dataclasses.fields(tile_lists(ends))]
    with pytest.raises(ValueError, match=r"subtree_end is torch.int32 \(1, 20\), expected int32 \(1, 128\)"):
        kernels.tree_attention(q, k, v, ends, lists, scale=1.0)
    ends = triton_backend._whole_blocks(ends)
    with pytest.raises(ValueError, match="sliding_window is 4 without position_ids"):
        kernels.tree_attention(q, k, v, ends, lists, scale=1.0, sliding_window=4)
    with pytest.raises(ValueError, match="lists have 1 lines, expected 2, of blocks of 128 tokens"):
        kernels.tree_attention(*(x.new_ones(1, 2, 140, 16) for x in (q, k, v)), ends, lists, scale=1.0)
    with pytest.raises(NotImplementedError, match=r"compute capability 8.0 or newer, this device has 7.5"):
        configs((7, 5), 64, torch.float16)
    assert [architecture(c) for c in ((8, 0), (8, 9), (9, 0), (10, 0), (12, 1))] == [80, 120, 90, 100, 120]


@pytest.mark.skipif(DEVICE == "cuda", reason="a GPU machine does not need the refusal")
def test_outside_cuda_and_the_interpreter_it_is_refused(monkeypatch):
    monkeypatch.setattr(kernels, "INTERPRETED", False)
    *inputs, _, ends, _, _ = problem(1, 20, dim=16, value_dim=16, dtype=torch.float32)
    with pytest.raises(NotImplementedError, match="run on CUDA; query is on cpu"):
        tree_attention(*inputs, ends, backend="triton")


def test_the_folder_does_not_pass_for_hugging_faces_kernels():
    """That package is called `kernels` too; transformers looks for it, and the repository's root may be on the path."""
    root = Path(__file__).parent.parent
    code = "from transformers.utils import is_kernels_available as a; import transformers.integrations; print(a())"
    out = [
        subprocess.run([sys.executable, "-c", code], cwd=cwd, capture_output=True, text=True, check=True).stdout
        for cwd in (root, root / "docs")
    ]
    assert out[0] == out[1]
    assert importlib.util.find_spec("flexmask_kernels").origin is None, (
        "no __init__.py: not a package that can shadow one"
    )


@pytest.mark.skipif(
    DEVICE == "cuda", reason="make kernels-check is for machines without a GPU; the CUDA tests run the kernels"
)
def test_pinned_configurations_compile_ahead_of_time():
    """A sample here (head size 128, Hopper); `make kernels-check` compiles the whole table. Bounds of the instructions of a step
    are a twentieth above the most that Triton 3.6, 3.7.1 and 3.9 need."""
    code = """
import torch
from flexmask_kernels.check import KERNELS, SHARED_MEMORY, TABLE, compile_ahead, usage
most = {"forward": (402, 489, 560), "dkv": (506, 667), "dq": (363, 452, 523)}
compiled = {
    name: compile_ahead(KERNELS[name], getattr(TABLE[90, False][128], name), 90, torch.bfloat16, 128, 128) for name in most
}
for name, bounds in most.items():
    found = usage(compiled[name])
    assert found.shared <= SHARED_MEMORY[90] and found.tensor_cores == "wgmma", found
    assert len(found.steps) == len(bounds) and all(n <= bound for n, bound in zip(found.steps, bounds)), (name, found)
    assert name == "dkv" or found.spilled == 0, (name, found)
# The bug guarded: with the index loaded in the step that uses it, the loop over full tiles loaded one step ahead only.
text = compiled["forward"].asm["ttgir"]
assert text.count("memdesc<3x64x128xbf16") >= 4 and "memdesc<2x64x128" not in text
"""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    subprocess.run([sys.executable, "-c", code], env=environment, check=True)

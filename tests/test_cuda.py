"""What only a GPU can show: `make gpu-test`. Error budgets, repeatability, memory, large tensors."""

import copy
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from models import tiny
from reference import conversation_passes, dense_attention
from test_attention import problem

from flexmask import TokenTree, backward_by_branches, tree_attention, tree_loss
from flexmask.attention import using_backend
from flexmask.backends.flex import MAX_FLASH_HEAD_DIM, _has_flash
from flexmask.collator import to_batch

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

FEATURES = {
    "plain": {},
    "softcap": {"softcap": 1.5},
    "window": {"window": 40},
    "sinks": {"sinks": True},
    "softcap and window": {"softcap": 1.5, "window": 40},
    "all": {"softcap": 1.5, "window": 40, "sinks": True},
}
SHAPES = [(1024, (size, size)) for size in (128, 256, 96, 80, 16)] + [(513, (64, 64)), (1024, (192, 128))]
CASES = [(name, 1024, (64, 64)) for name in FEATURES]
CASES += [(name, *shape) for name in ("plain", "all") for shape in SHAPES]


@pytest.fixture(autouse=True)
def give_memory_back():
    """To the tests of other processes."""
    yield
    torch.cuda.empty_cache()


def everything(attend, leaves, weight):
    out = attend(*leaves)
    return [out, *torch.autograd.grad((out * weight.to(out)).sum(), leaves)]


def relative_errors(found, exact):
    return [((a.double() - b).norm() / b.norm()).item() for a, b in zip(found, exact, strict=True)]


@pytest.mark.parametrize("backend", ["flash", "flex", "triton", "flex_flash"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("features, length, dims", CASES)
def test_error_is_at_most_twice_that_of_plain_pytorch(backend, dtype, features, length, dims):
    """Against float64, as a norm, for the output and every gradient.

    Plain PyTorch is scaled_dot_product_attention with the dense mask, or, for the soft-cap and sinks that it does not have,
    the same written out. Sinks have one gradient a head, and the norm of a few numbers is a matter of luck: so many heads.
    """
    features = FEATURES[features]
    if backend == "flash" and (dtype == torch.float32 or {"softcap", "sinks"} & set(features)):
        pytest.skip("the backend has 16 bits, and neither soft-cap nor sinks")
    unequal, large = dims[0] != dims[1], max(dims) > MAX_FLASH_HEAD_DIM
    if backend == "flex_flash" and (dtype == torch.float32 or "sinks" in features or unequal or large):
        pytest.skip("the backend has 16 bits, one head size up to 128, and no sinks")
    if backend == "flex_flash" and not (torch.cuda.get_device_capability()[0] == 9 and _has_flash()):
        pytest.skip("needs compute capability 9.0, PyTorch 2.13 and the package flash-attn-4")
    heads = 32 if "sinks" in features else 4
    sizes = {"heads": heads, "kv_heads": heads // 2, "dim": dims[0], "value_dim": dims[1]}
    *inputs, s, ends, positions, visible = (x.cuda() for x in problem(0, length, batch=2, dtype=dtype, **sizes))
    window, softcap = features.get("window"), features.get("softcap")
    leaves = [x.detach().requires_grad_() for x in ([*inputs, s] if "sinks" in features else inputs)]
    weight = torch.randn(2, heads, length, dims[1], device="cuda", dtype=torch.float64)

    def ours(q, k, v, sinks=None):
        options = {"softcap": softcap, "sliding_window": window, "position_ids": positions, "sinks": sinks}
        return tree_attention(q, k, v, ends, backend=backend, **options)

    def dense(q, k, v, sinks=None):
        return dense_attention(q, k, v, visible, softcap=softcap, window=window, positions=positions, sinks=sinks)

    def sdpa(q, k, v):
        mask = visible
        if window is not None:
            mask = mask & (positions[:, :, None] - positions[:, None, :] < window)
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask[:, None], enable_gqa=True)

    exact = everything(dense, [x.detach().double().requires_grad_() for x in leaves], weight)
    theirs = dense if softcap or "sinks" in features else sdpa
    try:
        ours, plain = (relative_errors(everything(f, leaves, weight), exact) for f in (ours, theirs))
    except torch._inductor.exc.InductorError as error:
        if backend == "flex" and dtype == torch.float32 and "out of resource" in str(error):
            pytest.skip("FlexAttention's own tiles for float32 do not fit into this GPU's shared memory")
        raise
    for name, a, b in zip(("out", "dq", "dk", "dv", "dsinks"), ours, plain, strict=False):
        assert a <= 2 * b, f"{name}: {a:.2e}, plain PyTorch {b:.2e}"


def conversation_row(length, turns=12, batch=1):
    rng = np.random.default_rng(0)
    tree = TokenTree.from_passes(conversation_passes(rng, turns, 80, 400, 120))
    row = TokenTree.concat([tree] * (length // len(tree) + 1))
    return torch.from_numpy(row.subtree_end[:length].clip(max=length)).expand(batch, -1).contiguous().cuda()


@pytest.mark.parametrize("backend", ["flash", "flex"])
@pytest.mark.parametrize("window", [None, 40])
@pytest.mark.parametrize("first", [128, 896])
def test_queries_of_the_last_tokens_alone(backend, window, first):
    """Against float64, at most twice as far as with the queries of all."""
    *inputs, _, ends, positions, visible = (
        x.cuda() for x in problem(0, 1024, dtype=torch.bfloat16, dim=64, value_dim=64)
    )
    leaves = [x.detach().requires_grad_() for x in inputs]
    weight = torch.randn(1, 4, 1024 - first, 64, device="cuda", dtype=torch.float64)

    def ours(q, k, v):
        options = {"sliding_window": window, "position_ids": positions, "backend": backend}
        return tree_attention(q[:, :, first:], k, v, ends, **options)

    def of_all(q, k, v):
        options = {"sliding_window": window, "position_ids": positions, "backend": backend}
        return tree_attention(q, k, v, ends, **options)[:, :, first:]

    def dense(q, k, v):
        return dense_attention(q, k, v, visible, window=window, positions=positions)[:, :, first:]

    exact = everything(dense, [x.detach().double().requires_grad_() for x in leaves], weight)
    found, whole = (relative_errors(everything(f, leaves, weight), exact) for f in (ours, of_all))
    for a, b in zip(found, whole, strict=True):
        assert a <= 2 * b


@pytest.mark.parametrize("backend", ["auto", "flash", "flex"])
def test_branch_by_branch(backend):
    """Losses and gradients of a model in bfloat16, at most twice as far from float32 as those of the whole row; and memory: of a
    step, and that none of it is kept (the bug guarded: "auto" kept the tensors of calls that a backend had refused)."""
    passes = conversation_passes(np.random.default_rng(0), 6, 60, 700, 60, 512)
    batch = to_batch(TokenTree.from_passes(passes))
    exact_model = tiny("Qwen3", head_dim=64, hidden_size=256, intermediate_size=1024, num_hidden_layers=4).cuda()
    tree_loss(exact_model, batch).backward()
    exact = {name: p.grad for name, p in exact_model.named_parameters()}
    model = copy.deepcopy(exact_model).bfloat16()
    errors, peaks = [], []
    for step in (backward_by_branches, lambda *given: tree_loss(*given).backward()):
        with using_backend(backend):
            held = []
            for _ in range(3):  # in the first, compilation needs memory of its own, and libraries their workspaces
                model.zero_grad()
                torch.cuda.reset_peak_memory_stats()
                held.append(torch.cuda.memory_allocated())
                step(model, batch)
        assert held[2] - held[1] < 2**20
        peaks.append(torch.cuda.max_memory_allocated() - held[-1])
        found = {name: p.grad.float() for name, p in model.named_parameters()}
        errors.append(max(((found[name] - g).norm() / g.norm()).item() for name, g in exact.items()))
    assert errors[0] <= 2 * errors[1] and peaks[0] < 0.6 * peaks[1]


@pytest.mark.parametrize("backend", ["triton", "flash"])
def test_gradients_are_bitwise_repeatable(backend):
    """Those of FlashAttention where PyTorch is told that they must; to be warned is not enough for it."""
    torch.use_deterministic_algorithms(backend == "flash")
    ends = conversation_row(8192)
    q = torch.randn(1, 8, 8192, 128, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    k, v = (torch.randn(1, 2, 8192, 128, device="cuda", dtype=torch.bfloat16, requires_grad=True) for _ in range(2))
    grad = torch.randn_like(q)

    def run():
        out = tree_attention(q, k, v, ends, backend=backend)
        return [out.detach(), *torch.autograd.grad(out, (q, k, v), grad)]

    try:
        first = run()
        for _ in range(19):
            assert all(torch.equal(a, b) for a, b in zip(run(), first, strict=True))
    finally:
        torch.use_deterministic_algorithms(False)


def test_flash_leaves_padding_alone_and_refuses_to_be_captured():
    length, real = 1000, 300
    ends = torch.arange(1, length + 1, dtype=torch.int32, device="cuda")[None].clone()
    ends[:, :real] = real
    q, k, v = (torch.randn(1, n, length, 64, device="cuda", dtype=torch.float16, requires_grad=True) for n in (4, 2, 2))
    out = tree_attention(q, k, v, ends, backend="flash")
    assert torch.equal(out[:, :, real:], v[:, :, real:].repeat_interleave(2, 1))
    dq, dk, dv = torch.autograd.grad(out[:, :, real:].sum(), (q, k, v))
    assert not dq.any() and not dk.any() and torch.equal(dv[:, :, real:], torch.full_like(dv[:, :, real:], 2))
    with pytest.raises(NotImplementedError, match="CUDA graphs"), torch.cuda.graph(torch.cuda.CUDAGraph()):
        tree_attention(q, k, v, ends, backend="flash")


SMALL_CASE = """
import torch
from flexmask import tree_attention
from flexmask.mask import tile_lists
length = 450
ends = torch.full((1, length), length, dtype=torch.int32)
ends[:, 300:400], ends[:, 400:] = 400, torch.arange(401, length + 1)  # a trunk, a branch, and leaves
lists = tile_lists(ends)
assert lists.full_kv_begin[-1] > 0 and lists.kv_begin[-1] > 0
q, k, v = (torch.randn(1, heads, length, 80, device="cuda", dtype=torch.float16) for heads in (4, 2, 2))
leaves = [x.requires_grad_() for x in (q, k, v, torch.randn(4, device="cuda"))]
positions = torch.arange(length, device="cuda")[None]
for options in ({"sinks": leaves[3]}, {"softcap": 5.0, "sliding_window": 100, "position_ids": positions}):
    tree_attention(*leaves[:3], ends.cuda(), backend="triton", **options).sum().backward()
torch.cuda.synchronize()
print("finished")
"""


@pytest.mark.parametrize("tool", ["memcheck", "racecheck"])
def test_compute_sanitizer_finds_nothing(tool):
    if not shutil.which("compute-sanitizer"):
        pytest.skip("compute-sanitizer (of the CUDA toolkit) is not on the path")
    errors = ["--report-api-errors", "no"] if tool == "memcheck" else []  # what PyTorch asks of the driver in vain
    command = ["compute-sanitizer", "--tool", tool, "--error-exitcode", "7", *errors, sys.executable, "-c", SMALL_CASE]
    environment = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}  # a pool would hide what lies beyond a tensor
    run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=400)
    if "Device not supported" in run.stdout:
        pytest.skip("compute-sanitizer refuses this device or its driver")
    assert run.returncode == 0 and "finished" in run.stdout, run.stdout[-3000:] + run.stderr[-3000:]


@pytest.mark.parametrize("backend", ["flash", "flex", "triton"])
def test_memory_grows_linearly(backend):
    peaks = []
    for length in (16384, 65536):
        ends = conversation_row(length)
        q, k, v = (
            torch.randn(1, 4, length, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True) for _ in "qkv"
        )
        tree_attention(q, k, v, ends, backend=backend).sum().backward()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        tree_attention(q, k, v, ends.clone(), backend=backend).sum().backward()
        peaks.append(torch.cuda.max_memory_allocated() - before)
    assert peaks[1] < 4.6 * peaks[0], peaks  # a dense bool mask of the longer row would be 4 GiB by itself
    assert peaks[1] < 2**30, peaks


@pytest.mark.parametrize("batch, heads, kv_heads", [(1, 160, 1), (4, 40, 40)])
def test_offsets_beyond_32_bits(batch, heads, kv_heads):
    """131,072 tokens, 2.7e9 elements in the query, or in keys and values too; checked on the last head's last tree."""
    length, size = 131072, 1024
    place = torch.arange(length, dtype=torch.int32, device="cuda")
    ends = ((place // size + 1) * size).expand(batch, -1).contiguous()  # plain sequences of 1,024 tokens
    q, k, v = (
        torch.randn(batch, n, length, 128, device="cuda", dtype=torch.bfloat16).requires_grad_()
        for n in (heads, kv_heads, kv_heads)
    )
    assert q.numel() > 2**31
    out = tree_attention(q, k, v, ends, backend="triton")
    tail = [x.detach()[-1:, -1:, -size:].double().requires_grad_() for x in (q, k, v)]
    causal = torch.ones(1, size, size, dtype=torch.bool, device="cuda").tril()
    expected = dense_attention(*tail, causal)
    torch.testing.assert_close(out[-1:, -1:, -size:].double(), expected, rtol=0, atol=2e-2)
    grad = torch.zeros_like(out)
    grad[-1:, -1:, -size:] = 1
    found = torch.autograd.grad(out, (q, k, v), grad)
    for name, a, b in zip(("dq", "dk", "dv"), found, torch.autograd.grad(expected.sum(), tail), strict=True):
        error = (a[-1:, -1:, -size:].double() - b).norm() / b.norm()
        assert error < 2e-2, f"{name}: {error:.1e}"


def test_cuda_graph_replays_with_another_mask():
    """The bug guarded: the lists of the mask at capture were constants of the graph. Forward and backward."""
    ends, other = conversation_row(2048), conversation_row(2048, turns=3)
    q, k, v = (torch.randn(1, 4, 2048, 64, device="cuda", dtype=torch.float16, requires_grad=True) for _ in "qkv")
    grad = torch.randn_like(q)

    def run():
        out = tree_attention(q, k, v, ends, backend="triton")
        return [out.detach(), *torch.autograd.grad(out, (q, k, v), grad)]

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run()
    for mask in (other, conversation_row(2048)):
        ends.copy_(mask)
        for x in captured:
            x.zero_()
        graph.replay()
        assert all(torch.equal(a, b) for a, b in zip(captured, run(), strict=True))


def test_auto_logs_nothing_where_everything_works(caplog):
    ends = conversation_row(1024)
    q, k, v = (torch.randn(1, 4, 1024, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True) for _ in "qkv")
    tree_attention(q, k, v, ends).sum().backward()
    assert not [record for record in caplog.records if record.name.startswith("flexmask")]


def test_packed_passes_of_the_benchmark(monkeypatch):
    """FlashAttention on all passes at once is attention on each by itself. (Its interface differs between PyTorch versions.)"""
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "benchmarks"))
    from methods import AttentionInterface, repeat_heads

    monkeypatch.setattr("methods.DEVICE", "cuda")  # which test_benchmarks.py, if it was there first, has on a CPU
    lengths, scale = [300, 1, 77, 128], 0.3
    tensors = [torch.randn(1, heads, sum(lengths), 64, device="cuda", dtype=torch.bfloat16) for heads in (4, 2, 2)]
    leaves = [x.requires_grad_() for x in tensors]
    weight = torch.randn(1, sum(lengths), 4, 64, device="cuda")

    def flash(*tensors):
        attend = AttentionInterface()["each-pass"]
        return attend(None, *tensors, None, pass_lengths=torch.tensor(lengths, device="cuda"), scaling=scale)[0]

    def each(q, k, v):
        passes = zip(*(x.split(lengths, 2) for x in (q, *repeat_heads(q, k, v))))
        outs = [torch.nn.functional.scaled_dot_product_attention(*of, is_causal=True, scale=scale) for of in passes]
        return torch.cat(outs, 2).transpose(1, 2)

    exact = [x.detach().double().requires_grad_() for x in leaves]
    right = everything(each, exact, weight)
    ours, plain = (relative_errors(everything(of, leaves, weight), right) for of in (flash, each))
    assert all(a <= 2 * b for a, b in zip(ours, plain, strict=True)), (ours, plain)


# Heads of keys and of values, key size, value size; gates per channel; delta rule. As Qwen3.5, Kimi and Mamba 2 have them.
RECURRENCES = {
    "gated delta rule": ((4, 8, 128, 128), False, True),
    "Kimi": ((4, 4, 128, 128), True, True),
    "Mamba 2": ((1, 8, 128, 64), False, False),
}


@pytest.mark.parametrize("way", ["fla", "chunks"])
@pytest.mark.parametrize("kind", RECURRENCES)
def test_recurrences(kind, way, monkeypatch):
    """Against float64 on the CPU, as a norm. `fla` on plain sequences, without a tree, rounds as much."""
    from flexmask.recurrence import chunks, fla, tree_scan

    (key_heads, heads, key_size, value_size), per_channel, delta = RECURRENCES[kind]
    end = torch.cat([conversation_row(1500), torch.arange(1501, 1537, device="cuda", dtype=torch.int32)[None]], 1)
    draw = {"generator": torch.Generator().manual_seed(0), "dtype": torch.float64}
    length = end.shape[1]
    inputs = [
        torch.randn(1, length, key_heads, key_size, **draw),
        torch.nn.functional.normalize(torch.randn(1, length, key_heads, key_size, **draw), dim=-1),
        torch.randn(1, length, heads, value_size, **draw),
        -0.05 * torch.rand(1, length, heads, *([key_size] if per_channel else []), **draw),
        torch.rand(1, length, heads, **draw) if delta else None,
    ]
    weight = torch.randn(1, length, heads, value_size, **draw)
    weight[:, 1500:] = 0
    dtype = torch.bfloat16 if way == "fla" else torch.float32
    rounded = [None if x is None else x.to(torch.float32 if i == 3 else dtype).cuda() for i, x in enumerate(inputs)]
    if way == "fla":
        if missing := fla._missing(per_channel):
            pytest.skip(missing)
        assert fla.serves(*rounded)
    else:
        monkeypatch.setattr(fla, "serves", lambda *_: False)

    def run(inputs, end):
        leaves = [None if x is None else x.detach().requires_grad_() for x in inputs]
        out = tree_scan(*leaves, end, scale=key_size**-0.5)
        found = torch.autograd.grad((out * weight.to(out)).sum(), [x for x in leaves if x is not None])
        return [out[:, :1500], *found]

    exact = run([None if x is None else x.double().cpu() for x in rounded], end.cpu())
    for name, found, expected in zip("oqkvgb", run(rounded, end), exact, strict=False):
        error = ((found.double().cpu() - expected).norm() / expected.norm()).item()
        assert error <= (1e-2 if way == "fla" else 1e-5), f"{name}: {error:.1e}"
    assert chunks.CHUNK == fla.CHUNK

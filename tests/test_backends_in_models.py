"""Whole models on every other backend against the same models on `blockwise`, in every way people run one.

FlexAttention on a GPU only; elsewhere the Triton kernels run in Triton's interpreter.
"""

import functools
from itertools import product

import numpy as np
import pytest
import torch
from launching import found_by_two
from models import tiny
from reference import conversation_passes
from test_transformers import Vocabulary

import flexmask
from flexmask import OnePassCollator, TokenTree

pytest.importorskip("triton", reason="the Triton kernels need Triton, which this platform does not have")
CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"


@pytest.fixture(params=["flash", "triton", *["flex"] * CUDA])
def backend(request):
    yield request.param
    flexmask.set_backend("auto")


def batch_of(turns, sizes=(20, 60, 30)) -> dict:
    rng = np.random.default_rng(0)
    trees = [TokenTree.from_passes(conversation_passes(rng, n, *sizes, 512)) for n in turns]
    return {name: tensor.to(DEVICE) for name, tensor in OnePassCollator(Vocabulary())(trees).items()}


@pytest.mark.parametrize("family", ["Qwen3", "Gemma2", "Gemma3", "GptOss"])
@pytest.mark.parametrize("way", ["plain", "checkpointing", "autocast", "compiled"])
def test_losses_and_gradients_are_those_of_blockwise(backend, family, way):
    if backend == "flash" and (family in ("Gemma2", "GptOss") or (CUDA and way != "autocast")):
        pytest.skip("the backend has neither soft-cap nor sinks, and on CUDA 16 bits only")
    model = tiny(family, head_dim=16).to(DEVICE)
    # In the interpreter several tiles take minutes: they are left to the plain way.
    batch = batch_of((3, 2)) if CUDA else batch_of((2,), (20, 60, 30) if way == "plain" else (8, 25, 10))
    dtype = torch.bfloat16 if CUDA else torch.float16  # the interpreter has no right bfloat16
    autocast = functools.partial(torch.autocast, DEVICE, dtype, enabled=way == "autocast")
    flexmask.set_backend("blockwise")
    with autocast():  # which moves tokens to other experts, with any backend
        expected = model(**batch, use_cache=False).loss
    expected.backward()
    gradients = {name: p.grad for name, p in model.named_parameters()}
    model.zero_grad()
    flexmask.set_backend(backend)
    run = model
    if way == "checkpointing":
        model.train().gradient_checkpointing_enable({"use_reentrant": False})
    if way == "compiled":
        torch._dynamo.reset()
        # Without a GPU the graph is run as it was traced. The library's experts of gpt-oss break the graph themselves.
        run = torch.compile(model, fullgraph=family != "GptOss", backend="inductor" if CUDA else "aot_eager")
    with autocast():
        loss = run(**batch, use_cache=False).loss
    loss.backward()
    tolerance = 5e-2 if way == "autocast" else 1e-4
    torch.testing.assert_close(loss, expected, rtol=tolerance, atol=0)
    largest = max(g.abs().max() for g in gradients.values())
    for name, p in model.named_parameters():
        assert (p.grad - gradients[name]).abs().max() <= 2 * tolerance * largest, name


@pytest.mark.skipif(CUDA, reason="needs two devices on CUDA; two processes share one CPU")
@pytest.mark.parametrize("family", ["Qwen3", "Qwen3.5"])
def test_fsdp2(tmp_path_factory, family):
    """Sharded over two processes, the mean gradient of two batches is that of one process."""
    of_two = found_by_two(tmp_path_factory, "sharded")[family]
    from sharded import MODELS  # which imports this file

    model = MODELS[family][0]()
    flexmask.set_backend("blockwise")
    (sum(model(**batch_of((turns,))).loss for turns in (1, 2)) / 2).backward()
    flexmask.set_backend("auto")
    for way, name in product(("own", "fused", "chunks"), dict(model.named_parameters())):
        expected = model.get_parameter(name).grad
        torch.testing.assert_close(of_two[way][name], expected, rtol=1e-4, atol=1e-6, msg=f"{way} {name}")

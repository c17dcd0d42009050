"""Which tile sizes are fastest: times candidates of each Triton kernel on this GPU. For kernels/configs.py.

A candidate whose output or gradients are not those of plain PyTorch is no candidate.

python benchmarks/kernel_configs.py gpu
"""

import contextlib
import multiprocessing
import os
from concurrent.futures import ProcessPoolExecutor, wait
from dataclasses import astuple, replace
from itertools import product

import torch
from attention import check_equal, output_and_gradients, row_of
from common import CONVERSATIONS, DEVICE, Benchmark, attempt, measure, table
from flexmask_kernels import attention as kernels
from flexmask_kernels.configs import Config

from flexmask import tree_attention

KERNELS = ("forward", "dkv", "dq")


def inputs(settings, head_dim: int, length: int) -> list[torch.Tensor]:
    """q, k and v as models hand them over."""
    generator = torch.Generator(DEVICE).manual_seed(0)
    return [
        torch.randn(
            1, length, heads, head_dim, device=DEVICE, dtype=getattr(torch, settings.dtype), generator=generator
        )
        .transpose(1, 2)
        .requires_grad_()
        for heads in (settings.heads, settings.kv_heads, settings.kv_heads)
    ]


def candidates(settings) -> list[Config]:
    sizes = product(settings.tiles, settings.tiles, settings.warps, settings.stages)
    return [Config(m, n, warps, stages) for m, n, warps, stages in sizes if m + n > 32]


@contextlib.contextmanager
def running(chosen):
    """All calls run with these configurations."""
    pinned = kernels.configs
    kernels.configs = lambda *_: chosen
    try:
        yield
    finally:
        kernels.configs = pinned


def compile_one(config: Config, settings, head_dim: int) -> None:
    """Put all three kernels with this configuration into Triton's cache, from a process of its own."""
    q, k, v = inputs(settings, head_dim, 256)
    ends = torch.full((1, 256), 256, dtype=torch.int32, device=DEVICE)
    pinned = kernels.pinned_configs(q, v)
    for kernel in KERNELS:
        with running(replace(pinned, **{kernel: config})), contextlib.suppress(Exception):  # the timing says so
            tree_attention(q, k, v, ends, backend="triton").sum().backward()


def main() -> None:
    if DEVICE != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        raise SystemExit("kernel_configs needs a CUDA device, or TRITON_INTERPRET=1 (smoke)")
    bench = Benchmark("kernel_configs", __doc__)
    bench.run(lambda: fill(bench), lambda *axes: draw(bench.rows, *axes), width=13, panels=3)
    for head_dim, kernel in product(bench.settings.head_dims, KERNELS):
        timed = [r for r in bench.rows if (r["head size"], r["kernel"]) == (head_dim, kernel) and "time" in r]
        if timed:
            print(table(sorted(timed, key=lambda r: r["time"]["median"])[:6]))


def fill(bench: Benchmark) -> None:
    settings = bench.settings
    ends = row_of(settings.length, CONVERSATIONS[settings.conversation])
    for head_dim in settings.head_dims:
        if settings.processes:
            pool = ProcessPoolExecutor(settings.processes, mp_context=multiprocessing.get_context("spawn"))
            try:
                wait([pool.submit(compile_one, config, settings, head_dim) for config in candidates(settings)])
            finally:  # also when interrupted
                pool.shutdown(cancel_futures=True)
        q, k, v = inputs(settings, head_dim, settings.length)
        grad = torch.randn_like(q)
        pinned = kernels.pinned_configs(q, v)

        def attend(q=q, k=k, v=v):
            return tree_attention(q, k, v, ends, backend="triton")

        tensors = (q, k, v, grad)
        right = output_and_gradients(lambda: tree_attention(q, k, v, ends, backend="blockwise"), tensors)
        for kernel in KERNELS:
            for candidate in dict.fromkeys([getattr(pinned, kernel), *candidates(settings)]):
                row = {"head size": head_dim, "kernel": kernel, "m, n, warps, stages": str(astuple(candidate))}
                row["pinned"] = candidate == getattr(pinned, kernel)

                def timed(kernel=kernel, candidate=candidate) -> dict:
                    with running(replace(pinned, **{kernel: candidate})):
                        check_equal(output_and_gradients(attend, tensors), right, q.dtype)
                        if kernel == "forward":
                            with torch.no_grad():
                                return {"time": measure(attend, settings.repeats)}
                        out = attend()  # the whole backward; the other kernels are the same in every row
                        return {
                            "time": measure(
                                lambda: torch.autograd.grad(out, (q, k, v), grad, retain_graph=True), settings.repeats
                            )
                        }

                bench.add(**row, **attempt(timed))


def draw(rows: list[dict], *axes) -> None:
    """The ten fastest of each kernel at the first head size; the pinned one dark."""
    for axis, kernel in zip(axes, KERNELS):
        timed = [r for r in rows if "time" in r and (r["head size"], r["kernel"]) == (rows[0]["head size"], kernel)]
        timed = sorted(timed, key=lambda r: r["time"]["median"])
        timed = [r for i, r in enumerate(timed) if i < 10 or r["pinned"]][::-1]
        axis.barh(
            [r["m, n, warps, stages"] for r in timed],
            [r["time"]["median"] * 1e3 for r in timed],
            color=["C0" if r["pinned"] else "lightsteelblue" for r in timed],
        )
        axis.set(title=f"{kernel}, head size {rows[0]['head size']}", xlabel="ms (forward, or whole backward)")


if __name__ == "__main__":
    main()

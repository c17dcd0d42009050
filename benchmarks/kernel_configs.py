"""Which tile sizes are fastest: times every candidate of each Triton kernel on this GPU. For kernels/configs.py.

python benchmarks/kernel_configs.py --head_dim 128
"""

import argparse
import contextlib
import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from dataclasses import astuple, replace
from itertools import product

import torch
from attention import row_of
from common import CONVERSATIONS, save, table
from flexmask_kernels import attention as kernels
from flexmask_kernels.configs import Config, configs
from triton.testing import do_bench

from flexmask import tree_attention

CANDIDATES = [Config(m, n, w, s) for m, n, w, s in product((32, 64, 128), (32, 64, 128), (4, 8), (2, 3)) if m + n > 64]


def inputs(length: int, args: argparse.Namespace) -> list[torch.Tensor]:
    """q, k and v as models hand them over."""
    return [
        torch.randn(1, length, heads, args.head_dim, device="cuda", dtype=getattr(torch, args.dtype))
        .transpose(1, 2)
        .requires_grad_()
        for heads in (args.heads, args.kv_heads, args.kv_heads)
    ]


def compile_one(config: Config, args: argparse.Namespace) -> None:
    """Put all three kernels with this configuration into Triton's cache, from a process of its own."""
    for kernel in ("forward", "dkv", "dq"):
        pinned = configs(torch.cuda.get_device_capability(), args.head_dim, getattr(torch, args.dtype))
        chosen = replace(pinned, **{kernel: config})
        kernels.configs = lambda *_, chosen=chosen: chosen
        with contextlib.suppress(Exception):  # does not fit; the timing says so
            ends = torch.full((1, 256), 256, dtype=torch.int32, device="cuda")
            tree_attention(*inputs(256, args), ends, backend="triton").sum().backward()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--length", type=int, default=16384)
    parser.add_argument("--heads", type=int, default=32)
    parser.add_argument("--kv_heads", type=int, default=8)
    parser.add_argument("--head_dim", type=int, default=128)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--processes", type=int, default=8, help="that compile side by side")
    args = parser.parse_args()
    ends = row_of(args.length, CONVERSATIONS["12 turns, long thoughts"]).cuda()
    q, k, v = inputs(args.length, args)
    grad = torch.randn_like(q)
    pinned = configs(torch.cuda.get_device_capability(), args.head_dim, q.dtype)
    with ProcessPoolExecutor(args.processes, mp_context=multiprocessing.get_context("spawn")) as pool:
        list(pool.map(compile_one, CANDIDATES, [args] * len(CANDIDATES)))
    rows = []
    for kernel in ("forward", "dkv", "dq"):
        for candidate in dict.fromkeys([getattr(pinned, kernel), *CANDIDATES]):
            chosen = replace(pinned, **{kernel: candidate})
            kernels.configs = lambda *_, chosen=chosen: chosen
            try:
                if kernel == "forward":
                    with torch.no_grad():
                        ms = do_bench(lambda: tree_attention(q, k, v, ends, backend="triton"), return_mode="median")
                else:  # the whole backward; the other two kernels are the same in every line
                    out = tree_attention(q, k, v, ends, backend="triton")
                    ms = do_bench(
                        lambda out=out: torch.autograd.grad(out, (q, k, v), grad, retain_graph=True),
                        return_mode="median",
                    )
            except Exception as error:  # does not fit
                print(kernel, candidate, type(error).__name__, flush=True)
                continue
            is_pinned = candidate == getattr(pinned, kernel)
            rows.append(
                {"kernel": kernel, "m, n, warps, stages": str(astuple(candidate)), "ms": ms, "pinned": is_pinned}
            )
    rows.sort(key=lambda row: (row["kernel"], row["ms"]))
    print(table([row for name in ("forward", "dkv", "dq") for row in [r for r in rows if r["kernel"] == name][:6]]))
    print("saved", save(f"kernel_configs_{args.head_dim}", rows, **vars(args)).name)


if __name__ == "__main__":
    main()

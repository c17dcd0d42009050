"""Attention on a GPU: our kernels, FlexAttention and PyTorch's SDPA on a row of conversations. TFLOP/s over visible pairs.

python benchmarks/gpu_attention.py                     # 16k and 32k tokens, bf16, 32 query and 8 key/value heads of 128

Forward counts 4 · heads · head_dim · visible pairs, backward 2.5 times that. A plain causal sequence of the same length
through SDPA's flash kernel is the ceiling of what PyTorch ships; its visible pairs are L (L + 1) / 2.
"""

import argparse

import torch
from attention import row_of
from common import CONVERSATIONS, save, table
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import create_block_mask, flex_attention
from torch.nn.functional import scaled_dot_product_attention
from triton.testing import do_bench

from flexmask import tree_attention
from flexmask.mask import mask_mod, tree_block_mask


def contenders(ends: torch.Tensor) -> dict:
    """name -> (attention of q, k, v; visible pairs)."""
    length = ends.shape[1]
    place = torch.arange(length, device=ends.device)
    tree = (ends[0] - place).sum().item()  # each key is seen by its subtree
    theirs = torch.compile(create_block_mask)(mask_mod(ends), 1, None, length, length, device=ends.device)
    compiled = torch.compile(flex_attention, dynamic=False)
    tuned = torch.compile(flex_attention, dynamic=False, mode="max-autotune-no-cudagraphs")
    ours = tree_block_mask(ends)
    mask = (place <= place[:, None]) & (place[:, None] < ends[0])

    def dense(q, k, v):  # keys and values repeated, as transformers does where there is a mask
        k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
        return scaled_dot_product_attention(q, k, v, attn_mask=mask)

    def flash(q, k, v):
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            return scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)

    return {
        "triton": (lambda q, k, v: tree_attention(q, k, v, ends, backend="triton"), tree),
        "flex, our BlockMask": (lambda q, k, v: tree_attention(q, k, v, ends, backend="flex"), tree),
        "flex, create_block_mask": (lambda q, k, v: compiled(q, k, v, block_mask=theirs, enable_gqa=True), tree),
        "SDPA, dense mask": (dense, tree),
        "SDPA flash, plain causal": (flash, length * (length + 1) // 2),
        "flex, our BlockMask, max-autotune": (lambda q, k, v: tuned(q, k, v, block_mask=ours, enable_gqa=True), tree),
    }


def milliseconds(attend, q, k, v, grad) -> tuple[float, float]:
    """Median of the forward, and of the backward by itself."""
    with torch.no_grad():
        forward = do_bench(lambda: attend(q, k, v), return_mode="median")
    out = attend(q, k, v)
    backward = do_bench(lambda: torch.autograd.grad(out, (q, k, v), grad, retain_graph=True), return_mode="median")
    return forward, backward


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=int, nargs="+", default=[16384, 32768])
    parser.add_argument("--heads", type=int, default=32)
    parser.add_argument("--kv_heads", type=int, default=8)
    parser.add_argument("--head_dim", type=int, default=128)
    parser.add_argument("--conversation", choices=CONVERSATIONS, default="12 turns, long thoughts")
    args = parser.parse_args()
    rows = []
    for length in args.lengths:
        ends = row_of(length, CONVERSATIONS[args.conversation]).cuda()
        q, k, v = (
            torch.randn(1, length, heads, args.head_dim, device="cuda", dtype=torch.bfloat16)
            .transpose(1, 2)
            .requires_grad_()
            for heads in (args.heads, args.kv_heads, args.kv_heads)
        )
        grad = torch.randn_like(q)
        for name, (attend, visible) in contenders(ends).items():
            work = 4 * args.heads * args.head_dim * visible / 1e9  # GFLOP
            row = {"length": length, "attention": name, "visible": visible / length**2}
            try:
                forward, backward = milliseconds(attend, q, k, v, grad)
                rows.append(
                    row
                    | {"forward ms": forward, "backward ms": backward}
                    | {"forward TFLOP/s": work / forward, "backward TFLOP/s": 2.5 * work / backward}
                )
            except Exception as error:  # a contender that cannot do it is part of the result
                nothing = dict.fromkeys(
                    ("forward ms", "backward ms", "forward TFLOP/s", "backward TFLOP/s"), float("nan")
                )
                rows.append(row | nothing | {"error": f"{type(error).__name__}: {str(error)[:200]}"})
            print(rows[-1], flush=True)
            path = save("attention_gpu", rows, **vars(args))  # at once: a later one may take too long
    print(table([{key: value for key, value in row.items() if key != "error"} for row in rows]))
    print("saved", path.name)


if __name__ == "__main__":
    main()

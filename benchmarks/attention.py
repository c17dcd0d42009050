"""Attention on a tree row, forward and forward + backward: our backends against SDPA with the dense mask.

python benchmarks/attention.py                 # 4096 tokens, 8 heads of 64, float32: what a CPU can do
"""

import argparse

import numpy as np
import torch
from common import CONVERSATIONS, conversation, measure, save, table

from flexmask import TokenTree, tree_attention


def row_of(length: int, turns: tuple) -> torch.Tensor:
    """subtree_end int32 (1, length) of conversations in a row, the last one cut."""
    rng = np.random.default_rng(0)
    trees = []
    while sum(map(len, trees)) < length:
        trees.append(TokenTree.from_passes(conversation(rng, *turns, vocab=1000)))
    ends = TokenTree.concat(trees).subtree_end[:length].clip(max=length)
    return torch.from_numpy(ends)[None]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--length", type=int, default=4096)
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--kv_heads", type=int, default=8)
    parser.add_argument("--head_dim", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=9)
    args = parser.parse_args()

    rows = []
    for name, turns in CONVERSATIONS.items():
        ends = row_of(args.length, turns)
        place = torch.arange(args.length)
        mask = (place <= place[:, None]) & (place[:, None] < ends[0])
        q = torch.randn(1, args.heads, args.length, args.head_dim, requires_grad=True)
        k, v = (torch.randn(1, args.kv_heads, args.length, args.head_dim, requires_grad=True) for _ in range(2))
        grad = torch.randn_like(q)
        contenders = {
            "blockwise": lambda q=q, k=k, v=v, ends=ends: tree_attention(q, k, v, ends, backend="blockwise"),
            "sdpa, dense mask": lambda q=q, k=k, v=v, mask=mask: torch.nn.functional.scaled_dot_product_attention(
                q, k, v, attn_mask=mask, enable_gqa=args.heads != args.kv_heads
            ),
        }
        for contender, attend in contenders.items():
            with torch.no_grad():
                forward = measure(attend, args.repeats)
            both = measure(lambda attend=attend, grad=grad: attend().backward(grad), args.repeats)
            rows.append(
                {
                    "conversation": name,
                    "visible": mask.float().mean().item(),
                    "attention": contender,
                    "forward": forward,
                    "forward + backward": both,
                }
            )
    print(table(rows))
    print("saved", save("attention_cpu", rows, length=args.length, heads=args.heads, head_dim=args.head_dim).name)


if __name__ == "__main__":
    main()

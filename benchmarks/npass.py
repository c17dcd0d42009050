"""A training step (forward, backward, optimiser) on the same conversations: one pass against N passes.

N-pass is run one sequence at a time with the library's own attention (sdpa) and gradient accumulation: nothing is
padded, nothing is masked that need not be. "N-pass" computes the logits of all tokens, as every trainer does that takes
labels with -100; "N-pass, targets" only where there is a target, as one-pass does.

SmolLM2-135M's shape with 10 of its 30 layers, random weights, on a CPU. The two variables keep glibc from giving large
tensors back to the kernel after every use, which otherwise costs every method some 20% in page faults:

MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=100000000000 python benchmarks/npass.py
"""

import argparse
from functools import partial

import numpy as np
import torch
from common import CONVERSATIONS, conversation, measure, save, table
from transformers import LlamaConfig, LlamaForCausalLM

from flexmask import OnePassCollator, TokenTree


class Vocabulary:
    pad_token_id = 0

    def __init__(self, size: int):
        self.size = size

    def __len__(self) -> int:
        return self.size


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden_size", type=int, default=576)
    parser.add_argument("--layers", type=int, default=10)
    parser.add_argument("--vocab_size", type=int, default=49152)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--conversations", nargs="*", default=["6 turns, short"])
    args = parser.parse_args()

    config = LlamaConfig(
        vocab_size=args.vocab_size,
        hidden_size=args.hidden_size,
        intermediate_size=args.hidden_size * 8 // 3,
        num_hidden_layers=args.layers,
        num_attention_heads=args.hidden_size // 64,
        num_key_value_heads=args.hidden_size // 192,
        max_position_embeddings=32768,
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    model = LlamaForCausalLM._from_config(config, attn_implementation="flexmask")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)

    def losses_of(batches: list[dict], targets: int):
        return (model(**batch, use_cache=False, num_items_in_batch=targets).loss for batch in batches)

    @torch.no_grad()
    def loss_of(batches: list[dict], targets: int) -> float:
        return sum(loss.item() for loss in losses_of(batches, targets))

    def step(batches: list[dict], targets: int) -> None:
        for loss in losses_of(batches, targets):
            loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    rows = []
    for name in args.conversations:
        passes = conversation(np.random.default_rng(0), *CONVERSATIONS[name], vocab=args.vocab_size)
        tree = TokenTree.from_passes(passes)
        one_pass = [OnePassCollator(Vocabulary(args.vocab_size))([tree])]
        methods = {
            "one-pass": ("flexmask", one_pass),
            "N-pass": ("sdpa", [plain_batch(p) for p in passes]),
            "N-pass, targets": ("sdpa", [targets_only(p) for p in passes]),
        }
        losses, times = {}, {}
        for method, (attention, batches) in methods.items():  # before any step changes the weights
            model.set_attn_implementation(attention)
            losses[method] = loss_of(batches, tree.num_targets)
        for method, (attention, batches) in methods.items():
            model.set_attn_implementation(attention)
            times[method] = measure(partial(step, batches, tree.num_targets), args.repeats, warmup=2)
        tokens = sum(len(p.input_ids) for p in passes)
        for method, seconds in times.items():
            speed_up = seconds["median"] / times["one-pass"]["median"]
            rows.append(
                {
                    "conversation": name,
                    "method": method,
                    "tokens": len(tree) if method == "one-pass" else tokens,
                    "step": seconds,
                    "one-pass is faster by": speed_up,
                    "of the token ratio": speed_up * len(tree) / tokens,
                    "loss": losses[method],
                }
            )
        print(table(rows[-3:]), flush=True)
    parameters = sum(p.numel() for p in model.parameters())
    print("saved", save("npass_cpu", rows, model=f"Llama, {parameters / 1e6:.0f}M parameters, float32").name)


def plain_batch(p) -> dict[str, torch.Tensor]:
    """One pass as a sequence of its own, labels -100 where nothing is supervised."""
    ids = torch.from_numpy(np.asarray(p.input_ids))[None]
    return {"input_ids": ids, "labels": ids.masked_fill(~torch.from_numpy(np.asarray(p.loss_mask)), -100)}


def targets_only(p) -> dict[str, torch.Tensor]:
    """The same with logits where there is a target, as in the tree batch."""
    ids = torch.from_numpy(np.asarray(p.input_ids))
    supervised = torch.from_numpy(np.flatnonzero(p.loss_mask))
    labels = ids[supervised][None]
    return {"input_ids": ids[None], "logits_to_keep": supervised - 1, "labels": labels, "shift_labels": labels}


if __name__ == "__main__":
    main()

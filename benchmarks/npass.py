"""A training step (forward, backward, optimiser) on the same conversations: one pass against N passes.

N-pass is run one sequence at a time with the library's own attention (sdpa) and gradient accumulation, which on a CPU
is its strongest form: nothing is padded, nothing is masked that need not be.

python benchmarks/npass.py                     # a Llama of 24M parameters on a CPU
"""

import argparse

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
    parser.add_argument("--hidden_size", type=int, default=384)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--vocab_size", type=int, default=8192)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--conversations", nargs="*", default=["6 turns, short", "6 turns, long thoughts"])
    args = parser.parse_args()

    config = LlamaConfig(
        vocab_size=args.vocab_size,
        hidden_size=args.hidden_size,
        intermediate_size=args.hidden_size * 3,
        num_hidden_layers=args.layers,
        num_attention_heads=args.hidden_size // 64,
        num_key_value_heads=args.hidden_size // 128,
        max_position_embeddings=32768,
    )
    torch.manual_seed(0)
    model = LlamaForCausalLM._from_config(config, attn_implementation="flexmask")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)

    def losses_of(batches: list[dict]):
        targets = sum(batch["shift_labels"].numel() for batch in batches)
        return (model(**batch, use_cache=False, num_items_in_batch=targets).loss for batch in batches)

    @torch.no_grad()
    def loss_of(batches: list[dict]) -> float:
        return sum(loss.item() for loss in losses_of(batches))

    def step(batches: list[dict]) -> None:
        for loss in losses_of(batches):
            loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    rows = []
    for name in args.conversations:
        passes = conversation(np.random.default_rng(0), *CONVERSATIONS[name], vocab=args.vocab_size)
        tree = TokenTree.from_passes(passes)
        one_pass = [OnePassCollator(Vocabulary(args.vocab_size))([tree])]
        n_pass = [plain_batch(p) for p in passes]
        methods = {"one-pass": ("flexmask", one_pass), "N-pass": ("sdpa", n_pass)}
        losses, times = {}, {}
        for method, (attention, batches) in methods.items():  # before any step changes the weights
            model.set_attn_implementation(attention)
            losses[method] = loss_of(batches)
        for method, (attention, batches) in methods.items():
            model.set_attn_implementation(attention)
            times[method] = measure(lambda batches=batches: step(batches), args.repeats)
        tokens = sum(len(p.input_ids) for p in passes)
        rows.append(
            {
                "conversation": name,
                "tokens N-pass": tokens,
                "tokens one-pass": len(tree),
                "token ratio": tokens / len(tree),
                "N-pass": times["N-pass"],
                "one-pass": times["one-pass"],
                "speed-up": times["N-pass"]["median"] / times["one-pass"]["median"],
                "of token ratio": times["N-pass"]["median"] / times["one-pass"]["median"] * len(tree) / tokens,
                "loss difference": abs(losses["N-pass"] - losses["one-pass"]),
            }
        )
        print(table(rows[-1:]), flush=True)
    parameters = sum(p.numel() for p in model.parameters())
    print("saved", save("npass_cpu", rows, model=f"Llama, {parameters / 1e6:.0f}M parameters, float32").name)


def plain_batch(p) -> dict[str, torch.Tensor]:
    """One pass as a sequence of its own; logits where there is a target, as in the tree batch."""
    ids = torch.from_numpy(np.asarray(p.input_ids))
    supervised = torch.from_numpy(np.flatnonzero(p.loss_mask))
    labels = ids[supervised][None]
    return {"input_ids": ids[None], "logits_to_keep": supervised - 1, "labels": labels, "shift_labels": labels}


if __name__ == "__main__":
    main()

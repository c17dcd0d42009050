"""The same fine-tuning twice, one-pass and N-pass: loss curves, and the share of held-out problems that is answered right.

N-pass is the library's own Trainer on padded batches of passes, with its own attention (SDPA) and its own loss. Both see
the same conversations in the same order, a few of them in each step, from the same weights and seed. Answers are generated
greedily, one for each turn, after the true conversation before it.

python benchmarks/accuracy.py cpu
"""

import re
from itertools import zip_longest

import numpy as np
import torch
from common import DEVICE, Benchmark
from methods import labelled
from training import build
from transformers import Trainer, set_seed

from flexmask import OnePassCollator, Pass, TokenTree
from flexmask.arguments import ModelArguments, OnePassTrainingArguments
from flexmask.data import build_trees
from flexmask.loading import load_data
from flexmask.models import load_model
from flexmask.trainer import OnePassTrainer


def main() -> None:
    bench = Benchmark("accuracy", __doc__)
    bench.run(lambda: fill(bench), lambda *axes: draw(bench.more["losses"], *axes), width=11, panels=2)


def fill(bench: Benchmark) -> None:
    settings = bench.settings
    conversations = load_data(settings.dataset)
    held_out, conversations = conversations[: settings.held_out], conversations[settings.held_out :]
    _, tokenizer = load(settings, conversations)
    trees = build_trees(conversations[: settings.steps * settings.conversations], tokenizer).trees
    batches = [trees[i : i + settings.conversations] for i in range(0, len(trees), settings.conversations)]
    problems = [tree.passes() for tree in build_trees(held_out, tokenizer).trees]

    answers = {}
    losses = bench.more["losses"] = {}
    for method, make_trainer in (("one-pass", one_pass_trainer), ("N-pass", n_pass_trainer)):
        set_seed(0)
        model, _ = load(settings, conversations)
        losses[method], seconds = train(make_trainer, model, batches, tokenizer, settings)
        answers[method], right = answer(model, tokenizer, problems, settings)
        bench.add(
            model=method, seconds=seconds,
            **{
                "first loss": losses[method][0],
                "last loss": losses[method][-1],
                "answers": sum(map(len, right)),
                "right": sum(map(sum, right)),
                "right by turn": [sum(of_turn) for of_turn in zip_longest(*right, fillvalue=False)],
            },
        )  # fmt: skip
    ours, theirs = (np.array(losses[method]) for method in ("one-pass", "N-pass"))
    bench.more["largest_difference"] = float(np.abs(ours - theirs).max())
    bench.more["same_texts"] = sum(a == b for a, b in zip(answers["one-pass"], answers["N-pass"]))


def load(settings, conversations):
    """The model and its tokenizer; with a `shape`, a model of that shape with random weights in its place."""
    model, tokenizer = load_model(ModelArguments(settings.model), conversations)
    if shape := getattr(settings, "shape", None):
        model = build(shape, vocabulary=len(tokenizer))
    return model, tokenizer


def train(make_trainer, model, batches, tokenizer, settings) -> tuple[list[float], float]:
    """The loss of every step, and the seconds of them all."""
    args = OnePassTrainingArguments(
        "runs/accuracy",
        learning_rate=settings.learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=settings.steps // 10,
        num_train_epochs=1,
        train_sampling_strategy="sequential",
        logging_steps=1,
        save_strategy="no",
        use_cpu=DEVICE == "cpu",
        bf16=DEVICE == "cuda",
        disable_tqdm=True,
        seed=0,
    )
    trainer = make_trainer(model, args, batches, tokenizer)
    output = trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return losses, output.metrics["train_runtime"]


def one_pass_trainer(model, args, batches: list[list[TokenTree]], tokenizer) -> Trainer:
    return OnePassTrainer(
        model,
        args,
        train_dataset=[TokenTree.concat(trees) for trees in batches],
        data_collator=OnePassCollator(tokenizer),
    )


def n_pass_trainer(model, args, batches: list[list[TokenTree]], tokenizer) -> Trainer:
    model.set_attn_implementation("sdpa")
    return Trainer(
        model,
        args,
        train_dataset=[[p for tree in trees for p in tree.passes()] for trees in batches],
        data_collator=lambda examples: labelled(examples[0]),
    )


@torch.no_grad()
def answer(model, tokenizer, problems: list[list[Pass]], settings) -> tuple[list[list[int]], list[list[bool]]]:
    """The tokens with which the model answers every turn of every problem, up to the end of the turn; and whether the last
    number is that of the true response."""
    model.set_attn_implementation("sdpa")
    model.eval()
    passes = [p for passes in problems for p in passes]
    prompts, targets = zip(*((p.input_ids[~p.loss_mask], p.input_ids[p.loss_mask]) for p in passes))
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    answers, end = [[]] * len(prompts), int(targets[0][-1])
    tokenizer.padding_side = "left"
    for start in range(0, len(order), settings.generate_batch):
        some = order[start : start + settings.generate_batch]
        batch = tokenizer.pad({"input_ids": [prompts[i].tolist() for i in some]}, return_tensors="pt").to(DEVICE)
        generated = model.generate(
            **batch,
            max_new_tokens=settings.max_new_tokens,
            do_sample=False,
            eos_token_id=end,
            pad_token_id=tokenizer.pad_token_id,
        )
        for i, tokens in zip(some, generated[:, batch["input_ids"].shape[1] :].tolist()):
            answers[i] = tokens[: tokens.index(end) + 1] if end in tokens else tokens  # what follows is padding
    numbers, expected = ([number(text) for text in tokenizer.batch_decode(of)] for of in (answers, targets))
    right = iter(a is not None and a == b for a, b in zip(numbers, expected))
    return answers, [[next(right) for _ in passes] for passes in problems]


def number(text: str) -> float | None:
    """The last number of the response, that is, after the reasoning; none if the reasoning does not end."""
    _, end, response = text.rpartition("</think>")
    found = re.findall(r"\d[\d,]*(?:\.\d+)?", response if end else "")
    return float(found[-1].replace(",", "")) if found else None


def draw(losses: dict, curves, difference) -> None:
    for (method, of_method), style in zip(losses.items(), ("-", "--")):
        curves.plot(range(1, len(of_method) + 1), of_method, style, label=method)
    curves.set(xlabel="step", ylabel="loss per target token")
    curves.legend()
    if len(losses) == 2:
        ours, theirs = map(np.array, losses.values())
        difference.semilogy(range(1, len(ours) + 1), np.abs(ours - theirs).clip(1e-9), ".-")
    difference.set(xlabel="step", ylabel="difference of the losses")


if __name__ == "__main__":
    main()

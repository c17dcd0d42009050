"""For test_train.py: one step and one evaluation of the Trainer in every kind, by one process or two."""

from pathlib import Path

import torch
from accelerate.utils import gather_object
from models import tiny
from test_transformers import Vocabulary, rows_of_unequal_size
from transformers import set_seed

from flexmask import OnePassCollator, OnePassTrainer, OnePassTrainingArguments, pack_stream

KINDS = [("token", "rows"), ("turn", "stream"), ("token", "three"), ("turn", "each row on both")]


class Recording(OnePassTrainer):
    """Remembers the targets of every row that was trained."""

    def training_step(self, model, inputs, *given):
        if inputs.get("target_weight", torch.ones(1)).any():
            self.seen = [*getattr(self, "seen", []), inputs["shift_labels"].flatten().tolist()]
        return super().training_step(model, inputs, *given)


def train_one_step(output_dir: str, accumulation: int, loss_reduction: str, kind: str = "rows") -> dict:
    """One plain SGD step over all four rows (of three: over three), whatever the number of processes, then an evaluation of
    three of them. As a stream, the first and the third are packed into one row, so that of two processes one has a row and the
    other two."""
    set_seed(0)
    rows = rows_of_unequal_size(loss_reduction)
    train = {"three": rows[:3], "stream": pack_stream(rows, len(rows[3]))}.get(kind, rows)

    def trainer(steps: int, accumulation: int) -> Recording:
        arguments = OnePassTrainingArguments(
            output_dir, max_steps=steps, learning_rate=0.1, optim="sgd", lr_scheduler_type="constant", max_grad_norm=0,
            gradient_accumulation_steps=accumulation, use_cpu=True, save_strategy="no", disable_tqdm=True,
            sequence_parallel_size=2 if kind == "each row on both" else 1,
        )  # fmt: skip
        made = Recording(
            tiny("Qwen3"),
            arguments,
            train_dataset=train,
            eval_dataset=rows[:3],
            data_collator=OnePassCollator(Vocabulary()),
        )
        made.train()
        return made

    one = trainer(1, accumulation)
    weights = one.accelerator.unwrap_model(one.model).state_dict()
    result = {"eval_loss": one.evaluate()["eval_loss"], "weights": weights, "processes": one.args.world_size}
    if kind in ("three", "stream"):  # into the third epoch, whichever process runs out first
        longer = trainer(5, accumulation=1)
        result |= {"steps": longer.state.global_step, "seen": gather_object(longer.seen)}
    return result


def in_two_processes(folder: Path) -> dict:
    return {
        (loss_reduction, kind): train_one_step(
            str(folder), 4 if kind == "each row on both" else 2, loss_reduction, kind
        )
        for loss_reduction, kind in KINDS
    }

"""Run by test_train.py under torchrun: one step and one evaluation of the Trainer, what came of it written to a file."""

import sys

import torch
from models import tiny
from test_transformers import Vocabulary, rows_of_unequal_size
from transformers import set_seed

from flexmask import OnePassCollator
from flexmask.train import OnePassTrainer, OnePassTrainingArguments


def train_one_step(output_dir: str, accumulation: int, loss_reduction: str) -> dict:
    """One plain SGD step over all four rows, whatever the number of processes, then an evaluation of three of them."""
    set_seed(0)
    rows = rows_of_unequal_size(loss_reduction)
    arguments = OnePassTrainingArguments(
        output_dir, max_steps=1, learning_rate=0.1, optim="sgd", lr_scheduler_type="constant", max_grad_norm=0,
        gradient_accumulation_steps=accumulation, use_cpu=True, save_strategy="no", disable_tqdm=True,
    )  # fmt: skip
    trainer = OnePassTrainer(
        tiny("Qwen3"), arguments, train_dataset=rows, eval_dataset=rows[:3], data_collator=OnePassCollator(Vocabulary())
    )
    trainer.train()
    eval_loss = trainer.evaluate()["eval_loss"]
    weights = trainer.accelerator.unwrap_model(trainer.model).state_dict()
    return {"eval_loss": eval_loss, "weights": weights, "processes": arguments.world_size}


if __name__ == "__main__":
    result = train_one_step(sys.argv[1], accumulation=2, loss_reduction=sys.argv[3])
    if torch.distributed.get_rank() == 0:
        torch.save(result, sys.argv[2])
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()  # threads of the group would abort the process at exit, now and then

"""The Hugging Face Trainer, for rows."""

from __future__ import annotations

import math
from itertools import islice

import torch
from accelerate.data_loader import IterableDatasetShard
from transformers import Trainer, TrainerCallback

from .arguments import OnePassTrainingArguments
from .collator import empty_batch
from .integrations.transformers import NAME, check_config
from .loss import target_weight, tree_loss
from .messages import ConversationError
from .packing import RowStream


class OnePassTrainer(Trainer):
    """The Trainer, with a loss that honours the weights of targets and never holds the logits of all of them at once.

    Training and evaluation loss are Σ weight · loss / Σ weight over all targets: of the accumulated batches of all
    ranks, and of the evaluation set. (The library's own eval_loss is the mean over rows, which weighs a target less in
    a row that has many.) With a router's load-balancing loss it is the model's own loss, which knows no weights.

    Raises:
        ValueError: other arguments than OnePassTrainingArguments, a loss function of its own, or a model that is not
            loaded with attn_implementation="flexmask".
        NotImplementedError: an architecture that a tree would train wrongly.
    """

    def __init__(self, model, args: OnePassTrainingArguments, *others, **options):
        if not isinstance(args, OnePassTrainingArguments) or options.get("compute_loss_func"):
            raise ValueError("OnePassTrainer takes OnePassTrainingArguments, and no compute_loss_func")
        if model.config._attn_implementation != NAME:
            raise ValueError(
                f'the model has attn_implementation="{model.config._attn_implementation}", expected "{NAME}"'
            )
        check_config(model.config)
        super().__init__(model, args, *others, **options)
        self._sums: list[torch.Tensor] = []  # of an evaluation: (weighted loss, weight) of each row, float64
        self.model_accepts_loss_kwargs = True  # the loss below is divided by what _get_num_items_in_batch counts

    def get_train_dataloader(self):
        if isinstance(self.train_dataset, RowStream):
            self.train_dataset.for_rank(self.args.process_index, self.args.world_size)
        loader = super().get_train_dataloader()
        if isinstance(self.train_dataset, RowStream) and isinstance(loader.dataset, IterableDatasetShard):
            # Each rank packs its own share of the conversations. Accelerate would take a share of that share.
            loader.dataset.num_processes, loader.dataset.process_index = 1, 0
        return loader

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        """Of a stream: as many batches on every rank, and in every step. Ranks do not have the same number of rows, and the
        last step has fewer; a rank that has run out adds batches without weight until all have."""
        if not isinstance(self.train_dataset, RowStream):
            return super().get_batch_samples(epoch_iterator, num_batches, device)
        try:
            batches = list(islice(epoch_iterator, num_batches))
        except ConversationError as error:  # that of a worker has the traceback around it
            raise ConversationError(str(error).strip().rpartition("ConversationError: ")[2]) from error
        if self.accelerator.gather(torch.tensor([len(batches)], device=device)).any():
            missing = num_batches - len(batches)
            batches += [empty_batch(self.data_collator.pad_to_multiple_of) for _ in range(missing)]
        return batches, self._get_num_items_in_batch(batches, device)

    def _get_num_items_in_batch(self, batch_samples, device):
        """The weight of all targets of the accumulated batches, of all ranks: what the Trainer divides the loss by."""
        if not batch_samples:
            return None
        weight = torch.stack([target_weight(batch).sum() for batch in batch_samples]).sum().to(device)
        if self.args.average_tokens_across_devices and self.args.world_size > 1:
            weight = self.accelerator.gather(weight).sum()
        return weight

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        if model.training and getattr(self.model.config, "output_router_logits", False):
            if not target_weight(inputs).any():  # of `empty_batch`
                inputs = {name: value for name, value in inputs.items() if name != "target_weight"}
                return super().compute_loss(model, inputs, False, num_items_in_batch) * 0
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        if not model.training:
            num_items_in_batch = None
        loss = tree_loss(model, inputs, num_items_in_batch)
        if not model.training:
            weight = target_weight(inputs).sum().to(loss)
            row = torch.stack([loss.detach() * weight, weight])
            # Of all processes, without the rows that are repeated to give each process as many.
            self._sums += self.accelerator.gather_for_metrics(row[None]).cpu().double()
        elif num_items_in_batch is not None and self.args.average_tokens_across_devices:
            loss = loss * self.accelerator.num_processes  # their gradients are averaged
        return (loss, {"loss": loss}) if return_outputs else loss

    def evaluation_loop(
        self, dataloader, description, prediction_loss_only=None, ignore_keys=None, metric_key_prefix="eval"
    ):
        self._sums = []
        output = super().evaluation_loop(dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix)
        if self._sums:
            loss, weight = torch.stack(self._sums).sum(0).tolist()
            output.metrics[f"{metric_key_prefix}_loss"] = loss / weight
        return output


class StopOnNonFiniteLoss(TrainerCallback):
    def on_log(self, args, state, control, logs=None, **kwargs):
        # In float16 the gradient scaler meets an infinite norm now and then, and skips that step.
        for name in ("loss", "eval_loss") if args.fp16 else ("loss", "eval_loss", "grad_norm"):
            value = float((logs or {}).get(name, 0.0))
            if not math.isfinite(value):
                raise FloatingPointError(
                    f"{name} is {value} at step {state.global_step}; lower the learning rate, clip the gradients "
                    "(max_grad_norm), or train in float32 or bfloat16"
                )

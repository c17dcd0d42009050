"""The Hugging Face Trainer, for rows."""

from __future__ import annotations

import functools
import json
import math
import operator
import re
from collections.abc import Callable
from itertools import islice
from pathlib import Path

import datasets
import torch
from accelerate.data_loader import BatchSamplerShard, IterableDatasetShard
from torch.distributed.device_mesh import init_device_mesh
from transformers import PreTrainedConfig, Trainer, TrainerCallback
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, has_length

from .arguments import MAX_TOKENS, ModelArguments, OnePassTrainingArguments
from .branches import backward_by_branches
from .card import write_card
from .collator import OnePassCollator, empty_batch, target_weight
from .data import build_trees, tree_maker
from .integrations.transformers import NAME, check_config, check_in_parts, inner_model, with_router_loss
from .integrations.ulysses import check_heads, share_row
from .loading import TreeStream, longest_pass
from .loss import tree_loss
from .messages import ConversationError
from .models import load_model, with_adapter
from .packing import Rows, RowStream, pack
from .progress import COUNTS, Counting, Progress, flops
from .samplers import BatchShare, LevelSampler
from .sources import HubDataset
from .tree import TokenTree


class OnePassTrainer(Trainer):
    """The Trainer, with a loss that honours the weights of targets and never holds the logits of all of them at once.

    Training and evaluation loss are Σ weight · loss / Σ weight over all targets: of the accumulated batches of all
    ranks, and of the evaluation set. (The library's own eval_loss is the mean over rows, which weighs a target less in
    a row that has many.) In training, with a router's load-balancing loss, it is the model's own loss, which knows no weights.

    On any number of ranks every row is trained once in an epoch: a rank that has no row left while others have takes batches
    without weight. A training on a stream is resumed where it was, in whichever epoch, by as many processes and workers.

    Beside the loss it logs sharing_ratio (tokens of passes over tokens of rows), padding (its share of places),
    tokens_per_second of rows and pass_tokens_per_second, of all ranks and without the time of evaluation and saving;
    peak_memory_gib of the first rank, of the process on a CPU; and mean_token_accuracy of at most `loss.OBSERVED` targets of
    each row (not branch by branch, nor with a router's loss).

    Args:
        model: a causal LM loaded with attn_implementation="flexmask", with adapters around it or not; or the name of one.
        args: OnePassTrainingArguments, or by default those of the folder "trainer_output".
        data_collator: by default `OnePassCollator(processing_class, max_tokens=16384)`.
        train_dataset: rows of `pack` or `pack_stream`; trees; or conversations, a list or a `datasets.Dataset` of records as
            `build_trees` takes them. These are rendered here, with the options of the collator, and packed into rows of its
            `max_tokens`, if it has any.
        eval_dataset: likewise, or a dict of several.
        processing_class: the tokenizer; by default that of the collator, or of the model's name.
        peft_config: of the adapters to put around the model, `LoraConfig(…)`.
        **options: of the Trainer.

    Raises:
        ValueError: other arguments than OnePassTrainingArguments, a loss function of its own, a model that is not
            loaded with attn_implementation="flexmask", or no tokenizer.
        NotImplementedError: an architecture that a tree would train wrongly.
        ConversationError: a conversation cannot be used.
    """

    def __init__(
        self,
        model: torch.nn.Module | str,
        args: OnePassTrainingArguments | None = None,
        data_collator=None,
        train_dataset=None,
        eval_dataset=None,
        processing_class=None,
        *,
        peft_config=None,
        **options,
    ):
        args = OnePassTrainingArguments("trainer_output") if args is None else args
        if not isinstance(args, OnePassTrainingArguments) or options.get("compute_loss_func"):
            raise ValueError("OnePassTrainer takes OnePassTrainingArguments, and no compute_loss_func")
        if options.get("compute_metrics") and args.prediction_loss_only:
            raise ValueError(
                "compute_metrics would not be called, because of prediction_loss_only=True (the default here); set that to "
                "False. It is given no logits: eval_loss is there without it, and flexmask.tree_logprobs has the rest"
            )
        if args.tokens_in_memory is not None and type(self).compute_loss is not OnePassTrainer.compute_loss:
            raise ValueError(
                f"tokens_in_memory: branch by branch, {type(self).__name__}.compute_loss would not be called"
            )
        reentrant = args.gradient_checkpointing and (args.gradient_checkpointing_kwargs or {}).get("use_reentrant")
        if reentrant and hasattr(model, "config") and with_router_loss(model.config):
            raise ValueError(
                "a router's loss has no gradients under reentrant checkpointing: the library takes it from within the layers; "
                'set gradient_checkpointing_kwargs={"use_reentrant": False}, or output_router_logits=False'
            )
        if not hasattr(model, "config") and not isinstance(model, str):
            raise ValueError(f"model is {type(model).__name__}, expected a Hugging Face model, or the name of one")
        processing_class = processing_class or getattr(data_collator, "tokenizer", None)
        if isinstance(model, str):
            model, tokenizer = load_model(ModelArguments(model), train_dataset)
            processing_class = processing_class or tokenizer
        if model.config._attn_implementation != NAME:
            raise ValueError(
                f'the model has attn_implementation="{model.config._attn_implementation}", expected "{NAME}"'
            )
        check_config(model.config)
        check_parts(model.config, args)
        if peft_config is not None:
            model = with_adapter(model, peft_config)
        if data_collator is None and not (train_dataset is None and eval_dataset is None):
            if processing_class is None:
                raise ValueError("OnePassTrainer needs a tokenizer: processing_class, or a data_collator that has one")
            data_collator = OnePassCollator(processing_class, MAX_TOKENS)
        if getattr(data_collator, "target_per_position", False):
            raise ValueError(
                "target_per_position is for trainers with a loss of their own; leave it out of the data_collator"
            )
        tell = print if args.process_index == 0 else lambda *_: None
        made = functools.partial(to_rows, collator=data_collator, config=model.config, tell=tell)
        train_dataset = made(train_dataset, streams=True)
        if isinstance(eval_dataset, dict):
            eval_dataset = {name: made(dataset) for name, dataset in eval_dataset.items()}
        else:
            eval_dataset = made(eval_dataset)
        if Counting.knows(data_collator):
            data_collator = Counting(data_collator)
        self._row_group, size = None, args.sequence_parallel_size
        super().__init__(model, args, data_collator, train_dataset, eval_dataset, processing_class, **options)
        self.progress = Progress(model.config)
        # Of the model card: names of hub datasets, and title -> text.
        self.card_datasets: list[str] = []
        self.card_sections: dict[str, str] = {}
        fsdp1 = self.is_fsdp_enabled and not self.accelerator.is_fsdp2
        if args.tokens_in_memory is not None and (
            self.is_deepspeed_enabled or fsdp1
        ):  # `accelerate launch` may have them
            raise ValueError(
                f"tokens_in_memory and {'FSDP 1' if fsdp1 else 'DeepSpeed'} exclude each other: a step goes backward several "
                "times; leave tokens_in_memory out, or take FSDP2"
            )
        if size > 1:
            mesh = init_device_mesh(self.accelerator.device.type, (args.world_size // size, size))
            self._row_group = mesh.get_group(1)
        # Ranks that have a row together count as one where rows are handed out.
        self._row_rank, self._row_ranks = args.process_index // size, args.world_size // size
        self._sums: list[torch.Tensor] = []  # of an evaluation: (weighted loss, weight) of each row, float64
        self.model_accepts_loss_kwargs = True  # the loss below is divided by what _get_num_items_in_batch counts

    def create_model_card(self, *_, **__) -> None:
        """README.md in the output folder: data, losses, what was saved, and what is in `card_sections`."""
        if not self.is_world_process_zero():
            return
        losses = {
            name: entry[name] for entry in self.state.log_history for name in ("loss", "eval_loss") if name in entry
        }
        names = ("learning_rate", "num_train_epochs", "max_steps", "gradient_accumulation_steps", "seed")
        options = [f"{name}: {getattr(self.args, name)}" for name in names]
        reached = [
            f"{self.state.global_step} steps, " + ", ".join(f"last {name} {of:.4f}" for name, of in losses.items())
        ]
        write_card(
            Path(self.args.output_dir),
            base_model=inner_model(self.model).name_or_path or None,
            datasets=self.card_datasets,
            adapters=hasattr(self.accelerator.unwrap_model(self.model), "peft_config"),
            sections={"Training": "\n".join([*options, *reached, str(self.progress)])} | self.card_sections,
        )

    def _inner_training_loop(self, *args, **options):
        self.progress.start()
        output = super()._inner_training_loop(*args, **options)
        self._log_progress()  # of the steps after the last log
        return output

    def _prepare_inputs(self, inputs):
        return super()._prepare_inputs({name: x for name, x in inputs.items() if name != COUNTS})

    def _save_checkpoint(self, *args, **options):
        with self.progress.paused():
            super()._save_checkpoint(*args, **options)

    def log(self, logs, start_time=None):
        if "loss" in logs:
            logs |= self._log_progress()
        super().log(logs, start_time)

    def _log_progress(self) -> dict[str, float]:
        add_up = functools.partial(self.accelerator.reduce, reduction="sum")
        return self.progress.log(self.args.device, add_up, self.args.sequence_parallel_size)

    def _get_train_sampler(self, train_dataset=None):
        rows = self.train_dataset if train_dataset is None else train_dataset
        in_order = getattr(self.args, "train_sampling_strategy", "random") != "random"  # older versions know no other
        if not isinstance(rows, Rows) or self._row_ranks == 1 or in_order:
            return super()._get_train_sampler(rows)
        costs = flops(self.model.config, rows.lengths, rows.visible_pairs)
        seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
        return LevelSampler(costs, self._row_ranks, seed)

    def get_train_dataloader(self):
        if isinstance(self.train_dataset, RowStream):
            self.train_dataset.for_rank(self._row_rank, self._row_ranks)
        loader = super().get_train_dataloader()
        if isinstance(self.train_dataset, RowStream) and isinstance(loader.dataset, IterableDatasetShard):
            # Each rank packs its own share of the conversations. Accelerate would take a share of that share.
            loader.dataset.num_processes, loader.dataset.process_index = 1, 0
        if isinstance(loader.batch_sampler, BatchSamplerShard):
            loader.batch_sampler.__class__ = BatchShare  # it is made deep inside Accelerate, and shared by two loaders
            loader.batch_sampler.even_batches = False
            loader.batch_sampler.num_processes, loader.batch_sampler.process_index = self._row_ranks, self._row_rank
        elif self._row_group is not None and not isinstance(self.train_dataset, RowStream):
            raise ValueError(_BY_INDEX)
        return loader

    def get_eval_dataloader(self, eval_dataset=None):
        return self._every_row_on_every_rank(super().get_eval_dataloader(eval_dataset))

    def get_test_dataloader(self, test_dataset):
        return self._every_row_on_every_rank(super().get_test_dataloader(test_dataset))

    def _every_row_on_every_rank(self, loader):
        """Where ranks have rows together: with rows repeated on some, as the library does it, nobody could tell which count."""
        if self._row_group is not None:
            if not isinstance(loader.batch_sampler, BatchSamplerShard):
                raise ValueError(_BY_INDEX)
            loader.batch_sampler.num_processes, loader.batch_sampler.process_index = 1, 0
        return loader

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        """As many batches on every rank, and in every step. Ranks do not have the same number of rows, and the last step of a
        stream has fewer; a rank that has run out adds batches without weight until all have."""
        try:
            batches = list(islice(epoch_iterator, num_batches))
        except ConversationError as error:  # that of a worker has the traceback around it
            raise ConversationError(str(error).strip().rpartition("ConversationError: ")[2]) from error
        for batch in batches:
            self.progress.see(batch)
        if isinstance(self.train_dataset, Rows):
            self.state.stateful_callbacks[_POSITION] = self._shares()
        if isinstance(self.train_dataset, RowStream):
            is_over = not self.accelerator.gather(torch.tensor([len(batches)], device=device)).any()
            self._note_position(is_over)
            # The library takes a stream to be as long as the training, and would ask for the rest of it.
            self.control.should_epoch_stop |= is_over
        else:
            is_over = not has_length(self.train_dataset)
        if not is_over:
            missing = num_batches - len(batches)
            collator = getattr(self.data_collator, "collator", self.data_collator)
            pad_to_multiple_of = getattr(collator, "pad_to_multiple_of", 1)
            batches += [empty_batch(pad_to_multiple_of) for _ in range(missing)]
        if self._row_group is not None:
            batches = [share_row(batch, self._row_group) for batch in batches]
        return batches, self._get_num_items_in_batch(batches, device)

    def _note_position(self, is_over: bool) -> None:
        """In the state that is saved with a checkpoint: in which epoch of the stream we are, and after how many steps of it.
        The library cannot tell, since only reading the stream shows how long it is."""
        position = self.state.stateful_callbacks.setdefault(_POSITION, {"epoch": 0, "steps": 0})
        position |= {"epoch": position["epoch"] + 1, "steps": 0} if is_over else {"steps": position["steps"] + 1}
        position |= self._shares()

    def _shares(self) -> dict[str, int]:
        """What decides which rows come in which step."""
        if isinstance(self.train_dataset, Rows):
            return {"ranks that have rows": self._row_ranks}
        names = ("world_size", "dataloader_num_workers", "gradient_accumulation_steps", "sequence_parallel_size")
        return {name: getattr(self.args, name) for name in names}

    def _init_training_state(self, *args, **options):
        """Of a stream: the epoch and the batches of it that were trained, from the checkpoint. Of rows the library knows them,
        but not that their order depends on how many ranks take them."""
        trained = super()._init_training_state(*args, **options)
        if not isinstance(self.train_dataset, RowStream | Rows) or not self.state.global_step:
            return trained
        if self.args.ignore_data_skip:  # as the library has it: from the first row on
            self.state.stateful_callbacks.pop(_POSITION, None)
            return trained
        position = self.state.stateful_callbacks.get(_POSITION, {})
        if not position and isinstance(self.train_dataset, Rows):
            return trained  # of another Trainer
        before = {"sequence_parallel_size": 1} | position  # which older checkpoints do not name
        changed = [f"{name} {before.get(name)}" for name, now in self._shares().items() if before.get(name) != now]
        if changed:
            was = (
                f"was saved with {', '.join(changed)}" if position else "does not say where in the stream it was saved"
            )
            raise ConversationError(
                f"the checkpoint {was}, so the training cannot go on with the next row; resume as it was saved, or begin the "
                "data anew (--ignore_data_skip true)"
            )
        if isinstance(self.train_dataset, Rows):
            return trained
        return position["epoch"], position["steps"] * self.args.gradient_accumulation_steps

    def _get_num_items_in_batch(self, batch_samples, device):
        """The weight of all targets of the accumulated batches, of all ranks: what the Trainer divides the loss by."""
        if not batch_samples:
            return None
        weight = torch.stack([target_weight(batch).sum().to(device) for batch in batch_samples]).sum()
        if self.args.average_tokens_across_devices and self.args.world_size > 1:
            weight = self.accelerator.gather(weight).sum()
        return weight

    def training_step(self, model, inputs, num_items_in_batch=None):
        if self.args.tokens_in_memory is None:
            return super().training_step(model, inputs, num_items_in_batch)
        model.train()
        if hasattr(self.optimizer, "train"):  # one without a schedule
            self.optimizer.train()
        if num_items_in_batch is not None and self.args.average_tokens_across_devices:
            num_items_in_batch = num_items_in_batch / self.accelerator.num_processes  # gradients are averaged
        return backward_by_branches(
            model,
            self._prepare_inputs(inputs),
            num_items_in_batch,
            tokens_in_memory=self.args.tokens_in_memory,
            backward=self.accelerator.backward,
        )

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        if model.training and with_router_loss(self.model.config):
            if not target_weight(inputs).any():  # of `empty_batch`
                inputs = {name: value for name, value in inputs.items() if name != "target_weight"}
                return super().compute_loss(model, inputs, False, num_items_in_batch) * 0
            if "target_weight" in inputs:
                raise ConversationError(
                    "output_router_logits: with a router's loss it is the model's own loss that is trained, which knows no "
                    "weights, and targets of this row have some: from weights, loss_reduction, or a conversation that is there "
                    "twice. Leave those out, or set output_router_logits=False in the model's configuration"
                )
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        if not model.training:
            num_items_in_batch = target_weight(inputs).sum()  # of the row
            if self._row_group is not None:
                inputs = share_row(inputs, self._row_group)
        observe = self.progress.observe if model.training else None
        loss = tree_loss(model, inputs, num_items_in_batch, observe=observe)
        if not model.training:
            weight = num_items_in_batch.to(loss)
            row = torch.stack([loss.detach() * weight, weight / self.args.sequence_parallel_size])
            # Of all processes, without the rows that are repeated to give each process as many.
            gather = self.accelerator.gather_for_metrics if self._row_group is None else self.accelerator.gather
            self._sums += gather(row[None]).cpu().double()
        elif num_items_in_batch is not None and self.args.average_tokens_across_devices:
            loss = loss * self.accelerator.num_processes  # their gradients are averaged
        return (loss, {"loss": loss}) if return_outputs else loss

    def _save_rng_state(self, output_dir):
        super()._save_rng_state(output_dir)
        # The state of the Trainer is written next, by one rank: where it is, all ranks have written theirs (`last_checkpoint`).
        self.accelerator.wait_for_everyone()

    def evaluation_loop(
        self, dataloader, description, prediction_loss_only=None, ignore_keys=None, metric_key_prefix="eval"
    ):
        self._sums = []
        with self.progress.paused():
            output = super().evaluation_loop(
                dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix
            )
        if self._sums:
            loss, weight = torch.stack(self._sums).sum(0).tolist()
            output.metrics[f"{metric_key_prefix}_loss"] = loss / weight
        return output


_POSITION = "flexmask.RowStream"  # its key in the state of the Trainer
_BY_INDEX = (
    "sequence_parallel_size wants rows by index (flexmask.pack) or, for training, of flexmask.pack_stream: of another stream the "
    "ranks that have a row together would get different ones"
)


def to_rows(dataset, *, collator, config: PreTrainedConfig, tell: Callable[[object], object], streams: bool = False):
    """Conversations -> trees, packed if the collator says how many tokens a row has; what is no conversation, as it is.

    Args:
        collator: with the options of rendering.
        config: of the model, which tells how long a pass may be where the collator does not.
        tell: called with what became of them.
        streams: leave an iterable dataset one, which is read while training. Otherwise it is read to its end.

    Raises:
        ConversationError: a conversation cannot be rendered, or is too long.
        ValueError: a collator that is not flexmask's; an empty dataset, or one of several splits.
    """
    is_stream = isinstance(dataset, datasets.IterableDataset)
    if isinstance(dataset, datasets.DatasetDict | datasets.IterableDatasetDict):
        raise ValueError(f"a dataset is a {type(dataset).__name__}, expected one of its splits ({', '.join(dataset)})")
    if isinstance(dataset, list | tuple | datasets.Dataset) and not len(dataset):
        raise ValueError("a dataset is empty, expected conversations, trees or rows")
    if not is_stream and not isinstance(dataset, list | tuple | datasets.Dataset):
        return dataset
    if not is_stream and (isinstance(dataset[0], TokenTree) or "subtree_end" in dataset[0]):
        return dataset
    if not isinstance(collator, OnePassCollator):
        raise ValueError(
            f"conversations need an OnePassCollator, which renders them; data_collator is {type(collator).__name__}"
        )
    options = {
        "max_length": longest_pass(config, collator.max_length),
        "max_tokens": collator.max_tokens,
        "loss_reduction": collator.loss_reduction,
        **collator.template_options,
    }
    if is_stream and streams:
        max_tokens = collator.max_tokens or MAX_TOKENS
        maker = tree_maker(collator.tokenizer, **options | {"max_tokens": max_tokens})
        return RowStream(TreeStream(HubDataset("train_dataset", dataset), maker), max_tokens, make=operator.call)
    prepared = build_trees(list(dataset) if is_stream else dataset, collator.tokenizer, **options)
    tell(prepared)
    return prepared.trees if collator.max_tokens is None else pack(prepared.trees, collator.max_tokens)


def check_parts(config: PreTrainedConfig, args: OnePassTrainingArguments) -> None:
    """Refuse a model that cannot be trained with a row in parts, if that is asked for.

    Raises:
        NotImplementedError: naming the argument that asks for it.
    """
    if args.tokens_in_memory is not None:
        check_in_parts(config, "tokens_in_memory")
    if args.sequence_parallel_size > 1:
        check_in_parts(config, "sequence_parallel_size")
        check_heads(config, args.sequence_parallel_size)


def last_checkpoint(folder: str | Path) -> tuple[Path | None, list[Path]]:
    """The last checkpoint of a training that was written to its end, if there is one; and later ones that were not, because the
    training was killed meanwhile."""
    found = ((re.fullmatch(rf"{PREFIX_CHECKPOINT_DIR}-(\d+)", path.name), path) for path in Path(folder).glob("*"))
    numbered = [(int(match[1]), path) for match, path in found if match]
    unfinished = []
    for _, path in sorted(numbered, reverse=True):
        try:
            json.loads((path / TRAINER_STATE_NAME).read_text())
            return path, unfinished
        except (OSError, ValueError):
            unfinished.append(path)
    return None, unfinished


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

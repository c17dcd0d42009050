"""`flexmask train`: one-pass fine-tuning on the Hugging Face Trainer."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from matplotlib.figure import Figure
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)

from . import demo
from .collator import OnePassCollator
from .data import OVERLONG, build_trees, load_conversations
from .inspect import draw_mask
from .integrations.transformers import NAME, check_config
from .loss import target_weight, tree_loss
from .messages import ConversationError
from .packing import pack
from .tree import LOSS_REDUCTIONS, TokenTree
from .verify import verify

# Names that need no download: a small random model, and generated conversations.
TINY_MODEL = "flexmask/tiny-random"
GENERATED_DATA = "flexmask/generated"
DTYPES = ("auto", "float32", "bfloat16", "float16")


@dataclass
class ModelArguments:
    model_name_or_path: str = field(metadata={"help": f"A hub name, a folder, or {TINY_MODEL} (nothing to download)."})
    model_revision: str = field(default="main", metadata={"help": "Branch, tag or commit on the hub."})
    dtype: str = field(default="float32", metadata={"help": "dtype of the weights: auto, float32, bfloat16, float16."})
    trust_remote_code: bool = field(default=False, metadata={"help": "Run model code from the hub."})
    use_peft: bool = field(default=False, metadata={"help": "Train LoRA adapters instead of all weights."})
    lora_r: int = field(default=16, metadata={"help": "LoRA rank."})
    lora_alpha: int = field(default=32, metadata={"help": "LoRA scale."})
    lora_dropout: float = field(default=0.0, metadata={"help": "LoRA dropout."})
    lora_target_modules: list[str] | None = field(default=None, metadata={"help": "Default: all linear layers."})

    def __post_init__(self):
        if self.dtype not in DTYPES:
            raise ValueError(f"dtype is {self.dtype!r}, expected one of {', '.join(DTYPES)}")


@dataclass
class DataArguments:
    dataset_name: str = field(metadata={"help": f".json, .jsonl or .parquet file, hub name, or {GENERATED_DATA}."})
    dataset_train_split: str = field(default="train", metadata={"help": "Split of a hub dataset."})
    eval_dataset_name: str | None = field(default=None, metadata={"help": "Conversations for evaluation, likewise."})
    dataset_test_split: str = field(default="test", metadata={"help": "Split of a hub dataset for evaluation."})
    dataset_num_proc: int | None = field(default=None, metadata={"help": "Processes for rendering and tokenising."})
    max_samples: int | None = field(default=None, metadata={"help": "Use the first conversations only."})
    max_length: int | None = field(
        default=None, metadata={"help": "Tokens of one pass, at most. Default: what the model takes."}
    )
    max_tokens: int = field(default=16384, metadata={"help": "Tokens of one packed row, which is one batch."})
    overlong: str = field(
        default="error", metadata={"help": "Passes over max_length: error, drop the conversation, or truncate them."}
    )
    loss_reduction: str = field(
        default="token", metadata={"help": "The loss is a mean per token, turn or conversation."}
    )
    verify: bool = field(default=True, metadata={"help": "Compare two conversations with N passes before training."})
    compare: int = field(default=0, metadata={"help": "Compare this many conversations with N passes afterwards."})

    def __post_init__(self):
        if self.overlong not in OVERLONG:
            raise ValueError(f"overlong is {self.overlong!r}, expected one of {', '.join(OVERLONG)}")
        if self.loss_reduction not in LOSS_REDUCTIONS:
            raise ValueError(f"loss_reduction is {self.loss_reduction!r}, expected one of {', '.join(LOSS_REDUCTIONS)}")
        for name in ("max_length", "max_tokens", "max_samples", "dataset_num_proc"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} is {value}, expected at least 1")


@dataclass
class TemplateArguments:
    chat_template_path: str | None = field(default=None, metadata={"help": "A Jinja file to use as chat template."})
    chat_template_kwargs: str = field(default="{}", metadata={"help": "JSON: arguments for the chat template."})
    reasoning_format: str | None = field(
        default=None, metadata={"help": r"How the model writes reasoning, e.g. '<think>\n{reasoning}\n</think>\n\n'."}
    )
    end_of_turn: str | None = field(default=None, metadata={"help": "Token that ends an answer, if not detected."})

    def __post_init__(self):
        try:
            valid = isinstance(json.loads(self.chat_template_kwargs), dict)
        except json.JSONDecodeError:
            valid = False
        if not valid:
            raise ValueError(f"chat_template_kwargs is {self.chat_template_kwargs!r}, expected a JSON object")

    def options(self) -> dict:
        """The same as keywords of `render_passes`."""
        template = Path(self.chat_template_path).read_text() if self.chat_template_path else None
        # A shell hands over backslash and n.
        reasoning_format = self.reasoning_format and self.reasoning_format.replace("\\n", "\n")
        return {
            "chat_template": template,
            "reasoning_format": reasoning_format,
            "end_of_turn": self.end_of_turn,
            **json.loads(self.chat_template_kwargs),
        }


@dataclass
class OnePassTrainingArguments(TrainingArguments):
    """The Trainer's own arguments, with the defaults that one-pass training needs."""

    per_device_train_batch_size: int = field(
        default=1, metadata={"help": "Rows in a batch; one-pass training takes 1."}
    )
    per_device_eval_batch_size: int = field(default=1, metadata={"help": "Rows in a batch; one-pass training takes 1."})
    remove_unused_columns: bool = field(default=False, metadata={"help": "Must stay false: rows are not columns."})
    prediction_loss_only: bool = field(default=True, metadata={"help": "Evaluate the loss, do not gather logits."})
    logging_steps: float = field(default=10, metadata={"help": "Log the loss every so many steps."})
    logging_nan_inf_filter: bool = field(default=False, metadata={"help": "False: a loss that is not finite is shown."})
    report_to: str = field(default="none", metadata={"help": "Loggers of the Trainer, e.g. tensorboard or wandb."})

    def __post_init__(self):
        super().__post_init__()
        if self.per_device_train_batch_size != 1 or self.per_device_eval_batch_size != 1:
            raise ValueError(
                "per_device_train_batch_size and per_device_eval_batch_size must be 1: a batch is one packed row of "
                "max_tokens tokens; set max_tokens, or gradient_accumulation_steps for a larger batch"
            )
        if self.remove_unused_columns:
            raise ValueError("remove_unused_columns must be false (true would drop the tree from the batch)")
        if self.label_smoothing_factor:
            raise ValueError(
                f"label_smoothing_factor is {self.label_smoothing_factor}, expected 0: the Trainer's smoothing shifts the "
                "labels by one token, and a target need not be the right neighbour of where it is predicted"
            )
        if self.n_gpu > 1:
            raise ValueError(
                f"one process sees {self.n_gpu} GPUs, and DataParallel cannot split a row; start one process for each: "
                f"torchrun --nproc_per_node {self.n_gpu} -m flexmask train …, or set CUDA_VISIBLE_DEVICES"
            )


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


def train(
    model_args: ModelArguments,
    data_args: DataArguments,
    template_args: TemplateArguments,
    args: OnePassTrainingArguments,
) -> Trainer:
    """Load, verify, train, save. Returns the Trainer, whose `state.log_history` holds the losses.

    Raises:
        ConversationError: the data cannot be used as it is.
        NotImplementedError: the architecture is not supported.
        MismatchError: one-pass losses are not those of N passes on the first conversation.
    """
    set_seed(args.seed)
    if args.eval_strategy != "no" and not data_args.eval_dataset_name:
        raise ConversationError(f"eval_strategy is {args.eval_strategy.value}, which needs eval_dataset_name")
    conversations = load_data(data_args.dataset_name, data_args.dataset_train_split, args.seed)[: data_args.max_samples]
    model, tokenizer = load_model(model_args, conversations)
    options = template_args.options()
    if options["chat_template"]:
        tokenizer.chat_template = options["chat_template"]  # saved with the model
    tell = print if args.process_index == 0 else lambda *_, **__: None
    trees, rows, intact = _rows(conversations, model, tokenizer, data_args, options, tell)
    compared, eval_rows = intact, None
    if data_args.eval_dataset_name:
        eval_conversations = load_data(data_args.eval_dataset_name, data_args.dataset_test_split, args.seed + 1)
        _, eval_rows, compared = _rows(eval_conversations, model, tokenizer, data_args, options, tell)

    trainer = OnePassTrainer(
        model,
        args,
        train_dataset=rows,
        eval_dataset=eval_rows,
        data_collator=OnePassCollator(tokenizer, data_args.max_tokens),
        processing_class=tokenizer,
        callbacks=[StopOnNonFiniteLoss()],
    )
    if (data_args.verify or data_args.compare) and (trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled):
        raise ConversationError(
            "a model that FSDP or DeepSpeed spreads over devices cannot be compared with N passes; run `flexmask verify` "
            "on one device first, then train with --verify false and without --compare"
        )
    if data_args.verify:
        sample = sorted(intact, key=lambda c: _answers(c) < 2)[:2]  # two, so that packing is compared too
        if not sample:
            raise ConversationError("no conversation is whole, so none can be compared with N passes (--verify false)")
        report = verify(model, tokenizer, sample, **options)
        tell(f"before training, {data_args.dataset_name}:\n{report}", flush=True)
        if not report:
            raise MismatchError(
                "the one-pass losses of this model are not those of N passes (table above), so training would "
                "be wrong; nothing was trained. --verify false trains all the same"
            )
    resume = args.resume_from_checkpoint
    trainer.train(resume_from_checkpoint=True if resume in ("true", "True", "last") else resume)
    trainer.save_model()
    trainer.save_state()

    folder = Path(args.output_dir)
    if trainer.is_world_process_zero():
        draw_mask(max(trees[:100], key=lambda tree: tree.num_passes), folder / "mask.png")
        draw_losses(trainer.state.log_history, folder / "loss.png")
        if data_args.compare:
            # Accelerate leaves its autocast around the model's forward.
            trained = trainer.accelerator.unwrap_model(trainer.model, keep_fp32_wrapper=False)
            name = data_args.eval_dataset_name or data_args.dataset_name
            report = verify(trained, tokenizer, compared[: data_args.compare], **options)
            print(f"after training, {name}:\n{report}")
        print(f"model: {folder}\nmask picture: {folder / 'mask.png'}\nloss curve: {folder / 'loss.png'}", flush=True)
        if data_args.compare and not report:
            raise MismatchError("the one-pass losses of the trained model are not those of N passes (table above)")
    return trainer


class MismatchError(RuntimeError):
    """One-pass losses are not those of N passes."""


def load_model(args: ModelArguments, conversations: Sequence[dict]) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A causal LM with tree attention and its tokenizer; with LoRA adapters around it if asked for."""
    if args.model_name_or_path == TINY_MODEL:
        tokenizer = load_tokenizer(TINY_MODEL, conversations)
        model = demo.tiny_model(tokenizer)
    else:
        options = {"revision": args.model_revision, "trust_remote_code": args.trust_remote_code}
        tokenizer = load_tokenizer(args.model_name_or_path, conversations, **options)
        model = AutoModelForCausalLM.from_pretrained(
            args.model_name_or_path, dtype=args.dtype, attn_implementation=NAME, **options
        )
    check_config(model.config)
    if args.use_peft:
        from peft import LoraConfig, get_peft_model  # optional dependency

        lora = LoraConfig(
            r=args.lora_r,
            lora_alpha=args.lora_alpha,
            lora_dropout=args.lora_dropout,
            target_modules=args.lora_target_modules or "all-linear",
            task_type="CAUSAL_LM",
        )
        model.enable_input_require_grads()  # gradient checkpointing needs an input that has one
        model = get_peft_model(model, lora)
    return model, tokenizer


def load_tokenizer(name: str, conversations: Sequence[dict], **options) -> PreTrainedTokenizerBase:
    """A tokenizer from a folder or the hub; that of the tiny model is trained on the conversations.

    Raises:
        OSError: telling a folder that does not exist from a hub that is not there.
    """
    if name == TINY_MODEL:
        return demo.train_tokenizer(demo.texts(conversations))
    try:
        return AutoTokenizer.from_pretrained(name, **options)
    except (OSError, ValueError) as error:
        if Path(name).exists():
            raise OSError(f"{name}: holds no tokenizer: {' '.join(str(error).split())}") from error
        raise OSError(f"{name}: there is no such folder, and loading it from the hub failed: {error}") from error


def load_config(name: str, tokenizer: PreTrainedTokenizerBase) -> PreTrainedConfig:
    """The configuration of the model that a tokenizer belongs to.

    Raises:
        OSError: there is none beside the tokenizer. ValueError: it is unknown to transformers.
    """
    return demo.tiny_model(tokenizer).config if name == TINY_MODEL else AutoConfig.from_pretrained(name)


def load_data(name: str, split: str = "train", seed: int = 0) -> list[dict]:
    """Conversations of a file or hub dataset (see `load_conversations`), or generated ones, of which the seed decides."""
    if name == GENERATED_DATA:
        return demo.conversations(512 if split == "train" else 64, seed=seed)
    return load_conversations(name, split)


def _rows(
    conversations, model, tokenizer, args: DataArguments, options, tell
) -> tuple[list[TokenTree], list[TokenTree], list[dict]]:
    """Trees, packed rows, and the conversations of which nothing is lost."""
    longest = args.max_length or getattr(model.config.get_text_config(), "max_position_embeddings", None)
    prepared = build_trees(
        conversations,
        tokenizer,
        max_length=longest,
        max_tokens=args.max_tokens,
        overlong=args.overlong,
        loss_reduction=args.loss_reduction,
        num_proc=args.dataset_num_proc,
        **options,
    )
    tell(prepared, flush=True)
    if not prepared.trees:
        raise ConversationError(
            f"nothing is left to train on; raise max_length (now {longest}) or max_tokens (now {args.max_tokens})"
        )
    largest = max(int(tree.input_ids.max()) for tree in prepared.trees)
    embedded = model.get_input_embeddings().num_embeddings
    if largest >= embedded:
        raise ConversationError(
            f"token id {largest} has no embedding, the model has {embedded}; is this its tokenizer? "
            "(resize_token_embeddings for added tokens)"
        )
    rows = pack(prepared.trees, args.max_tokens)
    larger = sum(len(tree) > args.max_tokens for tree in prepared.trees)
    repeated = sum(map(len, rows)) - prepared.tokens
    split = f"; {larger:,} larger trees were split, which repeats {repeated:,} tokens" if larger else ""
    tell(f"{len(rows)} rows of at most {args.max_tokens} tokens{split}", flush=True)
    return prepared.trees, rows, [conversations[i] for i in prepared.intact]


def _answers(conversation: dict) -> int:
    return sum(m.get("role") == "assistant" for m in conversation["messages"])


def draw_losses(log_history: list[dict], path: str | Path) -> None:
    """A PNG of the training loss, and of the evaluation loss if there is one, over steps."""
    axes = (figure := Figure(figsize=(7, 4), layout="constrained")).subplots()
    for name, label in (("loss", "training"), ("eval_loss", "evaluation")):
        points = [(entry["step"], entry[name]) for entry in log_history if name in entry]
        if points:
            axes.plot(*zip(*points), label=label, marker=".")
            axes.legend()
    axes.set(xlabel="step", ylabel="loss")
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=120)

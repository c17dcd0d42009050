"""What `flexmask` is told on the command line, or in a file."""

from __future__ import annotations

import importlib.util
import inspect
import json
from dataclasses import dataclass, field, fields, replace
from pathlib import Path

from huggingface_hub import whoami
from transformers import TrainingArguments
from transformers.integrations import get_reporting_integration_callbacks

from .data import OVERLONG, TreeMaker
from .messages import COLUMNS, ConversationError, check_template_arguments, is_weight
from .passes import EMPTY_REASONING, TRAIN_ON, UNWRITTEN_TOOLS, render_passes
from .sources import SUFFIXES
from .tree import LOSS_REDUCTIONS

# Names that need no download: a small random model, and generated conversations.
TINY_MODEL = "flexmask/tiny-random"
GENERATED_DATA = "flexmask/generated"
MAX_TOKENS = 16384  # of a row, where nobody says it
LAST_CHECKPOINT = "last"  # of the output folder, in place of the folder of a checkpoint
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
    lora_modules_to_save: list[str] | None = field(
        default=None,
        metadata={"help": "Modules to train whole and to save with the adapters, e.g. embed_tokens lm_head."},
    )
    use_rslora: bool = field(
        default=False, metadata={"help": "Scale adapters by alpha / sqrt(rank), not alpha / rank."}
    )
    use_dora: bool = field(default=False, metadata={"help": "DoRA: train magnitudes beside the adapters."})
    load_in_4bit: bool = field(default=False, metadata={"help": "Weights in 4 bits (bitsandbytes), with adapters."})
    load_in_8bit: bool = field(default=False, metadata={"help": "Weights in 8 bits (bitsandbytes), with adapters."})
    bnb_4bit_quant_type: str = field(default="nf4", metadata={"help": "Of 4 bits: nf4 or fp4."})
    use_bnb_nested_quant: bool = field(default=False, metadata={"help": "Of 4 bits: their scales in 8 bits, too."})

    def __post_init__(self):
        check_choice("dtype", self.dtype, DTYPES)
        check_choice("bnb_4bit_quant_type", self.bnb_4bit_quant_type, ("nf4", "fp4"))
        if not self.is_quantised:
            return
        if self.load_in_4bit and self.load_in_8bit:
            raise ValueError("load_in_4bit and load_in_8bit exclude each other; leave one of them out")
        if not self.use_peft:
            raise ValueError(
                f"{self._option} needs use_peft: weights that were rounded are not trained, adapters around them are"
            )
        if self.model_name_or_path == TINY_MODEL:
            raise ValueError(
                f"{self._option} needs a model from a folder or the hub, and {TINY_MODEL} is made on the spot"
            )

    def check_environment(self) -> None:
        """What loading the model needs, and preparing its data does not.

        Raises:
            ConversationError: naming the argument, and what to install.
        """
        if self.use_peft:
            check_installed("use_peft", "peft")
        if self.is_quantised:
            check_installed(self._option, "bitsandbytes")

    @property
    def _option(self) -> str:
        return "load_in_4bit" if self.load_in_4bit else "load_in_8bit"

    @property
    def is_quantised(self) -> bool:
        return self.load_in_4bit or self.load_in_8bit


@dataclass(frozen=True)
class DatasetArguments:
    """One dataset: an entry of dataset_name, in YAML or JSON, which may be its name alone.

    Attributes:
        name, split, config: see `sources.open_source`; or the name GENERATED_DATA.
        weight: see `dataset_weights`.
        columns: see `columns`.
    """

    name: str
    weight: float | None = None
    split: str | None = None
    config: str | None = None
    columns: dict[str, str] = field(default_factory=dict)

    def __post_init__(self):
        for name in ("name", "split", "config"):
            value = getattr(self, name)
            if not isinstance(value, str) and (value is not None or name == "name"):
                raise ValueError(f"the {name} of dataset {self.name!r} is {value!r}, expected a text")
        if self.weight is not None and not (is_weight(self.weight) and self.weight):
            raise ValueError(f"the weight of {self.name} is {self.weight!r}, expected a number above 0")
        if not isinstance(self.columns, dict) or not all(isinstance(text, str) for text in self.columns.values()):
            raise ValueError(f"columns is {json.dumps(self.columns)}, expected names of columns as names and values")
        for name in self.columns.keys() - set(COLUMNS):
            raise ValueError(f"columns has the name {name!r}, expected one of {', '.join(COLUMNS)}")
        if len(set(self.columns.values())) < len(self.columns):
            raise ValueError(f"columns is {json.dumps(self.columns)}, expected each column of the records once")
        if self.is_file and self.split is not None:
            raise ValueError(
                f"{self.name} is a file, which has no split {self.split!r}; leave it out, and hold conversations out with "
                "test_size, or put them into a file of their own"
            )
        if not self.is_hub and self.config is not None:
            raise ValueError(f"{self.name} is no hub dataset, so it has no config {self.config!r}; leave it out")

    @classmethod
    def of(cls, entry: str, **common) -> DatasetArguments:
        """From a name, or an object in JSON; `common` holds what it does not say."""
        own = _json_object("dataset_name", entry) if entry.lstrip().startswith("{") else {"name": entry}
        if "name" not in own or own.keys() - {f.name for f in fields(cls)}:
            raise ValueError(f"dataset_name has {entry}, expected an object with name, weight, config, split, columns")
        return cls(**common | own)

    @property
    def is_file(self) -> bool:
        return self.name.lower().endswith(SUFFIXES)

    @property
    def is_hub(self) -> bool:
        return not self.is_file and self.name != GENERATED_DATA


@dataclass
class DataArguments:
    dataset_name: list[str] = field(
        metadata={
            "help": f".json, .jsonl or .parquet files, hub names, or {GENERATED_DATA}; or JSON objects with name, and weight, "
            "config, split, columns of its own."
        }
    )
    dataset_weights: list[float] | None = field(
        default=None,
        metadata={
            "help": "How often conversations are taken of each dataset, in proportion. In an epoch each comes at least once, "
            "those of a dataset that is too small for its weight several times. Default: each comes once."
        },
    )
    dataset_config: str | None = field(default=None, metadata={"help": "Configuration (subset) of hub datasets."})
    dataset_train_split: str | None = field(default=None, metadata={"help": "Split of hub datasets. Default: train."})
    columns: str = field(
        default="{}",
        metadata={"help": 'JSON: our names of columns to those in the records, e.g. {"messages": "chat"}.'},
    )
    eval_dataset_name: list[str] | None = field(default=None, metadata={"help": "For evaluation, likewise."})
    dataset_test_split: str | None = field(
        default=None, metadata={"help": "Split of hub datasets for evaluation. Default: test."}
    )
    test_size: float | None = field(
        default=None,
        metadata={"help": "Conversations to hold out for evaluation, drawn by the seed: a part below 1, or how many."},
    )
    streaming: bool = field(
        default=False, metadata={"help": "Prepare nothing: read, render and pack while training. Needs max_steps."}
    )
    dataset_num_proc: int | None = field(
        default=None, metadata={"help": "Processes for rendering and tokenising. Default: one for each core."}
    )
    dataset_cache_dir: str | None = field(
        default=None, metadata={"help": "Where prepared data is kept. Default: in the cache of the datasets library."}
    )
    max_samples: int | None = field(
        default=None, metadata={"help": "Use the first conversations of each dataset only."}
    )
    max_length: int | None = field(
        default=None, metadata={"help": "Tokens of one pass, at most. Default: what the model takes."}
    )
    max_tokens: int = field(default=MAX_TOKENS, metadata={"help": "Tokens of one packed row, which is one batch."})
    overlong: str = field(
        default="error", metadata={"help": "Passes over max_length: error, drop the conversation, or truncate them."}
    )
    loss_reduction: str = field(
        default="token", metadata={"help": "The loss is a mean per token, turn or conversation."}
    )
    verify: bool = field(default=True, metadata={"help": "Compare two conversations with N passes before training."})
    compare: int = field(default=0, metadata={"help": "Compare this many conversations with N passes afterwards."})

    def __post_init__(self):
        check_choice("overlong", self.overlong, OVERLONG)
        check_choice("loss_reduction", self.loss_reduction, LOSS_REDUCTIONS)
        check_positive(self, "max_length", "max_tokens", "max_samples", "dataset_num_proc")
        if self.compare < 0:
            raise ValueError(f"compare is {self.compare}, expected 0 or more")
        if self.test_size is not None and not (0 < self.test_size < 1 or self.test_size % 1 == 0 < self.test_size):
            raise ValueError(f"test_size is {self.test_size}, expected a part between 0 and 1, or a whole number")
        if self.test_size is not None and (self.eval_dataset_name or self.streaming):
            other = "eval_dataset_name" if self.eval_dataset_name else "streaming"
            raise ValueError(f"test_size and {other} exclude each other; give a file of its own with eval_dataset_name")
        datasets = self.train_datasets() + self.eval_datasets()
        if self.dataset_config is not None and not any(dataset.is_hub for dataset in datasets):
            raise ValueError(f"dataset_config is {self.dataset_config!r}, but there is no hub dataset; leave it out")

    def train_datasets(self) -> list[DatasetArguments]:
        """What to train on."""
        found = self._datasets(self.dataset_name, self.dataset_train_split)
        weights = self.dataset_weights
        if weights is not None and len(weights) != len(found):
            raise ValueError(f"dataset_weights has {len(weights)} numbers for {len(found)} datasets")
        if weights is not None:
            found = [replace(dataset, weight=weight) for dataset, weight in zip(found, weights)]
        if len({dataset.weight is None for dataset in found}) > 1:
            raise ValueError("some datasets have a weight and some have none, expected one for each or for none")
        return found

    def eval_datasets(self) -> list[DatasetArguments]:
        """What to evaluate on: each conversation once."""
        found = self._datasets(self.eval_dataset_name or [], self.dataset_test_split)
        with_splits = [d if d.split is not None or d.is_file else replace(d, split="test") for d in found]
        return [replace(dataset, weight=None) for dataset in with_splits]

    def _datasets(self, entries: list[str], split: str | None) -> list[DatasetArguments]:
        # A common split reaches files too, which refuse it: ignored, training and evaluation could be the same data.
        columns = _json_object("columns", self.columns)
        found = [DatasetArguments.of(entry, split=split, columns=columns) for entry in entries]
        config = self.dataset_config
        return [replace(d, config=config) if d.is_hub and d.config is None else d for d in found]


# Options of rendering, of trees and of comparisons: where template variables are handed on beside them, none may have their name.
_OURS = {*inspect.signature(render_passes).parameters, *(f.name for f in fields(TreeMaker)), "gradients", "num_proc"}


@dataclass
class TemplateArguments:
    chat_template_path: str | None = field(default=None, metadata={"help": "A Jinja file to use as chat template."})
    chat_template_kwargs: str = field(default="{}", metadata={"help": "JSON: arguments for the chat template."})
    reasoning_format: str | None = field(
        default=None, metadata={"help": r"How the model writes reasoning, e.g. '<think>\n{reasoning}\n</think>\n\n'."}
    )
    end_of_turn: str | None = field(default=None, metadata={"help": "Token that ends an answer, if not detected."})
    train_on: str = field(
        default="all", metadata={"help": f"Which assistant messages of a conversation: {', '.join(TRAIN_ON)}."}
    )
    empty_reasoning: str = field(
        default="prompt",
        metadata={
            "help": "Messages without reasoning, where the template writes an empty thought: put it in the prompt, keep it "
            "as a target, drop the message (context only), or error."
        },
    )
    unwritten_tools: str = field(
        default="error",
        metadata={
            "help": "Conversations with tools that the template leaves out: error, or drop the tools, as the template does."
        },
    )
    reasoning_weight: float = field(
        default=1.0,
        metadata={"help": "Weight of reasoning in the loss, that of answers being 1; 0 trains answers only."},
    )

    def __post_init__(self):
        arguments = _json_object("chat_template_kwargs", self.chat_template_kwargs)
        check_template_arguments(arguments)
        for name in sorted(_OURS & arguments.keys()):
            raise ValueError(
                f"chat_template_kwargs has {name!r}, which is an option of flexmask and does not reach the template"
            )
        check_choice("train_on", self.train_on, TRAIN_ON)
        check_choice("empty_reasoning", self.empty_reasoning, EMPTY_REASONING)
        check_choice("unwritten_tools", self.unwritten_tools, UNWRITTEN_TOOLS)
        if not is_weight(self.reasoning_weight):
            raise ValueError(f"reasoning_weight is {self.reasoning_weight}, expected a number that is not negative")

    def options(self) -> dict:
        """The same as keywords of `render_passes`."""
        template = Path(self.chat_template_path).read_text() if self.chat_template_path else None
        # A shell hands over backslash and n.
        reasoning_format = self.reasoning_format and self.reasoning_format.replace("\\n", "\n")
        return {
            "chat_template": template,
            "reasoning_format": reasoning_format,
            "end_of_turn": self.end_of_turn,
            "train_on": self.train_on,
            "empty_reasoning": self.empty_reasoning,
            "unwritten_tools": self.unwritten_tools,
            "reasoning_weight": self.reasoning_weight,
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
    tokens_in_memory: int | None = field(
        default=None,
        metadata={
            "help": "Run a row branch by branch, with the activations of at most so many tokens at a time, and at least those "
            "of the longest pass; 0 for just those. Default: whole rows."
        },
    )
    sequence_parallel_size: int = field(
        default=1,
        metadata={"help": "Ranks that have a row together, each some of its tokens: for rows that no GPU holds."},
    )

    def __post_init__(self):
        if str(self.fsdp).lower() in ("true", "false"):  # a text, from the command line and from YAML
            self.fsdp = str(self.fsdp).lower() == "true"
        if str(self.resume_from_checkpoint).lower() in ("true", "false", "last"):
            self.resume_from_checkpoint = (
                None if str(self.resume_from_checkpoint).lower() == "false" else LAST_CHECKPOINT
            )
        super().__post_init__()
        if self.accelerator_config.dispatch_batches is None:
            # The library's default for streams sends the batches of one process to all, and cuts them: a batch is one row.
            self.accelerator_config.dispatch_batches = False
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
        if self.neftune_noise_alpha:
            raise ValueError(
                f"neftune_noise_alpha is {self.neftune_noise_alpha}, expected none: NEFTune scales its noise by the length of a "
                "sequence, and a row holds many"
            )
        sampling = getattr(self, "train_sampling_strategy", None)  # group_by_length in older versions
        if sampling in ("group_by_length", "batch_rebalance") or getattr(self, "group_by_length", False):
            raise ValueError(
                f"train_sampling_strategy must not be {sampling or 'group_by_length'}: a batch is one row, which packing has "
                "filled already, and ranks take rows of about the same cost"
            )
        if self.tokens_in_memory is not None:
            optimiser = str(getattr(self.optim, "value", self.optim))
            for name, chosen in (
                ("FSDP 1", bool(self.fsdp) and int(self.fsdp_config.get("version", 2)) != 2),
                ("deepspeed", self.deepspeed is not None),
                (f"optim {optimiser}", any(kind in optimiser for kind in ("lomo", "layerwise"))),
            ):
                if chosen:
                    raise ValueError(
                        f"tokens_in_memory and {name} exclude each other: a step goes backward several times; leave "
                        "tokens_in_memory out, or take FSDP2 (version: 2 in fsdp_config), or an optimiser with a step of its own"
                    )
            if self.sequence_parallel_size > 1:
                raise ValueError(
                    "tokens_in_memory and sequence_parallel_size exclude each other: a row is run branch by branch, or on "
                    "several ranks; leave one of them out"
                )
            if self.tokens_in_memory < 0:
                raise ValueError(f"tokens_in_memory is {self.tokens_in_memory}, expected 0 or more")
        if self.sequence_parallel_size < 1 or self.world_size % self.sequence_parallel_size:
            raise ValueError(
                f"sequence_parallel_size is {self.sequence_parallel_size}, expected a divisor of the {self.world_size} processes "
                "(torchrun --nproc_per_node)"
            )
        if self.dataloader_drop_last:
            raise ValueError(
                "dataloader_drop_last must be false: a batch is one row, and the last ones would not be used"
            )
        if self.world_size > 1 and not self.average_tokens_across_devices:
            raise ValueError(
                "average_tokens_across_devices must be true: the loss is a mean over the targets of all ranks, and one that "
                "has no row left has none of its own"
            )
        if self.n_gpu > 1:
            raise ValueError(
                f"one process sees {self.n_gpu} GPUs, and DataParallel cannot split a row; start one process for each: "
                f"torchrun --nproc_per_node {self.n_gpu} -m flexmask train …, or set CUDA_VISIBLE_DEVICES"
            )

    def check_environment(self) -> None:
        """What the Trainer would find missing only when the data has been prepared.

        Raises:
            ConversationError: naming the argument, and what to do.
        """
        from transformers import Trainer  # takes seconds to import
        from transformers.trainer import TRAINER_STATE_NAME

        checkpoint = self.resume_from_checkpoint
        if checkpoint not in (None, LAST_CHECKPOINT) and not (Path(checkpoint) / TRAINER_STATE_NAME).is_file():
            raise ConversationError(
                f"resume_from_checkpoint is {checkpoint}, where there is no checkpoint ({TRAINER_STATE_NAME}); true takes the "
                "last one of output_dir"
            )
        try:
            for logger in get_reporting_integration_callbacks(self.report_to):
                logger()
        except (ImportError, RuntimeError, ValueError) as error:
            raise ConversationError(
                f"report_to is {', '.join(self.report_to)}: {' '.join(str(error).split())}"
            ) from error
        try:
            Trainer.get_optimizer_cls_and_kwargs(self)
        except ImportError as error:
            raise ConversationError(f"optim is {self.optim}: {' '.join(str(error).split())}") from error
        except ValueError:
            pass  # it wants to see the model first
        if self.use_liger_kernel and self.device.type == "cpu":
            raise ConversationError("use_liger_kernel needs a GPU: Liger's kernels are Triton's; leave it out")
        if self.use_liger_kernel:
            check_installed("use_liger_kernel", "liger_kernel")
        if self.fsdp and self.world_size == 1:
            raise ConversationError(
                "fsdp needs several processes: start with torchrun --nproc_per_node N -m flexmask train …"
            )
        if self.push_to_hub and self.process_index == 0:
            try:
                whoami(token=self.hub_token)
            except Exception as error:  # no network, no token, one that is refused: a kind of error for each
                reason = " ".join(str(error).split())
                raise ConversationError(
                    f"push_to_hub: the hub does not answer, or knows no user ({reason}); leave it out, or log in: hf auth login"
                ) from error


def check_installed(option: str, library: str) -> None:
    if importlib.util.find_spec(library) is None:
        raise ConversationError(f"{option} needs {library}, which is not installed: pip install {library}")


def check_positive(args, *names: str) -> None:
    """Of those arguments: whole numbers that are 1 or more, or None."""
    for name in names:
        value = getattr(args, name)
        if value is not None and value < 1:
            raise ValueError(f"{name} is {value}, expected at least 1")


def check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name} is {value!r}, expected one of {', '.join(choices)}")


def _json_object(name: str, text: str) -> dict:
    try:
        value = json.loads(text)
    except json.JSONDecodeError:
        value = None
    if not isinstance(value, dict):
        raise ValueError(f"{name} is {text!r}, expected a JSON object")
    return value

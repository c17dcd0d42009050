"""The `flexmask` command: train, prepare, verify, inspect, merge."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import yaml

from .messages import ConversationError

USAGE = """usage: flexmask {train,prepare,verify,inspect,merge} …

  flexmask train    fine-tune a model on conversations, one pass each (--config FILE, or flags; --help lists them)
  flexmask prepare  render and tokenise the conversations of a training ahead, with the arguments of train
  flexmask verify   compare one-pass with N-pass losses and gradients on your model and data; exit code 1 if they differ
  flexmask inspect  what a conversation becomes: passes, tokens, tiles, and a picture of the mask
  flexmask merge    write trained adapters and their model as one plain model
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line. Returns the exit code: 0, 1 if a comparison failed, 2 for bad input."""
    argv = list(sys.argv[1:] if argv is None else argv)
    commands = {"train": _train, "prepare": _prepare, "verify": _verify, "inspect": _inspect, "merge": _merge}
    if not argv or argv[0] not in commands:
        asked = argv and argv[0] in ("-h", "--help")
        print(USAGE, file=sys.stdout if asked else sys.stderr)
        return 0 if asked else 2
    from .train import MismatchError  # transformers' Trainer takes seconds to import

    try:
        return commands[argv[0]](argv[1:])
    except (ArgumentError, ConversationError, NotImplementedError, OSError, FloatingPointError) as error:
        print(f"flexmask {argv[0]}: {error}", file=sys.stderr)
        return 2
    except MismatchError as error:
        print(f"flexmask {argv[0]}: {error}", file=sys.stderr)
        return 1


class ArgumentError(ValueError):
    """A flag, or an entry of a configuration file, that cannot be used."""


DATASET = (
    ".json, .jsonl or .parquet file of conversations, hub name, or flexmask/generated; or a JSON object with name, config, "
    "split, columns"
)


def _parse(
    classes: tuple[type, ...], argv: list[str], *, positional: str | None = None, explain: str = DATASET, **options
) -> list:
    """Flags -> an instance of each dataclass, then the positional argument. Without one, flags go over a --config file."""
    from transformers import HfArgumentParser

    parser = HfArgumentParser(classes, allow_abbrev=False, **options)
    if positional:
        parser.add_argument(positional, help=explain)
    else:
        parser.add_argument("--config", help="A YAML file with these arguments; flags override it.")
        argv = [*_config_flags(argv), *argv]
    parser.error = _refuse  # one line instead of the whole usage
    try:
        *parsed, rest = parser.parse_args_into_dataclasses(
            argv, look_for_args_file=False, return_remaining_strings=True
        )
        if rest:
            raise ValueError(f"unknown arguments {' '.join(rest)}; --help lists what there is")
    except ValueError as error:  # of the dataclasses too
        raise ArgumentError(error) from error
    return [*parsed[: len(classes)], *(vars(parsed[-1]).values() if positional else ())]


def _refuse(message: str):
    raise ArgumentError(f"{message}; --help lists what there is")


def _config_flags(argv: list[str]) -> list[str]:
    """The entries of the file given with --config, as flags."""
    import argparse

    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--config")
    parser.error = _refuse
    path = parser.parse_known_args(argv)[0].config
    if path is None:
        return []
    try:
        entries = yaml.safe_load(Path(path).read_text()) or {}
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ArgumentError(f"{path}: is not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(entries, dict):
        raise ArgumentError(f"{path}: expected `name: value` lines, got {type(entries).__name__}")
    flags = []
    for name, value in entries.items():
        if value is None:
            continue
        values = value if isinstance(value, list) else [value]
        try:
            # A date is a text that YAML reads otherwise.
            flags += [f"--{name}", *(json.dumps(v, default=str) if isinstance(v, dict) else str(v) for v in values)]
        except TypeError as error:
            raise ArgumentError(f"{path}: {name} is no JSON ({error}); put its names in quotes") from error
    return flags


def _train(argv: list[str]) -> int:
    from .train import train

    description = "Fine-tune a model on conversations. Below ours, the arguments of the Hugging Face Trainer."
    train(*_parse_training(argv, prog="flexmask train", description=description))
    return 0


def _prepare(argv: list[str]) -> int:
    from .train import prepare_datasets

    description = (
        "Render and tokenise conversations ahead, so that `flexmask train` with the same arguments (those that are about the "
        "data, the template and the model's tokenizer matter) begins at once."
    )
    argv = [*argv, "--use_cpu", "true"]  # half precision must not ask for a GPU
    prepare_datasets(*_parse_training(argv, prog="flexmask prepare", description=description))
    return 0


def _parse_training(argv: list[str], **options) -> list:
    from .arguments import DataArguments, ModelArguments, OnePassTrainingArguments, TemplateArguments

    return _parse((ModelArguments, DataArguments, TemplateArguments, OnePassTrainingArguments), argv, **options)


def _dataset(entry: str):
    from .arguments import DatasetArguments

    try:
        return DatasetArguments.of(entry)
    except ValueError as error:
        raise ArgumentError(error) from error


@dataclass
class VerifyArguments:
    max_samples: int = field(default=4, metadata={"help": "Compare the first conversations."})
    gradients: bool = field(default=True, metadata={"help": "Whether gradients are compared, beside losses."})

    def __post_init__(self):
        from .arguments import check_positive

        check_positive(self, "max_samples")


def _verify(argv: list[str]) -> int:
    import torch

    from .arguments import ModelArguments, TemplateArguments
    from .loading import first_conversations
    from .models import load_model
    from .verify import verify

    classes = (VerifyArguments, ModelArguments, TemplateArguments)
    description = "Compare one-pass with N-pass losses and gradients."
    args, model_args, template_args, name = _parse(
        classes, argv, positional="dataset_name", prog="flexmask verify", description=description
    )
    conversations = list(first_conversations([_dataset(name)], count=args.max_samples))
    if not conversations:
        raise ConversationError(f"{name}: holds no conversations")
    model, tokenizer = load_model(model_args, first_conversations([_dataset(name)]))
    print(f"comparing {len(conversations)} conversations with N passes (--max_samples) …", flush=True)
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else "cpu"
    report = verify(model.to(device), tokenizer, conversations, gradients=args.gradients, **template_args.options())
    print(report)
    return 0 if report else 1


@dataclass
class MergeArguments:
    output_dir: str = field(metadata={"help": "Where the model goes."})
    dtype: str = field(default="auto", metadata={"help": "dtype of its weights: auto, float32, bfloat16, float16."})
    trust_remote_code: bool = field(default=False, metadata={"help": "Run model code from the hub."})

    def __post_init__(self):
        from .arguments import DTYPES, check_choice, check_installed

        check_choice("dtype", self.dtype, DTYPES)
        check_installed("merge", "peft")


def _merge(argv: list[str]) -> int:
    from .models import merge

    description = (
        "Write trained adapters and the model that they were trained on as one plain model, with its tokenizer."
    )
    args, adapter = _parse(
        (MergeArguments,), argv, positional="adapter", prog="flexmask merge", description=description,
        explain="folder that `flexmask train --use_peft true` wrote, or a hub name",
    )  # fmt: skip
    merge(adapter, args.output_dir, args.dtype, args.trust_remote_code)
    print(f"model: {args.output_dir}")
    return 0


@dataclass
class InspectArguments:
    tokenizer: str = field(metadata={"help": "Hub name or folder of the tokenizer."})
    index: int = field(default=0, metadata={"help": "Which conversation of the file, counted from zero."})
    output: str = field(default="mask.png", metadata={"help": "Where to draw the mask."})
    tokens: bool = field(
        default=False, metadata={"help": "Print the tokens of every pass, those that are trained in colour."}
    )
    html: str | None = field(
        default=None,
        metadata={
            "help": "Write a page to look at: a table of all conversations, and from --index on some of them in full."
        },
    )
    max_samples: int | None = field(default=None, metadata={"help": "Of the page: the first conversations only."})

    def __post_init__(self):
        from .arguments import check_positive

        check_positive(self, "max_samples")


def _inspect(argv: list[str]) -> int:
    from datasets.utils import tqdm

    from .arguments import TemplateArguments
    from .cost import cost
    from .data import tree_maker
    from .inspect import draw_mask, inspect_tree
    from .loading import first_conversations, longest_pass, open_dataset
    from .models import load_config, load_tokenizer
    from .page import TOO_LONG, Shown, print_tokens, write_page

    description = "Show what conversations become: figures, a picture of the mask, tokens, a page to look at."
    args, template_args, name = _parse(
        (InspectArguments, TemplateArguments), argv, positional="file", prog="flexmask inspect", description=description
    )
    dataset = _dataset(name)
    source = open_dataset(dataset)
    if not 0 <= args.index < len(source):
        raise ConversationError(f"--index is {args.index}, but {source.name} has {len(source)} conversations")
    tokenizer = load_tokenizer(args.tokenizer, first_conversations([dataset]))
    maker = tree_maker(tokenizer, columns=dataset.columns, **template_args.options())

    try:
        config, missing = load_config(args.tokenizer, tokenizer), ""
    except (OSError, ValueError) as error:
        config, missing = None, str(error)

    max_length = None if config is None else longest_pass(config, None)

    def cost_of(tree) -> str:
        why = missing
        try:
            if config is not None:
                return str(cost(tree, config))
        except (ValueError, NotImplementedError) as error:
            why = str(error)
        return f"FLOPs are not counted: {' '.join(why.split())}"

    [record] = source.read(args.index, args.index + 1)
    shown = Shown.of(record, maker)
    if args.tokens:
        print_tokens(shown)
    draw_mask(shown.tree, args.output)
    print(f"conversation {args.index} of {len(source)} (--index)\n")
    print(f"{inspect_tree(shown.tree)}\nmask picture: {args.output}\n\n{cost_of(shown.tree)}")
    if max_length is not None and shown.tree.max_length > max_length:
        print(TOO_LONG.format(max_length))
    for note, count in shown.notes.items():
        print(f"{note}: {count:,}")
    if shown.conversation.ignored:
        print(f"nobody reads these keys of the record: {', '.join(shown.conversation.ignored)}")
    if args.html:
        total = min(len(source), args.max_samples or len(source))
        bar = partial(tqdm, desc="conversations", total=total)
        options = {"first": args.index, "max_samples": args.max_samples, "max_length": max_length}
        write_page(args.html, source, maker, cost_of, **options, progress=bar)
        print(f"page: {args.html}")
    return 0

"""The `flexmask` command: train, verify, inspect."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import yaml

from .messages import ConversationError

USAGE = """usage: flexmask {train,verify,inspect} …

  flexmask train    fine-tune a model on conversations, one pass each (--config FILE, or flags; --help lists them)
  flexmask verify   compare one-pass with N-pass losses and gradients on your model and data; exit code 1 if they differ
  flexmask inspect  what a conversation becomes: passes, tokens, tiles, and a picture of the mask
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line. Returns the exit code: 0, 1 if a comparison failed, 2 for bad input."""
    argv = list(sys.argv[1:] if argv is None else argv)
    commands = {"train": _train, "verify": _verify, "inspect": _inspect}
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


def _parse(classes: tuple[type, ...], argv: list[str], *, positional: str | None = None, **options) -> list:
    """Flags -> an instance of each dataclass, then the positional argument. Without one, flags go over a --config file."""
    from transformers import HfArgumentParser

    parser = HfArgumentParser(classes, allow_abbrev=False, **options)
    if positional:
        parser.add_argument(
            positional, help=".json, .jsonl or .parquet file of conversations, hub name, or flexmask/generated"
        )
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
        values = value if isinstance(value, list) else [json.dumps(value) if isinstance(value, dict) else value]
        flags += [f"--{name}", *map(str, values)]
    return flags


def _train(argv: list[str]) -> int:
    from .train import DataArguments, ModelArguments, OnePassTrainingArguments, TemplateArguments, train

    classes = (ModelArguments, DataArguments, TemplateArguments, OnePassTrainingArguments)
    description = "Fine-tune a model on conversations. Below ours, the arguments of the Hugging Face Trainer."
    train(*_parse(classes, argv, prog="flexmask train", description=description))
    return 0


@dataclass
class VerifyArguments:
    max_samples: int = field(default=4, metadata={"help": "Compare the first conversations."})
    gradients: bool = field(default=True, metadata={"help": "false: compare losses only."})

    def __post_init__(self):
        if self.max_samples < 1:
            raise ValueError(f"max_samples is {self.max_samples}, expected at least 1")


def _verify(argv: list[str]) -> int:
    import torch

    from .train import ModelArguments, TemplateArguments, load_data, load_model
    from .verify import verify

    classes = (VerifyArguments, ModelArguments, TemplateArguments)
    description = "Compare one-pass with N-pass losses and gradients."
    args, model_args, template_args, name = _parse(
        classes, argv, positional="dataset_name", prog="flexmask verify", description=description
    )
    conversations = load_data(name)[: args.max_samples]
    model, tokenizer = load_model(model_args, conversations)
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else "cpu"
    report = verify(model.to(device), tokenizer, conversations, gradients=args.gradients, **template_args.options())
    print(report)
    return 0 if report else 1


@dataclass
class InspectArguments:
    tokenizer: str = field(metadata={"help": "Hub name or folder of the tokenizer."})
    index: int = field(default=0, metadata={"help": "Which conversation of the file, counted from zero."})
    output: str = field(default="mask.png", metadata={"help": "Where to draw the mask."})


def _inspect(argv: list[str]) -> int:
    from .cost import cost
    from .inspect import draw_mask, inspect_passes
    from .passes import render_conversation
    from .train import TemplateArguments, load_config, load_data, load_tokenizer

    description = "Show what a conversation becomes, and draw its mask."
    args, template_args, name = _parse(
        (InspectArguments, TemplateArguments), argv, positional="file", prog="flexmask inspect", description=description
    )
    conversations = load_data(name)
    if not 0 <= args.index < len(conversations):
        raise ConversationError(f"--index is {args.index}, but {name} has {len(conversations)} conversations")
    tokenizer = load_tokenizer(args.tokenizer, conversations)
    passes = render_conversation(conversations[args.index], tokenizer, **template_args.options())
    inspection = inspect_passes(passes)
    draw_mask(inspection.tree, args.output)
    print(f"{inspection}\nmask picture: {args.output}")
    try:
        print(f"\n{cost(inspection.tree, load_config(args.tokenizer, tokenizer))}")
    except (OSError, ValueError, NotImplementedError) as error:
        print(f"\nFLOPs are not counted: {' '.join(str(error).split())}")
    return 0

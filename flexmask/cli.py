"""The `flexmask` command: train, verify, inspect."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field

from .passes import ConversationError

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
    except (ConversationError, NotImplementedError, OSError, FloatingPointError) as error:
        print(f"flexmask {argv[0]}: {error}", file=sys.stderr)
        return 2
    except MismatchError as error:
        print(f"flexmask {argv[0]}: {error}", file=sys.stderr)
        return 1


def _train(argv: list[str]) -> int:
    from .train import parse_arguments, train

    train(*parse_arguments(argv))
    return 0


def _parse(command: str, description: str, classes: tuple[type, ...], positional: str, argv: list[str]):
    from transformers import HfArgumentParser

    parser = HfArgumentParser(classes, prog=f"flexmask {command}", description=description)
    parser.add_argument(positional, help=".json, .jsonl or .parquet file of conversations, or a hub name")
    return parser.parse_args_into_dataclasses(args=argv, look_for_args_file=False)


@dataclass
class VerifyArguments:
    max_samples: int = field(default=4, metadata={"help": "Compare the first conversations."})
    gradients: bool = field(default=True, metadata={"help": "Compare gradients too, not losses only."})


def _verify(argv: list[str]) -> int:
    from .data import load_conversations
    from .train import ModelArguments, TemplateArguments, load_model
    from .verify import verify

    description = "Compare one-pass with N-pass losses and gradients."
    classes = (VerifyArguments, ModelArguments, TemplateArguments)
    args, model_args, template_args, rest = _parse("verify", description, classes, "dataset_name", argv)
    conversations = load_conversations(rest.dataset_name)[: args.max_samples]
    model, tokenizer = load_model(model_args, conversations)
    report = verify(model, tokenizer, conversations, gradients=args.gradients, **template_args.options())
    print(report)
    return 0 if report else 1


@dataclass
class InspectArguments:
    tokenizer: str = field(metadata={"help": "Hub name or folder of the tokenizer."})
    index: int = field(default=0, metadata={"help": "Which conversation of the file."})
    output: str = field(default="mask.png", metadata={"help": "Where to draw the mask."})


def _inspect(argv: list[str]) -> int:
    from transformers import AutoTokenizer

    from .data import load_conversations
    from .inspect import draw_mask, inspect_passes
    from .passes import render_passes
    from .train import TemplateArguments

    description = "Show what a conversation becomes, and draw its mask."
    args, template_args, rest = _parse("inspect", description, (InspectArguments, TemplateArguments), "file", argv)
    conversations = load_conversations(rest.file)
    if not 0 <= args.index < len(conversations):
        raise ConversationError(f"--index is {args.index}, but {rest.file} has {len(conversations)} conversations")
    conversation = conversations[args.index]
    tokenizer = AutoTokenizer.from_pretrained(args.tokenizer)
    passes = render_passes(
        conversation["messages"], tokenizer, tools=conversation.get("tools"), **template_args.options()
    )
    inspection = inspect_passes(passes)
    draw_mask(inspection.tree, args.output)
    print(f"{inspection}\nmask picture: {args.output}")
    return 0

"""Chat files -> conversations -> trees.

A file with a fault is refused with its name and line, and nothing is left out without being counted.
"""

from __future__ import annotations

import json
import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from functools import partial

import datasets
import pyarrow.parquet

from .messages import Conversation, ConversationError, read_conversation, without_nulls
from .passes import Pass, render_conversation
from .tree import LOSS_REDUCTIONS, TokenTree

OVERLONG = ("error", "drop", "truncate")

_HUB_NAME = re.compile(r"[\w-]+(/[\w.-]+)?")  # a bare name with a dot is taken for a file
_STRING_OR_CONSTANT = re.compile(r'"(?:\\.|[^"\\])*"|-?Infinity|NaN')


@dataclass(frozen=True)
class Preparation:
    """The trees of a dataset, and what was lost on the way. Passes and targets are counted before any loss. `str()` of it
    tells both in two lines.

    Attributes:
        trees: one per conversation that was kept, in order.
        intact: indices of the conversations of which nothing is lost.
        conversations: how many were given.
        dropped: conversations left out.
        truncated: conversations kept without some of their passes or targets.
        passes: passes of all conversations.
        passes_lost: passes of which nothing is trained.
        targets: supervised tokens of all passes.
        targets_lost: supervised tokens that are not trained, those of lost passes included.
    """

    trees: list[TokenTree] = field(repr=False)
    intact: list[int] = field(repr=False)
    conversations: int
    dropped: int
    truncated: int
    passes: int
    passes_lost: int
    targets: int
    targets_lost: int

    @property
    def tokens(self) -> int:
        """Tokens of all trees."""
        return sum(map(len, self.trees))

    @property
    def pass_tokens(self) -> int:
        """Tokens of the same passes as separate sequences."""
        return sum(int(tree.pass_lengths.sum()) for tree in self.trees)

    def __str__(self) -> str:
        text = (
            f"{self.conversations:,} conversations, {self.passes:,} passes, {self.targets:,} targets -> "
            f"{len(self.trees):,} trees with {self.tokens:,} tokens"
        )
        if self.trees:
            text += f" ({self.pass_tokens:,} in separate passes, {self.pass_tokens / self.tokens:.2f}x)"
        if not self.dropped and not self.truncated:
            return text + "\nnothing dropped, nothing truncated"
        return text + (
            f"\nLOST to max_length or max_tokens: {self.dropped:,} conversations dropped, {self.truncated:,} truncated; "
            f"{self.passes_lost:,} passes and {self.targets_lost:,} targets "
            f"({self.targets_lost / self.targets:.2%}) are not trained"
        )


def load_conversations(name: str, split: str = "train") -> list[Conversation]:
    """Read and check the conversations of a file or of a dataset of the Hugging Face hub.

    What a record may hold is told in `messages.read_conversation`.

    Args:
        name: a `.jsonl` file (one object a line, blank lines allowed), a `.json` file (a list of objects), a
            `.parquet` file, or the name of a hub dataset. Rows of the last two have one type per column, which fills
            the keys that a record lacks with nulls: keys with a null are removed there, at any depth.
        split: which split of a hub dataset.

    Returns:
        At least one conversation; each is a dict that also knows its origin.

    Raises:
        ConversationError: naming file and line (`data.jsonl:12`) or conversation (`data.json: conversation 11`,
            counted from zero), and what is wrong there.
    """
    name = os.fspath(name)
    conversations = [read_conversation(record, origin) for origin, record in _records(name, split)]
    if not conversations:
        raise ConversationError(f"{name}: holds no conversations")
    return conversations


def build_trees(
    conversations: Iterable[Mapping],
    tokenizer,
    *,
    max_length: int | None = None,
    max_tokens: int | None = None,
    overlong: str = "error",
    loss_reduction: str = "token",
    num_proc: int | None = None,
    **template_options,
) -> Preparation:
    """Render conversations and merge the passes of each into its tree.

    Args:
        conversations: of `load_conversations`, or any dicts of the same form, a `datasets.Dataset` too (see
            `render_conversation` about nulls).
        tokenizer: a Hugging Face tokenizer with a chat template.
        max_length: tokens of one pass, at most: what the model takes.
        max_tokens: tokens of the rows that the trees will be packed into. A larger tree is no fault, since `pack` splits
            it; but a single pass must fit.
        overlong: what becomes of a conversation with a longer pass. "error"; "drop": it is left out; "truncate":
            every pass is cut after so many tokens, as trainers on separate sequences do, passes left without a
            supervised token are removed, and a conversation left without a pass is dropped.
        loss_reduction: what the loss is a mean of, see `TokenTree.from_passes`.
        num_proc: processes to render with. Where processes are spawned and not forked (macOS, Windows), the calling
            script needs the usual `if __name__ == "__main__"`.
        **template_options: for `render_passes`: chat_template, reasoning_format, end_of_turn, template arguments.

    Raises:
        ConversationError: a conversation cannot be rendered, is too long, or has token ids outside the vocabulary;
            its origin is named, or its index (`conversation 11`, counted from zero).
        ValueError: an unknown `overlong` or `loss_reduction`, or a `max_length` or `max_tokens` below 1.
    """
    if overlong not in OVERLONG:
        raise ValueError(f"overlong is {overlong!r}, expected one of {', '.join(OVERLONG)}")
    for name, limit in (("max_length", max_length), ("max_tokens", max_tokens)):
        if limit is not None and limit < 1:
            raise ValueError(f"{name} is {limit}, expected at least 1")
    if loss_reduction not in LOSS_REDUCTIONS:
        raise ValueError(f"loss_reduction is {loss_reduction!r}, expected one of {', '.join(LOSS_REDUCTIONS)}")
    conversations = [
        c if isinstance(c, Conversation) else read_conversation(without_nulls(c), f"conversation {i}")
        for i, c in enumerate(conversations)
    ]
    build = partial(
        _build,
        tokenizer=tokenizer,
        max_length=max_length,
        max_tokens=max_tokens,
        overlong=overlong,
        loss_reduction=loss_reduction,
        template_options=template_options,
    )
    if num_proc and num_proc > 1 and len(conversations) > 1:
        with ProcessPoolExecutor(num_proc) as pool:
            # One chunk for each process, because the tokenizer travels with every chunk.
            built = list(pool.map(build, conversations, chunksize=-(-len(conversations) // num_proc)))
    else:
        built = [build(conversation) for conversation in conversations]

    counts = Counter(conversations=len(conversations))
    for _, counted in built:
        counts.update(counted)
    names = ("conversations", "dropped", "truncated", "passes", "passes_lost", "targets", "targets_lost")
    return Preparation(
        trees=[tree for tree, _ in built if tree is not None],
        intact=[i for i, (_, counted) in enumerate(built) if not counted["targets_lost"]],
        **{name: counts[name] for name in names},
    )


def _build(
    conversation: Conversation, tokenizer, max_length, max_tokens, overlong, loss_reduction, template_options
) -> tuple:
    """The tree of one conversation (None: dropped), and what Preparation counts."""
    passes = render_conversation(conversation, tokenizer, **template_options)
    try:
        kept = passes
        for name, limit in (("max_length", max_length), ("max_tokens", max_tokens)):
            kept = _limit(kept, name, limit, overlong)
        tree = TokenTree.from_passes(kept, loss_reduction=loss_reduction) if kept else None
        if tree is not None and tree.input_ids.max() >= len(tokenizer):
            raise ConversationError(
                f"token id {tree.input_ids.max()} is outside the tokenizer's vocabulary of {len(tokenizer)}"
            )
    except (ValueError, TypeError) as error:
        raise ConversationError(f"{conversation.origin}: {error}") from error
    targets = sum(int(p.loss_mask.sum()) for p in passes)
    lost = targets - sum(int(p.loss_mask.sum()) for p in kept)
    return tree, {
        "dropped": int(not kept),
        "truncated": int(bool(kept) and lost > 0),
        "passes": len(passes),
        "passes_lost": len(passes) - len(kept),
        "targets": targets,
        "targets_lost": lost,
    }


def _limit(passes: list[Pass], name: str, limit: int | None, overlong: str) -> list[Pass]:
    longest = max((len(p.input_ids) for p in passes), default=0)
    if limit is None or longest <= limit:
        return passes
    if overlong == "error":
        what = {"max_length": "what the model sees at once", "max_tokens": "a row, which must hold a whole pass"}
        raise ConversationError(
            f"its longest pass has {longest} tokens, more than {limit} ({name}: {what[name]}); raise {name}, or "
            'choose overlong="drop" or overlong="truncate"'
        )
    if overlong == "drop":
        return []
    cut = [Pass(p.input_ids[:limit], p.loss_mask[:limit], p.weight) for p in passes]  # none has token weights yet
    return [p for p in cut if p.loss_mask.any()]


def _records(name: str, split: str) -> Iterator[tuple[str, object]]:
    """The records of a file or dataset, each with its origin."""
    suffix = os.path.splitext(name)[1].lower()
    if suffix in (".json", ".jsonl", ".parquet"):
        if not os.path.isfile(name):
            raise ConversationError(f"{name}: there is no such file")
        return {".json": _json_records, ".jsonl": _jsonl_records, ".parquet": _parquet_records}[suffix](name)
    if os.path.isfile(name) or not _HUB_NAME.fullmatch(name):
        raise ConversationError(f"{name}: expected a .jsonl, .json or .parquet file, or the name of a hub dataset")
    try:
        rows = datasets.load_dataset(name, split=split)
    except Exception as error:  # the library raises many kinds: no such dataset, no such split, no network, …
        raise ConversationError(
            f"{name}: is no .jsonl, .json or .parquet file, and loading it as a hub dataset (split {split!r}) failed: "
            f"{type(error).__name__}: {error}"
        ) from error
    return _numbered(name, map(without_nulls, rows))


def _jsonl_records(name: str) -> Iterator[tuple[str, object]]:
    with open(name, "rb") as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                yield f"{name}:{number}", _parse(line, name, number)


def _json_records(name: str) -> Iterator[tuple[str, object]]:
    with open(name, "rb") as file:
        data = file.read()
    records = _parse(data, name, 1) if data.strip() else []
    if not isinstance(records, list):
        raise ConversationError(f"{name}: is {type(records).__name__}, expected a list of conversations")
    return _numbered(name, records)


def _parquet_records(name: str) -> Iterator[tuple[str, object]]:
    try:
        table = pyarrow.parquet.read_table(name)
    except pyarrow.ArrowException as error:
        raise ConversationError(f"{name}: cannot be read as a Parquet file: {error}") from error
    # Through Dataset, which knows from the file's metadata how to decode its columns (JSON ones, say).
    return _numbered(name, map(without_nulls, datasets.Dataset(table)))


def _numbered(name: str, rows: Iterable) -> Iterator[tuple[str, object]]:
    return ((f"{name}: conversation {index}", row) for index, row in enumerate(rows))


def _parse(data: bytes, name: str, first_line: int):
    """Parse strict JSON; faults are named by file, line and column."""

    def refuse(constant: str):
        # The parser does not say where, but it stops at the first one outside a string.
        at = next(found.start() for found in _STRING_OR_CONSTANT.finditer(text) if found[0] == constant)
        raise json.JSONDecodeError(f"{constant} is not a JSON value", text, at)

    try:
        text = data.decode("utf-8-sig").rstrip()
        value = json.loads(text, parse_constant=refuse)
        if "\\ud" in text.lower():  # half of a surrogate pair is no text, and no tokenizer takes it
            json.dumps(value, ensure_ascii=False).encode()
        return value
    except UnicodeDecodeError as error:
        line = first_line + data.count(b"\n", 0, error.start)
        raise ConversationError(f"{name}:{line}: is not UTF-8: {error.reason}") from error
    except json.JSONDecodeError as error:
        line = first_line + error.lineno - 1
        raise ConversationError(f"{name}:{line}:{error.colno}: malformed JSON: {error.msg}") from error
    except (ValueError, RecursionError) as error:  # also a number too long to convert, or nesting too deep
        raise ConversationError(f"{name}: the JSON that starts at line {first_line} is refused: {error}") from error

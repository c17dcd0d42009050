"""Records -> trees, one at a time."""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace
from functools import cache
from pathlib import Path

import numpy as np
import tokenizers
import transformers

from ..messages import TOO_DEEP, Conversation, ConversationError, NothingLeftError, read_conversation
from ..passes import Pass, render_conversation
from ..sources import Record
from ..tree import LOSS_REDUCTIONS, TokenTree
from .counts import ABSENT, IGNORED, NOTE, NOTHING_LEFT

OVERLONG = ("error", "drop", "truncate")


@dataclass(frozen=True)
class TreeMaker:
    """Makes trees of records.

    Attributes:
        tokenizer: a Hugging Face tokenizer with a chat template.
        max_length: tokens of one pass, at most: what the model takes.
        max_tokens: tokens of the rows that the trees will be packed into. A larger tree is no fault, since `pack` splits
            it; but a single pass must fit.
        overlong: what becomes of a conversation with a longer pass. "error"; "drop": it is left out; "truncate":
            every pass is cut after so many tokens, as trainers on separate sequences do, passes left without a
            supervised token of any weight are removed, and a conversation left without a pass is dropped.
        loss_reduction: what the loss is a mean of, see `TokenTree.from_passes`.
        columns: see `load_conversations`.
        template_options: options of `render_passes`, arguments of the template among them.

    Raises:
        ValueError: an unknown `overlong` or `loss_reduction`, or a `max_length` or `max_tokens` below 1.
    """

    tokenizer: transformers.PreTrainedTokenizerBase
    max_length: int | None = None
    max_tokens: int | None = None
    overlong: str = "error"
    loss_reduction: str = "token"
    columns: Mapping[str, str] | None = None
    template_options: Mapping = field(default_factory=dict)

    def __post_init__(self):
        if self.overlong not in OVERLONG:
            raise ValueError(f"overlong is {self.overlong!r}, expected one of {', '.join(OVERLONG)}")
        for name, limit in self._limits():
            if limit is not None and limit < 1:
                raise ValueError(f"{name} is {limit}, expected at least 1")
        if self.loss_reduction not in LOSS_REDUCTIONS:
            raise ValueError(f"loss_reduction is {self.loss_reduction!r}, expected one of {', '.join(LOSS_REDUCTIONS)}")

    def conversation(self, record: Record) -> Conversation:
        """The conversation that a record holds."""
        origin, record = record
        return record if isinstance(record, Conversation) else read_conversation(record, origin, self.columns)

    def __call__(self, record: Callable[[], Record]) -> tuple[TokenTree | None, Counter]:
        """For a `RowStream` of records."""
        return self.tree(record())[:2]

    def tree(self, record: Record) -> tuple[TokenTree | None, Counter, int]:
        """The tree of a record (None: it is dropped), what `Counts` sums, and the tokens of its longest pass.

        Raises:
            ConversationError: it cannot be read or rendered, is too long, or has token ids outside the vocabulary; its
                origin is named.
        """
        conversation, notes = self.conversation(record), Counter()
        keys = Counter(
            [*(IGNORED + key for key in conversation.ignored), *(ABSENT + name for name in conversation.absent)]
        )
        try:
            passes = render_conversation(conversation, self.tokenizer, counts=notes, **self.template_options)
        except RecursionError as error:
            raise ConversationError(f"{conversation.origin}: {TOO_DEEP}") from error
        except NothingLeftError:
            nothing = Counter({NOTE + name: count for name, count in notes.items()})
            return None, keys + nothing + Counter({"conversations": 1, "dropped": 1, NOTE + NOTHING_LEFT: 1}), 0
        try:
            kept = passes
            for name, limit in self._limits():
                kept = _limit(kept, name, limit, self.overlong)
            tree = TokenTree.from_passes(kept, loss_reduction=self.loss_reduction) if kept else None
            if tree is not None and tree.input_ids.max() >= len(self.tokenizer):
                raise ConversationError(
                    f"token id {tree.input_ids.max()} is outside the tokenizer's vocabulary of {len(self.tokenizer)}"
                )
        except (ValueError, TypeError) as error:
            raise ConversationError(f"{conversation.origin}: {error}") from error
        trained = 0 if tree is None else len(tree.pass_targets)
        targets = trained if kept is passes else sum(int(np.count_nonzero(p.loss_mask)) for p in passes)
        counted = Counter(
            conversations=1,
            dropped=int(not kept),
            truncated=int(bool(kept) and trained < targets),
            passes=len(passes),
            passes_lost=len(passes) - len(kept),
            targets=targets,
            targets_lost=targets - trained,
            tokens=0 if tree is None else len(tree),
            pass_tokens=sum(len(p.input_ids) for p in kept),
        )
        counted.update({NOTE + name: count for name, count in notes.items()})
        counted.update(keys)
        return tree, counted, max(len(p.input_ids) for p in passes)

    def fingerprint(self, limits: bool) -> dict:
        """All that trees depend on beside the records, as JSON; the limits on passes if they are to be part of it."""
        return {
            "code": _code(),
            "tokenizer": tokenizer_fingerprint(self.tokenizer),
            "loss_reduction": self.loss_reduction,
            "columns": dict(self.columns or {}),
            "template_options": dict(self.template_options),
            "limits": [dict(self._limits()), self.overlong] if limits else None,
        }

    def fits(self, longest: int) -> bool:
        """Whether a pass of so many tokens is within the limits."""
        return all(limit is None or longest <= limit for _, limit in self._limits())

    def _limits(self) -> list[tuple[str, int | None]]:
        return [("max_length", self.max_length), ("max_tokens", self.max_tokens)]


def tree_maker(tokenizer, **options) -> TreeMaker:
    """A `TreeMaker` from options side by side: what it does not know is for the template."""
    known = {f.name for f in fields(TreeMaker)} - {"tokenizer", "template_options"}
    template_options = {name: value for name, value in options.items() if name not in known}
    mine = {name: value for name, value in options.items() if name in known}
    return TreeMaker(tokenizer, **mine, template_options=template_options)


def _limit(passes: list[Pass], name: str, limit: int | None, overlong: str) -> list[Pass]:
    longest = max((len(p.input_ids) for p in passes), default=0)
    if limit is None or longest <= limit:
        return passes
    if overlong == "error":
        what = {"max_length": "what the model takes", "max_tokens": "a row, which must hold a whole pass"}
        raise ConversationError(
            f"its longest pass has {longest} tokens, more than {limit} ({name}: {what[name]}); raise {name} (--{name}), or "
            "choose drop or truncate for overlong (--overlong)"
        )
    if overlong == "drop":
        return []
    columns = ("input_ids", "loss_mask", "token_weight")
    cut = [replace(p, **{c: getattr(p, c)[:limit] for c in columns if getattr(p, c) is not None}) for p in passes]
    return [p for p in cut if _is_trained(p)]


def _is_trained(p: Pass) -> bool:
    """Whether a supervised token has a weight: where thoughts weigh nothing, a pass cut inside its thought has none."""
    token_weight = 1 if p.token_weight is None else np.asarray(p.token_weight)
    return bool(np.any(np.asarray(p.loss_mask, bool) * token_weight * p.weight))


def tokenizer_fingerprint(tokenizer) -> str:
    """The same for the same tokenizer loaded anew or used in between, another for any other."""
    state = [type(tokenizer).__name__, len(tokenizer), tokenizer.chat_template, dict(tokenizer.special_tokens_map)]
    state.append(bool(tokenizer.split_special_tokens))
    if tokenizer.is_fast:
        serialised = json.loads(tokenizer.backend_tokenizer.to_str())
        # Using a tokenizer sets these two; rendering uses neither.
        state.append({name: value for name, value in serialised.items() if name not in ("truncation", "padding")})
    else:
        with tempfile.TemporaryDirectory() as folder:
            files = [Path(path) for path in tokenizer.save_vocabulary(folder) if path]
            state += [(path.name, hashlib.blake2b(path.read_bytes()).hexdigest()) for path in files]
        state.append({index: repr(token) for index, token in tokenizer.added_tokens_decoder.items()})
        # How such a tokenizer works is in what it was made with, except where from.
        places = {"name_or_path", "is_local", "local_files_only", "special_tokens_map_file", "tokenizer_file"}
        places |= set(tokenizer.vocab_files_names)
        state.append({name: repr(value) for name, value in tokenizer.init_kwargs.items() if name not in places})
    return hash_of(state)


def hash_of(value) -> str:
    """Of anything that is JSON.

    Raises:
        ValueError: it is not.
    """
    try:
        text = json.dumps(value, sort_keys=True)
    except TypeError as error:
        raise ValueError(f"options of the chat template must be JSON to be prepared: {error}") from error
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).hexdigest()


@cache
def _code() -> str:
    """Of the code that makes trees: what an older version prepared is not found."""
    here = Path(__file__).parents[1]
    files = [here / f"{name}.py" for name in ("messages", "sources", "tree")]
    files += [*here.glob("passes/*.py"), *here.glob("data/*.py")]
    sources = [file.read_text() for file in sorted(files)]
    return hash_of([sources, transformers.__version__, tokenizers.__version__])

"""Records -> conversations -> trees, prepared once and kept, or as a stream. Nothing is left out without being counted."""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import shutil
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, replace
from functools import cache, cached_property
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import tokenizers
import transformers
from datasets.utils import tqdm
from filelock import FileLock, Timeout

from .messages import TOO_DEEP, Conversation, ConversationError, NothingLeftError, read_conversation
from .passes import Pass, render_conversation
from .sources import HubDataset, InMemory, Record, Source, cleared, open_source
from .tree import LOSS_REDUCTIONS, TokenTree, trunk_length

OVERLONG = ("error", "drop", "truncate")
CHUNK = 64  # conversations that a process renders at once, and trees of a record batch: some MB of chats, 100 MB of long logs
PROBE = 8  # conversations of which the time tells how many processes the others are worth
NOTE, IGNORED, ABSENT = "note: ", "ignored: ", "absent: "  # what names of counts begin with
NOTHING_LEFT = "conversations dropped, because nothing of them is left to train"

TREES, COUNTED = "trees.arrow", "counted.json"  # files of a preparation

_LIST_TYPES = {f.name: pa.list_(pa.float32() if f.name == "pass_weights" else pa.int32()) for f in fields(TokenTree)}
_SCHEMA = pa.schema({"conversation": pa.int64(), "intact": pa.bool_()} | _LIST_TYPES)


@dataclass(frozen=True)
class Counts:
    """What became of conversations, and what was lost on the way. Passes and targets are counted before any loss. `str()`
    tells it in a few lines.

    Attributes:
        conversations: how many were given.
        dropped: conversations left out.
        truncated: conversations kept without some of their passes or targets.
        passes: passes of all conversations.
        passes_lost: passes of which nothing is trained.
        targets: supervised tokens of all passes.
        targets_lost: supervised tokens that are not trained, those of lost passes included.
        tokens: of all trees.
        pass_tokens: of the same passes as separate sequences.
        longest_pass: tokens of the longest pass, before any loss.
        largest_token: the largest token id of all trees.
        notes: what rendering has to say, and of how much.
        ignored: keys of the records that nobody reads, and in how many.
        absent: names of `columns`, and how many records lack them.
    """

    conversations: int = 0
    dropped: int = 0
    truncated: int = 0
    passes: int = 0
    passes_lost: int = 0
    targets: int = 0
    targets_lost: int = 0
    tokens: int = 0
    pass_tokens: int = 0
    longest_pass: int = 0
    largest_token: int = 0
    notes: Mapping[str, int] = field(default_factory=dict)
    ignored: Mapping[str, int] = field(default_factory=dict)
    absent: Mapping[str, int] = field(default_factory=dict)

    @classmethod
    def of(cls, counted: Mapping[str, int], **more):
        """From what a `TreeMaker` counts."""
        numbers = {f.name: counted[f.name] for f in fields(Counts) if f.name in counted}
        for name, prefix in (("notes", NOTE), ("ignored", IGNORED), ("absent", ABSENT)):
            numbers[name] = {k.removeprefix(prefix): n for k, n in sorted(counted.items()) if k.startswith(prefix)}
        return cls(**numbers, **more)

    def __str__(self) -> str:
        kept = self.conversations - self.dropped
        text = (
            f"{self.conversations:,} conversations, {self.passes:,} passes, {self.targets:,} targets -> "
            f"{kept:,} trees with {self.tokens:,} tokens"
        )
        if kept:
            text += f" ({self.pass_tokens:,} in separate passes, {self.pass_tokens / self.tokens:.2f}x)"
        dropped = self.dropped - self.notes.get(NOTHING_LEFT, 0)
        if dropped or self.truncated:
            text += (
                f"\nLOST to max_length or max_tokens: {dropped:,} conversations dropped, {self.truncated:,} "
                f"truncated; {self.passes_lost:,} passes and {self.targets_lost:,} targets "
                f"({self.targets_lost / self.targets:.2%}) are not trained"
            )
        else:
            text += "\nno conversation dropped or truncated for its length"
        for name, count in self.notes.items():
            text += f"\n{name}: {count:,}"
        if self.ignored:
            text += "\nnobody reads these keys of the records: "
            text += ", ".join(f"{key} ({count:,})" for key, count in self.ignored.items())
        for name, count in self.absent.items():
            text += f"\n{count:,} records lack the column {name}, which columns names"
        return text


@dataclass(frozen=True)
class Preparation(Counts):
    """The trees of a dataset, and what was lost on the way.

    Attributes:
        trees: one per conversation that was kept, in order.
        conversation: int64, the index of the conversation that each tree is of.
        whole: bool, of each tree whether nothing of its conversation is lost.
        path: the folder where this is kept, None for trees in memory.
    """

    trees: Trees = field(default=None, repr=False)
    conversation: np.ndarray = field(default=None, repr=False)
    whole: np.ndarray = field(default=None, repr=False)
    path: Path | None = None

    @property
    def intact(self) -> list[int]:
        """Indices of the conversations of which nothing is lost."""
        return self.conversation[self.whole].tolist()


class Trees(Sequence):
    """Trees as columns of Arrow record batches, in memory or mapped from files; a TokenTree is made when one is asked for.

    Attributes:
        lengths: int64, tokens of each.
        num_passes: int64, passes of each.
    """

    def __init__(self, columns: _Columns, rows: np.ndarray | None = None):
        self._columns = columns
        self._rows = np.arange(len(columns.lengths)) if rows is None else rows
        self.lengths, self.num_passes = columns.lengths[self._rows], columns.num_passes[self._rows]

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index):
        if isinstance(index, slice):
            return self.take(np.arange(len(self))[index])
        return self._columns.tree(self._rows[index])

    def __add__(self, other: Trees) -> Trees:
        columns = _Columns(self._columns.parts + other._columns.parts)
        return Trees(columns, np.concatenate([self._rows, other._rows + len(self._columns.lengths)]))

    def trunk(self, index: int) -> np.ndarray:
        """`TokenTree.trunk` of one, without the tree."""
        return self._columns.trunk(self._rows[index])

    @property
    def visible_pairs(self) -> np.ndarray:
        """int64, `TokenTree.visible_pairs` of each."""
        return self._columns.visible_pairs[self._rows]

    def take(self, indices: np.ndarray) -> Trees:
        """Those trees, in that order; a tree may be taken several times."""
        return Trees(self._columns, self._rows[indices])


class _Columns:
    """Record batches of `_SCHEMA`, each part a list of them or the path of a file."""

    def __init__(self, parts: Sequence[Path | list[pa.RecordBatch]]):
        self.parts = list(parts)
        self.batches = [batch for part in self.parts for batch in (_mapped(part) if isinstance(part, Path) else part)]
        self.lengths, self.num_passes = self._sizes("input_ids"), self._sizes("pass_end")
        self._ends = np.cumsum([batch.num_rows for batch in self.batches])
        self._lists: dict[int, dict[str, tuple[np.ndarray, np.ndarray]]] = {}

    def __reduce__(self):  # what is mapped here is mapped again there
        return _Columns, (self.parts,)

    def tree(self, row: int) -> TokenTree:
        return TokenTree.from_dict({name: self._list(row, name).copy() for name in _LIST_TYPES})

    def trunk(self, row: int) -> np.ndarray:
        return self._list(row, "input_ids")[: trunk_length(self._list(row, "position_ids"))]

    def _list(self, row: int, name: str) -> np.ndarray:
        batch = int(np.searchsorted(self._ends, row, side="right"))
        at = row - self._ends[batch] + self.batches[batch].num_rows
        if batch not in self._lists:
            self._lists[batch] = {name: _lists(self.batches[batch], name) for name in _LIST_TYPES}
        begin, values = self._lists[batch][name]
        return values[begin[at] : begin[at + 1]]

    def column(self, name: str) -> np.ndarray:
        """A column that has one value for each tree."""
        none = np.empty(0, _SCHEMA.field(name).type.to_pandas_dtype())
        return np.concatenate([none, *(b.column(name).to_numpy(zero_copy_only=False) for b in self.batches)])

    @cached_property
    def visible_pairs(self) -> np.ndarray:
        found = [np.empty(0, np.int64)]
        for batch in self.batches:
            begin, positions = _lists(batch, "position_ids")
            total = np.append(0, positions[begin[0] : begin[-1]].cumsum(dtype=np.int64))[begin - begin[0]]
            found.append(np.diff(total) + np.diff(begin))
        return np.concatenate(found)

    def _sizes(self, name: str) -> np.ndarray:
        sizes = [np.diff(_lists(batch, name)[0]) for batch in self.batches]
        return np.concatenate([np.empty(0, np.int64), *sizes])


def _mapped(path: Path) -> list[pa.RecordBatch]:
    reader = pa.ipc.open_file(pa.memory_map(str(path)))
    return [reader.get_batch(i) for i in range(reader.num_record_batches)]


def _lists(batch: pa.RecordBatch, name: str) -> tuple[np.ndarray, np.ndarray]:
    """Where each list begins, and the values of all, without a copy."""
    column = batch.column(name)
    return column.offsets.to_numpy(), column.values.to_numpy()


def load_conversations(
    name: str,
    split: str | None = None,
    *,
    config: str | None = None,
    columns: Mapping[str, str] | None = None,
) -> list[Conversation]:
    """Read and check the conversations of a file or of a dataset of the Hugging Face hub, all into memory.

    Args:
        name, split, config: see `sources.open_source`.
        columns: name here -> name in the records, for records that call `messages`, `tools`, … otherwise. What a record may
            hold is told in `messages.read_conversation`.

    Returns:
        At least one conversation; each is a dict that also knows its origin.

    Raises:
        ConversationError: naming file and line (`data.jsonl:12`) or conversation (`data.json: conversation 11`,
            counted from zero), and what is wrong there; or a name in `columns` that no record has.
    """
    source = open_source(name, split, config)
    conversations = [read_conversation(record, origin, columns) for origin, record in source.read(0, len(source))]
    if not conversations:
        raise ConversationError(f"{source.name}: holds no conversations")
    _check_columns(source.name, Counter(name for c in conversations for name in c.absent), len(conversations))
    return conversations


def _check_columns(name: str, absent: Mapping[str, int], conversations: int) -> None:
    for column, count in absent.items():
        if count == conversations:
            origin = f"{name}: " if name else ""
            raise ConversationError(
                f"{origin}no record has the column {column!r}, which columns names; is it misspelt?"
            )


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
        try:
            passes = render_conversation(conversation, self.tokenizer, counts=notes, **self.template_options)
        except RecursionError as error:
            raise ConversationError(f"{conversation.origin}: {TOO_DEEP}") from error
        except NothingLeftError:
            nothing = Counter({NOTE + name: count for name, count in notes.items()})
            return None, nothing + Counter({"conversations": 1, "dropped": 1, NOTE + NOTHING_LEFT: 1}), 0
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
        counted.update(IGNORED + key for key in conversation.ignored)
        counted.update(ABSENT + name for name in conversation.absent)
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


def build_trees(conversations: Iterable[Mapping], tokenizer, *, num_proc: int | None = None, **options) -> Preparation:
    """Render conversations and merge the passes of each into its tree, in memory.

    Args:
        conversations: of `load_conversations`, or any records of the same forms, a `datasets.Dataset` too. (Keys with a null
            are taken out, at any depth; only a `Conversation` of `load_conversations` keeps those that its file had.)
        tokenizer: a Hugging Face tokenizer with a chat template.
        num_proc: processes to render with. Where processes are spawned and not forked (macOS, Windows), the calling
            script needs the usual `if __name__ == "__main__"`.
        **options: max_length, max_tokens, overlong, loss_reduction and columns of `TreeMaker`, and those of `render_passes`,
            arguments of the template among them.

    Raises:
        ConversationError: a conversation cannot be rendered, is too long, or has token ids outside the vocabulary;
            its origin is named, or its index (`conversation 11`, counted from zero). Or no record has a name in `columns`.
        ValueError: an option that is refused.
    """
    if isinstance(conversations, datasets.Dataset):
        source = HubDataset("", conversations)
    else:
        records = enumerate(conversations)
        source = InMemory(
            "", [c if isinstance(c, Conversation) else cleared(f"conversation {i}", c)[1] for i, c in records]
        )
    maker = tree_maker(tokenizer, **options)
    batches: list[pa.RecordBatch] = []
    counted = _collect(_batches(source, len(source), maker, num_proc or 1), batches.append)
    return _checked(_preparation(batches, counted), source)


def tree_maker(tokenizer, **options) -> TreeMaker:
    """A `TreeMaker` from options side by side: what it does not know is for the template."""
    known = {f.name for f in fields(TreeMaker)} - {"tokenizer", "template_options"}
    template_options = {name: value for name, value in options.items() if name not in known}
    mine = {name: value for name, value in options.items() if name in known}
    return TreeMaker(tokenizer, **mine, template_options=template_options)


def prepare(
    source: Source,
    maker: TreeMaker,
    *,
    max_samples: int | None = None,
    cache_dir: str | os.PathLike | None = None,
    num_proc: int | None = None,
    progress: bool = True,
    tell: Callable[[str], object] = print,
) -> Preparation:
    """The trees of a source, made once and kept: Arrow on disk, read by memory map.

    What is kept is found again by its content: the records, the tokenizer and its template, the options, the code that makes
    trees. A change of any of them makes other trees; of the limits on passes (`max_length`, `max_tokens`, `overlong`) only
    where a pass is longer than they allow. Of several processes that want the same, on one machine or one file system, the
    first makes it and the others wait. A template that writes today's date writes that of the preparation: it is made anew
    for another template, not for another day.

    Args:
        source: of `sources.open_source`.
        maker: makes its trees.
        max_samples: the first records only.
        cache_dir: where to keep it; by default in the cache of the `datasets` library.
        num_proc: processes to render with; by default one for each core, if there is enough to do.
        progress: show a bar.
        tell: called with a line before waiting for another process.

    Raises:
        ConversationError: as for `build_trees`; or there are no conversations.
    """
    count = min(len(source), len(source) if max_samples is None else max_samples)
    if not count:
        raise ConversationError(f"{source.name}: holds no conversations")
    folder = Path(cache_dir or Path(datasets.config.HF_DATASETS_CACHE) / "flexmask").absolute()
    folder.mkdir(parents=True, exist_ok=True)
    unlimited, limited = (
        folder / _hash([source.fingerprint, count, maker.fingerprint(limits=limits)]) for limits in (False, True)
    )
    with _lock(f"{unlimited}.lock", source, tell):
        for path in (unlimited, limited):
            found = _found(path)
            if found and (path == limited or maker.fits(found.longest_pass)):
                return _checked(found, source)
        making = Path(f"{unlimited}.making")
        shutil.rmtree(making, ignore_errors=True)  # of a run that was killed
        making.mkdir()
        try:
            counted = _write(making, source, count, maker, num_proc, progress)
        except BaseException:
            shutil.rmtree(making, ignore_errors=True)
            raise
        path = unlimited if maker.fits(counted["longest_pass"]) else limited
        os.replace(making, path)
        return _checked(_load(path), source)


@contextmanager
def _lock(path: str, source: Source, tell: Callable[[str], object]) -> Iterator[None]:
    lock = FileLock(path)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        tell(f"{source.name}: another process prepares it, waiting for it to let go of {path}")
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def _found(path: Path) -> Preparation | None:
    """What is kept there. A damaged one is removed, so that it is made anew."""
    if not path.exists():
        return None
    try:
        return _load(path)
    except (pa.ArrowException, OSError, ValueError):  # cut short by a crash or a full disk
        shutil.rmtree(path)
        return None


def _checked(preparation: Preparation, source: Source) -> Preparation:
    _check_columns(source.name, preparation.absent, preparation.conversations)
    return preparation


def _write(folder: Path, source: Source, count: int, maker: TreeMaker, num_proc: int | None, progress: bool) -> Counter:
    bar = tqdm(total=count, desc=f"preparing {source.name}", unit=" conversations", delay=2, disable=not progress)
    with pa.OSFile(str(folder / TREES), "wb") as sink, pa.ipc.new_file(sink, _SCHEMA) as writer, bar:
        counted = _collect(_batches(source, count, maker, num_proc), writer.write_batch, bar.update)
    (folder / COUNTED).write_text(json.dumps(counted))
    for name in (TREES, COUNTED):  # on the disk before the folder gets its name, else a crash could leave it half empty
        with open(folder / name, "rb+") as file:
            os.fsync(file.fileno())
    return counted


def _collect(batches: Iterable, keep: Callable[[pa.RecordBatch], None], progress: Callable = lambda n: None) -> Counter:
    """Hand on what `_batches` makes, and count it together."""
    counted = Counter(longest_pass=0, largest_token=0)
    for batch, of_batch, longest in batches:
        keep(batch)
        counted.update(of_batch)
        tokens = batch.column("input_ids").values.to_numpy()
        counted["longest_pass"] = max(counted["longest_pass"], longest)
        counted["largest_token"] = max(counted["largest_token"], int(tokens.max(initial=0)))
        progress(of_batch["conversations"])
    return counted


def _load(path: Path) -> Preparation:
    return _preparation(path / TREES, json.loads((path / COUNTED).read_text()), path=path)


def _preparation(part: Path | list[pa.RecordBatch], counted: Mapping[str, int], **more) -> Preparation:
    columns = _Columns([part])
    conversation, whole = columns.column("conversation"), columns.column("intact")
    return Preparation.of(counted, trees=Trees(columns), conversation=conversation, whole=whole, **more)


def _batches(
    source: Source, count: int, maker: TreeMaker, num_proc: int | None
) -> Iterator[tuple[pa.RecordBatch, Counter, int]]:
    """The trees of the first `count` records in order, some at a time; what was counted in them, and their longest pass. Without
    a number of processes it is one for each core, if each has a second or so to work."""
    done = 0
    if num_proc is None:
        done, began = min(PROBE, count), time.perf_counter()
        first = _batch(source, maker, range(done))
        seconds = (time.perf_counter() - began) / done * (count - done)
        num_proc = max(1, min(_cores(), int(seconds)))
        yield first
    size = max(1, min(CHUNK, -(-(count - done) // num_proc)))
    ranges = [range(start, min(start + size, count)) for start in range(done, count, size)]
    if num_proc == 1 or len(ranges) < 2:
        yield from (_batch(source, maker, indices) for indices in ranges)
        return
    with ProcessPoolExecutor(num_proc, initializer=_hand_over, initargs=(source, maker)) as pool:
        try:
            yield from pool.map(_batch_in_worker, ranges)
        except BrokenProcessPool as error:
            raise OSError(
                "a process that renders conversations was killed, perhaps for want of memory; use fewer (dataset_num_proc)"
            ) from error
        finally:
            pool.shutdown(cancel_futures=True)


def _batch(source: Source, maker: TreeMaker, indices: range) -> tuple[pa.RecordBatch, Counter, int]:
    made, counted, longest = [], Counter(), 0
    for index, record in zip(indices, source.read(indices.start, indices.stop), strict=True):
        tree, of_tree, length = maker.tree(record)
        counted.update(of_tree)
        longest = max(longest, length)
        if tree is not None:
            made.append((index, not of_tree["targets_lost"], tree))
    columns = [
        pa.array([index for index, _, _ in made], pa.int64()),
        pa.array([whole for _, whole, _ in made], pa.bool_()),
    ]
    for name, of in _LIST_TYPES.items():
        lists = [getattr(tree, name) for _, _, tree in made]
        begin = np.cumsum([0, *map(len, lists)], dtype=np.int32)
        values = np.concatenate(lists).astype(of.value_type.to_pandas_dtype()) if lists else []
        columns.append(pa.ListArray.from_arrays(pa.array(begin), pa.array(values, of.value_type)))
    return pa.RecordBatch.from_arrays(columns, schema=_SCHEMA), counted, longest


_handed_over: tuple[Source, TreeMaker]


def _hand_over(*given) -> None:
    """What each process needs, once and not with every task."""
    global _handed_over
    _handed_over = given
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # each has a core; and without a word the library warns of the fork
    threading.Thread(target=_die_with_parent, daemon=True).start()


def _die_with_parent() -> None:
    """A parent that is killed tells nobody: its workers would wait for work for ever, and keep the lock."""
    multiprocessing.parent_process().join()
    os._exit(1)


def _batch_in_worker(indices: range) -> tuple[pa.RecordBatch, Counter, int]:
    return _batch(*_handed_over, indices)


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


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
    return _hash(state)


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
    columns = ("input_ids", "loss_mask", "token_weight")
    cut = [replace(p, **{c: getattr(p, c)[:limit] for c in columns if getattr(p, c) is not None}) for p in passes]
    return [p for p in cut if _is_trained(p)]


def _is_trained(p: Pass) -> bool:
    """Whether a supervised token has a weight: where thoughts weigh nothing, a pass cut inside its thought has none."""
    token_weight = 1 if p.token_weight is None else np.asarray(p.token_weight)
    return bool(np.any(np.asarray(p.loss_mask, bool) * token_weight * p.weight))


def _hash(value) -> str:
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
    here = Path(__file__).parent
    files = [here / f"{name}.py" for name in ("messages", "sources", "tree", "data")] + [*here.glob("passes/*.py")]
    sources = [file.read_text() for file in sorted(files)]
    return _hash([sources, transformers.__version__, tokenizers.__version__])

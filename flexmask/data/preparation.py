"""Conversations of a source -> trees, prepared once and kept."""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
from datasets.utils import tqdm
from filelock import FileLock, Timeout

from ..messages import Conversation, ConversationError, read_conversation
from ..sources import HubDataset, InMemory, Source, cleared, open_source
from .columns import SCHEMA, Columns, Trees, record_batch
from .counts import Counts
from .making import TreeMaker, hash_of, tree_maker

CHUNK = 64  # conversations that a process renders at once, and trees of a record batch: some MB of chats, 100 MB of long logs
PROBE = 8  # conversations of which the time tells how many processes the others are worth
# Of a record batch in a file, at least. The system maps files in windows (64 KiB), so that of many small batches planning, which
# reads one column, would have most of the others in memory, too.
BATCH_BYTES = 2**24
TREES, COUNTED = "trees.arrow", "counted.json"  # files of a preparation


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
    absent = Counter(name for c in conversations for name in c.absent)
    check_columns(source.name, Counts(conversations=len(conversations), absent=absent))
    return conversations


def check_columns(name: str, counts: Counts) -> None:
    """Refuse a name in `columns` that no conversation of a source has.

    Raises:
        ConversationError: naming it.
    """
    for column in counts.never_found:
        origin = f"{name}: " if name else ""
        raise ConversationError(f"{origin}no record has the column {column!r}, which columns names; is it misspelt?")


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
        folder / hash_of([source.fingerprint, count, maker.fingerprint(limits=limits)]) for limits in (False, True)
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
    check_columns(source.name, preparation)
    return preparation


def _write(folder: Path, source: Source, count: int, maker: TreeMaker, num_proc: int | None, progress: bool) -> Counter:
    bar = tqdm(total=count, desc=f"preparing {source.name}", unit=" conversations", delay=2, disable=not progress)
    with pa.OSFile(str(folder / TREES), "wb") as sink, pa.ipc.new_file(sink, SCHEMA) as writer, bar:
        pending: list[pa.RecordBatch] = []

        def write() -> None:
            for batch in pa.Table.from_batches(pending, SCHEMA).combine_chunks().to_batches():
                writer.write_batch(batch)
            pending.clear()

        def keep(batch: pa.RecordBatch) -> None:
            pending.append(batch)
            if sum(batch.nbytes for batch in pending) >= BATCH_BYTES:
                write()

        counted = _collect(_batches(source, count, maker, num_proc), keep, bar.update)
        write()
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
    columns = Columns([part])
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
    conversation, intact, trees = [], [], []
    counted, longest = Counter(), 0
    for index, record in zip(indices, source.read(indices.start, indices.stop), strict=True):
        tree, of_tree, length = maker.tree(record)
        counted.update(of_tree)
        longest = max(longest, length)
        if tree is not None:
            conversation.append(index)
            intact.append(not of_tree["targets_lost"])
            trees.append(tree)
    return record_batch(conversation, intact, trees), counted, longest


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

"""Where records come from: files, hub datasets, Python. By index, so that several processes share them, or as a stream.

A file with a fault is refused with its name and line.
"""

from __future__ import annotations

import bisect
import hashlib
import json
import os
import random
import re
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property, partial
from itertools import accumulate, islice

import datasets
import pyarrow.parquet

from .messages import ConversationError, without_nulls

SUFFIXES = (".jsonl", ".json", ".parquet")

_HUB_NAME = re.compile(r"[\w-]+(/[\w.-]+)?")  # a bare name with a dot is taken for a file
_STRING_OR_CONSTANT = re.compile(r'"(?:\\.|[^"\\])*"|-?Infinity|NaN')

Record = tuple[str, object]  # its origin, for errors, and what stands there


class Source:
    """Records of one place, each with its origin.

    Attributes:
        name: as it was given.
    """

    name: str

    def __len__(self) -> int:
        raise NotImplementedError

    def read(self, start: int, stop: int) -> Iterator[Record]:
        """The records from `start` up to `stop`, or to the end."""
        raise NotImplementedError

    def stream(self) -> Iterator[Callable[[], Record]]:
        """All of them, without counting them first, each as a function: who leaves a record out need not parse it."""
        return (partial(_itself, record) for record in self.read(0, len(self)))

    @property
    def fingerprint(self) -> str:
        """The same for the same content, another for any other."""
        raise NotImplementedError


def open_source(name: str, split: str | None = None, config: str | None = None, streaming: bool = False) -> Source:
    """The records of a file or of a dataset of the Hugging Face hub.

    Args:
        name: a `.jsonl` file (one object a line, blank lines allowed), a `.json` file (a list of objects, or lines of
            them), a `.parquet` file, or the name of a hub dataset.
        split, config: which split ("train" if None), and which configuration (subset), of a hub dataset; None for a file.
        streaming: a hub dataset is not downloaded ahead, and its records can only be had by `stream`.

    Raises:
        ConversationError: there is no such thing, or it has no such split or configuration.
    """
    name = os.fspath(name)
    suffix = os.path.splitext(name)[1].lower()
    if suffix in SUFFIXES:
        if not os.path.isfile(name):
            raise ConversationError(f"{name}: there is no such file")
        for what, given in (("split", split), ("configuration", config)):
            if given is not None:
                raise ConversationError(f"{name}: is a file, which has no {what} {given!r}; leave it out")
        if suffix == ".parquet":
            return ParquetFile(name)
        return JsonLines(name) if suffix == ".jsonl" or _holds_lines(name) else JsonList(name)
    if os.path.isfile(name) or not _HUB_NAME.fullmatch(name):
        raise ConversationError(f"{name}: expected a .jsonl, .json or .parquet file, or the name of a hub dataset")
    split = "train" if split is None else split
    try:
        return HubDataset(name, datasets.load_dataset(name, config, split=split, streaming=streaming))
    except Exception as error:  # the library raises many kinds: no such dataset, no such split, no network, …
        which = f"split {split!r}" if config is None else f"configuration {config!r}, split {split!r}"
        raise ConversationError(
            f"{name}: is no .jsonl, .json or .parquet file, and loading it as a hub dataset ({which}) failed: "
            f"{type(error).__name__}: {' '.join(str(error).split())}"
        ) from error


class JsonLines(Source):
    """A file with an object on each line, and blank ones between."""

    def __init__(self, name: str):
        self.name = name

    @cached_property
    def _index(self) -> tuple[array, array, str]:
        """Where each record begins, on which line, and the fingerprint: all from one reading."""
        digest, at, starts, numbers = hashlib.blake2b(digest_size=16), 0, array("q"), array("q")
        with open(self.name, "rb") as file:
            for number, line in enumerate(file, start=1):
                digest.update(line)
                if not line.isspace():
                    starts.append(at)
                    numbers.append(number)
                at += len(line)
        return starts, numbers, digest.hexdigest()

    def __len__(self) -> int:
        return len(self._index[0])

    def read(self, start: int, stop: int) -> Iterator[Record]:
        starts, numbers, _ = self._index
        if start < min(stop, len(starts)):
            yield from (record() for record in islice(self._lines(starts[start], numbers[start]), stop - start))

    def stream(self) -> Iterator[Callable[[], Record]]:
        return self._lines(0, 1)

    @property
    def fingerprint(self) -> str:
        return self._index[2]

    def _lines(self, at: int, first: int) -> Iterator[Callable[[], Record]]:
        with open(self.name, "rb") as file:
            file.seek(at)
            for number, line in enumerate(file, start=first):
                if not line.isspace():
                    yield partial(self._record, number, line)

    def _record(self, number: int, line: bytes) -> Record:
        return f"{self.name}:{number}", _parse(line, self.name, number)


class InMemory(Source):
    """Records that are there already. Without a name, origins are `conversation 11`."""

    def __init__(self, name: str, records: Sequence):
        self.name = name
        self.records = records

    def __len__(self) -> int:
        return len(self.records)

    def read(self, start: int, stop: int) -> Iterator[Record]:
        return _numbered(self.name, self.records[start:stop], start)

    @cached_property
    def fingerprint(self) -> str:
        try:
            return hashlib.blake2b(json.dumps(self.records).encode(), digest_size=16).hexdigest()
        except TypeError as error:
            raise ConversationError(f"{self.name}: records must be JSON to be prepared: {error}") from error


class JsonList(InMemory):
    """A file with one list of objects. It has to be parsed whole; lines are read piece by piece."""

    def __init__(self, name: str):
        self.name = name

    @cached_property
    def records(self) -> list:
        with open(self.name, "rb") as file:
            data = file.read()
        records = _parse(data, self.name, 1) if data.strip() else []
        if not isinstance(records, list):
            raise ConversationError(
                f"{self.name}: is {type(records).__name__}, expected a list of conversations, or one on each line"
            )
        return records

    @cached_property
    def fingerprint(self) -> str:
        return _digest(self.name)


class ParquetFile(Source):
    """A Parquet file, of which one row group at a time is in memory."""

    def __init__(self, name: str):
        self.name = name
        with _told(name, "cannot be read as a Parquet file"):
            groups = pyarrow.parquet.read_metadata(name)
        sizes = [groups.row_group(i).num_rows for i in range(groups.num_row_groups)]
        self._ends = list(accumulate(sizes))
        self._loaded: tuple[int, datasets.Dataset] | None = None

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def read(self, start: int, stop: int) -> Iterator[Record]:
        stop = min(stop, len(self))
        while start < stop:
            group = bisect.bisect_right(self._ends, start)
            first, end = self._ends[group - 1] if group else 0, min(stop, self._ends[group])
            rows = self._rows(group)
            yield from (cleared(_origin(self.name, i), rows[i - first]) for i in range(start, end))
            start = end

    @cached_property
    def fingerprint(self) -> str:
        return _digest(self.name)

    def _rows(self, group: int) -> datasets.Dataset:
        if self._loaded is None or self._loaded[0] != group:
            with _told(self.name, "cannot be read as a Parquet file"), pyarrow.parquet.ParquetFile(self.name) as file:
                table = file.read_row_group(group)
            # Through Dataset, which knows from the file's metadata how to decode its columns (JSON ones, say).
            self._loaded = group, datasets.Dataset(table)
        return self._loaded[1]


class HubDataset(Source):
    """A `datasets.Dataset` or `IterableDataset`. Its rows have one type per column, which fills the keys that a record lacks
    with nulls: keys with a null are removed, at any depth."""

    def __init__(self, name: str, rows: datasets.Dataset | datasets.IterableDataset):
        self.name = name
        self._dataset = rows

    def __len__(self) -> int:
        return len(self._dataset)

    def read(self, start: int, stop: int) -> Iterator[Record]:
        return (cleared(_origin(self.name, i), self._dataset[i]) for i in range(start, min(stop, len(self))))

    def stream(self) -> Iterator[Callable[[], Record]]:
        # All rows, by `iter`, which asks nobody where it runs: plain iteration of an IterableDataset inside a DataLoader worker
        # gives that worker's shards only, and a RowStream takes each worker's share itself.
        with _told(self.name, "reading it from the hub failed"):  # the network fails in many ways
            for index, batch in enumerate(self._dataset.iter(batch_size=1)):
                yield partial(cleared, _origin(self.name, index), {key: values[0] for key, values in batch.items()})

    @property
    def fingerprint(self) -> str:
        return self._dataset._fingerprint


class Interleaved:
    """Items of several iterables, mixed, in the same order whenever and wherever it is iterated.

    Without weights every item comes once, the next from any iterable that has one, each as likely: how many items they have is
    not known, so a short one ends early. With weights the iterables are drawn from in
    their proportion; one that ends begins again, until each has ended.
    """

    def __init__(self, iterables: Sequence[Iterable], weights: Sequence[float] | None = None, seed: int = 0):
        self.iterables = iterables
        self.weights = weights
        self.seed = seed

    def __iter__(self) -> Iterator:
        rng = random.Random(self.seed)
        iterators, end = [iter(items) for items in self.iterables], object()
        unfinished = list(range(len(iterators)))
        while unfinished:
            if self.weights is None:
                i = rng.choice(unfinished)
            else:
                [i] = rng.choices(range(len(iterators)), self.weights)
            item = next(iterators[i], end)
            if item is not end:
                yield item
                continue
            if i in unfinished:
                unfinished.remove(i)
            iterators[i] = iter(self.iterables[i])


def _numbered(name: str, rows: Iterable, start: int = 0) -> Iterator[Record]:
    return ((_origin(name, index), row) for index, row in enumerate(rows, start))


def _origin(name: str, index: int) -> str:
    return f"{name}: conversation {index}" if name else f"conversation {index}"


def _itself(record: Record) -> Record:
    return record


def cleared(origin: str, row) -> Record:
    """A record without the keys that hold a null.

    Raises:
        ConversationError: it is nested too deeply.
    """
    try:
        return origin, without_nulls(row)
    except ConversationError as error:
        raise ConversationError(f"{origin}: {error}") from error


@contextmanager
def _told(name: str, what: str) -> Iterator[None]:
    """Whatever a library raises while it reads, in one line with the name of what was read."""
    try:
        yield
    except ConversationError:
        raise
    except Exception as error:
        said = " ".join(str(error).split())
        raise ConversationError(f"{name}: {what}: {type(error).__name__}: {said}") from error


def _digest(name: str) -> str:
    with open(name, "rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest()


def _holds_lines(name: str) -> bool:
    """Whether the first line of a .json file is an object by itself."""
    with open(name, "rb") as file:
        line = next((line for line in file if not line.isspace()), b"")
    try:
        return line.lstrip(b"\xef\xbb\xbf \t").startswith(b"{") and isinstance(json.loads(line), dict)
    except (ValueError, RecursionError):
        return False


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

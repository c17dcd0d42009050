"""Datasets as the arguments name them -> rows to train on and to evaluate, and conversations to compare."""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial, reduce
from itertools import islice

import numpy as np
from transformers import PreTrainedConfig, PreTrainedTokenizerBase

from . import demo
from .arguments import GENERATED_DATA, DataArguments, DatasetArguments
from .data import Counts, Preparation, TreeMaker, Trees, check_columns, prepare, tree_maker
from .messages import Conversation, ConversationError, read_conversation
from .packing import Rows, RowStream, pack
from .sources import InMemory, Interleaved, Source, open_source
from .tree import TokenTree

SAMPLE = 64  # records at the beginning that are looked at before training: all that is known of a stream, or compared


def open_dataset(dataset: DatasetArguments, seed: int = 0, streaming: bool = False) -> Source:
    """Its records; of generated conversations the seed decides."""
    if dataset.name == GENERATED_DATA:
        return InMemory(GENERATED_DATA, demo.conversations(512 if dataset.split in (None, "train") else 64, seed=seed))
    return open_source(dataset.name, dataset.split, dataset.config, streaming)


def first_conversations(
    datasets: Sequence[DatasetArguments], seed: int = 0, count: int | None = None
) -> Iterator[Conversation]:
    """The first conversations of each dataset (all, without a count), read one after the other."""
    for dataset in datasets:
        for record in islice(open_dataset(dataset, seed).stream(), count):
            origin, record = record()
            yield read_conversation(record, origin, dataset.columns)


def load_data(name: str, split: str | None = None, seed: int = 0) -> list[Conversation]:
    """Conversations of a file or hub dataset, or generated ones, of which the seed decides."""
    return list(first_conversations([DatasetArguments(name, split=split)], seed))


def longest_pass(config: PreTrainedConfig, max_length: int | None) -> int | None:
    """Tokens of a pass, at most: what is asked for, or what the model takes."""
    return max_length or getattr(config.get_text_config(), "max_position_embeddings", None)


@dataclass(frozen=True)
class Part:
    """A prepared dataset, or some of its conversations.

    Attributes:
        source, maker: its records, and what made trees of them.
        prepared: all its trees.
        rows: which of them.
        weight: see `mix`.
    """

    source: Source
    maker: TreeMaker
    prepared: Preparation
    rows: np.ndarray
    weight: float | None = None

    @property
    def trees(self) -> Trees:
        return self.prepared.trees.take(self.rows)

    def whole(self) -> Iterator[Conversation]:
        """Conversations of which nothing is lost: of the first ones, and then of the others, those of several passes first, and
        the shorter before the longer, because they are compared with N passes, which takes its time."""
        rows = self.rows[self.prepared.whole[self.rows]]
        trees = self.prepared.trees
        later = np.arange(len(rows)) >= SAMPLE
        order = np.lexsort((trees.lengths[rows], trees.num_passes[rows] < 2, later))
        for index in self.prepared.conversation[rows[order]].tolist():
            [record] = self.source.read(index, index + 1)
            yield self.maker.conversation(record)


class Loader:
    """Loads datasets for one model.

    Args:
        data_args: what is wanted of them.
        options: of the template, for `render_passes`.
        config: of the model; it tells how long a pass may be.
        seed: decides what is generated, held out, and taken again.
        progress: show how far preparations are.
        tell: called with what there is to say.
    """

    def __init__(
        self,
        data_args: DataArguments,
        tokenizer: PreTrainedTokenizerBase,
        options: dict,
        config: PreTrainedConfig,
        *,
        seed: int = 0,
        progress: bool = True,
        tell: Callable[[object], None] = print,
    ):
        self.args = data_args
        self.seed = seed
        self.progress = progress
        self.tell = tell
        self.max_length = longest_pass(config, data_args.max_length)
        self._maker = partial(
            tree_maker,
            tokenizer,
            max_length=self.max_length,
            max_tokens=data_args.max_tokens,
            overlong=data_args.overlong,
            loss_reduction=data_args.loss_reduction,
            **options,
        )

    def train_and_eval(self) -> tuple[list[Part], list[Part]]:
        """The prepared datasets to train on, and those to evaluate (none, if none are asked for)."""
        train = self._parts(self.args.train_datasets(), self.seed)
        if not self.args.test_size:
            return train, self._parts(self.args.eval_datasets(), self.seed + 1)
        train, held_out = hold_out(train, self.args.test_size, self.seed)
        self.tell(f"{sum(len(part.rows) for part in held_out):,} trees are held out for evaluation")
        return train, held_out

    def eval(self) -> list[Part]:
        """Those to evaluate alone."""
        return self._parts(self.args.eval_datasets(), self.seed + 1)

    def rows(self, parts: Sequence[Part]) -> tuple[Trees, Rows]:
        """Their trees mixed, and packed.

        Raises:
            ConversationError: there are none, or none of a dataset that has a weight.
        """
        trees = mix(parts, self.seed)
        if not len(trees):
            raise ConversationError(
                f"nothing is left to train on; raise max_length (now {self.max_length}) or max_tokens (now "
                f"{self.args.max_tokens})"
            )
        if any(part.weight is not None for part in parts):
            drawn = zip(parts, numbers(parts))
            shares = (f"{part.source.name} {number / len(trees):.1%} ({number:,})" for part, number in drawn)
            self.tell(f"in an epoch {len(trees):,} trees: {', '.join(shares)}")
        rows = pack(trees, self.args.max_tokens)
        repeated = int(rows.lengths.sum() - trees.lengths.sum()) + rows.shared
        split = f"; {rows.split:,} larger trees were split, which repeats {repeated:,} tokens" if rows.split else ""
        shared = f"; conversations that begin alike share {rows.shared:,} tokens" if rows.shared else ""
        self.tell(f"{len(rows):,} rows of at most {self.args.max_tokens} tokens{split}{shared}")
        return trees, rows

    def stream(self) -> tuple[RowStream, list[TokenTree], list[Conversation]]:
        """The datasets to train on as a stream, and the trees and whole conversations among the first records of it."""
        datasets = self.args.train_datasets()
        streams, trees, whole = [], [], []
        for dataset in datasets:
            before = len(trees)
            made = TreeStream(
                open_dataset(dataset, self.seed, streaming=True),
                self._maker(columns=dataset.columns),
                self.args.max_samples,
            )
            streams.append(made)
            seen, limit = Counter(), min(SAMPLE, self.args.max_samples or SAMPLE)
            for record in islice(made.source.stream(), limit):
                tree, counted, _ = made.maker.tree(record())
                seen += counted
                if tree is not None:
                    trees.append(tree)
                    if not counted["targets_lost"]:
                        whole.append(made.maker.conversation(record()))
            self._check_columns(dataset, Counts.of(seen), is_all=seen["conversations"] < limit or limit < SAMPLE)
            if dataset.weight is not None and len(trees) == before:
                raise ConversationError(_nothing([dataset]))  # its share would be that of the others
        if not trees:
            raise ConversationError(_nothing(datasets))
        weights = None if datasets[0].weight is None else [dataset.weight for dataset in datasets]
        items = Interleaved(streams, weights, self.seed)
        return RowStream(items, self.args.max_tokens, make=operator.call), trees, whole

    def _check_columns(self, dataset: DatasetArguments, counts: Counts, is_all: bool) -> None:
        """Of a stream only the beginning is known, and what none of that has may come later."""
        if is_all:
            check_columns(dataset.name, counts)
        for name in counts.never_found:
            self.tell(
                f"{dataset.name}: none of the first {counts.conversations} records has the column {name!r}, which columns names; "
                "is it misspelt?"
            )

    def _parts(self, datasets: Sequence[DatasetArguments], seed: int) -> list[Part]:
        parts = []
        for dataset in datasets:
            source, maker = open_dataset(dataset, seed), self._maker(columns=dataset.columns)
            prepared = prepare(
                source,
                maker,
                max_samples=self.args.max_samples,
                cache_dir=self.args.dataset_cache_dir,
                num_proc=self.args.dataset_num_proc,
                progress=self.progress,
                tell=self.tell,
            )
            self.tell(f"{dataset.name}: {prepared}\nkept in {prepared.path}")
            parts.append(Part(source, maker, prepared, np.arange(len(prepared.trees)), dataset.weight))
        return parts


def _nothing(datasets: Sequence[DatasetArguments]) -> str:
    names = ", ".join(dataset.name for dataset in datasets)
    return f"{names}: among the first {SAMPLE} records there is nothing to train on"


@dataclass(frozen=True)
class TreeStream:
    """The records of a source, each as a function that makes its tree: who leaves a record out has no work with it."""

    source: Source
    maker: TreeMaker
    max_samples: int | None = None

    def __iter__(self) -> Iterator[Callable]:
        return (partial(self.maker, record) for record in islice(self.source.stream(), self.max_samples))


def hold_out(parts: Sequence[Part], test_size: float, seed: int) -> tuple[list[Part], list[Part]]:
    """Split off conversations, drawn by the seed from all: the rest, and what was drawn, each once.

    Args:
        parts: whole datasets.
        test_size: how many; below 1 a part of all.

    Raises:
        ConversationError: there are not so many.
    """
    counts = [part.prepared.conversations for part in parts]
    drawn = max(1, round(test_size * sum(counts))) if test_size < 1 else int(test_size)
    if drawn >= sum(counts):
        raise ConversationError(f"test_size is {drawn}, but there are only {sum(counts):,} conversations")
    is_drawn = np.zeros(sum(counts), bool)
    is_drawn[np.random.default_rng(seed).permutation(len(is_drawn))[:drawn]] = True
    rest, held_out = [], []
    for part, mask in zip(parts, np.split(is_drawn, np.cumsum(counts)[:-1])):
        mask = mask[part.prepared.conversation[part.rows]]
        rest.append(replace(part, rows=part.rows[~mask]))
        held_out.append(replace(part, rows=part.rows[mask], weight=None))
    return rest, held_out


def numbers(parts: Sequence[Part]) -> list[int]:
    """How many trees of each there are in an epoch, see `mix`."""
    sizes = np.array([len(part.rows) for part in parts])
    if parts[0].weight is None:
        return sizes.tolist()
    for part, size in zip(parts, sizes):
        if not size:
            raise ConversationError(
                f"{part.source.name}: nothing is left to train on, so it cannot have a weight of {part.weight}; leave it out, "
                "raise max_length or max_tokens, or hold out fewer (test_size)"
            )
    weights = np.array([part.weight for part in parts])
    return np.rint(weights * (sizes / weights).max()).astype(int).tolist()


def mix(parts: Sequence[Part], seed: int) -> Trees:
    """The trees of an epoch. Without weights each comes once. With weights, the numbers of trees are in their proportion, and
    as small as they can be with each tree in it at least once: those of a part that has too few come several times, the last
    time some of them, drawn by the seed.

    Raises:
        ConversationError: a dataset that has a weight has no trees.
    """
    trees = reduce(operator.add, (part.trees for part in parts))
    if parts[0].weight is None:
        return trees
    sizes = np.array([len(part.rows) for part in parts])
    rng, taken = np.random.default_rng(seed), []
    for size, start, count in zip(sizes, np.cumsum(sizes) - sizes, numbers(parts)):
        times, some = divmod(count, size)
        drawn = np.sort(rng.permutation(size)[:some])
        taken += [start + np.arange(size)] * times + [start + drawn]
    return trees.take(np.concatenate(taken))

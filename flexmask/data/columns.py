"""Trees as columns, in memory or mapped from files."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields
from functools import cached_property
from pathlib import Path

import numpy as np
import pyarrow as pa

from ..tree import TokenTree

LIST_TYPES = {f.name: pa.list_(pa.float32() if f.name == "pass_weights" else pa.int32()) for f in fields(TokenTree)}
SCHEMA = pa.schema(
    {"conversation": pa.int64(), "intact": pa.bool_(), "trunk_length": pa.int64(), "visible_pairs": pa.int64()}
    | LIST_TYPES
)


def record_batch(conversation: Sequence[int], intact: Sequence[bool], trees: Sequence[TokenTree]) -> pa.RecordBatch:
    """Trees as columns: of each the index of its conversation, whether nothing of that is lost, and what rows are planned by, so
    that planning reads beginnings of trees and nothing else."""
    columns = {
        "conversation": pa.array(conversation, pa.int64()),
        "intact": pa.array(intact, pa.bool_()),
        "trunk_length": pa.array([len(tree.trunk) for tree in trees], pa.int64()),
        "visible_pairs": pa.array([tree.visible_pairs for tree in trees], pa.int64()),
    }
    for name, of in LIST_TYPES.items():
        lists = [getattr(tree, name) for tree in trees]
        begin = np.cumsum([0, *map(len, lists)], dtype=np.int32)
        values = np.concatenate(lists).astype(of.value_type.to_pandas_dtype()) if lists else []
        columns[name] = pa.ListArray.from_arrays(pa.array(begin), pa.array(values, of.value_type))
    return pa.RecordBatch.from_pydict(columns, schema=SCHEMA)


class Trees(Sequence):
    """Trees as columns of Arrow record batches, in memory or mapped from files; a TokenTree is made when one is asked for.

    Attributes:
        lengths: int64, tokens of each.
        num_passes: int64, passes of each.
    """

    def __init__(self, columns: Columns, rows: np.ndarray | None = None):
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
        columns = Columns(self._columns.parts + other._columns.parts)
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


class Columns:
    """Record batches of `SCHEMA`, each part a list of them or the path of a file."""

    def __init__(self, parts: Sequence[Path | list[pa.RecordBatch]]):
        self.parts = list(parts)
        self.batches = [batch for part in self.parts for batch in (_mapped(part) if isinstance(part, Path) else part)]
        self.lengths, self.num_passes = self._sizes("input_ids"), self._sizes("pass_end")
        self._ends = np.cumsum([batch.num_rows for batch in self.batches])
        self._lists: dict[int, dict[str, tuple[np.ndarray, np.ndarray]]] = {}

    def __reduce__(self):  # what is mapped here is mapped again there
        return Columns, (self.parts,)

    def tree(self, row: int) -> TokenTree:
        return TokenTree.from_dict({name: x.copy() for name, x in self._of(row, *LIST_TYPES).items()})

    def trunk(self, row: int) -> np.ndarray:
        return self._of(row, "input_ids")["input_ids"][: self.trunk_length[row]]

    def _of(self, row: int, *names: str) -> dict[str, np.ndarray]:
        """Those lists of a tree, without a copy."""
        batch = int(np.searchsorted(self._ends, row, side="right"))
        at = row - self._ends[batch] + self.batches[batch].num_rows
        if batch not in self._lists:
            self._lists[batch] = {name: _lists(self.batches[batch], name) for name in LIST_TYPES}
        lists = ((name, *self._lists[batch][name]) for name in names)
        return {name: values[begin[at] : begin[at + 1]] for name, begin, values in lists}

    def column(self, name: str) -> np.ndarray:
        """A column that has one value for each tree."""
        none = np.empty(0, SCHEMA.field(name).type.to_pandas_dtype())
        return np.concatenate([none, *(b.column(name).to_numpy(zero_copy_only=False) for b in self.batches)])

    @cached_property
    def trunk_length(self) -> np.ndarray:
        return self.column("trunk_length")

    @cached_property
    def visible_pairs(self) -> np.ndarray:
        return self.column("visible_pairs")

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

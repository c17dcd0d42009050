"""subtree_end -> chains and runs: what convolutions, recurrences and attention without a mask need to know of a row.

A tree lies depth-first, so most tokens are children of their left neighbour. A *chain* is a stretch of the row in which all
but the first are; there is one for each leaf. A *run* is a piece of a chain between two forks, so that whatever continues
it does so at its end. Consecutive trees of one token, which is what padding looks like, count as one chain, and so see each
other: such a token has no target, and nobody may read what is computed for it.

    row      a b c d | e f | g h      f follows b, g follows c:  end[b] = 8, end[c] = 8, …
    chains   abcd      ef    gh
    runs     ab c d    ef    gh

numpy only; loops over runs, never over tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from torch import Tensor


@dataclass(frozen=True)
class Chains:
    """Chains and runs of a row, or of the rows of a batch put one after the other.

    Attributes:
        length: tokens of the row.
        start: int64[C], the first token of each chain, ascending.
        parent: int64[C], the token that it follows; -1 for a root.
        run_start: int64[R], the first token of each run, ascending.
        run_parent: int64[R], the run that it continues; -1 for a root.
        run_level: int64[R], how many runs lead to it: 0 for a root.
        alone: int64, the trees of one token, padding above all.
    """

    length: int
    start: np.ndarray
    parent: np.ndarray
    run_start: np.ndarray
    run_parent: np.ndarray
    run_level: np.ndarray
    alone: np.ndarray

    @classmethod
    def of(cls, subtree_end: np.ndarray) -> Chains:
        """Args:
        subtree_end: integer [L], of a forest in depth-first order.
        """
        end = subtree_end.astype(np.int64)
        place = np.arange(len(end))
        root = is_root(end)
        alone = root & (end == place + 1)
        follows = np.append(0, end[:-1]) > place  # the left neighbour
        follows[1:] |= alone[1:] & alone[:-1]
        start = np.flatnonzero(~follows)

        # What a chain follows, its elder siblings follow, too, the nearest of which ends where the chain begins. One that
        # is no first token of a chain itself follows its left neighbour.
        begins = np.empty(len(end) + 1, np.int64)
        begins[end[::-1]] = place[::-1]  # the first token whose subtree ends there: of equal places the last is kept
        sibling = begins[start]
        is_first = np.zeros(len(end), bool)
        is_first[start] = True
        open_ = np.flatnonzero(~root[start])
        while len(open_ := open_[is_first[sibling[open_]]]):
            sibling[open_] = begins[sibling[open_]]
        parent = np.where(root[start], -1, sibling - 1)

        run_start = np.union1d(start, parent[parent >= 0] + 1)
        before = run_start - 1
        before[np.searchsorted(run_start, start)] = parent
        run_parent = np.where(before < 0, -1, np.searchsorted(run_start, before, side="right") - 1)
        level = []
        for above in run_parent.tolist():
            level.append(level[above] + 1 if above >= 0 else 0)
        return cls(len(end), start, parent, run_start, run_parent, np.array(level, np.int64), np.flatnonzero(alone))

    @property
    def stop(self) -> np.ndarray:
        """int64[C]: one past the last token of each chain."""
        return np.append(self.start, self.length)[1:]

    @property
    def run_stop(self) -> np.ndarray:
        """int64[R]: one past the last token of each run."""
        return np.append(self.run_start, self.length)[1:]

    def paths(self) -> list[tuple[tuple[int, int], ...]]:
        """The ancestors of the first token of each chain, as ranges of places [a, b), the root first."""
        found: list[tuple[tuple[int, int], ...]] = []
        chain_of = np.searchsorted(self.start, self.parent, side="right") - 1
        for parent, above in zip(self.parent.tolist(), chain_of.tolist(), strict=True):
            found.append((*found[above], (int(self.start[above]), parent + 1)) if parent >= 0 else ())
        return found

    def ancestors(self, tokens: np.ndarray, count: int) -> np.ndarray:
        """The `count` nearest ancestors of each token, the farthest first; -1 where there are no more.

        Args:
            tokens: int64[T].
            count: of ancestors.

        Returns:
            int64[T, count].
        """
        before = np.arange(-1, self.length - 1)
        before[self.start] = self.parent
        found = [tokens]
        for _ in range(count):
            found.append(np.where(found[-1] < 0, -1, before[found[-1]]))
        return np.stack(found[:0:-1], axis=1) if count else np.empty((len(tokens), 0), np.int64)


def is_root(subtree_end: np.ndarray) -> np.ndarray:
    """bool[L], the tokens that no earlier subtree reaches."""
    reach = np.maximum.accumulate(subtree_end)
    return np.append(0, reach[:-1]) <= np.arange(len(subtree_end))


def chains(subtree_end: Tensor) -> Chains:
    """The chains of a batch, its rows put one after the other. It reads the tensor: on a GPU that waits for it.

    Args:
        subtree_end: int32 (batch, L).
    """
    rows = subtree_end.cpu().numpy().astype(np.int64)
    return Chains.of((rows + np.arange(len(rows))[:, None] * rows.shape[1]).ravel())

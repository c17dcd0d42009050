"""Which rows a rank takes, and when."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
from accelerate.data_loader import BatchSamplerShard
from torch.utils.data import Sampler


class BatchShare(BatchSamplerShard):
    """Every n-th batch, for one of n ranks. Accelerate's own share repeats the first batches where the last ones do not
    suffice for all; here the last ranks have one less, while all tell the same length, so that they take as many steps."""

    def __len__(self):
        return math.ceil(len(self.batch_sampler) / self.num_processes)

    def set_epoch(self, epoch):
        """Of a resumed epoch, too, of which the first batches are skipped: there the library tells it to nobody else."""
        sampler = getattr(self.batch_sampler, "sampler", None)
        if hasattr(sampler, "set_epoch"):
            sampler.set_epoch(epoch)


class LevelSampler(Sampler):
    """Rows in a random order, in which those that ranks take at the same time cost about the same.

    Rows that are near in a random order are sorted by their costs, cut into groups of one row for each rank, and these come in a
    random order. The same for every rank and every run of the same seed and epoch.

    Args:
        costs: (rows,), what each takes, in any unit.
        ranks: how many rows are taken at the same time.
        seed: of the order.
    """

    _NEAR = 64  # groups of which the rows are sorted together: enough to choose from, few enough to leave it to chance

    def __init__(self, costs: np.ndarray, ranks: int, seed: int):
        self.costs, self.ranks, self.seed = np.asarray(costs), ranks, seed
        self._epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self._epoch = epoch

    def __len__(self) -> int:
        return len(self.costs)

    def __iter__(self) -> Iterator[int]:
        rng = np.random.default_rng((self.seed, self._epoch))
        order = rng.permutation(len(self.costs))
        whole = len(order) // self.ranks * self.ranks
        groups = []
        for near in np.split(order[:whole], range(self._NEAR * self.ranks, whole, self._NEAR * self.ranks)):
            groups += (
                np.split(near[np.argsort(self.costs[near], kind="stable")], len(near) // self.ranks)
                if len(near)
                else []
            )
        for group in rng.permutation(len(groups)):
            yield from rng.permuted(groups[group]).tolist()
        yield from order[whole:].tolist()  # of these some ranks have none

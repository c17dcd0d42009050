"""A training step branch by branch: activations of the longest pass, not of the whole tree, and no token computed twice.

A row is cut into pieces along its forks. A piece runs forward, its keys and values are kept, and the pieces that continue it
run on them, one after the other, each forward and backward at once; what they add to the gradients of those keys and values
goes into the backward of the piece that they are of. So the activations that exist at a time are those of one path of pieces.

    row      h1 r1 h2 r2 h3 t3 r3 | t2 r2 | t1 r1
    step     h1 r1 h2               forward
                      r2 h3 t3 r3   forward, backward
                      t2 r2         forward, backward
                t1 r1               forward, backward
             h1 r1 h2               backward
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest

import numpy as np
import torch
from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from torch.nn.parallel import DistributedDataParallel

from .chains import Chains
from .collator import empty_batch, target_weight
from .integrations.hand_over import HandOver
from .integrations.transformers import check_in_parts, inner_model
from .loss import tree_loss
from .mask import BLOCK_SIZE


def backward_by_branches(
    model,
    batch: Mapping[str, Tensor],
    total_weight: float | Tensor | None = None,
    *,
    tokens_in_memory: int = 0,
    backward: Callable[[Tensor], object] = Tensor.backward,
) -> Tensor:
    """`tree_loss(model, batch, total_weight)` and its backward, with the activations of at most so many tokens at a time.

    Gradients are added to those that parameters have. Under FSDP2 the ranks agree on the pieces, since each of them gathers
    weights: all must call this together. Under DDP gradients are averaged once, at the end, by a batch of no weight.

    Args:
        model: a causal LM loaded with attn_implementation="flexmask", wrapped or not.
        batch: of the collator.
        total_weight: as for `tree_loss`.
        tokens_in_memory: of activations. Less than the longest pass has cannot be, so 0 stands for just that. Larger pieces
            take less time.
        backward: called with the loss of each piece, when it is to go backward: `accelerator.backward`, say.

    Returns:
        The loss, a scalar without a graph.

    Raises:
        TypeError: not a Hugging Face model, nor one around it.
        ValueError: the batch has more than the collator puts into it.
        NotImplementedError: a model whose layers hand on more than keys and values, or attend several times in a forward; or with
            a router's loss, which is one of the whole row.
    """
    unknown = batch.keys() - _COLUMNS
    if unknown:
        raise ValueError(
            f"the batch has {', '.join(sorted(unknown))}, of which nobody knows how to cut it; leave it out"
        )
    inner = inner_model(model)
    check_in_parts(inner.config, "tokens_in_memory", type(inner))
    row = _Row.of(batch)
    total = target_weight(batch).sum() if total_weight is None else total_weight
    step = _Step(model, row, total, backward)
    pieces = plan(row.subtree_end, tokens_in_memory)
    shape = _shape(pieces)
    if any(isinstance(m, FSDPModule) for m in model.modules()):
        shapes = [None] * torch.distributed.get_world_size()
        torch.distributed.all_gather_object(shapes, shape)
        shape = _common(shapes)
    ddp = next((m for m in model.modules() if isinstance(m, DistributedDataParallel)), None)
    if ddp is None:
        step.run(pieces, shape)
        return step.loss
    with ddp.no_sync():
        step.run(pieces, shape)
    if ddp.require_backward_grad_sync:
        backward(tree_loss(model, empty_batch(), total))
    return step.loss


# ------------------------------------------------------------------------------------------------------------- pieces


@dataclass(frozen=True, eq=False)
class Piece:
    """Tokens that run together, and what runs while they are kept.

    Attributes:
        places: int64, of its tokens in the row, ascending.
        inside: the pieces that continue it.
    """

    places: np.ndarray
    inside: list[Piece]


def plan(subtree_end: np.ndarray, tokens_in_memory: int) -> list[Piece]:
    """The pieces of a row that continue no other.

    The tokens of a piece and of those that it continues, directly or not, are at most `tokens_in_memory`, or what the longest
    pass has, if that is more. A subtree that fits into what is left is not cut, and several that fit are one piece. Of one that
    does not fit the first piece is as much of its first path, the heaviest, as leaves room for the longest pass through every
    branch. Trees of one token, padding above all, are left out: nothing is predicted there.

    Args:
        subtree_end: integer [L].
    """
    chains = Chains.of(subtree_end)
    begin, stop = chains.run_start, chains.run_stop
    length, size = stop - begin, subtree_end[begin] - begin
    below: list[list[int]] = [[] for _ in begin]
    deepest = length.copy()  # tokens of the longest path from the beginning of a run
    for run, parent in reversed(list(enumerate(chains.run_parent.tolist()))):
        if parent >= 0:
            below[parent].insert(0, run)
            deepest[parent] = max(deepest[parent], length[parent] + deepest[run])
    alone = np.isin(begin, chains.alone)
    roots = [run for run in np.flatnonzero(chains.run_parent < 0).tolist() if not alone[run]]

    def pieces(runs: list[int], room: int) -> list[Piece]:
        whole = [run for run in runs if size[run] <= room]
        found = [
            Piece(np.concatenate([np.arange(begin[r], begin[r] + size[r]) for r in sorted(of_bin)]), [])
            for of_bin in _bins(whole, size, room)
        ]
        for run in runs:
            if size[run] <= room:
                continue
            taken, tokens, others = [run], length[run], below[run]
            while below[taken[-1]]:
                following = below[taken[-1]][0]
                rest = [r for r in others if r != following] + below[following]
                if tokens + length[following] + max((deepest[r] for r in rest), default=0) > room:
                    break
                taken, tokens, others = [*taken, following], tokens + length[following], rest
            places = np.concatenate([np.arange(begin[r], stop[r]) for r in taken])
            found.append(Piece(places, pieces(others, room - tokens)))
        return found

    longest = max((int(deepest[root]) for root in roots), default=0)
    return pieces(roots, max(tokens_in_memory, longest))


def _bins(runs: list[int], size: np.ndarray, room: int) -> list[list[int]]:
    """First fit, the largest first."""
    bins: list[list[int]] = []
    free: list[int] = []
    for run in sorted(runs, key=lambda r: -size[r]):
        at = next((i for i, left in enumerate(free) if size[run] <= left), len(bins))
        if at == len(bins):
            bins.append([])
            free.append(room)
        bins[at].append(run)
        free[at] -= size[run]
    return bins


_Shape = tuple["_Shape", ...]  # of pieces: of each, that of the pieces inside


def _shape(pieces: Iterable[Piece]) -> _Shape:
    return tuple(_shape(piece.inside) for piece in pieces)


def _common(shapes: Sequence[_Shape]) -> _Shape:
    """The smallest that holds all of them."""
    return tuple(_common([of for of in at if of is not None]) for at in zip_longest(*shapes))


# --------------------------------------------------------------------------------------------------------------- step


_COLUMNS = {
    "input_ids", "position_ids", "subtree_end", "logits_to_keep", "shift_labels", "labels", "target_weight",
}  # fmt: skip


@dataclass(frozen=True)
class _Row:
    """A batch on the CPU, without its dimension of 1."""

    input_ids: np.ndarray
    position_ids: np.ndarray
    subtree_end: np.ndarray
    target_index: np.ndarray
    target_ids: np.ndarray
    target_weight: np.ndarray

    @classmethod
    def of(cls, batch: Mapping[str, Tensor]) -> _Row:
        columns = [batch[name][0] for name in ("input_ids", "position_ids", "subtree_end")]
        columns += [batch["logits_to_keep"], batch["shift_labels"][0], target_weight(batch)]
        return cls(*(x.cpu().numpy() for x in columns))

    def batch(self, own: np.ndarray, before: np.ndarray, multiple: int) -> tuple[dict[str, Tensor], int]:
        """The batch of some tokens, and how many places there are in front of `before`.

        Args:
            own: the places of those tokens.
            before: those of the tokens whose keys come before theirs, among them all their ancestors.
            multiple: of which there are queries.

        Returns:
            A batch for (1, n) tokens in which subtree_end is (1, m + n): that of the m keys before them, too. m is a multiple
            of BLOCK_SIZE.
        """
        lead, tail = -len(before) % BLOCK_SIZE, -len(own) % multiple
        places = np.concatenate([before, own])
        ends = np.searchsorted(places, self.subtree_end[places]) + lead
        first_of_tail = lead + len(places)
        ends = [np.arange(lead) + 1, ends, np.arange(first_of_tail, first_of_tail + tail) + 1]
        mine = np.flatnonzero(np.isin(self.target_index, own))
        index, ids, weight = (x[mine] for x in (self.target_index, self.target_ids, self.target_weight))
        index = np.searchsorted(own, index)
        if not len(mine):  # what goes backward is a loss, of no weight if there is none
            index, ids, weight = np.zeros(1, np.int64), np.zeros(1, np.int64), np.zeros(1, np.float32)
        batch = {
            "input_ids": np.pad(self.input_ids[own], (0, tail))[None],
            "position_ids": np.pad(self.position_ids[own], (0, tail))[None],
            "subtree_end": np.concatenate(ends).astype(np.int32)[None],
            "logits_to_keep": index,
            "shift_labels": ids[None],
            "target_weight": weight[None],
        }
        return {name: torch.from_numpy(x) for name, x in batch.items()}, lead


_QUERIES = {"cuda": BLOCK_SIZE}  # of which there are multiples: tensor cores want whole blocks


class _Step:
    """Runs pieces forward and backward, and adds up their losses."""

    def __init__(self, model, row: _Row, total: float | Tensor, backward: Callable[[Tensor], object]):
        self.model, self.row, self.total, self.backward = model, row, total, backward
        self.device = next(model.parameters()).device
        self.multiple = _QUERIES.get(self.device.type, 1)
        self.loss = torch.zeros((), device=self.device)

    def run(self, pieces: Sequence[Piece], shape: _Shape, path: tuple[tuple[Piece, HandOver], ...] = ()) -> None:
        """Args:
        shape: what all ranks run; where it has more than `pieces`, batches without weight.
        path: the pieces that these continue.
        """
        for piece, inside in zip_longest(pieces, shape):
            self._run_one(piece, inside, path)

    def _run_one(self, piece: Piece | None, inside: _Shape, path: tuple[tuple[Piece, HandOver], ...]) -> None:
        if piece is None:
            loss = tree_loss(self.model, empty_batch(), self.total)
            self.run((), inside)
            self.backward(loss)
            return
        before = np.concatenate([np.empty(0, np.int64), *(earlier.places for earlier, _ in path)])
        batch, lead = self.row.batch(piece.places, before, self.multiple)
        hand_over = HandOver([of for _, of in path], lead, kept=len(piece.places) if piece.inside else 0)
        loss = tree_loss(self.model, {**batch, "hand_over": hand_over}, self.total)
        self.loss = self.loss + loss.detach()
        hand_over.is_backward = True
        self.run(piece.inside, inside, (*path, (piece, hand_over)))
        self.backward(loss)
        hand_over.check_done()

"""Passes -> prefix tree of tokens, written depth-first, the heaviest child first.

The N passes of a conversation share prefixes. Merged into a trie, every token with the same ancestors is stored
once, and one integer per token, the end of its subtree, is the whole attention mask:

    visible(q, k)  =  k <= q < subtree_end[k]          "k is an ancestor of q, or q itself"

numpy only; nothing here loops over tokens, only over the runs of tokens between two forks.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields

import numpy as np

from .passes import Pass

LOSS_REDUCTIONS = ("token", "turn", "conversation")


@dataclass(frozen=True, eq=False)
class TokenTree:
    """A prefix tree of tokens in depth-first order; or a forest, several trees in a row.

    L tokens, M targets, P passes with S supervised tokens in all.

    Attributes:
        input_ids: int64[L], the tokens.
        position_ids: int64[L], number of ancestors of each token: its position in every pass it belongs to.
        subtree_end: int32[L], one past the last token of the subtree under each token.
        target_index: int64[M], where the hidden state that predicts a target is read: the target's parent.
        target_ids: int64[M], the token that must be predicted there.
        pass_targets: int64[S], for each supervised token of each pass, in order, the target it became.
        pass_weights: float32[S], its weight in the loss.
        pass_supervised: int64[P], how many supervised tokens each pass has.
        pass_end: int64[P], where the last token of each pass lies.
    """

    input_ids: np.ndarray
    position_ids: np.ndarray
    subtree_end: np.ndarray
    target_index: np.ndarray
    target_ids: np.ndarray
    pass_targets: np.ndarray
    pass_weights: np.ndarray
    pass_supervised: np.ndarray
    pass_end: np.ndarray

    def __len__(self) -> int:
        return len(self.input_ids)

    def __repr__(self) -> str:
        return f"TokenTree({self.num_passes} passes, {len(self)} tokens, {self.num_targets} targets)"

    @property
    def num_passes(self) -> int:
        return len(self.pass_end)

    @property
    def num_targets(self) -> int:
        return len(self.target_ids)

    @property
    def target_weight(self) -> np.ndarray:
        """float32[M], weight of each target in the loss: summed over the passes that supervise the token."""
        return np.bincount(self.pass_targets, self.pass_weights, self.num_targets).astype(np.float32)

    @property
    def pass_lengths(self) -> np.ndarray:
        """int64[P], how many tokens each pass has."""
        return self.position_ids[self.pass_end] + 1

    @property
    def trunk(self) -> np.ndarray:
        """int64: the tokens of the first path of the row, of a tree its heaviest."""
        # As long as each token is the child of the one before.
        return self.input_ids[: common_prefix_length(self.position_ids, np.arange(len(self)))]

    @property
    def pass_pairs(self) -> int:
        """Pairs (query, key) that are visible in the passes, each by itself: n (n + 1) / 2 of n tokens."""
        return int((self.pass_lengths * (self.pass_lengths + 1) // 2).sum())

    @property
    def visible_pairs(self) -> int:
        """Of a query and a key that it sees: what attention takes time for."""
        return int(self.position_ids.sum()) + len(self)

    @property
    def max_length(self) -> int:
        """Tokens of the longest path from a root to a leaf: the longest sequence the model sees."""
        return int(self.position_ids.max(initial=-1)) + 1

    @classmethod
    def from_passes(cls, passes: Iterable[Pass], *, loss_reduction: str = "token") -> TokenTree:
        """Merge passes into their prefix tree.

        Args:
            passes: any number of passes, at least one. Passes without a common first token give several roots.
            loss_reduction: what the loss is a weighted mean of. "token": of supervised tokens. "turn": of passes, each
                the mean over its tokens. "conversation": of conversations (all the passes given here are one), each
                the mean over its tokens. It is a choice of weights: the loss is always Σ weight · loss / Σ weight over
                all targets of a step, and each turn (conversation) has the same total weight.

        Raises:
            ValueError: no passes; an empty pass; a loss_mask or token_weight of another length than its input_ids; a
                negative token id; a weight that is negative or not finite; a pass that supervises its first token,
                which nothing can predict; an unknown loss_reduction.
        """
        if loss_reduction not in LOSS_REDUCTIONS:
            raise ValueError(f"loss_reduction is {loss_reduction!r}, expected one of {', '.join(LOSS_REDUCTIONS)}")
        passes = list(passes)
        if not passes:
            raise ValueError("from_passes: got no passes, expected at least one")
        sequences = [_token_array(p, i) for i, p in enumerate(passes)]
        supervised = [np.flatnonzero(np.asarray(p.loss_mask, dtype=bool)) for p in passes]
        for i, positions in enumerate(supervised):
            if len(positions) and positions[0] == 0:
                raise ValueError(
                    f"pass {i} supervises its first token, which has no context to be predicted from; "
                    "start the pass with at least one token (a BOS token, say) that is not supervised"
                )
        return cls._from_sequences(sequences, supervised, _weights(passes, supervised, loss_reduction))

    @classmethod
    def _from_sequences(
        cls, sequences: Sequence[np.ndarray], supervised: Sequence[np.ndarray], weights: np.ndarray
    ) -> TokenTree:
        """Of the tokens of each pass, the positions that it supervises, ascending, and the weights of all of these."""
        runs, paths = _prefix_tree(sequences)
        target_of = np.concatenate([path[positions] for path, positions in zip(paths, supervised, strict=True)])
        parent_of = np.concatenate([path[positions - 1] for path, positions in zip(paths, supervised)])
        # A token supervised by several passes is one target, and its weights count together.
        target_nodes, first, pass_targets = np.unique(target_of, return_index=True, return_inverse=True)

        input_ids = np.concatenate([run.tokens for run in runs])
        return cls(
            input_ids=input_ids,
            position_ids=np.concatenate([np.arange(r.depth, r.depth + len(r.tokens)) for r in runs]),
            subtree_end=np.concatenate([np.full(len(r.tokens), r.start + r.size, np.int32) for r in runs]),
            target_index=parent_of[first],
            target_ids=input_ids[target_nodes],
            pass_targets=pass_targets.astype(np.int64),
            pass_weights=weights,
            pass_supervised=np.array([len(s) for s in supervised], np.int64),
            pass_end=np.array([path[-1] for path in paths], np.int64),
        )

    def passes(self) -> list[Pass]:
        """The passes again, their weights as token weights. `from_passes` of them is this tree, if it is no forest of
        equal trees."""
        weights = np.split(self.pass_weights, self.pass_supervised.cumsum()[:-1])
        passes = []
        for path, positions, weight in zip(self.paths(), self._supervised_positions(), weights):
            loss_mask, token_weight = np.zeros(len(path), bool), np.zeros(len(path), np.float32)
            loss_mask[positions], token_weight[positions] = True, weight
            passes.append(Pass(self.input_ids[path], loss_mask, token_weight=token_weight))
        return passes

    def _supervised_positions(self) -> list[np.ndarray]:
        """For each pass the positions of its supervised tokens, int64, ascending."""
        positions = self.position_ids[self.target_index[self.pass_targets]] + 1
        return np.split(positions, self.pass_supervised.cumsum()[:-1])

    def paths(self) -> list[np.ndarray]:
        """For each pass the places of its tokens in the row, int64: its last token and the ancestors of that."""
        return [np.flatnonzero(self.subtree_end[: end + 1] > end) for end in self.pass_end]

    @classmethod
    def merge(cls, trees: Sequence[TokenTree]) -> TokenTree:
        """The passes of several trees, in their order, as one tree: tokens with the same ancestors are there once. Weights stay
        what they are, so that a target of several trees has the sum of theirs."""
        if not trees:
            raise ValueError("merge: got no trees, expected at least one")
        return cls._from_sequences(
            [tree.input_ids[path] for tree in trees for path in tree.paths()],
            [positions for tree in trees for positions in tree._supervised_positions()],
            np.concatenate([tree.pass_weights for tree in trees]),
        )

    @classmethod
    def concat(cls, trees: Sequence[TokenTree]) -> TokenTree:
        """Put trees in a row: a forest in which no tree sees another."""
        if not trees:
            raise ValueError("concat: got no trees, expected at least one")
        token_offsets = np.cumsum([0] + [len(t) for t in trees[:-1]])
        target_offsets = np.cumsum([0] + [t.num_targets for t in trees[:-1]])
        offset_of = dict.fromkeys(("subtree_end", "target_index", "pass_end"), token_offsets)
        offset_of["pass_targets"] = target_offsets
        columns = {}
        for field in fields(cls):
            parts = [getattr(t, field.name) for t in trees]
            if field.name in offset_of:
                parts = [part + part.dtype.type(o) for part, o in zip(parts, offset_of[field.name])]
            columns[field.name] = np.concatenate(parts)
        return cls(**columns)

    def per_pass(self, values) -> list:
        """Values of targets -> one array per pass, the values of its supervised tokens in order.

        Args:
            values: M values in the order of the targets, a numpy array or a torch tensor.
        """
        if len(values) != self.num_targets:
            raise ValueError(f"per_pass: got {len(values)} values, expected one per target ({self.num_targets})")
        ends = np.cumsum(self.pass_supervised)
        return [values[self.pass_targets[end - n : end]] for end, n in zip(ends, self.pass_supervised)]

    def to_dict(self) -> dict[str, np.ndarray]:
        """The tree as columns, for `datasets.map` and Arrow files. `from_dict` reads them back."""
        return {field.name: getattr(self, field.name) for field in fields(self)}

    @classmethod
    def from_dict(cls, columns: Mapping) -> TokenTree:
        """A tree from the columns of `to_dict`, in whatever sequence type a dataset returns them.

        Raises:
            ValueError: a column is missing.
        """
        missing = [name for name in _DTYPES if name not in columns]
        if missing:
            raise ValueError(f"a pre-tokenised tree lacks the columns {missing}; write it with TokenTree.to_dict()")
        return cls(**{name: np.asarray(columns[name], dtype) for name, dtype in _DTYPES.items()})


_DTYPES = {field.name: np.int64 for field in fields(TokenTree)} | {
    "subtree_end": np.int32,
    "pass_weights": np.float32,
}


class _Run:
    """A run of tokens with no fork inside: an edge of the compressed trie. The root run is empty."""

    def __init__(self, tokens: np.ndarray, depth: int):
        self.tokens = tokens
        self.depth = depth  # ancestors of the first token
        self.children: list[_Run] = []
        self.size = 0  # tokens of the subtree, this run included
        self.start = 0  # place of the first token in the row

    def split(self, at: int) -> _Run:
        """Fork this run after `at` tokens; what follows becomes its only child, and is returned."""
        rest = _Run(self.tokens[at:], self.depth + at)
        rest.children, self.children = self.children, [rest]
        self.tokens = self.tokens[:at]
        return rest

    def layout(self) -> list[_Run]:
        """Give every run its place: depth-first preorder, heaviest child first."""
        found, pending = [], [self]
        while pending:
            found.append(pending.pop())
            pending.extend(found[-1].children)
        for run in reversed(found):  # children before parents
            run.size = len(run.tokens) + sum(child.size for child in run.children)

        runs, place, pending = [], 0, [self]
        while pending:
            run = pending.pop()
            run.start = place
            place += len(run.tokens)
            runs.append(run)
            pending.extend(sorted(run.children, key=lambda child: child.size))  # taken from the end
        return runs


def _prefix_tree(sequences: list[np.ndarray]) -> tuple[list[_Run], list[np.ndarray]]:
    """The runs of the prefix tree, in the order of the row, and for each sequence the places of its tokens in the row.

    In lexicographic order, what a sequence shares with any before it, it shares with the one just before. So each is
    compared with one other, and adds one run.
    """
    order = sorted(range(len(sequences)), key=lambda i: sequences[i].astype(">i8").tobytes())
    root = _Run(np.empty(0, np.int64), depth=0)
    branch = [root]  # runs from the root to the end of the sequence before
    pieces: dict[_Run, list[_Run]] = {}  # what became of the run that a sequence added
    added = []
    before = root.tokens
    for i in order:
        ids = sequences[i]
        shared = common_prefix_length(before, ids)
        while len(branch) > 1 and branch[-1].depth >= shared:
            branch.pop()
        last = branch[-1]
        if last.depth + len(last.tokens) > shared:
            pieces[last].insert(1, last.split(shared - last.depth))
        mine: list[_Run] = []
        if len(ids) > shared:
            run = _Run(ids[shared:], shared)
            last.children.append(run)
            branch.append(run)
            mine = pieces[run] = [run]
        added.append((i, shared, mine))
        before = ids
    runs = root.layout()

    paths = [root.tokens] * len(sequences)
    path = root.tokens
    for i, shared, mine in added:
        path = np.concatenate([path[:shared], *(np.arange(r.start, r.start + len(r.tokens)) for r in mine)])
        paths[i] = path
    return runs, paths


def common_prefix_length(a: np.ndarray, b: np.ndarray) -> int:
    """How many tokens two sequences have in common before the first that differs."""
    n = min(len(a), len(b))
    if not n:
        return 0
    differ = a[:n] != b[:n]
    at = int(differ.argmax())
    return at if differ[at] else n


def _weights(passes: list[Pass], supervised: list[np.ndarray], loss_reduction: str) -> np.ndarray:
    """float32[S], the weight of every supervised token, in the order of the passes."""
    weights = []
    for i, (p, positions) in enumerate(zip(passes, supervised)):
        if p.token_weight is None:
            weight = np.ones(len(positions))
        else:
            token_weight = np.asarray(p.token_weight, np.float64)
            if token_weight.shape != (len(p.input_ids),):
                raise ValueError(f"pass {i}: token_weight has shape {token_weight.shape} for {len(p.input_ids)} tokens")
            weight = token_weight[positions]
        largest = max(weight.max(initial=0.0), 1.0) * p.weight  # 1, so that p.weight itself is looked at
        if not (0 <= largest <= np.finfo(np.float32).max and np.isfinite(weight).all() and (weight >= 0).all()):
            raise ValueError(f"pass {i}: weights must be finite in float32 and not negative; weight is {p.weight}")
        weights.append(p.weight * (weight / (weight.sum() or 1) if loss_reduction == "turn" else weight))
    weights = np.concatenate(weights)
    return (weights / (weights.sum() or 1) if loss_reduction == "conversation" else weights).astype(np.float32)


def _token_array(p: Pass, index: int) -> np.ndarray:
    ids = np.asarray(p.input_ids)
    if ids.ndim != 1 or not len(ids):
        raise ValueError(f"pass {index}: input_ids has shape {ids.shape}, expected at least one token in one dimension")
    if not np.issubdtype(ids.dtype, np.integer):
        raise ValueError(f"pass {index}: input_ids are {ids.dtype}, expected integers")
    ids = ids.astype(np.int64, copy=False)
    if len(p.loss_mask) != len(ids):
        raise ValueError(f"pass {index}: loss_mask has {len(p.loss_mask)} entries for {len(ids)} tokens")
    if ids.min() < 0:
        raise ValueError(f"pass {index}: token id {ids.min()} is negative")
    return ids

"""What a conversation becomes: figures and pictures.

`inspect_passes` counts what the tree saves against the N passes, and what the attention kernels get to do.
`draw_mask` shows the attention mask, one colour for the history and one for the answer of each turn.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from os import PathLike

import numpy as np
import torch

from .chains import is_root
from .mask import BLOCK_SIZE, block_lists, count_tiles
from .passes import Pass
from .tree import TokenTree


@dataclass(frozen=True)
class Inspection:
    """The figures of one conversation, or of a packed row. `str()` of it is a table for the terminal.

    Attributes:
        tree: the tree itself.
        block_size: queries, and keys, of a tile of the attention matrix.
        passes: (tokens, supervised tokens) of each pass.
        tiles_full: tiles in which every pair is visible: no mask is evaluated.
        tiles_partial: tiles evaluated with the mask; those on the diagonal are counted here always.
        tiles_skipped: tiles on or under the diagonal that hold no visible pair. What lies above the diagonal is not
            counted: every causal kernel skips that.
        visible_pairs: pairs (query, key) that the tree computes.
        visible_pairs_n_pass: pairs that the N passes compute, n (n + 1) / 2 for a pass of n tokens.
    """

    tree: TokenTree
    block_size: int
    passes: tuple[tuple[int, int], ...]
    tiles_full: int
    tiles_partial: int
    tiles_skipped: int
    visible_pairs: int
    visible_pairs_n_pass: int

    @property
    def num_passes(self) -> int:
        return len(self.passes)

    @property
    def num_targets(self) -> int:
        return self.tree.num_targets

    @property
    def longest_pass(self) -> int:
        return max(tokens for tokens, _ in self.passes)

    @property
    def tokens(self) -> int:
        return len(self.tree)

    @property
    def tokens_n_pass(self) -> int:
        return sum(tokens for tokens, _ in self.passes)

    @property
    def token_ratio(self) -> float:
        """Tokens of the N passes over tokens of the tree: the predicted saving in all layers but attention."""
        return self.tokens_n_pass / self.tokens

    @property
    def area_ratio(self) -> float:
        """Visible pairs of the N passes over those of the tree: the predicted saving in attention."""
        return self.visible_pairs_n_pass / self.visible_pairs

    @property
    def tiles_visited(self) -> int:
        return self.tiles_full + self.tiles_partial

    @property
    def tiles_total(self) -> int:
        """Tiles of the whole square, those above the diagonal included."""
        return (-(-self.tokens // self.block_size)) ** 2

    @property
    def processed_over_visible(self) -> float:
        """Area of the visited tiles over visible pairs: 1 is a kernel that computes nothing in vain."""
        return self.tiles_visited * self.block_size**2 / self.visible_pairs

    def __str__(self) -> str:
        lines = [f"{'pass':<16}{'tokens':>13}{'supervised':>13}"]
        lines += [f"{i:<16}{tokens:>13,}{supervised:>13,}" for i, (tokens, supervised) in enumerate(self.passes, 1)]

        lines += ["", f"{'':<16}{'N passes':>13}{'one tree':>13}{'ratio':>9}  = predicted saving in"]
        for name, n_pass, tree, ratio, meaning in (
            ("tokens", self.tokens_n_pass, self.tokens, self.token_ratio, "linear layers"),
            ("visible pairs", self.visible_pairs_n_pass, self.visible_pairs, self.area_ratio, "attention"),
        ):
            lines.append(f"{name:<16}{n_pass:>13,}{tree:>13,}{ratio:>9.2f}    {meaning}")
        supervised = sum(supervised for _, supervised in self.passes)
        lines.append(f"{'targets':<16}{supervised:>13,}{self.num_targets:>13,}")
        lines.append(f"{'longest pass':<16}{self.longest_pass:>13,}")

        lines += ["", f"{f'{self.block_size}×{self.block_size} tiles':<16}{'causal half':>13}{'whole square':>22}"]
        causal, square = self.tiles_visited + self.tiles_skipped, self.tiles_total
        for name, in_causal, in_square in (
            ("full", self.tiles_full, self.tiles_full),
            ("partial", self.tiles_partial, self.tiles_partial),
            ("skipped", self.tiles_skipped, square - self.tiles_visited),
            ("all", causal, square),
        ):
            shares = (f"{n:>13,}{n / total:>9.1%}" for n, total in ((in_causal, causal), (in_square, square)))
            lines.append(f"{name:<16}{''.join(shares)}")
        lines.append(f"{'processed area over visible area':<42}{self.processed_over_visible:>9.2f}")
        return "\n".join(lines)


def inspect_passes(passes: Sequence[Pass], *, block_size: int = BLOCK_SIZE) -> Inspection:
    """The figures of the tree that passes become.

    Args:
        passes: as `TokenTree.from_passes` takes them, whose errors it raises.
        block_size: queries, and keys, of a tile.
    """
    return inspect_tree(TokenTree.from_passes(passes), block_size=block_size)


def inspect_tree(tree: TokenTree, *, block_size: int = BLOCK_SIZE) -> Inspection:
    """The same for a tree made before, or for a packed row."""
    full, partial = count_tiles(torch.from_numpy(tree.subtree_end)[None], block_size=block_size)
    blocks = -(-len(tree) // block_size)
    return Inspection(
        tree=tree,
        block_size=block_size,
        passes=tuple(zip(tree.pass_lengths.tolist(), tree.pass_supervised.tolist())),
        tiles_full=full,
        tiles_partial=partial,
        tiles_skipped=blocks * (blocks + 1) // 2 - full - partial,
        visible_pairs=tree.visible_pairs,
        visible_pairs_n_pass=tree.pass_pairs,
    )


def branch_of(subtree_end: np.ndarray) -> np.ndarray:
    """Which branch each token is on.

    Args:
        subtree_end: int32[L], of a tree or a forest.

    Returns:
        int64[L]: 0 on the trunk of each tree (its heaviest path, from the root to a leaf), 1, 2, … on the branches in
        the order of the row. A branch is again a heaviest path, from its fork to a leaf: what forks off it is another.
    """
    first, is_trunk = _paths(subtree_end)
    number = np.where(is_trunk, 0, np.cumsum(~is_trunk))
    return np.repeat(number, np.diff(first, append=len(subtree_end)))


def turn_of(tree: TokenTree) -> np.ndarray:
    """Whose answer each token is.

    Returns:
        int64[L]: 0 for context, which nothing supervises; otherwise the number, among the passes of its tree that
        supervise anything (1, 2, …), of the first pass that supervises the token.
    """
    turn, seen = np.zeros(len(tree), np.int64), Counter()
    tree_number = np.cumsum(is_root(tree.subtree_end))
    for places in tree.per_pass(_target_places(tree)):
        if len(places):
            number = int(tree_number[places[0]])
            seen[number] += 1
            turn[places[turn[places] == 0]] = seen[number]
    return turn


def _paths(subtree_end: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The heaviest paths: int64[B], where each begins, and bool[B], which are trunks.

    In preorder with the heaviest child first, the token after one that is no leaf is its heaviest child: so a path is
    what lies between two leaves, and there is one for each leaf.
    """
    after_leaf = 1 + np.flatnonzero(subtree_end[:-1] == np.arange(1, len(subtree_end)))
    first = np.append(0, after_leaf)
    return first, is_root(subtree_end)[first]


def _target_places(tree: TokenTree) -> np.ndarray:
    """int64[M], where each target lies in the row: the child of `target_index` that holds `target_ids`."""
    place = tree.target_index + 1
    while (other := tree.input_ids[place] != tree.target_ids).any():
        place[other] = tree.subtree_end[place[other]]  # the next child of the same parent
    return place


def draw_mask(
    tree: TokenTree,
    path: str | PathLike,
    *,
    title: str | None = None,
    labels: Sequence[str] | None = None,
    max_pixels: int = 1200,
) -> None:
    """Write a PNG of the attention mask: queries downwards, keys to the right, a pair in colour if it is visible.

    The history has one colour, the answer of each turn another, pale where it reads what came before it. The strips on
    the left and on top are the tokens of the row; the names on the right tell trunk and branches.

    Args:
        tree: a tree, or a packed row.
        path: the file to write.
        title: by default the number of tokens, with the tree and without.
        labels: a name for each of the L tokens; runs of equal names are written on the strips. By default the numbers
            of the turns.
        max_pixels: a longer row is sampled at so many tokens, so that nothing of size L×L is made.

    Raises:
        ValueError: not one label per token.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    length, turn = len(tree), turn_of(tree)
    if labels is None:
        labels = [str(t) if t else "" for t in turn.tolist()]
    if len(labels) != length:
        raise ValueError(f"draw_mask: got {len(labels)} labels, expected one per token ({length})")
    if title is None:
        passes = "1 pass" if tree.num_passes == 1 else f"{tree.num_passes} passes"
        title = f"{passes} in one sequence: {length:,} tokens instead of {tree.pass_lengths.sum():,}"
    own, pale = _colours(int(turn.max()))
    sample = _sample(length, max_pixels)

    figure = Figure(figsize=(_WIDTH, _HEIGHT), dpi=150)
    FigureCanvasAgg(figure)
    axes = _add_axes(figure, _LEFT, _TOP, _SIDE, _SIDE)
    pixels = _pixels(tree, turn, own, pale, sample)
    axes.imshow(pixels, extent=(0, length, length, 0), interpolation="nearest", aspect="auto")
    tiles = _draw_tiles(axes, tree)
    axes.set(xlabel="key token: what is read", ylabel="query token: who reads")
    axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.yaxis.set_major_formatter("{x:,.0f}")
    axes.tick_params(length=0, labelcolor="0.3")
    axes.tick_params(axis="y", pad=26)  # the strip stands between
    axes.spines[:].set_color("0.6")
    _draw_strips(figure, axes, own[turn[sample]], labels)
    _draw_path_names(axes, tree, turn, own)
    _draw_legend(axes, own, pale, tiles)
    figure.text((_LEFT + _SIDE / 2) / _WIDTH, 1 - 0.3 / _HEIGHT, title, ha="center", va="center", fontsize=14)
    figure.savefig(path, format="png")


# Of the picture, in inches. At 150 dots per inch the mask is 1200 pixels wide: as many as there are tokens drawn.
_WIDTH, _HEIGHT, _LEFT, _TOP, _SIDE, _STRIP, _GAP = 10.35, 9.6, 1.15, 0.9, 8.0, 0.24, 0.04
_HISTORY = "#7c8797"
_EARLY_TO_LATE = ("#3d5a98", "#2b8c9b", "#4c9f62", "#d9a02b", "#d1643a", "#b8405a", "#86356f")


def _sample(length: int, max_pixels: int) -> np.ndarray:
    """int64[n], the tokens drawn: all of them, or `max_pixels` evenly spaced."""
    pixels = min(length, max_pixels)
    return np.arange(pixels) * length // pixels


def _pixels(tree: TokenTree, turn: np.ndarray, own: np.ndarray, pale: np.ndarray, sample: np.ndarray) -> np.ndarray:
    """uint8 (n, n, 3): the mask among the sampled tokens, queries down, keys to the right. White is invisible."""
    query, key = sample[:, None], sample[None, :]
    visible = (key <= query) & (query < tree.subtree_end[key])
    palette = np.uint8(255 * np.concatenate([own, pale, np.ones((1, 3))]))
    colour = np.where(turn[query] == turn[key], turn[query], turn[query] + len(own))
    return palette[np.where(visible, colour, len(palette) - 1)]


def _colours(turns: int) -> tuple[np.ndarray, np.ndarray]:
    """float32 (turns + 1, 3), the history, then the turns from early to late; and a pale shade of each turn."""
    from matplotlib.colors import LinearSegmentedColormap, to_rgb

    answers = LinearSegmentedColormap.from_list("turns", _EARLY_TO_LATE)(np.linspace(0, 1, turns))
    own = np.concatenate([[to_rgb(_HISTORY)], answers[:, :3]]).astype(np.float32)
    pale = 1 - (1 - own) * np.float32(0.4)
    pale[0] = own[0]
    return own, pale


def _add_axes(figure, left: float, top: float, width: float, height: float, **shared):
    """Axes at a place given in inches from the upper left corner."""
    box = (left / _WIDTH, 1 - (top + height) / _HEIGHT, width / _WIDTH, height / _HEIGHT)
    return figure.add_axes(box, **shared)


def _draw_tiles(axes, tree: TokenTree) -> bool:
    """Outline the tiles that the kernels visit. Returns False, and draws none, where they are too small to see."""
    from matplotlib.collections import PatchCollection
    from matplotlib.patches import Rectangle

    if len(tree) > 40 * BLOCK_SIZE:
        return False
    lists = block_lists(torch.from_numpy(tree.subtree_end)[None])
    tiles = [
        Rectangle((k * BLOCK_SIZE, q * BLOCK_SIZE), BLOCK_SIZE, BLOCK_SIZE)
        for num, indices in ((lists.kv_num, lists.kv_indices), (lists.full_kv_num, lists.full_kv_indices))
        for q, n in enumerate(num[0, 0].tolist())
        for k in indices[0, 0, q, :n].tolist()
    ]
    axes.add_collection(PatchCollection(tiles, facecolor="none", edgecolor="0.25", linewidth=0.4, alpha=0.5))
    return True


def _draw_strips(figure, axes, strip: np.ndarray, labels: Sequence[str]) -> None:
    """The tokens of the row in their colours, float32 (n, 3), and with their labels: on the left and on top."""
    length, away = len(labels), _STRIP + _GAP
    left = _add_axes(figure, _LEFT - away, _TOP, _STRIP, _SIDE, sharey=axes)
    top = _add_axes(figure, _LEFT, _TOP - away, _SIDE, _STRIP, sharex=axes)
    left.imshow(strip[:, None], extent=(0, 1, length, 0), interpolation="nearest", aspect="auto")
    top.imshow(strip[None, :], extent=(0, length, 1, 0), interpolation="nearest", aspect="auto")
    left.axis("off")
    top.axis("off")

    changes = 1 + np.flatnonzero(np.asarray(labels[1:]) != np.asarray(labels[:-1]))
    for start, end in itertools.pairwise([0, *changes.tolist(), length]):
        if start and len(changes) < 100:
            left.axhline(start, color="white", linewidth=0.8)
            top.axvline(start, color="white", linewidth=0.8)
        middle, label = (start + end) / 2, labels[start]
        if end - start < 0.01 * length * max(2, len(label)):
            continue  # no room for the text
        style = {"color": "white", "ha": "center", "va": "center", "fontsize": 9, "weight": "bold"}
        left.text(0.5, middle, label, rotation=90 if len(label) > 3 else 0, **style)
        top.text(middle, 0.5, label, **style)


def _draw_path_names(axes, tree: TokenTree, turn: np.ndarray, own: np.ndarray) -> None:
    """On the right: which rows are the trunk and which a branch; in a forest, which are one tree."""
    length = len(tree)
    first, is_trunk = _paths(tree.subtree_end)
    trees = int(is_trunk.sum())
    if trees > 1:
        first = first[is_trunk]
    for i, (start, end) in enumerate(zip(first.tolist(), [*first[1:].tolist(), length])):
        if end - start < 0.02 * length:
            continue  # no room for the text
        plain = trees > 1 or is_trunk[i] or not turn[end - 1]
        colour = "0.35" if plain else own[turn[end - 1]]
        name = f"tree {i + 1}" if trees > 1 else "trunk" if is_trunk[i] else "branch"
        rows = [start + 0.002 * length, end - 0.002 * length]
        axes.plot([1.012 * length] * 2, rows, color=colour, linewidth=3, solid_capstyle="butt", clip_on=False)
        axes.text(1.024 * length, (start + end) / 2, name, color=colour, va="center", fontsize=11)
    axes.set(xlim=(0, length), ylim=(length, 0))


def _draw_legend(axes, own: np.ndarray, pale: np.ndarray, tiles: bool) -> None:
    from matplotlib.legend_handler import HandlerTuple
    from matplotlib.patches import Patch

    entries = {"history: context, not trained": (Patch(color=own[0]),)}
    turns = len(own) - 1
    if turns:
        some = np.linspace(1, turns, min(turns, 6)).astype(int)
        answers = "answer of turn 1" if turns == 1 else f"answers of turns 1 to {turns}"
        entries[f"{answers}: trained"] = tuple(Patch(color=own[t]) for t in some)
        entries["… reading what came before"] = tuple(Patch(color=pale[t]) for t in some)
    entries["not visible"] = (Patch(facecolor="white", edgecolor="0.7"),)
    if tiles:
        entries[f"tile of {BLOCK_SIZE}×{BLOCK_SIZE} tokens, computed"] = (Patch(facecolor="none", edgecolor="0.25"),)
    axes.legend(
        entries.values(),
        entries.keys(),
        handler_map={tuple: HandlerTuple(ndivide=None, pad=0)},
        loc="upper right",
        frameon=False,
        fontsize=11,
        handlelength=3.2,
        borderpad=0.8,
        labelspacing=0.6,
    )

import time
import tracemalloc

import matplotlib.image
import numpy as np
import pytest
from matplotlib.figure import Figure
from reference import conversation_passes, random_passes

from flexmask import Pass, TokenTree
from flexmask.inspect import (
    _colours,
    _draw_tiles,
    _pixels,
    _sample,
    branch_of,
    draw_mask,
    inspect_passes,
    inspect_tree,
    turn_of,
)


def prefixes(tree):
    """For every token of the row the tokens from its root to it, from depths only: subtree_end is not read."""
    path, found = [], []
    for token, depth in zip(tree.input_ids.tolist(), tree.position_ids.tolist()):
        path = [*path[:depth], token]
        found.append(tuple(path))
    return found


def dense_mask(passes, tree):
    """bool (L, L): is k an ancestor of q, or q itself? Told from the prefixes of the passes, each stored once."""
    rows = prefixes(tree)
    assert sorted(rows) == sorted({tuple(p.input_ids[: n + 1]) for p in passes for n in range(len(p.input_ids))})
    return np.array([[q[: len(k)] == k for k in rows] for q in rows])


@pytest.mark.parametrize("seed", range(6))
def test_figures_are_those_of_the_dense_mask(seed):
    rng = np.random.default_rng(seed)
    passes = random_passes(rng, int(rng.integers(1, 9)), max_length=30)
    found = inspect_passes(passes, block_size=8)
    visible = dense_mask(passes, found.tree)
    length = len(visible)

    full = partial = skipped = 0
    for q in range(0, length, 8):
        for k in range(0, q + 1, 8):
            tile = visible[q : q + 8, k : k + 8]
            full += bool(k < q and tile.all())
            partial += bool(k == q or (tile.any() and not tile.all()))
            skipped += not tile.any()
    assert (found.tiles_full, found.tiles_partial, found.tiles_skipped) == (full, partial, skipped)
    assert found.tiles_visited + found.tiles_skipped == sum(range(-(-length // 8) + 1))
    assert found.tiles_total == (-(-length // 8)) ** 2

    causal = [np.tri(len(p.input_ids), dtype=bool) for p in passes]
    assert found.visible_pairs == visible.sum()
    assert found.visible_pairs_n_pass == sum(m.sum() for m in causal)
    assert found.area_ratio == sum(m.sum() for m in causal) / visible.sum()
    assert found.processed_over_visible == (full + partial) * 64 / visible.sum()

    assert found.passes == tuple((len(p.input_ids), sum(p.loss_mask)) for p in passes)
    assert found.num_passes == len(passes)
    assert found.tokens == length and found.tokens_n_pass == sum(map(len, causal))
    assert found.token_ratio == sum(map(len, causal)) / length
    assert found.longest_pass == max(map(len, causal))
    targets = {tuple(p.input_ids[: n + 1]) for p in passes for n in np.flatnonzero(p.loss_mask)}
    assert found.num_targets == len(targets)


def test_figures_of_a_packed_row_are_sums():
    rng = np.random.default_rng(0)
    trees = [TokenTree.from_passes(conversation_passes(rng, n, 20, 50, 30)) for n in (1, 4)]
    one, two, both = map(inspect_tree, [*trees, TokenTree.concat(trees)])
    assert both.visible_pairs == one.visible_pairs + two.visible_pairs
    assert both.visible_pairs_n_pass == one.visible_pairs_n_pass + two.visible_pairs_n_pass
    assert both.passes == one.passes + two.passes and both.longest_pass == two.longest_pass
    assert one.token_ratio == one.area_ratio == 1, "one pass is its own tree"


def test_table():
    text = str(inspect_passes(conversation_passes(np.random.default_rng(0), 3, 100, 400, 200)))
    assert "\x1b" not in text and max(map(len, text.splitlines())) <= 80
    rows = {line[:16].strip(): line[16:].split() for line in text.splitlines()}
    # passes of 700, 1000, 1300 tokens; the tree has 3 h, 3 t and 5 r
    assert [rows[n] for n in "123"] == [["700", "600"], ["1,000", "600"], ["1,300", "600"]]
    assert rows["tokens"][:3] == ["3,000", "2,500", "1.20"] and "linear" in rows["tokens"]
    # 1300 tokens of the last pass, and branches of 600 behind 400 and behind 100
    assert rows["visible pairs"][:3] == ["1,591,500", "1,506,250", "1.06"] and "attention" in rows["visible pairs"]
    assert rows["targets"] == ["1,800", "1,800"]
    assert rows["longest pass"] == ["1,300"]
    assert rows["all"] == ["210", "100.0%", "400", "100.0%"]
    assert int(rows["skipped"][0]) == int(rows["skipped"][2]) - 190


def by_hand():
    """Two trees. Tokens: the number's tens tell the part; `|` in the comments is a fork.

    First tree, heaviest child first:  h1 r1 h2 r2 h3 t3 | t2 | t1, with t1 the first pass.
    Second tree: a thought so heavy that it is on the trunk, h1 t1 | r1 h2 | t2 r2 h3 …, and the history on branches.
    """
    first = [
        Pass([1, 2, 11, 12], [0, 0, 1, 1]),
        Pass([1, 2, 3, 4, 21], [0, 0, 0, 0, 1]),
        Pass([1, 2, 3, 4, 5, 6, 31], [0, 0, 0, 0, 0, 0, 1]),
    ]
    second = [
        Pass([51, *range(61, 71)], [0] + [1] * 10),
        Pass([51, 52, 53, 71], [0, 0, 0, 1]),
        Pass([51, 52, 53, 54, 55, 81], [0, 0, 0, 0, 0, 1]),
    ]
    return TokenTree.concat([TokenTree.from_passes(first), TokenTree.from_passes(second)])


def test_trunk_and_branches_by_hand():
    tree = by_hand()
    ids = [1, 2, 3, 4, 5, 6, 31, 21, 11, 12, 51, *range(61, 71), 52, 53, 54, 55, 81, 71]
    branch = [0, 0, 0, 0, 0, 0, 0, 1, 2, 2, 0, *[0] * 10, 3, 3, 3, 3, 3, 4]
    turn = [0, 0, 0, 0, 0, 0, 3, 2, 1, 1, 0, *[1] * 10, 0, 0, 0, 0, 3, 2]
    assert tree.input_ids.tolist() == ids
    assert branch_of(tree.subtree_end).tolist() == branch
    assert turn_of(tree).tolist() == turn


@pytest.mark.parametrize("seed", range(6))
def test_labels_of_random_trees(seed):
    passes = random_passes(np.random.default_rng(seed), 8, max_length=20)
    tree = TokenTree.from_passes(passes)
    rows = prefixes(tree)
    branch, turn = branch_of(tree.subtree_end), turn_of(tree)

    # A path is given up where the next token is no child of the last: its prefix does not go on.
    expected = np.cumsum([q > 0 and rows[q][:-1] != rows[q - 1] for q in range(len(rows))])
    assert branch.tolist() == expected.tolist()

    trained = [p for p in passes if any(p.loss_mask)]
    for k, prefix in enumerate(rows):
        by = [i for i, p in enumerate(trained, 1) if tuple(p.input_ids[: len(prefix)]) == prefix]
        supervising = [i for i in by if trained[i - 1].loss_mask[len(prefix) - 1]]
        assert turn[k] == min(supervising, default=0)


def test_small_picture_is_the_mask():
    rng = np.random.default_rng(1)
    passes = random_passes(rng, 5, max_length=20)
    tree = TokenTree.from_passes(passes)
    own, pale = _colours(5)
    turn = turn_of(tree)
    pixels = _pixels(tree, turn, own, pale, _sample(len(tree), 1200))
    visible = dense_mask(passes, tree)
    for q in range(len(tree)):
        for k in range(len(tree)):
            shade = own if turn[q] == turn[k] else pale
            assert (pixels[q, k] == np.uint8(255 * shade[turn[q]] if visible[q, k] else 255)).all()
    half = _sample(len(tree), len(tree) // 2)
    assert (np.diff(half) >= 2).all() and half[-1] < len(tree)
    assert (_pixels(tree, turn, own, pale, half) == pixels[np.ix_(half, half)]).all()


def test_draw_small_tree(tmp_path):
    passes = conversation_passes(np.random.default_rng(0), 3, 40, 90, 50)
    tree = TokenTree.from_passes(passes)
    draw_mask(tree, tmp_path / "mask.png")
    draw_mask(tree, str(tmp_path / "named.png"), title="named", labels=["part"] * len(tree))
    plain, named = (matplotlib.image.imread(tmp_path / name) for name in ("mask.png", "named.png"))
    assert plain.shape == named.shape and (plain != named).any()
    assert all(800 < side < 2000 for side in plain.shape[:2])
    assert (tmp_path / "mask.png").stat().st_size < 300_000
    # The history and the three answers are there, in their colours.
    for colour in _colours(3)[0]:
        assert (np.abs(plain[..., :3] - colour).max(-1) < 0.01).mean() > 0.005
    with pytest.raises(ValueError, match=f"2 labels.*{len(tree)}"):
        draw_mask(tree, tmp_path / "wrong.png", labels=["a", "b"])


def test_outlined_tiles_are_those_visited():
    tree = TokenTree.from_passes(conversation_passes(np.random.default_rng(0), 3, 100, 400, 200))
    axes = Figure().add_subplot()
    assert _draw_tiles(axes, tree)
    corners = [path.vertices.min(0) for path in axes.collections[0].get_paths()]
    assert len(corners) == inspect_tree(tree).tiles_visited
    visible = np.zeros((len(tree), len(tree)), bool)
    for k, end in enumerate(tree.subtree_end):
        visible[k:end, k] = True
    for k, q in np.array(corners, int).tolist():
        assert k % 128 == q % 128 == 0 and visible[q : q + 128, k : k + 128].any()
    assert not _draw_tiles(axes, TokenTree.concat([tree] * 3)), "too small to see"


@pytest.mark.parametrize(
    "passes",
    [
        [Pass([1, 2], [False, True])],
        [Pass([1], [False])],
        [Pass([1, 2, 3], [False] * 3), Pass([1, 4], [False] * 2)],
        [Pass([1, 2], [False, True]), Pass([3, 4], [False, True])],
    ],
    ids=["one token to train", "one token", "nothing to train", "two roots"],
)
def test_draw_and_inspect_the_smallest(passes, tmp_path):
    draw_mask(TokenTree.from_passes(passes), tmp_path / "mask.png")
    assert (tmp_path / "mask.png").stat().st_size
    assert inspect_passes(passes).tiles_partial == 1 and str(inspect_passes(passes))


def test_large_rows_are_drawn_in_little_time_and_memory(tmp_path):
    """Sampling must come before the mask: 20,000² booleans alone would be 400 MB."""
    rng = np.random.default_rng(0)
    trees = [TokenTree.from_passes(conversation_passes(rng, n, 60, 300, 150)) for n in (12, 8, 6, 12)]
    row = TokenTree.concat(trees)
    assert len(row) > 20_000
    draw_mask(trees[0], tmp_path / "warm.png")  # imports, fonts
    start = time.perf_counter()
    draw_mask(row, tmp_path / "mask.png")
    assert time.perf_counter() - start < 5
    tracemalloc.start()
    draw_mask(row, tmp_path / "mask.png")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 300e6  # most of it is matplotlib at 1200 × 1200 pixels, whatever the row
    assert all(800 < side < 2000 for side in matplotlib.image.imread(tmp_path / "mask.png").shape[:2])

"""What a file of conversations becomes, as one page of HTML that needs no network, and in colour in the terminal."""

from __future__ import annotations

import itertools
import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from importlib.resources import files
from pathlib import Path

import numpy as np

from .chains import Chains
from .data import Counts, TreeMaker
from .inspect import inspect_tree
from .mask import BLOCK_SIZE
from .messages import Conversation, ConversationError, reasoning_of, text_of
from .passes import Pass, render_conversation
from .sources import Record, Source
from .tree import TokenTree

# What a token of a pass is.
CONTENT, TEMPLATE, TRAINED, END = range(4)
KINDS = ("context", "template text", "trained", "end of turn, trained")


@dataclass(frozen=True)
class Shown:
    """A conversation, made ready to be looked at.

    Attributes:
        conversation: what was rendered.
        passes: its passes.
        tree: what they become.
        paths: of each pass the places of its tokens in the row, int64.
        texts: of each token of the row what it adds to the text; of a character of several tokens the last one has it.
        kinds: of each pass, for each of its tokens, one of the above: uint8.
        unseen: see `unseen_by_inference`; None if not every assistant message has a pass, because then not all is known.
        notes: what rendering counted, in words.
    """

    conversation: Conversation
    passes: list[Pass]
    tree: TokenTree
    paths: list[np.ndarray]
    texts: list[str]
    kinds: list[np.ndarray]
    unseen: list[list[tuple[int, np.ndarray]]] | None
    notes: Counter

    @classmethod
    def of(cls, record: Record, maker: TreeMaker) -> Shown:
        """A record, rendered as the maker says.

        Raises:
            ConversationError: it cannot be read or rendered.
        """
        conversation, tokenizer, notes = maker.conversation(record), maker.tokenizer, Counter()
        passes = render_conversation(conversation, tokenizer, counts=notes, **maker.template_options)
        tree = TokenTree.from_passes(passes, loss_reduction=maker.loss_reduction)
        paths, texts = tree.paths(), [""] * len(tree)
        kinds = []
        for path, p in zip(paths, passes):
            pieces = token_texts(tree.input_ids[path].tolist(), tokenizer)
            for place, text in zip(path.tolist(), pieces):
                texts[place] = text
            kinds.append(_kinds(pieces, weights_of(p) > 0, conversation))
        answers = sum(message["role"] == "assistant" for message in conversation["messages"])
        unseen = unseen_by_inference(tree, paths) if len(passes) == answers else None
        return cls(conversation, passes, tree, paths, texts, kinds, unseen, notes)


def weights_of(p: Pass) -> np.ndarray:
    """float32 (tokens,): what each token counts in the loss; 0 where it is not trained."""
    of_token = np.ones(len(p.input_ids)) if p.token_weight is None else np.asarray(p.token_weight)
    return np.where(p.loss_mask, np.float32(p.weight) * of_token, 0).astype(np.float32)


def token_texts(ids: Sequence[int], tokenizer) -> list[str]:
    """What each token adds to the text of those before it. Together they are the text."""
    decode = _decoder(tokenizer)
    found, anchor, waiting = [], (), ()
    for token in ids:
        waiting = (*waiting, token)
        text = decode(anchor + waiting)[len(decode(anchor)) :]
        if text.endswith("\N{REPLACEMENT CHARACTER}") and len(waiting) < 4:  # the first bytes of a character
            found.append("")
            continue
        found.append(text)
        anchor, waiting = (token,), ()
    return found


def _decoder(tokenizer):
    decode = partial(tokenizer.decode, skip_special_tokens=False, clean_up_tokenization_spaces=False)
    return lru_cache(maxsize=65536)(lambda ids: decode(list(ids)) if ids else "")


def _kinds(texts: Sequence[str], trained: np.ndarray, conversation: Conversation) -> np.ndarray:
    """Context that no message holds word by word is called template text: headers, tool descriptions, calls."""
    starts = np.cumsum([0, *map(len, texts)])
    text, said = "".join(texts), np.zeros(int(starts[-1]), bool)
    at = 0
    for message in conversation["messages"]:
        content, reasoning = text_of(message).strip(), reasoning_of(message).strip()
        begin = text.find(content, at) if content else at
        if begin < 0:
            continue
        thought = text.find(reasoning, at, begin if content else None) if reasoning else -1
        if thought >= 0:
            said[thought : thought + len(reasoning)] = True
            at = thought + len(reasoning)
        if content:
            at = begin + len(content)
            said[begin:at] = True
    kinds = np.where([bool(said[a:b].any()) for a, b in itertools.pairwise(starts)], CONTENT, TEMPLATE)
    kinds[trained] = TRAINED
    ends = trained & ~np.append(trained[1:], False)
    kinds[ends] = END
    return kinds.astype(np.uint8)


def unseen_by_inference(tree: TokenTree, paths: Sequence[np.ndarray]) -> list[list[tuple[int, np.ndarray]]]:
    """What one sequence of all turns, each with its reasoning, has in the context of a turn and inference has not.

    Returns:
        For each pass, in order of place: (where in the pass, the places in the row of what stands there).
    """
    found = []
    for i, path in enumerate(paths):
        of_pass = []
        for earlier in paths[:i]:
            common = min(len(path), len(earlier))
            differs = np.flatnonzero(path[:common] != earlier[:common])
            fork = int(differs[0]) if len(differs) else common
            branch, history = tree.input_ids[earlier[fork:]], tree.input_ids[path[fork:]]
            if not len(branch):
                continue
            ends = np.flatnonzero(history == branch[-1])  # of the same answer in the history
            history = history[: int(ends[0]) + 1] if len(ends) else history[:0]
            n = min(len(branch), len(history))
            same = branch[len(branch) - n :] == history[len(history) - n :]
            kept = n - (int(np.flatnonzero(~same)[-1]) + 1 if not same.all() else 0)
            if len(branch) > kept:
                of_pass.append((fork, earlier[fork : len(earlier) - kept]))
        found.append(of_pass)
    return found


def print_tokens(shown: Shown, console=None) -> None:
    """The passes in the terminal. Where there are no colours, trained tokens stand in brackets: ⟦ ⟧.

    Args:
        console: a `rich.console.Console`; by default that of the terminal, which honours NO_COLOR and pipes.
    """
    from rich.console import Console
    from rich.text import Text

    console = Console(highlight=False) if console is None else console
    plain = console.color_system is None or console.no_color
    styles = {CONTENT: "default", TEMPLATE: "dim", TRAINED: "bold green", END: "bold cyan"}
    coloured = [(f"{name}  ", styles[kind]) for kind, name in enumerate(KINDS)]
    legend = Text("⟦ ⟧ is trained") if plain else Text.assemble(*coloured)
    console.print(legend)
    for number, (path, kinds) in enumerate(zip(shown.paths, shown.kinds), 1):
        trained = int(np.count_nonzero(kinds >= TRAINED))
        console.rule(f"pass {number} of {len(shown.passes)}: {len(path):,} tokens, {trained:,} trained", align="left")
        text = Text()
        for begin, stop in _runs_of_equal(kinds >= TRAINED if plain else kinds):
            piece = "".join(shown.texts[place] for place in path[begin:stop].tolist())
            if plain:
                text.append(f"⟦{piece}⟧" if kinds[begin] >= TRAINED else piece)
            else:
                text.append(piece, styles[int(kinds[begin])])
        console.print(text, soft_wrap=True)


def _runs_of_equal(values: np.ndarray) -> list[tuple[int, int]]:
    edges = np.flatnonzero(values[1:] != values[:-1]) + 1
    return list(zip([0, *edges.tolist()], [*edges.tolist(), len(values)]))


# ------------------------------------------------------------------------------------------------------------------ page

PAGE_TOKENS = 100_000  # of rows, in a page: some megabytes
TOO_LONG = (
    "the longest pass has more tokens than the model takes, {:,}: raise max_length, or drop or truncate it (overlong)"
)


def _figures(source: Source, maker: TreeMaker, count: int, max_length: int | None) -> Iterator[dict]:
    """Of each of the first conversations of a source what the table of the page has: what it becomes and what of it is lost; of
    one that cannot be used, why."""
    for index, (origin, record) in enumerate(source.read(0, count)):
        row: dict[str, int | float | str] = {"conversation": index}
        try:
            tree, counted, longest = maker.tree((origin, record))
        except ConversationError as error:
            yield row | {"error": str(error)}
            continue
        row |= {
            "passes": counted["passes"],
            "targets": counted["targets"],
            "targets lost": counted["targets_lost"],
            "tokens": counted["tokens"],
            "tokens of passes": counted["pass_tokens"],
            "fewer tokens": round(counted["pass_tokens"] / counted["tokens"], 2) if counted["tokens"] else 0,
            "fewer pairs": round(tree.pass_pairs / tree.visible_pairs, 2) if tree is not None else 0,
            "longest pass": longest,
        }
        counts = Counts.of(counted)
        ignored, absent = ", ".join(counts.ignored), ", ".join(counts.absent)
        notes = [f"{name} ({n})" if n > 1 else name for name, n in counts.notes.items()]
        if max_length is not None and longest > max_length:
            notes.append(TOO_LONG.format(max_length))
        texts = {"keys nobody reads": ignored, "columns that it lacks": absent, "notes": "; ".join(notes)}
        yield row | {name: text for name, text in texts.items() if text}


def write_page(
    path: str | Path,
    source: Source,
    maker: TreeMaker,
    cost_of: Callable[[TokenTree], str] = lambda tree: "",
    *,
    first: int = 0,
    max_samples: int | None = None,
    max_length: int | None = None,
    progress: Callable[[Iterable], Iterable] = iter,
) -> None:
    """Write a page: a table of all conversations, and as many of them to look into as PAGE_TOKENS allow.

    Args:
        path: of the HTML file.
        source: what to look at.
        maker: how it is rendered.
        cost_of: a tree -> a text about what it costs.
        first: the first conversation to look into.
        max_samples: conversations in the table, at most.
        max_length: tokens of a pass beyond which the table has a note.
        progress: is given the lines of the table as they are made.

    Raises:
        ConversationError: the first conversation cannot be used.
    """
    count = min(len(source), max_samples or len(source))
    table = list(progress(_figures(source, maker, count, max_length)))
    conversations, tokens = [], 0
    others = [*range(first + 1, count), *range(min(first, count))]
    for index in [first, *others]:
        row = table[index] if index < count else {}
        if index != first and not 0 < row.get("tokens", 0) <= PAGE_TOKENS - tokens:  # or it cannot be used
            continue
        [record] = source.read(index, index + 1)
        shown = Shown.of(record, maker)
        tokens += len(shown.tree)
        conversations.append({"index": index, "cost": cost_of(shown.tree)} | _conversation(shown))
    data = {
        "title": f"{Path(source.name).name}: what is trained",
        "about": f"{len(source):,} conversations: {count:,} in the table; {len(conversations):,} can be looked into"
        + f", as many as have {PAGE_TOKENS:,} tokens together"
        * (len(conversations) < sum("error" not in row for row in table)),
        "kinds": KINDS,
        "block": BLOCK_SIZE,
        "table": table,
        "conversations": conversations,
    }
    template = files(__package__).joinpath("page.html").read_text(encoding="utf-8")
    # `</script>` in a text would end the script that holds it.
    text = json.dumps(data, ensure_ascii=False, separators=(",", ":")).replace("<", "\\u003c")
    Path(path).write_text(template.replace("/*DATA*/null", text), encoding="utf-8")


def _conversation(shown: Shown) -> dict:
    tree, chains = shown.tree, Chains.of(shown.tree.subtree_end)
    passes = []
    for path, p, kinds, unseen in zip(shown.paths, shown.passes, shown.kinds, shown.unseen or itertools.repeat([])):
        weight = weights_of(p)
        passes.append(
            {
                "runs": _ranges(path),
                "kinds": "".join(map(str, kinds.tolist())),
                "weights": None if (weight[weight > 0] == 1).all() else np.round(weight.astype(float), 4).tolist(),
                "unseen": [[at, _ranges(places)] for at, places in unseen],
            }
        )
    return {
        "texts": shown.texts,
        "ids": tree.input_ids.tolist(),
        "positions": tree.position_ids.tolist(),
        "ends": tree.subtree_end.tolist(),
        "passes": passes,
        "compares": shown.unseen is not None,
        "chains": [[int(a), int(b), int(p)] for a, b, p in zip(chains.run_start, chains.run_stop, chains.run_parent)],
        "figures": str(inspect_tree(tree)),
    }


def _ranges(places: np.ndarray) -> list[list[int]]:
    """[[start, stop], …] of ascending places."""
    edges = np.flatnonzero(np.diff(places) != 1) + 1
    return [[int(part[0]), int(part[-1]) + 1] for part in np.split(places, edges) if len(part)]

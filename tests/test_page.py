"""What is shown of passes: texts, kinds and contexts, in the terminal and on the page, which is opened in Chromium."""

import io
import json
import re
import time

import browser
import numpy as np
import pytest
from rich.console import Console
from templates import tokenizer as with_template

from flexmask import demo
from flexmask.cli import main
from flexmask.data import tree_maker
from flexmask.page import CONTENT, END, TEMPLATE, TRAINED, Shown, print_tokens, token_texts, write_page
from flexmask.sources import InMemory

CONVERSATIONS = demo.conversations(6)
TOKENIZER = demo.train_tokenizer(demo.texts(CONVERSATIONS))
MAKER = tree_maker(TOKENIZER)


def shown(conversation, maker=MAKER):
    return Shown.of(("conversation", conversation), maker)


def of_turns(turns):
    return next(c for c in CONVERSATIONS if len(c["messages"]) == 2 * turns)


@pytest.mark.parametrize(
    "text", ["plain words", "naïve café", "日本語 and 🙂🙂 faces", "a\n\n  b\t", "<|im_start|>user\nx<|im_end|>"]
)
def test_texts_of_tokens_are_the_text(text):
    """Characters of several tokens, spaces and special tokens among them."""
    ids = TOKENIZER(text, add_special_tokens=False)["input_ids"]
    found = token_texts(ids, TOKENIZER)
    assert len(found) == len(ids) and "".join(found) == text


def test_kinds_of_tokens():
    """Trained is what the pass trains, its end is the end of the turn; a header is template text, a message is not."""
    one = shown(of_turns(3))
    for p, path, kinds in zip(one.passes, one.paths, one.kinds, strict=True):
        assert ((kinds >= TRAINED) == np.asarray(p.loss_mask, bool)).all()
        texts = [one.texts[place] for place in path]
        assert [texts[i] for i in np.flatnonzero(kinds == END)] == ["<|im_end|>"]
        header = "".join(text for text, kind in zip(texts, kinds, strict=True) if kind == TEMPLATE)
        assert set(re.split(r"<\|im_start\|>|<\|im_end\|>|\n", header)) == {"", "user", "assistant"}


def test_what_inference_never_shows():
    """One sequence of all turns has the reasoning of earlier ones, with its tags, before each of their answers."""
    conversation = of_turns(3)
    one = shown(conversation)
    answers = [message for message in conversation["messages"] if message["role"] == "assistant"]
    for number, (path, unseen) in enumerate(zip(one.paths, one.unseen, strict=True)):
        assert len(unseen) == number
        for answer, (at, places) in zip(answers, unseen, strict=False):
            text = "".join(one.texts[place] for place in places)
            assert text == f"<think>\n{answer['reasoning_content']}\n</think>\n\n"
            following = "".join(one.texts[place] for place in path[at:])
            assert following.startswith(answer["content"])


def test_nothing_is_unseen_where_history_keeps_all():
    conversation = {"messages": [{"role": "user", "content": "a b"}, {"role": "assistant", "content": "c"}] * 3}
    assert shown(conversation).unseen == [[], [], []]


def test_a_repeated_end_token_inside_a_turn():
    """Steps of an agent, whose reasoning is kept until the next question: then two answers lose theirs at once."""
    call = {"function": {"name": "f", "arguments": {}}}
    messages = [
        {"role": "user", "content": "go"},
        {"role": "assistant", "reasoning_content": "first", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": "1"},
        {"role": "assistant", "reasoning_content": "second", "content": "done"},
        {"role": "user", "content": "again"},
        {"role": "assistant", "reasoning_content": "third", "content": "done"},
    ]
    one = shown({"messages": messages}, tree_maker(with_template("qwen3")))
    assert one.unseen[0] == one.unseen[1] == []
    texts = ["".join(one.texts[place] for place in places) for _, places in one.unseen[2]]
    assert len(texts) == 2 and "first" in texts[0] and "second" in texts[1]
    said = [one.texts[place] for place, kind in zip(one.paths[1], one.kinds[1], strict=True) if kind == CONTENT]
    assert "first" in "".join(said), "the thought of a message without content"


def test_nothing_is_compared_where_not_every_answer_is_a_pass():
    """The bug guarded: it said that the context of a turn was the same in plain training, without knowing the other turns."""
    one = shown(of_turns(3), tree_maker(TOKENIZER, train_on="last"))
    assert len(one.passes) == 1 and one.unseen is None


def test_of_no_weight_is_not_trained():
    """Thoughts, where answers alone are."""
    one = shown(of_turns(2), tree_maker(TOKENIZER, reasoning_weight=0.0))
    for path, kinds in zip(one.paths, one.kinds, strict=True):
        text = "".join(one.texts[place] for place, kind in zip(path, kinds, strict=True) if kind >= TRAINED)
        assert text.endswith("<|im_end|>") and "<think>" not in text and "</think>" not in text.strip()


def test_a_conversation_with_nothing_to_train_is_in_the_table(tmp_path):
    """The bug guarded: one of them ended the page."""
    thinks = [{"role": "user", "content": "1?"}, {"role": "assistant", "reasoning_content": "One.", "content": "1"}]
    plain = [{"role": "user", "content": "2?"}, {"role": "assistant", "content": "2"}]
    maker = tree_maker(with_template("qwen3"), train_on="last", empty_reasoning="drop")
    write_page(tmp_path / "page.html", InMemory("data", [{"messages": thinks}, {"messages": plain}]), maker)
    data = data_of(tmp_path / "page.html")
    assert [row["tokens"] for row in data["table"]][1] == 0 and [one["index"] for one in data["conversations"]] == [0]


@pytest.mark.parametrize("coloured", [True, False])
def test_tokens_in_the_terminal(coloured):
    one, out = shown(of_turns(2)), io.StringIO()
    print_tokens(
        one, Console(file=out, force_terminal=coloured, color_system="standard" if coloured else None, width=80)
    )
    text = out.getvalue()
    assert ("\x1b[" in text) == coloured and ("⟦" in text) == (not coloured)
    plain = re.sub(r"\x1b\[[\d;]*m", "", text)
    assert f"pass 2 of 2: {len(one.paths[1])} tokens" in plain
    if not coloured:
        trained = [
            "".join(one.texts[i] for i in path[np.asarray(p.loss_mask, bool)]) for path, p in zip(one.paths, one.passes)
        ]
        assert re.findall(r"⟦(.*?)⟧(?! is trained)", plain.partition("is trained")[2], re.DOTALL) == trained


def test_no_color_is_honoured(monkeypatch, capsys):
    monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.setenv("FORCE_COLOR", "1")
    print_tokens(shown(of_turns(2)))
    said = capsys.readouterr().out
    assert "⟦" in said and "\x1b[3" not in said


# ----------------------------------------------------------------------------------------------------------------- the page

needs_chromium = pytest.mark.skipif(
    browser.CHROMIUM is None,
    reason="the page is opened in headless Chromium, which is not installed (apt install chromium)",
)


def data_of(page):
    return json.loads(re.search(r"const DATA = (\{.*\});\n", page.read_text())[1])


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """Of a file with a record that cannot be used, one with a key that nobody reads, and text that looks like HTML."""
    odd = {
        "messages": [{"role": "user", "content": "</script><b>&"}, {"role": "assistant", "content": "🙂 <i>"}],
        "mood": "odd",
    }
    path = tmp_path_factory.mktemp("page") / "page.html"
    records = [*CONVERSATIONS, {"messages": []}, odd]
    write_page(path, InMemory("some/data.jsonl", records), MAKER, lambda tree: f"costs {len(tree)}", first=2)
    return path


def test_the_data_of_the_page(page):
    data = data_of(page)
    assert [row["conversation"] for row in data["table"]] == list(range(8))
    assert data["table"][6] == {
        "conversation": 6,
        "error": "some/data.jsonl: conversation 6: the conversation is empty",
    }
    assert data["table"][7]["keys nobody reads"] == "mood"
    trees = [MAKER.tree(("", c))[0] for c in CONVERSATIONS]
    assert [row["tokens"] for row in data["table"][:6]] == [len(tree) for tree in trees]
    assert [one["index"] for one in data["conversations"]] == [2, 3, 4, 5, 7, 0, 1]
    assert data["conversations"][5]["ids"] == trees[0].input_ids.tolist()
    assert data["conversations"][5]["cost"] == f"costs {len(trees[0])}"
    assert "http" not in page.read_text().replace("http://www.w3.org/2000/svg", ""), "no network"


@needs_chromium
def test_hovering_sorting_and_keys(page):
    found = browser.after(
        page,
        """
        const text = id => document.getElementById(id).textContent, out = [];
        const rows = () => [...document.querySelectorAll('tbody tr')].map(row => Number(row.dataset.index));
        out.push(document.title, rows(), text('name'));
        const header = name => [...document.querySelectorAll('th button')].find(one => one.textContent.startsWith(name));
        header('tokens').click(); out.push(rows()); header('tokens').click(); out.push(rows());
        document.querySelector('#tokens span').dispatchEvent(new MouseEvent('mouseover', {bubbles: true}));
        out.push(text('token'));
        const press = (id, key) => document.getElementById(id).dispatchEvent(new KeyboardEvent('keydown', {key, bubbles: true}));
        press('tokens', 'ArrowRight'); out.push(text('token'));
        document.getElementById('compare').click(); out.push(text('comparison'), document.querySelectorAll('.unseen').length);
        document.querySelector('#passes button').click(); out.push(document.querySelector('#passes button').ariaSelected);
        press('mask', '+'); out.push(view.size, view.q); press('mask', 'ArrowDown'); out.push(view.q > 0);
        press('mask', '0'); out.push(view);
        showPair(now.ids.length - 1, 0); out.push(text('pair'));
        showPair(0, 5); out.push(text('pair'));
        const last = DATA.conversations.length - 3;  // the odd one
        document.getElementById('which').value = last; document.getElementById('which').onchange();
        out.push(text('tokens'));
        document.querySelector('svg rect').dispatchEvent(new MouseEvent('click', {bubbles: true})); out.push(text('token'));
        return JSON.stringify(out);
        """,
    )
    out = iter(json.loads(html_unescaped(found)))
    one = shown(CONVERSATIONS[2])
    assert next(out) == "data.jsonl: what is trained"
    assert next(out) == list(range(8)) and next(out).startswith(f"Conversation 2: {len(one.tree):,} tokens of the row")
    sizes = [row.get("tokens", "") for row in data_of(page)["table"]]
    down, up = next(out), next(out)
    of_down = [sizes[i] for i in down if sizes[i] != ""]
    assert of_down == sorted(of_down, reverse=True) and [sizes[i] for i in up if sizes[i] != ""] == of_down[::-1]
    first = next(out)
    passes = ", ".join(str(i + 1) for i in range(len(one.passes)))
    assert first.startswith(
        f'"<|im_start|>" · id {one.tree.input_ids[0]} · position 0 · place 0 in the row · template text'
    )
    assert first.endswith(f"in passes {passes} · not trained (weight 0)") and "position 1 ·" in next(out)
    unseen = sum(len(places) for _, places in one.unseen[-1])
    assert f"has {unseen:,} tokens in its context (crossed out below) that inference never shows" in next(out)
    assert next(out) == 1 + unseen, "and one in the legend"
    assert next(out) == "true" and next(out) == len(one.tree) / 2 and next(out) == len(one.tree) / 4 and next(out)
    assert next(out) == {"q": 0, "k": 0, "size": len(one.tree)}
    assert "reads key" in next(out) and "does not read key" in next(out)
    assert "</script><b>&" in (odd := next(out)) and "🙂 <i>" in odd
    assert next(out).startswith('"<|im_start|>"')


def html_unescaped(text):
    return text.replace("&lt;", "<").replace("&gt;", ">").replace("&amp;", "&")


@needs_chromium
@pytest.mark.parametrize("dark, width", [(False, 1400), (True, 1400), (False, 420)])
def test_it_is_drawn(page, tmp_path, dark, width):
    """Light, dark and narrow: the ground has the colour of the scheme, and trained tokens theirs."""
    import matplotlib.image

    browser.screenshot(page, tmp_path / "page.png", dark=dark, size=(width, 1500))
    pixels = np.uint8(255 * matplotlib.image.imread(tmp_path / "page.png"))[..., :3].reshape(-1, 3)
    ground, trained = ((20, 23, 28), (31, 74, 48)) if dark else ((255, 255, 255), (215, 239, 221))
    assert (pixels == ground).all(1).mean() > 0.2 and (pixels == trained).all(1).sum() > 500


@needs_chromium
def test_24_turns_and_20_000_tokens_open_in_two_seconds(tmp_path):
    rng = np.random.default_rng(0)
    words = [word for text in demo.texts(CONVERSATIONS) for word in text.split()]

    def said(tokens):
        return " ".join(rng.choice(words, tokens // 3))

    messages = []
    for _ in range(24):
        messages += [
            {"role": "user", "content": said(450)},
            {"role": "assistant", "reasoning_content": said(640), "content": said(130)},
        ]
    path = tmp_path / "long.html"
    write_page(path, InMemory("long.jsonl", [{"messages": messages}]), MAKER)
    assert data_of(path)["table"][0]["tokens"] > 20_000 and data_of(path)["table"][0]["passes"] == 24
    start = time.perf_counter()
    milliseconds = float(browser.after(path, "return performance.now();"))
    assert milliseconds < 2000 and time.perf_counter() - start < 20


def test_from_the_command_line(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(c) + "\n" for c in CONVERSATIONS))
    flags = ["--tokenizer", "flexmask/tiny-random", "--html", "page.html", "--tokens", "true", "--max_samples", "4"]
    assert main(["inspect", "data.jsonl", *flags]) == 0
    said = capsys.readouterr().out
    assert "page: page.html" in said and "⟦ ⟧ is trained" in said
    data = data_of(tmp_path / "page.html")
    assert len(data["table"]) == 4 and "linear layers, TFLOP" in data["conversations"][0]["cost"]

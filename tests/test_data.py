import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import datasets
import numpy as np
import pytest
from templates import tokenizer as template_tokenizer

from flexmask import ConversationError, OnePassCollator, Pass, TokenTree, demo, render_passes
from flexmask.data import build_trees, load_conversations
from flexmask.messages import read_conversation

USER = {"role": "user", "content": "hello"}
ANSWER = {"role": "assistant", "content": "hi", "reasoning_content": "greet"}
GOOD = {"messages": [USER, ANSWER]}
TOOLS = [{"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}]


def calling(**arguments) -> dict:
    call = {"type": "function", "function": {"name": "weather", "arguments": arguments}}
    result = {"role": "tool", "content": "sunny"}
    return {"messages": [USER, {"role": "assistant", "content": "", "tool_calls": [call]}, result, ANSWER]}


@pytest.fixture(scope="module")
def conversations():
    return demo.conversations(24, seed=3)


@pytest.fixture(scope="module")
def tokenizer(conversations):
    return demo.train_tokenizer(demo.texts(conversations))


@pytest.fixture(autouse=True)
def inside_folder(tmp_path, monkeypatch):
    """Errors name a file as it was given, so tests give `data.jsonl` and read that in the text."""
    monkeypatch.chdir(tmp_path)


def write(name: str, text: str) -> str:
    with open(name, "w", encoding="utf-8") as file:
        file.write(text)
    return name


def lines(*records) -> str:
    return "".join(json.dumps(record) + "\n" for record in records)


def as_read(records: list[dict]) -> list[dict]:
    """As `messages` brings records into one form; that their arguments and keys survive is what is tested here."""
    return [read_conversation(record, "") for record in records]


def refusal(name: str, **kwargs) -> str:
    with pytest.raises(ConversationError) as caught:
        load_conversations(name, **kwargs)
    return str(caught.value)


def same_trees(one: Sequence[TokenTree], other: Sequence[TokenTree]) -> bool:
    columns = [zip(a.to_dict().values(), b.to_dict().values(), strict=True) for a, b in zip(one, other, strict=True)]
    return all(np.array_equal(a, b) for tree in columns for a, b in tree)


# Reading


def test_jsonl_keeps_messages_and_other_keys_as_they_are():
    """Arrow would give each record the keys of the other: tool arguments `city` and `days` both, one of them null."""
    records = [{**calling(city="Rome"), "tools": TOOLS, "id": 7}, calling(days=3, unit=None)]
    found = load_conversations(write("data.jsonl", "\n" + lines(*records) + "  \n"))
    assert found == as_read(records)
    assert [c.origin for c in found] == ["data.jsonl:2", "data.jsonl:3"]


def test_json_keeps_messages_and_other_keys_as_they_are():
    records = [{**calling(city="Rome"), "tools": None}, calling(days=3, unit=None)]
    found = load_conversations(write("data.json", "\ufeff" + json.dumps(records)))
    assert found == as_read(records)
    assert [c.origin for c in found] == ["data.json: conversation 0", "data.json: conversation 1"]


def test_parquet_round_trip_leaks_no_nulls():
    """A Parquet column has one type, so every message comes back with every key and every tool argument of the file."""
    records = [{**calling(city="Rome"), "tools": TOOLS}, calling(place={"lat": 1.5, "names": ["a", "b"]}), GOOD]
    datasets.Dataset.from_list(records).to_parquet("data.parquet")
    assert "null" in json.dumps(datasets.Dataset.from_parquet("data.parquet", cache_dir="cache")[0]), "the trap is set"
    found = load_conversations("data.parquet")
    assert found == as_read(records)
    assert found[2].origin == "data.parquet: conversation 2"


def test_hub_rows_leak_no_nulls(monkeypatch):
    records = [calling(city="Rome"), calling(days=3)]
    asked = []
    rows = datasets.Dataset.from_list(records)
    monkeypatch.setattr(datasets, "load_dataset", lambda *given, **options: asked.append((*given, options)) or rows)
    found = load_conversations("some-org/chats-v1.5", split="test", config="en")
    options = {"split": "test", "streaming": False}
    assert found == as_read(records) and asked == [("some-org/chats-v1.5", "en", options)]
    assert found[1].origin == "some-org/chats-v1.5: conversation 1"


def test_sharegpt_becomes_messages():
    talk = [("system", "S"), ("human", "a"), ("gpt", "b"), ("observation", "c"), ("tool", "d"), ("assistant", "e")]
    talk += [("user", "f"), ("gpt", "g")]
    record = {"id": 1, "conversations": [{"from": sender, "value": value} for sender, value in talk]}
    record["conversations"][2]["train"] = False
    [found] = load_conversations(write("data.jsonl", lines(record)))
    roles = ["system", "user", "assistant", "tool", "tool", "assistant", "user", "assistant"]
    expected = [{"role": role, "content": value} for role, (_, value) in zip(roles, talk, strict=True)]
    expected[2]["train"] = False
    assert found == {"id": 1, "messages": expected}


# Refusals


@pytest.mark.parametrize(
    "record, message",
    [
        ([1, 2], "is list, expected an object with messages"),
        ({"text": "x"}, "has the keys text, expected messages (or conversations, or prompt and completion)"),
        ({"messages": []}, "the conversation is empty"),
        ({"messages": "hi"}, "messages is a text that is no JSON (Expecting value: line 1 column 1 (char 0)), expected a"),
        ({"messages": {"role": "user"}}, "messages is dict, expected a list of messages"),
        ({"messages": None}, "has the keys (none), expected messages"),
        ({"messages": [USER]}, "no assistant message to train (none at all, or all have \"train\": false or weight 0)"),
        ({"messages": [USER, {**ANSWER, "train": False}]}, "no assistant message to train (none at all, or all have"),
        ({"messages": [USER, ANSWER, {"role": "bot", "content": ""}]}, "message 2: role is 'bot', expected one of sys"),
        ({"messages": [USER, ANSWER, USER, {"role": "assistant", "content": 5}]},
         "message 3 (assistant): content is int, expected a string"),
        ({"messages": [USER, {**ANSWER, "reasoning_content": 5}]}, "message 1 (assistant): reasoning_content is int, "),
        ({**GOOD, "tools": "weather"}, "tools is a text that is no JSON (Expecting value: line 1 column 1 (char 0)), exp"),
        ({"conversations": 5}, "conversations is int, expected a list of messages"),
        ({"conversations": [{"from": "human", "value": "a"}]}, "no assistant message to train"),
        ({"conversations": [{"from": "human", "value": "a"}, {"from": "bot", "value": "b"}]},
         "message 1: role is 'bot', expected one of system, "),
        ({"conversations": [{"from": ["gpt"], "value": "a"}]}, "message 0: role is ['gpt'], expected one of system, "),
        ({"conversations": ["a"]}, "message 0 is str, expected an object with role and content"),
        ({"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": 1.5}]},
         "message 1 (assistant): content is float, expected a string"),
    ],
)  # fmt: skip
def test_faulty_record_is_refused_by_file_and_line(record, message):
    assert refusal(write("data.jsonl", lines(GOOD) + "\n" + lines(record))).startswith(f"data.jsonl:3: {message}")
    assert refusal(write("data.json", json.dumps([GOOD, record]))).startswith(f"data.json: conversation 1: {message}")


def test_faulty_parquet_row_is_refused_by_index():
    datasets.Dataset.from_list([GOOD, {"messages": [USER]}]).to_parquet("data.parquet")
    assert refusal("data.parquet").startswith("data.parquet: conversation 1: no assistant message to train")


@pytest.mark.parametrize(
    "text, place",
    [
        ('{"messages": [}', ":3:15: malformed JSON: Expecting value"),
        ('{"messages": ', ":3:13: malformed JSON: Expecting value"),
        ('{"a": "NaN \\" NaN", "b": [1, NaN]}', ":3:30: malformed JSON: NaN is not a JSON value"),
        ('{"a": -Infinity}', ":3:7: malformed JSON: -Infinity is not a JSON value"),
        ('{"a": Infinity}', ":3:7: malformed JSON: Infinity is not a JSON value"),
    ],
)
def test_malformed_json_is_refused_by_line_and_column(text, place):
    assert refusal(write("data.jsonl", lines(GOOD) + "\n" + text + "\n")) == "data.jsonl" + place
    assert refusal(write("data.json", "[" + lines(GOOD) + ",\n" + text + "\n")) == "data.json" + place


def test_what_is_not_text_is_refused():
    with open("data.jsonl", "wb") as file:
        file.write(lines(GOOD).encode() + b'{"a": "\xff"}\n')
    assert refusal("data.jsonl") == "data.jsonl:2: is not UTF-8: invalid start byte"
    half = {"messages": [{"role": "user", "content": "\ud83d"}, ANSWER]}
    assert "the JSON that starts at line 2 is refused" in refusal(write("data.jsonl", lines(GOOD, half)))
    whole = {"messages": [{"role": "user", "content": "🙂"}, ANSWER]}
    assert r"\ud83d\ude42" in lines(whole)
    assert load_conversations(write("data.jsonl", lines(whole))) == as_read([whole])


def test_json_must_be_a_list_or_lines():
    """The bug guarded: many .json files hold JSON lines, which were malformed JSON."""
    expected = "data.json: is dict, expected a list of conversations, or one on each line"
    assert refusal(write("data.json", json.dumps(GOOD, indent=1))) == expected
    found = load_conversations(write("data.json", "\n" + lines(GOOD, GOOD)))
    assert found == as_read([GOOD, GOOD]) and found[1].origin == "data.json:3"
    assert load_conversations(write("data.json", lines(GOOD))) == as_read([GOOD])
    assert refusal(write("data.json", lines(GOOD) + "[1]\n")).startswith("data.json:2: is list, expected an object")


@pytest.mark.parametrize("name, text", [("a.jsonl", ""), ("a.jsonl", "\n \n"), ("a.json", "  \n"), ("a.json", "[]")])
def test_empty_file_is_refused(name, text):
    assert refusal(write(name, text)) == f"{name}: holds no conversations"


def test_missing_and_unknown_files_are_refused(monkeypatch):
    for name in ("none.json", "folder/none.jsonl", "none.PARQUET"):
        assert refusal(name) == f"{name}: there is no such file"
    expected = "expected a .jsonl, .json or .parquet file, or the name of a hub dataset"
    for name in (write("data.csv", "a,b"), write("chats", "{}"), "none.txt", "./none", "a/b/c"):
        assert refusal(name) == f"{name}: {expected}"
    assert refusal(write("data.parquet", "PAR")).startswith("data.parquet: cannot be read as a Parquet file: ")

    def unreachable(*given, **options):
        raise ConnectionError("no\nnetwork")

    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    assert refusal("some-org/chats", split="test") == (
        "some-org/chats: is no .jsonl, .json or .parquet file, and loading it as a hub dataset (split 'test') failed: "
        "ConnectionError: no network"
    )
    assert "(configuration 'en', split 'train')" in refusal("some-org/chats", config="en")
    assert refusal(write("data.jsonl", lines(GOOD)), config="en") == (
        "data.jsonl: is a file, which has no configuration 'en'; leave it out"
    )
    assert (
        refusal("data.jsonl", split="train[:9]")
        == "data.jsonl: is a file, which has no split 'train[:9]'; leave it out"
    )


def test_a_damaged_page_of_parquet_is_told_with_the_name_of_the_file():
    """The bug guarded: an OSError of Arrow without it."""
    datasets.Dataset.from_list([GOOD] * 500).to_parquet("data.parquet")
    data = bytearray(Path("data.parquet").read_bytes())
    data[40:400] = b"\xff" * 360
    Path("data.parquet").write_bytes(data)
    assert refusal("data.parquet").startswith("data.parquet: cannot be read as a Parquet file: ")


# Trees


def rendered(conversations, tokenizer) -> list[list[Pass]]:
    return [render_passes(c["messages"], tokenizer) for c in conversations]


def supervised(passes) -> int:
    return sum(int(np.sum(p.loss_mask)) for p in passes)


def test_trees_are_those_of_the_passes(conversations, tokenizer):
    prepared = build_trees(iter(conversations), tokenizer)
    passes = rendered(conversations, tokenizer)
    assert same_trees(prepared.trees, [TokenTree.from_passes(p) for p in passes])
    assert (prepared.conversations, prepared.dropped, prepared.truncated) == (24, 0, 0)
    assert (prepared.passes, prepared.passes_lost) == (sum(map(len, passes)), 0)
    assert (prepared.targets, prepared.targets_lost) == (sum(map(supervised, passes)), 0)
    assert prepared.tokens == sum(len(tree) for tree in prepared.trees)
    assert prepared.pass_tokens == sum(len(p.input_ids) for of_one in passes for p in of_one)
    assert f"{prepared.tokens:,} tokens" in str(
        prepared
    ) and "no conversation dropped or truncated for its length" in str(prepared)


def test_template_options_and_tools_reach_the_template(conversations, tokenizer):
    template = "{{ '0' if tools is none else tools | length + 1 }}{{ extra }}{{ tools | tojson if tools }}"
    template += tokenizer.chat_template
    given = [{**conversations[0], "tools": TOOLS * 2}, {**conversations[0], "tools": []}]
    trees = build_trees(given, tokenizer, chat_template=template, extra="~").trees
    assert [tokenizer.decode(tree.input_ids[:2]) for tree in trees] == ["3~", "0~"]


def test_dataset_of_conversations_leaks_no_nulls(tokenizer):
    """A Dataset hands out `days: None` for a call that only has `city`; a template would print it."""
    template = "{% for m in messages %}{{ m.role }}{{ m.reasoning_content }}{{ m.content }}"
    template += "{{ m.tool_calls | tojson if m.tool_calls }}<|im_end|>{% endfor %}"
    template += "{% if add_generation_prompt %}assistant{% endif %}"
    given = [calling(city="Rome"), calling(days=3)]
    trees = build_trees(datasets.Dataset.from_list(given), tokenizer, chat_template=template).trees
    assert same_trees(trees, build_trees(given, tokenizer, chat_template=template).trees)


@pytest.mark.parametrize("of", ["conversation", "arguments", "tools"])
def test_nesting_beyond_the_parser_is_told(tokenizer, of):
    """The bug guarded: a RecursionError, of dicts that are nested deeper than Python can follow."""
    deep = {}
    for _ in range(3000):
        deep = {"a": deep}
    record = {
        "conversation": GOOD | {"other": deep},
        "arguments": calling(city=deep),
        "tools": GOOD | {"tools": [deep]},
    }[of]
    with pytest.raises(ConversationError, match=r"^conversation 1: .*nested too deeply"):
        build_trees([GOOD, record], tokenizer)


def test_several_processes_build_the_same_trees(conversations, tokenizer):
    options = {"max_length": 300, "overlong": "truncate"}
    one, two = (build_trees(conversations, tokenizer, num_proc=n, **options) for n in (1, 2))
    assert same_trees(one.trees, two.trees)
    assert str(one) == str(two)
    assert (
        one.truncated
        and f"LOST to max_length or max_tokens: 0 conversations dropped, {one.truncated} truncated" in str(one)
    )


def test_overlong_is_an_error_by_default(conversations, tokenizer):
    lengths = [max(len(p.input_ids) for p in passes) for passes in rendered(conversations, tokenizer)]
    limit = max(lengths[:5])
    first = next(i for i, length in enumerate(lengths) if length > limit)
    with pytest.raises(ConversationError) as caught:
        build_trees(conversations, tokenizer, max_length=limit)
    assert str(caught.value).startswith(
        f"conversation {first}: its longest pass has {lengths[first]} tokens, more than {limit} (max_length: what"
    )
    assert len(build_trees(conversations[:5], tokenizer, max_length=limit).trees) == 5, "the limit itself is allowed"


def test_dropped_conversations_are_counted(conversations, tokenizer):
    passes = rendered(conversations, tokenizer)
    lengths = [max(len(p.input_ids) for p in of_one) for of_one in passes]
    limit = int(np.median(lengths))
    kept = [of_one for of_one, length in zip(passes, lengths) if length <= limit]
    left_out = [of_one for of_one, length in zip(passes, lengths) if length > limit]
    assert kept and left_out

    prepared = build_trees(conversations, tokenizer, max_length=limit, overlong="drop")
    assert same_trees(prepared.trees, [TokenTree.from_passes(p) for p in kept])
    assert (prepared.conversations, prepared.dropped, prepared.truncated) == (24, len(left_out), 0)
    assert (prepared.passes, prepared.passes_lost) == (sum(map(len, passes)), sum(map(len, left_out)))
    assert (prepared.targets, prepared.targets_lost) == (sum(map(supervised, passes)), sum(map(supervised, left_out)))
    lost = f"{len(left_out)} conversations dropped, 0 truncated; {prepared.passes_lost:,} passes and "
    assert lost + f"{prepared.targets_lost:,} targets" in str(prepared)


def test_truncated_trees_are_those_of_passes_cut_by_hand(tokenizer):
    """Long questions, so that a limit takes part of some passes, all of others, and all passes of one conversation."""
    words = "apples and pears " * 20
    talk = [{"role": "user", "content": words}, ANSWER]
    conversations = [{"messages": talk * turns} for turns in (1, 2, 3, 4)]
    conversations.append({"messages": [{"role": "user", "content": words * 4}, ANSWER]})
    passes = rendered(conversations, tokenizer)
    limit = len(passes[2][2].input_ids) - 3  # three tokens off the third answer

    cut = [[Pass(p.input_ids[:limit], p.loss_mask[:limit]) for p in of_one] for of_one in passes]
    cut = [[p for p in of_one if sum(p.loss_mask) > 0] for of_one in cut]
    assert [len(of_one) for of_one in cut] == [1, 2, 3, 3, 0]
    prepared = build_trees(conversations, tokenizer, max_length=limit, overlong="truncate")
    assert same_trees(prepared.trees, [TokenTree.from_passes(of_one) for of_one in cut[:4]])
    assert (prepared.conversations, prepared.dropped, prepared.truncated) == (5, 1, 2)
    assert (prepared.passes, prepared.passes_lost) == (11, 2)
    assert prepared.targets == sum(map(supervised, passes))
    assert prepared.targets_lost == prepared.targets - sum(map(supervised, cut)) == 3 + 3 + 2 * supervised(passes[0])
    assert "1 conversations dropped, 2 truncated; 2 passes and " in str(prepared)


def test_a_pass_cut_inside_its_thought_is_lost_where_thoughts_weigh_nothing(tokenizer):
    """The bug guarded: it was kept, though no token of it has a weight, and its row stopped the training."""
    long = {"messages": [USER, ANSWER | {"reasoning_content": "apples and pears " * 40}]}
    options = {"reasoning_weight": 0.0, "max_length": 60, "overlong": "truncate"}
    prepared = build_trees([GOOD, long, {"messages": GOOD["messages"] + long["messages"]}], tokenizer, **options)
    assert (prepared.dropped, prepared.truncated, prepared.passes_lost) == (1, 1, 2)
    targets = [supervised(passes) for passes in rendered([GOOD, long], tokenizer)]
    assert prepared.targets_lost == 2 * targets[1] and prepared.targets == 2 * sum(targets)
    assert [tree.num_passes for tree in prepared.trees] == [1, 1]
    assert all(tree.target_weight.any() for tree in prepared.trees)
    options["reasoning_weight"] = 0.1
    assert build_trees([long], tokenizer, **options).truncated == 1


def test_nothing_left_is_reported(conversations, tokenizer):
    prepared = build_trees(conversations, tokenizer, max_length=3, overlong="truncate")
    assert len(prepared.trees) == 0 and prepared.dropped == 24
    assert "24 conversations dropped" in str(prepared) and "(100.00%) are not trained" in str(prepared)


def test_errors_name_the_origin(tokenizer):
    """Also after the user has shuffled or filtered what was loaded, and from another process."""
    unrenderable = {"messages": [USER, ANSWER, {"role": "user", "content": "fail"}, ANSWER]}
    template = "{% for m in messages if m.content == 'fail' %}{{ raise_exception('no') }}{% endfor %}"
    template += demo.CHAT_TEMPLATE
    expected = r"message 3 \(assistant\): the chat template failed while .*: no"
    loaded = load_conversations(write("data.jsonl", lines(GOOD, GOOD, unrenderable)))[1:]
    for given, origin in ((loaded, "data.jsonl:3"), ([GOOD, unrenderable], "conversation 1")):
        for num_proc in (None, 2):
            with pytest.raises(ConversationError, match=f"^{origin}: {expected}"):
                build_trees(given, tokenizer, chat_template=template, num_proc=num_proc)
    with pytest.raises(ConversationError, match=r"^conversation 1: no assistant message to train"):
        build_trees([GOOD, {"messages": [USER]}], tokenizer)
    with pytest.raises(ConversationError, match=r"^conversation 0: .*TextEncodeInput"):
        build_trees([{"messages": [{"role": "user", "content": "\ud800"}, ANSWER]}], tokenizer)


def test_token_ids_outside_the_vocabulary_are_refused(tokenizer):
    class Short(type(tokenizer)):
        def __len__(self):
            return 5

    short = Short(tokenizer_object=tokenizer.backend_tokenizer, eos_token="<|im_end|>")
    with pytest.raises(ConversationError, match=r"^conversation 0: token id \d+ is outside the .* vocabulary of 5$"):
        build_trees([GOOD], short, chat_template=demo.CHAT_TEMPLATE)


def test_unknown_options_are_refused(tokenizer):
    with pytest.raises(ValueError, match="overlong is 'cut', expected one of error, drop, truncate"):
        build_trees([GOOD], tokenizer, overlong="cut")
    with pytest.raises(ValueError, match="max_length is 0, expected at least 1"):
        build_trees([GOOD], tokenizer, max_length=0)


def test_a_tree_may_be_larger_than_a_row_but_a_pass_may_not():
    made = demo.conversations(6, turns=(1, 5))
    tokenizer = demo.train_tokenizer(demo.texts(made))
    trees = build_trees(made, tokenizer).trees
    longest = max(tree.max_length for tree in trees)
    assert longest < max(map(len, trees))
    assert len(build_trees(made, tokenizer, max_tokens=longest).trees) == len(made)
    first = next(i for i, tree in enumerate(trees) if tree.max_length == longest)
    with pytest.raises(
        ConversationError,
        match=rf"conversation {first}: its longest pass has {longest} tokens, more than {longest - 1} \(max_tokens: a row",
    ):
        build_trees(made, tokenizer, max_tokens=longest - 1)
    kept = build_trees(made, tokenizer, max_tokens=longest - 1, overlong="drop")
    assert kept.dropped == sum(tree.max_length == longest for tree in trees) and "LOST" in str(kept)


def test_the_lines_in_the_docs_are_conversations(tmp_path):
    page = (Path(__file__).parent.parent / "docs/data.md").read_text()
    (tmp_path / "data.jsonl").write_text(page.split("```json\n")[1].split("```")[0])
    prepared = build_trees(load_conversations(str(tmp_path / "data.jsonl")), template_tokenizer("qwen3"))
    assert [tree.num_passes for tree in prepared.trees] == [2, 2]


@pytest.mark.parametrize("loss_reduction", ["token", "turn", "conversation"])
def test_weights_and_reductions_reach_the_trees(conversations, tokenizer, loss_reduction):
    """Of conversations in files, of raw ones in the collator, and of those that are cut."""
    weighted = [
        {"messages": [m | {"weight": 0.5 * (i + 1)} for i, m in enumerate(c["messages"])]} for c in conversations
    ]
    passes = [render_passes(c["messages"], tokenizer) for c in weighted]
    expected = [TokenTree.from_passes(p, loss_reduction=loss_reduction) for p in passes]
    assert same_trees(build_trees(weighted, tokenizer, loss_reduction=loss_reduction).trees, expected)
    collator = OnePassCollator(tokenizer, loss_reduction=loss_reduction)
    weight = collator(weighted)["target_weight"][0].numpy()
    assert np.array_equal(weight, np.concatenate([tree.target_weight for tree in expected]))
    limit = max(len(p.input_ids) for p in passes[0]) - 1
    cut = build_trees(
        weighted[:1], tokenizer, max_length=limit, overlong="truncate", loss_reduction=loss_reduction
    ).trees[0]
    by_hand = [replace(p, input_ids=p.input_ids[:limit], loss_mask=p.loss_mask[:limit]) for p in passes[0]]
    assert same_trees([cut], [TokenTree.from_passes(by_hand, loss_reduction=loss_reduction)])


def test_a_conversation_of_which_nothing_is_left_is_dropped_and_counted():
    """Found: one such conversation ended the run."""
    tokenizer = template_tokenizer("qwen3")
    thinks = [{"role": "user", "content": "1?"}, {"role": "assistant", "reasoning_content": "One.", "content": "1"}]
    plain = [{"role": "user", "content": "2?"}, {"role": "assistant", "content": "2"}]
    options = {"train_on": "last", "empty_reasoning": "drop"}
    prepared = build_trees([{"messages": thinks}, {"messages": plain}], tokenizer, **options)
    assert (prepared.conversations, prepared.dropped, prepared.intact) == (2, 1, [0])
    assert "because nothing of them is left to train: 1" in str(prepared) and "LOST" not in str(prepared)
    with pytest.raises(ConversationError, match="empty thoughts"):
        render_passes(plain, tokenizer, **options)

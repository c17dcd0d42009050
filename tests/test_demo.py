import copy
import subprocess
import sys

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer

from flexmask import OnePassCollator, TokenTree, demo, render_passes

# Written and solved by hand, so that the solver is not its own judge.
BY_HAND = [
    ("Ada runs a bakery and starts with 30 rolls, 20 buns. Customers buy 4 rolls. How many rolls are there now?", 26),
    ("A van unloads 2 boxes of 12 buns. How many rolls and buns are there together?", 26 + 20 + 2 * 12),
    ("Next 3 customers take 5 buns each. As many rolls again turn up in the cellar. "
     "How many more rolls than buns are left?", 26 * 2 - (20 + 2 * 12 - 3 * 5)),
    ("Sadly 9 rolls have to be thrown away. At 3 coins apiece, what are all the rolls worth?", (52 - 9) * 3),
    ("There arrive 4 crates with 10 rolls each. With 8 rolls set aside, how many can be sold?", 43 + 40 - 8),
    ("Then 6 buns come in. The post collects 5 orders of 2 buns. A delivery brings 1 more buns. "
     "How many buns are there now?", 29 + 6 - 10 + 1),
]  # fmt: skip


@pytest.fixture(scope="module")
def conversations():
    return demo.conversations(100)


@pytest.fixture(scope="module")
def tokenizer(conversations):
    return demo.train_tokenizer(demo.texts(conversations))


def assistants(conversation) -> list[dict]:
    return [m for m in conversation["messages"] if m["role"] == "assistant"]


def test_conversations_are_the_same_for_the_same_seed(conversations):
    assert demo.conversations(100) == conversations
    assert demo.conversations(10) == conversations[:10]
    assert demo.conversations(10, seed=1) != conversations[:10]
    code = "import hashlib, flexmask.demo as d; print(hashlib.md5(repr(d.conversations(20)).encode()).hexdigest())"
    elsewhere = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    scope = {}
    exec(code.replace("print(", "digest = (", 1), scope)
    assert elsewhere.strip() == scope["digest"]


def test_conversations_are_what_they_should_be(conversations):
    assert all(map(demo.check, conversations))
    turns = {len(c["answers"]) for c in conversations}
    assert turns == {2, 3, 4, 5} and {len(c["answers"]) for c in demo.conversations(9, turns=(1, 1))} == {1}
    for conversation in conversations:
        assert [m["role"] for m in conversation["messages"]] == ["user", "assistant"] * len(conversation["answers"])
        assert all(len(m["reasoning_content"]) > 2 * len(m["content"]) for m in assistants(conversation))
    said = " ".join(m["content"] for c in conversations for m in c["messages"])
    for patterns in (demo._OPENINGS, demo._CHANGES, demo._QUESTIONS):
        for pattern in patterns:
            assert max(pattern.replace("}", "{").split("{")[::2], key=len) in said, "every pattern is used"


def test_answers_are_those_found_by_hand():
    messages = []
    for question, answer in BY_HAND:
        messages += [{"role": "user", "content": question}, {"role": "assistant", "content": f"{answer}."}]
    solved = demo._solve([question for question, _ in BY_HAND])
    assert [answer for _, answer in solved] == [answer for _, answer in BY_HAND]
    for reply, (working, _) in zip(messages[1::2], solved, strict=True):
        reply["reasoning_content"] = working
    assert demo.check({"messages": messages, "answers": [answer for _, answer in BY_HAND]})
    assert '"A van unloads 2 boxes of 12 buns." 2 * 12 = 24, 20 + 24 = 44.' in solved[1][0]


def tamper_answer(c):
    c["answers"][-1] += 1


def tamper_content(c):
    reply = c["messages"][1]
    reply["content"] = reply["content"].replace(str(c["answers"][0]), str(c["answers"][0] + 1))


def tamper_content_and_answer(c):
    tamper_content(c)
    c["answers"][0] += 1


def tamper_reasoning(c):
    reply = c["messages"][-1]
    reply["reasoning_content"] = reply["reasoning_content"].replace(" = ", " = 1", 1)


def tamper_question(c):
    """A number of the first turn that the later turns build on."""
    opening, rest = c["messages"][0]["content"].split(".", 1)
    number = next(word for word in opening.split() if word.isdigit())
    c["messages"][0]["content"] = opening.replace(number, number + "0", 1) + "." + rest


def drop_answer(c):
    c["answers"].pop()


def drop_message(c):
    c["messages"].pop()


def drop_reasoning(c):
    del c["messages"][1]["reasoning_content"]


def garble_question(c):
    c["messages"][0]["content"] = "Hello there."


@pytest.mark.parametrize(
    "tamper",
    [
        tamper_answer, tamper_content, tamper_content_and_answer, tamper_reasoning, tamper_question, drop_answer,
        drop_message, drop_reasoning, garble_question,
    ],
)  # fmt: skip
def test_check_detects_tampering(conversations, tamper):
    for original in conversations[:20]:
        changed = copy.deepcopy(original)
        tamper(changed)
        assert changed != original or tamper is tamper_reasoning  # a turn may need no arithmetic
        assert demo.check(changed) == (changed == original)


def test_answer_of_a_response():
    assert demo.answer_of("Of 12 rolls, 5 remain.") == 5
    assert demo.answer_of("None at all.") is None


def test_wrong_arguments_are_refused():
    for turns in ((0, 2), (3, 2)):
        with pytest.raises(ValueError, match=r"turns is \(\d, 2\), expected \(fewest, most\)"):
            demo.conversations(1, turns=turns)
    with pytest.raises(ValueError, match="vocab_size is 260, expected at least 261: all bytes and the added tokens"):
        demo.train_tokenizer(["a"], vocab_size=260)
    with pytest.raises(ValueError, match=r"special_tokens lacks \['<\|im_end\|>'\], which end a turn and pad"):
        demo.train_tokenizer(["a"], special_tokens=["<|endoftext|>", "<|im_start|>"])


def test_tokenizer_is_the_same_for_the_same_texts(conversations, tokenizer):
    again = demo.train_tokenizer(demo.texts(conversations))
    assert again.backend_tokenizer.to_str() == tokenizer.backend_tokenizer.to_str()


def test_tokenizer_is_lossless_and_within_its_size(tokenizer, tmp_path):
    assert len(demo.train_tokenizer(["abc abc"], vocab_size=261)) == 261
    assert max(tokenizer.get_vocab().values()) == len(tokenizer) - 1 < 1024
    small = demo.train_tokenizer(["some words " * 9, "other words"], vocab_size=265)
    assert len(small) == 265
    text = "  Zwölf 1204 \u2028 <think>\n漢字 🙂</think> .\r\n"
    tokenizer.save_pretrained(tmp_path)
    for one in (tokenizer, small, AutoTokenizer.from_pretrained(tmp_path)):
        assert one.decode(one(text)["input_ids"]) == text
        assert (one.eos_token, one.pad_token) == ("<|im_end|>", "<|endoftext|>")
        marked = one("<|im_start|>a<think></think><|im_end|>")["input_ids"]
        assert len(marked) == 5
        assert one.decode(marked, skip_special_tokens=True) == "a<think></think>", "reasoning is ordinary text"
    assert tokenizer.tokenize("120") == ["1", "2", "0"]


def test_template_in_the_manner_of_qwen3(tokenizer):
    def reply(text):
        return {"role": "assistant", "reasoning_content": f"\nwhy {text}\n", "content": text}

    question = {"role": "user", "content": "same?"}  # twice the same: its place counts, not its text
    messages = [{"role": "system", "content": "S"}, question, reply("a"), question, reply("b")]
    messages += [{"role": "tool", "content": "T"}, reply("c"), {"role": "assistant", "content": "d"}]
    assert tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True) == (
        "<|im_start|>system\nS<|im_end|>\n<|im_start|>user\nsame?<|im_end|>\n<|im_start|>assistant\na<|im_end|>\n"
        "<|im_start|>user\nsame?<|im_end|>\n<|im_start|>assistant\n<think>\nwhy b\n</think>\n\nb<|im_end|>\n"
        "<|im_start|>tool\nT<|im_end|>\n<|im_start|>assistant\n<think>\nwhy c\n</think>\n\nc<|im_end|>\n"
        "<|im_start|>assistant\nd<|im_end|>\n<|im_start|>assistant\n"
    )


def test_template_has_tools(tokenizer):
    """Found: the model that the README offers for trying things refused the README's own example with a tool."""
    tools = [{"type": "function", "function": {"name": "add", "parameters": {"type": "object", "properties": {}}}}]
    call = {"id": "1", "type": "function", "function": {"name": "add", "arguments": '{"a": 2, "b": 2}'}}
    messages = [
        {"role": "user", "content": "2 + 2?"},
        {"role": "assistant", "reasoning_content": "I can add.", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "1", "content": "4"},
        {"role": "assistant", "content": "It is 4."},
    ]
    first, last = render_passes(messages, tokenizer, tools=tools)
    trained = tokenizer.decode(np.asarray(first.input_ids)[np.asarray(first.loss_mask)])
    wanted = '<tool_call>\n{"name": "add", "arguments": {"a": 2, "b": 2}}\n</tool_call>\n<|im_end|>'
    assert trained == f"<think>\nI can add.\n</think>\n\n{wanted}"
    text = tokenizer.decode(last.input_ids)
    assert text.startswith('<|im_start|>tools\n{"type": "function", "function": {"name": "add"') and wanted in text


def test_tree_is_smaller_than_the_passes(conversations, tokenizer):
    for conversation in conversations[:20]:
        passes = render_passes(conversation["messages"], tokenizer)
        assert len(passes) == len(conversation["answers"])
        for one, reply in zip(passes, assistants(conversation), strict=True):
            expected = f"<think>\n{reply['reasoning_content']}\n</think>\n\n{reply['content']}<|im_end|>"
            assert tokenizer.decode(one.input_ids[one.loss_mask]) == expected
            assert "<think>" not in tokenizer.decode(one.input_ids[~np.asarray(one.loss_mask)])
        tree = TokenTree.from_passes(passes)
        assert len(tree) < tree.pass_lengths.sum()
        assert tree.num_targets == sum(one.loss_mask.sum() for one in passes)


def test_tiny_model_trains_on_trees(conversations, tokenizer):
    state = torch.random.get_rng_state()
    model, same, other = (demo.tiny_model(tokenizer, seed) for seed in (0, 0, 1))
    assert torch.equal(torch.random.get_rng_state(), state)
    assert 0.5e6 < sum(p.numel() for p in model.parameters()) < 2e6
    assert model.config._attn_implementation == "flexmask" and model.dtype == torch.float32
    weights = [dict(m.named_parameters()) for m in (model, same, other)]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    name = "model.layers.0.mlp.up_proj.weight"
    assert not torch.equal(weights[0][name], weights[2][name])

    batch = OnePassCollator(tokenizer)(conversations[:1])
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(3):
        loss = model(**batch).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[0] == pytest.approx(np.log(len(tokenizer)), abs=1) and losses[-1] < losses[0] - 0.5

import copy

import numpy as np
import pytest
from templates import CHAT, PLAIN, TOOL_LOOP, TOOLS, answer, call, tokenizer, user
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from flexmask import ConversationError, TokenTree, render_passes


def rendered(family, messages, **options):
    """[(prompt, completion)] as text."""
    tok = tokenizer(family)
    texts = []
    for p in render_passes(messages, tok, **options):
        start = int(np.argmax(p.loss_mask))
        assert p.loss_mask[start:].all() and not p.loss_mask[:start].any()
        texts.append((tok.decode(p.input_ids[:start]), tok.decode(p.input_ids[start:])))
    return texts


def completions(family, messages, **options):
    return [completion for _, completion in rendered(family, messages, **options)]


EXPECTED = {  # what each family generates for the last message of CHAT
    "qwen3": "<think>\nThinking of three.\n</think>\n\nAnswer three.<|im_end|>",
    "qwen3_5_think": "Thinking of three.\n</think>\n\nAnswer three.<|im_end|>",
    "glm4moe": "\n<think>Thinking of three.</think>\nAnswer three.<|user|>",
    "gptoss": "<|channel|>analysis<|message|>Thinking of three.<|end|><|start|>assistant<|channel|>final<|message|>"
    "Answer three.<|return|>",
    "deepseek_r1_distill": "Thinking of three.\n</think>\n\nAnswer three.<｜end▁of▁sentence｜>",
    "nemotron_3_nano": "Thinking of three.\n</think>\nAnswer three.<|im_end|>",
}


@pytest.mark.parametrize("family", EXPECTED)
def test_reasoning_families(family):
    """Each pass: the inference prompt, token for token, then the generated message; history holds no reasoning."""
    tok = tokenizer(family)
    passes = render_passes(CHAT, tok)
    for k, (p, i) in enumerate(zip(passes, (2, 4, 6), strict=True)):
        prompt = tok.apply_chat_template(CHAT[:i], add_generation_prompt=True)["input_ids"]
        assert p.input_ids[: len(prompt)].tolist() == prompt, "what inference feeds the model"
        assert int(np.argmax(p.loss_mask)) == len(prompt)
        assert "Thinking of" not in tok.decode(prompt) and f"Answer {['one', 'two', 'three'][k]}" not in tok.decode(
            prompt
        )
    assert completions(family, CHAT)[-1] == EXPECTED[family]


@pytest.mark.parametrize("family", EXPECTED)
def test_turns_without_reasoning_are_trained(family):
    """The bug guarded: the published code never trains a turn without reasoning."""
    for with_reasoning in ((), (2,)):
        messages = [m if i in with_reasoning else PLAIN[i] for i, m in enumerate(CHAT)]
        found = completions(family, messages)
        assert len(found) == 3
        assert all(text in c for text, c in zip(("Answer one.", "Answer two.", "Answer three."), found, strict=True))


@pytest.mark.parametrize("family", ["llama3", "qwen2_5", "phi3"])
def test_templates_without_reasoning_train_plain_multi_turn_in_one_chain(family):
    passes = render_passes(PLAIN[1:], tokenizer(family))
    tree = TokenTree.from_passes(passes)
    if family != "phi3":  # Phi-3 writes a newline after an answer, which its tokenizer here keeps apart
        assert (tree.subtree_end == len(tree)).sum() >= len(tree) - 2, "one chain: nothing is stored twice"
    assert tree.num_targets == sum(int(np.sum(p.loss_mask)) for p in passes)
    ends = {"llama3": "<|eot_id|>", "qwen2_5": "<|im_end|>", "phi3": "<|end|>"}
    assert completions(family, PLAIN[1:])[-1] == "Answer three." + ends[family]


@pytest.mark.parametrize("family", ["llama3", "qwen2_5", "phi3"])
def test_dropped_reasoning_is_an_error_and_a_format_mends_it(family):
    with pytest.raises(
        ConversationError, match=r"message 1 \(assistant\): the chat template drops.*reasoning_format=…"
    ):
        render_passes(CHAT[1:], tokenizer(family))
    format = "<think>\n{reasoning}\n</think>\n\n"
    found = rendered(family, CHAT[1:], reasoning_format=format)
    assert found[-1][1].startswith("<think>\nThinking of three.\n</think>\n\nAnswer three.")
    assert "Thinking" not in found[-1][0]


def test_reasoning_that_only_repeats_the_answer_is_not_mistaken_for_rendered():
    """The reasoning text occurs in the answer, but the template dropped the reasoning."""
    with pytest.raises(ConversationError, match="drops its reasoning"):
        render_passes([user("Q"), answer("The answer is 4", "4")], tokenizer("llama3"))


@pytest.mark.parametrize("field", ["reasoning_content", "reasoning", "thinking", "content"])
@pytest.mark.parametrize("family", EXPECTED)
def test_all_spellings_of_reasoning_are_the_same(family, field):
    messages = copy.deepcopy(CHAT)
    for m in messages:
        reasoning = m.pop("reasoning_content", None)
        if reasoning and field == "content":
            m["content"] = f"<think>\n{reasoning}\n</think>\n\n{m['content']}"
        elif reasoning:
            m[field] = reasoning
    assert rendered(family, messages) == rendered(family, CHAT)


@pytest.mark.parametrize("family", ["qwen3", "glm4moe", "gptoss", "qwen3_5_think", "nemotron_3_nano"])
def test_tool_loop_keeps_reasoning_inside_and_drops_it_afterwards(family):
    found = rendered(family, TOOL_LOOP, tools=TOOLS)
    assert len(found) == 4
    assert "add" in found[0][0], "the tools are described"
    assert "First 1 + 2." in found[1][0] and "First 1 + 2." in found[2][0], "interleaved reasoning is context"
    assert "Then 3 + 3." in found[2][0]
    assert "First 1 + 2." not in found[3][0] and "The tool says" not in found[3][0], "gone after the turn"
    for (_, completion), text in zip(found, ("First 1", "Then 3", "The tool says 6.", "6 + 10"), strict=True):
        assert text in completion
    ends = {"glm4moe": "<|observation|>", "gptoss": "<|call|>"}
    assert found[0][1].endswith(ends.get(family, "<|im_end|>"))
    assert "It is 6." in found[2][1]


def test_a_final_message_ends_differently_as_target_and_in_history():
    (_, first), (second_prompt, _), _ = rendered("gptoss", CHAT)
    assert first.endswith("<|return|>") and "<|return|>" not in second_prompt and "Answer one.<|end|>" in second_prompt


def test_opting_out_of_training():
    messages = copy.deepcopy(CHAT)
    messages[4]["train"] = False
    assert completions("qwen3", messages) == [completions("qwen3", CHAT)[k] for k in (0, 2)]
    with pytest.raises(ConversationError, match="no assistant message to train"):
        render_passes([m | {"train": False} for m in CHAT], tokenizer("qwen3"))


def test_a_message_is_weighted():
    messages = copy.deepcopy(CHAT)
    messages[2]["weight"], messages[4]["weight"] = 0.25, 0
    assert [p.weight for p in render_passes(messages, tokenizer("qwen3"))] == [0.25, 1.0]
    with pytest.raises(ConversationError, match="weight is -1, expected a number that is not negative"):
        render_passes([m | {"weight": -1} for m in CHAT], tokenizer("qwen3"))


def test_template_arguments_and_explicit_template_reach_the_template():
    prompt, completion = rendered("qwen3", PLAIN, enable_thinking=False)[0]
    assert prompt.endswith("<think>\n\n</think>\n\n") and completion == "Answer one.<|im_end|>"
    with pytest.raises(ConversationError, match="does not continue its own prompt"):
        render_passes(CHAT, tokenizer("qwen3"), enable_thinking=False)
    template = "{% for m in messages %}[{{ m.role }}]{{ m.content }}<|im_end|>{% endfor %}"
    template += "{% if add_generation_prompt %}[assistant]{% endif %}"
    found = rendered("qwen3", PLAIN, chat_template=template)
    assert found[0] == (
        "[system]Be brief.<|im_end|>[user]First question?<|im_end|>[assistant]",
        "Answer one.<|im_end|>",
    )


def test_end_of_turn_is_added_where_the_template_writes_none():
    template = "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}"
    template += "{% if add_generation_prompt %}[assistant]{% endif %}"
    assert completions("qwen3", PLAIN[1:3], chat_template=template) == ["Answer one.<|im_end|>"], "the eos token"
    options = {"chat_template": template, "end_of_turn": "<|endoftext|>"}
    assert completions("qwen3", PLAIN[1:3], **options) == ["Answer one.<|endoftext|>"]


def test_template_whose_finished_conversations_lose_all_reasoning():
    """Kimi-K2-Thinking's way: a stub in place of the reasoning, the last message included."""
    template = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}<think></think>{% endif %}"
        "{{ m.content }}<|im_end|>{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    found = rendered("qwen3", CHAT, chat_template=template)
    assert found[-1][1] == "<think>Thinking of three.</think>Answer three.<|im_end|>"
    assert "<think></think>Answer two." in found[-1][0]


def test_prompt_and_completion_are_tokenised_separately():
    """A merge across the border would be a token the model can never generate there."""
    tok = tokenizer("qwen3")
    template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    messages = [user("the answ"), answer("er is 42")]
    [p] = render_passes(messages, tok, chat_template=template)
    start = int(np.argmax(p.loss_mask))
    assert p.input_ids[:start].tolist() == tok("the answ", add_special_tokens=False)["input_ids"]
    assert len(p.input_ids) > len(tok("the answer is 42<|im_end|>", add_special_tokens=False)["input_ids"])


def test_tokenizers_that_write_a_space_before_the_first_word():
    """SentencePiece's dummy prefix: tokenised on its own, a completion would begin with a space never generated."""
    vocab = {"<unk>": 0, "</s>": 1, "▁": 2, "▁Yes": 3, "Yes": 4, "▁Q": 5, ":": 6, "a": 7, "▁a": 8}
    backend = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(":", "isolated"), pre_tokenizers.Metaspace(prepend_scheme="first")]
    )
    tok = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>", unk_token="<unk>")
    tok.chat_template = (
        "{% for m in messages %}{{ m.content }}{% if m.role == 'assistant' %}</s>{% endif %}{% endfor %}"
    )
    [p] = render_passes([user("Q:"), answer("Yes")], tok)
    assert p.input_ids.tolist() == [5, 6, 4, 1]


def test_calls_are_batched(monkeypatch):
    """24 turns: a handful of template and tokeniser calls, not one or two per turn."""
    tok = tokenizer("qwen3")
    messages = [m for i in range(24) for m in (user(f"Q{i}"), answer(f"A{i}", f"T{i}"))]
    render_passes(messages, tok)  # what is found out once per tokenizer
    calls = []
    for name in ("apply_chat_template", "__call__"):
        original = getattr(type(tok), name)
        monkeypatch.setattr(
            type(tok), name, lambda *a, _original=original, _name=name, **k: calls.append(_name) or _original(*a, **k)
        )
    assert len(render_passes(messages, tok)) == 24
    assert calls.count("apply_chat_template") <= 3 and calls.count("__call__") <= 1


@pytest.mark.parametrize(
    "messages, text",
    [
        ([], "the conversation is empty"),
        ("hello", "messages is str, expected a list"),
        ([user("Q")], "no assistant message to train"),
        (["hello"], "message 0 is str, expected an object"),
        ([{"content": "Q"}], "message 0: role is None, expected one of system"),
        ([{"role": "bot", "content": "Q"}], "message 0: role is 'bot'"),
        (
            [{"role": "user", "content": [{"type": "text"}]}],
            r"message 0 \(user\): content has a part .* expected parts of type text",
        ),
        ([{"role": "user"}], r"message 0 \(user\): content is NoneType"),
        ([user("Q"), answer(3)], r"message 1 \(assistant\): content is int"),
        ([user("Q"), answer("A", 5)], r"message 1 \(assistant\): reasoning_content is int"),
        ([user("Q"), answer("A", train="no")], r"message 1 \(assistant\): train is 'no'"),
        ([user("Q"), answer("A", "x", thinking="y")], "reasoning_content and thinking hold different reasoning"),
        ([user("Q"), answer("<think>x</think>A", "y")], "reasoning_content and content hold different reasoning"),
        (
            [user("Q"), answer("", tool_calls=["x"])],
            "message 1.*tool_calls has 'x'|message 1: the chat template failed",
        ),
    ],
)
def test_bad_conversations(messages, text):
    with pytest.raises(ConversationError, match=text):
        render_passes(messages, tokenizer("qwen3"))


def test_template_that_drops_content_or_tool_calls_is_an_error():
    with pytest.raises(ConversationError, match=r"message 1.*does not render its call of the tool 'add'"):
        render_passes([user("Q"), call(1, 2)], tokenizer("llama3"))
    with pytest.raises(ConversationError, match=r"message 1.*does not render its content as it is"):
        render_passes(PLAIN[1:3], tokenizer("qwen3"), chat_template="{% for m in messages %}{{ m.role }}{% endfor %}")


def test_errors_of_the_template_name_the_message():
    template = "{% for m in messages %}{% if m.content == 'Second question?' %}{{ raise_exception('no!') }}{% endif %}"
    template += "{{ m.content }}{% endfor %}"
    with pytest.raises(
        ConversationError, match=r"message 4 .assistant.: the chat template failed while rendering its context.*no!"
    ):
        render_passes(PLAIN, tokenizer("qwen3"), chat_template=template)


def test_tokenizer_without_template_and_bad_format():
    tok = copy.deepcopy(tokenizer("qwen3"))
    tok.chat_template = None
    with pytest.raises(ConversationError, match="has no chat template; pass chat_template="):
        render_passes(CHAT, tok)
    with pytest.raises(ValueError, match="exactly once"):
        render_passes(CHAT, tokenizer("qwen3"), reasoning_format="<think>")


def test_unknown_keys_are_kept_and_ignored():
    messages = [m | {"id": 7, "source": {"x": 1}} for m in CHAT]
    assert rendered("qwen3", messages) == rendered("qwen3", CHAT)


def test_a_template_without_tools_is_refused_and_not_trained_with_empty_answers():
    """The bug guarded: the tool's name stood in the reasoning, so a call that was not rendered went unnoticed."""
    from flexmask import demo

    tool = {"type": "function", "function": {"name": "add", "parameters": {"type": "object", "properties": {}}}}
    call = {"type": "function", "function": {"name": "add", "arguments": {}}}
    messages = [user("2 + 2?"), answer("", "I can add.", tool_calls=[call])]
    with_tools = demo.CHAT_TEMPLATE
    calls = (
        with_tools.index("    {%- for call"),
        with_tools.index("    {{- '<|im_end|>", with_tools.index("    {%- for call")),
    )
    without = with_tools[with_tools.index("{%- set last") : calls[0]] + with_tools[calls[1] :]
    plain = demo.train_tokenizer(["I can add."], chat_template=without)
    with pytest.raises(ConversationError, match="does not render its call of the tool 'add'"):
        render_passes(messages, plain)
    with pytest.raises(ConversationError, match="does not render the tool 'add'; leave tools out"):
        render_passes([user("Hi"), answer("Ho")], plain, tools=[tool])

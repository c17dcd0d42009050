"""Kinds of templates, each in its smallest form: what is trained on them, and what is refused.

Each stands for public templates that are named with it; what is right was found by reading them.
"""

import copy
import traceback
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import trl
from templates import TOOLS, answer, call, tokenizer, user

from flexmask import ConversationError, TokenTree, render_passes

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
HEAD = "<|im_start|>user\nQ<|im_end|>\n<|im_start|>assistant\n"
WITH_TOOLS = (
    "{% if tools %}<|im_start|>tools\n{{ tools | tojson }}<|im_end|>\n{% endif %}{% for m in messages %}"
    "{% if m.role in ('system', 'user', 'tool') %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n"
    "{% elif m.role == 'assistant' %}<|im_start|>assistant\n{{ m.content }}{% for c in m.tool_calls or [] %}<call>"
    '{"name": "{{ c.function.name }}", "arguments": {{ c.function.arguments | tojson }}}</call>{% endfor %}<|im_end|>\n'
    "{% endif %}{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def turns(template, messages, **options):
    """[(prompt, completion)] as text."""
    tok = copy.deepcopy(tokenizer("qwen3"))
    tok.chat_template = template
    texts = []
    for p in render_passes(messages, tok, **options):
        at = int(np.argmax(p.loss_mask))
        texts.append((tok.decode(p.input_ids[:at]), tok.decode(p.input_ids[at:])))
    return texts


def completions(template, messages, **options):
    return [completion for _, completion in turns(template, messages, **options)]


# Thoughts.


@pytest.mark.parametrize("shows_reasoning", ["true", "false"])
def test_a_prompt_that_opens_a_thought_and_a_history_that_has_only_its_end(shows_reasoning):
    """GLM-4.7, DeepSeek-V3.1: the closing tag was written twice."""
    template = (
        "{% for m in messages %}{% if m.role == 'user' %}<u>{{ m.content }}{% else %}<a>{% if m.reasoning_content and SHOWN %}"
        "<think>{{ m.reasoning_content }}</think>{% else %}</think>{% endif %}{{ m.content }}<|im_end|>{% endif %}"
        "{% endfor %}{% if add_generation_prompt %}<a><think>{% endif %}"
    ).replace("SHOWN", shows_reasoning)
    found = turns(template, [user("Q"), answer("A"), user("Q2"), answer("B", "R")])
    assert [c for _, c in found] == ["</think>A<|im_end|>", "R</think>B<|im_end|>"]
    assert found[1][0] == "<u>Q<a></think>A<|im_end|><u>Q2<a><think>"


def test_space_that_a_content_begins_with_is_trained_where_the_template_writes_it():
    template = (
        "{% for m in messages %}{% if m.role == 'user' %}<u>{{ m.content }}{% else %}<a></think>{{ m.content }}<|im_end|>"
        "{% endif %}{% endfor %}{% if add_generation_prompt %}<a><think>{% endif %}"
    )
    assert completions(template, [user("Q"), answer("  A")]) == ["</think>  A<|im_end|>"]
    assert completions(
        template.replace("</think>{{ m.content }}", "</think>{{ m.content | trim }}"), [user("Q"), answer("  A")]
    ) == ["</think>A<|im_end|>"]


def test_an_answer_is_never_inside_an_open_thought():
    """Nemotron-Nano-v2: the last answer repeats the tag that the prompt opened."""
    template = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' and loop.last %}<think>\n{% endif %}"
        "{{ m.content }}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n{% endif %}"
    )
    assert completions(template, [user("Q"), answer("A", "R")]) == ["R\n</think>\n\nA<|im_end|>"]
    assert completions(template, [user("Q"), answer("A")]) == ["\n</think>\n\nA<|im_end|>"]


def test_the_space_after_a_thought_is_what_the_template_shows_elsewhere():
    """Nemotron 3, Bielik: one newline, where two were guessed."""
    template = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.reasoning_content %}<think>\n{{ m.reasoning_content }}\n"
        "</think>\n{% endif %}{{ m.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n{% endif %}"
    )
    found = completions(template, [user("Q"), answer("A", "R"), user("Q2"), answer("B")])
    assert found == ["R\n</think>\nA<|im_end|>", "\n</think>\nB<|im_end|>"]


def test_a_stub_that_only_the_prompt_has():
    """Gemma 4, Command R7B, QwQ without thinking: the empty block is in the prompt, and in no history."""
    stub = "<|channel>thought\n<channel|>"
    template = CHATML.replace("<|im_start|>assistant\n{% endif %}", f"<|im_start|>assistant\n{stub}{{% endif %}}")
    assert turns(template, [user("Q"), answer("A")]) == [(HEAD + stub, "A<|im_end|>")]
    with pytest.raises(ConversationError, match=r"message 1 \(assistant\): .*does not continue its own prompt"):
        turns(template, [user("Q"), answer("A", "R")])


def test_calls_behind_a_thought_that_the_template_never_shows():
    """DeepSeek-R1 distills: what stands before the name of a call was lost."""
    template = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}{% for c in m.tool_calls or [] %}<call>"
        "{{ c.function.name }} {{ c.function.arguments | tojson }}</call>{% endfor %}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n{% endif %}"
    )
    expected = 'R\n</think>\n\n<call>add {"a": 1, "b": 2}</call><|im_end|>'
    assert completions(template, [user("Q"), call(1, 2, "R")]) == [expected]


SWITCH = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' and loop.last %}<think>\n"
    "{{ m.reasoning_content or '' }}\n</think>\n\n{% endif %}{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% if NAME is defined and not NAME %}<think>\n\n</think>\n\n"
    "{% endif %}{% endif %}"
)
MIXED = [user("Q"), answer("A", "R"), user("Q2"), answer("B")]
EMPTY = "<think>\n\n</think>\n\n"


@pytest.mark.parametrize("switch", ["enable_thinking", "thinking"])
def test_turns_without_reasoning(switch):
    """Qwen3, SmolLM3, Granite: of a conversation that has both kinds of turns."""
    template = SWITCH.replace("NAME", switch)
    thought = "<think>\nR\n</think>\n\nA<|im_end|>"
    counts = Counter()
    found = turns(template, MIXED, counts=counts)
    assert [c for _, c in found] == [thought, "B<|im_end|>"] and found[1][0].endswith(EMPTY)
    assert not found[0][0].endswith(EMPTY) and counts == {"empty thoughts in the prompt": 1}
    counts = Counter()
    assert completions(template, MIXED, empty_reasoning="keep", counts=counts) == [thought, EMPTY + "B<|im_end|>"]
    assert counts == {"empty thoughts trained": 1}
    counts = Counter()
    assert completions(template, MIXED, empty_reasoning="drop", counts=counts) == [thought]
    assert counts == {"empty thoughts: messages not trained": 1}
    with pytest.raises(ConversationError, match=r"message 3 \(assistant\): has no reasoning, and .* an empty thought"):
        turns(template, MIXED, empty_reasoning="error")
    with pytest.raises(ConversationError, match="all its messages have empty thoughts"):
        turns(template, MIXED[2:], empty_reasoning="drop")


def test_without_a_switch_the_empty_thought_is_trained_and_counted():
    counts = Counter()
    found = completions(SWITCH.replace("NAME", "quiet"), MIXED, counts=counts)
    assert found[1] == EMPTY + "B<|im_end|>" and counts == {"empty thoughts trained": 1}


def test_the_errors_of_a_prompt_without_thinking_name_the_arguments_of_the_template():
    template = CHATML.replace(
        "<|im_start|>assistant\n{% endif %}",
        "<|im_start|>assistant\n{% if thinking_mode != 'on' %}</think>{% endif %}{{ reasoning_effort }}{% endif %}",
    )
    with pytest.raises(ConversationError, match=r"pass template arguments \(reasoning_effort=…, thinking_mode=…\)"):
        turns(template, [user("Q"), answer("A", "R")])
    off = SWITCH.replace("NAME is defined and not NAME", "not thinking").replace(
        "m.role == 'assistant' and", "m.role == 'assistant' and thinking and"
    )
    with pytest.raises(ConversationError, match=r"thinking=(…|True)"):
        turns(off, [user("Q"), answer("A", "R")])
    assert completions(off, [user("Q"), answer("A", "R")], thinking=True) == ["<think>\nR\n</think>\n\nA<|im_end|>"]


# What stands behind a message.


def test_a_generation_prompt_that_is_always_there_is_not_trained():
    """Command R7B: the template's tail was trained."""
    template = CHATML.partition("{% if add")[0] + "{{ '<|im_start|>assistant\n' }}"
    messages = [user("Q"), answer("A"), user("Q2"), answer("B")]
    assert completions(template, messages) == ["A<|im_end|>", "B<|im_end|>"]


def test_two_ends_behind_the_last_message():
    """Apriel 1.5: a second token closes the text where nothing follows."""
    template = CHATML.replace(
        "<|im_end|>\n{% endfor",
        "\n<|im_end|>\n{% if loop.last and not add_generation_prompt %}<|endoftext|>{% endif %}{% endfor",
    )
    assert completions(template, [user("Q"), answer("A")]) == ["A\n<|im_end|>"]


# Calls and tools.


def test_arguments_as_json_text_are_those_of_the_object():
    as_text = call(1, 2)
    as_text["tool_calls"][0]["function"]["arguments"] = '{"a":1,"b":2}'
    for template in (WITH_TOOLS, WITH_TOOLS.replace("c.function.arguments | tojson", "c.function.arguments + ''")):
        [one], [other] = (completions(template, [user("Q"), message], tools=TOOLS) for message in (call(1, 2), as_text))
        assert one == other == '<call>{"name": "add", "arguments": {"a": 1, "b": 2}}</call><|im_end|>'


def test_names_that_stand_in_other_texts_do_not_hide_what_is_dropped():
    with pytest.raises(ConversationError, match="does not render the tool 'add'"):
        turns(CHATML, [user("Please add 2 and 2"), answer("4")], tools=TOOLS)
    call_beside_text = answer("I add them.", tool_calls=call(2, 2)["tool_calls"])
    with pytest.raises(ConversationError, match=r"message 1 .*does not render its call of the tool 'add'"):
        turns(CHATML, [user("2 + 2?"), call_beside_text])


def test_arguments_that_are_dropped():
    template = WITH_TOOLS.replace("{{ c.function.arguments | tojson }}", "{}")
    with pytest.raises(ConversationError, match=r"its call of the tool 'add' as it is \('count' is missing\)"):
        turns(template, [user("Q"), answer("", tool_calls=[{"name": "add", "arguments": {"count": 2}}])])


def test_tools_under_another_argument():
    """SmolLM3's xml_tools: the error names it, and it works."""
    template = WITH_TOOLS.replace("tools", "xml_tools")
    with pytest.raises(
        ConversationError, match=r"does not render the tool 'add'.*pass them as it takes them \(xml_tools=…\)"
    ):
        turns(template, [user("Q"), answer("A")], tools=TOOLS)
    assert "Add two numbers" in turns(template, [user("Q"), answer("A")], xml_tools=TOOLS)[0][0]


def test_a_call_in_a_loop_that_history_writes_in_another_way():
    """DeepSeek-V3 runs the calls of a loop together, so that the second one does not begin as a model begins it."""
    template = (
        "{% set ns = namespace(first=true) %}{% for m in messages %}{% if m.role == 'user' %}<u>{{ m.content }}<a>"
        "{% elif m.role == 'tool' %}<out>{{ m.content }}{% elif m.tool_calls %}{% if ns.first %}<calls>{% endif %}"
        "{% set ns.first = false %}<c>{{ m.tool_calls[0].function.name }}{{ m.tool_calls[0].function.arguments | tojson }}"
        "<|im_end|>{% else %}{{ m.content }}<|im_end|>{% endif %}{% endfor %}"
        "{% if messages[-1].role == 'tool' and add_generation_prompt %}</out>{% endif %}"
    )
    result = {"role": "tool", "content": "3"}
    found = completions(template, [user("Q"), call(1, 2), result, call(3, 3), result, answer("6")])
    assert found[:2] == [f'<calls><c>add{{"a": {a}, "b": {b}}}<|im_end|>' for a, b in ((1, 2), (3, 3))]


# Opens the list of calls once in a conversation, as DeepSeek-V3 does.
OPENS_CALLS_ONCE = (
    "{% set ns = namespace(calls=0) %}{% for m in messages %}{% if m.role == 'user' %}<u>{{ m.content }}"
    "{% elif m.role == 'tool' %}<out>{{ m.content }}{% elif m.tool_calls %}"
    "{% if not ns.calls %}<a>FIRST{% else %}LATER{% endif %}"
    "{{ m.tool_calls[0].function.name }}{{ m.tool_calls[0].function.arguments | tojson }}<|im_end|>"
    "{% set ns.calls = ns.calls + 1 %}{% else %}<a>{{ m.content }}<|im_end|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '</out>' if messages[-1].role == 'tool' else '<a>' }}{% endif %}"
)
RESULT = {"role": "tool", "content": "3"}
IN_A_LOOP, AFTER_A_USER = [RESULT], [RESULT, answer("6", train=False), user("More?")]


@pytest.mark.parametrize("after", [IN_A_LOOP, AFTER_A_USER])
@pytest.mark.parametrize(
    "first, later", [("<calls><c>", "<c>"), ("<calls>\n<c>", "\n<c>"), ("<calls>\n<c>", "<c>"), ("<calls>", "")]
)
def test_a_call_that_history_writes_without_its_first_tag(first, later, after):
    """DeepSeek-V3, in a loop and after a user. A model that left the tag out would not be understood."""
    template = OPENS_CALLS_ONCE.replace("FIRST", first).replace("LATER", later)
    assert completions(template, [user("Q"), call(1, 2), *after, call(3, 3)]) == [
        f'{first}add{{"a": {a}, "b": {b}}}<|im_end|>' for a, b in ((1, 2), (3, 3))
    ]


@pytest.mark.parametrize("after", [IN_A_LOOP, AFTER_A_USER])
@pytest.mark.parametrize(
    "first, later",
    [
        ("<c>{{ ns.calls }} ", "<c>{{ ns.calls }} "),
        ("<call_{{ ns.calls }}><name>", "<call_{{ ns.calls }}><name>"),
        ("<calls><c>", "<more><c>"),
        ("<calls>1. ", "2. "),
        ("<c>", "{{ ns.calls }}. <c>"),
    ],
)
def test_an_opening_that_only_this_conversation_has(first, later, after):
    """Cohere2MoE numbers its calls: what a shorter conversation shows is not what opens the second."""
    template = OPENS_CALLS_ONCE.replace("FIRST", first).replace("LATER", later)
    with pytest.raises(ConversationError, match=r"message \d \(assistant\): .* does not continue its own prompt"):
        turns(template, [user("Q"), call(1, 2), *after, call(3, 3)])


# Leaves out the content beside all calls but the first, too.
DROPS_LATER_CONTENT = OPENS_CALLS_ONCE.replace("<a>FIRST", "<a>{{ m.content }}FIRST")
BESIDE = "messages with content beside calls that later prompts leave out"


def beside(content, a, b):
    return call(a, b) | {"content": content}


@pytest.mark.parametrize("after", [IN_A_LOOP, AFTER_A_USER])
@pytest.mark.parametrize("content", ["And now.", "  And now.\n\n"])
@pytest.mark.parametrize("first, later", [("<calls>\n<c>", "\n<c>"), ("\n<c>", "\n<c>"), ("<calls>", "")])
def test_content_beside_a_later_call_that_history_leaves_out(first, later, content, after):
    """DeepSeek-V3: the model writes it as it does beside a first call, and later prompts are without it, as at inference."""
    template = DROPS_LATER_CONTENT.replace("FIRST", first).replace("LATER", later)
    counts = Counter()
    messages = [user("Q"), beside("First.", 1, 2), *after, beside(content, 3, 3), RESULT, answer("6")]
    found = turns(template, messages, counts=counts)
    assert found[0][1] == f'First.{first}add{{"a": 1, "b": 2}}<|im_end|>'
    assert found[1][1] == f'{content}{first}add{{"a": 3, "b": 3}}<|im_end|>'
    assert content.strip() not in found[2][0] and f'{later.strip()}add{{"a": 3, "b": 3}}' in found[2][0]
    assert counts[BESIDE] == 1


def test_content_beside_calls_that_stays_in_history_is_not_counted():
    counts = Counter()
    turns(WITH_TOOLS, [user("Q"), beside("First.", 1, 2), RESULT, answer("6")], counts=counts)
    assert BESIDE not in counts


@pytest.mark.parametrize(
    "first, later",
    [
        ("<c>{{ ns.calls }} ", "<c>{{ ns.calls }} "),
        ("<calls><c>", "<more><c>"),
        ("<calls><c>", "{{ m.tool_calls[0].function.name }}!<c>"),
        ("<c>", "{{ ns.calls }}. <c>"),
        ("\n", "{{ ns.calls }}. "),
    ],
)
def test_content_left_out_beside_a_call_that_is_written_in_another_way(first, later):
    template = DROPS_LATER_CONTENT.replace("FIRST", first).replace("LATER", later)
    with pytest.raises(
        ConversationError, match=r"message 3 \(assistant\): .*its content as it is beside its calls; leave it"
    ):
        turns(template, [user("Q"), beside("First.", 1, 2), RESULT, beside("Then.", 3, 3)])


def test_a_number_before_content_that_later_calls_leave_out():
    template = DROPS_LATER_CONTENT.replace("<a>{{ m.content }}", "<a>{{ ns.calls }}: {{ m.content }}")
    template = template.replace("FIRST", "<c>").replace("LATER", "{{ ns.calls }}: <c>")
    with pytest.raises(ConversationError, match=r"message 3 \(assistant\): .*its content as it is beside its calls"):
        turns(template, [user("Q"), beside("First.", 1, 2), RESULT, beside("Then.", 3, 3)])


# Continues its own prompt, and leaves out the content beside later calls.
CONTINUES = (
    "{% set ns = namespace(calls=0) %}{% for m in messages %}{% if m.role != 'assistant' %}<{{ m.role }}>{{ m.content }}"
    "<|im_end|>{% else %}<a>{% if m.tool_calls %}{% if not ns.calls %}CONTENT{% endif %}OPENING"
    "{{ m.tool_calls[0].function.name }}{{ m.tool_calls[0].function.arguments | tojson }}{% set ns.calls = ns.calls + 1 %}"
    "{% else %}{{ m.content }}{% endif %}<|im_end|>{% endif %}{% endfor %}{% if add_generation_prompt %}<a>{% endif %}"
)


@pytest.mark.parametrize("prompt, thought", [("<a>", ""), ("<a><think>", "</think>")])
@pytest.mark.parametrize("opening", ["<c>", "{{ '\\n' }}<c>", "[", ""])
@pytest.mark.parametrize("around", ["{}", "<plan>{}</plan>"])
def test_content_left_out_by_a_template_that_continues_its_prompt(around, opening, prompt, thought):
    """The bug guarded: the opening of the call stood before the content, too."""
    template = CONTINUES.replace("CONTENT", around.format("{{ m.content }}")).replace("OPENING", opening)
    template = template.replace("%}<a>{% endif %}", f"%}}{prompt}{{% endif %}}").replace(
        "<a>{% if", f"<a>{thought}{{% if"
    )
    for after in (IN_A_LOOP, [RESULT, answer("6", train=False), user("More?")]):
        messages = [user("Q"), beside("First.", 1, 2), *after, beside("Then.", 3, 3)]
        written = [thought + around.format(text) + opening.replace("{{ '\\n' }}", "\n") for text in ("First.", "Then.")]
        assert completions(template, messages) == [
            f'{text}add{{"a": {a}, "b": {b}}}<|im_end|>' for text, (a, b) in zip(written, ((1, 2), (3, 3)))
        ]


THOUGHT = "{% if m.reasoning_content %}Thought: {{ m.reasoning_content }}\n{% endif %}"


@pytest.mark.parametrize(
    "before, opening",
    [
        (THOUGHT, ""),
        (THOUGHT, "<c>"),
        ("", "{{ m.reasoning_content or '' }}<c>"),
        ("", "{% if m.reasoning_content %}<think>{{ m.reasoning_content }}</think>{% endif %}<c>"),
    ],
)
def test_content_left_out_beside_reasoning_whose_place_is_not_known(before, opening):
    """The bug guarded: the reasoning was trained twice."""
    template = CONTINUES.replace("CONTENT", "{{ m.content }}").replace("OPENING", opening)
    template = template.replace("<a>{% if m.", f"<a>{before}{{% if m.")
    messages = [user("Q"), beside("First.", 1, 2), RESULT, beside("Then.", 3, 3) | {"reasoning_content": "R"}]
    with pytest.raises(ConversationError, match=r"message 3 \(assistant\): .*its content as it is beside its calls"):
        turns(template, messages)
    template = template.replace(
        before, "{% if m.reasoning_content %}<think>{{ m.reasoning_content }}</think>{% endif %}"
    )
    if before:
        assert completions(template, messages)[1] == f'<think>R</think>Then.{opening}add{{"a": 3, "b": 3}}<|im_end|>'


def test_content_left_out_where_a_first_call_does_not_continue_its_prompt():
    template = CONTINUES.replace("CONTENT", "{{ m.content }}").replace("OPENING", "<c>")
    template = template.replace("<a>{% if m.", "{% if ns.calls or not m.tool_calls %}<a>{% endif %}{% if m.")
    messages = [user("Q"), beside("First.", 1, 2) | {"train": False}, RESULT, beside("Then.", 3, 3)]
    with pytest.raises(ConversationError, match=r"message 3 \(assistant\): .*its content as it is beside its calls"):
        turns(template, messages)


@pytest.mark.parametrize("role", ["system", "developer"])
def test_content_left_out_by_a_template_that_looks_at_its_first_message(role):
    """Where the message would be the first call, the conversation begins as it does."""
    mark = "{{ '<x>' if messages[0].role in ('system', 'developer') else raise_exception('no system') }}{{ m.content }}"
    template = CONTINUES.replace("CONTENT", mark).replace("OPENING", "<c>")
    messages = [{"role": role, "content": "S"}, user("Q"), beside("First.", 1, 2), RESULT, beside("Then.", 3, 3)]
    with pytest.raises(ConversationError, match=r"message 4 \(assistant\): .*cannot render a short conversation"):
        turns(template.replace("raise_exception('no system')", "1 / 0"), messages)
    template = template.replace("raise_exception('no system')", "''")
    assert completions(template, messages)[1] == '<x>Then.<c>add{"a": 3, "b": 3}<|im_end|>'


def test_content_that_a_template_never_writes_beside_calls():
    template = OPENS_CALLS_ONCE.replace("FIRST", "<c>").replace("LATER", "<c>")
    with pytest.raises(ConversationError, match=r"message 1 \(assistant\): .*does not render its content as it is"):
        turns(template, [user("Q"), beside("First.", 1, 2), RESULT, beside("Then.", 3, 3)])


SAID = "<think>{reasoning}</think>\n\n"


def test_a_thought_before_a_later_call():
    """DeepSeek-V3 drops it and opens no thought in the prompt behind a tool's answer, so how it is written must be said."""
    template = OPENS_CALLS_ONCE.replace("FIRST", "<calls><c>").replace("LATER", "<c>")
    asks = template[template.index("{% if add_generation_prompt %}") :]
    ends = "{% if messages[-1].role == 'tool' %}</out>{% elif add_generation_prompt %}<a>{% endif %}"
    messages = [user("Q"), call(1, 2), RESULT, call(3, 3, "And now.")]
    with pytest.raises(
        ConversationError, match=r"message 3 \(assistant\): .*drops its reasoning.*pass reasoning_format=…"
    ):
        turns(template.replace(asks, ends), messages)
    assert completions(template.replace(asks, ends), messages, reasoning_format=SAID)[1] == (
        '<think>And now.</think>\n\n<calls><c>add{"a": 3, "b": 3}<|im_end|>'
    )
    for piece in ("<ponder>", "</out>Reflect: "):  # of the prompt alone, and may begin a thought
        with pytest.raises(ConversationError, match=r"message 3 \(assistant\): .*does not continue its own prompt"):
            turns(template.replace("'</out>'", f"'{piece}'"), messages, reasoning_format=SAID)


def test_a_call_behind_a_tool_whose_prompt_opens_a_thought():
    """The bug guarded: what opens the call was lost, where history writes it in another way."""
    template = OPENS_CALLS_ONCE.replace("FIRST", "<c>").replace("LATER", "<c>").replace("'</out>'", "'</out><think>\n'")
    messages = [user("Q"), call(1, 2), RESULT, call(3, 3)]
    assert completions(template, messages)[1] == '\n</think>\n\n<c>add{"a": 3, "b": 3}<|im_end|>'
    messages[-1] = call(3, 3, "R")
    found = completions(template, messages, reasoning_format="<think>\n{reasoning}\n</think>\n\n")
    assert found[1] == 'R\n</think>\n\n<c>add{"a": 3, "b": 3}<|im_end|>'

    template = template.replace("'</out><think>\\n'", "'</out></turn><think>\\n'").replace("LATER", "<a><c>")
    assert completions(template, [*messages[:3], answer("B", "R")])[1] == "R\n</think>\n\nB<|im_end|>"
    assert completions(template, [*messages[:3], answer("B")])[1] == "\n</think>\n\nB<|im_end|>"


def test_a_tag_before_answers_that_only_some_conversations_have():
    template = (
        "{% for m in messages if m.role != 'system' %}{% if m.role == 'user' %}<u>{{ m.content }}{% else %}<a></think>"
        "{% if messages[0].role != 'system' %}<final>{% endif %}{{ m.content }}<|im_end|>{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ messages[0].content if messages[0].role == 'system' }}<a><think>{% endif %}"
    )
    assert completions(template, [user("Q"), answer("A")]) == ["</think><final>A<|im_end|>"]
    with pytest.raises(ConversationError, match=r"message 2 \(assistant\): .* does not continue its own prompt"):
        turns(template, [{"role": "system", "content": "S"}, user("Q"), answer("A")])


def test_reasoning_that_a_template_writes_behind_the_call():
    template = CHATML.replace("{{ m.content }}", "{{ m.content }}{{ m.reasoning_content }}")
    with pytest.raises(ConversationError, match=r"message 1 \(assistant\): .* writes its reasoning behind its content"):
        turns(template, [user("Q"), answer("A", "R")], reasoning_format=SAID)


@pytest.mark.parametrize("said", ["My steps:\n{reasoning}\nSo: ", "<reflect>{reasoning}</reflect>"])
def test_the_end_of_a_thought_that_is_said_is_one(said):
    """The bug guarded: reasoning_weight and empty_reasoning knew only </think> and the ends that a template shows."""
    before = said.partition("{reasoning}")[0]
    template = CHATML + f"{{% if add_generation_prompt %}}{before}{{% endif %}}"
    tok = copy.deepcopy(tokenizer("qwen3"))
    tok.chat_template = template
    [p] = render_passes([user("Q"), answer("A", "R")], tok, reasoning_format=said, reasoning_weight=0)
    trained = p.loss_mask & (np.array(p.token_weight) > 0)
    assert tok.decode(p.input_ids[trained]).strip() == "A<|im_end|>"
    messages, counts = [user("Q"), answer("A", "R"), user("Q2"), answer("B")], Counter()
    turns(template, messages, reasoning_format=said, counts=counts)
    assert counts["empty thoughts trained"] == 1
    assert len(turns(template, messages, reasoning_format=said, empty_reasoning="drop")) == 1
    with pytest.raises(ConversationError, match=r"message 3 .*would train an empty thought"):
        turns(template, messages, reasoning_format=said, empty_reasoning="error")


@pytest.mark.parametrize(
    "said, opening",
    [
        ("Steps: {reasoning} So ", "<|Source|>"),
        ("<|channel|>analysis<|message|>{reasoning}\nfinal\n", "<|channel|>final<|message|>"),
        ("({reasoning}>", "<c>"),
    ],
)
def test_a_said_format_whose_end_is_part_of_what_the_template_writes(said, opening):
    """The bug guarded: what opens the answer was cut in two."""
    template = CHATML.replace("{{ m.content }}", f"{{{{ '{opening}' if m.role == 'assistant' }}}}{{{{ m.content }}}}")
    messages = [user("Q"), answer("A"), user("Q2"), answer("B", "R")]
    for options in ({}, {"empty_reasoning": "drop"}):
        found = completions(template, messages, reasoning_format=said, **options)
        assert found == [f"{opening}A<|im_end|>", said.format(reasoning="R") + f"{opening}B<|im_end|>"]


@pytest.mark.parametrize(
    "prompt, opening, said, expected",
    [
        ("<think>", "", "<think>\n{reasoning}\n</think>\n\n", "\nR\n</think>\n\nA"),
        ("<think>\n", "", "<think>{reasoning}</think>", "R</think>A"),
        ("", "<answer>", "<think>{reasoning}</think>\n<answer>", "<think>R</think>\n<answer>A"),
    ],
)
def test_a_said_format_of_which_the_template_writes_a_part(prompt, opening, said, expected):
    """It is not written twice."""
    template = CHATML.replace("assistant\n{% endif %}", f"assistant\n{{{{ {prompt!r} }}}}{{% endif %}}")
    template = template.replace("{{ m.content }}", f"{{{{ '{opening}' if m.role == 'assistant' }}}}{{{{ m.content }}}}")
    assert completions(template, [user("Q"), answer("A", "R")], reasoning_format=said) == [f"{expected}<|im_end|>"]


def test_a_said_format_without_an_end_and_texts_that_hold_one():
    tok = copy.deepcopy(tokenizer("qwen3"))
    tok.chat_template = CHATML
    [p] = render_passes([user("Q"), answer("A", "R")], tok, reasoning_format="T: {reasoning}\n\n", reasoning_weight=0)
    assert tok.decode(p.input_ids[p.loss_mask & (np.array(p.token_weight) > 0)]) == "A<|im_end|>"
    with pytest.raises(ConversationError, match=r"message 1 \(assistant\): its text holds '</reflect>'"):
        turns(CHATML, [user("Q"), answer("x </reflect> y", "R")], reasoning_format="<reflect>{reasoning}</reflect>")


def test_reasoning_that_stands_between_the_header_and_a_call():
    """The bug guarded: the header was taken for what begins a thought, and answers began with its end."""
    template = CONTINUES.replace("CONTENT", "{{ m.reasoning_content or '' }}").replace("OPENING", "<c>")
    messages = [user("Q"), call(1, 2, "R"), RESULT, answer("A")]
    assert completions(template, messages) == ['R<c>add{"a": 1, "b": 2}<|im_end|>', "A<|im_end|>"]


def test_a_prompt_that_only_this_conversation_has():
    """What a shorter conversation shows is not what follows it."""
    template = (
        "{% for m in messages %}{% if m.role == 'user' %}<u>{{ m.content }}{% else %}<a></think>{{ m.content }}<|im_end|>"
        "{% endif %}{% endfor %}{% if add_generation_prompt %}<a {{ messages | length }}><think>{% endif %}"
    )
    messages = [user("Q"), answer("A", train=False), user("Q2"), answer("B")]
    with pytest.raises(ConversationError, match=r"message 3 \(assistant\): .* does not continue its own prompt"):
        turns(template, messages)
    assert completions(template, messages[2:]) == ["</think>B<|im_end|>"]


@pytest.mark.parametrize("prompt, thought", [("<a>", ""), ("<a><think>", "</think>")])
def test_a_context_that_is_written_otherwise_once_an_answer_follows(prompt, thought):
    """Mistral puts the system message into the last question."""
    template = (
        "{% for m in messages if m.role != 'system' %}{% if m.role == 'user' %}<u>{% if loop.last and messages[0].role == "
        "'system' %}{{ messages[0].content }} {% endif %}{{ m.content }}{% else %}<a>{{ m.content }}<|im_end|>{% endif %}"
        "{% endfor %}{% if add_generation_prompt %}PROMPT{% endif %}"
    )
    messages = [{"role": "system", "content": "S"}, user("Q"), answer("A"), user("Q2"), answer("B")]
    found = turns(template.replace("PROMPT", prompt), messages)
    assert found == [
        (f"<u>S Q{prompt}", f"{thought}A<|im_end|>"),
        (f"<u>Q<a>A<|im_end|><u>S Q2{prompt}", f"{thought}B<|im_end|>"),
    ]


def test_what_a_mismatch_proposes():
    """Only arguments that the template reads; a format of thoughts where its prompt may begin one (Apriel 1.6)."""
    template = OPENS_CALLS_ONCE.replace("FIRST", "<calls>1. ").replace("LATER", "2. ")
    begins = "{% if add_generation_prompt %}My steps:\n{% endif %}"
    messages = [user("Q"), call(1, 2), RESULT, call(3, 3)]
    for source, conversation, ways in (
        (template, messages, r"reasoning_format=… \(if that begins a thought\) or a chat_template"),
        (
            CHATML + "{% if thinking %}{% endif %}" + begins,
            [user("Q"), answer("A")],
            r"template arguments \(thinking=…\) or reaso",
        ),
        (
            CHATML + begins.replace("My steps:", "</think>"),
            [user("Q"), answer("A", "R")],
            "a chat_template=… with which both",
        ),
        (CHATML + begins.replace("My", "<|im_end|>"), [user("Q"), answer("A")], "a chat_template=… with which both"),
    ):
        with pytest.raises(ConversationError, match=rf"where the answer has '.*'; pass {ways}"):
            turns(source, conversation)
    told = completions(CHATML + begins, [user("Q"), answer("A", "R")], reasoning_format="My steps:\n{reasoning}\nSo: ")
    assert told == ["R\nSo: A<|im_end|>"]


def test_tools_that_the_template_does_not_write():
    """They are dropped where that is asked for, as at inference with this template; and counted."""
    messages, counts = [user("Please add 2 and 2"), answer("4")], Counter()
    with pytest.raises(
        ConversationError, match=r"does not render the tool 'add'; leave tools out \(or pass unwritten_tools='drop'\)"
    ):
        turns(CHATML, messages, tools=TOOLS)
    assert turns(CHATML, messages, tools=TOOLS, unwritten_tools="drop", counts=counts) == turns(CHATML, messages)
    assert counts == {"conversations with tools that the chat template does not write": 1}
    counts.clear()
    found = turns(WITH_TOOLS, messages, tools=TOOLS, unwritten_tools="drop", counts=counts)
    assert found == turns(WITH_TOOLS, messages, tools=TOOLS) and not counts
    with pytest.raises(ConversationError, match="unwritten_tools is 'x', expected one of error, drop"):
        turns(CHATML, messages, unwritten_tools="x")


# Forms of content, and roles.


def test_templates_that_take_parts():
    template = CHATML.replace("{{ m.content }}", "{% for part in m.content %}{{ part.text }}|{% endfor %}")
    parts = [{"type": "text", "text": text} for text in ("Q1", "Q2")]
    assert turns(template, [user("Q"), answer("A")])[0][0] == HEAD.replace("Q", "Q|")
    assert turns(template, [{"role": "user", "content": parts}, answer("A")])[0][0] == HEAD.replace("Q", "Q1|Q2|")
    assert turns(CHATML, [{"role": "user", "content": parts}, answer("A")])[0][0] == HEAD.replace("Q", "Q1Q2")


def test_developer_messages():
    """84 of 227 public templates drop them; to the API they are system messages."""
    developer = {"role": "developer", "content": "Be brief."}
    [(prompt, _)] = turns(WITH_TOOLS, [developer, user("Q"), answer("A")])
    assert prompt.startswith("<|im_start|>system\nBe brief.")
    [(prompt, _)] = turns(CHATML, [developer, user("Q"), answer("A")])
    assert prompt.startswith("<|im_start|>developer\nBe brief.")


@pytest.mark.parametrize("text", ["Be brief.", "Q"])
def test_a_message_that_is_dropped_is_an_error(text):
    """Also where the same text stands in another message."""
    template = CHATML.replace("{% for m in messages %}", "{% for m in messages if m.role != 'system' %}")
    with pytest.raises(ConversationError, match=r"message [01] \(\w+\): the chat template does not render it"):
        turns(template, [user("Q"), {"role": "system", "content": text}, user("Now?"), answer("A")])


def test_an_assistant_that_speaks_first():
    assert completions(CHATML, [answer("Hello."), user("Q"), answer("A")]) == ["Hello.<|im_end|>", "A<|im_end|>"]
    template = "{% if messages[0].role == 'system' %}{% endif %}" + CHATML
    with pytest.raises(
        ConversationError, match=r'message 0 \(assistant\): has nothing before it.*mark it "train": false'
    ):
        turns(template, [answer("Hello."), user("Q"), answer("A")])
    assert completions(template, [answer("Hello.", train=False), user("Q"), answer("A")]) == ["A<|im_end|>"]


def test_a_message_with_nothing_in_it():
    with pytest.raises(ConversationError, match=r"message 1 \(assistant\): has nothing to train"):
        turns(CHATML, [user("Q"), answer("")])


# What is trained of a conversation, and how much.


def test_the_last_message_only():
    assert completions(SWITCH.replace("NAME", "enable_thinking"), MIXED, train_on="last") == ["B<|im_end|>"]
    with pytest.raises(ConversationError, match="train_on is 'first', expected one of all, last"):
        turns(CHATML, MIXED, train_on="first")


def test_reasoning_has_a_weight_of_its_own():
    """Everything before the answer, tags included; as an option or of a message."""
    tok = tokenizer("qwen3")
    [p] = render_passes([user("Q"), answer("A", "Thinking.")], tok, reasoning_weight=0.5)
    weighed = [tok.decode(p.input_ids[p.loss_mask & (p.token_weight == weight)]) for weight in (0.5, 1)]
    assert weighed == ["<think>\nThinking.\n</think>\n\n", "A<|im_end|>"]
    messages = [user("Q"), answer("A", "Thinking.", reasoning_weight=0, weight=2)]
    tree = TokenTree.from_passes(render_passes(messages, tok, reasoning_weight=0.5))
    weights = dict(zip(map(tok.decode, tree.target_ids.tolist()), tree.target_weight.tolist()))
    assert weights["</think>"] == 0 and weights["A"] == weights["<|im_end|>"] == 2
    assert render_passes([user("Q"), answer("A", "R")], tok)[0].token_weight is None


def test_the_weight_of_reasoning_is_not_that_of_a_call_or_of_an_end():
    """The bug guarded: everything before a call's name weighed as reasoning, also where there was none."""
    for family, call_begins in (("qwen3", '<tool_call>\n{"name": "add"'), ("gptoss", "<|channel|>commentary")):
        tok = tokenizer(family)
        for reasoning in ("Thinking.", None):
            [p] = render_passes(
                [user("Q"), call(1, 2, reasoning)], tok, tools=TOOLS, reasoning_weight=0, empty_reasoning="keep"
            )
            weight = np.ones(len(p.input_ids)) if p.token_weight is None else p.token_weight
            trained = tok.decode(p.input_ids[p.loss_mask & (weight == 1)])
            assert call_begins in trained and "Thinking" not in trained
    [p] = render_passes([user("Q"), answer("", "Thinking.")], tokenizer("qwen3"), reasoning_weight=0)
    assert tokenizer("qwen3").decode(p.input_ids[p.token_weight * p.loss_mask == 1]) == "<|im_end|>"
    for weight in (-1, float("nan"), "0", True):
        with pytest.raises(ConversationError, match="reasoning_weight is"):
            render_passes([user("Q"), answer("A")], tokenizer("qwen3"), reasoning_weight=weight)


@pytest.mark.parametrize("family", ["qwen2_5", "llama3_1", "qwen3_instruct_2507"])
def test_a_reasoning_format_before_a_call(family):
    """The bug guarded: what opens the call was lost."""
    tok = copy.deepcopy(tokenizer("qwen3"))
    tok.chat_template = (Path(trl.__file__).parent / "chat_templates" / f"{family}.jinja").read_text()
    [plain] = render_passes([user("Q"), call(1, 2)], tok, tools=TOOLS)
    format = "<think>\n{reasoning}\n</think>\n\n"
    [thinking] = render_passes([user("Q"), call(1, 2, "R")], tok, tools=TOOLS, reasoning_format=format)
    without, with_ = (tok.decode(p.input_ids[p.loss_mask]) for p in (plain, thinking))
    assert with_ == "<think>\nR\n</think>\n\n" + without


def test_calls_that_the_context_loses():
    """The bug guarded: messages with calls were not looked for in the prompt."""
    loop = [user("2 + 3?"), call(2, 3), {"role": "tool", "content": "5"}, answer("It is 5.")]
    with pytest.raises(
        ConversationError, match=r"message 1 \(assistant\): .*call of the tool 'add' in the prompt of message 3"
    ):
        turns(CHATML, loop, train_on="last")


def test_what_stands_before_the_name_of_a_call_is_never_a_probe():
    template = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}{% for c in m.tool_calls or [] %}"
        "<call id={{ c.id }} name={{ c.function.name }}>{{ c.function.arguments | tojson }}</call>{% endfor %}<|im_end|>\n"
        "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n{% endif %}"
    )
    with pytest.raises(ConversationError, match="writes more of a call before its name"):
        turns(template, [user("Q"), call(1, 2, "R")])
    # The bug guarded: what was learned was the error as it had been raised, to which every further one added its frames.
    tok = copy.deepcopy(tokenizer("qwen3"))
    tok.chat_template = template
    frames = []
    for _ in range(3):
        with pytest.raises(ConversationError) as error:
            render_passes([user("Q"), call(1, 2, "R")], tok)
        frames.append(len(list(traceback.walk_tb(error.value.__cause__.__traceback__))))
    assert frames[1] == frames[2]


def test_a_prompt_that_the_answer_does_not_continue_is_shown_in_the_users_words():
    template = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}<think>\n{{ m.reasoning_content }}\n"
        "</think>\n{% endif %}{{ m.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n[P]{% endif %}"
    )
    for _ in range(2):  # found out, and remembered
        with pytest.raises(ConversationError, match=r"MY REASON.*MY ANSWER"):
            turns(template, [user("Q"), answer("MY ANSWER", "MY REASON")])


def test_a_changed_tokenizer_is_looked_at_again():
    """The bug guarded: what was learned with the end token of before was kept."""
    tok = copy.deepcopy(tokenizer("qwen3"))
    tok.chat_template = "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}"
    tok.chat_template += "{% if add_generation_prompt %}[assistant]{% endif %}"
    ends = []
    for tok.eos_token in ("<|im_end|>", "<|endoftext|>"):
        [p] = render_passes([user("Q"), answer("A")], tok)
        ends.append(tok.decode(p.input_ids[-1:]))
    assert ends == ["<|im_end|>", "<|endoftext|>"]


def test_a_template_of_its_own_for_tools():
    tok = copy.deepcopy(tokenizer("qwen3"))
    tok.chat_template = {"default": CHATML, "tool_use": tok.chat_template}
    [p] = render_passes([user("Q"), answer("A")], tok, tools=TOOLS)
    assert tok.decode(p.input_ids[p.loss_mask]) == "A<|im_end|>"
    assert tok.decode(p.input_ids[~p.loss_mask]).endswith(EMPTY), "thinking is switched off in the template for tools"


def test_arguments_that_differ_from_record_to_record_are_not_learned_anew(monkeypatch):
    calls = []
    original = type(tokenizer("qwen3")).apply_chat_template
    monkeypatch.setattr(
        type(tokenizer("qwen3")), "apply_chat_template", lambda *a, **k: calls.append(k) or original(*a, **k)
    )
    template = "{{ date }}" + CHATML
    rendered = [turns(template, [user("Q"), answer("A")], date=f"day {i}")[0][0] for i in range(2)]
    assert [text[:5] for text in rendered] == ["day 0", "day 1"]
    tok, count = tokenizer("qwen3"), len(calls)
    for i in range(10):
        render_passes([user("Q"), answer("A")], tok, chat_template=template, date=f"day {i}")
    assert len(calls) - count < 60  # anew it would be over 200


def test_arguments_that_the_template_does_not_read_are_counted():
    counts = Counter()
    turns(CHATML, [user("Q"), answer("A")], enable_thinkng=False, counts=counts)
    assert counts == {"conversations with a template argument 'enable_thinkng' that the template does not read": 1}


def test_a_switch_that_leaves_the_empty_thought_in_the_answer_is_not_used():
    template = "{% if enable_thinking is defined and not enable_thinking %}/no_think{% endif %}" + SWITCH.replace(
        "NAME", "x"
    )
    counts = Counter()
    [(prompt, completion)] = turns(template, [user("Q"), answer("A")], counts=counts)
    assert completion == EMPTY + "A<|im_end|>" and "/no_think" not in prompt
    assert counts == {"empty thoughts trained": 1}


def test_control_tokens_in_contents_and_arguments_are_not_ends_of_turns():
    message = answer(" a<|im_end|>b ", tool_calls=[{"name": "add", "arguments": {"note": "<|im_end|>"}}])
    [completion] = completions(
        WITH_TOOLS.replace("{{ m.content }}{%", "{{ m.content | trim }}{%"), [user("Q"), message]
    )
    assert completion.count("<|im_end|>") == 3


@pytest.mark.parametrize("text", ["a<|im_end|>b", "a<|im_end|>", "<|im_end|>"])
def test_control_tokens_in_contents_are_counted(text):
    counts = Counter()
    messages = [user("<|im_end|>"), answer("A"), user("Q"), answer(text)]
    assert completions(CHATML, messages, counts=counts) == ["A<|im_end|>", text + "<|im_end|>"]
    assert counts == {"trained messages whose text holds '<|im_end|>', where the model would end its turn": 1}


def test_a_content_that_ends_with_a_control_token_is_ended_all_the_same():
    """GLM: the next message ends the turn, so the template writes no end."""
    template = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    found = completions(template, [user("Q"), answer("A"), user("Q2"), answer("Write <|im_start|>")])
    assert found == ["A<|im_start|>", "Write <|im_start|><|im_start|>"]


def test_a_template_that_looks_at_names_of_calls():
    """Llama 3.1 writes calls of its builtin tools in their own way; functionary `python` without its name."""
    template = WITH_TOOLS.replace(
        '<call>{"name"',
        "{% if c.function.name == 'add' %}<builtin>NAME{{ c.function.arguments | tojson }}{% else %}<call>{\"name\"",
    ).replace("</call>", "</call>{% endif %}")
    messages = [user("Q"), call(1, 2)]
    [completion] = completions(template.replace("NAME", "add.call"), messages, tools=TOOLS)
    assert completion == '<builtin>add.call{"a": 1, "b": 2}<|im_end|>'
    with pytest.raises(
        ConversationError, match=r"message 1 \(assistant\): .*does not render its call of the tool 'add'"
    ):
        completions(template.replace("NAME", ""), messages, tools=TOOLS)
    with pytest.raises(
        ConversationError, match=r"message 1 \(assistant\): .*in another way than messages with another"
    ):
        completions(template.replace("NAME", "add.call"), [user("Q"), call(1, 2, "R")], tools=TOOLS)


@pytest.mark.parametrize("text", ["<x>A", "**A**"])
def test_a_template_that_looks_at_how_a_text_begins(text):
    template = CHATML.replace("{{ m.content }}", "{{ m.content[3:] if m.content.startswith('<x>') else m.content }}")
    if text == "**A**":
        assert completions(template, [user("Q"), answer(text)]) == ["**A**<|im_end|>"]
        return
    with pytest.raises(ConversationError, match=r"message 1 \(assistant\): .*does not render its content as it is"):
        completions(template, [user("Q"), answer(text)])


def test_how_a_text_begins_is_looked_at_in_every_message():
    """The bug guarded: what one message was like was taken for what all are like."""
    template = CHATML.replace("{{ m.content }}", "{{ '<act>' if m.content.startswith('Action') }}{{ m.content }}")
    found = completions(template, [user("Q"), answer("Hello"), user("Q"), answer("Action: x")])
    assert found == ["Hello<|im_end|>", "<act>Action: x<|im_end|>"]


def test_tags_of_thoughts_inside_a_content():
    """Ministral's [THINK], MiniMax's <mm:think>: such a content was trained as an answer."""
    template = CHATML.replace(
        "{{ m.content }}",
        "{% if m.reasoning_content %}[THINK]{{ m.reasoning_content }}[/THINK]{% endif %}{{ m.content }}",
    )
    assert completions(template, [user("Q"), answer("A", "R")]) == ["[THINK]R[/THINK]A<|im_end|>"]
    with pytest.raises(ConversationError, match=r"its text holds '\[THINK\]', which the chat template writes around"):
        completions(template, [user("Q"), answer("[THINK]R[/THINK]A")])
    untrained = [user("Q"), answer("[THINK]R[/THINK]A") | {"train": False}, user("Q"), answer("A")]
    assert completions(template, untrained) == ["A<|im_end|>"]


def test_a_second_call_that_the_context_has_not():
    """gpt-oss writes the first of several calls; what the second one has stands in the tools, and elsewhere."""
    template = WITH_TOOLS.replace("in m.tool_calls or []", "in (m.tool_calls or [])[:1]")
    calls = answer("", tool_calls=[call(n, n)["tool_calls"][0] for n in (1, 2)]) | {"train": False}
    messages = [user("add a 1 b 2"), calls, {"role": "tool", "content": "2"}, answer("A")]
    with pytest.raises(
        ConversationError, match=r"message 1 \(assistant\): .*does not render its call of the tool 'add' in"
    ):
        completions(template, messages, tools=TOOLS)


def test_a_context_of_calls_by_known_names():
    """A template may write those alone, so that marks in names say nothing."""
    known = WITH_TOOLS.replace("in m.tool_calls or []", "in m.tool_calls or [] if c.function.name == 'add'")
    messages = [user("Q"), call(1, 2) | {"train": False}, {"role": "tool", "content": "3"}, answer("A")]
    assert completions(known, messages, tools=TOOLS) == ["A<|im_end|>"]


def test_arguments_that_are_none_of_a_template():
    with pytest.raises(ConversationError, match="chat_template_kwargs has 'tokenize', which is"):
        completions(CHATML, [user("Q"), answer("A")], tokenize=True)


def test_content_beside_calls_that_the_template_never_writes():
    """Llama 3.1; where a template writes it at all (gpt-oss), it goes as reasoning goes."""
    never = WITH_TOOLS.replace("{{ m.content }}{% for c", "{% if not m.tool_calls %}{{ m.content }}{% endif %}{% for c")
    first = call(1, 2) | {"content": "I add.", "train": False}
    messages = [user("Q"), first, {"role": "tool", "content": "3"}, answer("A")]
    with pytest.raises(ConversationError, match=r"message 1 \(assistant\): .*starts 'I add.'"):
        completions(never, messages, tools=TOOLS)
    later = WITH_TOOLS.replace(
        "{{ m.content }}{% for c", "{% if not m.tool_calls or loop.last %}{{ m.content }}{% endif %}{% for c"
    )
    assert completions(later, messages, tools=TOOLS) == ["A<|im_end|>"]


def test_what_is_learned_of_a_template_does_not_depend_on_other_records():
    """The bug guarded: arguments that have nothing to do with thinking counted by their names alone. The end of a turn is
    learned, where the template writes it only before the next one."""
    template = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}{% if not loop.last or m.role == 'user' %}"
        "{{ '<|im_end|>' if mode == 'b' else '<|endoftext|>' }}\n{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    tok = copy.deepcopy(tokenizer("qwen3"))
    for mode, end in (("a", "<|endoftext|>"), ("b", "<|im_end|>"), ("a", "<|endoftext|>")):
        [p] = render_passes([user("Q"), answer("A")], tok, chat_template=template, mode=mode)
        assert tok.decode(np.array(p.input_ids)[p.loss_mask]) == "A" + end
    template = CHATML.replace(
        "\n{{ m.content }}", "\n{% if mode == 'b' and m.role == 'assistant' %}<x></x>{% endif %}{{ m.content }}"
    )
    for mode in ("a", "b", "a"):
        [p] = render_passes([user("Q"), answer("A")], tok, chat_template=template, mode=mode)
        assert tok.decode(np.array(p.input_ids)[p.loss_mask]) == "<x></x>" * (mode == "b") + "A<|im_end|>"


def test_switches_in_texts_that_templates_obey_may_go():
    template = CHATML.replace("{{ m.content }}", "{{ m.content.replace('/no_think', '') }}")
    assert turns(template, [user("Why? /no_think"), answer("A")])[0][1] == "A<|im_end|>"


def test_keys_of_messages_that_nobody_reads_are_counted():
    counts = Counter()
    messages = [user("Q") | {"name": "Ada", "cost": 3}, answer("A", finish_reason="stop")]
    turns(CHATML + "{# #}{% set x = messages[0].name %}", messages, counts=counts)
    assert counts == {
        f"messages with a key {key!r}, which the chat template does not write": 1 for key in ("cost", "finish_reason")
    }

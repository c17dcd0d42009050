"""What people's records hold: every form of one conversation gives the same passes, and what is not understood is an error."""

import copy
import json
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from templates import TOOLS, tokenizer

from flexmask import ConversationError
from flexmask.messages import read_conversation, read_messages, read_tools
from flexmask.passes import render_conversation, render_passes

CALL = {"type": "function", "id": "call_1", "function": {"name": "add", "arguments": {"a": 1, "b": 2}}}
RECORD = {
    "tools": TOOLS,
    "messages": [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "1 + 2?"},
        {"role": "assistant", "content": "", "reasoning_content": "Use the tool.", "tool_calls": [CALL]},
        {"role": "tool", "content": "3"},
        {"role": "assistant", "content": "It is 3.", "reasoning_content": "The tool says 3."},
    ],
}
FUNCTION = CALL["function"]
PART_OF_CALL = {"type": "tool_use", "id": "call_1", "name": "add", "input": FUNCTION["arguments"]}


def changed(change) -> dict:
    record = copy.deepcopy(RECORD)
    change(record, record["messages"])
    return record


def as_the_api_writes_it(record, messages):
    messages[2] |= {"content": None, "refusal": None, "audio": None, "function_call": None, "annotations": []}
    messages[2]["tool_calls"][0]["function"]["arguments"] = json.dumps(FUNCTION["arguments"], separators=(",", ":"))
    messages[3] |= {"tool_call_id": "call_1"}


def content_in_parts(record, messages):
    for message in messages:
        message["content"] = [{"type": "text", "text": message["content"]}]


def reasoning_inline(record, messages):
    for message in (messages[2], messages[4]):
        message["content"] = f"<think>\n{message.pop('reasoning_content')}\n</think>\n\n{message['content']}"


def reasoning_in_parts(record, messages):
    for message in (messages[2], messages[4]):
        thinking = {"type": "thinking", "thinking": message.pop("reasoning_content"), "signature": "x"}
        message["content"] = [thinking, {"type": "text", "text": message["content"]}]


def reasoning_details(record, messages):
    for message in (messages[2], messages[4]):
        message["reasoning_details"] = [{"type": "reasoning.text", "text": message.pop("reasoning_content")}]


def only_the_closing_tag(record, messages):
    """What a server without a parser of reasoning returns where the prompt opened the block."""
    for message in (messages[2], messages[4]):
        message["content"] = f"{message.pop('reasoning_content')}\n</think>\n\n{message['content']}"


def legacy_calls(record, messages):
    del messages[2]["tool_calls"]
    messages[2] |= {"content": None, "function_call": FUNCTION | {"arguments": json.dumps(FUNCTION["arguments"])}}
    messages[3]["role"] = "function"
    record["functions"] = [tool["function"] for tool in record.pop("tools")]


def columns_of_text(record, messages):
    record["messages"], record["tools"] = json.dumps(messages), json.dumps(record["tools"])


def system_column(record, messages):
    record["system"] = messages.pop(0)["content"]


def sharegpt(record, messages):
    roles = {"user": "human", "assistant": "gpt", "tool": "observation", "system": "system"}
    record["conversations"] = [
        {"from": roles[m.pop("role")], "value": m.pop("content")} | m for m in record.pop("messages")
    ]


def sharegpt_function_call(record, messages):
    sharegpt(record, messages)
    call = record["conversations"][2]
    del call["tool_calls"]
    call |= {"from": "function_call", "value": json.dumps(FUNCTION)}


def conversations_with_roles(record, messages):
    record["conversations"] = record.pop("messages")


def tools_of_another_name(record, messages):
    record["tool_defs"] = json.dumps(record.pop("tools"))


def ids_beside_flat_calls(record, messages):
    messages[2]["tool_calls"] = [{"id": "call_1", **FUNCTION}]


def anthropic(record, messages):
    thought, use = ({"type": "thinking", "thinking": messages[2]["reasoning_content"], "signature": "x"},
                    {"type": "tool_use", "id": "call_1", "name": "add", "input": FUNCTION["arguments"]})  # fmt: skip
    record["system"] = messages[0]["content"]
    result = {"type": "tool_result", "tool_use_id": "call_1", "content": [{"type": "text", "text": "3"}]}
    messages[2:4] = [{"role": "assistant", "content": [thought, use]}, {"role": "user", "content": [result]}]
    del messages[0]
    functions = [tool["function"] for tool in record["tools"]]
    record["tools"] = [{**f, "input_schema": f["parameters"]} for f in copy.deepcopy(functions)]
    for tool in record["tools"]:
        del tool["parameters"]


FORMS = (
    anthropic,
    as_the_api_writes_it, content_in_parts, reasoning_inline, reasoning_in_parts, reasoning_details, only_the_closing_tag,
    legacy_calls, columns_of_text, system_column, sharegpt, sharegpt_function_call, conversations_with_roles,
    tools_of_another_name, ids_beside_flat_calls,
)  # fmt: skip


def passes(record, family="qwen3", **options):
    found = render_conversation(read_conversation(record, "here"), tokenizer(family), **options)
    return [(p.input_ids.tolist(), p.loss_mask.tolist(), p.weight) for p in found]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("family", ["qwen3", "gptoss", "glm4moe"])
def test_every_form_of_a_conversation_gives_the_same_passes(form, family):
    assert passes(changed(form), family) == passes(RECORD, family)


def test_what_was_read_reads_the_same_again():
    once = read_messages(RECORD["messages"])
    assert read_messages(once) == once


def test_prompt_and_completion():
    """Only the completion is trained."""
    record = {"tools": TOOLS, "prompt": RECORD["messages"][:4], "completion": RECORD["messages"][4:]}
    assert passes(record) == passes(RECORD)[1:]
    with pytest.raises(ConversationError, match="here: prompt is a text, expected a list of messages"):
        read_conversation({"prompt": "1 + 2?", "completion": "3"}, "here")


@pytest.mark.parametrize(
    "flags", [{"train": False}, {"loss": False}, {"training": 0}, {"weight": 0}, {"weight": 0.0, "train": True}]
)
def test_flags_of_messages_that_are_not_trained(flags):
    record = changed(lambda record, messages: messages[2].update(flags))
    assert passes(record) == passes(RECORD)[1:]


def test_template_arguments_of_a_record_win():
    record = {"messages": [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}]}
    tok = tokenizer("qwen3")
    template = "{{ mode }}{% for m in messages %}{{ m.content }}<|im_end|>{% endfor %}"
    for ours in ({"mode": "theirs"}, json.dumps({"mode": "theirs"})):
        [p] = render_conversation(record | {"chat_template_kwargs": ours}, tok, chat_template=template, mode="ours")
        assert tok.decode(p.input_ids).startswith("theirs")


def test_columns_are_mapped():
    record = {"dialog": RECORD["messages"], "apis": RECORD["tools"]}
    read = read_conversation(record, "here", {"messages": "dialog", "tools": "apis"})
    assert (read["messages"], read["tools"]) == (read_conversation(RECORD, "")["messages"], RECORD["tools"])
    with pytest.raises(ConversationError, match=r"here: has the keys apis, expected dialog \(which holds messages\)"):
        read_conversation({"apis": []}, "here", {"messages": "dialog"})


def test_mapped_columns_change_places_and_hide_none_uncounted():
    """The bugs guarded: the second of two that change places was lost, and a column that another took the name of vanished."""
    record = {"prompt": RECORD["messages"][4:], "completion": RECORD["messages"][:4]}
    read = read_conversation(record, "here", {"prompt": "completion", "completion": "prompt"})
    assert read == read_conversation({"prompt": record["completion"], "completion": record["prompt"]}, "")
    read = read_conversation(RECORD | {"chat": [Q, A]}, "here", {"messages": "chat"})
    assert read["messages"] == [Q, A] and read.ignored == ["messages"]
    assert read_conversation(RECORD, "here", {"messages": "messages"}).ignored == []
    assert read_conversation(RECORD, "here", {"tools": "apis", "system": "sys"}).absent == ["apis", "sys"]


def test_a_user_may_have_an_empty_list_of_calls():
    """Where a dataset gives every message the same keys. The bug guarded: `false` there was a TypeError when rendered."""
    assert read_conversation({"messages": [Q | {"tool_calls": False}, A | {"tool_calls": []}]})["messages"] == [Q, A]


def test_keys_that_nobody_reads_are_told():
    record = RECORD | {"id": 7, "score": 0.5, "prompt": "1 + 2?", "source": None}
    assert read_conversation(record, "here").ignored == ["id", "prompt", "score"]


def test_messages_are_named_by_their_place_in_the_record():
    names = read_conversation(changed(system_column), "here").names
    assert names[:2] == ["system column", "message 0 (user)"]
    record = {"prompt": RECORD["messages"][:4], "completion": RECORD["messages"][4:]}
    assert read_conversation(record, "here").names[3:] == ["prompt 3 (tool)", "completion 0 (assistant)"]


Q, A = {"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}


def refused(text, *records):
    return [(record, text) for record in records]


@pytest.mark.parametrize(
    "record, text",
    [
        *refused("is list, expected an object", []),
        *refused("has the keys text, expected messages", {"text": "Q"}),
        *refused("messages is a text that is no JSON", {"messages": "Q: A"}),
        *refused("messages is dict, expected a list", {"messages": {}}, {"messages": "{}"}),
        *refused("conversation is empty", {"messages": []}, {"prompt": [], "completion": []}),
        *refused("no assistant message to train", {"messages": [Q]}, {"messages": [Q, A | {"loss": False}]}),
        *refused("message 0: role is 'bot', expected one of system", {"messages": [{"role": "bot", "content": ""}]}),
        *refused("message 0: role is None", {"messages": [{"content": "Q"}]}, {"messages": [{"value": "Q"}]}),
        *refused("message 0: role is 3", {"messages": [{"from": 3, "value": "Q"}, A]}),
        *refused("train and loss differ", {"messages": [Q, A | {"train": True, "loss": False}]}),
        *refused("loss is 0.5, expected true or false", {"messages": [Q, A | {"loss": 0.5}]}),
        *refused("training is 'no'", {"messages": [Q, A | {"training": "no"}]}),
        *refused(
            "message 0 .user.: has (tool_calls|function_call), which only an assistant",
            {"messages": [Q | {"tool_calls": "0"}, A]},
            {"messages": [Q | {"function_call": {"name": "f"}}, A]},
        ),
        *refused("reasoning_weight is -1", {"messages": [Q, A | {"reasoning_weight": -1}]}),
        *refused("message 1 .assistant.: content is NoneType", {"messages": [Q, A | {"content": None}]}),
        *refused("message 0 .user.: content is NoneType", {"messages": [{"role": "user"}, A]}),
        *refused(
            "part {'type': 'image_url'.*other media are not supported",
            {"messages": [Q | {"content": [{"type": "image_url", "image_url": {"url": "x"}}]}, A]},
        ),
        *refused("part {'type': 'thinking'", {"messages": [Q | {"content": [{"type": "thinking", "thinking": "T"}]}, A]}),
        *refused("part 5, expected parts of type text", {"messages": [Q | {"content": [5]}, A]}),
        *refused("has a key 'images'", {"messages": [Q | {"images": ["x"]}, A]}, {"messages": [Q, A], "images": ["x"]}),
        *refused("has a key 'label', which says that the answer is not wanted", {"messages": [Q, A], "label": False}),
        *refused("has a key 'loss_mask'", {"messages": [Q, A | {"loss_mask": [1]}]}),
        *refused("has a key 'label'", {"messages": [Q, A], "label": 0}),
        *refused(
            r"has a key '(train|loss_mask)', which is read on messages only",
            {"messages": [Q, A], "train": 0},
            {"messages": [Q, A], "loss_mask": 0},
        ),
        *refused("loss is true, and only an assistant's messages are trained", {"messages": [Q | {"loss": True}, A]}),
        *refused("weight is 1000.*, expected a number", {"messages": [Q, A | {"weight": 10**400}]}),
        *refused("reasoning_weight is 1e.39, expected", {"messages": [Q, A | {"reasoning_weight": 1e39}]}),
        *refused(
            "part with a key '(train|image_url)'",
            {"messages": [Q, A | {"content": [{"type": "text", "text": "a", "train": False}]}]},
            {"messages": [Q | {"content": [{"type": "text", "text": "a", "image_url": "x"}]}, A]},
        ),
        *refused(
            "has a thinking part after others",
            {"messages": [Q, A | {"content": [{"type": "text", "text": "a"}, {"type": "thinking", "thinking": "T"}]}]},
            {"messages": [Q, A | {"content": [PART_OF_CALL, {"type": "thinking", "thinking": "T"}]}]},
        ),
        *refused(
            "has a text after a call",
            {"messages": [Q, A | {"content": [PART_OF_CALL, {"type": "text", "text": "a"}]}]},
        ),
        *refused(
            "tool_calls and the tool_use parts of content differ",
            {"messages": [Q, A | {"content": [PART_OF_CALL], "tool_calls": [{"name": "add", "args": {"a": 1}}]}]},
        ),
        *refused(
            "arguments of its call of 'add' are missing: it has kwargs, expected arguments",
            {"messages": [Q, A | {"tool_calls": [{"name": "add", "kwargs": {"a": 1}}]}]},
            {"messages": [Q, A | {"tool_calls": [{"function": {"name": "add", "kwargs": {"a": 1}}}]}]},
        ),
        *refused(
            "are arguments and args, which differ",
            {"messages": [Q, A | {"tool_calls": [{"name": "add", "args": {"a": 1}, "arguments": {}}]}]},
        ),
        *refused("<think> is not closed", {"messages": [Q, A | {"content": "<think>I was cut off"}]}),
        *refused(
            "stands inside its text",
            {"messages": [Q, A | {"content": "<think>a</think>b<think>c</think>d"}]},
            {"messages": [Q, A | {"reasoning": "a</think>b"}]},
        ),
        *refused("hold different reasoning", {"messages": [Q, A | {"reasoning": "a", "thinking": "b"}]}),
        *refused("reasoning_details has no text", {"messages": [Q, A | {"reasoning_details": [{"type": "encrypted"}]}]}),
        *refused("reasoning_details is 'x'", {"messages": [Q, A | {"reasoning_details": "x"}]}),
        *refused("tool_calls has 'x'", {"messages": [Q, A | {"tool_calls": ["x"]}]}),
        *refused(
            "arguments of its call of 'f' is a text that is no JSON",
            {"messages": [Q, A | {"tool_calls": [{"function": {"name": "f", "arguments": "{"}}]}]},
        ),
        *refused(
            "arguments of its call of 'f' is list",
            {"messages": [Q, A | {"function_call": {"name": "f", "arguments": [1]}}]},
        ),
        *refused(
            "tool_calls and function_call",
            {"messages": [Q, A | {"function_call": {"name": "f"}, "tool_calls": [{"name": "f"}]}]},
        ),
        *refused(r"tools\[0\] is \{\}, expected a function with a name", {"messages": [Q, A], "tools": [{}]}),
        *refused("tools and functions, which differ", {"messages": [Q, A], "tools": TOOLS, "functions": [1]}),
        *refused("system column and a system message", {"system": "S", "messages": [{"role": "system", "content": "T"}, Q, A]}),
        *refused("chat_template_kwargs is list", {"messages": [Q, A], "chat_template_kwargs": [1]}),
    ],
)  # fmt: skip
def test_what_is_not_understood_is_an_error_that_says_so(record, text):
    with pytest.raises(ConversationError, match=f"here: .*{text}") as error:
        read_conversation(record, "here")
    assert "\n" not in str(error.value)


def test_a_system_column_is_not_lost_where_a_user_says_the_same():
    read = read_conversation({"system": "Q", "messages": [Q, A]})["messages"]
    assert [message["role"] for message in read] == ["system", "user", "assistant"]


@pytest.mark.parametrize(
    "content, reasoning, answer",
    [
        ("T\n</think>\n\n    code", "T", "    code"),
        ("<think>T</think> A", "T", "A"),
        ("</think>\nA", "", "A"),
        ("T</think>\n\nA", "T", "A"),
        ("<think>\nT\n</think>", "T", ""),
        ("<think>\n\n</think>\n\nA", "", "A"),
    ],
)
def test_reasoning_in_the_content(content, reasoning, answer):
    [_, message] = read_messages([Q, A | {"content": content}])
    assert (message.get("reasoning_content", ""), message["content"]) == (reasoning, answer)
    assert read_messages([Q, message])[1] == message


def test_a_tag_inside_a_sentence_is_no_thought():
    with pytest.raises(ConversationError, match="</think> stands inside its text"):
        read_messages([Q, A | {"content": "In Qwen3 the tag </think> ends a thought."}])
    with pytest.raises(ConversationError, match="</think> stands inside its text"):
        read_messages([Q, A | {"content": "End it with </think>\nand go on."}])
    untrained = A | {"content": "End it with </think>\nand go on.", "train": False}
    assert read_messages([Q, untrained])[1]["content"] == untrained["content"]
    two = A | {"content": "a</think>b\n</think>\nc</think>d", "train": False}
    once = read_messages([Q, two, Q, A])
    assert read_messages(once) == once and once[1]["content"] == two["content"]


def test_what_else_is_read():
    """Each of these was refused, or lost in silence."""
    read = read_conversation({"messages": [], "conversations": [Q, A], "tools": "null", "chat_template_kwargs": ""})
    assert len(read["messages"]) == 2 and "tools" not in read
    assert read_conversation({"messages": [Q, A], "label": True, "objects": ["cup"]}).ignored == ["label", "objects"]
    read = read_conversation({"messages": [Q, A], "chat_template_kwargs": {"tokenize": False, "thinking": True}})
    assert read["chat_template_kwargs"] == {"thinking": True} and read.ignored == ["chat_template_kwargs.tokenize"]
    with pytest.raises(ConversationError, match="chat_template_kwargs has 'tools', which is a column"):
        read_conversation({"messages": [Q, A], "chat_template_kwargs": {"tools": []}})
    assert "tools" not in read_conversation({"messages": [Q, A]}, "", {"tools": "apis"})
    call = {"from": "tool_call", "value": "<think>\nT\n</think>\n" + json.dumps(FUNCTION)}
    result = {"from": "tool_response", "value": {"sum": 3}}
    [_, call, result] = read_messages([Q, call, result])
    assert (call["reasoning_content"], call["tool_calls"][0]["function"]) == ("T", FUNCTION)
    assert result["content"] == '{"sum": 3}'
    [_, message] = read_messages([Q, A | {"reasoning": [{"type": "text", "text": "T"}]}])
    assert message["thinking"] == "T"
    with pytest.raises(ConversationError, match="arguments of its call of 'f' are no JSON"):
        read_messages([Q, A | {"tool_calls": [{"name": "f", "arguments": {"x": float("nan")}}]}])


@pytest.mark.parametrize(
    "calls",
    [
        [{"name": "add", "args": FUNCTION["arguments"], "id": "call_1", "type": "tool_call"}],  # LangChain's
        [{"id": "call_1", "function": {"name": "add"}, "arguments": FUNCTION["arguments"]}],
        [{"name": "add", "input": FUNCTION["arguments"], "id": "call_1", "index": 0}],
    ],
)
def test_arguments_of_calls_by_other_names(calls):
    """They were lost, and {} was trained."""
    [_, message] = read_messages([Q, A | {"tool_calls": calls}])
    assert message["tool_calls"] == [CALL]
    [_, twice] = read_messages([Q, {"role": "assistant", "content": [PART_OF_CALL], "tool_calls": calls}])
    assert twice["tool_calls"] == [CALL] and twice["content"] == ""


@pytest.mark.parametrize(
    "call, arguments",
    [
        ({"name": "add", "arguments": None, "description": None}, {}),
        ({"function": {"name": "add", "arguments": "", "strict": True}}, {}),
        ({"name": "add", "arguments": '{"a": 1}', "input": {"a": 1}}, {"a": 1}),
        ({"name": "add", "arguments": {"a": 1}, "parameters": {"type": "object"}}, {"a": 1}),
    ],
)
def test_arguments_that_are_written_twice_or_not_at_all(call, arguments):
    [_, message] = read_messages([Q, A | {"tool_calls": [call]}])
    assert message["tool_calls"][0]["function"] == {"name": "add", "arguments": arguments}


def test_what_is_not_read_of_calls_and_parts_is_told():
    record = {"messages": [Q, A | {"content": [{"type": "text", "text": "A", "citations": [], "index": None}]}]}
    record["messages"][1]["tool_calls"] = [{"function": FUNCTION | {"strict": True}, "id": "call_1"}]
    result = {"type": "tool_result", "tool_use_id": "call_1", "content": "3", "is_error": True}
    record["messages"] += [{"role": "user", "content": [result]}, A]
    ignored = read_conversation(record).ignored
    assert ignored == ["content[].citations", "content[].is_error", "tool_calls[].function.strict"]
    counts = Counter()
    parts = A | {"content": [{"type": "text", "text": "A", "citations": []}]}
    render_passes([Q, parts], tokenizer("qwen3"), counts=counts)
    assert counts["conversations with a key 'content[].citations', which nobody reads"] == 1


def test_flags_of_others():
    record = {"messages": [Q, A | {"loss_mask": 0}, Q, A | {"loss_mask": True}]}
    assert [m.get("train") for m in read_conversation(record)["messages"]] == [None, False, None, True]
    asked = {"prompt": [Q | {"loss": True}, A | {"loss": True}, Q], "completion": [A]}
    assert [m.get("train") for m in read_conversation(asked)["messages"]] == [False, False, False, None]


def test_what_pandas_puts_where_nothing_is():
    record = {"messages": [Q, A], "tools": float("nan"), "system": float("nan"), "score": float("nan")}
    assert read_conversation(record) == {"messages": [Q, A]}
    assert read_conversation({"messages": [], "conversations": [Q, A]}).ignored == []


def test_columns_the_wrong_way_around():
    with pytest.raises(ConversationError, match="columns has 'chat', expected names of flexmask's own: messages"):
        read_conversation({"chat": [Q, A]}, "", {"chat": "messages"})


def test_a_thought_in_tags_in_its_own_field():
    [_, message] = read_messages([Q, A | {"reasoning_content": "<think>\nT\n</think>\n"}])
    assert message["reasoning_content"].strip() == "T"


def test_values_of_numpy():
    messages = np.array([Q, A | {"train": np.bool_(True), "weight": np.float32(0.5)}], dtype=object)
    [p] = render_conversation({"messages": messages, "tools": np.array([])}, tokenizer("qwen3"))
    assert p.weight == 0.5


def test_the_caller_keeps_what_was_handed_over():
    for form in FORMS:
        record = changed(form)
        before = copy.deepcopy(record)
        passes(record)
        assert record == before


def test_half_a_surrogate_pair_is_an_error_of_ours():
    with pytest.raises(ConversationError, match=r"here: .*cannot be tokenised"):
        passes({"messages": [Q, A | {"content": "\ud83d"}]})


def test_tools_of_other_apis():
    schema = {"type": "object", "properties": {}}
    nested = {"type": "function", "function": {"name": "f", "parameters": schema}}
    assert read_tools([nested]) == read_tools([{"name": "f", "parameters": schema}]) == [nested]
    assert read_tools([{"name": "f", "input_schema": schema}, json.dumps(nested)]) == [nested, nested]


# Fuzzed records: a good one in which something, at some depth, is gone or something else.
TEXTS = ["", "x", "[", "{}", "[]", "null", "\ud83d"]
ODD = st.sampled_from(
    [*TEXTS, None, True, 0, -1, 1.5, [], {}, [None], [[]], [{}], {"a": None}, {"type": "text"}]
).map(copy.deepcopy)  # fmt: skip


def places(value, path=()):
    yield path
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        yield from places(item, (*path, key))


@settings(deadline=None, max_examples=400, print_blob=True)
@given(form=st.sampled_from(FORMS), data=st.data())
def test_fuzzed_records_are_passes_or_an_error_of_ours(form, data):
    record = copy.deepcopy(changed(form))
    for _ in range(data.draw(st.integers(1, 3))):
        *path, last = data.draw(st.sampled_from([p for p in places(record) if p] or [("messages",)]))
        at = record
        for key in path:
            at = at[key]
        if data.draw(st.booleans()):
            at[last] = data.draw(ODD)
        elif isinstance(at, dict):
            at.pop(last, None)
        else:
            at.insert(last, data.draw(ODD))
    try:
        assert passes(record)
    except ConversationError as error:
        assert str(error).startswith("here: ") and "\n" not in str(error)

"""What people's records hold -> a checked conversation, in one form.

Every form that a conversation comes in (OpenAI's wire format, content in parts, ShareGPT, prompt and completion, columns of
JSON text, …) becomes the same list of messages here, for files, dataset rows and Python alike. What is not understood is an
error that names it; what is not read is counted.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence

ROLES = ("system", "developer", "user", "assistant", "tool")
ROLE_NAMES = {role: role for role in ROLES} | {
    "human": "user",
    "gpt": "assistant",
    "model": "assistant",
    "function": "tool",
    "function_call": "assistant",
    "tool_call": "assistant",
    "observation": "tool",
    "tool_response": "tool",
    "ipython": "tool",
    "chatgpt": "assistant",
}
REASONING_FIELDS = ("reasoning_content", "reasoning", "thinking")
TRAIN_FLAGS = ("train", "loss", "training", "loss_mask")
WEIGHTS = ("weight", "reasoning_weight")

# Columns of a record, each under the names that others use.
_TOOLS = ("tools", "functions", "tool_defs")
_SYSTEM = ("system", "system_prompt")
COLUMNS = ("messages", "conversations", "prompt", "completion", "chat_template_kwargs", *_TOOLS, *_SYSTEM)
_OF_A_REQUEST = {"add_generation_prompt", "continue_final_message", "tokenize"}  # to a server; training decides itself
_OF_RENDERING = {"messages", "conversation", "tools", "chat_template", "padding", "truncation", "return_tensors"}
# Keys to which others give a meaning that would be lost here, and which values mean something. Of a record, then of a message.
_MEDIA = ("image", "images", "image_url", "video", "videos", "audio", "audios", "input_audio")


def _is_given(value) -> bool:
    return value not in (False, "", [], {})


def _is_no(value) -> bool:
    return value in (False, 0)


def _is_missing(value) -> bool:
    """Of a column: pandas has NaN where a row has nothing."""
    return value is None or (isinstance(value, float) and math.isnan(value))


_MEANT = {
    **dict.fromkeys(_MEDIA, (_is_given, "is for models of other media")),
    **dict.fromkeys(("label", "kto_tag"), (_is_no, "says that the answer is not wanted")),
    "rejected_response": (_is_given, "is for preference training"),
    **dict.fromkeys(
        ("weight", "loss_weight", "sample_weight"),
        (lambda value: value != 1, "weighs a whole record; give its messages a weight"),
    ),
    **dict.fromkeys(
        TRAIN_FLAGS,
        (
            lambda value: _is_no(value) or (isinstance(value, list) and value),
            'is read on messages only ("train": false)',
        ),
    ),
}
_MEANT_IN_MESSAGE = {
    **dict.fromkeys(_MEDIA, (_is_given, "is for models of other media")),
    **dict.fromkeys(
        ("training_detail", "train_detail"), (_is_given, "trains parts of a message, which is not supported")
    ),
    "loss_mask": (lambda value: isinstance(value, list) and value, "trains parts of a message, which is not supported"),
    "loss_scale": (lambda value: value != 1, "is not read; call it weight"),
    "prefix": (_is_given, "continues a message, which is not supported"),
    "refusal": (_is_given, "stands in for the content; move it there, or leave the message out"),
}
_MEANT_IN_PART = {
    **dict.fromkeys(_MEDIA, (_is_given, "is for models of other media")),
    **dict.fromkeys(
        (*TRAIN_FLAGS, *WEIGHTS),
        (lambda value: value not in (True, 1), "trains parts of a message, which is not supported"),
    ),
}
_ARGUMENTS = ("arguments", "parameters", "args", "input")  # of a call
_TEXT_PARTS = {"text": "text", "input_text": "text", "output_text": "text"}
_THINK = re.compile(r"</?think>")
# A block before the answer; or what a server leaves of it where the prompt opened it: the end on a line of its own, or with an
# empty line behind it.
_BLOCK = re.compile(r"\s*<think>(.*?)</think>(?:[ \t]*\n+|[ \t]+|$)?", re.DOTALL)
_CLOSED_BLOCK = re.compile(r"(.*?)(?:(?:\n|\A)</think>[ \t]*\n*|</think>[ \t]*\n\s*\n+)", re.DOTALL)
_WHOLE_BLOCK = re.compile(r"\s*<think>((?:(?!</?think>).)*)</think>\s*", re.DOTALL)
_LARGEST = 3.4e38  # what float32 holds, in which weights are kept

TOO_DEEP = "is nested too deeply"
NOTHING_TO_TRAIN = 'no assistant message to train (none at all, or all have "train": false or weight 0)'


class ConversationError(ValueError):
    """A conversation that cannot be turned into passes. The text names the message."""


class NothingLeftError(ConversationError):
    """The options leave nothing of a conversation to train: over a dataset it is dropped, and counted."""


class Conversation(dict):
    """A checked conversation: `messages`, perhaps `tools` and `chat_template_kwargs`, and whatever else its record has.

    Attributes:
        origin: where it came from (`data.jsonl:12`), for errors that are found later.
        names: what each message is called in errors, by its place in the record (`message 3 (user)`).
        ignored: keys of the record that nobody reads, and of the calls and parts of its messages (`content[].citations`).
        absent: names of `columns` that the record lacks.
    """

    origin: str = ""
    names: Sequence[str] = ()
    ignored: Sequence[str] = ()
    absent: Sequence[str] = ()


def read_conversation(record, origin: str = "", columns: Mapping[str, str] | None = None) -> Conversation:
    """A conversation from a record in any form that is known.

    Args:
        record: an object with `messages` or `conversations` (lists of messages in OpenAI's or ShareGPT's form), or with
            `prompt` and `completion` (likewise; only the completion is trained). Beside them `tools`, `functions` or
            `tool_defs`; `system` or `system_prompt`, a text that becomes the first message; `chat_template_kwargs`. Lists
            and objects may be JSON text.
        origin: where it came from; errors begin with it.
        columns: name here -> name in the record, for records that call these columns otherwise. A column that has the name
            here, and is not meant, is not read.

    Raises:
        ConversationError: naming the origin, the message and the field; what came and what is expected.
    """
    try:
        return _read(record, origin, columns or {})
    except (ConversationError, RecursionError) as error:
        said = TOO_DEEP if isinstance(error, RecursionError) else error
        raise ConversationError(f"{origin}: {said}" if origin else str(said)) from error


def _read(record, origin: str, columns: Mapping[str, str]) -> Conversation:
    if not isinstance(record, Mapping):
        raise ConversationError(f"is {type(record).__name__}, expected an object with messages")
    record = {key: value for key, value in record.items() if not _is_missing(value)}
    for ours in columns.keys() - set(COLUMNS):
        raise ConversationError(f"columns has {ours!r}, expected names of flexmask's own: {', '.join(COLUMNS)}")
    renamed = {ours: theirs for ours, theirs in columns.items() if theirs in record}
    absent = [theirs for theirs in columns.values() if theirs not in record]
    for ours, theirs in columns.items():
        if theirs in absent and ours in ("messages", "conversations", "prompt", "completion"):
            raise ConversationError(f"has the keys {_keys(record)}, expected {theirs} (which holds {ours})")
    overwritten = record.keys() & renamed.keys() - set(renamed.values())
    rest = {key: value for key, value in record.items() if key not in renamed.values()}
    record = rest | {ours: record[theirs] for ours, theirs in renamed.items()}
    written, names, column = _written_messages(record)
    system = _one_of(record, _SYSTEM)
    if system is not None and not isinstance(system, str):
        raise ConversationError(f"system is {type(system).__name__}, expected a string")
    first = written[0] if isinstance(written[0], Mapping) else {}
    begins_with_system = "system" in (first.get("role"), first.get("from"))
    if system and not (begins_with_system and first.get("content", first.get("value")) == system):
        if begins_with_system:
            raise ConversationError("has a system column and a system message that differ, expected one of them")
        written, names = [{"role": "system", "content": system}, *written], ["system column", *names]

    unread: dict[str, None] = {}  # keys of calls and parts, each once
    messages, names = _read_messages(written, names, unread)
    if not any(map(is_trained, messages)):
        raise ConversationError(NOTHING_TO_TRAIN)
    ignored = [*overwritten, *unread]
    for key in record.keys() - set(COLUMNS):
        if key in _MEANT and _MEANT[key][0](record[key]):
            raise ConversationError(f"has a key {key!r}, which {_MEANT[key][1]}; remove it from the record")
        ignored.append(str(key))
    if column is not None:
        others = {"messages", "conversations", "prompt", "completion"} - {column}
        ignored += [key for key in record.keys() & others if _is_given(record[key])]

    conversation = Conversation(
        {key: value for key, value in record.items() if key not in COLUMNS} | {"messages": messages}
    )
    conversation.origin, conversation.ignored, conversation.absent = origin, sorted(ignored), absent
    conversation.names = [
        f"{name} ({m['role']})" if name != "system column" else name for name, m in zip(names, messages)
    ]
    tools = read_tools(_one_of(record, _TOOLS))
    if tools:
        conversation["tools"] = tools
    arguments = _parsed(record.get("chat_template_kwargs") or {}, "chat_template_kwargs", Mapping, "an object")
    arguments = {key: value for key, value in arguments.items() if value is not None}
    for key in arguments.keys() & _OF_A_REQUEST:
        del arguments[key]
        conversation.ignored = [*conversation.ignored, f"chat_template_kwargs.{key}"]
    check_template_arguments(arguments)
    if arguments:
        conversation["chat_template_kwargs"] = arguments
    return conversation


def check_template_arguments(arguments: Mapping) -> None:
    """Raises ConversationError for an argument that would not reach a template, but its rendering."""
    for key in sorted(arguments.keys() & (_OF_RENDERING | _OF_A_REQUEST)):
        raise ConversationError(
            f"chat_template_kwargs has {key!r}, which is a column of the record, an option of the run, or decided by flexmask"
        )


def _written_messages(record: Mapping) -> tuple[list, list[str], str | None]:
    """The messages as they were written, what to call them, and the column that they are, if it is one."""
    for key in ("messages", "conversations"):
        if key in record and (record[key] != [] or "conversations" not in record or key == "conversations"):
            written = _parsed(record[key], key, Sequence, "a list of messages")
            if not written:
                raise ConversationError("the conversation is empty")
            return list(written), [f"message {i}" for i in range(len(written))], key
    if "prompt" not in record or "completion" not in record:
        raise ConversationError(
            f"has the keys {_keys(record)}, expected messages (or conversations, or prompt and completion)"
            + (
                ""
                if record
                else "; the Trainer takes columns out that it does not know, but for remove_unused_columns=False"
            )
        )
    written, names = [], []
    for key in ("prompt", "completion"):
        part = record[key]
        if isinstance(part, str) and not part.lstrip().startswith("["):
            raise ConversationError(
                f"{key} is a text, expected a list of messages: a text has no roles for the template"
            )
        for i, message in enumerate(_parsed(part, key, Sequence, "a list of messages")):
            if key == "prompt" and isinstance(message, Mapping):
                message = {name: value for name, value in message.items() if name not in TRAIN_FLAGS} | {"train": False}
            written.append(message)
            names.append(f"{key} {i}")
    if not written:
        raise ConversationError("the conversation is empty")
    return written, names, None


def _one_of(record: Mapping, names: Sequence[str]):
    """The value of a column that has several names."""
    given = {name: record[name] for name in names if record.get(name) not in (None, "", [], {})}
    values = list(given.values())
    if any(value != values[0] for value in values):
        raise ConversationError(f"has {' and '.join(given)}, which differ; expected one of them")
    return values[0] if values else None


def _keys(record: Mapping) -> str:
    return ", ".join(sorted(map(str, record))) or "(none)"


def _parsed(value, name: str, kind: type, expected: str):
    """A list or object, from JSON text if it is one."""
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except (json.JSONDecodeError, RecursionError) as error:
            raise ConversationError(f"{name} is a text that is no JSON ({error}), expected {expected}") from error
    if isinstance(value, str) or not isinstance(value, kind):
        raise ConversationError(f"{name} is {type(value).__name__}, expected {expected}")
    return value


def read_tools(tools) -> list[dict]:
    """Descriptions of tools as templates take them: `{"type": "function", "function": {"name": …, …}}`.

    Args:
        tools: a list of them, or of bare functions (OpenAI's older form), or either as JSON text; None for no tools.

    Raises:
        ConversationError: not that, or a tool without a name.
    """
    read = []
    if isinstance(tools, str) and tools.strip() == "null":
        tools = None
    for i, tool in enumerate(_parsed([] if tools is None else tools, "tools", Sequence, "a list")):
        tool = _parsed(tool, f"tools[{i}]", Mapping, "an object")
        function = tool.get("function", tool)
        if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
            raise ConversationError(f"tools[{i}] is {_short(tool)}, expected a function with a name")
        if "function" in tool:
            read.append(dict(tool))
        else:
            function = {key: value for key, value in tool.items() if key != "type"}
            if "input_schema" in function:  # Anthropic's name
                function["parameters"] = function.pop("input_schema")
            read.append({"type": "function", "function": function})
    return read


def read_messages(messages, unread: dict | None = None) -> list[dict]:
    """Messages in one form: `role` (of `ROLES`), `content` (a text, or a list of text parts), and for the assistant the
    reasoning in the fields that templates read, `tool_calls` with objects as arguments, `train` and `weight`. Other keys are
    kept. What is in that form already stays as it is.

    Args:
        messages: a list of them, in any form that is known.
        unread: gets keys of their calls and parts that nobody reads (`content[].citations`).

    Raises:
        ConversationError: naming the message and the field, what came and what is expected.
    """
    if not isinstance(messages, Sequence) or isinstance(messages, str):
        raise ConversationError(f"messages is {type(messages).__name__}, expected a list of messages")
    if not messages:
        raise ConversationError("the conversation is empty")
    unread = {} if unread is None else unread
    return _read_messages(messages, [f"message {i}" for i in range(len(messages))], unread)[0]


def _read_messages(written: Sequence, names: Sequence[str], unread: dict) -> tuple[list[dict], list[str]]:
    """Messages in one form, and what to call them."""
    written, names = _with_results_apart(written, names, unread)
    return [_message(message, name, unread) for message, name in zip(written, names, strict=True)], names


def is_trained(message: Mapping) -> bool:
    """Whether a message that was read becomes a pass."""
    return message["role"] == "assistant" and message.get("train", True) and message.get("weight", 1) > 0


def is_weight(value) -> bool:
    """Whether it is a number that is not negative."""
    return not isinstance(value, bool) and isinstance(value, int | float) and 0 <= value <= _LARGEST


def text_of(message: Mapping) -> str:
    """The content of a message that was read, as one text."""
    content = message["content"]
    return content if isinstance(content, str) else "".join(part["text"] for part in content)


def reasoning_of(message: Mapping) -> str:
    """The reasoning of a message that was read, "" if it has none."""
    return message.get(REASONING_FIELDS[0], "")


def without_nulls(value):
    """Without the keys whose value is null, at any depth: Arrow puts them where another row has the key. Values of numpy and
    pandas become Python's own.

    Raises:
        ConversationError: it is nested too deeply.
    """
    try:
        return _without_nulls(value)
    except RecursionError as error:
        raise ConversationError(TOO_DEEP) from error


def _without_nulls(value):
    if hasattr(value, "tolist"):
        value = value.tolist()
    if isinstance(value, Mapping):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    return [_without_nulls(item) for item in value] if isinstance(value, list) else value


def _with_results_apart(messages: Sequence, names: Sequence[str], unread: dict) -> tuple[list, list[str]]:
    """Answers of tools that stand among the parts of a user's message (Anthropic's form) as messages of their own, before it."""
    apart, of = [], []
    for message, name in zip(messages, names, strict=True):
        content = message.get("content") if isinstance(message, Mapping) else None
        parts = content if isinstance(content, list) else []
        results = [part for part in parts if isinstance(part, Mapping) and part.get("type") == "tool_result"]
        for part in results:
            _note_unread(part, ("type", "content", "tool_use_id"), "content[]", unread)
            apart.append(
                {"role": "tool", "content": part.get("content") or "", "tool_call_id": part.get("tool_use_id")}
            )
            of.append(name)
        rest = [part for part in parts if part not in results]
        if rest or not results:
            apart.append({**message, "content": rest} if results else message)
            of.append(name)
    return apart, of


def _note_unread(of: Mapping, known: Sequence[str], what: str, unread: dict) -> None:
    unread.update(dict.fromkeys(f"{what}.{key}" for key, value in of.items() if value is not None and key not in known))


def _message(message, name: str, unread: dict) -> dict:
    if not isinstance(message, Mapping):
        raise ConversationError(f"{name} is {type(message).__name__}, expected an object with role and content")
    message = {key: value for key, value in message.items() if value is not None}
    if "role" not in message and "from" in message:  # ShareGPT's names
        message["role"] = message.pop("from")
        if "value" in message:
            message["content"] = message.pop("value")
    written = message.get("role")
    role = ROLE_NAMES.get(written.lower()) if isinstance(written, str) else None
    if role is None:
        raise ConversationError(f"{name}: role is {written!r}, expected one of {', '.join(ROLES)}")
    where = f"{name} ({role})"
    for key, (is_meant, why) in _MEANT_IN_MESSAGE.items():
        if key in message and is_meant(message[key]):
            raise ConversationError(f"{where}: has a key {key!r}, which {why}")
    if written.lower() in ("function_call", "tool_call"):
        thought, end, text = (value if isinstance(value := message.get("content"), str) else "").rpartition("</think>")
        message["function_call"] = _parsed(text if end else message.get("content"), f"{where}: value", object, "a call")
        message["content"] = thought + end
    message["role"] = role
    _read_training(message, where)
    if role == "assistant":
        _read_calls(message, where, unread)
        if message.get("tool_calls"):
            message.setdefault("content", "")
    else:
        for key in ("tool_calls", "function_call"):
            if _is_given(message.pop(key, False)):
                raise ConversationError(f"{where}: has {key}, which only an assistant's message may have")
    reasoning = _read_content(message, where, unread)
    if role == "assistant":
        _read_reasoning(message, reasoning, where)
    return message


def _read_training(message: dict, where: str) -> None:
    """`train` (a bool) from whichever flag is there, and weights."""
    flags = {}
    for flag in TRAIN_FLAGS:
        if flag in message:
            value = message.pop(flag)
            if not isinstance(value, bool | int) or value not in (0, 1):
                raise ConversationError(f"{where}: {flag} is {value!r}, expected true or false")
            flags[flag] = bool(value)
    if len(set(flags.values())) > 1:
        raise ConversationError(f"{where}: {' and '.join(flags)} differ, expected one of them")
    if flags:
        message["train"] = next(iter(flags.values()))
        if message["train"] and message["role"] != "assistant":
            raise ConversationError(
                f"{where}: {next(iter(flags))} is true, and only an assistant's messages are trained"
            )
    for name in WEIGHTS:
        if not is_weight(message.get(name, 1)):
            raise ConversationError(
                f"{where}: {name} is {_short(message[name])}, expected a number that is not negative, of float32"
            )


def _read_calls(message: dict, where: str, unread: dict) -> None:
    """`tool_calls`: a list of `{"type": "function", "function": {"name": …, "arguments": {…}}}`, ids kept; gone if empty."""
    calls = _parsed(message.pop("tool_calls", None) or [], f"{where}: tool_calls", Sequence, "a list")
    legacy = message.pop("function_call", None)
    if legacy:
        if calls:
            raise ConversationError(f"{where}: has tool_calls and function_call, expected one of them")
        calls = legacy if isinstance(legacy, list) else [legacy]
    read = [_call(call, where, unread) for call in calls]
    if read:
        message["tool_calls"] = read


def _call(call, where: str, unread: dict) -> dict:
    function = call.get("function", call) if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str) or not function["name"]:
        raise ConversationError(f"{where}: tool_calls has {_short(call)}, expected a function with a name")
    of = f"{where}: the arguments of its call of {function['name']!r}"
    written = [(key, spot[key]) for spot in (function, call) for key in _ARGUMENTS if spot.get(key) is not None]
    if "arguments" in dict(written):  # parameters may be the tool's description
        written = [(key, value) for key, value in written if key != "parameters"]
    given = {}
    for key, value in written:
        value = {} if isinstance(value, str) and not value.strip() else dict(_parsed(value, of, Mapping, "an object"))
        try:
            json.dumps(value, allow_nan=False)
        except (TypeError, ValueError) as error:
            raise ConversationError(f"{of} are no JSON: {error}") from error
        if any(value != other for other in given.values()):
            raise ConversationError(f"{of} are {' and '.join([*given, key])}, which differ; expected one of them")
        given[key] = value
    known = ("name", "id", "type", "index", *(key for key, _ in written))
    others = [key for key, value in function.items() if value is not None and key not in known]
    if others and not given:
        raise ConversationError(f"{of} are missing: it has {', '.join(others)}, expected arguments")
    _note_unread(function, known, "tool_calls[].function", unread)
    arguments = next(iter(given.values()), {})
    rest = {} if function is call else {k: v for k, v in call.items() if v is not None and k not in _ARGUMENTS}
    rest |= {"id": call["id"]} if function is call and call.get("id") is not None else {}
    return rest | {"type": "function", "function": {"name": function["name"], "arguments": arguments}}


def _read_content(message: dict, where: str, unread: dict) -> list[str]:
    """`content`: a text, or a list of text parts: of an assistant thoughts, then texts, then calls, as every template writes
    them. Returns the reasoning that stood among the parts."""
    content = message.get("content")
    if message["role"] == "tool" and (content is None or isinstance(content, Mapping)):
        content = message["content"] = "" if content is None else json.dumps(content, ensure_ascii=False, default=str)
    if isinstance(content, str):
        return []
    if not isinstance(content, list):
        raise ConversationError(
            f"{where}: content is {type(content).__name__}, expected a string or a list of text parts"
        )
    texts, reasoning, calls = [], [], []
    for part in content:
        if isinstance(part, str):
            part = {"type": "text", "text": part}
        kind = part.get("type", "text" if "text" in part else None) if isinstance(part, Mapping) else None
        kind = kind if isinstance(kind, str) else None
        for key, (is_meant, why) in _MEANT_IN_PART.items():
            if kind in _TEXT_PARTS and part.get(key) is not None and is_meant(part[key]):
                raise ConversationError(f"{where}: content has a part with a key {key!r}, which {why}")
        if kind in ("thinking", "reasoning") and message["role"] == "assistant":
            if calls or any(text["text"].strip() for text in texts):
                raise ConversationError(f"{where}: content has a {kind} part after others, expected it before them")
            reasoning.append(_thinking(part, kind, where))
        elif kind == "tool_use" and message["role"] == "assistant":  # Anthropic's calls
            call = {"id": part.get("id"), "name": part.get("name"), "arguments": part.get("input")}
            calls.append(_call(call, where, unread))
            _note_unread(part, ("type", "id", "name", "input"), "content[]", unread)
        elif kind in _TEXT_PARTS and isinstance(part.get("text"), str):
            if calls and part["text"].strip():
                raise ConversationError(f"{where}: content has a text after a call, expected it before them")
            texts.append({"type": "text", "text": part["text"]})
            _note_unread(part, ("type", "text"), "content[]", unread)
        else:
            raise ConversationError(
                f"{where}: content has a part {_short(part)}, expected parts of type text"
                + (" (other media are not supported)" if kind and kind not in _TEXT_PARTS else "")
            )
    message["content"] = texts
    if not texts:
        message["content"] = ""
    if calls:
        known = message.setdefault("tool_calls", calls)  # some write them in both places
        if [call["function"] for call in known] != [call["function"] for call in calls]:
            raise ConversationError(
                f"{where}: tool_calls and the tool_use parts of content differ, expected one of them"
            )
    return reasoning


def _thinking(part: Mapping, kind: str, where: str) -> str:
    """The text of a thinking part: a string, or text parts of its own."""
    text = next((part[key] for key in (kind, "text", "content") if part.get(key) is not None), None)
    if isinstance(text, list) and all(isinstance(p, Mapping) and isinstance(p.get("text"), str) for p in text):
        text = "".join(p["text"] for p in text)
    if not isinstance(text, str):
        raise ConversationError(f"{where}: content has a part {_short(part)}, expected its {kind} as a text")
    return text


def _read_reasoning(message: dict, from_parts: list[str], where: str) -> None:
    """Reasoning, from wherever it stands, into each of the fields: a template reads one of them and ignores the others."""
    given = {field: message.pop(field) for field in REASONING_FIELDS if field in message}
    for field, reasoning in given.items():
        if isinstance(reasoning, list):
            given[field] = reasoning = _thinking({field: reasoning}, field, where)
        if not isinstance(reasoning, str):
            raise ConversationError(f"{where}: {field} is {type(reasoning).__name__}, expected a string")
        if whole := _WHOLE_BLOCK.fullmatch(reasoning):
            given[field] = whole[1]
    details = message.pop("reasoning_details", None)
    if details is not None:
        given["reasoning_details"] = _reasoning_details(details, any(map(str.strip, given.values())), where)
    if from_parts:
        given["content"] = "\n".join(from_parts)
    content = text_of(message)
    inline = (_BLOCK.match(content) or _CLOSED_BLOCK.match(content)) if "</think>" in content else None
    if inline and not is_trained(message) and _THINK.search(content[inline.end() :]):
        inline = None  # such a message stays as it is
    if inline:
        if "content" in given and inline[1].strip():
            raise ConversationError(f"{where}: content has a thinking part and a <think> block, expected one of them")
        given.setdefault("content", inline[1].strip("\n"))
        message["content"] = content = content[inline.end() :]
    distinct = {reasoning.strip(): reasoning for reasoning in given.values() if reasoning.strip()}
    if len(distinct) > 1:
        raise ConversationError(f"{where}: {' and '.join(given)} hold different reasoning, expected one")
    tag = next((found[0] for text in (content, *distinct.values()) for found in _THINK.finditer(text)), None)
    if tag and is_trained(message):
        what = "is not closed" if tag == "<think>" and "</think>" not in content else "stands inside its text"
        raise ConversationError(
            f'{where}: {tag} {what}, expected one block before the content; mark the message "train": false, or mend it'
        )
    for reasoning in distinct.values():
        message |= dict.fromkeys(REASONING_FIELDS, reasoning)


def _reasoning_details(details, known: bool, where: str) -> str:
    """The texts of OpenRouter's `reasoning_details`."""
    if not isinstance(details, list) or not all(isinstance(part, Mapping) for part in details):
        raise ConversationError(f"{where}: reasoning_details is {_short(details)}, expected a list of objects")
    texts = [part["text"] for part in details if isinstance(part.get("text"), str)]
    if details and not texts and not known:
        kinds = ", ".join(sorted({str(part.get("type")) for part in details}))
        raise ConversationError(f"{where}: reasoning_details has no text (only {kinds}), so its reasoning is not known")
    return "" if known else "".join(texts)


def _short(value) -> str:
    """For errors."""
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "…"

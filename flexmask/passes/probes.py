"""Probes: short conversations of marked texts, which a chat template is given to see what it makes of them."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ..messages import REASONING_FIELDS, reasoning_of, text_of

# Control tokens as templates write them. Texts are never compared in the middle of one.
TAG = re.compile(r"<[^<>\s]{1,40}>|\[/?[A-Z_]{2,30}\]|◁[^▷\s]{1,30}▷")
# Marks are put behind the first visible character of a text, where no template strips them.
REASONING_MARK, CONTENT_MARK, CALL_MARK = "@@flexmask-r@@", "@@flexmask-c@@", "@@flexmask-f@@"
USER, NEXT, ANSWER, THOUGHT = "Qflexmask1", "Nflexmask2", "Aflexmask3", "Tflexmask4"
NAME, KEY, VALUE = "flexmask_f", "flexmask_k", "flexmask_v"
TOOL = {
    "type": "function",
    "function": {
        "name": NAME,
        "description": "A probe.",
        "parameters": {"type": "object", "properties": {KEY: {"type": "string", "description": "Any."}}},
    },
}


@dataclass(frozen=True)
class Kind:
    """What decides how a message is written: the role before it, and whether it has reasoning, content, calls."""

    follows: str
    reasoning: bool
    content: bool
    calls: bool

    @classmethod
    def of(cls, context: Sequence[Mapping], message: Mapping) -> Kind:
        follows = context[-1]["role"] if context else "system"
        parts = reasoning_of(message).strip(), text_of(message).strip(), message.get("tool_calls")
        return cls(follows if follows in ("tool", "assistant") else "user", *map(bool, parts))


def marked(message: Mapping) -> dict:
    """The message with marks in its reasoning, its content and the name in its first call."""
    message = dict(message)
    if reasoning_of(message).strip():
        message |= dict.fromkeys(REASONING_FIELDS, _with_mark(reasoning_of(message), REASONING_MARK))
    content = message["content"]
    if isinstance(content, list):
        first = next((i for i, part in enumerate(content) if part["text"].strip()), None)
        message["content"] = [
            part | {"text": _with_mark(part["text"], CONTENT_MARK)} if i == first else part
            for i, part in enumerate(content)
        ]
    else:
        message["content"] = _with_mark(content, CONTENT_MARK)
    if message.get("tool_calls"):
        first, *others = message["tool_calls"]
        function = first["function"] | {"name": _with_mark(first["function"]["name"], CALL_MARK)}
        message["tool_calls"] = [first | {"function": function}, *others]
    return message


def numbered_mark(number: int) -> str:
    """A mark of `with_marks_in_calls`."""
    return f"@@flexmask-{number}@@"


def with_marks_in_calls(message: Mapping, first: int) -> dict:
    """The message with a mark of its own in the name of each call, counted from `first`."""
    calls = [
        call | {"function": call["function"] | {"name": _with_mark(call["function"]["name"], numbered_mark(first + k))}}
        for k, call in enumerate(message["tool_calls"])
    ]
    return {**message, "tool_calls": calls}


def without_numbered_marks(text: str) -> str:
    return re.sub(r"@@flexmask-\d+@@", "", text)


def _with_mark(text: str, mark: str) -> str:
    at = len(text) - len(text.lstrip()) + 1
    return text[:at] + mark + text[at:] if text.strip() else text


def unmarked(text: str) -> str:
    """Without any marks."""
    return text.replace(REASONING_MARK, "").replace(CONTENT_MARK, "").replace(CALL_MARK, "")


def visible_at(text: str) -> int:
    """Where the first visible piece of a marked message begins: its content, or the name in its first call; -1 if nowhere."""
    found = [at for at in (text.find(CONTENT_MARK), text.find(CALL_MARK)) if at >= 0]
    return min(found) - 1 if found else -1  # a mark stands behind the first character


def after_reasoning(answered: str, message: Mapping) -> str | None:
    """What stands between the reasoning of a marked message and its first visible piece; None where it is not rendered."""
    at, visible = answered.find(REASONING_MARK), visible_at(answered)
    if not 0 <= at < visible:
        return None
    return answered[at + len(REASONING_MARK) : visible].removeprefix(reasoning_of(message).strip()[1:])


def common_start(a: str, b: str) -> str:
    """The common beginning of two texts, not ending inside a control token of either."""
    same = len(os.path.commonprefix([a, b]))
    for text in (a, b):
        for found in TAG.finditer(text, max(0, same - 60), same + 60):
            if found.start() < same < found.end():
                same = found.start()
    return a[:same]


def probe(kind: Kind) -> tuple[list[dict], dict]:
    """A short conversation and a message of this kind. The probe's call has no reasoning before it that a template drops."""
    user = {"role": "user", "content": USER}
    context = {
        "user": [user],
        "assistant": [user, {"role": "assistant", "content": NEXT}],
        "tool": [
            user,
            {"role": "assistant", "content": "", "tool_calls": [call()]},
            tool_result(),
        ],
    }[kind.follows]
    message = {"role": "assistant", "content": ANSWER if kind.content else ""}
    if kind.reasoning:
        message |= dict.fromkeys(REASONING_FIELDS, THOUGHT)
    if kind.calls:
        message["tool_calls"] = [call()]
    return context, message


def call() -> dict:
    # Mistral's templates want ids of nine letters and digits.
    return {"type": "function", "id": "flexmask1", "function": {"name": NAME, "arguments": {KEY: VALUE}}}


def tool_result() -> dict:
    """The answer to `call`."""
    return {"role": "tool", "content": NEXT, "name": NAME, "tool_call_id": call()["id"]}


def after_last(text: str, piece: str) -> str:
    """What follows the last occurrence of a piece that is in a text."""
    return text[text.rindex(piece) + len(piece) :]

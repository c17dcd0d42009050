"""Shapes of conversations: what a chat template may be asked to render."""

from __future__ import annotations

import copy
import json


def system(text):
    return {"role": "system", "content": text}


def user(text):
    return {"role": "user", "content": text}


def answer(text, reasoning=None, **keys):
    return {"role": "assistant", "content": text} | ({"reasoning_content": reasoning} if reasoning else {}) | keys


def call(name="find_city", ident="callnum01", **arguments):
    return {"id": ident, "type": "function", "function": {"name": name, "arguments": arguments}}


def result(text, name="find_city", ident="callnum01"):
    return {"role": "tool", "name": name, "tool_call_id": ident, "content": text}


def function(name, description, /, **properties):
    parameters = {"type": "object", "properties": properties, "required": list(properties)}
    return {"type": "function", "function": {"name": name, "description": description, "parameters": parameters}}


TOOLS = [
    function("find_city", "Looks a city up.", city={"type": "string", "description": "Its name."}),
    function("count_days", "Counts days between dates.", start={"type": "string"}, days={"type": "integer"}),
]
SYSTEM = system("Answer in short sentences.")
Q = [user("Which river runs through Porto?"), user("And through Lyon?"), user("Which of them is longer?")]
A = ["The Douro does.", "Both the Saone and the Rhone.", "Clearly the Douro wins."]
R = ["Porto lies at a river mouth.", "Lyon has a confluence.", "Compare 897 with 813 kilometres."]


def turns(*reasoned):
    return [m for k in range(3) for m in (Q[k], answer(A[k], R[k] if k in reasoned else None))]


def _loop(first=R[0], then=R[1], last=R[2]):
    return [
        user("Tell me about Porto and wait."),
        answer("", first, tool_calls=[call(city="Porto")]),
        result("Porto: 231,800 people"),
        answer("", then, tool_calls=[call("count_days", "callnum02", start="2024-02-27", days=3)]),
        result("2024-03-01", "count_days", "callnum02"),
        answer("It has 231,800 people today.", last),
        user("Thanks, and its country?"),
        answer("Portugal, of course.", "Easy geography." if first else None),
    ]


def _two_calls(content="", reasoning=None):
    calls = [call(city="Porto"), call("count_days", "callnum02", start="2024-02-27", days=3)]
    return [
        user("Porto, and three days from February 27?"),
        answer(content, reasoning, tool_calls=calls),
        result("Porto: 231,800 people"),
        result("2024-03-01", "count_days", "callnum02"),
        answer("March 1, and many people.", R[1] if reasoning else None),
    ]


def _parts(messages):
    return [m | {"content": [{"type": "text", "text": m["content"]}]} for m in messages]


def _as_text(messages):
    messages = copy.deepcopy(messages)
    for m in messages:
        for made in m.get("tool_calls", []):
            made["function"]["arguments"] = json.dumps(made["function"]["arguments"])
    return messages


def _without_ids(messages):
    messages = copy.deepcopy(messages)
    for m in messages:
        m.pop("tool_call_id", None)
        for made in m.get("tool_calls", []):
            made.pop("id")
    return messages


KINDS = {
    "text": 'Ærø says "hi"\nthere', "whole": 42, "ratio": 2.5, "yes": True, "nothing": None,
    "several": ["alpha", "beta"], "nested": {"inner": {"deep": "value"}},
}  # fmt: skip
_TYPED = function("set_all", "Sets everything at once.", **{key: {"description": "Any value."} for key in KINDS})

SHAPES: dict[str, tuple[list[dict], list[dict] | None]] = {
    "one turn, reasoning": ([Q[0], answer(A[0], R[0])], None),
    "one turn, none": ([Q[0], answer(A[0])], None),
    "turns, reasoning": ([SYSTEM, *turns(0, 1, 2)], None),
    "turns, none": (turns(), None),
    "turns, mixed": (turns(0, 2), None),
    "turns, mixed the other way": (turns(1), None),
    "system message": ([SYSTEM, *turns()], None),
    "developer message": ([{"role": "developer", "content": "Prefer rivers."}, *turns(0)], None),
    "late system message": ([*turns(0)[:4], system("From now on, in French."), *turns(0, 2)[4:]], None),
    "tool loop, reasoning": (_loop(), TOOLS),
    "tool loop, none": (_loop(None, None, None), TOOLS),
    "tool loop, mixed": (_loop(R[0], None, R[2]), TOOLS),
    "a long tool loop": (
        [
            Q[0],
            *[
                m
                for at, city in enumerate(("Porto", "Lyon", "Turin", "Basel"))
                for m in (
                    answer("", tool_calls=[call(city=city, ident=f"callnum1{at}")]),
                    result(f"{city} is fine", ident=f"callnum1{at}"),
                )
            ],
            answer(A[0]),
        ],
        TOOLS,
    ),
    "two calls in a message": (_two_calls(), TOOLS),
    "two calls, reasoning": (_two_calls("", R[0]), TOOLS),
    "calls with content": (_two_calls("Let me look both up."), TOOLS),
    "one call with content": (
        [Q[0], answer("Let me look it up.", tool_calls=[call(city="Porto")]), result("Porto: a river"), answer(A[0])],
        TOOLS,
    ),
    "calls with content and reasoning": (_two_calls("Let me look both up.", R[0]), TOOLS),
    "arguments as JSON text": (_as_text(_loop()), TOOLS),
    "tool loop, tools not given": (_loop(), None),
    "tool loop, none, tools not given": (_loop(None, None, None), None),
    "calls without ids": (_without_ids(_loop()), TOOLS),
    "arguments of every kind": (
        [Q[0], answer("", R[0], tool_calls=[call("set_all", **KINDS)]), result("done", "set_all"), answer(A[0], R[1])],
        [_TYPED],
    ),
    "call without arguments": (
        [Q[0], answer("", R[0], tool_calls=[call("now_time")]), result("12:30", "now_time"), answer(A[0], R[1])],
        [function("now_time", "Tells the time.")],
    ),
    "tools not called": ([SYSTEM, *turns(0, 2)], TOOLS),
    "ends in a tool message": (_loop()[:5], TOOLS),
    "content in parts": (_parts([SYSTEM, *turns(0, 2)]), None),
    "whitespace around": (
        [
            user("  Which river? \n"),
            answer(" \nThe Douro does. \n", "\n Porto lies there.\n\n"),
            Q[1],
            answer(" Rhone. "),
        ],
        None,
    ),
    "markup and JSON": (
        [
            user("Show me <b>bold</b> & {{ jinja }} in Ærøskøbing 東京 🌉"),
            answer(
                '<p class="x">Ærø & 東京</p>\n```json\n{"a": ["1", {}]}\n```', "Maybe {% raw %} or <i>, [x](y) 思考."
            ),
            Q[1],
            answer('It\'s "fine"\\n, 100%.'),
        ],
        None,
    ),
    "the tool's name in the text": (
        [
            user("Use find_city with city Porto."),
            answer("I call find_city now.", "find_city with city Porto seems right.", tool_calls=[call(city="Porto")]),
            result("find_city found Porto"),
            answer("find_city says Porto.", "So find_city worked."),
        ],
        TOOLS,
    ),
    "reasoning in paragraphs": (
        [
            Q[0],
            answer(A[0], "First this.\n\nThen that:\n- one\n- two\n\nDone."),
            Q[1],
            answer(A[1], "Short.\nTwo lines."),
        ],
        None,
    ),
    "reasoning that is the answer": ([Q[0], answer(A[0], A[0]), Q[1], answer(A[1], f"I say: {A[1]}")], None),
    "the same answer in every turn": (
        [Q[0], answer("Yes.", R[0]), Q[1], answer("Yes.", R[1]), Q[2], answer("Yes.")],
        None,
    ),
    "assistant messages in a row": (
        [Q[0], answer(A[0], R[0]), answer("Let me add one thing.", R[1]), Q[1], answer(A[1])],
        None,
    ),
    "assistant speaks first, untrained": ([answer("Welcome here!", train=False), *turns(0)], None),
    "assistant speaks first": ([answer("Welcome here!"), *turns(0)], None),
    "one turn untrained": ([m | {"train": False} if m.get("content") == A[1] else m for m in turns(0, 1, 2)], None),
    "as the API writes it": (
        _as_text(
            [
                SYSTEM,
                Q[0],
                answer(
                    None, tool_calls=[call(city="Porto", ident="call_Xq1PzR0dfKm3"), call(city="Lyon", ident="call_9")]
                ),
                result("no answer", ident="call_Xq1PzR0dfKm3"),
                result("none either", ident="call_9"),
                answer(A[0]),
            ]
        ),
        TOOLS,
    ),
}

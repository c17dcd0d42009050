"""What is right of a pass, found out from the template's own renderings; shares no code with the renderer.

`faults` says what is wrong with one pass, `legitimate` why a conversation cannot be rendered.
"""

from __future__ import annotations

import copy
import functools
import itertools
import json
import re
from collections import Counter, defaultdict
from collections.abc import Iterator

from template_corpus import ENDS, literal_text, make_tokenizer
from template_shapes import TOOLS, answer, call, function, result, turns, user
from transformers.utils.chat_template_utils import render_jinja_template

# How the families write thinking: what opens it, what closes it.
TAGS = (
    ("<think>", "</think>"), ("[THINK]", "[/THINK]"), ("<|START_THINKING|>", "<|END_THINKING|>"),
    ("<seed:think>", "</seed:think>"), ("<mm:think>", "</mm:think>"), ("<think:opensource>", "</think:opensource>"),
    ("<|channel>thought\n", "<channel|>"), ("<|channel|>analysis<|message|>", "<|end|>"),
    ("<|open|>think<|sep|>", "<|close|>think<|sep|>"), ("<|think|>", "<|end|>"), (" to=self<|message|>", "<|eom|>"),
    ("Here are my reasoning steps:\n", "[BEGIN FINAL RESPONSE]"), ("<|inner_prefix|>", "<|inner_suffix|>"),
)  # fmt: skip
GENERIC = ("<|end|>", "<|eom|>")  # close other things too
SWITCHES = ("enable_thinking", "thinking")
# Arguments that make a template keep the reasoning of history, so that more of what it can write is seen.
KEEPING = {
    "preserve_thinking": True, "clear_thinking": False, "truncate_history_thinking": False, "drop_thinking": False,
    "preserve_reasoning": True, "think_render_option": "all", "keep_all_reasoning": True,
}  # fmt: skip


def variants(value) -> list[str]:
    """The ways in which templates write a value."""
    if isinstance(value, str):
        quoted = [json.dumps(value, ensure_ascii=ascii)[1:-1] for ascii in (False, True)]
        return list(dict.fromkeys([value, value.strip(), *quoted, repr(value)[1:-1]]))
    return list(dict.fromkeys([json.dumps(value), str(value)]))


def leaves(value) -> Iterator:
    if isinstance(value, dict):
        for key, item in value.items():
            yield key
            yield from leaves(item)
    elif isinstance(value, list):
        for item in value:
            yield from leaves(item)
    else:
        yield value


def position(value, text: str, start: int = 0, end: int | None = None) -> tuple[int, int] | None:
    """Where one of the ways of writing a value begins and ends, the first one first."""
    for variant in variants(value):
        if variant and (found := text.find(variant, start, end)) >= 0:
            return found, found + len(variant)
    return None


def plain_text(message: dict) -> str:
    content = message.get("content") or ""
    return content if isinstance(content, str) else "".join(part["text"] for part in content)


def canonical(messages: list[dict]) -> list[dict]:
    """As templates take them: objects as arguments, no nulls, reasoning in each of its fields."""
    made = []
    for message in copy.deepcopy(messages):
        message = {k: v for k, v in message.items() if k not in ("train", "weight") and v is not None}
        message.setdefault("content", "")
        for of in message.get("tool_calls", []):
            if isinstance(of["function"]["arguments"], str):
                of["function"]["arguments"] = json.loads(of["function"]["arguments"])
        if message.get("reasoning_content"):
            message |= dict.fromkeys(("reasoning", "thinking"), message["reasoning_content"])
        made.append(message)
    return made


def formed(messages: list[dict], arguments: str, developer: str, content: str) -> list[dict]:
    """The same messages in one of the forms that templates expect."""
    made = []
    for message in messages:
        message = dict(message)
        if message["role"] == "developer":
            message["role"] = developer
        if content == "text":
            message["content"] = plain_text(message)
        elif content == "parts" or (content == "user parts" and message["role"] == "user"):
            message["content"] = [{"type": "text", "text": plain_text(message)}]
        if arguments != "object" and message.get("tool_calls"):
            ascii = arguments == "ascii"
            message["tool_calls"] = [
                c
                | {
                    "function": c["function"]
                    | {"arguments": json.dumps(c["function"]["arguments"], ensure_ascii=ascii)}
                }
                for c in message["tool_calls"]
            ]
        made.append(message)
    return made


class Family:
    """One template with its tokenizer and arguments, and what it can do, found out by rendering."""

    def __init__(self, name: str, source: str, tokenizer=None, **kwargs):
        self.name, self.source, self.kwargs = name, source, kwargs
        self.tokenizer = tokenizer or make_tokenizer(name, source)
        self.tags = [pair for pair in TAGS if self._writes(pair)]
        self._cache: dict[str, str | Exception] = {}
        self.label = name + ("" if not kwargs else f" [{', '.join(f'{k}={v}' for k, v in kwargs.items())}]")

    def _writes(self, pair) -> bool:
        opening, closing = pair
        text = literal_text(self.source) + self.source
        if opening == "<think:opensource>":
            return "hy_" in self.source
        if opening == "<|open|>think<|sep|>":
            return "open_tag('think'" in self.source
        if opening == "<|think|>":
            return "assistant<|think|>" in text
        return opening.strip() in text or (closing in text and closing not in GENERIC)

    def rendered(self, messages, tools=None, generate=False, **kwargs) -> str | Exception:
        """What the template writes, or what it raises."""
        kwargs = {**self.kwargs, **kwargs}
        key = json.dumps([messages, tools, generate, kwargs])
        if key not in self._cache:
            try:
                self._cache[key] = self._apply(messages, tools, generate, kwargs)
            except Exception as error:  # templates raise anything
                self._cache[key] = error
        return self._cache[key]

    def _apply(self, messages, tools, generate, kwargs) -> str:
        if not messages:  # the tokenizer refuses it; a renderer may let a conversation begin with an answer
            kwargs = {**self.tokenizer.special_tokens_map, **kwargs}
            return render_jinja_template(
                [[]], tools, chat_template=self.source, add_generation_prompt=generate, **kwargs
            )[0][0]
        return self.tokenizer.apply_chat_template(
            messages, tools=tools, add_generation_prompt=generate, tokenize=False, **kwargs
        )

    # What the template can do.

    @functools.cached_property
    def switch(self) -> str | None:
        """The argument that changes whether a turn thinks."""
        for name in SWITCHES:
            if name in self.source:
                tails = {self.tail([user("Hm?")], **{name: value}) for value in (True, False)}
                if len(tails) == 2:
                    return name
        return None

    @functools.cached_property
    def off(self) -> dict:
        """Arguments with which the template does not think, beyond those given; {} if there are none."""
        return {self.switch: False} if self.switch else {}

    @functools.cached_property
    def thinks(self) -> bool:
        """Whether reasoning has a place: the template writes it, or its prompt opens it."""
        if self.state(self.tail([user("Hm?")])) == "open":
            return True
        probe = canonical([user("Hm?"), answer("Indeed.", "Ponder."), user("Really?"), answer("Yes.", "Wonder.")])
        texts = [
            self.rendered(probe[:n], generate=g, **k) for n in (2, 4) for g in (False, True) for k in self.settings
        ]
        return any("Ponder." in t or "Wonder." in t for t in texts if isinstance(t, str))

    @functools.cached_property
    def takes_reasoning(self) -> bool:
        """Whether reasoning can be trained under these arguments."""
        state = self.state(self.tail([user("Hm?")]))
        if state == "none" and self.switch:  # perhaps only with the switch on
            probe = canonical([user("Hm?"), answer("Indeed.", "Ponder."), result("Hm!")])
            probe[1]["tool_calls"] = [call(city="Porto")]
            texts = [self.rendered(p[:n], TOOLS) for p in (probe, canonical(turns(0))) for n in (2, 3)]
            return any("Ponder." in t or turns(0)[1]["reasoning_content"] in t for t in texts if isinstance(t, str))
        return self.thinks and state != "closed"

    @functools.cached_property
    def developer(self) -> str:
        """Whether a developer message is taken as one, or only as a system message, or not."""
        for role, word in (("developer", "yes"), ("system", "as system")):
            text = self.rendered([{"role": role, "content": "Prefer rivers."}, user("Hm?")], generate=True)
            if isinstance(text, str) and "Prefer rivers." in text:
                return word
        return "no"

    @functools.cached_property
    def parts(self) -> bool:
        """Whether contents in parts are taken."""
        text = self.rendered([{"role": "user", "content": [{"type": "text", "text": "Hm, so?"}]}], generate=True)
        return isinstance(text, str) and "Hm, so?" in text and "'type'" not in text

    @functools.cached_property
    def settings(self) -> list[dict]:
        """Arguments under which to look at what the template can write."""
        keep = {k: v for k, v in KEEPING.items() if k in self.source and k not in self.kwargs}
        return [
            {},
            *([keep] if keep else []),
            *([self.off, {self.switch: True}, {**keep, self.switch: True}] if self.switch else []),
        ]

    def tail(self, context, tools=None, **kwargs) -> str:
        """The generation prompt: what is written after the last message's text ("" where the template raises)."""
        text = self.rendered(context, tools, True, **kwargs)
        return after_context(text, context) if isinstance(text, str) else ""

    def tail_of(self, prompt: str, context) -> str:
        """Of a prompt over these messages; without any, its end, as long as generation prompts are."""
        return after_context(prompt, context) if context else prompt[-len(self.tail([user("Hm?")])) :]

    def state(self, tail: str) -> str:
        """Of the thinking at the end of a prompt: none, open or closed."""
        last = [
            (tail.rfind(tag), state)
            for pair in self.tags
            for tag, state in zip(pair, ("open", "closed"))
            if tag not in GENERIC or tail.rfind(pair[0]) >= 0
        ]
        last = [found for found in last if found[0] >= 0]
        return max(last)[1] if last else "none"

    @functools.cached_property
    def leads(self) -> tuple[set[str], set[str], set[str]]:
        """What the template writes between a generation prompt and a content, between one and a reasoning, and between
        reasoning and content."""
        plain, before, between = set(), set(), set()
        context = [user("Hm?")]
        called = answer("Indeed.", "Ponder.", tool_calls=[call(city="Porto")])
        for said, then in (
            (answer("Indeed."), user("Really?")),
            (answer("Indeed.", "Ponder."), user("Really?")),
            (called, result("Yes.")),
            (called | {"content": ""}, result("Yes.")),
        ):
            for setting in self.settings:
                for form in forms(canonical([*context, said, then])):
                    for conversation in (form, form[:2]):
                        text = self.rendered(conversation, TOOLS if said.get("tool_calls") else None, **setting)
                        if (
                            not isinstance(text, str)
                            or "Hm?" not in text
                            or not {"Indeed.", "Ponder."} & set(re.findall(r"\w+\.", text))
                        ):
                            continue
                        head, tail = text.split("Hm?")[1], self.tail(form[:1], **setting)
                        first, thought, rest = (
                            head.partition("Ponder.") if "Ponder." in head else (head.split("Indeed.")[0], "", "")
                        )
                        if first.startswith(tail):
                            (before if thought else plain).add(first[len(tail) :])
                        ended = [m.end() for pair in self.tags if (m := re.match(r"\s*" + re.escape(pair[1]), rest))]
                        if thought and "Indeed." in rest and not said.get("tool_calls"):
                            between.add(rest.split("Indeed.")[0])
                        elif thought and ended and not between:
                            between |= {rest[: ended[0]] + space for space in ("", "\n", "\n\n")}
        return plain, before, between

    @functools.cached_property
    def ends(self) -> dict[str, str]:
        """What ends a message, and a message with calls: the first known end the template writes after it."""
        ends = {}
        for kind in ("content", "calls"):
            said = answer("MARK") if kind == "content" else answer("", tool_calls=[call("MARK", VALUE="LAST")])
            tools = None if kind == "content" else [function("MARK", "Does it.", VALUE={"type": "string"})]
            follow = user("NEXT") if kind == "content" else result("NEXT", "MARK")
            for messages, reasoned in itertools.product(
                ([user("FIRST"), said], [user("FIRST"), said, follow]), (False, True)
            ):
                if reasoned:
                    messages = [messages[0], messages[1] | {"reasoning_content": "PONDER"}, *messages[2:]]
                for form in forms(canonical(messages)):
                    text = self.rendered(form, tools)
                    text = self.rendered(form, tools or TOOLS) if not isinstance(text, str) else text
                    mark = "MARK" if kind == "content" else "LAST"
                    if isinstance(text, str) and mark in text:
                        rest = text[text.rfind(mark) + 4 :].split("NEXT")[0]
                        known = [(rest.find(t), t) for t in {*ENDS, self.tokenizer.eos_token} if t in rest]
                        if kind not in ends and known:
                            ends[kind] = min(known)[1]
        eos = self.tokenizer.eos_token
        return {"content": ends.get("content", eos), "calls": ends.get("calls", ends.get("content", eos))}


def forms(messages: list[dict]) -> Iterator[list[dict]]:
    """Equivalent forms of messages, the preferred ones first."""
    has_calls = any(m.get("tool_calls") for m in messages)
    has_developer = any(m["role"] == "developer" for m in messages)
    has_parts = any(not isinstance(m.get("content", ""), str) for m in messages)
    for arguments in ("object", "text", "ascii") if has_calls else ("object",):
        for developer in ("developer", "system") if has_developer else ("developer",):
            for content in (*(("as given",) if has_parts else ()), "text", "parts", "user parts"):
                yield formed(messages, arguments, developer, content)


def after_context(text: str, context: list[dict]) -> str:
    """The part of a prompt after the last text of its last message."""
    found = [at + len(v) for v in variants(_last_text(context)) if v and (at := text.rfind(v)) >= 0]
    return text[max(found) :] if found else text


def lost(text: str, messages: list[dict], tools) -> str | None:
    """What of messages and tools a prompt does not hold."""
    counts = Counter(plain_text(m).strip() for m in messages)
    for index, message in enumerate(messages):
        content = plain_text(message).strip()
        if message.get("tool_calls") and "<|channel|>" in text:
            content = ""  # a thought to gpt-oss, and gone after the turn
        if content and max(text.count(v) for v in variants(content)) < counts[content]:
            return f"message {index} ({message['role']}): {content[:40]!r}"
        for of in message.get("tool_calls", []):
            arguments = of["function"]["arguments"]
            arguments = json.loads(arguments) if isinstance(arguments, str) else arguments
            if missing := missing_call(text, of["function"]["name"], arguments):
                return f"message {index} (assistant): {missing} of its call"
    for tool in tools or ():
        function = tool["function"]
        for value in (function["name"], function["description"], *function["parameters"]["properties"]):
            if not position(value, text):
                return f"the tool {function['name']}: {value!r}"
    return None


def missing_call(text: str, name: str, arguments: dict) -> str | None:
    """The first of a call's name, keys and values that a text does not hold as JSON or markup would."""
    if name not in text:
        return repr(name)
    for value in leaves(arguments):
        if not position(value, text):
            return repr(value)
    for key, value in arguments.items():
        if (
            not isinstance(value, str)
            or f'"{key}": {json.dumps(value, ensure_ascii=False)}' in text
            or f"{key}=" in text
        ):
            continue  # as JSON, or as Python calls functions
        if f"'{key}': {value!r}" in text:
            return f"{key!r} as JSON (it is written as Python)"
        if re.search(rf'\\+"{re.escape(key)}\\+": *\\+"{re.escape(value)}', text):
            return f"{key!r} as JSON (it is written twice encoded)"
    return None


def expected_prompts(family: Family, context, tools, generate=True, **kwargs) -> tuple[set[str], str]:
    """What inference may see: the template over the context, in a form in which nothing is lost; and why there is none."""
    groups: dict[tuple, set[str]] = defaultdict(set)
    why = ""
    for form in forms(context):
        calls = [c["function"]["arguments"] for m in form for c in m.get("tool_calls", [])]
        kind = (any(isinstance(a, str) for a in calls), not any(m["role"] == "developer" for m in form))
        if groups and kind > min(groups):
            break  # forms come in this order
        text = family.rendered(form, tools, generate, **kwargs)
        if not isinstance(text, str):
            why = why or f"raises {str(text)[:120]!r}"
        elif gone := lost(text, form, tools):
            if not why or (why.startswith("leaves out message") and gone.startswith("the tool")):
                why = f"leaves out {gone}"
        else:
            groups[kind].add(text)
            if all(isinstance(m["content"], str) for m in context):
                break  # texts were given, and are taken
    return (groups[min(groups)], "") if groups else (set(), why)


class Lazy:
    """A sequence that is made as far as it is looked at."""

    def __init__(self, source: Iterator[str]):
        self._made, self._source = [], source

    def __iter__(self) -> Iterator[str]:
        yield from self._made
        for item in self._source:
            self._made.append(item)
            yield item


def seen_renderings(family: Family, messages, index: int, tools) -> Lazy:
    """All that the template writes with this message in it: last, followed by what follows, under every setting."""
    following = list(itertools.takewhile(lambda m: m["role"] == "tool", messages[index + 1 :]))
    upto = messages[: index + 1]
    conversations = [upto, [*upto, *following, user("Afterwards?")], *([[*upto, *following]] if following else [])]

    def each():
        seen = set()
        for setting, generate in [*((s, False) for s in family.settings), *((s, True) for s in family.settings)]:
            for conversation in conversations:
                for text in lossless(family, conversation, tools, generate, **setting) or every(
                    family, conversation, tools, generate, **setting
                ):
                    if text not in seen:
                        seen.add(text)
                        yield text

    return Lazy(each())


def every(family: Family, conversation, tools, generate, **kwargs) -> list[str]:
    """The renderings of all forms."""
    texts = (family.rendered(form, tools, generate, **kwargs) for form in forms(conversation))
    return [t for t in texts if isinstance(t, str)]


def lossless(family: Family, conversation, tools, generate, **kwargs) -> list[str]:
    """The renderings of the best forms: those in which nothing is lost."""
    return sorted(expected_prompts(family, conversation, tools, generate, **kwargs)[0])


def faults(
    family: Family, messages, index: int, tools, prompt: str, completion: str, empty: str = "prompt"
) -> list[str]:
    """What is wrong with one pass, in words; [] if nothing is.

    Args:
        messages: in canonical form.
        prompt, completion: as text.
        empty: what was asked of turns without reasoning.
    """
    found = []
    message, context = messages[index], messages[:index]
    reasoning, content = message.get("reasoning_content", ""), plain_text(message)
    calls = [(c["function"]["name"], c["function"]["arguments"]) for c in message.get("tool_calls", [])]
    renderings = seen_renderings(family, messages, index, tools)
    tail = family.tail_of(prompt, context)

    # (a), (e): the prompt.
    on, why = expected_prompts(family, context, tools)
    off, _ = expected_prompts(family, context, tools, **family.off) if family.off else (set(), "")
    state = family.state(tail)
    if prompt not in on | off:
        return [f"prompt: not what the template writes before message {index} ({why or 'in any equivalent form'})"]
    if reasoning and prompt not in on:
        found.append("prompt: thinking switched off for a turn with reasoning")
    if reasoning and state == "closed":
        found.append("prompt: thinking is closed before a turn with reasoning")

    # (d): the end of the turn.
    end = family.ends["calls" if calls else "content"]
    if not completion.endswith(end):
        last = re.findall(r"<[^<>\s]{1,40}>|\[[^\[\]\s]{1,20}\[?|\S+", completion[-60:])[-1:]
        found.append(f"end: {last}, expected {end!r}")
    body = completion.removesuffix(end)
    inner = [t for t in (*ENDS, family.tokenizer.eos_token) if t in _masked(body, reasoning, content)]
    allowed = {pair[1] for pair in family.tags} | (
        {"<|message_sep|>"} if "GigaChat3-10B" in family.name and calls else set()
    )
    if inner := [t for t in dict.fromkeys(inner) if t not in allowed]:
        found.append(f"end: {inner[0]!r} inside the completion")

    # (b): reasoning, content and calls, once and in order.
    place, spans = 0, {}
    for what, value in (("reasoning", reasoning), ("content", content)):
        if not value.strip():
            continue
        at = position_of_text(value, body, place)
        if at is None:
            found.append(f"{what}: not there" if position_of_text(value, body, 0) is None else f"{what}: out of order")
        else:
            spans[what], place = at, at[1]
            times = reasoning.count(value.strip()) + content.count(value.strip())
            if body.count(value.strip()) > times and not calls:
                found.append(f"{what}: {body.count(value.strip())} times, expected {times}")
    for name, arguments in calls:
        began = body.find(name, place)
        if began < 0:
            if not reasoned_calls_first(family, messages, index, tools, body + end, spans):
                found.append(f"calls: {name} not there after what precedes it")
            continue
        if missing := missing_call(body[began:], name, arguments):
            found.append(f"calls: {missing} of {name} not there")
        ended = [at[1] for value in leaves(arguments) if (at := position(value, body, began + len(name)))]
        place = max([began + len(name), *ended])
    for other, text in enumerate(map(plain_text, messages)):
        text = text.strip()
        mine = (reasoning, content, json.dumps([c[1] for c in calls], ensure_ascii=False))
        if other != index and len(text) > 7 and text in completion and not any(text in own for own in mine):
            found.append(f"completion: holds the text of message {other}")

    # (c): thinking is opened once, closed once, around the reasoning.
    skeleton = tail + _skeleton(body, spans)
    inside = (
        calls and not reasoning and "<|channel|>analysis" in skeleton
    )  # gpt-oss has what is said before a call as a thought
    found += [] if inside else _thinking_faults(family, skeleton, bool(reasoning), state)
    if not reasoning and not inside and empty == "prompt" and not any("thinking" in f for f in found):
        written = _skeleton(body, spans)
        thought = any(tag in written for pair in family.tags for tag in pair if tag not in GENERIC)
        usable = [p for p in off if family.state(family.tail_of(p, context)) != "open"]
        if thought and usable and not (usable[0] in on and len(usable) == 1):
            found.append("empty thought trained although the template has a switch for it")
        if prompt in off and prompt not in on and not _would_write_a_thought(family, messages, index, tools, on):
            found.append("prompt: thinking switched off for nothing")

    # Nothing else: the visible part as the template writes it somewhere, and before it what the template writes.
    if not found:
        found += _markup_faults(family, messages, index, tools, tail, body, end, spans, renderings)
    return found


def reasoned_calls_first(family: Family, messages, index: int, tools, completion: str, spans) -> bool:
    """Whether the template has calls before the content, and then what the tools say (Gemma 4 in some of its versions)."""
    message = messages[index]
    answers = [result("fine", c["function"]["name"], c.get("id", "callnum01")) for c in message["tool_calls"]]
    visible = completion[spans.get("reasoning", (0, 0))[1] :]
    for pair in family.tags:
        visible = visible.split(pair[1], 1)[-1] if "reasoning" in spans else visible
    texts = lossless(family, [*messages[: index + 1], *answers, answer("Well.")], tools, False)
    return all(
        missing_call(completion, c["function"]["name"], c["function"]["arguments"]) is None
        for c in message["tool_calls"]
    ) and any(visible.lstrip() in t for t in texts)


def _in_order(first: str, then: str, text: str) -> bool:
    at = text.find(first)
    return at >= 0 and text.find(then, at + len(first)) >= 0


def _masked(body: str, *texts: str) -> str:
    for text in texts:
        for variant in (text, text.strip()):
            if variant:
                body = body.replace(variant, "")
    return body


def position_of_text(value: str, text: str, start: int) -> tuple[int, int] | None:
    """Of a text as it is, or without the whitespace around it (which templates take away)."""
    for variant in (value, value.rstrip(), value.lstrip(), value.strip()):
        if (at := text.find(variant, start)) >= 0:
            return at, at + len(variant)
    return None


def _skeleton(body: str, spans: dict) -> str:
    """The completion with R and C in place of the reasoning and the content."""
    made, place = "", 0
    for what, (began, ended) in sorted(spans.items(), key=lambda item: item[1]):
        made += body[place:began] + {"reasoning": "\x01R\x01", "content": "\x01C\x01"}[what]
        place = ended
    return made + body[place:]


def _thinking_faults(family: Family, skeleton: str, reasoned: bool, state: str) -> list[str]:
    opened = [m.start() for pair in family.tags for m in re.finditer(re.escape(pair[0]), skeleton)]
    closed = [
        m.start() for pair in family.tags if pair[1] not in GENERIC for m in re.finditer(re.escape(pair[1]), skeleton)
    ]
    if len(opened) > 1 or len(closed) > 1:
        return [f"thinking: opened {len(opened)} and closed {len(closed)} times"]
    generic = any(pair[1] in GENERIC for pair in family.tags if pair[0] in skeleton)
    if generic and opened:
        ends = [at for pair in family.tags if (at := skeleton.find(pair[1], opened[0])) >= 0]
        closed = [min(ends)] if ends else []
    if opened and not closed:
        return ["thinking: opened and not closed"]
    if opened and closed and closed[0] < opened[0]:
        return ["thinking: closed before it is opened"]
    if closed and not opened and (reasoned or state != "closed") and "\x01R\x01" not in skeleton and reasoned:
        return ["thinking: closed and not opened"]
    r, c = skeleton.find("\x01R\x01"), skeleton.find("\x01C\x01")
    if reasoned and r >= 0:
        if family.tags and not opened:
            return ["thinking: the reasoning is not opened"]
        if family.tags and not closed:
            return ["thinking: the reasoning is not closed"]
        if (opened and not opened[0] < r) or (closed and not r < closed[0]):
            return ["thinking: the reasoning stands outside"]
    if c >= 0 and closed and c < closed[0]:
        return ["thinking: the content stands inside"]
    if not reasoned and opened and closed:
        inside = skeleton[opened[0] : closed[0]]
        for pair in family.tags:
            inside = inside.replace(pair[0], "")
        if inside.strip():
            return [f"thinking: holds {inside.strip()[:40]!r} in a turn without reasoning"]
    return []


def _would_write_a_thought(family: Family, messages, index, tools, on: set[str]) -> bool:
    """Whether a turn without reasoning has a thought in it with the switch as it is: opened by the prompt or an empty one."""
    context, message = messages[:index], messages[index]
    if any(family.state(family.tail_of(p, context)) == "open" for p in on):
        return True
    for form in forms([*context, message]):
        text = family.rendered(form, tools)
        if isinstance(text, str):
            written = after_context(text, context) if not plain_text(message).strip() else text
            at = position_of_text(plain_text(message), text, 0)
            if plain_text(message).strip():
                at = text.rfind(plain_text(message).strip())
                written = after_context(text[:at], context) if at >= 0 else ""
            if family.state(written) != "none":
                return True
    return False


def segments(text: str, context: list[dict]) -> Iterator[str]:
    """The parts of a rendering that follow the last text of the context, wherever that occurs."""
    if not context:
        yield text
    for variant in variants(_last_text(context)) if context else ():
        at = text.find(variant)
        while variant and at >= 0:
            yield text[at + len(variant) :]
            at = text.find(variant, at + 1)


def _last_text(context: list[dict]):
    for message in reversed(context):
        values = (
            plain_text(message),
            *[v for c in message.get("tool_calls", []) for v in leaves(c["function"]["arguments"])],
        )
        for value in values:
            if value not in ("", None):
                return value
    return ""


def _markup_faults(family, messages, index: int, tools, tail: str, body: str, end: str, spans, renderings) -> list[str]:
    """Whatever else stands in a completion must be what the template writes there."""
    context = messages[:index]
    reasoned = "reasoning" in spans
    reasoning, content = (body[slice(*spans[w])] if w in spans else "" for w in ("reasoning", "content"))
    after_thought = body[spans["reasoning"][1] :] if reasoned else body
    # The visible part, to the end of the turn, is somewhere in what the template writes.
    if content:
        visible = body[spans["content"][0] :]
    else:
        visible = after_thought
        for pair in family.tags:
            visible = visible.split(pair[1], 1)[-1]
        visible = visible.lstrip()
    plainest = seen_renderings(family, [user("Hm?"), messages[index]], 1, tools)
    if not any(visible + end in t for t in itertools.chain(renderings, plainest)) and not any(
        visible.rstrip() in t for t in renderings if end not in after_context(t, messages[: index + 1])
    ):
        return [f"markup: {(visible + end)[-80:]!r} is nowhere written by the template"]
    raw = plain_text(messages[index])
    if content and raw not in body and any(raw in after_context(t, context) for t in renderings):
        return ["content: whitespace around it is left out, which the template keeps"]
    calls = messages[index].get("tool_calls", [])
    if content and calls and 0 <= body.find(calls[0]["function"]["name"]) < spans["content"][0]:
        return []  # checked before: the template has the calls before the content
    # From the end of the prompt on, exactly, where the template's own answers go on where its prompt ends.
    upto = spans["content"][1] if content else len(body.rstrip())
    goes_on = False
    for text in renderings:
        for segment in segments(text, context):
            if segment.startswith(tail) and _in_order(reasoning, content or visible[:20], segment[len(tail) :]):
                before_answer = segment[: segment.find(content or visible[:20], len(tail))]
                goes_on = goes_on or reasoned or family.state(tail) != "open" or family.state(before_answer) != "open"
                if segment.startswith(tail + body[:upto]):
                    return []
    lead = body[: min(spans.values())[0]] if spans else body[: body.find(visible)]
    if goes_on:
        before = "the reasoning" if reasoned else "the answer"
        return [f"markup: {lead[-60:]!r} before {before}, or what follows, not as the template writes it"]
    # Where they do not: what is written between the parts in the plainest of conversations.
    plain, before, between = family.leads
    closing = {f"{a}{pair[1]}{b}" for pair in family.tags for a in ("", "\n") for b in ("", "\n", "\n\n")}
    if not between:  # the template writes no reasoning at all
        between = closing
    if reasoned:
        stubs = {pair[0] for pair in family.tags if not before and any(p.startswith(pair[0]) for p in plain)}
        if (lead.strip() and lead not in before | stubs) or (lead and family.state(tail) == "open"):
            return [f"markup: {lead!r} before the reasoning, not as the template writes it"]
        middle = (
            body[spans["reasoning"][1] : spans["content"][0]]
            if content
            else after_thought[: after_thought.find(visible)]
        )
        if middle not in between | {b + p for b in between for p in plain} and not any(
            _in_order(reasoning + middle, visible, t) for t in renderings
        ):
            spaced = any(
                text != text.strip()
                for text in (messages[index].get("reasoning_content", ""), plain_text(messages[index]))
            )
            if not spaced or middle.strip() not in {b.strip() for b in between}:
                return [f"markup: {middle!r} between the reasoning and what follows, not as the template writes it"]
        return []
    if lead in plain or not lead or (not content and any(lead + visible in t for t in plainest)):
        return []
    if family.state(tail) == "open" and lead.strip(None if not content else "") in {
        b.strip(None if not content else "") for b in between | closing
    }:
        return []
    return [f"markup: {lead[-60:]!r} before the answer, not as the template writes it"]


def legitimate(family: Family, messages, tools) -> str | None:
    """Why no renderer could render this conversation with this template, or None."""
    for index, message in enumerate(messages):
        if message["role"] != "assistant" or message.get("train") is False:
            continue
        prepared = canonical(messages)
        context, said = prepared[:index], prepared[index]
        if not context:
            return "nothing before the first message"
        prompts, why = expected_prompts(family, context, tools)
        if not prompts:
            return why
        reasoning = said.get("reasoning_content", "").strip()
        if reasoning and not family.takes_reasoning:
            return "thinking is switched off" if family.thinks else "no place for reasoning"
        if reasoning and all(family.state(family.tail_of(p, context)) == "closed" for p in prompts):
            return "thinking is switched off"
        texts = list(seen_renderings(family, prepared, index, tools))
        content = plain_text(said).strip()
        parts = (
            [after_context(t, context) for t in texts] if content not in "".join(map(plain_text, context)) else texts
        )
        if content and not any(content in t for t in parts):
            return "leaves out the content beside calls" if said.get("tool_calls") else "leaves out the content"
        for of in said.get("tool_calls", []):
            function = of["function"]
            said_texts = [text for m in prepared for text in (plain_text(m), m.get("reasoning_content", ""))]
            others = [_masked(after_context(t, context), *said_texts) for t in texts]
            if not any(missing_call(t, function["name"], function["arguments"]) is None for t in others):
                return "leaves out calls"
        both = reasoning and content and said.get("tool_calls")
        if both and any(reasoning in t for t in texts) and not any(reasoning in t and content in t for t in texts):
            return "leaves out the content beside calls and reasoning"
    return None

"""A chat template, and what rendering a few probes shows of it: once, not for every conversation.

A template is a program that nobody has to have written for training. How it wants its input, what it writes before an answer
and after it, and how a model that follows it thinks, is found out here by letting it render short conversations of marked
texts, and never by its name.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import jinja2.meta
from transformers.utils.chat_template_utils import _compile_jinja_template

from ..messages import REASONING_FIELDS, ConversationError, reasoning_of, text_of

# Control tokens as templates write them. Texts are never compared in the middle of one.
_TAG = re.compile(r"<[^<>\s]{1,40}>|\[/?[A-Z_]{2,30}\]|◁[^▷\s]{1,30}▷")
# A tag that begins a thought, at the end of a prompt. What ends it is known only where it is written <x> or [X].
_OPENING = re.compile(
    r"[<\[◁](?!/)[^<>\[\]\s]*(?:think|thought|reason)[^<>\[\]\s]*[>\]▷](?P<space>\s*)$", re.IGNORECASE
)
_PLAIN = re.compile(r"(?P<begin>[<\[])(?P<name>[\w:]+)[>\]]")
_EMPTY_THOUGHT = re.compile(r"(?P<open>\s*[<\[](?P<name>[\w:]+)[>\]]\s*)(?P<close>[<\[]/(?P=name)[>\]])")
_SWITCHES = ("enable_thinking", "thinking")  # of templates, as booleans

# Marks are put behind the first visible character of a text, where no template strips them.
REASONING_MARK, CONTENT_MARK, CALL_MARK = "@@flexmask-r@@", "@@flexmask-c@@", "@@flexmask-f@@"
_USER, _NEXT, _ANSWER, _THOUGHT = "Qflexmask1", "Nflexmask2", "Aflexmask3", "Tflexmask4"
_NAME, _KEY, _VALUE = "flexmask_f", "flexmask_k", "flexmask_v"
_TOOL = {
    "type": "function",
    "function": {
        "name": _NAME,
        "description": "A probe.",
        "parameters": {"type": "object", "properties": {_KEY: {"type": "string", "description": "Any."}}},
    },
}


@dataclass(frozen=True)
class Lead:
    """What a model writes between its prompt and the first visible piece of its message (its content, or the name in its
    first call): `before`, the reasoning, `after`.

    Attributes:
        prompt_end: how the prompt has to end, from the last message on.
        thinks: whether there is a thought, be it an empty one.
    """

    before: str
    after: str
    prompt_end: str
    thinks: bool


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


class Mismatch(ConversationError):
    """A template renders an answer in a way that does not continue its own prompt."""


class Template:
    """A tokenizer's chat template with the arguments that it is called with.

    Args:
        tokenizer: a Hugging Face tokenizer.
        source: the template; None for the tokenizer's own.
        reasoning_format: how the model writes reasoning, if the user has said it.
        arguments: for the template.
    """

    def __init__(self, tokenizer, source: str | None, reasoning_format: str | None, arguments: Mapping):
        self.tokenizer, self._given, self.arguments = tokenizer, source, dict(arguments)
        self._format = reasoning_format
        self._leads: dict[Kind, Lead | ConversationError] = {}

    # What it is called with, and what it reads.

    @functools.cached_property
    def source(self) -> str:
        """The text of the template (of several by name, the one that is taken without tools)."""
        return self.tokenizer.get_chat_template(self._given)

    @functools.cached_property
    def variables(self) -> frozenset[str]:
        """What it reads from outside: `messages`, `tools`, switches, …"""
        return frozenset(jinja2.meta.find_undeclared_variables(self._syntax))

    @functools.cached_property
    def words(self) -> frozenset[str]:
        """Every name and text in it: a key of a message that is not among them is not read."""
        nodes = self._syntax.find_all(
            (jinja2.nodes.Getattr, jinja2.nodes.Name, jinja2.nodes.Const, jinja2.nodes.Keyword)
        )
        names = ("attr", "name", "value", "key")
        return frozenset(str(getattr(node, name)) for node in nodes for name in names if hasattr(node, name))

    @functools.cached_property
    def _syntax(self):
        return _compile_jinja_template(self.source).environment.parse(self.source)

    def with_arguments(self, **arguments) -> Template:
        """The same template with further arguments; what it learns is kept."""
        return template_of(self.tokenizer, self._given, self._format, self.arguments | arguments)

    @functools.cached_property
    def switch(self) -> str | None:
        """The argument that, set to False, makes the prompt ask for an answer without a thought."""
        conversation = [{"role": "user", "content": _USER}]
        now = self._probed(conversation, generate=True)
        for name in _SWITCHES:
            if name in self.variables and now is not None:
                off = Template(self.tokenizer, self._given, self._format, self.arguments | {name: False})
                if self.arguments.get(name) is not False and off._probed(conversation, generate=True) not in (
                    None,
                    now,
                ):
                    return name
        return None

    def thinking_arguments(self) -> str:
        """The arguments that have to do with thinking, for errors."""
        found = sorted(name for name in self.variables if re.search("think|reason", name))
        return ", ".join(f"{name}=…" for name in found) or "enable_thinking=…"

    def tool_arguments(self) -> str:
        """The arguments other than `tools` that have to do with tools, for errors."""
        return ", ".join(f"{name}=…" for name in sorted(self.variables) if "tool" in name and name != "tools")

    # Rendering.

    def render(self, conversations: Sequence[Sequence[Mapping]], tools=None, *, generate: bool = False) -> list[str]:
        """Render conversations of messages in the form that the template takes (`as_taken`).

        Args:
            generate: with the generation prompt.

        Raises:
            Exception: whatever the template raises.
        """
        return self.tokenizer.apply_chat_template(
            list(conversations),
            tools=tools,
            chat_template=self._given,
            tokenize=False,
            add_generation_prompt=generate,
            **self.arguments,
        )

    def _probed(self, messages: Sequence[Mapping], tools=None, *, generate: bool = False) -> str | None:
        """A probe of messages in our form; None if the template raises."""
        return self._probed_as_it_is([self.as_taken(message) for message in messages], tools, generate)

    def _probed_as_it_is(self, messages: Sequence[Mapping], tools=None, generate: bool = False) -> str | None:
        try:
            return self.render([messages], tools, generate=generate)[0]
        except Exception:  # a template may raise anything
            return None

    def as_taken(self, message: Mapping) -> Mapping:
        """A message that was read in the form that the template takes: its role, its content, the arguments of its calls."""
        changed = {}
        if message["role"] == "developer" and not self._has_developer:
            changed["role"] = "system"
        if isinstance(message["content"], str) == self._wants_parts:
            text = text_of(message)
            changed["content"] = [{"type": "text", "text": text}] if self._wants_parts else text
        if self._wants_text_as_arguments and message.get("tool_calls"):
            changed["tool_calls"] = [_with_text_as_arguments(call) for call in message["tool_calls"]]
        return {**message, **changed} if changed else message

    @functools.cached_property
    def _wants_parts(self) -> bool:
        """Whether it takes content only as a list of parts. One that takes texts gets texts."""
        texts = [{"role": "user", "content": _USER}, {"role": "assistant", "content": _ANSWER}]
        parts = [m | {"content": [{"type": "text", "text": m["content"]}]} for m in texts]
        as_text, as_parts = (self._probed_as_it_is(form) or "" for form in (texts, parts))
        return not _holds(as_text, _USER, _ANSWER) and _holds(as_parts, _USER, _ANSWER) and "'text'" not in as_parts

    @functools.cached_property
    def _wants_text_as_arguments(self) -> bool:
        """Whether it takes the arguments of calls only as JSON text."""
        call = {"type": "function", "id": "abcdefghi", "function": {"name": _NAME, "arguments": {_KEY: _VALUE}}}
        results = []
        for form in (call, _with_text_as_arguments(call)):
            content = [{"type": "text", "text": ""}] if self._wants_parts else ""
            user = [{"type": "text", "text": _USER}] if self._wants_parts else _USER
            probe = [{"role": "user", "content": user}, {"role": "assistant", "content": content, "tool_calls": [form]}]
            text = self._probed_as_it_is(probe, [_TOOL]) or self._probed_as_it_is(probe) or ""
            body = text[text.rfind(_USER) :]
            # Python's notation, or JSON text as a JSON string, is not what a model writes.
            results.append(_VALUE in body and f"'{_KEY}'" not in body and f'\\"{_KEY}' not in body)
        as_object, as_text = results
        return as_text and not as_object

    @functools.cached_property
    def _has_developer(self) -> bool:
        """Whether it renders messages of the role developer. Where it does not, they are rendered as system messages."""
        text = _USER if not self._wants_parts else [{"type": "text", "text": _USER}]
        question = _NEXT if not self._wants_parts else [{"type": "text", "text": _NEXT}]
        probe = [{"role": "developer", "content": text}, {"role": "user", "content": question}]
        return _holds(self._probed_as_it_is(probe, generate=True) or "", _USER, _NEXT)

    # What it writes before a message.

    def lead(self, kind: Kind) -> Lead:
        """How a message of this kind is led in.

        Raises:
            ConversationError: the template does not show it.
        """
        if kind not in self._leads:
            try:
                self._leads[kind] = self._find_lead(kind)
            except ConversationError as error:
                self._leads[kind] = error
        found = self._leads[kind]
        if isinstance(found, ConversationError):
            raise found
        return found

    def _find_lead(self, kind: Kind) -> Lead:
        prompt, answered, message = self._probe_ends(kind)
        lead = self.shown_lead(prompt, answered, message)
        if lead is not None:
            return Lead(*lead, prompt, self.thinks("".join(lead)))
        begin = self.opened(prompt)
        same = len(prompt) - len(begin) if begin else len(common_start(prompt, answered))
        stub = answered[same : max(visible_at(answered), 0)] if answered.startswith(prompt[:same]) else ""
        shown = _after_reasoning(answered, message)
        if shown is not None and not begin:
            raise self.mismatch(prompt, answered)
        if self._format and (kind.reasoning or begin):
            before, after = self._format.split("{reasoning}")
            before = "" if prompt.endswith(before) else before
            return Lead(before if kind.reasoning else "", after, prompt, True)
        if begin:
            return Lead("", self._end_of_thought(kind, begin, stub) if shown is None else shown, prompt, True)
        rest = prompt[same:]
        if rest.strip() and kind.reasoning:
            raise self.mismatch(prompt, answered)
        if rest.strip() and not self._is_closed(rest, stub):
            # History writes the message in another way (DeepSeek-V3 runs the calls of a loop together). A model begins its
            # turn as it does after a user.
            return Lead(self._stub_after_user(kind, prompt, answered), "", prompt, False)
        if not kind.reasoning:
            if self.thinks(rest):  # the prompt has ended the thought already
                stub = stub[max((stub.index(end) + len(end) for end in self._ends if end in stub), default=0) :]
            return Lead(stub, "", prompt, self.thinks(stub))
        empty = _EMPTY_THOUGHT.search(stub)
        if empty:
            return Lead(stub[: empty.end("open")], stub[empty.start("close") :], prompt, True)
        thought = self._thought_before_calls(kind, prompt)
        if thought:
            return Lead(thought[0], thought[1] + stub, prompt, True)
        switched_on = self._shown_with_other_arguments(kind)
        raise ConversationError(
            f"the chat template drops its reasoning, which it renders with {switched_on}: pass that"
            if switched_on
            else "the chat template drops its reasoning, and how the model writes reasoning could not be detected; pass "
            "reasoning_format=…, for example '<think>\\n{reasoning}\\n</think>\\n\\n', or a chat_template=… that renders "
            "the reasoning of the last message"
        )

    def _probe_ends(self, kind: Kind) -> tuple[str, str, dict]:
        """What follows the last text of the context in the prompt and in the answer of a probe; and its message."""
        context, message = _probe(kind)
        last = text_of(context[-1])
        for tools in (self._probe_tools(kind), [_TOOL]):  # some templates cannot do without tools
            prompt = self._probed(context, tools, generate=True)
            answered = self._probed([*context, marked(message)], tools)
            if prompt and answered:
                break
        if not (prompt and answered and last in prompt and last in answered):
            raise ConversationError("the chat template cannot render a short conversation of this kind")
        prompt, answered = (text[text.rfind(last) + len(last) :] for text in (prompt, answered))
        if kind.follows == "assistant" and not prompt.strip():
            raise ConversationError(
                "the chat template writes no generation prompt after a message of the assistant; join the two messages, or "
                'mark this one "train": false'
            )
        return prompt, answered, message

    def _stub_after_user(self, kind: Kind, prompt: str, answered: str) -> str:
        """What stands before the first visible piece of a message that follows a user, without what the prompt begins."""
        if kind.follows != "user":
            with contextlib.suppress(ConversationError):
                header, whole, _ = self._probe_ends(replace(kind, follows="user"))
                header = header.removesuffix(self.opened(header))
                if whole.startswith(header) and visible_at(whole) >= len(header):
                    return whole[len(header) : visible_at(whole)]
        raise self.mismatch(prompt, answered)

    def _thought_before_calls(self, kind: Kind, prompt: str) -> tuple[str, str] | None:
        """Before and after a thought, from messages with calls, where only those show it (Gemma 4, Command R7B)."""
        if kind.calls:
            return None
        with contextlib.suppress(ConversationError):
            thinking, plain = (self.lead(Kind(kind.follows, reasoning, False, True)) for reasoning in (True, False))
            if thinking.prompt_end != prompt:
                return None
            if not plain.thinks and thinking.after.endswith(plain.before):
                return thinking.before, thinking.after.removesuffix(plain.before)
            end = next((end for end in self._ends if end in thinking.after), None)
            if plain.thinks and end:  # an empty thought stands before calls without reasoning
                return thinking.before, "".join(thinking.after.partition(end)[:2])
        return None

    @functools.cached_property
    def splits_calls_from_content(self) -> bool:
        """Whether a message with content and calls is written otherwise once their answers follow."""
        context, message = _probe(Kind("user", False, True, True))
        answered = self._probed([*context, message], [_TOOL])
        result = {"role": "tool", "content": _NEXT, "name": _NAME, "tool_call_id": _call()["id"]}
        continued = self._probed([*context, message, result], [_TOOL])
        if not answered or not continued:
            return False
        places = sorted((answered.rfind(piece), len(piece)) for piece in (_ANSWER, _VALUE))
        between = answered[places[0][0] : places[1][0] + places[1][1]]
        return places[0][0] >= 0 and between not in continued

    def shown_lead(self, prompt: str, answered: str, message: Mapping) -> tuple[str, str] | None:
        """Before and after the reasoning of a marked message, where the template itself continues the prompt with it."""
        at = visible_at(answered)
        if not answered.startswith(prompt) or at < len(prompt):
            return None
        lead, after = answered[len(prompt) : at], _after_reasoning(answered, message)
        if (after is not None) != bool(reasoning_of(message).strip()):
            return None
        if self.opened(prompt) and not self.thinks(lead if after is None else after):
            return None  # an answer inside an open block
        return (lead, "") if after is None else (lead[: lead.index(REASONING_MARK) - 1], after)

    def thinks(self, lead: str) -> bool:
        """Whether the end of a thought is in it."""
        return any(end in lead for end in self._ends)

    def opened(self, prompt: str) -> str:
        """The text at the end of a prompt that begins a thought, "" if none does."""
        if self._format:
            begin = self._format.partition("{reasoning}")[0]
            if begin.strip() and prompt.endswith(begin):
                return begin
        short = prompt.rstrip()
        for begin, _ in self._thoughts:
            if short.endswith(begin):
                return prompt[len(short) - len(begin) :]
        found = _OPENING.search(prompt)
        return found[0] if found and "end" not in found[0].lower() else ""

    @functools.cached_property
    def _thoughts(self) -> list[tuple[str, str]]:
        """Begin and end of a thought, as the template writes them wherever it renders one."""
        found = []
        for kind in (Kind("user", True, True, False), Kind("user", True, False, True)):
            for shown, after in self._renderings_with_reasoning(kind):
                head = shown[: shown.index(REASONING_MARK) - 1][-60:]
                begins, end = [head[tag.start() :].strip() for tag in _TAG.finditer(head)], _TAG.search(after)
                named = [begin for begin in begins if re.search("think|thought|reason", begin, re.IGNORECASE)]
                begin = (named or begins or [""])[-1]
                if end and begin and (begin, end[0]) not in found:
                    found.append((begin, end[0]))
        return found

    @functools.cached_property
    def _ends(self) -> list[str]:
        return [*dict.fromkeys([*(end for _, end in self._thoughts), "</think>", "[/THINK]"])]

    def _renderings_with_reasoning(self, kind: Kind) -> list[tuple[str, str]]:
        """A message of this kind with all ways of switching thinking on, where its reasoning is shown; and what follows it."""
        context, message = _probe(kind)
        rendered = []
        for arguments in ({}, *({name: True} for name in _SWITCHES if name in self.variables)):
            template = Template(self.tokenizer, self._given, None, self.arguments | arguments)
            text = template._probed([*context, marked(message)], self._probe_tools(kind))
            after = _after_reasoning(text, message) if text else None
            if after is not None:
                rendered.append((text, after))
        return rendered

    def _end_of_thought(self, kind: Kind, begin: str, stub: str) -> str:
        """What a model writes between a thought that its prompt began and the visible piece.

        As the template shows it: for a message of this kind without reasoning, or in history; with reasoning; else as the
        begin has it, since models leave as much space around their thoughts.
        """
        at = min((stub.index(end) for end in self._ends if end in stub), default=None)
        if at is not None:
            return stub[at:] if not stub[:at].strip() or stub[:at].strip() == begin.strip() else stub
        same = Kind(kind.follows, True, kind.content, kind.calls)
        for _, after in self._renderings_with_reasoning(same):
            return after
        plain = _PLAIN.fullmatch(begin.strip())
        if not plain:
            raise ConversationError(
                f"the prompt begins a thought with {begin!r}, and the chat template does not show how it ends; pass "
                "reasoning_format=…, for example '<think>\\n{reasoning}\\n</think>\\n\\n'"
            )
        space = begin[len(begin.rstrip()) :]
        end = begin.strip().replace(plain["begin"], plain["begin"] + "/", 1)
        return f"{space}{end}{space * 2}{stub.removeprefix(begin)}"

    def _is_closed(self, rest: str, stub: str) -> bool:
        """Whether what only the prompt has leaves no thought open: an empty block, and nothing that the answer has too."""
        if self.thinks(rest):
            return True
        tags = _TAG.findall(rest)
        return len(tags) > 1 and not set(tags) & set(_TAG.findall(stub))

    def _shown_with_other_arguments(self, kind: Kind) -> str:
        context, message = _probe(kind)
        for name in _SWITCHES:
            if name in self.variables:
                text = self.with_arguments(**{name: True})._probed([*context, marked(message)])
                if text and REASONING_MARK in text:
                    return f"{name}=True"
        return ""

    def mismatch(self, prompt: str, answered: str) -> Mismatch:
        """The error for a prompt and an answer that do not agree."""
        answered = unmarked(answered)
        same = len(common_start(prompt, answered))
        return Mismatch(
            "the chat template renders it in a way that does not continue its own prompt: the prompt goes on "
            f"{prompt[same:][:80]!r} where the answer has {answered[same:][:80]!r}; pass template arguments "
            f"({self.thinking_arguments()}) or a chat_template=… with which both agree"
        )

    def _probe_tools(self, kind: Kind) -> list | None:
        return [_TOOL] if kind.calls or kind.follows == "tool" else None

    # What it writes after a message.

    def finished(self, text: str, calls: bool, end_of_turn: str | None) -> str | None:
        """A completion that ends with the token that ends the turn, and with nothing after it. None: it is not known."""
        text = text.rstrip().removesuffix(self._trailer) if self._trailer else text
        short = text.rstrip()
        if short.endswith(self.closing_tokens):
            return short
        token = end_of_turn or self._end_tokens[calls] or self.tokenizer.eos_token
        return text + token if token else None

    @functools.cached_property
    def closing_tokens(self) -> tuple[str, ...]:
        """Control tokens that can end a turn: not those that only close an element (</tool_call>)."""
        added = [token.content for token in self.tokenizer.added_tokens_decoder.values() if token.special]
        tokens = dict.fromkeys([*added, *self.tokenizer.all_special_tokens])
        return tuple(token for token in tokens if not token.startswith("</") or token == self.tokenizer.eos_token)

    @functools.cached_property
    def _after(self) -> tuple[str, str, str, str] | None:
        """What follows the last text: in a closed question, a prompt, an answer, and an answer before the next question."""
        question, answer = {"role": "user", "content": _USER}, {"role": "assistant", "content": _ANSWER}
        following = {"role": "user", "content": _NEXT}
        closed = self._probed([question])
        prompt = self._probed([question], generate=True)
        answered = self._probed([question, answer])
        continued = self._probed([question, answer, following])
        if None in (closed, prompt, answered, continued):
            return None
        continued = continued[: continued.rfind(_NEXT)]
        texts = ((closed, _USER), (prompt, _USER), (answered, _ANSWER), (continued, _ANSWER))
        return tuple(text[text.rfind(last) + len(last) :] for text, last in texts)

    @functools.cached_property
    def _trailer(self) -> str:
        """What the template writes after the end of an answer, and no model does: a second token that ends the text, a
        generation prompt that nobody asked for. An answer ends as a question does, or with the tokenizer's eos token,
        whichever comes first."""
        if self._after is None:
            return ""
        closed, prompt, answered, _ = self._after
        # Some templates write the generation prompt always: then only the first token is known to end the question.
        of_question = self._first_token(closed) if closed == prompt else common_start(closed, prompt).strip()
        ends = [end for end in (of_question, self.tokenizer.eos_token) if end and self._first_token(end)]
        stops = [answered.index(end) + len(end) for end in ends if end in answered]
        return answered[min(stops) :].rstrip() if stops else ""

    @functools.cached_property
    def _end_tokens(self) -> tuple[str | None, str | None]:
        """The control token that follows a message in history, where the template ends the message with none: without
        calls, with calls. The model ends its turn with that one."""
        plain = None
        if self._after is not None:
            plain = self._first_token(self._after[3])
        calls = None
        context, message = _probe(Kind("user", False, False, True))
        answered = self._probed([*context, message], [_TOOL])
        result = {"role": "tool", "content": _NEXT, "name": _NAME, "tool_call_id": _call()["id"]}
        continued = self._probed([*context, message, result], [_TOOL])
        if (
            answered is not None
            and continued is not None
            and continued.startswith(answered.removesuffix(self._trailer))
        ):
            rest = continued[len(answered.removesuffix(self._trailer)) :]
            calls = self._first_token(rest.partition(_NEXT)[0])
        return plain, calls

    def _first_token(self, text: str) -> str | None:
        return min((token for token in self.closing_tokens if token in text), key=text.index, default=None)


_kept: dict[tuple, Template] = {}


def template_of(tokenizer, source: str | None, reasoning_format: str | None, arguments: Mapping) -> Template:
    """The Template of these, the same object for the same ones, so that nothing is learned twice."""
    text = source or tokenizer.chat_template
    key = (
        id(tokenizer),
        len(tokenizer),
        repr(text),
        reasoning_format,
        json.dumps(arguments, sort_keys=True, default=repr),
    )
    found = _kept.get(key)
    if found is None or found.tokenizer is not tokenizer:
        if len(_kept) > 64:
            _kept.clear()
        found = _kept[key] = Template(tokenizer, source, reasoning_format, arguments)
    return found


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


def _after_reasoning(answered: str, message: Mapping) -> str | None:
    """What stands between the reasoning of a marked message and its first visible piece; None where it is not rendered."""
    at, visible = answered.find(REASONING_MARK), visible_at(answered)
    if not 0 <= at < visible:
        return None
    return answered[at + len(REASONING_MARK) : visible].removeprefix(reasoning_of(message).strip()[1:])


def common_start(a: str, b: str) -> str:
    """The common beginning of two texts, not ending inside a control token of either."""
    same = len(os.path.commonprefix([a, b]))
    for text in (a, b):
        for found in _TAG.finditer(text, max(0, same - 60), same + 60):
            if found.start() < same < found.end():
                same = found.start()
    return a[:same]


def _probe(kind: Kind) -> tuple[list[dict], dict]:
    """A short conversation and a message of this kind. The probe's call has no reasoning before it that a template drops."""
    user = {"role": "user", "content": _USER}
    context = {
        "user": [user],
        "assistant": [user, {"role": "assistant", "content": _NEXT}],
        "tool": [
            user,
            {"role": "assistant", "content": "", "tool_calls": [_call()]},
            {"role": "tool", "content": _NEXT, "name": _NAME, "tool_call_id": _call()["id"]},
        ],
    }[kind.follows]
    message = {"role": "assistant", "content": _ANSWER if kind.content else ""}
    if kind.reasoning:
        message |= dict.fromkeys(REASONING_FIELDS, _THOUGHT)
    if kind.calls:
        message["tool_calls"] = [_call()]
    return context, message


def _call() -> dict:
    # Mistral's templates want ids of nine letters and digits.
    return {"type": "function", "id": "flexmask1", "function": {"name": _NAME, "arguments": {_KEY: _VALUE}}}


def _with_text_as_arguments(call: Mapping) -> dict:
    arguments = json.dumps(call["function"]["arguments"], ensure_ascii=False)
    return {**call, "function": {**call["function"], "arguments": arguments}}


def _holds(text: str, *pieces: str) -> bool:
    return all(piece in text for piece in pieces)

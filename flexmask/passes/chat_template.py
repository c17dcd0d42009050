"""A chat template: what it is called with, how it takes its input, what it reads. Found out by rendering, never by its name."""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Mapping, Sequence

import jinja2.meta
from transformers.utils.chat_template_utils import _compile_jinja_template

from ..messages import REASONING_FIELDS, text_of
from .probes import ANSWER, KEY, NAME, NEXT, TOOL, USER, VALUE

SWITCHES = ("enable_thinking", "thinking")  # of templates, as booleans
_LOCAL = REASONING_FIELDS[0]  # what templates call a variable of their own, which looks as if it came from outside


class ChatTemplate:
    """A tokenizer's chat template with the arguments that it is called with: how it takes its input, and what it renders.

    Args:
        tokenizer: a Hugging Face tokenizer.
        source: the template; None for the tokenizer's own.
        arguments: for the template.
        with_tools: whether conversations have tools; a tokenizer can have another template for those.
    """

    def __init__(self, tokenizer, source: str | None, arguments: Mapping, with_tools: bool):
        self.tokenizer, self._given, self.arguments = tokenizer, source, dict(arguments)
        self._with_tools = with_tools

    # What it is called with, and what it reads.

    @functools.cached_property
    def source(self) -> str:
        """The text of the template."""
        return self.tokenizer.get_chat_template(self._given, tools=[TOOL] if self._with_tools else None)

    @functools.cached_property
    def deciding(self) -> dict:
        """Those arguments that decide how a model thinks. Conversations that differ in others only share what is learned."""
        return {name: value for name, value in self.arguments.items() if is_deciding(name)}

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

    @functools.cached_property
    def switch(self) -> str | None:
        """The argument that, set to False, makes the prompt ask for an answer without a thought."""
        conversation = [{"role": "user", "content": USER}]
        now = self._probed(conversation, generate=True)
        for name in SWITCHES:
            if name in self.variables and now is not None:
                off = ChatTemplate(self.tokenizer, self._given, self.arguments | {name: False}, self._with_tools)
                if self.arguments.get(name) is not False and off._probed(conversation, generate=True) not in (
                    None,
                    now,
                ):
                    return name
        return None

    def thinking_arguments(self) -> str:
        """The arguments that have to do with thinking, for errors."""
        return ", ".join(f"{name}=…" for name in sorted(self.variables) if is_deciding(name) and name != _LOCAL)

    def tool_arguments(self) -> str:
        """The arguments other than `tools` that have to do with tools, for errors."""
        return ", ".join(f"{name}=…" for name in sorted(self.variables) if "tool" in name and name != "tools")

    # Rendering.

    def render(
        self, conversations: Sequence[Sequence[Mapping]], tools=None, *, generate: bool = False, arguments=None
    ) -> list[str]:
        """Render conversations of messages in the form that the template takes (`as_taken`).

        Args:
            generate: with the generation prompt.
            arguments: in place of the template's own.

        Raises:
            Exception: whatever the template raises.
        """
        return self.tokenizer.apply_chat_template(
            list(conversations),
            tools=tools,
            chat_template=self._given,
            tokenize=False,
            add_generation_prompt=generate,
            **(self.arguments if arguments is None else arguments),
        )

    def _probed(
        self, messages: Sequence[Mapping], tools=None, *, generate: bool = False, with_tools: bool | None = None
    ) -> str | None:
        """A probe of messages in our form, with tools as conversations have them; None if the template raises."""
        if tools is None and (self._with_tools if with_tools is None else with_tools):
            tools = [TOOL]
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
        texts = [{"role": "user", "content": USER}, {"role": "assistant", "content": ANSWER}]
        parts = [m | {"content": [{"type": "text", "text": m["content"]}]} for m in texts]
        as_text, as_parts = (self._probed_as_it_is(form) or "" for form in (texts, parts))
        return not _holds(as_text, USER, ANSWER) and _holds(as_parts, USER, ANSWER) and "'text'" not in as_parts

    @functools.cached_property
    def _wants_text_as_arguments(self) -> bool:
        """Whether it takes the arguments of calls only as JSON text."""
        call = {"type": "function", "id": "abcdefghi", "function": {"name": NAME, "arguments": {KEY: VALUE}}}
        results = []
        for form in (call, _with_text_as_arguments(call)):
            content = [{"type": "text", "text": ""}] if self._wants_parts else ""
            user = [{"type": "text", "text": USER}] if self._wants_parts else USER
            probe = [{"role": "user", "content": user}, {"role": "assistant", "content": content, "tool_calls": [form]}]
            text = self._probed_as_it_is(probe, [TOOL]) or self._probed_as_it_is(probe) or ""
            body = text[text.rfind(USER) :]
            # Python's notation, or JSON text as a JSON string, is not what a model writes.
            results.append(VALUE in body and f"'{KEY}'" not in body and f'\\"{KEY}' not in body)
        as_object, as_text = results
        return as_text and not as_object

    @functools.cached_property
    def _has_developer(self) -> bool:
        """Whether it renders messages of the role developer. Where it does not, they are rendered as system messages."""
        text = USER if not self._wants_parts else [{"type": "text", "text": USER}]
        question = NEXT if not self._wants_parts else [{"type": "text", "text": NEXT}]
        probe = [{"role": "developer", "content": text}, {"role": "user", "content": question}]
        return _holds(self._probed_as_it_is(probe, generate=True) or "", USER, NEXT)


def is_deciding(argument: str) -> bool:
    """Whether an argument of a template has to do with thinking, by its name."""
    return bool(re.search("think|reason", argument))


def _with_text_as_arguments(call: Mapping) -> dict:
    arguments = json.dumps(call["function"]["arguments"], ensure_ascii=False)
    return {**call, "function": {**call["function"], "arguments": arguments}}


def _holds(text: str, *pieces: str) -> bool:
    return all(piece in text for piece in pieces)

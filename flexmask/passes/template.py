"""What a chat template writes around an answer, and how a model that follows it thinks: found out once, not for every
conversation, by letting the template render probes.

A template is a program that nobody has to have written for training. Most show what a model should generate: the answer as the
template renders it, minus the prompt. The others are understood from what they show elsewhere.
"""

from __future__ import annotations

import contextlib
import functools
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace

from ..messages import ConversationError, reasoning_of, text_of
from .chat_template import SWITCHES, ChatTemplate, is_deciding
from .probes import (
    ANSWER,
    KEY,
    NAME,
    NEXT,
    REASONING_MARK,
    TAG,
    TOOL,
    USER,
    VALUE,
    Kind,
    after_last,
    after_reasoning,
    call,
    common_start,
    marked,
    probe,
    tool_result,
    unmarked,
    visible_at,
)

# A tag that begins a thought, at the end of a prompt. What ends it is known only where it is written <x> or [X].
_OPENING = re.compile(r"[<\[◁](?!/)[^<>\[\]\s]*(?:think|thought|reason)[^<>\[\]\s]*[>\]▷]\s*$", re.IGNORECASE)
_PLAIN = re.compile(r"(?P<begin>[<\[])[\w:]+[>\]]")
_END = re.compile(rf"(?P<tag>{TAG.pattern})(?:(?P<name>\w+)(?:{TAG.pattern}))?")
_EMPTY_THOUGHT = re.compile(r"(?P<open>\s*[<\[](?P<name>[\w:]+)[>\]]\s*)(?P<close>[<\[]/(?P=name)[>\]])")


@dataclass(frozen=True)
class Lead:
    """What a model writes between its prompt and the first visible piece of its message (its content, or the name in its
    first call): the thought, which is `before`, the reasoning, `after`; then `opening` (of a call, say).

    Attributes:
        prompt_end: how the prompt has to end, from the last message on.
    """

    before: str
    after: str
    opening: str
    prompt_end: str

    def thought(self, reasoning: str) -> str:
        """The whole of it but the opening."""
        return self.before + reasoning + self.after


class Mismatch(ConversationError):
    """A template renders an answer in a way that does not continue its own prompt."""


class Template(ChatTemplate):
    """A chat template with what it writes before and after an answer.

    Args:
        reasoning_format: how the model writes reasoning, if the user has said it.
        others: of ChatTemplate.
    """

    def __init__(
        self, tokenizer, source: str | None, reasoning_format: str | None, arguments: Mapping, with_tools: bool
    ):
        super().__init__(tokenizer, source, arguments, with_tools)
        self._format = reasoning_format
        # Or why there is none; not the error itself, which would keep the messages of every frame that it passed.
        self._leads: dict[Kind, Lead | tuple[type[ConversationError], str]] = {}

    def with_arguments(self, **arguments) -> Template:
        """The same template with further arguments; what it learns is kept."""
        return template_of(self.tokenizer, self._given, self._format, self.arguments | arguments, self._with_tools)

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
                self._leads[kind] = type(error), str(error)
        found = self._leads[kind]
        if isinstance(found, Lead):
            return found
        error, text = found
        raise error(text)

    def opens(self, opening: str, written: str, prompt: str, called: bool) -> bool:
        """Whether what is written before a piece ends with its opening, and before that as the prompt does, or as one after a
        user, but for a thought and for space. Tags at the beginning of the opening of a call may be missing where there was
        one before (`called`): DeepSeek-V3 opens the list of calls once in a conversation, and leaves that out from then on.
        Anything else that differs may be what only this conversation has (Cohere2MoE numbers its calls)."""
        while not written.endswith(opening):
            tag = TAG.match(opening.lstrip())
            if not (tag and called):
                return False
            opening = opening.lstrip()[tag.end() :].lstrip()
        rest = written.removesuffix(opening)
        _, beyond = self.split_thought(rest[len(common_start(prompt, rest)) :])
        ends = (prompt.removesuffix(self.opened(prompt)), self._asked_after_user or "")
        return any("".join(end.split()).endswith("".join(beyond.split())) for end in ends)

    def _find_lead(self, kind: Kind) -> Lead:
        prompt, answered, message = self._probe_ends(kind)
        found = self._shown(prompt, answered, message) or self._composed(kind, prompt, answered, message)
        if any(
            piece in found.thought("") + found.opening for piece in (USER, NEXT, ANSWER, NAME, KEY, VALUE, call()["id"])
        ):
            raise ConversationError("the chat template writes more of a call before its name, which is not supported")
        return found

    def _shown(self, prompt: str, answered: str, message: Mapping) -> Lead | None:
        """As the template itself continues the prompt."""
        shown = self.shown_lead(prompt, answered, message)
        if shown is None:
            return None
        if not reasoning_of(message):
            empty, opening = self.split_thought(shown[0])
            return Lead(empty, "", opening, prompt)
        return Lead(shown[0], *self.split_thought(shown[1]), prompt)

    def _composed(self, kind: Kind, prompt: str, answered: str, message: Mapping) -> Lead:
        """The thought and the opening of the visible piece, each from where the template shows it."""
        begin, written = self.opened(prompt), after_reasoning(answered, message)
        if begin and written is not None:
            return Lead("", *self.split_thought(written), prompt)
        header = prompt.removesuffix(begin)
        same = len(header) if begin and kind.follows == "user" else len(common_start(header, answered))
        rest = header[same:]
        stub = answered[same : max(visible_at(answered), 0)] if answered.startswith(header[:same]) else ""
        closed = not begin and self._is_closed(rest, stub)
        if written is not None or (kind.reasoning and closed):
            raise self.mismatch(prompt, answered)
        if rest.strip() and not closed:
            # History writes the message in another way (DeepSeek-V3 runs the calls of a loop together). A model begins its
            # turn as it does after a user.
            if kind.reasoning and not begin and self._asked(kind.follows) not in ("", self._asked_after_user):
                raise self.mismatch(prompt, answered)  # a piece of the prompt that may begin a thought
            stub = self._stub_after_user(replace(kind, reasoning=False), prompt, answered)
        empty, opening = self.split_thought(stub.removeprefix(begin))
        if self._format and (kind.reasoning or begin):
            before, after = self._format.split("{reasoning}")
            if not kind.reasoning or prompt.endswith(before):
                before = ""
            elif begin.strip() and before.strip() == begin.strip():  # the prompt has it, but for space
                before = before[len(before.rstrip()) + len(begin) - len(begin.rstrip()) :]
            if opening.strip() and after.rstrip().endswith(opening.strip()):  # the format has it, too
                after = after.rstrip().removesuffix(opening.strip())
            return Lead(before, after, _joined(after, opening), prompt)
        if begin:
            return Lead("", *self._end_of_thought(kind, begin, empty, opening), prompt)
        if not kind.reasoning:
            if self.thinks(rest):  # a thought that the prompt has ended is not ended again
                opening = empty[len(empty.rstrip()) :] + opening
                empty = ""
            return Lead(empty, "", opening, prompt)
        block = _EMPTY_THOUGHT.search(empty)
        if block:
            return Lead(empty[: block.end("open")], empty[block.start("close") :], opening, prompt)
        thought = self._thought_before_calls(kind, prompt)
        if thought:
            return Lead(thought.before, thought.after, opening, prompt)
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
        context, message = probe(kind)
        last = text_of(context[-1])
        usual = self._with_tools or kind.calls or kind.follows == "tool"
        for with_tools in (usual, not usual):  # some templates cannot do without tools, or with them
            prompt = self._probed(context, generate=True, with_tools=with_tools)
            answered = self._probed([*context, marked(message)], with_tools=with_tools)
            if prompt and answered:
                break
        if not (prompt and answered and last in prompt and last in answered):
            raise ConversationError("the chat template cannot render a short conversation of this kind")
        prompt, answered = after_last(prompt, last), after_last(answered, last)
        if kind.follows == "assistant" and not prompt.strip():
            raise ConversationError(
                "the chat template writes no generation prompt after a message of the assistant; join the two messages, or "
                'mark this one "train": false'
            )
        return prompt, answered, message

    @functools.cached_property
    def _asked_after_user(self) -> str | None:
        return self._asked("user")

    def _asked(self, follows: str) -> str | None:
        """What a generation prompt adds to a context, but for a thought that it begins; None if it does not only add."""
        context, _ = probe(Kind(follows, False, True, False))
        for with_tools in (True, False):
            closed = self._probed(context, with_tools=with_tools)
            prompt = self._probed(context, generate=True, with_tools=with_tools)
            if closed is not None and prompt is not None and prompt.startswith(closed):
                return prompt[len(closed) :].removesuffix(self.opened(prompt))
        return None

    def _stub_after_user(self, kind: Kind, prompt: str, answered: str) -> str:
        """What stands before the first visible piece of a message that follows a user, without what the prompt begins."""
        if kind.follows != "user":
            with contextlib.suppress(ConversationError):
                header, whole, _ = self._probe_ends(replace(kind, follows="user"))
                header = header.removesuffix(self.opened(header))
                if whole.startswith(header) and visible_at(whole) >= len(header):
                    return whole[len(header) : visible_at(whole)]
        raise self.mismatch(prompt, answered)

    def _thought_before_calls(self, kind: Kind, prompt: str) -> Lead | None:
        """The lead of a message with calls, where only those show a thought (Gemma 4, Command R7B)."""
        with contextlib.suppress(ConversationError):
            found = None if kind.calls else self.lead(Kind(kind.follows, True, False, True))
            return found if found and found.prompt_end == prompt else None
        return None

    @functools.cached_property
    def writes_content_beside_calls(self) -> bool:
        """Whether the content of a message with calls is written at all."""
        context, message = probe(Kind("user", False, True, True))
        answered = self._probed([*context, message], [TOOL])
        return answered is None or ANSWER in answered

    @functools.cached_property
    def splits_calls_from_content(self) -> bool:
        """Whether a message with content and calls is written otherwise once their answers follow."""
        context, message = probe(Kind("user", False, True, True))
        answered = self._probed([*context, message], [TOOL])
        continued = self._probed([*context, message, tool_result()], [TOOL])
        if not answered or not continued:
            return False
        places = sorted((answered.rfind(piece), len(piece)) for piece in (ANSWER, VALUE))
        between = answered[places[0][0] : places[1][0] + places[1][1]]
        return places[0][0] >= 0 and between not in continued

    def shown_lead(self, prompt: str, answered: str, message: Mapping) -> tuple[str, str] | None:
        """Before and after the reasoning of a marked message, where the template itself continues the prompt with it."""
        at = visible_at(answered)
        if not answered.startswith(prompt) or at < len(prompt):
            return None
        lead, after = answered[len(prompt) : at], after_reasoning(answered, message)
        if (after is not None) != bool(reasoning_of(message).strip()):
            return None
        if self.opened(prompt) and not self.thinks(lead if after is None else after):
            return None  # an answer inside an open block
        return (lead, "") if after is None else (lead[: lead.index(REASONING_MARK) - 1], after)

    def thinks(self, text: str) -> bool:
        """Whether the end of a thought is in it."""
        return any(end in text for end in self._ends)

    def split_thought(self, text: str) -> tuple[str, str]:
        """A text up to the end of its thought, with the space behind it; and the rest."""
        at = max((text.rindex(end) + len(end) for end in self._ends if end in text), default=0)
        at += len(text[at:]) - len(text[at:].lstrip()) if at else 0
        return text[:at], text[at:]

    def opened(self, prompt: str) -> str:
        """The text at the end of a prompt that begins a thought, "" if none does."""
        if self._format:
            begin = self._format.partition("{reasoning}")[0]
            if begin.strip() and prompt.endswith(begin):
                return begin
        short = prompt.rstrip()
        for begin, _ in self.thoughts:
            if short.endswith(begin):
                return prompt[len(short) - len(begin) :]
        found = _OPENING.search(prompt)
        return found[0] if found and "end" not in found[0].lower() else ""

    @functools.cached_property
    def thoughts(self) -> list[tuple[str, str]]:
        """Begin and end of a thought, as the template writes them wherever it renders one."""
        found, header = [], self._header_of_answers()
        for kind in (Kind("user", True, True, False), Kind("user", True, False, True)):
            for shown, after in self._renderings_with_reasoning(kind):
                head = shown[: shown.index(REASONING_MARK) - 1][-60:]
                begins = [head[tag.start() :].strip() for tag in TAG.finditer(head)]
                named = [begin for begin in begins if re.search("think|thought|reason", begin, re.IGNORECASE)]
                begin, end = (named or begins or [""])[-1], _END.match(after.lstrip())
                if begin and end and (named or not header.endswith(begin)):
                    # Some name what they end (Kimi-K3: <|close|>think<|sep|>).
                    end = end[0] if end["name"] and end["name"] in begin else end["tag"]
                    found += [(begin, end)] if (begin, end) not in found else []
        return found

    def _header_of_answers(self) -> str:
        """A prompt, without space at its end, that an answer without reasoning continues as it is; "" if none does."""
        context, message = probe(Kind("user", False, True, False))
        prompt, answered = self._probed(context, generate=True), self._probed([*context, message])
        return prompt.rstrip() if prompt and answered and answered.startswith(prompt + ANSWER) else ""

    @functools.cached_property
    def _ends(self) -> list[str]:
        return [*dict.fromkeys([*(end for _, end in self.thoughts), "</think>", "[/THINK]"])]

    @functools.cached_property
    def thought_tags(self) -> list[str]:
        """What a text of a message must not hold: what stands around thoughts, and does not end turns."""
        tags = [*(tag for thought in self.thoughts for tag in thought), *TAG.findall(self._format or "")]
        return [tag for tag in dict.fromkeys(tags) if tag not in self.closing_tokens]

    def _renderings_with_reasoning(self, kind: Kind) -> list[tuple[str, str]]:
        """A message of this kind with all ways of switching thinking on, where its reasoning is shown; and what follows it."""
        context, message = probe(kind)
        rendered = []
        for arguments in ({}, *({name: True} for name in SWITCHES if name in self.variables)):
            template = ChatTemplate(self.tokenizer, self._given, self.arguments | arguments, self._with_tools)
            text = template._probed([*context, marked(message)], with_tools=self._with_tools or kind.calls)
            after = after_reasoning(text, message) if text else None
            if after is not None:
                rendered.append((text, after))
        return rendered

    def _end_of_thought(self, kind: Kind, begin: str, empty: str, opening: str) -> tuple[str, str]:
        """What a model writes between a thought that its prompt began and the visible piece: end of the thought, opening.

        As the template shows it: for a message of this kind without reasoning, or in history; with reasoning; else as the
        begin has it, since models leave as much space around their thoughts.
        """
        if empty:
            return empty[min(empty.index(end) for end in self._ends if end in empty) :], opening
        for _, after in self._renderings_with_reasoning(replace(kind, reasoning=True)):
            return (after.removesuffix(opening), opening) if after.endswith(opening) else self.split_thought(after)
        plain = _PLAIN.fullmatch(begin.strip())
        if not plain:
            raise ConversationError(
                f"the prompt begins a thought with {begin!r}, and the chat template does not show how it ends; pass "
                "reasoning_format=…, for example '<think>\\n{reasoning}\\n</think>\\n\\n'"
            )
        space = begin[len(begin.rstrip()) :]
        end = begin.strip().replace(plain["begin"], plain["begin"] + "/", 1)
        return f"{space}{end}{space * 2}", _joined(space, opening)

    def _is_closed(self, rest: str, stub: str) -> bool:
        """Whether what only the prompt has leaves no thought open: an empty block, and nothing that the answer has too."""
        if self.thinks(rest):
            return True
        tags = TAG.findall(rest)
        return len(tags) > 1 and not set(tags) & set(TAG.findall(stub))

    def _shown_with_other_arguments(self, kind: Kind) -> str:
        context, message = probe(kind)
        for name in SWITCHES:
            if name in self.variables:
                text = self.with_arguments(**{name: True})._probed([*context, marked(message)])
                if text and REASONING_MARK in text:
                    return f"{name}=True"
        return ""

    def mismatch(self, prompt: str, answered: str) -> Mismatch:
        """The error for a prompt and an answer that do not agree."""
        answered = unmarked(answered)
        same, arguments = len(common_start(prompt, answered)), self.thinking_arguments()
        rest = prompt[same:]
        may_begin_a_thought = rest.strip() and not (
            self._format or self.opened(prompt) or self.thinks(rest) or any(end in rest for end in self.closing_tokens)
        )
        return Mismatch(
            "the chat template renders it in a way that does not continue its own prompt: the prompt goes on "
            f"{rest[:80]!r} where the answer has {answered[same:][:80]!r}; pass "
            + (f"template arguments ({arguments}) or " if arguments else "")
            + ("reasoning_format=… (if that begins a thought) or " if may_begin_a_thought else "")
            + "a chat_template=… with which both agree"
        )

    @functools.cached_property
    def anchor(self) -> str:
        """Text to put before a completion while it is tokenised, for tokenizers that write a space before the first word.

        SentencePiece tokenizers do (Llama 2, Phi-3); a model that continues a prompt does not.
        """

        def encode(text):
            return self.tokenizer(text, add_special_tokens=False)["input_ids"]

        eos = self.tokenizer.eos_token
        return eos if eos and encode(eos + "a") != encode(eos) + encode("a") else ""

    # What it writes after a message.

    def finished(self, text: str, calls: bool, end_of_turn: str | None, is_ended: bool) -> str | None:
        """A completion that ends with the token that ends the turn, and with nothing after it. None: it is not known.

        Args:
            is_ended: whether the template has written anything behind the message's own text.
        """
        text = text.rstrip().removesuffix(self._trailer) if self._trailer else text
        short = text.rstrip()
        if is_ended and short.endswith(self.closing_tokens):
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
        question, answer = {"role": "user", "content": USER}, {"role": "assistant", "content": ANSWER}
        following = {"role": "user", "content": NEXT}
        closed = self._probed([question])
        prompt = self._probed([question], generate=True)
        answered = self._probed([question, answer])
        continued = self._probed([question, answer, following])
        if None in (closed, prompt, answered, continued):
            return None
        continued = continued[: continued.rfind(NEXT)]
        texts = ((closed, USER), (prompt, USER), (answered, ANSWER), (continued, ANSWER))
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
        context, message = probe(Kind("user", False, False, True))
        answered = self._probed([*context, message], [TOOL])
        continued = self._probed([*context, message, tool_result()], [TOOL])
        ended = None if answered is None else answered.removesuffix(self._trailer)
        if ended is not None and continued is not None and continued.startswith(ended):
            calls = self._first_token(continued[len(ended) :].partition(NEXT)[0])
        return plain, calls

    def _first_token(self, text: str) -> str | None:
        return min((token for token in self.closing_tokens if token in text), key=text.index, default=None)


def _joined(before: str, opening: str) -> str:
    """An opening behind a text that ends with space of its own."""
    return opening.lstrip() if before != before.rstrip() else opening


def _is_named(value, text: str) -> bool:
    return value is None or isinstance(value, bool) or (isinstance(value, str) and value in text)


_kept: dict[tuple, Template] = {}
_KEPT = 64


def template_of(
    tokenizer, source: str | None, reasoning_format: str | None, arguments: Mapping, with_tools: bool
) -> Template:
    """The Template of these, the same object for the same ones, so that nothing is learned twice."""
    tokens = (len(tokenizer), repr(tokenizer.special_tokens_map))  # both can be changed
    text = repr(source or tokenizer.chat_template)
    # A value that the template compares with is in it; of others (a date, a text) only the name counts.
    told = [
        (name, repr(value) if is_deciding(name) or _is_named(value, text) else "") for name, value in arguments.items()
    ]
    # A Template holds its tokenizer, so that nothing else can have its id.
    key = (id(tokenizer), tokens, text, reasoning_format, tuple(sorted(told)), with_tools)
    if key not in _kept:
        if len(_kept) >= _KEPT:
            del _kept[next(iter(_kept))]
        _kept[key] = Template(tokenizer, source, reasoning_format, arguments, with_tools)
    return _kept[key]

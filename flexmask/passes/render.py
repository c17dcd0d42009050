"""A conversation -> its N passes, rendered by the model's own chat template.

A pass is what inference sees and what the model should answer: the prompt is the template over everything before an
assistant message, with the generation prompt; the completion is what the model would have generated, reasoning and
end-of-turn token included. The two are tokenised separately, as at inference.

The completion is what the template itself continues the prompt with. Where a template cannot show its own target (it drops
the reasoning, or its prompt opens a block that history has not), the visible part of the message is taken from what the
template does show, and what comes before it from short conversations in which it shows that (`Template.lead`).
"""

from __future__ import annotations

import itertools
import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields

import numpy as np
from transformers.utils import get_json_schema

from ..messages import (
    NOTHING_TO_TRAIN,
    REASONING_FIELDS,
    WEIGHTS,
    Conversation,
    ConversationError,
    NothingLeftError,
    check_template_arguments,
    is_trained,
    is_weight,
    read_conversation,
    read_messages,
    read_tools,
    reasoning_of,
    text_of,
    without_nulls,
)
from .probes import (
    CALL_MARK,
    CONTENT_MARK,
    REASONING_MARK,
    USER,
    Kind,
    marked,
    numbered_mark,
    unmarked,
    visible_at,
    with_marks_in_calls,
    without_numbered_marks,
)
from .template import Lead, Mismatch, Template, template_of

TRAIN_ON = ("all", "last")
EMPTY_REASONING = ("prompt", "keep", "drop", "error")
UNWRITTEN_TOOLS = ("error", "drop")
# Keys of a message that are read here, whatever the template reads.
_READ = {"role", "content", "train", "tool_calls", *WEIGHTS, *REASONING_FIELDS}


@dataclass(frozen=True)
class Pass:
    """One training sequence: a context, then one generated message.

    Attributes:
        input_ids: the tokens of the context and of the generated message.
        loss_mask: one entry per token, True where this pass supervises the token.
        weight: of the pass in the loss. It multiplies the weights of its tokens.
        token_weight: one entry per token, of which those of supervised tokens count; 1 by default.
    """

    input_ids: Sequence[int]
    loss_mask: Sequence[bool]
    weight: float = 1.0
    token_weight: Sequence[float] | None = None


def render_passes(
    messages: Sequence[Mapping],
    tokenizer,
    *,
    tools: Sequence | None = None,
    chat_template: str | None = None,
    reasoning_format: str | None = None,
    end_of_turn: str | None = None,
    train_on: str = "all",
    empty_reasoning: str = "prompt",
    unwritten_tools: str = "error",
    reasoning_weight: float = 1.0,
    counts: Counter | None = None,
    **template_kwargs,
) -> list[Pass]:
    """Render one pass for each assistant message to be trained.

    Args:
        messages: dicts with `role` and `content`, in any form that `messages.read_messages` knows. An assistant message
            with `"train": False` or weight 0 is context only; one with a `weight` counts so much in the loss, and its
            reasoning `reasoning_weight` times as much. Other keys reach the template as they are.
        tokenizer: a Hugging Face tokenizer.
        tools: tool descriptions, as `apply_chat_template` takes them.
        chat_template: a template to use instead of the tokenizer's own.
        reasoning_format: how the model writes its reasoning, with the placeholder `{reasoning}`, for templates that
            cannot render it, e.g. `"<think>\\n{reasoning}\\n</think>\\n\\n"`. By default it is detected.
        end_of_turn: token that ends an assistant message, for templates that render none. By default it is detected.
        train_on: "all" assistant messages, or the "last" one only.
        empty_reasoning: what becomes of a message without reasoning where the template would write an empty thought.
            "prompt": it is rendered with the template's thinking switched off (enable_thinking=False), so that the empty
            thought stands in the prompt; where the template has no such switch, the empty thought is trained. "keep": it
            is trained. "drop": the message is context only. "error".
        unwritten_tools: what becomes of a conversation with tools that the template leaves out. "error", or "drop": it is
            trained as the model would see it with this template, without them.
        reasoning_weight: of what comes before the visible part of a message, with its tags; 0 trains answers only. The
            message's own one wins.
        counts: is told how many empty thoughts were trained, stand in prompts, or were dropped, what the template leaves
            out of later prompts, and how many messages have a key that nobody reads.
        **template_kwargs: passed to the template (`enable_thinking=…`).

    Returns:
        The passes, in the order of the messages; input_ids int64[T] and loss_mask bool[T] as numpy arrays.

    Raises:
        ConversationError: the messages are malformed, or the template cannot render one of them; the message is named
            by its index, counted from zero. Or an option cannot be used: a reasoning_format without its placeholder,
            an end_of_turn that is not one token.
    """
    unread: dict[str, None] = {}
    conversation = Conversation(messages=read_messages(messages, unread))
    conversation.names = [f"message {i} ({m['role']})" for i, m in enumerate(conversation["messages"])]
    if tools:
        conversation["tools"] = read_tools([get_json_schema(tool) if callable(tool) else tool for tool in tools])
    options = _Options(
        chat_template, reasoning_format, end_of_turn, train_on, empty_reasoning, unwritten_tools, reasoning_weight
    )
    counts = Counter() if counts is None else counts
    passes = _Renderer(conversation, tokenizer, options, template_kwargs, counts).passes()
    counts.update(f"conversations with a key {key!r}, which nobody reads" for key in unread)
    return passes


def render_conversation(conversation, tokenizer, *, counts: Counter | None = None, **options) -> list[Pass]:
    """The passes of a conversation in the form that datasets have.

    Args:
        conversation: a record that `messages.read_conversation` reads; or the list of messages. Keys with a null are
            taken out, at any depth, because the rows of a `datasets.Dataset` have them wherever another row has the
            key. Only a `Conversation` of `load_conversations` keeps those that its file had.
        tokenizer, counts, **options: as `render_passes` takes them. The conversation's own chat_template_kwargs win.

    Raises:
        ConversationError: no messages, or `render_passes` refuses them; the origin of a `Conversation` is named.
    """
    if not isinstance(conversation, Conversation):
        conversation = without_nulls(conversation)
        record = conversation if isinstance(conversation, Mapping) else {"messages": conversation}
        conversation = read_conversation(record)
    chosen = _Options(**{field.name: options.pop(field.name) for field in fields(_Options) if field.name in options})
    arguments = options | conversation.get("chat_template_kwargs", {})
    try:
        counts = Counter() if counts is None else counts
        return _Renderer(conversation, tokenizer, chosen, arguments, counts).passes()
    except ConversationError as error:
        raise type(error)(f"{conversation.origin}: {error}" if conversation.origin else str(error)) from error


@dataclass(frozen=True)
class _Options:
    """See `render_passes`."""

    chat_template: str | None = None
    reasoning_format: str | None = None
    end_of_turn: str | None = None
    train_on: str = "all"
    empty_reasoning: str = "prompt"
    unwritten_tools: str = "error"
    reasoning_weight: float = 1.0

    def check(self, tokenizer) -> None:
        if self.reasoning_format is not None and self.reasoning_format.count("{reasoning}") != 1:
            raise ConversationError(
                f"reasoning_format must contain '{{reasoning}}' exactly once, got {self.reasoning_format!r}"
            )
        choices = {"train_on": TRAIN_ON, "empty_reasoning": EMPTY_REASONING, "unwritten_tools": UNWRITTEN_TOOLS}
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise ConversationError(f"{name} is {getattr(self, name)!r}, expected one of {', '.join(allowed)}")
        if not (self.chat_template or tokenizer.chat_template):
            raise ConversationError(
                f"the tokenizer {tokenizer.name_or_path!r} has no chat template; pass chat_template=… (a Jinja template; "
                "--chat_template_path on the command line)"
            )
        if not is_weight(self.reasoning_weight):
            raise ConversationError(
                f"reasoning_weight is {self.reasoning_weight!r}, expected a number that is not negative"
            )
        end = self.end_of_turn
        if end is not None and len(tokenizer(end, add_special_tokens=False)["input_ids"]) != 1:
            raise ConversationError(f"end_of_turn is {end!r}, which is not one token of the tokenizer")


@dataclass
class _Turn:
    """A message to be trained: its place, what decides how it is written, and the template with the arguments it takes."""

    index: int
    kind: Kind
    template: Template
    prompt: str = ""
    thought: str = ""  # with which the completion begins, with what stands around it
    opening: str = ""  # of the first visible piece
    completion: str = ""


class _Renderer:
    """Renders one conversation."""

    def __init__(self, conversation: Conversation, tokenizer, options: _Options, arguments: Mapping, counts: Counter):
        options.check(tokenizer)
        check_template_arguments(arguments)
        self._messages, self._names = conversation["messages"], conversation.names
        self._tools = conversation.get("tools")
        self._tokenizer, self._options, self._counts = tokenizer, options, counts
        self._arguments = dict(arguments)
        self._template = template_of(
            tokenizer, options.chat_template, options.reasoning_format, arguments, bool(self._tools)
        )

    def passes(self) -> list[Pass]:
        turns = self._turns()
        for template in dict.fromkeys(turn.template for turn in turns):
            self._render(template, [turn for turn in turns if turn.template is template])
        self._check_tools(turns[0])
        self._check_context(turns[-1])
        for turn in turns:
            self._check_completion(turn)
        self._count(turns)
        return self._tokenize(turns)

    def _turns(self) -> list[_Turn]:
        """The messages to be trained; those without reasoning as `empty_reasoning` says."""
        targets = [i for i, message in enumerate(self._messages) if is_trained(message)]
        turns = []
        for i in targets[-1:] if self._options.train_on == "last" else targets:
            turn = _Turn(i, Kind.of(self._messages[:i], self._messages[i]), self._template)
            if not (turn.kind.reasoning or turn.kind.content or turn.kind.calls):
                raise self._error(i, 'has nothing to train (no content, no reasoning, no call); mark it "train": false')
            if not turn.kind.reasoning and self._writes_empty_thought(turn, turn.template):
                if self._options.empty_reasoning == "error":
                    raise self._error(
                        i,
                        "has no reasoning, and the chat template would train an empty thought (empty_reasoning is 'error')",
                    )
                if self._options.empty_reasoning == "drop":
                    self._counts["empty thoughts: messages not trained"] += 1
                    continue
                if self._options.empty_reasoning == "prompt" and self._template.switch:
                    switched_off = self._template.with_arguments(**{self._template.switch: False})
                    if not self._writes_empty_thought(turn, switched_off):
                        turn.template = switched_off
                        self._counts["empty thoughts in the prompt"] += 1
            turns.append(turn)
        if not turns:
            if targets:
                raise NothingLeftError("all its messages have empty thoughts (empty_reasoning is 'drop')")
            raise ConversationError(NOTHING_TO_TRAIN)
        return turns

    def _writes_empty_thought(self, turn: _Turn, template: Template) -> bool:
        try:
            return bool(template.lead(turn.kind).thought("").strip())
        except ConversationError:
            return False

    def _render(self, template: Template, turns: Sequence[_Turn]) -> None:
        """Prompts and completions of turns with one set of arguments."""
        taken = [template.as_taken(message) for message in self._messages[: turns[-1].index]]
        contexts = [taken[: turn.index] for turn in turns]
        prompts = self._apply(template, contexts, turns, generate=True)
        answers = [template.as_taken(marked(self._messages[turn.index])) for turn in turns]
        messages = [[*context, answer] for context, answer in zip(contexts, answers)]
        all_answered = self._apply(template, messages, turns)
        written = self._written_otherwise(template, turns, contexts, all_answered)
        for turn, prompt, answered in zip(turns, prompts, all_answered):
            turn.prompt = prompt
            if turn.index in written:
                visible = self._continued(turn, written[turn.index])
            elif turn.kind.content and turn.kind.calls and CONTENT_MARK not in answered:
                turn.thought, turn.opening, visible = self._parts_with_content(turn, answered)
            else:
                turn.thought, turn.opening, visible = self._parts(turn, answered)
            # A content may end with a token that ends turns, and the template write none behind it.
            text = "" if turn.kind.calls else text_of(self._messages[turn.index]).strip()
            is_ended = not text or visible.strip() != text
            whole = turn.thought + turn.opening + visible
            completion = template.finished(whole, turn.kind.calls, self._options.end_of_turn, is_ended)
            if completion is None:
                raise self._error(
                    turn.index,
                    "the chat template writes no end-of-turn token after it and the tokenizer has no eos_token; pass "
                    "end_of_turn=… (the token with which the model ends its turn)",
                )
            turn.completion = completion

    def _written_otherwise(self, template: Template, turns, contexts, all_answered) -> dict[int, str]:
        """Messages as the template writes them, by their index, where marks in them change that: it may look at the name of a
        call (functionary's `python`), or at how a text begins."""
        messages = [[*context, template.as_taken(self._messages[turn.index])] for turn, context in zip(turns, contexts)]
        written = zip(turns, all_answered, self._apply(template, messages, turns))
        return {turn.index: text for turn, answered, text in written if unmarked(answered) != text}

    def _continued(self, turn: _Turn, answered: str) -> str:
        """The completion of a turn in which nothing can be marked, as the template itself continues the prompt."""
        completion, template = answered.removeprefix(turn.prompt), turn.template
        usual = turn.index > 0 and turn.kind.follows != "assistant" and answered.startswith(turn.prompt)
        if not usual or turn.kind.reasoning or template.opened(turn.prompt) or template.thinks(completion):
            raise self._error(
                turn.index,
                "the chat template writes it in another way than messages with another beginning or another name in their call "
                "(it looks at these), so what the model should generate is not known; "
                f"it is written as {answered[-80:]!r}",
            )
        return completion

    def _parts(self, turn: _Turn, answered: str) -> tuple[str, str, str]:
        """Of the completion of a turn the thought, what opens the first visible piece, and the rest."""
        message, template, prompt = self._messages[turn.index], turn.template, turn.prompt
        at = visible_at(answered)
        shown = template.shown_lead(prompt, answered, message)
        usual = turn.index > 0 and turn.kind.follows != "assistant"
        if shown is not None and (usual or self._is_usual(turn, shown)):
            _, opening = template.split_thought(unmarked(shown[1] if turn.kind.reasoning else shown[0]))
            return unmarked(answered[len(prompt) : at]).removesuffix(opening), opening, unmarked(answered[at:])
        if not (turn.kind.content or turn.kind.calls) and answered.startswith(prompt):
            return *template.split_thought(unmarked(answered[len(prompt) :])), ""
        if at < 0:
            raise self._not_rendered(turn, answered)
        if REASONING_MARK in answered[at:]:
            raise self._error(
                turn.index,
                "the chat template writes its reasoning behind its content or its call; pass a chat_template=… that writes "
                "it before them",
            )
        text = text_of(message)
        space = text[: len(text) - len(text.lstrip())]  # which belongs to the content, where the template leaves it
        at -= len(space) if answered[:at].endswith(space) else 0
        lead = self._lead(turn, answered)
        called = turn.kind.calls and any(m.get("tool_calls") for m in self._messages[: turn.index])
        if not template.opens(lead.opening, unmarked(answered[:at]), prompt, called):
            raise self._mismatch(turn, answered)
        return lead.thought(reasoning_of(message).strip()), lead.opening, unmarked(answered[at:])

    def _parts_with_content(self, turn: _Turn, answered: str) -> tuple[str, str, str]:
        """As `_parts`, for content beside calls that the template leaves out behind earlier calls (DeepSeek-V3): as it writes
        the message where nothing was called before. But for the content, and for tags that may be missing, both must agree."""
        message, template = self._messages[turn.index], turn.template
        leading = itertools.takewhile(lambda m: m["role"] in ("system", "developer"), self._messages)
        short = [template.as_taken(m) for m in (*leading, {"role": "user", "content": USER})]
        try:
            [prompt] = self._rendered(template, [short], self._tools, True)
            [alone] = self._rendered(template, [[*short, template.as_taken(marked(message))]], self._tools, False)
        except Exception as error:  # the template wants more of a conversation
            raise self._not_rendered(turn, answered) from error
        header = prompt.removesuffix(template.opened(prompt))
        # A mark stands behind the first character.
        at, call_alone, call = visible_at(alone), alone.find(CALL_MARK) - 1, answered.find(CALL_MARK) - 1
        if min(at, call_alone, call) < 0 or not alone.startswith(header):
            raise self._not_rendered(turn, answered)
        content, before_call = text_of(message).strip(), unmarked(alone[at:call_alone])
        thought_alone, opening = template.split_thought(alone[len(header) : at])
        if REASONING_MARK in opening + alone[at:] + answered[call:]:
            raise self._not_rendered(turn, answered)
        opening = unmarked(opening)
        without_content = (opening + before_call.removeprefix(content).lstrip()).lstrip()
        agree = before_call.startswith(content) and alone[call_alone:] == answered[call:]
        if not (agree and template.opens(without_content, unmarked(answered[:call]), turn.prompt, True)):
            raise self._not_rendered(turn, answered)
        thought = self._lead(turn, answered).thought(reasoning_of(message).strip())
        if thought and thought_alone:  # the space behind it may be that before the call
            thought = thought.rstrip() + thought_alone[len(thought_alone.rstrip()) :]
        return thought, opening, unmarked(alone[at:])

    def _lead(self, turn: _Turn, answered: str) -> Lead:
        """How a turn is led in that the template itself does not show."""
        try:
            lead = turn.template.lead(turn.kind)
        except Mismatch as error:
            raise self._mismatch(turn, answered) from error
        except ConversationError as error:
            raise self._error(turn.index, str(error)) from error
        if not turn.prompt.endswith(lead.prompt_end):
            raise self._mismatch(turn, answered)
        return lead

    def _mismatch(self, turn: _Turn, answered: str) -> ConversationError:
        return self._error(turn.index, str(turn.template.mismatch(turn.prompt, answered)))

    def _is_usual(self, turn: _Turn, shown: tuple[str, str]) -> bool:
        """Whether a message is led in as any other: a template may write no prompt for a first message, or a second in a row."""
        try:
            lead = turn.template.lead(turn.kind)
        except ConversationError as error:
            raise self._error(turn.index, str(error)) from error
        return "".join(shown) == lead.thought("") + lead.opening

    def _apply(self, template: Template, conversations, turns: Sequence[_Turn], *, generate: bool = False) -> list[str]:
        try:
            return self._rendered(template, conversations, self._tools, generate)
        except Exception:
            for messages, turn in zip(conversations, turns):  # which one was it?
                try:
                    self._rendered(template, [messages], self._tools, generate)
                except Exception as error:
                    raise self._failed(messages, turn, error, generate) from error
            raise

    def _rendered(self, template: Template, conversations, tools, generate: bool) -> list[str]:
        # A Template is shared by conversations that differ in arguments that do not decide how an answer is written.
        return template.render(conversations, tools, generate=generate, arguments=self._arguments | template.deciding)

    def _failed(self, messages, turn: _Turn, error: Exception, generate: bool) -> ConversationError:
        if not messages:
            return self._error(turn.index, 'has nothing before it, so there is no prompt; mark it "train": false')
        what = "its context" if generate else "it"
        text = " ".join(f"{type(error).__name__}: {error}".split())
        return self._error(turn.index, f"the chat template failed while rendering {what}: {text}")

    def _error(self, index: int, text: str) -> ConversationError:
        return ConversationError(f"{self._names[index]}: {text}")

    # Nothing may be lost in rendering.

    def _check_tools(self, turn: _Turn) -> None:
        """A template that knows no tools leaves them out without a word."""
        if not self._tools:
            return
        context = [turn.template.as_taken(message) for message in self._messages[: turn.index]]
        try:
            [without] = self._rendered(turn.template, [context], None, True)
        except Exception:  # a template that cannot do without tools renders them
            return
        names = [tool["function"]["name"] for tool in self._tools]
        unwritten = [name for name in names if turn.prompt.count(name) <= without.count(name)]
        if unwritten and self._options.unwritten_tools == "drop":
            self._counts["conversations with tools that the chat template does not write"] += 1
        elif unwritten:
            other = turn.template.tool_arguments()
            raise ConversationError(
                f"the chat template does not render the tool {unwritten[0]!r}; leave tools out (or pass unwritten_tools='drop'), "
                + (f"pass them as it takes them ({other}), or " if other else "or ")
                + "pass a chat_template=… that supports them (--chat_template_path on the command line)"
            )

    def _check_context(self, turn: _Turn) -> None:
        """Every text before the last turn is in its prompt, as often as the messages hold it, and every call."""
        pieces = {}  # message -> texts that must be there
        lost = self._lost_calls(turn)
        for i, message in enumerate(self._messages[: turn.index]):
            missing = lost.get(i) or _missing_in_calls(message, turn.prompt)
            if missing:
                raise self._error(i, f"{missing} in the prompt of {self._names[turn.index]}; {_TEMPLATE_WITH_TOOLS}")
            # Content beside calls is reasoning to some templates (gpt-oss), and goes as reasoning goes.
            if message.get("tool_calls") and turn.template.writes_content_beside_calls:
                if not all(
                    text in turn.prompt or _is_written_otherwise(text, turn.prompt) for text in _pieces(message)
                ):
                    self._counts["messages with content beside calls that later prompts leave out"] += 1
            elif "</think>" not in text_of(message):
                pieces[i] = _pieces(message)
        for i, texts in pieces.items():
            for text in texts:
                expected = sum(other.count(text) for others in pieces.values() for other in others)
                if turn.prompt.count(text) < expected and not _is_written_otherwise(text, turn.prompt):
                    raise self._error(
                        i,
                        f"the chat template does not render it (or not as it is) in the prompt of {self._names[turn.index]}; "
                        f"it starts {text[:40]!r}; leave it out, move it, or pass a chat_template=… that renders it",
                    )

    def _lost_calls(self, turn: _Turn) -> dict[int, str]:
        """Calls before a turn that its prompt does not hold, by message: each is rendered with a mark of its own."""
        context, calls = [], []
        for i, message in enumerate(self._messages[: turn.index]):
            if message.get("tool_calls"):
                first = len(calls)
                calls += [(i, call["function"]["name"]) for call in message["tool_calls"]]
                message = with_marks_in_calls(message, first)
            context.append(turn.template.as_taken(message))
        if not calls:
            return {}
        try:
            [rendered] = self._rendered(turn.template, [context], self._tools, True)
        except Exception:  # a template that looks at the names
            return {}
        if without_numbered_marks(rendered) != turn.prompt:
            return {}
        return {
            i: f"the chat template does not render its call of the tool {name!r}"
            for k, (i, name) in enumerate(calls)
            if numbered_mark(k) not in rendered
        }

    def _check_completion(self, turn: _Turn) -> None:
        """Reasoning, content and calls of a message stand in its completion, one after the other, and one end of turn."""
        message, rest = self._messages[turn.index], turn.completion
        for text in (reasoning_of(message).strip(), *_pieces(message)):
            if text not in rest:
                raise self._not_rendered(turn, turn.completion)
            rest = rest.replace(text, "", 1) if text else rest
        missing = _missing_in_calls(message, rest)
        if missing:
            raise self._error(turn.index, f"{missing}; {_TEMPLATE_WITH_TOOLS}")
        if turn.kind.content and turn.kind.calls and turn.template.splits_calls_from_content:
            raise self._error(
                turn.index,
                "the chat template writes its content and its calls in another order once their answers follow, so what "
                "the model should generate is not known; move the content to a message of its own, or leave it out",
            )
        end = next((token for token in turn.template.closing_tokens if turn.completion.endswith(token)), "")
        self._check_control_tokens(turn, end)
        visible = turn.completion[len(turn.thought + turn.opening) :].removesuffix(end)
        for text in (
            *_pieces(message),
            *_leaves([call["function"]["arguments"] for call in message.get("tool_calls", ())]),
        ):
            visible = visible.replace(text, "")
        if end and end in visible:
            raise self._error(
                turn.index,
                f"the chat template writes it as several turns ({end!r} stands inside); split the message, or pass a "
                "chat_template=… that writes it as one",
            )

    def _check_control_tokens(self, turn: _Turn, end: str) -> None:
        """The texts of a message hold nothing that would be read as the end of its thought; an end of its turn is counted."""
        message = self._messages[turn.index]
        texts = (reasoning_of(message), *_pieces(message))
        held = next((tag for tag in turn.template.thought_tags if any(tag in text for text in texts)), None)
        if held:
            raise self._error(
                turn.index,
                f"its text holds {held!r}, which the chat template writes around thoughts; put the reasoning into "
                'reasoning_content, or mark the message "train": false',
            )
        arguments = _leaves([call["function"]["arguments"] for call in message.get("tool_calls", ())])
        for token in dict.fromkeys(filter(None, (end, self._tokenizer.eos_token))):
            if any(token in text for text in (*texts, *arguments)):
                self._counts[f"trained messages whose text holds {token!r}, where the model would end its turn"] += 1

    def _not_rendered(self, turn: _Turn, rendered: str) -> ConversationError:
        message = self._messages[turn.index]
        if turn.kind.calls and not turn.kind.content:
            name = message["tool_calls"][0]["function"]["name"]
            return self._error(
                turn.index,
                f"the chat template does not render its call of the tool {name!r}; {_TEMPLATE_WITH_TOOLS}",
            )
        if not turn.kind.content:
            return self._error(
                turn.index,
                "has reasoning and no content, which the chat template does not show; give it its content, or mark it "
                '"train": false',
            )
        text = text_of(message)
        return self._error(
            turn.index,
            "the chat template does not render its content as it is"
            + (" beside its calls; leave it out, or move it to a message of its own" if turn.kind.calls else "")
            + f"; content starts {text[:60]!r}, rendered as {unmarked(rendered)[-80:]!r}",
        )

    def _count(self, turns: Sequence[_Turn]) -> None:
        for turn in turns:
            if not turn.kind.reasoning and turn.thought.strip():
                self._counts["empty thoughts trained"] += 1
        for name in self._arguments.keys() - self._template.variables:
            self._counts[f"conversations with a template argument {name!r} that the template does not read"] += 1
        words = self._template.words
        for message in self._messages:
            for key in message.keys() - _READ:
                if key not in words:
                    self._counts[f"messages with a key {key!r}, which the chat template does not write"] += 1

    def _tokenize(self, turns: Sequence[_Turn]) -> list[Pass]:
        anchor = self._template.anchor
        texts = [turn.prompt for turn in turns] + [anchor + turn.completion for turn in turns]
        weights = [self._messages[turn.index].get("reasoning_weight", self._options.reasoning_weight) for turn in turns]
        offsets = any(weight != 1 for weight in weights)
        if offsets and not self._tokenizer.is_fast:
            raise ConversationError("reasoning_weight needs a fast tokenizer, which tells where each token begins")
        options = {"add_special_tokens": False, "return_attention_mask": False, "verbose": False}
        try:
            encoded = self._tokenizer(texts, return_offsets_mapping=offsets, **options)
        except TypeError as error:
            raise ConversationError(f"a text cannot be tokenised (half of a surrogate pair?): {error}") from error
        ids = encoded["input_ids"]
        skip = len(self._tokenizer(anchor, add_special_tokens=False)["input_ids"]) if anchor else 0
        passes = []
        for k, turn in enumerate(turns):
            prompt, completion = ids[k], ids[len(turns) + k][skip:]
            loss_mask = np.zeros(len(prompt) + len(completion), bool)
            loss_mask[len(prompt) :] = True
            token_weight = None
            if weights[k] != 1:
                ends = np.array([end for _, end in encoded["offset_mapping"][len(turns) + k][skip:]])
                token_weight = np.ones(len(loss_mask), np.float32)
                token_weight[len(prompt) :][ends <= len(anchor) + len(turn.thought)] = weights[k]
            weight = float(self._messages[turn.index].get("weight", 1.0))
            passes.append(Pass(np.array(prompt + completion, np.int64), loss_mask, weight, token_weight))
        return passes


def _leaves(value) -> list[str]:
    """Keys and texts and numbers of arguments, as they would be written."""
    if isinstance(value, Mapping):
        return [piece for key, item in value.items() for piece in (str(key), *_leaves(item))]
    if isinstance(value, list):
        return [piece for item in value for piece in _leaves(item)]
    if value is None or isinstance(value, bool):
        return []  # true, True, null, None
    return [value.strip() if isinstance(value, str) else json.dumps(value)]


_TEMPLATE_WITH_TOOLS = "pass a chat_template=… that supports tools (--chat_template_path on the command line)"


def _missing_in_calls(message: Mapping, rendered: str) -> str:
    """What a text lacks of a message's calls, in words; "" if nothing."""
    for call in message.get("tool_calls", ()):
        name = call["function"]["name"]
        for piece in (name, *_leaves(call["function"]["arguments"])):
            if piece not in rendered and not _is_written_otherwise(piece, rendered):
                how = "" if piece == name else f" as it is ({piece[:60]!r} is missing)"
                return f"the chat template does not render its call of the tool {name!r}{how}"
        rendered = rendered.replace(name, "", 1)
    return ""


def _pieces(message: Mapping) -> list[str]:
    """The texts of a message's content: one, or those of its parts."""
    content = message["content"]
    texts = [content] if isinstance(content, str) else [part["text"] for part in content]
    return [text.strip() for text in texts if text.strip()]


def _is_written_otherwise(text: str, rendered: str) -> bool:
    """Whether a text was rendered as JSON or Python writes it, or without a switch in it that some templates obey."""
    forms = {form[1:-1] for form in (json.dumps(text, ensure_ascii=False), json.dumps(text), repr(text))}
    forms.add(_SWITCH_IN_TEXT.sub("", text).strip())
    return any(form in rendered for form in forms - {text})


# SmolLM3 and Nemotron take these words out of messages.
_SWITCH_IN_TEXT = re.compile(r"/(?:no_)?think\b")

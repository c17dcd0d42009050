"""A conversation -> its N passes, rendered by the model's own chat template.

A pass is what inference sees and what the model should answer: the prompt is the template over everything before an
assistant message, with the generation prompt; the completion is what the model would have generated, reasoning and
end-of-turn token included. The two are tokenised separately, as at inference.
"""

from __future__ import annotations

import functools
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from .messages import (
    NOTHING_TO_TRAIN,
    REASONING_FIELDS,
    Conversation,
    ConversationError,
    is_trained,
    read_conversation,
    read_messages,
    without_nulls,
)

_OPEN_REASONING = re.compile(r"<([\w:]+)>(\s*)$")
_EMPTY_REASONING = re.compile(r"\s*(?P<open><([\w:]+)>)\s*(?P<close></\2>)")
# Put into the reasoning of a message while it is rendered as a target: a template that leaves it out drops reasoning.
_MARK = "@@flexmask-reasoning@@"
_PROBE = "@@flexmask-probe@@"


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
    **template_kwargs,
) -> list[Pass]:
    """Render one pass for each assistant message to be trained.

    Args:
        messages: dicts with `role` and `content`. Reasoning is taken from `reasoning_content`, `reasoning` or
            `thinking`, or from a leading `<think>…</think>` in `content`. An assistant message with `"train": False`
            is context only; one with a `weight` (a number, not negative) counts so much in the loss, and one of weight
            0 is context only. Other keys reach the template as they are.
        tokenizer: a Hugging Face tokenizer.
        tools: tool descriptions, as `apply_chat_template` takes them.
        chat_template: a template to use instead of the tokenizer's own.
        reasoning_format: how the model writes its reasoning, with the placeholder `{reasoning}`, for templates that
            cannot render it, e.g. `"<think>\\n{reasoning}\\n</think>\\n\\n"`. By default it is detected.
        end_of_turn: token that ends an assistant message, for templates that render none. By default it is detected.
        **template_kwargs: passed to the template (`enable_thinking=…`).

    Returns:
        The passes, in the order of the messages; input_ids int64[T] and loss_mask bool[T] as numpy arrays.

    Raises:
        ConversationError: the messages are malformed, or the template cannot render one of them; the message is named
            by its index, counted from zero. Or an option cannot be used: a reasoning_format without its placeholder,
            an end_of_turn that is not one token.
    """
    messages = read_messages(messages)
    if reasoning_format is not None and reasoning_format.count("{reasoning}") != 1:
        raise ConversationError(f"reasoning_format must contain '{{reasoning}}' exactly once, got {reasoning_format!r}")
    if not (chat_template or tokenizer.chat_template):
        raise ConversationError(
            f"the tokenizer {tokenizer.name_or_path!r} has no chat template; pass chat_template=… (a Jinja template; "
            "--chat_template_path on the command line)"
        )
    if end_of_turn is not None and len(tokenizer(end_of_turn, add_special_tokens=False)["input_ids"]) != 1:
        raise ConversationError(f"end_of_turn is {end_of_turn!r}, which is not one token of the tokenizer")
    targets = [i for i, message in enumerate(messages) if is_trained(message)]
    if not targets:
        raise ConversationError(NOTHING_TO_TRAIN)

    render = functools.partial(_render, tokenizer, chat_template, tools, template_kwargs)
    prompts = render([messages[:i] for i in targets], add_generation_prompt=True)
    _check_tools(tools, prompts[0])
    answered = render([[*messages[:i], _marked(messages[i])] for i in targets])
    trailer = _trailer(render, messages[: targets[0]], prompts[0], tokenizer.eos_token)
    reasoning_format = reasoning_format or _opened_format(prompts)

    completions = [
        _completion(messages[i], i, prompt, text.removesuffix(trailer), reasoning_format)
        for i, prompt, text in zip(targets, prompts, answered)
    ]
    for k, completion in enumerate(completions):
        if completion is None:
            completions[k] = _completion_alone(render, messages, targets[k], prompts[k], trailer, reasoning_format)
        if completions[k] is None:
            raise _mismatch(targets[k], prompts[k], answered[k])
    completions = _end_turns(completions, targets, messages, tokenizer, render, end_of_turn)
    for i, completion in zip(targets, completions):
        _check_rendered(messages[i], i, completion)
    weights = [float(messages[i].get("weight", 1.0)) for i in targets]
    return _tokenize(tokenizer, prompts, completions, weights)


def render_conversation(conversation, tokenizer, **options) -> list[Pass]:
    """The passes of a conversation in the form that datasets have.

    Args:
        conversation: a dict with `messages`, and `tools` if it has any; or the list of messages. Keys with a null are
            taken out, at any depth, because the rows of a `datasets.Dataset` have them wherever another row has the
            key. Only a `Conversation` of `load_conversations` keeps those that its file had.
        tokenizer, **options: as `render_passes` takes them.

    Raises:
        ConversationError: no messages, or `render_passes` refuses them; the origin of a `Conversation` is named.
    """
    if isinstance(conversation, Conversation):
        try:
            return _render_record(conversation, tokenizer, options)
        except (ConversationError, TypeError) as error:  # of tokenizers, for half of a surrogate pair
            raise ConversationError(f"{conversation.origin}: {error}") from error
    conversation = without_nulls(conversation)
    if not isinstance(conversation, Mapping):
        return render_passes(conversation, tokenizer, **options)
    return _render_record(read_conversation(conversation, "the conversation"), tokenizer, options)


def _render_record(record: Mapping, tokenizer, options: dict) -> list[Pass]:
    if record.get("tools"):
        options = options | {"tools": record["tools"]}
    return render_passes(record["messages"], tokenizer, **options)


def _render(tokenizer, chat_template, tools, template_kwargs, conversations, add_generation_prompt=False) -> list[str]:
    apply = functools.partial(
        tokenizer.apply_chat_template,
        tools=tools,
        chat_template=chat_template,
        tokenize=False,
        add_generation_prompt=add_generation_prompt,
        **template_kwargs,
    )
    try:
        return apply(conversations)
    except Exception:
        for messages in conversations:  # which one was it?
            try:
                apply([messages])
            except Exception as error:
                last = len(messages) - 1 + add_generation_prompt
                raise ConversationError(
                    f"message {last}: the chat template failed while rendering "
                    f"{'its context' if add_generation_prompt else 'it'}: {type(error).__name__}: {error}"
                ) from error
        raise


def _marked(message: dict) -> dict:
    """The message with a mark inside its reasoning, where no template strips it (after the first visible character)."""
    reasoning = message.get(REASONING_FIELDS[0])
    if reasoning is None:
        return message
    at = len(reasoning) - len(reasoning.lstrip()) + 1
    return message | dict.fromkeys(REASONING_FIELDS, reasoning[:at] + _MARK + reasoning[at:])


def _trailer(render, context, prompt: str, eos_token: str | None) -> str:
    """What the template appends to any conversation that is not continued (Phi-3: an end-of-text token)."""
    if not eos_token or not context or context[-1]["role"] == "assistant":
        return ""
    [closed] = render([context])
    appended = closed.endswith(eos_token) and not prompt.startswith(closed)
    return eos_token if appended and prompt.startswith(closed.removesuffix(eos_token)) else ""


def _opened_format(prompts: Sequence[str]) -> str | None:
    """The reasoning format that a generation prompt opens: `…<think>\\n` -> `<think>\\n{reasoning}\\n</think>\\n\\n`."""
    for prompt in prompts:
        opened = _OPEN_REASONING.search(prompt)
        if opened:
            tag, space = opened.groups()
            return f"<{tag}>{space}{{reasoning}}{space}</{tag}>{space * 2}"
    return None


def _completion(message: dict, index: int, prompt: str, answered: str, reasoning_format: str | None) -> str | None:
    """What the model would generate after the prompt, its end of turn not yet looked at; None if they do not agree.

    Usually the rendered answer minus the prompt. Some templates cannot show their own target: they drop the reasoning
    even from the last message, or open it in the prompt and nowhere else. Then the visible part is taken from what
    they do show, and the reasoning is written before it in its format.
    """
    reasoning = message.get(REASONING_FIELDS[0], "").strip()
    shown = _MARK in answered
    answered = answered.replace(_MARK, "")
    if answered.startswith(prompt) and (shown or not reasoning):
        return answered[len(prompt) :]

    opening = reasoning_format.partition("{reasoning}")[0] if reasoning_format else ""
    opened = opening if opening and prompt.endswith(opening) else ""
    context = prompt.removesuffix(opened)
    if shown or not answered.startswith(context):
        return None
    visible = answered[len(context) :]
    stub = _EMPTY_REASONING.match(visible)
    if reasoning_format:
        visible = visible[stub.end() :].lstrip("\n") if stub else visible
        return reasoning_format.replace("{reasoning}", reasoning).removeprefix(opened) + visible
    if stub:
        return visible[: stub.end("open")] + reasoning + visible[stub.start("close") :]
    raise ConversationError(
        f"message {index} (assistant): the chat template drops its reasoning and renders only {visible[:80]!r}, and "
        "how the model writes reasoning could not be detected; pass reasoning_format=…, for example "
        "'<think>\\n{reasoning}\\n</think>\\n\\n', or a chat_template=… that renders the reasoning of the last message"
    )


def _completion_alone(render, messages, index: int, prompt: str, trailer: str, reasoning_format) -> str | None:
    """The same, from the message rendered straight after the last user message, without the tool loop between them.

    gpt-oss needs this: as soon as a final answer exists, its template drops the reasoning before the tool calls,
    which inference did see while that answer was generated.
    """
    question = [m for m in messages[:index] if m["role"] == "user"][-1:]
    if not question:
        return None
    [closed, answered] = render([question, [*question, _marked(messages[index])]])
    [alone] = render([question], add_generation_prompt=True)
    if not (alone.startswith(closed) and prompt.endswith(alone[len(closed) :])):
        return None  # another generation prompt than the one in use
    return _completion(messages[index], index, alone, answered.removesuffix(trailer), reasoning_format)


def _mismatch(index: int, prompt: str, answered: str) -> ConversationError:
    answered = answered.replace(_MARK, "")
    same = len(os.path.commonprefix([prompt, answered]))
    return ConversationError(
        f"message {index} (assistant): the chat template renders it in a way that does not continue its own prompt: "
        f"the prompt goes on {prompt[same:][:80]!r} where the answer has {answered[same:][:80]!r}; "
        "pass template arguments (enable_thinking=…) or a chat_template=… with which both agree"
    )


def _end_turns(completions, targets, messages, tokenizer, render, end_of_turn: str | None) -> list[str]:
    """Cut each completion after its end-of-turn token, and add the token where the template writes none (GLM)."""
    specials = _special_tokens(tokenizer, len(tokenizer))
    stripped = [text.rstrip() for text in completions]
    ended = [short if short.endswith(specials) else text for short, text in zip(stripped, completions)]
    open_ends = [k for k, text in enumerate(ended) if not text.endswith(specials)]
    if not open_ends:
        return ended
    if end_of_turn is None:
        # Which token does the template write first after the message? The model ends its turn with that one.
        follow = [
            {"role": "tool" if messages[targets[k]].get("tool_calls") else "user", "content": _PROBE} for k in open_ends
        ]
        continued = render([[*messages[: targets[k] + 1], probe] for k, probe in zip(open_ends, follow)])
        reasoning = [messages[targets[k]].get(REASONING_FIELDS[0], "").strip() for k in open_ends]
        visible = [stripped[k].rpartition(text or "\n")[2] for k, text in zip(open_ends, reasoning)]
    for n, k in enumerate(open_ends):
        token = end_of_turn or _token_after(visible[n], continued[n], specials) or tokenizer.eos_token
        if not token:
            raise ConversationError(
                f"message {targets[k]} (assistant): the chat template writes no end-of-turn token after it and the "
                "tokenizer has no eos_token; pass end_of_turn=… (the token with which the model ends its turn)"
            )
        ended[k] += token
    return ended


def _token_after(visible: str, continued: str, specials: tuple[str, ...]) -> str | None:
    """The first control token between the end of a message and the probe that follows it."""
    tail = visible[-64:]
    probe = continued.rfind(_PROBE)
    start = continued.rfind(tail, 0, probe)
    gap = continued[start + len(tail) : probe] if tail and start >= 0 else ""
    return min((token for token in specials if token in gap), key=gap.index, default=None)


@functools.lru_cache(maxsize=8)
def _special_tokens(tokenizer, size: int) -> tuple[str, ...]:
    """Control tokens of a tokenizer (`size` is in the key because tokens can be added to it later)."""
    added = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
    return tuple(dict.fromkeys([*added, *tokenizer.all_special_tokens]))


def _check_tools(tools, prompt: str) -> None:
    """A template that knows no tools leaves them out without a word."""
    for tool in tools or ():
        name = tool.get("function", tool).get("name") if isinstance(tool, Mapping) else None
        if isinstance(name, str) and name not in prompt:
            raise ConversationError(
                f"the chat template does not render the tool {name!r}; leave tools out, or pass a chat_template=… that "
                "supports them (--chat_template_path on the command line)"
            )


def _check_rendered(message: dict, index: int, completion: str) -> None:
    """Nothing of a target may be lost in rendering."""
    if message.get("content", "").strip() not in completion:
        raise ConversationError(
            f"message {index} (assistant): the chat template does not render its content as it is; "
            f"content starts {message['content'][:60]!r}, rendered as {completion[:80]!r}"
        )
    for call in message.get("tool_calls", ()):
        name = call.get("function", call).get("name") if isinstance(call, Mapping) else None
        if not isinstance(name, str):
            raise ConversationError(
                f"message {index} (assistant): tool_calls has {call!r}, expected a function with a name"
            )
        reasoning = message.get(REASONING_FIELDS[0], "").strip()
        if name not in (completion.replace(reasoning, "", 1) if reasoning else completion):
            raise ConversationError(
                f"message {index} (assistant): the chat template does not render its call of the tool {name!r}; "
                "pass a chat_template=… that supports tools (--chat_template_path on the command line)"
            )


def _tokenize(tokenizer, prompts: list[str], completions: list[str], weights: list[float]) -> list[Pass]:
    anchor = _anchor(tokenizer, len(tokenizer))
    texts = prompts + [anchor + text for text in completions]
    ids = tokenizer(texts, add_special_tokens=False, return_attention_mask=False, verbose=False)["input_ids"]
    skip = len(tokenizer(anchor, add_special_tokens=False)["input_ids"]) if anchor else 0
    passes = []
    for prompt, completion, weight in zip(ids[: len(prompts)], ids[len(prompts) :], weights):
        completion = completion[skip:]
        loss_mask = np.zeros(len(prompt) + len(completion), bool)
        loss_mask[len(prompt) :] = True
        passes.append(Pass(np.array(prompt + completion, np.int64), loss_mask, weight))
    return passes


@functools.lru_cache(maxsize=8)
def _anchor(tokenizer, size: int) -> str:
    """Text to put before a completion while it is tokenised, for tokenizers that write a space before the first word.

    SentencePiece tokenizers do (Llama 2, Phi-3); a model that continues a prompt does not.
    """

    def encode(text):
        return tokenizer(text, add_special_tokens=False)["input_ids"]

    eos = tokenizer.eos_token
    return eos if eos and encode(eos + "a") != encode(eos) + encode("a") else ""

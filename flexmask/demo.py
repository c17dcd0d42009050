"""What examples need and no network gives: conversations, a tokenizer and a model, all made on the spot.

The conversations are stock-taking stories. The user reports changes and asks a question; the assistant works through
the changes and answers with one number, which depends on all turns before. Users speak in fixed patterns, so that a
conversation can be solved again from its text alone.
"""

from __future__ import annotations

import operator
import random
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from .integrations.transformers import NAME

# ChatML in the manner of Qwen3: only messages after the last user message keep their reasoning.
CHAT_TEMPLATE = """\
{%- if tools %}
    {{- '<|im_start|>tools\\n' }}
    {%- for tool in tools %}
        {{- tool | tojson + '\\n' }}
    {%- endfor %}
    {{- '<|im_end|>\\n' }}
{%- endif %}
{%- set last = namespace(user=-1) %}
{%- for message in messages %}
    {%- if message.role == 'user' %}
        {%- set last.user = loop.index0 %}
    {%- endif %}
{%- endfor %}
{%- for message in messages %}
    {{- '<|im_start|>' + message.role + '\\n' }}
    {%- if message.role == 'assistant' and message.reasoning_content and loop.index0 > last.user %}
        {{- '<think>\\n' + message.reasoning_content.strip('\\n') + '\\n</think>\\n\\n' }}
    {%- endif %}
    {{- message.content }}
    {%- for call in message.tool_calls or [] %}
        {{- '<tool_call>\\n' + call.function | tojson + '\\n</tool_call>\\n' }}
    {%- endfor %}
    {{- '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""
SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
REASONING_TOKENS = ("<think>", "</think>")

_KEEPERS = ("Ada", "Boris", "Chen", "Dalia", "Emeka", "Freya", "Goran", "Hana", "Ivo", "Jun", "Kofi", "Lena")
_PLACES = {
    "farm shop": ("apples", "pears", "plums", "quinces"),
    "bakery": ("rolls", "loaves", "buns", "tarts"),
    "paper shop": ("pens", "rulers", "pads", "folders"),
    "bicycle workshop": ("tyres", "tubes", "chains", "bells"),
    "flower stall": ("roses", "tulips", "lilies", "irises"),
}
_OPENINGS = (
    "{who} runs a {place} and starts with {stock}.",
    "In the {place} of {who} there are {stock} this morning.",
    "Keep the books of {who}, please, whose {place} opens with {stock}.",
)
# Pattern of a sentence -> its working: {had} is the stock of {item} before, {last} the result of the step before.
_CHANGES = {
    "A delivery brings {a} more {item}.": ("{had} + {a}",),
    "Then {a} {item} come in.": ("{had} + {a}",),
    "Customers buy {a} {item}.": ("{had} - {a}",),
    "Sadly {a} {item} have to be thrown away.": ("{had} - {a}",),
    "A van unloads {a} boxes of {b} {item}.": ("{a} * {b}", "{had} + {last}"),
    "There arrive {a} crates with {b} {item} each.": ("{a} * {b}", "{had} + {last}"),
    "Next {a} customers take {b} {item} each.": ("{a} * {b}", "{had} - {last}"),
    "The post collects {a} orders of {b} {item}.": ("{a} * {b}", "{had} - {last}"),
    "As many {item} again turn up in the cellar.": ("{had} * 2",),
}
_QUESTIONS = {
    "How many {item} are there now?": (),
    "How many {item} and {other} are there together?": ("{had} + {had_other}",),
    "How many more {item} than {other} are left?": ("{had} - {had_other}",),
    "With {a} {item} set aside, how many can be sold?": ("{had} - {a}",),
    "At {a} coins apiece, what are all the {item} worth?": ("{had} * {a}",),
}
_STARTS = ("Let me work through this.", "I go step by step.", "First the stock, then the question.", "Let us see.")
_ANSWERS = ("The answer is {answer}.", "That makes {answer}.", "It comes to {answer}.", "{answer} in all.")
_FIELDS = {
    "who": r"[A-Z]\w+",
    "place": r"[a-z ]+",
    "stock": r"\d.+",
    "item": r"[a-z]+",
    "other": r"[a-z]+",
    "a": r"\d+",
    "b": r"\d+",
}
_OPERATORS = {"+": operator.add, "-": operator.sub, "*": operator.mul}


def conversations(n: int, seed: int = 0, turns: tuple[int, int] = (2, 5)) -> list[dict]:
    """Generate conversations with worked reasoning, the same ones for the same arguments.

    Args:
        n: how many.
        seed: of the random choices. The first conversations of a seed do not depend on `n`.
        turns: fewest and most turns of a conversation.

    Returns:
        Dicts with `messages` (the assistant's with `reasoning_content`) and `answers`, one int per assistant message.

    Raises:
        ValueError: `turns` is not a range that begins at 1 or later.
    """
    if not 1 <= turns[0] <= turns[1]:
        raise ValueError(f"turns is {turns}, expected (fewest, most) with 1 <= fewest <= most")
    rng = random.Random(seed)
    return [_conversation(rng, rng.randint(*turns)) for _ in range(n)]


def check(conversation: Mapping) -> bool:
    """Solve a conversation again from what its users say: are reasoning, contents and answers right?"""
    messages = conversation["messages"]
    questions = [m["content"] for m in messages if m["role"] == "user"]
    replies = [m for m in messages if m["role"] == "assistant"]
    try:
        return all(
            answer == given == answer_of(reply["content"]) and reply.get("reasoning_content", "").endswith(working)
            for (working, answer), given, reply in zip(_solve(questions), conversation["answers"], replies, strict=True)
        )
    except ValueError:  # a turn without answer, or a sentence in none of the patterns
        return False


def answer_of(content: str) -> int | None:
    """The number with which a response answers: its last one."""
    numbers = re.findall(r"\d+", content)
    return int(numbers[-1]) if numbers else None


def texts(conversations: Iterable[Mapping]) -> Iterator[str]:
    """All contents and reasoning, to train a tokenizer on."""
    for conversation in conversations:
        for message in conversation["messages"]:
            yield message["content"]
            if "reasoning_content" in message:
                yield message["reasoning_content"]


def train_tokenizer(
    texts: Iterable[str],
    vocab_size: int = 1024,
    special_tokens: Sequence[str] = SPECIAL_TOKENS,
    chat_template: str = CHAT_TEMPLATE,
) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer, the same one for the same texts. Digits are tokens of their own.

    Args:
        texts: what to train on.
        vocab_size: tokens in all, at most.
        special_tokens: control tokens; <|im_end|> ends a turn and <|endoftext|> pads. <think> and </think> are
            added as ordinary tokens.
        chat_template: Jinja source.

    Raises:
        ValueError: `vocab_size` has no room for the 256 bytes and these tokens, or an ending or padding token lacks.
    """
    missing = {"<|im_end|>", "<|endoftext|>"} - set(special_tokens)
    if missing:
        raise ValueError(f"special_tokens lacks {sorted(missing)}, which end a turn and pad")
    fewest = 256 + len(special_tokens) + len(REASONING_TOKENS)
    if vocab_size < fewest:
        raise ValueError(f"vocab_size is {vocab_size}, expected at least {fewest}: all bytes and the added tokens")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - len(REASONING_TOKENS),
        special_tokens=list(special_tokens),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.add_tokens([AddedToken(token, special=False, normalized=False) for token in REASONING_TOKENS])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        chat_template=chat_template,
        clean_up_tokenization_spaces=False,
    )


def tiny_model(tokenizer, seed: int = 0) -> Qwen3ForCausalLM:
    """A Qwen3 of about a million random weights in float32, with tree attention; torch's random state is left alone."""
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=8192,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Qwen3ForCausalLM._from_config(config, attn_implementation=NAME, dtype=torch.float32)


def _conversation(rng: random.Random, turns: int) -> dict:
    place, items = rng.choice(list(_PLACES.items()))
    stock = {item: rng.randint(20, 90) for item in rng.sample(items, rng.randint(2, 3))}
    who = rng.choice(_KEEPERS)
    said = [rng.choice(_OPENINGS).format(who=who, place=place, stock=_listed(stock))]
    questions = []
    for _ in range(turns):
        said += [_say(rng, _CHANGES, stock, most=300) for _ in range(rng.randint(1, 3))]
        said.append(_say(rng, _QUESTIONS, stock, most=3000))
        questions.append(" ".join(said))
        said = []
    solved = _solve(questions)
    messages = []
    for question, (working, answer) in zip(questions, solved):
        messages += [
            {"role": "user", "content": question},
            {
                "role": "assistant",
                "reasoning_content": f"{rng.choice(_STARTS)}\n{working}",
                "content": rng.choice(_ANSWERS).format(answer=answer),
            },
        ]
    return {"messages": messages, "answers": [answer for _, answer in solved]}


def _say(rng: random.Random, patterns: Mapping, stock: dict[str, int], most: int) -> str:
    """A random sentence whose result is sensible, its change made to the stock."""
    while True:
        item, other = rng.sample(list(stock), 2)
        pattern = rng.choice(list(patterns))
        sentence = pattern.format(item=item, other=other, a=rng.randint(2, 25), b=rng.randint(2, 12))
        _, result = _work(*_read(sentence), stock)
        if 1 <= result <= most:
            if patterns is _CHANGES:
                stock[item] = result
            return sentence


def _solve(questions: Sequence[str]) -> list[tuple[str, int]]:
    """The working and the answer of each turn, from what the user says in all turns up to it.

    Raises:
        ValueError: a sentence fits none of the patterns, or speaks of an item that is not in stock.
    """
    stock: dict[str, int] = {}
    solved = []
    for question in questions:
        lines = [f"Before: {_listed(stock)}."] if stock else []
        answer = None
        for sentence in re.split(r"(?<=[.?]) ", question):
            pattern, said = _read(sentence)
            if pattern in _OPENINGS:
                stock = {item: int(count) for count, item in re.findall(r"(\d+) ([a-z]+)", said["stock"])}
                lines.append(f"At the start: {_listed(stock)}.")
                continue
            steps, result = _work(pattern, said, stock)
            lines.append(f'"{sentence}" {", ".join(steps) or result}.')
            if pattern in _CHANGES:
                stock[said["item"]] = result
                lines.append(f"Now: {_listed(stock)}.")
            else:
                answer = result
        if answer is None:
            raise ValueError(f"{question!r} asks nothing")
        solved.append(("\n".join([*lines, f"So the answer is {answer}."]), answer))
    return solved


def _read(sentence: str) -> tuple[str, dict[str, str]]:
    """The pattern of a sentence and what stands in its fields."""
    for pattern, expression in _EXPRESSIONS.items():
        if found := expression.fullmatch(sentence):
            return pattern, found.groupdict()
    raise ValueError(f"{sentence!r} fits none of the patterns")


def _work(pattern: str, said: Mapping[str, str], stock: Mapping[str, int]) -> tuple[list[str], int]:
    """The steps of a change or question, each an equation, and the last result (with no step: the stock)."""
    for name in ("item", "other"):
        if said.get(name, said["item"]) not in stock:
            raise ValueError(f"{said[name]} are not in stock")
    values = {**said, "had": stock[said["item"]], "had_other": stock.get(said.get("other"))}
    steps, last = [], values["had"]
    for step in (_CHANGES | _QUESTIONS)[pattern]:
        left, sign, right = step.format(**values, last=last).split()
        last = _OPERATORS[sign](int(left), int(right))
        steps.append(f"{left} {sign} {right} = {last}")
    return steps, last


def _listed(stock: Mapping[str, int]) -> str:
    return ", ".join(f"{count} {item}" for item, count in stock.items())


def _expression(pattern: str) -> re.Pattern:
    """A pattern as a regular expression that captures its fields."""
    fields = {name: f"(?P<{name}>{what})" for name, what in _FIELDS.items()}
    return re.compile(re.escape(pattern).replace(r"\{", "{").replace(r"\}", "}").format(**fields))


_EXPRESSIONS = {pattern: _expression(pattern) for pattern in (*_OPENINGS, *_CHANGES, *_QUESTIONS)}

"""The matrix of public chat templates, the proof that its oracle can fail, and parsers written by others."""

import functools
import importlib
import inspect
import itertools
import re
import sys
import types

import numpy as np
import pytest
from template_corpus import Unreachable, corpus, downloaded
from template_matrix import cells_of, check, families, sample, unthought
from template_oracle import GENERIC, Family, canonical, faults, plain_text
from template_shapes import SHAPES, function, user

from flexmask import ConversationError, render_passes

STEP = 7  # each family is asked for every seventh shape here, another seventh than the family before
PIECES = 4
KNOWN_WRONG_REFUSALS = {  # family -> how many cells of the whole matrix; docs/templates.md lists them
    "llama.cpp/Apriel-1.6-15b-Thinker-fixed": len(SHAPES),
}


@functools.cache
def templates() -> dict[str, str]:
    found, missing = corpus()
    for reason in missing:
        print("missing:", reason)
    return dict(found)


def template(name: str) -> str:
    if name not in templates():
        pytest.skip(f"{name}: {'; '.join(corpus()[1])}")
    return templates()[name]


@pytest.mark.parametrize("piece", range(PIECES))
def test_public_templates_are_rendered_right_or_refused(piece):
    """A seventh of the cells: all templates but TRL's `_training` twins (the same but for the marks of generation), each
    under every setting of its switch, every seventh shape. `python tests/template_matrix.py` runs all of them.
    """
    chosen = [(name, source) for name, source in templates().items() if not name.endswith("_training")]
    numbered = enumerate(chosen)
    cells = [
        cell
        for at, one in numbered
        if at % PIECES == piece
        for setting, family in enumerate(families([one]))
        for cell in cells_of(family, sample(at + 3 * setting, STEP))
    ]
    bad = [cell for cell in cells if cell.outcome in ("wrong", "traceback")]
    assert not bad, "\n".join(f"{c.family}, {c.shape}: {c.outcome}: {c.detail} {c.example or ''}" for c in bad)
    refused = [c for c in cells if c.outcome == "wrong refusal" and c.family not in KNOWN_WRONG_REFUSALS]
    assert not refused, "\n".join(f"{c.family}, {c.shape}: refused, could be rendered: {c.detail}" for c in refused)
    assert sum(cell.outcome == "right" for cell in cells) > len(cells) / 2
    if piece == 0 and corpus()[1]:
        pytest.skip(f"ran on {len(chosen)} templates only: {'; '.join(corpus()[1])}")


def passes_as_text(family: Family, shape: str, **options):
    """[(messages, index, tools, prompt, completion)]."""
    messages, tools = SHAPES[shape]
    if not family.takes_reasoning:
        messages = unthought(messages)
    made = render_passes(messages, family.tokenizer, tools=tools, **family.kwargs, **options)
    texts = []
    for index, p in zip([i for i, m in enumerate(messages) if m["role"] == "assistant"], made, strict=True):
        start = int(np.argmax(p.loss_mask))
        decoded = (family.tokenizer.decode(p.input_ids[:start]), family.tokenizer.decode(p.input_ids[start:]))
        texts.append((canonical(messages), index, tools, *decoded))
    return texts


FAULTY = [
    "trl/qwen3",
    "trl/qwen3_5_think",
    "trl/glm4moe",
    "trl/gptoss",
    "trl/nemotron_3_nano",
    "trl/llama3_1",
    "trl/gemma4_v5",
]
SHAPES_WITH_FAULTS = [
    "turns, mixed",
    "two calls, reasoning",
    "two calls in a message",
    "calls with content",
    "tool loop, reasoning",
]


def planted(family: Family, messages, index: int, completion: str):
    """(what is wrong, a completion in which it is)."""
    message = messages[index]
    reasoning, content = message.get("reasoning_content", "").strip(), plain_text(message).strip()
    end = family.ends["calls" if message.get("tool_calls") else "content"]
    yield "no end of turn", completion.removesuffix(end)
    yield "two ends of turn", completion + end
    yield "more after the end", completion + "\n"
    yield "the next header", completion + family.tail([user("Hm?")])
    other = next(
        (plain_text(m) for m in messages[:index] if plain_text(m) and plain_text(m) not in (content, reasoning)), None
    )
    if other:
        yield "another message's text", completion[:1] + other + completion[1:]
    for what, text in (("reasoning", reasoning), ("content", content)):
        if text and text in completion:
            yield f"{what} gone", completion.replace(text, "", 1)
            yield f"{what} cut", completion.replace(text, text[:-1], 1)
            yield f"{what} twice", completion.replace(text, f"{text} {text}", 1)
    if content and content in completion:
        yield "a space before the content", completion.replace(content, " " + content, 1)
        at = completion.index(content)
        if completion[:at].endswith("\n"):
            yield "a newline less before the content", completion[: at - 1] + completion[at:]
    for opening, closing in family.tags:
        if reasoning and closing in completion:
            yield "thought not closed", completion.replace(closing, "", 1)
        if reasoning and opening in completion:
            yield "thought not opened", completion.replace(opening, "", 1)
            yield "thought opened twice", completion.replace(opening, opening + opening, 1)
        if closing in completion and closing not in GENERIC:
            yield "thought closed twice", completion.replace(closing, closing + closing, 1)
        if not reasoning:
            yield "an empty thought", f"{opening}\n\n{closing}\n\n{completion}"
    calls = message.get("tool_calls", [])
    for made in calls:
        yield "another function", completion.replace(made["function"]["name"], "other")
        for value in made["function"]["arguments"].values():
            yield "an argument gone", completion.replace(str(value), "", 1)
    if len(calls) > 1:
        values = [next(iter(c["function"]["arguments"].values())) for c in calls]
        swapped = completion.replace(values[0], "\0").replace(values[1], values[0]).replace("\0", values[1])
        yield "arguments swapped", swapped


@pytest.mark.parametrize("name", FAULTY)
def test_faults_in_completions_are_found(name):
    """An oracle that cannot fail proves nothing."""
    family, missed, kinds = Family(name, template(name)), [], set()
    for shape in SHAPES_WITH_FAULTS:
        if cells_of(family, [shape])[0].outcome == "refused":
            continue  # Llama 3 knows no two calls, Gemma 4 has the content after the calls' answers
        for messages, index, tools, prompt, completion in passes_as_text(family, shape):
            assert not faults(family, messages, index, tools, prompt, completion)
            for what, wrong in planted(family, messages, index, completion):
                kinds.add(what)
                if wrong != completion and not faults(family, messages, index, tools, prompt, wrong):
                    missed.append((what, shape, index, wrong))
    assert not missed, missed
    assert len(kinds) >= 10


@pytest.mark.parametrize("name", FAULTY)
def test_faults_in_prompts_are_found(name):
    family = Family(name, template(name))
    for messages, index, tools, prompt, completion in passes_as_text(family, "turns, none"):
        wrong = [prompt + "\n", prompt[:-1], prompt.replace("Which river runs through Porto?", "")]
        wrong.append(prompt.removesuffix(family.tail_of(prompt, messages[:index])))
        if index > 1:
            wrong.append(family.rendered(messages[: index - 1], generate=True))
            wrong.append(prompt.replace("The Douro does.", "Porto lies at a river mouth.The Douro does."))
        for text in wrong:
            assert faults(family, messages, index, tools, text, completion), text


def test_an_oracle_that_is_asked_for_no_empty_thoughts_finds_them():
    """And `empty_reasoning="keep"` is right only if it was asked for."""
    family = Family("trl/qwen3", template("trl/qwen3"))
    kept = passes_as_text(family, "turns, none", empty_reasoning="keep")
    for messages, index, tools, prompt, completion in kept:
        assert completion.startswith("<think>\n\n</think>\n\n")
        assert not faults(family, messages, index, tools, prompt, completion, "keep")
        assert any("empty thought" in f for f in faults(family, messages, index, tools, prompt, completion, "prompt"))


def test_the_rendering_of_the_oracle_is_the_tokenizers():
    family = Family("trl/qwen3", template("trl/qwen3"))
    messages, tools = SHAPES["tool loop, mixed"]
    [first, *_] = render_passes(messages, family.tokenizer, tools=tools)
    ids = family.tokenizer.apply_chat_template(messages[:1], tools=tools, add_generation_prompt=True)["input_ids"]
    assert first.input_ids[: len(ids)].tolist() == ids
    assert not first.loss_mask[: len(ids)].any() and first.loss_mask[len(ids) :].all()


@pytest.mark.parametrize("name", ["trl/qwen3", "trl/glm4moe", "trl/gptoss"])
def test_records_of_agents_logs(name):
    """Made-up records in the forms of agents' logs: null contents, arguments as text; several assistant messages in a row; a
    text beside a later call."""
    from flexmask.messages import read_conversation

    def asked(ident, name, arguments):
        return {"id": ident, "type": "function", "function": {"name": name, "arguments": arguments}}

    plain = [
        {"role": "system", "content": "# Policy\n\n- Ask before you book.\n"},
        {"role": "user", "content": "Book HAT012 for me, Ana Sá."},
        {
            "role": "assistant",
            "content": None,
            "tool_calls": [asked("call_K3f", "find_user", '{"name": "Ana Sá", "strict": true}')],
        },
        {
            "role": "tool",
            "tool_call_id": "call_K3f",
            "name": "find_user",
            "content": '{"id": "ana_sa_77", "cards": [{"last": "1234"}]}',
        },
        {
            "role": "assistant",
            "content": "Shall I use the card that ends in 1234?",
            "tool_calls": None,
            "function_call": None,
        },
        {"role": "user", "content": "yes"},
        {"role": "assistant", "content": "Booked, have a good flight!"},
    ]
    reasoned = [
        {"role": "user", "content": "Where is order 41?"},
        {
            "role": "assistant",
            "content": "",
            "reasoning_content": "I need its status first.",
            "tool_calls": [asked("fc_1", "order_status", '{"number":41}')],
        },
        {"role": "tool", "tool_call_id": "fc_1", "name": "order_status", "content": "shipped"},
        {"role": "assistant", "content": "It was shipped.", "reasoning_content": "The status says shipped."},
        {"role": "assistant", "content": "Anything else?"},
        {"role": "user", "content": "No."},
        {"role": "assistant", "content": "Goodbye then.", "reasoning_content": "Nothing is left to do."},
    ]
    beside = [
        *plain[:4],
        {
            "role": "assistant",
            "content": "There are two of that name, I look again.",
            "tool_calls": [asked("call_K3g", "find_user", '{"name": "Ana Sá", "strict": false}')],
        },
        {"role": "tool", "tool_call_id": "call_K3g", "name": "find_user", "content": "[]"},
        *plain[4:],
    ]
    functions = [
        function("find_user", "Finds a user.", name={"type": "string"}, strict={"type": "boolean"}),
        function("order_status", "Says where an order is.", number={"type": "integer"}),
    ]
    family = Family(name, template(name))
    for record in ({"messages": plain}, {"messages": beside}, {"messages": reasoned, "tools": functions}):
        read = read_conversation(record, "log:1")
        cell = check(family, "a log", read["messages"], read.get("tools"))
        assert cell.outcome == "right", cell


def test_a_log_of_which_the_template_leaves_out_a_part():
    """DeepSeek-V3: the tools, a text beside a later call, and how a thought is written behind a tool's answer."""
    family = Family("trl/deepseekv3", template("trl/deepseekv3"))

    def asked(content, reasoning, number):
        call = {"type": "function", "function": {"name": "order_status", "arguments": f'{{"number": {number}}}'}}
        message = {"role": "assistant", "content": content, "reasoning_content": reasoning, "tool_calls": [call]}
        return message, {"role": "tool", "name": "order_status", "content": "shipped"}

    def written(content, number):
        return (
            f"{content}<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>order_status\n```json\n"
            f'{{"number": {number}}}\n```<｜tool▁call▁end｜><｜tool▁calls▁end｜><｜end▁of▁sentence｜>'
        )

    messages = [
        user("Where are my two orders?"),
        *asked("I look.", "One after the other.", 41),
        *asked("Now the other.", "The second.", 42),
        {"role": "assistant", "content": "Both were shipped.", "reasoning_content": "Good."},
    ]
    tools = [function("order_status", "Says where an order is.", number={"type": "integer"})]
    options = {"reasoning_format": "<think>\n{reasoning}\n</think>\n\n", "unwritten_tools": "drop"}
    passes, tok = render_passes(messages, family.tokenizer, tools=tools, **options), family.tokenizer
    expected = [
        "One after the other.\n</think>\n\n" + written("I look.", 41),
        "<think>\nThe second.\n</think>\n\n" + written("Now the other.", 42),
        "<think>\nGood.\n</think>\n\nBoth were shipped.<｜end▁of▁sentence｜>",
    ]
    for made, index, completion in zip(passes, (1, 3, 5), expected, strict=True):
        context = tok.apply_chat_template(messages[:index], tools=tools, add_generation_prompt=True)["input_ids"]
        assert made.input_ids[: len(context)].tolist() == context
        assert tok.decode(made.input_ids[len(context) :]) == completion
        assert made.loss_mask.tolist() == [False] * len(context) + [True] * (len(made.input_ids) - len(context))
    without = {key: value for key, value in options.items() if key != "reasoning_format"}
    with pytest.raises(
        ConversationError, match=r"message 3 \(assistant\): .*drops its reasoning.*pass reasoning_format=…"
    ):
        render_passes(messages, tok, tools=tools, **without)
    with pytest.raises(
        ConversationError, match=r"the tool 'order_status'; leave tools out \(or pass unwritten_tools='drop'\)"
    ):
        render_passes(messages, tok, tools=tools, reasoning_format=options["reasoning_format"])


# ------------------------------------------------------------------------------------- parsers written by others

_THINK = {
    "think_id": "<think>",
    "think_end_id": "</think>",
    "reasoning_end_id": "</think>",
    "think_start_id": "<think>",
}
_CALLS = {"tool_call_id": "<tool_call>", "tool_call_end_id": "</tool_call>"}
_ARGUMENTS = {f"arg_{x}_{y}id": f"<{'/' if y else ''}arg_{x}>" for x in ("key", "value") for y in ("", "end_")}
_DEEPSEEK = {f"tool_{x}_{y}_id": f"<｜tool▁{x}▁{y}｜>" for x in ("calls", "call") for y in ("begin", "end")}
_KIMI = {
    **{f"tool_calls_section_{y}_id": f"<|tool_calls_section_{y}|>" for y in ("begin", "end")},
    **{f"tool_call_{y}_id": f"<|tool_call_{y}|>" for y in ("begin", "argument_begin", "end")},
}
_HARMONY = {f"{x}_id": f"<|{x}|>" for x in ("return", "call", "start", "end", "channel", "message")} | {
    "constrain_id": "<|return|>"
}
# (the parser of the package `renderers`, patterns of the templates' names, its tokens)
PARSERS = [
    ("parse_qwen3", r"trl/qwen3$|trl/qwen3_instruct_2507$|trl/qwen2_5$|Qwen3-0.6B|MiMo-VL", _THINK | _CALLS),
    (
        "parse_qwen35",
        r"trl/qwen3_5_(no)?think$|trl/qwen3_6$|trl/qwen3_8$|trl/nemotron_3_(nano|super|ultra)$",
        _THINK | _CALLS,
    ),
    ("parse_glm", r"trl/glm4moe$|GLM-4.6|GLM-4.7", _THINK | _CALLS | _ARGUMENTS),
    ("parse_deepseek_v3", r"trl/deepseekv3$|trl/deepseek_r1_distill$", _DEEPSEEK | {"tool_sep_id": "<｜tool▁sep｜>"}),
    ("parse_deepseek_v4", r"DeepSeek-V4", _THINK),
    (
        "parse_minimax",
        r"MiniMax-M2",
        _THINK | {"tool_call_id": "<minimax:tool_call>", "tool_call_end_id": "</minimax:tool_call>"},
    ),
    ("parse_kimi_k2", r"Kimi-K2", _KIMI),
    ("parse_gpt_oss", r"trl/gptoss$", _HARMONY),
    ("parse_llama_3", r"trl/llama3(_1|_2)?$", {}),
    ("parse_laguna_xs2", r"Laguna", _THINK | _CALLS),
]


@functools.cache
def renderers_parsing():
    """The module `renderers.parsing`, without the package's `__init__` and what that imports."""
    try:
        folder = downloaded("renderers")
    except Unreachable as error:
        pytest.skip(str(error))
    package = types.ModuleType("renderers")
    package.__path__ = [str(folder)]
    sys.modules.setdefault("renderers", package)
    return importlib.import_module("renderers.parsing")


def same(parsed, given) -> bool:
    return parsed == given or str(parsed) == str(given)


@pytest.mark.parametrize("parser, pattern, tokens", PARSERS, ids=[p[0] for p in PARSERS])
def test_what_is_trained_is_parsed_back(parser, pattern, tokens):
    """Prime Intellect's parsers, which stand behind served models, give back reasoning, content and calls of our targets."""
    parse = getattr(renderers_parsing(), parser)
    names = [name for name in templates() if re.search(pattern, name)]
    if not names:
        pytest.skip("; ".join(corpus()[1]))
    begun = "<|start|>assistant" if parser == "parse_gpt_oss" else ""  # of the prompt
    parsed_passes = 0
    every = itertools.chain.from_iterable(families([(name, templates()[name])]) for name in names)
    for at, family in enumerate(every):
        for shape in sample(at, 3):
            tools = SHAPES[shape][1]
            if "first" in shape or "untrained" in shape or cells_of(family, [shape])[0].outcome != "right":
                continue
            for prepared, index, _, prompt, completion in passes_as_text(family, shape):
                message, tok = prepared[index], family.tokenizer
                ids = tok(begun + completion, add_special_tokens=False)["input_ids"]
                known = {name: tok.convert_tokens_to_ids(token) for name, token in tokens.items()}
                stops = {tok.convert_tokens_to_ids(end) for end in (*family.ends.values(), tok.eos_token)}
                prefilled = family.state(family.tail_of(prompt, prepared[:index])) == "open"
                given = known | {"stop_ids": stops, "tools": tools, "prefilled_thinking": prefilled}
                given |= {"thinking_enabled": prefilled} if parser == "parse_deepseek_v4" else {}
                taken = inspect.signature(parse).parameters
                found = parse(tok, ids, **{k: v for k, v in given.items() if k in taken})
                where = f"{family.label}, {shape}, message {index}: {completion!r} -> {found}"
                if begun and message.get("tool_calls") and plain_text(message):  # a thought to gpt-oss
                    message = message | {"content": "", "reasoning_content": plain_text(message)}
                assert (found.content or "").strip() == plain_text(message).strip(), where
                assert (found.reasoning_content or "").strip() == message.get("reasoning_content", "").strip(), where
                calls = [(c["function"]["name"], c["function"]["arguments"]) for c in message.get("tool_calls", [])]
                assert [c.name for c in found.tool_calls] == [name for name, _ in calls], where
                for one, (_, arguments) in zip(found.tool_calls, calls, strict=True):
                    assert one.arguments.keys() == arguments.keys(), where
                    assert all(same(one.arguments[k], v) for k, v in arguments.items()), where
                parsed_passes += 1
    assert parsed_passes > 8

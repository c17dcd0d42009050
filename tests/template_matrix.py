"""Public chat templates against shapes of conversations.

python tests/template_matrix.py                        # the whole matrix; writes docs/templates.md
python tests/template_matrix.py --template my.jinja    # a template of your own
python tests/template_matrix.py --tokenizer org/name   # a tokenizer with its template
"""

from __future__ import annotations

import argparse
import copy
import itertools
import multiprocessing
import re
import sys
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import trl
from template_corpus import corpus
from template_oracle import Family, canonical, faults, legitimate
from template_shapes import SHAPES, user
from transformers import AutoTokenizer

from flexmask import ConversationError, render_passes


@dataclass
class Cell:
    family: str
    shape: str
    outcome: str  # right, refused, wrong refusal, wrong, traceback
    detail: str = ""
    example: tuple[str, str] | None = None  # the end of the prompt, and the completion


@dataclass
class Judged:
    """A refusal that was looked at by hand: patterns of the family's and of the shape's name, and why it is right."""

    family: str
    shape: str
    why: str


_ORDER = "the content of a message with calls comes after the tools' answers once there are any"
_INSIDE = "what ends a turn stands inside the message too, so what stops the model is not known from the template"
_ROW = "an assistant's message after another one has no generation prompt of its own, or none in history"
JUDGED = [
    Judged(r"gemma-?4|diffusion_gemma", r"calls? with content|tool's name", _ORDER),
    Judged(r"gemma-?4|diffusion_gemma|DeepSeek-V3|Nemotron-Nano-v2|Hy3", r"in a row", _ROW),
    Judged(r"Solar-Open|GigaChat3-10B", r".", _INSIDE),
    Judged(r"Nemotron-Nano-v2", r"calls? with content|tool's name", _INSIDE),
    Judged(r"(?i)deepseek[-_]?v3", r"tools not given", "a thought behind a tool's answer is never shown"),
    Judged(r"R1-Distill-Qwen", r"tools not given", "a second call is written without what begins the first"),
    Judged(r"command-r-plus", r"argument", "its generation prompt holds an instruction that history has not"),
]


def unthought(messages: list[dict]) -> list[dict]:
    return [{k: v for k, v in m.items() if k != "reasoning_content"} for m in messages]


def check(family: Family, shape: str, messages, tools, **options) -> Cell:
    """One cell of the matrix."""
    given = copy.deepcopy(messages)
    try:
        passes = render_passes(given, family.tokenizer, tools=tools, **family.kwargs, **options)
    except ConversationError as error:
        text = str(error)
        if "\n" in text.strip():
            return Cell(family.label, shape, "wrong", f"refusal: of several lines: {text!r}")
        why = legitimate(family, messages, tools)
        judged = next((j.why for j in JUDGED if re.search(j.family, family.label) and re.search(j.shape, shape)), None)
        if why or judged:
            return Cell(family.label, shape, "refused", f"{why or judged} | {text}")
        return Cell(family.label, shape, "wrong refusal", text)
    except Exception as error:  # what this is there to find
        return Cell(family.label, shape, "traceback", f"{type(error).__name__}: {str(error)[:200]}")
    if given != messages:
        return Cell(family.label, shape, "wrong", "the messages given were changed")
    trained = [i for i, m in enumerate(messages) if m["role"] == "assistant" and m.get("train") is not False]
    if len(passes) != len(trained):
        return Cell(family.label, shape, "wrong", f"passes: {len(passes)}, expected {len(trained)}")
    prepared, tok = canonical(messages), family.tokenizer
    for index, made in zip(trained, passes, strict=True):
        start = int(np.argmax(made.loss_mask))
        ids, mask = np.asarray(made.input_ids), np.asarray(made.loss_mask)
        prompt, completion = tok.decode(ids[:start]), tok.decode(ids[start:])
        found = []
        if mask[:start].any() or not mask[start:].all():
            found.append("mask: not the prompt, then the completion")
        for what, part, text in (("prompt", ids[:start], prompt), ("completion", ids[start:], completion)):
            if part.tolist() != tok(text, add_special_tokens=False)["input_ids"]:
                found.append(f"tokens: of the {what} are not those of its text")
        found += faults(family, prepared, index, tools, prompt, completion, options.get("empty_reasoning", "prompt"))
        if found:
            return Cell(family.label, shape, "wrong", f"message {index}: {found[0]}", (prompt[-100:], completion))
    return Cell(family.label, shape, "right")


def families(templates) -> Iterator[Family]:
    """Each template as it is, and with its switch on where it is off."""
    for name, source in templates:
        family = Family(name, source)
        yield family
        if family.switch:
            probe = [user("Hm?")]
            usual = family.tail(probe)
            for value in (True, False):
                if family.tail(probe, **{family.switch: value}) != usual:
                    yield Family(name, source, family.tokenizer, **{family.switch: value})


def cells_of(family: Family, shapes) -> list[Cell]:
    cells = []
    for shape in shapes:
        messages, tools = SHAPES[shape]
        if not family.takes_reasoning and shape != "one turn, reasoning":
            messages = unthought(messages)
        cells.append(check(family, shape, messages, tools))
    return cells


def sample(index: int, step: int) -> list[str]:
    """Every step-th shape, another beginning for each family."""
    return list(SHAPES)[index % step :: step]


def run_template(template: tuple[str, str]) -> tuple[list[Cell], dict]:
    """All cells of one template, and what it is asked about for the page."""
    of = list(families([template]))
    facts = {"switch": of[0].switch, "developer": of[0].developer, "parts": of[0].parts}
    return [cell for family in of for cell in cells_of(family, SHAPES)], facts


PAGE = Path(__file__).parent.parent / "docs" / "templates.md"
_INTRO = """# Chat templates

What a conversation becomes depends on the model's chat template, and templates differ in what they can do. Qwen3's, for
example, takes reasoning, tools and several calls in a message. The last answer of a conversation is trained as

```text
prompt      …<|im_start|>user\\nWhich river runs through Porto?<|im_end|>\\n<|im_start|>assistant\\n
completion  <think>\\nPorto lies at a river mouth.\\n</think>\\n\\nThe Douro does.<|im_end|>
```

and, where an answer has no reasoning, with the empty thought in the prompt, as the model sees it with thinking switched off:

```text
prompt      …<|im_start|>assistant\\n<think>\\n\\n</think>\\n\\n
completion  The Douro does.<|im_end|>
```

Gemma 2's knows neither reasoning nor tools nor a system message, and a conversation with any of them is refused, with a text
that says what to do.

## Your own template
From a clone, in its environment:

```bash
python tests/template_matrix.py --tokenizer org/name        # a tokenizer with its template
python tests/template_matrix.py --template template.jinja   # a template alone; its control tokens are guessed from its text
```

prints, for each of {shapes} shapes of conversations, whether it is rendered right, refused (and why), or wrong. *Right* means:
the prompt is, token for token, what the tokenizer's `apply_chat_template` gives for the messages before; the completion has
reasoning, content and calls once and in order, the thought opened and closed once, and the template's own end of turn; and
nothing else that the template does not write there. The checks share no code with the renderer. Of your own data, `flexmask
inspect data.jsonl --tokenizer org/name` shows what it becomes.
"""


def page(results: list[tuple[list[Cell], dict]], names: list[str], sources: str) -> str:
    cells = [cell for of, _ in results for cell in of]
    counts = Counter(cell.outcome for cell in cells)
    lines = [_INTRO.replace("{shapes}", str(len(SHAPES))).replace("\\\\n", "\\n")]
    wrong = counts["wrong"] + counts["traceback"]
    lines.append(f"""## The public templates
{len(names)} templates ({sources}), each as it is and, where it has a switch for thinking, with the switch the other way:
{len(cells):,} cells.

| right | refused, because the template cannot render the conversation | refused, though it could be rendered | wrong |
|---|---|---|---|
| {counts["right"]:,} | {counts["refused"]:,} | {counts["wrong refusal"]:,} | {wrong:,} |

Made by `python tests/template_matrix.py`, with a small tokenizer for each template that has the control tokens named in its
text; the models' own tokenizers were not used. Templates without a place for reasoning are asked for conversations without
it. *Switch* is the argument that turns thinking on or off. *Reasoning*: `on` where the switch must be on, `format` where
`reasoning_format=` must say how it is written. *Developer*: whether a developer message is taken as one, or handed over as a
system message. *Several*: several calls in a message.

| template | reasoning | switch | tools | calls | several | text beside calls | developer | late system | two answers in a row |
|---|---|---|---|---|---|---|---|---|---|""")
    for name, (of, facts) in zip(names, results, strict=True):
        right = {c.shape for c in of if c.family == name and c.outcome == "right"}
        anyhow = {c.shape for c in of if c.outcome == "right"}
        details = " ".join(c.detail for c in of if c.shape == "one turn, reasoning")
        reasoning = "yes" if "one turn, reasoning" in right else "on" if "one turn, reasoning" in anyhow else ""
        reasoning = reasoning or ("format" if "reasoning_format" in details else "no")

        def mark(*shapes, right=right):
            return "yes" if set(shapes) & right else "no"

        calls = (
            "tool loop, none",
            "tool loop, mixed",
            "tool loop, tools not given",
            "tool loop, none, tools not given",
        )
        row = [
            name,
            reasoning,
            f"`{facts['switch']}`" if facts["switch"] else "",
            mark("tools not called"),
            mark(*calls),
        ]
        row += [mark("two calls in a message", "two calls, reasoning"), mark("calls with content")]
        row += [facts["developer"] if "developer message" in right else "no", mark("late system message")]
        lines.append("| " + " | ".join([*row, mark("assistant messages in a row")]) + " |")
    lines.append("\n## What is refused\nBy the cause that the checks find, with the text of one refusal.\n")
    lines.append("| cells | because | for example | says |\n|---|---|---|---|")
    causes = defaultdict(list)
    for cell in cells:
        if cell.outcome == "refused":
            why, _, text = cell.detail.partition(" | ")
            why = re.sub(r"message \d+ \((\w+)\): .*", r"a message of the \1", why)
            why = re.sub(r"the tool \w+: '.*", "the tools", why)
            causes["the template raises an error" if why.startswith("raises") else why].append((cell, text))
    for why, of in sorted(causes.items(), key=lambda item: -len(item[1])):
        cell, text = of[0]
        lines.append(f"| {len(of)} | {why} | {cell.family}, *{cell.shape}* | {_escaped(text)} |")
    for outcome, title in (
        ("wrong refusal", "Refused although it could be rendered"),
        ("wrong", "Wrong"),
        ("traceback", "Wrong: errors"),
    ):
        of = [cell for cell in cells if cell.outcome == outcome]
        if of:
            lines.append(f"\n## {title}\n\n| template | shapes | what |\n|---|---|---|")
            for family, group in itertools.groupby(sorted(of, key=lambda c: c.family), key=lambda c: c.family):
                group = list(group)
                shapes = ", ".join(c.shape for c in group[:4]) + (f", … ({len(group)})" if len(group) > 4 else "")
                lines.append(f"| {family} | {shapes} | {_escaped(group[0].detail)} |")
    return "\n".join(lines) + "\n"


def _escaped(text: str) -> str:
    text = text if len(text) <= 300 else text[:299] + "…"
    return "`` " + text.replace("|", "\\|").replace("\n", " ") + " ``"


def report_one(family: Family) -> int:
    cells = cells_of(family, SHAPES)
    print(f"{family.label}: switch {family.switch or 'none'}, ends {sorted(set(family.ends.values()))}")
    for cell in cells:
        print(f"{cell.outcome:14} {cell.shape:36} {cell.detail}")
        if cell.example:
            print(f"{'':14} prompt …{cell.example[0]!r}\n{'':14} completion {cell.example[1]!r}")
    return sum(cell.outcome in ("wrong", "traceback") for cell in cells)


def main() -> int:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--template", help="a file with a chat template")
    options.add_argument("--tokenizer", help="a tokenizer on the hub or in a folder")
    chosen = options.parse_args()
    if chosen.tokenizer:
        tokenizer = AutoTokenizer.from_pretrained(chosen.tokenizer)
        source = tokenizer.chat_template
        if chosen.template:
            source = tokenizer.chat_template = Path(chosen.template).read_text(encoding="utf-8")
        return report_one(Family(chosen.tokenizer, source, tokenizer))
    if chosen.template:
        return report_one(Family(Path(chosen.template).stem, Path(chosen.template).read_text(encoding="utf-8")))
    templates, missing = corpus()
    for reason in missing:
        print("missing:", reason)
    with multiprocessing.Pool() as pool:
        results = pool.map(run_template, templates, chunksize=4)
    sources = {"trl": f"TRL {trl.__version__}", "llama.cpp": "llama-cpp-python 0.3.36", "axolotl": "axolotl 0.19.0"}
    used = Counter(name.split("/")[0] for name, _ in templates)
    text = page(
        results,
        [name for name, _ in templates],
        ", ".join(f"{used[k]} from {v}" for k, v in sources.items() if used[k]),
    )
    if missing:
        print("docs/templates.md stays as it is: templates are missing")
    else:
        PAGE.write_text(text, encoding="utf-8")
    cells = [cell for of, _ in results for cell in of]
    print(dict(Counter(cell.outcome for cell in cells)))
    for cell in cells:
        if cell.outcome in ("wrong", "traceback"):
            print(f"{cell.outcome}: {cell.family}, {cell.shape}: {cell.detail}")
    return int(any(cell.outcome in ("wrong", "traceback") for cell in cells))


if __name__ == "__main__":
    sys.exit(main())

"""Chat templates from TRL's wheel, each with a small tokenizer that has the control tokens of its family."""

import functools
from pathlib import Path

import trl
from template_corpus import byte_level_bpe
from tokenizers import AddedToken, Tokenizer
from transformers import PreTrainedTokenizerFast

CHATML = ("<|im_start|>", "<|im_end|>", "<|endoftext|>")
THINK = ("<think>", "</think>")
TOOL = ("<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>")

# template: (special tokens, added tokens that are not special, eos, bos)
FAMILIES = {
    "qwen3": (CHATML, THINK + TOOL, "<|im_end|>", None),
    "qwen3_5_think": (CHATML, THINK + TOOL, "<|im_end|>", None),
    "qwen2_5": (CHATML, TOOL, "<|im_end|>", None),
    "glm4moe": (
        ("<|endoftext|>", "[gMASK]", "<sop>", "<|system|>", "<|user|>", "<|assistant|>", "<|observation|>"),
        THINK + TOOL,
        "<|endoftext|>",
        None,
    ),
    "gptoss": (
        ("<|start|>", "<|end|>", "<|message|>", "<|channel|>", "<|return|>", "<|call|>"),
        (),
        "<|return|>",
        None,
    ),
    "deepseek_r1_distill": (
        ("<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"),
        ("<｜User｜>", "<｜Assistant｜>", *THINK),
        "<｜end▁of▁sentence｜>",
        "<｜begin▁of▁sentence｜>",
    ),
    "nemotron_3_nano": (CHATML, THINK + TOOL, "<|im_end|>", None),
    "llama3": (
        ("<|begin_of_text|>", "<|eot_id|>", "<|start_header_id|>", "<|end_header_id|>"),
        (),
        "<|eot_id|>",
        "<|begin_of_text|>",
    ),
    "phi3": (("<|endoftext|>", "<|end|>", "<|user|>", "<|assistant|>", "<|system|>"), (), "<|endoftext|>", None),
}


@functools.cache
def tokenizer(family: str) -> PreTrainedTokenizerFast:
    special, added, eos, bos = FAMILIES[family]
    bpe = Tokenizer.from_str(byte_level_bpe())
    bpe.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in special])
    bpe.add_tokens([AddedToken(t, normalized=False) for t in added])
    made = PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token=eos, bos_token=bos)
    made.chat_template = (Path(trl.__file__).parent / "chat_templates" / f"{family}.jinja").read_text()
    return made


TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "add",
            "description": "Add two numbers.",
            "parameters": {"type": "object", "properties": {"a": {"type": "number"}, "b": {"type": "number"}}},
        },
    }
]


def user(text):
    return {"role": "user", "content": text}


def answer(text, reasoning=None, **keys):
    return {"role": "assistant", "content": text} | ({"reasoning_content": reasoning} if reasoning else {}) | keys


def call(a, b, reasoning=None):
    function = {"name": "add", "arguments": {"a": a, "b": b}}
    return answer("", reasoning, tool_calls=[{"type": "function", "function": function}])


CHAT = [
    {"role": "system", "content": "Be brief."},
    user("First question?"),
    answer("Answer one.", "Thinking of one."),
    user("Second question?"),
    answer("Answer two.", "Thinking of two, at length."),
    user("Third question?"),
    answer("Answer three.", "Thinking of three."),
]
PLAIN = [m if m["role"] != "assistant" else answer(m["content"]) for m in CHAT]
TOOL_LOOP = [
    user("What is 1 + 2 + 3?"),
    call(1, 2, "First 1 + 2."),
    {"role": "tool", "content": "3"},
    call(3, 3, "Then 3 + 3."),
    {"role": "tool", "content": "6"},
    answer("It is 6.", "The tool says 6."),
    user("And 10 more?"),
    answer("That is 16.", "6 + 10 = 16."),
]

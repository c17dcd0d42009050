"""Public chat templates, each with a small tokenizer that has the control tokens its text names.

They are those of the wheels of TRL and axolotl and of the source of llama-cpp-python. None of them is copied into this
repository: what the environment has not got is downloaded from PyPI once, and kept in the user's cache.
"""

from __future__ import annotations

import functools
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path

import jinja2
import trl
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

CACHE = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "flexmask-tests"
# what -> (its pip requirement, in what form, the folder inside, how its files' names end)
DOWNLOADS = {
    "llama.cpp": ("llama-cpp-python==0.3.36", "--no-binary", "vendor/llama.cpp/models/templates/", ".jinja"),
    "axolotl": ("axolotl==0.19.0", "--only-binary", "axolotl/utils/chat_templates/templates/", ".jinja"),
    "renderers": ("renderers==0.1.12", "--only-binary", "renderers/", ".py"),
}


class Unreachable(RuntimeError):
    """PyPI did not give what is not in the environment."""


_failed: dict[str, str] = {}  # what is not reachable is not asked for again


def downloaded(name: str) -> Path:
    """The folder with the files of one distribution, downloaded at the first call."""
    requirement, form, inside, suffix = DOWNLOADS[name]
    folder = CACHE / requirement / Path(inside).name
    if folder.exists():
        return folder
    if name in _failed:
        raise Unreachable(_failed[name])
    with tempfile.TemporaryDirectory() as scratch:
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--quiet", "--retries", "1", "-d", scratch]
        command += [form, requirement.split("==")[0], requirement]
        try:
            subprocess.run(command, check=True, capture_output=True, text=True, timeout=300)
        except (
            subprocess.SubprocessError,
            OSError,
        ) as error:  # pip's own trouble with reading metadata does not matter
            if not any(Path(scratch).iterdir()):
                reason = (getattr(error, "stderr", "") or str(error)).strip().splitlines()
                _failed[name] = f"pip download {requirement} failed: {reason[-1] if reason else error}"
                raise Unreachable(_failed[name]) from error
        [archive] = Path(scratch).iterdir()
        folder.parent.mkdir(parents=True, exist_ok=True)
        made = Path(tempfile.mkdtemp(dir=folder.parent))
        for member, text in _members(archive, inside, suffix):
            (made / Path(member).name).write_text(text, encoding="utf-8")
        try:
            made.rename(folder)
        except OSError:  # another process was faster
            shutil.rmtree(made)
    return folder


def _members(archive: Path, inside: str, suffix: str) -> list[tuple[str, str]]:
    if archive.suffix == ".whl":
        with zipfile.ZipFile(archive) as opened:
            names = [n for n in opened.namelist() if n.startswith(inside) and n.endswith(suffix)]
            return [(n, opened.read(n).decode()) for n in names]
    with tarfile.open(archive) as opened:
        wanted = (m for m in opened if f"/{inside}" in m.name and m.name.endswith(suffix))
        return [(m.name, opened.extractfile(m).read().decode()) for m in wanted]


@functools.cache
def corpus() -> tuple[list[tuple[str, str]], list[str]]:
    """[(name, source)] without repeats, and the reasons why some are missing."""
    folders, missing = {"trl": Path(trl.__file__).parent / "chat_templates"}, []
    for name in ("llama.cpp", "axolotl"):
        try:
            folders[name] = downloaded(name)
        except Unreachable as error:
            missing.append(str(error))
    found: dict[str, str] = {}
    for origin, folder in folders.items():
        for path in sorted(folder.glob("*.jinja")):
            source = path.read_text(encoding="utf-8")
            if source.strip() not in map(str.strip, found.values()):
                found[f"{origin}/{path.stem}"] = source
    return list(found.items()), missing


# What looks like a control token in a template's own text. Special in the tokenizer: those that no text would hold.
_SPECIAL = re.compile(
    r"<\|[^\s<>|{}'\"]{1,40}\|>|<｜[^\s<>{}'\"]{1,40}｜>|<\|[a-z_]+>|<[a-z_]+\|>|\[/?[A-Z][A-Z_]{2,}\]|\[gMASK\]|\[\|[a-z]+\|\]"
    r"|</?s>|<(?:start|end|beginning)_of_\w+>|<(?:bos|eos|pad|sep|sop)>|<seed:[a-z]os>|<SPECIAL_\d+>|\[e~\[|\]~!?b(?:\[|\])|<end_of_utterance>"
)
_ADDED = re.compile(
    r"</?(?:\w+:)?(?:think|tool_calls?|tool_response|tools?|arg_key|arg_value|assistant|user|system|role)(?::\w+)?>"
)
# Ends of an assistant's turn, as the families know them; GLM ends a turn with the header of the next one.
ENDS = (
    "<|im_end|>", "<|eot_id|>", "<|eom_id|>", "<|eot|>", "<|eom|>", "<|return|>", "<|call|>", "<|calls|>", "<|end|>",
    "<end_of_turn>", "<turn|>", "<|tool_response>", "<|END_OF_TURN_TOKEN|>", "<｜end▁of▁sentence｜>", "[e~[", "</s>",
    "<|endoftext|>", "<|end_of_text|>", "<|role_end|>", "<|assistant_end|>", "<|message_sep|>", "<|end_of_msg|>",
    "<seed:eos>", "<SPECIAL_12>", "<sep>", "</assistant>", "<end_of_sentence>", "<｜hy_eos:opensource｜>", "[|endofturn|]",
    "<end_of_utterance>", "<|user|>", "<|observation|>", "<eos>", "<|tools_suffix|>",
)  # fmt: skip
# The eos token, where it is not the first of these that the template's text names: a part of the template's name -> token.
_EOS = {
    "gptoss": "<|return|>", "gpt-oss": "<|return|>", "glm": "<|endoftext|>", "phi3": "<|endoftext|>",
    "phi_3": "<|endoftext|>", "phi-3": "<|endoftext|>", "gemma": "<eos>", "mistral": "</s>", "apertus": "<|assistant_end|>",
    "deepseek_v2": "<｜end▁of▁sentence｜>", "command": "<|END_OF_TURN_TOKEN|>", "seed-oss": "<seed:eos>",
    "laguna": "</assistant>", "minimax-m3": "[e~[", "hy3": "<｜hy_eos:opensource｜>", "solar": "</s>", "apriel-1.5": "</s>",
    "gigachat": "</s>",
}  # fmt: skip


@functools.cache
def literal_text(source: str) -> str:
    """What a template writes by itself: its text and the strings in its code, one a line."""
    pieces = []
    for _, kind, value in jinja2.Environment().lex(source):
        if kind == "data":
            pieces.append(value)
        elif kind == "string":
            pieces.append(value[1:-1].encode("raw_unicode_escape").decode("unicode_escape", errors="ignore")
                          if "\\u" in value else value[1:-1])  # fmt: skip
    return "\n".join(pieces)


def control_tokens(source: str) -> tuple[list[str], list[str]]:
    """(special, added but not special) tokens that a template's text names."""
    text = literal_text(source)
    special = list(dict.fromkeys(_SPECIAL.findall(text)))
    special += [t for t in ENDS if t in text and t not in special and t not in ("</assistant>",)]
    added = [t for t in dict.fromkeys(m[0] for m in _ADDED.finditer(text)) if t not in special]
    return special, added


@functools.cache
def byte_level_bpe() -> str:
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    words = ["the answer is 42 because we think about the question and call the tool with arguments"] * 4
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    bpe.train_from_iterator(words, trainers.BpeTrainer(vocab_size=320, initial_alphabet=alphabet, show_progress=False))
    return bpe.to_str()


def make_tokenizer(name: str, source: str) -> PreTrainedTokenizerFast:
    special, added = control_tokens(source)
    bos = next((t for t in ("<｜begin▁of▁sentence｜>", "<|begin_of_text|>", "<bos>", "<s>") if t in special), "<s>")
    eos = next((token for part, token in _EOS.items() if part in name.lower()), None)
    if eos is None:
        headers = ("<|eom_id|>", "<|user|>", "<|observation|>")
        eos = next((t for t in ENDS if t in special and t not in headers), "</s>")
    bpe = Tokenizer.from_str(byte_level_bpe())
    bpe.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in dict.fromkeys([*special, eos, bos])])
    bpe.add_tokens([AddedToken(t, normalized=False) for t in added])
    made = PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token=eos, bos_token=bos)
    made.chat_template = source
    return made

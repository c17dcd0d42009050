"""Every command and every block of Python in README.md and docs/ runs, on models and data that need no download.

A block that cannot run has the reason in a comment before it: <!-- not run: reason -->. Links lead somewhere.
"""

import re
import runpy
import shlex
import shutil
import sys
from pathlib import Path

import pytest

import flexmask
from flexmask import demo, pack
from flexmask.cli import main
from flexmask.data import build_trees

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), ROOT / "CONTRIBUTING.md"]
BLOCK = re.compile(r"(?:<!-- not run: (?P<reason>[^>]*) -->\n)?```(?P<language>\w+)\n(?P<code>.*?)```", re.DOTALL)
CONVERSATIONS = demo.conversations(6)
TOKENIZER = demo.train_tokenizer(demo.texts(CONVERSATIONS))
# Installations, and what other tests or CI run.
ELSEWHERE = re.compile(r"make |pip install|source |python tests/template_matrix.py|python examples/(dpo|grpo).py")


def blocks(language):
    return [
        pytest.param(found["code"], id=f"{page.name}-{number}")
        for page in PAGES
        for number, found in enumerate(BLOCK.finditer(page.read_text()))
        if found["language"] == language and not found["reason"]
    ]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with what commands name: a model, files of data, a configuration, examples."""
    folder = tmp_path_factory.mktemp("docs")
    TOKENIZER.save_pretrained(folder / "model")
    demo.tiny_model(TOKENIZER).save_pretrained(folder / "model")
    [lines] = [
        found["code"] for found in BLOCK.finditer((ROOT / "docs/data.md").read_text()) if found["language"] == "json"
    ]
    for name in ("data.jsonl", "a.jsonl"):
        (folder / name).write_text(lines * 4)
    (folder / "b.json").write_text("[" + ",".join(lines.strip().splitlines() * 4) + "]")
    (folder / "run.yaml").write_text(
        "model_name_or_path: flexmask/tiny-random\ndataset_name: [a.jsonl]\noutput_dir: out\n"
    )
    shutil.copytree(ROOT / "examples", folder / "examples")
    return folder


def commands(text):
    for line in text.replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        if words and not ELSEWHERE.match(line.strip()):
            yield words


@pytest.mark.parametrize("text", blocks("bash"))
def test_commands(place, monkeypatch, capsys, text):
    monkeypatch.chdir(place)
    if "load_in_4bit" in text:
        pytest.importorskip("bitsandbytes", reason="bitsandbytes is an optional dependency (.ci/run installs it)")
    for words in commands(text.replace("Qwen/Qwen3-0.6B", "model")):
        if words[0] == "flexmask":
            flags = (
                ["--use_cpu", "true", "--disable_tqdm", "true", "--save_strategy", "no"] if words[1] == "train" else []
            )
            if words[1] == "train" and "--max_steps" not in words:
                flags += ["--max_steps", "2"]
            assert main([*words[1:], *flags]) == 0, (words, capsys.readouterr().err)
        else:
            assert words[0] == "python", f"who runs {words}?"
            monkeypatch.setattr(sys, "argv", words[1:])
            runpy.run_path(words[1], run_name="__main__")


@pytest.mark.parametrize("code", blocks("python"))
def test_python(place, monkeypatch, code):
    """With the names that a page has introduced, or that speak for themselves."""
    monkeypatch.chdir(place)
    model = demo.tiny_model(TOKENIZER)
    known = {
        "flexmask": flexmask, "name": "model", "tokenizer": TOKENIZER, "model": model, "conversations": CONVERSATIONS,
        "rows": pack(build_trees(CONVERSATIONS, TOKENIZER).trees, 4096),
        "prompt_ids": [1, 2, 3], "chosen_ids": [4, 5], "rejected_ids": [6, 7, 8],
    }  # fmt: skip
    here = 'use_cpu=True, save_strategy="no", disable_tqdm=True, '
    code = re.sub(r'(TrainingArguments\(\s*"out",\s)', rf"\1{here}", code)
    code = re.sub(r'(SFTConfig\(\s*"out",\s)', rf"\1bf16=False, gradient_checkpointing=False, {here}", code)
    exec(compile(code, "block", "exec"), known)
    flexmask.set_backend("auto")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    """To files, and to headings in them, as GitHub names those."""
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        path, _, heading = target.partition("#")
        if path.startswith("http"):
            continue
        file = page if not path else (page.parent / path)
        assert file.exists(), target
        if heading:
            titles = re.findall(r"^#+ (.*)$", file.read_text(), re.MULTILINE)
            names = [re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles]
            assert heading in names, target

"""Whole trainings from the command line: the recipes, with a tiny model and a CPU; and after a crash."""

import json
import re
import sys

import hybrids
import pytest
import yaml
from launching import HERE, LAUNCH, run

from flexmask.cli import main
from flexmask.demo import conversations, texts, tiny_model, train_tokenizer

RECIPES = HERE.parent / "examples" / "recipes"
# What two processes, or a tiny model, cannot have.
INSTEAD = {
    "sequence_parallel_8_gpus": ["--sequence_parallel_size", "2"],
    "lora_one_gpu": ["--lora_r", "4"],
}


@pytest.fixture(scope="module")
def tiny_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny")
    tokenizer = train_tokenizer(texts(conversations(64)))
    tokenizer.save_pretrained(folder)
    tiny_model(tokenizer).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("recipe", sorted(path.stem for path in RECIPES.glob("*.yaml")))
def test_recipe(recipe, tiny_folder, tmp_path, capsys):
    """Verified against N passes, two steps, saved."""
    path = RECIPES / f"{recipe}.yaml"
    flags = [
        "--model_name_or_path",
        tiny_folder,
        "--output_dir",
        tmp_path / "out",
        "--dataset_cache_dir",
        tmp_path / "cache",
    ]
    flags += ["--use_cpu", "true", "--max_steps", 2, "--max_tokens", 2048, "--max_samples", 40, "--logging_steps", 1]
    flags = ["train", "--config", path, *flags, *INSTEAD.get(recipe, [])]
    if recipe.endswith("one_gpu"):
        code, said = main(list(map(str, flags))), capsys.readouterr().out
    else:
        code, said = run([*LAUNCH, HERE / "recipes.py", *flags])
    assert code == 0, said[-4000:]
    assert "before training, flexmask/generated:" in said and "the same losses" in said
    assert said.count("'loss':") == 2
    settings = yaml.safe_load(path.read_text())
    saved = "adapter_model.safetensors" if settings.get("use_peft") else "model.safetensors"
    assert (tmp_path / "out" / saved).stat().st_size > 10_000


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--sequence_parallel_size", "2"], "sequence_parallel_size is 2, expected a divisor of the 1 processes"),
        (["--tokens_in_memory", "-1"], "tokens_in_memory is -1, expected 0 or more"),
        (["--tokens_in_memory", "0", "--optim", "lomo"], "tokens_in_memory and optim .*lomo.* exclude each other"),
        (
            ["--tokens_in_memory", "0", "--model_name_or_path", "hybrid"],
            "cannot be trained with tokens_in_memory: its recurrent",
        ),
    ],
)
def test_modes_that_cannot_be_are_one_line_before_anything_is_loaded(flags, message, tmp_path, capsys, monkeypatch):
    hybrids.tiny("qwen3_5_text", vocab_size=512).config.save_pretrained(tmp_path / "hybrid")  # nothing beside it
    monkeypatch.chdir(tmp_path)
    given = ["--model_name_or_path", "flexmask/tiny-random", "--dataset_name", "none.jsonl", "--output_dir", "out"]
    assert main(["train", *given, "--use_cpu", "true", *flags]) == 2
    said = capsys.readouterr().err.strip()
    assert re.search(message, said) and "\n" not in said


@pytest.mark.parametrize("processes", [1, 2])
def test_killed_while_saving_and_resumed(processes, tiny_folder, tmp_path, capsys):
    """In the second epoch: goes on from the last checkpoint that is whole, prepares nothing again, and has the losses of a
    training that ran through. The bugs guarded: the last folder was taken, whole or not; and a resumed epoch had the order of the
    first one."""
    flags = ["--model_name_or_path", tiny_folder, "--dataset_name", "flexmask/generated", "--max_samples", 8]
    flags += ["--dataset_cache_dir", tmp_path / "cache", "--max_tokens", 1024, "--use_cpu", "true", "--verify", "false"]
    flags += ["--max_steps", 7, "--save_steps", 1, "--save_total_limit", 2, "--logging_steps", 1]
    flags += ["--learning_rate", 0.01]
    flags += ["--resume_from_checkpoint", "true", "--gradient_accumulation_steps", 2 // processes]
    command = [*(LAUNCH if processes == 2 else [sys.executable]), HERE / "killed.py", "train", *flags, "--output_dir"]
    code, said = run([*command, tmp_path / "killed"], KILL="1")
    assert code != 0 and "there is no checkpoint" in said
    prepared = {path: path.stat().st_mtime_ns for path in (tmp_path / "cache").rglob("*.arrow")}
    assert (tmp_path / "killed" / "checkpoint-5" / "model.safetensors").exists()
    folders = (tmp_path / "killed", tmp_path / "whole")
    if processes == 2:
        code, said = run([*command, *folders])
    else:
        code = max(main(list(map(str, ["train", *flags, "--output_dir", folder]))) for folder in folders)
        said = "".join(capsys.readouterr())
    assert code == 0, said[-4000:]
    assert "checkpoint-5 was not written to its end" in said and "checkpoint-4\n" in said
    assert prepared == {path: path.stat().st_mtime_ns for path in (tmp_path / "cache").rglob("*.arrow")} and prepared
    killed, whole = (
        {entry["step"]: entry["loss"] for entry in json.loads((tmp_path / name / "trainer_state.json").read_text())["log_history"]
         if "loss" in entry}
        for name in ("killed", "whole")
    )  # fmt: skip
    assert killed == pytest.approx(whole, rel=1e-6) and len(whole) == 7
    state = json.loads((tmp_path / "whole" / "trainer_state.json").read_text())
    assert 1 < state["epoch"] * 4 / 7 < 2, "the checkpoint is of the second epoch"

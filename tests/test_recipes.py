"""examples/recipes: each runs, with a tiny model in place of the large one, as many processes as can be had, and a CPU."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from test_ranks import LAUNCH

from flexmask.demo import conversations, texts, tiny_model, train_tokenizer

RECIPES = Path(__file__).parents[1] / "examples" / "recipes"
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
def test_recipe(recipe, tiny_folder, tmp_path):
    """Verified against N passes, two steps, saved."""
    path = RECIPES / f"{recipe}.yaml"
    command = [sys.executable] if recipe.endswith("one_gpu") else LAUNCH
    flags = [
        "--model_name_or_path",
        tiny_folder,
        "--output_dir",
        tmp_path / "out",
        "--dataset_cache_dir",
        tmp_path / "cache",
    ]
    flags += ["--use_cpu", "true", "--max_steps", 2, "--max_tokens", 2048, "--max_samples", 40, "--logging_steps", 1]
    here = Path(__file__).parent
    done = subprocess.run(
        [*command, here / "recipes.py", "train", "--config", path, *map(str, flags), *INSTEAD.get(recipe, [])],
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([str(here), *sys.path])},
        cwd=here.parent, capture_output=True, text=True, timeout=200,
    )  # fmt: skip
    said = done.stdout + done.stderr
    assert done.returncode == 0, said[-4000:]
    assert "before training, flexmask/generated:" in said and "the same losses" in said
    assert said.count("'loss':") == 2
    settings = yaml.safe_load(path.read_text())
    saved = "adapter_model.safetensors" if settings.get("use_peft") else "model.safetensors"
    assert (tmp_path / "out" / saved).stat().st_size > 10_000

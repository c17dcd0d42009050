"""The kernels of flash-linear-attention on trees: in Triton's interpreter here, on a GPU in test_cuda.py."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from filelock import FileLock
from template_corpus import CACHE

from flexmask.recurrence import fla

REQUIREMENT = "fla-core==0.6.0"  # the kernels of flash-linear-attention


def installed() -> Path:
    """A folder with fla, and not in the environment, where transformers would find it. Downloaded once."""
    folder = CACHE / REQUIREMENT
    CACHE.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{folder}.lock"):  # tests run in several processes
        if not folder.exists():
            command = [sys.executable, "-m", "pip", "install", "--no-deps", "--quiet", "--retries", "1"]
            command += ["--target", f"{folder}.part", REQUIREMENT]
            run = subprocess.run(command, capture_output=True, text=True, timeout=300)
            if run.returncode:
                pytest.skip(f"{REQUIREMENT} could not be installed: {run.stderr.strip().splitlines()[-1]}")
            Path(f"{folder}.part").rename(folder)
    return folder


@pytest.mark.parametrize("kind", ["gated_delta_rule", "kda", "simple_gla"])
def test_kernels_on_a_tree(kind):
    """float32, forward and every gradient; states alone are launched level by level."""
    folder = installed()
    script = Path(__file__).with_name("fla_on_trees.py")
    run = subprocess.run([sys.executable, str(script), str(folder), kind], capture_output=True, text=True, timeout=600)
    assert run.returncode == 0, run.stderr[-3000:]
    found = json.loads(run.stdout.splitlines()[-1])
    assert max(found["errors"].values()) < 1e-6, found
    assert found["levels"] == 3
    assert found["forward"] <= 8 + found["levels"], found
    assert found["backward"] <= 16 + 2 * found["levels"], found


def test_what_keeps_it_from_serving_is_told(monkeypatch):
    fla._missing.cache_clear()
    fla._kernels.cache_clear()
    monkeypatch.setattr(fla, "_kernels", lambda name: None)
    assert "pip install flash-linear-attention" in fla._missing(False)
    fla._missing.cache_clear()

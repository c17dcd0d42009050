"""The kernels of flash-linear-attention on trees: in Triton's interpreter here, on a GPU in test_cuda.py."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from fla_package import NotInstallable, installed

from flexmask.recurrence import fla


def test_kernels_on_a_tree():
    """float32, forward and every gradient; states alone are launched level by level."""
    try:
        folder = installed()
    except NotInstallable as error:
        pytest.skip(str(error))
    script = Path(__file__).with_name("fla_on_trees.py")
    run = subprocess.run([sys.executable, str(script), str(folder)], capture_output=True, text=True, timeout=600)
    assert run.returncode == 0, run.stderr[-3000:]
    of_kinds = json.loads(run.stdout.splitlines()[-1])
    assert of_kinds.keys() == {"gated_delta_rule", "kda", "simple_gla"}
    for found in of_kinds.values():
        assert max(found["errors"].values()) < 1e-6, found
        assert found["levels"] == 3 and found["counts"] == 0
        assert found["forward"] <= 8 + found["levels"], found
        assert found["backward"] <= 16 + 2 * found["levels"], found


def test_what_keeps_it_from_serving_is_told(monkeypatch):
    fla._missing.cache_clear()
    fla._kernels.cache_clear()
    monkeypatch.setattr(fla, "_kernels", lambda name: None)
    assert "pip install flash-linear-attention" in fla._missing(False)
    fla._missing.cache_clear()

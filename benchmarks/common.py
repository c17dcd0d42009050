"""What every benchmark shares: conversations of given lengths, repeated timing, and a result file that says where."""

import json
import os
import platform
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import torch
import transformers

from flexmask import Pass

RESULTS = Path(__file__).parent / "results"
# The rows of DESIGN.md's table: turns; mean tokens of a user message, a thought, a response.
CONVERSATIONS = {
    "6 turns, short": (6, 60, 150, 100),
    "6 turns, long thoughts": (6, 80, 800, 250),
    "12 turns, long thoughts": (12, 80, 800, 250),
    "24 turns, agent": (24, 500, 250, 80),
}


def conversation(rng: np.random.Generator, turns: int, h: int, t: int, r: int, vocab: int) -> list[Pass]:
    """The N passes of a conversation of random tokens, its lengths drawn around the means (0.5 to 1.5 times)."""
    context, passes = np.empty(0, np.int64), []
    for _ in range(turns):
        question, thought, response = (rng.integers(0, vocab, rng.integers(n // 2, n * 3 // 2 + 1)) for n in (h, t, r))
        context = np.concatenate([context, question])
        ids = np.concatenate([context, thought, response])
        passes.append(Pass(ids, np.arange(len(ids)) >= len(context)))
        context = np.concatenate([context, response])
    return passes


def measure(function, repeats: int, warmup: int = 1) -> dict[str, float]:
    """Seconds per call: median, fastest and slowest of `repeats`, after `warmup` calls that do not count."""
    for _ in range(warmup):
        function()
    seconds = []
    for _ in range(repeats):
        _synchronize()
        start = time.perf_counter()
        function()
        _synchronize()
        seconds.append(time.perf_counter() - start)
    return {"median": float(np.median(seconds)), "min": min(seconds), "max": max(seconds), "repeats": repeats}


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def save(name: str, rows: list[dict], **more) -> Path:
    """Write rows and where they come from: machine, versions, commit, command."""
    git = subprocess.run(["git", "describe", "--always", "--dirty"], capture_output=True, text=True, cwd=RESULTS.parent)
    cpu = next((line.split(":")[1].strip() for line in _cpuinfo() if line.startswith("model name")), platform.machine())
    result = {
        "command": " ".join([*_environment(), "python", *map(_relative, sys.argv)]),
        "commit": git.stdout.strip() or "unknown",
        "date": time.strftime("%Y-%m-%d"),
        "machine": torch.cuda.get_device_name()
        if torch.cuda.is_available()
        else f"{cpu}, {torch.get_num_threads()} threads",
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
        **more,
        "rows": rows,
    }
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    path.write_text(json.dumps(result, indent=1) + "\n")
    return path


def _cpuinfo() -> list[str]:
    path = Path("/proc/cpuinfo")
    return path.read_text().splitlines() if path.exists() else []


def _environment() -> list[str]:
    """Variables that change speed, as they would be written before the command."""
    return [f"{name}={value}" for name, value in sorted(os.environ.items()) if name.startswith(("MALLOC_", "OMP_"))]


def _relative(argument: str) -> str:
    """Paths of the machine it ran on do not belong in a result."""
    path = Path(argument)
    return f"{path.parent.name}/{path.name}" if path.is_absolute() else argument


def table(rows: list[dict]) -> str:
    """Rows as an aligned text table."""
    texts = [[_text(value) for value in row.values()] for row in rows]
    heads = list(rows[0])
    widths = [max(len(head), *(len(row[i]) for row in texts)) for i, head in enumerate(heads)]
    lines = ["  ".join(cell.rjust(width) for cell, width in zip(cells, widths)) for cells in [heads, *texts]]
    return "\n".join(lines)


def _text(value) -> str:
    if isinstance(value, dict):
        return f"{value['median']:.4g} s"
    return f"{value:.3g}" if isinstance(value, float) else str(value)

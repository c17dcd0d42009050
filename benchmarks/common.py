"""What every benchmark shares: its settings, conversations of given lengths, repeated timing, a result that says where.

A benchmark is run as `python benchmarks/NAME.py SIZE`. Its settings are `configs/NAME.yaml`, one section for each size
(smoke, cpu, gpu); its result is `results/NAME_SIZE.json`, with a picture beside it. README.md tells how to read them.
"""

import argparse
import gc
import json
import os
import platform
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from importlib import metadata
from pathlib import Path

import numpy as np
import torch
import yaml
from matplotlib.figure import Figure

from flexmask import Pass

HERE = Path(__file__).parent
RESULTS = HERE / "results"
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPE = torch.bfloat16 if DEVICE == "cuda" else torch.float32  # of models
SMOKE = "smoke: shows that it runs, measures nothing"
PLAIN = "SDPA, plain causal"  # the contender of attention.py that does not attend to the tree
# Turns; mean tokens of a user message, a thought, a response.
CONVERSATIONS = {
    "6 turns, short": (6, 60, 150, 100),
    "6 turns, long thoughts": (6, 80, 800, 250),
    "12 turns, long thoughts": (12, 80, 800, 250),
    "24 turns, agent": (24, 500, 250, 80),
}


def conversation(
    rng: np.random.Generator, turns: int, h: int, t: int, r: int, vocab: int, fixed: bool = False
) -> list[Pass]:
    """The N passes of a conversation of random tokens, its lengths drawn around the means (0.5 to 1.5 times), or fixed."""
    context, passes = np.empty(0, np.int64), []
    for _ in range(turns):
        lengths = (h, t, r) if fixed else (drawn(rng, mean) for mean in (h, t, r))
        question, thought, response = (rng.integers(0, vocab, n) for n in lengths)
        context = np.concatenate([context, question])
        ids = np.concatenate([context, thought, response])
        passes.append(Pass(ids, np.arange(len(ids)) >= len(context)))
        context = np.concatenate([context, response])
    return passes


def drawn(rng: np.random.Generator, mean: int) -> int:
    """A length of 0.5 to 1.5 times the mean."""
    return int(rng.integers(mean // 2, mean * 3 // 2 + 1))


def measure(function: Callable, repeats: int, warmup: int = 1) -> dict[str, float]:
    """Seconds per call: median, fastest and slowest of `repeats`, after `warmup` calls that do not count."""
    for _ in range(warmup):
        function()
    return spread([elapsed(function) for _ in range(repeats)])


def in_turns(functions: Sequence[Callable], repeats: int) -> list[list[float]]:
    """Seconds of each call of each function. They take turns, in the opposite order every second round: what slows the machine
    down for a while slows all of them."""
    seconds = [[] for _ in functions]
    for turn in range(repeats):
        for i in range(len(functions))[:: -1 if turn % 2 else 1]:
            seconds[i].append(elapsed(functions[i]))
    return seconds


def spread(values: list[float]) -> dict:
    """Of repeated measurements: median, least, greatest, and each."""
    return {"median": float(np.median(values)), "min": min(values), "max": max(values), "each": values}


def ratio(of: dict, to: dict) -> dict:
    """The spread of the ratios of two spreads, round by round."""
    return spread([a / b for a, b in zip(of["each"], to["each"], strict=True)])


def attempt(function: Callable[[], dict]) -> dict:
    """What a function finds, or {"error": what it failed with}.

    Raises:
        torch.AcceleratorError: after which nothing works on the GPU any more.
    """
    try:
        return function()
    except torch.AcceleratorError:
        raise
    except Exception as error:
        return {"error": f"{type(error).__name__}: {str(error)[-300:]}"}


def elapsed(function: Callable) -> float:
    """Seconds of one call, with everything it started on a GPU."""
    _synchronize()
    start = time.perf_counter()
    function()
    _synchronize()
    return time.perf_counter() - start


def peak_memory(function: Callable) -> int:
    """Bytes that a call needs at its peak beyond what there was: of the GPU, or resident in the process (which on a CPU has to
    be one of its own: what others freed there would be used again, and not count)."""
    gc.collect()
    if DEVICE == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        function()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew; resource's ru_maxrss even outlives exec
    before = _status("VmRSS")
    function()
    return _status("VmHWM") - before


def _status(name: str) -> int:
    """Bytes, as Linux reports them."""
    line = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith(name))
    return int(line.split()[1]) * 1024


def _synchronize() -> None:
    if DEVICE == "cuda":
        torch.cuda.synchronize()


class Benchmark:
    """Settings of the size that the command line names, and the result, written after every row.

    Attributes:
        settings: of `configs/NAME.yaml`, as attributes.
        rows: what `add` was given.
        more: what else the result holds.
    """

    def __init__(self, name: str, description: str, argv: list[str] | None = None):
        self.name = name
        sizes = yaml.safe_load((HERE / "configs" / f"{name}.yaml").read_text())
        parser = argparse.ArgumentParser(
            prog=f"python benchmarks/{name}.py",
            description=description,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        parser.add_argument("size", choices=sizes, help=f"a section of configs/{name}.yaml")
        parser.add_argument("--output_dir", type=Path, default=RESULTS, help="where the result goes")
        self.args = parser.parse_args(argv)
        if self.args.size.startswith("gpu") and DEVICE != "cuda":
            parser.error(f"the size {self.args.size} needs a CUDA device, and PyTorch finds none")
        self.settings = argparse.Namespace(**sizes[self.args.size] or {})
        files = (text for text in _strings(vars(self.settings)) if text.startswith("data/"))
        missing = [path for path in files if not Path(path).exists()]
        if missing:
            parser.error(f"not in this folder: {', '.join(missing)}; benchmarks/README.md, Data, tells where to get it")
        self.rows: list[dict] = []
        self.more: dict = {}
        self.finished = False
        self.commit = _commit()
        self.start = time.perf_counter()

    @property
    def path(self) -> Path:
        return self.args.output_dir / f"{self.name}_{self.args.size}.json"

    @property
    def measured(self) -> list[dict]:
        """The rows that are not errors."""
        return [row for row in self.rows if "error" not in row]

    def add(self, **row) -> None:
        """A row, shown and written at once: a later one may fail or take too long."""
        self.rows.append(row)
        print("  ".join(f"{key}: {_text(value)}" for key, value in row.items()), flush=True)
        self.save()

    def save(self) -> None:
        """Write rows and where they come from: machine, versions, commit, command, settings."""
        result = {
            "command": " ".join([*_environment(), "python", f"benchmarks/{self.name}.py", self.args.size]),
            "commit": self.commit,
            "date": time.strftime("%Y-%m-%d"),
            "machine": machine(),
            "versions": versions(),
            "settings": vars(self.settings),
            "seconds": round(time.perf_counter() - self.start),
            "finished": self.finished,
            **self.more,
            "rows": self.rows,
        }
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.path.write_text(json.dumps(_without_nan(result), indent=1) + "\n")

    def run(self, fill: Callable[[], None], draw: Callable, *, width: float = 7, panels: int = 1) -> None:
        """`fill()` adds the rows, and `draw(*axes)` puts them on a picture beside the result. Interrupted by Ctrl-C or
        `timeout -s INT`, both hold what there is, and the result is not `finished`."""
        print(machine(), flush=True)
        try:
            fill()
            self.finished = True
        except KeyboardInterrupt:
            print(f"interrupted after {len(self.rows)} rows")
        self.save()
        if self.measured:
            self._plot(draw, width, panels)
        print("saved", self.path.name, f"({SMOKE})" * (self.args.size == "smoke"))

    def _plot(self, draw: Callable, width: float, panels: int) -> None:
        figure = Figure(figsize=(width, 4), layout="constrained")
        axes = figure.subplots(1, panels, squeeze=False)[0]
        draw(*axes)
        if self.args.size == "smoke":
            figure.suptitle(SMOKE)
        for axis in axes:
            axis.grid(alpha=0.3)
        figure.savefig(self.path.with_suffix(".png"), dpi=120)


def bars(axis, rows: list[dict], group: str, kind: str, value: str, mark: str | None = None) -> None:
    """Bars side by side: one group for each value of rows' `group`, in it one bar for each `kind`, as high as `value` (or its
    median), with a line at `mark`."""
    groups, kinds = (list(dict.fromkeys(row[key] for row in rows)) for key in (group, kind))
    for i, name in enumerate(kinds):
        of_kind = [row for row in rows if row[kind] == name]
        at = [groups.index(row[group]) + (i - len(kinds) / 2 + 0.5) * 0.8 / len(kinds) for row in of_kind]
        axis.bar(at, [number(row[value]) for row in of_kind], 0.8 / len(kinds), label=name)
        if mark:
            axis.plot(at, [row[mark] for row in of_kind], "k_", markersize=12)
    axis.set_xticks(range(len(groups)), [str(name).replace(", ", ",\n") for name in groups], fontsize=7)


def repeat_heads(query: torch.Tensor, *tensors: torch.Tensor) -> list[torch.Tensor]:
    """Keys and values (batch, kv_heads, L, D) once for every query head, as transformers does where there is a mask."""
    return [x.repeat_interleave(query.shape[1] // x.shape[1], 1) for x in tensors]


def additive_mask(visible: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Added to the scores; of a mask of bools SDPA would make one in every call."""
    return torch.zeros(visible.shape, dtype=dtype, device=visible.device).masked_fill_(~visible, float("-inf"))


def machine() -> str:
    if DEVICE == "cuda":
        return torch.cuda.get_device_name()
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    cpu = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine())
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30
    return f"{cpu}, {torch.get_num_threads()} threads, {memory:.0f} GiB"


def versions() -> dict[str, str]:
    found = {"python": platform.python_version(), "torch": torch.__version__}
    for package in ("transformers", "triton", "trl", "liger-kernel"):
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    if DEVICE == "cuda":
        found["cuda"] = torch.version.cuda
    return found


def _strings(value) -> list[str]:
    """Those in nested settings."""
    if isinstance(value, dict | list):
        return [found for item in (value.values() if isinstance(value, dict) else value) for found in _strings(item)]
    return [value] if isinstance(value, str) else []


def _commit() -> str:
    """Of the code that runs; `-dirty` if other code than that, results and pages aside. Or what COMMIT says, where the code was
    copied without its history."""
    if "COMMIT" in os.environ:
        return os.environ["COMMIT"]
    code = ["--", ":/", ":(top,exclude)*.md", ":(top,exclude)benchmarks/results"]
    try:
        command = ["git", "rev-parse", "--short", "HEAD"]
        commit = subprocess.run(command, capture_output=True, text=True, cwd=HERE, check=True).stdout.strip()
        changed = subprocess.run(["git", "diff", "--quiet", "HEAD", *code], capture_output=True, cwd=HERE)
    except (FileNotFoundError, subprocess.CalledProcessError):
        return "unknown"
    return commit + "-dirty" * (changed.returncode == 1)


def _environment() -> list[str]:
    """Variables that change speed, as they would be written before the command."""
    prefixes = ("MALLOC_", "OMP_", "FLEXMASK_", "PYTORCH_", "TRITON_INTERPRET")
    return [f"{name}={value}" for name, value in sorted(os.environ.items()) if name.startswith(prefixes)]


def _without_nan(value):
    """NaN is no JSON."""
    if isinstance(value, dict):
        return {key: _without_nan(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_without_nan(item) for item in value]
    return None if isinstance(value, float) and value != value else value


def table(rows: list[dict]) -> str:
    """Rows as an aligned text table."""
    texts = [[_text(value) for value in row.values()] for row in rows]
    heads = list(rows[0])
    widths = [max(len(head), *(len(row[i]) for row in texts)) for i, head in enumerate(heads)]
    lines = ["  ".join(cell.rjust(width) for cell, width in zip(cells, widths)) for cells in [heads, *texts]]
    return "\n".join(lines)


def number(value: dict | float) -> float:
    return value["median"] if isinstance(value, dict) else value


def _text(value) -> str:
    if isinstance(value, dict):
        return f"{value['median']:.3g} ({value['min']:.3g} to {value['max']:.3g})"
    return f"{value:.3g}" if isinstance(value, float) else str(value)


class Vocabulary:
    """What the collator needs of a tokenizer where tokens are random."""

    pad_token_id = 0

    def __init__(self, size: int):
        self.size = size

    def __len__(self) -> int:
        return self.size


def in_own_process(script: str, *arguments: str, **environment: str) -> dict | list:
    """Run a script with arguments, and read the JSON of its last line.

    Raises:
        MemoryError: the system killed it, as it does where memory runs out.
        RuntimeError: it failed.
    """
    command = [sys.executable, str(HERE / script), *arguments]
    run = subprocess.run(command, capture_output=True, text=True, env=os.environ | environment)
    if run.returncode == -signal.SIGKILL:
        raise MemoryError(f"{script} was killed")
    if run.returncode:
        raise RuntimeError(run.stderr[-2000:])
    return json.loads(run.stdout.splitlines()[-1])


# Tensors of 64 KiB or more are mapped, and given back as soon as they are freed: what is resident is what is alive. (By
# default the C library keeps much of it, which is faster and says little about what a step needs.)
GIVE_BACK = {"MALLOC_MMAP_THRESHOLD_": str(2**16), "MALLOC_TRIM_THRESHOLD_": str(2**16)}
# The opposite, for times. By default tensors of up to 32 MiB are kept and larger ones are mapped anew, each page of which costs
# a page fault: a long row would pay more for that than short sequences.
KEEP = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(2**40)}

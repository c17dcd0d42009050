"""Peak memory of a function on the CPU, as Linux knows it."""

import ctypes
from itertools import accumulate
from pathlib import Path

import pytest
import torch

needs_linux = pytest.mark.skipif(
    not Path("/proc/self/clear_refs").exists(), reason="reads peak memory from Linux's /proc/self/clear_refs"
)


def peak_bytes(function, runs: int = 1) -> int:
    """Growth of the resident set while `function` runs, from the kernel's own high-water mark. The least of several runs: in
    which pieces the C library keeps what was freed is chance, and what does not fit into them only adds to a peak."""
    return min(_peak(function) for _ in range(runs))


def allocated_bytes(function) -> int:
    """What PyTorch's own allocator on the CPU has handed out at once while `function` runs, at most: the same in every run."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        function()
    events = sorted(profile.profiler.kineto_results.events(), key=lambda event: event.start_ns())
    return max(accumulate(event.nbytes() for event in events if event.name() == "[memory]"))


def _peak(function) -> int:
    ctypes.CDLL(None).malloc_trim(0)  # what was freed before would be used again, and not count
    Path("/proc/self/clear_refs").write_text("5")
    before = _status("VmRSS")
    function()
    return _status("VmHWM") - before


def _status(name: str) -> int:
    line = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith(name))
    return int(line.split()[1]) * 1024

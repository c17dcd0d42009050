"""Two processes that tests start, and what they write."""

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from filelock import FileLock

HERE = Path(__file__).parent
LAUNCH = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]


def run(command, timeout: int = 240, **environment) -> tuple[int, str]:
    """Exit code, and all that was said. It is killed with its children if they wait for each other."""
    environment = (
        os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([str(HERE), *sys.path])} | environment
    )
    process = subprocess.Popen(
        list(map(str, command)), env=environment, cwd=HERE.parent, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        start_new_session=True,
    )  # fmt: skip
    try:
        said = process.communicate(timeout=timeout)[0]
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        raise
    return process.returncode, said


def launch(script: str, result: Path, *arguments):
    """What two processes write to `result`."""
    code, said = run([*LAUNCH, HERE / script, result, *arguments])
    assert code == 0, said[-5000:]


def once(tmp_path_factory, name: str, write: Callable[[Path], object]):
    """What `write` puts into a file: written by the first worker of pytest-xdist that needs it, and read by the others."""
    folder = tmp_path_factory.getbasetemp()
    folder = folder.parent if "PYTEST_XDIST_WORKER" in os.environ else folder
    path = folder / f"{name}.pt"
    with FileLock(f"{path}.lock"):
        if not path.exists():
            write(path)
    return torch.load(path)

"""Two processes that tests start, and what they write."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import torch
from filelock import FileLock

HERE = Path(__file__).parent
TOGETHER = (("ranks", "sharded"), ("distributed", "trainer_modes"))  # modules with a function in_two_processes
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


def found_by_two(tmp_path_factory, name: str):
    """What the module of that name finds in two processes. They are started once, by the first worker of pytest-xdist that needs
    them, for all modules of a kind: importing everything takes longer than most of what is done."""
    kind = next(names for names in TOGETHER if name in names)
    folder = tmp_path_factory.getbasetemp()
    folder = folder.parent if "PYTEST_XDIST_WORKER" in os.environ else folder
    path = folder / f"{kind[0]}.pt"
    with FileLock(f"{path}.lock"):
        if not path.exists():
            code, said = run([*LAUNCH, HERE / "two_processes.py", path, *kind])
            assert code == 0, said[-5000:]
    return torch.load(path)[name]

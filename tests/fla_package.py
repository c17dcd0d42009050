"""The package fla, apart from the environment, where transformers would find it."""

import shutil
import subprocess
import sys
from pathlib import Path

from filelock import FileLock
from template_corpus import CACHE

REQUIREMENT = "fla-core==0.6.0"  # the kernels of flash-linear-attention


class NotInstallable(RuntimeError):
    """PyPI did not give it."""


def installed() -> Path:
    """A folder with it. Downloaded once."""
    folder = CACHE / REQUIREMENT
    CACHE.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{folder}.lock"):  # tests run in several processes
        if not folder.exists():
            shutil.rmtree(f"{folder}.part", ignore_errors=True)  # of a run that was killed
            command = [sys.executable, "-m", "pip", "install", "--no-deps", "--quiet", "--retries", "1"]
            command += ["--target", f"{folder}.part", REQUIREMENT]
            run = subprocess.run(command, capture_output=True, text=True, timeout=300)
            if run.returncode:
                raise NotInstallable(f"{REQUIREMENT} could not be installed: {run.stderr.strip().splitlines()[-1]}")
            Path(f"{folder}.part").rename(folder)
    return folder

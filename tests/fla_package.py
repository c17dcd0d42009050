"""Packages apart from the environment: fla, which transformers would find there, and others that only a check needs."""

import hashlib
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from filelock import FileLock
from template_corpus import CACHE

REQUIREMENT = "fla-core==0.6.0"  # the kernels of flash-linear-attention


class NotInstallable(RuntimeError):
    """PyPI did not give them."""


def installed(requirements: Sequence[str] = (REQUIREMENT,)) -> Path:
    """A folder with them. Downloaded once."""
    all_of_them = hashlib.sha256(" ".join((*requirements, sys.version)).encode()).hexdigest()[:8]
    folder = CACHE / f"{requirements[0]}-{all_of_them}"
    CACHE.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{folder}.lock"):  # tests run in several processes
        if not folder.exists():
            shutil.rmtree(f"{folder}.part", ignore_errors=True)  # of a run that was killed
            command = [sys.executable, "-m", "pip", "install", "--no-deps", "--quiet", "--retries", "1"]
            command += ["--target", f"{folder}.part", *requirements]
            run = subprocess.run(command, capture_output=True, text=True, timeout=300)
            if run.returncode:
                raise NotInstallable(f"{requirements[0]} could not be installed: {run.stderr.strip().splitlines()[-1]}")
            Path(f"{folder}.part").rename(folder)
    return folder

"""Run by test_recipes.py, under torchrun or alone: `flexmask train`, killed in the middle of writing its fifth checkpoint, if it
is told to. The last arguments are output folders, one training after the other."""

import os
import signal
import sys

from flexmask import OnePassTrainer
from flexmask.cli import main

save = OnePassTrainer._save_rng_state


def save_or_die(self, output_dir):
    """With model and optimiser on the disk; of two ranks the second dies before it has written its own part."""
    if self.state.global_step == 5 and self.args.process_index == self.args.world_size - 1:
        os.kill(os.getpid(), signal.SIGKILL)
    save(self, output_dir)


if os.environ.get("KILL"):
    OnePassTrainer._save_rng_state = save_or_die
folders = sys.argv.index("--output_dir") + 1
for folder in sys.argv[folders:]:
    if code := main([*sys.argv[1:folders], folder]):
        sys.exit(code)

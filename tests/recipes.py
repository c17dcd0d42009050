"""Run by test_recipes.py, under torchrun or alone: `flexmask train` with the given arguments, on a CPU."""

import sys
from pathlib import Path

from ranks_on_a_cpu import as_on_gpus, without_compiler

from flexmask import train
from flexmask.cli import main

library = train.OnePassTrainer.__init__


def with_fsdp(self, model, args, *others, **options):
    if args.fsdp:
        as_on_gpus()
    library(self, model, args, *others, **options)


train.OnePassTrainer.__init__ = with_fsdp
if "deepspeed:" in Path(sys.argv[sys.argv.index("--config") + 1]).read_text():
    without_compiler()  # before the arguments are there, which start it
sys.exit(main(sys.argv[1:]))

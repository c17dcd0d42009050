"""Run by test_recipes.py, under torchrun or alone: `flexmask train` with the given arguments, on a CPU."""

import sys

from accelerate.state import PartialState
from accelerate.utils import DistributedType

from flexmask import train
from flexmask.cli import main

library = train.OnePassTrainer.__init__


def with_fsdp(self, model, args, *others, **options):
    if args.fsdp:  # on a CPU Accelerate runs DDP in its place, unless it is told that there are GPUs
        PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
    library(self, model, args, *others, **options)


train.OnePassTrainer.__init__ = with_fsdp
sys.exit(main(sys.argv[1:]))

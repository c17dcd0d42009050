"""What the scripts that torchrun starts for tests set, so that the ways of many GPUs run on a CPU."""

from accelerate.state import PartialState
from accelerate.utils import DistributedType


def as_on_gpus() -> None:
    """For FSDP: on a CPU Accelerate runs DDP in its place, unless it is told that there are GPUs."""
    PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU


def without_compiler() -> None:
    """DeepSpeed with gloo's collectives: its own for CPUs are compiled for most of a minute, and a build that was once killed is
    waited for without end."""
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False

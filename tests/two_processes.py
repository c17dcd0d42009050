"""Run under torchrun by `launching.found_by_two`: what two processes find, of each of the named modules, to a file."""

import sys
from importlib import import_module
from pathlib import Path

import torch
import torch.distributed as dist


def main(result: str, *names: str) -> None:
    dist.init_process_group("gloo")
    found = {name: import_module(name).in_two_processes(Path(f"{result}.{name}")) for name in names}
    if dist.get_rank() == 0:
        torch.save(found, result)
    dist.barrier()
    dist.destroy_process_group()  # threads of the group would abort the process at exit, now and then


if __name__ == "__main__":
    main(*sys.argv[1:])

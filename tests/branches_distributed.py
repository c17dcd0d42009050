"""Run by test_branches.py under torchrun: a step branch by branch on rows of different pieces, under DDP or FSDP2."""

import contextlib
import sys

import torch
from models import tiny
from test_branches import ROWS
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from flexmask import backward_by_branches
from flexmask.collator import to_batch
from flexmask.loss import target_weight

if __name__ == "__main__":
    torch.distributed.init_process_group("gloo")
    rank = torch.distributed.get_rank()
    model = tiny("Qwen3", torch.float64)
    if sys.argv[1] == "ddp":
        model = DistributedDataParallel(model)
    else:
        mesh = torch.distributed.init_device_mesh("cpu", (2,))
        for layer in model.model.layers:
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
    batch = to_batch(ROWS[("forest", "turns")[rank]])
    total = target_weight(batch).sum()
    torch.distributed.all_reduce(total)

    def step(synchronised: bool) -> torch.Tensor:
        without = model.no_sync() if sys.argv[1] == "ddp" and not synchronised else contextlib.nullcontext()
        with without:
            return backward_by_branches(model, batch, total)

    found = {}
    for way in ("one step", "two accumulated"):
        if way == "two accumulated":
            step(False)
        loss = step(True)
        torch.distributed.all_reduce(loss)
        gradients = {
            name.removeprefix("module."): p.grad.full_tensor() if hasattr(p.grad, "full_tensor") else p.grad.clone()
            for name, p in model.named_parameters()
        }
        found[way] = loss, gradients
        model.zero_grad(set_to_none=True)
    if rank == 0:
        torch.save(found, sys.argv[2])
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()  # threads of the group would abort the process at exit, now and then

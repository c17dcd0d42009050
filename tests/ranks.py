"""For test_ranks.py: steps of two processes, the loss and gradient of each.

In place of an optimiser, gradients; of each case those of one process are what they must be.
"""

import contextlib
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from models import tiny
from peak_memory import allocated_bytes
from reference import conversation_passes
from test_branches import ROWS
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from transformers import AutoModelForCausalLM

from flexmask import TokenTree, backward_by_branches, set_backend, tree_loss
from flexmask.collator import to_batch
from flexmask.integrations.ulysses import share_row
from flexmask.loss import target_weight

# (family, backend), forward and backward of a row that two ranks share; with windows, sinks, and keys of one head.
SHARED = {
    "flash": ("Qwen3", {}, "flash"),
    "blockwise": ("Qwen3", {}, "blockwise"),
    "a window": ("Gemma3", {}, "flash"),
    "sinks": ("GptOss", {}, "blockwise"),
    "one head of keys": ("Qwen3", {"num_key_value_heads": 1}, "flash"),
    "checkpointing": ("Qwen3", {}, "flash"),
}


def sharded(model):
    mesh = dist.init_device_mesh("cpu", (2,))
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def gradients(model) -> dict:
    """Of the parameters, added up over ranks where nothing has done it."""
    found = {}
    for name, p in model.named_parameters():
        gradient = p.grad.full_tensor() if hasattr(p.grad, "full_tensor") else p.grad.clone()
        found[name.removeprefix("module.")] = gradient
    model.zero_grad(set_to_none=True)
    return found


def summed(x: torch.Tensor) -> torch.Tensor:
    dist.all_reduce(x)
    return x


def by_branches(wrapper: str, steps: int) -> tuple:
    """Rows of one and of many pieces; `steps` accumulated, of which the last one synchronises."""
    model = tiny("Qwen3", torch.float64)
    model = DistributedDataParallel(model) if wrapper == "ddp" else sharded(model)
    batch = to_batch(ROWS[("forest", "turns")[dist.get_rank()]])
    total = summed(target_weight(batch).sum())
    for step in range(steps):
        without = wrapper == "ddp" and step < steps - 1
        with model.no_sync() if without else contextlib.nullcontext():
            loss = backward_by_branches(model, batch, total)
    return summed(loss), {name: 2 * g for name, g in gradients(model).items()}  # they were averaged


def shared(family: str, changes: dict, backend: str, wrapper: str = "none", checkpointing: bool = False) -> tuple:
    model = tiny(family, **changes)
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.train()
    if wrapper == "fsdp2":
        model = sharded(model)
    batch = to_batch(ROWS["forest"], pad_to_multiple_of=8)
    total = target_weight(batch).sum()
    set_backend(backend)
    loss = tree_loss(model, share_row(batch, dist.group.WORLD), total)
    loss.backward()
    set_backend("auto")
    found = gradients(model)
    found = {name: 2 * g if wrapper == "fsdp2" else summed(g) for name, g in found.items()}
    return summed(loss.detach()), found


def flex_forward() -> torch.Tensor:
    """FlexAttention has no backward on a CPU."""
    model, batch = tiny("Qwen3", head_dim=16), to_batch(ROWS["forest"])
    set_backend("flex")
    with torch.no_grad():
        loss = tree_loss(model, share_row(batch, dist.group.WORLD), target_weight(batch).sum())
    set_backend("auto")
    return summed(loss)


def peaks() -> tuple[int, int]:
    """Bytes of a step of a rank of two, and of one that has the whole row."""
    passes = conversation_passes(np.random.default_rng(0), 6, 60, 400, 60, 512)
    batch = to_batch(TokenTree.from_passes(passes), pad_to_multiple_of=256)
    model = tiny("Qwen3", hidden_size=256, intermediate_size=1024, num_hidden_layers=4, head_dim=64)
    total = target_weight(batch).sum()

    def step(of: dict) -> None:
        tree_loss(model, of, total).backward()
        model.zero_grad(set_to_none=True)

    shared_batch = share_row(batch, dist.group.WORLD)
    step(shared_batch)  # what the first step alone allocates
    return tuple(allocated_bytes(lambda of=of: step(of)) for of in (shared_batch, batch))


def tensor_parallel(folder: Path) -> tuple:
    """Loaded as people load it; each rank has some heads of every layer, and the whole row."""
    if dist.get_rank() == 0:
        tiny("Qwen3").save_pretrained(folder)
    dist.barrier()
    model = AutoModelForCausalLM.from_pretrained(folder, tp_plan="auto", attn_implementation="flexmask").eval()
    assert any(isinstance(p, DTensor) for p in model.parameters())
    loss = tree_loss(model, to_batch(ROWS["forest"]))
    loss.backward()
    return loss.detach(), gradients(model)


def in_two_processes(folder: Path) -> dict:
    results = {(wrapper, steps): by_branches(wrapper, steps) for wrapper in ("ddp", "fsdp2") for steps in (1, 2)}
    for name, case in SHARED.items():
        results[name] = shared(*case, checkpointing=name == "checkpointing")
    results["fsdp2, shared"] = shared("Qwen3", {}, "flash", "fsdp2")
    results["flex"], results["peaks"] = flex_forward(), peaks()
    results["tensor parallel"] = tensor_parallel(folder)
    return results

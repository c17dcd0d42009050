"""For test_backends_in_models.py: gradients of a model under FSDP2 on the Triton kernels, in two processes. Of the model's own
loss, and of large logits, in one fused loss where there is one and in chunks."""

from pathlib import Path

import hybrids
import torch
from models import tiny
from test_backends_in_models import batch_of
from torch.distributed.fsdp import fully_shard

import flexmask

# A model with attention alone, on the Triton kernels, and a hybrid.
MODELS = {
    "Qwen3": (lambda: tiny("Qwen3", head_dim=16), "triton"),
    "Qwen3.5": (lambda: hybrids.tiny("qwen3_5_text", vocab_size=512), "blockwise"),
}


def gradients(family: str) -> dict:
    build, backend = MODELS[family]
    model = build()
    mesh = torch.distributed.init_device_mesh("cpu", (2,))
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    batch = batch_of((torch.distributed.get_rank() + 1,))
    found = {}
    choose = flexmask.loss._library_loss
    for way in ("own", "fused", "chunks"):
        flexmask.set_backend(backend if way == "own" else "blockwise")  # Triton's interpreter is slow
        flexmask.loss.CHUNK_LOGITS = 5 * 512
        flexmask.loss._library_loss = choose if way == "fused" else lambda device, dtype: None
        loss = model(**batch).loss if way == "own" else flexmask.tree_loss(model, batch)
        loss.backward()
        found[way] = {name: p.grad.full_tensor() for name, p in model.named_parameters()}
        model.zero_grad(set_to_none=True)
    flexmask.loss._library_loss = choose
    flexmask.set_backend("auto")
    return found


def in_two_processes(folder: Path) -> dict:
    return {family: gradients(family) for family in MODELS}

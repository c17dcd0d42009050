"""For test_ranks.py: two steps of the Trainer in every mode, with a save between them; then the second step again from what was
saved. Losses, norms of gradients and weights."""

import json
from pathlib import Path

from accelerate.state import AcceleratorState, GradientState, PartialState
from accelerate.utils import DistributedType
from models import tiny
from ranks_on_a_cpu import as_on_gpus, without_compiler
from safetensors.torch import load_file
from test_transformers import Vocabulary, rows_of_unequal_size
from transformers import set_seed
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from flexmask import OnePassCollator, OnePassTrainer, OnePassTrainingArguments, loss, pack_stream

FSDP = {"version": 2, "transformer_layer_cls_to_wrap": ["Qwen3DecoderLayer"], "state_dict_type": "FULL_STATE_DICT"}
ZERO = {
    "train_micro_batch_size_per_gpu": "auto",
    "gradient_accumulation_steps": "auto",
    "zero_allow_untested_optimizer": True,
}
FSDP2 = {"fsdp": True, "fsdp_config": FSDP}
MODES = {
    "ddp": {},
    "ddp, branch by branch": {"tokens_in_memory": 0},
    "ddp, a row on both": {"sequence_parallel_size": 2},
    "ddp, a row on both, streamed": {"sequence_parallel_size": 2},
    "fsdp2": FSDP2,
    "fsdp2, branch by branch": FSDP2 | {"tokens_in_memory": 0},
    "fsdp2, a row on both": FSDP2 | {"sequence_parallel_size": 2},
    "fsdp2, logits in chunks": FSDP2,
    "fsdp2, fused loss": FSDP2,
}
for stage in (2, 3):  # last: once DeepSpeed has run in a process, others hang
    of_stage = {"stage": stage} | ({"stage3_gather_16bit_weights_on_model_save": True} if stage == 3 else {})
    MODES[f"zero{stage}"] = {"deepspeed": ZERO | {"zero_optimization": of_stage}}
    MODES[f"zero{stage}, a row on both"] = MODES[f"zero{stage}"] | {"sequence_parallel_size": 2}
MODES |= {f"zero3, {way}": MODES["zero3"] for way in ("logits in chunks", "fused loss")}

WRAPPERS = {"ddp": "DistributedDataParallel", "fsdp2": "FSDPQwen3ForCausalLM", "zero2": "DeepSpeedEngine"}
WRAPPERS["zero3"] = WRAPPERS["zero2"]


_LIBRARY_LOSS, _CROSS_ENTROPY = loss._library_loss, loss._cross_entropy
most: list[int] = []  # how many targets had their logits at the same time


def cross_entropy(logits, targets):
    most.append(len(targets))
    return _CROSS_ENTROPY(logits, targets)


loss._cross_entropy = cross_entropy


CHUNK = 30


def train(folder: Path, mode: str, ranks: int, resume: bool = False) -> dict:
    """With Adam, decay and clipping; every step has two rows, whatever the number of ranks."""
    set_seed(0)
    options = json.loads(json.dumps(MODES[mode])) if ranks > 1 else {}
    way = mode.rpartition(", ")[2]
    # The smallest of the four rows has fewer targets, so that one rank has all logits at once while the other goes by chunks.
    loss.CHUNK_LOGITS = CHUNK * 512 if way in ("logits in chunks", "fused loss") else 2**26
    loss._library_loss = (lambda *_: None) if way == "logits in chunks" else _LIBRARY_LOSS
    most.clear()
    accumulated = 2 // (ranks // options.get("sequence_parallel_size", 1))
    model = tiny("Qwen3")  # before DeepSpeed is told of, which would make other weights
    arguments = OnePassTrainingArguments(
        str(folder), max_steps=2, learning_rate=1e-2, adam_epsilon=1e-3, gradient_accumulation_steps=accumulated,
        use_cpu=True, save_strategy="steps", save_steps=1, logging_steps=1, disable_tqdm=True, weight_decay=0.1, **options,
    )  # fmt: skip
    if arguments.fsdp:
        as_on_gpus()
    if arguments.deepspeed:
        without_compiler()
    rows = rows_of_unequal_size("turn")
    streamed = pack_stream(rows, max(map(len, rows)), buffer_size=1) if mode.endswith("streamed") else rows
    trainer = OnePassTrainer(model, arguments, train_dataset=streamed, data_collator=OnePassCollator(Vocabulary()))
    trainer.train(resume_from_checkpoint=str(folder / "checkpoint-1") if resume else None)
    trainer.save_model(str(folder / "final"))
    history = trainer.state.log_history
    found = {name: {e["step"]: float(e[name]) for e in history if name in e} for name in ("loss", "grad_norm")}
    if resume or ranks == 1:
        found["evaluated"] = trainer.evaluate(rows)["eval_loss"], trainer.predict(rows).metrics["test_loss"]
    weights = load_file(folder / "final" / "model.safetensors") if trainer.is_world_process_zero() else None
    return found | {"weights": weights, "wrapped": type(trainer.model_wrapped).__name__, "logits": max(most, default=0)}


def in_every_mode(folder: Path, ranks: int) -> dict:
    found = {}
    for mode in MODES:
        for resume in (False, True):
            found[mode, resume] = train(folder / mode, mode, ranks, resume)
            forget_accelerate()
    return found


def forget_accelerate() -> None:
    AcceleratorState._reset_state()
    GradientState._reset_state()
    PartialState._shared_state["distributed_type"] = DistributedType.MULTI_CPU
    unset_hf_deepspeed_config()


def in_two_processes(folder: Path) -> dict:
    Vocabulary.save_pretrained = lambda *_, **__: None
    forget_accelerate()
    return in_every_mode(folder, ranks=2)

"""Losses in the place of logits: computed where a model calls its output layer.

A wrapper that spreads the weights of that layer over ranks (FSDP2, ZeRO 3) gathers them for a call of it, and every rank must
call it as often as the others; so all targets go through one call, within which they can be taken in chunks.
"""

from __future__ import annotations

import weakref
from collections import OrderedDict
from collections.abc import Callable, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel
from transformers.utils import ModelOutput


@contextmanager
def aside():
    """Without gradients, and without autocast's cache: older versions of PyTorch keep weights in it that were cast without, and
    what follows would not train them (pytorch #158232)."""
    cached = torch.is_autocast_cache_enabled()
    torch.set_autocast_cache_enabled(False)
    try:
        with torch.no_grad():
            yield
    finally:
        torch.set_autocast_cache_enabled(cached)


class OutputLayer:
    """The output layer in a forward of its model, with what the model does to logits after it (soft-cap, scale)."""

    def __init__(self, inner: PreTrainedModel, head: torch.nn.Module, place: _Place, inputs: Mapping[str, Tensor]):
        self._inner, self._head, self._place, self._inputs = inner, head, place, inputs
        # What gave the states, and all that it gave beside them. (That is `inner.base_model`, but not of OPT.)
        self.body: tuple[PreTrainedModel, ModelOutput] | None = None
        self.is_spread = _is_spread(head)
        # Chunks of one that is spread go around its hooks, which are those of the one call that all of them are in.
        self.call = head.forward if self.is_spread else head
        is_linear = type(head).forward is torch.nn.Linear.forward and "forward" not in head.__dict__
        self._is_linear = is_linear and (self.is_spread or not (head._forward_hooks or head._forward_pre_hooks))

    def logits(self, states: Tensor) -> Tensor:
        """The model's logits (1, n, vocabulary) of what it gave to the layer (1, n, hidden)."""
        return self.finished(self.call(states))

    def linear(self, states: Tensor) -> tuple[Tensor, Tensor | None] | None:
        """(weight, bias) in the dtype of logits (that of autocast, too, wherever it was switched on); None if the model's logits
        are not these applied to the states and nothing else.

        Args:
            states: (1, n, hidden), n ≥ 1.
        """
        weight, bias = self._head.weight if self._is_linear else None, getattr(self._head, "bias", None)
        if weight is None or isinstance(weight, DTensor) or not weight.numel():
            return None
        with aside():  # is there anything after the layer? Zeros would not tell.
            logits = self.call(states[:, -1:])
            finished = self.finished(logits.clone())
            if not logits.any() or not torch.equal(finished, logits.to(finished.dtype)):
                return None
        return weight.to(logits.dtype), None if bias is None else bias.to(logits.dtype)

    def finished(self, logits: Tensor) -> Tensor:
        """What the model makes of the layer's logits (1, n, any number): its forward, in which nothing else runs."""
        body, output = self.body
        nothing = logits.new_zeros(*logits.shape[:2], output.last_hidden_state.shape[-1])
        output = type(output)(**{**output, "last_hidden_state": nothing})
        inputs = {**self._inputs, "subtree_end": None, "logits_to_keep": 0, "use_cache": False}
        nothing_runs = {"forward": lambda *args, **kwargs: output} | {name: OrderedDict() for name in _HOOKS}
        with _replaced(body.__dict__, **nothing_runs), _in_place_of(self._head, self._place, lambda states: logits):
            # Of the class: what a wrapper has put around the model's own forward is running already, and Accelerate's autocast
            # stays on for good if it is entered twice.
            return type(self._inner).forward(self._inner, **inputs).logits


def run_with_losses(
    model: torch.nn.Module,
    inner: PreTrainedModel,
    inputs: Mapping[str, Tensor],
    losses: Callable[[OutputLayer, Tensor], Tensor],
) -> tuple[Tensor | None, Tensor | None]:
    """Run a model with other numbers in the place of its logits.

    Args:
        model: around `inner`, or it.
        inner: the Hugging Face model.
        inputs: of the model; logits_to_keep are M places.
        losses: called in the forward with the output layer and what the model gives to it, (1, M, hidden) -> a tensor of any
            shape.

    Returns:
        What `losses` gave, with a backward through whatever is around the model; or the model's logits, if it has not called its
        output layer as others do; or neither, and nothing has run, if it is clear before that it cannot.

    Raises:
        RuntimeError: the model called the layer several times, or something around it changes logits.
    """
    head = inner.get_output_embeddings()
    parts = (m for m in inner.modules() if isinstance(m, PreTrainedModel))
    bodies = [m for m in dict.fromkeys((*parts, inner.base_model)) if m is not inner]
    # The module that has it, and under which name.
    place = next(((m, name) for m in inner.modules() for name, x in m._modules.items() if x is head), None)
    if head is None or place is None or not bodies or not _takes_chunks(head):
        return None, None
    layer, detour = OutputLayer(inner, head, place, inputs), _Detour()

    def keep(module, args, output):  # the last one to end is the outermost
        if isinstance(output, ModelOutput) and "last_hidden_state" in output:
            layer.body = module, output

    @torch.compiler.disable
    def call(states: Tensor) -> Tensor:
        if layer.body is None:
            return layer.call(states)
        if detour.value is not None:
            raise RuntimeError(
                f"{type(inner).__name__} calls its output layer several times in a forward, expected once"
            )
        value = losses(layer, states)
        with aside():
            detour.expected = layer.finished(value.new_ones(1, 1, 1))
        return detour.enter(value)

    hooks = [body.register_forward_hook(keep) for body in bodies]
    try:
        with _replaced(head.__dict__, forward=call) if layer.is_spread else _in_place_of(head, place, call):
            output = model(**inputs, use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    if detour.value is None:
        return None, output.logits
    if not torch.allclose(output.logits, detour.expected.to(output.logits), rtol=1e-2):  # some wrappers round
        raise RuntimeError(
            f"something around {type(inner).__name__} changes its logits (a forward hook, a forward of its own), which a loss in "
            "their place does not see; take it away"
        )
    return detour.leave(output.logits), None


def _is_spread(head: torch.nn.Module) -> bool:
    """Whether every call of the layer gathers its weights from all ranks, and may let go of them afterwards."""
    return isinstance(head, FSDPModule | FullyShardedDataParallel) or _is_spread_by_deepspeed(head)


def _is_spread_by_deepspeed(module: torch.nn.Module) -> bool:
    return any(hasattr(p, "ds_id") for p in module.parameters())


def _takes_chunks(head: torch.nn.Module) -> bool:
    """If it is spread: whether only calls of the layer itself gather weights, and its hooks do nothing else."""
    if not _is_spread(head):
        return True
    parts = [m for m in head.modules() if m is not head]
    if isinstance(head, FullyShardedDataParallel) or any(isinstance(m, FSDPModule) for m in parts):
        return False
    if parts and _is_spread_by_deepspeed(head):
        return False
    return all(
        hook.__module__.startswith(("torch.distributed.", "deepspeed.")) for hook in head._forward_hooks.values()
    )


# ------------------------------------------------------------------------------------------- what stands in for a while


class _StandIn(torch.nn.Module):
    """Kept with the layer that it stands in for: a compiled model would be compiled anew for another one."""

    run: Callable[[Tensor], Tensor] | None = None
    head: Callable[[], torch.nn.Module | None] = staticmethod(lambda: None)  # a weak reference

    def __getattr__(self, name: str):
        """What a model asks its output layer for, beside calling it: `lm_head.weight.dtype`."""
        head = self.head()
        return getattr(head, name) if head is not None else super().__getattr__(name)

    @torch.compiler.disable
    def forward(self, states: Tensor) -> Tensor:
        return self.run(states)


_STAND_INS: weakref.WeakKeyDictionary[torch.nn.Module, _StandIn] = weakref.WeakKeyDictionary()


_Place = tuple[torch.nn.Module, str]
_HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")


@contextmanager
def _in_place_of(head: torch.nn.Module, place: _Place, run: Callable[[Tensor], Tensor]):
    """The model calls this in place of its output layer."""
    stand_in = _STAND_INS.get(head)
    if stand_in is None:
        stand_in = _STAND_INS[head] = _StandIn()
        stand_in.head = weakref.ref(head)
    parent, name = place
    with _replaced(parent._modules, **{name: stand_in}), _replaced(stand_in.__dict__, run=run):
        yield


@contextmanager
def _replaced(of: dict, **entries):
    """Entries of a dictionary, for a while."""
    own = {name: of[name] for name in entries if name in of}
    of.update(entries)
    try:
        yield
    finally:
        for name in entries.keys() - own.keys():
            del of[name]
        of.update(own)


# --------------------------------------------------------------------------------------------------------- the way out


class _Detour:
    """Takes a value around what a model and its wrappers do to logits on their way out, and its gradient around it on the way
    back. In the place of logits goes a one, so that all of them (FSDP, DDP) see something pass."""

    def __init__(self):
        self.value: Tensor | None = None
        self.expected: Tensor | None = None  # what should come out of the model
        self.grad: Tensor | None = None

    def enter(self, value: Tensor) -> Tensor:
        self.value, self._has_grad = value.detach(), value.requires_grad
        return _Enter.apply(value, self)

    def leave(self, passed: Tensor) -> Tensor:
        if self._has_grad and not passed.requires_grad:
            raise RuntimeError("the output of the model's last layer goes backward, and that of the model does not")
        return _Leave.apply(passed, self)


class _Enter(torch.autograd.Function):
    @staticmethod
    def forward(ctx, value, detour):
        ctx.detour = detour
        return value.new_ones(1, 1, 1)

    @staticmethod
    def backward(ctx, grad):
        return ctx.detour.grad, None


class _Leave(torch.autograd.Function):
    @staticmethod
    def forward(ctx, passed, detour):
        ctx.detour, ctx.passed = detour, passed.detach()
        return detour.value.clone()

    @staticmethod
    def backward(ctx, grad):
        ctx.detour.grad = grad
        return torch.zeros_like(ctx.passed), None

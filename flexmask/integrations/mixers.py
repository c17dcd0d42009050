"""The library's recurrent and convolutional layers, over a tree.

Its mixers call their kernels as functions of the modelling module, and hand them every keyword of `model(…)`. So our
functions take the place of those there: with `subtree_end` they compute along the tree, without it they are the library's.
And because a layer that never asks us would be wrong in silence, a model counts who asked in each forward of a tree.
"""

from __future__ import annotations

import functools
import inspect
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from types import CodeType, ModuleType

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..recurrence import tree_conv, tree_scan

# Types of layers that mix tokens by recurrences or convolutions; "hybrid" ones by attention, too.
RECURRENT = {"conv", "hybrid", "linear_attention", "mamba"}


# ------------------------------------------------------------------------------------- in place of the library's functions


def _convolution(library, hidden_states, weight, bias=None, activation=None, *, subtree_end, **kwargs):
    _refuse_others(kwargs, "seq_idx", "initial_states", "return_final_states", "final_states_out")

    def conv(x: Tensor) -> Tensor:
        return library(x, weight, bias, activation=activation)

    return tree_conv(hidden_states, weight.shape[-1], subtree_end, conv)


def _delta_rule(
    library,
    query,
    key,
    value,
    g=None,
    beta=None,
    *,
    subtree_end,
    scale=None,
    use_qk_l2norm_in_kernel=False,
    output_final_state=False,
    **kwargs,
):
    _refuse_others(kwargs, "initial_state", "cu_seqlens", "use_gate_in_kernel")
    if use_qk_l2norm_in_kernel:
        query, key = (_normalized(x) for x in (query, key))
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    return tree_scan(query, key, value, g, beta, subtree_end, scale=scale), None


def _normalized(x: Tensor) -> Tensor:
    x = x if x.dtype == torch.float64 else x.float()
    return x * torch.rsqrt((x * x).sum(-1, keepdim=True) + 1e-6)


def _mamba2(
    library,
    hidden_states,
    dt,
    A,
    B,
    C,
    chunk_size=None,
    D=None,
    *,
    subtree_end,
    dt_bias=None,
    dt_softplus=False,
    dt_limit=(0.0, float("inf")),
    **kwargs,
):
    _refuse_others(kwargs, "initial_states", "return_final_states", "seq_idx", "cu_seqlens", "z")
    exact = torch.float64 if hidden_states.dtype == torch.float64 else torch.float32
    dt = dt if dt_bias is None else dt + dt_bias.to(dt.dtype)
    dt = (torch.nn.functional.softplus(dt) if dt_softplus else dt).clamp(*dt_limit).to(exact)
    x = hidden_states.to(exact)
    out = tree_scan(C, B, x * dt[..., None], A.to(exact) * dt, None, subtree_end)
    if D is not None:
        out = out + x * D.to(exact).view(-1, 1)
    return out.to(hidden_states.dtype)


def _unfused(library, *args, subtree_end, **kwargs) -> None:
    """No fused kernel: the library then takes the way of single functions."""


def _refuse_others(kwargs: dict, *names: str) -> None:
    found = [name for name in names if kwargs.get(name) is not None and kwargs[name] is not False]
    if found:
        raise ValueError(f"got {' and '.join(found)} beside subtree_end; a tree batch is a whole row and takes neither")


_OURS = {
    "causal_conv1d_fn": _convolution,
    "chunk_kimi_delta_attention": _delta_rule,
    "mamba2_chunk_scan": _mamba2,
    "mamba2_split_conv1d_scan_combined": _unfused,
    "torch_chunk_gated_delta_rule": _delta_rule,
}
_SCANS = {"chunk_kimi_delta_attention", "mamba2_chunk_scan", "torch_chunk_gated_delta_rule"}
_ATTENTION = "ALL_ATTENTION_FUNCTIONS"  # through which the library's attention layers find theirs
# Functions with a state that have no counterpart of ours.
_OTHERS = {"mamba_selective_scan", "mamba_inner_fn"}


def install(model_class: type) -> None:
    """Put our functions where the modules of a model class call the library's; once, process-wide.

    Models that are never called with `subtree_end` do not notice: the library's function is called as before.
    """
    for module in _modules(model_class):
        for name, ours in _OURS.items():
            library = vars(module).get(name)
            if callable(library) and not hasattr(library, "_flexmask"):
                setattr(module, name, _over_tree(name, library, ours))


def _over_tree(name: str, library: Callable, ours: Callable) -> Callable:
    @functools.wraps(library)
    def function(*args, subtree_end: Tensor | None = None, **kwargs):
        if subtree_end is None:
            return library(*args, **kwargs)
        _noted.calls[name] += 1
        return ours(library, *args, subtree_end=subtree_end, **kwargs)

    function._flexmask = True
    return function


def _modules(model_class: type) -> list[ModuleType]:
    """The modelling module of a class, and those of the classes that it comes from."""
    names = dict.fromkeys(cls.__module__ for cls in model_class.__mro__)
    return [sys.modules[name] for name in names if "modeling_" in name and name in sys.modules]


# ------------------------------------------------------------------------------------------------------- what is refused


def refusal(model_class: type, layer_types: tuple[str, ...]) -> str | None:
    """Why the recurrent layers of a model would be trained wrongly, or None; judged by what the code of its layers calls."""
    called, without_keywords = set(), []
    for module in _modules(model_class):
        for cls in vars(module).values():
            if isinstance(cls, type) and issubclass(cls, torch.nn.Module) and cls.__module__ == module.__name__:
                names = _called(cls)
                called |= names
                kinds = [p.kind for p in inspect.signature(cls.forward).parameters.values()]
                if names & _OURS.keys() and inspect.Parameter.VAR_KEYWORD not in kinds:
                    without_keywords.append(cls.__name__)
    kinds = ", ".join(sorted(set(layer_types) & RECURRENT)) or "recurrent"
    if called & _OTHERS:
        return f"its layers call {', '.join(sorted(called & _OTHERS))}, which takes no state of another run (Mamba 1)"
    if not called & (_OURS.keys() if set(layer_types) & {"conv"} else _SCANS):
        return (
            f"its layers of type {kinds} carry a state in code of their own, which would take one branch into the next"
        )
    if without_keywords:
        return f"in this version of transformers {', '.join(without_keywords)} does not receive subtree_end"
    return None


@functools.cache
def _called(cls: type) -> set[str]:
    """Names that the methods of a module class use: of functions of its module among others."""
    names: set[str] = set()
    for base in cls.__mro__[: cls.__mro__.index(torch.nn.Module)]:
        for method in vars(base).values():
            if inspect.isfunction(method):
                names.update(_names(inspect.unwrap(method).__code__))
    return names


def _names(code: CodeType) -> set[str]:
    return set(code.co_names).union(*(_names(inner) for inner in code.co_consts if isinstance(inner, CodeType)))


# ----------------------------------------------------------------------------------------------------- who asked, and who not


class _Noted(threading.local):
    """In the forward of a tree: attention modules that called our function, and how often each of the others was called."""

    def __init__(self):
        self.attention: set[int] = set()
        self.calls: Counter = Counter()


_noted = _Noted()


def note_attention(module: torch.nn.Module) -> None:
    if not torch.compiler.is_compiling():
        _noted.attention.add(id(module))


def watch(model: torch.nn.Module) -> None:
    """Let a base model see to it that, in a forward of a tree, every layer that mixes tokens does it along the tree."""
    if _before not in model._forward_pre_hooks.values():
        model.register_forward_pre_hook(_before, with_kwargs=True)
        model.register_forward_hook(_after, with_kwargs=True)


def _before(model: torch.nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
    if kwargs.get("subtree_end") is None:
        return None
    _refuse_others(kwargs, "past_key_values", "cu_seq_lens_q", "seq_idx")
    if not torch.compiler.is_compiling():
        _noted.attention.clear()
        _noted.calls.clear()
    return args, kwargs | {"use_cache": False}  # or the library would fill a cache in training, too


def _after(model: torch.nn.Module, args: tuple, kwargs: dict, output) -> None:
    if kwargs.get("subtree_end") is None or torch.compiler.is_compiling():
        return
    expected: Counter = Counter()
    mixing: list[str] = []  # names of the modules that mix tokens
    for name, module in model.named_modules():
        called = set() if isinstance(module, PreTrainedModel) else _called(type(module))
        if _ATTENTION in called and id(module) not in _noted.attention:
            raise _not_asked(model, f"{name} ({type(module).__name__})")
        asks = called & (_SCANS | {_ATTENTION, "causal_conv1d_fn"})
        expected.update(asks - {_ATTENTION})
        if asks:
            mixing.append(name)
    for name, count in expected.items():
        if _noted.calls[name] < count:
            raise _not_asked(model, f"{count - _noted.calls[name]} of {count} layers that call {name}")
    for name, layer in _layers(model):
        if not any(mixer.startswith(f"{name}.") for mixer in mixing):
            raise _not_asked(model, f"{name} ({type(layer).__name__})")


def _layers(model: torch.nn.Module) -> Iterator[tuple[str, torch.nn.Module]]:
    """Its layers that should mix tokens: all but those of experts and the like, of which a configuration may tell."""
    types = getattr(model.config, "layer_types", None) or [None] * model.config.num_hidden_layers
    layers = getattr(model, "layers", ())
    for index, (kind, layer) in enumerate(zip(types, layers, strict=False)):
        if kind not in ("mlp", "moe"):
            yield f"layers.{index}", layer


def _not_asked(model: torch.nn.Module, who: str) -> NotImplementedError:
    return NotImplementedError(
        f"{type(model).__name__}: in the forward of a tree batch {who} did not ask flexmask, and so took the tree for one "
        "long sequence; undo what has replaced its code (another library, use_kernels=True), or use N passes"
    )

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
from collections.abc import Callable
from types import CodeType, ModuleType

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from ..recurrence import tree_conv, tree_scan
from ..recurrence.chunks import exact

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
    x = x.to(exact(x))
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
    dtype = exact(hidden_states)
    dt = dt if dt_bias is None else dt + dt_bias.to(dt.dtype)
    dt = (torch.nn.functional.softplus(dt) if dt_softplus else dt).clamp(*dt_limit).to(dtype)
    x = hidden_states.to(dtype)
    out = tree_scan(C, B, x * dt[..., None], A.to(dtype) * dt, None, subtree_end)
    if D is not None:
        out = out + x * D.to(dtype).view(-1, 1)
    return out.to(hidden_states.dtype)


def _unfused(library, *args, subtree_end, **kwargs) -> None:
    """No fused kernel: the library then takes the way of single functions."""


def _refuse_others(kwargs: dict, *names: str) -> None:
    found = [name for name in names if kwargs.get(name) is not None and kwargs[name] is not False]
    if found:
        raise ValueError(f"got {' and '.join(found)} beside subtree_end; a tree batch is a whole row by itself")


_OURS = {
    "causal_conv1d_fn": _convolution,
    "chunk_kimi_delta_attention": _delta_rule,
    "mamba2_chunk_scan": _mamba2,
    "mamba2_split_conv1d_scan_combined": _unfused,
    "torch_chunk_gated_delta_rule": _delta_rule,
}
_CONVOLUTION = "causal_conv1d_fn"
_SCANS = {"chunk_kimi_delta_attention", "mamba2_chunk_scan", "torch_chunk_gated_delta_rule"}
# Functions with a state that have no counterpart of ours.
_OTHERS = {"mamba_selective_scan", "mamba_inner_fn"}


_installed: set[type] = set()


def install(model_class: type) -> None:
    """Put our functions where the modules of a model class call the library's; once, process-wide.

    Models that are never called with `subtree_end` do not notice: the library's function is called as before.
    """
    _installed.add(model_class)
    for module in _modules(model_class):
        for name, ours in _OURS.items():
            library = vars(module).get(name)
            if callable(library) and not hasattr(library, "_flexmask"):
                setattr(module, name, _over_tree(name, library, ours))


def is_installed(model_class: type | None) -> bool:
    """Whether `install` was called for a model class, or there is nothing to put anywhere. Every layer asks."""
    if model_class is None or model_class in _installed:
        return True
    functions = (vars(module).get(name) for module in _modules(model_class) for name in _OURS)
    return all(hasattr(function, "_flexmask") for function in functions if callable(function))


def _over_tree(name: str, library: Callable, ours: Callable) -> Callable:
    @functools.wraps(library)
    def function(*args, subtree_end: Tensor | None = None, **kwargs):
        if subtree_end is None:
            return library(*args, **kwargs)
        _refuse_others(kwargs, "hand_over", "rank_share")
        note(name)
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
        return (
            f"its layers call {', '.join(sorted(called & _OTHERS))}, and Mamba 1's scan cannot start from a state that it is "
            "given, as the branches of a tree must"
        )
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
            function = inspect.unwrap(method) if inspect.isfunction(method) else None
            if inspect.isfunction(function):
                names.update(_names(function.__code__))
    return names


def _names(code: CodeType) -> set[str]:
    return set(code.co_names).union(*(_names(inner) for inner in code.co_consts if isinstance(inner, CodeType)))


# ----------------------------------------------------------------------------------------------------- who asked, and who not

_ATTENTION = "attention"


class _Noted(threading.local):
    """Of the forward that runs: whether it is of a tree, what was asked so far, and what had been when a layer began."""

    def __init__(self):
        self.is_tree = False
        self.asked: Counter = Counter()
        self.before: dict[int, Counter] = {}
        self.kinds: dict[int, tuple[str, str | None]] = {}


_noted = _Noted()


def note(what: str = _ATTENTION) -> None:
    """One of our functions was asked: attention, or the one in place of a function of the library."""
    if not torch.compiler.is_compiling():
        _noted.asked[what] += 1


def watch(model: PreTrainedModel) -> None:
    """Let the bodies of text models in a model see to it that, in a forward of a tree, every layer that runs mixes tokens along
    the tree. Not under torch.compile, where nothing can be noted."""
    for module in model.modules():
        is_body = isinstance(module, PreTrainedModel) and not module.can_generate()
        if is_body and module.config is module.config.get_text_config(decoder=True):
            _hook(module, _before_model, _after_model)


def _hook(module: torch.nn.Module, before: Callable, after: Callable) -> None:
    if before not in module._forward_pre_hooks.values():
        module.register_forward_pre_hook(before, with_kwargs=True)
        module.register_forward_hook(after, with_kwargs=True)


def _before_model(model: PreTrainedModel, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
    return args, begin(model, kwargs)


def begin(model: PreTrainedModel, kwargs: dict) -> dict:
    """Before the forward of a body. Returns the keywords that it should be called with.

    Raises:
        ValueError: a cache or packed sequences beside a tree.
    """
    is_tree = kwargs.get("subtree_end") is not None
    if is_tree:
        if not torch.compiler.is_compiling() and type(model) not in _installed:
            install(type(model))  # the model was unpickled, which nobody is told
        _refuse_others(kwargs, "past_key_values", "cu_seq_lens_q", "seq_idx")
        kwargs = kwargs | {"use_cache": False}  # or the library would fill a cache in training, too
    if not torch.compiler.is_compiling():
        _noted.is_tree = is_tree
        if is_tree:
            for module in model.modules():  # which may have been changed since
                if isinstance(module, GradientCheckpointingLayer):  # the library's name for a layer of a stack
                    _hook(module, _before_layer, _after_layer)
            _noted.kinds = _kinds(model)
    return kwargs


def _after_model(model: PreTrainedModel, args: tuple, kwargs: dict, output) -> None:
    if not torch.compiler.is_compiling():
        _noted.is_tree = False
    if kwargs.get("subtree_end") is not None and getattr(output, "router_logits", None):
        # Those of padding would count in the loss that is made of them. The library leaves them out by an attention_mask.
        end, positions = kwargs["subtree_end"], kwargs["position_ids"]
        places = torch.arange(end.shape[1], device=end.device)
        real = ((positions != 0) | (end != places + 1)).flatten()
        output.router_logits = tuple(logits.flatten(0, -2)[real] for logits in output.router_logits)


def _before_layer(layer: torch.nn.Module, args: tuple, kwargs: dict) -> None:
    if not torch.compiler.is_compiling() and _noted.is_tree:
        _noted.before[id(layer)] = _noted.asked.copy()


def _after_layer(layer: torch.nn.Module, args: tuple, kwargs: dict, output) -> None:
    """Raises NotImplementedError where the layer has not asked for all that it should have."""
    if torch.compiler.is_compiling() or not _noted.is_tree:
        return  # in a recomputation, too, which is of a forward that was watched
    asked = _noted.asked - _noted.before.pop(id(layer))
    name, kind = _noted.kinds.get(id(layer), (type(layer).__name__, None))
    convolutions = sum(
        _CONVOLUTION in _called(type(module))
        for name, module in layer.named_modules()
        if "modules_to_save" not in name.split(".")  # PEFT's copies, of which one runs in place of the original
    )
    attends = kind == "hybrid" or kind not in RECURRENT | _WITHOUT | {None}
    lacks = {
        "attention": attends and not asked[_ATTENTION],
        "recurrence": kind in RECURRENT - {"conv"} and not any(asked[scan] for scan in _SCANS),
        "convolution": asked[_CONVOLUTION] < max(convolutions, kind == "conv"),
        "mixing of tokens": kind is None and not asked,
    }
    missing = [what for what, is_missing in lacks.items() if is_missing]
    if missing:
        raise NotImplementedError(
            f"in the forward of a tree batch {name} ({type(layer).__name__}) did not ask flexmask for its "
            f"{' and '.join(missing)}, and so took the tree for one long sequence; undo what has replaced its code (another "
            "library, use_kernels=True), or use N passes"
        )


_WITHOUT = {"mlp", "moe"}  # kinds of layers that mix no tokens


def _kinds(model: PreTrainedModel) -> dict[int, tuple[str, str | None]]:
    """Of each layer, by its id: its name, and its type where the configuration tells."""
    types = getattr(model.config, "layer_types", None) or ()
    found = {}
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.ModuleList):
            of_stack = types if len(types) == len(module) else [None] * len(module)
            for index, (layer, kind) in enumerate(zip(module, of_stack, strict=True)):
                found[id(layer)] = f"{name}.{index}", kind
    return found

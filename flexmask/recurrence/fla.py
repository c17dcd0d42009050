"""Recurrences along a tree by the Triton kernels of `flash-linear-attention` (fla), on a GPU in 16 bits.

Its kernels know packed sequences, and so does a tree if its runs are the sequences: all but one kind of kernel work within
chunks, and one call serves the row. States alone go from run to run: of fla's own forward and backward, the functions that
make them are replaced by ours, which call them for the runs of one level after the other and hand the final states on. That
is a launch for each level beside 13 for the whole row (about 20 in the backward), and no token is computed twice. The row is
brought into the order of levels first, so that those of a level are a slice. Where the chunks of a run begin is counted once, and
not by fla in each of those calls, for which it would wait for the GPU.

What a layer computes is rounded as in fla's own models: states at the beginning of chunks to 16 bits.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import inspect
import types
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from einops import rearrange, repeat
from torch import Tensor
from transformers.utils import logging

from ..chains import chains
from ..mask import once_per_forward

logger = logging.get_logger(__name__)

CHUNK = 64  # the tokens of a chunk of fla
_LARGEST_KEY = 256


def serves(query: Tensor, key: Tensor, value: Tensor, gate: Tensor, beta: Tensor | None) -> bool:
    """Whether the kernels can be used for a call of `tree_scan`. What keeps them from it is told once."""
    if not value.is_cuda or _dtype(query, key, value).itemsize != 2 or key.shape[-1] > _LARGEST_KEY:
        return False
    if beta is None and gate.ndim == 4:
        return False
    missing = _missing(gate.ndim == 4)
    if missing:
        logger.warning_once(f"flexmask: {missing}, so recurrent layers run in PyTorch; exact, but slower")
    return not missing


@functools.cache
def _missing(per_channel: bool) -> str | None:
    """Why fla cannot train a recurrence, or None."""
    if _kernels("gated_delta_rule") is None:
        return "flash-linear-attention is not installed (pip install flash-linear-attention)"
    if unknown := _unknown():
        return f"this version of flash-linear-attention has another {' and '.join(unknown)} than 0.6"
    kernels = importlib.import_module("fla.ops.common.chunk_o")
    known = ("IS_NVIDIA_HOPPER", "TRITON_ABOVE_3_4_0", "TRITON_ABOVE_3_7_1")
    hopper, from_3_4, from_3_7_1 = (getattr(kernels, name, False) for name in known)
    if hopper and from_3_4 and not from_3_7_1 and not per_channel and importlib.util.find_spec("tilelang") is None:
        return "fla's backward is wrong with Triton before 3.7.1 on this GPU, as it says itself (update triton)"
    return None


def forward(query, key, value, gate, beta, subtree_end: Tensor, scale: float) -> Tensor:
    """Arguments and result as of `tree_scan`."""
    plan = once_per_forward(_plan, subtree_end)
    q, k, v, g, b = _inputs(query, key, value, gate, beta, plan)
    if beta is None:
        out, _ = _on_tree("chunk_simple_gla_fwd", plan)(q=q, k=k, v=v, g=_summed(g, plan), scale=scale, **plan.row)
    else:
        name, place = ("chunk_gated_delta_rule_fwd", 1) if gate.ndim == 3 else ("chunk_kda_fwd", 0)
        options = {"initial_state": None, "output_final_state": False} | plan.row
        out = _on_tree(name, plan)(q=q, k=k, v=v, g=g, beta=b, scale=scale, **options)[place]
    return plan.back(out, value).to(value.dtype)


def backward(
    d_out: Tensor, query, key, value, gate, beta, subtree_end: Tensor, scale: float
) -> tuple[Tensor | None, ...]:
    """Gradients of the first five arguments of `forward`."""
    plan = once_per_forward(_plan, subtree_end)
    q, k, v, g, b = _inputs(query, key, value, gate, beta, plan)
    d_out = plan.in_order(d_out).to(v.dtype)
    row, g = plan.row, _summed(g, plan)
    common = {"q": q, "k": k, "v": v, "g": g, "scale": scale, "initial_state": None, "do": d_out, "dht": None} | row
    d_b = None
    if beta is None:
        d_q, d_k, d_v, d_g, _ = _on_tree("chunk_simple_gla_bwd", plan)(g_gamma=None, **common)
        d_g = _kernels("simple_gla").chunk_local_cumsum(d_g, chunk_size=CHUNK, reverse=True, **row)
        groups = value.shape[2] // key.shape[2]
        d_q, d_k = (rearrange(x, "b l (h r) k -> b l h r k", r=groups).float().sum(3) for x in (d_q, d_k))
    elif gate.ndim == 3:
        _, _, a = _kernels("gated_delta_rule").chunk_gated_delta_rule_fwd_intra(
            k=k, v=v, g=g, beta=b, chunk_size=CHUNK, **row
        )
        d_q, d_k, d_v, d_b, d_g, *_ = _on_tree("chunk_gated_delta_rule_bwd", plan)(beta=b, A=a, **common)
    else:
        *_, a_qk, a_kk = _kernels("kda.chunk_fwd").chunk_kda_fwd_intra(
            q=q, k=k, v=v, gk=g, beta=b, scale=scale, chunk_size=CHUNK, **row
        )
        d_q, d_k, d_v, d_b, d_g, *_ = _on_tree("chunk_kda_bwd", plan)(beta=b, Aqk=a_qk, Akk=a_kk, **common)
    return tuple(None if x is None else plan.back(x, value) for x in (d_q, d_k, d_v, d_g, d_b))


def _dtype(*tensors: Tensor) -> torch.dtype:
    """Of the narrowest: gates and norms make float32 of 16 bits."""
    return min((x.dtype for x in tensors), key=lambda dtype: dtype.itemsize)


def _inputs(query, key, value, gate, beta, plan: _Plan) -> tuple[Tensor | None, ...]:
    """In the order of levels; queries and keys of Mamba 2, which heads share, for each head."""
    dtype = _dtype(query, key, value)
    q, k, v = (plan.in_order(x).to(dtype) for x in (query, key, value))
    if beta is None:
        q, k = (repeat(x, "b l h k -> b l (h r) k", r=v.shape[2] // x.shape[2]).contiguous() for x in (q, k))
    return q, k, v, plan.in_order(gate).float(), None if beta is None else plan.in_order(beta)


def _summed(gate: Tensor, plan: _Plan) -> Tensor:
    """Gates summed up within chunks, as exponents of 2."""
    kernels = _kernels("gated_delta_rule")
    return kernels.chunk_local_cumsum(gate, chunk_size=CHUNK, scale=kernels.RCP_LN2, **plan.row)


# ------------------------------------------------------------------------------------------------ states, level by level


def _fwd_h(library: Callable, plan: _Plan, *, k, w, u, g=None, gk=None, **others) -> tuple[Tensor, Tensor, None]:
    states, new, final = [], [], None
    for level in plan.levels:
        of_tokens = {name: _cut(x, level.tokens) for name, x in (("k", k), ("w", w), ("u", u), ("g", g), ("gk", gk))}
        start = None if level.parents is None else final[level.parents]
        h, v_new, final = level.counted(library)(
            **of_tokens, initial_state=start, output_final_state=True, **level.row, **_unless(others, "initial_state")
        )
        states.append(h)
        new.append(v_new)
    return torch.cat(states, 1), torch.cat(new, 1), None


def _bwd_dhu(
    library: Callable, plan: _Plan, *, q, k, w, do, dv, g=None, gk=None, **others
) -> tuple[Tensor, None, Tensor]:
    d_states, d_new, d_final = [], [], None
    tensors = (("q", q), ("k", k), ("w", w), ("do", do), ("dv", dv), ("g", g), ("gk", gk))
    for level in reversed(plan.levels):
        of_tokens = {name: _cut(x, level.tokens) for name, x in tensors}
        start = (
            None if level.parents is None else k.new_empty(level.runs, dv.shape[2], k.shape[-1], dv.shape[-1]).float()
        )
        d_h, d_start, d_v = level.counted(library)(
            **of_tokens, h0=start, dht=d_final, **level.row, **_unless(others, "h0", "dht")
        )
        d_states.append(d_h)
        d_new.append(d_v)
        d_final = level.to_parents(d_start)
    return torch.cat(d_states[::-1], 1), None, torch.cat(d_new[::-1], 1)


def _gla_fwd_h(library: Callable, plan: _Plan, *, k, v, g, **others) -> tuple[Tensor, None]:
    states, final = [], None
    for level in plan.levels:
        of_tokens = {name: _cut(x, level.tokens) for name, x in (("k", k), ("v", v), ("g", g))}
        start = None if level.parents is None else final[level.parents]
        h, final = level.counted(library)(
            **of_tokens, h0=start, cu_seqlens=level.row["cu_seqlens"], **_unless(others, "h0", "output_final_state")
            | {"output_final_state": True},
        )  # fmt: skip
        states.append(h)
    return torch.cat(states, 1), None


def _gla_bwd_dh(library: Callable, plan: _Plan, *, q, k, v, g, do, **others) -> tuple[Tensor, None]:
    d_states, d_final = [], None
    for level in reversed(plan.levels):
        of_tokens = {name: _cut(x, level.tokens) for name, x in (("q", q), ("k", k), ("v", v), ("g", g), ("do", do))}
        start = None if level.parents is None else k.new_empty(level.runs, v.shape[2], k.shape[-1], v.shape[-1]).float()
        d_h, d_start = level.counted(library)(
            **of_tokens, h0=start, dht=d_final, cu_seqlens=level.row["cu_seqlens"], **_unless(others, "h0", "dht")
        )
        d_states.append(d_h)
        d_final = level.to_parents(d_start)
    return torch.cat(d_states[::-1], 1), None


def _cut(x: Tensor | None, tokens: slice) -> Tensor | None:
    return None if x is None else x[:, tokens]


def _unless(others: dict, *names: str) -> dict:
    """The options of a call but for those that are ours."""
    ours = {*names, "output_final_state", "cu_seqlens", "cu_seqlens_cpu", "chunk_indices", "chunk_offsets"}
    return {name: x for name, x in others.items() if name not in ours}


@functools.cache
def _kernels(name: str) -> types.ModuleType | None:
    """A module of fla, or None without the package."""
    if "." not in name:
        name += ".chunk"
    try:
        return importlib.import_module(f"fla.ops.{name}")
    except ImportError:
        return None


# Functions of fla, by the module of their kind, and those for states that they call, which ours take the place of.
_FORWARD_STATES = {"chunk_gated_delta_rule_fwd_h": _fwd_h}
_STATES = _FORWARD_STATES | {"chunk_gated_delta_rule_bwd_dhu": _bwd_dhu}
_GLA_FORWARD_STATES = {"chunk_fwd_h": _gla_fwd_h}
_GLA_STATES = _GLA_FORWARD_STATES | {"chunk_bwd_dh": _gla_bwd_dh}
_FUNCTIONS = {
    "chunk_gated_delta_rule_fwd": ("gated_delta_rule", _FORWARD_STATES),
    "chunk_gated_delta_rule_bwd": ("gated_delta_rule", _STATES),
    "chunk_kda_fwd": ("kda", _FORWARD_STATES),
    "chunk_kda_bwd": ("kda", _STATES),
    "chunk_simple_gla_fwd": ("simple_gla", _GLA_FORWARD_STATES),
    "chunk_simple_gla_bwd": ("simple_gla", _GLA_STATES),
}


def _unknown() -> list[str]:
    """Functions that this version of fla does not have, or that do not call what they should: states would not be ours."""
    found = []
    for name, (kind, states) in _FUNCTIONS.items():
        function = inspect.unwrap(getattr(_kernels(kind), name, None) or (lambda: None))
        if not _finds(function, *states) or not all(_finds(function.__globals__[of], _OFFSETS) for of in states):
            found.append(name)
    return found


def _finds(function: Callable, *names: str) -> bool:
    """Whether it looks these up in its module."""
    function = inspect.unwrap(function)
    return set(names) <= set(function.__code__.co_names) & function.__globals__.keys()


def _on_tree(name: str, plan: _Plan) -> Callable:
    """A function of fla that finds ours under the names of its functions for states; fla itself stays as it is."""
    kind, states = _FUNCTIONS[name]
    function = getattr(_kernels(kind), name)
    of_fla = inspect.unwrap(function).__globals__
    return _finding(function, {name: functools.partial(ours, of_fla[name], plan) for name, ours in states.items()})


def _finding(function: Callable, ours: dict[str, Callable]) -> Callable:
    """A copy of a function, without its decorators, that finds ours under their names in its module."""
    function = inspect.unwrap(function)
    copy = types.FunctionType(
        function.__code__,
        function.__globals__ | ours,
        function.__name__,
        function.__defaults__,
        function.__closure__,
    )
    copy.__kwdefaults__ = function.__kwdefaults__
    return copy


# --------------------------------------------------------------------------------------------------- the order of levels


_OFFSETS = "prepare_chunk_offsets"  # the function of fla that counts them


class _Offsets(Tensor):
    """int64 on a GPU, of which entries are known here: fla asks for the last."""

    known: np.ndarray
    __torch_function__ = torch._C._disabled_torch_function_impl

    def __getitem__(self, at: int) -> np.int64:
        return self.known[at]


@dataclass(frozen=True)
class _Level:
    """Runs with the same number of runs before them.

    Attributes:
        tokens: theirs, in the order of levels.
        runs: how many.
        row: their starts and chunks, as fla wants them.
        offsets: the first chunk of each run, and their number.
        parents: int64 (runs,), of each run the one in the level above that it continues; None in the first level.
        above: runs of the level above.
    """

    tokens: slice
    runs: int
    row: dict[str, Tensor]
    offsets: _Offsets
    parents: Tensor | None
    above: int

    def counted(self, library: Callable) -> Callable:
        """A function of fla that need not count the chunks of this level."""
        return _finding(library, {_OFFSETS: self._offsets})

    def _offsets(self, cu_seqlens: Tensor, chunk_size: int) -> _Offsets:
        if chunk_size != CHUNK:
            raise NotImplementedError(f"this version of fla has chunks of {chunk_size} tokens, expected {CHUNK}")
        return self.offsets

    def to_parents(self, d_start: Tensor | None) -> Tensor | None:
        """Gradients of final states of the level above from those of the initial states of this one."""
        if self.parents is None:
            return None
        return d_start.new_zeros(self.above, *d_start.shape[1:]).index_add_(0, self.parents, d_start)


@dataclass(frozen=True)
class _Plan:
    order: Tensor  # int64 (tokens,): which token comes where
    inverse: Tensor
    row: dict[
        str, Tensor
    ]  # starts of all runs, int32 (runs + 1,), and chunks, int32 (chunks, 2): run, and number within it
    levels: tuple[_Level, ...]

    def in_order(self, x: Tensor) -> Tensor:
        """(batch, L, …) -> (1, batch · L, …)."""
        return x.flatten(0, 1).index_select(0, self.order)[None]

    def back(self, x: Tensor, like: Tensor) -> Tensor:
        return x[0].index_select(0, self.inverse).unflatten(0, like.shape[:2])


def _plan(subtree_end: Tensor) -> _Plan:
    row = once_per_forward(chains, subtree_end)
    runs = np.argsort(row.run_level, kind="stable")
    length = (row.run_stop - row.run_start)[runs]
    starts = np.append(0, length.cumsum())
    order = np.arange(row.length) - np.repeat(starts[:-1] - row.run_start[runs], length)
    count = np.bincount(row.run_level)
    first = count.cumsum() - count  # run of each level
    rank = np.empty(len(runs), np.int64)
    rank[runs] = np.arange(len(runs)) - np.repeat(first, count)

    def tensor(x: np.ndarray, dtype=torch.int64) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(x)).to(dtype).to(subtree_end.device)

    def packed(length: np.ndarray) -> dict[str, Tensor]:
        chunks = -(-length // CHUNK)
        run = np.repeat(np.arange(len(length)), chunks)
        number = np.arange(len(run)) - np.repeat(chunks.cumsum() - chunks, chunks)
        starts, indices = np.append(0, length.cumsum()), np.stack([run, number], 1)
        return {"cu_seqlens": tensor(starts, torch.int32), "chunk_indices": tensor(indices, torch.int32)}

    def offsets(length: np.ndarray) -> _Offsets:
        known = np.append(0, (-(-length // CHUNK)).cumsum())
        found = tensor(known).as_subclass(_Offsets)
        found.known = known
        return found

    levels = []
    for level, (begin, number) in enumerate(zip(first, count, strict=True)):
        of_level = slice(begin, begin + number)
        parents = tensor(rank[row.run_parent[runs[of_level]]]) if level else None
        tokens = slice(int(starts[begin]), int(starts[begin + number]))
        above = int(count[level - 1]) if level else 0
        of_runs = length[of_level]
        levels.append(_Level(tokens, int(number), packed(of_runs), offsets(of_runs), parents, above))
    return _Plan(tensor(order), tensor(np.argsort(order)), packed(length), tuple(levels))

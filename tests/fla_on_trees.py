"""fla's Triton kernels on a tree in Triton's interpreter, against a loop over tokens in float64. Run by test_fla.py in a
process of its own: where fla can be imported, transformers would take its kernels for models on a CPU, too.

Prints, as JSON, of each kind of recurrence the relative error of the output and of each gradient, how many kernels were
launched, and how often fla counted the chunks of a row, for which it may wait for the GPU.

python fla_on_trees.py FOLDER_OF_FLA
"""

import os

os.environ["TRITON_INTERPRET"] = "1"

import builtins
import importlib
import json
import pkgutil
import sys
import warnings

from interpreter import look_up_builtins_once
from triton.runtime.autotuner import Autotuner
from triton.runtime.interpreter import InterpretedFunction

launches = counts = 0


class Counter(int):
    """A loop variable: the interpreter has plain integers, which cannot be cast; in a kernel they are tensors."""

    def to(self, *_, **__):
        return self

    def _make(name):
        plain = getattr(int, name)

        def operator(self, other):
            result = plain(self, other)
            return Counter(result) if type(result) is int else result

        return operator

    for _name in ("__add__", "__radd__", "__sub__", "__rsub__", "__mul__", "__rmul__", "__floordiv__", "__mod__"):
        locals()[_name] = _make(_name)


def counting_range(*bounds, **_):
    whole = (int(x.handle.data.item()) if hasattr(x, "handle") else int(x) for x in bounds)
    return (Counter(i) for i in builtins.range(*whole))


def prepare(folder: str) -> None:
    """Make fla's kernels run here: the first configuration of each, and loops that the interpreter can do."""
    look_up_builtins_once()
    make, run = Autotuner.__init__, InterpretedFunction.run
    Autotuner.__init__ = lambda self, fn, names, configs, *rest, **more: make(
        self, fn, names, configs[:1], *rest, **more
    )

    def counted(self, *args, **kwargs):
        global launches
        launches += 1
        return run(self, *args, **kwargs)

    InterpretedFunction.run = counted
    sys.path.insert(0, folder)
    for package in ("fla.ops.common", "fla.ops.gated_delta_rule", "fla.ops.kda", "fla.ops.simple_gla", "fla.ops.utils"):
        for module in pkgutil.walk_packages(importlib.import_module(package).__path__, f"{package}."):
            try:
                importlib.import_module(module.name)
            except ImportError:  # what is for other devices
                continue
    for name, module in list(sys.modules.items()):
        if name.startswith("fla.ops") and module is not None:
            vars(module).setdefault("range", counting_range)
            if name.startswith("fla.ops.common."):
                vars(module).update(
                    {of: in_count(x) for of, x in vars(module).items() if of == "prepare_chunk_offsets"}
                )


def in_count(function):
    def asked(*args, **kwargs):
        global counts
        counts += 1
        return function(*args, **kwargs)

    return asked


def measure(kind: str) -> dict:
    import numpy as np
    import torch
    from reference import conversation_passes, forest
    from test_recurrence import leaves, parents, problem, reference_scan

    from flexmask import TokenTree
    from flexmask.recurrence import fla

    rng = np.random.default_rng(0)
    conversations = [conversation_passes(rng, *sizes) for sizes in ((3, 4, 67, 5), (2, 1, 1, 1))]
    tree = TokenTree.concat([TokenTree.from_passes(passes) for passes in conversations])
    parent = np.append(parents(tree), [-1] * 3)
    shape = {"per_channel": kind == "kda", "delta": kind != "simple_gla", "key_size": 16, "value_size": 16}
    inputs = problem(rng, len(parent), key_heads=1, heads=1 if kind == "kda" else 2, **shape)
    end = torch.from_numpy(forest(parent)[0])[None]
    weight = torch.from_numpy(rng.normal(size=inputs[2].shape))
    weight[-3:] = 0  # padding

    exact = leaves(inputs, batch=False)
    expected = reference_scan(*exact, parent, 0.25)
    (expected * weight).sum().backward()
    rounded = [None if x is None else x[None].float() for x in inputs]
    before, counts_before = launches, counts
    out = fla.forward(*rounded, end, 0.25)
    between = launches
    found = fla.backward(weight[None].float(), *rounded, end, 0.25)

    def error(ours, theirs):
        return ((ours.double().view_as(theirs) - theirs).norm() / theirs.norm()).item()

    errors = {"out": error(out[0, :-3], expected[:-3])}
    errors |= {n: error(x, y.grad) for n, x, y in zip("qkvgb", found, exact, strict=True) if y is not None}
    levels = len(fla._plan(end).levels)
    launched = {"forward": between - before, "backward": launches - between}
    return {"errors": errors, "levels": levels, "counts": counts - counts_before, **launched}


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    prepare(sys.argv[1])
    print(json.dumps({kind: measure(kind) for kind in ("gated_delta_rule", "kda", "simple_gla")}))

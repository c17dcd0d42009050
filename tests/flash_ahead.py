"""What `flex_flash` asks of FlashAttention 4, made for an H100 that need not be here: a part of `make kernels-check`.

Inductor writes the kernels' code, forward and backward, from our mask and our score_mod. FlashAttention 4 compiles it for 9.0.
And what the code has of ours, the functions of mask and scores, is run on the CPU, where CuTe compiles it too, and compared
with the dense mask and with float64.

python tests/flash_ahead.py           # downloads 100 MB of packages, once
python tests/flash_ahead.py --lower   # the code alone, as JSON; needs no package
"""

import importlib.util
import itertools
import json
import os
import re
import site
import sys
import tempfile
import textwrap
import types
import warnings
from contextlib import nullcontext
from pathlib import Path
from time import perf_counter
from typing import NamedTuple

import pretended_cuda
from fla_package import NotInstallable, installed

PACKAGES = (
    "flash-attn-4==4.0.0b36", "nvidia-cutlass-dsl==4.8.1", "nvidia-cutlass-dsl-libs-base==4.8.1",
    "nvidia-cutlass-dsl-libs-core==4.8.1", "nvidia-cutlass-dsl-libs-cu12==4.8.1", "quack-kernels==0.6.5",
    "apache-tvm-ffi==0.1.15.post2", "torch-c-dlpack-ext==0.1.5", "cuda-bindings==12.9.10", "cuda-pathfinder==1.9.1",
    "protobuf==6.33.0",
)  # fmt: skip
# What is compiled: head size, dtype, and what else attention is asked for. A second window and a second length come back
# as numbers that vary, where the first ones are compiled in.
CASES = (
    {"size": 128},
    {"size": 64, "softcap": 2.0, "sliding_window": 40},
    {"size": 64, "softcap": 2.0, "sliding_window": 64},
    {"size": 64, "softcap": 2.0, "sliding_window": 64, "length": 600},
)
CUBINS = (4, 4, 0, 0)  # forward, backward, and what comes before and after that; none for a window or a length


class Kernels:
    """Stands in for Inductor's asynchronous compilation: keeps the code of kernels, and calls those of FlashAttention."""

    def __init__(self, run: bool):
        self.sources: dict[str, str] = {}
        self.run, self._folder = run, tempfile.TemporaryDirectory()

    def cutedsl(self, name: str, source: str, **_) -> types.SimpleNamespace:
        self.sources[name] = source
        return (
            types.SimpleNamespace(run=getattr(self.module(name, source), f"{name}_main")) if self.run else self.triton()
        )

    def triton(self, *_, **__) -> types.SimpleNamespace:
        return types.SimpleNamespace(run=lambda *_, **__: None)

    def wait(self, _):
        pass

    def module(self, name: str, source: str) -> types.ModuleType:
        """A module of this code, in a file, since CuTe reads the code of its functions."""
        path = Path(self._folder.name, f"{name}.py")
        path.write_text(source.lstrip("\n"), encoding="utf-8")
        spec = importlib.util.spec_from_file_location(name, path)
        module = sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module


def capture(kernels: Kernels) -> None:
    """Modules that Inductor has written run on fake tensors, with their kernels taken from `kernels`."""
    import torch
    from torch._inductor.graph import GraphLowering

    numbers = itertools.count()
    # Names that the CPU build has not, or that ask a real device.
    sys.modules["flexmask_kernels_ahead"] = types.SimpleNamespace(kernels=kernels)
    ours = {
        r"^async_compile = .*$": "from flexmask_kernels_ahead import kernels as async_compile; get_raw_stream = lambda _: 0",
        r"^empty_strided_cuda = .*$": "def empty_strided_cuda(size, stride, dtype):\n"
        "    return torch.empty_strided(size, stride, dtype=dtype, device='cuda')",
        r"^reinterpret_tensor = .*$": "def reinterpret_tensor(x, size, stride, offset=0):\n"
        "    return x.as_strided(size, stride, x.storage_offset() + offset)",
        r"^from torch._C._dynamo.guards import copy_if_misaligned$": "def copy_if_misaligned(x):\n    return x",
        r"^import triton.*$|^from torch._inductor.runtime.triton_heuristics.*$|^from torch._C import _cuda_getCurrent.*$": "",
    }

    def compile_to_module(graph):
        code = graph.codegen()[0].value.partition("if __name__ ==")[0]
        for pattern, text in ours.items():
            code = re.sub(pattern, text, code, flags=re.MULTILINE)
        module = kernels.module(f"graph_{next(numbers)}", code)
        module.key = module.__name__
        return module

    GraphLowering.compile_to_module = compile_to_module
    torch.cuda._DeviceGuard = lambda _: nullcontext()


def attend(size: int, length: int = 513, batch: int = 2, **options) -> None:
    """A forward and a backward of `flex_flash` on fake tensors: (batch, 4 heads, 2 of keys, length, size), bfloat16."""
    import torch
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.fx.experimental.symbolic_shapes import ShapeEnv

    from flexmask import tree_attention

    with FakeTensorMode(shape_env=ShapeEnv(), allow_non_fake_inputs=True):
        query, key, value = (
            torch.empty(batch, heads, length, size, dtype=torch.bfloat16, device="cuda", requires_grad=True)
            for heads in (4, 2, 2)
        )
        ends = torch.empty(batch, length, dtype=torch.int32, device="cuda")
        positions = torch.empty(batch, length, dtype=torch.int64, device="cuda")
        out = tree_attention(query, key, value, ends, backend="flex_flash", position_ids=positions, **options)
        torch.autograd.grad(out, (query, key, value), torch.empty_like(out))


def stand_in() -> None:
    """For a package that is not there, what Inductor asks of it to write the code."""
    for name in ("flash_attn", "flash_attn.cute", "flash_attn.cute.block_sparsity"):
        module = sys.modules[name] = types.ModuleType(name)
        module.__path__, module.__spec__ = [], importlib.util.spec_from_loader(name, None)
    module.BlockSparseTensorsTorch = NamedTuple("BlockSparseTensorsTorch", [("mask_block_cnt", None)])


def lowered() -> dict[str, str]:
    """The code of all kernels, by name."""
    stand_in()
    kernels = Kernels(run=False)
    capture(kernels)
    for case in CASES:
        attend(**case)
    return kernels.sources


def compile_all(cubins: Path) -> None:
    """A line for each case."""
    for case, expected in zip(CASES, CUBINS, strict=True):
        start = perf_counter()
        attend(**case)
        made = list(cubins.glob("*.cubin"))
        print(f"{case}: {len(made)} cubins for sm_90a in {perf_counter() - start:.0f} s", flush=True)
        assert len(made) == expected
        for path in made:  # those of the next case have the same names
            path.unlink()


def check_functions(kernels: Kernels) -> None:
    """What the kernels have of ours: masks against the dense one, soft-capped scores and their gradient against float64."""
    import torch
    from test_attention import problem

    *_, ends, positions, visible = problem(0, 96, batch=2)
    window, softcap = 7, 2.0
    near = positions[:, :, None] - positions[:, None, :] < window
    scores, gradient = torch.linspace(-9, 9, 101), torch.linspace(2, -1, 101)
    tanh = torch.tanh(scores.double() / softcap)
    for options, expected, tensors in (
        ({}, visible, [ends]),
        (
            {"softcap": softcap, "sliding_window": window},
            visible & near,
            [ends, positions, torch.nn.functional.pad(positions - window, (0, 32))],
        ),
    ):
        torch._dynamo.reset()
        kernels.sources.clear()
        attend(64, length=96, **options)
        assert len(kernels.sources) == 2
        for name, source in kernels.sources.items():
            ours = kernels.module(f"functions_{name}", _functions(source))
            assert torch.equal(_dense(ours.mask_mod, tensors, *visible.shape[:2]), expected), name
            found = {}
            if hasattr(ours, "score_mod"):
                found["scores"] = _scored(ours.score_mod, tensors, scores) - softcap * tanh
            if hasattr(ours, "score_mod_bwd"):
                found["gradient"] = _scored(ours.score_mod_bwd, tensors, scores, gradient) - gradient * (1 - tanh**2)
            errors = {what: difference.abs().max().item() for what, difference in found.items()}
            assert max(errors.values(), default=0) < 1e-6, (name, errors)
            assert bool(errors) == ("softcap" in options), name
            print(
                f"{name}: its mask is the dense one ({int(expected.sum())} of {expected.numel()} pairs) {errors or ''}"
            )


def _functions(source: str) -> str:
    """Of a kernel's code the imports and the functions for CuTe."""
    head = source[: source.index("# Kernel function signature")]
    functions = re.finditer(
        r"^    @cute\.jit\n    def (\w+)\(.*?\n(?=    \1\.__cute_hash__)", source, re.MULTILINE | re.DOTALL
    )
    return head + "\n".join(textwrap.dedent(found[0]) for found in functions)


def _dense(mask_mod, tensors, batch: int, length: int):
    """bool (batch, length, length): the mask, pair by pair."""
    import cutlass
    import torch
    from cutlass import Boolean, Int8, Int32, cute

    @cute.jit
    def fill(tensors: list, out: cute.Tensor):
        for b in range(batch):
            for q in range(length):
                for k in range(length):
                    place = (_register(Int32(x), Int32).load() for x in (b, 0, q, k))
                    found = _register(None, Boolean)
                    found.store(mask_mod(*place, None, tensors))
                    out[b, q, k] = Int8(1) if found[0] else Int8(0)

    out = torch.full((batch, length, length), 7, dtype=torch.int8)
    fill([cutlass.cute.runtime.from_dlpack(x).mark_layout_dynamic() for x in tensors], cute.runtime.from_dlpack(out))
    return out.bool()


def _scored(score_mod, tensors, scores, gradient=None):
    """float32, as `scores`: what the function makes of each, or of its gradient."""
    import torch
    from cutlass import Float32, Int32, cute

    @cute.jit
    def fill(tensors: list, scores: cute.Tensor, gradient: cute.Tensor, out: cute.Tensor):
        for i in range(cute.size(scores.shape)):
            zero = _register(Int32(0), Int32).load()
            given = [_register(x[i], Float32).load() for x in (gradient, scores)][is_forward:]
            found = _register(None, Float32)
            found.store(score_mod(*given, zero, zero, zero, zero, None, tensors))
            out[i] = found[0]

    is_forward, out = gradient is None, torch.zeros_like(scores)
    given = (cute.runtime.from_dlpack(x) for x in (scores, scores if is_forward else gradient, out))
    fill([cute.runtime.from_dlpack(x).mark_layout_dynamic() for x in tensors], *given)
    return out


def _register(value, dtype):
    from cutlass import cute

    register = cute.make_rmem_tensor(1, dtype)
    if value is not None:
        register[0] = value
    return register


def main() -> int:
    print(f"\nkernels of {PACKAGES[0]} with flexmask's mask and scores, forward and backward")
    try:
        site.addsitedir(str(installed(PACKAGES)))
    except NotInstallable as error:
        print(f"not compiled: {error}")
        return 0
    with tempfile.TemporaryDirectory() as folder:
        warnings.simplefilter("ignore")  # of fake tensors' addresses, of caches
        os.environ |= {"CUTE_DSL_ARCH": "sm_90a", "CUTE_DSL_KEEP_CUBIN": "1", "CUTE_DSL_DUMP_DIR": folder}
        os.environ |= {"FLASH_ATTENTION_ARCH": "sm_90", "FLASH_ATTENTION_NUM_SMS": "132"}
        kernels = Kernels(run=True)
        capture(kernels)
        compile_all(Path(folder))
        kernels.run = False
        check_functions(kernels)
    return 0


if __name__ == "__main__":
    if reason := pretended_cuda.missing():
        print(f"kernels of FlashAttention 4 were not compiled: {reason}")
        sys.exit()
    os.environ |= {"TORCHINDUCTOR_FORCE_DISABLE_CACHES": "1", "TORCHINDUCTOR_COMPILE_THREADS": "1"}
    pretended_cuda.pretend()
    if "--lower" in sys.argv:
        print(json.dumps(lowered()))
    else:
        sys.exit(main())

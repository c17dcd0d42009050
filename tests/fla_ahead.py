"""Compile fla's kernels ahead of time, as flexmask calls them, for GPUs that need not be here: a part of `make kernels-check`.

Each kernel in its first configuration that fits; on a GPU fla tries all of them. What a kernel takes is printed.

python tests/fla_ahead.py
"""

import importlib
import multiprocessing
import sys
from concurrent.futures import ProcessPoolExecutor
from itertools import product
from types import SimpleNamespace

import torch
import triton
from fla_package import REQUIREMENT, NotInstallable, installed
from flexmask_kernels.check import SHARED_MEMORY, usage
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.autotuner import Autotuner
from triton.runtime.errors import OutOfResources
from triton.runtime.jit import JITFunction

ARCHS = (90, 100)
KINDS = ("gated_delta_rule", "kda", "simple_gla")


class NoGPU(SimpleNamespace):
    """What Triton and fla ask of a GPU, as one of `arch` would answer."""

    def __init__(self, arch: int):
        super().__init__(
            get_current_target=lambda: GPUTarget("cuda", arch, 32),
            get_current_device=lambda: 0,
            get_current_stream=lambda device: 0,
            utils=SimpleNamespace(
                get_device_properties=lambda i: {"max_shared_mem": SHARED_MEMORY[arch], "multiprocessor_count": 132}
            ),
        )
        torch.cuda.get_device_capability = lambda *_: divmod(arch, 10)
        torch.cuda.get_device_name = lambda *_: "none"
        torch.cuda.device_count = lambda: 1


def compile_all(arch: int, kind: str) -> list[str]:
    """A line for each kernel of a forward and a backward on a tree with two levels, bfloat16, heads of 128."""
    driver.set_active(NoGPU(arch))
    compiled, compile_or_run = {}, JITFunction.run

    def compile_only(self, *args, grid, warmup, **kwargs):
        kernel = compile_or_run(self, *args, grid=grid, warmup=True, **kwargs)
        if kernel.metadata.shared > SHARED_MEMORY[arch]:
            raise OutOfResources(kernel.metadata.shared, SHARED_MEMORY[arch], "shared memory")
        compiled[self.__name__] = kernel

    def first_that_fits(self, *args, **kwargs):
        self.nargs = dict(zip(self.arg_names, args))
        for config in self.prune_configs(kwargs):
            try:
                return self.fn.run(*args, **kwargs, **config.all_kwargs())
            except OutOfResources as error:
                last = error
        raise last

    JITFunction.run, Autotuner.run = compile_only, first_that_fits
    sys.path.insert(0, str(installed()))
    fla = importlib.import_module("flexmask.recurrence.fla")
    key_heads, heads, length, size = 2, 2 if kind == "kda" else 4, 160, 128
    end = torch.full((1, length), 100, dtype=torch.int32)
    end[:, 70:] = torch.tensor([100] * 30 + [length] * 60)
    end[:, :70] = length
    query, key = torch.zeros(2, 1, length, key_heads, size, dtype=torch.bfloat16)
    value = torch.zeros(1, length, heads, size, dtype=torch.bfloat16)
    gate = torch.zeros(1, length, heads, *([size] if kind == "kda" else []))
    beta = None if kind == "simple_gla" else torch.zeros(1, length, heads, dtype=torch.bfloat16)
    fla.forward(query, key, value, gate, beta, end, 0.1)
    fla.backward(value, query, key, value, gate, beta, end, 0.1)
    lines = []
    for name, kernel in sorted(compiled.items()):
        found = usage(kernel)
        lines.append(
            f"{arch:>4}  {kind:<16}  {name:<52}  {found.shared / 1024:>6.1f}  {found.registers:>9}  {found.spilled:>7}  "
            f"{found.tensor_cores}"
        )
    return lines


def main() -> int:
    print(f"\nkernels of {REQUIREMENT}, as flexmask calls them; triton {triton.__version__}")
    try:
        installed()
    except NotInstallable as error:
        print(f"not compiled: {error}")
        return 0
    print(f"arch  {'recurrence':<16}  {'kernel':<52}  shared  registers  spilled  uses")
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(mp_context=spawn, max_tasks_per_child=1) as pool:
        for lines in pool.map(compile_all, *zip(*product(ARCHS, KINDS))):
            print(*lines, sep="\n", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())

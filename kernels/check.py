"""Compile every pinned configuration ahead of time, without a GPU, and show what it takes: `make kernels-check`.

Per kernel, chip, dtype and head size: shared memory against what a block may have, columns of tensor memory (10.0),
registers per thread, bytes spilled to local memory and how many instructions of a step do that, and the tensor-core
instruction used. Then, for a step of full tiles, of partial tiles left of the diagonal and of tiles on it (dkv: of full and of
partial tiles), what a warp issues, and a model of what that means: clocks in which the four schedulers of a multiprocessor do
nothing but issue the step, over clocks in which its tensor cores do nothing but its products. Beyond 1 the products wait. It
knows no latencies; what it shows is whether a change made a kernel do more. (On 10.0 the steps on the diagonal are written
out, not a loop.) Exit code 1 if one does not fit, runs without tensor cores, or if more than a hundredth of a step of a plain
forward of head size up to 128 spills.
"""

from __future__ import annotations

import multiprocessing
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from itertools import product
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from .backward import delta_kernel, dkv_kernel, dq_kernel
from .configs import DELTA, LIST_BLOCK, PRECISION, TABLE, Config
from .forward import forward_kernel

KERNELS = {"forward": forward_kernel, "delta": delta_kernel, "dkv": dkv_kernel, "dq": dq_kernel}
# Bytes of shared memory that a block may have (CUDA C++ Programming Guide, "Technical Specifications per Compute
# Capability"); of the chips that share a row of the table, the smallest.
SHARED_MEMORY = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024, 120: 99 * 1024}
TENSOR_MEMORY = 512  # columns of an SM (PTX ISA, "Tensor Memory")
BEST = {90: "wgmma", 100: "tcgen05.mma"}  # what a chip must be seen to use in 16 bits
# Floating-point operations that the tensor cores of a multiprocessor do in a clock, 16 bits in, float32 out: NVIDIA's peak
# rates (A100, H100 SXM, B200, RTX 5090) over multiprocessors and boost clock.
FLOPS_PER_CLOCK = {80: 2048, 90: 4096, 100: 8192, 120: 512}
PRODUCTS = {"forward": 2, "dkv": 4, "dq": 3}  # of a tile
NAMES = {torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32"}


@dataclass(frozen=True)
class Usage:
    """What one compiled kernel takes of a chip."""

    shared: int  # bytes per block
    tensor_memory: int  # columns per block
    registers: int  # per thread
    spilled: int  # bytes of stack per thread
    spills: int  # instructions of a step that store or load them, at most
    tensor_cores: str  # the instruction, or "-"
    steps: tuple[int, ...]  # instructions of a warp in a step of each loop: full tiles first, see `kernels.tiles`


def compile_ahead(kernel, config: Config, arch: int, dtype: torch.dtype, head_dim: int, value_dim: int, **features):
    """Compile a kernel for a chip that need not be there -> Triton's CompiledKernel.

    Raises:
        Whatever the compiler raises.
    """
    constants = {
        "GROUP": 4, "HEAD_DIM": head_dim, "VALUE_DIM": value_dim,
        "DIM": triton.next_power_of_2(head_dim), "VDIM": triton.next_power_of_2(value_dim),
        "LIST_BLOCK": LIST_BLOCK, "RAGGED": False, "SINKS": False, "SOFTCAP": False, "WINDOW": False,
        "PRECISION": PRECISION, "BLOCK_M": config.block_m, "BLOCK_N": config.block_n,
    } | features  # fmt: skip
    constants = {name: value for name, value in constants.items() if name in kernel.arg_names}
    signature = {name: "constexpr" if name in constants else _type(name, NAMES[dtype]) for name in kernel.arg_names}
    # As at a launch: pointers and strides are multiples of 16.
    aligned = {
        (i,): [["tt.divisibility", 16]]
        for i, name in enumerate(kernel.arg_names)
        if signature[name][0] == "*" or re.fullmatch(r".*_[bhl]", name)
    }
    source = ASTSource(kernel, signature, constexprs=constants, attrs=aligned)
    return triton.compile(source, target=GPUTarget("cuda", arch, 32), options=config.compiler_options())


def usage(compiled) -> Usage:
    ptx = compiled.asm["ptx"]
    instruction = next((x for x in ("wgmma", "tcgen05.mma", "mma.sync") if x in ptx), "-")
    tensor_memory = getattr(compiled.metadata, "tmem_size", None) or 0
    cubin = compiled.asm["cubin"]
    steps = _steps(cubin)
    spills = max((sum(bool(re.search(r"\b(LDL|STL)\b", x)) for x in step) for step in steps), default=0)
    return Usage(
        compiled.metadata.shared, tensor_memory, *_registers(cubin), spills, instruction, tuple(map(len, steps))
    )


def _type(name: str, dtype: str) -> str:
    if name in ("lse", "delta"):
        return "*fp32"
    if name in ("subtree_end", "position_ids") or name.endswith(("_begin", "_indices")):
        return "*i32"
    if re.fullmatch(r".*_[bhl]|heads|length|blocks|window", name):
        return "i32"
    return "fp32" if name in ("scale", "softcap") else f"*{dtype}"


def _registers(cubin: bytes) -> tuple[int, int]:
    """Registers per thread, and bytes of stack, as the assembler counted them."""
    text = _tool("cuobjdump", "--dump-resource-usage", cubin)
    return tuple(int(re.search(rf"{name}:(\d+)", text)[1]) for name in ("REG", "STACK"))


def _steps(cubin: bytes) -> list[list[str]]:
    """The instructions of the innermost loops that hold products, in their order."""
    labels, code, loops = {}, [], []
    for line in _tool("nvdisasm", "-c", cubin).splitlines():
        if label := re.match(r"(\.L_x_\d+):", line):
            labels[label[1]] = len(code)
        elif instruction := re.match(r"\s+/\*[0-9a-f]+\*/\s+(.*)", line):
            code.append(instruction[1])
            if (target := re.search(r"\bBRA.*`\((\.L_x_\d+)\)", line)) and target[1] in labels:
                loops.append((labels[target[1]], len(code)))
            if instruction[1].startswith("EXIT"):
                break  # behind it, on 10.0, barriers are waited for, and then it goes on in the middle of a loop
    products = [i for i, line in enumerate(code) if re.search(r"\b(HGMMA|HMMA|UTC\w*MMA)\b", line)]
    loops = [(a, b) for a, b in loops if any(a <= i < b for i in products)]
    innermost = [(a, b) for a, b in loops if not any(a <= c and d <= b and (a, b) != (c, d) for c, d in loops)]
    return [code[a:b] for a, b in sorted(innermost)]


def _tool(name: str, option: str, cubin: bytes) -> str:
    """What one of NVIDIA's tools, which Triton brings with it, says of a compiled kernel."""
    path = Path(triton.__file__).parent / "backends/nvidia/bin" / name
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        Path(file.name).write_bytes(cubin)
        return subprocess.run([path, option, file.name], capture_output=True, text=True, check=True).stdout


def clocks(name: str, config: Config, arch: int, size: int, instructions: int, wide: bool) -> float:
    """Clocks of issuing a step over clocks of its products (float32: six products for each)."""
    issue = instructions * config.num_warps / 4
    flops = PRODUCTS[name] * 2 * config.block_m * config.block_n * size * (6 if wide else 1)
    return issue / (flops / FLOPS_PER_CLOCK[arch])


FEATURES = {"plain": {}, "all": {"RAGGED": True, "SINKS": True, "SOFTCAP": True, "WINDOW": True}}


HEADINGS = (
    "arch", "dtype", "head size", "kernel", "m x n", "warps", "stages", "features", "shared KiB", "tensor memory",
    "registers", "spilled, in a step", "instructions of a step", "issue / products", "uses",
)  # fmt: skip
LINE = "{:>4}  {:>5}  {:>9}  {:<7}  {:>9}  {:>5}  {:>6}  {:<8}  {:>12}  {:>13}  {:>9}  {:>18}  {:>22}  {:>18}  {}"


def check(arch: int, wide: bool, size: int, name: str, features: str) -> tuple[str, bool]:
    """One line of the table, and whether the configuration holds."""
    config = DELTA if name == "delta" else getattr(TABLE[arch, wide][size], name)
    dtype = torch.float32 if wide else torch.bfloat16
    found = usage(compile_ahead(KERNELS[name], config, arch, dtype, size, size, **FEATURES[features]))
    fits = found.shared <= SHARED_MEMORY[arch] and found.tensor_memory <= TENSOR_MEMORY
    wrong = "" if fits else "  DOES NOT FIT"
    if name == "forward" and size <= 128 and found.spills > min(found.steps) / 100 and features == "plain":
        wrong += "  SPILLS"
    if name == "delta":
        pass  # no products
    elif found.tensor_cores == "-" or (not wide and found.tensor_cores != BEST.get(arch, found.tensor_cores)):
        wrong += "  WITHOUT TENSOR CORES"
    cells = (
        arch, NAMES[dtype], size, name, f"{config.block_m} x {config.block_n}", config.num_warps, config.num_stages,
        features, f"{found.shared / 1024:.1f} of {SHARED_MEMORY[arch] // 1024}", found.tensor_memory, found.registers,
        f"{found.spilled}, {found.spills}", ", ".join(map(str, found.steps)),
        ", ".join(f"{clocks(name, config, arch, size, n, wide):.2f}" for n in found.steps),
    )  # fmt: skip
    return LINE.format(*cells, found.tensor_cores + wrong), not wrong


def main() -> int:
    print(f"triton {triton.__version__}; GQA of 4; features: all = soft-cap, window, sinks, a length of any size")
    print(LINE.format(*HEADINGS))
    cases = [
        (*row, size, name, features)
        for row, sizes in TABLE.items()
        for size, name, features in product(sizes, KERNELS, FEATURES)
        if name != "delta" or features == "plain"  # it knows none
    ]
    failed = 0
    with ProcessPoolExecutor(mp_context=multiprocessing.get_context("spawn")) as pool:  # PyTorch has threads
        for line, holds in pool.map(check, *zip(*cases)):
            print(line, flush=True)
            failed += not holds
    print(f"{failed} of {len(cases)} do not hold" if failed else f"all {len(cases)} hold")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())

"""Which tile sizes each kernel runs with: one table, pinned, so that nothing is tuned at a user's run time."""

from __future__ import annotations

from dataclasses import dataclass

import torch

LIST_BLOCK = 128  # queries, and keys, of a listed block


@dataclass(frozen=True)
class Config:
    """Tile sizes of a kernel. Both divide the block of the lists."""

    block_m: int  # queries
    block_n: int  # keys
    num_warps: int
    num_stages: int

    def options(self) -> dict[str, int | bool]:
        """As keywords of a launch."""
        return {"BLOCK_M": self.block_m, "BLOCK_N": self.block_n, **self.compiler_options()}

    def compiler_options(self) -> dict[str, int | bool]:
        # Without fused multiply-adds the kernels issue 6 to 7% more, and Triton is to leave them out by default some day.
        return {"num_warps": self.num_warps, "num_stages": self.num_stages, "enable_fp_fusion": True}


DELTA = Config(32, 1, 4, 1)  # no keys; 32 rows, so that head size 256 fits into registers in float32


@dataclass(frozen=True)
class Configs:
    """The configurations of the three kernels."""

    forward: Config
    dkv: Config
    dq: Config


def architecture(capability: tuple[int, int]) -> int:
    """The row of the table for a CUDA compute capability.

    Raises:
        NotImplementedError: older than 8.0.
    """
    if capability < (8, 0):
        raise NotImplementedError(
            f"the Triton kernels need compute capability 8.0 or newer, this device has {capability[0]}.{capability[1]}"
        )
    if capability[0] == 8:
        return 80 if capability[1] in (0, 7) else 120  # 8.6 and 8.9 have the small shared memory of 12.0
    return {9: 90, 10: 100, 11: 100}.get(capability[0], 120)


def configs(capability: tuple[int, int], dim: int, dtype: torch.dtype) -> Configs:
    """The pinned configuration.

    Args:
        capability: of the device.
        dim: the larger of the two head sizes.
        dtype: of query, key and value.
    """
    wide = dtype == torch.float32
    size = next(size for size in (64, 128, 256) if dim <= size)
    return TABLE[architecture(capability), wide][size]


# (row, float32?) -> head size up to -> configuration. Timed so far: 9.0 in 16 bits, head sizes 64 and 128 on an H200, 128 on an
# H100 (benchmarks/results/attention_gpu.json, attention_gpu_more.json, kernel_configs_gpu.json).
# Each is the largest tile that `make kernels-check` shows to fit with few or no spills, because a larger tile reads less
# and feeds the tensor cores better; then three stages where they fit, because with two the next tile is asked for at the
# end of a step and waited for at the start of the next. benchmarks/kernel_configs.py times the candidates.
TABLE = {
    # 8.0, 8.7: 163 KiB of shared memory. What mma.sync accumulates fills the registers first.
    (80, False): {
        64: Configs(Config(128, 64, 8, 3), Config(64, 128, 8, 3), Config(128, 64, 8, 3)),
        128: Configs(Config(128, 32, 8, 3), Config(64, 64, 8, 3), Config(64, 64, 8, 3)),
        256: Configs(Config(64, 32, 4, 2), Config(32, 64, 8, 2), Config(64, 64, 8, 2)),
    },
    # 9.0: 227 KiB. wgmma wants 64 lines per warp group, so 128 with 8 warps; dK/dV of 64 x 128 spills 64 bytes at head
    # size 128, and half of its queries would halve the width of its products.
    (90, False): {
        64: Configs(Config(128, 64, 8, 3), Config(64, 128, 8, 3), Config(128, 64, 8, 3)),
        128: Configs(Config(128, 64, 8, 3), Config(64, 128, 8, 3), Config(128, 64, 8, 3)),
        256: Configs(Config(128, 64, 8, 2), Config(32, 64, 8, 2), Config(128, 32, 8, 3)),
    },
    # 10.x, 11.0: 227 KiB, and 512 columns of tensor memory, where tcgen05 accumulates; what is done to scores passes
    # through registers.
    (100, False): {
        64: Configs(Config(128, 64, 8, 3), Config(64, 128, 8, 3), Config(128, 64, 8, 3)),
        128: Configs(Config(128, 64, 8, 3), Config(64, 128, 8, 3), Config(128, 64, 8, 3)),
        256: Configs(Config(128, 64, 8, 2), Config(32, 64, 8, 3), Config(128, 32, 8, 2)),
    },
    # 8.6, 8.9, 12.x: 99 KiB, otherwise as 8.0.
    (120, False): {
        64: Configs(Config(128, 64, 8, 3), Config(64, 128, 8, 3), Config(128, 64, 8, 3)),
        128: Configs(Config(64, 32, 4, 3), Config(64, 64, 8, 2), Config(64, 64, 8, 2)),
        256: Configs(Config(64, 32, 4, 2), Config(32, 32, 4, 1), Config(32, 32, 4, 1)),
    },
}
# float32 products are six bfloat16 ones (see PRECISION): three pieces of every operand lie in registers.
_FLOAT32 = {
    64: Configs(Config(32, 32, 8, 2), Config(32, 32, 8, 1), Config(32, 32, 8, 1)),
    128: Configs(Config(32, 16, 8, 3), Config(32, 32, 8, 1), Config(32, 32, 8, 1)),
    256: Configs(Config(16, 16, 8, 1), Config(16, 16, 8, 1), Config(16, 16, 8, 1)),
}
TABLE |= {(row, True): _FLOAT32 for row in (80, 90, 100, 120)}
# float32 accuracy on tensor cores: operands as sums of three bfloat16 numbers (24 bits), the six largest products. Plain
# float32 products ("ieee") spill thousands of bytes per thread, and TF32 has 11 bits.
PRECISION = "bf16x6"
TF32 = "tf32"  # where torch.set_float32_matmul_precision asks for less

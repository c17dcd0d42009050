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

    def options(self) -> dict[str, int]:
        """As keywords of a launch."""
        return {"BLOCK_M": self.block_m, "BLOCK_N": self.block_n} | {
            "num_warps": self.num_warps,
            "num_stages": self.num_stages,
        }


@dataclass(frozen=True)
class Configs:
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


_SMALL = Configs(Config(64, 32, 4, 2), Config(32, 64, 4, 2), Config(64, 32, 4, 2))
TABLE = {(arch, wide): dict.fromkeys((64, 128, 256), _SMALL) for arch in (80, 90, 100, 120) for wide in (False, True)}

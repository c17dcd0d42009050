"""What the kernels share: tiles of tokens, and scores with their soft-cap."""

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)
# Below every score, and finite: a row that has seen nothing yet needs no special case (exp2(-inf - LOWEST) is 0).
LOWEST = tl.constexpr(-3.0e38)
# The tiles of a line, in the order in which they are walked: the full ones, whose pairs are all visible; the partial ones left
# of the diagonal, where all that counts is whether the end of a key lies behind the query; and those on the diagonal.
FULL, LEFT, DIAGONAL = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)


@triton.jit
def listed(begin, indices, line):
    """Where the blocks of a line are listed, and how many there are. There is something to read even if there are none."""
    first = tl.load(begin + line)
    return indices + first, tl.load(begin + line + 1) - first


@triton.jit
def key_tiles(
    kv_begin, kv_indices, full_kv_begin, full_kv_indices, line, start_m,
    LIST_BLOCK: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PART: tl.constexpr,
):  # fmt: skip
    """What queries from start_m on read in a part: where its blocks of keys are listed, the first, and how many tiles."""
    PARTS: tl.constexpr = LIST_BLOCK // BLOCK_N
    if PART == FULL:
        at, num = listed(full_kv_begin, full_kv_indices, line)
        block, steps = tl.load(at), num * PARTS
    elif PART == LEFT:
        at, num = listed(kv_begin, kv_indices, line)
        block, steps = tl.load(at), (num - 1) * PARTS  # the last one is on the diagonal
    else:  # as far as the last query sees
        at, block = kv_indices, start_m // LIST_BLOCK
        steps = (start_m % LIST_BLOCK + BLOCK_M + BLOCK_N - 1) // BLOCK_N
    return at, block, steps


@triton.jit
def load_tile(
    base, start, stride, length, BLOCK: tl.constexpr, SIZE: tl.constexpr, DIM: tl.constexpr, CHECK: tl.constexpr
):
    """Tokens start … start + BLOCK of a (length, SIZE) matrix -> (BLOCK, DIM), zeros beyond SIZE and, checked, length."""
    rows, dims = tl.arange(0, BLOCK), tl.arange(0, DIM)
    at = base + start.to(tl.int64) * stride + rows[:, None] * stride + dims[None, :]
    if CHECK:
        tile = tl.load(at, (start + rows < length)[:, None] & (dims < SIZE)[None, :], 0.0)
    elif SIZE < DIM:
        tile = tl.load(at, (dims < SIZE)[None, :], 0.0)
    else:
        tile = tl.load(at)
    return tile


@triton.jit
def store_tile(base, start, stride, length, tile, BLOCK: tl.constexpr, SIZE: tl.constexpr, DIM: tl.constexpr):
    """The reverse, in the dtype of the matrix."""
    rows, dims = tl.arange(0, BLOCK), tl.arange(0, DIM)
    at = base + start.to(tl.int64) * stride + rows[:, None] * stride + dims[None, :]
    tl.store(at, tile.to(base.dtype.element_ty), (start + rows < length)[:, None] & (dims < SIZE)[None, :])


@triton.jit
def tanh(x):
    """To float32 accuracy. Below 0.6 an odd polynomial (our own minimax fit, relative error 3e-9), because there
    1 - 2 / (exp(2x) + 1) cancels."""
    z = x * x
    small = x + x * z * (
        -0.33333298001872774
        + z * (0.13331924119268707 + z * (-0.0537838295731312 + z * (0.02079596905765625 - z * 0.00589515478969123)))
    )
    return tl.where(tl.abs(x) < 0.6, small, 1 - 2 / (tl.math.exp2(x * (2 * LOG2_E)) + 1))


@triton.jit
def capped(qk, scale, softcap, SOFTCAP: tl.constexpr, EXACT: tl.constexpr):
    """Products of queries and keys -> x with scores = x · (softcap or scale). The derivative of the cap is 1 - x²."""
    if not SOFTCAP:
        x = qk
    elif EXACT:
        x = tanh(qk * (scale / softcap))
    else:  # an error of 2e-7 times the cap, which 16 bits do not see for caps up to a thousand
        x = 1 - 2 / (tl.math.exp2(qk * (scale / softcap * (2 * LOG2_E))) + 1)
    return x


@triton.jit
def log2_factor(scale, softcap, SOFTCAP: tl.constexpr):
    """Scores in units of log 2, whose exponential is exp2, are `capped(…)` times this. One multiply-add then takes them
    and subtracts their maximum or their log-sum-exp."""
    return (softcap if SOFTCAP else scale) * LOG2_E

"""Forward of tree attention, one Triton kernel."""

import triton
import triton.language as tl

from .tiles import DIAGONAL, FULL, LOG2_E, LOWEST, capped, key_tiles, load_tile, log2_factor, store_tile


# One compilation serves every length. Strides stay specialised: their divisibility decides the width of loads.
@triton.jit(do_not_specialize=["heads", "length", "blocks", "window"])
def forward_kernel(
    query, key, value, out, lse, subtree_end, position_ids, sinks,
    kv_begin, kv_indices, full_kv_begin, full_kv_indices,
    query_b, query_h, query_l, key_b, key_h, key_l, value_b, value_h, value_l, out_b, out_h, out_l,  # strides
    heads, length, blocks, scale, softcap, window,
    GROUP: tl.constexpr,  # query heads per key/value head
    HEAD_DIM: tl.constexpr, VALUE_DIM: tl.constexpr,
    DIM: tl.constexpr, VDIM: tl.constexpr,  # the same, rounded up to a power of two
    LIST_BLOCK: tl.constexpr,  # queries, and keys, of a listed block; BLOCK_M and BLOCK_N divide it
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    RAGGED: tl.constexpr,  # length is no multiple of LIST_BLOCK
    SINKS: tl.constexpr, SOFTCAP: tl.constexpr, WINDOW: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """o = softmax(s) v and lse = log2 Σ exp s with s = softcap(scale · q kᵀ), online over key blocks; scale > 0.

    (FlashAttention-2, arXiv 2307.08691, algorithm 1.) A program owns BLOCK_M queries of one head and walks the key blocks
    that its block of queries reads (see `tiles`), the full ones without any mask code. A sink is a score without a value: it
    starts the running maximum and sum. lse is float32 (batch, heads, blocks · LIST_BLOCK), infinite beyond the row;
    subtree_end and position_ids are int32 (batch, blocks · LIST_BLOCK), 0 there.
    """
    start_m = (tl.num_programs(0) - 1 - tl.program_id(0)) * BLOCK_M  # the last queries read most, so they start first
    head, batch = tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    key += batch * key_b + head // GROUP * key_h
    value += batch * value_b + head // GROUP * value_h
    subtree_end += batch * blocks * LIST_BLOCK
    position_ids += batch * blocks * LIST_BLOCK
    places = start_m + tl.arange(0, BLOCK_M)
    if WINDOW:
        positions = tl.load(position_ids + places)
    q = load_tile(query + batch * query_b + head * query_h, start_m, query_l, length, BLOCK_M, HEAD_DIM, DIM, True)

    top = tl.full((BLOCK_M,), LOWEST, tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    if SINKS:
        top = tl.zeros((BLOCK_M,), tl.float32) + tl.maximum(tl.load(sinks + head).to(tl.float32) * LOG2_E, LOWEST)
        total += 1.0
    o = tl.zeros((BLOCK_M, VDIM), tl.float32)
    factor = log2_factor(scale, softcap, SOFTCAP)
    EXACT: tl.constexpr = query.dtype.element_ty == tl.float32

    PARTS: tl.constexpr = LIST_BLOCK // BLOCK_N
    line = batch * blocks + start_m // LIST_BLOCK
    for PART in tl.static_range(3):
        at, block, steps = key_tiles(
            kv_begin, kv_indices, full_kv_begin, full_kv_indices, line, start_m, LIST_BLOCK, BLOCK_M, BLOCK_N, PART
        )
        for i in range(0, steps):
            start_n = block * LIST_BLOCK + i % PARTS * BLOCK_N
            # The next one. Loaded in the step that needs it, the index would halve the distance at which the compiler
            # loads tiles ahead, because it would have two loads in a row to cover.
            if PART != DIAGONAL:
                block = tl.load(at + tl.minimum(i + 1, steps - 1) // PARTS)
            # What lies left of the diagonal exists.
            k = load_tile(key, start_n, key_l, length, BLOCK_N, HEAD_DIM, DIM, PART == DIAGONAL and RAGGED)
            x = capped(tl.dot(q, tl.trans(k), input_precision=PRECISION), scale, softcap, SOFTCAP, EXACT)
            if PART != FULL:
                keys = start_n + tl.arange(0, BLOCK_N)
                ends = tl.load(subtree_end + keys)
                visible = places[:, None] < ends[None, :]
                if PART == DIAGONAL:
                    visible = visible & (keys[None, :] <= places[:, None])
                if WINDOW:
                    key_positions = tl.load(position_ids + keys)
                    visible = visible & (positions[:, None] - key_positions[None, :] < window)
                x = tl.where(visible, x, -float("inf"))
            new_top = tl.maximum(top, tl.max(x, 1) * factor)  # factor > 0
            p = tl.math.exp2(x * factor - new_top[:, None])
            shrink = tl.math.exp2(top - new_top)
            v = load_tile(value, start_n, value_l, length, BLOCK_N, VALUE_DIM, VDIM, PART == DIAGONAL and RAGGED)
            o = tl.dot(p.to(v.dtype), v, o * shrink[:, None], input_precision=PRECISION)
            total = total * shrink + tl.sum(p, 1)
            top = new_top

    out += batch * out_b + head * out_h
    store_tile(out, start_m, out_l, length, o / total[:, None], BLOCK_M, VALUE_DIM, VDIM)
    log_sum = tl.where(places < length, top + tl.math.log2(total), float("inf"))
    tl.store(lse + (batch * heads + head) * blocks * LIST_BLOCK + places, log_sum)

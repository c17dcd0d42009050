"""Backward of tree attention, three Triton kernels: delta, then dK and dV, then dQ. No atomics: every sum has one order.

    p = exp(s - lse),  ds = p ∘ (do vᵀ - delta) ∘ softcap',  delta = Σ do ∘ o
    dv = pᵀ do,  dk = scale · dsᵀ q,  dq = scale · ds k                 (FlashAttention-2, arXiv 2307.08691, algorithm 2)

Strides and constants are those of the forward. lse and delta are float32 (batch, heads, blocks · LIST_BLOCK), so that no
load of them needs a bound.
"""

import triton
import triton.language as tl

from .tiles import DIAGONAL, FULL, capped, key_tiles, listed, load_tile, log2_factor, store_tile


@triton.jit(do_not_specialize=["heads", "length", "blocks"])
def delta_kernel(
    out, grad_out, delta,
    out_b, out_h, out_l, grad_b, grad_h, grad_l,
    heads, length, blocks,
    VALUE_DIM: tl.constexpr, VDIM: tl.constexpr, LIST_BLOCK: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """delta = Σ do ∘ o for each query, float32, 0 beyond the row."""
    start_m = tl.program_id(0) * BLOCK_M
    head, batch = tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    o = load_tile(out + batch * out_b + head * out_h, start_m, out_l, length, BLOCK_M, VALUE_DIM, VDIM, True)
    do = load_tile(grad_out + batch * grad_b + head * grad_h, start_m, grad_l, length, BLOCK_M, VALUE_DIM, VDIM, True)
    places = start_m + tl.arange(0, BLOCK_M)
    d = tl.sum(o.to(tl.float32) * do.to(tl.float32), 1)
    tl.store(delta + (batch * heads + head) * blocks * LIST_BLOCK + places, d)


@triton.jit(do_not_specialize=["heads", "length", "blocks", "window"])
def dkv_kernel(
    query, key, value, grad_out, lse, delta, grad_key, grad_value, subtree_end, position_ids,
    q_begin, q_indices, full_q_begin, full_q_indices,
    query_b, query_h, query_l, key_b, key_h, key_l, value_b, value_h, value_l, grad_b, grad_h, grad_l,
    dk_b, dk_h, dk_l, dv_b, dv_h, dv_l,
    heads, length, blocks, scale, softcap, window,
    GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, VALUE_DIM: tl.constexpr, DIM: tl.constexpr, VDIM: tl.constexpr,
    LIST_BLOCK: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    RAGGED: tl.constexpr, SOFTCAP: tl.constexpr, WINDOW: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dk and dv. A program owns BLOCK_N keys of one key/value head and walks, for each query head of its group, the
    query blocks that read them. Tiles are transposed: keys down, queries to the right."""
    # The first keys are read most, so they start first: those of all heads, which is why heads count fastest here.
    start_n = tl.program_id(1) * BLOCK_N
    kv_head, batch = tl.program_id(0).to(tl.int64), tl.program_id(2).to(tl.int64)
    subtree_end += batch * blocks * LIST_BLOCK
    position_ids += batch * blocks * LIST_BLOCK
    keys = start_n + tl.arange(0, BLOCK_N)
    ends = tl.load(subtree_end + keys)
    if WINDOW:
        key_positions = tl.load(position_ids + keys)
    k = load_tile(key + batch * key_b + kv_head * key_h, start_n, key_l, length, BLOCK_N, HEAD_DIM, DIM, True)
    v = load_tile(value + batch * value_b + kv_head * value_h, start_n, value_l, length, BLOCK_N, VALUE_DIM, VDIM, True)
    dk = tl.zeros((BLOCK_N, DIM), tl.float32)
    dv = tl.zeros((BLOCK_N, VDIM), tl.float32)
    factor = log2_factor(scale, softcap, SOFTCAP)
    EXACT: tl.constexpr = query.dtype.element_ty == tl.float32

    PARTS: tl.constexpr = LIST_BLOCK // BLOCK_M
    line = batch * blocks + start_n // LIST_BLOCK
    for PARTIAL in tl.static_range(2):  # a third loop would spill more than its cheaper mask saves
        if PARTIAL:
            at, num = listed(q_begin, q_indices, line)
        else:
            at, num = listed(full_q_begin, full_q_indices, line)
        block, steps = tl.load(at), num * PARTS
        per_head = tl.maximum(steps, 1)  # a division by zero would be undefined, even where no step is taken
        for i in range(0, GROUP * steps):  # one loop over heads and blocks, so that loads run ahead across heads
            head = kv_head * GROUP + i // per_head
            start_m = block * LIST_BLOCK + i % PARTS * BLOCK_M
            block = tl.load(at + (i + 1) % per_head // PARTS)  # the next one, as in the forward
            places = start_m + tl.arange(0, BLOCK_M)
            of_head = (batch * heads + head) * blocks * LIST_BLOCK
            q_head, do_head = query + batch * query_b + head * query_h, grad_out + batch * grad_b + head * grad_h
            q = load_tile(q_head, start_m, query_l, length, BLOCK_M, HEAD_DIM, DIM, RAGGED)
            x = capped(tl.dot(k, tl.trans(q), input_precision=PRECISION), scale, softcap, SOFTCAP, EXACT)
            # The last block of queries may be full and reach beyond the row: there lse is infinite and p is 0.
            p = tl.math.exp2(x * factor - tl.load(lse + of_head + places)[None, :])
            if PARTIAL:
                visible = (keys[:, None] <= places[None, :]) & (places[None, :] < ends[:, None])
                if WINDOW:
                    positions = tl.load(position_ids + places)
                    visible = visible & (positions[None, :] - key_positions[:, None] < window)
                p = tl.where(visible, p, 0.0)
            do = load_tile(do_head, start_m, grad_l, length, BLOCK_M, VALUE_DIM, VDIM, RAGGED)
            dv = tl.dot(p.to(do.dtype), do, dv, input_precision=PRECISION)
            dp = tl.dot(v, tl.trans(do), input_precision=PRECISION)
            ds = p * (dp - tl.load(delta + of_head + places)[None, :])
            if SOFTCAP:
                ds = ds * (1 - x * x)
            dk = tl.dot(ds.to(q.dtype), q, dk, input_precision=PRECISION)

    store_tile(grad_key + batch * dk_b + kv_head * dk_h, start_n, dk_l, length, dk * scale, BLOCK_N, HEAD_DIM, DIM)
    store_tile(grad_value + batch * dv_b + kv_head * dv_h, start_n, dv_l, length, dv, BLOCK_N, VALUE_DIM, VDIM)


@triton.jit(do_not_specialize=["heads", "length", "blocks", "window"])
def dq_kernel(
    query, key, value, grad_out, lse, delta, grad_query, subtree_end, position_ids,
    kv_begin, kv_indices, full_kv_begin, full_kv_indices,
    query_b, query_h, query_l, key_b, key_h, key_l, value_b, value_h, value_l, grad_b, grad_h, grad_l,
    dq_b, dq_h, dq_l,
    heads, length, blocks, scale, softcap, window,
    GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, VALUE_DIM: tl.constexpr, DIM: tl.constexpr, VDIM: tl.constexpr,
    LIST_BLOCK: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    RAGGED: tl.constexpr, SOFTCAP: tl.constexpr, WINDOW: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dq. A program owns BLOCK_M queries of one head and walks the key blocks that they read, as in the forward."""
    start_m = (tl.num_programs(0) - 1 - tl.program_id(0)) * BLOCK_M
    head, batch = tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    key += batch * key_b + head // GROUP * key_h
    value += batch * value_b + head // GROUP * value_h
    subtree_end += batch * blocks * LIST_BLOCK
    position_ids += batch * blocks * LIST_BLOCK
    places = start_m + tl.arange(0, BLOCK_M)
    if WINDOW:
        positions = tl.load(position_ids + places)
    q = load_tile(query + batch * query_b + head * query_h, start_m, query_l, length, BLOCK_M, HEAD_DIM, DIM, True)
    do = load_tile(grad_out + batch * grad_b + head * grad_h, start_m, grad_l, length, BLOCK_M, VALUE_DIM, VDIM, True)
    of_head = (batch * heads + head) * blocks * LIST_BLOCK
    log_sum, d = tl.load(lse + of_head + places)[:, None], tl.load(delta + of_head + places)[:, None]
    dq = tl.zeros((BLOCK_M, DIM), tl.float32)
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
            if PART != DIAGONAL:
                block = tl.load(at + tl.minimum(i + 1, steps - 1) // PARTS)
            k = load_tile(key, start_n, key_l, length, BLOCK_N, HEAD_DIM, DIM, PART == DIAGONAL and RAGGED)
            x = capped(tl.dot(q, tl.trans(k), input_precision=PRECISION), scale, softcap, SOFTCAP, EXACT)
            p = tl.math.exp2(x * factor - log_sum)
            if PART != FULL:
                keys = start_n + tl.arange(0, BLOCK_N)
                ends = tl.load(subtree_end + keys)
                visible = places[:, None] < ends[None, :]
                if PART == DIAGONAL:
                    visible = visible & (keys[None, :] <= places[:, None])
                if WINDOW:
                    key_positions = tl.load(position_ids + keys)
                    visible = visible & (positions[:, None] - key_positions[None, :] < window)
                p = tl.where(visible, p, 0.0)
            v = load_tile(value, start_n, value_l, length, BLOCK_N, VALUE_DIM, VDIM, PART == DIAGONAL and RAGGED)
            ds = p * (tl.dot(do, tl.trans(v), input_precision=PRECISION) - d)
            if SOFTCAP:
                ds = ds * (1 - x * x)
            dq = tl.dot(ds.to(k.dtype), k, dq, input_precision=PRECISION)

    dq_head = grad_query + batch * dq_b + head * dq_h
    store_tile(dq_head, start_m, dq_l, length, dq * scale, BLOCK_M, HEAD_DIM, DIM)

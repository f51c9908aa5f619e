"""Block attention in Triton: exact tiles, then summary tiles of what was not selected, in one online softmax.

One program computes BLOCK_M queries of one query block of one head; programs of a head run side by side, so that its
keys and values stay in the L2 cache. Logits are in units of log 2. Every accumulator is rescaled when the running
maximum moves. Axis legend: B batch, H heads, N tokens, D head size, nq / nk query / key blocks, C longest list.
"""

# Conditions of compile time and of run time stay apart, and no load runs for the sake of an expression.
# ruff: noqa: SIM102, SIM108
from __future__ import annotations

import triton
import triton.language as tl

from dit_accel.kernels.triton_summaries import add_moment, second_order
from dit_accel.kernels.triton_tiles import block_span, inside_box, softmax_step, tile_logits, tile_rows, value_tile

# Stands for "no key seen yet": finite, so that no difference of two infinities arises.
_NOTHING = tl.constexpr(-1e30)
_LN_2 = tl.constexpr(0.6931471805599453)
_LOG2_E = tl.constexpr(1.4426950408889634)

# Arguments that change from call to call: none of their values may lead to another compilation.
VARYING = (
    "q_tiles",
    "k_tiles",
    "k_size",
    "queries",
    "keys",
    "blocks",
    "group",
    "index_b",
    "index_h",
    "index_n",
    "count_b",
    "count_h",
    "chosen_b",
    "chosen_h",
    "padded_keys",
    "box_b",
    "box_h",
    "place_b",
    "place_h",
)


# fmt: off
@triton.jit(do_not_specialize=VARYING)
def attention(
    q: tl.tensor, k: tl.tensor, v: tl.tensor, out: tl.tensor, lse: tl.tensor,
    indices: tl.tensor, counts: tl.tensor, full_counts: tl.tensor,
    q_starts: tl.tensor, q_lengths: tl.tensor, k_starts: tl.tensor, k_lengths: tl.tensor, kv_len: tl.tensor,
    lower: tl.tensor, upper: tl.tensor, coordinates: tl.tensor, ball: tl.tensor,
    q_step: tl.tensor, k_step: tl.tensor, v_step: tl.tensor, v_mean: tl.tensor,
    chosen: tl.tensor, log_tokens: tl.tensor, mean_k: tl.tensor, mean_v: tl.tensor,
    variance: tl.tensor, moments: tl.tensor, bias: tl.tensor, centres: tl.tensor,
    scale: tl.tensor, skip: tl.float32,
    q_b: tl.int64, q_h: tl.int64, q_n: tl.tensor,
    k_b: tl.int64, k_h: tl.int64, k_n: tl.tensor,
    v_b: tl.int64, v_h: tl.int64, v_n: tl.tensor,
    out_b: tl.int64, out_h: tl.int64, out_n: tl.tensor,
    index_b: tl.int64, index_h: tl.int64, index_n: tl.int64,
    count_b: tl.int64, count_h: tl.int64,
    chosen_b: tl.int64, chosen_h: tl.int64,
    box_b: tl.int64, box_h: tl.int64, place_b: tl.int64, place_h: tl.int64,
    q_tiles: tl.int32, k_tiles: tl.int32, k_size: tl.int32,
    queries: tl.int32, keys: tl.int32, blocks: tl.int32, group: tl.int32, padded_keys: tl.int32,
    HEAD_DIM: tl.constexpr, PADDED_DIM: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    UNIFORM: tl.constexpr, ONE_TILE: tl.constexpr, NESTED: tl.constexpr, HAS_LENGTH: tl.constexpr,
    AXES: tl.constexpr, STRIDE: tl.constexpr, BALL: tl.constexpr,
    INT8: tl.constexpr, FP8: tl.constexpr, REST: tl.constexpr, FIRST_ORDER: tl.constexpr, SKIP: tl.constexpr,
    TMA: tl.constexpr, SPECIALIZE: tl.constexpr, DOT: tl.constexpr,
) -> None:
    # fmt: on
    """See `triton_launch.launch` for the arguments, and `triton_configs` for the constants."""
    head, item = tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    heads = tl.num_programs(1)
    block = tl.program_id(0) // q_tiles
    offset = (tl.program_id(0) % q_tiles) * BLOCK_M
    start = tl.load(q_starts + block) + offset
    length = tl.load(q_lengths + block) - offset
    row = tl.arange(0, BLOCK_M)
    is_query = row < length
    factor = scale * _LOG2_E
    tokens = keys
    if HAS_LENGTH:
        tokens = tl.minimum(tokens, tl.load(kv_len + item))

    q += item * q_b + head * q_h
    if TMA:
        # Queries of the next block may come along; what is computed for them is not stored.
        q_rows = tl.make_tensor_descriptor(q, [queries, HEAD_DIM], [q_n, 1], [BLOCK_M, PADDED_DIM])
        q_tile = q_rows.load([start, 0])
    else:
        q_tile = tile_rows(q, start, length, q_n, BLOCK_M, HEAD_DIM, PADDED_DIM)
    k += item * k_b + head * k_h
    v += item * v_b + head * v_h
    indices += item * index_b + head * index_h + block.to(tl.int64) * index_n
    count_at = item * count_b + head * count_h + block
    count = tl.load(counts + count_at)
    full = count
    if AXES:
        full = tl.minimum(tl.load(full_counts + count_at), count)
        lower += item * box_b + head * box_h
        upper += item * box_b + head * box_h
        coordinates += item * place_b + head * place_h
    # A tile beyond the end of a short block has nothing to do, nor has an item without real keys.
    count = tl.where((length > 0) & (tokens > 0), count, 0)
    full = tl.minimum(full, count)
    flat = item * heads + head
    row_of_plan = flat * (tl.num_programs(0) // q_tiles) + block
    if INT8:
        factor *= tl.load(q_step + row_of_plan)
        k_step += flat * blocks

    acc = tl.zeros([BLOCK_M, PADDED_DIM], tl.float32)
    top = tl.full([BLOCK_M], _NOTHING, tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    # The largest logit so far, where `top` is rounded.
    peak = top
    rest_total = tl.zeros([BLOCK_M], tl.float32)
    column = tl.arange(0, BLOCK_N)
    SLICE: tl.constexpr = min(32 if PADDED_DIM <= 128 else 16, PADDED_DIM)

    exact_steps = 0 if NESTED else full * k_tiles
    steps = exact_steps
    if REST:
        steps += tl.where(length > 0, tl.cdiv(blocks, BLOCK_N), 0)
        mean_k += flat * blocks * PADDED_DIM
    if REST == 3:
        # About the mean query: another bias and other values for each query block.
        bias += row_of_plan * blocks
        mean_v += row_of_plan * blocks * PADDED_DIM
        centres += row_of_plan * PADDED_DIM
    elif REST:
        chosen += item * chosen_b + head * chosen_h + block.to(tl.int64) * blocks
        log_tokens += item * blocks
        mean_v += flat * blocks * PADDED_DIM
    if REST == 2:
        variance += flat * blocks * PADDED_DIM
    if TMA:
        # Rows beyond the bound are loaded as zero, whatever stands there. With summary tiles, k and v are copies that
        # hold the keys, zeros up to `padded_keys` rows, and the means, all PADDED_DIM wide.
        bound = padded_keys + blocks if REST else tl.maximum(tokens, 1)
        WIDTH: tl.constexpr = PADDED_DIM if REST else HEAD_DIM
        k_rows = tl.make_tensor_descriptor(k, [bound, WIDTH], [k_n, 1], [BLOCK_N, PADDED_DIM])
        if FP8:
            v_rows = tl.make_tensor_descriptor(v, [blocks * PADDED_DIM, v_n], [v_n, 1], [PADDED_DIM, BLOCK_N])
        else:
            v_rows = tl.make_tensor_descriptor(v, [bound, WIDTH], [v_n, 1], [BLOCK_N, PADDED_DIM])

    for step in tl.range(0, steps, warp_specialize=SPECIALIZE):
        is_rest = False
        if REST:
            is_rest = step >= exact_steps
        if ONE_TILE:
            entry, part = step, 0
        else:
            entry, part = step // k_tiles, step % k_tiles
        if REST:
            chosen_block = tl.load(indices + entry, mask=step < exact_steps, other=0)
        else:
            chosen_block = tl.load(indices + entry)
        first, limit = block_span(chosen_block, k_starts, k_lengths, k_size, tokens, UNIFORM)
        first += part * BLOCK_N
        limit -= part * BLOCK_N
        if REST:
            summary = (step - exact_steps) * BLOCK_N
            limit = tl.where(is_rest, blocks - summary, limit)
            first = tl.where(is_rest, summary, first)
        if TMA:
            if REST:
                first = tl.where(is_rest, first + padded_keys, first)
            k_tile = k_rows.load([first, 0])
            if FP8:
                v_tile = v_rows.load([chosen_block * PADDED_DIM, part * BLOCK_N])
            else:
                v_tile = v_rows.load([first, 0])
        else:
            k_base, v_base, k_row, v_row = k, v, k_n, v_n
            if REST:
                k_base, v_base = tl.where(is_rest, mean_k, k), tl.where(is_rest, mean_v, v)
                k_row, v_row = tl.where(is_rest, PADDED_DIM, k_n), tl.where(is_rest, PADDED_DIM, v_n)
            k_tile = tile_rows(k_base, first, limit, k_row, BLOCK_N, HEAD_DIM, PADDED_DIM)
            if FP8:
                v_tile = value_tile(v, chosen_block, part * BLOCK_N, v_n, BLOCK_N, PADDED_DIM)
            else:
                v_tile = tile_rows(v_base, first, limit, v_row, BLOCK_N, HEAD_DIM, PADDED_DIM)
        extra = tl.where(column < limit, 0.0, float("-inf"))
        if REST:
            mask = is_rest & (column < limit)
            if REST == 3:
                mass = tl.load(bias + summary + column, mask=mask, other=float("-inf"))
                extra = tl.where(is_rest, mass, extra)
            else:
                taken = tl.load(chosen + summary + column, mask=mask, other=1)
                mass = tl.load(log_tokens + summary + column, mask=mask, other=float("-inf"))
                extra = tl.where(is_rest, tl.where(taken != 0, float("-inf"), mass), extra)
        block_factor = factor
        if INT8:
            block_factor *= tl.load(k_step + chosen_block)
        logits = tile_logits(q_tile, k_tile, block_factor, INT8, DOT) + extra[None, :]
        if REST == 2:
            if is_rest:
                second = second_order(
                    q, start, length, q_n, variance, summary, limit, scale,
                    BLOCK_M, BLOCK_N, SLICE, HEAD_DIM, PADDED_DIM, DOT,
                )
                logits += tl.minimum(second, tl.where(mass > 0.0, mass, 0.0)[None, :])
        if SKIP:
            # A tile far below what every query has seen is left out; the first one never is.
            if FP8:
                gain = tl.max(tl.where(is_query, tl.max(logits, 1) - peak, float("-inf")), 0)
                peak = tl.maximum(peak, tl.max(logits, 1))
            else:
                gain = tl.max(tl.where(is_query, tl.max(logits, 1) - top, float("-inf")), 0)
            if gain > skip:
                acc, top, total, _, _ = softmax_step(acc, top, total, logits, v_tile, FP8, DOT)
        else:
            acc, top, total, fade, weights = softmax_step(acc, top, total, logits, v_tile, FP8, DOT)
        if FIRST_ORDER == 1:
            rest_total = rest_total * fade + tl.where(is_rest, tl.sum(weights, 1), 0.0)
        if FIRST_ORDER == 2:
            if is_rest:
                # A tile of summaries may begin and end inside a group.
                first_group = summary // group
                last_group = (tl.minimum(summary + BLOCK_N, blocks) - 1) // group
                for index in range(first_group, last_group + 1):
                    here = ((summary + column) // group == index)[None, :]
                    group_mass = tl.sum(tl.where(here, weights, 0.0), 1) * scale
                    at = moments + (flat * tl.cdiv(blocks, group) + index) * (PADDED_DIM * PADDED_DIM)
                    acc = add_moment(
                        acc, group_mass, q, start, length, q_n, centres, at,
                        BLOCK_M, SLICE, HEAD_DIM, PADDED_DIM, REST == 3, DOT,
                    )

    if AXES or NESTED:
        # Partial blocks, and blocks of many lengths: an inner loop over the tiles that a block really has.
        # Masks of single tokens cost registers: such tiles are narrower.
        PART_N: tl.constexpr = min(32, BLOCK_N) if AXES else BLOCK_N
        query = start + row
        for entry in range(0 if NESTED else full, count):
            chosen_block = tl.load(indices + entry)
            first, limit = block_span(chosen_block, k_starts, k_lengths, k_size, tokens, UNIFORM)
            block_factor = factor
            if INT8:
                block_factor *= tl.load(k_step + chosen_block)
            for part in range(0, tl.cdiv(limit, PART_N)):
                at, left = first + part * PART_N, limit - part * PART_N
                k_tile = tile_rows(k, at, left, k_n, PART_N, HEAD_DIM, PADDED_DIM)
                if FP8:
                    v_tile = value_tile(v, chosen_block, part * PART_N, v_n, PART_N, PADDED_DIM)
                else:
                    v_tile = tile_rows(v, at, left, v_n, PART_N, HEAD_DIM, PADDED_DIM)
                is_key = tl.arange(0, PART_N) < left
                keep = is_query[:, None] & is_key[None, :]
                if AXES:
                    key = at + tl.arange(0, PART_N)
                    inside = inside_box(
                        keep, lower, upper, coordinates, ball, query, key, is_query, is_key, AXES, STRIDE, BALL
                    )
                    keep = inside | (keep & (entry < full))
                logits = tl.where(keep, tile_logits(q_tile, k_tile, block_factor, INT8, DOT), float("-inf"))
                if SKIP:
                    if FP8:
                        gain = tl.max(tl.where(is_query, tl.max(logits, 1) - peak, float("-inf")), 0)
                        peak = tl.maximum(peak, tl.max(logits, 1))
                    else:
                        gain = tl.max(tl.where(is_query, tl.max(logits, 1) - top, float("-inf")), 0)
                    if gain > skip:
                        acc, top, total, _, _ = softmax_step(acc, top, total, logits, v_tile, FP8, DOT)
                else:
                    acc, top, total, fade, weights = softmax_step(acc, top, total, logits, v_tile, FP8, DOT)
                    if FIRST_ORDER == 1:
                        rest_total = rest_total * fade

    seen = total > 0.0
    total = tl.where(seen, total, 1.0)
    acc = acc / total[:, None]
    dim = tl.arange(0, PADDED_DIM)
    if FP8:
        # Weights sum to one, so that what was taken from every value is given back whole.
        unit = tl.load(v_step + flat * PADDED_DIM + dim)
        mean = tl.load(v_mean + flat * PADDED_DIM + dim)
        acc = tl.where(seen[:, None], acc * unit[None, :] + mean[None, :], 0.0)
    if FIRST_ORDER == 1:
        at = moments + flat * (PADDED_DIM * PADDED_DIM)
        share = rest_total / total * scale
        acc = add_moment(
            acc, share, q, start, length, q_n, centres, at,
            BLOCK_M, SLICE, HEAD_DIM, PADDED_DIM, REST == 3, DOT,
        )
    at = out + item * out_b + head * out_h + tl.cast(start, tl.int64) * out_n
    mask = is_query[:, None]
    if HEAD_DIM != PADDED_DIM:
        mask = mask & (dim < HEAD_DIM)[None, :]
    tl.store(at + row[:, None] * out_n + dim[None, :], acc.to(out.dtype.element_ty), mask=mask)
    log_sum = tl.where(seen, (top + tl.log2(total)) * _LN_2, float("-inf"))
    tl.store(lse + flat * queries + start + row, log_sum, mask=is_query)

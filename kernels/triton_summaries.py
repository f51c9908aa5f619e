"""What summaries need beyond one tile of keys: second-order mass, first-order terms, and expansion about mean queries.

Axis legend: B batch, H heads, N tokens, D head size (P when padded to a power of two), nq / nk query / key blocks.
"""

# Conditions of compile time and of run time stay apart.
from __future__ import annotations

import triton
import triton.language as tl

from dit_accel.kernels.triton_tiles import block_span, some_columns, tile_rows

_NOTHING = tl.constexpr(-1e30)
_LOG2_E = tl.constexpr(1.4426950408889634)
_HALF_LOG2_E = tl.constexpr(0.7213475204444817)


@triton.jit
def second_order(
    q: tl.tensor,
    start: tl.tensor,
    length: tl.tensor,
    q_n: tl.tensor,
    variance: tl.tensor,
    first: tl.tensor,
    limit: tl.tensor,
    scale: tl.tensor,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    SLICE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PADDED_DIM: tl.constexpr,
    DOT: tl.constexpr,
) -> tl.tensor:
    """½ Σ_d (scale * q_d)² var_d in units of log 2, `[M, N]`, a slice of channels at a time to spare registers."""
    second = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for column in tl.range(0, PADDED_DIM, SLICE, num_stages=1):
        squares = some_columns(q, start, length, q_n, column, BLOCK_M, SLICE, HEAD_DIM) * scale
        squares = (squares * squares * _HALF_LOG2_E).to(variance.dtype.element_ty)
        spread = some_columns(variance, first, limit, PADDED_DIM, column, BLOCK_N, SLICE, HEAD_DIM)
        second = tl.dot(squares, tl.trans(spread.to(variance.dtype.element_ty)), second, input_precision=DOT)
    return second


@triton.jit
def add_moment(
    acc: tl.tensor,
    mass: tl.tensor,
    q: tl.tensor,
    start: tl.tensor,
    length: tl.tensor,
    q_n: tl.tensor,
    centre: tl.tensor,
    moment: tl.tensor,
    BLOCK_M: tl.constexpr,
    SLICE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PADDED_DIM: tl.constexpr,
    CENTRED: tl.constexpr,
    DOT: tl.constexpr,
) -> tl.tensor:
    """Add mass `[M]` times x·`moment` `[PADDED_DIM, PADDED_DIM]`, x being q or, CENTRED, q less `centre`.

    A slice of channels at a time, to spare registers.
    """
    for column in tl.range(0, PADDED_DIM, SLICE, num_stages=1):
        moved = some_columns(q, start, length, q_n, column, BLOCK_M, SLICE, HEAD_DIM)
        if CENTRED:
            moved -= tl.load(centre + column + tl.arange(0, SLICE)).to(tl.float32)[None, :]
        part = tile_rows(moment, column, SLICE, PADDED_DIM, SLICE, PADDED_DIM, PADDED_DIM)
        acc = tl.dot((moved * mass[:, None]).to(part.dtype), part, acc, input_precision=DOT)
    return acc


# fmt: off
@triton.jit(do_not_specialize=("rows", "blocks", "size", "tokens", "chunk"))
def seen_by_means(
    centres: tl.tensor, k: tl.tensor, v: tl.tensor, starts: tl.tensor, lengths: tl.tensor, kv_len: tl.tensor,
    mean_k: tl.tensor, bias: tl.tensor, values: tl.tensor,
    scale: tl.tensor,
    k_b: tl.int64, k_h: tl.int64, k_n: tl.tensor,
    v_b: tl.int64, v_h: tl.int64, v_n: tl.tensor,
    rows: tl.int32, blocks: tl.int32, size: tl.int32, tokens: tl.int32, chunk: tl.int32,
    HEAD_DIM: tl.constexpr, PADDED_DIM: tl.constexpr, ROWS: tl.constexpr, BLOCK_N: tl.constexpr,
    UNIFORM: tl.constexpr, HAS_LENGTH: tl.constexpr, DOT: tl.constexpr,
) -> None:
    # fmt: on
    """What ROWS mean queries get from `chunk` key blocks: `bias` fp32 `[B, H, nq, nk]`, `values` `[B, H, nq, nk, P]`.

    bias = log2 Σ exp(scale * c·k) - scale * c·mean_k in units of log 2, -inf for a block without real keys: with
    scale * q·mean_k it makes the logit of the block for a query q. centres `[B, H, nq, P]`, mean_k `[B, H, nk, P]`.
    """
    head, item = tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    flat = item * tl.num_programs(1) + head
    groups = tl.cdiv(rows, ROWS)
    row_0, block_0 = (tl.program_id(0) % groups) * ROWS, (tl.program_id(0) // groups) * chunk
    real = tl.minimum(tokens, tl.load(kv_len + item)) if HAS_LENGTH else tokens
    k += item * k_b + head * k_h
    v += item * v_b + head * v_h
    mean_k += flat * blocks * PADDED_DIM
    row, dim, column = tl.arange(0, ROWS), tl.arange(0, PADDED_DIM), tl.arange(0, BLOCK_N)
    is_row = row < rows - row_0
    centres += flat * rows * PADDED_DIM
    centre = tile_rows(centres, row_0, rows - row_0, PADDED_DIM, ROWS, PADDED_DIM, PADDED_DIM)
    at_row = flat * rows + row_0 + row
    for block in range(block_0, tl.minimum(block_0 + chunk, blocks)):
        first, limit = block_span(block, starts, lengths, size, real, UNIFORM)
        acc = tl.zeros([ROWS, PADDED_DIM], tl.float32)
        top = tl.full([ROWS], _NOTHING, tl.float32)
        total = tl.zeros([ROWS], tl.float32)
        for at in range(0, limit, BLOCK_N):
            k_tile = tile_rows(k, first + at, limit - at, k_n, BLOCK_N, HEAD_DIM, PADDED_DIM)
            v_tile = tile_rows(v, first + at, limit - at, v_n, BLOCK_N, HEAD_DIM, PADDED_DIM)
            logits = tl.dot(centre, tl.trans(k_tile), input_precision=DOT) * (scale * _LOG2_E)
            logits = tl.where((column < limit - at)[None, :], logits, float("-inf"))
            new_top = tl.maximum(top, tl.max(logits, 1))
            weights = tl.exp2(logits - new_top[:, None])
            fade = tl.exp2(top - new_top)
            acc = tl.dot(weights.to(v_tile.dtype), v_tile, acc * fade[:, None], input_precision=DOT)
            total = total * fade + tl.sum(weights, 1)
            top = new_top
        mean = tl.load(mean_k + block * PADDED_DIM + dim).to(tl.float32)
        here = tl.sum(centre.to(tl.float32) * mean[None, :], 1) * (scale * _LOG2_E)
        mass = tl.where(total > 0.0, top + tl.log2(tl.where(total > 0.0, total, 1.0)) - here, float("-inf"))
        place = at_row * blocks + block
        tl.store(bias + place, mass, mask=is_row)
        value = acc / tl.where(total > 0.0, total, 1.0)[:, None]
        tl.store(
            values + place[:, None] * PADDED_DIM + dim[None, :], value.to(values.dtype.element_ty), mask=is_row[:, None]
        )


# fmt: off
@triton.jit(do_not_specialize=("blocks", "queries"))
def block_shares(
    q: tl.tensor, lse: tl.tensor, starts: tl.tensor, lengths: tl.tensor,
    mean_k: tl.tensor, bias: tl.tensor, variance: tl.tensor, log_tokens: tl.tensor, shares: tl.tensor,
    scale: tl.tensor,
    q_b: tl.int64, q_h: tl.int64, q_n: tl.tensor,
    blocks: tl.int32, queries: tl.int32,
    HEAD_DIM: tl.constexpr, PADDED_DIM: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    SECOND_ORDER: tl.constexpr, DOT: tl.constexpr,
) -> None:
    # fmt: on
    """Weight of each summary key in the softmax, averaged over the queries of a query block: `shares` `[B, H, nq, nk]`.

    lse: fp32 `[B, H, Nq]`, natural logarithm, of everything that the softmax runs over. bias: fp32 `[B, H, nq, nk]` in
    units of log 2, -inf where a block was selected. variance, log_tokens: with SECOND_ORDER, as in `attention`.
    """
    head, item = tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    flat = item * tl.num_programs(1) + head
    tiles = tl.cdiv(blocks, BLOCK_N)
    block, summary = tl.program_id(0) // tiles, (tl.program_id(0) % tiles) * BLOCK_N
    rows = tl.num_programs(0) // tiles
    start, length = tl.load(starts + block), tl.load(lengths + block)
    q += item * q_b + head * q_h
    lse += flat * queries
    row, column = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N)
    is_block = column < blocks - summary
    place = (flat * rows + block) * blocks + summary + column
    extra = tl.load(bias + place, mask=is_block, other=float("-inf"))
    means = tile_rows(
        mean_k + flat * blocks * PADDED_DIM, summary, blocks - summary, PADDED_DIM, BLOCK_N, PADDED_DIM, PADDED_DIM
    )
    share = tl.zeros([BLOCK_N], tl.float32)
    if SECOND_ORDER:
        spread = variance + flat * blocks * PADDED_DIM
    for at in range(0, length, BLOCK_M):
        q_tile = tile_rows(q, start + at, length - at, q_n, BLOCK_M, HEAD_DIM, PADDED_DIM)
        top = tl.load(lse + start + at + row, mask=row < length - at, other=float("-inf")) * _LOG2_E
        logits = tl.dot(q_tile, tl.trans(means), input_precision=DOT) * (scale * _LOG2_E) + extra[None, :]
        if SECOND_ORDER:
            mass = tl.load(log_tokens + item * blocks + summary + column, mask=is_block, other=0.0)
            second = second_order(
                q, start + at, length - at, q_n, spread, summary, blocks - summary, scale,
                BLOCK_M, BLOCK_N, min(32, PADDED_DIM), HEAD_DIM, PADDED_DIM, DOT,
            )  # fmt: skip
            logits += tl.minimum(second, tl.where(mass > 0.0, mass, 0.0)[None, :])
        # A query without any key has no weights.
        seen = top > float("-inf")
        weights = tl.exp2(logits - tl.where(seen, top, 0.0)[:, None])
        share += tl.sum(tl.where(seen[:, None], weights, 0.0), 0)
    tl.store(shares + place, (share / length).to(shares.dtype.element_ty), mask=is_block)


# fmt: off
@triton.jit(do_not_specialize=("tiles",))
def add_mixed(
    q: tl.tensor, part: tl.tensor, out: tl.tensor, starts: tl.tensor, lengths: tl.tensor,
    centres: tl.tensor, mixed: tl.tensor,
    scale: tl.tensor,
    q_b: tl.int64, q_h: tl.int64, q_n: tl.tensor,
    part_b: tl.int64, part_h: tl.int64, part_n: tl.tensor,
    out_b: tl.int64, out_h: tl.int64, out_n: tl.tensor,
    tiles: tl.int32,
    HEAD_DIM: tl.constexpr, PADDED_DIM: tl.constexpr, BLOCK_M: tl.constexpr, SLICE: tl.constexpr,
    CENTRED: tl.constexpr, DOT: tl.constexpr,
) -> None:
    # fmt: on
    """`out` = `part` + scale * x·`mixed`, both `[B, H, N, D]`, with one matrix per query block `[B, H, nq, P, P]`."""
    head, item = tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    flat = item * tl.num_programs(1) + head
    block, offset = tl.program_id(0) // tiles, (tl.program_id(0) % tiles) * BLOCK_M
    row_of_plan = flat * (tl.num_programs(0) // tiles) + block
    start, length = tl.load(starts + block) + offset, tl.load(lengths + block) - offset
    q += item * q_b + head * q_h
    part += item * part_b + head * part_h
    acc = tile_rows(part, start, length, part_n, BLOCK_M, HEAD_DIM, PADDED_DIM).to(tl.float32)
    mass = tl.zeros([BLOCK_M], tl.float32) + scale
    acc = add_moment(
        acc, mass, q, start, length, q_n, centres + row_of_plan * PADDED_DIM,
        mixed + row_of_plan * (PADDED_DIM * PADDED_DIM),
        BLOCK_M, SLICE, HEAD_DIM, PADDED_DIM, CENTRED, DOT,
    )  # fmt: skip
    row, dim = tl.arange(0, BLOCK_M), tl.arange(0, PADDED_DIM)
    at = out + item * out_b + head * out_h + (tl.cast(start, tl.int64) + row)[:, None] * out_n + dim[None, :]
    tl.store(at, acc.to(out.dtype.element_ty), mask=(row < length)[:, None] & (dim < HEAD_DIM)[None, :])

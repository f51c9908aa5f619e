"""Scores of pairs of blocks in Triton: products of rows of queries and keys, pooled before anything is written.

A slot of a block is one row of the product: a mean, a sampled token, or a group of `stride` neighbouring tokens, whose
products are summed along the antidiagonal. Blocks have a power of two of slots, of which some may be empty. Logits are
in units of log 2. Axis legend: B batch, H heads, N tokens, D head size (P when padded to a power of two),
nq / nk query / key blocks, R / C slots of all query / key blocks.
"""

# Conditions of compile time and of run time stay apart.
from __future__ import annotations

import triton
import triton.language as tl

_NOTHING = tl.constexpr(-1e30)
_LOG2_E = tl.constexpr(1.4426950408889634)
_LN_2 = tl.constexpr(0.6931471805599453)
_TINY = tl.constexpr(1.1754943508222875e-38)
_LARGEST_EXPONENT = tl.constexpr(60 * 1.4426950408889634)


@triton.jit
def _tokens(
    x: tl.tensor,
    token: tl.tensor,
    inside: tl.tensor,
    row: tl.tensor,
    column: tl.tensor,
    HEAD_DIM: tl.constexpr,
    SLICE: tl.constexpr,
) -> tl.tensor:
    """SLICE channels from `column` on of some rows of x, zero where `inside` is false."""
    dim = column + tl.arange(0, SLICE)
    mask = inside[:, None] & (dim < HEAD_DIM)[None, :]
    return tl.load(x + token.to(tl.int64)[:, None] * row + dim[None, :], mask=mask, other=0.0)


@triton.jit
def _log_sum(x: tl.tensor, axis: tl.constexpr) -> tl.tensor:
    """log2 Σ 2^x along one axis; -inf where there is nothing."""
    top = tl.max(x, axis)
    top = tl.where(top > float("-inf"), top, 0.0)
    return top + tl.log2(tl.sum(tl.exp2(x - tl.expand_dims(top, axis)), axis))


# fmt: off
@triton.jit(do_not_specialize=("rows", "stride", "at_b", "at_h"))
def partial_means(
    x: tl.tensor, at: tl.tensor, count: tl.tensor, out: tl.tensor,
    x_b: tl.int64, x_h: tl.int64, x_n: tl.tensor,
    at_b: tl.int64, at_h: tl.int64, rows: tl.int32, stride: tl.int32,
    HEAD_DIM: tl.constexpr, PADDED_DIM: tl.constexpr, ROWS: tl.constexpr,
) -> None:
    # fmt: on
    """Mean of the tokens of every slot that is neither empty nor full: `out` `[B, H, R, P]`; others are not written.

    x: `[B, H, N, D]`. at, count: int32 `[B or 1, H or 1, R]`, first token of a slot and how many it has.
    """
    head, item = tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    row, dim = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.arange(0, PADDED_DIM)
    place = item * at_b + head * at_h + row
    first = tl.load(at + place, mask=row < rows, other=0)
    tokens = tl.load(count + place, mask=row < rows, other=0)
    partial = (tokens > 0) & (tokens < stride)
    x += item * x_b + head * x_h
    total = tl.zeros([ROWS, PADDED_DIM], tl.float32)
    for step in range(0, tl.max(tl.where(partial, tokens, 0), 0)):
        total += _tokens(x, first + step, partial & (step < tokens), x_n, 0, HEAD_DIM, PADDED_DIM).to(tl.float32)
    mean = total / tl.maximum(tokens, 1).to(tl.float32)[:, None]
    out += ((item * tl.num_programs(1) + head) * rows + row)[:, None] * PADDED_DIM + dim[None, :]
    tl.store(out, mean.to(out.dtype.element_ty), mask=partial[:, None])


# fmt: off
@triton.jit(do_not_specialize=("rows", "columns", "stride", "q_at_b", "q_at_h", "k_at_b", "k_at_h"))
def slot_scores(
    q: tl.tensor, q_at: tl.tensor, q_count: tl.tensor, q_level: tl.tensor, q_means: tl.tensor,
    k: tl.tensor, k_at: tl.tensor, k_count: tl.tensor, k_level: tl.tensor, k_means: tl.tensor,
    out: tl.tensor,
    scale: tl.tensor,
    q_b: tl.int64, q_h: tl.int64, q_n: tl.tensor,
    k_b: tl.int64, k_h: tl.int64, k_n: tl.tensor,
    q_at_b: tl.int64, q_at_h: tl.int64, k_at_b: tl.int64, k_at_h: tl.int64,
    rows: tl.int32, columns: tl.int32, stride: tl.int32,
    HEAD_DIM: tl.constexpr, PADDED_DIM: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    SLICE: tl.constexpr, GROUP_M: tl.constexpr, GROUP_N: tl.constexpr,
    LARGEST: tl.constexpr, POOL_ROWS: tl.constexpr, PARTIAL: tl.constexpr, DOT: tl.constexpr,
) -> None:
    # fmt: on
    """Logits of slots, pooled over the GROUP_N slots of a key block: `out` fp32 `[B, H, R, nk]` in units of log 2.

    Pooled by their largest with LARGEST, else by a log-sum-exp. POOL_ROWS: over the GROUP_M slots of a query block too,
    by a log-sum-exp, to `[B, H, nq, nk]` in natural logarithm.
    level: fp32 like at, log2 of the weight of a slot, -inf for none; of queries it is read with POOL_ROWS alone.
    q_means, k_means: with PARTIAL, what `partial_means` gives: tokens that a slot lacks stand there.
    """
    head, item = tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    flat = item * tl.num_programs(1) + head
    tiles = tl.cdiv(rows, BLOCK_M)
    row = (tl.program_id(0) % tiles) * BLOCK_M + tl.arange(0, BLOCK_M)
    column = (tl.program_id(0) // tiles) * BLOCK_N + tl.arange(0, BLOCK_N)
    at_row, at_column = item * q_at_b + head * q_at_h + row, item * k_at_b + head * k_at_h + column
    first_q = tl.load(q_at + at_row, mask=row < rows, other=0)
    first_k = tl.load(k_at + at_column, mask=column < columns, other=0)
    tokens_q = tl.load(q_count + at_row, mask=row < rows, other=0)
    tokens_k = tl.load(k_count + at_column, mask=column < columns, other=0)
    q += item * q_b + head * q_h
    k += item * k_b + head * k_h
    if PARTIAL:
        q_means += flat * rows * PADDED_DIM
        k_means += flat * columns * PADDED_DIM
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for step in range(0, stride * (PADDED_DIM // SLICE)):
        number, channel = step // (PADDED_DIM // SLICE), (step % (PADDED_DIM // SLICE)) * SLICE
        other = stride - 1 - number
        q_tile = _tokens(q, first_q + number, number < tokens_q, q_n, channel, HEAD_DIM, SLICE)
        k_tile = _tokens(k, first_k + other, other < tokens_k, k_n, channel, HEAD_DIM, SLICE)
        if PARTIAL:
            lacks_q, lacks_k = (tokens_q > 0) & (number >= tokens_q), (tokens_k > 0) & (other >= tokens_k)
            q_tile += _tokens(q_means, row, lacks_q, PADDED_DIM, channel, PADDED_DIM, SLICE)
            k_tile += _tokens(k_means, column, lacks_k, PADDED_DIM, channel, PADDED_DIM, SLICE)
        acc = tl.dot(q_tile, tl.trans(k_tile), acc, input_precision=DOT)
    level = tl.load(k_level + at_column, mask=column < columns, other=float("-inf"))
    # A slot stands for the mean of its products.
    logits = acc * (scale * _LOG2_E / stride) + level[None, :]
    blocks = columns // GROUP_N
    block = (tl.program_id(0) // tiles) * (BLOCK_N // GROUP_N) + tl.arange(0, BLOCK_N // GROUP_N)
    if GROUP_N > 1:
        apart = tl.reshape(logits, [BLOCK_M, BLOCK_N // GROUP_N, GROUP_N])
        pooled = tl.max(apart, 2) if LARGEST else _log_sum(apart, 2)
    else:
        pooled = logits
    if POOL_ROWS:
        pooled += tl.load(q_level + at_row, mask=row < rows, other=float("-inf"))[:, None]
        both = _log_sum(tl.reshape(pooled, [BLOCK_M // GROUP_M, GROUP_M, BLOCK_N // GROUP_N]), 1)
        group = (tl.program_id(0) % tiles) * (BLOCK_M // GROUP_M) + tl.arange(0, BLOCK_M // GROUP_M)
        groups = rows // GROUP_M
        place = (flat * groups + group)[:, None] * blocks + block[None, :]
        tl.store(out + place, both * _LN_2, mask=(group < groups)[:, None] & (block < blocks)[None, :])
    else:
        place = (flat * rows + row)[:, None] * blocks + block[None, :]
        tl.store(out + place, pooled, mask=(row < rows)[:, None] & (block < blocks)[None, :])


# fmt: off
@triton.jit(do_not_specialize=("blocks", "at_b", "at_h"))
def pool_slots(
    slots: tl.tensor, level: tl.tensor, out: tl.tensor, norms: tl.tensor,
    at_b: tl.int64, at_h: tl.int64, blocks: tl.int32,
    GROUP_M: tl.constexpr, COLUMNS: tl.constexpr, LARGEST: tl.constexpr, NORMS: tl.constexpr,
) -> None:
    # fmt: on
    """Rows of `slots` fp32 `[B, H, R, nk]` relative to the whole of them, pooled to `out` fp32 `[B, H, nq, nk]`.

    Relative to their largest number, and pooled by the largest, with LARGEST; else relative to their log-sum-exp, and
    pooled to the logarithm of the weighted sum of what is then a mass. level: fp32 `[B or 1, H or 1, R]`, log2 of the
    weights. -inf is kept where a key block has no slot.
    norms: fp32 `[B, H, R]`, natural logarithm. NORMS 1: what rows were taken relative to goes there; 2: they are taken
    relative to it instead, or, where it lies further below their own than any weight may exceed 1, to that bound.
    """
    block, head, item = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    flat = item * tl.num_programs(1) + head
    slot, column = tl.arange(0, GROUP_M), tl.arange(0, COLUMNS)
    weight = tl.load(level + item * at_b + head * at_h + block * GROUP_M + slot)
    slots += ((flat * tl.num_programs(0) + block) * GROUP_M + slot)[:, None] * blocks + column[None, :]
    out += (flat * tl.num_programs(0) + block) * blocks + column
    top, total = tl.full([GROUP_M], _NOTHING, tl.float32), tl.zeros([GROUP_M], tl.float32)
    for first in range(0, blocks, COLUMNS):
        tile = tl.load(slots + first, mask=(first + column < blocks)[None, :], other=float("-inf"))
        new_top = tl.maximum(top, tl.max(tile, 1))
        total = total * tl.exp2(top - new_top) + tl.sum(tl.exp2(tile - new_top[:, None]), 1)
        top = new_top
    norm = top if LARGEST else top + tl.log2(total)
    at_norm = (flat * tl.num_programs(0) + block) * GROUP_M + slot
    if NORMS == 1:
        tl.store(norms + at_norm, norm * _LN_2)
    if NORMS == 2:
        norm = tl.maximum(tl.load(norms + at_norm) * _LOG2_E, norm - _LARGEST_EXPONENT)
    for first in range(0, blocks, COLUMNS):
        inside = first + column < blocks
        tile = tl.load(slots + first, mask=inside[None, :], other=float("-inf"))
        if LARGEST:
            best = tl.max(tl.where((weight > float("-inf"))[:, None], tile - norm[:, None], float("-inf")), 0)
            pooled = best * _LN_2
        else:
            mass = tl.sum(tl.exp2(tile + (weight - norm)[:, None]), 0)
            pooled = tl.log2(tl.maximum(mass, _TINY)) * _LN_2
            pooled = tl.where(tl.max(tile, 0) > float("-inf"), pooled, float("-inf"))
        tl.store(out + first, pooled, mask=inside)

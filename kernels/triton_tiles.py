"""Pieces that the Triton kernels share: tiles of rows, blocks, logits, the online softmax, and boxes of windows."""

# Conditions of compile time and of run time stay apart, and no load runs for the sake of an expression.
from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def tile_rows(
    base: tl.tensor,
    first: tl.tensor,
    limit: tl.tensor,
    row: tl.tensor,
    ROWS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PADDED_DIM: tl.constexpr,
) -> tl.tensor:
    """`[ROWS, PADDED_DIM]` from row `first` of a matrix with stride `row`; zero from row `limit` of the tile on."""
    at, column = tl.arange(0, ROWS), tl.arange(0, PADDED_DIM)
    mask = (at < limit)[:, None]
    if HEAD_DIM != PADDED_DIM:
        mask = mask & (column < HEAD_DIM)[None, :]
    pointers = base + tl.cast(first, tl.int64) * row + at[:, None] * row + column[None, :]
    return tl.load(pointers, mask=mask, other=0.0)


@triton.jit
def value_tile(
    base: tl.tensor,
    block: tl.tensor,
    first: tl.tensor,
    row: tl.tensor,
    COLUMNS: tl.constexpr,
    PADDED_DIM: tl.constexpr,
) -> tl.tensor:
    """`[PADDED_DIM, COLUMNS]`: tokens from `first` on of a block of 8-bit values, a channel in each `row`."""
    dim, column = tl.arange(0, PADDED_DIM), tl.arange(0, COLUMNS)
    at = base + tl.cast(block, tl.int64) * PADDED_DIM * row + first
    return tl.load(at + dim[:, None] * row + column[None, :])


@triton.jit
def some_columns(
    base: tl.tensor,
    first: tl.tensor,
    limit: tl.tensor,
    row: tl.tensor,
    column: tl.tensor,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
) -> tl.tensor:
    """Some columns `[ROWS, COLUMNS]` of what `tile_rows` gives, in fp32."""
    at, dim = tl.arange(0, ROWS), column + tl.arange(0, COLUMNS)
    mask = (at < limit)[:, None] & (dim < HEAD_DIM)[None, :]
    pointers = base + tl.cast(first, tl.int64) * row + at[:, None] * row + dim[None, :]
    return tl.load(pointers, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def block_span(
    block: tl.tensor, starts: tl.tensor, lengths: tl.tensor, size: tl.tensor, tokens: tl.tensor, UNIFORM: tl.constexpr
) -> tl.tensor:
    """First token of a key block, and how many of its tokens are real."""
    if UNIFORM:
        start = block * size
        length = tl.minimum(size, tokens - start)
    else:
        start = tl.load(starts + block)
        length = tl.minimum(tl.load(lengths + block), tokens - start)
    return start, length


@triton.jit
def tile_logits(
    q_tile: tl.tensor, k_tile: tl.tensor, factor: tl.tensor, INT8: tl.constexpr, DOT: tl.constexpr
) -> tl.tensor:
    """factor * q·k `[M, N]`, accumulated in int32 or fp32."""
    if INT8:
        return tl.dot(q_tile, tl.trans(k_tile)).to(tl.float32) * factor
    else:
        return tl.dot(q_tile, tl.trans(k_tile), input_precision=DOT) * factor


@triton.jit
def softmax_step(
    acc: tl.tensor,
    top: tl.tensor,
    total: tl.tensor,
    logits: tl.tensor,
    values: tl.tensor,
    FP8: tl.constexpr,
    DOT: tl.constexpr,
) -> tl.tensor:
    """One tile into the online softmax: accumulator, maximum, sum, fading factor `[M]` and weights `[M, N]`.

    FP8: weights and values, `[D, N]`, are multiplied in e4m3. What stands for the maximum is then a whole power of two,
    so that no weight exceeds 256, and what a weight is rounded to does not depend on the tiles that came before.
    """
    highest = tl.max(logits, 1)
    new_top = tl.maximum(top, tl.ceil(highest) - 8.0 if FP8 else highest)
    weights = tl.exp2(logits - new_top[:, None])
    fade = tl.exp2(top - new_top)
    if FP8:
        # The matrix unit sums such products in fewer than 32 bits: within a tile alone, tiles are added in fp32.
        part = tl.dot(weights.to(values.dtype), tl.trans(values), max_num_imprecise_acc=logits.shape[1])
        acc = acc * fade[:, None] + part
    else:
        acc = tl.dot(weights.to(values.dtype), values, acc * fade[:, None], input_precision=DOT)
    return acc, new_top, total * fade + tl.sum(weights, 1), fade, weights


@triton.jit
def inside_box(
    keep: tl.tensor,
    lower: tl.tensor,
    upper: tl.tensor,
    coordinates: tl.tensor,
    ball: tl.tensor,
    query: tl.tensor,
    key: tl.tensor,
    is_query: tl.tensor,
    is_key: tl.tensor,
    AXES: tl.constexpr,
    STRIDE: tl.constexpr,
    BALL: tl.constexpr,
) -> tl.tensor:
    """Narrow `keep` `[M, N]` to the keys in the box, or ball, of each query; query `[M]` and key `[N]` are tokens."""
    squared = 0.0
    for axis in tl.static_range(AXES):
        low = tl.load(lower + query * AXES + axis, mask=is_query, other=0)[:, None]
        high = tl.load(upper + query * AXES + axis, mask=is_query, other=0)[:, None]
        place = tl.load(coordinates + key * AXES + axis, mask=is_key, other=0)[None, :]
        keep = keep & (place >= low) & (place < high)
        if STRIDE[axis] != 1:
            keep = keep & ((place - low) % STRIDE[axis] == 0)
        if BALL:
            offset = (2 * place - low - high + 1).to(tl.float32)
            squared += tl.load(ball + axis) * offset * offset
    if BALL:
        keep = keep & (squared < tl.load(ball + AXES))
    return keep

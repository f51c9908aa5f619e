"""Statistics of blocks of tokens, and operands of 8 bits, in Triton.

Statistics read every token once: what tiles of a block have in common is merged as they come. Operands of 8 bits need
the largest number of a block first; what is read twice is in cache.
Axis legend: B batch, H heads, N tokens, D head size (P when padded to a power of two), nk key blocks.
"""

# Conditions of compile time and of run time stay apart, and no load runs for the sake of an expression.
# ruff: noqa: SIM102
from __future__ import annotations

import triton
import triton.language as tl

from dit_accel.kernels.triton_tiles import block_span, some_columns, tile_rows

# Arguments that change from call to call: none of their values may lead to another compilation.
VARYING = ("blocks", "size", "tokens", "chunk", "chunks", "step", "whole", "copy_b", "copy_h", "mean_b", "mean_h")


# fmt: off
@triton.jit(do_not_specialize=VARYING)
def statistics(
    k: tl.tensor, v: tl.tensor, starts: tl.tensor, lengths: tl.tensor, kv_len: tl.tensor,
    mean_k: tl.tensor, mean_v: tl.tensor, variance: tl.tensor, moments: tl.tensor,
    copy_k: tl.tensor, copy_v: tl.tensor,
    k_b: tl.int64, k_h: tl.int64, k_n: tl.tensor,
    v_b: tl.int64, v_h: tl.int64, v_n: tl.tensor,
    mean_b: tl.int64, mean_h: tl.int64, copy_b: tl.int64, copy_h: tl.int64,
    blocks: tl.int32, size: tl.int32, tokens: tl.int32, chunk: tl.int32, chunks: tl.int32,
    step: tl.int32, whole: tl.int32,
    HEAD_DIM: tl.constexpr, PADDED_DIM: tl.constexpr, BLOCK_N: tl.constexpr, COLUMNS: tl.constexpr,
    UNIFORM: tl.constexpr, ONE_TILE: tl.constexpr, HAS_LENGTH: tl.constexpr, VALUES: tl.constexpr,
    VARIANCE: tl.constexpr, MOMENTS: tl.constexpr, SQUARES: tl.constexpr, COPY: tl.constexpr,
    SAMPLED: tl.constexpr, DOT: tl.constexpr,
) -> None:
    # fmt: on
    """Means, variance and Σ (k - mean) vᵀ of the blocks `chunk * i ... chunk * (i + 1) - 1`, for program i.

    k, v: `[B, H, N, D]`. mean_k, mean_v: `[B, H, nk, P]` with strides mean_b and mean_h; variance likewise, contiguous.
    moments: fp32 `[B, H, chunks, P, P]`; a program computes COLUMNS of its columns, the first of them all of k's.
    With SQUARES it is fp32 `[B, H, nk, P / COLUMNS, P]` instead: the squares of those columns, summed; chunk is 1.
    VALUES: v is given; mean_v may be None.
    SAMPLED: all but mean_k is that of one token in `step`, as `dit_accel.selection.covariance.sample_tokens` takes
    them of blocks of at most `whole` tokens.
    copy_k, copy_v: with COPY, where real keys and values go, `[N, P]` per head, zero where a token is not real.
    """
    head, item = tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    flat = item * tl.num_programs(1) + head
    index, part = tl.program_id(0) % chunks, tl.program_id(0) // chunks
    real = tl.minimum(tokens, tl.load(kv_len + item)) if HAS_LENGTH else tokens
    k += item * k_b + head * k_h
    if VALUES:
        v += item * v_b + head * v_h
    dim, channel, row = tl.arange(0, PADDED_DIM), part * COLUMNS + tl.arange(0, COLUMNS), tl.arange(0, BLOCK_N)
    moment = tl.zeros([PADDED_DIM, COLUMNS], tl.float32)
    for block in range(index * chunk, tl.minimum((index + 1) * chunk, blocks)):
        first, limit = block_span(block, starts, lengths, size, real, UNIFORM)
        # How many tokens were met, their means, the squared deviations from them, and the sum of all keys.
        met = tl.full([], 0.0, tl.float32)
        mean, spread = tl.zeros([PADDED_DIM], tl.float32), tl.zeros([PADDED_DIM], tl.float32)
        total, middle = tl.zeros([PADDED_DIM], tl.float32), tl.zeros([COLUMNS], tl.float32)
        for at in range(0, tl.minimum(size, tokens - first) if COPY else limit, BLOCK_N):
            tile = tile_rows(k, first + at, limit - at, k_n, BLOCK_N, HEAD_DIM, PADDED_DIM)
            offset = item * copy_b + head * copy_h + (first + at + row).to(tl.int64)[:, None] * PADDED_DIM
            is_copied = (first + at + row < tokens)[:, None] & (at + row < size)[:, None]
            if COPY:
                if part == 0:
                    tl.store(copy_k + offset + dim[None, :], tile, mask=is_copied)
            tile = tile.to(tl.float32)
            chosen = at + row < limit
            if SAMPLED:
                total += tl.sum(tile, 0)
                place = (at + row) // step
                chosen = chosen & (at + row == tl.minimum(place * step + place % step, whole - 1))
                tile = tl.where(chosen[:, None], tile, 0.0)
            here = tl.sum(chosen.to(tl.float32), 0)
            share = here / tl.maximum(met + here, 1.0)
            tile_mean = tl.sum(tile, 0) / tl.maximum(here, 1.0)
            moved = tile_mean - mean
            delta = tl.where(chosen[:, None], tile - tile_mean[None, :], 0.0)
            if VARIANCE:
                spread += tl.sum(delta * delta, 0) + moved * moved * (met * share)
            if VALUES:
                values = some_columns(v, first + at, limit - at, v_n, part * COLUMNS, BLOCK_N, COLUMNS, HEAD_DIM)
                if COPY:
                    tl.store(copy_v + offset + channel[None, :], values.to(copy_v.dtype.element_ty), mask=is_copied)
                if SAMPLED:
                    values = tl.where(chosen[:, None], values, 0.0)
                passed = tl.sum(values, 0) / tl.maximum(here, 1.0) - middle
                if MOMENTS or SQUARES:
                    kind = v.dtype.element_ty
                    moment = tl.dot(tl.trans(delta.to(kind)), values.to(kind), moment, input_precision=DOT)
                    if not ONE_TILE:
                        moment += moved[:, None] * (passed * (met * share))[None, :]
                middle += passed * share
            mean += moved * share
            met += here
        if part == 0:
            place = item * mean_b + head * mean_h + block * PADDED_DIM + dim
            every = total / tl.maximum(limit, 1).to(tl.float32) if SAMPLED else mean
            tl.store(mean_k + place, every.to(mean_k.dtype.element_ty))
            if VARIANCE:
                place = (flat * blocks + block) * PADDED_DIM + dim
                tl.store(variance + place, (spread / tl.maximum(met, 1.0)).to(variance.dtype.element_ty))
        if VALUES:
            if mean_v is not None:
                place = item * mean_b + head * mean_h + block * PADDED_DIM + channel
                tl.store(mean_v + place, middle.to(mean_v.dtype.element_ty))
    if SQUARES:
        at = moments + ((flat * chunks + index) * (PADDED_DIM // COLUMNS) + part) * PADDED_DIM
        tl.store(at + dim, tl.sum(moment * moment, 1))
    if MOMENTS:
        at = moments + (flat * chunks + index) * (PADDED_DIM * PADDED_DIM) + part * COLUMNS
        tl.store(at + dim[:, None] * PADDED_DIM + tl.arange(0, COLUMNS)[None, :], moment)


# fmt: off
@triton.jit(do_not_specialize=("blocks", "size", "tokens"))
def quantize(
    x: tl.tensor, out: tl.tensor, step: tl.tensor, shift: tl.tensor, offset: tl.tensor,
    starts: tl.tensor, lengths: tl.tensor, kv_len: tl.tensor,
    scale: tl.tensor,
    x_b: tl.int64, x_h: tl.int64, x_n: tl.tensor,
    out_b: tl.int64, out_h: tl.int64, out_n: tl.tensor,
    blocks: tl.int32, size: tl.int32, tokens: tl.int32,
    HEAD_DIM: tl.constexpr, PADDED_DIM: tl.constexpr, BLOCK_N: tl.constexpr,
    UNIFORM: tl.constexpr, HAS_LENGTH: tl.constexpr, SUBTRACT: tl.constexpr, PROJECT: tl.constexpr,
) -> None:
    # fmt: on
    """One block of tokens to INT8 with one symmetric scale, max|x| / 127 + 1e-7, half rounded away from zero.

    x: `[B, H, N, D]`; out: int8 like x; step: fp32 `[B, H, n]`, the scale of each block. shift: fp32 `[B, H, P]`; with
    SUBTRACT it is taken from x first, with PROJECT `scale * x·shift` goes to offset, fp32 `[B, H, N]`.
    """
    block = tl.program_id(0)
    head, item = tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    flat = item * tl.num_programs(1) + head
    real = tl.minimum(tokens, tl.load(kv_len + item)) if HAS_LENGTH else tokens
    first, limit = block_span(block, starts, lengths, size, real, UNIFORM)
    x += item * x_b + head * x_h
    out += item * out_b + head * out_h
    dim = tl.arange(0, PADDED_DIM)
    if SUBTRACT or PROJECT:
        common = tl.load(shift + flat * PADDED_DIM + dim)
    largest = tl.zeros([PADDED_DIM], tl.float32)
    for at in range(0, limit, BLOCK_N):
        tile = tile_rows(x, first + at, limit - at, x_n, BLOCK_N, HEAD_DIM, PADDED_DIM).to(tl.float32)
        row = at + tl.arange(0, BLOCK_N)
        if SUBTRACT:
            tile = tl.where((row < limit)[:, None], tile - common[None, :], 0.0)
        if PROJECT:
            projected = scale * tl.sum(tile * common[None, :], 1)
            tl.store(offset + flat * tokens + first + row, projected, mask=row < limit)
        largest = tl.maximum(largest, tl.max(tl.abs(tile), 0))
    unit = tl.max(largest, 0) / 127 + 1e-7
    tl.store(step + flat * blocks + block, unit)
    for at in range(0, limit, BLOCK_N):
        tile = tile_rows(x, first + at, limit - at, x_n, BLOCK_N, HEAD_DIM, PADDED_DIM).to(tl.float32)
        row = at + tl.arange(0, BLOCK_N)
        if SUBTRACT:
            tile = tile - common[None, :]
        level = tile / unit
        level = (level + tl.where(level >= 0, 0.5, -0.5)).to(tl.int8)
        mask = (row < limit)[:, None] & (dim < HEAD_DIM)[None, :]
        tl.store(out + (first + row).to(tl.int64)[:, None] * out_n + dim[None, :], level, mask=mask)


# fmt: off
@triton.jit(do_not_specialize=("tokens",))
def value_range(
    v: tl.tensor, sums: tl.tensor, lowest: tl.tensor, highest: tl.tensor, kv_len: tl.tensor,
    v_b: tl.int64, v_h: tl.int64, v_n: tl.tensor,
    tokens: tl.int32,
    HEAD_DIM: tl.constexpr, PADDED_DIM: tl.constexpr, BLOCK_N: tl.constexpr, ROWS: tl.constexpr,
    HAS_LENGTH: tl.constexpr,
) -> None:
    # fmt: on
    """Sum and extremes of each channel of v `[B, H, N, D]` over the real tokens of ROWS: fp32 `[B, H, programs, P]`."""
    head, item = tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    flat = item * tl.num_programs(1) + head
    real = tl.minimum(tokens, tl.load(kv_len + item)) if HAS_LENGTH else tokens
    v += item * v_b + head * v_h
    start = tl.program_id(0) * ROWS
    total = tl.zeros([PADDED_DIM], tl.float32)
    low = tl.full([PADDED_DIM], float("inf"), tl.float32)
    high = tl.full([PADDED_DIM], float("-inf"), tl.float32)
    for first in range(start, tl.minimum(start + ROWS, real), BLOCK_N):
        tile = tile_rows(v, first, real - first, v_n, BLOCK_N, HEAD_DIM, PADDED_DIM).to(tl.float32)
        inside = (first + tl.arange(0, BLOCK_N) < real)[:, None]
        total += tl.sum(tile, 0)
        low = tl.minimum(low, tl.min(tl.where(inside, tile, float("inf")), 0))
        high = tl.maximum(high, tl.max(tl.where(inside, tile, float("-inf")), 0))
    at = (flat * tl.num_programs(0) + tl.program_id(0)) * PADDED_DIM + tl.arange(0, PADDED_DIM)
    tl.store(sums + at, total)
    tl.store(lowest + at, low)
    tl.store(highest + at, high)


# fmt: off
@triton.jit(do_not_specialize=("size", "tokens"))
def quantize_values(
    v: tl.tensor, out: tl.tensor, mean: tl.tensor, step: tl.tensor,
    starts: tl.tensor, lengths: tl.tensor, kv_len: tl.tensor,
    v_b: tl.int64, v_h: tl.int64, v_n: tl.tensor,
    out_n: tl.tensor, size: tl.int32, tokens: tl.int32,
    HEAD_DIM: tl.constexpr, PADDED_DIM: tl.constexpr, BLOCK_N: tl.constexpr,
    UNIFORM: tl.constexpr, HAS_LENGTH: tl.constexpr,
) -> None:
    # fmt: on
    """One block of v `[B, H, N, D]` less its mean in e4m3, a channel a row: out `[B, H, n, P, out_n]`, else 0.

    mean, step: fp32 `[B, H, P]`, what is taken from each channel, and its scale.
    """
    block = tl.program_id(0)
    head, item = tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    flat = item * tl.num_programs(1) + head
    real = tl.minimum(tokens, tl.load(kv_len + item)) if HAS_LENGTH else tokens
    first, limit = block_span(block, starts, lengths, size, real, UNIFORM)
    v += item * v_b + head * v_h
    out += (flat * tl.num_programs(0) + block) * PADDED_DIM * out_n
    dim, column = tl.arange(0, PADDED_DIM), tl.arange(0, BLOCK_N)
    common, unit = tl.load(mean + flat * PADDED_DIM + dim), tl.load(step + flat * PADDED_DIM + dim)
    for at in range(0, out_n, BLOCK_N):
        tile = tile_rows(v, first + at, limit - at, v_n, BLOCK_N, HEAD_DIM, PADDED_DIM).to(tl.float32)
        level = tl.where((at + column < limit)[:, None], (tile - common[None, :]) / unit[None, :], 0.0)
        tl.store(out + dim[:, None] * out_n + at + column[None, :], tl.trans(level.to(out.dtype.element_ty)))

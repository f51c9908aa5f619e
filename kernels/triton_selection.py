"""Ranking key blocks by their scores, and moving tokens into an order and back, in Triton.

No row is sorted: the cut is found bit by bit in the registers of one program, and ties go to the lower index.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def ordered_bits(x: tl.tensor) -> tl.tensor:
    """Integers from 0 to 2³² - 1, int64, in the order of the fp32 numbers x."""
    # Adding zero makes minus zero plus zero.
    bits = (x + 0.0).to(tl.int32, bitcast=True)
    return tl.where(bits >= 0, bits, bits ^ 0x7FFFFFFF).to(tl.int64) + 2147483648


@triton.jit
def _ranks(scores: tl.tensor, first: tl.tensor, columns: tl.tensor, COLUMNS: tl.constexpr) -> tl.tensor:
    """Of one row: integers in the order of the ranking, those of `first` on top and of no candidate 0."""
    row, column = tl.program_id(0).to(tl.int64), tl.arange(0, COLUMNS)
    inside = column < columns
    score = tl.load(scores + row * columns + column, mask=inside, other=float("-inf"))
    forced = tl.load(first + row * columns + column, mask=inside, other=0) != 0
    bits = ordered_bits(tl.where(forced, float("inf"), score))
    return tl.where(inside, bits, 0)


# fmt: off
@triton.jit(do_not_specialize=("columns",))
def leading(
    scores: tl.tensor, first: tl.tensor, counts: tl.tensor, kept: tl.tensor,
    columns: tl.int32,
    COLUMNS: tl.constexpr,
) -> None:
    # fmt: on
    """The `counts` best candidates of one row, uint8 `kept`, all `[R, columns]`; counts int32 `[R]`."""
    row, column = tl.program_id(0).to(tl.int64), tl.arange(0, COLUMNS)
    bits = _ranks(scores, first, columns, COLUMNS)
    wanted = tl.minimum(tl.load(counts + row), columns)
    # The highest cut above which enough candidates lie: its bits from the first to the last.
    cut = tl.zeros([1], tl.int64)
    bit = tl.full([1], 2147483648, tl.int64)
    for _ in range(32):
        enough = tl.sum(tl.where(bits >= cut + bit, 1, 0), 0) >= wanted
        cut = tl.where(enough, cut + bit, cut)
        bit = bit // 2
    above = bits > cut
    ties = (bits == cut) & (column < columns)
    missing = wanted - tl.sum(tl.where(above, 1, 0), 0)
    taken = above | (ties & (tl.cumsum(tl.where(ties, 1, 0), 0) <= missing))
    tl.store(kept + row * columns + column, tl.where(taken, 1, 0).to(tl.uint8), mask=column < columns)


# fmt: off
@triton.jit(do_not_specialize=("columns",))
def reaching(
    scores: tl.tensor, first: tl.tensor, shares: tl.tensor, mass: tl.tensor, counts: tl.tensor,
    columns: tl.int32,
    COLUMNS: tl.constexpr, SLACK: tl.constexpr, KEEP: tl.constexpr,
) -> None:
    # fmt: on
    """How many leading candidates of one row hold the share `mass`, fp64 `[R]`, of `shares` `[R, columns]`.

    KEEP: the one that crosses it is counted. Sums are in fp64.
    """
    row, column = tl.program_id(0).to(tl.int64), tl.arange(0, COLUMNS)
    inside = column < columns
    bits = _ranks(scores, first, columns, COLUMNS)
    share = tl.load(shares + row * columns + column, mask=inside, other=0.0).to(tl.float64)
    wanted = tl.load(mass + row)
    # The highest cut above which more than what is counted lies.
    cut = tl.zeros([1], tl.int64)
    bit = tl.full([1], 2147483648, tl.int64)
    for _ in range(32):
        held = tl.sum(tl.where(bits >= cut + bit, share, 0.0), 0)
        enough = (held >= wanted - SLACK) if KEEP else (held > wanted + SLACK)
        cut = tl.where(enough, cut + bit, cut)
        bit = bit // 2
    above = bits > cut
    ties = (bits == cut) & inside
    part = tl.where(ties, share, 0.0)
    reached = tl.sum(tl.where(above, share, 0.0), 0) + tl.cumsum(part, 0)
    below = (reached - part < wanted - SLACK) if KEEP else (reached <= wanted + SLACK)
    count = tl.sum(tl.where(above | (ties & below), 1, 0), 0)
    tl.store(counts + row, tl.where(wanted >= 1, columns, count))


# fmt: off
@triton.jit(do_not_specialize=("tokens", "index_b", "index_h"))
def move_rows(
    x: tl.tensor, out: tl.tensor, index: tl.tensor,
    x_b: tl.int64, x_h: tl.int64, x_n: tl.tensor,
    out_b: tl.int64, out_h: tl.int64, out_n: tl.tensor,
    index_b: tl.int64, index_h: tl.int64, tokens: tl.int32,
    DIM: tl.constexpr, PADDED_DIM: tl.constexpr, ROWS: tl.constexpr, SCATTER: tl.constexpr,
) -> None:
    # fmt: on
    """Rows of x `[B, H, N, DIM]`: `out[p] = x[index[p]]`, or with SCATTER `out[index[p]] = x[p]`.

    index: int64 `[B or 1, H or 1, N]`, a permutation; strides of shared axes are 0.
    """
    head, item = tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    row, dim = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.arange(0, PADDED_DIM)
    there = tl.load(index + item * index_b + head * index_h + row, mask=row < tokens, other=0)
    mask = (row < tokens)[:, None] & (dim < DIM)[None, :]
    if SCATTER:
        source, target = row.to(tl.int64), there
    else:
        source, target = there, row.to(tl.int64)
    values = tl.load(x + item * x_b + head * x_h + source[:, None] * x_n + dim[None, :], mask=mask)
    tl.store(out + item * out_b + head * out_h + target[:, None] * out_n + dim[None, :], values, mask=mask)

"""Choosing key blocks from scores, and moving tokens into an order and back, in Triton.

No row is sorted: the cut is found bit by bit in the registers of one program, and a prefix sum writes the indices of
what lies above it in ascending order.
"""

from __future__ import annotations

import triton
import triton.language as tl

_TOP_K = tl.constexpr(0)
_TOP_P = tl.constexpr(1)


@triton.jit
def _ordered_bits(x: tl.tensor) -> tl.tensor:
    """Integers from 0 to 2³² - 1, int64, in the order of the fp32 numbers x."""
    # Adding zero makes minus zero plus zero.
    bits = (x + 0.0).to(tl.int32, bitcast=True)
    return tl.where(bits >= 0, bits, bits ^ 0x7FFFFFFF).to(tl.int64) + 2147483648


# fmt: off
@triton.jit(do_not_specialize=("rows", "columns", "heads", "keep", "width", "forced_h", "forced_b"))
def select(
    scores: tl.tensor, forced: tl.tensor, indices: tl.tensor, counts: tl.tensor,
    rows: tl.int32, columns: tl.int32, keep: tl.int32, width: tl.int32,
    share: tl.float32,
    COLUMNS: tl.constexpr, RULE: tl.constexpr, HAS_FORCED: tl.constexpr,
) -> None:
    # fmt: on
    """One row of scores `[R, columns]` to ascending indices `[R, width]` and their count `[R]`.

    forced: uint8 `[rows, columns]`, always kept; row r of the scores has row `r % rows` of it. RULE 0 keeps the `keep`
    best, forced ones among them; 1 keeps the fewest whose softmax adds up to `share`; 2 keeps those whose softmax is at
    least `share`. Ties go to the lower index. -inf is never kept; a row of -inf keeps the block of its own number.
    """
    row = tl.program_id(0)
    column = tl.arange(0, COLUMNS)
    inside = column < columns
    score = tl.load(scores + row.to(tl.int64) * columns + column, mask=inside, other=float("-inf"))
    possible = score > float("-inf")
    always = column < 0
    if HAS_FORCED:
        at = forced + (row % rows).to(tl.int64) * columns + column
        always = (tl.load(at, mask=inside, other=0) != 0) & possible
    bits = _ordered_bits(score)
    top = tl.max(score, 0)
    mass = tl.where(possible, tl.exp(score - tl.where(top > float("-inf"), top, 0.0)), 0.0)
    mass = mass / tl.maximum(tl.sum(mass, 0), 1e-30)
    if RULE == 2:
        taken = (mass >= share) & possible
    else:
        free = possible & (always == 0)
        if RULE == _TOP_K:
            weight = tl.where(free, 1.0, 0.0)
            wanted = tl.maximum(keep - tl.sum(tl.where(always, 1, 0), 0), 0).to(tl.float32)
        else:
            weight = tl.where(free, mass, 0.0)
            # What cannot be reached by rounding is not asked for.
            wanted = tl.minimum(share - tl.sum(tl.where(always, mass, 0.0), 0), tl.sum(weight, 0))
        # The highest cut above which enough lies: its bits from the first to the last.
        cut = tl.zeros([1], tl.int64)
        bit = tl.full([1], 2147483648, tl.int64)
        for _ in range(32):
            enough = tl.sum(tl.where(bits >= cut + bit, weight, 0.0), 0) >= wanted
            cut = tl.where(enough, cut + bit, cut)
            bit = bit // 2
        above = free & (bits > cut)
        ties = free & (bits == cut)
        missing = wanted - tl.sum(tl.where(above, weight, 0.0), 0)
        # A tie counts while those before it have not sufficed.
        before = tl.cumsum(tl.where(ties, weight, 0.0), 0) - tl.where(ties, weight, 0.0)
        taken = above | (ties & (before < missing))
    taken = taken | always
    count = tl.sum(tl.where(taken, 1, 0), 0)
    taken = tl.where(count > 0, taken, column == tl.minimum(row % rows, columns - 1))
    count = tl.maximum(count, 1)
    place = tl.cumsum(tl.where(taken, 1, 0), 0) - 1
    at = indices + row.to(tl.int64) * width + place
    tl.store(at, column, mask=taken & (place < width))
    tl.store(counts + row, tl.minimum(count, width))


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

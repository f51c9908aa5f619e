"""The best of very many candidates in Triton: digits of the cut are found by counting, eight bits at a time.

Rankings of whole heads or layers hold more candidates than the registers of a program.
Axis legend: R rows, L candidates of a row, C chunks of a row.
"""

from __future__ import annotations

import triton
import triton.language as tl

from dit_accel.kernels.triton_selection import ordered_bits


@triton.jit
def _chunk_bits(scores: tl.tensor, first: tl.tensor, at: tl.tensor, column: tl.tensor, columns: tl.tensor) -> tl.tensor:
    """Integers in the order of the ranking for some candidates of a row that begins at `at`; -1 beyond its end."""
    inside = column < columns
    score = tl.load(scores + at + column, mask=inside, other=0.0)
    forced = tl.load(first + at + column, mask=inside, other=0) != 0
    return tl.where(inside, ordered_bits(tl.where(forced, float("inf"), score)), -1)


# fmt: off
@triton.jit(do_not_specialize=("columns", "chunk", "shift"))
def digit_counts(
    scores: tl.tensor, first: tl.tensor, prefix: tl.tensor, found: tl.tensor,
    columns: tl.int64, chunk: tl.int32, shift: tl.int32,
    COLUMNS: tl.constexpr,
) -> None:
    # fmt: on
    """How often each digit follows `prefix` int64 `[R]`, in each chunk: `found` int32 `[R, C, 256]`.

    The digit is the eight bits from `shift` on; `prefix` holds the bits above them. first: uint8 like scores `[R, L]`.
    """
    row, part = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    wanted = tl.load(prefix + row)
    total = tl.zeros([256], tl.int32)
    for begin in range(0, chunk, COLUMNS):
        column = part * chunk + begin + tl.arange(0, COLUMNS)
        bits = _chunk_bits(scores, first, row * columns, column, columns)
        here = (bits >= 0) & (((bits >> shift) >> 8) == wanted)
        total += tl.histogram(((bits >> shift) & 255).to(tl.int32), 256, mask=here)
    tl.store(found + (row * tl.num_programs(1) + part) * 256 + tl.arange(0, 256), total)


# fmt: off
@triton.jit(do_not_specialize=("columns", "chunk"))
def keep_leading(
    scores: tl.tensor, first: tl.tensor, cut: tl.tensor, missing: tl.tensor, before: tl.tensor, kept: tl.tensor,
    columns: tl.int64, chunk: tl.int32,
    COLUMNS: tl.constexpr,
) -> None:
    # fmt: on
    """The candidates above `cut` `[R]`, and the first `missing` `[R]` of those that equal it: uint8 `[R, L]`.

    cut, missing: int64. before: int64 `[R, C]`, how many of those that equal the cut stand in earlier chunks.
    """
    row, part = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    level = tl.load(cut + row)
    left = tl.load(missing + row) - tl.load(before + row * tl.num_programs(1) + part)
    for begin in range(0, chunk, COLUMNS):
        column = part * chunk + begin + tl.arange(0, COLUMNS)
        bits = _chunk_bits(scores, first, row * columns, column, columns)
        ties = (bits == level).to(tl.int32)
        taken = (bits > level) | ((ties != 0) & (tl.cumsum(ties, 0) <= left))
        tl.store(kept + row * columns + column, taken.to(tl.uint8), mask=column < columns)
        left -= tl.sum(ties, 0)

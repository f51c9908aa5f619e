"""The pass over the tokens that gives statistics of blocks: what the Triton kernel is launched with.

Axis legend: B batch, H heads, N tokens, D head size (P when padded to a power of two), n blocks.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dit_accel.kernels.triton_configs import DOT_OF, next_power_of_two, pad_head_dim
from dit_accel.plan import Blocking

BLOCKS_PER_PROGRAM = 4
"""Blocks that a program reads where it keeps no matrix."""
_PROGRAMS_PER_HEAD = 32  # where one matrix is summed over all blocks


def tokens_of(blocks: Blocking, kv_len: Tensor | None, device: torch.device) -> Tensor:
    """Number of real tokens of each block, int32 `[B or 1, n]`."""
    starts, lengths = blocks.on(device)
    if kv_len is None:
        return lengths.unsqueeze(0)
    return (kv_len.unsqueeze(1) - starts).clamp(min=0).minimum(lengths)


def launch_statistics(
    k: Tensor,
    v: Tensor | None,
    blocks: Blocking,
    kv_len: Tensor | None,
    means: Sequence[Tensor],
    variance: Tensor | None = None,
    copies: Sequence[Tensor] | None = None,
    group: int = 0,
    squares: bool = False,
    parts: int = 1,
    step: int = 1,
) -> Tensor | None:
    """Read every token of k and v `[B, H, N, D]` once, and fill what is given.

    Args:
        k, v: v may be None: the statistics are those of k alone.
        blocks: partition of the tokens.
        kv_len: int32 `[B]`, leading tokens that are real. None: all.
        means: of k and, if there is a second one, of v, `[B, H, n, P]`.
        variance: of k, `[B, H, n, P]`, contiguous.
        copies: where k and v are copied to, `[B, H, at least N, P]`.
        group: sum Σ (k - mean) vᵀ over so many blocks.
        squares: sum the squares of the matrix of each block over parts of its rows.
        parts: cut every block into so many runs of equal length first, see `block_means_in_triton`.
        step: take all but the mean of k over one token in so many, see `sample_tokens`.

    Returns:
        With `group`, sums fp32 `[B, H, chunks, P, P]`; with `squares`, fp32 `[B, H, n, c, P]`.
    """
    from dit_accel.kernels.triton_statistics import statistics

    batch, heads, tokens, dim = k.shape
    width, (starts, lengths), count, size = pad_head_dim(dim), blocks.on(k.device), blocks.count, blocks.size
    if parts > 1:
        size = -(-blocks.size // parts)
        first = torch.arange(0, blocks.size, size, dtype=torch.int32, device=k.device)
        starts = (starts.unsqueeze(-1) + first).flatten()
        lengths = (lengths.unsqueeze(-1) - first).clamp(0, size).flatten()
        count = len(starts)
    columns = columns_at_once(width) if group or squares else width
    chunk = _blocks_per_program(group, squares, count)
    chunks = -(-count // chunk)
    sums = None
    if group or squares:
        shape = (chunks, width, width) if group else (count, width // columns, width)
        sums = k.new_empty(batch, heads, *shape, dtype=torch.float32)
    statistics[chunks * (width // columns), heads, batch](
        k, v, starts, lengths, kv_len, means[0], means[1] if len(means) > 1 else None, variance, sums,
        *(copies or (None, None)),
        *k.stride()[:3], *(k if v is None else v).stride()[:3], *means[0].stride()[:2],
        *((0, 0) if copies is None else copies[0].stride()[:2]),
        count, size, tokens, chunk, chunks, step, blocks.size,
        HEAD_DIM=dim, PADDED_DIM=width, BLOCK_N=rows_at_once(size), COLUMNS=columns,
        UNIFORM=blocks.is_uniform and parts == 1, ONE_TILE=size <= rows_at_once(size), HAS_LENGTH=kv_len is not None,
        VALUES=v is not None, VARIANCE=variance is not None, MOMENTS=bool(group), SQUARES=squares,
        COPY=copies is not None, SAMPLED=step > 1, DOT=DOT_OF[k.dtype],
        # Narrow matrices spill when eight warps share them.
        num_warps=4 if group and width <= 64 else 8, num_stages=1 if copies else 2,
    )  # fmt: skip
    return sums


def _blocks_per_program(group: int, squares: bool, blocks: int) -> int:
    if squares:
        return 1
    if not group:
        return BLOCKS_PER_PROGRAM
    # One group for all: many programs sum a part each.
    return group if group < blocks else -(-blocks // _PROGRAMS_PER_HEAD)


def columns_at_once(width: int) -> int:
    """Columns of a matrix of `width` that a program sums, which takes registers."""
    return max(16, min(64, width // 2)) if width <= 128 else 32


def rows_at_once(size: int) -> int:
    """Tokens of a block of at most `size` that a program holds at a time."""
    return min(64, max(16, next_power_of_two(size)))

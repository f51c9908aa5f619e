"""What the Triton attention kernel reads of the blocks that were not selected: statistics, and what mean queries see.

Axis legend: B batch, H heads, N tokens, D head size (P when padded to a power of two), nq / nk query / key blocks.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from dit_accel.kernels.spec import Remainder
from dit_accel.kernels.triton_configs import DOT_OF, next_power_of_two, pad_head_dim
from dit_accel.plan import Blocking, BlockPlan

# Key blocks that a program reads where no covariance is wanted, and programs per head where one is.
_BLOCKS_PER_PROGRAM, _PROGRAMS_PER_HEAD = 4, 32
_MEANS_PER_PROGRAM = 64


@dataclass(frozen=True)
class Rest:
    """The blocks that were not selected, for `block_attention`'s summary tiles.

    Args:
        chosen: uint8 `[B or 1, H or 1, nq, nk]`, 1 for a selected block.
        log_tokens: fp32 `[B, nk]`, log2 of the number of real tokens, -inf for a block without any.
        mean_k, mean_v: `[B, H, nk, P]`, in the dtype of k; rows of `k` and `v` when those are copies. About the query
            mean_v is the value that each mean query gets from each block, `[B, H, nq, nk, P]`.
        variance: of the keys `[B, H, nk, P]`; None without second-order mass.
        moments: H_g / t_g `[B, H, groups, P, P]`; None without a first-order term.
        group: blocks per group.
        k, v: `[B, H, padded_keys + nk, P]`, keys and values followed by their means; None where no copy is needed.
        padded_keys: rows of a copy that stand before the means.
        bias: fp32 `[B, H, nq, nk]`, what is added to scale * q·mean_k, in units of log 2, -inf where a block was
            selected or holds no real key; None where `log_tokens` says it.
        centres: about the query, the mean query of each block `[B, H, nq, P]`, in the dtype of q.
    """

    chosen: Tensor
    log_tokens: Tensor
    mean_k: Tensor
    mean_v: Tensor
    variance: Tensor | None
    moments: Tensor | None
    group: int
    k: Tensor | None = None
    v: Tensor | None = None
    padded_keys: int = 0
    bias: Tensor | None = None
    centres: Tensor | None = None

    @classmethod
    def of(
        cls, k: Tensor, v: Tensor, plan: BlockPlan, remainder: Remainder, kv_len: Tensor | None, copy_to: int = 0
    ) -> Rest:
        """One pass over k and v `[B, H, N, D]`.

        Args:
            k, v: keys and values.
            plan: partition of the keys, and what is selected.
            remainder: what is wanted of the rest.
            kv_len: int32 `[B]`, real keys per item.
            copy_to: copy k and v, padded to a multiple of this many rows; 0: do not.
        """
        blocks, width = plan.k_blocks, pad_head_dim(k.shape[-1])
        group = remainder.blocks_per_group(blocks.count)
        tokens = tokens_of(blocks, kv_len, k.device).expand(len(k), -1)
        padded = -(-k.shape[2] // copy_to) * copy_to if copy_to else 0
        copies = [x.new_empty(*x.shape[:2], padded + blocks.count, width) for x in (k, v)] if copy_to else None
        if copies is None:
            means = [x.new_empty(*x.shape[:2], blocks.count, width) for x in (k, v)]
        else:
            for copy in copies:
                copy[:, :, k.shape[2] : padded] = 0
            means = [copy[:, :, padded:] for copy in copies]
        variance: Tensor | None = None
        if remainder.mass == "diagonal":
            variance = torch.empty_like(means[0], memory_format=torch.contiguous_format)
        sums = launch_statistics(k, v, blocks, kv_len, means[0], means[1], variance, copies, group)
        return cls(
            plan.to_mask().contiguous().view(torch.uint8),
            tokens.float().log2().contiguous(),
            means[0],
            means[1],
            variance,
            None if sums is None else _normalize(sums, tokens, group).to(k.dtype),
            max(group, 1),
            None if copies is None else copies[0],
            None if copies is None else copies[1],
            padded,
        )


def about_queries(
    rest: Rest, q: Tensor, k: Tensor, v: Tensor, plan: BlockPlan, kv_len: Tensor | None, scale: float
) -> Rest:
    """The same blocks, expanded about the mean query of each query block, see `Remainder`; q, k, v `[B, H, N, D]`."""
    from dit_accel.kernels.triton_summaries import seen_by_means

    rows, blocks, width = plan.q_blocks.count, plan.k_blocks, rest.mean_k.shape[-1]
    centres = q.new_empty(*q.shape[:2], rows, width)
    launch_statistics(q, None, plan.q_blocks, None, centres, None)
    bias = torch.empty(*q.shape[:2], rows, blocks.count, dtype=torch.float32, device=q.device)
    values = v.new_empty(*v.shape[:2], rows, blocks.count, width)
    starts, lengths = blocks.on(k.device)
    grid = (-(-rows // _MEANS_PER_PROGRAM) * -(-blocks.count // _BLOCKS_PER_PROGRAM), k.shape[1], k.shape[0])
    seen_by_means[grid](
        centres, k, v, starts, lengths, kv_len, rest.mean_k, bias, values, scale, *k.stride()[:3], *v.stride()[:3],
        rows, blocks.count, blocks.size, k.shape[2], _BLOCKS_PER_PROGRAM,
        HEAD_DIM=k.shape[-1], PADDED_DIM=width, ROWS=_MEANS_PER_PROGRAM, BLOCK_N=rows_at_once(blocks),
        UNIFORM=blocks.is_uniform, HAS_LENGTH=kv_len is not None, DOT=DOT_OF[k.dtype],
        num_warps=8, num_stages=1,
    )  # fmt: skip
    bias.masked_fill_(rest.chosen.view(torch.bool), -torch.inf)
    return replace(rest, mean_v=values, bias=bias, centres=centres)


def tokens_of(blocks: Blocking, kv_len: Tensor | None, device: torch.device) -> Tensor:
    """Number of real tokens of each block, int32 `[B or 1, n]`."""
    starts, lengths = blocks.on(device)
    if kv_len is None:
        return lengths.unsqueeze(0)
    return (kv_len.unsqueeze(1) - starts).clamp(min=0).minimum(lengths)


def _normalize(sums: Tensor, tokens: Tensor, group: int) -> Tensor:
    """Partial sums `[B, H, chunks, P, P]` to H_g / t_g `[B, H, groups, P, P]`; tokens `[B, nk]`."""
    count = tokens.shape[1]
    groups = -(-count // group)
    per_group = torch.nn.functional.pad(tokens, (0, groups * group - count)).view(len(tokens), groups, group).sum(-1)
    sums = sums.sum(2, keepdim=True) if groups == 1 else sums
    return sums / per_group.clamp(min=1).view(len(tokens), 1, groups, 1, 1)


def launch_statistics(
    k: Tensor,
    v: Tensor | None,
    blocks: Blocking,
    kv_len: Tensor | None,
    mean_k: Tensor,
    mean_v: Tensor | None,
    variance: Tensor | None = None,
    copies: list[Tensor] | None = None,
    group: int = 0,
) -> Tensor | None:
    """Fill means, variance and copies; with `group` return Σ (k - mean) vᵀ, fp32 `[B, H, chunks, P, P]`.

    v and mean_v may both be None: the statistics are those of k alone.
    """
    from dit_accel.kernels.triton_statistics import statistics

    batch, heads, tokens, dim = k.shape
    width = pad_head_dim(dim)
    chunk = _BLOCKS_PER_PROGRAM
    if group:
        # One group for all: many programs sum a part each.
        chunk = group if group < blocks.count else -(-blocks.count // _PROGRAMS_PER_HEAD)
    chunks = -(-blocks.count // chunk)
    columns = columns_at_once(width)
    sums = k.new_empty(batch, heads, chunks, width, width, dtype=torch.float32) if group else None
    starts, lengths = blocks.on(k.device)
    grid = (chunks * (width // columns if group else 1), heads, batch)
    statistics[grid](
        k, v, starts, lengths, kv_len, mean_k, mean_v, variance, sums, *(copies or (None, None)),
        *k.stride()[:3], *(k if v is None else v).stride()[:3], *mean_k.stride()[:2],
        *((0, 0) if copies is None else copies[0].stride()[:2]),
        blocks.count, blocks.size, tokens, chunk, chunks,
        **statistics_constants(dim, k.dtype, blocks, kv_len is not None),
        VALUES=v is not None, VARIANCE=variance is not None, MOMENTS=bool(group), SQUARES=False,
        COPY=copies is not None,
        # Narrow matrices spill when eight warps share them.
        num_warps=4 if group and width <= 64 else 8, num_stages=2,
    )  # fmt: skip
    return sums


def launch_squares(k: Tensor, v: Tensor, blocks: Blocking, kv_len: Tensor | None) -> Tensor:
    """Squares of Σ (k - mean) vᵀ of each block, summed along c parts of a row, fp32 `[B, H, n, c, P]`.

    k, v: `[B, H, N, D]`.
    """
    from dit_accel.kernels.triton_statistics import statistics

    width = pad_head_dim(k.shape[-1])
    parts = width // columns_at_once(width)
    squares = k.new_empty(*k.shape[:2], blocks.count, parts, width, dtype=torch.float32)
    means = [k.new_empty(*k.shape[:2], blocks.count, width) for _ in range(2)]
    starts, lengths = blocks.on(k.device)
    statistics[blocks.count * parts, k.shape[1], k.shape[0]](
        k, v, starts, lengths, kv_len, *means, None, squares, None, None,
        *k.stride()[:3], *v.stride()[:3], *means[0].stride()[:2], 0, 0,
        blocks.count, blocks.size, k.shape[2], 1, blocks.count,
        **statistics_constants(k.shape[-1], k.dtype, blocks, kv_len is not None),
        VALUES=True, VARIANCE=False, MOMENTS=False, SQUARES=True, COPY=False, num_warps=8, num_stages=2,
    )  # fmt: skip
    return squares


def statistics_constants(dim: int, dtype: torch.dtype, blocks: Blocking, has_length: bool) -> dict[str, object]:
    """Compile-time arguments of the statistics kernel that follow from the tensors."""
    width = pad_head_dim(dim)
    return {
        "HEAD_DIM": dim,
        "PADDED_DIM": width,
        "BLOCK_N": rows_at_once(blocks),
        "COLUMNS": columns_at_once(width),
        "UNIFORM": blocks.is_uniform,
        "HAS_LENGTH": has_length,
        "DOT": DOT_OF[dtype],
    }


def columns_at_once(width: int) -> int:
    """Columns of a matrix of `width` that a program sums, which takes registers."""
    return max(16, min(64, width // 2))


def rows_at_once(blocks: Blocking) -> int:
    """Tokens of a block that a program holds at a time."""
    return min(64, max(16, next_power_of_two(blocks.size)))

"""What the Triton attention kernel reads besides q, k, v: statistics of the key blocks, and INT8 operands.

Axis legend: B batch, H heads, N tokens, D head size (P when padded to a power of two), nq / nk query / key blocks.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dit_accel.kernels.spec import Remainder
from dit_accel.kernels.triton_configs import DOT_OF, next_power_of_two, pad_head_dim
from dit_accel.plan import Blocking, BlockPlan

# Key blocks that a program reads where no covariance is wanted, and programs per head where one is.
_BLOCKS_PER_PROGRAM, _PROGRAMS_PER_HEAD = 4, 32


@dataclass(frozen=True)
class Rest:
    """The blocks that were not selected, for `block_attention`'s summary tiles.

    Args:
        chosen: uint8 `[B or 1, H or 1, nq, nk]`, 1 for a selected block.
        log_tokens: fp32 `[B, nk]`, log2 of the number of real tokens, -inf for a block without any.
        mean_k, mean_v: `[B, H, nk, P]`, in the dtype of k; rows of `k` and `v` when those are copies.
        variance: of the keys `[B, H, nk, P]`; None without second-order mass.
        moments: H_g / t_g `[B, H, groups, P, P]`; None without a first-order term.
        group: blocks per group.
        k, v: `[B, H, padded_keys + nk, P]`, keys and values followed by their means; None where no copy is needed.
        padded_keys: rows of a copy that stand before the means.
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
        sums = launch_statistics(k, v, blocks, kv_len, means, variance, copies, group)
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
    v: Tensor,
    blocks: Blocking,
    kv_len: Tensor | None,
    means: list[Tensor],
    variance: Tensor | None = None,
    copies: list[Tensor] | None = None,
    group: int = 0,
) -> Tensor | None:
    """Fill means, variance and copies; with `group` return Σ (k - mean) vᵀ, fp32 `[B, H, chunks, P, P]`."""
    from dit_accel.kernels.triton_statistics import statistics

    batch, heads, tokens, dim = k.shape
    width = pad_head_dim(dim)
    chunk = _BLOCKS_PER_PROGRAM
    if group:
        # One group for all: many programs sum a part each.
        chunk = group if group < blocks.count else -(-blocks.count // _PROGRAMS_PER_HEAD)
    chunks = -(-blocks.count // chunk)
    columns = min(64, width)
    sums = k.new_empty(batch, heads, chunks, width, width, dtype=torch.float32) if group else None
    starts, lengths = blocks.on(k.device)
    grid = (chunks * (width // columns if group else 1), heads, batch)
    statistics[grid](
        k, v, starts, lengths, kv_len, *means, variance, sums, *(copies or (None, None)),
        *k.stride()[:3], *v.stride()[:3], *means[0].stride()[:2],
        *((0, 0) if copies is None else copies[0].stride()[:2]),
        blocks.count, blocks.size, tokens, chunk, chunks,
        **statistics_constants(dim, k.dtype, blocks, kv_len is not None),
        VARIANCE=variance is not None, MOMENTS=bool(group), COPY=copies is not None,
        num_warps=8, num_stages=2,
    )  # fmt: skip
    return sums


def statistics_constants(dim: int, dtype: torch.dtype, blocks: Blocking, has_length: bool) -> dict[str, object]:
    """Compile-time arguments of the statistics kernel that follow from the tensors."""
    width = pad_head_dim(dim)
    return {
        "HEAD_DIM": dim,
        "PADDED_DIM": width,
        "BLOCK_N": rows_at_once(blocks),
        "COLUMNS": min(64, width),
        "UNIFORM": blocks.is_uniform,
        "HAS_LENGTH": has_length,
        "DOT": DOT_OF[dtype],
    }


def rows_at_once(blocks: Blocking) -> int:
    """Tokens of a block that a program holds at a time."""
    return min(64, max(16, next_power_of_two(blocks.size)))


@dataclass(frozen=True)
class Int8Operands:
    """Queries and keys in INT8, one scale per block of the plan (arXiv 2410.02367).

    Args:
        q, k: int8 `[B, H, N, D]`.
        q_step: fp32 `[B, H, nq]`.
        k_step: fp32 `[B, H, nk]`.
        offset: what smoothing took from the log-sum-exp, fp32 `[B, H, Nq]`; None without smoothing.
    """

    q: Tensor
    k: Tensor
    q_step: Tensor
    k_step: Tensor
    offset: Tensor | None

    @classmethod
    def of(
        cls, q: Tensor, k: Tensor, plan: BlockPlan, scale: float, smooth: bool, kv_len: Tensor | None
    ) -> Int8Operands:
        """Quantise q and k `[B, H, N, D]`; with `smooth` the mean of the real keys is taken from every key first."""
        common, offset = None, None
        if smooth:
            common = _mean_key(k, plan.k_blocks, kv_len)
            offset = torch.empty(q.shape[:3], dtype=torch.float32, device=q.device)
        q8, q_step = _quantize(q, plan.q_blocks, None, common, offset, scale)
        k8, k_step = _quantize(k, plan.k_blocks, kv_len, common, None, scale)
        return cls(q8, k8, q_step, k_step, offset)


def _mean_key(k: Tensor, blocks: Blocking, kv_len: Tensor | None) -> Tensor:
    """Mean of the real keys of each head, fp32 `[B, H, P]`, from the means of the blocks."""
    means = [
        torch.empty(*k.shape[:2], blocks.count, pad_head_dim(k.shape[-1]), dtype=torch.float32, device=k.device)
        for _ in range(2)
    ]
    launch_statistics(k, k, blocks, kv_len, means)
    tokens = tokens_of(blocks, kv_len, k.device).float()
    share = tokens / tokens.sum(1, keepdim=True).clamp(min=1)
    return (means[0] * share[:, None, :, None]).sum(2)


def _quantize(
    x: Tensor, blocks: Blocking, kv_len: Tensor | None, common: Tensor | None, offset: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    """INT8 levels like x `[B, H, N, D]` and the scale of each block, fp32 `[B, H, n]`.

    common: fp32 `[B, H, P]`; where offset is given, `scale * x·common` goes there, else it is taken from x.
    """
    from dit_accel.kernels.triton_statistics import quantize

    out = torch.empty_like(x, dtype=torch.int8)
    step = torch.empty(*x.shape[:2], blocks.count, dtype=torch.float32, device=x.device)
    starts, lengths = blocks.on(x.device)
    quantize[(blocks.count, x.shape[1], x.shape[0])](
        x, out, step, common, offset, starts, lengths, kv_len, scale, *x.stride()[:3], *out.stride()[:3],
        blocks.count, blocks.size, x.shape[2],
        HEAD_DIM=x.shape[-1], PADDED_DIM=pad_head_dim(x.shape[-1]), BLOCK_N=rows_at_once(blocks),
        UNIFORM=blocks.is_uniform, HAS_LENGTH=kv_len is not None,
        SUBTRACT=common is not None and offset is None, PROJECT=offset is not None,
        num_warps=4, num_stages=2,
    )  # fmt: skip
    return out, step

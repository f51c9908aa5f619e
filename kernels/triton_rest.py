"""What the Triton attention kernel reads of the blocks that were not selected: statistics, and what mean queries see.

Axis legend: B batch, H heads, N tokens, D head size (P when padded to a power of two), nq / nk query / key blocks.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from dit_accel.kernels.spec import Remainder
from dit_accel.kernels.statistics_pass import BLOCKS_PER_PROGRAM, launch_statistics, rows_at_once, tokens_of
from dit_accel.kernels.triton_configs import DOT_OF, pad_head_dim
from dit_accel.plan import BlockPlan

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


def about_queries(
    rest: Rest, q: Tensor, k: Tensor, v: Tensor, plan: BlockPlan, kv_len: Tensor | None, scale: float
) -> Rest:
    """The same blocks, expanded about the mean query of each query block, see `Remainder`; q, k, v `[B, H, N, D]`."""
    from dit_accel.kernels.triton_summaries import seen_by_means

    rows, blocks, width = plan.q_blocks.count, plan.k_blocks, rest.mean_k.shape[-1]
    centres = q.new_empty(*q.shape[:2], rows, width)
    launch_statistics(q, None, plan.q_blocks, None, [centres])
    bias = torch.empty(*q.shape[:2], rows, blocks.count, dtype=torch.float32, device=q.device)
    values = v.new_empty(*v.shape[:2], rows, blocks.count, width)
    starts, lengths = blocks.on(k.device)
    grid = (-(-rows // _MEANS_PER_PROGRAM) * -(-blocks.count // BLOCKS_PER_PROGRAM), k.shape[1], k.shape[0])
    seen_by_means[grid](
        centres, k, v, starts, lengths, kv_len, rest.mean_k, bias, values, scale, *k.stride()[:3], *v.stride()[:3],
        rows, blocks.count, blocks.size, k.shape[2], BLOCKS_PER_PROGRAM,
        HEAD_DIM=k.shape[-1], PADDED_DIM=width, ROWS=_MEANS_PER_PROGRAM, BLOCK_N=rows_at_once(blocks.size),
        UNIFORM=blocks.is_uniform, HAS_LENGTH=kv_len is not None, DOT=DOT_OF[k.dtype],
        num_warps=8, num_stages=1,
    )  # fmt: skip
    bias.masked_fill_(rest.chosen.view(torch.bool), -torch.inf)
    return replace(rest, mean_v=values, bias=bias, centres=centres)


def _normalize(sums: Tensor, tokens: Tensor, group: int) -> Tensor:
    """Partial sums `[B, H, chunks, P, P]` to H_g / t_g `[B, H, groups, P, P]`; tokens `[B, nk]`."""
    count = tokens.shape[1]
    groups = -(-count // group)
    per_group = torch.nn.functional.pad(tokens, (0, groups * group - count)).view(len(tokens), groups, group).sum(-1)
    sums = sums.sum(2, keepdim=True) if groups == 1 else sums
    return sums / per_group.clamp(min=1).view(len(tokens), 1, groups, 1, 1)

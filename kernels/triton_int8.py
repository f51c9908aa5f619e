"""INT8 operands of the Triton attention kernel: what is quantised, its scales, and what smoothing takes away.

Axis legend: B batch, H heads, N tokens, D head size (P when padded to a power of two), nq / nk query / key blocks.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dit_accel.kernels.statistics_pass import launch_statistics, rows_at_once, tokens_of
from dit_accel.kernels.triton_configs import pad_head_dim
from dit_accel.plan import Blocking, BlockPlan


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
    means = k.new_empty(*k.shape[:2], blocks.count, pad_head_dim(k.shape[-1]), dtype=torch.float32)
    launch_statistics(k, None, blocks, kv_len, [means])
    tokens = tokens_of(blocks, kv_len, k.device).float()
    share = tokens / tokens.sum(1, keepdim=True).clamp(min=1)
    return (means * share[:, None, :, None]).sum(2)


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
        HEAD_DIM=x.shape[-1], PADDED_DIM=pad_head_dim(x.shape[-1]), BLOCK_N=rows_at_once(blocks.size),
        UNIFORM=blocks.is_uniform, HAS_LENGTH=kv_len is not None,
        SUBTRACT=common is not None and offset is None, PROJECT=offset is not None,
        num_warps=4, num_stages=2,
    )  # fmt: skip
    return out, step

"""FP8 values of the Triton attention kernel: what is quantised, its scales, and what is taken away and given back.

Axis legend: B batch, H heads, N tokens, D head size (P when padded to a power of two), nk key blocks.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dit_accel.kernels.statistics_pass import rows_at_once
from dit_accel.kernels.triton_configs import LEAST_OF_8_BITS, pad_head_dim
from dit_accel.plan import BlockPlan

_TOKENS_PER_PROGRAM, _TOKENS_AT_ONCE = 1024, 64
_LARGEST = 448.0


@dataclass(frozen=True)
class Fp8Values:
    """Values in e4m3, one scale per channel of a head (arXiv 2411.10958), less the mean of the head.

    Every block is a matrix of its own with a channel a row, because the matrix unit reads 8-bit operands along the axis
    that it sums over, and because loads of ragged blocks are then aligned too.

    Args:
        v: e4m3 `[B, H, nk, P, S]`, S the block size rounded up to whole tiles; 0 where no real token stands.
        step: fp32 `[B, H, P]`, the scales.
        mean: fp32 `[B, H, P]`, what every value lost.
    """

    v: Tensor
    step: Tensor
    mean: Tensor

    @classmethod
    def of(cls, v: Tensor, plan: BlockPlan, kv_len: Tensor | None) -> Fp8Values:
        """Quantise v `[B, H, N, D]`; kv_len int32 `[B]`, real keys per item, None: all."""
        from dit_accel.kernels.triton_statistics import quantize_values

        blocks = plan.k_blocks
        mean, step = _mean_and_step(v, kv_len)
        rows = max(LEAST_OF_8_BITS, rows_at_once(blocks.size))
        out = v.new_empty(
            *v.shape[:2], blocks.count, mean.shape[-1], -(-blocks.size // rows) * rows, dtype=torch.float8_e4m3fn
        )
        starts, lengths = blocks.on(v.device)
        quantize_values[blocks.count, v.shape[1], v.shape[0]](
            v, out, mean, step, starts, lengths, kv_len, *v.stride()[:3], out.shape[-1], blocks.size, v.shape[2],
            HEAD_DIM=v.shape[-1], PADDED_DIM=mean.shape[-1], BLOCK_N=rows,
            UNIFORM=blocks.is_uniform, HAS_LENGTH=kv_len is not None,
            num_warps=4 if mean.shape[-1] <= 128 else 8, num_stages=2,
        )  # fmt: skip
        return cls(out, step, mean)


def _mean_and_step(v: Tensor, kv_len: Tensor | None) -> tuple[Tensor, Tensor]:
    """Mean of the real values of each head, and the scale of what is left, fp32 `[B, H, P]` each, in one pass."""
    from dit_accel.kernels.triton_statistics import value_range

    programs, width = -(-v.shape[2] // _TOKENS_PER_PROGRAM), pad_head_dim(v.shape[-1], LEAST_OF_8_BITS)
    sums, lowest, highest = (
        torch.empty(*v.shape[:2], programs, width, dtype=torch.float32, device=v.device) for _ in range(3)
    )
    value_range[programs, v.shape[1], v.shape[0]](
        v, sums, lowest, highest, kv_len, *v.stride()[:3], v.shape[2],
        HEAD_DIM=v.shape[-1], PADDED_DIM=width, BLOCK_N=_TOKENS_AT_ONCE, ROWS=_TOKENS_PER_PROGRAM,
        HAS_LENGTH=kv_len is not None, num_warps=4, num_stages=2,
    )  # fmt: skip
    total = sums.sum(2)
    mean = total / v.shape[2] if kv_len is None else total / kv_len.clamp(min=1, max=v.shape[2]).view(-1, 1, 1)
    reach = torch.maximum(highest.amax(2) - mean, mean - lowest.amin(2)).clamp(min=0)
    return mean, reach / _LARGEST + 1e-7

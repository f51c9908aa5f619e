"""The "mixed" first-order term in Triton: one matrix per query block, made of those of all key blocks.

Axis legend: B batch, H heads, N tokens, D head size (P when padded to a power of two), nq / nk query / key blocks.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dit_accel.kernels.spec import AttentionCall
from dit_accel.kernels.triton_configs import DOT_OF, next_power_of_two
from dit_accel.kernels.triton_rest import Rest

_LARGEST_TILE = 64


def add_mixed_first_order(q: Tensor, part: Tensor, lse: Tensor, call: AttentionCall, rest: Rest) -> Tensor:
    """Add Σ_j (p_j / t_j) * scale * x·H_j with p_j averaged over each query block.

    Args:
        q: queries `[B, H, Nq, D]`.
        part: fp32 `[B, H, Nq, D]`, everything else.
        lse: fp32 `[B, H, Nq]`, log-sum-exp of exact blocks and summaries together.
        call: plan and scale.
        rest: with the moments of every block, `[B, H, nk, P, P]`.

    Returns:
        `[B, H, Nq, D]` in the dtype of q.
    """
    from dit_accel.kernels.triton_summaries import add_mixed

    assert rest.moments is not None
    blocks, width, centred = call.plan.q_blocks, rest.mean_k.shape[-1], rest.centres is not None
    mixed = torch.matmul(mean_shares(q, lse, call, rest), rest.moments.flatten(-2))
    out = torch.empty_like(q)
    starts, lengths = blocks.on(q.device)
    tile = _tile(blocks.size)
    tiles = -(-blocks.size // tile)
    add_mixed[blocks.count * tiles, q.shape[1], q.shape[0]](
        q, part, out, starts, lengths, rest.centres if centred else mixed, mixed, call.scale,
        *q.stride()[:3], *part.stride()[:3], *out.stride()[:3], tiles,
        HEAD_DIM=q.shape[-1], PADDED_DIM=width, BLOCK_M=tile, SLICE=_slice(width),
        CENTRED=centred, DOT=DOT_OF[q.dtype], num_warps=4 if width <= 128 else 8, num_stages=1,
    )  # fmt: skip
    return out


def mean_shares(q: Tensor, lse: Tensor, call: AttentionCall, rest: Rest) -> Tensor:
    """Weight of every summary key, averaged over each query block, `[B, H, nq, nk]` in the dtype of q."""
    from dit_accel.kernels.triton_summaries import block_shares

    blocks, columns, width = call.plan.q_blocks, call.plan.k_blocks.count, rest.mean_k.shape[-1]
    shares = q.new_empty(*q.shape[:2], blocks.count, columns)
    bias = rest.bias
    if bias is None:
        chosen = rest.chosen.view(torch.bool)
        bias = rest.log_tokens[:, None, None].masked_fill(chosen, -torch.inf).expand_as(shares).contiguous()
    starts, lengths = blocks.on(q.device)
    # One width for all lengths, so that another length compiles nothing.
    block_shares[blocks.count * -(-columns // _LARGEST_TILE), q.shape[1], q.shape[0]](
        q, lse, starts, lengths, rest.mean_k, bias, rest.variance, rest.log_tokens, shares, call.scale,
        *q.stride()[:3], columns, q.shape[2],
        HEAD_DIM=q.shape[-1], PADDED_DIM=width, BLOCK_M=_tile(blocks.size), BLOCK_N=_LARGEST_TILE,
        SECOND_ORDER=rest.variance is not None, DOT=DOT_OF[q.dtype],
        num_warps=4 if width <= 128 else 8, num_stages=1,
    )  # fmt: skip
    return shares


def _slice(width: int) -> int:
    """Rows of a matrix of `width` that are multiplied at a time: a narrow one whole, of others what registers hold."""
    return width if width <= 64 else 32 if width <= 128 else 16


def _tile(size: int) -> int:
    return min(_LARGEST_TILE, max(16, next_power_of_two(size)))

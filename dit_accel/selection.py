"""Scores of key blocks and how many of them are kept: shared by the methods that look at queries and keys.

Axis legend: B batch, H heads, N tokens, D head size, nq / nk query / key blocks.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dit_accel.layout import TokenLayout
from dit_accel.plan import Blocking, BlockPlan


def block_means(x: Tensor, blocks: Blocking, valid: tuple[int, ...] | None = None) -> tuple[Tensor, Tensor]:
    """Mean of the tokens of every block, and how many count.

    Args:
        x: `[B, H, N, D]`.
        blocks: partition of the token axis.
        valid: leading tokens that count, per batch item. None: all.

    Returns:
        Means, fp32 (fp64 for fp64) `[B, H, n, D]`, 0 for a block without valid tokens; counts `[B or 1, 1, n]`.
    """
    x = x if x.dtype == torch.float64 else x.float()
    real = torch.ones(1, x.shape[2], dtype=torch.bool, device=x.device)
    if valid is not None:
        real = torch.arange(x.shape[2], device=x.device) < torch.tensor(valid, device=x.device).unsqueeze(-1)
        x = x.masked_fill(~real[:, None, :, None], 0)
    owner = blocks.block_of_token().to(x.device)
    counts = torch.zeros(len(real), blocks.count, dtype=x.dtype, device=x.device).index_add_(1, owner, real.to(x.dtype))
    sums = x.new_zeros(*x.shape[:2], blocks.count, x.shape[3]).index_add_(2, owner, x)
    return sums / counts.clamp(min=1)[:, None, :, None], counts.unsqueeze(1)


def pooled_scores(q: Tensor, k: Tensor, blocks: Blocking, layout: TokenLayout) -> Tensor:
    """Log-mass of each key block as seen by the mean query of each query block, `[B, H, nq, nk]`.

    The score of a block of n keys is q̄·k̄ / sqrt(D) + ln n; -inf for a block without valid tokens. q, k `[B, H, N, D]`.
    """
    mean_q, _ = block_means(q, blocks, layout.valid)
    mean_k, counts = block_means(k, blocks, layout.valid)
    scores: Tensor = q.shape[-1] ** -0.5 * (mean_q @ mean_k.transpose(-1, -2)) + counts.log().unsqueeze(-2)
    return scores


def top_k_plan(scores: Tensor, keep: int, blocks: Blocking, layout: TokenLayout, forced: Tensor) -> BlockPlan:
    """Keep the `keep` best key blocks of each row; ties go to the lower index.

    Args:
        scores: `[B, H, nq, nk]`, -inf where a block must not be chosen.
        keep: blocks per row; the forced ones are counted in it.
        blocks: partition of queries and keys.
        layout: token geometry. Text blocks attend everything and are attended by everything.
        forced: bool `[nq, nk]`, blocks that are always kept.
    """
    text = layout.text_blocks(blocks).to(scores.device)
    always = forced.to(scores.device) | text
    order = scores.masked_fill(always & ~scores.isneginf(), torch.inf).argsort(dim=-1, descending=True, stable=True)
    mask = torch.zeros_like(scores, dtype=torch.bool).scatter_(-1, order[..., :keep], True)
    mask = (mask | always | text.unsqueeze(-1)) & ~scores.isneginf()
    # A row of padding only attends itself: it has no valid key of its own, and its output is not used.
    mask |= ~mask.any(-1, keepdim=True) & torch.eye(blocks.count, dtype=torch.bool, device=mask.device)
    return BlockPlan.from_mask(mask, blocks, blocks)

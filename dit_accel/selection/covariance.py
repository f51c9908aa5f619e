"""Scores for selections whose rest is approximated: what is approximated badly is worth computing."""

from __future__ import annotations

import torch
from torch import Tensor

from dit_accel.kernels.block_statistics import covariance_squares_in_triton
from dit_accel.kernels.operations import uses_triton
from dit_accel.layout import TokenLayout
from dit_accel.plan import Blocking
from dit_accel.selection.pooling import block_means, gather_blocks, lengths_of, pooled_scores, working
from dit_accel.selection.scores import row_groups

_SHARPNESS = 0.85
_FLOOR = 1e-5  # of the published code: keeps the logarithm of a block of identical keys or values finite


def covariance_norms(k: Tensor, v: Tensor, blocks: Blocking, layout: TokenLayout) -> Tensor:
    """Frobenius norm of H = Σ (k - k̄) vᵀ over the real tokens of each block, `[B, H, n]`. k, v `[B, H, N, D]`."""
    return covariance_squares(k, v, blocks, layout).sum(-1).sqrt()


def covariance_squares(k: Tensor, v: Tensor, blocks: Blocking, layout: TokenLayout) -> Tensor:
    """Squared lengths of the rows of H = Σ (k - k̄) vᵀ, one per channel of the keys, `[B, H, n, D]`.

    Args:
        k, v: `[B, H, N, D]`.
        blocks: partition of the keys.
        layout: token geometry; padding counts for nothing.
    """
    if uses_triton("covariance squares", k):
        return covariance_squares_in_triton(k, v, blocks, lengths_of(layout.valid, k.device))
    squares, width = [], k.shape[0] * k.shape[1] * k.shape[3] * max(k.shape[3], blocks.size)
    for group in row_groups(blocks.count, width, k.device):
        inside = slice(int(blocks.starts[group.start]), int(blocks.starts[group.stop]))
        part = Blocking.from_lengths(blocks.lengths[group], blocks.size)
        valid = layout.valid and tuple(min(max(n - inside.start, 0), part.tokens) for n in layout.valid)
        keys, real = gather_blocks(k[:, :, inside], part, valid)
        values, _ = gather_blocks(v[:, :, inside], part, valid)
        counts = real.sum(-1).to(keys.dtype).clamp(min=1)[:, None, :, None, None]
        # The deviations sum to zero, so the mean of one factor is enough.
        h = (keys - keys.sum(3, keepdim=True) / counts).mul_(real[:, None, :, :, None]).transpose(-1, -2) @ values
        squares.append(h.square_().sum(-1))
    return torch.cat(squares, 2)


def covariance_scores(q: Tensor, k: Tensor, v: Tensor, blocks: Blocking, layout: TokenLayout) -> Tensor:
    """Pooled log-mass plus ln(‖H‖ + 1e-5): mass times what the mean key hides (arXiv 2602.01077, as released).

    The paper's equation has the spectral norm of H less its mean over the blocks; the released code has this one.

    Args:
        q, k, v: `[B, H, N, D]`.
        blocks: partition of queries and keys.
        layout: token geometry.

    Returns:
        `[B, H, nq, nk]`, -inf at blocks without real keys.
    """
    hidden = (covariance_norms(k, v, blocks, layout) + _FLOOR).log()
    return pooled_scores(q, k, blocks, layout) + hidden.unsqueeze(-2)


def error_scores(q: Tensor, k: Tensor, v: Tensor, blocks: Blocking, layout: TokenLayout) -> Tensor:
    """Logarithm of what an expansion about the mean query gets wrong when it stands for a block (this project).

    To first order the value of a block of n keys errs by (q - q̄)ᵀ H / n at a query q. Its mean square, with the
    covariance of the queries of the block taken as diagonal, is weighed by the mass of the block, as the pooled map has
    it, to the power 0.85: pooling makes the map too sharp. Unlike scores that are log-masses up to a constant per row,
    these compare rows and heads with one another: where queries or keys are alike, few exact blocks are needed.

    Args:
        q, k, v: `[B, H, N, D]`.
        blocks: partition of queries and keys.
        layout: token geometry.

    Returns:
        `[B, H, nq, nk]`, -inf at blocks without real keys.
    """
    means, _ = block_means(q, blocks, layout.valid)
    squares, _ = block_means(working(q).square(), blocks, layout.valid)
    variance = (squares - means.square()).clamp_(min=0) * (1 / q.shape[-1])
    hidden = variance @ covariance_squares(k, v, blocks, layout).transpose(-1, -2)
    shares = pooled_scores(q, k, blocks, layout).log_softmax(-1)
    return _SHARPNESS * shares + 0.5 * (hidden + _FLOOR**2).log()

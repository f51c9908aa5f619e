"""Scores for selections whose rest is approximated: what is approximated badly is worth computing."""

from __future__ import annotations

import torch
from torch import Tensor

from dit_accel.layout import TokenLayout
from dit_accel.plan import Blocking
from dit_accel.selection.pooling import gather_blocks, pooled_scores
from dit_accel.selection.scores import row_groups

_FLOOR = 1e-5  # of the published code: keeps the logarithm of a block of identical keys or values finite


def covariance_norms(k: Tensor, v: Tensor, blocks: Blocking, layout: TokenLayout) -> Tensor:
    """Frobenius norm of H = Σ (k - k̄) vᵀ over the real tokens of each block, `[B, H, n]`. k, v `[B, H, N, D]`."""
    norms, width = [], k.shape[0] * k.shape[1] * k.shape[3] * max(k.shape[3], blocks.size)
    for group in row_groups(blocks.count, width, k.device):
        inside = slice(int(blocks.starts[group.start]), int(blocks.starts[group.stop]))
        part = Blocking.from_lengths(blocks.lengths[group], blocks.size)
        valid = layout.valid and tuple(min(max(n - inside.start, 0), part.tokens) for n in layout.valid)
        keys, real = gather_blocks(k[:, :, inside], part, valid)
        values, _ = gather_blocks(v[:, :, inside], part, valid)
        counts = real.sum(-1).to(keys.dtype).clamp(min=1)[:, None, :, None, None]
        # The deviations sum to zero, so the mean of one factor is enough.
        h = (keys - keys.sum(3, keepdim=True) / counts).mul_(real[:, None, :, :, None]).transpose(-1, -2) @ values
        norms.append(h.flatten(-2).norm(dim=-1))
    return torch.cat(norms, 2)


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

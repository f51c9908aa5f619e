"""Attention over blocks of which only statistics are left, as a part that `merge` joins to an exact one.

The arithmetic is that of `Remainder` (kernels/spec.py), for keys that are gone. Axis legend: B batch, H heads,
N queries, D head size, n blocks, g groups of blocks.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dit_accel.errors import PlanError

_CHUNK_NUMBERS = 1 << 22  # size of the largest temporary, in numbers: 16 MiB in fp32


@dataclass(frozen=True)
class BlockStatistics:
    """What is kept of blocks of keys and values, fp32 or fp64.

    Args:
        mean_k, mean_v: `[B, H, n, D]`.
        tokens: keys per block `[n]`.
        variance: of the keys, per channel `[B, H, n, D]`. None: the mass of a block is not corrected.
        cross: Σ (k - mean) vᵀ over the keys of a group `[B, H, g, D, D]`, each with the mean of its own block; the
            n / g blocks of a group stand together. None: no first-order term.

    Raises:
        PlanError: the shapes do not go together.
    """

    mean_k: Tensor
    mean_v: Tensor
    tokens: Tensor
    variance: Tensor | None = None
    cross: Tensor | None = None

    def __post_init__(self) -> None:
        blocks, dim = self.mean_k.shape[2:]
        fits = self.mean_v.shape == self.mean_k.shape and self.tokens.shape == (blocks,)
        fits = fits and (self.variance is None or self.variance.shape == self.mean_k.shape)
        if self.cross is not None:
            groups = self.cross.shape[2]
            fits = fits and self.cross.shape[3:] == (dim, dim) and groups > 0 and blocks % groups == 0
        if not fits:
            raise PlanError("BlockStatistics: expected means, tokens, variance and cross terms of the same blocks")

    @property
    def bytes(self) -> int:
        """Bytes of all tensors."""
        kept = (self.mean_k, self.mean_v, self.tokens, self.variance, self.cross)
        return sum(x.numel() * x.element_size() for x in kept if x is not None)


def attend_summary(q: Tensor, blocks: BlockStatistics, scale: float | None = None) -> tuple[Tensor, Tensor]:
    """Attention of q over the summary keys of `blocks`.

    A block of n keys has the logit scale * q·mean + ln n + w with w = min(½ Σ_d (scale * q_d)² variance_d, ln n), or
    w = 0 without a variance. The cross terms add Σ_g (p_g / t_g) * scale * q·H_g to the output, for groups g of weight
    p_g and t_g keys.

    Args:
        q: `[B, H, N, D]`.
        blocks: the statistics.
        scale: factor on the logits. Default 1 / sqrt(D).

    Returns:
        Output `[B, H, N, D]` in the dtype of q, and log-sum-exp `[B, H, N]` in that of the statistics.
    """
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    batch, heads, count, _ = blocks.mean_k.shape
    rows = max(1, _CHUNK_NUMBERS // (batch * heads * max(count, q.shape[-1])))
    parts = [_attend(part.to(blocks.mean_k.dtype), blocks, scale) for part in q.split(rows, dim=2)]
    outs, lses = zip(*parts, strict=True)
    return torch.cat(outs, dim=2).to(q.dtype), torch.cat(lses, dim=2)


def _attend(q: Tensor, blocks: BlockStatistics, scale: float) -> tuple[Tensor, Tensor]:
    mass = blocks.tokens.log()
    logits = scale * q @ blocks.mean_k.transpose(-1, -2)
    if blocks.variance is not None:
        logits += (0.5 * (scale * q).square() @ blocks.variance.transpose(-1, -2)).minimum(mass)
    logits += mass
    lse = logits.logsumexp(-1)
    weights = (logits - lse.unsqueeze(-1)).exp()
    out = weights @ blocks.mean_v
    if blocks.cross is not None:
        groups = blocks.cross.shape[2]
        share = weights.unflatten(-1, (groups, -1)).sum(-1) / blocks.tokens.view(groups, -1).sum(-1)
        for group in range(groups):
            out += scale * share[..., group : group + 1] * (q @ blocks.cross[:, :, group])
    return out, lse

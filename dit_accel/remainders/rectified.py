"""The rectified remainder: a pooled map says how much mass the selected keys should have had (arXiv 2511.19835).

Axis legend: B batch, H heads, N tokens, D head size, nq / nk query / key blocks.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dit_accel.layout import TokenLayout
from dit_accel.plan import Blocking
from dit_accel.remainders.partial import PartialAttention
from dit_accel.selection import block_means, gather_blocks, pooled_scores, real_tokens
from dit_accel.selection.scores import block_sums, log_mass
from dit_accel.transfer import to_device


def isolated_scores(q: Tensor, k: Tensor, blocks: Blocking, layout: TokenLayout) -> Tensor:
    """Log-mass of each block for the mean queries, `[B, H, nq, nk]`: video keys pooled, text keys one by one.

    Pooling unlike text keys would hide the few that matter. q, k `[B, H, N, D]`.
    """
    scores = pooled_scores(q, k, blocks, layout)
    if not layout.text:
        return scores
    text, real = layout.text_slice(), real_tokens(layout.tokens, layout.valid, k.device)[:, None, None]
    logits = (block_means(q, blocks, layout.valid)[0] * q.shape[-1] ** -0.5) @ k.to(scores.dtype).transpose(-1, -2)
    logits = logits.masked_fill(~real, -torch.inf)[..., text]
    peak = logits.amax(-1, keepdim=True)
    mass = torch.zeros_like(scores[..., :1]).expand(*scores.shape[:3], layout.tokens).clone()
    mass[..., text] = (logits - peak).exp()
    columns = to_device(layout.text_blocks(blocks), k.device)
    exact = log_mass(block_sums(mass, blocks), ~scores.isneginf()) + peak
    return torch.where(columns, exact, scores)


def rectify(part: PartialAttention, *, gate: bool) -> Tensor:
    """Scale the selected part to the mass that the pooled map gives it, and add pooled values for the rest.

    With P the softmax of `isolated_scores`, K what is selected and, with the gate, what pooling cannot be trusted for:
    out * Σ_K P + Σ_rest P v̄. The weights sum to 1.

    Args:
        part: the selected keys, by a plan whose queries and keys share their blocks.
        gate: trust pooling for a pair of blocks only where the product of the means exceeds what the mean deviations
            of queries and keys could change in it.
    """
    q, k, layout, blocks = part.q, part.k, part.layout, part.plan.k_blocks
    queries = q if part.scale is None else q * (part.scale * q.shape[-1] ** 0.5)
    shares = isolated_scores(queries, k, blocks, layout).softmax(-1).nan_to_num(0.0)
    rest = ~part.plan.to_mask().expand(shares.shape)
    if gate:
        rest = rest & trusted(q, k, blocks, layout)
    tail = shares.masked_fill(~rest, 0)
    means, _ = block_means(part.v, blocks, layout.valid)
    owner = blocks.block_of_token().to(q.device)
    mass, added = (1 - tail.sum(-1, keepdim=True)), tail @ means
    return (mass[:, :, owner] * part.out + added[:, :, owner]).to(part.out.dtype)


def trusted(q: Tensor, k: Tensor, blocks: Blocking, layout: TokenLayout) -> Tensor:
    """Where pooling is trusted, bool `[B, H, nq, nk]`: |q̄·k̄| > |u·k̄| + |q̄·w| with u, w the mean absolute deviations.

    It does not depend on the scale of queries or keys. q, k `[B, H, N, D]`.
    """
    (mean_q, apart_q), (mean_k, apart_k) = (_mean_and_deviation(x, blocks, layout) for x in (q, k))
    keys = mean_k.transpose(-1, -2)
    return (mean_q @ keys).abs() > (apart_q @ keys).abs() + (mean_q @ apart_k.transpose(-1, -2)).abs()


def _mean_and_deviation(x: Tensor, blocks: Blocking, layout: TokenLayout) -> tuple[Tensor, Tensor]:
    """Mean and mean absolute deviation of the real tokens of each block, `[B, H, n, D]` each."""
    rows, real = gather_blocks(x, blocks, layout.valid)
    weight = real[:, None, :, :, None].to(rows.dtype)
    count = weight.sum(3).clamp(min=1)
    mean = rows.sum(3) / count
    return mean, ((rows - mean.unsqueeze(3)).abs() * weight).sum(3) / count

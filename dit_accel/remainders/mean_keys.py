"""Mean keys that stand for many join the softmax of an exact part."""

from __future__ import annotations

import torch
from torch import Tensor

from dit_accel.remainders.partial import PartialAttention
from dit_accel.selection.scores import row_groups


def join_means(part: PartialAttention, keys: Tensor, values: Tensor, bias: Tensor) -> Tensor:
    """One softmax over the exact keys of `part` and `m` mean keys; memory for a few rows of N x m at a time.

    Args:
        part: the exact keys.
        keys, values: means, fp32 or fp64 `[B, H, m, D]`.
        bias: what the logits of the mean keys get, the logarithm of how many keys each stands for, -inf where it does
            not count; `[B or 1, H or 1, nq or 1, m]`.

    Returns:
        `[B, H, N, D]` in the dtype of `part.out`.
    """
    q, lse, out, blocks = part.q, part.lse, part.out, part.plan.q_blocks
    scale = q.shape[-1] ** -0.5 if part.scale is None else part.scale
    result, bias = torch.empty_like(out), bias.expand(-1, -1, blocks.count, -1)
    owner = blocks.block_of_token().to(q.device)
    for rows in row_groups(q.shape[2], q.shape[0] * q.shape[1] * keys.shape[2], q.device):
        logits = q[:, :, rows].to(keys.dtype) * scale @ keys.transpose(-1, -2) + bias[:, :, owner[rows]]
        joint = torch.logaddexp(lse[:, :, rows].to(keys.dtype), logits.logsumexp(-1)).unsqueeze(-1)
        exact = (lse[:, :, rows].unsqueeze(-1) - joint).exp() * out[:, :, rows]
        result[:, :, rows] = (exact + (logits - joint).exp() @ values).to(out.dtype)
    return result

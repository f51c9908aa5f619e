"""The specification of `block_attention`: O(N²), plain, in float64 when given float64. Fast paths may not import it."""

from __future__ import annotations

import torch
from torch import Tensor

from dit_accel.kernels.registry import Backend, Request
from dit_accel.kernels.spec import Remainder
from dit_accel.plan import BlockPlan


def run(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    plan: BlockPlan,
    *,
    scale: float,
    remainder: Remainder | None,
    kv_len: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """See `BackendFunction`. q `[B, H, Nq, D]`; k, v `[B, H, Nk, D]`."""
    work = q.dtype if q.dtype == torch.float64 else torch.float32
    real = torch.ones(k.shape[0], 1, 1, k.shape[2], dtype=torch.bool, device=k.device)
    if kv_len is not None:
        real = (torch.arange(k.shape[2], device=k.device) < kv_len[:, None]).view(real.shape)
    keys, values = (x.to(work).masked_fill(~real.transpose(-1, -2), 0) for x in (k, v))
    logits = scale * (q.to(work) @ keys.transpose(-1, -2))
    logits = logits.masked_fill(~(plan.to_token_mask() & real), -torch.inf)
    if remainder is not None:
        extra, summary = _summaries(q.to(work), keys, values, real, plan, scale, remainder)
        logits, values = torch.cat([logits, extra], -1), torch.cat([values, summary], 2)
    lse = logits.logsumexp(-1)
    weights = (logits - lse.unsqueeze(-1)).exp().masked_fill(lse.isneginf().unsqueeze(-1), 0)
    return (weights @ values).to(q.dtype), lse


def _summaries(
    q: Tensor, k: Tensor, v: Tensor, real: Tensor, plan: BlockPlan, scale: float, remainder: Remainder
) -> tuple[Tensor, Tensor]:
    """Logits `[B, H, Nq, nk]` of the summary keys and their values `[B, H, nk, D]`, block by block."""
    selected = plan.to_mask()[..., plan.q_blocks.block_of_token().to(q.device), :]
    logits, values = [], []
    for j, block in enumerate(plan.k_blocks.block_of_token().unique_consecutive().tolist()):
        inside = slice(int(plan.k_blocks.starts[block]), int(plan.k_blocks.starts[block + 1]))
        count = real[..., inside].sum(-1).to(q.dtype).unsqueeze(-1)  # [B, 1, 1, 1]
        mean = k[:, :, inside].sum(2, keepdim=True) / count.clamp(min=1)
        spread = (k[:, :, inside] - mean).square() * real[..., inside].transpose(-1, -2)
        variance = spread.sum(2, keepdim=True) / count.clamp(min=1)
        logit = scale * (q * mean).sum(-1) + count.log().squeeze(-1)
        if remainder.mass == "diagonal":
            logit = logit + torch.minimum(0.5 * ((scale * q).square() * variance).sum(-1), count.log().squeeze(-1))
        logits.append(logit.masked_fill(selected[..., j] | (count == 0).squeeze(-1), -torch.inf))
        values.append(v[:, :, inside].sum(2) / count.squeeze(-1).clamp(min=1))
    return torch.stack(logits, -1), torch.stack(values, 2)


def _why_not(request: Request) -> str | None:
    return None


BACKEND = Backend("reference", run, _why_not, priority=-1, break_even=1.0)

"""Recall of a plan: the share of the true attention mass that it covers, exact on sampled query rows."""

from __future__ import annotations

import torch
from torch import Tensor

from dit_accel.plan import BlockPlan
from dit_accel.reuse import whole_blocks

_ELEMENTS = 2**24


def plan_recall(
    plan: BlockPlan,
    q: Tensor,
    k: Tensor,
    *,
    rows: int = 256,
    kv_len: Tensor | None = None,
    scale: float | None = None,
    seed: int = 0,
) -> Tensor:
    """See `BlockPlan.recall`, which calls this. Memory is proportional to sampled rows times keys."""
    batch, heads, tokens, dim = q.shape
    scale = dim**-0.5 if scale is None else scale
    real = torch.ones(batch, k.shape[2], dtype=torch.bool, device=q.device)
    if kv_len is not None:
        real = torch.arange(k.shape[2], device=q.device) < kv_len.to(q.device).unsqueeze(-1)
    # Queries are padded like keys where both are the same tokens.
    counts = real if tokens == k.shape[2] else torch.ones(batch, tokens, dtype=torch.bool, device=q.device)
    work = torch.float64 if q.dtype == torch.float64 else torch.float32
    keys = k.to(work).masked_fill(~real[:, None, :, None], 0).transpose(-1, -2)
    chosen = sampled_rows(tokens, rows, seed)
    masks = _block_masks(plan, chosen)
    total = torch.zeros(batch, heads, dtype=torch.float64, device=q.device)
    for part in torch.arange(len(chosen)).split(max(1, _ELEMENTS // (batch * heads * k.shape[2]))):
        at = chosen[part]
        logits = scale * (q[:, :, at.to(q.device)].to(work) @ keys)
        weights = logits.masked_fill(~real[:, None, None], -torch.inf).softmax(-1)
        covered = (weights * _covered(plan, masks, part, at).to(q.device)).sum(-1)
        total += covered.masked_fill(~counts[:, None, at.to(q.device)], 0).sum(-1)
    return total / counts[:, chosen.to(q.device)].sum(-1, keepdim=True).clamp(min=1)


def sampled_rows(tokens: int, rows: int, seed: int = 0) -> Tensor:
    """`rows` token indices, one drawn in each of as many equal runs of the sequence, ascending; all if there are fewer.

    int64 `[min(rows, tokens)]` on the CPU.
    """
    if rows >= tokens:
        return torch.arange(tokens)
    edges = torch.arange(rows + 1) * tokens // rows
    place = torch.rand(rows, generator=torch.Generator().manual_seed(seed))
    return edges[:-1] + (place * edges.diff()).long()


def _block_masks(plan: BlockPlan, queries: Tensor) -> list[Tensor]:
    """Selected key blocks of each query token, bool `[B', H', R, nk]` on the CPU; second, those attended whole."""
    row = plan.q_blocks.block_of_token()[queries]
    return [part.to_mask().cpu()[..., row, :] for part in (plan, whole_blocks(plan))]


def _covered(plan: BlockPlan, masks: list[Tensor], part: Tensor, queries: Tensor) -> Tensor:
    """Which keys the plan attends for `queries`, rows `part` of the masks; bool `[B', H', len(part), Nk]`, CPU."""
    owner = plan.k_blocks.block_of_token()
    selected = masks[0][:, :, part][..., owner]
    if plan.predicate is None:
        return selected
    inside = plan.predicate.to("cpu").keeps(queries, torch.arange(len(owner)))
    return masks[1][:, :, part][..., owner] | (selected & inside)

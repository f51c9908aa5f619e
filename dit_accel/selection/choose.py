"""From scores to a plan: one ranking, one tie-break, one treatment of forced blocks, text and padding.

Axis legend: B batch, H heads, nq / nk query / key blocks.
"""

from __future__ import annotations

import zlib
from typing import Literal

import torch
from torch import Tensor

from dit_accel.layout import TokenLayout
from dit_accel.plan import Blocking, BlockPlan
from dit_accel.selection.budgets import Budget, Ranked, TopK, head_classes
from dit_accel.selection.forced import own_blocks
from dit_accel.transfer import to_device

Normalisation = Literal["softmax", "min_max"]


def shares_of(scores: Tensor, normalisation: Normalisation = "softmax") -> Tensor:
    """Scores `[..., L]` as shares of the mass: rows sum to 1 (0 where nothing may be chosen), -inf gets 0.

    Args:
        scores: -inf where a block must not be chosen.
        normalisation: "softmax": scores are log-masses; "min_max": they are mapped linearly to [0, 1], the lowest to 0,
            and divided by their sum (arXiv 2506.23858).
    """
    real = ~scores.isneginf()
    if normalisation == "softmax":
        return scores.softmax(-1).nan_to_num(0.0)
    low = scores.masked_fill(~real, torch.inf).amin(-1, keepdim=True)
    span = scores.amax(-1, keepdim=True) - low
    mass = torch.where(span > 0, (scores - low) / span, 1.0).masked_fill(~real, 0)
    return mass / mass.sum(-1, keepdim=True).clamp(min=torch.finfo(mass.dtype).tiny)


def select_blocks(
    scores: Tensor,
    budget: Budget,
    forced: Tensor | None = None,
    *,
    beside: Tensor | None = None,
    normalisation: Normalisation = "softmax",
) -> Tensor:
    """Which key blocks are kept, bool `[B, H, nq, nk]`; ties go to the lower index.

    Args:
        scores: `[B, H, nq, nk]`, higher is better, -inf where a block must not be chosen.
        budget: how many.
        forced: bool that broadcasts against `scores`, blocks that are kept whatever their score, as part of the budget
            and of the mass that top-p counts. Default: none.
        beside: the same for blocks that are left out of the ranking and come on top of the budget. Default: none.
        normalisation: how scores become shares of the mass, see `shares_of`.
    """
    real = ~scores.isneginf()
    first, extra = (
        torch.zeros_like(real) if x is None else to_device(x, scores.device).expand_as(real) & real
        for x in (forced, beside)
    )
    first, total = first & ~extra, real.sum(-1)
    rows = scores.masked_fill(extra, -torch.inf)
    if budget.scope != "row":
        # Each row keeps its best block, or a row of small scores would be left with nothing to attend.
        best = torch.zeros_like(real).scatter_(-1, rows.argmax(-1, keepdim=True), True) & ~rows.isneginf()
        first = first | (best & ~first.any(-1, keepdim=True))
        # Masses of rows add up to that of the ranking; a range is that of the ranking.
        lead = (*scores.shape[:2], 1, -1) if budget.scope == "head" else (scores.shape[0], 1, 1, -1)
        whole, first, total = rows.reshape(lead), first.reshape(lead), total.reshape(lead).sum(-1)
        many = whole.shape[-1] // scores.shape[-1]

        def shares() -> Tensor:
            if normalisation == "softmax":
                return shares_of(rows, normalisation).reshape(lead) / many
            return shares_of(whole, normalisation)

        ranked = Ranked(whole, shares, first, total)
    else:
        ranked = Ranked(rows, lambda: shares_of(rows, normalisation), first, total)
    return ranked.ranking.leading(budget.counts(ranked)).view_as(real) | extra


def select_plan(
    scores: Tensor,
    budget: Budget,
    q_blocks: Blocking,
    k_blocks: Blocking,
    layout: TokenLayout,
    forced: Tensor | None = None,
    *,
    beside: Tensor | None = None,
    normalisation: Normalisation = "softmax",
) -> BlockPlan:
    """The plan that `select_blocks` makes, with text and padding treated alike for every method.

    Text blocks attend everything and are attended by everything; text keys count inside the budget like any forced
    block. A row of padding, which has no key of its own, attends itself: its output is not used.

    Args:
        scores: `[B, H, nq, nk]`, -inf at key blocks without real tokens.
        budget: how many blocks each row keeps.
        q_blocks, k_blocks: the partitions, made by `layout.blocks`.
        layout: token geometry.
        forced: bool that broadcasts against `scores`, further blocks that are always kept.
        beside, normalisation: see `select_blocks`.
    """
    device = scores.device
    always = to_device(layout.text_blocks(k_blocks), device).expand(1, 1, q_blocks.count, -1)
    always = always if forced is None else always | to_device(forced, device)
    mask = select_blocks(scores, budget, always, beside=beside, normalisation=normalisation)
    longest = _longest(budget, k_blocks.count, forced, beside)
    return plan_of_mask(mask, q_blocks, k_blocks, layout, ~scores.isneginf(), longest)


def _longest(budget: Budget, blocks: int, forced: Tensor | None, beside: Tensor | None) -> int:
    """How many blocks a row holds at most, where text adds none; masks that are on a device are not asked for."""
    if any(mask is not None and mask.device.type != "cpu" for mask in (forced, beside)):
        return blocks
    least, more = (0 if mask is None else int(mask.sum(-1).max()) for mask in (forced, beside))
    return max(budget.longest(blocks), least) + more


def plan_of_mask(
    mask: Tensor,
    q_blocks: Blocking,
    k_blocks: Blocking,
    layout: TokenLayout,
    real: Tensor,
    longest: int | None = None,
) -> BlockPlan:
    """A plan from the selected blocks `[B, H, nq, nk]`: text rows and columns whole, padding never but for itself.

    Args:
        mask: bool, the selected blocks.
        q_blocks, k_blocks: the partitions, made by `layout.blocks`.
        layout: token geometry.
        real: bool that broadcasts against `mask`, key blocks that hold a real token.
        longest: how many blocks a row of `mask` selects at most. Default: all.
    """
    device, own = mask.device, own_blocks(q_blocks, k_blocks)
    text_rows = to_device(layout.text_blocks(q_blocks), device).unsqueeze(-1)
    mask = (mask | text_rows | to_device(layout.text_blocks(k_blocks), device)) & real
    mask |= ~mask.any(-1, keepdim=True) & to_device(own, device)
    if longest is None or layout.text:
        longest = k_blocks.count
    longest = min(max(longest, int(own.sum(-1).max())), k_blocks.count)
    return BlockPlan.from_mask(mask, q_blocks, k_blocks, longest=longest)


def adapt_heads(
    scores: Tensor,
    density: float,
    forced: Tensor | None = None,
    *,
    beside: Tensor | None = None,
    normalisation: Normalisation = "softmax",
    gate: float = 0.8,
) -> Tensor:
    """Density of each head by `head_classes`, from the mass its scores say it keeps at the common density.

    Args:
        scores: `[B, H, nq, nk]`.
        density: common share of blocks.
        forced, beside, normalisation: see `select_blocks`.
        gate: recall above which a head counts as easy.

    Returns:
        fp64 `[B, H]`, for `TopK.share`.
    """
    budget = TopK(share=density, rounding="ceil")
    mask = select_blocks(scores, budget, forced, beside=beside, normalisation=normalisation)
    # Each row is normalised by its own sum, so that scores made with a stale normaliser can be used too.
    kept = (shares_of(scores, normalisation) * mask).sum(-1)
    return head_classes(kept.mean(-1), density, gate)


def routing_noise(scores: Tensor, amplitude: float, seed: int, layer: int, step: int) -> Tensor:
    """Scores with Gaussian noise of `amplitude` times the spread of their row, against flicker from hard choices.

    Drawn from (seed, layer, step), and shared by the batch, so that a row of a batch is what it is alone.

    Args:
        scores: `[B, H, nq, nk]`; -inf stays.
        amplitude: standard deviation of the noise in units of the row's own. 0 returns `scores` as they are.
        seed, layer, step: what the draw depends on.
    """
    if amplitude == 0:
        return scores
    real = ~scores.isneginf()
    count = real.sum(-1, keepdim=True).clamp(min=1)
    mean = scores.masked_fill(~real, 0).sum(-1, keepdim=True) / count
    spread = (scores - mean).masked_fill(~real, 0).square().sum(-1, keepdim=True).div(count).sqrt()
    noise = torch.randn(
        scores.shape[1:], generator=generator_for(scores.device, seed, layer, step), device=scores.device
    )
    return scores + amplitude * spread * noise.to(scores.dtype)


def generator_for(device: torch.device, *key: int) -> torch.Generator:
    """A generator on `device` seeded by a few integers, the same in every process."""
    return torch.Generator(device).manual_seed(zlib.crc32(repr(key).encode()))


def top_k_plan(scores: Tensor, keep: int, blocks: Blocking, layout: TokenLayout, forced: Tensor) -> BlockPlan:
    """Keep the `keep` best key blocks of each row; ties go to the lower index.

    Args:
        scores: `[B, H, nq, nk]`, -inf where a block must not be chosen.
        keep: blocks per row; the forced ones are counted in it.
        blocks: partition of queries and keys.
        layout: token geometry. Text blocks attend everything and are attended by everything.
        forced: bool `[nq, nk]`, blocks that are always kept.
    """
    return select_plan(scores, TopK(count=keep), blocks, blocks, layout, forced)

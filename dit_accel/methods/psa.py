"""Pyramid sparse attention: key blocks read exactly, as means of 2, 4 or 8 keys, or not at all."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

import torch
from pydantic import model_validator
from torch import Tensor

from dit_accel.methods.base import FROM_LIST, BlockSize
from dit_accel.methods.dynamic import PoolingMethod, Share
from dit_accel.methods.registry import register
from dit_accel.plan import Blocking, BlockPlan
from dit_accel.remainders.partial import PartialAttention
from dit_accel.remainders.pyramid import LEVELS, add_pooled_levels, coarsest_levels, pyramid_plan
from dit_accel.selection import Budget, TopK, generator_for, plan_of_mask, real_blocks, shares_of
from dit_accel.selection.budgets import per_head
from dit_accel.selection.samples import sampled_scores
from dit_accel.state import CallContext
from dit_accel.transfer import to_device
from dit_accel.widest import widened, widest

_LEAST_EXACT = 0.06
_BISECTIONS = 40
_Ends = Annotated[tuple[Share, Share, Share, Share], FROM_LIST]
_Limits = Annotated[tuple[float, float, float], FROM_LIST]


@register("psa")
class PSA(PoolingMethod):
    """Blocks ranked by sampled logits; the best are read exactly, the next at coarser levels, the rest are skipped.

    Published with dense first steps and `order="hilbert"`. Text is read exactly.

    Args:
        density: products per pair of tokens, a pooled block counting by 1 / level. It scales all of `ends` under the
            rule "count". Default None: `ends` as they are.
        ends: where levels 1, 2, 4 and 8 end in the ranking of a row.
        rule: "count": ends are shares of the blocks; "mass": of the summed scores, the crossing block included, and at
            least 6 % of the blocks are exact.
        samples: share of the tokens of a block that is looked at, at random places; published is 1/4, which costs four
            times as much as 1/8 and gains under 1 % of the recall.
        similarity: least mean cosine between the ends of groups of 2, 4 and 8 keys at which a block may be read at
            that level, published as [0.7, 0.65, 0.6]. Default None: no such test.
        block, key_block: 128 and 64 tokens.
    """

    source: ClassVar[str] = "arXiv 2512.04025"

    ends: _Ends = (0.1, 0.15, 0.15, 0.35)
    rule: Literal["count", "mass"] = "count"
    samples: Share = 0.125
    similarity: _Limits | None = None
    block: BlockSize = 128
    key_block: BlockSize | None = 64

    @model_validator(mode="after")
    def _ends_ascend(self) -> PSA:
        if list(self.ends) != sorted(self.ends):
            raise ValueError(f"ends must not descend, got {list(self.ends)}")
        if self.density is not None and self.rule == "mass":
            raise ValueError("density scales ends that are shares of the blocks: use rule='count' with it")
        return self

    def scores(self, q: Tensor, k: Tensor, call: CallContext, q_blocks: Blocking, k_blocks: Blocking) -> Tensor:
        """Largest sampled logits. q, k `[B, H, N, D]`."""
        samples = tuple(max(1, round(self.samples * blocks.size)) for blocks in (q_blocks, k_blocks))
        generator = generator_for(q.device, call.seed, call.layer)
        return sampled_scores(q, k, q_blocks, k_blocks, call.layout, (samples[0], samples[1]), generator, self.padding)

    def budget(self, q: Tensor, k: Tensor, call: CallContext) -> Budget:
        """The density of the published ends."""
        return TopK(share=_density_of(torch.tensor(self.ends)).item())

    def select(self, q: Tensor, k: Tensor, call: CallContext) -> BlockPlan:
        """Score, rank, give levels. q, k `[B, H, N, D]`."""
        layout, (q_blocks, k_blocks) = call.layout, self.blocks(call.layout)
        scores = self.perturbed(self.scores(q, k, call, q_blocks, k_blocks), call)
        forced = self.forced(q, k, call, q_blocks, k_blocks)
        budget = self.limit(scores, q, k, call, forced)
        share = budget.share if isinstance(budget, TopK) else 1.0
        ends = to_device(torch.tensor(self.ends, dtype=widest(q.device)), q.device)
        if self.density is not None:
            ends = _scaled(ends, per_head(share, scores))
        levels = self._levels(scores, ends.broadcast_to(*scores.shape[:2], 1, 4), forced)
        levels = torch.minimum(levels, coarsest_levels(k, k_blocks, layout, self.similarity).unsqueeze(-2))
        exact = levels == 1
        if forced is not None:
            exact = exact | to_device(forced, exact.device)
        exact = plan_of_mask(exact, q_blocks, k_blocks, layout, real_blocks(k_blocks, layout, q.device)).to_mask()
        return pyramid_plan(levels.masked_fill(exact, 1), q_blocks, k_blocks)

    def _levels(self, scores: Tensor, ends: Tensor, forced: Tensor | None) -> Tensor:
        """Levels by rank, those forced first, uint8 like `scores`; `ends` `[B, H, 1, 4]`."""
        real = ~scores.isneginf()
        ranked = scores if forced is None else scores.masked_fill(to_device(forced, scores.device) & real, torch.inf)
        order = ranked.argsort(dim=-1, descending=True, stable=True)
        total = real.sum(-1, keepdim=True)
        if self.rule == "count":
            last = (ends * total + 1e-6).floor().long()
            last[..., 0] = last[..., 0].clamp(min=1)
        else:
            reached = widened(shares_of(scores).gather(-1, order)).cumsum(-1)
            last = (reached.unsqueeze(-2) <= ends.unsqueeze(-1) + 1e-6).sum(-1) + 1
            last[..., 0] = last[..., 0].maximum((_LEAST_EXACT * total[..., 0]).long() + 1)
        last = last.minimum(total)
        number = torch.arange(order.shape[-1], device=order.device).expand_as(order)
        rank = torch.empty_like(order).scatter_(-1, order, number)
        place = (rank.unsqueeze(-1) >= last.unsqueeze(-2)).sum(-1)
        table = to_device(torch.tensor([*LEVELS, 0], dtype=torch.uint8), order.device)
        return table[place].masked_fill(~real, 0)

    @property
    def completes(self) -> bool:
        """The pooled levels are added after the exact one."""
        return True

    def complete(self, part: PartialAttention) -> Tensor:
        """One softmax over all levels."""
        return add_pooled_levels(part)


def _density_of(ends: Tensor) -> Tensor:
    """Products per pair of tokens for ends of the levels `[..., 4]`."""
    widths = torch.diff(ends, prepend=torch.zeros_like(ends[..., :1]))
    return (widths / to_device(torch.tensor(LEVELS, dtype=ends.dtype), ends.device)).sum(-1)


def _scaled(ends: Tensor, density: Tensor) -> Tensor:
    """`ends` `[4]` times the factor that gives `density` (0-d or `[B, H, 1, 1]`), none above 1; `[B', H', 1, 4]`.

    As level 1 grows it takes over the others, so every density up to 1 has a factor.
    """
    density = density.reshape(1, 1, 1, 1) if density.ndim == 0 else density
    low, high = torch.zeros_like(density), torch.full_like(density, 1 / float(ends[0]))
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2
        over = _density_of((middle * ends).clamp(max=1)).unsqueeze(-1) > density
        low, high = torch.where(over, low, middle), torch.where(over, middle, high)
    return (high * ends).clamp(max=1)

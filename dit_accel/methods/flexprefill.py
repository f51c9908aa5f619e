"""FlexPrefill: each head by its pooled map where a probe confirms it, else by vertical and slash profiles."""

from __future__ import annotations

from typing import Annotated, ClassVar

import torch
from pydantic import Field, model_validator
from torch import Tensor

from dit_accel.methods.base import BlockSize, Size
from dit_accel.methods.dynamic import DynamicMethod, Share
from dit_accel.methods.registry import register
from dit_accel.plan import Blocking, BlockPlan
from dit_accel.selection import TopK, TopP, block_means, plan_of_mask, pooled_scores, select_blocks
from dit_accel.selection.budgets import Budget
from dit_accel.selection.samples import probe_blocks, probe_profiles
from dit_accel.selection.scores import log_mass
from dit_accel.state import CallContext
from dit_accel.transfer import to_device
from dit_accel.widest import widened


def jensen_shannon_distance(p: Tensor, r: Tensor) -> Tensor:
    """Square root of the Jensen-Shannon divergence (natural log) of distributions `[..., L]`, in [0, sqrt(ln 2)].

    Terms with weight 0 count 0, so that one-hot distributions give no NaN.
    """
    middle = (p + r) / 2
    terms = torch.xlogy(p, p) + torch.xlogy(r, r) - torch.xlogy(p, middle) - torch.xlogy(r, middle)
    return (terms.sum(-1) / 2).clamp(min=0).sqrt()


@register("flexprefill")
class FlexPrefill(DynamicMethod):
    """A baseline from language models, adapted to attention without a causal mask.

    Probed queries say which keys a head attends. Where the pooled estimate for the same queries agrees (distance below
    `tau`), the head keeps the pairs of blocks of largest pooled mass, over all its rows together. Elsewhere it keeps
    the key blocks and the distances between blocks that hold most of the probed mass. Published for prefill; on video
    models it does poorly (arXiv 2502.18137, table 1).

    Args:
        mass: share of the mass to keep: by profile the crossing entry is kept, in the pooled map it is left out.
        least, most: limits on the share of key blocks, and of distances, that a profile keeps, rounded down; published
            are 512 or 1024 tokens at least. A trusted head keeps the least of both profiles beside its pooled map.
        tau: Jensen-Shannon distance up to which the pooled map is trusted.
        probes: query blocks that are probed, spread over the video; published is the last one alone.
        probe_rows: queries of each that are looked at, spread over it; by default as many in all as published.
        block: query and key block in tokens.
    """

    source: ClassVar[str] = "arXiv 2502.20766"

    mass: Share = 0.95
    least: Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)] = 0.0
    most: Share = 1.0
    tau: Annotated[float, Field(ge=0, le=1)] = 0.1
    probes: Size = 4
    probe_rows: Size = 32
    block: BlockSize = 128

    @model_validator(mode="after")
    def _limits_are_ordered(self) -> FlexPrefill:
        if self.least > self.most:
            raise ValueError(f"least must not exceed most, got {self.least} and {self.most}")
        return self

    def scores(self, q: Tensor, k: Tensor, call: CallContext, q_blocks: Blocking, k_blocks: Blocking) -> Tensor:
        """Pooled log-mass where it is trusted, else the mean of both profiles, for ranking at a density."""
        pooled = pooled_scores(q, k, q_blocks, call.layout, k_blocks).log_softmax(-1)
        vertical, slash, trusted = self._profiles(q, k, call, q_blocks, k_blocks)
        both = log_mass((vertical.unsqueeze(-2) + _by_distance(slash, k_blocks.count)) / 2, ~pooled.isneginf())
        return torch.where(trusted[..., None, None], pooled, both)

    def budget(self, q: Tensor, k: Tensor, call: CallContext) -> Budget:
        """Of the pooled map: one budget for all rows of a head."""
        return TopP(mass=self.mass, crossing="drop", scope="head")

    def select(self, q: Tensor, k: Tensor, call: CallContext) -> BlockPlan:
        """By density, or by the rule of each head. q, k `[B, H, N, D]`."""
        if self.density is not None:
            return super().select(q, k, call)
        q_blocks, k_blocks = self.blocks(call.layout)
        pooled = self.perturbed(pooled_scores(q, k, q_blocks, call.layout, k_blocks), call)
        always = to_device(call.layout.text_blocks(k_blocks), q.device)
        forced = self.forced(q, k, call, q_blocks, k_blocks)
        always = always if forced is None else always | to_device(forced, q.device)
        vertical, slash, trusted = self._profiles(q, k, call, q_blocks, k_blocks)
        by_profile = _by_profiles(vertical, slash, TopP(mass=self.mass, least=self.least, most=self.most))
        by_map = select_blocks(pooled, self.budget(q, k, call), always)
        if self.least:
            by_map = by_map | _by_profiles(vertical, slash, TopK(share=self.least, rounding="floor"))
        mask = torch.where(trusted[..., None, None], by_map, by_profile)
        call.measures["trusted_heads"] = widened(trusted).mean()
        return plan_of_mask(mask | always, q_blocks, k_blocks, call.layout, ~pooled.isneginf())

    def _profiles(
        self, q: Tensor, k: Tensor, call: CallContext, q_blocks: Blocking, k_blocks: Blocking
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Mass by key block `[B, H, nk]`, by distance `[B, H, nq + nk - 1]`, and which heads are trusted `[B, H]`."""
        layout = call.layout
        probed = probe_blocks(layout, q_blocks, self.probes)
        profile = probe_profiles(q, k, q_blocks, k_blocks, layout, self.probes, self.probe_rows)
        mean_q, _ = block_means(q, q_blocks, layout.valid)
        mean_k, counts = block_means(k, k_blocks, layout.valid)
        seen = mean_q[:, :, to_device(probed, q.device)] * q.shape[-1] ** -0.5
        estimate = seen @ mean_k.transpose(-1, -2) + counts.log().unsqueeze(-2)
        vertical = profile.mean(2)
        distance = jensen_shannon_distance(estimate.softmax(-1).mean(2), vertical)
        slash = vertical.new_zeros(*vertical.shape[:2], q_blocks.count + k_blocks.count - 1)
        column = torch.arange(k_blocks.count, device=q.device)
        for place, row in enumerate(probed.tolist()):
            slash[..., column - row + q_blocks.count - 1] += profile[:, :, place] / len(probed)
        return vertical, slash, distance < self.tau


def _by_profiles(vertical: Tensor, slash: Tensor, budget: Budget) -> Tensor:
    """The columns and distances that a budget takes from the profiles, as one mask `[B, H, nq, nk]`."""
    columns, distances = (select_blocks(x.clamp(min=1e-30).log().unsqueeze(-2), budget) for x in (vertical, slash))
    return columns | _by_distance(distances.squeeze(-2), vertical.shape[-1])


def _by_distance(slash: Tensor, columns: int) -> Tensor:
    """A profile by distance `[B, H, nq + nk - 1]` as a map `[B, H, nq, nk]`, the same along every diagonal."""
    rows = slash.shape[-1] - columns + 1
    place = torch.arange(columns, device=slash.device) - torch.arange(rows, device=slash.device)[:, None] + rows - 1
    return slash[..., place]

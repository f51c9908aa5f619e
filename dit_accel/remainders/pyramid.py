"""Attention to key blocks at several resolutions: some exact, others as means of 2, 4 or 8 neighbouring keys.

Axis legend: B batch, H heads, N tokens, D head size, nq / nk query / key blocks, S slots of a block.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional as F

from dit_accel.errors import UnsupportedError
from dit_accel.kernels import block_attention
from dit_accel.kernels.merge import merge
from dit_accel.layout import TokenLayout
from dit_accel.plan import Blocking, BlockPlan
from dit_accel.remainders.partial import PartialAttention
from dit_accel.reuse import union_of_heads
from dit_accel.selection import gather_blocks
from dit_accel.transfer import to_device
from dit_accel.widest import widened

LEVELS = (1, 2, 4, 8)


@dataclass(frozen=True, eq=False)
class PyramidPlan(BlockPlan):
    """A plan of the blocks that are read exactly, and the level at which the others are read.

    Args:
        levels: uint8 `[B, H, nq, nk]`: 1 exact, 2, 4 or 8 tokens pooled into one key, 0 skipped.
    """

    levels: Tensor | None = None

    def to(self, device: torch.device | str) -> PyramidPlan:
        """The same plan with its tensors on `device`."""
        if self.indices.device == torch.device(device):
            return self
        levels = None if self.levels is None else to_device(self.levels, device)
        return replace(
            self, indices=to_device(self.indices, device), counts=to_device(self.counts, device), levels=levels
        )

    def each_tensor(self, change: Callable[[Tensor], Tensor]) -> PyramidPlan:
        """The same plan after `change` of all that has axes of batch and heads, `[B', H', ...]`."""
        levels = None if self.levels is None else change(self.levels)
        return replace(self, indices=change(self.indices), counts=change(self.counts), levels=levels)


@union_of_heads.register
def finest_of_heads(plan: PyramidPlan) -> PyramidPlan:
    """The plan, shared by all heads, that reads every block at the finest level at which any head reads it."""
    if plan.levels is None:
        raise UnsupportedError("psa: the plan has no levels")
    skipped = max(LEVELS) + 1
    levels = plan.levels.masked_fill(plan.levels == 0, skipped).amin(1, keepdim=True)
    return pyramid_plan(levels.masked_fill(levels == skipped, 0), plan.q_blocks, plan.k_blocks)


def pyramid_plan(levels: Tensor, q_blocks: Blocking, k_blocks: Blocking) -> PyramidPlan:
    """The plan for a level map uint8 `[B, H, nq, nk]`; each row needs a block at level 1."""
    plan = BlockPlan.from_mask(levels == 1, q_blocks, k_blocks, longest=k_blocks.count)
    return PyramidPlan(q_blocks, k_blocks, plan.indices, plan.counts, levels=levels)


def coarsest_levels(k: Tensor, blocks: Blocking, layout: TokenLayout, limits: tuple[float, ...] | None) -> Tensor:
    """The coarsest level at which each key block may be read, uint8 `[B or 1, H, nk]`.

    A block whose real tokens do not divide into groups of a level is not read at that level. With `limits` the tokens
    at the two ends of the groups must be alike as well: their mean cosine must exceed the level's limit; the coarsest
    level that passes is taken, as published, whether or not finer ones do.

    Args:
        k: `[B, H, N, D]`.
        blocks: partition of the keys.
        layout: token geometry.
        limits: least mean cosine for levels 2, 4 and 8. None: no such test.
    """
    rows, real = gather_blocks(k, blocks, layout.valid)
    lengths = real.sum(-1).unsqueeze(1)
    unit = F.normalize(rows, dim=-1)
    coarsest = torch.ones(len(k), k.shape[1], blocks.count, dtype=torch.uint8, device=k.device)
    for place, level in enumerate(LEVELS[1:]):
        allowed = (lengths % level == 0) & (lengths > 0)
        if limits is not None:
            ends = (unit[:, :, :, level - 1 :: level] * unit[:, :, :, : blocks.size - level + 1 : level]).sum(-1)
            alike = ends.sum(-1) / (lengths // level).clamp(min=1)
            allowed = allowed & (alike > limits[place])
        coarsest = torch.where(allowed, level, coarsest.long()).to(torch.uint8)
    return coarsest


def level_density(levels: Tensor, q_blocks: Blocking, k_blocks: Blocking) -> Tensor:
    """Products per pair of tokens that the pooled levels cost, fp64 `[B, H]`: a pooled block counts by 1 / level."""
    weight = torch.where(levels > 1, 1.0 / widened(levels.clamp(min=1)), 0.0)
    queries, keys = (widened(x.on(levels.device)[1]) for x in (q_blocks, k_blocks))
    return (weight @ keys @ queries.unsqueeze(-1)).squeeze(-1) / (q_blocks.tokens * k_blocks.tokens)


def add_pooled_levels(part: PartialAttention) -> Tensor:
    """Exact attention joined in one softmax with the blocks that are read at pooled levels, which add to the density.

    A mean of L keys counts as L equal keys: its logit gets ln L (arXiv 2512.04025).

    Args:
        part: the exact blocks, of a `PyramidPlan`.

    Raises:
        UnsupportedError: the plan has no levels.
    """
    plan, lse = part.plan, part.lse
    if not isinstance(plan, PyramidPlan) or plan.levels is None:
        raise UnsupportedError(f"psa: expected a plan with levels, got a {type(plan).__name__}")
    outs, masses = [part.out], [lse.to(torch.float32 if part.out.dtype != torch.float64 else lse.dtype)]
    for level in LEVELS[1:]:
        out, mass = _at_level(part, plan.levels == level, level)
        outs.append(out)
        masses.append(mass.to(masses[0].dtype) + math.log(level))
    part.call.extra_density += float(level_density(plan.levels, plan.q_blocks, plan.k_blocks).mean())
    return merge(outs, masses)[0]


def _at_level(part: PartialAttention, mask: Tensor, level: int) -> tuple[Tensor, Tensor]:
    """Attention to the pooled keys of the blocks of `mask`; 0 and -inf for rows without any."""
    q, plan, layout = part.q, part.plan, part.layout
    lengths = -(-plan.k_blocks.lengths // level)
    group = torch.arange(int(lengths.max()))
    kept = (group < lengths.unsqueeze(-1)).flatten().nonzero().squeeze(-1)
    kept = to_device(kept, q.device)
    # A row without blocks at this level gets a key that does not count.
    keys, values = (F.pad(_pooled(x, plan.k_blocks, level, layout)[:, :, kept], (0, 0, 0, 1)) for x in (part.k, part.v))
    columns = Blocking.from_lengths(torch.cat([lengths, torch.ones(1, dtype=torch.int64)]))
    mask = torch.cat([mask, ~mask.any(-1, keepdim=True)], -1)
    coarse = BlockPlan.from_mask(mask, plan.q_blocks, columns, longest=columns.count)
    real = torch.full((len(q),), len(kept), device=q.device)
    return block_attention(q, keys, values, coarse, scale=part.scale, kv_len=real, return_lse=True)


def _pooled(x: Tensor, blocks: Blocking, level: int, layout: TokenLayout) -> Tensor:
    """Means of `level` neighbouring tokens of every block, `[B, H, n * ceil(S / level), D]` in the dtype of x."""
    rows, _ = gather_blocks(x, blocks, layout.valid)
    rows = F.pad(rows, (0, 0, 0, -blocks.size % level)).unflatten(3, (-1, level)).mean(4)
    return rows.flatten(2, 3).to(x.dtype)

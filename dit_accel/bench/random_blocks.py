"""Blocks chosen at random: no method for use, but what shows the speed of the kernel alone at a density."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from dit_accel.methods.base import BlockSize, Density, Method
from dit_accel.plan import BlockPlan
from dit_accel.state import CallContext


class RandomBlocks(Method):
    """Each row of each head selects the same number of key blocks, at random. Not registered.

    Args:
        density: share of key blocks.
        block: block size in tokens.
    """

    name: ClassVar[str] = "random_blocks"
    source: ClassVar[str] = "this project"
    is_static: ClassVar[bool] = True

    density: Density = 0.25
    block: BlockSize = 64

    def select(self, q: Tensor, k: Tensor, call: CallContext) -> BlockPlan:
        """Draw from the seed of the call. q `[B, H, N, D]` says how many heads."""
        blocks = call.layout.blocks(self.block)
        generator = torch.Generator().manual_seed(call.seed)
        scores = torch.rand(1, q.shape[1], blocks.count, blocks.count, generator=generator)
        chosen = scores.topk(max(1, round(self.density * blocks.count)), dim=-1).indices
        mask = torch.zeros_like(scores, dtype=torch.bool).scatter_(-1, chosen, True)
        return BlockPlan.from_mask(mask, blocks, blocks)

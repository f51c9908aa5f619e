"""SubBlock: blocks scored by the log-sum-exp over pairs of sub-block means."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from dit_accel.methods.base import Density, Size
from dit_accel.methods.dynamic import PoolingMethod
from dit_accel.methods.registry import register
from dit_accel.plan import Blocking
from dit_accel.selection import Budget, TopK
from dit_accel.selection.scores import subblock_scores
from dit_accel.state import CallContext


@register("subblock")
class SubBlock(PoolingMethod):
    """A fixed number of key blocks, by a mean pool finer than the block: ln Σ exp of all pairs of sub-block means.

    Args:
        query_parts, key_parts: into how many runs query and key blocks are cut; 1 and 1 is the plain mean pool.
        density: share of key blocks that each query block attends.
    """

    source: ClassVar[str] = "SGLang, subblock_sparse attention backend (pull request 34148)"

    density: Density | None = 0.25
    query_parts: Size = 4
    key_parts: Size = 4

    def scores(self, q: Tensor, k: Tensor, call: CallContext, q_blocks: Blocking, k_blocks: Blocking) -> Tensor:
        """Log-sum-exp over sub-blocks. q, k `[B, H, N, D]`."""
        return subblock_scores(q, k, q_blocks, k_blocks, call.layout, self.query_parts, self.key_parts, self.padding)

    def budget(self, q: Tensor, k: Tensor, call: CallContext) -> Budget:
        """Without a density: a quarter of the blocks, as published."""
        return TopK(share=0.25)

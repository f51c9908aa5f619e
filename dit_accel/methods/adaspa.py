"""AdaSpa: the exact mass of every pair of blocks, searched rarely, with more blocks for the heads that need them."""

from __future__ import annotations

from typing import ClassVar, Literal

from torch import Tensor

from dit_accel.methods.base import Density
from dit_accel.methods.dynamic import DynamicMethod
from dit_accel.methods.registry import register
from dit_accel.plan import Blocking
from dit_accel.selection import Budget, Rounding, TopK, real_blocks
from dit_accel.selection.scores import block_mass, log_mass
from dit_accel.state import CallContext


@register("adaspa")
class AdaSpa(DynamicMethod):
    """Top-k by the exact attention mass of the blocks, in three classes of heads.

    A search costs about as much as dense attention, so it is made for a schedule with `search_steps`: published are
    steps 10 and 30 of 50 with the steps up to 10 dense (`dense_steps=11, search_steps=[10, 30]`: the first search runs
    beside a dense step). Text blocks are kept on top of the budget, as published.

    Args:
        density: mean share of key blocks over the heads, rounded up.
        heads: "adaptive": heads that reach a recall of 0.8 give half their blocks to those with the least; "uniform".
        cache_lse: later searches of a generation weigh rows by the log-sum-exp of the first one, which saves a pass.
            Rows of one block are then weighted unequally by what changed in between; published as harmless.
    """

    source: ClassVar[str] = "arXiv 2502.21079"

    density: Density | None = 0.2
    heads: Literal["uniform", "adaptive"] = "adaptive"
    cache_lse: bool = True

    def scores(self, q: Tensor, k: Tensor, call: CallContext, q_blocks: Blocking, k_blocks: Blocking) -> Tensor:
        """Log of the exact mass. q, k `[B, H, N, D]`."""
        kept = call.memory.get("lse") if self.cache_lse else None
        kept = kept if kept is not None and kept.shape == q.shape[:3] else None
        mass, lse = block_mass(q, k, q_blocks, k_blocks, call.layout, kept)
        if self.cache_lse:
            call.memory["lse"] = lse
        return log_mass(mass, real_blocks(k_blocks, call.layout, q.device))

    def budget(self, q: Tensor, k: Tensor, call: CallContext) -> Budget:
        """Without a density: a fifth of the blocks, as published."""
        return TopK(share=0.2, rounding="ceil")

    @property
    def rounding(self) -> Rounding:
        """Up; the paper leaves it open."""
        return "ceil"

    def beside(self, q: Tensor, k: Tensor, call: CallContext, q_blocks: Blocking, k_blocks: Blocking) -> Tensor | None:
        """Text."""
        return call.layout.text_blocks(k_blocks)

"""Dense attention: the baseline, computed by the stock path of each family."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from dit_accel.methods.base import Method
from dit_accel.methods.registry import register
from dit_accel.plan import BlockPlan
from dit_accel.state import CallContext


@register("dense")
class Dense(Method):
    """Every query attends every key. In a pipeline this is Diffusers' own attention, call for call."""

    source: ClassVar[str] = "arXiv 1706.03762"
    is_static: ClassVar[bool] = True

    def select(self, q: Tensor, k: Tensor, call: CallContext) -> BlockPlan:
        """The plan that selects all blocks of 64 tokens. q, k `[B, H, N, D]`."""
        blocks = call.layout.blocks(64)
        return BlockPlan.full(blocks, blocks)

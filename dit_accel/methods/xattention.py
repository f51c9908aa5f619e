"""XAttention: blocks ranked by antidiagonals of QKᵀ, kept until their mass reaches a threshold."""

from __future__ import annotations

from typing import Annotated, ClassVar, Self

import torch
from pydantic import BeforeValidator
from torch import Tensor

from dit_accel.errors import ConfigError
from dit_accel.methods.base import BlockSize, Size
from dit_accel.methods.dynamic import PoolingMethod, Share
from dit_accel.methods.registry import register
from dit_accel.plan import Blocking
from dit_accel.selection import Budget, TopP
from dit_accel.selection.scores import antidiagonal_scores
from dit_accel.shard import HeadShard
from dit_accel.state import CallContext

Thresholds = Annotated[
    Share | tuple[Share, ...], BeforeValidator(lambda value: tuple(value) if isinstance(value, list) else value)
]


@register("xattention")
class XAttention(PoolingMethod):
    """The fewest key blocks whose antidiagonal mass reaches a share of the row's.

    Where the released code differs by accident it is not followed: padded keys get no mass, key block 0 is kept only
    when it is chosen, and text rows and columns are always whole.

    Args:
        threshold: share of the mass to keep, the crossing block included; a list gives one value per head.
        stride: tokens per group of the antidiagonal; scoring costs 1 / (2 stride) of dense attention, which at 8, as
            published for HunyuanVideo, is near a tenth of what 25 % density saves. Default 16, published for Qwen2-VL.
        block: query and key block in tokens.
    """

    source: ClassVar[str] = "arXiv 2503.16428"

    threshold: Thresholds = 0.9
    stride: Size = 16
    block: BlockSize = 128

    def check_model(self, heads: int) -> None:
        """Refuse thresholds that are for another number of heads."""
        if isinstance(self.threshold, tuple) and len(self.threshold) != heads:
            raise ConfigError(
                "method.xattention.threshold", f"expected {heads} values, one per head, got {len(self.threshold)}"
            )

    def of_heads(self, shard: HeadShard) -> Self:
        """With the thresholds of these heads."""
        if not isinstance(self.threshold, tuple):
            return self
        return self.model_copy(update={"threshold": shard.cut(self.threshold)})

    def scores(self, q: Tensor, k: Tensor, call: CallContext, q_blocks: Blocking, k_blocks: Blocking) -> Tensor:
        """Log-mass by antidiagonals. q, k `[B, H, N, D]`."""
        self.check_model(q.shape[1])
        return antidiagonal_scores(q, k, q_blocks, k_blocks, call.layout, self.stride, self.padding)

    def budget(self, q: Tensor, k: Tensor, call: CallContext) -> Budget:
        """Top-p with the crossing block kept."""
        if isinstance(self.threshold, tuple):
            return TopP(mass=torch.tensor(self.threshold, dtype=torch.float64))
        return TopP(mass=self.threshold)

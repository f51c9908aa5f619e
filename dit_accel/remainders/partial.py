"""Attention over some of the keys, which `Method.complete` turns into the output of a method."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from dit_accel.layout import TokenLayout
from dit_accel.plan import BlockPlan
from dit_accel.state import CallContext


@dataclass(frozen=True, eq=False)
class PartialAttention:
    """What the kernel computed of a plan, and from what. Tensors stand in the order that the method chose.

    Args:
        out, lse: output `[B, H, N, D]` and log-sum-exp `[B, H, N]` of the plan.
        q, k, v: `[B, H, N, D]`.
        plan: the blocks that were computed.
        call: layer, step and memory. Who computes more than the plan says adds the share of token pairs to
            `call.extra_density`.
        scale: factor on the logits, with which `out` and `lse` were made. None: 1 / sqrt(D).
    """

    out: Tensor
    lse: Tensor
    q: Tensor
    k: Tensor
    v: Tensor
    plan: BlockPlan
    call: CallContext
    scale: float | None = None

    @property
    def layout(self) -> TokenLayout:
        """Token geometry of the sequence."""
        return self.call.layout

"""PAROAttention: an order of the axes per head, and a static plan, both chosen offline."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import ClassVar, Self

from pydantic import Field
from torch import Tensor

from dit_accel.errors import ConfigError
from dit_accel.methods.base import Density
from dit_accel.methods.composed import Composed, RemainderName
from dit_accel.methods.registry import register
from dit_accel.orders.ordering import OrderName
from dit_accel.plan import BlockPlan
from dit_accel.shard import HeadShard
from dit_accel.state import CallContext


@register("paro")
class PARO(Composed):
    """PAROAttention (arXiv 2506.16054): axes reordered per head until attention fills few blocks.

    A composition. `axes` names one order per head (`axis_costs` in `orders/` rates them on a recorded call), and
    layers differ through the schedule's overrides. The published masks are static too: `plan_file` names one made by
    `recall_plan`. Without it, blocks are chosen at every call by the pooled score. Text stays in place and whole.

    Args:
        axes: one order for all heads, or one per head.
        density: share of key blocks, where no plan is given. Default 0.3; published: 0.2 to 0.5.
        plan_file: a saved plan for the heads of a layer (safetensors). Default None: chosen at every call.
        precision: "int8" is the published block-wise quantisation of queries and keys.
    """

    source: ClassVar[str] = "arXiv 2506.16054"

    order_: OrderName = Field(default="axes", alias="order")
    density: Density | None = 0.3
    plan_file: str | None = None
    remainder_: RemainderName = Field(default="drop", alias="remainder")

    def check_model(self, heads: int) -> None:
        """Refuse axes, densities and a plan that are for another number of heads."""
        super().check_model(heads)
        if self.plan_file is not None and (made := _load(self.plan_file).indices.shape[1]) not in (1, heads):
            raise ConfigError("method.paro.plan_file", f"expected a plan for {heads} heads, got one for {made}")

    def of_heads(self, shard: HeadShard) -> Self:
        """With the orders of these heads.

        Raises:
            ConfigError: a plan file, which holds the plans of all heads.
        """
        if self.plan_file is not None and _load(self.plan_file).indices.shape[1] > 1 and shard.count < shard.total:
            raise ConfigError(
                "method.paro.plan_file", "expected all heads in one process, its plans are for all: leave it out"
            )
        return super().of_heads(shard)

    def select(self, q: Tensor, k: Tensor, call: CallContext) -> BlockPlan:
        """The plan of the file, or the choice of this call. q, k `[B, H, N, D]`."""
        if self.plan_file is None:
            return super().select(q, k, call)
        plan, blocks = _load(self.plan_file), self.query_blocks(call.layout)
        if not plan.q_blocks.same_as(blocks) or plan.indices.shape[1] not in (1, q.shape[1]):
            raise ConfigError(
                "method.paro.plan_file",
                f"expected {blocks.count} blocks of {self.block} for {q.shape[1]} heads, got {plan.q_blocks.count} of "
                f"{plan.q_blocks.size} for {plan.indices.shape[1]}; a plan is for one geometry",
            )
        return plan.to(q.device)


@lru_cache(maxsize=64)
def _load(path: str) -> BlockPlan:
    if not Path(path).is_file():
        raise ConfigError("method.paro.plan_file", f"{path}: there is no such file")
    return BlockPlan.load(Path(path))

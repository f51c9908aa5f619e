"""Sparse-linear attention: top-k blocks, and a linear branch for those who have its trained projections."""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field
from torch import Tensor

from dit_accel.errors import ConfigError
from dit_accel.methods.base import Density
from dit_accel.methods.composed import Composed, RemainderName
from dit_accel.methods.registry import register
from dit_accel.orders.ordering import OrderName
from dit_accel.remainders.linear_branch import Over, linear_attention, load_projections
from dit_accel.remainders.partial import PartialAttention
from dit_accel.selection import Rounding


@register("sla")
class SLA(Composed):
    """SLA (arXiv 2509.24006): sparse attention plus a projected linear branch, made for fine-tuned models.

    The linear branch stands beside a complete softmax, so it is a learned compensation, not an approximation: without
    trained projections, which begin at zero, the method is its sparse part. Choose another remainder then.

    The paper skips the least important blocks; no released code does, and neither does this.

    Args:
        density: share of key blocks of the sparse part, rounded down, at least one block. Default 0.1.
        projections: safetensors file with the projection of every layer (a whole fine-tuned checkpoint will do).
            Default None: no linear branch.
        over: what the linear branch sees, by release: "all" keys, or the blocks "unselected".
    """

    source: ClassVar[str] = "arXiv 2509.24006"

    order_: OrderName = Field(default="raster", alias="order")
    density: Density | None = 0.1
    rounding: Rounding = "floor"
    keep_self: bool = False
    remainder_: RemainderName = Field(default="drop", alias="remainder")
    projections: str | None = None
    over: Over = "all"

    def check_model(self, heads: int) -> None:
        """Refuse projections that cannot be read."""
        super().check_model(heads)
        if self.projections is not None:
            load_projections(self.projections)

    @property
    def completes(self) -> bool:
        """With projections, the linear branch is added after the kernel."""
        return self.projections is not None or super().completes

    def complete(self, part: PartialAttention) -> Tensor:
        """The sparse part plus the projected linear branch."""
        out, q, call = super().complete(part), part.q, part.call
        if self.projections is None:
            return out
        layers = load_projections(self.projections)
        if call.layer not in layers or layers[call.layer][0].shape != (q.shape[-1], q.shape[-1]):
            raise ConfigError(
                "method.sla.projections",
                f"expected a [{q.shape[-1]}, {q.shape[-1]}] projection for layer {call.layer}, got "
                f"{ {layer: tuple(pair[0].shape) for layer, pair in layers.items()} }",
            )
        weight, bias = (x.to(q.device) for x in layers[call.layer])
        linear = linear_attention(q, part.k, part.v, part.plan, part.layout, self.over).to(weight.dtype)
        return (out + linear @ weight.T + bias).to(out.dtype)

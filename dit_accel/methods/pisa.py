"""Piecewise sparse attention and its successors, as compositions with a name."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from dit_accel.methods.base import Density
from dit_accel.methods.composed import Composed, RemainderName
from dit_accel.methods.registry import register
from dit_accel.orders.ordering import OrderName
from dit_accel.selection import Rounding


@register("pisa")
class Pisa(Composed):
    """Piecewise sparse attention (arXiv 2602.01077): exact blocks and a Taylor expansion of the rest in one softmax.

    A composition: pooled top-k in the raster with a first-order term summed over all blocks of a head. The paper's
    other variants are `remainder="pooled"` (order 0), `first_order="block"`, and for images `score="covariance"`.
    Its successors: PASA (arXiv 2604.12219) is `first_order="grouped"` with `noise`; Sol-Attn (arXiv 2607.24027) is
    `remainder="pooled"`, `order="morton"`, `density=None`, `tau=1.28`, `keep_self=True`, `reach=1`.

    The published kernels do not rescale the mass of the rest when a later group of centroids raises the maximum; here
    all accumulators follow one maximum.

    Args:
        density: share of key blocks that are exact. Default 0.125, the published setting for video.
        rounding: number of blocks, "floor" as published.
        keep_self: default False, as published.
    """

    source: ClassVar[str] = "arXiv 2602.01077"

    order_: OrderName = Field(default="raster", alias="order")
    density: Density | None = 0.125
    rounding: Rounding = "floor"
    keep_self: bool = False
    remainder_: RemainderName = Field(default="taylor", alias="remainder")
    first_order: Literal["block", "mixed", "grouped", "global"] = "global"

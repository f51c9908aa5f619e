"""Rectified sparse attention, a composition with a name."""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field

from dit_accel.methods.base import BlockSize, Density, SizeTriple
from dit_accel.methods.composed import Composed, RemainderName, Score, Share
from dit_accel.methods.registry import register
from dit_accel.orders.ordering import OrderName
from dit_accel.selection import Rounding


@register("rectified")
class Rectified(Composed):
    """Rectified SpaAttn (arXiv 2511.19835): the selected part is scaled to the mass that a pooled map gives it.

    A composition: boxes of 128 tokens, the fewest blocks that hold 30 % of the pooled mass but at least `density`, with
    the blocks that touch; the rest through pooled values where the gate trusts them. The published order is a Hilbert
    curve; boxes are as local and let blocks touch the same way.

    The published code divides the last, padded block by its full length; here all means are over real tokens.

    Args:
        density: least share of blocks. Default 0.25; published: 0.2 for HunyuanVideo, 0.15 to 0.25 for Wan.
        mass: share of the pooled mass. Default 0.3, as published.
        block: default 128, as published.
    """

    source: ClassVar[str] = "arXiv 2511.19835"

    order_: OrderName = Field(default="bisect", alias="order")
    tile: SizeTriple = (2, 8, 8)
    block: BlockSize = 128
    score: Score = "isolated"
    density: Density | None = 0.25
    rounding: Rounding = "floor"
    mass: Share | None = 0.3
    touching: bool = True
    remainder_: RemainderName = Field(default="rectified", alias="remainder")

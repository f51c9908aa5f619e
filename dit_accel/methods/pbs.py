"""Permuted block-sparse attention, a composition with a name."""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field

from dit_accel.methods.base import BlockSize, Density, Size
from dit_accel.methods.composed import Composed, RemainderName, Share
from dit_accel.methods.registry import register
from dit_accel.orders.ordering import OrderName


@register("pbs")
class PBS(Composed):
    """PBS-Attn (arXiv 2510.21270) for video: hot keys share blocks, so that fewer blocks hold the same mass.

    A composition: within segments keys are sorted by the attention they get, and each query block keeps the fewest
    blocks that hold 90 % of the pooled mass. The method is published for causal text: there the last query block says
    which keys are hot, and a segment is never mixed with later ones. A video has neither, so the mean queries of all
    blocks vote, and `segment=None` sorts the whole video. `order="lsh"` is the alternative without queries
    (arXiv 2310.05869).

    Sorting by heat puts unlike keys into a block, so a pooled remainder gains little; `hot_share` below 1 moves only
    the hottest keys to the front, for all to attend, and leaves the rest local.

    Args:
        density: share of key blocks, instead of `mass` or as its least. Default None.
        mass: share of the pooled mass. Default 0.9, as published.
        block: default 128, as published.
        segment: default 256, as published.
    """

    source: ClassVar[str] = "arXiv 2510.21270"

    order_: OrderName = Field(default="hot_keys", alias="order")
    block: BlockSize = 128
    segment: Size | None = 256
    density: Density | None = None
    mass: Share | None = 0.9
    remainder_: RemainderName = Field(default="drop", alias="remainder")

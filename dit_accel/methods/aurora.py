"""Aurora: this project's default, the composition that won the study in docs/study-remainder.md."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from dit_accel.methods.base import BlockSize, Density, Size
from dit_accel.methods.composed import Composed
from dit_accel.methods.registry import register
from dit_accel.orders.ordering import OrderName
from dit_accel.selection import Rounding


@register("aurora")
class Aurora(Composed):
    """Tokens sorted by content, top-k, and the rest expanded about the mean query in one softmax (this project).

    A composition of four parts, each of which the study in docs/study-remainder.md ablates:

    - queries and keys of every head, each sorted by cluster, so that blocks hold tokens that are alike; the order
      hardly changes from step to step and is therefore kept for some;
    - one order and one choice of blocks for all guidance branches, so that guidance does not multiply their errors;
    - the blocks with the largest pooled mass, as many for every query block of 128 tokens;
    - every other block enters the softmax with the exact mass and value that the mean query of the query block gets
      from it: it needs no cap against outlier channels, and no first-order term, which would overshoot where logits
      are large.

    What an order by content costs grows with the tokens, not with their square: one product with the centroids per
    sorting. It is kept in 17 bits per layer, head and token.

    Args:
        renew: steps for which an order is kept. Default 4; 1 sorts at every step.
        across_branches: default True.
        query_block: default 128, two blocks of keys.
        density: share of key blocks that are exact. Default 0.125.
        rounding: number of blocks, default "floor": never denser than asked.
    """

    source: ClassVar[str] = "this project; expansion after arXiv 2602.01077, clusters after arXiv 2505.18875"

    order_: OrderName = Field(default="kmeans", alias="order")
    renew: Size = 4
    across_branches: bool = True
    query_block: BlockSize | None = 128
    density: Density | None = 0.125
    rounding: Rounding = "floor"
    about: Literal["key", "query"] = "query"

"""Aurora: this project's default, the composition that won the study in docs/study-remainder.md."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from dit_accel.methods.base import Density, SizeTriple
from dit_accel.methods.composed import Composed, OrderName, RemainderName, Score
from dit_accel.methods.registry import register
from dit_accel.selection import Rounding


@register("aurora")
class Aurora(Composed):
    """Local boxes, error-aware top-k, and the rest expanded about the mean query in one softmax (this project).

    A composition of four parts, each of which the study in docs/study-remainder.md ablates:

    - boxes of the video of exactly `block` tokens, on any grid, long in the direction of a row;
    - blocks chosen by what their expansion would get wrong, with one budget for all rows and heads of a layer, so that
      exact work goes where the rest would err;
    - every other block enters the softmax with the exact mass and value that the mean query of the query block gets
      from it, so that outlier channels need no cap;
    - a first-order term in the distance from the mean query, mixed per query block; where logits spread by more than
      about 20 within a pair of blocks it overshoots, and `remainder="pooled"` is the safe choice.

    Args:
        density: share of key blocks that are exact, mean over the rows and heads of a layer. Default 0.125.
        rounding: number of blocks, default "floor": never denser than asked.
    """

    source: ClassVar[str] = "this project; expansion after arXiv 2602.01077"

    order_: OrderName = Field(default="bisect", alias="order")
    tile: SizeTriple = (2, 2, 16)
    score: Score = "error"
    scope: Literal["row", "head", "layer"] = "layer"
    density: Density | None = 0.125
    rounding: Rounding = "floor"
    remainder_: RemainderName = Field(default="taylor", alias="remainder")
    about: Literal["key", "query"] = "query"
    first_order: Literal["block", "mixed", "grouped", "global"] = "mixed"

"""DraftAttention, a composition with a name."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from dit_accel.methods.base import Density, SizeTriple
from dit_accel.methods.composed import Composed, RemainderName
from dit_accel.methods.registry import register


@register("draft")
class Draft(Composed):
    """DraftAttention (arXiv 2505.14708): patches of 8 x 16 tokens, kept by the largest entries of their pooled map.

    A composition: patches of one frame as tiles, and one budget per head for which all rows compete. Any grid works:
    patches at an edge are smaller and count by their size, where the published code takes exact multiples alone; each
    row keeps its best patch and its own, where the published rule may leave a row empty.

    Args:
        density: share of the entries of a head's map that are kept. Default 0.25; published: 0.1 for HunyuanVideo,
            0.25 for Wan.
        tile: the patch, default (1, 8, 16) as published.
    """

    source: ClassVar[str] = "arXiv 2505.14708"

    tile: SizeTriple = (1, 8, 16)
    density: Density | None = 0.25
    scope: Literal["row", "head"] = "head"
    remainder_: RemainderName = Field(default="drop", alias="remainder")

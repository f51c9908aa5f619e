"""SparseD: a plan from exact attention, made once and used for all later steps."""

from __future__ import annotations

from typing import ClassVar, Literal

from dit_accel.methods.adaspa import AdaSpa
from dit_accel.methods.base import BlockSize, Density
from dit_accel.methods.registry import register
from dit_accel.selection import Rounding


@register("sparsed")
class SparseD(AdaSpa):
    """Top-k by exact mass with the same width for all heads, for a schedule that searches once.

    Published: the first fifth of the steps dense and the search in the last of them, for 50 steps `dense_steps=12,
    search_steps=[11]`. Keys of the prompt and of what is generated have separate budgets there, because at early steps
    the prompt's win; here text is always attended whole, which is that rule's limit. The released code scales logits by
    the square root of the number of heads; this uses that of the head size.

    Args:
        density: share of key blocks, rounded down, plus one block.
    """

    source: ClassVar[str] = "arXiv 2509.24014"

    density: Density | None = 0.3
    block: BlockSize = 128
    heads: Literal["uniform", "adaptive"] = "uniform"

    @property
    def rounding(self) -> Rounding:
        """Down, plus one."""
        return "plus_one"

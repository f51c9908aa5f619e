"""Adaptive block-sparse attention (BLADE): blocks ranked by the largest logits of a few sampled tokens."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field, model_validator
from torch import Tensor

from dit_accel.kernels.spec import Remainder
from dit_accel.methods.base import BlockSize, SizeTriple
from dit_accel.methods.dynamic import DynamicMethod, Share
from dit_accel.methods.registry import register
from dit_accel.plan import Blocking
from dit_accel.selection import Budget, TopP, generator_for
from dit_accel.selection.samples import sampled_scores
from dit_accel.state import CallContext


@register("asa")
class ASA(DynamicMethod):
    """The best blocks below a share of the sampled score, never fewer or more than two limits.

    The score of a block is that of its best sampled pair, relative to the best key of each query: it says that some
    query wants the block, not how much mass the block has, so many blocks tie near the top. Published at the limits
    below with distilled weights and no dense steps; with stock weights use dense steps and a larger `most`.

    Args:
        mass: share of the summed scores that the kept blocks stay below (the crossing block is left out).
        least, most: limits on the share of blocks kept, rounded down.
        samples: tokens of each block that are looked at, at the same random places in all blocks of a head; published
            are 32, which cost four times as much as 16 and gain a fiftieth of the recall.
        remainder: "drop", or "mean": blocks that are not kept enter as one mean key and value each. The released
            variant pools the kept blocks too and so counts them twice; that is not offered.
        order, tile: samples at the same places need blocks that are not aligned with the grid, hence tiles.
        block: query and key block in tokens, for the raster order.
    """

    source: ClassVar[str] = "arXiv 2508.10774"

    mass: Share = 0.95
    least: Share = 0.05
    most: Share = 0.17
    samples: BlockSize = 16
    remainder_: Literal["drop", "mean"] = Field(default="drop", alias="remainder")
    block: BlockSize = 128
    order_: Literal["raster", "tile"] = Field(default="tile", alias="order")
    tile: SizeTriple = (4, 4, 8)

    @model_validator(mode="after")
    def _limits_are_ordered(self) -> ASA:
        if self.least > self.most:
            raise ValueError(f"least must not exceed most, got {self.least} and {self.most}")
        return self

    def scores(self, q: Tensor, k: Tensor, call: CallContext, q_blocks: Blocking, k_blocks: Blocking) -> Tensor:
        """Largest sampled logits. q, k `[B, H, N, D]`; other places at every layer, the same at every step."""
        generator = generator_for(q.device, call.seed, call.layer)
        return sampled_scores(q, k, q_blocks, k_blocks, call.layout, (self.samples, self.samples), generator)

    def budget(self, q: Tensor, k: Tensor, call: CallContext) -> Budget:
        """Top-p without the crossing block, between the limits."""
        return TopP(mass=self.mass, crossing="drop", least=self.least, most=self.most)

    @property
    def remainder(self) -> Remainder | None:
        """As chosen."""
        return None if self.remainder_ == "drop" else Remainder("mean")

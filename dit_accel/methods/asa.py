"""Adaptive block-sparse attention (BLADE): blocks ranked by the largest logits of a few sampled tokens."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field, model_validator
from torch import Tensor

from dit_accel.kernels.spec import Remainder
from dit_accel.layout import TokenLayout
from dit_accel.methods.base import BlockSize, Size, SizeTriple
from dit_accel.methods.dynamic import PoolingMethod, Share
from dit_accel.methods.registry import register
from dit_accel.plan import Blocking
from dit_accel.remainders.mean_keys import join_means
from dit_accel.remainders.partial import PartialAttention
from dit_accel.selection import Budget, TopP, block_means, generator_for
from dit_accel.selection.samples import sampled_scores
from dit_accel.state import CallContext


@register("asa")
class ASA(PoolingMethod):
    """The best blocks below a share of the sampled score, never fewer or more than two limits.

    The score of a block is that of its best sampled pair, relative to the best key of each query: it says that some
    query wants the block, not how much mass the block has, so many blocks tie near the top. Published at the limits
    below with distilled weights and no dense steps; with stock weights use dense steps and a larger `most`.

    Args:
        mass: share of the summed scores that the kept blocks stay below (the crossing block is left out).
        least, most: limits on the share of blocks kept, rounded down.
        samples: tokens of each block that are looked at, at the same random places in all blocks of a head; published
            are 32, which cost four times as much as 16 and gain a fiftieth of the recall.
        remainder: "drop"; "mean": blocks that are not kept enter as one mean key and value each; "overlap": all video
            tokens enter as means of `pool`, those of kept blocks too, which are so counted twice, as the released
            weights were trained with. With stock weights that pulls the output towards smooth averages.
        pool: neighbours in the order per mean of "overlap"; published are 30 for Wan and 15 for CogVideoX.
        order, tile: samples at the same places need blocks that are not aligned with the grid, hence tiles; published
            is "hilbert".
        block: query and key block in tokens, for all orders but "tile".
    """

    source: ClassVar[str] = "arXiv 2508.10774"

    mass: Share = 0.95
    least: Share = 0.05
    most: Share = 0.17
    samples: BlockSize = 16
    remainder_: Literal["drop", "mean", "overlap"] = Field(default="drop", alias="remainder")
    pool: Size = 30
    block: BlockSize = 128
    order_: Literal["raster", "hilbert", "tile"] = Field(default="tile", alias="order")
    tile: SizeTriple = (4, 4, 8)

    @model_validator(mode="after")
    def _limits_are_ordered(self) -> ASA:
        if self.least > self.most:
            raise ValueError(f"least must not exceed most, got {self.least} and {self.most}")
        return self

    def scores(self, q: Tensor, k: Tensor, call: CallContext, q_blocks: Blocking, k_blocks: Blocking) -> Tensor:
        """Largest sampled logits. q, k `[B, H, N, D]`; other places at every layer, the same at every step."""
        generator = generator_for(q.device, call.seed, call.layer)
        return sampled_scores(
            q, k, q_blocks, k_blocks, call.layout, (self.samples, self.samples), generator, self.padding
        )

    def budget(self, q: Tensor, k: Tensor, call: CallContext) -> Budget:
        """Top-p without the crossing block, between the limits."""
        return TopP(mass=self.mass, crossing="drop", least=self.least, most=self.most)

    @property
    def remainder(self) -> Remainder | None:
        """As chosen; None also where `complete` makes it."""
        return Remainder("mean") if self.remainder_ == "mean" else None

    @property
    def completes(self) -> bool:
        """Whether means of all tokens are to be added."""
        return self.remainder_ == "overlap"

    def extra_density(self, layout: TokenLayout) -> float:
        """With the remainder "overlap" the means of all video tokens, for every query."""
        return -(-layout.video // self.pool) / layout.tokens if self.completes else 0.0

    def complete(self, part: PartialAttention) -> Tensor:
        """One softmax over the kept keys and the means of all video keys; text, which is kept anyway, in none."""
        layout, video = part.layout, part.layout.video_slice()
        groups = Blocking.uniform(layout.video, self.pool)
        valid = None
        if layout.valid is not None:
            valid = tuple(min(max(0, length - video.start), layout.video) for length in layout.valid)
        (keys, counts), (values, _) = (block_means(x[:, :, video], groups, valid) for x in (part.k, part.v))
        part.call.extra_density += self.extra_density(layout)
        return join_means(part, keys, values, counts.log().unsqueeze(-2))

"""Grouped attention: whole groups of the grid attend their neighbours (B) or the groups in line with them (X)."""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from torch import Tensor

from dit_accel.layout import TokenLayout
from dit_accel.methods.base import Count, Method, SizeTriple
from dit_accel.methods.neighborhood import Axis
from dit_accel.methods.registry import register
from dit_accel.order import TokenOrder
from dit_accel.plan import BlockPlan
from dit_accel.state import CallContext
from dit_accel.static_masks import outer, with_text
from dit_accel.tiling import tile_blocks, tile_order


@register("grat")
class Grat(Method):
    """Grouped attention (arXiv 2505.14687): all queries of a group share one set of whole key groups.

    Published, without training: HunyuanVideo X with tile [4, 8, 8], FLUX.1-dev at 8192 x 8192 tile [1, 16, 16] with
    reach 1; no dense steps. Pays from about 2K images or 60 thousand video tokens on.

    Args:
        pattern: "X": groups that share a coordinate with the query's; "B": groups at most `reach` away on every axis,
            the box shifted inward at borders (our choice: every group has equally many keys, as in sliding tiles).
        cross: what X keeps of a video. "planes": groups that share at least one coordinate (released code); "lines":
            groups that differ in one coordinate at most. The same on an image.
        tile: (frames, height, width) of a group in tokens. Groups at the end of an axis may be smaller.
        reach: groups to each side for B. Default 1.
        ring: X keeps the groups of B as well, so that no corner is cut off (ours). Default False.
    """

    source: ClassVar[str] = "arXiv 2505.14687"
    is_static: ClassVar[bool] = True

    pattern: Literal["X", "B"] = "X"
    cross: Literal["planes", "lines"] = "planes"
    tile: SizeTriple = (4, 8, 8)
    reach: Count = 1
    ring: bool = False

    def order(self, q: Tensor, k: Tensor, v: Tensor, call: CallContext) -> TokenOrder | None:
        """Group by group."""
        return tile_order(call.layout, self.tile)

    def select(self, q: Tensor, k: Tensor, call: CallContext) -> BlockPlan:
        """The groups of the pattern. q, k `[B, H, N, D]` are not looked at; text attends all and is attended by all."""
        layout = call.layout
        counts = [-(-length // size) for length, size in zip(layout.grid, self.tile, strict=True)]
        box = outer([Axis(n, min(n, 2 * self.reach + 1), 1, 1, False).kept() for n in counts])
        mask = box if self.pattern == "B" else self._cross(layout, counts)
        blocks = tile_blocks(layout, self.tile)
        return BlockPlan.from_mask(with_text(layout, blocks, mask | box if self.ring else mask), blocks, blocks)

    def _cross(self, layout: TokenLayout, counts: list[int]) -> Tensor:
        """Bool `[n, n]`: groups that share enough coordinates; an image has two."""
        at = torch.cartesian_prod(*(torch.arange(count) for count in counts))
        at = at[:, 1:] if layout.frames == 1 else at
        shared = (at.unsqueeze(1) == at).sum(-1)
        return shared >= (1 if self.cross == "planes" else at.shape[1] - 1)

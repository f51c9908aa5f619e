"""Order, selection and remainder, each chosen by name."""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from dit_accel.kernels.spec import Precision, Remainder
from dit_accel.layout import TokenLayout
from dit_accel.methods.base import BlockSize, Count, Density, Method, SizeTriple
from dit_accel.methods.registry import register
from dit_accel.order import TokenOrder
from dit_accel.plan import Blocking, BlockPlan
from dit_accel.selection import pooled_scores, top_k_plan
from dit_accel.state import CallContext
from dit_accel.tiling import tile_blocks, tile_order


@register("composed")
class Composed(Method):
    """Pooled-score top-k over raster or tile blocks, with a choice of what becomes of the rest.

    Args:
        order: "tile": blocks are 3-D tiles of the video; "raster": blocks are runs of the raster.
        tile: (frames, height, width) of a tile in tokens, for "tile".
        block: block size in tokens, for "raster".
        density: share of key blocks that each query block attends exactly.
        remainder: "drop"; "mean": the rest enters the softmax as one mean key and value per block (order 0);
            "diagonal": the same with a second-order correction of the blocks' mass.
        precision: "input", or "int8": queries and keys of the exact part are quantised to 8 bits, keys smoothed.
        sink_frames: leading frames that every query attends. Default 0.
    """

    source: ClassVar[str] = "this project; pooled remainder after arXiv 2602.01077"

    order_: Literal["raster", "tile"] = Field(default="tile", alias="order")
    tile: SizeTriple = (4, 4, 4)
    block: BlockSize = 64
    density: Density = 0.25
    remainder_: Literal["drop", "mean", "diagonal"] = Field(default="diagonal", alias="remainder")
    precision_: Literal["input", "int8"] = Field(default="input", alias="precision")
    sink_frames: Count = 0

    def order(self, q: Tensor, k: Tensor, v: Tensor, call: CallContext) -> TokenOrder | None:
        """Tiles, or None for the raster."""
        return tile_order(call.layout, self.tile) if self.order_ == "tile" else None

    def select(self, q: Tensor, k: Tensor, call: CallContext) -> BlockPlan:
        """Top-k by pooled score; every block keeps itself. q, k `[B, H, N, D]`."""
        layout = call.layout
        blocks = tile_blocks(layout, self.tile) if self.order_ == "tile" else layout.blocks(self.block)
        keep = max(1, round(self.density * blocks.count))
        forced = torch.eye(blocks.count, dtype=torch.bool) | self._sink(layout, blocks)
        return top_k_plan(pooled_scores(q, k, blocks, layout), keep, blocks, layout, forced)

    def _sink(self, layout: TokenLayout, blocks: Blocking) -> Tensor:
        """Bool `[n]`: blocks that hold a token of the leading frames."""
        frame = torch.full((layout.tokens,), layout.frames, dtype=torch.int64)
        frame[layout.video_slice()] = layout.coordinates[:, 0].long()
        if self.order_ == "tile":
            frame = frame[tile_order(layout, self.tile).query]
        earliest = torch.full((blocks.count,), layout.frames).scatter_reduce(0, blocks.block_of_token(), frame, "amin")
        return earliest < self.sink_frames

    @property
    def remainder(self) -> Remainder | None:
        """As chosen."""
        return None if self.remainder_ == "drop" else Remainder(self.remainder_)

    @property
    def precision(self) -> Precision | None:
        """As chosen."""
        return None if self.precision_ == "input" else Precision(self.precision_)

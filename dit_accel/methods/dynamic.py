"""What the methods that score key blocks share: blocks, order, forced blocks, budgets per head, and routing noise."""

from __future__ import annotations

from abc import abstractmethod
from typing import Annotated, Literal

from pydantic import BeforeValidator, Field, model_validator
from torch import Tensor

from dit_accel.layout import TokenLayout
from dit_accel.methods.base import BlockSize, Density, Method
from dit_accel.order import TokenOrder
from dit_accel.plan import Blocking, BlockPlan
from dit_accel.selection import (
    Budget,
    Normalisation,
    Rounding,
    TopK,
    adapt_heads,
    own_blocks,
    routing_noise,
    select_plan,
    sink_blocks,
)
from dit_accel.state import CallContext
from dit_accel.tiling import tile_blocks, tile_order

Size = Annotated[int, Field(ge=1)]
Tile = Annotated[
    tuple[Size, Size, Size], BeforeValidator(lambda value: tuple(value) if isinstance(value, list) else value)
]
Share = Annotated[float, Field(gt=0, le=1, allow_inf_nan=False)]


class DynamicMethod(Method):
    """Base of the methods that score blocks of keys from queries and keys and keep the best.

    A subclass gives `scores` and `budget`. Text rows and columns are always whole.

    Args:
        density: share of key blocks that each query block attends, in place of the method's own rule. Default None:
            its own rule decides.
        block: query block in tokens, for the raster order.
        key_block: key block in tokens, for the raster order. Default None: as `block`.
        order: "raster": blocks are runs of the raster; "tile": blocks are 3-D tiles of the video.
        tile: (frames, height, width) of a tile in tokens, for "tile".
        heads: "uniform": all heads get `density`; "adaptive": heads whose scores say they reach a recall of 0.8 give
            blocks to those that need them, the mean staying `density` (arXiv 2502.21079).
        keep_self: every block attends itself. Forced blocks count inside the budget.
        sink_frames: leading frames that every query attends. Default 0.
        noise: amplitude of seeded noise on the scores, in units of their spread in a row, against flicker. Default 0.
    """

    density: Density | None = None
    block: BlockSize = 64
    key_block: BlockSize | None = None
    order_: Literal["raster", "tile"] = Field(default="raster", alias="order")
    tile: Tile = (4, 4, 4)
    heads: Literal["uniform", "adaptive"] = "uniform"
    keep_self: bool = False
    sink_frames: Annotated[int, Field(ge=0)] = 0
    noise: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.0

    @model_validator(mode="after")
    def _fits_together(self) -> DynamicMethod:
        if self.heads == "adaptive" and self.density is None:
            raise ValueError("heads='adaptive' moves blocks between heads at a given mean: set density as well")
        if self.order_ == "tile" and "key_block" in self.model_fields_set:
            raise ValueError("key_block goes with order='raster'; with order='tile' both blocks are one tile")
        return self

    def order(self, q: Tensor, k: Tensor, v: Tensor, call: CallContext) -> TokenOrder | None:
        """Tiles, or None for the raster."""
        return tile_order(call.layout, self.tile) if self.order_ == "tile" else None

    def blocks(self, layout: TokenLayout) -> tuple[Blocking, Blocking]:
        """Query blocks and key blocks."""
        if self.order_ == "tile":
            blocks = tile_blocks(layout, self.tile)
            return blocks, blocks
        rows = layout.blocks(self.block)
        return rows, rows if self.key_block in (None, self.block) else layout.blocks(self.key_block)

    @abstractmethod
    def scores(self, q: Tensor, k: Tensor, call: CallContext, q_blocks: Blocking, k_blocks: Blocking) -> Tensor:
        """Log-mass of each key block for each query block, up to a constant per row, `[B, H, nq, nk]`.

        q, k `[B, H, N, D]` in the method's order; -inf marks key blocks without real tokens.
        """

    @abstractmethod
    def budget(self, call: CallContext) -> Budget:
        """The method's own rule for how many blocks are kept; a density takes its place."""

    @property
    def normalisation(self) -> Normalisation:
        """How scores become shares of the mass. Default: a softmax."""
        return "softmax"

    @property
    def rounding(self) -> Rounding:
        """How a density becomes a number of blocks. Default: to the nearest."""
        return "round"

    @property
    def counts_forced(self) -> bool:
        """Whether forced blocks are part of the budget. Default True."""
        return True

    def forced(self, q: Tensor, k: Tensor, call: CallContext, q_blocks: Blocking, k_blocks: Blocking) -> Tensor | None:
        """Blocks besides text that are always kept, bool that broadcasts against the scores."""
        layout, always = call.layout, None
        if self.keep_self:
            always = own_blocks(q_blocks, k_blocks).to(q.device)
        if self.sink_frames or layout.prefix_frames:
            order = tile_order(layout, self.tile) if self.order_ == "tile" else None
            sink = sink_blocks(layout, k_blocks, self.sink_frames, order).to(q.device)
            always = sink if always is None else always | sink
        return always

    def select(self, q: Tensor, k: Tensor, call: CallContext) -> BlockPlan:
        """Score, choose, and make the plan. q, k `[B, H, N, D]`."""
        q_blocks, k_blocks = self.blocks(call.layout)
        scores = self.scores(q, k, call, q_blocks, k_blocks)
        scores = routing_noise(scores, self.noise, call.seed, call.layer, call.step)
        forced = self.forced(q, k, call, q_blocks, k_blocks)
        return select_plan(
            scores,
            self._budget(scores, forced, call),
            q_blocks,
            k_blocks,
            call.layout,
            forced,
            counted=self.counts_forced,
            normalisation=self.normalisation,
        )

    def _budget(self, scores: Tensor, forced: Tensor | None, call: CallContext) -> Budget:
        if self.density is None:
            return self.budget(call)
        if self.heads == "adaptive":
            share = adapt_heads(scores, self.density, forced, normalisation=self.normalisation)
            return TopK(share=share, rounding=self.rounding)
        return TopK(share=self.density, rounding=self.rounding)

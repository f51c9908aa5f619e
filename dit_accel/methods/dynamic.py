"""What the methods that score key blocks share: blocks, order, forced blocks, budgets per head, and routing noise."""

from __future__ import annotations

from abc import abstractmethod
from typing import Annotated, Literal

from pydantic import Field, model_validator
from torch import Tensor

from dit_accel.layout import TokenLayout
from dit_accel.methods.base import BlockSize, Count, Density, Method, SizeTriple
from dit_accel.order import TokenOrder
from dit_accel.orders.ordering import InSpace
from dit_accel.plan import Blocking, BlockPlan
from dit_accel.selection import (
    Budget,
    Normalisation,
    Padding,
    Rounding,
    TopK,
    adapt_heads,
    own_blocks,
    routing_noise,
    select_plan,
    sink_blocks,
)
from dit_accel.state import CallContext
from dit_accel.transfer import to_device

Share = Annotated[float, Field(gt=0, le=1, allow_inf_nan=False)]


class BlockSelection(Method):
    """Base of the methods that score blocks of keys from queries and keys and keep the best, whatever the blocks are.

    A subclass gives `blocks`, `scores` and `budget`. Text rows and columns are always whole.

    Args:
        density: share of key blocks that each query block attends, in place of the method's own rule. Default None:
            its own rule decides.
        heads: "uniform": all heads get `density`; "adaptive": heads whose scores say they reach a recall of 0.8 give
            blocks to those that need them, the mean staying `density` (arXiv 2502.21079).
        sink_frames: leading frames that every query attends. Default 0.
        noise: amplitude of seeded noise on the scores, in units of their spread in a row, against flicker. Default 0.
    """

    density: Density | None = None
    heads: Literal["uniform", "adaptive"] = "uniform"
    sink_frames: Count = 0
    noise: Annotated[float, Field(ge=0)] = 0.0

    @model_validator(mode="after")
    def _adapts_at_a_density(self) -> BlockSelection:
        if self.heads == "adaptive" and self.density is None:
            raise ValueError("heads='adaptive' moves blocks between heads at a given mean: set density as well")
        return self

    @abstractmethod
    def blocks(self, layout: TokenLayout) -> tuple[Blocking, Blocking]:
        """Query blocks and key blocks."""

    @abstractmethod
    def scores(self, q: Tensor, k: Tensor, call: CallContext, q_blocks: Blocking, k_blocks: Blocking) -> Tensor:
        """Log-mass of each key block for each query block, up to a constant per row, `[B, H, nq, nk]`.

        q, k `[B, H, N, D]` in the method's order; -inf marks key blocks without real tokens.
        """

    @abstractmethod
    def budget(self, q: Tensor, k: Tensor, call: CallContext) -> Budget:
        """The method's own rule for how many blocks are kept; a density takes its place. q, k `[B, H, N, D]`."""

    @abstractmethod
    def key_order(self, call: CallContext) -> TokenOrder | None:
        """How keys stand; None: raster."""

    @property
    def normalisation(self) -> Normalisation:
        """How scores become shares of the mass. Default: a softmax."""
        return "softmax"

    @property
    def rounding(self) -> Rounding:
        """How a density becomes a number of blocks. Default: to the nearest."""
        return "round"

    @property
    def scope(self) -> Literal["row", "head", "layer"]:
        """Whose budget a density is, see `Budget`. Default: that of each row."""
        return "row"

    def beside(self, q: Tensor, k: Tensor, call: CallContext, q_blocks: Blocking, k_blocks: Blocking) -> Tensor | None:
        """Blocks that are kept on top of the budget, bool that broadcasts against the scores. Default: none."""
        return None

    def forced(self, q: Tensor, k: Tensor, call: CallContext, q_blocks: Blocking, k_blocks: Blocking) -> Tensor | None:
        """Blocks besides text that are kept within the budget, bool that broadcasts against the scores: the sink."""
        if not self.sink_frames and not call.layout.prefix_frames:
            return None
        sink = sink_blocks(call.layout, k_blocks, self.sink_frames, self.key_order(call))
        return sink.unsqueeze(-2)

    def perturbed(self, scores: Tensor, call: CallContext) -> Tensor:
        """Scores with the routing noise."""
        return routing_noise(scores, self.noise, call.seed, call.layer, call.step)

    def select(self, q: Tensor, k: Tensor, call: CallContext) -> BlockPlan:
        """Score, choose, and make the plan. q, k `[B, H, N, D]`."""
        q_blocks, k_blocks = self.blocks(call.layout)
        scores = self.perturbed(self.scores(q, k, call, q_blocks, k_blocks), call)
        forced = self.forced(q, k, call, q_blocks, k_blocks)
        beside = self.beside(q, k, call, q_blocks, k_blocks)
        return select_plan(
            scores,
            self.limit(scores, q, k, call, forced, beside),
            q_blocks,
            k_blocks,
            call.layout,
            forced,
            beside=beside,
            normalisation=self.normalisation,
        )

    def limit(
        self,
        scores: Tensor,
        q: Tensor,
        k: Tensor,
        call: CallContext,
        forced: Tensor | None = None,
        beside: Tensor | None = None,
    ) -> Budget:
        """The budget that holds: the density, the same or adapted per head, else the method's own rule."""
        if self.density is None:
            return self.budget(q, k, call)
        if self.heads == "adaptive":
            share = adapt_heads(scores, self.density, forced, beside=beside, normalisation=self.normalisation)
            return TopK(scope=self.scope, share=share, rounding=self.rounding)
        return TopK(scope=self.scope, share=self.density, rounding=self.rounding)


class DynamicMethod(BlockSelection):
    """Base of the methods whose blocks are runs of the raster or of a curve, or 3-D tiles.

    Args:
        block: query block in tokens, for all orders but "tile".
        key_block: key block in tokens, for all orders but "tile". Default None: as `block`.
        order: "raster": blocks are runs of the raster; "hilbert": runs of a space-filling curve, see `hilbert_order`;
            "tile": blocks are 3-D tiles of the video.
        tile: (frames, height, width) of a tile in tokens, for "tile".
        keep_self: every block attends itself. Forced blocks count inside the budget.
    """

    block: BlockSize = 64
    key_block: BlockSize | None = None
    order_: Literal["raster", "hilbert", "tile"] = Field(default="raster", alias="order")
    tile: SizeTriple = (4, 4, 4)
    keep_self: bool = False

    @model_validator(mode="after")
    def _blocks_fit_the_order(self) -> DynamicMethod:
        if self.order_ == "tile" and "key_block" in self.model_fields_set:
            raise ValueError(
                "key_block goes with order='raster' or 'hilbert'; with order='tile' both blocks are one tile"
            )
        return self

    @property
    def ordering(self) -> InSpace:
        """The order, with its parameters."""
        return InSpace(self.order_, self.tile)

    @property
    def has_static_order(self) -> bool:
        """Yes: none of them looks at a token."""
        return True

    @property
    def keeps_padding_last(self) -> bool:
        """As the order does."""
        return self.ordering.keeps_padding_last

    def order(self, q: Tensor, k: Tensor, v: Tensor, call: CallContext) -> TokenOrder | None:
        """Tiles or the curve; None for the raster."""
        return self.key_order(call)

    def key_order(self, call: CallContext) -> TokenOrder | None:
        """As queries."""
        return self.ordering.of_layout(call.layout)

    def blocks(self, layout: TokenLayout) -> tuple[Blocking, Blocking]:
        """Tiles, or runs of the raster or the curve."""
        rows = self.ordering.blocks(layout, self.block)
        if self.order_ == "tile" or self.key_block in (None, self.block):
            return rows, rows
        return rows, layout.blocks(self.key_block)

    def forced(self, q: Tensor, k: Tensor, call: CallContext, q_blocks: Blocking, k_blocks: Blocking) -> Tensor | None:
        """The sink, and every block's own tokens if asked for."""
        sink = super().forced(q, k, call, q_blocks, k_blocks)
        if not self.keep_self:
            return sink
        own = own_blocks(q_blocks, k_blocks)
        return own if sink is None else to_device(own, sink.device) | sink


class PoolingMethod(DynamicMethod):
    """Base of the methods whose scores pool or sample the tokens of a block.

    Args:
        padding: what stands in the slots of a short block, for the scores alone: "real": nothing; "repeat": its last
            token once more, as released by arXiv 2508.10774 and 2512.04025; "zero": zeros that count, as released by
            arXiv 2503.16428. Both bias the choice of the last blocks.
    """

    padding: Padding = "real"

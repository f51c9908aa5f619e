"""VMoBA: runs of frames, windows through all frames, and boxes, in turn over the layers, chosen by their mean key."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from dit_accel.layout import TokenLayout
from dit_accel.methods.base import FROM_LIST, BlockSize, Density, Size, SizeTriple
from dit_accel.methods.dynamic import BlockSelection, Share
from dit_accel.methods.registry import register
from dit_accel.order import TokenOrder
from dit_accel.orders.tiles import tile_blocks, tile_order
from dit_accel.plan import Blocking, BlockPlan
from dit_accel.selection import (
    Budget,
    Normalisation,
    TopP,
    block_means,
    own_blocks,
    plan_of_mask,
    real_blocks,
    select_blocks,
)
from dit_accel.state import CallContext
from dit_accel.transfer import to_device

_KERNEL_BLOCK = 64


@register("vmoba")
class VMoBA(BlockSelection):
    """Key boxes chosen by the product of their mean key with the query; a query always attends its own box.

    Layers 0, 3, 6 ... use runs of frames, layers 1, 4, 7 ... windows through all frames, layers 2, 5, 8 ... boxes.
    All are called boxes here. They are larger than the blocks of a kernel; the plan cuts them into blocks of 64 tokens.
    Boxes at the end of an axis are smaller, so every grid works.

    Args:
        density: share of the boxes that a query attends, its own among them (published without training: 2 of 7, 6 of
            24, 18 of 72). None: the rule of `mass`.
        mass: share of the scores, mapped to [0, 1] and divided by their sum, that the chosen boxes reach. It is no
            share of attention; published for trained weights.
        scope: whose boxes are ranked together, and whose share `density` or `mass` is: those of each "row", a group of
            queries; of a "head"; or of a "layer", all heads together. Without training all but "row" make videos
            vibrate, as its authors say.
        frames: frames of a run.
        window: (height, width) of a window in tokens.
        box: (frames, height, width) of a box in tokens.
        query_block: queries that choose together, by their mean. Published is 1; kernels want 64.
    """

    source: ClassVar[str] = "arXiv 2506.23858"

    density: Density | None = 0.25
    mass: Share = 0.25
    scope_: Literal["row", "head", "layer"] = Field(default="row", alias="scope")
    frames: Size = 3
    window: Annotated[tuple[Size, Size], FROM_LIST] = (5, 13)
    box: SizeTriple = (7, 5, 13)
    query_block: BlockSize = 64

    @model_validator(mode="after")
    def _adapts_within_heads(self) -> VMoBA:
        if self.heads == "adaptive" and self.scope_ == "layer":
            raise ValueError("scope='layer' moves boxes between heads already: leave heads at 'uniform'")
        return self

    def tile(self, call: CallContext) -> tuple[int, int, int]:
        """(frames, height, width) of the boxes of this layer."""
        frames, height, width = call.layout.grid
        return ((self.frames, height, width), (frames, *self.window), self.box)[call.layer % 3]

    def order(self, q: Tensor, k: Tensor, v: Tensor, call: CallContext) -> TokenOrder | None:
        """Box by box."""
        return self.key_order(call)

    def key_order(self, call: CallContext) -> TokenOrder | None:
        """Box by box."""
        return tile_order(call.layout, self.tile(call))

    def boxes(self, call: CallContext) -> Blocking:
        """The boxes as a partition of the ordered sequence; text in runs of at most the size of a box."""
        return tile_blocks(call.layout, self.tile(call))

    def blocks(self, layout: TokenLayout) -> tuple[Blocking, Blocking]:
        """Query groups and kernel blocks of layer 0."""
        return self._blocks(CallContext(layout))

    def _blocks(self, call: CallContext) -> tuple[Blocking, Blocking]:
        layout, boxes = call.layout, self.boxes(call)
        video = boxes.lengths[~layout.text_blocks(boxes)].tolist()
        rows, columns = (
            layout.blocks(size, video=Blocking.segments(video, size)) for size in (self.query_block, _KERNEL_BLOCK)
        )
        return rows, columns

    def scores(self, q: Tensor, k: Tensor, call: CallContext, q_blocks: Blocking, k_blocks: Blocking) -> Tensor:
        """Mean query times mean key, unscaled, `[B, H, nq, boxes]`; `k_blocks` are the boxes."""
        mean_q, _ = block_means(q, q_blocks, call.layout.valid)
        mean_k, counts = block_means(k, k_blocks, call.layout.valid)
        return (mean_q @ mean_k.transpose(-1, -2)).masked_fill((counts == 0).unsqueeze(-2), -torch.inf)

    def budget(self, q: Tensor, k: Tensor, call: CallContext) -> Budget:
        """Top-p of the normalised scores, the crossing box kept."""
        return TopP(mass=self.mass, scope=self.scope)

    @property
    def scope(self) -> Literal["row", "head", "layer"]:
        """As chosen."""
        return self.scope_

    @property
    def normalisation(self) -> Normalisation:
        """By range."""
        return "min_max"

    def forced(self, q: Tensor, k: Tensor, call: CallContext, q_blocks: Blocking, k_blocks: Blocking) -> Tensor | None:
        """The own box, text, and the sink."""
        sink = super().forced(q, k, call, q_blocks, k_blocks)
        always = own_blocks(q_blocks, k_blocks) | call.layout.text_blocks(k_blocks)
        return always if sink is None else to_device(always, sink.device) | sink

    def select(self, q: Tensor, k: Tensor, call: CallContext) -> BlockPlan:
        """Boxes, then the kernel blocks that make them up. q, k `[B, H, N, D]` in the order of the layer."""
        boxes, (rows, columns) = self.boxes(call), self._blocks(call)
        scores = self.perturbed(self.scores(q, k, call, rows, boxes), call)
        forced = self.forced(q, k, call, rows, boxes)
        chosen = select_blocks(scores, self.limit(scores, q, k, call, forced), forced, normalisation=self.normalisation)
        owner = to_device(boxes.block_of_token()[columns.starts[:-1]], q.device)
        real = real_blocks(columns, call.layout, q.device)
        return plan_of_mask(chosen[..., owner], rows, columns, call.layout, real)

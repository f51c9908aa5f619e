"""The decision how tokens stand, by name: what a method asks of an order, whatever it is made from."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from dit_accel.layout import TokenLayout
from dit_accel.order import TokenOrder
from dit_accel.orders.content import first_sorted_key, hot_key_order, kmeans_order, lsh_order
from dit_accel.orders.kept import KeptOrder
from dit_accel.orders.space import Axes, axes_order, bisection_order, hilbert_order, morton_order
from dit_accel.orders.tiles import Triple, tile_blocks, tile_order
from dit_accel.plan import Blocking
from dit_accel.selection import generator_for
from dit_accel.state import CallContext

SpaceName = Literal["raster", "tile", "bisect", "morton", "hilbert", "axes"]
ContentName = Literal["hot_keys", "lsh", "kmeans"]
OrderName = Literal[SpaceName, ContentName]


class Ordering(ABC):
    """How tokens stand, and in which blocks. Frozen, and without state: what it keeps lives in the call's memory."""

    by_content: ClassVar[bool] = False
    """Whether it looks at queries and keys. Then no block is a region of the video; conditioning frames stay first."""

    @property
    def is_static(self) -> bool:
        """Whether it depends on the layout alone and is the same for all heads."""
        return not self.by_content

    @property
    def serves_branches(self) -> bool:
        """Whether guidance branches of a step can stand in one order."""
        return not self.by_content

    @property
    def cycle(self) -> int:
        """Steps of which the first makes it and the others keep it. Default 1."""
        return 1

    @property
    def keeps_padding_last(self) -> bool:
        """Whether video tokens that are padding stand last in it. Default False."""
        return False

    @abstractmethod
    def order(self, q: Tensor, k: Tensor, call: CallContext) -> TokenOrder | None:
        """The order for q, k `[B, H, N, D]`, which stand in the raster; None: they stay."""

    def blocks(self, layout: TokenLayout, size: int) -> Blocking:
        """The blocks of `size` tokens in this order."""
        return layout.blocks(size)

    def leading_blocks(self, layout: TokenLayout, blocks: Blocking) -> Tensor:
        """The key blocks that the order has put in front for all queries to attend, bool `[nk]`."""
        return torch.zeros(blocks.count, dtype=torch.bool)


@dataclass(frozen=True)
class InSpace(Ordering):
    """An order of the grid.

    Args:
        name: which; see `composed`.
        tile: (frames, height, width) of a tile, or the proportions of the boxes of "bisect".
        block: tokens per box of "bisect".
        axes: for "axes", one order for all heads or one per head.
    """

    name: SpaceName
    tile: Triple = (4, 4, 4)
    block: int = 64
    axes: tuple[Axes, ...] = ("fhw",)

    @property
    def is_static(self) -> bool:
        """Yes, unless heads differ."""
        return self.name != "axes" or len(self.axes) == 1

    @property
    def keeps_padding_last(self) -> bool:
        """The raster does."""
        return self.name == "raster"

    def order(self, q: Tensor, k: Tensor, call: CallContext) -> TokenOrder | None:
        """The order of the grid; q, k `[B, H, N, D]` are not looked at."""
        return self.of_layout(call.layout)

    def of_layout(self, layout: TokenLayout) -> TokenOrder | None:
        """The order, which needs no tensors."""
        if self.name == "tile":
            return tile_order(layout, self.tile)
        if self.name == "bisect":
            return bisection_order(layout, self.block, self.tile)
        if self.name == "morton":
            return morton_order(layout)
        if self.name == "hilbert":
            return hilbert_order(layout)
        if self.name == "axes":
            return axes_order(layout, self.axes)
        return None

    def blocks(self, layout: TokenLayout, size: int) -> Blocking:
        """Tiles, or runs of `size` tokens."""
        return tile_blocks(layout, self.tile) if self.name == "tile" else layout.blocks(size)


@dataclass(frozen=True)
class HotKeys(Ordering):
    """Keys sorted by the attention they get, see `hot_key_order`."""

    block: int
    segment: int | None
    share: float
    by_content: ClassVar[bool] = True

    def order(self, q: Tensor, k: Tensor, call: CallContext) -> TokenOrder:
        """Made at every call from q, k `[B, H, N, D]`."""
        return hot_key_order(q, k, call.layout, self.block, self.segment, self.share)

    def leading_blocks(self, layout: TokenLayout, blocks: Blocking) -> Tensor:
        """The blocks that hold nothing but keys that are hot, or of conditioning frames."""
        if self.share == 1 or self.segment is not None:
            return super().leading_blocks(layout, blocks)
        first = first_sorted_key(layout)
        end = layout.video_start + first + round(self.share * (layout.video - first))
        return (blocks.starts[:-1] >= layout.video_start) & (blocks.starts[1:] <= end)


@dataclass(frozen=True)
class AngularHash(Ordering):
    """Queries and keys sorted by an angular hash, see `lsh_order`."""

    directions: int
    by_content: ClassVar[bool] = True

    def order(self, q: Tensor, k: Tensor, call: CallContext) -> TokenOrder:
        """Made at every call from q, k `[B, H, N, D]`."""
        return lsh_order(q, k, call.layout, self.directions, call.seed)


@dataclass(frozen=True)
class KMeans(Ordering):
    """Queries and keys sorted by cluster, see `kmeans_order`; centroids go from step to step.

    Args:
        clusters: at most so many, and at most one per block of keys.
        block: block of keys in tokens.
        rounds: of Lloyd's algorithm where there are no centroids yet; one from then on.
        renew: steps for which an order is kept.
        across_branches: keep orders and centroids for all guidance branches of a layer together.
    """

    clusters: int
    block: int
    rounds: int
    renew: int
    across_branches: bool
    by_content: ClassVar[bool] = True

    @property
    def serves_branches(self) -> bool:
        """It is, within a step and for `renew` steps."""
        return True

    @property
    def cycle(self) -> int:
        """As long as it is kept."""
        return self.renew

    @property
    def keeps_padding_last(self) -> bool:
        """Yes: padding is in no cluster."""
        return True

    def order(self, q: Tensor, k: Tensor, call: CallContext) -> TokenOrder:
        """The order of this step, or of one that is fewer than `renew` steps ago; q, k `[B, H, N, D]`."""
        memory, layout = call.branches if self.across_branches else call.memory, call.layout
        kept: KeptOrder | None = memory.get("order")
        if kept is not None and kept.serves(q, call, self.renew):
            return kept.order
        start = memory.get("centroids")
        clusters = min(self.clusters, -(-layout.video // self.block))
        if start is not None and start[0].shape[:3] != (*q.shape[:2], clusters):
            start = None
        drawn, rounds = generator_for(q.device, call.seed, call.layer), self.rounds if start is None else 1
        order, memory["centroids"] = kmeans_order(q, k, layout, clusters, rounds, start, drawn)
        if self.renew > 1 or self.across_branches:
            memory["order"] = KeptOrder.of(order, call)
        return order

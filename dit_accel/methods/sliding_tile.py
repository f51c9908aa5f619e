"""Sliding tiles: windows of whole tiles, the tile-aligned case of neighborhood attention."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from torch import Tensor

from dit_accel.methods.base import CountTriple, Density, Method, SizeTriple
from dit_accel.methods.neighborhood import Axis
from dit_accel.methods.registry import register
from dit_accel.order import TokenOrder
from dit_accel.orders.tiles import tile_blocks, tile_counts, tile_order
from dit_accel.plan import BlockPlan
from dit_accel.state import CallContext
from dit_accel.static_masks import outer, with_prefix, with_text


@register("sliding_tile")
class SlidingTile(Method):
    """Sliding tile attention (arXiv 2502.04507): every query of a tile sees the same box of whole tiles.

    For odd windows on grids that divide by the tile it equals neighborhood attention with the tile as stride. Tiles at
    the end of an axis may be smaller, so any grid works. Conditioning frames are tiles of their own, seen by all.
    Windows per head: a head table with one mode per window.

    Published, without training: HunyuanVideo at 30 x 48 x 80 tokens and Wan2.1-14B at 18 x 48 x 80, tile [6, 8, 8],
    12 of 50 steps dense, a searched window per head ([5, 3, 3], [1, 6, 10], [3, 3, 5], [5, 1, 10], [5, 6, 1] in the
    released table for HunyuanVideo); one window for all heads: [5, 5, 5], or [3, 3, 3] at a loss.

    Args:
        window: tiles per axis (frames, height, width); 0 means the whole axis. As published, an even window w reaches
            w / 2 tiles to both sides, and so holds w + 1 tiles.
        tile: (frames, height, width) of a tile in tokens.
        density: choose the odd windows nearest to this share of the tiles, the same share of each axis. Default None:
            `window` decides.
    """

    source: ClassVar[str] = "arXiv 2502.04507"
    is_static: ClassVar[bool] = True

    window: CountTriple = (3, 3, 3)
    tile: SizeTriple = (4, 4, 4)
    density: Density | None = None

    def order(self, q: Tensor, k: Tensor, v: Tensor, call: CallContext) -> TokenOrder | None:
        """Tile by tile."""
        return tile_order(call.layout, self.tile)

    def select(self, q: Tensor, k: Tensor, call: CallContext) -> BlockPlan:
        """The box of tiles around each tile, shifted inward at borders. q, k `[B, H, N, D]` are not looked at."""
        layout = call.layout
        counts = tile_counts(layout, self.tile)
        axes = []
        for count, window in zip(counts, self._windows(counts), strict=True):
            width = count if window == 0 else min(count, 2 * (window // 2) + 1)
            axes.append(Axis(count, width, 1, 1, False).kept())
        blocks = tile_blocks(layout, self.tile)
        mask = with_prefix(layout, blocks, outer(axes))
        return BlockPlan.from_mask(with_text(layout, blocks, mask), blocks, blocks)

    def _windows(self, counts: Sequence[int]) -> Sequence[int]:
        """Window per axis of `counts` tiles."""
        if self.density is None:
            return self.window
        share = self.density ** (1 / max(1, sum(count > 1 for count in counts)))
        return [0 if share == 1 else 2 * max(0, round((share * count - 1) / 2)) + 1 for count in counts]

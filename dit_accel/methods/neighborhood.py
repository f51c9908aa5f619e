"""Windows on the token grid: neighborhood attention, and sliding tiles, which are its tile-aligned case.

Per axis of L tokens: k window, s stride, d dilation.
"""

from __future__ import annotations

from functools import lru_cache, reduce
from typing import Annotated, ClassVar

import torch
from pydantic import BeforeValidator, Field
from torch import Tensor

from dit_accel.layout import TokenLayout
from dit_accel.methods.base import Density, Method
from dit_accel.methods.registry import register
from dit_accel.order import TokenOrder
from dit_accel.plan import BlockPlan, BoxPredicate
from dit_accel.state import CallContext
from dit_accel.tiling import tile_blocks, tile_order

_FROM_LIST = BeforeValidator(lambda value: tuple(value) if isinstance(value, list) else value)
Size = Annotated[int, Field(ge=1)]
Window = Annotated[int, Field(ge=0)]
Triple = Annotated[tuple[Size, Size, Size], _FROM_LIST]
WindowTriple = Annotated[tuple[Window, Window, Window], _FROM_LIST]


def axis_window(length: int, window: int, stride: int, dilation: int, causal: bool) -> tuple[Tensor, Tensor]:
    """First and one-past-last key coordinate of every query of an axis, int64 `[L]` each, before dilation is applied.

    The window is shifted inward at borders, never cut (arXiv 2504.16922); on a causal axis it is cut at the start.
    Keys are those of the range that lie in the query's dilation group.
    """
    x = torch.arange(length)
    group, inside = x % dilation, x // dilation
    group_length = length // dilation + (group < length % dilation)
    if causal:
        leader = torch.minimum(inside // stride * stride + stride - 1, group_length - 1)
        first, last = (leader - window + 1).clamp(min=0), inside
    else:
        left, right = window // 2, window // 2 + window % 2 - 1
        leader = torch.minimum(inside // stride * stride + stride // 2, group_length - 1)
        center = leader.clamp(min=left).minimum(group_length - 1 - right)
        first, last = center - left, center + right
    return first * dilation + group, last * dilation + group + 1


@register("neighborhood")
class Neighborhood(Method):
    """Neighborhood attention with stride and dilation (arXiv 2204.07143, 2209.15001, 2504.16922) on any grid.

    Args:
        window: keys per axis (frames, height, width); 0 means the whole axis. Longer than the axis: the whole axis.
        stride: queries per axis that share one window. A stride equal to the tile leaves no partial block.
        dilation: distance of neighbouring keys per axis.
        causal_frames: queries see no later frame.
        tile: (frames, height, width) of a block in tokens.
        density: choose the window so that it covers this share of the grid, the same share of each axis. Default
            None: `window` decides.
    """

    source: ClassVar[str] = "arXiv 2504.16922"
    is_static: ClassVar[bool] = True

    window: WindowTriple = (0, 12, 12)
    stride: Triple = (1, 1, 1)
    dilation: Triple = (1, 1, 1)
    causal_frames: bool = False
    tile: Triple = (4, 4, 4)
    density: Density | None = None

    def order(self, q: Tensor, k: Tensor, v: Tensor, call: CallContext) -> TokenOrder | None:
        """Tile by tile."""
        return tile_order(call.layout, self.tile)

    def select(self, q: Tensor, k: Tensor, call: CallContext) -> BlockPlan:
        """Blocks that hold a key of some query's window; partial ones are decided in the kernel. q, k not looked at."""
        layout = call.layout
        ranges = [self._axis(layout, axis) for axis in range(3)]
        tokens = [_kept(first, end, step) for (first, end), step in zip(ranges, self._dilation(layout), strict=True)]
        visited, whole = (_blocks(layout, self.tile, tokens, rule) for rule in ("any", "all"))
        blocks = tile_blocks(layout, self.tile)
        if torch.equal(visited, whole):
            return BlockPlan.from_mask(visited, blocks, blocks)
        return BlockPlan.from_mask(visited, blocks, blocks, whole, self._predicate(layout, ranges))

    def windows(self, layout: TokenLayout) -> tuple[int, int, int]:
        """Window per axis on this grid, in keys."""
        sizes = [-(-n // d) if d == 1 else n // d for n, d in zip(layout.grid, self._dilation(layout), strict=True)]
        wanted = self.window
        if self.density is not None:
            wanted = tuple(max(1, round(n * self.density ** (1 / _long_axes(layout)))) for n in layout.grid)
        found = [n if w == 0 else min(w, n) for w, n in zip(wanted, sizes, strict=True)]
        return found[0], found[1], found[2]

    def _dilation(self, layout: TokenLayout) -> tuple[int, int, int]:
        """Dilation per axis; an axis that is too short for it is not dilated."""
        found = [d if d <= n // 2 else 1 for d, n in zip(self.dilation, layout.grid, strict=True)]
        return found[0], found[1], found[2]

    def _axis(self, layout: TokenLayout, axis: int) -> tuple[Tensor, Tensor]:
        window = self.windows(layout)[axis]
        stride = min(self.stride[axis], window)
        causal = self.causal_frames and axis == 0
        return axis_window(layout.grid[axis], window, stride, self._dilation(layout)[axis], causal)

    def _predicate(self, layout: TokenLayout, ranges: list[tuple[Tensor, Tensor]]) -> BoxPredicate:
        """The windows as boxes over the whole sequence in tile order; text tokens only meet whole blocks."""
        bounds = torch.zeros(3, layout.tokens, 3, dtype=torch.int32)  # lower, upper, coordinate
        at = layout.coordinates.long()
        for axis, (first, end) in enumerate(ranges):
            for row, values in enumerate((first[at[:, axis]], end[at[:, axis]], at[:, axis])):
                bounds[row, layout.video_slice(), axis] = values.to(torch.int32)
        lower, upper, coordinates = bounds[:, tile_order(layout, self.tile).query]
        return BoxPredicate(lower, upper, coordinates, self._dilation(layout))


@register("sliding_tile")
class SlidingTile(Method):
    """Sliding tile attention (arXiv 2502.04507): every query of a tile sees the same box of whole tiles.

    For odd windows on grids that divide by the tile it equals neighborhood attention with the tile as stride. Tiles at
    the end of an axis may be smaller, so any grid works.

    Args:
        window: tiles per axis (frames, height, width); 0 means the whole axis. As published, an even window w reaches
            w / 2 tiles to both sides, and so holds w + 1 tiles.
        tile: (frames, height, width) of a tile in tokens.
    """

    source: ClassVar[str] = "arXiv 2502.04507"
    is_static: ClassVar[bool] = True

    window: WindowTriple = (3, 3, 3)
    tile: Triple = (4, 4, 4)

    def order(self, q: Tensor, k: Tensor, v: Tensor, call: CallContext) -> TokenOrder | None:
        """Tile by tile."""
        return tile_order(call.layout, self.tile)

    def select(self, q: Tensor, k: Tensor, call: CallContext) -> BlockPlan:
        """The box of tiles around each tile, shifted inward at borders. q, k `[B, H, N, D]` are not looked at."""
        layout = call.layout
        axes = []
        for length, tile, window in zip(layout.grid, self.tile, self.window, strict=True):
            count, reach = -(-length // tile), window // 2
            width = count if window == 0 else min(count, 2 * reach + 1)
            axes.append(_kept(*axis_window(count, width, 1, 1, False), 1))
        blocks = tile_blocks(layout, self.tile)
        return BlockPlan.from_mask(_with_text(layout, _outer(axes), self.tile), blocks, blocks)


def _long_axes(layout: TokenLayout) -> int:
    """Axes that have something to cut (an image has one frame)."""
    return max(1, sum(size > 1 for size in layout.grid))


def _kept(first: Tensor, end: Tensor, dilation: int) -> Tensor:
    """Bool `[L, L]`: which keys of an axis lie in the window of each query."""
    at = torch.arange(len(first))
    offset = at - first.unsqueeze(-1)
    return (offset >= 0) & (at < end.unsqueeze(-1)) & (offset % dilation == 0)


def _outer(axes: list[Tensor]) -> Tensor:
    """Kronecker product of three bool matrices, `[n, n]` over the tile raster."""
    return reduce(torch.kron, (axis.to(torch.uint8) for axis in axes)).bool()


def _blocks(layout: TokenLayout, tile: tuple[int, int, int], tokens: list[Tensor], rule: str) -> Tensor:
    """Bool block mask of the whole sequence: tiles in which "any" or "all" pairs of tokens are kept."""
    axes = []
    for kept, size in zip(tokens, tile, strict=True):
        tile_of = torch.arange(len(kept)) // size
        count = int(tile_of[-1]) + 1
        pairs = torch.zeros(count, len(kept), dtype=torch.int64).index_add_(0, tile_of, kept.long())
        pairs = torch.zeros(count, count, dtype=torch.int64).index_add_(1, tile_of, pairs)
        lengths = tile_of.bincount()
        axes.append(pairs > 0 if rule == "any" else pairs == lengths.unsqueeze(-1) * lengths)
    return _with_text(layout, _outer(axes), tile)


@lru_cache(maxsize=16)
def _is_text(layout: TokenLayout, tile: tuple[int, int, int]) -> Tensor:
    return layout.text_blocks(tile_blocks(layout, tile))


def _with_text(layout: TokenLayout, video: Tensor, tile: tuple[int, int, int]) -> Tensor:
    """The block mask of the video inside that of the sequence: text attends all and is attended by all."""
    text = _is_text(layout, tile)
    mask = torch.ones(len(text), len(text), dtype=torch.bool)
    mask[~text.unsqueeze(-1) & ~text] = video.flatten()
    return mask

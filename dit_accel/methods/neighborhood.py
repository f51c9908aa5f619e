"""Windows on the token grid: neighborhood attention.

Per axis of L tokens: k window, s stride, d dilation.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from dit_accel.layout import TokenLayout
from dit_accel.methods.base import CountTriple, Density, Method, SizeTriple
from dit_accel.methods.registry import register
from dit_accel.order import TokenOrder
from dit_accel.orders.tiles import tile_axes, tile_blocks, tile_order
from dit_accel.plan import BlockPlan, BoxPredicate
from dit_accel.state import CallContext
from dit_accel.static_masks import outer, with_prefix, with_text

_Tiling = tuple[tuple[int, int, int], tuple[int, int, int]]


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


@dataclass(frozen=True)
class Axis:
    """The window of one axis of a grid: its length and, in keys, window, stride and dilation."""

    length: int
    window: int
    stride: int
    dilation: int
    causal: bool

    def kept(self) -> Tensor:
        """Bool `[L, L]`: which keys of the axis lie in the window of each query."""
        first, end = axis_window(self.length, self.window, self.stride, self.dilation, self.causal)
        offset = torch.arange(self.length) - first.unsqueeze(-1)
        return (offset >= 0) & (offset < (end - first).unsqueeze(-1)) & (offset % self.dilation == 0)


@register("neighborhood")
class Neighborhood(Method):
    """Neighborhood attention with stride and dilation (arXiv 2204.07143, 2209.15001, 2504.16922) on any grid.

    Published, without training: HunyuanVideo at 30 x 48 x 80 tokens window [18, 24, 24], stride [16, 8, 8], tile
    [2, 8, 8]; FLUX at 256 x 256 window [1, 80, 80], stride [1, 16, 16], tile [1, 16, 8]. Cosmos-Predict2 is trained
    with such windows, given for the base grid [0, 44, 80]. Conditioning frames are seen by all, on top of the window.

    Args:
        window: keys per axis (frames, height, width); 0 means the whole axis. Longer than the axis: the whole axis.
        stride: queries per axis that share one window. A stride equal to the tile leaves no partial block.
        dilation: distance of neighbouring keys per axis.
        causal_frames: queries see no later frame.
        tile: (frames, height, width) of a block in tokens, counted inside a dilation group.
        key_tile: the same for keys. Default None: as `tile`.
        base_grid: the grid that window, stride and dilation are meant for; on another grid they grow with each axis.
            0 on an axis: it is not scaled. Default None: no axis is scaled.
        density: choose the window so that it covers this share of the grid, the same share of each axis. Default
            None: `window` decides.
    """

    source: ClassVar[str] = "arXiv 2504.16922"
    is_static: ClassVar[bool] = True

    window: CountTriple = (0, 12, 12)
    stride: SizeTriple = (1, 1, 1)
    dilation: SizeTriple = (1, 1, 1)
    causal_frames: bool = False
    tile: SizeTriple = (4, 4, 4)
    key_tile: SizeTriple | None = None
    base_grid: CountTriple | None = None
    density: Density | None = None

    def order(self, q: Tensor, k: Tensor, v: Tensor, call: CallContext) -> TokenOrder | None:
        """Tile by tile."""
        queries, keys = (tile_order(call.layout, *tiling) for tiling in self._tilings(call.layout))
        return queries if self.key_tile is None else TokenOrder(queries.query, keys.query)

    def select(self, q: Tensor, k: Tensor, call: CallContext) -> BlockPlan:
        """Blocks that hold a key of some query's window; partial ones are decided in the kernel. q, k not looked at."""
        layout = call.layout
        axes = self.axes(layout)
        queries, keys = self._tilings(layout)
        q_blocks, k_blocks = tile_blocks(layout, *queries), tile_blocks(layout, *keys)
        masks = []
        for rule in ("any", "all"):
            tiles = zip(axes, tile_axes(layout, *queries), tile_axes(layout, *keys), strict=True)
            video = outer([_tile_pairs(*axis, rule) for axis in tiles])
            video = with_prefix(layout, q_blocks, video, k_blocks, self.causal_frames)
            masks.append(with_text(layout, q_blocks, video, k_blocks))
        return BlockPlan.from_mask(masks[0], q_blocks, k_blocks, masks[1], self._predicate(layout, axes))

    def axes(self, layout: TokenLayout) -> tuple[Axis, Axis, Axis]:
        """The windows on this grid."""
        wanted = self.window
        if self.density is not None:
            share = self.density ** (1 / _long_axes(layout))
            frames, height, width = (max(1, round(n * share)) for n in layout.grid)
            wanted = frames, height, width
        base = (0, 0, 0) if self.base_grid is None else self.base_grid
        causal = (self.causal_frames, False, False)
        t, h, w = map(_fit, layout.grid, wanted, self.stride, self.dilation, base, causal)
        return t, h, w

    def _tilings(self, layout: TokenLayout) -> tuple[_Tiling, _Tiling]:
        """Tile and dilation of queries and of keys."""
        t, h, w = (axis.dilation for axis in self.axes(layout))
        return (self.tile, (t, h, w)), (self.tile if self.key_tile is None else self.key_tile, (t, h, w))

    def _predicate(self, layout: TokenLayout, axes: tuple[Axis, Axis, Axis]) -> BoxPredicate:
        """The windows as boxes over the whole sequence in tile order; text tokens only meet whole blocks."""
        bounds = torch.zeros(3, layout.tokens, 3, dtype=torch.int32)  # lower, upper, coordinate
        at = layout.coordinates.long()
        for i, axis in enumerate(axes):
            first, end = axis_window(axis.length, axis.window, axis.stride, axis.dilation, axis.causal)
            for row, values in enumerate((first[at[:, i]], end[at[:, i]], at[:, i])):
                bounds[row, layout.video_slice(), i] = values.to(torch.int32)
        queries, keys = self._tilings(layout)
        lower, upper = bounds[:2, tile_order(layout, *queries).query]
        return BoxPredicate(lower, upper, bounds[2, tile_order(layout, *keys).query], keys[1])


def _long_axes(layout: TokenLayout) -> int:
    """Axes that have something to cut (an image has one frame)."""
    return max(1, sum(size > 1 for size in layout.grid))


def _fit(length: int, window: int, stride: int, dilation: int, base: int, causal: bool) -> Axis:
    """The window that is valid on an axis of `length`, scaled from the length `base` (0: as it is)."""
    if base and window:
        ratio = length / base
        window = min(max(2, round(window * ratio)), length)
        stride = max(1, round(stride * ratio))
        dilation = min(max(1, round(dilation * ratio)), max(1, length // window))
    # An axis that is too short for its dilation is not dilated.
    dilation = dilation if dilation <= length // 2 else 1
    longest = length // dilation
    window = longest if window == 0 else min(window, longest)
    return Axis(length, window, min(stride, window), dilation, causal)


def _tile_pairs(axis: Axis, q_tile: Tensor, k_tile: Tensor, rule: str) -> Tensor:
    """Bool `[nq, nk]`: tiles of an axis between which "any" or "all" pairs of coordinates are kept.

    Args:
        axis: the window.
        q_tile, k_tile: tile of every coordinate, int64 `[L]`.
        rule: "any" or "all".
    """
    q_lengths, k_lengths = q_tile.bincount(), k_tile.bincount()
    pairs = torch.zeros(len(q_lengths), axis.length, dtype=torch.int64).index_add_(0, q_tile, axis.kept().long())
    pairs = torch.zeros(len(q_lengths), len(k_lengths), dtype=torch.int64).index_add_(1, k_tile, pairs)
    return pairs > 0 if rule == "any" else pairs == q_lengths.unsqueeze(-1) * k_lengths
